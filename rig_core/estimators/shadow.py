"""How strong are the cast shadows on a face? DiFaReli's shadow scalar (Ponglertnapakorn et al. 2023, 3.2).

Two estimators, one scale (docs/shadow.md): the published one projects the semantic code of a diffusion
autoencoder (Preechakul et al. 2022) on the normal of a logistic classifier; ours is a small network.
Higher is a stronger cast shadow; `UNDECIDED` is where the published classifier changes its mind.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..denoisers.blocks import AttentionBlock, Downsample, norm_silu

UNDECIDED = 1.2846  # the published classifier's bias with the other sign: the scalar leaves the bias out


def scalar(model: DiffAEShadow | ShadowNet, image: Tensor) -> Tensor:
    """Strength of cast shadow of FFHQ-aligned faces: image [B,3,s,s] RGB 0..1 -> [B,1] float32.

    Images of another size than the model's are resized. Raises ValueError for what is no such image.
    """
    if image.ndim != 4 or image.shape[1] != 3 or image.shape[2] != image.shape[3] or image.shape[2] < 32:
        raise ValueError(
            f"the aligned face must be [B,3,s,s], s at least 32, got {list(image.shape)}: align it first"
        )
    if not image.isfinite().all():
        raise ValueError("the aligned face holds numbers that are not finite: check what made it")
    image = image.to(next(model.parameters()))
    if image.shape[-1] != model.size:
        image = F.interpolate(image, (model.size,) * 2, mode="bilinear", antialias=True).clamp(0, 1)
    return model(image).float()


class DiffAEShadow(nn.Module):
    """The published estimator. weight [1,D]: the classifier's normal in the space of the raw codes."""

    size = 256

    def __init__(self, encoder: SemanticEncoder, weight: Tensor):
        super().__init__()
        self.encoder = encoder
        self.weight = weight.cpu().double()  # no parameter: published in float64, which not every device has

    def forward(self, image: Tensor) -> Tensor:
        """[B,3,256,256] 0..1 -> [B,1]; neither bias nor normalisation of the code, as published."""
        return project(self.encoder(image * 2 - 1), self.weight)


def project(code: Tensor, weight: Tensor) -> Tensor:
    """Raw code [B,D] along weight [1,D] (float64, on the CPU) -> [B,1] in the code's type and place."""
    return (code.cpu().double() @ weight.T).to(code)


class SemanticEncoder(nn.Module):
    """DiffAE's semantic encoder: [B,3,s,s] in -1..1 -> raw code [B,out]. Published state-dict keys.

    The downsampling half of the ADM U-Net without timestep, one convolution a residual block; attention at
    `attention` (level numbers). The defaults are the published 256 px model.
    """

    def __init__(
        self, width: int = 128, mult=(1, 1, 2, 2, 4, 4, 4), blocks=2, attention=(4,), out: int = 512
    ):
        super().__init__()
        c = width * mult[0]
        layers = [nn.Sequential(nn.Conv2d(3, c, 3, padding=1))]
        for level, m in enumerate(mult):
            for _ in range(blocks):
                layers.append(nn.Sequential(_Block(c, c := width * m)))
                if level in attention:
                    layers[-1].append(AttentionBlock(c))
            if level < len(mult) - 1:
                layers.append(nn.Sequential(_Block(c, c, down=True)))
        self.input_blocks = nn.Sequential(*layers)
        self.middle_block = nn.Sequential(_Block(c, c), AttentionBlock(c), _Block(c, c))
        self.out = nn.Sequential(
            nn.GroupNorm(32, c), nn.SiLU(), nn.AdaptiveAvgPool2d(1), nn.Conv2d(c, out, 1)
        )

    def forward(self, x: Tensor) -> Tensor:
        h = self.middle_block(self.input_blocks(x))
        return self.out(h).flatten(1)


class _Block(nn.Module):
    """Norm, SiLU, one convolution and a skip connection; `down` halves the picture before the convolution."""

    def __init__(self, channels: int, out: int, down: bool = False):
        super().__init__()
        self.in_layers = nn.Sequential(
            nn.GroupNorm(32, channels), nn.SiLU(), nn.Conv2d(channels, out, 3, padding=1)
        )
        self.skip_connection = nn.Identity() if channels == out else nn.Conv2d(channels, out, 1)
        self.down = Downsample(channels, conv=False) if down else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        h = self.in_layers[2](self.down(norm_silu(x, self.in_layers[0])))
        return self.skip_connection(self.down(x)) + h


class ShadowNet(nn.Module):
    """The pack's own estimator, 0.22 million weights, trained by training/shadow.py."""

    size = 128

    def __init__(self):
        super().__init__()
        self.face = nn.Sequential(  # as the first half of landmarks.LandmarkNet, from which it is trained on
            *(*_down(3, 16), *_down(16, 24), _Residual(24), _Residual(24)),
            *(*_down(24, 48), _Residual(48), _Residual(48)),
        )
        self.shadow = nn.Sequential(*_down(48, 64), _Residual(64))
        self.head = nn.Linear(128, 1)
        self.register_buffer("calibration", torch.tensor([1.0, 0.0]))  # to the published scale: gain, offset

    def forward(self, image: Tensor) -> Tensor:
        """[B,3,128,128] 0..1 -> [B,1]."""
        gain, offset = self.calibration
        return self.amount(image) * gain + offset

    def amount(self, image: Tensor) -> Tensor:
        """The square root of the share of light that cast shadows take from the facial skin, about 0..1."""
        h = self.shadow(self.face((image - 0.5) * 4))
        return self.head(torch.cat([h.mean((2, 3)), h.amax((2, 3))], 1))


def _down(channels: int, out: int) -> tuple[nn.Module, ...]:
    return nn.Conv2d(channels, out, 3, 2, 1, bias=False), nn.BatchNorm2d(out), nn.ReLU()


class _Residual(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.a = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.an = nn.BatchNorm2d(channels)
        self.b = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.bn(self.b(F.relu(self.an(self.a(x))))))
