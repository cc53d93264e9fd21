"""Small graphs for tests in ComfyUI's page, as its API takes them; widgets not named keep their defaults."""

from __future__ import annotations


def _face(size: int) -> dict:
    """Photo, head, aligned and fitted face: nodes photo, head, align, fit."""
    return {
        "photo": ("LoadImage", {"image": "astronaut.jpg"}),
        "head": ("FaceRig_LoadFaceModel", {}),
        "align": ("FaceRig_AlignFace", {"photo": ["photo", 0], "size": size}),
        "fit": (
            "FaceRig_FitToLandmarks",
            {"face_model": ["head", 0], "image": ["align", 0], "landmarks": ["align", 2]},
        ),
    }


def _graph(nodes: dict) -> dict:
    """Numbers for names, in order."""
    ids = {name: str(i + 1) for i, name in enumerate(nodes)}
    wired = lambda v: [ids[v[0]], v[1]] if isinstance(v, list) else v  # noqa: E731
    return {
        ids[name]: {"class_type": kind, "inputs": {k: wired(v) for k, v in inputs.items()}}
        for name, (kind, inputs) in nodes.items()
    }


def relight(model: str = "tiny.safetensors", size: int = 64) -> dict:
    """A photo relit by a DiffusionRig: noise of the photo, SH Light Edit, the photo again."""
    rig = {"model": ["rig", 0], "image": ["align", 0]}
    steps = {"preset": "custom", "steps": 4}
    return _graph(
        _face(size)
        | {
            "rig": ("FaceRig_LoadDiffusionRig", {"file": model}),
            "own": ("FaceRig_RenderBuffers", {"face_model": ["head", 0], "face_code": ["fit", 0]}),
            "before": ("FaceRig_DiffusionRigCondition", {**rig, "buffers": ["own", 0]}),
            "noise": ("FaceRig_DDIMInvert", {**rig, "conditioning": ["before", 0], **steps}),
            "light": ("FaceRig_SHLightEdit", {"face_model": ["head", 0], "face_code": ["fit", 0]}),
            "new": ("FaceRig_RenderBuffers", {"face_model": ["head", 0], "face_code": ["light", 0]}),
            "after": ("FaceRig_DiffusionRigCondition", {**rig, "buffers": ["new", 0]}),
            "relit": (
                "FaceRig_ConditionedSample",
                {"model": ["rig", 0], "conditioning": ["after", 0], "noise": ["noise", 0], **steps},
            ),
            "save": ("SaveImage", {"images": ["relit", 0], "filename_prefix": "face_rig/relit"}),
        }
    )


def orbit() -> dict:
    """The balls of a Light Orbit of 16 frames."""
    lights = {"face_model": ["head", 0], "face_code": ["fit", 0], "frames": 16}
    return _graph(
        _face(128)
        | {"orbit": ("FaceRig_LightOrbit", lights), "show": ("PreviewImage", {"images": ["orbit", 1]})}
    )


def edit_face(photo: str = "astronaut.jpg", **align) -> dict:
    """The render of an edited face."""
    nodes = _face(256)
    nodes["photo"][1]["image"] = photo
    nodes["align"][1].update(align)
    head = {"face_model": ["head", 0]}
    return _graph(
        nodes
        | {
            "edit": ("FaceRig_EditFace", {**head, "face_code": ["fit", 0]}),
            "render": ("FaceRig_RenderBuffers", {**head, "face_code": ["edit", 0]}),
            "show": ("PreviewImage", {"images": ["render", 1]}),
        }
    )
