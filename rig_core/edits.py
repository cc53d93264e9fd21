"""Edits of faces and buffers: parts of another face, the way between two, a neutral one, swapped buffers."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from . import sh
from .face import Buffers, FaceCode, lerp
from .pipeline import recentre

EASINGS = ("linear", "smooth", "ping-pong")


def transfer(
    head,
    target: FaceCode,
    source: FaceCode,
    strength: Tensor | float = 1.0,
    light=False,
    pose=False,
    expression=False,
    jaw=False,
    shape=False,
    albedo=False,
    camera=False,
) -> FaceCode:
    """Faces [N] that take the named parts from others [N], or one of either.

    strength: 0 keeps the target's, 1 takes the source's, between them as face.lerp; a number or [N].
    pose is the rotation of the head; expression includes the gaze where the head has one; camera is place
    and size in the crop. Crop and size of the picture stay the target's. Unless the camera comes along, the
    centre of the face stays under another shape, and with FLAME under every edit (pipeline.recentre).
    Raises ValueError for codes of another head.
    """
    target.require_head(head)
    mixed = lerp(target, source, strength)
    target = target.expand(len(mixed))
    turned = target.pose.clone()
    for take, part in ((pose, slice(0, 3)), (jaw, slice(3, 6)), (expression, slice(6, None))):
        if take:
            turned[:, part] = mixed.pose[:, part]
    names = {"light": light, "exp": expression, "shape": shape, "tex": albedo, "cam": camera}
    taken = {n: getattr(mixed, n) for n, take in names.items() if take}
    new = target.replace(**taken, pose=turned)
    if camera or not (shape or pose or expression or jaw):
        return new
    if head.name == "flame":
        return recentre(head, target, new)
    if shape:
        return new.replace(cam=recentre(head, target, target.replace(shape=mixed.shape)).cam)
    return new


def ease(frames: int, easing: str = "linear", like: Tensor | None = None) -> Tensor:
    """Weights [frames] from 0 to 1.

    linear: even steps. smooth: slow at both ends. ping-pong: there and back, slow at both turns; the last
    one leads on to the first, and with an even number the middle one is 1.
    """
    kind = {} if like is None else {"dtype": like.dtype, "device": like.device}
    if easing == "ping-pong":
        return (1 - torch.cos(torch.arange(frames, **kind) * (2 * math.pi / frames))) / 2
    w = torch.linspace(0, 1, frames, **kind)
    if easing == "smooth":
        return w * w * (3 - 2 * w)
    if easing == "linear":
        return w
    raise ValueError(f"'easing' is {', '.join(EASINGS)}, not '{easing}'")


def interpolate(a: FaceCode, b: FaceCode, frames: int, easing: str = "linear") -> FaceCode:
    """One face to one other in `frames` faces, in a's picture: see `ease` and face.lerp.

    Raises ValueError for batches and for codes of two heads.
    """
    if len(a) != 1 or len(b) != 1:
        raise ValueError(f"one face goes to one other, but {len(a)} and {len(b)} came in")
    return lerp(a, b, ease(frames, easing, a.shape))


def neutral(head, code: FaceCode, frontal: bool = False, gaze: bool = True) -> FaceCode:
    """Faces without expression, the jaw closed. frontal: turned to the camera, too. gaze: eyes straight.

    FLAME's face keeps its centre, see pipeline.turn.
    """
    code.require_head(head)
    pose = code.pose.clone()
    pose[:, 3:6] = 0
    if frontal:
        pose[:, :3] = 0
    if gaze:
        pose[:, 6:] = 0
    new = code.replace(exp=torch.zeros_like(code.exp), pose=pose)
    return recentre(head, code, new) if head.name == "flame" else new


def exchange(
    given: Buffers | None,
    rendered: Tensor | None = None,
    normal: Tensor | None = None,
    albedo: Tensor | None = None,
    shading: Tensor | None = None,
    mask: Tensor | None = None,
    light: Tensor | None = None,
    recompute: bool = False,
) -> Buffers:
    """Buffers with some of them exchanged, all [B,C,H,W] of one size (or one for all).

    In the values of Buffers: normal -1..1, shading 1 for a fully lit white. recompute: rendered becomes
    albedo x shading, and with a light [B,9,3] shading is that light on the normals.
    Without given buffers normal, albedo, mask and (unless it is recomputed) rendered are needed.
    Raises ValueError for a missing one, other sizes, and for one that would not count.
    """
    new = {"rendered": rendered, "normal": normal, "albedo": albedo, "shading": shading, "mask": mask}
    if light is not None and not recompute:
        raise ValueError("'light' only counts where 'recompute' is on: switch it on, or disconnect 'light'")
    if recompute and rendered is not None:
        raise ValueError("'rendered' does not count while 'recompute' is on: switch it off, or disconnect it")
    if recompute and given is not None and normal is not None and light is None and shading is None:
        raise ValueError("'recompute' of edited normals needs their light: connect 'light' (or 'shading')")
    parts = {n: x if x is not None or given is None else getattr(given, n) for n, x in new.items()}
    if given is None:
        needed = ["normal", "albedo", "mask"] + ["rendered"] * (not recompute)
        missing = [n for n in needed if parts[n] is None]
        if missing:
            raise ValueError(f"without 'buffers' connect {', '.join(map(repr, missing))} as well")
        if recompute and light is None and shading is None:
            raise ValueError("'recompute' without 'buffers' needs 'light' or 'shading'")
    parts = {n: x for n, x in parts.items() if x is not None}
    size, n = parts["normal"].shape[2:], max(map(len, [*parts.values(), *([] if light is None else [light])]))
    for name, x in parts.items():
        if x.shape[2:] != size or len(x) not in (1, n):
            raise ValueError(
                f"'{name}' is {len(x)} of {x.shape[3]} x {x.shape[2]} pixels, the others {n} of {size[1]} x "
                f"{size[0]}: give all of them at one size, 1 or {n} of each"
            )
        parts[name] = x.expand(n, *x.shape[1:])
    m = parts["mask"]
    normal, albedo = parts["normal"] * m, parts["albedo"] * m
    if light is not None:
        shading = sh.shade(normal, light.expand(n, 9, 3))
    elif "shading" in parts:
        shading = parts["shading"]
    else:
        shading = parts["rendered"] / albedo.clamp_min(1 / 255) * m
    rendered = albedo * shading if recompute else parts["rendered"] * m
    return Buffers(rendered, normal, albedo, shading, m)
