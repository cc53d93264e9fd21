"""Readable files as the host knows them: written into output/, read from input/ and output/face_rig."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
from pathlib import Path

import folder_paths

from .folders import FOLDER

NO_FILE = "(none: from text)"
OUTPUT = " [output]"  # as the host marks a file of its output folder
MOST = 2**25  # bytes: some 4,000 faces


def check_prefix(prefix: str) -> str:
    """A name for new files in output/, folders among it. Raises ValueError for what leads out of there."""
    parts = prefix.split("/")
    if not re.fullmatch(r"[\w% .-]+(/[\w% .-]+)*", prefix) or any(p.strip(". ") == "" for p in parts):
        raise ValueError(
            f"'filename_prefix' is '{prefix}': a name such as {FOLDER}/light, of letters, digits, spaces, "
            "_ . - and folders with /"
        )
    return prefix


def save_text(prefix: str, text: str, ending: str = ".json") -> str:
    """Write a new file into output/ under the host's counter, whole or not at all; its name below output/.

    Raises ValueError for an odd prefix, OSError when it cannot be written. No file is ever overwritten.
    """
    root = folder_paths.get_output_directory()
    folder, name, counter, inside, _ = folder_paths.get_save_image_path(check_prefix(prefix), root)
    temporary = Path(folder) / f".{name}.{os.getpid()}.tmp"
    try:
        with open(temporary, "w", encoding="utf-8", newline="\n") as f:
            f.write(text)
            f.flush()
            os.fsync(f.fileno())
        while True:
            path = Path(folder) / f"{name}_{counter:05}_{ending}"
            try:
                _give_name(temporary, path)
                break
            except FileExistsError:
                counter += 1
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
    return os.path.join(inside, path.name).replace(os.sep, "/")


def _give_name(temporary: Path, path: Path) -> None:
    """Move a file to a name in the same folder. Raises FileExistsError where there is one of that name."""
    try:
        os.link(temporary, path)
        return
    except FileExistsError:
        raise
    except OSError:  # a disk without hard links
        path.touch(exist_ok=False)  # the name is ours now
    try:
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            path.unlink()
        raise


def text_names() -> list[str]:
    """What a dropdown offers: the .json files below input/, those saved in output/face_rig, and NO_FILE."""
    root, found = folder_paths.get_input_directory(), []
    for folder, inside, files in os.walk(root):
        name = os.path.relpath(folder, root).replace(os.sep, "/")
        inside[:] = [d for d in inside if not d.startswith(".")] if name.count("/") < 2 else []
        found += [f if name == "." else f"{name}/{f}" for f in files if _holds_text(Path(folder) / f)]
    saved = Path(folder_paths.get_output_directory()) / FOLDER
    files = [f.name for f in saved.iterdir() if _holds_text(f)] if saved.is_dir() else []
    return [*sorted(found), *(f + OUTPUT for f in sorted(files)), NO_FILE]


def _holds_text(path: Path) -> bool:
    """Whether it is a .json file with something in it."""
    return path.suffix.lower() == ".json" and path.is_file() and path.stat().st_size > 0


def _text_path(name: str) -> Path:
    """The file of a dropdown's entry. Raises ValueError for one that is not there."""
    saved = name.endswith(OUTPUT)
    base = folder_paths.get_output_directory() if saved else folder_paths.get_input_directory()
    root = (Path(base) / FOLDER if saved else Path(base)).resolve()
    path = (root / name.removesuffix(OUTPUT)).resolve()
    if path.suffix.lower() != ".json" or root not in path.parents or not path.is_file():
        raise ValueError(
            f"'file': there is no '{name}': put a .json file below {root} and press R, or paste its contents "
            "into 'text'"
        )
    if path.stat().st_size > MOST:
        raise ValueError(f"'file': '{name}' is larger than {MOST >> 20} MB, that is another kind of file")
    return path


def read_text(name: str) -> str:
    """The contents of a dropdown's entry. Raises ValueError for one that is not there or is no text."""
    try:
        return _text_path(name).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as e:
        raise ValueError(f"'file': '{name}' is no text in UTF-8") from e


def check_text(text: str) -> str:
    """A text from the page. Raises ValueError for one that is too large for a light or faces."""
    if len(text) > MOST:
        raise ValueError(f"the text is larger than {MOST >> 20} MB, that is something else")
    return text


def text_fingerprint(name: str) -> str:
    """Changes when the contents of the file behind a dropdown's entry do."""
    try:
        return hashlib.sha256(_text_path(name).read_bytes()).hexdigest()
    except (ValueError, OSError):
        return name
