"""The file of a fitted face for the page: read back here, compared with the head itself."""

from __future__ import annotations

import copy
import json
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch

from rig_core import buffers, checkpoints, preview_mesh, raster
from rig_core.expressions import EXPRESSIONS
from rig_core.face import FaceCode, cat
from rig_core.heads.flame import Flame
from tests.test_flame import golden, tensors  # noqa: F401 fixtures

torch.set_num_threads(1)
WEB = Path(__file__).resolve().parents[1] / "web"


def unpacked(file: bytes) -> dict:
    """The header, with the arrays in it as numbers; fields as [V,3]."""
    raw = zlib.decompress(file)
    size = int.from_bytes(raw[:4], "little")
    out, data = json.loads(raw[4 : 4 + size]), raw[4 + size :]
    for name, a in out.pop("arrays").items():
        kind, count = a["type"], int(np.prod(a["shape"]))
        if kind == "field":
            stored = np.frombuffer(data, np.uint8, count, a["offset"])
            bits = np.unpackbits(stored[: -(-a["count"] // 8)])[: a["count"]].astype(bool)
            values = np.zeros((a["count"], 3))
            values[bits] = stored[-(-a["count"] // 8) :].view(np.int8).reshape(-1, 3) * a["scale"]
        else:
            values = np.frombuffer(data, kind, count, a["offset"]).reshape(a["shape"]) * a["scale"]
            values = values + np.array(a.get("origin", 0))
        out[name] = torch.from_numpy(values.astype(np.float32))
    return out


def random_code(head, seed: int = 0, size=(256, 256)) -> FaceCode:
    g = torch.Generator().manual_seed(seed)
    code = head.mean_code(1, size)
    noise = {k: torch.randn(getattr(code, k).shape, generator=g) for k in ("shape", "tex", "exp", "pose")}
    return code.replace(
        shape=noise["shape"], tex=0.7 * noise["tex"], exp=0.3 * noise["exp"], pose=0.1 * noise["pose"]
    )


@pytest.fixture(scope="module")
def head():
    return checkpoints.load_head()


@pytest.fixture(scope="module")
def flame(tensors):  # noqa: F811
    return Flame.from_tensors(tensors)


def test_the_open_head_comes_back_within_a_fifth_of_a_millimetre(head):
    code = random_code(head)
    file = preview_mesh.pack(head, code)
    assert len(file) < 200_000
    got, count = unpacked(file), len(head.template)
    rest = head.verts(code.shape, code.exp, torch.zeros_like(code.pose))[0]
    torch.testing.assert_close(got["rest"][:count], rest, atol=5e-6, rtol=0)
    torch.testing.assert_close(
        got["sin"][:count] * head.jaw_open_angle.sin(), head.jaw_rest, atol=2e-4, rtol=0
    )
    assert got["sliders"] == list(EXPRESSIONS)
    for name, (_, shapes) in EXPRESSIONS.items():
        exp = sum(w * head.expressions[head.expression_names.index(k)] for k, w in shapes.items())
        moved = head.verts(code.shape, code.exp + exp, torch.zeros_like(code.pose))[0] - rest
        torch.testing.assert_close(got[f"slider.{name}"][:count], moved, atol=2.1e-4, rtol=0)
        assert got[f"slider.{name}"].abs().max() > 2e-3
    torch.testing.assert_close(torch.tensor(got["light"]), code.light.flatten())
    torch.testing.assert_close(torch.tensor(got["pose"]), code.pose[0])


def test_the_split_mesh_has_no_cracks_and_the_old_surface(head):
    got = unpacked(preview_mesh.pack(head, random_code(head)))
    faces, count = got["faces"].long(), len(head.template)
    assert len(faces) > len(head.faces) + 1000 and faces.max() == len(got["rest"]) - 1

    def border(faces):
        """Edges that only one face has."""
        edges = torch.cat([faces[:, [0, 1]], faces[:, [1, 2]], faces[:, [2, 0]]]).sort(1).values
        pairs, n = edges.unique(dim=0, return_counts=True)
        return pairs[n == 1]

    def length(faces):
        a, b = got["rest"][border(faces)].unbind(1)
        return (a - b).norm(dim=1).sum()

    torch.testing.assert_close(length(faces), length(head.faces), atol=1e-3, rtol=0)

    def area(faces):  # with its direction
        a, b, c = got["rest"][faces].unbind(1)
        return torch.cross(b - a, c - a, dim=1).sum(0), torch.cross(b - a, c - a, dim=1).norm(dim=1).sum()

    for new, old in zip(area(faces), area(head.faces)):
        torch.testing.assert_close(new, old, atol=1e-5, rtol=1e-3)
    assert set(faces[: len(faces)].unique().tolist()) >= set(range(count))


def test_colours_at_the_corners_draw_the_eyes(head):
    """Rendered with the colours at the vertices alone, the picture is the textured one's."""
    code = head.mean_code(1, (192, 192))
    got = unpacked(preview_mesh.pack(head, code))
    want = buffers.render(head, code)
    fragments = buffers.rasterize_head(
        buffers.to_image(got["rest"][None], code), got["faces"].long(), code.size
    )
    planes = raster.corner_planes(got["albedo"][None], got["faces"].long())
    albedo = raster.blend(fragments, planes, len(got["faces"]))
    off = (albedo - want.albedo).abs().mean(1)[want.mask[:, 0] > 0]
    assert off.mean() < 0.012
    points = head.landmarks(head.template[None], code.pose)
    x, y = buffers.to_pixels(buffers.to_image(points, code), code.size)[0, 36:42].mean(0).round().int()
    eye = (slice(None), slice(None), slice(y - 4, y + 5), slice(x - 7, x + 8))
    a, b = albedo[eye].mean(1).flatten(), want.albedo[eye].mean(1).flatten()
    assert torch.corrcoef(torch.stack([a, b]))[0, 1] > 0.85 and b.std() > 0.1


def test_the_camera_frames_the_fitted_face(head):
    code = random_code(head, 1, (300, 200))
    zoom = torch.tensor([[[0.5, 0.1, -20], [-0.1, 0.5, 7], [0, 0, 1]]])
    code = code.replace(crop=zoom @ code.crop)
    a, b, c, d, e, f = unpacked(preview_mesh.pack(head, code))["camera"]
    verts = head.verts(code.shape, code.exp, code.pose)
    frame = verts[0, :, :2] @ torch.tensor([[a, b], [d, e]]).T + torch.tensor([c, f])
    picture = buffers.to_pixels(buffers.to_image(verts, code), code.size)[0]

    # a similarity of the picture: the same shape, place and size apart
    def still(p):
        return (p - p.mean(0)) / (p - p.mean(0)).norm(dim=1).max()

    torch.testing.assert_close(still(frame), still(picture), atol=1e-4, rtol=0)
    middle = head.centre(verts)[0, :2] @ torch.tensor([[a, b], [d, e]]).T + torch.tensor([c, f])
    torch.testing.assert_close(middle, torch.zeros(2), atol=1e-5, rtol=0)
    face = frame[head.masks["face"] > 0.5]
    assert 0.4 < face.abs().max() < 0.9


def test_flame_without_texture_is_grey_and_has_no_sliders(flame):
    code = random_code(flame)
    got = unpacked(preview_mesh.pack(flame, code))
    assert got["sliders"] == [] and got["centres"] == [] and got["early"]
    assert (got["albedo"] - preview_mesh.GREY).abs().max() < 1 / 255
    verts = flame.verts(code.shape, code.exp, code.pose)
    centre = (got["centre"][:, None] * verts[0]).sum(0)
    torch.testing.assert_close(centre, flame.centre(verts)[0], atol=1e-5, rtol=1e-4)


def test_only_the_first_face_of_its_own_head_is_packed(head, flame):
    code = random_code(head)
    two = cat([code, code.replace(pose=code.pose + 1)])
    assert preview_mesh.pack(head, two) == preview_mesh.pack(head, code)
    with pytest.raises(ValueError, match="'open' head, but the 'flame' head"):
        preview_mesh.pack(flame, code)


def test_the_head_that_travels_with_the_page_is_the_mean_face(head):
    """If it fails, the open head has changed: run `python -m training.preview_head`."""
    kept = unpacked((WEB / "heads" / "open.head").read_bytes())
    new = unpacked(preview_mesh.pack(head, head.mean_code(1, 256)))
    assert kept.keys() == new.keys()
    for k in ("rest", "albedo", "slider.smile", "lids.up", "sin"):
        torch.testing.assert_close(kept[k], new[k], atol=1e-3, rtol=0)
    torch.testing.assert_close(torch.tensor(kept["camera"]), torch.tensor(new["camera"]))


def test_edges_are_split_no_further_than_faces_can_count(head, monkeypatch):
    monkeypatch.setattr(preview_mesh, "_texture", lambda *_: torch.rand(1, 3, 512, 512))  # split everywhere
    mesh = preview_mesh._mesh(copy.deepcopy(head))
    assert len(head.template) < len(mesh.uv) <= preview_mesh.MOST and int(mesh.faces.max()) < len(mesh.uv)
    monkeypatch.setattr(preview_mesh, "MOST", len(head.template))
    assert not preview_mesh._mesh(copy.deepcopy(head)).pairs
    with pytest.raises(ValueError, match="'faces' runs from 0 to 65536: that is no uint16"):
        preview_mesh._Writer().integers("faces", torch.tensor([0, 65536]), "uint16", 1)
