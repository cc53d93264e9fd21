from dataclasses import dataclass

import pytest
import torch

from rig_core import align, buffers, checkpoints, diffusion, pipeline, raster
from rig_core.estimators import landmarks

SIZE = 64


@pytest.fixture(scope="module")
def head():
    return checkpoints.load_head()


@pytest.fixture(scope="module")
def portrait(head):
    code = head.mean_code(1, (SIZE, SIZE))
    b = buffers.render(head, code)
    return pipeline.Portrait(b.rendered.clamp(0, 1), align.Crop(torch.eye(3)[None], SIZE), code)


@dataclass
class Rendered:
    """The exact denoiser of pictures that are their render plus white noise of standard deviation 0.1."""

    spread: float = 0.1

    class Condition:
        def __init__(self, mean):
            self.mean = mean

        def __getitem__(self, i):
            return Rendered.Condition(self.mean[i : i + 1])

    def condition(self, physical, image):
        return Rendered.Condition(physical[:, :3] * 2 - 1)

    def __call__(self, x_t, t, condition):
        alpha_bar = diffusion.linear_schedule().alpha_bar[t.long()].to(x_t)[:, None, None, None]
        noise = 1 - alpha_bar
        gain = alpha_bar.sqrt() * self.spread**2 / (alpha_bar * self.spread**2 + noise)
        x_0 = condition.mean + gain * (x_t - alpha_bar.sqrt() * condition.mean)
        return (x_t - alpha_bar.sqrt() * x_0) / noise.sqrt()


def face_part(head, code):
    """Where the face of the head is seen, without scalp, ears and neck, [B,1,H,W]."""
    frags, _, _ = buffers.geometry(head, code)
    return (raster.interpolate_verts(frags, head.faces, head.masks["face"][None, :, None]) > 0.5).float()


def relit(portrait, *factors):
    light = portrait.code.light
    return portrait.code.expand(len(factors)).replace(light=torch.cat([light * f for f in factors]))


def test_an_edit_moves_the_photo_by_what_the_buffers_change(head, portrait):
    """With an exact Gaussian denoiser the ODE keeps photo minus mean: the edit is the change of the mean."""
    texture = 0.06 * torch.randn(1, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    photo = (portrait.image * 0.8 + 0.1 + texture).clamp(0, 1)
    p = pipeline.Portrait(photo, portrait.crop, portrait.code)
    edit = pipeline.paint(Rendered(), head, p, relit(p, 0.7, 1.0), steps="quad50", guidance=1)
    assert (edit.before - photo).abs().mean() < 0.01
    assert (edit.image[1:] - edit.before).abs().max() < 1e-5
    old, new = (buffers.render(head, c).rendered for c in (p.code, relit(p, 0.7)))
    inside = buffers.render(head, p.code).mask.expand(-1, 3, -1, -1) > 0
    change = (edit.image[:1] - edit.before)[inside]
    assert torch.allclose(change, (new - old)[inside], atol=0.03)


def test_guidance_drives_the_edit_further(head, portrait):
    """With a denoiser that is linear in its mean, guidance w moves the picture by w times the change."""
    p = pipeline.Portrait(portrait.image * 0.8 + 0.1, portrait.crop, portrait.code)
    moved = []
    for w in (1.0, 1.5):
        edit = pipeline.paint(Rendered(), head, p, relit(p, 0.9), steps="quad50", guidance=w)
        moved.append((edit.image - edit.before)[buffers.render(head, p.code).mask.expand(-1, 3, -1, -1) > 0])
    assert moved[0].abs().mean() > 0.01
    assert torch.allclose(moved[1].mean(), 1.5 * moved[0].mean(), rtol=0.05)


def test_random_noise_ignores_the_photo(head, portrait):
    grey = pipeline.Portrait(torch.full_like(portrait.image, 0.5), portrait.crop, portrait.code)
    a, b = (pipeline.paint(Rendered(), head, p, p.code, keep=False).image for p in (portrait, grey))
    assert torch.equal(a, b)
    other = pipeline.paint(Rendered(), head, grey, grey.code, keep=False, seed=1).image
    assert not torch.equal(a, other)


def test_paste_leaves_an_unedited_photo_bit_for_bit(head, portrait):
    photo = torch.rand(1, 3, 150, 120, generator=torch.Generator().manual_seed(1))
    crop = align.Crop(torch.tensor([[[0.8, 0, -10], [0, 0.8, -20], [0, 0, 1]]]), SIZE)
    p = pipeline.Portrait(crop.apply(photo), crop, portrait.code)
    edit = pipeline.Edit(p.image, p.image)
    assert torch.equal(pipeline.paste(photo, p, edit), photo)


def test_the_background_far_from_the_head_is_not_touched(head, portrait):
    edit = pipeline.paint(Rendered(), head, portrait, relit(portrait, 0.6))
    wrong = pipeline.Edit(edit.image * 0.5, edit.before, None, edit.mask)
    out = pipeline.paste(portrait.image, portrait, wrong)
    assert torch.equal(out[..., :4, :4], portrait.image[..., :4, :4])
    assert (out - portrait.image)[..., 28:36, 28:36].abs().mean() > 0.02


def test_paste_keeps_the_photos_resolution(head, portrait):
    photo = 0.4 + 0.6 * torch.rand(1, 3, 300, 240, generator=torch.Generator().manual_seed(1))
    crop = align.Crop(torch.tensor([[[0.25, 0, 0], [0, 0.25, 0], [0, 0, 1]]]), SIZE)
    before = torch.full((1, 3, SIZE, SIZE), 0.5)
    half = align.to_display(align.to_linear(before) * 0.5)
    out = pipeline.paste(
        photo, pipeline.Portrait(crop.apply(photo), crop, portrait.code), pipeline.Edit(half, before)
    )
    assert out.shape == photo.shape
    middle = (slice(None), slice(None), slice(80, 160), slice(80, 160))
    ratio = (align.to_linear(out[middle]) + 0.01) / (align.to_linear(photo[middle]) + 0.01)
    assert torch.allclose(ratio.mean(), torch.tensor(0.522), atol=0.01) and ratio.std() < 0.01


@pytest.mark.parametrize(
    ("edit", "axis", "sign"),
    [({"yaw": 20}, 0, 1), ({"yaw": -20}, 0, -1), ({"pitch": 15}, 1, 1), ({"pitch": -15}, 1, -1)],
)
def test_turning_moves_the_nose_the_right_way(head, portrait, edit, axis, sign):
    nose = lambda c: head.landmarks(head.verts(c.shape, c.exp, c.pose), c.pose)[0, 30]  # noqa: E731
    moved = nose(pipeline.turn(head, portrait.code, **edit)) - nose(portrait.code)
    assert sign * moved[axis] > 0.01  # metres


def test_turn_back_is_the_same_pose(head, portrait):
    there = pipeline.turn(head, portrait.code, yaw=25)
    assert torch.allclose(pipeline.turn(head, there, yaw=-25).pose, portrait.code.pose, atol=1e-5)


def test_a_smile_widens_the_mouth_and_the_jaw_opens_it(head, portrait):
    def points(**edit):
        c = pipeline.turn(head, portrait.code, **edit)
        return head.landmarks(head.verts(c.shape, c.exp, c.pose), c.pose)[0]

    neutral, smile, wide = points(), points(mouthSmile_L=0.8, mouthSmile_R=0.8), points(jaw=15)
    width = lambda p: (p[54] - p[48]).norm()  # noqa: E731
    assert width(smile) > 1.08 * width(neutral)
    assert (wide[62] - wide[66]).norm() > (neutral[62] - neutral[66]).norm() + 0.01


def test_unknown_names_and_foreign_heads(head, portrait):
    with pytest.raises(ValueError, match="no expression 'smirk'.*mouthSmile_L"):
        pipeline.turn(head, portrait.code, smirk=1.0)
    with pytest.raises(ValueError, match="belongs to the 'flame' head"):
        pipeline.turn(head, portrait.code.replace(head="flame"), yaw=3)


def test_estimate_with_and_without_landmarks(head):
    from training.demo import read

    photo = read(checkpoints.ASSETS / "astronaut.jpg")
    p = pipeline.estimate(head, photo, SIZE)
    b, face = buffers.render(head, p.code), face_part(head, p.code)
    assert ((b.rendered - p.image).abs() * face).sum() / (3 * face.sum()) < 0.13
    with pytest.raises(landmarks.NoFaceError, match="face number 1"):
        pipeline.estimate(head, photo, SIZE, face=1)
    with pytest.raises(landmarks.NoFaceError):
        pipeline.estimate(head, torch.full((1, 3, 90, 90), 0.5), SIZE)


def test_variance_mix_keeps_the_variance():
    a, b = torch.randn(2, 1, 3, 200, 200, generator=torch.Generator().manual_seed(0)).unbind(0)
    for w in (0.0, 0.3, 1.0):
        assert pipeline.variance_mix(a, b, torch.tensor(w)).std() == pytest.approx(1, abs=0.01)
