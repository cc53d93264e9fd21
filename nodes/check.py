"""Check Models: what lies in models/face_rig, what is missing, where to get it."""

from comfy_api.latest import io, ui

from ..rig_core import catalogue
from . import host, sockets


class CheckModels(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="FaceRig_CheckModels",
            display_name="Check Models",
            category="Face Rig/personal",
            description=(
                "Says of each file in models/face_rig what it is, whether it is whole and who takes it, "
                "and which official files are missing, where they come from and under which licence."
            ),
            **sockets.aliases("missing models", "checkpoints", "diagnose", "download"),
            inputs=[],
            outputs=[io.String.Output(display_name="report", tooltip="The same text as in the node.")],
            is_output_node=True,
        )

    @classmethod
    def fingerprint_inputs(cls):
        return host.models_fingerprint()

    @classmethod
    def execute(cls):
        report = catalogue.report(*host.model_folders())
        return io.NodeOutput(report, ui=ui.PreviewText(report))
