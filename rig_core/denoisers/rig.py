"""DiffusionRig's denoiser (Ding et al., CVPR 2023, section 3.2): an ADM U-Net over a noisy picture and
nine channels of physical buffers, with a ResNet-18 that reads a photo into one global code.

The condition of a photo is computed once (`DiffusionRig.condition`) and serves every step of every
sampler. State-dict keys are those of the published checkpoints.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .blocks import GROUPS, project, strided_conv
from .unet import UNet, UNetConfig, packed, read_architecture


@dataclass(frozen=True)
class RigConfig(UNetConfig):
    """Architecture of a DiffusionRig denoiser. The defaults are the published 256 px model.

    latent_dim     size of the global code
    encoder_width  channels of the ResNet-18's first stage (64 in the published models)
    """

    dropout: float = 0.1
    latent_dim: int = 64
    encoder_width: int = 64

    @classmethod
    def from_state_dict(
        cls,
        state: Mapping[str, Tensor],
        image_size: int | None = None,
        num_heads: int = 1,
        dropout: float = 0.1,
        norm_groups: int = GROUPS,
    ) -> RigConfig:
        """Read the architecture off keys and shapes. Raises ValueError when it is another network's.

        What leaves no trace in the weights can be given: dropout, heads and norm groups (as published
        by default), and the picture size (see `unet.read_architecture`).
        """
        common = read_architecture(state, "denoisingUNet.", 0, "a DiffusionRig denoiser", image_size)
        try:
            latent_dim, top = state["encoder.fc.weight"].shape
        except (KeyError, ValueError) as e:
            raise ValueError(f"not the weights of a DiffusionRig denoiser: {e} is missing or odd") from e
        return cls(
            **common,
            num_heads=num_heads,
            dropout=dropout,
            norm_groups=norm_groups,
            latent_dim=latent_dim,
            encoder_width=top // 8,
        )


class ResNet18(nn.Module):
    """He et al. 2016 with a linear head: [B,3,H,W] -> [B,out]. torchvision's state-dict keys."""

    def __init__(self, out: int, width: int = 64):
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.layer1 = nn.Sequential(_BasicBlock(width, width), _BasicBlock(width, width))
        for i in (1, 2, 3):
            c = width << i
            setattr(self, f"layer{i + 1}", nn.Sequential(_BasicBlock(c // 2, c, 2), _BasicBlock(c, c)))
        self.fc = nn.Linear(8 * width, out)
        for m in self.modules():
            if isinstance(m, nn.Conv2d) and not m.weight.is_meta:  # there it would load torch's compiler
                nn.init.kaiming_normal_(m.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        h = F.max_pool2d(F.relu(self.bn1(self.conv1(x))), 3, stride=2, padding=1)
        h = self.layer4(self.layer3(self.layer2(self.layer1(h))))
        return self.fc(h.mean((2, 3)))


class _BasicBlock(nn.Module):
    def __init__(self, channels: int, out: int, stride: int = 1):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, out, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(out)
        self.conv2 = nn.Conv2d(out, out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(out)
        self.downsample = None
        if stride != 1:
            conv = nn.Conv2d(channels, out, 1, stride, bias=False)
            self.downsample = nn.Sequential(conv, nn.BatchNorm2d(out))

    def forward(self, x: Tensor) -> Tensor:
        h = self.bn2(self.conv2(F.relu(self.bn1(strided_conv(x, self.conv1)))))
        return F.relu(h + (x if self.downsample is None else self.downsample(x)))


@dataclass(frozen=True)
class RigCondition:
    """All that a photo and its buffers contribute to the denoiser, computed once.

    N pictures may share one code (M = 1), as many lights on one photo do.

    physical [N,9,H,W]        rendered, normal, albedo as `Buffers.stack` gives them
    code     [M,latent_dim]   of the photo
    gain     [M, sum of C]    1 + scale of every residual block, float32
    offset   [M, sum of C]    shift of every residual block, float32
    """

    physical: Tensor
    code: Tensor
    gain: Tensor
    offset: Tensor

    def __len__(self) -> int:
        return len(self.physical)

    def _map(self, f, g) -> RigCondition:
        """f on the buffers, g on what belongs to the code."""
        return RigCondition(f(self.physical), g(self.code), g(self.gain), g(self.offset))

    def to(self, *args, **kwargs) -> RigCondition:
        """Move every tensor, as Tensor.to does."""
        f = lambda v: v.to(*args, **kwargs)  # noqa: E731
        return self._map(f, f)

    def __getitem__(self, index) -> RigCondition:
        """Select pictures. An int keeps the batch axis; a shared code stays shared."""
        if isinstance(index, int):
            n = len(self)
            if not -n <= index < n:
                raise IndexError(f"RigCondition holds {n} pictures, there is no picture {index}")
            index = slice(index % n, index % n + 1)
        return self._map(lambda v: v[index], lambda v: v if len(v) == 1 else v[index])

    def expand(self, n: int) -> RigCondition:
        """Repeat the one picture n times (its code stays one); n pictures stay as they are."""
        if len(self) not in (1, n):
            raise ValueError(f"RigCondition holds {len(self)} pictures, wanted 1 or {n}")
        return self._map(lambda v: v.expand(n, *v.shape[1:]), lambda v: v)

    def replace(self, physical: Tensor) -> RigCondition:
        """The same photo with other buffers [N,9,H,W], say one per light. A shared code serves any N."""
        if physical.ndim != 4 or physical.shape[1] != self.physical.shape[1]:
            raise ValueError(f"buffers must be [N,9,H,W], got {list(physical.shape)}")
        if len(self.code) not in (1, len(physical)):
            raise ValueError(f"{len(self.code)} codes cannot serve {len(physical)} buffers: index one photo")
        like = self.physical
        return dataclasses.replace(self, physical=physical.to(like.device, like.dtype))


class DiffusionRig(nn.Module):
    """eps = model(x_t, t, model.condition(physical, image)).

    Half precision: `model.to(torch.bfloat16)` (or float16 on a GPU), or autocast. Statistics of the
    norms and the modulation stay float32; x_t may stay float32, and eps comes back in x_t's type.
    compute_dtype: for a host whose layers hold their weights in another type (see `blocks.weights`).
    """

    compute_dtype: torch.dtype | None = None

    def __init__(self, config: RigConfig):
        super().__init__()
        self.config = config
        self.denoisingUNet = UNet(config, 12, detail_dim=config.latent_dim)
        self.encoder = ResNet18(config.latent_dim, config.encoder_width)

    @property
    def dtype(self) -> torch.dtype:
        return self.compute_dtype or self.encoder.fc.weight.dtype

    def encode(self, image: Tensor) -> Tensor:
        """[B,3,H,W] in -1..1, the whole photo at the denoiser's size -> code [B,latent_dim]."""
        if image.ndim != 4 or image.shape[1] != 3:
            raise ValueError(f"the photo must be [B,3,H,W] in -1..1, got {list(image.shape)}")
        return self.encoder(packed(image.to(self.dtype)))

    def condition(
        self, physical: Tensor, image: Tensor | None = None, code: Tensor | None = None
    ) -> RigCondition:
        """What `forward` needs of a photo, once for all its steps.

        physical [N,9,H,W]: `Buffers.stack()`; with it image [M,3,h,w] in -1..1 or its code [M,latent_dim],
        M being N or 1. Differentiable, so that training goes the same way.
        """
        if physical.ndim != 4 or physical.shape[1] != 9:
            raise ValueError(f"buffers must be [N,9,H,W] (Buffers.stack()), got {list(physical.shape)}")
        if (image is None) == (code is None):
            raise ValueError("give condition() either the photo (image=) or its code (code=)")
        code = self.encode(image) if code is None else code.to(self.dtype)
        if code.ndim != 2 or code.shape[1] != self.config.latent_dim:
            raise ValueError(f"code must be [M,{self.config.latent_dim}], got {list(code.shape)}")
        if len(code) not in (1, len(physical)):
            raise ValueError(f"{len(code)} photos cannot serve {len(physical)} buffers: give 1 or as many")
        scale, offset = project([b.cond_emb_layers for b in self.denoisingUNet.res_blocks], code)
        return RigCondition(physical.to(self.dtype), code, 1 + scale, offset)

    def forward(self, x_t: Tensor, t: Tensor, condition: RigCondition) -> Tensor:
        """x_t [B,3,H,W], t [B] original timesteps 0..999 (may be fractional) -> eps [B,3,H,W].

        The condition holds B pictures, or one for all. H and W are multiples of `config.stride`.
        """
        (b, _, *size), s = x_t.shape, self.config.stride
        if size[0] % s or size[1] % s:
            raise ValueError(f"picture sides must be multiples of {s}, got {size[0]} x {size[1]}")
        if list(condition.physical.shape[2:]) != size:
            raise ValueError(
                f"buffers are {list(condition.physical.shape[2:])}, the picture is {size}: render at its size"
            )
        c = condition.expand(b)
        x = packed(torch.cat([x_t.to(self.dtype), c.physical.to(self.dtype)], 1))
        return self.denoisingUNet(x, t.expand(b), c.gain, c.offset).to(x_t.dtype)
