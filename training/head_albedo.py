"""Masks and the fixed maps of the open head's procedural albedo, drawn on the texture atlas."""

from __future__ import annotations

import numpy as np
import torch
from matplotlib.path import Path as Polygon
from scipy.interpolate import CubicSpline
from scipy.ndimage import distance_transform_edt, gaussian_filter
from scipy.spatial import cKDTree

from rig_core import raster, sh
from training.head_mesh import AXIS_Z, STRIP, Mesh, rasterize_uv

SIZE = 256
SKIN_ROWS = round(SIZE * (1 - STRIP)) + 1
EYES = ("eye_left", "eye_right")
IRIS, PUPIL = np.deg2rad([23.0, 9.0])
KINDS = {
    n: i
    for i, n in enumerate(["skin", "nostril", "socket", "mouth", "gums", "teeth_upper", "teeth_lower", *EYES])
}


def smoothstep(x, lo, hi):
    t = np.clip((x - lo) / (hi - lo), 0, 1)
    return t * t * (3 - 2 * t)


def _curve(points: np.ndarray, closed: bool, n: int = 200) -> np.ndarray:
    p = np.concatenate([points, points[:1]]) if closed else points
    t = np.concatenate([[0], np.cumsum(np.linalg.norm(np.diff(p, axis=0), axis=1))])
    return CubicSpline(t, p, bc_type="periodic" if closed else "natural")(np.linspace(0, t[-1], n))


def _lips(p: np.ndarray, marks: np.ndarray) -> np.ndarray:
    outer = _curve(marks[48:60, :2], True)
    inside = Polygon(outer).contains_points(p[..., :2].reshape(-1, 2)).reshape(p.shape[:-1])
    gap = cKDTree(outer).query(p[..., :2])[0]
    return smoothstep(np.where(inside, gap, -gap), -0.08, 0.12) * smoothstep(p[..., 2], 7.5, 8.5)


def _brows(p: np.ndarray, marks: np.ndarray) -> np.ndarray:
    out = np.zeros(p.shape[:-1])
    for side in (marks[17:22], marks[22:27][::-1]):
        line = _curve(side + [0, 0.12, 0], False, 60)
        half = np.interp(np.linspace(0, 1, 60), [0, 0.15, 0.6, 1], [0.12, 0.28, 0.42, 0.34])
        d = np.linalg.norm(p[..., None, :] - line, axis=-1) / half
        out = np.maximum(out, 1 - smoothstep(d.min(-1), 0.5, 1.3))
    return out * (p[..., 2] > 7)


def regions(p: np.ndarray, marks: np.ndarray) -> dict[str, np.ndarray]:
    """Soft regions 0..1 of skin points p [...,3] (cm) of a face with the landmarks marks [68,3].

    "hairline" is not 0..1: it is the height in cm above the line where hair begins.
    """
    x, y, z = p[..., 0], p[..., 1], p[..., 2]
    theta = np.abs(np.rad2deg(np.arctan2(x, z - AXIS_Z)))

    def height(*knots):  # a line around the head: angle from the front in degrees, height in cm
        return np.interp(theta, *np.array(knots, float).T)

    def blob(cx, cy, cz, rx, ry, rz):
        return np.exp(-(((np.abs(x) - cx) / rx) ** 2 + ((y - cy) / ry) ** 2 + ((z - cz) / rz) ** 2))

    forehead = ((0, 11.5), (22, 11.7), (38, 10.9), (50, 9.3), (58, 7.6), (66, 5.8), (70, 3.4))
    ear = ((75, 2.2), (82, 2.3), (88, 4.5), (100, 4.3), (108, 1.0), (118, -4.5), (180, -7.0))
    jaw = height((0, -8.4), (45, -7.2), (80, -5.5), (100, -6.0), (180, -7.0))
    beard_on = height((0, 1.3), (20, 1.4), (45, 3.2), (70, 0.5), (80, -3.0))
    beard_full = height((0, 2.2), (20, 2.6), (45, 4.6), (70, 2.5), (80, 0.5))
    oval = ((y - 1.5) / 3.5) ** 2 + ((z - 0.9) / 2.7) ** 2
    lips = _lips(p, marks)
    beard = (
        smoothstep(-y, beard_on, beard_full) * (1 - smoothstep(theta, 76, 84)) * smoothstep(y, -11.5, -8.5)
    )
    flush = (
        blob(4.2, -0.2, 9, 1.9, 1.9, 4)
        + 0.3 * blob(0, -6.3, 11, 1.6, 1, 3)
        + 0.8 * blob(0, 0.2, 12.6, 1.5, 1.1, 1.8)
    )
    return {
        "lips": lips,
        "brows": _brows(p, marks),
        "hairline": y - height(*forehead, *ear),
        "neck": 1 - smoothstep(y - jaw, -0.8, 0.4),
        "beard": beard * (1 - lips),
        "flush": flush,
        "sockets": 0.7 * blob(2.9, 3.5, 9.3, 1.9, 0.9, 2) + 0.6 * blob(2.3, 2.2, 9.3, 1.3, 0.6, 2),
        "ears": (1 - smoothstep(oval, 0.85, 1.1)) * smoothstep(np.abs(x), 6.9, 7.4),
    }


def vertex_masks(
    mesh: Mesh, points: np.ndarray, marks: np.ndarray, eye_centre: np.ndarray
) -> dict[str, np.ndarray]:
    """Masks [V] 0..1 by name."""
    skin = (mesh.part == "skin").astype(float)
    soft = regions(points, marks)
    angle = np.full(len(points), np.pi)
    for name, c in zip(EYES, eye_centre, strict=True):
        d = points[mesh.part == name] - c
        angle[mesh.part == name] = np.arccos(np.clip(d[:, 2] / np.linalg.norm(d, axis=1), -1, 1))
    ears = skin * soft["ears"]
    scalp = skin * smoothstep(soft["hairline"], -0.6, 0.7) * (1 - ears)
    return {
        "skin": skin * (1 - scalp),
        "face": skin * (mesh.index < 6706),
        "lips": skin * soft["lips"],
        "brows": skin * soft["brows"],
        "scalp": scalp,
        "neck": skin * soft["neck"],
        "ears": ears,
        "beard": skin * soft["beard"],
        "eyes": np.isin(mesh.part, EYES).astype(float),
        "iris": (angle < IRIS + 0.02).astype(float),
        "pupil": (angle < PUPIL).astype(float),
        "mouth": np.isin(mesh.part, ["mouth", "gums"]).astype(float),
        "teeth": np.isin(mesh.part, ["teeth_upper", "teeth_lower"]).astype(float),
    }


def _fill(texture: np.ndarray) -> np.ndarray:
    """Give empty texels the value of the nearest drawn one."""
    empty = np.isnan(texture[..., 0])
    nearest = distance_transform_edt(empty, return_distances=False, return_indices=True)
    return texture[tuple(nearest)]


def _lines(marks: np.ndarray, p: np.ndarray) -> dict[str, np.ndarray]:
    """Distance (cm) of points p to the upper lids, the lower lids and the seam of the lips."""
    curves = {
        "upper": [marks[36:40], marks[42:46]],
        "lower": [marks[[39, 40, 41, 36]], marks[[45, 46, 47, 42]]],
        "seam": [marks[60:65], marks[[64, 65, 66, 67, 60]]],
    }
    return {k: cKDTree(np.concatenate([_curve(c, False) for c in v])).query(p)[0] for k, v in curves.items()}


def openness(points: np.ndarray, faces: np.ndarray, directions: int = 160) -> np.ndarray:
    """Share of the cosine-weighted hemisphere [V] that each vertex sees, by depth maps from all sides."""
    v, f = torch.from_numpy(points).float(), torch.from_numpy(np.ascontiguousarray(faces))
    v = (v - v.mean(0)) / (v - v.mean(0)).norm(dim=1).max()
    normal = raster.vertex_normals(v[None], f)[0]
    seen, total = torch.zeros(len(v)), torch.zeros(len(v))
    for d in sh.fibonacci(directions).float():
        x = torch.nn.functional.normalize(torch.linalg.cross(d, torch.tensor([0.31, 0.87, 0.41])), dim=0)
        p = v @ torch.stack([x, torch.linalg.cross(d, x), -d], 1) + torch.tensor([0.0, 0.0, 2.0])
        depth = raster.rasterize(p[None], f, (512, 512)).zbuf[0]
        px = ((p[:, :2] + 1) * 256 - 0.5).round().long().clamp(0, 511)
        near = depth[px[:, 1], px[:, 0]]
        cosine = (normal @ d).clamp_min(0)
        total += cosine
        seen += cosine * ((near < 0) | (p[:, 2] < near + 0.012))
    return (seen / total).numpy()


def mark_nostrils(mesh: Mesh, points: np.ndarray, openness: np.ndarray) -> None:
    """Name the faces inside the nostrils: in the atlas they would lie below the wings of the nose."""
    p, dark = points[mesh.faces], (openness[mesh.faces] < 0.2).all(1)
    inside = (np.abs(p[..., 0]) < 1.5) & (p[..., 1] > -1.6) & (p[..., 1] < 1.5) & (p[..., 2] > 9.5)
    mesh.face_part[dark & inside.all(1) & (mesh.face_part == "skin")] = "nostril"


def skin_maps(marks: np.ndarray, p: np.ndarray, openness: np.ndarray):
    """Where pigments, blood and hair are; p [h,w,3] the points of the texels, openness [h,w]."""
    rng = np.random.default_rng(7)

    def noise(*sigmas):
        n = sum(
            gaussian_filter(rng.standard_normal(p.shape[:2]), s, mode="wrap") * np.mean(s) for s in sigmas
        )
        return n / n.std()

    soft, line = regions(p, marks), _lines(marks, p)
    maps = {k: soft[k] for k in ("lips", "beard", "sockets")}
    maps["flush"] = soft["flush"] + 0.5 * soft["ears"]
    strands = noise((3.0, 0.6), (1.2, 0.5))
    maps["scalp"] = smoothstep(soft["hairline"] + 0.3 * strands, -0.8, 0.9) * (1 - soft["ears"])
    maps["brows"] = soft["brows"] * (0.9 + 0.06 * noise((0.5, 1.2)))
    maps["mottle"] = 0.5 + 0.16 * noise(1.2, 3, 7)
    maps["strands"] = 0.5 + 0.16 * strands
    lower = 0.35 * (1 - smoothstep(line["lower"], 0.03, 0.12))
    maps["lashes"] = np.maximum(1 - smoothstep(line["upper"], 0.05, 0.17), lower)
    maps["cavity"] = (1 - smoothstep(openness, 0.06, 0.4)) * (1 - soft["neck"])
    maps["cavity"] = np.maximum(maps["cavity"], 0.7 * (1 - smoothstep(line["seam"], 0.0, 0.15)))
    return maps


def inner_maps(p: np.ndarray, part: np.ndarray, eye_centre: np.ndarray) -> dict[str, np.ndarray]:
    """Fixed colours [3,h,w] of eyes, teeth and mouth, and where the iris' colour is added [h,w]."""
    angle, up = np.full(part.shape, np.pi), np.zeros(part.shape)
    for name, c in zip(EYES, eye_centre, strict=True):
        here = part == KINDS[name]
        d = (p - c) / np.linalg.norm(p - c, axis=-1, keepdims=True)
        angle = np.where(here, np.arccos(np.clip(d[..., 2], -1, 1)), angle)
        up = np.where(here, d[..., 1], up)
    eye = part >= KINDS[EYES[0]]
    iris = 1 - smoothstep(angle, IRIS - 0.04, IRIS + 0.05)
    pupil = 1 - smoothstep(angle, PUPIL - 0.05, PUPIL + 0.05)
    shade = 1 - 0.6 * np.exp(-(((angle - IRIS) / 0.07) ** 2))  # the dark rim of the iris
    shade *= 1 - 0.28 * smoothstep(up, 0.05, 0.42)  # and the shadow of the upper lid
    depth = smoothstep(p[..., 2], 4.5, 10.3)[..., None]  # little light arrives deep in the mouth
    fixed = np.zeros(p.shape)
    fixed[:] = (0.42, 0.24, 0.21)  # lid pockets
    fixed[part == KINDS["nostril"]] = (0.17, 0.075, 0.065)
    for names, colour, least in (
        (("mouth", "gums"), (0.52, 0.22, 0.21), 0.12),
        (("teeth_upper", "teeth_lower"), (0.78, 0.73, 0.645), 0.30),
    ):
        where = np.isin(part, [KINDS[n] for n in names])
        fixed[where] = (np.array(colour) * (least + (1 - least) * depth))[where]
    blood = smoothstep(angle, 0.55, 1.1)[..., None] * [0.08, 0.20, 0.20]
    white = np.array([0.80, 0.775, 0.76]) * (1 - blood) * shade[..., None]
    fixed[eye] = (white * (1 - iris)[..., None] + 0.025 * pupil[..., None])[eye]
    rays = (1 + 0.25 * smoothstep(angle, PUPIL, IRIS)) / 1.25
    return {"fixed": fixed.transpose(2, 0, 1), "iris": iris * (1 - pupil) * shade * rays * eye}


def build(mesh, points, openness, landmarks, eye_centre, uv, uv_faces) -> dict[str, np.ndarray]:
    """Masks `mask.NAME` [V] and maps `map.NAME` as uint8 (255 = 1, row 0 is v = 1).

    points [V,3] of the mean face (cm), openness [V], landmarks [68]: its vertices. Maps of the skin have the
    upper `SKIN_ROWS` of 256 rows, those of eyes, teeth and mouth the rest.
    """
    marks = points[landmarks]
    masks = vertex_masks(mesh, points, marks, eye_centre)
    part = np.array([KINDS[n] for n in mesh.face_part.tolist()])
    values = np.concatenate([points, openness[:, None]], 1)[mesh.faces]
    corners = np.concatenate([values, np.repeat(part[:, None, None], 3, 1)], -1)
    order = np.argsort(points[mesh.faces].mean(1)[:, 2])  # where the atlas folds, the front is seen
    tex = _fill(rasterize_uv(uv, uv_faces[order], corners[order], SIZE))
    upper, lower = tex[:SKIN_ROWS], tex[SKIN_ROWS:]
    maps = skin_maps(marks, upper[..., :3], upper[..., 3])
    maps |= inner_maps(lower[..., :3], np.round(lower[..., 4]).astype(int), eye_centre)
    named = {f"mask.{k}": v for k, v in masks.items()} | {f"map.{k}": v for k, v in maps.items()}
    return {k: np.round(255 * np.clip(v, 0, 1)).astype(np.uint8) for k, v in named.items()}
