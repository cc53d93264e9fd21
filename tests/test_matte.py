"""The matte of face, neck and hair: against renders whose truth is known, its parts, and bad input."""

import types

import pytest
import torch
import torch.nn.functional as F
from scipy import ndimage

from rig_core import checkpoints, matte
from training import synth
from training.evaluate_matte import measure, overlap, sheet

SEEDS = (910_001, 910_004, 910_013, 910_022)


@pytest.fixture(scope="module")
def head():
    return checkpoints.load_head()


@pytest.fixture(scope="module")
def truth():
    return synth.render(SEEDS, 128)


@pytest.fixture(scope="module")
def found(head, truth):
    return matte.head_matte(head, truth.code, truth.image)


def test_it_finds_the_hair(head, truth, found):
    want = (1 - truth.cloth - truth.background).clamp(0, 1)
    (rendered, same), seconds = measure(head, truth, fitted=False)
    torch.testing.assert_close(same, overlap(found, want), atol=1e-3, rtol=0)
    assert same.min() > 0.9 and same.mean() > rendered.mean() + 0.04
    assert found.shape == (4, 1, 128, 128) and found.min() >= 0 and found.max() <= 1
    hair = truth.hair * (1 - truth.head)  # beside the head's own mesh
    assert (found * hair).sum() > 0.75 * hair.sum()
    assert (found * truth.background).sum() < 0.06 * truth.background.sum()
    assert seconds > 0


def test_a_batch_is_its_pictures(head, truth, found):
    for i in range(2):
        alone = matte.head_matte(head, truth.code[i], truth.image[i : i + 1])
        torch.testing.assert_close(alone, found[i : i + 1], atol=2e-3, rtol=0)


@pytest.mark.parametrize("size", [64, 100, 129, 512])
def test_sizes(head, truth, found, size):
    image = F.interpolate(truth.image[:1], (size, size), mode="bilinear", antialias=True)
    other = matte.head_matte(head, truth.code[:1], image)
    assert other.shape == (1, 1, size, size) and other.isfinite().all()
    back = F.interpolate(other, (128, 128), mode="bilinear", antialias=True)
    assert overlap(back, found[:1]) > 0.95


def test_a_gleam_on_the_hair_is_no_hole(head, truth, found):
    place = matte.regions(head, truth.code[:1], 128)
    row, column = place.scalp[0, 0].mul(place.inner[0, 0]).nonzero().float().mean(0).long().tolist()
    backdrop = truth.image[:1, :, 2, 2].reshape(1, 3, 1, 1)
    image = truth.image[:1].clone()
    image[..., row - 3 : row + 4, column - 3 : column + 4] = backdrop
    out = matte.head_matte(head, truth.code[:1], image)
    assert out[..., row - 3 : row + 4, column - 3 : column + 4].min() > 0.8


def test_light_and_contrast_hardly_matter(head, truth, found):
    darker = matte.head_matte(head, truth.code, truth.image * 0.8)
    assert overlap(darker, found).min() > 0.93


@pytest.mark.parametrize("value", [0.0, 0.5, 1.0])
def test_a_picture_of_one_colour_gives_the_rendered_head(head, truth, value):
    out = matte.head_matte(head, truth.code[:1], torch.full((1, 3, 128, 128), value))
    place = matte.regions(head, truth.code[:1], 128)
    assert out.isfinite().all()
    assert out[place.sure > 0.5].mean() > 0.95
    assert out[place.distance > 1].max() < 0.05


def test_a_head_outside_the_picture_gives_nothing(head, truth):
    code = truth.code[:1]
    code = code.replace(cam=code.cam + torch.tensor([0.0, 5.0, 0.0]) / code.cam[:, :1])
    out = matte.head_matte(head, code, truth.image[:1])
    assert out.isfinite().all() and out.max() < 0.01


def test_regions(head, truth):
    r = matte.regions(head, truth.code, 128)
    assert all(v.shape == (4, 1, 128, 128) for v in vars(r).values())
    assert (r.core * r.neck).max() == 0 and (r.inner <= r.core).all() and (r.sure <= r.inner).all()
    rendered = (r.core + r.neck > 0).float()  # clothes over the neck included
    assert (rendered - (truth.head > 0.5).float()).abs().mean() < 0.03
    assert r.below[0, 0, 1, 0] > r.below[0, 0, 0, 0] and r.below[0, 0, 0, 0] < 0
    assert r.scalp.sum() > 1000 and (r.skin * (r.scalp > 0.9)).max() < 0.11


def test_distance_is_euclidean():
    mask = torch.zeros(1, 1, 64, 64)
    mask[0, 0, 20:30, 8:40] = 1
    mask[0, 0, 50:54, 50:52] = 1
    want = torch.from_numpy(ndimage.distance_transform_edt(1 - mask[0, 0].numpy())).float()
    got = matte._distance(mask)[0, 0]
    assert (got - want).abs().max() < 1.6  # solved at half size
    assert (got - want).abs().mean() < 0.6
    assert (got[mask[0, 0] > 0] == 0).all()
    assert matte._distance(torch.zeros(1, 1, 16, 16)).min() >= 16


def test_islands_and_narrow_bridges_are_dropped():
    p, seed = torch.zeros(1, 1, 64, 64), torch.zeros(1, 1, 64, 64)
    p[..., 10:40, 10:30] = 1
    seed[..., 20:22, 20:22] = 1
    p[..., 10:40, 50:60] = 1  # an island, but for the bridge
    p[..., 24:25, 30:50] = 1
    p[..., 40:60, 12:20] = 1  # a lock
    out = matte._connected(p, seed)[0, 0]
    assert out[20, 15] == 1 and out[38, 28] == 1 and out[58, 15] > 0.95
    assert out[10:40, 51:].max() < 0.05 and out[24, 40] < 0.05
    assert (out <= p[0, 0]).all()


def test_likelihood_is_the_share_of_like_colours():
    image = torch.zeros(1, 3, 16, 16)
    image[..., :8, :] = torch.tensor([0.8, 0.2, 0.1])[:, None, None]
    image[..., 8:, :] = torch.tensor([0.2, 0.3, 0.7])[:, None, None]
    image[..., 15, 15] = 0.99
    weights = torch.zeros(1, 2, 16, 16)
    weights[:, 0, :4], weights[:, 1, 12:] = 1, 2
    like = matte._likelihood(matte._codes(image), weights)[0]
    assert (like[0, :8] > 100 * like[1, :8]).all() and (like[1, 8:15] > 100 * like[0, 8:15]).all()
    torch.testing.assert_close(like[0, 0], like[0, 7])
    more = matte._likelihood(matte._codes(image), weights * 3)[0]
    torch.testing.assert_close(more, like)  # a density, whatever the number of pixels


def test_the_guided_filter_follows_the_edge_of_the_picture():
    image = torch.zeros(1, 3, 64, 64)
    image[..., 30:] = torch.tensor([0.9, 0.6, 0.5])[:, None, None]
    rough = torch.zeros(1, 1, 64, 64)
    rough[..., 31:] = 1
    out = matte._guided(image, rough, image)
    assert out[..., 33:].min() > 0.95 and out[..., :28].max() < 0.05
    assert out[..., 30].mean() > 3 * out[..., 29].mean() + 0.2  # towards where the colour changes
    fine = F.interpolate(image, (256, 256), mode="nearest")
    assert matte._guided(image, rough, fine).shape == (1, 1, 256, 256)


def test_sheet(head, truth):
    class Photos(list):
        images = staticmethod(lambda picks, size: (truth.image[picks] * 255).round().byte())
        codes = staticmethod(lambda picks: truth.code[picks])

    out = sheet(head, Photos(range(4)), 4, columns=2)
    assert out.shape == (3, 256, 512)
    torch.testing.assert_close(out[:, :128, :128], truth.image[0], atol=0.002, rtol=0)


def test_bad_input(head, truth):
    code, image = truth.code[:1], truth.image[:1]
    broken = image.clone()
    broken[0, 0, 0, 0] = torch.nan
    with pytest.raises(ValueError, match="NaN"):
        matte.head_matte(head, code, broken)
    with pytest.raises(ValueError, match=r"square picture of 16 px or more, got \[1, 3, 128, 100\]"):
        matte.head_matte(head, code, image[..., :100])
    with pytest.raises(ValueError, match="square picture of 16 px"):
        matte.head_matte(head, code, image[..., :8, :8])
    with pytest.raises(ValueError, match="4 pictures need as many face codes, got 1"):
        matte.head_matte(head, code, truth.image)
    with pytest.raises(ValueError, match="belongs to the 'flame' head"):
        matte.head_matte(head, code.replace(head="flame"), image)
    bare = types.SimpleNamespace(
        name="open", sizes=head.sizes, masks={"face": torch.ones(3), "neck": torch.ones(3)}
    )
    with pytest.raises(ValueError, match="no mask 'scalp': use the open head or a face parser"):
        matte.head_matte(bare, code, image)
