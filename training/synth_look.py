"""Surfaces of the synthetic portraits: colour, relief and gloss of skin, eyes, cloth and hair by the point.

Points of ONE portrait: q [N,3] canonical positions (see synth_mesh), colours linear RGB [N,3].
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from .synth_mesh import CLOTH, EYE, FRAME, MOUTH, SKIN, TEETH
from .synth_scene import Person, Scene, linear
from .synth_style import AXIS, blob, growth, smooth


@dataclass(frozen=True)
class Surface:
    """albedo [N,3] linear; relief [N] height in eye distances; rough [N] GGX alpha; f0 [N]; wrap [N,3];
    occlusion [N] of all light;

    fill [N]: share of blocked light that comes through all the same (lips let light onto the teeth).
    """

    albedo: Tensor
    relief: Tensor
    rough: Tensor
    f0: Tensor
    wrap: Tensor
    occlusion: Tensor
    fill: Tensor


def tile(texture: Tensor, u: Tensor, v: Tensor) -> Tensor:
    """Bilinear look-up of a tileable texture [n,n]; u, v [N] in tiles."""
    n = texture.shape[-1]
    x, y = u * n, v * n
    x0, y0 = x.floor(), y.floor()
    fx, fy = x - x0, y - y0
    i, j = x0.long() % n, y0.long() % n
    i1, j1 = (i + 1) % n, (j + 1) % n
    flat = texture.reshape(-1)
    top = torch.lerp(flat[j * n + i], flat[j * n + i1], fx)
    return torch.lerp(top, torch.lerp(flat[j1 * n + i], flat[j1 * n + i1], fx), fy)


def blend(a: Tensor, b: Tensor, w: Tensor) -> Tensor:
    """lerp with a weight [N] for colours [N,3]; b may be one colour [3]."""
    return a + (b - a) * w[:, None]


def _segment(x: Tensor, y: Tensor, a: tuple, b: tuple) -> Tensor:
    """Distance to the line a-b, [N]."""
    dx, dy = b[0] - a[0], b[1] - a[1]
    t = (((x - a[0]) * dx + (y - a[1]) * dy) / (dx * dx + dy * dy)).clamp(0, 1)
    return ((x - a[0] - t * dx) ** 2 + (y - a[1] - t * dy) ** 2).sqrt()


def wrinkles(q: Tensor, wobble: Tensor, age: float, smile: float) -> Tensor:
    """Depth of the folds of age [N]: forehead, crow's feet, nose to mouth, below the eyes, at the brows."""
    x, y = q[:, 0].abs(), q[:, 1] + 0.025 * wobble
    front = smooth(q[:, 2], -0.75, -0.3)
    fold = torch.exp(-((_segment(x, y, (0.27, -0.62), (0.52, -1.0)) / 0.035) ** 2)) * (0.45 + 0.3 * smile)
    bag = ((x - 0.48) ** 2 / 1.3 + (y - 0.03) ** 2).sqrt()
    bag = torch.exp(-(((bag - 0.25) / 0.035) ** 2)) * smooth(-y, 0.05, 0.2) * 0.6
    lines = torch.cos(2 * math.pi * (y + 0.12 * x * x) / 0.135).clamp_min(0) ** 4
    brow = lines * smooth(y, 0.55, 0.7) * (1 - smooth(y, 0.95, 1.1)) * (1 - smooth(x, 0.4, 0.75)) * 0.7
    angle = torch.atan2(y + 0.02, x - 0.55)
    far = ((x - 0.55) ** 2 + y * y).sqrt()
    crow = (
        torch.cos(angle * 9).clamp_min(0) ** 3
        * smooth(far, 0.22, 0.3)
        * (1 - smooth(far, 0.36, 0.5))
        * smooth(x, 0.7, 0.8)
        * 0.6
    )
    frown = torch.exp(-((_segment(x, y, (0.085, 0.2), (0.1, 0.42)) / 0.02) ** 2)) * 0.5
    jowl = torch.exp(-((_segment(x, y, (0.43, -1.15), (0.47, -1.45)) / 0.05) ** 2)) * 0.5
    late = smooth(torch.tensor(age), 0.35, 1.0)
    return front * ((fold + jowl) * max(0.12, age) + (bag + brow + crow + frown) * late.item())


def skin(
    q: Tensor,
    texture: Tensor,
    maps: dict[str, Tensor],
    lash: Tensor,
    person: Person,
    bare: Tensor,
    smile: float,
) -> Surface:
    """Skin, lips and brows. texture [N,3] the head's own albedo (linear), bare [3] the colour of bare skin,
    lash [N] 1 at the margins of the lids."""
    p = {k: v[0] for k, v in vars(person).items()}
    u, v = torch.atan2(q[:, 0], q[:, 2] - AXIS[2].item()) * 0.6, q[:, 1] * 0.5
    fine, coarse = tile(p["grain"][0], u, v), tile(p["grain"][1], u * 0.35, v * 0.35)
    spots = tile(p["grain"][2], u * 1.7, v * 1.7)
    age, lips = p["age"].item(), maps["lips"]
    cheeks, nose = blob(q, 0.66, -0.5, 0.32, 0.32), blob(q, 0.0, -0.45, 0.22, 0.25)
    colour = blend(texture, bare, maps["scalp"])  # the hair is a mesh of its own
    dark = (1 - bare.mean() * 1.6).clamp(0, 1)
    red = torch.tensor([0.02, 0.10, 0.08], device=q.device)
    colour = colour * torch.exp(
        p["blotches"] * (0.03 * coarse[:, None] * (1 - red * 4) - red * coarse[:, None] * 0.5)
    )
    colour = colour * torch.exp(0.022 * fine * (1 + age))[:, None]
    speckle = smooth(spots, 1.2 - 0.4 * p["freckles"], 2.0) * p["freckles"] * (0.3 + cheeks + nose)
    speckle = speckle + smooth(spots, 2.3, 2.8) * age * 0.45
    colour = colour * torch.exp(-speckle[:, None] * torch.tensor([0.25, 0.5, 0.62], device=q.device))
    folds = wrinkles(q, fine, age, smile)
    colour = colour * (1 - 0.22 * folds)[:, None]
    # make-up
    blush = cheeks * p["blush"]
    colour = colour * torch.exp(-blush[:, None] * torch.tensor([0.05, 0.45, 0.3], device=q.device))
    colour = blend(colour, p["lipstick"][:3], lips * p["lipstick"][3] * 0.8)
    lid = maps["sockets"] * smooth(q[:, 1], 0.0, 0.06) * (1 - maps["brows"]) * p["eyeshadow"][3]
    colour = blend(colour, p["eyeshadow"][:3] * bare.mean().sqrt(), (1.2 * lid).clamp(0, 0.8))
    upper = smooth(q[:, 1], -0.05, 0.02)
    liner = lash * (0.25 + 0.5 * upper + 0.35 * (p["lipstick"][3] > 0) * upper)
    colour = blend(colour, torch.full((3,), 0.01, device=q.device), liner.clamp(0, 0.9))
    shade = smooth(fine, -1.0, 1.5) * maps["beard"] * p["stubble"]
    colour = blend(colour, torch.minimum(p["hair_colour"] * 1.2, colour.amin(0)), 0.45 * shade)
    gloss = (p["oil"] * (0.75 + 0.5 * nose - 0.3 * maps["beard"] + 0.25 * smooth(q[:, 1], 0.5, 1.0))).clamp(
        0.2, 2.5
    )
    gloss = gloss * torch.exp(0.15 * fine)
    rough = torch.lerp(
        p["rough"].expand_as(lips), torch.full_like(lips, 0.22), lips * (0.4 + 0.5 * p["lipstick"][3])
    )
    relief = 0.0008 * fine * (0.6 + age) - 0.012 * folds
    relief = relief + 0.006 * lips * torch.cos(q[:, 0] * 90 + 2 * fine) * 0.4
    wrap = torch.tensor([0.24, 0.10, 0.06], device=q.device) * (1 - 0.6 * dark)
    return Surface(colour, relief, rough, 0.042 * gloss, wrap.expand_as(q), torch.ones_like(lips), 0 * lips)


def _cloth(q: Tensor, person: Person, scene: Scene) -> Tensor:
    """Jacket, shirt and tie painted on the bust [N,3]; q about the base of the neck."""
    x, y, front = q[:, 0].abs(), q[:, 1], smooth(q[:, 2], 0.1, 0.3)
    jacket, shirt, tie = scene.cloth[0]
    weave = tile(scene.weave[0, 0], q[:, 0] * 0.8 + q[:, 2] * 0.3, q[:, 1] * 0.8)
    deep = scene.neckline[0]
    inside = smooth((y + deep * 1.1) * 0.62 + 0.06 - x, -0.02, 0.02) * front * (deep > 0)
    colour = blend(jacket.expand(len(q), 3), shirt, inside)
    lapel = (
        smooth(0.22 - (x - (y + deep * 1.1) * 0.62 - 0.06), -0.02, 0.02) * (1 - inside) * front * (deep > 0)
    )
    colour = colour * (1 - 0.25 * lapel)[:, None]
    band = smooth(q[:, 1], 0.05, 0.12) * scene.collar[0]
    colour = blend(colour, shirt, band)
    knot = (
        smooth((0.16 + 0.03 * (-y)).clamp(0.1, 0.3) - x, -0.015, 0.015) * front * inside.ceil() * scene.tie[0]
    )
    stripes = 1 + 0.35 * torch.sin((q[:, 0] + y) * 22)
    colour = blend(colour, tie, 0.0 * knot)
    colour = torch.lerp(colour, tie * stripes[:, None], knot[:, None])
    return colour * torch.exp(0.06 * weave)[:, None]


def opaque(
    material: Tensor,
    q: Tensor,
    texture: Tensor,
    maps: dict[str, Tensor],
    lash: Tensor,
    person: Person,
    scene: Scene,
    bare: Tensor,
    smile: float,
) -> Surface:
    """Everything but hair: one Surface over points of all materials [N]."""
    s = skin(q, texture, maps, lash, person, bare, smile)
    is_eye, is_cloth, is_frame = material == EYE, material == CLOTH, material == FRAME
    wet = (material == MOUTH) | (material == TEETH)
    painted = {EYE: texture, TEETH: texture * 0.9, MOUTH: texture * 0.6, CLOTH: _cloth(q, person, scene)}
    painted[FRAME] = person.glasses[0, 1:4].expand_as(texture)
    colour = s.albedo
    for k, c in painted.items():
        colour = torch.where((material == k)[:, None], c, colour)

    def pick(base, eye, cloth, frame, wet_):
        x = torch.where(is_eye, eye, base)
        x = torch.where(is_cloth, cloth, x)
        x = torch.where(is_frame, frame, x)
        return torch.where(wet, wet_, x)

    plain = material != SKIN
    lid_shade = 1 - 0.45 * smooth(q[:, 1], -0.02, 0.09)
    return Surface(
        colour,
        torch.where(plain, torch.zeros_like(s.relief), s.relief),
        pick(s.rough, 0.09, 0.7, 0.18, 0.15),
        pick(s.f0, 0.035, 0.01, 0.08, 0.035),
        torch.where(plain[:, None], torch.where(is_eye[:, None], 0.1, 0.0).expand_as(s.wrap), s.wrap),
        torch.where(is_eye, lid_shade, torch.where(wet, 0.8, 1.0)),
        torch.where(material == TEETH, 0.5, 0.0),
    )


# --- hair ---


@dataclass(frozen=True)
class Hair:
    """albedo [N,3], alpha [N], tangent [N,3] in canonical space, gloss [N] exponent, shine [N,3]."""

    albedo: Tensor
    alpha: Tensor
    tangent: Tensor
    gloss: Tensor
    shine: Tensor


def hair(q: Tensor, hanging: Tensor, beard: Tensor, facing: Tensor, person: Person) -> Hair:
    """Strands. hanging [N,4] (see synth_style.curtain), beard [N], facing [N] z of the shell's normal."""
    p = {k: v[0] for k, v in vars(person).items()}
    grain, curl, hung = p["grain"], p["curl"], hanging[:, 2]
    pole = p["parting"]
    e1 = F.normalize(torch.linalg.cross(pole, pole.new_tensor([1.0, 0.2, 0.1])), dim=0)
    e2 = torch.linalg.cross(pole, e1)
    d = F.normalize(q - AXIS.to(q), dim=-1)
    around, polar = torch.atan2(d @ e1, d @ e2), torch.acos((d @ pole).clamp(-0.999, 0.999))
    circle = p["sideways"] > 0
    across, along = torch.where(circle, polar, around), torch.where(circle, around, polar)
    whiskers = beard * smooth(-q[:, 1], 0.3, 0.6)
    across = torch.lerp(torch.where(hung > 0.5, hanging[:, 0], across), q[:, 0] * 1.5, whiskers)
    along = torch.lerp(torch.where(hung > 0.5, -hanging[:, 1] * 0.6, along), q[:, 1], whiskers)
    bend = tile(grain[3], across * 0.3, along * 0.3)
    across = across + (0.06 + 0.2 * curl * curl) * bend
    stretch = 0.05 + 0.5 * curl.clamp(0.1, 1.0) ** 2
    fine = tile(grain[0], across * 1.1, along * stretch)
    broad = tile(grain[1], across * 0.4, along * stretch * 0.5)
    lock = 0.6 * fine + 0.7 * broad
    edge = growth(q[None], beard[None], hung[None], person, jitter=0.05 * fine)[0]
    soft = torch.where(whiskers > 0.5, torch.full_like(edge, 0.10), 0.06 + 0.12 * (p["volume"] < 0.05))
    alpha = smooth(edge + 0.05 * lock, -soft * 0.4, soft)
    cover = torch.where(p["volume"] < 0.05, 0.62 + 0.12 * fine, torch.ones_like(fine))
    length = p["beard"][0]
    cover = torch.where(whiskers > 0.3, smooth(fine * 0.35 + 3 + 30 * length, 2.2, 4.2) * 0.9, cover)
    tips = smooth(hanging[:, 1] + p["length"] + 0.12 * lock, 0.0, 0.35)
    tips = tips * smooth(0.95 - hanging[:, 1] + 0.1 * lock, 0.0, 0.3)  # its root lies under the shell
    tips = tips * smooth(hanging[:, 3] + 0.015 * lock, 0.0, 0.05)
    alpha = alpha * torch.where(hung > 0.5, tips, torch.ones_like(tips))
    rim = smooth(facing.abs() + 0.10 * lock, 0.02, 0.30)
    alpha = (alpha * cover.clamp(0, 1) * torch.where(whiskers > 0.5, torch.ones_like(rim), rim)).clamp(0, 1)
    colour = p["hair_colour"] * torch.exp(0.38 * lock.clamp(-2, 2) - 0.12)[:, None]
    deep = smooth(edge, -0.05, 0.35)
    colour = colour * (1.0 - 0.25 * (1 - deep) * (hung < 0.5))[:, None]
    side = torch.linalg.cross(pole.expand_as(d), d)
    tangent = F.normalize(torch.where(circle, side, torch.linalg.cross(d, side)), dim=-1)
    down = q.new_tensor([0.0, -1.0, 0.0])
    tangent = torch.where((hung > 0.5)[:, None] | (whiskers > 0.5)[:, None], down, tangent)
    tangent = F.normalize(tangent + (0.12 + 0.5 * curl) * (0.6 * fine + 0.4 * bend)[:, None] * e1, dim=-1)
    gloss = torch.full_like(fine, 24.0) / (1 + 2 * curl)
    strength = 0.10 * (1 - 0.7 * curl) * torch.exp(0.35 * fine) * (1 - 0.7 * whiskers)
    shine = strength[:, None] * torch.lerp(
        torch.full((3,), 0.5, device=q.device), p["hair_colour"] * 1.6, 0.5
    )
    return Hair(colour, alpha, tangent, gloss, shine)


def bare_skin(texture: Tensor, cheek_map: Tensor) -> Tensor:
    """Mean colour of the cheeks [3], linear, of the texture [1,3,h,w] in display space."""
    w = cheek_map / cheek_map.sum()
    return linear((texture * w).sum((0, 2, 3)))
