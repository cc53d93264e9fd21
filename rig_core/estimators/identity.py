"""Who is in a picture, as a vector: the IR-SE ResNet of ArcFace (Deng et al. 2019, "ArcFace: Additive angular
margin loss for deep face recognition").

DiFaReli (Ponglertnapakorn et al. 2023) is conditioned on the raw output of an 18-layer one of width 64. The
pack's default is a narrow one for smaller pictures. `embed` prepares the pictures as that method does.

Convention: pictures are FFHQ-aligned squares [B,3,s,s], RGB 0..1. No landmark alignment, no normalised
length: each component of the output has about unit variance.
"""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..align import check_image

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's
BITS = 11  # weights of 8-bit bilinear resizing are multiples of 2^-11
REDUCTION = 16  # side of the network's picture in cells of its last map


@dataclass(frozen=True)
class ArcFaceConfig:
    """size: px of the network's picture; width: channels of the first of four stages, doubled in each next;
    blocks: residual blocks a stage; embedding: length of the vector; se: squeeze and excitation."""

    size: int = 112
    width: int = 64
    blocks: tuple[int, ...] = (2, 2, 2, 2)
    embedding: int = 512
    se: bool = True

    def to_dict(self) -> dict:
        """JSON-able."""
        return asdict(self) | {"blocks": list(self.blocks)}

    @classmethod
    def from_state_dict(cls, state: dict[str, Tensor]) -> ArcFaceConfig:
        """Read everything off the weights. Raises ValueError when they are of another network."""
        try:
            width = state["conv1.weight"].shape[0]
            embedding, features = state["fc.weight"].shape
        except (KeyError, ValueError) as e:
            raise ValueError("'conv1.weight' or 'fc.weight' is missing or of another shape") from e
        numbers = [re.fullmatch(r"layer([1-4])\.(\d{1,2})\.conv1\.weight", k) for k in state]
        found = [(int(m[1]), int(m[2])) for m in numbers if m]
        blocks = tuple(1 + max((b for s, b in found if s == stage), default=-1) for stage in range(1, 5))
        if not all(blocks):
            raise ValueError("one of the stages layer1 to layer4 is missing")
        cells = round((features / max(8 * width, 1)) ** 0.5)
        if not cells or cells * cells * 8 * width != features:
            raise ValueError(f"'fc.weight' takes {features} features, which is no square of {8 * width} maps")
        return cls(cells * REDUCTION, width, blocks, embedding, any(".se." in k for k in state))


class Excite(nn.Module):
    """Squeeze and excitation (Hu et al. 2018): each channel times a gate made of all channels' means."""

    def __init__(self, channels: int):
        super().__init__()
        inner = max(channels // 16, 1)
        self.fc = nn.Sequential(
            nn.Linear(channels, inner), nn.PReLU(), nn.Linear(inner, channels), nn.Sigmoid()
        )

    def forward(self, x: Tensor) -> Tensor:
        return x * self.fc(x.mean((2, 3)))[:, :, None, None]


class Block(nn.Module):
    """Improved residual block: norm, conv, norm, PReLU, conv (stride), norm, excitation; PReLU after the sum.

    The one PReLU is used in both places.
    """

    def __init__(self, c_in: int, c_out: int, stride: int, se: bool):
        super().__init__()
        self.bn0 = nn.BatchNorm2d(c_in)
        self.conv1 = nn.Conv2d(c_in, c_in, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(c_in)
        self.prelu = nn.PReLU()
        self.conv2 = nn.Conv2d(c_in, c_out, 3, stride=stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(c_out)
        self.downsample = None
        if stride != 1 or c_in != c_out:
            projection = nn.Conv2d(c_in, c_out, 1, stride=stride, bias=False)
            self.downsample = nn.Sequential(projection, nn.BatchNorm2d(c_out))
        self.se = Excite(c_out) if se else None

    def forward(self, x: Tensor) -> Tensor:
        h = self.prelu(self.bn1(self.conv1(self.bn0(x))))
        h = self.bn2(self.conv2(h))
        h = h if self.se is None else self.se(h)
        return self.prelu(h + (x if self.downsample is None else self.downsample(x)))


class ArcFace(nn.Module):
    """Normalised pictures [B,3,size,size] -> raw vectors [B,embedding]. Official state-dict keys.

    dropout acts in training only, before the last linear map.
    """

    def __init__(self, config: ArcFaceConfig = ArcFaceConfig(), dropout: float = 0.5):
        super().__init__()
        self.config = config
        w = config.width
        self.conv1 = nn.Conv2d(3, w, 3, bias=False)  # the published one has no padding here
        self.bn1 = nn.BatchNorm2d(w)
        self.prelu = nn.PReLU()
        c = w
        for i, count in enumerate(config.blocks):
            out = w << i
            blocks = [
                Block(c if b == 0 else out, out, 2 if i and b == 0 else 1, config.se) for b in range(count)
            ]
            self.add_module(f"layer{i + 1}", nn.Sequential(*blocks))
            c = out
        self.bn2 = nn.BatchNorm2d(c)
        self.dropout = nn.Dropout(dropout)
        self.fc = nn.Linear(c * (config.size // REDUCTION) ** 2, config.embedding)
        self.bn3 = nn.BatchNorm1d(config.embedding)

    def forward(self, x: Tensor) -> Tensor:
        h = F.max_pool2d(self.prelu(self.bn1(self.conv1(x))), 2)
        h = self.layer4(self.layer3(self.layer2(self.layer1(h))))
        return self.bn3(self.fc(self.dropout(self.bn2(h)).flatten(1)))


def embed(model: ArcFace, image: Tensor) -> Tensor:
    """Identity vectors [B,embedding], float32, of aligned pictures [B,3,s,s] RGB 0..1 (grey and RGBA too).

    Raises ValueError for wrong shapes and for pictures that hold NaN or infinity.
    """
    image = check_image(image)
    if image.shape[-1] != image.shape[-2]:
        raise ValueError(
            f"identity vectors need square, aligned pictures, got {image.shape[-1]} x {image.shape[-2]}"
        )
    x = normalised(resized(image, model.config.size)).to(model.fc.weight)
    return model(x).float()


def resized(image: Tensor, size: int) -> Tensor:
    """8-bit pictures [B,3,size,size] int32 of squares [B,3,s,s] 0..1, bilinear with pixel centres at n + 1/2.

    The weights and the order of rounding are those of OpenCV's 8-bit bilinear resize, which takes no mean
    over the pixels it skips; pictures of three times `size` or more are therefore halved first.
    """
    while image.shape[-1] >= 3 * size:
        image = F.adaptive_avg_pool2d(image, (image.shape[-1] + 1) // 2)
    x = (image.clamp(0, 1).float() * 255).round().int()
    if x.shape[-1] == size:
        return x
    low, high, a, b = _taps(x.shape[-1], size, x.device)
    rows = x[..., low] * a + x[..., high] * b  # along x; 11 more bits
    top, bottom = rows[..., low, :] >> 4, rows[..., high, :] >> 4
    return ((top * a[:, None] >> 16) + (bottom * b[:, None] >> 16) + 2 >> 2).clamp(0, 255)


def _taps(source: int, size: int, device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """For each of `size` pixels: its two source pixels and their weights in units of 2^-11."""
    at = ((torch.arange(size, dtype=torch.float64) + 0.5) * (source / size) - 0.5).float()
    at = at.clamp(0, source - 1)
    low = at.floor()
    b = ((at - low) * 2**BITS).round().int()
    low = low.long()
    parts = low, (low + 1).clamp(max=source - 1), 2**BITS - b, b
    return tuple(p.to(device) for p in parts)


def normalised(image: Tensor) -> Tensor:
    """8-bit numbers 0..255 [B,3,H,W] -> float32 with ImageNet's mean and deviation."""
    mean, std = (image.new_tensor(v, dtype=torch.float32)[:, None, None] for v in (MEAN, STD))
    return (image.float() / 255 - mean) / std
