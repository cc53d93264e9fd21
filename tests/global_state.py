"""What belongs to the whole process, and no import and no node may leave changed."""

from __future__ import annotations

import contextlib
import logging
import os
import random
import signal
import socket
import sys
import warnings

import numpy as np
import torch
from PIL import Image, ImageFile

with warnings.catch_warnings():  # torch loads these when first needed, which adds a filter and a variable
    warnings.simplefilter("ignore")
    import torch._decomp.decompositions_for_jvp
    import torch._dynamo


def state() -> dict:
    """By name, as plain values that can be compared."""
    cudnn, root = torch.backends.cudnn, logging.getLogger()
    values = {
        "random numbers of torch": torch.get_rng_state().numpy().tobytes(),
        "random numbers of NumPy": repr(np.random.get_state(legacy=False)),
        "random numbers of Python": random.getstate(),
        "cudnn": (cudnn.enabled, cudnn.benchmark, cudnn.deterministic, cudnn.allow_tf32),
        "tf32": (torch.backends.cuda.matmul.allow_tf32, torch.get_float32_matmul_precision()),
        "default dtype": torch.get_default_dtype(),
        "default device": torch.get_default_device(),
        "gradients": (torch.is_grad_enabled(), torch.is_inference_mode_enabled()),
        "anomaly mode": torch.is_anomaly_enabled(),
        "deterministic algorithms": torch.are_deterministic_algorithms_enabled(),
        "threads": (torch.get_num_threads(), torch.get_num_interop_threads()),
        "warnings": (list(warnings.filters), warnings.showwarning),
        "logging": (list(root.handlers), list(root.filters), root.level, logging.root.manager.disable),
        "environment": dict(os.environ),
        "module path": list(sys.path),
        "working directory": os.getcwd(),
        "signals": {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)},
        "exception hook": sys.excepthook,
        "recursion limit": sys.getrecursionlimit(),
        "pictures": (Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES),
        "sockets": socket.getdefaulttimeout(),
    }
    if torch.cuda.is_available():
        values["random numbers of CUDA"] = [s.numpy().tobytes() for s in torch.cuda.get_rng_state_all()]
    return values


@contextlib.contextmanager
def unchanged(what: str, *but: str):
    """AssertionError naming `what` and the state, none of `but`, that it has left changed."""
    before = state()
    try:
        yield
    finally:
        after = state()
        changed = [name for name in before if before[name] != after[name] and name not in but]
        assert not changed, f"{what} changed: {', '.join(changed)}"
