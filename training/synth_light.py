"""Light of the synthetic portraits: area lights and sky as many small directional lights, and their shadows.

Everything is linear. A light of colour c from direction d adds albedo * c * max(0, n.d): the 1/pi of
a Lambertian surface is inside c, so a surface that faces light 1 shows its albedo.
Convention: x right of the picture, y up, z to the viewer; directions point TO the light.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from rig_core import raster, sh
from rig_core.face import Batch

AREA = 12  # samples of the area lights of one portrait
SKY = 14  # directions of the surroundings


@dataclass(frozen=True)
class Lights(Batch):
    """One portrait's light as directional samples; the first AREA of them are the lamps, the rest the sky.

    direction [B,L,3] unit, to the light;  colour [B,L,3] linear;  key [B,3] direction of the main lamp
    """

    direction: Tensor
    colour: Tensor
    key: Tensor


def sphere(n: int) -> Tensor:
    """n directions spread evenly over the sphere (Fibonacci), [n,3]."""
    i = torch.arange(n, dtype=torch.float64) + 0.5
    y = 1 - 2 * i / n
    phi = i * math.pi * (3 - 5**0.5)
    r = (1 - y * y).sqrt()
    return torch.stack([r * phi.cos(), y, r * phi.sin()], -1).float()


def cone(direction: Tensor, radius: float, n: int) -> Tensor:
    """n directions on a disc of angular `radius` (radians) about `direction` [3]; [n,3]."""
    i = torch.arange(n, dtype=torch.float32) + 0.5
    r, phi = radius * (i / n).sqrt(), i * math.pi * (3 - 5**0.5)
    x, y = frame(direction[None])[0, :2]
    return F.normalize(
        direction + r[:, None].tan() * (phi.cos()[:, None] * x + phi.sin()[:, None] * y), dim=-1
    )


def frame(direction: Tensor) -> Tensor:
    """Rows x, y, z of an orthonormal frame with z = direction [...,3]; [...,3,3]."""
    up = torch.zeros_like(direction)
    steep = direction[..., 1].abs() > 0.9
    up[..., 1] = (~steep).to(up.dtype)
    up[..., 2] = steep.to(up.dtype)
    x = F.normalize(torch.linalg.cross(up, direction), dim=-1)
    return torch.stack([x, torch.linalg.cross(direction, x), direction], -2)


def irradiance_sh(lights: Lights) -> Tensor:
    """True unshadowed irradiance as [B,9,3] coefficients of `sh.basis`, linear.

    The basis has the clamped cosine's factors built in except for the constant's pi (FACTS of DECA's
    constants), so a directional light's coefficients are its real spherical harmonics, the first times pi.
    """
    scale = torch.tensor([math.pi] + [1 / (2 * math.pi / 3)] * 3 + [1 / (math.pi / 4)] * 5)
    y = sh.basis(lights.direction) * scale.to(lights.direction)
    return torch.einsum("blk,blc->bkc", y, lights.colour)


@dataclass(frozen=True)
class ShadowMaps:
    """Depth maps of one mesh from L directions. depth [B,L,s,s] along -direction, far where empty."""

    depth: Tensor
    frames: Tensor  # [B,L,3,3]
    centre: Tensor  # [B,3]
    radius: Tensor  # [B]


def shadow_maps(
    verts: Tensor, faces: Tensor, directions: Tensor, size: int, scope: tuple[Tensor, Tensor]
) -> ShadowMaps:
    """Depth maps of the mesh `verts` [B,V,3], `faces` [F,3] or [B,F,3] from `directions` [B,L,3].

    scope: centre [B,3] and radius [B] of the sphere that the maps cover.
    """
    b, n = directions.shape[:2]
    centre, radius = scope
    frames = frame(directions)
    p = torch.einsum("blij,bvj->blvi", frames, (verts - centre[:, None]) / radius[:, None, None])
    image = torch.stack([p[..., 0], -p[..., 1], 10 - p[..., 2]], -1).reshape(b * n, -1, 3)
    if faces.ndim == 3:
        faces = faces.repeat_interleave(n, 0)
    z = raster.rasterize(image, faces, (size, size)).zbuf
    z = torch.where(z < 0, torch.full_like(z, 1e3), z) - 10
    return ShadowMaps(z.reshape(b, n, size, size), frames, centre, radius)


def visibility(maps: ShadowMaps, points: Tensor, normals: Tensor, bias: float = 0.016) -> Tensor:
    """How much each point [B,N,3] sees of each direction: [B,L,N], 0 shadowed to 1 lit.

    Percentage-closer filtering over the 2x2 nearest texels; points are pushed out along their normals
    by `bias` (in units of the caster's radius) so that a surface does not shadow itself.
    """
    b, n, s, _ = maps.depth.shape
    p = (points - maps.centre[:, None]) / maps.radius[:, None, None] + normals * bias
    p = torch.einsum("blij,bvj->blvi", maps.frames, p)
    x, y = (p[..., 0] + 1) * s / 2 - 0.5, (1 - p[..., 1]) * s / 2 - 0.5
    z = -p[..., 2] - bias
    x0, y0 = x.floor(), y.floor()
    fx, fy = x - x0, y - y0
    flat = maps.depth.reshape(b * n, s * s)
    seen = torch.zeros_like(z)
    for dy in (0, 1):
        for dx in (0, 1):
            ix = (x0 + dx).clamp(0, s - 1).long()
            iy = (y0 + dy).clamp(0, s - 1).long()
            d = flat.gather(1, (iy * s + ix).reshape(b * n, -1)).reshape(z.shape)
            w = (fx if dx else 1 - fx) * (fy if dy else 1 - fy)
            seen += w * (d >= z)
    return seen


def diffuse(normals: Tensor, lights: Lights, seen: Tensor, wrap: Tensor) -> tuple[Tensor, Tensor]:
    """Diffuse light on skin-like surfaces, with and without cast shadows: two [B,N,3].

    wrap [B,N,3] per channel: how far light bleeds past the terminator (a cheap subsurface look);
    (n.d + w)_+^2 / (1 + w)^2 keeps the energy of the front. 0 is Lambert.
    """
    cos = torch.einsum("bnc,blc->bln", normals, lights.direction)
    lit, free = [], []
    for c in range(3):
        w = wrap[:, None, :, c]
        f = torch.where(w > 0, (cos + w).clamp_min(0) ** 2 / (1 + w) ** 2, cos.clamp_min(0))
        # the square narrows the lobe; keep as much of Lambert as the wrap leaves
        f = torch.lerp(cos.clamp_min(0), f, (w * 2).clamp(0, 1))
        colour = lights.colour[:, :, None, c]
        free.append((f * colour).sum(1))
        lit.append((f * colour * seen).sum(1))
    return torch.stack(lit, -1), torch.stack(free, -1)


def specular(normals: Tensor, lights: Lights, seen: Tensor, rough: Tensor, f0: Tensor) -> Tensor:
    """GGX highlights of the lamps (Walter et al. 2007, Schlick's Fresnel), viewer along +z: [B,N,3].

    rough [B,N] is alpha, f0 [B,N] the reflectance at normal incidence.
    """
    d = lights.direction
    half = F.normalize(d + d.new_tensor([0.0, 0.0, 1.0]), dim=-1)
    nl = torch.einsum("bnc,blc->bln", normals, d).clamp_min(0)
    nh = torch.einsum("bnc,blc->bln", normals, half).clamp(0, 1)
    nv = normals[..., 2].clamp_min(0.05)[:, None]
    a2 = (rough * rough)[:, None]
    ggx = a2 / (nh * nh * (a2 - 1) + 1).square()  # D without its 1/pi: it cancels the pi of our light unit
    smith = 0.5 / torch.lerp(2 * nl * nv, nl + nv, rough[:, None]).clamp_min(1e-3)
    vh = half[..., 2].clamp(0, 1)[:, :, None]
    fresnel = f0[:, None] + (1 - f0[:, None]) * (1 - vh) ** 5
    return torch.einsum("bln,blc->bnc", ggx * smith * fresnel * nl * seen, lights.colour)


def strands(
    tangent: Tensor, normals: Tensor, lights: Lights, seen: Tensor, gloss: Tensor
) -> tuple[Tensor, Tensor]:
    """Hair after Kajiya and Kay (1989): (diffuse light [B,N,3], highlight [B,N,3]).

    tangent [B,N,3] unit strand direction, gloss [B,N] exponent. The cylinder's sine is mixed with the
    shell's own normal, since a mass of hair shades like the surface that it forms.
    """
    d = lights.direction
    t = torch.einsum("bnc,blc->bln", tangent, d)
    sine = (1 - t * t).clamp_min(0).sqrt()
    cos = torch.einsum("bnc,blc->bln", normals, d)
    f = (0.35 * sine + 0.65) * (cos * 0.8 + 0.2).clamp_min(0) * seen
    soft = torch.einsum("bln,blc->bnc", f, lights.colour)
    tv = tangent[..., 2][:, None]
    h = (sine * (1 - tv * tv).clamp_min(0).sqrt() - t * tv).clamp_min(0)
    shine = h ** gloss[:, None] * (cos * 2 + 0.4).clamp(0, 1) * seen
    return soft, torch.einsum("bln,blc->bnc", shine, lights.colour)
