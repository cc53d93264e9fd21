"""The members of a zip archive: where they lie, and their bytes piece by piece.

Less than the standard library's zipfile, and stricter: nothing is made for a directory of millions of
entries, members cannot overlap or appear twice, and none gives more bytes than it claims.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

from .opcodes import CHUNK

DIRECTORY = 2**21  # bytes; an entry has some hundred
EXPANSION = 1032  # deflate makes at the most that much of a byte


@dataclass(frozen=True, slots=True)
class Member:
    """`packed` bytes at `start` that stand for `size` bytes."""

    name: str
    start: int
    packed: int
    size: int
    deflated: bool
    crc: int


def members(f: BinaryIO, size: int) -> dict[str, Member]:
    """By name, those of an archive of `size` bytes. Raises ValueError."""
    at, length = _directory(f, size)
    if length > min(DIRECTORY, size - at):
        raise ValueError(f"its directory of {length} bytes is too large")
    f.seek(at)
    directory, found, i = f.read(length), {}, 0
    while i < length:
        member, i = _entry(f, directory, i, at)
        if member.name in found:
            raise ValueError(f"its member '{member.name[:50]}' is there twice")
        found[member.name] = member
    end = 0
    for m in sorted(found.values(), key=lambda m: m.start):
        if m.start < end or m.start + m.packed > at:
            raise ValueError("its members claim more bytes than the file has")
        end = m.start + m.packed
    return found


def _directory(f: BinaryIO, size: int) -> tuple[int, int]:
    """Where the directory is, and its length."""
    tail_at = max(0, size - 2**16 - 22)
    f.seek(tail_at)
    tail = f.read(2**16 + 22)
    i = tail.rfind(b"PK\x05\x06")
    if i < 0 or len(tail) - i < 22:
        raise ValueError("its directory is missing")
    length, at = struct.unpack_from("<2L", tail, i + 12)
    if 2**32 - 1 in (length, at) and i >= 20 and tail[i - 20 : i - 16] == b"PK\x06\x07":  # a large file
        (long_at,) = struct.unpack_from("<Q", tail, i - 12)
        f.seek(min(long_at, size))
        record = f.read(56)
        if len(record) < 56 or record[:4] != b"PK\x06\x06":
            raise ValueError("its directory is missing")
        length, at = struct.unpack_from("<2Q", record, 40)
    return min(at, size), length


def _entry(f: BinaryIO, directory: bytes, i: int, end: int) -> tuple[Member, int]:
    """The member of the entry at i, and where the next entry is."""
    if directory[i : i + 4] != b"PK\x01\x02" or len(directory) < i + 46:
        raise ValueError("its directory is damaged")
    flags, method = struct.unpack_from("<2H", directory, i + 8)
    crc, packed, size, n, extra, comment = struct.unpack_from("<3L3H", directory, i + 16)
    (at,) = struct.unpack_from("<L", directory, i + 42)
    raw = directory[i + 46 : i + 46 + n]
    name = raw.decode("utf-8" if flags & 2**11 else "cp437")
    size, packed, at = _long(directory[i + 46 + n : i + 46 + n + extra], [size, packed, at])
    if name.startswith("/") or ".." in name or set(name) & set("\\:\0"):
        raise ValueError(f"its member '{name[:50]}' has no proper name")
    if flags & 1:
        raise ValueError(f"its member '{name[:50]}' is encrypted")
    if method not in (0, 8) or (method == 0 and size != packed):
        raise ValueError(f"its member '{name[:50]}' is compressed in an unknown way")
    if size > packed * EXPANSION + 2**10:
        raise ValueError(f"its member '{name[:50]}' claims {size} bytes from {packed}")
    f.seek(min(at, end))
    local = f.read(30)
    if len(local) < 30 or local[:4] != b"PK\x03\x04":
        raise ValueError(f"its member '{name[:50]}' is not there")
    n_local, extra_local = struct.unpack_from("<2H", local, 26)
    if f.read(n_local) != raw:
        raise ValueError(f"its member '{name[:50]}' has another name")
    start = at + 30 + n_local + extra_local
    return Member(name, start, packed, size, method == 8, crc), i + 46 + n + extra + comment


def _long(extra: bytes, numbers: list[int]) -> list[int]:
    """The numbers of an entry, those that need 64 bits from its extra field."""
    while len(extra) >= 4 and 2**32 - 1 in numbers:
        kind, n = struct.unpack_from("<2H", extra)
        if kind == 1:
            wide = iter(struct.unpack_from(f"<{min(n, len(extra) - 4) // 8}Q", extra, 4))
            return [next(wide, v) if v == 2**32 - 1 else v for v in numbers]
        extra = extra[4 + n :]
    return numbers


def pieces(f: BinaryIO, member: Member) -> Iterator[bytes]:
    """The bytes of a member. Raises ValueError, at the end too, when they are not what it claims."""
    crc, size = 0, 0
    raw = _raw(f, member)
    for piece in _inflated(raw) if member.deflated else raw:
        size += len(piece)
        if size > member.size:
            break
        crc = zlib.crc32(piece, crc)
        yield piece
    if size != member.size or crc != member.crc:
        raise ValueError(f"its member '{member.name[:50]}' is damaged")


def _raw(f: BinaryIO, member: Member) -> Iterator[bytes]:
    at, end = member.start, member.start + member.packed
    while at < end:
        f.seek(at)
        piece = f.read(min(CHUNK, end - at))
        if not piece:
            raise ValueError("it is cut")
        at += len(piece)
        yield piece


def _inflated(raw: Iterator[bytes]) -> Iterator[bytes]:
    """Never more than CHUNK bytes at once, whatever they come from."""
    inflate = zlib.decompressobj(-zlib.MAX_WBITS)
    try:
        for packed in raw:
            more = True
            while more and not inflate.eof:
                piece = inflate.decompress(packed, CHUNK)
                packed = inflate.unconsumed_tail
                more = bool(packed) or len(piece) == CHUNK
                if piece:
                    yield piece
            if inflate.eof:
                return
    except zlib.error as e:
        raise ValueError(f"damaged deflate data: {e}") from e
