"""Choosing faces, one a picture or all, by order, mask and box; pictures without one; films."""

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
    assert locate.ranked(BOXES, (100, 150), order).tolist() == ranks
    assert locate.ranked(BOXES[:0], (100, 150), order).tolist() == []


def test_mask_of_any_size_keeps_the_faces_inside():
    mask = torch.zeros(1, 1, 20, 30)
    mask[..., 15:] = 1  # the right half: x from 75
    assert locate.ranked(BOXES, (100, 150), "left to right", mask).tolist() == [2]
    assert locate.ranked(BOXES, (100, 150), "largest", torch.zeros(1, 1, 5, 5)).tolist() == []


@pytest.fixture
def faces(monkeypatch):
    """A finder that reads off the first pixel how many faces there are, and landmarks that tell the box."""

    def find_faces(image):
        n = int(image[0, 0, 0, 0] * 10 + 0.5)
        if not n:
            raise landmarks.NoFaceError("none")
        return BOXES[:n], torch.ones(n)

    def find_landmarks(image, boxes):
        corners = torch.arange(68)[:, None] % 2  # of the box, in turns
        points = boxes[:, None, :2] + corners * (boxes[:, None, 2:] - boxes[:, None, :2])
        return points + image[0, 1, 0, 0]

    monkeypatch.setattr(landmarks, "find_faces", find_faces)
    monkeypatch.setattr(landmarks, "find_landmarks", find_landmarks)

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


def test_all_faces_of_every_picture(faces):
    seen = [locate.look(x, "top to bottom", faces="all") for x in faces(3, 1, 2).split(1)]
    assert [s.chosen for s in seen] == [(0, 1, 2), (0,), (0, 1)]
    assert torch.equal(seen[0].boxes, BOXES[[1, 0, 2]])
    kept, found = locate.gather(seen, 3)
    assert kept == seen
    assert found.photo.tolist() == [0, 0, 0, 1, 2, 2] and found.found.all()
    assert found.points[:, 0, 0].tolist() == [60.0, 10.0, 100.0, 11.0, 62.0, 12.0]
    one = locate.look(faces(3), "top to bottom", 2)
    assert one.chosen == (2,) and torch.equal(one.boxes, seen[0].boxes)


def test_a_gap_is_filled_from_the_picture_before(faces):
    points, found = locate.locate(faces(0, 1, 0, 0, 2), missing="previous")
    assert found.tolist() == [False, True, False, False, True]
    assert points[:, 0, 0].tolist() == [11.0, 11.0, 11.0, 11.0, 14.0]


@pytest.mark.parametrize(
    ("missing", "photo"), [("previous", [0, 0, 1, 1, 2]), ("pass through", [0, 0, 1, 2])]
)
def test_a_gap_between_pictures_of_several_faces(faces, missing, photo):
    seen = (locate.look(x, "left to right", faces="all") for x in faces(2, 0, 1).split(1))
    found = locate.gather(seen, 3, missing)[1]
    assert found.photo.tolist() == photo  # every picture has an entry
    assert found.found.tolist() == [p != 1 for p in photo]
    assert found.points[found.photo == 1][0, 0, 0] == 10.0


def test_a_missing_face_is_told_with_its_picture(faces):
    with pytest.raises(landmarks.NoFaceError, match="no face found in picture 2 of 3"):
        locate.locate(faces(1, 0, 1))
    with pytest.raises(landmarks.NoFaceError, match="no face found in the picture"):
        locate.locate(faces(0), missing="pass through")
    with pytest.raises(landmarks.NoFaceError, match="has 2 faces, there is no face number 2.*lower 'index'"):
        locate.locate(faces(2), index=2)
    with pytest.raises(landmarks.NoFaceError, match="has 1 face, but face number 0 inside the mask"):
        locate.locate(faces(1), mask=torch.zeros(1, 1, 8, 8))
    for x, boxes, why in (
        (faces(2), BOXES[:0], "there is no box for the picture"),
        (faces(2), BOXES[:1], "the picture has 1 face in its boxes, there is no number 1"),
    ):
        seen = locate.look(x, index=1, boxes=boxes)
        with pytest.raises(landmarks.NoFaceError, match=why):
            locate.gather([seen], 1)


def test_a_missing_face_stops_the_search_at_once(faces):
    looked = []

    def looks():
        for i, x in enumerate(faces(1, 0, 1).split(1)):
            looked.append(i)
            yield locate.look(x)

    with pytest.raises(landmarks.NoFaceError):
        locate.gather(looks(), 3)
    assert looked == [0, 1]


def test_unknown_choices_are_refused(faces):
    with pytest.raises(ValueError, match="order is one of"):
        locate.locate(faces(1), order="nearest")
    with pytest.raises(ValueError, match="faces one of"):
        locate.look(faces(1), faces="some")
    with pytest.raises(ValueError, match="missing is one of"):
        locate.locate(faces(1), missing="ignore")


def test_masks_follow_their_pictures(faces):
    masks = torch.zeros(2, 1, 10, 15)
    masks[0, :, :, :6], masks[1, :, :, 9:] = 1, 1
    points, _ = locate.locate(faces(3, 3), "largest", 0, masks)
    assert points[:, 0, 0].tolist() == [10.0, 101.0]


def test_a_box_chooses_the_face_that_overlaps_it_most(faces):
    loose = torch.tensor([[90.0, 20.0, 140.0, 95.0]])  # a head about the third face
    seen = locate.look(faces(3), boxes=loose)
    assert torch.equal(seen.boxes, BOXES[2:]) and seen.guessed == 0
    assert seen.points[0, 0].tolist() == [100.0, 50.0]
    group = torch.tensor([[5.0, 5.0, 85.0, 85.0]])  # holds two faces: the larger fills more of it
    assert torch.equal(locate.look(faces(3), boxes=group).boxes, BOXES[:1])
    both = locate.look(faces(3), "left to right", faces="all", boxes=torch.cat([loose, group, loose]))
    assert torch.equal(both.boxes, BOXES[[0, 2]]) and both.chosen == (0, 1)


def test_where_no_face_is_found_landmarks_are_sought_in_the_box(faces):
    alone = torch.tensor([[20.0, 85.0, 40.0, 99.0]])
    for x in (faces(0), faces(2)):
        seen = locate.look(x, boxes=alone)
        assert torch.equal(seen.boxes, alone) and seen.guessed == 1
        assert seen.points[0, 0].tolist() == [20.0, 85.0]
    mixed = locate.look(faces(2), "left to right", faces="all", boxes=torch.cat([alone, BOXES[:1]]))
    assert mixed.guessed == 1 and torch.equal(mixed.boxes, torch.cat([BOXES[:1], alone]))


def test_known_faces_are_chosen_from_like_found_ones(faces):
    points = landmarks.find_landmarks(faces(0), BOXES) + 0.25
    seen = locate.look(faces(0), "largest", 1, points=points)
    assert torch.equal(seen.points, points[2:])
    seen = locate.look(faces(0), "left to right", faces="all", points=points, boxes=BOXES[1:2])
    assert torch.equal(seen.points, points[1:2]) and seen.guessed == 0


def film(*places):
    """Faces of pictures that follow each other: a list of centres for each picture."""
    shape = torch.tensor([[-10.0, -10.0], [10.0, 10.0]]).repeat(34, 1)
    photo = [i for i, at in enumerate(places) for _ in at]
    points = torch.stack([shape + torch.tensor([x, 50.0]) for at in places for x in at])
    return locate.Faces(points, torch.tensor(photo), torch.ones(len(photo), dtype=torch.bool))


def test_faces_are_followed_and_a_jump_begins_another():
    faces = film([20.0, 60.0], [61.0, 21.0], [22.0], [23.0, 62.0], [90.0])
    assert locate.tracks(faces).tolist() == [0, 1, 1, 0, 0, 0, 2, 3]


def test_steadying_takes_out_jitter_within_a_track_only():
    still = [40.0 + (-1) ** i for i in range(12)]
    faces = film(*([x] for x in still), *([100.0 + (-1) ** i] for i in range(12)))
    assert torch.equal(locate.steady(faces, 0), faces.points)
    x = locate.steady(faces, 2.0)[:, :2].mean(1)[:, 0]
    assert (x[2:10] - 40).abs().max() < 0.05 and (x[14:22] - 100).abs().max() < 0.05
    assert x[:12].max() < 41 and x[12:].min() > 99  # nothing flows over the cut


def test_without_smoothing_no_face_is_followed(monkeypatch):
    monkeypatch.setattr(locate, "tracks", None)
    faces = film([20.0, 60.0], [61.0, 21.0])
    assert torch.equal(locate.steady(faces, 0.0), faces.points)


def test_faces_are_compared_once_a_pair_of_pictures(monkeypatch):
    calls, overlap = [], locate._overlap
    monkeypatch.setattr(locate, "_overlap", lambda a, b: calls.append((len(a), len(b))) or overlap(a, b))
    faces = film([20.0, 60.0, 90.0], [61.0, 21.0], [22.0])
    assert locate.tracks(faces).tolist() == [0, 1, 2, 1, 0, 0]
    assert calls == [(3, 0), (2, 3), (1, 2)]
