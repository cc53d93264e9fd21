"""Times of DiFaReli, a part of `training.bench`: an edit from the crop to the relit pictures, and its memory.

The published procedure is three passes of 1000 or 250 evaluations: inversion, mean matching, relighting.
That takes minutes, so a few steps of each pass are timed (tests/plain_relight.py, on the same weights) and
the rest is multiplication.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from rig_core import checkpoints, diffusion, light_prior, pipeline, samplers
from rig_core.denoisers.relight import SPATIAL, DiFaReli, RelightConfig, start_open
from training.bench import Row, median_ms

STEPS = 8  # of each pass of the published procedure, that are timed
FAST = (("quad20", "ab2"), ("quad10", "heun"))  # at most 40 evaluations in all
ORBIT = 8  # lights
LIMIT = 6.0  # GB, in half precision


@dataclass(frozen=True)
class Published:
    """Seconds of one step and of one reading of the condition; each pass reads it once."""

    step: float
    read: float

    def seconds(self, passes: int, steps: int) -> float:
        return passes * (steps * self.step + self.read)


@dataclass(frozen=True)
class Edit:
    """One line of the table. passes: of the published procedure; targets: against 1000 and 250 steps."""

    part: str
    evaluations: int
    seconds: float
    passes: int
    targets: tuple[str, str] = ("", "")


def default_model() -> tuple[DiFaReli, str]:
    """The pack's denoiser, or a fresh one of its size: weights do not change the speed."""
    try:
        return checkpoints.load_relight()[0], "default DiFaReli"
    except (FileNotFoundError, checkpoints.CheckpointError):
        config = RelightConfig(128, 32, (1, 1, 2, 3, 4), 1, (16,), 1, 0.0, 8, 241, 64)
        model = start_open(DiFaReli(config)).to(memory_format=torch.channels_last)
        return model, "DiFaReli of the default's size, random weights"


def count_evaluations(model: torch.nn.Module, job: Callable[[], object]) -> int:
    """How many pictures the denoiser sees in a job; its condition is read outside of `forward`."""
    seen = []
    hook = model.register_forward_hook(lambda module, args, eps: seen.append(len(eps)))
    try:
        job()
    finally:
        hook.remove()
    return sum(seen)


def random_inputs(model: DiFaReli, size: int, device: str) -> tuple[Tensor, Tensor, Tensor]:
    """x [1,3,H,W], spatial [1,6,H,W], vector [1,D]."""
    x, spatial = (torch.randn(1, c, size, size, device=device) for c in (3, SPATIAL))
    return x, spatial, torch.randn(1, model.config.cond_dim, device=device)


def bench_step(model: DiFaReli, name: str, size: int, repeats: int, device: str) -> Row:
    """One evaluation against the same weights in plain eager PyTorch, its copy of the features included."""
    from tests.plain_relight import plain_eps, plain_features

    x, spatial, vector = random_inputs(model, size, device)
    t, condition = torch.tensor([500.0], device=device), model.condition(spatial, vector)
    nchw = copy.deepcopy(model).to(memory_format=torch.contiguous_format)
    features = plain_features(nchw, spatial)
    ours, plain = median_ms(
        repeats,
        lambda: model(x, t, condition),
        lambda: plain_eps(nchw, x, t, copy.deepcopy(features), vector),
    )
    return Row(f"{name}, step at {size} px", ours, "plain eager", plain, "not slower; 1.2 x")


def bench_edits(model: DiFaReli, head, photo: Tensor, repeats: int) -> tuple[list[Edit], Published]:
    """Ours in full, from the crop and what is known of it to the relit pictures, and the published steps."""
    from tests.plain_relight import plain_features, plain_relight

    size = model.config.image_size
    recognise = checkpoints.load_identity(device=photo.device)
    judge = checkpoints.load_shadow(device=photo.device)
    portrait = pipeline.estimate(head, photo, size)
    subject = pipeline.describe(head, portrait, recognise, judge)

    def lights(n: int, of=portrait) -> Tensor:
        turns = [360 * i / n for i in range(n)]
        prior = {"mean": head.light_mean, "std": head.light_std}
        return torch.cat([light_prior.edit(of.code.light, a, 15.0, **prior) for a in turns])

    one, many = lights(1), lights(ORBIT)
    known = pipeline.to_noise(model, head, portrait, subject)

    def edit(light: Tensor, steps=pipeline.RELIGHT_STEPS, solver=pipeline.RELIGHT_SOLVER, match=True):
        noise = pipeline.to_noise(model, head, portrait, subject, steps, solver, match)
        return pipeline.relight(model, head, portrait, subject, light, noise=noise)

    def whole():
        found = pipeline.estimate(head, photo, size)
        about = pipeline.describe(head, found, recognise, judge)
        painted = pipeline.relight(model, head, found, about, lights(1, found))
        return pipeline.paste(photo, found, painted)

    usual = f"{pipeline.RELIGHT_STEPS} {pipeline.RELIGHT_SOLVER}, means matched"
    jobs = [
        (f"first light, {usual}", lambda: edit(one), 3, ("30 x", "8 x")),
        (
            f"each further light, {usual}",
            lambda: pipeline.relight(model, head, portrait, subject, one, noise=known),
            1,
            ("", ""),
        ),
        *(
            (
                f"first light, fast, means not matched: {a} {b}",
                lambda a=a, b=b: edit(one, a, b, False),
                3,
                ("", ""),
            )
            for a, b in FAST
        ),
        (f"orbit of {ORBIT} lights, {usual}", lambda: edit(many), 2 + ORBIT, ("", "")),
        (f"photo to photo with all estimates, one light, {usual}", whole, 3, ("", "")),
    ]

    _, spatial, vector = random_inputs(model, size, photo.device)
    nchw, image = copy.deepcopy(model).to(memory_format=torch.contiguous_format), portrait.image * 2 - 1
    condition = spatial, vector

    def published():
        plain_relight(nchw, image, condition, [condition], diffusion.linear_schedule(), STEPS)

    evaluations = {}

    def counted(part: str, job: Callable[[], object]) -> Callable[[], None]:
        def run() -> None:
            evaluations[part] = count_evaluations(model, job)

        return run

    *ours, cut, read = median_ms(
        repeats,
        *(counted(part, job) for part, job, _, _ in jobs),
        published,
        lambda: plain_features(nchw, spatial),
    )
    rows = [
        Edit(part, evaluations[part], ms / 1000, passes, targets)
        for (part, _, passes, targets), ms in zip(jobs, ours, strict=True)
    ]
    return rows, Published(max(cut - 3 * read, 0.0) / (3 * STEPS) / 1000, read / 1000)


def edit_table(rows: list[Edit], published: Published) -> str:
    """Markdown."""
    head = ["edit", "evaluations", "s"]
    for form in (1000, 250):
        head += [f"{form}-step form", "its s", "times faster"]
    lines = [f"| {' | '.join(head)} | target |", "| --- " * (len(head) + 1) + "|"]
    for row in rows:
        cells = [row.part, str(row.evaluations), f"{row.seconds:.3g}"]
        for form in (1000, 250):
            theirs = published.seconds(row.passes, form)
            cells += [str(row.passes * form), f"{theirs:.4g}", f"{theirs / row.seconds:.3g}"]
        lines.append(f"| {' | '.join(cells)} | {', '.join(t for t in row.targets if t)} |")
    return "\n".join(lines)


def explain(published: Published, name: str, size: int) -> str:
    """What the table compares."""
    step, read = published.step * 1000, published.read * 1000
    return (
        f"{name}, {size} px, from the crop and its estimates. Ours in full, drawing of references included. "
        "The published forms: passes of 1000 or 250 evaluations for inversion, mean matching and each light, "
        "one picture at a time, plain eager on the same weights, without drawing. Not measured in full: "
        f"{STEPS} steps of each of three passes were timed ({step:.4g} ms a step, reading the condition "
        f"{read:.4g} ms a pass) and scaled by the number of steps."
    )


class Peak(TorchDispatchMode):
    """Bytes of the storages that operations made and nobody dropped: `live` now, `peak` at the most."""

    def __init__(self):
        super().__init__()
        self.storages, self.peak = WeakIdKeyDictionary(), 0

    @property
    def live(self) -> int:
        return sum(self.storages.values())

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = {v.untyped_storage() for v in tree_leaves((args, kwargs)) if isinstance(v, Tensor)}
        out = func(*args, **(kwargs or {}))
        for v in tree_leaves(out):
            if isinstance(v, Tensor) and v.untyped_storage() not in given:  # views and in-place results are
                self.storages[v.untyped_storage()] = v.untyped_storage().nbytes()
        self.peak = max(self.peak, self.live)
        return out


def memory(config: RelightConfig, batch: int, dtype: torch.dtype = torch.float16) -> tuple[float, float]:
    """GB (1e9) of the weights, and of all else at the highest point of an edit, by arithmetic on shapes.

    `short_edit` runs on the meta device, where nothing is computed.
    """
    with torch.device("meta"):
        model = DiFaReli(config).to(dtype)
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    with Peak() as peak:
        short_edit(model, batch, "meta")
    return weights / 1e9, peak.peak / 1e9


@torch.no_grad()
def short_edit(model: DiFaReli, batch: int, device: str) -> Tensor:
    """The condition of `batch` lights on one photo and three steps of the sampler, [B,3,H,W]."""
    size = model.config.image_size
    x, spatial = (torch.randn(batch, c, size, size, device=device) for c in (3, SPATIAL))
    condition = model.condition(spatial, torch.randn(1, model.config.cond_dim, device=device))
    schedule = diffusion.respace(diffusion.linear_schedule(), "3")
    return samplers.sample(model, x, condition, schedule, "ab2")


def memory_measured(config: RelightConfig, batch: int) -> float:
    """GB that PyTorch held on the GPU at the highest point of the same edit."""
    model = DiFaReli(config).to("cuda", torch.float16).to(memory_format=torch.channels_last)
    torch.cuda.reset_peak_memory_stats()
    short_edit(model, batch, "cuda")
    return torch.cuda.max_memory_allocated() / 1e9


def memory_table() -> str:
    """Markdown: the published 256 px model in half precision."""
    gpu = torch.cuda.is_available()
    lines = [
        "| memory, 256 px, published size, half precision | weights GB | activations GB | sum GB | on a GPU "
        "| target |",
        "| --- " * 6 + "|",
    ]
    for batch in (1, ORBIT):
        weights, rest = memory(RelightConfig(), batch)
        found = f"{memory_measured(RelightConfig(), batch):.2f} GB" if gpu else "not measured"
        what = f"{batch} light{'s at a time' * (batch > 1)}"
        target = f"below {LIMIT:g} GB"
        lines.append(f"| {what} | {weights:.2f} | {rest:.2f} | {weights + rest:.2f} | {found} | {target} |")
    return "\n".join(lines)
