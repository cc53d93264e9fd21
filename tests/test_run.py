"""run.py without a network: pip and venv are replaced by small stand-ins."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
POSIX = pytest.mark.skipif(os.name == "nt", reason="the stand-in interpreter is a shell script")


@pytest.fixture
def run(tmp_path):
    """A fresh copy of run.py's module with its folders below tmp_path."""
    spec = importlib.util.spec_from_file_location("run_under_test", ROOT / "run.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.ROOT = tmp_path
    module.VENV = tmp_path / ".venv"
    module.STAMP = module.VENV / "face-rig-pins.sha256"
    return module


def fake_venv(run, pip_exit: int = 0) -> Path:
    """A .venv whose python is this one, but `-m pip install` only writes its arguments down."""
    python = run.venv_python(run.VENV)
    python.parent.mkdir(parents=True)
    log = run.ROOT / "pip.log"
    python.write_text(
        f'#!/bin/sh\nif [ "$2 $3" = "pip install" ]; then echo "$@" >> "{log}"; exit {pip_exit}; fi\n'
        f'exec "{sys.executable}" "$@"\n'
    )
    python.chmod(0o755)
    return log


@POSIX
def test_installs_once_and_again_only_for_other_pins(run):
    log = fake_venv(run)
    run.install()
    run.install()
    assert len(log.read_text().splitlines()) == 1
    assert all(pin in log.read_text() for pin in run.PINS)
    run.PINS = (*run.PINS, "another==1.0")
    run.install()
    assert log.read_text().splitlines()[1].endswith("another==1.0")


@POSIX
def test_failed_installation_leaves_no_stamp_and_says_what_to_do(run, capsys):
    log = fake_venv(run, pip_exit=1)
    assert run.main(["test"]) == 1
    assert "run this command again" in capsys.readouterr().err
    assert not run.STAMP.exists()
    run.main(["test"])
    assert len(log.read_text().splitlines()) == 2  # tried anew


@POSIX
def test_interrupted_installation_is_repaired(run):
    log = fake_venv(run)
    run.STAMP.write_text("cut off")
    assert not run.is_ready()
    run.install()
    assert run.is_ready()
    assert len(log.read_text().splitlines()) == 1


@POSIX
def test_arguments_and_exit_code_are_passed_on(run, tmp_path):
    fake_venv(run)
    run.COMMANDS = {"test": ("-c", "import sys; print(sys.argv); sys.exit(len(sys.argv))")}
    assert run.main(["test", "-k", "foo"]) == 3


def test_broken_venv_is_made_anew(run, monkeypatch):
    made = []
    python = run.venv_python(run.VENV)
    python.parent.mkdir(parents=True)
    python.write_text("no interpreter")
    real = subprocess.run

    def recorded(command, **options):
        if "venv" in command:
            made.append(command)
            return subprocess.CompletedProcess(command, 0)
        return real(command, **options)

    monkeypatch.setattr(run.subprocess, "run", recorded)
    run.make_venv()
    assert made == [[sys.executable, "-m", "venv", "--clear", str(run.VENV)]]


def test_missing_venv_module_is_explained(run, monkeypatch, capsys):
    failed = subprocess.CompletedProcess([], 1)
    monkeypatch.setattr(run.subprocess, "run", lambda *a, **k: failed)
    assert run.main(["demo"]) == 1
    assert "python3-venv" in capsys.readouterr().err


def test_windows_layout(run, monkeypatch):
    posix = run.venv_python(Path("v")).as_posix()
    monkeypatch.setattr(run, "os", type("nt", (), {"name": "nt"}))
    assert {posix, run.venv_python(Path("v")).as_posix()} >= {"v/Scripts/python.exe"}


@pytest.mark.parametrize(("arguments", "code"), [(["--help"], 0), ([], 2), (["dance"], 2)])
def test_usage(run, arguments, code, capsys):
    assert run.main(arguments) == code
    out, err = capsys.readouterr()
    assert "python run.py demo" in (err if code else out)


@pytest.mark.parametrize("value", ["", "somewhere/else"])
def test_host_says_what_is_missing(run, monkeypatch, capsys, value):
    monkeypatch.setenv("COMFYUI_PATH", value)
    assert run.main(["host"]) == 1
    assert "COMFYUI_PATH" in capsys.readouterr().err


@POSIX
def test_host_starts_on_loopback_with_the_pack_linked(run, monkeypatch, tmp_path):
    comfy = tmp_path / "ComfyUI"
    (comfy / "comfy").mkdir(parents=True)
    (comfy / "main.py").write_text("import sys, json; json.dump(sys.argv[1:], open('seen.json', 'w'))")
    monkeypatch.setenv("COMFYUI_PATH", str(comfy))
    monkeypatch.setenv("COMFYUI_PYTHON", sys.executable)
    assert run.main(["host", "--quick-test-for-ci"]) == 0
    import json

    seen = json.loads((comfy / "seen.json").read_text())
    assert seen[seen.index("--listen") + 1] == "127.0.0.1"
    assert seen[-1] == "--quick-test-for-ci"
    base = Path(seen[seen.index("--base-directory") + 1])
    assert (base / "custom_nodes" / "face_rig").resolve() == tmp_path.resolve()


def test_pins_agree_with_the_project_and_the_host_owns_torch(run):
    """The packages that a node user installs are among the pins, and torch is not among what he installs."""
    pinned = {pin.split("==")[0] for pin in run.PINS}
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    wanted = {line.split(">=")[0] for line in lines if line and not line.startswith("#")}
    assert wanted <= pinned
    assert not wanted & {"torch", "torchvision", "torchaudio", "numpy", "opencv-python"}
    assert all("==" in pin for pin in run.PINS)
