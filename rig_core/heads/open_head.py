"""The open head: a linear 3D morphable head with a jaw hinge, gaze and a procedural albedo.

Built by `training/head.py` from ICT-FaceKit (Li et al., "Learning Formation of Physically-Based
Face Attributes", CVPR 2020). No I/O here: `checkpoints.load_head` reads the asset.
"""

from __future__ import annotations

import json

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..face import FaceCode, axis_angle_to_matrix
from . import HeadSizes, centred_code, face_centre

TEX = (
    "melanin",
    "haemoglobin",
    "lips",
    "brow_darkness",
    "brow_density",
    "iris_brown",
    "iris_light",
    "stubble",
    "hair_dark",
    "hair_warm",
    "cheeks",
    "eye_shadow",
)

SKIN_MAPS = ("beard", "brows", "cavity", "flush", "lashes", "lips", "mottle", "scalp", "sockets", "strands")


class OpenHead(nn.Module):
    """Open head of V vertices, S shape modes, E expression modes, 12 albedo numbers (`TEX`), 8 pose numbers.

    Convention: metres; x to the right of the picture (the subject's left), y up, z to the viewer; the origin
    lies between the ears, slightly low, where a head turns on its neck. All coefficients have unit variance,
    zero is the mean face. pose [B,8], radians: global axis-angle (3) about the origin, jaw axis-angle (3)
    about the hinge (x > 0 opens, 0.44 is wide open), gaze yaw (> 0 to the right of the picture) and pitch
    (> 0 up).
    `expressions` [N,E]: row i is the `exp` of expression_names[i] at weight 1; rows may be added up.
    """

    name = "open"

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor], meta: dict[str, str]) -> OpenHead:
        """tensors, meta: as written by training/head.py. Raises ValueError for another kind of file."""
        if meta.get("kind") != "open_head":
            raise ValueError(
                f"not an open head (kind '{meta.get('kind')}'): make one with `python -m training.head`"
            )
        return cls(tensors, meta)

    def __init__(self, tensors: dict[str, Tensor], meta: dict[str, str]):
        super().__init__()
        for k, v in tensors.items():
            name, _, item = k.partition(".")
            if item:
                v = v.float() / 255
            elif v.dtype in (torch.float16, torch.float64):
                v = v.float()
            elif v.dtype in (torch.int16, torch.int32, torch.uint8):
                v = v.long()
            self.register_buffer(k.replace(".", "_"), v)
        self.mask_names = [k[5:] for k in tensors if k.startswith("mask.")]
        self.expression_names: list[str] = json.loads(meta["expression_names"])
        self.sizes = HeadSizes(len(self.shape_modes), len(TEX), len(self.exp_modes), 8)
        # one matrix product per head: [S+E, V*3]
        modes = torch.cat([self.shape_modes, self.exp_modes]).flatten(1)
        del self.shape_modes, self.exp_modes
        self.register_buffer("modes", modes)
        self.register_buffer("eye_mask", self.eyes.float())

    @property
    def masks(self) -> dict[str, Tensor]:
        """Vertex masks [V] 0..1 by name."""
        return {k: getattr(self, f"mask_{k}") for k in self.mask_names}

    @property
    def landmark_vertices(self) -> Tensor:
        """The vertices [N] that `landmarks` reads: a fit needs no others."""
        return torch.cat([self.contour_edges.flatten(), self.landmark_index]).unique()

    def verts(self, shape: Tensor, exp: Tensor, pose: Tensor, index: Tensor | None = None) -> Tensor:
        """shape [B,S], exp [B,E], pose [B,8] -> vertices [B,V,3], or those of index [N] alone [B,N,3]."""
        rows = slice(None) if index is None else index
        template = self.template[rows]
        modes = self.modes.view(len(self.modes), -1, 3)[:, rows].flatten(1)
        x = template + (torch.cat([shape, exp], 1) @ modes).view(len(shape), len(template), 3)
        joints = self.joints + torch.einsum("bs,sjd->bjd", shape, self.joint_modes)
        turn = axis_angle_to_matrix(pose[:, 3:6])
        swing = (x - joints[:, None, 0]) @ (
            turn - torch.eye(3, dtype=turn.dtype, device=turn.device)
        ).transpose(1, 2)
        x = x + self.jaw_weight[rows, None] * swing
        # what the hinge leaves of the scanned open mouth, linear in the sine as FLAME's pose correctives
        open_ = turn[:, 2, 1] / torch.sin(self.jaw_open_angle)
        x = x + open_[:, None, None] * self.jaw_rest[rows]
        x = self._gaze(x, joints[:, 1:], pose[:, 6:8], rows)
        return x @ axis_angle_to_matrix(pose[:, :3]).transpose(1, 2)

    def _gaze(self, x: Tensor, centres: Tensor, gaze: Tensor, rows) -> Tensor:
        """Turn the eyeballs about their centres [B,2,3]; the lids follow."""
        yaw, pitch = gaze[:, 0], gaze[:, 1]
        lids = torch.stack([pitch.relu(), (-pitch).relu(), yaw.relu(), (-yaw).relu()], 1)
        x = x + torch.einsum("bk,kvd->bvd", lids, self.lid_modes[:, rows])
        zero = torch.zeros_like(yaw)
        up = axis_angle_to_matrix(torch.stack([-pitch, zero, zero], 1))
        turn = axis_angle_to_matrix(torch.stack([zero, yaw, zero], 1)) @ up
        for i in (0, 1):
            d = x - centres[:, None, i]
            x = x + self.eye_mask[i, rows, None] * (d @ turn.transpose(1, 2) - d)
        return x

    def landmarks(self, verts: Tensor, pose: Tensor) -> Tensor:
        """verts [B,V,3], or only those of `landmark_vertices` [B,N,3], and their pose [B,8] -> [B,68,3].

        iBUG order. 17..67 are fixed vertices. 0..16 lie on the silhouette: each takes the point of its strip
        (a cut of the cheek at one height) that is farthest out in the picture.
        """
        edges, fixed = self.contour_edges, self.landmark_index[17:]
        if verts.shape[1] != len(self.template):
            edges, fixed = (torch.searchsorted(self.landmark_vertices, i) for i in (edges, fixed))
        a, b = verts[:, edges].unbind(3)
        w = self.contour_weight[..., None]
        strip = (1 - w) * a + w * b  # [B,17,K,3]
        up = F.normalize(axis_angle_to_matrix(pose[:, :3])[:, :2, 1], dim=1)
        right = torch.stack([up[:, 1], -up[:, 0]], 1)
        out = self.contour_outward @ torch.stack([right, up], 1)  # [B,17,2]
        far = (strip[..., :2] * out[:, :, None]).sum(-1)
        pick = torch.softmax(far / 3e-4, 2)  # soft within 0.3 mm, so that it slides along the cheek
        contour = (pick[..., None] * strip).sum(2)
        return torch.cat([contour, verts[:, fixed]], 1)

    def centre(self, verts: Tensor) -> Tensor:
        """Point [B,3] a tenth of the way from the middle of the eyes to the middle of the mouth corners."""
        return face_centre(verts[:, self.landmark_index[17:]])

    def mean_code(self, batch: int, size: int | tuple[int, int]) -> FaceCode:
        """Mean face, neutral, mean light; the eyes a quarter of the (square) picture apart, as in FFHQ.

        A picture that is not square holds the face in its middle square.
        """
        return centred_code(self, self.template[None, self.landmark_index[17:]], batch, size)

    def albedo(self, tex: Tensor) -> Tensor:
        """tex [B,12] (see `TEX`), unit variance -> [B,3,256,256] in display space.

        Skin follows a two-pigment absorption model in linear light (as Tsumura et al., SIGGRAPH 2003): log
        reflectance = base - M a - H b with melanin M and haemoglobin H; encoded by a power it stays one
        exponential.
        """
        t = {k: tex[:, i, None, None, None] for i, k in enumerate(TEX)}
        return torch.cat([self._skin(t, self._maps()), self._inner(t)], 2)

    def skin(self, tex: Tensor, texels: Tensor) -> Tensor:
        """The albedo at texels [B,N] (row * 256 + column, not of eyes or mouth) alone: [B,3,N]. For fits."""
        t = {k: tex[:, i, None, None, None] for i, k in enumerate(TEX)}
        m = {
            k: v.flatten()[texels.clamp(max=v.numel() - 1)][:, None, :, None] for k, v in self._maps().items()
        }
        return self._skin(t, m)[..., 0]

    def _maps(self) -> dict[str, Tensor]:
        return {k: getattr(self, f"map_{k}") for k in SKIN_MAPS}

    def _skin(self, t: dict[str, Tensor], m: dict[str, Tensor]) -> Tensor:
        """Upper rows of the texture: skin, lips, brows, beard, lashes, scalp."""
        mottle = 0.16 * (m["mottle"] - 0.5)
        melanin = F.softplus(1.1 * t["melanin"]) * (1 + mottle - 0.12 * m["lips"])
        melanin = melanin + (0.10 * F.softplus(1 + t["eye_shadow"])) * m["sockets"]
        melanin = melanin + 0.9 * m["cavity"]
        blood = (0.22 * F.softplus(0.6 + 0.6 * t["haemoglobin"])) * (1 + 3 * mottle)
        blood = blood + (0.14 * F.softplus(0.5 + t["cheeks"])) * m["flush"]
        blood = blood + (0.34 * F.softplus(1.2 + t["lips"])) * m["lips"]
        blood = blood + 0.6 * m["cavity"]
        x = _rgb(melanin, -0.12, -0.40, -0.66) - melanin * _rgb(melanin, 0.68, 0.86, 1.0)
        x = torch.exp((x - blood * _rgb(melanin, 0.30, 1.0, 0.80)) / 2.2)

        warm = torch.tanh(0.7 * t["hair_warm"])
        darker = F.softplus(1.2 * t["melanin"])  # hair goes with skin: its numbers say how it differs
        hair, brow = _hair(t["hair_dark"] + darker, warm), _hair(t["brow_darkness"] + darker + 0.3, warm)
        beard = 0.4 * torch.sigmoid(1.6 * t["stubble"] - 2) * m["beard"]
        x = x + (beard + m["scalp"]) * (hair * (0.75 + 0.5 * m["strands"]) - x)
        brows = 0.85 * torch.sigmoid(0.9 * t["brow_density"] + 0.6) * m["brows"]
        return x + torch.maximum(brows, 0.75 * m["lashes"]) * (brow - x)

    def _inner(self, t: dict[str, Tensor]) -> Tensor:
        """Lower rows: eyes, teeth, mouth; only the iris varies."""
        brown = torch.sigmoid(1.5 * t["iris_brown"] + 1.5 * t["melanin"] + 0.5)
        iris = torch.lerp(_rgb(brown, 0.42, 0.52, 0.58), _rgb(brown, 0.30, 0.17, 0.09), brown)
        return self.map_fixed + self.map_iris * iris * (1.25 * torch.exp(0.25 * t["iris_light"]))


def _rgb(like: Tensor, *values: float) -> Tensor:
    return like.new_tensor(values).view(1, 3, 1, 1)


def _hair(dark: Tensor, warm: Tensor) -> Tensor:
    """Display colour [B,3,1,1] of hair with eumelanin `dark` and a share of pheomelanin `warm` (-1..1)."""
    density = F.softplus(1.6 + 1.3 * dark)
    spectrum = _rgb(dark, 0.9, 1.1, 1.25) + warm * _rgb(dark, -0.1, 0.03, 0.12)
    return torch.exp((_rgb(dark, -0.45, -0.75, -1.2) - density * spectrum) / 2.2)
