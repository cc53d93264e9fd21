"""Edits of the face: Edit Face, Move Photo."""

from comfy_api.latest import io, ui

from ..rig_core import expressions, pipeline, preview_mesh, warp
from . import host, sockets


def _degrees(name, most, tooltip):
    return io.Float.Input(
        name,
        default=0.0,
        min=-most,
        max=most,
        step=0.5,
        tooltip=tooltip + " Added to the photo's own; 0 changes nothing.",
    )


class EditFace(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="FaceRig_EditFace",
            display_name="Edit Face",
            category="Face Rig/rig",
            description="Turns the head, opens the jaw, moves the eyes, changes the expression.",
            **sockets.aliases(
                "pose", "turn head", "smile", "expression", "gaze", "blink", "mouth", "rotate face"
            ),
            inputs=[
                sockets.FaceModel.Input("face_model", tooltip="The one that the face was fitted with."),
                sockets.FaceCode.Input("face_code", tooltip="From DECA Encode or Fit to Landmarks."),
                _degrees(
                    "yaw", 90.0, "Degrees; above 0 turns the face to the right of the picture. Good: -25..25."
                ),
                _degrees("pitch", 60.0, "Degrees; above 0 lifts the chin. Good: -15..15."),
                _degrees("roll", 180.0, "Degrees; above 0 tilts the head counter-clockwise. Good: -20..20."),
                _degrees("jaw", 30.0, "Degrees; above 0 opens the mouth. Good: 0..20."),
                _degrees(
                    "gaze_x", 40.0, "Degrees; above 0 looks to the right of the picture. Good: -20..20."
                ),
                _degrees("gaze_y", 30.0, "Degrees; above 0 looks up. Good: -15..15."),
                *[
                    io.Float.Input(
                        name,
                        default=0.0,
                        min=-1.0,
                        max=1.5,
                        step=0.05,
                        tooltip=(
                            f"{what}: 1 is all the way, 0 changes nothing, below 0 the opposite. Good: 0..1."
                        ),
                    )
                    for name, (what, _) in expressions.EXPRESSIONS.items()
                ],
            ],
            outputs=[sockets.FaceCode.Output(display_name="face_code", tooltip="The edited face.")],
        )

    @classmethod
    def execute(cls, face_model, face_code, yaw, pitch, roll, jaw, gaze_x, gaze_y, **sliders):
        head, code = host.head(face_model), face_code.to(host.device())
        code.require_head(head)
        shapes = expressions.shapes(head.expression_names, sliders)
        if (gaze_x or gaze_y) and head.sizes.pose < 8:
            name = "gaze_x" if gaze_x else "gaze_y"
            raise ValueError(f"'{name}': the eyes of the {head.name} head rest: leave it at 0")
        edited = pipeline.turn(head, code, yaw, pitch, roll, jaw, (gaze_x, gaze_y), **shapes)
        # by the head that stays, so that its mesh is made once
        stays = getattr(face_model, "head", face_model)
        fitted = host.temporary(preview_mesh.pack(stays, face_code.to("cpu")), ".head")
        return io.NodeOutput(host.result(edited), ui={"face_rig_head": [fitted]})


class MovePhoto(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="FaceRig_MovePhoto",
            display_name="Move Photo",
            category="Face Rig/rig",
            description=(
                "Moves the aligned photo along with an edited head, so that DDIM Invert starts from a "
                "photo that already has the new pose. Needed after Edit Face, or Transfer of pose or "
                "expression."
            ),
            **sockets.aliases("warp", "warp photo", "motion", "liquify", "follow head"),
            inputs=[
                sockets.FaceModel.Input("face_model", tooltip="The one that the face was fitted with."),
                io.Image.Input("image", tooltip="The aligned photo."),
                sockets.FaceCode.Input("source", tooltip="The face as fitted to the photo."),
                sockets.FaceCode.Input("target", tooltip="The face from Edit Face."),
            ],
            outputs=[
                io.Image.Output(
                    display_name="moved",
                    tooltip="The photo in the new pose, with smears where it showed nothing.",
                ),
                io.Mask.Output(
                    display_name="hidden",
                    tooltip="White where the photo did not show the head: for DDIM Invert.",
                ),
                sockets.FaceMotion.Output(
                    display_name="motion",
                    tooltip="The move itself: Paste Back repeats it at full resolution.",
                ),
            ],
        )

    @classmethod
    def execute(cls, face_model, image, source, target):
        n, *sides = host.check_pictures(image, "image")
        n, head = max(n, len(source), len(target)), host.head(face_model)
        for name, code in (("source", source), ("target", target)):
            code.require_head(head, name)
            if list(code.size) != sides:
                raise ValueError(
                    f"'image' is {sides[1]} x {sides[0]} pixels, '{name}' was fitted at {code.size[1]} x "
                    f"{code.size[0]}: connect the same picture"
                )
        image = host.repeat(image, n, "image")
        codes = [host.repeat(c, n, s) for c, s in ((source, "source"), (target, "target"))]
        parts = host.chunks(n, *sides)
        progress, moved, hidden, motion = host.Progress(len(parts)), [], [], []
        for part in parts:
            grid, unseen = warp.flow(head, *(c[part].to(host.device()) for c in codes))
            x = warp.apply(host.pictures(image[part], "image"), grid)
            for made, v in ((moved, host.image(x)), (hidden, host.mask(unseen)), (motion, host.result(grid))):
                made.append(v)
            progress.step(x * 2 - 1)
        moved, hidden, motion = map(host.joined, (moved, hidden, motion))
        return io.NodeOutput(moved, hidden, motion, ui=ui.PreviewImage(moved[:4], cls=cls))
