import torch
import torch.nn.functional as F

from rig_core.denoisers.rig import DiffusionRig, RigConfig
from training.grow import finer, grow


def test_a_grown_network_starts_as_the_coarse_one_enlarged():
    """Exact where the outermost convolutions see one pixel each; everything else is exact by construction."""
    torch.manual_seed(0)
    config = RigConfig(32, 32, (1, 2), 1, (16,), 1, 0.0, 8, 8, 16)
    coarse = DiffusionRig(config).eval()
    with torch.no_grad():
        for p in coarse.parameters():
            if p.ndim > 1 and p.abs().sum() == 0:
                p.normal_(std=0.05)
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
