"""Hostile files of every kind that is read. Each ends in one line that names it, executes nothing, takes no
more memory than twice its own and SPARE, and no more than SECONDS; so does an honest file that was cut."""

import io
import os
import pickle
import re

import numpy as np
import pytest
import torch
from safetensors.torch import save

from tests import hostile_archives, hostile_pickles
from tests.hostile_archives import OBJECTS, npy, packed, zipped
from tests.hostile_pickles import stream
from tests.python2_pickle import Ch, Csc, dumps
from tests.reader_runner import SECONDS, outcomes

SPARE = 64 * 2**20  # bytes
CARRIERS = {
    "pickle": lambda p: p if p[:1] == b"\x80" else b"\x80\x02" + p,
    "torch zip": lambda p: zipped({"archive/data.pkl": p, "archive/data/0": bytes(16)}),
    "torch stream": stream,
    "npy": lambda p: npy(OBJECTS, p),
    "npz": lambda p: zipped({"a.npy": npy(OBJECTS, p)}),
    "packed npz": lambda p: packed({"a.npy": npy(OBJECTS, p)}),
}
STRIDE = 50  # pieces in which honest files are cut


def honest() -> dict[str, bytes]:
    """A small file of every kind."""
    rng, torch_rng = np.random.default_rng(0), torch.manual_seed(0)
    tree = {"f": rng.integers(0, 99, (40, 3)).astype("u4"), "v": rng.random((30, 3)), "name": "lbs"}
    tree |= {"list": [1, 2.5, None, "ü"]}
    found = {f"pickle {p}": pickle.dumps(tree | {"t": torch.arange(40.0)}, p) for p in range(6)}
    tree["list"].pop()
    tree |= {"x": Ch(rng.random((20, 3))), "j": Csc(np.eye(5))}
    found |= {f"pickle of Python 2, {p}": dumps(tree, p) for p in (0, 2)}
    objects = np.array({"a": np.arange(9), "b": torch.arange(3)}, dtype=object)
    weights = {"a": torch.randn(30, 10, generator=torch_rng), "b": {"c": torch.arange(50)}}
    for name, call in {
        "torch zip": lambda f: torch.save(weights, f),
        "torch stream": lambda f: torch.save(weights, f, _use_new_zipfile_serialization=False),
        "npy": lambda f: np.save(f, tree["v"]),
        "npy of objects": lambda f: np.save(f, objects),
        "npz": lambda f: np.savez(f, f=tree["f"], v=tree["v"], o=objects),
        "packed npz": lambda f: np.savez_compressed(f, f=tree["f"], v=tree["v"], o=objects),
    }.items():
        call(out := io.BytesIO())
        found[name] = out.getvalue()
    return found | {"safetensors": save({"a": weights["a"], "b": torch.arange(50)})}


def everything(mark: str) -> dict[str, dict[str, bytes]]:
    """The files by group and name; mark: the path of the canary."""
    good = honest()
    groups = {
        "honest": good,
        "torch": hostile_archives.torches(mark),
        "zip": hostile_archives.zips(),
        "numpy": hostile_archives.arrays(mark),
        "safetensors": hostile_archives.safetensors(),
        "bombs": {k: CARRIERS["pickle"](v) for k, v in hostile_pickles.bombs().items()},
    }
    attacks = hostile_pickles.calls(mark) | hostile_pickles.nonsense()
    groups |= {carrier: {k: carry(v) for k, v in attacks.items()} for carrier, carry in CARRIERS.items()}
    cuts = {k: {str(i): v[: len(v) * i // STRIDE] for i in range(STRIDE)} for k, v in good.items()}
    return groups | {f"cut {k}": v for k, v in cuts.items()}


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What came of each file by group and name, with its path; all read in one process."""
    folder = tmp_path_factory.mktemp("attacks")
    mark = folder / "canary"
    paths = {}
    for group, files in everything(str(mark)).items():
        for name, data in files.items():
            paths[group, name] = folder / f"{len(paths):05}.pt"
            paths[group, name].write_bytes(data)
    results = outcomes(list(paths.values()))
    groups: dict = {}
    for (group, name), path in paths.items():
        groups.setdefault(group, {})[name] = path, results[path]
    return groups, mark


def faults(path, outcome) -> str:
    """What is wrong with how reading a hostile file ended."""
    size = path.stat().st_size
    wrong = {
        f"{outcome.error or outcome.data}: {outcome.text}": outcome.error != "CheckpointError",
        f"more than a line: {outcome.text!r}": "\n" in outcome.text or not outcome.text.isprintable(),
        f"long: {outcome.text!r}": len(outcome.text) > 700,
        f"not named: {outcome.text!r}": not outcome.text.startswith(f"{path}: "),
        f"{outcome.memory} bytes of memory": (outcome.memory or 0) > 2 * size + SPARE,
        f"{outcome.seconds:.1f} s": outcome.seconds > SECONDS,
    }
    return "; ".join(k for k, v in wrong.items() if v)


HOSTILE = [*CARRIERS, "torch", "zip", "numpy", "safetensors", "bombs"]


@pytest.mark.parametrize("group", HOSTILE)
def test_hostile_files(found, group):
    groups, mark = found
    wrong = {name: faults(*v) for name, v in groups[group].items()}
    assert not {k: v for k, v in wrong.items() if v}
    assert len(wrong) > 15 and not mark.exists()


KINDS = [*(f"pickle {p}" for p in range(6)), "pickle of Python 2, 0", "pickle of Python 2, 2"]
KINDS += ["torch zip", "torch stream", "npy", "npy of objects", "npz", "packed npz", "safetensors"]


@pytest.mark.parametrize("kind", KINDS)
def test_cut_files(found, kind):
    groups, _ = found
    wrong = {f"{name} of {STRIDE}": faults(*v) for name, v in groups[f"cut {kind}"].items()}
    assert not {k: v for k, v in wrong.items() if v} and len(wrong) == STRIDE
    path, outcome = groups["honest"][kind]
    assert outcome.error is None and outcome.memory is None or outcome.memory < SPARE, outcome


def test_nothing_is_left_out(found):
    assert set(found[0]) == {"honest", *HOSTILE, *(f"cut {k}" for k in KINDS)}


@pytest.mark.parametrize("carrier", CARRIERS)
def test_names_are_said(found, carrier):
    """What a pickle wanted to call is in the message."""
    for target in hostile_pickles.COMMANDS + hostile_pickles.PYTHON:
        name = target.replace(" ", ".").replace("__builtin__", "builtins")
        _, outcome = found[0][carrier][target]
        assert f"refused '{name}'" in outcome.text and "nothing of the file was executed" in outcome.text
    said = {k: re.search("refused (.*?):", v.text) for k, (_, v) in found[0][carrier].items()}
    assert said["INST of posix system"][1] == "the pickle opcode INST"
    assert said["EXT4"][1] == "the pickle opcode EXT4"
    assert said["NEXT_BUFFER"][1] == "the pickle opcode NEXT_BUFFER"


def test_memory_of_large_files(tmp_path):
    """Honest files take their own size: no bytes of arrays are held twice."""
    rng = np.random.default_rng(0)
    shapes = rng.standard_normal((5023, 3, 400))
    tree = {
        "f": rng.integers(0, 5023, (9976, 3)).astype("u4"),
        "shapedirs": Ch(shapes),
        "J_regressor": Csc(np.eye(5, 5023)),
    }
    arrays = {"shapedirs": shapes[..., :100].copy(), "f": tree["f"]}
    (tmp_path / "generic_model.pkl").write_bytes(dumps(tree, 2))
    (tmp_path / "text.pkl").write_bytes(dumps(arrays, 0))
    for p in (2, 5):
        (tmp_path / f"{p}.pkl").write_bytes(pickle.dumps(arrays, p))
    np.savez(tmp_path / "a.npz", **arrays)
    np.savez_compressed(tmp_path / "packed.npz", **arrays)
    np.save(tmp_path / "objects.npy", np.array(arrays, dtype=object))
    np.save(tmp_path / "wider.npy", rng.integers(0, 2**31, 3 * 10**6).astype("u4"))
    for zipped_ in (True, False):
        tensors = {k: torch.from_numpy(v.astype("f4")) for k, v in arrays.items()}
        torch.save(tensors, tmp_path / f"{zipped_}.pt", _use_new_zipfile_serialization=zipped_)
    for path, outcome in outcomes(sorted(tmp_path.iterdir())).items():
        assert outcome.error is None, outcome
        most = 2 if path.stem == "wider" else 1.1
        assert outcome.memory is None or outcome.memory < most * path.stat().st_size + 2**22, (path, outcome)
    assert (tmp_path / "generic_model.pkl").stat().st_size > 48 * 10**6


def test_the_canary_would_sing(tmp_path):
    """The attacks are real ones: pickle itself executes them."""
    mark = tmp_path / "canary"
    command = hostile_pickles.calls(str(mark))
    for name in ("posix system", "builtins eval", "STACK_GLOBAL of posix system", "name out of the memo"):
        if name != "posix system" or os.name == "posix":
            pickle.loads(command[name])
            assert mark.exists(), name
            mark.unlink()
