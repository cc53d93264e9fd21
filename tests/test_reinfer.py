"""Codes estimated again: errors of known edits, rendered persons with their true codes, empty pictures."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rig_core import checkpoints, pipeline, sh
from training import reinfer, synth


@pytest.fixture(scope="module")
def head():
    return checkpoints.load_head()


@pytest.fixture(scope="module")
def persons():
    return synth.render([910_001, 910_002], 160)


@pytest.fixture
def code(head):
    g = torch.Generator().manual_seed(0)
    mean = head.mean_code(2, 128)
    return mean.replace(
        shape=torch.randn(mean.shape.shape, generator=g),
        exp=0.3 * torch.randn(mean.exp.shape, generator=g),
        pose=0.1 * torch.randn(mean.pose.shape, generator=g),
    )


# ------------------------------------------------------------------------------------- what is compared


def test_a_code_has_no_error_against_itself(head, code):
    for values in (reinfer.errors(head, code, code), reinfer.distances(head, code, code)):
        assert tuple(values) == reinfer.PARTS
        for value in values.values():
            assert value.shape == (2,) and value.abs().max() < 1e-3


@settings(max_examples=20, deadline=None)
@given(a=st.floats(-2, 2), b=st.floats(-2, 2), n=st.integers(1, 20))
def test_errors_are_root_mean_squares_of_the_numbers(head, a, b, n):
    """n of the numbers off by a and one more by b: sqrt((n a^2 + b^2) / count)."""
    code = head.mean_code(1, 64)

    def off(x, count):
        y = x.flatten(1).clone()
        y[:, :count] += a
        y[:, count] += b
        return y.reshape(x.shape)

    counts = {"light": min(n, 26), "shape": n, "exp": min(n, code.exp.shape[1] - 1), "pose": min(n, 5)}
    found = code.replace(**{k: off(getattr(code, k), c) for k, c in counts.items()})
    totals = {"light": 27, "shape": code.shape.shape[1], "exp": code.exp.shape[1], "pose": 6}
    got = reinfer.errors(head, found, code)
    for part, name in zip(reinfer.PARTS, counts):
        want = math.sqrt((counts[name] * a * a + b * b) / totals[name])
        assert float(got[part]) == pytest.approx(want, rel=1e-4, abs=1e-5)


def test_the_gaze_does_not_count(head, code):
    looking = code.replace(pose=code.pose + torch.tensor([0.0] * 6 + [0.3, 0.2]))
    assert reinfer.errors(head, looking, code)["pose"].max() == 0


def test_a_turned_head_moves_by_its_angle(head):
    """A yaw moves a vertex along the chord: 2 sin(angle / 2) times its distance from the axis."""
    code = head.mean_code(1, 64)
    turned = pipeline.turn(head, code, yaw=10)
    face = head.verts(code.shape, code.exp, code.pose)[0, head.masks["face"] > 0.5]
    from_axis = face[:, [0, 2]].square().sum(1).mean().sqrt()
    got = reinfer.distances(head, turned, code)
    want = 2 * math.sin(math.radians(5)) * float(from_axis) * 1000
    assert float(got["pose"]) == pytest.approx(want, rel=1e-3)
    assert float(reinfer.errors(head, turned, code)["pose"]) == pytest.approx(math.radians(10) / 6**0.5)
    assert all(got[k].abs().max() < 1e-3 for k in ("light", "shape", "expression"))


def test_each_part_moves_its_own_distance_alone(head, code):
    jaw = code.pose + torch.tensor([0, 0, 0, 0.2, 0, 0, 0, 0])
    edits = {
        "shape": code.replace(shape=code.shape.roll(1, 0)),
        "expression": code.replace(exp=code.exp.roll(1, 0), pose=jaw),
        "light": code.replace(light=sh.rotate(code.light, torch.eye(3)[[1, 0, 2]][None])),
    }
    for part, edited in edits.items():
        got = reinfer.distances(head, edited, code)
        assert got[part].min() > 1
        assert all(got[k].max() < 1e-3 for k in reinfer.PARTS if k != part)


def test_expression_distance_is_linear(head):
    code = head.mean_code(1, 64)
    smiles = [pipeline.turn(head, code, mouthSmile_L=w, mouthSmile_R=w) for w in (0.4, 0.8)]
    one, two = (float(reinfer.distances(head, c, code)["expression"]) for c in smiles)
    assert two == pytest.approx(2 * one, rel=1e-3) and one > 0.3


def test_the_level_of_a_light_does_not_count_and_its_direction_does():
    """shading = a + b x on visible normals, of which x has mean 0 and mean square 1/3."""
    light = torch.zeros(1, 9, 3)
    light[:, 0] = 1.0
    flat = light.clone()
    light[:, 1] = 0.5
    normals = torch.tensor([[0.0, 0.0, 1.0], [1.0, 0.0, 0.0]])
    shading = sh.basis(normals) @ light[0, :, 0]
    a, b = float(shading[0]), float(shading[1] - shading[0])
    assert float(reinfer.shading_error(1.7 * light, light)) == pytest.approx(0, abs=1e-3)
    want = 100 * (b / 3**0.5) / math.sqrt(a * a + b * b / 3)
    assert float(reinfer.shading_error(flat, light)) == pytest.approx(want, rel=0.01)


def test_codes_of_another_head_are_refused(head, code):
    for compare in (reinfer.errors, reinfer.distances):
        with pytest.raises(ValueError, match="belongs to the 'flame' head"):
            compare(head, code.replace(head="flame"), code)


# ----------------------------------------------------------------------------------------- estimating again


def test_rendered_persons_are_nearer_to_their_codes_than_the_mean_face(head, persons):
    mean = head.mean_code(2, 160)
    far = reinfer.distances(head, mean, persons.code)
    for points, bounds in (
        (persons.landmarks, {"light": 0.8, "shape": 0.85, "expression": 0.7, "pose": 0.3}),
        (None, {"light": 0.8, "expression": 0.95, "pose": 0.5}),
    ):
        found = reinfer.reinfer(head, persons.image, points)
        assert reinfer.seen(found).all() and found.size == (160, 160)
        near = reinfer.distances(head, found, persons.code)
        for part, bound in bounds.items():
            assert near[part].mean() < bound * far[part].mean(), part
    # of the coefficients one picture says little: why `distances` are there
    off, far = (reinfer.errors(head, c, persons.code)["shape"].mean() for c in (found, mean))
    assert off > 0.9 * far


def test_a_picture_without_a_face_is_a_row_of_nan(head, persons):
    empty = torch.full((1, 3, 160, 160), 0.4)
    images = torch.cat([empty, persons.image[:1]])
    found = reinfer.reinfer(head, images)
    assert reinfer.seen(found).tolist() == [False, True]
    wanted = persons.code[[0, 0]]
    for values in (reinfer.errors(head, found, wanted), reinfer.distances(head, found, wanted)):
        assert all(v[0].isnan() and v[1].isfinite() for v in values.values())
    points = persons.landmarks[:1].repeat(2, 1, 1)
    points[0] = torch.nan
    assert reinfer.seen(reinfer.reinfer(head, images, points)).tolist() == [False, True]


def test_no_picture_is_an_error(head):
    with pytest.raises(ValueError, match="picture"):
        reinfer.reinfer(head, torch.zeros(3, 64, 64))


def test_an_encoder_takes_the_place_of_the_fit(head, persons, monkeypatch):
    asked = []

    def encode(net, image, points):
        asked.append((net, points))
        return head.mean_code(1, 160).replace(shape=points[:, :1, :1].expand(1, 1, head.sizes.shape)[:, 0])

    monkeypatch.setattr(reinfer.deca, "encode", encode)
    found = reinfer.reinfer(head, persons.image, persons.landmarks, encoder="net")
    assert [net for net, _ in asked] == ["net", "net"]
    assert torch.equal(found.shape[:, 0], persons.landmarks[:, 0, 0])
