"""What a file is, whether it is whole, which node takes it; what files are good for together, what they lack.

Nothing here reads more of a file than its structure, executes anything, or raises for a strange file.
`python -m rig_core.checkpoints PATH...` and the node Check Models print the report.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import stat
import tarfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from itertools import islice
from pathlib import Path
from typing import BinaryIO

from . import flame_files, zip_file
from .checkpoints import architecture
from .denoisers.relight import DiFaReli, RelightConfig, both
from .files import one_line, printable
from .known_files import BY_NAME, KNOWN, USES, Known, recognise
from .opcodes import CHUNK
from .outline import FAULTS, Outline, first, outline

DEPTH, MOST = 3, 500  # of folders and files that a survey looks at
BEGINNING, PACKED = 64 * 2**20, 8  # bytes of a packed file and packed files that are looked at
ENDINGS = {".safetensors", ".pt", ".pth", ".tar", ".ckpt", ".pkl", ".npy", ".npz", ".obj", ".bin"}
ENDINGS |= {".zip", ".gz", ".tgz"}
UNKNOWN = "nothing that Face Rig knows"
UNFINISHED = {".part", ".partial", ".crdownload", ".download", ".opdownload", ".tmp", ".aria2"}
WRONG = {  # form -> what it is, what to do
    "empty": ("an empty file", "copy or download it again"),
    "lfs": (
        "a Git LFS pointer, not the file itself",
        "run 'git lfs pull' in its repository, or download the file by hand",
    ),
    "page": (
        "a web page under the name of a file",
        "open the link in a browser, confirm what it asks for, and download the file itself",
    ),
    "gzip": ("a gzip archive", "unpack it"),
}


@dataclass(frozen=True)
class Finding:
    """What is known of one file. complete: it can be used as it lies; detail: figures, or what is wrong;
    node: the display name of the node that takes it; advice: what to do, "" when nothing; kind: its name in
    known_files.KNOWN, "" for none."""

    path: Path
    what: str
    complete: bool
    detail: str = ""
    node: str = ""
    advice: str = ""
    kind: str = ""


# ---------------------------------------------------------------------------------------------- one file


def identify(path: str | Path) -> Finding:
    """What this file is. Its neighbours are not looked at: see `survey`."""
    path = Path(path)
    try:
        info = os.stat(path)
        if not stat.S_ISREG(info.st_mode):
            return Finding(path, "not a file", False, advice="name a file or a folder")
        with open(path, "rb") as f:
            found = outline(f, info.st_size)
            if found.form in ("zip", "tar") and not found.fault:
                return _packed(path, found, f)
    except OSError as e:
        advice = "check the name and the rights"
        return Finding(path, "unreadable", False, e.strerror or one_line(e), advice=advice)
    return _judge(path, found, info.st_size)


def _judge(path: Path, found: Outline, size: int) -> Finding:
    """The finding for a file of this structure."""
    if found.form in WRONG:
        what, advice = WRONG[found.form]
        detail = f"it stands for {amount(found.lacking)}" if found.form == "lfs" and found.lacking else ""
        return Finding(path, what, False, detail, advice=advice)
    known = recognise(found)
    if known is None:
        return _unknown(path, found, size)
    detail, advice, complete = found.fault, "", not found.fault
    if found.fault:
        advice = _again(found, size)
    elif known.check:
        try:
            detail = printable(known.check(found.tree, found.meta)[:200])
        except FAULTS as e:
            detail, complete = f"incomplete or of another version: {one_line(e)}", False
            advice = f"get it again: {known.source}" if known.source else "make or get it again"
    if complete:
        complete, advice = _name(path, known)
    return Finding(path, known.what, complete, detail, known.node, advice, known.name)


def _unknown(path: Path, found: Outline, size: int) -> Finding:
    meant = next((k for k in KNOWN if k.published and fnmatch(path.name.lower(), k.published.lower())), None)
    if found.fault:
        what = f"a {found.form} file" + (f", by its name {meant.what}" if meant else "")
        return Finding(path, what, False, found.fault, advice=_again(found, size))
    kind = printable(str(found.meta.get("kind", ""))[:40])
    if kind:
        return Finding(path, f"a file of Face Rig of the kind '{kind}'", True)
    return _useless(path, found.form, found.tree)


def _useless(path: Path, form: str, names: Iterable) -> Finding:
    some = printable(", ".join(str(k)[-40:] for k in islice(names, 3)))
    detail = f"{form}: {some}" if some else ""
    return Finding(path, UNKNOWN, False, detail, advice="it is not needed here")


def _again(found: Outline, size: int) -> str:
    if found.lacking > 1:
        whole = size + found.lacking
        return f"download it again: {amount(size)} of at least {amount(whole)} are there"
    return f"download it again: {amount(size)} are there" + (", the end is missing" if found.lacking else "")


def _name(path: Path, known: Known) -> tuple[bool, str]:
    """Whether the file can stay under its name, and what to say of it."""
    if path.suffix.lower() in UNFINISHED:
        return False, f"it is whole in spite of its name: rename it to {known.published or path.stem}"
    fits = path.name in known.named or fnmatch(path.name, known.published)
    if fits or not known.published or path.suffix == ".safetensors":
        return True, ""
    if known.named:
        if known.alone and path.suffix in {Path(n).suffix for n in known.named}:
            return True, f"choose this file itself in {known.node}, or rename it to {known.published}"
        return False, f"it is looked for by its name: rename it to {known.published}"
    return True, f"published as {known.published}; known by its contents, the name does not matter"


def amount(size: int) -> str:
    """Bytes as people say them."""
    for unit, step in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if size >= step:
            return f"{size / step:.1f} {unit}"
    return f"{size} bytes"


# ---------------------------------------------------------------------------------------------- archives


def _packed(path: Path, found: Outline, f: BinaryIO) -> Finding:
    """An archive: say which of its members is of use."""
    inside = []
    for name, size, start in _members(f, found.form):
        known = recognise(outline(start, size))
        inside += [f"{name} ({known.what})"] if known else []
    if not inside:
        return _useless(path, f"{found.form} archive", found.members)
    advice = printable(f"unpack {', '.join(inside)} from it")
    return Finding(path, f"a {found.form} archive", False, advice=advice)


def _members(f: BinaryIO, form: str):
    """(name, size, beginning) of the first few large members."""
    f.seek(0)
    try:
        if form == "zip":
            every = zip_file.members(f, os.fstat(f.fileno()).st_size).values()
            for m in _largest(every, lambda m: m.size):
                yield m.name, m.size, first(f, m, BEGINNING // CHUNK)
        else:
            with tarfile.open(fileobj=f) as t:
                for m in _largest((m for m in t if m.isfile()), lambda m: m.size):
                    yield m.name, m.size, io.BytesIO(t.extractfile(m).read(BEGINNING))
    except FAULTS:  # encrypted, damaged or packed in an unknown way: what was seen so far has to do
        return


def _largest(members: Iterable, size: Callable) -> list:
    return sorted(islice((m for m in members if size(m)), MOST), key=size, reverse=True)[:PACKED]


# ---------------------------------------------------------------------------------------------- many files


def survey(*paths: str | Path) -> list[Finding]:
    """The files named, and those below the folders named that look like models.

    Three folders deep and 500 files a folder at most. A file that lacks its partner is not complete.
    """
    found = []
    for path in map(Path, paths):
        if path.is_dir():
            every = _files(path, DEPTH)
            if len(every) > MOST:
                what = f"a folder of {len(every)} files, of which {MOST} were looked at"
                found.append(Finding(path, what, True))
            some = map(identify, every[:MOST])
            found += [f for f in some if f.kind or _is_like_a_model(f.path)]
        else:
            found.append(identify(path))
    around = {f.path: f for f in found}
    for folder in {f.path.parent for f in found if f.kind in PARTNERS}:
        around |= {p: identify(p) for p in _files(folder, 0)[:MOST] if p not in around}
    return [PARTNERS[f.kind](f, around.values()) if f.complete and f.kind in PARTNERS else f for f in found]


def _files(folder: Path, depth: int) -> list[Path]:
    """Files below folder, those like models and the nearest first; without hidden ones and linked folders."""
    found, level = [], [folder]
    for _ in range(depth + 1):
        entries = []
        for place in level:
            with contextlib.suppress(OSError):  # no right to look
                entries += sorted(p for p in place.iterdir() if not p.name.startswith("."))
        found += [p for p in entries if p.is_file()]
        level = [p for p in entries if p.is_dir() and not p.is_symlink()]
    return sorted(found, key=lambda p: not _is_like_a_model(p))


def _is_like_a_model(path: Path) -> bool:
    return path.suffix.lower() in ENDINGS | UNFINISHED


def _unet(f: Finding, every: Iterable[Finding]) -> Finding:
    """DiFaReli's denoiser needs the Modulator of its training."""
    fits = [g.path for g in every if g.kind == "difareli modulator" and pair(f.path, g.path)]
    wanted = f.path.with_name(f.path.name.replace("ImgCond", "ImgEncoder"))
    if not fits:
        advice = "its Modulator is missing: put ImgEncoder_*.pt of the same step beside it"
        return replace(f, complete=False, advice=advice)
    if wanted in fits and wanted != f.path:
        return f
    advice = f"choose {fits[0]} at 'modulator' of {f.node}"
    return replace(f, advice=advice + (f", or name it {wanted.name}" if wanted != f.path else ""))


def _modulator(f: Finding, every: Iterable[Finding]) -> Finding:
    if any(g.kind == "difareli unet" and pair(g.path, f.path) for g in every):
        return f
    advice = "its denoiser is missing: put ImgCond_*.pt of the same step beside it"
    return replace(f, complete=False, advice=advice)


def pair(unet: Path, modulator: Path) -> bool:
    """Whether two published files of DiFaReli are of one network."""
    try:
        with open(unet, "rb") as a, open(modulator, "rb") as b:
            trees = [outline(f, os.fstat(f.fileno()).st_size).tree for f in (a, b)]
        architecture(DiFaReli, RelightConfig, both(*trees), {})
    except FAULTS:
        return False
    return True


def _beside(name: str, other: str) -> Callable[[Finding, Iterable[Finding]], Finding]:
    """For a file that needs the one called `name` in its folder, whose kind is `other`."""

    def judge(f: Finding, every: Iterable[Finding]) -> Finding:
        there = [g.path for g in every if g.kind == other and g.complete]
        if any(p.parent == f.path.parent for p in there):
            return f
        what = f"it needs {BY_NAME[other].what} ({name}) beside it"
        return replace(f, complete=False, advice=what + (f": move {there[0]} there" if there else ""))

    return judge


def _lora(f: Finding, every: Iterable[Finding]) -> Finding:
    with open(f.path, "rb") as file:
        base = str(outline(file, os.fstat(file.fileno()).st_size).meta.get("base") or "")
    if not base or any(g.path == f.path.with_name(Path(base).name) for g in every):
        return f
    return replace(f, complete=False, advice=f"it needs {base}, which it was trained on, beside it")


PARTNERS = {  # kind -> what judges a file together with all the others
    "difareli unet": _unet,
    "difareli modulator": _modulator,
    "diffae": _beside("shadow_cls_weight.pkl", "shadow classifier"),
    "shadow classifier": _beside("last.ckpt", "diffae"),
    "lora": _lora,
}


def missing(findings: Sequence[Finding]) -> list[str]:
    """For each use of official files what is there and what is not, from where, under which licence."""
    lines, whole = [], set()
    for use in USES:
        near = _together(findings) if use.together else findings
        lacking = [k for k in use.needs if not _have(k, near)]
        parts = [p for p in use.parts if p not in whole]
        none = len(lacking) == len(use.needs)
        state = "missing" if none else "incomplete" if lacking or parts else "complete"
        whole |= {use.what} if state == "complete" else set()
        lines.append(f"{use.what}: {state}")
        for kinds in lacking:
            lines += _lack("needs", kinds, findings, near)
        for kinds in use.wants:
            lines += [] if none or _have(kinds, near) else _lack("better with", kinds, findings, near)
        lines += [f"  needs: {p}, see above" for p in parts]
    return lines


def _lack(word: str, kinds: Sequence[str], findings: Sequence[Finding], near: Sequence[Finding]) -> list[str]:
    """Lines about a missing file: where it is to be had, or from where it has to be moved."""
    known = BY_NAME[kinds[0]]
    lines = [f"  {word}: {known.what} ({known.published})"]
    away = [f.path for f in findings if f.complete and f.kind in kinds]
    if away and near:
        return [*lines, f"    it is {away[0]}: move it to {near[0].path.parent}"]
    return [*lines, f"    from {known.source}", f"    licence: {known.licence}"]


def _have(kinds: Sequence[str], findings: Sequence[Finding]) -> bool:
    return any(f.complete and f.kind in kinds for f in findings)


def _together(findings: Sequence[Finding]) -> list[Finding]:
    """Of FLAME's and DECA's files those that Load Face Model finds from one of them, the one with most."""
    parts = [f for f in findings if f.complete and f.node == "Load Face Model"]
    chosen = [f.path for f in parts if BY_NAME[f.kind].alone]
    reach = []
    for path in chosen:
        with contextlib.suppress(*FAULTS):
            reach.append(set(flame_files.find(path).values()))
    return max(([f for f in parts if f.path in found] for found in reach), key=len, default=[])


def report(*paths: str | Path) -> str:
    """The survey as text: each file, then what the files are good for together."""
    return _text(paths, survey(*paths))


def _text(paths: Sequence[str | Path], found: Sequence[Finding]) -> str:
    lines = [f"Face Rig: {', '.join(map(str, paths))}", ""]
    for f in found:
        mark = "ok " if f.complete else "-- " if f.what == UNKNOWN else "BAD"
        lines.append(f"{mark}  {printable(_short(f.path, paths))}: {f.what}")
        more = [f.detail, f"node: {f.node}" if f.node and f.complete else ""]
        lines += [f"       {'; '.join(m for m in more if m)}"] if any(more) else []
        lines += [f"       -> {f.advice}"] if f.advice else []
    lines += [] if found else ["no model files here"]
    return "\n".join([*lines, "", "What the official files are good for:", "", *missing(found)])


def _short(path: Path, paths: Sequence[str | Path]) -> str:
    """The path below the folder that was named."""
    for folder in map(Path, paths):
        if folder in path.parents:
            return str(path.relative_to(folder)).replace("\\", "/")
    return str(path)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command: print the report; 0 when every file is usable, 1 otherwise."""
    parser = argparse.ArgumentParser(
        prog="python -m rig_core.checkpoints", description="What model files are, and what is missing."
    )
    parser.add_argument("paths", nargs="+", metavar="PATH", help="a file or a folder")
    paths = parser.parse_args(arguments).paths
    found = survey(*paths)
    print(_text(paths, found))
    named = [f for f in found if f.what != UNKNOWN or str(f.path) in paths]
    return 0 if named and all(f.complete for f in named) else 1
