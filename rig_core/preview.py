"""A fitted face as small pictures that a page can shade by itself (`web/js/light_ball.js`)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from . import buffers
from .face import FaceCode

FACE = 2.0  # side of the picture in heights of the face, brows to chin
UP = 0.33  # the middle of the picture above that of the face, in the same unit: the middle of the head


def head_sheet(head, code: FaceCode, size: int = 128) -> Tensor:
    """Normals, albedo and mask of the first face of `code`, one below the other: [3, 3 x size, size], 0..1.

    Normals as (n + 1) / 2, x right, y up, z to the viewer; the mask three times, soft at its edge and towards
    the foot of the picture. The head is in the middle and upright, as the crop of its fit has it.
    """
    code = framed(head, code[:1], 2 * size)
    b = buffers.render(head, code)
    cover = F.avg_pool2d(b.mask, 2)
    normal = F.normalize(F.avg_pool2d(b.normal, 2), dim=1)
    albedo = F.avg_pool2d(b.albedo, 2) / cover.clamp_min(1e-6)
    foot = torch.linspace(size / 12, 0, size).to(cover).clamp_max(1)[:, None]
    cover = cover * foot
    sheet = torch.cat([(normal + 1) / 2, albedo, cover.expand_as(normal)], 2)
    return sheet[0].clamp(0, 1)


def framed(head, code: FaceCode, size: int) -> FaceCode:
    """The faces with the head in the middle of square pictures of their own, size x size."""
    points = head.landmarks(head.verts(code.shape, code.exp, code.pose), code.pose)
    one = torch.eye(3).to(points).repeat(len(code), 1, 1)
    crop = code.replace(crop=one, size=(buffers.CROP, buffers.CROP))  # DECA's crop is the picture
    at = (buffers.to_image(points, crop)[..., :2] + 1) * (buffers.CROP / 2)
    low, high = at.amin(1), at.amax(1)
    face = (high - low).amax(1)
    middle = (low + high) / 2 - face[:, None] * face.new_tensor([0.0, UP])
    scale = FACE * face / size  # pixels of DECA's crop per new pixel
    one = one * scale[:, None, None]
    one[:, :2, 2] = middle - scale[:, None] * (size / 2)
    one[:, 2, 2] = 1
    return code.replace(crop=one, size=(size, size))
