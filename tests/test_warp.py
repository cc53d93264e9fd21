import pytest
import torch

from rig_core import buffers, checkpoints, pipeline, warp


@pytest.fixture(scope="module")
def head():
    return checkpoints.load_head()


@pytest.fixture(scope="module")
def code(head):
    return head.mean_code(1, (96, 96))


def test_an_unedited_head_does_not_move(head, code):
    grid, hidden = warp.flow(head, code, code)
    assert warp.same_geometry(code, code)
    assert (grid - warp.pixel_grid((96, 96)).permute(0, 2, 3, 1)).abs().max() < 2e-3
    assert hidden.max() == 0


def test_a_shift_of_the_camera_is_the_flow_inside_the_head(head, code):
    pixel = 2 / 96
    there = code.replace(cam=code.cam + torch.tensor([[0.0, 4 * pixel / code.cam[0, 0], 0.0]]))
    grid, _ = warp.flow(head, code, there)
    move = (grid - warp.pixel_grid((96, 96)).permute(0, 2, 3, 1))[0]
    inside = buffers.render(head, there).mask[0, 0] > 0
    core = torch.nn.functional.avg_pool2d(inside[None].float(), 9, 1, 4)[0] == 1
    assert torch.allclose(move[core][:, 0], torch.tensor(-4 * pixel), atol=2e-3)
    assert move[core][:, 1].abs().max() < 2e-3
    assert move[0, 0].abs().max() < 0.5 * pixel  # the corner of the picture stays


def test_a_marked_cheek_travels_with_the_head(head, code):
    """A spot painted on the photo lands where the turned head has that point."""
    turned = pipeline.turn(head, code, yaw=15)
    vertex = head.landmark_index[33]  # under the nose
    at = lambda c: buffers.to_pixels(  # noqa: E731
        buffers.to_image(head.verts(c.shape, c.exp, c.pose), c)[:, vertex], c.size
    )[0]
    y, x = torch.meshgrid(torch.arange(96.0), torch.arange(96.0), indexing="ij")
    spot = torch.exp(-((x - at(code)[0]) ** 2 + (y - at(code)[1]) ** 2) / 8)
    moved = warp.apply(spot.expand(1, 3, 96, 96), warp.flow(head, code, turned)[0])[0, 0]
    centre = torch.stack([(moved * x).sum(), (moved * y).sum()]) / moved.sum()
    assert at(turned)[0] > at(code)[0] + 3  # yaw > 0 is to the right of the picture
    assert (centre - at(turned)).abs().max() < 2


def test_the_far_cheek_is_hidden_after_a_turn(head, code):
    side = pipeline.turn(head, code, yaw=35)
    _, hidden = warp.flow(head, side, code)  # back to the front: one side was never seen
    assert hidden.sum() > 100
    left, right = hidden[..., :48].sum(), hidden[..., 48:].sum()
    assert right > 3 * left


def test_spread_keeps_what_is_known_and_fades():
    value = torch.zeros(1, 1, 64, 64)
    weight = torch.zeros(1, 1, 64, 64)
    weight[..., 24:40, 24:40] = 1
    value[..., 24:40, 24:40] = 3
    out = warp.spread(value, weight, 0.15)
    assert torch.allclose(out[..., 28:36, 28:36], torch.tensor(3.0), atol=1e-4)
    assert 0.5 < out[0, 0, 32, 43] < 3.01
    assert out[0, 0, 0, 0].abs() < 1e-3


def test_blur_keeps_constants_and_mass():
    assert torch.allclose(warp.blur(torch.full((1, 2, 20, 20), 0.7), 3.0), torch.tensor(0.7), atol=1e-6)
    dot = torch.zeros(1, 1, 41, 41)
    dot[..., 20, 20] = 1
    assert warp.blur(dot, 2.0).sum() == pytest.approx(1, abs=1e-4)
