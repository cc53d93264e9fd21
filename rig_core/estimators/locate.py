"""One face in every picture: find, choose, and say what happens where there is none."""

from __future__ import annotations

import torch
from torch import Tensor

from . import landmarks

ORDERS = ("largest", "left to right", "top to bottom", "most central")
MISSING = ("error", "previous", "pass through")


def locate(
    image: Tensor, order: str = "largest", index: int = 0, mask: Tensor | None = None, missing: str = "error"
) -> tuple[Tensor, Tensor]:
    """Landmarks of one face a picture: image [B,3,H,W] in 0..1 -> landmarks [B,68,2] px, found [B] bool.

    order, index: which face, counted from 0 in that order; the mask [B,1,H,W] or [1,1,H,W], when given,
    keeps only faces whose centre lies where it is above one half.
    missing: "error" raises NoFaceError; "previous" and "pass through" fill a gap with the nearest earlier
    landmarks (later ones at the beginning), found tells which pictures had their own.
    Raises NoFaceError when no picture has a face, or not as many as `index` asks for.
    """
    if order not in ORDERS or missing not in MISSING:
        raise ValueError(f"order is one of {ORDERS}, missing one of {MISSING}; got '{order}', '{missing}'")
    found: list[Tensor | None] = []
    for i, picture in enumerate(image.split(1)):
        boxes = _boxes(picture)
        here = None if mask is None else mask[i if len(mask) == len(image) else 0, 0]
        box = choose(boxes, picture.shape[-2:], order, index, here)
        if box is None and missing == "error":
            raise landmarks.NoFaceError(_why(i, len(image), len(boxes), index, mask is not None))
        found.append(None if box is None else landmarks.find_landmarks(picture, box))
    if all(f is None for f in found):
        raise landmarks.NoFaceError(_why(0, len(image), 0, index, mask is not None))
    known = torch.tensor([f is not None for f in found], device=image.device)
    return torch.cat(_fill(found)), known


def _boxes(picture: Tensor) -> Tensor:
    try:
        return landmarks.find_faces(picture)[0]
    except landmarks.NoFaceError:
        return picture.new_zeros(0, 4)


def choose(boxes: Tensor, size, order: str, index: int, mask: Tensor | None = None) -> Tensor | None:
    """The index-th of boxes [N,4] (x0, y0, x1, y1) in the given order, [1,4]; None when there is no such box.

    size: (H, W) of the picture. mask [h,w] of any size over the same picture.
    """
    x, y = (boxes[:, 0] + boxes[:, 2]) / 2, (boxes[:, 1] + boxes[:, 3]) / 2
    area = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    off_centre = (x - size[1] / 2).square() + (y - size[0] / 2).square()
    rank = {"largest": -area, "left to right": x, "top to bottom": y, "most central": off_centre}[order]
    boxes, inside = boxes[rank.argsort()], torch.ones(len(boxes), dtype=torch.bool, device=boxes.device)
    if mask is not None and len(boxes):
        x, y = (boxes[:, 0] + boxes[:, 2]) / 2, (boxes[:, 1] + boxes[:, 3]) / 2
        col = ((x + 0.5) * mask.shape[1] / size[1]).long().clamp(0, mask.shape[1] - 1)
        row = ((y + 0.5) * mask.shape[0] / size[0]).long().clamp(0, mask.shape[0] - 1)
        inside = mask[row, col] > 0.5
    boxes = boxes[inside]
    return boxes[index : index + 1] if 0 <= index < len(boxes) else None


def _fill(found: list[Tensor | None]) -> list[Tensor]:
    first = next(f for f in found if f is not None)
    filled: list[Tensor] = []
    for f in found:
        filled.append(f if f is not None else filled[-1] if filled else first)
    return filled


def _why(i: int, n: int, faces: int, index: int, masked: bool) -> str:
    where = f"picture {i + 1} of {n}" if n > 1 else "the picture"
    if not faces:
        return (
            f"no face found in {where}: use a photo that shows a face from the front or side, at least some "
            f"40 pixels wide, crop closer, or hand in landmarks"
        )
    count = f"{faces} face{'s' * (faces > 1)}"
    if masked:
        return f"{where} has {count}, but face number {index} inside the mask does not exist (counted from 0)"
    return f"{where} has {count}, there is no face number {index} (counted from 0): lower 'index'"
