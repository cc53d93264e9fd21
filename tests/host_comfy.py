"""The real ComfyUI in this process with the pack in it: class Comfy and fixture `host`, for test_host*.py.

Run these tests with the Python of that ComfyUI, whose folder COMFYUI_PATH names.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import sys
import time
from pathlib import Path

import pytest
import torch

__all__ = ["host"]
COMFYUI = os.environ.get("COMFYUI_PATH")
ROOT = Path(__file__).resolve().parents[1]
marks = [
    pytest.mark.host,
    pytest.mark.slow,
    pytest.mark.skipif(not COMFYUI, reason="set COMFYUI_PATH to a ComfyUI folder to test in the real host"),
]
SIZE = 64
EXTRAS = (
    "video chroma_radiance custom_sampler images latent model_advanced model_merging torch_compile".split()
)


class Comfy:
    """ComfyUI's modules, its node table with ours in it, and a way to run a graph."""

    def __init__(self, base: Path):
        for name in ("custom_nodes", "models/face_rig", "input", "output", "temp", "user"):
            (base / name).mkdir(parents=True)
        self.base = base
        sys.path.insert(0, COMFYUI)
        from comfy.cli_args import args

        args.cpu = not torch.cuda.is_available()
        args.base_directory, args.disable_api_nodes = str(base), True
        import utils.extra_config  # noqa: F401  before nodes, which puts comfy/ on the path

        import execution  # isort: skip
        import nodes  # isort: skip
        import server  # isort: skip

        self.execution, self.nodes = execution, nodes
        self.loop = asyncio.new_event_loop()
        self.server = server.PromptServer(self.loop)
        self.sent = []
        self.server.send_sync = lambda event, data, sid=None: self.sent.append((event, data))
        asyncio.set_event_loop(self.loop)
        start = time.process_time()
        assert self.loop.run_until_complete(nodes.load_custom_node(str(ROOT)))
        self.seconds = time.process_time() - start
        extras = Path(COMFYUI) / "comfy_extras"
        for name in EXTRAS:
            assert self.loop.run_until_complete(nodes.load_custom_node(str(extras / f"nodes_{name}.py")))
        self.pack = sys.modules[str(ROOT).replace(".", "_x_")]
        self.core = sys.modules[self.pack.__name__ + ".rig_core"]
        self.executor = execution.PromptExecutor(self.server)

    def run(self, prompt: dict) -> tuple[bool, list, dict]:
        """Validate and execute an API graph: success, the executor's messages, ui outputs by node id."""
        valid, error, outputs, node_errors = self.loop.run_until_complete(
            self.execution.validate_prompt("test", prompt, None)
        )
        assert valid, (error, node_errors)
        self.loop.run_until_complete(self.executor.execute_async(prompt, "test", {}, outputs))
        messages = self.executor.status_messages
        return self.executor.success, messages, self.executor.history_result["outputs"]

    def node(self, name: str, **inputs):
        """Run one of our nodes by itself."""
        return self.stock("FaceRig_" + name, **inputs)

    def stock(self, name: str, **inputs) -> tuple:
        """Run any node by itself."""
        node = self.nodes.NODE_CLASS_MAPPINGS[name]
        with torch.inference_mode():
            out = getattr(node(), node.FUNCTION)(**inputs)
        return getattr(out, "result", out)


def load_graph(name: str) -> dict:
    """A workflow as the API takes it."""
    return json.loads((ROOT / "tests" / "api" / f"{name}.json").read_text(encoding="utf-8"))


def of_type(graph: dict, class_type: str) -> dict:
    """The first node of a type."""
    return next(n for n in graph.values() if n["class_type"] == class_type)


@pytest.fixture(scope="session")
def host(tmp_path_factory):
    """One for all modules of tests: ComfyUI settles its folders when it is imported."""
    if not _started:
        _started.append(_start(tmp_path_factory.mktemp("comfy")))
    return _started[0]


_started: list = []


def _start(base: Path) -> Comfy:
    host = Comfy(base)
    for photo in ("astronaut.jpg", "grace_hopper.jpg"):
        shutil.copy(ROOT / "rig_core" / "assets" / photo, host.base / "input")
    rig = host.core.denoisers.rig
    torch.manual_seed(0)
    net = rig.DiffusionRig(rig.RigConfig(SIZE, 32, (1, 1, 2), 1, (16,), latent_dim=16, encoder_width=8))
    torch.nn.init.normal_(net.denoisingUNet.out[2].weight, std=0.02)
    host.core.checkpoints.save_denoiser(host.base / "models" / "face_rig" / "tiny.safetensors", net)
    r = host.core.denoisers.relight
    sizes = {"num_heads": 1, "norm_groups": 8, "cond_dim": 241, "proj_dim": 16}
    net = r.start_open(r.DiFaReli(r.RelightConfig(SIZE, 32, (1, 1, 2), 1, (16,), **sizes)))
    torch.nn.init.normal_(net.ImgCond.out[2].weight, std=0.02)
    for block in net.ImgCond.res_blocks:  # these start at 0, and the vector would not show
        torch.nn.init.normal_(block.out_layers[3].weight, std=0.1)
    host.core.checkpoints.save_denoiser(host.base / "models" / "face_rig" / "relight.safetensors", net)
    return host
