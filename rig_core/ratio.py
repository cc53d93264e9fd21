"""The analytic relight: the photo times new over old shading (Shashua and Riklin-Raviv 2001).

Exact for a matt surface whose shape is known; cast shadows, highlights and all that the fit misses stay as
they were. It serves as a start for the denoiser, and as a yardstick.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import buffers, sh
from .face import FaceCode
from .warp import blur, spread

FRONT = 0.05  # normals whose z is below lie on the silhouette, where a fit is least sure
REACH = 0.25  # of the width: how far the gain goes on into hair and neck
SHARP = 0.7  # share of the gain that is not blurred over some two pixels of 128


def ratio_image(head, image: Tensor, code: FaceCode, light: Tensor, matte: Tensor) -> Tensor:
    """Portraits [N or 1,3,s,s] 0..1 under N lights [N,9,3] in display space -> [N,3,s,s] 0..1.

    code: one face in the frame of the image. matte [1,1,s,s]: face, neck and hair. On the fitted head the
    gain is the ratio of shadings; over the rest of the matte it goes on smoothly.
    """
    code.require_head(head)
    sh.check_light(light)
    fragments, normal, _ = buffers.geometry(head, code, tuple(image.shape[2:]))
    mask = fragments.mask.to(normal)
    n = len(light)
    new = sh.shade(normal.expand(n, -1, -1, -1), light).clamp_min(0.02)
    old = sh.shade(normal, code.light).clamp_min(0.1)
    gain = (new / old).clamp(0.05, 4).log() * mask
    gain = spread(gain, (mask * (normal[:, 2:] > FRONT)).expand(n, -1, -1, -1), REACH)
    gain = gain * torch.maximum(mask, matte)
    gain = torch.lerp(blur(gain, image.shape[-1] / 70), gain, SHARP)
    return (image * gain.exp()).clamp(0, 1)
