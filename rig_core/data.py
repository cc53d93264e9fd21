"""A dataset of portraits with their face codes: a folder of plain files, and the batches drawn from it.

    images/NAME.png|jpg        8-bit RGB, all of one size
    codes-00000.safetensors    a FaceCode field a tensor [n, ...]; the metadata holds the n entries as JSON
    index.json                 size, head and all entries, one a line; written by `finish`

Shards are written whole or not at all, so a writer that was cut goes on where `written` says it stopped.
Reading maps the shards into memory; 70,000 entries take half a second to open.
"""

from __future__ import annotations

import json
import os
import struct
import warnings
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from .face import FaceCode, cat

FIELDS = ("shape", "tex", "exp", "pose", "cam", "light", "crop")
PIXELS = 32e6  # of a photo; as float32 with the copies that finding faces makes, some 1.5 GB


class Entry(NamedTuple):  # made three times as fast as a frozen dataclass, which tells at 70,000
    """One portrait. image: file name below images/; weight: how often it is drawn, relative to the others;
    person: the same text for pictures of one person, "" when unknown; row of its code in `shard`."""

    name: str
    image: str
    split: str = "train"
    tags: tuple[str, ...] = ()
    weight: float = 1.0
    person: str = ""
    shard: str = ""
    row: int = 0


# ---------------------------------------------------------------------------------------------- writing


def append(
    folder: str | Path, names: Sequence[str], images: Tensor, code: FaceCode, kind: str = "png", **columns
) -> None:
    """Add portraits as one shard; call `finish` after the last. Hundreds at a time keep the shards few.

    names: unique, usable as file names; images [B,3,H,W] uint8 or float 0..1; code: B faces of that size;
    kind "png" or "jpg"; columns: split, tags, weight, person, each one value for all or a list of B.
    Raises ValueError for names that exist, for codes of another head or picture size, for odd lengths.
    """
    folder = Path(folder)
    size, head, entries = _read_shards(folder)
    if not len(names) == len(images) == len(code):
        raise ValueError(f"{len(names)} names, {len(images)} images and {len(code)} codes do not match")
    if tuple(images.shape[2:]) != tuple(code.size) or code.size[0] != code.size[1]:
        raise ValueError(
            f"images are {tuple(images.shape[2:])} px, their codes {tuple(code.size)}: both square"
        )
    if entries and (size != tuple(code.size) or head != code.head):
        raise ValueError(f"{folder} holds {size} px, '{head}' head; got {tuple(code.size)}, '{code.head}'")
    known = {e.name for e in entries}
    double = sorted(known.intersection(names)) or [n for i, n in enumerate(names) if n in names[:i]]
    if double:
        raise ValueError(f"{folder} already has an entry '{double[0]}': `written` lists the finished names")
    shard = f"codes-{1 + max((int(e.shard[6:11]) for e in entries), default=-1):05d}.safetensors"
    (folder / "images").mkdir(parents=True, exist_ok=True)
    rows = []
    for i, name in enumerate(names):
        one = {k: v if isinstance(v, str) or not isinstance(v, list) else v[i] for k, v in columns.items()}
        rows.append(Entry(name, f"{name}.{kind}", shard=shard, row=i, **one))
        _write_image(folder / "images" / rows[-1].image, images[i])
    tensors = {k: getattr(code, k).detach().cpu().float().contiguous() for k in FIELDS}
    meta = {
        "head": code.head,
        "size": json.dumps(list(code.size)),
        "entries": json.dumps([e._asdict() for e in rows]),
    }
    _write_whole(folder / shard, save(tensors, meta))


def written(folder: str | Path) -> set[str]:
    """Names that are already in the folder, finished or not: what a resumed writer may skip."""
    return {e.name for e in _read_shards(Path(folder))[2]}


def finish(folder: str | Path) -> None:
    """Write index.json over all shards. Raises ValueError when there are none."""
    folder = Path(folder)
    size, head, entries = _read_shards(folder)
    if not entries:
        raise ValueError(f"{folder} holds no codes-*.safetensors: nothing was written there")
    lines = ",\n".join(json.dumps({k: v for k, v in e._asdict().items() if v != ""}) for e in entries)
    top = json.dumps({"version": 1, "size": size, "head": head})[:-1]
    _write_whole(folder / "index.json", f'{top}, "entries": [\n{lines}\n]}}\n'.encode())


def _read_shards(folder: Path) -> tuple[tuple[int, int], str, list[Entry]]:
    size, head, entries = (0, 0), "", []
    for path in sorted(folder.glob("codes-*.safetensors")):
        size, head, own = _read_shard(path, path.stat().st_mtime_ns)
        entries += own
    return size, head, entries


@lru_cache(None)  # a writer of thousands of shards asks for all of them before each new one
def _read_shard(path: Path, _written: int) -> tuple[tuple[int, int], str, list[Entry]]:
    with safe_open(path, "pt") as f:
        meta = f.metadata()
    return tuple(json.loads(meta["size"])), meta["head"], json.loads(meta["entries"], object_hook=_entry)


def _entry(fields: dict) -> Entry | dict:
    """A JSON object as an Entry, if it is one."""
    if "image" not in fields:
        return fields
    if "tags" in fields:
        fields["tags"] = tuple(fields["tags"])
    return Entry(**fields)


def _write_image(path: Path, image: Tensor) -> None:
    from PIL import Image

    if image.is_floating_point():
        image = (image.clamp(0, 1) * 255).round().to(torch.uint8)
    options = {"quality": 95, "subsampling": 0} if path.suffix == ".jpg" else {"compress_level": 4}
    Image.fromarray(image.permute(1, 2, 0).cpu().contiguous().numpy()).save(path, **options)


def _write_whole(path: Path, content: bytes) -> None:
    part = path.with_name(path.name + ".part")
    with open(part, "wb") as f:
        f.write(content)
        f.flush()
        os.fsync(f.fileno())
    os.replace(part, path)


# ---------------------------------------------------------------------------------------------- reading


class Dataset:
    """An opened folder: `entries`, `size` (H, W), `head`; `codes` and `images` by index."""

    def __init__(self, folder: Path, size: tuple[int, int], head: str, entries: list[Entry]):
        self.folder, self.size, self.head, self.entries = folder, size, head, entries
        self._shards: dict = {}
        self._memory: tuple[int, Tensor] | None = None

    @classmethod
    def open(cls, folder: str | Path) -> Dataset:
        """Raises FileNotFoundError without index.json, ValueError when it does not cover every shard."""
        folder = Path(folder)
        if not (folder / "index.json").is_file():
            raise FileNotFoundError(f"{folder} is no finished dataset: index.json is missing")
        index = json.loads((folder / "index.json").read_bytes(), object_hook=_entry)
        entries = index["entries"]
        have, want = {p.name for p in folder.glob("codes-*.safetensors")}, {e.shard for e in entries}
        if have != want:
            odd = sorted(have ^ want)[0]
            raise ValueError(f"{folder}: index.json and {odd} do not match: run its writer again to the end")
        return cls(folder, tuple(index["size"]), index["head"], entries)

    def __len__(self) -> int:
        return len(self.entries)

    def select(self, split: str | None = None, tag: str | None = None) -> Dataset:
        """The entries of one split, or with one tag, as a dataset of its own."""
        kept = [
            e for e in self.entries if (split is None or e.split == split) and (tag is None or tag in e.tags)
        ]
        return Dataset(self.folder, self.size, self.head, kept)

    def weights(self) -> np.ndarray:
        """[N] float64, how often each entry is to be drawn, relative to the others."""
        return np.fromiter((e.weight for e in self.entries), np.float64, len(self))

    def codes(self, indices: Iterable[int]) -> FaceCode:
        """The codes of some entries, in that order."""
        rows = []
        for i in indices:
            entry = self.entries[i]
            shard = self._shard(entry.shard)
            rows.append([shard[k][entry.row : entry.row + 1] for k in FIELDS])
        fields = {k: torch.cat(column) for k, column in zip(FIELDS, zip(*rows))}
        return FaceCode(**fields, size=self.size, head=self.head)

    def images(self, indices: Iterable[int], size: int) -> Tensor:
        """[B,3,size,size] uint8, shrunk with Lanczos."""
        if self._memory is not None and self._memory[0] == size:
            return self._memory[1][torch.as_tensor(list(indices))]
        return torch.stack([read_image(self.path(i), size) for i in indices])

    def path(self, index: int) -> Path:
        return self.folder / "images" / self.entries[index].image

    def preload(self, size: int, workers: int = 2) -> None:
        """Decode everything once and keep it: N * 3 * size * size bytes."""
        pictures = torch.empty(len(self), 3, size, size, dtype=torch.uint8)
        with ThreadPoolExecutor(workers) as pool:
            for i, picture in enumerate(pool.map(lambda i: read_image(self.path(i), size), range(len(self)))):
                pictures[i] = picture
        self._memory = size, pictures

    def _shard(self, name: str) -> dict:
        if name not in self._shards:
            f = safe_open(self.folder / name, "pt")
            self._shards[name] = {k: f.get_slice(k) for k in FIELDS}
        return self._shards[name]


def read_image(path: Path, size: int) -> Tensor:
    """A picture file as [3,size,size] uint8 RGB. Raises ValueError naming a file that cannot be read."""
    from PIL import Image

    try:
        with Image.open(path) as picture:
            picture = picture.convert("RGB")
    except OSError as e:
        raise ValueError(f"{path} is not a readable picture ({e}): remove it from the dataset") from e
    if picture.size != (size, size):
        picture = picture.resize((size, size), Image.Resampling.LANCZOS)
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1).contiguous()


def read_photo(path: str | Path, most: float = PIXELS) -> Tensor:
    """Any photo file as [1,3,H,W] RGB 0..1, turned as its EXIF says; transparent parts become white.

    most: pixels; larger photos are shrunk to about that many. Grey, palette, CMYK and 16-bit files are taken;
    colour profiles are not looked at. Raises ValueError naming a file that cannot be read.
    """
    from PIL import Image, ImageOps, UnidentifiedImageError

    name = Path(path).name
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # large photos are expected
            with Image.open(path) as picture:
                shrink = min(1.0, (most / (picture.width * picture.height)) ** 0.5)
                size = [max(1, round(n * shrink)) for n in picture.size]
                picture.draft(None, size)  # decodes a JPEG at half its size where that is enough
                picture = _rgb(picture, name)
            if picture.size != tuple(size):
                picture = picture.resize(size, Image.Resampling.LANCZOS, reducing_gap=2.0)
            picture = ImageOps.exif_transpose(picture)
    except UnidentifiedImageError as e:
        raise ValueError(f"{name} cannot be read: it is no picture, or a damaged one") from e
    except Image.DecompressionBombError as e:
        raise ValueError(f"{name} cannot be read: it has too many pixels, save it with half the width") from e
    except (OSError, SyntaxError, EOFError, struct.error) as e:
        raise ValueError(f"{name} cannot be read: {e}") from e
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None].float().div_(255)


def _rgb(picture, name: str):
    """A Pillow picture of any mode as 8-bit RGB with its EXIF."""
    from PIL import Image

    info = picture.info
    if picture.mode == "F":
        raise ValueError(f"{name} holds floating-point numbers: save it with 8 or 16 bits a channel")
    if picture.mode.startswith("I"):  # 16-bit grey, which Pillow's own conversion cuts off instead of scaling
        values = np.asarray(picture).astype(np.float32) / 257
        picture = Image.fromarray(values.round().clip(0, 255).astype(np.uint8))
    elif picture.has_transparency_data:
        white = Image.new("RGBA", picture.size, "white")
        white.alpha_composite(picture.convert("RGBA"))
        picture = white
    picture = picture.convert("RGB")
    picture.info = info
    return picture


# ---------------------------------------------------------------------------------------------- drawing


class Sampler:
    """An endless sequence of indices that is a function of (weights, seed, position) alone.

    Each round of N draws takes every entry floor or ceil of N * weight / sum(weights) times (systematic
    resampling), shuffled: with equal weights it is an ordinary epoch.
    """

    def __init__(self, weights: np.ndarray, seed: int):
        if not len(weights) or not np.isfinite(weights).all() or weights.min() < 0 or weights.sum() <= 0:
            raise ValueError("nothing to draw from: weights must be finite, not negative, and not all zero")
        self.edges = np.cumsum(weights) / np.sum(weights)
        self.seed = seed
        self._round: tuple[int, np.ndarray] = (-1, np.empty(0, np.int64))

    def take(self, position: int, count: int) -> np.ndarray:
        """The indices at position ... position + count - 1 of the sequence."""
        n = len(self.edges)
        numbers = np.arange(position, position + count)
        parts = [self.round(r)[numbers[numbers // n == r] % n] for r in np.unique(numbers // n)]
        return np.concatenate(parts)

    def round(self, r: int) -> np.ndarray:
        if self._round[0] != r:
            rng, n = np.random.default_rng([self.seed, int(r)]), len(self.edges)
            picks = np.searchsorted(self.edges, (np.arange(n) + rng.random()) / n, side="right")
            self._round = int(r), rng.permutation(np.minimum(picks, n - 1))
        return self._round[1]


@dataclass(frozen=True)
class Portraits:
    """A batch: image [B,3,s,s] uint8, code (B faces), index [B] into the loader's joined datasets,
    reference [B,3,s,s] uint8, another picture of the same person where there is one, else image."""

    image: Tensor
    code: FaceCode
    index: Tensor
    reference: Tensor


class Loader:
    """Batches by step number from one dataset or a mixture, decoded ahead by a few threads.

    shares: how much of the draws each dataset gets, any scale; within a dataset the entries' own weights
    count. rank, world: this process's part of each step's world * batch draws, which do not depend on how
    many processes share them. Close it, or use `with`.
    """

    def __init__(
        self,
        datasets: Sequence[Dataset],
        size: int,
        batch: int,
        seed: int = 0,
        shares: Sequence[float] | None = None,
        rank: int = 0,
        world: int = 1,
        workers: int = 2,
    ):
        heads = {d.head for d in datasets}
        if len(heads) != 1:
            raise ValueError(f"datasets for the heads {sorted(heads)} cannot be mixed: use one head")
        shares = [1.0] * len(datasets) if shares is None else shares
        if len(shares) != len(datasets):
            raise ValueError(f"{len(datasets)} datasets need {len(datasets)} shares, got {len(shares)}")
        self.datasets, self.size, self.batch, self.rank, self.world = datasets, size, batch, rank, world
        weights = [s * d.weights() / d.weights().sum() for s, d in zip(shares, datasets)]
        self.starts = np.cumsum([0] + [len(w) for w in weights])
        self.sampler, self.seed = Sampler(np.concatenate(weights), seed), seed
        self._people = [_by_person(d) for d in datasets]
        self._pool = ThreadPoolExecutor(workers)
        self._ahead: dict[int, Future] = {}
        self._depth = 2 * workers

    def __call__(self, step: int) -> Portraits:
        """The batch of this step: the same for the same step, whatever was asked before."""
        self._ahead = {s: f for s, f in self._ahead.items() if s >= step}
        for s in range(step, step + self._depth):
            if s not in self._ahead:
                position = (s * self.world + self.rank) * self.batch
                picks = self.sampler.take(position, self.batch)
                self._ahead[s] = self._pool.submit(self._load, picks, position)
        return self._ahead.pop(step).result()

    def _load(self, picks: np.ndarray, position: int) -> Portraits:
        source = np.searchsorted(self.starts, picks, side="right") - 1
        places, images, codes, references = [], [], [], []
        for k in np.unique(source):
            dataset, people, at = self.datasets[k], self._people[k], np.flatnonzero(source == k)
            own = (picks[at] - self.starts[k]).tolist()
            others = [
                _other(i, people.get(dataset.entries[i].person, ()), [self.seed, position + int(p), 1])
                for i, p in zip(own, at)
            ]
            places.append(at)
            images.append(dataset.images(own, self.size))
            codes.append(dataset.codes(own).resized((self.size, self.size)))
            references.append(dataset.images(others, self.size) if others != own else images[-1])
        back = torch.from_numpy(np.argsort(np.concatenate(places)))
        code, index = cat(codes)[back], torch.from_numpy(picks)
        return Portraits(torch.cat(images)[back], code, index, torch.cat(references)[back])

    def close(self) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)

    def __enter__(self) -> Loader:
        return self

    def __exit__(self, *_) -> None:
        self.close()


def _by_person(dataset: Dataset) -> dict[str, list[int]]:
    """The entries of each person who has several."""
    count = Counter(e.person for e in dataset.entries)
    people: dict[str, list[int]] = {p: [] for p, n in count.items() if p and n > 1}
    for i, entry in enumerate(dataset.entries):
        if entry.person in people:
            people[entry.person].append(i)
    return people


def _other(index: int, siblings: Sequence[int], seed: Sequence[int]) -> int:
    """Another entry of the same person at random, or the entry itself where there is none."""
    others = [i for i in siblings if i != index]
    return others[np.random.default_rng(seed).integers(len(others))] if others else index
