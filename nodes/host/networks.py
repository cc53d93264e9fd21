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


def encoder(face_model):
    """DECA of a FACE_MODEL as an `estimator`, None where it has none."""
    return getattr(face_model, "encoder", None)


def deca(face_model) -> nn.Module | None:
    """DECA of a FACE_MODEL as a network, not moved, None where it has none."""
    patcher = encoder(face_model)
    return patcher and inside(patcher, (DECA,), "face_model", "Load Face Model")


def estimator(net: nn.Module):
    """A network that only looks at pictures, under the host's management of memory."""
    return Whole(net, load_device=mm.get_torch_device(), offload_device=mm.unet_offload_device())


@functools.cache
def face_finder() -> Whole:
    """The networks that find faces and landmarks, as an `estimator`: the host must know of them to clear them
    away. Load them where faces are sought."""
    nets = landmarks.default_networks()
    return estimator(nn.ModuleList([nets.finder, nets.landmarks]))


def inside(patcher, kinds: tuple[type, ...], name: str, node: str) -> nn.Module:
    """The inverse of `estimator`, not moved. Raises ValueError when `name` is another node's."""
    if not isinstance(getattr(patcher, "model", None), kinds):
        raise ValueError(f"'{name}' is not from {node}: connect that node")
    return patcher.model


def loaded_estimator(patcher, kinds: tuple[type, ...], name: str, node: str) -> nn.Module:
    """`inside`, on the working device. For one alone: the next that is loaded may drive it away."""
    net = inside(patcher, kinds, name, node)
    together(patcher)
    return net


def together(*patchers) -> None:
    """Have all of these on the working device at once, and None is nothing.

    One that was loaded before may leave, for want of memory or as --disable-smart-memory wants it.
    """
    mm.load_models_gpu([p for p in patchers if p is not None])
