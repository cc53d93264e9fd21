"""What travels between the nodes: our own socket types, and what our CONDITIONING and LATENT hold.

FACE_MODEL        rig_core.heads.FaceModel: a head and, where there is one, DECA (see host.estimator)
FACE_CODE         rig_core.face.FaceCode, B faces of one picture size
FACE_LANDMARKS_68 [B,68,2] float, pixels of the picture they were found in (later hosts have a FACE_LANDMARKS)
FACE_CROP         Aligned: where the aligned faces were
FACE_MOTION       [B,s,s,2], where each pixel of an edited picture comes from (rig_core.warp.flow)
FACE_BUFFERS      rig_core.face.Buffers
FACE_EMBED        [B,E], identity vectors
SH_LIGHT          [B,9,3], spherical harmonics in DECA's basis
IDENTITY_ENCODER, SHADOW_ESTIMATOR, FACE_PARSER   networks, see host.estimator
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from comfy_api.latest import io
from torch import Tensor, nn

from ..rig_core import samplers
from ..rig_core.align import Crop
from ..rig_core.denoisers.relight import DiFaReli
from ..rig_core.denoisers.rig import DiffusionRig, RigCondition
from . import host


class Aligned(NamedTuple):
    """Where N aligned faces were.

    crop: photo pixels to aligned pixels, of N faces. found [N] bool: photos without a face are left as they
    are. photo [N] long, on the CPU: which photo each face is of, rising from 0; every photo has one at least.
    size: height and width of the photos.
    """

    crop: Crop
    found: Tensor
    photo: Tensor
    size: tuple[int, int]


FaceModel = io.Custom("FACE_MODEL")
FaceCode = io.Custom("FACE_CODE")
FaceLandmarks = io.Custom("FACE_LANDMARKS_68")
LANDMARKS = [FaceLandmarks, io.Custom("FACE_LANDMARKS")]  # the latter is of later hosts: a face mesh
FaceCrop = io.Custom("FACE_CROP")
FaceMotion = io.Custom("FACE_MOTION")
FaceBuffers = io.Custom("FACE_BUFFERS")
FaceEmbed = io.Custom("FACE_EMBED")
SHLight = io.Custom("SH_LIGHT")
BOXES = [io.BBOX, getattr(io, "BoundingBox", None) or io.Custom("BOUNDING_BOX")]  # the latter in later hosts
IdentityEncoder = io.Custom("IDENTITY_ENCODER")
ShadowEstimator = io.Custom("SHADOW_ESTIMATOR")
FaceParser = io.Custom("FACE_PARSER")


def aliases(*words: str) -> dict:
    """Other words that find a node, for its Schema, where the host has them (later than v0.3.64)."""
    return {"search_aliases": list(words)} if "search_aliases" in io.Schema.__dataclass_fields__ else {}


def choice(name: str, value, known) -> None:
    """Raise ValueError for a widget's value that is not on its list: the host does not look."""
    if value not in known:
        raise ValueError(f"'{name}' is one of {', '.join(known)}, not '{value}'")


@dataclass(frozen=True)
class Given:
    """What a CONDITIONING holds for a denoiser of ours, a batch of pictures; what they share exists once."""

    kind: type
    fields: tuple[Tensor, ...]

    def __len__(self) -> int:
        return max(map(len, self.fields))

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the pictures."""
        return tuple(self.fields[0].shape[2:])

    def part(self, net: nn.Module, rows: slice = slice(None)):
        """The condition of some pictures, on the working device, as net takes it."""
        values = [(v if len(v) == 1 else v[rows]).to(host.device()) for v in self.fields]
        return RigCondition(*values) if self.kind is DiffusionRig else net.condition(*values)


def conditioning(kind: type, *values: Tensor) -> list:
    """CONDITIONING for the host's samplers and ours. Its first item, the text, is not used."""
    fields = zip(host.KINDS[kind][2], values, strict=True)
    return [[torch.zeros(1, 1, 1), {f: host.result(v) for f, v in fields}]]


def condition(conditioning: list, net: nn.Module, name: str = "conditioning") -> Given:
    """The inverse of `conditioning`. Raises ValueError for a foreign one, or of another kind or size."""
    fields = conditioning[0][1] if conditioning else {}
    what, node, names = host.KINDS[type(net)]
    if names[0] not in fields:
        raise ValueError(f"'{name}' is not from {node}, but 'model' is {what}: connect that node's output")
    given, size = Given(type(net), tuple(fields[f] for f in names)), net.config.image_size
    other = given.size != (size, size)
    other |= isinstance(net, DiFaReli) and given.fields[1].shape[1] != net.config.cond_dim
    if other:
        raise ValueError(f"'{name}' was made for another model than 'model': connect the same MODEL to both")
    return given


def given(conditioning: list, name: str = "conditioning") -> Given:
    """What a CONDITIONING of either kind holds. Raises ValueError for a foreign one."""
    fields = conditioning[0][1] if conditioning else {}
    for kind, (_, _, names) in host.KINDS.items():
        if names[0] in fields:
            return Given(kind, tuple(fields[f] for f in names))
    nodes = " or ".join(node for _, node, _ in host.KINDS.values())
    raise ValueError(f"'{name}' is not from {nodes}: connect one of them")


def noise_latent(found: samplers.Inversion, model) -> dict:
    """LATENT of a photo's noise [B,3,H,W] of unit variance, with how it was made; it is no picture."""
    shifts = None if found.shifts is None else host.result(found.shifts)
    x_T = host.result(found.x_T)
    how = {"steps": found.steps, "solver": found.solver, "shifts": shifts, "model": model.model.mark}
    return {"samples": x_T, "face_rig_noise": how | {"rows": _thinned(x_T)}}


def _thinned(x_T: Tensor) -> Tensor:
    """Some 64 pixels of each noise [B,3,h,w], in a row, by which it is known again."""
    return x_T[:, :, :: max(1, x_T.shape[2] // 8), :: max(1, x_T.shape[3] // 8)].flatten(1)


def noise(latent: dict, model, size: tuple[int, int]) -> samplers.Inversion:
    """The inverse of `noise_latent`, also for a LATENT of some of its pictures, in any order.

    Raises ValueError for another LATENT, model or size, and for changed noise whose means were matched.
    """
    how = latent.get("face_rig_noise")
    if not isinstance(how, dict):
        raise ValueError(
            "'noise' is not from DDIM Invert: a picture's latent holds no noise, connect that node"
        )
    x_T = latent["samples"]
    if tuple(x_T.shape[2:]) != tuple(size):
        raise ValueError(
            f"'noise' is of {x_T.shape[3]} x {x_T.shape[2]} pixels, the conditioning of {size[1]} x "
            f"{size[0]}: run DDIM Invert and the condition at one size"
        )
    if how["model"] != model.model.mark:
        raise ValueError("'noise' was made with another model: connect the same MODEL to DDIM Invert")
    shifts = how["shifts"]
    if shifts is not None:
        shifts = shifts[:, _rows(_thinned(x_T), how["rows"])]
    return samplers.Inversion(x_T, shifts, how["steps"], how["solver"])


def _rows(noise: Tensor, known: Tensor) -> list[int]:
    """Which of the known noises each one is: LATENTs are picked from, repeated and joined on the way."""
    same = [(known == x).all(1).nonzero() for x in noise.to(known)]
    if not all(map(len, same)):
        raise ValueError(
            f"'noise' holds {len(noise)} pictures, but number {[*map(len, same)].index(0)} of them (counted "
            f"from 0) is not one of the {len(known)} that DDIM Invert gave with 'match_means': connect its "
            "output, or pick from it with Latent From Batch"
        )
    return [int(rows[0]) for rows in same]
