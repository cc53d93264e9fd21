"""The main job on the embedded defaults: `python run.py demo` relights, turns and animates two photographs.

Two rows a photograph: DiffusionRig's light, pose and expression, then DiFaReli's light and cast shadow.
Writes a contact sheet and every single picture below --out (default: out/demo).
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import Tensor
from tqdm import tqdm

from rig_core import buffers, checkpoints, light_prior, pipeline

PHOTOS = ("astronaut.jpg", "grace_hopper.jpg")
LIGHTS = {"from the left": (-70, 15), "from the right": (70, 15), "from above": (0, 60)}  # azimuth, elevation
TURNS = {
    "turned left": dict(yaw=-13),
    "turned right": dict(yaw=13),
    "smiling": dict(mouthSmile_L=0.7, mouthSmile_R=0.7, cheekSquint_L=0.4, cheekSquint_R=0.4),
}
RELIGHTS = {"lit from the left": (-75, 10), "lit from the right": (75, 10), "lit from above": (0, 65)}
SHADOWS = {"less cast shadow": -4.0, "more cast shadow": 4.0}  # added to the photo's own scalar
SIDE = 256  # px of a picture on the sheet


def read(path: Path) -> Tensor:
    """[1,3,H,W] 0..1."""
    return torch.from_numpy(np.array(Image.open(path).convert("RGB"))).permute(2, 0, 1)[None].float() / 255


def write(image: Tensor, path: Path) -> None:
    """[3,H,W] 0..1 -> PNG."""
    Image.fromarray((image.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).contiguous().numpy()).save(path)


def bar(what: str, steps: int):
    """A progress bar as a sampler's callback."""
    progress = tqdm(total=steps, desc=f"{what:>28}", unit="step", leave=True)
    return lambda _: progress.update()


def edits(rig, head, photo: Tensor, name: str) -> tuple[dict[str, Tensor], pipeline.Portrait]:
    """All pictures of one photo, [3,H,W] by title."""
    portrait = pipeline.estimate(head, photo, rig.config.image_size)
    code, steps = portrait.code, 2 * int(pipeline.STEPS.removeprefix("quad"))
    lights = torch.cat(
        [
            light_prior.edit(code.light, az, el, ambient=0.15, mean=head.light_mean, std=head.light_std)
            for az, el in LIGHTS.values()
        ]
    )
    edit = pipeline.paint(
        rig,
        head,
        portrait,
        code.expand(len(LIGHTS)).replace(light=lights),
        callback=bar(f"{name}: light", steps),
    )
    out = dict(zip(LIGHTS, pipeline.paste(photo, portrait, edit)))
    for title, change in TURNS.items():
        target = pipeline.turn(head, code, **change)
        edit = pipeline.paint(rig, head, portrait, target, callback=bar(f"{name}: {title}", steps))
        out[title] = pipeline.paste(photo, portrait, edit)[0]
    return out, portrait


def relights(model, head, photo: Tensor, name: str) -> tuple[dict[str, Tensor], pipeline.Subject]:
    """DiFaReli's pictures of one photo, [3,H,W] by title."""
    portrait = pipeline.estimate(head, photo, model.config.image_size)
    subject = pipeline.describe(head, portrait, checkpoints.load_identity(), checkpoints.load_shadow())
    own, prior = portrait.code.light, dict(mean=head.light_mean, std=head.light_std)
    lights = [light_prior.edit(own, az, el, ambient=0.15, **prior) for az, el in RELIGHTS.values()]
    titles = [*RELIGHTS, *SHADOWS]
    shadow = subject.shadow + torch.tensor([0.0] * len(lights) + [*SHADOWS.values()])[:, None]
    job = (model, head, portrait, subject)
    noise = pipeline.to_noise(*job, callback=bar(f"{name}: to noise", 66))
    light = torch.cat([*lights, *[own] * len(SHADOWS)])
    edit = pipeline.relight(*job, light, shadow, noise, callback=bar(f"{name}: DiFaReli's light", 33))
    return dict(zip(titles, pipeline.paste(photo, portrait, edit))), subject


def sheet(rows: list[list[tuple[str, Tensor]]]) -> Image.Image:
    """Titled pictures [3,h,w] in rows."""
    band = 22
    page = Image.new("RGB", (SIDE * max(map(len, rows)), (SIDE + band) * len(rows)), "white")
    draw = ImageDraw.Draw(page)
    for y, row in enumerate(rows):
        for x, (title, image) in enumerate(row):
            small = F.interpolate(image[None], (SIDE, SIDE), mode="bicubic", antialias=True)[0].clamp(0, 1)
            tile = Image.fromarray((small * 255).round().byte().permute(1, 2, 0).contiguous().numpy())
            page.paste(tile, (x * SIDE, y * (SIDE + band) + band))
            draw.text((x * SIDE + 6, y * (SIDE + band) + 5), title, fill="black")
    return page


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("photos", nargs="*", type=Path, help="your own photos instead of the two")
    parser.add_argument("--out", type=Path, default=Path("out/demo"))
    parser.add_argument("--rig", type=Path, help="a DiffusionRig checkpoint instead of the embedded one")
    parser.add_argument("--relight", type=Path, help="a DiFaReli checkpoint instead of the embedded one")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    head = checkpoints.load_head()
    rig, _ = checkpoints.load_rig(args.rig)
    model, _ = checkpoints.load_relight(args.relight)
    rows = []
    for path in args.photos or [checkpoints.ASSETS / p for p in PHOTOS]:
        photo = read(path)
        pictures, portrait = edits(rig, head, photo, path.stem)
        relit, subject = relights(model, head, photo, path.stem)
        for title, image in {**pictures, **relit}.items():
            write(image, args.out / f"{path.stem} {title}.png")
        b = buffers.render(head, portrait.code, 256)
        frame = portrait.crop.resized(2 * SIDE)
        cut = {t: frame.apply(i[None])[0] for t, i in {"photo": photo[0], **pictures, **relit}.items()}
        fitted = torch.cat([b.shading * b.mask / 1.6, b.normal / 2 * b.mask + 0.5], 3)
        fitted = F.pad(fitted.clamp(0, 1), (0, 0, 128, 128), value=1.0)
        first = [("photo", cut["photo"]), ("fitted light, normals", fitted[0])]
        rows.append([*first, *((t, cut[t]) for t in pictures)])
        kept = [("kept: backdrop and clothes", subject.background[0] / 2 + 0.5)]
        kept += [("face, neck and hair", subject.matte[0].expand(3, -1, -1))]
        rows.append([*kept, *((t, cut[t]) for t in relit)])
    page = sheet(rows)
    page.save(args.out / "sheet.png")
    print(f"{args.out / 'sheet.png'}: {len(rows) // 2} photos, {time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    main()
