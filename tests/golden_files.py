"""The recorded tensors in tests/golden and the small networks that they were recorded with."""

import json
import math
from pathlib import Path

import torch
from safetensors import safe_open

from rig_core.denoisers.relight import DiFaReli, RelightConfig, both
from rig_core.denoisers.rig import DiffusionRig, RigConfig

FOLDER = Path(__file__).parent / "golden"


def golden(name):
    """(tensors, meta) of one file."""
    with safe_open(FOLDER / f"{name}.safetensors", "pt") as f:
        return {k: f.get_tensor(k) for k in f.keys()}, json.loads(f.metadata()["meta"])


def small_rig(dropout=0.0):
    """The 64 px model of the files diffrig_*: weights drawn in the order of the sorted keys, seed 1001."""
    model = DiffusionRig(RigConfig(64, 32, (1, 2, 2), 1, (16,), dropout=dropout))
    g = torch.Generator().manual_seed(1001)
    state = model.state_dict()
    for k in sorted(state):
        v = state[k]
        if not v.is_floating_point():
            state[k] = torch.zeros_like(v)
        elif k.endswith("running_var"):
            state[k] = 0.5 + torch.rand(v.shape, generator=g)
        else:
            r = torch.randn(v.shape, generator=g)
            if k.endswith("running_mean"):
                state[k] = 0.1 * r
            elif v.ndim >= 2:
                state[k] = r / math.sqrt(v[0].numel())
            else:
                state[k] = 1 + 0.1 * r if k.endswith("weight") else 0.05 * r
    model.load_state_dict(state)
    return model.eval()


def relight_keys(name):
    """Keys and shapes of the published models: "difareli_64", _128, _256 or "small"; (U-Net, Modulator)."""
    stem = "case_difareli_{}_small_32" if name == "small" else name + "_{}"
    table = json.loads((FOLDER / "difareli_keys.json").read_text())
    return table[stem.format("unet")], table[stem.format("modulator")]


def recipe(shapes, seed):
    """Weights without statistics: one generator over the sorted keys."""
    g, out = torch.Generator().manual_seed(seed), {}
    for k in sorted(shapes):
        r = torch.randn(shapes[k], generator=g)
        scaled = r / math.sqrt(math.prod(shapes[k][1:]))
        out[k] = scaled if len(shapes[k]) >= 2 else 1 + 0.1 * r if k.endswith("weight") else 0.05 * r
    return out


def relight_pair(name="small", seed=3003):
    """State dicts of the U-Net and the Modulator of the files difareli_*."""
    unet, modulator = relight_keys(name)
    return recipe(unet, seed), recipe(modulator, seed + 500)


def small_relight():
    """The 32 px model of the files difareli_*."""
    model = DiFaReli(RelightConfig(32, 32, (1, 2, 2), 1, (16, 8), cond_dim=672, proj_dim=32))
    model.load_state_dict(both(*relight_pair()))
    return model.eval().requires_grad_(False)
