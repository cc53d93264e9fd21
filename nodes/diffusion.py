"""The denoiser's nodes: DiffusionRig Condition, DDIM Invert, Conditioned Sample."""

import torch
from comfy_api.latest import io, ui

from ..rig_core import conditions, diffusion, pipeline, samplers
from ..rig_core.denoisers.rig import DiffusionRig
from . import host, sockets

FAST, BALANCED, OFFICIAL = "fast (20+20)", "balanced (quad33 ab2)", "official 1000"
PRESETS = {
    FAST: ("quad20", "ab2"),
    BALANCED: (pipeline.RELIGHT_STEPS, pipeline.RELIGHT_SOLVER),
    OFFICIAL: ("1000", "ddim"),
}
CUSTOM, AS_INVERTED = "custom", "as inverted"
SPACINGS = ["quad", "even"]
INVERT_PRESETS, INVERT_SOLVERS = [*PRESETS, CUSTOM], ["ab2", "ddim", "heun"]
SAMPLE_PRESETS, SAMPLE_SOLVERS = [AS_INVERTED, *PRESETS, CUSTOM], ["ab2", "ddim", "heun", "ddpm"]

STEPS = io.Int.Input(
    "steps",
    default=20,
    min=1,
    max=1000,
    tooltip="For custom: steps of the sampler. 20 is good; ab2 wants at least 15; inversion gains up to 50.",
)
SPACING = io.Combo.Input(
    "spacing",
    options=SPACINGS,
    default="quad",
    tooltip=(
        "For custom. Where the steps lie: quad puts most of them near the picture (best for ab2 and "
        "heun), even spreads them."
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
    """Noise [n,3,height,width] on the CPU, so that a seed means the same everywhere."""
    return torch.randn(n, 3, height, width, generator=torch.Generator().manual_seed(seed))


def _how(preset, steps, solver, spacing, presets, solvers) -> tuple[str, str]:
    """Timestep spacing (see diffusion.respace) and solver of a preset, or of the widgets.

    presets, solvers: those on the node's own lists, ValueError for others.
    """
    sockets.choice("preset", preset, presets)
    sockets.choice("solver", solver, solvers)
    sockets.choice("spacing", spacing, SPACINGS)
    return PRESETS.get(preset, (f"{'quad' if spacing == 'quad' else ''}{steps}", solver))


def _schedule(spec: str):
    return diffusion.respace(diffusion.linear_schedule(), spec)


def _rows(shifts, rows: slice):
    """Of mean matching's shifts [N,B,3] those of some pictures; one serves all."""
    return shifts if shifts is None or shifts.shape[1] == 1 else shifts[:, rows]


class DiffusionRigCondition(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="FaceRig_DiffusionRigCondition",
            display_name="DiffusionRig Condition",
            category="Face Rig/diffusion",
            description=(
                "What the denoiser is told: the buffers (geometry, light, albedo) and a global code of "
                "the photo (hair, background, everything else). Computed once, not once per step."
            ),
            **sockets.aliases("conditioning", "physical buffers"),
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
        host.denoiser(model, DiffusionRig)
        rig = host.loaded(model)
        n, *sides = host.check_pictures(image, "image")
        size = rig.config.image_size
        for name, (height, width) in ("image", sides), ("buffers", buffers.mask.shape[2:]):
            if (height, width) != (size, size):
                raise ValueError(
                    f"'{name}' is {width} x {height} pixels, this DiffusionRig works at {size} x {size}: "
                    f"set the size of Align Face to {size}"
                )
        n = max(n, len(buffers))
        image, buffers = host.repeat(image, n, "image"), host.repeat(buffers, n, "buffers")
        parts = []
        for p in host.chunks(n, size, size):
            x = host.pictures(image[p], "image") * 2 - 1
            c = rig.condition(buffers[p].stack().to(x.device), x)
            parts.append([host.result(v) for v in (c.physical, c.code, c.gain, c.offset)])
        fields = [host.joined(list(v)) for v in zip(*parts, strict=True)]
        return io.NodeOutput(sockets.conditioning(DiffusionRig, *fields))


class DDIMInvert(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="FaceRig_DDIMInvert",
            display_name="DDIM Invert",
            category="Face Rig/diffusion",
            description=(
                "Finds the noise that the sampler turns back into the photo, so that an edit keeps its "
                "details. It does not depend on the edit: run once for a photo, it serves every light."
            ),
            **sockets.aliases("inversion", "invert image", "unsample"),
            inputs=[
                io.Model.Input("model", tooltip="From Load DiFaReli or Load DiffusionRig."),
                io.Conditioning.Input("conditioning", tooltip="Of the face under the photo's own light."),
                io.Image.Input("image", tooltip="The aligned photo, or the moved one from Move Photo."),
                STEPS,
                io.Combo.Input(
                    "solver",
                    options=INVERT_SOLVERS,
                    default="ab2",
                    tooltip=(
                        "For custom. ab2: second order, one evaluation a step. heun: two a step, for "
                        "under 15 steps. ddim: first order."
                    ),
                ),
                SPACING,
                SEED,
                io.Combo.Input(
                    "preset",
                    options=INVERT_PRESETS,
                    default=BALANCED,
                    tooltip=(
                        "fast: 20 evaluations. balanced: 33. official: all 1000 steps of ddim with mean "
                        "matching, as published. custom: steps, solver and spacing as set here."
                    ),
                ),
                io.Boolean.Input(
                    "match_means",
                    default=False,
                    tooltip=(
                        "Also correct the drift of each channel's mean, for as many evaluations again "
                        "(always with official): much closer to the photo. Switch it on for DiFaReli."
                    ),
                ),
                io.Boolean.Input(
                    "paint_back",
                    default=True,
                    tooltip=(
                        "Also paint the noise back without an edit, for as many evaluations again (free with "
                        "match_means). Off: 'before' is the photo itself."
                    ),
                ),
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
                    tooltip=(
                        "What the model makes of this noise without an edit, or the photo: for Paste Back."
                    ),
                ),
            ],
        )

    @classmethod
    def execute(
        cls, model, conditioning, image, steps, solver, spacing, seed, preset, match_means, paint_back,
        hidden=None,
    ):  # fmt: skip
        spec, solver = _how(preset, steps, solver, spacing, INVERT_PRESETS, INVERT_SOLVERS)
        net = host.loaded(model)
        given = sockets.condition(conditioning, net)
        _, height, width = host.check_pictures(image, "image")
        n, size = len(given), net.config.image_size
        if (height, width) not in (given.size, (host.picture_size(net, model.model.meta),) * 2):
            raise ValueError(
                f"'image' is {width} x {height} pixels, the conditioning is of {given.size[1]} x "
                f"{given.size[0]}: connect the same aligned picture to both"
            )
        image = host.repeat(image, n, "image")
        match = match_means or preset == OFFICIAL
        if match and hidden is not None:
            raise ValueError("'hidden' and mean matching do not go together: switch 'match_means' off")
        if hidden is not None:
            hidden = host.repeat(hidden.reshape(-1, *hidden.shape[-2:]), n, "hidden")
        parts, schedule = host.batches(model, n, size, size), _schedule(spec)
        progress = host.Progress((1 + (match or paint_back)) * len(schedule) * len(parts))
        how = {"schedule": schedule, "solver": solver, "callback": progress.callback}
        noise, shifts, before = [], [], []
        for p in parts:
            c = given.part(net, p)
            back = x = conditions.shrink(host.pictures(image[p], "image"), size) * 2 - 1
            if match:
                x_T, shift = samplers.invert_matched(net, x, c, **how)
                back = progress.last
                shifts.append(host.result(shift))
            else:
                x_T = samplers.invert(net, x, c, **how)
                if hidden is not None:
                    new = host.mask_pictures(hidden[p], "hidden", size)
                    x_T = pipeline.variance_mix(x_T, _random(seed, 1, size, size).to(x), new)
                if paint_back:
                    back = samplers.sample(net, x_T, c, **how)
            noise.append(host.result(x_T))
            before.append(host.image(back * 0.5 + 0.5))
        before = host.joined(before)
        found = samplers.Inversion(host.joined(noise), torch.cat(shifts, 1) if shifts else None, spec, solver)
        shown = ui.PreviewImage(host.few(before), cls=cls)
        return io.NodeOutput(sockets.noise_latent(found, model), before, ui=shown)


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
            **sockets.aliases("sampler", "relight", "KSampler"),
            inputs=[
                io.Model.Input("model", tooltip="From Load DiFaReli or Load DiffusionRig."),
                io.Conditioning.Input(
                    "conditioning", tooltip="From DiFaReli Condition or DiffusionRig Condition."
                ),
                SEED,
                STEPS,
                io.Combo.Input(
                    "solver",
                    options=SAMPLE_SOLVERS,
                    default="ab2",
                    tooltip=(
                        "For custom. ab2: second order, one evaluation a step. ddim: first order. heun: "
                        "two a step. ddpm: random."
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
                        "1.5 to 2 is good for DiffusionRig, 1 for DiFaReli; above 1 a step costs two "
                        "evaluations."
                    ),
                ),
                io.Combo.Input(
                    "preset",
                    options=SAMPLE_PRESETS,
                    default=AS_INVERTED,
                    optional=True,
                    tooltip=(
                        "as inverted: steps and solver that the noise was made with (without noise as "
                        "custom). fast: 20 evaluations. balanced: 33. official: all 1000. custom: as set "
                        "here."
                    ),
                ),
            ],
            outputs=[io.Image.Output(display_name="image", tooltip="The aligned faces, painted anew.")],
        )

    @classmethod
    def execute(
        cls, model, conditioning, seed, steps, solver, spacing, same_noise,
        noise=None, unedited=None, guidance=pipeline.GUIDANCE, preset=AS_INVERTED,
    ):  # fmt: skip
        how = _how(preset, steps, solver, spacing, SAMPLE_PRESETS, SAMPLE_SOLVERS)
        net = host.loaded(model)
        given = sockets.condition(conditioning, net)
        before = _unedited(unedited, guidance, net, len(given))
        n, (height, width), shifts = len(given), given.size, None
        if noise is None:
            x_T = _random(seed, 1 if same_noise else n, height, width)
        else:
            found = sockets.noise(noise, model, given.size)
            x_T, shifts, made_with = found.x_T, found.shifts, (found.steps, found.solver)
            how = made_with if preset == AS_INVERTED else how
            if how != made_with:
                raise ValueError(
                    f"'noise' was made with {found.steps} steps of {found.solver}, not with {how[0]} of "
                    f"{how[1]}: choose '{AS_INVERTED}' as 'preset'"
                )
        x_T = host.repeat(x_T, n, "noise")
        # of the steps of ddpm: one a picture, for how many go at once depends on the free memory
        generators = [torch.Generator().manual_seed(seed + 1 + i * (not same_noise)) for i in range(n)]
        parts, schedule = host.batches(model, n, height, width), _schedule(how[0])
        progress, made = host.Progress(len(schedule) * len(parts)), []
        for p in parts:
            f = net if before is None else pipeline.guided(net, before.part(net, p), guidance)
            start = x_T[p].to(host.device())
            correct = samplers.Inversion(start, _rows(shifts, p), *how).shift
            x = samplers.sample(
                f, start, given.part(net, p), schedule, how[1], generator=generators[p],
                callback=progress.callback, correct=correct,
            )  # fmt: skip
            made.append(host.image(x * 0.5 + 0.5))
        out = host.joined(made)
        return io.NodeOutput(out, ui=ui.PreviewImage(host.few(out), cls=cls))


def _unedited(conditioning, guidance: float, net, n: int):
    """What guidance leads away from, None without guidance."""
    if not 1 <= guidance <= 4:
        raise ValueError(f"'guidance' lies between 1 and 4, not at {guidance}")
    if conditioning is None or guidance == 1:
        return None
    before = sockets.condition(conditioning, net, "unedited")
    if len(before) not in (1, n):
        raise ValueError(f"'unedited' holds {len(before)} faces, 'conditioning' {n}: give one, or as many")
    return before
