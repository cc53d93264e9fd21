"""The cast-shadow scalar: the published estimator's numbers, the pack's own on portraits, and bad files."""

import argparse
import json
import math
import pickle
import sys
import types

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from rig_core import checkpoints, files, zip_file
from rig_core.estimators import shadow
from rig_core.files import CheckpointError
from tests.golden_files import FOLDER, golden
from training import shadow as training

ENCODER = "ema_model.encoder."


@pytest.fixture(scope="module")
def encoder():
    """The published architecture with weights drawn in the order of the sorted keys."""
    model = shadow.SemanticEncoder()
    g, state = torch.Generator().manual_seed(9012), model.state_dict()
    for k in sorted(state):
        r = torch.randn(state[k].shape, generator=g)
        if r.ndim >= 2:
            state[k] = r / math.sqrt(r[0].numel())
        else:
            state[k] = 1 + 0.1 * r if k.endswith("weight") else 0.05 * r
    model.load_state_dict(state)
    return model.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def published(encoder, tmp_path_factory):
    """A folder with a Lightning checkpoint and a classifier as published, but for the numbers."""
    folder = tmp_path_factory.mktemp("diffae")
    module = types.ModuleType("pytorch_lightning.callbacks.model_checkpoint")
    module.ModelCheckpoint = type("ModelCheckpoint", (), {"__module__": module.__name__})
    names = ["pytorch_lightning", "pytorch_lightning.callbacks", module.__name__]
    state = {ENCODER + k: v for k, v in encoder.state_dict().items()}
    state |= {"x_T": torch.zeros(2, 3), "model.encoder.out.3.bias": torch.ones(512)}
    tree = {
        "epoch": 3,
        "global_step": 12345,
        "pytorch-lightning_version": "1.4.5",
        "state_dict": state,
        "callbacks": {module.ModelCheckpoint: {"monitor": None, "best_model_path": "last.ckpt"}},
        "optimizer_states": [
            {"state": {0: {"step": 7, "exp_avg": torch.ones(5)}}, "param_groups": [{"lr": 1e-4}]}
        ],
        "lr_schedulers": [],
        "hparams_name": "kwargs",
        "hyper_parameters": {"img_size": 256, "fp16": True, "scale": (1, 2.5), "name": None},
    }
    with pytest.MonkeyPatch.context() as patch:
        for name in names:
            patch.setitem(sys.modules, name, module)
        torch.save(tree, folder / "last.ckpt")
    weight = np.random.default_rng(3).normal(size=(1, 512))
    (folder / "shadow_cls_weight.pkl").write_bytes(
        pickle.dumps({"weight": weight, "bias": np.array([-1.2846])}, protocol=4)
    )
    return folder


def line(*args):
    """The message of the error that loading must raise: one line."""
    with pytest.raises(CheckpointError) as e:
        checkpoints.load_shadow(*args)
    assert "\n" not in str(e.value) and len(str(e.value)) < 600
    return str(e.value)


def face(size=128, seed=0):
    return torch.rand(1, 3, size, size, generator=torch.Generator().manual_seed(seed))


# the published estimator


def test_published_keys_and_shapes(encoder):
    wanted = json.loads((FOLDER / "diffae_encoder.json").read_text())["state_dict"]
    found = {k: [list(v.shape), str(v.dtype).removeprefix("torch.")] for k, v in encoder.state_dict().items()}
    assert found == wanted and len(found) == 116


def test_published_code(encoder):
    tensors, meta = golden("diffae_encoder")
    total = sum(v.double().sum() for v in encoder.state_dict().values())
    assert total.item() == pytest.approx(meta["weights_fingerprint"]["sum"], abs=0.01)
    x = tensors["image_u8"].permute(2, 0, 1)[None].float() / 127.5 - 1
    difference = (encoder(x) - tensors["latent"]).abs()
    assert difference.max() < 3.7e-5 and difference.mean() < 3.7e-6


def test_published_files_give_the_projected_code(encoder, published):
    tensors, _ = golden("diffae_encoder")
    model = checkpoints.load_shadow(published / "last.ckpt")
    assert not model.training and not any(p.requires_grad for p in model.parameters())
    found = shadow.scalar(model, tensors["image_u8"].permute(2, 0, 1)[None].float() / 255)
    weight = pickle.loads((published / "shadow_cls_weight.pkl").read_bytes())["weight"]
    wanted = tensors["latent"].numpy() @ weight.T  # float64, no bias
    assert found.shape == (1, 1) and found.dtype == torch.float32
    assert abs(found.item() - wanted.item()) < 1e-3 and abs(wanted.item()) > 0.1


def test_only_the_averaged_encoder_is_read(published, monkeypatch):
    pieces, names = zip_file.pieces, []
    monkeypatch.setattr(zip_file, "pieces", lambda f, member: names.append(member.name) or pieces(f, member))
    tensors, _ = files.read(published / "last.ckpt", ENCODER)
    assert len(tensors) == 116 and all(k.startswith(ENCODER) for k in tensors)
    assert sum("/data/" in n for n in names) == 116


def test_classifier_of_another_place(published, tmp_path):
    weight = np.zeros((1, 512))
    (tmp_path / "w.pkl").write_bytes(pickle.dumps({"weight": weight}, protocol=2))
    model = checkpoints.load_shadow(published / "last.ckpt", tmp_path / "w.pkl")
    assert shadow.scalar(model, face(64)).item() == 0


def test_projection_has_no_bias_and_keeps_double_precision():
    weight = torch.full((1, 512), 1e8, dtype=torch.float64)
    weight[0, 0] = 1
    code = torch.zeros(2, 512)
    code[1, :3] = torch.tensor([1.0, 1.0, -1.0])
    assert shadow.project(code, weight).tolist() == [[0.0], [1.0]]  # in float32 1e8 + 1 - 1e8 is 0


def test_classifier_that_is_missing_or_another_file(published, tmp_path):
    ckpt, w = published / "last.ckpt", tmp_path / "w.pkl"
    text = line(ckpt, tmp_path / "nowhere.pkl")
    assert "nowhere.pkl" in text and "difareli_code" in text
    for content, words in (
        ({"weight": np.zeros((1, 256))}, "[1, 256] instead of [1, 512]"),
        ({"weight": np.full((1, 512), np.nan)}, "not finite"),
        ({"coef": np.zeros((1, 512))}, "'weight'"),
        ([1, 2], "shadow classifier"),
        (argparse.Namespace(weight=1), "'argparse.Namespace'"),
    ):
        w.write_bytes(pickle.dumps(content))
        text = line(ckpt, w)
        assert str(w) in text and words in text
    for raw in (b"", b"<html>", b"\x80\x04", bytes(2**20 + 1)):
        w.write_bytes(raw)
        assert str(w) in line(ckpt, w)
    assert str(tmp_path) in line(ckpt, tmp_path)


def test_callbacks_are_names_only(published, tmp_path):
    """A Lightning class may be a key; nothing of it is called."""

    module = types.ModuleType("pytorch_lightning.callbacks.x")
    module.C = type("C", (), {"__module__": module.__name__, "__qualname__": "C"})
    with pytest.MonkeyPatch.context() as patch:
        for name in ("pytorch_lightning", "pytorch_lightning.callbacks", module.__name__):
            patch.setitem(sys.modules, name, module)
        torch.save({"state_dict": {ENCODER + "a": torch.ones(1)}, "x": module.C()}, tmp_path / "a.ckpt")
    assert "refused" in line(tmp_path / "a.ckpt")


# other files


def test_files_that_are_no_estimator(published, tmp_path):
    a = tmp_path / "a.safetensors"
    assert "cannot be read" in line(a)
    save_file({"x": torch.ones(2)}, a)
    assert "expected an estimator of cast shadows, found tensors like 'x'" in line(a)
    head = files.ASSETS / "open_head.safetensors"
    assert "kind 'open_head'" in line(head)
    torch.save({"state_dict": {ENCODER + "out.3.bias": torch.zeros(512)}}, tmp_path / "part.ckpt")
    (tmp_path / "shadow_cls_weight.pkl").write_bytes((published / "shadow_cls_weight.pkl").read_bytes())
    assert "is missing" in line(tmp_path / "part.ckpt")
    net = shadow.ShadowNet().state_dict()
    files.save(a, net | {"head.bias": torch.zeros(2)}, {"kind": "shadow"})
    assert "'head.bias' is [2] instead of [1]" in line(a)
    files.save(a, net | {"head.bias": torch.full((1,), torch.nan)}, {"kind": "shadow"})
    assert "'head.bias' holds numbers that are not finite" in line(a)


# the pack's own


def test_own_estimator_is_small_and_comes_back(tmp_path):
    path = files.ASSETS / "shadow.safetensors"
    net = checkpoints.load_shadow()
    assert isinstance(net, shadow.ShadowNet) and not net.training
    assert sum(p.numel() for p in net.parameters()) <= 250_000 and path.stat().st_size <= 500_000
    again = tmp_path / "again.safetensors"
    files.save(again, net.state_dict(), {"kind": "shadow"})
    s = shadow.scalar(net, face())
    assert s.shape == (1, 1) and torch.equal(s, shadow.scalar(checkpoints.load_shadow(again), face()))


def test_own_estimator_knows_cast_shadows():
    """Persons never trained on: the scalar falls when the shadows go, and follows their amount."""
    net = checkpoints.load_shadow()
    images, dim = training.pairs([10**6 + n for n in (26, 22, 1, 6)])
    torch.testing.assert_close(dim, torch.tensor([0.308, 0.153, 0.020, 0.007]), atol=0.003, rtol=0)
    s = shadow.scalar(net, images.flatten(0, 1).float() / 255).view(-1, 2)
    assert (s[:, 0] - s[:, 1] > 0.4).all() and (s[:2, 0] - s[:2, 1] > 2).all()
    assert (s[:2, 0] > shadow.UNDECIDED).all() and (s[2:, 0] < 0).all() and (s[:, 1] < 0).all()
    assert s[1, 0] > s[2, 0] > s[3, 0]


def test_scalar_depends_neither_on_batch_nor_much_on_size():
    net = checkpoints.load_shadow()
    images, _ = training.pairs([10**6 + 3])
    shown = images[:, 0].float() / 255
    both = torch.cat([shown, face()])
    torch.testing.assert_close(shadow.scalar(net, both)[:1], shadow.scalar(net, shown), atol=1e-4, rtol=0)
    large = torch.nn.functional.interpolate(shown, size=(512, 512), mode="bicubic").clamp(0, 1)
    assert abs(shadow.scalar(net, large) - shadow.scalar(net, shown)).item() < 1


@pytest.mark.parametrize(
    "image, words",
    [
        (torch.zeros(3, 64, 64), "[B,3,s,s]"),
        (torch.zeros(1, 4, 64, 64), "[B,3,s,s]"),
        (torch.zeros(1, 3, 64, 80), "[B,3,s,s]"),
        (torch.zeros(1, 3, 8, 8), "at least 32"),
        (torch.full((1, 3, 64, 64), torch.nan), "not finite"),
    ],
)
def test_pictures_that_are_no_face_crop(image, words):
    with pytest.raises(ValueError) as e:
        shadow.scalar(shadow.ShadowNet(), image)
    assert words in str(e.value) and "\n" not in str(e.value)


# training


def test_calibration_puts_undecided_where_the_published_classifier_has_it(monkeypatch):
    """Amounts whose log-odds are 20 a - 6 by construction give these back, moved by the left-out bias."""
    g = torch.Generator().manual_seed(0)
    amount = torch.rand(20_000, generator=g)
    strong = torch.rand(20_000, generator=g) < torch.sigmoid(20 * amount - 6)
    monkeypatch.setattr(
        training, "amounts", lambda net, images: torch.stack([amount, -torch.ones(20_000)], 1)
    )
    net = shadow.ShadowNet()
    training.calibrate(net, None, torch.where(strong, 0.5, 0.0))
    gain, offset = net.calibration.tolist()
    assert gain == pytest.approx(20, rel=0.05)
    assert offset - shadow.UNDECIDED == pytest.approx(-6, rel=0.05)


def test_auc_and_rank_correlation():
    score, positive = torch.tensor([0.1, 0.4, 0.35, 0.8]), torch.tensor([False, False, True, True])
    assert training.auc(score, positive) == 0.75
    assert training.auc(torch.zeros(4), positive) == 0.5
    assert training.spearman(torch.tensor([1.0, 2, 3, 4]), torch.tensor([1.0, 8, 27, 64])) == pytest.approx(1)
    assert training.spearman(torch.tensor([1.0, 2, 3]), torch.tensor([3.0, 1, 2])) == pytest.approx(-0.5)


def test_a_pair_is_changed_alike():
    pair = torch.rand(5, 1, 3, 32, 32, generator=torch.Generator().manual_seed(1)).expand(-1, 2, -1, -1, -1)
    out = training.augment(pair, torch.Generator().manual_seed(2)).view(2, 5, 3, 32, 32)
    assert out.shape == (2, 5, 3, 32, 32) and 0 <= out.min() and out.max() <= 1
    assert (out[0] - out[1]).abs().mean() < 0.03  # noise alone
    assert (out[0] - pair[:, 0]).abs().mean() > 0.1


@pytest.mark.slow
def test_training_run(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(training, "CHUNK", 4)
    parser = argparse.ArgumentParser()
    training.add_arguments(parser)
    options = ["--renders", str(tmp_path / "r"), "--out", str(tmp_path / "a.safetensors"), "--batch", "4"]
    options += ["--synth-count", "8", "--held-out", "4"]
    training.run(parser.parse_args([*options, "--steps", "2"]))
    assert isinstance(checkpoints.load_shadow(tmp_path / "a.safetensors"), shadow.ShadowNet)
    first = capsys.readouterr().out
    assert "rendered scenes 4 to 7" in first and "AUC" in first
    training.run(parser.parse_args([*options, "--steps", "0"]))  # measures only, renders nothing
    second = capsys.readouterr().out
    assert "rendered scenes" not in second and second.splitlines()[-1] == first.splitlines()[-1]
