"""The recorded tensors in tests/golden and the small DiffusionRig that they were recorded with."""

import json
import math
from pathlib import Path

import torch
from safetensors import safe_open

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
