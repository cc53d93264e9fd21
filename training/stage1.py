"""Train a DiffusionRig denoiser on many persons (Ding et al. 2023, section 3.3, stage 1).

    python -m training.stage1 --data DIR --out RUN --size 64 --minutes 60
    python -m training.stage1 --data DIR --out RUN2 --size 128 --init RUN/state.safetensors
    python -m training.stage1 --data DIR --out COARSE --preset coarse --size 64 --noise-std 0.5
    python -m training.stage1 --data DIR --out FINE --size 128 --grow COARSE/state.safetensors
    torchrun --nproc-per-node 8 -m training.stage1 --preset official --data DIR --out RUN --size 256

The same command with --resume continues a run. RUN/model.safetensors is what the loader reads; samples/
shows faces of the "val" split: photo, buffers, reconstruction, and the face under its neighbour's light.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from rig_core import buffers, checkpoints, train
from rig_core.data import Dataset
from rig_core.denoisers.rig import DiffusionRig, RigConfig
from rig_core.diffusion import linear_schedule, respace
from rig_core.samplers import sample
from training import run_arguments
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


def arguments() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    run_arguments.add_data(p, PRESETS)
    p.add_argument("--width", type=int, help="base width instead of the preset's, a multiple of 32")
    p.add_argument("--init", help="start from the weights of this run's state or model file")
    p.add_argument("--p2-gamma", type=float, default=1.0, help="0: plain loss")
    run_arguments.add_run(p)
    return p


def main(argv: list[str] | None = None) -> None:
    parser = arguments()
    a = parser.parse_args(argv)
    run_arguments.check_out(parser, a)
    device = run_arguments.start(a)
    config = run_arguments.config(a, device, p2_gamma=a.p2_gamma, noise_std=a.noise_std)
    model = _model(a)
    head = checkpoints.load_head(a.head).to(device)
    chosen, shown = run_arguments.datasets(a)
    prepare = train.rig_inputs(head, a.size, device, not a.no_flip)
    sheet = contact_sheet(head, shown, a.size, device) if train.ranks()[0] == 0 else None
    about = {"stage": 1, "head": head.name}
    run_arguments.run(a, config, model, chosen, prepare, sheet, device, about)


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
    run_arguments.command("training.stage1", main)
