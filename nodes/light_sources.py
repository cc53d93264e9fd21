"""Light from elsewhere: Light From Environment Map, Light Presets."""

import torch
from comfy_api.latest import io, ui

from ..rig_core import environment, light_prior
from . import host, sockets

SRGB, LINEAR = "sRGB", "linear"
SITTER, BEHIND = "from the sitter", "from behind the camera"
ALL = "all"
MODEL = (
    "The one that the face was fitted with. With it and 'face_code' the light is brought into the range that "
    "the models were trained on (use this); without both it is the physical light."
)


def _face(face_model, face_code):
    """The photo's light and the head's prior, or (None, {}). Raises ValueError for one without the other."""
    if (face_model is None) != (face_code is None):
        missing = "face_model" if face_model is None else "face_code"
        raise ValueError(f"'{missing}' is missing: connect 'face_model' and 'face_code', or neither")
    if face_model is None:
        return None, {}
    head = host.head(face_model)
    face_code.require_head(head)
    return face_code.light.to(host.device()), {"mean": head.light_mean, "std": head.light_std}


def output(light, cls):
    """What a node of lights gives: the lights, a grey ball under each, and some of the balls below it."""
    ball = host.image(light_prior.ball(light))
    return io.NodeOutput(host.result(light), ball, ui=ui.PreviewImage(host.few(ball, 8), cls=cls))


class LightFromEnvironmentMap(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="FaceRig_LightFromEnvironmentMap",
            display_name="Light From Environment Map",
            category="Face Rig/light",
            description="The light that a 360 degree panorama (HDRI) sheds on a face.",
            **sockets.aliases("hdri", "panorama", "equirectangular", "image based lighting", "ibl", "360"),
            inputs=[
                io.Image.Input(
                    "panorama",
                    tooltip=(
                        "Equirectangular, twice as wide as high, any size, the top row straight up. Values "
                        "above 1 count: an HDR file knows how bright a window is, an ordinary one does not."
                    ),
                ),
                io.Combo.Input(
                    "encoding",
                    options=[SRGB, LINEAR],
                    default=SRGB,
                    tooltip="sRGB for PNG and JPG; linear for HDR and EXR. The wrong one is flat or harsh.",
                ),
                io.Combo.Input(
                    "view",
                    options=[SITTER, BEHIND],
                    default=SITTER,
                    tooltip=(
                        "What the middle of the panorama shows. from the sitter: what the face looks at, so "
                        "it lights from the front. from behind the camera: what the camera sees behind the "
                        "face, so it lights from the back."
                    ),
                ),
                io.Float.Input(
                    "yaw",
                    default=0.0,
                    min=-180.0,
                    max=180.0,
                    step=1.0,
                    tooltip=(
                        "Degrees that the surroundings turn: light from the camera's side goes to the right "
                        "of the picture above 0, to the left below. Good: any."
                    ),
                ),
                io.Float.Input(
                    "pitch",
                    default=0.0,
                    min=-90.0,
                    max=90.0,
                    step=1.0,
                    tooltip=(
                        "Degrees that the surroundings tilt: above 0 what is in front goes up. Good: -30..30."
                    ),
                ),
                io.Float.Input(
                    "exposure",
                    default=0.0,
                    min=-10.0,
                    max=10.0,
                    step=0.1,
                    tooltip=(
                        "Stops; 1 more is twice the light. With a face 0 keeps the photo's brightness, "
                        "whatever the panorama's scale. Good: -1..1."
                    ),
                ),
                sockets.FaceModel.Input("face_model", optional=True, tooltip=MODEL),
                sockets.FaceCode.Input(
                    "face_code",
                    optional=True,
                    tooltip="The face to be lit: its light sets level and colour. One, or one a panorama.",
                ),
            ],
            outputs=[
                sockets.SHLight.Output(
                    display_name="light", tooltip="One a panorama: for SH Light Edit, DiFaReli Condition."
                ),
                io.Image.Output(display_name="ball", tooltip="A grey ball under each light."),
            ],
        )

    @classmethod
    def execute(cls, panorama, encoding, view, yaw, pitch, exposure, face_model=None, face_code=None):
        sockets.choice("encoding", encoding, (SRGB, LINEAR))
        sockets.choice("view", view, (SITTER, BEHIND))
        own, prior = _face(face_model, face_code)
        found = []
        for x in host.radiance(panorama, "panorama"):
            try:
                found.append(environment.panorama_light(x, yaw, pitch, view == BEHIND, encoding == SRGB))
            except ValueError as e:
                raise ValueError(f"'panorama': {e}") from e
        found = torch.cat(found).to(host.device())
        if own is not None:
            n = max(len(found), len(own))
            found, own = host.repeat(found, n, "panorama"), host.repeat(own, n, "face_code")
        return output(environment.surround(found, exposure, own, **prior), cls)


class LightPresets(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="FaceRig_LightPresets",
            display_name="Light Presets",
            category="Face Rig/light",
            description="A portrait photographer's lights by name: Rembrandt, butterfly, split and so on.",
            **sockets.aliases("rembrandt", "butterfly", "split light", "golden hour", "studio light"),
            inputs=[
                io.Combo.Input(
                    "preset",
                    options=[*light_prior.PRESETS, ALL],
                    default=next(iter(light_prior.PRESETS)),
                    tooltip="The light; all gives one of each, in this order, for a contact sheet.",
                ),
                io.Float.Input(
                    "intensity",
                    default=1.0,
                    min=0.0,
                    max=4.0,
                    step=0.05,
                    tooltip="Times the preset's lamp, linear; its fill light stays. Good: 0.5..1.5.",
                ),
                io.Boolean.Input(
                    "mirror",
                    default=False,
                    tooltip="Exchanges left and right: the lamp comes from the other side.",
                ),
                sockets.FaceModel.Input("face_model", optional=True, tooltip=MODEL),
                sockets.FaceCode.Input(
                    "face_code",
                    optional=True,
                    tooltip="The face to be lit: its own light sets level and colour. With all, one face.",
                ),
            ],
            outputs=[
                sockets.SHLight.Output(
                    display_name="light", tooltip="One a face, or all presets: for SH Light Edit."
                ),
                io.Image.Output(display_name="ball", tooltip="A grey ball under each light."),
            ],
        )

    @classmethod
    def execute(cls, preset, intensity, mirror, face_model=None, face_code=None):
        sockets.choice("preset", preset, (*light_prior.PRESETS, ALL))
        own, prior = _face(face_model, face_code)
        own = torch.zeros(1, 9, 3, device=host.device()) if own is None else own
        names = list(light_prior.PRESETS) if preset == ALL else [preset]
        if len(names) > 1 and len(own) > 1:
            raise ValueError(f"'face_code' holds {len(own)} faces: '{ALL}' shows the presets on one")
        made = [light_prior.preset(own, n, intensity, mirror, **prior) for n in names]
        return output(torch.cat(made), cls)
