"""Folders of results against a folder of truths: `python -m training.evaluate folders`.

Pictures belong together by their file's stem. Every result is brought to the size of its truth and measured;
pictures.csv lists all, summary.md the means with 95 % bootstrap intervals, sheet.png shows some.
"""

from __future__ import annotations

import io
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from rig_core import align, buffers, raster
from rig_core.data import Dataset
from rig_core.estimators import landmarks
from rig_core.face import FaceCode
from rig_core.heads import FaceModel
from training import lpips, measures, reinfer
from training.report import COLUMNS, DISTANCES, TRUTH, page, summary, to_csv

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
UNCHANGED = "source unchanged"
FACE = ("face", "eyes", "mouth", "teeth")  # masks of a head
ALIGNED = 256  # px, of the crops that the identity encoder is shown


# ---------------------------------------------------------------------------------------------- the files


def pictures(folder: Path) -> dict[str, Path]:
    """Picture files of a folder by stem, in order; of a dataset folder those below images/.

    Raises ValueError for a folder without pictures, and for two files of one stem.
    """
    folder = folder / "images" if (folder / "index.json").is_file() else folder
    if not folder.is_dir():
        raise ValueError(f"{folder} is no folder: name one with picture files")
    found: dict[str, Path] = {}
    for path in sorted(p for p in folder.iterdir() if p.suffix.lower() in SUFFIXES):
        if path.stem in found:
            raise ValueError(f"{path} and {found[path.stem].name} have one name: keep one of them")
        found[path.stem] = path
    if not found:
        raise ValueError(f"{folder} holds no pictures ({', '.join(SUFFIXES)})")
    return found


def match(folders: dict[str, dict[str, Path]]) -> tuple[list[str], list[str]]:
    """Stems that every folder has, and a line about each folder that lacks or exceeds some.

    folders: name -> pictures. Raises ValueError when no stem is in all of them.
    """
    common = sorted(set.intersection(*map(set, folders.values())))
    every = set.union(*map(set, folders.values()))
    lines = [
        f"{name} lacks {len(every - files.keys())}: {some(sorted(every - files.keys()))}"
        for name, files in folders.items()
        if every - files.keys()
    ]
    if not common:
        first = "; ".join(f"{name}: {some(list(files))}" for name, files in folders.items())
        raise ValueError(f"no picture is in all folders under one name ({first}): name the files alike")
    return common, lines


def some(names: list[str], most: int = 8) -> str:
    """The first names of a list, as text."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def read(path: Path, size: tuple[int, int] | None = None) -> Tensor:
    """A picture file as [1,3,H,W] 0..1, turned as its EXIF says; with size (H, W) brought to it (Lanczos).

    Raises ValueError for a file that cannot be read and for one of another shape (by more than 2 %).
    """
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as file:
            picture = ImageOps.exif_transpose(file).convert("RGB")
    except OSError as e:
        raise ValueError(f"{path} is not a readable picture ({e}): make it again") from e
    w, h = picture.size
    if size is not None and (h, w) != size:
        if not 0.98 < (h * size[1]) / (w * size[0]) < 1.02:
            raise ValueError(
                f"{path} is {w} x {h} px, the truth has the shape of {size[1]} x {size[0]}: crop both alike"
            )
        picture = picture.resize(size[::-1], Image.Resampling.LANCZOS)
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None].float() / 255


def at_most(image: Tensor, side: int | None) -> tuple[int, int]:
    """Size (H, W) of a picture whose longer side is to be `side` px; its own without."""
    h, w = image.shape[2:]
    if side is None:
        return h, w
    return max(1, round(h * side / max(h, w))), max(1, round(w * side / max(h, w)))


def write(path: Path, content: str | bytes) -> None:
    """Write a file as a whole or not at all."""
    part = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        part.write_bytes(content.encode() if isinstance(content, str) else content)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


# ------------------------------------------------------------------------------------------- the measures


@dataclass(frozen=True)
class Judge:
    """What measures: the head with its encoder, the identity encoder, LPIPS's weights (None: not measured),
    and whether pictures are compared in the face region alone."""

    face: FaceModel
    recognise: torch.nn.Module
    weights: dict[str, Tensor] | None = None
    masked: bool = False


@dataclass(frozen=True)
class Seen:
    """A picture [1,3,H,W], its landmarks [1,68,2] and code; NaN where no face was found."""

    image: Tensor
    points: Tensor
    code: FaceCode


def look(judge: Judge, image: Tensor) -> Seen:
    """Find the face of a picture and estimate its code."""
    try:
        points = reinfer.find(image)
    except landmarks.NoFaceError:
        points = image.new_full((1, 68, 2), torch.nan)
    return Seen(image, points, reinfer.reinfer(judge.face.head, image, points, judge.face.encoder))


def region(head, code: FaceCode, skin: bool = False) -> Tensor:
    """Where a fitted head shows its face, not ears or neck, [1,1,H,W] 0 or 1; skin: not eyes or mouth."""
    weight = head.masks["face"] * head.masks["skin"]
    if not skin:
        weight = torch.stack([head.masks[k] for k in FACE if k in head.masks]).amax(0)
    fragments, _, _ = buffers.geometry(head, code)
    shown = raster.interpolate_verts(fragments, head.faces, weight[None, :, None].to(code.cam))
    return (shown > 0.5).float()


def aligned(seen: Seen) -> Tensor:
    """The face set upright as in FFHQ, [1,3,256,256]."""
    return align.ffhq_crop(seen.points, ALIGNED).apply(seen.image).clamp(0, 1)


def measure(judge: Judge, truth: Seen, result: Seen, wanted: FaceCode) -> dict[str, float]:
    """`COLUMNS` of one result; NaN for what needs a face where none was found, or weights that are not there.

    wanted: the code that re-inference is compared with. With `masked`, PSNR, SSIM, MSE, DSSIM are means over
    the truth's face region, and LPIPS sees both pictures black outside of it.
    """
    out = dict.fromkeys(COLUMNS, math.nan)
    a, b, head = truth.image, result.image, judge.face.head
    known = bool(reinfer.seen(truth.code))
    mask = torch.ones_like(a[:, :1])
    if judge.masked:
        mask = region(head, truth.code) if known else 0 * mask
    if mask.any():
        out["mse"], out["psnr"] = measures.mse(a, b, mask), measures.psnr(a, b, mask)
        out["ssim"] = measures.ssim(a, b, mask)
        out["dssim"] = (1 - out["ssim"]) / 2
        if judge.weights is not None:
            out["lpips"] = float(lpips.distance(judge.weights, a * mask, b * mask))
    if known and "face" in head.masks:
        skin = region(head, truth.code, skin=True)
        out["ita"] = measures.skin_error(a, b, skin) if skin.any() else math.nan
    if reinfer.seen(result.code):
        out |= {k: float(v) for k, v in reinfer.errors(head, result.code, wanted).items()}
        found = reinfer.distances(head, result.code, wanted)
        out |= {name: float(v) for (name, _), v in zip(DISTANCES, found.values())}
        if known:
            out["identity"] = float(
                measures.identity_cosine(judge.recognise, aligned(truth), aligned(result))
            )
            out["drift"] = float(measures.moved(truth.points[:, 17:], result.points[:, 17:]))
    return out


@torch.no_grad()
def measure_all(
    judge: Judge,
    stems: list[str],
    truth: dict[str, Path],
    results: dict[str, dict[str, Path]],
    asked: dict[str, FaceCode] | None = None,
    side: int | None = None,
) -> list[dict]:
    """A row for every picture and method: "picture", "method" and `COLUMNS`.

    asked: codes by stem that re-inference is compared with, else those of the truths.
    side: px, longer side of the pictures when they are compared; None for the truth's own.
    """
    rows = []
    for stem in tqdm(stems, desc="measure", unit="picture"):
        image = read(truth[stem])
        size = at_most(image, side)
        image = image if size == tuple(image.shape[2:]) else read(truth[stem], size)
        right = look(judge, image)
        wanted = asked[stem] if asked else right.code
        for name, files in results.items():
            found = look(judge, read(files[stem], size))
            rows.append({"picture": stem, "method": name} | measure(judge, right, found, wanted))
    return rows


def asked_codes(dataset: Dataset, stems: list[str]) -> dict[str, FaceCode]:
    """The codes of a dataset by the names of its entries. Raises ValueError when one is missing."""
    place = {e.name: i for i, e in enumerate(dataset.entries)}
    missing = [s for s in stems if s not in place]
    if missing:
        raise ValueError(
            f"{dataset.folder} has no codes for {some(missing)}: name its entries like the files"
        )
    return {s: dataset.codes([place[s]]) for s in stems}


def compare(
    judge: Judge,
    truth: Path,
    results: dict[str, Path],
    out: Path,
    source: Path | None = None,
    asked: Path | None = None,
    side: int | None = None,
    published: bool = False,
    notes: Sequence[str] = (),
) -> str:
    """Measure folders of results, write pictures.csv, summary.md and sheet.png to out, return the summary.

    results: name -> folder; with a source folder its pictures are a method too. Only pictures that all
    folders have are compared. notes: lines to begin the summary with. Raises ValueError for folders and files
    that cannot be compared.
    """
    if judge.masked and "face" not in judge.face.head.masks:
        raise ValueError(
            "the head has no mask of the face: put FLAME_masks.pkl to FLAME's files, or do not mask"
        )
    first = {} if source is None else {UNCHANGED: pictures(source)}
    if {TRUTH, UNCHANGED} & results.keys():
        raise ValueError(f"'{TRUTH}' and '{UNCHANGED}' are taken: give the results another name")
    methods = first | {name: pictures(folder) for name, folder in results.items()}
    right = pictures(truth)
    folders = {TRUTH: right} | methods
    stems, unmatched = match(folders)
    codes = asked_codes(Dataset.open(asked), stems) if asked else None
    rows = measure_all(judge, stems, right, methods, codes, side)
    where = "in the face region" if judge.masked else "whole pictures"
    about = [
        *notes,
        f"{len(stems)} pictures of {truth}, {where}, {'as they are' if side is None else f'{side} px'}.",
    ]
    about += [
        "Codes are compared with " + (f"those of {asked}." if asked else "those of the truth's pictures.")
    ]
    about += [f"Not compared: {line}." for line in unmatched]
    text = summary(rows, about, published)
    out.mkdir(parents=True, exist_ok=True)
    write(out / "pictures.csv", to_csv(rows))
    write(out / "summary.md", text)
    names = [*first, TRUTH, *results]
    png = io.BytesIO()
    page(rows, names, lambda name, stem: read(folders[name][stem])[0]).save(png, "PNG")
    write(out / "sheet.png", png.getvalue())
    return text
