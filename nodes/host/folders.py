"""Files and folders as the host knows them: models/face_rig, albums below input/, new models, runs."""

from __future__ import annotations

import os
import re
from pathlib import Path

import folder_paths

from ...rig_core import album, download
from . import running

FOLDER = "face_rig"
EXTENSIONS = {".safetensors", ".pt", ".pth", ".tar", ".ckpt", ".pkl"}
DEFAULT = "default (in the pack)"
NO_ALBUM = "(put a folder of photos into input)"


def add_model_folder() -> None:
    """Make models/face_rig known; folders that extra_model_paths.yaml gives under that name stay."""
    folder_paths.add_model_folder_path(FOLDER, os.path.join(folder_paths.models_dir, FOLDER))
    paths, _ = folder_paths.folder_names_and_paths[FOLDER]
    folder_paths.folder_names_and_paths[FOLDER] = (paths, EXTENSIONS)


def model_names(first: str = DEFAULT) -> list[str]:
    """What a dropdown offers: the pack's own file (or what stands in its place), then models/face_rig."""
    return [first, *(n for n in folder_paths.get_filename_list(FOLDER) if n != first)]


def offered_names(name: str) -> list[str]:
    """`model_names` of a file in download.OFFERED; while it is not there, with an entry that fetches it."""
    names = model_names(name)
    return names if _there(name) else [name, fetch_entry(name), *names[1:]]


def fetch_entry(name: str) -> str:
    """The dropdown's entry that fetches a file of download.OFFERED."""
    offer = download.OFFERED[name]
    return f"download {name} ({offer.size / 1e6:.0f} MB, {offer.licence})"


def meant(choice: str) -> str:
    """The file of a dropdown's entry: of `fetch_entry` the file to fetch, else the entry itself."""
    return next((name for name in download.OFFERED if choice == fetch_entry(name)), choice)


def fetch_model(name: str) -> None:
    """Fetch a file of download.OFFERED into models/face_rig unless it is there, with the host's bar.

    Raises download.DownloadError, which names 'file', or the host's exception when the user pressed stop:
    next time it goes on.
    """
    if _there(name):
        return
    offer, path = download.OFFERED[name], Path(folder_paths.get_folder_paths(FOLDER)[0]) / name
    show = running.Progress(offer.size).bar.update_absolute
    try:
        there = download.fetch(
            offer.url, path, offer.sha256, offer.size, show, running.stop_pressed, offer.page
        )
    except download.DownloadError as e:
        raise download.DownloadError(f"'file': {e}") from e
    if not there:
        running.end_prompt()


def _there(name: str) -> bool:
    return folder_paths.get_full_path(FOLDER, name) is not None


def model_path(name: str, instead: str = f"choose '{DEFAULT}'", widget: str = "file") -> str | None:
    """The file of a dropdown's entry, None for the pack's own. Raises FileNotFoundError, for that widget."""
    if name == DEFAULT:
        return None
    path = folder_paths.get_full_path(FOLDER, name)
    if path is None:
        folder = folder_paths.get_folder_paths(FOLDER)[0]
        raise FileNotFoundError(
            f"'{widget}': there is no '{name}' in models/{FOLDER} ({folder}): put it there and press R, or "
            f"{instead}"
        )
    return path


def missing_model(name: str | None, *args: str) -> str | bool:
    """For validate_inputs: True, or why `model_path` would refuse; None is a name that a node will give."""
    try:
        if name is not None:
            model_path(name, *args)
    except FileNotFoundError as e:
        return str(e)
    return True


def model_fingerprint(name: str, beside=lambda folder: ()) -> str:
    """Changes when the file behind a dropdown's entry does, or one of beside(its folder).

    Of a file in download.OFFERED it is the same before and after it is fetched.
    """
    path = None if name == DEFAULT else folder_paths.get_full_path(FOLDER, name)
    offer = download.OFFERED.get(name)
    if offer and (path is None or os.path.getsize(path) == offer.size):
        return f"{name}:{offer.sha256}"
    if path is None:
        return name
    stats = [os.stat(p) for p in (path, *beside(os.path.dirname(path)))]
    return path + "".join(f":{s.st_mtime_ns}:{s.st_size}" for s in stats)


def model_folders() -> list[str]:
    """models/face_rig, and what extra_model_paths.yaml adds to it, as far as they exist."""
    return [d for d in folder_paths.get_folder_paths(FOLDER) if os.path.isdir(d)]


def models_fingerprint() -> str:
    """Changes when any file in these folders does."""
    found = [os.path.join(d, f) for top in model_folders() for d, _, files in os.walk(top) for f in files]
    known = [(f, os.stat(f)) for f in sorted(found) if os.path.exists(f)]
    return repr([(f, s.st_mtime_ns, s.st_size) for f, s in known])


def album_names() -> list[str]:
    """The folders below input/ that hold pictures, as a dropdown offers them."""
    root = folder_paths.get_input_directory()
    found = []
    for folder, inside, files in os.walk(root):
        inside[:] = sorted(d for d in inside if not d.startswith("."))
        name = os.path.relpath(folder, root).replace(os.sep, "/")
        if name != "." and any(os.path.splitext(f)[1].lower() in album.PHOTOS for f in files):
            found.append(name)
        if name.count("/") >= 2:
            inside.clear()
    return sorted(found) or [NO_ALBUM]


def album_path(name: str) -> Path:
    """The folder of a dropdown's entry. Raises ValueError for one that is not below input/."""
    root = Path(folder_paths.get_input_directory()).resolve()
    path = (root / name).resolve()
    if root not in path.parents or not path.is_dir():
        raise ValueError(
            f"'album': there is no folder '{name}' below {root}: put the photos of one person into a folder "
            "there and press R"
        )
    return path


def album_fingerprint(name: str) -> str:
    """Changes when a photo of the album does, or is added or taken away."""
    known = [(p.name, p.stat()) for p in album.paths(album_path(name))]
    return repr([(f, s.st_mtime_ns, s.st_size) for f, s in known])


def new_model_path(name: str) -> Path:
    """Where a new model of that name goes: models/face_rig. Raises ValueError for an odd name."""
    if not re.fullmatch(r"[\w-]+", name):
        raise ValueError(f"'name' is '{name}': letters, digits, - and _ only, it becomes a file's name")
    folder = Path(folder_paths.get_folder_paths(FOLDER)[0])
    folder.mkdir(parents=True, exist_ok=True)
    return folder / f"{name}.safetensors"


def run_path(name: str) -> Path:
    """Where the training of a model keeps its state: output/face_rig/NAME."""
    return Path(folder_paths.get_output_directory()) / FOLDER / name
