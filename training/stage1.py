"""Train a DiffusionRig denoiser on many persons (Ding et al. 2023, section 3.3, stage 1).

    python -m training.stage1 --data DIR --out RUN --size 64 --minutes 60
    python -m training.stage1 --data DIR --out RUN2 --size 128 --init RUN/state.safetensors
    python -m training.stage1 --data DIR --out COARSE --preset coarse --size 64 --noise-std 0.5
    python -m training.stage1 --data DIR --out FINE --size 128 --grow COARSE/state.safetensors
    torchrun --nproc_per_node 8 -m training.stage1 --preset official --data DIR --out RUN --size 256

The same command with --resume continues a run. RUN/model.safetensors is what the loader reads; samples/
shows faces of the "val" split: photo, buffers, reconstruction, and the face under its neighbour's light.
"""

from __future__ import annotations

import argparse
import os
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from rig_core import buffers, checkpoints, train
from rig_core.data import Dataset, Loader
from rig_core.denoisers.rig import DiffusionRig, RigConfig
from rig_core.diffusion import linear_schedule, respace
from rig_core.samplers import sample
from training.grow import grow

# levels: those of the U-Net that get attention, 0 the finest
# fmt: off
PRESETS = {
    #            width  channel_mult          blocks  levels   latent  encoder  dropout  groups
    "coarse":   (32,    (1, 2, 3, 4),         1,      (2,),    64,     32,      0.0,     8),
    "small":    (32,    (1, 1, 2, 3, 4),      1,      (3,),    64,     32,      0.0,     8),
    "medium":   (64,    (1, 1, 2, 3, 4),      1,      (3,),    64,     48,      0.0,     16),
    "official": (128,   (1, 1, 2, 2, 4, 4),   2,      (4,),    64,     64,      0.1,     32),
}
# fmt: on


def config_of(preset: str, size: int, width: int | None = None) -> RigConfig:
    """The architecture of a preset at a picture size, its base width exchanged if one is given."""
    base, mult, blocks, levels, latent, encoder, dropout, groups = PRESETS[preset]
    attention = tuple(size >> level for level in levels)
    return RigConfig(size, width or base, mult, blocks, attention, 1, dropout, groups, latent, encoder)


def starting_from(weights: dict[str, Tensor], size: int, dropout: float, groups: int) -> DiffusionRig:
    """The network of another run with its weights, now for pictures of `size`: the same levels attend.

    dropout and the groups of the norms leave no trace in the weights: they are the preset's.
    """
    config = RigConfig.from_state_dict(weights, norm_groups=groups)
    levels = [i for i in range(len(config.channel_mult)) if config.attends(i)]
    attention = tuple(size >> i for i in levels)
    model = DiffusionRig(replace(config, image_size=size, attention_resolutions=attention, dropout=dropout))
    model.load_state_dict(weights)
    return model


def contact_sheet(head, dataset: Dataset, size: int, device, count: int = 6):
    """on_sample for `train`: a function (model, step) -> [3, 4 size, count size] in 0..1."""
    picks = torch.linspace(0, len(dataset) - 1, min(count, len(dataset))).long().tolist()
    photo = dataset.images(picks, size).to(device).float() / 255
    code = dataset.codes(picks).resized((size, size)).to(device)
    physical = buffers.render(head, code, size)
    lit = buffers.render(head, code.replace(light=code.light.roll(1, 0)), size)
    noise = torch.randn(photo.shape, generator=torch.Generator().manual_seed(0)).to(device)
    schedule = respace(linear_schedule(), "ddim20")

    def draw(model: DiffusionRig) -> Tensor:
        with torch.no_grad():
            condition = model.condition(physical.stack(), photo * 2 - 1)
        rows = [photo, physical.rendered.clamp(0, 1)]
        for c in (condition, condition.replace(lit.stack())):
            rows.append((sample(model, noise, c, schedule) / 2 + 0.5).clamp(0, 1))
        return torch.cat([torch.cat(list(row), -1) for row in rows], -2).cpu()

    return draw


def save_picture(picture: Tensor, path: Path) -> None:
    from PIL import Image

    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray((picture * 255).round().byte().permute(1, 2, 0).contiguous().numpy()).save(path)


def arguments() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--data", action="append", required=True, metavar="DIR", help="dataset folder; repeatable")
    p.add_argument("--mix", action="append", type=float, help="share of each --data, in their order")
    p.add_argument("--out", required=True, help="run folder")
    p.add_argument("--preset", choices=PRESETS, default="small")
    p.add_argument("--size", type=int, default=128, help="picture size in px")
    p.add_argument("--width", type=int, help="base width instead of the preset's, a multiple of 32")
    p.add_argument("--head", help="head file; the pack's open head by default")
    p.add_argument("--init", help="start from the weights of this run's state or model file")
    p.add_argument("--grow", help="start from this run of half the size, trained with --noise-std 0.5")
    p.add_argument("--noise-std", type=float, default=1.0, help="0.5 for a run that will be grown")
    p.add_argument("--batch", type=int, default=16, help="per process")
    p.add_argument("--steps", type=int, default=100_000)
    p.add_argument("--minutes", type=float, default=0.0, help="stop after this long; 0: no limit")
    p.add_argument("--lr", type=float, default=1e-4)
    p.add_argument("--warmup", type=int, default=500, help="steps of linear learning-rate warm-up")
    p.add_argument("--ema", type=float, default=0.9995)
    p.add_argument("--p2-gamma", type=float, default=1.0, help="0: plain loss")
    p.add_argument("--no-flip", action="store_true")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--precision", choices=("bf16", "fp16", "fp32"), help="bf16 on a GPU, fp32 on a CPU")
    p.add_argument("--threads", type=int, help="CPU threads of torch")
    p.add_argument("--save-minutes", type=float, default=10.0)
    p.add_argument("--sample-every", type=int, default=2000, help="steps between sample sheets")
    p.add_argument("--log-every", type=int, default=50)
    p.add_argument("--resume", action="store_true")
    return p


def main(argv: list[str] | None = None) -> None:
    a = arguments().parse_args(argv)
    if a.threads:
        torch.set_num_threads(a.threads)
    index = int(os.environ.get("LOCAL_RANK", 0))
    device = torch.device("cuda", index) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    rank, world = train.ranks()
    out = Path(a.out)
    config = train.Config(
        steps=a.steps, lr=a.lr, warmup=a.warmup, ema=a.ema, p2_gamma=a.p2_gamma, seed=a.seed,
        noise_std=a.noise_std, minutes=a.minutes,
        precision=a.precision or ("bf16" if device.type == "cuda" else "fp32"),
        log_every=a.log_every, save_minutes=a.save_minutes, sample_every=a.sample_every,
    )  # fmt: skip
    torch.manual_seed(a.seed)
    model = _model(a)
    head = checkpoints.load_head(a.head).to(device)
    folders = [Dataset.open(d) for d in a.data]
    chosen = [d.select("train") for d in folders]
    for d in chosen:
        if len(d) * 3 * a.size**2 < 2 << 30:
            d.preload(a.size)
    shown = next((d for d in (f.select("val") for f in folders) if len(d)), chosen[0])
    sheet = contact_sheet(head, shown, a.size, device) if rank == 0 else None
    about = {
        "stage": 1,
        "head": head.name,
        "size": a.size,
        "data": [Path(d).name for d in a.data],
        "seed": a.seed,
        "ema": a.ema,
    }
    with Loader(chosen, a.size, a.batch, a.seed, a.mix, rank, world) as batches:
        train.train(
            config, model, out, batches, train.rig_inputs(head, a.size, device, not a.no_flip), device,
            resume=a.resume, options={"arguments": vars(a), "architecture": model.config.to_dict()},
            on_sample=lambda ema, step: save_picture(sheet(ema), out / "samples" / f"{step:07d}.png"),
            on_save=lambda ema, step: checkpoints.save_denoiser(
                out / "model.safetensors", ema, {**about, "step": step}, half=True
            ),
        )  # fmt: skip


def _model(a: argparse.Namespace) -> DiffusionRig:
    """The network to train; on resume its weights are replaced by the run's own."""
    own = Path(a.out) / train.STATE
    source = own if a.resume and own.exists() else a.init
    if source:
        return starting_from(train.weights(source), a.size, *PRESETS[a.preset][-2:])
    if a.grow:
        return grow(train.weights(a.grow), PRESETS[a.preset][-1])
    return DiffusionRig(config_of(a.preset, a.size, a.width))


if __name__ == "__main__":
    main()
