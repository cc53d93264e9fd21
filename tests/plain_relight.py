"""DiFaReli's denoiser, Modulator and relighting loop once more, straight from their description.

Nothing is kept from one step to the next that a plain reading of the paper would not keep: each step gets a
deep copy of the Modulator's features, because the network empties the list; it takes their tanh, runs the
vector through every block's MLP, moves each coefficient to the device for itself, forms the posterior and
draws noise that eta = 0 multiplies away. It is the independent check of rig_core.denoisers.relight and
what the benchmark measures the pack against.
"""

import copy

import numpy as np
import torch
import torch.nn.functional as F

from tests.plain_unet import below, conv, count, embed_time, norm, run


def plain_features(model, spatial):
    """The Modulator's features, finest first, from [N,6,H,W]; before the tanh."""
    w, h, features = below(model, "ImgEncoder."), spatial, []
    for i in range(count(w, "input_blocks")):
        name = f"input_blocks.{i}"
        h = run(w, name, h, None, None, model.config, None) if i else conv(w, f"{name}.0", h)
        features.append(h)
    return [*features, run(w, "middle_block", h, None, None, model.config, None)]


def plain_eps(model, x, t, features, vector):
    """eps [B,3,H,W]: x [B,3,H,W], t [B], vector [B,D]. Takes the features out of their list."""
    w, config = below(model, "ImgCond."), model.config

    def modulated(h):
        return h * torch.tanh(features.pop(0))

    emb = embed_time(w, t, x.dtype)
    h = conv(w, "input_blocks.0.0", x)
    hs = [h]
    for i in range(1, count(w, "input_blocks")):
        h = run(w, f"input_blocks.{i}", modulated(h), emb, vector, config, None)
        hs.append(h)
    h = modulated(run(w, "middle_block", modulated(h), emb, vector, config, None))
    for i in range(count(w, "output_blocks")):
        h = run(w, f"output_blocks.{i}", torch.cat([h, hs.pop()], dim=1), emb, vector, config, "up")
    return conv(w, "out.2", F.silu(norm(w, "out.0", h, config)))


class Tables:
    """The coefficients of a schedule (diffusion.Schedule) as float64 arrays, one entry a level."""

    def __init__(self, schedule):
        bar = schedule.alpha_bar.numpy()
        self.timesteps = schedule.timesteps.numpy()
        self.alpha_bar, self.betas = bar, schedule.betas.numpy()
        self.before, self.after = np.append(1.0, bar[:-1]), np.append(bar[1:], 0.0)
        self.recip, self.recip_less_1 = np.sqrt(1 / bar), np.sqrt(1 / bar - 1)
        self.mean_x_0 = self.betas * np.sqrt(self.before) / (1 - bar)
        self.mean_x_t = (1 - self.before) * np.sqrt(1 - self.betas) / (1 - bar)
        posterior = self.betas * (1 - self.before) / (1 - bar)
        self.variance = np.append(posterior[1], self.betas[1:])


def at(array, level, x):
    """One coefficient a picture, in the shape of the pictures."""
    return torch.from_numpy(array).to(x.device)[level].float()[:, None, None, None].expand(x.shape)


def predict(model, tables, x, level, features, vector):
    """Clipped x_0, and the posterior mean and variance of an ancestral step."""
    t = torch.from_numpy(tables.timesteps).to(x.device)[level]
    eps = plain_eps(model, x, t, copy.deepcopy(features), vector)
    x_0 = (at(tables.recip, level, x) * x - at(tables.recip_less_1, level, x) * eps).clamp(-1, 1)
    mean = at(tables.mean_x_0, level, x) * x_0 + at(tables.mean_x_t, level, x) * x
    return x_0, mean, at(tables.variance, level, x), torch.log(at(tables.variance, level, x))


def implied(tables, x, level, x_0):
    return (at(tables.recip, level, x) * x - x_0) / at(tables.recip_less_1, level, x)


def step_back(model, tables, x, level, features, vector):
    """One DDIM step towards the picture, eta 0."""
    x_0 = predict(model, tables, x, level, features, vector)[0]
    eps, eta = implied(tables, x, level, x_0), 0.0
    bar, before = at(tables.alpha_bar, level, x), at(tables.before, level, x)
    sigma = eta * torch.sqrt((1 - before) / (1 - bar)) * torch.sqrt(1 - bar / before)
    mean = x_0 * torch.sqrt(before) + torch.sqrt(1 - before - sigma**2) * eps
    nonzero = (level != 0).float()[:, None, None, None]
    return mean + nonzero * sigma * torch.randn_like(x)


def step_on(model, tables, x, level, features, vector):
    """One DDIM step towards noise."""
    x_0 = predict(model, tables, x, level, features, vector)[0]
    after = at(tables.after, level, x)
    return x_0 * torch.sqrt(after) + torch.sqrt(1 - after) * implied(tables, x, level, x_0)


def plain_relight(model, image, own, others, schedule, steps=None):
    """Three passes and one more for each further light: invert, match the means, relight.

    image [1,3,H,W] -1..1; own and others: (spatial [1,6,H,W], vector [1,D]) of the photo's light and of each
    wanted one. Returns the pictures and how often the denoiser was evaluated. steps: end each pass after so
    many, to learn what a step costs; the pictures are then of no use.
    """
    tables, n = Tables(schedule), len(schedule)
    steps = n if steps is None else steps
    levels = [torch.full((len(image),), i, device=image.device) for i in range(n)]

    features, x, means = plain_features(model, own[0]), image, [image.mean((2, 3), keepdim=True)]
    for level in levels[:steps]:
        x = step_on(model, tables, x, level, features, own[1])
        means.append(x.mean((2, 3), keepdim=True))
    noise, shifts = x, []

    features = plain_features(model, own[0])
    for level in levels[::-1][:steps]:
        x = step_back(model, tables, x, level, features, own[1])
        shifts.append(means[min(int(level), steps)] - x.mean((2, 3), keepdim=True))
        x = x + shifts[-1]

    pictures = []
    for spatial, vector in others:
        x, features = noise, plain_features(model, spatial)
        for level, shift in zip(levels[::-1], shifts):
            x = step_back(model, tables, x, level, features, vector) + shift
        pictures.append(x)
    return torch.cat(pictures), (2 + len(others)) * steps
