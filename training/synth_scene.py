"""What a synthetic portrait is made of, drawn from seeds: person, pose, light, surroundings, camera.

Each part has its own seed and its own stream of random numbers, so exchanging one seed exchanges one part.
Lengths of hair and clothes are in eye distances (about 63 mm); colours are linear RGB unless said.
"""

from __future__ import annotations

import math
import zlib
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from rig_core.face import Batch
from rig_core.heads.open_head import TEX

from .synth_light import AREA, SKY, cone, sphere


class Draw:
    """Random numbers of one seed and one stream, the same on every device and in every batch."""

    def __init__(self, seed: int, stream: str):
        self.g = torch.Generator().manual_seed(zlib.crc32(f"{stream} {seed}".encode()))

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.g)

    def uniform(self, low: float = 0.0, high: float = 1.0, n: int | None = None):
        """One float, or a tensor of n."""
        v = low + (high - low) * torch.rand(n or 1, generator=self.g)
        return v if n else v.item()

    def chance(self, p: float) -> bool:
        return self.uniform() < p

    def pick(self, **weights: float) -> str:
        """One of the names, with the given relative frequencies."""
        w = torch.tensor(list(weights.values()))
        return list(weights)[torch.multinomial(w, 1, generator=self.g).item()]

    def noise(self, channels: int, size: int, power: float = 1.0) -> Tensor:
        """Tileable 1/f^power noise [channels,size,size], zero mean, unit variance: skin, fabric, plaster."""
        f = torch.fft.fftfreq(size)
        r = (f[:, None] ** 2 + f[None] ** 2).sqrt().clamp_min(1 / size)
        x = torch.fft.ifft2(torch.fft.fft2(self.normal(channels, size, size)) / r**power).real
        return (x - x.mean((1, 2), keepdim=True)) / x.std((1, 2), keepdim=True)


def linear(srgb) -> Tensor:
    """sRGB values 0..1 -> linear light (IEC 61966-2-1)."""
    v = torch.as_tensor(srgb, dtype=torch.float32)
    return torch.where(v <= 0.04045, v / 12.92, ((v.clamp_min(0) + 0.055) / 1.055) ** 2.4)


def warmth(x: float) -> Tensor:
    """Colour of a light: x > 0 warm like a tungsten lamp, x < 0 cool like the sky; luminance about 1."""
    c = torch.tensor([math.exp(0.45 * x), 1.0, math.exp(-0.75 * x)])
    return c / (c @ torch.tensor([0.2126, 0.7152, 0.0722]))


@dataclass(frozen=True)
class Person(Batch):
    """Identity: everything that stays when pose, light and surroundings change. All [B] unless said."""

    shape: Tensor  # [B,S] of the head
    tex: Tensor  # [B,T] of the head
    female: Tensor
    age: Tensor  # 0 young .. 1 old
    oil: Tensor  # strength of the skin's highlights
    rough: Tensor  # GGX alpha of the skin
    freckles: Tensor
    blotches: Tensor
    lipstick: Tensor  # [B,4] colour, amount
    eyeshadow: Tensor  # [B,4]
    blush: Tensor
    stubble: Tensor  # darkening of the shaved area
    beard: Tensor  # [B,4] length, cheeks, moustache, chin: thickness and densities
    hair: Tensor  # [B] 1 hair, 0 bald
    hairline: Tensor  # raise of the hairline at the temples
    horseshoe: Tensor  # bare crown of male pattern baldness, 0..1
    fringe: Tensor  # how far the hair falls over the forehead
    volume: Tensor
    length: Tensor  # how far the hair hangs below the eyes; < -0.5: nothing hangs
    curl: Tensor  # 0 straight .. 1 curly
    parting: Tensor  # [B,3] pole of the strands on the scalp
    sideways: Tensor  # 1 strands circle the pole, 0 they run towards it
    hair_colour: Tensor  # [B,3] filled in from the head's albedo
    grey: Tensor  # 0..1
    dye: Tensor  # [B,4] colour, amount
    glasses: Tensor  # [B,6] worn (0/1), colour (3), width, squareness
    grain: Tensor  # [B,4,128,128] noise that belongs to the person


@dataclass(frozen=True)
class Pose(Batch):
    """Head turn and expression: turn [B,3] axis-angle, jaw [B], gaze [B,2], exp [B,E]."""

    turn: Tensor
    jaw: Tensor
    gaze: Tensor
    exp: Tensor


@dataclass(frozen=True)
class Scene(Batch):
    """Background picture [B,3,64,64] linear, clothes: kind, colours, cut."""

    background: Tensor
    cloth: Tensor  # [B,3,3] jacket, shirt, tie
    neckline: Tensor  # [B] depth of the V; 0 a closed collar
    tie: Tensor  # [B] 0/1
    collar: Tensor  # [B] 0/1 shirt collar
    weave: Tensor  # [B,1,64,64]


@dataclass(frozen=True)
class Camera(Batch):
    """Framing and what happens between the lens and the file."""

    shift: Tensor  # [B,2] of the picture's half width
    zoom: Tensor
    roll: Tensor  # radians left in the aligned picture
    exposure: Tensor  # stops
    white: Tensor  # [B,3] gains
    contrast: Tensor
    blur: Tensor  # pixels of a 128 px picture
    noise: Tensor
    jpeg: Tensor  # quantiser strength, 0 none
    sensor: Tensor  # [B] seed of the noise


def stack(cls, items: list[dict]):
    """Dictionaries of numbers and tensors -> one batch of the dataclass `cls`."""
    return cls(
        **{
            f.name: torch.stack([torch.as_tensor(i[f.name], dtype=torch.float32) for i in items])
            for f in fields(cls)
        }
    )


# --- light ---

# name: weight, azimuth range, elevation range (degrees), disc radius range, sky : key irradiance range
SETUPS = {
    "flat": (0.16, (-25, 25), (5, 35), (0.5, 0.9), (0.8, 1.6)),
    "loop": (0.20, (25, 50), (20, 45), (0.15, 0.5), (0.25, 0.7)),
    "rembrandt": (0.14, (45, 70), (25, 45), (0.08, 0.35), (0.10, 0.35)),
    "side": (0.16, (70, 105), (-5, 30), (0.03, 0.4), (0.06, 0.40)),
    "top": (0.08, (-40, 40), (55, 80), (0.05, 0.4), (0.15, 0.5)),
    "below": (0.06, (-45, 45), (-55, -20), (0.1, 0.4), (0.12, 0.5)),
    "rim": (0.06, (115, 150), (10, 45), (0.1, 0.3), (0.5, 1.0)),
    "sun": (0.10, (-75, 75), (15, 65), (0.01, 0.04), (0.25, 0.6)),
    "overcast": (0.04, (-30, 30), (50, 85), (0.8, 1.1), (1.5, 3.0)),
}


def toward(azimuth: float, elevation: float) -> Tensor:
    """Unit direction from degrees: azimuth 0 the camera, 90 the right of the picture; elevation up."""
    a, e = math.radians(azimuth), math.radians(elevation)
    return torch.tensor([math.sin(a) * math.cos(e), math.sin(e), math.cos(a) * math.cos(e)])


def _sky(d: Draw, setup: str, amount: float, tint: Tensor) -> Tensor:
    """Radiance of the surroundings for the SKY directions, [SKY,3]; `amount` is its mean irradiance."""
    y = sphere(SKY)[:, 1:2]
    up, down = (1.2, 0.35) if setup in ("sun", "overcast") else (d.uniform(0.7, 1.2), d.uniform(0.4, 0.9))
    top, ground = tint, warmth(d.uniform(0.0, 0.9))
    sky = torch.lerp(ground * down, top * up, torch.sigmoid(4 * y))
    # a few broad patches: a window, a coloured wall
    for _ in range(2):
        spot = toward(d.uniform(-180, 180), d.uniform(-40, 60))
        hue = warmth(d.uniform(-1, 1)) * (1 + 0.4 * d.uniform(0, 1, 3) * d.chance(0.25))
        sky = sky + torch.exp(3 * (sphere(SKY) @ spot[:, None] - 1)) * hue * d.uniform(0.0, 1.6)
    return sky * amount / sky.mean() * 4 / SKY


def sample_light(seed: int) -> dict:
    """One portrait's light: a key lamp, mostly a fill, sometimes a rim lamp, and the surroundings."""
    d = Draw(seed, "light")
    setup = d.pick(**{k: v[0] for k, v in SETUPS.items()})
    _, azimuth, elevation, radius, ratio = SETUPS[setup]
    side = 1 if d.chance(0.5) else -1
    key = toward(side * d.uniform(*azimuth), d.uniform(*elevation))
    warm = d.uniform(-0.35, 0.55) if setup != "sun" else d.uniform(0.0, 0.9)
    colour = warmth(warm)
    if d.chance(0.03):  # stage light
        colour = colour * torch.exp(0.5 * d.normal(3))
        colour = colour / (colour @ torch.tensor([0.2126, 0.7152, 0.0722]))
    tint = warmth(d.uniform(-1.1, -0.3)) if setup in ("sun", "overcast") else warmth(d.uniform(-0.5, 0.5))
    sky_amount = math.exp(d.uniform(*map(math.log, ratio)))
    n_key, n_fill = AREA - 4, 2
    directions = [cone(key, d.uniform(*radius), n_key)]
    colours = [colour.expand(n_key, 3) / n_key]
    fill = toward(-side * d.uniform(10, 70), d.uniform(-10, 30))
    directions.append(cone(fill, d.uniform(0.3, 0.8), n_fill))
    power = d.uniform(0.05, 0.45) * d.chance(0.6) * (setup not in ("sun", "overcast"))
    colours.append((warmth(d.uniform(-0.4, 0.5)) * power / n_fill).expand(n_fill, 3))
    rim = toward((side if d.chance(0.5) else -side) * d.uniform(120, 165), d.uniform(10, 50))
    directions.append(cone(rim, d.uniform(0.1, 0.3), 2))
    power = d.uniform(0.3, 1.2) * (d.chance(0.2) and setup not in ("sun", "overcast"))
    colours.append((warmth(d.uniform(-0.4, 0.6)) * power / 2).expand(2, 3))
    directions.append(sphere(SKY))
    colours.append(_sky(d, setup, sky_amount * 0.5, tint))
    return dict(direction=torch.cat(directions), colour=torch.cat(colours), key=key)


# --- pose ---

# name: weight, expression weights (name prefix of the open head's expressions: low, high)
MOODS = {
    "neutral": (0.24, {}),
    "smile": (0.22, dict(mouthSmile=(0.3, 0.8), cheekSquint=(0.0, 0.5), eyeSquint=(0.0, 0.3))),
    "teeth": (0.34, dict(mouthSmile=(0.5, 1.0), mouthUpperUp=(0.35, 0.9), mouthLowerDown=(0.3, 0.8), cheekSquint=(0.2, 0.7))),  # noqa: E501
    "talk": (0.04, dict(mouthFunnel=(0.0, 0.6), mouthUpperUp=(0.0, 0.5), mouthLowerDown=(0.0, 0.7))),
    "laugh": (0.05, dict(mouthSmile=(0.6, 1.0), mouthUpperUp=(0.3, 0.8), eyeSquint=(0.2, 0.7), cheekSquint=(0.4, 0.9))),  # noqa: E501
    "sad": (0.04, dict(mouthFrown=(0.2, 0.9), browInnerUp=(0.2, 0.9))),
    "angry": (0.04, dict(browDown=(0.4, 1.0), mouthPress=(0.0, 0.6), noseSneer=(0.0, 0.5))),
    "surprise": (0.03, dict(browInnerUp=(0.4, 1.0), browOuterUp=(0.4, 1.0), eyeWide=(0.3, 0.9))),
    "pucker": (0.02, dict(mouthPucker=(0.3, 0.9))),
}  # fmt: skip
JAW = dict(teeth=(0.0, 0.10), talk=(0.05, 0.25), laugh=(0.08, 0.26), surprise=(0.03, 0.24))


def sample_pose(seed: int, names: list[str], expressions: Tensor) -> dict:
    """Turn of the head (yaw to +-45, pitch to +-20 degrees), jaw, gaze and expression.

    names and expressions [N,E]: the open head's named expressions; left and right take the same weight
    but for a little asymmetry.
    """
    d = Draw(seed, "pose")
    yaw = max(-45.0, min(45.0, d.normal(1).item() * (10 if d.chance(0.5) else 24)))
    pitch = max(-20.0, min(20.0, d.normal(1).item() * 7))
    mood = d.pick(**{k: v[0] for k, v in MOODS.items()})
    exp = 0.12 * d.normal(expressions.shape[1]).clamp(-2, 2)
    weights = dict(MOODS[mood][1])
    if d.chance(0.25):
        weights |= dict(browInnerUp=(0.0, 0.5), browOuterUp=(0.0, 0.5))
    if d.chance(0.07):
        weights |= dict(eyeBlink=(0.2, 1.0))
    for prefix, (low, high) in weights.items():
        level = d.uniform(low, high)
        for i, name in enumerate(names):
            if name.startswith(prefix):
                exp = exp + expressions[i].cpu() * (level * d.uniform(0.85, 1.15))
    jaw = d.uniform(*JAW[mood]) if mood in JAW else 0.0
    yaw, pitch = math.radians(yaw), math.radians(pitch)
    gaze = torch.tensor([0.0, 0.0]) + 0.12 * d.normal(2)
    if d.chance(0.6):  # into the camera
        gaze = torch.tensor([-yaw, -pitch]).clamp(-0.45, 0.45) + 0.03 * d.normal(2)
    return dict(turn=torch.tensor([pitch, yaw, 0.0]), jaw=jaw, gaze=gaze, exp=exp)


# --- person ---


def _tex(d: Draw, female: bool, age: float) -> Tensor:
    """The head's albedo numbers: skin evenly from very light to very dark, hair to go with it."""
    melanin = d.uniform(-2.2, 2.2)
    dark = max(0.0, min(1.0, melanin / 2.2))
    hair = d.normal(1).item() + 1.6 * dark
    own = dict(
        melanin=melanin,
        haemoglobin=0.6 * d.normal(1).item(),
        hair_dark=max(-2.2, min(2.5, hair)),
        brow_darkness=max(-1.5, min(2.5, 0.8 * hair + 0.4 * d.normal(1).item())),
        brow_density=0.5 + 0.8 * d.normal(1).item(),
        iris_brown=0.8 * d.normal(1).item() + 2.0 * dark,
        stubble=-2.5 if female else d.uniform(-2.0, 1.2),
    )
    return torch.tensor([own.get(k, d.normal(1).clamp(-2, 2).item()) for k in TEX])


def _hair(d: Draw, female: bool, age: float, tightly: float) -> dict:
    """Cut and growth of the hair; `tightly` is the chance of coils."""
    style = (
        d.pick(bald=0.01, buzz=0.03, short=0.18, bob=0.30, long=0.48)
        if female
        else d.pick(bald=0.10, buzz=0.16, short=0.62, bob=0.07, long=0.05)
    )
    coils = d.chance(tightly)
    volume = {
        "bald": 0.0,
        "buzz": 0.03,
        "short": d.uniform(0.10, 0.32),
        "bob": d.uniform(0.15, 0.4),
        "long": d.uniform(0.12, 0.4),
    }[style]
    length = {"bob": d.uniform(0.9, 2.0), "long": d.uniform(2.2, 4.5)}.get(style, -1.0)
    if coils and style != "bald":
        volume, length = volume * 1.35, length * 0.7 if length > 0 else length
    side = d.uniform(-0.7, 0.7)
    pole = {
        "back": [side * 0.3, -0.15, 1.0],
        "crown": [side * 0.5, 1.0, -0.5],
        "side": [side * 0.2, 0.25, 1.0],
    }
    way = (
        d.pick(back=0.3, crown=0.4, side=0.3) if style in ("buzz", "short") else d.pick(crown=0.35, side=0.65)
    )
    bald_type = not female and age > 0.3 and style in ("buzz", "short")
    return dict(
        hair=float(style != "bald"),
        hairline=0.04 * d.normal(1).item() + (0 if female else age * d.uniform(0.0, 0.45)),
        horseshoe=d.uniform(0.3, 1.0) * d.chance(0.35) * bald_type,
        fringe=d.uniform(0.25, 0.75) * d.chance(0.22 if female else 0.15) * (volume > 0.08),
        volume=volume,
        length=length,
        curl=d.uniform(0.7, 1.0) if coils else d.uniform(0.0, 0.5),
        sideways=float(way == "side"),
        parting=torch.nn.functional.normalize(torch.tensor(pole[way]), dim=0),
    )  # fmt: skip


def _face_paint(d: Draw, female: bool, age: float) -> dict:
    """Make-up, stubble and beard."""
    made_up = female and d.chance(0.65)
    lip = linear([d.uniform(0.45, 0.85), d.uniform(0.1, 0.42), d.uniform(0.15, 0.42)])
    shade = linear(d.uniform(0.1, 0.5, 3))
    kind = (
        "none"
        if female
        else d.pick(none=0.52, stubble=0.20, moustache=0.05, goatee=0.07, short=0.10, full=0.06)
    )
    beard = {
        "moustache": [d.uniform(0.03, 0.1), 0.0, 1.0, 0.0],
        "goatee": [d.uniform(0.02, 0.10), 0.0, 1.0, 1.0],
        "short": [d.uniform(0.01, 0.04), 1.0, 1.0, 1.0],
        "full": [d.uniform(0.08, 0.3), 1.0, 1.0, 1.0],
    }.get(kind, [0.0, 0.0, 0.0, 0.0])
    return dict(
        lipstick=torch.cat([lip, torch.tensor([d.uniform(0.2, 0.85) * made_up])]),
        eyeshadow=torch.cat([shade, torch.tensor([d.uniform(0.1, 0.6) * (made_up and d.chance(0.6))])]),
        blush=d.uniform(0.0, 0.5) * made_up,
        stubble=0.0 if female else (d.uniform(0.45, 0.9) if kind == "stubble" else d.uniform(0.0, 0.35)),
        beard=torch.tensor(beard),
    )


def sample_person(seed: int, sizes) -> dict:
    """One identity; sizes: the head's HeadSizes. The hair's colour follows from the head's albedo later."""
    d = Draw(seed, "person")
    female = d.chance(0.5)
    age = d.uniform() ** 1.2
    tex = _tex(d, female, age)
    dark = max(0.0, min(1.0, (tex[0].item() + 1.0) / 3.2))
    shape = d.normal(sizes.shape).clamp(-2.5, 2.5) * 0.9
    worn = d.chance(0.22)
    frame_colour = linear([0.03, 0.03, 0.035]) if d.chance(0.5) else linear(d.uniform(0.05, 0.55, 3))
    grey = min(1.0, max(0.0, (age - 0.55) * 2.2 + 0.4 * d.normal(1).item())) * d.chance(0.75)
    hair = _hair(d, female, age, max(0.0, dark * 1.4 - 0.55))
    return dict(
        shape=shape,
        tex=tex,
        female=female,
        age=age,
        oil=math.exp(0.45 * d.normal(1).item()),
        rough=d.uniform(0.24, 0.46),
        freckles=d.uniform(0.2, 1.0) * (d.chance(0.15) and dark < 0.5),
        blotches=d.uniform(0.3, 1.0),
        **_face_paint(d, female, age),
        **hair,
        hair_colour=torch.zeros(3),
        grey=grey,
        dye=torch.cat([linear(d.uniform(0.05, 0.8, 3)), torch.tensor([0.8 * d.chance(0.015)])]),
        glasses=torch.cat(
            [
                torch.tensor([float(worn)]),
                frame_colour,
                torch.tensor([d.uniform(0.8, 1.1), d.uniform(0.2, 0.9)]),
            ]
        ),
        grain=torch.cat([d.noise(3, 128), d.noise(1, 128, 2.5)]),
    )
