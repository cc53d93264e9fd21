"""Low-rank adapters of a denoiser's convolutions and attention (Hu et al. 2022), for personal models.

Each adapted weight W [out, in, ...] becomes W + up @ down with down [rank, in, ...] and up [out, rank]. While
training they sit in the network as parametrisations; on file they are two tensors a layer; loading adds
them to the weights, so that a loaded personal model costs what its base does.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

TRAINABLE = r".*\.parametrizations\.weight\.0\."  # of the names of an adapted network's parameters


class LowRank(nn.Module):
    """weight -> weight + up @ down. up starts at zero, so the network starts unchanged."""

    def __init__(self, weight: Tensor, rank: int):
        super().__init__()
        n = weight[0].numel()
        self.down = nn.Parameter(torch.randn(rank, *weight.shape[1:]) / n**0.5)
        self.up = nn.Parameter(torch.zeros(len(weight), rank))

    def forward(self, weight: Tensor) -> Tensor:
        return torch.addmm(weight.flatten(1), self.up, self.down.flatten(1)).view(weight.shape)


def layers(net: nn.Module) -> dict[str, nn.Module]:
    """What is adapted, by name: every convolution, attention's projections among them."""
    return {name: m for name, m in net.named_modules() if isinstance(m, (nn.Conv1d, nn.Conv2d))}


def attach(net: nn.Module, rank: int) -> None:
    """Give each layer of `net` an adapter. Raises ValueError for a rank below 1."""
    if rank < 1:
        raise ValueError(f"the rank of the adapters must be at least 1, got {rank}")
    for layer in layers(net).values():
        adapter = LowRank(layer.weight.detach(), min(rank, len(layer.weight))).to(layer.weight.device)
        parametrize.register_parametrization(layer, "weight", adapter)


def tensors(net: nn.Module) -> dict[str, Tensor]:
    """The adapters of a network after `attach`: {layer.down, layer.up}."""
    found = {}
    for name, layer in layers(net).items():
        adapter = layer.parametrizations.weight[0]
        found |= {f"{name}.down": adapter.down.detach(), f"{name}.up": adapter.up.detach()}
    return found


def merge(net: nn.Module, adapters: dict[str, Tensor]) -> None:
    """Add adapters to the weights of the plain network that they were trained on.

    Raises ValueError when they do not fit: missing or foreign layers, other shapes.
    """
    wanted = layers(net)
    names = {k.rpartition(".")[0] for k in adapters}
    if odd := sorted(names - wanted.keys()):
        raise ValueError(f"there is no layer '{odd[0]}' to adapt: the adapters belong to another network")
    for name in names:
        down, up = (adapters.get(f"{name}.{k}") for k in ("down", "up"))
        weight = wanted[name].weight
        if down is None or up is None or up.ndim != 2 or up.shape != (len(weight), len(down)):
            raise ValueError(f"the adapter of '{name}' is incomplete or of odd shape")
        if down.shape[1:] != weight.shape[1:]:
            raise ValueError(f"the adapter of '{name}' is for {list(down.shape[1:])}: another network")
        with torch.no_grad():
            change = up.float() @ down.float().flatten(1)
            weight.add_(change.view(weight.shape).to(weight))


def mark(net: nn.Module) -> str:
    """Tells bases apart: a hash of a network's weights at half precision, which files keep."""
    digest = hashlib.sha256()
    for name, v in sorted(net.state_dict().items()):
        digest.update(name.encode())
        digest.update(v.detach().to("cpu", torch.float16).contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]
