"""Albums: whose they are, what is left out and why, copies, the sheet; photo files of all kinds."""

import io
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from rig_core import album, align, checkpoints, files
from rig_core import contact_sheet as sheets
from rig_core.data import read_photo
from rig_core.estimators import landmark_fit
from rig_core.warp import blur
from training import synth

SIZE = 128


@pytest.fixture(scope="module")
def head():
    return checkpoints.load_head()


@pytest.fixture(scope="module")
def recognise():
    return checkpoints.load_identity()


@pytest.fixture(scope="module")
def person():
    """Eight pictures of one rendered person under other lights, poses, clothes and cameras."""
    return synth.render(range(2200, 2208), 128, person=[44] * 8)


@pytest.fixture(scope="module")
def strangers():
    return synth.render(range(2220, 2225), 128).image


def fitter(head):
    return lambda images, points: landmark_fit.fit(head, points, tuple(images.shape[2:]), images)


def pillow(image):
    return Image.fromarray((image[0] * 255).round().byte().permute(1, 2, 0).numpy())


def tensor(picture):
    return torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1)[None].float() / 255


def saved_again(image, quality):
    file = io.BytesIO()
    pillow(image).save(file, "JPEG", quality=quality)
    return tensor(Image.open(file))


def given(photos):
    return [(name, lambda image=image: image) for name, image in photos.items()]


def asset(name):
    return read_photo(files.ASSETS / f"{name}.jpg")


# --- a whole album ---


@pytest.fixture(scope="module")
def gathered(head, recognise, person, strangers):
    me = person.image.split(1)
    photos = {f"me {i}": me[i] for i in range(6)}
    photos["beside another"] = torch.cat([strangers[:1], me[6]], 3)
    photos["between two"] = torch.cat([strangers[1:2], me[7], strangers[2:3]], 3)
    photos["saved again"] = saved_again(me[0], 60)
    photos["smaller"] = tensor(pillow(me[1]).resize((96, 96), Image.Resampling.BICUBIC))
    photos["cropped"] = me[2][..., 2:-2, 2:-2]
    photos["out of focus"] = blur(me[3], 2.2)
    photos["another"] = strangers[3:4]
    photos["two others"] = torch.cat([strangers[3:4], strangers[4:5]], 3)
    photos["far away"] = torch.full((1, 3, 240, 320), 0.45)
    photos["far away"][..., 90:122, 100:132] = F.interpolate(me[4], (32, 32), mode="area")
    photos["noise"] = torch.rand(1, 3, 100, 140, generator=torch.Generator().manual_seed(0))
    y = torch.linspace(0, 1, 100)[:, None].expand(100, 180)
    photos["landscape"] = torch.stack([0.4 + 0.2 * y, 0.7 - 0.3 * y, 0.9 - 0.8 * y])[None]
    calls = []

    def broken():
        raise ValueError("a damaged one")

    photos, names = [*given(photos), ("broken", broken)], [*photos, "broken"]
    found = album.gather(
        photos, SIZE, recognise, fitter(head), callback=lambda *a: calls.append(a), head=head
    )
    return found, calls, names


def test_the_person_whom_most_photos_show_is_kept_and_nobody_else(gathered):
    found, _, _ = gathered
    assert found.names == [f"me {i}" for i in range(6)] + ["beside another", "between two"]
    for name, image, points in zip(found.names, found.images, found.landmarks):
        assert image.shape == (3, SIZE, SIZE) and 0 <= image.min() and image.max() <= 1
        eyes, mouth = points[36:48].mean(0), points[[48, 54]].mean(0)
        assert (eyes - torch.tensor([63.5, 57.0])).abs().max() < 8, name  # where FFHQ has them
        assert abs(float(mouth[0]) - 63.5) < 8 and float(mouth[1] - eyes[1]) > 25


def test_portraits_are_the_aligned_photos(gathered, person):
    """The landmarks lead back to the photo: what is seen there is what the portrait shows."""
    found, _, _ = gathered
    true = person.landmarks[:6]
    crop = align.ffhq_crop(true, SIZE)
    wanted = crop.apply(person.image[:6])
    inner = slice(17, 68)
    off = (crop.apply_points(true)[:, inner] - found.landmarks[:6, inner]).norm(dim=-1).mean(1)
    assert off.max() < 4
    # landmarks that are found lie a pixel or two beside the true ones, and so does the portrait
    difference = (wanted - found.images[:6]).abs().mean((1, 2, 3))
    other = (wanted - found.images[:6].roll(1, 0)).abs().mean((1, 2, 3))
    assert (difference < 0.1).all() and (difference < 0.5 * other).all()


def test_the_group_photos_give_the_person(gathered, person):
    found, _, _ = gathered
    for image, i in zip(found.images[6:], (6, 7)):
        tone = [x[:, 50:90, 45:83].mean((1, 2)) for x in (image, person.image[i])]
        assert (tone[0] - tone[1]).abs().max() < 0.05


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("saved again", r"the same photo as me 0 \(\d\.\d% different\)"),
        ("smaller", r"the same photo as me 1 \(\d\.\d% different\)"),
        ("cropped", r"the same photo as me 2 \(\d\.\d% different\)"),
        ("out of focus", r"blurred: \d% of the detail that the others have, want 10%"),
        ("another", r"shows another person \(similarity -?0\.[0-3]\d, want 0\.40\)"),
        ("two others", r"none of its 2 faces is the person \(similarity -?0\.[0-4]\d, want 0\.50\)"),
        ("far away", r"the face is too small: its portrait is [23]\d px of the photo, want 45"),
        ("noise", r"no face found in its 140 x 100 px"),
        ("landscape", r"no face found in its 180 x 100 px"),
        ("broken", r"a damaged one"),
    ],
)
def test_what_is_left_out_has_a_reason_and_the_number(gathered, name, reason):
    found, _, _ = gathered
    assert re.fullmatch(reason, found.rejected[name]), found.rejected[name]
    assert len(found.rejected) == 10


def test_the_codes_are_those_of_the_portraits(gathered, head):
    found, _, _ = gathered
    assert len(found.codes) == 8 and found.codes.size == (SIZE, SIZE) and found.codes.head == "open"
    again = fitter(head)(found.images[4:5], found.landmarks[4:5])
    torch.testing.assert_close(found.codes[4].shape, again.shape, atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(found.codes[4].light, again.light, atol=1e-3, rtol=1e-3)
    assert landmark_fit.residual(head, found.codes, found.landmarks)[:, 17:].mean() < 2


def test_progress_is_told_after_each_photo(gathered):
    _, calls, names = gathered
    assert calls == [(i + 1, len(names), name) for i, name in enumerate(names)]


def test_the_callback_may_stop_and_photos_are_read_one_at_a_time(recognise):
    read = []

    def reader(name):
        read.append(name)
        raise ValueError("no")

    def stop(done, total, name):
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        album.gather([(n, lambda n=n: reader(n)) for n in "abc"], SIZE, recognise, None, callback=stop)
    assert read == ["a", "b"]


def test_two_photographs_of_two_persons(recognise, head):
    photos = {"astronaut": asset("astronaut"), "grace_hopper": asset("grace_hopper")}
    for name, image in photos.items():
        alone = album.gather(given({name: image}), SIZE, recognise, fitter(head), head=head)
        assert alone.names == [name] and alone.rejected == {}
    both = album.gather(given(photos), SIZE, recognise, fitter(head))
    assert both.names == ["astronaut"]
    assert re.fullmatch(
        r"shows another person \(similarity 0\.[0-3]\d, want 0\.40\)", both.rejected["grace_hopper"]
    )


def test_nothing_left_is_an_error_with_the_reasons(recognise):
    def broken():
        raise ValueError("a damaged one")

    photos = [("a.png", lambda: torch.zeros(1, 3, 60, 80)), *[(f"{i}.png", broken) for i in range(11)]]
    with pytest.raises(ValueError, match="none of the 12 photos") as e:
        album.gather(photos, SIZE, recognise, None)
    assert "a.png: no face found in its 80 x 60 px; 0.png: a damaged one; " in str(e.value)
    assert str(e.value).endswith("8.png: a damaged one; and 2 more")
    with pytest.raises(ValueError, match="none of the 0 photos"):
        album.gather([], SIZE, recognise, None)


# --- whose album it is ---


def unit(*rows):
    return F.normalize(torch.tensor(rows, dtype=torch.float32), dim=1)


def test_similarity_leaves_the_own_photo_out():
    a, b = [1.0, 0.0, 0.0], [0.8, 0.6, 0.0]
    vectors = unit(a, b, [0.0, 0.0, 1.0])
    found = album.similarity(vectors, torch.tensor([0, 1, 2]), torch.ones(3))
    assert found.tolist() == pytest.approx([0.8, 0.8, 0.0], abs=1e-6)
    vectors = unit(a, a, b)
    found = album.similarity(vectors, torch.tensor([0, 1, 2]), torch.ones(3))
    first = float(F.normalize(vectors[1] + vectors[2], dim=0)[0])
    assert found.tolist() == pytest.approx([first, first, 0.8], abs=1e-6)


def test_the_more_frequent_of_two_persons_wins_whatever_the_size_of_the_faces():
    me, other, third = [1.0, 0.1, 0.0], [0.0, 1.0, 0.1], [0.0, 0.0, 1.0]
    vectors = unit(me, other, me, other, me, third)
    photo = torch.tensor([0, 0, 1, 1, 2, 3])
    found = album.similarity(vectors, photo, torch.tensor([0.7, 1, 0.7, 1, 1, 1.0]))
    assert (found[[0, 2, 4]] > 0.99).all() and (found[[1, 3, 5]] < 0.2).all()


def test_in_a_tie_the_larger_faces_win():
    me, other = [1.0, 0.0], [0.0, 1.0]
    vectors, photo = unit(other, me, other, me), torch.tensor([0, 0, 1, 1])
    assert (album.similarity(vectors, photo, torch.tensor([0.7, 1, 0.7, 1]))[[1, 3]] > 0.99).all()
    assert (album.similarity(vectors, photo, torch.tensor([1, 0.7, 1, 0.7]))[[1, 3]] < 0.01).all()


def face(photo, vector=(1.0, 0.0), side=200.0, detail=1.0, image=None, fault=None):
    image = torch.zeros(3, 64, 64, dtype=torch.uint8) if image is None else image
    return album.Face(photo, image, torch.zeros(68, 2), unit(vector)[0], side, detail, fault)


def test_of_two_faces_that_are_both_alike_none_is_taken():
    faces = [face(0), face(1), face(2), face(2, (0.98, 0.2)), face(3), face(3, (0.5, 0.87))]
    rejected = {}
    found = album.choose(faces, rejected)
    assert [f.photo for f in found] == [0, 1, 2, 3] and found[3] is faces[4]
    assert rejected == {2: "two of its faces may be the person (similarity 1.00 and 0.98): crop it to one"}


def test_faces_that_are_no_use_do_not_decide_who_the_person_is():
    faces = [face(i, (0.0, 1.0), fault="blurred: x") for i in range(4)] + [face(4), face(5)]
    rejected = {}
    album.choose(faces, rejected)
    assert rejected == dict.fromkeys(range(4), "blurred: x")


# --- good portraits ---


def test_blur_is_measured():
    sharp = torch.rand(1, 3, 128, 128, generator=torch.Generator().manual_seed(0))
    assert album.sharpness(sharp) > 100 * album.sharpness(blur(sharp, 4.0))
    assert album.blurred(sharp) is None
    assert re.fullmatch(r"blurred: sharpness \d millionths, want 40", album.blurred(blur(sharp, 12.0)))


def test_dim_light_is_no_blur(person):
    image = person.image[:1]
    assert album.detail(0.25 * image) == pytest.approx(album.detail(image), rel=1e-3)
    assert album.detail(blur(image, 2.0)) < 0.1 * album.detail(image)
    faces = [face(i, detail=d) for i, d in enumerate([1.0, 0.5, 0.04, 2.0])]
    rejected = {}
    assert album.without_blurred(faces, rejected) == [faces[0], faces[1], faces[3]]
    assert rejected == {2: "blurred: 8% of the detail that the others have, want 10%"}


def test_a_face_that_leaves_the_photo(recognise, person):
    image, points = person.image[3:4], person.landmarks[3:4]
    crop = align.ffhq_crop(points, SIZE)
    assert album._outside(image, points, crop) is None
    x = points[0, :, 0]
    cut = image[..., : int(x.quantile(0.8))]
    inside = int((x < cut.shape[-1] - 0.5).sum())
    wanted = f"the face leaves the photo: {inside} of its 68 landmarks are inside"
    assert 50 < inside < 60 and album._outside(cut, points, crop) == wanted

    low, high = points[0].amin(0).floor().int() - 8, points[0].amax(0).ceil().int() + 8
    close = image[..., low[1] : high[1], low[0] : high[0]]
    share = float((high - low).prod()) / album.portrait_side(crop) ** 2
    [found] = album.find(0, close, SIZE, recognise)
    for text in (album._outside(close, points - low, align.ffhq_crop(points - low, SIZE)), found.fault):
        held = re.fullmatch(r"the face leaves the photo, which holds (\d+)% of its portrait, want 70%", text)
        assert int(held[1]) / 100 == pytest.approx(share, abs=0.06)


def test_of_two_copies_the_larger_then_the_sharper_stays():
    g = torch.Generator().manual_seed(3)
    one, two = (
        F.interpolate(torch.rand(1, 3, 8, 8, generator=g), (64, 64), mode="bicubic") for _ in range(2)
    )
    one, two = ((v[0].clamp(0, 1) * 255).byte() for v in (one, two))
    nearly = (one.int() + 1).clamp(0, 255).byte()
    names = list("abcd")
    for small, large, stays in ((60.0, 100.0, 1), (100.0, 60.0, 0), (300.0, 90.0, 0)):
        rejected = {}
        faces = [face(0, image=one, side=small), face(1, image=nearly, side=large), face(2, image=two)]
        assert album.distinct(faces, names, 128, rejected) == [faces[stays], faces[2]]
        assert list(rejected) == [1 - stays]
        assert re.fullmatch(
            f"the same photo as {names[stays]} \\(0\\.[34]% different\\)", rejected[1 - stays]
        )
    for details, stays in (((1.0, 1.1), 0), ((1.0, 1.5), 1)):  # both larger than is wanted
        faces = [face(0, image=one, detail=details[0], side=300.0), face(1, image=one, detail=details[1])]
        assert album.distinct(faces, names, 128, {}) == [faces[stays]]


def test_dark_photos_are_not_copies_of_each_other():
    g = torch.Generator().manual_seed(3)
    one, two = ((0.03 * torch.rand(3, 64, 64, generator=g) * 255).byte() for _ in range(2))
    assert (album.in_small(one) - album.in_small(two)).abs().mean() < album.SAME
    faces = [face(0, image=one), face(1, image=two)]
    assert album.distinct(faces, ["a", "b"], 128, {}) == faces


def test_another_light_or_pose_is_no_copy(recognise):
    same = dict(person=[44] * 2, scene=[1] * 2, camera=[1] * 2)
    images = (
        synth.render([5, 6], 128, **same, pose=[2] * 2).image,
        synth.render([5, 6], 128, **same, light=[2] * 2).image,
    )
    for pair in images:
        faces = [album.find(i, image, SIZE, recognise)[0] for i, image in enumerate(pair.split(1))]
        assert album.distinct(faces, ["a", "b"], SIZE, {}) == faces


def test_portraits_that_the_head_does_not_fit_are_left_out(gathered, head):
    found, _, _ = gathered
    images, points = (found.images * 255).round().byte(), found.landmarks
    faces = [album.Face(i, images[i], points[i], torch.zeros(1), 1.0, 1.0, None) for i in range(3)]

    def fit(image, marks):
        code = fitter(head)(image, marks)
        cam = code.cam.clone()
        cam[1, 1] += 0.01  # a centimetre to the side
        cam[2, 0] = torch.nan
        return code.replace(cam=cam)

    wanted = 0.01 * float(found.codes.cam[1, 0]) * 112 / float(found.codes.crop[1, 0, 0]) * 256 / SIZE
    rejected = {}
    kept, codes = album.fitted(faces, fit, head, rejected)
    assert kept == faces[:1] and len(codes) == 1
    error = re.fullmatch(r"the head does not fit: (\d+\.\d) px mean error .* at 256 px, want 6", rejected[1])
    assert float(error[1]) == pytest.approx(wanted, rel=0.1)
    assert rejected[2] == "the head does not fit: its code holds NaN or infinity"
    rejected = {}
    assert album.fitted(faces, fit, None, rejected)[0] == faces[:2] and list(rejected) == [2]


def test_the_most_varied_are_wanted(head):
    code = head.mean_code(1, SIZE).expand(5)
    pose = code.pose.clone()
    pose[:, 1] = torch.tensor([0.0, 0.02, 0.5, -0.5, 0.04])
    assert album.varied(code.replace(pose=pose), 3) == [1, 2, 3]
    light = code.light.clone()
    light[:, 1] = light[:, :1].mean() * torch.tensor([0.0, 0.9, 0.0, 0.1, -0.4])[:, None]
    assert album.varied(code.replace(light=light), 3) == [0, 1, 4]


def test_no_more_than_wanted_are_kept(recognise, head, person):
    photos = given({f"me {i}": image for i, image in enumerate(person.image[:4].split(1))})
    found = album.gather(photos, 64, recognise, fitter(head), keep=2)
    assert len(found.names) == len(found.images) == len(found.codes) == len(found.landmarks) == 2
    assert set(found.rejected.values()) == {"not needed: 2 portraits are wanted, those kept differ more"}
    assert len(found.rejected) == 2 and not set(found.names) & set(found.rejected)


# --- the sheet ---


def colour(sheet, x, y):
    return tuple((sheet[:, y, x] * 255).round().int().tolist())


def test_the_sheet_shows_the_kept_then_the_others_dimmed():
    red = torch.tensor([200, 0, 0], dtype=torch.uint8)[:, None, None].expand(3, 150, 150)
    sheet = sheets.contact_sheet(
        [("a.jpg", red), ("b.jpg", red)], [("c.jpg", red, "blurred: much"), ("d", None, "x")]
    )
    gap, step = sheets.GAP, sheets.TILE + sheets.GAP
    assert sheet.shape[2] == 4 * step + gap  # never narrower than four tiles
    rows = [y for y in range(sheet.shape[1]) if colour(sheet, gap - 1, y) in (sheets.KEPT, sheets.LEFT_OUT)]
    first, second = rows[0], next(y for y in rows if colour(sheet, gap - 1, y) == sheets.LEFT_OUT)
    assert second > first + sheets.TILE
    for column in (0, 1):
        assert colour(sheet, gap + column * step + 75, first + 75) == (200, 0, 0)
    assert colour(sheet, gap + 75, second + 75) == (225, 125, 124)  # half way to the page
    assert colour(sheet, gap + step + 75, second + 75) == sheets.MOUNT
    assert colour(sheet, gap + 2 * step + 75, second + 75) == sheets.PAGE
    below = sheet[:, second + sheets.TILE + 1 :, gap : gap + sheets.TILE]
    ink = (below - torch.tensor(sheets.LEFT_OUT)[:, None, None] / 255).abs().amax(0) < 0.02
    assert ink.sum() > 30  # the reason, in its colour


def test_a_large_album_still_makes_one_sheet():
    tile = torch.zeros(3, 100, 150, dtype=torch.uint8)
    kept = [(f"a very long name of a photo, number {i}.jpg", tile) for i in range(100)]
    reason = "words " * 100
    sheet = sheets.contact_sheet(kept, [(f"風 {i}", tile, reason) for i in range(100)])
    black = (sheet[:, :, 20] == 0).all(0).sum()  # in the first column; those left out are grey
    assert black == 100 * 5 and sheet.shape[2] == 8 * (sheets.TILE + sheets.GAP) + sheets.GAP
    rows = 5 * (sheets.TILE + sheets.LINE + sheets.GAP) + 3 * (sheets.TILE + 7 * sheets.LINE + sheets.GAP)
    assert sheet.shape[1] == rows + 4 * sheets.LINE + sheets.GAP


# --- folders and files ---


def test_photos_of_a_folder_in_natural_order(tmp_path):
    for name in ("b10.JPG", "b9.png", "b9a.webp", "A.tiff", "._b9.png", "notes.txt", "10.bmp", "9.jpeg"):
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "more.jpg").mkdir()
    (tmp_path / "below").mkdir()
    (tmp_path / "below" / "c.jpg").write_bytes(b"")
    wanted = ["9.jpeg", "10.bmp", "A.tiff", "b9.png", "b9a.webp", "b10.JPG"]
    assert [p.name for p in album.paths(tmp_path)] == wanted
    with pytest.raises(ValueError, match="empty holds no photos"):
        (tmp_path / "empty").mkdir()
        album.paths(tmp_path / "empty")
    with pytest.raises(ValueError, match="nowhere is no folder"):
        album.paths(tmp_path / "nowhere")


@pytest.fixture(scope="module")
def picture():
    return pillow(asset("astronaut")).resize((60, 40))


@pytest.mark.parametrize("kind", ["jpg", "png", "tif", "webp"])
def test_photos_are_turned_as_their_exif_says(picture, tmp_path, kind):
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held with its right side down
    options = {"jpg": {"quality": 95}, "webp": {"lossless": True}}.get(kind, {})
    picture.save(tmp_path / f"a.{kind}", exif=exif.tobytes(), **options)
    found = read_photo(tmp_path / f"a.{kind}")
    wanted = tensor(picture).rot90(-1, (2, 3))
    assert found.shape == (1, 3, 60, 40)
    assert (found - wanted).abs().mean() < (0.03 if kind == "jpg" else 1e-6)


@pytest.mark.parametrize(
    ("mode", "kind", "limit"),
    [("L", "png", 1e-6), ("LA", "png", 1e-6), ("RGBA", "png", 1e-6), ("P", "png", 0.1), ("CMYK", "tif", 1e-6),
     ("CMYK", "jpg", 0.03), ("1", "png", 1e-6)],
)  # fmt: skip
def test_all_modes_become_rgb(picture, tmp_path, mode, kind, limit):
    picture.convert(mode).save(tmp_path / f"a.{kind}")
    wanted = tensor(picture.convert(mode) if mode in ("L", "1", "LA") else picture)
    assert (read_photo(tmp_path / f"a.{kind}") - wanted).abs().mean() < limit


def test_sixteen_bit_grey_is_scaled_and_transparency_becomes_white(picture, tmp_path):
    grey = np.asarray(picture.convert("L")).astype(np.uint16) * 257
    Image.fromarray(grey).save(tmp_path / "a.png")
    assert torch.equal(
        (read_photo(tmp_path / "a.png")[0, 0] * 255).round(), torch.from_numpy(grey // 257).float()
    )
    clear = picture.convert("RGBA")
    clear.putalpha(Image.fromarray(np.repeat(np.uint8([0, 255]), 30)[None].repeat(40, 0)))
    clear.save(tmp_path / "b.png")
    found = read_photo(tmp_path / "b.png")
    assert (found[..., :30] == 1).all() and torch.equal(found[..., 30:], tensor(picture)[..., 30:])


@pytest.mark.parametrize("kind", ["jpg", "png"])
def test_huge_photos_are_shrunk(picture, tmp_path, kind):
    picture.resize((600, 400)).save(tmp_path / f"a.{kind}")
    found = read_photo(tmp_path / f"a.{kind}", most=60000)
    assert found.shape == (1, 3, 200, 300)
    assert (F.avg_pool2d(found, 5) - tensor(picture)).abs().mean() < 0.03
    assert read_photo(tmp_path / f"a.{kind}").shape == (1, 3, 400, 600)


def test_unreadable_files_are_named(picture, tmp_path):
    path = tmp_path / "a.png"
    picture.save(path)
    whole = path.read_bytes()
    for content, reason in (
        (b"", "it is no picture, or a damaged one"),
        (b"\xff\xd8 not a picture", "it is no picture, or a damaged one"),
        (whole[: len(whole) // 2], "image file is truncated"),
        (whole[:40], ""),
    ):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=f"a.png cannot be read: .*{reason}"):
            read_photo(path)
    with pytest.raises(ValueError, match="b.png cannot be read: .*No such file"):
        read_photo(tmp_path / "b.png")
    Image.fromarray(np.zeros((4, 4), np.float32)).save(tmp_path / "c.tif")
    with pytest.raises(ValueError, match="c.tif holds floating-point numbers: save it with 8 or 16 bits"):
        read_photo(tmp_path / "c.tif")
