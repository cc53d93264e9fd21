"""What a personal model is worth: `python -m training.evaluate_personal --out DIR`.

A synthetic person whom no training has seen, an album of 20 pictures and 50 other pictures under other
lights, in other poses and with other expressions. Each of the 50 is asked to become another true picture:
half the same scene under another light, half the same scene in another pose with another expression. Once
from the inverted photo, as the nodes do, and once from random noise, as in the paper, where the face comes
from the model and the codes alone. The general model
and models of 1, 5, 10 and 20 photos, one with every photo's own shape and one of adapters alone are
compared. Face codes are fitted to the pictures throughout, as a user has them. Models that DIR holds are not
trained again.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from rig_core import buffers, checkpoints, diffusion, personal, pipeline, samplers, train, warp
from rig_core.face import FaceCode, cat
from training import reinfer, synth
from training.demo import write
from training.evaluate_pairs import fitted
from training.measures import identity_cosine, psnr, table

ALBUM, TESTS, EDITS = 7_000_000, 7_100_000, 7_200_000  # first seeds of the scenes
HEADER = [
    "model", "file, MB", "identity", "of lights", "of poses", "from noise", "PSNR, dB", "from noise",
    "light, %", "shape, mm", "expression, mm", "pose, mm",
]  # fmt: skip
BATCH = 10


@dataclass(frozen=True)
class Scenes:
    """Pictures [N,3,s,s] 0..1 of one person and their fitted codes. head: mask [N,1,s,s] of head and hair."""

    image: Tensor
    code: FaceCode
    head: Tensor


def scenes(head, seeds: list[int], size: int, person: int, **others) -> Scenes:
    """Render and fit. others: seeds of light, pose and so on, see synth.render."""
    images, codes, masks = [], [], []
    for i, seed in enumerate(tqdm(seeds, desc="render", unit="picture", leave=False)):
        b = synth.render([seed], size, person=[person], **{k: [v[i]] for k, v in others.items()})
        images.append(b.image)
        codes.append(fitted(head, b.image, b.landmarks))
        masks.append(((b.head + b.hair) > 0.5).float())
    return Scenes(torch.cat(images), cat(codes), torch.cat(masks))


@dataclass(frozen=True)
class Test:
    """Where the edits start, what they should give, what is asked for; lit [N] tells lights from poses."""

    source: Scenes
    truth: Scenes
    asked: FaceCode
    lit: Tensor


def tests(head, count: int, size: int, person: int) -> Test:
    """`count` edits of unseen pictures: the first half of the light, the rest of pose and expression."""
    seeds, half = [TESTS + i for i in range(count)], (count + 1) // 2
    other = [EDITS + i for i in range(count)]
    source = scenes(head, seeds, size, person)
    lit = scenes(head, seeds[:half], size, person, light=other[:half])
    parts = [lit]
    if count > half:
        parts.append(scenes(head, seeds[half:], size, person, pose=other[half:]))
    truth = Scenes(
        *(torch.cat([getattr(p, k) for p in parts]) if k != "code" else cat([p.code for p in parts])
          for k in ("image", "code", "head"))
    )  # fmt: skip
    relit = source.code[slice(0, half)].replace(light=lit.code.light)
    codes = [relit]
    if count > half:
        moved, goal = source.code[slice(half, None)], truth.code[slice(half, None)]
        codes.append(moved.replace(pose=goal.pose, exp=goal.exp, cam=goal.cam))
    return Test(source, truth, cat(codes), torch.arange(count) < half)


@torch.no_grad()
def edit(rig, head, test: Test, shape: Tensor | None, keep: bool, steps: str = "quad20") -> Tensor:
    """What a model makes of the test, [N,3,s,s] 0..1: of the inverted photos (keep), or of one noise."""
    size, schedule = rig.config.image_size, diffusion.respace(diffusion.linear_schedule(), steps)
    asked, own = (personal.with_shape(head, c, shape) for c in (test.asked, test.source.code))
    noise = torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(0))
    out = []
    for i in tqdm(range(0, len(asked), BATCH), desc="edit", unit="batch", leave=False):
        part, photo = slice(i, i + BATCH), test.source.image[i : i + BATCH]
        condition = rig.condition(buffers.render(head, asked[part], size).stack(), photo * 2 - 1)
        x_T = noise.expand(len(photo), -1, -1, -1)
        if keep:
            moved = asked[part].replace(light=own[part].light)
            grid, hidden = warp.flow(head, own[part], moved)
            before = condition.replace(buffers.render(head, moved, size).stack())
            start = torch.where(test.lit[part, None, None, None], photo, warp.apply(photo, grid))
            x_T = pipeline.variance_mix(
                samplers.invert(rig, start * 2 - 1, before, schedule, "ab2"), x_T, hidden
            )
        out.append(samplers.sample(rig, x_T, condition, schedule, "ab2") / 2 + 0.5)
    return torch.cat(out).clamp(0, 1)


def score(head, recognise, kept: Tensor, painted: Tensor, test: Test) -> list[float]:
    """The numbers of HEADER after the first two: means of the edits of inverted photos, and from noise."""
    same, anew = (identity_cosine(recognise, v, test.truth.image) for v in (kept, painted))
    off = reinfer.distances(head, reinfer.reinfer(head, kept), test.truth.code)
    return [
        same.mean().item(),
        same[test.lit].mean().item(),
        same[~test.lit].mean().item(),
        anew.mean().item(),
        psnr(kept, test.truth.image, test.truth.head),
        psnr(painted, test.truth.image, test.truth.head),
        *(off[k].nanmean().item() for k in reinfer.PARTS),  # NaN where no face was found
    ]


def models(args, head, album: Scenes) -> Iterator[tuple[str, Path]]:
    """Name and file of the general model and of each personal one, trained where DIR lacks it."""
    yield "general model", checkpoints.ASSETS / "diffusion_rig_128.safetensors"
    wanted = [(f"{n} photos" if n > 1 else "1 photo", n, personal.Recipe()) for n in args.counts]
    most = max(args.counts)
    wanted.append((f"{most} photos, own shapes", most, personal.Recipe(mean_shape=False)))
    wanted.append((f"{most} photos, rank {args.lora}", most, personal.Recipe(rank=args.lora)))
    for name, count, recipe in wanted:
        out = args.out / f"person{args.person}" / name.replace(", ", "-").replace(" ", "-")
        path = out / "model.safetensors"
        config = train.Config(
            steps=args.steps, lr=args.lora_lr if recipe.rank else args.lr, warmup=50, ema=0.99,
            p2_gamma=args.p2_gamma, precision=args.precision, save_minutes=5, sample_every=10**9,
        )  # fmt: skip
        if not path.exists() or checkpoints.load_rig(path)[1]["step"] < args.steps:
            rig, _ = checkpoints.load_rig()
            chosen = slice(0, count)
            personal.fit(
                config, recipe, rig, head, album.image[chosen], album.code[chosen], out, path,
                resume=True, about={"person": f"synthetic {args.person}"},
            )  # fmt: skip
        yield name, path


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for the models, report.md and .png")
    parser.add_argument("--person", type=int, default=900_100, help="seed of the synthetic person")
    parser.add_argument("--counts", type=int, nargs="+", default=[1, 5, 10, 20], help="photos of the albums")
    parser.add_argument("--tests", type=int, default=50, help="unseen pictures to edit")
    parser.add_argument("--steps", type=int, default=400, help="of each training, batch 4")
    parser.add_argument("--lr", type=float, default=3e-4)
    parser.add_argument("--lora", type=int, default=6, help="rank of the adapters")
    parser.add_argument("--lora-lr", type=float, default=3e-3)
    parser.add_argument("--p2-gamma", type=float, default=1.0)
    parser.add_argument("--precision", default="bf16")
    parser.add_argument("--threads", type=int, help="CPU threads of torch")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    head, recognise = checkpoints.load_head(), checkpoints.load_identity()
    general, _ = checkpoints.load_rig()
    size = general.config.image_size
    album = scenes(head, [ALBUM + i for i in range(max(args.counts))], size, args.person)
    test = tests(head, args.tests, size, args.person)
    rows, columns = [], [test.source.image, test.truth.image]

    def add(name: str, size: float | None, *outs: Tensor) -> None:
        rows.append([name, size, *score(head, recognise, *outs, test)])
        print(rows[-1], flush=True)

    add("the pictures before the edit", None, test.source.image, test.source.image)
    for name, path in models(args, head, album):
        rig, meta = checkpoints.load_rig(path)
        outs = [edit(rig, head, test, meta.get("mean_shape"), keep) for keep in (True, False)]
        add(name, round(path.stat().st_size / 1e6, 1), *outs)
        columns += outs
    shown = torch.linspace(0, args.tests - 1, min(8, args.tests)).long()
    text = table(HEADER, rows)
    print(text)
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / f"report_{args.person}.md").write_text(text + "\n")
    write(
        torch.cat([torch.cat(list(c[shown]), 2) for c in columns], 1), args.out / f"report_{args.person}.png"
    )


if __name__ == "__main__":
    main()
