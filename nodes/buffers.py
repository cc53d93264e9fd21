"""From face code to pictures of it: Render Buffers."""

import torch
from comfy_api.latest import io, ui

from ..rig_core import buffers
from ..rig_core.face import Buffers
from . import host, sockets


class RenderBuffers(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="FaceRig_RenderBuffers",
            display_name="Render Buffers",
            category="Face Rig/buffers",
            description="Renders the head: lit, normals, albedo, shading. This is what steers the denoiser.",
            inputs=[
                sockets.FaceModel.Input("face_model", tooltip="The one that the face was fitted with."),
                sockets.FaceCode.Input("face_code", tooltip="From DECA Encode, Fit to Landmarks or an edit."),
                io.Int.Input(
                    "size",
                    default=0,
                    min=0,
                    max=1024,
                    step=32,
                    tooltip=(
                        "Side of the buffers in pixels; 0 takes the size of the fitted picture. Must be "
                        "the size that "
                        "the denoiser works at."
                    ),
                ),
            ],
            outputs=[
                sockets.FaceBuffers.Output(display_name="buffers", tooltip="For DiffusionRig Condition."),
                io.Image.Output(display_name="rendered", tooltip="Albedo times shading."),
                io.Image.Output(
                    display_name="normal", tooltip="-1..1 shown as 0..1; x right, y up, z to the viewer."
                ),
                io.Image.Output(display_name="albedo", tooltip="Skin colour without light."),
                io.Image.Output(
                    display_name="shading", tooltip="The light on the normals; 1 is shown as mid grey."
                ),
                io.Mask.Output(display_name="mask", tooltip="White where the head is."),
            ],
        )

    @classmethod
    def execute(cls, face_model, face_code, size):
        side = size or max(face_code.size)
        if side > 1024:
            raise ValueError(
                f"'face_code' is of a picture of {side} pixels, 1024 is the most: use Align Face or set "
                "'size'"
            )
        head, parts = host.head(face_model), host.chunks(len(face_code), side, side)
        progress, made = host.Progress(len(parts)), []
        for part in parts:
            made.append(host.result(buffers.render(head, face_code[part].to(host.device()), size or None)))
            progress.step(made[-1].rendered * 2 - 1)
        b = Buffers(*map(torch.cat, zip(*(vars(m).values() for m in made), strict=True)))
        shown = [b.rendered, b.normal * 0.5 + 0.5, b.albedo, b.shading * b.mask * 0.5]
        rows = host.image(torch.cat([x[:4] for x in shown], 3))
        return io.NodeOutput(b, *map(host.image, shown), host.mask(b.mask), ui=ui.PreviewImage(rows, cls=cls))
