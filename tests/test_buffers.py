"""Physical buffers: DECA's renderer and decode, the frames, and cast shadows."""

import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from rig_core import buffers, raster, sh
from rig_core.face import FaceCode, axis_angle_to_matrix
from rig_core.heads import HeadSizes

GOLDEN = Path(__file__).parent / "golden"
MESH = load_file(GOLDEN / "raster_mesh.safetensors")


def head_of(verts, albedo, faces, uv, uv_faces, name="flame"):
    """A head that shows given vertices, whatever the code."""
    return SimpleNamespace(
        name=name,
        sizes=HeadSizes(shape=1, tex=1, exp=1, pose=1),
        faces=faces.long(),
        uv=uv,
        uv_faces=uv_faces.long(),
        verts=lambda shape, exp, pose: verts,
        albedo=lambda tex: albedo,
    )


def code_of(cam, light, crop, size):
    """A code of which only camera, light and frame matter."""
    none = torch.zeros(len(cam), 1)
    return FaceCode(none, none, none, none, cam, light, crop, size, "flame")


def whole(size, b=1):
    """The crop that is the whole picture under DECA's rule: image space = [-1, 1] of the crop."""
    h, w = size
    return torch.diag(torch.tensor([224 / w, 224 / h, 1])).expand(b, 3, 3)


def bumpy(size=64, b=1, crop=None):
    t = load_file(GOLDEN / "raster_head_64_b1.safetensors")
    size = (size, size) if isinstance(size, int) else size
    verts = t["verts_world"].expand(b, -1, -1)
    head = head_of(verts, t["albedo"].expand(b, -1, -1, -1), MESH["faces"], MESH["uvcoords"], MESH["uvfaces"])
    crop = whole(size, b) if crop is None else crop
    return head, code_of(t["cam"].expand(b, 3), t["lights"].expand(b, 9, 3), crop, size)


def decode():
    d = load_file(GOLDEN / "diffrig_deca_decode_item.safetensors")
    flame = load_file(GOLDEN / "flame_synthetic.safetensors")
    mesh = flame["flame.f"], flame["uv.vt"], flame["uv.faces"]
    return d, mesh, code_of(d["cam"], d["light"], d["crop_tform"], (96, 96))


# --- parity with DECA ----------------------------------------------------------------------------------


def test_deca_decode():
    """DiffusionRig's DECA.decode of a FLAME head in the photo's frame, and with its head re-centred."""
    d, mesh, code = decode()
    for prefix in ("", "aligned_"):
        head = head_of(d[prefix + "verts"][:1], d["albedo_uv"], *mesh)
        got = buffers.render(head, code[0])
        assert torch.equal(got.mask, d[prefix + "alpha"])
        for name in ("rendered", "normal") if prefix else ("rendered", "normal", "albedo"):
            error = (getattr(got, name) - d[prefix + name]).abs()
            assert error.max() < 2e-4 and error.mean() < 2e-6, name
        assert torch.equal(got.stack(), torch.cat([got.rendered, got.normal, got.albedo], 1))


def test_deca_projection():
    d, _, code = decode()
    crop = code.replace(crop=torch.eye(3).expand(2, 3, 3), size=(224, 224))  # stays in the crop's frame
    torch.testing.assert_close(buffers.to_image(d["verts"], crop), d["trans_verts"], atol=1e-6, rtol=0)


def test_deca_crop_to_photo():
    """transform_points on points whose y and z are not negated: undo our negation first."""
    g = load_file(GOLDEN / "deca_geometry.safetensors")
    code = code_of(g["cam"], torch.zeros(2, 9, 3), g["crop_tform"], (256, 192))
    mirrored = g["points"].clone()
    mirrored[..., 1] = -(mirrored[..., 1] + 2 * g["cam"][:, None, 2])
    mirrored[..., 2] *= -1
    got = buffers.to_image(mirrored, code)
    torch.testing.assert_close(got, g["transformed"], atol=3e-6, rtol=0)


def test_srendery_images_whole():
    t = load_file(GOLDEN / "raster_head_64_b1.safetensors")
    head, code = bumpy()
    got = buffers.render(head, code)
    fragments, normal, grid = buffers.geometry(head, code)
    ok = (fragments.pix_to_face == t["pix_to_face"])[:, None]
    assert (~ok).sum() <= len(t["fragile"])
    assert torch.equal(got.mask * ok, t["alpha_images"] * ok)
    pairs = [
        (normal, "normal_images"),
        (got.normal, "normal_images"),
        (got.albedo, "albedo_images"),
        (got.shading, "shading_images"),
        (got.rendered, "images"),
        (grid, "grid"),
    ]
    for value, name in pairs:
        assert ((value - t[name]) * ok).abs().max() < 1e-4, name
        assert ((value - t[name]) * ok).abs().mean() < 1e-6, name


def test_srendery_images_at_224():
    """Sampled pixels of a head partly outside the view."""
    t = load_file(GOLDEN / "raster_head_224_item.safetensors")
    mesh = MESH["faces"], MESH["uvcoords"], MESH["uvfaces"]
    head = head_of(t["verts_world"], t["albedo"], *mesh)
    code = code_of(t["cam"], t["lights"], torch.eye(3)[None], (224, 224))
    verts = buffers.to_image(t["verts_world"], code) + torch.tensor([0, 0, 10.0])
    torch.testing.assert_close(verts, t["verts_in"], atol=2e-6, rtol=0)
    got = buffers.render(head, code)
    px = t["px"].long()
    for value, name in [
        (got.normal, "normal_images_px"),
        (got.albedo, "albedo_images_px"),
        (got.shading, "shading_images_px"),
        (got.rendered, "images_px"),
    ]:
        error = (value[0].flatten(1).t()[px] - t[name]).abs().amax(1)
        assert (error > 1e-4).float().mean() < 2e-3 and error.median() < 1e-6, name


# --- frames ----------------------------------------------------------------------------------------------


def test_a_point_is_drawn_at_its_pixel():
    size = (40, 60)
    code = code_of(torch.tensor([[5.0, 0.01, -0.02]]), torch.zeros(1, 9, 3), whole(size), size)
    points = torch.tensor([[[0.05, 0.03, 0.0], [-0.12, 0.08, 0.02], [0.0, -0.1, -0.05]]])
    image = buffers.to_image(points, code)
    assert image[0, 0, 0] > 0 and image[0, 0, 1] < 0  # right stays right, up is less y
    for i, (x, y) in enumerate(buffers.to_pixels(image, size)[0].tolist()):
        d = 0.06 * torch.tensor([[-1.0, -1, 0], [1, -1, 0], [0, 1.2, 0]])
        got = buffers.rasterize_head(image[:, i, None] + d, torch.tensor([[0, 1, 2]]), size)
        assert got.pix_to_face[0, round(y), round(x)] == 0
        rows, cols = (got.pix_to_face[0] == 0).nonzero().unbind(1)
        assert abs(rows.float().mean() - y) < 1 and abs(cols.float().mean() - x) < 1


def test_the_crop_is_undone():
    """A crop that is turned, scaled and moved puts the face where its inverse says."""
    a = 0.4
    linear = 1.7 * torch.tensor([[math.cos(a), -math.sin(a)], [math.sin(a), math.cos(a)]])
    crop = torch.eye(3)
    crop[:2, :2], crop[:2, 2] = linear, torch.tensor([-30.0, 12.0])
    code = code_of(torch.tensor([[4.0, 0.0, 0.0]]), torch.zeros(1, 9, 3), crop[None], (200, 300))
    points = 0.1 * torch.randn(1, 20, 3, generator=torch.Generator().manual_seed(0))
    image = buffers.to_image(points, code)
    photo = (image[..., :2] + 1) * torch.tensor([150.0, 100.0])
    back = photo @ linear.T + crop[:2, 2]
    want = (4 * points[..., :2] * torch.tensor([1, -1]) + 1) * 112
    torch.testing.assert_close(back, want, atol=1e-3, rtol=0)
    torch.testing.assert_close(image[..., 2], -4 * points[..., 2])
    assert buffers.depth_scale(code).item() == pytest.approx(224 / (300 * 1.7), rel=1e-5)
    square = code.replace(crop=whole((64, 64)), size=(64, 64))
    assert buffers.depth_scale(square).item() == pytest.approx(1, rel=1e-6)


def test_other_sizes_show_the_same_picture():
    head, code = bumpy(128)
    full = buffers.render(head, code)
    half = buffers.render(head, code, size=64)
    assert half.mask.shape == (1, 1, 64, 64)
    inside = F.avg_pool2d(full.mask, 2) == 1
    assert ((half.mask == 1) | ~inside).float().mean() > 0.999
    error = (half.normal - F.avg_pool2d(full.normal, 2)).abs() * inside
    assert error.mean() < 0.01
    wide = buffers.render(head, code, size=(64, 128))
    assert wide.mask.shape == (1, 1, 64, 128)
    assert (wide.mask - F.avg_pool2d(full.mask, (2, 1))).abs().mean() < 0.02
    tall, code = bumpy((96, 48))
    assert buffers.render(tall, code, size=48).mask.shape[2:] == (48, 24)


def test_turning_the_head_turns_the_buffers():
    head, code = bumpy(64)
    code = code.replace(cam=code.cam * torch.tensor([1.0, 0, 0]))
    got = buffers.render(head, code)
    verts = head.verts(0, 0, 0)
    turned = torch.stack([-verts[..., 1], verts[..., 0], verts[..., 2]], -1)  # counter-clockwise
    quarter = torch.tensor([[0.0, 0.0, math.pi / 2]])
    rotated = code.replace(light=sh.rotate(code.light, axis_angle_to_matrix(quarter)))
    side = buffers.render(head_of(turned, head.albedo(0), head.faces, head.uv, head.uv_faces), rotated)
    same = side.mask == got.mask.rot90(1, (2, 3))
    assert same.float().mean() > 0.998
    x, y, z = got.normal.rot90(1, (2, 3)).split(1, 1)
    for a, b in [
        (side.normal, torch.cat([-y, x, z], 1)),
        (side.albedo, got.albedo.rot90(1, (2, 3))),
        (side.shading, got.shading.rot90(1, (2, 3))),
    ]:
        assert ((a - b).abs() * same).median() < 1e-4
        assert ((a - b).abs() * same).mean() < 2e-3


# --- render -----------------------------------------------------------------------------------------------


def test_the_parts_of_a_render():
    head, code = bumpy(64)
    got = buffers.render(head, code)
    assert 0.2 < got.mask.mean() < 0.8 and set(got.mask.unique().tolist()) == {0, 1}
    torch.testing.assert_close(got.rendered, got.albedo * got.shading)
    assert (got.normal * (1 - got.mask)).abs().max() == 0 and (got.albedo * (1 - got.mask)).abs().max() == 0
    length = got.normal.norm(dim=1, keepdim=True)[got.mask == 1]
    assert length.max() < 1.001 and length.median() > 0.99
    assert got.normal[:, 2:][got.mask == 1].mean() > 0.5  # to the viewer
    # the shading is not masked: outside, the normal is 0
    c = sh.CONSTANTS
    outside = code.light[:, 0] * c[0] - code.light[:, 8] * c[8]
    torch.testing.assert_close(got.shading[:, :, 0, 0], outside, atol=1e-6, rtol=1e-6)


def test_another_albedo():
    head, code = bumpy(64, b=2)
    grey = buffers.render(head, code, albedo=torch.full((1, 3, 8, 8), 0.5))
    inner = F.avg_pool2d(grey.mask, 3, 1, 1) == 1
    seam = (grey.albedo - 0.5).abs().amax(1, keepdim=True) > 1e-6  # zeros beyond the texture's border
    assert (seam & inner).float().mean() < 0.02
    torch.testing.assert_close(grey.rendered, grey.albedo * grey.shading)


def test_a_batch_is_its_items():
    d, mesh, code = decode()
    texture = d["albedo_uv"].expand(2, -1, -1, -1) * torch.tensor([1.0, 0.5]).reshape(2, 1, 1, 1)
    got = buffers.render(head_of(d["verts"], texture, *mesh), code)
    for i in range(2):
        one = buffers.render(head_of(d["verts"][i : i + 1], texture[i : i + 1], *mesh), code[i])
        for name in ("rendered", "normal", "albedo", "shading", "mask"):
            torch.testing.assert_close(getattr(got, name)[i], getattr(one, name)[0], atol=1e-6, rtol=0)


def test_the_wrong_head_is_named():
    head, code = bumpy()
    with pytest.raises(ValueError, match="'open' head"):
        buffers.render(head, code.replace(head="open"))


def test_a_head_out_of_view():
    head, code = bumpy()
    got = buffers.render(head, code.replace(cam=torch.tensor([[8.0, 5.0, 0.0]])))
    assert got.mask.max() == 0 and got.rendered.abs().max() == 0


# --- cast shadows -----------------------------------------------------------------------------------------


def ball(radius, centre, n=20):
    t = torch.linspace(0, math.pi, n + 1)[:, None]
    p = torch.arange(2 * n)[None] * math.pi / n
    verts = torch.stack([t.sin() * p.cos(), t.cos().expand(n + 1, 2 * n), t.sin() * p.sin()], -1)
    i, j = torch.meshgrid(torch.arange(n), torch.arange(2 * n), indexing="ij")
    a, b = i * 2 * n + j, i * 2 * n + (j + 1) % (2 * n)
    faces = torch.cat([torch.stack([a, b, a + 2 * n], -1), torch.stack([b, b + 2 * n, a + 2 * n], -1)])
    return verts.reshape(-1, 3) * radius + torch.tensor(centre), faces.reshape(-1, 3)


def over_wall(size=(96, 96), b=1):
    """A ball of radius 0.25 half a unit before a wall, x right, y up, z to the viewer -> image space."""
    verts, faces = ball(0.25, [-0.2, 0.1, 0.5])
    wall = torch.tensor([[-1.21, -1.2, 0], [1.2, -1.19, 0], [1.22, 1.2, 0], [-1.2, 1.23, 0]])
    faces = torch.cat([faces, len(verts) + torch.tensor([[0, 1, 2], [0, 2, 3]])])
    verts = torch.cat([verts, wall])[None].expand(b, -1, -1)
    h, w = size
    image = verts * torch.tensor([1.0, -w / h, -1.0])
    return image, faces, buffers.rasterize_head(image, faces, size)


def wall_shadow(light, size):
    """Where that ball's shadow falls on the wall for a distant point light: [H,W], 1 inside; and the wall."""
    h, w = size
    x = ((2 * torch.arange(w) + 1) / w - 1).expand(h, w)
    y = (1 - (2 * torch.arange(h)[:, None] + 1) / h).expand(h, w) * h / w
    p = torch.stack([x, y, torch.zeros_like(x)], -1) - torch.tensor([-0.2, 0.1, 0.5])
    distance = torch.linalg.cross(p, F.normalize(light, dim=0).expand_as(p)).norm(dim=-1)
    return distance


@pytest.mark.parametrize("light", [(-0.6, 0.3, 1.0), (0.8, -0.2, 0.8), (0.0, 1.0, 0.9), (0.5, 0.5, 1.5)])
@pytest.mark.parametrize("size", [(96, 96), (64, 96)])
def test_the_shadow_of_a_ball_falls_where_it_should(light, size):
    light = torch.tensor(light)
    verts, faces, fragments = over_wall(size)
    lit = buffers.cast_shadow(verts, faces, fragments, light[None], 0.0)[0, 0]
    wall = fragments.pix_to_face[0] >= len(faces) - 2
    distance = wall_shadow(light, size)
    assert (wall & (distance < 0.22)).sum() > 50
    assert lit[wall & (distance < 0.22)].max() < 0.05
    assert lit[wall & (distance > 0.29)].min() > 0.95


def test_softness_widens_the_penumbra_and_keeps_the_place():
    light = torch.tensor([-0.6, 0.3, 1.0])
    verts, faces, fragments = over_wall()
    wall = fragments.pix_to_face[0] >= len(faces) - 2
    distance = wall_shadow(light, (96, 96))
    partial, edge = [], []
    for softness in (0.0, 0.1, 0.3):
        lit = buffers.cast_shadow(verts, faces, fragments, light[None], softness)[0, 0]
        partial.append(((lit > 0.1) & (lit < 0.9) & wall).sum().item())
        edge.append(lit[wall & ((distance - 0.25).abs() < 0.02)].mean().item())
        assert lit[wall & (distance > 0.6)].min() > 0.99
    assert partial[0] < partial[1] / 2 < partial[2] / 3
    assert all(0.2 < e < 0.85 for e in edge)
    both = buffers.cast_shadow(*over_wall(b=2), light.expand(2, 3), softness=torch.tensor([0.0, 0.3]))
    assert partial[0] * 2 < ((both[1, 0] > 0.1) & (both[1, 0] < 0.9) & wall).sum()


@pytest.mark.parametrize(
    "light", [(0.0, 0, 1), (1.0, 0, 0.2), (-0.5, 0.8, 0.6), (0.0, 1, 0), (0.7, 0.1, -0.7)]
)
@pytest.mark.parametrize("softness", [0.0, 0.05, 0.4, 0.8])
def test_a_ball_does_not_shadow_its_own_lit_side(light, softness):
    verts, faces = ball(0.8, [0.05, -0.03, 0.0])
    image = (verts * torch.tensor([1.0, -1, -1]))[None]
    fragments = buffers.rasterize_head(image, faces, (100, 100))
    d = F.normalize(torch.tensor([light]), dim=1)
    lit = buffers.cast_shadow(image, faces, fragments, d, softness)[0, 0]
    normal = raster.interpolate_verts(fragments, faces, raster.vertex_normals(verts[None], faces))[0]
    cos = (normal * d[0][:, None, None]).sum(0)
    seen = fragments.pix_to_face[0] >= 0
    assert (lit[seen & (cos > 0.15)] > 0.99).all()
    assert (lit[seen & (cos < 0)] < 1e-5).all()
    assert (lit[~seen] == 1).all()


def test_shadows_depend_on_the_scene_alone():
    """Not on where the scene is, on DEPTH_OFFSET, on the light's length, nor on the rest of the batch."""
    verts, faces, fragments = over_wall()
    light = torch.tensor([[-0.6, 0.3, 1.0]])
    want = buffers.cast_shadow(verts, faces, fragments, light)
    assert 0.02 < (want < 0.5).float().mean() < 0.5
    offset = verts + torch.tensor([0.0, 0.0, 10.0])
    torch.testing.assert_close(
        buffers.cast_shadow(offset, faces, fragments, 7 * light), want, atol=2e-2, rtol=0
    )
    moved = verts + torch.tensor([0.125, 0.0625, 0])
    moved_fragments = buffers.rasterize_head(moved, faces, (96, 96))
    moved = buffers.cast_shadow(moved, faces, moved_fragments, light)
    error = (moved[..., 3:, 6:] - want[..., :-3, :-6]).abs()[..., :80, 5:80]
    assert (error > 0.05).float().mean() < 5e-3
    other = torch.cat([light, torch.tensor([[0.9, -0.2, 0.5]])])
    both = buffers.cast_shadow(*over_wall(b=2), other)
    torch.testing.assert_close(both[:1], want, atol=1e-4, rtol=0)
    assert (both[1] - both[0]).abs().mean() > 0.01


def test_depth_tells_how_long_z_is():
    """A crop that fills half of the photo halves x and y, not z: `depth` makes up for it."""
    verts, faces, fragments = over_wall()
    light = torch.tensor([[-0.6, 0.3, 1.0]])
    want = buffers.cast_shadow(verts, faces, fragments, light)
    half = verts * torch.tensor([0.5, 0.5, 1.0])
    fragments = buffers.rasterize_head(half, faces, (192, 192))
    got = buffers.cast_shadow(half, faces, fragments, light, depth=0.5)[..., 48:144, 48:144]
    assert ((got - want).abs() > 0.05).float().mean() < 2e-3
    wrong = buffers.cast_shadow(half, faces, fragments, light)[..., 48:144, 48:144]
    assert ((wrong - want).abs() > 0.05).float().mean() > 0.02


def test_a_nose_shadows_the_cheek():
    head, code = bumpy(96)
    verts = buffers.to_image(head.verts(0, 0, 0), code)
    fragments, normal, _ = buffers.geometry(head, code)
    seen = fragments.mask[0, 0] == 1
    front = buffers.cast_shadow(verts, head.faces, fragments, torch.tensor([[0.0, 0.0, 1.0]]))
    assert front[0, 0][seen & (normal[0, 2] > 0.2)].mean() > 0.97
    light = F.normalize(torch.tensor([[1.0, 0.2, 0.15]]), dim=1)
    lit = buffers.cast_shadow(verts, head.faces, fragments, light)[0, 0]
    toward = (normal[0] * light[0][:, None, None]).sum(0)
    cast = seen & (toward > 0.2) & (lit < 0.1)
    assert 20 < cast.sum() < 0.3 * seen.sum()
    assert ((toward > 0.2) & (lit > 0.9)).sum() > 3 * cast.sum()
