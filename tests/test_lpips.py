"""LPIPS: recorded outputs of the published code on random weights, and the files that it reads."""

import math

import pytest
import torch

from rig_core.files import CheckpointError
from tests.golden_files import golden
from training import lpips


@pytest.fixture(scope="module")
def weights():
    """The weights behind the golden file: one generator over the sorted keys."""
    shapes = lpips._backbone() | lpips._linear()
    g, out = torch.Generator().manual_seed(4004), {}
    for k in sorted(shapes):
        r, shape = torch.randn(shapes[k], generator=g), shapes[k]
        if len(shape) < 2:
            out[k] = 0.05 * r
        else:
            out[k] = r.abs() / shape[1] if k.startswith("lin") else r / math.sqrt(math.prod(shape[1:]))
    return out


@pytest.fixture
def folder(weights, tmp_path):
    """The two files as they are published: the backbone with a classifier, the linear layers alone."""
    backbone = {k: v for k, v in weights.items() if k.startswith("features.")}
    torch.save(backbone | {"classifier.6.bias": torch.zeros(1000)}, tmp_path / lpips.BACKBONE)
    torch.save({k: v for k, v in weights.items() if k.startswith("lin")}, tmp_path / lpips.LINEAR)
    return tmp_path


def test_the_published_code_gives_the_same(weights):
    t, _ = golden("lpips_alex")
    got = lpips.distance(weights, t["a"].float() / 255, t["b"].float() / 255)
    assert torch.allclose(got, t["distance"], rtol=1e-4, atol=0)
    assert torch.allclose(t["layers"].sum(0), t["distance"], rtol=1e-5, atol=0)


def test_equal_pictures_are_no_distance_apart_and_order_does_not_count(weights):
    a, b = torch.rand(2, 2, 3, 64, 40, generator=torch.Generator().manual_seed(0))
    assert torch.equal(lpips.distance(weights, a, a), torch.zeros(2))
    assert torch.allclose(lpips.distance(weights, a, b), lpips.distance(weights, b, a), rtol=1e-6)
    near = (a + 0.02 * torch.randn(a.shape)).clamp(0, 1)
    assert (lpips.distance(weights, a, near) < lpips.distance(weights, a, b)).all()


def test_features_are_of_unit_length(weights):
    maps = lpips.features(weights, torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0)))
    assert [m.shape[1:] for m in maps] == [(64, 15, 15), (192, 7, 7), (384, 3, 3), (256, 3, 3), (256, 3, 3)]
    for m in maps:
        length = m.norm(dim=1)
        assert torch.allclose(length[length > 0], torch.ones(()), atol=1e-5) and (length > 0).any()


def test_small_pictures_are_refused(weights):
    with pytest.raises(ValueError, match="32 px"):
        lpips.distance(weights, torch.zeros(1, 3, 31, 64), torch.zeros(1, 3, 31, 64))


def test_both_files_are_read(folder, weights):
    read = lpips.load(folder)
    assert read.keys() == weights.keys()
    assert all(torch.equal(read[k], weights[k]) for k in weights)


def test_a_missing_file_is_named_with_its_source(folder):
    (folder / lpips.LINEAR).unlink()
    with pytest.raises(CheckpointError, match=r"alex\.pth is missing.*PerceptualSimilarity"):
        lpips.load(folder)


def test_weights_of_another_network_are_refused(folder, weights):
    torch.save({"lin0.model.1.weight": torch.zeros(1, 64, 1, 1)}, folder / lpips.LINEAR)
    with pytest.raises(CheckpointError, match=r"'lin1\.model\.1\.weight' is missing"):
        lpips.load(folder)
    torch.save({"features.0.weight": torch.zeros(64, 3, 3, 3)}, folder / lpips.BACKBONE)
    with pytest.raises(CheckpointError, match=r"'features\.0\.weight' is \[64, 3, 3, 3\]"):
        lpips.load(folder)
