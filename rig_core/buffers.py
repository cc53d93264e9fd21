"""FaceCode -> Buffers: what DECA's renderer shows of a face, in the frame of the photo; and cast shadows.

Convention: model space has x right, y up, z to the viewer. Image space has x right, y down, z away,
[-1, 1] over the picture: pixel (c, r) has its centre at (-1 + (2c + 1) / W, -1 + (2r + 1) / H).
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from . import align, raster, sh
from .face import Buffers, FaceCode
from .raster import Fragments

CROP = 224  # px, the picture in which DECA's camera lives
DEPTH_OFFSET = 10.0  # added to image-space z, so that every face lies before the camera


def to_image(points: Tensor, code: FaceCode) -> Tensor:
    """Project points [B,N,3] from model space to image space [-1, 1] of the photo, [B,N,3].

    DECA's camera and crop: xy = scale * (xy + t), y and z negated, then from [-1, 1] to crop pixels
    ((xy + 1) * 112), through the inverse crop to photo pixels, and by the photo's size to [-1, 1].
    z is scale * z negated; the crop does not change it (see `depth_scale`). DECA divides by the size where
    pixel centres would ask for (2x + 1) / W - 1; all of its numbers, and so ours, hold under that rule.
    """
    scale, t = code.cam[:, None, :1], code.cam[:, None, 1:]
    xy = scale * (points[..., :2] + t) * points.new_tensor([1.0, -1.0])
    pixels = (xy * 0.5 + 0.5) * CROP
    inverse = _inverse(code.crop.to(points)).transpose(1, 2)
    photo = pixels @ inverse[:, :2, :2] + inverse[:, 2:, :2]
    h, w = code.size
    xy = photo / points.new_tensor([float(w), float(h)]) * 2 - 1
    return torch.cat([xy, -scale * points[..., 2:]], -1)


def to_pixels(points: Tensor, size: tuple[int, int]) -> Tensor:
    """Image space [B,N,2 or 3] -> pixels (x, y) [B,N,2] of a picture of size (H, W).

    Integers are pixel centres: a point is drawn at the pixel that this returns, rounded.
    """
    h, w = size
    return (points[..., :2] + 1) * points.new_tensor([w / 2, h / 2]) - 0.5


def depth_scale(code: FaceCode) -> Tensor:
    """Half widths of the photo per unit of image-space z, [B]; 1 where the crop is the whole photo."""
    linear = code.crop[:, :2, :2]
    zoom = (linear[:, 0, 0] * linear[:, 1, 1] - linear[:, 0, 1] * linear[:, 1, 0]).abs().sqrt()
    return CROP / code.size[1] / zoom


def rasterize_head(verts: Tensor, faces: Tensor, size: tuple[int, int]) -> Fragments:
    """Rasterise image-space verts [B,V,3] as DECA does, DEPTH_OFFSET added to z (and so to `zbuf`)."""
    return raster.rasterize(verts + verts.new_tensor([0.0, 0.0, DEPTH_OFFSET]), faces, size)


def geometry(head, code: FaceCode, size=None) -> tuple[Fragments, Tensor, Tensor]:
    """Fragments, normal [B,3,H,W] and texture grid [B,2,H,W] of a face; see `render` for the arguments.

    The grid holds grid_sample's coordinates (align_corners=False), 0 outside the head like the normal.
    """
    code.require_head(head)
    verts = head.verts(code.shape, code.exp, code.pose)
    fragments = rasterize_head(to_image(verts, code), head.faces, picture_size(code, size))
    normals = raster.corner_planes(raster.vertex_normals(verts, head.faces), head.faces)
    uv = head.uv.to(normals) * head.uv.new_tensor([2.0, -2.0]) + head.uv.new_tensor([-1.0, 1.0])
    uv = raster.corner_planes(uv[None], head.uv_faces).repeat(1, 1, len(verts))
    image = raster.blend(fragments, torch.cat([normals, uv], 1), len(head.faces))
    return fragments, image[:, :3], image[:, 3:]


def render(head, code: FaceCode, size=None, albedo: Tensor | None = None) -> Buffers:
    """Render a face in the frame of its photo, as DECA's decode does.

    head: a HeadModel; code: B faces of that head.
    size: None for code.size, an int for the longer side, or (H, W); image space stays put.
    albedo: texture map [B,3,h,w] or [1,3,h,w] in place of head.albedo(code.tex), display space 0..1.
    Raises ValueError when code belongs to another head.
    """
    fragments, normal, grid = geometry(head, code, size)
    mask = fragments.mask
    texture = (head.albedo(code.tex) if albedo is None else albedo).to(normal)
    texture = texture.expand(len(normal), -1, -1, -1)
    colour = F.grid_sample(texture, grid.permute(0, 2, 3, 1), align_corners=False) * mask
    shading = sh.shade(normal, code.light)
    return Buffers(colour * shading, normal, colour, shading, mask)


def cast_shadow(
    verts: Tensor,
    faces: Tensor,
    fragments: Fragments,
    light_dir: Tensor,
    softness: Tensor | float = 0.05,
    depth: Tensor | float = 1.0,
    resolution: int = 256,
) -> Tensor:
    """How much of a distant light each pixel sees: [B,1,H,W], 1 lit, 0 in shadow, 1 outside the mesh.

    verts [B,V,3] in image space (with or without DEPTH_OFFSET), faces [F,3], and the fragments they gave.
    light_dir [B,3] or [1,3]: from the face to the light, x right, y UP, z TO THE VIEWER (as the normals).
    softness: angular radius of the light, radians, a number or [B]; shadows soften with distance.
    depth: half widths of the picture per unit of z, a number or [B]: `depth_scale(code)` for a photo.
    resolution: side of the shadow map in pixels.

    The whole mesh casts. Sides turned away from the light are in shadow too, with a short ramp.
    An orthographic depth map from the light; blocker search and percentage-closer filtering (Fernando 2005)
    against the tangent plane at each pixel, so that a convex surface never shadows itself.
    """
    point, plane, facing, shadow_map = _from_light(verts, faces, fragments, light_dir, depth, resolution)
    soft = torch.as_tensor(softness, dtype=point.dtype, device=point.device).reshape(-1, 1, 1)
    bias, texel = 3.0 / resolution, 2.0 / resolution

    def taps(n: int, radius: Tensor):
        """Height of the mesh above the tangent plane, seen from the light, at n points of a disc."""
        for i in range(n):
            r, phi = math.sqrt((i + 0.5) / n), i * math.pi * (3 - 5**0.5)
            offset = torch.stack([radius * (r * math.cos(phi)), radius * (r * math.sin(phi))], -1)
            seen = align.sample(shadow_map, point[..., :2] + offset, "border")
            yield point[..., 2] + (plane * offset).sum(-1) - seen[:, 0]

    total, count = torch.zeros_like(facing), torch.zeros_like(facing)
    for height in taps(12, (soft + texel).expand_as(facing)):
        blocked = (height > bias).to(height)
        total, count = total + height * blocked, count + blocked
    radius = (total / count.clamp_min(1) * soft).clamp_min(texel)
    lit = sum((2 - height / bias).clamp(0, 1) for height in taps(24, radius)) / 24
    lit = lit * (facing * 10).clamp(0, 1)
    return torch.where(fragments.pix_to_face < 0, 1, lit)[:, None]


def _from_light(verts, faces, fragments, light_dir, depth, resolution):
    """Each pixel as the light sees it, and the light's depth map.

    Light space: x, y of the map in [-1, 1] (y down), z away from the light, all in one unit.
    Returns point [B,H,W,3], plane [B,H,W,2] (slope of the tangent plane's depth in x and y),
    facing [B,H,W] (cosine of the smooth normal to the light), map [B,1,S,S].
    """
    n, h, w = fragments.pix_to_face.shape
    depth = torch.as_tensor(depth, dtype=verts.dtype, device=verts.device).reshape(-1).expand(n)
    unit = torch.stack([torch.full_like(depth, 1.0), torch.full_like(depth, -h / w), -depth], -1)
    world = (verts - verts.mean(1, keepdim=True)) * unit[:, None]
    d = F.normalize(light_dir.to(verts).expand(n, 3), dim=-1)
    up = torch.where(d[:, 1:2].abs() > 0.9, d.new_tensor([0.0, 0.0, 1.0]), d.new_tensor([0.0, 1.0, 0.0]))
    x = F.normalize(torch.linalg.cross(up, d), dim=-1)
    frame = torch.stack([x, -torch.linalg.cross(d, x), -d], 1)  # rows
    view = world @ frame.transpose(1, 2)
    low, high = view.amin(1, keepdim=True), view.amax(1, keepdim=True)
    view = (view - (low + high) / 2) / ((high - low).amax(-1, keepdim=True) / 1.96).clamp_min(1e-12)
    z = raster.rasterize(view + view.new_tensor([0.0, 0.0, 2.0]), faces, (resolution, resolution)).zbuf
    shadow_map = torch.where(z < 0, 100.0, z - 2)[:, None]

    a, b, c = raster.corner_planes(view, faces)
    flat = torch.linalg.cross(b - a, c - a, dim=0).unflatten(1, (len(view), -1))
    # a face seen from behind is lit from behind
    side = torch.where(torch.einsum("bk,kbf->bf", frame[:, :, 2], flat) < 0, -1.0, 1.0).reshape(-1)
    smooth = raster.corner_planes(raster.vertex_normals(view, faces), faces) * side
    image = raster.blend(fragments, torch.cat([torch.stack([a, b, c]), smooth], 1), faces.shape[-2])
    image = image.permute(0, 2, 3, 1)
    point = image[..., :3] / fragments.bary.sum(-1, keepdim=True)  # the weights do not quite sum to 1
    facing = -image[..., 5]
    plane = image[..., 3:5] / facing.clamp_min(0.02)[..., None]
    return point, plane, facing, shadow_map


def picture_size(code: FaceCode, size) -> tuple[int, int]:
    """(H, W) of the picture to render: see `render`."""
    if size is None:
        return code.size
    if isinstance(size, int):
        h, w = code.size
        return round(size * h / max(h, w)), round(size * w / max(h, w))
    return tuple(size)


def _inverse(m: Tensor) -> Tensor:
    """Inverse of affine matrices [B,3,3] with last row 0 0 1, without a solver, which some devices lack."""
    a, b, tx = m[:, 0].unbind(-1)
    c, d, ty = m[:, 1].unbind(-1)
    det = a * d - b * c
    zero, one = torch.zeros_like(a), torch.ones_like(a)
    rows = [d, -b, b * ty - d * tx, -c, a, c * tx - a * ty]
    return torch.stack([r / det for r in rows] + [zero, zero, one], -1).reshape(-1, 3, 3)
