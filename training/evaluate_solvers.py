"""Which solver, how many steps? `python -m training.evaluate_solvers --photos DATASET --cache FILE`.

DiFaReli's official procedure is DDIM over all 1000 steps, there and back. Every row inverts the same pictures
under their own light and decodes them under that and under another one: how well does the picture come back,
how near is the relit one to that of 1000 steps, how near to the truth (held-out synthetic pairs)? Then an
orbit of lights from one inversion: do neighbouring frames differ no more than their lights do?
"""

from __future__ import annotations

import argparse
import hashlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from rig_core import checkpoints, conditions, diffusion, files, pipeline, samplers
from rig_core.data import Dataset
from rig_core.denoisers.relight import RelightCondition
from training import evaluate_pairs, evaluate_photos
from training.measures import psnr, table

ORBIT, ELEVATION = 24, 15.0  # lights, degrees
HEADER = ["solver", "evaluations", "reconstruction, dB", "agreement, dB", "agreement, matched, dB"]
HEADER += ["head against the truth, dB", "s a picture"]


@dataclass(frozen=True)
class Way:
    """A row of the table. steps: see diffusion.respace; match: with the means of the channels matched."""

    name: str
    solver: str
    steps: str
    clip: bool = True
    match: bool = False


REFERENCE = Way("DDIM, all 1000", "ddim", "")
OFFICIAL = Way("DDIM, all 1000, means matched", "ddim", "", match=True)
WAYS = (
    *(Way(f"DDIM, {n} even", "ddim", n) for n in ("20", "50", "100", "250")),
    *(Way(f"AB2, {n} even", "ab2", n) for n in ("20", "50", "100")),
    *(Way(f"AB2, {n} quadratic", "ab2", f"quad{n}") for n in (20, 35, 49)),
    *(Way(f"Heun, {n} quadratic", "heun", f"quad{n}") for n in (10, 12, 20)),
    Way("AB2, 49 quadratic, not clipped", "ab2", "quad49", clip=False),
    *(Way(f"AB2, {n} quadratic, means matched", "ab2", f"quad{n}", match=True) for n in (33, 49)),
)


@dataclass(frozen=True)
class Job:
    """P pictures with one new light each.

    image [P,3,s,s] -1..1; own and new: conditions of P pictures; truth [P,3,s,s] 0..1 and head [P,1,s,s],
    the head's mask in those of the pictures that have a truth, 0 elsewhere.
    """

    image: Tensor
    own: RelightCondition
    new: RelightCondition
    truth: Tensor
    head: Tensor


@dataclass(frozen=True)
class Outcome:
    """back and relit [P,3,s,s] in 0..1; evaluations a picture, there and back; seconds for them."""

    back: Tensor
    relit: Tensor
    evaluations: int
    seconds: float


@torch.no_grad()
def job(tools: evaluate_pairs.Tools, portraits: list, lights: list[Tensor], truths: list) -> Job:
    """Portraits of the denoiser's size, a light [1,9,3] for each; truths: (picture, head mask) or None."""
    conditions_: list[list[RelightCondition]] = [[], []]
    for portrait, light in zip(portraits, lights, strict=True):
        subject = pipeline.describe(tools.head, portrait, tools.recognise, tools.judge)
        for group, v in zip(conditions_, (portrait.code.light, light)):
            group.append(pipeline.relight_condition(tools.relight, tools.head, portrait, subject, v))
    image = torch.cat([p.image for p in portraits])
    nothing = torch.zeros_like(image[:1]), torch.zeros_like(image[:1, :1])
    truth, head = (torch.cat(v) for v in zip(*(t or nothing for t in truths), strict=True))
    return Job(image * 2 - 1, joined(conditions_[0]), joined(conditions_[1]), truth, head)


def joined(parts: list[RelightCondition]) -> RelightCondition:
    """Conditions of one picture each as one of all."""
    latents = (torch.cat(level) for level in zip(*(p.latents for p in parts), strict=True))
    return RelightCondition(torch.cat([p.gain for p in parts]), tuple(latents))


def run(model: Callable, job: Job, way: Way) -> Outcome:
    """Invert all pictures, decode them under their own and under the new light."""
    schedule = diffusion.respace(diffusion.linear_schedule(), way.steps)
    last, count, started = {}, 0, time.perf_counter()
    passes = len(schedule) * (2 + way.match)
    bar = tqdm(total=passes, desc=f"{way.name:>32}", unit="step", mininterval=2)

    def counted(x, t, condition):
        nonlocal count
        count += 1
        return model(x, t, condition)

    def note(info: dict) -> None:
        last["x"] = info["x"]
        bar.update()

    options = dict(schedule=schedule, solver=way.solver, clip=way.clip, callback=note)
    if way.match:
        # its second half is the way back under the own light
        x_T, shifts = samplers.invert_matched(counted, job.image, job.own, **options)
        back, noise = last["x"], samplers.Inversion(x_T, shifts, way.steps, way.solver)
        relit = samplers.sample(counted, x_T, job.new, correct=noise.shift, **options)
        seconds = time.perf_counter() - started
    else:
        x_T = samplers.invert(counted, job.image, job.own, **options)
        relit = samplers.sample(counted, x_T, job.new, **options)
        seconds = time.perf_counter() - started
        back = samplers.sample(model, x_T, job.own, **(options | {"callback": None}))
    bar.close()
    back, relit = ((x / 2 + 0.5).clamp(0, 1) for x in (back, relit))
    return Outcome(back, relit, count, seconds / len(x_T))


def kept(model: torch.nn.Module, job: Job, way: Way, cache: Path | None) -> Outcome:
    """`run`, or what the cache holds of the same weights, pictures and way."""
    digest = hashlib.sha256(f"{way}".encode())
    both = [v for c in (job.own, job.new) for v in (c.gain, *c.latents)]
    for v in (*model.state_dict().values(), job.image, *both):
        digest.update(v.detach().cpu().contiguous().numpy().tobytes())
    key = digest.hexdigest()[:16]
    tensors, meta = files.read(cache) if cache and cache.exists() else ({}, {})
    if f"{key}.back" in tensors:
        evaluations, seconds = meta[key].split()
        return Outcome(tensors[f"{key}.back"], tensors[f"{key}.relit"], int(evaluations), float(seconds))
    out = run(model, job, way)
    if cache:
        tensors |= {f"{key}.back": out.back, f"{key}.relit": out.relit}
        meta = {k: v for k, v in meta.items() if f"{k}.back" in tensors}
        files.save(cache, tensors, meta | {key: f"{out.evaluations} {out.seconds}"})
    return out


def compare(model: torch.nn.Module, job: Job, ways=WAYS, cache: Path | None = None) -> list[list]:
    """Rows of HEADER; the two of 1000 steps come last. dB are means over the pictures."""
    references = [kept(model, job, w, cache) for w in (REFERENCE, OFFICIAL)]
    outcomes = [(w, kept(model, job, w, cache)) for w in ways]
    rows = []
    for way, out in [*outcomes, *zip((REFERENCE, OFFICIAL), references)]:
        agreement = [None if out is r else mean_psnr(out.relit, r.relit) for r in references]
        known = job.head.sum((1, 2, 3)) > 0
        error = mean_psnr(out.relit[known], job.truth[known], job.head[known]) if known.any() else None
        back = mean_psnr(out.back, job.image / 2 + 0.5)
        rows.append([way.name, out.evaluations, back, *agreement, error, out.seconds])
    return rows


def mean_psnr(a: Tensor, b: Tensor, mask: Tensor | None = None) -> float:
    """Mean over the pictures of their dB."""
    masks = [None] * len(a) if mask is None else mask.split(1)
    found = [psnr(x, y, m) for x, y, m in zip(a.split(1), b.split(1), masks, strict=True)]
    return sum(found) / len(found)


# -------------------------------------------------------------------------------------------- the orbit


def flicker(frames: Tensor, references: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Mean absolute differences of neighbours on the way round, [N] of frames and [N] of references,
    both [N,3,H,W], over a mask [1,1,H,W]."""

    def steps(x: Tensor) -> Tensor:
        change = (x - x.roll(-1, 0)).abs().mean(1, keepdim=True)
        return (change * mask).sum((1, 2, 3)) / mask.sum()

    return steps(frames), steps(references)


@torch.no_grad()
def orbit(tools: evaluate_pairs.Tools, portraits: list, n: int = ORBIT) -> list[list]:
    """Rows: measure, mean over the portraits, worst of them."""
    angles = [(360.0 * i / n, ELEVATION) for i in range(n)]
    found = []
    for portrait in tqdm(portraits, desc="orbit", unit="photo"):
        head, code, size = tools.head, portrait.code, portrait.crop.size
        lights = evaluate_photos.lights_at(head, code.light, angles)
        subject = pipeline.describe(head, portrait, tools.recognise, tools.judge)
        frames = pipeline.relight(tools.relight, head, portrait, subject, lights).image
        drawn = conditions.draw(head, code, size)
        seen = [conditions.visibility(head, code, light=v[None], drawn=drawn) for v in lights]
        references = conditions.reference(drawn.normal, drawn.mask, lights, torch.cat(seen))
        moved, turned = flicker(frames, references, drawn.mask.float())
        ratio = moved / turned.clamp_min(1e-6)
        pair = torch.corrcoef(torch.stack([moved, turned]))[0, 1]
        found.append(torch.stack([moved.mean() * 255, ratio.mean(), ratio.max() / ratio.mean(), pair]))
    every = torch.stack(found)
    names = ["mean change of neighbouring frames on the head, of 255", "that over the references' change"]
    names += ["the same: largest over mean", "correlation of both changes"]
    worst = [*every[:, :3].amax(0).tolist(), float(every[:, 3].min())]
    return [[name, m, w] for name, m, w in zip(names, every.mean(0).tolist(), worst, strict=True)]


# --------------------------------------------------------------------------------------- the command line


def pictures(tools: evaluate_pairs.Tools, count: int, photos: Dataset | None) -> tuple[list, list, list]:
    """Portraits at the denoiser's size, their new lights, their truths: `count` pairs and as many photos."""
    size = tools.relight.config.image_size
    pairs = evaluate_pairs.pairs(count, size)
    portraits, lights = [p.source for p in pairs], [p.target.light for p in pairs]
    truths = [(p.truth, p.head) for p in pairs]
    if photos is not None:
        picks = evaluate_photos.spread(photos, count)
        more = [evaluate_pairs.at_size(evaluate_photos.portrait_of(photos, i), size) for i in picks]
        for k, portrait in enumerate(more):
            angle = evaluate_photos.ASKED[k % len(evaluate_photos.ASKED)]
            lights.append(evaluate_photos.lights_at(tools.head, portrait.code.light, [angle]))
        portraits, truths = portraits + more, truths + [None] * len(more)
    return portraits, lights, truths


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--relight", type=Path, help="DiFaReli checkpoint; the embedded default without it")
    parser.add_argument("--photos", type=Path, help="dataset folder (training.prepare) with a val split")
    parser.add_argument("--count", type=int, default=3, help="synthetic pairs, and as many photos")
    parser.add_argument("--cache", type=Path, help="file that keeps the rows of a model and its pictures")
    parser.add_argument("--out", type=Path, help="Markdown file to write")
    args = parser.parse_args()
    if args.count < 1:
        parser.error("--count must be at least 1")
    started = time.perf_counter()
    relight, about = checkpoints.load_relight(args.relight)
    rest = checkpoints.load_identity(), checkpoints.load_shadow()
    tools = evaluate_pairs.Tools(checkpoints.load_head(), None, relight, *rest)
    photos = evaluate_photos.photos(Dataset.open(args.photos)) if args.photos else None
    portraits, lights, truths = pictures(tools, args.count, photos)
    rows = compare(relight, job(tools, portraits, lights, truths), cache=args.cache)
    step, size = about.get("step", "?"), relight.config.image_size
    text = [
        f"Step {step}, {size} px; {args.count} synthetic pairs, {len(portraits) - args.count} photos.",
        "",
    ]
    text += [table(HEADER, rows), "", f"An orbit of {ORBIT} lights from one inversion:", ""]
    text += [table(["measure", "mean", "worst"], orbit(tools, portraits[-args.count :])), ""]
    text += [f"{time.perf_counter() - started:.0f} s.", ""]
    print("\n".join(text))
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text("\n".join(text))


if __name__ == "__main__":
    main()
