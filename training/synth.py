"""Synthetic portraits with exact ground truth: `python -m training.synth --out DIR --count N`.

Rendered from the open head in linear light with what Lambertian buffers lack: area lights with soft cast shadows and
sky occlusion, skin gloss, relief and scatter, wet eyes, hair, beards, glasses, clothes, backdrops, and a camera.
Every part has its own seed, so the same person can be had under another light, in another pose, elsewhere.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from rig_core import buffers, data, raster, sh
from rig_core.face import Batch, FaceCode, axis_angle_to_matrix, cat, matrix_to_axis_angle

from . import synth_camera as lens
from . import synth_light as light_
from . import synth_look as look
from . import synth_mesh as mesh
from . import synth_scene as scene_

SUPERSAMPLE = 2


@dataclass(frozen=True)
class SynthBatch(Batch):
    """B portraits of size S and their truth.

    image      [B,3,S,S] sRGB 0..1
    code       FaceCode of the open head in the picture's frame; light in display space, without shadows
    landmarks  [B,68,2] pixels (x, y), integers are pixel centres; hidden ones too
    head       [B,1,S,S] coverage of the head's own mesh, under hair and glasses too
    skin       [B,1,S,S] seen skin (lips and brows included; not eyes, not mouth)
    hair       [B,1,S,S] opacity of hair and beard
    cloth      [B,1,S,S] seen clothes
    background [B,1,S,S] seen backdrop
    shadow     [B,1,S,S] share of the lamps' diffuse light that other surfaces block, 0 outside the skin
    cast       [B] the same for the whole of the seen skin: 0 no cast shadows .. 1 none of the lamps' light arrives
    key        [B,3] direction to the main lamp
    """

    image: Tensor
    code: FaceCode
    landmarks: Tensor
    head: Tensor
    skin: Tensor
    hair: Tensor
    cloth: Tensor
    background: Tensor
    shadow: Tensor
    cast: Tensor
    key: Tensor

    def _map(self, f):
        return replace(super()._map(f), code=self.code._map(f))


def render(
    seeds, size: int = 128, device="cpu", *, person=None, pose=None, light=None, scene=None, camera=None
) -> SynthBatch:
    """Render portraits. seeds: B integers; each of person, pose (with expression), light, scene (backdrop and
    clothes), camera (framing and development) takes its own seeds [B] where given, else `seeds`.

    Each portrait depends on its five seeds only, never on the rest of the batch. size: even, at least 32.
    Same person under another light: render(seeds, light=other). Raises ValueError for odd sizes or seed counts.
    """
    if size < 32 or size % 2:
        raise ValueError(f"size must be even and at least 32, got {size}")
    seeds = torch.as_tensor(seeds).reshape(-1).tolist()
    parts = []
    for name, own in dict(person=person, pose=pose, light=light, scene=scene, camera=camera).items():
        own = seeds if own is None else torch.as_tensor(own).reshape(-1).tolist()
        if len(own) != len(seeds):
            raise ValueError(f"{len(seeds)} seeds but {len(own)} for {name}: give one each")
        parts.append(own)
    if not seeds:
        raise ValueError("no seeds: give at least one")
    items = [_portrait(s, size, torch.device(device)) for s in zip(*parts)]
    code = cat([i.code for i in items])
    fields = {k: torch.cat([getattr(i, k) for i in items]) for k in vars(items[0]) if k != "code"}
    return SynthBatch(code=code, **fields)


def _portrait(seeds: tuple[int, ...], size: int, device) -> SynthBatch:
    """One portrait from the seeds of person, pose, light, scene and camera."""
    t = mesh.template(str(device))
    head = t.head
    person = scene_.stack(scene_.Person, [scene_.sample_person(seeds[0], head.sizes)]).to(device)
    pose = scene_.stack(
        scene_.Pose, [scene_.sample_pose(seeds[1], head.expression_names, head.expressions)]
    ).to(device)
    lights = scene_.stack(light_.Lights, [scene_.sample_light(seeds[2])]).to(device)
    scene = scene_.stack(scene_.Scene, [lens.sample_scene(seeds[3])]).to(device)
    camera = scene_.stack(scene_.Camera, [lens.sample_camera(seeds[4])]).to(device)
    texture = head.albedo(person.tex)
    person = replace(person, hair_colour=_hair_colour(t, texture, person))
    code, marks = frame(head, person, pose, camera, size)
    m = mesh.assemble(t, person, code.shape, code.exp, code.pose)
    return _shade(t, m, code, marks, texture, person, lights, scene, camera, size, _smile(head, code))


def _hair_colour(t, texture: Tensor, person) -> Tensor:
    """The head's own hair colour (linear [B,3]), greyed or dyed."""
    own = scene_.linear((texture * t.scalp_map).sum((2, 3)) / t.scalp_map.sum())
    own = torch.lerp(own, own.mean(1, keepdim=True), 0.2)
    grey, dye = person.grey[:, None], person.dye
    own = own + (own.new_tensor([0.52, 0.51, 0.50]) * (0.6 + 0.4 * grey) - own) * grey
    return own + (dye[:, :3] - own) * dye[:, 3:]


def _smile(head, code: FaceCode) -> float:
    i = [k for k, n in enumerate(head.expression_names) if n.startswith("mouthSmile")]
    e = head.expressions[i].sum(0)
    return float((code.exp[0] @ e / (e @ e)).clamp(0, 1))


def frame(head, person, pose, camera, size: int) -> tuple[FaceCode, Tensor]:
    """Point the camera: the FFHQ crop of the true landmarks (centre between eyes and mouth, half side the larger of
    2 eye distances and 1.8 eye-to-mouth distances, upright by both), shifted, zoomed and rolled by the camera.
    Returns the code and the landmarks [B,68,3] in model space.
    """
    turn = pose.turn
    zero = torch.zeros_like(turn[:, 0])
    yaw = axis_angle_to_matrix(torch.stack([zero, turn[:, 1], zero], 1))
    pitch = axis_angle_to_matrix(torch.stack([turn[:, 0], zero, zero], 1))
    rotation = yaw @ pitch

    def posed(r):
        p = torch.cat(
            [matrix_to_axis_angle(r), pose.jaw[:, None], zero[:, None], zero[:, None], pose.gaze], 1
        )
        marks = head.landmarks(head.verts(person.shape, pose.exp, p), p)
        eyes = [marks[:, a : a + 6, :2].mean(1) for a in (36, 42)]
        e, middle = eyes[1] - eyes[0], (eyes[0] + eyes[1]) / 2
        m = (marks[:, 48, :2] + marks[:, 54, :2]) / 2 - middle
        x = e + torch.stack([-m[:, 1], m[:, 0]], 1)  # y is up here: the perpendicular turns the other way
        return p, marks, x, torch.maximum(2 * e.norm(dim=1), 1.8 * m.norm(dim=1)), middle + 0.1 * m

    _, _, x, _, _ = posed(rotation)
    roll = camera.roll - torch.atan2(x[:, 1], x[:, 0])
    rotation = axis_angle_to_matrix(torch.stack([zero, zero, roll], 1)) @ rotation
    p, marks, _, half, centre = posed(rotation)
    scale = camera.zoom / half
    offset = camera.shift / scale[:, None] - centre
    base = head.mean_code(len(p), size)
    code = base.replace(
        shape=person.shape, tex=person.tex, exp=pose.exp, pose=p, cam=torch.cat([scale[:, None], offset], 1)
    )
    return code, marks


# --- one portrait's pixels -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Layer:
    """The covered pixels of one rasterised mesh: index [N] into the picture, depth [N], values [N,D] of the vertices."""

    index: Tensor
    depth: Tensor
    values: Tensor
    fragments: raster.Fragments


def layer(points: Tensor, faces: Tensor, values: Tensor, side: int) -> Layer:
    """points [1,V,3] image space, faces [F,3] or [1,F,3], values [1,V,D]."""
    f = raster.rasterize(points + points.new_tensor([0, 0, buffers.DEPTH_OFFSET]), faces, (side, side))
    index = (f.pix_to_face.reshape(-1) >= 0).nonzero()[:, 0]
    face = f.pix_to_face.reshape(-1)[index]
    corner = faces.reshape(-1, 3)[face]
    weight = f.bary.reshape(-1, 3)[index]
    weight = weight / weight.sum(1, keepdim=True).clamp_min(1e-6)
    v = (values[0][corner] * weight[..., None]).sum(1)
    return Layer(index, f.zbuf.reshape(-1)[index], v, f)


def _scatter(index: Tensor, values: Tensor, side: int) -> Tensor:
    """[N,D] -> picture [1,D,side,side], 0 elsewhere."""
    out = values.new_zeros(side * side, values.shape[1])
    return out.index_copy(0, index, values).T.reshape(1, -1, side, side)


def _relief(index: Tensor, height: Tensor, keep: Tensor, side: int, slope: float) -> Tensor:
    """Tilt [N,3] of the normals by a height [N] seen in the picture; nothing at the borders of `keep`."""
    h = _scatter(index, torch.stack([height, keep.float()], 1), side)
    dx = h[..., 2:] - h[..., :-2]
    dy = h[..., 2:, :] - h[..., :-2, :]
    gx = F.pad(dx[:, :1] * (dx[:, 1:] == 0), (1, 1))
    gy = F.pad(dy[:, :1] * (dy[:, 1:] == 0), (0, 0, 1, 1))
    g = torch.cat([-gx, gy, torch.zeros_like(gx)], 1) * (slope / 2)
    return g.reshape(3, -1).T[index] * keep[:, None]


def _sky_at_vertices(m: mesh.Meshes, verts, normals, lights, maps) -> Tensor:
    """Diffuse light of the surroundings at vertices, with occlusion [1,V,3]."""
    sky = light_.Lights(lights.direction[:, light_.AREA :], lights.colour[:, light_.AREA :], lights.key)
    seen = light_.visibility(maps, verts, normals)
    lit, _ = light_.diffuse(normals, sky, seen, torch.zeros_like(verts))
    return lit


def _shade(t, m, code, marks, texture, person, lights, scene, camera, size, smile) -> SynthBatch:
    side = size * SUPERSAMPLE
    lamps = light_.Lights(lights.direction[:, : light_.AREA], lights.colour[:, : light_.AREA], lights.key)
    fine = light_.shadow_maps(m.caster, m.caster_faces, lamps.direction, 112, m.scope)
    rough = light_.shadow_maps(m.caster, m.caster_faces, lights.direction[:, light_.AREA :], 48, m.scope)

    # everything but hair
    sky = _sky_at_vertices(m, m.verts, m.normals, lights, rough)
    values = torch.cat([m.verts, m.normals, m.q, sky, t.lash.expand(1, -1)[..., None]], -1)
    a = layer(buffers.to_image(m.verts, code), t.faces, values, side)
    face = a.fragments.pix_to_face.reshape(-1)[a.index]
    material = t.face_material[face]
    point, normal, q, sky, lash = a.values.split([3, 3, 3, 3, 1], 1)
    normal = F.normalize(normal, dim=-1)
    colour, maps = _texture(t, texture, a, face)
    bare = look.bare_skin(texture, t.cheek_map)
    s = look.opaque(material, q, colour, maps, lash[:, 0], person, scene, bare, smile)
    pixel = 2 / (side * float(code.cam[0, 0]) * t.unit)  # eye distances
    tilt = _relief(a.index, s.relief, material == mesh.SKIN, side, 1 / pixel)
    bumped = F.normalize(normal + tilt, dim=-1)[None]
    seen = light_.visibility(fine, point[None], normal[None])
    lit, free = light_.diffuse(bumped, lamps, seen, s.wrap[None])
    gloss = light_.specular(bumped, lamps, seen, s.rough[None], s.f0[None])
    sky = sky * s.occlusion[:, None]
    lit, free = lit[0] * s.occlusion[:, None], free[0] * s.occlusion[:, None]
    sheen = sky * (s.f0 * 0.8 + 0.25 * s.f0.sqrt() * (1 - bumped[0, :, 2]).clamp(0, 1) ** 4)[:, None]
    radiance = s.albedo * (lit + sky) + gloss[0] + sheen

    gain = _exposure(lit + sky, (material == mesh.SKIN) & (t.face_region[face]), bare, camera)
    radiance = _scatter(a.index, radiance * gain, side)
    weights = torch.tensor(sh.LUMINANCE, device=radiance.device)
    kinds = torch.stack([material < mesh.CLOTH, material == mesh.SKIN, material == mesh.CLOTH], 1).float()
    image = torch.cat(
        [
            radiance,
            _scatter(
                a.index,
                torch.cat(
                    [kinds, torch.stack([lit @ weights, free @ weights], 1), torch.ones_like(kinds[:, :1])], 1
                ),
                side,
            ),
        ],
        1,
    )
    backdrop = F.interpolate(scene.background, (side, side), mode="bicubic", align_corners=False).clamp_min(0)
    backdrop = backdrop * (camera.white[0] * 2 ** camera.exposure[0])[:, None, None]
    rgb = image[:, :3] + backdrop * (1 - image[:, 8:])
    rgb, hair = _hair_over(t, m, code, person, lights, fine, rough, rgb, a, gain, side)

    small = F.avg_pool2d(torch.cat([image[:, 3:], hair], 1), SUPERSAMPLE)
    head, skin, cloth, lit, free, cover, hair = small.split(1, 1)
    visible = image[:, 4:5] * (1 - _up(hair, side))
    blocked = (
        1 - (image[:, 6:7] * image[:, 4:5]).sum() / (image[:, 7:8] * image[:, 4:5]).sum().clamp_min(1e-6)
    ).reshape(1)
    linear_light = light_.irradiance_sh(lights) * gain
    return SynthBatch(
        image=lens.develop(rgb, camera),
        code=code.replace(light=sh.encode_light(linear_light)),
        landmarks=buffers.to_pixels(buffers.to_image(marks, code), (size, size)),
        head=head,
        skin=skin * (1 - hair),
        hair=hair,
        cloth=cloth * (1 - hair),
        background=(1 - cover) * (1 - hair),
        shadow=((1 - lit / free.clamp_min(1e-4)) * (free > 1e-3)).clamp(0, 1) * skin,
        cast=blocked.clamp(0, 1),
        key=lights.key,
    )


def _up(x: Tensor, side: int) -> Tensor:
    return F.interpolate(x, (side, side), mode="nearest")


def _texture(t, texture: Tensor, a: Layer, face: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """The head's albedo [N,3] (linear) and its region maps at the pixels; 0 off the head."""
    corner = t.face_uv[face]  # [N,3,2]
    weight = a.fragments.bary.reshape(-1, 3)[a.index]
    uv = (corner * weight[..., None]).sum(1)
    grid = torch.stack([uv[:, 0] * 2 - 1, 1 - uv[:, 1] * 2], -1)[None, None]
    x = F.grid_sample(torch.cat([texture, t.maps], 1), grid, align_corners=False)[0, :, 0].T
    return scene_.linear(x[:, :3]), dict(zip(mesh.MAPS, x[:, 3:].unbind(1)))


def _exposure(light: Tensor, face: Tensor, bare: Tensor, camera) -> Tensor:
    """Gain [3] that exposes the face: its brightest parts near 1, one power mean for flat and hard light alike.

    Dark skin gets up to half a stop more, as a photographer opens up for it; bare [3] is the skin's colour.
    """
    y = light[face] @ torch.tensor(sh.LUMINANCE, device=light.device)
    level = (y**4).mean() ** 0.25 if len(y) else light.new_tensor(1.0)
    more = 0.5 * (1 - bare.mean() / 0.35).clamp(0, 1)
    return 0.85 / level.clamp_min(1e-3) * 2 ** (camera.exposure[0] + more) * camera.white[0]


def _hair_over(
    t, m, code, person, lights, fine, rough, rgb, below: Layer, gain, side
) -> tuple[Tensor, Tensor]:
    """Composite the hair: picture [1,3,side,side] and opacity [1,1,side,side]."""
    sky = _sky_at_vertices(m, m.hair, m.hair_normals, lights, rough)
    values = torch.cat([m.hair, m.hair_normals, m.hair_q, sky, m.hanging, m.beard[..., None]], -1)
    h = layer(buffers.to_image(m.hair, code), m.hair_faces, values, side)
    depth = torch.full((side * side,), 1e3, device=rgb.device).index_copy(0, below.index, below.depth)
    near = h.depth < depth[h.index] + 0.02 * t.unit * code.cam[0, 0]
    keep = near.nonzero()[:, 0]
    index = h.index[keep]
    point, normal, q, sky, hanging, beard = h.values[keep].split([3, 3, 3, 3, 3, 1], 1)
    normal = F.normalize(normal, dim=-1)
    normal = torch.where(normal[:, 2:] < 0, -normal, normal)
    s = look.hair(q, hanging, beard[:, 0], normal[:, 2], person)
    tangent = s.tangent @ m.turn[0].T
    tangent = F.normalize(tangent - (tangent * normal).sum(-1, keepdim=True) * normal, dim=-1)[None]
    lamps = light_.Lights(lights.direction[:, : light_.AREA], lights.colour[:, : light_.AREA], lights.key)
    seen = light_.visibility(fine, point[None], normal[None], 0.02)
    soft, shine = light_.strands(tangent, normal[None], lamps, seen, s.gloss[None])
    radiance = s.albedo * (soft[0] + sky) + s.shine * shine[0]
    alpha = _scatter(index, s.alpha[:, None], side)
    return rgb * (1 - alpha) + _scatter(index, radiance * gain, side) * alpha, alpha


# --- command line ----------------------------------------------------------------------------------------------


def _chunk(job: tuple[list[int], int, int]) -> tuple[Tensor, FaceCode, list[int]]:
    """Portraits for the numbers of one shard: 8-bit pictures, codes, person seeds. Runs in a worker process."""
    numbers, size, each = job
    torch.set_num_threads(1)
    persons = [n // each for n in numbers]
    batch = render(numbers, size, person=[2**20 + p for p in persons] if each > 1 else None)
    return (batch.image * 255).round().to(torch.uint8), batch.code, persons


def write(folder: Path, count: int, size: int, seed: int, each: int, workers: int, shard: int = 100) -> None:
    """Render `count` portraits into a dataset folder; goes on where an earlier run stopped."""
    done = data.written(folder)
    numbers = [n for n in range(seed, seed + count) if f"synth-{n:07d}" not in done]
    jobs = [(numbers[i : i + shard], size, each) for i in range(0, len(numbers), shard)]
    start, made = time.monotonic(), 0
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        for (batch, _, _), (images, code, persons) in zip(jobs, pool.map(_chunk, jobs)):
            names = [f"synth-{n:07d}" for n in batch]
            data.append(
                folder,
                names,
                images,
                code,
                kind="png",
                tags=("synth",),
                person=[f"synth-{p}" for p in persons],
            )
            made += len(batch)
            rate = made / (time.monotonic() - start)
            print(
                f"{len(done) + made} of {count}, {rate:.1f} a second, {(len(numbers) - made) / rate / 60:.0f} min left",
                flush=True,
            )
    data.finish(folder)


def sheet(count: int, size: int, seed: int, columns: int = 10) -> Tensor:
    """A contact sheet [3,H,W] of the first portraits."""
    images = render(range(seed, seed + count), size).image
    rows = -(-count // columns)
    images = F.pad(images, (0, 0, 0, 0, 0, 0, 0, rows * columns - count))
    return (
        images.reshape(rows, columns, 3, size, size)
        .permute(2, 0, 3, 1, 4)
        .reshape(3, rows * size, columns * size)
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, help="dataset folder to write or to go on with")
    parser.add_argument("--sheet", type=Path, help="contact sheet to write (png)")
    parser.add_argument("--count", type=int, default=100)
    parser.add_argument("--size", type=int, default=128, help="pixels")
    parser.add_argument("--seed", type=int, default=0, help="number of the first portrait")
    parser.add_argument("--each", type=int, default=1, help="portraits of one person in a row")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes")
    args = parser.parse_args()
    if not (args.out or args.sheet):
        parser.error("nothing to do: give --out or --sheet")
    if args.out:
        write(args.out, args.count, args.size, args.seed, args.each, args.workers)
    if args.sheet:
        image = sheet(args.count, args.size, args.seed)
        Image.fromarray((image * 255).round().byte().permute(1, 2, 0).numpy()).save(args.sheet)


if __name__ == "__main__":
    main()
