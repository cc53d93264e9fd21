"""Edits back in their photos: exact where nothing was edited, several faces, many lights, soft borders."""

import pytest
import torch
import torch.nn.functional as F

from rig_core import align, composite, gain
from tests.pictures import crop_at, picture


@pytest.mark.parametrize("mode", ["ratio", "difference", "replace"])
def test_paste_back_of_no_edit_is_bit_identical(mode):
    photo = torch.rand(2, 3, 150, 130, generator=torch.Generator().manual_seed(0))
    crop = crop_at(60, 70, 90, 64, 12)
    same = crop.apply(photo)
    assert torch.equal(composite.paste_back(photo, same, crop, mode=mode), photo)
    model = (same + 0.1).clamp(0, 1)  # what a model makes of the unedited face
    assert torch.equal(composite.paste_back(photo, model, crop, original=model, mode=mode), photo)
    half = torch.cat([same[:1], same[1:] * 0.5])
    out = composite.paste_back(photo, half, crop, mode=mode)
    assert torch.equal(out[0], photo[0])
    assert not torch.equal(out[1], photo[1])


@pytest.mark.parametrize("mode", ["ratio", "difference", "replace"])
@pytest.mark.parametrize(("side", "degrees"), [(90, 12), (64, 0), (40, -30), (500, 5)])
def test_paste_back_keeps_to_the_mask(mode, side, degrees):
    photo = torch.rand(1, 3, 400, 360, generator=torch.Generator().manual_seed(1))
    crop = crop_at(170, 190, side, 64, degrees)
    mask = torch.zeros(1, 1, 64, 64)
    mask[..., 20:50, 12:40] = 1
    edited = (crop.apply(photo) * 0.6 + 0.1).clamp(0, 1)
    out = composite.paste_back(photo, edited, crop, mask, mode=mode)
    changed = (out != photo).any(1)[0].nonzero().flip(1).float()[None]  # (x, y)
    assert changed.shape[1] > 20
    at = crop.apply_points(changed)[0].round()
    assert (
        (at[:, 0] >= 12).all()
        and (at[:, 0] <= 39).all()
        and (at[:, 1] >= 20).all()
        and (at[:, 1] <= 49).all()
    )
    assert torch.equal(composite.paste_back(photo, edited, crop, mask * 0, mode=mode), photo)


def test_paste_back_gives_the_edit_inside():
    photo = picture(300, 280)
    crop = crop_at(140, 150, 160, 128, 8)
    edited = gain.to_display(gain.to_linear(crop.apply(photo)) * torch.tensor([0.5, 0.8, 1.0])[:, None, None])
    for mode, limit in (("ratio", 0.004), ("difference", 0.004), ("replace", 0.004)):
        out = crop.apply(composite.paste_back(photo, edited, crop, mode=mode))
        assert (out - edited)[..., 24:-14, 24:-24].abs().max() < limit, mode


def test_a_relit_large_photo_stays_as_sharp_as_it_was():
    g = torch.Generator().manual_seed(2)
    photo = (picture(640, 640) + 0.1 * torch.randn(1, 3, 640, 640, generator=g)).clamp(0.02, 0.8)
    crop = crop_at(320, 320, 600, 64)
    darker = gain.to_display(gain.to_linear(crop.apply(photo)) * 0.5)
    out = composite.paste_back(photo, darker, crop)

    def detail(x):
        x = gain.to_linear(x)[..., 200:440, 200:440]
        return float((x - F.avg_pool2d(x, 3, 1, 1)).std())

    assert detail(out) == pytest.approx(0.5 * detail(photo), rel=0.05)
    replaced = composite.paste_back(photo, darker, crop, mode="replace")
    assert detail(replaced) < 0.15 * detail(photo)  # what a plain paste would lose


def test_paste_back_of_a_crop_beyond_the_photo():
    photo = picture(60, 60)
    gone = crop_at(500, 500, 40, 32)
    assert torch.equal(composite.paste_back(photo, torch.rand(1, 3, 32, 32), gone), photo)
    partly = crop_at(0, 0, 60, 32)
    out = composite.paste_back(photo, partly.apply(photo) * 0.5, partly)
    assert out[0, :, 5, 5].mean() < photo[0, :, 5, 5].mean()
    assert torch.equal(out[..., 35:, 35:], photo[..., 35:, 35:])


def test_soft_mask_falls_off_inside():
    crop = crop_at(0, 0, 64, 64)
    w = composite.soft_mask(None, crop)
    assert w.min() == 0 and w.max() == 1 and w[0, 0, 32, 32] == 1
    assert w[0, 0, 0].max() == 0
    assert (w[0, 0, 32].diff().abs() < 0.5).all()


def test_no_soft_edge_where_the_photo_ends_with_the_crop():
    photo = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 0.5 + 0.2
    whole = align.Crop(torch.eye(3)[None], 64)
    edited = gain.to_display(gain.to_linear(photo) * 1.5)
    out = composite.paste_back(photo, edited, whole)
    assert (out - edited).abs().max() < 2e-3
    # the left half of the photo: an edge at its right side only
    half = align.Crop(torch.eye(3)[None], 32)
    mask = composite.soft_mask(None, half, photo_size=(32, 64))
    assert (mask[0, 0, :, :24] == 1).all() and (mask[0, 0, :, -1] == 0).all()
    assert (composite.soft_mask(None, half)[0, 0, :, 0] == 0).all()


def lit(photo, stops):
    return gain.to_display(gain.to_linear(photo) * torch.as_tensor(stops).exp2()).clamp(0, 1)


def group(size=64, degrees=(0, 20, -15)):
    """A photo and three places in it whose squares overlap; the last leaves the photo."""
    photo = picture(200, 420)
    crops = [
        crop_at(x, y, side, size, d)
        for (x, y, side), d in zip(((110, 100, 140), (220, 90, 120), (390, 120, 90)), degrees)
    ]
    return photo, crops


@pytest.mark.parametrize("mode", composite.MODES)
def test_several_faces_of_one_photo(mode):
    photo, crops = group()
    places = [composite.place(photo, c, mode=mode) for c in crops]
    same = [p.original for p in places]
    for values in (photo, (photo * 255).round() / 255, (photo * 65535).round() / 65535):
        places = [composite.place(values, c, mode=mode) for c in crops]
        same = [p.original for p in places]
        assert torch.equal(composite.compose(values, places, same), values)
    places = [composite.place(photo, c, mode=mode) for c in crops]
    edits = [lit(p.original, s) for p, s in zip(places, (-1.0, 0.5, -2.0))]
    every = composite.compose(photo, places, edits)
    for i, j, k in ((2, 0, 1), (1, 2, 0)):
        other = composite.compose(photo, [places[i], places[j], places[k]], [edits[i], edits[j], edits[k]])
        assert (other - every).abs().max() < 1e-5  # the order does not matter
    # what is far from the others is as if it were alone
    alone = [composite.compose(photo, [p], [e]) for p, e in zip(places, edits)]
    for i, (x, y) in enumerate(((90, 100), (240, 90), (400, 120))):
        assert torch.allclose(every[..., y, x], alone[i][..., y, x], atol=0.03), i
    # between two of them each has its share, and no light is laid on twice
    between = (..., slice(60, 130), slice(165, 170))
    assert (every[between] > lit(photo, -1.0)[between] - 0.02).all()
    assert (every[between] < lit(photo, 0.5)[between] + 0.02).all()
    assert ((every - alone[0])[between].abs().amax() > 0.02) and (
        (every - alone[1])[between].abs().amax() > 0.02
    )
    # one that is not edited leaves the others as they are
    two = composite.compose(photo, places, [same[0], edits[1], edits[2]])
    assert torch.allclose(two, composite.compose(photo, places[1:], edits[1:]), atol=1e-5)


def test_edits_share_no_more_than_one_light_where_they_overlap():
    photo = torch.full((1, 3, 100, 160), 0.3)
    places = [composite.place(photo, crop_at(x, 50, 90, 64)) for x in (60, 100)]
    edits = [lit(p.original, 1.0) for p in places]
    out = composite.compose(photo, places, edits)
    assert torch.allclose(out[..., 50, 50:110], lit(photo, 1.0)[..., 50, 50:110], atol=2e-3)


@pytest.mark.parametrize("mode", composite.MODES)
def test_many_edits_of_a_face_are_each_as_if_alone(mode):
    photo = picture(160, 180)
    place = composite.place(photo, crop_at(90, 80, 120, 32, 10), mode=mode)
    g = torch.Generator().manual_seed(0)
    noise = 0.3 * torch.rand(4, 3, 32, 32, generator=g)
    edits = torch.cat([place.original, (place.original * 0.5 + noise).clamp(0, 1)])
    out = composite.compose(photo, [place], [edits])
    assert torch.equal(out[:1], photo)
    for i in range(5):
        assert torch.allclose(
            out[i : i + 1], composite.compose(photo, [place], [edits[i : i + 1]]), atol=1e-6
        )


def test_what_does_not_depend_on_the_edit_is_made_once(monkeypatch):
    photo, calls = picture(160, 180), []
    apply, alike = align.Crop.apply, gain.alike_mean
    monkeypatch.setattr(align.Crop, "apply", lambda self, x: calls.append("crop") or apply(self, x))
    monkeypatch.setattr(gain, "alike_mean", lambda *a, **k: calls.append("weights") or alike(*a, **k))
    place = composite.place(photo, crop_at(90, 80, 120, 32))
    composite.compose(photo, [place], [place.original * 0.9])
    one = (calls.count("crop"), calls.count("weights"))
    calls.clear()
    for lights in (place.original.expand(8, -1, -1, -1) * 0.9, place.original * 0.8):
        composite.compose(photo, [place], [lights])
    assert calls.count("crop") == 0 and calls.count("weights") == 2 * one[1]


@pytest.mark.parametrize("stops", [1.0, -1.5])
@pytest.mark.parametrize("degrees", [0, 25])
def test_no_step_where_the_edit_ends(stops, degrees):
    """A whole square of an even photo, 400 pixels wide, is lit: across its border a step from pixel to pixel
    is below 2.5 levels of 8 bits, and below four under the chin, where the edge is narrow."""
    photo = torch.tensor([0.5, 0.4, 0.3])[None, :, None, None].expand(1, 3, 700, 700)
    crop = crop_at(350, 350, 400, 128, degrees)
    place = composite.place(photo, crop)
    out = composite.compose(photo, [place], [lit(place.original, stops)])
    change = out - photo
    assert change.abs().max() > 0.1
    steps = torch.maximum(change.diff(dim=2).abs()[..., :-1], change.diff(dim=3).abs()[..., :-1, :]).amax(1)
    at = steps[0].nonzero()
    inside = crop.apply_points((at.flip(1) + 0.5).float()[None])[0] / 128  # in crop sides
    sizes = steps[0][at[:, 0], at[:, 1]]
    below = inside[:, 1] > 0.9
    assert sizes[below].max() < 4 / 255 and sizes[~below].max() < 2.5 / 255
    # the colour goes from the one light to the other and nowhere else
    part = change / (lit(photo, stops) - photo)
    assert part.min() > -0.02 and part.max() < 1.05


def test_a_moved_photo_is_lit_where_it_lies():
    """A place under another: the crop is moved first, and the edit put on that."""
    photo = picture(120, 120)
    crop = crop_at(60, 60, 80, 32)
    moved = crop.resized(64).apply(photo).flip(3)
    inside = align.Crop(torch.eye(3)[None], 64).resized(32)
    under = composite.place(moved, inside)
    place = composite.place(photo, crop.resized(64), mode="replace")
    place = composite.Place(**{**vars(place), "under": (moved, under)})
    out = composite.compose(photo, [place], [under.original * 0.8])
    want = composite.compose(moved, [under], [under.original * 0.8])
    assert torch.equal(
        out, composite.compose(photo, [composite.place(photo, crop.resized(64), mode="replace")], [want])
    )
    assert (crop.resized(64).apply(out) - want)[..., 16:48, 16:48].abs().max() < 0.01


def test_places_and_edits_that_do_not_fit_are_named():
    photo = picture(50, 50)
    place = composite.place(photo, crop_at(20, 20, 30, 16))
    for call, words in (
        (lambda: composite.place(photo, crop_at(0, 0, 9, 16), mode="blend"), "ratio, difference, replace"),
        (lambda: composite.place(photo.expand(2, -1, -1, -1), crop_at(0, 0, 9, 16)), "one face in one photo"),
        (lambda: composite.place(photo, crop_at(0, 0, 9, 16), original=photo), "original crop must be"),
        (lambda: composite.compose(photo, [place], [torch.zeros(1, 3, 8, 8)]), "edited crop must be"),
        (
            lambda: composite.compose(photo, [place] * 2, [place.original, torch.zeros(2, 3, 16, 16)]),
            "edited",
        ),
        (lambda: composite.compose(photo, [place], [place.original * float("nan")]), "NaN"),
        (
            lambda: composite.paste_back(
                photo.expand(3, -1, -1, -1), place.original.expand(2, -1, -1, -1), place.crop
            ),
            "2 edits",
        ),
    ):
        with pytest.raises(ValueError, match=words):
            call()
