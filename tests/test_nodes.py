"""The nodes against a double of the host: schemas, the way from photo to photo, bad input.

The photo is a render of the open head's mean face, so that landmarks, pose and light are known exactly.
"""

from __future__ import annotations

import ast
import asyncio
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from tests import host_double

ROOT = Path(__file__).resolve().parents[1]
SIZE = 64


class Pack:
    """The loaded pack with its nodes, and the double's records."""

    def __init__(self, monkeypatch, folder: Path):
        self.host = host_double.install(monkeypatch, folder)
        self.root, extension = host_double.load_pack(monkeypatch)
        self.nodes = host_double.nodes_by_id(asyncio.run(extension.get_node_list()))
        self.core = sys.modules[self.root.__name__ + ".rig_core"]
        self.nodes_module = sys.modules[self.root.__name__ + ".nodes"]

    def run(self, node_id: str, **inputs):
        """Run a node as the host does, in inference mode, widgets at their defaults."""
        node = self.nodes["FaceRig_" + node_id]
        schema = node.define_schema()
        widgets = {i.id: i.default for i in schema.inputs if i.widget and not i.optional}
        unknown = set(inputs) - {i.id for i in schema.inputs}
        assert not unknown, unknown
        with torch.inference_mode():
            out = node.execute(**{**widgets, **inputs}).result
        assert len(out) == len(schema.outputs)
        return out


@pytest.fixture(scope="module")
def pack(tmp_path_factory):
    with pytest.MonkeyPatch.context() as monkeypatch:
        yield Pack(monkeypatch, tmp_path_factory.mktemp("host"))


@pytest.fixture(autouse=True)
def fresh(pack):
    pack.host.interrupt_after = None
    pack.host.progress.clear()


@pytest.fixture(scope="module")
def head(pack):
    return pack.run("LoadFaceModel")[0]


@pytest.fixture(scope="module")
def model(pack):
    """A small DiffusionRig with random weights, written to and read from the model folder."""
    rig = pack.core.denoisers.rig
    torch.manual_seed(0)
    net = rig.DiffusionRig(rig.RigConfig(SIZE, 32, (1, 1, 2), 1, (16,), latent_dim=16, encoder_width=8))
    torch.nn.init.normal_(net.denoisingUNet.out[2].weight, std=0.02)
    path = pack.host.folder / "models" / "face_rig" / "tiny.safetensors"
    pack.core.checkpoints.save_denoiser(path, net)
    model, size = pack.run("LoadDiffusionRig", file="tiny.safetensors")
    assert size == SIZE
    return model


@pytest.fixture(scope="module")
def scene(pack, head):
    """A photo [1,96,128,3] with the mean face in it and its landmarks [1,68,2]."""
    buffers = pack.core.buffers
    code = head.mean_code(1, (96, 128))
    b = buffers.render(head, code)
    background = torch.linspace(0.2, 0.6, 128).expand(1, 3, 96, 128)
    photo = b.rendered * b.mask + background * (1 - b.mask)
    points = head.landmarks(head.verts(code.shape, code.exp, code.pose), code.pose)
    landmarks = buffers.to_pixels(buffers.to_image(points, code), code.size)
    return photo.clamp(0, 1).permute(0, 2, 3, 1).contiguous(), landmarks


@pytest.fixture(scope="module")
def face(pack, head, scene):
    """Aligned image, crop, landmarks, code of the scene."""
    image, crop, points = pack.run("AlignFace", photo=scene[0], size=SIZE, landmarks=scene[1])
    code, light, overlay = pack.run("FitToLandmarks", face_model=head, image=image, landmarks=points)
    return image, crop, points, code


# the pack


def test_root_module_has_nothing_but_the_entry_point(pack):
    public = {n for n in vars(pack.root) if not n.startswith("_")}
    assert public - {"nodes", "rig_core"} == {"WEB_DIRECTORY", "comfy_entrypoint"}


def test_only_host_py_touches_the_host():
    for path in (ROOT / "nodes").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
            names += [a.name for a in node.names] if isinstance(node, ast.Import) else []
            for name in names:
                assert name.split(".")[0] != "training"
                if path.name != "host.py":
                    assert name.split(".")[0] not in ("comfy", "folder_paths", "server", "execution"), (
                        path,
                        name,
                    )


def test_import_is_fast_and_changes_nothing_global(tmp_path):
    code = (
        "import torch, pytest, sys, time, pathlib, numpy, PIL.Image\n"
        f"sys.path.insert(0, {str(ROOT / 'tests')!r})\n"
        "import host_double\n"
        "m = pytest.MonkeyPatch()\n"
        f"host_double.install(m, pathlib.Path({str(tmp_path)!r}))\n"
        "def state(): return (torch.get_default_dtype(), torch.is_grad_enabled(), torch.get_num_threads(),\n"
        "    torch.backends.cudnn.benchmark, torch.initial_seed(), list(sys.path))\n"
        "before, start = state(), time.process_time()\n"
        "host_double.load_pack(m)\n"
        "seconds = time.process_time() - start\n"
        "assert state() == before\n"
        "print(seconds)\n"
    )
    out = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120
    )
    assert float(out.stdout.split()[-1]) < 0.5


def test_every_node_explains_itself(pack):
    for node_id, node in pack.nodes.items():
        schema = node.define_schema()
        assert node_id.startswith("FaceRig_") and schema.display_name and schema.description
        assert schema.category.startswith("Face Rig/")
        for i in schema.inputs:
            assert i.tooltip, (node_id, i.id)
            if i.options is not None:
                assert i.default in i.options, (node_id, i.id)
            elif i.min is not None:
                assert i.min <= i.default <= i.max, (node_id, i.id)
        assert all(o.tooltip and o.display_name for o in schema.outputs), node_id
        page = (ROOT / "web" / "docs" / f"{node_id}.md").read_text(encoding="utf-8")
        for i in schema.inputs:
            assert f"`{i.id}`" in page, f"{node_id}.md does not mention {i.id}"
    pages = {p.stem for p in (ROOT / "web" / "docs").glob("*.md")}
    assert pages == set(pack.nodes)


def widgets(schema) -> list[str]:
    """Names of a node's values in a saved workflow, in order."""
    names = []
    for i in schema.inputs:
        if i.widget:
            names.append(i.id)
            if i.control_after_generate:
                names.append(i.id + ":control")
    return names


@pytest.mark.parametrize("path", sorted((ROOT / "workflows").glob("*.json")), ids=lambda p: p.stem)
def test_workflow_fits_the_schemas(pack, path):
    graph = json.loads(path.read_text(encoding="utf-8"))
    assert path.with_suffix(".jpg").is_file()
    links = {link[0]: link for link in graph["links"]}
    seen = set()
    for node in graph["nodes"]:
        if not node["type"].startswith("FaceRig_"):
            continue
        schema = pack.nodes[node["type"]].define_schema()
        values = dict(zip(widgets(schema), node["widgets_values"], strict=True))
        for i in schema.inputs:
            if i.widget and i.options is not None:
                assert values[i.id] in i.options, (node["type"], i.id)
            elif i.widget and i.min is not None:
                assert i.min <= values[i.id] <= i.max, (node["type"], i.id)
        sockets = {i.id: i for i in schema.inputs}
        for slot, entry in enumerate(node["inputs"]):
            assert entry["type"] == sockets[entry["name"]].io_type
            if entry["link"] is not None:
                assert links[entry["link"]][3:5] == [node["id"], slot]
                seen.add(entry["link"])
        for slot, (entry, o) in enumerate(zip(node["outputs"], schema.outputs, strict=True)):
            assert (entry["name"], entry["type"]) == (o.display_name, o.io_type)
            assert all(links[k][1:3] == [node["id"], slot] for k in entry["links"] or [])
        required = {i.id for i in schema.inputs if not i.widget and not i.optional}
        assert required <= {e["name"] for e in node["inputs"] if e["link"] is not None}
    assert seen


@pytest.mark.parametrize("path", sorted((ROOT / "tests" / "api").glob("*.json")), ids=lambda p: p.stem)
def test_api_graph_is_the_workflow(pack, path):
    api = json.loads(path.read_text(encoding="utf-8"))
    ui = json.loads((ROOT / "workflows" / path.name).read_text(encoding="utf-8"))
    links = {link[0]: link for link in ui["links"]}
    for node in ui["nodes"]:
        if not node["type"].startswith("FaceRig_"):
            continue
        names = widgets(pack.nodes[node["type"]].define_schema())
        want = {n: v for n, v in zip(names, node["widgets_values"], strict=True) if ":" not in n}
        for entry in node["inputs"]:
            if entry["link"] is not None:
                want[entry["name"]] = [str(links[entry["link"]][1]), links[entry["link"]][2]]
        assert api[str(node["id"])]["class_type"] == node["type"]
        assert api[str(node["id"])]["inputs"] == want, node["type"]


# from photo to photo


def psnr(a: Tensor, b: Tensor) -> float:
    return float(-10 * (a - b).square().mean().log10())


def test_align_puts_the_face_upright_in_the_middle(face):
    image, crop, points, _ = face
    assert image.shape == (1, SIZE, SIZE, 3) and image.dtype == torch.float32
    eyes = points[0, 36:48].view(2, 6, 2).mean(1)
    assert (eyes[1, 1] - eyes[0, 1]).abs() < 0.5
    assert (eyes.mean(0)[0] - (SIZE - 1) / 2).abs() < 0.5
    assert crop.found.tolist() == [True]


def test_fit_finds_the_rendered_face_again(pack, head, face):
    image, _, points, code = face
    found = head.landmarks(head.verts(code.shape, code.exp, code.pose), code.pose)
    found = pack.core.buffers.to_pixels(pack.core.buffers.to_image(found, code), code.size)
    assert (found - points)[0, 17:].norm(dim=1).median() < 0.5  # px of 64
    b = pack.core.buffers.render(head, code)
    photo = image.permute(0, 3, 1, 2)
    inside = b.mask.expand_as(photo) > 0
    assert psnr(b.rendered[inside], photo[inside]) > 24
    assert code.pose[0, :3].abs().max() < 0.05
    assert not code.light.requires_grad and not code.shape.requires_grad


def test_light_comes_from_the_side_asked_for(pack, head, face):
    code = face[3]

    def sides(azimuth, **more):
        lit, light, ball = pack.run("SHLightEdit", face_model=head, face_code=code, azimuth=azimuth, **more)
        assert torch.equal(lit.light, light) and ball.shape[0] == 1 and ball.shape[3] == 3
        b = pack.run("RenderBuffers", face_model=head, face_code=lit)[0]
        half = SIZE // 2
        return [
            float(x[m > 0].mean())
            for x, m in zip(b.shading.mean(1, True).split(half, 3), b.mask.split(half, 3))
        ]

    left, right = sides(70.0)
    assert right > 1.15 * left
    mirrored = sides(-70.0)
    assert mirrored[0] > 1.15 * mirrored[1]
    even = sides(70.0, intensity=0.0)
    assert abs(even[0] / even[1] - 1) < 0.08
    full = sides(70.0, ambient=0.8)
    assert full[1] / full[0] < right / left and full[0] > left
    red = pack.run("SHLightEdit", face_model=head, face_code=code, red=1.0, green=0.5, blue=0.5)[1]
    even = pack.run("SHLightEdit", face_model=head, face_code=code)[1]
    tint = (red / even)[0, 0]
    assert tint[0] > 1.03 * tint[1] and tint[0] > 1.03 * tint[2]
    raw = pack.run("SHLightEdit", face_model=head, face_code=code, azimuth=70.0, mode="raw")[1]
    physical = pack.core.light_prior.edit(code.light, 70.0, 20.0, raw=True)
    torch.testing.assert_close(raw, physical)


def test_light_mix_zero_keeps_the_photos_light(pack, head, face):
    code = face[3]
    lit, light, _ = pack.run("SHLightEdit", face_model=head, face_code=code, mix=0.0)
    assert torch.equal(light, code.light) and torch.equal(lit.shape, code.shape)


def test_a_given_light_replaces_the_sliders(pack, head, face):
    code = face[3]
    given = torch.linspace(-0.2, 0.5, 54).reshape(2, 9, 3)
    lit, light, ball = pack.run("SHLightEdit", face_model=head, face_code=code, light=given)
    assert torch.equal(light, given) and len(lit) == 2 and len(ball) == 2


def test_edit_face_moves_what_the_sliders_say(pack, head, face):
    code = face[3]

    def points(**edit):
        new = pack.run("EditFace", face_model=head, face_code=code, **edit)[0]
        p = head.landmarks(head.verts(new.shape, new.exp, new.pose), new.pose)
        return pack.core.buffers.to_pixels(pack.core.buffers.to_image(p, new), new.size)[0]

    rest = points()
    assert torch.equal(rest, points(yaw=0.0))
    turned = points(yaw=20.0) - rest
    assert turned[30, 0] - turned[36:48, 0].mean() > 1  # the nose goes farther right than the eyes, px of 64
    lifted = points(pitch=15.0) - rest
    assert lifted[30, 1] - lifted[36:48, 1].mean() < -0.5
    rolled = points(roll=20.0)
    assert (
        rolled[42:48, 1].mean() < rolled[36:42, 1].mean() - 2
    )  # counter-clockwise lifts the right of the picture
    opened = points(jaw=15.0)
    assert opened[57, 1] - opened[51, 1] > rest[57, 1] - rest[51, 1] + 1.5
    smiling = points(smile=1.0) - rest
    assert smiling[48, 0] < -0.3 and smiling[54, 0] > 0.3 and smiling[[48, 54], 1].mean() < -0.3
    frown = points(frown=1.0) - rest
    assert frown[[48, 54], 1].mean() > 0.1
    raised = points(raise_brows=1.0) - rest
    assert raised[17:27, 1].mean() < -0.3
    blinked = points(blink=1.0)
    assert (blinked[41, 1] - blinked[37, 1]) < 0.5 * (rest[41, 1] - rest[37, 1])
    puckered = points(pucker=1.0)
    assert puckered[54, 0] - puckered[48, 0] < rest[54, 0] - rest[48, 0] - 0.5


def test_every_expression_slider_is_known_to_the_head(pack, head):
    for _, shapes in pack.nodes_module.rig.EXPRESSIONS.values():
        assert set(shapes) <= set(head.expression_names)


def test_render_buffers_gives_the_stack_and_pictures_of_it(pack, head, face):
    buffers, rendered, normal, albedo, shading, mask = pack.run(
        "RenderBuffers", face_model=head, face_code=face[3]
    )
    assert buffers.stack().shape == (1, 9, SIZE, SIZE)
    assert rendered.shape == normal.shape == albedo.shape == shading.shape == (1, SIZE, SIZE, 3)
    assert mask.shape == (1, SIZE, SIZE) and set(mask.unique().tolist()) == {0.0, 1.0}
    nose = normal[0, SIZE // 2, SIZE // 2]
    assert nose[2] > 0.7  # the middle of the face looks at the viewer
    inside = mask[0] > 0
    want = (albedo * buffers.shading.permute(0, 2, 3, 1)).clamp(0, 1)
    torch.testing.assert_close(rendered[0][inside], want[0][inside], atol=1e-5, rtol=0)
    assert pack.run("RenderBuffers", face_model=head, face_code=face[3], size=96)[1].shape == (1, 96, 96, 3)


@pytest.fixture(scope="module")
def conditioned(pack, head, model, face):
    buffers = pack.run("RenderBuffers", face_model=head, face_code=face[3])[0]
    return pack.run("DiffusionRigCondition", model=model, image=face[0], buffers=buffers)[0]


def test_condition_is_what_the_network_makes(pack, head, model, face, conditioned):
    rig = model.model.diffusion_model.rig
    buffers = pack.run("RenderBuffers", face_model=head, face_code=face[3])[0]
    want = rig.condition(buffers.stack(), face[0].permute(0, 3, 1, 2) * 2 - 1)
    fields = conditioned[0][1]
    torch.testing.assert_close(fields["rig_physical"], want.physical)
    torch.testing.assert_close(fields["rig_code"], want.code, atol=1e-5, rtol=1e-5)
    x, t = torch.randn(1, 3, SIZE, SIZE, generator=torch.manual_seed(1)), torch.tensor([500.0])
    out = model.model.diffusion_model(x, t, context=None, transformer_options={}, **fields)
    torch.testing.assert_close(out, rig(x, t, want), atol=1e-4, rtol=1e-4)
    conds = model.model.extra_conds(device=torch.device("cpu"), noise=x, **fields)
    assert set(conds) == set(fields) and torch.equal(conds["rig_gain"].cond, fields["rig_gain"])


def test_sampling_repeats_with_the_seed_and_reports_each_step(pack, model, conditioned):
    first = pack.run("ConditionedSample", model=model, conditioning=conditioned, seed=5, steps=6)[0]
    assert [p[:2] for p in pack.host.progress] == [(i, 6) for i in range(1, 7)]
    kind, picture, limit = pack.host.progress[0][2]
    assert (kind, picture.size, limit) == ("JPEG", (SIZE, SIZE), 512)
    assert model in pack.host.loaded
    again = pack.run("ConditionedSample", model=model, conditioning=conditioned, seed=5, steps=6)[0]
    other = pack.run("ConditionedSample", model=model, conditioning=conditioned, seed=6, steps=6)[0]
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert first.shape == (1, SIZE, SIZE, 3) and 0 <= first.min() and first.max() <= 1


def test_interrupt_stops_within_a_step(pack, model, conditioned):
    pack.host.interrupt_after = 3
    with pytest.raises(host_double.Interrupted):
        pack.run("ConditionedSample", model=model, conditioning=conditioned, steps=50)
    assert len(pack.host.progress) == 3
    pack.host.interrupt_after = len(pack.host.progress)
    with pytest.raises(host_double.Interrupted):
        pack.run(
            "DDIMInvert", model=model, conditioning=conditioned, image=torch.zeros(1, SIZE, SIZE, 3), steps=50
        )
    assert len(pack.host.progress) == 3


def test_inversion_and_sampling_are_the_cores(pack, model, conditioned, face):
    core, rig = pack.core, model.model.diffusion_model.rig
    condition = pack.nodes_module.host.condition(conditioned)
    schedule = core.diffusion.respace(core.diffusion.linear_schedule(), "quad3")
    photo = face[0].permute(0, 3, 1, 2) * 2 - 1
    x_T = core.samplers.invert(rig, photo, condition, schedule, "heun")
    how = {"model": model, "conditioning": conditioned, "steps": 3, "solver": "heun", "spacing": "quad"}
    noise, before = pack.run("DDIMInvert", image=face[0], **how)
    torch.testing.assert_close(noise["samples"], x_T, atol=1e-4, rtol=1e-4)
    want = core.samplers.sample(rig, x_T, condition, schedule, "heun").clamp(-1, 1) / 2 + 0.5
    torch.testing.assert_close(before, want.permute(0, 2, 3, 1), atol=1e-3, rtol=0)
    back = pack.run("ConditionedSample", noise=noise, **how)[0]
    torch.testing.assert_close(back, before, atol=1e-3, rtol=0)
    even = pack.run("ConditionedSample", noise=noise, **{**how, "spacing": "even"})[0]
    assert (even - back).abs().max() > 0.01
    anew = pack.run("ConditionedSample", seed=3, **how)[0]
    noise, before = pack.run("DDIMInvert", image=face[0], hidden=torch.ones(1, 96, 96), seed=3, **how)
    torch.testing.assert_close(before, anew, atol=1e-3, rtol=0)  # all hidden: all random


def test_one_photo_under_several_lights_is_a_batch(pack, head, model, face):
    lights = torch.stack([head.light_mean, head.light_mean + head.light_std])
    code = pack.run("SHLightEdit", face_model=head, face_code=face[3], light=lights)[0]
    buffers = pack.run("RenderBuffers", face_model=head, face_code=code)[0]
    cond = pack.run("DiffusionRigCondition", model=model, image=face[0], buffers=buffers)[0]
    out = pack.run("ConditionedSample", model=model, conditioning=cond, steps=4)[0]
    assert out.shape == (2, SIZE, SIZE, 3) and not torch.equal(out[0], out[1])
    alone = pack.run("RenderBuffers", face_model=head, face_code=code[1])[0]
    cond = pack.run("DiffusionRigCondition", model=model, image=face[0], buffers=alone)[0]
    one = pack.run("ConditionedSample", model=model, conditioning=cond, steps=4)[0]
    torch.testing.assert_close(
        out[1:], one, atol=1e-3, rtol=0
    )  # the same noise for all, and no picture is lost


def test_long_batches_go_in_parts_and_come_out_whole(pack, head, model, face, monkeypatch):
    image, code = face[0].expand(3, -1, -1, -1), face[3].expand(3)
    points = face[2].expand(3, -1, -1)
    lights = torch.stack(
        [head.light_mean, head.light_mean + head.light_std, head.light_mean - head.light_std]
    )

    def run():
        fitted = pack.run("FitToLandmarks", face_model=head, image=image, landmarks=points)[0]
        lit = pack.run("SHLightEdit", face_model=head, face_code=code, light=lights)[0]
        buffers = pack.run("RenderBuffers", face_model=head, face_code=lit)[0]
        cond = pack.run("DiffusionRigCondition", model=model, image=image, buffers=buffers)[0]
        how = {"model": model, "conditioning": cond, "steps": 2}
        noise, before = pack.run("DDIMInvert", image=image, **how)
        painted = pack.run("ConditionedSample", noise=noise, **how)[0]
        return fitted.shape, fitted.light, buffers.stack(), noise["samples"], before, painted

    whole = run()
    host = pack.nodes_module.host
    monkeypatch.setattr(host, "chunks", lambda n, *_: host._slices(n, 2))
    monkeypatch.setattr(host, "batches", lambda model, n, *_: host._slices(n, 2))
    for a, b in zip(run(), whole, strict=True):
        assert len(a) == 3
        torch.testing.assert_close(a, b, atol=2e-3, rtol=1e-3)


def test_the_batch_fits_the_memory(pack, model):
    host = pack.nodes_module.host
    one = model.model.memory_required([1, 3, 512, 512])
    assert one == pytest.approx(512 * 512 * 0.15 * 0.1 * 32 / 128 * 2**20)
    want = min(16, int(2**32 / 2 // one))  # the double has 4 GiB free
    assert [s.stop - s.start for s in host.batches(model, 5, 512, 512)] == [want] * (5 // want) + [
        5 % want
    ] * (5 % want > 0)
    assert host.batches(model, 40, 64, 64) == [slice(0, 16), slice(16, 32), slice(32, 40)]


def test_move_photo_without_an_edit_changes_nothing_and_a_turn_hides_a_cheek(pack, head, scene, face):
    image, _, _, code = face
    moved, hidden, _ = pack.run("MovePhoto", face_model=head, image=image, source=code, target=code)
    assert psnr(moved, image) > 40 and hidden.max() < 0.05
    turned = pack.run("EditFace", face_model=head, face_code=code, yaw=25.0)[0]
    moved, hidden, motion = pack.run("MovePhoto", face_model=head, image=image, source=code, target=turned)
    assert (moved - image).abs().mean() > 0.01 and 0 < hidden.mean() < 0.3
    photo, crop = scene[0], face[1]
    out = pack.run("PasteBack", photo=photo, edited=moved, before=moved, crop=crop, motion=motion)[0]
    at_crop = pack.run("AlignFace", photo=out, size=SIZE, landmarks=scene[1])[0]
    middle = slice(SIZE // 4, -SIZE // 4)
    assert psnr(at_crop[:, middle, middle], moved[:, middle, middle]) > 28  # the photo itself has turned
    with pytest.raises(ValueError, match="'motion' needs 'before'"):
        pack.run("PasteBack", photo=photo, edited=moved, crop=crop, motion=motion)


def test_paste_back_without_an_edit_is_the_photo_bit_for_bit(pack, scene, face):
    photo = scene[0]
    out = pack.run("PasteBack", photo=photo, edited=face[0], crop=face[1])[0]
    assert torch.equal(out, photo)
    brighter = (face[0] * 1.3).clamp(0, 1)
    out = pack.run("PasteBack", photo=photo, edited=brighter, crop=face[1])[0]
    assert out.shape == photo.shape and (out - photo).mean() > 0.005
    mask = torch.zeros(1, 8, 8)
    assert torch.equal(pack.run("PasteBack", photo=photo, edited=brighter, crop=face[1], mask=mask)[0], photo)
    two = pack.run("PasteBack", photo=photo, edited=torch.cat([brighter, face[0]]), crop=face[1])[0]
    assert torch.equal(two[:1], out) and torch.equal(two[1:], photo)


# bad input


def with_nan(x: Tensor) -> Tensor:
    x = x.clone()
    x[0, 3, 3, 0] = float("nan")
    return x


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: p[:0], "'photo'.*empty"),
        (with_nan, "'photo'.*NaN"),
        (lambda p: p[:, :1, :1], "'photo' is 1 x 1 pixels"),
        (lambda p: p[..., :2], "'photo'.*2"),
        (lambda p: {"samples": p}, "'photo' is not an IMAGE"),
        (lambda p: p * 255, "'photo'.*0..1"),
    ],
    ids=["empty", "nan", "1px", "channels", "type", "range"],
)
def test_unusable_photos_are_named(pack, scene, make, message):
    with pytest.raises(ValueError, match=message):
        pack.run("AlignFace", photo=make(scene[0]), landmarks=scene[1])


def test_grey_and_rgba_photos_work(pack, head, scene):
    photo, points = scene
    grey = pack.run("AlignFace", photo=photo.mean(-1, keepdim=True), size=SIZE, landmarks=points)[0]
    assert grey.shape == (1, SIZE, SIZE, 3) and torch.equal(grey[..., 0], grey[..., 2])
    rgba = torch.cat([photo, torch.rand(1, 96, 128, 1)], -1)
    rgb, crop, _ = pack.run("AlignFace", photo=photo, size=SIZE, landmarks=points)
    assert torch.equal(pack.run("AlignFace", photo=rgba, size=SIZE, landmarks=points)[0], rgb)
    assert torch.equal(pack.run("PasteBack", photo=rgba, edited=rgb, crop=crop)[0], photo)


def test_an_8000_px_photo_is_aligned_first(pack, head, scene):
    photo, points = scene
    large = torch.nn.functional.interpolate(photo.permute(0, 3, 1, 2), scale_factor=20, mode="nearest")
    large = torch.nn.functional.pad(large, (0, 8000 - large.shape[3], 0, 0), value=0.4).permute(0, 2, 3, 1)
    image, crop, at = pack.run("AlignFace", photo=large, size=SIZE, landmarks=(points + 0.5) * 20 - 0.5)
    small = pack.run("AlignFace", photo=photo, size=SIZE, landmarks=points)
    assert psnr(image, small[0]) > 25 and (at - small[2]).abs().max() < 0.6
    with pytest.raises(ValueError, match="8000 x 1920.*Align Face"):
        pack.run("FitToLandmarks", face_model=head, image=large)


def test_no_face_one_face_several_faces_in_real_photos(pack):
    def photo(name, size):
        image = Image.open(ROOT / "rig_core" / "assets" / name).convert("RGB")
        image.thumbnail((size, size))
        return torch.from_numpy(np.array(image)).float()[None] / 255

    woman, man = photo("astronaut.jpg", 400), photo("grace_hopper.jpg", 400)
    height = min(woman.shape[1], man.shape[1])
    both = torch.cat([woman[:, :height], man[:, :height]], 2)
    pictures = {
        order: pack.run("AlignFace", photo=both, size=SIZE, order="left to right", index=i)[0]
        for i, order in enumerate(("left", "right"))
    }
    alone = pack.run("AlignFace", photo=woman[:, :height], size=SIZE)[0]
    assert psnr(pictures["left"], alone) > 20 > psnr(pictures["right"], alone)
    mask = torch.zeros(1, 10, 10)
    mask[:, :, 5:] = 1
    inside = pack.run("AlignFace", photo=both, size=SIZE, mask=mask)[0]
    assert psnr(inside, pictures["right"]) > 30
    with pytest.raises(ValueError, match="has 2 faces, there is no face number 5"):
        pack.run("AlignFace", photo=both, size=SIZE, index=5)
    empty = torch.full((1, 120, 160, 3), 0.4)
    with pytest.raises(ValueError, match="no face found in the picture"):
        pack.run("AlignFace", photo=empty)
    frames = torch.cat([woman[:, :height], torch.full_like(woman[:, :height], 0.4)])
    with pytest.raises(ValueError, match="no face found in picture 2 of 2"):
        pack.run("AlignFace", photo=frames)
    aligned, crop, _ = pack.run("AlignFace", photo=frames, size=SIZE, missing="pass through")
    assert crop.found.tolist() == [True, False]
    out = pack.run("PasteBack", photo=frames, edited=aligned * 0.5, crop=crop)[0]
    assert torch.equal(out[1], frames[1]) and not torch.equal(out[0], frames[0])


def test_a_code_of_another_head_is_refused(pack, head, face):
    code = face[3].replace(head="flame")
    for node in ("RenderBuffers", "EditFace", "SHLightEdit"):
        with pytest.raises(ValueError, match="'flame' head.*Load Face Model"):
            pack.run(node, face_model=head, face_code=code)


def test_sizes_that_do_not_fit_the_model_are_named(pack, head, model, face, scene):
    buffers = pack.run("RenderBuffers", face_model=head, face_code=face[3])[0]
    with pytest.raises(ValueError, match="'image' is 128 x 96 pixels.*64 x 64"):
        pack.run("DiffusionRigCondition", model=model, image=scene[0], buffers=buffers)
    larger = pack.run("RenderBuffers", face_model=head, face_code=face[3], size=96)[0]
    with pytest.raises(ValueError, match="'buffers' is 96 x 96 pixels.*64 x 64"):
        pack.run("DiffusionRigCondition", model=model, image=face[0], buffers=larger)
    with pytest.raises(ValueError, match="'buffers' holds 2"):
        three, two = face[0].expand(3, -1, -1, -1), buffers.expand(2)
        pack.run("DiffusionRigCondition", model=model, image=three, buffers=two)


def test_wrong_connections_are_named(pack, head, model, face, conditioned):
    with pytest.raises(ValueError, match="'model' is not a DiffusionRig"):
        pack.run("ConditionedSample", model=object(), conditioning=conditioned)
    with pytest.raises(ValueError, match="'conditioning' is not from DiffusionRig Condition"):
        pack.run("ConditionedSample", model=model, conditioning=[[torch.zeros(1, 77, 768), {}]])
    with pytest.raises(ValueError, match="'noise' is not from DDIM Invert"):
        pack.run(
            "ConditionedSample",
            model=model,
            conditioning=conditioned,
            noise={"samples": torch.zeros(1, 3, 8, 8)},
        )
    with pytest.raises(ValueError, match="DiffusionRig Condition"):
        model.model.diffusion_model(torch.zeros(1, 3, SIZE, SIZE), torch.zeros(1))
    with pytest.raises(ValueError, match="'spacing'"):
        pack.run("ConditionedSample", model=model, conditioning=conditioned, spacing="nonsense")
    with pytest.raises(ValueError, match="solver 'nonsense'"):
        pack.run("ConditionedSample", model=model, conditioning=conditioned, solver="nonsense")


def test_landmarks_that_do_not_fit_are_named(pack, head, face):
    with pytest.raises(ValueError, match=r"landmarks must be \[faces, 68, 2\]"):
        pack.run("FitToLandmarks", face_model=head, image=face[0], landmarks=torch.zeros(1, 5, 2))
    with pytest.raises(ValueError, match="NaN"):
        pack.run("FitToLandmarks", face_model=head, image=face[0], landmarks=face[2] * float("nan"))
    with pytest.raises(ValueError, match="'image' holds 3"):
        pack.run(
            "FitToLandmarks",
            face_model=head,
            image=face[0].expand(3, -1, -1, -1),
            landmarks=face[2].expand(2, -1, -1),
        )


def test_checkpoints_of_another_kind_and_missing_ones(pack, model):
    folder, checkpoints = pack.host.folder / "models" / "face_rig", pack.core.checkpoints
    (folder / "cut.safetensors").write_bytes((folder / "tiny.safetensors").read_bytes()[:5000])
    (folder / "head.safetensors").write_bytes((checkpoints.ASSETS / "open_head.safetensors").read_bytes())
    (folder / "notes.txt").write_text("no model")
    with pytest.raises(checkpoints.CheckpointError, match="head.safetensors"):
        pack.run("LoadDiffusionRig", file="head.safetensors")
    with pytest.raises(checkpoints.CheckpointError, match="tiny.safetensors"):
        pack.run("LoadFaceModel", file="tiny.safetensors")
    with pytest.raises(checkpoints.CheckpointError, match="cut.safetensors"):
        pack.run("LoadDiffusionRig", file="cut.safetensors")
    with pytest.raises(FileNotFoundError, match="gone.safetensors.*models/face_rig"):
        pack.run("LoadDiffusionRig", file="gone.safetensors")
    offered = pack.nodes["FaceRig_LoadDiffusionRig"].define_schema().inputs[0].options
    assert offered == ["default (in the pack)", "cut.safetensors", "head.safetensors", "tiny.safetensors"]
    node = pack.nodes["FaceRig_LoadDiffusionRig"]
    before = node.fingerprint_inputs(file="cut.safetensors")
    assert node.fingerprint_inputs(file="cut.safetensors") == before
    (folder / "cut.safetensors").write_bytes(b"other")
    assert node.fingerprint_inputs(file="cut.safetensors") != before
    assert node.fingerprint_inputs(file="gone.safetensors") == "gone.safetensors"
