"""The noise schedule and the loss against recorded tables, formulas and closed cases."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rig_core import diffusion as d
from tests.golden_files import golden, small_rig

TABLES = golden("schedule_linear1000")[0]
LINEAR = d.linear_schedule()


def close(found, wanted, rtol=1e-12):
    torch.testing.assert_close(found, wanted, rtol=rtol, atol=1e-15)


def test_linear_tables():
    close(LINEAR.betas, TABLES["betas"])
    close(LINEAR.alpha_bar, TABLES["alphas_cumprod"])
    close(LINEAR.snr, TABLES["snr"])
    close(d.fixed_large_variance(LINEAR), TABLES["fixed_large_variance"])
    close(d.p2_weight(LINEAR, 1.0, 1.0), TABLES["p2_weight_gamma1.0_k1.0"])
    of_x0, of_xt, variance = d.posterior(LINEAR)
    close(of_x0, TABLES["posterior_mean_coef1"])
    close(of_xt, TABLES["posterior_mean_coef2"])
    close(variance, TABLES["posterior_variance"])


@pytest.mark.parametrize("spec", ["ddim10", "ddim20", "ddim50", "20", "250"])
def test_respacing_tables(spec):
    s = d.respace(LINEAR, spec)
    assert torch.equal(s.timesteps, TABLES[f"resp.{spec}.timestep_map"])
    close(s.betas, TABLES[f"resp.{spec}.betas"])
    close(s.alpha_bar, TABLES[f"resp.{spec}.alphas_cumprod"])
    for found, key in zip(d.posterior(s), ("mean_coef1", "mean_coef2", "variance")):
        close(found, TABLES[f"resp.{spec}.posterior_{key}"])


def test_respacing_by_hand():
    assert d.select_levels(10, "ddim5") == [0, 2, 4, 6, 8]
    assert d.select_levels(10, "2,3") == [0, 4, 5, 7, 9]
    assert d.select_levels(11, "1,1") == [0, 6]  # the first section takes the odd level
    assert d.select_levels(1000, "quad5") == [0, 62, 250, 562, 999]
    assert d.select_levels(1000, "quad50")[:6] == [0, 1, 2, 4, 7, 10]
    assert d.select_levels(4, "") == [0, 1, 2, 3]
    assert d.respace(LINEAR, 1).timesteps.tolist() == [0]


@pytest.mark.parametrize(
    "spec", ["ddim37", "ddim300", "ddim0", "0", "1001", "fast", "quad", "10,,10", "600,10", "-5", "ddim"]
)
def test_impossible_spacing_says_so(spec):
    with pytest.raises(ValueError, match=r"ddim|levels|spacing"):
        d.respace(LINEAR, spec)


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(["", "quad"]), st.integers(1, 1000))
def test_spacing_keeps_count_order_and_ends(kind, count):
    levels = d.select_levels(1000, f"{kind}{count}")
    assert len(levels) == count and levels[0] == 0 and levels == sorted(set(levels))
    assert count == 1 or levels[-1] == 999


def test_respacing_twice_keeps_the_original_timesteps():
    s = d.respace(d.respace(LINEAR, "ddim100"), "ddim20")
    assert s.timesteps.tolist() == list(range(0, 1000, 50))
    close(s.alpha_bar, LINEAR.alpha_bar[::50])


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 999), st.integers(0, 2**31))
def test_eps_and_x0_are_inverse(level, seed):
    g = torch.Generator().manual_seed(seed)
    x_0, noise = torch.randn(2, 2, 3, 4, 4, generator=g, dtype=torch.float64)
    t = torch.tensor([level, 999 - level])
    x_t = d.q_sample(x_0, t, noise, LINEAR)
    torch.testing.assert_close(d.predict_x0(x_t, t, noise, LINEAR), x_0, rtol=0, atol=1e-9)
    torch.testing.assert_close(d.predict_eps(x_t, t, x_0, LINEAR), noise, rtol=0, atol=1e-9)


def test_q_sample_has_the_schedules_statistics():
    x_0 = torch.full((4, 3, 64, 64), 0.5)
    t = torch.tensor([0, 300, 700, 999])
    x_t = d.q_sample(x_0, t, torch.randn(x_0.shape, generator=torch.Generator().manual_seed(3)), LINEAR)
    a = LINEAR.alpha_bar[t].float()
    torch.testing.assert_close(x_t.mean((1, 2, 3)), 0.5 * a.sqrt(), rtol=0, atol=0.03)
    torch.testing.assert_close(x_t.var((1, 2, 3)), 1 - a, rtol=0.03, atol=0)


def test_p2_limits():
    assert torch.equal(d.p2_weight(LINEAR, 0.0), torch.ones(1000, dtype=torch.float64))
    close(d.p2_weight(LINEAR, 1.0), 1 - LINEAR.alpha_bar)  # k = 1: 1 / (1 + snr)
    close(d.p2_weight(LINEAR, 2.0, 0.5), (0.5 + LINEAR.snr) ** -2)


def test_training_loss_by_hand():
    x_0, noise = torch.zeros(2, 3, 4, 4), torch.ones(2, 3, 4, 4)
    seen = {}

    def denoiser(x_t, t, condition):
        seen.update(x_t=x_t, t=t, condition=condition)
        return torch.full_like(x_t, 0.5)

    schedule = d.respace(LINEAR, "ddim20")
    loss = d.training_loss(denoiser, x_0, torch.tensor([0, 19]), noise, "c", 1.0, 1.0, schedule)
    assert seen["t"].tolist() == [0.0, 950.0] and seen["condition"] == "c"
    noise_level = (1 - LINEAR.alpha_bar[[0, 950]]).float()
    torch.testing.assert_close(seen["x_t"][:, 0, 0, 0], noise_level.sqrt())
    torch.testing.assert_close(loss, 0.25 * noise_level)  # 1 / (1 + snr) = 1 - alpha_bar


@pytest.mark.parametrize("mode", ["eval", "train"])
@pytest.mark.parametrize("gamma, kind", [(1.0, "p2"), (0.0, "plain")])
def test_training_loss_as_recorded(mode, gamma, kind):
    t, meta = golden("diffrig_training_losses")
    model = small_rig().train(mode == "train")
    condition = model.condition(t["physic_cond"], t["x_start"])
    loss = d.training_loss(model, t["x_start"], t["t"], t["noise"], condition, gamma)
    torch.testing.assert_close(loss, t[f"loss_{mode}_{kind}"], rtol=2e-4, atol=0)
    loss.mean().backward()
    wanted = meta["grad_norms_of_mean_loss"][f"{mode}_{kind}"]
    norms = {k: p.grad.norm() for k, p in model.named_parameters()}
    norms["total"] = torch.stack([*norms.values()]).norm()
    assert {k: norms[k].item() for k in wanted} == pytest.approx(wanted, rel=1e-3)
