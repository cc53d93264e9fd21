"""Random and damaged files: reading gives plain data or one line that names the file, in little memory.

Every test stops when its SECONDS are over; the examples are the same each time.
"""

import pickle
import pickletools
import struct
import time

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rig_core.arrays import Sparse
from rig_core.files import CheckpointError, read_tree
from tests.hostile_archives import EMPTY, Parts, npy, zipped
from tests.hostile_pickles import ARRAY, OBJECT, SELECT, SPARSE, U1, indices, text
from tests.reader_runner import peak
from tests.test_attacks import CARRIERS, SPARE, honest

SECONDS = 4  # a test
EXAMPLES = 300
HONEST = honest()
FUZZ = settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
)


class Reader:
    """Reads what the fuzzer makes as long as there is time."""

    def __init__(self, path):
        self.path, self.end, self.count, self.good = path, time.monotonic() + SECONDS, 0, 0

    def __call__(self, data: bytes) -> None:
        if time.monotonic() > self.end:
            return
        self.path.write_bytes(data)
        before = peak(restart=True)
        try:
            plain(read_tree(self.path))
            self.good += 1
        except CheckpointError as e:
            assert str(e).startswith(f"{self.path}: ") and str(e).isprintable() and len(str(e)) < 700
        if before is not None:
            assert peak() - before < 2 * len(data) + SPARE
        self.count += 1


@pytest.fixture
def reader(tmp_path):
    return Reader(tmp_path / "a")


def plain(value) -> None:
    """Asserts that a value is what `read_tree` promises, and that its numbers are there."""
    if isinstance(value, dict):
        assert all(k is None or isinstance(k, (str, int, float)) for k in value)
        value = list(value.values())
    if isinstance(value, list):
        for v in value:
            plain(v)
    elif isinstance(value, Sparse):
        assert value.rows.shape == value.columns.shape == value.values.shape
        if value.shape[0] * value.shape[1] < 10**6:
            assert value.dense(10**6).shape == value.shape
    elif isinstance(value, torch.Tensor):
        assert value.device.type == "cpu" and len(value.flatten().tolist()) == value.numel()
    else:
        assert value is None or isinstance(value, (str, bytes, int, float))


# random files

STARTS = [
    b"",
    b"\x80\x02",
    b"\x80\x04",
    b"(dp0\n",
    b"]",
    b"PK\x03\x04",
    b"\x93NUMPY\x01\x00",
    b"\x93NUMPY\x02\x00",
]
STARTS += [HONEST["torch stream"][:200], HONEST["safetensors"][:60], b"\x08" + bytes(7) + b"{", b"c"]


def test_random_bytes(reader):
    @FUZZ
    @given(st.sampled_from(STARTS), st.binary(max_size=400))
    def run(start, data):
        reader(start + data)

    run()
    assert reader.count > 100


# random pickles

NUMBERS = st.sampled_from([0, 1, 2, 3, 7, 255]) | st.integers(0, 2**64 - 1)
TEXTS = st.sampled_from([b"", b"a", b"x", b"latin1", b"<", b"f8", b"i4", b"O", b"U3"]) | st.binary(
    max_size=12
)
LINES = TEXTS.map(lambda v: v.replace(b"\n", b" "))
NAMES = ["collections OrderedDict", "numpy dtype", "numpy ndarray", "numpy.core.multiarray _reconstruct"]
NAMES += ["numpy.core.multiarray scalar", "numpy._core.numeric _frombuffer", "_codecs encode", "builtins set"]
NAMES += [
    "torch._utils _rebuild_tensor_v2",
    "torch FloatStorage",
    "torch.storage _load_from_bytes",
    "os system",
]
NAMES += [
    "chumpy.ch Ch",
    "chumpy.reordering Select",
    "scipy.sparse._csc csc_matrix",
    "copyreg _reconstructor",
]
NAMES += ["builtins object", "builtins bytearray", "torch.nn.modules.linear Linear", "torch Size"]


def counted(layout: str):
    top = 256 ** struct.calcsize(layout) // (1 if layout.isupper() else 2) - 1
    honest_ = TEXTS.map(lambda v: struct.pack(layout, len(v)) + v)
    return st.one_of(
        honest_,
        honest_,
        honest_,
        st.tuples(NUMBERS, TEXTS).map(lambda v: struct.pack(layout, v[0] % top) + v[1]),
    )


def packed_number(layout: str):
    return NUMBERS.map(lambda v: v.to_bytes(8, "little")[: struct.calcsize(layout)])


ARGUMENTS = {
    "decimalnl_short": NUMBERS.map(lambda v: b"%d\n" % v),
    "decimalnl_long": NUMBERS.map(lambda v: b"%dL\n" % v),
    "stringnl": LINES.map(lambda v: repr(v)[1:].encode() + b"\n"),
    "stringnl_noescape": LINES.map(lambda v: v + b"\n"),
    "stringnl_noescape_pair": st.sampled_from(NAMES).map(lambda v: v.replace(" ", "\n").encode() + b"\n"),
    "unicodestringnl": LINES.map(lambda v: v + b"\n"),
    "floatnl": st.floats().map(lambda v: b"%r\n" % v),
    "float8": st.floats().map(lambda v: struct.pack(">d", v)),
    **{
        k: packed_number(v) for k, v in dict(uint1="B", uint2="<H", int4="<i", uint4="<I", uint8="<Q").items()
    },
    **{k: counted("B") for k in ("string1", "bytes1", "unicodestring1", "long1")},
    **{k: counted("<i") for k in ("string4", "long4")},
    **{k: counted("<I") for k in ("bytes4", "unicodestring4")},
    **{k: counted("<Q") for k in ("bytes8", "unicodestring8", "bytearray8")},
}
OPCODES = st.sampled_from(pickletools.opcodes).flatmap(
    lambda op: (ARGUMENTS[op.arg.name] if op.arg else st.just(b"")).map(
        lambda v: op.code.encode("latin-1") + v
    )
)
IDIOMS = [
    b"(",
    b")",
    b"}",
    b"]",
    b"t",
    b"R",
    b"b",
    b"\x81",
    b"u",
    b"e",
    b"s",
    b"a",
    b"\x85",
    b"\x86",
    b"\x87",
    b"Q",
]
IDIOMS += [b"c%s\n%s\n" % tuple(n.encode().split()) for n in NAMES] + [
    b"h\x00",
    b"h\x01",
    b"q\x00",
    b"q\x01",
    b"N",
]
IDIOMS += [
    ARRAY,
    ARRAY + b")" + OBJECT + b"\x89](",
    ARRAY + b"K\x02\x85" + U1 + b"\x89U\x02abtb",
    SPARSE,
    SELECT,
    U1,
]
IDIOMS += [
    indices([0, 1, 2]),
    indices([0, 2]),
    b"K\x00",
    b"K\x01",
    b"K\x02",
    b"\x89",
    b"NNNJ\xff\xff\xff\xff",
]
IDIOMS += [
    text(k) for k in (b"x", b"a", b"idxs", b"data", b"indices", b"indptr", b"_shape", b"row", b"latin1")
]
IDIOMS += [b"(U\x07storagectorch\nFloatStorage\nU\x010U\x03cpuK\x04tQ"]


def test_random_opcodes(reader):
    @FUZZ
    @given(st.sampled_from(list(CARRIERS)), st.lists(OPCODES | st.sampled_from(IDIOMS), max_size=30))
    def run(carrier, parts):
        reader(CARRIERS[carrier](b"\x80\x04" + b"".join(parts) + b"."))

    run()
    assert reader.count > 100 and reader.good > 3


# damaged files

EXTREMES = [0, 1, 2, 127, 128, 255, 2**15, 2**16 - 1, 2**31 - 1, 2**31, 2**32 - 1, 2**62, 2**63, 2**64 - 1]
PLACES = st.floats(0, 1, exclude_max=True)
CHANGES = st.lists(
    st.tuples(
        st.sampled_from(["flip", "cut", "repeat", "move", "number", "insert"]),
        PLACES,
        PLACES,
        st.integers(0, 255),
    ),
    min_size=1,
    max_size=4,
)


def damaged(data: bytes, changes) -> bytes:
    """data after changes, each (what, where, where else, a number)."""
    for what, a, b, n in changes:
        i, j = int(a * len(data)), int(b * len(data))
        i, j = min(i, j), max(i, j)
        if what == "flip":
            data = data[:i] + bytes([n]) + data[i + 1 :]
        elif what == "cut":
            data = data[:i] + data[min(j, i + n) :]
        elif what == "repeat":
            data = data[:j] + data[i : i + n] * 3 + data[j:]
        elif what == "move":
            data = data[:i] + data[j : j + n] + data[i : i + n] + data[i + n :]
        elif what == "number":
            size = 2 ** (n % 4)
            data = (
                data[:i]
                + (EXTREMES[n % len(EXTREMES)] % 256**size).to_bytes(size, "little")
                + data[i + size :]
            )
        else:
            data = data[:i] + bytes([n]) * (n % 9) + data[i:]
    return data


def test_damaged_files(reader):
    @FUZZ
    @given(st.sampled_from(list(HONEST)), CHANGES)
    def run(kind, changes):
        reader(damaged(HONEST[kind], changes))

    run()
    assert reader.count > 100 and reader.good > 3


WHOLE = {
    "a": [1, 2.5, None, True, "ü" * 300],
    "t": torch.arange(6.0).view(2, 3),
    "n": np.arange(6).reshape(2, 3),
}
PICKLES = [v for k, v in HONEST.items() if k.startswith("pickle")]
PICKLES += [
    pickle.dumps(WHOLE | {"o": np.array([[1, "a"]], object), "s": np.array(["a"])}, p) for p in (0, 2, 4, 5)
]


def test_damaged_pickles_in_archives(reader):
    """Behind checksums that are right."""

    @FUZZ
    @given(st.sampled_from(list(CARRIERS)), st.sampled_from(PICKLES), CHANGES)
    def run(carrier, data, changes):
        reader(CARRIERS[carrier](damaged(data, changes)))

    run()
    assert reader.count > 100 and reader.good > 3


ARCHIVE = Parts(zipped({"a/data.pkl": EMPTY, "a/data/0": bytes(9)}))
HEADER = "{'descr': '<f8', 'fortran_order': False, 'shape': (2, 3), }"


def test_damaged_directories_and_headers(reader):
    @FUZZ
    @given(st.booleans(), CHANGES)
    def run(archive, changes):
        if archive:
            data = ARCHIVE.data[: ARCHIVE.entry] + damaged(ARCHIVE.data[ARCHIVE.entry :], changes)
        else:
            data = npy(damaged(HEADER.encode(), changes).decode("latin-1"), bytes(48))
        reader(data)

    run()
    assert reader.count > 100 and reader.good > 3
