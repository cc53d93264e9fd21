"""NumPy arrays and scipy's sparse matrices as tensors: filled piece by piece, within a budget."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .opcodes import CHUNK, Refused

# what torch computes with: unsigned numbers become signed ones that hold them
TARGETS = {"b1": "?", "i1": "i1", "i2": "i2", "i4": "i4", "i8": "i8", "u1": "u1", "u2": "i4", "u4": "i8"}
TARGETS |= {"u8": "i8", "f2": "f2", "f4": "f4", "f8": "f8"}
AXES = 32
SPARE = 3 * 2**24
PART = 256  # bytes of an object


@dataclass
class Budget:
    """The memory that reading a file may still take, so that none, however made, needs much more than twice
    its own: the bytes of tensors are counted, and so many for each object that is made on the way."""

    size: int
    left: int

    @classmethod
    def of(cls, size: int) -> Budget:
        """For a file of `size` bytes: twice that, and SPARE for the objects of a small one."""
        return cls(size, 2 * size + SPARE)

    def spend(self, bytes: int = 0, parts: int = 0) -> None:
        """Raises Refused when there is no more."""
        self.left -= bytes + PART * parts
        if self.left < 0:
            raise Refused(f"to take more memory than a file of {self.size} bytes needs")


@dataclass(frozen=True, eq=False)
class Sparse:
    """A matrix of which only some elements are given; those given twice add up.

    shape: (rows, columns); rows, columns [N] integers, values [N].
    """

    shape: tuple[int, int]
    rows: Tensor
    columns: Tensor
    values: Tensor

    def dense(self, most: int) -> Tensor:
        """The matrix [rows, columns]. Raises ValueError when it has more than `most` elements."""
        if math.prod(self.shape) > most:
            raise ValueError(f"a sparse matrix of {self.shape[0]} x {self.shape[1]}, at most {most} elements")
        out = torch.zeros(self.shape, dtype=self.values.dtype)
        return out.index_put_((self.rows.long(), self.columns.long()), self.values, accumulate=True)


def dtype(code: str) -> np.dtype:
    """The type of that NumPy code: a number, "O", or a string of fixed length. Raises Refused for others."""
    found = re.fullmatch(r"([<>|=]?)([a-zA-Z?])(\d{0,5})", code, re.ASCII)
    order, kind, size = found.groups() if found else ("", "", "")
    if kind + size in TARGETS or (kind in "SU" and size):
        return np.dtype(code)
    if kind == "O" and size in ("", "4", "8"):
        return np.dtype(object)
    raise Refused(f"a NumPy array of type '{code[:40]}'")


def count(shape: object) -> int:
    """The number of elements. Raises ValueError for what is no shape."""
    if not isinstance(shape, tuple) or len(shape) > AXES:
        raise ValueError("an array whose shape is not one")
    if not all(type(n) is int and 0 <= n < 2**48 for n in shape):
        raise ValueError("an array whose shape is not made of sizes")
    return math.prod(shape)


def numbers(shape: tuple, kind: np.dtype, fortran: bool, pieces: Iterable[bytes], budget: Budget) -> Tensor:
    """The tensor of that shape out of the bytes of an array of that type, in C or Fortran order."""
    target = np.dtype(TARGETS[kind.str[1:]])
    n = count(shape)
    budget.spend(bytes=n * target.itemsize)
    out = np.empty(n, target)
    source = np.dtype("u1") if kind.kind == "b" else kind  # any byte but 0 is True
    at, rest = 0, b""
    for piece in pieces:
        piece = rest + piece
        part = np.frombuffer(piece, source, len(piece) // source.itemsize)
        if at + len(part) > n:
            raise ValueError(f"an array of shape {shape} has more bytes than that")
        if kind.kind == "u" and kind.itemsize == 8 and part.size and part.max() >= 2**63:
            raise ValueError("an array with numbers beyond 64 bits with a sign")
        out[at : at + len(part)] = part
        at, rest = at + len(part), piece[part.nbytes :]
    if at < n or rest:
        raise ValueError(f"an array of shape {shape} has fewer bytes than that")
    flat = torch.from_numpy(out)
    return flat.view(shape[::-1]).permute(*range(len(shape))[::-1]) if fortran else flat.view(shape)


def strings(
    shape: tuple, kind: np.dtype, fortran: bool, pieces: Iterable[bytes], budget: Budget
) -> list | str:
    """An array of strings as nested lists of them."""
    n = count(shape)
    budget.spend(parts=n, bytes=2 * n * kind.itemsize)
    raw = b"".join(pieces)
    if len(raw) != n * kind.itemsize:
        raise ValueError(f"an array of shape {shape} has {len(raw)} bytes")
    flat = np.frombuffer(raw, kind).reshape(shape, order="F" if fortran else "C").ravel().tolist()
    return nested([v.decode("latin-1") if isinstance(v, bytes) else v for v in flat], shape, budget)


def nested(items: list, shape: tuple, budget: Budget) -> object:
    """The items of an array in C order as nested lists; the one of an array without axes as it is."""
    if len(items) != count(shape):
        raise ValueError(f"an array of shape {shape} has {len(items)} objects")
    if shape == () or not items:
        return items[0] if items else []
    budget.spend(parts=len(items) * len(shape))
    for n in shape[:0:-1]:
        items = [items[i : i + n] for i in range(0, len(items), n)]
    return items


def sparse(kind: str, state: dict, budget: Budget) -> Sparse:
    """scipy's csc, csr or coo matrix out of its attributes. Raises ValueError when they do not fit."""
    shape, values = state.get("_shape", state.get("shape")), state.get("data")
    if not isinstance(shape, (tuple, list)) or len(shape) != 2:
        raise ValueError("a sparse matrix without a shape of two axes")
    count(shape := tuple(shape))
    budget.spend(bytes=len(values) if isinstance(values, Tensor) else 0)  # for the time that looking takes
    if kind == "coo":
        rows, columns = state["coords"] if "coords" in state else (state.get("row"), state.get("col"))
    else:
        inner, starts = state.get("indices"), state.get("indptr")
        outer = _outer(inner, starts, shape[kind == "csc"], budget)
        rows, columns = (inner, outer) if kind == "csc" else (outer, inner)
    if not isinstance(values, Tensor) or not _indices(rows, shape[0]) or not _indices(columns, shape[1]):
        raise ValueError("a sparse matrix whose elements lie outside")
    if values.shape != rows.shape or rows.shape != columns.shape:
        raise ValueError("a sparse matrix whose parts are of different lengths")
    return Sparse(shape, rows, columns, values)


def _outer(inner: Tensor, starts: Tensor, n: int, budget: Budget) -> Tensor:
    """The column of each element of a csc matrix (the row, csr), from where columns start."""
    if not _indices(starts, 2**48) or not _indices(inner, 2**48) or len(starts) != n + 1:
        raise ValueError("a sparse matrix whose parts do not fit")
    if starts[0] != 0 or starts[-1] != len(inner) or (starts[1:] < starts[:-1]).any():
        raise ValueError("a sparse matrix whose columns do not follow each other")
    budget.spend(bytes=inner.nbytes)
    out = torch.empty_like(inner)
    for i in range(0, len(inner), CHUNK):
        at = torch.arange(i, min(i + CHUNK, len(inner)), dtype=starts.dtype)
        out[i : i + CHUNK] = torch.searchsorted(starts, at, right=True) - 1
    return out


def _indices(v: object, n: int) -> bool:
    """Whether v is a list of integers of 0..n-1, of the types that scipy uses."""
    if not isinstance(v, Tensor) or v.ndim != 1 or v.dtype not in (torch.int32, torch.int64):
        return False
    return not len(v) or (v.min() >= 0 and int(v.max()) < n)


def select(source: object, indices: object, shape: object, budget: Budget) -> Tensor:
    """chumpy's Select: some elements of an array, in another shape."""
    if not isinstance(source, Tensor) or not _indices(indices, source.numel()):
        raise ValueError("a chumpy selection that is not one")
    if shape is not None and count(shape := tuple(shape[: AXES + 1])) != len(indices):
        raise ValueError("a chumpy selection of another shape")
    budget.spend(bytes=len(indices) * (8 + source.itemsize))
    return torch.take(source, indices.long()).view(indices.shape if shape is None else shape)
