"""SH Light Edit, Light From Photo, Light Orbit, Mix Lights."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from tests import host_double
from tests.node_pack import *  # noqa: F403 the fixtures
from tests.node_pack import ROOT, SIZE


def test_light_comes_from_the_side_asked_for(pack, head, face):
    code = face[3]

    def sides(azimuth, **more):
        lit, light, ball = pack.run("SHLightEdit", face_model=head, face_code=code, azimuth=azimuth, **more)
        assert torch.equal(lit.light, light) and ball.shape[0] == 1 and ball.shape[3] == 3
        b = pack.run("RenderBuffers", face_model=head, face_code=lit)[0]
        half = SIZE // 2
        return [
            float(x[m > 0].mean())
            for x, m in zip(b.shading.mean(1, True).split(half, 3), b.mask.split(half, 3))
        ]

    left, right = sides(70.0)
    assert right > 1.15 * left
    mirrored = sides(-70.0)
    assert mirrored[0] > 1.15 * mirrored[1]
    even = sides(70.0, intensity=0.0)
    assert abs(even[0] / even[1] - 1) < 0.08
    full = sides(70.0, ambient=0.8)
    assert full[1] / full[0] < right / left and full[0] > left
    red = pack.run("SHLightEdit", face_model=head, face_code=code, red=1.0, green=0.5, blue=0.5)[1]
    even = pack.run("SHLightEdit", face_model=head, face_code=code)[1]
    tint = (red / even)[0, 0]
    assert tint[0] > 1.03 * tint[1] and tint[0] > 1.03 * tint[2]
    raw = pack.run("SHLightEdit", face_model=head, face_code=code, azimuth=70.0, mode="raw")[1]
    physical = pack.core.light_prior.edit(code.light, 70.0, 20.0, raw=True)
    torch.testing.assert_close(raw, physical)


def test_light_mix_zero_keeps_the_photos_light(pack, head, face):
    code = face[3]
    lit, light, _ = pack.run("SHLightEdit", face_model=head, face_code=code, mix=0.0)
    assert torch.equal(light, code.light) and torch.equal(lit.shape, code.shape)


def test_a_given_light_replaces_the_sliders(pack, head, face):
    code = face[3]
    given = torch.linspace(-0.2, 0.5, 54).reshape(2, 9, 3)
    lit, light, ball = pack.run("SHLightEdit", face_model=head, face_code=code, light=given)
    assert torch.equal(light, given) and len(lit) == 2 and len(ball) == 2


def photo(name, size=300):
    image = Image.open(ROOT / "rig_core" / "assets" / name).convert("RGB")
    image.thumbnail((size, size))
    return torch.from_numpy(np.array(image)).float()[None] / 255


def test_light_from_photo_is_the_light_of_the_chosen_face(pack, head):
    woman, man = photo("astronaut.jpg"), photo("grace_hopper.jpg")
    height = min(woman.shape[1], man.shape[1])
    both = torch.cat([woman[:, :height], man[:, :height]], 2)
    found = [
        pack.run("LightFromPhoto", face_model=head, photo=both, order="left to right", index=i)[0]
        for i in (0, 1)
    ]
    alone, ball = pack.run("LightFromPhoto", face_model=head, photo=man[:, :height])
    assert alone.shape == (1, 9, 3) and ball.shape == (1, 128, 128, 3)
    assert (found[1] - alone).abs().max() < 0.3 < (found[0] - alone).abs().max()
    core = pack.core
    want = core.pipeline.estimate(head, man[:, :height].permute(0, 3, 1, 2).contiguous(), 256).code.light
    torch.testing.assert_close(alone, want, atol=1e-3, rtol=1e-3)
    assert not alone.requires_grad
    with pytest.raises(ValueError, match="'photo': the picture has 2 faces, there is no face number 2"):
        pack.run("LightFromPhoto", face_model=head, photo=both, index=2)
    with pytest.raises(ValueError, match="no face found"):
        pack.run("LightFromPhoto", face_model=head, photo=torch.full((1, 120, 160, 3), 0.4))


def test_light_orbit_goes_around(pack, head, face):
    how = {"face_model": head, "face_code": face[3]}
    light, ball = pack.run("LightOrbit", frames=5, start=-80.0, arc=160.0, **how)
    assert light.shape == (5, 9, 3) and len(ball) == 5
    side = pack.core.sh.direction(light, head.light_mean)[:, 0]
    assert (side.diff() > 0).all() and side[0] < -0.7 and side[4] > 0.7 and abs(side[2]) < 0.1
    for i, azimuth in ((0, -80.0), (4, 80.0)):  # both ends are reached
        alone = pack.run("SHLightEdit", azimuth=azimuth, elevation=15.0, **how)[1]
        torch.testing.assert_close(light[i : i + 1], alone)
    circle = pack.run("LightOrbit", frames=8, start=0.0, arc=360.0, **how)[0]
    step = (circle - circle.roll(1, 0)).flatten(1).norm(dim=1)
    assert step.min() > 0 and step.max() < 3 * step.min()  # the last one leads on to the first
    back = pack.run("LightOrbit", frames=5, start=80.0, arc=-160.0, **how)[0]
    torch.testing.assert_close(back.flip(0), light)
    assert torch.isfinite(pack.run("LightOrbit", frames=1, **how)[0]).all()
    with pytest.raises(ValueError, match="'face_code' holds 2 faces"):
        pack.run("LightOrbit", face_model=head, face_code=face[3].expand(2))
    with pytest.raises(ValueError, match="'flame' head"):
        pack.run("LightOrbit", face_model=head, face_code=face[3].replace(head="flame"))


def test_mixed_lights(pack, head, face):
    a, b = pack.run("LightOrbit", face_model=head, face_code=face[3], frames=2)[0].split(1)
    half = pack.run("MixLights", light_a=a, light_b=b)[0]
    torch.testing.assert_close(half, (a + b) / 2)
    sequence, ball = pack.run("MixLights", light_a=a, light_b=b, mode="sequence", frames=5)
    torch.testing.assert_close(sequence[[0, 2, 4]], torch.cat([a, half, b]))
    assert len(ball) == 5
    arc = pack.run("MixLights", light_a=a, light_b=b, mode="sequence, spherical", frames=5)[0]
    torch.testing.assert_close(arc[[0, 4]], torch.cat([a, b]))
    assert arc[2].norm() > half.norm()  # the chord is shorter than the arc
    sh = pack.core.sh
    lamp = sh.encode_light(sh.from_direction(torch.tensor([[0.0, 0.0, 1.0]]), ambient=0.3))
    twice = pack.run("MixLights", light_a=lamp, light_b=lamp, mode="add lamps", weight_a=1.0, weight_b=1.0)[0]
    torch.testing.assert_close(
        twice, lamp * 2 ** (1 / 2.2), atol=0.01, rtol=0.01
    )  # double light is gamma 2.2
    with pytest.raises(ValueError, match="'light_b' holds NaN"):
        pack.run("MixLights", light_a=a, light_b=b * float("nan"))
    with pytest.raises(ValueError, match="'light_a' and 'light_b' hold 2 and 1 lights"):
        pack.run("MixLights", light_a=torch.cat([a, b]), light_b=b, mode="sequence")
    with pytest.raises(ValueError, match="'weight_a' and 'weight_b' are both 0"):
        pack.run("MixLights", light_a=a, light_b=b, weight_a=0.0, weight_b=0.0)
    with pytest.raises(ValueError, match="'light_b' holds 2"):
        pack.run("MixLights", light_a=a.expand(3, -1, -1), light_b=torch.cat([a, b]))
    with pytest.raises(ValueError, match="light holds NaN"):
        pack.run("SHLightEdit", face_model=head, face_code=face[3], light=a * float("nan"))


def test_many_faces_are_lit_in_parts_and_can_be_stopped(pack, head, face, monkeypatch):
    g = torch.Generator().manual_seed(0)
    code = face[3].expand(7)
    code = code.replace(light=code.light * (0.8 + 0.4 * torch.rand(7, 1, 1, generator=g)))
    lights = code.light.flip(0)
    run = lambda **how: pack.run("SHLightEdit", face_model=head, face_code=code, mix=0.7, **how)  # noqa: E731
    whole = [run(), run(light=lights), run(light=lights[:1])]
    monkeypatch.setattr(pack.nodes_module.light, "FACES", 3)
    pack.host.progress.clear()
    for want, how in zip(whole, ({}, {"light": lights}, {"light": lights[:1]}), strict=True):
        lit, light, ball = run(**how)
        torch.testing.assert_close(light, want[1], atol=1e-5, rtol=0)
        torch.testing.assert_close(ball, want[2], atol=1e-5, rtol=0)
        assert torch.equal(lit.light, light) and torch.equal(lit.shape, code.shape) and len(ball) == 7
    assert [p[:2] for p in pack.host.progress] == [(i, 3) for i in (1, 2, 3)] * 3
    pack.host.interrupt_after = len(pack.host.progress) + 1
    with pytest.raises(host_double.Interrupted):
        run()
    assert len(pack.host.progress) == 10
    with pytest.raises(ValueError, match="'mode' is one of model range, raw, not 'cooked'"):
        run(mode="cooked")


def test_one_ball_serves_many_lights(pack, monkeypatch):
    core = pack.core
    lights = torch.randn(5, 9, 3, generator=torch.Generator().manual_seed(0))
    shade, sizes = core.sh.shade, []
    monkeypatch.setattr(core.sh, "shade", lambda n, v: sizes.append(len(n)) or shade(n, v))
    balls = core.light_prior.ball(lights, 32)
    assert sizes == [1]  # no normals for each light
    assert torch.equal(balls, torch.cat([core.light_prior.ball(v, 32) for v in lights.split(1)]))
