"""Meshes of the synthetic portraits: the open head, posed, with hair grown from its skin, a bust and glasses.

Canonical space q: see synth_style.
"""

from __future__ import annotations

import copy
import functools
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from rig_core import checkpoints, raster
from rig_core.face import axis_angle_to_matrix

from .synth_scene import Person
from .synth_style import (
    BUST,
    CURTAIN,
    blob,
    bust,
    curtain,
    glasses,
    glasses_faces,
    grid_faces,
    growth,
    hairline,
    thickness,
)

MAPS = ("lips", "beard", "sockets", "scalp", "brows")
SKIN, EYE, TEETH, MOUTH, CLOTH, FRAME = range(6)


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
    veil: Tensor  # [G] bool: faces of the front of the hanging hair
    coarse: Tensor  # [C,V] sparse: averages of clusters of skin vertices, the shadow casters
    coarse_faces: Tensor
    coarse_high: Tensor  # rows of coarse above the neck
    rigid: Tensor  # [N] vertices that follow the skull, with the pseudo-inverse of [q,1]
    rigid_inverse: Tensor
    scalp_map: Tensor  # [1,1,h,w] of the texture
    cheek_map: Tensor
    maps: Tensor  # [1,M,h,w] region maps in synth_look.MAPS' order
    face_uv: Tensor  # [F,3,2]
    face_region: Tensor  # [F] bool: the face proper, for the light meter
    lash: Tensor  # [A] 1 at the margins of the lids

    def to(self, device) -> Template:
        moved = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in vars(self).items()}
        return Template(**moved | {"head": copy.deepcopy(self.head).to(device)})  # a module moves in place


def _clusters(q: Tensor, faces: Tensor, cell: float) -> tuple[Tensor, Tensor]:
    """Vertex clustering (Rossignac and Borrel 1993): averaging matrix [C,V] and the triangles left."""
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
    sheet = grid_faces(*CURTAIN, len(shell)).flip(1)  # its columns run backwards
    coarse, coarse_faces = _clusters(q, head_faces[(face_material == SKIN)], 0.10)
    rigid = ((m["scalp"] > 0.9) | (skin & (q[:, 1].abs() < 0.6) & (q[:, 2] < -0.2))).nonzero()[:, 0]
    bust_start, frame_start = len(q), len(q) + BUST[0] * BUST[1]
    bust_faces = grid_faces(*BUST, bust_start, closed=True)
    rims = glasses_faces(frame_start)
    maps = _maps(head)
    extra = len(bust_faces) + len(rims)
    return Template(
        head=head,
        q=q,
        maps=maps,
        face_uv=torch.cat([head.uv[head.uv_faces][~low], torch.zeros(extra, 3, 2)]),
        face_region=torch.cat([(m["face"] > 0.5)[head_faces].all(1), torch.zeros(extra, dtype=torch.bool)]),
        lash=torch.cat([lash, torch.zeros(len(bust_faces.unique()) + len(rims.unique()))]),
        unit=unit,
        faces=torch.cat([head_faces, bust_faces, rims]),
        face_material=torch.cat(
            [face_material, torch.full((len(bust_faces),), CLOTH), torch.full((len(rims),), FRAME)]
        ),
        shell=shell,
        shell_faces=torch.cat([shell_faces, sheet]),
        veil=torch.cat([torch.zeros(len(shell_faces), dtype=torch.bool), _veil(sheet - len(shell))]),
        coarse=coarse,
        coarse_faces=coarse_faces,
        coarse_high=(torch.sparse.mm(coarse, q)[:, 1] > -2.0).nonzero()[:, 0],
        rigid=rigid,
        rigid_inverse=torch.linalg.pinv(torch.cat([q[rigid], torch.ones(len(rigid), 1)], 1)),
        scalp_map=maps[:, MAPS.index("scalp"), None],
        cheek_map=_cheeks(head, q),
    )


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


# --- everything together ---


@dataclass(frozen=True)
class Meshes:
    """Posed meshes in model space (metres). A: head, bust, glasses; H: hair."""

    verts: Tensor  # [B,A,3]
    normals: Tensor
    q: Tensor  # [B,A,3] canonical position of every vertex
    hair: Tensor  # [B,H,3]
    hair_normals: Tensor
    hair_faces: Tensor  # [B,G,3]
    veil_faces: Tensor  # [B,G,3] the front of the hanging hair, drawn over the rest
    hair_q: Tensor  # [B,H,3]
    hanging: Tensor  # [B,H,4] angle, height, 1 for hanging hair, distance from its edge
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
    hanging = torch.cat([around.new_zeros(b, len(t.shell), 4), around], 1)
    wide_beard = torch.cat([beard.expand(b, -1), beard.new_zeros(b, sheet.shape[1])], 1)
    present = growth(hair_q, wide_beard, hanging[..., 2], person) > -0.15
    alive = present[torch.arange(b)[:, None, None], t.shell_faces].any(2)
    hair_faces = _living(t.shell_faces, alive & ~t.veil)
    veil_faces = _living(t.shell_faces, alive & t.veil)
    # the bust stands under the neck and turns half as far as the head
    base = place(t.q.new_tensor([[[0.0, -2.5, -1.55]]]))
    half = axis_angle_to_matrix(pose[:, :3] * pose.new_tensor([0.15, 0.4, 0.3]))
    body = bust(person) * t.unit @ half.transpose(1, 2) + base
    rims = place(glasses(person))
    verts = torch.cat([head, body, rims], 1)
    nb, ng = body.shape[1], rims.shape[1]
    body_faces = grid_faces(*BUST, 0, closed=True).to(body.device)
    rim_faces = glasses_faces(0).to(body.device)
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
        hair=hair, hair_normals=raster.vertex_normals(hair, torch.cat([hair_faces, veil_faces], 1)),
        hair_faces=hair_faces, veil_faces=veil_faces, hair_q=hair_q,
        hanging=hanging, beard=wide_beard, turn=F.normalize(fit[:, :3], dim=-1).transpose(1, 2),
        caster=torch.cat([coarse, body, hair], 1), caster_faces=torch.cat([fixed, caster_hair], 1),
        scope=_scope(coarse[:, t.coarse_high], hair[:, : len(t.shell)]),
    )  # fmt: skip


def _veil(sheet: Tensor) -> Tensor:
    """Faces [G] of the hanging hair, rows of the sheet alone, that hang before the ears or beside them."""
    s = (sheet % CURTAIN[1]).float() / (CURTAIN[1] - 1) * 2 - 1
    return (s.abs() > 0.6).all(1)


def _living(faces: Tensor, alive: Tensor) -> Tensor:
    """Faces [G,3] that are alive [B,G] in any item, folded to a point in the others: [B,G',3]."""
    some = alive.any(0)
    return torch.where(alive[:, some, None], faces[some], torch.zeros_like(faces[some]))


def _scope(head: Tensor, hair: Tensor) -> tuple[Tensor, Tensor]:
    """Sphere about head [B,C,3] and hair [B,N,3]: centre [B,3], radius [B]."""
    top = torch.cat([head, hair], 1)
    low, high = top.amin(1), top.amax(1)
    centre = (low + high) / 2
    return centre, (top - centre[:, None]).norm(dim=-1).amax(1) * 1.02
