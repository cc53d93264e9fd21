"""Identity encoder: recorded outputs of the published network, preprocessing, files, training, default."""

import argparse
import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save_file

from rig_core import align, checkpoints, files
from rig_core.data import append, finish
from rig_core.estimators import identity
from rig_core.estimators.identity import ArcFace, ArcFaceConfig
from rig_core.files import CheckpointError
from tests.golden_files import golden
from training import estimators
from training import identity as training

FOLDER = Path(__file__).parent / "golden"
SMALL = ArcFaceConfig(32, 4, (1, 1, 2, 1), 8)


def recipe(shapes, seed):
    """The weights behind the golden file: one generator over the sorted keys."""
    g = torch.Generator().manual_seed(seed)
    out = {}
    for k in sorted(shapes):
        shape, dtype = shapes[k]
        if not dtype.startswith("float"):
            out[k] = torch.zeros(shape, dtype=getattr(torch, dtype))
        elif k.endswith("running_var"):
            out[k] = 0.5 + torch.rand(shape, generator=g)
        else:
            r = torch.randn(shape, generator=g)
            if k.endswith("running_mean"):
                out[k] = 0.1 * r
            elif len(shape) >= 2:
                out[k] = r / math.sqrt(math.prod(shape[1:]))
            elif k.endswith("weight"):
                out[k] = 0.25 + 0.05 * r if math.prod(shape) == 1 else 1 + 0.1 * r
            else:
                out[k] = 0.05 * r
    return out


def small(seed=0, config=SMALL):
    model = ArcFace(config)
    shapes = {k: (v.shape, str(v.dtype).removeprefix("torch.")) for k, v in model.state_dict().items()}
    model.load_state_dict(recipe(shapes, seed))
    return model.requires_grad_(False).eval()


def line(path, call=checkpoints.load_identity):
    """The message of the error that loading must raise: one line that names the file."""
    with pytest.raises(CheckpointError) as e:
        call(path)
    assert str(path) in str(e.value) and "\n" not in str(e.value) and len(str(e.value)) < 600
    return str(e.value)


# --- the published network ---


@pytest.mark.parametrize(("se", "wanted", "limit"), [(True, "emb", 3e-5), (False, "emb_no_se", 1e-4)])
def test_recorded_vectors_of_the_published_network(se, wanted, limit):
    t, meta = golden("arcface_r18")
    shapes = json.loads((FOLDER / "arcface_r18.json").read_text())["state_dict"]
    shapes = {k: v for k, v in shapes.items() if se or ".se." not in k}
    weights = recipe(shapes, meta["recipe_seed"])
    total = sum(float(v.double().sum()) for v in weights.values())
    assert total == pytest.approx(meta["weights_fingerprint"]["se" if se else "no_se"]["sum"], abs=0.01)
    config = ArcFaceConfig.from_state_dict(weights)
    assert config == ArcFaceConfig(se=se) and config.embedding == 512
    with torch.device("meta"):
        model = ArcFace(config).eval()
    model.load_state_dict(weights, assign=True)  # strict: the official keys
    picture = t["resized_u8"].permute(2, 0, 1)[None]
    with torch.no_grad():
        found = identity.embed(model, picture)
    assert found.shape == (1, 512) and found.dtype == torch.float32
    assert (found - t[wanted]).abs().max() < limit


def test_recorded_preprocessing_to_the_last_bit():
    t, _ = golden("arcface_r18")
    corner = t["image_u8"].permute(2, 0, 1)[None]
    found = identity.resized(corner.float() / 255, 28)  # 64 : 28 is 256 : 112
    assert torch.equal(found[0].permute(1, 2, 0), t["resized_u8"][:28, :28].int())
    x = identity.normalised(t["resized_u8"].permute(2, 0, 1)[None])
    assert torch.equal(x[:, :, :2], t["x"])


# --- preprocessing ---


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 200), st.integers(1, 80), st.integers(0, 255))
def test_flat_pictures_stay_flat(side, size, level):
    found = identity.resized(torch.full((1, 3, side, side), level / 255), size)
    assert found.shape == (1, 3, size, size) and (found == level).all()


def test_twice_smaller_is_the_mean_of_four_pixels_and_the_same_size_is_nothing():
    x = torch.randint(0, 256, (2, 3, 32, 32), generator=torch.Generator().manual_seed(0))
    assert torch.equal(identity.resized(x / 255, 32), x.int())
    mean = F.avg_pool2d(x.double(), 2)
    assert (identity.resized(x / 255, 16) - mean).abs().max() <= 0.5
    larger = identity.resized(x / 255, 64)
    wanted = F.interpolate(x.double(), scale_factor=2, mode="bilinear", align_corners=False)
    assert (larger - wanted).abs().max() <= 1


def test_large_pictures_are_averaged_not_skipped():
    x = torch.zeros(1, 3, 256, 256)
    x[..., ::2] = 1
    assert (identity.resized(x, 32) - 127.5).abs().max() <= 0.5


def test_kinds_of_pictures():
    model, g = small(), torch.Generator().manual_seed(1)
    x = torch.rand(3, 3, 48, 48, generator=g)
    whole = identity.embed(model, x)
    assert whole.shape == (3, 8)
    torch.testing.assert_close(whole, torch.cat([identity.embed(model, i[None]) for i in x]))
    torch.testing.assert_close(identity.embed(model, torch.cat([x, x[:, :1]], 1)), whole)
    grey = x[:, :1]
    torch.testing.assert_close(identity.embed(model, grey), identity.embed(model, grey.expand(3, 3, 48, 48)))
    eight = (x * 255).round().to(torch.uint8)
    torch.testing.assert_close(identity.embed(model, eight), whole)
    assert (whole[0] - whole[1]).abs().max() > 1e-3


def test_half_precision_networks_give_float32():
    model, x = small(), torch.rand(1, 3, 32, 32)
    wanted = identity.embed(model, x)
    found = identity.embed(model.to(torch.bfloat16), x)
    assert found.dtype == torch.float32 and (found - wanted).abs().max() < 0.1 * wanted.abs().max()


@pytest.mark.parametrize(
    ("picture", "message"),
    [
        (torch.full((1, 3, 32, 32), math.nan), "NaN or infinite"),
        (torch.full((1, 3, 32, 32), math.inf), "NaN or infinite"),
        (torch.rand(1, 3, 32, 40), "square, aligned pictures, got 40 x 32"),
        (torch.rand(3, 32, 32), r"must be a tensor \[B,C,H,W\]"),
        (torch.rand(1, 5, 32, 32), "1, 3 or 4 channels"),
        (torch.rand(1, 3, 32, 32) * 255, "want 0..1"),
        (torch.rand(0, 3, 32, 32), "empty"),
    ],
)
def test_bad_pictures(picture, message):
    with pytest.raises(ValueError, match=message) as e:
        identity.embed(small(), picture)
    assert "\n" not in str(e.value)


# --- architecture and files ---


@pytest.mark.parametrize(
    "config", [SMALL, ArcFaceConfig(48, 6, (2, 1, 1, 3), 5, se=False), ArcFaceConfig(112, 2)]
)
def test_architecture_is_read_off_the_weights(config):
    model = ArcFace(config)
    assert ArcFaceConfig.from_state_dict(model.state_dict()) == config
    with torch.no_grad():
        out = model.eval()(torch.randn(2, 3, config.size, config.size))
    assert out.shape == (2, config.embedding)
    assert json.loads(json.dumps(config.to_dict()))["blocks"] == list(config.blocks)


def test_files_come_back(tmp_path):
    model, x = small(), torch.rand(2, 3, 64, 64)
    state = model.state_dict()
    ours = {k: v for k, v in state.items() if "num_batches" not in k}
    files.save(tmp_path / "ours.safetensors", ours, {"kind": "identity"})
    torch.save({f"module.{k}": v for k, v in state.items()}, tmp_path / "parallel.pt")
    torch.save(state, tmp_path / "bare.pt")
    for name in ("ours.safetensors", "parallel.pt", "bare.pt"):
        found = checkpoints.load_identity(tmp_path / name)
        assert not found.training and found.config == SMALL
        assert all(torch.equal(v, state[k]) for k, v in found.state_dict().items() if "num_batches" not in k)
        # kernels may differ in the last bit with the memory's alignment
        assert (identity.embed(found, x) - identity.embed(model, x)).abs().max() < 1e-6


def test_bad_files(tmp_path):
    state, path = small().state_dict(), tmp_path / "a.safetensors"
    assert "cannot be read" in line(tmp_path / "missing.tar")
    head = files.ASSETS / "open_head.safetensors"
    assert "expected an identity encoder, found kind 'open_head'" in line(head)
    files.save(path, state, {"kind": "identity"})
    assert "found kind 'identity'" in line(path, checkpoints.load_rig)
    save_file({"lora.up": torch.ones(2)}, path)
    assert "expected an identity encoder, found tensors like 'lora.up'" in line(path)
    for key, value, message in [
        ("layer1.0.bn0.bias", torch.zeros(5), r"'layer1.0.bn0.bias' is [5] instead of [4]"),
        ("fc.weight", torch.zeros(8, 130), "takes 130 features"),
        ("conv1.weight", torch.zeros(0), "no square of 0 maps"),
        ("fc.weight", torch.zeros(8), "of another shape"),
        ("layer2.9.conv1.weight", torch.zeros(8, 8, 3, 3), "is missing"),
        ("more", torch.zeros(1), "'more' does not belong there"),
        ("bn3.bias", torch.full((8,), math.nan), "'bn3.bias' holds numbers that are not finite"),
    ]:
        save_file(state | {key: value}, path)
        assert message in line(path)
    save_file({k: v for k, v in state.items() if not k.startswith("layer3")}, path)
    assert "stages layer1 to layer4 is missing" in line(path)
    save_file(state | {"conv1.weight": torch.zeros(10**6, 3, 1, 1)}, path)
    line(path)


# --- training ---


def test_loss_without_a_margin_is_cross_entropy_of_cosines():
    g = torch.Generator().manual_seed(0)
    v, c, labels = torch.randn(6, 8, generator=g), torch.randn(4, 8, generator=g), torch.arange(6) % 4
    cosine = F.cosine_similarity(v[:, None], c[None], dim=-1)
    wanted = F.cross_entropy(training.SCALE * cosine, labels)
    torch.testing.assert_close(training.angular_margin_loss(v, c, labels, 0.0), wanted)
    scaled = training.angular_margin_loss(v * 7, c * 0.3, labels, 0.0)  # only angles count
    torch.testing.assert_close(scaled, wanted)


@pytest.mark.parametrize("angle", [0.6, 1.0, 2.0, 2.9])
def test_margin_is_added_to_the_own_angle(angle):
    v = torch.tensor([[math.cos(angle), math.sin(angle), 0.0]])
    c = torch.tensor([[1.0, 0, 0], [0, 0, 1.0]])  # the other one stays at 90 degrees
    margin, s = 0.3, training.SCALE
    moved = math.cos(angle + margin)
    if angle > math.pi - margin:
        moved = math.cos(angle) - margin * math.sin(margin)
    wanted = math.log(1 + math.exp(-s * moved))
    found = training.angular_margin_loss(v, c, torch.tensor([0]), margin)
    assert float(found) == pytest.approx(wanted, rel=1e-4, abs=1e-6)


def test_gradient_is_finite_where_angles_are_zero_or_straight():
    v = torch.tensor([[1.0, 0], [-1.0, 0]], requires_grad=True)
    training.angular_margin_loss(v, torch.eye(2), torch.tensor([0, 0]), 0.3).backward()
    assert v.grad.isfinite().all()


def test_verification_of_known_vectors():
    labels = torch.arange(50).repeat_interleave(4)
    apart = torch.eye(50)[labels]
    assert training.verification(apart, labels) == (1.0, 1.0)
    assert training.verification(torch.ones(200, 3), labels) == (0.0, 0.5)
    g = torch.Generator().manual_seed(0)
    rate, area = training.verification(torch.randn(200, 64, generator=g), labels)
    assert rate < 0.06 and 0.4 < area < 0.6
    noisy = apart + 0.25 * torch.randn(200, 50, generator=g)
    score = F.normalize(noisy.double()) @ F.normalize(noisy.double()).T
    a, b = np.triu_indices(200, 1)
    score, same = score[a, b].numpy(), (labels[a] == labels[b]).numpy()
    rate, area = training.verification(noisy, labels)
    wanted = np.mean(score[same][:, None] > score[~same][None])
    assert area == pytest.approx(wanted, abs=1e-6) and 0.6 < area < 1
    assert rate == pytest.approx(np.mean(score[same] > np.quantile(score[~same], 0.99)), abs=0.02)
    with pytest.raises(ValueError, match="pairs"):
        training.verification(apart[:4], labels[:4])


def test_augmentation_stays_a_picture_and_differs():
    g = torch.Generator().manual_seed(0)
    x = torch.randint(0, 256, (4, 3, training.SIDE, training.SIDE), dtype=torch.uint8, generator=g)
    a, b = training.augmented(x, g), training.augmented(x, g)
    assert a.shape == x.shape and a.min() >= 0 and a.max() <= 1
    assert (a - b).abs().mean() > 0.02


def dataset(folder, persons, each=2, split="train"):
    code = checkpoints.load_head().mean_code(persons * each, (128, 128))
    g = torch.Generator().manual_seed(0)
    images = torch.rand(persons, 3, 8, 8, generator=g).repeat_interleave(each, 0)
    images = F.interpolate(images, size=(128, 128), mode="bilinear")
    people = [f"{split}-{i // each}" for i in range(persons * each)]
    append(folder, [f"{split}{i}" for i in range(len(people))], images, code, person=people, split=split)
    finish(folder)


def test_a_short_training_writes_a_file_that_loads(tmp_path, capsys, monkeypatch):
    dataset(tmp_path / "synth", 5)
    dataset(tmp_path / "photos", 2, split="train")
    dataset(tmp_path / "photos", 2, split="val")
    parser = argparse.ArgumentParser()
    training.add_arguments(parser)
    command = f"--synth {tmp_path}/synth --photos {tmp_path}/photos --held 2 --steps 3 --batch 4"
    table = training.run(parser.parse_args([*command.split(), "--out", f"{tmp_path}/a.safetensors"]))
    assert "renders: 2 persons, 4 pictures" in table and "10 pictures of 5 persons" in capsys.readouterr().out
    net = checkpoints.load_identity(tmp_path / "a.safetensors")
    assert net.config == training.CONFIG
    meta = files.read(tmp_path / "a.safetensors")[1]
    assert meta["persons"] == 5 and meta["pictures"] == 10 and meta["steps"] == 3
    words = ["estimators", "identity", *command.split(), "--model", f"{tmp_path}/a.safetensors"]
    monkeypatch.setattr(sys, "argv", words)
    estimators.main()
    again = capsys.readouterr().out
    assert again.startswith("| persons never trained on |") and "of 5 persons" not in again
    assert "portraits, four altered copies each: 2 persons, 16 pictures" in again
    with pytest.raises(ValueError, match="cannot hold out 5"):
        training.run(parser.parse_args(f"--synth {tmp_path}/synth --held 5 --out x".split()))


def test_last_norm_gives_unit_variance():
    g = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (64, 3, 32, 32), dtype=torch.uint8, generator=g)
    people = training.Persons(images, torch.arange(64))
    model = small()
    model.bn3.weight.data.fill_(1)
    model.bn3.bias.data.fill_(0)
    model = training.standardised(model, [people])
    vectors = training.vectors_of(model, images[::4])
    assert vectors.mean(0).abs().max() < 1e-4
    torch.testing.assert_close(vectors.std(0), torch.ones(8), atol=1e-3, rtol=0)


# --- the default ---


@pytest.fixture(scope="module")
def default():
    return checkpoints.load_identity()


@pytest.fixture(scope="module")
def portraits():
    """The two photographs, aligned, [2,3,128,128]."""
    points = json.loads((FOLDER / "landmarks.json").read_text())
    out = []
    for name in ("astronaut", "grace_hopper"):
        array = np.asarray(Image.open(files.ASSETS / f"{name}.jpg").convert("RGB")).copy()
        photo = torch.from_numpy(array).permute(2, 0, 1)[None].float() / 255
        out.append(align.ffhq_crop(torch.tensor(points[name], dtype=torch.float32)[None], 128).apply(photo))
    return torch.cat(out).clamp(0, 1)


def test_default_is_small(default):
    assert default.config.embedding == 128
    path = files.ASSETS / "identity.safetensors"
    assert path.stat().st_size <= 2 * 2**20
    assert 6e5 < sum(p.numel() for p in default.parameters()) < 1e6
    meta = files.read(path)[1]
    assert meta["kind"] == "identity" and meta["config"] == default.config.to_dict()


def test_default_knows_the_same_face_in_another_light(default, portraits):
    ramp = torch.linspace(0.6, 1.3, 128)
    changed = torch.stack([portraits * 0.7, portraits * ramp, portraits.flip(-1), portraits**1.3])
    vectors = F.normalize(identity.embed(default, portraits))
    others = F.normalize(identity.embed(default, changed.flatten(0, 1).clamp(0, 1))).unflatten(0, (4, 2))
    same = (others * vectors).sum(-1)
    different = (others * vectors.flip(0)).sum(-1)
    assert same.min() > different.max() + 0.2
    assert same.mean() > 0.6


def test_default_has_about_unit_variance_and_does_not_depend_on_the_resolution(default, portraits):
    vectors = identity.embed(default, portraits)
    assert 0.5 < vectors.square().mean() < 2.5
    double = F.interpolate(portraits, scale_factor=4, mode="bilinear")
    again = identity.embed(default, double.clamp(0, 1))
    assert F.cosine_similarity(vectors, again).min() > 0.97
