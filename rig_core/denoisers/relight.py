"""DiFaReli's denoiser (Ponglertnapakorn et al., ICCV 2023, section 3.3): an ADM U-Net whose way down is
multiplied by the features of a Modulator, and whose residual blocks are gated by a vector of the face.

The Modulator sees the shading reference and the background, the vector holds shape, pose, expression,
camera, identity and cast shadow. Both are read once per photo and light (`DiFaReli.condition`) and serve
every step of every sampler. State-dict keys below `ImgCond.` and `ImgEncoder.` are those of the published
pair of checkpoints.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .blocks import GROUPS, Downsample, ResBlock
from .unet import Encoder, UNet, UNetConfig, packed, read_architecture

SPATIAL = 6  # channels: shading reference, background
_UNIT = 1.2784645  # SiLU of this is 1


@dataclass(frozen=True)
class RelightConfig(UNetConfig):
    """Architecture of a DiFaReli denoiser. The defaults are the published 256 px model.

    cond_dim   length of the vector condition
    proj_dim   hidden width of the MLP of each residual block
    """

    attention_resolutions: tuple[int, ...] = (16, 8)
    num_heads: int = 4
    cond_dim: int = 672
    proj_dim: int = 512

    @classmethod
    def from_state_dict(
        cls,
        state: Mapping[str, Tensor],
        image_size: int | None = None,
        num_heads: int = 4,
        dropout: float = 0.0,
        norm_groups: int = GROUPS,
    ) -> RelightConfig:
        """Read the architecture off keys and shapes. Raises ValueError when it is another network's.

        What leaves no trace in the weights can be given: dropout, heads and norm groups (as published
        by default), and the picture size (see `unet.read_architecture`).
        """
        common = read_architecture(state, "ImgCond.", 1, "a DiFaReli denoiser", image_size)
        try:
            proj_dim, cond_dim = state["ImgCond.input_blocks.1.1.cond_proj_layers.0.weight"].shape
        except (KeyError, ValueError) as e:
            raise ValueError(f"not the weights of a DiFaReli denoiser: {e} is missing or odd") from e
        return cls(
            **common,
            num_heads=num_heads,
            dropout=dropout,
            norm_groups=norm_groups,
            cond_dim=cond_dim,
            proj_dim=proj_dim,
        )


@dataclass(frozen=True)
class RelightCondition:
    """All that a photo under a light contributes to the denoiser, computed once.

    Either part may be a batch of one that serves all pictures: many lights on one photo share a gain,
    many shadow strengths under one light share latents.

    gain     [N or 1, sum of C]       factors of all residual blocks, float32
    latents  tuple of [M or 1,C,h,w]  tanh of the Modulator's features, finest first
    """

    gain: Tensor
    latents: tuple[Tensor, ...]

    def __len__(self) -> int:
        return max(len(self.gain), len(self.latents[0]))

    def _map(self, f) -> RelightCondition:
        return RelightCondition(f(self.gain), tuple(f(v) for v in self.latents))

    def to(self, *args, **kwargs) -> RelightCondition:
        """Move every tensor, as Tensor.to does."""
        return self._map(lambda v: v.to(*args, **kwargs))

    def __getitem__(self, index) -> RelightCondition:
        """Select pictures. An int keeps the batch axis; what is shared stays shared."""
        if isinstance(index, int):
            n = len(self)
            if not -n <= index < n:
                raise IndexError(f"RelightCondition holds {n} pictures, there is no picture {index}")
            index = slice(index % n, index % n + 1)
        return self._map(lambda v: v if len(v) == 1 else v[index])


class Modulator(Encoder):
    """[N,6,H,W] -> the features after each input block and after the middle, finest first."""

    def __init__(self, config: UNetConfig):
        c = config

        def res(channels: int, out: int) -> ResBlock:
            return ResBlock(channels, out, dropout=c.dropout, groups=c.norm_groups)

        super().__init__(c, SPATIAL, res, conv_resample=True, slots=False)

    def forward(self, spatial: Tensor) -> list[Tensor]:
        h, features = spatial, []
        for layers in [*self.input_blocks, self.middle_block]:
            h = layers(h)
            features.append(h)
        return features


class DiFaReli(nn.Module):
    """eps = model(x_t, t, model.condition(spatial, vector)).

    Half precision: `model.to(torch.bfloat16)` (or float16 on a GPU), or autocast. Statistics of the
    norms and the gates stay float32; x_t may stay float32 or float64, and eps comes back in its type.
    compute_dtype: for a host whose layers hold their weights in another type (see `blocks.weights`).
    """

    compute_dtype: torch.dtype | None = None

    def __init__(self, config: RelightConfig):
        super().__init__()
        self.config = config
        self.ImgCond = UNet(config, 3, gate_dims=(config.cond_dim, config.proj_dim))
        self.ImgEncoder = Modulator(config)

    @property
    def dtype(self) -> torch.dtype:
        return self.compute_dtype or self.ImgCond.out[2].weight.dtype

    def condition(self, spatial: Tensor, vector: Tensor) -> RelightCondition:
        """What `forward` needs of a photo under a light, once for all its steps.

        spatial [N,6,H,W]: `conditions.spatial`; vector [M,cond_dim]: `conditions.vector`; N and M are the
        same, or one of them is 1. Differentiable, so that training goes the same way.
        """
        if spatial.ndim != 4 or spatial.shape[1] != SPATIAL:
            raise ValueError(
                f"the spatial condition must be [N,{SPATIAL},H,W] (shading, background), "
                f"got {list(spatial.shape)}"
            )
        if vector.ndim != 2 or vector.shape[1] != self.config.cond_dim:
            raise ValueError(
                f"the vector condition must be [M,{self.config.cond_dim}], got {list(vector.shape)}: "
                "use the head and the identity encoder that this denoiser was trained with"
            )
        n, m = len(spatial), len(vector)
        if n != m and 1 not in (n, m):
            raise ValueError(f"{m} vectors cannot serve {n} spatial conditions: give 1 or as many")
        self._check_size(spatial)
        gates = [b.cond_proj_layers(vector.to(self.dtype)) for b in self.ImgCond.res_blocks]
        features = self.ImgEncoder(packed(spatial.to(self.dtype)))
        return RelightCondition(torch.cat(gates, 1).float(), tuple(f.tanh() for f in features))

    def forward(self, x_t: Tensor, t: Tensor, condition: RelightCondition) -> Tensor:
        """x_t [B,3,H,W], t [B] original timesteps 0..999 (may be fractional) -> eps [B,3,H,W].

        The condition holds B pictures, or one for all. H and W are multiples of `config.stride`.
        """
        self._check_size(x_t)
        have = condition.latents[0].shape[2:]
        if have != x_t.shape[2:]:
            raise ValueError(
                f"the condition is for pictures of {list(have)}, this one is {list(x_t.shape[2:])}: "
                "make both at one size"
            )
        if len(condition) not in (1, len(x_t)):
            raise ValueError(f"the condition holds {len(condition)} pictures, wanted 1 or {len(x_t)}")
        latents = [v.to(self.dtype) for v in condition.latents]
        x = packed(x_t.to(self.dtype))
        return self.ImgCond(x, t.expand(len(x)), condition.gain, None, latents).to(x_t.dtype)

    def _check_size(self, x: Tensor) -> None:
        (h, w), s = x.shape[2:], self.config.stride
        if h % s or w % s:
            raise ValueError(f"picture sides must be multiples of {s}, got {h} x {w}")


@torch.no_grad()
def start_open(model: DiFaReli, level: float = 1.5) -> DiFaReli:
    """Set a fresh network up so that nothing is gated away: every factor starts near 1.

    The last layer of each gate gives 1; the Modulator passes the constant `level` (tanh 1.5 is 0.91) from
    its first convolution down through means. With weights as they come from initialisation, a product of
    ten small random factors would have to grow first.
    """
    for block in model.ImgCond.res_blocks:
        last = block.cond_proj_layers[4]
        last.weight.mul_(0.1)
        last.bias.fill_(_UNIT)
    first = model.ImgEncoder.input_blocks[0][0]
    first.weight.mul_(0.5)
    first.bias.fill_(level)
    for m in model.ImgEncoder.modules():
        if isinstance(m, Downsample):
            identity_down(m.op)
        elif isinstance(m, ResBlock) and isinstance(m.skip_connection, nn.Conv2d):
            weight = m.skip_connection.weight
            out, channels = weight.shape[:2]
            weight.zero_()
            weight[torch.arange(out), torch.arange(out) % channels] = 1
            m.skip_connection.bias.zero_()
    return model


@torch.no_grad()
def identity_down(conv: nn.Conv2d) -> None:
    """Make a 3x3 convolution of stride 2 and padding 1 the 2x2 mean of each channel."""
    conv.weight.zero_()
    channels = torch.arange(len(conv.weight))
    conv.weight[channels, channels, 1:, 1:] = 0.25
    conv.bias.zero_()


def both(unet: Mapping[str, Tensor], modulator: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The two published state dicts as one of `DiFaReli`."""
    return {f"ImgCond.{k}": v for k, v in unet.items()} | {f"ImgEncoder.{k}": v for k, v in modulator.items()}
