"""Face Rig in ComfyUI's real page: a bench for tests that drive a browser.

    from tests.browser import needs_browser, open_host, tiny_model

    pytestmark = needs_browser

    @pytest.fixture(scope="module")
    def bench(tmp_path_factory):
        with open_host(tmp_path_factory.mktemp("browser")) as bench:
            tiny_model(bench.base)                          # models/face_rig/tiny.safetensors, 64 px
            yield bench

    def test_something(bench):
        assert not bench.load(graphs.relight())             # or a path, or a name of workflows/; what lacks
        node = bench.node("FaceRig_SHLightEdit")            # its id
        bench.set(node, "azimuth", 30)
        assert bench.value(node, "azimuth") == 30
        outputs = bench.run()                               # queue, wait; ui outputs by node id, as text
        bench.prompt(), bench.save()                        # the graph for the API, and as the page saves it
        bench.picture("relit.png", node)                    # PNG in FACE_RIG_PICTURES, of a node or the page
        assert not bench.complaints()                       # console errors and failed requests of ours

`bench.page` is playwright's page, `bench.js("app.graph.serialize()")` evaluates in it. The server is a
process of its own on a free port of 127.0.0.1, with its files in the given folder and only this pack.
Run with the Python of ComfyUI, with playwright and Chromium:

    COMFYUI_PATH=.../ComfyUI .../python -m pytest tests/test_browser.py

By hand, to look at a workflow: `... -m tests.browser "Relight a portrait" FaceRig_SHLightEdit picture.png`
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
COMFYUI = os.environ.get("COMFYUI_PATH")
PICTURES = os.environ.get("FACE_RIG_PICTURES")  # folder for the screenshots, none are kept without
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
PACK = "face_rig"  # the folder name below custom_nodes, and in our URLs


def _missing() -> str:
    if not COMFYUI:
        return "set COMFYUI_PATH to a ComfyUI folder to test in its page"
    if not importlib.util.find_spec("playwright"):
        return "pip install playwright to test in ComfyUI's page"
    return "" if CHROMIUM else "install Chromium to test in ComfyUI's page"


# for `pytestmark` of a module
needs_browser = [
    pytest.mark.host,
    pytest.mark.slow,
    pytest.mark.skipif(bool(_missing()), reason=_missing() or "-"),
]


def tiny_model(base: Path, name: str = "tiny.safetensors") -> str:
    """A DiffusionRig of 64 px with random weights in the model folder below base; its file name."""
    import torch

    from rig_core import checkpoints
    from rig_core.denoisers import rig

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = rig.DiffusionRig(rig.RigConfig(64, 32, (1, 1, 2), 1, (16,), latent_dim=16, encoder_width=8))
        torch.nn.init.normal_(net.denoisingUNet.out[2].weight, std=0.02)
    checkpoints.save_denoiser(base / "models" / "face_rig" / name, net)
    return name


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@contextlib.contextmanager
def serve(base: Path, *arguments: str, seconds: float = 120):
    """ComfyUI with this pack on a free port, its folders below base; yields the address, ends the process."""
    for name in ("custom_nodes", "models/face_rig", "input", "output", "temp", "user/default"):
        (base / name).mkdir(parents=True, exist_ok=True)
    (base / "custom_nodes" / PACK).symlink_to(ROOT, target_is_directory=True)
    for photo in ("astronaut.jpg", "grace_hopper.jpg"):
        shutil.copy(ROOT / "rig_core" / "assets" / photo, base / "input")
    settings = {"Comfy.TutorialCompleted": True, "Comfy.Workflow.ShowMissingNodesWarning": True}
    (base / "user" / "default" / "comfy.settings.json").write_text(json.dumps(settings))
    port = _free_port()
    command = [sys.executable, "main.py", "--cpu", "--listen", "127.0.0.1", "--port", str(port)]
    command += ["--disable-auto-launch", "--disable-api-nodes", "--base-directory", str(base)]
    command += ["--database-url", f"sqlite:///{base}/user/comfyui.db", *arguments]
    url = f"http://127.0.0.1:{port}"
    with open(base / "server.log", "w") as log:
        process = subprocess.Popen(command, cwd=COMFYUI, stdout=log, stderr=log, start_new_session=True)
    try:
        end = time.monotonic() + seconds
        while True:
            try:
                urllib.request.urlopen(url + "/system_stats", timeout=5).read()
                break
            except OSError:
                if process.poll() is not None or time.monotonic() > end:
                    text = (base / "server.log").read_text()[-4000:]
                    raise RuntimeError(f"ComfyUI did not start:\n{text}") from None
                time.sleep(0.2)
        text = (base / "server.log").read_text()
        if "IMPORT FAILED" in text:
            raise RuntimeError(f"the pack did not load:\n{text[-4000:]}")
        yield url
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


_READY = """() => window.app && app.graph && app.extensionManager && window.LiteGraph
    && LiteGraph.registered_node_types["FaceRig_SHLightEdit"]"""

_HELPERS = """async () => {
    const runs = []
    for (const name of ["execution_success", "execution_error", "execution_interrupted"])
        app.api.addEventListener(name, e => runs.push([name, e.detail]))
    window.bench = {
        runs,
        node: id => app.graph.getNodeById(id),
        widget: (id, name) => bench.node(id).widgets.find(w => w.name === name),
        // the node's rectangle in the page, title included
        rect: id => {
            const n = bench.node(id), ds = app.canvas.ds
            const c = app.canvas.canvas.getBoundingClientRect()
            const title = LiteGraph.NODE_TITLE_HEIGHT
            return {
                x: c.left + (n.pos[0] + ds.offset[0]) * ds.scale,
                y: c.top + (n.pos[1] - title + ds.offset[1]) * ds.scale,
                width: n.size[0] * ds.scale,
                height: (n.size[1] + title) * ds.scale,
            }
        },
    }
}"""


class Bench:
    """The open page. errors, failed and refused collect what went wrong since the last `complaints`."""

    def __init__(self, page, url: str, base: Path):
        self.page, self.url, self.base = page, url, base
        self.errors, self.failed, self.refused = [], [], []
        page.route("**/*", self._route)
        page.on(
            "console",
            lambda m: self.errors.append((m.text, m.location.get("url", ""))) if m.type == "error" else None,
        )
        page.on("pageerror", lambda e: self.errors.append((f"{e.message}\n{e.stack}", "")))
        page.on("response", lambda r: self.failed.append((r.status, r.url)) if r.status >= 400 else None)
        page.on("requestfailed", lambda r: self.failed.append((r.failure, r.url)))
        self.open()

    def _route(self, route):
        address = route.request.url
        if address.startswith((self.url, "data:", "blob:", self.url.replace("http", "ws", 1))):
            return route.continue_()
        self.refused.append(address)
        route.abort()

    def open(self):
        """Load the page anew, as after a reload."""
        self.page.goto(self.url, wait_until="domcontentloaded")
        self.page.wait_for_function(_READY, timeout=90000)
        self.js(_HELPERS)
        self.page.wait_for_timeout(300)

    def js(self, script: str, *values):
        """Evaluate an expression, or call a function with values, in the page."""
        return self.page.evaluate(script, values[0] if len(values) == 1 else list(values))

    def settle(self, frames: int = 3):
        """Let the page draw."""
        self.js(
            "n => new Promise(ok => { const f = () => n-- > 0 ? requestAnimationFrame(f) : ok(); f() })",
            frames,
        )

    def load(self, workflow: str | Path | dict) -> list[str]:
        """Open a name in workflows/, a path, or a graph as the canvas or the API has it.

        -> node types that the page does not know. Scripts that fail while it loads come with `complaints`.
        """
        if not isinstance(workflow, dict):
            path = ROOT / "workflows" / f"{workflow}.json" if isinstance(workflow, str) else workflow
            workflow = json.loads(Path(path).read_text(encoding="utf-8"))
        if "nodes" in workflow:
            kinds = {n["type"] for n in workflow["nodes"]}
            self.js("async w => { await app.loadGraphData(w, true, true, 'bench') }", workflow)
        else:
            kinds = {n["class_type"] for n in workflow.values()}
            # the page keeps the outputs of the graph before
            self.js("w => { app.loadApiJson(w, 'bench'); app.nodeOutputs = {} }", workflow)
        self.settle()
        return self.js("kinds => kinds.filter(k => !LiteGraph.registered_node_types[k])", sorted(kinds))

    def node(self, kind: str, nth: int = 0) -> int:
        """Id of the nth node of a type."""
        ids = self.js("k => app.graph.nodes.filter(n => n.type === k).map(n => n.id)", kind)
        assert len(ids) > nth, f"the graph holds {len(ids)} nodes {kind}"
        return ids[nth]

    def value(self, node: int, name: str):
        return self.js("([id, name]) => bench.widget(id, name).value", node, name)

    def set(self, node: int, name: str, value):
        """Set a widget as typing does: its value, then its callback."""
        self.js(
            "([id, name, v]) => { const w = bench.widget(id, name); w.value = v; "
            "w.callback?.(v, app.canvas, bench.node(id)); app.graph.setDirtyCanvas(true, true) }",
            node, name, value,
        )  # fmt: skip

    def undo(self, keys: str = "Control+z"):
        """One step back by the keyboard, or with Control+y forward; waits for the graph to be made anew."""
        tracker = "app.extensionManager.workflow.activeWorkflow.changeTracker"
        before = self.js(f"{tracker}.undoQueue.length")
        self.page.keyboard.press(keys)
        done = f"!{tracker}._restoringState && {tracker}.undoQueue.length !== {before}"
        self.page.wait_for_function(done, timeout=10000)
        self.settle()

    def show(self, node: int, scale: float = 1.0):
        """Bring a node to the middle of the page."""
        self.js(
            "([id, s]) => { app.canvas.ds.scale = s; app.canvas.centerOnNode(bench.node(id)); "
            "app.canvas.setDirty(true, true) }",
            node, scale,
        )  # fmt: skip
        self.settle()

    def rect(self, node: int) -> dict:
        """x, y, width, height of a node in the page, px, with its title."""
        return self.js("id => bench.rect(id)", node)

    def picture(self, name: str, node: int | None = None, margin: int = 16, scale: float = 1.0):
        """A screenshot of the page or of one node into FACE_RIG_PICTURES; nothing without that folder."""
        if not PICTURES:
            return
        Path(PICTURES).mkdir(parents=True, exist_ok=True)
        clip = None
        if node is not None:
            self.show(node, scale)
            r = self.rect(node)
            clip = {"x": max(r["x"] - margin, 0), "y": max(r["y"] - margin, 0)}
            clip |= {"width": r["width"] + 2 * margin, "height": r["height"] + 2 * margin}
        self.page.screenshot(path=str(Path(PICTURES) / name), clip=clip)

    def prompt(self) -> dict:
        """The graph as the API gets it: class_type and inputs by node id."""
        graph = self.js("async () => (await app.graphToPrompt()).output")
        return {k: {"class_type": n["class_type"], "inputs": n["inputs"]} for k, n in graph.items()}

    def save(self) -> dict:
        """The graph as the page saves it."""
        return self.js("JSON.parse(JSON.stringify(app.graph.serialize()))")

    def run(self, seconds: float = 150) -> dict:
        """Queue as the Run button does, wait: the ui outputs by node id. Raises RuntimeError on an error."""
        before = self.js("bench.runs.length")
        errors = self.js("async () => { await app.queuePrompt(0); return app.lastNodeErrors }")
        if errors:
            raise RuntimeError(f"not queued: {json.dumps(errors)[:2000]}")
        self.page.wait_for_function(f"bench.runs.length > {before}", timeout=seconds * 1000)
        self.settle()
        event, detail = self.js("bench.runs.at(-1)")
        if event != "execution_success":
            raise RuntimeError(f"{event}: {detail.get('node_type')}: {detail.get('exception_message')}")
        with urllib.request.urlopen(f"{self.url}/history/{detail['prompt_id']}") as answer:
            return json.load(answer)[detail["prompt_id"]]["outputs"]

    def setting(self, name: str, value):
        """Set one of ComfyUI's settings: Comfy.ColorPalette ("light", "dark"), Comfy.VueNodes.Enabled, .."""
        self.js("async ([k, v]) => { await app.extensionManager.setting.set(k, v) }", name, value)
        self.page.wait_for_timeout(300)

    def complaints(self) -> list:
        """Errors of ours since the last call: requests and scripts below our folder, addresses elsewhere."""
        ours = f"/extensions/{PACK}/"
        found = [f for f in self.failed if ours in f[1]] + [e for e in self.errors if ours in e[0] + e[1]]
        # the page looks for help in the user's language first, then takes the plain page
        found = [f for f in found if "/docs/" not in str(f)] + self.refused
        self.errors.clear(), self.failed.clear(), self.refused.clear()
        return found


@contextlib.contextmanager
def open_host(base: Path, *arguments: str, width: int = 1600, height: int = 1000, touch: bool = False):
    """Server and page; yields a Bench. base: an empty folder."""
    from playwright.sync_api import sync_playwright

    with serve(base, *arguments) as url, sync_playwright() as p:
        browser = p.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        try:
            context = browser.new_context(viewport={"width": width, "height": height}, has_touch=touch)
            context.grant_permissions(["clipboard-read", "clipboard-write"], origin=url)
            yield Bench(context.new_page(), url, base)
        finally:
            browser.close()


if __name__ == "__main__":
    workflow, kind, file = sys.argv[1:4]
    PICTURES = str(Path(file).resolve().parent)
    with tempfile.TemporaryDirectory() as folder, open_host(Path(folder)) as bench:
        bench.load(workflow)
        bench.picture(Path(file).name, bench.node(kind))
        print("\n".join(map(str, bench.complaints())) or "no complaints")
