"""The light of a panorama on a face.

Convention: that of sh.py. Panoramas are equirectangular, twice as wide as high, the top row straight up.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from . import light_prior, sh
from .face import axis_angle_to_matrix
from .gain import to_linear

ENOUGH = (256, 512)  # px that nine coefficients can tell apart, many times over


def panorama_light(
    panorama: Tensor, yaw: float = 0.0, pitch: float = 0.0, behind: bool = False, srgb: bool = False
) -> Tensor:
    """Light of panoramas [B,3,h,w]: [B,9,3], linear. Give them on the CPU: MPS shrinks by whole factors only.

    yaw, pitch: degrees that the surroundings are turned by: what is in front of the sitter, at the camera,
    goes to the right of the picture (yaw > 0), then up (pitch > 0).
    behind: the centre of the panorama is what the camera sees behind the sitter, as it was taken from the
    camera's place; otherwise what the sitter sees in front, see sh.from_environment.
    srgb: display values; otherwise linear radiance, as high as the sun.
    Raises ValueError for a picture that is no panorama, and for one without light.
    """
    h, w = panorama.shape[2:]
    if not 1.9 <= w / h <= 2.1:
        raise ValueError(f"a panorama is twice as wide as high (equirectangular), this is {w} x {h} pixels")
    radiance = to_linear(panorama) if srgb else panorama
    if h > ENOUGH[0]:
        radiance = F.interpolate(radiance, ENOUGH, mode="area")
    light = sh.from_environment(radiance)
    if not (sh.luminance(light)[:, 0] > 0).all():
        raise ValueError("the panorama is black: it sheds no light")
    deg = torch.pi / 180
    up, turn = light.new_tensor([[-pitch * deg, 0, 0], [0, yaw * deg + torch.pi * behind, 0]])
    return sh.rotate(light, axis_angle_to_matrix(up) @ axis_angle_to_matrix(turn))


def surround(linear: Tensor, exposure: float = 0.0, light: Tensor | None = None, mean=None, std=None):
    """A linear light [B,9,3] in display space, `exposure` stops brighter: [B,9,3].

    light [B,9,3] of the photo with mean and std [9,3], the light prior of its head: the result lies in the
    model's range (light_prior.fit_to_prior), and exposure counts from the photo's own level, whatever the
    panorama's scale. Without them it is the physical light.
    """
    even = sh.encode_light(linear)
    target = even * 2 ** (exposure / 2.2)
    if light is None:
        return target
    return light_prior.fit_to_prior(light, target, sh.luminance(even)[:, :1, None], mean, std)
