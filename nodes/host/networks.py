"""Networks that look at a photo, under the host's management of memory."""

from __future__ import annotations

import functools

import comfy.model_management as mm
import comfy.model_patcher
from torch import nn

from ...rig_core.estimators import landmarks
from ...rig_core.estimators.deca import DECA
from ...rig_core.heads import FaceModel


class Whole(comfy.model_patcher.ModelPatcher):
    """Of a small network of plain layers: the host has all of it on its device, or nothing."""

    def partially_load(self, device_to, extra_memory=0, force_patch_weights=False):
        return super().partially_load(device_to, 1e32, force_patch_weights)

    def partially_unload(self, *args, **kwargs):
        return 0


def face_model(given: FaceModel) -> FaceModel:
    """FACE_MODEL: its encoder, where there is one, as `estimator`."""
    return given if given.encoder is None else given._replace(encoder=estimator(given.encoder))


def deca(face_model) -> nn.Module | None:
    """DECA's encoder of a FACE_MODEL on the working device, None where it has none."""
    patcher = getattr(face_model, "encoder", None)
    return patcher and loaded_estimator(patcher, (DECA,), "face_model", "Load Face Model")


def estimator(net: nn.Module):
    """A network that only looks at pictures, under the host's management of memory."""
    return Whole(net, load_device=mm.get_torch_device(), offload_device=mm.unet_offload_device())


@functools.cache
def _face_finder() -> Whole:
    nets = landmarks.default_networks()
    return estimator(nn.ModuleList([nets.finder, nets.landmarks]))


def face_finder() -> None:
    """Have the host know of the networks that find faces and landmarks, so that it can clear them away."""
    mm.load_models_gpu([_face_finder()])


def loaded_estimator(patcher, kinds: tuple[type, ...], name: str, node: str) -> nn.Module:
    """The inverse of `estimator`, on the working device. Raises ValueError when `name` is another node's."""
    if not isinstance(getattr(patcher, "model", None), kinds):
        raise ValueError(f"'{name}' is not from {node}: connect that node")
    mm.load_models_gpu([patcher])
    return patcher.model
