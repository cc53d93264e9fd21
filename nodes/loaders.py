"""Loaders: the head model, the denoisers, and the networks that look at a photo."""

from pathlib import Path

from comfy_api.latest import io

from ..rig_core import checkpoints, flame_files
from . import host, sockets

FILES = (
    "A file in models/face_rig (.safetensors, or as published), or the small one that comes with the pack."
)
BESIDE = "beside it, same name"
SHADOW_WEIGHTS = "shadow_cls_weight.pkl"  # beside DiffAE's last.ckpt
PARSER = "79999_iter.pth"
FETCH = host.fetch_entry(PARSER)
INSTEAD = f"choose '{FETCH}', or leave the face parser out, it is optional"


class LoadFaceModel(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="FaceRig_LoadFaceModel",
            display_name="Load Face Model",
            category="Face Rig/loaders",
            description=(
                "Loads the 3D head that photos are fitted to, and DECA with FLAME. Use one for estimating, "
                "editing and rendering."
            ),
            **sockets.aliases("flame", "deca", "3dmm", "3d head"),
            inputs=[
                io.Combo.Input(
                    "file",
                    options=host.model_names(),
                    default=host.DEFAULT,
                    tooltip=(
                        "The head. " + FILES + " Of DECA and FLAME choose generic_model.pkl or "
                        "deca_model.tar, the rest is found beside it."
                    ),
                )
            ],
            outputs=[
                sockets.FaceModel.Output(
                    display_name="face_model", tooltip="For DECA Encode, Fit, Edit Face and Render."
                )
            ],
        )

    @classmethod
    def validate_inputs(cls, file=None):
        return host.missing_model(file)

    @classmethod
    def fingerprint_inputs(cls, file):
        return host.model_fingerprint(file, lambda folder: flame_files.find(folder).values())

    @classmethod
    def execute(cls, file):
        with host.gradients():
            return io.NodeOutput(host.face_model(checkpoints.load_face_model(host.model_path(file))))


class LoadDiffusionRig(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="FaceRig_LoadDiffusionRig",
            display_name="Load DiffusionRig",
            category="Face Rig/loaders",
            description="Loads a DiffusionRig denoiser as a MODEL. The host's samplers run on it too.",
            **sockets.aliases("relight", "checkpoint", "portrait", "diffusion rig"),
            inputs=[
                io.Combo.Input(
                    "file", options=host.model_names(), default=host.DEFAULT, tooltip="The denoiser. " + FILES
                )
            ],
            outputs=[
                io.Model.Output(display_name="model", tooltip="Works on pixels: three channels, no VAE."),
                io.Int.Output(
                    display_name="image_size",
                    tooltip="Pixels of the pictures it was trained on: the size for Align Face.",
                ),
            ],
        )

    @classmethod
    def validate_inputs(cls, file=None):
        return host.missing_model(file)

    @classmethod
    def fingerprint_inputs(cls, file):
        return host.model_fingerprint(file)

    @classmethod
    def execute(cls, file):
        with host.gradients():
            rig, meta = checkpoints.load_rig(host.model_path(file))
            return io.NodeOutput(host.model(rig, meta), rig.config.image_size)


class LoadDiFaReli(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="FaceRig_LoadDiFaReli",
            display_name="Load DiFaReli",
            category="Face Rig/loaders",
            description=(
                "Loads a DiFaReli denoiser with its Modulator as a MODEL. The host's samplers run on it too."
            ),
            **sockets.aliases("relight", "checkpoint", "light", "diffusion face relighting"),
            inputs=[
                io.Combo.Input(
                    "file",
                    options=host.model_names(),
                    default=host.DEFAULT,
                    tooltip="The denoiser. " + FILES + " Of a published pair this is ImgCond_*.pt.",
                ),
                io.Combo.Input(
                    "modulator",
                    options=host.model_names(BESIDE),
                    default=BESIDE,
                    tooltip=(
                        "Of a published pair: ImgEncoder_*.pt of the same step; found by itself when it lies "
                        "beside the other. Files of this pack hold both."
                    ),
                ),
            ],
            outputs=[
                io.Model.Output(display_name="model", tooltip="Works on pixels: three channels, no VAE."),
                io.Int.Output(
                    display_name="image_size",
                    tooltip=(
                        "The size for Align Face: what the model works at; 256 for smaller published ones, "
                        "which are given pictures of 256 made smaller."
                    ),
                ),
            ],
        )

    @classmethod
    def validate_inputs(cls, file=None):
        return host.missing_model(file)

    @classmethod
    def fingerprint_inputs(cls, file, modulator):
        second = file.replace("ImgCond", "ImgEncoder") if modulator == BESIDE else modulator
        return host.model_fingerprint(file) + host.model_fingerprint(second)

    @classmethod
    def execute(cls, file, modulator):
        second = (
            None if modulator == BESIDE else host.model_path(modulator, f"choose '{BESIDE}'", "modulator")
        )
        with host.gradients():
            net, meta = checkpoints.load_relight(host.model_path(file), second)
            return io.NodeOutput(host.model(net, meta), host.picture_size(net, meta))


class LoadIdentityEncoder(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="FaceRig_LoadIdentityEncoder",
            display_name="Load Identity Encoder",
            category="Face Rig/loaders",
            description=(
                "Loads the network that tells persons apart (ArcFace). DiFaReli needs the one of its "
                "training."
            ),
            **sockets.aliases("arcface", "identity", "face recognition"),
            inputs=[
                io.Combo.Input(
                    "file",
                    options=host.model_names(),
                    default=host.DEFAULT,
                    tooltip=(
                        "The encoder. "
                        + FILES
                        + " The default DiFaReli goes with the default; the published "
                        "ones with BEST_checkpoint_r18.tar."
                    ),
                )
            ],
            outputs=[
                sockets.IdentityEncoder.Output(display_name="identity_encoder", tooltip="For ArcFace Embed.")
            ],
        )

    @classmethod
    def validate_inputs(cls, file=None):
        return host.missing_model(file)

    @classmethod
    def fingerprint_inputs(cls, file):
        return host.model_fingerprint(file)

    @classmethod
    def execute(cls, file):
        with host.gradients():
            return io.NodeOutput(host.estimator(checkpoints.load_identity(host.model_path(file))))


class LoadShadowEstimator(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="FaceRig_LoadShadowEstimator",
            display_name="Load Shadow Estimator",
            category="Face Rig/loaders",
            description="Loads the network that says how strong the cast shadows on a face are.",
            **sockets.aliases("diffae", "cast shadow"),
            inputs=[
                io.Combo.Input(
                    "file",
                    options=host.model_names(),
                    default=host.DEFAULT,
                    tooltip=(
                        "The estimator. " + FILES + " The published one is DiffAE's last.ckpt with "
                        "shadow_cls_weight.pkl beside it; both give the same scale."
                    ),
                )
            ],
            outputs=[
                sockets.ShadowEstimator.Output(display_name="shadow_estimator", tooltip="For Shadow Scalar.")
            ],
        )

    @classmethod
    def validate_inputs(cls, file=None):
        return host.missing_model(file)

    @classmethod
    def fingerprint_inputs(cls, file):
        return host.model_fingerprint(file, lambda folder: Path(folder).glob(SHADOW_WEIGHTS))

    @classmethod
    def execute(cls, file):
        with host.gradients():
            return io.NodeOutput(host.estimator(checkpoints.load_shadow(host.model_path(file))))


class LoadFaceParser(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="FaceRig_LoadFaceParser",
            display_name="Load Face Parser",
            category="Face Rig/loaders",
            description=(
                "Loads the network that names every pixel of a face (BiSeNet, 19 classes). Optional: "
                "without it the head's mask is made from the fitted head and the photo's colours."
            ),
            **sockets.aliases("bisenet", "face segmentation", "face mask", "download"),
            inputs=[
                io.Combo.Input(
                    "file",
                    options=host.offered_names(PARSER),
                    default=PARSER,
                    tooltip=(
                        f"The published {PARSER} of face-parsing.PyTorch, in models/face_rig. While it is "
                        "not there, the entry 'download' fetches it once. Trained on CelebAMask-HQ, which "
                        "is for non-commercial research."
                    ),
                )
            ],
            outputs=[sockets.FaceParser.Output(display_name="face_parser", tooltip="For Face Parse.")],
        )

    @classmethod
    def validate_inputs(cls, file=None):
        return file == FETCH or host.missing_model(file, INSTEAD)

    @classmethod
    def fingerprint_inputs(cls, file):
        return host.model_fingerprint(host.meant(file))

    @classmethod
    def execute(cls, file):
        if file == FETCH:
            host.fetch_model(PARSER)
        path = host.model_path(host.meant(file), INSTEAD)
        with host.gradients():
            return io.NodeOutput(host.estimator(checkpoints.load_parser(path)))
