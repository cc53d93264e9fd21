"""The numbers that the evaluations report, and the tables that they are printed in.

Images are [B,3,H,W] in 0..1 (display space), masks [1,1,H,W] or [B,1,H,W].
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from rig_core import align, sh
from rig_core.estimators import identity, landmarks


def mse(a: Tensor, b: Tensor, mask: Tensor | None = None) -> float:
    """Mean square difference of pictures in 0..1, over a mask where given."""
    error = (a - b).square().mean(1, keepdim=True)
    if mask is None:
        return float(error.mean())
    return float((error * mask).sum() / mask.expand_as(error).sum().clamp_min(1))


def psnr(a: Tensor, b: Tensor, mask: Tensor | None = None) -> float:
    """dB of pictures in 0..1, over a mask where given; 100 when they are equal."""
    return -10 * math.log10(max(mse(a, b, mask), 1e-10))


def ssim(a: Tensor, b: Tensor, mask: Tensor | None = None) -> float:
    """Mean structural similarity (Wang et al. 2004, 11 px window), over a mask where given."""
    from kornia.metrics import ssim as ssim_map

    m = ssim_map(a, b, 11).mean(1, keepdim=True)
    mask = torch.ones_like(m) if mask is None else mask
    return float((m * mask).sum() / mask.sum().clamp_min(1))


def ita(image: Tensor, mask: Tensor) -> Tensor:
    """Individual typology angle of the mean colour below a mask, degrees [B] (Chardon et al. 1991).

    atan2(L* - 50, b*) of CIELAB under D65: above 55 very light skin, below -30 dark skin.
    """
    from kornia.color import rgb_to_lab

    colour = (image * mask).sum((2, 3), keepdim=True) / mask.sum((2, 3), keepdim=True).clamp_min(1e-6)
    lightness, _, b = rgb_to_lab(colour).flatten(1).unbind(1)
    return torch.rad2deg(torch.atan2(lightness - 50, b))


def skin_error(a: Tensor, b: Tensor, mask: Tensor) -> float:
    """Mean absolute difference of the individual typology angles, degrees."""
    difference = (ita(a, mask) - ita(b, mask)).abs()
    return float(torch.minimum(difference, 360 - difference).mean())


def drift(before: Tensor, after: Tensor) -> Tensor:
    """Mean move of the 51 inner landmarks, % of the eye distance, [B]; NaN where no face is found."""
    box = landmarks.find_faces(before)[0][:1]
    if not len(box):
        return torch.full((len(after),), torch.nan)
    a = landmarks.find_landmarks(before, box)[:, 17:]
    b = torch.cat([landmarks.find_landmarks(x[None], box)[:, 17:] for x in after])
    return moved(a, b)


def moved(a: Tensor, b: Tensor) -> Tensor:
    """Mean distance of the 51 inner landmarks [B,51,2], % of the eye distance in a, [B]."""
    eyes = (a[:, 19:25].mean(1) - a[:, 25:31].mean(1)).norm(dim=-1)
    return (b - a).norm(dim=-1).mean(1) / eyes * 100


def identity_cosine(recognise, a: Tensor, b: Tensor) -> Tensor:
    """How alike the persons in aligned square pictures are, [B]: the cosine of their identity vectors."""
    return F.cosine_similarity(identity.embed(recognise, a), identity.embed(recognise, b))


def brightness(image: Tensor, mask: Tensor) -> Tensor:
    """Mean luminance below a mask in linear light, [B]."""
    weights = image.new_tensor(sh.LUMINANCE)[:, None, None]
    y = (align.to_linear(image) * weights).sum(1, keepdim=True)
    return (y * mask).sum((1, 2, 3)) / mask.expand_as(y).sum((1, 2, 3)).clamp_min(1e-6)


def response(scalars: Tensor, values: Tensor) -> float:
    """Least-squares change of values [K] from the lowest to the highest scalar [K], % of their mean."""
    x = scalars.flatten() - scalars.mean()
    slope = (x * (values - values.mean())).sum() / x.square().sum()
    return float(slope * (scalars.max() - scalars.min()) / values.mean().clamp_min(1e-6) * 100)


def falling(values: Tensor) -> bool:
    """Does each of the values [K] lie below the one before?"""
    return bool((values.diff() < 0).all())


def interval(values: Tensor, samples: int = 2000) -> tuple[float, float]:
    """95 % interval of the mean of values [N], by the bootstrap's percentiles (Efron 1979); NaN left out."""
    values = values[values.isfinite()]
    if not len(values):
        return math.nan, math.nan
    picks = torch.randint(len(values), (samples, len(values)), generator=torch.Generator().manual_seed(0))
    low, high = values[picks].mean(1).quantile(torch.tensor([0.025, 0.975]).to(values))
    return float(low), float(high)


def table(header: list[str], rows: list[list]) -> str:
    """A Markdown table; numbers to two or three digits, None as a dash."""

    def cell(v) -> str:
        if v is None:
            return "-"
        return str(v) if isinstance(v, str | int) else f"{v:.3f}" if abs(v) < 1 else f"{v:.2f}"

    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(map(cell, row)) + " |" for row in lines)
