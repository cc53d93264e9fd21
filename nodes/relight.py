"""What DiFaReli is told of a photo: ArcFace Embed, Shadow Scalar, Face Parse, DiFaReli Condition."""

import torch
from comfy_api.latest import io, ui

from ..rig_core import conditions, matte, pipeline
from ..rig_core.denoisers.relight import DiFaReli
from ..rig_core.estimators import identity, parsing, shadow
from ..rig_core.estimators.identity import ArcFace
from ..rig_core.estimators.parsing import BiSeNet
from ..rig_core.estimators.shadow import DiffAEShadow, ShadowNet
from . import host, sockets

RANGE = 20.0  # what a shadow scalar may be at the most, either way
CAST_SHADOW = io.Boolean.Input(
    "cast_shadow",
    default=True,
    tooltip=(
        "The shadow that the head casts on itself is drawn into the grey head. Keep it on; "
        "off for the published models, which were trained without."
    ),
)
LIGHTS = 8  # at a time, so that a long orbit can be stopped


class ArcFaceEmbed(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="FaceRig_ArcFaceEmbed",
            display_name="ArcFace Embed",
            category="Face Rig/estimate",
            description="Who is in the picture, as a vector: DiFaReli keeps the person by it.",
            **sockets.aliases("identity", "face recognition", "face embedding"),
            inputs=[
                sockets.IdentityEncoder.Input("identity_encoder", tooltip="From Load Identity Encoder."),
                io.Image.Input("image", tooltip="Aligned faces (Align Face), any size."),
            ],
            outputs=[
                sockets.FaceEmbed.Output(
                    display_name="embed", tooltip="One identity vector a picture: for DiFaReli Condition."
                )
            ],
        )

    @classmethod
    def execute(cls, identity_encoder, image):
        net = host.loaded_estimator(identity_encoder, (ArcFace,), "identity_encoder", "Load Identity Encoder")
        progress, made = host.Progress(_count_squares(image)), []
        for x in _each(image):
            made.append(host.result(identity.embed(net, x)))
            progress.step()
        return io.NodeOutput(torch.cat(made))


class ShadowScalar(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="FaceRig_ShadowScalar",
            display_name="Shadow Scalar",
            category="Face Rig/estimate",
            description="How strong the cast shadows on a face are, as one number.",
            **sockets.aliases("cast shadow", "shadow strength"),
            inputs=[
                sockets.ShadowEstimator.Input("shadow_estimator", tooltip="From Load Shadow Estimator."),
                io.Image.Input("image", tooltip="Aligned faces (Align Face), any size."),
            ],
            outputs=[
                io.Float.Output(
                    display_name="shadow",
                    tooltip=(
                        "Log-odds of strong shadows, about -6 (none) to 6 (hard); 1.28 is undecided. A list "
                        "of numbers for several pictures."
                    ),
                )
            ],
        )

    @classmethod
    def execute(cls, shadow_estimator, image):
        kinds = (ShadowNet, DiffAEShadow)
        net = host.loaded_estimator(shadow_estimator, kinds, "shadow_estimator", "Load Shadow Estimator")
        progress, made = host.Progress(_count_squares(image)), []
        for x in _each(image):
            made.append(float(shadow.scalar(net, x)))
            progress.step()
        shown = ui.PreviewText(", ".join(f"{v:.2f}" for v in made))
        return io.NodeOutput(made[0] if len(made) == 1 else made, ui=shown)


class FaceParse(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="FaceRig_FaceParse",
            display_name="Face Parse",
            category="Face Rig/estimate",
            description="Names every pixel of an aligned face: skin, hair, eyes, glasses, cloth and so on.",
            **sockets.aliases("face segmentation", "face mask", "hair mask", "BiSeNet"),
            inputs=[
                sockets.FaceParser.Input("face_parser", tooltip="From Load Face Parser."),
                io.Image.Input("image", tooltip="Aligned faces (Align Face), any size; 512 px is best."),
                io.Combo.Input(
                    "part",
                    options=list(parsing.SELECTORS),
                    default="head",
                    tooltip="What the mask shows. head (face, neck, hair) is what DiFaReli Condition wants.",
                ),
            ],
            outputs=[
                io.Mask.Output(display_name="mask", tooltip="White where the chosen part is."),
                io.Image.Output(display_name="labels", tooltip="All 19 classes, each in its own colour."),
            ],
        )

    @classmethod
    def execute(cls, face_parser, image, part):
        net = host.loaded_estimator(face_parser, (BiSeNet,), "face_parser", "Load Face Parser")
        progress, masks, shown = host.Progress(_count_squares(image)), [], []
        for x in _each(image):
            labels = parsing.parse(net, x)
            masks.append(host.mask(parsing.select(labels, part)))
            shown.append(host.image(parsing.colours(labels) * 0.7 + x * 0.3))
            progress.step()
        shown = host.joined(shown)
        return io.NodeOutput(host.joined(masks), shown, ui=ui.PreviewImage(shown[:4], cls=cls))


class DiFaReliCondition(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="FaceRig_DiFaReliCondition",
            display_name="DiFaReli Condition",
            category="Face Rig/diffusion",
            description=(
                "What DiFaReli is told: a grey head under the light, the photo without the head, and who "
                "it is. Several lights give a batch that shares all but the light."
            ),
            **sockets.aliases("relight", "face relighting", "conditioning"),
            inputs=[
                io.Model.Input("model", tooltip="From Load DiFaReli."),
                sockets.FaceModel.Input("face_model", tooltip="The one that the face was fitted with."),
                sockets.FaceCode.Input(
                    "face_code", tooltip="From DECA Encode or Fit to Landmarks, of the same picture."
                ),
                io.Image.Input("image", tooltip="The aligned photo, at the image_size of Load DiFaReli."),
                sockets.FaceEmbed.Input("embed", tooltip="From ArcFace Embed, of the same picture."),
                io.Float.Input(
                    "shadow",
                    force_input=True,
                    tooltip=f"From Shadow Scalar: cast shadow in log-odds, -{RANGE:g} to {RANGE:g}.",
                ),
                io.Float.Input(
                    "shadow_change",
                    default=0.0,
                    min=-RANGE,
                    max=RANGE,
                    step=0.25,
                    tooltip=(
                        "Added to 'shadow', in log-odds: above 0 stronger cast shadows, below 0 weaker. "
                        "Good: -6..6; the sum may be -20 to 20."
                    ),
                ),
                io.Int.Input(
                    "strengths",
                    default=1,
                    min=1,
                    max=64,
                    tooltip=(
                        "Above 1: that many pictures, from no change of the shadow to all of it. Good: 5."
                    ),
                ),
                CAST_SHADOW,
                sockets.SHLight.Input(
                    "light",
                    optional=True,
                    tooltip="New lights, one or many (SH Light Edit, Light Orbit). Without: the photo's own.",
                ),
                io.Mask.Input(
                    "head",
                    optional=True,
                    tooltip=(
                        "Face, neck and hair in the aligned picture, from Face Parse. Without it they are "
                        "found by the fitted head and the colours."
                    ),
                ),
            ],
            outputs=[
                io.Conditioning.Output(
                    display_name="conditioning", tooltip="For DDIM Invert (own light) or Conditioned Sample."
                ),
                io.Mask.Output(display_name="matte", tooltip="Face, neck and hair: for Paste Back's mask."),
            ],
        )

    @classmethod
    def execute(
        cls, model, face_model, face_code, image, embed, shadow, shadow_change, strengths, cast_shadow,
        light=None, head=None,
    ):  # fmt: skip
        net, (n, *sides) = host.denoiser(model, DiFaReli), host.check_pictures(image, "image")
        head_model, size = host.head(face_model), host.picture_size(net, model.model.meta)
        face_code.require_head(head_model)
        _check_sizes(sides, face_code, size)
        amounts = _amounts(shadow, shadow_change, strengths)
        photos = max(n, len(face_code), len(embed))
        image, embed = host.repeat(image, photos, "image"), host.repeat(embed, photos, "embed")
        code = host.repeat(face_code, photos, "face_code")
        light = code.light if light is None else light
        head = head if head is None else host.repeat(head.reshape(-1, *head.shape[-2:]), photos, "head")
        if photos > 1:  # video: each frame its own light, or one for all
            light = host.repeat(light, photos, "light")
            amounts = host.repeat(amounts, photos, "shadow")
        elif len(light) > 1 < len(amounts) != len(light):
            raise ValueError(
                f"{len(light)} lights and {len(amounts)} shadows: give one of either, or as many"
            )
        runs = -(-len(light) // LIGHTS) if photos == 1 else photos
        progress, spatial, vector, mattes = host.Progress(runs), [], [], []
        for i in range(photos):
            own = slice(i, i + 1)
            some = slice(None) if photos == 1 else own
            x, here = host.pictures(image[own], "image"), code[i].to(host.device())
            if head is None:
                mask = matte.head_matte(head_model, here, x)
            else:
                mask = host.mask_pictures(head[own], "head", size)
            portrait = pipeline.Portrait(x, None, here)
            subject = pipeline.Subject(
                conditions.background(x, mask), embed[own].to(x), amounts[some].to(x), mask
            )
            if net.config.image_size < size:
                portrait, subject = pipeline.shrink(portrait, subject, net.config.image_size)
            seen, said = _tell(net, head_model, portrait, subject, light[some].to(x), cast_shadow, progress)
            check_vector(said, net, code, embed)
            spatial.append(seen)
            vector.append(said)
            mattes.append(host.mask(subject.matte))
        spatial, vector = host.joined(spatial), host.joined(vector)
        shown = host.few(spatial)
        shown = host.image(torch.cat([shown[:, :3], shown[:, 3:] * 0.5 + 0.5], 3))
        return io.NodeOutput(
            sockets.conditioning(DiFaReli, spatial, vector),
            host.joined(mattes),
            ui=ui.PreviewImage(shown, cls=cls),
        )


def _tell(net, head, portrait, subject, light, cast, progress):
    """Spatial [N,6,s,s] and vector [M,D] of one photo under N lights, some lights at a time."""
    spatial = []
    for lights in light.split(LIGHTS):
        seen, vector = pipeline.relight_inputs(net, head, portrait, subject, lights, cast=cast)
        spatial.append(host.result(seen))
        progress.step(seen[:, :3] * 2 - 1)
    return torch.cat(spatial), host.result(vector)


def _count_squares(image) -> int:
    """The number of aligned pictures of IMAGE. Raises ValueError for others."""
    n, height, width = host.check_pictures(image, "image", most=2048)
    if height != width:
        raise ValueError(
            f"'image' is {width} x {height} pixels, an aligned face is square: put Align Face before it"
        )
    return n


def _each(image):
    """The pictures of IMAGE one by one, [1,3,s,s]."""
    return (host.pictures(image[i : i + 1], "image") for i in range(len(image)))


def _check_sizes(sides, code, size: int) -> None:
    for name, (height, width) in (("image", sides), ("face_code", code.size)):
        if (height, width) != (size, size):
            raise ValueError(
                f"'{name}' is of {width} x {height} pixels, this DiFaReli works at {size} x {size}: "
                f"set the size of Align Face to {size}"
            )


def _amounts(given, change: float, strengths: int):
    """Shadow scalars [K,1] of the pictures to make."""
    own = torch.as_tensor(given, dtype=torch.float32).reshape(-1, 1)
    if not own.isfinite().all():
        raise ValueError("'shadow' is not a number: look at the node that made it")
    if strengths > 1 and len(own) > 1:
        raise ValueError("'strengths' is for one photo; for several leave it at 1")
    amounts = conditions.shadow_sweep(own, strengths, by=change) if strengths > 1 else own + change
    if amounts.abs().max() > RANGE:
        raise ValueError(
            f"the shadow scalar would be {float(amounts[amounts.abs().argmax()]):.3g}, "
            f"but it lies between -{RANGE:g} and {RANGE:g} (usual: -6 to 6): change 'shadow' or "
            f"'shadow_change'"
        )
    return amounts


def check_vector(vector, net, code, embed) -> None:
    """Raise ValueError when a vector [N,D] of codes and embeddings is not of the length that net takes."""
    wanted = net.config.cond_dim
    if vector.shape[1] != wanted:
        raise ValueError(
            f"the '{code.head}' head gives {vector.shape[1] - embed.shape[1] - 1} numbers and the identity "
            f"encoder {embed.shape[1]}, with the shadow {vector.shape[1]} in all, but this DiFaReli takes "
            f"{wanted}: use the Load Face Model and Load Identity Encoder files that it was trained with"
        )
