"""Boxes and landmarks of faces as others hand them in, read into ours.

Boxes (x0, y0, x1, y1) and points (x, y) are pixels of the picture; ours are in `landmarks`' order of 68.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

# where the 68 landmarks lie on a face mesh of 468 or 478 points (MediaPipe's)
MESH = (
    [162, 234, 93, 58, 172, 136, 149, 148, 152, 377, 378, 365, 397, 288, 323, 454, 389]
    + [71, 63, 105, 66, 107, 336, 296, 334, 293, 301]
    + [168, 197, 5, 4, 75, 97, 2, 326, 305]
    + [33, 160, 158, 133, 153, 144, 362, 385, 387, 263, 373, 380]
    + [61, 39, 37, 0, 267, 269, 291, 405, 314, 17, 84, 181]
    + [78, 82, 13, 312, 308, 317, 14, 87]
)


def boxes(given, n: int, size: tuple[int, int]) -> list[Tensor]:
    """Boxes [K,4] for each of n pictures of size (H, W).

    One box is a dict with x, y, width and height, or four numbers: the corners x0, y0, x1, y1. given: one;
    a list or tensor of as many as there are pictures, one each; a list of any other number, all for every
    picture; or a list of lists, one a picture.
    Raises ValueError for anything else, and for boxes without a pixel of the picture.
    """
    given = _plain(given)
    if _is_box(given):
        rows = [[given]] * n
    elif not isinstance(given, list):
        raise ValueError(f"{_FORMS}, got {type(given).__name__}")
    elif all(map(_is_box, given)):
        rows = [[b] for b in given] if len(given) == n else [given] * n
    else:
        rows = [[v] if _is_box(v) else v for v in given]
        rows = rows * n if len(rows) == 1 else rows
        if len(rows) != n:
            raise ValueError(
                f"there are boxes for {len(rows)} pictures, but {n} pictures: give one list each"
            )
    return [torch.tensor([_corners(b, size) for b in _listed(row)]).reshape(-1, 4) for row in rows]


_FORMS = "a box is a dict with x, y, width and height, or four numbers x0, y0, x1, y1, in pixels of the photo"


def _plain(x):
    """Tensors, arrays and tuples as lists."""
    if hasattr(x, "tolist"):
        return x.tolist()
    return [_plain(v) for v in x] if isinstance(x, (list, tuple)) else x


def _is_number(x) -> bool:
    return isinstance(x, (int, float)) and not isinstance(x, bool)


def _is_box(x) -> bool:
    return isinstance(x, dict) or isinstance(x, list) and len(x) == 4 and all(map(_is_number, x))


def _listed(row) -> list:
    if not isinstance(row, list):
        raise ValueError(f"{_FORMS}, got {row!r:.80}")
    return row


def _corners(box, size: tuple[int, int]) -> list[float]:
    values = _plain([box.get(k) for k in ("x", "y", "width", "height")]) if isinstance(box, dict) else box
    if not _is_box(values) or not all(map(math.isfinite, values)):
        raise ValueError(f"{_FORMS}, got {box!r:.80}")
    x0, y0, x1, y1 = map(float, values)
    if isinstance(box, dict):
        x1, y1 = x0 + x1, y0 + y1
    if x1 <= x0 or y1 <= y0:
        hint = ": four numbers are corners x0, y0, x1, y1; give a dict for x, y, width, height"
        raise ValueError(
            f"the box {box!r:.80} has no width or no height{'' if isinstance(box, dict) else hint}"
        )
    if x1 < 0 or y1 < 0 or x0 > size[1] - 1 or y0 > size[0] - 1:
        raise ValueError(f"the box {box!r:.80} lies outside of the photo of {size[1]} x {size[0]} pixels")
    return [x0, y0, x1, y1]


def landmarks(given, n: int) -> list[Tensor]:
    """Landmarks [K,68,2] of the faces of each of n pictures, from a face mesh's result.

    given: a dict whose "frames" hold for each picture a list of faces, each with "landmarks_xy" of 478, 468
    or 68 points. Raises ValueError for anything else.
    """
    frames = given.get("frames") if isinstance(given, dict) else None
    if not isinstance(frames, (list, tuple)):
        raise ValueError(
            "landmarks are 68 points a face in iBUG's order, a tensor [faces, 68, 2], or the result of a "
            f"face mesh of 478 points, got {type(given).__name__}"
        )
    if len(frames) not in (1, n):
        raise ValueError(f"there are landmarks of {len(frames)} pictures, but {n} pictures")
    found = [[_points(face) for face in faces] for faces in frames]
    found = [torch.stack(p) if p else torch.zeros(0, 68, 2) for p in found]
    return found * n if len(found) == 1 else found


def _points(face) -> Tensor:
    points = face.get("landmarks_xy") if isinstance(face, dict) else face
    points = torch.as_tensor(points, dtype=torch.float32)
    if points.ndim != 2 or points.shape[0] not in (68, 468, 478) or points.shape[1] < 2:
        raise ValueError(
            f"a face has 68 landmarks (iBUG), or 478 or 468 of a face mesh, got {list(points.shape)}"
        )
    if not torch.isfinite(points).all():
        raise ValueError("landmarks hold NaN or infinity: find the face again")
    return (points if len(points) == 68 else points[MESH])[:, :2].clone()
