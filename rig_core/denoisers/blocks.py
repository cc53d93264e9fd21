"""Building blocks of the ADM U-Net, shared by both denoisers.

Architecture: Dhariwal and Nichol 2021, "Diffusion Models Beat GANs on Image Synthesis" (residual blocks
that resample, adaptive group normalisation, attention at low resolutions). Submodules sit at the
indices that the published checkpoints use, so that state dicts load without renaming.

A residual block's second normalisation is modulated by the timestep and by per-image conditions. Every
such modulation is affine per channel, so a whole chain of them, the norm's own weights included, folds
into one (scale, shift) per block: `fold`. The blocks therefore know nothing of what drives them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

GROUPS = 32  # of every published model


def timestep_embedding(t: Tensor, width: int, max_period: float = 10000.0) -> Tensor:
    """Sinusoidal embedding, t [N] (may be fractional) -> [N, width] float32.

    Cosines first, then sines, a zero column when the width is odd (Vaswani et al. 2017, section 3.5).
    """
    half = width // 2
    k = torch.arange(half, device=t.device, dtype=torch.float32)
    angle = t.float()[:, None] * torch.exp(-math.log(max_period) / half * k)
    return F.pad(torch.cat([angle.cos(), angle.sin()], 1), (0, width % 2))


def weights(layer: nn.Module, x: Tensor) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of a layer for its input x: all that reads them without calling the layer comes here.

    A host that keeps them on another device or in another type gives its layers a `weights_for(x)`, which
    brings them to where x is and into its type.
    """
    lent = getattr(layer, "weights_for", None)
    return (layer.weight, layer.bias) if lent is None else lent(x)


def group_norm(h: Tensor, norm: nn.GroupNorm, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """GroupNorm of h [B,C,H,W] with the given weight and bias [C] (None: 1 and 0), in h's type.

    PyTorch's kernels keep the statistics in float32. In training all of it is float32, as published; on a
    CPU the half-precision backward pass would also take six times as long.
    """
    kind = torch.float32 if h.requires_grad else h.dtype
    if weight is not None:
        weight, bias = weight.to(kind), bias.to(kind)
    return F.group_norm(h.to(kind), norm.num_groups, weight, bias, norm.eps).to(h.dtype)


def norm_silu(
    h: Tensor, norm: nn.GroupNorm, scale: Tensor | None = None, shift: Tensor | None = None
) -> Tensor:
    """SiLU(GroupNorm(h) * scale + shift); with no scale, the norm's own weight and bias.

    h [B,C,H,W]; scale and shift [B,C] or [1,C] replace the norm's weight and bias (see `fold`).
    """
    if scale is None:
        h = group_norm(h, norm, *weights(norm, h))
    elif len(scale) == 1:  # one kernel: the modulation is the norm's weight
        h = group_norm(h, norm, scale[0], shift[0])
    else:
        h = group_norm(h, norm, None, None)
        scale, shift = scale.to(h.dtype)[..., None, None], shift.to(h.dtype)[..., None, None]
        h = torch.addcmul(shift, h, scale, out=None if h.requires_grad or scale.requires_grad else h)
    return F.silu(h, inplace=not h.requires_grad)


class Downsample(nn.Module):
    """Halve [B,C,H,W]: a strided convolution, or the 2x2 mean inside a residual block."""

    def __init__(self, channels: int, conv: bool):
        super().__init__()
        self.op = nn.Conv2d(channels, channels, 3, stride=2, padding=1) if conv else nn.AvgPool2d(2)

    def forward(self, x: Tensor) -> Tensor:
        return strided_conv(x, self.op) if isinstance(self.op, nn.Conv2d) else self.op(x)


def strided_conv(x: Tensor, conv: nn.Conv2d) -> Tensor:
    """`conv`, 3x3 with padding 1, of x [B,C,H,W], safe down to a single pixel.

    On a single pixel the stride has no effect, but with it oneDNN's bfloat16 gradient leaves the taps that
    only meet padding uninitialised (PyTorch 2.13 on a CPU), so that training meets NaN now and then.
    """
    stride = 1 if x.shape[2:] == (1, 1) else conv.stride
    return F.conv2d(x, *weights(conv, x), stride, conv.padding)


class Upsample(nn.Module):
    """Double [B,C,H,W] by repeating pixels, optionally followed by a convolution."""

    def __init__(self, channels: int, conv: bool):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1) if conv else None

    def forward(self, x: Tensor) -> Tensor:
        if self.conv is None:
            return F.interpolate(x, scale_factor=2, mode="nearest")
        return upsampled_conv(x, self.conv)


def upsampled_conv(x: Tensor, conv: nn.Conv2d) -> Tensor:
    """The 3x3 `conv` of x [B,C,H,W] doubled by repeating pixels -> [B,C',2H,2W].

    Repeated pixels meet sums of the kernel's taps, so a transposed convolution of stride 2 with the 4x4
    kernel of those sums gives the same with 16 instead of 36 products a pixel of x. On a CPU that takes
    half the time; small pictures do not repay the sums, and on other devices it is not measured.
    """
    if x.device.type != "cpu" or x.shape[0] * x.shape[2] * x.shape[3] < 1024:
        return conv(F.interpolate(x, scale_factor=2, mode="nearest"))
    weight, bias = weights(conv, x)
    taps = F.avg_pool2d(weight.flip(2, 3), 2, stride=1, padding=1, divisor_override=1)
    return F.conv_transpose2d(x, taps.transpose(0, 1), bias, stride=2, padding=1)


def _zero(layer: nn.Module) -> nn.Module:
    """Start a branch at zero, so that a fresh network is the identity around it."""
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


class ResBlock(nn.Module):
    """Residual block with a foldable modulation of its second normalisation.

    emb_dim     width of the timestep embedding, None for a block without one
    detail_dim  width of a global code that scales and shifts after the timestep (DiffusionRig)
    gate_dims   (input, hidden) of a SiLU MLP that multiplies after the timestep (DiFaReli)
    resample    None, "up" or "down"
    groups      of the normalisations
    """

    def __init__(
        self,
        channels: int,
        out_channels: int,
        emb_dim: int | None = None,
        dropout: float = 0.0,
        detail_dim: int | None = None,
        gate_dims: tuple[int, int] | None = None,
        resample: str | None = None,
        groups: int = GROUPS,
    ):
        super().__init__()
        self.out_channels = out_channels
        self.in_layers = nn.Sequential(
            nn.GroupNorm(groups, channels), nn.SiLU(), nn.Conv2d(channels, out_channels, 3, padding=1)
        )
        if emb_dim is not None:
            self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(emb_dim, 2 * out_channels))
        if detail_dim is not None:
            self.cond_emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(detail_dim, 2 * out_channels))
        if gate_dims is not None:
            n, hidden = gate_dims
            widths = [(n, hidden), (hidden, hidden), (hidden, out_channels)]
            self.cond_proj_layers = nn.Sequential(*(m for w in widths for m in (nn.Linear(*w), nn.SiLU())))
        self.out_layers = nn.Sequential(
            nn.GroupNorm(groups, out_channels),
            nn.SiLU(),
            nn.Dropout(dropout),
            _zero(nn.Conv2d(out_channels, out_channels, 3, padding=1)),
        )
        self.skip_connection = (
            nn.Identity() if channels == out_channels else nn.Conv2d(channels, out_channels, 1)
        )
        self.resample = {"up": Upsample, "down": Downsample}[resample](channels, False) if resample else None

    def forward(self, x: Tensor, scale: Tensor | None = None, shift: Tensor | None = None) -> Tensor:
        """x [B,C,H,W]; scale, shift [B,out] or [1,out] from `fold`, None where nothing modulates."""
        h = norm_silu(x, self.in_layers[0])
        if isinstance(self.resample, Upsample):
            h, x = upsampled_conv(h, self.in_layers[2]), self.resample(x)
        elif self.resample is not None:
            h, x = self.in_layers[2](self.resample(h)), self.resample(x)
        else:
            h = self.in_layers[2](h)
        h = norm_silu(h, self.out_layers[0], scale, shift)
        h = self.out_layers[3](self.out_layers[2](h))
        return h.add_(self.skip_connection(x))


class AttentionBlock(nn.Module):
    """Self-attention over pixels, [B,C,H,W] -> the same. Weights are Conv1d-shaped as published."""

    def __init__(self, channels: int, heads: int = 1, groups: int = GROUPS):
        super().__init__()
        self.heads = heads
        self.norm = nn.GroupNorm(groups, channels)
        self.qkv = nn.Conv1d(channels, 3 * channels, 1)
        self.proj_out = _zero(nn.Conv1d(channels, channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        tokens = group_norm(x, self.norm, *weights(self.norm, x)).flatten(2).transpose(1, 2)
        weight, bias = weights(self.qkv, x)
        qkv = F.linear(tokens, weight[..., 0], bias)
        # the published order keeps q, k and v of one head together
        q, k, v = qkv.unflatten(2, (self.heads, 3, -1)).permute(3, 0, 2, 1, 4)
        h = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        weight, bias = weights(self.proj_out, x)
        h = F.linear(h, weight[..., 0], bias)
        return x + h.transpose(1, 2).unflatten(2, x.shape[2:])


def project(layers: Sequence[nn.Sequential], e: Tensor) -> tuple[Tensor, Tensor]:
    """Scales and shifts of all blocks, from their SiLU-Linear layers, joined along the channels.

    e [M,D] is the input of every layer; SiLU is taken once. Returns two [M, sum of C] in float32.
    """
    e = F.silu(e)
    both = torch.cat([s[1](e).unflatten(1, (2, -1)) for s in layers], 2)
    return both.float().unbind(1)


def fold(
    blocks: Sequence[ResBlock], time: Tensor, gain: Tensor, offset: Tensor | None = None
) -> list[tuple[Tensor, Tensor]]:
    """One (scale, shift) a block for GroupNorm -> (1+s_t) h + b_t -> gain h + offset.

    time [T,emb_dim] timestep embeddings, gain and offset [M, sum of C] of all blocks joined;
    T and M are the batch or 1. Float32 throughout, whatever the network runs in.
    """
    s_t, b_t = project([b.emb_layers for b in blocks], time)
    norms = [weights(b.out_layers[0], s_t) for b in blocks]
    w, b = (torch.cat(v).float() for v in zip(*norms, strict=True))
    scale = torch.addcmul(gain, s_t, gain)
    shift = torch.addcmul(scale * b, b_t, gain)
    if offset is not None:
        shift = shift + offset
    widths = [b.out_channels for b in blocks]
    return list(zip((scale * w).split(widths, 1), shift.split(widths, 1), strict=True))


def shared(t: Tensor) -> Tensor:
    """[1] when all timesteps of a batch are known to be equal, so that one modulation serves all."""
    if len(t) == 1 or t.stride(0) == 0:
        return t[:1]
    # reading values back would stall a GPU and break a compiled graph
    if t.device.type == "cpu" and not torch.compiler.is_compiling() and bool((t == t[0]).all()):
        return t[:1]
    return t
