"""Official files to .safetensors: the same tensors, bit for bit, without what is not used, safe to pass on.

    python -m training.convert model050000.pt ImgCond_*.pt ImgEncoder_*.pt --out models/face_rig
    python -m training.convert DECA/data --out models/face_rig      FLAME with its parts, and DECA

A pair (DiFaReli's two files, DiffAE and its classifier) becomes one file; a partner that is not named is
looked for beside the other. Face Rig treats a converted file as it does the original. The licence stays the
original's, and is written into the file with its name, sha256 and size.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from rig_core import catalogue, checkpoints, files, flame_files
from rig_core.denoisers.relight import both
from rig_core.files import CheckpointError
from rig_core.known_files import BY_NAME

VERSION = 1
NAMES = {  # what a file is -> the name of the converted one, "" for the file's own
    "rig": "",
    "difareli unet": "",
    "deca": "deca",
    "flame": "flame",
    "arcface": "arcface_r18",
    "diffae": "diffae_shadow",
    "bisenet": "bisenet",
}
KINDS = {  # where it is not the same word
    "rig": "diffusion_rig",
    "difareli unet": "difareli",
    "arcface": "identity",
    "diffae": "diffae_shadow",
}
PARTNERS = {"difareli modulator": "difareli unet", "shadow classifier": "diffae"}
PARTS = ("flame", "template", "embedding", "texture", "texture bfm", "masks")
ENCODER = "ema_model.encoder."


@dataclass(frozen=True)
class Job:
    """One file to write. what: its name in known_files; sources: the official files, the main one first."""

    what: str
    sources: tuple[Path, ...]

    @property
    def name(self) -> str:
        """Of the file to write."""
        stem = NAMES[self.what] or self.sources[0].stem.replace("ImgCond", "difareli")
        return f"{stem}.safetensors"


def plan(paths: Sequence[Path]) -> list[Job]:
    """What to write for these files and folders. Raises CheckpointError for what cannot be converted."""
    jobs: list[Job] = []
    every = [p for path in paths for p in _official(path)]
    found = {p: catalogue.identify(p) for p in every}
    for path, f in found.items():
        if not f.complete:
            raise CheckpointError(f"{path}: {'; '.join(t for t in (f.what, f.detail, f.advice) if t)}")
        if f.kind in PARTS:
            parts = flame_files.find(path)
            model = parts.pop("model", path)
            parts.pop("encoder", None)
            jobs.append(Job("flame", (model, *parts.values())))
        elif f.kind in PARTNERS:
            if PARTNERS[f.kind] not in {g.kind for g in found.values()}:
                raise CheckpointError(f"{path}: name {BY_NAME[PARTNERS[f.kind]].published} as well")
        elif f.kind not in NAMES or path.suffix == ".safetensors":
            raise CheckpointError(f"{path}: {f.what}: there is nothing to convert")
        else:
            jobs.append(Job(f.kind, (path, *_partner(path, f.kind, found))))
    return list(dict.fromkeys(jobs))


def _official(path: Path) -> list[Path]:
    """A file, or of a folder FLAME's model and DECA's encoder."""
    if not path.is_dir():
        return [path]
    found = flame_files.find(path)
    there = [found[k] for k in ("model", "encoder") if k in found and found[k].suffix != ".safetensors"]
    if not there:
        raise CheckpointError(f"{path}: it holds neither generic_model.pkl nor deca_model.tar: name files")
    return there


def _partner(path: Path, what: str, found: dict[Path, catalogue.Finding]) -> list[Path]:
    """The other file of a pair: of the expected name, else the only one that was named."""
    if what not in PARTNERS.values():
        return []
    expected = "shadow_cls_weight.pkl" if what == "diffae" else path.name.replace("ImgCond", "ImgEncoder")
    beside = path.with_name(expected)
    known = (
        dict(found)
        if beside in found or not beside.exists()
        else found | {beside: catalogue.identify(beside)}
    )
    fits = [p for p, f in known.items() if PARTNERS.get(f.kind) == what and f.complete]
    if what == "difareli unet":
        fits = [p for p in fits if catalogue.pair(path, p)]
    same = [p for p in fits if p.name == expected] or fits
    if len(same) != 1:
        raise CheckpointError(
            f"{path}: its partner {expected} is not beside it, or is none: name the right one"
        )
    return same


def tensors(job: Job) -> dict[str, Tensor]:
    """The tensors of a job under their official names. Raises CheckpointError."""
    first, *others = job.sources
    if job.what == "flame":
        return flame_files.tensors(first)
    if job.what == "deca":
        return checkpoints.deca_tensors(first)
    if job.what == "diffae":
        found = {k: v for k, v in files.read(first, ENCODER)[0].items() if k.startswith(ENCODER)}
        return found | {"weight": files.read_tree(others[0])["weight"]}
    found = files.read(first)[0]
    if job.what == "difareli unet":
        return both(found, files.read(others[0])[0])
    if job.what == "arcface":
        return {k.removeprefix("model.").removeprefix("module."): v for k, v in found.items()}
    return found


def about(job: Job) -> dict:
    """The metadata of a job's file: its kind, and of each original name, size, sha256, page and licence."""
    meta = {"kind": KINDS.get(job.what, job.what), "converted": {"version": VERSION, "files": []}}
    for path in job.sources:
        known = BY_NAME.get(catalogue.identify(path).kind, BY_NAME[job.what])
        one = {"name": path.name, "bytes": path.stat().st_size, "sha256": _sha256(path)}
        meta["converted"]["files"].append(one | {"source": known.source, "licence": known.licence})
    return meta | {"head": "flame"} if job.what in ("rig", "difareli unet") else meta


def write(job: Job, path: Path) -> None:
    """Convert, read back, compare, and only then put the file in its place.

    Raises CheckpointError, RuntimeError when what was written is not what was read.
    """
    wanted, meta = owned(tensors(job)), about(job)
    temporary = path.with_name(f".{path.name}.new")
    try:
        files.save(temporary, wanted, meta)
        found, found_meta = files.read(temporary)
        if found_meta != meta or found.keys() != wanted.keys():
            raise RuntimeError(f"{path}: it reads otherwise than it was written: check the disk")
        broken = [k for k in wanted if not same_bits(found[k], wanted[k])]
        if broken:
            raise RuntimeError(f"{path}: '{broken[0]}' reads otherwise than it was written: check the disk")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def owned(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous, each on memory of its own: what shares a storage is stored once each."""
    taken, out = set(), {}
    for name, v in tensors.items():
        v = v.detach().contiguous()
        storage = v.untyped_storage()
        out[name] = v.clone() if storage.nbytes() > v.nbytes or storage.data_ptr() in taken else v
        taken.add(storage.data_ptr())
    return out


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal in type, shape and every bit, NaN included."""
    raw = (x.contiguous().reshape(-1).view(torch.uint8) for x in (a, b))
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(*raw)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as f:
        while piece := f.read(2**20):
            digest.update(piece)
    return digest.hexdigest()


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m training.convert",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("files", type=Path, nargs="+", metavar="FILE", help="official file or FLAME's folder")
    parser.add_argument("--out", type=Path, required=True, help="a folder, or a .safetensors for one model")
    parser.add_argument("--force", action="store_true", help="overwrite")
    args = parser.parse_args(arguments)
    try:
        jobs = plan(args.files)
        single = args.out.suffix == ".safetensors"
        if single and len(jobs) > 1:
            parser.error(f"{args.out} is one file, but {len(jobs)} are to be written: name a folder")
        outs = [args.out if single else args.out / job.name for job in jobs]
        double = {p for p in outs if outs.count(p) > 1}
        if double:
            parser.error(f"{double.pop()} would be written twice: convert the files one by one")
        there = [p for p in outs if p.exists()]
        if there and not args.force:
            parser.error(f"{there[0]} exists: --force overwrites it")
        for i, (job, out) in enumerate(zip(jobs, outs, strict=True), 1):
            out.parent.mkdir(parents=True, exist_ok=True)
            before = sum(p.stat().st_size for p in job.sources)
            print(f"{i}/{len(jobs)} {', '.join(p.name for p in job.sources)} -> {out}", flush=True)
            write(job, out)
            after = out.stat().st_size
            sizes = f"{catalogue.amount(before)} -> {catalogue.amount(after)}"
            print(f"    {sizes}, {before - after} bytes saved", flush=True)
    except (CheckpointError, OSError, RuntimeError) as e:
        sys.exit(f"convert: {e}")


if __name__ == "__main__":
    main()
