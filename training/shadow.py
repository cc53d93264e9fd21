"""Train and measure the small estimator of cast shadows: `python -m training.estimators shadow --out FILE`.

What it learns: the share of all light on the seen facial skin that is lost to cast shadows (`SynthBatch.dim`
of training/synth.py: luminance, before exposure; attached shadows, where a surface turns away from its lamp,
do not count). Every scene is rendered twice, with the lamps' shadows and without, so that the network has
to find what shadows look like and not what lights and faces they come with.
"""

from __future__ import annotations

import math
from pathlib import Path

import torch
from torch import Tensor

from training import synth, synth_light, synth_scene

SIZE = 128
HELD_OUT = 10**6  # seeds from here on are kept for measuring: other persons, lights, poses, places


def hard_light(seed: int, choices: int = 4) -> int:
    """The seed of a light: for odd seeds the least diffuse of several, or strong shadows would be rare."""
    if seed % 2 == 0:
        return seed

    def lamps(light: int) -> float:
        power = synth_scene.sample_light(light)["colour"].sum(1)
        return float(power[: synth_light.AREA].sum() / power.sum())

    return max(range(seed * choices, (seed + 1) * choices), key=lamps)


def pairs(seeds) -> tuple[Tensor, Tensor]:
    """Portraits with cast shadows and the same without: uint8 [N,2,3,128,128]; dim [N] of the first."""
    images, dims = [], []
    for seed in seeds:
        light = [hard_light(seed)]
        shown = synth.render([seed], SIZE, light=light)
        bare = synth.render([seed], SIZE, light=light, shadows=False)
        images.append((torch.cat([shown.image, bare.image]) * 255).round().to(torch.uint8))
        dims.append(shown.dim)
    return torch.stack(images), torch.cat(dims)
