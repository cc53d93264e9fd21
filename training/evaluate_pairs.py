"""Relighting against the truth: synthetic persons never trained on, each under two lights.

A pair is one scene rendered twice, only the lamps differ. Every method makes of the first picture what it
can under the light of the second, and the second is what it should have been.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from rig_core import align, buffers, pipeline
from rig_core.estimators import landmark_fit, landmarks, shadow
from rig_core.face import FaceCode
from rig_core.ratio import ratio_image
from training import synth
from training.measures import psnr, skin_error, ssim

FIRST_SEED = 900_000  # of the held-out synthetic persons; training counts from 0
GUIDANCES = (1.5, 2.0)
TRUST = 0.5  # see pipeline.relight
HEADER = ["method", "PSNR skin, dB", "PSNR head, dB", "PSNR all, dB", "SSIM head", "skin tone, degrees"]


@dataclass(frozen=True)
class Tools:
    """The networks and the head that the methods take: DiffusionRig, DiFaReli and its two estimators."""

    head: object
    rig: torch.nn.Module | None
    relight: torch.nn.Module
    recognise: torch.nn.Module
    judge: torch.nn.Module

    @property
    def size(self) -> int:
        """Side of the pictures to compare in: that of the larger denoiser."""
        return max(self.rig.config.image_size, self.relight.config.image_size)


@dataclass(frozen=True)
class Pair:
    """A portrait and the same under another light: images [1,3,s,s], skin and head masks [1,1,s,s], codes."""

    source: pipeline.Portrait
    truth: Tensor
    target: FaceCode
    skin: Tensor
    head: Tensor


def pairs(count: int, size: int, head=None) -> list[Pair]:
    """Held-out synthetic pairs. head: with it, codes are fitted to the two pictures, as a user has them;
    without it they are the true ones."""
    out = []
    for seed in tqdm(range(FIRST_SEED, FIRST_SEED + count), desc="render", unit="pair"):
        a = synth.render([seed], size)
        b = synth.render([seed], size, light=[seed + 500_000])
        whole = align.Crop(torch.eye(3)[None], size)
        source, target = a.code, b.code
        if head is not None:
            source, other = fitted(head, a.image, a.landmarks), fitted(head, b.image, b.landmarks)
            target = source.replace(light=other.light)
        portrait = pipeline.Portrait(a.image, whole, source)
        out.append(Pair(portrait, b.image, target, a.skin, ((a.head + a.hair) > 0.5).float()))
    return out


def fitted(head, image: Tensor, points: Tensor) -> FaceCode:
    """The code of a picture from the landmarks found in it; from the true points where no face is found."""
    try:
        boxes, _ = landmarks.find_faces(image)
        points = landmarks.find_landmarks(image, boxes[:1])
    except landmarks.NoFaceError:
        pass
    return landmark_fit.fit(head, points, tuple(image.shape[2:]), image)


def at_size(portrait: pipeline.Portrait, size: int) -> pipeline.Portrait:
    """A portrait that is a whole picture, as a denoiser of `size` takes it; its crop leads back to it."""
    if portrait.crop.size == size:
        return portrait
    crop = portrait.crop.resized(size)
    return pipeline.Portrait(
        crop.apply(portrait.image).clamp(0, 1), crop, portrait.code.resized((size, size))
    )


def enlarged(image: Tensor, size: int) -> Tensor:
    """A painted picture [B,3,s,s] at the size of the comparison."""
    if image.shape[-1] == size:
        return image
    return F.interpolate(image, (size, size), mode="bicubic", antialias=True).clamp(0, 1)


# ------------------------------------------------------------------------------------------ the methods


def baselines(pair: Pair, tools: Tools) -> dict[str, Tensor]:
    """What needs no network."""
    head, image = tools.head, pair.source.image
    old, new = buffers.render(head, pair.source.code), buffers.render(head, pair.target)
    # Shashua and Riklin-Raviv 2001, in display space
    gain = new.shading.clamp_min(0.02) / old.shading.clamp_min(0.1)
    return {
        "source unchanged": image,
        "Lambertian render": torch.lerp(image, new.rendered.clamp(0, 1), new.mask),
        "ratio image": (image * torch.where(old.mask > 0, gain, 1)).clamp(0, 1),
    }


def by_rig(pair: Pair, tools: Tools) -> dict[str, Tensor]:
    """DiffusionRig from random noise, as in its paper, and this pack's edit of the inverted photo."""
    size, model = tools.rig.config.image_size, tools.rig
    portrait, goal = at_size(pair.source, size), pair.target.resized((size, size))
    noise = pipeline.paint(model, tools.head, portrait, goal, keep=False)
    edit = pipeline.paint(model, tools.head, portrait, goal)
    return {
        "DiffusionRig from noise": enlarged(noise.image, len(pair.truth[0, 0])),
        "DiffusionRig, inverted": enlarged(edit.image, len(pair.truth[0, 0])),
        "DiffusionRig": pipeline.paste(pair.source.image, portrait, edit),
    }


def by_relight(pair: Pair, tools: Tools) -> dict[str, Tensor]:
    """DiFaReli from the inverted photo, and with each option, all but one from one inversion; and the ratio
    image that `trust` blends in."""
    model, head, image = tools.relight, tools.head, pair.source.image
    portrait, light = at_size(pair.source, model.config.image_size), pair.target.light
    subject = pipeline.describe(head, portrait, tools.recognise, tools.judge)
    true_scalar = shadow.scalar(
        tools.judge, at_size(replace(pair.source, image=pair.truth), len(portrait.image[0, 0])).image
    )
    job = (model, head, portrait, subject)
    noise = pipeline.to_noise(*job)
    edit = pipeline.relight(*job, light, torch.cat([subject.shadow, true_scalar]), noise)
    pasted = pipeline.paste(image, portrait, edit)
    out = {
        "DiFaReli, as painted": enlarged(edit.image[:1], len(image[0, 0])),
        "DiFaReli": pasted[:1],
        "DiFaReli, the truth's shadow scalar": pasted[1:],
    }
    for g in GUIDANCES:
        edit = pipeline.relight(*job, light, noise=noise, guidance=g)
        out[f"DiFaReli, guidance {g:g}"] = pipeline.paste(image, portrait, edit)
    edit = pipeline.relight(*job, light, noise=pipeline.to_noise(*job, cast=False), cast=False)
    out["DiFaReli, no cast-shadow map"] = pipeline.paste(image, portrait, edit)
    known = ratio_image(head, portrait.image, portrait.code, light, subject.matte)
    edit = pipeline.relight(*job, light, noise=noise, trust=TRUST)
    return out | {
        "ratio image, with the hair": pipeline.paste(image, portrait, replace(edit, image=known)),
        f"DiFaReli, trust {TRUST:g} in the ratio image": pipeline.paste(image, portrait, edit),
    }


METHODS = (baselines, by_rig, by_relight)


# ----------------------------------------------------------------------------------------- the comparison


def score(out: Tensor, pair: Pair) -> list[float]:
    """PSNR of skin, of head and of all, SSIM of head, error of the skin tone."""
    return [
        psnr(out, pair.truth, pair.skin),
        psnr(out, pair.truth, pair.head),
        psnr(out, pair.truth),
        ssim(out, pair.truth, pair.head),
        skin_error(out, pair.truth, pair.skin),
    ]


@torch.no_grad()
def against_truth(
    tools: Tools, held_out: list[Pair], methods=METHODS, shown: int = 8
) -> tuple[list[list], Tensor]:
    """Rows of HEADER, means over the pairs; and a sheet [3,H,W] of the first ones, a column each: source,
    truth, then the methods in the rows' order."""
    scores: dict[str, list] = {}
    columns = []
    for pair in tqdm(held_out, desc="methods", unit="pair"):
        outs = {k: v for method in methods for k, v in method(pair, tools).items()}
        for name, out in outs.items():
            scores.setdefault(name, []).append(score(out, pair))
        if len(columns) < shown:
            rest = [v[0] for k, v in outs.items() if k != "source unchanged"]
            columns.append(torch.cat([pair.source.image[0], pair.truth[0], *rest], 1))
    rows = [[name, *torch.tensor(s).mean(0).tolist()] for name, s in scores.items()]
    return rows, torch.cat(columns, 2)
