"""Stand-ins of the official files: their names, layout, keys and shapes, with contents made here.

The head is the pack's own as seen from its middle, a grid of directions with FLAME's numbers of vertices,
triangles and texture coordinates: renders look like a face, and landmarks lie where they belong. DECA is
random but for its last layer, which says "a face that fills the crop" and varies a little with the picture.
"""

from __future__ import annotations

import functools
import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from rig_core import checkpoints, raster
from rig_core.estimators.deca import PARTS
from rig_core.estimators.identity import ArcFace, ArcFaceConfig
from rig_core.estimators.parsing import BiSeNet
from rig_core.face import axis_angle_to_matrix
from rig_core.heads.flame import LIGHT_MEAN
from tests import python2_pickle
from tests.golden_files import FOLDER, relight_pair, small_rig

ROWS, COLUMNS, POLE = 81, 62, 15
VERTICES, FACES, CORNERS = ROWS * COLUMNS + 1, 9976, ROWS * (COLUMNS + 1) + POLE  # 5023, 9976, 5118
TOP, BOTTOM = math.radians(80), math.radians(-66)
MAP = (256, 512)  # the open head by direction


def recipe(shapes: dict, seed: int) -> dict[str, Tensor]:
    """Random weights with statistics: one generator over the sorted keys."""
    g, out = torch.Generator().manual_seed(seed), {}
    for k in sorted(shapes):
        shape = shapes[k]
        if k.endswith("num_batches_tracked"):
            out[k] = torch.zeros(shape, dtype=torch.long)
        elif k.endswith("running_var"):
            out[k] = 0.5 + torch.rand(shape, generator=g)
        else:
            r = torch.randn(shape, generator=g)
            plain = 0.1 * r if k.endswith("running_mean") else 0.05 * r
            norm = 1 + 0.1 * r if k.endswith("weight") else plain
            out[k] = r / math.sqrt(math.prod(shape[1:])) if len(shape) > 1 else norm
    return out


# ------------------------------------------------------------------------------------------------ the head


@functools.cache
def _seen() -> dict[str, Tensor]:
    """The open head by direction, [C,256,512] each: azimuth -pi..pi to the right, elevation downwards."""
    head = checkpoints.load_head()
    radius = head.template.norm(dim=1)
    azimuth = torch.atan2(head.template[:, 0], head.template[:, 2])[head.faces]
    azimuth = azimuth[:, :1] + torch.remainder(azimuth - azimuth[:, :1] + math.pi, 2 * math.pi) - math.pi
    elevation = torch.asin(head.template[:, 1] / radius)[head.faces]
    soup = torch.stack([azimuth / math.pi, elevation * (-2 / math.pi), 10 - radius[head.faces]], -1)
    soup = torch.cat([soup.flatten(0, 1) + torch.tensor([2.0 * k, 0, 0]) for k in (-1, 0, 1)])
    faces = torch.arange(len(soup)).view(-1, 3)
    names = ("face", "scalp", "neck", "ears", "lips", "eyes")
    values = torch.stack([radius, *(head.masks[k] for k in names)], -1)[head.faces]
    values = torch.cat([values, head.uv[head.uv_faces]], -1).flatten(0, 1).repeat(3, 1)
    fragments = raster.rasterize(soup[None], faces, MAP)
    seen = raster.interpolate_verts(fragments, faces, values[None])
    weight = fragments.bary.sum(-1)[:, None]
    for _ in range(24):  # holes, such as the neck's, take what is around them
        seen, weight = (torch.where(weight > 0, v, F.avg_pool2d(v, 3, 1, 1)) for v in (seen, weight))
    seen = (seen / weight.clamp_min(1e-6))[0]
    texture = head.albedo(torch.zeros(1, head.sizes.tex))
    at = seen[7:].permute(1, 2, 0) * torch.tensor([2.0, -2.0]) + torch.tensor([-1.0, 1.0])
    colour = F.grid_sample(texture, at[None], align_corners=False)[0]
    low = torch.arange(MAP[0])[:, None] > MAP[0] * 0.73  # where the neck meets the chin
    radius = torch.where(low, F.avg_pool2d(seen[None, :1], 17, 1, 8, count_include_pad=False)[0], seen[:1])
    return {"radius": radius, "colour": colour} | {k: seen[i + 1 : i + 2] for i, k in enumerate(names)}


def _azimuth(u: Tensor) -> Tensor:
    """-pi..pi along the grid; the columns are closer at the front."""
    return u - 0.55 * torch.sin(u)


def _look(image: Tensor, azimuth: Tensor, elevation: Tensor) -> Tensor:
    """Values [C,...] of a map of `_seen` at directions [...]."""
    at = torch.stack([azimuth / math.pi, elevation * (-2 / math.pi)], -1).reshape(1, 1, -1, 2)
    found = F.grid_sample(image[None], at, padding_mode="border", align_corners=False)
    return found.reshape(len(image), *azimuth.shape)


def _point(azimuth: Tensor, elevation: Tensor, radius: Tensor) -> Tensor:
    flat = elevation.cos()
    return radius[..., None] * torch.stack([flat * azimuth.sin(), elevation.sin(), flat * azimuth.cos()], -1)


@functools.cache
def head() -> dict[str, Tensor]:
    """A head as Flame.from_tensors takes it, its masks as published (the neck without its rim, no skin)."""
    verts, uv = _grid()
    faces, uv_faces = _triangles()
    assert (len(verts), len(faces), len(uv)) == (VERTICES, FACES, CORNERS)
    masks = {f"mask.{k}": v.float() for k, v in _regions(verts).items()}
    mesh = {"v_template": verts.double(), "f": faces, "uv": uv, "uv_faces": uv_faces}
    return mesh | _modes(verts) | _landmarks() | _texture() | masks


@functools.cache
def _grid() -> tuple[Tensor, Tensor]:
    """Vertices [5023,3], texture coordinates [5118,2]."""
    u = (torch.arange(COLUMNS + 1) / COLUMNS * 2 - 1) * math.pi
    azimuth, elevation = torch.meshgrid(_azimuth(u), torch.linspace(TOP, BOTTOM, ROWS), indexing="xy")
    points = _point(azimuth, elevation, _look(_seen()["radius"], azimuth, elevation)[0])
    verts = torch.cat([points[:, :-1].flatten(0, 1), points[0].mean(0, keepdim=True)])
    s, v = torch.meshgrid(u / (2 * math.pi) + 0.5, torch.linspace(0.98, 0.02, ROWS), indexing="xy")
    pole = torch.stack([(torch.arange(POLE) + 0.5) / POLE, torch.full((POLE,), 0.99)], -1)
    uv = torch.cat([torch.stack([s, v], -1).flatten(0, 1), pole]).double()
    return verts, ((uv * 1e6).round() / 1e6).float()  # six decimals, as in the file


def _triangles() -> tuple[Tensor, Tensor]:
    """Of the grid and the pole, and its corners in the texture; six of the rim are left out."""
    faces, corners = [], []
    for j in range(COLUMNS):
        pole = ROWS * (COLUMNS + 1) + j * POLE // COLUMNS
        faces.append([ROWS * COLUMNS, j, (j + 1) % COLUMNS])
        corners.append([pole, j, j + 1])
    for i in range(ROWS - 1):
        for j in range(COLUMNS):
            a, b = (i * COLUMNS + k for k in (j, (j + 1) % COLUMNS))
            faces += [[a, a + COLUMNS, b], [b, a + COLUMNS, b + COLUMNS]]
            a = i * (COLUMNS + 1) + j
            corners += [[a, a + COLUMNS + 1, a + 1], [a + 1, a + COLUMNS + 1, a + COLUMNS + 2]]
    return torch.tensor(faces[:FACES]), torch.tensor(corners[:FACES])


def _modes(verts: Tensor) -> dict[str, Tensor]:
    """Smooth random shapes, expressions about the mouth, pose correctives, joints and weights."""
    g = torch.Generator().manual_seed(1)
    wave = torch.randn(3, 400, generator=g) * torch.linspace(10, 60, 400)
    phase = torch.rand(400, generator=g) * 6.3
    size = 2e-3 / (1 + torch.arange(400) % 300) ** 0.5
    ripple = torch.sin(verts @ wave + phase) * size
    mouth = torch.exp(-((verts - torch.tensor([0.0, -0.05, 0.09])) / 0.04).square().sum(1))
    ripple[:, 300:] *= 4 * mouth[:, None]
    shapedirs = (ripple[:, None] * F.normalize(verts, dim=1)[:, :, None]).double()
    posedirs = torch.sin(verts @ (20 * torch.randn(3, 108, generator=g))).view(-1, 3, 36) * 5e-4
    joints = [[0, -0.16, -0.03], [0, -0.09, -0.02], [0, -0.03, 0.02], [0.03, 0.05, 0.07], [-0.03, 0.05, 0.07]]
    joints = torch.tensor(joints)
    near = torch.cdist(joints, verts).topk(40, largest=False).indices
    regressor = torch.zeros(5, VERTICES, dtype=torch.float64)
    regressor.scatter_(1, near, (torch.rand(5, 40, generator=g) + 0.5).double())
    regressor /= regressor.sum(1, keepdim=True)
    x, y, z = verts.unbind(1)
    jaw = torch.sigmoid((-0.055 - y + 0.3 * (z - 0.09)) / 0.008) * torch.sigmoid((z - 0.0) / 0.01)
    root = torch.sigmoid((-0.12 - y) / 0.01)
    weights = torch.stack([root, (1 - root) * (1 - jaw), (1 - root) * jaw, 0 * x, 0 * x], 1).double()
    tree = torch.tensor([[2**32 - 1, 0, 1, 1, 1], [0, 1, 2, 3, 4]])
    return {
        "shapedirs": shapedirs,
        "posedirs": posedirs.double(),
        "J_regressor": regressor,
        "weights": weights,
        "kintree_table": tree,
    }


def _landmarks() -> dict[str, Tensor]:
    """The open head's landmarks as places on triangles; the contour at 79 yaws, 0..39 and -1..-39 degrees."""
    open_head = checkpoints.load_head()
    yaw = torch.cat([torch.arange(40), -torch.arange(1, 40)]).deg2rad()
    pose = torch.zeros(79, 8)
    pose[:, 1] = yaw
    shape, exp = (torch.zeros(79, n) for n in (open_head.sizes.shape, open_head.sizes.exp))
    verts = open_head.verts(shape, exp, pose, open_head.landmark_vertices)
    points = open_head.landmarks(verts, pose) @ axis_angle_to_matrix(pose[:, :3])  # turned back
    face, bary = _place(points)
    return {
        "static_lmk_faces_idx": face[0, 17:],
        "static_lmk_bary_coords": bary[0, 17:].double(),
        "dynamic_lmk_faces_idx": face[:, :17],
        "dynamic_lmk_bary_coords": bary[:, :17],
        "full_lmk_faces_idx": face[:1],
        "full_lmk_bary_coords": bary[:1],
    }


def _place(points: Tensor) -> tuple[Tensor, Tensor]:
    """Triangles [...] and barycentric coordinates [...,3] of the grid in the directions of points [...,3]."""
    azimuth = torch.atan2(points[..., 0], points[..., 2])
    u = azimuth.clone()
    for _ in range(30):  # the inverse of `_azimuth`
        u = u - (_azimuth(u) - azimuth) / (1 - 0.55 * u.cos())
    elevation = torch.asin(points[..., 1] / points.norm(dim=-1))
    column, row = (u / math.pi + 1) / 2 * COLUMNS, (TOP - elevation) / (TOP - BOTTOM) * (ROWS - 1)
    i, j = row.floor(), column.floor()
    a, b = row - i, column - j
    low = a + b > 1
    face = COLUMNS + 2 * (i * COLUMNS + j).long() + low
    first = torch.where(low, 1 - a, 1 - a - b)
    second, third = torch.where(low, 1 - b, a), torch.where(low, a + b - 1, b)
    return face, torch.stack([first, second, third], -1)


def _texture(columns: int = 52) -> dict[str, Tensor]:
    """The open head's mean skin and smooth random stains, blue, green, red, 0..255."""
    at = (torch.arange(512) + 0.5) / 512
    v, s = torch.meshgrid(1 - at, at, indexing="ij")
    azimuth, elevation = _azimuth((s - 0.5) * 2 * math.pi), TOP + (0.98 - v) / 0.96 * (BOTTOM - TOP)
    mean = _look(_seen()["colour"], azimuth, elevation).permute(1, 2, 0).flip(2) * 255
    g = torch.Generator().manual_seed(2)
    wave, phase = torch.randn(2, columns, generator=g) * 12, torch.rand(columns, generator=g) * 6.3
    stains = torch.sin(torch.stack([s, v], -1) @ wave + phase) * 6 / (1 + torch.arange(columns)) ** 0.5
    colour = torch.randn(3, columns, generator=g)
    return {"texture_mean": mean, "texture_dirs": stains[:, :, None] * colour}


def _regions(verts: Tensor) -> dict[str, Tensor]:
    """The published regions of the head, [V] each."""
    azimuth, elevation = torch.atan2(verts[:, 0], verts[:, 2]), torch.asin(verts[:, 1] / verts.norm(dim=1))
    seen = {k: _look(v, azimuth, elevation)[0] > 0.5 for k, v in _seen().items() if len(v) == 1}
    left, rim = verts[:, 0] > 0, elevation < BOTTOM + 0.05
    marks = _on(_landmarks(), verts)
    near = lambda points, reach: torch.cdist(verts, points).amin(1) < reach  # noqa: E731
    masks = {
        "eye_region": near(marks[36:48], 0.02),
        "neck": seen["neck"] & ~rim,
        "left_eyeball": seen["eyes"] & left,
        "right_eyeball": seen["eyes"] & ~left,
        "right_ear": seen["ears"] & ~left,
        "right_eye_region": near(marks[36:42], 0.012),
        "forehead": seen["face"] & (verts[:, 1] > marks[17:27, 1].mean()),
        "lips": seen["lips"],
        "nose": near(marks[27:36], 0.012),
        "scalp": seen["scalp"],
        "boundary": rim,
        "face": seen["face"] & ~rim,
        "left_ear": seen["ears"] & left,
        "left_eye_region": near(marks[42:48], 0.012),
    }
    return masks


def _on(landmarks: dict[str, Tensor], verts: Tensor) -> Tensor:
    """The 68 landmarks [68,3] of the resting contour."""
    corner = verts[_triangles()[0][landmarks["full_lmk_faces_idx"][0]]]
    return (corner * landmarks["full_lmk_bary_coords"][0, :, :, None]).sum(1)


# ------------------------------------------------------------------------------------------------ the files


@pytest.fixture(scope="session")
def official(tmp_path_factory) -> Iterator[Path]:
    """A folder with all files of the head and of DECA, one for all tests."""
    folder = tmp_path_factory.getbasetemp() / "official"
    if not folder.exists():
        write_flame(folder)
        write_deca(folder)
    yield folder
    shutil.rmtree(folder, ignore_errors=True)  # hundreds of megabytes


def write_flame(folder: Path, t: dict | None = None, skin: Tensor | None = None, year: int = 2020) -> None:
    """FLAME's files and those of DECA's folder data, out of t as Flame.from_tensors takes it.

    skin [h,w] 0 or 1 over the texture coordinates. year: 2020 has chumpy's arrays, 2023 plain ones.
    """
    t, skin = t or head(), _skin() if skin is None else skin
    lists = {k[5:]: v.nonzero()[:, 0].numpy() for k, v in t.items() if k.startswith("mask.")}
    folder.mkdir(parents=True, exist_ok=True)
    numbers = {k: t[k].double().numpy() for k in ("v_template", "shapedirs", "posedirs", "weights")}
    chumpy = python2_pickle.Ch if year == 2020 else np.asarray
    model = {
        "f": t["f"].numpy().astype(np.uint32),
        "J_regressor": python2_pickle.Csc(t["J_regressor"].numpy()),
        "kintree_table": t["kintree_table"].numpy(),
        "J": t["J_regressor"].numpy() @ numbers["v_template"],
        "bs_style": "lbs",
        "weights": numbers["weights"],
        "posedirs": numbers["posedirs"],
        "v_template": chumpy(numbers["v_template"]),
        "shapedirs": chumpy(numbers["shapedirs"]),
        "bs_type": "lrotmin",
    }
    name = "generic_model.pkl" if year == 2020 else "flame2023.pkl"
    (folder / name).write_bytes(python2_pickle.dumps(model))
    marks = {k: v.numpy() for k, v in t.items() if "_lmk_" in k}
    marks |= {k: torch.from_numpy(v) for k, v in marks.items() if k.startswith("dynamic")}
    np.save(folder / "landmark_embedding.npy", np.array(marks, dtype=object), allow_pickle=True)
    _write_obj(folder / "head_template.obj", t)
    arrays = {"mean": t["texture_mean"].numpy(), "tex_dir": t["texture_dirs"].numpy()}
    np.savez(folder / "FLAME_texture.npz", **arrays, vt=t["uv"].numpy(), ft=t["uv_faces"].numpy())
    (folder / "FLAME_masks.pkl").write_bytes(python2_pickle.dumps(lists, 0))
    Image.fromarray(skin.mul(255).byte().numpy()).convert("RGBA").save(folder / "uv_face_mask.png")


def _write_obj(path: Path, t: dict[str, Tensor]) -> None:
    lines = ["# Blender v2.80 (sub 75) OBJ File: 'head.blend'", "mtllib template.mtl"]
    lines += ["v {:.6f} {:.6f} {:.6f}".format(*v) for v in t["v_template"].tolist()]
    lines += [f"vt {a:.6f} {b:.6f}" for a, b in t["uv"].tolist()]
    lines += ["usemtl None", "s off"]
    for face, corner in zip((t["f"] + 1).tolist(), (t["uv_faces"] + 1).tolist()):
        lines.append("f " + " ".join(f"{a}/{b}" for a, b in zip(face, corner)))
    path.write_text("\n".join(lines) + "\n")


def _skin() -> Tensor:
    """The face without its eyes over the texture coordinates, [256,256] 0 or 1."""
    at = (torch.arange(256) + 0.5) / 256
    v, s = torch.meshgrid(1 - at, at, indexing="ij")
    azimuth, elevation = _azimuth((s - 0.5) * 2 * math.pi), TOP + (0.98 - v) / 0.96 * (BOTTOM - TOP)
    face, eyes = (_look(_seen()[k], azimuth, elevation)[0] for k in ("face", "eyes"))
    return ((face > 0.5) & (eyes < 0.3)).float()


def deca_weights() -> dict[str, Tensor]:
    """E_flame that sees a face that fills its crop, whatever the picture, and guesses at the rest."""
    state = recipe(json.loads((FOLDER / "deca_keys.json").read_text()), 9009)
    marks = _on(_landmarks(), head()["v_template"].float())[:, :2]
    low, high = marks.amin(0), marks.amax(0)
    scale = 2 / (1.375 * float((high - low).mean()))
    mean = {k: [0.0] * n for k, n in PARTS.items()}
    mean["cam"] = [scale, *(-(low + high) / 2).tolist()]
    mean["light"] = [v for v in LIGHT_MEAN for _ in range(3)]
    much = {"shape": 0.6, "tex": 0.6, "exp": 0.3, "pose": 0.1, "cam": 1e-4, "light": 0.1}
    state["layers.2.weight"] *= torch.cat([torch.full((n, 1), much[k]) for k, n in PARTS.items()])
    state["layers.2.bias"] = torch.tensor([v for k in PARTS for v in mean[k]])
    return state


def write_deca(folder: Path, stream: bool = False) -> Path:
    """deca_model.tar. stream: as PyTorch wrote it before 1.6."""
    detail = {"encoder.conv1.weight": torch.zeros(64, 3, 7, 7), "layers.2.bias": torch.zeros(128)}
    tree = {
        "E_flame": deca_weights(),
        "E_detail": detail,
        "D_detail": {"l1.0.weight": torch.zeros(8192, 181)},
    }
    path = folder / "deca_model.tar"
    torch.save(tree, path, _use_new_zipfile_serialization=not stream)
    return path


def write_diffusion_rig(folder: Path) -> Path:
    """model050000.pt, a small denoiser of 64 px under the published keys."""
    torch.save(small_rig().state_dict(), folder / "model050000.pt")
    return folder / "model050000.pt"


def write_difareli(folder: Path) -> Path:
    """ImgCond_*.pt and ImgEncoder_*.pt, a small pair of 32 px under the published keys."""
    names = [f"{k}_ema_0.9999_085000.pt" for k in ("ImgCond", "ImgEncoder")]
    for name, state in zip(names, relight_pair()):
        torch.save(state, folder / name)
    return folder / names[0]


def write_arcface(folder: Path) -> Path:
    """BEST_checkpoint_r18.tar, narrow, with the published 512 numbers."""
    torch.manual_seed(5)
    state = ArcFace(ArcFaceConfig(32, 4, (1, 1, 1, 1), 512)).state_dict()
    path = folder / "BEST_checkpoint_r18.tar"
    torch.save({f"module.{k}": v for k, v in state.items()}, path)
    return path


def write_parser(folder: Path) -> Path:
    """79999_iter.pth."""
    torch.manual_seed(6)
    torch.save(BiSeNet().state_dict(), folder / "79999_iter.pth")
    return folder / "79999_iter.pth"
