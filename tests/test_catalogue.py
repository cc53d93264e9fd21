"""What files are, told by their contents: every kind, whole, cut, renamed and packed, and what is none."""

from __future__ import annotations

import gzip
import io
import json
import os
import pickle
import subprocess
import sys
import tarfile
import warnings
import zipfile

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from rig_core import catalogue, checkpoints, files
from rig_core.denoisers.rig import DiffusionRig, RigConfig
from rig_core.estimators.identity import ArcFace, ArcFaceConfig
from rig_core.estimators.parsing import BiSeNet
from tests import official_files
from tests.golden_files import recipe, relight_keys, relight_pair
from tests.test_shadow import encoder, published  # noqa: F401 fixtures

RIG = RigConfig(32, 32, (1, 2), 1, (16,), latent_dim=8, encoder_width=8)
ASSETS = files.ASSETS


def rig() -> DiffusionRig:
    torch.manual_seed(0)
    model = DiffusionRig(RIG)
    torch.nn.init.normal_(model.denoisingUNet.out[2].weight)  # zero in a new one
    return model


@pytest.fixture(scope="module")
def official(tmp_path_factory, published):  # noqa: F811
    """One folder with small stand-ins of the official files but for FLAME and DECA."""
    folder = tmp_path_factory.mktemp("official")
    torch.save(rig().state_dict(), folder / "model050000.pt")
    unet, modulator = relight_pair()
    torch.save(unet, folder / "ImgCond_ema_0.9999_085000.pt")
    torch.save(modulator, folder / "ImgEncoder_ema_0.9999_085000.pt")
    face = ArcFace(ArcFaceConfig(32, 4, (1, 1, 1, 1), 6))
    torch.save({f"module.{k}": v for k, v in face.state_dict().items()}, folder / "BEST_checkpoint_r18.tar")
    torch.save({k: v.half() for k, v in BiSeNet().state_dict().items()}, folder / "79999_iter.pth")
    for name in ("last.ckpt", "shadow_cls_weight.pkl"):
        os.link(published / name, folder / name)
    return folder


@pytest.fixture(scope="session")
def face_files(tmp_path_factory):
    """A folder with stand-ins of DECA's and FLAME's files."""
    folder = tmp_path_factory.getbasetemp() / "face_files"
    if not folder.exists():  # modules that import this fixture share it
        official_files.write_flame(folder)
        official_files.write_deca(folder)
    return folder


KINDS = {
    "model050000.pt": ("rig", "Load DiffusionRig", "32 px, 1.0 million weights, for the flame head"),
    "ImgCond_ema_0.9999_085000.pt": ("difareli unet", "Load DiFaReli", "32 px, 1.5 million weights"),
    "ImgEncoder_ema_0.9999_085000.pt": ("difareli modulator", "Load DiFaReli", "0.4 million weights"),
    "BEST_checkpoint_r18.tar": ("arcface", "Load Identity Encoder", "32 px, 6 numbers a face"),
    "79999_iter.pth": ("bisenet", "Load Face Parser", "13.3 million weights"),
    "last.ckpt": ("diffae", "Load Shadow Estimator", "30.2 million weights"),
    "shadow_cls_weight.pkl": ("shadow classifier", "Load Shadow Estimator", ""),
}


@pytest.mark.parametrize("name", KINDS)
def test_official_files_are_known_by_their_contents(official, tmp_path, name):
    kind, node, detail = KINDS[name]
    f = catalogue.identify(official / name)
    assert (f.kind, f.node, f.complete, f.advice) == (kind, node, True, "") and detail in f.detail
    renamed = tmp_path / "download.pt"
    os.link(official / name, renamed)
    g = catalogue.identify(renamed)
    assert (g.kind, g.node, g.detail) == (kind, node, f.detail)
    if kind == "shadow classifier":
        assert not g.complete and "rename it to shadow_cls_weight.pkl" in g.advice
    elif kind == "difareli modulator":
        assert g.complete and "choose this file itself in Load DiFaReli" in g.advice
    else:
        assert g.complete and "the name does not matter" in g.advice


FACE_FILES = {
    "deca_model.tar": ("deca", "25.9 million weights"),
    "generic_model.pkl": ("flame", "5023 vertices, 9976 faces"),
    "landmark_embedding.npy": ("embedding", ""),
    "head_template.obj": ("template", ""),
    "FLAME_texture.npz": ("texture", ""),
    "FLAME_masks.pkl": ("masks", "14 regions"),
    "uv_face_mask.png": ("skin", ""),
}


@pytest.mark.parametrize("name", FACE_FILES)
def test_files_of_flame_and_deca(face_files, tmp_path, name):
    kind, detail = FACE_FILES[name]
    f = catalogue.identify(face_files / name)
    assert (f.kind, f.node, f.complete, f.advice) == (
        kind,
        "Load Face Model",
        True,
        "",
    ) and detail in f.detail
    renamed = tmp_path / f"mine{(face_files / name).suffix}"
    os.link(face_files / name, renamed)
    g = catalogue.identify(renamed)
    assert g.kind == kind and f"rename it to {name}" in g.advice  # these are found by their names
    assert g.complete == (kind in ("deca", "flame"))  # but for those that can be chosen themselves
    whole = (face_files / name).read_bytes()
    (tmp_path / name).write_bytes(whole[: len(whole) * 2 // 3])
    if name != "head_template.obj":  # text
        g = catalogue.identify(tmp_path / name)
        assert not g.complete and "cut" in g.detail and "download it again" in g.advice, g


def test_flame_2023_and_older_streams(face_files, tmp_path):
    (tmp_path / "f").mkdir()
    raw = pickle.dumps(
        {k: np.zeros((4, 3)) for k in ("v_template", "shapedirs", "posedirs", "f", "J_regressor")}
    )
    (tmp_path / "flame2023.pkl").write_bytes(raw)
    f = catalogue.identify(tmp_path / "flame2023.pkl")
    assert f.kind == "flame" and "kintree_table, weights missing" in f.detail and not f.complete
    lists = {k: np.repeat(np.arange(5), 3) for k in ("face", "scalp", "neck")}
    (tmp_path / "FLAME_masks.pkl").write_bytes(pickle.dumps(lists))
    assert "masks of faces, not needed" in catalogue.identify(tmp_path / "FLAME_masks.pkl").what
    np.savez(tmp_path / "FLAME_albedo_from_BFM.npz", MU=np.zeros((4, 3)), PC=np.zeros((4, 3, 2)))
    assert catalogue.identify(tmp_path / "FLAME_albedo_from_BFM.npz").kind == "texture bfm"


def test_a_face_model_in_pieces(face_files, official, tmp_path):
    def state(line):
        return next(at for at in catalogue.missing(catalogue.survey(tmp_path)) if at.startswith(line))

    use = "DECA and FLAME face model: "
    assert state(use).endswith("missing")
    for name in FACE_FILES:
        os.link(face_files / name, tmp_path / name)
    assert state(use).endswith("complete")
    os.link(official / "model050000.pt", tmp_path / "model.pt")
    assert state("DiffusionRig as published").endswith("complete")
    inside = tmp_path / "FLAME2020"  # as its archive unpacks
    inside.mkdir()
    (tmp_path / "generic_model.pkl").rename(inside / "generic_model.pkl")
    assert state(use).endswith("complete")
    deeper = inside / "model"
    deeper.mkdir()
    (inside / "generic_model.pkl").rename(deeper / "generic_model.pkl")
    assert state(use).endswith("incomplete")
    lines = catalogue.missing(catalogue.survey(tmp_path))
    assert f"    it is {deeper / 'generic_model.pkl'}: move it to {tmp_path}" in lines
    (deeper / "generic_model.pkl").rename(tmp_path / "generic_model.pkl")
    (tmp_path / "FLAME_texture.npz").unlink()
    lines = catalogue.missing(catalogue.survey(tmp_path))
    assert "  better with: FLAME texture space (FLAME_texture.npz)" in lines and f"{use}complete" in lines
    (tmp_path / "deca_model.tar").unlink()
    assert state(use).endswith("incomplete") and state("DiffusionRig as published").endswith("incomplete")


def test_a_packed_flame(face_files, tmp_path):
    path = tmp_path / "FLAME2020.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as z:
        z.write(face_files / "generic_model.pkl", "FLAME2020/generic_model.pkl")
    assert "unpack FLAME2020/generic_model.pkl (FLAME head model)" in catalogue.identify(path).advice


@pytest.mark.parametrize(
    ("name", "kind", "text"),
    [
        ("diffusion_rig_128", "own rig", "128 px, 7.5 million weights, for the open head"),
        ("difareli_128", "own difareli", "128 px, 5.6 million weights, for the open head"),
        ("identity", "identity", "64 px, 128 numbers a face"),
        ("shadow", "shadow", "0.2 million weights"),
        ("open_head", "head", ""),
        ("landmarks", "landmarks", ""),
    ],
)
def test_the_packs_own_files(name, kind, text):
    f = catalogue.identify(ASSETS / f"{name}.safetensors")
    assert f.complete and f.kind == kind and text in f.detail and not f.advice


def test_personal_models_states_and_datasets(tmp_path):
    model = rig()
    checkpoints.save_denoiser(
        tmp_path / "anna.safetensors", model, {"stage": 2, "mean_shape": torch.zeros(1, 57)}
    )
    f = catalogue.identify(tmp_path / "anna.safetensors")
    assert f.complete and f.kind == "own rig" and f.detail.startswith("personal model (stage 2), 32 px")
    meta = {"kind": checkpoints.LORA, "base": "base.safetensors"}
    files.save(tmp_path / "lora.safetensors", {"a.up": torch.ones(4), "a.down": torch.ones(4)}, meta)
    assert catalogue.identify(tmp_path / "lora.safetensors").kind == "lora"
    (f,) = catalogue.survey(tmp_path / "lora.safetensors")
    assert not f.complete and "needs base.safetensors" in f.advice
    checkpoints.save_denoiser(tmp_path / "base.safetensors", model)
    (f,) = catalogue.survey(tmp_path / "lora.safetensors")
    assert f.complete and "for base.safetensors" in f.detail
    files.save(
        tmp_path / "state.safetensors", {"model.a": torch.ones(1)}, {"kind": "training state", "step": 3}
    )
    assert catalogue.identify(tmp_path / "state.safetensors").kind == "state"
    files.save(tmp_path / "other.safetensors", {"a": torch.ones(1)}, {"kind": "shadow_scenes"})
    assert "kind 'shadow_scenes'" in catalogue.identify(tmp_path / "other.safetensors").what
    shard = {k: torch.zeros(2, 3) for k in ("shape", "tex", "exp", "pose", "cam", "light", "crop")}
    save_file(
        shard, tmp_path / "codes-00000.safetensors", {"head": "open", "size": "[8, 8]", "entries": "[]"}
    )
    assert catalogue.identify(tmp_path / "codes-00000.safetensors").kind == "album"


@pytest.mark.parametrize("name", ["model050000.pt", "stream.pt", "a.safetensors"])
def test_cut_files_say_how_much_is_missing(tmp_path, name):
    state, path = rig().state_dict(), tmp_path / name
    if name == "a.safetensors":
        checkpoints.save_denoiser(path, rig())
    else:
        torch.save(state, path, _use_new_zipfile_serialization=name != "stream.pt")
    whole = path.read_bytes()
    assert catalogue.identify(path).complete
    for part in (0.5, 0.9, 0.999):
        n = int(len(whole) * part)
        path.write_bytes(whole[:n])
        f = catalogue.identify(path)
        assert not f.complete and f.detail == "it is cut" and "DiffusionRig denoiser" in f.what
        at_least = sum(v.nbytes for v in state.values()) / 1e6
        if (name, part) == ("model050000.pt", 0.999):  # all but the directory of the archive
            assert f"{n / 1e6:.1f} MB are there, the end is missing" in f.advice
            continue
        assert f"{n / 1e6:.1f} MB of at least " in f.advice
        said = float(f.advice.split("at least ")[1].split()[0])
        assert at_least - 0.05 <= said <= len(whole) / 1e6 + 0.05  # the directory at the end is not counted
    path.write_bytes(whole[:40])
    f = catalogue.identify(path)
    assert not f.complete and "download it again" in f.advice


def test_a_cut_pickle(tmp_path):
    path = tmp_path / "shadow_cls_weight.pkl"
    whole = pickle.dumps({"weight": np.ones((1, 512)), "bias": np.ones(1)}, 4)
    for n in (30, 500, 4000):
        path.write_bytes(whole[:n])
        f = catalogue.identify(path)
        assert not f.complete and "DiFaReli's shadow classifier" in f.what and "download it again" in f.advice


def test_archives_missing_storages(tmp_path):
    torch.save(rig().state_dict(), tmp_path / "a.pt")
    with zipfile.ZipFile(tmp_path / "a.pt") as old, zipfile.ZipFile(tmp_path / "b.pt", "w") as new:
        for name in old.namelist():
            if not name.endswith("data/3"):
                new.writestr(name, old.read(name))
    f = catalogue.identify(tmp_path / "b.pt")
    assert not f.complete and "1 of its" in f.detail and f.kind == "rig"


def test_incomplete_and_foreign_networks(tmp_path):
    state = rig().state_dict()
    torch.save({k: v for k, v in state.items() if k != "denoisingUNet.out.2.bias"}, tmp_path / "a.pt")
    f = catalogue.identify(tmp_path / "a.pt")
    assert f.kind == "rig" and not f.complete and "'denoisingUNet.out.2.bias' is missing" in f.detail
    save_file({"lora.up": torch.ones(2)}, tmp_path / "b.safetensors")
    f = catalogue.identify(tmp_path / "b.safetensors")
    assert f.what == catalogue.UNKNOWN and "lora.up" in f.detail and not f.kind
    torch.save({"state_dict": {"a": torch.ones(1)}}, tmp_path / "c.ckpt")
    assert catalogue.identify(tmp_path / "c.ckpt").what == catalogue.UNKNOWN


def tar_of(name: str, data: bytes) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as t:
        info = tarfile.TarInfo(name)
        info.size = len(data)
        t.addfile(info, io.BytesIO(data))
    return out.getvalue()


@pytest.mark.parametrize(
    ("content", "what", "advice"),
    [
        (b"", "empty", "download it again"),
        (b"<!DOCTYPE html><title>Google Drive - Virus scan warning</title>", "web page", "in a browser"),
        (b"\n <html>", "web page", "in a browser"),
        (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 434142943\n",
            "LFS",
            "git lfs pull",
        ),
        (gzip.compress(b"x" * 1000), "gzip", "unpack it"),
        (tar_of("a.txt", b"x"), catalogue.UNKNOWN, "not needed"),
        (b"\x89PNG\r\n\x1a\n" + bytes(30), "png", "download it again"),
        (b"PK\x03\x04" + bytes(30), "zip", "download it again"),
        (b"\xff\xff\0\0\0\0\0\0{" + bytes(30), "safetensors", "download it again"),
        (b"hello", catalogue.UNKNOWN, "not needed"),
        (pickle.dumps({"a": 1}), catalogue.UNKNOWN, "not needed"),
        (pickle.dumps(os.system), "pickle", "download it again"),
        (b"\x93NUMPY\x01\0" + bytes(20), "npy", "download it again"),
    ],
)
def test_wrong_things(tmp_path, content, what, advice):
    path = tmp_path / "model.pt"
    path.write_bytes(content)
    f = catalogue.identify(path)
    assert not f.complete and what in f.what and advice in f.advice
    assert catalogue.main([str(path)]) == 1


def test_the_size_behind_a_pointer(tmp_path):
    (tmp_path / "a.pt").write_bytes(
        b"version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 434142943\n"
    )
    assert catalogue.identify(tmp_path / "a.pt").detail == "it stands for 434.1 MB"


def test_pickles_that_run_something_are_named_and_not_run(tmp_path):
    mark = tmp_path / "executed"

    class Call:
        def __reduce__(self):
            return os.system, (f"touch {mark}",)

    (tmp_path / "a.pkl").write_bytes(pickle.dumps({"v_template": Call()}))
    torch.save({"denoisingUNet.x": Call()}, tmp_path / "a.pt")
    for name in ("a.pkl", "a.pt"):
        f = catalogue.identify(tmp_path / name)
        assert not f.complete and "system'" in f.detail and "nothing was executed" in f.detail
    assert not mark.exists()


def test_unfinished_downloads(official, tmp_path):
    data = (official / "model050000.pt").read_bytes()
    path = tmp_path / "model050000.pt.crdownload"
    path.write_bytes(data[: len(data) // 3])
    assert catalogue.identify(path).detail == "it is cut"
    path.write_bytes(data)
    f = catalogue.identify(path)
    assert not f.complete and "rename it to model*.pt" in f.advice


def test_packed_files_say_which_member(official, tmp_path):
    path = tmp_path / "drive-download.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as z:
        z.write(official / "model050000.pt", "stage1/model050000.pt")
        z.write(official / "shadow_cls_weight.pkl", "x.pkl")
        z.writestr("readme.txt", "hello")
    f = catalogue.identify(path)
    assert not f.complete and f.what == "a zip archive"
    assert "unpack stage1/model050000.pt (DiffusionRig denoiser)" in f.advice
    assert "x.pkl (DiFaReli's shadow classifier)" in f.advice and "readme" not in f.advice
    (tmp_path / "a.tar").write_bytes(tar_of("model.pt", (official / "model050000.pt").read_bytes()))
    assert "unpack model.pt (DiffusionRig denoiser)" in catalogue.identify(tmp_path / "a.tar").advice


def test_partners(official, tmp_path):
    def survey():
        return {f.path.name: f for f in catalogue.survey(tmp_path)}

    for name in ("ImgCond_ema_0.9999_085000.pt", "last.ckpt"):
        os.link(official / name, tmp_path / name)
    found = survey()
    assert not any(f.complete for f in found.values())
    assert "put ImgEncoder_*.pt of the same step beside it" in found["ImgCond_ema_0.9999_085000.pt"].advice
    assert "needs DiFaReli's shadow classifier (shadow_cls_weight.pkl) beside it" in found["last.ckpt"].advice
    deep = tmp_path / "deep"
    deep.mkdir()
    os.link(official / "ImgEncoder_ema_0.9999_085000.pt", deep / "encoder.pt")
    os.link(official / "shadow_cls_weight.pkl", deep / "shadow_cls_weight.pkl")
    found = survey()
    assert found["ImgCond_ema_0.9999_085000.pt"].complete and found["encoder.pt"].complete
    assert f"choose {deep / 'encoder.pt'} at 'modulator'" in found["ImgCond_ema_0.9999_085000.pt"].advice
    assert not found["last.ckpt"].complete and f"move {deep}" in found["last.ckpt"].advice
    # the Modulator of another size is no partner
    other = recipe(relight_keys("difareli_64")[1], 1)
    (deep / "encoder.pt").unlink()
    torch.save({k: v.half() for k, v in other.items()}, deep / "encoder.pt")
    found = survey()
    assert not found["ImgCond_ema_0.9999_085000.pt"].complete and not found["encoder.pt"].complete
    (f,) = catalogue.survey(official / "last.ckpt")
    assert f.complete and not f.advice


def test_a_folder_is_complete_or_says_what_is_missing(official, tmp_path):
    lines = catalogue.missing(catalogue.survey(official))
    text = "\n".join(lines)
    for use in ("official identity encoder", "official shadow estimator", "face parser"):
        assert f"{use}: complete" in lines
    assert "DiffusionRig as published: incomplete" in lines and "DiFaReli as published: incomplete" in lines
    assert "DECA and FLAME face model: missing" in lines
    for word in ("deca_model.tar", "generic_model.pkl", "https://flame.is.tue.mpg.de", "registration"):
        assert word in text
    empty = "\n".join(catalogue.missing([]))
    for word in ("Adobe Research License", "79999_iter.pth", "CelebAMask-HQ", "last.ckpt", "ImgCond_*.pt"):
        assert word in empty
    assert "no model files here" in catalogue.report(tmp_path)


def test_a_survey_is_bounded_and_never_raises(official, tmp_path, monkeypatch):
    deep = tmp_path / "1" / "2" / "3"
    (deep / "4").mkdir(parents=True)
    for folder in (deep, deep / "4"):
        os.link(official / "model050000.pt", folder / "model.pt")
    (tmp_path / ".hidden.pt").write_bytes(b"x")
    (tmp_path / "notes.txt").write_text("hello")
    (tmp_path / "circle").symlink_to(tmp_path)
    (tmp_path / "gone.pt").symlink_to(tmp_path / "nowhere")
    os.mkfifo(tmp_path / "pipe.pt")
    found = catalogue.survey(tmp_path)
    assert [f.path for f in found] == [deep / "model.pt"]
    assert catalogue.identify(tmp_path / "pipe.pt").what == "not a file"
    assert catalogue.identify(tmp_path / "nowhere.pt").what == "unreadable"
    assert catalogue.identify(tmp_path).what == "not a file"
    monkeypatch.setattr(catalogue, "MOST", 20)
    for i in range(40):
        (tmp_path / f"{i:02}.pt").write_bytes(b"x")
    (tmp_path / "1").rename(tmp_path / ".1")
    found = catalogue.survey(tmp_path)
    assert len(found) == 21 and "of 41 files, of which 20 were looked at" in found[0].what


def test_only_the_structure_is_read(official, tmp_path):
    """Half of a file is never touched: it may be holes that would read as zeros."""
    path = tmp_path / "big.safetensors"
    header = json.dumps({"denoisingUNet.a": {"dtype": "F32", "shape": [2**38], "data_offsets": [0, 2**40]}})
    with open(path, "wb") as f:
        f.write(len(header).to_bytes(8, "little") + header.encode())
        f.truncate(8 + len(header) + 2**40)
    assert catalogue.identify(path).what == catalogue.UNKNOWN  # a terabyte, at once


def test_the_report_reads_well(official):
    text = catalogue.report(official)
    print(text)
    lines = text.splitlines()
    assert "ok   model050000.pt: DiffusionRig denoiser" in lines
    assert "       32 px, 1.0 million weights, for the flame head; node: Load DiffusionRig" in lines
    assert not any(line.startswith("BAD") for line in lines)


def test_the_command(official, tmp_path, capsys):
    assert catalogue.main([str(official / "model050000.pt"), str(official / "79999_iter.pth")]) == 0
    assert capsys.readouterr().out.count("ok   ") == 2
    assert catalogue.main([str(official)]) == 0
    assert catalogue.main([str(tmp_path / "nothing.pt")]) == 1
    (tmp_path / "a.pt").write_bytes(b"<html>")
    command = [sys.executable, "-m", "rig_core.checkpoints", str(official / "model050000.pt"), str(tmp_path)]
    out = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert out.returncode == 1 and "BAD  a.pt: a web page" in out.stdout and not out.stderr


@pytest.mark.parametrize("seed", range(40))
def test_damage_never_surprises(official, tmp_path, seed):
    g = np.random.default_rng(seed)
    name = ["model050000.pt", "shadow_cls_weight.pkl", "BEST_checkpoint_r18.tar"][seed % 3]
    raw = bytearray((official / name).read_bytes())
    for i in g.integers(0, min(len(raw), 3000), 8):
        raw[i] = g.integers(256)
    (tmp_path / "a.pt").write_bytes(raw[: int(len(raw) * g.uniform(0.2, 1.2))])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        f = catalogue.identify(tmp_path / "a.pt")
    assert f.what and isinstance(f.complete, bool)
