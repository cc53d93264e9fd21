"""The denoiser's nodes: DiffusionRig Condition, DDIM Invert, Conditioned Sample."""

import torch
from comfy_api.latest import io, ui

from ..rig_core import diffusion, pipeline, samplers
from . import host, sockets

STEPS = io.Int.Input(
    "steps",
    default=20,
    min=1,
    max=1000,
    tooltip="Steps of the sampler. 20 is good; ab2 wants at least 15; inversion gains up to 50.",
)
SPACING = io.Combo.Input(
    "spacing",
    options=["quad", "even"],
    default="quad",
    tooltip=(
        "Where the steps lie: quad puts most of them near the picture (best for ab2 and heun), even "
        "spreads them."
    ),
)


SEED = io.Int.Input(
    "seed",
    default=0,
    min=0,
    max=2**63 - 1,
    control_after_generate=True,
    tooltip="Seed of the random noise. Keep it fixed while you change the edit.",
)


def _random(seed, n, height, width):
    """Noise [n,3,height,width], drawn on the CPU so that a seed means the same everywhere."""
    noise = torch.randn(n, 3, height, width, generator=torch.Generator().manual_seed(seed))
    return noise.to(host.device())


def _schedule(steps, spacing):
    prefix = {"quad": "quad", "even": ""}.get(spacing)
    if prefix is None:
        raise ValueError(f"'spacing' is quad or even, not '{spacing}'")
    return diffusion.respace(diffusion.linear_schedule(), f"{prefix}{steps}")


class DiffusionRigCondition(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="FaceRig_DiffusionRigCondition",
            display_name="DiffusionRig Condition",
            category="Face Rig/diffusion",
            description=(
                "What the denoiser is told: the buffers (geometry, light, albedo) and a global code of "
                "the photo "
                "(hair, background, everything else). Computed once, not once per step."
            ),
            inputs=[
                io.Model.Input("model", tooltip="From Load DiffusionRig."),
                io.Image.Input("image", tooltip="The aligned photo whose appearance is kept."),
                sockets.FaceBuffers.Input(
                    "buffers",
                    tooltip=(
                        "From Render Buffers, one face or one for each picture; unedited ones for DDIM "
                        "Invert."
                    ),
                ),
            ],
            outputs=[
                io.Conditioning.Output(
                    display_name="conditioning", tooltip="For Conditioned Sample or KSampler."
                )
            ],
        )

    @classmethod
    def execute(cls, model, image, buffers):
        rig = host.loaded_rig(model)
        x = host.pictures(image, "image")
        size = rig.config.image_size
        for name, got in ("image", x), ("buffers", buffers.mask):
            if tuple(got.shape[2:]) != (size, size):
                raise ValueError(
                    f"'{name}' is {got.shape[3]} x {got.shape[2]} pixels, this DiffusionRig works at "
                    f"{size} x {size}: "
                    f"set the size of Align Face to {size}"
                )
        n = max(len(x), len(buffers))
        x, buffers = host.repeat(x, n, "image"), host.repeat(buffers, n, "buffers")
        physical = buffers.stack().to(x.device)
        return io.NodeOutput(host.conditioning(rig.condition(physical, x * 2 - 1)))


class DDIMInvert(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="FaceRig_DDIMInvert",
            display_name="DDIM Invert",
            category="Face Rig/diffusion",
            description=(
                "Finds the noise that the sampler turns back into the photo, so that an edit keeps its "
                "details. "
                "Use the same steps, solver and spacing at Conditioned Sample."
            ),
            inputs=[
                io.Model.Input("model", tooltip="From Load DiffusionRig."),
                io.Conditioning.Input("conditioning", tooltip="Of the face under the photo's own light."),
                io.Image.Input("image", tooltip="The aligned photo, or the moved one from Move Photo."),
                STEPS,
                io.Combo.Input(
                    "solver",
                    options=["ab2", "ddim", "heun"],
                    default="ab2",
                    tooltip=(
                        "ab2: second order, one evaluation a step. heun: two a step, for under 15 steps. "
                        "ddim: first order."
                    ),
                ),
                SPACING,
                SEED,
                io.Mask.Input(
                    "hidden",
                    optional=True,
                    tooltip="From Move Photo: where random noise is put in, to be painted new.",
                ),
            ],
            outputs=[
                io.Latent.Output(display_name="noise", tooltip="For Conditioned Sample only; not a picture."),
                io.Image.Output(
                    display_name="before",
                    tooltip="What the model makes of this noise without an edit: for Paste Back.",
                ),
            ],
        )

    @classmethod
    def execute(cls, model, conditioning, image, steps, solver, spacing, seed, hidden=None):
        rig, condition = host.loaded_rig(model), host.condition(conditioning)
        x = host.repeat(host.pictures(image, "image"), len(condition), "image") * 2 - 1
        n, height, width = len(x), *x.shape[2:]
        fresh = _random(seed, 1, height, width)
        where = torch.zeros(1, 1, 1, 1) if hidden is None else host.mask_pictures(hidden, "hidden", height)
        where = host.repeat(where, n, "hidden").to(x)
        parts = host.batches(model, n, height, width)
        progress, schedule = host.Progress(2 * steps * len(parts)), _schedule(steps, spacing)
        step, noise, before = progress.callback, [], []
        for p in parts:
            x_T = samplers.invert(rig, x[p], condition[p], schedule, solver, callback=step)
            noise.append(pipeline.variance_mix(x_T, fresh, where[p]))
            back = samplers.sample(rig, noise[-1], condition[p], schedule, solver, callback=step)
            before.append(host.image(back * 0.5 + 0.5))
        before = torch.cat(before)
        return io.NodeOutput(
            host.noise_latent(torch.cat(noise)), before, ui=ui.PreviewImage(before[:4], cls=cls)
        )


class ConditionedSample(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="FaceRig_ConditionedSample",
            display_name="Conditioned Sample",
            category="Face Rig/diffusion",
            description=(
                "Paints the face anew under the conditioning, from random noise or from the noise of DDIM "
                "Invert."
            ),
            inputs=[
                io.Model.Input("model", tooltip="From Load DiffusionRig."),
                io.Conditioning.Input("conditioning", tooltip="From DiffusionRig Condition."),
                SEED,
                STEPS,
                io.Combo.Input(
                    "solver",
                    options=["ab2", "ddim", "heun", "ddpm"],
                    default="ab2",
                    tooltip=(
                        "ab2: second order, one evaluation a step. ddim: first order. heun: two a step. "
                        "ddpm: random."
                    ),
                ),
                SPACING,
                io.Boolean.Input(
                    "same_noise",
                    default=True,
                    tooltip=(
                        "One noise for all pictures of a batch (a turning light stays steady), or one each."
                    ),
                ),
                io.Latent.Input(
                    "noise",
                    optional=True,
                    tooltip="From DDIM Invert: keeps the photo's details, in place of random noise.",
                ),
                io.Conditioning.Input(
                    "unedited",
                    optional=True,
                    tooltip="Of the unedited face, as DDIM Invert has it: what guidance leads away from.",
                ),
                io.Float.Input(
                    "guidance",
                    default=pipeline.GUIDANCE,
                    min=1.0,
                    max=4.0,
                    step=0.1,
                    optional=True,
                    tooltip=(
                        "How strongly the edit is driven, when 'unedited' is connected. 1: as trained; "
                        "1.5 to 2 is good; above 1 a step costs two evaluations."
                    ),
                ),
            ],
            outputs=[io.Image.Output(display_name="image", tooltip="The aligned faces, painted anew.")],
        )

    @classmethod
    def execute(
        cls, model, conditioning, seed, steps, solver, spacing, same_noise,
        noise=None, unedited=None, guidance=pipeline.GUIDANCE,
    ):  # fmt: skip
        rig, condition = host.loaded_rig(model), host.condition(conditioning)
        if not 1 <= guidance <= 4:
            raise ValueError(f"'guidance' lies between 1 and 4, not at {guidance}")
        before = None
        if unedited is not None and guidance > 1:
            before = host.condition(unedited)
            if len(before) not in (1, len(condition)):
                raise ValueError(
                    f"'unedited' holds {len(before)} faces, 'conditioning' {len(condition)}: "
                    "give one, or as many"
                )
        n, height, width = len(condition), *condition.physical.shape[2:]
        start = (
            host.noise(noise) if noise is not None else _random(seed, 1 if same_noise else n, height, width)
        )
        x_T = host.repeat(start, n, "noise").to(host.device())
        generator = torch.Generator().manual_seed(seed + 1)  # of the steps of ddpm
        parts = host.batches(model, n, height, width)
        progress, schedule = host.Progress(steps * len(parts)), _schedule(steps, spacing)
        made = []
        for p in parts:
            denoiser = rig
            if before is not None:
                denoiser = pipeline.guided(rig, before if len(before) == 1 else before[p], guidance)
            x = samplers.sample(
                denoiser,
                x_T[p],
                condition[p],
                schedule,
                solver,
                generator=generator,
                callback=progress.callback,
            )  # fmt: skip
            made.append(host.image(x * 0.5 + 0.5))
        out = torch.cat(made)
        return io.NodeOutput(out, ui=ui.PreviewImage(out[:4], cls=cls))
