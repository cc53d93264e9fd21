"""Face Rig: edit the light, pose and expression of a face in a photograph, the person kept."""

WEB_DIRECTORY = "./web"


def comfy_entrypoint():
    """The pack's nodes. ComfyUI calls this; only here is anything of ComfyUI imported."""
    from .nodes import FaceRig

    return FaceRig()
