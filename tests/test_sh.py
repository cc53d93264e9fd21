"""Light: DECA's basis and numbers, exact rotation, lamps, environment maps, fits, display space, priors."""

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from rig_core import light_prior, sh
from rig_core.face import axis_angle_to_matrix

GOLDEN = Path(__file__).parent / "golden"
SPHERE = sh.fibonacci(600).float()
SEEN = SPHERE[SPHERE[:, 2] >= 0]
MEAN = torch.tensor(light_prior.DECA_MEAN)[:, None].expand(9, 3)
STD = torch.tensor(light_prior.DECA_STD)[:, None].expand(9, 3)
vector = st.tuples(*[st.floats(-3, 3)] * 3).map(torch.tensor)


def unit(*v):
    return F.normalize(torch.tensor([v], dtype=torch.float32), dim=1)


def random_lights(n, seed=0):
    return torch.randn(n, 9, 3, generator=torch.Generator().manual_seed(seed))


def lamps(n, seed=0):
    g = torch.Generator().manual_seed(seed)
    d = torch.randn(n, 3, generator=g)
    d[:, 2] = d[:, 2].abs()  # in front, so that the sphere below can see them
    rand = [torch.rand(n, generator=g) for _ in range(3)]
    colour = 0.5 + 0.5 * torch.rand(n, 3, generator=g)
    return sh.from_direction(d, 0.4 + rand[0], colour, rand[1], 0.05 + 0.5 * rand[2])


def sphere_picture(n, size=48):
    """Normals, albedo and mask of a ball that fills the picture."""
    y, x = torch.meshgrid(torch.linspace(1, -1, size), torch.linspace(-1, 1, size), indexing="ij")
    z2 = 1 - x * x - y * y
    mask = (z2 > 0.01).float().expand(n, 1, size, size)
    normal = torch.stack([x, y, z2.clamp_min(0).sqrt()]).expand(n, 3, size, size) * mask
    albedo = 0.45 + 0.15 * torch.rand(n, 3, size, size, generator=torch.Generator().manual_seed(9))
    return normal, albedo, mask


def test_shading_equals_the_official_one():
    t = load_file(GOLDEN / "deca_shading.safetensors")
    assert torch.allclose(torch.tensor(sh.CONSTANTS), t["constant_factor"], atol=1e-7)
    assert torch.allclose(sh.shade(t["normal_images"], t["sh"]), t["sh_shading"], atol=2e-6)


def test_shade_is_the_basis_times_the_light_and_broadcasts():
    light = random_lights(3)
    normal = SPHERE.T.reshape(1, 3, 20, 30)
    want = (sh.basis(SPHERE) @ light).transpose(1, 2).reshape(3, 3, 20, 30)
    assert torch.allclose(sh.shade(normal, light), want, atol=1e-5)
    assert torch.allclose(sh.shade(normal.expand(3, -1, -1, -1), light), want, atol=1e-5)


def test_basis_without_band_weights_is_orthonormal():
    y = sh.basis(sh.fibonacci(20000)) / torch.tensor(sh._BAND, dtype=torch.float64)
    assert torch.allclose(y.T @ y * (4 * math.pi / 20000), torch.eye(9, dtype=torch.float64), atol=1e-4)


@settings(max_examples=25, deadline=None)
@given(vector, vector, st.integers(0, 99))
def test_rotations_compose_turn_the_shading_and_keep_the_energy(a, b, seed):
    light = random_lights(1, seed)
    r1, r2 = axis_angle_to_matrix(torch.stack([a, b])).split(1)
    once = sh.rotate(light, r1 @ r2)
    assert torch.allclose(sh.rotate(sh.rotate(light, r2), r1), once, atol=2e-5)
    turned = SPHERE @ (r1 @ r2)[0].T
    assert torch.allclose(sh.basis(turned) @ once, sh.basis(SPHERE) @ light, atol=3e-5)
    for band in (slice(0, 1), slice(1, 4), slice(4, 9)):  # coefficients of orthonormal functions
        before, after = (x[:, band].square().sum(1) for x in (light, once))
        assert torch.allclose(before, after, rtol=1e-4, atol=1e-5)


def test_a_quarter_turn_about_y_moves_front_light_to_the_right():
    quarter = axis_angle_to_matrix(torch.tensor([[0.0, math.pi / 2, 0.0]]))
    front = sh.from_direction(unit(0, 0, 1), colour=(1, 0.5, 0.2))
    right = sh.from_direction(unit(1, 0, 0), colour=(1, 0.5, 0.2))
    assert torch.allclose(sh.rotate(front, quarter), right, atol=1e-6)


@settings(max_examples=25, deadline=None)
@given(vector.filter(lambda v: v.norm() > 0.1), st.floats(0.1, 3), st.floats(0, 1))
def test_a_lamp_peaks_where_it_points(v, intensity, softness):
    light = sh.from_direction(v[None], intensity, softness=softness, ambient=0.1)
    d = F.normalize(v, dim=0)
    shading = (sh.basis(SPHERE) @ light)[0, :, 0]
    assert SPHERE[shading.argmax()] @ d > 0.99
    assert torch.allclose(sh.direction(light)[0], d, atol=1e-4)


def test_a_small_lamp_has_the_clamped_cosine_and_softness_the_cap():
    light = sh.from_direction(unit(0, 0, 1), 2.0, (1.0, 0.5, 0.25), ambient=0.3)
    at = sh.basis(unit(0, 0, 1)) @ light
    # bands 0-2 of max(cos, 0) at its peak: 1/4 + 1/2 + 5/16
    assert torch.allclose(at[0, 0], 2 * 1.0625 * torch.tensor([1.0, 0.5, 0.25]) + 0.3, atol=1e-5)
    # a disc of 45 degrees half-angle, averaged lamp by lamp
    cap = sh.fibonacci(40000)
    cap = cap[cap[:, 2] > math.cos(math.pi / 4)]
    many = sh._lamp(cap).mean(0).float()
    assert torch.allclose(sh.from_direction(unit(0, 0, 1), softness=0.5)[0, :, 0], many, atol=1e-3)


def test_a_white_world_shades_one_everywhere():
    light = sh.from_environment(torch.ones(2, 3, 64, 128))
    assert torch.allclose(light[:, 0], torch.full((2, 3), math.sqrt(4 * math.pi)), atol=1e-5)
    assert light[:, 1:].abs().max() < 3e-4
    assert torch.allclose(sh.basis(SPHERE) @ light, torch.ones(2, 600, 3), atol=3e-4)


@pytest.mark.parametrize(
    ("row", "column", "toward"),
    [
        (32, 64, (0, 0, 1)),
        (0, 5, (0, 1, 0)),
        (63, 90, (0, -1, 0)),
        (32, 96, (-1, 0, 0)),
        (32, 32, (1, 0, 0)),
        (32, 0, (0, 0, -1)),
    ],
)
def test_where_the_panorama_looks(row, column, toward):
    world = torch.zeros(1, 3, 64, 128)
    world[0, 1, row, column] = 500.0
    light = sh.from_environment(world)
    assert sh.direction(light)[0] @ torch.tensor(toward, dtype=torch.float32) > 0.998


def test_a_spot_in_the_panorama_is_a_lamp():
    world = torch.zeros(1, 3, 256, 512)
    world[:, :, 100, 300] = 1.0
    theta, phi = (100.5) * math.pi / 256, 300.5 * 2 * math.pi / 512 - math.pi
    d = unit(-math.sin(theta) * math.sin(phi), math.cos(theta), math.sin(theta) * math.cos(phi))
    omega = 2 * math.pi / 512 * (math.cos(100 * math.pi / 256) - math.cos(101 * math.pi / 256))
    want = sh.from_direction(d, intensity=omega / math.pi)
    assert torch.allclose(sh.from_environment(world), want, rtol=1e-3, atol=1e-8)


def test_display_space_round_trip():
    linear = sh.from_direction(sh.fibonacci(40).float(), 1.0, ambient=0.2, softness=0.1)
    display = sh.encode_light(linear)
    back = sh.basis(SPHERE) @ sh.decode_light(display) - sh.basis(SPHERE) @ linear
    assert back.abs().max() < 2e-4
    want = (sh.basis(SPHERE) @ linear).clamp_min(0) ** (1 / 2.2)
    assert (sh.basis(SPHERE) @ display - want).abs().mean() < 0.03  # what three bands can hold
    grey = torch.zeros(1, 9, 3)
    grey[:, 0] = 0.5 / sh._Y0
    assert torch.allclose(sh.basis(SPHERE) @ sh.encode_light(grey), torch.tensor(0.5 ** (1 / 2.2)), atol=1e-5)


def least_squares(normal, albedo, image, mask):
    phi = sh.basis(normal.flatten(2).transpose(1, 2))[:, None] * albedo.flatten(2)[..., None]
    inside = mask.flatten(2)[..., None]
    return (
        torch.linalg.lstsq(phi * inside, image.flatten(2)[..., None] * inside)
        .solution[..., 0]
        .transpose(1, 2)
    )


def explained(light, normal, albedo, image, mask):
    off = ((image - albedo * sh.shade(normal, light)).square() * mask).sum((1, 2, 3))
    mean = (image * mask).sum((2, 3), keepdim=True) / mask.sum((2, 3), keepdim=True)
    return 1 - off / ((image - mean).square() * mask).sum((1, 2, 3))


@pytest.mark.parametrize("display", [False, True])
def test_fit_finds_a_known_light_and_explains_as_much_as_least_squares(display):
    normal, albedo, mask = sphere_picture(8)
    true = sh.encode_light(lamps(8)) if display else lamps(8)
    image = albedo * sh.shade(normal, true)
    fitted = sh.fit(normal, albedo, image, mask)
    assert (sh.shade(normal, fitted) - sh.shade(normal, true)).mul(mask).abs().max() < 5e-3
    noisy = image + 0.03 * torch.randn(image.shape, generator=torch.Generator().manual_seed(1))
    plain = explained(least_squares(normal, albedo, noisy, mask), normal, albedo, noisy, mask)
    ours = explained(sh.fit(normal, albedo, noisy, mask), normal, albedo, noisy, mask)
    assert (plain - ours).max() < 0.002  # the bound that we promise is 0.04


def test_fit_leaves_highlights_and_shadows_out():
    normal, albedo, mask = sphere_picture(4)
    true = lamps(4, seed=3)
    image = albedo * sh.shade(normal, true)
    spoilt = image.clone()
    spoilt[:, :, 10:20, 14:24] = 1.5
    spoilt[:, :, 30:40, 10:22] *= 0.2

    def error(light):
        return (sh.shade(normal, light) - sh.shade(normal, true)).mul(mask).abs().mean()

    robust, plain = (
        error(sh.fit(normal, albedo, spoilt, mask)),
        error(sh.fit(normal, albedo, spoilt, mask, rounds=0)),
    )
    assert robust < 0.4 * plain


def test_fit_stays_positive_where_least_squares_does_not():
    normal, albedo, mask = sphere_picture(6)
    mask = mask * (normal[:, :1] > 0) * (normal[:, 2:] > 0.6)  # a corner of the ball only
    image = albedo * sh.shade(normal, lamps(6, seed=5)) + 0.05 * torch.randn(
        normal.shape, generator=torch.Generator().manual_seed(2)
    )
    free = sh.basis(SPHERE) @ least_squares(normal, albedo, image, mask)
    ours = sh.basis(SPHERE) @ sh.fit(normal, albedo, image, mask)
    assert free.min() < -0.3
    assert ours.min() > -0.08  # a lamp's own undershoot


def test_interpolation_equals_the_official_one():
    t = load_file(GOLDEN / "difareli_light_interp.safetensors")
    a, b = t["light"].reshape(2, 9, 3).split(1)
    w = torch.linspace(0, 1, 5)
    assert torch.allclose(sh.interpolate(a, b, w).flatten(1), t["lerp"], atol=1e-6)
    assert torch.allclose(sh.interpolate(a, b, w, spherical=True).flatten(1), t["slerp"], atol=2e-6)
    assert torch.allclose(sh.interpolate(a, a, w, spherical=True), a.expand(5, 9, 3))  # NaN officially


def test_dpr_light_shades_alike():
    g = torch.Generator().manual_seed(4)
    dpr = torch.randn(5, 9, generator=g)
    x, y, z = SPHERE[:, 0], -SPHERE[:, 2], SPHERE[:, 1]
    c = [math.sqrt(v / math.pi) for v in (1 / 4, 3 / 4, 15 / 4, 5 / 16, 15 / 16)]
    terms = [c[0] + 0 * x, c[1] * y, c[1] * z, c[1] * x, c[2] * y * x, c[2] * y * z]
    terms += [c[3] * (3 * z * z - 1), c[2] * x * z, c[4] * (x * x - y * y)]
    bands = torch.tensor([math.pi, *[2 * math.pi / 3] * 3, *[math.pi / 4] * 5])
    want = torch.stack(terms, 1) * bands @ dpr.T
    got = sh.basis(SPHERE) @ sh.from_dpr(dpr)
    assert torch.allclose(got[..., 0], want.T, atol=1e-5)
    assert torch.equal(got[..., 0], got[..., 2])


def test_mix_is_linear_and_direction_falls_back_to_the_front():
    a, b = lamps(2, 1), lamps(2, 2)
    assert torch.allclose(sh.mix([a, b], [0.25, 2.0]), 0.25 * a + 2 * b)
    assert torch.equal(sh.direction(torch.zeros(2, 9, 3)), torch.tensor([[0.0, 0, 1]] * 2))
    angles = sh.from_angles(torch.tensor([0.0, 90, 0, 180]), torch.tensor([0.0, 0, 90, 0]))
    assert torch.allclose(angles, torch.tensor([[0.0, 0, 1], [1, 0, 0], [0, 1, 0], [0, 0, -1]]), atol=1e-6)


@settings(max_examples=20, deadline=None)
@given(vector.filter(lambda v: v.norm() > 0.1), st.floats(0, 1))
def test_aim_points_where_asked_within_the_prior(v, strength):
    source = MEAN + STD * random_lights(1, 7) * 0.5
    light = light_prior.aim(source, v[None], strength, MEAN, STD)
    assert ((light - MEAN).abs() / STD).max() <= 2.5 + 1e-4
    assert (sh.basis(SEEN) @ light).min() >= 0.025
    assert torch.allclose(light[:, 0], source[:, 0], atol=1e-5)
    if strength > 0.05:
        assert F.normalize(v, dim=0) @ sh.direction(light, MEAN)[0] > 0.999
    else:
        assert (light[:, 1:] - MEAN[1:]).abs().max() <= 0.05 * 2.5 * STD.max() + 1e-5


def test_aim_grows_with_strength():
    steps = [
        light_prior.aim(MEAN[None], unit(1, 0.2, 0.3), s, MEAN, STD)[0, 1, 0] for s in (0, 0.3, 0.6, 1.0)
    ]
    assert all(b > a + 0.05 for a, b in zip(steps, steps[1:]))


@pytest.mark.parametrize("name", list(light_prior.PRESETS))
def test_presets_stay_in_the_prior_and_come_from_their_side(name):
    p = light_prior.PRESETS[name]
    light = light_prior.edit(MEAN[None], **p._asdict(), mean=MEAN, std=STD)
    assert ((light - MEAN).abs() / STD).max() <= 2.5 + 1e-3
    assert (sh.basis(SEEN) @ light).min() >= 0.025
    d = sh.from_angles(torch.tensor([float(p.azimuth)]), torch.tensor([float(p.elevation)]))
    assert (d * sh.direction(light, MEAN)).sum() > 0.98
    raw = light_prior.edit(MEAN[None], **p._asdict(), raw=True)
    physical = sh.from_direction(d, p.intensity, p.colour, p.softness, p.ambient)
    assert torch.allclose(raw, sh.encode_light(physical), atol=1e-6)


def test_edit_is_mirror_symmetric_and_answers_to_its_sliders():
    def at(azimuth, **kw):
        return light_prior.edit(MEAN[None] * torch.ones(1, 9, 3), azimuth, 10, mean=MEAN * 1.0, std=STD, **kw)

    mirror = torch.tensor([1.0, -1, 1, 1, -1, -1, 1, 1, 1])[:, None]
    left, right = at(-50) - MEAN, at(50) - MEAN
    assert torch.allclose(left * mirror, right, atol=1e-4)
    assert at(50, intensity=2.0)[0, 0, 1] > at(50)[0, 0, 1] > at(50, intensity=0.4)[0, 0, 1]
    assert (at(50, ambient=1.0) - MEAN)[0, 1, 1] < (at(50) - MEAN)[0, 1, 1]  # fill takes contrast
    warm = at(50, colour=(1, 0.7, 0.4))
    assert warm[0, 0, 0] > warm[0, 0, 1] > warm[0, 0, 2]


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda: sh.from_direction(torch.zeros(1, 3)), "zero or NaN"),
        (lambda: sh.from_direction(unit(0, 0, 1), intensity=-1.0), "intensity must be"),
        (lambda: sh.from_direction(unit(0, 0, 1), softness=1.5), "softness"),
        (lambda: sh.rotate(torch.zeros(1, 9), torch.eye(3)), r"\[B,9,3\]"),
        (lambda: sh.encode_light(torch.full((1, 9, 3), float("nan"))), "NaN"),
        (lambda: sh.from_environment(-torch.ones(1, 3, 4, 8)), "negative"),
        (lambda: sh.fit(*[torch.ones(1, 3, 8, 8)] * 3, torch.zeros(1, 1, 8, 8)), "empty"),
        (lambda: sh.fit(*[torch.ones(1, 3, 8, 8)] * 3, torch.zeros(1, 1, 9, 8)), "mask must be"),
        (lambda: sh.mix([], []), "weights"),
        (lambda: light_prior.aim(torch.ones(1, 9, 3), unit(0, 0, 1), 1.0, MEAN, STD * 0), "prior"),
        (lambda: light_prior.edit(torch.ones(1, 9, 3), float("nan"), 0), "NaN"),
    ],
)
def test_bad_input_is_named(call, words):
    with pytest.raises(ValueError, match=words):
        call()
