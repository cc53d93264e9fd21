"""Crops and back: the official squares, inverses, antialiasing, paste-back, and pictures of every kind."""

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from rig_core import align, composite
from tests.pictures import crop_at, picture, psnr

GOLDEN = Path(__file__).parent / "golden"


def test_deca_square_of_a_known_box():
    # official numbers for the landmarks' box (46, 50.5, 207.25, 218): side 226 about (126.625, 134.25)
    landmarks = torch.full((1, 68, 2), 100.0)
    landmarks[0, 0], landmarks[0, 1] = torch.tensor([46, 50.5]), torch.tensor([207.25, 218])
    m = align.deca_crop(landmarks).matrix[0]
    want = torch.tensor([[0.98672569, 0, -13.444138], [0, 0.98672569, -20.967920], [0, 0, 1]])
    assert torch.allclose(m, want, atol=1e-5)
    # and for a detector's box (30, 40, 150, 199): side 174 about (90, 136.24)
    m = align.detector_crop(torch.tensor([[30.0, 40, 150, 199]])).matrix[0]
    want = torch.tensor([[1.2816092, 0, -3.8448277], [0, 1.2816092, -63.106437], [0, 0, 1]])
    assert torch.allclose(m, want, atol=1e-5)


def test_points_go_back_to_the_photo_as_officially():
    t = load_file(GOLDEN / "align_points.safetensors")
    crop = align.Crop(t["crop_tform"], 224)
    photo = crop.invert_points((t["proj"][..., :2] * 0.5 + 0.5) * 224)
    want = (t["transformed"][..., :2] + 1) / 2 * torch.tensor([192.0, 256.0])
    assert torch.allclose(photo, want, atol=2e-3)


@pytest.mark.parametrize(("case", "limit"), [("plain", 0.1), ("shrink", 0.4)])
def test_ffhq_alignment_equals_the_official_one(case, limit):
    t = load_file(GOLDEN / "ffhq_align.safetensors")
    photo = t["image_u8"].permute(2, 0, 1)[None] / 255
    want = t[f"{case}.aligned_u8"].permute(2, 0, 1).float()
    crop = align.ffhq_crop(t[f"{case}.landmarks"][None], want.shape[-1])
    got = crop.apply(photo)[0] * 255
    # Pillow's transform cuts decimals off: half a level darker on average
    assert abs(float((got - want).mean()) - 0.5) < 0.05
    assert ((got - 0.5).round().clamp(0, 255) - want).abs().mean() < limit
    moved = crop.replace(matrix=crop.matrix + torch.tensor([[0, 0, 0.25], [0, 0, 0], [0, 0, 0]]))
    assert ((moved.apply(photo)[0] * 255 - 0.5) - want).abs().mean() > 5 * limit


def test_ffhq_alignment_beyond_the_photo():
    t = load_file(GOLDEN / "ffhq_align.safetensors")
    photo = t["image_u8"].permute(2, 0, 1)[None] / 255
    want = t["pad.aligned_u8"].permute(2, 0, 1).float()
    crop = align.ffhq_crop(t["pad.landmarks"][None], 256)
    off = (crop.apply(photo)[0] * 255 - 0.5 - want).abs()
    at = torch.stack(torch.meshgrid(torch.arange(256.0), torch.arange(256.0), indexing="xy"), -1)
    at = crop.invert_points(at.reshape(1, -1, 2)).reshape(256, 256, 2)
    inside = ((at > 20) & (at < torch.tensor([420.0, 380.0]))).all(-1)
    assert inside.float().mean() > 0.7
    assert off[:, inside].mean() < 0.6  # the official code blurs a band inside the border
    assert off.mean() < 4  # and much outside it, where ours only reflects


@settings(max_examples=30, deadline=None)
@given(st.floats(-50, 300), st.floats(-50, 300), st.floats(20, 400), st.floats(-180, 180))
def test_points_round_trip(x, y, side, degrees):
    crop = crop_at(x, y, side, 224, degrees)
    points = torch.rand(1, 50, 2, generator=torch.Generator().manual_seed(0)) * 256
    assert torch.allclose(crop.invert_points(crop.apply_points(points)), points, atol=2e-3 * side / 20)
    assert torch.allclose(
        crop.apply_points(torch.tensor([[[x, y]]])), torch.full((1, 1, 2), 111.5), atol=1e-2
    )
    again = crop.resized(448).apply_points(points)
    assert torch.allclose((again + 0.5) / 2 - 0.5, crop.apply_points(points), atol=1e-2)


def test_points_round_trip_to_a_tenthousandth_of_a_pixel():
    crop = align.ffhq_crop(load_file(GOLDEN / "ffhq_align.safetensors")["plain.landmarks"][None], 256)
    points = torch.rand(1, 500, 2) * 256
    assert (crop.apply_points(crop.invert_points(points)) - points).abs().max() < 1e-4


def test_a_whole_pixel_crop_is_a_slice_and_the_outside_follows_the_padding():
    photo = picture(40, 50)
    crop = crop_at(20.5, 15.5, 16, 16)
    assert torch.allclose(crop.apply(photo), photo[:, :, 8:24, 13:29], atol=1e-5)
    corner = crop_at(-0.5, 15.5, 16, 16)
    assert corner.apply(photo)[..., :8].abs().max() < 1e-6
    mirrored = corner.replace(padding="reflection").apply(photo)
    assert torch.allclose(mirrored[..., :8], photo[:, :, 8:24, :8].flip(3), atol=1e-5)


def test_image_round_trip_of_smooth_content():
    photo = picture(200, 240, batch=2)
    matrix = torch.cat([crop_at(120, 100, 120, 160, 25).matrix, crop_at(110, 90, 100, 160, -40).matrix])
    crop = align.Crop(matrix, 160)
    back = crop.apply_inverse(crop.apply(photo), (200, 240))
    inside = crop.apply_inverse(composite.soft_mask(None, crop).expand(2, 1, -1, -1), (200, 240)) > 0.5
    assert inside.float().mean() > 0.1
    assert psnr((back * inside), (photo * inside)) > 45


def test_shrinking_averages_and_does_not_alias():
    stripes = (torch.arange(512) % 2).float().expand(1, 3, 512, 512).contiguous()
    for side, size, degrees in ((500, 64, 0), (400, 64, 10), (300, 25, 45), (500, 130, 3)):
        small = crop_at(255.5, 255.5, side, size, degrees).apply(stripes)[..., 2:-2, 2:-2]
        edge = 0.6 / math.floor(side / size)  # a box over n pixels leaves 1 / 2n of the finest stripes
        assert (small - 0.5).abs().max() < edge, (side, size, degrees)
    photo = picture(512, 512, 2.0)
    small = crop_at(255.5, 255.5, 512, 64, padding="border").apply(photo)
    assert torch.allclose(small, F.avg_pool2d(photo, 8), atol=2e-3)  # no shift either


def test_a_batch_of_different_scales_equals_its_items():
    photo = picture(300, 300, batch=2)
    crops = align.Crop(
        torch.cat([crop_at(150, 150, 250, 40).matrix, crop_at(100, 120, 60, 40, 5).matrix]), 40
    )
    both = crops.apply(photo)
    for i in range(2):
        assert torch.equal(both[i : i + 1], crops[i].apply(photo[i : i + 1]))


@pytest.mark.parametrize(("h", "w"), [(1, 1), (1, 7), (5, 3)])
def test_tiny_photos(h, w):
    photo = align.check_image(torch.rand(1, 1, h, w))
    crop = align.deca_crop(torch.rand(1, 68, 2) * 4)
    for padding in ("zeros", "border", "reflection"):
        assert torch.isfinite(crop.replace(padding=padding).apply(photo)).all()
    big = crop_at(0, 0, 900, 32)  # far coarser than the photo
    assert torch.isfinite(big.apply(photo)).all()
    assert torch.equal(composite.paste_back(photo, crop.apply(photo), crop), photo)


def test_an_8000_pixel_photo():
    photo = torch.full((1, 3, 8000, 600), 0.25)
    photo[..., 4000:, :] = 0.75
    crop = crop_at(299.5, 3999.5, 8000, 64, padding="zeros")
    small = crop.apply(photo)
    assert small.shape == (1, 3, 64, 64)
    assert abs(float(small[0, 0, 20, 32]) - 0.25) < 1e-3 and abs(float(small[0, 0, 44, 32]) - 0.75) < 1e-3
    face = crop_at(300, 4000, 500, 64)
    out = composite.paste_back(photo, face.apply(photo) * 0.9, face)
    assert out.shape == photo.shape
    assert torch.equal(out[..., :3700, :], photo[..., :3700, :])
    assert not torch.equal(out[..., 3990:4010, :], photo[..., 3990:4010, :])


def test_check_image_accepts_what_hosts_send():
    assert align.check_image(torch.rand(2, 1, 4, 5)).shape == (2, 3, 4, 5)
    rgba = torch.rand(1, 4, 4, 5)
    assert torch.equal(align.check_image(rgba), rgba[:, :3])
    assert align.check_image(torch.tensor([[[[0, 255]]]], dtype=torch.uint8)).flatten().tolist() == [
        0,
        1,
        0,
        1,
        0,
        1,
    ]
    assert align.check_image(torch.full((1, 3, 2, 2), 1.02, dtype=torch.float16)).max() == 1


@pytest.mark.parametrize(
    ("image", "words"),
    [
        (torch.zeros(0, 3, 4, 4), "empty"),
        (torch.zeros(3, 4, 4), r"\[B,C,H,W\]"),
        (torch.zeros(1, 2, 4, 4), "channels"),
        (torch.zeros(1, 3, 0, 4), "no pixels"),
        (
            torch.stack([torch.zeros(3, 2, 2), torch.full((3, 2, 2), float("nan"))]),
            "picture 1 of the batch holds NaN",
        ),
        (torch.full((1, 3, 2, 2), float("inf")), "NaN or infinite"),
        (torch.full((1, 3, 2, 2), 200.0), "divide 8-bit"),
        (torch.zeros(1, 3, 2, 2, dtype=torch.int64), "uint8"),
        (None, "tensor"),
    ],
)
def test_check_image_names_what_is_wrong(image, words):
    with pytest.raises(ValueError, match=words):
        align.check_image(image)


def test_other_bad_input_is_named():
    photo, crop = picture(50, 50), crop_at(20, 20, 30, 16)
    for call, words in (
        (lambda: align.deca_crop(torch.zeros(1, 51, 2)), r"\[B,68,2\]"),
        (lambda: align.deca_crop(torch.zeros(1, 68, 2)), "smaller than a pixel"),
        (lambda: align.ffhq_crop(torch.zeros(1, 68, 2), 64), "coincide"),
        (lambda: align.ffhq_crop(torch.full((1, 68, 2), float("nan")), 64), "NaN"),
        (lambda: align.Crop(torch.eye(3), 4), r"\[B,3,3\]"),
        (lambda: crop.apply_inverse(torch.zeros(1, 3, 8, 8), (50, 50)), "16 px square"),
        (lambda: align.Crop(torch.eye(3).expand(2, 3, 3), 4).apply(photo.expand(3, -1, -1, -1)), "2 crops"),
        (lambda: composite.paste_back(photo, torch.zeros(1, 3, 8, 8), crop), "edited crop must be"),
        (lambda: composite.paste_back(photo, torch.full((1, 3, 16, 16), float("nan")), crop), "NaN"),
        (lambda: composite.paste_back(photo, torch.zeros(1, 3, 16, 16), crop, mode="blend"), "mode"),
        (
            lambda: composite.paste_back(photo, torch.zeros(1, 3, 16, 16), crop, torch.ones(1, 1, 8, 8)),
            "mask",
        ),
    ):
        with pytest.raises(ValueError, match=words):
            call()


def test_display_and_linear_are_inverse():
    x = torch.linspace(0, 1, 1001)
    assert (align.to_display(align.to_linear(x)) - x).abs().max() < 1e-6
    assert float(align.to_linear(torch.tensor(0.5))) == pytest.approx(0.21404, abs=1e-5)


def test_a_border_is_repeated_without_the_mode_that_mps_lacks(monkeypatch):
    x, g = picture(97, 131), torch.Generator().manual_seed(0)
    grid = torch.rand(1, 50, 60, 2, generator=g) * 4 - 2  # far beyond the picture, too
    grid[0, 0, :4] = torch.tensor([[-1.0, -1.0], [1.0, 1.0], [1.0, 0.0], [-1 + 1 / 131, 1 - 1 / 97]])
    want = F.grid_sample(x, grid, padding_mode="border", align_corners=False)
    torch.testing.assert_close(align.sample(x, grid, "border"), want, atol=2e-6, rtol=0)
    real = F.grid_sample

    def older(image, grid, mode, padding, **more):
        assert padding != "border"
        return real(image, grid, mode, padding, **more)

    monkeypatch.setattr(F, "grid_sample", older)
    crop_at(60, 40, 50, 32).back(picture(32, 32), (97, 131))


def test_values_are_looked_at_once(monkeypatch):
    x = picture(20, 30, batch=3)
    seen, real = [], torch.Tensor.aminmax
    monkeypatch.setattr(torch.Tensor, "aminmax", lambda v: seen.append(tuple(v.shape)) or real(v))
    monkeypatch.setattr(torch, "isfinite", None)
    align.check_image(x)
    assert seen == [(3, 20, 30)] * 3
    for bad in (float("nan"), float("inf"), -float("inf")):
        x[1, 2, 3, 4] = bad
        with pytest.raises(ValueError, match="picture 1 of the batch holds NaN or infinite"):
            align.check_image(x)
