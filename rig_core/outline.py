"""What a file holds, without the bytes of its tensors: format, names, shapes, and how much of it is missing.

Only the structure is read: the header of .safetensors and .npy, the pickle of torch.save's files (through the
restricted unpickler), the directory of archives. A cut file is described as far as it goes. What the contents
are for is the business of known_files and catalogue.
"""

from __future__ import annotations

import io
import json
import math
import re
import struct
import tarfile
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import islice
from typing import BinaryIO

import numpy as np
import torch
from torch import Tensor

from . import zip_file
from .arrays import Budget
from .files import META, is_pickle, one_line
from .numpy_file import HEADER, header
from .opcodes import Refused
from .torch_file import read_storage
from .unpickle import DAMAGE, Array, Record, Storage, View, load, weights

MAX_STRUCTURE = 64 * 2**20  # bytes of a pickle of torch.save
MAX_PLAIN = 512 * 2**20  # bytes of a pickle with its numbers in it
STREAM = b"\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # the number that torch.save began with before PyTorch 1.6
DEPTH = 4  # of dictionaries in dictionaries
TYPES = {
    **{"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16},
    **{"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8},
    **{"U8": torch.uint8, "BOOL": torch.bool},
}
FAULTS = (*DAMAGE, OSError, EOFError, SyntaxError, struct.error, tarfile.TarError)
"""What reading strange files brings about (Pillow calls a broken picture a SyntaxError)."""


@dataclass(frozen=True)
class Outline:
    """form: "safetensors", "torch", "pickle", "npy", "npz", "obj", "png", "zip", "tar", "gzip", "lfs",
    "page", "empty" or "other"; tree: names to tensors, other values or further such dictionaries, tensors
    without contents but where a pickle holds them itself; meta: what .safetensors say besides; members: name
    to size in an archive; lacking: bytes that are missing at the least; fault: what is wrong, in short."""

    form: str
    tree: dict = field(default_factory=dict)
    meta: dict = field(default_factory=dict)
    members: dict[str, int] = field(default_factory=dict)
    lacking: int = 0
    fault: str = ""


def outline(f: BinaryIO, size: int) -> Outline:
    """Describe an opened file of `size` bytes, of which f may hold only the beginning. Never raises."""
    start = f.read(512)
    f.seek(0)
    form, read = _form(start)
    try:
        return read(f, size) if read else Outline(form)
    except Refused as e:
        return Outline(form, fault=f"it holds {one_line(e)}, which no model needs; nothing was executed")
    except FAULTS as e:
        lacking = _lacking(f, size, str(e))
        return Outline(
            form, lacking=lacking, fault="it is cut" if lacking else f"it is damaged: {one_line(e)}"
        )


def _lacking(f: BinaryIO, size: int, error: str) -> int:
    """Bytes missing at the least when reading a pickle ended with that error; 0 when it is not cut."""
    claim = re.search(r"(?:string|frame) of (\d+) bytes is claimed|(\d+) bytes are claimed", error)
    if claim:
        return max(1, int(claim[1] or claim[2]) - (size - f.tell()))
    return int(bool(re.search(r"does not end|is cut|without quotes", error)))


def _form(start: bytes) -> tuple[str, Callable[[BinaryIO, int], Outline] | None]:
    """The format of a file that begins so, and its reader."""
    if not start:
        return "empty", None
    if start.startswith(b"version https://git-lfs"):
        return "lfs", _lfs
    if start.startswith(b"PK\x03\x04"):
        return "zip", _zip
    if start[:1] == b"\x80" and STREAM in start[:32]:
        return "torch", _stream
    if start.startswith(b"\x93NUMPY"):
        return "npy", _npy
    if start.startswith(b"\x89PNG\r\n"):
        return "png", _png
    if start.startswith(b"\x1f\x8b"):
        return "gzip", None
    if start[257:262] == b"ustar":
        return "tar", _tar
    if start.lstrip()[:1] == b"<":
        return "page", None
    if start[8:9] == b"{" and int.from_bytes(start[:8], "little") < 10**8:
        return "safetensors", _safetensors
    if re.match(rb"(#[^\n]*\n|mtllib|o |v )", start):
        return "obj", _obj
    return ("pickle", _pickle) if is_pickle(start) else ("other", None)


def _empty(shape, dtype: torch.dtype) -> Tensor:
    return torch.empty(tuple(shape), dtype=dtype, device="meta")


def _lfs(f: BinaryIO, size: int) -> Outline:
    wanted = re.search(rb"\nsize (\d+)", f.read(512))
    return Outline("lfs", lacking=int(wanted[1]) if wanted else 0)


def _safetensors(f: BinaryIO, size: int) -> Outline:
    n = int.from_bytes(f.read(8), "little")
    text = f.read(n)
    if len(text) < n:
        return Outline("safetensors", lacking=n - len(text), fault="it is cut in its header")
    header = json.loads(text)
    words = header.pop("__metadata__", {})
    tree, end = {}, 0
    for name, entry in header.items():
        dtype = TYPES.get(entry["dtype"], torch.uint8)
        tree[name] = _empty(entry["shape"], dtype)
        begin, stop = entry["data_offsets"]
        end = max(end, stop)
        if entry["dtype"] in TYPES and stop - begin != tree[name].nbytes:
            raise ValueError(f"'{name[:60]}' claims another size than its bytes have")
    meta = json.loads(words[META]) if META in words else words
    lacking = max(0, 8 + n + end - size)
    return Outline("safetensors", tree, dict(meta), lacking=lacking, fault="it is cut" if lacking else "")


# ---------------------------------------------------------------------------------------------- archives


def _zip(f: BinaryIO, size: int) -> Outline:
    """torch.save's archive, NumPy's, or any other. One without its directory, which ends it, is cut."""
    try:
        members = zip_file.members(f, size)
    except ValueError as e:
        if "directory is missing" in str(e):
            return _cut_zip(f, size)
        raise
    data = [m for n, m in members.items() if n.count("/") == 1 and n.endswith("/data.pkl") and not m.deflated]
    sizes = {n: m.size for n, m in members.items() if not n.endswith("/")}
    if data and data[0].size <= MAX_STRUCTURE:
        f.seek(data[0].start)
        tree, claimed = _structure(f, data[0].start + data[0].size, size)
        return _archive(tree, claimed, sizes, data[0].name.removesuffix("data.pkl"))
    if sizes and all(n.endswith(".npy") for n in sizes):
        heads = {n.removesuffix(".npy"): header(zip_file.pieces(f, members[n])) for n in sizes}
        return Outline("npz", {n: _array(shape, dtype) for n, (shape, dtype, *_) in heads.items()})
    return Outline("zip", members=sizes)


def first(f: BinaryIO, member: zip_file.Member, count: int = 1) -> io.BytesIO:
    """The first `count` pieces of a member."""
    return io.BytesIO(b"".join(islice(zip_file.pieces(f, member), count)))


def _cut_zip(f: BinaryIO, size: int) -> Outline:
    """As far as the first member tells: torch.save's is the structure."""
    f.seek(0)
    head = struct.unpack("<4s5H3I2H", f.read(30))
    packed, name_length, extra_length = head[7], head[9], head[10]
    name, extra = f.read(name_length).decode("utf-8", "replace"), f.read(extra_length)
    if packed == 2**32 - 1 and extra[:2] == b"\1\0":  # zip64: size, packed size
        packed = struct.unpack("<Q", extra[12:20])[0]
    at = f.tell()
    lacking = max(1, at + packed - size)
    if name.endswith("/data.pkl"):
        tree, claimed = _structure(f, size, size)
        lacking = max(1, at + sum(map(_bytes, claimed.values())) - size)
        return Outline("torch", tree, lacking=lacking, fault="it is cut")
    if name.endswith(".npy"):
        return Outline("npz", lacking=lacking, fault="it is cut")
    return Outline("zip", members={name: packed}, lacking=lacking, fault="it is cut")


def _archive(tree: dict, claimed: dict[str, Storage], sizes: dict[str, int], root: str) -> Outline:
    gone = {k: v for k, v in claimed.items() if sizes.get(f"{root}data/{k}") != _bytes(v)}
    fault = f"{len(gone)} of its {len(claimed)} storages are missing or cut" if gone else ""
    lost = sum(max(0, _bytes(v) - sizes.get(f"{root}data/{k}", 0)) for k, v in gone.items())
    return Outline("torch", tree, lacking=lost, fault=fault)


def _bytes(storage: Storage) -> int:
    return storage.count * storage.dtype.itemsize


def _tar(f: BinaryIO, size: int) -> Outline:
    with tarfile.open(fileobj=f) as t:
        members = {}
        for i in t:
            members |= {i.name: i.size} if i.isfile() else {}
            if len(members) >= 100:
                break
    return Outline("tar", members=members)


# ---------------------------------------------------------------------------------------------- pickles


def _structure(f: BinaryIO, end: int, size: int) -> tuple[dict, dict[str, Storage]]:
    """The tree of a pickle of torch.save where f stands, and the storages that it asks for."""
    claimed: dict[str, Storage] = {}

    def storage(key: str, dtype: torch.dtype, count: int) -> Storage:
        return claimed.setdefault(key, Storage(key, dtype, min(count, 2**48)))

    budget = Budget.of(size)
    tree = load(f, min(end, f.tell() + MAX_STRUCTURE), budget, storage, read_storage)
    return _plain(tree, budget), claimed


def _plain(tree, budget: Budget) -> dict:
    """As a dictionary; of a network pickled whole, beside its optimiser, the weights."""
    if isinstance(tree, dict) and isinstance(tree.get("model"), Record):
        tree = weights(tree["model"], budget)
    tree = _look(tree, 0)
    return tree if isinstance(tree, dict) else {"": tree}


def _look(value, depth: int):
    """Dictionaries and tensors out of what `load` gave; anything else stays what it is."""
    match value:
        case dict() if depth < DEPTH:
            return {str(k): _look(v, depth + 1) for k, v in value.items()}
        case View():
            return _empty(value.shape, value.storage.dtype)
        case Array():
            return value.value
        case Record("chumpy.ch.Ch"):
            return _look(value.state.get("x"), DEPTH)
    return value


def _stream(f: BinaryIO, size: int) -> Outline:
    """torch.save's older form: five pickles, then the storages, each after its count."""
    for _ in range(3):  # a magic number, version, machine
        load(f, size, Budget.of(size))
    tree, claimed = _structure(f, size, size)
    load(f, size, Budget.of(size))
    lacking = max(0, f.tell() + sum(8 + _bytes(v) for v in claimed.values()) - size)
    return Outline("torch", tree, lacking=lacking, fault="it is cut" if lacking else "")


def _pickle(f: BinaryIO, size: int) -> Outline:
    if size > MAX_PLAIN:
        return Outline("pickle", fault=f"a pickle of {size} bytes is not looked into")
    budget = Budget.of(size)
    return Outline("pickle", _plain(load(f, size, budget, None, read_storage), budget))


# ---------------------------------------------------------------------------------------------- the others


def _npy(f: BinaryIO, size: int) -> Outline:
    shape, dtype, _, at, _ = header(iter([f.read(HEADER)]))
    if dtype.hasobject:  # a pickle
        f.seek(at)
        tree = _pickle(f, size).tree
        inner = tree.get("")
        while isinstance(inner, list) and len(inner) == 1:
            inner = inner[0]
        return Outline("npy", _look(inner, 0) if isinstance(inner, dict) else tree)
    lacking = max(0, at + math.prod(shape) * dtype.itemsize - size)
    return Outline("npy", {"": _array(shape, dtype)}, lacking=lacking, fault="it is cut" if lacking else "")


def _array(shape: tuple, dtype: np.dtype) -> Tensor:
    """A tensor of that shape; of bytes where torch has no such type."""
    try:
        return _empty(shape, torch.from_numpy(np.empty(0, dtype.newbyteorder("="))).dtype)
    except TypeError:
        return _empty(shape, torch.uint8)


def _obj(f: BinaryIO, size: int) -> Outline:
    """A mesh: v, vt and f, one row each."""
    counts = {"v": 0, "vt": 0, "f": 0}
    for line in f.read(16 * 2**20).splitlines():
        key = line.partition(b" ")[0].decode("ascii", "replace")
        if key in counts:
            counts[key] += 1
    if not counts["v"]:
        return Outline("other")
    sides = {"v": 3, "vt": 2, "f": 3}
    return Outline("obj", {k: _empty((n, sides[k]), torch.float32) for k, n in counts.items()})


def _png(f: BinaryIO, size: int) -> Outline:
    """A picture: of a small one the brightness [H,W] 0..255, of others the size alone."""
    width, height = struct.unpack(">2I", f.read(24)[16:])
    f.seek(max(0, size - 8))
    if f.read(4) != b"IEND":
        return Outline("png", lacking=1, fault="it is cut")
    if max(width, height) > 1024:
        return Outline("png", {"pixels": _empty((height, width), torch.uint8)})
    from PIL import Image

    f.seek(0)
    with Image.open(f) as picture:
        return Outline("png", {"pixels": torch.from_numpy(np.array(picture.convert("L")))})
