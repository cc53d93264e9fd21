"""DiFaReli's denoiser and relighting loop against a plain second implementation."""

import pytest
import torch

from rig_core import diffusion, samplers
from rig_core.denoisers.relight import DiFaReli, RelightConfig
from tests.plain_relight import plain_eps, plain_features, plain_relight

TINY = RelightConfig(32, 16, (1, 2, 2), 1, (16,), 2, 0.0, 8, 7, 12)


@pytest.fixture(scope="module")
def model():
    """Weights without the zeros of a fresh network."""
    torch.manual_seed(3)
    model = DiFaReli(TINY).eval().requires_grad_(False)
    for p in model.parameters():
        p.copy_(torch.randn_like(p) / max(p[0].numel(), 1) ** 0.5 if p.ndim > 1 else 0.5 + torch.rand_like(p))
    return model.to(memory_format=torch.channels_last)


def inputs(n, height=32, width=32, seed=1):
    g = torch.Generator().manual_seed(seed)
    x, spatial = (torch.randn(n, c, height, width, generator=g) for c in (3, 6))
    return x, spatial, torch.randn(n, TINY.cond_dim, generator=g)


def relative(found, wanted):
    return ((found - wanted).abs().max() / wanted.abs().max()).item()


@pytest.mark.parametrize("t", [[500, 500], [3, 250.5]])
@pytest.mark.parametrize("size", [(32, 32), (64, 40)])
def test_denoiser_equals_the_plain_one(model, t, size):
    (x, spatial, vector), t = inputs(2, *size), torch.tensor(t)
    condition, features = model.condition(spatial, vector), plain_features(model, spatial)
    for found, wanted in zip(condition.latents, features, strict=True):
        assert (found - wanted.tanh()).abs().max() < 1e-4
    wanted = plain_eps(model, x, t, list(features), vector)
    assert wanted.std() > 0.1
    assert relative(model(x, t, condition), wanted) < 1e-4


def test_each_part_of_the_condition_counts(model):
    x, spatial, vector = inputs(1)
    t = torch.tensor([300])
    eps = model(x, t, model.condition(spatial, vector))
    for other in (
        model.condition(torch.cat([-spatial[:, :3], spatial[:, 3:]], 1), vector),
        model.condition(torch.cat([spatial[:, :3], -spatial[:, 3:]], 1), vector),
        model.condition(spatial, -vector),
    ):
        assert relative(model(x, t, other), eps) > 1e-3


def test_relighting_equals_the_plain_loop(model):
    """Inversion, mean matching and two lights at once, against one after the other."""
    image, (_, spatial, vector) = inputs(1)[0].clamp(-1, 1), inputs(3, seed=2)
    schedule = diffusion.respace(diffusion.linear_schedule(), "ddim10")
    conditions = [(spatial[i : i + 1], vector[i : i + 1]) for i in range(3)]
    wanted, evaluations = plain_relight(model, image, conditions[0], conditions[1:], schedule)
    assert evaluations == 40

    condition = model.condition(spatial, vector)
    x_T, shifts = samplers.invert_matched(model, image, condition[0], schedule)
    inversion = samplers.Inversion(x_T, shifts, "ddim10", "ddim")
    found = samplers.sample(
        model, x_T.expand(2, -1, -1, -1), condition[1:], schedule, correct=inversion.shift
    )
    assert (wanted[0] - wanted[1]).abs().mean() > 1e-3
    # clamping decides single pixels
    assert (found - wanted).abs().mean() < 1e-4 and (found - wanted).abs().max() < 1e-2


def test_a_cut_loop_makes_as_many_steps_as_it_says(model):
    image, spatial, vector = inputs(1)
    schedule, condition = diffusion.linear_schedule(), (spatial, vector)
    pictures, evaluations = plain_relight(model, image, condition, [condition], schedule, steps=2)
    assert evaluations == 6 and pictures.shape == image.shape
