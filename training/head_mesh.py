"""The open head's mesh: which ICT-FaceKit vertices it keeps, its triangles and its texture atlas.

Nothing here touches a file. `training.head` calls `build_mesh` and `atlas`.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass

import numpy as np
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

# Vertices each hidden part keeps (the border to the skin always stays).
BUDGET = {"mouth": 260, "socket": 70, "gums": 240, "teeth": 300, "eyeball": 190}


@dataclass(frozen=True)
class Mesh:
    """index [V]: vertices of the full model; faces [F,3]: rows of index; part [V], face_part [F]: names.

    Pockets share the border vertices of the skin: those belong to "skin".
    """

    index: np.ndarray
    faces: np.ndarray
    part: np.ndarray
    face_part: np.ndarray


def border(faces: np.ndarray) -> np.ndarray:
    """Vertices on an edge that has only one triangle."""
    e = np.sort(np.concatenate([faces[:, [0, 1]], faces[:, [1, 2]], faces[:, [2, 0]]]), 1)
    edges, count = np.unique(e, axis=0, return_counts=True)
    return np.unique(edges[count == 1])


def _quadrics(points: np.ndarray, faces: np.ndarray) -> np.ndarray:
    a, b, c = points[faces].transpose(1, 0, 2)
    n = np.cross(b - a, c - a)
    area = np.linalg.norm(n, axis=1, keepdims=True) + 1e-12
    p = np.concatenate([n / area, -(n / area * a).sum(1, keepdims=True)], 1)
    q = p[:, :, None] * p[:, None] * area[:, :, None]
    out = np.zeros((len(points), 4, 4))
    for k in range(3):
        np.add.at(out, faces[:, k], q)
    return out


def decimate(points: np.ndarray, faces: np.ndarray, target: int) -> tuple[np.ndarray, np.ndarray]:
    """Quadric edge collapse onto existing vertices (Garland and Heckbert 1997, half-edge variant).

    Border vertices stay. Returns kept vertices [N] and their triangles [F,3] (numbers of the input).
    """
    fixed = set(border(faces).tolist())
    q = _quadrics(points, faces)
    tris = {i: tuple(t) for i, t in enumerate(faces.tolist())}
    of = {v: set() for v in np.unique(faces).tolist()}
    for i, t in tris.items():
        for v in t:
            of[v].add(i)
    stamp = dict.fromkeys(of, 0)
    heap: list = []

    def neighbours(v):
        return {w for i in of[v] for w in tris[i]} - {v}

    def push(v):
        for w in neighbours(v):
            for a, b in ((v, w), (w, v)):
                if a not in fixed:
                    h = np.append(points[b], 1)
                    short = 1e-4 * ((points[a] - points[b]) ** 2).sum()
                    heapq.heappush(heap, (h @ (q[a] + q[b]) @ h + short, a, b, stamp[a], stamp[b]))

    def normal(t):
        a, b, c = points[list(t)]
        return np.cross(b - a, c - a)

    def allowed(a, b):
        if len(neighbours(a) & neighbours(b)) != 2:
            return False
        for i in of[a] - of[b]:
            old, new = normal(tris[i]), normal([b if v == a else v for v in tris[i]])
            if old @ new < 0.2 * np.linalg.norm(old) * np.linalg.norm(new) or new @ new < 1e-12:
                return False
        return True

    for v in of:
        push(v)
    while len(of) > target and heap:
        _, a, b, sa, sb = heapq.heappop(heap)
        if stamp.get(a) != sa or stamp.get(b) != sb or b not in neighbours(a) or not allowed(a, b):
            continue
        for i in of.pop(a):
            if b in tris[i]:
                for v in tris.pop(i):
                    if v != a:
                        of[v].discard(i)
            else:
                tris[i] = tuple(b if v == a else v for v in tris[i])
                of[b].add(i)
        q[b] += q[a]
        del stamp[a]
        stamp[b] += 1
        push(b)
    return np.array(sorted(of)), np.array(list(tris.values()))


def components(faces: np.ndarray) -> np.ndarray:
    """Connected component of each triangle."""
    n = faces.max() + 1
    e = np.concatenate([faces[:, :2], faces[:, 1:]])
    _, label = connected_components(coo_matrix((np.ones(len(e)), (e[:, 0], e[:, 1])), (n, n)), False)
    return label[faces[:, 0]]


def _front(points: np.ndarray, faces: np.ndarray, z: float) -> np.ndarray:
    """Triangles of the components that reach in front of z: molars are never seen."""
    label = components(faces)
    keep = [k for k in np.unique(label) if points[faces[label == k]].reshape(-1, 3)[:, 2].max() > z]
    return faces[np.isin(label, keep)]


def _outside(points: np.ndarray, faces: np.ndarray) -> np.ndarray:
    """Triangles of the teeth that do not face the tongue."""
    a, b, c = points[faces].transpose(1, 0, 2)
    n = np.cross(b - a, c - a)
    outward = (a + b + c) / 3 - [0, 0, 6.5]
    outward[:, 1] = 0
    cosine = (n * outward).sum(1) / (np.linalg.norm(n, axis=1) * np.linalg.norm(outward, axis=1) + 1e-12)
    return faces[cosine > -0.3]


def build_mesh(ict: dict[str, np.ndarray], skin: np.ndarray, skin_faces: np.ndarray) -> Mesh:
    """Decimated skin, eyeballs, eye sockets, mouth pocket, gums, tongue and teeth as one mesh.

    ict: arrays of ict_facekit.safetensors; skin [N] and skin_faces [F,3], vertices of the full model: a
    decimation that keeps the skin's borders. Pockets are welded to the lips and lids, only the neck is open.
    """
    points, tris, ranges = ict["neutral"], ict["triangles"], ict["part_ranges"]
    sub = ict["subpart_ranges"]

    def part(table, i):
        return tris[table[i, 4] : table[i, 5]]

    todo = [
        ("mouth", part(ranges, 2), BUDGET["mouth"]),
        ("socket", part(ranges, 3), BUDGET["socket"]),
        ("socket", part(ranges, 4), BUDGET["socket"]),
        ("gums", part(ranges, 5), BUDGET["gums"]),
        ("teeth_upper", _outside(points, _front(points, part(sub, 5), 7.5)), BUDGET["teeth"]),
        ("teeth_lower", _outside(points, _front(points, part(sub, 6), 7.5)), BUDGET["teeth"]),
        ("eye_left", part(sub, 1), BUDGET["eyeball"]),
        ("eye_right", part(sub, 3), BUDGET["eyeball"]),
    ]
    faces, names = [skin_faces], dict.fromkeys(skin.tolist(), "skin")
    face_names = ["skin"] * len(skin_faces)
    for name, t, budget in todo:
        kept, f = decimate(points, t, budget)
        faces.append(f)
        face_names += [name] * len(f)
        for v in kept.tolist():
            names.setdefault(v, name)
    index = np.array(list(names))
    row = np.full(len(points), -1)
    row[index] = np.arange(len(index))
    return Mesh(index, row[np.concatenate(faces)], np.array(list(names.values())), np.array(face_names))


def rasterize_uv(uv: np.ndarray, uv_faces: np.ndarray, values: np.ndarray, size: int) -> np.ndarray:
    """Interpolate per-corner values [F,3,D] over a texture [size,size,D]; NaN where empty. Row 0 is v = 1."""
    out = np.full((size, size, values.shape[-1]), np.nan)
    xy = np.stack([uv[:, 0] * size - 0.5, (1 - uv[:, 1]) * size - 0.5], 1)
    for t, val in zip(xy[uv_faces], values):
        lo, hi = np.floor(t.min(0)).astype(int), np.ceil(t.max(0)).astype(int)
        lo, hi = np.maximum(lo, 0), np.minimum(hi, size - 1)
        gx, gy = np.meshgrid(np.arange(lo[0], hi[0] + 1), np.arange(lo[1], hi[1] + 1))
        m = np.array([t[1] - t[0], t[2] - t[0]]).T
        det = m[0, 0] * m[1, 1] - m[0, 1] * m[1, 0]
        if abs(det) < 1e-12 or gx.size == 0:
            continue
        dx, dy = gx - t[0, 0], gy - t[0, 1]
        b = (m[1, 1] * dx - m[0, 1] * dy) / det
        c = (m[0, 0] * dy - m[1, 0] * dx) / det
        inside = (b >= -1e-6) & (c >= -1e-6) & (b + c <= 1 + 1e-6)
        w = np.stack([1 - b - c, b, c], -1)[inside]
        out[gy[inside], gx[inside]] = w @ val
    return out


def _warp(x: np.ndarray, knots: np.ndarray, density: np.ndarray) -> np.ndarray:
    """Monotone map of x to 0..1 that gives more room where the density is high."""
    total = np.concatenate([[0], np.cumsum((density[1:] + density[:-1]) / 2 * np.diff(knots))])
    return np.interp(x, knots, total / total[-1])


AXIS_Z = 2.0  # cm: the upright axis of the unwrapping passes through (0, ., 2)
STRIP = 0.155  # height of the strip of small tiles below the head
TILES = {  # left edge and width of each
    "eye_left": (0.004, 0.15),
    "eye_right": (0.166, 0.15),
    "teeth_upper": (0.33, 0.12),
    "teeth_lower": (0.464, 0.12),
    "gums": (0.598, 0.12),
    "mouth": (0.732, 0.12),
    "socket": (0.866, 0.055),
    "nostril": (0.936, 0.055),
}


def _eye_disc(d: np.ndarray) -> np.ndarray:
    """Eyeball directions [F,3,3] -> 0..1: a disc seen from the front, the inner 60 degrees enlarged."""
    angle = np.arccos(np.clip(d[..., 2] / np.linalg.norm(d, axis=-1), -1, 1))
    r = np.interp(angle, np.deg2rad([0, 60, 180]), [0, 0.75, 1])
    r = r / np.maximum(np.linalg.norm(d[..., :2], axis=-1), 1e-9)
    q = 0.5 + 0.5 * d[..., :2] * r[..., None]
    back = angle.max(1) > np.deg2rad(145)  # these would cut across the disc
    q[back] = (1.0, 0.5)
    return q


def atlas(mesh: Mesh, points: np.ndarray, eye_centre: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """One texture: the head unrolled around an upright axis with its seam at the back and the face enlarged;
    small tiles for eyes (seen from the front), teeth and mouth. points [V,3] in centimetres.
    Returns uv [T,2] (v up) and uv_faces [F,3].
    """
    corner = np.zeros((*mesh.faces.shape, 2))
    p = points[mesh.faces]
    part = mesh.face_part
    theta = np.arctan2(p[..., 0], p[..., 2] - AXIS_Z)
    wrapped = np.ptp(theta, axis=1, keepdims=True) > np.pi
    theta = np.where(wrapped & (theta < 0), np.pi, theta)
    t = np.linspace(-np.pi, np.pi, 721)
    u = _warp(theta, t, 0.25 + 0.75 / (1 + np.exp((np.abs(t) - np.deg2rad(78)) / 0.2)))
    y = np.linspace(points[:, 1].min() - 0.1, points[:, 1].max() + 0.1, 721)
    v = _warp(p[..., 1], y, 0.3 + 0.7 / (1 + np.exp((np.abs(y - 0.5) - 9) / 0.8)))
    skin = part == "skin"
    corner[skin] = np.stack([0.004 + 0.992 * u, STRIP + (0.996 - STRIP) * v], -1)[skin]
    for name, (left, width) in TILES.items():
        f = part == name
        if name.startswith("eye"):
            q = _eye_disc(p[f] - eye_centre[int(name == "eye_right")])
        else:  # depth and height: what is deeper in the mouth is darker, left and right are alike
            lo, hi = p[f].reshape(-1, 3).min(0), p[f].reshape(-1, 3).max(0)
            q = ((p[f] - lo) / (hi - lo))[..., [2, 1]]
        corner[f] = np.stack([left + q[..., 0] * width, 0.006 + q[..., 1] * (STRIP - 0.02)], -1)
    keys = np.concatenate([mesh.faces.reshape(-1, 1), np.round(corner.reshape(-1, 2) * 1e5)], 1)
    _, first, inverse = np.unique(keys, axis=0, return_index=True, return_inverse=True)
    return corner.reshape(-1, 2)[first].astype(np.float32), inverse.reshape(-1, 3)
