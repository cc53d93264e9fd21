"""The pixels of one synthetic portrait: what each surface shows under its lights, in linear radiance.

One portrait at a time (batch axis 1), so that no portrait depends on its neighbours in a batch.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from rig_core import buffers, raster, sh
from rig_core.face import FaceCode

from . import synth_look as look
from . import synth_mesh as mesh
from .synth_light import AREA, Lights, ShadowMaps, diffuse, shadow_maps, specular, strands, visibility
from .synth_scene import Camera, Person, Scene, linear

FINE, ROUGH = 112, 48  # sides of the lamps' and the sky's depth maps


@dataclass(frozen=True)
class Part:
    """A rasterised mesh: at its N covered pixels the flat index, depth, face and interpolated values."""

    fragments: raster.Fragments
    index: Tensor  # [N]
    depth: Tensor  # [N]
    face: Tensor  # [N]
    values: Tensor  # [N,D] of the vertices


def rasterise(points: Tensor, faces: Tensor, values: Tensor, side: int) -> Part:
    """points [1,V,3] image space, faces [F,3] or [1,F,3], values [1,V,D]."""
    f = buffers.rasterize_head(points, faces, (side, side))
    index = (f.pix_to_face.reshape(-1) >= 0).nonzero()[:, 0]
    face = f.pix_to_face.reshape(-1)[index]
    weight = f.bary.reshape(-1, 3)[index]
    weight = weight / weight.sum(1, keepdim=True).clamp_min(1e-6)
    corner = values[0][faces.reshape(-1, 3)[face]]
    return Part(f, index, f.zbuf.reshape(-1)[index], face, (corner * weight[..., None]).sum(1))


def scatter(index: Tensor, values: Tensor, side: int) -> Tensor:
    """[N,D] -> picture [1,D,side,side], 0 elsewhere."""
    out = values.new_zeros(side * side, values.shape[1])
    return out.index_copy(0, index, values).T.reshape(1, -1, side, side)


def relief(index: Tensor, height: Tensor, keep: Tensor, side: int, slope: float) -> Tensor:
    """Tilt [N,3] of the normals by a height [N] as seen in the picture; none at the borders of `keep` [N]."""
    h = scatter(index, torch.stack([height, keep.float()], 1), side)
    dx = h[..., 2:] - h[..., :-2]
    dy = h[..., 2:, :] - h[..., :-2, :]
    gx = F.pad(dx[:, :1] * (dx[:, 1:] == 0), (1, 1))
    gy = F.pad(dy[:, :1] * (dy[:, 1:] == 0), (0, 0, 1, 1))
    g = torch.cat([-gx, gy, torch.zeros_like(gx)], 1) * (slope / 2)
    return g.reshape(3, -1).T[index] * keep[:, None]


@dataclass(frozen=True)
class Stage:
    """One portrait ready to be lit: everything of batch 1."""

    template: mesh.Template
    meshes: mesh.Meshes
    code: FaceCode
    person: Person
    scene: Scene
    lamps: Lights
    sky: Lights
    fine: ShadowMaps  # of the lamps
    rough: ShadowMaps  # of the sky
    side: int  # of the picture, supersampled

    def skylight(self, verts: Tensor, normals: Tensor) -> Tensor:
        """Diffuse light of the surroundings at vertices, with and without occlusion, [1,V,6]."""
        seen = visibility(self.rough, verts, normals)
        return torch.cat(diffuse(normals, self.sky, seen, torch.zeros_like(verts)), -1)


def stage(
    t, m, code: FaceCode, person: Person, scene: Scene, lights: Lights, side: int, shadows: bool = True
) -> Stage:
    """Split the light into lamps and sky and make their depth maps. Lamps that are off are left out.
    Without `shadows` nothing stands between the lamps and what they light."""
    on = (lights.colour[0, :AREA].sum(1) > 0).nonzero()[:, 0]
    lamps = Lights(lights.direction[:, on], lights.colour[:, on], lights.key)
    sky = Lights(lights.direction[:, AREA:], lights.colour[:, AREA:], lights.key)
    fine = shadow_maps(m.caster, m.caster_faces, lamps.direction, FINE, m.scope)
    if not shadows:
        fine = replace(fine, depth=torch.full_like(fine.depth, 1e3))
    rough = shadow_maps(m.caster, m.caster_faces, sky.direction, ROUGH, m.scope)
    return Stage(t, m, code, person, scene, lamps, sky, fine, rough, side)


@dataclass(frozen=True)
class Solid:
    """Everything but hair, at its N covered pixels. Light is per unit of albedo, before exposure."""

    part: Part
    material: Tensor  # [N]
    radiance: Tensor  # [N,3]
    light: Tensor  # [N,3] diffuse light with shadows
    lamps: Tensor  # [N,2] luminance of the lamps' diffuse light with and without cast shadows


def solid(s: Stage, texture: Tensor, smile: float) -> Solid:
    """Light head, bust and glasses; texture [1,3,h,w] the head's albedo, smile 0..1 deepens the folds."""
    t, m = s.template, s.meshes
    lash = t.lash[None, :, None]
    values = torch.cat([m.verts, m.normals, m.q, s.skylight(m.verts, m.normals), lash], -1)
    part = rasterise(buffers.to_image(m.verts, s.code), t.faces, values, s.side)
    point, normal, q, sky, open_sky, lash = part.values.split([3, 3, 3, 3, 3, 1], 1)
    normal = F.normalize(normal, dim=-1)
    material = t.face_material[part.face]
    back = (material == mesh.FRAME) & (normal[:, 2] < 0)
    normal = torch.where(back[:, None], -normal, normal)
    colour, maps = _texture(t, texture, part)
    bare = look.bare_skin(texture, t.cheek_map)
    f = look.opaque(material, q, colour, maps, lash[:, 0], s.person, s.scene, bare, smile)
    pixel = 2 / (s.side * float(s.code.cam[0, 0]) * t.unit)  # in eye distances
    tilt = relief(part.index, f.relief, material == mesh.SKIN, s.side, 1 / pixel)
    bumped = F.normalize(normal + tilt, dim=-1)[None]
    seen = visibility(s.fine, point[None], normal[None])
    seen = seen + f.fill * (1 - seen)
    sky = sky + f.fill[:, None] * (open_sky - sky)
    lit, free = diffuse(bumped, s.lamps, seen, f.wrap[None])
    gloss = specular(bumped, s.lamps, seen, f.rough[None], f.f0[None])[0]
    lit, free, sky = (x * f.occlusion[:, None] for x in (lit[0], free[0], sky))
    edge = (1 - bumped[0, :, 2]).clamp(0, 1) ** 4
    sheen = sky * (0.8 * f.f0 + 0.25 * f.f0.sqrt() * edge)[:, None]
    y = lit.new_tensor(sh.LUMINANCE)
    lamps = torch.stack([lit @ y, free @ y], 1)
    return Solid(part, material, f.albedo * (lit + sky) + gloss + sheen, lit + sky, lamps)


def _texture(t: mesh.Template, texture: Tensor, part: Part) -> tuple[Tensor, dict[str, Tensor]]:
    """The head's albedo [N,3] (linear) and its region maps at the pixels; meaningless off the head."""
    weight = part.fragments.bary.reshape(-1, 3)[part.index]
    uv = (t.face_uv[part.face] * weight[..., None]).sum(1)
    grid = torch.stack([uv[:, 0] * 2 - 1, 1 - uv[:, 1] * 2], -1)[None, None]
    x = F.grid_sample(torch.cat([texture, t.maps], 1), grid, align_corners=False)[0, :, 0].T
    return linear(x[:, :3]), dict(zip(mesh.MAPS, x[:, 3:].unbind(1)))


def exposure(light: Tensor, bare: Tensor, camera: Camera) -> Tensor:
    """Gain [3] that exposes a face under diffuse light [N,3]: its brightest parts near 1 in any light.

    Dark skin gets up to half a stop more, as a photographer opens up for it; bare [3] is the skin's colour.
    """
    y = light @ light.new_tensor(sh.LUMINANCE)
    level = (y**4).mean() ** 0.25 if len(y) else light.new_tensor(1.0)
    more = 0.5 * (1 - bare.mean() / 0.35).clamp(0, 1)
    return 0.85 / level.clamp_min(1e-3) * 2 ** (camera.exposure[0] + more) * camera.white[0]


def hair(s: Stage, below: Part) -> tuple[Tensor, Tensor]:
    """Hair and beard in front of `below`: radiance times opacity [1,3,side,side], opacity [1,1,side,side].

    Two sheets, since both let light through at their edges: first what grows on the head and hangs behind it,
    then the hair that falls before the ears.
    """
    m, side = s.meshes, s.side
    sky = s.skylight(m.hair, m.hair_normals)[..., :3]
    values = torch.cat([m.hair, m.hair_normals, m.hair_q, sky, m.hanging, m.beard[..., None]], -1)
    depth = torch.full((side * side,), 1e3, device=sky.device).index_copy(0, below.index, below.depth)
    radiance, opacity = sky.new_zeros(1, 3, side, side), sky.new_zeros(1, 1, side, side)
    for faces in (m.hair_faces, m.veil_faces):
        if not faces.shape[1]:
            continue
        h = rasterise(buffers.to_image(m.hair, s.code), faces, values, side)
        slack = 0.02 * s.template.unit * s.code.cam[0, 0]
        near = (h.depth < depth[h.index] + slack).nonzero()[:, 0]
        colour, alpha = _strands(s, h.values[near])
        index = h.index[near]
        a = scatter(index, alpha, side)
        radiance = radiance * (1 - a) + scatter(index, colour * alpha, side)
        opacity = opacity * (1 - a) + a
        dense = alpha[:, 0] > 0.6
        depth = depth.index_copy(0, index[dense], h.depth[near][dense])
    return radiance, opacity


def _strands(s: Stage, values: Tensor) -> tuple[Tensor, Tensor]:
    """Radiance [N,3] and opacity [N,1] of hair at pixels with the vertices' values [N,17]."""
    point, normal, q, sky, hanging, beard = values.split([3, 3, 3, 3, 4, 1], 1)
    normal = F.normalize(normal, dim=-1)
    normal = torch.where(normal[:, 2:] < 0, -normal, normal)  # the inside of the sheet
    f = look.hair(q, hanging, beard[:, 0], normal[:, 2], s.person)
    tangent = f.tangent @ s.meshes.turn[0].T
    tangent = F.normalize(tangent - (tangent * normal).sum(-1, keepdim=True) * normal, dim=-1)[None]
    seen = visibility(s.fine, point[None], normal[None], 0.025)
    soft, shine = strands(tangent, normal[None], s.lamps, seen, f.gloss[None])
    return f.albedo * (soft[0] + sky) + f.shine * shine[0], f.alpha[:, None]
