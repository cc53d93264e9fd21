"""Smoothing over time: what stays, what falls by how much, rotations, cameras, cuts."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rig_core import buffers, checkpoints, motion
from rig_core.face import axis_angle_to_matrix, matrix_to_axis_angle


@pytest.fixture(scope="module")
def head():
    return checkpoints.load_head()


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def film(head, n, jitter=0.0, seed=0):
    """A mean face in n frames, jittering."""
    code = head.mean_code(n, (128, 128))
    g = generator(seed)
    fields = ("shape", "tex", "exp", "pose", "light")
    drawn = {k: getattr(code, k) + jitter * torch.randn(getattr(code, k).shape, generator=g) for k in fields}
    return code.replace(**drawn)


def angle_between(a, b):
    return matrix_to_axis_angle(axis_angle_to_matrix(a).mT @ axis_angle_to_matrix(b)).norm(dim=1)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 30), st.floats(0.0, 20.0), st.integers(0, 1000))
def test_what_stands_still_stays(n, frames, seed):
    still = torch.randn(1, 3, 2, generator=generator(seed)).expand(n, 3, 2)
    torch.testing.assert_close(motion.smooth(still, frames), still, atol=1e-5, rtol=0)
    turn = still[:, :, 0]
    assert angle_between(motion.smooth_rotations(turn, frames), turn).max() < 1e-5


@settings(max_examples=30, deadline=None)
@given(st.floats(0.2, 3.0), st.integers(0, 1000))
def test_even_motion_is_not_delayed(frames, seed):
    speed = torch.randn(2, generator=generator(seed))
    line = torch.arange(60.0)[:, None] * speed
    inside = slice(math.ceil(4 * frames), 60 - math.ceil(4 * frames))
    torch.testing.assert_close(motion.smooth(line, frames)[inside], line[inside], atol=1e-3, rtol=1e-4)
    turning = torch.zeros(60, 3)
    turning[:, 1] = torch.linspace(-0.5, 2.5, 60)
    got = motion.smooth_rotations(turning, frames)
    assert angle_between(got, turning)[inside].max() < 1e-4


@pytest.mark.parametrize("frames", [1.0, 2.0, 5.0])
def test_jitter_falls_as_a_gaussian_says(frames):
    noise = torch.randn(20_000, 4, generator=generator())
    want = 1 / (2 * math.sqrt(math.pi) * frames)
    assert motion.smooth(noise, frames).var() == pytest.approx(want, rel=0.05)
    small = motion.smooth_rotations(0.02 * torch.randn(2000, 3, generator=generator()), frames)
    assert small.var() == pytest.approx(want * 0.02**2, rel=0.15)


def test_nothing_changes_without_smoothing(head):
    code = film(head, 5, 0.1)
    values = torch.randn(5, 3)
    assert motion.smooth(values, 0) is values and torch.equal(motion.smooth(values[:1], 3.0), values[:1])
    kept = motion.smooth_code(code, 0.0, one_person=False)
    for name, v in vars(code).items():
        assert v is getattr(kept, name) or torch.equal(v, getattr(kept, name)), name
    for wrong in (-1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match="number of frames, 0 or more"):
            motion.smooth(values, wrong)


def test_weights_are_those_of_a_gaussian():
    pulse = torch.zeros(41, 1)
    pulse[20] = 1
    offset = torch.arange(-20.0, 21.0)
    want = torch.exp(-0.5 * (offset / 2.5) ** 2)
    torch.testing.assert_close(motion.smooth(pulse, 2.5)[:, 0], want / want.sum(), atol=1e-4, rtol=0)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 1000))
def test_turning_and_moving_all_frames_moves_the_result(seed):
    g = generator(seed)
    r, all_turned = (
        0.5 * torch.randn(12, 3, generator=g),
        axis_angle_to_matrix(torch.randn(1, 3, generator=g)),
    )
    turned = matrix_to_axis_angle(all_turned @ axis_angle_to_matrix(r))
    want = matrix_to_axis_angle(all_turned @ axis_angle_to_matrix(motion.smooth_rotations(r, 1.5)))
    assert angle_between(motion.smooth_rotations(turned, 1.5), want).max() < 2e-4
    x = torch.randn(12, 2, generator=g)
    torch.testing.assert_close(motion.smooth(3 * x + 1, 1.5), 3 * motion.smooth(x, 1.5) + 1)


def test_rotations_have_no_seam_at_half_a_turn():
    off = torch.tensor([0.03, -0.03]).repeat(20)
    r = torch.zeros(40, 3)
    r[:, 1] = torch.where(off > 0, math.pi - off, -math.pi - off)  # both sides of half a turn about y
    got = motion.smooth_rotations(r, 2.0)
    half = torch.tensor([[0.0, math.pi, 0.0]]).expand(40, 3)
    assert angle_between(got, half)[8:-8].max() < 2e-3
    assert motion.smooth(r, 2.0)[8:-8].norm(dim=1).max() < 2  # as plain numbers it would be far off


@pytest.mark.parametrize(
    "axis", [(1.0, 0, 0), (0, 1.0, 0), (0, 0, 1.0), (0.6, 0.0, -0.8), (-0.48, 0.6, 0.64)]
)
@pytest.mark.parametrize("short", [0.0, 1e-6, 1e-3, 0.02, 0.1])
def test_half_a_turn_as_axis_angle_and_back(axis, short):
    r = torch.tensor([axis]) * (math.pi - short)
    m = axis_angle_to_matrix(r)
    torch.testing.assert_close(axis_angle_to_matrix(matrix_to_axis_angle(m)), m, atol=2e-6, rtol=0)


def test_one_person_keeps_shape_and_skin_for_each_shot(head):
    code = film(head, 9, 0.3)
    got = motion.smooth_code(code, 1.0, starts=(0, 4))
    for name in ("shape", "tex"):
        v, given = getattr(got, name), getattr(code, name)
        for shot in (slice(0, 4), slice(4, 9)):
            torch.testing.assert_close(v[shot], given[shot].mean(0, keepdim=True).expand_as(v[shot]))
    alone = motion.smooth_code(code[4:9], 1.0)
    torch.testing.assert_close(got.light[4:], alone.light)  # nothing flows over the cut
    assert not torch.allclose(motion.smooth_code(code, 1.0).light[4:], alone.light)
    several = motion.smooth_code(code, 1.0, one_person=False)
    torch.testing.assert_close(several.shape, motion.smooth(code.shape, 1.0))


def test_a_jittering_crop_that_the_camera_makes_up_for_does_not_move_the_head(head):
    """The fit's own crop follows noisy landmarks; where the head lies does not."""
    n, g = 15, generator()
    code = film(head, n)
    noise = torch.randn(n, 3, generator=g) * torch.tensor([0.05, 8.0, 8.0])
    move = torch.eye(3).repeat(n, 1, 1)
    move[:, 0, 0] = move[:, 1, 1] = 1 + noise[:, 0]
    move[:, :2, 2] = noise[:, 1:]
    scale, tx, ty = code.cam.unbind(1)
    new_scale = scale * move[:, 0, 0]
    x = (move[:, 0, 0] * 112 * (scale * tx + 1) + move[:, 0, 2]) / 112 - 1
    y = 1 - (move[:, 1, 1] * 112 * (1 - scale * ty) + move[:, 1, 2]) / 112
    cam = torch.stack([new_scale, x / new_scale, y / new_scale], 1)
    jittered = code.replace(crop=move @ code.crop, cam=cam)

    def seen(c):
        return buffers.to_image(head.landmarks(head.verts(c.shape, c.exp, c.pose), c.pose), c)

    torch.testing.assert_close(seen(jittered)[..., :2], seen(code)[..., :2], atol=1e-5, rtol=0)
    got = motion.smooth_code(jittered, 2.0)
    torch.testing.assert_close(seen(got)[..., :2], seen(code)[..., :2], atol=1e-5, rtol=0)
    assert got.crop.var(0).max() < 0.3 * jittered.crop.var(0).max()


def test_a_head_on_its_way_keeps_its_pace(head):
    n = 21
    code = film(head, n)
    cam = code.cam.clone()
    cam[:, 1] = torch.linspace(-0.2, 0.2, n)
    got = motion.smooth_code(code.replace(cam=cam), 1.0)
    torch.testing.assert_close(got.cam[4:-4], cam[4:-4], atol=1e-5, rtol=0)


def test_cuts_stand_out_from_motion():
    g = generator()
    a, b = torch.rand(1, 3, 48, 64, generator=g), torch.rand(1, 3, 48, 64, generator=g) * 0.3
    frames = [a.roll(i, 3) for i in range(10)] + [b.roll(i, 3) for i in range(10)]
    small = [motion.thumbnail(f) for f in frames]
    change = torch.tensor([0.0] + [float((x - y).abs().mean()) for x, y in zip(small, small[1:])])
    assert motion.shot_starts(change) == [0, 10]
    assert motion.shot_starts(torch.full((12,), 0.3)) == [0]  # always fast: no cut
    assert motion.shot_starts(torch.zeros(1)) == [0]


def test_wrong_shots_are_named():
    for starts in ([1], [0, 5], [0, 3, 3], []):
        with pytest.raises((ValueError, IndexError)):
            motion.smooth(torch.zeros(5, 1), 1.0, starts)


def test_a_thumbnail_is_the_mean_of_areas_at_any_size():
    for size in ((16, 16), (97, 131), (40, 1920), (9, 30)):
        x = torch.rand(1, 3, *size, generator=torch.Generator().manual_seed(0))
        want = torch.nn.functional.adaptive_avg_pool2d(x, 16)[0]
        torch.testing.assert_close(motion.thumbnail(x), want, atol=1e-6, rtol=0)


def test_a_thumbnail_needs_no_adaptive_pooling(monkeypatch):
    """MPS has it for whole factors only."""
    monkeypatch.setattr("torch.nn.functional.adaptive_avg_pool2d", None)
    small = motion.thumbnail(torch.full((1, 3, 97, 131), 0.25))
    torch.testing.assert_close(small, torch.full((3, 16, 16), 0.25))
