"""Loaders: the head model and the denoiser."""

from comfy_api.latest import io

from ..rig_core import checkpoints
from . import host, sockets

FILES = (
    "A file in models/face_rig (.safetensors, or an official .pt), or the small one that comes with the pack."
)


class LoadFaceModel(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="FaceRig_LoadFaceModel",
            display_name="Load Face Model",
            category="Face Rig/loaders",
            description=(
                "Loads the 3D head that photos are fitted to. Use one for fitting, editing and rendering."
            ),
            inputs=[
                io.Combo.Input(
                    "file", options=host.model_names(), default=host.DEFAULT, tooltip="The head. " + FILES
                )
            ],
            outputs=[
                sockets.FaceModel.Output(display_name="face_model", tooltip="For Fit, Edit Face and Render.")
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, file):
        return host.model_fingerprint(file)

    @classmethod
    def execute(cls, file):
        with host.gradients():
            return io.NodeOutput(checkpoints.load_head(host.model_path(file)))


class LoadDiffusionRig(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="FaceRig_LoadDiffusionRig",
            display_name="Load DiffusionRig",
            category="Face Rig/loaders",
            description="Loads a DiffusionRig denoiser as a MODEL. The host's samplers run on it too.",
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
    def fingerprint_inputs(cls, file):
        return host.model_fingerprint(file)

    @classmethod
    def execute(cls, file):
        with host.gradients():
            rig, meta = checkpoints.load_rig(host.model_path(file))
            return io.NodeOutput(host.rig_model(rig, meta), rig.config.image_size)
