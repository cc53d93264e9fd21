"""Edit Face, Move Photo, Render Buffers."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch

from tests.node_pack import *  # noqa: F403 the fixtures
from tests.node_pack import SIZE, psnr
from tests.test_nodes_video import InWork


def test_edit_face_moves_what_the_sliders_say(pack, head, face):
    code = face[3]

    def points(**edit):
        new = pack.run("EditFace", face_model=head, face_code=code, **edit)[0]
        p = head.landmarks(head.verts(new.shape, new.exp, new.pose), new.pose)
        return pack.core.buffers.to_pixels(pack.core.buffers.to_image(p, new), new.size)[0]

    rest = points()
    assert torch.equal(rest, points(yaw=0.0))
    turned = points(yaw=20.0) - rest
    assert turned[30, 0] - turned[36:48, 0].mean() > 1  # the nose goes farther right than the eyes, px of 64
    lifted = points(pitch=15.0) - rest
    assert lifted[30, 1] - lifted[36:48, 1].mean() < -0.5
    rolled = points(roll=20.0)
    assert (
        rolled[42:48, 1].mean() < rolled[36:42, 1].mean() - 2
    )  # counter-clockwise lifts the right of the picture
    opened = points(jaw=15.0)
    assert opened[57, 1] - opened[51, 1] > rest[57, 1] - rest[51, 1] + 1.5
    smiling = points(smile=1.0) - rest
    assert smiling[48, 0] < -0.3 and smiling[54, 0] > 0.3 and smiling[[48, 54], 1].mean() < -0.3
    frown = points(frown=1.0) - rest
    assert frown[[48, 54], 1].mean() > 0.1
    raised = points(raise_brows=1.0) - rest
    assert raised[17:27, 1].mean() < -0.3
    blinked = points(blink=1.0)
    assert (blinked[41, 1] - blinked[37, 1]) < 0.5 * (rest[41, 1] - rest[37, 1])
    puckered = points(pucker=1.0)
    assert puckered[54, 0] - puckered[48, 0] < rest[54, 0] - rest[48, 0] - 0.5


def test_edit_face_gives_the_page_the_fitted_face_and_not_the_edited_one(pack, head, face):
    """A file in the host's temp folder, named in the ui output; the same for every setting of the sliders."""
    node = pack.nodes["FaceRig_EditFace"]
    rest = {i.id: i.default for i in node.define_schema().inputs if i.widget}

    def shown(**edit):
        out = node.execute(face_model=head, face_code=face[3], **{**rest, **edit})
        assert list(out.ui) == ["face_rig_head"]
        return out.ui["face_rig_head"][0]

    entry = shown(yaw=20.0, smile=1.0)
    assert entry == shown() and entry["type"] == "temp" and entry["subfolder"] == ""
    file = pack.host.folder / "temp" / entry["filename"]
    assert file.read_bytes() == pack.core.preview_mesh.pack(head, face[3])
    assert [f.name for f in file.parent.iterdir()] == [entry["filename"]]
    assert set(rest) == {
        "yaw",
        "pitch",
        "roll",
        "jaw",
        "gaze_x",
        "gaze_y",
        *pack.core.expressions.EXPRESSIONS,
    }


def test_every_expression_slider_is_known_to_the_head(pack, head):
    for _, shapes in pack.core.expressions.EXPRESSIONS.values():
        assert set(shapes) <= set(head.expression_names)


def test_move_photo_without_an_edit_changes_nothing_and_a_turn_hides_a_cheek(pack, head, scene, face):
    image, _, _, code = face
    moved, hidden, _ = pack.run("MovePhoto", face_model=head, image=image, source=code, target=code)
    assert psnr(moved, image) > 40 and hidden.max() < 0.05
    turned = pack.run("EditFace", face_model=head, face_code=code, yaw=25.0)[0]
    moved, hidden, motion = pack.run("MovePhoto", face_model=head, image=image, source=code, target=turned)
    assert (moved - image).abs().mean() > 0.01 and 0 < hidden.mean() < 0.3
    photo, crop = scene[0], face[1]
    out = pack.run("PasteBack", photo=photo, edited=moved, before=moved, crop=crop, motion=motion)[0]
    at_crop = pack.run("AlignFace", photo=out, size=SIZE, landmarks=scene[1])[0]
    middle = slice(SIZE // 4, -SIZE // 4)
    assert psnr(at_crop[:, middle, middle], moved[:, middle, middle]) > 28  # the photo itself has turned
    with pytest.raises(ValueError, match="'motion' needs 'before'"):
        pack.run("PasteBack", photo=photo, edited=moved, crop=crop, motion=motion)


def test_render_buffers_gives_the_stack_and_pictures_of_it(pack, head, face):
    buffers, rendered, normal, albedo, shading, mask = pack.run(
        "RenderBuffers", face_model=head, face_code=face[3]
    )
    assert buffers.stack().shape == (1, 9, SIZE, SIZE)
    assert rendered.shape == normal.shape == albedo.shape == shading.shape == (1, SIZE, SIZE, 3)
    assert mask.shape == (1, SIZE, SIZE) and set(mask.unique().tolist()) == {0.0, 1.0}
    nose = normal[0, SIZE // 2, SIZE // 2]
    assert nose[2] > 0.7  # the middle of the face looks at the viewer
    inside = mask[0] > 0
    want = (albedo * buffers.shading.permute(0, 2, 3, 1)).clamp(0, 1)
    torch.testing.assert_close(rendered[0][inside], want[0][inside], atol=1e-5, rtol=0)
    assert pack.run("RenderBuffers", face_model=head, face_code=face[3], size=96)[1].shape == (1, 96, 96, 3)


def test_a_code_of_another_head_is_refused(pack, head, face):
    code = face[3].replace(head="flame")
    for node in ("RenderBuffers", "EditFace", "SHLightEdit"):
        with pytest.raises(ValueError, match="'flame' head.*Load Face Model"):
            pack.run(node, face_model=head, face_code=code)


def test_a_slider_that_the_head_has_no_shapes_for_is_named(pack, head, face):
    bare = copy.copy(head)
    bare.expression_names, bare.sizes = [], dataclasses.replace(head.sizes, pose=6)
    code = face[3].replace(pose=face[3].pose[:, :6])
    for widget in ("smile", "gaze_x", "gaze_y"):
        with pytest.raises(ValueError, match=f"'{widget}'.*leave it at 0"):
            pack.run("EditFace", face_model=bare, face_code=code, **{widget: 1.0})


def test_sliders_add_up(pack, head):
    shapes = pack.core.expressions.shapes(head.expression_names, {"smile": 0.5, "blink": 1.0, "sneer": 0.0})
    assert shapes == {
        "mouthSmile_L": 0.5, "mouthSmile_R": 0.5, "cheekSquint_L": 0.2, "cheekSquint_R": 0.2,
        "eyeBlink_L": 1.0, "eyeBlink_R": 1.0,
    }  # fmt: skip


def test_where_the_head_is_copied_to_a_gpu_its_preview_mesh_is_made_once(pack, head, face, monkeypatch):
    monkeypatch.setattr(pack.nodes_module.host, "head", copy.deepcopy)  # as on a GPU
    mesh, own = pack.core.preview_mesh, copy.deepcopy(head)
    made, split = [], mesh._split
    monkeypatch.setattr(mesh, "_split", lambda *a: made.append(1) or split(*a))
    for yaw in (0.0, 10.0):
        pack.run("EditFace", face_model=own, face_code=face[3], yaw=yaw)
    assert len(made) == mesh.ROUNDS


def test_photos_are_moved_in_parts(pack, head, face, monkeypatch):
    g, n = torch.Generator().manual_seed(0), 7
    images, source = torch.rand(n, SIZE, SIZE, 3, generator=g), face[3].expand(n)
    target = source.replace(pose=source.pose + 0.2 * torch.randn(source.pose.shape, generator=g))
    given = {"face_model": head, "image": images, "source": face[3], "target": target}
    whole = pack.run("MovePhoto", **given)
    host = pack.nodes_module.host
    monkeypatch.setattr(host, "chunks", lambda n, *_: host.slices(n, 2))
    pack.host.progress.clear()
    with InWork() as seen:
        parts = pack.run("MovePhoto", **given)
    assert [p[:2] for p in pack.host.progress] == [(i, 4) for i in (1, 2, 3, 4)] and n not in seen.batches
    for a, b in zip(parts, whole, strict=True):
        assert len(a) == n
        torch.testing.assert_close(a, b, atol=1e-4, rtol=0)
    with InWork() as seen:
        made = pack.run("RenderBuffers", face_model=head, face_code=target)
        pack.run("BuffersFromImages", buffers=made[0], albedo=images, recompute=True)
    assert 2 in seen.batches and n not in seen.batches
    for i, x in enumerate(pack.nodes_module.buffers.pictures(made[0]), 1):
        torch.testing.assert_close(made[i], x.clamp(0, 1).permute(0, 2, 3, 1))


def test_codes_with_other_numbers_than_the_heads_are_refused_everywhere(pack, head, face):
    code = face[3]
    short = code.replace(shape=code.shape[:, :3])
    for node in ("RenderBuffers", "EditFace", "SHLightEdit", "LightOrbit", "NeutralFace"):
        with pytest.raises(ValueError, match="'face_code' has 3 numbers of 'shape', this 'open' head has"):
            pack.run(node, face_model=head, face_code=short)
    for name, node in (("source", "MovePhoto"), ("target", "Transfer")):
        given = {"source": code, "target": code, "face_model": head} | {name: short}
        if node == "MovePhoto":
            given["image"] = face[0]
        with pytest.raises(ValueError, match=f"'{name}' has 3 numbers of 'shape'"):
            pack.run(node, **given)
    with pytest.raises(ValueError, match="'face_code' has 3 numbers of 'shape'"):
        pack.run("InterpolateFaces", face_a=code, face_b=short)


def test_the_edge_is_soft_with_a_motion_too(pack, head, scene, face):
    image, crop, _, code = face
    turned = pack.run("EditFace", face_model=head, face_code=code, yaw=10.0)[0]
    moved, _, motion = pack.run("MovePhoto", face_model=head, image=image, source=code, target=turned)
    given = {"photo": scene[0], "edited": moved * 0.8, "before": moved, "crop": crop, "motion": motion}
    hard, wide = (pack.run("PasteBack", soft=soft, **given)[0] for soft in (0.0, 0.3))
    assert (hard - wide).abs().max() > 0.05
