"""Edited crops back into their photo, at the photo's own resolution: one face or several, one edit or many.

`place` works out what all edits of a face have in common, `compose` lays edits on any number of places of one
photo, `paste_back` is both for batches of one face a photo.

Convention: images are [B,3,H,W] float32, RGB in display space, 0..1; crops and pixels as in `align`. Where
nothing was edited, and outside the masks, the photo's values come back bit for bit.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from . import gain
from .align import Crop

MODES = ("ratio", "difference", "replace")
SOFT = 0.06  # in crop sides: width of the soft edge
RIM = 0.15  # the same at the square's top and sides, where the light of backdrops and hair would show a step
SAME = 1e-5  # display values: less is no edit, but the rounding of another batch size
NEARER = 0.2  # in crop sides: how quickly one face gives way to the next where their squares overlap
_FINEST = 2048  # side of the largest gain field, which bounds memory; beyond, it is interpolated
_STRIP = 2**18  # pixels of the photo in work at a time: they stay in the cache


@dataclass(frozen=True)
class Place:
    """A face's place in a photo, and what all of its edits have in common.

    crop: of one face. original [1,3,s,s]: the crop before the edit. weight [1,1,s,s]: the soft mask.
    mode: see `place`. fine, guides: for "ratio", a finer crop and the photo in it, halved down to the crop's
    size. region: rows and columns of the photo that the crop touches, y0, y1, x0, x1. under: where the photo
    itself is moved first, the moved crop as a photo [1,3,s',s'], and the place of the edits in that.
    """

    crop: Crop
    original: Tensor
    weight: Tensor
    mode: str
    region: tuple[int, int, int, int]
    fine: Crop | None = None
    guides: tuple[Tensor, ...] = ()
    under: tuple[Tensor, Place] | None = None


def place(
    photo: Tensor,
    crop: Crop,
    mask: Tensor | None = None,
    original: Tensor | None = None,
    mode: str = "ratio",
    soft: float = SOFT,
) -> Place:
    """Where a face lies in a photo [1,3,H,W], for any number of edits of it.

    crop     of one face
    mask     [1,1,s,s] where edits may go (1), None for the whole crop; soft is its edge in crop sides
    original [1,3,s,s] the crop before the edit, crop.apply(photo) when None. Give what the model makes of the
             unedited face to leave its reconstruction error out
    mode     "ratio": the photo's linear light is multiplied by edited / original (see gain), sharp at any
             size; "difference": their difference is added; "replace": the edited crop itself (poses)
    Raises ValueError for another mode, sizes that do not fit, and NaN.
    """
    if mode not in MODES:
        raise ValueError(f"the mode of pasting is one of {', '.join(MODES)}, got {mode!r}")
    if len(photo) != 1 or len(crop) != 1:
        raise ValueError(f"a place is of one face in one photo, got {len(crop)} in {len(photo)}")
    original = crop.apply(photo).clamp(0, 1) if original is None else original
    _check(original, crop, "original")
    weight = soft_mask(mask, crop, soft, photo.shape[2:]).to(photo.device)
    region = _region(crop, photo.shape[2:])
    if mode != "ratio" or not _touches(region):
        return Place(crop, original, weight, mode, region)
    size = crop.size * _scale(crop) ** -1
    fine = crop.resized(crop.size * 2 ** max(0, int(math.log2(min(size, _FINEST) / crop.size))))
    fine = fine.replace(kernel="bilinear")
    guides = gain.guides(fine.apply(photo).clamp(0, 1), crop.size)
    return Place(crop, original, weight, mode, region, fine, tuple(guides))


def compose(photo: Tensor, places: list[Place], edits: list[Tensor]) -> Tensor:
    """Lay N edits of each place on the photo: [1,3,H,W] -> [N,3,H,W], each with all of the faces.

    edits: [N,3,s,s] for each place, the crop after the edit. Every edit counts from the same photo, so that
    the order of the faces does not matter. Where their squares overlap, the weights are shared out, most to
    the face that is nearer in its own measure: no light is laid on twice.
    Raises ValueError for edits of other sizes, and NaN.
    """
    n = len(edits[0]) if edits else 1
    edits = [compose(p.under[0], [p.under[1]], [e]) if p.under else e for p, e in zip(places, edits)]
    for p, edited in zip(places, edits, strict=True):
        _check(edited, p.crop, "edited", n)
    out = photo.expand(n, -1, -1, -1).clone()
    finest = max([p.fine.size for p in places if p.fine], default=1)
    step = max(1, 2**22 // finest**2)
    for i in range(0, n, step):
        layers = [_layer(p, e[i : i + step]) for p, e in zip(places, edits) if _touches(p.region)]
        _lay(out[i : i + step], layers)
    return out


def paste_back(
    photo: Tensor,
    edited: Tensor,
    crop: Crop,
    mask: Tensor | None = None,
    original: Tensor | None = None,
    mode: str = "ratio",
    soft: float = SOFT,
) -> Tensor:
    """One edit a photo, [B,3,H,W] -> [B,3,H,W], or B edits of one: edited [B,3,s,s], the rest [1 or B]."""
    n = len(edited)
    given = [photo, crop, mask, original]
    if all(v is None or len(v) == 1 for v in given):
        return compose(photo, [place(photo, crop, mask, original, mode, soft)], [edited])
    if any(len(v) not in (1, n) for v in given if v is not None):
        raise ValueError(f"{n} edits need as many photos, crops, masks and originals, or one of each")
    out = []
    for i in range(n):
        x, c, m, o = (v if v is None or len(v) == 1 else v[i : i + 1] for v in given)
        out.append(compose(x, [place(x, c, m, o, mode, soft)], [edited[i : i + 1]]))
    return torch.cat(out)


def _check(x: Tensor, crop: Crop, name: str, n: int = 1) -> None:
    want = [n, 3, crop.size, crop.size]
    if list(x.shape) != want:
        raise ValueError(f"the {name} crop must be {want}, got {list(x.shape)}")
    if not torch.isfinite(x).all():
        raise ValueError(f"the {name} crop holds NaN or infinite values")


@dataclass(frozen=True)
class _Layer:
    """N edits on their way to the photo. maps [1,1+M,k,k]: weight, and where they differ, M is 1 or N.
    change [1,3N,k',k']: stops, difference or picture, many edits as channels of one."""

    place: Place
    plain: Crop
    maps: Tensor
    fine: Crop
    change: Tensor


def _layer(p: Place, edited: Tensor) -> _Layer:
    differs = ((edited - p.original).abs() > SAME).any(1)[None].to(edited)
    if (differs == differs[:, :1]).all():
        differs = differs[:, :1]
    plain, maps = p.crop.finer(torch.cat([p.weight, differs], 1), "bilinear")
    if p.mode == "ratio":
        fine, change = p.fine, gain.enlarge(gain.stops(edited, p.original), list(p.guides))
    else:
        change = edited - p.original if p.mode == "difference" else edited
        fine, change = p.crop.finer(change)
    return _Layer(p, plain, maps, fine, change.reshape(1, -1, *change.shape[2:]))


def _lay(out: Tensor, layers: list[_Layer]) -> None:
    """Lay the layers on the photo out [N,3,H,W], in place, strip by strip."""
    borders = sorted({y for layer in layers for y in layer.place.region[:2]})
    for top, bottom in pairwise(borders):
        here = [v for v in layers if v.place.region[0] <= top and v.place.region[1] >= bottom]
        if not here:
            continue
        x0, x1 = min(v.place.region[2] for v in here), max(v.place.region[3] for v in here)
        rows = max(1, _STRIP // (x1 - x0))
        for y in range(top, bottom, rows):
            part = out[:, :, y : min(y + rows, bottom), x0:x1]
            found, weight = _mixed(part, here, x0, y)
            part.copy_(torch.where(weight > 0, torch.lerp(part, found.clamp_(0, 1), weight), part))


def _mixed(part: Tensor, layers: list[_Layer], x0: int, y0: int) -> tuple[Tensor, Tensor]:
    """What the layers make of a part of the photo, and the weight of it: [N,3,h,w], [N,1,h,w]."""
    if len(layers) == 1:
        return _seen(layers[0], part, x0, y0)
    total, shares = torch.zeros_like(part), part.new_zeros(len(part), 1, *part.shape[2:])
    largest = shares.clone()
    for layer in layers:
        left, right = layer.place.region[2:]
        columns = slice(left - x0, right - x0)
        here = part[..., columns]
        found, weight = _seen(layer, here, left, y0)
        share = weight * _nearness(layer.place.crop, here, left, y0)
        total[..., columns].addcmul_(found.clamp_(0, 1), share)
        shares[..., columns] += share
        largest[..., columns] = torch.maximum(largest[..., columns], weight)
    return total / shares.clamp_min(1e-12), largest


def _seen(layer: _Layer, part: Tensor, x0: int, y0: int) -> tuple[Tensor, Tensor]:
    """One layer over the part of the photo that begins at x0, y0: what it makes of it, and its weight."""
    size, n = part.shape[2:], len(part)
    inside, found = (
        c.replace(matrix=c.matrix @ _shift(c.matrix, x0, y0)).back(v, size)
        for c, v in ((layer.plain, layer.maps), (layer.fine, layer.change))
    )
    # what lies beyond the crop's edge repeats it, but there the weight is 0
    weight = (inside[:, :1] * inside[:, 1:]).transpose(0, 1).expand(n, 1, *size)
    found = found.reshape(n, 3, *size)
    if layer.place.mode == "ratio":
        found = gain.light(part[:1], found)  # every edit begins from the same photo
    elif layer.place.mode == "difference":
        found = part + found
    return found, weight


def _nearness(crop: Crop, part: Tensor, x0: int, y0: int) -> Tensor:
    """Falls from 1 at the crop's centre, [1,1,h,w]."""
    (a, b, c), (d, e, f) = (crop.matrix @ _shift(crop.matrix, x0, y0))[0, :2].tolist()
    h, w = part.shape[2:]
    y = torch.arange(h, device=part.device, dtype=part.dtype)[:, None]
    x = torch.arange(w, device=part.device, dtype=part.dtype)
    middle = (crop.size - 1) / 2
    apart = (a * x + b * y + (c - middle)).square() + (d * x + e * y + (f - middle)).square()
    return torch.exp(-apart / (NEARER * crop.size) ** 2)[None, None]


def _shift(like: Tensor, x0: int, y0: int) -> Tensor:
    return torch.tensor([[1.0, 0, x0], [0, 1, y0], [0, 0, 1]]).to(like)


def _scale(crop: Crop) -> float:
    """Crop pixels per photo pixel."""
    return float(torch.linalg.det(crop.matrix[:, :2, :2].cpu()).abs()[0] ** 0.5)


def _blur(mask: Tensor, radius: int) -> Tensor:
    """Two box blurs of the given radius: a tent, edges repeated."""
    for _ in range(2):
        mask = F.avg_pool2d(F.pad(mask, (radius,) * 4, mode="replicate"), 2 * radius + 1, stride=1)
    return mask


def soft_mask(
    mask: Tensor | None, crop: Crop, soft: float = SOFT, photo_size: tuple[int, int] | None = None
) -> Tensor:
    """Weight of the edit in the crop, [B,1,s,s], 0..1, falling smoothly to 0 INSIDE the mask and the crop.

    mask [B,1,s,s], 1 = edit, None for the whole crop; soft: width of the edge in crop sides, at least RIM at
    the crop's top and sides; not below, where the chin is near.
    photo_size (H, W): where the photo ends with the crop, or before it, there is no edge: nothing to meet.
    """
    s = crop.size
    if mask is None:
        mask = torch.ones(1, 1, s, s, device=crop.matrix.device)
    if mask.ndim != 4 or mask.shape[1] != 1 or mask.shape[2:] != (s, s):
        raise ValueError(f"the mask must be [B,1,{s},{s}], as the crop, got {list(mask.shape)}")
    # eroded by what interpolation reaches, so that the edit does not leave the mask
    scale = float(torch.linalg.det(crop.matrix[:, :2, :2].cpu()).abs().max() ** 0.5)
    reach = min(1 if scale < 1.5 else 1 + math.ceil(1.5 * scale), (s - 1) // 2)
    mask = -F.max_pool2d(-mask.float().clamp(0, 1), 2 * reach + 1, 1, reach)
    at = torch.arange(s, device=mask.device, dtype=mask.dtype)
    left, top, right, bottom = _within(crop, photo_size)
    narrow, wide = max(soft * s, 1), max(soft, RIM if soft else 0) * s
    full = torch.ones_like(at)
    rows = torch.minimum(at / wide if top else full, (s - 1 - at) / narrow if bottom else full)
    columns = torch.minimum(at / wide if left else full, (s - 1 - at) / wide if right else full)
    mask = torch.minimum(mask, rows.clamp(0, 1)[:, None] * columns.clamp(0, 1))  # round at the corners
    radius = min(round(soft * s / 2), (s - 1) // 2)
    if radius:  # at a straight border the blur is one half: what exceeds it lies inside
        mask = torch.minimum(mask, (2 * _blur(mask, radius) - 1).clamp(0, 1))
    return mask * mask * (3 - 2 * mask)


def _within(crop: Crop, photo_size: tuple[int, int] | None) -> tuple[bool, bool, bool, bool]:
    """Whether the photo goes on beyond the crop's left, top, right and bottom side, for any of the crops."""
    if photo_size is None:
        return True, True, True, True
    s, (h, w) = float(crop.size), photo_size
    ends = torch.tensor([[0.0, 0.0], [s, 0.0], [s, s], [0.0, s]]).to(crop.matrix) - 0.5
    a, b, c, d = crop.invert_points(ends.expand(len(crop), 4, 2)).unbind(1)  # clockwise from the upper left

    def inside(p: Tensor, q: Tensor) -> bool:
        points = torch.lerp(p[:, None], q[:, None], torch.linspace(0.05, 0.95, 19).to(p)[:, None])
        x, y = points.unbind(-1)
        return bool(((x > 0) & (x < w - 1) & (y > 0) & (y < h - 1)).any())

    return inside(a, d), inside(a, b), inside(b, c), inside(d, c)


def _region(crop: Crop, size: tuple[int, int]) -> tuple[int, int, int, int]:
    """Rows and columns of the photo that the crops touch: y0, y1, x0, x1."""
    low, high = -1.0, float(crop.size)
    square = torch.tensor([[low, low], [high, low], [high, high], [low, high]]).to(crop.matrix)
    corners = crop.invert_points(square.expand(len(crop), 4, 2)).flatten(0, 1)
    x0, y0 = (int(v) for v in corners.amin(0).floor())
    x1, y1 = (int(v) + 1 for v in corners.amax(0).ceil())
    return max(y0, 0), min(y1, size[0]), max(x0, 0), min(x1, size[1])


def _touches(region: tuple[int, int, int, int]) -> bool:
    y0, y1, x0, x1 = region
    return y0 < y1 and x0 < x1
