"""Crops that the face networks learn from, and a few steps of their training."""

import json

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from rig_core import files
from rig_core.estimators import landmarks as lm
from training import estimators
from training import face_crops as fc


def dotted_faces(n: int = 6) -> fc.Faces:
    """Dark pictures with a bright 7 px spot on landmark 30 (the nose), the same face a little moved."""
    true = torch.tensor(
        json.loads((files.ASSETS.parents[1] / "tests/golden/landmarks.json").read_text())["astronaut"]
    )
    shape = (true - true.float().mean(0)) * 1.6 + 128
    g = torch.Generator().manual_seed(1)
    points = shape + torch.randn(n, 1, 2, generator=g) * 8
    y, x = torch.meshgrid(torch.arange(256.0), torch.arange(256.0), indexing="ij")
    nose = points[:, 30, :, None, None]
    spot = ((x - nose[:, 0]) ** 2 + (y - nose[:, 1]) ** 2 < 49).float()
    return fc.make_faces((spot[:, None].expand(-1, 3, -1, -1) * 255).byte().contiguous(), points)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def centre_of_light(crops: torch.Tensor) -> torch.Tensor:
    y, x = torch.meshgrid(torch.arange(96.0), torch.arange(96.0), indexing="ij")
    weight = crops.mean(1)
    weight = weight * (weight > 0.25)
    return torch.stack([(weight * c).sum((1, 2)) / weight.sum((1, 2)) for c in (x, y)], -1)


def test_landmarks_move_with_the_picture():
    """Under rotation, squeeze and smooth bumps the spot stays on its landmark."""
    faces = dotted_faces()
    n = 24
    index = torch.arange(n) % len(faces)
    a, b = lm.similarity(faces.points[index], fc.mean_shape(faces.points))
    a = a @ fc.rotation(fc.uniform(n, -0.5, 0.5))
    b = faces.points[index].mean(1) - (a @ torch.full((2, 1), 47.5))[:, :, 0]
    crops, points, inside = fc.warp(faces, index, a, b, fc.bumps(n, 3.0))
    assert inside.mean() > 0.9
    torch.testing.assert_close(centre_of_light(crops), points[:, 30], atol=0.6, rtol=0)


def test_mirrored_crops_have_mirrored_landmarks(monkeypatch):
    faces = dotted_faces()
    monkeypatch.setattr(fc, "photo", lambda crops: crops)
    monkeypatch.setattr(fc, "cover", lambda crops: crops)
    crops, points, _ = fc.warp(
        faces,
        torch.zeros(40).long(),
        torch.eye(2).repeat(40, 1, 1) * 2,
        torch.full((40, 2), 30.0),
        torch.zeros(40, 2, 96, 96),
    )
    _, points = fc.finish(crops, points)
    left, right = points[:, 36, 0], points[:, 45, 0]
    assert (left < right).all()  # the eye on the left of the picture stays number 36
    assert 5 < (points[:, 30, 0] != points[0, 30, 0]).sum() < 35  # some were mirrored, some not


def test_scenes_hold_their_box(monkeypatch):
    faces = dotted_faces()
    monkeypatch.setattr(fc, "photo", lambda crops: crops)
    monkeypatch.setattr(fc, "cover", lambda crops: crops)
    bank = torch.zeros(4, 3, 96, 96, dtype=torch.uint8)
    scenes, boxes = fc.face_scenes(faces, bank, 60)
    some = ~boxes[:, 0].isnan()
    assert 40 <= some.sum() < 60
    assert (scenes[~some] == 0).all()
    centre = (boxes[:, :2] + boxes[:, 2:]) / 2
    whole = some & (boxes[:, :2] > 0).all(1) & (boxes[:, 2:] < 95).all(1) & (boxes[:, 2] - boxes[:, 0] > 24)
    assert whole.sum() > 3
    assert ((centre_of_light(scenes[whole]) - centre[whole]).norm(dim=1) < 0.35 * 60).all()


def test_every_sixth_is_kept_back():
    faces = dotted_faces(13)
    training, held = fc.split(faces, [str(i) for i in range(13)])
    assert len(training) == 10
    assert torch.equal(held.points, faces.points[[0, 6, 12]])


def test_finder_loss_falls_where_the_answer_is_right():
    """An answer built from the box costs less than one beside it, and decodes to the box."""
    boxes = torch.tensor([[20.0, 24.0, 60.0, 70.0]])
    centre, wh = (boxes[:, :2] + boxes[:, 2:]) / 2, boxes[:, 2:] - boxes[:, :2]
    cell = ((centre[0] + 0.5) / lm.STRIDE).floor().long()
    out = torch.full((1, 5, 12, 12), -8.0)
    out[:, 1:] = 0
    y, x = torch.meshgrid(torch.arange(12), torch.arange(12), indexing="ij")
    at = (torch.stack([x, y]) + 0.5) * lm.STRIDE - 0.5
    out[0, 1:3] = (centre[0][:, None, None] - at) / lm.STRIDE
    out[0, 3:] = (wh[0] / lm.FACE).log()[:, None, None]
    right, wrong = out.clone(), out.clone()
    right[0, 0, cell[1], cell[0]] = 8.0
    wrong[0, 0, cell[1], cell[0] + 4] = 8.0
    scene = torch.zeros(1, 3, 96, 96)
    assert estimators.finder_loss(lambda _: right, scene, boxes) < 0.1
    assert estimators.finder_loss(lambda _: wrong, scene, boxes) > 5
    found, _ = lm.decode(right[0])
    torch.testing.assert_close(found, boxes)


@pytest.mark.slow
def test_training_writes_what_the_pack_reads(tmp_path, monkeypatch):
    """Two steps of each network through the command line, then the evaluation of the file."""
    (tmp_path / "images").mkdir()
    photo = Image.open(files.ASSETS / "astronaut.jpg").convert("RGB")
    true = torch.tensor(
        json.loads((files.ASSETS.parents[1] / "tests/golden/landmarks.json").read_text())["astronaut"]
    )
    box = (96, 6, 352, 262)
    names = [{"name": f"face-{i}"} for i in range(7)]
    for entry in names:
        photo.crop(box).save(tmp_path / "images" / f"{entry['name']}.jpg")
    (tmp_path / "names.json").write_text(json.dumps(names))
    points = (true - torch.tensor([96, 6])).float().expand(7, -1, -1).contiguous()
    save_file({"landmarks": points}, tmp_path / "landmarks.safetensors")
    out = tmp_path / "out.safetensors"
    base = ["estimators", "landmarks", "--faces", str(tmp_path), "--out", str(out), "--batch", "6"]
    monkeypatch.setattr("sys.argv", [*base, "--finder-steps", "2", "--landmark-steps", "2"])
    estimators.main()
    tensors, meta = files.read(out)
    assert (meta["kind"], meta["faces"], meta["finder_steps"]) == ("landmarks", 5, 2)
    nets = lm.from_tensors(tensors)
    first = nets.landmarks(torch.rand(1, 3, 96, 96))[0]
    monkeypatch.setattr(
        "sys.argv", [*base, "--init", str(out), "--finder-steps", "0", "--landmark-steps", "1"]
    )
    estimators.main()
    again = lm.from_tensors(files.read(out)[0])
    for key, value in nets.finder.state_dict().items():
        assert torch.equal(value, again.finder.state_dict()[key]), key
    assert first.shape == (1, 68, 2)
    pack = ["estimators", "evaluate", "--faces", str(tmp_path)]
    monkeypatch.setattr("sys.argv", pack)
    estimators.main()
