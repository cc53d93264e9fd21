"""Backdrops and clothes of the synthetic portraits, and the camera: lens, exposure, sensor, file."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from .synth_scene import Camera, Draw, linear, warmth

BACKDROP = 64


def _grid(n: int = BACKDROP) -> tuple[Tensor, Tensor]:
    """Picture coordinates, x right and y down, -1..1."""
    t = (torch.arange(n) + 0.5) / n * 2 - 1
    return t[None].expand(n, n), t[:, None].expand(n, n)


def _blur(image: Tensor, sigma: float) -> Tensor:
    """Gaussian blur of [C,h,w]."""
    if sigma < 0.3:
        return image
    r = max(1, math.ceil(2.5 * sigma))
    k = torch.exp(-0.5 * (torch.arange(-r, r + 1).to(image) / sigma) ** 2)
    k = k / k.sum()
    x = F.pad(image[:, None], (r, r, r, r), mode="replicate")
    return F.conv2d(F.conv2d(x, k.reshape(1, 1, 1, -1)), k.reshape(1, 1, -1, 1))[:, 0]


def _studio(d: Draw, colour: Tensor) -> Tensor:
    """A lit backdrop: one colour, a pool of light, mottled cloth."""
    x, y = _grid()
    cx, cy, r = d.uniform(-0.8, 0.8), d.uniform(-0.8, 0.6), d.uniform(0.6, 2.0)
    pool = torch.exp(-((x - cx) ** 2 + (y - cy) ** 2) / (2 * r * r))
    shade = d.uniform(0.3, 1.0) + d.uniform(0.0, 1.0) * pool
    mottle = torch.exp(d.uniform(0.0, 0.35) * _blur(d.noise(1, BACKDROP), d.uniform(0.5, 3.0)))
    return colour[:, None, None] * shade * mottle


def _blobs(d: Draw, base: Tensor, n: int, bright: float) -> Tensor:
    """Out-of-focus lights or leaves: soft discs over a base colour."""
    x, y = _grid()
    image = base[:, None, None].expand(3, BACKDROP, BACKDROP).clone()
    hue = linear(d.uniform(0.1, 0.9, 3))
    for _ in range(n):
        cx, cy, r = d.uniform(-1.2, 1.2), d.uniform(-1.2, 1.2), d.uniform(0.06, 0.45)
        disc = torch.sigmoid((r - ((x - cx) ** 2 + (y - cy) ** 2).sqrt()) * d.uniform(15, 50))
        colour = torch.lerp(hue, linear(d.uniform(0.1, 0.95, 3)), 0.5) * bright * d.uniform(0.2, 1.2)
        image = torch.lerp(image, colour[:, None, None].expand_as(image), disc * d.uniform(0.3, 0.9))
    return image


def _indoor(d: Draw) -> Tensor:
    """Blurred rectangles: wall, window, shelves, frames."""
    x, y = _grid()
    wall = linear(d.uniform(0.35, 0.75, 3) * 0.4 + d.uniform(0.2, 0.5))
    image = wall[:, None, None] * (1 + d.uniform(-0.3, 0.3) * x + d.uniform(-0.2, 0.2) * y)
    for _ in range(int(d.uniform(2, 9))):
        cx, cy = d.uniform(-1.2, 1.2), d.uniform(-1.1, 1.0)
        w, h = d.uniform(0.05, 0.6), d.uniform(0.08, 0.9)
        box = (((x - cx).abs() < w) & ((y - cy).abs() < h)).float()
        colour = linear(d.uniform(0.05, 0.9, 3) * 0.5 + d.uniform(0.0, 0.45)) * (
            d.uniform(1.5, 3.0) if d.chance(0.15) else 1
        )
        image = torch.lerp(image, colour[:, None, None].expand_as(image), box)
    return _blur(image, d.uniform(0.4, 5.0))


def _outdoor(d: Draw) -> Tensor:
    """Sky over green or town, well out of focus."""
    x, y = _grid()
    sky = linear([0.60, 0.75, 0.92]) * d.uniform(0.7, 1.5)
    sky = torch.lerp(sky, linear([0.9, 0.9, 0.9]), d.uniform())
    land = linear([d.uniform(0.15, 0.5), d.uniform(0.3, 0.55), d.uniform(0.1, 0.35)])
    if d.chance(0.35):
        land = linear(d.uniform(0.3, 0.6, 3))
    horizon = d.uniform(-1.3, 0.9) + 0.25 * _blur(d.noise(1, BACKDROP), 3.0)[0]
    up = torch.sigmoid((horizon - y) * d.uniform(6, 40))
    texture = torch.exp(d.uniform(0.2, 0.6) * d.noise(1, BACKDROP))
    image = torch.lerp(land[:, None, None] * texture, sky[:, None, None].expand(3, BACKDROP, BACKDROP), up)
    return _blur(image, d.uniform(0.5, 3.5))


def _background(d: Draw) -> Tensor:
    """[3,64,64] linear radiance."""
    kind = d.pick(
        grey=0.16, blue=0.14, colour=0.10, white=0.05, black=0.05, bokeh=0.12, indoor=0.2, outdoor=0.18
    )
    if kind == "grey":
        return _studio(d, linear(d.uniform(0.15, 0.7)) * warmth(d.uniform(-0.3, 0.4)))
    if kind == "blue":
        return _studio(d, linear([d.uniform(0.05, 0.3), d.uniform(0.2, 0.45), d.uniform(0.45, 0.85)]))
    if kind == "colour":
        return _studio(d, linear(d.uniform(0.1, 0.75, 3)))
    if kind == "white":
        return _studio(d, linear(d.uniform(0.85, 1.0)) * warmth(d.uniform(-0.1, 0.2)))
    if kind == "black":
        return _studio(d, linear(d.uniform(0.02, 0.15)) * warmth(d.uniform(-0.3, 0.4)))
    if kind == "bokeh":
        image = _blobs(d, linear(d.uniform(0.05, 0.5, 3)), int(d.uniform(6, 20)), d.uniform(0.5, 1.5))
        image = _blur(image, 0.8)
    else:
        image = _indoor(d) if kind == "indoor" else _outdoor(d)
    # places are less colourful than independent channels make them
    return torch.lerp(image.mean(0, keepdim=True).expand_as(image), image, d.uniform(0.25, 0.9))


def sample_scene(seed: int) -> dict:
    """Backdrop and clothes."""
    d = Draw(seed, "scene")
    background = _background(d)
    dark = linear([0.07, 0.08, 0.11]) * d.uniform(0.5, 3.0)
    kind = d.pick(suit=0.35, shirt=0.2, tee=0.45)
    any_colour = linear(d.uniform(0.05, 0.9, 3) * 0.6 + d.uniform(0.0, 0.4))
    pale = linear(torch.tensor([0.86, 0.88, 0.92]) * d.uniform(0.8, 1.05)) if d.chance(0.7) else any_colour
    jacket = {"suit": dark if d.chance(0.7) else any_colour, "shirt": pale, "tee": any_colour}[kind]
    return dict(
        background=background,
        cloth=torch.stack([jacket, pale, linear(d.uniform(0.05, 0.7, 3))]),
        neckline={"suit": d.uniform(0.7, 1.6), "shirt": 0.0, "tee": 0.0}[kind],
        tie=float(kind == "suit" and d.chance(0.7)),
        collar=float(kind != "tee"),
        weave=d.noise(1, 64),
    )


def sample_camera(seed: int) -> dict:
    """Framing close to the aligned crop, exposure, white balance, tone, blur, noise, file."""
    d = Draw(seed, "camera")
    n = d.normal(8)
    return dict(
        shift=0.025 * n[:2].clamp(-2, 2),
        zoom=math.exp(0.05 * n[2].clamp(-2, 2).item()),
        roll=math.radians(2.0) * n[3].clamp(-2, 2).item(),
        exposure=0.28 * n[4].clamp(-2, 2).item(),
        white=warmth(0.12 * n[5].clamp(-2, 2).item()),
        contrast=d.uniform(-0.2, 0.45),
        blur=d.uniform(0.25, 0.7) * d.chance(0.5),
        noise=d.uniform(0.0, 0.014) if d.chance(0.7) else d.uniform(0.01, 0.03),
        jpeg=d.uniform(0.3, 1.6) * d.chance(0.6),
        sensor=float(d.uniform(0, 2**23)),
    )


# --- the camera ---


def srgb(x: Tensor) -> Tensor:
    """Linear light -> sRGB values (IEC 61966-2-1); negative light is black."""
    x = x.clamp_min(0)
    return torch.where(x <= 0.0031308, 12.92 * x, 1.055 * x.clamp_min(0.0031308) ** (1 / 2.4) - 0.055)


def tone(x: Tensor, contrast: Tensor) -> Tensor:
    """sRGB -> sRGB: a gentle s-curve around mid-grey, and a shoulder for highlights above 0.8."""
    c = contrast.reshape(-1, 1, 1, 1)
    y = x + 0.5 * c * (x - 0.5) * x.clamp(0, 1) * (1 - x.clamp(0, 1))
    knee = 0.8
    return torch.where(y > knee, knee + (1 - knee) * torch.tanh((y - knee) / (1 - knee)), y)


def _dct(device) -> Tensor:
    k = torch.arange(8, device=device, dtype=torch.float32)
    m = torch.cos(math.pi / 8 * (k[None] + 0.5) * k[:, None]) / 2
    m[0] /= 2**0.5
    return m


def jpeg(image: Tensor, strength: Tensor) -> Tensor:
    """Block artefacts of a mild JPEG: 8x8 DCT coefficients rounded to steps that grow with frequency.

    image [B,3,H,W] 0..1, strength [B]; 0 leaves the picture alone. Any size: the border is padded.
    """
    h, w = image.shape[2:]
    x = F.pad(image, (0, -w % 8, 0, -h % 8), mode="replicate")
    to_ycc = x.new_tensor([[0.299, 0.587, 0.114], [-0.1687, -0.3313, 0.5], [0.5, -0.4187, -0.0813]])
    y = torch.einsum("kc,bchw->bkhw", to_ycc, x)
    m = _dct(x.device)
    blocks = y.unflatten(3, (-1, 8)).unflatten(2, (-1, 8))  # [B,3,bh,8,bw,8]
    c = torch.einsum("ui,bkhiwj,vj->bkhuwv", m, blocks, m)
    f = torch.arange(8, device=x.device, dtype=torch.float32)
    step = (10 + 5 * (f[:, None] + f[None])) / 255
    step = step[None, None, None, :, None, :] * strength.reshape(-1, 1, 1, 1, 1, 1)
    step = step * x.new_tensor([0.35, 0.6, 0.6]).reshape(1, 3, 1, 1, 1, 1)
    safe = step.clamp_min(1e-6)
    c = torch.where(step > 0, (c / safe).round() * safe, c)
    y = torch.einsum("ui,bkhuwv,vj->bkhiwj", m, c, m).flatten(4).flatten(2, 3)
    return torch.einsum("kc,bchw->bkhw", torch.linalg.inv(to_ycc), y)[:, :, :h, :w]


def blur(image: Tensor, sigma: Tensor) -> Tensor:
    """A small Gaussian lens blur, [B,C,H,W] with sigma [B] pixels (0 leaves the picture as it is)."""
    r = torch.arange(-4, 5, device=image.device)
    k = torch.exp(-0.5 * (r[None] / sigma.clamp_min(1e-3)[:, None]) ** 2)
    k = k / k.sum(1, keepdim=True)
    b, c, h, w = image.shape
    x = F.pad(image, (4, 4, 4, 4), mode="replicate").reshape(1, b * c, h + 8, w + 8)
    k = k.repeat_interleave(c, 0)
    x = F.conv2d(F.conv2d(x, k[:, None, None], groups=b * c), k[:, None, :, None], groups=b * c)
    return x.reshape(b, c, h, w)


def develop(radiance: Tensor, camera: Camera) -> Tensor:
    """Exposed linear radiance [B,3,H,W] at twice the picture's size -> sRGB picture [B,3,H/2,W/2], 0..1."""
    x = F.avg_pool2d(radiance.clamp(0, 6), 2)
    h, w = x.shape[2:]
    x = blur(x, camera.blur * (h / 128))
    g = [torch.Generator().manual_seed(int(s)) for s in camera.sensor.tolist()]
    grain = torch.stack([torch.randn(2, 3, h, w, generator=i) for i in g]).to(x)
    level = camera.noise.reshape(-1, 1, 1, 1)
    x = x + level * (grain[:, 0] * (0.3 * x.clamp_min(0)).sqrt() + 0.15 * grain[:, 1] * 0.3)
    x = tone(srgb(x), camera.contrast)
    return jpeg(x, camera.jpeg).clamp(0, 1)
