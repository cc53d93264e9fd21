"""The faces of every picture: find, choose, and say what happens where there is none.

`look` answers for one picture, `gather` joins the pictures of a batch or a film, `steady` takes the jitter
out of it. Boxes are (x0, y0, x1, y1) px, points as in `landmarks`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import motion
from . import landmarks

ORDERS = ("largest", "left to right", "top to bottom", "most central")
MISSING = ("error", "previous", "pass through")
FACES = ("one", "all")
INSIDE = 0.3  # share of the smaller box that a face must have in common with a given one, or with the last


@dataclass(frozen=True)
class Seen:
    """The faces of one picture.

    boxes [N,4] in the chosen order; chosen: numbers of those that are wanted; points [K,68,2] of these.
    guessed: how many of these were not found, but are only where a box was given. why: there is none.
    """

    boxes: Tensor
    chosen: tuple[int, ...]
    points: Tensor
    guessed: int = 0
    why: str = ""


@dataclass(frozen=True)
class Faces:
    """The chosen faces of a batch of pictures, at least one each.

    points [M,68,2]; photo [M] long, on the CPU: which picture each is of, rising; found [M] bool, on the CPU:
    False where it is only a place taken from another picture.
    """

    points: Tensor
    photo: Tensor
    found: Tensor


def look(
    picture: Tensor,
    order: str = "largest",
    index: int = 0,
    faces: str = "one",
    mask: Tensor | None = None,
    boxes: Tensor | None = None,
    points: Tensor | None = None,
) -> Seen:
    """The faces of a picture [1,3,H,W] in 0..1.

    order, index: which face, counted from 0 in that order; faces "all" takes every one and ignores index.
    mask [1,1,h,w] of any size keeps the faces whose centre lies where it is above one half.
    boxes [K,4] keep the faces that overlap these most; where there is none, landmarks are sought in the box.
    points [N,68,2]: the faces that there are, if they are known; else they are found.
    """
    if order not in ORDERS or faces not in FACES:
        raise ValueError(f"order is one of {ORDERS}, faces one of {FACES}; got '{order}', '{faces}'")
    there = find(picture) if points is None else landmarks.bounding_boxes(points)
    known = torch.arange(len(there), device=there.device)  # of which of the points; -1: of a given box
    total = len(there)
    if boxes is not None:
        there, known = _matched(there, boxes.to(there))
    rank = ranked(there, picture.shape[-2:], order, mask)
    there, known = there[rank], known[rank]
    chosen = tuple(range(len(there))) if faces == "all" else (index,) if 0 <= index < len(there) else ()
    if not chosen:
        why = _why(total, len(there), index, mask is not None, boxes)
        return Seen(there, (), picture.new_zeros(0, 68, 2), why=why)
    at = list(chosen)
    guessed = int((known[at] < 0).sum())
    if points is None or guessed:
        found = landmarks.find_landmarks(picture, there[at])
        if points is not None:
            own = known[at] >= 0
            found[own] = points[known[at][own]].to(found)
    else:
        found = points[known[at]]
    return Seen(there, chosen, found, guessed)


def gather(seen: Iterable[Seen], n: int, missing: str = "error") -> tuple[list[Seen], Faces]:
    """Join what `look` saw in n pictures.

    missing: "error" raises NoFaceError at the first picture without a wanted face. Else it takes the places
    of the nearest earlier picture (of a later one at the beginning): "previous" all of them, "pass through"
    the first, to fill the batch; found tells which pictures had their own.
    Raises NoFaceError when no picture has a face.
    """
    if missing not in MISSING:
        raise ValueError(f"missing is one of {MISSING}, got '{missing}'")
    kept: list[Seen] = []
    for s in seen:
        if missing == "error" and not s.chosen:
            raise landmarks.NoFaceError(s.why.format(where=_where(len(kept), n)))
        kept.append(s)
    last = next((s.points for s in kept if s.chosen), None)
    if last is None:
        raise landmarks.NoFaceError(kept[0].why.format(where=_where(0, n)))
    points, photo, found = [], [], []
    for i, s in enumerate(kept):
        last = s.points if s.chosen else last
        here = last if s.chosen or missing == "previous" else last[:1]
        points.append(here)
        photo += [i] * len(here)
        found += [bool(s.chosen)] * len(here)
    return kept, Faces(torch.cat(points), torch.tensor(photo), torch.tensor(found))


def locate(
    image: Tensor, order: str = "largest", index: int = 0, mask: Tensor | None = None, missing: str = "error"
) -> tuple[Tensor, Tensor]:
    """Landmarks of one face a picture: image [B,3,H,W] in 0..1 -> landmarks [B,68,2] px, found [B] bool.

    mask [B,1,h,w] or [1,1,h,w]. The rest, and what is raised, as in `look` and `gather`.
    """
    masks = [None] * len(image) if mask is None else mask.expand(len(image), -1, -1, -1).split(1)
    seen = (look(x, order, index, mask=m) for x, m in zip(image.split(1), masks))
    faces = gather(seen, len(image), missing)[1]
    return faces.points, faces.found


def ranked(boxes: Tensor, size, order: str, mask: Tensor | None = None) -> Tensor:
    """Numbers of the boxes [N,4] in the given order, those outside of the mask [1,1,h,w] left out.

    size: (H, W) of the picture. mask: of any size over the same picture.
    """
    x, y = (boxes[:, 0] + boxes[:, 2]) / 2, (boxes[:, 1] + boxes[:, 3]) / 2
    area = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    off_centre = (x - size[1] / 2).square() + (y - size[0] / 2).square()
    rank = {"largest": -area, "left to right": x, "top to bottom": y, "most central": off_centre}[order]
    rank = rank.argsort()
    if mask is None or not len(boxes):
        return rank
    h, w = mask.shape[-2:]
    column = ((x + 0.5) * w / size[1]).long().clamp(0, w - 1)
    row = ((y + 0.5) * h / size[0]).long().clamp(0, h - 1)
    return rank[mask[0, 0, row, column][rank] > 0.5]


def steady(faces: Faces, frames: float) -> Tensor:
    """Landmarks [M,68,2] of a film whose jitter is smoothed over so many frames (a Gaussian's deviation).

    A face is followed from picture to picture by its place; at a cut, or where it jumps, smoothing ends.
    """
    if not frames:
        return faces.points
    points, track = faces.points.clone(), tracks(faces)
    for t in track.unique():
        here = track == t
        points[here] = motion.smooth(faces.points[here], frames)
    return points


def tracks(faces: Faces) -> Tensor:
    """[M] long: faces of pictures that follow each other get one number where their boxes overlap best."""
    boxes = landmarks.bounding_boxes(faces.points.cpu())
    numbers, count, last = [], 0, boxes[:0]
    for here in boxes.split(faces.photo.unique_consecutive(return_counts=True)[1].tolist()):
        before = numbers[len(numbers) - len(last) :]
        for share in _overlap(here, last)[0].tolist():
            best, j = max(((s, j) for j, s in enumerate(share) if before[j] >= 0), default=(0.0, -1))
            numbers.append(before[j] if best > INSIDE else count)
            if best > INSIDE:
                before[j] = -1  # each is followed once
            else:
                count += 1
        last = here
    return torch.tensor(numbers)


def find(picture: Tensor) -> Tensor:
    """Boxes [N,4] of all faces of a picture [1,3,H,W] in 0..1, of none where there is none."""
    try:
        return landmarks.find_faces(picture)[0]
    except landmarks.NoFaceError:
        return picture.new_zeros(0, 4)


def _overlap(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Of every box a [N,4] with every b [K,4], [N,K]: intersection over union, and over the smaller."""
    low = torch.maximum(a[:, None, :2], b[None, :, :2])
    common = (torch.minimum(a[:, None, 2:], b[None, :, 2:]) - low).clamp_min(0).prod(-1)
    first, second = ((x[:, 2:] - x[:, :2]).clamp_min(0).prod(-1) for x in (a, b))
    union = first[:, None] + second[None] - common
    return common / union.clamp_min(1e-6), common / torch.minimum(first[:, None], second[None]).clamp_min(
        1e-6
    )


def _matched(there: Tensor, boxes: Tensor) -> tuple[Tensor, Tensor]:
    """For each given box the face that overlaps it most, each once; the box itself where there is none."""
    known: list[int] = []
    alone: list[Tensor] = []
    whole, smaller = _overlap(there, boxes)
    for k in range(len(boxes)):
        fits = whole[:, k] * (smaller[:, k] > INSIDE)
        best = int(fits.argmax()) if len(there) and fits.max() > 0 else -1
        if best < 0:
            alone.append(boxes[k : k + 1])
        elif best not in known:
            known.append(best)
    found = torch.cat([there[known], *alone])
    numbers = torch.tensor([*known, *[-1] * len(alone)], dtype=torch.long, device=there.device)
    return found, numbers


def _where(i: int, n: int) -> str:
    return f"picture {i + 1} of {n}" if n > 1 else "the picture"


def _why(total: int, left: int, index: int, masked: bool, boxes: Tensor | None) -> str:
    """What to say of {where}."""
    if boxes is not None and not len(boxes):
        return "there is no box for {where}: give one, or choose what to do without under 'missing'"
    if not total and boxes is None:
        return (
            "no face found in {where}: use a photo that shows a face from the front or side, at least some "
            "40 pixels wide, crop closer, or hand in landmarks"
        )
    if masked:
        return (
            f"{{where}} has {_count(total)}, but face number {index} inside the mask does not exist "
            "(counted from 0)"
        )
    if boxes is not None:
        return f"{{where}} has {_count(left)} in its boxes, there is no number {index} (counted from 0)"
    return f"{{where}} has {_count(total)}, there is no face number {index} (counted from 0): lower 'index'"


def _count(n: int) -> str:
    return f"{n} face{'s' * (n != 1)}"
