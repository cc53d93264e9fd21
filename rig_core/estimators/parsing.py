"""Face parsing into 19 classes with BiSeNet (Yu et al., ECCV 2018) on a ResNet-18, and DiFaReli's masks.

The published weights (79999_iter.pth) are a bare state dict; `checkpoints.load_parser` reads it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..align import check_image
from ..denoisers.rig import ResNet18

CLASSES = (
    "background",
    "skin",
    "left brow",
    "right brow",
    "left eye",
    "right eye",
    "glasses",
    "left ear",
    "right ear",
    "earring",
    "nose",
    "mouth",
    "upper lip",
    "lower lip",
    "neck",
    "necklace",
    "cloth",
    "hair",
    "hat",
)

FACE = tuple(range(1, 14))
SELECTORS = {
    "face": FACE,
    "head": (*FACE, 14, 17),
    "nohead": (0, 15, 16, 18),
    "face&hair": tuple(range(1, 19)),
    "bg_noface&nohair": (0, 14, 15, 16, 18),
    "bg&ears_noface&nohair": (0, 7, 8, 9, 14, 15, 16, 18),
    "bg": (0,),
    "bg&noface": (0, 14, 15, 16, 17, 18),
    "hair": (17,),
    "faceskin": (1,),
    "faceskin&nose": (1, 10),
    "face_noglasses": tuple(i for i in FACE if i != 6),
    "eyes": (4, 5),
}
"""DiFaReli's names for sets of classes; what it calls background is "nohead"."""

INPUT = 512  # px, the side of the network's picture


class BiSeNet(nn.Module):
    """[B,3,H,W], ImageNet-normalised -> logits [B,19,H,W], and those of the heads at 1/8 and 1/16.

    The two further heads helped the training; `parse` uses the first. The spatial path is the backbone's
    own 1/8 stage, as in the published network. State-dict keys are its keys.
    """

    def __init__(self, classes: int = len(CLASSES)):
        super().__init__()
        self.cp = _ContextPath()
        self.ffm = _Fusion()
        self.conv_out = _Output(256, 256, classes)
        self.conv_out16 = _Output(128, 64, classes)
        self.conv_out32 = _Output(128, 64, classes)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        at8, from16, from32 = self.cp(x)
        outputs = (
            self.conv_out(self.ffm(at8, from16)),
            self.conv_out16(from16),
            self.conv_out32(from32),
        )
        resize = lambda y: F.interpolate(y, x.shape[-2:], mode="bilinear", align_corners=True)  # noqa: E731
        return tuple(resize(y) for y in outputs)


class _ContextPath(nn.Module):
    """The backbone, and its 1/16 and 1/32 stages weighed, enriched with what lies below and enlarged."""

    def __init__(self):
        super().__init__()
        self.resnet = ResNet18(1)
        self.resnet.fc = nn.Identity()
        self.arm16 = _AttentionRefinement(256, 128)
        self.arm32 = _AttentionRefinement(512, 128)
        self.conv_head32 = _ConvNorm(128, 128, 3)
        self.conv_head16 = _ConvNorm(128, 128, 3)
        self.conv_avg = _ConvNorm(512, 128, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Features at 1/8: of the backbone [B,128], from 1/16 [B,128]; and at 1/16, from 1/32 [B,128]."""
        net = self.resnet
        h = F.max_pool2d(F.relu(net.bn1(net.conv1(x))), 3, stride=2, padding=1)
        at8 = net.layer2(net.layer1(h))
        at16 = net.layer3(at8)
        at32 = net.layer4(at16)
        whole = self.conv_avg(at32.mean((2, 3), keepdim=True))
        from32 = self.conv_head32(_nearest(self.arm32(at32) + whole, at16))
        from16 = self.conv_head16(_nearest(self.arm16(at16) + from32, at8))
        return at8, from16, from32


class _AttentionRefinement(nn.Module):
    """A convolution whose channels are weighed by their means over the picture."""

    def __init__(self, channels: int, out: int):
        super().__init__()
        self.conv = _ConvNorm(channels, out, 3)
        self.conv_atten = nn.Conv2d(out, out, 1, bias=False)
        self.bn_atten = nn.BatchNorm2d(out)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv(x)
        return h * self.bn_atten(self.conv_atten(h.mean((2, 3), keepdim=True))).sigmoid()


class _Fusion(nn.Module):
    """Spatial and context features joined, channels weighed, with a way around the weights."""

    def __init__(self, channels: int = 256):
        super().__init__()
        self.convblk = _ConvNorm(channels, channels, 1)
        self.conv1 = nn.Conv2d(channels, channels // 4, 1, bias=False)
        self.conv2 = nn.Conv2d(channels // 4, channels, 1, bias=False)

    def forward(self, spatial: Tensor, context: Tensor) -> Tensor:
        h = self.convblk(torch.cat([spatial, context], 1))
        weight = self.conv2(F.relu(self.conv1(h.mean((2, 3), keepdim=True)))).sigmoid()
        return h + h * weight


class _Output(nn.Module):
    def __init__(self, channels: int, middle: int, classes: int):
        super().__init__()
        self.conv = _ConvNorm(channels, middle, 3)
        self.conv_out = nn.Conv2d(middle, classes, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv_out(self.conv(x))


class _ConvNorm(nn.Module):
    def __init__(self, channels: int, out: int, kernel: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, out, kernel, padding=kernel // 2, bias=False)
        self.bn = nn.BatchNorm2d(out)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)))


def _nearest(x: Tensor, like: Tensor) -> Tensor:
    return F.interpolate(x, like.shape[-2:], mode="nearest")


def preprocess(image: Tensor) -> Tensor:
    """[B,3,H,W] 0..1 -> the network's input [B,3,512,512].

    As PIL's bilinear resize does it: a triangle as wide as the shrinking asks for, along the rows and then
    along the columns, each rounded to 8 bits; then ImageNet's mean and deviation.
    """
    x = (image * 255).round()
    x = _round(F.interpolate(x, (x.shape[2], INPUT), mode="bilinear", antialias=True))
    x = _round(F.interpolate(x, (INPUT, INPUT), mode="bilinear", antialias=True)) / 255
    mean, std = x.new_tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])[:, None, :, None, None]
    return (x - mean) / std


def _round(x: Tensor) -> Tensor:
    return (x + 0.5).floor().clamp(0, 255)  # halves go up


@torch.no_grad()
def parse(model: BiSeNet, image: Tensor, chunk: int = 8) -> Tensor:
    """Class of each pixel [B,H,W] int64, indices into CLASSES.

    image [B,3,H,W] RGB 0..1, a portrait aligned as in FFHQ; `chunk` pictures go through at a time.
    Raises ValueError for pictures that are not such.
    """
    image = check_image(image)
    weight = model.conv_out.conv_out.weight
    labels = [
        model(preprocess(x.to(weight.device)).to(weight.dtype))[0].argmax(1) for x in image.split(chunk)
    ]
    small = torch.cat(labels).to(image.device)
    h, w = image.shape[-2:]
    rows = torch.arange(h, device=image.device) * INPUT // h  # OpenCV's nearest: the corner, not the middle
    columns = torch.arange(w, device=image.device) * INPUT // w
    return small[:, rows[:, None], columns]


def select(labels: Tensor, name: str) -> Tensor:
    """Mask [B,1,H,W] float 0 or 1 of the classes that DiFaReli calls `name`, see SELECTORS.

    labels [B,H,W] integers. Raises ValueError for an unknown name or another shape.
    """
    if name not in SELECTORS:
        raise ValueError(f"unknown part of the face '{name}': choose one of {', '.join(SELECTORS)}")
    if labels.ndim != 3 or labels.is_floating_point():
        raise ValueError(f"labels must be integers [B,H,W], got {labels.dtype} {list(labels.shape)}")
    return torch.isin(labels, torch.tensor(SELECTORS[name], device=labels.device))[:, None].float()


def head_mask(labels: Tensor) -> Tensor:
    """Face, neck and hair [B,1,H,W], 0 or 1, of labels [B,H,W]."""
    return select(labels, "head")


def colours(labels: Tensor) -> Tensor:
    """Labels [B,H,W] as colours [B,3,H,W], 0..1, background black; neighbours in number differ in hue."""
    hue = labels * 0.381966
    phase = hue[:, None] + torch.tensor([0.0, 1 / 3, 2 / 3], device=labels.device)[:, None, None]
    return (0.5 + 0.5 * torch.cos(2 * torch.pi * phase)) * (labels > 0)[:, None]
