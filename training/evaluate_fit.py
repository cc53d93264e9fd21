"""How close do heads fitted to landmarks come? `python -m training.evaluate_fit FOLDER [FOLDER ...]`.

A folder holds photos with their 68 landmarks, either NAME.json beside NAME.jpg ({"landmarks": [[x, y],
...]}) or one landmarks.safetensors (see training.prepare). Measured in an upright 256 px portrait.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch
from torch import Tensor

from rig_core import align, checkpoints
from rig_core.estimators import landmark_fit
from training.measures import table
from training.prepare import stored_landmarks

SIZE = 256  # px
BATCH = 32


def read_landmarks(folder: Path) -> Tensor:
    """All landmarks of a folder, [N,68,2] photo pixels. Raises FileNotFoundError when there are none."""
    stored = folder / "landmarks.safetensors"
    if stored.exists():
        return torch.stack(list(stored_landmarks(stored).values()))
    points = [json.loads(p.read_text()).get("landmarks") for p in sorted(folder.glob("*.json"))]
    points = [p for p in points if p]
    if not points:
        raise FileNotFoundError(f"{folder} holds neither landmarks.safetensors nor NAME.json with landmarks")
    return torch.tensor(points, dtype=torch.float32)


def measure(head, points: Tensor) -> tuple[Tensor, float]:
    """Distances [N,68] in px of a 256 px portrait, and seconds a face, in batches."""
    points = align.ffhq_crop(points, SIZE).apply_points(points)
    distances, started = [], time.perf_counter()
    for batch in points.split(BATCH):
        code = landmark_fit.fit(head, batch, (SIZE, SIZE))
        distances.append(landmark_fit.residual(head, code, batch))
    return torch.cat(distances), (time.perf_counter() - started) / len(points)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folders", nargs="+", type=Path)
    args = parser.parse_args()
    head, rows = checkpoints.load_head(), []
    for folder in args.folders:
        d, seconds = measure(head, read_landmarks(folder))
        inner, contour = d[:, 17:], d[:, :17]
        rows.append([f"{folder.name}, {len(d)} faces", float(inner.median()), float(inner.quantile(0.9))])
        rows[-1] += [float(contour.median()), seconds]
    header = ["photos", "51 inner, median px", "90th percentile px", "17 contour, median px", "s a face"]
    print(table(header, rows))


if __name__ == "__main__":
    main()
