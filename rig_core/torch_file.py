"""What torch.save writes, read without executing anything: the zip archive, and the older stream.

The structure comes first, through the restricted unpickler, with storages that only claim their size; then
the bytes of those tensors that are wanted. Damage is a ValueError (or what zipfile raises).
"""

from __future__ import annotations

import io
import zipfile
from collections.abc import Callable
from typing import BinaryIO

import torch
from torch import Tensor

from .unpickle import Record, weights
from .unpickle import load as unpickle

LEGACY = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # what torch.save began with before PyTorch 1.6
MAX_PICKLE = 64 * 2**20  # bytes of structure; the tensors are beside it


def read(f: BinaryIO, size: int, prefix: str):
    """The tree of an opened file of `size` bytes; of the tensors those below prefix, if any."""
    legacy = f.read(len(LEGACY)) == LEGACY
    return _read_legacy(f, size, prefix) if legacy else _read_archive(f, size, prefix)


def _read_archive(f: BinaryIO, size: int, prefix: str):
    """torch.save's zip archive: data.pkl (the structure) and data/<key> (one member a storage)."""
    with zipfile.ZipFile(f) as z:
        members = {i.filename: i for i in z.infolist()}
        if any(i.compress_type != zipfile.ZIP_STORED for i in members.values()):
            raise ValueError("its members are compressed, which torch.save never does")
        # stored members that do not overlap cannot claim more than the file has
        if len(members) != len(z.infolist()) or sum(i.file_size for i in members.values()) > size:
            raise ValueError("its members claim more bytes than the file has")
        pickles = [n for n in members if n.count("/") == 1 and n.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise ValueError("it holds no data.pkl")
        root = pickles[0].removesuffix("data.pkl")
        if members[pickles[0]].file_size > MAX_PICKLE:
            raise ValueError("its data.pkl is too large")
        if f"{root}byteorder" in members and z.read(f"{root}byteorder").strip() != b"little":
            raise ValueError("it was written on a big-endian machine")
        claimed: dict[str, Tensor] = {}
        tree = unpickle(z.read(pickles[0]), _claims(claimed))
        for key, v in claimed.items():
            name = f"{root}data/{key}"
            if name not in members:
                raise ValueError(f"storage {key[:20]} is missing")
            if members[name].file_size != len(v) * v.itemsize:
                raise ValueError(
                    f"storage {key[:20]} claims {len(v)} x {v.dtype}, has {members[name].file_size} bytes"
                )
        return _filled(_wanted(tree, prefix), claimed, lambda key: z.read(f"{root}data/{key}"))


def _read_legacy(f: BinaryIO, size: int, prefix: str):
    """torch.save's older stream, after its magic number: version, machine, structure and list of storages as
    pickles, then each storage as its count and its bytes."""
    head = io.BytesIO(f.read(MAX_PICKLE))
    claimed: dict[str, Tensor] = {}
    version, machine = unpickle(head, _claims({})), unpickle(head, _claims({}))
    if version != 1001 or not isinstance(machine, dict) or machine.get("little_endian") is not True:
        raise ValueError("it is of another version, or was written on a big-endian machine")
    tree, keys = unpickle(head, _claims(claimed)), unpickle(head, _claims({}))
    if not isinstance(keys, list) or sorted(map(_text, keys)) != sorted(claimed):
        raise ValueError("its list of storages is not that of its structure")
    f.seek(len(LEGACY) + head.tell())
    starts = {}
    for key in keys:
        v, count = claimed[key], int.from_bytes(f.read(8), "little")
        starts[key] = f.tell()
        end = starts[key] + len(v) * v.itemsize
        if count != len(v) or end > size:
            raise ValueError(f"storage {key[:20]} claims {len(v)} x {v.dtype}, has {count} or is cut")
        f.seek(end)

    def raw(key: str) -> bytes:
        f.seek(starts[key])
        return f.read(len(claimed[key]) * claimed[key].itemsize)

    return _filled(_wanted(tree, prefix), claimed, raw)


def _text(value) -> str:
    if not isinstance(value, str):
        raise ValueError("its list of storages is not made of names")
    return value


def _claims(claimed: dict[str, Tensor]) -> Callable[[str, torch.dtype, int], Tensor]:
    """For `unpickle`: storages on the meta device, gathered in `claimed`. What is wanted is read later."""

    def storage(key: str, dtype: torch.dtype, count: int) -> Tensor:
        if key not in claimed:
            claimed[key] = torch.empty(count, dtype=dtype, device="meta")
        found = claimed[key]
        if found.dtype != dtype or len(found) != count:
            raise ValueError(f"storage {key[:20]} is claimed twice, differently")
        return found

    return storage


def _wanted(tree, prefix: str):
    """The dictionary of tensors in what else training code saves with it."""
    if isinstance(tree, dict) and isinstance(tree.get("model"), Record):
        tree = weights(tree["model"])
    if isinstance(tree, dict) and prefix:
        tree = tree["state_dict"] if isinstance(tree.get("state_dict"), dict) else tree
        tree = {k: v for k, v in tree.items() if str(k).startswith(prefix)} or tree
    return tree


def _filled(tree, claimed: dict[str, Tensor], raw: Callable[[str], bytes]):
    """The tree with the tensors of the file: raw(key) -> bytes of a storage."""
    key_of = {_memory(v): k for k, v in claimed.items()}
    loaded: dict[str, Tensor] = {}

    def fill(v: Tensor) -> Tensor:
        key = key_of[_memory(v)]
        if key not in loaded:
            data = bytearray(raw(key))
            loaded[key] = torch.frombuffer(data, dtype=v.dtype) if data else torch.empty(0, dtype=v.dtype)
        return loaded[key].as_strided(v.shape, v.stride(), v.storage_offset())

    if not isinstance(tree, dict):
        return tree
    return {k: fill(v) if isinstance(v, Tensor) and v.is_meta else v for k, v in tree.items()}


def _memory(v: Tensor) -> int:
    """The same number for tensors on the same memory, also on the meta device, where that has no address."""
    return v.untyped_storage()._cdata
