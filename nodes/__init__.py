"""The nodes. One file a family; a node is a schema and a call into rig_core."""

from .host import floor  # isort: skip  # noqa: F401  first: it tells an older host's user what to do

from comfy_api.latest import ComfyExtension

from . import (
    buffers,
    check,
    diffusion,
    estimate,
    host,
    light,
    light_sources,
    loaders,
    paste,
    personal,
    relight,
    rig,
    sampling,
    share,
    transfer,
    video,
)

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
    paste.PasteBack,
    light.SHLightEdit,
    light.LightFromPhoto,
    light.LightOrbit,
    light.MixLights,
    light_sources.LightFromEnvironmentMap,
    light_sources.LightPresets,
    rig.EditFace,
    rig.MovePhoto,
    transfer.Transfer,
    transfer.InterpolateFaces,
    transfer.NeutralFace,
    video.SmoothFaces,
    personal.MeanShape,
    personal.TrainPersonalModel,
    check.CheckModels,
    share.SaveLight,
    share.LoadLight,
    share.SaveFace,
    share.LoadFace,
    buffers.RenderBuffers,
    buffers.BuffersFromImages,
    diffusion.DiffusionRigCondition,
    relight.DiFaReliCondition,
    diffusion.DDIMInvert,
    diffusion.ConditionedSample,
    video.VideoFrame,
    video.RelightVideo,
    sampling.EmptyPixelLatent,
    sampling.GuidedSigmas,
    sampling.ClipDenoised,
]


class FaceRig(ComfyExtension):
    async def get_node_list(self):
        host.add_model_folder()
        return NODES
