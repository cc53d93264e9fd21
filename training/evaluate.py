"""How good is a DiffusionRig checkpoint? `python -m training.evaluate --photos DATASET --out FILE.md`.

Two questions, one table each. Against the truth: synthetic persons never trained on, each under two
lights, everything else the same; the true second picture is compared with what each method makes of the
first. On real photos of a dataset's "val" split, where no truth exists: does the picture come back
unchanged, does the light go where it is asked to, do the features stay in place?
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from rig_core import align, buffers, checkpoints, light_prior, pipeline, sh
from rig_core.data import Dataset
from rig_core.estimators import landmark_fit, landmarks
from rig_core.face import FaceCode
from training import synth

FIRST_SEED = 900_000  # of the held-out synthetic persons; training counts from 0
ASKED = (
    (-60.0, 10.0),
    (60.0, 10.0),
    (0.0, 55.0),
    (35.0, -25.0),
)  # azimuth, elevation of the lights on photos


@dataclass(frozen=True)
class Pair:
    """A portrait and the same under another light: images [1,3,s,s], skin and head masks [1,1,s,s], codes."""

    source: pipeline.Portrait
    truth: Tensor
    target: FaceCode
    skin: Tensor
    head: Tensor


def pairs(count: int, size: int) -> list[Pair]:
    """Held-out synthetic pairs: person, pose, backdrop and camera the same, the lamps different."""
    out = []
    for i in range(count):
        seed = FIRST_SEED + i
        a = synth.render([seed], size)
        b = synth.render([seed], size, light=[seed + 500_000])
        whole = align.Crop(torch.eye(3)[None], size)
        portrait = pipeline.Portrait(a.image, whole, a.code)
        out.append(Pair(portrait, b.image, b.code, a.skin, ((a.head + a.hair) > 0.5).float()))
    return out


# ------------------------------------------------------------------------------------------ the methods


def unchanged(pair: Pair, *_) -> Tensor:
    """The source picture itself."""
    return pair.source.image


def lambertian(pair: Pair, rig, head) -> Tensor:
    """The rendered buffer pasted over the photo."""
    b = buffers.render(head, pair.target)
    return torch.lerp(pair.source.image, b.rendered.clamp(0, 1), b.mask)


def ratio_image(pair: Pair, rig, head) -> Tensor:
    """The photo times new over old shading on the head (Shashua and Riklin-Raviv 2001), in display space."""
    old, new = buffers.render(head, pair.source.code), buffers.render(head, pair.target)
    gain = new.shading.clamp_min(0.02) / old.shading.clamp_min(0.1)
    return (pair.source.image * torch.where(old.mask > 0, gain, 1)).clamp(0, 1)


def diffusion_rig(pair: Pair, rig, head) -> Tensor:
    """This pack's edit: inversion, the same noise under the new light, the gain carried to the photo."""
    edit = pipeline.paint(rig, head, pair.source, pair.target)
    return pipeline.paste(pair.source.image, pair.source, edit)


def painted(pair: Pair, rig, head) -> Tensor:
    """The denoiser's own picture, without the photo's detail put back."""
    return pipeline.paint(rig, head, pair.source, pair.target).image


def from_noise(pair: Pair, rig, head) -> Tensor:
    """The paper's procedure: from random noise, without inversion."""
    return pipeline.paint(rig, head, pair.source, pair.target, keep=False).image


METHODS = {
    "source unchanged": unchanged,
    "Lambertian render": lambertian,
    "ratio image": ratio_image,
    "DiffusionRig from noise": from_noise,
    "DiffusionRig, inverted": painted,
    "DiffusionRig, inverted, gain on the photo": diffusion_rig,
}

# ------------------------------------------------------------------------------------------ the measures


def psnr(a: Tensor, b: Tensor, mask: Tensor | None = None) -> float:
    """dB of pictures in 0..1, over a mask [1,1,H,W] where given."""
    error = (a - b).square().mean(1, keepdim=True)
    mse = error.mean() if mask is None else (error * mask).sum() / mask.sum().clamp_min(1)
    return float(-10 * torch.log10(mse.clamp_min(1e-10)))


def ssim(a: Tensor, b: Tensor, mask: Tensor) -> float:
    """Mean structural similarity over a mask (Wang et al. 2004, 11 px window)."""
    from kornia.metrics import ssim as ssim_map

    m = ssim_map(a, b, 11).mean(1, keepdim=True)
    return float((m * mask).sum() / mask.sum().clamp_min(1))


def against_truth(rig, head, count: int, methods=METHODS) -> list[list]:
    """Rows: method, PSNR of skin, PSNR of head, PSNR of all, SSIM of head; means over the pairs."""
    rows = []
    held_out = pairs(count, rig.config.image_size)
    for name, method in methods.items():
        scores = []
        for pair in tqdm(held_out, desc=f"{name:>42}", unit="pair"):
            out = method(pair, rig, head)
            scores.append(
                [
                    psnr(out, pair.truth, pair.skin),
                    psnr(out, pair.truth, pair.head),
                    psnr(out, pair.truth),
                    ssim(out, pair.truth, pair.head),
                ]
            )
        rows.append([name, *torch.tensor(scores).mean(0).tolist()])
    return rows


def on_photos(rig, head, dataset: Dataset, count: int) -> list[list]:
    """Rows: measure, value, of real photos without a relit truth. dataset: the val split."""
    picks = torch.linspace(0, len(dataset) - 1, min(count, len(dataset))).long().tolist()
    size = rig.config.image_size
    found: dict[str, list[Tensor]] = {k: [] for k in ("back", "angle", "asked", "got", "drift", "outside")}
    for i in tqdm(picks, desc="photos", unit="photo"):
        image = dataset.images([i], size).float() / 255
        code = dataset.codes([i]).resized((size, size))
        portrait = pipeline.Portrait(image, align.Crop(torch.eye(3)[None], size), code)
        az, el = torch.tensor(ASKED).unbind(1)
        lights = code.light.expand(len(ASKED), -1, -1)
        lights = light_prior.edit(lights, az, el, mean=head.light_mean, std=head.light_std)
        edit = pipeline.paint(rig, head, portrait, code.expand(len(ASKED)).replace(light=lights))
        result = pipeline.paste(image, portrait, edit)
        found["back"].append(torch.tensor([psnr(edit.before, image)]))
        again = landmark_fit.fit_appearance(head, code.expand(len(ASKED)), result).light
        asked, got = (sh.luminance(v)[:, 1:4] / sh.luminance(v)[:, :1] for v in (lights, again))
        before = sh.luminance(code.light)[:, 1:4] / sh.luminance(code.light)[:, :1]
        moved = F.cosine_similarity(asked - before, got - before).clamp(-1, 1)
        found["angle"].append(torch.rad2deg(torch.acos(moved)))
        found["asked"].append(asked)
        found["got"].append(got)
        found["drift"].append(drift(image, result))
        away = 1 - F.max_pool2d(buffers.render(head, code).mask, 25, 1, 12)
        change = ((result - image).abs().mean(1, keepdim=True) * away).sum((1, 2, 3)) / away.sum().clamp_min(
            1
        )
        found["outside"].append(change * 255)
    both = torch.stack([torch.cat(found["asked"]), torch.cat(found["got"])])
    r = [float(torch.corrcoef(both[:, :, k])[0, 1]) for k in range(3)]
    mean = {k: float(torch.cat(found[k]).nanmean()) for k in ("back", "angle", "drift", "outside")}
    return [
        ["reconstruction of the unedited photo by the denoiser, dB", mean["back"]],
        ["angle between the light's asked and measured change, degrees", mean["angle"]],
        ["correlation of asked and measured light: x (left-right)", r[0]],
        ["correlation of asked and measured light: y (up-down)", r[1]],
        ["correlation of asked and measured light: z (front)", r[2]],
        ["drift of the inner landmarks, % of the eye distance", mean["drift"]],
        ["change more than 12 px outside the head, of 255", mean["outside"]],
    ]


def drift(before: Tensor, after: Tensor) -> Tensor:
    """Mean move of the 51 inner landmarks, % of the eye distance, [B]; NaN where no face is found."""
    box = landmarks.find_faces(before)[0][:1]
    if not len(box):
        return torch.full((len(after),), torch.nan)
    a = landmarks.find_landmarks(before, box)[:, 17:]
    b = torch.cat([landmarks.find_landmarks(x[None], box)[:, 17:] for x in after])
    eyes = (a[:, 19:25].mean(1) - a[:, 25:31].mean(1)).norm(dim=-1)
    return (b - a).norm(dim=-1).mean(1) / eyes * 100


# ------------------------------------------------------------------------------------------ on paper


def table(header: list[str], rows: list[list]) -> str:
    """A Markdown table; numbers to two or three digits."""

    def cell(v) -> str:
        return v if isinstance(v, str) else f"{v:.3f}" if abs(v) < 1 else f"{v:.2f}"

    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(map(cell, row)) + " |" for row in lines)


def sheet(rig, head, count: int, path: Path) -> None:
    """A picture of the first pairs: source, target, and what each method makes of it."""
    from training.demo import write

    columns = []
    for pair in pairs(count, rig.config.image_size):
        outs = [m(pair, rig, head)[0] for m in METHODS.values()]
        columns.append(torch.cat([pair.source.image[0], pair.truth[0], *outs[1:]], 1))
    write(torch.cat(columns, 2), path)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rig", type=Path, help="DiffusionRig checkpoint; the embedded default without it")
    parser.add_argument("--photos", type=Path, help="dataset folder (training.prepare) with a val split")
    parser.add_argument("--pairs", type=int, default=24, help="held-out synthetic pairs")
    parser.add_argument("--count", type=int, default=24, help="validation photos")
    parser.add_argument("--out", type=Path, help="Markdown file to write; the picture goes beside it")
    args = parser.parse_args()
    head = checkpoints.load_head()
    rig, meta = checkpoints.load_rig(args.rig)
    text = [f"Checkpoint: step {meta.get('step', '?')}, {rig.config.image_size} px.", ""]
    header = ["method", "PSNR skin, dB", "PSNR head, dB", "PSNR all, dB", "SSIM head"]
    text += [f"{args.pairs} held-out synthetic pairs, against the true relit picture:", ""]
    text += [table(header, against_truth(rig, head, args.pairs)), ""]
    if args.photos:
        dataset = Dataset.open(args.photos).select("val")
        text += [f"{min(args.count, len(dataset))} validation photos, {len(ASKED)} lights each:", ""]
        text += [table(["measure", "mean"], on_photos(rig, head, dataset, args.count)), ""]
    print("\n".join(text))
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text("\n".join(text))
        sheet(rig, head, 8, args.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
