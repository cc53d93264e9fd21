"""What DiFaReli's denoiser is told of a photo (Ponglertnapakorn et al. 2023, section 3.2).

Spatial, [N,6,H,W]: a grey head under the light (the shading reference), and the photo without the head.
Vector, [N,D]: shape, pose, expression, camera, identity embedding and the amount of cast shadow, raw.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import buffers, raster, sh
from .face import FaceCode

GREY = 180 / 255  # albedo of the published reference
TURNED = -0.15  # normals whose z is below point too far away to be drawn
BLOCKED = 0.5  # of the direct light is missing in a cast shadow; measured best for the ratio of references
SOFTNESS = 0.2  # angular radius of the light in the cast-shadow map


def vector(code: FaceCode, embed: Tensor, shadow: Tensor) -> Tensor:
    """[N,D] in the published order: shape, pose, exp, cam, embed [N,E], shadow [N,1]; nothing is scaled.

    With one face, embed and shadow of any N, or one embedding for all, are joined by repeating.
    Raises ValueError for values that are not finite.
    """
    parts = [code.shape, code.pose, code.exp, code.cam, embed, shadow.reshape(-1, 1)]
    n = max(map(len, parts))
    if any(len(p) not in (1, n) for p in parts):
        raise ValueError(
            f"{len(code)} faces, {len(embed)} embeddings and {len(shadow)} shadow scalars differ"
        )
    for name, value in (("embedding", embed), ("shadow scalar", shadow)):
        if not value.isfinite().all():
            raise ValueError(f"the {name} is not finite: check the photo and the estimator it came from")
    return torch.cat([p.to(code.shape).expand(n, -1) for p in parts], 1)


def shading_reference(
    head, code: FaceCode, size=None, visible: Tensor | None = None, faces: Tensor | None = None
) -> Tensor:
    """A grey head under code.light, [N,3,H,W], not clipped, 0 elsewhere.

    size: as for buffers.render. visible [N,1,H,W]: what the light reaches (`visibility`); elsewhere direct
    light is missing. faces [F,3]: the part of the head to draw, all of it when None;
    normals are those of the part.
    """
    code.require_head(head.name)
    sh.check_light(code.light)
    if faces is None:
        fragments, normal, _ = buffers.geometry(head, code, size)
    else:
        verts = head.verts(code.shape, code.exp, code.pose)
        points = buffers.to_image(verts, code)
        fragments = buffers.rasterize_head(points, faces, buffers.picture_size(code, size))
        normal = raster.interpolate_verts(fragments, faces, raster.vertex_normals(verts, faces))
    return reference(normal, fragments.mask, code.light, visible)


def reference(normal: Tensor, mask: Tensor, light: Tensor, visible: Tensor | None = None) -> Tensor:
    """`shading_reference` from normals [N,3,H,W] and coverage [N,1,H,W], for many lights on one geometry."""
    n = max(len(normal), len(light))
    normal, light = normal.expand(n, -1, -1, -1), light.expand(n, -1, -1)
    shading = sh.shade(normal, light)
    if visible is not None:
        d = sh.direction(light)[:, :, None, None].expand(-1, -1, 1, 1)
        front, back = sh.shade(d, light), sh.shade(-d, light)
        direct = (front - back).clamp_min(0) * (normal * d).sum(1, keepdim=True).clamp_min(0)
        dark = torch.maximum(shading - BLOCKED * direct, torch.minimum(shading, back / 2))
        shading = torch.lerp(dark, shading, visible)
    return shading * GREY * mask * (normal[:, 2:] > TURNED)


def visibility(head, code: FaceCode, size=None, light: Tensor | None = None, drawn=None) -> Tensor:
    """What the main direction of a light reaches of the head: [N,1,H,W], 1 lit, 0 in shadow, 1 outside.

    light [N,9,3]: code.light when None. drawn: (verts in image space, fragments) of the head where they are
    known already.
    """
    if drawn is None:
        verts = buffers.to_image(head.verts(code.shape, code.exp, code.pose), code)
        drawn = verts, buffers.rasterize_head(verts, head.faces, buffers.picture_size(code, size))
    verts, fragments = drawn
    direction = sh.direction(code.light if light is None else light)
    return buffers.cast_shadow(verts, head.faces, fragments, direction, SOFTNESS, buffers.depth_scale(code))


def background(image: Tensor, matte: Tensor) -> Tensor:
    """The photo [N,3,H,W] 0..1 in -1..1, with -1 where matte [N,1,H,W] says face, neck or hair."""
    return torch.lerp(image * 2 - 1, image.new_tensor(-1.0), matte)


def spatial(reference: Tensor, background: Tensor) -> Tensor:
    """[N,6,H,W] from a reference per light and one background, or one each."""
    n = max(len(reference), len(background))
    return torch.cat([reference.expand(n, -1, -1, -1), background.expand(n, -1, -1, -1)], 1)
