"""A smooth picture, a crop anywhere in it, and how alike two pictures are: for tests of crops and pasting."""

from __future__ import annotations

import math

import torch

from rig_core import align


def picture(h, w, frequency=3.0, batch=1):
    """A smooth colour picture."""
    y, x = torch.meshgrid(torch.linspace(0, 1, h), torch.linspace(0, 1, w), indexing="ij")
    waves = [
        (frequency * 2 * math.pi * (a * x + b * y) + c).sin()
        for a, b, c in ((1, 0.3, 0), (0.2, 1, 1), (-0.7, 0.7, 2))
    ]
    return (0.5 + 0.4 * torch.stack(waves)).expand(batch, 3, h, w).contiguous()


def crop_at(x, y, side, size, degrees=0.0, **fields):
    """A crop of a square about (x, y)."""
    c, s = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    k = size / side
    m = torch.tensor([[k * c, k * s, 0], [-k * s, k * c, 0], [0, 0, 1]])
    m[:2, 2] = (size - 1) / 2 - m[:2, :2] @ torch.tensor([x, y], dtype=torch.float32)
    return align.Crop(m[None], size, **fields)


def psnr(a, b):
    return -10 * math.log10(float((a - b).square().mean()))
