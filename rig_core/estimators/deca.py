"""DECA's coarse encoder (Feng et al., "Learning an Animatable Detailed 3D Face Model", SIGGRAPH 2021).

A ResNet-50 and two linear layers read a face code of FLAME off a 224 px crop. Its published weights are the
entry E_flame of deca_model.tar; `checkpoints.load_deca` reads it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import align
from ..face import FaceCode, axis_angle_to_matrix, matrix_to_axis_angle

SIZE = 224  # px, the side of the network's picture
PARTS = {"shape": 100, "tex": 50, "exp": 50, "pose": 6, "cam": 3, "light": 27}
"""What the 236 outputs are, in their order."""


class DECA(nn.Module):
    """Crops [B,3,224,224] RGB 0..1, not normalised -> [B,236], see PARTS. State-dict keys of E_flame."""

    def __init__(self):
        super().__init__()
        self.encoder = ResNet50()
        self.layers = nn.Sequential(nn.Linear(2048, 1024), nn.ReLU(), nn.Linear(1024, sum(PARTS.values())))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(self.encoder(x))


class ResNet50(nn.Module):
    """He et al. 2016 without a head: [B,3,H,W] -> [B,2048]. torchvision's state-dict keys."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        channels = 64
        for i, count in enumerate((3, 4, 6, 3)):
            inner, blocks = 64 << i, []
            for b in range(count):
                blocks.append(_Bottleneck(channels, inner, 2 if i and b == 0 else 1))
                channels = 4 * inner
            self.add_module(f"layer{i + 1}", nn.Sequential(*blocks))

    def forward(self, x: Tensor) -> Tensor:
        h = F.max_pool2d(F.relu(self.bn1(self.conv1(x))), 3, stride=2, padding=1)
        return self.layer4(self.layer3(self.layer2(self.layer1(h)))).mean((2, 3))


class _Bottleneck(nn.Module):
    """1x1, 3x3 (with the stride) and 1x1 convolutions around a skip connection."""

    def __init__(self, channels: int, inner: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, inner, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(inner)
        self.conv2 = nn.Conv2d(inner, inner, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(inner)
        self.conv3 = nn.Conv2d(inner, 4 * inner, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(4 * inner)
        self.downsample = None
        if channels != 4 * inner:
            conv = nn.Conv2d(channels, 4 * inner, 1, stride, bias=False)
            self.downsample = nn.Sequential(conv, nn.BatchNorm2d(4 * inner))

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.bn1(self.conv1(x)))
        h = self.bn3(self.conv3(F.relu(self.bn2(self.conv2(h)))))
        return F.relu(h + (x if self.downsample is None else self.downsample(x)))


@torch.no_grad()
def encode(
    net: DECA,
    image: Tensor,
    landmarks: Tensor | None = None,
    boxes: Tensor | None = None,
    jaw: str = "aa",
    chunk: int = 16,
) -> FaceCode:
    """Face codes of B faces, in the frame of the picture.

    image [1,3,H,W] or [B,3,H,W] RGB 0..1. Where the faces are: landmarks [B,68,2], or boxes [B,4] of a face
    detector (left, top, right, bottom), in pixels. chunk: crops that go through at a time.
    jaw: how the network was trained to say the jaw's rotation: "aa", axis-angle, as in the published model;
    "euler", angles about x, y and z in turn (jaw_type of DECA's configuration).
    Raises ValueError for pictures, landmarks and boxes that are not such.
    """
    if (landmarks is None) == (boxes is None):
        raise ValueError("give encode() either landmarks= or boxes=")
    if jaw not in ("aa", "euler"):
        raise ValueError(f"jaw is 'aa' or 'euler', not {jaw!r}")
    image = align.check_image(image)
    crop = align.detector_crop(boxes, SIZE) if landmarks is None else align.deca_crop(landmarks, SIZE)
    n = len(crop)
    if len(image) not in (1, n):
        raise ValueError(f"{len(image)} pictures cannot hold {n} faces: give one picture, or one each")
    weight, made = net.layers[0].weight, []
    for i in range(0, n, chunk):
        part = crop[i : i + chunk]
        pictures = image.expand(len(part), -1, -1, -1) if len(image) == 1 else image[i : i + chunk]
        made.append(net(part.apply(pictures).to(weight)).float())
    parts = dict(zip(PARTS, torch.cat(made).to(image.device).split(list(PARTS.values()), 1)))
    if jaw == "euler":
        turned = euler_to_axis_angle(parts["pose"][:, 3:])
        parts["pose"] = torch.cat([parts["pose"][:, :3], turned], 1)
    parts["light"] = parts["light"].unflatten(1, (9, 3))
    return FaceCode(**parts, crop=crop.matrix.to(image), size=tuple(image.shape[2:]), head="flame")


def euler_to_axis_angle(angles: Tensor) -> Tensor:
    """Rotations R_x(a) R_y(b) R_z(c) given as angles (a, b, c) [B,3] -> axis-angle [B,3], radians."""
    x, y, z = (axis_angle_to_matrix(angles * angles.new_tensor(axis)) for axis in torch.eye(3).tolist())
    return matrix_to_axis_angle(x @ y @ z)
