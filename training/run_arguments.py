"""What the command lines of training have in common: arguments, device, datasets, and the run itself."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from rig_core import checkpoints, distributed, files, train
from rig_core.data import Dataset, Loader
from rig_core.train_log import Diverged

IN_MEMORY = 2**31  # bytes of pictures up to which a dataset is decoded once, in every process


def add_run(p: argparse.ArgumentParser, **defaults) -> None:
    """How a run goes; defaults by name (lr=1e-5) replace the usual ones."""
    p.add_argument("--out", help="run folder")
    p.add_argument("--steps", type=int, default=100_000)
    p.add_argument("--minutes", type=float, default=0.0, help="stop after this long; 0: no limit")
    p.add_argument("--lr", type=float, default=1e-4)
    p.add_argument("--warmup", type=int, default=500, help="steps of linear learning-rate warm-up")
    p.add_argument("--ema", type=float, default=0.9995)
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--precision", choices=("bf16", "fp16", "fp32"), help="the device's fastest without it")
    p.add_argument("--threads", type=int, help="CPU threads of torch")
    p.add_argument("--save-minutes", type=float, default=10.0, help="time between checkpoints")
    p.add_argument("--sample-every", type=int, default=2000, help="steps between sample sheets")
    p.add_argument("--log-every", type=int, default=50, help="steps between lines of statistics")
    p.add_argument("--resume", action="store_true", help="go on with the run in --out, if there is one")
    p.set_defaults(**defaults)


def add_data(p: argparse.ArgumentParser, presets) -> None:
    """What a general model is trained on, and its size."""
    p.add_argument("--data", action="append", required=True, metavar="DIR", help="dataset folder; repeatable")
    p.add_argument("--mix", action="append", type=float, help="share of each --data, in their order")
    p.add_argument("--preset", choices=presets, default="small")
    p.add_argument("--size", type=int, default=128, help="picture size in px")
    p.add_argument("--head", help="head file; the pack's open head by default")
    p.add_argument("--grow", help="start from this run of half the size, trained with --noise-std 0.5")
    p.add_argument("--noise-std", type=float, default=1.0, help="0.5 for a run that will be grown")
    p.add_argument("--batch", type=int, default=16, help="per process")
    p.add_argument("--no-flip", action="store_true", help="do not mirror half of the pictures")


def check_out(p: argparse.ArgumentParser, a: argparse.Namespace) -> None:
    """Before any work: --out is given, and holds no run unless that is to be resumed."""
    if not a.out:
        p.error("--out is needed: the folder of the run")
    train.check_folder(a.out, a.resume)


def start(a: argparse.Namespace) -> torch.device:
    """Set threads and seed; this process's device."""
    if a.threads:
        torch.set_num_threads(a.threads)
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    torch.manual_seed(a.seed)
    return device


def config(a: argparse.Namespace, device: torch.device, **more) -> train.Config:
    """The arguments of `add_run` as the training loop takes them."""
    return train.Config(
        steps=a.steps, lr=a.lr, warmup=a.warmup, ema=a.ema, seed=a.seed, minutes=a.minutes,
        precision=a.precision or train.fast_precision(device), log_every=a.log_every,
        save_minutes=a.save_minutes, sample_every=a.sample_every, **more,
    )  # fmt: skip


def datasets(a: argparse.Namespace) -> tuple[list[Dataset], Dataset]:
    """The "train" splits of --data, small ones decoded, and what sample sheets show: a "val" split if any."""
    folders = [Dataset.open(d) for d in a.data]
    chosen = [d.select("train") for d in folders]
    for d in chosen:
        if len(d) * 3 * a.size**2 < IN_MEMORY:
            d.preload(a.size)
    return chosen, next((d for d in (f.select("val") for f in folders) if len(d)), chosen[0])


def run(
    a: argparse.Namespace,
    config: train.Config,
    model: nn.Module,
    chosen: list[Dataset],
    prepare: Callable,
    sheet: Callable[[nn.Module], Tensor] | None,
    device: torch.device,
    about: dict,
) -> None:
    """Train on the datasets. sheet: draws a sample, on the first process; about: for the model's file."""
    out, (rank, world) = Path(a.out), distributed.ranks()
    data = [Path(d).name for d in a.data]
    about = {**about, "size": a.size, "data": data, "seed": a.seed, "ema": a.ema}
    local = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    workers = max(2, min(8, (os.cpu_count() or 1) // local))
    with Loader(chosen, a.size, a.batch, a.seed, a.mix, rank, world, workers) as batches:
        train.train(
            config, model, out, batches, prepare, device, a.resume,
            {"arguments": vars(a), "processes": world, "architecture": model.config.to_dict()},
            on_sample=lambda ema, step: save_picture(sheet(ema), out / "samples" / f"{step:07d}.png"),
            on_save=lambda ema, step: checkpoints.save_denoiser(
                out / "model.safetensors", ema, {**about, "step": step}, half=True
            ),
        )  # fmt: skip


def save_picture(picture: Tensor, path: Path) -> None:
    """[3,H,W] 0..1 as a file. Raises files.CheckpointError when it cannot be written."""
    from PIL import Image

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray((picture * 255).round().byte().permute(1, 2, 0).contiguous().numpy()).save(path)
    except OSError as e:
        raise files.unwritable(path, e) from e


def command(name: str, main: Callable[[], None]) -> None:
    """Run a command line: what the user can mend is said in one line."""
    try:
        main()
    except (ValueError, OSError, Diverged) as e:
        sys.exit(f"{name}: {e}")
    distributed.leave()
