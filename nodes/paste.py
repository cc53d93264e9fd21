"""From the edited faces back to the photo: Paste Back."""

from comfy_api.latest import io

from ..rig_core import composite, pipeline
from . import host, sockets

LAID = 2**23  # pixels of pasted photos at a time


class PasteBack(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="FaceRig_PasteBack",
            display_name="Paste Back",
            category="Face Rig/estimate",
            description=(
                "Carries the edit of aligned faces into the photo at the photo's own resolution. Pixels "
                "outside the aligned squares, and far from the mask, stay exactly as they were."
            ),
            **sockets.aliases("uncrop", "stitch", "composite face", "restore photo", "inset"),
            inputs=[
                io.Image.Input("photo", tooltip="The photos that Align Face was given."),
                io.Image.Input(
                    "edited",
                    tooltip="The edited aligned faces: each of 'crop' once, or one face under many lights.",
                ),
                sockets.FaceCrop.Input("crop", tooltip="From Align Face."),
                io.Combo.Input(
                    "mode",
                    options=list(composite.MODES),
                    default="ratio",
                    tooltip=(
                        "ratio: the photo times the change of light, sharp at any size. difference: the "
                        "change is added. replace: the aligned face itself. With 'motion' it is always "
                        "ratio."
                    ),
                ),
                io.Float.Input(
                    "soft",
                    default=0.06,
                    min=0.0,
                    max=0.5,
                    step=0.01,
                    tooltip=(
                        "Width of the soft edge in sides of the aligned square; at its top and sides at "
                        "least 0.15, unless 0. Good: 0.03..0.15."
                    ),
                ),
                io.Float.Input(
                    "reach",
                    default=pipeline.NEAR,
                    min=0.0,
                    max=0.5,
                    step=0.01,
                    tooltip=(
                        "How far beyond 'mask' the edit may show, in sides of the aligned square, so that "
                        "hair changes with the head. 0: the mask alone. Without 'mask' it does nothing. "
                        "Good: 0..0.15."
                    ),
                ),
                io.Image.Input(
                    "before",
                    optional=True,
                    tooltip=(
                        "What the model makes of the unedited face, from DDIM Invert: its own errors then "
                        "cancel out. Without it the photo itself is compared with."
                    ),
                ),
                sockets.FaceMotion.Input(
                    "motion",
                    optional=True,
                    tooltip="From Move Photo, when pose or expression were edited; needs 'before'.",
                ),
                io.Mask.Input(
                    "mask",
                    optional=True,
                    tooltip=(
                        "The head in the aligned picture (matte of DiFaReli Condition, Face Parse, mask "
                        "of Render Buffers): the edit shows there and near it. Without it everywhere."
                    ),
                ),
            ],
            outputs=[
                io.Image.Output(
                    display_name="photo",
                    tooltip="The photos with all of their faces, or one photo under each of the lights.",
                )
            ],
        )

    @classmethod
    def execute(cls, photo, edited, crop, mode, soft, reach, before=None, motion=None, mask=None):
        if mode not in composite.MODES:
            raise ValueError(f"'mode' is {' or '.join(composite.MODES)}, not '{mode}'")
        if motion is not None and (before is None or mask is not None):
            raise ValueError("'motion' needs 'before' (from DDIM Invert) and takes no 'mask'")
        photos, *sides = host.check_pictures(photo, "photo")
        if tuple(sides) != tuple(crop.size):
            raise ValueError(
                f"'photo' is {sides[1]} x {sides[0]} pixels, Align Face had {crop.size[1]} x {crop.size[0]}: "
                "connect the same photo to both"
            )
        n, size, width = host.check_pictures(edited, "edited")
        if size != width:
            raise ValueError(f"'edited' is {width} x {size} pixels, an aligned face is square")
        if before is not None and host.check_pictures(before, "before")[1:] != (size, width):
            raise ValueError(
                f"'before' is {before.shape[2]} x {before.shape[1]} pixels, 'edited' {width} x {size}: give "
                "both at one size"
            )
        if mask is not None:
            mask = mask.reshape(-1, *mask.shape[-2:])
        along = {"before": before, "mask": mask, "motion": motion}
        own = [len(host.repeat(v, n, s)) == len(v) > 1 for s, v in along.items() if v is not None]
        jobs = _jobs(photos, n, crop, 0 if any(own) else max(1, LAID // (sides[0] * sides[1])))
        crops = crop.crop.resized(size).to(host.device())

        def place(x, k, rows):
            was, where, moved = (v if v is None or len(v) == 1 else v[rows] for v in along.values())
            was = None if was is None else host.pictures(was, "before")
            if moved is not None:
                return pipeline.place(x, crops[k], was, grid=moved.to(x), soft=soft)
            if where is not None:
                where = pipeline.near(host.mask_pictures(where, "mask", size), reach)
            return composite.place(x, crops[k], where, was, mode, soft)

        progress, out = host.Progress(sum(len(steps) for *_, steps in jobs)), []
        for i, faces, steps in jobs:
            x = host.pictures(photo[i : i + 1], "photo")
            places = [place(x, k, rows) for k, rows in zip(faces, steps[0])]
            for rows in steps:
                edits = [host.pictures(edited[r], "edited") for r in rows]
                out.append(host.image(composite.compose(x, places, edits)))
                progress.step()
        return io.NodeOutput(host.joined(out))


def _jobs(photos: int, edits: int, crop: sockets.Aligned, together: int):
    """What Paste Back makes: for each photo its number, its faces in `crop`, and in steps the rows of
    'edited' of each face. together: edits of one face in a step, 0 where each is for itself.

    Raises ValueError for numbers that do not fit.
    """
    faces = len(crop.crop)
    if faces == 1 and photos == 1 and together:  # one face under many lights
        return [(0, [0], [[rows] for rows in host.slices(edits, together)])]
    if faces == 1:
        if photos not in (1, edits):
            give = "1" if edits == 1 else f"1 or {edits}"
            raise ValueError(f"'photo' holds {photos} pictures, but 'edited' {edits}: give {give}")
        return [(i % photos, [0], [[slice(i, i + 1)]]) for i in range(edits)]
    count = int(crop.photo.max()) + 1
    if edits != faces:
        raise ValueError(
            f"'edited' holds {edits} faces, but 'crop' {faces}: edit all faces of that Align Face, each once"
        )
    if photos not in (1, count):
        raise ValueError(
            f"'photo' holds {photos} pictures, but Align Face had {count}: connect the same ones"
        )
    jobs = []
    for i in range(count):
        own = ((crop.photo == i) & crop.found).nonzero()[:, 0].tolist()
        jobs.append((i % photos, own, [[slice(k, k + 1) for k in own]]))
    return jobs
