from functools import partial

import pytest
import torch

from rig_core import checkpoints, diffusion, pipeline
from rig_core.denoisers.relight import DiFaReli, RelightCondition, RelightConfig
from training import evaluate_pairs, evaluate_solvers
from training.evaluate_solvers import Job, Way

SIZE = 32
FINE = Way("DDIM, 300 even", "ddim", "300")
MATCHED = Way("DDIM, 100 even, means matched", "ddim", "100", match=True)


class Gaussian(torch.nn.Module):
    """The exact denoiser of pictures of one mean, the condition's only latent, and spread 0.2."""

    def forward(self, x_t, t, condition):
        alpha_bar = diffusion.linear_schedule().alpha_bar[t.long()].to(x_t)[:, None, None, None]
        mean, spread = condition.latents[0], 0.2**2
        gain = alpha_bar.sqrt() * spread / (alpha_bar * spread + 1 - alpha_bar)
        x_0 = mean + gain * (x_t - alpha_bar.sqrt() * mean)
        return (x_t - alpha_bar.sqrt() * x_0) / (1 - alpha_bar).sqrt()


def conditioned(*means):
    latent = torch.tensor(means)[:, None, None, None].expand(-1, 3, 4, 4)
    return RelightCondition(torch.zeros(len(means), 1), (latent,))


@pytest.fixture
def gaussian_job():
    """Two pictures around their means; the relit ones keep what distinguishes them from the mean."""
    texture = 0.2 * torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0)).clamp(-2, 2)
    own, new = torch.tensor([0.1, -0.2]), torch.tensor([-0.1, 0.0])
    truth = (texture + new[:, None, None, None]) / 2 + 0.5
    mask = torch.ones(2, 1, 4, 4)
    mask[1] = 0  # a photo, without a truth
    image = texture + own[:, None, None, None]
    return Job(image, conditioned(*own.tolist()), conditioned(*new.tolist()), truth, mask)


def test_rows_of_an_exact_denoiser(gaussian_job, monkeypatch):
    """More steps come nearer to the reference, the picture and the truth; AB2 beats DDIM at equal cost."""
    monkeypatch.setattr(evaluate_solvers, "REFERENCE", FINE)
    monkeypatch.setattr(evaluate_solvers, "OFFICIAL", MATCHED)
    ways = (Way("coarse", "ddim", "20"), Way("finer", "ddim", "100"), Way("ab2", "ab2", "quad20"))
    rows = {r[0]: r[1:] for r in evaluate_solvers.compare(Gaussian(), gaussian_job, ways)}
    assert list(rows) == ["coarse", "finer", "ab2", FINE.name, MATCHED.name]
    assert [r[0] for r in rows.values()] == [40, 200, 40, 600, 300]
    back, agreement, matched, error = (dict(zip(rows, c)) for c in list(zip(*rows.values()))[1:5])
    assert back["coarse"] < back["finer"] < back[FINE.name] and back["coarse"] < back["ab2"]
    assert agreement["coarse"] < agreement["finer"] and agreement[FINE.name] is None
    assert matched[MATCHED.name] is None and matched[FINE.name] > 30
    assert error[FINE.name] > 40 and error["coarse"] < error[FINE.name]


def test_heun_and_matching_are_counted(gaussian_job):
    heun = evaluate_solvers.run(Gaussian(), gaussian_job, Way("", "heun", "quad20"))
    assert heun.evaluations == 2 * (2 * 20 - 1)
    matched = evaluate_solvers.run(Gaussian(), gaussian_job, MATCHED)
    # with the corrections the means of the channels come back exactly
    want = gaussian_job.image / 2 + 0.5
    assert torch.allclose(matched.back.mean((2, 3)), want.mean((2, 3)), atol=1e-5)


def test_clipping_is_a_part_of_the_way(gaussian_job):
    bright = Job(
        gaussian_job.image + 0.9, *[getattr(gaussian_job, k) for k in ("own", "new", "truth", "head")]
    )
    a, b = (evaluate_solvers.run(Gaussian(), bright, Way("", "ab2", "quad20", clip=c)) for c in (True, False))
    assert (a.relit - b.relit).abs().max() > 0.01


def test_cache_serves_the_same_weights_and_pictures_only(gaussian_job, tmp_path, monkeypatch):
    model, way, cache = Gaussian(), Way("coarse", "ddim", "20"), tmp_path / "cache.safetensors"
    model.register_buffer("weight", torch.zeros(1))
    first = evaluate_solvers.kept(model, gaussian_job, way, cache)
    other = evaluate_solvers.kept(model, gaussian_job, Way("fine", "ddim", "50"), cache)
    runs = []
    monkeypatch.setattr(evaluate_solvers, "run", lambda *args: runs.append(args) or first)
    again = evaluate_solvers.kept(model, gaussian_job, way, cache)
    assert not runs and torch.equal(again.relit, first.relit) and again.evaluations == 40
    assert again.seconds == first.seconds and not torch.equal(again.relit, other.relit)
    model.weight.fill_(1)
    evaluate_solvers.kept(model, gaussian_job, way, cache)
    model.weight.fill_(0)
    moved = Job(
        gaussian_job.image * 0.9, *[getattr(gaussian_job, k) for k in ("own", "new", "truth", "head")]
    )
    evaluate_solvers.kept(model, moved, way, cache)
    assert len(runs) == 2


def test_flicker_of_known_frames():
    """Frames that move by half of their references, but one step that jumps."""
    references = torch.sin(torch.arange(8) * torch.pi / 4)[:, None, None, None].expand(8, 3, 4, 4)
    mask = torch.zeros(1, 1, 4, 4)
    mask[..., :2, :] = 1
    frames = 0.5 + references / 2
    frames = torch.where(mask > 0, frames, torch.rand(8, 3, 4, 4))
    moved, turned = evaluate_solvers.flicker(frames, references, mask)
    assert torch.allclose(moved, turned / 2, atol=1e-6)
    frames = frames.clone()
    frames[3] += 0.3
    jumped, _ = evaluate_solvers.flicker(frames, references, mask)
    ratio = jumped / turned.clamp_min(1e-6)
    assert (jumped > moved + 0.05).nonzero().flatten().tolist() == [3]
    assert ratio.max() / ratio.mean() > 1.3


def test_rows_and_orbit_of_a_tiny_model(monkeypatch):
    """Everything from rendering to the tables with a random network."""
    torch.manual_seed(0)
    model = DiFaReli(RelightConfig(SIZE, 16, (1, 2), 1, (), 1, 0.0, 8, cond_dim=241, proj_dim=8))
    for p in model.parameters():  # a fresh network ends in zeros
        if not p.any():
            torch.nn.init.normal_(p, std=0.02)
    model.eval().requires_grad_(False)
    monkeypatch.setattr(pipeline, "to_noise", partial(pipeline.to_noise, steps="quad5", solver="heun"))
    rest = checkpoints.load_identity(), checkpoints.load_shadow()
    tools = evaluate_pairs.Tools(checkpoints.load_head(), None, model, *rest)
    portraits, lights, truths = evaluate_solvers.pictures(tools, 2, None)
    made = evaluate_solvers.job(tools, portraits, lights, truths)
    assert len(made.own) == len(made.new) == len(made.image) == 2
    assert not torch.equal(made.own.latents[0], made.new.latents[0])
    alone = evaluate_solvers.job(tools, portraits[1:], lights[1:], [None])
    assert torch.equal(alone.new.gain[0], made.new.gain[1]) and not alone.head.any()
    ways = (Way("5", "heun", "quad5"),)
    monkeypatch.setattr(evaluate_solvers, "REFERENCE", Way("20", "ddim", "20"))
    monkeypatch.setattr(evaluate_solvers, "OFFICIAL", Way("20 m", "ddim", "20", match=True))
    rows = evaluate_solvers.compare(model, made, ways)
    assert [len(r) for r in rows] == [len(evaluate_solvers.HEADER)] * 3
    rows = evaluate_solvers.orbit(tools, portraits[:1], 4)
    assert len(rows) == 4 and all(torch.tensor(r[1:]).isfinite().all() for r in rows)
