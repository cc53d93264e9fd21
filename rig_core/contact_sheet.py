"""The contact sheet of an album: what was kept, and what was left out for which reason."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

TILES, COLUMNS, TILE, GAP, LINE = 60, 8, 150, 12, 16  # counts; px
PAGE, MOUNT, INK = (250, 250, 248), (232, 232, 228), (35, 35, 35)
KEPT, LEFT_OUT = (60, 130, 80), (190, 70, 60)  # frames


def tile(image: Tensor) -> Tensor:
    """A picture [1,3,H,W] 0..1 as it fits into a square of the sheet, [3,h,w] uint8."""
    shrink = TILE / max(image.shape[2:])
    size = [max(1, round(n * shrink)) for n in image.shape[2:]]
    small = F.interpolate(image, size, mode="bilinear", antialias=True, align_corners=False)[0]
    return (small.clamp(0, 1) * 255).round().byte()


def contact_sheet(kept: list[tuple[str, Tensor]], rejected: list[tuple[str, Tensor | None, str]]) -> Tensor:
    """[3,H,W] 0..1: portraits kept with their names; those left out dimmed, with the reason below.

    Entries are (name, tile [3,h,w] uint8) and (name, tile or None, reason). TILES of them at the most.
    """
    from PIL import Image, ImageDraw, ImageFont

    text, title = ImageFont.load_default(12), ImageFont.load_default(17)
    bad = rejected[: max(TILES - len(kept), TILES // 3)]
    good = kept[: TILES - len(bad)]
    columns = min(COLUMNS, max(4, len(good), len(bad)))
    sections = []
    for label, shown, count in (("kept", good, len(kept)), ("left out", bad, len(rejected))):
        some = f", {len(shown)} shown" if len(shown) < count else ""
        entries = [(e[1], [_cut(e[0], text), *_wrapped(" ".join(e[2:]), text)]) for e in shown]
        lines = max([len(e[1]) for e in entries], default=0)
        sections.append((f"{count} {label}{some}", entries, TILE + lines * LINE + GAP))
    step = TILE + GAP
    height = sum(2 * LINE + -(-len(e) // columns) * tall for _, e, tall in sections if e)
    page = Image.new("RGB", (columns * step + GAP, height + GAP), PAGE)
    draw, y = ImageDraw.Draw(page), GAP
    for (label, entries, tall), frame in zip(sections, (KEPT, LEFT_OUT)):
        if entries:
            draw.text((GAP, y), label, INK, title)
            y += 2 * LINE
        for i, (tile, lines) in enumerate(entries):
            x, top = GAP + i % columns * step, y + i // columns * tall
            draw.rectangle((x - 1, top - 1, x + TILE, top + TILE), MOUNT, frame)
            if tile is not None:
                picture = Image.fromarray(tile.permute(1, 2, 0).contiguous().numpy())
                if frame is LEFT_OUT:
                    picture = Image.blend(picture, Image.new("RGB", picture.size, PAGE), 0.5)
                page.paste(picture, (x + (TILE - picture.width) // 2, top + (TILE - picture.height) // 2))
            for n, line in enumerate(lines):
                draw.text((x, top + TILE + 3 + n * LINE), line, frame if n else INK, text)
        y += -(-len(entries) // columns) * tall
    return torch.from_numpy(np.array(page)).permute(2, 0, 1).float() / 255


def _cut(line: str, font) -> str:
    """The line, or as much of it as a tile is wide."""
    if font.getlength(line) <= TILE:
        return line
    while font.getlength(line + "...") > TILE:
        line = line[:-1]
    return line + "..."


def _wrapped(words: str, font, most: int = 6) -> list[str]:
    """Text as lines that are as wide as a tile."""
    lines = [""]
    for word in words.split():
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) <= TILE:
            lines[-1] = longer
        else:
            lines.append(word)
    lines = [line for line in lines if line]
    if len(lines) > most:
        lines[most - 1 :] = [lines[most - 1] + "..."]
    return [_cut(line, font) for line in lines]
