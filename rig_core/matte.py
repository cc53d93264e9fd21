"""A soft mask of face, neck and hair, from the fitted head and the colours of the picture alone.

Inside the rendered head everything belongs to it but the neck, where clothes may lie over the skin. Around
it, three colour histograms (skin, hair, everything else) start from places that are sure and are refined as
GrabCut does (Rother et al. 2004), with a prior of where hair grows; neighbours of like colour are drawn
together, what does not hang together with the head is dropped, and a guided filter (He et al. 2010) gives
the soft edge. A hat is head where it covers the skull.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from . import buffers, raster
from .align import check_image
from .face import FaceCode

WORK = 128  # px, longer sides are solved at this size and carried up by the guided filter
BINS = 20  # of the colour histograms, each side
ROUNDS = 3  # refinements of the histograms


def head_matte(head, code: FaceCode, image: Tensor) -> Tensor:
    """Coverage of face, neck and hair [B,1,s,s], 0..1.

    head: the HeadModel of code; code: B faces in the picture's frame (code.size may be another size of the
    same square); image [B,3,s,s] RGB 0..1. Raises ValueError for pictures that are not such.
    """
    image = check_image(image)
    s = image.shape[-1]
    if image.shape[-2] != s or s < 16:
        raise ValueError(f"a matte needs a square picture of 16 px or more, got {list(image.shape)}")
    if len(code) != len(image):
        raise ValueError(f"{len(image)} pictures need as many face codes, got {len(code)}")
    image = image.float()
    n = min(s, WORK)
    small = F.interpolate(image, (n, n), mode="area") if n < s else image
    place = regions(head, code, n)
    p = _solve(small, place)
    p = _connected(p, place["core"])
    return _guided(small, p, image)


def regions(head, code: FaceCode, n: int) -> dict[str, Tensor]:
    """Where things are, [B,1,n,n] each: mask (rendered head), core (face, ears and skull: surely head), scalp,
    skin (bare in every haircut), neck, distance (from face and skull, in head radii), below (how far under the
    middle of the head, in head radii, negative above), side (likewise to the sides).
    """
    fragments, _, _ = buffers.geometry(head, code, n)
    names = ["scalp", "face", "neck", "ears", "beard", "brows"]
    values = torch.stack([_mask(head, k) for k in names], -1).to(code.cam)
    drawn = raster.interpolate_verts(fragments, head.faces, values[None].expand(len(code), -1, -1))
    scalp, face, neck, ears, beard, brows = drawn.split(1, 1)
    mask = fragments.mask.to(drawn)
    core = mask * (neck < 0.5)
    points = buffers.to_image(head.verts(code.shape, code.exp, code.pose), code)[..., :2]
    weight = (values[:, 0] + values[:, 1] > 0.5).to(points)[None, :, None]
    centre = (points * weight).sum(1) / weight.sum(1)
    radius = (((points - centre[:, None]).square() * weight).sum(1) / weight.sum(1)).mean(-1).sqrt() * 1.6
    line = (torch.arange(n, device=drawn.device, dtype=drawn.dtype) * 2 + 1) / n - 1
    below = (line.reshape(1, 1, n, 1) - centre[:, 1].reshape(-1, 1, 1, 1)) / radius.reshape(-1, 1, 1, 1)
    side = (line.reshape(1, 1, 1, n) - centre[:, 0].reshape(-1, 1, 1, 1)) / radius.reshape(-1, 1, 1, 1)
    return {
        "mask": mask,
        "core": core,
        "scalp": scalp,
        "neck": mask - core,
        "skin": core * (1 - scalp.clamp(0, 1)) * (1 - beard.clamp(0, 1)) * (1 - brows.clamp(0, 1)),
        "distance": _distance(core) * (2 / n) / radius.reshape(-1, 1, 1, 1),
        "below": below.expand_as(mask),
        "side": side.expand_as(mask),
    }


def _mask(head, name: str) -> Tensor:
    return head.masks[name] if name in head.masks else torch.zeros_like(next(iter(head.masks.values())))


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


def _solve(image: Tensor, place: dict[str, Tensor]) -> Tensor:
    """Probability of head at each pixel [B,1,n,n]."""
    d, below, side = place["distance"], place["below"], place["side"]
    colour = _codes(image)
    low = below.clamp_min(0)
    # hair grows close to the skull, falls beside the neck, and is never over it by more than half a head
    hair_prior = torch.sigmoid(2.0 - 6.0 * d) * (1 - 0.5 * torch.sigmoid(6 * (low - 1.3)))
    hair_prior = hair_prior.clamp(0.005, 0.9)
    skin_prior = (0.85 * place["neck"] + 0.3 * torch.exp(-20 * d)).clamp(0.003, 0.9)
    rest_prior = (1 - hair_prior) * (1 - 0.9 * place["neck"]) + 0.02
    prior = torch.cat([hair_prior * (1 - 0.85 * place["neck"]), skin_prior, rest_prior], 1)
    outside = 1 - place["core"]
    inner = F.avg_pool2d(place["core"], 5, 1, 2).square().square()
    far = torch.sigmoid(14 * (d - 0.55)) * outside
    weights = seeds = torch.cat([place["scalp"] * inner, place["skin"] * inner, far], 1)
    for _ in range(ROUNDS):
        like = _likelihood(colour, weights)
        post = prior * like
        post = post / post.sum(1, keepdim=True)
        # colours alone must agree before a pixel teaches the hair, or the backdrop near the head would
        fair = like / like.sum(1, keepdim=True)
        hair = seeds[:, :1] + outside * post[:, :1] * (2 * fair[:, :1] - 1).clamp_min(0)
        skin = seeds[:, 1:2] + place["neck"] * post[:, 1:2]
        rest = 0.3 * seeds[:, 2:] + outside * post[:, 2:]
        weights = torch.cat([hair, skin, rest], 1)
    p = (post[:, 0:1] + post[:, 1:2]).clamp(1e-4, 1 - 1e-4)
    odds = (p / (1 - p)).log().clamp(-5, 5)
    odds = torch.where(place["core"] > 0.5, 6.0, odds)
    return _smooth(image, odds)


def _codes(image: Tensor) -> Tensor:
    """Pictures as coordinates of the colour cube, -1..1: [B,3,n,n]; lightness counts less than hue."""
    grey = image.mean(1, keepdim=True)
    return (torch.cat([grey * 2 - 1, 2.5 * (image[:, :1] - grey), 2.5 * (image[:, 2:] - grey)], 1)).clamp(
        -1, 1
    )


def _likelihood(colour: Tensor, weights: Tensor) -> Tensor:
    """Density of each pixel's colour [B,K,n,n] under K histograms, filled with weights [B,K,n,n]."""
    b, k = weights.shape[:2]
    cell = ((colour + 1) * (BINS / 2)).long().clamp(0, BINS - 1)
    index = ((cell[:, 2] * BINS + cell[:, 1]) * BINS + cell[:, 0]).flatten(1)
    table = weights.new_zeros(b, k, BINS**3)
    table.scatter_add_(2, index[:, None].expand(-1, k, -1), weights.flatten(2))
    table = table.reshape(b * k, 1, BINS, BINS, BINS)
    tap = table.new_tensor([0.06, 0.24, 0.4, 0.24, 0.06])
    for shape in ((5, 1, 1), (1, 5, 1), (1, 1, 5)):
        table = F.conv3d(table, tap.reshape(1, 1, *shape), padding=[i // 2 for i in shape])
    table = table.reshape(b, k, BINS, BINS, BINS)
    table = table / table.sum((2, 3, 4), keepdim=True).clamp_min(1e-6) + 0.3 / BINS**3
    at = colour.permute(0, 2, 3, 1)[:, None]
    return F.grid_sample(table, at, padding_mode="border", align_corners=False)[:, :, 0]


def _smooth(image: Tensor, odds: Tensor, steps: int = 24, pull: float = 1.5) -> Tensor:
    """Mean field of a grid whose neighbours agree the more the more alike their colours are; [B,1,n,n]."""
    n = image.shape[-1]
    kinds = [(0, 1), (1, 0), (1, 1), (1, -1)]
    w = []
    for dy, dx in kinds:
        gap = (image - torch.roll(image, (-dy, -dx), (2, 3))).square().sum(1, keepdim=True)
        near = torch.exp(-gap / 0.01) * (1.0 if dy * dx == 0 else 0.7)
        edge = torch.ones_like(near)
        if dy:
            edge[:, :, n - 1 :] = 0
        if dx > 0:
            edge[:, :, :, n - 1 :] = 0
        if dx < 0:
            edge[:, :, :, :1] = 0
        w.append(near * edge)
    q = torch.tanh(odds / 2)
    for _ in range(steps):
        field = odds
        for (dy, dx), near in zip(kinds, w):
            field = field + pull * near * torch.roll(q, (-dy, -dx), (2, 3))
            field = field + pull * torch.roll(near * q, (dy, dx), (2, 3))
        q = torch.tanh(field / 2)
    return (q + 1) / 2


def _connected(p: Tensor, seed: Tensor) -> Tensor:
    """What can be reached from a seed without passing lower values: grey-scale reconstruction at half size."""
    low = F.avg_pool2d(p, 2, ceil_mode=True)
    reach = torch.minimum(F.max_pool2d(seed, 2, ceil_mode=True), low)
    for _ in range(low.shape[-1] * 3 // 4):
        reach = torch.minimum(_widest(reach), low)
    kept = F.interpolate(reach / low.clamp_min(1e-4), p.shape[-2:], mode="bilinear", align_corners=False)
    return p * kept


def _widest(x: Tensor) -> Tensor:
    """The largest of 3 x 3 neighbours; faster than max_pool2d, which also looks for places."""
    x = F.pad(x, (1, 1, 1, 1))
    x = torch.maximum(torch.maximum(x[..., :-2], x[..., 1:-1]), x[..., 2:])
    return torch.maximum(torch.maximum(x[..., :-2, :], x[..., 1:-1, :]), x[..., 2:, :])


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
