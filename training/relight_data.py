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

from rig_core import checkpoints, conditions, distributed, files, matte
from rig_core.data import Dataset, Portraits
from rig_core.estimators import identity, shadow

NAME = "relight.safetensors"


def annotate(head, folder: str | Path, size: int = 128, batch: int = 32, progress: bool = True) -> None:
    """Write `folder`/relight.safetensors for all entries, replacing an older one."""
    dataset = Dataset.open(folder)
    recognise, judge = checkpoints.load_identity(), checkpoints.load_shadow()
    rows: dict[str, Tensor] = {}
    chunks = range(0, len(dataset), batch)
    if progress:
        from tqdm import tqdm

        chunks = tqdm(chunks, unit="batch")
    for start in chunks:
        picks = list(range(start, min(start + batch, len(dataset))))
        image = dataset.images(picks, size).float() / 255
        code = dataset.codes(picks).resized((size, size))
        with torch.no_grad():
            found = {
                "matte": _bytes(matte.head_matte(head, code, image)),
                "visible": _bytes(conditions.visibility(head, code, size)),
                "embed": identity.embed(recognise, image),
                "shadow": shadow.scalar(judge, image),
            }
        for k, v in found.items():
            rows.setdefault(k, v.new_empty(len(dataset), *v.shape[1:]))[start : start + len(v)] = v
    names = json.dumps([e.name for e in dataset.entries])
    path = Path(folder) / NAME
    files.save(path, rows, {"kind": "relight data", "names": names})


def _bytes(x: Tensor) -> Tensor:
    return (x * 255).round().to(torch.uint8)


class Table:
    """The annotations of several datasets (or selections of them), addressed as `Portraits.index` does.

    They stay in their files, which are mapped into memory.
    """

    def __init__(self, datasets: Sequence[Dataset], size: int):
        self.parts, self.size = [_rows(d) for d in datasets], size
        self.starts = torch.tensor([0] + [len(d) for d in datasets]).cumsum(0)

    @property
    def embed_dim(self) -> int:
        return self.parts[0][0]["embed"].shape[1]

    def __call__(self, index: Tensor, device: torch.device | str) -> dict[str, Tensor]:
        """matte, visible [B,1,s,s] 0..1, embed [B,E], shadow [B,1], float32 on the device."""
        source = torch.searchsorted(self.starts, index, right=True) - 1
        columns: dict[str, list[Tensor]] = {}
        places = []
        for k in source.unique().tolist():
            tensors, rows = self.parts[k]
            places.append((source == k).nonzero()[:, 0])
            picks = rows[index[places[-1]] - self.starts[k]]
            for name, v in tensors.items():
                columns.setdefault(name, []).append(self._sized(v[picks].to(device)))
        back = torch.cat(places).argsort().to(device)
        return {name: torch.cat(parts)[back] for name, parts in columns.items()}

    def _sized(self, v: Tensor) -> Tensor:
        if v.dtype != torch.uint8:
            return v.float()
        v = v.float() / 255
        return v if v.shape[-1] == self.size else F.interpolate(v, (self.size, self.size), mode="area")


def _rows(dataset: Dataset) -> tuple[dict[str, Tensor], Tensor]:
    """The annotations in a dataset's folder, and which of their rows its entries are."""
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
    return tensors, torch.tensor([row[e.name] for e in dataset.entries])


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
        shadowed = distributed.part(torch.rand, len(x_0)).to(device) < cast
        visible = torch.where(shadowed[:, None, None, None], row["visible"], 1.0)
        spatial = conditions.spatial(
            conditions.shading_reference(head, code, size, visible),
            conditions.background(x_0 / 2 + 0.5, row["matte"]),
        )
        if flip:
            which = (distributed.part(torch.rand, len(x_0)) < 0.5).to(device)
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
    return s.shape + s.pose + s.exp + 3 + table.embed_dim + 1
