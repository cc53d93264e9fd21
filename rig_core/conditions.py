"""What DiFaReli's denoiser is told of a photo (Ponglertnapakorn et al. 2023, section 3.2).

Spatial, [N,6,H,W]: a grey head under the light (the shading reference), and the photo without the head.
Vector, [N,D]: shape, pose, expression, camera, identity embedding and the amount of cast shadow, raw.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from . import buffers, raster, sh
from .face import FaceCode

GREY = 180 / 255  # albedo of the published reference
TURNED = -0.15  # a normal whose z in the photo is below points too far away to be drawn
BLOCKED = 0.5  # of the direct light is missing in a cast shadow, for a fitted one is not sure
SOFTNESS = 0.2  # angular radius of the light in the cast-shadow map
PUBLISHED = 256  # px, the picture in which the references of the published models are drawn


def vector(code: FaceCode, embed: Tensor, shadow: Tensor) -> Tensor:
    """[N,D] in the published order: shape, pose, exp, cam, embed [N,E], shadow [N,1]; nothing is scaled.

    With one face, embed and shadow of any N, or one embedding for all, are joined by repeating.
    Raises ValueError for values that are not finite.
    """
    parts = [code.shape, code.pose, code.exp, code.cam, embed, shadow.reshape(-1, 1)]
    n = max(map(len, parts))
    if any(len(p) not in (1, n) for p in parts):
        raise ValueError(
            f"{len(code)} faces, {len(embed)} embeddings and {len(parts[-1])} shadow scalars differ"
        )
    for name, value in (("face code", parts[:4]), ("embedding", [embed]), ("shadow scalar", [shadow])):
        if not all(v.isfinite().all() for v in value):
            raise ValueError(f"the {name} is not finite: check the photo and the estimator it came from")
    return torch.cat([p.to(code.shape).expand(n, -1) for p in parts], 1)


@dataclass(frozen=True)
class Drawn:
    """The part of a head that the reference shows, seen by the photo's camera.

    points [B,V,3] and faces [F,3] in image space, fragments of them; normal [B,3,H,W] in head space;
    mask [B,1,H,W]: where there is something to shade.
    """

    points: Tensor
    faces: Tensor
    fragments: raster.Fragments
    normal: Tensor
    mask: Tensor


def face_part(head) -> Tensor:
    """Triangles [F,3] of the reference: the whole open head; of FLAME the face, as published.

    FLAME's are listed once per corner that lies in the mask "face", and the normals are means over this list,
    so that triangles of the border weigh less (all of them in the official file of 10750 face ids).
    """
    if head.name != "flame" or "face" not in head.masks:
        return head.faces
    return head.faces.repeat_interleave((head.masks["face"] > 0.5)[head.faces].sum(1), 0)


def draw(head, code: FaceCode, size: int | tuple[int, int] | None = None) -> Drawn:
    """Draw the part of the head that the reference shows. size: as for buffers.render."""
    code.require_head(head)
    faces = face_part(head)
    verts = head.verts(code.shape, code.exp, code.pose)
    points = buffers.to_image(verts, code)
    fragments = buffers.rasterize_head(points, faces, buffers.picture_size(code, size))
    normal = raster.vertex_normals(verts, faces)
    # the crop scales the photo's x and y, not its depth, and with them the normals that decide what is cut
    depth = normal[..., 2:] * buffers.depth_scale(code)[:, None, None]
    depth = depth / torch.cat([normal[..., :2], depth], -1).norm(dim=-1, keepdim=True).clamp_min(1e-6)
    image = raster.interpolate_verts(fragments, faces, torch.cat([normal, depth], -1))
    return Drawn(points, faces, fragments, image[:, :3], fragments.mask * (image[:, 3:] > TURNED))


def drawing_size(head, size: int) -> int:
    """Side of the picture in which the reference of a network of `size` is drawn, before `fit`."""
    return PUBLISHED if head.name == "flame" else size


def fit(image: Tensor, size: int) -> Tensor:
    """A reference [N,C,H,W] at the size of the network, as published: bilinear, without smoothing first."""
    if image.shape[-1] == size:
        return image
    return F.interpolate(image, (size, size), mode="bilinear", align_corners=False)


def shading_reference(head, code: FaceCode, size: int, visible: Tensor | None = None) -> Tensor:
    """A grey head under code.light, [N,3,size,size], not clipped, 0 elsewhere.

    visible [N,1,h,w]: what the light reaches (`visibility`); elsewhere direct light is
    missing. Of FLAME with a mask "face" only the face is drawn (`face_part`).
    """
    sh.check_light(code.light)
    side = drawing_size(head, size)
    drawn = draw(head, code, side)
    visible = None if visible is None else fit(visible, side)
    return fit(reference(drawn.normal, drawn.mask, code.light, visible), size)


def reference(normal: Tensor, mask: Tensor, light: Tensor, visible: Tensor | None = None) -> Tensor:
    """`shading_reference` from normals [N,3,H,W] and a mask [N,1,H,W], for many lights on one geometry."""
    n = max(len(normal), len(light))
    normal, light = normal.expand(n, -1, -1, -1), light.expand(n, -1, -1)
    shading = sh.shade(normal, light)
    if visible is not None:
        d = sh.direction(light)[:, :, None, None]
        front, back = sh.shade(d, light), sh.shade(-d, light)
        direct = (front - back).clamp_min(0) * (normal * d).sum(1, keepdim=True).clamp_min(0)
        dark = torch.maximum(shading - BLOCKED * direct, torch.minimum(shading, back / 2))
        shading = torch.lerp(dark, shading, visible)
    return shading * GREY * mask


def visibility(
    head, code: FaceCode, size=None, light: Tensor | None = None, drawn: Drawn | None = None
) -> Tensor:
    """What the main direction of a light reaches of the head: [N,1,H,W], 1 lit, 0 in shadow, 1 outside.

    light [N,9,3]: code.light when None. drawn: of `draw`, where it is known already.
    """
    d = drawn or draw(head, code, size)
    direction = sh.direction(code.light if light is None else light)
    return buffers.cast_shadow(d.points, d.faces, d.fragments, direction, SOFTNESS, buffers.depth_scale(code))


def background(image: Tensor, matte: Tensor) -> Tensor:
    """The photo [N,3,H,W] 0..1 in -1..1, with -1 where matte [N,1,H,W] says face, neck or hair."""
    return torch.lerp(image * 2 - 1, image.new_tensor(-1.0), matte)


def spatial(reference: Tensor, background: Tensor) -> Tensor:
    """[N,6,H,W] from a reference per light and one background, or one each."""
    n = max(len(reference), len(background))
    return torch.cat([reference.expand(n, -1, -1, -1), background.expand(n, -1, -1, -1)], 1)


def shrink(image: Tensor, size: int) -> Tensor:
    """A picture [N,C,H,W] 0..1 at size x size, as PIL's LANCZOS makes it: 8 bits before, between and after.

    Published models below 256 px see photos and backgrounds this way.
    """
    if image.shape[2:] == (size, size):
        return image
    x = (image * 255).round()
    for axis in (3, 2):
        x = torch.moveaxis(torch.moveaxis(x, axis, -1) @ _lanczos(x.shape[axis], size).T.to(x), -1, axis)
        x = (x + 0.5).floor().clamp(0, 255)
    return x / 255


def _lanczos(n: int, m: int) -> Tensor:
    """Weights [m,n] of the windowed sinc (three lobes), as wide as the shrinking asks for."""
    scale = n / m
    wide = max(scale, 1.0)
    centre = (torch.arange(m, dtype=torch.float64)[:, None] + 0.5) * scale
    x = (torch.arange(n, dtype=torch.float64) + 0.5 - centre) / wide
    weight = torch.where(x.abs() < 3, x.sinc() * (x / 3).sinc(), 0.0)
    return weight / weight.sum(1, keepdim=True)


def shadow_sweep(shadow: Tensor, n: int, goal: float | None = None, by: float = 0.0) -> Tensor:
    """n amounts of cast shadow [n,1] from the photo's own [1,1] to `goal`, or to its own plus `by`.

    Published: goal -1 removes the shadow, by 5 adds some.
    """
    own = shadow.reshape(-1)[:1]
    stop = own + by if goal is None else torch.full_like(own, goal)
    return torch.lerp(own, stop, torch.linspace(0, 1, n).to(own))[:, None]
