import pytest
import torch

from rig_core import align, buffers, checkpoints, pipeline, sh
from training import evaluate, evaluate_fit


@pytest.fixture(scope="module")
def head():
    return checkpoints.load_head()


def lambertian_pair(head):
    """A pair without anything that the buffers lack: the ratio image must be exact."""
    light = lambda x: sh.encode_light(  # noqa: E731
        sh.from_direction(torch.tensor([[x, 0.2, 1.0]]), 0.4, softness=0.4, ambient=0.3)
    )
    source = head.mean_code(1, (64, 64)).replace(light=light(-1.0))
    target = source.replace(light=light(1.0))
    a, b = buffers.render(head, source), buffers.render(head, target)
    portrait = pipeline.Portrait(a.rendered.clamp(0, 1), align.Crop(torch.eye(3)[None], 64), source)
    return evaluate.Pair(portrait, b.rendered.clamp(0, 1), target, a.mask, a.mask)


def test_psnr():
    a, b = torch.zeros(1, 3, 4, 4), torch.full((1, 3, 4, 4), 0.1)
    assert evaluate.psnr(a, b) == pytest.approx(20, abs=1e-3)
    mask = torch.zeros(1, 1, 4, 4)
    mask[..., 0] = 1
    b[..., 1:] = 0.9
    assert evaluate.psnr(a, b, mask) == pytest.approx(20, abs=1e-3)


def test_baselines_on_a_lambertian_pair(head):
    pair = lambertian_pair(head)
    score = {
        f: evaluate.psnr(f(pair, None, head), pair.truth, pair.head)
        for f in (evaluate.unchanged, evaluate.ratio_image, evaluate.lambertian)
    }
    assert score[evaluate.unchanged] < 26
    assert score[evaluate.ratio_image] > 40
    assert score[evaluate.lambertian] > 60


def test_ssim_is_one_only_for_equal_pictures(head):
    pytest.importorskip("kornia", reason="structural similarity needs `pip install kornia`")
    pair = lambertian_pair(head)
    assert evaluate.ssim(pair.truth, pair.truth, pair.head) == pytest.approx(1, abs=1e-5)
    assert evaluate.ssim(pair.source.image, pair.truth, pair.head) < 0.95


def test_held_out_pairs_differ_in_light_alone():
    (pair,) = evaluate.pairs(1, 64)
    assert torch.equal(pair.source.code.shape, pair.target.shape)
    assert torch.equal(pair.source.code.pose, pair.target.pose)
    assert not torch.allclose(pair.source.code.light, pair.target.light, atol=0.05)
    assert (pair.source.image - pair.truth).abs().mean() > 0.005


def test_table():
    text = evaluate.table(["a", "b"], [["x", 0.12345], ["y", 23.456]])
    assert text.splitlines() == ["| a | b |", "| --- | --- |", "| x | 0.123 |", "| y | 23.46 |"]


def test_fit_table_of_known_heads(head, tmp_path):
    import json

    code = head.mean_code(1, (256, 256))
    code = pipeline.turn(head, code, yaw=10)
    points = buffers.to_pixels(
        buffers.to_image(head.landmarks(head.verts(code.shape, code.exp, code.pose), code.pose), code),
        code.size,
    )
    (tmp_path / "one.json").write_text(json.dumps({"landmarks": points[0].tolist()}))
    distance, seconds = evaluate_fit.measure(head, evaluate_fit.read_landmarks(tmp_path))
    assert distance.shape == (1, 68) and distance[:, 17:].median() < 0.8 and seconds > 0
    with pytest.raises(FileNotFoundError, match="neither"):
        evaluate_fit.read_landmarks(tmp_path / "nothing")
