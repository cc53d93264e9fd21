"""The samplers against recorded runs, exact solutions for Gaussian data, and each other."""

import pytest
import torch

from rig_core import samplers as s
from rig_core.diffusion import linear_schedule, respace
from tests.golden_files import golden, small_relight, small_rig

LINEAR = linear_schedule()


def gaussian(mean, variance):
    """The exact denoiser of N(mean, variance) pixels, and the exact flow from a picture to level 999."""
    alpha_bar = LINEAR.alpha_bar

    def denoiser(x, t, condition):
        a = alpha_bar[t.long()][:, None, None, None]
        return (1 - a).sqrt() * (x - a.sqrt() * mean) / (a * variance + 1 - a)

    def to_noise(x):
        a = alpha_bar[-1]
        return a.sqrt() * mean + ((a * variance + 1 - a) / variance).sqrt() * (x - mean)

    return denoiser, to_noise


@pytest.fixture(scope="module")
def faces():
    """Gaussian pixels of different means and variances, their denoiser and exact noise."""
    g = torch.Generator().manual_seed(0)
    mean, scale = torch.rand(2, 1, 3, 8, 8, generator=g, dtype=torch.float64)
    mean, variance = 0.6 * mean - 0.3, (0.05 + 0.2 * scale) ** 2
    denoiser, to_noise = gaussian(mean, variance)
    x_0 = mean + variance.sqrt() * torch.randn(4, 3, 8, 8, generator=g, dtype=torch.float64)
    return denoiser, x_0.clamp(-1, 1), to_noise(x_0.clamp(-1, 1))


def psnr(a, b):
    return -10 * ((a - b) / 2).square().mean().log10().item()


# ------------------------------------------------------------------------------------------ recorded runs


@pytest.mark.parametrize("file", ["diffrig_single_steps", "difareli_single_steps"])
@pytest.mark.parametrize("reverse, key", [(False, "ddim_next"), (True, "ddim_reverse_next")])
def test_single_steps_as_recorded(file, reverse, key):
    t, _ = golden(file)
    schedule = respace(LINEAR, "ddim20")
    steps = s.plan(schedule, "ddim", reverse=reverse)
    for k, i in enumerate(t["index"].tolist()):
        p = steps[i if reverse else len(schedule) - 1 - i]
        assert p.t == t["timestep"][k]
        x = t["x_t"][k : k + 1].double()
        implied = (x * p.recip - t["pred_xstart"][k]) / p.s  # the noise after the clip
        found = s._run(lambda *_: implied, x, None, [p], "ddim", True, None, None, None)  # noqa: B023
        torch.testing.assert_close(found[0].float(), t[key][k].float(), rtol=0, atol=2e-5)


def test_ancestral_steps_as_recorded():
    t, _ = golden("diffrig_single_steps")
    steps = s.plan(respace(LINEAR, "ddim20"), "ddpm")[::-1]
    for k, i in enumerate(t["index"].tolist()):
        x, p = t["x_t"][k], steps[i]
        x_0, eps = s.predict((x * p.recip - t["pred_xstart"][k]) / p.s, x, p.recip, p.s, True)
        torch.testing.assert_close(x_0 * p.a + eps * p.b, t["posterior_mean"][k], rtol=0, atol=2e-5)
        wanted = (t["log_variance"][k] / 2).exp().item() if i else 0.0
        assert p.sigma == pytest.approx(wanted, rel=1e-6)


@pytest.mark.parametrize("clip, key, limit", [(True, "sample", 2e-4), (False, "sample_noclip", 1e-2)])
def test_ddim20_as_recorded(clip, key, limit):
    t, _ = golden("diffrig_ddim20")
    model = small_rig()
    with torch.no_grad():
        condition = model.condition(t["physic_cond"], t["image"])
    torch.testing.assert_close(condition.code, t["detail_cond"], rtol=0, atol=5e-5)
    found = s.sample(model, t["noise"], condition, respace(LINEAR, "ddim20"), clip=clip)
    assert (found - t[key]).abs().max() < limit
    assert (found - t[key]).abs().mean() < limit / 10


def test_ddpm_as_recorded(monkeypatch):
    t, _ = golden("diffrig_p_sample")
    noises = iter(t["step_noise"])
    monkeypatch.setattr(s, "draw", lambda x, generator: next(noises)[None])
    model = small_rig()
    with torch.no_grad():
        condition = model.condition(t["physic_cond"], code=t["detail_cond"])
    found = s.sample(model, t["noise"], condition, respace(LINEAR, "10"), solver="ddpm")
    assert (found - t["sample"]).abs().max() < 2e-4
    assert len(list(noises)) == 1  # the last step draws none


@pytest.fixture(scope="module")
def relight():
    return small_relight()


def test_difareli_steps_with_its_network_as_recorded(relight):
    t, _ = golden("difareli_network_steps")
    condition = relight.condition(t["cond_img"], t["cond_params"])
    schedule = respace(LINEAR, "ddim20")
    for reverse, key in ((False, "ddim_next"), (True, "ddim_reverse_next")):
        steps = s.plan(schedule, "ddim", reverse=reverse)
        for k, i in enumerate(t["index"].tolist()):
            p = steps[i if reverse else len(schedule) - 1 - i]
            seen, x = [], t["x_t"][k : k + 1].double()
            found = s._run(relight, x, condition, [p], "ddim", True, None, seen.append, None)
            torch.testing.assert_close(found[0].float(), t[key][k], rtol=0, atol=2e-5)
            # at the noisiest levels x_0 is the network's rounding many times over
            torch.testing.assert_close(seen[0]["x_0"][0].float(), t["pred_xstart"][k], rtol=0, atol=3e-3)
            assert (seen[0]["x_0"][0] - t["pred_xstart"][k]).abs().mean() < 5e-6


@pytest.mark.parametrize("spec", ["ddim10", pytest.param("20", marks=pytest.mark.slow)])
def test_difareli_relight_as_recorded(relight, spec):
    """Inversion with its means, the pass that matches them, and the relit frames, step for step in float64.

    The limits are ten times what two runs of the published code with other convolutions differ by.
    """
    t, _ = golden(f"difareli_relight_{spec}")
    condition = relight.condition(t["cond_img"], t["cond_params"])
    schedule, image = respace(LINEAR, spec), t["image"].double()
    n, path = len(schedule), []

    def record(info):
        path.append(info["x"].clone())

    x_T, shifts = s.invert_matched(relight, image, condition[0], schedule, callback=record)
    assert len(path) == 2 * n and shifts.shape == (n, 1, 3)

    def near(found, wanted, most, mean):
        error = (found - wanted).abs()
        assert error.max() < most and error.mean() < mean

    near(x_T, t["noise_map"], 1e-4, 1e-5)
    means = torch.cat([image.mean((2, 3)), *(x.mean((2, 3)) for x in path[:n])])
    near(means, t["rev_mean_inversion"], 3e-6, 1e-6)
    if "rev_traj" in t:
        near(torch.cat(path[:n]), t["rev_traj"], 1e-4, 1e-5)
    near(shifts.flip(0)[:, 0], t["rev_mean_corrected"][:n], 1e-5, 3e-6)
    near(path[-1], t["recon_mean_matched"], 3e-3, 3e-4)  # the second pass is that reconstruction
    inversion = s.Inversion(x_T, shifts, spec, "ddim")
    again = s.sample(relight, x_T, condition[0], schedule, correct=inversion.shift)
    torch.testing.assert_close(again, path[-1], rtol=0, atol=1e-12)
    near(s.sample(relight, x_T, condition[0], schedule), t["recon_plain"], 3e-3, 3e-4)
    frames = x_T.expand(3, -1, -1, -1)
    near(s.sample(relight, frames, condition, schedule, correct=inversion.shift), t["relit"], 3e-3, 2e-4)
    plain = s.sample(relight, x_T, condition[2], schedule)
    near(plain, t["relit_last_no_mean_matching"], 3e-3, 2e-4)


# ------------------------------------------------------------------------------------------- exact answers


@pytest.mark.parametrize("solver", ["ddim", "ab2", "heun"])
def test_converges_to_the_exact_solution(faces, solver):
    denoiser, x_0, x_T = faces
    errors = []
    for n in (25, 50, 100):
        found = s.sample(denoiser, x_T, None, respace(LINEAR, f"quad{n}"), solver)
        errors.append((found - x_0).square().mean().sqrt().item())
    order = [torch.tensor(a / b).log2().item() for a, b in zip(errors, errors[1:])]
    if solver == "ddim":
        assert 0.8 < min(order) and max(order) < 1.3
    else:
        assert order[0] > 1.5  # the second halving meets the end points' own error of some 1e-4
    assert errors[-1] < {"ddim": 5e-3, "ab2": 5e-4, "heun": 1e-3}[solver]


def test_second_order_beats_ddim_at_the_same_cost(faces):
    denoiser, x_0, _ = faces
    quality = {}
    for solver, spec in [("ddim", "quad50"), ("ab2", "quad50"), ("heun", "quad25"), ("ddim", "50")]:
        schedule = respace(LINEAR, spec)
        x_T = s.invert(denoiser, x_0, None, schedule, solver)
        quality[solver, spec] = psnr(s.sample(denoiser, x_T, None, schedule, solver), x_0)
    assert quality["ab2", "quad50"] > quality["ddim", "quad50"] + 15
    assert quality["heun", "quad25"] > quality["ddim", "quad50"] + 10
    assert quality["ddim", "quad50"] > quality["ddim", "50"]
    assert quality["ab2", "quad50"] > 60


def test_a_point_distribution_is_hit_exactly():
    picture = torch.rand(1, 3, 4, 4, dtype=torch.float64) * 2 - 1
    denoiser, _ = gaussian(picture, torch.zeros(()))
    x_T = torch.randn(2, 3, 4, 4, dtype=torch.float64)
    for solver in s.SOLVERS:
        found = s.sample(denoiser, x_T, None, respace(LINEAR, "quad20"), solver)
        torch.testing.assert_close(found, picture.expand(2, 3, 4, 4), rtol=0, atol=1e-9)


@pytest.mark.parametrize("solver, eta", [("ddpm", 0.0), ("ddim", 1.0), ("ddim", 0.5), ("ddim", 0.0)])
def test_samples_have_the_datas_statistics(solver, eta):
    denoiser, _ = gaussian(0.2, 0.09)
    g = torch.Generator().manual_seed(5)
    x_T = torch.randn(8, 3, 64, 64, generator=g, dtype=torch.float64)
    x = s.sample(denoiser, x_T, None, respace(LINEAR, "250"), solver, eta, clip=False, generator=g)
    assert x.mean().item() == pytest.approx(0.2, abs=0.005)
    # the posterior variance (eta = 1) is a lower bound: 250 steps come out a little narrow
    assert x.std().item() == pytest.approx(0.3, abs=0.015)


def test_eta_one_is_ancestral_sampling_with_the_posterior_variance():
    schedule = respace(LINEAR, "ddim20")
    eta_one, ddpm = s.plan(schedule, "ddim", eta=1.0), s.plan(schedule, "ddpm")
    for p, q in zip(eta_one, ddpm):
        assert p.a == pytest.approx(q.a, rel=1e-9)
        assert p.b == pytest.approx(q.b, rel=1e-6, abs=1e-9)
        assert p.sigma <= q.sigma + 1e-12  # FIXED_LARGE is the upper bound


# ------------------------------------------------------------------------------------- levels and behaviour


def test_end_points():
    schedule = respace(LINEAR, "ddim20")
    forth, back = s.plan(schedule, "ddim"), s.plan(schedule, "ddim", reverse=True)
    assert [p.t for p in forth] == [p.t for p in back][::-1] == list(range(950, -1, -50))
    assert (forth[-1].a, forth[-1].b) == (1.0, 0.0)
    assert (back[-1].a, back[-1].b) == (0.0, 1.0)
    for solver in ("ab2", "heun"):
        assert s.plan(schedule, solver, reverse=True)[-1].ab2 == 0


def test_clipping_comes_before_the_noise():
    x = torch.full((1, 3, 2, 2), 0.9)
    x_0, eps = s.predict(torch.full_like(x, -3.0), x, 1.25, 0.75, True)
    assert torch.equal(x_0, torch.ones_like(x))
    torch.testing.assert_close(eps, torch.full_like(x, (0.9 * 1.25 - 1) / 0.75))
    x_0, eps = s.predict(torch.full_like(x, -3.0), x, 1.25, 0.75, False)
    torch.testing.assert_close(x_0, torch.full_like(x, 0.9 * 1.25 + 2.25))
    assert (eps == -3).all()


def test_denoiser_gets_original_timesteps_of_the_whole_batch():
    calls = []

    def denoiser(x, t, condition):
        assert t.dtype == torch.float32 and t.shape == (3,) and condition == "c"
        calls.append(t[0].item())
        return torch.zeros_like(x)

    x = torch.zeros(3, 3, 2, 2)
    schedule = respace(LINEAR, "ddim5")
    s.sample(denoiser, x, "c", schedule)
    assert calls == [800, 600, 400, 200, 0]
    calls.clear()
    s.invert(denoiser, x, "c", schedule, "heun")
    assert calls == [0, 200, 200, 400, 400, 600, 600, 800, 800]


def test_inputs_are_left_alone_and_batches_are_independent(faces):
    denoiser, x_0, x_T = faces
    kept, schedule = x_T.clone(), respace(LINEAR, "quad15")
    for solver in ("ddim", "ab2", "heun"):
        together = s.sample(denoiser, x_T, None, schedule, solver)
        alone = s.sample(denoiser, x_T[2:3], None, schedule, solver)
        torch.testing.assert_close(together[2:3], alone, rtol=0, atol=1e-12)
    assert torch.equal(x_T, kept)


def test_callback_sees_each_step_and_may_stop_the_run(faces):
    denoiser, x_0, x_T = faces
    seen = []
    found = s.sample(denoiser, x_T, None, respace(LINEAR, "ddim5"), callback=seen.append)
    assert [(c["i"], c["n"], c["t"]) for c in seen] == [(i, 5, 800 - 200 * i) for i in range(5)]
    assert torch.equal(seen[-1]["x"], found) and torch.equal(seen[-1]["x_0"], found)

    def stop(c):
        if c["i"] == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        s.invert(denoiser, x_0, None, respace(LINEAR, "ddim5"), callback=stop)


def test_correction_comes_after_every_step(faces):
    denoiser, _, x_T = faces
    plain = s.sample(denoiser, x_T, None, respace(LINEAR, "ddim5"))
    done = []

    def correct(i, x):
        done.append(i)
        return x + 3 if i == 4 else x

    found = s.sample(denoiser, x_T, None, respace(LINEAR, "ddim5"), correct=correct)
    assert done == [0, 1, 2, 3, 4]
    torch.testing.assert_close(found, plain + 3)  # the clip is over by then


@pytest.mark.parametrize("solver", ["ddim", "ab2", "heun"])
def test_matched_means_are_those_of_the_way_to_noise(faces, solver):
    denoiser, x_0, _ = faces
    schedule, seen = respace(LINEAR, "quad15"), []
    x_T, shifts = s.invert_matched(denoiser, x_0, None, schedule, solver, callback=seen.append)
    assert torch.equal(x_T, s.invert(denoiser, x_0, None, schedule, solver))
    assert [c["i"] for c in seen] == list(range(30)) and {c["n"] for c in seen} == {30}
    means = [x_0.mean((2, 3)), *(c["x"].mean((2, 3)) for c in seen[:14])]
    for c, mean in zip(seen[15:], means[::-1]):
        torch.testing.assert_close(c["x"].mean((2, 3)), mean, rtol=0, atol=1e-12)
    inversion = s.Inversion(x_T, shifts, "quad15", solver)
    moved = s.sample(denoiser, x_T, None, schedule, solver, correct=inversion.shift)
    torch.testing.assert_close(moved, seen[-1]["x"], rtol=0, atol=1e-12)
    plain = s.sample(denoiser, x_T, None, schedule, solver)
    assert (plain - x_0).mean((2, 3)).abs().max() > (moved - x_0).mean((2, 3)).abs().max()
    assert (moved - x_0).mean((2, 3)).abs().max() < 1e-12


def test_inversion_without_matching_shifts_nothing(faces):
    x_T = faces[2]
    assert s.Inversion(x_T, None, "20", "ddim").shift(3, x_T) is x_T
    shifts = torch.arange(6.0, dtype=torch.float64).reshape(2, 1, 3)
    moved = s.Inversion(x_T[:1], shifts, "2", "ddim").shift(1, x_T.float())  # one photo, many lights
    torch.testing.assert_close(
        moved - x_T.float(), torch.tensor([3.0, 4, 5])[:, None, None].expand(4, 3, 8, 8)
    )
    assert moved.dtype == torch.float32


def test_noise_follows_the_generator(faces):
    denoiser, _, x_T = faces

    def draw(seed):
        g = torch.Generator().manual_seed(seed)
        return s.sample(denoiser, x_T, None, respace(LINEAR, "ddim5"), "ddpm", generator=g)

    assert torch.equal(draw(1), draw(1)) and not torch.equal(draw(1), draw(2))


def test_half_precision_denoiser_keeps_the_state_in_float32(faces):
    _, x_0, _ = faces
    schedule = respace(LINEAR, "ddim20")
    found = s.invert(lambda x, t, c: x.bfloat16(), x_0.float(), None, schedule)
    assert found.dtype == torch.float32 and found.isfinite().all()


def test_wrong_requests_say_so():
    x, schedule = torch.zeros(1, 3, 2, 2), respace(LINEAR, "ddim5")
    with pytest.raises(ValueError, match="not one of ddim, ddpm, ab2, heun"):
        s.sample(None, x, None, schedule, "euler")
    with pytest.raises(ValueError, match="not one of ddim, ab2, heun"):
        s.invert(None, x, None, schedule, "ddpm")
    with pytest.raises(ValueError, match="eta belongs to the ddim solver"):
        s.sample(None, x, None, schedule, "ab2", eta=0.5)
    with pytest.raises(ValueError, match="B of at least 1"):
        s.sample(None, x[:0], None, schedule)
