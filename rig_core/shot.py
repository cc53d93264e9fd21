"""A film under another light, in bounded memory: passes over its frames, each of which opens the film anew.

`track` finds the face in every frame, `survey` asks the estimators about it and makes their answers steady,
`relight` gives back the finished frames, some at a time. From pass to pass go some hundred numbers a frame.
`pipeline` is the same for one photo: a film of one frame, or one that stands still, comes out alike.

Each frame is inverted to a noise map of its own, which keeps its own detail; nothing random is drawn, so
that there is no noise to hold still. Place, code and light are made steady (see `motion`), identity and
shadow are those of the shot.

Convention: a frame is a picture [1,3,H,W], uint8 or float 0..1, on the device to work on; every pass gets the
same frames.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from . import align, composite, conditions, diffusion, matte, motion, pipeline, samplers, sh
from .estimators import identity, landmarks, locate, parsing, shadow
from .face import FaceCode, cat


@dataclass(frozen=True)
class Track:
    """The face through a film of N frames.

    points [N,68,2] landmarks in pixels; where there are none, those of the nearest earlier frame
    found  [N] bool, frames to edit; the others pass through
    starts first frames of the shots, see `motion`
    """

    points: Tensor
    found: Tensor
    starts: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.points)


def track(
    frames: Iterable[Tensor],
    order: str = "largest",
    index: int = 0,
    missing: str = "error",
    callback: Callable[[int], None] | None = None,
) -> Track:
    """Find one face in every frame and stay with it; order and index choose it where a shot begins.

    missing: what a frame without it means, see locate.MISSING; "previous" edits the frame where the face was
    last, or first comes. callback(i) after each frame. Raises NoFaceError, with the frame's number, and
    ValueError for a film without frames or of changing size.
    """
    if order not in locate.ORDERS or missing not in locate.MISSING:
        raise ValueError(
            f"order is one of {locate.ORDERS}, missing one of {locate.MISSING}; got '{order}', '{missing}'"
        )
    points, change, size = [], [], None
    before, gap, last = None, 0, None
    for i, frame in enumerate(frames):
        image = align.check_image(frame)
        if size not in (None, image.shape[2:]):
            raise ValueError(f"frame {i} is of {list(image.shape[2:])} px, the ones before of {list(size)}")
        size, small = image.shape[2:], motion.thumbnail(image)
        change.append(0.0 if last is None else float((small - last).abs().mean()))
        last = small
        before = None if change[-1] > motion.CUT else before  # perhaps a cut: choose anew
        box = _stay(locate.find(image), before, gap, size, order, index)
        here = None if box is None else landmarks.find_landmarks(image, box)
        here = None if here is None or landmarks.outside(here, size) > 0.5 else here
        if here is None and missing == "error":
            raise landmarks.NoFaceError(
                f"frame {i} of the video (counted from 0) does not show the face: cut it there, or choose "
                f"'previous' or 'pass through' for frames without a face"
            )
        before, gap = (before, gap + 1) if here is None else (landmarks.bounding_boxes(here), 0)
        points.append(None if here is None else here.cpu())
        if callback is not None:
            callback(i)
    if not points:
        raise ValueError("the video has no frames")
    known = torch.tensor([p is not None for p in points])
    if not known.any():
        raise landmarks.NoFaceError(
            "no frame of the video shows a face: it must be at least some 40 pixels wide, seen from the "
            "front or side"
        )
    first = next(p for p in points if p is not None)
    filled = torch.cat(list(itertools.accumulate(points, lambda a, b: a if b is None else b, initial=first)))
    found = torch.ones_like(known) if missing == "previous" else known
    return Track(filled[1:], found, tuple(motion.shot_starts(torch.tensor(change))))


def _stay(boxes: Tensor, before: Tensor | None, gap: int, size, order: str, index: int) -> Tensor | None:
    """The box [1,4] nearest to the one before, further away the longer the face was not seen; or None."""
    if before is None:
        chosen = locate.ranked(boxes, size, order)[index : index + 1]
        return boxes[chosen] if len(chosen) else None
    if not len(boxes):
        return None
    away = ((boxes[:, :2] + boxes[:, 2:]) - (before[:, :2] + before[:, 2:])).norm(dim=1) / 2
    nearest = int(away.argmin())
    reach = float((before[:, 2:] - before[:, :2]).amax()) * (1 + gap) / 2
    return boxes[nearest : nearest + 1] if away[nearest] < reach else None


@dataclass(frozen=True)
class Survey:
    """What is known of the M frames to edit, made steady; on the CPU.

    rows [N] for each frame of the film its place among the M, -1 to pass through
    crop, code, embed [M,E], shadow [M,1]: see `pipeline.Portrait` and `pipeline.Subject`
    """

    rows: Tensor
    crop: align.Crop
    code: FaceCode
    embed: Tensor
    shadow: Tensor


def survey(
    frames: Iterable[Tensor],
    tracked: Track,
    head,
    recognise,
    judge,
    size: int,
    smooth: float = 0.0,
    encoder=None,
    batch: int = 8,
    callback: Callable[[int], None] | None = None,
) -> Survey:
    """Ask the estimators about the face in every frame, `batch` frames at a time.

    head, recognise, judge, encoder: as in `pipeline`. size: of the aligned pictures. smooth: standard
    deviation of the Gaussian over time, in frames, of the place of the face and of its code. Shape, skin,
    identity and the amount of cast shadow are those of the shot. callback(i) after each frame.
    """
    found = tracked.found
    rows = torch.where(found, found.cumsum(0) - 1, -1)
    starts = sorted({int(found[:s].sum()) for s in tracked.starts})
    starts = [s for s in starts if s < int(found.sum())]
    points = tracked.points[found]
    crop = align.ffhq_crop(motion.smooth(points, smooth, starts), size)
    codes, embeds, amounts = [], [], []
    for part in _parts(_faces(frames, rows, crop, callback), batch):
        row = [r for r, _ in part]
        image = torch.cat([x for _, x in part])
        there = crop[row].apply_points(points[row]).to(image)
        codes.append(pipeline.encode(head, image, there, encoder).to("cpu"))
        with torch.no_grad():
            embeds.append(identity.embed(recognise, image).cpu())
            amounts.append(shadow.scalar(judge, image).cpu())
    code = motion.smooth_code(cat(codes), smooth, True, starts)
    embed, amount = (motion.mean(torch.cat(v), starts) for v in (embeds, amounts))
    return Survey(rows, crop, code, embed, amount)


def _faces(frames: Iterable[Tensor], rows: Tensor, crop: align.Crop, callback) -> Iterator:
    """Of the frames to edit, the row and the aligned face [1,3,s,s]."""
    for i, frame in enumerate(frames):
        row = int(rows[i])
        if row >= 0:
            photo = align.check_image(frame)
            yield row, crop[row].to(photo.device).apply(photo).clamp(0, 1)
        if callback is not None:
            callback(i)


def spread(light: Tensor, n: int) -> Tensor:
    """Lights [K,9,3] spread evenly over n frames, with straight lines between them: [n,9,3]."""
    sh.check_light(light)
    if len(light) == 1 or n == 1:
        return light[:1].expand(n, -1, -1)
    at = torch.linspace(0, len(light) - 1, n, dtype=torch.float64)
    before = at.floor().long().clamp(max=len(light) - 2)
    return sh.interpolate(light[before], light[before + 1], (at - before).float())


def relight(
    frames: Iterable[Tensor],
    known: Survey,
    model,
    head,
    light: Tensor | None = None,
    shadow_change: float = 0.0,
    steps: str = pipeline.RELIGHT_STEPS,
    solver: str = pipeline.RELIGHT_SOLVER,
    cast: bool = True,
    parser=None,
    batch: int = 8,
    callback: Callable[[dict], None] | None = None,
) -> Iterator[Tensor]:
    """The frames under the light, one after the other, each [1,3,H,W] 0..1; as many as came in.

    light [K,9,3] spread over the film (`spread`), None for each frame's own; shadow_change is added to the
    amount of cast shadow. Without an edit the frames come back bit for bit. steps, solver, cast, parser: as
    in `pipeline`; inversion always matches means. batch: frames at a time, all that is in memory.
    callback: see samplers.sample.
    """
    lights = None if light is None else spread(light.cpu(), len(known.rows)).split(1)
    edit = lights is not None or shadow_change != 0

    def lit(part: list[tuple[int, Tensor]]) -> Iterator[Tensor]:
        faces = [(i, int(known.rows[i]), x) for i, x in part if edit and known.rows[i] >= 0]
        edits = {}
        if faces:
            told = [
                _describe(x, r, known, model, head, lights and lights[i], shadow_change, cast, parser)
                for i, r, x in faces
            ]
            painted = _paint(model, told, steps, solver, callback)
            edits = {i: (t, *p) for (i, _, _), t, p in zip(faces, told, painted, strict=True)}
        for i, x in part:
            photo = align.check_image(x)
            if i in edits:
                about, before, after = edits[i]
                photo = composite.paste_back(photo, after, about.crop, about.mask, before)
            yield photo

    for part in _parts(enumerate(frames), batch):
        yield from lit(part)


@dataclass(frozen=True)
class _Told:
    """One frame as the denoiser sees it: image [1,3,s,s] 0..1, its place, where an edit may show, and the
    conditions' inputs under the frame's own light and the new one, spatial [2,6,s,s] and vector [2,D]."""

    image: Tensor
    crop: align.Crop
    mask: Tensor
    spatial: Tensor
    vector: Tensor


def _describe(
    frame, row: int, known: Survey, model, head, light, shadow_change: float, cast: bool, parser
) -> _Told:
    photo = align.check_image(frame)
    crop, code = known.crop[row].to(photo.device), known.code[row].to(photo.device)
    image = crop.apply(photo).clamp(0, 1)
    if parser is None:
        mask = matte.head_matte(head, code, image)
    else:
        mask = parsing.head_mask(parsing.parse(parser, image)).to(image)
    own, amount = code.light, known.shadow[row : row + 1].to(image)
    about = pipeline.Subject(
        conditions.background(image, mask), known.embed[row : row + 1].to(image), amount, mask
    )
    portrait = pipeline.Portrait(image, crop, code)
    if model.config.image_size < crop.size:
        portrait, about = pipeline.shrink(portrait, about, model.config.image_size)
    both = torch.cat([own, own if light is None else light.to(own)])
    shadows = torch.cat([amount, amount + shadow_change])
    spatial, vector = pipeline.relight_inputs(model, head, portrait, about, both, shadows, cast)
    return _Told(portrait.image, portrait.crop, pipeline.near(about.matte), spatial, vector)


def _paint(model, told: list[_Told], steps: str, solver: str, callback) -> list[tuple[Tensor, Tensor]]:
    """What the model makes of each frame under its own light and under the new one, [1,3,s,s] each."""
    own, new = (
        model.condition(torch.stack([t.spatial[k] for t in told]), torch.stack([t.vector[k] for t in told]))
        for k in (0, 1)
    )
    schedule, before = diffusion.respace(diffusion.linear_schedule(), steps), None

    def record(info: dict) -> None:
        nonlocal before
        before = info["x"]
        if callback is not None:
            callback(info)

    image = torch.cat([t.image for t in told]) * 2 - 1
    x_T, shifts = samplers.invert_matched(model, image, own, schedule, solver, callback=record)
    found = samplers.Inversion(x_T, shifts, steps, solver)
    after = samplers.sample(model, x_T, new, schedule, solver, callback=callback, correct=found.shift)
    return list(zip(*((x / 2 + 0.5).clamp(0, 1).split(1) for x in (before, after)), strict=True))


def _parts(items: Iterable, n: int) -> Iterator[list]:
    items = iter(items)
    while part := list(itertools.islice(items, n)):
        yield part
