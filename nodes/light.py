"""Light: SH Light Edit, Light From Photo, Light Orbit, Mix Lights."""

import torch
from comfy_api.latest import io, ui

from ..rig_core import light_prior, pipeline, preview, sh
from ..rig_core.estimators import locate
from . import host, sockets
from .estimate import FACE_CHOICE, find
from .light_sources import output

MODES = ["model range", "raw"]
WEIGHTED, LAMPS, SEQUENCE, ARC = "weighted", "add lamps", "sequence", "sequence, spherical"
PHOTO = 256  # px of the aligned face that a light is read from
FACES = 32  # at a time, so that many can be stopped


def _shown(cls, ball, head, code, given=None) -> dict:
    """What the page gets: the balls, and for its own ball the photo's head, its light, the prior, 'light'."""
    numbers = {"light": code.light[0], "mean": head.light_mean, "std": head.light_std}
    if given is not None:
        numbers["given"] = given[0]
    about = {k: v.flatten().tolist() for k, v in numbers.items()}
    about["sheet"] = host.data_url(preview.head_sheet(head, code))
    return {**ui.PreviewImage(ball, cls=cls).as_dict(), "face_rig_light": [about]}


LAMP = [
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
            "Light from everywhere, linear, against intensity: less of it is more contrast. Good: 0.1..0.5."
        ),
    ),
    io.Float.Input(
        "softness",
        default=0.1,
        min=0.0,
        max=1.0,
        step=0.05,
        tooltip="Size of the source: 0 is a point with a clear terminator, 1 half the sky. Good: 0..0.7.",
    ),
]


def _colour(optional=False):
    return [
        io.Float.Input(
            name,
            default=1.0,
            min=0.0,
            max=2.0,
            step=0.01,
            optional=optional,
            tooltip=f"{name.capitalize()} of the directed light. Good: 0.5..1.5.",
        )
        for name in ("red", "green", "blue")
    ]


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
            **sockets.aliases(
                "relight", "lighting", "light ball", "spherical harmonics", "lamp", "direction of light"
            ),
            inputs=[
                sockets.FaceModel.Input(
                    "face_model",
                    tooltip="The one that the face was fitted with: it knows which lights its models saw.",
                ),
                sockets.FaceCode.Input(
                    "face_code", tooltip="From DECA Encode, Fit to Landmarks or Edit Face."
                ),
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
                *LAMP,
                *_colour(),
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
                        "on (use this). raw: the coefficients of a physical lamp, for experts."
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
        sockets.choice("mode", mode, MODES)
        head = host.head(face_model)
        face_code.require_head(head)
        n = len(face_code) if light is None else max(len(face_code), len(light))
        code = host.repeat(face_code.to(host.device()), n, "face_code")
        given = None if light is None else host.repeat(light.to(code.light), n, "light")
        lamp = {"mean": head.light_mean, "std": head.light_std, "raw": mode == "raw", "softness": softness}
        lamp |= {"intensity": intensity, "ambient": ambient, "colour": (red, green, blue)}
        parts = host.slices(n, FACES)
        progress, lights, balls = host.Progress(len(parts)), [], []
        for p in parts:
            own = code.light[p]
            new = light_prior.edit(own, azimuth, elevation, **lamp) if given is None else given[p]
            lights.append(sh.interpolate(own, new, torch.full((len(own),), mix)))
            balls.append(host.image(light_prior.ball(lights[-1])))
            progress.step()
        light, ball = host.result(torch.cat(lights)), host.joined(balls)
        shown = _shown(cls, ball[:4], head, code, given)
        return io.NodeOutput(host.result(code).replace(light=light), light, ball, ui=shown)


class LightFromPhoto(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="FaceRig_LightFromPhoto",
            display_name="Light From Photo",
            category="Face Rig/light",
            description="Reads the light off a face in another photo, to put it on yours.",
            **sockets.aliases("copy light", "estimate lighting", "light transfer", "spherical harmonics"),
            inputs=[
                sockets.FaceModel.Input(
                    "face_model", tooltip="The same one that your photo's face is fitted with."
                ),
                io.Image.Input("photo", tooltip="Photos of any size with the wanted light on a face."),
                *FACE_CHOICE,
            ],
            outputs=[
                sockets.SHLight.Output(
                    display_name="light", tooltip="One light a photo: for DiFaReli Condition, SH Light Edit."
                ),
                io.Image.Output(display_name="ball", tooltip="A grey ball under each light."),
            ],
        )

    @classmethod
    def execute(cls, face_model, photo, order, index):
        sockets.choice("order", order, locate.ORDERS)
        n, *_ = host.check_pictures(photo, "photo")
        progress, lights, shown = host.Progress(2 * n), [], []
        host.together(host.face_finder(), host.encoder(face_model))
        points = find(photo, "photo", order, index, progress)
        with host.gradients():
            head, net = host.head(face_model), host.deca(face_model)
            for i in range(n):
                one = host.pictures(photo[i : i + 1], "photo").clone(), PHOTO, points[i : i + 1].clone()
                face = pipeline.estimate(head, *one, encoder=net)
                light, ball = face.code.light, light_prior.ball(face.code.light, PHOTO)
                lights.append(host.result(light))
                if len(shown) < 4:
                    shown.append(host.image(torch.cat([face.image, ball], 3)))
                progress.step()
        light = torch.cat(lights)
        return io.NodeOutput(
            light, host.image(light_prior.ball(light)), ui=ui.PreviewImage(torch.cat(shown), cls=cls)
        )


class LightOrbit(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="FaceRig_LightOrbit",
            display_name="Light Orbit",
            category="Face Rig/light",
            description="A lamp that goes around the head: a batch of lights, for a film of one photo.",
            **sockets.aliases("turntable", "moving light", "light animation", "rotate light", "video"),
            inputs=[
                sockets.FaceModel.Input(
                    "face_model",
                    tooltip="The one that the face was fitted with: it knows which lights its models saw.",
                ),
                sockets.FaceCode.Input(
                    "face_code", tooltip="One face from Fit to Landmarks: sets level and colour of the light."
                ),
                io.Int.Input("frames", default=24, min=1, max=240, tooltip="Number of lights. Good: 16..48."),
                io.Float.Input(
                    "start",
                    default=-90.0,
                    min=-180.0,
                    max=180.0,
                    step=1.0,
                    tooltip=(
                        "Degrees of azimuth of the first light; 0 is from the camera, above 0 from the right."
                    ),
                ),
                io.Float.Input(
                    "arc",
                    default=180.0,
                    min=-360.0,
                    max=360.0,
                    step=1.0,
                    tooltip=(
                        "Degrees to travel; above 0 towards the right. 360 is a full circle that repeats "
                        "without a jump; a shorter arc ends exactly there. Good: 120..180, or 360."
                    ),
                ),
                io.Float.Input(
                    "elevation",
                    default=15.0,
                    min=-90.0,
                    max=90.0,
                    step=1.0,
                    tooltip="Degrees; above 0 from above. Good: -10..50.",
                ),
                *LAMP,
                *_colour(optional=True),
            ],
            outputs=[
                sockets.SHLight.Output(display_name="light", tooltip="The lights, in order."),
                io.Image.Output(display_name="ball", tooltip="A grey ball under each light."),
            ],
        )

    @classmethod
    def execute(
        cls, face_model, face_code, frames, start, arc, elevation, intensity, ambient, softness,
        red=1.0, green=1.0, blue=1.0,
    ):  # fmt: skip
        head = host.head(face_model)
        face_code.require_head(head)
        if len(face_code) != 1:
            raise ValueError(f"'face_code' holds {len(face_code)} faces, an orbit goes around one")
        code = face_code.to(host.device())
        light = light_prior.orbit(
            code.light, frames, start, arc, elevation, intensity=intensity, ambient=ambient,
            colour=(red, green, blue), softness=softness, mean=head.light_mean, std=head.light_std,
        )  # fmt: skip
        ball = host.image(light_prior.ball(light))
        shown = _shown(cls, host.few(ball, 8), head, code)
        return io.NodeOutput(host.result(light), ball, ui=shown)


class MixLights(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="FaceRig_MixLights",
            display_name="Mix Lights",
            category="Face Rig/light",
            description=(
                "Blends two lights, switches both on at once, or goes from one to the other in steps."
            ),
            **sockets.aliases("blend lights", "interpolate light", "add lamps", "two lights"),
            inputs=[
                sockets.SHLight.Input("light_a", tooltip="The first light, or a batch."),
                sockets.SHLight.Input("light_b", tooltip="The second light, or as many."),
                io.Combo.Input(
                    "mode",
                    options=[WEIGHTED, LAMPS, SEQUENCE, ARC],
                    default=WEIGHTED,
                    tooltip=(
                        "weighted: the sum with the weights, as the picture's values blend. add lamps: "
                        "both lamps on, in linear light. sequence: from a to b in 'frames' lights, "
                        "straight or along an arc (as DiFaReli does)."
                    ),
                ),
                io.Float.Input(
                    "weight_a",
                    default=0.5,
                    min=0.0,
                    max=4.0,
                    step=0.05,
                    tooltip="Share of the first light. weighted: the two add to 1; add lamps: 1 is as it is.",
                ),
                io.Float.Input(
                    "weight_b",
                    default=0.5,
                    min=0.0,
                    max=4.0,
                    step=0.05,
                    tooltip=(
                        "Share of the second light. weighted: the two add to 1; add lamps: 1 is as it is."
                    ),
                ),
                io.Int.Input(
                    "frames",
                    default=8,
                    min=2,
                    max=240,
                    tooltip="Number of lights of a sequence, both ends among them. Good: 8..48.",
                ),
            ],
            outputs=[
                sockets.SHLight.Output(display_name="light", tooltip="The mixed light, or the sequence."),
                io.Image.Output(display_name="ball", tooltip="A grey ball under each light."),
            ],
        )

    @classmethod
    def execute(cls, light_a, light_b, mode, weight_a, weight_b, frames):
        a, b = (sh.check_light(v, n) for v, n in ((light_a, "'light_a'"), (light_b, "'light_b'")))
        n, weights = max(len(a), len(b)), (weight_a, weight_b)
        if mode in (WEIGHTED, LAMPS) and not sum(weights):
            raise ValueError("'weight_a' and 'weight_b' are both 0: that is no light at all")
        if mode in (SEQUENCE, ARC):
            if n > 1:
                raise ValueError(
                    f"'light_a' and 'light_b' hold {len(a)} and {len(b)} lights: a sequence goes from one to "
                    "one other"
                )
            light = sh.interpolate(a, b, torch.linspace(0, 1, frames).to(a), spherical=mode == ARC)
        elif mode == WEIGHTED:
            light = sh.mix([host.repeat(v, n, s) for v, s in ((a, "light_a"), (b, "light_b"))], weights)
        elif mode == LAMPS:
            linear = [host.repeat(sh.decode_light(v), n, s) for v, s in ((a, "light_a"), (b, "light_b"))]
            light = sh.encode_light(sh.mix(linear, weights))
        else:
            raise ValueError(f"'mode' is {WEIGHTED}, {LAMPS}, {SEQUENCE} or {ARC}, not '{mode}'")
        return output(light, cls)
