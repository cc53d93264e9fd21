"""The pack loaded into the double of the host, and a scene for the nodes: fixtures of test_nodes*.py.

The photo is a render of the open head's mean face, so that landmarks, pose and light are known exactly.
"""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests import host_double
from tests.global_state import unchanged

__all__ = ["conditioned", "face", "fresh", "head", "model", "pack", "scene"]
ROOT = Path(__file__).resolve().parents[1]
SIZE = 64


class Pack:
    """The loaded pack with its nodes, and the double's records."""

    def __init__(self, monkeypatch, folder: Path):
        self.host = host_double.install(monkeypatch, folder)
        self.root, extension = host_double.load_pack(monkeypatch)
        self.nodes = host_double.nodes_by_id(asyncio.run(extension.get_node_list()))
        self.core = sys.modules[self.root.__name__ + ".rig_core"]
        self.nodes_module = sys.modules[self.root.__name__ + ".nodes"]

    def run(self, node_id: str, **inputs):
        """Run a node as the host does, in inference mode, widgets at their defaults."""
        node = self.nodes["FaceRig_" + node_id]
        schema = node.define_schema()
        widgets = {i.id: i.default for i in schema.inputs if i.widget and not i.optional}
        unknown = set(inputs) - {i.id for i in schema.inputs}
        assert not unknown, unknown
        with torch.inference_mode(), unchanged(node_id):
            out = node.execute(**{**widgets, **inputs}).result
        assert len(out) == len(schema.outputs)
        return out


@pytest.fixture(scope="module")
def pack(tmp_path_factory):
    with pytest.MonkeyPatch.context() as monkeypatch:
        yield Pack(monkeypatch, tmp_path_factory.mktemp("host"))


@pytest.fixture(autouse=True)
def fresh(pack):
    pack.host.interrupt_after = None
    pack.host.progress.clear()


def psnr(a: Tensor, b: Tensor) -> float:
    return float(-10 * (a - b).square().mean().log10())


@pytest.fixture(scope="module")
def head(pack):
    return pack.run("LoadFaceModel")[0].head


@pytest.fixture(scope="module")
def model(pack):
    """A small DiffusionRig with random weights, written to and read from the model folder."""
    rig = pack.core.denoisers.rig
    torch.manual_seed(0)
    net = rig.DiffusionRig(rig.RigConfig(SIZE, 32, (1, 1, 2), 1, (16,), latent_dim=16, encoder_width=8))
    torch.nn.init.normal_(net.denoisingUNet.out[2].weight, std=0.02)
    path = pack.host.folder / "models" / "face_rig" / "tiny.safetensors"
    pack.core.checkpoints.save_denoiser(path, net)
    model, size = pack.run("LoadDiffusionRig", file="tiny.safetensors")
    assert size == SIZE
    return model


@pytest.fixture(scope="module")
def scene(pack, head):
    """A photo [1,96,128,3] with the mean face in it and its landmarks [1,68,2]."""
    buffers = pack.core.buffers
    code = head.mean_code(1, (96, 128))
    b = buffers.render(head, code)
    background = torch.linspace(0.2, 0.6, 128).expand(1, 3, 96, 128)
    photo = b.rendered * b.mask + background * (1 - b.mask)
    points = head.landmarks(head.verts(code.shape, code.exp, code.pose), code.pose)
    landmarks = buffers.to_pixels(buffers.to_image(points, code), code.size)
    return photo.clamp(0, 1).permute(0, 2, 3, 1).contiguous(), landmarks


@pytest.fixture(scope="module")
def face(pack, head, scene):
    """Aligned image, crop, landmarks, code of the scene."""
    image, crop, points, _ = pack.run("AlignFace", photo=scene[0], size=SIZE, landmarks=scene[1])
    code, light, overlay = pack.run("FitToLandmarks", face_model=head, image=image, landmarks=points)
    return image, crop, points, code


@pytest.fixture(scope="module")
def conditioned(pack, head, model, face):
    buffers = pack.run("RenderBuffers", face_model=head, face_code=face[3])[0]
    return pack.run("DiffusionRigCondition", model=model, image=face[0], buffers=buffers)[0]
