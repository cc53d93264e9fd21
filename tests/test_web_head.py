"""web/js/head.js under node.js against the head models: poses, projection, picture, speed."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

from rig_core import buffers, checkpoints, pipeline, preview_mesh
from rig_core.expressions import EXPRESSIONS
from rig_core.heads.flame import Flame
from tests.test_flame import golden, tensors  # noqa: F401 fixtures
from tests.test_preview_mesh import random_code, unpacked

torch.set_num_threads(1)
NODE = shutil.which("node")
pytestmark = pytest.mark.skipif(not NODE, reason="install node.js (18 or newer) to test the page's modules")
JS = Path(__file__).resolve().parents[1] / "web" / "js"
SIDE = 192
POSES = {"yaw": 60, "pitch": 40, "roll": 90, "jaw": 25}
GAZE = {"gaze_x": 35, "gaze_y": 25}
# file, edits, side, out -> for each edit the vertices [3V] float32 and the picture [4 side side]; then ms
SCRIPT = """
import fs from "node:fs"
import { draw, pose, unpack } from "./head.js"
const [file, edits, side, out] = process.argv.slice(2)
const bytes = fs.readFileSync(file)
const head = await unpack(bytes.buffer.slice(bytes.byteOffset, bytes.byteOffset + bytes.byteLength))
const pixels = new Uint8ClampedArray(4 * side * side), memory = {}, parts = [], times = []
for (const edit of JSON.parse(edits)) {
    draw(head, edit, +side, pixels, memory)
    parts.push(Buffer.from(Float32Array.from(pose(head, edit)).buffer), Buffer.from(pixels))
}
for (let i = 0; i < 60; i++) {
    const start = performance.now()
    draw(head, { yaw: i, jaw: 10, smile: 0.5 }, +side, pixels, memory)
    times.push(performance.now() - start)
}
fs.writeFileSync(out, Buffer.concat(parts))
console.log(times.sort((a, b) => a - b)[30])
"""


def run(folder: Path, file: bytes, edits: list[dict]) -> tuple[list, list, float]:
    """Vertices [V,3] and pictures [side,side,4] 0..1 of each edit, and milliseconds a picture."""
    for name in ("head.js", "sh.js"):
        shutil.copy(JS / name, folder)
    (folder / "package.json").write_text('{"type": "module"}')
    (folder / "run.js").write_text(SCRIPT)
    (folder / "face.head").write_bytes(file)
    command = [NODE, "run.js", "face.head", json.dumps(edits), str(SIDE), "out.bin"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    verts, pictures, at = [], [], 0
    data, count = (folder / "out.bin").read_bytes(), len(unpacked(file)["rest"])
    for _ in edits:
        verts.append(torch.from_numpy(np.frombuffer(data, np.float32, 3 * count, at).reshape(-1, 3).copy()))
        at += 12 * count
        picture = np.frombuffer(data, np.uint8, 4 * SIDE**2, at).reshape(SIDE, SIDE, 4)
        pictures.append(torch.from_numpy(picture.copy()).float() / 255)
        at += 4 * SIDE**2
    return verts, pictures, float(done.stdout)


def turned(head, code, edit):
    """What the node makes of the sliders."""
    shapes: dict = {}
    for slider in set(edit) & set(EXPRESSIONS):
        for name, weight in EXPRESSIONS[slider][1].items():
            shapes[name] = shapes.get(name, 0.0) + weight * edit[slider]
    poses = {k: edit.get(k, 0.0) for k in POSES}
    return pipeline.turn(head, code, **poses, gaze=tuple(edit.get(k, 0.0) for k in GAZE), **shapes)


def random_edits(ranges: dict, n: int) -> list[dict]:
    g = torch.Generator().manual_seed(4)
    return [{k: float(v * (2 * torch.rand(1, generator=g) - 1)) for k, v in ranges.items()} for _ in range(n)]


@pytest.fixture(scope="module")
def head():
    return checkpoints.load_head()


@pytest.mark.parametrize("seed", [0, 1])
def test_the_open_head_follows_every_slider(head, tmp_path, seed):
    code, ones = random_code(head, seed), dict.fromkeys(EXPRESSIONS, 1.0)
    edits = [{}, *({k: v} for k, v in (POSES | GAZE | ones).items()), *random_edits(POSES | GAZE | ones, 8)]
    verts, _, _ = run(tmp_path, preview_mesh.pack(head, code), edits)
    size = (head.template.amax(0) - head.template.amin(0)).max()
    rest = head.verts(code.shape, code.exp, code.pose)[0]
    for edit, got in zip(edits, verts):
        new = turned(head, code, edit)
        want = head.verts(new.shape, new.exp, new.pose)[0]
        worst = (got[: len(want)] - want).norm(dim=1).max() / size
        assert worst < (1e-3 if len(edit) < 2 else 4e-3), (edit, float(worst))
        assert not edit or (want - rest).norm(dim=1).max() / size > 5e-3  # there was something to follow


def test_flame_follows_pose_and_jaw_and_stays_in_place(tensors, tmp_path):  # noqa: F811
    flame = Flame.from_tensors(tensors)
    code = random_code(flame, 2)
    edits = [{}, *({k: v} for k, v in POSES.items()), *random_edits(POSES, 6)]
    verts, _, _ = run(tmp_path, preview_mesh.pack(flame, code), edits)
    rest = flame.verts(code.shape, code.exp, code.pose)[0]
    size = (rest.amax(0) - rest.amin(0)).max()
    for edit, got in zip(edits, verts):
        new = turned(flame, code, edit)
        want = flame.verts(new.shape, new.exp, new.pose)[0]
        want[:, :2] += (new.cam - code.cam)[0, 1:]  # re-centred by the camera
        worst = (got[: len(want)] - want).norm(dim=1).max() / size
        assert worst < 1e-2, (edit, float(worst))


def test_the_picture_is_the_rendered_one(head, tmp_path):
    code = random_code(head, 3)
    file = preview_mesh.pack(head, code)
    edits = [{}, {"yaw": 30, "pitch": 10, "smile": 1}, {"jaw": 18, "gaze_x": 20}, {"yaw": -60, "blink": 1}]
    _, pictures, milliseconds = run(tmp_path, file, edits)
    assert milliseconds < 60  # a tenth of that on an idle machine, where a screen has 16
    a, _, c, _, e, f = unpacked(file)["camera"]
    crop = torch.eye(3)[None] * torch.tensor([224 / SIDE, 224 / SIDE, 1.0])
    code = code.replace(cam=torch.tensor([[a, c / a, f / e]]), crop=crop, size=(SIDE, SIDE))
    for edit, got in zip(edits, pictures):
        want = buffers.render(head, turned(head, code, edit))
        inside, shown = want.mask[0, 0] > 0, got[..., 3] > 0
        assert (inside & shown).sum() / (inside | shown).sum() > 0.995
        off = (want.rendered[0].clamp(0, 1).permute(1, 2, 0) - got[..., :3])[inside & shown]
        assert -10 * off.square().mean().log10() > 36, edit


def test_another_file_is_refused(tmp_path):
    import zlib

    header = b'{"format":2,"arrays":{}}'
    file = zlib.compress(len(header).to_bytes(4, "little") + header)
    for name in ("head.js", "sh.js"):
        shutil.copy(JS / name, tmp_path)
    (tmp_path / "package.json").write_text('{"type": "module"}')
    script = f'import {{ unpack }} from "./head.js"; await unpack(Uint8Array.from({list(file)}))'
    (tmp_path / "run.js").write_text(script)
    done = subprocess.run([NODE, "run.js"], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode and "a head of format 2, wanted 1" in done.stderr
