"""The ratio image, and the relight that starts from it."""

import pytest
import torch

from rig_core import checkpoints, conditions, diffusion, pipeline, ratio, samplers, sh
from rig_core.align import Crop
from training import synth
from training.measures import psnr

SIZE = 64


@pytest.fixture(scope="module")
def head():
    return checkpoints.load_head()


@pytest.fixture(scope="module")
def scene(head):
    """A rendered portrait, its subject without any estimator, and the same person under another light."""
    a, b = synth.render([910_000], SIZE), synth.render([910_000], SIZE, light=[910_001])
    matte = ((a.head + a.hair) > 0.5).float()
    portrait = pipeline.Portrait(a.image, Crop(torch.eye(3)[None], SIZE), a.code)
    subject = pipeline.Subject(
        conditions.background(a.image, matte), torch.zeros(1, 4), torch.zeros(1, 1), matte
    )
    return portrait, subject, b, a.skin


class Still:
    """A denoiser that finds no noise in anything: inversion and sampling leave a picture as it is."""

    class config:
        image_size = SIZE

    def __init__(self):
        self.asked = []

    def condition(self, spatial, vector):
        self.asked.append((spatial, vector))
        return range(max(len(spatial), len(vector)))

    def __call__(self, x_t, t, condition):
        return torch.zeros_like(x_t)


def test_the_same_light_changes_nothing(head, scene):
    portrait, subject, _, _ = scene
    same = ratio.ratio_image(head, portrait.image, portrait.code, portrait.code.light, subject.matte)
    assert torch.equal(same, portrait.image)


def test_twice_the_light_is_twice_the_picture(head, scene):
    portrait, subject, _, _ = scene
    image = portrait.image * 0.3
    light = torch.cat([2 * portrait.code.light, 0.5 * portrait.code.light])
    out = ratio.ratio_image(head, image, portrait.code, light, subject.matte)
    inside = torch.nn.functional.avg_pool2d(subject.matte, 9, 1, 4) == 1
    face = (conditions.draw(head, portrait.code, SIZE).normal[:, 2:] > 0.3) & inside
    gain = out / image.clamp_min(1e-6)
    lit = face & (sh.shade(conditions.draw(head, portrait.code, SIZE).normal, portrait.code.light) > 0.2).all(
        1, keepdim=True
    )
    lit = torch.nn.functional.avg_pool2d(lit.float(), 5, 1, 2) == 1
    assert lit.sum() > 100
    for k, factor in enumerate((2.0, 0.5)):
        assert gain[k : k + 1][lit.expand(-1, 3, -1, -1)] == pytest.approx(factor, rel=0.02)


def test_away_from_the_head_nothing_changes(head, scene):
    portrait, subject, other, _ = scene
    out = ratio.ratio_image(head, portrait.image, portrait.code, other.code.light, subject.matte)
    drawn = (conditions.draw(head, portrait.code, SIZE).fragments.mask > 0).float()
    far = torch.nn.functional.max_pool2d(torch.maximum(subject.matte, drawn), 15, 1, 7) == 0
    assert far.any()
    far = far.expand(-1, 3, -1, -1)
    assert torch.equal(out[far], portrait.image[far])


def test_it_comes_close_to_the_true_picture(head, scene):
    portrait, subject, other, skin = scene
    out = ratio.ratio_image(head, portrait.image, portrait.code, other.code.light, subject.matte)
    before = psnr(portrait.image, other.image, skin)
    assert psnr(out, other.image, skin) > before + 3


def test_lights_in_a_batch_are_what_they_are_alone(head, scene):
    portrait, subject, other, _ = scene
    light = torch.cat([other.code.light, portrait.code.light * 0.7])
    both = ratio.ratio_image(head, portrait.image, portrait.code, light, subject.matte)
    for k in range(2):
        one = ratio.ratio_image(head, portrait.image, portrait.code, light[k : k + 1], subject.matte)
        torch.testing.assert_close(both[k : k + 1], one, rtol=0, atol=1e-4)


def test_a_light_that_is_not_finite_is_refused(head, scene):
    portrait, subject, _, _ = scene
    with pytest.raises(ValueError, match="light"):
        ratio.ratio_image(
            head, portrait.image, portrait.code, torch.full((1, 9, 3), torch.nan), subject.matte
        )


def test_refining_starts_at_the_ratio_image(head, scene):
    portrait, subject, other, _ = scene
    light = torch.cat([other.code.light, portrait.code.light])
    edit = pipeline.refine(Still(), head, portrait, subject, light, batch=1)
    want = ratio.ratio_image(head, portrait.image, portrait.code, light, subject.matte)
    torch.testing.assert_close(edit.image, want, rtol=0, atol=1e-4)
    torch.testing.assert_close(edit.image[1:], portrait.image, rtol=0, atol=1e-4)


def test_refining_tells_the_denoiser_whose_shadows_there_are(head, scene):
    portrait, subject, other, _ = scene
    model = Still()
    shadow = torch.tensor([[3.0]])
    pipeline.refine(model, head, portrait, subject, other.code.light, shadow)
    (before, told_before), (after, told_after) = model.asked
    drawn = conditions.draw(head, portrait.code, SIZE)
    for spatial, caster in ((before, portrait.code.light), (after, other.code.light)):
        visible = conditions.visibility(head, portrait.code, light=caster, drawn=drawn)
        want = conditions.reference(drawn.normal, drawn.mask, other.code.light, visible)
        torch.testing.assert_close(spatial[:, :3], want)
    assert not torch.allclose(before[:, :3], after[:, :3])
    assert told_before[0, -1] == 0 and told_after[0, -1] == 3


@pytest.mark.parametrize("solver", ["ddim", "ab2", "heun"])
def test_half_way_to_noise_and_back(solver):
    """With the exact denoiser of normal data of variance 0.09 a partial run keeps the picture."""
    schedule = diffusion.below(diffusion.respace(diffusion.linear_schedule(), "quad60"), 600)
    alpha_bar = diffusion.linear_schedule().alpha_bar.float()

    def denoiser(x, t, _):
        a = alpha_bar[t.long()].reshape(-1, 1, 1, 1)
        return x * (1 - a).sqrt() / (0.09 * a + 1 - a)

    x_0 = 0.3 * torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    x_t = samplers.invert(denoiser, x_0, None, schedule, solver, clip=False, partial=True)
    level = alpha_bar[schedule.timesteps[-1]]
    want = (0.09 * level + 1 - level).sqrt()
    assert x_t.std() / x_0.std() == pytest.approx(float(want / 0.3), rel=0.05 if solver == "ddim" else 0.01)
    back = samplers.sample(denoiser, x_t, None, schedule, solver, clip=False)
    assert (back - x_0).abs().max() < {"ddim": 0.03, "ab2": 0.01, "heun": 0.01}[solver]


def test_a_cut_schedule():
    whole = diffusion.respace(diffusion.linear_schedule(), "quad32")
    cut = diffusion.below(whole, 600)
    n = len(cut)
    assert cut.timesteps[-1] <= 600 < whole.timesteps[n]
    assert torch.equal(cut.alpha_bar, whole.alpha_bar[:n]) and torch.equal(cut.betas, whole.betas[:n])
    assert 2 * n - 1 <= 50  # evaluations of `refine` for a light
    with pytest.raises(ValueError, match="go deeper"):
        diffusion.below(whole, 0)


def test_boost_is_the_weight_of_v_prediction_up_to_its_limit():
    schedule = diffusion.linear_schedule()
    x_0, noise = torch.zeros(3, 1, 4, 4), torch.ones(3, 1, 4, 4)
    t = torch.tensor([0, 500, 999])
    plain = diffusion.training_loss(lambda x, *_: torch.zeros_like(x), x_0, t, noise, None)
    boosted = diffusion.training_loss(lambda x, *_: torch.zeros_like(x), x_0, t, noise, None, boost=20.0)
    want = [1 / float(schedule.alpha_bar[0]), 1 / float(schedule.alpha_bar[500]), 20.0]
    assert (boosted / plain).tolist() == pytest.approx(want, rel=1e-5)
