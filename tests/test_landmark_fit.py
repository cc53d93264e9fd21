import pytest
import torch

from rig_core import buffers, checkpoints, sh
from rig_core.estimators import landmark_fit

SIZE = 256


@pytest.fixture(scope="module")
def head():
    return checkpoints.load_head()


@pytest.fixture(scope="module")
def truth(head):
    """Four heads of known shape, expression, pose, skin and light."""
    g = torch.Generator().manual_seed(3)
    code = head.mean_code(4, (SIZE, SIZE))
    shape, exp = torch.zeros_like(code.shape), torch.zeros_like(code.exp)
    shape[:, :12] = torch.randn(4, 12, generator=g) * 0.7
    exp[:, :8] = torch.randn(4, 8, generator=g) * 0.5
    pose = torch.zeros_like(code.pose)
    pose[:, :3] = torch.tensor([[0.0, 0, 0], [0.1, 0.35, 0.05], [-0.12, -0.3, 0.2], [0.05, 0.1, -0.25]])
    pose[:, 3] = torch.tensor([0.0, 0.1, 0.2, 0.02])
    tex = torch.zeros_like(code.tex)
    tex[:, 0] = torch.tensor([-1.0, 0.0, 1.0, 1.8])
    directions = torch.tensor([[0.8, 0.2, 0.6], [-0.7, 0.3, 0.6], [0.0, 0.8, 0.6], [0.5, -0.2, 0.8]])
    light = sh.encode_light(sh.from_direction(directions, 0.9, softness=0.3, ambient=0.35))
    return code.replace(shape=shape, exp=exp, pose=pose, tex=tex, light=light)


def project(head, code):
    verts = head.verts(code.shape, code.exp, code.pose)
    return buffers.to_pixels(buffers.to_image(head.landmarks(verts, code.pose), code), code.size)


def test_known_heads_are_found_again(head, truth):
    points = project(head, truth)
    code = landmark_fit.fit(head, points, (SIZE, SIZE))
    assert landmark_fit.residual(head, code, points)[:, 17:].median() < 0.8  # px
    turn = torch.rad2deg((code.pose[:, :3] - truth.pose[:, :3]).abs())
    assert turn[:, 2].max() < 2 and turn.max() < 9  # roll is seen, pitch and yaw hide in the shape


def test_faces_do_not_depend_on_the_batch(head, truth):
    points = project(head, truth)
    both = landmark_fit.fit(head, points, (SIZE, SIZE))
    one = landmark_fit.fit(head, points[2:3], (SIZE, SIZE))
    assert torch.allclose(both.shape[2:3], one.shape, atol=2e-2)
    assert torch.allclose(both.pose[2:3], one.pose, atol=2e-3)


def test_moved_and_scaled_photos_give_the_same_head(head, truth):
    points = project(head, truth)
    here = landmark_fit.fit(head, points, (SIZE, SIZE))
    there = landmark_fit.fit(head, points * 3 + 40, (1000, 1000))
    assert torch.allclose(here.pose, there.pose, atol=0.02)
    assert landmark_fit.residual(head, there, points * 3 + 40)[:, 17:].median() < 2.4


def test_light_and_skin_from_the_photo(head, truth):
    b = buffers.render(head, truth)
    image = b.rendered.clamp(0, 1) * b.mask + 0.5 * (1 - b.mask)
    code = landmark_fit.fit_appearance(head, truth, image)
    again = buffers.render(head, code)
    face = b.mask * (b.normal[:, 2:] > 0.3)
    error = ((again.rendered - b.rendered).square() * face).sum((1, 2, 3)) / (3 * face.sum((1, 2, 3)))
    assert (-10 * error.log10()).min() > 27  # dB
    angle = torch.rad2deg(
        torch.acos((sh.direction(code.light) * sh.direction(truth.light)).sum(1).clamp(-1, 1))
    )
    assert angle.max() < 20
    assert torch.equal(code.tex[:, 0].argsort(), truth.tex[:, 0].argsort())  # dark skin stays dark


@pytest.mark.parametrize(
    ("points", "message"),
    [
        (torch.zeros(2, 67, 2), r"\[faces, 68, 2\]"),
        (torch.zeros(0, 68, 2), "no face"),
        (torch.full((1, 68, 2), torch.nan), "NaN"),
    ],
)
def test_bad_landmarks(head, points, message):
    with pytest.raises(ValueError, match=message):
        landmark_fit.fit(head, points, (SIZE, SIZE))
