"""Pickles that attack who reads them: by what they call, by what they claim, by what they grow into."""

import os
import pickle
import struct

import numpy as np
import torch

from rig_core.torch_file import LEGACY
from tests.hostile import Call


def text(value: bytes) -> bytes:
    return b"X" + struct.pack("<I", len(value)) + value


def number(value: int) -> bytes:
    return b"\x8a\x08" + struct.pack("<q", value)


def stream(structure: bytes, keys=(), data: bytes = b"") -> bytes:
    """A file as torch.save's before PyTorch 1.6."""
    machine = {"protocol_version": 1001, "little_endian": True, "type_sizes": {}}
    ends = [pickle.dumps(v, 2) for v in (1001, machine, list(keys))]
    return LEGACY + ends[0] + ends[1] + structure + ends[2] + data


# calls

COMMANDS = (
    "os system, posix system, nt system, subprocess Popen, subprocess getoutput, pty spawn, webbrowser open, "
    "asyncio run, shutil rmtree, torch load, torch.jit load, torch.hub load, numpy load, "
    "torch.serialization load, chumpy.ch MatVecMult, chumpy.ch_ops add, scipy.sparse linalg.eigs, "
    "numpy.core.multiarray fromfile, _frozen_importlib_external SourceFileLoader"
).split(", ")
PYTHON = (
    "builtins eval, builtins exec, __builtin__ eval, __builtin__ execfile, builtins compile, builtins open, "
    "builtins __import__, io open, builtins getattr, __builtin__ apply, builtins map, builtins type, "
    "importlib import_module, runpy run_path, code interact, timeit timeit, pickle loads, _pickle loads, "
    "marshal loads, types FunctionType, functools partial, operator attrgetter, operator methodcaller, "
    "copyreg __newobj_ex__, copyreg add_extension, sys exit, numpy.testing._private.utils runstring, "
    "numpy.f2py.crackfortran getlincoef, torch._inductor.codecache compile_file, "
    "torch._dynamo.guards GuardBuilder.get, torch.utils._config_module ConfigModule.load_config, "
    "collections OrderedDict.__init__.__globals__, numpy ndarray.__class__, "
    "torch.nn.modules.module Module.__setstate__, torch.nn.modules.linear Linear.__init__.__globals__"
).split(", ")


def command(mark: str) -> bytes:
    return text(f"touch {mark}".encode())


def python(mark: str) -> bytes:
    return text(f"open({mark!r}, 'w')".encode())


def ways(target: str, argument: bytes) -> dict[str, bytes]:
    """Those in which a pickle calls something with an argument."""
    module, name = target.encode().split(b" ")
    line = b"c" + module + b"\n" + name + b"\n"
    return {
        "GLOBAL": b"\x80\x02" + line + argument + b"\x85R.",
        "STACK_GLOBAL": b"\x80\x04" + text(module) + text(name) + b"\x93" + argument + b"\x85R.",
        "INST": b"(" + argument + b"i" + line[1:] + b".",
        "OBJ": b"(" + line + argument + b"o.",
        "NEWOBJ": b"\x80\x02" + line + argument + b"\x85\x81.",
        "NEWOBJ_EX": b"\x80\x04" + line + argument + b"\x85}\x92.",
        "BUILD": b"\x80\x02" + line + argument + b"b.",
        "extension code": b"\x80\x02\x82\x01" + argument + b"\x85R.",
        "items": b"\x80\x02ccollections\nOrderedDict\n](" + line + argument + b"\x85RNe\x85R.",
        "state": b"\x80\x02cchumpy.ch\nCh\n)\x81}" + text(b"x") + line + argument + b"\x85Rsb.",
        "key": b"\x80\x02}" + line + argument + b"\x85RK\x01s.",
        "persistent id": b"\x80\x02" + line + argument + b"\x85RQ.",
        "_reconstructor": b"ccopy_reg\n_reconstructor\n(" + line + b"c__builtin__\nobject\nNtR.",
        "__newobj__": b"ccopy_reg\n__newobj__\n(" + line + argument + b"tR.",
        "defaultdict": b"ccollections\ndefaultdict\n(" + line + argument + b"tR.",
    }


def calls(mark: str) -> dict[str, bytes]:
    """Each would make the file `mark`, or do something else."""
    found = {}
    for target in COMMANDS + PYTHON:
        argument = command(mark) if target in COMMANDS else python(mark)
        found[target] = ways(target, argument)["GLOBAL"]
    found |= {f"{way} of posix system": data for way, data in ways("posix system", command(mark)).items()}
    for p in range(6):
        nested = Call(Call, Call(eval, f"open({mark!r}, 'w')"))
        found[f"reduce, protocol {p}"] = pickle.dumps({"a": [Call(os.system, f"touch {mark}")]}, p)
        found[f"nested reduce, protocol {p}"] = pickle.dumps(nested, p)
        found[f"reduce in an array, protocol {p}"] = pickle.dumps(np.array([nested], object), p)
    called = command(mark) + b"\x85R."
    found["computed name"] = b"\x80\x04c_codecs\nencode\n" + text(b"os") + text(b"latin1") + b"\x86R"
    found["computed name"] += text(b"system") + b"\x93" + called
    found["name out of the memo"] = b"\x80\x04" + text(b"posix") + b"q\x00" + text(b"system") + b"q\x01"
    found["name out of the memo"] += b"h\x00h\x01\x93" + called
    name = text("os\nsystem\x1b[31m\u202e\x85".encode()) + text(b"x\r\ny")
    return (
        found
        | {
            "name with line breaks": b"\x80\x04" + name + b"\x93" + called,
            "name of numbers": b"\x80\x04K\x01K\x02\x93.",
            "name without end": b"c" + b"a" * 10**6 + b".",
            "name of 1 MB": b"\x80\x04" + text(b"a" * 10**6) + text(b"b" * 10**6) + b"\x93.",
            "EXT1": b"\x80\x02\x82\x01.",
            "EXT2": b"\x80\x02\x83\x01\x01.",
            "EXT4": b"\x80\x02\x84\xff\xff\xff\x7f.",
            "PERSID": b"Pos.system\n.",
            "NEXT_BUFFER": b"\x80\x05\x97.",
            "READONLY_BUFFER": b"\x80\x05N\x98.",
            "PickleBuffer": b"\x80\x05c_pickle\nPickleBuffer\nC\x01a\x85R.",
            "network": pickle.dumps(torch.nn.Linear(2, 2)),
            "function": pickle.dumps(print),
        }
        | {f"BINPERSID of {pid!r}": b"\x80\x02" + pid + b"Q." for pid in PERSISTENT}
    )


PERSISTENT = [b"N", b"K\x01", b"](NNNNNe", b"}", b")", b"U\x01a", b"(NNNNNt", b"(U\x07storage](NetQ"]
PERSISTENT += [b"(U\x07storageU\x0cFloatStorageU\x010U\x03cpuK\x04t", b"(U\x06moduleNNNt"]


# nonsense

ARRAY = b"cnumpy.core.multiarray\n_reconstruct\n)R(K\x01"  # then shape, type, order, bytes, "tb"
U1, OBJECT = b"cnumpy\ndtype\n(U\x02u1K\x00K\x01tR", b"cnumpy\ndtype\n(U\x01OK\x00K\x01tR"
LOAD = b"\x80\x02ctorch.storage\n_load_from_bytes\n"


def doubling(first: bytes, before: bytes, between: bytes, after: bytes) -> bytes:
    """Forty values, each holding the one before twice: 2^40 when written out."""
    last = [b"h" + bytes([i]) for i in range(40)]
    steps = [before + v + between + v + after + b"q" + bytes([i + 1]) for i, v in enumerate(last)]
    return b"\x80\x02" + first + b"q\x00" + b"".join(steps) + b"."


def nonsense() -> dict[str, bytes]:
    """Small pickles that break rules, lie, or hold themselves."""
    inner = stream(LOAD + b"C\x00\x85R.")
    chumpy = b"\x80\x02cchumpy.ch\nCh\n)\x81"
    found = {
        "nothing": b"\x80\x02.",
        "later protocol": b"\x80\x06N.",
        "unknown opcode": b"\x80\x02\xff.",
        "list as a key": b"\x80\x02}]K\x01s.",
        "dictionary as a key": b"\x80\x02}}K\x01s.",
        "tuple as a key": b"\x80\x02}NN\x86K\x01s.",
        "key without a value": b"\x80\x02}(K\x01u.",
        "item of a list": b"\x80\x02]K\x01K\x01s.",
        "append to a tuple": b"\x80\x02)K\x01a.",
        "memo of 2^31": b"\x80\x02Nr" + struct.pack("<I", 2**31) + b".",
        "memo of 2^32": b"\x80\x02Nr" + struct.pack("<I", 2**32 - 1) + b".",
        "memo of 10^30": b"Np%d\n." % 10**30,
        "memo below 0": b"Np-1\n.",
        "out of the empty memo": b"\x80\x02h\x05.",
        "memo of nothing": b"\x80\x02q\x00.",
        "POP": b"\x80\x02NN0.",
        "POP of nothing": b"0000.",
        "DUP": b"\x80\x02]2a.",
        "DUP of nothing": b"2.",
        "POP_MARK": b"\x80\x02N(N1.",
        "MARK as a value": b"(.",
        "list in itself": b"\x80\x02]q\x00h\x00a.",
        "dictionary in itself": b"\x80\x02}q\x00K\x01h\x00s.",
        "tuple in itself": b"\x80\x02]q\x00h\x00\x85q\x01h\x01a.",
        "array in itself": b"\x80\x02" + ARRAY.replace(b"R(", b"Rq\x00(") + b")" + OBJECT + b"\x89]h\x00atb.",
        "chumpy array in itself": chumpy + b"q\x00}" + text(b"x") + b"h\x00sb.",
        "chumpy array of nothing": chumpy + b".",
        "state of itself": chumpy + b"q\x00h\x00b.",
        "doubling list": doubling(b"]", b"](", b"", b"e"),
        "doubling tuple": doubling(b")", b"", b"", b"\x86"),
        "doubling dictionary": doubling(b"}", b"}(U\x01a", b"U\x01b", b"u"),
        "number of words": b"Ieins\n.",
        "float of words": b"Fnine\n.",
        "no UTF-8": b"\x80\x02X\x02\x00\x00\x00\xff\xff.",
        "half an escape": b"S'\\x4'\n.",
        "escape at the end": b"S'a\\'\n.",
        "unknown escapes": b"S'" + b"\\y" * 10**5 + b"'\n.",
        "no quotes": b"Sabc\n.",
        "half a unicode escape": b"V\\u12\n.",
        "array of 2^47": b"\x80\x02" + ARRAY + number(2**47) + b"\x85" + U1 + b"\x89U\x01atb.",
        "array of 2^63": b"\x80\x02"
        + ARRAY
        + b"\x8a\x09"
        + b"\xff" * 8
        + b"\x00\x85"
        + U1
        + b"\x89U\x01atb.",
        "array of 10^9 x 10^9": b"\x80\x02" + ARRAY + number(10**9) * 2 + b"\x86" + U1 + b"\x89U\x01atb.",
        "array below 0": b"\x80\x02" + ARRAY + number(-1) + b"\x85" + U1 + b"\x89U\x01atb.",
        "array of 100 axes": b"\x80\x02" + ARRAY + b"(" + b"K\x01" * 100 + b"t" + U1 + b"\x89U\x01atb.",
        "array of fewer bytes": b"\x80\x02" + ARRAY + b"K\x05\x85" + U1 + b"\x89U\x02abtb.",
        "array of more bytes": b"\x80\x02" + ARRAY + b"K\x01\x85" + U1 + b"\x89U\x02abtb.",
        "array of objects that are missing": b"\x80\x02"
        + ARRAY
        + number(10**9)
        + b"\x85"
        + OBJECT
        + b"\x89]tb.",
        "array without contents": b"\x80\x02cnumpy.core.multiarray\n_reconstruct\n)R.",
        "type of records": b"\x80\x02cnumpy\ndtype\n(U\x05f8,O8K\x00K\x01tR.",
        "type to be evaluated": b"\x80\x02cnumpy\ndtype\n(" + text(b"(exit(),2)f8") + b"K\x00K\x01tR.",
        "nonsense for a stream": LOAD + b"B" + struct.pack("<I", 40) + b"(" * 40 + b"\x85R.",
        "stream in a stream": LOAD + b"B" + struct.pack("<I", len(inner)) + inner + b"\x85R.",
    }
    for name, code, layout, sizes in LENGTHS:
        for n in sizes:
            found[f"{name} of {n}"] = b"\x80\x04]" + code + struct.pack(layout, n) + b"abca."
    return found


INT4, UINT4, UINT8 = (2**31 - 1, -1, -(2**31)), (2**31, 2**32 - 1), (2**31, 2**63, 2**64 - 1)
LENGTHS = [
    ("STRING", b"T", "<i", INT4),
    ("BINUNICODE", b"X", "<I", UINT4),
    ("BINUNICODE8", b"\x8d", "<Q", UINT8),
    ("BINBYTES", b"B", "<I", UINT4),
    ("BINBYTES8", b"\x8e", "<Q", UINT8),
    ("BYTEARRAY8", b"\x96", "<Q", UINT8),
    ("LONG4", b"\x8b", "<i", INT4),
    ("FRAME", b"\x95", "<Q", UINT8),
    ("SHORT_BINSTRING", b"U", "B", (255,)),
    ("SHORT_BINUNICODE", b"\x8c", "B", (255,)),
    ("SHORT_BINBYTES", b"C", "B", (255,)),
    ("LONG1", b"\x8a", "B", (255,)),
]


# bombs

SPARSE = b"cscipy.sparse.coo\ncoo_matrix\n)\x81"
SELECT = b"cchumpy.reordering\nSelect\n)\x81"


def indices(values) -> bytes:
    raw = np.asarray(values, "<i4").tobytes()
    kind = b"cnumpy\ndtype\n(U\x02i4K\x00K\x01tR"
    return ARRAY + number(len(values)) + b"\x85" + kind + b"\x89B" + struct.pack("<I", len(raw)) + raw + b"tb"


def repeated(first: bytes, again: bytes, n: int = 6000) -> bytes:
    """A list of `first` and then of `again`, which takes it out of the memo, many times."""
    return b"\x80\x02](" + first + b"q\x00" + again * n + b"e."


def bombs() -> dict[str, bytes]:
    """Pickles of up to some megabytes that want much more memory, or hours."""
    n = 300_000  # more parts than a small file may have
    state = [(b"_shape", b"K\x01K\x01\x86"), (b"row", indices([0] * 5 * 10**5) + b"q\x01")]
    state += [(b"col", b"h\x01"), (b"data", b"h\x01")]
    matrix = b"}(" + b"".join(text(k) + v for k, v in state) + b"u"
    chosen = b"}(" + text(b"a") + indices([1, 2]) + text(b"idxs") + indices([0, 1] * 10**5) + b"u"
    names = b"(" + b"N" * 10**5 + b"t"
    long = b"T" + struct.pack("<i", 10**6) + bytes(10**6)
    one_hash = b"".join(b"\x8a\x0c" + ((2**61 - 1) * i).to_bytes(12, "little") + b"N" for i in range(20_000))
    record = b"cchumpy.ch\nCh\n)\x81}" + text(b"x")
    pairs, items = b"](" + b"](NNe" * 20_000 + b"e", b"](" + b"N" * 50_000 + b"e"
    return {
        "deep lists": b"\x80\x02" + b"]" * 10**5 + b"a" * (10**5 - 1) + b".",
        "deep tuples": b"\x80\x02N" + b"\x85" * 10**5 + b".",
        "deep dictionaries": b"\x80\x02" + b"}K\x01" * 50_000 + b"N" + b"s" * 50_000 + b".",
        "deep records": b"\x80\x02" + record * 5000 + b"N" + b"sb" * 5000 + b".",
        "deep arrays": b"\x80\x02" + (ARRAY + b")" + OBJECT + b"\x89]") * 2000 + b"N" + b"atb" * 2000 + b".",
        "marks": b"\x80\x02" + b"(" * n + b".",
        "lists": b"\x80\x02](" + b"]" * n + b"e.",
        "dictionaries": b"\x80\x02](" + b"}" * n + b"e.",
        "lists in the memo": b"\x80\x04](" + b"]\x94" * n + b"e.",
        "numbers": b"\x80\x02](" + b"G12345678" * n + b"e.",
        "strings": b"\x80\x02](" + b"U\x02ab" * n + b"e.",
        "DUPs": b"\x80\x02N" + b"2" * n + b".",
        "keys of one hash": b"\x80\x02}(" + one_hash + b"u.",
        "number of 10^6 digits": b"I" + b"9" * 10**6 + b"\n.",
        "long of 10^6 digits": b"L" + b"9" * 10**6 + b"L\n.",
        "number of 10^6 bytes": b"\x80\x02\x8b" + struct.pack("<i", 10**6) + b"\x7f" * 10**6 + b".",
        "float of 10^6 digits": b"F" + b"9" * 10**6 + b"\n.",
        "wide text": b"\x80\x02" + text(b"a" * 2 * 10**7 + "😀".encode()) + b".",
        "copies of a list": repeated(items, b"c__builtin__\nset\nh\x00\x85R"),
        "copies of a dictionary": repeated(pairs, b"ccollections\nOrderedDict\nh\x00\x85R"),
        "copies of arguments": repeated(names, b"ccollections\nOrderedDict\nh\x00R"),
        "copies of a new object": repeated(names, b"ccopy_reg\n_reconstructor\nh\x00R"),
        "copies of a type": repeated(names, U1 + b"h\x00b"),
        "copies of a shape": repeated(names, ARRAY + b"h\x00" + U1 + b"\x89U\x00tb"),
        "arrays of one string": repeated(long, ARRAY + number(10**6) + b"\x85" + U1 + b"\x89h\x00tb"),
        "texts of one string": repeated(long, b"c_codecs\nencode\n(h\x00" + text(b"latin1") + b"tR"),
        "streams of one string": repeated(long, b"ctorch.storage\n_load_from_bytes\nh\x00\x85R"),
        "lists of one list": repeated(items, ARRAY + number(25_000) + b"K\x02\x86" + OBJECT + b"\x89h\x00tb"),
        "matrices of one list": repeated(matrix, SPARSE + b"h\x00b"),
        "selections of one list": repeated(chosen, SELECT + b"h\x00b"),
    }
