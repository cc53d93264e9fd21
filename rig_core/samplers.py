"""From noise to image and back: DDPM, DDIM, second-order solvers, and the inversion of an image.

All solvers share one step. With a = sqrt(alpha_bar), b = sqrt(1 - alpha_bar) and s = b / a, the
probability-flow ODE of y = x / a is dy/ds = eps (Song et al. 2021, eq. 14), so that

    x' = a' x_0 + b' eps + c' (d - eps),      c' = a' (s' - s) = b' - a' s

where x_0 is the clipped prediction, eps the noise re-derived from it, and d the solver's slope: eps
itself (DDIM, which is Euler), (3 eps - eps_before) / 2 on an even grid (AB2), or the mean of both ends
(Heun). DDIM with eta and ancestral DDPM are the same line with other a', b' and fresh noise.

Levels as in guided diffusion. Sampling: x_T counts as level N-1; the last step goes to alpha_bar = 1.
Inversion: the image counts as level 0; the last step goes to alpha_bar = 0, so x_T is the noise itself.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .diffusion import Schedule, fixed_large_variance, posterior

SOLVERS = ("ddim", "ddpm", "ab2", "heun")


@dataclass(frozen=True)
class Step:
    """Coefficients of one step as Python floats: passing them to a kernel never waits for the device.

    t is the original timestep; recip and s turn (x, eps) into x_0; a, b, c, sigma as in the module's line;
    ab2 is h / (2 h_before), 0 where the previous slope is no use; t_next is -1 where no level follows.
    """

    t: int
    t_next: int
    recip: float
    s: float
    a: float
    b: float
    c: float
    sigma: float = 0.0
    ab2: float = 0.0
    recip_next: float = 0.0
    s_next: float = 0.0


def plan(schedule: Schedule, solver: str, eta: float = 0.0, reverse: bool = False) -> list[Step]:
    """All coefficients of a run, in order. reverse: from the image to noise."""
    levels = list(range(len(schedule))) if reverse else list(range(len(schedule)))[::-1]
    alpha_bar, s, times = schedule.alpha_bar.tolist(), schedule.s.tolist(), schedule.timesteps.tolist()
    steps: list[Step] = []
    for k, i in enumerate(levels):
        j = levels[k + 1] if k + 1 < len(levels) else None
        goal = alpha_bar[j] if j is not None else float(not reverse)
        a, b = goal**0.5, (1 - goal) ** 0.5
        sigma = 0.0
        if eta:  # DDIM, eq. 16
            sigma = eta * ((1 - goal) / (1 - alpha_bar[i]) * (1 - alpha_bar[i] / goal)) ** 0.5
            b = max(1 - goal - sigma**2, 0.0) ** 0.5
        ab2 = 0.0
        if solver == "ab2" and k and goal > 0:
            # the step to alpha_bar = 0 is infinitely long in s: nothing to extrapolate there
            ab2 = (b / a - s[i]) / (2 * (s[i] - s[levels[k - 1]]))
        following = {} if j is None else {"recip_next": alpha_bar[j] ** -0.5, "s_next": s[j]}
        t_next = -1 if j is None else times[j]
        c = b - a * s[i]
        steps.append(Step(times[i], t_next, alpha_bar[i] ** -0.5, s[i], a, b, c, sigma, ab2, **following))
    return _ancestral(schedule, steps) if solver == "ddpm" else steps


def _ancestral(schedule: Schedule, steps: list[Step]) -> list[Step]:
    """Exchange a, b, sigma: the mean w0 x_0 + wt x_t in terms of x_0 and eps."""
    w0, wt, _ = posterior(schedule)
    a = (w0 + wt * schedule.alpha_bar.sqrt()).tolist()[::-1]
    b = (wt * (1 - schedule.alpha_bar).sqrt()).tolist()[::-1]
    sigma = fixed_large_variance(schedule).sqrt().tolist()[::-1]
    sigma[-1] = 0.0
    return [
        Step(p.t, p.t_next, p.recip, p.s, *abc, 0.0, sg)
        for p, *abc, sg in zip(steps, a, b, sigma, strict=True)
    ]


@torch.no_grad()
def sample(
    denoiser: Callable,
    x_T: Tensor,
    condition,
    schedule: Schedule,
    solver: str = "ddim",
    eta: float = 0.0,
    clip: bool = True,
    generator: torch.Generator | list[torch.Generator] | None = None,
    callback: Callable[[dict], None] | None = None,
    correct: Callable[[int, Tensor], Tensor] | None = None,
) -> Tensor:
    """Denoise x_T [B,3,H,W] to an image of about [-1, 1], [B,3,H,W].

    denoiser(x_t, t [B] float original timestep, condition) -> eps. solver: "ddim" (eta 0..1), "ddpm",
    "ab2" (one evaluation a step; at least 15 steps of a "quad" grid), "heun" (two a step).
    generator draws the noise of "ddpm" and of eta > 0: one for the batch, or a list of one for each picture,
    whose noise then does not depend on the batch. callback(dict(i, n, t, x, x_0)) after each step
    may raise to stop the run. correct(i, x) -> x changes the state after step i, also the last (mean
    matching). Raises ValueError for an unknown solver and for eta with a solver other than DDIM.
    """
    _check(solver, SOLVERS, x_T)
    if eta and solver != "ddim":
        raise ValueError(f"eta belongs to the ddim solver, not to '{solver}': set eta to 0")
    steps = plan(schedule, solver, eta)
    return _run(denoiser, x_T, condition, steps, solver, clip, generator, callback, correct)


@torch.no_grad()
def invert(
    denoiser: Callable,
    x_0: Tensor,
    condition,
    schedule: Schedule,
    solver: str = "ddim",
    clip: bool = True,
    callback: Callable[[dict], None] | None = None,
) -> Tensor:
    """The noise map that `sample` with the same schedule and solver turns back into x_0 [B,3,H,W] in [-1, 1].

    solver: "ddim", "ab2" or "heun"; denoiser and callback as in `sample`.
    """
    _check(solver, ("ddim", "ab2", "heun"), x_0)
    steps = plan(schedule, solver, reverse=True)
    return _run(denoiser, x_0, condition, steps, solver, clip, None, callback, None)


@dataclass(frozen=True)
class Inversion:
    """A photo as noise, and what keeps its brightness on the way back.

    x_T    [1,3,H,W]  the noise map
    shifts [N,1,3]    added to the channels after each step of `sample` (`correct=inversion.shift`); None
                      without mean matching
    steps, solver     what it was made with; `sample` needs the same
    """

    x_T: Tensor
    shifts: Tensor | None
    steps: str
    solver: str

    def shift(self, i: int, x: Tensor) -> Tensor:
        return x if self.shifts is None else x + self.shifts[i][..., None, None].to(x)


def invert_matched(
    denoiser: Callable,
    x_0: Tensor,
    condition,
    schedule: Schedule,
    solver: str = "ddim",
    clip: bool = True,
    callback: Callable[[dict], None] | None = None,
) -> tuple[Tensor, Tensor]:
    """`invert` and one pass back that matches means: (x_T [B,3,H,W], shifts [N,B,3]).

    The means of the channels are recorded on the way to noise; on the way back each state is moved to the
    mean that it had at that level, and the move is what `sample` repeats under other conditions through
    `Inversion.shift` (Ponglertnapakorn et al. 2023, section 3.5, "mean-matching").
    """
    means = [x_0.mean((2, 3))]

    def record(info: dict) -> None:
        means.append(info["x"].mean((2, 3)))
        if callback is not None:
            callback({**info, "n": 2 * info["n"]})

    x_T = invert(denoiser, x_0, condition, schedule, solver, clip, record)
    n, shifts = len(schedule), []

    def correct(i: int, x: Tensor) -> Tensor:
        shifts.append(means[n - 1 - i] - x.mean((2, 3)))
        return x + shifts[-1][..., None, None]

    def report(info: dict) -> None:
        if callback is not None:
            callback({**info, "i": n + info["i"], "n": 2 * n})

    sample(denoiser, x_T, condition, schedule, solver, clip=clip, callback=report, correct=correct)
    return x_T, torch.stack(shifts)


def _check(solver: str, known: tuple[str, ...], x: Tensor) -> None:
    if solver not in known:
        raise ValueError(f"solver '{solver}' is not one of {', '.join(known)}")
    if x.ndim != 4 or not len(x):
        raise ValueError(f"expected images [B,3,H,W] with B of at least 1, got {list(x.shape)}")


def _run(denoiser, x, condition, steps, solver, clip, generator, callback, correct) -> Tensor:
    n, batch = len(steps), x.shape[0]
    times = torch.tensor([p.t for p in steps], dtype=torch.float32).to(x.device)[:, None].expand(n, batch)
    before = None
    for i, p in enumerate(steps):
        x_0, eps = predict(denoiser(x, times[i], condition), x, p.recip, p.s, clip)
        x = x_0 * p.a + eps * p.b
        if p.ab2:
            x.add_(eps - before, alpha=p.c * p.ab2)
        elif solver == "heun" and p.t_next >= 0:
            after = predict(denoiser(x, times[i + 1], condition), x, p.recip_next, p.s_next, clip)[1]
            x.add_(after - eps, alpha=p.c / 2)
        if p.sigma:
            x.add_(draw(x, generator), alpha=p.sigma)
        if correct is not None:
            x = correct(i, x)
        before = eps
        if callback is not None:
            callback({"i": i, "n": n, "t": p.t, "x": x, "x_0": x_0})
    return x


def predict(eps: Tensor, x: Tensor, recip: float, s: float, clip: bool) -> tuple[Tensor, Tensor]:
    """x_0 = recip x - s eps, clipped to [-1, 1], and the noise that this x_0 implies."""
    y = x * recip
    eps = eps.to(x.dtype)
    x_0 = y - eps * s
    if not clip:
        return x_0, eps
    x_0.clamp_(-1, 1)
    return x_0, y.sub_(x_0).div_(s)


def draw(x: Tensor, generator: torch.Generator | list[torch.Generator] | None) -> Tensor:
    """Normal noise like x; drawn where the generator lives, so that a CPU seed means the same everywhere.

    Of a list of generators each draws for one picture. Raises ValueError for a list of another length.
    """
    if isinstance(generator, list):
        return torch.cat([draw(one, g) for one, g in zip(x.split(1), generator, strict=True)])
    device = generator.device if generator is not None else x.device
    return torch.randn(x.shape, generator=generator, device=device, dtype=x.dtype).to(x.device)
