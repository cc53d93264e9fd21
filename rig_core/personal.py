"""A model of one person: DiffusionRig's stage 2 (Ding et al. 2023, section 3.3).

The denoiser of a general model learns one album. The encoder of global codes stays as it is, so the codes
and the buffers of the album are computed once, and a step costs the denoiser alone. All photos share the
album's mean shape: the shape fitted to a single photo is uncertain, and whoever edits the next photo has no
better one.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from . import buffers, checkpoints, data, distributed, files, light_prior, lora, pipeline, train
from .align import Crop
from .denoisers.rig import DiffusionRig
from .face import FaceCode

SMALL_STEPS, SMALL_LR = 600, 3e-4
LIGHTS = ((-65.0, 10.0), (65.0, 10.0), (0.0, 60.0), (0.0, -30.0))  # azimuth, elevation of a sample sheet


@dataclass(frozen=True)
class Recipe:
    """How a personal model is made, beside what train.Config says.

    batch: photos a step. rank: of low-rank adapters (see lora), 0 trains the whole denoiser. mean_shape: one
    shape for the whole album. others: the global code of a photo is taken from another one of the album, as
    by bases that learned it so (train.rig_inputs); the published ones saw the photo itself.
    """

    batch: int = 4
    rank: int = 0
    mean_shape: bool = True
    others: bool = True


def with_shape(head, code: FaceCode, shape: Tensor | None) -> FaceCode:
    """The faces with a personal model's mean shape [1,S], their centres kept; unchanged without one."""
    if shape is None:
        return code
    shared = shape.to(code.shape).expand(len(code), -1)
    return pipeline.recentre(head, code, code.replace(shape=shared))


def check_head(head, meta: dict) -> None:
    """Raise ValueError unless a base, by what its file says, was trained with this head."""
    if head.name != meta["head"]:
        raise ValueError(
            f"the base was trained with the {meta['head']} head, the face model is the {head.name} head: "
            "take the base's own (flame: the files of DECA and FLAME; open: the pack's)"
        )


def learned_from_others(meta: dict) -> bool:
    """Whether a base, by what its file says, took global codes from other photos: our stage 1 does."""
    return "stage" in meta


def usual(rig: DiffusionRig, rank: int = 0) -> tuple[int, float]:
    """Steps and learning rate that suit a base: 5000 and 1e-5 as published for a network of its width, fewer
    and larger ones for small networks; adapters take ten times the rate (docs/personal.md)."""
    steps, lr = (5000, 1e-5) if rig.config.width >= 128 else (SMALL_STEPS, SMALL_LR)
    return steps, lr * 10 if rank else lr


def adapted(rig: DiffusionRig, config: train.Config, rank: int) -> train.Config:
    """Make a base ready for stage 2, adapters attached for a rank above 0; the config that trains it."""
    if not rank:
        return replace(config, trainable="denoisingUNet")
    lora.attach(rig.denoisingUNet, rank)
    return replace(config, trainable=lora.TRAINABLE)


@torch.no_grad()
def inputs(
    rig: DiffusionRig, head, images: Tensor, codes: FaceCode, recipe: Recipe, seed: int, device
) -> tuple[Callable, Callable]:
    """`batch` and `prepare` of train.train for an album: images [N,3,s,s] 0..1 and their N codes.

    Buffers and global codes are computed here, once.
    """
    head, rig = head.to(device), rig.to(device).eval()
    x = images.to(device) * 2 - 1
    parts = range(len(x))
    physical = torch.cat([buffers.render(head, codes[i].to(device), x.shape[-1]).stack() for i in parts])
    embedded = torch.cat([rig.encode(x[i : i + 1]) for i in parts]).float()
    sampler = data.Sampler(np.ones(len(x)), seed)
    rank, world = distributed.ranks()

    def batch(step: int) -> tuple[Tensor, Tensor]:
        n = recipe.batch * world
        picks = torch.from_numpy(sampler.take(step * n, n))
        generator = torch.Generator().manual_seed((seed * 1_000_003 + step) % 2**63)
        others = (picks + torch.randint(1, max(len(x), 2), (n,), generator=generator)) % len(x)
        own = slice(rank * recipe.batch, (rank + 1) * recipe.batch)
        return picks[own], (others if recipe.others else picks)[own]

    def prepare(chosen: tuple[Tensor, Tensor]) -> tuple[Tensor, tuple]:
        picks, codes_of = (v.to(device) for v in chosen)
        return x[picks], (physical[picks], None, embedded[codes_of])

    return batch, prepare


def fit(
    config: train.Config,
    recipe: Recipe,
    rig: DiffusionRig,
    head,
    images: Tensor,
    codes: FaceCode,
    out: str | Path,
    path: str | Path,
    device: torch.device | str = "cpu",
    resume: bool = False,
    about: dict | None = None,
    on_sample: Callable[[Tensor, int], None] | None = None,
    on_step: Callable[[int, Tensor], None] | None = None,
    stop: Callable[[], bool] = lambda: False,
) -> train.State:
    """Train, and write the personal model to `path` whenever the run in `out` is saved.

    rig: the base; it is changed. images [N,3,s,s] 0..1 of the base's size s and their codes. path: a
    .safetensors for `checkpoints.load_rig`. about: more for its metadata: the person, and for adapters
    "base", the name of the base's file. on_sample gets the picture of `sheet` [3,h,w], unless `stop()`.
    The rest, and what is raised, as in `train.train`; FileExistsError also when `path` exists and the run is
    not resumed, ValueError when it is resumed with another base.
    """
    size, path = rig.config.image_size, Path(path)
    if path.exists() and not resume:
        raise FileExistsError(f"{path} exists: take another name, or delete it")
    if tuple(images.shape[2:]) != (size, size):
        raise ValueError(f"the album's pictures are {list(images.shape[2:])}, the base works at {size} px")
    head, codes = head.to(device), codes.to(device)
    shape = codes.shape.mean(0, keepdim=True).cpu() if recipe.mean_shape else None
    codes = with_shape(head, codes, shape)
    about = {
        **(about or {}), "stage": 2, "head": head.name, "size": size, "photos": len(images),
        "lr": config.lr, "batch": recipe.batch, "rank": recipe.rank, "others": recipe.others,
        "base_mark": lora.mark(rig.denoisingUNet),
    }  # fmt: skip
    if path.exists() and files.read(path)[1].get("base_mark") != about["base_mark"]:
        raise ValueError(f"{path} was trained from another base: take that one, or another name")
    batch, prepare = inputs(rig, head, images, codes, recipe, config.seed, device)
    config = adapted(rig, config, recipe.rank)
    first = pipeline.Portrait(images[:1].to(device), Crop(torch.eye(3, device=device)[None], size), codes[0])

    def save(ema: nn.Module, step: int) -> None:
        write(path, ema, about | {"step": step} | ({} if shape is None else {"mean_shape": shape}))

    def go_on(_: dict) -> None:
        if stop():
            raise _Stopped

    def sample(ema: nn.Module, step: int) -> None:
        with suppress(_Stopped):
            on_sample(sheet(ema, head, first, go_on), step)

    return train.train(
        config, rig, out, batch, prepare, device, resume, {"recipe": vars(recipe), **about},
        on_sample=sample if on_sample else None, on_save=save, on_step=on_step, stop=stop,
    )  # fmt: skip


def write(path: Path, model: DiffusionRig, about: dict) -> None:
    """A personal model as a file: a whole denoiser, or its adapters alone where it has some."""
    if not about["rank"]:
        return checkpoints.save_denoiser(path, model, about, half=True)
    tensors = {k: v.half() for k, v in lora.tensors(model.denoisingUNet).items()}
    tensors |= {f"meta.{k}": v for k, v in about.items() if isinstance(v, Tensor)}
    plain = {k: v for k, v in about.items() if not isinstance(v, Tensor)}
    files.save(path, tensors, {**plain, "kind": checkpoints.LORA})


@torch.no_grad()
def sheet(model: DiffusionRig, head, portrait: pipeline.Portrait, callback=None) -> Tensor:
    """The photo, and what the model makes of it under four lights: [3, s, 5s] 0..1.

    callback: see samplers.sample.
    """
    own = portrait.code.light
    azimuth, elevation = torch.tensor(LIGHTS).T
    lights = light_prior.edit(
        own.expand(len(LIGHTS), -1, -1), azimuth, elevation, mean=head.light_mean, std=head.light_std
    )
    target = portrait.code.expand(len(LIGHTS)).replace(light=lights)
    # from noise a young model is much cleaner with ddpm, whose fresh noise takes its errors away
    edit = pipeline.paint(
        model, head, portrait, target, "quad50", "ddpm", keep=False, guidance=1.0, callback=callback
    )
    return torch.cat([*portrait.image, *edit.image], 2).cpu()


class _Stopped(Exception):
    """Ends the painting of a sheet that nobody waits for any more."""


@dataclass(frozen=True)
class Forecast:
    """What a run will cost. seconds: of one step; bytes: of weights, moments, gradients and activations."""

    seconds: float
    bytes: int


def forecast(config: train.Config, recipe: Recipe, rig: DiffusionRig, device: torch.device | str) -> Forecast:
    """Cost of training a base, from two trial steps; the base is of no use afterwards."""
    device, size, batch = torch.device(device), rig.config.image_size, recipe.batch
    config = adapted(rig, config, recipe.rank)
    state = train.begin(config, rig, device)
    loss = train.Loss(state.model, config)
    x_0 = torch.zeros(batch, 3, size, size, device=device)
    code = torch.zeros(batch, rig.config.latent_dim, device=device)
    given = (torch.zeros(batch, 9, size, size, device=device), None, code)
    weights = {p.untyped_storage().data_ptr() for p in state.model.parameters()}
    kept: dict[int, int] = {}

    def note(v: Tensor) -> Tensor:
        storage = v.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return v

    for _ in range(2):  # the first one warms up
        started = time.perf_counter()
        with torch.autograd.graph.saved_tensors_hooks(note, lambda v: v), train.autocast(config, device):
            values = loss(x_0, torch.zeros(batch, dtype=torch.long, device=device), x_0, given)
        values.mean().backward()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds = time.perf_counter() - started
        state.model.zero_grad(set_to_none=True)
        activations, kept = sum(kept.values()), {}
    count = sum(p.numel() for p in state.model.parameters())
    trained = sum(p.numel() for p in state.model.parameters() if p.requires_grad)
    return Forecast(seconds, 4 * (2 * count + 3 * trained) + activations)
