"""Archives, arrays and headers that attack who reads them."""

import bz2
import io
import json
import lzma
import struct
import tarfile
import zipfile
import zlib

from rig_core.torch_file import LEGACY
from tests.hostile import storage_pickle
from tests.hostile_pickles import command, repeated, stream, ways

OBJECTS = "{'descr': '|O', 'fortran_order': False, 'shape': (1,), }"
BYTES = "{'descr': '|u1', 'fortran_order': False, 'shape': (16,), }"
EMPTY = b"\x80\x02}."  # a pickle


def npy(header: str, data: bytes) -> bytes:
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header.encode() + data


def zipped(members: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", compression) as z:
        for name, data in members.items():
            z.writestr(name, data)
    return out.getvalue()


def packed(members: dict[str, bytes]) -> bytes:
    return zipped(members, zipfile.ZIP_DEFLATED)


def tensor(count, shape, stride=None, offset=0, key="0") -> bytes:
    """An archive of one tensor with these claims, whose storage has four elements."""
    structure = storage_pickle(count, shape, stride, offset, key)
    return zipped({"archive/data.pkl": structure, "archive/data/0": bytes(16)})


# zip


class Parts:
    """An archive of one member taken apart: where its entry and the end of the directory are."""

    def __init__(self, data: bytes):
        self.data, self.entry, self.end = data, data.index(b"PK\x01\x02"), data.rindex(b"PK\x05\x06")

    def entry_with(self, at: int, value: bytes) -> bytes:
        at += self.entry
        return self.data[:at] + value + self.data[at + len(value) :]

    def end_with(self, at: int, value: bytes) -> bytes:
        at += self.end
        return self.data[:at] + value + self.data[at + len(value) :]

    def with_directory(self, directory: bytes, claimed: int | None = None) -> bytes:
        sizes = struct.pack("<2L", len(directory) if claimed is None else claimed, self.entry)
        return self.data[: self.entry] + directory + self.data[self.end : self.end + 12] + sizes + b"\0\0"

    def with_wide_sizes(self, n: int) -> bytes:
        """The sizes of the member in 64 bits."""
        directory = bytearray(self.data[self.entry : self.end])
        struct.pack_into("<2L", directory, 20, 2**32 - 1, 2**32 - 1)
        struct.pack_into("<H", directory, 30, 20)
        return self.with_directory(bytes(directory) + struct.pack("<2H2Q", 1, 16, n, n))

    def with_wide_end(self, length: int, at: int) -> bytes:
        """The place of the directory in 64 bits."""
        record = b"PK\x06\x06" + bytes(36) + struct.pack("<2Q", length, at)
        locator = b"PK\x06\x07" + struct.pack("<LQL", 0, self.end, 1)
        return self.data[: self.end] + record + locator + b"PK\x05\x06" + bytes(4) + b"\xff" * 12 + b"\0\0"


def member(method: int, data: bytes, size: int, crc: int) -> bytes:
    """An archive of one compressed array."""
    fields = struct.pack("<5H", 20, 0, method, 0, 0) + struct.pack("<3L2H", crc, len(data), size, 5, 0)
    local, entry = b"PK\x03\x04" + fields + b"a.npy" + data, b"PK\x01\x02" + struct.pack("<H", 20) + fields
    entry += bytes(14) + b"a.npy"
    return local + entry + b"PK\x05\x06" + struct.pack("<4H2LH", 0, 0, 1, 1, len(entry), len(local), 0)


def directory_of(n: int) -> bytes:
    """An archive of an empty dictionary and of n empty members."""
    names = [b"a/data.pkl", *(b"%06d" % i for i in range(n))]
    bodies, entries, at = [], [], 0
    for name in names:
        data = b"" if name[:1] == b"0" else EMPTY
        fields = struct.pack("<5H", 20, 0, 0, 0, 0) + struct.pack(
            "<3LH", zlib.crc32(data), len(data), len(data), len(name)
        )
        bodies.append(b"PK\x03\x04" + fields + b"\0\0" + name + data)
        entries.append(b"PK\x01\x02\x14\x00" + fields + bytes(12) + struct.pack("<L", at) + name)
        at += len(bodies[-1])
    body, directory = b"".join(bodies), b"".join(entries)
    return body + directory + b"PK\x05\x06" + bytes(8) + struct.pack("<2LH", len(directory), len(body), 0)


def overlapping(n: int) -> bytes:
    """Names of one packed array of zeros: each local header takes those that follow for its extra field."""
    array = npy("{'descr': '|u1', 'fortran_order': False, 'shape': (1000000,), }", bytes(10**6))
    deflate = zlib.compressobj(9, zlib.DEFLATED, -15)
    data = deflate.compress(array) + deflate.flush()
    fields = struct.pack("<5H", 20, 0, 8, 0, 0) + struct.pack("<3L", zlib.crc32(array), len(data), len(array))
    body = directory = b""
    for i in range(n):
        name, following = b"%04d.npy" % i, (n - 1 - i) * 38
        directory += b"PK\x01\x02\x14\x00" + fields + struct.pack("<H", 8) + bytes(12)
        directory += struct.pack("<L", len(body)) + name
        body += b"PK\x03\x04" + fields + struct.pack("<2H", 8, following) + name
    body += data
    return body + directory + b"PK\x05\x06" + bytes(8) + struct.pack("<2LH", len(directory), len(body), 0)


def zips() -> dict[str, bytes]:
    array, zeros = npy(BYTES, bytes(16)), bytes(2 * 10**7)
    one, numpy = Parts(zipped({"a/data.pkl": EMPTY})), Parts(zipped({"a.npy": array}))
    many = b"\x80\x02](" + b"N" * 2 * 10**7 + b"e."
    hidden = b"\x80\x02ccollections\nOrderedDict\n)RB" + struct.pack("<L", 10**8) + bytes(10**8) + b"b."
    bomb, crc = array + zeros, zlib.crc32(array)
    return {
        "torch zip, packed": packed(
            {"a/data.pkl": storage_pickle(5 * 10**6, (5 * 10**6,)), "a/data/0": zeros}
        ),
        "torch zip, packed structure": packed({"a/data.pkl": many}),
        "packed object with a state": packed({"a.npy": npy(OBJECTS, hidden)}),
        "packed objects": packed({"a.npy": npy(OBJECTS, many)}),
        "packed array, more than its header": packed({"a.npy": bomb}),
        "packed array, less than its header": packed({"a.npy": array[:-1]}),
        "packed array, more than its claim": member(8, zlib.compress(bomb)[2:-4], len(array), crc),
        "packed array, no deflate": member(8, array, len(array), crc),
        "claim of 2 GB": member(8, zlib.compress(array)[2:-4], 2**31 - 1, crc),
        "bzip2": member(12, bz2.compress(bomb), len(bomb), zlib.crc32(bomb)),
        "lzma": member(14, lzma.compress(bomb), len(bomb), zlib.crc32(bomb)),
        "method 99": member(99, array, len(array), crc),
        "archive in an archive": zipped({"a.npy": numpy.data}),
        "overlapping members": overlapping(500),
        "directory of 50000": directory_of(50_000),
        "path upwards": zipped({"../data.pkl": EMPTY}),
        "path upwards beside": zipped({"a/data.pkl": EMPTY, "../../etc/x": b"x"}),
        "path upwards of an array": zipped({"../../a.npy": array}),
        "path from the root": zipped({"/data.pkl": EMPTY}),
        "path of a drive": zipped({"C:/data.pkl": EMPTY}),
        "path of Windows": zipped({"..\\x/data.pkl": EMPTY}),
        "two structures": zipped({"a/data.pkl": EMPTY, "b/data.pkl": EMPTY}),
        "one array twice": zipped({"a.npy": array, "b.npy": array}).replace(b"b.npy", b"a.npy"),
        "structure twice": zipped({"a/data.pkl": EMPTY, "b/data.pkl": EMPTY}).replace(b"b/data", b"a/data"),
        "encrypted": one.entry_with(8, b"\x01\x00"),
        "another local name": numpy.data.replace(b"a.npy", b"b.npy", 1),
        "no local header": b"PK\x03\x05" + numpy.data[4:],
        "no directory": one.data[: one.entry],
        "entry cut": one.with_directory(one.data[one.entry : one.entry + 30]),
        "entry of another kind": one.entry_with(0, b"PK\x01\x03"),
        "directory beyond the file": one.end_with(16, struct.pack("<L", 2**31)),
        "directory of 2 GB": one.end_with(12, struct.pack("<L", 2**31)),
        "directory of 2^64": one.with_wide_end(2**64 - 1, 0),
        "directory at 2^63": one.with_wide_end(50, 2**63),
        "directory nowhere": one.end_with(12, b"\xff" * 8),
        "directory that is its own end": one.end_with(12, struct.pack("<2L", 22, one.end)),
        "member beyond the file": one.entry_with(42, struct.pack("<L", 2**31)),
        "member of 2 GB": one.entry_with(20, struct.pack("<2L", 2**31, 2**31)),
        "member of 2^63": one.with_wide_sizes(2**63),
        "array of 2^63": numpy.with_wide_sizes(2**63),
        "member over the directory": one.entry_with(20, struct.pack("<2L", 60, 60)),
    }


# torch.save


def torches(mark: str) -> dict[str, bytes]:
    good = storage_pickle(4, (4,))
    views = b"\x80\x02](ctorch._utils\n_rebuild_tensor_v2\nq\x00("
    name = b"(U\x07storagectorch\nFloatStorage\nU\x010U\x03cpuK\x04" + b"N" * 10**5 + b"t"
    views += b"(U\x07storagectorch\nFloatStorage\nU\x010U\x03cpuK\x04tQK\x00K\x04\x85K\x01\x85tq\x01"
    posix = ways("posix system", command(mark))["GLOBAL"]
    return {
        "storage of 10^12": tensor(10**12, (10**12,)),
        "storage of 2^63": tensor(2**63, (1,)),
        "storage below 0": tensor(-4, (1,)),
        "storage of another length": tensor(3, (3,)),
        "storage elsewhere": tensor(4, (4,), key="../../../etc/passwd"),
        "tensor outside": tensor(4, (2,), offset=3),
        "tensor before": tensor(4, (2,), offset=-1),
        "stride outside": tensor(4, (2,), (2**40,)),
        "stride backwards": tensor(4, (2,), (-1,), 1),
        "strides of 2^62": tensor(4, (2, 2), (2**62, 2**62)),
        "stride of 0": tensor(4, (10**6, 10**6), (0, 0)),
        "more strides": tensor(4, (2,), (1, 1)),
        "shape below 0": tensor(4, (-2, -2), (1, 1)),
        "shape of 50 axes": tensor(4, (1,) * 50),
        "shape of lists": tensor(4, ([],), (1,)),
        "tensors of one storage": zipped(
            {"a/data.pkl": views + b"h\x00h\x01R" * 200_000 + b"e.", "a/data/0": bytes(16)}
        ),
        "copies of a name": zipped({"a/data.pkl": repeated(name, b"h\x00Q"), "a/data/0": bytes(16)}),
        "another byte order": zipped({"a/data.pkl": EMPTY, "a/byteorder": b"big"}),
        "byte order of 10 MB": zipped({"a/data.pkl": EMPTY, "a/byteorder": b" " * 10**7}),
        "stream of 2^63": stream(storage_pickle(2**40, (4,)), ["0"], struct.pack("<Q", 2**63) + bytes(16)),
        "stream of 2 GB": stream(storage_pickle(2**29, (4,)), ["0"], struct.pack("<Q", 2**29) + bytes(16)),
        "stream that claims less": stream(good, ["0"], struct.pack("<Q", 3) + bytes(16)),
        "stream of other keys": stream(good, ["1"], struct.pack("<Q", 4) + bytes(16)),
        "stream of a key twice": stream(good, ["0", "0"], (struct.pack("<Q", 4) + bytes(16)) * 2),
        "stream of keys that are none": stream(good, [["0"]], struct.pack("<Q", 4) + bytes(16)),
        "stream without keys": stream(good, [], struct.pack("<Q", 4) + bytes(16)),
        "stream that ends": stream(good, ["0"], struct.pack("<Q", 4) + bytes(15)),
        "stream of another version": LEGACY + b"\x80\x02M\xea\x03." + EMPTY * 3,
        "stream of numbers": LEGACY + b"\x80\x02K\x01." * 4,
        "stream of commands": LEGACY + posix,
        "stream of commands at its end": stream(EMPTY)[: -len(b"\x80\x02]q\x00.")] + posix,
        "tar of PyTorch 0.1": tar(),
    }


def tar() -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as t:
        for name in ("sys_info", "pickle", "tensors", "storages"):
            info = tarfile.TarInfo(name)
            info.size = len(EMPTY)
            t.addfile(info, io.BytesIO(EMPTY))
    return out.getvalue()


# numpy


def arrays(mark: str) -> dict[str, bytes]:
    code = f"__import__('os').system('touch {mark}')"
    kinds = [
        "'<f8'",
        "'|O'",
        "[('a', '<f8')]",
        "('<f8', (2,))",
        "'<c16'",
        "'|V8'",
        "'|V1000000000'",
        "'f8,O'",
    ]
    kinds += ["'<U1000000000'", "'<M8'", "'<f16'", "'|S0'", code]
    shapes = ["(2,)", "(-3,)", "(3, -1)", "(4294967296, 4294967296)", "(9223372036854775807,)", "(2**62,)"]
    shapes += [
        "(99999999999999999999,)",
        "(0, 99999999999)",
        "(3.0,)",
        "(True,)",
        "3",
        f"({code},)",
        "(" + "1, " * 64 + ")",
    ]
    headers = [
        f"{{'descr': {kind}, 'fortran_order': False, 'shape': {shape}, }}"
        for kind in kinds
        for shape in shapes
    ]
    headers += [f"{{'descr': '<f8', 'fortran_order': {code}, 'shape': (3,), }}", "(" * 60_000, "", "{}", code]
    found = {f"header {h[:99]}": npy(h, bytes(24)) for h in headers}
    found |= {f"packed {name}": packed({"a.npy": data}) for name, data in found.items()}
    return found | {
        "header of 1 GB": b"\x93NUMPY\x02\x00" + struct.pack("<L", 2**30) + b"{" * 1000,
        "header of 4 GB": b"\x93NUMPY\x03\x00" + struct.pack("<L", 2**32 - 1) + b"{" * 1000,
        "another version": b"\x93NUMPY\x09\x00" + bytes(100),
        "end in the header": b"\x93NUMPY\x01",
    }


# safetensors


def safetensors() -> dict[str, bytes]:
    def raw(header, size=None, data=bytes(16)) -> bytes:
        text = (header if isinstance(header, str) else json.dumps(header)).encode()
        return struct.pack("<Q", len(text) if size is None else size) + text + data

    def one(shape=(4,), start=0, end=16, kind="F32") -> dict:
        return {"a": {"dtype": kind, "shape": shape, "data_offsets": [start, end]}}

    def meta(text) -> dict:
        return {"__metadata__": {"face_rig": text}} | one()

    return {
        "header of 2 GB": raw("{}", 2**31),
        "header of 2^63": raw("{}", 2**63),
        "header of 2^64": raw("{}", 2**64 - 1),
        "header of 3 MB": raw({f"{i:06}": one((0,), 0, 0)["a"] for i in range(50_000)}, data=b""),
        "header of spaces": raw("{" + " " * 10**7),
        "header that ends": raw('{"a":'),
        "header in itself": raw('{"a":' * 10**5),
        "header of numbers": raw({"a": 1}),
        "tensor beyond": raw(one((400,), 0, 1600)),
        "tensor before": raw(one((4,), -16, 0)),
        "tensor backwards": raw(one((4,), 16, 0)),
        "tensor at 2^63": raw(one((4,), 2**63, 2**63 + 16)),
        "tensors on each other": raw(one() | {"b": one()["a"]}),
        "hole": raw(one((2,), 8, 16)),
        "shape below 0": raw(one((-4,))),
        "shape of 2^66": raw(one((2**32, 2**32, 4))),
        "shape of 2^70": raw(one((2**70,))),
        "shape of words": raw(one(("4",))),
        "shape that is smaller": raw(one((3,))),
        "unknown type": raw(one(kind="F33")),
        "metadata of numbers": raw({"__metadata__": {"a": 1}} | one()),
        "metadata in itself": raw(meta("[" * 10**6)),
        "metadata that is no JSON": raw(meta("{")),
    }
