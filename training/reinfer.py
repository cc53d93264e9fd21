"""Does an edited picture show what was asked for? Its face code is estimated again and compared.

So does Table 1 of DiffusionRig (Ding et al. 2023, "DECA re-inference"): DECA reads the code off every result,
and the root mean square errors to the code that was asked for are printed for light, shape, expression and
pose. Here the estimator is DECA where its files are there, else the landmark fit of the head.

`errors` compares the numbers themselves, as they stand in a FaceCode. They mean different things on different
heads, hardly anything where many coefficients are little to be seen (shape and expression of the open head),
and a light's level is shared with the albedo. So `distances` compares what they do: millimetres on the face,
and shading at the best common level. Both have a floor, the estimator's own noise: measure the truth, too.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rig_core import align, sh
from rig_core.estimators import deca, landmark_fit, landmarks
from rig_core.face import FaceCode, cat

PARTS = ("light", "shape", "expression", "pose")


def reinfer(head, images: Tensor, points: Tensor | None = None, encoder=None) -> FaceCode:
    """The codes of pictures [B,3,s,s] RGB 0..1, in their frame. A picture without a face is a row of NaN.

    points [B,68,2]: landmarks in pixels where they are known, else the largest face is looked for.
    encoder: DECA's, with the FLAME head; without it the head is fitted to the landmarks and the picture.
    Never raises for what a picture shows (`seen` tells which rows are codes), only for what is no picture.
    """
    images = align.check_image(images)
    size, codes = tuple(images.shape[2:]), []
    for i, image in enumerate(images.split(1)):
        try:
            at = find(image) if points is None else points[i : i + 1]
            if encoder is None:
                code = landmark_fit.fit(head, at, size, image)
            else:
                code = deca.encode(encoder, image, at)
        except ValueError:  # no face, or none of its skin to be seen
            nothing = head.mean_code(1, size).to(images)
            code = nothing._map(lambda v: torch.full_like(v, torch.nan))
        codes.append(code)
    return cat(codes)


def find(image: Tensor) -> Tensor:
    """Landmarks [1,68,2] of the largest face in a picture [1,3,H,W]. Raises landmarks.NoFaceError."""
    boxes, _ = landmarks.find_faces(image)
    return landmarks.find_landmarks(image, boxes[:1])


def seen(code: FaceCode) -> Tensor:
    """Which rows of a code are faces, [B] bool."""
    return code.cam.isfinite().all(1) & code.light.isfinite().all((1, 2))


def errors(head, found: FaceCode, wanted: FaceCode) -> dict[str, Tensor]:
    """Root mean square errors of the numbers of `PARTS`, [B] each, NaN where no face was found.

    light: 27 coefficients of the basis in sh.py; pose: the axis-angles of head and jaw, radians; shape and
    expression: coefficients of the head, standard deviations. Raises ValueError for codes of another head.
    """
    _require(head, found, wanted)
    pairs = (
        (found.light, wanted.light),
        (found.shape, wanted.shape),
        (found.exp, wanted.exp),
        (found.pose[:, :6], wanted.pose[:, :6]),
    )
    return {k: rms((a - b).flatten(1)) for k, (a, b) in zip(PARTS, pairs, strict=True)}


def distances(head, found: FaceCode, wanted: FaceCode) -> dict[str, Tensor]:
    """What the errors do, [B] each: of the light in % of the shading, of the rest millimetres on the face.

    light: see `shading_error`. Shape, expression (with the jaw) and pose (of the head): the wanted face with
    that part of the found one, root mean square distance of the face's vertices; shapes at the scale and
    place that fit best, which a single picture does not tell. Raises ValueError for codes of another head.
    """
    _require(head, found, wanted)
    zero = torch.zeros_like(wanted.pose)
    jaw = torch.cat([zero[:, :3], wanted.pose[:, 3:]], 1)
    found_jaw = torch.cat([zero[:, :3], found.pose[:, 3:6], wanted.pose[:, 6:]], 1)
    turned = torch.cat([found.pose[:, :3], wanted.pose[:, 3:]], 1)
    pairs = (
        ((found.shape, 0 * wanted.exp, zero), (wanted.shape, 0 * wanted.exp, zero)),
        ((wanted.shape, found.exp, found_jaw), (wanted.shape, wanted.exp, jaw)),
        ((wanted.shape, wanted.exp, turned), (wanted.shape, wanted.exp, wanted.pose)),
    )
    out = {"light": shading_error(found.light, wanted.light)}
    face = (head.masks["face"] > 0.5) if "face" in head.masks else slice(None)
    for part, (a, b) in zip(PARTS[1:], pairs, strict=True):
        a, b = head.verts(*a)[:, face], head.verts(*b)[:, face]
        if part == "shape":
            a, b = (v - v.mean(1, keepdim=True) for v in (a, b))
            a = a * ((a * b).sum((1, 2)) / a.square().sum((1, 2)))[:, None, None]
        out[part] = (a - b).square().sum(-1).mean(1).sqrt() * 1000
    return out


def shading_error(found: Tensor, wanted: Tensor) -> Tensor:
    """Root mean square difference of the shading under two lights [B,9,3], % of the wanted one's, [B].

    On visible normals, the found light at the level that fits best.
    """
    normals = sh.fibonacci(512).to(found)
    visible = sh.basis(normals[normals[:, 2] > 0])
    a, b = ((visible @ light).flatten(1) for light in (found, wanted))
    level = (a * b).sum(1) / a.square().sum(1).clamp_min(1e-12)
    return rms(level[:, None] * a - b) / rms(b).clamp_min(1e-12) * 100


def rms(x: Tensor) -> Tensor:
    """Root mean square of the rows of x [B,N], [B]."""
    return x.square().mean(1).sqrt()


def _require(head, *codes: FaceCode) -> None:
    for code in codes:
        code.require_head(head)
