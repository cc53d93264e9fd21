"""Films on the canvas: Smooth Faces, Video Frame, Relight Video, and long batches in the other nodes.

The film's file is stood in for; tests/test_host_video.py has real ones.
"""

from __future__ import annotations

import types
from fractions import Fraction

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode

from tests import host_double
from tests.node_pack import *  # noqa: F403 the fixtures
from tests.node_pack import ROOT, SIZE
from tests.test_nodes_relight import relit  # noqa: F401 the fixture

STEPS = {"preset": "custom", "steps": 2}


class Film:
    """Frames in memory in the place of a file; says more of them than there are, as headers do."""

    rate, frame_bytes = Fraction(25), 1000

    def __init__(self, frames):
        self.kept, self.count, self.passes = frames, len(frames) + 3, 0

    def frames(self):
        self.passes += 1
        return iter(self.kept)

    def frame(self, i, step):
        if not self.kept:
            raise ValueError("'video' has no frames")
        step()
        return self.kept[min(i, len(self.kept) - 1)]


@pytest.fixture(scope="module")
def photo():
    """A face of some 60 px in 128 x 160, uint8."""
    image = Image.open(ROOT / "rig_core" / "assets" / "astronaut.jpg").convert("RGB")
    image = image.crop((110, 40, 350, 232)).resize((160, 128), Image.Resampling.LANCZOS)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)[None]


@pytest.fixture
def films(pack, monkeypatch):
    """`write_video` gives back the frames and nothing is opened."""
    host = pack.nodes_module.host
    monkeypatch.setattr(host, "Film", lambda video, name: video)
    monkeypatch.setattr(host, "write_video", lambda film, frames, crf: (torch.cat(list(frames)), "new.mp4"))


@pytest.fixture(scope="module")
def given(pack, head, relit):  # noqa: F811
    return {
        "model": relit,
        "face_model": head,
        "identity_encoder": pack.run("LoadIdentityEncoder")[0],
        "shadow_estimator": pack.run("LoadShadowEstimator")[0],
        **STEPS,
    }


def test_smooth_faces_is_the_cores(pack, face):
    g = torch.Generator().manual_seed(0)
    code = face[3].expand(7)
    code = code.replace(**{k: getattr(code, k) + torch.randn(getattr(code, k).shape, generator=g) * 0.1
                           for k in ("shape", "exp", "pose", "light")})  # fmt: skip
    got, light = pack.run("SmoothFaces", face_code=code, frames=1.5)
    want = pack.core.motion.smooth_code(code, 1.5)
    assert all(torch.equal(v, getattr(got, k)) for k, v in vars(want).items() if isinstance(v, torch.Tensor))
    assert torch.equal(light, want.light) and torch.equal(got.shape[0], got.shape[6])
    alone = pack.run("SmoothFaces", face_code=code, frames=0.0, one_person=False)[0]
    assert torch.equal(alone.exp, code.exp) and torch.equal(alone.shape, code.shape)


def test_a_film_that_stands_still_is_the_photo_on_the_canvas(pack, head, given, photo, films):
    light = (head.light_mean + head.light_std)[None]
    film = Film([photo] * 3)
    got, n, report = pack.run("RelightVideo", video=film, light=light, shadow_change=1.0, **given)
    assert n == 3 and film.passes == 3 and report == "3 frames at 25 a second, 1 shot"
    assert pack.host.previews[-1] == {"filename": "new.mp4", "type": "temp"}
    # the same photo by the other nodes
    image = photo.permute(0, 2, 3, 1) / 255
    aligned, crop, points, _ = pack.run("AlignFace", photo=image, size=SIZE)
    code = pack.run("FitToLandmarks", face_model=head, image=aligned, landmarks=points)[0]
    told = {"model": given["model"], "face_model": head, "face_code": code, "image": aligned}
    told["embed"] = pack.run("ArcFaceEmbed", identity_encoder=given["identity_encoder"], image=aligned)[0]
    told["shadow"] = pack.run("ShadowScalar", shadow_estimator=given["shadow_estimator"], image=aligned)[0]
    own, matte = pack.run("DiFaReliCondition", **told)
    new = pack.run("DiFaReliCondition", light=light, shadow_change=1.0, **told)[0]
    noise, before = pack.run(
        "DDIMInvert", model=given["model"], conditioning=own, image=aligned, match_means=True, **STEPS
    )
    edited = pack.run("ConditionedSample", model=given["model"], conditioning=new, noise=noise)[0]
    want = pack.run("PasteBack", photo=image, edited=edited, crop=crop, before=before, mask=matte)[0]
    assert (want - image).abs().max() > 0.03
    for frame in got.permute(0, 2, 3, 1):
        off = (frame - want[0]).abs()  # three faces are fitted at once there, which rounds differently
        assert (off < 1e-3).float().mean() > 0.999 and off.max() < 0.03


def test_no_edit_gaps_and_previews(pack, given, photo, films):
    frames = [photo, torch.full_like(photo, 90), photo.roll(2, 3), photo.roll(3, 3), torch.zeros_like(photo)]
    got, n, report = pack.run("RelightVideo", video=Film(frames), **given)
    assert n == 5 and torch.equal((got * 255).round().byte(), torch.cat(frames))
    assert "2 without the face, passed through: 1, 4 (counted from 0)" in report
    done, total, preview = pack.host.progress[-1]
    assert done == 10  # two passes; nothing to relight
    pack.host.progress.clear()
    got, *_ = pack.run("RelightVideo", video=Film(frames), shadow_change=3.0, **given)
    done, total, preview = pack.host.progress[-1]
    assert done == total == 10 + 6 and preview[0] == "JPEG"  # one part of five frames, three runs of two
    assert torch.equal((got[[1, 4]] * 255).round().byte(), torch.cat(frames)[[1, 4]])
    no_face = pack.core.estimators.landmarks.NoFaceError
    with pytest.raises(no_face, match="frame 1 of the video"):
        pack.run("RelightVideo", video=Film(frames), missing="error", **given)


def test_a_stop_takes_effect_within_a_step(pack, given, photo, films):
    pack.host.interrupt_after = 3 + 3 + 1  # two passes, then in the first step
    with pytest.raises(host_double.Interrupted):
        pack.run("RelightVideo", video=Film([photo] * 3), shadow_change=3.0, **given)
    assert len(pack.host.progress) == 7


def test_wrong_values_are_named_before_anything_runs(pack, head, given, model, photo, films):
    def refuse(message, **wrong):
        with pytest.raises(ValueError, match=message):
            pack.run("RelightVideo", **{"video": Film([photo]), **given, **wrong})
        assert not pack.host.progress

    refuse("'missing' is one of error, previous", missing="sometimes")
    refuse("'order' is one of", order="best")
    refuse("'preset' is one of", preset="as inverted")
    refuse("'model' is not a DiFaReli", model=model)
    refuse("'identity_encoder' is not from", identity_encoder=given["shadow_estimator"])
    refuse("light' must be", light=torch.zeros(1, 9))


def test_one_frame_of_a_film(pack, photo, films):
    film = Film([photo, 255 - photo])
    image, count = pack.run("VideoFrame", video=film, frame=1)
    assert (
        torch.equal((image * 255).round().byte(), (255 - photo).permute(0, 2, 3, 1)) and count == film.count
    )
    assert torch.equal(pack.run("VideoFrame", video=film, frame=9)[0], image) and not film.passes


def test_only_the_wanted_frame_is_made(pack, monkeypatch):
    """Of an IMAGE held as VIDEO; a file's in tests/test_host_video.py."""
    from comfy_api.latest import InputImpl

    def held(n, channels=3):
        images = torch.rand(n, 40, 40, channels, generator=torch.Generator().manual_seed(0))
        parts = types.SimpleNamespace(images=images, audio=None, frame_rate=25)
        return images, InputImpl.VideoFromComponents(parts)

    host = pack.nodes_module.host.video
    made, picture = [], host._picture
    monkeypatch.setattr(host, "_picture", lambda f: made.append(1) or picture(f))
    images, video = held(50)
    for frame, want in ((31, 31), (70, 49)):
        pack.host.progress.clear()
        got, count = pack.run("VideoFrame", video=video, frame=frame)
        assert torch.equal(got[0], images[want]) and count == 50
        assert len(pack.host.progress) == want + 1
    assert len(made) == 2
    grey, video = held(2, 1)
    assert torch.equal(pack.run("VideoFrame", video=video, frame=1)[0][0], grey[1].expand(-1, -1, 3))
    with pytest.raises(ValueError, match="'video' has no frames"):
        pack.run("VideoFrame", video=held(0)[1])


def test_sound_without_times_follows_itself_and_a_cut_takes_what_is_in_it(pack):
    def frame(time, samples=800):
        return types.SimpleNamespace(time=time, samples=samples, sample_rate=8000)

    heard = pack.nodes_module.host.video._heard
    frames = [frame(None), frame(None), frame(0.5), frame(None)]
    assert [t for t, _ in heard(iter(frames), 0, 9.0)] == pytest.approx([0.0, 0.1, 0.5, 0.6])
    cut = list(heard(iter(frames), 0.05, 0.6))
    assert [t for t, _ in cut] == pytest.approx([0.05, 0.45]) and [f for _, f in cut] == frames[1:3]


def test_every_pass_over_a_film_has_its_networks_on_the_device(pack, head, given, photo, films):
    """Each load may drive away all that it did not ask for, as it is with little memory."""
    host, checkpoints = pack.nodes_module.host, pack.core.estimators.parsing
    with torch.inference_mode(False):
        parser = host.estimator(checkpoints.BiSeNet().eval())
    kept = [given["identity_encoder"], host.face_finder(), given["shadow_estimator"], given["model"], parser]
    with host_double.only_what_was_loaded(pack.host, *kept) as called:
        pack.run("RelightVideo", video=Film([photo]), shadow_change=3.0, face_parser=parser, **given)
    identity, finder, shadow, model, _ = kept
    assert called == [identity, finder, identity, shadow, parser, model]


# long batches


class InWork(TorchDispatchMode):
    """Notes how many pictures new tensors of pictures hold; mere room for results does not count."""

    def __init__(self):
        super().__init__()
        self.batches = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and out.ndim == 4 and "empty" not in str(func):
            old = [a for a in args if isinstance(a, torch.Tensor)]
            if not any(a.untyped_storage().data_ptr() == out.untyped_storage().data_ptr() for a in old):
                self.batches.add(len(out))
        return out


@pytest.fixture
def by_two(pack, monkeypatch):
    """Chunks of two pictures everywhere."""
    host = pack.nodes_module.host
    for place in (host, host.images):
        monkeypatch.setattr(place, "chunks", lambda n, *_: host.slices(n, 2))
    monkeypatch.setattr(host, "batches", lambda model, n, *_: host.slices(n, 2))


def test_no_more_than_a_chunk_is_in_work(pack, head, given, model, relit, face, by_two):  # noqa: F811
    n = 7  # the length of nothing else
    g = torch.Generator().manual_seed(0)
    images = (face[0] + 0.05 * torch.rand(n, SIZE, SIZE, 3, generator=g)).clamp(0, 1)
    codes = face[3].expand(n)
    with InWork() as seen:
        embed = pack.run("ArcFaceEmbed", identity_encoder=given["identity_encoder"], image=images)[0]
        shadows = pack.run("ShadowScalar", shadow_estimator=given["shadow_estimator"], image=images)[0]
        told = {"face_code": codes, "image": images, "embed": embed, "shadow": shadows}
        own, matte = pack.run("DiFaReliCondition", model=relit, face_model=head, **told)
        noise, before = pack.run("DDIMInvert", model=relit, conditioning=own, image=images, **STEPS)
        painted = pack.run("ConditionedSample", model=relit, conditioning=own, noise=noise)[0]
    assert len(embed) == len(shadows) == len(matte) == len(before) == len(painted) == n
    assert 2 in seen.batches and n not in seen.batches
    buffers = pack.run("RenderBuffers", face_model=head, face_code=codes)[0]
    with InWork() as seen:
        told = pack.run("DiffusionRigCondition", model=model, image=images, buffers=buffers)[0]
        pack.run("ConditionedSample", model=model, conditioning=told, **STEPS)
    assert 2 in seen.batches and n not in seen.batches
    assert told[0][1]["rig_physical"].shape == (n, 9, SIZE, SIZE)


def test_the_watch_sees_a_whole_batch():
    with InWork() as seen:
        torch.zeros(7, 3, 4, 4) + 1
    assert seen.batches == {7}


def test_a_bad_picture_late_in_a_batch_is_found_first(pack, given, face, by_two):
    images = face[0].repeat(7, 1, 1, 1)
    images[5, 3, 3] = float("nan")
    with pytest.raises(ValueError, match="'image': picture 5 of the batch holds NaN"):
        pack.run("ArcFaceEmbed", identity_encoder=given["identity_encoder"], image=images)
    assert not pack.host.progress


def test_a_hundred_frames_are_a_hundred_pictures(pack, relit):  # noqa: F811
    how = {"preset": "custom", "steps": 1}
    g = torch.Generator().manual_seed(0)
    images = torch.nn.functional.interpolate(
        torch.rand(100, 3, 8, 8, generator=g), (SIZE, SIZE), mode="bicubic"
    )
    images = images.clamp(0, 1).permute(0, 2, 3, 1).contiguous()
    spatial, vector = torch.rand(100, 6, SIZE, SIZE, generator=g), torch.randn(100, 241, generator=g)
    kind, make = pack.core.denoisers.relight.DiFaReli, pack.nodes_module.sockets.conditioning

    def run(rows):
        told = make(kind, spatial[rows], vector[rows])
        noise, before = pack.run(
            "DDIMInvert", model=relit, conditioning=told, image=images[rows], paint_back=False, **how
        )
        edited = make(kind, spatial[rows].flip(3), vector[rows])
        return before, pack.run("ConditionedSample", model=relit, conditioning=edited, noise=noise)[0]

    whole = run(slice(None))
    for i in (0, 15, 16, 57, 99):
        for all_of_them, alone in zip(whole, run(slice(i, i + 1)), strict=True):
            torch.testing.assert_close(all_of_them[i : i + 1], alone, atol=5e-3, rtol=0)


def test_a_batch_is_checked_where_it_lies(pack, monkeypatch):
    """Nothing of it is moved or copied as a whole to look for NaN."""
    host = pack.nodes_module.host
    monkeypatch.setattr(host.images, "device", None)
    images = torch.rand(7, 40, 50, 4)
    with InWork() as seen:
        assert host.check_pictures(images, "image") == (7, 40, 50)
    assert 7 not in seen.batches
    images[6, 0, 0, 0] = float("nan")
    with pytest.raises(ValueError, match="'image': picture 6 of the batch holds NaN"):
        host.check_pictures(images, "image")
