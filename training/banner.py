"""The pack's icon and banner: the open head under lamps, on a dark backdrop. `python -m training.banner`.

Writes docs/icon.png (400 x 400) and docs/banner.png (1680 x 720), which pyproject.toml names.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from rig_core import buffers, checkpoints, sh
from rig_core.heads import FaceModel

SAMPLES = 2  # a side, of each pixel
WARM, WHITE, COOL = (1.0, 0.55, 0.26), (1.0, 0.93, 0.84), (0.25, 0.5, 1.0)
LAMPS = {  # azimuth and elevation in degrees, strength, colour
    "left": ((-68.0, 20.0, 1.5, WARM),),
    "above": ((8.0, 38.0, 1.3, WHITE),),
    "right": ((68.0, 20.0, 1.7, COOL),),
    "all": ((-62.0, 20.0, 1.5, WARM), (5.0, 55.0, 0.22, WHITE), (72.0, 12.0, 1.7, COOL)),
}
AMBIENT = 0.02
BACKDROP = (0.004, 0.005, 0.007)
CLAY, DETAIL = 0.62, 0.3  # grey of the head, and how much of its own skin and hair shows


def lit(head, side: int, yaw: float, lamps) -> Tensor:
    """The mean head on black, RGB in linear light and where it is: [4,side,side]."""
    code = head.mean_code(1, side * SAMPLES)
    pose = code.pose.clone()
    pose[:, 1] = math.radians(yaw)
    code = code.replace(pose=pose)
    b = buffers.render(head, code)
    verts = buffers.to_image(head.verts(code.shape, code.exp, code.pose), code)
    fragments = buffers.rasterize_head(verts, head.faces, code.size)
    light = torch.full_like(b.normal, AMBIENT)
    for azimuth, elevation, strength, colour in lamps:
        towards = sh.from_angles(torch.tensor([azimuth]), torch.tensor([elevation]))
        facing = (F.normalize(b.normal, dim=1) * towards[..., None, None]).sum(1, keepdim=True).clamp_min(0)
        seen = buffers.cast_shadow(verts, head.faces, fragments, towards, softness=0.15, resolution=512)
        light += strength * facing * seen * torch.tensor(colour)[:, None, None]
    grey = (b.albedo.clamp(0, 1) ** 2.2).mean(1, keepdim=True)
    clay = CLAY * (1 - DETAIL) + grey * DETAIL
    picture = torch.cat([clay * light * b.mask, b.mask], 1)
    return F.avg_pool2d(picture, SAMPLES)[0]


def backdrop(height: int, width: int) -> Tensor:
    """A dark wall [3,H,W], a little lighter behind the middle, linear light."""
    y, x = torch.meshgrid(torch.linspace(-1, 1, height), torch.linspace(-1, 1, width), indexing="ij")
    glow = 1 + 2.5 * torch.exp(-2.2 * (x * x + y * y))
    return torch.tensor(BACKDROP)[:, None, None] * glow


def put(page: Tensor, picture: Tensor, left: int, top: int) -> None:
    """Lay a head over a page [3,H,W]; what sticks out is cut."""
    h, w = page.shape[1:]
    side = picture.shape[1]
    y, x = max(0, -top), max(0, -left)
    picture = picture[:, y : min(side, h - top), x : min(side, w - left)]
    part = page[:, top + y : top + y + picture.shape[1], left + x : left + x + picture.shape[2]]
    part.copy_(picture[:3] + part * (1 - picture[3:]))


def save(linear: Tensor, path: Path) -> None:
    """[3,H,W] linear light -> PNG, highlights rolled off."""
    display = (1 - torch.exp(-1.25 * linear)) ** (1 / 2.2)
    array = (display.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).contiguous().numpy()
    Image.fromarray(np.asarray(array)).save(path, optimize=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("docs"))
    out = parser.parse_args().out
    head = checkpoints.load_face_model(None)
    head = head.head if isinstance(head, FaceModel) else head
    icon = backdrop(400, 400)
    put(icon, lit(head, 400, -18, LAMPS["all"]), 0, 8)
    save(icon, out / "icon.png")
    banner = backdrop(720, 1680)
    for x, yaw, name in ((330, -28, "left"), (840, 0, "above"), (1350, 28, "right")):
        put(banner, lit(head, 680, yaw, LAMPS[name]), x - 340, 40)
    save(banner, out / "banner.png")


if __name__ == "__main__":
    main()
