"""Read the data out of a pickle without executing it.

`load` walks the opcodes itself. Nothing is imported, no class is made and no function of the pickle's
choice is called: a name in the pickle is only compared with the short list below (tensors, arrays,
ordered dictionaries), and whatever is not on it is refused with that name. Objects of the few classes of
which ArcFace's published file is made become records of their attributes. No I/O here.
"""

from __future__ import annotations

import math
import pickletools
from collections.abc import Callable
from dataclasses import dataclass
from typing import BinaryIO

import numpy as np
import torch
from torch import Tensor

STORAGES = {
    "torch.DoubleStorage": torch.float64,
    "torch.FloatStorage": torch.float32,
    "torch.HalfStorage": torch.float16,
    "torch.BFloat16Storage": torch.bfloat16,
    "torch.LongStorage": torch.int64,
    "torch.IntStorage": torch.int32,
    "torch.ShortStorage": torch.int16,
    "torch.CharStorage": torch.int8,
    "torch.ByteStorage": torch.uint8,
    "torch.BoolStorage": torch.bool,
}


class Refused(ValueError):
    """The pickle asks for something that is not plain data."""


@dataclass(frozen=True)
class Name:
    """A global that the pickle mentions; only ever compared."""

    name: str

    def __repr__(self) -> str:
        return self.name


@dataclass
class Array:
    """A NumPy array or dtype under construction: made empty, then filled by the BUILD opcode."""

    kind: str
    value: object = None


@dataclass(eq=False)
class Record:
    """An object that is never made: the name of its class, and its attributes from the BUILD opcode."""

    kind: str
    state: dict


def load(data: bytes | BinaryIO, storage: Callable[[str, torch.dtype, int], Tensor]):
    """The object in `data`, of dicts, lists, tuples, strings, numbers, tensors (arrays become tensors).

    data: whole, or a stream that is read up to the end of its first pickle.
    storage(key, dtype, count) -> the flat tensor [count] that a persistent id of torch.save stands for.
    Raises Refused with the name or opcode that is not allowed, ValueError for damaged data.
    """
    stack: list = []
    marks: list[int] = []
    memo: dict = {}

    def pop_mark() -> list:
        items = stack[marks[-1] :]
        del stack[marks.pop() :]
        return items

    try:
        for op, arg, _ in pickletools.genops(data):
            name = op.name
            if name in _CONSTANTS:
                stack.append(_CONSTANTS[name]())
            elif name in _LITERALS:
                stack.append(arg)
            elif name == "MARK":
                marks.append(len(stack))
            elif name in ("PROTO", "FRAME"):
                pass
            elif name == "STOP":
                return _finished(stack.pop())
            elif name == "MEMOIZE":
                memo[len(memo)] = stack[-1]
            elif name in ("PUT", "BINPUT", "LONG_BINPUT"):
                memo[arg] = stack[-1]
            elif name in ("GET", "BINGET", "LONG_BINGET"):
                stack.append(memo[arg])
            elif name == "TUPLE":
                stack.append(tuple(pop_mark()))
            elif name in ("TUPLE1", "TUPLE2", "TUPLE3"):
                n = int(name[-1])
                stack[-n:] = [tuple(stack[-n:])]
            elif name == "LIST":
                stack.append(pop_mark())
            elif name == "DICT":
                stack.append(_pairs({}, pop_mark()))
            elif name == "APPEND":
                value = stack.pop()
                _of(stack[-1], list).append(value)
            elif name in ("APPENDS", "ADDITEMS"):
                values = pop_mark()
                _of(stack[-1], list).extend(values)
            elif name == "SETITEM":
                value, key = stack.pop(), stack.pop()
                _pairs(stack[-1], [key, value])
            elif name == "SETITEMS":
                items = pop_mark()
                _pairs(stack[-1], items)
            elif name == "GLOBAL":
                stack.append(_allowed(arg.replace(" ", ".", 1)))
            elif name == "STACK_GLOBAL":
                attribute, module = stack.pop(), stack.pop()
                stack.append(_allowed(f"{module}.{attribute}"))
            elif name in ("REDUCE", "NEWOBJ"):
                args, target = stack.pop(), stack.pop()
                stack.append(_make(target, _of(args, tuple)))
            elif name == "BUILD":
                state = stack.pop()
                _build(stack[-1], state)
            elif name == "BINPERSID":
                stack.append(_stored(stack.pop(), storage))
            else:
                raise Refused(f"the pickle opcode {name}")
    except Refused:
        raise
    except (IndexError, KeyError, TypeError, ValueError, RuntimeError, OverflowError, UnicodeError) as e:
        raise ValueError(f"damaged pickle: {e}") from e
    raise ValueError("damaged pickle: it does not end")


_CONSTANTS = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_DICT": dict,
    "EMPTY_LIST": list,
    "EMPTY_SET": list,  # no set is of any use here, and nothing needs hashing
    "EMPTY_TUPLE": tuple,
}
_LITERALS = set(
    "INT BININT BININT1 BININT2 LONG1 BINFLOAT FLOAT UNICODE SHORT_BINUNICODE BINUNICODE BINUNICODE8 "
    "BINBYTES SHORT_BINBYTES BINBYTES8 STRING BINSTRING SHORT_BINSTRING".split()
)
_NAMES = {
    "collections.OrderedDict",
    "torch._utils._rebuild_tensor_v2",
    "torch._utils._rebuild_parameter",
    "numpy.ndarray",
    "numpy.dtype",
    "numpy.core.multiarray._reconstruct",
    "numpy.core.multiarray.scalar",
    "_codecs.encode",
    "collections.defaultdict",
    "builtins.dict",
    "builtins.set",
    "torch.device",
    "torch.nn.backends.thnn._get_thnn_function_backend",  # an attribute of modules before PyTorch 1.2
    *STORAGES,
}
_RECORDS = {  # a network pickled whole, beside its optimiser
    "torch.nn.parallel.data_parallel.DataParallel",
    "torch.nn.modules.activation.PReLU",
    "torch.nn.modules.activation.Sigmoid",
    "torch.nn.modules.batchnorm.BatchNorm1d",
    "torch.nn.modules.batchnorm.BatchNorm2d",
    "torch.nn.modules.container.Sequential",
    "torch.nn.modules.conv.Conv2d",
    "torch.nn.modules.dropout.Dropout",
    "torch.nn.modules.linear.Linear",
    "torch.nn.modules.pooling.AdaptiveAvgPool2d",
    "torch.nn.modules.pooling.MaxPool2d",
    "models.ResNet",
    "models.IRBlock",
    "models.SEBlock",
    "models.ArcMarginModel",
    "optimizer.InsightFaceOptimizer",
    "torch.optim.adam.Adam",
    "torch.optim.sgd.SGD",
}
_INERT = "pytorch_lightning.callbacks."  # classes whose names are keys of old Lightning checkpoints


_RENAMED = {"numpy._core.": "numpy.core.", "__builtin__.": "builtins.", "torch.cuda.": "torch."}


def _allowed(name: str) -> Name:
    for old, new in _RENAMED.items():
        name = new + name[len(old) :] if name.startswith(old) else name
    if name not in _NAMES and name not in _RECORDS and not name.startswith(_INERT):
        raise Refused(f"'{name}'")
    return Name(name)


def _of(value, kind: type):
    if not isinstance(value, kind):
        raise TypeError(f"{kind.__name__} expected, {type(value).__name__} found")
    return value


def _pairs(target, items: list) -> dict:
    keys = items[::2]
    # hashing nested tuples may take forever; optimisers count by the tensor itself
    if not all(isinstance(k, (str, int, Name, Tensor)) for k in keys):
        raise Refused("a key that is neither a string nor a number")
    _of(target, dict).update(zip(keys, items[1::2], strict=True))
    return target


def _say(value) -> str:
    """Short, whatever was nested how deep."""
    return f"'{value.name}'" if isinstance(value, Name) else f"a {type(value).__name__}"


def _make(target, args: tuple):
    """What calling an allowed name would give."""
    match target:
        case Name("collections.OrderedDict"):
            return _pairs({}, [x for pair in args for kv in _of(pair, list) for x in kv])
        case Name("torch._utils._rebuild_tensor_v2"):
            return _view(*args[:4])
        case Name("torch._utils._rebuild_parameter"):
            return _of(args[0], Tensor)
        case Name("numpy.core.multiarray._reconstruct"):
            return Array("array")
        case Name("numpy.dtype"):
            return Array("dtype", np.dtype(_of(args[0], str)))
        case Name("numpy.core.multiarray.scalar"):
            return _array((), args[0], args[1]).item()
        case Name("_codecs.encode"):  # how protocol 2 writes bytes
            return _of(args[0], str).encode("latin1")
        case Name("collections.defaultdict") if args == (Name("builtins.dict"),):
            return {}
        case Name("builtins.set"):
            return list(_of(args[0], list))
        case Name("torch.device" | "torch.nn.backends.thnn._get_thnn_function_backend"):
            return None
        case Name(name) if name in _RECORDS and args == ():
            return Record(name, {})
        case _:
            raise Refused(f"calling {_say(target)}")


def _view(storage: Tensor, offset: int, shape: tuple, stride: tuple) -> Tensor:
    """A tensor on its storage. More elements than the storage holds are refused: they would be a bomb."""
    if any(not isinstance(n, int) or n < 0 for n in (offset, *shape, *stride)):
        raise ValueError("a tensor whose shape is not made of numbers")
    if math.prod(shape) > len(storage):
        raise ValueError(f"a tensor of shape {list(shape)} in a storage of {len(storage)} elements")
    last = offset + sum((n - 1) * s for n, s in zip(shape, stride, strict=True))
    if math.prod(shape) and last >= len(storage):
        raise ValueError(f"a tensor of shape {list(shape)} reaches past its {len(storage)} elements")
    return _of(storage, Tensor).as_strided(shape, stride, offset)


def _build(target, state) -> None:
    if isinstance(target, dict):  # attributes of an OrderedDict, as state_dict's _metadata: not data
        return
    if isinstance(target, Record):
        _pairs(target.state, [x for pair in _of(state, dict).items() for x in pair])
        return
    if not isinstance(target, Array):
        raise Refused(f"setting the state of {_say(target)}")
    if target.kind == "dtype":
        target.value = target.value.newbyteorder(state[1])
    else:
        _, shape, dtype, fortran, raw = state
        target.value = _array(shape, dtype, raw, "F" if fortran else "C")


def _array(shape: tuple, dtype: Array, raw: bytes, order: str = "C") -> np.ndarray:
    dtype = _of(dtype, Array).value
    if dtype.kind not in "biuf":
        raise Refused(f"a NumPy array of type {dtype}")
    array = np.frombuffer(_of(raw, bytes), dtype).reshape(shape, order=order)
    return array.astype(dtype.newbyteorder("="))


def _stored(pid, storage: Callable) -> Tensor | Name:
    """What a persistent id of torch.save stands for; before 1.6 that was also a network's class."""
    kind, target, key, *_ = pid
    if kind == "module" and isinstance(target, Name) and target.name in _RECORDS:
        return target
    if kind != "storage" or not isinstance(target, Name) or target.name not in STORAGES:
        raise Refused(f"a storage of {_say(target)}")
    if any(view is not None for view in pid[5:]):
        raise Refused("a storage that is part of another one")
    return storage(_of(key, str), STORAGES[target.name], _of(pid[4], int))


def weights(network: Record) -> dict[str, Tensor]:
    """The state dict of a pickled network: parameters and buffers of all its parts, by path.

    Raises Refused for a network without end, ValueError for other odd ones.
    """
    found: dict[str, Tensor] = {}
    waiting, seen = [("", network)], set()
    try:
        while waiting:
            prefix, part = waiting.pop()
            if id(part) in seen or prefix.count(".") > 20:
                raise Refused("a network that holds a part of itself twice, or too deep")
            seen.add(id(part))
            for kind in ("_parameters", "_buffers", "_modules"):
                for name, value in _of(part.state.get(kind, {}), dict).items():
                    path = f"{prefix}{_of(name, str)[:100]}"
                    if kind == "_modules" and value is not None:
                        waiting.append((f"{path}.", _of(value, Record)))
                    elif value is not None:
                        found[path] = _of(value, Tensor)
    except TypeError as e:
        raise ValueError(f"damaged network: {e}") from e
    return found


def _finished(value, done: dict | None = None):
    """Arrays become tensors, in dicts too. Each dict is visited once, however often it is referred to."""
    done = {} if done is None else done
    if isinstance(value, Array):
        if not isinstance(value.value, np.ndarray):
            raise ValueError("a NumPy array without contents")
        return torch.from_numpy(value.value)
    if isinstance(value, dict):
        if id(value) not in done:
            done[id(value)] = value
            value.update({k: _finished(v, done) for k, v in value.items()})
    return value
