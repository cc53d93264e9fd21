"""Our denoisers as the host's MODELs: its schedule, its choice of number type, its management of memory."""

from __future__ import annotations

import hashlib
import json
import math

import comfy.conds
import comfy.latent_formats
import comfy.model_base
import comfy.model_management as mm
import comfy.model_patcher
import comfy.supported_models_base
import torch
from torch import Tensor, nn

from ...rig_core import conditions, files
from ...rig_core.denoisers.relight import DiFaReli, RelightCondition
from ...rig_core.denoisers.rig import DiffusionRig, RigCondition
from ...rig_core.diffusion import Schedule
from .images import slices
from .layers import lend
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
# a step holds this many times the width in numbers a pixel: 8 to 14 by shapes, the rest is room for kernels
NUMBERS = 16
DTYPES = (torch.float16, torch.bfloat16, torch.float32)  # the host takes the first that its device likes


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
    supported_inference_dtypes = list(DTYPES)


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
        dtype = _dtype(net)
        cast = mm.unet_manual_cast(dtype, mm.get_torch_device(), list(DTYPES))
        config.set_inference_dtype(dtype, cast)
        super().__init__(config, comfy.model_base.ModelType.EPS, device=device)
        self.mark = _mark(net)
        self.diffusion_model = _Network(lend(net.to(dtype), cast is not None))
        self.meta = meta
        self.settle()

    def compute_dtype(self) -> torch.dtype:
        """The type that is computed in. The host's nodes change manual_cast_dtype before a run."""
        return self.manual_cast_dtype or self.get_dtype()

    def settle(self) -> nn.Module:
        """Our network, told the type of this run."""
        net = self.diffusion_model.net
        net.compute_dtype = self.compute_dtype()
        return net

    def extra_conds(self, **kwargs):
        """Called once a run: here the Modulator of DiFaReli reads the picture and the light."""
        net = self.settle()
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

    def memory_required(self, input_shape, cond_shapes=None):
        """Bytes that a step on noise of this shape takes, whatever attention the host has."""
        pixels = input_shape[0] * math.prod(input_shape[2:])
        return pixels * NUMBERS * self.diffusion_model.net.config.width * self.compute_dtype().itemsize

    def state_dict_for_saving(self, clip_state_dict=None, vae_state_dict=None, clip_vision_state_dict=None):
        """For Save Model: a file that our loaders read."""
        if clip_state_dict or vae_state_dict or clip_vision_state_dict:
            raise ValueError("a denoiser of Face Rig has no CLIP and no VAE: save it with Save Model")
        net, meta = self.diffusion_model.net, self.meta
        kind = "difareli" if isinstance(net, DiFaReli) else "diffusion_rig"
        plain = {k: v for k, v in meta.items() if not isinstance(v, Tensor)}
        about = json.dumps({"head": "open", **plain, "kind": kind, "config": net.config.to_dict()}).encode()
        tensors = {f"meta.{k}": v for k, v in meta.items() if isinstance(v, Tensor)}
        tensors[files.META] = torch.frombuffer(bytearray(about), dtype=torch.uint8)
        return tensors | dict(net.state_dict())


def _dtype(net: nn.Module) -> torch.dtype:
    """The type that the host wants the weights in: its flags, then what its device likes."""
    n = sum(p.numel() for p in net.parameters())
    mps = mm.get_torch_device().type == "mps"  # half precision is not to be trusted there
    dtype = mm.unet_dtype(model_params=n, supported_dtypes=[torch.float32] if mps else list(DTYPES))
    return dtype if dtype in DTYPES else torch.float32  # eight bits are for networks a hundred times larger


def _mark(net: nn.Module) -> str:
    """Tells networks apart, the same for two copies of one file."""
    digest = hashlib.sha256(repr(net.config).encode())
    for p in net.parameters():
        digest.update(p.detach().flatten()[:16].float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def model(net: nn.Module, meta: dict):
    """A host MODEL (ModelPatcher) around a DiffusionRig or a DiFaReli."""
    return comfy.model_patcher.ModelPatcher(
        PixelModel(net.eval().requires_grad_(False), meta, mm.unet_offload_device()),
        load_device=mm.get_torch_device(),
        offload_device=mm.unet_offload_device(),
    )


def clipped(model):
    """The MODEL with the picture that each step expects kept within -1..1, as in guided diffusion."""
    changed = model.clone()
    changed.set_model_sampler_post_cfg_function(lambda run: run["denoised"].clamp(-1, 1))
    return changed


def sigmas(model, schedule: Schedule, steps: int) -> Tensor:
    """The least noisy `steps` levels of a schedule for the host's samplers, the noisiest first, then 0."""
    if not steps:
        return torch.zeros(0)
    known = model.get_model_object("model_sampling").sigmas
    return torch.cat([known[schedule.timesteps[:steps]].flip(0), known.new_zeros(1)]).cpu()


def empty_latent(n: int, height: int, width: int) -> dict:
    """LATENT of grey pictures at full size."""
    return {"samples": torch.zeros(n, 3, height, width, device=mm.intermediate_device())}


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


def loaded(model, *estimators) -> nn.Module:
    """`denoiser`, on the working device; with little memory the host may keep some layers elsewhere.

    estimators: what is needed beside it, as in `together`.
    """
    size = denoiser(model).config.image_size
    beside = [e for e in estimators if e is not None]
    mm.load_models_gpu([model, *beside], memory_required=model.model.memory_required([1, 3, size, size]))
    return model.model.settle()


def batches(model, n: int, height: int, width: int) -> list[slice]:
    """Slices over a batch of pictures that fit into half of the free memory, 16 at the most."""
    one = model.model.memory_required([1, 3, height, width])
    return slices(n, int(min(16, max(1, mm.get_free_memory(device()) / 2 // max(one, 1)))))
