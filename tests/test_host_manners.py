"""Manners in the real host: queued prompts, caching, lists of files, errors, the download, the floor."""

from __future__ import annotations

import copy
import hashlib
import logging
import queue
import re
import sys
import threading
from dataclasses import replace

import numpy as np
import torch
from PIL import Image

from tests import test_download
from tests.global_state import unchanged
from tests.host_comfy import *  # noqa: F403 the fixture host
from tests.host_comfy import ROOT, SIZE, marks

pytestmark = marks
server = test_download.server
FEW = {"steps": 2, "preset": "custom"}
STEPS = {  # number -> node, what is given to it; the other widgets stand at their defaults
    "1": ("LoadImage", {"image": "astronaut.jpg"}),
    "2": ("FaceRig_LoadFaceModel", {}),
    "3": ("FaceRig_LoadDiffusionRig", {"file": "tiny.safetensors"}),
    "4": ("FaceRig_AlignFace", {"photo": ["1", 0], "size": ["3", 1]}),
    "5": ("FaceRig_FitToLandmarks", {"face_model": ["2", 0], "image": ["4", 0], "landmarks": ["4", 2]}),
    "6": ("FaceRig_SHLightEdit", {"face_model": ["2", 0], "face_code": ["5", 0], "azimuth": 60.0}),
    "7": ("FaceRig_EditFace", {"face_model": ["2", 0], "face_code": ["6", 0], "yaw": 5.0}),
    "8": ("FaceRig_RenderBuffers", {"face_model": ["2", 0], "face_code": ["7", 0]}),
    "9": ("FaceRig_DiffusionRigCondition", {"model": ["3", 0], "image": ["4", 0], "buffers": ["8", 0]}),
    "10": ("FaceRig_DDIMInvert", {"model": ["3", 0], "conditioning": ["9", 0], "image": ["4", 0], **FEW}),
    "11": ("FaceRig_ConditionedSample", {"model": ["3", 0], "conditioning": ["9", 0], "seed": 4, **FEW}),
    "12": ("FaceRig_PasteBack", {"photo": ["1", 0], "edited": ["11", 0], "crop": ["4", 1]}),
    "13": ("PreviewImage", {"images": ["12", 0]}),
    "14": ("PreviewImage", {"images": ["10", 1]}),
}


def widgets(host, kind: str) -> dict[str, tuple[str, dict]]:
    """(type, options) of the required widgets of a node; a list of options becomes "COMBO"."""
    required = host.nodes.NODE_CLASS_MAPPINGS[kind].INPUT_TYPES().get("required", {})
    found = {}
    for name, (kind, *more) in required.items():
        about = dict(more[0]) if more else {}
        if isinstance(kind, list):
            kind, about["options"] = "COMBO", kind
        if "default" in about or kind == "COMBO":
            found[name] = kind, about
    return found


def usual(host, kind: str) -> dict:
    """The widgets of a node at their defaults."""
    return {k: about.get("default", about.get("options")) for k, (_, about) in widgets(host, kind).items()}


def graph(host) -> dict:
    return {
        number: {"class_type": kind, "inputs": usual(host, kind) | given}
        for number, (kind, given) in STEPS.items()
    }


def changed(host, number: str, **inputs) -> dict:
    prompt = graph(host)
    prompt[number]["inputs"].update(inputs)
    return prompt


def validated(host, prompt):
    return host.loop.run_until_complete(host.execution.validate_prompt("test", prompt, None))


def results(host, outputs: dict) -> list[bytes]:
    """The pictures of all nodes that showed any, by node."""
    files = [(k, i["filename"]) for k, o in sorted(outputs.items()) for i in o.get("images", ())]
    return [(k, np.asarray(Image.open(host.base / "temp" / f)).tobytes()) for k, f in files]


def alone(host, prompt) -> list:
    """The pictures of a prompt in a host that knows nothing of earlier ones."""
    valid, error, wanted, node_errors = validated(host, prompt)
    assert valid, (error, node_errors)
    executor = host.execution.PromptExecutor(host.server)
    host.loop.run_until_complete(executor.execute_async(prompt, "alone", {}, wanted))
    assert executor.success, executor.status_messages[-1]
    return results(host, executor.history_result["outputs"])


def queued(host, prompts: list[dict]) -> list[list]:
    """The pictures of prompts put into the queue at once, worked off by a thread as the host does."""
    waiting, done = queue.Queue(), []
    executor = host.execution.PromptExecutor(host.server)

    def work():
        while (item := waiting.get()) is not None:
            executor.execute(item[0], str(len(done)), {}, item[1])
            done.append(results(host, executor.history_result["outputs"]) if executor.success else [])

    worker = threading.Thread(target=work)
    worker.start()
    try:
        for prompt in prompts:
            valid, error, wanted, node_errors = validated(host, prompt)
            assert valid, (error, node_errors)
            waiting.put((prompt, wanted))
            for kind in ("FaceRig_LoadDiffusionRig", "FaceRig_LoadFaceParser"):
                host.nodes.NODE_CLASS_MAPPINGS[kind].GET_NODE_INFO_V1()  # as a browser asks for meanwhile
    finally:
        waiting.put(None)
        worker.join()
    return done


def test_two_prompts_queued_at_once_are_as_each_alone(host):
    with unchanged("a prompt", "random numbers of Python"):  # the host names its previews by them
        a = alone(host, graph(host))
    b = alone(host, changed(host, "11", seed=5))
    assert len(a) >= 8 and [k for k, _ in a] == [k for k, _ in b]
    assert {k for k, x in a if x not in [y for _, y in b]} == {"11", "13"}  # what the seed changes
    assert queued(host, [graph(host), changed(host, "11", seed=5), graph(host)]) == [a, b, a]


def test_nothing_runs_twice_without_need(host):
    prompt = graph(host)
    ok, messages, outputs = host.run(prompt)
    assert ok, messages[-1]
    first = results(host, outputs)
    ok, messages, outputs = host.run(copy.deepcopy(prompt))
    cached = next(data["nodes"] for event, data in messages if event == "execution_cached")
    assert ok and set(cached) == set(prompt) and results(host, outputs) == first
    ok, messages, _ = host.run(changed(host, "6", azimuth=-40.0))
    cached = next(data["nodes"] for event, data in messages if event == "execution_cached")
    assert ok and set(prompt) - set(cached) == {str(i) for i in range(6, 15)}


def test_the_lists_of_files_are_fresh(host):
    def offered(kind):
        """As /object_info says it."""
        info = host.nodes.NODE_CLASS_MAPPINGS[kind].GET_NODE_INFO_V1()["input"]["required"]["file"]
        return info[0] if isinstance(info[0], list) else info[1]["options"]

    folder = host.base / "models" / "face_rig"
    kinds = [f"FaceRig_Load{k}" for k in ("FaceModel", "DiffusionRig", "DiFaReli", "FaceParser")]
    kinds += [f"FaceRig_Load{k}" for k in ("IdentityEncoder", "ShadowEstimator")]
    for place in ("new.safetensors", "below/new.pt"):
        (folder / place).parent.mkdir(exist_ok=True)
        (folder / place).write_bytes(b"")
        for kind in kinds:
            assert place in [o.replace("\\", "/") for o in offered(kind)], kind
        (folder / place).unlink()
        assert not [k for k in kinds if place in [o.replace("\\", "/") for o in offered(k)]]


# ---------------------------------------------------------------------------------------------- errors


def test_errors_before_the_run_name_node_and_input(host):
    """What the host itself refuses when a prompt is queued, and what we add to it."""
    without = graph(host)
    del without["5"]["inputs"]["face_model"]
    folder = re.escape(str(host.base / "models" / "face_rig"))
    stale = rf"file - 'file': there is no 'gone.pt' in models/face_rig \({folder}\): put it there and press R"
    cases = [
        (without, "5", "required_input_missing", "face_model"),
        (changed(host, "5", face_model=["4", 0]), "5", "return_type_mismatch", "face_model"),
        (changed(host, "9", model=["2", 0]), "9", "return_type_mismatch", "model"),
        (changed(host, "11", steps="many"), "11", "invalid_input_type", "steps"),
        (
            changed(host, "3", file="gone.pt"),
            "3",
            "custom_validation_failed",
            f"{stale}, or choose 'default",
        ),
    ]
    prompt = graph(host)
    prompt["15"] = {"class_type": "FaceRig_LoadFaceParser", "inputs": {"file": "gone.pt"}}
    prompt["16"] = {
        "class_type": "FaceRig_FaceParse",
        "inputs": {"face_parser": ["15", 0], "image": ["4", 0]},
    }
    prompt["16"]["inputs"]["part"] = widgets(host, "FaceRig_FaceParse")["part"][1]["default"]
    prompt["17"] = {"class_type": "MaskPreview", "inputs": {"mask": ["16", 0]}}
    prompt["17"] = {"class_type": "PreviewImage", "inputs": {"images": ["16", 1]}}
    cases += [(prompt, "15", "custom_validation_failed", f"{stale}, or choose 'download .*, or leave")]
    for prompt, node, kind, details in cases:
        *_, node_errors = validated(host, prompt)
        (error,) = node_errors[node]["errors"]
        assert error["type"] == kind and re.match(details, error["details"]), error


def numbers(host):
    for number, (kind, _) in STEPS.items():
        if kind.startswith("FaceRig_"):
            for name, (of, about) in widgets(host, kind).items():
                if of in ("INT", "FLOAT") and not isinstance(STEPS[number][1].get(name), list):
                    yield number, name, about


def test_numbers_out_of_range_are_refused(host):
    count = 0
    for number, name, about in numbers(host):
        assert "min" in about and "max" in about, (STEPS[number][0], name)
        for value in (about["min"] - 1, about["max"] + 1):
            valid, _, _, node_errors = validated(host, changed(host, number, **{name: value}))
            (error,) = node_errors[number]["errors"]
            assert error["details"].startswith(name), (STEPS[number][0], name, error)
            count += 1
    assert count > 40


def combos(host):
    for number, (kind, _) in STEPS.items():
        if kind.startswith("FaceRig_"):
            for name, (of, _) in widgets(host, kind).items():
                if of == "COMBO":
                    yield number, name


def test_a_choice_that_does_not_exist_is_named(host):
    """Version 0.3.64 does not check choices, later ones do: either way node and input are named."""
    unkind = []
    for number, name in combos(host):
        prompt = changed(host, number, **{name: "nonsense"})
        valid, _, wanted, node_errors = validated(host, prompt)
        if number in node_errors:
            (error,) = node_errors[number]["errors"]
            text, node = error["details"], prompt[number]["class_type"]
        else:
            ok, messages, _ = host.run(prompt)
            if ok and (prompt[number]["class_type"], name) == ("FaceRig_FitToLandmarks", "order"):
                continue  # landmarks are connected, nothing is looked for
            node, text = messages[-1][1].get("node_type"), messages[-1][1].get("exception_message", "")
        named = re.search(rf"\b{name}\b", text)
        if not named or "nonsense" not in text or node != prompt[number]["class_type"]:
            unkind += [(prompt[number]["class_type"], name, text)]
    assert not unkind


def test_a_photo_without_a_face_is_named(host):
    Image.new("RGB", (200, 150), (90, 120, 60)).save(host.base / "input" / "meadow.png")
    ok, messages, _ = host.run(changed(host, "1", image="meadow.png"))
    event, data = messages[-1]
    assert not ok and event == "execution_error"
    assert data["node_type"] == "FaceRig_AlignFace"
    assert re.match(r"'photo': no face found in the picture: use a photo that", data["exception_message"])
    ok, messages, _ = host.run(graph(host))  # and the next prompt is right
    assert ok, messages[-1]


# ---------------------------------------------------------------------------------------------- the download


def test_the_parser_is_fetched_stopped_and_resumed_through_the_api(host, server, monkeypatch, tmp_path):
    import comfy.model_management
    import comfy.utils

    torch.manual_seed(0)
    state = host.core.estimators.parsing.BiSeNet().half().state_dict()
    torch.save(state, tmp_path / "parser.pth")
    server.contents = (tmp_path / "parser.pth").read_bytes()
    (name,) = host.core.download.OFFERED
    offer = host.core.download.OFFERED[name]
    entry = f"download {name} (53 MB, MIT)"
    host_room = sys.modules[host.pack.__name__ + ".nodes"].host
    monkeypatch.setattr(host_room.folders, "fetch_entry", lambda name: entry)
    sha, size = hashlib.sha256(server.contents).hexdigest(), len(server.contents)
    offer = replace(offer, url=server.url, size=size, sha256=sha)
    monkeypatch.setitem(host.core.download.OFFERED, name, offer)
    path = host.base / "models" / "face_rig" / name
    part = path.with_name(name + ".part")
    prompt = {
        "1": {"class_type": "LoadImage", "inputs": {"image": "astronaut.jpg"}},
        "2": {"class_type": "ImageScale", "inputs": {"image": ["1", 0], "upscale_method": "area"}},
        "3": {"class_type": "FaceRig_LoadFaceParser", "inputs": {"file": entry}},
        "4": {"class_type": "FaceRig_FaceParse", "inputs": {"face_parser": ["3", 0], "image": ["2", 0]}},
        "5": {"class_type": "PreviewImage", "inputs": {"images": ["4", 1]}},
    }
    prompt["2"]["inputs"] |= {"width": SIZE, "height": SIZE, "crop": "center"}
    prompt["4"]["inputs"] |= usual(host, "FaceRig_FaceParse")
    assert entry in widgets(host, "FaceRig_LoadFaceParser")["file"][1]["options"]

    def stop_at_a_third(value, total, preview, node_id=None):
        if total == size and value > size / 3:
            comfy.model_management.interrupt_current_processing()

    comfy.utils.set_progress_bar_global_hook(stop_at_a_third)
    try:
        ok, messages, _ = host.run(prompt)
    finally:
        comfy.utils.set_progress_bar_global_hook(None)
    assert not ok and messages[-1][0] == "execution_interrupted", messages[-1]
    assert messages[-1][1]["node_type"] == "FaceRig_LoadFaceParser"
    assert not path.exists() and size / 3 < part.stat().st_size < size / 2
    kept = part.stat().st_size
    try:
        ok, messages, _ = host.run(prompt)
        assert ok, messages[-1]
        assert server.asked[-1][1] == f"bytes={kept}-"
        assert path.read_bytes() == server.contents and not part.exists()
        assert entry not in widgets(host, "FaceRig_LoadFaceParser")["file"][1]["options"]
        ok, messages, _ = host.run(prompt)  # as it was saved, and with the file's own name
        assert ok and len(server.asked) == 2
        prompt["3"]["inputs"]["file"] = name
        ok, messages, _ = host.run(prompt)
        assert ok and len(server.asked) == 2
    finally:
        path.unlink(missing_ok=True)


# ---------------------------------------------------------------------------------------------- the floor


def test_an_older_host_says_one_line_and_goes_on(host, monkeypatch, caplog):
    import comfyui_version

    link = host.base / "custom_nodes" / "older"
    link.symlink_to(ROOT, target_is_directory=True)
    monkeypatch.setattr(comfyui_version, "__version__", "0.3.50")
    with caplog.at_level(logging.WARNING), unchanged("a pack that does not load"):
        assert not host.loop.run_until_complete(host.nodes.load_custom_node(str(link)))
    text = "\n".join(r.getMessage() for r in caplog.records)
    line = "Face Rig needs ComfyUI v0.3.64 or newer, this is v0.3.50 (it is older): update ComfyUI and "
    assert text.endswith(line + "restart it")
    assert len(text.splitlines()) == 1
