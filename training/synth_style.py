"""Hair, beard, bust and glasses of the synthetic portraits: shapes and styles in canonical space.

Canonical space q: the mean head with the origin between the eyes and the eye distance as unit; x right of
the picture, y up, z to the viewer. Styles are drawn there, so they fit every identity and pose.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from .synth_scene import Person

AXIS = torch.tensor([0.0, 0.35, -1.1])  # middle of the skull


def curve(x: Tensor, xs: list[float], ys: list[float]) -> Tensor:
    """Piecewise linear function through (xs, ys), constant outside."""
    y = torch.full_like(x, ys[0])
    for a, b, c, d in zip(xs, xs[1:], ys, ys[1:]):
        y = y + (d - c) * ((x - a) / (b - a)).clamp(0, 1)
    return y


def smooth(x: Tensor, low, high) -> Tensor:
    t = ((x - low) / (high - low)).clamp(0, 1)
    return t * t * (3 - 2 * t)


def blob(q: Tensor, x: float, y: float, rx: float, ry: float) -> Tensor:
    """A soft spot on either side of the face's front, [N]."""
    front = smooth(q[..., 2], -0.9, -0.5)
    return torch.exp(-(((q[..., 0].abs() - x) / rx) ** 2 + ((q[..., 1] - y) / ry) ** 2)) * front


def grid_faces(rows: int, columns: int, start: int, closed: bool = False) -> Tensor:
    """Triangles of a grid of rows x columns vertices; closed joins the last column to the first."""
    r, c = torch.meshgrid(
        torch.arange(rows - 1), torch.arange(columns if closed else columns - 1), indexing="ij"
    )
    n = (c + 1) % columns
    a, b = r * columns + c, r * columns + n
    quad = torch.stack([a, a + columns, b, b, a + columns, b + columns], -1)
    return quad.reshape(-1, 3) + start


# --- hair ---

LINE = (
    [0, 25, 42, 55, 66, 74, 80, 92, 105, 120, 180],
    [1.05, 1.07, 0.95, 0.72, 0.48, 0.05, 0.25, 0.38, 0.05, -1.0, -1.5],
)


def azimuth(q: Tensor) -> Tensor:
    """Degrees from the front about the skull's upright axis, 0..180, both sides alike."""
    return torch.rad2deg(torch.atan2(q[..., 0].abs(), q[..., 2] - AXIS[2].item()))


def hairline(q: Tensor, person: Person | None = None, jitter: Tensor | float = 0.0) -> Tensor:
    """How far above the hairline a point lies, in eye distances: q [...,3] -> [...].

    With a person q is [B,N,3]: receding temples, bare crowns and fringes are theirs.
    """
    theta = azimuth(q)
    line = curve(theta, *LINE) + jitter
    y = q[..., 1]
    if person is None:
        return y - line
    temple = torch.exp(-(((theta - 38) / 16) ** 2)) + 0.45 * torch.exp(-((theta / 22) ** 2))
    line = line + person.hairline[:, None] * temple * 1.2
    line = line - person.fringe[:, None] * (1 - smooth(theta, 38.0, 52.0))
    bare = 1.75 - 1.0 * person.horseshoe[:, None] + 0.4 * smooth(theta, 110.0, 180.0)
    crown = torch.where(person.horseshoe[:, None] > 0, (bare - y) * 1.2, torch.full_like(y, 9.0))
    return torch.minimum(y - line, crown)


def thickness(q: Tensor, beard: Tensor, person: Person) -> Tensor:
    """Height of the shell above the skin [B,N], eye distances; q [N,3], beard [N] the head's mask."""
    b = len(person)
    p = q[None].expand(b, -1, -1)
    margin = hairline(p, person)
    theta = azimuth(p)
    rise = smooth(margin, -0.05, 0.55)
    top = smooth(p[..., 1], 0.4, 1.5)
    angle = torch.atan2(p[..., 0], p[..., 2] - AXIS[2].item())
    phase = person.parting[:, :1] * 9
    lumps = 1 + 0.18 * torch.sin(angle * 5 + phase) * torch.sin(p[..., 1] * 4 + phase)
    t = person.volume[:, None] * rise * (0.65 + 0.55 * top) * lumps
    overhang = person.fringe[:, None] * (1 - smooth(theta, 40.0, 55.0)) * smooth(margin, -0.05, 0.1)
    t = t + 0.09 * overhang.clamp(0, 1) + 0.012
    hair = t * person.hair[:, None]
    chin = smooth(-p[..., 1], 1.0, 1.6)
    return torch.maximum(
        hair, person.beard[:, :1] * beard[None] * (0.5 + 0.7 * chin) + 0.008 * (beard[None] > 0)
    )


CURTAIN = (14, 44)  # rows down, columns around


def curtain(person: Person) -> tuple[Tensor, Tensor]:
    """Hanging hair: points [B,R*C,3], canonical, and [B,R*C,4]: angle, height, 1, distance from the edge.

    A sheet around the back of the head from temple to temple, hugging the skull above and falling
    below; its front edge moves forward on the way down. Heads without long hair get it folded into a point.
    """
    rows, columns = CURTAIN
    b = len(person)
    t = torch.linspace(0, 1, rows, device=person.volume.device)[:, None]
    s = torch.linspace(-1, 1, columns, device=t.device)[None]
    length, volume = person.length[:, None, None], person.volume[:, None, None].clamp_max(0.32)
    y = 0.95 - t * (0.95 + length)
    part = torch.tanh(2 * person.parting[:, :1, None])
    front = torch.deg2rad(62 - 12 * smooth(-y, 0.8, 2.2) + 8 * part * s.sign())
    theta = s.sign() * (front + (math.pi - front) * (1 - s.abs()))
    widen = smooth(-y, -0.9, 0.4)
    hang = smooth(-y, 0.6, 3.0)
    body = smooth(1 - s.abs(), 0.0, 0.18)  # the front edge lies on the cheek, the mass behind it
    curl = person.curl[:, None, None]
    bulge = (
        volume * (0.5 + 0.8 * widen) * (0.15 + 0.85 * body)
        + 0.35 * volume * curl * widen * body
        - 0.06 * hang
    )
    bulge = bulge * (1 - 0.6 * smooth(t, 0.65, 1.0) * (1 - 0.5 * curl)) - 0.06 * smooth(t, 0.7, 1.0)
    wave = 0.03 * torch.sin(theta * 11 + y * 2.0) + 0.025 * torch.sin(theta * 23 - y * 3 + 1)
    wave = wave * (0.3 + widen) * (0.4 + 1.5 * curl) * (0.3 + 0.7 * body)
    rx, rz = 1.14 + bulge + wave + 0.11 * widen, 1.55 + bulge + wave - 0.25 * hang
    side = torch.where(theta.cos() > 0, 1.25 + 0.3 * hang + bulge + wave, rz)
    x = rx * theta.sin()
    z = AXIS[2].item() + side * theta.cos()
    y = y.expand_as(x) + 0.05 * torch.sin(theta * 7) * hang
    p = torch.stack([x, y, z], -1).reshape(b, -1, 3)
    edge = (1 - s.abs()).expand_as(x)
    around = torch.stack([theta.expand_as(x), y, torch.ones_like(x), edge], -1).reshape(b, -1, 4)
    worn = (person.length > 0)[:, None, None]
    return torch.where(worn, p, p.new_tensor([0.0, 0.5, -1.1])), around


# --- bust and glasses ---

BUST = (10, 36)


def bust(person: Person) -> Tensor:
    """Neck opening, shoulders and chest [B,R*C,3] about the base of the neck, in eye distances."""
    broad = (1.0 - 0.1 * person.female)[:, None]
    s = torch.linspace(0, 1, BUST[0], device=broad.device)[None]
    rows = [0, 0.11, 0.22, 0.33, 0.44, 0.55, 0.66, 0.78, 1]
    rx = curve(s, rows, [1.08, 1.22, 1.55, 2.0, 2.5, 2.9, 3.2, 3.3, 3.3]) * torch.lerp(
        torch.ones_like(broad), broad, s
    )
    rz = curve(s, rows, [1.02, 1.08, 1.18, 1.25, 1.3, 1.4, 1.5, 1.6, 1.7])
    y = curve(s, rows, [0.42, 0.26, 0.08, -0.12, -0.32, -0.55, -0.9, -1.4, -3.0])
    phi = torch.linspace(0, 2 * math.pi, BUST[1] + 1, device=s.device)[None, None, :-1]
    x = rx[..., None] * phi.sin()
    z = rz[..., None] * phi.cos() * torch.where(phi.cos() > 0, 0.85, 1.0)
    # the neck opening dips in front
    y = (
        y[..., None]
        - 0.32 * (1 - s[..., None]) * phi.cos().clamp_min(0) ** 2
        + 0.16 * (1 - s[..., None]) * (-phi.cos()).clamp_min(0)
    )
    return torch.stack([x, y.expand_as(x), z], -1).reshape(len(person), -1, 3)


RING, TUBE, ARM = 28, 5, 2


def glasses_faces(start: int) -> Tensor:
    rings = [grid_faces(RING, TUBE, start + i * RING * TUBE, closed=True) for i in (0, 1)]
    close = [
        torch.cat(
            [torch.arange(TUBE) + i * RING * TUBE + (RING - 1) * TUBE, torch.arange(TUBE) + i * RING * TUBE]
        )
        + start
        for i in (0, 1)
    ]
    join = grid_faces(2, TUBE, 0, closed=True)
    rods = [grid_faces(ARM, TUBE, start + (2 * RING + ARM * i) * TUBE, closed=True) for i in range(3)]
    return torch.cat([*rings, *(c[join] for c in close), *rods])


def _tube(path: Tensor, radius: Tensor, closed: bool) -> Tensor:
    """A tube [B,N*TUBE,3] around a path [B,N,3]; radius [B]."""
    if closed:
        d = path.roll(-1, 1) - path.roll(1, 1)
    else:
        d = (path[:, 1:] - path[:, :-1])[:, :1].expand_as(path)
    d = F.normalize(d, dim=-1)
    ref = torch.zeros_like(d)
    ref[..., 2 if closed else 1] = 1
    a = F.normalize(torch.linalg.cross(d, ref), dim=-1)
    b = torch.linalg.cross(d, a)
    phi = torch.arange(TUBE, device=path.device) * (2 * math.pi / TUBE)
    around = a[:, :, None] * phi.cos()[:, None] + b[:, :, None] * phi.sin()[:, None]
    return (path[:, :, None] + radius[:, None, None, None] * around).flatten(1, 2)


def glasses(person: Person) -> Tensor:
    """Rims, bridge and arms [B,N,3] in canonical space; a point inside the head where none are worn."""
    g = person.glasses
    width, square = g[:, 4, None], g[:, 5, None]
    radius = 0.015 + 0.02 * square[:, 0] * (g[:, 1:4].mean(1) < 0.05)
    phi = torch.arange(RING, device=g.device)[None] * (2 * math.pi / RING)
    power = 2 / (2 + 4 * square)
    cx = phi.cos().sign() * phi.cos().abs() ** power * 0.40 * width
    cy = phi.sin().sign() * phi.sin().abs() ** power * (0.36 - 0.09 * square)
    parts = []
    for side in (-1, 1):
        x = side * 0.48 + cx
        z = 0.27 - 0.22 * (x.abs() / 0.9) ** 2
        parts.append(_tube(torch.stack([x, cy - 0.06, z], -1), radius, True))
    inner, outer = 0.48 - 0.40 * width[:, 0], 0.48 + 0.40 * width[:, 0]
    zero = torch.zeros_like(inner)

    def rod(a, b):
        parts.append(_tube(torch.stack([torch.stack(a, -1), torch.stack(b, -1)], 1), radius, False))

    rod([-inner, zero + 0.04, zero + 0.26], [inner, zero + 0.04, zero + 0.26])
    for side in (-1, 1):
        rod(
            [side * outer, zero + 0.05, 0.27 - 0.22 * (outer / 0.9) ** 2],
            [zero + side * 1.17, zero + 0.08, zero - 1.0],
        )
    p = torch.cat(parts, 1)
    return torch.where((g[:, :1] > 0)[..., None], p, p.new_tensor([0.0, 0.0, -1.0]))


def growth(q: Tensor, beard: Tensor, hanging: Tensor, person: Person, jitter: Tensor | float = 0.0) -> Tensor:
    """Signed distance into the hair or beard (positive: hair grows), [B,N], in eye distances.

    q [B,N,3], beard [B,N] the head's beard mask, hanging [B,N] 1 on hanging hair.
    """
    scalp = torch.where(person.hair[:, None] > 0, hairline(q, person, jitter), torch.full_like(beard, -9.0))
    x, y = q[..., 0].abs(), q[..., 1]
    lip = torch.minimum((y + 0.99) * 4, 0.52 - x)  # moustache: above the mouth's corners
    lip = torch.minimum(lip, (-0.70 - y) * 4)
    chin = torch.minimum(0.50 + 0.15 * (-1.2 - y).clamp(0, 1) - x, -0.95 - y)
    cheek = torch.full_like(x, 9.0)
    cheeks, moustache, goatee = (person.beard[:, i, None] for i in (1, 2, 3))
    region = torch.maximum(torch.where(moustache > 0, lip, -9.0), torch.where(goatee > 0, chin, -9.0))
    region = torch.maximum(region, torch.where(cheeks > 0, cheek, -9.0))
    whiskers = torch.minimum((beard - 0.35) * 0.5, region) + jitter
    grown = torch.maximum(scalp, torch.where(person.beard[:, :1] > 0, whiskers, torch.full_like(scalp, -9.0)))
    worn = (person.length > 0)[:, None]
    return torch.where(hanging > 0.5, torch.where(worn, 0.3, -9.0).expand_as(grown), grown)
