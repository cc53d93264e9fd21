"""Relighting of real photos, where no truth exists: does the picture come back unchanged, does the light go
where it is asked to, does the background stay, do the features stay in place, do shadows deepen as told?
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from rig_core import align, buffers, composite, conditions, light_prior, pipeline, sh
from rig_core.data import Dataset
from rig_core.estimators import landmark_fit, shadow
from training.evaluate_pairs import Tools, at_size
from training.measures import brightness, drift, falling, psnr, response

ASKED = ((-60.0, 10.0), (60.0, 10.0), (0.0, 55.0), (35.0, -25.0))  # azimuth, elevation in degrees
SHOWN = (*ASKED, (-110.0, 20.0), (0.0, 5.0))  # on the sheet
STRENGTHS = 5  # shadow scalars, over the range that photos have
LEAST = 0.002  # share of the picture that a cast shadow must cover to be measured


def photos(dataset: Dataset) -> Dataset:
    """The validation photos of a dataset, without the relit copies that training adds to them."""
    val = dataset.select("val")
    return val.select(tag="photo") if any("photo" in e.tags for e in val.entries) else val


def spread(dataset: Dataset, count: int) -> list[int]:
    """Some entries, evenly over the dataset."""
    return torch.linspace(0, len(dataset) - 1, min(count, len(dataset))).long().tolist()


def portrait_of(dataset: Dataset, i: int) -> pipeline.Portrait:
    """An entry at the dataset's size, as a whole picture."""
    size = dataset.size[0]
    image = dataset.images([i], size).float() / 255
    return pipeline.Portrait(image, align.Crop(torch.eye(3)[None], size), dataset.codes([i]))


def lights_at(head, light: Tensor, angles) -> Tensor:
    """The photo's light [1,9,3] moved to azimuths and elevations in degrees: [N,9,3]."""
    azimuth, elevation = torch.tensor(angles).unbind(1)
    lights = light.expand(len(angles), -1, -1)
    return light_prior.edit(lights, azimuth, elevation, mean=head.light_mean, std=head.light_std)


# ------------------------------------------------------------------------------------------ the methods


@dataclass(frozen=True)
class Relit:
    """A photo under N lights.

    result [N,3,H,W] at the photo's size; back: dB of the unedited photo as the denoiser repeats it;
    touched [1,1,H,W]: where the edit may show.
    """

    result: Tensor
    back: float
    touched: Tensor


def by_rig(tools: Tools, portrait: pipeline.Portrait, lights: Tensor) -> Relit:
    small = at_size(portrait, tools.rig.config.image_size)
    target = small.code.expand(len(lights)).replace(light=lights)
    edit = pipeline.paint(tools.rig, tools.head, small, target)
    result = pipeline.paste(portrait.image, small, edit)
    return Relit(result, psnr(edit.before, small.image), touched(portrait, small, edit))


class Relighter:
    """DiFaReli on one photo: described and inverted once. trust: see pipeline.relight."""

    def __init__(self, tools: Tools, portrait: pipeline.Portrait, trust: float = 0.0):
        self.portrait, self.small = portrait, at_size(portrait, tools.relight.config.image_size)
        subject = pipeline.describe(tools.head, self.small, tools.recognise, tools.judge)
        self.job = (tools.relight, tools.head, self.small, subject)
        self.relight = partial(pipeline.relight, noise=pipeline.to_noise(*self.job), trust=trust)

    def under(self, lights: Tensor) -> Relit:
        """Lights [N,9,3], with the photo's own shadow scalar."""
        every = torch.cat([self.small.code.light, lights])
        edit = self.relight(*self.job, every)
        back, edit = psnr(edit.image[:1], self.small.image), replace(edit, image=edit.image[1:])
        result = pipeline.paste(self.portrait.image, self.small, edit)
        return Relit(result, back, touched(self.portrait, self.small, edit))

    def shadowed(self, light: Tensor, scalars: Tensor) -> Tensor:
        """[K,3,H,W] under one light [1,9,3] with the shadow scalars [K,1]."""
        edit = self.relight(*self.job, light, scalars)
        return pipeline.paste(self.portrait.image, self.small, edit)


def touched(portrait: pipeline.Portrait, small: pipeline.Portrait, edit: pipeline.Edit) -> Tensor:
    """Where paste may change the photo: its soft mask, a pixel or two wider for the enlarging."""
    size = portrait.crop.size
    mask = composite.soft_mask(edit.mask, small.crop, photo_size=(size, size))
    mask = F.interpolate(mask, (size, size), mode="bilinear") if mask.shape[-1] != size else mask
    return F.max_pool2d((mask > 0).float(), 5, 1, 2)


# ----------------------------------------------------------------------------------------- the measures


@torch.no_grad()
def on_photos(head, dataset: Dataset, picks: list[int], relit: Callable) -> list[list]:
    """Rows: measure, value. relit(portrait, lights [N,9,3]) -> Relit."""
    names = ("back", "angle", "asked", "got", "drift", "outside", "far")
    found: dict[str, list[Tensor]] = {k: [] for k in names}
    for i in tqdm(picks, desc="photos", unit="photo"):
        portrait = portrait_of(dataset, i)
        image, code = portrait.image, portrait.code
        lights = lights_at(head, code.light, ASKED)
        out = relit(portrait, lights)
        again = landmark_fit.fit_appearance(head, code.expand(len(lights)), out.result).light
        asked, got, before = (
            sh.luminance(v)[:, 1:4] / sh.luminance(v)[:, :1] for v in (lights, again, code.light)
        )
        moved = F.cosine_similarity(asked - before, got - before).clamp(-1, 1)
        change = (out.result - image).abs().amax(1, keepdim=True)
        away = 1 - F.max_pool2d(buffers.render(head, code).mask, 25, 1, 12)
        far = (change * away).sum((1, 2, 3)) / away.sum().clamp_min(1) * 255
        values = (
            torch.tensor([out.back]),
            torch.rad2deg(torch.acos(moved)),
            asked,
            got,
            drift(image, out.result),
            (change * (1 - out.touched)).amax((1, 2, 3)) * 255,
            far,
        )
        for name, value in zip(names, values, strict=True):
            found[name].append(value)
    return _rows({k: torch.cat(v) for k, v in found.items()})


def _rows(found: dict[str, Tensor]) -> list[list]:
    both = torch.stack([found["asked"], found["got"]])
    r = [float(torch.corrcoef(both[:, :, k])[0, 1]) for k in range(3)]
    mean = {k: float(found[k].nanmean()) for k in ("back", "angle", "drift", "far")}
    return [
        ["reconstruction of the unedited photo by the denoiser, dB", mean["back"]],
        ["angle between the light's asked and measured change, degrees", mean["angle"]],
        ["correlation of asked and measured light: x (left-right)", r[0]],
        ["correlation of asked and measured light: y (up-down)", r[1]],
        ["correlation of asked and measured light: z (front)", r[2]],
        ["drift of the inner landmarks, % of the eye distance", mean["drift"]],
        ["mean change more than 12 px outside the head, of 255", mean["far"]],
        ["largest change of the background outside the mask, of 255", float(found["outside"].max())],
    ]


def scalar_range(judge, dataset: Dataset, size: int, n: int = STRENGTHS, batch: int = 32) -> Tensor:
    """n shadow scalars [n,1], evenly from the 5 % to the 95 % quantile of the dataset's photos."""
    picks = list(range(len(dataset)))
    parts = [dataset.images(picks[i : i + batch], size).float() / 255 for i in range(0, len(picks), batch)]
    scalars = torch.cat([shadow.scalar(judge, p) for p in parts]).flatten()
    low, high = scalars.quantile(scalars.new_tensor([0.05, 0.95]))
    return torch.lerp(low, high, torch.linspace(0, 1, n))[:, None]


def in_shadow(head, code, light: Tensor) -> tuple[Tensor, Tensor]:
    """Of the head: what faces the light but lies in cast shadow, and what the light reaches, [1,1,H,W]."""
    drawn = conditions.draw(head, code)
    visible = conditions.visibility(head, code, light=light, drawn=drawn)
    facing = (drawn.normal * sh.direction(light)[:, :, None, None]).sum(1, keepdim=True) > 0.2
    facing = facing & (drawn.mask > 0)
    return (facing & (visible < 0.5)).float(), (facing & (visible > 0.9)).float()


@torch.no_grad()
def shadow_response(
    tools: Tools, dataset: Dataset, picks: list[int], scalars: Tensor, trust: float = 0.0
) -> list[list]:
    """Rows: how pictures answer to the shadow scalar [K,1] under a light from one side."""
    covered, lit, monotone = [], [], []
    for k, i in enumerate(tqdm(picks, desc="shadows", unit="photo")):
        portrait = portrait_of(dataset, i)
        light = lights_at(tools.head, portrait.code.light, [(-50.0, 30.0) if k % 2 else (50.0, 30.0)])
        inside, open_ = in_shadow(tools.head, portrait.code, light)
        if inside.mean() < LEAST:
            continue
        result = Relighter(tools, portrait, trust).shadowed(light, scalars)
        values = brightness(result, inside)
        covered.append(response(scalars, values))
        lit.append(response(scalars, brightness(result, open_)))
        monotone.append(float(falling(values)))
    if not covered:
        raise ValueError("none of the photos has a cast shadow under a light from the side: take more photos")
    ends = f"scalar {float(scalars[0]):.2f} to {float(scalars[-1]):.2f}"
    return [
        [f"luminance where the light is blocked, {ends}, %", sum(covered) / len(covered)],
        [f"luminance where the light arrives, {ends}, %", sum(lit) / len(lit)],
        [f"share that darkens at each of {len(scalars) - 1} steps", sum(monotone) / len(monotone)],
        ["photos with a cast shadow, of those tried", f"{len(covered)} of {len(picks)}"],
    ]


# ------------------------------------------------------------------------------------------- the sheets


@torch.no_grad()
def sheets(
    tools: Tools, dataset: Dataset, picks: list[int], scalars: Tensor, trust: float = 0.0
) -> tuple[Tensor, Tensor]:
    """[3,H,W] each, a photo a row: as it is and under the lights SHOWN; as it is and with the scalars."""
    lights, shadows = [], []
    for k, i in enumerate(tqdm(picks, desc="sheets", unit="photo")):
        portrait = portrait_of(dataset, i)
        relighter, own = Relighter(tools, portrait, trust), portrait.code.light
        side = lights_at(tools.head, own, [(-50.0, 30.0) if k % 2 else (50.0, 30.0)])
        for rows, out in (
            (lights, relighter.under(lights_at(tools.head, own, SHOWN)).result),
            (shadows, relighter.shadowed(side, scalars)),
        ):
            rows.append(torch.cat([portrait.image[0], *out], 2))
    return torch.cat(lights, 1), torch.cat(shadows, 1)
