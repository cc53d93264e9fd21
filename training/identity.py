"""The identity encoder that comes with the pack: trained with the additive angular margin loss (Deng et al.
2019, section 3) on rendered persons and on portraits with their relit variants, measured on others.

python -m training.estimators identity --synth DIR [--synth DIR] [--photos DIR] --out identity.safetensors
python -m training.estimators identity --synth DIR [--photos DIR] --model FILE        measures only
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rig_core import checkpoints, files
from rig_core.data import Dataset
from rig_core.estimators import identity

CONFIG = identity.ArcFaceConfig(size=64, width=16, embedding=128)
SIDE = 128  # px of the pictures that are read
MARGIN, SCALE = 0.2, 20.0  # radians; the paper's 0.5 and 64 are for a thousand times more persons
PHOTO_SHARE = 0.35  # of the draws


def angular_margin_loss(vectors: Tensor, centres: Tensor, labels: Tensor, margin: float) -> Tensor:
    """Cross entropy of SCALE * cos(angle to each person's centre), the own angle made `margin` larger.

    vectors [B,E], centres [N,E], labels [B]. Beyond pi - margin, where the cosine turns, it goes on falling.
    """
    cosine = F.linear(F.normalize(vectors), F.normalize(centres)).clamp(-1 + 1e-6, 1 - 1e-6)
    own = cosine.gather(1, labels[:, None])
    moved = own * math.cos(margin) - (1 - own**2).sqrt() * math.sin(margin)
    moved = torch.where(own > -math.cos(margin), moved, own - margin * math.sin(margin))
    return F.cross_entropy(SCALE * cosine.scatter(1, labels[:, None], moved), labels)


class Persons:
    """Pictures [N,3,SIDE,SIDE] uint8 and the number of the person [N] in each."""

    def __init__(self, images: Tensor, labels: Tensor):
        self.images, self.labels = images, labels

    @classmethod
    def read(cls, dataset: Dataset, names: list[str] | set[str]) -> Persons:
        """The pictures of these persons, numbered in sorted order."""
        number = {name: i for i, name in enumerate(sorted(names))}
        rows = [i for i, e in enumerate(dataset.entries) if e.person in number]
        labels = torch.tensor([number[dataset.entries[i].person] for i in rows])
        return cls(dataset.images(rows, SIDE), labels)

    def __len__(self) -> int:
        return len(self.labels)


def split_synth(dataset: Dataset, held: int) -> tuple[list[str], list[str]]:
    """Names of the persons to train on, and of the last `held`, which are never trained on."""
    names = list(dict.fromkeys(e.person for e in dataset.entries))
    if not 0 < held < len(names):
        raise ValueError(f"{len(names)} persons in {dataset.folder}, cannot hold out {held} of them")
    return names[:-held], names[-held:]


def photo_persons(folder: Path, split: str) -> tuple[Dataset, set[str]]:
    """A dataset of portraits and the persons of one of its splits."""
    dataset = Dataset.open(folder).select(split)
    return dataset, {e.person for e in dataset.entries if e.person}


def join(parts: list[Persons]) -> Persons:
    """One set; persons of different sets are different."""
    starts = np.cumsum([0] + [int(p.labels.max()) + 1 for p in parts])
    labels = [p.labels + int(s) for p, s in zip(parts, starts)]
    return Persons(torch.cat([p.images for p in parts]), torch.cat(labels))


def augmented(images: Tensor, g: torch.Generator) -> Tensor:
    """Other crops, mirror images, lights, colours and cameras: [B,3,SIDE,SIDE] uint8 -> float 0..1."""
    n = len(images)

    def between(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(n, *shape, generator=g)

    angle, zoom, flip = between(-0.15, 0.15), between(0.8, 1.08), torch.rand(n, generator=g) < 0.5
    cos, sin = zoom * angle.cos(), zoom * angle.sin()
    sign = 1 - 2 * flip.float()
    shift = between(-0.1, 0.1, 2)
    theta = torch.stack(
        [torch.stack([cos * sign, -sin, shift[:, 0]], -1), torch.stack([sin * sign, cos, shift[:, 1]], -1)], 1
    )
    grid = F.affine_grid(theta, [n, 3, SIDE, SIDE], align_corners=False)
    x = F.grid_sample(images.float() / 255, grid, padding_mode="border", align_corners=False)
    tint = between(0.88, 1.12, 3, 1, 1) * between(0.6, 1.35, 1, 1, 1)
    ramp = torch.linspace(-1, 1, SIDE)
    side = between(-0.35, 0.35, 1, 1, 1) * ramp + between(-0.2, 0.2, 1, 1, 1) * ramp[:, None]
    x = (x * tint * (1 + side)).clamp(0, 1) ** between(
        0.7, 1.4, 1, 1, 1
    )  # light from a side, then the camera
    grey = x.mean(1, keepdim=True)
    x = grey + (x - grey) * between(0.3, 1.2, 1, 1, 1)
    soft = F.avg_pool2d(F.pad(x, (2, 2, 2, 2), mode="replicate"), 5, stride=1)
    x = x + (soft - x) * between(-0.3, 0.9, 1, 1, 1)
    x = x + torch.randn(x.shape, generator=g) * between(0, 0.03, 1, 1, 1)
    return covered(x, g).clamp(0, 1)


def altered(people: Persons, copies: int = 4) -> Persons:
    """The same pictures as the training might show them: [copies * N]."""
    g = torch.Generator().manual_seed(1)
    images = [(augmented(people.images, g) * 255).round().to(torch.uint8) for _ in range(copies)]
    return Persons(torch.cat(images), people.labels.repeat(copies))


def covered(x: Tensor, g: torch.Generator) -> Tensor:
    """A rectangle of one colour over every third picture."""
    ramp = torch.arange(SIDE)
    for i in (torch.rand(len(x), generator=g) < 0.33).nonzero()[:, 0]:
        (left, top), (w, h) = (
            torch.rand(2, generator=g) * SIDE,
            (0.1 + 0.3 * torch.rand(2, generator=g)) * SIDE,
        )
        inside = ((ramp - left).abs() < w / 2) & ((ramp - top).abs() < h / 2)[:, None]
        x[i] = torch.where(inside, torch.rand(3, 1, 1, generator=g), x[i])
    return x


def train(sets: list[Persons], shares: list[float], args: argparse.Namespace) -> identity.ArcFace:
    """AdamW, learning rate up over 100 steps and down by a cosine; the margin grows over the first third."""
    torch.manual_seed(args.seed)
    g = torch.Generator().manual_seed(args.seed)
    people = join(sets)
    weight = torch.cat([torch.full((len(s),), share / len(s)) for s, share in zip(sets, shares)])
    net = identity.ArcFace(CONFIG, dropout=0.2).train().to(memory_format=torch.channels_last)
    net.bn3.requires_grad_(False)  # scale 1, shift 0: unit variance of what comes out
    centres = nn.Parameter(torch.randn(int(people.labels.max()) + 1, CONFIG.embedding) * 0.1)
    learned = [p for p in net.parameters() if p.requires_grad] + [centres]
    optimizer = torch.optim.AdamW(learned, lr=args.lr, weight_decay=0.05)
    start, mean, hits = time.time(), 0.0, 0.0
    print(f"{len(people)} pictures of {len(centres)} persons", flush=True)
    for step in range(1, args.steps + 1):
        done = step / (args.steps + 1)
        for group in optimizer.param_groups:
            group["lr"] = args.lr * min(1, step / 100) * (0.5 + 0.5 * math.cos(math.pi * done))
        rows = torch.multinomial(weight, args.batch, generator=g)
        x = identity.resized(augmented(people.images[rows], g), CONFIG.size)
        vectors = net(identity.normalised(x).contiguous(memory_format=torch.channels_last))
        loss = angular_margin_loss(vectors, centres, people.labels[rows], MARGIN * min(1, 3 * done))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(learned, 5.0)
        optimizer.step()
        with torch.no_grad():
            right = F.linear(F.normalize(vectors), F.normalize(centres)).argmax(1) == people.labels[rows]
        mean += (float(loss.detach()) - mean) / min(step, 50)
        hits += (float(right.float().mean()) - hits) / min(step, 50)
        if step % max(1, args.steps // 20) == 0:
            spent = time.time() - start
            print(
                f"step {step} of {args.steps}  loss {mean:.3f}  named {hits:.3f}  {spent:.0f} s", flush=True
            )
    return standardised(net.eval().requires_grad_(False), sets)


@torch.no_grad()
def standardised(net: identity.ArcFace, sets: list[Persons]) -> identity.ArcFace:
    """Set the last norm so that over the pictures as they are, each component has mean 0 and variance 1."""
    net.bn3.reset_running_stats()
    net.bn3.running_var.fill_(1 - net.bn3.eps)
    vectors = torch.cat([vectors_of(net, s.images[::4]) for s in sets])
    net.bn3.running_mean, net.bn3.running_var = vectors.mean(0), vectors.var(0)
    return net


@torch.no_grad()
def vectors_of(net: identity.ArcFace, images: Tensor) -> Tensor:
    """[N,E] of uint8 pictures, in batches."""
    return torch.cat([identity.embed(net, batch) for batch in images.split(64)])


def verification(vectors: Tensor, labels: Tensor, false_accepts: float = 0.01) -> tuple[float, float]:
    """True-accept rate at a rate of false accepts, and area under the curve, over all pairs of pictures.

    Pairs are compared by the cosine of their vectors [N,E]. Raises ValueError without both kinds of pairs.
    """
    score = F.linear(F.normalize(vectors.double()), F.normalize(vectors.double()))
    a, b = torch.triu_indices(len(labels), len(labels), 1)
    same = labels[a] == labels[b]
    genuine, impostor = score[a, b][same], score[a, b][~same].sort().values
    if not len(genuine) or not len(impostor):
        raise ValueError("verification needs pairs of one person and pairs of two")
    threshold = impostor[max(0, math.ceil(len(impostor) * (1 - false_accepts)) - 1)]
    below = torch.searchsorted(impostor, genuine, side="left")
    ties = torch.searchsorted(impostor, genuine, side="right") - below
    area = (below + 0.5 * ties).mean(dtype=torch.float64) / len(impostor)
    return float((genuine > threshold).double().mean()), float(area)


def baseline(images: Tensor) -> Tensor:
    """What the picture alone gives: 16 x 16 px of each colour, less the mean."""
    small = F.adaptive_avg_pool2d(images.float() / 255, 16).flatten(1)
    return small - small.mean(0)


def evaluate(net: identity.ArcFace, sets: dict[str, Persons]) -> str:
    """Markdown table of verification and of the vectors' statistics."""
    titles = ["persons never trained on", "vectors", "true accepts at 1 % false", "AUC"]
    titles += ["deviation of a component (lowest, highest)", "cosine to the mirror image"]
    rows = [f"| {' | '.join(titles)} |", "| --- " * 6 + "|"]
    for title, people in sets.items():
        vectors = vectors_of(net, people.images)
        alike = F.cosine_similarity(vectors, vectors_of(net, people.images.flip(-1))).mean()
        low, mean, high = (float(f(vectors.std(0))) for f in (torch.min, torch.mean, torch.max))
        count = f"{title}: {int(people.labels.max()) + 1} persons, {len(people)} pictures"
        rate, area = verification(vectors, people.labels)
        spread = f"{mean:.2f} ({low:.2f}, {high:.2f})"
        rows.append(f"| {count} | identity encoder | {rate:.1%} | {area:.4f} | {spread} | {alike:.3f} |")
        rate, area = verification(baseline(people.images), people.labels)
        rows.append(f"| | 16 x 16 px, for comparison | {rate:.1%} | {area:.4f} | | |")
    return "\n".join(rows)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What `run` reads."""
    parser.add_argument(
        "--synth", type=Path, action="append", required=True, help="rendered persons; repeatable"
    )
    parser.add_argument("--photos", type=Path, help="portraits with relit variants")
    parser.add_argument(
        "--held", type=int, default=80, help="persons of the first --synth kept for measuring"
    )
    parser.add_argument("--out", type=Path, help="checkpoint to write")
    parser.add_argument("--model", type=Path, help="measure this one instead of training")
    parser.add_argument("--steps", type=int, default=1400)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)


def run(args: argparse.Namespace) -> str:
    """Train and write, or read, then print the table."""
    first = Dataset.open(args.synth[0])
    known, unknown = split_synth(first, args.held)
    tests = {"renders": Persons.read(first, unknown)}
    if args.photos:
        tests["portraits, four altered copies each"] = altered(
            Persons.read(*photo_persons(args.photos, "val"))
        )
    if args.model:
        net = checkpoints.load_identity(args.model)
    else:
        if not args.out:
            raise SystemExit("--out says where to write the checkpoint (or --model which one to measure)")
        more = [Dataset.open(folder) for folder in args.synth[1:]]
        sets = [Persons.read(first, known)] + [Persons.read(d, {e.person for e in d.entries}) for d in more]
        shares = [float(len(s)) for s in sets]
        if args.photos:
            shares = [s / sum(shares) * (1 - PHOTO_SHARE) for s in shares] + [PHOTO_SHARE]
            sets.append(Persons.read(*photo_persons(args.photos, "train")))
        net = train(sets, shares, args)
        write(args, net, sets)
    table = evaluate(net, tests)
    print(table)
    return table


def write(args: argparse.Namespace, net: identity.ArcFace, sets: list[Persons]) -> None:
    """Half precision, but for what has one dimension."""
    state = {k: v.half() if v.ndim > 1 else v for k, v in net.state_dict().items() if v.is_floating_point()}
    meta = {"kind": "identity", "config": net.config.to_dict(), "seed": args.seed, "steps": args.steps}
    meta |= {"batch": args.batch, "lr": args.lr, "margin": MARGIN, "scale": SCALE, "held": args.held}
    meta |= {
        "pictures": sum(map(len, sets)),
        "persons": sum(int(s.labels.max()) + 1 for s in sets),
        "photos": bool(args.photos),
    }
    files.save(args.out, state, meta)
    print(f"wrote {args.out} ({args.out.stat().st_size / 2**20:.2f} MB)")
