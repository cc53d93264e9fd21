"""Films: Smooth Faces for a batch of frames on the canvas, Relight Video for a whole file."""

import torch
from comfy_api.latest import io, ui

from ..rig_core import align, conditions, diffusion, matte, motion, sh, shot
from ..rig_core.denoisers.relight import DiFaReli
from ..rig_core.estimators import identity, locate
from ..rig_core.estimators.identity import ArcFace
from ..rig_core.estimators.parsing import BiSeNet
from ..rig_core.estimators.shadow import DiffAEShadow, ShadowNet
from . import host, sockets
from .diffusion import BALANCED, CUSTOM, PRESETS, STEPS
from .relight import CAST_SHADOW, RANGE, check_vector

IN_WORK = 2**28  # bytes of frames at a time


class SmoothFaces(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="FaceRig_SmoothFaces",
            display_name="Smooth Faces",
            category="Face Rig/rig",
            description=(
                "Takes the jitter out of the faces of a film, one a frame: pose, expression, place and light "
                "change smoothly, shape and skin not at all."
            ),
            **sockets.aliases("video", "temporal", "flicker", "jitter", "stabilise"),
            inputs=[
                sockets.FaceCode.Input(
                    "face_code",
                    tooltip="One face a frame, in order, from Fit to Landmarks or DECA Encode of the frames.",
                ),
                io.Float.Input(
                    "frames",
                    default=2.0,
                    min=0.0,
                    max=100.0,
                    step=0.5,
                    tooltip=(
                        "Standard deviation of the Gaussian over time, in frames; it has no delay. 0 leaves "
                        "the motion as it is. Good: 1..4; more swallows blinks and quick turns."
                    ),
                ),
                io.Boolean.Input(
                    "one_person",
                    default=True,
                    tooltip=(
                        "Shape and skin become the mean of all frames, for they do not change. Off when the "
                        "frames show several people."
                    ),
                ),
            ],
            outputs=[
                sockets.FaceCode.Output(display_name="face_code", tooltip="The faces, made steady."),
                sockets.SHLight.Output(display_name="light", tooltip="Their lights, made steady."),
            ],
        )

    @classmethod
    def execute(cls, face_code, frames, one_person):
        code = host.result(motion.smooth_code(face_code, frames, one_person))
        return io.NodeOutput(code, code.light)


class VideoFrame(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="FaceRig_VideoFrame",
            display_name="Video Frame",
            category="Face Rig/video",
            description=(
                "One frame of a film as an image, without loading the rest: to fit its face and set a light "
                "by it before Relight Video."
            ),
            **sockets.aliases("first frame", "frame of a video", "video to image"),
            inputs=[
                io.Video.Input("video", tooltip="From Load Video (or Create Video). Any length and size."),
                io.Int.Input(
                    "frame",
                    default=0,
                    min=0,
                    max=1_000_000,
                    tooltip="Which frame, counted from 0; beyond the end the last one.",
                ),
            ],
            outputs=[
                io.Image.Output(display_name="image", tooltip="The frame: for Align Face."),
                io.Int.Output(display_name="count", tooltip="How many frames the film has, about."),
            ],
        )

    @classmethod
    def execute(cls, video, frame):
        film = host.Film(video, "video")
        progress = host.Progress(min(frame + 1, film.count))
        shown = host.image(align.check_image(film.frame(frame, progress.step)))
        return io.NodeOutput(shown, film.count, ui=ui.PreviewImage(shown, cls=cls))


class RelightVideo(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="FaceRig_RelightVideo",
            display_name="Relight Video",
            category="Face Rig/video",
            description=(
                "A film of any length under another light, in bounded memory: finds the face, makes its "
                "numbers steady over time, relights frame by frame at full resolution, keeps times and sound."
            ),
            **sockets.aliases("relight film", "light a video", "DiFaReli video"),
            inputs=[
                io.Video.Input("video", tooltip="From Load Video (or Create Video). Any length and size."),
                io.Model.Input("model", tooltip="From Load DiFaReli."),
                sockets.FaceModel.Input("face_model", tooltip="From Load Face Model."),
                sockets.IdentityEncoder.Input("identity_encoder", tooltip="From Load Identity Encoder."),
                sockets.ShadowEstimator.Input("shadow_estimator", tooltip="From Load Shadow Estimator."),
                io.Float.Input(
                    "shadow_change",
                    default=0.0,
                    min=-RANGE,
                    max=RANGE,
                    step=0.25,
                    tooltip=(
                        "Added to the amount of cast shadow, in log-odds: above 0 stronger cast shadows, "
                        "below 0 weaker. Good: -6..6."
                    ),
                ),
                CAST_SHADOW,
                io.Combo.Input(
                    "preset",
                    options=[*PRESETS, CUSTOM],
                    default=BALANCED,
                    tooltip=(
                        "Steps for each frame, three times over: to noise, back to match means, and under "
                        "the new light. fast: 20. balanced: 33. official: 1000. custom: as 'steps' says."
                    ),
                ),
                STEPS,
                io.Float.Input(
                    "smooth",
                    default=2.0,
                    min=0.0,
                    max=100.0,
                    step=0.5,
                    tooltip=(
                        "Standard deviation of the Gaussian over time, in frames, of the face's place, pose, "
                        "expression and own light. 0: every frame by itself, which flickers. Good: 1..4."
                    ),
                ),
                io.Combo.Input(
                    "missing",
                    options=list(locate.MISSING),
                    default="pass through",
                    tooltip=(
                        "A frame without the face: stop with an error, edit where it was last, or pass the "
                        "frame through unchanged. The number of frames stays."
                    ),
                ),
                io.Combo.Input(
                    "order",
                    options=list(locate.ORDERS),
                    default="largest",
                    tooltip="How faces are counted where a shot begins; from there the face is followed.",
                ),
                io.Int.Input(
                    "index", default=0, min=0, max=63, tooltip="Which face in that order, counted from 0."
                ),
                io.Int.Input(
                    "crf",
                    default=16,
                    min=0,
                    max=51,
                    tooltip=(
                        "Quality of the new H.264 file: 0 is the best, more is smaller. Colours are kept at "
                        "half resolution, as players want. Good: 12..23."
                    ),
                ),
                sockets.SHLight.Input(
                    "light",
                    optional=True,
                    tooltip=(
                        "The new light, or several that are spread over the film (Light Orbit, Mix Lights). "
                        "Without: the film's own."
                    ),
                ),
                sockets.FaceParser.Input(
                    "face_parser",
                    optional=True,
                    tooltip=(
                        "From Load Face Parser: finds face, neck and hair. Without it they are found by the "
                        "fitted head and the colours."
                    ),
                ),
            ],
            outputs=[
                io.Video.Output(
                    display_name="relit", tooltip="The film under the new light: for Save Video."
                ),
                io.Int.Output(display_name="frames", tooltip="Number of frames, as in the film given."),
                io.String.Output(display_name="report", tooltip="What was found: frames, shots, gaps."),
            ],
        )

    @classmethod
    def execute(
        cls, video, model, face_model, identity_encoder, shadow_estimator, shadow_change, cast_shadow, preset,
        steps, smooth, missing, order, index, crf, light=None, face_parser=None,
    ):  # fmt: skip
        net = host.denoiser(model, DiFaReli)
        sockets.choice("preset", preset, (*PRESETS, CUSTOM))
        sockets.choice("missing", missing, locate.MISSING)
        sockets.choice("order", order, locate.ORDERS)
        light = None if light is None else sh.check_light(light, "'light'")
        spec, solver = PRESETS.get(preset, (f"quad{steps}", "ab2"))
        film, size = host.Film(video, "video"), host.picture_size(net, model.model.meta)
        recognise = host.inside(identity_encoder, (ArcFace,), "identity_encoder", "Load Identity Encoder")
        judges = (ShadowNet, DiffAEShadow)
        judge = host.inside(shadow_estimator, judges, "shadow_estimator", "Load Shadow Estimator")
        parser = face_parser and host.inside(face_parser, (BiSeNet,), "face_parser", "Load Face Parser")
        head, encoder = host.head(face_model), host.deca(face_model)
        side = net.config.image_size
        # for each pass what it needs, all at once: what is loaded later may drive away what came before
        host.together(identity_encoder)
        _check_fit(net, head, recognise, parser)
        runs = 3 * len(diffusion.respace(diffusion.linear_schedule(), spec))
        progress = host.Progress(film.count * (2 + runs))

        def seen(*_):
            progress.step()

        with host.gradients():
            host.together(host.face_finder())
            tracked = shot.track(film.frames(), order, index, missing, seen)
            n = len(tracked)
            progress.total = n * (2 + runs)
            host.together(identity_encoder, shadow_estimator, host.encoder(face_model))
            known = shot.survey(
                film.frames(), tracked, head, recognise, judge, size, smooth, encoder, callback=seen
            )
        net, batch = host.loaded(model, face_parser), host.batches(model, n, side, side)[0].stop
        batch = max(1, min(batch, IN_WORK // film.frame_bytes))
        progress.total = n * 2 + -(-n // batch) * runs
        made = shot.relight(
            film.frames(), known, net, head, light, shadow_change, spec, solver, cast_shadow, parser, batch,
            progress.callback,
        )  # fmt: skip
        relit, file = host.write_video(film, made, crf)
        shown = ui.PreviewVideo([ui.SavedResult(file, "", io.FolderType.temp)])
        return io.NodeOutput(relit, n, _report(tracked, film.rate), ui=shown)


def _check_fit(net, head, recognise, parser) -> None:
    """Tell at once, and not after the first passes, when the files do not belong together."""
    code = head.mean_code(1, (64, 64))
    grey = torch.full((1, 3, 64, 64), 0.5, device=host.device())
    if parser is None:
        matte.head_matte(head, code.to(host.device()), grey)
    embed = identity.embed(recognise, grey)
    check_vector(conditions.vector(code, embed, embed.new_zeros(1, 1)), net, code, embed)


def _report(tracked, rate) -> str:
    """One line a fact: frames, shots, frames that were passed through."""
    n, found = len(tracked), tracked.found.tolist()
    shots = len(tracked.starts)
    lines = [f"{n} frames at {float(rate):.5g} a second, {shots} shot{'s' * (shots != 1)}"]
    edges = [i for i in range(n) if i == 0 or found[i] != found[i - 1]] + [n]
    gaps = [(a, b - 1) for a, b in zip(edges, edges[1:]) if not found[a]]
    if gaps:
        where = ", ".join(f"{a}-{b}" if b > a else f"{a}" for a, b in gaps)
        lines.append(f"{n - sum(found)} without the face, passed through: {where} (counted from 0)")
    return "\n".join(lines)
