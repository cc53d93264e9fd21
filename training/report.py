"""What the comparison of folders prints: the table of all pictures, the means of each method, the sheet."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from training import lpips, measures, reinfer
from training.demo import sheet

TRUTH = "truth"  # the name of that folder
TITLE = 42  # characters that fit over a picture of the sheet
SHOWN = 5  # rows of the sheet, evenly over the pictures; the worst of each method follow

# Columns of the table of pictures and of the two of re-inference: name in the CSV, title.
PICTURES = (
    ("lpips", "LPIPS"),
    ("mse", "MSE"),
    ("dssim", "DSSIM"),
    ("identity", "identity cosine"),
    ("ita", "ITA, degrees"),
    ("psnr", "PSNR, dB"),
    ("ssim", "SSIM"),
)
CODES = tuple((part, part) for part in reinfer.PARTS)
DISTANCES = (
    ("light_percent", "light, % of the shading"),
    ("shape_mm", "shape, mm"),
    ("expression_mm", "expression, mm"),
    ("pose_mm", "pose, mm"),
    ("drift", "landmark drift, % of the eye distance"),
)
COLUMNS = tuple(name for name, _ in (*PICTURES, *CODES, *DISTANCES))

MULTI_PIE = "Multi-PIE, one person under two lights, face region at 256 px"
PUBLISHED = (
    (
        f"{MULTI_PIE}; measured by the authors of IFS-Light (ACM MM 2025)",
        ["method", "LPIPS", "MSE", "DSSIM", "identity cosine", "ITA, degrees"],
        [
            ["DPR (2019)", "0.190", "0.0212", "0.1405", "0.729", "8.5"],
            ["Hou et al. (2022)", "0.200", "0.0182", "0.132", "0.758", "10.5"],
            ["DiFaReli (2023)", "0.194", "0.0125", "0.1135", "0.732", "6.8"],
            ["IFS-Light (2025)", "0.1605", "0.0078", "0.096", "0.779", "6.1"],
        ],
    ),
    (
        "DECA re-inference, in the scale printed there; measured by the authors of ControlFace (CVPR 2025)",
        ["method", "light", "shape", "expression", "pose"],
        [
            ["GIF (2020)", "17.04", "2.29", "8.16", "8.17"],
            ["CapHuman (2024)", "15.16", "2.65", "6.68", "19.03"],
            ["DiffusionRig (2023)", "6.31", "2.11", "5.58", "6.26"],
            ["ControlFace (2025)", "3.75", "2.56", "5.43", "7.67"],
        ],
    ),
)


def to_csv(rows: list[dict]) -> str:
    """All rows, numbers in full, an empty cell where there is none."""
    text = io.StringIO()
    writer = csv.DictWriter(text, ["picture", "method", *COLUMNS], lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({k: "" if isinstance(v, float) and math.isnan(v) else v for k, v in row.items()})
    return text.getvalue()


def by_method(rows: list[dict]) -> dict[str, list[dict]]:
    """The rows of each method, in the order in which they come."""
    out: dict[str, list[dict]] = {}
    for row in rows:
        out.setdefault(row["method"], []).append(row)
    return out


def means(rows: list[dict], columns) -> str:
    """A Markdown table of one line a method: mean and 95 % interval over the pictures."""

    def cell(values: Tensor) -> str | None:
        low, high = measures.interval(values)
        mean = f"{float(values.nanmean()):.3g}"
        return None if math.isnan(low) else mean if low == high else f"{mean} [{low:.3g}, {high:.3g}]"

    lines = []
    for name, own in by_method(rows).items():
        columns_of = (torch.tensor([r[k] for r in own], dtype=torch.float64) for k, _ in columns)
        lines.append([name, *map(cell, columns_of)])
    return measures.table(["method", *(title for _, title in columns)], lines)


def summary(rows: list[dict], about: list[str], published: bool = False) -> str:
    """The report in Markdown. about: lines on what was compared."""
    text = [*about, "", "Mean and 95 % bootstrap interval over the pictures. Pictures against the truth:", ""]
    text += [means(rows, PICTURES), ""]
    if all(math.isnan(r["lpips"]) for r in rows):
        text += [f"{lpips.ADVICE}.", ""]
    text += ["Re-inference: root mean square error of the numbers of the face code, as they stand:", ""]
    text += [means(rows, CODES), "", "The same in units that heads share (see training/reinfer.py):", ""]
    text += [means(rows, DISTANCES)]
    lost = {k: sum(math.isnan(r["light"]) for r in own) for k, own in by_method(rows).items()}
    for name, n in lost.items():
        if n:
            text += ["", f"{name}: no face found in {n} pictures, which count only where none is needed."]
    for title, header, lines in PUBLISHED if published else ():
        text += ["", f"Published, by others on other data. {title}:", "", measures.table(header, lines)]
    return "\n".join(text).rstrip() + "\n"


def worst(rows: list[dict]) -> dict[str, str]:
    """The picture that each method did worst on, by LPIPS, or by MSE where that was not measured."""
    out = {}
    for name, own in by_method(rows).items():
        key = "mse" if math.isnan(own[0]["lpips"]) else "lpips"
        out[name] = max(own, key=lambda r: -1.0 if math.isnan(r[key]) else r[key])["picture"]
    return out


def page(rows: list[dict], names: list[str], show: Callable[[str, str], Tensor]):
    """The sheet as a PIL picture: a row a picture, evenly chosen and then each method's worst.

    names: of the columns, methods and TRUTH; show(name, picture) -> [3,h,w].
    """
    stems, last = list(dict.fromkeys(r["picture"] for r in rows)), worst(rows)
    psnr = {(r["picture"], r["method"]): r["psnr"] for r in rows}
    places = np.unique(np.linspace(0, len(stems) - 1, SHOWN).round().astype(int))
    out = []
    for stem in dict.fromkeys([*(stems[i] for i in places), *last.values()]):
        line = []
        for name in names:
            title = f"{TRUTH} of {stem}" if name == TRUTH else name
            if not math.isnan(psnr.get((stem, name), math.nan)):
                title += f", {psnr[stem, name]:.1f} dB" + ", its worst" * (last[name] == stem)
            line.append((title[:TITLE], square(show(name, stem))))
        out.append(line)
    return sheet(out)


def square(image: Tensor) -> Tensor:
    """A picture [3,H,W] with white beside it, [3,s,s]."""
    h, w = image.shape[1:]
    s = max(h, w)
    left, top = (s - w) // 2, (s - h) // 2
    return F.pad(image, (left, s - w - left, top, s - h - top), value=1.0)
