"""How different two pictures look to a network: LPIPS (Zhang et al. 2018, "The unreasonable effectiveness of
deep features as a perceptual metric"), the AlexNet variant, version 0.1, that papers report.

No weights come with the pack. `load` reads two files from a folder that the user names: torchvision's AlexNet
(alexnet-owt-7be5be79.pth, https://download.pytorch.org/models/) and the published linear layers (alex.pth, in
lpips/weights/v0.1 of https://github.com/richzhang/PerceptualSimilarity).
"""

from __future__ import annotations

from pathlib import Path

import torch.nn.functional as F
from torch import Tensor

from rig_core import files
from rig_core.files import CheckpointError

# index among torchvision's `features`, shape of the kernel, stride, padding; a pooling before the 2nd and 3rd
LAYERS = (
    (0, (64, 3, 11, 11), 4, 2),
    (3, (192, 64, 5, 5), 1, 2),
    (6, (384, 192, 3, 3), 1, 1),
    (8, (256, 384, 3, 3), 1, 1),
    (10, (256, 256, 3, 3), 1, 1),
)
POOLED = (3, 6)
SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)  # ImageNet's statistics for pictures in -1..1
BACKBONE, LINEAR = "alexnet-owt-7be5be79.pth", "alex.pth"
ADVICE = (
    f"LPIPS needs {BACKBONE} from https://download.pytorch.org/models/ and {LINEAR} from lpips/weights/v0.1 "
    "of https://github.com/richzhang/PerceptualSimilarity in one folder: name it with --lpips"
)


def load(folder: str | Path) -> dict[str, Tensor]:
    """The weights for `distance` from a folder with both files. Raises CheckpointError."""
    folder, weights = Path(folder), {}
    for name, wanted in ((BACKBONE, _backbone()), (LINEAR, _linear())):
        if not (folder / name).exists():
            raise CheckpointError(f"{folder / name} is missing: {ADVICE}")
        found, _ = files.read(folder / name)
        for k, shape in wanted.items():
            if k not in found or tuple(found[k].shape) != shape:
                what = f"is {list(found[k].shape)} instead of {list(shape)}" if k in found else "is missing"
                raise CheckpointError(f"{folder / name}: '{k}' {what}: {ADVICE}")
            weights[k] = found[k].float()
    return weights


def _backbone() -> dict[str, tuple[int, ...]]:
    """Names and shapes in AlexNet's file, the classifier left out."""
    kernels = {f"features.{i}.weight": shape for i, shape, _, _ in LAYERS}
    return kernels | {f"features.{i}.bias": shape[:1] for i, shape, _, _ in LAYERS}


def _linear() -> dict[str, tuple[int, ...]]:
    """Names and shapes in the linear layers' file."""
    return {f"lin{n}.model.1.weight": (1, shape[0], 1, 1) for n, (_, shape, _, _) in enumerate(LAYERS)}


def features(weights: dict[str, Tensor], image: Tensor) -> list[Tensor]:
    """AlexNet's five rectified maps of pictures [B,3,H,W] in 0..1, each pixel's vector of length 1."""
    x = (image * 2 - 1 - image.new_tensor(SHIFT)[:, None, None]) / image.new_tensor(SCALE)[:, None, None]
    maps = []
    for i, _, stride, padding in LAYERS:
        x = F.max_pool2d(x, 3, 2) if i in POOLED else x
        x = F.relu(
            F.conv2d(x, weights[f"features.{i}.weight"], weights[f"features.{i}.bias"], stride, padding)
        )
        maps.append(x / (x.norm(dim=1, keepdim=True) + 1e-10))
    return maps


def distance(weights: dict[str, Tensor], a: Tensor, b: Tensor) -> Tensor:
    """LPIPS of pictures [B,3,H,W] RGB 0..1, at least 32 px: [B], 0 for equal ones."""
    if min(a.shape[2:]) < 32:
        raise ValueError(f"LPIPS needs pictures of 32 px or more, got {a.shape[3]} x {a.shape[2]}")
    total = a.new_zeros(len(a))
    for n, (x, y) in enumerate(zip(features(weights, a), features(weights, b), strict=True)):
        total = total + F.conv2d((x - y).square(), weights[f"lin{n}.model.1.weight"]).mean((1, 2, 3))
    return total
