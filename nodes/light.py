"""Light: SH Light Edit."""

import math

import torch
from comfy_api.latest import io, ui

from ..rig_core import sh
from . import host, sockets

MODES = ["model range", "raw"]


class SHLightEdit(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="FaceRig_SHLightEdit",
            display_name="SH Light Edit",
            category="Face Rig/light",
            description="Lights the face from a direction that you choose, or mixes that light with the photo's own.",
            inputs=[
                sockets.FaceModel.Input("face_model", tooltip="The one that the face was fitted with: it knows which lights its models saw."),
                sockets.FaceCode.Input("face_code", tooltip="From Fit to Landmarks or Edit Face."),
                io.Float.Input(
                    "azimuth",
                    default=50.0,
                    min=-180.0,
                    max=180.0,
                    step=1.0,
                    tooltip="Degrees; 0 is from the camera, above 0 from the right of the picture. Good: -80..80.",
                ),
                io.Float.Input(
                    "elevation",
                    default=20.0,
                    min=-90.0,
                    max=90.0,
                    step=1.0,
                    tooltip="Degrees; above 0 from above. Good: -10..50.",
                ),
                io.Float.Input(
                    "intensity",
                    default=1.0,
                    min=0.0,
                    max=3.0,
                    step=0.05,
                    tooltip="Strength of the directed light; 0 leaves the even light only. Good: 0.4..1.5.",
                ),
                io.Float.Input(
                    "ambient",
                    default=0.0,
                    min=-1.0,
                    max=1.0,
                    step=0.02,
                    tooltip="Light added everywhere (below 0: taken away), in shading where 1 is white. Good: -0.2..0.3.",
                ),
                io.Float.Input(
                    "softness",
                    default=0.3,
                    min=0.0,
                    max=1.0,
                    step=0.05,
                    tooltip="Size of the source: 0 is a point with a hard terminator, 1 half the sky. Good: 0..0.7.",
                ),
                io.Float.Input("red", default=1.0, min=0.0, max=2.0, step=0.01, tooltip="Red of the directed light. Good: 0.5..1.5."),
                io.Float.Input("green", default=1.0, min=0.0, max=2.0, step=0.01, tooltip="Green of the directed light. Good: 0.5..1.5."),
                io.Float.Input("blue", default=1.0, min=0.0, max=2.0, step=0.01, tooltip="Blue of the directed light. Good: 0.5..1.5."),
                io.Float.Input(
                    "mix",
                    default=1.0,
                    min=0.0,
                    max=1.0,
                    step=0.05,
                    tooltip="0 keeps the photo's light, 1 is the new light alone.",
                ),
                io.Combo.Input(
                    "mode",
                    options=MODES,
                    default=MODES[0],
                    tooltip=(
                        "model range: the light is brought into the range that the denoiser was trained on (use this). "
                        "raw: the coefficients of a physical lamp, for experts."
                    ),
                ),
                sockets.SHLight.Input("light", optional=True, tooltip="A light to set instead of the sliders' one; mix still counts."),
            ],
            outputs=[
                sockets.FaceCode.Output(display_name="face_code_out", tooltip="The face under the new light."),
                sockets.SHLight.Output(display_name="light_out", tooltip="The new light."),
                io.Image.Output(display_name="ball", tooltip="A white ball under the new light; 1 is shown as mid grey."),
            ],
        )
