"""Head models behind one protocol: the open head and FLAME."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

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
    """

    name: str
    sizes: HeadSizes
    faces: Tensor
    uv: Tensor
    uv_faces: Tensor
    masks: dict[str, Tensor]
    light_mean: Tensor
    light_std: Tensor

    def verts(self, shape: Tensor, exp: Tensor, pose: Tensor) -> Tensor:
        """[B,S], [B,E], [B,P] -> vertices [B,V,3]."""

    def landmarks(self, verts: Tensor, pose: Tensor) -> Tensor:
        """68 landmarks [B,68,3] in iBUG order, the contour 0..16 on the silhouette."""

    def albedo(self, tex: Tensor) -> Tensor:
        """[B,T] -> texture [B,3,h,w] in display space, row 0 is v = 1."""

    def centre(self, verts: Tensor) -> Tensor:
        """Centre of the face [B,3] that edits of the pose keep in place."""

    def mean_code(self, batch: int, size: int | tuple[int, int]) -> FaceCode:
        """The mean face under the mean light, centred in a picture of this size."""

    def to(self, *args, **kwargs) -> HeadModel:
        """Move to a device."""
