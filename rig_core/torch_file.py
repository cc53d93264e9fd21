"""What torch.save writes, read without executing anything: the zip archive, and the older stream.

The structure comes first, through the restricted unpickler, with storages that only claim their size; then
the bytes of those tensors that are wanted. Damage is a ValueError. Tensors in bare pickles, each with a
stream of its own, are read here too.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import BinaryIO

import torch
from torch import Tensor

from . import zip_file
from .arrays import Budget
from .opcodes import CHUNK
from .unpickle import Record, Storage, load, plain, weights

LEGACY = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # what torch.save began with before PyTorch 1.6


def read(f: BinaryIO, size: int, prefix: str = "") -> object:
    """The tree of an opened file of `size` bytes; of its tensors those below prefix, if any."""
    start = f.read(len(LEGACY))
    return _read_stream(f, size, prefix) if start == LEGACY else _read_archive(f, size, prefix)


def _read_archive(f: BinaryIO, size: int, prefix: str) -> object:
    """A zip archive: data.pkl (the structure) and data/<key> (one member a storage)."""
    members = zip_file.members(f, size)
    pickles = [n for n in members if n.count("/") == 1 and n.endswith("/data.pkl")]
    if len(pickles) != 1:
        raise ValueError("it holds no data.pkl")
    if any(m.deflated for m in members.values()):
        raise ValueError("its members are compressed, which torch.save never does")
    structure, root = members[pickles[0]], pickles[0].removesuffix("data.pkl")
    order = members.get(f"{root}byteorder")
    if order and (order.size > 20 or b"".join(zip_file.pieces(f, order)).strip() != b"little"):
        raise ValueError("it was written on a big-endian machine")
    deque(zip_file.pieces(f, structure), 0)  # for the checksum
    budget, claimed = Budget.of(size), {}
    f.seek(structure.start)
    tree = load(f, structure.start + structure.size, budget, _claims(claimed), read_storage)
    for key, v in claimed.items():
        m = members.get(f"{root}data/{key}")
        if not m:
            raise ValueError(f"storage {key[:20]} is missing")
        if m.size != v.count * v.dtype.itemsize:
            raise ValueError(f"storage {key[:20]} claims {v.count} x {v.dtype}, has {m.size} bytes")

    def fill(storage: Storage) -> Tensor:
        budget.spend(bytes=storage.count * storage.dtype.itemsize)
        return _filled(storage, zip_file.pieces(f, members[f"{root}data/{storage.key}"]))

    return plain(_wanted(tree, prefix, budget), budget, fill)


def _read_stream(f: BinaryIO, size: int, prefix: str) -> object:
    budget = Budget.of(size)
    tree, fill = _stream(f, size, budget, read_storage)
    return plain(_wanted(tree, prefix, budget), budget, fill)


def read_storage(f: BinaryIO, size: int, budget: Budget) -> Storage:
    """The storage in an older stream: how a pickled tensor holds its bytes."""
    tree, fill = _stream(f, size, budget, None)
    if not isinstance(tree, Storage):
        raise ValueError("a tensor without its storage")
    fill(tree)
    return tree


def read_pickle(f: BinaryIO, end: int, budget: Budget) -> object:
    """The object of a bare pickle where f stands; tensors in it have streams of their own."""
    return plain(load(f, end, budget, None, read_storage), budget)


def _stream(f: BinaryIO, size: int, budget: Budget, inner: Callable | None) -> tuple[object, Callable]:
    """The structure of an older stream, and what fills a storage of it.

    After a magic number: version, machine, structure and list of storages as pickles, then each storage as
    its count and its bytes.
    """
    f.seek(0)
    if f.read(len(LEGACY)) != LEGACY:
        raise ValueError("a stream without its beginning")
    claimed: dict[str, Storage] = {}
    version, machine = load(f, size, budget), load(f, size, budget)
    if version != 1001 or not isinstance(machine, dict) or machine.get("little_endian") is not True:
        raise ValueError("it is of another version, or was written on a big-endian machine")
    tree, keys = load(f, size, budget, _claims(claimed), inner), load(f, size, budget)
    if not isinstance(keys, list) or sorted(map(_text, keys)) != sorted(claimed):
        raise ValueError("its list of storages is not that of its structure")
    starts = {}
    for key in keys:
        v, count = claimed[key], int.from_bytes(f.read(8), "little")
        starts[key] = f.tell()
        end = starts[key] + v.count * v.dtype.itemsize
        if count != v.count or end > size:
            raise ValueError(f"storage {key[:20]} claims {v.count} x {v.dtype}, has {count} or is cut")
        f.seek(end)

    def fill(storage: Storage) -> Tensor:
        n = storage.count * storage.dtype.itemsize
        budget.spend(bytes=n)
        f.seek(starts[storage.key])
        return _filled(storage, (f.read(min(CHUNK, n - i)) for i in range(0, n, CHUNK)))

    return tree, fill


def _text(value) -> str:
    if not isinstance(value, str):
        raise ValueError("its list of storages is not made of names")
    return value


def _claims(claimed: dict[str, Storage]) -> Callable[[str, torch.dtype, int], Storage]:
    """For `load`: storages without their bytes, gathered in `claimed`."""

    def storage(key: str, dtype: torch.dtype, count: int) -> Storage:
        if not 0 <= count < 2**48:
            raise ValueError(f"storage {key[:20]} claims {count} x {dtype}")
        found = claimed.setdefault(key, Storage(key, dtype, count))
        if found.dtype != dtype or found.count != count:
            raise ValueError(f"storage {key[:20]} is claimed twice, differently")
        return found

    return storage


def _filled(storage: Storage, pieces) -> Tensor:
    """The flat tensor of a storage, kept in it, out of its bytes."""
    data, at = bytearray(storage.count * storage.dtype.itemsize), 0
    for piece in pieces:
        data[at : at + len(piece)] = piece
        at += len(piece)
    if at != storage.count * storage.dtype.itemsize or len(data) != at:
        raise ValueError(f"storage {storage.key[:20]} is cut")
    storage.data = (
        torch.frombuffer(data, dtype=storage.dtype) if data else torch.empty(0, dtype=storage.dtype)
    )
    return storage.data


def _wanted(tree, prefix: str, budget: Budget):
    """The dictionary of tensors in what else training code saves with it."""
    if isinstance(tree, dict) and isinstance(tree.get("model"), Record):
        tree = weights(tree["model"], budget)
    if isinstance(tree, dict) and prefix:
        tree = next((tree[k] for k in ("state_dict", prefix) if isinstance(tree.get(k), dict)), tree)
        tree = {k: v for k, v in tree.items() if str(k).startswith(prefix)} or tree
    return tree
