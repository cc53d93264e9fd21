"""Photos -> a dataset folder: `python -m training.prepare --photos DIR --out DIR --size 128`.

Finds the largest face of every photo (or takes landmarks from a file), sets it upright, fits the open
head and writes picture and code. Photos that are no use are listed with the reason in rejected.txt.
Interrupted, it goes on where it stopped. With --variants each training portrait is written several
more times under other lights, blue studio backdrops exchanged: see training/augment.py.
"""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from rig_core import album, align, checkpoints, data, sh
from rig_core.estimators import landmark_fit, landmarks
from training import augment

LIT_FROM_THE_SIDE = 0.45  # |x| over constant of the light from which a portrait is drawn more often


class Rejected(ValueError):
    """Why a photo is left out."""


@dataclass(frozen=True)
class Aligned:
    """One portrait ready to fit: name, image [3,s,s] 0..1 and landmarks [68,2] in its pixels."""

    name: str
    image: Tensor
    points: Tensor


def align_photo(path: Path, size: int, points: Tensor | None) -> Aligned:
    """Cut the face out. points [68,2] photo pixels when known. Raises Rejected."""
    try:
        photo = data.read_photo(path, most=math.inf)  # in full: landmarks at hand are in its pixels
        if points is None:
            boxes, _ = landmarks.find_faces(photo)
            points = landmarks.find_landmarks(photo, boxes[:1])[0]
    except ValueError as e:
        raise Rejected(str(e)) from e
    crop = align.ffhq_crop(points[None], size)
    image = crop.apply(photo)
    fault = album.too_small(album.portrait_side(crop), size) or album.blurred(image)
    if fault:
        raise Rejected(fault)
    return Aligned(path.stem, image[0].clamp(0, 1), crop.apply_points(points[None])[0])


def stored_landmarks(path: Path | None) -> dict[str, Tensor]:
    """{photo's stem: [68,2]} of a safetensors file: `landmarks` [N,68,2], `names` in its metadata."""
    if path is None:
        return {}
    from safetensors import safe_open

    with safe_open(path, "pt") as f:
        return dict(zip(json.loads(f.metadata()["names"]), f.get_tensor("landmarks")))


def batches(paths: list[Path], known: dict[str, Tensor], args, rejected: dict[str, str]):
    """Lists of up to `--batch` aligned portraits; rejections are noted."""
    batch: list[Aligned] = []
    for path in tqdm(paths, unit="photo"):
        try:
            batch.append(align_photo(path, args.size, known.get(path.stem)))
        except Rejected as e:
            rejected[path.name] = str(e)
        if len(batch) == args.batch:
            yield batch
            batch = []
    if batch:
        yield batch


def write_batch(head, batch: list[Aligned], split: dict[str, str], args, rejected: dict[str, str]) -> None:
    """Fit, sort out what did not fit, write the portraits and their variants."""
    size = (args.size, args.size)
    image, points = torch.stack([b.image for b in batch]), torch.stack([b.points for b in batch])
    code = landmark_fit.fit(head, points, size, image)
    error = landmark_fit.residual(head, code, points)[:, 17:].mean(1) * 256 / args.size
    good = [i for i in range(len(batch)) if error[i] < args.worst]
    for i in set(range(len(batch))) - set(good):
        rejected[batch[i].name] = f"the head does not fit: {error[i]:.1f} px mean error at 256 px"
    if not good:
        return
    image, code = image[good], code[good]
    names = [batch[i].name for i in good]
    splits = [split[n] for n in names]
    light = sh.luminance(code.light)
    side = (light[:, 1] / light[:, 0]).abs() > LIT_FROM_THE_SIDE
    weight = [args.side_weight if s else 1.0 for s in side.tolist()]
    data.append(args.out, names, image, code, split=splits, weight=weight, tags=("photo",), person=names)

    train = [i for i, s in enumerate(splits) if s == "train"]
    if not (train and args.variants):
        return
    image, code = image[train], code[train]
    for v in range(1, args.variants + 1):
        generator = torch.Generator().manual_seed(args.seed * 1000 + v + hash_name(names[0]))
        relit, lit, _ = augment.relight_photos(head, image, code, generator)
        keyed = augment.has_blue_backdrop(image)
        relit = torch.where(keyed[:, None, None, None], augment.exchange_backdrop(relit, generator), relit)
        people = [names[i] for i in train]
        data.append(args.out, [f"{p}~{v}" for p in people], relit, lit, tags=("relit",), person=people)


def hash_name(name: str) -> int:
    """A number that is the same in every run, unlike hash()."""
    import zlib

    return zlib.crc32(name.encode())


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--photos", type=Path, required=True, help="folder of photos")
    parser.add_argument("--out", type=Path, required=True, help="dataset folder, made or continued")
    parser.add_argument("--size", type=int, default=128, help="pixels, 128")
    parser.add_argument(
        "--landmarks", type=Path, help="safetensors with landmarks and names; else they are found"
    )
    parser.add_argument(
        "--validation", type=int, default=0, metavar="N", help="keep every N-th photo apart, 0: none"
    )
    parser.add_argument("--variants", type=int, default=0, help="relit copies of each training portrait")
    parser.add_argument("--side-weight", type=float, default=2.0, help="how often side-lit photos are drawn")
    parser.add_argument(
        "--worst", type=float, default=album.WORST, help="mean landmark error at 256 px that is still taken"
    )
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    head = checkpoints.load_head()
    try:
        paths = sorted(album.paths(args.photos))
    except ValueError as e:
        parser.error(str(e))
    split = {p.stem: "train" for p in paths}
    if args.validation:
        split |= {p.stem: "val" for p in paths[:: args.validation]}
    done, rejected = data.written(args.out), {}
    todo = [p for p in paths if p.stem not in done]
    for batch in batches(todo, stored_landmarks(args.landmarks), args, rejected):
        write_batch(head, batch, split, args, rejected)
    data.finish(args.out)
    if rejected:
        with open(args.out / "rejected.txt", "a") as f:
            f.writelines(f"{name}\t{why}\n" for name, why in sorted(rejected.items()))
    print(f"{len(data.written(args.out))} portraits in {args.out}; {len(rejected)} photos rejected")


if __name__ == "__main__":
    main()
