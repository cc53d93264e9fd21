"""Boxes and landmarks in the forms that other nodes hand in."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from rig_core.estimators import given, landmarks

SIZE = (100, 150)
DICT = {"x": 10, "y": 20.5, "width": 30, "height": 40, "label": "face", "score": 0.9}
CORNERS = [10.0, 20.5, 40.0, 60.5]


@pytest.mark.parametrize(
    "form",
    [
        DICT,
        CORNERS,
        tuple(CORNERS),
        torch.tensor(CORNERS),
        np.array(CORNERS),
        [DICT],
        [[DICT]],
        torch.tensor([CORNERS]),
        [torch.tensor(CORNERS)],
        {k: np.float32(v) for k, v in DICT.items() if k in ("x", "y", "width", "height")},
    ],
    ids=["dict", "corners", "tuple", "tensor", "array", "list", "nested", "rows", "tensors", "numpy"],
)
def test_one_box_in_every_form(form):
    for n in (1, 3):
        assert [b.tolist() for b in given.boxes(form, n, SIZE)] == [[CORNERS]] * n


def test_four_numbers_that_are_no_corners_are_refused_and_a_dict_is_asked_for():
    with pytest.raises(ValueError, match="four numbers are corners x0, y0, x1, y1; give a dict for x, y"):
        given.boxes([40.0, 20.0, 30.0, 40.0], 1, SIZE)
    at = dict(zip(("x", "y", "width", "height"), (40.0, 20.0, 30.0, 40.0)))
    assert given.boxes(at, 1, SIZE)[0].tolist() == [[40.0, 20.0, 70.0, 60.0]]


def test_lists_of_boxes():
    a, b, c = [0, 0, 10, 10], [20, 20, 30, 30], [40, 40, 50, 50]

    def read(form, n):
        return [[box[0] for box in row.tolist()] for row in given.boxes(form, n, SIZE)]

    assert read([a, b], 2) == [[0], [20]]  # as many as pictures: one each
    assert read([a, b], 1) == [[0, 20]]
    assert read([a, b, c], 2) == [[0, 20, 40]] * 2  # else all for every picture
    assert read([[a, b], [], [c]], 3) == [[0, 20], [], [40]]
    assert read([a, [], [b, c]], 3) == [[0], [], [20, 40]]
    assert read([], 2) == [[], []]
    assert read(torch.tensor([[a, b], [b, c]]), 2) == [[0, 20], [20, 40]]


@pytest.mark.parametrize(
    ("form", "message"),
    [
        ("face", "a box is a dict with x, y, width and height.*got str"),
        ({"x": 1, "y": 2, "width": 3}, "a box is a dict"),
        ({"x": 1, "y": 2, "width": "wide", "height": 3}, "a box is a dict"),
        ({"x": 1, "y": 2, "width": -3, "height": 3}, "no width or no height"),
        ([1, 2, 3], "a box is a dict"),
        ([5, 5, 0, 0], "no width or no height"),
        ([0, 0, float("nan"), 9], "a box is a dict"),
        ([200, 0, 220, 20], "outside of the photo of 150 x 100"),
        ([[CORNERS], [CORNERS]], "boxes for 2 pictures, but 3"),
        (torch.zeros(3, 5), "a box is a dict"),
    ],
    ids=["text", "short", "word", "negative", "three", "empty", "nan", "outside", "count", "five"],
)
def test_other_boxes_are_refused(form, message):
    with pytest.raises(ValueError, match=message):
        given.boxes(form, 3, SIZE)


def mesh(n: int, at: float) -> dict:
    return {"landmarks_xy": np.arange(2 * n, dtype=np.float32).reshape(n, 2) + at, "score": 1.0}


def test_a_face_mesh_gives_the_68():
    frames = {"frames": [[mesh(478, 0), mesh(468, 1000)], [], [mesh(68, 5)]], "image_size": (9, 9)}
    points = given.landmarks(frames, 3)
    assert [len(p) for p in points] == [2, 0, 1]
    assert points[0][0, 36].tolist() == [66, 67]  # the outer corner of the eye is point 33 of the mesh
    assert points[0][1, 8].tolist() == [1304, 1305]  # the chin is 152
    assert points[2][0, 7].tolist() == [19, 20]
    assert len(given.landmarks({"frames": [[mesh(478, 0)]]}, 4)) == 4


def test_the_mesh_numbers_are_mirrored_as_the_68_are():
    """Both are symmetric: the pairs of one side must be pairs of the other, each number once."""
    pairs = {frozenset((given.MESH[i], given.MESH[int(landmarks.MIRROR[i])])) for i in range(68)}
    assert len(set(given.MESH)) == 68 and len(pairs) == 39
    assert {162, 389} in pairs and {33, 263} in pairs and {61, 291} in pairs and {70 + 1, 301} in pairs


@pytest.mark.parametrize(
    ("form", "message"),
    [
        ([[0, 1]], "68 points a face in iBUG's order.*got list"),
        ({"points": 3}, "68 points a face"),
        ({"frames": [[], []]}, "landmarks of 2 pictures, but 3"),
        ({"frames": [[mesh(106, 0)]]}, "68 landmarks.*478 or 468.*106"),
        ({"frames": [[mesh(478, float("nan"))]]}, "NaN"),
    ],
    ids=["list", "dict", "count", "106", "nan"],
)
def test_other_landmarks_are_refused(form, message):
    with pytest.raises(ValueError, match=message):
        given.landmarks(form, 3)
