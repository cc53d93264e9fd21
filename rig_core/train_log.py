"""What a run leaves in its folder beside the checkpoints: options.json (and options_N.json where it was
resumed at step N), log.jsonl with a line of statistics every few steps, TensorBoard's files where it is
installed; a tqdm bar on the terminal.
"""

from __future__ import annotations

import json
import math
import os
import time
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

from . import files


class Diverged(RuntimeError):
    """The loss or the gradient is not a number any more."""


class Log:
    """The folder `out` of a run and its statistics, from `step` on: see the module.

    config: a train.Config; options: more to record.
    Raises files.CheckpointError when the folder cannot be written to.
    """

    def __init__(self, out: Path, step: int, config, options: dict | None):
        text = json.dumps({"start": step, **asdict(config), **(options or {})}, indent=1)
        self.path, self.every, self.precision = out / "log.jsonl", config.log_every, config.precision
        with _writing(out / ("options.json" if not step else f"options_{step}.json")) as path:
            out.mkdir(parents=True, exist_ok=True)
            for left in (*out.glob(".*.tmp"), *out.glob(".tmp*")):  # ours and safetensors', of a killed run
                left.unlink()
            _replace(path, text + "\n")
        with _writing(self.path):
            _truncate(self.path, step)
        self.tensorboard = _tensorboard(out, step)
        self.bar = _bar(step, config.steps)
        self._clear()

    def _clear(self) -> None:
        self.since, self.images = time.monotonic(), 0
        self.losses: list[Tensor] = []
        self.levels: list[Tensor] = []
        self.norms: list[Tensor] = []

    def add(
        self, step: int, lr: float, losses: Tensor, t: Tensor, norm: Tensor, images: int, flush: bool
    ) -> None:
        """Keep a step's losses and levels [B] and gradient norm on the device; every few steps, and with
        flush, they are read and written. images: of all processes.

        Raises Diverged when one of them is not finite.
        """
        self.losses.append(losses)
        self.levels.append(t)
        self.norms.append(norm)
        self.images += images
        if self.bar is not None:
            self.bar.update()
        if not flush and step % self.every:
            return
        losses, quarter = torch.cat(self.losses).float().cpu(), torch.cat(self.levels).cpu() // 250
        norms = torch.stack(self.norms).cpu()
        if self.precision == "fp16":  # whose scaler leaves out steps that overflow
            norms = norms[norms.isfinite()]
        line = {
            "step": step,
            "loss": losses.mean().item(),
            "loss_by_quarter": [_mean(losses[quarter == q]) for q in range(4)],
            "grad_norm": _mean(norms),
            "lr": lr,
            "images_per_s": self.images / (time.monotonic() - self.since),
            "time": time.time(),
        }
        with _writing(self.path), open(self.path, "a") as f:
            f.write(json.dumps(line) + "\n")
        if self.tensorboard is not None:
            for key in ("loss", "grad_norm", "lr", "images_per_s"):
                self.tensorboard.add_scalar(key, line[key] or 0.0, step)
        if self.bar is not None:
            self.bar.set_postfix(loss=f"{line['loss']:.4f}", images_per_s=f"{line['images_per_s']:.1f}")
        for name, key in (("loss", "loss"), ("gradient", "grad_norm")):  # the gradient is everybody's
            if not math.isfinite(line[key] or 0.0):
                raise Diverged(f"the {name} is {line[key]} at step {step}: lower lr, or use bf16 or fp32")
        self._clear()

    def close(self) -> None:
        for sink in (self.tensorboard, self.bar):
            if sink is not None:
                sink.close()


def _mean(values: Tensor) -> float | None:
    return values.mean().item() if len(values) else None


@contextmanager
def _writing(path: Path):
    """The path, for writing there: errors become files.CheckpointError."""
    try:
        yield path
    except OSError as e:
        raise files.unwritable(path, e) from e


def _replace(path: Path, text: str) -> None:
    """Write a text file as a whole or not at all."""
    part = path.with_name(f".{path.name}.tmp")
    try:
        part.write_text(text)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def _truncate(path: Path, step: int) -> None:
    """Drop the lines after `step`: a run that was killed logged more than it saved, the last line in part."""
    if not path.exists():
        return
    kept = ""
    for line in path.read_text().splitlines(keepends=True):
        with suppress(ValueError):
            if line.endswith("\n") and json.loads(line)["step"] <= step:
                kept += line
    _replace(path, kept)


def _tensorboard(out: Path, step: int):
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(out), purge_step=step + 1)


def _bar(step: int, steps: int):
    try:
        from tqdm import tqdm
    except ImportError:
        return None
    return tqdm(initial=step, total=steps, unit="step", mininterval=5, smoothing=0.05)
