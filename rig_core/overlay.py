"""Numbered boxes over a photo: which face is which, and which are chosen."""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

LONG_SIDE = 1024  # px; larger photos are shown smaller
CHOSEN, OTHER, EDGE = (255, 200, 40), (235, 235, 235), (20, 20, 20)


def numbered(image: Tensor, boxes: Tensor, chosen: Collection[int]) -> Tensor:
    """A photo [1,3,H,W] 0..1 with its boxes [N,4] (x0, y0, x1, y1) px counted from 0, the chosen in yellow.

    Returns [1,3,h,w], of LONG_SIDE at the most.
    """
    from PIL import Image, ImageDraw

    height, width = image.shape[2:]
    scale = min(1.0, LONG_SIDE / max(height, width))
    if scale < 1:
        size = [max(1, round(v * scale)) for v in (height, width)]
        image = F.interpolate(image, size, mode="bilinear", antialias=True)
    pixels = (image[0].clamp(0, 1) * 255).round().byte().permute(1, 2, 0)
    picture = Image.fromarray(pixels.cpu().contiguous().numpy())
    draw, line = ImageDraw.Draw(picture), max(1, round(max(picture.size) / 350))
    boxes = ((boxes.cpu() + 0.5) * scale - 0.5).tolist()
    # the chosen ones last, on top
    for i in sorted(range(len(boxes)), key=lambda i: i in chosen):
        wide, colour = (2 * line, CHOSEN) if i in chosen else (line, OTHER)
        x0, y0, x1, y1 = boxes[i]
        draw.rectangle((x0 - 1, y0 - 1, x1 + 1, y1 + 1), outline=EDGE, width=wide + 2)
        draw.rectangle((x0, y0, x1, y1), outline=colour, width=wide)
        _tag(draw, str(i), x0, y0, y1 - y0, picture.size, colour)
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None].float() / 255


def _tag(draw, text: str, x: float, y: float, tall: float, size: tuple[int, int], colour) -> None:
    """The number on a ground of its own, above the box where there is room."""
    from PIL import ImageFont

    points = max(12, min(0.3 * tall, max(size) / 22))
    font = ImageFont.load_default(points)
    left, top, right, bottom = draw.textbbox((0, 0), text, font)
    pad = max(2, round(points / 5))
    wide, high = right - left + 2 * pad, bottom - top + 2 * pad
    x = min(max(x, 0), size[0] - wide)
    y = min(max(y - high, 0), size[1] - high)
    draw.rectangle((x, y, x + wide, y + high), fill=colour, outline=EDGE)
    draw.text((x + pad - left, y + pad - top), text, EDGE, font)
