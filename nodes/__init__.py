"""The nodes. One file a family; a node is a schema and a call into rig_core."""

from comfy_api.latest import ComfyExtension

from . import buffers, diffusion, estimate, host, light, loaders, rig

NODES = [
    loaders.LoadFaceModel,
    loaders.LoadDiffusionRig,
    estimate.AlignFace,
    estimate.FitToLandmarks,
    estimate.PasteBack,
    light.SHLightEdit,
    rig.EditFace,
    rig.MovePhoto,
    buffers.RenderBuffers,
    diffusion.DiffusionRigCondition,
    diffusion.DDIMInvert,
    diffusion.ConditionedSample,
]


class FaceRig(ComfyExtension):
    async def get_node_list(self):
        host.add_model_folder()
        return NODES
