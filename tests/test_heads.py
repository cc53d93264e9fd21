"""The open head: geometry, landmarks, albedo of the asset that travels with the pack."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.path import Path
from scipy.ndimage import distance_transform_edt

from rig_core import buffers, checkpoints, face, raster
from rig_core.face import axis_angle_to_matrix

torch.set_num_threads(1)
ANGLE = st.floats(-0.8, 0.8)


@pytest.fixture(scope="module")
def head():
    return checkpoints.load_head()


@pytest.fixture(scope="module")
def sample(head):
    """Four faces: shape, exp and a neutral pose."""
    g = torch.Generator().manual_seed(5)
    s = head.sizes
    return torch.randn(4, s.shape, generator=g), 0.5 * torch.randn(4, s.exp, generator=g), torch.zeros(4, 8)


def zeros(head, n=1):
    s = head.sizes
    return torch.zeros(n, s.shape), torch.zeros(n, s.exp), torch.zeros(n, s.pose)


def named(head, **weights):
    """exp [1,E] of named expressions."""
    return sum(w * head.expressions[head.expression_names.index(k)] for k, w in weights.items())[None]


def close(a, b, limit=1e-6):
    assert (a - b).abs().max() < limit


def mirror(head):
    """For each skin vertex its twin across x = 0, and the distance to it."""
    v = head.template
    skin = (head.masks["face"] > 0.5).nonzero()[:, 0]
    d = torch.cdist(v[skin] * torch.tensor([-1.0, 1, 1]), v[skin])
    return skin, skin[d.argmin(1)], d.amin(1)


def test_zero_code_is_the_mean(head):
    close(head.verts(*zeros(head, 2)), head.template.expand(2, -1, -1), 1e-7)


def test_sizes(head):
    s = head.sizes
    assert s.pose == 8 and s.tex == 12 and 20 <= s.shape <= 100 and 20 <= s.exp <= 53
    assert len(head.expression_names) == len(head.expressions) and head.expressions.shape[1] == s.exp
    assert "jawOpen" not in head.expression_names and "mouthSmile_L" in head.expression_names
    assert head.faces.max() < len(head.template) and head.uv_faces.max() < len(head.uv)
    assert head.faces.shape == head.uv_faces.shape
    assert 0 <= head.uv.min() and head.uv.max() <= 1
    size = head.template.amax(0) - head.template.amin(0)
    assert 0.2 < size[1] < 0.4  # metres, with the neck


def test_modes_are_linear(head, sample):
    shape, exp, pose = sample
    mean = head.template
    close(head.verts(2 * shape, exp * 0, pose) - mean, 2 * (head.verts(shape, exp * 0, pose) - mean), 2e-6)
    both = head.verts(shape, exp, pose) - mean
    close(both, head.verts(shape, 0 * exp, pose) + head.verts(0 * shape, exp, pose) - 2 * mean, 2e-6)


def test_index_selects_vertices(head, sample):
    shape, exp, _ = sample
    pose = torch.tensor([[0.2, -0.4, 0.1, 0.2, 0, 0, 0.3, -0.2]]).expand(4, -1)
    index = torch.tensor([5, 17, 4000, 6000])
    close(head.verts(shape, exp, pose, index), head.verts(shape, exp, pose)[:, index], 1e-7)
    few = head.verts(shape, exp, pose, head.landmark_vertices)
    close(head.landmarks(few, pose), head.landmarks(head.verts(shape, exp, pose), pose), 1e-7)


def test_landmarks_are_linear_in_shape_where_they_are_vertices(head, sample):
    shape, exp, pose = sample
    a = head.landmarks(head.verts(shape, exp, pose), pose)[:, 17:]
    close(a, head.verts(shape, exp, pose)[:, head.landmark_index[17:]], 1e-8)
    mid = (shape[:1] + shape[1:2]) / 2
    want = (a[:1] + a[1:2]) / 2
    got = head.landmarks(head.verts(mid, (exp[:1] + exp[1:2]) / 2, pose[:1]), pose[:1])[:, 17:]
    close(got, want, 1e-6)


@settings(max_examples=20, deadline=None)
@given(st.tuples(ANGLE, ANGLE, ANGLE))
def test_rotation_is_rigid_about_the_origin(head, sample, r):
    shape, exp, pose = sample
    turned = pose.clone()
    turned[:, :3] = torch.tensor(r)
    matrix = face.axis_angle_to_matrix(turned[:, :3])
    close(head.verts(shape, exp, turned), head.verts(shape, exp, pose) @ matrix.transpose(1, 2), 1e-6)


@settings(max_examples=10, deadline=None)
@given(st.floats(-0.05, 0.45), st.floats(-0.05, 0.05))
def test_jaw_turns_lower_teeth_about_the_hinge(head, sample, opening, sideways):
    shape, exp, pose = sample
    moved = pose.clone()
    moved[:, 3], moved[:, 4] = opening, sideways
    low = (head.masks["teeth"] > 0.5) & (head.jaw_weight == 1)
    high = (head.masks["teeth"] > 0.5) & (head.jaw_weight == 0)
    assert low.sum() > 100 and high.sum() > 100
    hinge = head.joints[0] + torch.einsum("bs,sd->bd", shape, head.joint_modes[:, 0])
    a, b = head.verts(shape, exp, pose), head.verts(shape, exp, moved)
    close((a - hinge[:, None])[:, low].norm(dim=2), (b - hinge[:, None])[:, low].norm(dim=2), 2e-6)
    close(a[:, high], b[:, high], 1e-7)
    rigid = (a - hinge[:, None])[:, low] @ face.axis_angle_to_matrix(moved[:, 3:6]).transpose(1, 2)
    close(rigid + hinge[:, None], b[:, low], 2e-6)


def test_jaw_opens_downwards(head):
    shape, exp, pose = zeros(head, 3)
    pose[:, 3] = torch.tensor([0.0, 0.2, 0.44])
    marks = head.landmarks(head.verts(shape, exp, pose), pose)
    gap = marks[:, 62, 1] - marks[:, 66, 1]
    assert abs(gap[0]) < 1e-3  # lips meet at rest
    assert 0.01 < gap[1] < gap[2] < 0.04
    assert marks[0, 8, 1] > marks[1, 8, 1] > marks[2, 8, 1]  # the chin goes down
    close(marks[0, 17:31], marks[2, 17:31], 1e-3)  # brows and the bridge of the nose stay


def test_mouth_close_shuts_the_open_jaw(head):
    shape, _, pose = zeros(head)
    pose[0, 3] = head.jaw_open_angle
    marks = head.landmarks(head.verts(shape, named(head, mouthClose=1.0), pose), pose)
    assert (marks[0, 61:64, 1] - marks[0, [67, 66, 65], 1]).abs().max() < 0.005


@pytest.mark.parametrize("name", ["mouthSmile", "browDown", "eyeBlink", "cheekPuff", "mouthFrown"])
def test_left_and_right_expressions_mirror(head, name):
    shape, _, pose = zeros(head)
    base = head.template
    left = (head.verts(shape, named(head, **{f"{name}_L": 1.0}), pose) - base)[0]
    right = (head.verts(shape, named(head, **{f"{name}_R": 1.0}), pose) - base)[0]
    a, b, far = mirror(head)
    pairs = far < 1.5e-3  # the decimation is not symmetric: compare where a twin is near
    assert pairs.float().mean() > 0.4
    flipped = right[b[pairs]] * torch.tensor([-1.0, 1, 1])
    error = (left[a[pairs]] - flipped).norm(dim=1)
    assert error.mean() < 0.06 * left.norm(dim=1).max()
    # and it acts on its own side
    side = base[a, 0] > 0.01
    assert left[a][side].norm(dim=1).mean() > 5 * left[a][base[a, 0] < -0.01].norm(dim=1).mean()


def test_smile_lifts_the_corners(head):
    shape, _, pose = zeros(head)
    smile = head.verts(shape, named(head, mouthSmile_L=1.0, mouthSmile_R=1.0), pose)
    moved = head.landmarks(smile, pose) - head.landmarks(head.template[None], pose)
    assert moved[0, [48, 54], 1].min() > 0.004
    assert moved[0, 48, 0] < 0 < moved[0, 54, 0]


@settings(max_examples=10, deadline=None)
@given(st.floats(-0.5, 0.5), st.floats(-0.4, 0.4))
def test_gaze_turns_eyeballs(head, sample, yaw, pitch):
    shape, exp, pose = sample
    moved = pose.clone()
    moved[:, 6], moved[:, 7] = yaw, pitch
    a, b = head.verts(shape, exp, pose), head.verts(shape, exp, moved)
    joints = head.joints + torch.einsum("bs,sjd->bjd", shape, head.joint_modes)
    want = torch.tensor([math.sin(yaw) * math.cos(pitch), math.sin(pitch), math.cos(yaw) * math.cos(pitch)])
    turn = (
        axis_angle_to_matrix(torch.tensor([[0.0, yaw, 0]]))[0]
        @ axis_angle_to_matrix(torch.tensor([[-pitch, 0.0, 0]]))[0]
    )
    close(turn[:, 2], want)  # what looked at the viewer now looks there
    for i in (0, 1):
        ball = head.eyes[i] > 0
        centre = joints[:, None, 1 + i]
        close((a[:, ball] - centre).norm(dim=2), (b[:, ball] - centre).norm(dim=2), 2e-6)
        close(torch.pdist(a[0, ball]), torch.pdist(b[0, ball]), 2e-6)
        close((a[:, ball] - centre) @ turn.T, b[:, ball] - centre, 2e-6)
    rest = (head.masks["eyes"] == 0) & (head.lid_modes.abs().amax((0, 2)) == 0)
    close(a[:, rest], b[:, rest], 1e-7)


def test_gradients_reach_every_input(head, sample):
    inputs = [x.clone().requires_grad_() for x in sample]
    inputs[2].data[:, :] = 0.1
    marks = head.landmarks(head.verts(*inputs), inputs[2])
    (marks**2).sum().backward()
    for x in inputs:
        assert torch.isfinite(x.grad).all()
    assert inputs[2].grad[:, :4].abs().min() > 0


def test_empty_batch(head):
    shape, exp, pose = zeros(head, 0)
    assert head.landmarks(head.verts(shape, exp, pose), pose).shape == (0, 68, 3)
    assert head.albedo(torch.zeros(0, 12)).shape == (0, 3, 256, 256)


# -- pictures ---------------------------------------------------------------------------------------------


def project(verts, scale=8.0):
    """Image space of an orthographic look at the head."""
    return torch.stack([verts[..., 0] * scale, -verts[..., 1] * scale, 3 - verts[..., 2]], -1)


def pixels(points, size, scale=8.0):
    return ((project(points, scale)[..., :2] + 1) * size / 2 - 0.5).round().long()


def skin_faces(head):
    other = sum(head.masks[k] for k in ("eyes", "teeth", "mouth")) > 0.5
    return (~other[head.faces]).all(1)


@pytest.mark.parametrize("degrees", [-60, -40, -20, 20, 40, 60])
def test_contour_of_the_far_cheek_lies_on_the_silhouette(head, sample, degrees):
    shape, _, pose = sample
    pose = pose.clone()
    pose[:, 1] = math.radians(degrees)
    verts = head.verts(shape, 0 * sample[1], pose)
    size, px = 256, 2 / 256 / 8.0  # metres a pixel
    face_only = head.faces[(head.masks["face"] > 0.5)[head.faces].all(1)]
    mask = raster.rasterize(project(verts), face_only, (size, size)).mask[:, 0].numpy() > 0
    at = pixels(head.landmarks(verts, pose)[:, :17], size)
    far = [0, 3, 4, 5] if degrees < 0 else [16, 13, 12, 11]  # 1 and 2 may hide behind the nose at 60 degrees
    for m, p in zip(mask, at, strict=True):
        distance = distance_transform_edt(m) + distance_transform_edt(~m) - 1
        assert (distance[p[far, 1], p[far, 0]] * px).max() < 0.005


def test_contour_frontal_is_symmetric_and_ordered(head):
    shape, exp, pose = zeros(head)
    c = head.landmarks(head.verts(shape, exp, pose), pose)[0, :17]
    close(c.flip(0)[:, :2] * torch.tensor([-1.0, 1]), c[:, :2], 4e-3)
    assert (c[1:, 0] > c[:-1, 0]).all()
    assert c[8, 1] == c[:, 1].min()


def test_contour_rolls_with_the_head(head):
    """A roll in the picture plane turns the landmarks and changes nothing else."""
    shape, exp, pose = zeros(head)
    pose[0, 1] = 0.5
    flat = head.landmarks(head.verts(shape, exp, pose), pose)
    roll = face.axis_angle_to_matrix(torch.tensor([[0.0, 0, 0.6]]))
    rolled = pose.clone()
    rolled[:, :3] = face.matrix_to_axis_angle(roll @ face.axis_angle_to_matrix(pose[:, :3]))
    got = head.landmarks(head.verts(shape, exp, rolled), rolled)
    # "up" of a yawed head is the picture's up, so the strips choose the same points
    close(got, flat @ roll.transpose(1, 2), 1e-4)


@pytest.mark.parametrize("yaw", [-60, -30, 0, 30, 60])
def test_open_mouth_shows_no_hole(head, yaw):
    """Between the lips only teeth, tongue and the lining are seen: no background, no skin from behind."""
    shape, exp, pose = zeros(head, 3)
    pose[:, 1] = math.radians(yaw)
    pose[:, 3] = torch.tensor([0.0, 10.0, 20.0]).deg2rad()
    verts = head.verts(shape, exp, pose)
    size, scale = 384, 10.0
    image = project(verts, scale)
    seen = raster.rasterize(image, head.faces, (size, size)).pix_to_face
    a, b, c = image[:, head.faces].unbind(2)
    winding = torch.linalg.cross(b - a, c - a)[..., 2]  # z away: a face turned to the viewer has it negative
    front = winding[:, skin_faces(head)].sign()
    assert (front < 0).any() and (front > 0).any()
    marks = pixels(head.landmarks(verts, pose), size, scale)[:, 48:]
    for i in range(3):
        (x0, y0), (x1, y1) = marks[i].amin(0).tolist(), marks[i].amax(0).tolist()
        box = seen[i, y0 : y1 + 1, x0 : x1 + 1]
        opening = Path(marks[i, 12:].numpy())  # polygon of the inner lips
        where = np.stack(np.meshgrid(np.arange(x0, x1 + 1), np.arange(y0, y1 + 1)), -1)
        inside = opening.contains_points(where.reshape(-1, 2), radius=1).reshape(box.shape)
        assert (box.numpy()[inside] >= 0).all()
        box = box[box >= 0]
        behind = (winding[i, box] > 0) & skin_faces(head)[box]
        assert behind.float().mean() < 2e-3
        inner = head.masks["mouth"] + head.masks["teeth"]
        shown = (inner[head.faces[box]].amax(1) > 0.5).sum()
        if i == 2:
            assert shown > 100  # and the open mouth is seen at all


def test_smile_shows_teeth(head):
    shape, _, pose = zeros(head)
    pose[0, 3] = 0.1
    exp = named(head, mouthSmile_L=0.8, mouthSmile_R=0.8, mouthUpperUp_L=0.4, mouthUpperUp_R=0.4)
    seen = raster.rasterize(project(head.verts(shape, exp, pose)), head.faces, (384, 384)).pix_to_face
    tooth = (head.masks["teeth"] > 0.5)[head.faces].all(1)
    assert (seen[seen >= 0][:, None] >= 0).any() and tooth[seen[seen >= 0]].sum() > 300


def test_mean_code_is_framed_as_ffhq(head):
    code = head.mean_code(2, (320, 256))
    assert code.head == "open" and code.size == (320, 256) and len(code) == 2
    close(code.light, head.light_mean.expand(2, 9, 3), 1e-7)
    verts = head.verts(code.shape, code.exp, code.pose)
    marks = buffers.to_pixels(buffers.to_image(head.landmarks(verts, code.pose), code), code.size)[0]
    left, right = marks[36:42].mean(0), marks[42:48].mean(0)
    close(right - left, torch.tensor([64.0, 0.0]), 0.1)
    middle = (left + right) / 2
    mouth = (marks[48] + marks[54]) / 2
    close(middle + 0.1 * (mouth - middle), torch.tensor([127.5, 159.5]), 0.05)
    shown = buffers.render(head, code)
    assert shown.mask.shape == (2, 1, 320, 256) and 0.3 < shown.mask.mean() < 0.9


# -- albedo and masks -------------------------------------------------------------------------------------


def test_albedo_range_and_shape(head):
    g = torch.Generator().manual_seed(0)
    albedo = head.albedo(2 * torch.randn(8, 12, generator=g))
    assert albedo.shape == (8, 3, 256, 256)
    assert albedo.min() >= 0 and albedo.max() <= 1.0


def test_melanin_darkens_skin_monotonically(head):
    tex = torch.zeros(9, 12)
    tex[:, 0] = torch.linspace(-3, 3, 9)
    cheek = head.albedo(tex)[:, :, 90:110, 90:166].mean((2, 3))
    assert (cheek[1:] < cheek[:-1]).all()
    # from very light to very dark skin, in display values
    assert cheek[0].mean() > 0.74 and cheek[-1].mean() < 0.27
    assert (cheek[:, 0] > cheek[:, 1]).all() and (cheek[:, 1] > cheek[:, 2]).all()


@pytest.mark.parametrize(
    "index,mask,channel,sign",
    [(1, "face", 1, -1), (2, "lips", 1, -1), (3, "brows", 0, -1), (8, "scalp", 0, -1)],
)
def test_each_number_acts_on_its_region(head, index, mask, channel, sign):
    tex = torch.zeros(2, 12)
    tex[1, index] = 1.5
    a = head.albedo(tex)
    values = torch.nn.functional.grid_sample(
        (a[1:] - a[:1]), corner_grid(head)[None], align_corners=False, padding_mode="border"
    )[0]
    weight = head.masks[mask][head.faces].flatten()
    inside = (values[channel].flatten() * weight).sum() / weight.sum()
    assert sign * inside > 0.02
    outside = values[channel].flatten()[(head.masks["neck"][head.faces].flatten() > 0.99)].abs().mean()
    assert outside < sign * inside or mask == "face"


def corner_grid(head):
    uv = head.uv[head.uv_faces]
    return torch.stack([uv[..., 0] * 2 - 1, 1 - 2 * uv[..., 1]], -1)


def test_albedo_is_smooth_in_its_numbers(head):
    tex = torch.randn(1, 12, generator=torch.Generator().manual_seed(3)).requires_grad_()
    head.albedo(tex).sum().backward()
    assert torch.isfinite(tex.grad).all() and (tex.grad.abs() > 0).all()


def test_skin_at_texels_is_the_albedo(head):
    tex = torch.randn(2, 12, generator=torch.Generator().manual_seed(4))
    texels = torch.tensor([[100 * 256 + 128, 60 * 256 + 90], [5 * 256 + 3, 150 * 256 + 128]])
    want = head.albedo(tex).flatten(2).gather(2, texels[:, None].expand(-1, 3, -1))
    close(head.skin(tex, texels), want, 1e-6)


def test_masks(head):
    m, v = head.masks, head.template
    names = {
        "skin",
        "face",
        "lips",
        "brows",
        "eyes",
        "iris",
        "pupil",
        "scalp",
        "neck",
        "mouth",
        "teeth",
        "ears",
    }
    assert names <= set(m)
    assert all(x.shape == (len(v),) and 0 <= x.min() and x.max() <= 1 for x in m.values())
    marks = v[head.landmark_index]

    def middle(name):
        return (v * m[name][:, None]).sum(0) / m[name].sum()

    close(middle("lips")[:2], marks[48:68, :2].mean(0), 0.006)
    close(middle("brows")[:2], marks[17:27, :2].mean(0), 0.01)
    close(middle("iris")[:2], marks[36:48, :2].mean(0), 0.006)
    assert middle("scalp")[1] > marks[19, 1] and middle("neck")[1] < marks[8, 1]
    assert m["lips"][head.landmark_index[48:60]].min() > 0.1
    assert np.isclose(float((m["scalp"] * m["face"]).sum() / m["face"].sum()), 0, atol=0.2)


def test_wrong_file_is_refused(head):
    from rig_core.heads.open_head import OpenHead

    with pytest.raises(ValueError, match="not an open head"):
        OpenHead.from_tensors({}, {"kind": "diffusion_rig"})
