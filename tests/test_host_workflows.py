"""Every workflow in the real ComfyUI, through the API.

With FACE_RIG_THUMBNAILS set they run with the models of the pack and draw their pictures, workflows/*.jpg.
"""

from __future__ import annotations

import os
import shutil

import numpy as np
import pytest
from PIL import Image, ImageOps

from tests import draw_workflows, official_files
from tests.host_comfy import *  # noqa: F403 the fixtures
from tests.host_comfy import ROOT, load_graph, marks, of_type
from tests.official_files import official  # noqa: F401 fixture
from tests.test_shadow import encoder, published  # noqa: F401 fixtures

pytestmark = marks
DRAWS = "FACE_RIG_THUMBNAILS" in os.environ
NAMES = list(draw_workflows.WORKFLOWS)
OFFICIAL = ["Official DiffusionRig", "Official DiFaReli"]
ASSETS = ROOT / "rig_core" / "assets"
SIZE = 512  # of a thumbnail
HEADS = {
    (512, 512): (112, 0, 332, 290),
    (512, 600): (96, 60, 416, 460),
    (300, 300): (66, 0, 194, 170),
}  # in the example photos, by their size


@pytest.fixture(scope="module")
def inputs(host) -> dict[str, Image.Image]:
    """What the workflows ask for in input/: photos, a group, an album, a video."""
    from training import synth

    folder = host.base / "input"
    made = {n: Image.open(ASSETS / n).convert("RGB") for n in ("astronaut.jpg", "grace_hopper.jpg")}
    pair = [ImageOps.fit(p, (400, 480), Image.LANCZOS, centering=(0.5, 0)) for p in made.values()]
    group = Image.new("RGB", (800, 480))
    for i, picture in enumerate(pair):
        group.paste(picture, (400 * i, 0))
    group.save(folder / "group.jpg", quality=95)
    made["group.jpg"] = group
    (folder / "album").mkdir(exist_ok=True)
    count = 12 if DRAWS else 3
    person = synth.render([7000000 + i for i in range(count + 1)], 240, person=[900100] * (count + 1)).image
    for i, x in enumerate(person):
        picture = Image.fromarray((x * 255).round().byte().permute(1, 2, 0).numpy())
        picture.save(folder / "album" / f"{i}.png" if i < count else folder / "person.png")
    made["person.png"] = picture  # not in the album
    write_video(folder / "video.mp4", made["astronaut.jpg"].resize((300, 300)))
    return made


def write_video(path, picture: Image.Image, frames: int = 6) -> None:
    """The picture, moving a little."""
    import av

    with av.open(str(path), "w") as out:
        stream = out.add_stream("libx264", rate=12)
        stream.width, stream.height, stream.pix_fmt = *picture.size, "yuv420p"
        for i in range(frames):
            moved = ImageOps.expand(picture, 8).crop((8 - i, 8, 8 - i + picture.width, 8 + picture.height))
            out.mux(stream.encode(av.VideoFrame.from_image(moved)))
        out.mux(stream.encode())


@pytest.fixture(scope="module")
def files(host, official, published):  # noqa: F811
    """Stand-ins of the published files under the names that the workflows have."""
    folder = host.base / "models" / "face_rig"
    for path in (*official.iterdir(), *published.iterdir()):
        shutil.copy(path, folder / path.name)
    for name, path in (
        ("model_stage1.pt", official_files.write_diffusion_rig(folder)),
        ("ImgCond_model.pt", official_files.write_difareli(folder)),
    ):
        path.rename(folder / name)
    next(folder.glob("ImgEncoder_*.pt")).rename(folder / "ImgEncoder_model.pt")
    official_files.write_arcface(folder)
    official_files.write_parser(folder)


def quick(graph: dict) -> dict:
    """With small random models and few steps, unless pictures are wanted."""
    for node in graph.values():
        kind, values = node["class_type"].removeprefix("FaceRig_"), node["inputs"]
        default = values.get("file") == "default (in the pack)"
        if kind == "LoadDiffusionRig" and default:
            values["file"] = "tiny.safetensors"
        elif kind == "LoadDiFaReli" and default:
            values["file"] = "relight.safetensors"
        elif kind in ("DDIMInvert", "RelightVideo") and values.get("preset") != "custom":
            values["preset"] = "fast (20+20)"
        elif kind == "TrainPersonalModel":
            values |= {"base": "tiny.safetensors", "steps": 3, "batch": 2}
        for name in (
            ("steps",) if kind in ("ConditionedSample", "DDIMInvert", "KSampler", "GuidedSigmas") else ()
        ):
            values[name] = min(values.get(name, 4), 4)
        if kind == "LightOrbit":
            values["frames"] = 3
    return graph


def pictures(host, graph: dict, outputs: dict) -> list[Image.Image]:
    """What Save Image has written, in the order of the nodes."""
    return [
        Image.open(host.base / "output" / s["subfolder"] / s["filename"]).convert("RGB")
        for key in sorted(outputs, key=int)
        if graph[key]["class_type"] == "SaveImage"
        for s in outputs[key]["images"]
    ]


def with_own_models(graph: dict) -> dict:
    """A workflow of the published files with the models of the pack, for its picture."""
    for node in graph.values():
        kind, values = node["class_type"].removeprefix("FaceRig_"), node["inputs"]
        if "file" in values:
            values["file"] = "default (in the pack)"
        if kind == "DECAEncode":
            node["class_type"] = "FaceRig_FitToLandmarks"
        elif kind == "DiFaReliCondition":
            values["cast_shadow"] = True
            del values["head"]
        elif kind == "DDIMInvert" and values["preset"] != "custom":
            values["preset"] = "balanced (quad33 ab2)"
    return {k: n for k, n in graph.items() if not n["class_type"].endswith(("FaceParse", "FaceParser"))}


@pytest.mark.parametrize("name", NAMES)
def test_workflow_runs(host, inputs, files, name):
    graph = load_graph(name)
    graph = quick(graph) if not DRAWS else with_own_models(graph) if name in OFFICIAL else graph
    if name == "Train and use a personal model":
        of_type(graph, "LoadImage")["inputs"]["image"] = "person.png"
    ok, messages, outputs = host.run(graph)
    assert ok, messages[-1]
    made = pictures(host, graph, outputs)
    films = [
        host.base / "output" / s["subfolder"] / s["filename"]
        for key, o in outputs.items()
        if graph[key]["class_type"] == "SaveVideo"
        for s in o["images"]
    ]
    assert made or films
    assert all(f.stat().st_size > 1000 for f in films)
    source = of_type(graph, "LoadImage")["inputs"]["image"] if name != "Relight a video" else None
    others = (
        "Personal appearance mixing",
        "Relight a video",
    )  # elsewhere the photo comes out at its own size
    assert name in others or any(picture.size == inputs[source].size for picture in made)
    for picture in made:
        x = np.asarray(picture, float)
        assert x.std() > 3
        if source and picture.size == inputs[source].size:
            same = (x == np.asarray(Image.open(host.base / "input" / source).convert("RGB"), float)).all(2)
            assert 0.3 < same.mean() < 1, name  # the edit shows, and only near a head
    if name == "Relight a video":
        before, after = (frames(path) for path in (host.base / "input" / "video.mp4", films[0]))
        change = [
            np.abs(np.asarray(a, float) - np.asarray(b, float)) for a, b in zip(before, after, strict=True)
        ]
        assert len(before) == 6
        assert all((c.max(2) < 12).mean() > 0.5 for c in change)  # away from the head only the codec's
        assert not DRAWS or all(c.max() > 40 for c in change)
    if DRAWS:
        draw(name, inputs, made, films)


def draw(name, inputs, made, films) -> None:
    """workflows/NAME.jpg: what goes in and what comes out, the heads of it."""
    if films and not made:
        made = frames(films[0])
    photo, other = inputs["astronaut.jpg"], inputs["grace_hopper.jpg"]
    half, quarter = (SIZE // 2, SIZE), (SIZE // 2, SIZE // 2)
    if name == "Several faces in a group photo":
        tiles = [
            ((0, 0), (SIZE, SIZE // 2), inputs["group.jpg"]),
            ((0, SIZE // 2), (SIZE, SIZE // 2), made[0]),
        ]
    elif name == "Train and use a personal model":
        tiles = [((0, 0), (SIZE, SIZE // 2), made[0]), ((0, SIZE // 2), quarter, inputs["person.png"])]
        tiles += [((SIZE // 2, SIZE // 2), quarter, made[-1])]
    elif len(made) > 4:
        four = [made[i * (len(made) - 1) // 3] for i in range(4)]
        tiles = [((i % 2 * SIZE // 2, i // 2 * SIZE // 2), quarter, x) for i, x in enumerate(four)]
    elif name == "Stock KSampler":
        tiles = [
            ((0, 0), quarter, photo),
            ((0, SIZE // 2), quarter, made[0]),
            ((SIZE // 2, 0), half, made[1]),
        ]
    elif name in ("Copy the light of a photo", "Personal appearance mixing"):
        tiles = [((0, 0), quarter, photo), ((0, SIZE // 2), quarter, other), ((SIZE // 2, 0), half, made[0])]
    else:
        tiles = [((0, 0), half, photo), ((SIZE // 2, 0), half, made[0])]
    out = Image.new("RGB", (SIZE, SIZE), (24, 24, 26))
    for (x, y), (w, h), picture in tiles:
        head = HEADS.get(picture.size)
        picture = picture.crop(head) if head else picture
        wide = picture.width * h > 1.7 * w * picture.height
        fit = (
            ImageOps.contain(picture, (w, h)) if wide else ImageOps.fit(picture, (w, h), centering=(0.5, 0.3))
        )
        out.paste(fit, (x + (w - fit.width) // 2, y + (h - fit.height) // 2))
    out.save(ROOT / "workflows" / f"{name}.jpg", quality=88)


def frames(path) -> list[Image.Image]:
    import av

    with av.open(str(path)) as film:
        return [f.to_image() for f in film.decode(video=0)]
