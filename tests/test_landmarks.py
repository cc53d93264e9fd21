"""Face finder and landmark network: geometry, bad input, and what they find on the two photographs."""

import hashlib
import json
import math
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from rig_core import checkpoints
from rig_core.estimators import landmarks as lm

GOLDEN = json.loads((Path(__file__).parent / "golden" / "landmarks.json").read_text())


def read(name: str) -> torch.Tensor:
    array = np.asarray(Image.open(checkpoints.ASSETS / f"{name}.jpg").convert("RGB")).copy()
    return torch.from_numpy(array).permute(2, 0, 1)[None].float() / 255


def truth(name: str) -> torch.Tensor:
    return torch.tensor(GOLDEN[name], dtype=torch.float32)


def nme(points: torch.Tensor, true: torch.Tensor) -> float:
    """Mean error in per cent of the distance of the outer eye corners."""
    return float((points - true).norm(dim=-1).mean() / (true[36] - true[45]).norm() * 100)


def iou(a: torch.Tensor, b: torch.Tensor) -> float:
    inter = (torch.minimum(a[2:], b[2:]) - torch.maximum(a[:2], b[:2])).clamp_min(0).prod()
    return float(inter / ((a[2:] - a[:2]).prod() + (b[2:] - b[:2]).prod() - inter))


# --- geometry, no weights ---


@settings(max_examples=30, deadline=None)
@given(st.floats(-3, 3), st.floats(0.1, 20), st.floats(-500, 500), st.integers(0, 99))
def test_similarity_is_recovered(angle, scale, shift, seed):
    g = torch.Generator().manual_seed(seed)
    target = torch.rand(68, 2, generator=g) * 60 + 18
    a = scale * torch.tensor([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    b = torch.tensor([shift, -shift])
    found, offset = lm.similarity((target @ a.T + b)[None], target)
    torch.testing.assert_close(found[0], a, atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(offset[0], b, atol=0.05, rtol=1e-3)


def test_similarity_of_noisy_points_is_the_best_one():
    g = torch.Generator().manual_seed(3)
    target, points = torch.rand(2, 68, 2, generator=g) * 50
    a, b = lm.similarity(points[None], target)

    def error(a, b):
        return (points - target @ a.T - b).square().sum()

    best = error(a[0], b[0])
    for delta in (0.01, -0.01):
        turn = torch.tensor([[1.0, -delta], [delta, 1.0]])
        assert error(a[0] @ turn, b[0]) > best
        assert error(a[0] * (1 + delta), b[0] + delta) > best


def test_mirror_swaps_the_sides():
    assert (lm.MIRROR[lm.MIRROR] == torch.arange(68)).all()
    for i, j in (
        (0, 16),
        (8, 8),
        (17, 26),
        (30, 30),
        (31, 35),
        (36, 45),
        (37, 44),
        (48, 54),
        (60, 64),
        (61, 63),
    ):
        assert lm.MIRROR[i] == j
    true = truth("astronaut")
    mirrored = true[lm.MIRROR] * torch.tensor([-1.0, 1.0])
    a, b = lm.similarity(mirrored[None], true)
    assert nme(true @ a[0].T + b[0], mirrored) < 5  # a face is nearly its own mirror image


def test_soft_argmax_of_a_peak_is_its_cell():
    maps = torch.zeros(1, 68, 24, 24)
    maps[0, :, 5, 17] = 50.0
    point = lm.soft_argmax(maps)[0, 0]
    torch.testing.assert_close(point, torch.tensor([17.5 * 4 - 0.5, 5.5 * 4 - 0.5]), atol=1e-3, rtol=0)


def test_crop_shows_what_the_frame_says():
    y, x = torch.meshgrid(torch.arange(300.0), torch.arange(400.0), indexing="ij")
    ramp = torch.stack([x, y, x + y])[None] / 800
    box = torch.tensor([[150.0, 100.0, 190.0, 160.0], [60.0, 60.0, 90.0, 90.0]])
    a, b = lm.box_frame(box)
    crops = lm.crop(ramp, a, b)
    assert crops.shape == (2, 3, 96, 96)
    centre = (box[:, :2] + box[:, 2:]) / 2
    middle = crops[:, :2, 47:49, 47:49].mean((2, 3)) * 800
    torch.testing.assert_close(middle, centre, atol=0.02, rtol=0)
    step = (crops[:, 0, 48, 90] - crops[:, 0, 48, 6]) * 800 / 84
    torch.testing.assert_close(step, torch.tensor([60.0, 30.0]) * lm.FRAME / lm.CROP, atol=0.02, rtol=0)


def test_decode_places_the_box():
    out = torch.full((5, 8, 10), -9.0)
    out[:, 3, 6] = torch.tensor([4.0, 0.25, -0.5, math.log(40 / lm.FACE), math.log(60 / lm.FACE)])
    out[0, 3, 7] = 2.0  # beside the peak
    boxes, scores = lm.decode(out)
    assert len(boxes) == 1
    cx, cy = 6.75 * 8 - 0.5, 3.0 * 8 - 0.5
    torch.testing.assert_close(boxes[0], torch.tensor([cx - 20, cy - 30, cx + 20, cy + 30]))
    assert float(scores[0]) == pytest.approx(1 / (1 + math.exp(-4)))


def test_suppression_keeps_the_surest_and_drops_what_lies_inside():
    boxes = torch.tensor([[0.0, 0, 10, 10], [1.0, 1, 11, 11], [50.0, 0, 60, 10], [2.0, 2, 6, 6]])
    kept = lm._suppress(boxes, torch.tensor([0.6, 0.9, 0.5, 0.8]))
    assert kept.tolist() == [1, 2]


def test_foreign_weights_are_refused():
    with pytest.raises(ValueError, match="no landmark checkpoint"):
        lm.from_tensors({"finder.stem.0.0.weight": torch.zeros(3)})


# --- the networks ---


@pytest.mark.parametrize("name", ["astronaut", "grace_hopper"])
def test_face_and_landmarks_of_the_photographs(name):
    photo, true = read(name), truth(name)
    boxes, scores = lm.find_faces(photo)
    assert len(boxes) == len(scores) == 1
    assert 0.5 < float(scores[0]) <= 1
    assert iou(boxes[0], lm.bounding_boxes(true[None])[0]) > 0.75
    points = lm.find_landmarks(photo, boxes)
    assert points.shape == (1, 68, 2)
    assert nme(points[0], true) < 6.5


def test_mirrored_photo_gives_mirrored_landmarks():
    photo = read("astronaut")
    points = lm.find_landmarks(photo, lm.bounding_boxes(truth("astronaut")[None]))[0]
    box = lm.bounding_boxes(
        (truth("astronaut") * torch.tensor([-1.0, 1.0]) + torch.tensor([511.0, 0.0]))[None]
    )
    mirrored = lm.find_landmarks(photo.flip(-1), box)[0][lm.MIRROR]
    assert nme(mirrored * torch.tensor([-1.0, 1.0]) + torch.tensor([511.0, 0.0]), points) < 1.0


@pytest.mark.parametrize(("degrees", "limit"), [(-25, 7.0), (25, 7.0)])
def test_turned_photo(degrees, limit):
    photo, true = read("grace_hopper"), truth("grace_hopper")
    c, s = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    r, centre = torch.tensor([[c, -s], [s, c]]), torch.tensor([255.5, 299.5])
    y, x = torch.meshgrid(torch.arange(600.0), torch.arange(512.0), indexing="ij")
    grid = ((torch.stack([x, y], -1) - centre) @ r.T + centre + 0.5) / torch.tensor([512.0, 600.0]) * 2 - 1
    turned = F.grid_sample(photo, grid[None], padding_mode="border", align_corners=False)
    boxes, _ = lm.find_faces(turned)
    points = lm.find_landmarks(turned, boxes[:1])[0]
    assert nme(points, (true - centre) @ r + centre) < limit


@pytest.mark.slow
def test_photo_of_8000_px():
    photo = F.interpolate(read("grace_hopper"), size=(8000, 6827), mode="bilinear")
    boxes, _ = lm.find_faces(photo)
    points = lm.find_landmarks(photo, boxes[:1])[0]
    scale = torch.tensor([6827 / 512, 8000 / 600])
    assert nme(points, (truth("grace_hopper") + 0.5) * scale - 0.5) < 7


def test_several_faces_the_largest_first():
    small = F.interpolate(
        read("grace_hopper")[..., 100:400, 100:440], scale_factor=0.4, antialias=True, mode="bilinear"
    )
    canvas = torch.full((1, 3, 512, 700), 0.4)
    canvas[..., :512] = read("astronaut")
    canvas[..., 300 : 300 + small.shape[-2], 540 : 540 + small.shape[-1]] = small
    boxes, _ = lm.find_faces(canvas)
    assert len(boxes) == 2
    assert iou(boxes[0], lm.bounding_boxes(truth("astronaut")[None])[0]) > 0.7
    offset = torch.tensor([540.0, 300.0])
    second = lm.bounding_boxes(((truth("grace_hopper") - 100 + 0.5) * 0.4 - 0.5 + offset)[None])[0]
    assert iou(boxes[1], second) > 0.6
    both = lm.find_landmarks(canvas, boxes)
    alone = lm.find_landmarks(canvas, boxes[1:])
    torch.testing.assert_close(both[1:], alone, atol=1e-2, rtol=0)


def test_grey_and_alpha():
    photo, true = read("astronaut"), truth("astronaut")
    grey = photo.mean(1, keepdim=True)
    alpha = torch.cat([photo, torch.ones(1, 1, 512, 512)], 1)
    for picture in (grey, alpha):
        boxes, _ = lm.find_faces(picture)
        assert nme(lm.find_landmarks(picture, boxes[:1])[0], true) < 7


# --- bad input ---


@pytest.mark.parametrize(
    "picture",
    [
        torch.zeros(1, 3, 1, 1),
        torch.full((1, 3, 300, 400), 0.5),
        torch.rand(1, 3, 256, 256, generator=torch.Generator().manual_seed(0)),
        torch.zeros(1, 3, 2, 3000),
        read("astronaut")[..., 250:, :],  # the suit
    ],
    ids=["one pixel", "plain", "noise", "a line", "no head"],
)
def test_no_face(picture):
    with pytest.raises(lm.NoFaceError, match="no face found in this picture of"):
        lm.find_faces(picture)


@pytest.mark.parametrize(
    ("picture", "text"),
    [
        (torch.full((1, 3, 64, 64), torch.nan), "NaN"),
        (torch.zeros(2, 3, 64, 64), "one picture"),
        (torch.zeros(0, 3, 64, 64), "empty"),
        (torch.zeros(1, 2, 64, 64), "channels"),
        (torch.zeros(3, 64, 64), r"\[B,C,H,W\]"),
    ],
)
def test_what_is_no_picture(picture, text):
    with pytest.raises(ValueError, match=text):
        lm.find_faces(picture)
    with pytest.raises(ValueError, match=text):
        lm.find_landmarks(picture, torch.zeros(1, 4))


def test_boxes_must_be_boxes():
    photo = torch.zeros(1, 3, 64, 64)
    assert lm.find_landmarks(photo, torch.zeros(0, 4)).shape == (0, 68, 2)
    with pytest.raises(ValueError, match=r"boxes are \[N,4\]"):
        lm.find_landmarks(photo, torch.zeros(4))


# --- the face_alignment library, by a stand-in ---


@pytest.fixture
def library(monkeypatch):
    """A face_alignment that marks the centre of each box and sets cudnn.benchmark, as the real one does."""
    seen = {}

    class FaceAlignment:
        def __init__(self, kind, device, compile, face_detector):
            torch.backends.cudnn.benchmark = True
            seen.update(
                kind=kind, device=device, compile=compile, net=self._load_native("2DFAN-4", 4, device, None)
            )

        def get_landmarks_from_image(self, picture, detected_faces):
            seen.update(picture=picture, boxes=detected_faces)
            return [np.tile([(b[0] + b[2]) / 2, (b[1] + b[3]) / 2], (68, 1)) for b in detected_faces] or None

    package, models = types.ModuleType("face_alignment"), types.ModuleType("face_alignment.models")
    package.FaceAlignment, package.LandmarksType = FaceAlignment, types.SimpleNamespace(TWO_D=1)
    models.FAN = lambda modules: torch.nn.Linear(2, 2)
    monkeypatch.setitem(sys.modules, "face_alignment", package)
    monkeypatch.setitem(sys.modules, "face_alignment.models", models)
    return seen


def fan_file(folder: Path) -> Path:
    """Weights under a name with the beginning of their hash."""
    part = folder / "part"
    torch.save(torch.nn.Linear(2, 2).state_dict(), part)
    return part.rename(folder / f"2DFAN4-{hashlib.sha256(part.read_bytes()).hexdigest()[:10]}.pth.tar")


def test_face_alignment_is_used_as_it_must_be(library, tmp_path):
    fan_file(tmp_path)
    before = torch.backends.cudnn.benchmark
    box = torch.tensor([[10.0, 20.0, 50.0, 60.0]])
    points = lm.face_alignment_landmarks(torch.full((1, 3, 80, 70), 0.5), box, tmp_path)
    assert torch.backends.cudnn.benchmark == before
    assert (library["compile"], library["device"], library["kind"]) == (False, "cpu", 1)
    assert library["picture"].shape == (80, 70, 3) and library["picture"].dtype == np.uint8
    torch.testing.assert_close(points, torch.tensor([30.0, 35.0]).expand(1, 68, 2))
    assert box.tolist() == [[10.0, 20.0, 50.0, 60.0]]


def test_face_alignment_without_its_weights_or_with_damaged_ones(library, tmp_path):
    with pytest.raises(FileNotFoundError, match="2DFAN4"):
        lm.face_alignment_landmarks(torch.zeros(1, 3, 80, 70), torch.zeros(1, 4), tmp_path)
    file = fan_file(tmp_path)
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(ValueError, match="damaged"):
        lm.face_alignment_landmarks(torch.zeros(1, 3, 80, 70), torch.zeros(1, 4), tmp_path)


def test_face_alignment_that_is_not_installed(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "face_alignment", None)
    with pytest.raises(ImportError, match="pip install"):
        lm.face_alignment_landmarks(torch.zeros(1, 3, 80, 70), torch.zeros(1, 4), tmp_path)
