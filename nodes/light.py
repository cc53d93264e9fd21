"""Light: SH Light Edit."""

import torch
from comfy_api.latest import io, ui

from ..rig_core import light_prior, sh
from . import host, sockets

MODES = ["model range", "raw"]


class SHLightEdit(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="FaceRig_SHLightEdit",
            display_name="SH Light Edit",
            category="Face Rig/light",
            description=(
                "Lights the face from a direction that you choose, or mixes that light with the photo's own."
            ),
            inputs=[
                sockets.FaceModel.Input(
                    "face_model",
                    tooltip="The one that the face was fitted with: it knows which lights its models saw.",
                ),
                sockets.FaceCode.Input("face_code", tooltip="From Fit to Landmarks or Edit Face."),
                io.Float.Input(
                    "azimuth",
                    default=50.0,
                    min=-180.0,
                    max=180.0,
                    step=1.0,
                    tooltip=(
                        "Degrees; 0 is from the camera, above 0 from the right of the picture. Good: -80..80."
                    ),
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
                    max=4.0,
                    step=0.05,
                    tooltip="Strength of the lamp, linear; 0 leaves the even light only. Good: 0.4..1.6.",
                ),
                io.Float.Input(
                    "ambient",
                    default=0.25,
                    min=0.0,
                    max=2.0,
                    step=0.01,
                    tooltip=(
                        "Light from everywhere, linear, against intensity: less of it is more contrast. "
                        "Good: 0.1..0.5."
                    ),
                ),
                io.Float.Input(
                    "softness",
                    default=0.1,
                    min=0.0,
                    max=1.0,
                    step=0.05,
                    tooltip=(
                        "Size of the source: 0 is a point with a clear terminator, 1 half the sky. Good: "
                        "0..0.7."
                    ),
                ),
                io.Float.Input(
                    "red",
                    default=1.0,
                    min=0.0,
                    max=2.0,
                    step=0.01,
                    tooltip="Red of the directed light. Good: 0.5..1.5.",
                ),
                io.Float.Input(
                    "green",
                    default=1.0,
                    min=0.0,
                    max=2.0,
                    step=0.01,
                    tooltip="Green of the directed light. Good: 0.5..1.5.",
                ),
                io.Float.Input(
                    "blue",
                    default=1.0,
                    min=0.0,
                    max=2.0,
                    step=0.01,
                    tooltip="Blue of the directed light. Good: 0.5..1.5.",
                ),
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
                        "model range: the light is brought into the range that the denoiser was trained "
                        "on (use this). "
                        "raw: the coefficients of a physical lamp, for experts."
                    ),
                ),
                sockets.SHLight.Input(
                    "light",
                    optional=True,
                    tooltip="A light to set instead of the sliders' one; mix still counts.",
                ),
            ],
            outputs=[
                sockets.FaceCode.Output(display_name="face_code", tooltip="The face under the new light."),
                sockets.SHLight.Output(display_name="light", tooltip="The new light."),
                io.Image.Output(display_name="ball", tooltip="A grey ball under the new light."),
            ],
        )

    @classmethod
    def execute(
        cls,
        face_model,
        face_code,
        azimuth,
        elevation,
        intensity,
        ambient,
        softness,
        red,
        green,
        blue,
        mix,
        mode,
        light=None,
    ):
        if mode not in MODES:
            raise ValueError(f"'mode' is {' or '.join(MODES)}, not '{mode}'")
        head = host.head(face_model)
        face_code.require_head(head.name)
        code = face_code.to(host.device())
        if light is None:
            prior = {"mean": head.light_mean, "std": head.light_std, "raw": mode == "raw"}
            colour = (red, green, blue)
            new = light_prior.edit(
                code.light, azimuth, elevation, intensity, ambient, colour, softness, **prior
            )
        else:
            n = max(len(code), len(light))
            code, new = host.repeat(code, n, "face_code"), host.repeat(light.to(code.light), n, "light")
        new = sh.interpolate(code.light, new, torch.full((len(code),), mix))
        ball = host.image(_ball(new))
        edited = code.replace(light=new)
        return io.NodeOutput(
            host.result(edited), host.result(new), ball, ui=ui.PreviewImage(ball[:4], cls=cls)
        )


def _ball(light, size=128):
    """A grey ball under each light, [B,3,size,size]."""
    at = (torch.arange(size, device=light.device) * 2 + 1) / size - 1
    y, x = torch.meshgrid(-at, at, indexing="ij")
    z = (1 - x * x - y * y).clamp_min(0).sqrt()
    normal = torch.stack([x, y, z])[None].expand(len(light), 3, size, size)
    return sh.shade(normal, light) * (z > 0) * 0.5
