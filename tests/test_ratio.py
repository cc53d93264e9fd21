"""The ratio image, its share in a relight, and the boosted loss."""

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


def test_trust_is_the_share_of_the_ratio_image(head, scene):
    """With a denoiser that changes nothing the relit picture is the photo's own, blended as asked."""
    portrait, subject, other, _ = scene
    want = ratio.ratio_image(head, portrait.image, portrait.code, other.code.light, subject.matte)
    job = (Still(), head, portrait, subject, other.code.light)
    noise = samplers.Inversion(portrait.image * 2 - 1, None, "quad5", "ddim")
    plain, half, whole = (pipeline.relight(*job, noise=noise, trust=t).image for t in (0.0, 0.5, 1.0))
    torch.testing.assert_close(whole, want, rtol=0, atol=1e-5)
    mean = ((plain + pipeline.DARK) * (want + pipeline.DARK)).sqrt() - pipeline.DARK
    torch.testing.assert_close(half, mean.clamp(0, 1), rtol=0, atol=1e-5)
    assert (plain - want).abs().max() > 0.05


def test_boost_is_the_weight_of_v_prediction_up_to_its_limit():
    schedule = diffusion.linear_schedule()
    x_0, noise = torch.zeros(3, 1, 4, 4), torch.ones(3, 1, 4, 4)
    t = torch.tensor([0, 500, 999])
    plain = diffusion.training_loss(lambda x, *_: torch.zeros_like(x), x_0, t, noise, None)
    boosted = diffusion.training_loss(lambda x, *_: torch.zeros_like(x), x_0, t, noise, None, boost=20.0)
    want = [1 / float(schedule.alpha_bar[0]), 1 / float(schedule.alpha_bar[500]), 20.0]
    assert (boosted / plain).tolist() == pytest.approx(want, rel=1e-5)
