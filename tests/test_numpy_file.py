"""Files of numpy.save and numpy.savez."""

import io
import struct
import zipfile

import numpy as np
import pytest
import torch

from rig_core import numpy_file
from rig_core.files import CheckpointError, read, read_tree
from tests.python2_pickle import Ch, dumps


def npy(array, **options) -> bytes:
    out = io.BytesIO()
    np.lib.format.write_array(out, array, **options)
    return out.getvalue()


def raw(header: str, data: bytes = b"", version=(1, 0)) -> bytes:
    """A .npy of that header."""
    size = struct.pack("<H" if version == (1, 0) else "<I", len(header))
    return b"\x93NUMPY" + bytes(version) + size + header.encode() + data


def found(path, data: bytes):
    path.write_bytes(data)
    return read_tree(path)


def refusal(path, data: bytes) -> str:
    with pytest.raises(CheckpointError) as e:
        found(path, data)
    assert str(path) in str(e.value) and "\n" not in str(e.value)
    return str(e.value)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "a.bin"  # the name says nothing


SAME = ["f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "?"]
WIDER = {"u2": "i4", "u4": "i8", "u8": "i8", ">f8": "f8", ">u2": "i4"}


@pytest.mark.parametrize("version", [(1, 0), (2, 0), (3, 0)])
def test_arrays_of_numbers(path, version):
    values = np.arange(210).reshape(5, 6, 7) % 11
    for kind, wanted in {k: k for k in SAME}.items() | WIDER.items():
        for a in (values.astype(kind), np.asfortranarray(values.astype(kind)), values[:0].astype(kind)):
            v = found(path, npy(a, version=version))
            assert v.numpy().dtype == np.dtype(wanted) and np.array_equal(v.numpy(), a)
    assert found(path, npy(np.array(2.5), version=version)).item() == 2.5


def test_arrays_longer_than_a_piece(path):
    a = np.random.default_rng(0).integers(0, 2**32, 300_001, dtype=np.uint32)
    for v in (found(path, npy(a)), found(path, archive(a=npy(a)))["a"], found(path, packed(a=npy(a)))["a"]):
        assert np.array_equal(v.numpy(), a)


def test_arrays_without_order_of_objects_and_strings(path):
    inner = {"face": np.arange(3), "tensor": torch.arange(4.0).view(2, 2), "name": "x"}
    v = found(path, npy(np.array(inner, dtype=object)))
    assert v["face"].tolist() == [0, 1, 2] and v["tensor"].tolist() == [[0, 1], [2, 3]] and v["name"] == "x"
    grid = np.array([[1, "a"], [None, 2.5]], dtype=object)
    assert found(path, npy(grid)) == found(path, npy(np.asfortranarray(grid))) == [[1, "a"], [None, 2.5]]
    assert found(path, npy(np.array(["ü", "ab"]))) == ["ü", "ab"]
    assert found(path, npy(np.array([[b"x"], [b"yz"]]))) == [["x"], ["yz"]]
    assert found(path, npy(np.array("neutral"))) == "neutral"


def test_arrays_of_python_2(path):
    header = "{'descr': '<f8', 'fortran_order': False, 'shape': (2L, 3L), }"
    assert found(path, raw(header, np.arange(6.0).tobytes())).tolist() == [[0, 1, 2], [3, 4, 5]]
    header = "{'descr': '|O8', 'fortran_order': False, 'shape': (), }     \n"
    pickled = dumps(np.array({"x": Ch(np.arange(2.0)), "s": "a"}, dtype=object))
    v = found(path, raw(header, pickled))
    assert v["x"].tolist() == [0, 1] and v["s"] == "a"


def archive(compression=zipfile.ZIP_STORED, **members) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", compression) as z:
        for name, data in members.items():
            z.writestr(f"{name}.npy", data)
    return out.getvalue()


def packed(**members) -> bytes:
    return archive(zipfile.ZIP_DEFLATED, **members)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_archives(path, save):
    tree = {
        "mean": np.random.default_rng(0).random((20, 3)),
        "tex_dir": np.zeros((64, 64, 3, 20), np.float32),
    }
    tree |= {
        "objects": np.array({"a": np.arange(3)}, dtype=object),
        "gender": np.array("neutral"),
        "f": np.eye(3, dtype="u4"),
    }
    out = io.BytesIO()
    save(out, **tree)
    v = found(path, out.getvalue())
    assert list(v) == list(tree) and v["objects"]["a"].tolist() == [0, 1, 2] and v["gender"] == "neutral"
    for k in ("mean", "tex_dir", "f"):
        assert np.array_equal(v[k].numpy(), tree[k]), k
    with pytest.raises(CheckpointError, match="holds no data.pkl"):
        read(path)


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ("{'descr': '<f8', 'fortran_order': False, 'shape': (3,), }", r"of shape \(3,\) has 16 bytes"),
        ("{'descr': '<f8', 'fortran_order': False, 'shape': (1,), }", r"of shape \(1,\) has 16 bytes"),
        ("{'descr': '<f8', 'fortran_order': False, 'shape': (-2,), }", "refused an array of type"),
        ("{'descr': '<f8', 'fortran_order': False, 'shape': (2.0,), }", "refused an array of type"),
        ("{'descr': '<f8', 'fortran_order': False, 'shape': (1+1,), }", "refused an array of type"),
        ("{'descr': '<f8', 'fortran_order': __import__('os'), 'shape': (2,), }", "refused an array of type"),
        ("{'descr': [('a', '<f8')], 'fortran_order': False, 'shape': (2,), }", "refused an array of type"),
        ("{'descr': ('<f8', (2,)), 'fortran_order': False, 'shape': (1,), }", "refused an array of type"),
        ("{'descr': '|V8', 'fortran_order': False, 'shape': (2,), }", "NumPy array of type '|V8'"),
        ("{'descr': '<c16', 'fortran_order': False, 'shape': (1,), }", "NumPy array of type '<c16'"),
        ("{'descr': '<M8', 'fortran_order': False, 'shape': (2,), }", "NumPy array of type '<M8'"),
        ("{'descr': '2f8,O', 'fortran_order': False, 'shape': (1,), }", "NumPy array of type '2f8,O'"),
        ("{'descr': '<f8', 'fortran_order': False, 'shape': (281474976710656,), }", "not made of sizes"),
        ("{'descr': '<f8', 'fortran_order': False, 'shape': (99999999999, 99999999999), }", "has 16 bytes"),
        ("{'descr': '<f8', 'fortran_order': False, 'shape': (" + "1, " * 33 + "), }", "shape is not one"),
        ("{'descr': '<f8', 'fortran_order': False}", "refused an array of type"),
        ("", "refused an array of type"),
        ("(" * 9000, "refused an array of type"),
        (" " * 10_001, "a header of 10001 bytes"),
    ],
)  # fmt: skip
def test_odd_headers(path, header, message):
    data = bytes(16)
    assert message.replace("\\", "") in refusal(path, raw(header, data))
    assert message.replace("\\", "") in refusal(path, archive(a=raw(header, data)))
    assert message.replace("\\", "") in refusal(path, packed(a=raw(header, data)))


def test_false_lengths(path):
    assert "a header of 4294967295 bytes" in refusal(path, b"\x93NUMPY\x02\x00\xff\xff\xff\xff" + bytes(99))
    assert "without its header" in refusal(path, b"\x93NUMPY\x04\x00" + bytes(99))
    assert "without its header" in refusal(path, archive(a=b"P5 no array"))
    assert "it is cut" in refusal(path, archive(a=b""))
    assert "holds no data.pkl" in refusal(path, archive())
    out = io.BytesIO(archive(a=npy(np.eye(3))))
    with zipfile.ZipFile(out, "a") as z:
        z.writestr("readme.txt", "x")
    assert "its member 'readme.txt' is no array" in refusal(path, out.getvalue())


def test_what_inflates_is_bounded_by_the_header(path, monkeypatch):
    zeros = npy(np.zeros(10**6, np.uint8))
    assert not found(path, packed(a=zeros))["a"].any()  # 10^6 of a thousand bytes, honestly
    assert "has 1100000 bytes" in refusal(path, packed(a=zeros + bytes(100_000)))
    assert "more memory" in refusal(path, packed(a=npy(np.array([bytes(4 * 10**7)], dtype=object))))
    monkeypatch.setattr(numpy_file, "LARGEST", 10**6 + 200)
    assert len(found(path, packed(a=zeros, b=zeros))) == 2
    assert "together" in refusal(path, packed(a=zeros, b=zeros, c=zeros))
    assert "refused arrays of more than" in refusal(path, packed(a=npy(np.zeros(10**6 + 100, np.uint8))))
    assert len(found(path, archive(a=npy(np.zeros(2 * 10**6, np.uint8))))["a"]) == 2 * 10**6  # stored


def test_a_member_that_inflates_to_more_than_it_claims(path):
    data = npy(np.zeros(10**6, np.uint8))
    honest = packed(a=data)
    size = struct.pack("<L", len(data))
    assert honest.count(size) == 2
    for claim in (len(data) - 10**5, len(data) + 1):
        assert "bytes" in refusal(path, honest.replace(size, struct.pack("<L", claim)))
    header = npy(np.zeros(10**5, np.uint8))[:128]
    lying = packed(a=header + bytes(10**7))
    member = struct.pack("<L", 128 + 10**7)
    assert "'a.npy' is damaged" in refusal(path, lying.replace(member, struct.pack("<L", 128 + 10**5)))
    assert "from" in refusal(path, lying.replace(member, struct.pack("<L", 2**31 - 1)))
