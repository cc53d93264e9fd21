"""Files of tensors, read without executing anything, written as a whole or not at all.

Our own are .safetensors with one JSON object under the metadata key "face_rig"; torch.save's files are read
through torch_file. What cannot be read raises CheckpointError in one line: which file, what was expected,
what was found, what to do. What the tensors are for is the business of checkpoints.
"""

from __future__ import annotations

import json
import os
import zipfile
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from . import torch_file
from .unpickle import Refused

ASSETS = Path(__file__).parent / "assets"
META = "face_rig"


class CheckpointError(ValueError):
    """A file that cannot be used; the message is one line for the user."""


def save(path: str | Path, tensors: dict[str, Tensor], meta: dict) -> None:
    """Write tensors and a JSON-able meta to a .safetensors file, as a whole or not at all."""
    path = Path(path)
    tensors = {k: v.detach().cpu().contiguous() for k, v in tensors.items()}
    text = {META: json.dumps(meta)}
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.touch()
        mode = temporary.stat().st_mode  # what the user's umask gives
        save_file(tensors, temporary, text)
        os.chmod(temporary, mode)
        with open(temporary, "rb+") as f:
            os.fsync(f.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    if os.name == "posix":  # the new name itself
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def read(path: str | Path, prefix: str = "") -> tuple[dict[str, Tensor], dict]:
    """Tensors by name, and the meta that `save` was given (plain metadata or {} for other files).

    prefix: of a PyTorch file that has such names, in a Lightning checkpoint's "state_dict" too, only those
    are read, which spares gigabytes. Of a file with a whole network in it, its weights are meant.
    The kind of file is told by its contents. Raises CheckpointError.
    """
    path = Path(path)
    try:
        with open(path, "rb") as f:
            start = f.read(16)
            size = os.fstat(f.fileno()).st_size
    except OSError as e:
        raise CheckpointError(f"{path}: cannot be read ({e.strerror}): check the name and the folder") from e
    if size == 0:
        raise CheckpointError(f"{path}: the file is empty: copy or download it again")
    if start.startswith((b"PK", torch_file.LEGACY)):
        return _read_torch(path, size, prefix), {}
    if start[8:9] == b"{":
        return _read_safetensors(path, size)
    raise CheckpointError(f"{path}: expected .safetensors or a PyTorch .pt archive, found {_what(start)}")


def _read_safetensors(path: Path, size: int) -> tuple[dict[str, Tensor], dict]:
    try:
        with safe_open(path, "pt") as f:
            metadata = f.metadata() or {}
            tensors = {k: f.get_tensor(k) for k in f.keys()}
    except (SafetensorError, OSError, KeyError, ValueError, AttributeError) as e:
        raise CheckpointError(
            f"{path}: a damaged or cut .safetensors of {size} bytes ({one_line(e)}): download it again"
        ) from e
    if META not in metadata:
        return tensors, metadata
    try:
        meta = json.loads(metadata[META])
    except (ValueError, RecursionError) as e:
        raise CheckpointError(
            f"{path}: its '{META}' metadata is no JSON ({one_line(e)}): download it again"
        ) from e
    if not isinstance(meta, dict):
        raise CheckpointError(f"{path}: its '{META}' metadata is no JSON object: download it again")
    return tensors, meta


def _read_torch(path: Path, size: int, prefix: str) -> dict[str, Tensor]:
    try:
        with open(path, "rb") as f:
            tree = torch_file.read(f, size, prefix)
    except Refused as e:
        raise CheckpointError(
            f"{path}: refused {e}: a checkpoint may hold only tensors, arrays and dictionaries; "
            f"nothing of the file was executed. Get it from its original source"
        ) from e
    except (
        ValueError,
        KeyError,
        NotImplementedError,  # zipfile's, for a compression that it does not know
        RuntimeError,
        OSError,
        zipfile.BadZipFile,
        EOFError,
    ) as e:
        raise CheckpointError(
            f"{path}: a damaged or cut PyTorch archive of {size} bytes ({one_line(e)}): download it again"
        ) from e
    if not isinstance(tree, dict) or not all(isinstance(v, Tensor) for v in tree.values()):
        found = ", ".join(map(str, list(tree)[:4])) if isinstance(tree, dict) else type(tree).__name__
        raise CheckpointError(f"{path}: expected a dictionary of tensors, found {found[:100]}: wrong file?")
    return {str(k): v for k, v in tree.items()}


def _what(start: bytes) -> str:
    """A file that is neither, from its first bytes, and what to do about it."""
    if start.startswith(b"version https://"):
        return "a Git LFS pointer: run git lfs pull"
    if start.lstrip()[:1] == b"<":
        return "a web page: download the file itself"
    if start[:2] in (b"\x80\x02", b"\x80\x03", b"\x80\x04"):
        return "a bare pickle, which is not read here: convert it, or choose another file"
    if start[:2] == b"\x1f\x8b":
        return "a gzip archive: unpack it first"
    return "something else: choose another file, or copy or download it again"


def one_line(error: Exception) -> str:
    """An error's text, fit for the end of another message."""
    return " ".join(str(error).split())[:200] or type(error).__name__
