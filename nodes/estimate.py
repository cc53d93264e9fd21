"""From photo to face: Align Face, Fit to Landmarks, DECA Encode."""

import functools

import torch
from comfy_api.latest import io, ui

from ..rig_core import align, buffers, conditions, overlay
from ..rig_core.estimators import deca, given, landmark_fit, locate
from ..rig_core.estimators.landmarks import NoFaceError, outside
from ..rig_core.face import cat
from . import host, sockets

SHOWN = 32  # pictures of an overlay: a long film does not exist twice
LANDMARKS = (
    "68 a face (iBUG), in pixels of the {0}, or the result of the host's face mesh of 478 points. Without "
    "them they are found."
)
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
    io.MultiType.Input(
        "landmarks",
        sockets.LANDMARKS,
        optional=True,
        tooltip=(
            "From Align Face. "
            + LANDMARKS.format("image")
            + " With 68 a face all faces are used: 'order' and "
            "'index' do not count."
        ),
    ),
]
CODE_OUTPUTS = [
    sockets.FaceCode.Output(display_name="face_code", tooltip="The face in numbers."),
    sockets.SHLight.Output(display_name="light", tooltip="The light found in the photo."),
    io.Image.Output(display_name="overlay", tooltip="The fitted head over the photo: they should agree."),
]


class AlignFace(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="FaceRig_AlignFace",
            display_name="Align Face",
            category="Face Rig/estimate",
            description=(
                "Finds one face in each photo, or all, and cuts it out upright and centred (FFHQ alignment), "
                "the way the denoisers saw faces in training. Paste Back undoes it."
            ),
            **sockets.aliases("face crop", "detect face", "face detection", "ffhq", "group photo"),
            inputs=[
                io.Image.Input("photo", tooltip="Photos of any size, or the frames of a film."),
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
                io.MultiType.Input(
                    "landmarks",
                    sockets.LANDMARKS,
                    optional=True,
                    tooltip=LANDMARKS.format("photo") + " The faces are chosen among them all the same.",
                ),
                io.MultiType.Input(
                    "box",
                    sockets.BOXES,
                    optional=True,
                    tooltip=(
                        "Only the faces that overlap these boxes most are considered; where none is found, "
                        "landmarks are sought in the box itself. Four numbers are corners x0, y0, x1, y1; "
                        "a dict has x, y, width, height; in pixels of the photo. One, a list, or a list for "
                        "each photo."
                    ),
                ),
                io.Combo.Input(
                    "faces",
                    options=list(locate.FACES),
                    default="one",
                    optional=True,
                    tooltip=(
                        "one: the face of that order and index in each photo. all: every face of every "
                        "photo, in that order, 64 a photo at the most; Paste Back puts all of them back."
                    ),
                ),
                io.Float.Input(
                    "steady",
                    default=0.0,
                    min=0.0,
                    max=30.0,
                    step=0.5,
                    optional=True,
                    tooltip=(
                        "For films: the place of the face is smoothed over so many frames, against jitter. "
                        "0: off, for single photos. Good: 1..4."
                    ),
                ),
            ],
            outputs=[
                io.Image.Output(display_name="image", tooltip="The aligned faces, size x size."),
                sockets.FaceCrop.Output(display_name="crop", tooltip="Where they were: for Paste Back."),
                sockets.FaceLandmarks.Output(
                    display_name="aligned_landmarks",
                    tooltip="68 landmarks in pixels of the aligned pictures.",
                ),
                io.Image.Output(
                    display_name="overlay",
                    tooltip=(
                        "The photos with every face numbered as 'index' counts, the chosen ones yellow; 1024 "
                        "pixels a side and 32 photos at the most."
                    ),
                ),
            ],
        )

    @classmethod
    def execute(
        cls, photo, size, order, index, missing, mask=None, landmarks=None, box=None, faces="one", steady=0.0
    ):
        n, *sides = host.check_pictures(photo, "photo")
        sockets.choice("order", order, locate.ORDERS)
        sockets.choice("missing", missing, locate.MISSING)
        sockets.choice("faces", faces, locate.FACES)
        boxes = [None] * n if box is None else _read("box", given.boxes, box, n, sides)
        points = _given_landmarks(landmarks, n)
        if mask is not None:
            mask = host.repeat(mask.reshape(-1, *mask.shape[-2:]), n, "mask")
        if landmarks is None or box is not None:
            host.together(host.face_finder())
        progress, shown, overlays = host.Progress(2 * n), set(host.few(torch.arange(n), SHOWN).tolist()), []

        @functools.lru_cache(maxsize=1)  # a single photo, which may be large, is checked and moved once
        def picture(i):
            return host.pictures(photo[i : i + 1], "photo")

        def looks():
            for i in range(n):
                x = picture(i)
                here = None if mask is None else host.mask_pictures(mask[i : i + 1], "mask")
                known = points[i] if points[i] is None else points[i].to(x)
                seen = locate.look(x, order, index, faces, here, boxes[i], known)
                if seen.guessed:
                    host.warn(f"no face found in a box of picture {i + 1}: its landmarks are a guess")
                if i in shown:
                    overlays.append(host.image(overlay.numbered(x, seen.boxes, seen.chosen)))
                progress.step()
                yield seen

        at = _gathered(looks(), n, "photo", missing)
        _check_inside(at.points[at.found.to(at.points.device)], sides, refuse=faces == "one")
        crop = align.ffhq_crop(locate.steady(at, steady), size)
        images = []
        for i in range(n):
            x = picture(i)
            images += [host.image(crop[k].apply(x)) for k in (at.photo == i).nonzero()[:, 0].tolist()]
            progress.step()
        found = at.found | (missing == "previous")
        images, overlays = host.joined(images), host.joined(overlays)
        return io.NodeOutput(
            images,
            sockets.Aligned(host.result(crop), found, at.photo, tuple(sides)),
            host.result(crop.apply_points(at.points)),
            overlays,
            ui=ui.PreviewImage(host.few(overlays), cls=cls),
        )


def _read(name, read, *values):
    """What `read` makes of an input, its errors with the input's name."""
    try:
        return read(*values)
    except ValueError as e:
        raise ValueError(f"'{name}': {e}") from e


def _given_landmarks(landmarks, n: int) -> list:
    """For each of n pictures the landmarks [K,68,2] of its faces, or None."""
    if landmarks is None:
        return [None] * n
    if not isinstance(landmarks, torch.Tensor):
        return _read("landmarks", given.landmarks, landmarks, n)
    points = _read("landmarks", landmark_fit.check_landmarks, landmarks)
    if n > 1 and len(points) != n:
        raise ValueError(f"'landmarks' holds {len(points)} faces, but there are {n} pictures: give one each")
    return [points] if n == 1 else list(points.split(1))


def _gathered(seen, n: int, name: str, missing: str = "error") -> locate.Faces:
    """What was seen in the n pictures of an input, an error with the input's name."""
    try:
        return locate.gather(seen, n, missing)[1]
    except NoFaceError as e:
        raise NoFaceError(f"'{name}': {e}") from e


def find(image, name: str, order: str, index: int, progress, known=None):
    """Landmarks [B,68,2] of one face in each picture of IMAGE, a step of the bar for each.

    known: for each picture the landmarks [K,68,2] of its faces, or None to find them.
    """
    known = known or [None] * len(image)

    def looks():
        for i in range(len(image)):
            x = host.pictures(image[i : i + 1], name)
            yield locate.look(x, order, index, points=known[i] if known[i] is None else known[i].to(x))
            progress.step()

    return _gathered(looks(), len(image), name).points


def _check_inside(points, size, refuse: bool) -> None:
    """Warn when some of a face lies outside of the photo; refuse: raise ValueError when most of it does."""
    most = float(outside(points, size).max())
    if refuse and most > 0.5:
        raise ValueError(
            f"'photo': the face leaves it, only {round((1 - most) * 68)} of its 68 landmarks are inside; use "
            "a photo that shows the whole face"
        )
    if most:
        host.warn(
            f"a face leaves the photo, {round(most * 100)} % of its landmarks are outside; the missing part "
            "is filled with the mirrored photo, and the fit is less sure"
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
            **sockets.aliases("fit head", "face tracking", "3dmm", "estimate pose", "estimate light"),
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
            **sockets.aliases("flame", "3dmm", "estimate pose", "estimate light", "face code"),
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

        return _estimated(cls, encode, face_model, image, order, index, landmarks, host.encoder(face_model))


def _estimated(cls, estimate, face_model, image, order, index, landmarks, encoder=None):
    """The output of a node that estimates codes: estimate(head, pictures, landmarks) -> FaceCode.

    encoder: what it asks, under the host's management of memory.
    """
    n, height, width = host.check_pictures(image, "image", most=2048)
    sockets.choice("order", order, locate.ORDERS)
    known = _given_landmarks(landmarks, n)
    every = isinstance(landmarks, torch.Tensor)  # all of these are wanted
    parts = host.chunks(sum(map(len, known)) if every else n, max(height, 256), max(width, 256))
    progress = host.Progress(len(parts) + (0 if every else n))
    if landmarks is None:
        host.together(host.face_finder())
    points = torch.cat(known) if every else find(image, "image", order, index, progress, known)
    host.together(encoder)  # after the search, which may have driven it away
    image = host.repeat(image, len(points), "image")
    with host.gradients():
        head = host.head(face_model)
        # FLAME without its texture is shown grey
        grey = None if getattr(head, "has_texture", True) else torch.full((1, 3, 256, 256), conditions.GREY)
        codes, overlays = [], []
        for part in parts:
            x = host.pictures(image[part], "image").clone()
            code = estimate(head, x, points[part].to(x.device).clone())
            b = buffers.render(head, code, albedo=grey)
            overlays.append(host.image(x + b.mask * (b.rendered - x)))
            codes.append(host.result(code))
            progress.step()
    code, shown = cat(codes), host.joined(overlays)
    return io.NodeOutput(code, code.light, shown, ui=ui.PreviewImage(host.few(shown), cls=cls))
