"""An edit's gain at the photo's size: exact where nothing changes, true on smooth light, no halos."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from rig_core import align, composite, gain

ASSETS = Path(gain.__file__).parent / "assets"


def portrait():
    """The largest real portrait here, 512 x 600 pixels."""
    with Image.open(ASSETS / "grace_hopper.jpg") as file:
        photo = torch.from_numpy(np.array(file.convert("RGB"))).permute(2, 0, 1)[None] / 255
    assert photo.shape == (1, 3, 600, 512)
    return photo


def square(photo, size, part=1.0):
    """A crop of the middle."""
    h, w = photo.shape[2:]
    k = size / (part * min(h, w))
    m = torch.tensor(
        [[k, 0, (size - 1) / 2 - k * (w - 1) / 2], [0, k, (size - 1) / 2 - k * (h - 1) / 2], [0, 0, 1]]
    )
    return align.Crop(m[None], size, "reflection", "lanczos")


def lit(photo, stops):
    return gain.to_display(gain.to_linear(photo) * stops.exp2()).clamp(0, 1)


def psnr(a, b, where):
    return -10 * math.log10(float((a - b)[where.expand_as(a)].square().mean()))


def inside(crop, photo):
    """Where the paste's soft mask is one."""
    return crop.apply_inverse(composite.soft_mask(None, crop), photo.shape[2:]) > 0.999


def grid(photo):
    h, w = photo.shape[2:]
    return torch.meshgrid(torch.linspace(0, 1, h), torch.linspace(0, 1, w), indexing="ij")


def eight_bit(x):
    return (x * 255).round().byte()


def test_only_what_was_edited_changes():
    photo = portrait()
    crop = square(photo, 128, 0.8)
    before = crop.apply(photo).clamp(0, 1)
    assert torch.equal(composite.paste_back(photo, before, crop), photo)
    edited = before.clone()
    edited[..., 60:100, 30:90] *= 0.5
    out = composite.paste_back(photo, edited, crop)
    at = (eight_bit(out) != eight_bit(photo)).any(1)[0].nonzero().flip(1).float()[None]
    x, y = crop.apply_points(at)[0].unbind(1)
    assert len(x) > 10000
    assert x.min() > 28.5 and x.max() < 90.5 and y.min() > 58.5 and y.max() < 100.5
    mask = torch.zeros(1, 1, 128, 128)
    mask[..., 40:80, 40:80] = 1
    out = composite.paste_back(photo, before * 0.5, crop, mask)
    outside = crop.apply_inverse(mask, photo.shape[2:]) <= 0
    assert torch.equal(out[outside.expand_as(out)], photo[outside.expand_as(out)])


@pytest.mark.parametrize("size", [64, 128])
def test_a_smooth_gain_on_a_real_portrait_is_recovered(size):
    """Above 43 dB at the photo's own size, three colours of light, two stops from side to side."""
    photo = portrait()
    y, x = grid(photo)
    stops = torch.stack([torch.sin(5 * x + 2 * y), 0.8 * torch.sin(5 * x + 2 * y), 0.5 * torch.cos(4 * y)])[
        None
    ]
    true, crop = lit(photo, stops), square(photo, size)
    out = composite.paste_back(photo, crop.apply(true).clamp(0, 1), crop)
    assert psnr(out, true, inside(crop, photo)) > 43


def silhouette(face, wall, n=512):
    """A textured face before a textured wall, lit and unlit, and how much of each pixel is face."""
    g = torch.Generator().manual_seed(0)
    y, x = torch.meshgrid(torch.linspace(-1, 1, n), torch.linspace(-1, 1, n), indexing="ij")

    def surface(colour):
        noise = [
            F.interpolate(torch.randn(1, 1, n // k, n // k, generator=g), (n, n), mode="bicubic")
            for k in (2, 8)
        ]
        return (torch.tensor(colour).reshape(1, 3, 1, 1) + 0.02 * sum(noise) + 0.08 * x).clamp(0.02, 0.98)

    distance = (x / 0.55) ** 2 + (y / 0.7) ** 2 + 0.05 * torch.sin(9 * torch.atan2(y, x))
    alpha = ((1 - distance) * 0.15 * n + 0.5).clamp(0, 1)[None, None]
    f, w = gain.to_linear(surface(face)) * alpha, gain.to_linear(surface(wall)) * (1 - alpha)
    return gain.to_display(f + w), gain.to_display(f * (-1.5 + 1.2 * x).exp2() + w), alpha


SKIN_BEFORE_WALL = [
    ((0.75, 0.6, 0.5), (0.35, 0.4, 0.45)),
    ((0.6, 0.45, 0.38), (0.85, 0.85, 0.85)),
    ((0.2, 0.15, 0.12), (0.6, 0.6, 0.55)),
]


@pytest.mark.parametrize("face, wall", SKIN_BEFORE_WALL)
def test_no_halo_at_a_silhouette(face, wall):
    """A step of the gain at the face's edge: far nearer to the truth than the gain enlarged plainly."""
    photo, true, alpha = silhouette(face, wall)
    crop = square(photo, 32)
    before, edited = crop.apply(photo).clamp(0, 1), crop.apply(true).clamp(0, 1)
    out = composite.paste_back(photo, edited, crop)
    plain = F.interpolate(gain.stops(edited, before), photo.shape[2:], mode="bilinear")
    near = F.max_pool2d(((alpha > 0) & (alpha < 1)).float(), 33, 1, 16) > 0
    there = psnr(gain.light(photo, plain).clamp(0, 1), true, near)
    assert psnr(out, true, near) > there + 5
    wall_near = near & (alpha == 0)
    assert psnr(out, true, wall_near) > psnr(gain.light(photo, plain).clamp(0, 1), true, wall_near) + 5


def test_a_cast_shadow_on_skin_stays_sharp():
    """The edit's own edge, which the photo does not have, is as sharp as the crop shows it."""
    photo = torch.full((1, 3, 512, 512), 0.6) + 0.01 * torch.randn(
        1, 3, 512, 512, generator=torch.Generator().manual_seed(0)
    )
    true, crop = lit(photo, torch.where(grid(photo)[1] > 0.5, -2.0, 0.0)), square(photo, 64)
    edited = crop.apply(true).clamp(0, 1)
    out = composite.paste_back(photo, edited, crop)
    away = (crop.apply(out) - edited).abs()[..., 16:48, 16:48]
    assert away.mean() < 0.005 and away.max() < 0.07
    middle = out[..., 128:384, :].mean((0, 1, 2))
    assert middle[32:244].min() > 0.58 and middle[268:440].max() < 0.32  # one pixel of the crop is 8 of these


def test_black_pixels_and_wild_edits_stay_bounded():
    g = torch.Generator().manual_seed(0)
    dark = 0.02 * torch.rand(1, 3, 256, 256, generator=g)
    crop = square(dark, 32)
    noise = (crop.apply(dark) + 0.02 * torch.rand(1, 3, 32, 32, generator=g)).clamp(0, 1)
    assert (composite.paste_back(dark, noise, crop) - dark).abs().max() < 0.04
    black, white = torch.zeros(1, 3, 8, 8), torch.ones(1, 3, 8, 8)
    assert gain.stops(white, black).max() == 3 and gain.stops(black, white).min() == -3
    assert gain.stops(black, black).abs().max() == 0
    out = composite.paste_back(
        torch.rand(1, 3, 256, 256, generator=g), torch.rand(1, 3, 32, 32, generator=g), crop
    )
    assert torch.isfinite(out).all() and out.min() >= 0 and out.max() <= 1


def test_colour_errors_are_calmed_and_coloured_light_is_not():
    g = torch.Generator().manual_seed(0)
    guide = torch.full((1, 3, 64, 64), 0.5)
    guide[..., 32:] = 0.9
    light = torch.tensor([0.5, 0.0, -0.5])[:, None, None].expand(1, 3, 64, 64).clone()
    light[..., 32:] = 0  # a warm light on what stands left
    torch.testing.assert_close(gain.calm(light, guide), light, atol=0.01, rtol=0)
    noise = 0.3 * torch.randn(1, 3, 64, 64, generator=g)
    calm = gain.calm(light + noise, guide)
    torch.testing.assert_close(calm.mean(1), (light + noise).mean(1))
    error = calm - light - noise.mean(1, keepdim=True)
    assert error.std() < 0.25 * (noise - noise.mean(1, keepdim=True)).std()


def test_enlarging_many_gains_of_one_photo_is_enlarging_each():
    g = torch.Generator().manual_seed(0)
    guides = gain.guides(torch.rand(1, 3, 64, 64, generator=g), 16)
    assert [x.shape[-1] for x in guides] == [64, 32, 16]
    even = torch.tensor([0.5, -1.0, 2.0])[:, None, None].expand(1, 3, 16, 16)
    gains = torch.cat([even, torch.randn(2, 3, 16, 16, generator=g)])
    large = gain.enlarge(gains, guides)
    torch.testing.assert_close(large[:1], even[..., :1, :1].expand(1, 3, 64, 64), atol=0.02, rtol=0)
    for i in range(3):
        torch.testing.assert_close(large[i : i + 1], gain.enlarge(gains[i : i + 1], guides))
    with pytest.raises(ValueError, match="no doubling"):
        gain.guides(torch.rand(1, 3, 48, 48), 16)


@pytest.mark.slow
def test_a_4000_pixel_portrait_comes_back_as_one():
    photo = torch.rand(1, 3, 5000, 4000, generator=torch.Generator().manual_seed(0))
    crop = square(photo, 128, 0.8)
    out = composite.paste_back(photo, lit(crop.apply(photo).clamp(0, 1), torch.tensor(-1.0)), crop)
    assert out.shape == photo.shape
    assert torch.equal(out[..., :800, :], photo[..., :800, :])
    middle = (slice(None), slice(None), slice(2000, 3000), slice(1500, 2500))
    stops = ((gain.to_linear(out[middle]) + 0.004) / (gain.to_linear(photo[middle]) + 0.004)).log2()
    assert stops.mean() == pytest.approx(-0.97, abs=0.02)
