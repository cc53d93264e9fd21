"""How good is the matte without a parser? `python -m training.evaluate_matte --synth-count 60`.

Held-out synthetic portraits, whose truth is known: all that is neither clothes nor backdrop. Overlap is the
soft intersection over union. With --photos a dataset's portraits are cut out on a sheet to look at.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
from torch import Tensor

from rig_core import buffers, checkpoints, matte
from rig_core.data import Dataset
from rig_core.estimators import landmark_fit
from training import synth
from training.measures import table

FIRST_SEED = 910_000  # of synthetic persons that no training has seen
SIZE = 128  # px


def overlap(a: Tensor, b: Tensor) -> Tensor:
    """Soft intersection over union [B] of masks [B,1,H,W]."""
    return torch.minimum(a, b).sum((1, 2, 3)) / torch.maximum(a, b).sum((1, 2, 3)).clamp_min(1e-6)


def measure(head, truth: synth.SynthBatch, fitted: bool) -> tuple[list[Tensor], float]:
    """Overlap [N] of the rendered head and of the matte with the truth, and CPU seconds a picture.

    fitted: with the face that was fitted to the landmarks, in place of the true one.
    """
    size = truth.image.shape[-1]
    want = (1 - truth.cloth - truth.background).clamp(0, 1)
    code = landmark_fit.fit(head, truth.landmarks, (size, size)) if fitted else truth.code
    rendered = buffers.geometry(head, code)[0].mask.float()
    started = time.process_time()
    found = torch.cat([matte.head_matte(head, code[i], truth.image[i : i + 1]) for i in range(len(code))])
    seconds = (time.process_time() - started) / len(code)
    return [overlap(rendered, want), overlap(found, want)], seconds


def sheet(head, photos: Dataset, count: int, columns: int = 6) -> Tensor:
    """[3,H,W]: photos of a dataset, each beside what the matte keeps of it, on green."""
    count = min(count, len(photos)) // columns * columns
    picks = torch.linspace(0, len(photos) - 1, count).long().tolist()
    image = photos.images(picks, SIZE).float() / 255
    kept = matte.head_matte(head, photos.codes(picks), image)
    green = image.new_tensor([0.0, 0.7, 0.0])[:, None, None]
    both = torch.cat([image, torch.lerp(green.expand_as(image), image, kept)], 3)
    return torch.cat([torch.cat(list(both[i : i + columns]), 2) for i in range(0, count, columns)], 1)


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--synth-count", type=int, default=60)
    parser.add_argument("--photos", type=Path, help="dataset folder")
    parser.add_argument("--sheet", type=Path, help="picture to write, with --photos")
    args = parser.parse_args()
    head, rows = checkpoints.load_head(), []
    if args.photos and args.sheet:
        from PIL import Image

        pixels = (sheet(head, Dataset.open(args.photos), 60) * 255).round().byte().permute(1, 2, 0)
        Image.fromarray(pixels.numpy()).save(args.sheet)
    truth = synth.render(range(FIRST_SEED, FIRST_SEED + args.synth_count), SIZE)
    for name, fitted in (("true head", False), ("head fitted to the landmarks", True)):
        (rendered, found), seconds = measure(head, truth, fitted)
        numbers = [v for m in (rendered, found) for v in (float(m.mean()), float(m.quantile(0.1)))]
        rows.append([name, *numbers, 1000 * seconds])
    columns = ["rendered head", "10th percentile", "matte", "10th percentile", "CPU ms a picture"]
    print(table([f"{args.synth_count} renders of {SIZE} px", *columns], rows))


if __name__ == "__main__":
    main()
