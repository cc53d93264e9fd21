"""A soft mask of face, neck and hair, from the fitted head and the colours of the picture alone.

Inside the rendered head nearly everything belongs to it but the neck, where clothes may lie over the skin.
Around it, three colour histograms (hair, skin, everything else) start from places that are known and are
refined as GrabCut does (Rother et al. 2004), with a prior of where hair grows; neighbours of like colour are
drawn together, what does not hang together with the head is dropped, and a guided filter (He et al. 2010)
gives the soft edge. A hat counts as hair: it takes the hair's place, and light falls on it all the same.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from . import buffers, raster
from .align import check_image
from .face import FaceCode

WORK = 128  # px, longer sides are solved at this size and carried up by the guided filter
BINS = 28  # of the colour histograms, each side
RIM = 0.035  # of the picture's side: how far the silhouette may be off
ROUNDS = 2  # refinements of the histograms


def head_matte(head, code: FaceCode, image: Tensor) -> Tensor:
    """Coverage of face, neck and hair [B,1,s,s], 0..1.

    head: the HeadModel of code; code: B faces in the picture's frame (code.size may be another size of the
    same square); image [B,3,s,s] RGB 0..1. Raises ValueError for pictures that are not such, for a code of
    another head and for a head without the masks face, neck and scalp.
    """
    image = check_image(image)
    code.require_head(head)
    s = image.shape[-1]
    if image.shape[-2] != s or s < 16:
        raise ValueError(f"a matte needs a square picture of 16 px or more, got {list(image.shape)}")
    if len(code) != len(image):
        raise ValueError(f"{len(image)} pictures need as many face codes, got {len(code)}")
    lacking = [k for k in ("face", "neck", "scalp") if k not in head.masks]
    if lacking:
        raise ValueError(
            f"the '{head.name}' head has no mask '{lacking[0]}': use the open head or a face parser"
            + (", or put FLAME_masks.pkl beside FLAME's files" if head.name == "flame" else "")
        )
    n = min(s, WORK)
    small = F.interpolate(image, (n, n), mode="area") if n < s else image
    place = regions(head, code, n)
    return _guided(small, _solve(small, place), image)


@dataclass(frozen=True)
class Regions:
    """Where the rendered head lies, [B,1,n,n] each.

    core      0 or 1, face, ears and skull
    inner     0 or 1, the core without a rim as wide as the fit may be off
    sure      0 or 1, the same without the scalp, whose fit no landmark holds
    neck      0 or 1, the rest of the rendered head, where clothes may be
    scalp     0..1, where hair grows
    skin      0..1, bare in every haircut
    distance  from the core, in radii of the head
    below     under the middle of the head, in radii of the head, negative above
    """

    core: Tensor
    inner: Tensor
    sure: Tensor
    neck: Tensor
    scalp: Tensor
    skin: Tensor
    distance: Tensor
    below: Tensor


def regions(head, code: FaceCode, n: int) -> Regions:
    """The regions of a face in a square picture of n px."""
    verts = buffers.to_image(head.verts(code.shape, code.exp, code.pose), code)
    fragments = buffers.rasterize_head(verts, head.faces, (n, n))
    values = torch.stack([_mask(head, k) for k in ("scalp", "neck", "beard", "brows", "face")], -1).to(verts)
    drawn = raster.interpolate_verts(fragments, head.faces, values[None].expand(len(code), -1, -1))
    scalp, neck, beard, brows, _ = drawn.clamp(0, 1).split(1, 1)
    mask = fragments.mask.to(drawn)
    core = mask * (neck < 0.5)
    weight = (values[:, 0] + values[:, 4] > 0.5).to(verts)[None, :, None]
    weight = weight / weight.sum()
    centre = (verts[..., :2] * weight).sum(1, keepdim=True)
    spread = ((verts[..., :2] - centre).square() * weight).sum((1, 2)).sqrt()
    radius = (1.13 * spread).reshape(-1, 1, 1, 1)
    line = (torch.arange(n, device=drawn.device, dtype=drawn.dtype) * 2 + 1) / n - 1
    below = (line[:, None] - centre[:, :, 1:, None]) / radius
    width = 2 * max(1, round(RIM * n)) + 1
    inner = F.avg_pool2d(mask, width, 1, width // 2, count_include_pad=False) > 0.999
    return Regions(
        core=core,
        inner=core * inner,
        sure=core * inner * (scalp < 0.5),
        neck=mask - core,
        scalp=scalp * core,
        skin=core * (1 - scalp) * (1 - beard) * (1 - brows),
        distance=_distance(core) * (2 / n) / radius,
        below=below.expand_as(mask),
    )


def _mask(head, name: str) -> Tensor:
    if name in ("beard", "brows") and name not in head.masks:
        return torch.zeros_like(next(iter(head.masks.values())))
    return head.masks[name]


def _distance(mask: Tensor) -> Tensor:
    """Euclidean distance in pixels to the nearest pixel of a mask [B,1,n,n], 0 on it; n without one.

    Separable: along the rows, then the smallest of row distance and column offset. At half size, which is
    fine enough for a prior.
    """
    half = F.max_pool2d(mask, 2, ceil_mode=True)[:, 0]
    n = half.shape[-1]
    line = torch.arange(n, device=mask.device, dtype=mask.dtype)
    gap = (line[:, None] - line).square()
    far = torch.where(half > 0.5, 0.0, float(n * n))
    rows = (far.transpose(1, 2)[:, :, :, None] + gap[:, None]).amin(1)  # [B,row,column]
    both = (rows[:, :, None] + gap[None, :, :, None]).amin(1).clamp_max(n * n)
    up = F.interpolate(both[:, None].sqrt() * 2, mask.shape[-2:], mode="bilinear", align_corners=False)
    return up * (1 - mask)


def _solve(image: Tensor, place: Regions) -> Tensor:
    """Probability of head at each pixel [B,1,n,n]."""
    post = _classes(image, place)
    head = (post[:, :1] + post[:, 1:2]).clamp(1e-4, 1 - 1e-4)
    odds = torch.where(place.sure > 0.5, 6.0, (head / (1 - head)).log().clamp(-5, 5))
    head = torch.maximum(_connected(_smooth(image, odds), place.sure), place.sure)
    # a gleam on the hair is no hole: what of the skull the backdrop does not reach is head
    rest = _connected(1 - head, (place.distance > 0.3).to(head))
    return torch.maximum(head, place.core * (1 - rest))


def _classes(image: Tensor, place: Regions) -> Tensor:
    """Probability of hair, skin and everything else [B,3,n,n]."""
    colour, outside = _codes(image), 1 - place.core
    # hair grows close to the skull and falls beside the neck
    hair = torch.sigmoid(2 - 6 * place.distance) * (1 - 0.5 * torch.sigmoid(6 * (place.below - 1.3)))
    hair = hair.clamp(0.005, 0.9)
    skin = (0.85 * place.neck + 0.3 * torch.exp(-20 * place.distance)).clamp(0.003, 0.9)
    rest = (1 - hair) * (1 - 0.9 * place.neck) + 0.02
    prior = torch.cat([hair * (1 - 0.85 * place.neck), skin, rest], 1)
    # on the skull and at the silhouette the fit may be off: nearly sure
    rim = torch.cat([0.05 + 0.85 * place.scalp, 0.9 - 0.85 * place.scalp, torch.full_like(skin, 0.03)], 1)
    prior = torch.where(place.core > 0.5, rim, prior)
    far = torch.sigmoid(14 * (place.distance - 0.55)) * outside
    weights = seeds = torch.cat([place.scalp * place.inner, place.skin * place.inner, far], 1)
    for _ in range(ROUNDS):
        like = _likelihood(colour, weights)
        post = prior * like
        post = post / post.sum(1, keepdim=True)
        # colours alone must agree before a pixel teaches the hair, or the backdrop near the head would;
        # and a scalp of the backdrop's colour is a backdrop that the fitted skull covers
        fair = like / like.sum(1, keepdim=True)
        learnt = outside * post[:, :1] * (2 * fair[:, :1] - 1).clamp_min(0)
        hair = seeds[:, :1] * (1 - 3 * fair[:, 2:]).clamp_min(0.02) + learnt
        skin = seeds[:, 1:2] + place.neck * post[:, 1:2]
        rest = seeds[:, 2:] * fair[:, 2:] + outside * post[:, 2:]
        weights = torch.cat([hair, skin, rest], 1)
    return post


def _codes(image: Tensor) -> Tensor:
    """Pictures as coordinates of the colour cube, -1..1: [B,3,n,n]; hue counts more than lightness."""
    grey = image.mean(1, keepdim=True)
    return torch.cat([grey * 2 - 1, 5 * (image[:, :1] - grey), 5 * (image[:, 2:] - grey)], 1).clamp(-1, 1)


def _likelihood(colour: Tensor, weights: Tensor) -> Tensor:
    """Density of each pixel's colour [B,K,n,n] under K histograms, filled with weights [B,K,n,n]."""
    b, k = weights.shape[:2]
    cell = ((colour + 1) * (BINS / 2)).long().clamp(0, BINS - 1)
    index = ((cell[:, 2] * BINS + cell[:, 1]) * BINS + cell[:, 0]).flatten(1)
    table = weights.new_zeros(b, k, BINS**3)
    table.scatter_add_(2, index[:, None].expand(-1, k, -1), weights.flatten(2))
    table = table.reshape(b, k, BINS, BINS, BINS)
    line = torch.arange(BINS, device=table.device, dtype=table.dtype)
    blur = torch.exp(-0.5 * (line[:, None] - line).square())
    blur = blur / blur.sum(0)
    for _ in range(3):  # each turn blurs the last axis and brings the next one there
        table = (table @ blur).permute(0, 1, 4, 2, 3)
    table = table / table.sum((2, 3, 4), keepdim=True).clamp_min(1e-6) + 0.3 / BINS**3
    at = colour.permute(0, 2, 3, 1)[:, None]
    return F.grid_sample(table, at, padding_mode="border", align_corners=False)[:, :, 0]


def _smooth(image: Tensor, odds: Tensor, steps: int = 8, pull: float = 1.5) -> Tensor:
    """Mean field of a grid whose neighbours agree the more the more alike their colours are; [B,1,n,n]."""
    gap = sum((_neighbours(image[:, i : i + 1]) - image[:, i : i + 1]).square() for i in range(3))
    near = pull * torch.exp(-gap / 0.01) * gap.new_tensor([0.7, 1, 0.7, 1, 1, 0.7, 1, 0.7])[:, None, None]
    q = torch.tanh(odds / 2)
    for _ in range(steps):
        q = torch.tanh((odds + (near * _neighbours(q)).sum(1, keepdim=True)) / 2)
    return (q + 1) / 2


def _neighbours(x: Tensor) -> Tensor:
    """The 8 neighbours [B,8,n,n] of each pixel of [B,1,n,n], 0 beyond the border."""
    n = x.shape[-1]
    x = F.pad(x, (1, 1, 1, 1))
    return torch.cat(
        [x[..., i : i + n, j : j + n] for i in range(3) for j in range(3) if (i, j) != (1, 1)], 1
    )


def _connected(p: Tensor, seed: Tensor) -> Tensor:
    """What can be reached from a seed without passing lower values or narrow bridges; any [B,C,n,n].

    Grey-scale reconstruction at half size of what survives an erosion, grown back.
    """
    low = (2 * F.avg_pool2d(p, 2, ceil_mode=True)).clamp_max(1)  # a half is as good as a whole bridge
    thin = 1 - _widest(1 - low, 0, 1)
    reach = torch.minimum(F.max_pool2d(seed, 2, ceil_mode=True), thin)
    for _ in range(low.shape[-1] * 3 // 4):
        reach = torch.minimum(_widest(reach, 1, 1), thin)
    reach = torch.minimum(_widest(reach, 1, 0), low)
    for _ in range(3):
        reach = torch.minimum(_widest(reach, 1, 1), low)
    kept = F.interpolate(reach / low.clamp_min(1e-4), p.shape[-2:], mode="bilinear", align_corners=False)
    return p * kept


def _widest(x: Tensor, before: int, after: int) -> Tensor:
    """The largest value from `before` pixels left or above to `after` right or below.

    Several times faster than max_pool2d, which also looks for places.
    """
    n = x.shape[-1]
    x = F.pad(x, (before, after, before, after))
    for axis in (-1, -2):
        x = functools.reduce(torch.maximum, [x.narrow(axis, i, n) for i in range(before + after + 1)])
    return x


def _guided(small: Tensor, p: Tensor, image: Tensor, eps: float = 4e-4) -> Tensor:
    """Colour guided filter of p [B,1,n,n] by small [B,3,n,n], applied at the size of image [B,3,s,s]."""
    r = max(1, round(small.shape[-1] / 64))

    def mean(x):
        return F.avg_pool2d(x, 2 * r + 1, 1, r, count_include_pad=False)

    m, mp = mean(small), mean(p)
    pairs = [(0, 0), (0, 1), (0, 2), (1, 1), (1, 2), (2, 2)]
    second = mean(torch.cat([small[:, i : i + 1] * small[:, j : j + 1] for i, j in pairs] + [small * p], 1))
    c = [second[:, k] - m[:, i] * m[:, j] + (eps if i == j else 0) for k, (i, j) in enumerate(pairs)]
    v = second[:, 6:] - m * mp
    a, b, d, e, f, g = c  # symmetric matrix a b d / b e f / d f g, inverted by its adjugate
    adj = [e * g - f * f, d * f - b * g, b * f - d * e, a * g - d * d, b * d - a * f, a * e - b * b]
    det = (a * adj[0] + b * adj[1] + d * adj[2])[:, None]
    rows = ((0, 1, 2), (1, 3, 4), (2, 4, 5))
    slope = torch.stack([sum(adj[k] * v[:, j] for j, k in enumerate(row)) for row in rows], 1) / det
    line = torch.cat([slope, mp - (slope * m).sum(1, keepdim=True)], 1)
    line = F.interpolate(mean(line), image.shape[-2:], mode="bilinear", align_corners=False)
    return ((line[:, :3] * image).sum(1, keepdim=True) + line[:, 3:]).clamp(0, 1)
