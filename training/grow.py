"""From a 64 px denoiser to a 128 px one: put a finer level around the trained ones.

The coarse network is trained on 2 x 2 means of what the fine one will see: noise of standard deviation
0.5 (`stage1 --noise-std 0.5`), so that its levels meet at 128 px what they have learned. The new level
starts as "pool, coarse network, enlarge" and learns the detail. In the spirit of progressive growing
(Karras et al. 2018); most of the training then costs a quarter.
"""

from __future__ import annotations

import re
from dataclasses import replace

import torch
from torch import Tensor

from rig_core.denoisers.rig import DiffusionRig, RigConfig


def finer(config: RigConfig) -> RigConfig:
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
