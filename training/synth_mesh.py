"""Meshes of the synthetic portraits: the open head, a hair shell grown from its skin, hanging hair, glasses, a bust.

Canonical space q: the mean head with the origin between the eyes and the eye distance as unit; x right of
the picture, y up, z to the viewer. Styles are drawn there, so they fit every identity and pose.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from rig_core import checkpoints, raster
from rig_core.face import axis_angle_to_matrix

from .synth_scene import Person

MAPS = ("lips", "beard", "sockets", "scalp", "brows")
SKIN, EYE, TEETH, MOUTH, CLOTH, FRAME = range(6)
AXIS = torch.tensor([0.0, 0.35, -1.1])  # middle of the skull


@dataclass(frozen=True)
class Template:
    """What does not depend on the seeds. V vertices of the head, all in canonical space unless said."""

    head: object
    q: Tensor  # [V,3]
    unit: float  # metres
    faces: Tensor  # [F,3] head, bust, glasses: everything opaque
    face_material: Tensor  # [F]
    shell: Tensor  # [N] head vertices that may grow hair
    shell_faces: Tensor  # [G,3] rows of shell, then of the hanging hair
    coarse: Tensor  # [C,V] sparse: averages of clusters of skin vertices, the shadow casters
    coarse_faces: Tensor
    rigid: Tensor  # [N] vertices that follow the skull, with the pseudo-inverse of [q,1]
    rigid_inverse: Tensor
    scalp_map: Tensor  # [1,1,h,w] of the texture
    cheek_map: Tensor
    maps: Tensor  # [1,M,h,w] region maps in synth_look.MAPS' order
    face_uv: Tensor  # [F,3,2]
    face_region: Tensor  # [F] bool: the face proper, for the light meter
    lash: Tensor  # [A] 1 at the margins of the lids

    def to(self, device) -> Template:
        return Template(**{k: v.to(device) if hasattr(v, "to") else v for k, v in vars(self).items()})


def curve(x: Tensor, xs: list[float], ys: list[float]) -> Tensor:
    """Piecewise linear function through (xs, ys), constant outside."""
    y = torch.full_like(x, ys[0])
    for a, b, c, d in zip(xs, xs[1:], ys, ys[1:]):
        y = y + (d - c) * ((x - a) / (b - a)).clamp(0, 1)
    return y


def smooth(x: Tensor, low, high) -> Tensor:
    t = ((x - low) / (high - low)).clamp(0, 1)
    return t * t * (3 - 2 * t)


def _clusters(q: Tensor, faces: Tensor, cell: float) -> tuple[Tensor, Tensor]:
    """Vertex clustering (Rossignac and Borrel 1993): averaging matrix [C,V] and the triangles that survive."""
    key = (q / cell).round().long()
    _, group = torch.unique(key, dim=0, return_inverse=True)
    used = torch.zeros(len(q), dtype=torch.bool)
    used[faces.unique()] = True
    rows = group[used].unique()
    row = torch.full((int(group.max()) + 1,), -1)
    row[rows] = torch.arange(len(rows))
    v = used.nonzero()[:, 0]
    count = torch.bincount(row[group[v]], minlength=len(rows)).float()
    mean = torch.sparse_coo_tensor(
        torch.stack([row[group[v]], v]), 1 / count[row[group[v]]], (len(rows), len(q)), check_invariants=True
    )
    f = row[group[faces]]
    f = f[(f[:, 0] != f[:, 1]) & (f[:, 1] != f[:, 2]) & (f[:, 0] != f[:, 2])]
    _, first = torch.unique(f.sort(1).values, dim=0, return_inverse=True)
    keep = torch.full((int(first.max()) + 1,), -1)
    keep[first] = torch.arange(len(f))
    return mean.coalesce(), f[keep]


def grid_faces(rows: int, columns: int, start: int, closed: bool = False) -> Tensor:
    """Triangles of a grid of rows x columns vertices; closed joins the last column to the first."""
    r, c = torch.meshgrid(
        torch.arange(rows - 1), torch.arange(columns if closed else columns - 1), indexing="ij"
    )
    n = (c + 1) % columns
    a, b = r * columns + c, r * columns + n
    quad = torch.stack([a, a + columns, b, b, a + columns, b + columns], -1)
    return quad.reshape(-1, 3) + start


@functools.cache
def template(device: str = "cpu") -> Template:
    """The open head and everything derived from its mean shape."""
    if device != "cpu":
        return template().to(device)
    head = checkpoints.load_head()
    neutral = head.template
    marks = neutral[head.landmark_index]
    left, right = marks[36:42].mean(0), marks[42:48].mean(0)
    unit = (right - left).norm().item()
    q = (neutral - (left + right) / 2) / unit
    m = head.masks
    head_faces = head.faces
    # below the neck the bust takes over; the throat stays for open collars
    p = q[head_faces]
    low = (p[..., 1].amax(1) < -2.4) & ((p[..., 0].abs().amax(1) > 0.9) | (p[..., 2].amax(1) < -1.5)) | (
        p[..., 1].amax(1) < -3.0
    )
    material = torch.full((len(q),), SKIN)
    for name, number in (("mouth", MOUTH), ("teeth", TEETH), ("eyes", EYE)):
        material[m[name] > 0.5] = number
    face_material = material[head_faces].amax(1)
    # pockets behind lids and lips are skin by their border only
    head_faces, face_material = head_faces[~low], face_material[~low]
    inner = (m["skin"] + m["scalp"] + m["mouth"] + m["teeth"] + m["eyes"]) < 0.01  # pockets behind the lids
    lids = head.faces[inner[head.faces].any(1)].unique()
    lash = torch.zeros(len(q))
    lash[lids] = (~inner[lids]).float()
    skin = (m["skin"] + m["scalp"]) > 0.5
    hairy = skin & (hairline(q) > -0.75) & (m["ears"] < 0.5) | (m["beard"] > 0.02)
    shell = hairy.nonzero()[:, 0]
    row = torch.full((len(q),), -1)
    row[shell] = torch.arange(len(shell))
    shell_faces = row[head.faces]
    shell_faces = shell_faces[(shell_faces >= 0).all(1)]
    coarse, coarse_faces = _clusters(q, head_faces[(face_material == SKIN)], 0.11)
    rigid = ((m["scalp"] > 0.9) | (skin & (q[:, 1].abs() < 0.6) & (q[:, 2] < -0.2))).nonzero()[:, 0]
    bust_start, frame_start = len(q), len(q) + BUST[0] * BUST[1]
    bust_faces = grid_faces(*BUST, bust_start, closed=True)
    glasses_faces = _glasses_faces(frame_start)
    maps = _maps(head)
    extra = len(bust_faces) + len(glasses_faces)
    return Template(
        head=head,
        q=q,
        maps=maps,
        face_uv=torch.cat([head.uv[head.uv_faces][~low], torch.zeros(extra, 3, 2)]),
        face_region=torch.cat([(m["face"] > 0.5)[head_faces].all(1), torch.zeros(extra, dtype=torch.bool)]),
        lash=torch.cat([lash, torch.zeros(len(bust_faces.unique()) + len(glasses_faces.unique()))]),
        unit=unit,
        faces=torch.cat([head_faces, bust_faces, glasses_faces]),
        face_material=torch.cat(
            [face_material, torch.full((len(bust_faces),), CLOTH), torch.full((len(glasses_faces),), FRAME)]
        ),
        shell=shell,
        shell_faces=torch.cat([shell_faces, grid_faces(*CURTAIN, len(shell))]),
        coarse=coarse,
        coarse_faces=coarse_faces,
        rigid=rigid,
        rigid_inverse=torch.linalg.pinv(torch.cat([q[rigid], torch.ones(len(rigid), 1)], 1)),
        scalp_map=maps[:, MAPS.index("scalp"), None],
        cheek_map=_cheeks(head, q),
    )


def blob(q: Tensor, x: float, y: float, rx: float, ry: float) -> Tensor:
    """A soft spot on either side of the face's front, [N]."""
    front = smooth(q[..., 2], -0.9, -0.5)
    return torch.exp(-(((q[..., 0].abs() - x) / rx) ** 2 + ((q[..., 1] - y) / ry) ** 2)) * front


def _maps(head) -> Tensor:
    """The head's region maps [1,M,h,w] in the texture's size; rows below the skin's are empty."""
    h, w = head.albedo(torch.zeros(1, head.sizes.tex)).shape[2:]
    rows = [head.get_buffer(f"map_{k}").reshape(-1, w) for k in MAPS]
    return torch.stack([F.pad(r, (0, 0, 0, h - len(r))) for r in rows])[None]


def _cheeks(head, q: Tensor) -> Tensor:
    """Texels of the bare cheeks [1,1,h,w]: where the skin's colour is read off."""
    h, w = _maps(head).shape[2:]
    on = (blob(q, 0.6, -0.5, 0.2, 0.2) > 0.4) & (head.masks["skin"] > 0.5)
    uv = head.uv[head.uv_faces[on[head.faces].all(1)]].mean(1)
    out = torch.zeros(h, w)
    out[((1 - uv[:, 1]) * h).long(), (uv[:, 0] * w).long()] = 1
    return out[None, None]


# --- hair --------------------------------------------------------------------------------------------------------

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
    """Height of the shell above the skin [B,N] in eye distances, for q [N,3] and the head's beard mask [N]."""
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
    """Hanging hair: points [B,R*C,3] in canonical space and their (around, down) coordinates [B,R*C,2].

    A sheet around the back of the head from temple to temple, hugging the skull above and falling
    below; its front edge moves forward on the way down. Heads without long hair get it folded into a point.
    """
    rows, columns = CURTAIN
    b = len(person)
    t = torch.linspace(0, 1, rows, device=person.volume.device)[:, None]
    s = torch.linspace(-1, 1, columns, device=t.device)[None]
    length, volume = person.length[:, None, None], person.volume[:, None, None]
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
    rx, rz = 1.14 + bulge + wave + 0.16 * widen, 1.55 + bulge + wave - 0.25 * hang
    side = torch.where(theta.cos() > 0, 1.25 + 0.3 * hang + bulge + wave, rz)
    x = rx * theta.sin()
    z = AXIS[2].item() + side * theta.cos()
    y = y.expand_as(x) + 0.05 * torch.sin(theta * 7) * hang
    p = torch.stack([x, y, z], -1).reshape(b, -1, 3)
    around = torch.stack([theta.expand_as(x), y], -1).reshape(b, -1, 2)
    worn = (person.length > 0)[:, None, None]
    return torch.where(worn, p, p.new_tensor([0.0, 0.5, -1.1])), around


# --- bust and glasses ----------------------------------------------------------------------------------------------

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


def _glasses_faces(start: int) -> Tensor:
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


# --- everything together --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Meshes:
    """Posed meshes in model space (metres). A: head, bust, glasses; H: hair."""

    verts: Tensor  # [B,A,3]
    normals: Tensor
    q: Tensor  # [B,A,3] canonical position of every vertex
    hair: Tensor  # [B,H,3]
    hair_normals: Tensor
    hair_faces: Tensor  # [B,G,3]
    hair_q: Tensor  # [B,H,3]
    hanging: Tensor  # [B,H,3] (around, down, 1 for hanging hair)
    beard: Tensor  # [B,H] the head's beard mask
    turn: Tensor  # [B,3,3] canonical directions -> model space
    caster: Tensor  # [B,C,3]
    caster_faces: Tensor  # [B,G,3]
    scope: tuple[Tensor, Tensor]  # centre [B,3] and radius [B] of what shadows are computed for


def assemble(t: Template, person: Person, shape: Tensor, exp: Tensor, pose: Tensor) -> Meshes:
    """Pose the head and dress it."""
    b = len(person)
    head = t.head.verts(shape, exp, pose)
    fit = t.rigid_inverse @ head[:, t.rigid]  # [B,4,3] affine map canonical -> model

    def place(p):
        return p @ fit[:, :3] + fit[:, 3:]

    normals = raster.vertex_normals(head, t.head.faces)
    beard = t.head.masks["beard"][t.shell]
    grow = thickness(t.q[t.shell], beard, person) * t.unit
    sheet, around = curtain(person)
    shell = head[:, t.shell] + normals[:, t.shell] * grow[..., None]
    hair = torch.cat([shell, place(sheet)], 1)
    hair_q = torch.cat([t.q[t.shell].expand(b, -1, -1), sheet], 1)
    on_shell = torch.zeros(b, len(t.shell), 3, device=hair.device)
    hanging = torch.cat([on_shell, torch.cat([around, torch.ones_like(around[..., :1])], -1)], 1)
    wide_beard = torch.cat([beard.expand(b, -1), beard.new_zeros(b, sheet.shape[1])], 1)
    present = growth(hair_q, wide_beard, hanging[..., 2], person) > -0.15
    alive = present[torch.arange(b)[:, None, None], t.shell_faces].any(2)
    hair_faces = _living(t.shell_faces, alive)
    # the bust stands under the neck and turns half as far as the head
    base = place(t.q.new_tensor([[[0.0, -2.5, -1.55]]]))
    half = axis_angle_to_matrix(pose[:, :3] * pose.new_tensor([0.15, 0.4, 0.3]))
    body = bust(person) * t.unit @ half.transpose(1, 2) + base
    rims = place(glasses(person))
    verts = torch.cat([head, body, rims], 1)
    nb, ng = body.shape[1], rims.shape[1]
    body_faces = grid_faces(*BUST, 0, closed=True).to(body.device)
    rim_faces = _glasses_faces(0).to(body.device)
    normals = torch.cat(
        [normals, raster.vertex_normals(body, body_faces), raster.vertex_normals(rims, rim_faces)], 1
    )
    q = torch.cat([t.q.expand(b, -1, -1), bust(person), t.q.new_zeros(b, ng, 3)], 1)
    coarse = torch.stack([torch.sparse.mm(t.coarse, h) for h in head])
    dense = (growth(hair_q, wide_beard, hanging[..., 2], person) > 0.08) & (hair_q[..., 1] > -9)
    solid = dense[torch.arange(b)[:, None, None], t.shell_faces].all(2)
    n = coarse.shape[1]
    caster_hair = _living(t.shell_faces + n + nb, solid)
    fixed = torch.cat([t.coarse_faces, body_faces + n]).expand(b, -1, -1)
    return Meshes(
        verts=verts, normals=normals, q=q,
        hair=hair, hair_normals=raster.vertex_normals(hair, hair_faces), hair_faces=hair_faces, hair_q=hair_q,
        hanging=hanging, beard=wide_beard, turn=F.normalize(fit[:, :3], dim=-1).transpose(1, 2),
        caster=torch.cat([coarse, body, hair], 1), caster_faces=torch.cat([fixed, caster_hair], 1),
        scope=_scope(coarse, hair),
    )  # fmt: skip


def _living(faces: Tensor, alive: Tensor) -> Tensor:
    """Those of faces [G,3] that are alive [B,G] in any item, folded to a point where they are not: [B,G',3]."""
    some = alive.any(0)
    return torch.where(alive[:, some, None], faces[some], torch.zeros_like(faces[some]))


def _scope(head: Tensor, hair: Tensor) -> tuple[Tensor, Tensor]:
    """Sphere around head and hair, without what hangs far below."""
    low, high = head.amin(1), head.amax(1)
    high = torch.maximum(high, hair.amax(1))
    return (low + high) / 2, (high - low).norm(dim=-1) / 2


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
