"""The host's pictures, B,H,W,C float 0..1 on the CPU, to ours, B,C,H,W on the working device, and back."""

from __future__ import annotations

import base64
import contextlib
import io
from collections.abc import Iterator

import comfy.model_management as mm
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from ...rig_core import align
from .running import device


def pictures(image: Tensor, name: str, least: int = 32, most: int | None = None) -> Tensor:
    """IMAGE [B,H,W,C] -> RGB [B,3,H,W] float32 on the working device.

    Grey becomes RGB, alpha is dropped. `name` is the input's, for the errors: ValueError for an empty
    batch, NaN, other channels, a side under `least` or over `most` pixels. Looked at where IMAGE lies.
    """
    x = _rgb(image, slice(None), name)
    _check_sides(x, name, least, most)
    return x.to(device()).contiguous()


def check_pictures(
    image: Tensor, name: str, least: int = 32, most: int | None = None
) -> tuple[int, int, int]:
    """Raise what `pictures` would for IMAGE [B,H,W,C], moving and copying nothing of it; returns B, H, W.

    After it `pictures(image[part], name)` takes parts of a batch that is never copied as a whole.
    """
    x = _rgb(image, slice(0, 1), name)
    _check_sides(x, name, least, most)
    with _named(name):
        align.check_values(image[..., :3])
    return len(image), *x.shape[2:]


def _rgb(image: Tensor, part: slice, name: str) -> Tensor:
    """A part of IMAGE as RGB [b,3,H,W], where it lies, or a ValueError that says what is wrong."""
    if not isinstance(image, Tensor) or image.ndim != 4:
        raise ValueError(f"'{name}' is not an IMAGE (batch, height, width, channels)")
    with _named(name):
        return align.check_image(image[part].movedim(-1, 1))


@contextlib.contextmanager
def _named(name: str):
    """Errors inside with the input's name."""
    try:
        yield
    except ValueError as e:
        raise ValueError(f"'{name}': {e}") from e


def _check_sides(x: Tensor, name: str, least: int, most: int | None) -> None:
    height, width = x.shape[2:]
    if min(height, width) < least:
        raise ValueError(f"'{name}' is {width} x {height} pixels: too small, {least} x {least} is the least")
    if most and max(height, width) > most:
        raise ValueError(
            f"'{name}' is {width} x {height} pixels, {most} is the most here: put Align Face before it"
        )


def radiance(image: Tensor, name: str) -> Iterator[Tensor]:
    """IMAGE [B,H,W,C] -> its pictures one by one, RGB [1,3,H,W] float32 of any brightness: linear light.

    They stay where IMAGE lies: they may be large, and are to be made small. Values below 0, which a resize
    leaves around a lamp, become 0. Raises ValueError for an empty batch, other channels and NaN.
    """
    if not isinstance(image, Tensor) or image.ndim != 4 or 0 in image.shape:
        raise ValueError(f"'{name}' is not an IMAGE (batch, height, width, channels)")
    if image.shape[-1] not in (1, 3, 4):
        raise ValueError(f"'{name}' has {image.shape[-1]} channels, a picture has 1, 3 or 4")
    for x in image.split(1):
        x = x[..., :3].movedim(-1, 1).float()
        if not torch.stack(x.aminmax()).isfinite().all():
            raise ValueError(f"'{name}' holds NaN or infinite values: look at the node that made it")
        yield x.clamp_min(0).expand(-1, 3, -1, -1)


def mask_pictures(mask: Tensor, name: str, size: int | None = None) -> Tensor:
    """MASK [B,H,W] or [H,W] -> [B,1,H,W] float32 on the working device; with size resized to that square.

    Raises ValueError for NaN, and where a square is asked for for a mask that is none.
    """
    if mask.ndim == 2:
        mask = mask[None]
    if mask.ndim != 3 or 0 in mask.shape:
        raise ValueError(f"'{name}' is not a MASK (batch, height, width)")
    if not torch.isfinite(mask).all():
        raise ValueError(f"'{name}' holds NaN or infinite values: look at the node that made it")
    if size is not None and mask.shape[1] != mask.shape[2]:
        raise ValueError(
            f"'{name}' is {mask.shape[2]} x {mask.shape[1]} pixels, the aligned picture is square: give a "
            "mask of the aligned picture, not of the photo"
        )
    x = mask[:, None].to(device(), torch.float32).clamp(0, 1)
    if size is None or x.shape[2:] == (size, size):
        return x
    return F.interpolate(x, (size, size), mode="bilinear", antialias=True)


def repeat(x, n: int, name: str):
    """One picture (or face) for all n, or n of them. Raises ValueError for another number."""
    if len(x) not in (1, n):
        needed = "1 is needed" if n == 1 else f"{n} are needed: give 1 or {n}"
        raise ValueError(f"'{name}' holds {len(x)} pictures or faces, but {needed}")
    return x if len(x) == n else x.expand(n, *x.shape[1:]) if isinstance(x, Tensor) else x.expand(n)


def image(x: Tensor) -> Tensor:
    """[B,C,H,W] -> IMAGE, clamped to 0..1, on the host's device for results."""
    if not torch.isfinite(x).all():
        raise ValueError(
            "the result holds NaN: if the model runs in half precision, start ComfyUI with --force-fp32"
        )
    return x.clamp(0, 1).permute(0, 2, 3, 1).to(mm.intermediate_device(), torch.float32).contiguous()


def few(x: Tensor, n: int = 4) -> Tensor:
    """At most n pictures of a batch, evenly chosen, for a preview."""
    return x[torch.linspace(0, len(x) - 1, min(n, len(x))).round().long().to(x.device)]


def mask(x: Tensor) -> Tensor:
    """[B,1,H,W] -> MASK."""
    return x[:, 0].clamp(0, 1).to(mm.intermediate_device(), torch.float32).contiguous()


def joined(parts: list[Tensor]) -> Tensor:
    """torch.cat of a list that is emptied on the way, so that a long batch does not exist twice."""
    if len(parts) == 1:
        return parts.pop()
    out, done = parts[0].new_empty(sum(map(len, parts)), *parts[0].shape[1:]), 0
    while parts:
        x = parts.pop(0)
        out[done : done + len(x)] = x
        done += len(x)
    return out


def data_url(x: Tensor) -> str:
    """[3,H,W] 0..1 -> a PNG as text, for small pictures that a page works with."""
    file = io.BytesIO()
    pixels = (x.clamp(0, 1) * 255).round().to("cpu", torch.uint8).permute(1, 2, 0).numpy()
    Image.fromarray(pixels).save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def chunks(n: int, height: int, width: int) -> list[slice]:
    """Slices over a batch so that about a megapixel is in work at a time."""
    return slices(n, max(1, 2**20 // (height * width)))


def slices(n: int, step: int) -> list[slice]:
    return [slice(i, min(i + step, n)) for i in range(0, n, step)]
