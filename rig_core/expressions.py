"""The sliders of Edit Face: what each does, and the head's named shapes that it is made of."""

from __future__ import annotations

from collections.abc import Collection, Mapping

# slider -> what it does, the head's named shapes and their weights at 1
EXPRESSIONS = {
    "smile": (
        "Corners of the mouth up",
        {"mouthSmile_L": 1.0, "mouthSmile_R": 1.0, "cheekSquint_L": 0.4, "cheekSquint_R": 0.4},
    ),
    "frown": ("Corners of the mouth down", {"mouthFrown_L": 1.0, "mouthFrown_R": 1.0}),
    "raise_brows": (
        "Brows up",
        {"browInnerUp_L": 1.0, "browInnerUp_R": 1.0, "browOuterUp_L": 1.0, "browOuterUp_R": 1.0},
    ),
    "lower_brows": ("Brows down and together", {"browDown_L": 1.0, "browDown_R": 1.0}),
    "blink": ("Upper lids closed", {"eyeBlink_L": 1.0, "eyeBlink_R": 1.0}),
    "squint": ("Eyes narrowed", {"eyeSquint_L": 1.0, "eyeSquint_R": 1.0}),
    "wide_eyes": ("Eyes wide open", {"eyeWide_L": 1.0, "eyeWide_R": 1.0}),
    "pucker": ("Lips as for a kiss", {"mouthPucker": 1.0}),
    "puff_cheeks": ("Cheeks blown up", {"cheekPuff_L": 1.0, "cheekPuff_R": 1.0}),
    "sneer": ("Nose wrinkled", {"noseSneer_L": 1.0, "noseSneer_R": 1.0}),
}


def shapes(names: Collection[str], sliders: Mapping[str, float]) -> dict[str, float]:
    """Weights of the head's shapes for amounts of the sliders, added up; those at 0 ask for none.

    names: the shapes that the head has. Raises ValueError, naming the slider, where it lacks one.
    """
    weights: dict[str, float] = {}
    for slider, amount in sliders.items():
        for name, weight in EXPRESSIONS[slider][1].items() if amount else ():
            if name not in names:
                raise ValueError(
                    f"'{slider}' needs the shape {name}, which this head does not have: leave it at 0"
                )
            weights[name] = weights.get(name, 0.0) + weight * amount
    return weights
