"""Panoramas as light, named lights, and both in a model's range."""

from __future__ import annotations

import math

import pytest
import torch

from rig_core import environment, light_prior, sh
from rig_core.gain import to_display

MEAN = torch.tensor(light_prior.DECA_MEAN)[:, None].repeat(1, 3)
STD = torch.tensor(light_prior.DECA_STD)[:, None].repeat(1, 3)
PRIOR = {"mean": MEAN, "std": STD}


def spot(azimuth, elevation, height=128, sky=0.0, half_angle=0.06):
    """A panorama from the sitter's place with a small disc of light at sh.from_angles' angles, of flux 1."""
    v, u = torch.meshgrid(torch.arange(height) + 0.5, torch.arange(2 * height) + 0.5, indexing="ij")
    phi, theta = (u / height - 1) * math.pi, v / height * math.pi
    # to the right of the panorama is the sitter's right hand, the left of the photo
    d = torch.stack([-theta.sin() * phi.sin(), theta.cos(), theta.sin() * phi.cos()], -1)
    at = sh.from_angles(torch.tensor([float(azimuth)]), torch.tensor([float(elevation)]))[0]
    disc = ((d @ at) > math.cos(half_angle)).float()
    omega = (math.pi / height) ** 2 * theta.sin()
    radiance = disc / (disc * omega).sum() * math.pi + sky  # irradiance pi: shading 1 where it is faced
    return radiance[None, None].expand(1, 3, -1, -1)


def lamp(azimuth, elevation, ambient=0.0):
    d = sh.from_angles(torch.tensor([float(azimuth)]), torch.tensor([float(elevation)]))
    return sh.from_direction(d, ambient=ambient)


@pytest.mark.parametrize("at", [(0, 0), (60, 20), (-90, 5), (150, -30)])
def test_a_bright_spot_is_a_lamp_from_there(at):
    light = environment.panorama_light(spot(*at, sky=0.2))
    torch.testing.assert_close(light, lamp(*at, ambient=0.2), atol=0.02, rtol=0)


def test_an_even_panorama_is_the_ambient():
    light = environment.panorama_light(torch.full((1, 3, 64, 128), 0.3))
    want = torch.zeros(1, 9, 3)
    want[:, 0] = 0.3 * math.sqrt(4 * math.pi)
    torch.testing.assert_close(light, want, atol=1e-4, rtol=0)
    up = torch.tensor([0.0, 1.0, 0.0]).view(1, 3, 1, 1)
    torch.testing.assert_close(sh.shade(up, light), torch.full((1, 3, 1, 1), 0.3), atol=1e-4, rtol=0)


@pytest.mark.parametrize("yaw,pitch", [(40, 0), (-70, 0), (0, 25), (40, 25)])
def test_turned_surroundings(yaw, pitch):
    light = environment.panorama_light(spot(0, 0), yaw, pitch)
    a, e = math.radians(yaw), math.radians(pitch)  # first to the side, then up about the picture's horizontal
    d = torch.tensor([[math.sin(a), math.cos(a) * math.sin(e), math.cos(a) * math.cos(e)]])
    torch.testing.assert_close(light, sh.from_direction(d), atol=0.02, rtol=0)


def test_from_behind_the_camera_the_middle_is_behind_the_face():
    world = spot(0, 0)
    torch.testing.assert_close(
        environment.panorama_light(world, behind=True), lamp(180, 0), atol=0.02, rtol=0
    )
    right = world.roll(world.shape[3] // 4, 3)  # a quarter to the right of the middle
    torch.testing.assert_close(environment.panorama_light(right, behind=True), lamp(90, 0), atol=0.02, rtol=0)
    torch.testing.assert_close(environment.panorama_light(right), lamp(-90, 0), atol=0.02, rtol=0)


def test_srgb_is_decoded_and_a_large_panorama_is_made_smaller():
    world = spot(50, 30, sky=0.2).clamp_max(1)
    light = environment.panorama_light(world)
    torch.testing.assert_close(environment.panorama_light(to_display(world), srgb=True), light)
    bright = spot(50, 30, 1024, sky=0.2)
    assert bright.max() > 50
    torch.testing.assert_close(environment.panorama_light(bright), lamp(50, 30, 0.2), atol=0.02, rtol=0)


@pytest.mark.parametrize(
    "panorama,said",
    [
        (torch.ones(1, 3, 64, 64), "twice as wide as high.*64 x 64"),
        (torch.zeros(1, 3, 32, 64), "black"),
        (-torch.ones(1, 3, 32, 64), "negative"),
        (torch.full((1, 3, 32, 64), math.nan), "NaN"),
    ],
)
def test_what_is_no_panorama(panorama, said):
    with pytest.raises(ValueError, match=said):
        environment.panorama_light(panorama)


def test_physical_light_in_display_space_and_its_exposure():
    linear = environment.panorama_light(torch.full((1, 3, 32, 64), 0.25))
    n = torch.tensor([0.0, 0.6, 0.8]).view(1, 3, 1, 1)
    for stops, level in ((0.0, 0.25), (1.0, 0.5), (-2.0, 0.0625)):
        shading = sh.shade(n, environment.surround(linear, stops))
        torch.testing.assert_close(shading, torch.full_like(shading, level ** (1 / 2.2)), atol=1e-4, rtol=0)


def test_in_the_models_range():
    own = MEAN[None] * 1.05
    linear = environment.panorama_light(spot(70, 10, sky=0.1))
    light = environment.surround(linear, 0.0, own, **PRIOR)
    assert ((light - MEAN).abs() <= 2.5 * STD + 1e-5).all()
    torch.testing.assert_close(light[:, 0], own[:, 0])  # exposure 0 keeps the photo's level
    d = sh.direction(light, MEAN)[0]
    assert d[0] > 0.8  # from the right
    torch.testing.assert_close(environment.surround(linear * 37, 0.0, own, **PRIOR), light, atol=1e-4, rtol=0)
    levels = [float(environment.surround(linear, s, own, **PRIOR)[0, 0, 0]) for s in (-0.3, 0.0, 0.3)]
    assert abs(levels[0] / levels[1] - 2 ** (-0.3 / 2.2)) < 1e-4
    assert abs(levels[2] / levels[1] - 2 ** (0.3 / 2.2)) < 1e-4
    warm = linear * torch.tensor([1.3, 1.0, 0.7])
    tint = environment.surround(warm, 0.0, own, **PRIOR)[0, 0] / light[0, 0]
    assert tint[0] > 1.03 > 0.97 > tint[2]


@pytest.mark.parametrize("name", light_prior.PRESETS)
def test_presets(name):
    p, own = light_prior.PRESETS[name], MEAN[None].repeat(2, 1, 1)
    light = light_prior.preset(own, name, **PRIOR)
    want = light_prior.edit(
        own, p.azimuth, p.elevation, p.intensity, p.ambient, p.colour, p.softness, **PRIOR
    )
    assert torch.equal(light, want) and ((light - MEAN).abs() <= 2.5 * STD + 1e-5).all()
    physical, mirrored = (light_prior.preset(own, name, mirror=m) for m in (False, True))
    flip = torch.tensor([1.0, -1, 1, 1, -1, -1, 1, 1, 1]).view(9, 1)  # x -> -x
    torch.testing.assert_close(mirrored, physical * flip, atol=1e-3, rtol=0)
    strong = light_prior.preset(own, name, intensity=2.0)
    twice = sh.from_direction(
        sh.from_angles(*(torch.tensor([float(v)]) for v in p[:2])),
        2 * p.intensity,
        p.colour,
        p.softness,
        p.ambient,
    )
    torch.testing.assert_close(strong[:1], sh.encode_light(twice))


def test_an_unknown_preset():
    with pytest.raises(ValueError, match="no light 'x', only rembrandt, butterfly"):
        light_prior.preset(MEAN[None], "x")


def test_the_ball_shows_the_light():
    light = sh.from_direction(torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]]), ambient=0.1)
    ball = light_prior.ball(light, 64)
    assert ball.shape == (2, 3, 64, 64) and not ball[:, :, 0, 0].any()
    assert ball[0, 0, 32, 60] > 3 * ball[0, 0, 32, 4] and ball[1, 0, 4, 32] > 3 * ball[1, 0, 60, 32]
    front = torch.tensor([1 / 64, -1 / 64, 1.0]).view(1, 3, 1, 1)
    torch.testing.assert_close(ball[:, :, 32, 32], sh.shade(front, light)[..., 0, 0] / 2, atol=1e-3, rtol=0)
