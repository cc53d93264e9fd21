"""The pack as a guest: no network, nothing global changed, nothing forbidden, its floor, the archive."""

from __future__ import annotations

import ast
import os
import re
import shutil
import socket
import subprocess
import sys
import types
from pathlib import Path

import pytest
import tomllib
import torch
from PIL import Image

from tests import host_double, node_pack
from tests.global_state import unchanged
from tests.node_pack import ROOT, SIZE, Pack

pack, head, model, scene = node_pack.pack, node_pack.head, node_pack.model, node_pack.scene
OPTIONAL = "face_alignment pytorch3d kornia scipy matplotlib tqdm av tensorboard cv2"
ROOMS = ("nodes", "rig_core", "training")
SOURCES = [ROOT / "__init__.py"] + sorted(p for room in ROOMS for p in (ROOT / room).rglob("*.py"))
NETWORK = {"socket", "ssl", "http", "urllib", "urllib3", "requests", "httpx", "aiohttp", "ftplib", "smtplib"}
NETWORK |= {"telnetlib", "xmlrpc", "websocket", "websockets", "asyncio", "huggingface_hub", "gdown", "wget"}
STARTING = {"subprocess", "pty", "pip", "ensurepip", "commands", "runpy", "code", "codeop"}
UNSAFE = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "ctypes", "cffi"}


# ---------------------------------------------------------------------------------------------- the sources


def calls(tree: ast.AST):
    """(dotted name, call) of every call by name; "" before a dot for the method of an expression."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            name, at = "", node.func
            while isinstance(at, ast.Attribute):
                name, at = f".{at.attr}{name}", at.value
            yield (at.id if isinstance(at, ast.Name) else "") + name, node


def imported(tree: ast.AST):
    """First words of the modules that are imported, not the relative ones."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (a.name.split(".")[0] for a in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield node.module.split(".")[0]


def faults(source: str, room: str) -> list[str]:
    """What the registry or we forbid in a source of nodes, rig_core or training."""
    tree, found = ast.parse(source), []
    banned = STARTING | UNSAFE | NETWORK
    if room == "rig_core/download.py":
        banned -= {"urllib", "http"}
    if room.startswith("training/") and {n for n, _ in calls(tree) if "pickle." in n} == {"pickle.dumps"}:
        banned -= {"pickle"}  # nothing is executed by writing one, to measure it
    found += [f"imports {name}" for name in imported(tree) if name in banned]
    for name, call in calls(tree):
        if name in ("exec", "eval", "compile", "__import__", "input", "breakpoint"):
            found += [f"calls {name}"]
        if re.fullmatch(r"os\.(system|popen|exec\w*|spawn\w*|posix_spawn\w*|fork|putenv|startfile)", name):
            found += [f"calls {name}"]
        if name.endswith("import_module") and not isinstance(call.args[0], ast.Constant):
            found += [f"calls {name} with a name made at run time"]
        if name in ("torch.load", "torch.hub.load", "torch.hub.load_state_dict_from_url", "torch.jit.load"):
            found += [f"calls {name}"]
        if name in ("np.load", "numpy.load") and any(k.arg == "allow_pickle" for k in call.keywords):
            found += [f"calls {name} with allow_pickle"]
        if name == "print" and room.startswith(("nodes/", "rig_core/", "__init__")):
            found += ["prints"]
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_no_source_holds_what_a_pack_may_not(path):
    room, text = path.relative_to(ROOT).as_posix(), path.read_text(encoding="utf-8")
    found = faults(text, room)
    if "prints" in found:  # the command `python -m rig_core.checkpoints` may
        assert room == "rig_core/catalogue.py" and found == ["prints"]
        main = next(n for n in ast.parse(text).body if getattr(n, "name", "") == "main")
        assert [n for n, _ in calls(main)].count("print") == 1
        found = []
    assert not found


def test_the_check_of_sources_finds_them():
    bad = {
        "import subprocess": "imports subprocess",
        "from pickle import load": "imports pickle",
        "import urllib.request": "imports urllib",
        "def f():\n import requests": "imports requests",
        "eval(x)": "calls eval",
        "os.execv(a, b)": "calls os.execv",
        "importlib.import_module(name)": "calls importlib.import_module with a name made at run time",
        "torch.load(p, weights_only=True)": "calls torch.load",
        "np.load(p, allow_pickle=True)": "calls np.load with allow_pickle",
        "print(1)": "prints",
    }
    for source, want in bad.items():
        assert faults(source, "nodes/x.py") == [want], source
    good = (
        "import os\nmodel.eval()\nre.compile('a')\nimportlib.import_module('a')\nnp.load(p)\ntorch.compile(f)"
    )
    assert not faults(good, "nodes/x.py") and not faults("import urllib.request", "rig_core/download.py")


@pytest.mark.parametrize("path", sorted((ROOT / "web").rglob("*.js")), ids=lambda p: p.name)
def test_the_browser_loads_nothing_from_elsewhere_and_runs_no_text(path):
    text = path.read_text(encoding="utf-8")
    assert not re.findall(r"\beval\(|new Function|document\.write|setTimeout\(\s*[\"'`]", text)
    assert not re.findall(r"(?:fetch|import|from|src|WebSocket)[\s(=]*[\"'`](?:https?:|wss?:)?//", text)
    imports = re.findall(r"(?:from|import)\s*\(?\s*[\"'`]([^\"'`]+)", text)
    assert all(name.startswith((".", "/scripts/")) for name in imports), imports


# ---------------------------------------------------------------------------------------------- at work


def chain(pack, scene, file="tiny.safetensors") -> dict[str, torch.Tensor]:
    """A graph of both methods' nodes on a photo, two steps each; what came out by name."""
    photo, points = scene
    face_model, rig = pack.run("LoadFaceModel")[0], pack.run("LoadDiffusionRig", file=file)[0]
    image, crop, points = pack.run("AlignFace", photo=photo, size=SIZE, landmarks=points)[:3]
    code = pack.run("FitToLandmarks", face_model=face_model, image=image, landmarks=points)[0]
    lit = pack.run("SHLightEdit", face_model=face_model, face_code=code, azimuth=60.0)[0]
    turned = pack.run("EditFace", face_model=face_model, face_code=lit, yaw=5.0)[0]
    own, other = (pack.run("RenderBuffers", face_model=face_model, face_code=c)[0] for c in (code, turned))
    own, other = (
        pack.run("DiffusionRigCondition", model=rig, image=image, buffers=b)[0] for b in (own, other)
    )
    few = {"model": rig, "steps": 2, "preset": "custom"}
    noise, before = pack.run("DDIMInvert", conditioning=own, image=image, seed=1, **few)
    held = pack.run("ConditionedSample", conditioning=other, noise=noise, **few)[0]
    free, again, another = (
        pack.run("ConditionedSample", conditioning=other, seed=seed, **few)[0] for seed in (4, 4, 5)
    )
    result = pack.run("PasteBack", photo=photo, edited=held, crop=crop, before=before)[0]
    encoder, judge = pack.run("LoadIdentityEncoder")[0], pack.run("LoadShadowEstimator")[0]
    embed = pack.run("ArcFaceEmbed", identity_encoder=encoder, image=image)[0]
    shadow = pack.run("ShadowScalar", shadow_estimator=judge, image=image)[0]
    lights = pack.run("LightOrbit", face_model=face_model, face_code=code, frames=2)[0]
    return {
        "result": result, "noise": noise["samples"], "free": free, "again": again, "another": another,
        "embed": embed, "lights": lights, "shadow": torch.tensor(shadow), "shape": code.shape,
    }  # fmt: skip


@pytest.fixture(scope="module")
def first(pack, scene, model) -> dict[str, torch.Tensor]:
    return chain(pack, scene)


def assert_same_bits(a: dict, b: dict):
    for name, value in a.items():
        assert torch.equal(value, b[name]), name


@pytest.fixture
def no_network(monkeypatch):
    """Whatever asks for another machine fails; what was asked for."""
    asked = []

    def guard(owner, name, at):
        real = getattr(owner, name)

        def call(*args, **kwargs):
            where = args[at][0] if isinstance(args[at], tuple) else args[at]
            if where in ("127.0.0.1", "::1", "localhost", None):  # event loops talk to themselves
                return real(*args, **kwargs)
            asked.append((name, where))
            raise OSError(f"{name} {where}: there is no network here")

        monkeypatch.setattr(owner, name, call)

    for name in ("connect", "connect_ex", "bind"):
        guard(socket.socket, name, 1)
    for name in ("getaddrinfo", "gethostbyname", "create_connection"):
        guard(socket, name, 0)
    return asked


def test_no_network_and_nothing_global_from_import_to_result(no_network, scene, first, tmp_path):
    """Pack.run itself compares the state of the process around every node, in all tests of nodes."""
    torch.rand(7)  # whatever else has drawn in between
    (tmp_path / "host").mkdir()
    with pytest.MonkeyPatch.context() as monkeypatch:
        with unchanged("loading the pack"):
            fresh = Pack(monkeypatch, tmp_path / "host")
        save_tiny(fresh)
        astronaut = Image.open(ROOT / "rig_core" / "assets" / "astronaut.jpg").convert("RGB")
        photo = torch.frombuffer(bytearray(astronaut.tobytes()), dtype=torch.uint8) / 255
        fresh.run("AlignFace", photo=photo.view(1, astronaut.height, astronaut.width, 3))  # face finder
        with unchanged("a graph"):
            out = chain(fresh, scene)
    assert not no_network
    assert_same_bits(out, first)
    assert out["result"].shape == scene[0].shape and not torch.equal(out["result"], scene[0])
    with pytest.raises(OSError, match="no network here"):
        socket.create_connection(("192.0.2.1", 443))


def save_tiny(pack) -> None:
    """The fixture `model` of tests.node_pack, in another pack's folder."""
    rig = pack.core.denoisers.rig
    torch.manual_seed(0)
    net = rig.DiffusionRig(rig.RigConfig(SIZE, 32, (1, 1, 2), 1, (16,), latent_dim=16, encoder_width=8))
    torch.nn.init.normal_(net.denoisingUNet.out[2].weight, std=0.02)
    pack.core.checkpoints.save_denoiser(pack.host.folder / "models" / "face_rig" / "tiny.safetensors", net)


def test_the_same_seed_gives_the_same_bits_another_others(first):
    assert torch.equal(first["free"], first["again"])
    assert not torch.equal(first["free"], first["another"])


def test_loaders_say_before_the_run_which_file_is_missing(pack, model):
    loaders = [n for k, n in pack.nodes.items() if re.fullmatch("FaceRig_Load(?!Face$|Light$).*", k)]
    loaders = [n for n in loaders if "tiny.safetensors" in (n.define_schema().inputs[0].options or ())]
    assert len(loaders) >= 6
    folder = str(pack.host.folder / "models" / "face_rig")
    for node in loaders:
        assert node.validate_inputs() is True and node.validate_inputs(file="tiny.safetensors") is True
        said = node.validate_inputs(file="gone.pt")
        assert all(word in said for word in ("'file'", "'gone.pt'", folder, "press R", "or choose '")), said


def test_a_loader_notices_a_change_of_what_lies_beside_its_file(pack):
    folder = pack.host.folder / "models" / "face_rig"
    (folder / "last.ckpt").write_bytes(b"1")
    marks = []
    for place, contents in (
        ("last.ckpt", b"12"),
        ("shadow_cls_weight.pkl", b"1"),
        ("shadow_cls_weight.pkl", b"12"),
    ):
        (folder / place).write_bytes(contents)
        marks += [pack.nodes["FaceRig_LoadShadowEstimator"].fingerprint_inputs(file="last.ckpt")]
    assert len(set(marks)) == 3


def run_python(code: str, *arguments: str, cwd: Path = ROOT, **environment: str) -> str:
    """Output of a Python of its own."""
    out = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        capture_output=True, text=True, timeout=170, cwd=cwd, env=os.environ | environment, check=False,
    )  # fmt: skip
    assert not out.returncode, out.stderr[-2000:]
    return out.stdout


def test_every_node_registers_without_optional_libraries(tmp_path):
    code = """
import asyncio, pathlib, sys, time
for name in sys.argv[2].split():
    sys.modules[name] = None
import pytest, torch, numpy, PIL.Image
sys.path.insert(0, sys.argv[3])
import host_double
monkeypatch = pytest.MonkeyPatch()
host_double.install(monkeypatch, pathlib.Path(sys.argv[1]))
start = time.process_time()
root, extension = host_double.load_pack(monkeypatch)
nodes = host_double.nodes_by_id(asyncio.run(extension.get_node_list()))
seconds = time.process_time() - start
core = sys.modules[root.__name__ + ".rig_core"]
core.raster.rasterize(torch.rand(1, 3, 3), torch.tensor([[0, 1, 2]]), (8, 8))
try:
    landmarks = core.estimators.landmarks
    landmarks.face_alignment_landmarks(torch.rand(1, 3, 64, 64), torch.tensor([[0, 0, 64, 64.0]]), ".")
except ImportError as e:
    print(e)
print(len(nodes), len(sys.modules[root.__name__ + ".nodes"].NODES), seconds)
"""
    said, counts = run_python(code, str(tmp_path), OPTIONAL, str(ROOT / "tests")).splitlines()
    assert f"{sys.executable} -m pip install 'face_alignment>=1.5'" in said
    nodes, listed, seconds = counts.split()
    assert nodes == listed and int(nodes) >= 27 and float(seconds) < 1


# ---------------------------------------------------------------------------------------------- the floor


def on_host(folder: Path, version: str | None, api: tuple[str, ...] = ("io", "ui", "ComfyExtension")):
    """The pack's extension in the double as a host of that version with these parts of comfy_api.latest."""
    folder.mkdir()
    with pytest.MonkeyPatch.context() as monkeypatch:
        host_double.install(monkeypatch, folder)
        if version:
            module = types.ModuleType("comfyui_version")
            module.__version__ = version
            monkeypatch.setitem(sys.modules, "comfyui_version", module)
        if not api:
            monkeypatch.setitem(sys.modules, "comfy_api.latest", None)
            monkeypatch.delattr(sys.modules["comfy_api"], "latest")
        for name in {"io", "ui", "ComfyExtension"} - set(api) if api else ():
            monkeypatch.delattr(sys.modules["comfy_api.latest"], name)
        return host_double.load_pack(monkeypatch)[1]


@pytest.mark.parametrize(
    ("version", "api", "want"),
    [
        ("0.3.50", (), r"v0.3.50 \(.+\)"),
        ("0.3.63", ("io", "ui", "ComfyExtension"), r"v0.3.63 \(it is older\)"),
        (None, (), r"another or an unknown version \(.+\)"),
        ("0.3.70", ("ui",), r"v0.3.70 \(comfy_api.latest has no io, ComfyExtension\)"),
    ],
)
def test_a_host_that_will_not_do_is_told_in_one_line(tmp_path, version, api, want):
    with pytest.raises(ImportError) as e:
        on_host(tmp_path / "host", version, api)
    line = f"Face Rig needs ComfyUI v0.3.64 or newer, this is {want}: update ComfyUI and restart it"
    assert re.fullmatch(line, str(e.value)), e.value


@pytest.mark.parametrize("version", ["0.3.64", "0.3.100", "0.4.0", "1.0", "0.3.64-dev", None])
def test_the_floor_and_newer_are_welcome(tmp_path, version):
    assert type(on_host(tmp_path / "host", version)).__name__ == "FaceRig"


def test_the_floor_is_written_down_once_for_all():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    floor = re.search(r"^FLOOR = \((.*)\)$", (ROOT / "nodes/host/floor.py").read_text(encoding="utf-8"), re.M)
    numbers = ".".join(floor[1].split(", "))
    assert project["tool"]["comfy"]["requires-comfyui"] == f">={numbers}"
    assert f"v{numbers}" in (ROOT / "README.md").read_text(encoding="utf-8")


# ---------------------------------------------------------------------------------------------- the registry


def matches(path: str, rule: str) -> bool:
    """Whether a rule, as in .gitignore, takes a file: a folder's ends with /, a slash before that anchors."""
    pattern = re.escape(rule.strip("/")).replace(r"\*", "[^/]*")
    start = "" if "/" in rule.rstrip("/") else "(.*/)?"
    return re.fullmatch(f"{start}{pattern}{'/.*' if rule.endswith('/') else '(/.*)?'}", path) is not None


@pytest.fixture(scope="module")
def published() -> list[str]:
    """What the registry's archive holds: the repository's files without those of .comfyignore."""
    if not (ROOT / ".git").exists() or not shutil.which("git"):
        pytest.skip("the files of the archive are those of the git repository")
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    files = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    lines = (ROOT / ".comfyignore").read_text(encoding="utf-8").splitlines()
    rules = [line for line in lines if line and not line.startswith("#")]
    files = sorted(f for f in files if (ROOT / f).is_file())
    return [f for f in files if not any(matches(f, rule) for rule in rules)]


def test_rules_of_comfyignore():
    assert matches("tests/a/b.py", "/tests/") and not matches("rig_core/tests/a.py", "/tests/")
    assert matches("run.py", "/run.py") and not matches("training/run.py", "/run.py")
    assert matches("docs/a.png", "/docs/*.png") and not matches("web/docs/a.png", "/docs/*.png")
    assert matches("a/b.log", "*.log") and not matches("a/log.py", "*.log") and matches("a/docs/b", "docs/")


def test_what_is_published_is_small_and_whole(published):
    size = sum((ROOT / f).stat().st_size for f in published)
    assert size < 60e6
    tops = {f.split("/")[0] for f in published}
    assert tops <= {
        "__init__.py", "nodes", "rig_core", "training", "web", "workflows", "locales", "docs",
        "LICENSE", "NOTICE", "README.md", "CHANGELOG.md", "pyproject.toml", "requirements.txt",
    }  # fmt: skip
    assert {"__init__.py", "LICENSE", "NOTICE", "README.md", "pyproject.toml", "requirements.txt"} <= tops
    there = set(published)
    for folder in ("nodes", "rig_core", "training", "web", "workflows", "locales"):
        files = [p for p in (ROOT / folder).rglob("*") if p.is_file() and "__pycache__" not in p.parts]
        assert {p.relative_to(ROOT).as_posix() for p in files} <= there, folder
    assert {f"docs/{p.name}" for p in (ROOT / "docs").glob("*.md")} <= there
    forbidden = re.compile(r"\.(py[co]|so|dll|exe|whl|zip|pkl|pt|pth|ckpt)$")
    assert not [f for f in published if forbidden.search(f)]


def test_the_published_pack_works_by_itself(published, scene, first, tmp_path):
    folder = tmp_path / "face-rig"
    for file in published:
        if not file.startswith(("docs/", "workflows/", "web/")):
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / file, folder / file)
    (tmp_path / "host").mkdir()
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(host_double, "ROOT", folder)
        other = Pack(monkeypatch, tmp_path / "host")
        assert Path(other.core.__file__).is_relative_to(folder)
        save_tiny(other)
        assert_same_bits(chain(other, scene), first)
        assert other.run("LoadDiffusionRig")[1] == 128  # the embedded one is there
    code = """
import importlib, pathlib
names = sorted(p.stem for p in pathlib.Path("training").glob("*.py") if p.stem != "__init__")
for name in names:
    module = importlib.import_module("training." + name)
    assert pathlib.Path(module.__file__).parent.samefile("training")
import rig_core.checkpoints
print(len(names))
"""
    sources = [f for f in published if re.fullmatch(r"training/\w+\.py", f) and "__init__" not in f]
    assert int(run_python(code, cwd=folder, PYTHONPATH=str(folder))) == len(sources) > 20


def test_what_the_registry_reads():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    about, comfy = project["project"], project["tool"]["comfy"]
    assert re.fullmatch(r"[a-z][a-z0-9]*(-[a-z0-9]+)*", about["name"]) and "comfy" not in about["name"]
    assert re.fullmatch(r"\d+\.\d+\.\d+", about["version"]) and about["description"]
    assert about["license"] == {"file": "LICENSE"} and (ROOT / "LICENSE").is_file()
    systems = {c for c in about["classifiers"] if c.startswith("Operating System :: ")}
    assert systems == {"Operating System :: OS Independent"}
    devices = {c.removeprefix("Environment :: ") for c in about["classifiers"] if c.startswith("Environment")}
    known = {"GPU :: NVIDIA CUDA", "GPU :: AMD ROCm", "GPU :: Intel Arc", "GPU :: Apple Metal"}
    assert "GPU :: NVIDIA CUDA" in devices <= known
    assert comfy["PublisherId"] and comfy["DisplayName"] == "Face Rig" and "web" not in comfy
    home = about["urls"]["Repository"]
    assert home == about["urls"]["Homepage"] and home.startswith("https://github.com/")
    raw = home.replace("https://github.com/", "https://raw.githubusercontent.com/") + "/main/"
    for key, fits in (("Icon", lambda w, h: w == h <= 400), ("Banner", lambda w, h: w * 9 == h * 21)):
        assert comfy[key].startswith(raw), key
        with Image.open(ROOT / comfy[key].removeprefix(raw)) as picture:
            assert fits(*picture.size) and picture.format == "PNG", key
    host_lacks = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    assert about["dependencies"] == [line for line in host_lacks if not line.startswith("#")]
    assert not [d for d in about["dependencies"] if re.match("torch|numpy|opencv", d)]


def test_the_workflow_files():
    publish = (ROOT / ".github" / "workflows" / "publish.yml").read_text(encoding="utf-8")
    assert re.search(r"uses: Comfy-Org/publish-node-action@[0-9a-f]{40} ", publish)  # its secret is a key
    assert re.search(
        r"on:\n  workflow_dispatch:\n  push:\n    tags: \[\"v\*\"\]\n\w", publish
    )  # nothing else
    check = re.search(r'run: grep -qx "(.+)" pyproject.toml', publish)[1]
    assert check == 'version = \\"${GITHUB_REF_NAME#v}\\"'
    assert re.search(r'^version = "[\d.]+"$', (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.M)
    assert "personal_access_token: ${{ secrets.REGISTRY_ACCESS_TOKEN }}" in publish
    ci = (ROOT / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8")
    assert "[ubuntu-latest, windows-latest, macos-latest]" in ci and "bash .ci/run" in ci
