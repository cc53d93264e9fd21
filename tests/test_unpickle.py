"""Pickles are read, those of Python 2 with chumpy and scipy too, and nothing of them is executed."""

import hashlib
import io
import pickle
import struct
import sys
import types
import zipfile
from collections import OrderedDict, defaultdict

import numpy as np
import pytest
import torch
from scipy import sparse

from rig_core import files, torch_file
from rig_core.arrays import Budget, Sparse
from rig_core.files import CheckpointError
from rig_core.opcodes import opcodes
from rig_core.unpickle import Record, Refused, weights
from rig_core.unpickle import load as load_raw
from tests.hostile import archive, storage_pickle
from tests.hostile_pickles import ARRAY, U1, number
from tests.python2_pickle import Ch, Csc, Unicode, dumps

PROTOCOLS = pytest.mark.parametrize("protocol", range(6))
PYTHON2 = pytest.mark.parametrize("protocol", [0, 2])


def load(data: bytes) -> object:
    return torch_file.read_pickle(io.BytesIO(data), len(data), Budget.of(len(data)))


def raw(data: bytes) -> object:
    """What is in a pickle before it becomes plain."""
    return load_raw(io.BytesIO(data), len(data), Budget.of(len(data)))


def same(found: torch.Tensor, wanted: np.ndarray, dtype=None) -> bool:
    return np.array_equal(found.numpy(), wanted) and found.numpy().dtype == (dtype or wanted.dtype)


# Python 3


@PROTOCOLS
def test_plain_values(protocol):
    tree = {
        "s": "ü€😀\n\\",
        "b": b"\0\xff",
        "i": [0, -1, 255, 2**16, -(2**31), 2**40, 2**80],
        "f": [0.1, -1e300],
    }
    tree |= {"t": (1, (2, 3, 4, 5), ()), "n": None, "ok": [True, False], 3: {}, "list": list(range(3000))}
    tree |= {"long": "ü" * 1000, "bytes": bytes(range(256)) * 9, "array": bytearray(b"xy"), "set": {7}}
    tree |= {
        "frozen": frozenset([8]),
        "empty": b"",
        "o": OrderedDict(b=1, a=2),
        "d": defaultdict(dict, {"k": 1}),
    }
    found = load(pickle.dumps(tree, protocol))
    assert found.pop("t") == [1, [2, 3, 4, 5], []]
    assert (found.pop("set"), found.pop("frozen"), found.pop("array")) == ([7], [8], b"xy")
    assert list(found["o"]) == ["b", "a"]
    assert found == {k: v for k, v in tree.items() if k not in ("t", "set", "frozen", "array")}
    assert type(found["ok"][0]) is bool and type(found["i"][0]) is int


NUMBERS = {"f2": "f2", "f4": "f4", "f8": "f8", "i1": "i1", "i2": "i2", "i4": "i4", "i8": "i8", "u1": "u1"}
NUMBERS |= {"u2": "i4", "u4": "i8", "u8": "i8", "?": "?", ">f4": "f4", ">i8": "i8", ">u2": "i4"}


@PROTOCOLS
def test_arrays_become_tensors(protocol):
    a = np.arange(24).reshape(2, 3, 4) % 7 - 1.0
    arrays = {k: a.astype(k) if k[-2] != "u" else np.abs(a).astype(k) for k in NUMBERS if k != "?"}
    arrays |= {"?": a > 2}
    for k, v in load(pickle.dumps(arrays, protocol)).items():
        assert same(v, arrays[k], np.dtype(NUMBERS[k])), k
    layouts = {
        "f": np.asfortranarray(a),
        "turned": a.transpose(1, 0, 2),
        "part": a[:, ::2],
        "none": a[:0],
        "one": a[0, 0, 0],
    }
    layouts["number"] = np.array(3.5)
    found = load(pickle.dumps(layouts, protocol))
    assert found.pop("one") == layouts.pop("one") and found["number"].shape == ()
    assert all(same(v, layouts[k]) for k, v in found.items())
    found["f"][0, 0, 0] = 5  # is its own


def test_unsigned_numbers_keep_their_value():
    found = load(
        pickle.dumps([np.array([n], t) for t, n in (("u2", 2**16 - 1), ("u4", 2**32 - 1), ("u8", 2**63 - 1))])
    )
    assert [v.item() for v in found] == [2**16 - 1, 2**32 - 1, 2**63 - 1]
    with pytest.raises(ValueError, match="beyond 64 bits"):
        load(pickle.dumps(np.array([2**63], "u8")))


@PROTOCOLS
def test_arrays_of_objects_and_strings(protocol):
    grid = np.array([[1, "a"], [None, np.arange(3)], [{"k": 2.5}, [1]]], dtype=object)
    tree = [
        grid,
        np.asfortranarray(grid),
        np.array({"a": 1}, dtype=object),
        np.array(["ab", "c"]),
        np.array([b"x", b"yz"]),
    ]
    found = load(pickle.dumps(tree, protocol))
    for v in found[:2]:
        assert (
            v[0] == [1, "a"]
            and v[1][0] is None
            and v[1][1].tolist() == [0, 1, 2]
            and v[2] == [{"k": 2.5}, [1]]
        )
    assert found[2:] == [{"a": 1}, ["ab", "c"], ["x", "yz"]]
    assert load(pickle.dumps(np.zeros((0, 3), object), protocol)) == []


@PROTOCOLS
def test_numbers_of_numpy(protocol):
    found = load(
        pickle.dumps([np.float32(2.5), np.int64(-3), np.bool_(True), np.str_("ab"), np.uint8(200)], protocol)
    )
    assert found == [2.5, -3, True, "ab", 200] and [type(v) for v in found] == [float, int, bool, str, int]


@PROTOCOLS
def test_tensors_in_bare_pickles(protocol):
    x = torch.arange(12.0).view(3, 4)
    found = load(
        pickle.dumps({"x": x, "half": x.half()[1:, ::2], "i": torch.tensor([5]), "none": x[:0]}, protocol)
    )
    assert torch.equal(found["x"], x) and torch.equal(found["half"], x.half()[1:, ::2])
    assert found["i"].tolist() == [5] and found["none"].shape == (0, 4)


@PROTOCOLS
@pytest.mark.parametrize(
    "kind", ["csc_matrix", "csr_matrix", "coo_matrix", "csc_array", "csr_array", "coo_array"]
)
def test_sparse_matrices(protocol, kind):
    dense = np.array([[0, 1.5, 0, 2], [0, 0, 0, 0], [-3, 0, 0, 4]])
    found = load(pickle.dumps(getattr(sparse, kind)(dense), protocol))
    assert isinstance(found, Sparse) and found.shape == (3, 4) and len(found.values) == 4
    assert same(found.dense(12), dense)
    with pytest.raises(ValueError, match="3 x 4"):
        found.dense(11)


def test_elements_of_sparse_matrices_that_appear_twice_add_up():
    twice = sparse.coo_matrix(([1.0, 2.0, 4.0], ([0, 0, 1], [1, 1, 0])), (2, 2))
    assert load(pickle.dumps(twice)).dense(4).tolist() == [[0, 3], [4, 0]]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(indices=np.array([0, 3], "i4")), "lie outside"),
        (dict(indices=np.array([0, -1], "i4")), "do not fit"),
        (dict(indices=np.array([0.0, 1.0])), "do not fit"),
        (dict(indptr=np.array([0, 2, 1], "i4")), "do not follow"),
        (dict(indptr=np.array([0, 1, 3], "i4")), "do not follow"),
        (dict(indptr=np.array([0, 2], "i4")), "do not fit"),
        (dict(data=np.ones(3)), "different lengths"),
        (dict(data=[1, 2]), "lie outside"),
        (dict(_shape=(2, 2, 2)), "shape"),
        (dict(_shape=(-2, 2)), "shape"),
        (dict(_shape=(2**40, 2)), None),
    ],
)
def test_sparse_matrices_that_do_not_fit(change, message):
    matrix = sparse.csc_matrix(np.eye(2))
    matrix.__dict__.update(change)
    if message:
        with pytest.raises(ValueError, match=message):
            load(pickle.dumps(matrix))
    else:
        with pytest.raises(ValueError, match="at most"):
            load(pickle.dumps(matrix)).dense(10**6)


# Python 2


def head():
    """A small model like FLAME's."""
    v = 30
    f, j = np.arange(12).reshape(4, 3).astype(np.uint32), np.eye(3, v) * 0.5 + np.eye(3, v, 2) * 0.25
    kintree = np.array([[2**32 - 1, 0, 1], [0, 1, 2]])
    tree = {
        "quote": "it's \n\x00\xff",
        "be": np.arange(3).astype(">i4"),
        "posedirs": np.asfortranarray(np.arange(v * 6.0).reshape(v, 3, 2)),
    }
    tree |= {"bs_type": Unicode("lrot€min\\"), "fl": 2.5, "v_template": Ch(np.arange(v * 3.0).reshape(v, 3))}
    tree |= {"many": list(range(2500)), "bs_style": "lbs", "e": (), "f": f, "both": "'\""}
    return tree | {"J_regressor": Csc(j), "kintree_table": kintree, "t": (1, 2, 3, 4), "n": -3}


@pytest.mark.parametrize(
    ("protocol", "digest"),
    [
        (0, "7c5a374c07c983c979af495a2826058610d4ab85cbffcc3f91110c14d92ede34"),
        (2, "2f59567e5f178ea1e0f9cee3bc53071ffbe81fa0a70c98178ed66c555150c07e"),
    ],
)
def test_the_stand_in_for_python_2_is_faithful(protocol, digest):
    """digest: of what pickle.dumps of Python 2.7.18 gave with NumPy 1.16.6, SciPy 1.2.3 and chumpy 0.70."""
    tree = {"a": np.arange(3.0), "x": Ch(np.arange(2.0)), "j": Csc(np.eye(2))}
    assert hashlib.sha256(dumps(tree, protocol)).hexdigest() == digest


@PYTHON2
def test_files_of_python_2(protocol, tmp_path):
    tree = head()
    (tmp_path / "generic_model.pkl").write_bytes(dumps(tree, protocol))
    found = files.read_tree(tmp_path / "generic_model.pkl")
    assert list(found) == list(tree)
    assert same(found["v_template"], tree["v_template"].x) and same(found["posedirs"], tree["posedirs"])
    assert same(found["f"], tree["f"].astype("i8")) and same(found["be"], tree["be"].astype("i4"))
    assert same(found["J_regressor"].dense(90), tree["J_regressor"].array)
    assert found["J_regressor"].rows.dtype == torch.int32
    assert same(found["kintree_table"], tree["kintree_table"])
    assert found["t"] == [1, 2, 3, 4] and found["e"] == []
    assert all(found[k] == tree[k] for k in ("quote", "bs_type", "fl", "many", "bs_style", "both", "n"))
    assert type(found["bs_type"]) is str


@PYTHON2
def test_every_byte_of_an_array_of_python_2(protocol):
    """Longer than what is read at once; escapes fall on every place."""
    a = np.arange(200_003, dtype=np.uint32).view(np.uint8)
    assert same(load(dumps(a, protocol)), a)
    for filler in (b"\\", b"'", b'"', b"\n", b"a\\"):
        a = np.frombuffer((filler * 200_000)[:200_003], np.uint8)
        assert same(load(dumps({"a": a}, protocol))["a"], a)


def chumpy(monkeypatch):
    """Classes that pickle under chumpy's names."""
    found = {}
    for module, name in (("chumpy.ch", "Ch"), ("chumpy.reordering", "Select"), ("chumpy.ch", "MatVecMult")):
        m = sys.modules.get(module) or types.ModuleType(module)
        monkeypatch.setitem(sys.modules, "chumpy", types.ModuleType("chumpy"))
        monkeypatch.setitem(sys.modules, module, m)
        found[name] = type(name, (), {"__module__": module, "__init__": lambda s, **k: s.__dict__.update(k)})
        setattr(m, name, found[name])
    return types.SimpleNamespace(**found)


@PROTOCOLS
def test_chumpy_selections(protocol, monkeypatch):
    ch, x = chumpy(monkeypatch), np.arange(12.0).reshape(3, 4)
    part = ch.Select(a=ch.Ch(x=x), idxs=np.array([1, 0, 7]), preferred_shape=(3, 1), _cache=None)
    flat = ch.Select(a=part, idxs=np.array([2, 2]))
    found = load(pickle.dumps({"part": part, "flat": flat}, protocol))
    assert found["part"].tolist() == [[1], [0], [7]] and found["flat"].tolist() == [7, 7]
    for change in (dict(idxs=np.array([12])), dict(preferred_shape=(4,)), dict(idxs=[0]), dict(a=1)):
        bad = ch.Select(**{**part.__dict__, **change})
        with pytest.raises(ValueError, match="chumpy selection"):
            load(pickle.dumps(bad, protocol))


@PROTOCOLS
def test_chumpy_expressions_are_refused_by_name(protocol, monkeypatch):
    ch = chumpy(monkeypatch)
    with pytest.raises(Refused, match=r"'chumpy\.ch\.MatVecMult'"):
        load(pickle.dumps({"v": ch.MatVecMult(mtx=np.eye(2), vec=np.ones(2))}, protocol))
    with pytest.raises(ValueError, match="Tensor expected, NoneType found"):
        load(pickle.dumps(ch.Ch(y=np.eye(2)), protocol))
    loop = ch.Ch()
    loop.x = loop
    with pytest.raises(Refused, match="in itself"):
        load(pickle.dumps(loop, protocol))


# limits


def tree(text: bytes) -> bytes:
    return b"\x80\x02" + text + b"."


NEW, KIND = b"ccopy_reg\n_reconstructor\n(", b"cnumpy\ndtype\n(U"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"ccollections\nOrderedDict\n}U\x01aK\x01sb", "setting the state of 'collections.OrderedDict'"),
        (b"ctorch\nFloatStorage\n)R", "calling 'torch.FloatStorage'"),
        (b"))R", "calling a tuple"),
        (b"ccollections\nOrderedDict\n(" + b"N" * 10 + b"tR", "with 10 values"),
        (b"ccollections\ndefaultdict\nccollections\ndefaultdict\n\x85R", "calling 'collections.defaultdict'"),
        (b"Pabc\n", "PERSID"),
        (b"(ios\nsystem\n", "opcode INST"),
        (b"\x82\x01", "opcode EXT1"),
        (b"})K\x01s", "key"),
        (b"}\x8a\x09" + (2**64).to_bytes(9, "little") + b"K\x01s", "key"),
        (KIND + b"\x0a(9,9)f8,i4K\x00K\x01tR", r"type '\(9,9\)f8,i4'"),
        (KIND + b"\x02V8K\x00K\x01tR", "type 'V8'"),
        (KIND + b"\x03c16K\x00K\x01tR", "type 'c16'"),
        (KIND + b"\x02i4K\x00K\x01tR(K\x03U\x01<N(U\x01atNK\x00K\x00K\x00tb", "array of records"),
        (NEW + b"c__builtin__\ndict\nc__builtin__\nobject\nNtR", "calling 'builtins.dict'"),
        (NEW + b"cchumpy.ch\nCh\nc__builtin__\ndict\nNtR", "calling 'copyreg._reconstructor'"),
    ],
)
def test_allowed_names_do_nothing_unexpected(text, message):
    with pytest.raises(Refused, match=message):
        load(tree(text))


def test_arrays_have_the_bytes_that_they_claim():
    for n in (1, 3, 2**40):
        with pytest.raises(ValueError, match=f"array of shape .{n},. has (fewer|more) bytes"):
            load(tree(ARRAY + number(n) + b"\x85" + U1 + b"\x89U\x02abtb"))
    assert load(tree(ARRAY + number(2) + b"\x85" + U1 + b"\x89U\x02abtb")).tolist() == [97, 98]


def test_pickles_end_where_they_are_told_to():
    """In an archive something else follows."""
    for data, end in (
        (b"\x80\x02N.", 3),
        (b"\x80\x02K\x01.", 3),
        (b"\x80\x02U\x05abcde.", 7),
        (b"I1234\n.", 4),
    ):
        assert list(opcodes(io.BytesIO(data), len(data)))[-1] == ("stop", None)
        with pytest.raises(ValueError, match="end|claimed"):
            list(opcodes(io.BytesIO(data), end))
    with pytest.raises(ValueError, match="a string of 2147483648 bytes is claimed"):
        list(opcodes(io.BytesIO(b"\x80\x02X\x00\x00\x00\x80abc."), 11))


def test_names_are_text_once_they_are_data():
    assert load(tree(b"cpytorch_lightning.callbacks.x\nC\n")) == "pytorch_lightning.callbacks.x.C"


def test_nesting_and_repetition_are_bounded():
    def nested(depth):
        value = 1
        for _ in range(depth):
            value = [value]
        return value

    assert load(pickle.dumps(nested(100))) == nested(100)
    with pytest.raises(Refused, match="nested more than 100 deep"):
        load(pickle.dumps(nested(101)))
    parts = [[]]
    for _ in range(120):
        parts.append([parts[-1]])
    with pytest.raises(Refused, match="nested more than 100 deep"):  # those inside come first
        load(pickle.dumps(parts))
    shared = [1.0] * 1000
    assert load(pickle.dumps([shared] * 1000)) == [shared] * 1000
    for _ in range(8):
        shared = [shared] * 10
    with pytest.raises(Refused, match="repeats itself"):
        load(pickle.dumps(shared))
    loop = []
    loop.append(loop)
    with pytest.raises(Refused, match="in itself"):
        load(pickle.dumps(loop))


def test_one_string_cannot_become_many_arrays():
    """A small file must not fill the memory."""
    empty, n = b"cnumpy.core.multiarray\n_reconstruct\n)R(K\x01J\x40\x42\x0f\x00\x85", 10**6
    kind = b"cnumpy\ndtype\n(U\x02u1K\x00K\x01tRq\x01"
    first = empty + kind + b"\x89T\x40\x42\x0f\x00" + bytes(n) + b"q\x02tb"
    again = empty + b"h\x01\x89h\x02tb"
    assert [len(v) for v in load(tree(b"](" + first + again * 2 + b"e"))] == [n] * 3
    with pytest.raises(Refused, match="more memory"):
        load(tree(b"](" + first + again * 60 + b"e"))


# torch.save

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32]
DTYPES += [torch.int16, torch.int8, torch.uint8, torch.bool]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("protocol", "zipped"), [(2, True), (4, True), (2, False)])
def test_tensors_of_every_type(tmp_path, dtype, protocol, zipped):
    x = (torch.randn(4, 6) * 10).to(dtype)
    tree = {"whole": x, "view": x[1:, ::2], "T": x.t(), "empty": x[:0], "number": x[0, 0]}
    tree["parameter"] = torch.nn.Parameter(torch.randn(3))
    torch.save(tree, tmp_path / "a.pt", pickle_protocol=protocol, _use_new_zipfile_serialization=zipped)
    found, meta = files.read(tmp_path / "a.pt")
    assert meta == {} and found.keys() == tree.keys()
    assert all(torch.equal(found[k], v) and found[k].dtype == v.dtype for k, v in tree.items())


@pytest.mark.parametrize("zipped", [True, False])
def test_trees_of_torch_save(tmp_path, zipped):
    x = torch.randn(3)
    tree = {"a": [x, {"b": x[1:]}], "n": 3, "s": "x", "size": x.shape, "np": np.arange(3)}
    torch.save(tree, tmp_path / "a.pt", _use_new_zipfile_serialization=zipped)
    found = files.read_tree(tmp_path / "a.pt")
    assert torch.equal(found["a"][0], x) and torch.equal(found["a"][1]["b"], x[1:])
    assert found["a"][0].data_ptr() + 4 == found["a"][1]["b"].data_ptr()  # one memory, as saved
    assert (found["n"], found["s"], found["size"], found["np"].tolist()) == (3, "x", [3], [0, 1, 2])
    torch.save(x, tmp_path / "x.pt", _use_new_zipfile_serialization=zipped)
    assert torch.equal(files.read_tree(tmp_path / "x.pt"), x)


@pytest.mark.parametrize(
    ("claims", "message"),
    [
        (dict(count=10**12, shape=(10**12,)), "claims 1000000000000 x torch.float32, has 16 bytes"),
        (dict(count=3, shape=(3,)), "claims 3 x"),
        (dict(count=-1, shape=()), "claims -1 x"),
        (dict(count=4, shape=(5,)), r"shape \[5\] in a storage of 4"),
        (dict(count=4, shape=(10**6, 10**6), stride=(0, 0)), "in a storage of 4"),
        (dict(count=4, shape=(2, 2), stride=(3, 1)), "reaches past"),
        (dict(count=4, shape=(2,), offset=3), "reaches past"),
        (dict(count=4, shape=(0,), offset=5), "reaches past"),
        (dict(count=4, shape=(2,), offset=-1), "numbers"),
        (dict(count=4, shape=(2,), stride=("x" * 9,)), "numbers"),
        (dict(count=4, shape=(1,) * 40), "in a storage of 4"),
        (dict(count=4, shape=(4,), key="../../x"), "storage ../../x is missing"),
    ],
)
def test_false_claims_about_sizes(tmp_path, claims, message):
    path = archive(tmp_path / "a.pt", storage_pickle(**claims), [("data/0", bytes(16))])
    with pytest.raises(CheckpointError, match=message):
        files.read(path)
    good = archive(tmp_path / "b.pt", storage_pickle(4, (2, 2)), [("data/0", struct.pack("<4f", 1, 2, 3, 4))])
    assert files.read(good)[0]["a"].tolist() == [[1, 2], [3, 4]]


def test_archives_that_claim_too_much(tmp_path):
    zeros = ("data/0", bytes(10**6))
    packed = archive(tmp_path / "a.pt", storage_pickle(250_000, (250_000,)), [zeros], zipfile.ZIP_DEFLATED)
    with pytest.raises(CheckpointError, match="compressed"):
        files.read(packed)
    twice = archive(tmp_path / "b.pt", storage_pickle(250_000, (250_000,)), [zeros])
    good = twice.read_bytes()
    assert len(files.read(twice)[0]["a"]) == 250_000
    twice.write_bytes(good.replace(struct.pack("<I", 10**6), struct.pack("<I", 10**9)))
    with pytest.raises(CheckpointError, match="more bytes than the file has"):
        files.read(twice)
    flipped = bytearray(good)
    flipped[good.index(bytes(1000)) + 500] = 1
    twice.write_bytes(flipped)
    with pytest.raises(CheckpointError, match="'archive/data/0' is damaged"):
        files.read(twice)


def test_large_archives(tmp_path):
    """The directory of 64 bits that archives of more than 4 GB or 65535 members have."""
    path = tmp_path / "a.pt"
    archive(path, storage_pickle(4, (4,)), [("data/0", struct.pack("<4f", 1, 2, 3, 4))])
    raw = path.read_bytes()
    end = raw.rindex(b"PK\x05\x06")
    n, length, at = struct.unpack_from("<H2L", raw, end + 10)
    record = b"PK\x06\x06" + struct.pack("<Q2H2L4Q", 44, 45, 45, 0, 0, n, n, length, at)
    locator = b"PK\x06\x07" + struct.pack("<LQL", 0, end, 1)
    wide = raw[:end] + record + locator + raw[end : end + 8] + b"\xff" * 12 + raw[end + 20 :]
    path.write_bytes(wide)
    assert files.read(path)[0]["a"].tolist() == [1, 2, 3, 4]
    # an entry whose numbers are in its extra field
    entry = raw.rindex(b"PK\x01\x02", 0, end)
    crc, packed, size, name = struct.unpack_from("<3LH", raw, entry + 16)
    (local,) = struct.unpack_from("<L", raw, entry + 42)
    extra = struct.pack("<2H3Q", 1, 24, size, packed, local)
    changed = bytearray(raw[entry : entry + 46 + name])
    struct.pack_into("<2L", changed, 20, 2**32 - 1, 2**32 - 1)
    struct.pack_into("<H", changed, 30, len(extra))
    struct.pack_into("<L", changed, 42, 2**32 - 1)
    tail = bytearray(raw[end:])
    struct.pack_into("<L", tail, 12, length + len(extra))
    path.write_bytes(raw[:entry] + changed + extra + tail)
    assert files.read(path)[0]["a"].tolist() == [1, 2, 3, 4]


# networks pickled whole


def test_records_cannot_be_called_or_nested_without_end():
    linear = b"\x80\x02ctorch.nn.modules.linear\nLinear\n"
    assert raw(linear + b")\x81.").state == {}
    for text, message in [
        (b"K\x01K\x02\x86R.", "calling 'torch.nn.modules.linear.Linear'"),
        (b")\x81)R.", "calling a Record"),
        (b")\x81)b.", "damaged pickle: dict expected"),
        (b")\x81}(K\x01K\x02ub.", None),
        (b")\x81(K\x01K\x02u.", "damaged pickle: dict expected"),
    ]:
        if message is None:
            assert weights(raw(linear + text), Budget.of(0)) == {}
        else:
            with pytest.raises(ValueError, match=message):
                raw(linear + text)
    with pytest.raises(Refused, match="an object of 'torch.nn.modules.linear.Linear'"):
        load(linear + b")\x81.")
    backend = b"ctorch.nn.backends.thnn\n_get_thnn_function_backend\n)R"
    assert raw(linear + b")\x81}X\x08\x00\x00\x00_backend" + backend + b"sb.").state == {"_backend": None}
    deep = Record("models.ResNet", {})
    for _ in range(30):
        deep = Record("models.ResNet", {"_modules": {"a": deep}})
    with pytest.raises(Refused, match="too deep"):
        weights(deep, Budget.of(0))
    one = {f"{i:0100}": None for i in range(1000)}
    wide = {str(i): Record("models.ResNet", {"_parameters": one}) for i in range(1000)}
    with pytest.raises(Refused, match="more memory"):
        weights(Record("models.ResNet", {"_modules": wide}), Budget.of(0))
