"""Training crops for the face and landmark networks: warped, relit, blurred, covered, pasted elsewhere.

Everything is batched torch on small pictures. Points are pixels, (0, 0) the centre of the top left one.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from rig_core import buffers, checkpoints, data
from rig_core.estimators import landmarks as lm
from rig_core.estimators.landmarks import CROP, FRAME, MIRROR, bounding_boxes, similarity

SIDE = 256  # px, all training pictures
LEVELS = 4  # the picture and its halves, for crops without aliasing


@dataclass(frozen=True)
class Faces:
    """N square pictures of one face each: levels[k] uint8 [N,3,256/2^k,256/2^k], points [N,68,2] px."""

    levels: tuple[Tensor, ...]
    points: Tensor

    def __len__(self) -> int:
        return len(self.points)

    def select(self, index) -> Faces:
        """Some of them."""
        return Faces(tuple(level[index] for level in self.levels), self.points[index])


def make_faces(images: Tensor, points: Tensor) -> Faces:
    """images uint8 [N,3,256,256], points [N,68,2] px."""
    levels = [images]
    for _ in range(LEVELS - 1):
        halves = [F.avg_pool2d(part.float(), 2).round().byte() for part in levels[-1].split(256)]
        levels.append(torch.cat(halves))
    return Faces(tuple(levels), points.float())


def load_portraits(folder: Path) -> tuple[Faces, list[str]]:
    """A folder of `images/NAME.jpg`, `names.json` and `landmarks.safetensors`, sorted by name."""
    names = [entry["name"] for entry in json.loads((folder / "names.json").read_text())]
    points = load_file(folder / "landmarks.safetensors")["landmarks"]
    order = sorted(range(len(names)), key=names.__getitem__)
    images = [np.asarray(Image.open(folder / "images" / f"{names[i]}.jpg").convert("RGB")) for i in order]
    return make_faces(torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous(), points[order]), [
        names[i] for i in order
    ]


def load_synth(folder: Path, limit: int) -> Faces:
    """The first `limit` portraits of a folder that `training.synth` wrote; landmarks from their codes."""
    portraits = data.Dataset.open(folder)
    head, index = checkpoints.load_head(), range(min(limit, len(portraits)))
    points = []
    for part in torch.arange(len(index)).split(64):
        code = portraits.codes(part.tolist())
        marks = head.landmarks(head.verts(code.shape, code.exp, code.pose), code.pose)
        points.append(buffers.to_pixels(buffers.to_image(marks, code), code.size))
    side = portraits.size[0]
    small = (portraits.images([i], side).float() for i in index)
    images = [F.interpolate(i, size=(SIDE, SIDE), mode="bicubic").clamp(0, 255).round().byte() for i in small]
    return make_faces(torch.cat(images), (torch.cat(points) + 0.5) * SIDE / side - 0.5)


def split(faces: Faces, names: list[str]) -> tuple[Faces, Faces]:
    """Training and validation part: every sixth by sorted name is kept back."""
    held = torch.arange(len(names)) % 6 == 0
    return faces.select(~held), faces.select(held)


def join(a: Faces, b: Faces) -> Faces:
    """Both sets."""
    levels = tuple(torch.cat(pair) for pair in zip(a.levels, b.levels))
    return Faces(levels, torch.cat([a.points, b.points]))


def mean_shape(points: Tensor) -> Tensor:
    """Mean landmarks [68,2] in crop pixels over faces and their mirror images, each framed by its own box."""
    box = bounding_boxes(points)
    centre, side = (box[:, :2] + box[:, 2:]) / 2, (box[:, 2:] - box[:, :2]).amax(1)
    shape = ((points - centre[:, None]) / (side * FRAME / CROP)[:, None, None]).mean(0)
    return (shape + shape[MIRROR] * torch.tensor([-1.0, 1.0])) / 2 + (CROP - 1) / 2


def uniform(n: int, low: float, high: float) -> Tensor:
    """[n] uniform numbers."""
    return torch.rand(n) * (high - low) + low


def rotation(angle: Tensor) -> Tensor:
    """[N,2,2]."""
    c, s = angle.cos(), angle.sin()
    return torch.stack([torch.stack([c, -s], -1), torch.stack([s, c], -1)], 1)


def bumps(n: int, amplitude: float) -> Tensor:
    """Smooth random displacements [n,2,CROP,CROP] px."""
    coarse = torch.randn(n, 2, 4, 4) * amplitude * torch.rand(n, 1, 1, 1)
    return F.interpolate(coarse, size=(CROP, CROP), mode="bicubic", align_corners=True)


def warp(faces: Faces, index: Tensor, a: Tensor, b: Tensor, d: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Crop pixel q shows picture pixel A (q + d(q)) + b.

    Returns crops [N,3,96,96] 0..1, landmarks [N,68,2] in crop pixels, share [N,1,96,96] inside the picture.
    """
    y, x = torch.meshgrid(torch.arange(CROP), torch.arange(CROP), indexing="ij")
    q = torch.stack([x, y], -1).float() + d.permute(0, 2, 3, 1)
    grid = torch.einsum("nij,nhwj->nhwi", a, q) + b[:, None, None]
    grid = (grid + 0.5) / SIDE * 2 - 1
    level = (a.det().abs().sqrt().log2() + uniform(len(a), -0.7, 0.3)).round().clamp(0, LEVELS - 1).long()
    crops = torch.empty(len(a), 3, CROP, CROP)
    for k in level.unique().tolist():
        at = level == k
        source = faces.levels[k][index[at]].float() / 255
        crops[at] = F.grid_sample(source, grid[at], padding_mode="border", align_corners=False)
    inside = (grid.abs().amax(-1) < 1).float()[:, None]
    r = torch.linalg.solve(a, (faces.points[index] - b[:, None]).mT).mT
    points = r
    for _ in range(4):  # q = r - d(q)
        at = (points + 0.5) / CROP * 2 - 1
        shift = F.grid_sample(d, at[:, None], padding_mode="border", align_corners=False)[:, :, 0].mT
        points = r - shift
    return crops, points, inside


def texture(n: int, faces: Faces) -> Tensor:
    """Pictures without a face, uint8 [n,3,96,96]: octaves of noise, corners and shuffles of portraits."""
    octaves = sum(
        F.interpolate(torch.randn(n, 3, k, k), size=(CROP, CROP), mode="bilinear", align_corners=False)
        * torch.rand(n, 1, 1, 1)
        for k in (2, 4, 8, 16, 32, 96)
    )
    grey = octaves.mean(1, keepdim=True)
    mix = torch.rand(n, 1, 1, 1)
    noise = (octaves * mix + grey * (1 - mix)) * uniform(n, 0.02, 0.35)[:, None, None, None]
    out = (noise + torch.rand(n, 3, 1, 1)).clamp(0, 1)
    source = faces.levels[1][torch.randint(len(faces), (n,))].float() / 255
    kind = torch.rand(n)
    for i in range(n):
        if kind[i] < 0.35:  # above the shoulders, beside the head; or the clothes
            w = int(torch.randint(14, 28, ()))
            y = int(torch.randint(0, 40, ())) if torch.rand(()) < 0.7 else 128 - w
            x = 0 if torch.rand(()) < 0.5 else 128 - w
            patch = source[i : i + 1, :, y : y + w, x : x + w]
            out[i] = F.interpolate(patch, size=(CROP, CROP), mode="bicubic", align_corners=False)[0]
        elif kind[i] < 0.6:  # parts of faces in the wrong places
            cell = 24 if torch.rand(()) < 0.5 else 32
            x0, y0 = (int(torch.randint(0, 33, ())) for _ in range(2))
            tile = source[i, :, y0 : y0 + CROP, x0 : x0 + CROP].unfold(1, cell, cell).unfold(2, cell, cell)
            k = CROP // cell
            tile = tile.reshape(3, k * k, cell, cell)[:, torch.randperm(k * k)].reshape(3, k, k, cell, cell)
            out[i] = tile.permute(0, 1, 3, 2, 4).reshape(3, CROP, CROP)
    return (out.clamp(0, 1) * 255).round().byte()


def draw(bank: Tensor, n: int) -> Tensor:
    """[n,3,96,96] 0..1 pictures out of a bank of textures, half of them mirrored."""
    some = bank[torch.randint(len(bank), (n,))].float() / 255
    return some.flip(-1) if torch.rand(()) < 0.5 else some


def cover(crops: Tensor, share: float = 0.3) -> Tensor:
    """Put a soft-edged blob of plain colour or noise over a part of some crops."""
    some = torch.rand(len(crops)) < share
    n = int(some.sum())
    y, x = torch.meshgrid(torch.linspace(-1, 1, CROP), torch.linspace(-1, 1, CROP), indexing="ij")
    p = torch.stack([x, y], -1)[None] - (torch.rand(n, 1, 1, 2) * 2 - 1)
    p = torch.einsum("nij,nhwj->nhwi", rotation(uniform(n, 0, math.pi)), p)
    p = p / torch.stack([uniform(n, 0.08, 0.6), uniform(n, 0.08, 0.3)], -1)[:, None, None]
    box, ellipse = p.abs().amax(-1), p.norm(dim=-1)
    r = torch.where((torch.rand(n) < 0.5)[:, None, None], box, ellipse)
    alpha = ((1 - r) * 8).clamp(0, 1)[:, None]
    fill = torch.rand(n, 3, 1, 1) + torch.randn(n, 3, CROP, CROP) * uniform(n, 0, 0.15)[:, None, None, None]
    crops = crops.clone()
    crops[some] = torch.lerp(crops[some], fill.clamp(0, 1), alpha)
    return crops


def photo(crops: Tensor) -> Tensor:
    """Another camera and light: side light, gain, gamma, saturation, blur, noise."""
    n = len(crops)

    def column(low: float, high: float, channels: int = 1) -> Tensor:
        return torch.rand(n, channels, 1, 1) * (high - low) + low

    ramp = torch.linspace(-1, 1, CROP)
    angle = uniform(n, 0, 2 * math.pi)[:, None, None]
    slope = angle.cos() * ramp[None, None, :] + angle.sin() * ramp[None, :, None]
    light = torch.exp(slope[:, None] * column(0, 1.6) * (torch.rand(n, 1, 1, 1) < 0.5))
    x = (
        crops.clamp(1e-3, 1) ** column(0.6, 1.6)
        * light
        * torch.exp(column(-0.5, 0.35) + column(-0.12, 0.12, 3))
    )
    grey = x.mean(1, keepdim=True)
    saturation = torch.where(torch.rand(n, 1, 1, 1) < 0.2, torch.zeros(1), column(0.5, 1.4))
    x = (grey + (x - grey) * saturation).clamp(0, 1)
    for scale in (0.75, 0.5, 0.3):
        at = torch.rand(n) < 0.12
        if at.any():
            small = F.interpolate(x[at], scale_factor=scale, mode="bilinear", antialias=True)
            x[at] = F.interpolate(small, size=(CROP, CROP), mode="bilinear")
    x = x + torch.randn_like(x) * column(0, 0.06) * (torch.rand(n, 1, 1, 1) < 0.5)
    return x.clamp(0, 1)


def landmark_crops(faces: Faces, bank: Tensor, shape: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """What the landmark network sees: [n,3,96,96] and its landmarks [n,68,2].

    Half are framed as by a rough box (turned up to 35 degrees), half nearly as its second pass frames them.
    """
    index = torch.randint(len(faces), (n,))
    points = faces.points[index]
    rough = torch.rand(n) < 0.5
    a, _ = similarity(points, shape)
    box = bounding_boxes(points)
    side = (box[:, 2:] - box[:, :2]).amax(1)
    upright = (side * FRAME / CROP)[:, None, None] * torch.eye(2)
    a = torch.where(rough[:, None, None], upright, a)
    jitter = torch.where(rough, 1.0, 0.22)
    a = (
        a
        @ rotation(uniform(n, -0.6, 0.6) * jitter)
        * torch.exp(uniform(n, -0.25, 0.25) * jitter)[:, None, None]
    )
    squeeze = torch.exp(torch.stack([uniform(n, -0.05, 0.2), uniform(n, -0.08, 0.08)], -1))
    a = a * squeeze[:, None]  # a narrower face, as one that is turned
    target = (shape.amin(0) + shape.amax(0)) / 2 + torch.randn(n, 2) * (6 * jitter)[:, None]
    centre = (box[:, :2] + box[:, 2:]) / 2
    b = centre - (a @ target[:, :, None])[:, :, 0]
    crops, points, inside = warp(faces, index, a, b, bumps(n, 3.0))
    inside = torch.maximum(inside, (torch.rand(n, 1, 1, 1) < 0.5).float())  # or its edge goes on
    return finish(torch.lerp(draw(bank, n), crops, inside), points)


def finish(crops: Tensor, points: Tensor) -> tuple[Tensor, Tensor]:
    """Cover, photograph and mirror half of the crops."""
    crops = photo(cover(crops))
    mirrored = points[:, MIRROR] * torch.tensor([-1.0, 1.0]) + torch.tensor([CROP - 1.0, 0.0])
    flip = torch.rand(len(crops)) < 0.5
    crops = torch.where(flip[:, None, None, None], crops.flip(-1), crops)
    return crops, torch.where(flip[:, None, None], mirrored, points)


def wrong_crops(faces: Faces, bank: Tensor, taken: Tensor, n: int) -> Tensor:
    """[n,3,96,96] that the landmark network has to refuse: textures, faces far out of the frame, and what the
    face network mistook (`taken`, a bank of uint8 crops)."""
    index = torch.randint(len(faces), (n,))
    box = bounding_boxes(faces.points[index])
    step = (box[:, 2:] - box[:, :2]).amax(1) * FRAME / CROP
    factor = torch.where(torch.rand(n) < 0.5, uniform(n, 0.2, 0.4), uniform(n, 2.5, 4.0))
    near = torch.rand(n) < 0.6  # rather the right size, but beside the face
    factor = torch.where(near, uniform(n, 0.8, 1.2), factor)
    shift = torch.where(near, uniform(n, 40, 70), uniform(n, 0, 15))
    a = (step * factor)[:, None, None] * rotation(uniform(n, -0.5, 0.5))
    angle = uniform(n, 0, 2 * math.pi)
    target = (CROP - 1) / 2 + torch.stack([angle.cos(), angle.sin()], -1) * shift[:, None]
    b = (box[:, :2] + box[:, 2:]) / 2 - (a @ target[:, :, None])[:, :, 0]
    crops, _, inside = warp(faces, index, a, b, torch.zeros(n, 2, CROP, CROP))
    crops = torch.lerp(draw(bank, n), crops, inside * (torch.rand(n, 1, 1, 1) < 0.7))
    if len(taken):
        crops = torch.where(torch.rand(n, 1, 1, 1) < 0.6, draw(taken, n), crops)
    return photo(cover(crops))


def mistakes(finder, faces: Faces, bank: Tensor, scenes: int) -> Tensor:
    """What the face network takes for a face in that many scenes and is none: uint8 [N,3,96,96]."""
    out = [torch.zeros(0, 3, CROP, CROP)]
    for _ in range(scenes // 50):
        pictures, boxes = face_scenes(faces, bank, 50)
        with torch.no_grad():
            answers = finder(pictures)
        for picture, box, answer in zip(pictures, boxes, answers):
            found, _ = lm.decode(answer)
            centre, side = (found[:, :2] + found[:, 2:]) / 2, (found[:, 2:] - found[:, :2]).amax(1)
            size = (box[2:] - box[:2]).amax()
            beside = (centre - (box[:2] + box[2:]) / 2).abs().amax(1) > 0.4 * torch.maximum(side, size)
            wrong = beside | ((side / size).log().abs() > 0.8) | size.isnan()
            if wrong.any():
                out.append(lm.crop(picture[None], *lm.box_frame(found[wrong])))
    return (torch.cat(out) * 255).round().byte()


def face_scenes(faces: Faces, bank: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """What the face network sees: [n,3,96,96] with a face of any size or none; its box [n,4] (NaN: none)."""
    index = torch.randint(len(faces), (n,))
    box = bounding_boxes(faces.points[index])
    side = (box[:, 2:] - box[:, :2]).amax(1)
    size = torch.exp(uniform(n, math.log(12), math.log(150)))
    a = (side / size)[:, None, None] * rotation(torch.randn(n).clamp(-2, 2) * 0.3)
    target = uniform(2 * n, 0, CROP).reshape(n, 2)
    b = (box[:, :2] + box[:, 2:]) / 2 - (a @ target[:, :, None])[:, :, 0]
    crops, points, inside = warp(faces, index, a, b, bumps(n, 1.0))
    kind = torch.rand(n, 1, 1, 1)
    y, x = torch.meshgrid(torch.arange(CROP), torch.arange(CROP), indexing="ij")
    r = torch.stack([x, y], -1)[None] - target[:, None, None]
    r = r.norm(dim=-1)[:, None] / (size * uniform(n, 0.65, 1.2))[:, None, None, None]
    soft = ((1 - r) * 4).clamp(0, 1) * inside
    alpha = torch.where(kind < 0.4, torch.ones(1), torch.where(kind < 0.7, inside, soft))
    alpha = alpha * (kind < 0.88)
    crops, points = finish(torch.lerp(draw(bank, n), crops, alpha), points)
    boxes = bounding_boxes(points)
    return crops, torch.where(kind[:, :, 0, 0] < 0.88, boxes, torch.full((), math.nan))
