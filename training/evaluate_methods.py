"""The pack's methods on pairs of pictures, written as folders: `python -m training.evaluate methods`.

A pair is a source and a target of one person: the same scene under another light, or in another pose and with
another expression. Light, pose and expression are read off the target, every method brings them into the
source, and training/evaluate_folders.py compares what comes out with the target. Pairs are photos, as those
of Multi-PIE (two folders, files of one stem), or synthetic persons never trained on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from rig_core import align, checkpoints, pipeline
from rig_core.estimators.landmarks import NoFaceError
from rig_core.face import FaceCode
from rig_core.heads import FaceModel, HeadModel
from training import evaluate_folders as folders
from training import reinfer, synth
from training.demo import write
from training.evaluate_pairs import FIRST_SEED, TRUST, Pair, at_size, baselines, by_rig

EDITS = ("light", "pose")  # pose: with the expression


@dataclass(frozen=True)
class Models:
    """What the methods take: a head with its encoder, the denoisers that know it, and the estimators."""

    face: FaceModel
    rig: torch.nn.Module | None
    relight: torch.nn.Module | None
    recognise: torch.nn.Module
    judge: torch.nn.Module
    parser: torch.nn.Module | None = None

    @property
    def head(self) -> HeadModel:
        return self.face.head

    @property
    def size(self) -> int:
        """Side of the pictures to compare in: that of the larger denoiser."""
        return max(m.config.image_size for m in (self.rig, self.relight) if m is not None)


def load(
    face: Path | None = None,
    rig: Path | None = None,
    relight: Path | None = None,
    identity: Path | None = None,
    shadow: Path | None = None,
    parser: Path | None = None,
) -> tuple[Models, list[str]]:
    """The models, the pack's own where no file is named, and a line about each denoiser.

    A denoiser that was trained with another head than `face` is left out. Raises ValueError when both were.
    """
    model = checkpoints.load_face_model(face)
    denoisers, lines = [], []
    for name, (net, meta) in (
        ("DiffusionRig", checkpoints.load_rig(rig)),
        ("DiFaReli", checkpoints.load_relight(relight)),
    ):
        head = meta.get("head", "open")
        fits = head == model.head.name
        denoisers.append(net if fits else None)
        what = f"step {meta.get('step', '?')}, {net.config.image_size} px"
        lines.append(
            f"{name}: {what}." if fits else f"{name} is left out: it was trained with the {head} head."
        )
    if denoisers == [None, None]:
        raise ValueError(f"no denoiser for the {model.head.name} head: name FLAME's folder, or other files")
    estimators = checkpoints.load_identity(identity), checkpoints.load_shadow(shadow)
    return Models(model, *denoisers, *estimators, checkpoints.load_parser(parser) if parser else None), lines


def pair(source: pipeline.Portrait, truth: Tensor, target: FaceCode) -> Pair:
    """A pair that is compared everywhere."""
    everywhere = torch.ones_like(truth[:, :1])
    return Pair(source, truth, target, everywhere, everywhere)


def wanted(source: FaceCode, other: FaceCode, edit: str) -> FaceCode:
    """The source's person as in the other picture: under its light, or in its pose, place and expression."""
    if edit == "light":
        return source.replace(light=other.light)
    return other.replace(shape=source.shape, tex=source.tex, light=source.light)


def synthetic(count: int, size: int, face: FaceModel, edit: str) -> Iterator[tuple[str, Pair]]:
    """Synthetic pairs by name, codes estimated from the pictures as a user has them."""
    for seed in range(FIRST_SEED, FIRST_SEED + count):
        a, b = synth.render([seed], size), synth.render([seed], size, **{edit: [seed + 500_000]})
        codes = []
        for x in (a, b):
            try:
                points = reinfer.find(x.image)
            except NoFaceError:
                points = x.landmarks
            codes.append(reinfer.reinfer(face.head, x.image, points, face.encoder))
        portrait = pipeline.Portrait(a.image, whole(size), codes[0])
        yield f"synthetic-{seed}", pair(portrait, b.image, wanted(*codes, edit))


def photos(folder: Path, size: int, face: FaceModel, edit: str) -> Iterator[tuple[str, Pair | str]]:
    """The pairs below source/ and target/ by name, or why one cannot be used.

    Light pairs are of one camera and a face that keeps still: both are cropped by the source's landmarks.
    """
    files = {k: folders.pictures(folder / k) for k in ("source", "target")}
    both, _ = folders.match(files)
    for stem in sorted(files["source"].keys() | files["target"].keys()):
        if stem not in both:
            yield stem, "only one of source and target is there"
            continue
        before, after = (folders.read(files[k][stem]) for k in ("source", "target"))
        try:
            cut = pipeline.estimate(face.head, before, size, encoder=face.encoder)
            if edit == "light":
                if before.shape != after.shape:
                    yield stem, "source and target have different sizes"
                    continue
                truth = cut.crop.apply(after).clamp(0, 1)
                goal = reinfer.reinfer(face.head, truth, reinfer.find(truth), face.encoder)
            else:
                other = pipeline.estimate(face.head, after, size, encoder=face.encoder)
                truth, goal = other.image.clamp(0, 1), other.code
        except NoFaceError:
            yield stem, "no face found"
            continue
        portrait = pipeline.Portrait(cut.image.clamp(0, 1), whole(size), cut.code)
        yield stem, pair(portrait, truth, wanted(cut.code, goal, edit))


def whole(size: int) -> align.Crop:
    """The crop that is the picture itself."""
    return align.Crop(torch.eye(3)[None], size)


def ratio(pair: Pair, models: Models) -> dict[str, Tensor]:
    """The ratio image of the two shadings, which needs no network."""
    return {"ratio image": baselines(pair, models)["ratio image"]}


def rig(pair: Pair, models: Models) -> dict[str, Tensor]:
    """DiffusionRig from random noise, as in its paper, and this pack's edit of the inverted photo."""
    outs = by_rig(pair, models)
    return {k: outs[k] for k in ("DiffusionRig from noise", "DiffusionRig")}


def relight(pair: Pair, models: Models) -> dict[str, Tensor]:
    """DiFaReli as published, and with the ratio image blended in."""
    model, image = models.relight, pair.source.image
    portrait = at_size(pair.source, model.config.image_size)
    subject = pipeline.describe(models.head, portrait, models.recognise, models.judge, models.parser)
    job = (model, models.head, portrait, subject)
    noise, out = pipeline.to_noise(*job), {}
    for name, trust in (("DiFaReli", 0.0), (f"DiFaReli trust {TRUST:g}", TRUST)):
        edit = pipeline.relight(*job, pair.target.light, noise=noise, trust=trust)
        out[name] = pipeline.paste(image, portrait, edit)
    return out


def methods(models: Models, edit: str) -> list[Callable[[Pair, Models], dict[str, Tensor]]]:
    """Those that can do an edit."""
    painters = [] if models.rig is None else [rig]
    if edit == "pose":
        return painters
    return [ratio, *painters, *([] if models.relight is None else [relight])]


@torch.no_grad()
def run(
    models: Models, pairs: Iterator[tuple[str, Pair | str]], out: Path, methods
) -> tuple[dict[str, Path], list[str]]:
    """Write out/source, out/truth and a folder of each method's pictures, a file a pair.

    Returns the methods' folders by name, and a line about each pair that could not be used. Raises ValueError
    when none could, and when out holds the pictures of another run.
    """
    if (out / "truth").exists():
        raise ValueError(
            f"{out} holds the pictures of another run: compare them as folders, or name a new one"
        )
    made, lines = {}, []
    for stem, found in tqdm(pairs, desc="methods", unit="pair"):
        if isinstance(found, str):
            lines.append(f"{stem}: {found}")
            continue
        outs = {k: v for method in methods for k, v in method(found, models).items()}
        made |= {name: out / name for name in outs}
        for name, image in {"source": found.source.image, "truth": found.truth, **outs}.items():
            (out / name).mkdir(parents=True, exist_ok=True)
            write(image[0], out / name / f"{stem}.png")
    if not made:
        raise ValueError(f"no pair could be used ({folders.some(lines) or 'there are none'})")
    return made, lines
