"""From face to face: Transfer, Interpolate Faces, Neutral Face."""

from comfy_api.latest import io, ui

from ..rig_core import edits
from . import host, sockets
from .buffers import preview

PARTS = {
    "light": "The light on the face",
    "pose": "How the head is turned",
    "expression": "The expression, and where the eyes look if the head has a gaze",
    "jaw": "How far the mouth is open",
    "shape": "The form of the face: whose face it is",
    "albedo": "The colour of the skin",
    "camera": "Place and size of the face in the picture",
}


class Transfer(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="FaceRig_Transfer",
            display_name="Transfer",
            category="Face Rig/rig",
            description="Gives a face the light, pose, expression, jaw, shape or skin of another face.",
            **sockets.aliases("copy expression", "copy pose", "copy light", "reenact"),
            inputs=[
                sockets.FaceModel.Input("face_model", tooltip="The one that both faces were fitted with."),
                sockets.FaceCode.Input("target", tooltip="The face to change: one, or one a source."),
                sockets.FaceCode.Input("source", tooltip="The face to take from: one, or one a target."),
                *[
                    io.Boolean.Input(
                        name,
                        default=name == "light",
                        tooltip=f"{what}. On takes the source's, off keeps the target's.",
                    )
                    for name, what in PARTS.items()
                ],
                io.Float.Input(
                    "strength",
                    default=1.0,
                    min=0.0,
                    max=1.0,
                    step=0.05,
                    tooltip="How much of it is taken: 0 keeps the target's, 1 is the source's. Good: 0.5..1.",
                ),
            ],
            outputs=[
                sockets.FaceCode.Output(
                    display_name="face_code", tooltip="The changed face, in the target's picture."
                )
            ],
        )

    @classmethod
    def execute(cls, face_model, target, source, strength, **parts):
        n, head = max(len(target), len(source)), host.head(face_model)
        target.require_head(head, "target")
        source.require_head(head, "source")
        target, source = (
            host.repeat(c, n, s).to(host.device()) for c, s in ((target, "target"), (source, "source"))
        )
        new = edits.transfer(head, target, source, strength, **parts)
        return io.NodeOutput(host.result(new), ui=ui.PreviewImage(preview(head, new), cls=cls))


class InterpolateFaces(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="FaceRig_InterpolateFaces",
            display_name="Interpolate Faces",
            category="Face Rig/rig",
            description="Goes from one face to another in steps: a batch of faces, for a film of one photo.",
            **sockets.aliases("morph", "tween", "animate", "keyframes"),
            inputs=[
                sockets.FaceCode.Input(
                    "face_a", tooltip="The first face; its picture is that of all frames."
                ),
                sockets.FaceCode.Input("face_b", tooltip="The last face, of the same head."),
                io.Int.Input(
                    "frames",
                    default=16,
                    min=2,
                    max=10_000,
                    tooltip="Number of faces, both ends among them. Good: 8..48.",
                ),
                io.Combo.Input(
                    "easing",
                    options=list(edits.EASINGS),
                    default="smooth",
                    tooltip=(
                        "linear: even steps. smooth: slow at both ends. ping-pong: there and back without a "
                        "jump, to be repeated; take an even number of frames."
                    ),
                ),
            ],
            outputs=[
                sockets.FaceCode.Output(display_name="face_code", tooltip="The faces, in order."),
                sockets.SHLight.Output(display_name="light", tooltip="Their lights alone."),
            ],
        )

    @classmethod
    def execute(cls, face_a, face_b, frames, easing):
        for name, code in (("face_a", face_a), ("face_b", face_b)):
            if len(code) != 1:
                raise ValueError(f"'{name}' holds {len(code)} faces: it goes from one to one other")
        code = edits.interpolate(face_a, face_b, frames, easing)
        return io.NodeOutput(host.result(code), host.result(code.light))


class NeutralFace(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="FaceRig_NeutralFace",
            display_name="Neutral Face",
            category="Face Rig/rig",
            description="Takes the expression off a face and closes the mouth: a start for your own edits.",
            **sockets.aliases("reset expression", "rest pose", "passport", "frontal"),
            inputs=[
                sockets.FaceModel.Input("face_model", tooltip="The one that the face was fitted with."),
                sockets.FaceCode.Input("face_code", tooltip="From DECA Encode or Fit to Landmarks."),
                io.Boolean.Input(
                    "frontal",
                    default=False,
                    tooltip="On turns the head to the camera, too; off keeps its pose.",
                ),
                io.Boolean.Input(
                    "straight_gaze",
                    default=True,
                    tooltip="On: the eyes look straight ahead; off keeps their gaze. FLAME's rest anyway.",
                ),
            ],
            outputs=[
                sockets.FaceCode.Output(display_name="face_code", tooltip="The same face without expression.")
            ],
        )

    @classmethod
    def execute(cls, face_model, face_code, frontal, straight_gaze):
        head = host.head(face_model)
        new = edits.neutral(head, face_code.to(host.device()), frontal, straight_gaze)
        return io.NodeOutput(host.result(new), ui=ui.PreviewImage(preview(head, new), cls=cls))
