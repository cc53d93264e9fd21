"""From photo to face and back: Align Face, Fit to Landmarks, DECA Encode, Paste Back."""

import torch
from comfy_api.latest import io, ui

from ..rig_core import align, buffers, conditions, pipeline
from ..rig_core.estimators import deca, landmark_fit, locate
from ..rig_core.face import cat
from . import host, sockets

FACE_CHOICE = [
    io.Combo.Input(
        "order",
        options=list(locate.ORDERS),
        default="largest",
        tooltip="How faces are counted when a picture shows several.",
    ),
    io.Int.Input("index", default=0, min=0, max=63, tooltip="Which face in that order, counted from 0."),
]
CODE_INPUTS = [
    sockets.FaceModel.Input("face_model", tooltip="From Load Face Model."),
    io.Image.Input("image", tooltip="Aligned faces (Align Face), up to 2048 pixels a side."),
    *FACE_CHOICE,
    sockets.FaceLandmarks.Input(
        "landmarks",
        optional=True,
        tooltip="Landmarks in pixels of the image, from Align Face. Without them they are found.",
    ),
]
CODE_OUTPUTS = [
    sockets.FaceCode.Output(display_name="face_code", tooltip="The face in numbers."),
    sockets.SHLight.Output(display_name="light", tooltip="The light found in the photo."),
    io.Image.Output(display_name="overlay", tooltip="The fitted head over the photo: they should agree."),
]
MODES = ["ratio", "difference", "replace"]


class AlignFace(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="FaceRig_AlignFace",
            display_name="Align Face",
            category="Face Rig/estimate",
            description=(
                "Finds the face and cuts it out upright and centred (FFHQ alignment), the way the "
                "denoisers saw faces in training. Paste Back undoes it."
            ),
            inputs=[
                io.Image.Input("photo", tooltip="Photos of any size; each gives one face."),
                io.Int.Input(
                    "size",
                    default=128,
                    min=64,
                    max=1024,
                    step=32,
                    tooltip=(
                        "Side of the aligned picture in pixels: the image_size of the denoiser (128 for "
                        "the default)."
                    ),
                ),
                *FACE_CHOICE,
                io.Combo.Input(
                    "missing",
                    options=list(locate.MISSING),
                    default="error",
                    tooltip=(
                        "A picture without a face: stop with an error, take the previous picture's place "
                        "of the face, or pass the picture through unchanged at Paste Back. The number of "
                        "pictures stays."
                    ),
                ),
                io.Mask.Input(
                    "mask", optional=True, tooltip="Only faces whose centre lies inside are considered."
                ),
                sockets.FaceLandmarks.Input(
                    "landmarks",
                    optional=True,
                    tooltip="68 landmarks per picture, in pixels of the photo. Without them they are found.",
                ),
            ],
            outputs=[
                io.Image.Output(display_name="image", tooltip="The aligned faces, size x size."),
                sockets.FaceCrop.Output(display_name="crop", tooltip="Where they were: for Paste Back."),
                sockets.FaceLandmarks.Output(
                    display_name="aligned_landmarks",
                    tooltip="68 landmarks in pixels of the aligned pictures.",
                ),
            ],
        )

    @classmethod
    def execute(cls, photo, size, order, index, missing, mask=None, landmarks=None):
        x = host.pictures(photo, "photo")
        if landmarks is None:
            mask = None if mask is None else host.mask_pictures(mask, "mask")
            points, found = locate.locate(x, order, index, mask, missing)
        else:
            points = landmark_fit.check_landmarks(landmarks).to(x.device)
            x = host.repeat(x, len(points), "photo")
            found = torch.ones(len(points), dtype=torch.bool, device=x.device)
        _check_inside(points[found], x.shape[2:])
        crop = align.ffhq_crop(points, size)
        out, aligned = host.image(crop.apply(x)), host.result(crop.apply_points(points))
        where = sockets.Aligned(host.result(crop), host.result(found))
        return io.NodeOutput(out, where, aligned, ui=ui.PreviewImage(out[:4], cls=cls))


def _check_inside(points, size) -> None:
    """Raise ValueError when most of a face lies outside of the photo, warn when some of it does."""
    height, width = size
    x, y = points.unbind(-1)
    outside = ((x < -0.5) | (y < -0.5) | (x > width - 0.5) | (y > height - 0.5)).float().mean(1)
    if (outside > 0.5).any():
        raise ValueError(
            f"the face leaves the photo: only {round((1 - float(outside.max())) * 68)} of its 68 landmarks "
            "are inside; use a photo that shows the whole face"
        )
    if (outside > 0).any():
        host.warn(
            f"a face leaves the photo, {round(float(outside.max()) * 100)} % of its landmarks are outside; "
            "the missing part is filled with the mirrored photo, and the fit is less sure"
        )


class FitToLandmarks(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="FaceRig_FitToLandmarks",
            display_name="Fit to Landmarks",
            category="Face Rig/estimate",
            description=(
                "Fits the 3D head to a photo: shape, expression, pose and camera from 68 landmarks, skin "
                "and light from the pixels."
            ),
            inputs=CODE_INPUTS,
            outputs=CODE_OUTPUTS,
        )

    @classmethod
    def execute(cls, face_model, image, order, index, landmarks=None):
        def fit(head, x, points):
            return landmark_fit.fit(head, points, tuple(x.shape[2:]), x)

        return _estimated(cls, fit, face_model, image, order, index, landmarks)


class DECAEncode(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="FaceRig_DECAEncode",
            display_name="DECA Encode",
            category="Face Rig/estimate",
            description=(
                "Reads shape, expression, pose, camera, skin and light of FLAME off a photo with DECA, as in "
                "the training of the published models."
            ),
            inputs=CODE_INPUTS,
            outputs=CODE_OUTPUTS,
        )

    @classmethod
    def execute(cls, face_model, image, order, index, landmarks=None):
        net = host.deca(face_model)
        if net is None:
            raise ValueError(
                "'face_model' has no DECA: put deca_model.tar beside FLAME's files in models/face_rig and "
                "choose it at Load Face Model, or use Fit to Landmarks"
            )

        def encode(head, x, points):
            return deca.encode(net, x, points)

        return _estimated(cls, encode, face_model, image, order, index, landmarks)


def _estimated(cls, estimate, face_model, image, order, index, landmarks):
    """The output of a node that estimates codes: estimate(head, pictures, landmarks) -> FaceCode."""
    x = host.pictures(image, "image", most=2048)
    if landmarks is None:
        points = locate.locate(x, order, index)[0]
    else:
        points = landmark_fit.check_landmarks(landmarks)
    x = host.repeat(x, len(points), "image")
    with host.gradients():
        head, x, points = host.head(face_model), x.clone(), points.to(x.device).clone()
        # FLAME without its texture is shown grey
        grey = None if getattr(head, "has_texture", True) else torch.full((1, 3, 256, 256), conditions.GREY)
        parts = host.chunks(len(x), 256, 256)
        progress = host.Progress(len(parts))
        codes, overlays = [], []
        for part in parts:
            code = estimate(head, x[part], points[part])
            b = buffers.render(head, code, albedo=grey)
            overlays.append(host.image(x[part] + b.mask * (b.rendered - x[part])))
            codes.append(host.result(code))
            progress.step()
    code, overlay = cat(codes), torch.cat(overlays)
    return io.NodeOutput(code, code.light, overlay, ui=ui.PreviewImage(overlay[:4], cls=cls))


class PasteBack(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="FaceRig_PasteBack",
            display_name="Paste Back",
            category="Face Rig/estimate",
            description=(
                "Carries the edit of an aligned face into the photo at the photo's own resolution. Pixels "
                "outside the aligned square, and far from the mask, stay exactly as they were."
            ),
            inputs=[
                io.Image.Input("photo", tooltip="The photo that Align Face was given."),
                io.Image.Input("edited", tooltip="The edited aligned face."),
                sockets.FaceCrop.Input("crop", tooltip="From Align Face."),
                io.Combo.Input(
                    "mode",
                    options=MODES,
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
                    tooltip="Width of the soft edge in sides of the aligned square. Good: 0.03..0.15.",
                ),
                io.Float.Input(
                    "reach",
                    default=pipeline.NEAR,
                    min=0.0,
                    max=0.5,
                    step=0.01,
                    tooltip=(
                        "How far beyond 'mask' the edit may show, in sides of the aligned square, so that "
                        "hair changes with the head. 0: the mask alone. Good: 0..0.15."
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
            outputs=[io.Image.Output(display_name="photo", tooltip="The photos, one for each edited face.")],
        )

    @classmethod
    def execute(cls, photo, edited, crop, mode, soft, reach, before=None, motion=None, mask=None):
        new = host.pictures(edited, "edited")
        n, size = len(new), new.shape[-1]
        if motion is not None and (before is None or mask is not None):
            raise ValueError("'motion' needs 'before' (from DDIM Invert) and takes no 'mask'")

        def each(x, name):
            return [None] * n if x is None else host.repeat(x, n, name).split(1)

        photos = each(host.pictures(photo, "photo"), "photo")
        before = each(None if before is None else host.pictures(before, "before"), "before")
        mask = None if mask is None else pipeline.near(host.mask_pictures(mask, "mask", size), reach)
        mask = each(mask, "mask")
        motion = each(None if motion is None else motion.to(host.device()), "motion")
        crops = host.repeat(crop.crop, n, "crop").resized(size).to(host.device())
        found = crop.found.expand(n)
        progress, out = host.Progress(n), []
        for i, x in enumerate(photos):
            face = new[i : i + 1]
            if found[i] and motion[i] is not None:
                portrait = pipeline.Portrait(face, crops[i], None)
                x = pipeline.paste(x, portrait, pipeline.Edit(face, before[i], motion[i]))
            elif found[i]:
                x = align.paste_back(x, face, crops[i], mask[i], before[i], mode, soft)
            out.append(host.image(x))
            progress.step()
        return io.NodeOutput(torch.cat(out))
