"""Edit Face, Move Photo, Render Buffers."""

from __future__ import annotations

import pytest
import torch

from tests.node_pack import *  # noqa: F403 the fixtures
from tests.node_pack import SIZE, psnr


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
        *pack.core.preview_mesh.EXPRESSIONS,
    }


def test_every_expression_slider_is_known_to_the_head(pack, head):
    for _, shapes in pack.nodes_module.rig.EXPRESSIONS.values():
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
