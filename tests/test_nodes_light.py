"""SH Light Edit, Light From Photo, Light Orbit, Mix Lights."""

from __future__ import annotations

import pytest
import torch

from tests.node_pack import *  # noqa: F403 the fixtures
from tests.node_pack import SIZE


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
