"""Our networks under the host's management of memory: denoisers as its MODELs, estimators."""

from __future__ import annotations

import hashlib

import comfy.conds
import comfy.latent_formats
import comfy.model_base
import comfy.model_management as mm
import comfy.model_patcher
import comfy.supported_models_base
import torch
from torch import nn

from ...rig_core import conditions
from ...rig_core.denoisers.relight import DiFaReli, RelightCondition
from ...rig_core.denoisers.rig import DiffusionRig, RigCondition
from ...rig_core.estimators.deca import DECA
from ...rig_core.heads import FaceModel
from .images import slices
from .running import device

# what a CONDITIONING carries for each kind of denoiser: kind -> its name, our condition node, the fields
KINDS = {
    DiffusionRig: (
        "a DiffusionRig",
        "DiffusionRig Condition",
        ("rig_physical", "rig_code", "rig_gain", "rig_offset"),
    ),
    DiFaReli: ("a DiFaReli", "DiFaReli Condition", ("relight_spatial", "relight_vector")),
}


class PixelLatent(comfy.latent_formats.LatentFormat):
    """RGB in -1..1 as a latent of three channels."""

    scale_factor = 1.0
    latent_channels = 3

    def __init__(self):
        self.latent_rgb_factors = [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]]


class _Config(comfy.supported_models_base.BASE):
    unet_config = {}
    unet_extra_config = {}
    latent_format = PixelLatent
    # the host calls a beta schedule that is linear in beta "sqrt_linear"
    sampling_settings = {
        "beta_schedule": "sqrt_linear",
        "linear_start": 1e-4,
        "linear_end": 0.02,
        "timesteps": 1000,
    }
    supported_inference_dtypes = [torch.float32]
    memory_usage_factor = 0.1  # of the published width, 128


class _Network(nn.Module):
    """Our denoiser under the host's calling convention. x is x_t, t the timestep 0..999."""

    def __init__(self, net: nn.Module):
        super().__init__()
        self.net = net
        self.dtype = next(net.parameters()).dtype

    def forward(self, x, t, **kwargs):
        name, node, fields = KINDS[type(self.net)]
        if isinstance(self.net, DiFaReli):
            fields = ("relight_gain", "relight_latents")
        if fields[0] not in kwargs:
            raise ValueError(f"this MODEL is {name}: give it the conditioning of {node}")
        values = [kwargs[f] for f in fields]
        if isinstance(self.net, DiFaReli):
            return self.net(x, t, RelightCondition(values[0], tuple(values[1])))
        return self.net(x, t, RigCondition(*values))


class PixelModel(comfy.model_base.BaseModel):
    """One of our denoisers as the host sees a diffusion model, so that its samplers run on it."""

    def __init__(self, net: nn.Module, meta: dict, device: torch.device):
        config = _Config({"disable_unet_model_creation": True})
        super().__init__(config, comfy.model_base.ModelType.EPS, device=device)
        self.diffusion_model = _Network(net)
        self.memory_usage_factor *= net.config.width / 128
        self.meta = meta
        self.mark = _mark(net)

    def extra_conds(self, **kwargs):
        """Called once a run: here the Modulator of DiFaReli reads the picture and the light."""
        net = self.diffusion_model.net
        fields = KINDS[type(net)][2]
        given = {f: kwargs[f].to(kwargs["device"]) for f in fields if f in kwargs}
        if isinstance(net, DiffusionRig):
            kinds = [comfy.conds.CONDNoiseShape] + [comfy.conds.CONDRegular] * 3
            return {f: kind(given[f]) for f, kind in zip(fields, kinds, strict=True) if f in given}
        if len(given) < 2:
            return {}
        c = net.condition(*given.values())
        latents = comfy.conds.CONDList(list(c.latents))
        return {"relight_gain": comfy.conds.CONDRegular(c.gain), "relight_latents": latents}


def _mark(net: nn.Module) -> str:
    """Tells networks apart, the same for two copies of one file."""
    digest = hashlib.sha256(repr(net.config).encode())
    for p in net.parameters():
        digest.update(p.detach().flatten()[:16].float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def model(net: nn.Module, meta: dict):
    """A host MODEL (ModelPatcher) around a DiffusionRig or a DiFaReli."""
    return _patcher(PixelModel(net.eval().requires_grad_(False), meta, mm.unet_offload_device()))


def _patcher(net: nn.Module):
    return comfy.model_patcher.ModelPatcher(
        net, load_device=mm.get_torch_device(), offload_device=mm.unet_offload_device()
    )


def picture_size(net: nn.Module, meta: dict) -> int:
    """Side of the aligned pictures for a denoiser: its own, or 256 px for a smaller DiFaReli of FLAME.

    As published, these see pictures of 256 px made smaller, see `pipeline.shrink`.
    """
    published = isinstance(net, DiFaReli) and meta.get("head") == "flame"
    return max(net.config.image_size, conditions.PUBLISHED if published else 0)


def denoiser(model, kind: type | None = None) -> nn.Module:
    """The network inside a MODEL, not moved. Raises ValueError for another kind of MODEL."""
    inner = getattr(model, "model", None)
    kinds = [kind] if kind else list(KINDS)
    if not isinstance(inner, PixelModel) or type(inner.diffusion_model.net) not in kinds:
        names = " nor ".join(KINDS[k][0] for k in kinds)
        loaders = " or ".join("Load " + KINDS[k][0].split()[1] for k in kinds)
        raise ValueError(f"'model' is {'not' if kind else 'neither'} {names}: connect the MODEL of {loaders}")
    return inner.diffusion_model.net


def loaded(model) -> nn.Module:
    """`denoiser`, on the working device."""
    net = denoiser(model)
    size = net.config.image_size
    mm.load_models_gpu([model], memory_required=model.model.memory_required([1, 3, size, size]))
    return net


def batches(model, n: int, height: int, width: int) -> list[slice]:
    """Slices over a batch of pictures that fit into half of the free memory, 16 at the most."""
    one = model.model.memory_required([1, 3, height, width])
    return slices(n, int(min(16, max(1, mm.get_free_memory(device()) / 2 // max(one, 1)))))


def face_model(given: FaceModel) -> FaceModel:
    """FACE_MODEL: its encoder, where there is one, as `estimator`."""
    return given if given.encoder is None else given._replace(encoder=estimator(given.encoder))


def deca(face_model) -> nn.Module | None:
    """DECA's encoder of a FACE_MODEL on the working device, None where it has none."""
    patcher = getattr(face_model, "encoder", None)
    return patcher and loaded_estimator(patcher, (DECA,), "face_model", "Load Face Model")


def estimator(net: nn.Module):
    """A network that only looks at pictures, under the host's management of memory."""
    return _patcher(net)


def loaded_estimator(patcher, kinds: tuple[type, ...], name: str, node: str) -> nn.Module:
    """The inverse of `estimator`, on the working device. Raises ValueError when `name` is another node's."""
    if not isinstance(getattr(patcher, "model", None), kinds):
        raise ValueError(f"'{name}' is not from {node}: connect that node")
    mm.load_models_gpu([patcher])
    return patcher.model
