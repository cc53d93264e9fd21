"""Training beside a plain loop, a part of `training.bench`: images a second, memory, and bytes on disk.

The plain loop is the method as its papers describe it: buffers stored as float32 and read from disk, the
network in plain eager float32 and NCHW (tests/plain_unet.py), Adam, clipping and EMA one parameter after
another. It computes what ours does, on the same network.
"""

from __future__ import annotations

import copy
import io
import pickle
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from rig_core import buffers, data, diffusion, train
from rig_core.denoisers.relight import SPATIAL, DiFaReli, RelightConfig
from rig_core.denoisers.rig import DiffusionRig, RigConfig
from training.bench import median_ms
from training.bench_relight import Peak
from training.stage1 import config_of

BATCH = 8
WEIGHT = 4 * 5 + 2  # bytes: float32 weight, EMA, two moments, gradient; autocast's half-precision copy
PORTRAITS = 16


@dataclass(frozen=True)
class Speed:
    """One line of the table. ms of a step; memory in MB: weights, EMA, moments, gradients, activations."""

    part: str
    ms: float
    plain_ms: float
    memory: float
    plain_memory: float


# ----------------------------------------------------------------------------------------- the plain loop


def write_plain(folder: Path, head, dataset: data.Dataset, size: int) -> None:
    """Each portrait as a picture and three float32 arrays [3,s,s], as the published datasets hold them."""
    for i in range(len(dataset)):
        image, code = dataset.images([i], size)[0], dataset.codes([i]).resized((size, size))
        Image.fromarray(image.permute(1, 2, 0).contiguous().numpy()).save(folder / f"{i}.png")
        drawn = buffers.render(head.to("cpu"), code, size)
        for name in ("rendered", "normal", "albedo"):
            np.save(folder / f"{i}.{name}.npy", getattr(drawn, name)[0].numpy())


def read_plain(folder: Path, picks: list[int]) -> tuple[Tensor, Tensor]:
    """x_0 [B,3,H,W] in -1..1 and buffers [B,9,H,W]."""
    images, physical = [], []
    for i in picks:
        with Image.open(folder / f"{i}.png") as picture:
            image = np.array(picture.convert("RGB"))
        images.append(torch.from_numpy(image).permute(2, 0, 1).float() / 127.5 - 1)
        parts = [np.load(folder / f"{i}.{name}.npy") for name in ("rendered", "normal", "albedo")]
        physical.append(torch.from_numpy(np.concatenate(parts)))
    return torch.stack(images), torch.stack(physical)


class PlainLoop:
    """State and step of the plain loop. model: a DiffusionRig; it is copied."""

    def __init__(self, model: DiffusionRig, config: train.Config, device: str):
        self.model = copy.deepcopy(model).to(device, memory_format=torch.contiguous_format).train()
        self.ema, self.config, self.steps = copy.deepcopy(self.model), config, 0
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=config.lr, foreach=False, fused=False)

    def step(self, x_0: Tensor, physical: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """One update: -> the gradient's norm before clipping."""
        from tests.plain_unet import plain_forward

        code, c = self.model.encoder(x_0), self.config

        def denoise(x_t: Tensor, t: Tensor, _) -> Tensor:
            return plain_forward(self.model, x_t, t, physical, code)

        loss = diffusion.training_loss(denoise, x_0, t, noise, None, c.p2_gamma, c.p2_k)
        loss.mean().backward()
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), c.clip, foreach=False)
        self.optimizer.step()
        self.optimizer.zero_grad()
        decay = min(c.ema, (1 + self.steps) / (10 + self.steps))
        with torch.no_grad():
            for old, new in zip(self.ema.parameters(), self.model.parameters()):
                old.mul_(decay).add_(new, alpha=1 - decay)
        self.steps += 1
        return norm


# ---------------------------------------------------------------------------------------------- measuring


def bench_steps(head, sizes: tuple[int, ...], repeats: int, device: str) -> list[Speed]:
    """A step of the small network with all that belongs to it, reading and rendering included."""
    rows = []
    for size in sizes:
        with tempfile.TemporaryDirectory() as folder:
            dataset = _portraits(Path(folder), head, size)
            rows += _bench_size(head, dataset, size, repeats, device)
    return rows


def _bench_size(head, dataset: data.Dataset, size: int, repeats: int, device: str) -> list[Speed]:
    (dataset.folder / "plain").mkdir()
    write_plain(dataset.folder / "plain", head, dataset, size)
    head = head.to(device)
    model = DiffusionRig(config_of("small", size))
    plain = PlainLoop(model, train.Config(), device)
    sampler = data.Sampler(dataset.weights(), 0)

    def plain_step() -> None:
        picks = sampler.take(plain.steps * BATCH, BATCH).tolist()
        x_0, physical = (v.to(device) for v in read_plain(dataset.folder / "plain", picks))
        plain.step(x_0, physical, *train.draw(x_0))

    rows, prepare = [], train.rig_inputs(head, size, device)
    for precision in dict.fromkeys(("fp32", train.fast_precision(device))):
        with data.Loader([dataset], size, BATCH) as batches, torch.enable_grad():
            step = our_step(copy.deepcopy(model), train.Config(precision=precision), batches, prepare, device)
            ours, theirs = median_ms(max(2, repeats // 4), step, plain_step)
            used, plain_used = (_peak(job, device) for job in (step, plain_step))
        held = 16 * sum(p.numel() for p in model.parameters()) if device == "cpu" else 0
        part = f"small preset, {size} px, batch {BATCH}, {precision}"
        rows.append(Speed(part, ours, theirs, (held + used) / 1e6, (held + plain_used) / 1e6))
    return rows


def our_step(model: DiffusionRig, config: train.Config, batches, prepare, device: str) -> Callable[[], None]:
    """A step as rig_core.train makes it; one after the other at each call."""
    state = train.begin(config, model, torch.device(device))
    loss = train.Loss(state.model, config)

    def step() -> None:
        with torch.no_grad():
            x_0, inputs = prepare(batches(state.step))
        train.update(state, config, loss, x_0, *train.draw(x_0), inputs)

    return step


def _portraits(folder: Path, head, size: int) -> data.Dataset:
    """Faces of the open head under several lights, as a dataset."""
    g = torch.Generator().manual_seed(0)
    code = head.mean_code(PORTRAITS, size).to("cpu")
    light = code.light + head.light_std.cpu() * torch.randn(code.light.shape, generator=g)
    code = code.replace(light=light)
    images = buffers.render(head.to("cpu"), code, size).rendered.clamp(0, 1)
    data.append(folder, [f"{i:02d}" for i in range(PORTRAITS)], images, code)
    data.finish(folder)
    return data.Dataset.open(folder)


def _peak(job: Callable[[], None], device: str) -> float:
    """Bytes at the highest point of a job: on a GPU of all that PyTorch holds, else of tensors it makes."""
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats()
        job()
        return torch.cuda.max_memory_allocated()
    with Peak() as peak:
        job()
    return peak.peak


def activations(model: nn.Module, inputs: tuple, size: int) -> int:
    """Bytes a picture that the forward pass keeps for the backward pass, by arithmetic on shapes.

    model: on the meta device, in half precision for a run in it; inputs: shapes of the arguments of its
    `condition`, without the batch.
    """

    def kept(batch: int) -> int:
        x_0 = torch.empty(batch, 3, size, size, device="meta")
        given = tuple(torch.empty(batch, *shape, device="meta") for shape in inputs)
        with torch.enable_grad(), Peak() as peak:
            t = torch.zeros(batch, dtype=torch.long, device="meta")
            values = train.Loss(model.train(), train.Config())(x_0, t, x_0, given)
            return peak.live if values.requires_grad else 0  # values holds the graph until here

    return kept(3) - kept(2)


# ------------------------------------------------------------------------------------------------- tables


def speed_table(rows: list[Speed]) -> str:
    """Markdown."""
    lines = [
        "| training step | images a second | plain loop, float32 | times faster | memory MB | plain loop's "
        "| of it |",
        "| --- " * 7 + "|",
    ]
    for r in rows:
        ours, plain = (BATCH * 1000 / ms for ms in (r.ms, r.plain_ms))
        lines.append(
            f"| {r.part} | {ours:.3g} | {plain:.3g} | {ours / plain:.3g} | {r.memory:.0f} "
            f"| {r.plain_memory:.0f} | {100 * r.memory / r.plain_memory:.0f} % |"
        )
    return "\n".join(lines)


def memory_table() -> str:
    """Markdown: what a GPU holds while it trains the published 256 px models."""
    spatial, vector = (SPATIAL, 256, 256), (RelightConfig().cond_dim,)
    with torch.device("meta"):
        published = {
            "DiffusionRig": (DiffusionRig(RigConfig()), ((9, 256, 256), (3, 256, 256))),
            "DiFaReli": (DiFaReli(RelightConfig()), (spatial, vector)),
        }
    lines = [
        "| memory of training at 256 px, published size, bf16 | parameters | weights, EMA, moments, "
        "gradients GB | activations GB, each picture | sum at batch 8 |",
        "| --- " * 5 + "|",
    ]
    for name, (model, inputs) in published.items():
        count = sum(p.numel() for p in model.parameters())
        fixed, each = WEIGHT * count / 1e9, activations(model.to(torch.bfloat16), inputs, 256) / 1e9
        lines.append(f"| {name} | {count / 1e6:.1f} M | {fixed:.2f} | {each:.2f} | {fixed + 8 * each:.1f} |")
    return "\n".join(lines)


def disk_table(head, photo: Tensor, size: int = 256) -> str:
    """Markdown: bytes on disk of a photo [3,H,W] 0..1 cut to `size`, ours and the published LMDB entry."""
    image = photo[:, :size, -size:].cpu()
    code = head.mean_code(1, size).to("cpu")
    stored = io.BytesIO()
    Image.fromarray((image * 255).byte().permute(1, 2, 0).contiguous().numpy()).save(stored, "png")
    drawn = buffers.render(head.to("cpu"), code, size)
    maps = [getattr(drawn, name)[0].numpy() for name in ("rendered", "normal", "albedo")]
    theirs = len(stored.getvalue()) + sum(len(pickle.dumps(v, 4)) for v in maps)
    lines = [
        f"| bytes on disk, one photo of {size} px | ours | published layout | times smaller |",
        "| --- " * 4 + "|",
    ]
    for kind in ("png", "jpg"):
        with tempfile.TemporaryDirectory() as folder:
            data.append(folder, [f"{i:05d}" for i in range(64)], image.expand(64, -1, -1, -1),
                        code.expand(64), kind)  # fmt: skip
            data.finish(folder)
            ours = sum(p.stat().st_size for p in Path(folder).rglob("*") if p.is_file()) / 64
        lines.append(f"| picture as {kind}, code, index | {ours:.0f} | {theirs} | {theirs / ours:.3g} |")
    return "\n".join(lines)
