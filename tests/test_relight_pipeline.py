"""DiFaReli end to end: with an exact denoiser whose answers are known, and with a small network."""

import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from rig_core import align, buffers, checkpoints, conditions, diffusion, pipeline, samplers, sh
from rig_core.denoisers.relight import DiFaReli, RelightCondition, RelightConfig
from rig_core.estimators import identity, parsing, shadow
from tests.golden_files import recipe

SIZE, EMBED = 32, 6


class Exact:
    """The exact denoiser of portraits that are reference - 0.1 x cast shadow on the head, the background
    elsewhere, plus white noise of standard deviation 0.1: it maps noise to pictures by adding that mean."""

    config = SimpleNamespace(image_size=SIZE)
    evaluations = 0

    def condition(self, spatial, vector):
        return RelightCondition(vector, (spatial,))

    def mean(self, condition):
        reference, background = condition.latents[0].split(3, 1)
        amount = condition.gain[:, -1:, None, None]
        return torch.where(reference.abs().sum(1, True) > 0, reference * 2 - 1 - 0.1 * amount, background)

    def __call__(self, x_t, t, condition):
        assert len(condition) in (1, len(x_t))
        self.evaluations += len(x_t)
        a = diffusion.linear_schedule().alpha_bar[t.long()].to(x_t)[:, None, None, None]
        gain = a.sqrt() * 0.01 / (a * 0.01 + 1 - a)
        mean = self.mean(condition)
        return (x_t - a.sqrt() * (mean + gain * (x_t - a.sqrt() * mean))) / (1 - a).sqrt()


@pytest.fixture(scope="module")
def head():
    return checkpoints.load_head()


@pytest.fixture(scope="module")
def portrait(head):
    code = head.mean_code(1, (SIZE, SIZE)).replace(light=lamps(0.3)[:1])
    g = torch.Generator().manual_seed(0)
    image = conditions.shading_reference(head, code, SIZE, conditions.visibility(head, code, SIZE)) * 0.8
    image = (image + 0.1 + 0.05 * torch.randn(image.shape, generator=g)).clamp(0, 1)
    return pipeline.Portrait(image, align.Crop(torch.eye(3)[None], SIZE), code)


@pytest.fixture(scope="module")
def subject(head, portrait):
    g = torch.Generator().manual_seed(1)
    matte = buffers.render(head, portrait.code).mask
    behind = conditions.background(portrait.image, matte)
    return pipeline.Subject(behind, torch.randn(1, EMBED, generator=g), torch.tensor([[0.5]]), matte)


@pytest.fixture(scope="module")
def network(head):
    """A network with random weights that is small enough to be run hundreds of times."""
    s = head.sizes
    length = s.shape + s.pose + s.exp + 3 + EMBED + 1
    config = RelightConfig(SIZE, 16, (1, 2), 1, (16,), 2, 0.0, 8, cond_dim=length, proj_dim=8)
    model = DiFaReli(config)
    model.load_state_dict(recipe({k: v.shape for k, v in model.state_dict().items()}, 4))
    return model.eval().requires_grad_(False)


def lamps(*x):
    """Lights from x beside the camera."""
    d = torch.tensor([[float(v), 0.4, 1.0] for v in x])
    return sh.from_direction(d, intensity=0.5, ambient=0.4)


def quick(model, head, portrait, subject, **options):
    return pipeline.to_noise(model, head, portrait, subject, **{"steps": "quad8", "solver": "ab2"} | options)


# --------------------------------------------------------------------------------------------- describe


def test_describe_asks_every_estimator(head, portrait):
    recognise, judge = checkpoints.load_identity(), checkpoints.load_shadow()
    large = pipeline.Portrait(
        torch.nn.functional.interpolate(portrait.image, (64, 64), mode="bilinear"),
        portrait.crop.resized(64),
        portrait.code.resized((64, 64)),
    )
    found = pipeline.describe(head, large, recognise, judge)
    assert torch.equal(found.embed, identity.embed(recognise, large.image))
    assert torch.equal(found.shadow, shadow.scalar(judge, large.image)) and found.shadow.shape == (1, 1)
    assert found.matte.shape == (1, 1, 64, 64)
    keep, hide = found.matte.expand(-1, 3, -1, -1) == 0, found.matte.expand(-1, 3, -1, -1) == 1
    assert keep.any() and hide.any()
    assert torch.equal(found.background[keep], (large.image * 2 - 1)[keep])
    assert (found.background[hide] == -1).all()
    inside = buffers.render(head, large.code).mask > 0
    assert found.matte[inside].mean() > 0.9


def test_describe_with_a_parser(head, portrait, monkeypatch):
    labels = torch.zeros(1, SIZE, SIZE, dtype=torch.long)
    labels[:, 5:9], labels[:, 9:12], labels[:, 12:14] = 1, 17, 16  # skin, hair, cloth
    monkeypatch.setattr(parsing, "parse", lambda parser, image: labels if parser == "parser" else None)
    monkeypatch.setattr(identity, "embed", lambda model, image: torch.ones(1, 2))
    monkeypatch.setattr(shadow, "scalar", lambda model, image: torch.ones(1, 1))
    found = pipeline.describe(head, portrait, None, None, "parser")
    rows = found.matte[0, 0].mean(1)
    assert rows.tolist() == [1.0 if 5 <= i < 12 else 0.0 for i in range(SIZE)]


# --------------------------------------------------------------------------------------- the condition


def test_condition_holds_references_background_and_vector(head, portrait, subject):
    lights = lamps(-1, 1)
    condition = pipeline.relight_condition(Exact(), head, portrait, subject, lights)
    reference, background = condition.latents[0].split(3, 1)
    for i in range(2):
        code = portrait.code.replace(light=lights[i : i + 1])
        wanted = conditions.shading_reference(head, code, SIZE, conditions.visibility(head, code, SIZE))
        torch.testing.assert_close(reference[i : i + 1], wanted, rtol=0, atol=1e-6)
        assert torch.equal(background[i : i + 1], subject.background)
    c = portrait.code
    assert torch.equal(
        condition.gain, torch.cat([c.shape, c.pose, c.exp, c.cam, subject.embed, subject.shadow], 1)
    )
    plain = pipeline.relight_condition(Exact(), head, portrait, subject, lights, cast=False)
    wanted = conditions.shading_reference(head, c.replace(light=lights[:1]), SIZE)
    torch.testing.assert_close(plain.latents[0][:1, :3], wanted, rtol=0, atol=1e-6)
    assert (plain.latents[0] - condition.latents[0]).abs().max() > 0.05
    amounts = torch.tensor([[-1.0], [4.0]])
    other = pipeline.relight_condition(Exact(), head, portrait, subject, lights, amounts)
    assert torch.equal(other.gain[:, -1:], amounts) and len(other.gain) == 2


def test_what_the_light_does_not_touch_is_computed_once(head, portrait, subject, network):
    condition = pipeline.relight_condition(network, head, portrait, subject, lamps(-1, 0, 1))
    assert len(condition.gain) == 1 and [len(v) for v in condition.latents] == [3] * len(condition.latents)
    amounts = conditions.shadow_sweep(subject.shadow, 4, goal=-1)
    condition = pipeline.relight_condition(network, head, portrait, subject, lamps(1), amounts)
    assert len(condition.gain) == 4 and len(condition.latents[0]) == 1 and len(condition) == 4


# ---------------------------------------------------------------------------------- there and back again


def test_the_photos_own_light_gives_the_reconstruction(head, portrait, subject, network):
    for match in (False, True):
        noise = quick(network, head, portrait, subject, match=match)
        edit = pipeline.relight(network, head, portrait, subject, portrait.code.light, noise=noise)
        own = pipeline.relight_condition(network, head, portrait, subject, portrait.code.light)
        schedule = diffusion.respace(diffusion.linear_schedule(), "quad8")
        again = samplers.sample(network, noise.x_T, own, schedule, "ab2", correct=noise.shift)
        torch.testing.assert_close(edit.image, (again / 2 + 0.5).clamp(0, 1), rtol=0, atol=1e-6)
        assert torch.equal(edit.before, portrait.image) and edit.grid is None


def test_an_exact_denoiser_gives_the_photo_back(head, portrait, subject):
    noise = quick(Exact(), head, portrait, subject, steps=pipeline.RELIGHT_STEPS, match=True)
    edit = pipeline.relight(Exact(), head, portrait, subject, portrait.code.light, noise=noise)
    assert (edit.image - portrait.image).abs().mean() < 2e-3
    default = pipeline.relight(Exact(), head, portrait, subject, portrait.code.light)
    torch.testing.assert_close(default.image, edit.image, rtol=0, atol=1e-6)


def test_relighting_moves_the_photo_by_what_the_reference_changes(head, portrait, subject):
    model, lights = Exact(), lamps(-0.5, 0.8)
    edit = pipeline.relight(model, head, portrait, subject, lights)
    own = pipeline.relight_condition(model, head, portrait, subject, portrait.code.light)
    target = pipeline.relight_condition(model, head, portrait, subject, lights)
    wanted = portrait.image + (model.mean(target) - model.mean(own)) / 2
    inside = (wanted > 0.05) & (wanted < 0.95)
    assert ((edit.image - wanted).abs() * inside).max() < 0.03
    assert (edit.image - portrait.image).abs().mean() > 0.02
    outside = (subject.matte == 0).expand(2, 3, -1, -1)
    assert (edit.image - portrait.image)[outside].abs().max() < 0.02


def test_more_cast_shadow_is_darker_step_by_step(head, portrait, subject):
    amounts = conditions.shadow_sweep(subject.shadow, 5, by=2.0)
    edit = pipeline.relight(Exact(), head, portrait, subject, portrait.code.light, amounts, batch=2)
    inside = (subject.matte > 0).expand(1, 3, -1, -1)[0]
    levels = [image[inside].mean().item() for image in edit.image]
    steps = [a - b for a, b in zip(levels, levels[1:])]
    assert len(levels) == 5 and min(steps) > 0.01
    assert levels[0] - levels[4] == pytest.approx(0.1, abs=0.03)  # 0.1 x 2 of -1..1


def test_many_lights_in_parts_are_one_by_one(head, portrait, subject, network):
    noise = quick(network, head, portrait, subject, match=True)
    lights, amounts = lamps(-1, -0.5, 0, 0.5, 1), torch.linspace(-1, 3, 5)[:, None]
    for light, amount in ((lights, None), (lights, amounts), (lights[:1], amounts)):
        parts = pipeline.relight(network, head, portrait, subject, light, amount, noise, batch=2)
        assert parts.image.shape == (5, 3, SIZE, SIZE)
        for i in range(5):
            one = light[i : i + 1] if len(light) == 5 else light
            other = None if amount is None else amount[i : i + 1]
            alone = pipeline.relight(network, head, portrait, subject, one, other, noise)
            torch.testing.assert_close(parts.image[i : i + 1], alone.image, rtol=0, atol=2e-3)
            assert (parts.image[i] - alone.image[0]).abs().mean() < 1e-5


def test_guidance_of_one_is_none_and_two_goes_twice_as_far(head, portrait, subject, network):
    noise, light = quick(network, head, portrait, subject), lamps(0.9)
    own = pipeline.relight_condition(network, head, portrait, subject, portrait.code.light)
    target = pipeline.relight_condition(network, head, portrait, subject, light)
    t = torch.tensor([300.0])
    one, two = (pipeline.guided(network, own, w)(noise.x_T, t, target) for w in (1.0, 2.0))
    before, after = network(noise.x_T, t, own), network(noise.x_T, t, target)
    torch.testing.assert_close(one, after, rtol=0, atol=1e-6)
    torch.testing.assert_close(two, 2 * after - before, rtol=0, atol=1e-5)
    moved = []
    gentle = torch.lerp(portrait.code.light, light, 0.4)
    for w in (1.0, 1.5):
        edit = pipeline.relight(Exact(), head, portrait, subject, gentle, guidance=w)
        moved.append((edit.image - portrait.image)[(subject.matte > 0).expand(-1, 3, -1, -1)])
    ratio = (moved[1] @ moved[0]) / (moved[0] @ moved[0])
    assert moved[0].abs().mean() > 0.01 and ratio == pytest.approx(1.5, abs=0.05)


def test_evaluations_are_those_that_are_announced(head, portrait, subject):
    model, seen = Exact(), []
    noise = quick(model, head, portrait, subject, match=False, callback=seen.append)
    assert model.evaluations == len(seen) == 8 and seen[0]["n"] == 8
    quick(model, head, portrait, subject, match=True)
    assert model.evaluations == 24
    pipeline.relight(model, head, portrait, subject, lamps(-1, 0, 1), noise=noise)
    assert model.evaluations == 24 + 3 * 8

    def stop(info):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pipeline.relight(model, head, portrait, subject, lamps(1), noise=noise, callback=stop)
    assert model.evaluations == 49


def test_matching_keeps_the_photos_mean(head, portrait, subject, network):
    noise = quick(network, head, portrait, subject, match=True, solver="ddim")
    x = samplers.sample(
        network,
        noise.x_T,
        pipeline.relight_condition(network, head, portrait, subject, portrait.code.light),
        diffusion.respace(diffusion.linear_schedule(), "quad8"),
        correct=noise.shift,
    )
    torch.testing.assert_close(x.mean((2, 3)), (portrait.image * 2 - 1).mean((2, 3)), rtol=0, atol=1e-5)


def test_paste_touches_nothing_far_from_the_head(head, portrait, subject):
    photo = torch.rand(1, 3, 90, 90, generator=torch.Generator().manual_seed(3))
    square = torch.tensor([[[SIZE / 90, 0, 0], [0, SIZE / 90, 0], [0, 0, 1.0]]])
    p = replace(portrait, crop=align.Crop(square, SIZE))
    small = torch.zeros_like(subject.matte)
    small[..., 12:18, 12:18] = 1
    edit = pipeline.relight(Exact(), head, p, replace(subject, matte=small), lamps(1), noise=None)
    out = pipeline.paste(photo, p, edit)
    assert out.shape == photo.shape
    reach = round((18 + pipeline.NEAR * SIZE + 3) * 90 / SIZE)
    assert torch.equal(out[..., reach:], photo[..., reach:])
    assert not torch.equal(out, photo)


# ----------------------------------------------------------------------------------------- other sizes


def test_shrinking_a_portrait_keeps_its_geometry(head, portrait, subject):
    large = pipeline.Portrait(
        torch.rand(1, 3, 128, 128), portrait.crop.resized(128), portrait.code.resized((128, 128))
    )
    matte = buffers.render(head, large.code).mask
    described = replace(subject, background=conditions.background(large.image, matte), matte=matte)
    with pytest.raises(ValueError, match="the portrait is 128 x 128 px, the denoiser works at 32"):
        pipeline.relight_condition(Exact(), head, large, described, lamps(1))
    small, thin = pipeline.shrink(large, described, SIZE)
    assert torch.equal(small.image, conditions.shrink(large.image, SIZE))
    assert torch.equal(thin.background, conditions.shrink(described.background / 2 + 0.5, SIZE) * 2 - 1)
    torch.testing.assert_close(small.code.crop, portrait.code.crop)
    torch.testing.assert_close(small.crop.matrix, portrait.crop.matrix)
    assert (thin.matte - buffers.render(head, portrait.code).mask).abs().mean() < 0.05
    found, wanted = (
        pipeline.relight_condition(Exact(), head, p, replace(thin, background=subject.background), lamps(1))
        for p in (small, portrait)
    )
    torch.testing.assert_close(found.latents[0], wanted.latents[0], rtol=0, atol=1e-5)


# ------------------------------------------------------------------------------------------ wrong input


def test_wrong_requests_say_so_in_one_line(head, portrait, subject, network):
    noise, light, nan = quick(Exact(), head, portrait, subject), lamps(1), math.nan
    strange = replace(portrait, code=replace(portrait.code, head="flame"))
    wide = replace(portrait, image=portrait.image[..., :-2])

    def run(p=portrait, s=subject, model=network, **options):
        pipeline.relight(model, head, p, s, **{"light": light, "noise": noise} | options)

    cases = [
        (dict(light=light * nan), "light holds NaN"),
        (dict(light=light[0]), r"light must be \[B,9,3\]"),
        (dict(light=lamps(-1, 0, 1), shadow=torch.zeros(2, 1)), "3 lights and 2 shadow scalars"),
        (dict(light=lamps(-1, -0.5, 0.5, 1), shadow=torch.zeros(2, 1), batch=2), "4 lights and 2 shadow"),
        (dict(shadow=torch.full((1, 1), nan)), "shadow scalar is not finite"),
        (dict(s=replace(subject, embed=subject.embed * nan)), "embedding is not finite"),
        (dict(s=replace(subject, embed=subject.embed[:, 1:])), "use the head and the identity encoder"),
        (dict(p=strange), "belongs to the 'flame' head"),
        (dict(p=wide), "the portrait is 30 x 32 px"),
        (dict(s=replace(subject, background=subject.background[..., :16, :])), "background is 32 x 16 px"),
        (dict(noise=replace(noise, x_T=noise.x_T[..., :16])), r"pictures of \[32, 32\], this one is"),
        (dict(noise=replace(noise, steps="ddim37")), "no integer stride"),
        (dict(noise=replace(noise, solver="euler")), "solver 'euler' is not one of"),
    ]
    for options, message in cases:
        with pytest.raises(ValueError, match=message) as e:
            run(**options)
        assert "\n" not in str(e.value)
