"""Official files converted: every bit kept, and loaded as the originals are."""

from __future__ import annotations

import hashlib
import os
import struct

import numpy as np
import pytest
import torch
from safetensors import safe_open

from rig_core import catalogue, checkpoints, files, flame_files
from rig_core.estimators import shadow
from rig_core.files import CheckpointError
from tests.golden_files import relight_pair
from tests.test_catalogue import face_files, official  # noqa: F401 fixtures
from tests.test_shadow import encoder, published  # noqa: F401 fixtures
from training import convert


def same(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(convert.same_bits(a[k], b[k]) for k in a)


def close(a: torch.Tensor, b: torch.Tensor) -> None:
    """Equal but for the last bit, which depends on where the weights lie in memory."""
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    assert a.abs().max() > 1e-3


@pytest.fixture(scope="module")
def converted(official, face_files, tmp_path_factory):  # noqa: F811
    """A folder with all of them converted by the command."""
    out = tmp_path_factory.mktemp("converted") / "models"
    named = [*official.iterdir(), face_files]
    convert.main([*map(str, sorted(named)), "--out", str(out)])
    return out


def test_what_is_written(converted):
    names = {p.name for p in converted.iterdir()}
    assert names == {
        "model050000.safetensors",
        "difareli_ema_0.9999_085000.safetensors",
        "deca.safetensors",
        "flame.safetensors",
        "arcface_r18.safetensors",
        "diffae_shadow.safetensors",
        "bisenet.safetensors",
    }
    found = {f.path.name: f for f in catalogue.survey(converted)}
    assert len(found) == 7 and all(f.complete and not f.advice for f in found.values())
    uses = [line for line in catalogue.missing(list(found.values())) if not line.startswith(" ")]
    assert len(uses) == 6 and all(line.endswith(": complete") for line in uses)


def test_diffusion_rig(official, converted):  # noqa: F811
    a, meta_a = checkpoints.load_rig(official / "model050000.pt")
    b, meta_b = checkpoints.load_rig(converted / "model050000.safetensors")
    assert same(a, b) and a.config == b.config
    about = meta_b.pop("converted")
    assert meta_a == meta_b and meta_b["head"] == "flame"
    x, physical, t = torch.randn(1, 3, 32, 32), torch.randn(1, 9, 32, 32), torch.tensor([100])
    close(*(m(x, t, m.condition(physical, x)) for m in (a, b)))
    (source,) = about["files"]
    data = (official / "model050000.pt").read_bytes()
    assert source["name"] == "model050000.pt" and source["bytes"] == len(data)
    assert source["sha256"] == hashlib.sha256(data).hexdigest()
    assert "adobe-research/diffusion-rig" in source["source"] and "Adobe" in source["licence"]
    assert about["version"] == convert.VERSION
    state = torch.load(official / "model050000.pt", weights_only=True)  # PyTorch's own reading
    with safe_open(converted / "model050000.safetensors", "pt") as f:
        assert set(f.keys()) == state.keys()
        assert all(convert.same_bits(f.get_tensor(k), v) for k, v in state.items())


def test_difareli(official, converted):  # noqa: F811
    a, meta_a = checkpoints.load_relight(official / "ImgCond_ema_0.9999_085000.pt")
    b, meta_b = checkpoints.load_relight(converted / "difareli_ema_0.9999_085000.safetensors")
    assert same(a, b) and a.config == b.config
    sources = meta_b.pop("converted")["files"]
    assert meta_a == meta_b and [s["name"][:6] for s in sources] == ["ImgCon", "ImgEnc"]
    x, spatial, vector = torch.randn(1, 3, 32, 32), torch.randn(1, 6, 32, 32), torch.randn(1, 672)
    t = torch.tensor([500])
    close(*(m(x, t, m.condition(spatial, vector)) for m in (a, b)))


def test_face_model(face_files, converted):  # noqa: F811
    a, b = (
        checkpoints.load_face_model(face_files),
        checkpoints.load_face_model(converted / "flame.safetensors"),
    )
    assert b.head.name == "flame" and same(a.head, b.head) and set(a.head.masks) == set(b.head.masks)
    assert same(a.encoder, b.encoder)
    c = checkpoints.load_face_model(converted / "deca.safetensors")
    assert same(a.head, c.head) and same(a.encoder, c.encoder)
    x = torch.rand(1, 3, 224, 224)
    with torch.no_grad():
        close(a.encoder(x), b.encoder(x))
    code = a.head.mean_code(1, 64)
    close(*(m.head.verts(code.shape, code.exp + 1, code.pose + 0.1) for m in (a, b)))
    wanted = flame_files.tensors(face_files)
    found, meta = files.read(converted / "flame.safetensors")
    assert meta["kind"] == "flame" and found.keys() == wanted.keys()
    assert all(convert.same_bits(found[k], v) for k, v in wanted.items())
    assert {s["name"] for s in meta["converted"]["files"]} >= {"generic_model.pkl", "FLAME_texture.npz"}
    licences = {s["name"]: s["licence"] for s in meta["converted"]["files"]}
    assert "CC BY-NC-SA" in licences["FLAME_texture.npz"]
    assert (converted / "deca.safetensors").stat().st_size < (face_files / "deca_model.tar").stat().st_size


def test_estimators(official, converted):  # noqa: F811
    a = checkpoints.load_identity(official / "BEST_checkpoint_r18.tar")
    b = checkpoints.load_identity(converted / "arcface_r18.safetensors")
    assert same(a, b) and a.config == b.config
    x = torch.rand(1, 3, 32, 32)
    close(a(x), b(x))
    a = checkpoints.load_shadow(official / "last.ckpt")
    b = checkpoints.load_shadow(converted / "diffae_shadow.safetensors")
    assert isinstance(b, shadow.DiffAEShadow) and same(a, b)
    assert a.weight.dtype == b.weight.dtype == torch.float64 and torch.equal(a.weight, b.weight)
    x = torch.rand(1, 3, 256, 256)
    close(shadow.scalar(a, x), shadow.scalar(b, x))
    a = checkpoints.load_parser(official / "79999_iter.pth")
    b = checkpoints.load_parser(converted / "bisenet.safetensors")
    assert same(a, b)
    kept, _ = files.read(converted / "bisenet.safetensors")
    assert kept["conv_out.conv_out.weight"].dtype == torch.float16  # as in the original


def test_a_classifier_that_is_missing_in_a_converted_file(converted, tmp_path):
    tensors, meta = files.read(converted / "diffae_shadow.safetensors")
    files.save(tmp_path / "a.safetensors", {k: v for k, v in tensors.items() if k != "weight"}, meta)
    with pytest.raises(CheckpointError, match="it has no 'weight'"):
        checkpoints.load_shadow(tmp_path / "a.safetensors")


def test_odd_tensors_keep_every_bit(tmp_path, monkeypatch):
    """Shared and strided memory, NaN with a payload, -0, denormals, all types, none and no axes."""
    base = torch.randn(6, 8)
    nan = torch.from_numpy(
        np.frombuffer(struct.pack("<4I", 0x7FC12345, 0xFF800001, 0x80000000, 1), "f4").copy()
    )
    tree = {"base": base, "same": base, "row": base[2], "step": base[1:, ::2], "T": base.t(), "nan": nan}
    types = (torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16, torch.int8)
    tree |= {str(t): (base * 9).to(t) for t in (*types, torch.uint8, torch.bool)}
    tree |= {"number": torch.tensor(7), "none": torch.zeros(0, 3), "parameter": torch.nn.Parameter(base * 2)}
    torch.save(tree, tmp_path / "a.pt")
    monkeypatch.setattr(convert, "about", lambda job: {"kind": "x"})
    convert.write(convert.Job("bisenet", (tmp_path / "a.pt",)), tmp_path / "a.safetensors")
    with safe_open(tmp_path / "a.safetensors", "pt") as f:
        found = {k: f.get_tensor(k) for k in f.keys()}
    assert found.keys() == tree.keys()
    for k, v in tree.items():
        assert convert.same_bits(found[k], v.detach()) and found[k].is_contiguous(), k
    assert found["nan"].view(torch.int32).tolist() == nan.view(torch.int32).tolist()


def test_comparing_bits():
    a = torch.tensor([0.0, float("nan")])
    assert convert.same_bits(a, a.clone())
    assert not convert.same_bits(a, torch.tensor([-0.0, float("nan")]))
    assert not convert.same_bits(a, a.double()) and not convert.same_bits(a, a[None])


def test_nothing_is_overwritten_unless_forced(official, tmp_path, capsys, monkeypatch):  # noqa: F811
    out = tmp_path / "a.safetensors"
    out.write_bytes(b"precious")
    command = [str(official / "model050000.pt"), "--out", str(out)]
    with pytest.raises(SystemExit) as e:
        convert.main(command)
    assert e.value.code == 2 and "--force overwrites it" in capsys.readouterr().err
    assert out.read_bytes() == b"precious"
    with monkeypatch.context() as m:  # a disk that gives back something else
        read = files.read
        m.setattr(files, "read", lambda p, *a: ({}, {}) if p.name.endswith(".new") else read(p, *a))
        with pytest.raises(SystemExit, match="reads otherwise than it was written"):
            convert.main([*command, "--force"])
    assert out.read_bytes() == b"precious" and [p.name for p in tmp_path.iterdir()] == ["a.safetensors"]
    convert.main([*command, "--force"])
    text = capsys.readouterr().out
    assert "1/1 model050000.pt -> " in text and "bytes saved" in text
    assert checkpoints.load_rig(out)[1]["head"] == "flame"
    saved = (official / "model050000.pt").stat().st_size - out.stat().st_size
    assert f"{saved} bytes saved" in text and 0 < saved < 200_000


def test_one_flipped_bit_is_noticed(official, tmp_path, monkeypatch):  # noqa: F811
    read = files.read

    def flipped(path, *rest):
        tensors, meta = read(path, *rest)
        if path.name.endswith(".new"):
            tensors["encoder.bn1.bias"].view(torch.int32)[3] ^= 1
        return tensors, meta

    monkeypatch.setattr(files, "read", flipped)
    job = convert.plan([official / "model050000.pt"])[0]
    with pytest.raises(RuntimeError, match="'encoder.bn1.bias' reads otherwise"):
        convert.write(job, tmp_path / "a.safetensors")
    assert not list(tmp_path.iterdir())


def test_partners_are_found(official, tmp_path):  # noqa: F811
    unet, modulator = (official / f"{k}_ema_0.9999_085000.pt" for k in ("ImgCond", "ImgEncoder"))
    assert convert.plan([unet])[0].sources == (unet, modulator)  # beside it
    assert convert.plan([modulator, unet])[0].sources == (unet, modulator)
    alone = tmp_path / "a.pt"
    os.link(unet, alone)
    assert convert.plan([alone, modulator])[0].sources == (alone, modulator)
    with pytest.raises(CheckpointError, match="its partner a.pt is not beside it, or is none"):
        convert.plan([alone])
    with pytest.raises(CheckpointError, match="ImgCond_.*as well"):
        convert.plan([modulator])
    os.link(official / "last.ckpt", tmp_path / "last.ckpt")
    with pytest.raises(CheckpointError, match="its partner shadow_cls_weight.pkl is not beside it"):
        convert.plan([tmp_path / "last.ckpt"])
    torch.save(relight_pair("small", 7)[0], tmp_path / "ImgCond_b.pt")
    two = convert.plan([unet, modulator, official / "last.ckpt", official / "shadow_cls_weight.pkl"])
    assert [j.what for j in two] == ["difareli unet", "diffae"]


def test_a_folder_is_flame_and_deca(face_files):  # noqa: F811
    flame, deca = convert.plan([face_files])
    assert flame.sources[0] == face_files / "generic_model.pkl" and len(flame.sources) == 6
    assert deca.sources == (face_files / "deca_model.tar",)
    parts = [face_files / n for n in ("head_template.obj", "generic_model.pkl", "FLAME_masks.pkl")]
    assert convert.plan(parts) == [flame]


def test_what_cannot_be_converted(official, converted, tmp_path, capsys):  # noqa: F811
    def refused(*paths, out=tmp_path / "out"):
        with pytest.raises(SystemExit) as e:
            convert.main([*map(str, paths), "--out", str(out)])
        return str(e.value.code) + capsys.readouterr().err

    assert "there is nothing to convert" in refused(converted / "model050000.safetensors")
    assert "there is nothing to convert" in refused(files.ASSETS / "shadow.safetensors")
    (tmp_path / "cut.pt").write_bytes((official / "model050000.pt").read_bytes()[: 10**6])
    assert "it is cut; download it again: 1.0 MB of at least" in refused(tmp_path / "cut.pt")
    (tmp_path / "page.pt").write_bytes(b"<html>")
    assert "a web page" in refused(tmp_path / "page.pt")
    assert "unreadable" in refused(tmp_path / "nothing.pt")
    (tmp_path / "empty").mkdir()
    assert "holds neither generic_model.pkl nor deca_model.tar" in refused(tmp_path / "empty")
    two = [official / "model050000.pt", official / "79999_iter.pth"]
    assert "is one file, but 2 are to be written" in refused(*two, out=tmp_path / "a.safetensors")
    other = tmp_path / "other"
    other.mkdir()
    os.link(official / "model050000.pt", other / "model050000.pt")
    assert "would be written twice" in refused(official / "model050000.pt", other / "model050000.pt")
    assert not (tmp_path / "out").exists()
