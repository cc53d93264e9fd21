"""Align Face, Fit to Landmarks, Paste Back and the photos that they are given."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from tests import host_double
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
    rgb, crop, _, _ = pack.run("AlignFace", photo=photo, size=SIZE, landmarks=points)
    assert torch.equal(pack.run("AlignFace", photo=rgba, size=SIZE, landmarks=points)[0], rgb)
    assert torch.equal(pack.run("PasteBack", photo=rgba, edited=rgb, crop=crop)[0], photo)


def test_an_8000_px_photo_is_aligned_first(pack, head, scene):
    photo, points = scene
    large = torch.nn.functional.interpolate(photo.permute(0, 3, 1, 2), scale_factor=20, mode="nearest")
    large = torch.nn.functional.pad(large, (0, 8000 - large.shape[3], 0, 0), value=0.4).permute(0, 2, 3, 1)
    image, crop, at, _ = pack.run("AlignFace", photo=large, size=SIZE, landmarks=(points + 0.5) * 20 - 0.5)
    small = pack.run("AlignFace", photo=photo, size=SIZE, landmarks=points)
    assert psnr(image, small[0]) > 25 and (at - small[2]).abs().max() < 0.6
    with pytest.raises(ValueError, match="8000 x 1920.*Align Face"):
        pack.run("FitToLandmarks", face_model=head, image=large)


@pytest.fixture(scope="module")
def people():
    """Two real portraits [1,400,W,3] and a photo of both side by side."""

    def photo(name, size):
        image = Image.open(ROOT / "rig_core" / "assets" / name).convert("RGB")
        image.thumbnail((size, size))
        return torch.from_numpy(np.array(image)).float()[None] / 255

    woman, other = photo("astronaut.jpg", 400), photo("grace_hopper.jpg", 400)
    height = min(woman.shape[1], other.shape[1])
    woman, other = woman[:, :height], other[:, :height]
    return woman, other, torch.cat([woman, other], 2)


def test_no_face_one_face_several_faces_in_real_photos(pack, people):
    woman, _, both = people
    height = woman.shape[1]
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
    with pytest.raises(ValueError, match="'photo': no face found in the picture"):
        pack.run("AlignFace", photo=empty)
    frames = torch.cat([woman[:, :height], torch.full_like(woman[:, :height], 0.4)])
    with pytest.raises(ValueError, match="no face found in picture 2 of 2"):
        pack.run("AlignFace", photo=frames)
    aligned, crop, _, _ = pack.run("AlignFace", photo=frames, size=SIZE, missing="pass through")
    assert crop.found.tolist() == [True, False]
    out = pack.run("PasteBack", photo=frames, edited=aligned * 0.5, crop=crop)[0]
    assert torch.equal(out[1], frames[1]) and not torch.equal(out[0], frames[0])


def test_landmarks_that_do_not_fit_are_named(pack, head, face):
    with pytest.raises(ValueError, match=r"'landmarks': landmarks must be \[faces, 68, 2\]"):
        pack.run("FitToLandmarks", face_model=head, image=face[0], landmarks=torch.zeros(1, 5, 2))
    with pytest.raises(ValueError, match="'landmarks': .* NaN"):
        pack.run("FitToLandmarks", face_model=head, image=face[0], landmarks=face[2] * float("nan"))
    with pytest.raises(ValueError, match="'landmarks' holds 2 faces, but there are 3 pictures"):
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
    image, crop, _, _ = pack.run("AlignFace", photo=photo[:, :, some:], size=SIZE, landmarks=points - at)
    outside = round(float((points[0, :, 0] - some < -0.5).float().mean()) * 100)
    assert 20 < outside < 40 and f"{outside} % of its landmarks" in caplog.text
    assert torch.isfinite(image).all()
    out = pack.run("PasteBack", photo=photo[:, :, some:], edited=image * 0.5, crop=crop)[0]
    assert out.shape == photo[:, :, some:].shape and (out < photo[:, :, some:] - 0.05).any()
    at = torch.tensor([most, 0.0])
    with pytest.raises(ValueError, match="'photo': the face leaves it, only 2[0-2] of its 68"):
        pack.run("AlignFace", photo=photo[:, :, most:], size=SIZE, landmarks=points - at)
    caplog.clear()
    pack.run("AlignFace", photo=photo, size=SIZE, landmarks=points)
    assert not caplog.text


def test_all_faces_of_a_group_photo_and_back(pack, people):
    woman, other, both = people
    empty = torch.full_like(both, 0.4)
    photos = torch.cat([both, empty, both.flip(2)])
    image, crop, points, overlay = pack.run(
        "AlignFace", photo=photos, size=SIZE, order="left to right", faces="all", missing="pass through"
    )
    assert crop.photo.tolist() == [0, 0, 1, 2, 2] and crop.found.tolist() == [True, True, False, True, True]
    assert image.shape == (5, SIZE, SIZE, 3) and points.shape == (5, 68, 2)
    assert overlay.shape == (3, *both.shape[1:]) and pack.host.previews[-1].shape == overlay.shape
    one = pack.run("AlignFace", photo=both, size=SIZE, order="left to right", index=1)[0]
    assert torch.allclose(image[1:2], one, atol=2e-3)
    assert torch.equal((overlay[1] * 255).round(), (empty[0] * 255).round())

    def back(edited, **more):
        return pack.run("PasteBack", photo=photos, edited=edited, crop=crop, **more)[0]

    for mode in ("ratio", "difference", "replace"):
        assert torch.equal(back(image, mode=mode), photos)
    edited = image.clone()
    edited[1] *= 0.5  # the right face of the first photo
    edited[2] *= 0.5  # the photo without a face
    out = back(edited)
    assert torch.equal(out[1:], photos[1:]) and out.shape == photos.shape
    change = (out[0] - photos[0]).abs().amax(-1)
    assert change[:, : woman.shape[2] - 60].max() == 0 and change[:, woman.shape[2] :].max() > 0.1
    again = pack.run(
        "AlignFace", photo=out, size=SIZE, order="left to right", faces="all", missing="previous"
    )
    middle = (1, slice(20, 52), slice(20, 44))
    assert psnr(again[0][middle], edited[middle]) > 25
    with pytest.raises(ValueError, match="'edited' holds 2 faces, but 'crop' 5"):
        back(edited[:2])
    with pytest.raises(ValueError, match="'photo' holds 2 pictures, but Align Face had 3"):
        pack.run("PasteBack", photo=photos[:2], edited=edited, crop=crop)


def test_all_faces_are_fitted_and_aligned_landmarks_lie_on_them(pack, head, people):
    image, _, points, _ = pack.run("AlignFace", photo=people[2], size=SIZE, faces="all")
    code, light, overlay = pack.run("FitToLandmarks", face_model=head, image=image, landmarks=points)
    assert len(code) == len(light) == len(overlay) == 2
    found = head.landmarks(head.verts(code.shape, code.exp, code.pose), code.pose)
    found = pack.core.buffers.to_pixels(pack.core.buffers.to_image(found, code), code.size)
    assert ((found - points)[:, 17:].norm(dim=-1).median(1).values < 2.5).all()
    alone = pack.run("FitToLandmarks", face_model=head, image=image[1:], landmarks=points[1:])[0]
    assert torch.allclose(code.light[1:], alone.light, atol=0.01)


def test_boxes_of_other_nodes_choose_the_face(pack, people, caplog):
    woman, other, both = people
    left, right = (
        pack.run("AlignFace", photo=both, size=SIZE, order="left to right", index=i)[0] for i in (0, 1)
    )
    half = {"x": woman.shape[2] + 20, "y": 10, "width": other.shape[2] - 40, "height": 250, "label": "person"}
    assert torch.equal(pack.run("AlignFace", photo=both, size=SIZE, box=half)[0], right)
    films = both.expand(2, -1, -1, -1)
    both_ways = [[half], [[20.0, 5.0, 240.0, 150.0]]]
    image = pack.run("AlignFace", photo=films, size=SIZE, box=both_ways)[0]
    assert torch.equal(image, torch.cat([right, left])) and not caplog.text
    crop = pack.run("AlignFace", photo=films, size=SIZE, box=[[half], []], missing="previous")[1]
    assert crop.photo.tolist() == [0, 1] and crop.found.all()
    nobody = {"x": 20, "y": 260, "width": 60, "height": 60}
    points = pack.run("AlignFace", photo=both, size=SIZE, box=nobody)[2]
    assert torch.isfinite(points).all() and "no face found in a box of picture 1" in caplog.text
    with pytest.raises(ValueError, match="'box': the box .* lies outside of the photo"):
        pack.run("AlignFace", photo=both, box={**half, "x": 5000})
    with pytest.raises(ValueError, match="'box': there are boxes for 3 pictures, but 2"):
        pack.run("AlignFace", photo=films, box=[[half]] * 3)
    with pytest.raises(ValueError, match="there is no box for picture 2 of 2"):
        pack.run("AlignFace", photo=films, box=[[half], []])


def test_landmarks_of_a_face_mesh_are_taken(pack, head, people):
    both = people[2]
    found = pack.run("AlignFace", photo=both, size=SIZE, order="left to right", faces="all")
    points = found[1].crop.invert_points(found[2])
    mesh = torch.zeros(2, 478, 2)
    mesh[:, pack.core.estimators.given.MESH] = points
    faces = [{"landmarks_xy": p.numpy(), "score": 1.0} for p in mesh.flip(0)]
    given = {"frames": [faces], "image_size": both.shape[1:3], "connection_sets": {}}
    image = pack.run("AlignFace", photo=both, size=SIZE, order="left to right", index=1, landmarks=given)[0]
    assert (image - found[0][1:]).abs().mean() < 2e-3
    at = found[2][1].numpy()
    mesh = torch.zeros(478, 2)
    mesh[pack.core.estimators.given.MESH] = found[2][1]
    given = {"frames": [[{"landmarks_xy": mesh.numpy()}]]}
    codes = [
        pack.run("FitToLandmarks", face_model=head, image=found[0][1:], landmarks=v)[0]
        for v in (given, torch.tensor(at)[None])
    ]
    assert torch.allclose(codes[0].pose, codes[1].pose)
    with pytest.raises(ValueError, match="'landmarks': .*68"):
        pack.run("AlignFace", photo=both, landmarks={"frames": [[{"landmarks_xy": mesh.numpy()[:106]}]]})


def film(scene, frames, empty=()):
    """The scene's face, shaking by two pixels sideways; some frames without it."""
    photo = scene[0].expand(frames, -1, -1, -1).clone()
    for i in range(frames):
        photo[i] = photo[i].roll(2 * (i % 2), 1) if i not in empty else 0.4
    return photo


def test_a_shaking_film_is_steadied_and_its_landmarks_are_the_faces_own(pack, scene):
    photo = film(scene, 10)
    points = scene[1] + torch.tensor([[0.0, 0.0], [2.0, 0.0]]).repeat(5, 1)[:, None]
    shaking = pack.run("AlignFace", photo=photo, size=SIZE, landmarks=points)
    steady = pack.run("AlignFace", photo=photo, size=SIZE, landmarks=points, steady=2.0)
    x = [v[1].crop.invert_points(torch.full((10, 1, 2), 31.5))[:, 0, 0] for v in (shaking, steady)]
    assert x[0].diff().abs().min() > 1.9 and x[1][2:8].diff().abs().max() < 0.1
    own = steady[1].crop.invert_points(steady[2])
    assert torch.allclose(own, points, atol=1e-3)
    assert torch.equal(pack.run("PasteBack", photo=photo, edited=steady[0], crop=steady[1])[0], photo)


@pytest.mark.parametrize(("missing", "pasted"), [("previous", True), ("pass through", False)])
def test_frames_without_a_face_keep_their_number(pack, people, missing, pasted):
    woman = people[0]
    frames = torch.cat([woman, torch.full_like(woman, 0.4), woman])
    image, crop, _, _ = pack.run("AlignFace", photo=frames, size=SIZE, missing=missing)
    assert len(image) == 3 and crop.photo.tolist() == [0, 1, 2]
    assert torch.equal(crop.crop.matrix[1], crop.crop.matrix[0])
    out = pack.run("PasteBack", photo=frames, edited=image * 0.5, crop=crop)[0]
    assert len(out) == 3 and torch.equal(out[1], frames[1]) is not pasted
    assert not torch.equal(out[0], frames[0])


class Counted:
    """The largest batch of pictures that a function was given, in pictures of the film's size."""

    def __init__(self, monkeypatch, owner, name, at):
        self.most, function = 0, getattr(owner, name)

        def counted(*args, **kwargs):
            self.most = max(self.most, len(args[at]))
            return function(*args, **kwargs)

        monkeypatch.setattr(owner, name, counted)


def test_a_long_film_is_in_work_by_a_few_frames(pack, head, scene, monkeypatch):
    """Only so many frames at a time are copied, moved and looked at, however long the film."""
    n, core, host = 10, pack.core, pack.nodes_module.estimate.host
    monkeypatch.setattr(host, "chunks", lambda n, height, width: host.slices(n, 4))
    monkeypatch.setattr(pack.nodes_module.estimate, "SHOWN", 5)
    photo, points = scene[0].expand(n, -1, -1, -1), scene[1].expand(n, -1, -1)
    moved = Counted(monkeypatch, host, "pictures", 0)
    watched = [
        Counted(monkeypatch, core.align.Crop, "apply", 1),
        Counted(monkeypatch, core.composite, "compose", 0),
        Counted(monkeypatch, core.overlay, "numbered", 0),
        Counted(monkeypatch, host, "mask_pictures", 0),
    ]
    fitted = Counted(monkeypatch, core.estimators.landmark_fit, "fit", 3)
    image, crop, at, overlay = pack.run(
        "AlignFace", photo=photo, size=SIZE, landmarks=points, mask=torch.ones(n, 9, 9)
    )
    assert len(image) == n and len(overlay) == 5
    out = pack.run("PasteBack", photo=photo, edited=image, crop=crop, mask=torch.ones(n, SIZE, SIZE))[0]
    assert torch.equal(out, photo)
    assert [w.most for w in watched] == [1, 1, 1, 1] and moved.most == 1
    assert len(pack.run("FitToLandmarks", face_model=head, image=image, landmarks=at)[0]) == n
    assert moved.most == fitted.most == 4
    late = photo.clone()
    late[n - 1, 0, 0, 0] = float("nan")  # told before the work begins
    pack.host.progress.clear()
    with pytest.raises(ValueError, match="'photo': picture 9 of the batch holds NaN"):
        pack.run("AlignFace", photo=late, landmarks=points)
    assert not pack.host.progress


def test_unknown_modes_and_unfit_numbers_are_named(pack, scene, face):
    given = {"photo": scene[0], "edited": face[0], "crop": face[1]}
    for change, message in (
        ({"mode": "blend"}, "'mode' is ratio or difference or replace, not 'blend'"),
        ({"photo": scene[0].expand(3, -1, -1, -1)}, "'photo' holds 3 pictures, but 'edited' 1"),
        ({"edited": face[0][:, :, :40]}, "'edited' is 40 x 64 pixels, an aligned face is square"),
        ({"photo": scene[0].expand(2, -1, -1, -1)}, "but 'edited' 1: give 1$"),
        ({"photo": scene[0][:, :90]}, "'photo' is 128 x 90 pixels, Align Face had 128 x 96"),
        ({"before": face[0].expand(2, -1, -1, -1)}, "'before' holds 2 pictures or faces, but 1 is needed$"),
        ({"before": face[0][:, :40, :40]}, "'before' is 40 x 40 pixels, 'edited' 64 x 64"),
        ({"motion": torch.zeros(1, SIZE, SIZE, 2)}, "'motion' needs 'before'"),
    ):
        with pytest.raises(ValueError, match=message):
            pack.run("PasteBack", **{**given, **change})
    for change, message in (
        ({"order": "nearest"}, "'order' is one of largest, .*, not 'nearest'"),
        ({"faces": "some"}, "'faces' is one of one, all, not 'some'"),
        ({"missing": "ignore"}, "'missing' is one of error, .*, not 'ignore'"),
        ({"mask": torch.ones(2, 4, 4)}, "'mask' holds 2"),
    ):
        for landmarks in (None, scene[1]):
            with pytest.raises(ValueError, match=message):
                pack.run("AlignFace", photo=scene[0], landmarks=landmarks, **change)


def test_the_faces_of_given_landmarks_are_chosen_like_those_found(pack, people):
    """By order, index, mask and box, whether a tensor or a face mesh brings them."""
    both, wide = people[2], people[0].shape[2]
    found = pack.run("AlignFace", photo=both, size=SIZE, order="left to right", faces="all")
    image, points = found[0], found[1].crop.invert_points(found[2])
    mask = torch.zeros(1, 10, 10)
    mask[:, :, 5:] = 1
    right = {"x": wide + 20, "y": 10, "width": 200, "height": 250}
    order = {"order": "left to right"}
    given = {"frames": [[{"landmarks_xy": p.numpy()} for p in points.flip(0)]]}
    for landmarks in (points.flip(0), given):

        def run(landmarks=landmarks, **how):
            return pack.run("AlignFace", photo=both, size=SIZE, landmarks=landmarks, **how)[0]

        for how, which in (
            ({**order, "index": 1}, [1]), (order, [0]), ({**order, "faces": "all"}, [0, 1]),
            ({"mask": mask}, [1]), ({"box": right}, [1]),
        ):  # fmt: skip
            torch.testing.assert_close(run(**how), image[which], atol=2e-3, rtol=0)
        with pytest.raises(ValueError, match="'photo': the picture has 2 faces, there is no face number 2"):
            run(index=2)
        with pytest.raises(ValueError, match="'photo': .*face number 0 inside the mask does not exist"):
            run(mask=torch.zeros(1, 9, 9))


def test_a_fit_takes_all_landmarks_in_their_order(pack, head, people):
    """One picture, several faces: 'order' and 'index' do not count, but they are looked at."""
    both = people[2]
    found = pack.run("AlignFace", photo=both, size=SIZE, order="left to right", faces="all")
    points = found[1].crop.invert_points(found[2]).flip(0)
    how = {"face_model": head, "image": both, "landmarks": points}
    code = pack.run("FitToLandmarks", index=1, order="top to bottom", **how)[0]
    at = pack.core.buffers.to_image(torch.zeros(2, 1, 3), code)[:, 0, 0]
    assert len(code) == 2 and at[0] > at[1]
    with pytest.raises(ValueError, match="'order' is one of"):
        pack.run("FitToLandmarks", order="best", **how)


def finder(pack):
    return pack.nodes_module.host.face_finder()


def test_the_face_finder_is_loaded_where_faces_are_sought_and_only_there(pack, head, scene, people):
    """scene's landmarks are known; one of its boxes is not matched by them."""

    def loads(node, **inputs):
        pack.host.loaded.clear()
        pack.run(node, **inputs)
        return pack.host.loaded.count(finder(pack))

    photo, points = scene
    woman = people[0]
    image, _, at, _ = pack.run("AlignFace", photo=woman, size=SIZE)
    box = [20.0, 20.0, 90.0, 90.0]
    assert loads("AlignFace", photo=woman) == 1
    assert loads("AlignFace", photo=photo, landmarks=points) == 0
    assert loads("AlignFace", photo=photo, landmarks=points, box=box) == 1
    assert loads("FitToLandmarks", face_model=head, image=woman) == 1
    assert loads("FitToLandmarks", face_model=head, image=image, landmarks=at) == 0
    assert loads("LightFromPhoto", face_model=head, photo=woman) == 1


class Crops(torch.nn.Module):
    """A network in DECA's place that says 0 to every crop."""

    def __init__(self):
        super().__init__()
        self.layers = torch.nn.Sequential(torch.nn.Linear(3, 236))
        torch.nn.init.zeros_(self.layers[0].weight)

    def forward(self, x):
        return self.layers(x.mean((2, 3)))


def with_deca(pack, head, monkeypatch):
    """A FACE_MODEL whose encoder is called like DECA and whose answer is the head's mean face."""
    networks, deca = pack.nodes_module.host.networks, pack.core.estimators.deca
    monkeypatch.setattr(networks, "DECA", Crops)
    encoder = pack.nodes_module.host.estimator(Crops())

    def encode(net, image, landmarks):
        assert net(image).shape == (len(landmarks), 236)
        return head.mean_code(len(landmarks), tuple(image.shape[2:]))

    monkeypatch.setattr(deca, "encode", encode)
    return pack.core.heads.FaceModel(head, encoder)


def test_deca_and_the_face_finder_are_there_when_they_are_asked(pack, head, people, monkeypatch):
    """Each load may drive away all that it did not ask for."""
    model = with_deca(pack, head, monkeypatch)
    parts = (finder(pack), model.encoder)
    for node, image in (("DECAEncode", "image"), ("LightFromPhoto", "photo")):
        with host_double.only_what_was_loaded(pack.host, *parts) as called:
            pack.run(node, face_model=model, **{image: people[0].repeat(2, 1, 1, 1)})
        assert called == list(parts)  # first one, then the other
    pack.host.resident = []
    with host_double.only_what_was_loaded(pack.host, *parts), pytest.raises(AssertionError, match="Crops is"):
        model.encoder.model(torch.zeros(1, 3, 4, 4))


@pytest.mark.parametrize("node", ["AlignFace", "FitToLandmarks", "LightFromPhoto"])
def test_the_search_for_faces_can_be_stopped_and_shows_on_the_bar(pack, head, people, monkeypatch, node):
    landmarks = pack.core.estimators.landmarks
    sought, seek = [], landmarks.find_faces
    monkeypatch.setattr(landmarks, "find_faces", lambda *a, **k: sought.append(1) or seek(*a, **k))
    given = {"AlignFace": {}, "FitToLandmarks": {"face_model": head}, "LightFromPhoto": {"face_model": head}}
    photos = {"image" if node == "FitToLandmarks" else "photo": people[0].repeat(3, 1, 1, 1)}
    pack.host.interrupt_after = 2
    with pytest.raises(host_double.Interrupted):
        pack.run(node, **given[node], **photos)
    assert len(sought) == 3 and len(pack.host.progress) == 2
    pack.host.interrupt_after = None
    pack.host.progress.clear()
    pack.run(node, **given[node], **photos)
    done, total, _ = pack.host.progress[-1]
    assert [p[0] for p in pack.host.progress] == list(range(1, total + 1)) and done == total >= 4


def test_outside_is_the_share_of_landmarks_beyond_the_edges(pack):
    outside = pack.core.estimators.landmarks.outside
    points = torch.tensor(
        [[[-0.6, 3.0], [-0.4, 3.0], [9.4, 4.4], [9.6, 2.0]], [[0, 0], [9, 4], [5, 5], [5, 4]]]
    )
    assert outside(points.float(), (5, 10)).tolist() == [0.5, 0.25]
