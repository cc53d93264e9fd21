"""Align Face, Fit to Landmarks, Paste Back and the photos that they are given."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from tests.node_pack import *  # noqa: F403 the fixtures
from tests.node_pack import ROOT, SIZE, psnr


def test_align_puts_the_face_upright_in_the_middle(face):
    image, crop, points, _ = face
    assert image.shape == (1, SIZE, SIZE, 3) and image.dtype == torch.float32
    eyes = points[0, 36:48].view(2, 6, 2).mean(1)
    assert (eyes[1, 1] - eyes[0, 1]).abs() < 0.5
    assert (eyes.mean(0)[0] - (SIZE - 1) / 2).abs() < 0.5
    assert crop.found.tolist() == [True]


def test_fit_finds_the_rendered_face_again(pack, head, face):
    image, _, points, code = face
    found = head.landmarks(head.verts(code.shape, code.exp, code.pose), code.pose)
    found = pack.core.buffers.to_pixels(pack.core.buffers.to_image(found, code), code.size)
    assert (found - points)[0, 17:].norm(dim=1).median() < 0.5  # px of 64
    b = pack.core.buffers.render(head, code)
    photo = image.permute(0, 3, 1, 2)
    inside = b.mask.expand_as(photo) > 0
    assert psnr(b.rendered[inside], photo[inside]) > 24
    assert code.pose[0, :3].abs().max() < 0.05
    assert not code.light.requires_grad and not code.shape.requires_grad


def test_paste_back_without_an_edit_is_the_photo_bit_for_bit(pack, scene, face):
    photo = scene[0]
    out = pack.run("PasteBack", photo=photo, edited=face[0], crop=face[1])[0]
    assert torch.equal(out, photo)
    brighter = (face[0] * 1.3).clamp(0, 1)
    out = pack.run("PasteBack", photo=photo, edited=brighter, crop=face[1])[0]
    assert out.shape == photo.shape and (out - photo).mean() > 0.005
    mask = torch.zeros(1, 8, 8)
    assert torch.equal(pack.run("PasteBack", photo=photo, edited=brighter, crop=face[1], mask=mask)[0], photo)
    two = pack.run("PasteBack", photo=photo, edited=torch.cat([brighter, face[0]]), crop=face[1])[0]
    assert torch.equal(two[:1], out) and torch.equal(two[1:], photo)


def with_nan(x: Tensor) -> Tensor:
    x = x.clone()
    x[0, 3, 3, 0] = float("nan")
    return x


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: p[:0], "'photo'.*empty"),
        (with_nan, "'photo'.*NaN"),
        (lambda p: p[:, :1, :1], "'photo' is 1 x 1 pixels"),
        (lambda p: p[..., :2], "'photo'.*2"),
        (lambda p: {"samples": p}, "'photo' is not an IMAGE"),
        (lambda p: p * 255, "'photo'.*0..1"),
    ],
    ids=["empty", "nan", "1px", "channels", "type", "range"],
)
def test_unusable_photos_are_named(pack, scene, make, message):
    with pytest.raises(ValueError, match=message):
        pack.run("AlignFace", photo=make(scene[0]), landmarks=scene[1])


def test_grey_and_rgba_photos_work(pack, head, scene):
    photo, points = scene
    grey = pack.run("AlignFace", photo=photo.mean(-1, keepdim=True), size=SIZE, landmarks=points)[0]
    assert grey.shape == (1, SIZE, SIZE, 3) and torch.equal(grey[..., 0], grey[..., 2])
    rgba = torch.cat([photo, torch.rand(1, 96, 128, 1)], -1)
    rgb, crop, _ = pack.run("AlignFace", photo=photo, size=SIZE, landmarks=points)
    assert torch.equal(pack.run("AlignFace", photo=rgba, size=SIZE, landmarks=points)[0], rgb)
    assert torch.equal(pack.run("PasteBack", photo=rgba, edited=rgb, crop=crop)[0], photo)


def test_an_8000_px_photo_is_aligned_first(pack, head, scene):
    photo, points = scene
    large = torch.nn.functional.interpolate(photo.permute(0, 3, 1, 2), scale_factor=20, mode="nearest")
    large = torch.nn.functional.pad(large, (0, 8000 - large.shape[3], 0, 0), value=0.4).permute(0, 2, 3, 1)
    image, crop, at = pack.run("AlignFace", photo=large, size=SIZE, landmarks=(points + 0.5) * 20 - 0.5)
    small = pack.run("AlignFace", photo=photo, size=SIZE, landmarks=points)
    assert psnr(image, small[0]) > 25 and (at - small[2]).abs().max() < 0.6
    with pytest.raises(ValueError, match="8000 x 1920.*Align Face"):
        pack.run("FitToLandmarks", face_model=head, image=large)


def test_no_face_one_face_several_faces_in_real_photos(pack):
    def photo(name, size):
        image = Image.open(ROOT / "rig_core" / "assets" / name).convert("RGB")
        image.thumbnail((size, size))
        return torch.from_numpy(np.array(image)).float()[None] / 255

    woman, man = photo("astronaut.jpg", 400), photo("grace_hopper.jpg", 400)
    height = min(woman.shape[1], man.shape[1])
    both = torch.cat([woman[:, :height], man[:, :height]], 2)
    pictures = {
        order: pack.run("AlignFace", photo=both, size=SIZE, order="left to right", index=i)[0]
        for i, order in enumerate(("left", "right"))
    }
    alone = pack.run("AlignFace", photo=woman[:, :height], size=SIZE)[0]
    assert psnr(pictures["left"], alone) > 20 > psnr(pictures["right"], alone)
    mask = torch.zeros(1, 10, 10)
    mask[:, :, 5:] = 1
    inside = pack.run("AlignFace", photo=both, size=SIZE, mask=mask)[0]
    assert psnr(inside, pictures["right"]) > 30
    with pytest.raises(ValueError, match="has 2 faces, there is no face number 5"):
        pack.run("AlignFace", photo=both, size=SIZE, index=5)
    empty = torch.full((1, 120, 160, 3), 0.4)
    with pytest.raises(ValueError, match="no face found in the picture"):
        pack.run("AlignFace", photo=empty)
    frames = torch.cat([woman[:, :height], torch.full_like(woman[:, :height], 0.4)])
    with pytest.raises(ValueError, match="no face found in picture 2 of 2"):
        pack.run("AlignFace", photo=frames)
    aligned, crop, _ = pack.run("AlignFace", photo=frames, size=SIZE, missing="pass through")
    assert crop.found.tolist() == [True, False]
    out = pack.run("PasteBack", photo=frames, edited=aligned * 0.5, crop=crop)[0]
    assert torch.equal(out[1], frames[1]) and not torch.equal(out[0], frames[0])


def test_landmarks_that_do_not_fit_are_named(pack, head, face):
    with pytest.raises(ValueError, match=r"landmarks must be \[faces, 68, 2\]"):
        pack.run("FitToLandmarks", face_model=head, image=face[0], landmarks=torch.zeros(1, 5, 2))
    with pytest.raises(ValueError, match="NaN"):
        pack.run("FitToLandmarks", face_model=head, image=face[0], landmarks=face[2] * float("nan"))
    with pytest.raises(ValueError, match="'image' holds 3"):
        pack.run(
            "FitToLandmarks",
            face_model=head,
            image=face[0].expand(3, -1, -1, -1),
            landmarks=face[2].expand(2, -1, -1),
        )


def test_a_face_that_leaves_the_photo_is_told_or_refused(pack, scene, caplog):
    photo, points = scene
    x = points[0, :, 0]
    some, most = int(x.quantile(0.3)), int(x.quantile(0.7))
    at = torch.tensor([some, 0.0])
    image, crop, _ = pack.run("AlignFace", photo=photo[:, :, some:], size=SIZE, landmarks=points - at)
    outside = round(float((points[0, :, 0] - some < -0.5).float().mean()) * 100)
    assert 20 < outside < 40 and f"{outside} % of its landmarks" in caplog.text
    assert torch.isfinite(image).all()
    out = pack.run("PasteBack", photo=photo[:, :, some:], edited=image * 0.5, crop=crop)[0]
    assert out.shape == photo[:, :, some:].shape and (out < photo[:, :, some:] - 0.05).any()
    at = torch.tensor([most, 0.0])
    with pytest.raises(ValueError, match="the face leaves the photo: only 2[0-2] of its 68"):
        pack.run("AlignFace", photo=photo[:, :, most:], size=SIZE, landmarks=points - at)
    caplog.clear()
    pack.run("AlignFace", photo=photo, size=SIZE, landmarks=points)
    assert not caplog.text


def test_an_edit_shows_on_the_mask_and_near_it(pack, face):
    image, (crop, found) = face[0], face[1]
    inside = pack.nodes_module.sockets.Aligned(crop.replace(matrix=torch.eye(3)[None]), found)
    mask = torch.zeros(1, SIZE, SIZE)
    mask[:, 24:40, 24:40] = 1
    darker = image * 0.5

    def changed(**more):
        out = pack.run("PasteBack", photo=image, edited=darker, crop=inside, soft=0.02, **more)[0]
        rows = ((out - image).abs().sum(-1)[0] > 0).nonzero()
        return rows.amin().item(), rows.amax().item()

    low, high = changed(mask=mask, reach=0.0)
    assert 24 <= low <= 27 and 36 <= high <= 39
    assert changed(mask=mask) == (low - 6, high + 6)  # 0.09 of 64 pixels
    assert changed(mask=mask, reach=0.25) == (low - 16, high + 16)
    with pytest.raises(ValueError, match="'mask' is 100 x 64 pixels, the aligned picture is square"):
        pack.run("PasteBack", photo=image, edited=darker, crop=inside, mask=torch.ones(1, 64, 100))
