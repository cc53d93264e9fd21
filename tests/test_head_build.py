"""How the open head is built: PCA, decimation, jaw skinning, strips, atlas raster, light prior."""

import json

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file
from scipy.spatial import ConvexHull

from training import head, head_albedo, head_mesh


def sphere(n=600):
    """Fibonacci sphere of radius 1: points [n,3] and outward triangles."""
    i = np.arange(n) + 0.5
    z, turn = 1 - 2 * i / n, np.pi * (1 + 5**0.5) * i
    p = np.column_stack([np.sqrt(1 - z * z) * np.cos(turn), np.sqrt(1 - z * z) * np.sin(turn), z])
    f = ConvexHull(p).simplices
    a, b, c = p[f].transpose(1, 0, 2)
    inward = (np.cross(b - a, c - a) * a).sum(1) < 0
    f[inward] = f[inward][:, ::-1]
    return p, f


def volume(p, f):
    return np.einsum("ij,ij->i", p[f[:, 0]], np.cross(p[f[:, 1]], p[f[:, 2]])).sum() / 6


def test_pca_recovers_modes_with_unit_variance():
    rng = np.random.default_rng(0)
    true = (
        np.linalg.qr(rng.standard_normal((60, 4)))[0].T.reshape(4, 20, 3)
        * np.array([4, 2, 1, 0.05])[:, None, None]
    )
    x = np.einsum("nk,kvd->nvd", rng.standard_normal((500, 4)), true)
    modes, share = head.pca(x, np.ones(20), 0.99, 10)
    assert len(modes) == 3 and share[2] >= 0.99 > share[1]
    size = np.linalg.norm(modes.reshape(3, -1), axis=1)
    np.testing.assert_allclose(size, [4, 2, 1], rtol=0.12)
    coefficients = np.linalg.lstsq(modes.reshape(3, -1).T, x.reshape(len(x), -1).T, rcond=None)[0]
    np.testing.assert_allclose(np.sqrt((coefficients**2).mean(1)), 1, atol=0.01)


def test_pca_regresses_what_has_no_weight():
    rng = np.random.default_rng(1)
    a = rng.standard_normal((500, 1, 1))
    x = np.concatenate([np.repeat(a, 3, 2), np.repeat(-2 * a, 3, 2)], 1)
    modes, _ = head.pca(x, np.array([1.0, 0.0]), 0.99, 5)
    np.testing.assert_allclose(modes[0, 1], -2 * modes[0, 0], rtol=1e-5)


def test_decimate_keeps_a_sphere_closed():
    p, f = sphere()
    kept, g = head_mesh.decimate(p, f, 150)
    assert len(kept) == 150 and set(np.unique(g)) == set(kept)
    assert len(g) == 2 * 150 - 4  # Euler: a closed sphere
    assert len(head_mesh.border(g)) == 0
    assert volume(p, g) > 0.93 * volume(p, f) > 0


def test_decimate_keeps_borders():
    p, f = sphere()
    open_ = f[(p[f][:, :, 2] < 0.5).all(1)]
    edge = head_mesh.border(open_)
    kept, g = head_mesh.decimate(p, open_, 120)
    assert len(edge) > 20 and np.isin(edge, kept).all()
    np.testing.assert_array_equal(head_mesh.border(g), edge)


def test_components():
    _, f = sphere(50)
    label = head_mesh.components(np.concatenate([f, f + 50]))
    assert len(np.unique(label)) == 2 and len(np.unique(label[: len(f)])) == 1


def test_jaw_skin_of_a_rigid_jaw():
    rng = np.random.default_rng(2)
    p = rng.uniform(-1, 1, (40, 3)) + [0, 0, 8]
    axis, angle = np.array([1.0, 0, 0]), 0.4
    turn = np.array([[1, 0, 0], [0, np.cos(angle), -np.sin(angle)], [0, np.sin(angle), np.cos(angle)]])
    opened = (p @ turn.T - p) * (np.arange(40) < 20)[:, None]
    w, rest = head.jaw_skin(p, opened, np.array(["skin"] * 40), np.zeros(3), axis, angle)
    np.testing.assert_allclose(w, np.arange(40) < 20, atol=1e-3)
    np.testing.assert_allclose(rest, 0, atol=2e-2)
    part = np.array(["teeth_lower"] * 20 + ["teeth_upper"] * 20)
    w, rest = head.jaw_skin(p, 0 * opened, part, np.zeros(3), axis, angle)
    assert (w[:20] == 1).all() and (w[20:] == 0).all() and (rest == 0).all()


def test_strip_walks_along_a_parallel():
    p, f = sphere(900)
    start = int(np.argmin(np.linalg.norm(p - [-1, 0, 0], axis=1)))
    edges, w = head.strip(p, f, start, np.array([-1.0, 0.0]), inner=1.0, back=0.4)
    points = (1 - w[:, None]) * p[edges[:, 0]] + w[:, None] * p[edges[:, 1]]
    assert ((w >= 0) & (w <= 1)).all() and len(np.unique(edges, axis=0)) == len(edges)
    np.testing.assert_allclose(points[:, 1], p[start, 1], atol=1e-3)  # a cut at one height
    angle = np.arctan2(points[:, 2], -points[:, 0])
    assert 0.8 < angle.max() < 1.05 and -0.45 < angle.min() < -0.2


def test_rasterize_uv_interpolates():
    uv = np.array([[0, 0], [1, 0], [0, 1], [1, 1.0]])
    faces = np.array([[0, 1, 2], [2, 1, 3]])
    image = head_mesh.rasterize_uv(uv, faces, uv[faces], 8)
    centre = (np.arange(8) + 0.5) / 8
    np.testing.assert_allclose(image[..., 0], np.tile(centre, (8, 1)), atol=1e-9)
    np.testing.assert_allclose(image[..., 1], np.tile(1 - centre[:, None], (1, 8)), atol=1e-9)


def test_openness_of_a_ball_and_a_cave():
    p, f = sphere(300)
    assert head_albedo.openness(p, f, 16).min() > 0.85
    inside = head_albedo.openness(p, f[:, ::-1], 16)  # normals turned inwards: nothing of the sky is seen
    assert inside.max() < 0.1 and inside.mean() < 0.02


def test_close_lips():
    x = np.linspace(-2, 2, 5)
    marks = np.zeros((68, 3))
    bow = 0.1 * (1 - (x / 2) ** 2)
    marks[60:65] = np.column_stack([x, bow, 10 + 0 * x])
    marks[[60, 67, 66, 65, 64]] = np.column_stack([x, -bow, 10 + 0 * x])
    points = np.array([[0, 0.1, 10], [0, -0.1, 10], [0, 3, 10.0]])
    mesh = head_mesh.Mesh(np.arange(3), np.zeros((0, 3), int), np.array(["skin"] * 3), np.array([]))
    head.close_lips(points, mesh, marks)
    assert abs(points[0, 1] - points[1, 1]) < 0.03
    assert points[2, 1] == 3


def test_asset_says_where_it_comes_from():
    with safe_open(head.ASSET, "np") as f:
        meta = f.metadata()
    assert "ICT-FaceKit" in meta["licence"] and "Permission is hereby granted" in meta["licence"]
    report = json.loads(meta["report"])
    assert report["share"] >= 0.99 and report["shape_modes"] <= 100
    assert head.ASSET.stat().st_size < 8 * 2**20


def test_light_prior_is_replaced(tmp_path):
    rng = np.random.default_rng(3)
    light = (rng.standard_normal((50, 9, 3)) + 2).astype(np.float32)
    path = tmp_path / "head.safetensors"
    old = load_file(head.ASSET)
    with safe_open(head.ASSET, "np") as f:
        meta = f.metadata()
    head.write(old, meta, path)
    head.update_light(light, path)
    new = load_file(path)
    np.testing.assert_allclose(new["light_mean"], light.mean(0), rtol=1e-5)
    np.testing.assert_allclose(new["light_std"], light.std(0), rtol=1e-5)
    assert all(np.array_equal(old[k], new[k]) for k in old if not k.startswith("light_"))
    with safe_open(path, "np") as f:
        assert f.metadata() == meta
    assert list(tmp_path.iterdir()) == [path]
    with pytest.raises(ValueError, match="finite"):
        head.update_light(light[:, :8], path)
