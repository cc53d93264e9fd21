"""More light than the photos had: flat-lit portraits relit through their fitted normals, backdrops exchanged.

A generic model learns from these that light and appearance are two things: the variants of one photo
share the person and differ in light. The relit picture is the photo times the ratio of new to old
shading, with cast shadows of the fitted head; hair and neck follow by a smooth extension of the ratio.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from rig_core import buffers, sh
from rig_core.face import FaceCode
from rig_core.warp import blur, spread


def random_lights(n: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """n display-space lights [n,9,3], the unit direction of their key lamp [n,3], and the key's share [n].

    Keys come from the front half, more often from the side than from the front, now and then from above,
    below or behind; the key carries 55-95 % of the light, the surroundings the rest, both slightly tinted.
    """

    def rand(*shape):
        return torch.rand(*shape, generator=generator)

    azimuth = (rand(n) * 2 - 1) * math.radians(115)
    elevation = (rand(n) * 95 - 30) * math.pi / 180
    d = torch.stack([azimuth.sin() * elevation.cos(), elevation.sin(), azimuth.cos() * elevation.cos()], 1)
    share = 0.55 + 0.4 * rand(n)
    softness = 0.05 + 0.5 * rand(n)
    warm = (rand(n, 1) - 0.5) * torch.tensor([0.30, 0.0, -0.30])
    level = 0.75 + 0.55 * rand(n)
    key = sh.from_direction(d, level * share * 1.6, (1 + warm).clamp(0.6, 1.4), 0.5, 0.0)
    from_above = torch.tensor([[0.0, 1.0, 0.3]]).expand(n, 3)
    fill = sh.from_direction(
        from_above,
        0.4 * level * (1 - share),
        (1 - warm).clamp(0.6, 1.4),
        0.9,
        (level * (1 - share) * 0.8)[:, None],
    )
    return sh.encode_light(key + fill), d, torch.stack([share, softness], 1)


def relight_photos(
    head, image: Tensor, code: FaceCode, generator: torch.Generator
) -> tuple[Tensor, FaceCode, Tensor]:
    """Relight portraits under random lights.

    image [B,3,H,W] 0..1 in the frame of code (display space). Returns the pictures, the codes with their
    new light, and the amount of cast shadow [B] (mean of what the shadow takes from the lit skin, 0..1).
    """
    light, direction, key = random_lights(len(code), generator)
    light, direction, key = light.to(image), direction.to(image), key.to(image)
    verts = buffers.to_image(head.verts(code.shape, code.exp, code.pose), code)
    frags, normal, _ = buffers.geometry(head, code)
    mask = (frags.pix_to_face >= 0)[:, None].to(image)
    seen = buffers.cast_shadow(
        verts, head.faces, frags, direction, key[:, 1] * 0.6, buffers.depth_scale(code)
    )

    cos = (F.normalize(normal, dim=1) * direction[:, :, None, None]).sum(1, keepdim=True).clamp_min(0)
    lit = key[:, 0, None, None, None] * cos
    left = ((1 - key[:, 0, None, None, None] + lit * seen) / (1 - key[:, 0, None, None, None] + lit)) ** (
        1 / 2.2
    )
    front = mask * (normal[:, 2:] > 0.05)
    old = sh.shade(normal, code.light).clamp_min(0.25)
    new = sh.shade(normal, light).clamp_min(0.03) * left
    # the photo keeps its exposure, give or take a third of a stop
    level = (front * new).sum((1, 2, 3)) / (front * old).sum((1, 2, 3)).clamp_min(1e-3)
    wanted = torch.empty(len(code)).uniform_(0.68, 1.12, generator=generator).to(image)
    light, new = light * (wanted / level)[:, None, None], new * (wanted / level)[:, None, None, None]
    gain = (new / old).clamp(0.08, 1.9).log() * mask
    gain = spread(gain, front, reach=0.14)
    gain = torch.lerp(
        blur(gain, image.shape[-1] / 70), gain, 0.35
    )  # lids and nostrils of the mesh are not the photo's
    out = image * gain.exp()
    out = torch.where(out > 0.85, 0.85 + 0.15 * torch.tanh((out - 0.85) / 0.15), out)  # a film's shoulder
    shadow = ((1 - left) * mask).sum((1, 2, 3)) / mask.sum((1, 2, 3)).clamp_min(1)
    return out.clamp(0, 1), code.replace(light=light), shadow


def blue_matte(image: Tensor) -> Tensor:
    """How much of a saturated blue studio backdrop a pixel holds, [B,3,H,W] -> [B,1,H,W] 0..1."""
    r, g, b = image.split(1, 1)
    matte = ((b - torch.maximum(r, g) - 0.12) / 0.16).clamp(0, 1)
    return (blur(matte, image.shape[-1] / 150) * 1.3 - 0.15).clamp(0, 1)


def has_blue_backdrop(image: Tensor) -> Tensor:
    """True where both upper corners are keyable, [B,3,H,W] -> [B] bool."""
    n = image.shape[-1] // 6
    m = blue_matte(image)[..., :n, :]
    return (m[..., :n].mean((1, 2, 3)) > 0.8) & (m[..., -n:].mean((1, 2, 3)) > 0.8)


def exchange_backdrop(image: Tensor, generator: torch.Generator) -> Tensor:
    """Put a random soft backdrop where the blue one was, and take the blue rim off the hair."""
    matte = blue_matte(image)
    n, _, h, w = image.shape
    coarse = torch.rand(n, 3, 3, 3, generator=generator).to(image)
    tint = torch.rand(n, 3, 1, 1, generator=generator).to(image)
    contrast = torch.rand(n, 1, 1, 1, generator=generator).to(image) * 0.5
    grey = tint.mean(1, keepdim=True)
    back = F.interpolate(
        grey + (tint - grey) * 0.4 + (coarse.mean(1, keepdim=True) - 0.5 + (coarse - 0.5) * 0.3) * contrast,
        (h, w),
        mode="bicubic",
    ).clamp(0, 1)
    r, g, b = image.split(1, 1)
    calm = torch.cat([r, g, torch.minimum(b, torch.maximum(r, g) * 1.05 + 0.02)], 1)
    fore = torch.lerp(image, calm, (matte * 4).clamp(0, 1))
    return torch.lerp(fore, back, matte)
