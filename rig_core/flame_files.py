"""FLAME's and DECA's files: which file of a folder is what, and the tensors of a head that are in them.

The names are the published ones, side by side as DECA's folder `data` has them, or in sub-folders. Reading
them is the business of `files`; what is made of the tensors that of heads.flame.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from . import files
from .arrays import Sparse
from .files import CheckpointError, one_line
from .heads.flame import TEXTURE

NAMES = {
    "model": (
        *("flame.safetensors", "generic_model.pkl"),
        *("flame2023.pkl", "flame2023_Open.pkl", "flame2023_no_jaw.pkl"),
    ),
    "landmarks": ("landmark_embedding.npy",),
    "template": ("head_template.obj",),
    "texture": ("FLAME_texture.npz", "FLAME_albedo_from_BFM.npz"),
    "masks": ("FLAME_masks.pkl",),
    "skin": ("uv_face_mask.png",),
    "encoder": ("deca.safetensors", "deca_model.tar"),
}
"""What a file is for -> its names, the first one that is found counts. flame.safetensors is a whole converted
head, deca.safetensors DECA's converted encoder."""
DECA_DATA = "get it from the folder data of https://github.com/yfeng95/DECA (for research only)"
NEEDED = {
    "model": "generic_model.pkl (the head model FLAME 2020, as DECA has it) is missing: register at "
    "https://flame.is.tue.mpg.de (for research only)",
    "landmarks": f"landmark_embedding.npy (DECA's landmarks on FLAME) is missing: {DECA_DATA}",
    "template": f"head_template.obj (FLAME's texture coordinates) is missing: {DECA_DATA}",
}
NUMBERS = ("v_template", "shapedirs", "posedirs", "J_regressor", "weights")
LANDMARKS = [f"{k}_lmk_{x}" for k in ("static", "dynamic", "full") for x in ("faces_idx", "bary_coords")]
MOST = 2**25  # numbers in a matrix that a file stores as a sparse one
COLUMNS = 50  # of the texture space, as DECA has it


def find(path: str | Path) -> dict[str, Path]:
    """The files of a folder and its sub-folders by what they are for, see NAMES.

    path: the folder, or one of the files, which then counts for its kind. What a folder FLAME2020 lacks is
    looked for beside it, too. Raises CheckpointError for a file that is none of these.
    """
    path = Path(path)
    folder = path if path.is_dir() else path.parent
    places = [folder, *sorted(p for p in folder.glob("*") if p.is_dir())]
    if folder.name.lower().startswith("flame"):
        places.append(folder.parent)
    found = {}
    for kind, names in NAMES.items():
        there = [place / name for name in names for place in places if (place / name).is_file()]
        if there:
            found[kind] = there[0]
    return found if path.is_dir() else found | {_kind(path): path}


def _kind(path: Path) -> str:
    """What a file is for, by its name or else by its ending."""
    for same in (lambda name: name == path.name, lambda name: Path(name).suffix == path.suffix):
        for kind, names in NAMES.items():
            if any(map(same, names)):
                return kind
    raise CheckpointError(f"{path}: not one of FLAME's files: choose generic_model.pkl or deca_model.tar")


def tensors(path: str | Path) -> dict[str, Tensor]:
    """What `Flame.from_tensors` takes, from a folder's files, or from those beside one of them (see `find`).

    Of the texture every second texel and 50 columns: all that is used. A converted head comes as it is.
    Raises CheckpointError, which names the file that is missing, and where it is to be had, or the odd one.
    """
    found = find(path)
    if "model" in found and found["model"].suffix == ".safetensors":
        return files.read(found["model"])[0]
    for kind, text in NEEDED.items():
        if kind not in found:
            raise CheckpointError(f"{path}: {text}")
    tree = _dictionary(found["model"], "FLAME's head model", (*NUMBERS, "f", "kintree_table"))
    t = {k: tree[k].float() for k in NUMBERS} | {"f": tree["f"].long()}
    t["kintree_table"] = tree["kintree_table"].long()
    tree = _dictionary(found["landmarks"], "DECA's landmarks on FLAME", LANDMARKS)
    t |= {k: tree[k].long() if k.endswith("idx") else tree[k].float() for k in LANDMARKS}
    faces, t["uv"], t["uv_faces"] = _obj(found["template"])
    if not torch.equal(faces, t["f"]):
        raise CheckpointError(
            f"{found['template']}: its triangles are not those of {found['model'].name}: get it again"
        )
    if "texture" in found:
        t |= _texture(found["texture"])
    masks = _masks(found["masks"], len(t["v_template"])) if "masks" in found else {}
    if "skin" in found or masks:
        skin = _seen(found["skin"], t) if "skin" in found else torch.ones(len(t["v_template"]))
        masks["skin"] = skin * (1 - masks.get("left_eyeball", 0)) * (1 - masks.get("right_eyeball", 0))
    return t | {f"mask.{k}": v for k, v in masks.items()}


def _dictionary(path: Path, what: str, keys) -> dict[str, Tensor]:
    """The tensors of a file that holds a dictionary; those of keys must be there. Raises CheckpointError."""
    tree = files.read_tree(path)
    lacking = [k for k in keys if k not in tree] if isinstance(tree, dict) else ["a dictionary"]
    if lacking:
        raise CheckpointError(f"{path}: expected {what}, but it lacks {', '.join(lacking)}: wrong file?")
    try:
        return {str(k): _tensor(v) for k, v in tree.items() if k in keys or not keys}
    except (RuntimeError, TypeError, ValueError) as e:
        raise CheckpointError(f"{path}: {what} holds odd numbers ({one_line(e)}): get it again") from e


def _tensor(value) -> Tensor:
    """A tensor of what a pickle may hold in its place: a sparse matrix, or rows in a list."""
    if isinstance(value, Sparse):
        return value.dense(MOST)
    if isinstance(value, list | tuple):
        return torch.stack([_tensor(v) for v in value])
    return torch.as_tensor(value)


def _obj(path: Path) -> tuple[Tensor, Tensor, Tensor]:
    """Triangles [F,3], texture coordinates [T,2] and their triangles [F,3] of a Wavefront file."""
    uv, corners = [], []
    try:
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            kind, *rest = line.split() or [""]
            if kind == "vt":
                uv.append([float(v) for v in rest[:2]])
            elif kind == "f":
                corners.append([[int(i) - 1 for i in corner.split("/")[:2]] for corner in rest])
        corners, uv = torch.tensor(corners), torch.tensor(uv)
        if corners.shape[1:] != (3, 2) or corners[..., 1].max() >= len(uv) or corners.min() < 0:
            raise ValueError("its corners are not three numbers of a vertex and of its texture coordinate")
    except (ValueError, IndexError, RuntimeError, OSError) as e:
        raise CheckpointError(f"{path}: not FLAME's head_template.obj ({one_line(e)}): get it again") from e
    return corners[..., 0], uv, corners[..., 1]


def _texture(path: Path) -> dict[str, Tensor]:
    """Mean and directions of the texture space, blue, green, red, 0..255; the Basel Face Model's is 0..1."""
    tree = files.read_tree(path)
    kinds = (("mean", "tex_dir", 1.0), ("MU", "PC", 255.0))
    found = [
        k for k in kinds if isinstance(tree, dict) and all(isinstance(tree.get(n), Tensor) for n in k[:2])
    ]
    if not found:
        raise CheckpointError(
            f"{path}: expected a texture space (mean and tex_dir, or MU and PC): get FLAME_texture.npz"
        )
    mean, directions, scale = found[0]
    side = round((tree[mean].numel() / 3) ** 0.5)
    step = side // TEXTURE
    try:
        images = tree[mean].reshape(side, side, 3), tree[directions].reshape(side, side, 3, -1)[..., :COLUMNS]
        small = [v[::step, ::step].double().mul(scale).float() for v in images]
    except (RuntimeError, ValueError) as e:
        raise CheckpointError(f"{path}: a texture space of odd sizes ({one_line(e)}): get it again") from e
    return dict(zip(("texture_mean", "texture_dirs"), small))


def _masks(path: Path, count: int) -> dict[str, Tensor]:
    """Vertex masks [V] 0 or 1 of the published lists of vertices; the rim of the neck belongs to the neck."""
    lists = _dictionary(path, "FLAME's vertex masks", ())
    masks = {}
    for name, index in lists.items():
        inside = ((index >= 0) & (index < count)).all()
        if index.ndim != 1 or index.is_floating_point() or not inside:
            raise CheckpointError(
                f"{path}: '{name}' holds no vertices of a head of {count}: wanted is FLAME_masks.pkl, not "
                "FLAME_masks_face-id.pkl"
            )
        masks[name] = torch.zeros(count).index_fill(0, index.long(), 1.0)
    if "neck" in masks and "boundary" in masks:
        masks["neck"] = torch.maximum(masks["neck"], masks["boundary"])
    return masks


def _seen(path: Path, t: dict[str, Tensor]) -> Tensor:
    """Vertex mask [V] 0 or 1 of a picture over the texture coordinates, its first row at v = 1."""
    from PIL import Image

    try:
        with Image.open(path) as f:
            picture = torch.from_numpy(np.array(f.convert("L")))
    except (OSError, ValueError) as e:
        raise CheckpointError(f"{path}: not a picture ({one_line(e)}): get it again") from e
    h, w = picture.shape
    column = (t["uv"][:, 0] * w).long().clamp(0, w - 1)
    row = ((1 - t["uv"][:, 1]) * h).long().clamp(0, h - 1)
    mask = torch.zeros(len(t["v_template"]))
    mask[t["f"].flatten()] = (picture[row, column] > 127).float()[t["uv_faces"].flatten()]
    return mask
