"""A node at work in the host: its device, gradients, random numbers, progress, stopping."""

from __future__ import annotations

import contextlib
import copy
import logging
import time

import comfy.model_management as mm
import comfy.utils
import torch
from PIL import Image
from server import PromptServer
from torch import Tensor

from ...rig_core.heads import FaceModel


def device() -> torch.device:
    """Where to compute."""
    return mm.get_torch_device()


def warn(text: str) -> None:
    """Something the user should know, in the host's log."""
    logging.getLogger("face_rig").warning("Face Rig: %s", text)


def result(x):
    """A tensor or a value of rig_core, moved to the host's device for results."""
    return x.to(mm.intermediate_device())


def head(face_model):
    """The head of a FACE_MODEL, or a bare one, on the working device, out of inference mode for fits.

    On a GPU it is a copy that goes with its user: the host keeps the FACE_MODEL, and would not clear it away.
    """
    bare = face_model.head if isinstance(face_model, FaceModel) else face_model
    with torch.inference_mode(False):
        return bare if device() == torch.device("cpu") else copy.deepcopy(bare).to(device())


@contextlib.contextmanager
def gradients():
    """Out of the host's inference mode: for building networks and for fits. Clone what comes in."""
    with torch.inference_mode(False), torch.enable_grad():
        yield


@contextlib.contextmanager
def own_random_numbers():
    """Whatever is drawn inside leaves the host's random numbers as they were."""
    with torch.random.fork_rng([device()] if device().type == "cuda" else []):
        yield


PREVIEW = 0.2  # seconds between previews: each makes the device wait and goes over the net


class Progress:
    """The host's bar, at times with a preview. Each step raises the host's exception when the user pressed
    stop."""

    def __init__(self, total: int):
        self.bar = comfy.utils.ProgressBar(total)
        self.total = total
        self.done = 0
        self.shown = float("-inf")  # when there was a preview

    def step(self, preview: Tensor | None = None) -> None:
        """One step further. preview: [B,3,H,W] in -1..1, its first picture is shown, at the last step and
        where the one before is PREVIEW seconds old."""
        mm.throw_exception_if_processing_interrupted()
        self.done += 1
        shown, now = None, time.monotonic()
        if preview is not None and (self.done == self.total or now - self.shown >= PREVIEW):
            shown, self.shown = ("JPEG", _pil(preview), 512), now
        self.bar.update_absolute(self.done, self.total, shown)

    def show(self, done: int, preview: Tensor | None = None) -> bool:
        """`done` steps of all. False, where `step` would raise, when the user pressed stop."""
        shown = None if preview is None else ("JPEG", _pil(preview), 512)
        try:
            self.bar.update_absolute(done, self.total, shown)
            mm.throw_exception_if_processing_interrupted()
        except mm.InterruptProcessingException:
            return False
        return True

    def callback(self, state: dict) -> None:
        """What rig_core.samplers calls after every step; `last` is the state that it reached."""
        self.last = state["x"]
        self.step(state["x_0"])


def _pil(x: Tensor) -> Image.Image:
    x = ((x[0].detach().float().clamp(-1, 1) + 1) * 127.5).round().byte()
    return Image.fromarray(x.permute(1, 2, 0).cpu().numpy())


def stop_pressed() -> bool:
    """Whether the user pressed stop; asking takes it back, so remember the answer."""
    try:
        mm.throw_exception_if_processing_interrupted()
    except mm.InterruptProcessingException:
        return True
    return False


def end_prompt() -> None:
    """End the prompt as the host's stop button does, after what had to be saved."""
    raise mm.InterruptProcessingException


def make_room() -> None:
    """Have the host move its models off the working device: a training may need all of it."""
    mm.free_memory(1e30, device())


def say(text: str, node_id) -> None:
    """A line below a running node, where there is somebody to read it."""
    server = getattr(PromptServer, "instance", None)
    if server is not None and node_id is not None:
        server.send_progress_text(text, node_id)
