"""FLAME and its skinning against tensors recorded from the official code."""

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from rig_core import buffers, checkpoints, face, pipeline
from rig_core.heads import HeadSizes
from rig_core.heads.flame import Flame
from rig_core.heads.lbs import lbs

GOLDEN = Path(__file__).parent / "golden"


def texture_space() -> dict:
    """The procedural texture space of flame_texture.safetensors."""
    x, y = torch.arange(512.0).view(1, -1, 1), torch.arange(512.0).view(-1, 1, 1)
    c, k = torch.arange(3.0).view(1, 1, 3), torch.arange(50.0)
    mean = 127.5 + 60 * torch.sin(2 * math.pi * x / 512 * (c + 1)) * torch.cos(
        2 * math.pi * y / 512 * (c + 2)
    )
    wave = (k + 1) * 0.002 * x[..., None] + 0.006 * (c[..., None] + 1) * y[..., None] + k
    return {"texture_mean": mean, "texture_dirs": 4 * torch.sin(wave)}


@pytest.fixture(scope="module")
def golden():
    return load_file(GOLDEN / "flame_synthetic.safetensors")


@pytest.fixture(scope="module")
def tensors(golden):
    t = {k.split(".")[1]: v for k, v in golden.items() if k.startswith(("flame.", "lmk."))}
    return t | {"uv": golden["uv.vt"], "uv_faces": golden["uv.faces"]}


@pytest.fixture(scope="module")
def flame(tensors):
    return Flame.from_tensors(tensors | texture_space())


def close(a, b, limit):
    assert (a - b).abs().max() < limit


def test_skinning():
    t = load_file(GOLDEN / "deca_lbs.safetensors")
    verts, joints = lbs(
        t["betas"],
        t["pose"],
        t["v_template"],
        t["shapedirs"],
        t["posedirs"],
        t["J_regressor"],
        t["parents"].tolist(),
        t["lbs_weights"],
    )
    close(verts, t["verts"], 2e-6)
    close(joints, t["joints"], 1e-6)


def test_vertices_landmarks_and_centre(flame, golden):
    verts = flame.verts(golden["shape"], golden["exp"], golden["pose"])
    close(verts, golden["verts"], 1e-6)
    close(flame.landmarks(verts, golden["pose"]), golden["landmarks2d"], 1e-6)
    close(flame.landmarks3d(verts), golden["landmarks3d"], 1e-6)
    close(flame.centre(verts), golden["ffhq_center"], 1e-6)


def test_landmarks_from_few_vertices(tensors, golden):
    names = ("static_lmk_faces_idx", "dynamic_lmk_faces_idx")
    flame = Flame.from_tensors(tensors | {k: 3 * (tensors[k] % 60) for k in names})
    args = golden["shape"], golden["exp"], golden["pose"]
    few = flame.verts(*args, flame.landmark_vertices)
    assert few.shape[1] == len(flame.landmark_vertices) < len(flame.template)
    close(flame.landmarks(few, args[2]), flame.landmarks(flame.verts(*args), args[2]), 1e-7)


@pytest.mark.parametrize("degrees,row", [(0, 0), (12.4, 12), (80, 39), (-1, 40), (-39, 78), (-70, 78)])
def test_contour_follows_yaw(flame, degrees, row):
    pose = torch.zeros(1, 6)
    pose[0, 1] = math.radians(degrees)
    verts = flame.verts(torch.zeros(1, 100), torch.zeros(1, 50), pose)
    corner = verts[0, flame.faces[flame.contour_face[row]]]
    want = (corner * flame.contour_bary[row][..., None]).sum(1)
    close(flame.landmarks(verts, pose)[0, :17], want, 1e-7)


def test_decode_vertices(flame):
    t = load_file(GOLDEN / "flame_decode.safetensors")
    close(flame.verts(t["shape"], t["exp"], t["pose"]), t["verts"], 1e-6)
    turned = flame.verts(t["shape"], t["exp"], t["pose_swapped"])
    moved = turned + (t["ffhq_center"] - flame.centre(turned))[:, None]
    close(moved, t["aligned_verts"], 1e-6)


def decoded():
    """Two faces of DiffusionRig's decode, [2] FaceCode, and what it made of them."""
    t, d = (load_file(GOLDEN / f"{n}.safetensors") for n in ("flame_decode", "diffrig_deca_decode_item"))
    code = face.FaceCode(
        shape=t["shape"],
        tex=torch.zeros(2, 50),
        exp=t["exp"],
        pose=t["pose"],
        cam=d["cam"],
        light=d["light"],
        crop=d["crop_tform"],
        size=(96, 96),
        head="flame",
    )
    return code, t, d


def test_recentring_equals_the_published_one(flame):
    """Vertices and maps of decode(align_ffhq=True, ffhq_center) for exchanged poses."""
    code, t, d = decoded()
    got = pipeline.recentre(flame, code, code.replace(pose=t["pose_swapped"]))
    verts = flame.verts(got.shape, got.exp, got.pose)
    moved, want = buffers.to_image(verts, got), buffers.to_image(t["aligned_verts"], code)
    close(moved[..., :2], want[..., :2], 2e-6)
    assert (moved - buffers.to_image(verts, code))[..., :2].abs().max() > 1e-2  # it matters
    b = buffers.render(flame, got[0], albedo=d["albedo_uv"])
    assert (b.mask != d["aligned_alpha"]).sum() <= 2  # the camera moved, not the mesh: rounding at edges
    same = (b.mask == d["aligned_alpha"]).float()
    for got, name in ((b.rendered, "aligned_rendered"), (b.normal, "aligned_normal")):
        assert ((got - d[name]) * same).abs().mean() < 2e-5, name


def test_a_mean_shape_is_recentred_too(flame):
    code, _, _ = decoded()
    edited = code.replace(shape=code.shape.mean(0, keepdim=True).expand(2, -1), light=code.light.flip(0))
    got = pipeline.recentre(flame, code, edited)
    assert (got.cam - code.cam)[:, 1:].abs().max() > 1e-4 and torch.equal(got.cam[:, 0], code.cam[:, 0])
    assert torch.equal(got.light, edited.light) and torch.equal(got.shape, edited.shape)
    for a, b in ((code, got), (code[0], pipeline.recentre(flame, code[0], edited))):  # one source for many
        where = [
            buffers.to_image(flame.centre(flame.verts(c.shape, c.exp, c.pose))[:, None], c) for c in (a, b)
        ]
        if len(a) == 1:
            where[1] = where[1][:1]  # the second face is in a crop of its own
        close(where[0][..., :2], where[1][..., :2], 2e-6)
    assert torch.equal(pipeline.recentre(flame, code, code).cam, code.cam)


def test_turning_keeps_the_face_in_place(flame):
    code, _, _ = decoded()
    for angles in ({"yaw": 20.0}, {"pitch": -15.0}, {"roll": 30.0}, {"jaw": 12.0}):
        turned = pipeline.turn(flame, code, **angles)
        before, after = (
            buffers.to_image(flame.centre(flame.verts(c.shape, c.exp, c.pose))[:, None], c)
            for c in (code, turned)
        )
        close(before[..., :2], after[..., :2], 5e-6)
        old, new = (face.axis_angle_to_matrix(c.pose[:, :3]) for c in (code, turned))
        step = face.matrix_to_axis_angle(new @ old.transpose(1, 2)).rad2deg()
        want = [-angles.get("pitch", 0.0), angles.get("yaw", 0.0), angles.get("roll", 0.0)]
        close(step, torch.tensor(want).expand(2, 3), 1e-2)
        jaw = (turned.pose - code.pose)[:, 3].rad2deg()
        close(jaw, torch.full((2,), angles.get("jaw", 0.0)), 1e-4)
    open_head = checkpoints.load_head()
    plain = open_head.mean_code(1, 64)
    assert torch.equal(pipeline.turn(open_head, plain, yaw=20.0).cam, plain.cam)  # it turns on its neck


def test_what_flame_has_no_names_for(flame):
    code, _, _ = decoded()
    with pytest.raises(ValueError, match="no expression 'mouthSmile_L', only: numbers without names"):
        pipeline.turn(flame, code, mouthSmile_L=0.5)
    with pytest.raises(ValueError, match="the eyes of the flame head rest"):
        pipeline.turn(flame, code, gaze=(5.0, 0.0))
    assert flame.expressions.shape == (0, 50) and flame.expression_names == []


def test_texture(flame):
    t = load_file(GOLDEN / "flame_texture.safetensors")
    albedo = flame.albedo(t["tex"])
    assert albedo.shape == (1, 3, 256, 256)
    close(albedo[:, :, ::2, ::2], t["albedo_half"], 1e-5)
    texels = torch.tensor([[0, 257, 65535]])
    close(flame.skin(t["tex"], texels), albedo[0, :, [0, 1, 255], [0, 1, 255]][None], 1e-7)


def test_mean_code_centres_the_eyes(flame):
    code = flame.mean_code(2, (96, 128))
    assert isinstance(code, face.FaceCode) and code.head == "flame" and code.size == (96, 128)
    assert code.pose.shape == (2, 6) and code.shape.shape == (2, 100)
    inner = flame.landmarks(flame.template[None], code.pose[:1])[:, 17:]
    apart = (inner[0, 25:31, 0].mean() - inner[0, 19:25, 0].mean()) * code.cam[0, 0]
    assert abs(apart - 0.5) < 1e-5
    centre = flame.centre(flame.template[None])[0, :2] + code.cam[0, 1:]
    close(centre, torch.zeros(2), 1e-6)


def test_without_texture(tensors):
    with pytest.raises(RuntimeError, match="FLAME_texture.npz"):
        Flame.from_tensors(tensors).albedo(torch.zeros(1, 50))


def test_missing_and_unfitting_tensors(tensors):
    with pytest.raises(ValueError, match="weights missing"):
        Flame.from_tensors({k: v for k, v in tensors.items() if k != "weights"})
    with pytest.raises(ValueError, match="posedirs has shape"):
        Flame.from_tensors(tensors | {"posedirs": tensors["posedirs"][:-1]})
    with pytest.raises(ValueError, match="shapedirs"):
        Flame.from_tensors(tensors | {"shapedirs": tensors["shapedirs"][..., :320]})


def test_smaller_model(tensors, golden):
    """Fewer coefficients are the first columns of each kind."""
    small = Flame.from_tensors(tensors, HeadSizes(shape=10, tex=50, exp=5, pose=6))
    shape, exp = golden["shape"].clone(), golden["exp"].clone()
    shape[:, 10:], exp[:, 5:] = 0, 0
    full = Flame.from_tensors(tensors).verts(shape, exp, golden["pose"])
    close(small.verts(shape[:, :10], exp[:, :5], golden["pose"]), full, 1e-6)
