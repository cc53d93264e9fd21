"""Head models behind one protocol: the open head and FLAME."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from ..face import FaceCode


@dataclass(frozen=True)
class HeadSizes:
    """Numbers of coefficients in a FaceCode of this head."""

    shape: int
    tex: int
    exp: int
    pose: int


class HeadModel(Protocol):
    """A linear head: coefficients -> vertices, landmarks and albedo.

    Convention: metres; x to the right of the picture (the subject's left), y up, z to the viewer.

    faces [F,3], uv [T,2] (0..1, v up), uv_faces [F,3]; masks: name -> [V] 0..1;
    light_mean, light_std [9,3]: the lights this head is used with (DECA's basis, display space).
    expressions [N,E]: row i is the `exp` of expression_names[i] at weight 1; N is 0 for a head without names.
    """

    name: str
    sizes: HeadSizes
    faces: Tensor
    uv: Tensor
    uv_faces: Tensor
    masks: dict[str, Tensor]
    light_mean: Tensor
    light_std: Tensor
    expression_names: list[str]
    expressions: Tensor

    landmark_vertices: Tensor

    def verts(self, shape: Tensor, exp: Tensor, pose: Tensor, index: Tensor | None = None) -> Tensor:
        """[B,S], [B,E], [B,P] -> vertices [B,V,3], or those of index [N] alone [B,N,3]."""

    def landmarks(self, verts: Tensor, pose: Tensor) -> Tensor:
        """68 landmarks [B,68,3] in iBUG order, the contour 0..16 on the silhouette.

        verts: all vertices, or only those of `landmark_vertices` [N].
        """

    def albedo(self, tex: Tensor) -> Tensor:
        """[B,T] -> texture [B,3,h,w] in display space, row 0 is v = 1."""

    def skin(self, tex: Tensor, texels: Tensor) -> Tensor:
        """The albedo at texels [B,N] (row * width + column) alone: [B,3,N]."""

    def centre(self, verts: Tensor) -> Tensor:
        """Centre of the face [B,3] that edits of the pose keep in place."""

    def mean_code(self, batch: int, size: int | tuple[int, int]) -> FaceCode:
        """The mean face under the mean light, centred in a picture of this size."""

    def to(self, *args, **kwargs) -> HeadModel:
        """Move to a device."""


class FaceModel(NamedTuple):
    """A head, and the network that reads its codes off photos (DECA for FLAME) where there is one."""

    head: HeadModel
    encoder: nn.Module | None = None


def face_centre(inner: Tensor) -> Tensor:
    """FFHQ's centre [B,3] of landmarks 17..67 [B,51,3]: a tenth of the way from the eyes to the mouth."""
    eyes = (inner[:, 19:25].mean(1) + inner[:, 25:31].mean(1)) / 2
    return eyes + 0.1 * ((inner[:, 31] + inner[:, 37]) / 2 - eyes)


def centred_code(head: HeadModel, inner: Tensor, batch: int, size: int | tuple[int, int]) -> FaceCode:
    """Zero coefficients and the mean light, with a camera that puts the face where FFHQ has it.

    inner [1,51,3]: landmarks 17..67 of the mean face. The eyes are a quarter of the picture apart;
    a picture that is not square holds the face in its middle square.
    """
    h, w = (size, size) if isinstance(size, int) else size
    side = min(h, w)
    apart = inner[0, 25:31, 0].mean() - inner[0, 19:25, 0].mean()
    centre = face_centre(inner)[0]
    k = 224 / side
    crop = [[k, 0, -k * (w - side) / 2], [0, k, -k * (h - side) / 2], [0, 0, 1]]
    return FaceCode(
        **{name: inner.new_zeros(batch, n) for name, n in vars(head.sizes).items()},
        cam=torch.stack([0.5 / apart, -centre[0], -centre[1]]).repeat(batch, 1),
        light=head.light_mean.repeat(batch, 1, 1),
        crop=inner.new_tensor(crop).repeat(batch, 1, 1),
        size=(h, w),
        head=head.name,
    )
