"""The pictures of a fitted head that the page shades: they are the renderer's own, framed on the head."""

from __future__ import annotations

import base64
import io

import numpy as np
import pytest
import torch
from PIL import Image

from rig_core import buffers, preview, sh
from tests.node_pack import *  # noqa: F403 the fixtures


def parts(sheet):
    normal, albedo, mask = sheet.chunk(3, 1)
    return normal * 2 - 1, albedo, mask


def test_sheet_is_what_the_renderer_shows(head):
    code = head.mean_code(1, (96, 128))
    normal, albedo, mask = parts(preview.head_sheet(head, code, 64))
    assert normal.shape == albedo.shape == mask.shape == (3, 64, 64)
    b = buffers.render(head, preview.framed(head, code, 64))
    inside = (mask[0] > 0.999) & (b.mask[0, 0] > 0)
    assert 0.3 < inside.float().mean() < 0.8
    shading = sh.shade(normal[None], code.light)
    ours = (albedo * shading)[:, :, inside]
    assert (ours - b.rendered[:, :, inside]).abs().mean() < 0.02
    assert (normal.norm(dim=0)[inside] - 1).abs().max() < 1e-4
    # the head fills the picture without touching its left, right and top sides
    columns, rows = mask[0].amax(0) > 0.5, mask[0].amax(1) > 0.5
    assert not columns[:2].any() and not columns[-2:].any() and not rows[0] and rows[10:50].all()


def test_frame_does_not_depend_on_where_the_face_was_in_the_photo(head):
    code = head.mean_code(1, 64)
    moved = code.crop.clone()
    moved[:, :2] *= 0.5
    moved[:, 0, 2] += 30.0
    other = code.replace(crop=moved, size=(300, 200), cam=code.cam * torch.tensor([0.8, 1.2, 1.1]))
    a, b = (parts(preview.head_sheet(head, c, 64)) for c in (code, other))
    for x, y in zip(a, b):
        assert (x - y).abs().mean() < 1e-3  # a pixel at the edge may fall to another triangle


def shown(pack, node: str, **inputs) -> dict:
    node = pack.nodes["FaceRig_" + node]
    widgets = {i.id: i.default for i in node.define_schema().inputs if i.widget and not i.optional}
    with torch.inference_mode():
        return node.execute(**{**widgets, **inputs}).ui


@pytest.mark.parametrize("node", ["SHLightEdit", "LightOrbit"])
def test_nodes_tell_the_page_of_the_photos_head_and_light(pack, head, face, node):
    code = face[3]
    ui = shown(pack, node, face_model=head, face_code=code)
    assert ui["images"] and len(ui["face_rig_light"]) == 1
    about = ui["face_rig_light"][0]
    numbers = {"light": code.light[0], "mean": head.light_mean, "std": head.light_std}
    assert set(about) == {*numbers, "sheet"}
    for name, value in numbers.items():
        torch.testing.assert_close(torch.tensor(about[name]).reshape(9, 3), value)
    kind, data = about["sheet"].split(",")
    assert kind == "data:image/png;base64" and len(data) < 100_000
    pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(data))), np.float32)
    want = preview.head_sheet(head, code).permute(1, 2, 0).numpy() * 255
    assert pixels.shape == (384, 128, 3) and np.abs(pixels - want).max() <= 0.51


def test_a_light_from_elsewhere_is_told_too(pack, head, face):
    given = torch.linspace(0.1, 0.5, 27).reshape(1, 9, 3)
    ui = shown(pack, "SHLightEdit", face_model=head, face_code=face[3], light=given, mix=0.5)
    assert ui["face_rig_light"][0]["given"] == pytest.approx(given.flatten().tolist())
