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
    tuft: Tensor  # [D,N] sparse: the same for the shell of hair
    tuft_faces: Tensor
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


def _clusters(q: Tensor, faces: Tensor) -> tuple[Tensor, Tensor]:
    """Vertex clustering (Rossignac and Borrel 1993): averaging matrix [C,V] and the triangles left.

    Cells are small on the face, whose nose and lids throw shadows that are seen, and large elsewhere.
    """
    face = ((q[:, 2] > -0.55) & (q[:, 1] > -1.9) & (q[:, 1] < 0.7)).long()
    key = torch.cat([(q / torch.where(face > 0, 0.09, 0.2)[:, None]).round().long(), face[:, None]], 1)
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
    coarse, coarse_faces = _clusters(q, head_faces[(face_material == SKIN)])
    tuft, tuft_faces = _clusters(q[shell], shell_faces)
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
        tuft=tuft,
        tuft_faces=torch.cat([tuft_faces, grid_faces(*CURTAIN, len(tuft))]),
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
    shell = head[:, t.shell] + normals[:, t.shell] * grow[..., None]
    sheet, around = curtain(person)
    hung = place(sheet)
    # the bust stands under the neck and turns half as far as the head
    half = axis_angle_to_matrix(pose[:, :3] * pose.new_tensor([0.15, 0.4, 0.3]))
    chest = bust(person)
    body = chest * t.unit @ half.transpose(1, 2) + place(t.q.new_tensor([[[0.0, -2.5, -1.55]]]))
    rims = place(glasses(person))
    more = [(body, grid_faces(*BUST, 0, closed=True)), (rims, glasses_faces(0))]
    normals = torch.cat([normals] + [raster.vertex_normals(v, f.to(v.device)) for v, f in more], 1)
    q = torch.cat([t.q.expand(b, -1, -1), chest, torch.zeros_like(rims)], 1)
    caster, caster_faces, scope = _casters(t, person, head, body, shell, sheet, hung, around)
    return Meshes(
        verts=torch.cat([head, body, rims], 1),
        normals=normals,
        q=q,
        turn=F.normalize(fit[:, :3], dim=-1).transpose(1, 2),
        caster=caster,
        caster_faces=caster_faces,
        scope=scope,
        **_hair(t, person, shell, sheet, hung, around, beard),
    )


def _hair(t: Template, person: Person, shell, sheet, hung, around, beard) -> dict[str, Tensor]:
    """The fields of Meshes about hair. shell [B,N,3] and hung [B,R*C,3] posed, sheet [B,R*C,3] canonical."""
    b = len(person)
    hair = torch.cat([shell, hung], 1)
    q = torch.cat([t.q[t.shell].expand(b, -1, -1), sheet], 1)
    hanging = torch.cat([around.new_zeros(b, len(t.shell), 4), around], 1)
    beard = torch.cat([beard.expand(b, -1), beard.new_zeros(b, sheet.shape[1])], 1)
    alive = (growth(q, beard, hanging[..., 2], person) > -0.15)[:, t.shell_faces].any(-1)
    faces, veil = _living(t.shell_faces, alive & ~t.veil), _living(t.shell_faces, alive & t.veil)
    normals = raster.vertex_normals(hair, torch.cat([faces, veil], 1))
    return dict(
        hair=hair,
        hair_normals=normals,
        hair_faces=faces,
        veil_faces=veil,
        hair_q=q,
        hanging=hanging,
        beard=beard,
    )


def _casters(t: Template, person: Person, head, body, shell, sheet, hung, around):
    """What throws shadows, coarser than what is seen, and of the hair only what is dense.

    Returns vertices [B,C,3], faces [B,G,3] and the scope of the depth maps.
    """
    b = len(person)
    coarse = torch.stack([torch.sparse.mm(t.coarse, h) for h in head])
    both = torch.cat([shell, t.q[t.shell].expand(b, -1, -1)], 2)
    tuft, tuft_q = torch.stack([torch.sparse.mm(t.tuft, h) for h in both]).split(3, 2)
    beard = torch.sparse.mm(t.tuft, t.head.masks["beard"][t.shell][:, None])[:, 0]
    beard = torch.cat([beard.expand(b, -1), around.new_zeros(b, sheet.shape[1])], 1)
    hanging = torch.cat([tuft.new_zeros(b, tuft.shape[1]), around[..., 2]], 1)
    dense = (growth(torch.cat([tuft_q, sheet], 1), beard, hanging, person) > 0.08)[:, t.tuft_faces].all(-1)
    body_faces = grid_faces(*BUST, coarse.shape[1], closed=True).to(t.coarse_faces)
    fixed = torch.cat([t.coarse_faces, body_faces]).expand(b, -1, -1)
    faces = torch.cat([fixed, _living(t.tuft_faces + coarse.shape[1] + body.shape[1], dense)], 1)
    return torch.cat([coarse, body, tuft, hung], 1), faces, _scope(coarse[:, t.coarse_high], tuft)


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
