"""DECA's encoder against tensors recorded from the official code: network, crop, code, jaw, files."""

import json
import math
import shutil

import pytest
import torch
from torch import nn

from rig_core import align, buffers, checkpoints, files
from rig_core.estimators import deca
from rig_core.files import CheckpointError
from rig_core.heads.flame import Flame
from tests import official_files
from tests.golden_files import FOLDER, golden
from tests.official_files import official, recipe  # noqa: F401 fixture

KEYS = json.loads((FOLDER / "deca_keys.json").read_text())


@pytest.fixture(scope="module")
def net():
    model = deca.DECA()
    model.load_state_dict(recipe(KEYS, 9009))
    return model.eval().requires_grad_(False)


class Tiny(nn.Module):
    """A network that is quick: the crop's colours at 4 x 4 places, mixed."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.layers = nn.Sequential(nn.Linear(48, 236))
        self.sizes = []

    def forward(self, x):
        self.sizes.append(len(x))
        return self.layers(nn.functional.adaptive_avg_pool2d(x, 4).flatten(1))


def face(x, y, side):
    """68 landmarks whose box is a square of that side about (x, y)."""
    g = torch.Generator().manual_seed(int(x))
    points = torch.rand(68, 2, generator=g) - 0.5
    points[0], points[1] = torch.tensor([-0.5, -0.5]), torch.tensor([0.5, 0.5])
    return points * side + torch.tensor([float(x), float(y)])


def relative(got, want):
    return float((got - want).abs().max() / want.abs().max())


def test_keys_and_shapes_are_the_published_ones():
    with torch.device("meta"):
        state = deca.DECA().state_dict()
    assert {k: list(v.shape) for k, v in state.items()} == KEYS
    assert sum(deca.PARTS.values()) == 236


def test_network(net):
    t, _ = golden("deca_eflame_item")
    assert relative(net.encoder(t["image"]), t["features"]) < 1e-5
    assert relative(net(t["image"]), t["params"]) < 1e-5


def test_code_of_a_picture_that_is_the_crop(net):
    t, _ = golden("deca_eflame_item")
    code = deca.encode(net, t["image"], face(111.5, 111.5, 162.2)[None])
    torch.testing.assert_close(code.crop, torch.eye(3)[None], atol=1e-5, rtol=0)
    assert code.size == (224, 224) and code.head == "flame" and len(code) == 1
    for name in ("shape", "tex", "exp", "pose", "cam", "light"):
        want = t[f"code.{name}"]
        assert getattr(code, name).shape == want.shape and relative(getattr(code, name), want) < 1e-4


def test_crop_is_decas_of_landmarks_and_of_boxes():
    image = torch.rand(1, 3, 200, 260, generator=torch.Generator().manual_seed(1))
    points, net = face(120, 90, 80)[None], Tiny()
    code = deca.encode(net, image, points)
    crop = align.deca_crop(points)
    assert torch.equal(code.crop, crop.matrix) and code.size == (200, 260)
    want = net(crop.apply(image))
    assert torch.equal(code.shape, want[:, :100]) and torch.equal(code.light, want[:, 209:].view(1, 9, 3))
    boxes = torch.tensor([[60.0, 50, 160, 150]])
    code = deca.encode(net, image, boxes=boxes)
    crop = align.detector_crop(boxes)
    assert torch.equal(code.crop, crop.matrix) and torch.equal(code.tex, net(crop.apply(image))[:, 100:150])


def test_several_faces_and_pictures_in_chunks():
    images = torch.rand(3, 3, 160, 200, generator=torch.Generator().manual_seed(2))
    points, net = torch.stack([face(60, 80, 50), face(110, 70, 60), face(140, 90, 44)]), Tiny()
    alone = [deca.encode(net, images[i : i + 1], points[i : i + 1]) for i in range(3)]
    net.sizes.clear()
    together = deca.encode(net, images, points, chunk=2)
    assert net.sizes == [2, 1]
    one = deca.encode(net, images[:1], points, chunk=2)
    for name in ("shape", "pose", "cam", "light", "crop"):
        want = torch.cat([getattr(c, name) for c in alone])
        torch.testing.assert_close(getattr(together, name), want, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(one.shape[0], alone[0].shape[0], atol=1e-5, rtol=1e-5)
    assert (one.shape[1] - alone[1].shape[0]).abs().max() > 1e-3  # that face in another picture


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "either landmarks= or boxes="),
        ({"landmarks": torch.zeros(1, 68, 2), "boxes": torch.zeros(1, 4)}, "either landmarks= or boxes="),
        ({"landmarks": torch.zeros(1, 5, 2)}, r"\[B,68,2\]"),
        ({"landmarks": torch.rand(3, 68, 2) * 9}, "2 pictures cannot hold 3 faces"),
        ({"boxes": torch.tensor([[1.0, 1, 9, 9]]), "jaw": "quat"}, "'aa' or 'euler', not 'quat'"),
    ],
)
def test_wrong_inputs(fields, message):
    with pytest.raises(ValueError, match=message):
        deca.encode(Tiny(), torch.rand(2, 3, 64, 64), **fields)


def test_euler_angles():
    t, _ = golden("deca_euler")
    assert (deca.euler_to_axis_angle(t["euler"]) - t["euler2axis"]).abs().max() < 1e-6
    # the same from the three rotations of a vector, one after the other: z, then y, then x
    a, b, c = 0.3, -0.2, 0.5
    v = torch.tensor([0.2, -0.7, 1.1], dtype=torch.float64)
    x, y, z = v.tolist()
    x, y = x * math.cos(c) - y * math.sin(c), x * math.sin(c) + y * math.cos(c)
    z, x = z * math.cos(b) - x * math.sin(b), z * math.sin(b) + x * math.cos(b)
    y, z = y * math.cos(a) - z * math.sin(a), y * math.sin(a) + z * math.cos(a)
    r = deca.euler_to_axis_angle(torch.tensor([[a, b, c]], dtype=torch.float64))[0]
    angle = r.norm()
    k = r / angle  # Rodrigues' formula for a vector
    turned = v * angle.cos() + torch.linalg.cross(k, v) * angle.sin() + k * (k @ v) * (1 - angle.cos())
    torch.testing.assert_close(turned, torch.tensor([x, y, z], dtype=torch.float64))


def test_jaw_as_euler_angles_changes_the_jaw_alone():
    image, points, net = torch.rand(1, 3, 96, 96), face(48, 48, 50)[None], Tiny()
    plain, turned = (deca.encode(net, image, points, jaw=jaw) for jaw in ("aa", "euler"))
    assert torch.equal(turned.pose[:, 3:], deca.euler_to_axis_angle(plain.pose[:, 3:]))
    assert (turned.pose[:, 3:] - plain.pose[:, 3:]).abs().max() > 1e-4
    assert torch.equal(turned.pose[:, :3], plain.pose[:, :3]) and torch.equal(turned.exp, plain.exp)


# ------------------------------------------------------------------------------------------------- the file


@pytest.mark.parametrize("stream", [False, True], ids=["archive", "stream"])
def test_of_the_published_file_the_encoder_alone_is_read(tmp_path, stream):
    path = official_files.write_deca(tmp_path, stream)
    wanted = official_files.deca_weights()
    found, meta = files.read(path, "E_flame")
    assert meta == {} and found.keys() == wanted.keys()
    model = checkpoints.load_deca(path)
    assert not model.training
    assert all(torch.equal(v, wanted[k]) for k, v in model.state_dict().items())
    files.save(tmp_path / "deca.safetensors", checkpoints.deca_tensors(path), {"kind": "deca"})
    again = checkpoints.load_deca(tmp_path / "deca.safetensors")
    assert all(torch.equal(v, wanted[k]) for k, v in again.state_dict().items())
    shutil.rmtree(tmp_path)  # 200 MB


def test_files_of_another_kind(tmp_path):
    state = {k: torch.zeros(v) for k, v in KEYS.items() if not k.startswith("encoder.layer3")}
    for tree, message in [
        ({"E_detail": {"a": torch.zeros(1)}}, "expected a dictionary of tensors, found E_detail"),
        ({"E_flame": {"a": torch.zeros(1)}}, "expected DECA's encoder, found tensors like 'a'"),
        ({"E_flame": state}, "not a usable DECA encoder: 'encoder.layer3.* is missing"),
        ({"E_flame": state | {"x": "text"}}, "expected a dictionary of tensors"),
    ]:
        torch.save(tree, tmp_path / "a.tar")
        with pytest.raises(CheckpointError, match=message) as e:
            checkpoints.load_deca(tmp_path / "a.tar")
        assert "\n" not in str(e.value) and str(e.value).startswith(str(tmp_path / "a.tar"))
    rig = files.ASSETS / "identity.safetensors"
    with pytest.raises(CheckpointError, match="expected DECA's encoder, found kind 'identity'"):
        checkpoints.load_deca(rig)


def test_the_code_lies_where_the_face_is(official):  # noqa: F811
    """The stand-in says "a face that fills the crop": its landmarks must come back to where they were."""
    head = Flame.from_tensors(official_files.head())
    net = checkpoints.load_deca(official / "deca_model.tar")
    code = head.mean_code(1, (300, 400))
    points = head.landmarks(head.verts(code.shape, code.exp, code.pose), code.pose)
    points = buffers.to_pixels(buffers.to_image(points, code), code.size) * 0.6 + torch.tensor([130.0, 40])
    image = torch.rand(1, 3, 300, 400, generator=torch.Generator().manual_seed(4))
    found = deca.encode(net, image, points)
    rest = found.replace(shape=0 * found.shape, exp=0 * found.exp, pose=0 * found.pose)
    seen = head.landmarks(head.verts(rest.shape, rest.exp, rest.pose), rest.pose)
    seen = buffers.to_pixels(buffers.to_image(seen, rest), rest.size)
    assert (seen - points).norm(dim=-1).max() < 2  # px; the crop rounds its side, and centres are centres
    assert found.shape.abs().max() > 0.05  # it looks at the picture
