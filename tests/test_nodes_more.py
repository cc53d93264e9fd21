"""Light from elsewhere, readable files, Transfer and its kin, Buffers From Images."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch

from tests.node_pack import *  # noqa: F403 the fixtures
from tests.node_pack import SIZE


@pytest.fixture(scope="module")
def code(head):
    """A face of a picture of 64 px, turned a little, its mouth ajar, under the mean light."""
    mean = head.mean_code(1, SIZE)
    pose, exp = mean.pose.clone(), mean.exp.clone()
    pose[:, :4], exp[:, :8] = torch.tensor([0.05, -0.1, 0.02, 0.1]), 0.3
    return mean.replace(pose=pose, exp=exp)


def panorama(height=64):
    """Dim, with a bright disc a quarter to the right of the middle; [1,h,2h,3]."""
    image = torch.full((1, height, 2 * height, 3), 0.1)
    image[:, height * 3 // 8 : height // 2, height * 3 // 2 - 3 : height * 3 // 2 + 3] = 30.0
    return image


def test_light_of_a_panorama(pack, head, code, monkeypatch):
    side = pack.core.sh.direction
    light, ball = pack.run("LightFromEnvironmentMap", panorama=panorama(), encoding="linear")
    assert light.shape == (1, 9, 3) and side(light)[0, 0] < -0.9  # the sitter's right is the picture's left
    assert ball.shape == (1, 128, 128, 3) and ball[0, 64, 10].mean() > 3 * ball[0, 64, 118].mean()
    behind = pack.run(
        "LightFromEnvironmentMap", panorama=panorama(), encoding="linear", view="from behind the camera"
    )[0]
    assert side(behind)[0, 0] > 0.9
    turned = pack.run("LightFromEnvironmentMap", panorama=panorama(), encoding="linear", yaw=90.0)[0]
    assert side(turned)[0, 2] > 0.9
    own = {"face_model": head, "face_code": code}
    fitted, _ = pack.run("LightFromEnvironmentMap", panorama=panorama(), encoding="linear", **own)
    assert ((fitted - head.light_mean).abs() <= 2.5 * head.light_std + 1e-5).all()
    assert side(fitted, head.light_mean)[0, 0] < -0.7
    film, balls = pack.run("LightFromEnvironmentMap", panorama=panorama().repeat(3, 1, 1, 1), **own)
    assert len(film) == len(balls) == 3
    real, sizes = pack.core.environment.panorama_light, []
    monkeypatch.setattr(
        pack.core.environment, "panorama_light", lambda x, *a: sizes.append(len(x)) or real(x, *a)
    )
    several = torch.cat([panorama(), panorama().flip(2)])
    pair = pack.run("LightFromEnvironmentMap", panorama=several, encoding="linear")[0]
    assert torch.equal(pair[0], light[0]) and side(pair)[1, 0] > 0.9 and sizes == [1, 1]  # one at a time
    several[1, 5, 5] = float("inf")
    with pytest.raises(ValueError, match="'panorama' holds NaN or infinite"):
        pack.run("LightFromEnvironmentMap", panorama=several)
    grey = torch.cat([panorama()[..., :1], panorama()[..., :1] * 0 + 1], -1)
    with pytest.raises(ValueError, match="'panorama' has 2 channels"):
        pack.run("LightFromEnvironmentMap", panorama=grey)
    with pytest.raises(ValueError, match="'panorama': a panorama is twice as wide"):
        pack.run("LightFromEnvironmentMap", panorama=panorama()[:, :, :64])
    with pytest.raises(ValueError, match="'face_model' is missing"):
        pack.run("LightFromEnvironmentMap", panorama=panorama(), face_code=code)
    with pytest.raises(ValueError, match="'encoding' is one of sRGB, linear, not 'x'"):
        pack.run("LightFromEnvironmentMap", panorama=panorama(), encoding="x")


def test_presets(pack, head, code):
    known = pack.core.light_prior.PRESETS
    own = {"face_model": head, "face_code": code}
    every, balls = pack.run("LightPresets", preset="all", **own)
    assert len(every) == len(balls) == len(known)
    for i, name in enumerate(known):
        one = pack.run("LightPresets", preset=name, **own)[0]
        torch.testing.assert_close(one[0], every[i])
    right, left = (pack.run("LightPresets", preset="rembrandt", mirror=m, **own)[0] for m in (False, True))
    assert pack.core.sh.direction(right, head.light_mean)[0, 0] > 0.4
    assert pack.core.sh.direction(left, head.light_mean)[0, 0] < -0.4
    physical = pack.run("LightPresets", preset="rembrandt")[0]
    assert not torch.allclose(physical, right, atol=0.05)
    with pytest.raises(ValueError, match="'face_code' holds 2 faces"):
        pack.run("LightPresets", preset="all", face_model=head, face_code=code.expand(2))
    with pytest.raises(ValueError, match="'preset' is one of rembrandt"):
        pack.run("LightPresets", preset="noon")


def test_a_light_is_saved_counted_and_loaded(pack, code):
    light = torch.cat([code.light, code.light / 3])
    first = pack.run("SaveLight", light=light)[0]
    folder = pack.host.folder / "output" / "face_rig"
    assert (folder / "light_00001_.json").read_text() == first
    assert pack.host.texts[-1].startswith("output/face_rig/light_00001_.json\n")
    second = pack.run("SaveLight", light=light[:1])[0]
    assert (folder / "light_00001_.json").read_text() == first and second != first
    assert {p.name for p in folder.glob("light*")} == {"light_00001_.json", "light_00002_.json"}
    loaded, ball = pack.run("LoadLight", file="light_00001_.json [output]")
    assert torch.equal(loaded, light) and len(ball) == 2
    pasted, _ = pack.run("LoadLight", file="light_00001_.json [output]", text=second)
    assert torch.equal(pasted, light[:1])


def test_nothing_is_overwritten_when_the_counter_is_behind(pack, code, monkeypatch):
    pack.run("SaveLight", light=code.light, filename_prefix="race/light")
    path = pack.host.folder / "output" / "race" / "light_00001_.json"
    path.write_text("mine")
    paths = pack.nodes_module.host.texts.folder_paths
    same = paths.get_save_image_path("race/other", paths.get_output_directory())
    monkeypatch.setattr(paths, "get_save_image_path", lambda *_: (same[0], "light", 1, "race", "race/light"))
    pack.run("SaveLight", light=code.light, filename_prefix="race/light")
    assert path.read_text() == "mine" and (path.parent / "light_00002_.json").read_text().startswith("{")
    monkeypatch.setattr("os.link", failing(OSError("no hard links here")))
    pack.run("SaveLight", light=code.light, filename_prefix="race/light")
    assert (path.parent / "light_00003_.json").read_text().startswith("{")
    monkeypatch.setattr("os.replace", failing(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        pack.run("SaveLight", light=code.light, filename_prefix="race/light")
    assert len(list(path.parent.iterdir())) == 3  # nothing half-written, no name taken


def failing(error):
    def fail(*_):
        raise error

    return fail


def test_a_name_is_taken_by_whole_files_only(pack, code, monkeypatch):
    """A kill at any time leaves no empty file, and one that is there is not offered."""
    folder = pack.host.folder / "output" / "face_rig"
    folder.mkdir(parents=True, exist_ok=True)
    seen, link = [], os.link
    monkeypatch.setattr(
        "os.link",
        lambda a, b: seen.append((Path(a).read_text()[:1], Path(b).exists())) or link(a, b),
    )
    pack.run("SaveLight", light=code.light, filename_prefix="face_rig/whole")
    assert seen == [("{", False)]
    (folder / "empty.json").touch()
    (pack.host.folder / "input" / "empty.json").touch()
    names = pack.nodes_module.host.text_names()
    assert "whole_00001_.json [output]" in names and not [n for n in names if "empty" in n]


def test_what_is_too_large_for_a_light_is_refused_unread(pack, monkeypatch):
    texts = pack.nodes_module.host.texts
    assert texts.MOST == 2**25
    monkeypatch.setattr(texts, "MOST", 2**20)
    (pack.host.folder / "input" / "large.json").write_text(" " * (2**20 + 1))
    with pytest.raises(ValueError, match="'file': 'large.json' is larger than 1 MB"):
        pack.run("LoadLight", file="large.json")
    with pytest.raises(ValueError, match="'text': the text is larger than 1 MB"):
        pack.run("LoadLight", file="large.json", text="[" * (2**20 + 1))


@pytest.mark.parametrize(
    "prefix", ["", "../light", "a/../../b", "/etc/light", "C:\\x", "a//b", "a/.", "a\\b", "a\nb", ".", "a/ "]
)
def test_names_that_lead_elsewhere_are_refused(pack, code, prefix):
    node = pack.nodes["FaceRig_SaveLight"]
    assert "'filename_prefix' is" in node.validate_inputs(filename_prefix=prefix)
    with pytest.raises(ValueError, match="'filename_prefix' is"):
        pack.run("SaveLight", light=code.light, filename_prefix=prefix)
    assert node.validate_inputs() is True and node.validate_inputs(filename_prefix="a/%date% b.1") is True


def test_loading_stays_below_the_folders(pack, tmp_path):
    text = pack.core.readable.light_json(torch.ones(1, 9, 3))
    (pack.host.folder / "input" / "sub").mkdir(exist_ok=True)
    (pack.host.folder / "input" / "sub" / "mine.json").write_text(text)
    (pack.host.folder / "outside.json").write_text(text)
    (pack.host.folder / "input" / "notes.txt").write_text(text)
    (pack.host.folder / "output" / "face_rig").mkdir(parents=True, exist_ok=True)
    (pack.host.folder / "output" / "elsewhere.json").write_text(text)
    offered = pack.nodes["FaceRig_LoadLight"].define_schema().inputs[0].options
    assert "sub/mine.json" in offered and offered[-1] == "(none: from text)" and "notes.txt" not in offered
    assert torch.equal(pack.run("LoadLight", file="sub/mine.json")[0], torch.ones(1, 9, 3))
    for name in (
        "../outside.json",
        "../elsewhere.json [output]",
        str(pack.host.folder / "outside.json"),
        "gone.json",
        "notes.txt",
        "(none: from text)",
        "",
    ):
        with pytest.raises(ValueError, match="'file': there is no '.*put a .json file below"):
            pack.run("LoadLight", file=name)


def test_the_cache_follows_the_contents(pack):
    node, path = pack.nodes["FaceRig_LoadLight"], pack.host.folder / "input" / "a.json"
    path.write_text("one")
    before = node.fingerprint_inputs(file="a.json", text="")
    assert before == node.fingerprint_inputs(file="a.json") and len(before) == 64
    path.write_text("two")
    assert node.fingerprint_inputs(file="a.json") != before
    assert node.fingerprint_inputs(file="a.json", text="{}") == "{}"
    assert node.fingerprint_inputs(file="gone.json") == "gone.json"
    with pytest.raises(ValueError, match=r"'file' \(a.json\): this is no JSON of a light"):
        pack.run("LoadLight", file="a.json")
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="'file': 'a.json' is no text"):
        pack.run("LoadLight", file="a.json")


def test_a_face_is_saved_and_loaded(pack, head, code):
    text = pack.run("SaveFace", face_code=code.expand(2))[0]
    loaded, light = pack.run("LoadFace", file="face_00001_.json [output]", face_model=head)
    for name, v in vars(code).items():
        got = getattr(loaded, name)
        assert torch.equal(got, v.expand_as(got)) if isinstance(v, torch.Tensor) else got == v, name
    assert torch.equal(light, loaded.light) and len(loaded) == 2
    shown = pack.host.previews[-1]
    assert shown.shape == (2, 256, 256, 3) and shown.mean() > 0.05
    previews = len(pack.host.previews)
    assert len(pack.run("LoadFace", file="(none: from text)", text=text)[0]) == 2
    assert len(pack.host.previews) == previews
    data = json.loads(text) | {"head": "flame"}
    with pytest.raises(ValueError, match="'text': 'head' is 'flame', expected 'open'"):
        pack.run("LoadFace", file="", face_model=head, text=json.dumps(data))
    with pytest.raises(ValueError, match="'format' must be .*use Load Face"):
        pack.run("LoadLight", file="face_00001_.json [output]")


def test_transfer_takes_what_is_on(pack, head, code):
    target = code
    source = pack.run("EditFace", face_model=head, face_code=target, yaw=20.0, smile=1.0, jaw=10.0)[0]
    lamp = pack.run("SHLightEdit", face_model=head, face_code=source, azimuth=70.0)[0]
    new = pack.run("Transfer", face_model=head, target=target, source=lamp)[0]
    assert torch.equal(new.light, lamp.light) and torch.equal(new.pose, target.pose)
    assert pack.host.previews[-1].shape == (1, 256, 256, 3)
    parts = {"light": False, "expression": True, "jaw": True, "strength": 0.5}
    new = pack.run("Transfer", face_model=head, target=target, source=lamp, **parts)[0]
    assert torch.equal(new.light, target.light) and torch.equal(new.pose[:, :3], target.pose[:, :3])
    torch.testing.assert_close(new.exp, (target.exp + lamp.exp) / 2)
    assert target.pose[0, 3] < new.pose[0, 3] < lamp.pose[0, 3]
    film = pack.run("InterpolateFaces", face_a=target, face_b=lamp, frames=5, easing="linear")[0]
    many = pack.run("Transfer", face_model=head, target=target, source=film, expression=True)[0]
    assert torch.equal(many.exp, film.exp) and len(many) == 5
    with pytest.raises(ValueError, match="'target' holds 3"):
        pack.run("Transfer", face_model=head, target=target.expand(3), source=film)


def test_interpolate_faces(pack, head, code):
    a = code
    b = pack.run("EditFace", face_model=head, face_code=a, yaw=30.0)[0]
    film, light = pack.run("InterpolateFaces", face_a=a, face_b=b, frames=8, easing="ping-pong")
    assert len(film) == len(light) == 8 and torch.equal(light, film.light)
    torch.testing.assert_close(film[0].pose, a.pose, atol=1e-6, rtol=0)
    torch.testing.assert_close(film[4].pose, b.pose, atol=1e-6, rtol=0)
    torch.testing.assert_close(film[3].pose, film[5].pose, atol=1e-6, rtol=0)
    with pytest.raises(ValueError, match="'face_b' holds 8 faces"):
        pack.run("InterpolateFaces", face_a=a, face_b=film)
    with pytest.raises(ValueError, match="'easing' is"):
        pack.run("InterpolateFaces", face_a=a, face_b=b, easing="bounce")


def test_neutral_face(pack, head, code):
    face = pack.run("EditFace", face_model=head, face_code=code, smile=1.0, jaw=15.0, gaze_x=20.0)[0]
    new = pack.run("NeutralFace", face_model=head, face_code=face)[0]
    assert not new.exp.any() and not new.pose[:, 3:].any()
    assert torch.equal(new.pose[:, :3], face.pose[:, :3]) and torch.equal(new.light, face.light)
    new = pack.run("NeutralFace", face_model=head, face_code=face, frontal=True, straight_gaze=False)[0]
    assert not new.pose[:, :6].any() and torch.equal(new.pose[:, 6:], face.pose[:, 6:])


def test_render_buffers_and_back(pack, head, code):
    dim = code.replace(light=code.light * 0.8)  # nothing above white, which a picture cuts off
    b, rendered, normal, albedo, shading, mask = pack.run("RenderBuffers", face_model=head, face_code=dim)
    assert b.rendered.max() < 1 and (b.shading * b.mask).max() < 2
    images = {"rendered": rendered, "normal": normal, "albedo": albedo, "shading": shading, "mask": mask}
    for given in (None, b):
        back, image = pack.run("BuffersFromImages", buffers=given, recompute=False, **images)
        torch.testing.assert_close(back.stack(), b.stack(), atol=1e-6, rtol=0)
        torch.testing.assert_close(back.shading * b.mask, b.shading * b.mask, atol=1e-6, rtol=0)
        assert torch.equal(back.mask, b.mask)
        torch.testing.assert_close(image, rendered, atol=1e-6, rtol=0)
    parts = {"normal": normal, "albedo": albedo, "mask": mask}
    lit = pack.run("BuffersFromImages", **parts, light=dim.light)[0]
    torch.testing.assert_close(lit.stack(), b.stack(), atol=1e-5, rtol=0)


def test_make_up_on_the_albedo_shows(pack, head, code):
    b, _, _, albedo, _, _ = pack.run("RenderBuffers", face_model=head, face_code=code)
    half = SIZE // 2
    painted = albedo.clone()
    painted[:, half : half + 8, half : half + 8] = torch.tensor([0.9, 0.1, 0.1])
    back, image = pack.run("BuffersFromImages", buffers=b, albedo=painted)
    spot = image[0, half + 4, half + 4]
    assert spot[0] > 3 * spot[1]
    assert torch.equal(back.rendered[..., :half], (b.albedo * b.shading)[..., :half])
    assert pack.host.previews[-1].shape == (1, SIZE, 4 * SIZE, 3)
    with pytest.raises(ValueError, match="'albedo' is 1 of 32 x 32 pixels, the others 1 of 64 x 64"):
        pack.run("BuffersFromImages", buffers=b, albedo=painted[:, ::2, ::2])
    with pytest.raises(ValueError, match="'light' holds NaN"):
        pack.run("BuffersFromImages", buffers=b, light=code.light * float("nan"))
    with pytest.raises(ValueError, match="without 'buffers' connect 'normal', 'mask' as well"):
        pack.run("BuffersFromImages", albedo=painted)


def test_a_long_batch_is_exchanged_in_parts(pack, head, code):
    film = pack.run("InterpolateFaces", face_a=code, face_b=code.replace(light=code.light * 0.5), frames=6)[0]
    b, _, _, albedo, _, _ = pack.run("RenderBuffers", face_model=head, face_code=film)
    pack.host.progress.clear()
    back, image = pack.run("BuffersFromImages", buffers=b, albedo=albedo[:1], mask=torch.ones(SIZE, SIZE))
    torch.testing.assert_close(back.rendered, b.albedo[:1] * b.shading, atol=1e-6, rtol=0)
    assert len(image) == 6 and [p[:2] for p in pack.host.progress] == [(1, 2), (2, 2)]
    with pytest.raises(ValueError, match="'albedo' holds 5 .* but 6 are needed"):
        pack.run("BuffersFromImages", buffers=b, albedo=albedo[:5])
    pack.host.interrupt_after = 0
    with pytest.raises(Exception) as stopped:
        pack.run("BuffersFromImages", buffers=b)
    assert type(stopped.value).__name__ == "Interrupted"
