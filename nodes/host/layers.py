"""Layers that the host may keep on another device or in another type than they are needed in.

The host marks a layer by `comfy_cast_weights` and hangs what changes its weights on `weight_function` and
`bias_function`; its own layer classes obey. Ours become those when a network is handed to it.
"""

from __future__ import annotations

import comfy.ops
import torch.nn.functional as F
from torch import Tensor, nn


class _Lent:
    """`rig_core.denoisers.blocks.weights` asks here."""

    def weights_for(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        if self.comfy_cast_weights or self.weight_function or self.bias_function:
            return comfy.ops.cast_bias_weight(self, x)
        return self.weight, self.bias


class Linear(_Lent, comfy.ops.disable_weight_init.Linear):
    pass


class Conv1d(_Lent, comfy.ops.disable_weight_init.Conv1d):
    pass


class Conv2d(_Lent, comfy.ops.disable_weight_init.Conv2d):
    pass


class GroupNorm(_Lent, comfy.ops.disable_weight_init.GroupNorm):
    pass


class BatchNorm2d(_Lent, comfy.ops.CastWeightBiasOp, nn.BatchNorm2d):
    """Of a network in evaluation mode; the host has none of its own."""

    def forward(self, x: Tensor) -> Tensor:
        mean, var = (v.to(x.device, x.dtype) for v in (self.running_mean, self.running_var))
        return F.batch_norm(x, mean, var, *self.weights_for(x), eps=self.eps)


LAYERS = {getattr(nn, c.__name__): c for c in (Linear, Conv1d, Conv2d, GroupNorm, BatchNorm2d)}


def lend(net: nn.Module, cast: bool) -> nn.Module:
    """net with layers that the host may move one by one. cast: their weights are not in the type of x.

    Raises TypeError for a layer with weights that it could not keep elsewhere.
    """
    for m in net.modules():
        if type(m) in LAYERS:
            m.__class__ = LAYERS[type(m)]
            m.comfy_cast_weights, m.weight_function, m.bias_function = cast, [], []
        elif m._parameters:
            raise TypeError(f"{type(m).__name__} has weights, but no class of its own in LAYERS")
    return net
