"""FLAME (Li et al., "Learning a model of facial shape and expression from 4D scans", 2017) as DECA uses it.

Built from tensors in memory; reading the licensed files is the business of `checkpoints`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..face import FaceCode, axis_angle_to_matrix
from . import HeadSizes, centred_code, face_centre
from .lbs import lbs

SHAPE_SPACE = 300  # columns of shapedirs that are identity; expression follows
TEXTURE = 256
# DECA's light estimates over FFHQ photos, mean of RGB: not physical, a frontal light is out of distribution
LIGHT_MEAN = (3.65, 0.13, 0.14, -0.38, -0.02, -0.11, 0.16, 0.19, 0.25)
LIGHT_STD = (0.33, 0.32, 0.12, 0.12, 0.21, 0.21, 0.31, 0.27, 0.22)


class Flame(nn.Module):
    """FLAME with 100 shape, 50 expression, 50 albedo and 6 pose numbers (global and jaw axis-angle).

    Convention: metres; x to the right of the picture, y up, z to the viewer. Neck and eyes rest,
    as in DECA.
    """

    name = "flame"
    expression_names: list[str] = []  # FLAME's expressions are numbers without names

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor], sizes: HeadSizes | None = None) -> Flame:
        """tensors (V vertices, F faces, J = 5 joints: root, neck, jaw, eyes):

        v_template [V,3], f [F,3], shapedirs [V,3,400], posedirs [V,3,36], J_regressor [J,V], weights [V,J],
        kintree_table [2,J]; uv [T,2] (v up), uv_faces [F,3]; landmark embedding: static_lmk_faces_idx [51],
        static_lmk_bary_coords [51,3], dynamic_lmk_faces_idx [79,17], dynamic_lmk_bary_coords [79,17,3],
        full_lmk_faces_idx [1,68], full_lmk_bary_coords [1,68,3]; optional: texture_mean [512,512,3] and
        texture_dirs [512,512,3,K] (blue, green, red, 0..255), or every second texel of them, mask.NAME [V].
        Raises ValueError when one is missing or their sizes do not fit.
        """
        return cls(tensors, sizes or HeadSizes(shape=100, tex=50, exp=50, pose=6))

    def __init__(self, tensors: dict[str, Tensor], sizes: HeadSizes):
        super().__init__()
        _check(tensors, sizes)
        self.sizes = sizes
        t = tensors
        used = [*range(sizes.shape), *range(SHAPE_SPACE, SHAPE_SPACE + sizes.exp)]
        self.parents = [0, *(int(i) for i in t["kintree_table"][0, 1:])]
        buffers = {
            "template": t["v_template"].float(),
            "shapedirs": t["shapedirs"][..., used].float(),
            "posedirs": t["posedirs"].float().flatten(0, 1).T.contiguous(),
            "regressor": t["J_regressor"].float(),
            "weights": t["weights"].float(),
            "faces": t["f"].long(),
            "uv": t["uv"].float(),
            "uv_faces": t["uv_faces"].long(),
            "static_face": t["static_lmk_faces_idx"].long(),
            "static_bary": t["static_lmk_bary_coords"].float(),
            "contour_face": t["dynamic_lmk_faces_idx"].long(),
            "contour_bary": t["dynamic_lmk_bary_coords"].float(),
            "full_face": t["full_lmk_faces_idx"].long().view(-1),
            "full_bary": t["full_lmk_bary_coords"].float().view(-1, 3),
            "light_mean": torch.tensor(LIGHT_MEAN)[:, None].repeat(1, 3),
            "light_std": torch.tensor(LIGHT_STD)[:, None].repeat(1, 3),
            "expressions": torch.zeros(0, sizes.exp),
        }
        # joints are linear in the coefficients too
        for name in ("template", "shapedirs"):
            buffers[f"joint_{name}"] = torch.einsum("jv,vc...->jc...", buffers["regressor"], buffers[name])
        self.has_texture = "texture_mean" in t
        if self.has_texture:
            # the official nearest resize to 256 takes every second texel; the files hold blue, green, red
            step = t["texture_mean"].shape[0] // TEXTURE
            small = (slice(None, None, step), slice(None, None, step))
            buffers["texture_mean"] = (t["texture_mean"][small].float() / 255).flip(2).permute(2, 0, 1)
            dirs = (t["texture_dirs"][small][..., : sizes.tex].float() / 255).flip(2)
            buffers["texture_dirs"] = dirs.permute(3, 2, 0, 1).contiguous()
        self.mask_names = [k[5:] for k in t if k.startswith("mask.")]
        buffers |= {f"mask_{k}": t[f"mask.{k}"].float() for k in self.mask_names}
        for k, v in buffers.items():
            self.register_buffer(k, v)

    @property
    def masks(self) -> dict[str, Tensor]:
        """Vertex masks [V] 0..1 by name, as given to `from_tensors`; "skin" is everywhere if it was not."""
        known = {k: getattr(self, f"mask_{k}") for k in self.mask_names}
        return {"skin": torch.ones_like(self.template[:, 0])} | known

    def verts(self, shape: Tensor, exp: Tensor, pose: Tensor, index: Tensor | None = None) -> Tensor:
        """shape [B,100], exp [B,50], pose [B,6] -> vertices [B,V,3], or those of index [N] alone."""
        rest = torch.zeros_like(pose[:, :3])
        full = torch.cat([pose[:, :3], rest, pose[:, 3:6], rest, rest], 1)
        template, shapedirs, weights = self.template, self.shapedirs, self.weights
        posedirs, regressor, joints = self.posedirs, self.regressor, 0
        if index is not None:  # the joints stand for the vertices that are left out
            joints = len(self.regressor)
            template = torch.cat([self.joint_template, template[index]])
            shapedirs = torch.cat([self.joint_shapedirs, shapedirs[index]])
            weights = F.pad(weights[index], (0, 0, joints, 0))
            posedirs = posedirs.unflatten(1, (-1, 3))[:, index].flatten(1)
            posedirs = F.pad(posedirs, (3 * joints, 0))
            regressor = torch.eye(joints, len(template)).to(template)
        betas = torch.cat([shape, exp], 1)
        verts, _ = lbs(betas, full, template, shapedirs, posedirs, regressor, self.parents, weights)
        return verts[:, joints:]

    @property
    def landmark_vertices(self) -> Tensor:
        """The vertices [N] that `landmarks` reads."""
        return torch.cat(
            [self.faces[self.contour_face].flatten(), self.faces[self.static_face].flatten()]
        ).unique()

    def _embed(self, verts: Tensor, face: Tensor, bary: Tensor) -> Tensor:
        """Points at barycentric coordinates [...,N,3] of faces [...,N]."""
        corner = self.faces[face]
        if verts.shape[1] != len(self.template):
            corner = torch.searchsorted(self.landmark_vertices, corner)
        if corner.ndim == 2:
            return (verts[:, corner] * bary[..., None]).sum(2)
        batch = torch.arange(len(verts), device=verts.device)[:, None, None]
        return (verts[batch, corner] * bary[..., None]).sum(2)

    def landmarks(self, verts: Tensor, pose: Tensor) -> Tensor:
        """verts [B,V,3], or only [B,N,3] those of `landmark_vertices`, and their pose [B,6] -> [B,68,3].

        The contour 0..16 is looked up by the head's yaw in whole degrees.
        """
        r = axis_angle_to_matrix(pose[:, :3])
        yaw = (
            torch.atan2(-r[:, 2, 0], torch.hypot(r[:, 0, 0], r[:, 1, 0]))
            .rad2deg()
            .clamp(max=39)
            .round()
            .long()
        )
        # rows 0..39 look one way, 40..78 the other
        row = torch.where(yaw >= 0, yaw, torch.where(yaw < -39, 78, 39 - yaw))
        contour = self._embed(verts, self.contour_face[row], self.contour_bary[row])
        return torch.cat([contour, self._embed(verts, self.static_face, self.static_bary)], 1)

    def landmarks3d(self, verts: Tensor) -> Tensor:
        """verts [B,V,3] -> the 68 landmarks [B,68,3] of the static embedding: its contour stays put."""
        return self._embed(verts, self.full_face, self.full_bary)

    def centre(self, verts: Tensor) -> Tensor:
        """Point [B,3] a tenth of the way from the middle of the eyes to the middle of the mouth corners."""
        return face_centre(self._embed(verts, self.static_face, self.static_bary))

    def albedo(self, tex: Tensor) -> Tensor:
        """tex [B,50] -> [B,3,256,256], unclipped, display space. Raises RuntimeError without a texture."""
        mean, dirs = self._texture()
        return mean + torch.einsum("bk,kchw->bchw", tex, dirs)

    def skin(self, tex: Tensor, texels: Tensor) -> Tensor:
        """The albedo at texels [B,N] (row * 256 + column) alone: [B,3,N]."""
        mean, dirs = (v.flatten(-2)[..., texels] for v in self._texture())
        return mean.transpose(0, 1) + torch.einsum("bk,kcbn->bcn", tex, dirs)

    def _texture(self) -> tuple[Tensor, Tensor]:
        if not self.has_texture:
            raise RuntimeError(
                "this FLAME head has no texture: put FLAME_texture.npz beside it, or hand in an albedo"
            )
        return self.texture_mean, self.texture_dirs

    def mean_code(self, batch: int, size: int | tuple[int, int]) -> FaceCode:
        """Mean face, neutral, mean light; the eyes a quarter of the (square) picture apart."""
        inner = self._embed(self.template[None], self.static_face, self.static_bary)
        return centred_code(self, inner, batch, size)


def _check(t: dict[str, Tensor], sizes: HeadSizes) -> None:
    """Raise ValueError for missing or unfitting tensors."""
    need = [
        "v_template",
        "f",
        "shapedirs",
        "posedirs",
        "J_regressor",
        "weights",
        "kintree_table",
        "uv",
        "uv_faces",
    ]
    kinds = ("static_lmk", "dynamic_lmk", "full_lmk")
    need += [f"{k}_{x}" for k in kinds for x in ("faces_idx", "bary_coords")]
    missing = [k for k in need if k not in t]
    if missing:
        raise ValueError(f"not a FLAME model: {', '.join(missing)} missing")
    v, j, n = len(t["v_template"]), 5, len(t["f"])
    want = {
        "posedirs": (v, 3, 9 * (j - 1)),
        "weights": (v, j),
        "J_regressor": (j, v),
        "kintree_table": (2, j),
    }
    want |= {"v_template": (v, 3), "f": (n, 3), "uv_faces": (n, 3)}
    want |= {k: (v,) for k in t if k.startswith("mask.")}
    for k, shape in want.items():
        if tuple(t[k].shape) != shape:
            raise ValueError(f"FLAME's {k} has shape {tuple(t[k].shape)}, wanted {shape}")
    if t["shapedirs"].shape[:2] != (v, 3) or t["shapedirs"].shape[2] < SHAPE_SPACE + sizes.exp:
        raise ValueError(
            f"FLAME's shapedirs has shape {tuple(t['shapedirs'].shape)}, "
            f"wanted ({v}, 3, at least {SHAPE_SPACE + sizes.exp})"
        )
    most = {"f": v, "uv_faces": len(t["uv"])} | {f"{k}_faces_idx": n for k in kinds}
    for k, count in most.items():
        if t[k].min() < 0 or t[k].max() >= count:
            raise ValueError(f"FLAME's {k} counts to {int(t[k].max())}, there are only {count}")
