"""Read the data out of a pickle without executing it.

`load` walks the opcodes itself. Nothing is imported, no class is made and no function of the pickle's
choice is called: a name in the pickle is only compared with a short list (allowed.py: tensors, arrays,
ordered dictionaries, chumpy's arrays), and whatever is not on it is refused with that name. Objects of the
few classes of which published files are made become records of their attributes. `plain` then turns the part
that is wanted into data.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import BinaryIO

import numpy as np
import torch
from torch import Tensor

from . import arrays
from .allowed import MADE, SPARSE, STORAGES, Name, allowed
from .arrays import Budget
from .opcodes import Long, Refused, opcodes

DEPTH = 100  # of plain data
PARTS = 2**22  # of plain data, written out
DAMAGE = (
    AttributeError,
    IndexError,
    KeyError,
    MemoryError,
    OverflowError,
    RuntimeError,
    TypeError,
    ValueError,
)


@dataclass(eq=False, slots=True)
class Array:
    """A NumPy array under construction: made empty, then filled by the BUILD opcode."""

    value: Tensor | list | None = None
    full: bool = False


@dataclass(eq=False, slots=True)
class Type:
    """A NumPy dtype, completed by the BUILD opcode."""

    value: np.dtype


@dataclass(eq=False, slots=True)
class Record:
    """An object that is never made: the name of its class, and its attributes from the BUILD opcode."""

    kind: str
    state: dict


@dataclass(eq=False, slots=True)
class Storage:
    """The memory of tensors: a claim of `count` elements, read when it is wanted."""

    key: str
    dtype: torch.dtype
    count: int
    data: Tensor | None = None


@dataclass(eq=False, slots=True)
class View:
    """A tensor on its storage."""

    storage: Storage
    offset: int
    shape: tuple
    stride: tuple


def load(
    file: BinaryIO,
    end: int,
    budget: Budget,
    storage: Callable[[str, torch.dtype, int], Storage] | None = None,
    stream: Callable[[BinaryIO, int, Budget], Storage] | None = None,
) -> object:
    """The object in the pickle where `file` stands, before `end`; `plain` makes it data.

    storage(key, dtype, count): what a persistent id of torch.save stands for, where there are such.
    stream(file, size, budget): the storage in a stream of torch.save inside the pickle, where they may be.
    Raises Refused with the name or opcode that is not allowed, ValueError for damage.
    """
    stack: list = []
    marks: list[int] = []
    memo: dict = {}

    def pop_mark() -> list:
        items = stack[marks[-1] :]
        del stack[marks.pop() :]
        return items

    try:
        for action, arg in opcodes(file, end):
            budget.spend(parts=4 if action == "make" else 1)  # that may be a tensor
            if action == "push":
                stack.append(arg)
            elif action == "put":
                if arg is not None and not 0 <= arg < end:
                    raise ValueError(f"place {arg} in its memo")
                memo[len(memo) if arg is None else arg] = stack[-1]
            elif action == "get":
                stack.append(memo[arg])
            elif action == "mark":
                marks.append(len(stack))
            elif action == "tuple":
                items = pop_mark() if arg is None else [stack.pop() for _ in range(arg)][::-1]
                stack.append(tuple(items))
            elif action == "list":
                stack.append(pop_mark())
            elif action == "dict":
                stack.append(_pairs({}, pop_mark()))
            elif action == "append":
                value = stack.pop()
                _of(stack[-1], list).append(value)
            elif action == "extend":
                values = pop_mark()
                _of(stack[-1], list).extend(values)
            elif action == "set item":
                value, key = stack.pop(), stack.pop()
                _pairs(stack[-1], [key, value])
            elif action == "set items":
                items = pop_mark()
                _pairs(stack[-1], items)
            elif action == "global":
                if arg is None:
                    attribute, module = stack.pop(), stack.pop()
                    arg = f"{_of(module, str)}.{_of(attribute, str)}"
                stack.append(allowed(arg))
            elif action == "make":
                args, target = stack.pop(), stack.pop()
                stack.append(_make(target, _of(args, tuple), budget, stream))
            elif action == "build":
                state = stack.pop()
                _build(stack[-1], state, budget)
            elif action == "persistent":
                stack.append(_stored(stack.pop(), storage))
            elif action == "stop":
                return stack.pop()
    except Refused:
        raise
    except DAMAGE as e:
        raise ValueError(f"damaged pickle: {e}") from e


def _of(value, kind: type):
    if not isinstance(value, kind):
        raise TypeError(f"{kind.__name__} expected, {type(value).__name__} found")
    return value


def _pairs(target, items: list) -> dict:
    keys = items[::2]
    for k in keys:
        # hashing nested tuples may take forever, and so may integers of equal hash (beyond 60 bits);
        # optimisers count by the tensor itself
        if not isinstance(k, (str, int, float, Name, View, type(None))) or (type(k) is int and abs(k) >> 60):
            raise Refused("a key that is neither a string nor a number")
    _of(target, dict).update(zip(keys, items[1::2], strict=True))
    return target


def _say(value) -> str:
    """Short, whatever was nested how deep."""
    return f"'{value.name}'" if isinstance(value, Name) else f"a {type(value).__name__}"


def _make(target, args: tuple, budget: Budget, stream: Callable | None):
    """What calling an allowed name would give."""
    if len(args) > 9:  # the memo may give the same long one again and again
        raise Refused(f"calling {_say(target)} with {len(args)} values")
    match target:
        case Name("collections.OrderedDict"):
            pairs = _of(args[0], list) if args else []
            budget.spend(parts=len(pairs))
            return _pairs({}, [x for key, value in pairs for x in (key, value)])
        case Name("collections.defaultdict") if args == (Name("builtins.dict"),):
            return {}
        case Name("builtins.set" | "builtins.frozenset"):
            return _of(args[0], list)
        case Name("builtins.bytes" | "builtins.bytearray") if args == ():
            return b""
        case Name("builtins.bytearray" | "_codecs.encode"):  # how protocols 0 to 2 write bytes
            return _encoded(*args)
        case Name("numpy.dtype"):
            return Type(arrays.dtype(_of(args[0], str)))
        case Name("numpy.core.multiarray._reconstruct"):
            return Array()
        case Name("numpy.core.multiarray.scalar"):
            value = _array((), args[0], args[1], False, budget)
            return value.item() if isinstance(value, Tensor) else value
        case Name("numpy.core.numeric._frombuffer"):
            raw, kind, shape, order, *axes = args
            return Array(_arranged(shape, kind, raw, order, axes[0] if axes else None, budget), True)
        case Name("torch._utils._rebuild_tensor" | "torch._utils._rebuild_tensor_v2"):
            return _view(*args[:4])
        case Name("torch._utils._rebuild_parameter"):
            return _of(args[0], View)
        case Name("torch.storage._load_from_bytes") if stream:
            whole = b"".join(_pieces(args[0], budget))
            return stream(io.BytesIO(whole), len(whole), budget)
        case Name("torch.Size"):
            return args[0]
        case Name("torch.device" | "torch.nn.backends.thnn._get_thnn_function_backend"):
            return None
        case Name("copyreg._reconstructor") if args[1:] == (Name("builtins.object"), None):
            return _record(args[0])
        case Name("copyreg.__newobj__") if len(args) == 1:
            return _record(args[0])
        case Name() if args == ():
            return _record(target)
        case _:
            raise Refused(f"calling {_say(target)}")


def _record(target) -> Record:
    if not isinstance(target, Name) or target.name not in MADE:
        raise Refused(f"calling {_say(target)}")
    return Record(target.name, {})


def _build(target, state, budget: Budget) -> None:
    if isinstance(target, dict):  # attributes of an OrderedDict, as state_dict's _metadata: not data
        return
    if isinstance(target, Record):
        budget.spend(parts=len(_of(state, dict)))
        _pairs(target.state, [x for pair in state.items() for x in pair])
    elif isinstance(target, Type):
        _, order, *fields = _of(state, tuple)[:5]
        if fields != [None, None, None] or order not in ("<", ">", "=", "|"):
            raise Refused("a NumPy array of records")
        target.value = target.value.newbyteorder(order)
    elif isinstance(target, Array):
        _, shape, kind, fortran, raw = state
        target.value, target.full = _array(shape, kind, raw, bool(fortran), budget), True
    else:
        raise Refused(f"setting the state of {_say(target)}")


def _array(shape, kind, raw, fortran: bool, budget: Budget) -> Tensor | list:
    """What a NumPy array stands for: a tensor, or nested lists of its objects or strings."""
    kind = _of(kind, Type).value
    if kind.kind == "O":
        return arrays.nested(_of(raw, list), shape, budget)
    if kind.kind in "SU":
        return arrays.strings(shape, kind, fortran, _pieces(raw, budget), budget)
    if arrays.count(shape) * kind.itemsize > (raw.size if isinstance(raw, Long) else len(raw)):
        raise ValueError(f"an array of shape {shape} has fewer bytes than that")
    return arrays.numbers(shape, kind, fortran, _pieces(raw), budget)


def _arranged(shape, kind, raw, order, axes, budget: Budget) -> Tensor | list:
    """An array of protocol 5, whose axes may have been exchanged."""
    if order == "K" and arrays.count(axes) is not None:
        return _of(_array(shape, kind, raw, False, budget), Tensor).permute(axes)
    if order not in ("C", "F"):
        raise ValueError("an array in an unknown order")
    return _array(shape, kind, raw, order == "F", budget)


def _pieces(raw, budget: Budget | None = None) -> Iterable[bytes]:
    """The bytes of a string, which is text in pickles of Python 2."""
    if budget:
        budget.spend(bytes=raw.size if isinstance(raw, Long) else len(raw))
    if isinstance(raw, Long):
        return raw.chunks()
    return [raw.encode("latin-1") if isinstance(raw, str) else _of(raw, bytes)]


def _encoded(text, coding="latin1") -> bytes | Long:
    if coding not in ("latin1", "latin-1"):
        raise Refused(f"the coding '{coding}'")
    if isinstance(text, Long):
        return replace(text, text=False)
    return text if isinstance(text, bytes) else _of(text, str).encode("latin-1")


def _view(storage: Storage, offset: int, shape: tuple, stride: tuple) -> View:
    """A tensor on its storage. More elements than the storage holds are refused: they would be a bomb."""
    n = _of(storage, Storage).count
    if any(type(i) is not int or not 0 <= i < 2**48 for i in (offset, *shape[:65], *stride[:65])):
        raise ValueError("a tensor whose shape is not made of numbers")
    if len(shape) > arrays.AXES or math.prod(shape) > n:
        raise ValueError(f"a tensor of shape {list(shape[:9])} in a storage of {n} elements")
    last = offset + sum((n - 1) * s for n, s in zip(shape, stride, strict=True))
    if last >= n if math.prod(shape) else offset > n:
        raise ValueError(f"a tensor of shape {list(shape)} reaches past its {n} elements")
    return View(storage, offset, shape, stride)


def _stored(pid, storage: Callable | None) -> Storage | Name:
    """What a persistent id of torch.save stands for; before 1.6 that was also a network's class."""
    if isinstance(pid, tuple) and len(pid) == 4 and pid[0] == "module":
        return _of(pid[1], Name)
    if not storage or not isinstance(pid, tuple) or not 4 < len(pid) < 7:
        raise Refused("the pickle opcode BINPERSID")
    kind, target, key, *_ = pid
    if kind != "storage" or not isinstance(target, Name) or target.name not in STORAGES:
        raise Refused(f"a storage of {_say(target)}")
    if any(view is not None for view in pid[5:]):
        raise Refused("a storage that is part of another one")
    return storage(_of(key, str), STORAGES[target.name], _of(pid[4], int))


def weights(network: Record, budget: Budget) -> dict[str, View]:
    """The state dict of a pickled network: parameters and buffers of all its parts, by path.

    Raises Refused for a network without end, ValueError for other odd ones.
    """
    found: dict[str, View] = {}
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
                    budget.spend(parts=1 + len(path) // 64)
                    if kind == "_modules" and value is not None:
                        waiting.append((f"{path}.", _of(value, Record)))
                    elif value is not None:
                        found[path] = _of(value, View)
    except TypeError as e:
        raise ValueError(f"damaged network: {e}") from e
    return found


def plain(tree, budget: Budget, fill: Callable[[Storage], Tensor] | None = None) -> object:
    """dict, list, str, bytes, numbers, Tensor and Sparse out of what `load` gave; tuples become lists.

    fill(storage) -> its flat tensor. Raises Refused for what nests too deep, holds itself, holds a part many
    times within parts, or is no data; ValueError for arrays that do not fit together.
    """
    done: dict[int, tuple[object, int, int]] = {}  # value, parts when written out, height

    def walk(value, depth: int) -> tuple[object, int, int]:
        if value is None or isinstance(value, (str, bytes, int, float, Tensor)):
            return value, 1, 0
        if depth > DEPTH:
            raise Refused(f"data nested more than {DEPTH} deep, or in itself")
        if id(value) not in done:
            done[id(value)] = made(value, depth + 1)
        found = done[id(value)]
        if depth + found[2] > DEPTH:
            raise Refused(f"data nested more than {DEPTH} deep")
        if found[1] > PARTS:
            raise Refused(f"data that repeats itself into more than {PARTS} parts")
        return found

    def made(value, depth: int) -> tuple[object, int, int]:
        parts, height, inner = 1, 0, []
        keys = None
        if isinstance(value, dict):
            keys = [k.name if isinstance(k, Name) else k for k in value]
            if any(isinstance(k, View) for k in keys):
                raise Refused("a key that is neither a string nor a number")
        if isinstance(value, (list, tuple, dict)):
            for v in value.values() if keys is not None else value:
                v, p, h = walk(v, depth)
                inner.append(v)
                parts, height = parts + p, max(height, h + 1)
            return (inner if keys is None else dict(zip(keys, inner))), parts, height
        if isinstance(value, Array) and value.full:
            return walk(value.value, depth)
        return leaf(value, depth), 1, 0

    def leaf(value, depth: int) -> object:
        match value:
            case Name(name):
                return name
            case Long():
                budget.spend(bytes=value.cost)
                return value.value()
            case Storage():
                return filled(value)
            case View():
                return filled(value.storage).as_strided(value.shape, value.stride, value.offset)
            case Record("chumpy.ch.Ch"):
                return _of(walk(value.state.get("x"), depth)[0], Tensor)
            case Record("chumpy.reordering.Select"):
                parts = [walk(value.state.get(k), depth)[0] for k in ("a", "idxs", "preferred_shape")]
                return arrays.select(*parts, budget)
            case Record(kind) if kind in SPARSE:
                return arrays.sparse(SPARSE[kind], walk(value.state, depth)[0], budget)
            case Record(kind):
                raise Refused(f"an object of '{kind}'")
            case Array():
                raise ValueError("a NumPy array without contents")
            case _:
                raise Refused(_say(value))

    def filled(storage: Storage) -> Tensor:
        return storage.data if storage.data is not None else fill(storage)

    try:
        return walk(tree, 0)[0]
    except Refused:
        raise
    except DAMAGE as e:
        raise ValueError(f"damaged data: {e}") from e
