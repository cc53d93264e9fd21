"""Low-rank adapters: what they change, what a file of them holds, and wrong ones."""

import pytest
import torch

from rig_core import checkpoints, lora
from rig_core.denoisers.rig import DiffusionRig, RigConfig


def network(seed: int = 0) -> DiffusionRig:
    """A tiny denoiser without zero-initialised layers, which would hide everything before them."""
    torch.manual_seed(seed)
    net = DiffusionRig(RigConfig(32, 16, (1, 2), 1, (16,), 1, 0.0, 8, 16, 8)).eval()
    for p in net.parameters():
        if not p.any():
            torch.nn.init.normal_(p, std=0.1)
    return net


def eps(net: DiffusionRig) -> torch.Tensor:
    g = torch.Generator().manual_seed(1)
    x, physical = torch.randn(2, 3, 32, 32, generator=g), torch.rand(2, 9, 32, 32, generator=g)
    with torch.no_grad():
        condition = net.condition(physical, code=torch.randn(2, 16, generator=g))
        return net(x, torch.tensor([10.0, 900.0]), condition)


def trained(net: DiffusionRig, rank: int) -> None:
    """As after a training: the adapters' second factors are not zero any more."""
    lora.attach(net.denoisingUNet, rank)
    for name, p in net.named_parameters():
        if name.endswith(".up"):
            torch.nn.init.normal_(p, std=0.3)


def test_an_adapted_network_starts_as_it_was():
    net = network()
    before = eps(net)
    lora.attach(net.denoisingUNet, 3)
    assert (eps(net) - before).abs().max() < 1e-6


def test_merged_adapters_equal_attached_ones():
    net = network()
    before = eps(net)
    trained(net, 3)
    after = eps(net)
    assert (after - before).abs().mean() > 0.05
    plain = network()
    lora.merge(plain.denoisingUNet, lora.tensors(net.denoisingUNet))
    assert (eps(plain) - after).abs().max() < 1e-5 * after.abs().max()


def test_the_change_has_the_rank_asked_for():
    net = network()
    base = {k: v.clone() for k, v in net.state_dict().items()}
    trained(net, 2)
    plain = network()
    lora.merge(plain.denoisingUNet, lora.tensors(net.denoisingUNet))
    for name in lora.layers(plain.denoisingUNet):
        key = f"denoisingUNet.{name}.weight"
        change = (plain.state_dict()[key] - base[key]).flatten(1)
        assert torch.linalg.matrix_rank(change, rtol=1e-4) == 2, name


def test_only_adapters_match_the_pattern():
    import re

    net = network()
    lora.attach(net.denoisingUNet, 2)
    chosen = [n for n, _ in net.named_parameters() if re.match(lora.TRAINABLE, n)]
    assert len(chosen) == 2 * len(lora.layers(net.denoisingUNet))
    assert all(n.endswith((".up", ".down")) and n.startswith("denoisingUNet.") for n in chosen)


def test_rank_6_of_the_default_is_under_5_percent_of_it():
    net, _ = checkpoints.load_rig()
    whole = sum(p.numel() for p in net.parameters())
    lora.attach(net.denoisingUNet, 6)
    part = sum(v.numel() for v in lora.tensors(net.denoisingUNet).values())
    assert 0.01 < part / whole < 0.05


def test_foreign_adapters_are_refused():
    adapters = {"input_blocks.9.0.in_layers.2.up": torch.zeros(16, 2)}
    with pytest.raises(ValueError, match="there is no layer 'input_blocks.9.0.in_layers.2'"):
        lora.merge(network().denoisingUNet, adapters)
    half = {"out.2.up": torch.zeros(3, 2)}
    with pytest.raises(ValueError, match="'out.2' is incomplete"):
        lora.merge(network().denoisingUNet, half)
    other = {"out.2.up": torch.zeros(3, 2), "out.2.down": torch.zeros(2, 99, 3, 3)}
    with pytest.raises(ValueError, match="another network"):
        lora.merge(network().denoisingUNet, other)
    with pytest.raises(ValueError, match="at least 1"):
        lora.attach(network().denoisingUNet, 0)


def test_marks_tell_bases_apart():
    a, b = network(), network()
    assert lora.mark(a.denoisingUNet) == lora.mark(b.denoisingUNet)
    with torch.no_grad():
        b.denoisingUNet.out[2].weight[0, 0, 0, 0] += 0.01
    assert lora.mark(a.denoisingUNet) != lora.mark(b.denoisingUNet)
