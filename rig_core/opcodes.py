"""The opcodes of a pickle and their arguments, decoded one after the other from an opened file.

Nothing in it is trusted: a length is compared with what the file still has before anything is read, and
strings of more than SHORT bytes stay in the file (Long) until an array takes them. So decoding needs next to
no memory, whatever the size of the file.
"""

from __future__ import annotations

import codecs
import pickletools
import re
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import BinaryIO

SHORT = 255  # bytes; names and keys are shorter
CHUNK = 2**16
PROTOCOL = 5


class Refused(ValueError):
    """The file asks for something that is not plain data."""


@dataclass(frozen=True, eq=False, slots=True)
class Long:
    """A string that is left in the file: `size` bytes at `start`, written in `coding`; text or bytes."""

    file: BinaryIO
    start: int
    size: int
    coding: str = "bytes"
    text: bool = False

    def chunks(self) -> Iterator[bytes]:
        """The bytes that it stands for, piece by piece; text must be latin-1, as in pickles of Python 2."""
        decode = _decoder(self.coding)
        at, end = self.start, self.start + self.size
        while at < end:
            self.file.seek(at)
            piece = self.file.read(min(CHUNK, end - at))
            if not piece:
                raise ValueError("it is cut")
            at += len(piece)
            yield decode(piece, at == end)

    def value(self) -> str | bytes:
        """The whole. What that takes while it is made: up to `cost` bytes."""
        if not self.text:
            return b"".join(self.chunks())
        if self.coding == "escapes":
            return b"".join(self.chunks()).decode("latin-1")
        self.file.seek(self.start)
        return str(self.file.read(self.size), self.coding)

    @property
    def cost(self) -> int:
        return (
            5 if self.text else 2
        ) * self.size  # one sign beyond 16 bits makes all of a text four bytes wide


def _decoder(coding: str) -> Callable[[bytes, bool], bytes]:
    """decode(piece, whether it is the last)."""
    if coding in ("bytes", "latin-1"):
        return lambda piece, last: piece
    if coding == "escapes":
        return _Unescape()
    decoder = codecs.getincrementaldecoder(coding)()
    return lambda piece, last: decoder.decode(piece, last).encode("latin-1")


class _Unescape:
    """Decodes the escapes of protocol 0, holding back one that the end of a piece cuts."""

    def __init__(self):
        self.rest = b""

    def __call__(self, piece: bytes, last: bool) -> bytes:
        piece, self.rest = self.rest + piece, b""
        i = piece.rfind(b"\\", -3)  # an escape has at most four bytes
        if i >= 0 and not last:
            head = piece[: i + 1]
            if (len(head) - len(head.rstrip(b"\\"))) % 2:  # an even number is finished pairs
                piece, self.rest = piece[:i], piece[i:]
        if re.search(rb"\\[^'\"ntrx]", piece.replace(b"\\\\", b"")):
            raise ValueError("an escape that Python does not write")
        return codecs.escape_decode(piece)[0]


class _Arguments:
    """Reads the arguments of opcodes, none of them past `end`."""

    def __init__(self, file: BinaryIO, end: int):
        self.file, self.end = file, end

    def take(self, n: int) -> bytes:
        if n > self.end - self.file.tell():
            raise ValueError(f"{n} bytes are claimed where the file ends" if n > 1 else "it does not end")
        taken = self.file.read(n)
        if len(taken) < n:
            raise ValueError("it is cut")
        return taken

    def number(self, layout: str):
        return struct.unpack(layout, self.take(struct.calcsize(layout)))[0]

    def string(self, layout: str, coding: str, text: bool) -> str | bytes | Long:
        """A string after its length."""
        n = self.number(layout)
        if n < 0 or n > self.end - self.file.tell():
            raise ValueError(f"a string of {n} bytes is claimed where the file has less")
        return self._string(self.file.tell(), n, coding, text)

    def _string(self, start: int, n: int, coding: str, text: bool) -> str | bytes | Long:
        found = Long(self.file, start, n, coding, text)
        if n <= SHORT:
            found = found.value()
        self.file.seek(start + n)
        return found

    def line(self) -> str:
        """A short line."""
        text = self.file.readline(min(SHORT, self.end - self.file.tell()))
        if text[-1:] != b"\n":
            raise ValueError("a line does not end")
        return text[:-1].decode("latin-1")

    def quoted(self) -> str | Long:
        """A string of protocol 0: on a line, quoted."""
        start, n = self._line()
        self.file.seek(start)
        first = self.file.read(1)
        self.file.seek(start + n - 1)
        if n < 2 or first not in (b"'", b'"') or self.file.read(1) != first:
            raise ValueError("a string without quotes")
        found = self._string(start + 1, n - 2, "escapes", True)
        self.file.seek(start + n + 1)
        return found

    def unquoted(self) -> str | Long:
        """A unicode string of protocol 0: on a line."""
        start, n = self._line()
        found = self._string(start, n, "raw-unicode-escape", True)
        self.file.seek(start + n + 1)
        return found

    def _line(self) -> tuple[int, int]:
        """Where a line of any length starts, and its length."""
        start = self.file.tell()
        while piece := self.file.readline(min(CHUNK, self.end - self.file.tell())):
            if piece[-1:] == b"\n":
                return start, self.file.tell() - 1 - start
        raise ValueError("a line does not end")

    def integer(self) -> int:
        text = self.line()
        return {"00": False, "01": True}.get(text, int(text.rstrip("L")))

    def real(self) -> float:
        return float(self.line())

    def wide(self, layout: str) -> int:
        n = self.number(layout)
        if not 0 <= n <= SHORT:
            raise ValueError(f"a number of {n} bytes")
        return int.from_bytes(self.take(n), "little", signed=True)

    def protocol(self) -> None:
        if self.number("B") > PROTOCOL:
            raise ValueError("a later protocol")

    def frame(self) -> None:
        n = self.number("<Q")
        if n > self.end - self.file.tell():
            raise ValueError(f"a frame of {n} bytes is claimed where the file has less")


_A = _Arguments
# code: (what to do, how to read the argument)
_OPCODES = {
    b"N": ("push", lambda a: None),
    b"\x88": ("push", lambda a: True),
    b"\x89": ("push", lambda a: False),
    b"}": ("push", lambda a: {}),
    b"]": ("push", lambda a: []),
    b"\x8f": ("push", lambda a: []),  # a set: none is of any use here, and nothing needs hashing
    b")": ("push", lambda a: ()),
    b"I": ("push", _A.integer),
    b"L": ("push", _A.integer),
    b"J": ("push", lambda a: a.number("<i")),
    b"K": ("push", lambda a: a.number("B")),
    b"M": ("push", lambda a: a.number("<H")),
    b"\x8a": ("push", lambda a: a.wide("B")),
    b"\x8b": ("push", lambda a: a.wide("<i")),
    b"F": ("push", _A.real),
    b"G": ("push", lambda a: a.number(">d")),
    b"S": ("push", _A.quoted),
    b"T": ("push", lambda a: a.string("<i", "latin-1", True)),
    b"U": ("push", lambda a: a.string("B", "latin-1", True)),
    b"V": ("push", _A.unquoted),
    b"X": ("push", lambda a: a.string("<I", "utf-8", True)),
    b"\x8c": ("push", lambda a: a.string("B", "utf-8", True)),
    b"\x8d": ("push", lambda a: a.string("<Q", "utf-8", True)),
    b"B": ("push", lambda a: a.string("<I", "bytes", False)),
    b"C": ("push", lambda a: a.string("B", "bytes", False)),
    b"\x8e": ("push", lambda a: a.string("<Q", "bytes", False)),
    b"\x96": ("push", lambda a: a.string("<Q", "bytes", False)),
    b"(": ("mark", None),
    b"t": ("tuple", lambda a: None),
    b"\x85": ("tuple", lambda a: 1),
    b"\x86": ("tuple", lambda a: 2),
    b"\x87": ("tuple", lambda a: 3),
    b"l": ("list", None),
    b"\x91": ("list", None),  # a frozen set
    b"d": ("dict", None),
    b"a": ("append", None),
    b"e": ("extend", None),
    b"\x90": ("extend", None),
    b"s": ("set item", None),
    b"u": ("set items", None),
    b"p": ("put", _A.integer),
    b"q": ("put", lambda a: a.number("B")),
    b"r": ("put", lambda a: a.number("<I")),
    b"\x94": ("put", lambda a: None),
    b"g": ("get", _A.integer),
    b"h": ("get", lambda a: a.number("B")),
    b"j": ("get", lambda a: a.number("<I")),
    b"c": ("global", lambda a: f"{a.line()}.{a.line()}"),
    b"\x93": ("global", lambda a: None),
    b"R": ("make", None),
    b"\x81": ("make", None),
    b"b": ("build", None),
    b"Q": ("persistent", None),
    b"\x80": ("skip", _A.protocol),
    b"\x95": ("skip", _A.frame),
    b".": ("stop", None),
}


def opcodes(file: BinaryIO, end: int) -> Iterator[tuple[str, object]]:
    """What to do and its argument, from where the file stands up to a pickle's end and not past `end`.

    Raises Refused for opcodes that no plain data needs, ValueError for damage.
    """
    arguments = _Arguments(file, end)
    while True:
        code = arguments.take(1)
        if code not in _OPCODES:
            known = pickletools.code2op.get(code.decode("latin-1"))
            if not known:
                raise ValueError(f"the byte {code.hex()} where an opcode was expected")
            raise Refused(f"the pickle opcode {known.name}")
        action, argument = _OPCODES[code]
        argument = argument and argument(arguments)
        at = file.tell()
        yield action, argument
        if action == "stop":
            return
        file.seek(at)  # arrays may have been read meanwhile
