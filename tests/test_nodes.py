"""The pack as a whole against a double of the host: schemas, help pages, workflows, files of models."""

from __future__ import annotations

import ast
import subprocess
import sys

import pytest

from tests.node_pack import *  # noqa: F403 the fixtures
from tests.node_pack import ROOT


def test_root_module_has_nothing_but_the_entry_point(pack):
    public = {n for n in vars(pack.root) if not n.startswith("_")}
    assert public - {"nodes", "rig_core"} == {"WEB_DIRECTORY", "comfy_entrypoint"}


def test_only_the_host_room_touches_the_host():
    for path in (ROOT / "nodes").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
            names += [a.name for a in node.names] if isinstance(node, ast.Import) else []
            for name in names:
                assert name.split(".")[0] != "training"
                if path.parent.name != "host":
                    assert name.split(".")[0] not in ("comfy", "folder_paths", "server", "execution"), (
                        path,
                        name,
                    )


def test_import_is_fast_and_changes_nothing_global(tmp_path):
    code = (
        "import torch, pytest, sys, time, pathlib, numpy, PIL.Image\n"
        f"sys.path.insert(0, {str(ROOT / 'tests')!r})\n"
        "import host_double\n"
        "m = pytest.MonkeyPatch()\n"
        f"host_double.install(m, pathlib.Path({str(tmp_path)!r}))\n"
        "def state(): return (torch.get_default_dtype(), torch.is_grad_enabled(), torch.get_num_threads(),\n"
        "    torch.backends.cudnn.benchmark, torch.initial_seed(), list(sys.path))\n"
        "before, start = state(), time.process_time()\n"
        "host_double.load_pack(m)\n"
        "seconds = time.process_time() - start\n"
        "assert state() == before\n"
        "print(seconds)\n"
    )
    out = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120
    )
    assert float(out.stdout.split()[-1]) < 0.5


def test_every_node_explains_itself(pack):
    for node_id, node in pack.nodes.items():
        schema = node.define_schema()
        assert node_id.startswith("FaceRig_") and schema.display_name and schema.description
        assert schema.category.startswith("Face Rig/")
        for i in schema.inputs:
            assert i.tooltip, (node_id, i.id)
            if i.options is not None:
                assert i.default in i.options, (node_id, i.id)
            elif i.min is not None:
                assert i.min <= i.default <= i.max, (node_id, i.id)
        assert all(o.tooltip and o.display_name for o in schema.outputs), node_id
        optional = [i.optional for i in schema.inputs if i.widget]
        assert optional == sorted(optional), node_id  # the browser puts optional widgets last
        page = (ROOT / "web" / "docs" / f"{node_id}.md").read_text(encoding="utf-8")
        for i in schema.inputs:
            assert f"`{i.id}`" in page, f"{node_id}.md does not mention {i.id}"
    pages = {p.stem for p in (ROOT / "web" / "docs").glob("*.md")}
    assert pages == set(pack.nodes)


def test_checkpoints_of_another_kind_and_missing_ones(pack, model):
    folder, checkpoints = pack.host.folder / "models" / "face_rig", pack.core.checkpoints
    (folder / "cut.safetensors").write_bytes((folder / "tiny.safetensors").read_bytes()[:5000])
    (folder / "head.safetensors").write_bytes((checkpoints.ASSETS / "open_head.safetensors").read_bytes())
    (folder / "notes.txt").write_text("no model")
    with pytest.raises(checkpoints.CheckpointError, match="head.safetensors"):
        pack.run("LoadDiffusionRig", file="head.safetensors")
    with pytest.raises(checkpoints.CheckpointError, match="tiny.safetensors"):
        pack.run("LoadFaceModel", file="tiny.safetensors")
    with pytest.raises(checkpoints.CheckpointError, match="cut.safetensors"):
        pack.run("LoadDiffusionRig", file="cut.safetensors")
    with pytest.raises(FileNotFoundError, match="gone.safetensors.*models/face_rig"):
        pack.run("LoadDiffusionRig", file="gone.safetensors")
    offered = pack.nodes["FaceRig_LoadDiffusionRig"].define_schema().inputs[0].options
    assert offered == ["default (in the pack)", "cut.safetensors", "head.safetensors", "tiny.safetensors"]
    node = pack.nodes["FaceRig_LoadDiffusionRig"]
    before = node.fingerprint_inputs(file="cut.safetensors")
    assert node.fingerprint_inputs(file="cut.safetensors") == before
    (folder / "cut.safetensors").write_bytes(b"other")
    assert node.fingerprint_inputs(file="cut.safetensors") != before
    assert node.fingerprint_inputs(file="gone.safetensors") == "gone.safetensors"
