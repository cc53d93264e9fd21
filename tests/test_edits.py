"""Transfer, interpolation, the neutral face, exchanged buffers."""

from __future__ import annotations

import math

import pytest
import torch

from rig_core import buffers, checkpoints, edits, face, pipeline, sh
from tests.test_conditions import flame_head

PARTS = {
    "light": ("light", slice(None)),
    "pose": ("pose", slice(0, 3)),
    "jaw": ("pose", slice(3, 6)),
    "expression": ("exp", slice(None)),
    "shape": ("shape", slice(None)),
    "albedo": ("tex", slice(None)),
    "camera": ("cam", slice(None)),
}


@pytest.fixture(scope="module")
def open_head():
    return checkpoints.load_head()


@pytest.fixture(scope="module")
def flame():
    return flame_head()


def other(code, seed):
    """A code with every number of it moved a little."""
    g = torch.Generator().manual_seed(seed)
    fields = {
        n: getattr(code, n) + 0.1 * torch.randn(getattr(code, n).shape, generator=g)
        for n in ("shape", "tex", "exp", "pose", "light")
    }
    return code.replace(**fields, cam=code.cam * (1 + 0.1 * seed))


def pair(head, n=1):
    mean = head.mean_code(n, (64, 64)) if head.name == "open" else flame_mean(head, n)
    return other(mean, 1), other(mean, 2)


def flame_mean(head, n):
    zeros = {k: torch.zeros(n, d) for k, d in vars(head.sizes).items()}
    cam, crop = torch.tensor([[8.0, 0.01, 0.02]]).repeat(n, 1), torch.eye(3).repeat(n, 1, 1)
    return face.FaceCode(**zeros, cam=cam, light=torch.zeros(n, 9, 3), crop=crop, size=(64, 64), head="flame")


def centre(head, code):
    c = head.centre(head.verts(code.shape, code.exp, code.pose))
    return code.cam[:, :1] * (c[:, :2] + code.cam[:, 1:])


@pytest.mark.parametrize("part", PARTS)
def test_only_what_is_asked_for_is_taken(open_head, part):
    target, source = pair(open_head, 2)
    new = edits.transfer(open_head, target, source, **{part: True})
    for name, (field, where) in PARTS.items():
        a, b, got = (getattr(c, field)[:, where] for c in (target, source, new))
        if name == part:
            torch.testing.assert_close(got, b, atol=1e-6, rtol=0)
            assert (a - b).abs().max() > 0.01
        elif (part, name) != ("shape", "camera"):
            assert torch.equal(got, a), name
    gaze = source if part == "expression" else target
    assert torch.equal(new.pose[:, 6:], gaze.pose[:, 6:])
    assert torch.equal(new.crop, target.crop)


def test_strength_zero_and_nothing_chosen_keep_the_target(open_head):
    target, source = pair(open_head)
    everything = dict.fromkeys(PARTS, True)
    for new in (
        edits.transfer(open_head, target, source),
        edits.transfer(open_head, target, source, 0.0, **everything),
    ):
        for name in ("shape", "tex", "exp", "pose", "cam", "light"):
            torch.testing.assert_close(getattr(new, name), getattr(target, name), atol=2e-6, rtol=0)
    new = edits.transfer(open_head, target, source, 1.0, **everything)
    for name in ("shape", "tex", "exp", "pose", "cam", "light"):
        torch.testing.assert_close(getattr(new, name), getattr(source, name), atol=2e-6, rtol=0)


def test_rotations_take_the_shorter_arc(open_head):
    target, source = pair(open_head)
    turn = torch.tensor([[0.0, math.radians(170), 0.0]])
    a = target.replace(pose=torch.cat([turn, target.pose[:, 3:]], 1))
    b = target.replace(pose=torch.cat([-turn, target.pose[:, 3:]], 1))
    half = edits.transfer(open_head, a, b, 0.5, pose=True).pose[0, :3]
    assert abs(float(half.norm()) - math.pi) < 1e-3  # through the back, not through the front


@pytest.mark.parametrize("part", ["pose", "expression", "jaw", "shape"])
def test_flames_face_keeps_its_centre(flame, part):
    target, source = pair(flame, 2)
    new = edits.transfer(flame, target, source, **{part: True})
    torch.testing.assert_close(centre(flame, new), centre(flame, target), atol=1e-5, rtol=0)
    moved = centre(flame, new.replace(cam=target.cam)) - centre(flame, target)
    assert moved.abs().max() > 1e-3  # it would have moved
    placed = edits.transfer(flame, target, source, camera=True, **{part: True})
    torch.testing.assert_close(placed.cam, source.cam)


def test_another_shape_keeps_the_centre_of_the_open_head_and_a_turn_is_on_its_neck(open_head):
    target, source = pair(open_head)
    new = edits.transfer(open_head, target, source, shape=True)
    torch.testing.assert_close(centre(open_head, new), centre(open_head, target), atol=1e-5, rtol=0)
    turned = edits.transfer(open_head, target, source, pose=True)
    assert torch.equal(turned.cam, target.cam)


def test_one_source_for_many_and_many_for_one(open_head):
    targets, _ = pair(open_head, 3)
    _, source = pair(open_head)
    new = edits.transfer(open_head, targets, source, expression=True)
    assert len(new) == 3 and torch.equal(new.exp, source.exp.expand(3, -1))
    assert torch.equal(new.shape, targets.shape)
    film = edits.transfer(open_head, source, targets, expression=True, light=True)
    assert torch.equal(film.exp, targets.exp) and torch.equal(film.shape, source.shape.expand(3, -1))
    assert len(film.crop) == 3
    with pytest.raises(ValueError, match="'flame' head"):
        edits.transfer(open_head, targets, source.replace(head="flame"))


def test_easings():
    assert torch.equal(edits.ease(5), torch.tensor([0, 0.25, 0.5, 0.75, 1]))
    smooth = edits.ease(9, "smooth")
    assert smooth[0] == 0 and smooth[8] == 1 and abs(smooth[4] - 0.5) < 1e-6
    assert smooth[1] < 1 / 8 / 2 and (smooth.diff() > 0).all()
    there = edits.ease(8, "ping-pong")
    assert there[0] == 0 and abs(there[4] - 1) < 1e-6
    torch.testing.assert_close(there[1:4], there[5:].flip(0))
    assert abs(float(there[7] - there[1])) < 1e-6  # and so on to the first
    with pytest.raises(ValueError, match="'easing' is linear, smooth, ping-pong, not 'x'"):
        edits.ease(3, "x")


def test_interpolation_is_lerp_at_both_ends_and_between(open_head):
    a, b = pair(open_head)
    film = edits.interpolate(a, b, 5)
    for i, w in ((0, 0.0), (1, 0.25), (4, 1.0)):
        want = face.lerp(a, b, w)
        for name in ("shape", "tex", "exp", "pose", "cam", "light", "crop"):
            torch.testing.assert_close(getattr(film[i], name), getattr(want, name), atol=1e-6, rtol=0)
    with pytest.raises(ValueError, match="3 and 1"):
        edits.interpolate(a.expand(3), b, 5)
    with pytest.raises(ValueError, match="'flame' head"):
        edits.interpolate(a, b.replace(head="flame"), 5)


@pytest.mark.parametrize("name", ["open_head", "flame"])
def test_neutral(name, request):
    head = request.getfixturevalue(name)
    code, _ = pair(head, 2)
    new = edits.neutral(head, code)
    assert not new.exp.any() and not new.pose[:, 3:].any()
    for field in ("shape", "tex", "light"):
        assert torch.equal(getattr(new, field), getattr(code, field))
    assert torch.equal(new.pose[:, :3], code.pose[:, :3])
    frontal = edits.neutral(head, code, frontal=True)
    assert not frontal.pose.any()
    if name == "flame":
        torch.testing.assert_close(centre(head, frontal), centre(head, code), atol=1e-5, rtol=0)
    else:
        assert torch.equal(frontal.cam, code.cam)
        assert torch.equal(edits.neutral(head, code, gaze=False).pose[:, 6:], code.pose[:, 6:])
        closed = head.landmarks(head.verts(new.shape, new.exp, new.pose), new.pose)
        wide = pipeline.turn(head, new, jaw=15.0)
        opened = head.landmarks(head.verts(wide.shape, wide.exp, wide.pose), wide.pose)
        gap = [(p[:, 62] - p[:, 66]).norm(dim=1) for p in (closed, opened)]
        assert (gap[0] < 0.3 * gap[1]).all()


# ------------------------------------------------------------------------------------------ buffers


@pytest.fixture(scope="module")
def drawn(open_head):
    code = open_head.mean_code(1, (48, 48))
    lamp = sh.from_direction(torch.tensor([[0.8, 0.3, 0.6]]), intensity=0.6, ambient=0.3)
    return buffers.render(open_head, code.replace(light=lamp)), lamp


def test_nothing_exchanged_changes_nothing(drawn):
    b, lamp = drawn
    for new in (edits.exchange(b), edits.exchange(b, recompute=True)):
        for name, v in vars(b).items():
            torch.testing.assert_close(getattr(new, name), v, atol=1e-6, rtol=0)
    new = edits.exchange(b, light=lamp, recompute=True)
    torch.testing.assert_close(new.rendered, b.rendered, atol=1e-6, rtol=0)


def test_an_edited_albedo_shows_where_it_was_edited(drawn):
    b, _ = drawn
    painted = b.albedo.clone()
    painted[:, :, 20:28, 20:28] *= torch.tensor([1.0, 0.2, 0.2]).view(3, 1, 1)
    new = edits.exchange(b, albedo=painted, recompute=True)
    torch.testing.assert_close(new.rendered, painted * b.shading * b.mask)
    outside = torch.ones(48, 48, dtype=torch.bool)
    outside[20:28, 20:28] = False
    assert torch.equal(new.rendered[..., outside], (b.albedo * b.shading)[..., outside])
    kept = edits.exchange(b, albedo=painted)
    assert torch.equal(kept.rendered, b.rendered) and torch.equal(kept.albedo, painted * b.mask)


def test_edited_normals_are_lit_by_the_light(drawn):
    b, lamp = drawn
    flipped = b.normal * torch.tensor([-1.0, 1.0, 1.0]).view(3, 1, 1)
    new = edits.exchange(b, normal=flipped, light=lamp, recompute=True)
    mirrored = lamp * torch.tensor([1.0, -1, 1, 1, -1, -1, 1, 1, 1]).view(9, 1)
    torch.testing.assert_close(new.rendered, b.albedo * sh.shade(b.normal, mirrored), atol=1e-6, rtol=0)
    assert (new.rendered - b.rendered).abs().max() > 0.2
    two = edits.exchange(b, light=torch.cat([lamp, mirrored]), recompute=True)
    assert len(two) == 2 and torch.equal(two.rendered[1:], new.rendered)


def test_buffers_from_nothing_but_pictures(drawn):
    b, lamp = drawn
    parts = {n: getattr(b, n) for n in ("rendered", "normal", "albedo", "mask")}
    new = edits.exchange(None, **parts)
    assert torch.equal(new.stack(), b.stack())
    inside = b.mask.expand(-1, 3, -1, -1) > 0
    torch.testing.assert_close(new.shading[inside], b.shading[inside], atol=1e-4, rtol=0)
    del parts["rendered"]
    lit = edits.exchange(None, **parts, light=lamp, recompute=True)
    torch.testing.assert_close(lit.stack(), b.stack(), atol=1e-6, rtol=0)


def test_a_smaller_mask_cuts_everything(drawn):
    b, _ = drawn
    mask = b.mask.clone()
    mask[..., :24] = 0
    new = edits.exchange(b, mask=mask)
    assert not new.stack()[..., :24].any() and torch.equal(new.stack()[..., 24:], b.stack()[..., 24:])


@pytest.mark.parametrize(
    "how,said",
    [
        ({"given": None}, "without 'buffers' connect 'normal', 'albedo', 'mask', 'rendered' as well"),
        ({"rendered": 1, "recompute": True}, "'rendered' does not count while 'recompute' is on"),
        ({"normal": 1, "recompute": True}, "edited normals needs their light: connect 'light'"),
        ({"light": 1}, "'light' only counts where 'recompute' is on"),
        ({"given": None, "normal": 1, "albedo": 1, "mask": 1, "recompute": True}, "needs 'light' or 'shad"),
        ({"albedo": 2}, "'albedo' is 1 of 96 x 96 pixels, the others 1 of 48 x 48"),
        ({"albedo": 3}, "is 2 of 48 x 48 pixels, the others 3"),
    ],
)
def test_what_does_not_go_together_is_said(drawn, how, said):
    b, lamp = drawn
    given = {"given": b} | how
    for name in ("rendered", "normal", "albedo", "mask"):
        v = getattr(b, name)
        kinds = {1: v, 2: v.repeat(1, 1, 2, 2), 3: v.repeat(3, 1, 1, 1)}
        if name in given:
            given[name] = kinds[given[name]]
    if "light" in given:
        given["light"] = lamp
    if how.get("albedo") == 3:
        given["normal"] = b.normal.repeat(2, 1, 1, 1)
    with pytest.raises(ValueError, match=said):
        edits.exchange(**given)
