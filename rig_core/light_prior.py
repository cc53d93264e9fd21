"""A light for a model: what a user asks for, brought into the distribution of lights that a model knows.

Estimated lights are not physical directions (DECA's have a dark centre and a bright rim), so a control must
map the wanted direction into the light prior of the head in use: its mean and standard deviation, [9,3] each.
Convention: that of sh.py; angles as in sh.from_angles.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from . import sh

DECA_MEAN = (3.65, 0.13, 0.14, -0.38, -0.02, -0.11, 0.16, 0.19, 0.25)
DECA_STD = (0.33, 0.32, 0.12, 0.12, 0.21, 0.21, 0.31, 0.27, 0.22)


class Preset(NamedTuple):
    """Angles in degrees as in from_angles, the rest as in from_direction."""

    azimuth: float
    elevation: float
    softness: float = 0.1
    intensity: float = 1.0
    ambient: float = 0.25
    colour: tuple[float, float, float] = (1.0, 1.0, 1.0)


PRESETS = {
    "rembrandt": Preset(45, 40, 0.1, 1.2, 0.15),
    "butterfly": Preset(0, 50, 0.15, 1.1, 0.2),
    "split left": Preset(-90, 5, 0.05, 1.3, 0.1),
    "split right": Preset(90, 5, 0.05, 1.3, 0.1),
    "rim": Preset(150, 30, 0.05, 1.6, 0.15),
    "overcast": Preset(0, 80, 1.0, 0.8, 0.5, (0.95, 1.0, 1.05)),
    "golden hour": Preset(65, 12, 0.05, 1.2, 0.2, (1.0, 0.72, 0.42)),
    "candle from below": Preset(15, -45, 0.2, 1.0, 0.06, (1.0, 0.6, 0.28)),
}


def _bounded(base: Tensor, wanted: Tensor, std: Tensor, z_max: float, floor: float) -> Tensor:
    """base + wanted [B,9,3], wanted shrunk: each band to |z| <= z_max, then all until shading >= floor.

    One factor for a whole band keeps direction and colour. The face: normals within 90 degrees of the viewer.
    """
    z = wanted.abs() / std
    band1 = (z_max / z[:, 1:4].amax((1, 2), keepdim=True).clamp_min(1e-6)).clamp_max(1)
    band2 = (z_max / z[:, 4:].amax((1, 2), keepdim=True).clamp_min(1e-6)).clamp_max(1)
    wanted = torch.cat(
        [wanted[:, :1], band1 * wanted[:, 1:4], torch.minimum(band1, band2) * wanted[:, 4:]], 1
    )
    sphere = sh.constant_like(sh.fibonacci(512), wanted)
    visible = sh.basis(sphere[sphere[:, 2] >= 0])
    room, change = visible @ base - floor, visible @ wanted
    share = torch.where(change < 0, room.clamp_min(0) / (-change).clamp_min(1e-9), torch.ones_like(change))
    return base + share.amin((1, 2), keepdim=True).clamp(0, 1) * wanted


def _base(constant: Tensor, mean: Tensor, std: Tensor, z_max: float) -> Tensor:
    """The prior's mean with a constant term [B,1,3] within z_max of its own; hue goes before level."""
    constant = constant.clamp_min(1e-3)
    low, high = (mean[:1] - z_max * std[:1]).clamp_min(1e-3), mean[:1] + z_max * std[:1]
    least, most = (low / constant).amax(2, keepdim=True), (high / constant).amin(2, keepdim=True)
    level = torch.where(least > most, (least * most).sqrt(), torch.minimum(most, least.clamp_min(1)))
    constant = torch.minimum(torch.maximum(constant * level, low), high)
    return torch.cat([constant, mean[1:].expand(len(constant), 8, 3)], 1)


def _prior(light: Tensor, mean: Tensor, std: Tensor) -> tuple[Tensor, Tensor]:
    mean, std = (torch.as_tensor(m).to(light) for m in (mean, std))
    if mean.shape != (9, 3) or std.shape != (9, 3) or not (std > 0).all() or not (mean[0] > 0).all():
        raise ValueError(
            "a light prior is a mean [9,3] with a positive constant term and a std [9,3] above 0"
        )
    return mean, std


def aim(
    light: Tensor,
    direction: Tensor,
    strength,
    mean,
    std,
    z_max: float = 2.5,
    softness=0.0,
    floor: float = 0.03,
):
    """Light from a direction, as the model that learned the prior knows it: [B,9,3].

    light     [B,9,3] of the photo: its constant terms (level and colour) stay, within z_max of the prior
    direction [B,3] towards the source
    strength  0..1 or [B]: share of z_max that the directional part may use; 0 is the prior's flat light
    mean, std [9,3] of the model's own lights (a head's light_mean, light_std)
    Convention: estimated lights are not physical (DECA's have a dark centre and a bright rim), so the lamp's
    bands 1 and 2 are ADDED to the prior's mean, as far as their z-scores stay below z_max and shading on
    visible normals stays above floor.
    """
    sh.check_light(light)
    mean, std = _prior(light, mean, std)
    d = sh.unit_directions(direction.to(light)).expand(len(light), 3)
    lamp = sh.from_direction(d, softness=softness) / sh.from_direction(d)[:, 1:4].abs().amax(
        (1, 2), keepdim=True
    )
    lamp = torch.cat([torch.zeros_like(lamp[:, :1]), lamp[:, 1:]], 1)
    full = _bounded(torch.zeros_like(lamp), 1e3 * lamp, std, z_max, floor=-1e9)
    strength = torch.as_tensor(strength, dtype=light.dtype, device=light.device).clamp(0, 1).reshape(-1, 1, 1)
    base = _base(light[:, :1], mean, std, z_max)
    return _bounded(base, strength * full, std, z_max, floor)


def edit(
    light: Tensor,
    azimuth,
    elevation,
    intensity=1.0,
    ambient=0.25,
    colour=(1.0, 1.0, 1.0),
    softness=0.1,
    mean: Tensor | None = None,
    std: Tensor | None = None,
    raw: bool = False,
    z_max: float = 2.5,
) -> Tensor:
    """The light of a lamp and a fill, put where the user drags it: [B,9,3] in display space.

    light     [B,9,3] of the photo, sets level and colour (not with raw)
    azimuth, elevation  degrees, numbers or [B], see from_angles
    intensity, ambient, colour, softness  physical, linear, see from_direction
    mean, std [9,3] the light prior of the head; without, or with raw, the physical light comes back
    Convention: the physical light is encoded to display space. Its contrast (bands 1 and 2 over the
    constant) is brought into the prior as in `aim`, and its level, against intensity 1 and ambient 0.25,
    scales the photo's.
    """
    sh.check_light(light)
    angles = (
        torch.as_tensor(v, dtype=light.dtype, device=light.device).reshape(-1) for v in (azimuth, elevation)
    )
    d = sh.from_angles(*(a.expand(len(light)) for a in angles))
    target = sh.encode_light(sh.from_direction(d, intensity, colour, softness, ambient))
    if raw or mean is None or std is None:
        return target
    reference = sh.encode_light(sh.from_direction(d, 1.0, softness=softness, ambient=0.25))[:, :1]
    return fit_to_prior(light, target, reference, mean, std, z_max)


def fit_to_prior(light: Tensor, target: Tensor, reference: Tensor, mean, std, z_max: float = 2.5) -> Tensor:
    """A physical light as the model that learned the prior knows it: [B,9,3].

    light     [B,9,3] of the photo, sets level and colour
    target    [B,9,3], the wanted light in display space
    reference [B,1,1] or [B,1,3], the constant term of target at which the photo's level stays
    mean, std [9,3] of the model's own lights
    Convention: contrast and colour of the target's bands 1 and 2 over its constant are added to the prior's
    mean, within z_max as in `aim`.
    """
    mean, std = _prior(light, mean, std)
    base = _base(light[:, :1] * target[:, :1] / reference, mean, std, z_max)
    grey = sh.luminance(target)[:, :1, None]
    contrast = target / grey * sh.luminance(base)[:, :1, None]
    return _bounded(base, torch.cat([torch.zeros_like(base[:, :1]), contrast[:, 1:]], 1), std, z_max, 0.03)


def preset(light: Tensor, name: str, intensity=1.0, mirror=False, mean=None, std=None) -> Tensor:
    """A light of PRESETS for photos' lights [B,9,3], see `edit`: [B,9,3]; physical without mean and std.

    intensity: times the preset's own. mirror: left and right exchanged. Raises ValueError for another name.
    """
    if name not in PRESETS:
        raise ValueError(f"there is no light '{name}', only {', '.join(PRESETS)}")
    p = PRESETS[name]
    azimuth = -p.azimuth if mirror else p.azimuth
    lamp = p.intensity * intensity, p.ambient, p.colour, p.softness
    return edit(light, azimuth, p.elevation, *lamp, mean=mean, std=std)


def orbit(light: Tensor, n: int, start=-180.0, arc=360.0, elevation=15.0, **lamp) -> Tensor:
    """n lights [n,9,3] of a lamp that goes around the head, for the photo's light [1,9,3].

    start, arc in degrees of azimuth as in from_angles; arc > 0 goes from the camera to the right of the
    picture. A full circle (360) ends one step before its start, so that the sequence can be repeated; a
    shorter arc reaches its end. Raises ValueError for more than one face.
    lamp: intensity, ambient, colour, softness, mean, std, raw of `edit`.
    """
    if n < 1 or len(light) != 1:
        raise ValueError(f"an orbit is of at least one light around one face, got {n} around {len(light)}")
    steps = n if abs(arc) == 360 else max(n - 1, 1)
    azimuth = start + arc * torch.arange(n, dtype=light.dtype, device=light.device) / steps
    return edit(light.expand(n, -1, -1), azimuth, elevation, **lamp)


def ball(light: Tensor, size: int = 128) -> Tensor:
    """A grey ball under lights [B,9,3] on black, [B,3,size,size]; not clipped."""
    at = (torch.arange(size, device=light.device) * 2 + 1) / size - 1
    y, x = torch.meshgrid(-at, at, indexing="ij")
    z = (1 - x * x - y * y).clamp_min(0).sqrt()
    return sh.shade(torch.stack([x, y, z])[None], light) * (z > 0) * 0.5
