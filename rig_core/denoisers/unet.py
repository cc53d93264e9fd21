"""The ADM U-Net (Dhariwal and Nichol 2021) that both denoisers are made of, and its architecture as data.

DiffusionRig resamples inside residual blocks and scales and shifts by a global code; DiFaReli resamples
with convolutions, gates every block by an MLP and multiplies what enters the way down by the features of
a second network. Submodules sit at the indices that the published checkpoints of each use.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .blocks import (
    GROUPS,
    AttentionBlock,
    Downsample,
    ResBlock,
    Upsample,
    fold,
    norm_silu,
    shared,
    timestep_embedding,
)


@dataclass(frozen=True)
class UNetConfig:
    """What the U-Nets of all denoisers have in common. The defaults are those of the published models.

    image_size             px; the network runs on any multiple of 2^(levels-1)
    width                  channels at multiplier 1; width * multiplier is a multiple of norm_groups
    channel_mult           one multiplier a level, finest first
    num_res_blocks         per level on the way down (one more on the way up)
    attention_resolutions  feature sizes in px, at `image_size`, that get attention (the middle always does)
    num_heads              of each attention
    dropout                in every residual block, training only
    norm_groups            of the normalisations (32 in the published models). A group of one channel loses
                           its mean, with it brightness and tint: give narrow networks fewer, 8 at width 32
    """

    image_size: int = 256
    width: int = 128
    channel_mult: tuple[float, ...] = (1, 1, 2, 2, 4, 4)
    num_res_blocks: int = 2
    attention_resolutions: tuple[int, ...] = (16,)
    num_heads: int = 1
    dropout: float = 0.0
    norm_groups: int = GROUPS

    def __post_init__(self):
        object.__setattr__(self, "channel_mult", tuple(self.channel_mult))
        object.__setattr__(self, "attention_resolutions", tuple(self.attention_resolutions))
        for f in dataclasses.fields(self):
            value = getattr(self, f.name)
            if f.type == "int" and (not isinstance(value, int) or value < 1):
                raise ValueError(f"{f.name} must be a whole number above 0, got {value!r}"[:100])
        for mult, channels in zip(self.channel_mult, self.channels, strict=True):
            if not channels or channels % self.norm_groups:
                raise ValueError(
                    f"width {self.width} x multiplier {mult} gives {channels} channels: "
                    f"choose a multiple of norm_groups, {self.norm_groups}"
                )
            if channels % self.num_heads:
                raise ValueError(f"{channels} channels cannot be shared by {self.num_heads} heads")
        if self.image_size % self.stride:
            raise ValueError(
                f"image_size {self.image_size} is not a multiple of {self.stride}, "
                f"which {len(self.channel_mult)} levels need"
            )

    @property
    def channels(self) -> list[int]:
        """Channels of each level, finest first."""
        return [round(self.width * m) for m in self.channel_mult]

    @property
    def stride(self) -> int:
        """Picture sides must be multiples of this."""
        return 2 ** (len(self.channel_mult) - 1)

    def attends(self, level: int) -> bool:
        return self.image_size >> level in self.attention_resolutions

    def to_dict(self) -> dict:
        return dataclasses.asdict(self)


def read_architecture(
    state: Mapping[str, Tensor], prefix: str, slot: int, what: str, image_size: int | None
) -> dict:
    """The common fields of a config, read off the keys below `prefix` and the shapes.

    slot: index of a stage's residual block in the input blocks. The picture size leaves no trace; when it
    is not given, the finest attention is taken to be at 16 px; without any, the coarsest level is 8 px.
    Raises ValueError when these are not the weights of `what`.
    """
    places = [m for k in state if (m := re.match(rf"{prefix}output_blocks\.(\d+)\.(\d)\.(\w+)", k))]
    count = len({m[1] for m in places})
    # each level's last block on the way up doubles the size, in a residual block or a convolution
    ups = [int(m[1]) for m in places if m[2] != "0" and m[3] in ("in_layers", "conv")]
    n = min(ups, default=count - 1)
    try:
        starts = [i for i in range(1, count + 1, n + 1) if i <= count]
        width = state[f"{prefix}time_embed.0.weight"].shape[1]
        widths = [state[f"{prefix}input_blocks.{i}.{slot}.out_layers.3.weight"].shape[0] for i in starts]
    except (KeyError, IndexError, ValueError) as e:
        raise ValueError(f"not the weights of {what}: {e} is missing or odd") from e
    if n < 1 or not widths or not width or count % (n + 1):
        raise ValueError(f"not the weights of {what}: blocks are missing")
    attn = [f"{prefix}input_blocks.{i}.{slot + 1}.qkv.weight" in state for i in starts]
    size = image_size or (16 << attn.index(True) if any(attn) else 8 << (len(widths) - 1))
    mult = [w / width for w in widths]
    return {
        "image_size": size,
        "width": width,
        "channel_mult": tuple(int(m) if m == int(m) else m for m in mult),
        "num_res_blocks": n,
        "attention_resolutions": tuple(size >> i for i, a in enumerate(attn) if a),
    }


class Encoder(nn.Module):
    """The way down and the middle of an ADM U-Net: `input_blocks`, `middle_block`.

    res(channels, out, resample) makes a residual block; conv_resample: halve with a strided convolution
    instead of a residual block; slots: leave index 0 of every block but the first, and the end of the
    middle, to the (parameterless) multiplication by another network's features.
    """

    def __init__(self, config: UNetConfig, in_channels: int, res: Callable, conv_resample: bool, slots: bool):
        super().__init__()
        c = config
        slot = [nn.Identity()] if slots else []

        def attention(channels: int) -> AttentionBlock:
            return AttentionBlock(channels, c.num_heads, c.norm_groups)

        ch = c.channels[0]
        self.input_blocks = nn.ModuleList([nn.Sequential(nn.Conv2d(in_channels, ch, 3, padding=1))])
        self.widths = [ch]  # channels that each input block gives
        for level, out in enumerate(c.channels):
            for _ in range(c.num_res_blocks):
                stage = [res(ch, out), *([attention(out)] if c.attends(level) else [])]
                self.input_blocks.append(nn.Sequential(*slot, *stage))
                ch = out
                self.widths.append(ch)
            if level < len(c.channels) - 1:
                down = Downsample(ch, True) if conv_resample else res(ch, ch, "down")
                self.input_blocks.append(nn.Sequential(*slot, down))
                self.widths.append(ch)
        self.middle_block = nn.Sequential(*slot, res(ch, ch), attention(ch), res(ch, ch), *slot)


class UNet(Encoder):
    """eps = unet(x, t, gain, offset, latents).

    detail_dim: width of the global code of DiffusionRig's blocks. gate_dims: (input, hidden) of the MLPs of
    DiFaReli's blocks, which also makes it resample with convolutions and take spatial latents.
    """

    def __init__(
        self,
        config: UNetConfig,
        in_channels: int,
        detail_dim: int | None = None,
        gate_dims: tuple[int, int] | None = None,
    ):
        c, g, emb = config, config.norm_groups, 4 * config.width
        spatial = gate_dims is not None

        def res(channels: int, out: int, resample: str | None = None) -> ResBlock:
            return ResBlock(channels, out, emb, c.dropout, detail_dim, gate_dims, resample, g)

        super().__init__(c, in_channels, res, spatial, spatial)
        self.time_embed = nn.Sequential(nn.Linear(c.width, emb), nn.SiLU(), nn.Linear(emb, emb))
        self.output_blocks = nn.ModuleList()
        ch, skips = self.widths[-1], list(self.widths)
        for level, out in reversed(list(enumerate(c.channels))):
            for i in range(c.num_res_blocks + 1):
                layers = [res(ch + skips.pop(), out)]
                ch = out
                if c.attends(level):
                    layers.append(AttentionBlock(ch, c.num_heads, g))
                if level and i == c.num_res_blocks:
                    layers.append(Upsample(ch, True) if spatial else res(ch, ch, "up"))
                self.output_blocks.append(nn.Sequential(*layers))
        self.out = nn.Sequential(nn.GroupNorm(g, ch), nn.SiLU(), nn.Conv2d(ch, 3, 3, padding=1))
        nn.init.zeros_(self.out[2].weight)
        nn.init.zeros_(self.out[2].bias)
        # in the order of `forward`
        stages = [*self.input_blocks, self.middle_block, *self.output_blocks]
        self.res_blocks = tuple(m for s in stages for m in s.modules() if isinstance(m, ResBlock))

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        gain: Tensor,
        offset: Tensor | None = None,
        latents: Sequence[Tensor] | None = None,
    ) -> Tensor:
        """x [B,in,H,W], t [B] -> [B,3,H,W].

        gain, offset [B or 1, sum of C]: the modulation of all `res_blocks` after the timestep's own.
        latents: [B or 1,C,h,w] factors of the input of every input block but the first, then of the middle
        block's input and output.
        """
        e = timestep_embedding(shared(t), self.time_embed[0].in_features)
        e = self.time_embed(e.to(x.dtype))
        modulation = iter(fold(self.res_blocks, e, gain, offset))
        factors = iter(latents or [None] * (len(self.input_blocks) + 1))

        def run(layers: nn.Sequential, h: Tensor, factor: Tensor | None = None) -> Tensor:
            h = h if factor is None else h * factor
            for layer in layers:
                h = layer(h, *next(modulation)) if isinstance(layer, ResBlock) else layer(h)
            return h

        h = run(self.input_blocks[0], x)
        skips = [h]
        for layers in self.input_blocks[1:]:
            h = run(layers, h, next(factors))
            skips.append(h)
        h = run(self.middle_block, h, next(factors))
        last = next(factors)
        h = h if last is None else h * last
        for layers in self.output_blocks:
            h = run(layers, torch.cat([h, skips.pop()], 1))
        return self.out[2](norm_silu(h, self.out[0]))


def packed(x: Tensor) -> Tensor:
    """Channels last, which convolutions and attention prefer on CPU and CUDA."""
    return x.contiguous(memory_format=torch.channels_last) if x.device.type in ("cpu", "cuda") else x
