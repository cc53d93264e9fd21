"""Move a photo with its head: the dense flow from one face code to another, and smooth extension of maps.

DiffusionRig paints from noise, so hair and background come out of 64 numbers. To turn or animate a
face and keep the person, the photo is first moved along the fitted head; the denoiser then only has to
repair what the move uncovers and to set the light.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from . import buffers, raster
from .face import FaceCode


def same_geometry(a: FaceCode, b: FaceCode) -> bool:
    """Whether two codes place every vertex alike, so that only light or albedo differ."""
    return all(torch.equal(getattr(a, n), getattr(b, n)) for n in ("shape", "exp", "pose", "cam", "crop"))


def flow(head, source: FaceCode, target: FaceCode, reach: float = 0.22) -> tuple[Tensor, Tensor]:
    """Where each pixel of the edited picture comes from in the photo.

    Convention: [-1, 1] over the picture, x right, y down, as torch's grid_sample with align_corners=False.
    Returns grid [B,H,W,2] and hidden [B,1,H,W], 1 where the photo does not show that part of the head.
    Outside the head the motion fades to zero over `reach` of the width: hair and neck follow, the background
    stays.
    """
    verts_s = buffers.to_image(head.verts(source.shape, source.exp, source.pose), source)
    verts_t = buffers.to_image(head.verts(target.shape, target.exp, target.pose), target)
    size = target.size
    frags = buffers.rasterize_head(verts_t, head.faces, size)
    origin = raster.interpolate_verts(frags, head.faces, verts_s)
    origin = origin / frags.bary.sum(-1)[:, None]  # the weights do not quite sum to 1
    inside = (frags.pix_to_face >= 0)[:, None].to(origin)

    # what the photo does not show moves with what surrounds it: hair over the cheek stays hair
    seen_depth = buffers.rasterize_head(verts_s, head.faces, size).zbuf[:, None]
    depth = F.grid_sample(seen_depth, origin[:, :2].permute(0, 2, 3, 1), mode="nearest", align_corners=False)
    hidden = ((origin[:, 2:] > depth - buffers.DEPTH_OFFSET + 0.06) & (inside > 0)).to(origin)
    hidden = blur(hidden, size[0] / 128)

    here = pixel_grid(size, origin.device).expand(len(origin), -1, -1, -1)
    known = inside * (hidden < 0.1)
    move = spread((origin[:, :2] - here) * known, known, reach)
    return (here + move).permute(0, 2, 3, 1), hidden


def pixel_grid(size: tuple[int, int], device=None) -> Tensor:
    """Centres of the pixels in [-1, 1], x right, y down: [1,2,H,W]."""
    h, w = size
    y = (torch.arange(h, device=device) * 2 + 1) / h - 1
    x = (torch.arange(w, device=device) * 2 + 1) / w - 1
    return torch.stack(torch.meshgrid(x, y, indexing="xy"))[None]


def apply(image: Tensor, grid: Tensor) -> Tensor:
    """Sample a photo [B,3,H,W] at a flow's grid [B,H,W,2]; reflected beyond its border, kept in 0..1."""
    warped = F.grid_sample(image, grid, mode="bicubic", padding_mode="reflection", align_corners=False)
    return warped.clamp(0, 1)


def spread(value: Tensor, weight: Tensor, reach: float) -> Tensor:
    """Keep value [B,C,H,W] where weight [B,1,H,W] is 1, extend it smoothly, fade to 0 over `reach` widths.

    Blurs of doubling width fill ever farther pixels from the nearest known ones.
    """
    size = value.shape[-1]
    known, out, seen = value * weight, value * weight, weight
    sigma = size / 64
    while sigma < size * reach / 2:  # a blur is felt at twice its sigma
        v, w = blur(known, sigma), blur(weight, sigma)
        out = torch.where(seen > 0, out, v / w.clamp_min(1e-4) * (w * 3).clamp(0, 1))
        seen = torch.maximum(seen, (w > 0.05).to(w))
        sigma *= 2
    return torch.where(blur(weight, size / 100) > 0.97, out, blur(out, size / 100))


def blur(x: Tensor, sigma: float) -> Tensor:
    """Gaussian blur of [B,C,H,W], replicated border."""
    r = max(1, math.ceil(2.5 * sigma))
    k = torch.exp(-0.5 * (torch.arange(-r, r + 1, dtype=x.dtype, device=x.device) / sigma) ** 2)
    k = (k / k.sum()).expand(x.shape[1], 1, -1)
    x = F.conv2d(F.pad(x, (r, r, 0, 0), mode="replicate"), k[..., None, :], groups=x.shape[1])
    return F.conv2d(F.pad(x, (0, 0, r, r), mode="replicate"), k[..., None], groups=x.shape[1])
