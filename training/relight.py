"""Train a DiFaReli denoiser and its Modulator together (Ponglertnapakorn et al. 2023, section 3.4).

    python -m training.relight --annotate --data DIR
    python -m training.relight --data DIR --out COARSE --preset coarse --size 64 --noise-std 0.5
    python -m training.relight --data DIR --out FINE --size 128 --grow COARSE/state.safetensors
    torchrun --nproc-per-node 8 -m training.relight --preset official --data DIR --out RUN --size 256

The same command with --resume continues a run. --rig starts from the denoiser of a DiffusionRig run.
RUN/model.safetensors is what the loader reads; samples/ shows faces of the "val" split: photo, reference,
reconstruction from the inverted photo, and the same noise under the neighbour's light.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor

from rig_core import checkpoints, conditions, train
from rig_core.data import Dataset
from rig_core.denoisers.relight import DiFaReli, RelightConfig, start_open
from rig_core.diffusion import linear_schedule, respace
from rig_core.samplers import invert, sample
from training import relight_data, run_arguments
from training.grow import from_rig, grow_relight

# levels: those of the U-Net that get attention, 0 the finest
# fmt: off
PRESETS = {
    #            width  channel_mult          blocks  levels   heads  proj  groups
    "coarse":   (32,    (1, 2, 3, 4),         1,      (2,),    1,     64,   8),
    "small":    (32,    (1, 1, 2, 3, 4),      1,      (3,),    1,     64,   8),
    "official": (128,   (1, 1, 2, 2, 4, 4),   2,      (4, 5),  4,     512,  32),
}
# fmt: on


def config_of(preset: str, size: int, cond_dim: int) -> RelightConfig:
    """The architecture of a preset at a picture size."""
    width, mult, blocks, levels, heads, proj, groups = PRESETS[preset]
    attention = tuple(size >> level for level in levels)
    return RelightConfig(size, width, mult, blocks, attention, heads, 0.0, groups, cond_dim, proj)


def contact_sheet(head, dataset: Dataset, size: int, device, count: int = 6):
    """on_sample for `train`: a function (model, step) -> [3, 4 size, count size] in 0..1."""
    picks = torch.linspace(0, len(dataset) - 1, min(count, len(dataset))).long().tolist()
    photo = dataset.images(picks, size).to(device).float() / 255
    code = dataset.codes(picks).resized((size, size)).to(device)
    row = relight_data.Table([dataset], size)(torch.tensor(picks), device)
    vector = conditions.vector(code, row["embed"], row["shadow"])
    behind = conditions.background(photo, row["matte"])
    lit = code.replace(light=code.light.roll(1, 0))
    visible = conditions.visibility(head, lit, size)
    references = [
        conditions.shading_reference(head, code, size, row["visible"]),
        conditions.shading_reference(head, lit, size, visible),
    ]
    schedule = respace(linear_schedule(), "quad20")

    def draw(model: DiFaReli) -> Tensor:
        rows = [photo, references[0].clamp(0, 1)]
        with torch.no_grad():
            before, after = (model.condition(conditions.spatial(r, behind), vector) for r in references)
        noise = invert(model, photo * 2 - 1, before, schedule, "ab2")
        for c in (before, after):
            rows.append((sample(model, noise, c, schedule, "ab2") / 2 + 0.5).clamp(0, 1))
        return torch.cat([torch.cat(list(row), -1) for row in rows], -2).cpu()

    return draw


def arguments() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    run_arguments.add_data(p, PRESETS)
    p.add_argument("--annotate", action="store_true", help="only work out what training needs of --data")
    p.add_argument("--rig", help="start from the denoiser of this DiffusionRig run or file, of the same size")
    p.add_argument(
        "--boost", type=float, default=1.0, help="loss weight of noisy levels, at most; 1: plain loss"
    )
    p.add_argument("--cast", type=float, default=0.5, help="share of references with the cast-shadow map")
    run_arguments.add_run(p, ema=0.9999)
    return p


def main(argv: list[str] | None = None) -> None:
    parser = arguments()
    a = parser.parse_args(argv)
    device, head = run_arguments.start(a), checkpoints.load_head(a.head)
    if a.annotate:
        for folder in a.data:
            relight_data.annotate(head, folder)
        return
    run_arguments.check_out(parser, a)
    config = run_arguments.config(a, device, p2_gamma=0.0, boost=a.boost, noise_std=a.noise_std)
    head = head.to(device)
    chosen, shown = run_arguments.datasets(a)
    table = relight_data.Table(chosen, a.size)
    model = _model(a, head, table)
    prepare = relight_data.inputs(head, a.size, table, device, a.cast, not a.no_flip)
    sheet = contact_sheet(head, shown, a.size, device) if train.ranks()[0] == 0 else None
    run_arguments.run(a, config, model, chosen, prepare, sheet, device, {"head": head.name})


def _model(a: argparse.Namespace, head, table: relight_data.Table) -> DiFaReli:
    """The network to train; on resume its weights are replaced by the run's own."""
    cond_dim = relight_data.vector_length(head, table)
    config = config_of(a.preset, a.size, cond_dim)
    fresh = not (a.resume and (Path(a.out) / train.STATE).exists())
    if a.grow and fresh:
        model = grow_relight(train.weights(a.grow), config.norm_groups, config.num_heads, a.size // 2)
        if model.config != config:
            raise ValueError(
                f"{a.grow} does not grow into --preset {a.preset} at {a.size} px with vectors of {cond_dim}: "
                f"it gives {model.config}"
            )
        return model
    model = start_open(DiFaReli(config))
    if a.rig and fresh:
        from_rig(model, train.weights(a.rig))
    return model


if __name__ == "__main__":
    run_arguments.command("training.relight", main)
