"""One MODEL of ours with a condition, and the host's KSampler on it: for test_host_sampling and _memory."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image

from tests.host_comfy import ROOT

DEFAULT = "default (in the pack)"
FILES = {"rig": "tiny.safetensors", "relight": "relight.safetensors"}


@dataclass
class Case:
    """A MODEL with its network; a condition as ours (`condition`) and as the host's (`conditioning`)."""

    model: Any
    net: Any
    condition: Any
    conditioning: list
    size: int

    def noise(self, n: int = 1) -> torch.Tensor:
        return torch.randn(n, 3, self.size, self.size, generator=torch.Generator().manual_seed(3))


def mm():
    import comfy.model_management

    return comfy.model_management


def load(host, kind: str, file: str):
    if kind == "rig":
        return host.node("LoadDiffusionRig", file=file)[0]
    return host.node("LoadDiFaReli", file=file, modulator="beside it, same name")[0]


def case(host, kind: str, file: str, n: int = 1) -> Case:
    """n pictures that differ in the buffers, or in the spatial condition."""
    model = load(host, kind, file)
    net, core = model.model.diffusion_model.net, host.core
    size = net.config.image_size
    head = core.checkpoints.load_head()
    code = head.mean_code(n, size).replace(pose=torch.linspace(0, 0.3, n)[:, None] * torch.eye(8)[1])
    seen = core.buffers.render(head, code)
    photo = Image.open(ROOT / "rig_core" / "assets" / "astronaut.jpg").convert("RGB").resize((size, size))
    photo = torch.frombuffer(bytearray(photo.tobytes()), dtype=torch.uint8).view(1, size, size, 3)
    photo = photo.permute(0, 3, 1, 2) / 255
    sockets = sys.modules[host.pack.__name__ + ".nodes.sockets"]
    if kind == "rig":
        c = net.condition(seen.stack(), photo * 2 - 1)
        given = sockets.conditioning(type(net), c.physical, c.code, c.gain, c.offset)
    else:
        spatial = torch.cat([seen.shading, (photo * 2 - 1) * (1 - seen.mask)], 1)
        vector = torch.zeros(1, net.config.cond_dim)
        c = net.condition(spatial, vector)
        given = sockets.conditioning(type(net), spatial, vector)
    return Case(model, net, c, given, size)


def off(got, want) -> float:
    """Largest difference, of the largest value where that is above 1."""
    return float((got - want).abs().max() / want.abs().max().clamp(min=1))


def ksampler(host, c: Case, latent, model=None, node="KSampler", **more) -> torch.Tensor:
    how = {"steps": 3, "cfg": 1.0, "sampler_name": "euler", "scheduler": "normal"} | more
    seed = {"noise_seed" if node == "KSamplerAdvanced" else "seed": 5}
    given = {"positive": c.conditioning, "negative": c.conditioning} | {
        k: how.pop(k) for k in ("positive", "negative") if k in how
    }
    return host.stock(node, model=model or c.model, latent_image=latent, **seed, **given, **how)[0]["samples"]


def empty(host, c: Case) -> dict:
    return host.node("EmptyPixelLatent", width=16, height=16, batch_size=1, conditioning=c.conditioning)[0]
