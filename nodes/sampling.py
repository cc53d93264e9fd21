"""For the host's own samplers: Empty Pixel Latent, Guided Sigmas, Clip Denoised."""

from comfy_api.latest import io

from ..rig_core import diffusion
from . import host, sockets

EVEN, STRIDE, QUAD, SECTIONS = "even", "ddim", "quad", "sections"


class EmptyPixelLatent(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="FaceRig_EmptyPixelLatent",
            display_name="Empty Pixel Latent",
            category="Face Rig/diffusion",
            description=(
                "An empty LATENT for KSampler on a model of this pack: three channels at full size. The "
                "host's own Empty Latent Image is an eighth of the size and does not fit."
            ),
            inputs=[
                io.Int.Input(
                    "width",
                    default=128,
                    min=16,
                    max=2048,
                    step=16,
                    tooltip="Pixels: the image_size of the model's loader. Without 'conditioning' only.",
                ),
                io.Int.Input(
                    "height",
                    default=128,
                    min=16,
                    max=2048,
                    step=16,
                    tooltip="Pixels: the same as 'width'. Without 'conditioning' only.",
                ),
                io.Int.Input(
                    "batch_size",
                    default=1,
                    min=1,
                    max=4096,
                    tooltip="Pictures; at least as many as the conditioning holds.",
                ),
                io.Conditioning.Input(
                    "conditioning",
                    optional=True,
                    tooltip=(
                        "From DiffusionRig Condition or DiFaReli Condition: size and number of pictures are "
                        "taken from it."
                    ),
                ),
            ],
            outputs=[io.Latent.Output(display_name="latent", tooltip="For KSampler's latent_image.")],
            **sockets.aliases("noise", "latent image", "ksampler"),
        )

    @classmethod
    def execute(cls, width, height, batch_size, conditioning=None):
        if conditioning is not None:
            given = sockets.given(conditioning)
            batch_size, (height, width) = max(batch_size, len(given)), given.size
        return io.NodeOutput(host.empty_latent(batch_size, height, width))


class GuidedSigmas(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="FaceRig_GuidedSigmas",
            display_name="Guided Sigmas",
            category="Face Rig/diffusion",
            description=(
                "The noise levels of guided diffusion's timestep spacings, for Sampler Custom: with the "
                "euler sampler this is the published DDIM."
            ),
            inputs=[
                io.Model.Input("model", tooltip="From Load DiffusionRig or Load DiFaReli."),
                io.Int.Input(
                    "steps",
                    default=20,
                    min=1,
                    max=1000,
                    tooltip="Steps of the sampler. 20 is good, 50 for inversion, 250 and more as published.",
                ),
                io.Combo.Input(
                    "spacing",
                    options=[EVEN, STRIDE, QUAD, SECTIONS],
                    default=EVEN,
                    tooltip=(
                        "even: over all 1000, both ends kept. ddim: every n-th from 0, as in the DDIM paper; "
                        "for 1000 / steps without remainder. quad: most of them near the picture. sections: "
                        "as written in 'sections'."
                    ),
                ),
                io.Float.Input(
                    "denoise",
                    default=1.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip=(
                        "Below 1 a picture is kept in part: the steps go over the less noisy part of the "
                        "levels alone. 0.3 to 0.6 is good."
                    ),
                ),
                io.String.Input(
                    "sections",
                    default="10,10,10",
                    optional=True,
                    tooltip=(
                        "For sections: how many levels of each equal part of the 1000, the least noisy part "
                        "first. 'steps' does not count then."
                    ),
                ),
            ],
            outputs=[
                io.Sigmas.Output(
                    display_name="sigmas",
                    tooltip="For Sampler Custom; through Flip Sigmas from a picture to its noise.",
                )
            ],
            **sockets.aliases("scheduler", "ddim", "timesteps", "spacing"),
        )

    @classmethod
    def execute(cls, model, steps, spacing, denoise, sections=""):
        host.denoiser(model)
        if spacing not in (EVEN, STRIDE, QUAD, SECTIONS):
            raise ValueError(f"'spacing' is {EVEN}, {STRIDE}, {QUAD} or {SECTIONS}, not '{spacing}'")
        if not 0 <= denoise <= 1:
            raise ValueError(f"'denoise' lies between 0 and 1, not at {denoise}")
        if spacing == SECTIONS:
            schedule = _schedule(sections, "sections")
            return io.NodeOutput(host.sigmas(model, schedule, round(len(schedule) * denoise)))
        if denoise == 0:
            return io.NodeOutput(host.sigmas(model, diffusion.linear_schedule(), 0))
        prefix = {EVEN: "", STRIDE: "ddim", QUAD: "quad"}[spacing]
        total = int(steps / denoise)
        if total > 1000:
            raise ValueError(
                f"'steps' {steps} at 'denoise' {denoise:g} asks for {total} levels, there are 1000: lower one"
            )
        return io.NodeOutput(host.sigmas(model, _schedule(f"{prefix}{total}", "steps"), steps))


def _schedule(spec: str, name: str):
    try:
        return diffusion.respace(diffusion.linear_schedule(), spec)
    except ValueError as e:
        raise ValueError(f"'{name}': {e}") from e


class ClipDenoised(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="FaceRig_ClipDenoised",
            display_name="Clip Denoised",
            category="Face Rig/diffusion",
            description=(
                "Has the host's samplers keep the picture that each step expects within its range, as the "
                "published sampling does and Conditioned Sample always does."
            ),
            inputs=[io.Model.Input("model", tooltip="From Load DiffusionRig or Load DiFaReli.")],
            outputs=[
                io.Model.Output(
                    display_name="model", tooltip="The same model for KSampler or Sampler Custom."
                )
            ],
            **sockets.aliases("clip_denoised", "clamp", "threshold"),
        )

    @classmethod
    def execute(cls, model):
        host.denoiser(model)
        return io.NodeOutput(host.clipped(model))
