"""The pack inside the real ComfyUI, in this process, when COMFYUI_PATH names its folder.

Run it with the Python of that ComfyUI. Nothing is written outside a temporary folder.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.host_comfy import *  # noqa: F403 the fixture host
from tests.host_comfy import ROOT, SIZE, load_graph, marks, of_type

pytestmark = marks


@pytest.fixture
def graph() -> dict:
    return load_graph("Relight with DiffusionRig")


def test_the_pack_loads_quickly_and_every_node_shows(host):
    ours = {k: n for k, n in host.nodes.NODE_CLASS_MAPPINGS.items() if k.startswith("FaceRig_")}
    assert len(ours) == len(sys.modules[host.pack.__name__ + ".nodes"].NODES)
    assert host.seconds < 1
    for name, node in ours.items():
        info = node.GET_NODE_INFO_V1()
        json.dumps(info)
        assert info["display_name"] and info["category"].startswith("Face Rig/"), name
    web = host.nodes.EXTENSION_WEB_DIRS
    assert Path(next(v for v in web.values() if Path(v).parent == ROOT)).samefile(ROOT / "web")


def test_model_folder_is_listed_beside_what_the_user_named(host):
    import folder_paths

    folders, extensions = folder_paths.folder_names_and_paths["face_rig"]
    assert str(host.base / "models" / "face_rig") in folders and {".safetensors", ".pt", ".pth"} < extensions
    assert "tiny.safetensors" in folder_paths.get_filename_list("face_rig")


@pytest.mark.parametrize("file", ["tiny.safetensors", "default (in the pack)"])
def test_the_workflow_runs_to_a_saved_image(host, graph, file):
    of_type(graph, "FaceRig_LoadDiffusionRig")["inputs"]["file"] = file
    ok, messages, outputs = host.run(graph)
    assert ok, messages[-1]
    saved = next(o["images"][0] for k, o in outputs.items() if graph[k]["class_type"] == "SaveImage")
    photo = Image.open(ROOT / "rig_core" / "assets" / "astronaut.jpg").convert("RGB")
    result = Image.open(host.base / "output" / saved["subfolder"] / saved["filename"]).convert("RGB")
    assert result.size == photo.size
    change = np.abs(np.asarray(result, float) - np.asarray(photo, float)).mean(2)
    assert (change == 0).mean() > 0.3  # the rest of the photo is untouched
    assert change.max() > (20 if "default" in file else 1)  # of 255: the face is lit anew
    assert sum("images" in o for o in outputs.values()) >= 7  # previews on the way


def without_inversion(graph: dict, file: str) -> dict:
    """The workflow from random noise, with a model file."""
    of_type(graph, "FaceRig_LoadDiffusionRig")["inputs"]["file"] = file
    del of_type(graph, "FaceRig_ConditionedSample")["inputs"]["noise"]
    del of_type(graph, "FaceRig_PasteBack")["inputs"]["before"]
    return {k: n for k, n in graph.items() if n["class_type"] != "FaceRig_DDIMInvert"}


def test_interrupt_stops_the_workflow_within_a_step(host, graph):
    import comfy.model_management
    import comfy.utils

    graph = without_inversion(graph, "tiny.safetensors")
    of_type(graph, "FaceRig_ConditionedSample")["inputs"]["steps"] = 500
    steps = []

    def hook(value, total, preview, node_id=None):
        if total == 500:
            steps.append((value, preview and preview[0]))
        if len(steps) == 3:
            comfy.model_management.interrupt_current_processing()

    comfy.utils.set_progress_bar_global_hook(hook)
    try:
        ok, messages, _ = host.run(graph)
    finally:
        comfy.utils.set_progress_bar_global_hook(None)
    assert not ok and messages[-1][0] == "execution_interrupted"
    assert [s for s, _ in steps] == [1, 2, 3] and steps[0][1] == "JPEG"  # the next preview takes its time


def test_errors_reach_the_user_with_the_node_and_the_input(host, graph):
    graph = without_inversion(graph, "tiny.safetensors")
    Image.new("RGB", (200, 150), (90, 120, 60)).save(host.base / "input" / "meadow.png")
    graph["1"]["inputs"]["image"] = "meadow.png"
    ok, messages, _ = host.run(graph)
    event, data = messages[-1]
    assert not ok and event == "execution_error"
    assert data["node_type"] == "FaceRig_AlignFace" and "no face found" in data["exception_message"]
    graph["1"]["inputs"]["image"] = "astronaut.jpg"
    of_type(graph, "FaceRig_LoadDiffusionRig")["inputs"]["file"] = "gone.safetensors"
    checked = host.execution.validate_prompt("test", graph, None)
    *_, node_errors = host.loop.run_until_complete(checked)
    ((_, said),) = node_errors.items()
    assert said["class_type"] == "FaceRig_LoadDiffusionRig" and "gone.safetensors" in str(said["errors"])


def test_the_hosts_euler_on_our_model_is_our_ddim(host):
    core = host.core
    model, size = host.node("LoadDiffusionRig", file="tiny.safetensors")
    assert size == SIZE
    generator = torch.Generator().manual_seed(3)
    physical, photo, noise = (torch.randn(2, c, SIZE, SIZE, generator=generator) for c in (9, 3, 3))
    rig, ours = model.model.diffusion_model.net, sys.modules[host.pack.__name__ + ".nodes.sockets"]
    condition = rig.condition(physical, photo.clamp(-1, 1))
    fields = (condition.physical, condition.code, condition.gain, condition.offset)
    conditioning = ours.conditioning(core.denoisers.rig.DiffusionRig, *fields)
    assert_euler_is_ddim(host, model, rig, noise, condition, conditioning)


def assert_euler_is_ddim(host, model, net, noise, condition, conditioning):
    import comfy.sample
    import comfy.samplers

    core = host.core
    schedule = core.diffusion.respace(core.diffusion.linear_schedule(), "quad20")
    want = core.samplers.sample(net, noise, condition, schedule, "ddim", clip=False)
    sigmas = model.get_model_object("model_sampling").sigmas
    sigmas = torch.cat([sigmas[schedule.timesteps].flip(0), torch.zeros(1)])
    with torch.inference_mode():
        got = comfy.sample.sample_custom(
            model,
            noise,
            1.0,
            comfy.samplers.sampler_object("euler"),
            sigmas,
            conditioning,
            conditioning,
            torch.zeros_like(noise),
        )
    assert (got - want).norm() / want.norm() < 1e-4


def test_the_hosts_euler_on_difareli_is_our_ddim(host):
    core, ours = host.core, sys.modules[host.pack.__name__ + ".nodes.sockets"]
    model, size = host.node("LoadDiFaReli", file="relight.safetensors", modulator="beside it, same name")
    assert size == SIZE
    generator = torch.Generator().manual_seed(4)
    spatial, noise = (torch.randn(2, c, SIZE, SIZE, generator=generator) for c in (6, 3))
    vector = torch.randn(1, 241, generator=generator)  # shared by both
    net = model.model.diffusion_model.net
    conditioning = ours.conditioning(core.denoisers.relight.DiFaReli, spatial, vector)
    assert_euler_is_ddim(host, model, net, noise, net.condition(spatial, vector), conditioning)


DIFARELI = ["Relight a portrait", "Copy the light of a photo", "Shadow strength", "Light orbit to frames"]


def with_difareli(graph: dict, file: str) -> dict:
    """The workflow with a model file, as few frames and steps as a random one is worth."""
    of_type(graph, "FaceRig_LoadDiFaReli")["inputs"]["file"] = file
    if "default" not in file:
        of_type(graph, "FaceRig_DDIMInvert")["inputs"]["preset"] = "fast (20+20)"
    return graph


@pytest.mark.parametrize(
    "name, file",
    [(name, "relight.safetensors") for name in DIFARELI] + [("Relight a portrait", "default (in the pack)")],
)
def test_difareli_workflows_run_to_saved_images(host, name, file):
    graph = with_difareli(load_graph(name), file)
    ok, messages, outputs = host.run(graph)
    assert ok, messages[-1]
    saved = next(o["images"] for k, o in outputs.items() if graph[k]["class_type"] == "SaveImage")
    want = {"Shadow strength": 5, "Light orbit to frames": 16}
    assert len(saved) == want.get(name, 1)
    photo = np.asarray(Image.open(ROOT / "rig_core" / "assets" / "astronaut.jpg").convert("RGB"), float)
    results = [
        np.asarray(Image.open(host.base / "output" / s["subfolder"] / s["filename"]).convert("RGB"), float)
        for s in saved
    ]
    for result in results:
        assert result.shape == photo.shape
        assert (np.abs(result - photo).max(2) == 0).mean() > 0.6  # all that is not near the head
    if "default" in file:
        assert np.abs(results[-1] - photo).max() > 15  # of 255: the face is lit anew
    assert not np.array_equal(results[0], results[-1]) or len(results) == 1


def test_without_an_edit_the_photo_comes_back_bit_for_bit(host):
    graph = with_difareli(load_graph("Relight a portrait"), "relight.safetensors")
    for node in graph.values():
        if node["class_type"] == "FaceRig_DiFaReliCondition":
            node["inputs"].pop("light", None)
    ok, messages, outputs = host.run(graph)
    assert ok, messages[-1]
    saved = next(o["images"][0] for k, o in outputs.items() if graph[k]["class_type"] == "SaveImage")
    result = Image.open(host.base / "output" / saved["subfolder"] / saved["filename"]).convert("RGB")
    photo = Image.open(ROOT / "rig_core" / "assets" / "astronaut.jpg").convert("RGB")
    assert np.array_equal(np.asarray(result), np.asarray(photo))


def test_only_the_light_changes_only_the_relight_runs(host):
    graph = with_difareli(load_graph("Relight a portrait"), "relight.safetensors")
    kinds = {k: n["class_type"].removeprefix("FaceRig_") for k, n in graph.items()}
    ok, messages, _ = host.run(graph)
    assert ok, messages[-1]
    of_type(graph, "FaceRig_SHLightEdit")["inputs"]["azimuth"] = -35.0
    ok, messages, _ = host.run(graph)
    assert ok, messages[-1]
    cached = next(data["nodes"] for event, data in messages if event == "execution_cached")
    ran = sorted(kinds[k] for k in graph.keys() - set(cached))
    assert ran == ["ConditionedSample", "DiFaReliCondition", "PasteBack", "SHLightEdit", "SaveImage"]


def test_stop_within_a_step_of_the_inversion(host):
    import comfy.model_management
    import comfy.utils

    graph = with_difareli(load_graph("Relight a portrait"), "relight.safetensors")
    of_type(graph, "FaceRig_DDIMInvert")["inputs"]["preset"] = "official 1000"
    steps = []

    def hook(value, total, preview, node_id=None):
        if total == 2000:
            steps.append((value, preview and preview[0]))
        if len(steps) == 3:
            comfy.model_management.interrupt_current_processing()

    comfy.utils.set_progress_bar_global_hook(hook)
    try:
        ok, messages, _ = host.run(graph)
    finally:
        comfy.utils.set_progress_bar_global_hook(None)
    assert not ok and messages[-1][0] == "execution_interrupted"
    assert [s for s, _ in steps] == [1, 2, 3] and steps[0][1] == "JPEG"  # the next preview takes its time


def test_difarelis_errors_name_the_node_and_what_to_do(host):
    graph = with_difareli(load_graph("Relight a portrait"), "tiny.safetensors")
    ok, messages, _ = host.run(graph)
    assert not ok and messages[-1][1]["node_type"] == "FaceRig_LoadDiFaReli"
    assert "expected a DiFaReli denoiser" in messages[-1][1]["exception_message"]
    graph = with_difareli(load_graph("Relight a portrait"), "relight.safetensors")
    of_type(graph, "FaceRig_ConditionedSample")["inputs"]["preset"] = "balanced (quad33 ab2)"
    ok, messages, _ = host.run(graph)
    assert not ok and messages[-1][1]["node_type"] == "FaceRig_ConditionedSample"
    assert "'noise' was made with quad20 steps of ab2" in messages[-1][1]["exception_message"]


def test_the_hosts_ksampler_paints_on_our_model(host, graph):
    graph = without_inversion(graph, "tiny.safetensors")
    k = next(k for k, n in graph.items() if n["class_type"] == "FaceRig_ConditionedSample")
    inputs = graph[k]["inputs"]
    graph["100"] = {
        "class_type": "EmptyChromaRadianceLatentImage",
        "inputs": {"width": SIZE, "height": SIZE, "batch_size": 1},
    }
    graph["101"] = {
        "class_type": "KSampler",
        "inputs": {
            "model": inputs["model"],
            "positive": inputs["conditioning"],
            "negative": inputs["conditioning"],
            "latent_image": ["100", 0],
            "seed": 1,
            "steps": 4,
            "cfg": 1.0,
            "sampler_name": "euler",
            "scheduler": "normal",
            "denoise": 1.0,
        },
    }
    graph["102"] = {"class_type": "VAELoader", "inputs": {"vae_name": "pixel_space"}}
    graph[k] = {"class_type": "VAEDecode", "inputs": {"samples": ["101", 0], "vae": ["102", 0]}}
    ok, messages, _ = host.run(graph)
    assert ok, messages[-1]


@pytest.fixture(scope="module")
def album(host) -> Path:
    """Three portraits of one synthetic person in input/album."""
    from training import synth

    folder = host.base / "input" / "album"
    folder.mkdir()
    for i, x in enumerate(synth.render([7000000, 7000001, 7000005], 160, person=[900100] * 3).image):
        picture = (x * 255).round().byte().permute(1, 2, 0).numpy()
        Image.fromarray(picture).save(folder / f"{i}.png")
    return folder


def training_graph(**inputs) -> dict:
    graph = load_graph("Train and use a personal model")
    node = of_type(graph, "FaceRig_TrainPersonalModel")
    node["inputs"] |= {"base": "tiny.safetensors", "steps": 3, "batch": 2} | inputs
    return graph


def files_offered(host) -> list[str]:
    """What /object_info says that Load DiffusionRig can load."""
    info = host.nodes.NODE_CLASS_MAPPINGS["FaceRig_LoadDiffusionRig"].GET_NODE_INFO_V1()
    kind, options = info["input"]["required"]["file"]
    return options["options"] if kind == "COMBO" else kind


def saved(host, graph: dict, outputs: dict) -> dict[str, np.ndarray]:
    """The pictures that Save Image has written, by file name without the number."""
    found = {}
    for key, output in outputs.items():
        if graph[key]["class_type"] == "SaveImage":
            name = output["images"][0]["filename"]
            path = host.base / "output" / output["images"][0]["subfolder"] / name
            found[name.rsplit("_", 2)[0]] = np.asarray(Image.open(path).convert("RGB"), float)
    return found


def test_a_personal_model_is_trained_offered_and_used(host, album):
    assert "my_person.safetensors" not in files_offered(host)
    state, before = torch.get_rng_state(), len(host.sent)
    graph = training_graph()
    ok, messages, outputs = host.run(graph)
    assert ok, messages[-1]
    assert torch.equal(torch.get_rng_state(), state)
    pictures = saved(host, graph, outputs)
    assert pictures["personal_sheet"].shape == (SIZE, 5 * SIZE, 3)
    assert pictures["personal_album"].shape[1] >= 2 * SIZE and pictures["personal_album"].std() > 20
    texts = [data for event, data in host.sent[before:] if isinstance(data, bytes)]
    assert any(b"3 steps, about" in t for t in texts) and any(b"step 3 of 3, loss" in t for t in texts)
    assert "my_person.safetensors" in files_offered(host)

    def not_cached() -> set[str]:
        graph = training_graph()
        ok, messages, _ = host.run(graph)
        assert ok, messages[-1]
        cached = next(data["nodes"] for event, data in messages if event == "execution_cached")
        return {graph[k]["class_type"] for k in graph.keys() - set(cached)}

    assert not not_cached()  # nothing is trained again
    (album / "0.png").touch()
    again = not_cached()  # the training, and what hangs on it
    assert {"FaceRig_TrainPersonalModel", "FaceRig_ConditionedSample", "SaveImage"} <= again
    assert not {"LoadImage", "FaceRig_LoadFaceModel"} & again

    graph = load_graph("Personal identity transfer")
    of_type(graph, "FaceRig_LoadDiffusionRig")["inputs"]["file"] = "my_person.safetensors"
    of_type(graph, "FaceRig_ConditionedSample")["inputs"]["steps"] = 4
    ok, messages, outputs = host.run(graph)
    assert ok, messages[-1]
    photo = np.asarray(Image.open(ROOT / "rig_core" / "assets" / "astronaut.jpg").convert("RGB"), float)
    change = np.abs(saved(host, graph, outputs)["identity"] - photo).max(2)
    assert (change == 0).mean() > 0.6 and (change > 20).mean() > 0.03  # the head, and only that


def test_stopping_a_training_leaves_the_host_as_it_was_and_it_goes_on_later(host, album, graph):
    import comfy.model_management
    import comfy.utils

    steps = []

    def hook(value, total, preview, node_id=None):
        if total == 500:
            steps.append(value)
            if value == 2:
                comfy.model_management.interrupt_current_processing()

    comfy.utils.set_progress_bar_global_hook(hook)
    try:
        ok, messages, _ = host.run(training_graph(name="stopped", steps=500))
    finally:
        comfy.utils.set_progress_bar_global_hook(None)
    assert not ok and messages[-1][0] == "execution_interrupted"
    assert messages[-1][1]["node_type"] == "FaceRig_TrainPersonalModel" and steps == [1, 2, 3]
    about = host.core.files.read(host.base / "models" / "face_rig" / "stopped.safetensors")[1]
    assert about["step"] == 3 and "stopped.safetensors" in files_offered(host)

    graph = without_inversion(graph, "stopped.safetensors")
    of_type(graph, "FaceRig_ConditionedSample")["inputs"]["steps"] = 4
    ok, messages, _ = host.run(graph)
    assert ok, messages[-1]

    ok, messages, _ = host.run(training_graph(name="stopped", steps=5))
    assert ok, messages[-1]
    about = host.core.files.read(host.base / "models" / "face_rig" / "stopped.safetensors")[1]
    assert about["step"] == 5
    log = (host.base / "output" / "face_rig" / "stopped" / "log.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in log] == [3, 5]


def test_a_name_that_is_no_file_name_is_refused_before_it_is_queued(host, album):
    graph = training_graph(name="../over/there")
    valid, error, _, node_errors = host.loop.run_until_complete(
        host.execution.validate_prompt("test", graph, None)
    )
    assert not valid
    (errors,) = node_errors.values()
    assert "letters, digits, - and _ only" in errors["errors"][0]["details"]


@pytest.mark.parametrize("file", ["tiny.safetensors", "default (in the pack)"])
@pytest.mark.parametrize("name", ["Personal identity transfer", "Personal appearance mixing"])
def test_workflows_of_personal_models_run_with_general_ones(host, name, file):
    graph = load_graph(name)
    of_type(graph, "FaceRig_LoadDiffusionRig")["inputs"]["file"] = file
    for node in graph.values():
        if node["class_type"] == "FaceRig_ConditionedSample":
            node["inputs"]["steps"] = 4
    ok, messages, outputs = host.run(graph)
    assert ok, messages[-1]
    (result,) = saved(host, graph, outputs).values()
    if name == "Personal appearance mixing":
        size = 128 if "default" in file else SIZE
        assert result.shape == (size, 2 * size, 3)
        change = np.abs(result[:, :size] - result[:, size:])
        assert "default" not in file or change.mean() > 5  # of 255: the other code shows
    else:
        photo = Image.open(ROOT / "rig_core" / "assets" / "astronaut.jpg").convert("RGB")
        assert (result == np.asarray(photo)).all(2).mean() > 0.6
