"""Choosing one face a picture, and pictures without one."""

from __future__ import annotations

import pytest
import torch

from rig_core.estimators import landmarks, locate

BOXES = torch.tensor([[10.0, 40.0, 50.0, 80.0], [60.0, 10.0, 80.0, 30.0], [100.0, 50.0, 130.0, 80.0]])


@pytest.mark.parametrize(
    ("order", "ranks"),
    [
        ("largest", [0, 2, 1]),
        ("left to right", [0, 1, 2]),
        ("top to bottom", [1, 0, 2]),
        ("most central", [1, 2, 0]),
    ],
)
def test_orders(order, ranks):
    for index, want in enumerate(ranks):
        assert torch.equal(locate.choose(BOXES, (100, 150), order, index), BOXES[want : want + 1])
    assert locate.choose(BOXES, (100, 150), order, 3) is None
    assert locate.choose(BOXES[:0], (100, 150), order, 0) is None


def test_mask_of_any_size_keeps_the_faces_inside():
    mask = torch.zeros(20, 30)
    mask[:, 15:] = 1  # the right half: x from 75
    chosen = locate.choose(BOXES, (100, 150), "left to right", 0, mask)
    assert torch.equal(chosen, BOXES[2:])
    assert locate.choose(BOXES, (100, 150), "left to right", 1, mask) is None
    assert locate.choose(BOXES, (100, 150), "largest", 0, torch.zeros(5, 5)) is None


@pytest.fixture
def faces(monkeypatch):
    """A finder that reads off the first pixel how many faces there are, and landmarks that tell the box."""

    def find_faces(image):
        n = int(image[0, 0, 0, 0] * 10 + 0.5)
        if not n:
            raise landmarks.NoFaceError("none")
        return BOXES[:n], torch.ones(n)

    monkeypatch.setattr(landmarks, "find_faces", find_faces)
    monkeypatch.setattr(
        landmarks,
        "find_landmarks",
        lambda image, boxes: boxes[:, None, :2] + image[0, 1, 0, 0] + torch.zeros(len(boxes), 68, 2),
    )

    def pictures(*counts):
        x = torch.zeros(len(counts), 3, 100, 150)
        for i, n in enumerate(counts):
            x[i, 0], x[i, 1] = n / 10, float(i)
        return x

    return pictures


def test_every_picture_gives_one_face(faces):
    points, found = locate.locate(faces(1, 3, 2), "left to right", 0)
    assert points.shape == (3, 68, 2) and found.tolist() == [True, True, True]
    assert points[:, 0, 0].tolist() == [10.0, 11.0, 12.0]
    points, _ = locate.locate(faces(3), "largest", 1)
    assert points[0, 0].tolist() == [100.0, 50.0]


def test_a_gap_is_filled_from_the_picture_before(faces):
    points, found = locate.locate(faces(0, 1, 0, 0, 2), missing="previous")
    assert found.tolist() == [False, True, False, False, True]
    assert points[:, 0, 0].tolist() == [11.0, 11.0, 11.0, 11.0, 14.0]


def test_a_missing_face_is_told_with_its_picture(faces):
    with pytest.raises(landmarks.NoFaceError, match="no face found in picture 2 of 3"):
        locate.locate(faces(1, 0, 1))
    with pytest.raises(landmarks.NoFaceError, match="no face found in the picture"):
        locate.locate(faces(0), missing="pass through")
    with pytest.raises(landmarks.NoFaceError, match="has 2 faces, there is no face number 2.*lower 'index'"):
        locate.locate(faces(2), index=2)
    with pytest.raises(landmarks.NoFaceError, match="has 1 face, but face number 0 inside the mask"):
        locate.locate(faces(1), mask=torch.zeros(1, 1, 8, 8))


def test_unknown_choices_are_refused(faces):
    with pytest.raises(ValueError, match="order is one of"):
        locate.locate(faces(1), order="nearest")
    with pytest.raises(ValueError, match="missing one of"):
        locate.locate(faces(1), missing="ignore")


def test_masks_follow_their_pictures(faces):
    masks = torch.zeros(2, 1, 10, 15)
    masks[0, :, :, :6], masks[1, :, :, 9:] = 1, 1
    points, _ = locate.locate(faces(3, 3), "largest", 0, masks)
    assert points[:, 0, 0].tolist() == [10.0, 101.0]
