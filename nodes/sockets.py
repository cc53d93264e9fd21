"""The pack's own socket types. All else travels on IMAGE, MASK, LATENT, MODEL, CONDITIONING and INT.

FACE_MODEL      head model (rig_core.heads.HeadModel)
FACE_CODE       rig_core.face.FaceCode, B faces of one picture size
FACE_LANDMARKS  [B,68,2] float, pixels of the picture they were found in
FACE_CROP       Aligned: where the aligned faces were
FACE_MOTION     [B,s,s,2], where each pixel of an edited picture comes from (rig_core.warp.flow)
FACE_BUFFERS    rig_core.face.Buffers
SH_LIGHT        [B,9,3], spherical harmonics in DECA's basis
"""

from typing import NamedTuple

from comfy_api.latest import io
from torch import Tensor

from ..rig_core.align import Crop


class Aligned(NamedTuple):
    """crop: photo pixels to aligned pixels. found [B] bool: pictures without a face are left as they are."""

    crop: Crop
    found: Tensor


FaceModel = io.Custom("FACE_MODEL")
FaceCode = io.Custom("FACE_CODE")
FaceLandmarks = io.Custom("FACE_LANDMARKS")
FaceCrop = io.Custom("FACE_CROP")
FaceMotion = io.Custom("FACE_MOTION")
FaceBuffers = io.Custom("FACE_BUFFERS")
SHLight = io.Custom("SH_LIGHT")
