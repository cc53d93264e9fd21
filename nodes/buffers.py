"""From face code to pictures of it, and back from pictures: Render Buffers, Buffers From Images."""

import torch
from comfy_api.latest import io, ui

from ..rig_core import buffers, edits, sh
from ..rig_core.face import Buffers
from . import host, sockets

AT_ONCE = 4  # exchanged buffers in work, of up to 1024 px and more


class RenderBuffers(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="FaceRig_RenderBuffers",
            display_name="Render Buffers",
            category="Face Rig/buffers",
            description="Renders the head: lit, normals, albedo, shading. This is what steers the denoiser.",
            **sockets.aliases("normal map", "g-buffer", "render face", "shading", "albedo", "head mask"),
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

        def render(part):
            return buffers.render(head, face_code[part].to(host.device()), size or None)

        b, shown, below = _made(cls, parts, render, 4)
        return io.NodeOutput(b, *shown, host.mask(b.mask), ui=below)


class BuffersFromImages(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="FaceRig_BuffersFromImages",
            display_name="Buffers From Images",
            category="Face Rig/buffers",
            description=(
                "Puts pictures in the place of rendered buffers: an albedo with make-up or a tattoo, edited "
                "normals, a render of your own."
            ),
            **sockets.aliases("swap buffers", "make-up", "tattoo", "edit albedo", "edit normals", "texture"),
            inputs=[
                io.Boolean.Input(
                    "recompute",
                    default=True,
                    tooltip=(
                        "On: rendered becomes albedo times shading, so that edited albedo or normals show. "
                        "Off: all pictures are taken as they are."
                    ),
                ),
                sockets.FaceBuffers.Input(
                    "buffers",
                    optional=True,
                    tooltip=(
                        "From Render Buffers: what is not connected below stays. Without it normal, albedo, "
                        "mask and, with recompute off, rendered are needed."
                    ),
                ),
                io.Image.Input("rendered", optional=True, tooltip="The lit face. Needs recompute off."),
                io.Image.Input(
                    "normal",
                    optional=True,
                    tooltip="As Render Buffers shows it: 0..1 for -1..1; red right, green up, blue to you.",
                ),
                io.Image.Input(
                    "albedo", optional=True, tooltip="Skin colour without light, as on the screen."
                ),
                io.Image.Input(
                    "shading",
                    optional=True,
                    tooltip="As Render Buffers shows it: mid grey (0.5) for 1, a fully lit white.",
                ),
                io.Mask.Input("mask", optional=True, tooltip="White where the head is."),
                sockets.SHLight.Input(
                    "light",
                    optional=True,
                    tooltip="For recompute: shading is this light on the normals. Edited normals need it.",
                ),
            ],
            outputs=[
                sockets.FaceBuffers.Output(display_name="buffers", tooltip="For DiffusionRig Condition."),
                io.Image.Output(display_name="rendered", tooltip="The lit face as it is now."),
            ],
        )

    @classmethod
    def execute(
        cls,
        recompute,
        buffers=None,
        rendered=None,
        normal=None,
        albedo=None,
        shading=None,
        mask=None,
        light=None,
    ):
        given = {
            "buffers": buffers,
            "rendered": rendered,
            "normal": normal,
            "albedo": albedo,
            "shading": shading,
            "mask": mask[None] if mask is not None and mask.ndim == 2 else mask,
            "light": None if light is None else sh.check_light(light, "'light'"),
        }
        given = {name: x for name, x in given.items() if x is not None}
        n = max(map(len, given.values()), default=1)
        given = {name: host.repeat(x, n, name) for name, x in given.items()}

        def exchange(part):
            some = {name: _read(name, x[part]) for name, x in given.items()}
            return edits.exchange(some.pop("buffers", None), **some, recompute=recompute)

        b, shown, below = _made(cls, host.slices(n, AT_ONCE), exchange, 1)
        return io.NodeOutput(b, *shown, ui=below)


def _made(cls, parts, make, count):
    """The Buffers that make(part) gives, joined; the first `count` of their `pictures` as IMAGEs; a preview.

    What is asked for exists once as a whole, the rest in parts.
    """
    progress, columns = host.Progress(len(parts)), None
    for part in parts:
        b = host.result(make(part))
        row = [*vars(b).values(), *map(host.image, pictures(b)[:count])]
        columns = columns or [[] for _ in row]
        for column, x in zip(columns, row, strict=True):
            column.append(x)
        progress.step(b.rendered * 2 - 1)
    del b, row, x
    fields, shown = columns[:5], columns[5:]
    b = Buffers(*map(host.joined, fields))
    rows = host.image(torch.cat(pictures(b[:4]), 3))
    return b, [host.joined(v) for v in shown], ui.PreviewImage(rows, cls=cls)


def _read(name, x):
    """An input of Buffers From Images in the values of Buffers, on the working device."""
    if name in ("buffers", "light"):
        return x.to(host.device())
    if name == "mask":
        return host.mask_pictures(x, name)
    x = host.pictures(x, name)
    return {"normal": x * 2 - 1, "shading": x * 2}.get(name, x)


def pictures(b: Buffers) -> list:
    """Rendered, normal, albedo and shading [B,3,H,W] as they are shown: 0..1, shading at half."""
    return [b.rendered, b.normal * 0.5 + 0.5, b.albedo, b.shading * b.mask * 0.5]


def preview(head, code, most=4, side=256):
    """IMAGE of a few of the faces, rendered."""
    some = code[host.few(torch.arange(len(code)), most)].to(host.device())
    return host.image(buffers.render(head, some, side).rendered)
