"""Synthetic portraits with exact ground truth: `python -m training.synth --out DIR --count N`.

Rendered from the open head in linear light with what Lambertian buffers lack: area lights with soft cast
shadows and sky occlusion, skin gloss, relief and scatter, wet eyes, hair, beards, glasses, clothes,
backdrops, and a camera.
Every part has its own seed, so the same person can be had under another light, in another pose, elsewhere.
"""

from __future__ import annotations

import argparse
import contextlib
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

from rig_core import buffers, data, sh
from rig_core.face import Batch, FaceCode, axis_angle_to_matrix, cat, matrix_to_axis_angle

from . import synth_camera as lens
from . import synth_light as light_
from . import synth_look as look
from . import synth_mesh as mesh
from . import synth_pixels as pixels
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
    cast       [B] the same for the whole of the seen skin: 0 no cast shadows .. 1 the lamps do not reach it
    dim        [B] share of all light (lamps and sky) on the seen facial skin that is lost to cast shadows
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
    dim: Tensor
    key: Tensor

    def _map(self, f):
        return replace(super()._map(f), code=self.code._map(f))


def render(
    seeds,
    size: int = 128,
    device="cpu",
    *,
    person=None,
    pose=None,
    light=None,
    scene=None,
    camera=None,
    shadows: bool = True,
) -> SynthBatch:
    """Render portraits. seeds: B integers; each of person, pose (with expression), light, scene (backdrop and
    clothes), camera (framing and development) takes its own seeds [B] where given, else `seeds`.

    Each portrait depends on its five seeds only, never on the rest of the batch. size: even, at least 32.
    Same person under another light: render(seeds, light=other). Without `shadows` the lamps cast none.
    Raises ValueError for odd sizes and for counts of seeds that differ.
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
    items = [_portrait(s, size, torch.device(device), shadows) for s in zip(*parts)]
    code = cat([i.code for i in items])
    fields = {k: torch.cat([getattr(i, k) for i in items]) for k in vars(items[0]) if k != "code"}
    return SynthBatch(code=code, **fields)


def _portrait(seeds: tuple[int, ...], size: int, device, shadows: bool) -> SynthBatch:
    """One portrait from the seeds of person, pose, light, scene and camera."""
    t = mesh.template(str(device))
    head = t.head
    drawn = (
        (scene_.Person, scene_.sample_person(seeds[0], head.sizes)),
        (scene_.Pose, scene_.sample_pose(seeds[1], head.expression_names, head.expressions)),
        (light_.Lights, scene_.sample_light(seeds[2])),
        (scene_.Scene, lens.sample_scene(seeds[3])),
        (scene_.Camera, lens.sample_camera(seeds[4])),
    )
    person, pose, lights, scene, camera = (scene_.stack(cls, [d]).to(device) for cls, d in drawn)
    texture = head.albedo(person.tex)
    person = replace(person, hair_colour=_hair_colour(t, texture, person))
    code, marks = frame(head, person, pose, camera, size)
    m = mesh.assemble(t, person, code.shape, code.exp, code.pose)
    stage = pixels.stage(t, m, code, person, scene, lights, size * SUPERSAMPLE, shadows)
    solid = pixels.solid(stage, texture, _smile(head, code))
    return _compose(stage, solid, texture, lights, camera, marks, size)


def _compose(s: pixels.Stage, solid: pixels.Solid, texture, lights, camera, marks, size: int) -> SynthBatch:
    """Expose, put the hair over the rest and that over the backdrop, develop, and gather the truth."""
    t, index = s.template, solid.part.index
    is_skin, is_cloth = solid.material == mesh.SKIN, solid.material == mesh.CLOTH
    face = is_skin & t.face_region[solid.part.face]
    gain = pixels.exposure(solid.light[face], look.bare_skin(texture, t.cheek_map), camera)
    is_head = (solid.material != mesh.CLOTH) & (solid.material != mesh.FRAME)
    kinds = torch.stack([is_head, is_skin, is_cloth, torch.ones_like(is_skin)], 1).float()
    lost = solid.lamps[:, 1] - solid.lamps[:, 0]
    lost = torch.stack([lost, solid.light @ lost.new_tensor(sh.LUMINANCE) + lost], 1) * face[:, None]
    values = torch.cat([solid.radiance * gain, kinds, solid.lamps * kinds[:, 1:2], lost], 1)
    radiance, kinds, lamps = pixels.scatter(index, values, s.side).split([3, 4, 4], 1)
    backdrop = F.interpolate(s.scene.background, (s.side, s.side), mode="bicubic", align_corners=False)
    backdrop = backdrop.clamp_min(0) * (camera.white[0] * 2 ** camera.exposure[0])[:, None, None]
    fibres, hair = pixels.hair(s, solid.part)
    radiance = radiance + backdrop * (1 - kinds[:, 3:])
    radiance = radiance * (1 - hair) + fibres * gain[:, None, None]
    bare = 1 - hair  # lamps and kinds are counted where the hair lets them be seen
    kinds = torch.cat([kinds[:, :1], kinds[:, 1:3] * bare, (1 - kinds[:, 3:]) * bare, hair, lamps * bare], 1)
    head, skin, cloth, background, hair, lit, free, *lost = F.avg_pool2d(kinds, SUPERSAMPLE).split(1, 1)
    shadow = torch.where(free > 1e-3, 1 - lit / free.clamp_min(1e-3), torch.zeros_like(free))
    return SynthBatch(
        image=lens.develop(radiance, camera),
        code=s.code.replace(light=sh.encode_light(light_.irradiance_sh(lights) * gain)),
        landmarks=buffers.to_pixels(buffers.to_image(marks, s.code), (size, size)),
        head=head,
        skin=skin,
        hair=hair,
        cloth=cloth,
        background=background,
        shadow=shadow.clamp(0, 1),
        cast=(1 - lit.sum() / free.sum().clamp_min(1e-6)).clamp(0, 1).reshape(1),
        dim=(lost[0].sum() / lost[1].sum().clamp_min(1e-6)).clamp(0, 1).reshape(1),
        key=lights.key,
    )


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
    """Point the camera: the FFHQ crop of the true landmarks (centred between eyes and mouth, half side the
    larger of 2 eye distances and 1.8 eye-to-mouth distances, upright by both), then the camera's shift,
    zoom and roll.
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


# --- command line ---


def _chunk(job: tuple[list[int], int, int]) -> tuple[Tensor, FaceCode, list[int]]:
    """Portraits for the numbers of one shard: 8-bit pictures, codes, person seeds. For a worker process."""
    numbers, size, each = job
    persons = [n // each for n in numbers]
    batch = render(numbers, size, person=[2**20 + p for p in persons] if each > 1 else None)
    return (batch.image * 255).round().to(torch.uint8), batch.code, persons


def write(folder: Path, count: int, size: int, seed: int, each: int, workers: int, shard: int = 100) -> None:
    """Render `count` portraits into a dataset folder; goes on where an earlier run stopped."""
    done = data.written(folder)
    numbers = [n for n in range(seed, seed + count) if f"synth-{n:07d}" not in done]
    jobs = [(numbers[i : i + shard], size, each) for i in range(0, len(numbers), shard)]
    start, made = time.monotonic(), 0
    with contextlib.ExitStack() as stack:
        run = map
        if workers > 1:
            context = multiprocessing.get_context("spawn")
            pool = ProcessPoolExecutor(workers, context, initializer=torch.set_num_threads, initargs=(1,))
            run = stack.enter_context(pool).map
        for (batch, _, _), (images, code, persons) in zip(jobs, run(_chunk, jobs)):
            names = [f"synth-{n:07d}" for n in batch]
            people = [f"synth-{p}" for p in persons]
            data.append(folder, names, images, code, kind="png", tags=("synth",), person=people)
            made += len(batch)
            rate = made / (time.monotonic() - start)
            left = (len(numbers) - made) / rate / 60
            print(f"{len(done) + made} of {count}, {rate:.1f} a second, {left:.0f} min left", flush=True)
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
