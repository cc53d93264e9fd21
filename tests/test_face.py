import math

import pytest
import torch

from rig_core import buffers, checkpoints, face


@pytest.fixture(scope="module")
def head():
    return checkpoints.load_head()


def random_code(head, n, size=(128, 128)):
    g = torch.Generator().manual_seed(1)
    code = head.mean_code(n, size)
    draw = lambda x, s: x + s * torch.randn(x.shape, generator=g)  # noqa: E731
    return code.replace(shape=draw(code.shape, 1), exp=draw(code.exp, 0.5), pose=draw(code.pose, 0.1))


def test_axis_angle_round_trip():
    r = torch.tensor([[0.3, -0.2, 0.9], [0.0, 0.0, 0.0], [1e-5, 0, 0], [0.0, 3.0, 0.0]])
    m = face.axis_angle_to_matrix(r)
    assert torch.allclose(m @ m.transpose(1, 2), torch.eye(3).expand(4, 3, 3), atol=1e-6)
    assert torch.allclose(torch.linalg.det(m), torch.ones(4), atol=1e-6)
    assert torch.allclose(face.matrix_to_axis_angle(m), r, atol=1e-5)


def test_axis_angle_turns_counter_clockwise():
    m = face.axis_angle_to_matrix(torch.tensor([[0.0, 0.0, math.pi / 2]]))
    assert torch.allclose(m @ torch.tensor([1.0, 0, 0]), torch.tensor([[0.0, 1, 0]]), atol=1e-6)


def test_slerp_takes_half_the_angle():
    a, b = torch.tensor([[0.0, 0.2, 0]]), torch.tensor([[0.0, 1.0, 0]])
    assert torch.allclose(face.slerp(a, b, torch.tensor([0.5])), torch.tensor([[0.0, 0.6, 0]]), atol=1e-5)


def test_lerp_ends_and_middle(head):
    code = random_code(head, 2)
    a, b = code[0], code[1]
    for w, want in ((0.0, a), (1.0, b)):
        got = face.lerp(a, b, w)
        assert torch.allclose(got.shape, want.shape) and torch.allclose(got.pose, want.pose, atol=1e-5)
    middle = face.lerp(a, b, torch.tensor([0.25, 0.5]))
    assert len(middle) == 2
    assert torch.allclose(middle.exp[1], (a.exp[0] + b.exp[0]) / 2, atol=1e-6)


def test_indexing_keeps_the_batch_axis(head):
    code = random_code(head, 3)
    assert torch.equal(code[-1].shape, code.shape[2:])
    assert len(code[1:]) == 2
    with pytest.raises(IndexError, match="holds 3 faces"):
        code[3]


def test_cat_and_expand(head):
    code = random_code(head, 2)
    assert torch.equal(face.cat([code[0], code[1]]).pose, code.pose)
    assert torch.equal(code[0].expand(4).shape[3], code.shape[0])
    with pytest.raises(ValueError, match="wanted 1 or 3"):
        code.expand(3)
    with pytest.raises(ValueError, match="no face codes"):
        face.cat([])
    with pytest.raises(ValueError, match="cannot be one batch"):
        face.cat([code, code.resized((64, 64))])


def test_codes_of_another_head_are_refused(head):
    code = random_code(head, 1)
    other = code.replace(head="flame")
    with pytest.raises(ValueError, match="'flame' head.*'open' head"):
        buffers.render(head, other)
    with pytest.raises(ValueError, match="belongs to"):
        face.lerp(code, other, 0.5)


def test_resized_keeps_the_face_in_place(head):
    """Drawn at another resolution a resized code gives what the code itself gives."""
    code = random_code(head, 1)
    verts = head.verts(code.shape, code.exp, code.pose)
    for size in ((256, 256), (32, 32), (50, 90)):
        other = code.resized(size)
        assert other.size == size
        torch.testing.assert_close(buffers.to_image(verts, code), buffers.to_image(verts, other))
    whole, half = buffers.render(head, code, 64), buffers.render(head, code.resized((64, 64)))
    assert torch.equal(whole.mask, half.mask)


def test_codes_fit_a_head_by_name_and_numbers(head):
    code = random_code(head, 2)
    code.require_head(head)
    with pytest.raises(ValueError, match="'target' belongs to the 'flame' head, but the 'open'"):
        code.replace(head="flame").require_head(head, "target")
    for part, n in code.sizes.items():
        longer = code.replace(**{part: torch.zeros(2, n + 1)})
        for refuse in (
            lambda c: c.require_head(head),
            lambda c: face.lerp(code, c, 0.5),
            lambda c: face.cat([code, c]),
        ):
            with pytest.raises(ValueError, match=f"'face_code' has {n + 1} numbers of '{part}'.* has {n}:"):
                refuse(longer)
