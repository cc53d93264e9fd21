"""Files for the page in the host's temp folder, which it empties at every start."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import folder_paths

from .folders import FOLDER


def temporary(data: bytes, ending: str) -> dict[str, str]:
    """Keep data for the page, named after its contents: what /view asks for, as in the host's own previews.

    For what is too large for the prompt's history, which the page fetches after every run.
    """
    folder = Path(folder_paths.get_temp_directory())
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{FOLDER}_{hashlib.sha256(data).hexdigest()[:16]}{ending}"
    if not path.is_file():
        part = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        part.write_bytes(data)
        os.replace(part, path)
    return {"filename": path.name, "subfolder": "", "type": "temp"}
