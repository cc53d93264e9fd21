"""The two recipes end to end, readable in one sitting.

DiffusionRig: photo -> face -> code -> edit -> buffers -> photo' (`estimate`, `turn`, `paint`, `paste`).
DiFaReli: photo -> face -> subject -> noise -> the same noise under other lights (`estimate`, `describe`,
`to_noise`, `relight`, `paste`). Every arrow is one function here and one node on the canvas; this module
only strings them together.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from . import align, buffers, composite, conditions, diffusion, matte, ratio, samplers, sh, warp
from .estimators import deca, identity, landmark_fit, landmarks, parsing, shadow
from .face import FaceCode, axis_angle_to_matrix, cat, matrix_to_axis_angle

STEPS, SOLVER, GUIDANCE = "quad20", "ab2", 1.5
RELIGHT_STEPS, RELIGHT_SOLVER, RELIGHT_GUIDANCE = "quad33", "ab2", 1.0
DARK = 0.01  # display value added before a geometric mean
NEAR = 0.09  # of the width: how far around the head an edit may show, for the hair


@dataclass(frozen=True)
class Portrait:
    """A face cut out of a photo, upright as in FFHQ, and its code.

    image [1,3,s,s] 0..1; crop: the way back to the photo; code: in the frame of image.
    """

    image: Tensor
    crop: align.Crop
    code: FaceCode


def estimate(
    head, photo: Tensor, size: int, points: Tensor | None = None, face: int = 0, encoder=None
) -> Portrait:
    """Find a face, set it upright and estimate its code: fit the head, or ask the head's encoder.

    photo [1,3,H,W] 0..1. size: of the crop in pixels, the denoiser's (or larger, see `shrink`). points
    [1,68,2]: landmarks in photo pixels if they are known. face: 0 is the largest face of the photo. encoder:
    DECA for FLAME (`checkpoints.load_face_model` gives both); None fits the head to landmarks and pixels.
    Raises landmarks.NoFaceError when there is no such face.
    """
    photo = align.check_image(photo)
    if points is None:
        boxes, _ = landmarks.find_faces(photo)
        if face >= len(boxes):
            raise landmarks.NoFaceError(f"the photo shows {len(boxes)} faces, there is no face number {face}")
        points = landmarks.find_landmarks(photo, boxes[face : face + 1])
    crop = align.ffhq_crop(points, size)
    image = crop.apply(photo)
    return Portrait(image, crop, encode(head, image, crop.apply_points(points), encoder))


def encode(head, image: Tensor, points: Tensor, encoder=None) -> FaceCode:
    """The codes of pictures [B,3,H,W] 0..1 with landmarks [B,68,2] in their pixels: see `estimate`."""
    if encoder is None:
        return landmark_fit.fit(head, points, tuple(image.shape[2:]), image)
    code = deca.encode(encoder, image, points)
    code.require_head(head)
    return code


def turn(
    head,
    code: FaceCode,
    yaw: float = 0.0,
    pitch: float = 0.0,
    roll: float = 0.0,
    jaw: float = 0.0,
    gaze=(0.0, 0.0),
    **expressions: float,
) -> FaceCode:
    """Edit pose and expression. Angles in degrees, added to the code's own.

    yaw > 0 turns the face to the right of the picture, pitch > 0 lifts the chin, roll > 0 tilts it
    counter-clockwise; jaw > 0 opens the mouth; gaze (right, up). expressions: weights of the head's named
    shapes, 0..1, such as mouthSmile_L=0.6. Raises ValueError for a name that the head does not have, and for
    a gaze where its eyes rest. The open head turns on its neck; FLAME's face is re-centred (`recentre`), as
    published.
    """
    code.require_head(head)
    deg = torch.pi / 180
    x, y, z = (code.pose.new_tensor([v]) * deg for v in (-pitch, yaw, roll))
    zero = torch.zeros_like(x)
    step = (
        axis_angle_to_matrix(torch.stack([zero, zero, z], 1))
        @ axis_angle_to_matrix(torch.stack([zero, y, zero], 1))
        @ axis_angle_to_matrix(torch.stack([x, zero, zero], 1))
    )
    pose = code.pose.clone()
    if yaw or pitch or roll:
        pose[:, :3] = matrix_to_axis_angle(step @ axis_angle_to_matrix(code.pose[:, :3]))
    pose[:, 3] += jaw * deg
    if any(gaze):
        if pose.shape[1] < 8:
            raise ValueError(f"the eyes of the {head.name} head rest: leave the gaze at 0")
        pose[:, 6:8] += pose.new_tensor(gaze) * deg
    exp = code.exp
    for name, weight in expressions.items():
        if name not in head.expression_names:
            known = ", ".join(head.expression_names) or "numbers without names"
            raise ValueError(f"the {head.name} head has no expression '{name}', only: {known}")
        exp = exp + weight * head.expressions[head.expression_names.index(name)].to(exp)
    edited = code.replace(pose=pose, exp=exp)
    return recentre(head, code, edited) if head.name == "flame" else edited


def recentre(head, source: FaceCode, edited: FaceCode) -> FaceCode:
    """Edited faces [B] of a source [B] or [1], moved so that their centres stay where the source's are.

    The published code moves the vertices by the difference of the centres (HeadModel.centre), after every
    edit; here the camera moves instead, which looks the same. Convention: a mean shape is an edit, too.
    """

    def seen(code: FaceCode) -> Tensor:
        """Centre [B,2] in the camera's picture."""
        centre = head.centre(head.verts(code.shape, code.exp, code.pose))
        return code.cam[:, :1] * (centre[:, :2] + code.cam[:, 1:])

    scale, shift = edited.cam.split((1, 2), 1)
    shift = shift + (seen(source) - seen(edited)) / scale
    return edited.replace(cam=torch.cat([scale, shift], 1))


@dataclass(frozen=True)
class Edit:
    """A painted edit, ready to go back into the photo.

    image  [B,3,s,s] 0..1, the painted portraits
    before [1,3,s,s] what the denoiser makes of the photo, only its pose edited: image / before is the edit
    grid   [1,s,s,2] where the moved photo's pixels come from, None when nothing moved
    mask   [1,1,s,s] where the edit may show: the head and what is near it, such as hair; None for everywhere
    """

    image: Tensor
    before: Tensor
    grid: Tensor | None = None
    mask: Tensor | None = None


def paint(
    rig,
    head,
    portrait: Portrait,
    target: FaceCode,
    steps: str = STEPS,
    solver: str = SOLVER,
    keep: bool = True,
    guidance: float = GUIDANCE,
    seed: int = 0,
    callback=None,
) -> Edit:
    """Paint the portrait with the target code: B lights of one geometry at once.

    keep: start from the photo itself, moved with the head and inverted to noise under its own light, so that
    hair, background and identity stay; without it start from random noise, as the paper does.
    guidance: how far the edit is driven, 1 as trained (see `guided`); above 1 a step costs two evaluations.
    steps and solver: see diffusion.respace and samplers.sample. callback: see samplers.sample.
    """
    source, schedule = portrait.code, diffusion.respace(diffusion.linear_schedule(), steps)
    moved = target[0].replace(light=source.light, tex=source.tex)
    start, grid, hidden = portrait.image, None, None
    if not warp.same_geometry(source, moved):
        grid, hidden = warp.flow(head, source, moved)
        start = warp.apply(start, grid)
    codes = cat([moved, target])
    rendered = buffers.render(head, codes)
    condition = rig.condition(rendered.stack(), portrait.image * 2 - 1)
    noise = torch.randn(start.shape, generator=torch.Generator().manual_seed(seed)).to(start)
    if keep:
        x_T = samplers.invert(rig, start * 2 - 1, condition[0], schedule, solver, callback=callback)
        noise = x_T if hidden is None else variance_mix(x_T, noise, hidden)
    noise = noise.expand(len(codes), -1, -1, -1)
    denoiser = rig if guidance == 1 else guided(rig, condition[0], guidance)
    painted = samplers.sample(denoiser, noise, condition, schedule, solver, callback=callback) / 2 + 0.5
    painted = painted.clamp(0, 1)
    return Edit(painted[1:], painted[:1], grid, near(rendered.mask[:1]))


def near(mask: Tensor, reach: float = NEAR) -> Tensor:
    """Where an edit of the head in mask [N,1,s,s] may show: there and `reach` of the width around it."""
    r = round(reach * mask.shape[-1])
    for sides in ((r, 0), (0, r)):  # one axis after the other is the same square, and quick
        mask = F.max_pool2d(mask, [2 * v + 1 for v in sides], 1, sides)
    return mask


@dataclass(frozen=True)
class Subject:
    """What DiFaReli keeps of a photo under every light.

    background [1,3,s,s] -1..1 without face, neck and hair; embed [1,E] of the identity; shadow [1,1] the
    amount of cast shadow; matte [1,1,s,s] 0..1 of face, neck and hair.
    """

    background: Tensor
    embed: Tensor
    shadow: Tensor
    matte: Tensor


def describe(head, portrait: Portrait, recognise, judge, parser=None) -> Subject:
    """Ask the estimators about a portrait: the identity encoder, the shadow estimator, the face parser.

    Without a parser the mask of face, neck and hair comes from the fitted head and the picture's colours.
    """
    image = portrait.image
    if parser is None:
        mask = matte.head_matte(head, portrait.code, image)
    else:
        mask = parsing.head_mask(parsing.parse(parser, image)).to(image)
    embed, amount = identity.embed(recognise, image), shadow.scalar(judge, image)
    return Subject(conditions.background(image, mask), embed, amount, mask)


def shrink(portrait: Portrait, subject: Subject, size: int) -> tuple[Portrait, Subject]:
    """A portrait and its subject at the size of a smaller denoiser, [1,3,size,size].

    As models below 256 px were published: described at 256, then made smaller (LANCZOS).
    """
    image, background = (conditions.shrink(v, size) for v in (portrait.image, subject.background / 2 + 0.5))
    crop = None if portrait.crop is None else portrait.crop.resized(size)
    small = Portrait(image, crop, portrait.code.resized((size, size)))
    mask = F.interpolate(subject.matte, (size, size), mode="area")
    return small, replace(subject, background=background * 2 - 1, matte=mask)


def check_size(model, portrait: Portrait, subject: Subject) -> int:
    """The side of a denoiser's pictures; ValueError when the portrait has another."""
    size = model.config.image_size
    for what, image in (("portrait", portrait.image), ("background", subject.background)):
        if tuple(image.shape[2:]) != (size, size):
            raise ValueError(
                f"the {what} is {image.shape[3]} x {image.shape[2]} px, the denoiser works at {size}: "
                f"estimate it with size={size}, or shrink a larger one"
            )
    return size


def relight_inputs(
    model,
    head,
    portrait: Portrait,
    subject: Subject,
    light: Tensor,
    shadow: Tensor | None = None,
    cast: bool = True,
) -> tuple[Tensor, Tensor]:
    """What `DiFaReli.condition` takes: spatial [N,6,s,s] and vector [M,D]; arguments as `relight_condition`.

    Of the model only its config is asked, so that it need not be loaded for it.
    """
    sh.check_light(light)
    code, size = portrait.code, check_size(model, portrait, subject)
    drawn = conditions.draw(head, code, conditions.drawing_size(head, size))
    visible = None
    if cast:
        visible = torch.cat([conditions.visibility(head, code, light=v[None], drawn=drawn) for v in light])
    reference = conditions.fit(conditions.reference(drawn.normal, drawn.mask, light, visible), size)
    vector = conditions.vector(code, subject.embed, subject.shadow if shadow is None else shadow)
    return conditions.spatial(reference, subject.background), vector


def relight_condition(
    model,
    head,
    portrait: Portrait,
    subject: Subject,
    light: Tensor,
    shadow: Tensor | None = None,
    cast: bool = True,
):
    """DiFaReli's condition for N lights [N,9,3] on one photo; what does not depend on the light exists once.

    shadow [N,1] or [1,1]: amounts of cast shadow, the photo's own when None. cast: the shading reference
    carries the shadow that the head casts on itself under each light. Raises ValueError for a light that is
    not finite and for a portrait of another size than the denoiser's.
    """
    return model.condition(*relight_inputs(model, head, portrait, subject, light, shadow, cast))


def to_noise(
    model,
    head,
    portrait: Portrait,
    subject: Subject,
    steps: str = RELIGHT_STEPS,
    solver: str = RELIGHT_SOLVER,
    match: bool = True,
    cast: bool = True,
    callback=None,
) -> samplers.Inversion:
    """Invert a portrait under its own light, once for all lights to come.

    match: also correct the drift of the channels' means, for as many evaluations again (section 3.5).
    Worth it, see docs/solvers.md: 99 evaluations for the first light, 33 for each further one.
    """
    condition = relight_condition(model, head, portrait, subject, portrait.code.light, cast=cast)
    schedule, image = diffusion.respace(diffusion.linear_schedule(), steps), portrait.image * 2 - 1
    if match:
        found = samplers.invert_matched(model, image, condition, schedule, solver, callback=callback)
        return samplers.Inversion(*found, steps, solver)
    x_T = samplers.invert(model, image, condition, schedule, solver, callback=callback)
    return samplers.Inversion(x_T, None, steps, solver)


def relight(
    model,
    head,
    portrait: Portrait,
    subject: Subject,
    light: Tensor,
    shadow: Tensor | None = None,
    noise: samplers.Inversion | None = None,
    guidance: float = RELIGHT_GUIDANCE,
    cast: bool = True,
    trust: float = 0.0,
    batch: int = 8,
    callback=None,
) -> Edit:
    """The portrait under N lights [N,9,3] of the code's head.

    shadow [N,1] or [1,1]: amounts of cast shadow, the photo's own when None. noise: of `to_noise`, made here
    when None. guidance: how far the edit is driven, 1 as trained (see `guided`). batch: lights at a time.
    trust: share of the ratio image in the result, a geometric mean: 0 as published, more where head and
    lights are known better than a fit can tell.
    """
    noise = noise or to_noise(model, head, portrait, subject, cast=cast, callback=callback)
    schedule = diffusion.respace(diffusion.linear_schedule(), noise.steps)
    denoiser = model
    if guidance != 1:
        own = relight_condition(model, head, portrait, subject, portrait.code.light, cast=cast)
        denoiser = guided(model, own, guidance)
    shadow = subject.shadow if shadow is None else shadow
    n, painted = max(len(light), len(shadow)), []
    if any(len(v) not in (1, n) for v in (light, shadow)):
        raise ValueError(
            f"{len(light)} lights and {len(shadow)} shadow scalars: give one of either, or as many"
        )
    for i in range(0, n, batch):
        part = [v[i : i + batch] if len(v) == n else v for v in (light, shadow)]
        condition = relight_condition(model, head, portrait, subject, *part, cast)
        x_T = noise.x_T.expand(len(condition), -1, -1, -1)
        painted.append(
            samplers.sample(
                denoiser, x_T, condition, schedule, noise.solver, callback=callback, correct=noise.shift
            )
        )
    image = (torch.cat(painted) / 2 + 0.5).clamp(0, 1)
    if trust:
        known = ratio.ratio_image(head, portrait.image, portrait.code, light, subject.matte)
        image = ((image + DARK) ** (1 - trust) * (known + DARK) ** trust - DARK).clamp(0, 1)
    return Edit(image, portrait.image, None, near(subject.matte))


def guided(rig, source, weight: float):
    """A denoiser that exaggerates what distinguishes the wanted buffers from the photo's own.

    eps = eps(source) + weight * (eps(target) - eps(source)), after ControlFace (2025): the edit answers more
    strongly, without retraining. source: the condition of the unedited face, a batch of one.
    """

    def denoiser(x_t: Tensor, t: Tensor, condition) -> Tensor:
        before = rig(x_t, t, source)
        return torch.lerp(before, rig(x_t, t, condition), weight)

    return denoiser


def paste(photo: Tensor, portrait: Portrait, edit: Edit) -> Tensor:
    """Carry edits [B] of one face to the photo at its own resolution: [1,3,H,W] -> [B,3,H,W].

    The photo (moved along the flow where the pose changed) times edit.image / edit.before in linear light:
    pores and lashes come from the photo, whatever the denoiser's resolution.
    """
    photo = align.check_image(photo)
    at = place(photo, portrait.crop, edit.before, edit.mask, edit.grid)
    return composite.compose(photo, [at], [edit.image])


def place(
    photo: Tensor,
    crop: align.Crop,
    before: Tensor,
    mask: Tensor | None = None,
    grid: Tensor | None = None,
    soft: float = composite.SOFT,
) -> composite.Place:
    """Where edits of one face go in the photo [1,3,H,W]; before, mask and grid [1,...] as in `Edit`.

    soft: the edge's width in crop sides. Where the pose changed, the photo itself is moved, at up to 2048
    pixels a side, and put under the light.
    """
    if grid is None:
        return composite.place(photo, crop, mask, before, soft=soft)
    photo_px = float(torch.linalg.det(crop.matrix[0, :2, :2].cpu())) ** -0.5 * crop.size
    fine = crop.resized(max(crop.size, min(2048, round(photo_px))))
    grid = F.interpolate(grid.permute(0, 3, 1, 2), (fine.size, fine.size), mode="bilinear")
    moved = warp.apply(fine.apply(photo), grid.permute(0, 2, 3, 1))
    # the fine crop as a photo of its own
    inside = align.Crop(torch.eye(3)[None].to(moved), fine.size).resized(crop.size)
    under = composite.place(moved, inside, mask, before, soft=soft)
    return replace(composite.place(photo, fine, mode="replace", soft=soft), under=(moved, under))


def variance_mix(a: Tensor, b: Tensor, w: Tensor) -> Tensor:
    """Blend two unit-variance noises by w (0 gives a), keeping the variance."""
    return (a * (1 - w) + b * w) / ((1 - w) ** 2 + w**2).sqrt()
