"""Check Models over the double of the host."""

from __future__ import annotations

import os

import torch

from tests.golden_files import relight_pair
from tests.node_pack import *  # noqa: F403 the fixtures


def test_the_report_of_the_model_folder(pack):
    folder = pack.host.folder / "models" / "face_rig"
    node = pack.nodes["FaceRig_CheckModels"]
    (report,) = pack.run("CheckModels")
    assert pack.host.texts[-1] == report and "no model files here" in report and str(folder) in report
    marks = [node.fingerprint_inputs()]
    unet, modulator = relight_pair()
    torch.save(unet, folder / "ImgCond_a.pt")
    marks.append(node.fingerprint_inputs())
    (report,) = pack.run("CheckModels")
    assert "BAD  ImgCond_a.pt: DiFaReli denoiser" in report and "put ImgEncoder_*.pt" in report
    (folder / "sub").mkdir()
    torch.save(modulator, folder / "sub" / "ImgEncoder_a.pt")
    marks.append(node.fingerprint_inputs())
    (report,) = pack.run("CheckModels")
    assert "ok   ImgCond_a.pt: DiFaReli denoiser" in report and "at 'modulator'" in report
    os.rename(folder / "sub" / "ImgEncoder_a.pt", folder / "ImgEncoder_a.pt")
    marks.append(node.fingerprint_inputs())
    (report,) = pack.run("CheckModels")
    assert "node: Load DiFaReli" in report and "->" not in report
    (folder / "ImgEncoder_a.pt").write_bytes((folder / "ImgEncoder_a.pt").read_bytes()[:5000])
    marks.append(node.fingerprint_inputs())
    (report,) = pack.run("CheckModels")
    assert "BAD  ImgEncoder_a.pt" in report and "download it again" in report
    assert len(set(marks)) == len(marks) and node.fingerprint_inputs() == marks[-1]


def test_every_node_named_is_one(pack):
    names = {n.define_schema().display_name for n in pack.nodes.values()}
    known = {k.node for k in pack.core.known_files.KNOWN} - {""}
    assert known <= names and len(known) == 6


def test_an_output_node_without_inputs(pack):
    schema = pack.nodes["FaceRig_CheckModels"].define_schema()
    assert schema.is_output_node and not schema.inputs and schema.category == "Face Rig/personal"
    assert [o.io_type for o in schema.outputs] == ["STRING"]


def test_a_second_folder_and_one_that_is_not_there(pack, tmp_path):
    host = pack.nodes_module.host
    paths, _ = host.folders.folder_paths.folder_names_and_paths["face_rig"]
    paths += [str(tmp_path), str(tmp_path / "nothing")]
    try:
        (tmp_path / "model.pt").write_bytes(b"<html>")
        (report,) = pack.run("CheckModels")
    finally:
        del paths[-2:]
    assert "BAD  model.pt: a web page" in report and "nothing" not in report.splitlines()[0]
