"""Faces over time: what an estimator says of the frames of a film, made steady.

Each frame is estimated by itself, so that the numbers jitter where the face is still, and the relit film
flickers. A Gaussian over time takes the jitter out and has no delay. What does not change is averaged: a
person keeps shape and skin for a whole shot.

Convention: the first axis is time, `frames` is the Gaussian's standard deviation in frames, and `starts` are
the first frames of the shots, 0 among them. Nothing flows over a cut.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .buffers import CROP
from .face import FaceCode, axis_angle_to_matrix, matrix_to_axis_angle

REACH = 4.0  # standard deviations at which the Gaussian ends
CUT = 0.1  # mean change of the thumbnail, in display values, that may be a cut
STANDS_OUT = 4.0  # times the usual change around it: a cut, and no fast motion
AROUND = 6  # frames to either side that tell the usual change


def smooth(values: Tensor, frames: float, starts: Sequence[int] = (0,)) -> Tensor:
    """Gaussian mean over time of values [B,...]; 0 frames gives them back as they are.

    At both ends of a shot the weights of the frames that there are add to 1. White noise far from the ends
    keeps 1 / (2 sqrt(pi) frames) of its variance.
    """
    if not 0 <= frames < math.inf:
        raise ValueError(f"the smoothing is a number of frames, 0 or more, got {frames}")
    if not frames or len(values) < 2:
        return values
    # in double, so that what stands still stays to the last bit
    return torch.cat([_smooth(shot, frames) for shot in _shots(values.cpu().double(), starts)]).to(values)


def _smooth(values: Tensor, frames: float) -> Tensor:
    total, weights = values.clone(), values.new_ones(len(values), *[1] * (values.ndim - 1))
    for k in range(1, min(math.ceil(REACH * frames), len(values) - 1) + 1):
        w = math.exp(-0.5 * (k / frames) * (k / frames))
        for to, of in ((slice(None, -k), slice(k, None)), (slice(k, None), slice(None, -k))):
            total[to].add_(values[of], alpha=w)
            weights[to] += w
    return total / weights


def mean(values: Tensor, starts: Sequence[int] = (0,)) -> Tensor:
    """The mean of each shot, for all of its frames: [B,...] -> [B,...]."""
    means = [shot.mean(0, keepdim=True).expand_as(shot) for shot in _shots(values.cpu().double(), starts)]
    return torch.cat(means).to(values)


def _shots(values: Tensor, starts: Sequence[int]) -> list[Tensor]:
    borders = [*starts, len(values)]
    if borders[0] != 0 or any(a >= b for a, b in zip(borders, borders[1:])):
        raise ValueError(
            f"{list(starts)} are no first frames of the shots of {len(values)} frames: they rise from 0"
        )
    return list(values.split([b - a for a, b in zip(borders, borders[1:])]))


def smooth_rotations(r: Tensor, frames: float, starts: Sequence[int] = (0,)) -> Tensor:
    """`smooth` for rotations, axis-angle [B,3]: the mean matrix, brought back to the nearest rotation.

    The chordal mean (Hartley et al. 2013, "Rotation averaging"): unlike a mean of axis-angles it has no
    seam at pi, and turning all frames turns the result.
    """
    if not frames or len(r) < 2:
        return r
    m = smooth(axis_angle_to_matrix(r.cpu().double()), frames, starts)
    u, _, v = torch.linalg.svd(m)
    sign = torch.ones(len(r), 3, dtype=m.dtype)
    sign[:, 2] = torch.linalg.det(u @ v)
    return matrix_to_axis_angle((u * sign[:, None]) @ v).to(r)


def smooth_code(
    code: FaceCode, frames: float, one_person: bool = True, starts: Sequence[int] = (0,)
) -> FaceCode:
    """Steady codes of the frames of a film: B faces, one a frame, all in pictures of one size.

    Expression, pose, light and place are smoothed. one_person: shape and skin become the mean of the shot;
    otherwise they are smoothed, too. The crop and the camera, which make up for each other's jitter,
    are smoothed as what they do together: where the head lies in the picture.
    """
    pose = code.pose.clone()
    for at in (slice(0, 3), slice(3, 6)):
        pose[:, at] = smooth_rotations(code.pose[:, at], frames, starts)
    pose[:, 6:] = smooth(code.pose[:, 6:], frames, starts)
    crop, cam = _smooth_camera(code, frames, starts)

    def same(v: Tensor) -> Tensor:
        return mean(v, starts) if one_person else smooth(v, frames, starts)

    return code.replace(
        shape=same(code.shape),
        tex=same(code.tex),
        exp=smooth(code.exp, frames, starts),
        light=smooth(code.light, frames, starts),
        pose=pose,
        crop=crop,
        cam=cam,
    )


def _smooth_camera(code: FaceCode, frames: float, starts) -> tuple[Tensor, Tensor]:
    """Crop [B,3,3] and cam [B,3] whose product, from model to photo pixels (buffers.to_image), is smooth."""
    if not frames or len(code) < 2:
        return code.crop, code.cam
    back = torch.linalg.inv(code.crop.cpu().double())
    scale, tx, ty = code.cam.cpu().double().unbind(1)
    half, zero, one = CROP / 2, torch.zeros_like(scale), torch.ones_like(scale)
    rows = [scale, zero, scale * tx + 1], [zero, -scale, 1 - scale * ty], [zero, zero, one / half]
    look = torch.stack([torch.stack(row, 1) for row in rows], 1) * half  # model to crop
    crop = torch.linalg.inv(smooth(back, frames, starts))
    look = crop @ smooth(back @ look, frames, starts) / half
    scale = torch.linalg.det(look[:, :2, :2]).abs().sqrt()
    cam = torch.stack([scale, (look[:, 0, 2] - 1) / scale, (1 - look[:, 1, 2]) / scale], 1)
    return crop.to(code.crop), cam.to(code.cam)


def thumbnail(frame: Tensor) -> Tensor:
    """A frame [1,3,H,W] 0..1 as [3,16,16], to tell one shot from the next."""
    rows, columns = (_areas(n, 16).to(frame) for n in frame.shape[2:])
    return rows @ (frame[0] @ columns.T)


def _areas(n: int, to: int) -> Tensor:
    """Weights [to,n] of the pixels in each area, as adaptive_avg_pool2d; on MPS that wants whole factors."""
    at, area = torch.arange(n), torch.arange(to)[:, None]
    inside = (at >= area * n // to) & (at < -(-(area + 1) * n // to))
    return inside / inside.sum(1, keepdim=True)


def shot_starts(change: Tensor) -> list[int]:
    """First frames of the shots, from the mean change of the thumbnail from each frame to the next [B]."""
    change, starts = change.tolist(), [0]
    for i, c in enumerate(change):
        near = sorted(change[max(1, i - AROUND) : i] + change[i + 1 : i + 1 + AROUND])
        usual = near[len(near) // 2] if near else 0.0
        if i and c > max(CUT, STANDS_OUT * usual):
            starts.append(i)
    return starts
