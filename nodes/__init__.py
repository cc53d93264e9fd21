"""The nodes. One file a family; a node is a schema and a call into rig_core."""

from comfy_api.latest import ComfyExtension

from . import buffers, check, diffusion, estimate, host, light, loaders, personal, relight, rig

NODES = [
    loaders.LoadFaceModel,
    loaders.LoadDiffusionRig,
    loaders.LoadDiFaReli,
    loaders.LoadIdentityEncoder,
    loaders.LoadShadowEstimator,
    loaders.LoadFaceParser,
    estimate.AlignFace,
    estimate.FitToLandmarks,
    estimate.DECAEncode,
    relight.ArcFaceEmbed,
    relight.ShadowScalar,
    relight.FaceParse,
    estimate.PasteBack,
    light.SHLightEdit,
    light.LightFromPhoto,
    light.LightOrbit,
    light.MixLights,
    rig.EditFace,
    rig.MovePhoto,
    personal.MeanShape,
    personal.TrainPersonalModel,
    check.CheckModels,
    buffers.RenderBuffers,
    diffusion.DiffusionRigCondition,
    relight.DiFaReliCondition,
    diffusion.DDIMInvert,
    diffusion.ConditionedSample,
]


class FaceRig(ComfyExtension):
    async def get_node_list(self):
        host.add_model_folder()
        return NODES
