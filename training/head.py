"""Build the open head: `python -m training.head --ict FOLDER` writes rig_core/assets/open_head.safetensors.

FOLDER holds ict_facekit.safetensors and skin_lod.npz (ICT-FaceKit, MIT licence, repacked). The head keeps
some 6500 of its vertices; identity and expression modes are estimated anew by PCA on sampled faces.
Deterministic by --seed.

`python -m training.head --light-prior CODES` only replaces the light prior in the asset by the mean and
standard deviation of the tensor `light` [N,9,3] in CODES. Building the head anew sets a provisional one.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

import numpy as np
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from scipy.spatial import cKDTree

from training import head_albedo, head_mesh

ASSET = Path(__file__).parent.parent / "rig_core" / "assets" / "open_head.safetensors"
CM = 0.01
PIVOT = np.array([0.0, -1.0, 1.0])  # cm: the head turns about this point between the ears, slightly low
GAZE = np.deg2rad([25.0, 30.0, 35.0, 35.0])  # the eye's turn at which the lids have the full eyeLook shapes
NOTICE = "Derived from ICT-FaceKit (https://github.com/ICT-VGL/ICT-FaceKit), commit da5f95a6. "


def pca(x: np.ndarray, weight: np.ndarray, share: float, most: int) -> tuple[np.ndarray, np.ndarray]:
    """Uncentred PCA of offsets x [N,V,3] with vertex weights [V]: modes [K,V,3], unit-variance coefficients.

    Returns the modes, as many as carry `share` of the weighted variance, and the cumulative share of all.
    The part of the mesh without weight follows by regression on the coefficients.
    """
    n = len(x)
    y = (x * np.sqrt(weight)[:, None]).reshape(n, -1)
    value, vector = np.linalg.eigh((y @ y.T).astype(np.float64))
    value, vector = value[::-1].clip(0), vector[:, ::-1]
    total = np.cumsum(value) / value.sum()
    k = min(int(np.searchsorted(total, share)) + 1, most)
    modes = np.einsum("nk,nd->kd", vector[:, :k], x.reshape(n, -1)) / np.sqrt(n)
    modes *= np.sign((modes * np.repeat(weight, 3)).sum(1, keepdims=True))
    return modes.reshape(k, *x.shape[1:]).astype(np.float32), total


def identity_modes(base, identity, weight, rng, count=1200):
    """Shapes of sampled identities, brought to one position and size of the face, and their PCA."""
    a = rng.standard_normal((count, len(identity))).astype(np.float32)
    x = base + np.einsum("nk,kvd->nvd", a, identity, optimize=True)
    w = (weight / weight.sum())[:, None].astype(np.float32)

    def frame(s):
        c = (s * w).sum(-2, keepdims=True)
        return c, np.sqrt((((s - c) ** 2) * w).sum((-2, -1), keepdims=True))

    (c0, s0), (c, s) = frame(base[None]), frame(x)
    x = (x - c) * (s0 / s) + c0
    mean = x.mean(0)
    return mean, *pca(x - mean, weight, 0.99, 100)


def expression_modes(shapes, names, weight, rng, count=1200):
    """PCA of sparse random activations; left and right mostly move together, as in faces."""
    a = (rng.random((count, len(names))) < 0.2) * rng.random((count, len(names)))
    for i, name in enumerate(names):
        if name.endswith("_R"):
            both = rng.random(count) < 0.75
            left = a[:, names.index(name[:-1] + "L")]
            a[both, i] = np.clip(left[both] * (1 + 0.1 * rng.standard_normal(both.sum())), 0, 1)
    x = np.einsum("nk,kvd->nvd", a.astype(np.float32), shapes, optimize=True)
    modes, _ = pca(x, weight, 1 - 1e-7, len(names))
    w = np.repeat(np.sqrt(weight), 3)
    coefficients = np.linalg.lstsq(
        (modes.reshape(len(modes), -1) * w).T, (shapes.reshape(len(names), -1) * w).T, rcond=None
    )[0]
    return modes, coefficients.T.astype(np.float32)


def jaw_skin(points, opened, part, pivot, axis, angle):
    """Skinning weight [V] of the jaw's hinge and what the weight leaves over [V,3] at the full angle."""
    k = np.cross(np.eye(3), axis)
    k = np.array([[0, -axis[2], axis[1]], [axis[2], 0, -axis[0]], [-axis[1], axis[0], 0]])
    turn = np.eye(3) + np.sin(angle) * k + (1 - np.cos(angle)) * k @ k
    ideal = (points - pivot) @ (turn - np.eye(3)).T
    w = (opened * ideal).sum(1) / ((ideal**2).sum(1) + 1e-3)
    w = w.clip(0, 1)
    w[part == "teeth_lower"] = 1
    w[np.isin(part, ["teeth_upper", "eye_left", "eye_right"])] = 0
    rest = opened - w[:, None] * ideal
    rest[np.isin(part, ["teeth_lower", "teeth_upper", "eye_left", "eye_right"])] = 0
    return w, rest


def strip(points, faces, start, outward, inner, back):
    """Crossings of the skin with the plane through vertex `start` spanned by `outward` (x, y) and z.

    Walks `inner` cm from the landmark towards the face's middle and `back` cm the other way.
    Returns edges [N,2] and the weight of their second vertex [N].
    """
    side = np.array([-outward[1], outward[0], 0.0])
    h = (points - points[start]) @ side + 1e-4
    cut = {}
    for t in faces[np.ptp((h[faces] > 0).astype(int), axis=1) > 0]:
        ends = [
            tuple(sorted((int(t[i]), int(t[j]))))
            for i, j in ((0, 1), (1, 2), (2, 0))
            if (h[t[i]] > 0) != (h[t[j]] > 0)
        ]
        for a, b in (ends, ends[::-1]):
            cut.setdefault(a, []).append(b)

    def at(e):
        w = h[e[0]] / (h[e[0]] - h[e[1]])
        return (1 - w) * points[e[0]] + w * points[e[1]], w

    first = min((e for e in cut if start in e), key=lambda e: np.linalg.norm(at(e)[0] - points[start]))
    path = [first]
    ways = sorted(cut[first], key=lambda e: -at(e)[0][2])  # towards the viewer first: that is inward
    for direction, limit in zip(ways, (inner, back)):
        last, e, length = first, direction, 0.0
        while True:
            length += np.linalg.norm(at(e)[0] - at(last)[0])
            if length > limit:
                break
            path.append(e)
            following = [n for n in cut[e] if n not in path]
            if not following:
                break
            last, e = e, following[0]
    return np.array(path), np.array([at(e)[1] for e in path])


def contour_strips(points, faces, landmarks, size=24):
    """Candidates for the 17 contour landmarks: edges [17,size,2], weights [17,size], outward [17,2]."""
    edges, weights = np.zeros((17, size, 2), np.int64), np.zeros((17, size), np.float32)
    angle = np.pi + np.pi * np.interp(np.arange(17), [0, 4, 8, 12, 16], [0, 0.12, 0.5, 0.88, 1])
    outward = np.stack([np.cos(angle), np.sin(angle)], 1)
    inner = (6.0, 6.0, 6.0, 5.5, 4.5, 3.5, 2.5, 1.5, 1.2)
    for i in range(17):
        back = 0.0 if i < 2 or i > 14 else 0.8 if 5 < i < 11 else 1.2
        e, w = strip(points, faces, landmarks[i], outward[i], inner[min(i, 16 - i)], back)
        pick = np.round(np.linspace(0, len(e) - 1, size)).astype(int)
        edges[i], weights[i] = e[pick], w[pick]
    return edges, weights, outward.astype(np.float32)


def close_lips(points, mesh, marks, reach=0.4) -> None:
    """Bring the lips together at rest: the scans' neutral face shows a slit of 0.8 mm. marks [68,3]."""
    upper, lower = marks[60:65], marks[[60, 67, 66, 65, 64]]
    x = np.linspace(upper[0, 0], upper[-1, 0], 200)
    top, bottom = (np.stack([np.interp(x, m[:, 0], m[:, k]) for k in (1, 2)], 1) for m in (upper, lower))
    seam = np.column_stack([x, (top + bottom) / 2])
    part = np.isin(mesh.part, ["skin", "mouth"])
    distance, nearest = cKDTree(seam).query(points[part])
    half = (top - bottom)[nearest, 0] / 2 + 0.005 * (distance < reach)
    side = np.sign(points[part, 1] - seam[nearest, 1])
    points[part, 1] -= side * half * np.exp(-((distance / reach) ** 2))


def close_teeth(points, mesh, growth=1.08, back=0.08) -> None:
    """Widen each tooth along the arch until neighbours touch (decimation leaves gaps), `back` cm deeper."""
    for name in ("teeth_upper", "teeth_lower"):
        faces = mesh.faces[mesh.face_part == name]
        label = head_mesh.components(faces)
        for k in np.unique(label):
            tooth = np.unique(faces[label == k])
            centre = points[tooth].mean(0)
            along = np.array([centre[2] - 6.5, 0, -centre[0]]) / np.hypot(centre[2] - 6.5, centre[0])
            points[tooth] += (growth - 1) * ((points[tooth] - centre) @ along)[:, None] * along - [0, 0, back]


def load(folder: Path):
    """Arrays of ICT-FaceKit, the names of its expressions, and the head's mesh."""
    ict = load_file(folder / "ict_facekit.safetensors")
    with safe_open(folder / "ict_facekit.safetensors", "np") as f:
        names = json.loads(f.metadata()["expression_names"])
    lod = np.load(folder / "skin_lod.npz")
    return ict, names, head_mesh.build_mesh(ict, lod["v5000"], lod["t5000"])


def face_weight(mesh) -> np.ndarray:
    """1 on the face proper [V]: no ears, neck, scalp or insides."""
    return ((mesh.index < 6706) & (mesh.part == "skin")).astype(np.float64)


def at_rest(ict, mesh, rng):
    """Mean face [V,3] with its mouth shut, shape modes [S,V,3], their share of variance, landmarks [68]."""
    identity = ict["identity"][:, mesh.index].astype(np.float32)
    mean, modes, share = identity_modes(ict["neutral"][mesh.index], identity, face_weight(mesh), rng)
    row = np.full(len(ict["neutral"]), -1)
    row[mesh.index] = np.arange(len(mesh.index))
    landmarks = row[ict["landmarks68"]]
    close_teeth(mean, mesh)
    close_lips(mean, mesh, mean[landmarks])
    return mean, modes, share[len(modes) - 1], landmarks


def motion(ict, mesh, shapes: dict[str, np.ndarray], mean, shape_modes, rng) -> dict[str, np.ndarray]:
    """Expressions, jaw and gaze: tensors of the asset (metres), and "eye_centre" in cm."""
    names = [n for n in shapes if n != "jawOpen" and not n.startswith("eyeLook")]
    # a little weight everywhere, so that hidden parts and the neck are not arbitrary
    modes, expressions = expression_modes(
        np.stack([shapes[n] for n in names]), names, face_weight(mesh) + 0.02, rng
    )
    neutral = ict["neutral"][mesh.index]
    eye = [mesh.part == "eye_left", mesh.part == "eye_right"]
    eye_centre = ict["eye_centre"] + np.stack([(mean - neutral)[e].mean(0) for e in eye])
    near = np.linalg.norm(neutral[:, 1:] - ict["jaw_pivot"][1:], axis=1) < 2.5
    hinge = (mesh.part == "skin") & (np.abs(neutral[:, 0]) > 6) & near  # in front of the ears
    pivot = ict["jaw_pivot"] + (mean - neutral)[hinge].mean(0) * [0, 1, 1]
    angle = float(ict["jaw_open_angle"][0])
    jaw_weight, jaw_rest = jaw_skin(mean, shapes["jawOpen"], mesh.part, pivot, ict["jaw_axis"], angle)
    look = [("Up", "Up"), ("Down", "Down"), ("Out", "In"), ("In", "Out")]
    lids = np.stack([shapes[f"eyeLook{a}_L"] + shapes[f"eyeLook{b}_R"] for a, b in look])
    follow = [shape_modes[:, hinge].mean(1) * [0, 1, 1], *(shape_modes[:, e].mean(1) for e in eye)]
    return dict(
        exp_modes=(modes * CM).astype(np.float16),
        expressions=expressions,
        joints=(np.stack([pivot, *eye_centre]) - PIVOT) * CM,
        joint_modes=np.stack(follow, 1) * CM,
        jaw_weight=jaw_weight,
        jaw_rest=(jaw_rest * CM).astype(np.float16),
        jaw_open_angle=np.array([angle]),
        lid_modes=(lids * CM / GAZE[:, None, None]).astype(np.float16),
        eyes=np.stack(eye).astype(np.uint8),
        eye_centre=eye_centre,
        names=names,
    )


def build(folder: Path, seed: int = 0) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """All tensors and the metadata of the open head."""
    rng = np.random.default_rng(seed)
    ict, names, mesh = load(folder)
    mean, shape_modes, share, landmarks = at_rest(ict, mesh, rng)
    shapes = dict(zip(names, ict["expression"][:, mesh.index].astype(np.float32)))
    tensors = motion(ict, mesh, shapes, mean, shape_modes, rng)
    eye_centre, names = tensors.pop("eye_centre"), tensors.pop("names")
    edges, edge_weight, outward = contour_strips(mean, mesh.faces[mesh.face_part == "skin"], landmarks)
    openness = head_albedo.openness(mean, mesh.faces)
    head_albedo.mark_nostrils(mesh, mean, openness)
    uv, uv_faces = head_mesh.atlas(mesh, mean, eye_centre)
    tensors |= dict(
        template=(mean - PIVOT) * CM,
        shape_modes=(shape_modes * CM).astype(np.float16),
        faces=mesh.faces.astype(np.int16),
        uv=uv,
        uv_faces=uv_faces.astype(np.int16),
        landmark_index=landmarks,
        contour_edges=edges,
        contour_weight=edge_weight,
        contour_outward=outward,
    )
    tensors |= head_albedo.build(mesh, mean, openness, landmarks, eye_centre, uv, uv_faces)
    tensors |= light_prior(default_light())
    report = dict(shape_modes=len(shape_modes), share=round(float(share), 5), exp_modes=len(names))
    meta = dict(
        kind="open_head",
        format="1",
        seed=str(seed),
        expression_names=json.dumps(names),
        report=json.dumps(report),
        licence=NOTICE + (folder / "LICENSE").read_text(),
    )
    tensors = {k: v.astype(np.float32) if v.dtype == np.float64 else v for k, v in tensors.items()}
    return {k: np.ascontiguousarray(v) for k, v in tensors.items()}, meta


def default_light() -> np.ndarray:
    """Provisional lights [4096,9,3], display space: soft, frontal, slightly from above."""
    rng = np.random.default_rng(1)
    mean = np.array([2.7, 0, 0.22, 0.35, 0, 0, 0.05, 0, 0.05])
    std = np.array([0.35, 0.3, 0.2, 0.2, 0.1, 0.15, 0.1, 0.12, 0.1])
    grey = mean + std * rng.standard_normal((4096, 9))
    return (grey[..., None] + 0.05 * rng.standard_normal((4096, 9, 3))).astype(np.float32)


def light_prior(light: np.ndarray) -> dict[str, np.ndarray]:
    """Mean and standard deviation [9,3] of lights [N,9,3]."""
    return dict(light_mean=light.mean(0).astype(np.float32), light_std=light.std(0).astype(np.float32))


def write(tensors: dict[str, np.ndarray], meta: dict[str, str], path: Path = ASSET) -> None:
    """Save the asset as a whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".part")
    save_file(tensors, temporary, meta)
    os.replace(temporary, path)
    print(f"{path.name}: {path.stat().st_size / 2**20:.2f} MB, {meta['report']}")


def update_light(light: np.ndarray, path: Path = ASSET) -> None:
    """Replace the light prior of an asset by that of lights [N,9,3]. ValueError for another shape or NaN."""
    if light.ndim != 3 or light.shape[1:] != (9, 3) or len(light) < 2 or not np.isfinite(light).all():
        raise ValueError(f"lights must be finite [N,9,3] with N > 1, got {light.shape}")
    tensors = load_file(path)
    with safe_open(path, "np") as f:
        meta = f.metadata()
    write(tensors | light_prior(light.astype(np.float64)), meta, path)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--ict", type=Path, help="folder with ict_facekit.safetensors, skin_lod.npz and LICENSE"
    )
    parser.add_argument(
        "--light-prior", type=Path, help="safetensors with `light` [N,9,3]: only update the light prior"
    )
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.ict:
        write(*build(args.ict, args.seed))
    if args.light_prior:
        update_light(load_file(args.light_prior)["light"])
    if not (args.ict or args.light_prior):
        parser.error("nothing to do: give --ict or --light-prior")


if __name__ == "__main__":
    main()
