"""What Python 2.7's pickle module wrote, so that tests can make files like FLAME's generic_model.pkl.

Byte for byte, for the values in `dumps`, dictionaries in the order given.
"""

import io
import struct
from dataclasses import dataclass

import numpy as np

BATCH = 1000


@dataclass(eq=False)
class Ch:
    """A chumpy.ch.Ch of an array."""

    x: np.ndarray


@dataclass(eq=False)
class Csc:
    """A scipy.sparse.csc_matrix of an array."""

    array: np.ndarray


class Unicode(str):
    """A unicode string; str itself stands for Python 2's byte strings."""


class Fresh(str):
    """A byte string that is an object of its own, where Python 3 has one of each letter."""


@dataclass(frozen=True)
class Global:
    module: str
    name: str


RECONSTRUCT = Global("numpy.core.multiarray", "_reconstruct")
NDARRAY, DTYPE = Global("numpy", "ndarray"), Global("numpy", "dtype")
CH, CSC = Global("chumpy.ch", "Ch"), Global("scipy.sparse.csc", "csc_matrix")
NEW, OBJECT, SET = (
    Global("copy_reg", "_reconstructor"),
    Global("__builtin__", "object"),
    Global("__builtin__", "set"),
)


def dumps(obj, protocol: int = 2) -> bytes:
    """A pickle of protocol 0 or 2.

    obj: dict, list, tuple, str (latin-1), Unicode, int, float, bool, None, NumPy arrays, Ch, Csc.
    """
    writer = _Writer(protocol)
    if protocol >= 2:
        writer.write(b"\x80", bytes([protocol]))
    writer.save(obj)
    return writer.out.getvalue() + b"."


class _Writer:
    def __init__(self, protocol: int):
        self.binary, self.out = protocol >= 2, io.BytesIO()
        self.memo: dict = {}
        self.kept: list = []  # what has a number in the memo must not be freed, or its id is used again

    def write(self, *parts: bytes) -> None:
        for part in parts:
            self.out.write(part)

    def put(self, obj) -> None:
        n = self.memo[_identity(obj)] = len(self.memo)
        self.kept.append(obj)
        if not self.binary:
            self.write(b"p%d\n" % n)
        else:
            self.write(b"q", bytes([n])) if n < 256 else self.write(b"r", struct.pack("<I", n))

    def save(self, obj) -> None:
        n = self.memo.get(_identity(obj))
        if n is not None:
            if not self.binary:
                self.write(b"g%d\n" % n)
            else:
                self.write(b"h", bytes([n])) if n < 256 else self.write(b"j", struct.pack("<I", n))
        elif obj is None:
            self.write(b"N")
        else:
            kind = np.dtype if isinstance(obj, np.dtype) else type(obj)
            getattr(self, f"_{kind.__name__}")(obj)

    def _bool(self, obj: bool) -> None:
        self.write((b"\x88" if obj else b"\x89") if self.binary else b"I%02d\n" % obj)

    def _int(self, obj: int) -> None:
        if self.binary and 0 <= obj < 256:
            self.write(b"K", bytes([obj]))
        elif self.binary and 0 <= obj < 2**16:
            self.write(b"M", struct.pack("<H", obj))
        elif self.binary and -(2**31) <= obj < 2**31:
            self.write(b"J", struct.pack("<i", obj))
        else:
            self.write(b"I%d\n" % obj)

    def _float(self, obj: float) -> None:
        self.write(b"G", struct.pack(">d", obj)) if self.binary else self.write(b"F%a\n" % obj)

    def _str(self, obj: str) -> None:
        raw = obj.encode("latin-1")
        if not self.binary:
            self.write(b"S", repr(raw)[1:].encode(), b"\n")
        elif len(raw) < 256:
            self.write(b"U", bytes([len(raw)]), raw)
        else:
            self.write(b"T", struct.pack("<i", len(raw)), raw)
        self.put(obj)

    _Fresh = _str

    def _Unicode(self, obj: Unicode) -> None:
        if self.binary:
            raw = obj.encode()
            self.write(b"X", struct.pack("<i", len(raw)), raw)
        else:
            text = obj.replace("\\", "\\u005c").replace("\n", "\\u000a")
            self.write(b"V", text.encode("raw-unicode-escape"), b"\n")
        self.put(obj)

    def _tuple(self, obj: tuple) -> None:
        if self.binary and len(obj) < 4:
            for item in obj:
                self.save(item)
            self.write(b")\x85\x86\x87"[len(obj) : len(obj) + 1])
        else:
            self.write(b"(")
            for item in obj:
                self.save(item)
            self.write(b"t")
        if obj:
            self.put(obj)

    def _list(self, obj: list) -> None:
        self.write(b"]" if self.binary else b"(l")
        self.put(obj)
        self._batches([(item,) for item in obj], b"a", b"e")

    def _dict(self, obj: dict) -> None:
        self.write(b"}" if self.binary else b"(d")
        self.put(obj)
        self._batches(list(obj.items()), b"s", b"u")

    def _batches(self, items: list, one: bytes, many: bytes) -> None:
        size = BATCH if self.binary else 1
        for i in range(0, len(items), size):
            batch = items[i : i + size]
            self.write(b"(" if len(batch) > 1 else b"")
            for item in batch:
                for value in item:
                    self.save(value)
            self.write(many if len(batch) > 1 else one)

    def _Global(self, obj: Global) -> None:
        self.write(b"c", obj.module.encode(), b"\n", obj.name.encode(), b"\n")
        self.put(obj)

    def _reduce(self, obj, call: Global, args: tuple, state=None) -> None:
        self.save(call)
        self.save(args)
        self.write(b"R")
        self.put(obj)
        if state is not None:
            self.save(state)
            self.write(b"b")

    def _object(self, obj, kind: Global, state: dict) -> None:
        """An object of a class with attributes."""
        if not self.binary:
            self._reduce(obj, NEW, (kind, OBJECT, None), state)
            return
        self.save(kind)
        self.write(b")\x81")
        self.put(obj)
        self.save(state)
        self.write(b"b")

    def _ndarray(self, obj: np.ndarray) -> None:
        fortran = obj.flags.f_contiguous and not obj.flags.c_contiguous
        if obj.dtype == object:
            contents = obj.ravel().tolist()
        else:
            contents = obj.tobytes("F" if fortran else "C").decode("latin-1")
        state = (1, obj.shape, obj.dtype, fortran, contents)
        self._reduce(obj, RECONSTRUCT, (NDARRAY, tuple(range(1)), "b"), state)

    def _dtype(self, obj: np.dtype) -> None:
        object_ = obj.kind == "O"
        order = "|" if object_ or obj.itemsize == 1 else ">" if obj.str[0] == ">" else "<"
        state = (3, Fresh(order), None, None, None, -1, -1, 63 if object_ else 0)
        self._reduce(obj, DTYPE, (f"{obj.kind}{obj.itemsize}", 0, 1), state)

    def _Ch(self, obj: Ch) -> None:
        state = {"_make_sparse": False, "_dirty_vars": {"x"}, "_itr": None, "_depends_on_deps": {}}
        self._object(obj, CH, state | {"_make_dense": False, "x": obj.x})

    def _set(self, obj: set) -> None:
        self._reduce(obj, SET, (list(obj),))

    def _Csc(self, obj: Csc) -> None:
        rows, columns = obj.array.T.nonzero()[::-1]
        starts = np.searchsorted(columns, np.arange(obj.array.shape[1] + 1))
        state = {"indices": rows.astype("i4"), "data": obj.array[rows, columns], "maxprint": 50}
        self._object(obj, CSC, state | {"_shape": obj.array.shape, "indptr": starts.astype("i4")})


def _identity(obj) -> object:
    return obj if isinstance(obj, Global) else id(obj)
