"""A folder of photos of one person -> aligned, checked, fitted portraits.

`gather` finds all faces of all photos, decides whom the album is about (the person whom most photos show),
takes that person's face from each photo and leaves out what is no use, with the reason and the number that
decided. The contact sheet shows it all at a glance.

The limits were measured on rendered persons and official portraits. The identity encoder that comes with the
pack is weak: strangers who look alike are rather kept than odd photos of the person lost.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from . import align, sh
from .contact_sheet import contact_sheet, tile
from .estimators import identity, landmark_fit, landmarks
from .face import FaceCode, cat

PHOTOS = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff"}
FACES = 12  # looked at in one photo, the largest
SMALLEST = 0.35  # of the size wanted: a portrait of fewer photo pixels is too soft
BLURRED = 4e-5  # sharpness below which a portrait counts as blurred
SOFT = 0.1  # share of the album's median detail below which a portrait counts as blurred
INSIDE, COVERED = 0.95, 0.7  # least shares of the landmarks, and of the portrait, inside the photo
NEAR = 0.5  # cosine of two faces' vectors from which they are rather one person than two
ALIKE, ALIKE_AMONG = 0.4, 0.5  # least similarity to the person: of a photo's only face, of one of several
APART = 0.1  # how much more alike it must be than the next face of its photo
SAME, SAME_PATTERN = 0.012, 0.95  # two portraits are one photo: mean difference below, correlation above
WORST = 6.0  # px at 256 px, mean landmark error of a fit that is still taken
BATCH = 16  # portraits fitted at once


@dataclass(frozen=True)
class Album:
    """N portraits of one person, and what was left out.

    names: of the photos kept. images [N,3,s,s] 0..1, FFHQ-aligned. landmarks [N,68,2] px of those. codes: N
    faces in their frame. rejected: photo's name -> why. sheet [3,H,W] 0..1: the kept, then the rejected ones.
    """

    names: list[str]
    images: Tensor
    landmarks: Tensor
    codes: FaceCode
    rejected: dict[str, str]
    sheet: Tensor


@dataclass(frozen=True)
class Face:
    """One face of photo number `photo`: image [3,s,s] uint8 aligned, points [68,2] px of it.

    vector [E]: who it is, of length 1. side: of the portrait in photo pixels. fault: why it is no use.
    """

    photo: int
    image: Tensor
    points: Tensor
    vector: Tensor
    side: float
    detail: float
    fault: str | None


def paths(folder: str | Path) -> list[Path]:
    """The pictures of a folder, not of those below it; 2 before 10. Raises ValueError when there are none."""
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"{folder} is no folder: give the folder that holds the photos")
    found = [p for p in folder.iterdir() if p.suffix.lower() in PHOTOS and p.name[0] != "." and p.is_file()]
    if not found:
        raise ValueError(f"{folder} holds no photos ({', '.join(sorted(PHOTOS))})")
    parts = {p: re.split(r"(\d+)", p.name.casefold()) for p in found}
    return sorted(found, key=lambda p: [(int(t), "") if t.isdecimal() else (-1, t) for t in parts[p]])


def gather(
    photos: Iterable[tuple[str, Callable[[], Tensor]]],
    size: int,
    recognise: identity.ArcFace,
    fit: Callable[[Tensor, Tensor], FaceCode],
    keep: int | None = None,
    callback: Callable[[int, int, str], None] | None = None,
    head=None,
) -> Album:
    """Portraits of `size` px of the person whom most photos show. Photos are read one at a time.

    photos: names, and functions that read them as [1,3,H,W] 0..1 (or raise ValueError: left out).
    fit(images [B,3,s,s], landmarks [B,68,2]) gives their FaceCode. keep: at most so many portraits, those
    that differ most in pose and light. callback(done, total, name) after each photo; it may raise.
    head: the codes' HeadModel; with it portraits that it does not fit are left out.
    Raises ValueError, with the reasons, when nothing is left.
    """
    photos, faces, rejected, tiles = list(photos), [], {}, {}
    for i, (name, read) in enumerate(photos):
        try:
            photo = align.check_image(read())
            tiles[i] = tile(photo)
            found = find(i, photo, size, recognise)
            faces += found
            if not found:
                rejected[i] = f"no face found in its {photo.shape[3]} x {photo.shape[2]} px"
        except ValueError as e:
            rejected[i] = str(e)
        if callback:
            callback(i + 1, len(photos), name)
    names = [name for name, _ in photos]
    found = choose(faces, rejected) if faces else []
    tiles |= {f.photo: tile(f.image[None] / 255) for f in found}
    kept = [f for f in found if f.photo not in rejected]
    kept = distinct(without_blurred(kept, rejected), names, size, rejected)
    kept, codes = fitted(kept, fit, head, rejected)
    if not kept:
        why = [f"{names[i]}: {rejected[i]}" for i in sorted(rejected)]
        more = [f"and {len(why) - 10} more"] * (len(why) > 10)
        raise ValueError(f"none of the {len(photos)} photos can be used. {'; '.join(why[:10] + more)}")
    if keep is not None and keep < len(kept):
        chosen = varied(codes, keep)
        for i in set(range(len(kept))) - set(chosen):
            rejected[kept[i].photo] = f"not needed: {keep} portraits are wanted, those kept differ more"
        kept, codes = [kept[i] for i in chosen], codes[chosen]
    return Album(
        names=[names[f.photo] for f in kept],
        images=torch.stack([f.image for f in kept]).float() / 255,
        landmarks=torch.stack([f.points for f in kept]),
        codes=codes,
        rejected={names[i]: rejected[i] for i in sorted(rejected)},
        sheet=contact_sheet(
            [(names[f.photo], tiles[f.photo]) for f in kept],
            [(names[i], tiles.get(i), rejected[i]) for i in sorted(rejected)],
        ),
    )


# -------------------------------------------------------------------------------------- the faces of a photo


@torch.no_grad()
def find(number: int, photo: Tensor, size: int, recognise: identity.ArcFace) -> list[Face]:
    """The faces of a photo [1,3,H,W], the largest first."""
    try:
        boxes, _ = landmarks.find_faces(photo)
    except landmarks.NoFaceError:
        return []
    faces = []
    for points in landmarks.find_landmarks(photo, boxes[:FACES]).split(1):
        crop = align.ffhq_crop(points, size)
        image = crop.apply(photo).clamp(0, 1)
        side = portrait_side(crop)
        fault = _outside(photo, points, crop) or too_small(side, size) or blurred(image)
        inside = crop.apply_points(points)[0]
        pixels = (image[0] * 255).round().byte()
        faces.append(Face(number, pixels, inside, who(recognise, image), side, detail(image), fault))
    return faces


def who(recognise: identity.ArcFace, image: Tensor) -> Tensor:
    """Identity vector [E] of length 1, the mean of a portrait [1,3,s,s] and its mirror image.

    A twelfth is cut off at each side: without hair and backdrop fewer strangers pass for the person.
    """
    m = image.shape[-1] // 12
    image = image[..., m : image.shape[-2] - m, m : image.shape[-1] - m]
    vectors = identity.embed(recognise, torch.cat([image, image.flip(-1)]))
    return F.normalize(vectors.sum(0), dim=0).cpu()


def portrait_side(crop: align.Crop) -> float:
    """Side of an aligned portrait in photo pixels."""
    return crop.size / float(torch.linalg.det(crop.matrix[0, :2, :2])) ** 0.5


def too_small(side: float, size: int) -> str | None:
    """Why a portrait of so few photo pixels is no use at this size."""
    if side < SMALLEST * size:
        want = f"{SMALLEST * size:.0f}"
        return f"the face is too small: its portrait is {side:.0f} px of the photo, want {want}"
    return None


def blurred(image: Tensor) -> str | None:
    """Why a portrait [1,3,s,s] is too blurred for any use."""
    found = sharpness(image)
    if found < BLURRED:
        return f"blurred: sharpness {found * 1e6:.0f} millionths, want {BLURRED * 1e6:.0f}"
    return None


def sharpness(image: Tensor) -> float:
    """Variance of the Laplacian of the grey portrait [1,3,s,s] at 128 px."""
    return float(_laplacian(_grey128(image)).var())


def detail(image: Tensor) -> float:
    """The same of the face alone, over the variance of its values: dim light does not count as blur."""
    face = _grey128(image)[:, :, 32:112, 24:104]
    return float(_laplacian(face).var() / face.var().clamp_min(1e-6))


def _grey128(image: Tensor) -> Tensor:
    return F.interpolate(image, (128, 128), mode="area").mean(1, keepdim=True)


def _laplacian(grey: Tensor) -> Tensor:
    return F.conv2d(grey, grey.new_tensor([[0, 1, 0], [1, -4, 1], [0, 1, 0]])[None, None])


def _outside(photo: Tensor, points: Tensor, crop: align.Crop) -> str | None:
    """Why a face that leaves the photo is no use. points [1,68,2] px of the photo."""
    h, w = photo.shape[2:]

    def share(p: Tensor) -> float:
        return float(((p > -0.5) & (p < p.new_tensor([w, h]) - 0.5)).all(-1).float().mean())

    if share(points) < INSIDE:
        return f"the face leaves the photo: {round(68 * share(points))} of its 68 landmarks are inside"
    at = (torch.arange(16) + 0.5) * (crop.size / 16) - 0.5
    covered = share(crop.invert_points(torch.cartesian_prod(at, at)[None]))
    if covered < COVERED:
        return f"the face leaves the photo, which holds {covered:.0%} of its portrait, want {COVERED:.0%}"
    return None


# ----------------------------------------------------------------------------------------- whose album it is


def choose(faces: list[Face], rejected: dict[int, str]) -> list[Face]:
    """The face of each photo that is likeliest the person's; rejects photos where it is not, or no use."""
    vectors, photo = torch.stack([f.vector for f in faces]), torch.tensor([f.photo for f in faces])
    largest = torch.zeros(int(photo.max()) + 1).scatter_reduce(
        0, photo, torch.tensor([f.side for f in faces]), "amax"
    )
    votes = [0.0 if f.fault else float(f.side / largest[f.photo]) ** 0.25 for f in faces]
    alike = similarity(vectors, photo, torch.tensor(votes)).tolist()
    found = []
    for number, group in groupby(range(len(faces)), lambda i: faces[i].photo):
        best, *others = sorted(group, key=lambda i: -alike[i])
        limit = ALIKE_AMONG if others else ALIKE
        found.append(faces[best])
        if faces[best].fault:
            rejected[number] = faces[best].fault
        elif alike[best] < limit:
            what = f"none of its {len(others) + 1} faces is the person" if others else "shows another person"
            below = math.floor(alike[best] * 100) / 100
            rejected[number] = f"{what} (similarity {below:.2f}, want {limit:.2f})"
        elif others and alike[best] - alike[others[0]] < APART:
            pair = f"similarity {alike[best]:.2f} and {alike[others[0]]:.2f}"
            rejected[number] = f"two of its faces may be the person ({pair}): crop it to one"
    return found


def similarity(vectors: Tensor, photo: Tensor, votes: Tensor) -> Tensor:
    """Cosine of each face [F] to the person whom most photos show, as the OTHER photos show that person.

    vectors [F,E] of length 1; photo [F]: number of its photo; votes [F] 0..1: what a face weighs when the
    person is looked for. The face with the most neighbours in other photos is the start; the mean of the
    nearest face of each photo, where it is near, is then repeated until it stays (a mean shift).
    """
    count = int(photo.max()) + 1
    near = torch.sigmoid((vectors @ vectors.T - NEAR) / 0.1) * votes
    near = torch.where(photo[:, None] == photo, 0, near)
    by_photo = near.new_zeros(len(photo), count).scatter_reduce(1, photo.expand_as(near), near, "amax")
    members = torch.where(votes > 0, by_photo.sum(1) + votes, -1).argmax()[None]
    for _ in range(20):
        score = torch.where(votes > 0, vectors @ F.normalize(vectors[members].sum(0), dim=0), -1)
        best = score.new_full((count,), NEAR).scatter_reduce(0, photo, score, "amax")
        nearest = (score == best[photo]).nonzero()[:, 0]
        if not len(nearest) or torch.equal(nearest, members):
            break
        members = nearest
    own = vectors.new_zeros(count, vectors.shape[1]).index_add(0, photo[members], vectors[members])
    others = own.sum(0) - own
    alone = others.norm(dim=1, keepdim=True) < 1e-4  # nothing to compare with but itself
    return (vectors * F.normalize(torch.where(alone, own, others), dim=1)[photo]).sum(1)


# ----------------------------------------------------------------------------------- which portraits are good


def without_blurred(faces: list[Face], rejected: dict[int, str]) -> list[Face]:
    """Those that are not far softer than the album's others."""
    usual = float(torch.tensor([f.detail for f in faces]).median()) if faces else 0.0
    for f in faces:
        if f.detail < SOFT * usual:
            share = f.detail / usual
            rejected[f.photo] = f"blurred: {share:.0%} of the detail that the others have, want {SOFT:.0%}"
    return [f for f in faces if f.photo not in rejected]


def distinct(faces: list[Face], names: list[str], size: int, rejected: dict[int, str]) -> list[Face]:
    """One of each photo that is there twice (re-saved, resized, cropped): the larger, or else the sharper."""
    kept: list[tuple[Face, Tensor]] = []
    for face in faces:
        new = face, in_small(face.image)
        for i, old in enumerate(kept):
            differ = float((new[1] - old[1]).abs().mean())
            if differ < SAME and correlation(new[1], old[1]) > SAME_PATTERN:
                winner, loser = (new, old) if _better(face, old[0], size) else (old, new)
                kept[i] = winner
                why = f"the same photo as {names[winner[0].photo]} ({differ:.1%} different)"
                rejected[loser[0].photo] = why
                break
        else:
            kept.append(new)
    return sorted((k[0] for k in kept), key=lambda f: f.photo)


def in_small(image: Tensor) -> Tensor:
    """A portrait [3,s,s] uint8 as [3,32,32] 0..1, by which copies are recognised."""
    return F.interpolate(image[None].float() / 255, (32, 32), mode="area")[0]


def correlation(a: Tensor, b: Tensor) -> float:
    """Of two pictures' grey values: unlike their difference it does not shrink with the contrast."""
    return float(torch.corrcoef(torch.stack([a.mean(0).flatten(), b.mean(0).flatten()]))[0, 1])


def _better(a: Face, b: Face, size: int) -> bool:
    """Whether a is clearly larger, as far as the size wanted counts, or as large and clearly sharper."""
    larger = min(a.side, size) / min(b.side, size)
    return larger > 1.1 or (larger > 1 / 1.1 and a.detail > 1.3 * b.detail)


@torch.no_grad()
def fitted(
    faces: list[Face], fit: Callable, head, rejected: dict[int, str]
) -> tuple[list[Face], FaceCode | None]:
    """The faces that the head fits, and their codes on the CPU (None without faces)."""
    kept, codes = [], []
    for start in range(0, len(faces), BATCH):
        batch = faces[start : start + BATCH]
        points = torch.stack([f.points for f in batch])
        code = fit(torch.stack([f.image for f in batch]).float() / 255, points)
        numbers = torch.cat([v.flatten(1) for v in vars(code).values() if isinstance(v, Tensor)], 1)
        error = torch.zeros(len(batch))
        if head is not None:
            error = landmark_fit.residual(head, code, points.to(numbers))[:, 17:].mean(1) * 256 / code.size[0]
        good = []
        for i, face in enumerate(batch):
            if not numbers[i].isfinite().all():
                rejected[face.photo] = "the head does not fit: its code holds NaN or infinity"
            elif error[i] >= WORST:
                why = f"{error[i]:.1f} px mean error of the landmarks at 256 px, want {WORST:.0f}"
                rejected[face.photo] = f"the head does not fit: {why}"
            else:
                good.append(i)
        if good:
            kept += [batch[i] for i in good]
            codes.append(code[good].to("cpu"))
    return kept, cat(codes) if codes else None


def varied(codes: FaceCode, count: int) -> list[int]:
    """Numbers of `count` faces that differ most in pose and light, in their order.

    Each next one is the farthest from all before it (Gonzalez 1985); the first is the most ordinary.
    """
    light = sh.luminance(codes.light)
    look = torch.cat([codes.pose[:, :3] / 0.2, light[:, 1:4] / light[:, :1] / 0.15], 1)
    chosen = [int((look - look.median(0).values).norm(dim=1).argmin())]
    while len(chosen) < count:
        chosen.append(int(torch.cdist(look, look[chosen]).amin(1).argmax()))
    return sorted(chosen)
