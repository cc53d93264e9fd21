"""The values that flow from photo to photo: FaceCode and Buffers.

All are frozen dataclasses of batch-first tensors. `Batch` gives them `.to`, `.replace`,
indexing, `len` and `lerp`; nothing here knows a head model or a picture.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


class Batch:
    """Mixin of the frozen dataclasses below: every Tensor field is batch first, the rest is shared."""

    def _map(self, f):
        return dataclasses.replace(self, **{n: f(v) for n, v in vars(self).items() if isinstance(v, Tensor)})

    def to(self, *args, **kwargs):
        """Move or cast every tensor, as Tensor.to does."""
        return self._map(lambda v: v.to(*args, **kwargs))

    def replace(self, **fields):
        """A copy with some fields exchanged."""
        return dataclasses.replace(self, **fields)

    def __len__(self) -> int:
        return next(len(v) for v in vars(self).values() if isinstance(v, Tensor))

    def __getitem__(self, index):
        """Select faces. An int keeps the batch axis: code[2] is a batch of one."""
        if isinstance(index, int):
            n = len(self)
            if not -n <= index < n:
                raise IndexError(f"{type(self).__name__} holds {n} faces, there is no face {index}")
            index = slice(index % n, index % n + 1)
        return self._map(lambda v: v[index])

    def expand(self, n: int):
        """Repeat a batch of one n times; a batch of n stays as it is."""
        if len(self) == n:
            return self
        if len(self) != 1:
            raise ValueError(f"{type(self).__name__} holds {len(self)} faces, wanted 1 or {n}")
        return self._map(lambda v: v.expand(n, *v.shape[1:]))


@dataclass(frozen=True)
class FaceCode(Batch):
    """A face as 3D morphable model parameters, DECA's layout. B faces of one picture size.

    Convention: x to the right of the picture, y up, z to the viewer, for model space and light;
    angles are radians, rotations axis-angle. The size of shape, tex, exp and pose follows the head.

    shape [B,S]   identity
    tex   [B,T]   albedo
    exp   [B,E]   expression
    pose  [B,6+]  global rotation (3), jaw (3); the open head adds gaze yaw and pitch (2)
    cam   [B,3]   orthographic: scale, tx, ty; xy = scale * (xy + t) in the crop's [-1, 1]
    light [B,9,3] spherical harmonics in DECA's basis and scale (see sh.py), per colour channel
    crop  [B,3,3] photo pixels -> pixels of the 224 crop, column vectors (x, y, 1)
    size  (H, W)  of the photo in pixels
    head  name of the head model the numbers belong to: "flame" or "open"
    """

    shape: Tensor
    tex: Tensor
    exp: Tensor
    pose: Tensor
    cam: Tensor
    light: Tensor
    crop: Tensor
    size: tuple[int, int]
    head: str

    @property
    def sizes(self) -> dict[str, int]:
        """How many numbers of each kind the head's model has."""
        return {n: getattr(self, n).shape[1] for n in ("shape", "tex", "exp", "pose")}

    def require_head(self, head, name: str = "face_code") -> None:
        """Raise ValueError unless the code fits a HeadModel. name: of the input, for the error."""
        self._require(head.name, vars(head.sizes), name)

    def _require(self, head: str, sizes: dict[str, int], name: str = "face_code") -> None:
        if self.head != head:
            raise ValueError(
                f"'{name}' belongs to the '{self.head}' head, but the '{head}' head was given: use one Load "
                "Face Model for fitting, editing and rendering"
            )
        for part, n in self.sizes.items():
            if n != sizes[part]:
                raise ValueError(
                    f"'{name}' has {n} numbers of '{part}', this '{head}' head has {sizes[part]}: it was "
                    "made with another file, or edited; Load Face with 'face_model' checks it"
                )

    def resized(self, size: tuple[int, int]) -> FaceCode:
        """The same face in the same picture at another resolution: image space stays put.

        Convention: buffers.to_image divides pixels by the size, so the crop is scaled and not shifted.
        """
        sy, sx = self.size[0] / size[0], self.size[1] / size[1]
        return self.replace(crop=self.crop * self.crop.new_tensor([sx, sy, 1.0]), size=size)


def lerp(a: FaceCode, b: FaceCode, w: Tensor | float) -> FaceCode:
    """Interpolate shape, tex, exp, cam and light linearly, rotations along the shorter arc.

    w: a number or [B]; 0 gives a, 1 gives b. Crop and size are a's.
    Raises ValueError when the two codes belong to different heads.
    """
    b._require(a.head, a.sizes)
    w = torch.as_tensor(w, dtype=a.shape.dtype, device=a.shape.device).reshape(-1)
    n = max(len(a), len(b), len(w))
    a, b, w = a.expand(n), b.expand(n), w.expand(n)

    def mix(x: Tensor, y: Tensor) -> Tensor:
        return torch.lerp(x, y, w.reshape(-1, *[1] * (x.ndim - 1)))

    pose = mix(a.pose, b.pose)
    for i in (0, 3):
        pose[:, i : i + 3] = slerp(a.pose[:, i : i + 3], b.pose[:, i : i + 3], w)
    return a.replace(
        shape=mix(a.shape, b.shape),
        tex=mix(a.tex, b.tex),
        exp=mix(a.exp, b.exp),
        pose=pose,
        cam=mix(a.cam, b.cam),
        light=mix(a.light, b.light),
    )


def cat(codes: list[FaceCode]) -> FaceCode:
    """Join batches of one head and one picture size. Raises ValueError when they differ."""
    if not codes:
        raise ValueError("no face codes to join")
    for c in codes[1:]:
        c._require(codes[0].head, codes[0].sizes)
        if c.size != codes[0].size:
            raise ValueError(f"face codes of pictures of {codes[0].size} and {c.size} cannot be one batch")
    names = [n for n, v in vars(codes[0]).items() if isinstance(v, Tensor)]
    return codes[0].replace(**{n: torch.cat([getattr(c, n) for c in codes]) for n in names})


@dataclass(frozen=True)
class Buffers(Batch):
    """What a face looks like without a photo: NCHW pictures of one size, 0 outside the head.

    rendered [B,3,H,W] albedo x shading, about 0..1, unclipped
    normal   [B,3,H,W] -1..1, x right, y up, z to the viewer (interpolated, not renormalised)
    albedo   [B,3,H,W] 0..1
    shading  [B,3,H,W] SH light on the normals, about 0..2, not masked (as DECA renders it)
    mask     [B,1,H,W] coverage, 0 or 1
    """

    rendered: Tensor
    normal: Tensor
    albedo: Tensor
    shading: Tensor
    mask: Tensor

    def stack(self) -> Tensor:
        """[B,9,H,W]: rendered, normal, albedo, the order of DiffusionRig's condition."""
        return torch.cat([self.rendered, self.normal, self.albedo], 1)


def axis_angle_to_matrix(r: Tensor) -> Tensor:
    """Rodrigues' formula, [B,3] radians -> [B,3,3], smooth at zero."""
    x, y, z = r.unbind(-1)
    zero = torch.zeros_like(x)
    k = torch.stack([zero, -z, y, z, zero, -x, -y, x, zero], -1).reshape(*r.shape[:-1], 3, 3)
    theta2 = (r * r).sum(-1)[..., None, None]
    small = theta2 < 1e-8
    theta = torch.where(small, torch.ones_like(theta2), theta2).sqrt()
    a = torch.where(small, 1 - theta2 / 6, theta.sin() / theta)
    b = torch.where(small, 0.5 - theta2 / 24, (1 - theta.cos()) / theta**2)
    return torch.eye(3, dtype=r.dtype, device=r.device) + a * k + b * (k @ k)


def matrix_to_axis_angle(m: Tensor) -> Tensor:
    """Inverse of `axis_angle_to_matrix`, [B,3,3] -> [B,3], angle in [0, pi]."""
    v = torch.stack(
        [m[..., 2, 1] - m[..., 1, 2], m[..., 0, 2] - m[..., 2, 0], m[..., 1, 0] - m[..., 0, 1]], -1
    )
    s = v.norm(dim=-1, keepdim=True) / 2  # sin
    c = (m.diagonal(dim1=-2, dim2=-1).sum(-1, keepdim=True) - 1) / 2
    angle = torch.atan2(s, c)
    near_zero = v / 2 * torch.where(s < 1e-6, torch.ones_like(s), angle / s.clamp_min(1e-12))
    # at pi the antisymmetric part vanishes: the axis is the longest column of the symmetric one
    axis = (m + m.transpose(-1, -2)) / 2 - c[..., None] * torch.eye(3, dtype=m.dtype, device=m.device)
    longest = axis.norm(dim=-2).argmax(-1)[..., None, None].expand(*axis.shape[:-1], 1)
    axis = F.normalize(axis.gather(-1, longest)[..., 0], dim=-1)
    axis = torch.where((axis * v).sum(-1, keepdim=True) < 0, -axis, axis)
    return torch.where(c < -0.999, axis * angle, near_zero)


def slerp(a: Tensor, b: Tensor, w: Tensor) -> Tensor:
    """Rotations a to b along the shorter arc: axis-angle [B,3], w [B]."""
    ra, rb = axis_angle_to_matrix(a), axis_angle_to_matrix(b)
    step = axis_angle_to_matrix(matrix_to_axis_angle(ra.transpose(-1, -2) @ rb) * w[:, None])
    return matrix_to_axis_angle(ra @ step)
