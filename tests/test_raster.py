"""The rasteriser: pytorch3d's pixels, and what must hold of any rasteriser."""

import math
import sys
import types
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from rig_core import raster

GOLDEN = Path(__file__).parent / "golden"
MESH = load_file(GOLDEN / "raster_mesh.safetensors")
WHOLE = [
    "degenerate_64",
    "edges_64_b2",
    "head_64_b1",
    "indexed_56_b3",
    "outside_64_b2",
    "soup_48x80",
    "soup_75_b2",
    "soup_80x48",
    "ties_64",
]


def golden(name):
    t = load_file(GOLDEN / f"raster_{name}.safetensors")
    faces = t.get("faces", MESH["faces"]).long()
    return t, faces, tuple(t["pix_to_face"].shape[1:])


def soup(n, seed=0, size=0.5, b=1):
    """n loose triangles of all sizes, orders and depths in and around the picture."""
    g = torch.Generator().manual_seed(seed)
    centre = torch.rand(b, n, 1, 3, generator=g) * 2.6 - 1.3
    spread = size * torch.rand(b, n, 1, 1, generator=g) ** 2
    verts = centre + spread * torch.randn(b, n, 3, 3, generator=g)
    verts[..., 2] = 5 + verts[..., 2]
    return verts.reshape(b, -1, 3), torch.arange(3 * n).reshape(n, 3)


def sphere(n=16):
    """Unit sphere wound outward: verts [V,3], faces [F,3]."""
    t = torch.linspace(0, math.pi, n + 1)[:, None]
    p = torch.arange(2 * n)[None] * math.pi / n
    verts = torch.stack([t.sin() * p.cos(), t.cos().expand(n + 1, 2 * n), t.sin() * p.sin()], -1)
    i, j = torch.meshgrid(torch.arange(n), torch.arange(2 * n), indexing="ij")
    a, b = i * 2 * n + j, i * 2 * n + (j + 1) % (2 * n)
    c, d = a + 2 * n, b + 2 * n
    faces = torch.cat([torch.stack([a, b, c], -1), torch.stack([b, d, c], -1)]).reshape(-1, 3)
    return verts.reshape(-1, 3), faces


def same(a, b):
    assert torch.equal(a.pix_to_face, b.pix_to_face)
    assert torch.equal(a.zbuf, b.zbuf)
    assert torch.equal(a.bary, b.bary)


def naive(verts, faces, size):
    """Every face against every pixel, in the plainest way; [V,3], [F,3] -> [H,W] winner and depth."""
    h, w = size
    s = min(h, w)
    x = -(w / s) + (2 * torch.arange(w) + 1) / s
    y = -(h / s) + (2 * torch.arange(h) + 1) / s
    verts = verts.double() * torch.tensor([w / s, h / s, 1])
    best, winner = torch.full(size, torch.inf, dtype=torch.float64), torch.full(size, -1)
    for k, (a, b, c) in enumerate(verts[faces]):

        def edge(p, q):
            return (x[None] - p[0]) * (q[1] - p[1]) - (y[:, None] - p[1]) * (q[0] - p[0])

        area = (c[0] - a[0]) * (b[1] - a[1]) - (c[1] - a[1]) * (b[0] - a[0])
        if abs(area) <= 1e-8 or min(a[2], b[2], c[2]) < 1e-8:
            continue
        w0, w1, w2 = (e / (area + 1e-8) for e in (edge(b, c), edge(c, a), edge(a, b)))
        z = w0 * a[2] + w1 * b[2] + w2 * c[2]
        nearer = (w0 > 0) & (w1 > 0) & (w2 > 0) & (z < best)
        best, winner = torch.where(nearer, z, best), torch.where(nearer, k, winner)
    return winner, best


# --- parity with pytorch3d -------------------------------------------------------------------------


@pytest.mark.parametrize("name", WHOLE)
def test_pixels_are_those_of_pytorch3d(name):
    t, faces, size = golden(name)
    got = raster.rasterize(t["verts_in"], faces, size)
    differs = (got.pix_to_face != t["pix_to_face"]).reshape(-1).nonzero().squeeze(1)
    assert set(differs.tolist()) <= set(t["fragile"].tolist())
    ok = got.pix_to_face == t["pix_to_face"]
    scale = t["bary_coords"].abs().clamp_min(1)
    assert ((got.bary - t["bary_coords"]).abs() / scale)[ok].max() < 1e-5
    assert ((got.zbuf - t["zbuf"]).abs() / t["zbuf"].abs().clamp_min(10))[ok].max() < 1e-5


@pytest.mark.parametrize("name", [n for n in WHOLE if n != "head_64_b1"])
def test_interpolated_values_are_those_of_pytorch3d(name):
    t, faces, size = golden(name)
    got = raster.rasterize(t["verts_in"], faces, size)
    value = raster.interpolate(got, t["attributes"])
    want, ok = t["pixel_vals"], (got.pix_to_face == t["pix_to_face"])[:, None]
    error = (value - want[:, :-1]).abs() / want[:, :-1].abs().clamp_min(1)
    assert (error * ok).max() < 1e-5
    assert torch.equal(got.mask * ok, want[:, -1:] * ok)


def test_a_size_that_is_no_power_of_two():
    """224 px: the last bit of the pixel centres counts, and the head is partly outside the view."""
    t, faces, size = golden("head_224_item")
    got = raster.rasterize(t["verts_in"], faces, size)
    differs = (got.pix_to_face != t["pix_to_face"]).reshape(-1).nonzero().squeeze(1)
    assert set(differs.tolist()) <= set(t["fragile"].tolist())
    px = t["px"].long()
    ok = (got.pix_to_face == t["pix_to_face"]).reshape(-1)[px]
    assert ok.sum() > 1000
    assert (got.bary.reshape(-1, 3)[px] - t["bary_coords_px"])[ok].abs().max() < 1e-5
    assert (got.zbuf.reshape(-1)[px] - t["zbuf_px"])[ok].abs().max() < 1e-4


def test_vertex_normals_are_decas():
    t = load_file(GOLDEN / "deca_geometry.safetensors")
    torch.testing.assert_close(
        raster.vertex_normals(t["verts"], t["faces"]), t["vertex_normals"], atol=2e-6, rtol=0
    )


def test_pytorch3d_backend_converts_both_ways(monkeypatch):
    """A stand-in with pytorch3d's frame (x left, y up), packed faces and [B,H,W,1] outputs."""

    def rasterize_meshes(meshes, image_size, blur_radius, faces_per_pixel, perspective_correct):
        assert (blur_radius, faces_per_pixel, perspective_correct) == (0.0, 1, False)
        verts, faces = meshes.verts * torch.tensor([-1.0, -1.0, 1.0]), meshes.faces
        ours = raster._rasterize_torch(verts, faces, image_size)
        first = faces.shape[1] * torch.arange(len(faces))[:, None, None]
        packed = torch.where(ours.pix_to_face < 0, -1, ours.pix_to_face + first)
        return packed[..., None], ours.zbuf[..., None], ours.bary[:, :, :, None], None

    module = types.ModuleType("pytorch3d.renderer.mesh.rasterize_meshes")
    module.rasterize_meshes = rasterize_meshes
    structures = types.ModuleType("pytorch3d.structures")
    structures.Meshes = lambda verts, faces: types.SimpleNamespace(verts=verts, faces=faces)
    for name in ("pytorch3d", "pytorch3d.renderer", "pytorch3d.renderer.mesh"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setitem(sys.modules, structures.__name__, structures)
    verts, faces = soup(40, b=2)
    for size in ((32, 32), (24, 40)):
        got = raster.rasterize(verts, faces, size, backend="pytorch3d")
        same(got, raster.rasterize(verts, faces, size, backend="torch"))
        assert got.pix_to_face[1].max() < 40


# --- against the plain definition ------------------------------------------------------------------


@pytest.mark.parametrize("size", [(40, 40), (33, 33), (20, 50), (51, 31), (1, 1), (1, 7)])
def test_agrees_with_the_plain_definition(size):
    verts, faces = soup(60, seed=size[0])
    got = raster.rasterize(verts, faces, size)
    winner, depth = naive(verts[0], faces, size)
    differs = got.pix_to_face[0] != winner
    assert differs.sum() <= 1  # a pixel centre within rounding of an edge
    seen = (winner >= 0) & ~differs
    assert ((got.zbuf[0] - depth)[seen].abs() < 1e-4).all()


@settings(max_examples=40, deadline=None)
@given(st.lists(st.floats(-2, 2, width=32), min_size=6, max_size=6))
def test_one_triangle_covers_what_lies_inside(xy):
    verts = torch.tensor(xy).reshape(1, 3, 2)
    verts = torch.cat([verts, torch.ones(1, 3, 1)], -1)
    got = raster.rasterize(verts, torch.tensor([[0, 1, 2]]), (16, 16)).pix_to_face[0] >= 0
    c = ((2 * torch.arange(16) + 1) / 16 - 1).double()
    a, b, d = verts[0, :, :2].double()

    def edge(p, q):
        return (c[None] - p[0]) * (q[1] - p[1]) - (c[:, None] - p[1]) * (q[0] - p[0])

    e = torch.stack([edge(b, d), edge(d, a), edge(a, b)])
    area = e.sum(0)[0, 0]
    if abs(area) < 1e-6:
        return
    e = e * area.sign()
    assert got[(e > 1e-6).all(0)].all()
    assert not got[(e < -1e-6).any(0)].any()


def test_tiles_and_chunks_do_not_show():
    """Faces larger than a tile, and any number of pixels at once, give the same bits."""
    verts, faces = soup(80, seed=3, size=2.0)
    small = raster._rasterize_torch(verts, faces, (200, 200), chunk=1)
    same(small, raster._rasterize_torch(verts, faces, (200, 200), chunk=1 << 20))
    same(small, raster.rasterize(verts, faces, (200, 200)))
    winner, _ = naive(verts[0], faces, (200, 200))
    assert (small.pix_to_face[0] != winner).sum() <= 4


def test_without_64_bit_atomics(monkeypatch):
    verts, faces = soup(150, seed=4, b=2)
    verts = torch.cat([verts, verts], 1)  # every face twice: ties
    faces = torch.cat([faces, faces + 450])
    want = raster.rasterize(verts, faces, (60, 60))
    wide = raster._keep_nearest
    monkeypatch.setattr(raster, "_keep_nearest", lambda *a: wide(*a[:-1], False))
    same(raster.rasterize(verts, faces, (60, 60)), want)
    assert want.pix_to_face.max() < 150


# --- properties --------------------------------------------------------------------------------------


def test_a_batch_is_its_items():
    verts, faces = soup(50, seed=5, b=3)
    got = raster.rasterize(verts, faces, (48, 48))
    each = torch.stack([faces, faces.flip(0), faces.roll(1, 1)])
    mixed = raster.rasterize(verts, each, (48, 48))
    for i in range(3):
        one = raster.rasterize(verts[i : i + 1], faces, (48, 48))
        assert torch.equal(got.pix_to_face[i], one.pix_to_face[0])
        assert torch.equal(got.bary[i], one.bary[0])
        one = raster.rasterize(verts[i : i + 1], each[i], (48, 48))
        assert torch.equal(mixed.pix_to_face[i], one.pix_to_face[0])


@pytest.mark.parametrize(
    "verts",
    [
        torch.tensor([[5.0, 5, 1], [6, 5, 1], [5, 6, 1]]),
        torch.tensor([[-1.0, -1, -1], [1, -1, -1], [0, 1, -1]]),
        torch.tensor([[-1.0, -1, 1], [1, -1, 0], [0, 1, 1]]),
        torch.tensor([[-1.0, -1, 1], [1, 1, 1], [0, 0, 1]]),
        torch.tensor([[-1.0, -1, 1], [1, -1, 1], [float("nan"), 1, 1]]),
        torch.tensor([[-1.0, -1, 1], [1, -1, 1], [0, 1, float("nan")]]),
        torch.tensor([[-1.0, -1, 1], [1, -1, 1], [0, float("inf"), 1]]),
    ],
    ids=["off screen", "behind", "touching z = 0", "collinear", "nan", "nan depth", "infinite"],
)
def test_nothing_to_see(verts):
    got = raster.rasterize(verts[None], torch.tensor([[0, 1, 2]]), (12, 9))
    assert (got.pix_to_face == -1).all() and (got.zbuf == -1).all() and (got.bary == -1).all()
    assert (raster.interpolate(got, torch.ones(1, 1, 3, 2)) == 0).all()
    assert (got.mask == 0).all()


def test_no_faces_at_all():
    got = raster.rasterize(torch.ones(2, 4, 3), torch.zeros(0, 3, dtype=torch.int64), (5, 6))
    assert got.pix_to_face.shape == (2, 5, 6) and (got.pix_to_face == -1).all()
    assert got.bary.shape == (2, 5, 6, 3)


def test_a_bad_face_leaves_the_others():
    verts, faces = soup(30, seed=6)
    want = raster.rasterize(verts, faces, (40, 40))
    verts = torch.cat([verts, torch.full((1, 3, 3), float("nan")), torch.full((1, 3, 3), float("inf"))], 1)
    faces = torch.cat([faces, torch.tensor([[90, 91, 92], [93, 94, 95]])])
    same(raster.rasterize(verts, faces, (40, 40)), want)


def test_turning_the_mesh_turns_the_picture():
    verts, faces = soup(60, seed=7)
    got = raster.rasterize(verts, faces, (64, 64))
    turned = torch.stack([-verts[..., 1], verts[..., 0], verts[..., 2]], -1)  # x -> y: clockwise on screen
    turned = raster.rasterize(turned, faces, (64, 64))
    assert torch.equal(turned.pix_to_face[0], got.pix_to_face[0].rot90(-1))


def test_half_the_scale_at_twice_the_resolution_is_the_same_picture():
    verts, faces = soup(60, seed=8)
    got = raster.rasterize(verts, faces, (32, 32)).pix_to_face
    half = raster.rasterize(verts * torch.tensor([0.5, 0.5, 1]), faces, (64, 64)).pix_to_face
    assert torch.equal(half[:, 16:48, 16:48], got)


def test_moving_by_whole_pixels_moves_the_picture():
    verts, faces = soup(60, seed=9)
    verts = (verts * 1024).round() / 1024  # so that adding 1/4 is exact
    got = raster.rasterize(verts, faces, (64, 64)).pix_to_face
    moved = raster.rasterize(verts + torch.tensor([0.25, -0.125, 0]), faces, (64, 64)).pix_to_face
    assert torch.equal(moved[:, :60, 8:], got[:, 4:, :56])


def test_the_nearest_face_wins_and_the_first_of_equals():
    square = torch.tensor([[-1.5, -1.5, 3.0], [1.5, -1.5, 3], [1.5, 1.5, 3], [-1.5, 1.5, 3]])
    verts = torch.cat([square, square - torch.tensor([0, 0, 1.0]), square])[None]
    one = torch.tensor([[0, 1, 2], [0, 2, 3]])
    got = raster.rasterize(verts, torch.cat([one, one + 4, one + 8]), (7, 8)).pix_to_face
    assert set(got.unique().tolist()) <= {2, 3}
    got = raster.rasterize(verts, torch.cat([one, one + 8]), (7, 8)).pix_to_face
    assert set(got.unique().tolist()) <= {0, 1}


def test_a_closed_surface_has_no_holes():
    verts, faces = sphere()
    got = raster.rasterize(verts[None] * 0.8 + torch.tensor([0.003, 0.001, 3]), faces, (70, 70))
    c = (2 * torch.arange(70) + 1) / 70 - 1
    inside = (c[None] ** 2 + c[:, None] ** 2).sqrt() < 0.75
    assert (got.pix_to_face[0] >= 0)[inside].all()
    assert (got.zbuf[0][inside] < 3.001).all()  # the front half hides the back half


# --- interpolation and normals ---------------------------------------------------------------------


def test_a_linear_function_is_reproduced():
    verts = torch.tensor([[-0.9, -0.8, 1.0], [0.9, -0.7, 2], [-0.1, 0.9, 3]])[None]
    faces = torch.tensor([[0, 1, 2]])
    got = raster.rasterize(verts, faces, (20, 30))
    value = raster.interpolate_verts(got, faces, torch.cat([verts, 2 * verts[..., :1] - verts[..., 1:2]], -1))
    x, y = (2 * torch.arange(30) + 1) / 30 - 1, (2 * torch.arange(20) + 1) / 20 - 1
    seen = got.pix_to_face[0] >= 0
    assert 100 < seen.sum() < 400
    torch.testing.assert_close(value[0, 0][seen], x.expand(20, 30)[seen], atol=1e-5, rtol=0)
    torch.testing.assert_close(value[0, 1][seen], y[:, None].expand(20, 30)[seen], atol=1e-5, rtol=0)
    torch.testing.assert_close(value[0, 2][seen], got.zbuf[0][seen], atol=1e-5, rtol=0)
    torch.testing.assert_close(value[0, 3], 2 * value[0, 0] - value[0, 1], atol=1e-5, rtol=0)
    assert (value[:, :, ~seen] == 0).all()


def test_three_ways_to_give_the_same_values():
    verts, faces = soup(30, seed=10, b=2)
    got = raster.rasterize(verts, faces, (40, 40))
    values = torch.randn(2, 90, 5)
    by_verts = raster.interpolate_verts(got, faces, values)
    assert by_verts.shape == (2, 5, 40, 40)
    torch.testing.assert_close(by_verts, raster.interpolate(got, raster.face_corners(values, faces)))
    each = faces.expand(2, -1, -1)
    torch.testing.assert_close(by_verts, raster.interpolate_verts(got, each, values))
    assert torch.equal(raster.face_corners(values, each), values[:, faces])
    shared = raster.interpolate(got, raster.face_corners(values[:1], faces))
    torch.testing.assert_close(shared[0], by_verts[0])
    torch.testing.assert_close(
        shared[1:],
        raster.interpolate_verts(raster.Fragments(*(v[1:] for v in vars(got).values())), faces, values[:1]),
    )


def test_values_have_gradients():
    verts, faces = soup(20, seed=11)
    got = raster.rasterize(verts, faces, (16, 16))
    values = torch.randn(1, 60, 2, requires_grad=True)
    raster.interpolate_verts(got, faces, values).sum().backward()
    torch.testing.assert_close(
        values.grad.sum(), 2 * got.bary[got.pix_to_face >= 0].sum(), atol=1e-3, rtol=1e-4
    )


def test_normals_of_a_sphere_point_outward_and_turn_with_it():
    verts, faces = sphere(24)
    normal = raster.vertex_normals(verts[None], faces)[0]
    ring = verts[:, 1].abs() < 0.99
    assert ((normal * verts).sum(-1)[ring] > 0.999).all()
    q, _ = torch.linalg.qr(torch.randn(3, 3, generator=torch.Generator().manual_seed(0)))
    q = q * q.det().sign()
    turned = raster.vertex_normals(3 * verts[None] @ q.T + 5, faces)[0]
    torch.testing.assert_close(turned[ring], (normal @ q.T)[ring], atol=1e-4, rtol=0)
    flipped = raster.vertex_normals(verts[None].expand(2, -1, -1), torch.stack([faces, faces.flip(1)]))
    torch.testing.assert_close(flipped[1][ring], -normal[ring], atol=1e-5, rtol=0)


def test_mistakes_are_named():
    verts, faces = soup(4)
    with pytest.raises(ValueError, match=r"\[B,V,3\]"):
        raster.rasterize(verts[0], faces, (8, 8))
    with pytest.raises(ValueError, match=r"\[F,3\]"):
        raster.rasterize(verts, faces.expand(2, -1, -1), (8, 8))
    with pytest.raises(ValueError, match="unknown rasteriser"):
        raster.rasterize(verts, faces, (8, 8), backend="opengl")


@pytest.mark.skipif(raster._has_pytorch3d(), reason="pytorch3d is installed")
def test_a_missing_pytorch3d_is_named():
    verts, faces = soup(4)
    with pytest.raises(ImportError, match="pytorch3d"):
        raster.rasterize(verts, faces, (8, 8), backend="pytorch3d")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_cuda_gives_the_same_picture():
    t, faces, size = golden("head_64_b1")
    got = raster.rasterize(t["verts_in"].cuda(), faces.cuda(), size, backend="torch")
    same(
        raster.Fragments(*(v.cpu() for v in vars(got).values())), raster.rasterize(t["verts_in"], faces, size)
    )


@pytest.mark.skipif(not raster._has_pytorch3d(), reason="needs pytorch3d")
def test_parity_with_pytorch3d_itself():
    verts, faces = soup(60, seed=12, b=2)
    same(
        raster.rasterize(verts, faces, (31, 31), backend="pytorch3d"),
        raster.rasterize(verts, faces, (31, 31), backend="torch"),
    )
