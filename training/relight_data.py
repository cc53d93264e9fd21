"""What DiFaReli needs of a dataset beyond pictures and codes, worked out once and kept beside them.

relight.safetensors in the dataset's folder holds, a row per entry: matte and visible [N,1,s,s] uint8 (face,
neck and hair; what the light reaches), embed [N,E], shadow [N,1]. `annotate` writes it, `Table` reads it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from rig_core import checkpoints, conditions, files, matte
from rig_core.data import Dataset, Portraits
from rig_core.estimators import identity, shadow

NAME = "relight.safetensors"


def annotate(head, folder: str | Path, size: int = 128, batch: int = 32, progress: bool = True) -> None:
    """Write `folder`/relight.safetensors for all entries, replacing an older one."""
    dataset = Dataset.open(folder)
    recognise, judge = checkpoints.load_identity(), checkpoints.load_shadow()
    rows: dict[str, list[Tensor]] = {"matte": [], "visible": [], "embed": [], "shadow": []}
    chunks = range(0, len(dataset), batch)
    if progress:
        from tqdm import tqdm

        chunks = tqdm(chunks, unit="batch")
    for start in chunks:
        picks = list(range(start, min(start + batch, len(dataset))))
        image = dataset.images(picks, size).float() / 255
        code = dataset.codes(picks).resized((size, size))
        with torch.no_grad():
            rows["matte"].append(_bytes(matte.head_matte(head, code, image)))
            rows["visible"].append(_bytes(conditions.visibility(head, code, size)))
            rows["embed"].append(identity.embed(recognise, image))
            rows["shadow"].append(shadow.scalar(judge, image))
    names = json.dumps([e.name for e in dataset.entries])
    path = Path(folder) / NAME
    files.save(path, {k: torch.cat(v) for k, v in rows.items()}, {"kind": "relight data", "names": names})


def _bytes(x: Tensor) -> Tensor:
    return (x * 255).round().to(torch.uint8)


class Table:
    """The annotations of several datasets (or selections of them), addressed as `Portraits.index` does."""

    def __init__(self, datasets: Sequence[Dataset], size: int):
        parts = [_rows(d, size) for d in datasets]
        self.columns = {k: torch.cat([p[k] for p in parts]) for k in parts[0]}

    def __call__(self, index: Tensor, device: torch.device | str) -> dict[str, Tensor]:
        """matte, visible [B,1,s,s] 0..1, embed [B,E], shadow [B,1], float32 on the device."""
        rows = {k: v[index].to(device) for k, v in self.columns.items()}
        return {k: v.float() / 255 if v.dtype == torch.uint8 else v.float() for k, v in rows.items()}


def _rows(dataset: Dataset, size: int) -> dict[str, Tensor]:
    path = dataset.folder / NAME
    if not path.exists():
        raise FileNotFoundError(
            f"{path} is missing: python -m training.relight --annotate --data {path.parent}"
        )
    tensors, meta = files.read(path)
    row = {name: i for i, name in enumerate(json.loads(meta["names"]))}
    missing = next((e.name for e in dataset.entries if e.name not in row), None)
    if missing:
        raise ValueError(f"{path} knows nothing of '{missing}': run training.relight --annotate again")
    picks = torch.tensor([row[e.name] for e in dataset.entries])
    tensors = {k: v[picks] for k, v in tensors.items()}
    for k in ("matte", "visible"):
        if tensors[k].shape[-1] != size:
            small = [F.interpolate(part.float(), (size, size), mode="area") for part in tensors[k].split(256)]
            tensors[k] = torch.cat(small).round().to(torch.uint8)
    return tensors


def inputs(
    head, size: int, table: Table, device: torch.device | str, cast: float = 0.5, flip: bool = True
) -> Callable:
    """`prepare` for DiFaReli: Portraits -> (x_0, (spatial [B,6,H,W], vector [B,D])), rendered on the device.

    cast: share of the pictures whose reference carries the cast-shadow map, so that the network takes both
    kinds. flip: mirror half of them.
    """

    def prepare(portraits: Portraits) -> tuple[Tensor, tuple]:
        x_0 = portraits.image.to(device).float().div_(127.5).sub_(1)
        code, row = portraits.code.to(device), table(portraits.index, device)
        visible = torch.where(torch.rand(len(x_0), 1, 1, 1).to(device) < cast, row["visible"], 1.0)
        spatial = conditions.spatial(
            conditions.shading_reference(head, code, size, visible),
            conditions.background(x_0 / 2 + 0.5, row["matte"]),
        )
        if flip:
            which = (torch.rand(len(x_0)) < 0.5).to(device)
            w = which[:, None, None, None]
            x_0, spatial = torch.where(w, x_0.flip(-1), x_0), torch.where(w, spatial.flip(-1), spatial)
            code = mirrored(code, which)
        return x_0, (spatial, conditions.vector(code, row["embed"], row["shadow"]))

    return prepare


def mirrored(code, which: Tensor):
    """Pose, gaze and camera of the faces of `which` [B] bool as a mirror shows them.

    Shape and expression stay: their asymmetry is small, and the picture carries it too.
    """
    pose, cam = code.pose.clone(), code.cam.clone()
    signs = pose.new_tensor([1.0, -1, -1, 1, -1, -1, -1, 1])[: pose.shape[1]]
    cam[:, 1] *= -1
    pose = torch.where(which[:, None], pose * signs, pose)
    return code.replace(pose=pose, cam=torch.where(which[:, None], cam, code.cam))


def vector_length(head, table: Table) -> int:
    """Length of the vector condition: see `conditions.vector`."""
    s = head.sizes
    return s.shape + s.pose + s.exp + 3 + table.columns["embed"].shape[1] + 1
