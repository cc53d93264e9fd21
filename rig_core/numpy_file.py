"""What numpy.save and numpy.savez write, read without executing anything.

Arrays are filled piece by piece. An array of .npz may claim at most LARGEST bytes, all of them together at
most twice that, and no more than deflate can make of the bytes that are there; objects (pickles) in
compressed members have to do with what any file may make (arrays.Budget).
"""

from __future__ import annotations

import io
import re
import struct
from collections import deque
from collections.abc import Iterator
from itertools import chain
from typing import BinaryIO

import numpy as np

from . import arrays, zip_file
from .arrays import Budget
from .opcodes import Long, Refused
from .torch_file import read_pickle

MAGIC = b"\x93NUMPY"
LARGEST = 2**31
HEADER = 10_000  # bytes, of what NumPy itself reads


def read(f: BinaryIO, size: int) -> object:
    """The array of an opened .npy file of `size` bytes, or the object in it."""
    return _array(f, 0, size, Long(f, 0, size).chunks(), Budget.of(size))


def read_archive(f: BinaryIO, members: dict[str, zip_file.Member], size: int) -> dict[str, object]:
    """By name, the arrays of an opened .npz file."""
    budget = Budget.of(size)
    found, most = {}, 2 * LARGEST
    for name, m in members.items():
        if not name.endswith(".npy"):
            raise ValueError(f"its member '{name[:50]}' is no array")
        if m.deflated:
            most -= m.size
            if m.size > LARGEST or most < 0:
                raise Refused(f"arrays of more than {LARGEST} bytes, or {2 * LARGEST} together")
        start = None if m.deflated else m.start
        found[name.removesuffix(".npy")] = _array(f, start, m.size, zip_file.pieces(f, m), budget)
    return found


def _array(f: BinaryIO, start: int | None, size: int, pieces: Iterator[bytes], budget: Budget) -> object:
    """The array in `size` bytes that come in pieces; start: where they lie in f, None when compressed."""
    shape, kind, fortran, used, pieces = header(pieces)
    if kind.kind == "O":
        if start is None:
            budget.spend(bytes=2 * size)
            f, start, size, used = io.BytesIO(b"".join(pieces)), 0, size - used, 0
        else:
            deque(pieces, 0)  # for the checksum
        f.seek(start + used)
        return read_pickle(f, start + size, budget)
    if arrays.count(shape) * kind.itemsize != size - used:
        raise ValueError(f"an array of shape {shape} has {size - used} bytes")
    if kind.kind in "SU":
        return arrays.strings(shape, kind, fortran, pieces, budget)
    if start is None:
        budget.left += 2 * size
    return arrays.numbers(shape, kind, fortran, pieces, budget)


def header(pieces: Iterator[bytes]) -> tuple[tuple, np.dtype, bool, int, Iterator[bytes]]:
    """Shape, type, whether in Fortran order, the length of all this, and the rest of the pieces."""
    head = b""

    def take(n: int) -> bytes:
        nonlocal head
        while len(head) < n:
            head += next(pieces, None) or _cut()
        taken, head = head[:n], head[n:]
        return taken

    magic = take(8)
    if magic[:6] != MAGIC or magic[6] not in (1, 2, 3):
        raise ValueError("an array without its header")
    wide = magic[6] > 1
    (n,) = struct.unpack("<I" if wide else "<H", take(4 if wide else 2))
    if n > HEADER:
        raise ValueError(f"a header of {n} bytes")
    text = take(n).decode("latin-1")
    found = re.fullmatch(_HEADER, text, re.ASCII)
    if not found:
        raise Refused(f"an array of type {text.strip()[:60]}")
    code, order, shape = found.groups()
    shape = tuple(int(n.rstrip("L")) for n in shape.replace(",", " ").split())
    return shape, arrays.dtype(code), order == "True", (12 if wide else 10) + n, chain([head], pieces)


# what NumPy writes of plain types, as text, not evaluated; the L is of Python 2
_SIZE = r"\d{1,15}L?"
_HEADER = (
    r"\s*\{\s*'descr':\s*'([^']{1,9})',\s*'fortran_order':\s*(True|False),\s*"
    rf"'shape':\s*\(((?:{_SIZE},\s*)*(?:{_SIZE})?)\),?\s*\}}\s*"
)


def _cut() -> bytes:
    raise ValueError("it is cut")
