"""Networks that start from trained ones: a finer level around them, or DiFaReli from a DiffusionRig.

The coarse network is trained on 2 x 2 means of what the fine one will see: noise of standard deviation
0.5 (`stage1 --noise-std 0.5`), so that its levels meet at 128 px what they have learned. The new level
starts as "pool, coarse network, enlarge" and learns the detail. In the spirit of progressive growing
(Karras et al. 2018); most of the training then costs a quarter.
"""

from __future__ import annotations

import re
from dataclasses import replace

import torch
from torch import Tensor, nn

from rig_core.denoisers.blocks import Downsample, Upsample
from rig_core.denoisers.relight import DiFaReli, RelightConfig, identity_down, start_open
from rig_core.denoisers.rig import DiffusionRig, RigConfig
from rig_core.denoisers.unet import UNetConfig


def finer(config: UNetConfig) -> UNetConfig:
    """The architecture with one more level of the finest width on top."""
    return replace(
        config, image_size=2 * config.image_size, channel_mult=(config.channel_mult[0], *config.channel_mult)
    )


def grow(state: dict[str, Tensor], norm_groups: int = 32) -> DiffusionRig:
    """State dict of a DiffusionRig -> a denoiser of twice the size that starts out computing the same.

    norm_groups: of the coarse network; its weights do not tell.
    """
    config = RigConfig.from_state_dict(state, norm_groups=norm_groups)
    model = DiffusionRig(replace(finer(config), dropout=0.0))
    shift = config.num_res_blocks + 1  # blocks of the new level on the way down
    last = config.num_res_blocks + 1  # and on the way up
    count = (config.num_res_blocks + 1) * len(config.channel_mult)
    fresh = model.state_dict()

    def place(key: str) -> str:
        if m := re.match(r"denoisingUNet\.input_blocks\.(\d+)\.(.*)", key):
            i = int(m[1])
            return f"denoisingUNet.input_blocks.{i + shift if i else 0}.{m[2]}"
        return key

    fresh |= {place(k): v for k, v in state.items()}
    for i in range(
        count, count + last
    ):  # the new level takes the enlarged features and leaves the skips alone
        key = f"denoisingUNet.output_blocks.{i}.0.skip_connection"
        w = torch.zeros_like(fresh[f"{key}.weight"])
        n = w.shape[0]
        w[:, :n, 0, 0] = torch.eye(n)
        fresh[f"{key}.weight"], fresh[f"{key}.bias"] = w, torch.zeros(n)
    model.load_state_dict(fresh)
    return model


SPREAD, LEVEL = 0.25, 2.0


def grow_relight(
    state: dict[str, Tensor], norm_groups: int = 32, num_heads: int = 1, image_size: int | None = None
) -> DiFaReli:
    """State dict of a DiFaReli -> a denoiser of twice the size that starts out computing nearly the same.

    norm_groups, num_heads, image_size: of the coarse network (see `unet.read_architecture`).
    The new features of the Modulator are also factors of the U-Net's: they start as SPREAD times the coarse
    ones around LEVEL, whose tanh is nearly 1, and the step down to the coarse ones undoes that.
    """
    config = RelightConfig.from_state_dict(state, image_size, num_heads, norm_groups=norm_groups)
    model = start_open(DiFaReli(finer(config)))
    n = config.num_res_blocks
    count = (n + 1) * len(config.channel_mult)  # coarse blocks on the way up
    fresh = model.state_dict()

    def place(key: str) -> str:
        if m := re.match(r"(\w+)\.input_blocks\.(\d+)\.(.*)", key):
            return f"{m[1]}.input_blocks.{int(m[2]) + n + 1 if int(m[2]) else 0}.{m[3]}"
        return key

    model.load_state_dict(fresh | {place(k): v for k, v in state.items()})
    unet, modulator = model.ImgCond, model.ImgEncoder
    with torch.no_grad():
        identity_down(unet.input_blocks[n + 1][1].op)
        identity_up(unet.output_blocks[count - 1][-1].conv)
        for block in unet.output_blocks[count:]:  # the enlarged features; the skips are left alone
            skip = block[0].skip_connection
            channels = torch.arange(skip.out_channels)
            skip.weight.zero_()
            skip.weight[channels, channels] = 1
            skip.bias.zero_()
        first, down = modulator.input_blocks[0][0], modulator.input_blocks[n + 1][0].op
        first.weight.mul_(SPREAD)
        first.bias.mul_(SPREAD).add_(LEVEL)
        identity_down(down)
        down.weight.div_(SPREAD)
        down.bias.fill_(-LEVEL / SPREAD)
    return model


@torch.no_grad()
def identity_up(conv: nn.Conv2d) -> None:
    """Make a 3x3 convolution pass its input through."""
    conv.weight.zero_()
    channels = torch.arange(len(conv.weight))
    conv.weight[channels, channels, 1, 1] = 1
    conv.bias.zero_()


def from_rig(model: DiFaReli, state: dict[str, Tensor]) -> DiFaReli:
    """Give a fresh DiFaReli what a DiffusionRig of the same channels has learned of denoising.

    The residual blocks that resample there become plain means and repetitions; of the input convolution the
    part over the noisy picture stays; the global code is left out. ValueError when the channels differ.
    """
    own, taken = model.state_dict(), 0
    for key, value in state.items():
        m = re.match(r"denoisingUNet\.(\w+)\.(?:(\d+)\.)?(\d+)\.(.*)", key)
        if not m or "cond_emb_layers" in key:
            continue
        part, block, layer, rest = m[1], m[2], int(m[3]), m[4]
        if part == "input_blocks" and block != "0" or part == "middle_block":
            layer += 1
        name = ".".join(["ImgCond", part, *([block] if block else []), str(layer), rest])
        if key == "denoisingUNet.input_blocks.0.0.weight":
            value = value[:, :3]
        if name in own and own[name].shape == value.shape:
            own[name], taken = value, taken + 1
    if 2 * taken < sum(k.startswith("denoisingUNet.") for k in state):
        raise ValueError(f"only {taken} tensors of the DiffusionRig fit: take one of its preset and size")
    model.load_state_dict(own)
    for m in model.ImgCond.modules():
        if isinstance(m, Downsample):
            identity_down(m.op)
        elif isinstance(m, Upsample):
            identity_up(m.conv)
    return model
