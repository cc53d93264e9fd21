"""Files of weights: exact round trips, and every kind of bad file ends in one clear line."""

import builtins
import json
import os
import pickle
import struct
import sys
import types
import warnings
import zipfile
from collections import defaultdict

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from rig_core import checkpoints, files
from rig_core.denoisers.rig import DiffusionRig, RigConfig
from rig_core.estimators.identity import ArcFace, ArcFaceConfig, Block, Excite
from rig_core.files import CheckpointError
from tests.hostile import Call, archive

CONFIG = RigConfig(32, 32, (1, 2), 1, (16,), num_heads=2, latent_dim=8, encoder_width=8, norm_groups=8)
PUBLISHED = RigConfig(32, 32, (1, 2), 1, (16,), latent_dim=8, encoder_width=8)


def rig(config=CONFIG, seed=0):
    torch.manual_seed(seed)
    model = DiffusionRig(config)
    torch.nn.init.normal_(model.denoisingUNet.out[2].weight)
    return model


def same(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) and a[k].dtype == b[k].dtype for k in a)


def line(path, call=checkpoints.load_rig):
    """The message of the error that loading must raise: one line that names the file."""
    with pytest.raises(CheckpointError) as e:
        call(path)
    assert str(path) in str(e.value) and "\n" not in str(e.value) and len(str(e.value)) < 600
    return str(e.value)


# ours


def test_rig_comes_back_exactly(tmp_path):
    model, path = rig(), tmp_path / "a.safetensors"
    mean_shape = torch.randn(57)
    checkpoints.save_denoiser(path, model, {"step": 12, "stage": 2, "mean_shape": mean_shape})
    found, meta = checkpoints.load_rig(path)
    assert same(found, model) and not found.training
    assert found.config == CONFIG
    assert meta["kind"] == "diffusion_rig" and meta["head"] == "open"
    assert (meta["step"], meta["stage"]) == (12, 2)
    assert torch.equal(meta["mean_shape"], mean_shape)
    assert (
        found.denoisingUNet.input_blocks[1][0]
        .in_layers[2]
        .weight.is_contiguous(memory_format=torch.channels_last)
    )
    assert [p.name for p in tmp_path.iterdir()] == ["a.safetensors"]


def test_loaded_rig_computes_and_trains(tmp_path):
    model, path = rig(), tmp_path / "a.safetensors"
    checkpoints.save_denoiser(path, model)
    found, _ = checkpoints.load_rig(path)
    x, physical = torch.randn(1, 3, 32, 32), torch.randn(1, 9, 32, 32)
    t = torch.tensor([100])
    a, b = (m(x, t, m.condition(physical, x)) for m in (found, model.eval()))
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    found.requires_grad_(True).train()
    found(x, t, found.condition(physical, torch.randn(1, 3, 64, 64))).sum().backward()
    assert found.denoisingUNet.out[2].weight.grad.abs().max() > 0


def test_half_precision_files(tmp_path):
    model = rig()
    checkpoints.save_denoiser(tmp_path / "full.safetensors", model)
    checkpoints.save_denoiser(tmp_path / "half.safetensors", model, half=True)
    full, half = (checkpoints.load_rig(tmp_path / f"{n}.safetensors")[0] for n in ("full", "half"))
    for (k, a), b in zip(full.state_dict().items(), half.state_dict().values()):
        assert a.dtype == b.dtype
        assert torch.equal(b, a) if a.ndim < 2 else ((b - a).abs() <= a.abs() * 2**-11 + 3e-8).all(), k
    checkpoints.save_denoiser(tmp_path / "again.safetensors", half, half=True)
    assert (tmp_path / "again.safetensors").read_bytes() == (tmp_path / "half.safetensors").read_bytes()
    sizes = [(tmp_path / f"{n}.safetensors").stat().st_size for n in ("half", "full")]
    assert sizes[0] < 0.55 * sizes[1]


def test_half_precision_keeps_what_float16_cannot_hold(tmp_path):
    model = rig()
    model.denoisingUNet.out[2].weight.data.fill_(1e6)
    checkpoints.save_denoiser(tmp_path / "a.safetensors", model, half=True)
    assert (checkpoints.load_rig(tmp_path / "a.safetensors")[0].denoisingUNet.out[2].weight == 1e6).all()


def test_requested_precision(tmp_path):
    checkpoints.save_denoiser(tmp_path / "a.safetensors", rig())
    model, _ = checkpoints.load_rig(tmp_path / "a.safetensors", dtype=torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model.encoder.bn1.num_batches_tracked.dtype == torch.int64


def test_any_tensors_and_meta_come_back(tmp_path):
    tensors = {
        "image": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
        "scalar": torch.tensor(3),
        "none": torch.zeros(0, 3),
        "half": torch.randn(3).bfloat16(),
        "view": torch.arange(12).reshape(3, 4).T,
    }
    meta = {"kind": "x", "nested": {"a": [1, 2.5, None, True]}, "name": "ü"}
    files.save(tmp_path / "a.safetensors", tensors, meta)
    found, found_meta = files.read(tmp_path / "a.safetensors")
    assert found_meta == meta and found.keys() == tensors.keys()
    assert all(torch.equal(found[k], v) and found[k].dtype == v.dtype for k, v in tensors.items())


def test_default_head_loads():
    head = checkpoints.load_head()
    code = head.mean_code(1, (64, 64))
    assert head.verts(code.shape, code.exp, code.pose).isfinite().all()


# writing


def test_failed_save_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "a.safetensors"
    files.save(path, {"a": torch.ones(3)}, {"n": 1})
    before = path.read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    for name in ("fsync", "replace"):
        with monkeypatch.context() as m:
            m.setattr(os, name, full)
            with pytest.raises(files.CheckpointError, match=r"written \(No space left on device; it takes"):
                files.save(path, {"a": torch.zeros(3)}, {"n": 2})
        assert path.read_bytes() == before
        assert [p.name for p in tmp_path.iterdir()] == ["a.safetensors"]
    with pytest.raises(TypeError):
        files.save(path, {"a": torch.zeros(3)}, {"n": object()})
    assert path.read_bytes() == before


def test_saved_files_follow_the_umask(tmp_path):
    (tmp_path / "plain").touch()
    files.save(tmp_path / "a.safetensors", {"a": torch.ones(1)}, {})
    assert (tmp_path / "a.safetensors").stat().st_mode == (tmp_path / "plain").stat().st_mode


# published files


def test_published_file_comes_back_bit_for_bit(tmp_path):
    model, path = rig(PUBLISHED), tmp_path / "model050000.pt"
    torch.save(model.state_dict(), path)
    found, meta = checkpoints.load_rig(path)
    assert same(found, model) and found.config == PUBLISHED
    assert meta == {"kind": "diffusion_rig", "head": "flame", "config": PUBLISHED.to_dict()}


def test_published_weights_as_safetensors(tmp_path):
    model, path = rig(PUBLISHED), tmp_path / "converted.safetensors"
    save_file(model.state_dict(), path, {"format": "pt"})
    assert same(checkpoints.load_rig(path)[0], model)


# hostile files


HOSTILE = {
    "os.system": (lambda mark: Call(os.system, f"touch {mark}"), r"refused '(posix|nt)\.system'"),
    "eval": (lambda mark: Call(eval, f"open({str(mark)!r}, 'w')"), r"refused '(builtins|__builtin__)\.eval'"),
    "open": (lambda mark: Call(builtins.open, str(mark), "w"), r"refused '(_io|io)\.open'"),
    "getattr": (lambda mark: Call(getattr, "text", "upper"), r"refused '(builtins|__builtin__)\.getattr'"),
    "nested": (
        lambda mark: {"w": [torch.ones(2), {"x": (1, Call(Call, Call(os.mkdir, str(mark))))}]},
        r"refused '",
    ),
    "module": (lambda mark: torch.nn.LSTM(2, 2), r"refused 'torch\.nn\.modules\.rnn\.LSTM'"),
    "object array": (lambda mark: {"a": np.array([Call(os.mkdir, str(mark))])}, "refused '"),
}


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.parametrize("protocol", [2, 4])
def test_hostile_pickles_are_refused_and_not_executed(tmp_path, name, protocol):
    make, wanted = HOSTILE[name]
    mark = tmp_path / "executed"
    torch.save(make(mark), tmp_path / "a.pt", pickle_protocol=protocol)
    with pytest.raises(CheckpointError, match=wanted):
        checkpoints.load_rig(tmp_path / "a.pt")
    assert "nothing of the file was executed" in line(tmp_path / "a.pt")
    assert not mark.exists()


def test_rig_with_a_false_architecture_is_not_built(tmp_path):
    state = rig(PUBLISHED).state_dict()
    for key, value in {
        "denoisingUNet.time_embed.0.weight": torch.zeros(1, 10**6),
        "denoisingUNet.output_blocks.99999999999.0.in_layers.0.weight": torch.zeros(1),
        "encoder.fc.weight": torch.zeros(10**6, 1),
    }.items():
        save_file(state | {key: value}, tmp_path / "a.safetensors")
        line(tmp_path / "a.safetensors")
    for config in (
        {"norm_groups": 0},
        {"image_size": "x"},
        {"num_heads": 10**9},
        {"dropout": []},
        {"image_size": 7},
    ):
        meta = {files.META: json.dumps({"kind": "diffusion_rig", "config": config})}
        save_file(state, tmp_path / "a.safetensors", meta)
        line(tmp_path / "a.safetensors")


# networks that were pickled whole


def parts(monkeypatch):
    """A module "models" with classes of the published names, there only while the file is written."""
    models = types.ModuleType("models")
    for name, base in {
        "ResNet": ArcFace,
        "IRBlock": Block,
        "SEBlock": Excite,
        "Other": torch.nn.ReLU,
    }.items():
        setattr(models, name, type(name, (base,), {"__module__": "models"}))
    monkeypatch.setitem(sys.modules, "models", models)
    return models


def whole(monkeypatch):
    """What the published file holds: a network inside DataParallel, and the optimiser with its counts."""
    models = parts(monkeypatch)
    net = models.ResNet(ArcFaceConfig(32, 4, (1, 1, 1, 1), 6))
    del net.config
    for part in net.modules():
        part.__class__ = {Block: models.IRBlock, Excite: models.SEBlock}.get(type(part), type(part))
    net(torch.randn(2, 3, 32, 32)).square().sum().backward()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    optimizer.step()
    parallel = torch.nn.DataParallel(net)
    parallel.src_device_obj = torch.device("cuda:0")
    counts = defaultdict(dict, {p: {"momentum_buffer": p.grad} for p in net.parameters()})
    return {"epoch": 3, "acc": 0.99, "model": parallel, "optimizer": optimizer, "counts": counts}


STREAMS = pytest.mark.parametrize("zipped", [True, False], ids=["archive", "stream"])


def write(tree, path, zipped):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the classes have no source
        torch.save(tree, path, _use_new_zipfile_serialization=zipped)


@STREAMS
def test_a_network_pickled_whole_gives_its_weights(tmp_path, monkeypatch, zipped):
    tree = whole(monkeypatch)
    write(tree, tmp_path / "r18.tar", zipped)
    monkeypatch.delitem(sys.modules, "models")  # reading cannot import it
    wanted = tree["model"].state_dict()
    found, meta = files.read(tmp_path / "r18.tar")
    assert meta == {} and found.keys() == wanted.keys() and all(k.startswith("module.") for k in found)
    assert all(torch.equal(found[k], v) and found[k].dtype == v.dtype for k, v in wanted.items())
    model = checkpoints.load_identity(tmp_path / "r18.tar")
    assert same(model, tree["model"].module) and "models" not in sys.modules
    assert "expected a DiffusionRig denoiser, found tensors like 'module." in line(tmp_path / "r18.tar")


@STREAMS
def test_hostile_networks_are_refused_and_not_executed(tmp_path, monkeypatch, zipped):
    tree = whole(monkeypatch)
    net, mark = tree["model"].module, tmp_path / "executed"
    other = sys.modules["models"].Other()
    for name, value, wanted in [
        ("note", Call(os.system, f"touch {mark}"), r"refused '(posix|nt)\.system'"),
        ("_forward_hooks", {1: Call(eval, "1")}, r"refused 'builtins\.eval'"),
        ("_modules", {**net._modules, "more": other}, r"refused 'models\.Other'"),
        ("_modules", {"more": torch.nn.LSTM(2, 2)}, r"refused 'torch\.nn\.modules\.rnn\.LSTM'"),
        ("_modules", {"a": tree["model"]}, "refused a network that holds a part of itself twice"),
        ("_modules", {"a": net.bn1, "b": net.bn1}, "refused a network that holds a part of itself twice"),
        ("_modules", {"a": torch.ones(1)}, "damaged .*Record expected, View found"),
        ("_buffers", {"a": "text"}, "damaged .*View expected, str found"),
        ("_parameters", [1], "damaged .*dict expected, list found"),
        ("_modules", {3: net.bn1}, "damaged .*str expected, int found"),
    ]:
        state = dict(net.__dict__)
        with monkeypatch.context() as m:
            m.setitem(net.__dict__, name, value)
            write(tree, tmp_path / "a.tar", zipped)
        net.__dict__.update(state)
        with pytest.raises(CheckpointError, match=wanted):
            checkpoints.load_identity(tmp_path / "a.tar")
    assert not mark.exists()


def test_old_streams_of_tensors(tmp_path):
    path = tmp_path / "a.pt"
    x = torch.randn(4, 6)
    tree = {"whole": x, "view": x[1:, ::2], "empty": x[:0], "long": torch.arange(3), "bool": x > 0}
    tree |= {"bfloat16": x.bfloat16(), "parameter": torch.nn.Parameter(torch.randn(3))}
    write(tree, path, False)
    found, _ = files.read(path)
    assert found.keys() == tree.keys()
    assert all(torch.equal(found[k], v) and found[k].dtype == v.dtype for k, v in tree.items())
    model = rig(PUBLISHED)
    write(model.state_dict(), path, False)
    assert same(checkpoints.load_rig(path)[0], model)


def test_damaged_old_streams(tmp_path):
    path = tmp_path / "a.pt"
    write({"a": torch.ones(1000), "b": torch.zeros(3)}, path, False)
    good = path.read_bytes()
    for n in (15, 20, 100, 300, len(good) - 4100, len(good) - 1):
        path.write_bytes(good[:n])
        assert "download it again" in line(path, checkpoints.read)
    for old, new in [
        (struct.pack("<q", 1000), struct.pack("<q", 10**15)),  # counts before the bytes
        (b"M\xe8\x03N", b"M\xe9\x03N"),  # count in the structure
        (b"M\xe9\x03.", b"M\xea\x03."),  # version
        (b"little_endianq\x02\x88", b"little_endianq\x02\x89"),
    ]:
        assert good.count(old) == 1, old
        path.write_bytes(good.replace(old, new))
        assert "damaged or cut" in line(path, checkpoints.read)
    mark = tmp_path / "executed"
    write({"a": Call(os.system, f"touch {mark}")}, path, False)
    assert "refused" in line(path, checkpoints.read) and not mark.exists()


# wrong, cut and empty files


@pytest.mark.parametrize("name", ["a.safetensors", "a.pt"])
def test_cut_files(tmp_path, name):
    path, model = tmp_path / name, rig(PUBLISHED)
    torch.save(model.state_dict(), path) if name == "a.pt" else checkpoints.save_denoiser(path, model)
    whole = path.read_bytes()
    for n in (0, 1, 7, 8, 9, 30, 100, 5000, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:n])
        assert "download it again" in line(path)
    path.write_bytes(whole)
    assert same(checkpoints.load_rig(path)[0], model)


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (b"", "empty"),
        (b"<!DOCTYPE html><html>", "a web page"),
        (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
        (pickle.dumps({"a": 1}), "bare pickle"),
        (b"\x1f\x8b" + bytes(30), "gzip"),
        (b"\x89PNG\r\n\x1a\n" + bytes(30), "something else"),
        (b"\xff" * 8 + b"{" + bytes(30), "damaged or cut .safetensors"),
        (b"PK\x03\x04" + bytes(30), "damaged or cut PyTorch archive"),
    ],
)
def test_foreign_files(tmp_path, content, found):
    (tmp_path / "a.pt").write_bytes(content)
    assert found in line(tmp_path / "a.pt")
    assert found in line(tmp_path / "a.pt", checkpoints.load_head)


def test_files_of_another_kind(tmp_path):
    checkpoints.save_denoiser(tmp_path / "rig.safetensors", rig())
    assert "expected an open head, found kind 'diffusion_rig'" in line(
        tmp_path / "rig.safetensors", checkpoints.load_head
    )
    head = files.ASSETS / "open_head.safetensors"
    assert "expected a DiffusionRig denoiser, found kind 'open_head'" in line(head)
    save_file({"lora.up": torch.ones(2)}, tmp_path / "lora.safetensors")
    assert "found tensors like 'lora.up'" in line(tmp_path / "lora.safetensors")
    torch.save({"state_dict": {"a": torch.ones(1)}, "epoch": 3}, tmp_path / "nested.pt")
    assert "expected a dictionary of tensors, found state_dict, epoch" in line(tmp_path / "nested.pt")
    torch.save([1, 2], tmp_path / "list.pt")
    assert "found list" in line(tmp_path / "list.pt")
    archive(tmp_path / "other.zip", b"", [])
    line(tmp_path / "other.zip")
    with zipfile.ZipFile(tmp_path / "photos.zip", "w") as z:
        z.writestr("photo.jpg", b"x")
    assert "holds no data.pkl" in line(tmp_path / "photos.zip")
    assert "cannot be read" in line(tmp_path / "missing.safetensors")
    assert "cannot be read" in line(tmp_path)


def test_rig_with_wrong_tensors(tmp_path):
    state = rig(PUBLISHED).state_dict()
    path = tmp_path / "a.safetensors"
    save_file({k: v for k, v in state.items() if k != "denoisingUNet.out.2.bias"}, path)
    assert "'denoisingUNet.out.2.bias' is missing" in line(path)
    save_file(state | {"denoisingUNet.more": torch.ones(1)}, path)
    assert "'denoisingUNet.more' does not belong there" in line(path)
    save_file(state | {"denoisingUNet.out.2.bias": torch.ones(4)}, path)
    assert "'denoisingUNet.out.2.bias' is [4] instead of [3]" in line(path)
    save_file(state | {"denoisingUNet.out.2.bias": torch.tensor([0, float("nan"), 0])}, path)
    assert "'denoisingUNet.out.2.bias' holds numbers that are not finite" in line(path)


def test_damaged_metadata(tmp_path):
    path = tmp_path / "a.safetensors"
    for text in ("{", "[]", "[" * 10**5):
        save_file({"a": torch.ones(1)}, path, {files.META: text})
        assert "metadata is no JSON" in line(path)


def test_incomplete_head(tmp_path):
    tensors, meta = files.read(files.ASSETS / "open_head.safetensors")
    del tensors["shape_modes"]
    save_file(tensors, tmp_path / "a.safetensors", meta)
    assert "the open head is incomplete" in line(tmp_path / "a.safetensors", checkpoints.load_head)
