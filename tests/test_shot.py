"""A film relit: the face through the frames, steady answers, finished frames in bounded memory."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from rig_core import align, checkpoints, composite, diffusion, pipeline, samplers, shot
from rig_core.denoisers import relight as r
from rig_core.estimators import identity, landmarks, shadow

ROOT = Path(__file__).resolve().parents[1]
SIZE, STEPS = 64, "quad3"


@pytest.fixture(scope="module")
def head():
    return checkpoints.load_head()


@pytest.fixture(scope="module")
def networks():
    """Identity encoder, shadow estimator, and a small DiFaReli of random weights."""
    torch.manual_seed(0)
    sizes = {"num_heads": 1, "norm_groups": 8, "cond_dim": 241, "proj_dim": 16}
    net = r.start_open(r.DiFaReli(r.RelightConfig(SIZE, 32, (1, 1, 2), 1, (16,), **sizes))).eval()
    torch.nn.init.normal_(net.ImgCond.out[2].weight, std=0.02)
    for block in net.ImgCond.res_blocks:  # these start at 0, and the vector would not show
        torch.nn.init.normal_(block.out_layers[3].weight, std=0.1)
    return checkpoints.load_identity(), checkpoints.load_shadow(), net


@pytest.fixture(scope="module")
def photo():
    """A face of some 60 px in 128 x 160, uint8."""
    image = Image.open(ROOT / "rig_core" / "assets" / "astronaut.jpg").convert("RGB")
    image = image.crop((110, 40, 350, 232)).resize((160, 128), Image.Resampling.LANCZOS)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)[None]


@pytest.fixture(scope="module")
def moving(photo):
    """Six frames in which the face wanders, and in the fourth there is none."""
    frames = [photo.roll((i, 2 * i), (2, 3)) for i in range(6)]
    frames[3] = torch.full_like(photo, 90)
    return frames


@pytest.fixture(scope="module")
def tracked(moving):
    return shot.track(moving, missing="pass through")


@pytest.fixture(scope="module")
def known(moving, tracked, head, networks):
    return shot.survey(moving, tracked, head, *networks[:2], SIZE, batch=2)


def lights(head, n=1):
    z = torch.linspace(-1, 1, n)[:, None, None] if n > 1 else 1.0
    return head.light_mean[None] + z * head.light_std[None]


def relit(frames, known, head, networks, **how):
    return list(shot.relight(frames, known, networks[2], head, steps=STEPS, **how))


def test_the_face_is_followed_and_its_absence_handled(moving, tracked, photo):
    assert tracked.found.tolist() == [True, True, True, False, True, True] and tracked.starts[0] == 0
    still = tracked.points[0]
    for i in (1, 2, 4, 5):
        moved = (tracked.points[i] - still).mean(0)
        torch.testing.assert_close(moved, torch.tensor([2.0 * i, 1.0 * i]), atol=0.7, rtol=0)
    assert torch.equal(tracked.points[3], tracked.points[2])
    filled = shot.track(moving[3:5], missing="previous")
    assert filled.found.all() and torch.equal(filled.points[0], filled.points[1])
    with pytest.raises(landmarks.NoFaceError, match="frame 3 of the video.*'previous' or 'pass through'"):
        shot.track(moving)
    with pytest.raises(landmarks.NoFaceError, match="no frame of the video shows a face"):
        shot.track(moving[3:4], missing="previous")
    with pytest.raises(ValueError, match="no frames"):
        shot.track([])
    with pytest.raises(ValueError, match="frame 1 is of"):
        shot.track([photo, photo[..., :100]])
    with pytest.raises(ValueError, match="missing one of"):
        shot.track(moving, missing="perhaps")


def test_it_stays_with_one_person(photo):
    """Two faces, and the other one becomes the larger: 'largest' of each frame by itself would jump."""

    def frame(left, right):
        sides = [
            F.interpolate(photo[..., 20:130].float(), scale_factor=s).round().byte() for s in (left, right)
        ]
        return torch.cat([F.pad(x, (0, 120 - x.shape[3], 0, 140 - x.shape[2])) for x in sides], 3)

    frames = [frame(1.0, 0.8), frame(0.95, 0.9), frame(0.9, 1.0)]
    got = shot.track(frames)
    assert (got.points[:, :, 0].mean(1) < 120).all() and got.starts == (0,)
    assert shot.track(frames[-1:]).points[0, :, 0].mean() > 120
    assert shot.track(frames, order="left to right", index=1).points[:, :, 0].mean(1).min() > 120


def test_survey_is_the_estimators_and_steady(moving, tracked, known, head, networks):
    recognise, judge, _ = networks
    assert known.rows.tolist() == [0, 1, 2, -1, 3, 4]
    crop = align.ffhq_crop(tracked.points[4:5], SIZE)
    image = crop.apply(align.check_image(moving[4])).clamp(0, 1)
    code = pipeline.encode(head, image, crop.apply_points(tracked.points[4:5]))
    torch.testing.assert_close(known.crop.matrix[3:4], crop.matrix, atol=1e-5, rtol=1e-5)
    # the fit's normal equations are rounded differently in a batch of two
    torch.testing.assert_close(known.code.light[3:4], code.light, atol=1e-2, rtol=0)
    torch.testing.assert_close(known.code.cam[3:4], code.cam, atol=1e-3, rtol=1e-3)
    # a person, and the shadows on it, are those of the shot
    ids = torch.cat([identity.embed(recognise, x) for x in aligned(moving, tracked)])
    torch.testing.assert_close(known.embed[:1], ids[:3].mean(0, keepdim=True), atol=1e-4, rtol=1e-3)
    assert tracked.starts == (0, 3, 4)  # the grey frame is a shot of its own
    amounts = torch.cat([shadow.scalar(judge, x) for x in aligned(moving, tracked)])
    torch.testing.assert_close(known.shadow[3:], amounts[3:].mean(0, keepdim=True).expand(2, 1))
    assert torch.equal(known.code.shape[0], known.code.shape[2])


def aligned(frames, tracked):
    crop = align.ffhq_crop(tracked.points, SIZE)
    known = [i for i in range(len(frames)) if tracked.found[i]]
    return [crop[i].apply(align.check_image(frames[i])).clamp(0, 1) for i in known]


def test_smoothing_steadies_the_place_and_the_light(photo, head, networks):
    g = torch.Generator().manual_seed(0)
    noisy = [(photo + 12 * torch.randn(photo.shape, generator=g)).clamp(0, 255).byte() for _ in range(6)]
    t = shot.track(noisy)
    plain, steady = (shot.survey(noisy, t, head, *networks[:2], SIZE, s) for s in (0.0, 2.0))
    for field in ("light", "exp"):
        a, b = (getattr(v.code, field).var(0).sum() for v in (plain, steady))
        assert b < 0.35 * a
    assert steady.crop.matrix.var(0).sum() < 0.35 * plain.crop.matrix.var(0).sum()


def test_a_film_that_stands_still_is_the_photo(photo, head, networks):
    recognise, judge, net = networks
    frames = [photo] * 3
    t = shot.track(frames)
    new = lights(head)
    got, pairs = (
        relit(
            frames, shot.survey(frames, t, head, recognise, judge, SIZE, 2.0, batch=n), head, networks,
            light=new, shadow_change=1.0, batch=n,
        )
        for n in (1, 2)
    )  # fmt: skip
    # the photo by the functions of the pipeline, as the nodes call them
    x = align.check_image(photo)
    crop = align.ffhq_crop(t.points[:1], SIZE)
    image = crop.apply(x).clamp(0, 1)
    code = pipeline.encode(head, image, crop.apply_points(t.points[:1]))
    portrait = pipeline.Portrait(image, crop, code)
    about = pipeline.describe(head, portrait, recognise, judge)
    noise = pipeline.to_noise(net, head, portrait, about, STEPS)
    own = pipeline.relight_condition(net, head, portrait, about, code.light)
    schedule = diffusion.respace(diffusion.linear_schedule(), STEPS)
    before = samplers.sample(net, noise.x_T, own, schedule, noise.solver, correct=noise.shift)
    edit = pipeline.relight(net, head, portrait, about, new, about.shadow + 1.0, noise)
    want = composite.paste_back(x, edit.image, crop, edit.mask, (before / 2 + 0.5).clamp(0, 1))
    assert (want - x).abs().max() > 0.05  # the edit shows
    for frame in got:
        torch.testing.assert_close(frame, want, atol=1e-3, rtol=0)
    for frame in pairs:  # rounded differently, which the inversion may amplify at single pixels
        assert ((frame - want).abs() < 1e-3).float().mean() > 0.999 and (frame - want).abs().max() < 0.03


def test_frames_come_out_in_order_and_in_full(moving, tracked, known, head, networks):
    new = lights(head, 2)
    whole = relit(moving, known, head, networks, light=new, batch=8)
    parts = relit(iter(moving), known, head, networks, light=new, batch=1)
    assert len(whole) == len(parts) == len(moving)
    for a, b, given in zip(whole, parts, moving, strict=True):
        assert ((a - b).abs() < 1e-3).float().mean() > 0.999 and (a - b).abs().max() < 0.03
        assert a.shape == given.shape
    assert torch.equal(whole[3], align.check_image(moving[3]))  # no face: passed through
    changed = [float((a - align.check_image(x)).abs().max()) for a, x in zip(whole, moving, strict=True)]
    assert min(changed[:3] + changed[4:]) > 0.01


def test_without_an_edit_every_frame_comes_back_bit_for_bit(moving, known, head, networks):
    for frame, given in zip(relit(moving, known, head, networks), moving, strict=True):
        assert torch.equal((frame * 255).round().byte(), given)
    # its own light by hand, through the networks: also the very photo
    one = moving[:1]
    alone = shot.Survey(known.rows[:1], known.crop[0], known.code[0], known.embed[:1], known.shadow[:1])
    got = relit(one, alone, head, networks, light=known.code.light[:1])
    assert torch.equal((got[0] * 255).round().byte(), one[0])


def test_a_parser_says_where_the_edit_may_show(photo, tracked, known, head, networks, monkeypatch):
    monkeypatch.setattr(shot.parsing, "parse", lambda parser, image: torch.full((1, SIZE, SIZE), parser))
    head_label, background = 1, 0
    new = lights(head)
    bare, whole = (
        relit([photo], known, head, networks, light=new, parser=label)[0]
        for label in (background, head_label)
    )
    assert torch.equal((bare * 255).round().byte(), photo)
    assert (whole - bare).abs().max() > 0.02


def test_lights_are_spread_over_the_film(head):
    two = lights(head, 2)
    five = shot.spread(two, 5)
    torch.testing.assert_close(five[2], two.mean(0))
    assert torch.equal(five[0], two[0]) and torch.allclose(five[-1], two[1])
    assert torch.equal(shot.spread(two, 2), two)
    assert torch.equal(shot.spread(two[:1], 3), two[:1].expand(3, 9, 3))
    many = lights(head, 7)
    torch.testing.assert_close(shot.spread(many, 7), many)
    torch.testing.assert_close(shot.spread(many, 4), many[::2])
    assert shot.spread(many, 1).shape == (1, 9, 3)


def test_every_step_can_stop_it(photo, head, networks, known):
    class Stop(Exception):
        pass

    calls = []

    def callback(info):
        calls.append(info["i"])
        if len(calls) == 4:
            raise Stop

    with pytest.raises(Stop):
        list(shot.relight([photo], known, networks[2], head, lights(head), steps=STEPS, callback=callback))
    assert len(calls) == 4


MEMORY = """
import resource, sys, torch
from rig_core import align, composite, shot
n = int(sys.argv[1])
torch.set_num_threads(1)
frame = torch.randint(0, 256, (1, 3, 200, 240), generator=torch.Generator().manual_seed(0)).byte()
frames = lambda: (frame.roll(i % 50, 3) for i in range(n))
points = torch.rand(1, 68, 2) * 60 + 40
points[:, 36:42], points[:, 42:48] = torch.tensor([60.0, 60.0]), torch.tensor([100.0, 60.0])
points[:, 48], points[:, 54] = torch.tensor([65.0, 100.0]), torch.tensor([95.0, 100.0])
crop = align.ffhq_crop(points, 64)
rows = torch.arange(n)
for i, x in shot._faces(frames(), rows, crop.expand(n), None):
    photo = align.check_image(frame)
    composite.paste_back(photo, (x * 1.05).clamp(0, 1), crop, None, x)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def test_memory_does_not_grow_with_the_film():
    def peak(n):
        run = [sys.executable, "-c", MEMORY, str(n)]
        out = subprocess.run(run, capture_output=True, text=True, check=True, cwd=ROOT, timeout=170)
        return int(out.stdout) / 1024

    short, long = peak(10), peak(110)
    assert long < short + 20, (short, long)  # MB; the 100 frames more are 58 MB as floats
