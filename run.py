"""One command from a fresh clone: makes .venv beside this file, installs pinned packages, runs the job.

    python run.py demo  [--out DIR]       relight, turn and smile two photographs; writes a contact sheet
    python run.py test  [pytest options]  the whole test suite
    python run.py bench [--out FILE]      times of every part, with ratios to plain references
    python run.py host  [--test]          start ComfyUI (COMFYUI_PATH) with this pack, or run the host tests

Only the standard library is used here. Anything after the command's name is passed on.
"""

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent
VENV = ROOT / ".venv"
STAMP = VENV / "face-rig-pins.sha256"
PINS = (
    "torch==2.13.0",
    "numpy==2.4.6",
    "scipy==1.17.1",
    "safetensors==0.8.0",
    "pillow==13.0.0",
    "tqdm==4.70.1",
    "kornia==0.9.0",
    "matplotlib==3.11.2",
    "pytest==9.2.0",
    "hypothesis==6.170.15",
    "ruff==0.17.5",
)
COMMANDS = {
    "demo": ("-m", "training.demo"),
    "test": ("-m", "pytest"),
    "bench": ("-m", "training.bench"),
}
HOST_ADDRESS = ("127.0.0.1", "8188")


class SetupError(RuntimeError):
    """The environment could not be made; the text says what to do."""


def venv_python(venv: Path) -> Path:
    """Interpreter inside a virtual environment on this system."""
    return venv / "Scripts" / "python.exe" if os.name == "nt" else venv / "bin" / "python"


def pins_hash() -> str:
    """Identity of what must be installed: the pins and the Python that they are installed for."""
    version = ".".join(map(str, sys.version_info[:2]))
    return hashlib.sha256("\n".join((version, *PINS)).encode()).hexdigest()


def is_ready() -> bool:
    """True if the last installation finished and was for these pins."""
    return venv_python(VENV).exists() and STAMP.exists() and STAMP.read_text().strip() == pins_hash()


def works(python: Path, *arguments: str) -> bool:
    """True if `python ARGUMENTS` can be started and exits with 0."""
    try:
        return subprocess.run([str(python), *arguments], capture_output=True, check=False).returncode == 0
    except OSError:
        return False


def make_venv() -> None:
    """Create .venv, or make it anew if its interpreter does not start or is of another Python version."""
    same = f"import sys; sys.exit(sys.version_info[:2] != {tuple(sys.version_info[:2])})"
    if works(venv_python(VENV), "-c", same):
        return
    print(f"Making {VENV}", flush=True)
    # Without --clear a half-made or moved environment would be kept as it is.
    done = subprocess.run([sys.executable, "-m", "venv", "--clear", str(VENV)], check=False)
    if done.returncode:
        raise SetupError(
            f"python -m venv failed (exit code {done.returncode}). On Debian and Ubuntu install "
            "python3-venv; elsewhere use a Python from python.org. Then run this command again."
        )


def install() -> None:
    """Install the pins if they changed. The stamp is written last: the next run repairs a broken one."""
    if is_ready():
        return
    if sys.version_info < (3, 11):
        raise SetupError(f"Python 3.11 or newer is needed, this is {sys.version.split()[0]}.")
    make_venv()
    python = venv_python(VENV)
    STAMP.unlink(missing_ok=True)
    if not works(python, "-m", "pip", "--version") and not works(python, "-m", "ensurepip"):
        raise SetupError(f"There is no pip in {VENV}. Delete that folder and run this command again.")
    print("Installing " + ", ".join(PINS), flush=True)
    command = [str(python), "-m", "pip", "install", "--disable-pip-version-check", "--quiet", *PINS]
    done = subprocess.run(command, check=False)
    if done.returncode:
        raise SetupError(
            f"pip could not install the packages (exit code {done.returncode}; its message is above). "
            "Look at the network connection and the free disk space (about 6 GB with CUDA), then run this "
            "command again: it goes on where it stopped."
        )
    part = STAMP.with_suffix(".part")
    part.write_text(pins_hash())
    part.replace(STAMP)


def host_folder() -> Path:
    """The ComfyUI checkout named by COMFYUI_PATH."""
    value = os.environ.get("COMFYUI_PATH", "")
    if not value:
        raise SetupError(
            "COMFYUI_PATH is not set. Set it to a ComfyUI folder (v0.3.64 or newer, with its requirements "
            "installed), for example:  COMFYUI_PATH=~/ComfyUI python run.py host"
        )
    folder = Path(value).expanduser().resolve()
    if not (folder / "main.py").is_file() or not (folder / "comfy").is_dir():
        raise SetupError(f"COMFYUI_PATH={value} is not a ComfyUI folder: main.py and comfy/ are not there.")
    return folder


def host_python(folder: Path) -> Path:
    """ComfyUI's own interpreter: COMFYUI_PYTHON, its virtual environment, or the portable build's."""
    if os.environ.get("COMFYUI_PYTHON"):
        return Path(os.environ["COMFYUI_PYTHON"]).expanduser()
    places = [venv_python(folder / ".venv"), venv_python(folder / "venv")]
    places.append(folder.parent / "python_embeded" / "python.exe")
    for place in places:
        if place.exists():
            return place
    raise SetupError(
        f"No Python for ComfyUI below {folder} (looked for .venv, venv and python_embeded). "
        "Set COMFYUI_PYTHON to the interpreter that ComfyUI runs with."
    )


def link_pack(base: Path) -> None:
    """Put this pack into BASE/custom_nodes as face_rig: a link, on Windows a junction (needs no rights)."""
    link = base / "custom_nodes" / "face_rig"
    link.parent.mkdir(parents=True, exist_ok=True)
    if link.exists() and link.resolve() == ROOT:
        return
    if link.is_symlink():
        link.unlink()
    if link.exists():
        raise SetupError(f"{link} is in the way: it is not a link to {ROOT}. Move it and try again.")
    if os.name == "nt":
        subprocess.run(["cmd", "/c", "mklink", "/J", str(link), str(ROOT)], check=True)
    else:
        link.symlink_to(ROOT, target_is_directory=True)


def host(arguments: list[str]) -> int:
    """Start ComfyUI on this machine only, its base folder under out/host; or run the host tests."""
    folder = host_folder()
    python = host_python(folder)
    if arguments[:1] == ["--test"]:
        if not works(python, "-c", "import pytest"):
            raise SetupError(f"The host tests need pytest there:  {python} -m pip install pytest")
        return run(python, "-m", "pytest", "tests/test_host.py", *arguments[1:])
    base = ROOT / "out" / "host"
    for name in ("models", "input", "output", "temp", "user"):
        (base / name).mkdir(parents=True, exist_ok=True)
    link_pack(base)
    address, port = HOST_ADDRESS
    print(f"ComfyUI: http://{address}:{port}  (base folder {base}; Ctrl+C stops it)", flush=True)
    options = ["--listen", address, "--port", port, "--disable-auto-launch", "--base-directory", str(base)]
    options += ["--database-url", f"sqlite:///{(base / 'user' / 'comfyui.db').as_posix()}"]
    if not works(python, "-c", "import sys, torch; sys.exit(not torch.cuda.is_available())"):
        if sys.platform != "darwin":  # Apple's GPU needs no option, and --cpu would switch it off
            options.append("--cpu")
    return run(python, str(folder / "main.py"), *options, *arguments, cwd=folder)


def run(python: Path, *arguments: str, cwd: Path = ROOT) -> int:
    """Run `python ARGUMENTS` in the foreground; its exit code. Ctrl+C is the child's to handle."""
    with subprocess.Popen([str(python), *arguments], cwd=cwd) as child:
        while True:
            try:
                return child.wait()
            except KeyboardInterrupt:
                continue


def main(arguments: list[str]) -> int:
    """Dispatch; 2 for a wrong command, 1 if the environment could not be made, else the job's exit code."""
    command, rest = (arguments[0] if arguments else ""), arguments[1:]
    if command not in COMMANDS and command != "host":
        print(__doc__, file=sys.stdout if command in ("-h", "--help", "help") else sys.stderr)
        return 0 if command in ("-h", "--help", "help") else 2
    try:
        if command == "host":
            return host(rest)
        if shutil.disk_usage(ROOT).free < 2**28:
            raise SetupError(f"The disk of {ROOT} has less than 256 MB left.")
        install()
    except SetupError as error:
        print(f"run.py: {error}", file=sys.stderr)
        return 1
    return run(venv_python(VENV), *COMMANDS[command], *rest)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
