"""Masks and the fixed maps of the open head's procedural albedo, drawn on the texture atlas."""

from __future__ import annotations

import numpy as np
from scipy.interpolate import CubicSpline
from scipy.ndimage import distance_transform_edt, gaussian_filter
from matplotlib.path import Path as Polygon

from training.head_mesh import AXIS_Z, Mesh, rasterize_uv

SIZE = 256
IRIS = np.deg2rad(23.0)
PUPIL = np.deg2rad(9.0)


def smoothstep(x, lo, hi):
    t = np.clip((x - lo) / (hi - lo), 0, 1)
    return t * t * (3 - 2 * t)


def _curve(points: np.ndarray, closed: bool, n: int = 200) -> np.ndarray:
    p = np.concatenate([points, points[:1]]) if closed else points
    t = np.concatenate([[0], np.cumsum(np.linalg.norm(np.diff(p, axis=0), axis=1))])
    return CubicSpline(t, p, bc_type="periodic" if closed else "natural")(np.linspace(0, t[-1], n))


def regions(p: np.ndarray, marks: np.ndarray) -> dict[str, np.ndarray]:
    """Soft regions 0..1 of skin points p [...,3] (cm): lips, brows, scalp, neck, beard, cheeks, nose, sockets, nostrils.

    marks [68,3]: the landmarks of the same face.
    """
    x, y, z = p[..., 0], p[..., 1], p[..., 2]
    theta = np.abs(np.rad2deg(np.arctan2(x, z - AXIS_Z)))
    out = {}
    front = smoothstep(z, 7.5, 8.5)
    outer = _curve(marks[48:60, :2], True)
    inside = Polygon(outer).contains_points(p[..., :2].reshape(-1, 2)).reshape(x.shape)
    gap = np.min(np.linalg.norm(p[..., None, :2] - outer[::4], axis=-1), -1)
    out["lips"] = smoothstep(np.where(inside, gap, -gap), -0.08, 0.12) * front
    brow = 0.0
    for side in (marks[17:22], marks[22:27][::-1]):
        line = _curve(side + [0, 0.12, 0], False, 60)
        s = np.linspace(0, 1, 60)
        half = np.interp(s, [0, 0.15, 0.6, 1], [0.12, 0.28, 0.42, 0.34])
        d = np.linalg.norm(p[..., None, :] - line, axis=-1) / half
        brow = np.maximum(brow, 1 - smoothstep(d.min(-1), 0.55, 1.25))
    out["brows"] = brow * front * (z > 7)
    line = np.interp(
        theta,
        [0, 25, 42, 55, 66, 76, 84, 92, 105, 120, 180],
        [10.3, 10.4, 9.8, 8.3, 6.8, 3.5, 3.0, 4.5, 2.0, -5.0, -7.0],
    )
    out["scalp"] = smoothstep(y - line, -0.5, 0.6)
    out["neck"] = 1 - smoothstep(
        y - np.interp(theta, [0, 45, 80, 100, 180], [-8.4, -7.2, -5.5, -6.0, -7.0]), -0.8, 0.4
    )
    beard = smoothstep(
        -y,
        np.interp(theta, [0, 20, 45, 70, 80], [1.3, 1.4, 3.2, 0.5, -3.0]),
        np.interp(theta, [0, 20, 45, 70, 80], [2.2, 2.6, 4.6, 2.5, 0.5]),
    )
    out["beard"] = beard * (1 - smoothstep(theta, 76, 84)) * smoothstep(y, -11.5, -8.5) * (1 - out["lips"])

    def blob(cx, cy, cz, rx, ry, rz):
        return np.exp(-(((np.abs(x) - cx) / rx) ** 2 + ((y - cy) / ry) ** 2 + ((z - cz) / rz) ** 2))

    out["cheeks"] = blob(4.2, -0.2, 9, 1.9, 1.9, 4) + 0.3 * blob(0, -6.3, 11, 1.6, 1.0, 3)
    out["nose"] = blob(0, 0.2, 12.6, 1.5, 1.1, 1.8)
    out["sockets"] = blob(2.9, 3.4, 9.3, 1.9, 1.0, 2) * 0.7 + 0.6 * blob(2.3, 2.2, 9.3, 1.3, 0.6, 2)
    out["nostrils"] = blob(0.62, -0.95, 11.4, 0.42, 0.28, 0.7)
    return out


def vertex_masks(
    mesh: Mesh, points: np.ndarray, marks: np.ndarray, eye_centre: np.ndarray
) -> dict[str, np.ndarray]:
    """Masks [V] 0..1 by name."""
    skin = (mesh.part == "skin").astype(np.float64)
    soft = {k: v * skin for k, v in regions(points, marks).items()}
    eye = [mesh.part == "eye_left", mesh.part == "eye_right"]
    angle = np.full(len(points), np.pi)
    for m, c in zip(eye, eye_centre):
        d = points[m] - c
        angle[m] = np.arccos(np.clip(d[:, 2] / np.linalg.norm(d, axis=1), -1, 1))
    ears = (
        skin
        * (mesh.index >= 6706)
        * (mesh.index < 9409)
        * (points[:, 1] > -3.5)
        * smoothstep(np.abs(points[:, 0]), 7.1, 7.6)
        * (points[:, 2] < 3.9)
    )
    return {
        "skin": skin * (1 - soft["scalp"]),
        "face": skin * (mesh.index < 6706),
        "lips": soft["lips"],
        "brows": soft["brows"],
        "scalp": soft["scalp"] * (1 - ears),
        "neck": soft["neck"],
        "ears": ears,
        "beard": soft["beard"],
        "eyes": (eye[0] | eye[1]).astype(float),
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


def build(mesh, points, landmarks, eye_centre, uv, uv_faces) -> dict[str, np.ndarray]:
    """Masks `mask.NAME` [V] uint8 and maps `map.NAME` [256,256] uint8 (255 = 1, row 0 is v = 1)."""
    marks = points[landmarks]
    masks = vertex_masks(mesh, points, marks, eye_centre)
    ears = masks["ears"]
    values = np.concatenate([points, ears[:, None]], 1)[mesh.faces]
    kind = {
        n: i
        for i, n in enumerate(
            ["skin", "socket", "mouth", "gums", "teeth_upper", "teeth_lower", "eye_left", "eye_right"]
        )
    }
    part = np.max([[kind[n] for n in mesh.part[mesh.faces[:, k]]] for k in range(3)], 0)
    corner_part = np.repeat(part[:, None, None], 3, 1).astype(float)
    tex = _fill(rasterize_uv(uv, uv_faces, np.concatenate([values, corner_part], -1), SIZE))
    p, ear, part = tex[..., :3], tex[..., 3], np.round(tex[..., 4]).astype(int)
    skin = part == kind["skin"]
    soft = {k: v * skin for k, v in regions(p, marks).items()}
    soft["scalp"] = soft["scalp"] * (1 - ear)
    maps = {
        k: soft[k]
        for k in ("lips", "brows", "scalp", "neck", "beard", "cheeks", "nose", "sockets", "nostrils")
    }
    maps["ears"] = ear * skin
    angle = np.full(skin.shape, np.pi)
    for i, name in enumerate(("eye_left", "eye_right")):
        d = p - eye_centre[i]
        a = np.arccos(np.clip(d[..., 2] / np.linalg.norm(d, axis=-1), -1, 1))
        angle = np.where(part == kind[name], a, angle)
    eye = part >= kind["eye_left"]
    maps["eyes"] = eye
    maps["iris"] = 1 - smoothstep(angle, IRIS - 0.05, IRIS + 0.05)
    maps["limbus"] = np.exp(-(((angle - IRIS) / 0.07) ** 2)) * eye
    maps["pupil"] = 1 - smoothstep(angle, PUPIL - 0.04, PUPIL + 0.04)
    maps["teeth"] = (part == kind["teeth_upper"]) | (part == kind["teeth_lower"])
    maps["mouth"] = (part == kind["mouth"]) | (part == kind["gums"])
    depth = smoothstep(p[..., 2], 4.0, 10.5)
    maps["depth"] = np.where(skin | eye, 1.0, depth)
    maps["socket"] = part == kind["socket"]
    maps["skin"] = skin
    rng = np.random.default_rng(7)
    mottle = sum(gaussian_filter(rng.standard_normal((SIZE, SIZE)), s, mode="wrap") * s for s in (1.2, 3, 7))
    maps["mottle"] = np.where(skin, 0.5 + 0.16 * mottle / mottle.std(), 0.5)
    out = {f"mask.{k}": np.round(255 * v.clip(0, 1)).astype(np.uint8) for k, v in masks.items()}
    return out | {
        f"map.{k}": np.round(255 * np.asarray(v, float).clip(0, 1)).astype(np.uint8) for k, v in maps.items()
    }
