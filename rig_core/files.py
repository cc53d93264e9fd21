"""Files of tensors, read without executing anything, written as a whole or not at all.

Our own are .safetensors with one JSON object under the metadata key "face_rig", or as the bytes of a tensor
of that name; torch.save's files are read through torch_file. What cannot be read raises CheckpointError in
one line: which file, what was expected, what was found, what to do. What the tensors are for is the business
of checkpoints.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from . import numpy_file, torch_file, zip_file
from .arrays import Budget
from .opcodes import Refused

ASSETS = Path(__file__).parent / "assets"
META = "face_rig"
HEADER = 2**21  # bytes of a .safetensors header; one tensor takes some hundred


class CheckpointError(ValueError):
    """A file that cannot be used; the message is one line for the user."""


def save(path: str | Path, tensors: dict[str, Tensor], meta: dict) -> None:
    """Write tensors and a JSON-able meta to a .safetensors file, as a whole or not at all.

    Raises CheckpointError when there is no room, or no right to write.
    """
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
    except (OSError, SafetensorError) as e:
        raise unwritable(path, e, sum(v.nbytes for v in tensors.values())) from e
    finally:
        with contextlib.suppress(OSError):  # say what went wrong first, not what follows from it
            temporary.unlink(missing_ok=True)
    if os.name == "posix":  # the new name itself
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def unwritable(path: Path, error: Exception, needed: int = 0) -> CheckpointError:
    """The error for a file of `needed` bytes that could not be written: what is free, and what to do."""
    folder = next((p for p in path.absolute().parents if p.is_dir()), Path("/"))
    why = getattr(error, "strerror", None) or one_line(error)
    room = f"{shutil.disk_usage(folder).free / 1e6:.0f} MB are free in {folder}"
    room = f"it takes {needed / 1e6:.0f} MB, {room}" if needed else room
    return CheckpointError(
        f"{path}: cannot be written ({why}; {room}): make room or choose another folder. "
        "What was there before is untouched"
    )


def read(path: str | Path, prefix: str = "") -> tuple[dict[str, Tensor], dict]:
    """Tensors by name, and the meta that `save` was given (plain metadata or {} for other files).

    prefix: of a PyTorch file that has such names, in a Lightning checkpoint's "state_dict" too, only those
    are read, which spares gigabytes. Of a file with a whole network in it, its weights are meant.
    The kind of file is told by its contents. Raises CheckpointError.
    """
    path = Path(path)
    size, start = _start(path)
    if start.startswith((b"PK", torch_file.LEGACY)):
        tree = _opened(path, size, "PyTorch archive", lambda f: torch_file.read(f, size, prefix))
        if not isinstance(tree, dict) or not all(isinstance(v, Tensor) for v in tree.values()):
            found = ", ".join(map(str, list(tree)[:4])) if isinstance(tree, dict) else type(tree).__name__
            raise CheckpointError(
                f"{path}: expected a dictionary of tensors, found {printable(found[:100])}: wrong file?"
            )
        return {str(k): v for k, v in tree.items()}, {}
    if start[8:9] == b"{":
        return _read_safetensors(path, size)
    raise CheckpointError(f"{path}: expected .safetensors or a PyTorch .pt archive, found {_what(start)}")


def read_tree(path: str | Path) -> object:
    """The plain data of a file: dict, list, str, bytes, numbers, Tensor, and Sparse for scipy's matrices.

    Of a pickle (Python 2's too), .npy, .npz, what torch.save wrote, or .safetensors, told by the contents.
    Arrays of numbers become tensors of their type (unsigned ones of 2 to 8 bytes become int32 or int64),
    arrays of objects nested lists, one without axes the object in it, tuples lists, chumpy's arrays tensors.
    Raises CheckpointError.
    """
    path = Path(path)
    size, start = _start(path)
    if start.startswith((b"PK", torch_file.LEGACY)):
        return _opened(path, size, "archive", lambda f: _archive(f, size))
    if start.startswith(numpy_file.MAGIC):
        return _opened(path, size, "NumPy array", lambda f: numpy_file.read(f, size))
    if start[8:9] == b"{":
        return _read_safetensors(path, size)[0]
    if is_pickle(start):
        return _opened(path, size, "pickle", lambda f: torch_file.read_pickle(f, size, Budget.of(size)))
    raise CheckpointError(f"{path}: expected a pickle, an array or a file of tensors, found {_what(start)}")


def _start(path: Path) -> tuple[int, bytes]:
    """Size and first bytes of a file."""
    try:
        with open(path, "rb") as f:
            start = f.read(512)
            size = os.fstat(f.fileno()).st_size
    except OSError as e:
        raise CheckpointError(f"{path}: cannot be read ({e.strerror}): check the name and the folder") from e
    if size == 0:
        raise CheckpointError(f"{path}: the file is empty: copy or download it again")
    return size, start


def _opened(path: Path, size: int, what: str, call: Callable[[BinaryIO], object]) -> object:
    """What call makes of the opened file; its errors in one line."""
    try:
        with open(path, "rb") as f:
            return call(f)
    except Refused as e:
        raise CheckpointError(
            f"{path}: refused {one_line(e)}: a checkpoint may hold only tensors, arrays and dictionaries; "
            f"nothing of the file was executed. Get it from its original source"
        ) from e
    except (ValueError, RuntimeError, OSError, MemoryError, OverflowError) as e:
        raise CheckpointError(
            f"{path}: a damaged or cut {what} of {size} bytes ({one_line(e)}): download it again"
        ) from e


def _archive(f: BinaryIO, size: int) -> object:
    """The tree of what numpy.savez or torch.save wrote."""
    if f.read(2) == b"PK":
        members = zip_file.members(f, size)
        if any(n.endswith(".npy") for n in members):
            return numpy_file.read_archive(f, members, size)
    f.seek(0)
    return torch_file.read(f, size)


def _read_safetensors(path: Path, size: int) -> tuple[dict[str, Tensor], dict]:
    with open(path, "rb") as f:
        header = int.from_bytes(f.read(8), "little")
    if header > min(HEADER, size - 8):
        raise CheckpointError(
            f"{path}: a damaged or cut .safetensors of {size} bytes (a header of {header}): download it again"
        )
    try:
        with safe_open(path, "pt") as f:
            metadata = f.metadata() or {}
            tensors = {k: f.get_tensor(k) for k in f.keys()}
            if META in tensors:  # of a writer that lets us add tensors alone
                metadata[META] = _text(tensors.pop(META))
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


def _text(x: Tensor) -> str:
    """The text whose bytes x holds. Raises ValueError."""
    if x.dtype != torch.uint8 or x.ndim != 1 or len(x) > HEADER:
        raise ValueError(f"'{META}' is {list(x.shape)} of {x.dtype}, not the bytes of a text")
    return bytes(x.tolist()).decode()


def is_pickle(start: bytes) -> bool:
    """Whether a file begins as a pickle: with its protocol, or with a container of protocols 0 and 1."""
    return (
        start[:1] == b"\x80"
        and start[1:2] <= b"\x05"
        or start[:1] in b"(]}"
        or bool(re.match(rb"c\w[\w.]*\n", start))
    )


def _what(start: bytes) -> str:
    """A file that is neither, from its first bytes, and what to do about it."""
    if start.startswith(b"version https://"):
        return "a Git LFS pointer: run git lfs pull"
    if start.lstrip()[:1] == b"<":
        return "a web page: download the file itself"
    if is_pickle(start):
        return "a bare pickle, which is not read here: convert it, or choose another file"
    if start.startswith((b"PK", numpy_file.MAGIC)):
        return "arrays of NumPy: choose another file"
    if start[257:262] == b"ustar":
        return "a tar archive, as of PyTorch before 0.1.10: save it again with a newer one, or unpack it"
    if start[:2] == b"\x1f\x8b":
        return "a gzip archive: unpack it first"
    return "something else: choose another file, or copy or download it again"


def one_line(error: Exception) -> str:
    """An error's text, fit for the end of another message."""
    return printable(" ".join(str(error).split())[:200]) or type(error).__name__


def printable(text: str) -> str:
    """Text of a file without what a terminal would obey."""
    return "".join(c if c.isprintable() else "?" for c in text)
