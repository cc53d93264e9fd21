"""The dataset folder, its sampler and its loader."""

from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors import safe_open

from rig_core import data
from rig_core.face import FaceCode


def codes(n, size=16, head="open", seed=0):
    g = torch.Generator().manual_seed(seed)
    sizes = {"shape": (4,), "tex": (3,), "exp": (5,), "pose": (8,), "cam": (3,), "light": (9, 3)}
    fields = {k: torch.randn(n, *v, generator=g) for k, v in sizes.items()}
    return FaceCode(**fields, crop=torch.eye(3).repeat(n, 1, 1), size=(size, size), head=head)


def pictures(n, size=16, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (n, 3, size, size), generator=g, dtype=torch.uint8)


def names(n, start=0):
    return [f"p{i:03d}" for i in range(start, start + n)]


@pytest.fixture
def folder(tmp_path):
    """Two shards: 5 + 3 portraits, the last two of a validation split."""
    data.append(tmp_path, names(5), pictures(5), codes(5), person=["a", "a", "b", "c", "c"])
    more = {"split": ["train", "val", "val"], "tags": ("side",), "weight": 2.0}
    data.append(tmp_path, names(3, 5), pictures(3, seed=1), codes(3, seed=1), **more)
    data.finish(tmp_path)
    return tmp_path


def test_what_is_written_comes_back(folder):
    d = data.Dataset.open(folder)
    assert (len(d), d.size, d.head) == (8, (16, 16), "open")
    assert [e.name for e in d.entries] == names(8)
    assert [e.person for e in d.entries] == ["a", "a", "b", "c", "c", "", "", ""]
    assert d.weights().tolist() == [1] * 5 + [2] * 3
    both = torch.cat([pictures(5), pictures(3, seed=1)])
    assert torch.equal(d.images(range(8), 16), both)
    found, first, second = d.codes([6, 0, 6]), codes(5), codes(3, seed=1)
    for k in data.FIELDS:
        a, b = getattr(first, k), getattr(second, k)
        assert torch.equal(getattr(found, k), torch.stack([b[1], a[0], b[1]]))


def test_splits_and_tags(folder):
    d = data.Dataset.open(folder)
    assert [e.name for e in d.select("val").entries] == ["p006", "p007"]
    assert [e.name for e in d.select(tag="side").entries] == ["p005", "p006", "p007"]
    assert [e.name for e in d.select("train", "side").entries] == ["p005"]
    assert torch.equal(d.select("val").images([0], 16)[0], pictures(3, seed=1)[1])
    assert torch.equal(d.select("val").codes([1]).light, codes(3, seed=1).light[2:])


def test_float_pictures_and_jpeg(tmp_path):
    smooth = torch.linspace(0, 1, 16).expand(2, 3, 16, 16)
    data.append(tmp_path, ["a", "b"], smooth, codes(2), kind="jpg")
    data.finish(tmp_path)
    d = data.Dataset.open(tmp_path)
    assert d.path(0).name == "a.jpg"
    assert (d.images([0, 1], 16).float() / 255 - smooth).abs().max() < 0.02


def test_pictures_are_shrunk_over_whole_areas(tmp_path):
    checker = torch.zeros(1, 3, 16, 16, dtype=torch.uint8)
    checker[:, :, ::2, ::2] = checker[:, :, 1::2, 1::2] = 255
    data.append(tmp_path, ["a"], checker, codes(1))
    data.finish(tmp_path)
    small = data.Dataset.open(tmp_path).images([0], 4)
    assert small.shape == (1, 3, 4, 4) and (small.float() - 127.5).abs().max() < 4


def test_preload_gives_the_same_pictures(folder):
    d = data.Dataset.open(folder)
    wanted = d.images([3, 7, 3], 8)
    d.preload(8)
    for i in range(8):
        d.path(i).unlink()
    assert torch.equal(d.images([3, 7, 3], 8), wanted)
    with pytest.raises(ValueError, match="not a readable picture"):
        d.images([0], 16)  # another size is read from its file


def test_a_cut_writer_goes_on(tmp_path):
    data.append(tmp_path, names(3), pictures(3), codes(3))
    (tmp_path / "codes-00001.safetensors.part").write_bytes(b"cut")
    assert data.written(tmp_path) == set(names(3))
    with pytest.raises(FileNotFoundError, match="index.json is missing"):
        data.Dataset.open(tmp_path)
    data.append(tmp_path, names(2, 3), pictures(2), codes(2))
    data.finish(tmp_path)
    assert [e.shard for e in data.Dataset.open(tmp_path).entries] == ["codes-00000.safetensors"] * 3 + [
        "codes-00001.safetensors"
    ] * 2
    data.append(tmp_path, names(1, 5), pictures(1), codes(1))
    with pytest.raises(ValueError, match="codes-00002.safetensors do not match"):
        data.Dataset.open(tmp_path)


def test_wrong_additions_are_refused_and_change_nothing(folder):
    before = sorted(p.name for p in folder.rglob("*"))
    wrong = [
        ((["p003"], pictures(1), codes(1)), "already has an entry 'p003'"),
        ((["x", "x"], pictures(2), codes(2)), "already has an entry 'x'"),
        ((["x"], pictures(2), codes(2)), "do not match"),
        ((["x"], pictures(1, 8), codes(1)), "both square"),
        ((["x"], pictures(1, 8), codes(1, 8)), "holds"),
        ((["x"], pictures(1), codes(1, head="flame")), "'flame'"),
    ]
    for arguments, message in wrong:
        with pytest.raises(ValueError, match=message):
            data.append(folder, *arguments)
    assert sorted(p.name for p in folder.rglob("*")) == before
    with pytest.raises(ValueError, match="nothing was written"):
        data.finish(folder / "images")


def test_a_broken_picture_is_named(folder):
    d = data.Dataset.open(folder)
    d.path(2).write_bytes(b"not a picture")
    with pytest.raises(ValueError, match="p002.png is not a readable picture"):
        d.images([2], 16)


def test_grey_and_transparent_pictures_become_rgb(folder):
    d = data.Dataset.open(folder)
    Image.new("L", (16, 16), 77).save(d.path(0))
    Image.new("RGBA", (16, 16), (10, 20, 30, 40)).save(d.path(1))
    assert (d.images([0], 16) == 77).all()
    assert d.images([1], 16)[0, :, 0, 0].tolist() == [10, 20, 30]


def test_a_writer_of_many_shards_reads_each_once(tmp_path, monkeypatch):
    opened = []
    monkeypatch.setattr(data, "safe_open", lambda *a: opened.append(a[0].name) or safe_open(*a))
    for i in range(5):
        data.append(tmp_path, names(2, 2 * i), pictures(2), codes(2))
    data.finish(tmp_path)
    assert opened == [f"codes-{i:05d}.safetensors" for i in range(5)]
    assert len(data.Dataset.open(tmp_path)) == 10


# ------------------------------------------------------------------------------------------------ drawing


def test_equal_weights_give_ordinary_epochs():
    sampler = data.Sampler(np.ones(10), seed=3)
    first, second = sampler.take(0, 10), sampler.take(10, 10)
    assert sorted(first) == sorted(second) == list(range(10))
    assert first.tolist() != second.tolist()


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.floats(0.1, 20), min_size=1, max_size=30),
    st.integers(0, 2**31),
    st.integers(0, 200),
    st.integers(1, 70),
)
def test_the_sequence_depends_on_the_position_alone(weights, seed, position, count):
    whole = data.Sampler(np.array(weights), seed).take(0, position + count)
    part = data.Sampler(np.array(weights), seed).take(position, count)
    assert np.array_equal(whole[position:], part)


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.floats(0, 20), min_size=1, max_size=30).filter(lambda w: sum(w) > 0.1), st.integers(0, 2**31)
)
def test_each_round_draws_in_proportion(weights, seed):
    n, w = len(weights), np.array(weights)
    counts = np.bincount(data.Sampler(w, seed).round(0), minlength=n)
    assert (np.abs(counts - n * w / w.sum()) <= 1 + 1e-9).all()


@pytest.mark.parametrize("weights", [[], [0.0, 0.0], [1.0, -1.0], [1.0, float("nan")]])
def test_impossible_weights_say_so(weights):
    with pytest.raises(ValueError, match="nothing to draw from"):
        data.Sampler(np.array(weights), 0)


def test_loader_is_a_function_of_the_step(folder):
    d = data.Dataset.open(folder)
    with data.Loader([d], 16, 3, seed=4) as forth, data.Loader([d], 16, 3, seed=4) as jump:
        batches = [forth(i) for i in range(8)]
        again = jump(5), jump(2), forth(5)
    for a, b in ((again[0], batches[5]), (again[1], batches[2]), (again[2], batches[5])):
        assert torch.equal(a.index, b.index) and torch.equal(a.image, b.image)
        assert torch.equal(a.code.light, b.code.light)
    for b in batches:
        assert torch.equal(b.image, d.images(b.index.tolist(), 16))
        assert torch.equal(b.code.exp, d.codes(b.index.tolist()).exp)


def test_mixture_keeps_shares_weights_and_frames(folder, tmp_path):
    data.append(tmp_path / "more", names(40), pictures(40, 32), codes(40, 32, seed=9))
    data.finish(tmp_path / "more")
    sets = [data.Dataset.open(folder), data.Dataset.open(tmp_path / "more")]
    with data.Loader(sets, 8, 6, shares=[3, 1]) as loader:
        batches = [loader(i) for i in range(160)]
    drawn = Counter(torch.cat([b.index for b in batches]).tolist())
    small = sum(v for k, v in drawn.items() if k < 8)
    assert abs(small / 960 - 0.75) < 0.02
    assert abs(drawn[5] / drawn[0] - 2) < 0.25  # its weight is 2
    b = next(b for b in batches if 0 < (b.index < 8).sum() < 6)
    assert b.code.size == (8, 8) and b.image.shape == (6, 3, 8, 8)
    for k, i in enumerate(b.index.tolist()):
        source, row, old = (sets[0], i, 16) if i < 8 else (sets[1], i - 8, 32)
        wanted = source.codes([row])
        assert torch.equal(b.code.shape[k], wanted.shape[0])
        # image space, where the head is drawn, stays put: its corner is at 0 in both pixel grids
        corner = torch.tensor([0.0, 8.0, 1.0]) @ b.code.crop[k].T
        torch.testing.assert_close(corner, torch.tensor([0.0, old, 1.0]) @ wanted.crop[0].T)


def test_processes_share_the_draws_of_one(folder, tmp_path):
    """Picture by picture, whatever the number of processes; the other picture of a person too."""
    data.append(tmp_path / "more", names(9), pictures(9, 32), codes(9, 32, seed=9), person=["x"] * 9)
    data.finish(tmp_path / "more")
    sets = [data.Dataset.open(folder), data.Dataset.open(tmp_path / "more")]
    whole, *parts = loaders = [
        data.Loader(sets, 16, 8 // world, 1, rank=rank, world=world)
        for world, rank in ((1, 0), (4, 0), (4, 1), (4, 2), (4, 3))
    ]
    for step in range(3):
        wanted, found = whole(step), [part(step) for part in parts]
        assert wanted.index.tolist() == data.Sampler(whole_weights(sets), 1).take(8 * step, 8).tolist()
        for k in ("index", "image", "reference"):
            assert torch.equal(torch.cat([getattr(b, k) for b in found]), getattr(wanted, k))
        assert torch.equal(torch.cat([b.code.shape for b in found]), wanted.code.shape)
    for loader in loaders:
        loader.close()


def whole_weights(sets):
    return np.concatenate([d.weights() / d.weights().sum() for d in sets])


def test_datasets_that_cannot_be_mixed_say_so(folder, tmp_path):
    data.append(tmp_path / "flame", ["a"], pictures(1), codes(1, head="flame"))
    data.finish(tmp_path / "flame")
    sets = [data.Dataset.open(folder), data.Dataset.open(tmp_path / "flame")]
    with pytest.raises(ValueError, match="cannot be mixed"):
        data.Loader(sets, 16, 2)
    with pytest.raises(ValueError, match="need 1 shares, got 2"):
        data.Loader(sets[:1], 16, 2, shares=[1, 2])


def test_reference_is_another_picture_of_the_same_person(folder):
    d = data.Dataset.open(folder)
    with data.Loader([d], 16, 8, seed=2) as loader, data.Loader([d], 16, 8, seed=2) as again:
        for step in range(4):
            b, same = loader(step), again(step)
            assert torch.equal(b.reference, same.reference)
            for i, found in zip(b.index.tolist(), b.reference):
                siblings = {0: [1], 1: [0], 3: [4], 4: [3]}.get(i, [i])  # alone or unknown: itself
                assert any(torch.equal(found, d.images([k], 16)[0]) for k in siblings)
