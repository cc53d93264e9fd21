"""The noise schedule and the training loss (Ho et al. 2020; Nichol & Dhariwal 2021; Choi et al. 2022).

Convention: level i of a schedule holds x_t = sqrt(alpha_bar[i]) x_0 + sqrt(1 - alpha_bar[i]) eps, with
alpha_bar falling as i grows; `timesteps[i]` is the original step of the 1000 that a network was trained
on, and that number is what the network is told. Images are in [-1, 1]. Tables stay float64 on the CPU.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor


@dataclass(frozen=True)
class Schedule:
    """betas [N] and alpha_bar [N] float64, timesteps [N] int64 (ascending original steps)."""

    betas: Tensor
    alpha_bar: Tensor
    timesteps: Tensor

    def __len__(self) -> int:
        return len(self.betas)

    @property
    def snr(self) -> Tensor:
        """Signal to noise alpha_bar / (1 - alpha_bar), [N]."""
        return self.alpha_bar / (1 - self.alpha_bar)

    @property
    def s(self) -> Tensor:
        """sqrt(1 / alpha_bar - 1), [N]: noise level of y = x / sqrt(alpha_bar), the ODE's time."""
        return (1 / self.alpha_bar - 1).sqrt()


def linear_schedule(steps: int = 1000) -> Schedule:
    """Linear betas, 1e-4 to 0.02 at 1000 steps (Ho et al. 2020, section 4), scaled for other lengths."""
    scale = 1000 / steps
    betas = torch.linspace(scale * 1e-4, scale * 0.02, steps, dtype=torch.float64)
    return Schedule(betas, (1 - betas).cumprod(0), torch.arange(steps))


def respace(schedule: Schedule, spec: str | int) -> Schedule:
    """Keep some levels of a schedule.

    spec: "ddimN" for an integer stride from 0 (only where it yields exactly N levels, as the DDIM paper
    uses), "N" or "N1,N2,..." for N levels spread evenly over each of equal sections, both ends kept
    (guided diffusion), "quadN" for N levels that are dense near the image (t grows quadratically, Song
    et al. 2021 appendix D.2, made strictly increasing), "" for all.
    Raises ValueError when the schedule cannot be divided so.
    """
    kept = torch.tensor(select_levels(len(schedule), str(spec).strip()))
    alpha_bar = schedule.alpha_bar[kept]
    before = torch.cat([alpha_bar.new_ones(1), alpha_bar[:-1]])
    return Schedule(1 - alpha_bar / before, alpha_bar, schedule.timesteps[kept])


def select_levels(n: int, spec: str) -> list[int]:
    """The ascending levels of 0..n-1 that `respace` keeps."""
    if not spec:
        return list(range(n))
    if spec.startswith("ddim"):
        return _stride_levels(n, _count(spec[4:], spec, n))
    if spec.startswith("quad"):
        return _quadratic_levels(n, _count(spec[4:], spec, n))
    counts = [_count(c, spec, n) for c in spec.split(",")]
    size, extra = divmod(n, len(counts))
    levels, start = [], 0
    for k, count in enumerate(counts):
        section = size + (k < extra)
        levels += [start + i for i in _even_levels(section, count, spec)]
        start += section
    return levels


def _count(text: str, spec: str, n: int) -> int:
    if not text.strip().isdecimal() or not 1 <= int(text) <= n:
        raise ValueError(f"timestep spacing '{spec}': give a count from 1 to {n}, like ddim20, 250 or quad50")
    return int(text)


def _stride_levels(n: int, count: int) -> list[int]:
    for stride in range(1, n + 1):
        if len(range(0, n, stride)) == count:
            return list(range(0, n, stride))
    raise ValueError(f"no integer stride gives {count} of {n} timesteps: use '{count}' or another ddimN")


def _even_levels(n: int, count: int, spec: str) -> list[int]:
    if count > n:
        raise ValueError(f"timestep spacing '{spec}': {count} levels do not fit in a section of {n}")
    stride = (n - 1) / (count - 1) if count > 1 else 1.0
    # summed, not multiplied: the rounding of the running sum decides which side of .5 a level falls on
    return [round(x) for x in accumulate([0.0] + [stride] * (count - 1))]


def _quadratic_levels(n: int, count: int) -> list[int]:
    if count == 1:
        return [0]
    levels = [-1]
    for i in range(count):
        levels.append(max(round((n - 1) * (i / (count - 1)) ** 2), levels[-1] + 1))
    return levels[1:]


def posterior(schedule: Schedule) -> tuple[Tensor, Tensor, Tensor]:
    """q(x_{t-1} | x_t, x_0) (Ho et al. 2020, eq. 7): weights of x_0 and x_t in its mean, variance; [N]."""
    beta, alpha_bar = schedule.betas, schedule.alpha_bar
    before = torch.cat([alpha_bar.new_ones(1), alpha_bar[:-1]])
    of_x0 = before.sqrt() * beta / (1 - alpha_bar)
    of_xt = (1 - beta).sqrt() * (1 - before) / (1 - alpha_bar)
    return of_x0, of_xt, beta * (1 - before) / (1 - alpha_bar)


def fixed_large_variance(schedule: Schedule) -> Tensor:
    """Variance of the ancestral step: beta_t, but the posterior variance of step 1 in place of the first."""
    variance = schedule.betas.clone()
    variance[0] = posterior(schedule)[2][min(1, len(variance) - 1)]
    return variance


def q_sample(x_0: Tensor, t: Tensor, noise: Tensor, schedule: Schedule) -> Tensor:
    """x_t of level t [B] int64: x_0, noise [B,3,H,W] -> [B,3,H,W]."""
    alpha_bar = schedule.alpha_bar
    return at(alpha_bar.sqrt(), t, x_0) * x_0 + at((1 - alpha_bar).sqrt(), t, x_0) * noise


def predict_x0(x_t: Tensor, t: Tensor, eps: Tensor, schedule: Schedule) -> Tensor:
    """x_0 that x_t and the noise eps imply; unclipped. Shapes as `q_sample`."""
    return at(schedule.alpha_bar.rsqrt(), t, x_t) * x_t - at(schedule.s, t, x_t) * eps


def predict_eps(x_t: Tensor, t: Tensor, x_0: Tensor, schedule: Schedule) -> Tensor:
    """The noise that x_t and x_0 imply. Shapes as `q_sample`."""
    return (at(schedule.alpha_bar.rsqrt(), t, x_t) * x_t - x_0) / at(schedule.s, t, x_t)


def p2_weight(schedule: Schedule, gamma: float, k: float = 1.0) -> Tensor:
    """Loss weight 1 / (k + snr)^gamma (Choi et al. 2022, eq. 8), [N] float64; gamma 0 is the plain loss."""
    return (k + schedule.snr) ** -gamma


def training_loss(
    denoiser: Callable,
    x_0: Tensor,
    t: Tensor,
    noise: Tensor,
    condition,
    p2_gamma: float = 0.0,
    p2_k: float = 1.0,
    schedule: Schedule | None = None,
    boost: float = 1.0,
) -> Tensor:
    """Weighted mean squared error of the predicted noise, one number a sample: [B].

    x_0, noise [B,3,H,W], t [B] int64 levels of `schedule` (linear 1000 unless given);
    denoiser(x_t, timestep [B] float, condition) -> eps. boost: weight of the noisy levels, where light is
    decided, min(1 / alpha_bar, boost): up to there the loss of v-prediction (Salimans and Ho 2022); 1: none.
    """
    schedule = schedule or linear_schedule()
    x_t = q_sample(x_0, t, noise, schedule)
    eps = denoiser(x_t, schedule.timesteps.to(t.device)[t].to(x_0.dtype), condition)
    mse = (noise - eps.to(noise.dtype)).square().flatten(1).mean(1)
    weight = p2_weight(schedule, p2_gamma, p2_k) * (1 / schedule.alpha_bar).clamp(max=boost)
    return mse * at(weight, t, mse)


def at(table: Tensor, t: Tensor, like: Tensor) -> Tensor:
    """table[t] in the dtype and on the device of `like`, shaped to broadcast against it."""
    values = table.to(like.dtype).to(t.device)[t]  # cast first: some devices have no float64
    return values.to(like.device).reshape(-1, *[1] * (like.ndim - 1))
