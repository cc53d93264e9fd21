"""Networks that start from others: what they compute at first, and that all of them can learn."""

import torch
import torch.nn.functional as F

from rig_core.denoisers.relight import DiFaReli, RelightConfig, start_open
from rig_core.denoisers.rig import DiffusionRig, RigConfig
from training.grow import finer, from_rig, grow, grow_relight

RELIGHT = RelightConfig(32, 32, (1, 2), 1, (16,), 1, 0.0, 8, cond_dim=10, proj_dim=16)


def fill(model):
    """Exchange the zeros of a fresh network."""
    g = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim > 1 and p.abs().sum() == 0:
                p.normal_(std=0.05, generator=g)
    return model


def enlarged(x):
    return F.interpolate(x, scale_factor=2)


def relative(found, wanted):
    return (F.mse_loss(found, wanted) / wanted.square().mean()).sqrt().item()


def test_a_grown_network_starts_as_the_coarse_one_enlarged():
    """Exact where the outermost convolutions see one pixel each; everything else is exact by construction."""
    torch.manual_seed(0)
    config = RigConfig(32, 32, (1, 2), 1, (16,), 1, 0.0, 8, 8, 16)
    coarse = fill(DiffusionRig(config)).eval()
    with torch.no_grad():
        for conv in (coarse.denoisingUNet.input_blocks[0][0], coarse.denoisingUNet.out[2]):
            centre = conv.weight[:, :, 1, 1].clone()
            conv.weight.zero_()
            conv.weight[:, :, 1, 1] = centre
    fine = grow(coarse.state_dict(), 8).eval()
    assert fine.config.image_size == 64 and fine.config.channel_mult == (1, 1, 2)
    assert fine.config.norm_groups == 8 and finer(config).image_size == 64
    x, physical, code = torch.randn(2, 3, 64, 64), torch.randn(2, 9, 64, 64), torch.randn(2, 8)
    t = torch.tensor([100.0, 700.0])
    with torch.no_grad():
        small = coarse(F.avg_pool2d(x, 2), t, coarse.condition(F.avg_pool2d(physical, 2), code=code))
        large = fine(x, t, fine.condition(physical, code=code))
    assert small.abs().mean() > 0.01
    assert torch.allclose(large, F.interpolate(small, scale_factor=2), atol=1e-5)


def test_all_of_a_grown_network_can_learn():
    torch.manual_seed(0)
    fine = grow(DiffusionRig(RigConfig(32, 32, (1, 2), 1, (16,), 1, 0.0, 8, 8, 16)).state_dict(), 8)
    x = torch.randn(2, 3, 32, 32)
    for _ in range(3):
        eps = fine(x, torch.tensor([9.0, 500.0]), fine.condition(torch.randn(2, 9, 32, 32), x))
        (eps - x).square().mean().backward()
        with torch.no_grad():
            for p in fine.denoisingUNet.parameters():
                p -= 0.05 * p.grad
    still = [n for n, p in fine.denoisingUNet.named_parameters() if p.grad is None or not p.grad.abs().sum()]
    assert not [n for n in still if n.endswith("weight")]


def coarse_relight(seed=0):
    """A coarse DiFaReli whose outermost convolutions see one pixel each, so that they work at both sizes."""
    torch.manual_seed(seed)
    coarse = fill(start_open(DiFaReli(RELIGHT))).eval()
    with torch.no_grad():
        ends = coarse.ImgCond.input_blocks[0][0], coarse.ImgCond.out[2], coarse.ImgEncoder.input_blocks[0][0]
        for conv in ends:
            centre = conv.weight[:, :, 1, 1].clone()
            conv.weight.zero_()
            conv.weight[:, :, 1, 1] = centre
    return coarse


def test_a_grown_relight_starts_nearly_as_the_coarse_one_enlarged():
    """What enters the coarse level meets two new factors, tanh of 2 plus a quarter of the features.

    They are 0.9 to 0.99 and vary over the picture, which leaves a difference of 3 % by root mean square.
    A step down that does not undo the level gives over 50 %.
    """
    coarse = coarse_relight()
    fine = grow_relight(coarse.state_dict(), 8, 1, 32).eval()
    assert fine.config == finer(RELIGHT) and fine.config.image_size == 64
    g = torch.Generator().manual_seed(1)
    x, vector = torch.randn(2, 3, 64, 64, generator=g), torch.randn(2, 10, generator=g)
    spatial = enlarged(torch.rand(2, 6, 32, 32, generator=g) * 2 - 1)
    t = torch.tensor([100.0, 700.0])

    def outputs(model):
        with torch.no_grad():
            small = coarse(F.avg_pool2d(x, 2), t, coarse.condition(F.avg_pool2d(spatial, 2), vector))
            return model(x, t, model.condition(spatial, vector)), enlarged(small)

    assert relative(*outputs(fine)) < 0.03
    with torch.no_grad():
        fine.ImgEncoder.input_blocks[2][0].op.bias.zero_()
    assert relative(*outputs(fine)) > 0.5


def test_the_modulators_grown_features_are_the_coarse_ones():
    """Exact: pooling undoes the spread and the level."""
    coarse = coarse_relight()
    fine = grow_relight(coarse.state_dict(), 8, 1, 32).eval()
    spatial = torch.rand(1, 6, 64, 64)
    with torch.no_grad():
        for block in fine.ImgEncoder.input_blocks[1]:  # of the new level
            assert block.out_layers[3].weight.abs().sum() == 0
        small, large = coarse.ImgEncoder(F.avg_pool2d(spatial, 2)), fine.ImgEncoder(spatial)
    assert len(large) == len(small) + 2
    for a, b in zip(large[2:], small):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-3)


def test_all_of_a_grown_relight_can_learn():
    fine = grow_relight(coarse_relight().state_dict(), 8, 1, 32)
    g = torch.Generator().manual_seed(2)
    x, spatial, vector = (torch.randn(2, *s, generator=g) for s in ((3, 64, 64), (6, 64, 64), (10,)))
    for _ in range(3):
        eps = fine(x, torch.tensor([9.0, 500.0]), fine.condition(spatial, vector))
        fine.zero_grad()
        (eps - x).square().mean().backward()
        with torch.no_grad():
            for p in fine.parameters():
                p -= 0.05 * p.grad
    assert not [n for n, p in fine.named_parameters() if n.endswith("weight") and not p.grad.abs().sum()]


def test_from_rig_takes_over_what_it_says():
    torch.manual_seed(0)
    rig = DiffusionRig(RigConfig(32, 32, (1, 2), 1, (16,), 1, 0.0, 8, 8, 16))
    with torch.no_grad():
        for p in rig.parameters():
            p.add_(0.01 * torch.randn_like(p))
    state, fresh = rig.state_dict(), start_open(DiFaReli(RELIGHT))
    before = {k: v.clone() for k, v in fresh.state_dict().items()}
    model = from_rig(fresh, state)
    after = model.state_dict()
    unet = "denoisingUNet."
    pairs = {
        "ImgCond.input_blocks.1.1.in_layers.2.weight": "input_blocks.1.0.in_layers.2.weight",
        "ImgCond.input_blocks.3.2.qkv.weight": "input_blocks.3.1.qkv.weight",
        "ImgCond.middle_block.1.out_layers.3.weight": "middle_block.0.out_layers.3.weight",
        "ImgCond.middle_block.2.proj_out.bias": "middle_block.1.proj_out.bias",
        "ImgCond.middle_block.3.emb_layers.1.weight": "middle_block.2.emb_layers.1.weight",
        "ImgCond.output_blocks.3.0.skip_connection.weight": "output_blocks.3.0.skip_connection.weight",
        "ImgCond.time_embed.2.weight": "time_embed.2.weight",
        "ImgCond.out.2.weight": "out.2.weight",
    }
    for own, theirs in pairs.items():
        assert torch.equal(after[own], state[unet + theirs]), own
        assert not torch.equal(before[own], after[own]), own
    first = state[f"{unet}input_blocks.0.0.weight"]
    assert torch.equal(after["ImgCond.input_blocks.0.0.weight"], first[:, :3])  # not over the buffers
    left = [k for k in after if k.startswith("ImgEncoder.") or "cond_proj_layers" in k]
    assert left and all(torch.equal(before[k], after[k]) for k in left)
    assert not [k for k in after if k not in left and torch.equal(before[k], after[k])]
    x = torch.randn(1, 32, 8, 8)
    torch.testing.assert_close(model.ImgCond.input_blocks[2][1](x), F.avg_pool2d(x, 2))
    y = torch.randn(1, 64, 4, 4)
    torch.testing.assert_close(model.ImgCond.output_blocks[1][-1](y), enlarged(y))
