"""Synthetic portraits: exact truth, one seed a part, light that is what it claims to be."""

import functools

import pytest
import torch

from rig_core import buffers, data, sh
from training import synth, synth_light, synth_scene
from training import synth_mesh as mesh

SIZE = 64


@functools.cache
def portraits(count: int = 10) -> synth.SynthBatch:
    return synth.render(range(count), SIZE)


@functools.cache
def relit(count: int = 8) -> synth.SynthBatch:
    """One person in one pose, place and camera under `count` lights."""
    one = [3] * count
    return synth.render(range(40, 40 + count), SIZE, person=one, pose=one, scene=one, camera=one)


def test_a_portrait_depends_on_its_seed_only():
    alone, among = synth.render([7], SIZE), portraits()[7]
    torch.testing.assert_close(alone.image, among.image, rtol=0, atol=0)
    torch.testing.assert_close(alone.code.light, among.code.light, rtol=0, atol=0)
    assert (portraits()[6].image - among.image).abs().mean() > 0.02


def test_seeds_of_the_parts():
    base = portraits()
    other = synth.render([0, 1], SIZE, person=[5, 6])
    torch.testing.assert_close(other.code.shape, base.code.shape[5:7])
    torch.testing.assert_close(other.code.exp, base.code.exp[:2])
    torch.testing.assert_close(other.key, base.key[:2])
    with pytest.raises(ValueError, match="2 seeds but 1 for light"):
        synth.render([0, 1], SIZE, light=[3])
    with pytest.raises(ValueError, match="at least one"):
        synth.render([], SIZE)
    with pytest.raises(ValueError, match="even"):
        synth.render([0], 65)


def test_values_and_shapes():
    b = portraits()
    assert b.image.shape == (10, 3, SIZE, SIZE) and b.code.head == "open" and b.code.size == (SIZE, SIZE)
    assert b.image.min() >= 0 and b.image.max() <= 1
    for name in ("head", "skin", "hair", "cloth", "background", "shadow"):
        m = getattr(b, name)
        assert m.shape == (10, 1, SIZE, SIZE) and m.min() >= 0 and m.max() <= 1 + 1e-6, name
    # what is seen adds up; eyes, mouth and glasses make the rest
    total = b.skin + b.hair + b.cloth + b.background
    assert total.max() <= 1 + 1e-4 and total.mean() > 0.95
    assert len(b[2:4].image) == len(b[2:4].code.light) == 2


def test_landmarks_are_the_heads_and_in_the_picture():
    b, head = portraits(), mesh.template().head
    verts = head.verts(b.code.shape, b.code.exp, b.code.pose)
    points = buffers.to_image(head.landmarks(verts, b.code.pose), b.code)
    torch.testing.assert_close(buffers.to_pixels(points, b.code.size), b.landmarks, rtol=0, atol=0.01)
    assert b.landmarks.min() > 0 and b.landmarks.max() < SIZE - 1
    eyes = b.landmarks[:, 42:48].mean(1) - b.landmarks[:, 36:42].mean(1)
    assert (eyes[:, 0] > 0).all()  # the subject's right eye is left in the picture
    assert eyes.norm(dim=1).median() == pytest.approx(SIZE / 4, rel=0.15)  # as FFHQ crops
    assert (eyes[:, 1] / eyes[:, 0]).abs().max() < 0.25  # upright


def test_head_mask_is_the_buffers_mask():
    b = portraits()
    shown = buffers.render(mesh.template().head, b.code).mask
    inside = shown[:, :, : int(0.8 * SIZE)]  # below, the bust covers the neck
    agree = ((b.head[:, :, : int(0.8 * SIZE)] > 0.5) == (inside > 0.5)).float().mean()
    assert agree > 0.97


def correlation(a: torch.Tensor, b: torch.Tensor) -> float:
    return torch.corrcoef(torch.stack([a, b]))[0, 1].item()


def test_picture_agrees_with_buffers_where_neither_gloss_nor_shadow():
    """Exactly in level; and where the light changes, as the buffers say it does, pixel by pixel."""
    b = relit()
    shown = buffers.render(mesh.template().head, b.code)
    y = torch.tensor(sh.LUMINANCE)
    plain = ((b.skin > 0.99) & (b.shadow < 0.05)).all(0)[0] & (shown.mask[0, 0] > 0)
    plain[: int(b.landmarks[0, 17:27, 1].min())] = False  # the head's albedo paints hair on the scalp
    assert plain.sum() > 150
    seen = torch.einsum("bchw,c->bhw", b.image, y)[:, plain]
    truth = torch.einsum("bchw,c->bhw", shown.rendered, y)[:, plain]
    torch.testing.assert_close(seen.mean(1) / truth.mean(1), torch.ones(len(b)), atol=0.15, rtol=0)
    for i in range(len(b)):
        change, expected = ((v / v.mean(0)).log()[i] for v in (seen, truth))
        if expected.std() > 0.05:
            assert correlation(change, expected) > 0.85


def test_same_person_other_light_keeps_the_geometry():
    b = relit()
    for name in ("head", "skin", "hair", "cloth", "background", "landmarks"):
        v = getattr(b, name)
        torch.testing.assert_close(v, v[:1].expand_as(v), rtol=0, atol=0)
    assert (b.image[1:] - b.image[:1]).abs().mean((1, 2, 3)).min() > 0.01
    # the backdrop stays but for the sensor
    where = (b.background[:1] > 0.99).expand_as(b.image)
    assert (b.image[1:] - b.image[:1])[where[1:]].abs().median() < 0.02


def test_light_fitted_to_the_picture_points_where_the_truth_does():
    b = relit()
    shown = buffers.render(mesh.template().head, b.code)
    angles = []
    for i in range(len(b)):
        on = ((b.skin > 0.9) & (b.shadow < 0.1) & (shown.mask > 0))[i, 0]
        albedo = shown.albedo[i].mean(0)
        on &= (albedo / albedo[on].median() - 1).abs() < 0.15  # plain skin: no brows, no lips
        shade = (b.image[i] / shown.albedo[i].clamp_min(0.05))[:, on].mean(0)
        y = sh.basis(torch.nn.functional.normalize(shown.normal[i][:, on], dim=0).T)
        ridge = 0.001 * len(y) * torch.diag(torch.tensor([0.0] + [1.0] * 3 + [3.0] * 5))
        fit = torch.linalg.solve(y.T @ y + ridge, y.T @ shade)[1:3]
        truth = sh.luminance(b.code.light[i : i + 1])[0]
        if truth[1:3].norm() > 0.05 * truth[0]:  # not flat; across the picture: normals cover the front only
            cos = torch.nn.functional.cosine_similarity(fit, truth[1:3], dim=0)
            angles.append(torch.rad2deg(cos.clamp(-1, 1).acos()).item())
    assert len(angles) >= 5 and torch.tensor(angles).median() < 8 and max(angles) < 25


def test_truth_is_the_lights_projection():
    """A Lambertian sphere under the same samples, without shadows, shades as the linear light says."""
    lights = synth_scene.stack(synth_light.Lights, [synth_scene.sample_light(s) for s in range(6)])
    n = synth_light.sphere(400)[None].expand(6, -1, -1)
    cos = torch.einsum("bnc,blc->bln", n, lights.direction).clamp_min(0)
    truth = torch.einsum("bln,blc->bnc", cos, lights.colour)
    guess = sh.basis(n) @ synth_light.irradiance_sh(lights)
    assert (guess - truth).abs().mean() < 0.08 * truth.mean()  # what three bands leave of a clamped cosine
    torch.testing.assert_close(guess.mean(1), truth.mean(1), atol=0, rtol=0.02)


def test_shadows_only_darken():
    b = relit()
    seen = synth_light.visibility

    def everything(maps, points, normals, bias=0.0):
        return torch.ones_like(seen(maps, points, normals, bias))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(synth.pixels, "visibility", everything)
        patch.setattr(synth.pixels, "exposure", lambda light, bare, camera: light.new_ones(3) * 0.8)
        patch.setattr(synth.lens, "develop", lambda radiance, camera: radiance)
        one = [3] * 4
        free = synth.render(range(40, 44), SIZE, person=one, pose=one, scene=one, camera=one)
        patch.setattr(synth.pixels, "visibility", seen)
        dark = synth.render(range(40, 44), SIZE, person=one, pose=one, scene=one, camera=one)
    difference = dark.image - free.image
    assert difference.max() < 1e-5 and (difference < -0.01).float().mean() > 0.01
    assert free.shadow.max() < 1e-4 and (free.cast < 1e-4).all()
    assert (b.cast > 0.005).any() and b.shadow.max() > 0.5


def test_shadow_of_a_plate():
    """A square plate half a unit above the ground darkens exactly the ground below it."""
    plate = torch.tensor([[-0.5, -0.5, 0.5], [0.5, -0.5, 0.5], [0.5, 0.47, 0.5], [-0.5, 0.5, 0.5]])[None]
    faces = torch.tensor([[0, 1, 2], [0, 2, 3]])
    up = torch.tensor([[[0.0, 0.0, 1.0]]])
    maps = synth_light.shadow_maps(plate, faces, up, 64, (torch.zeros(1, 3), torch.ones(1)))
    points = torch.tensor([[[0.0, 0.0, 0.0], [0.4, 0.4, 0.0], [0.6, 0.0, 0.0], [0.0, 0.0, 0.7]]])
    seen = synth_light.visibility(maps, points, up.expand(1, 4, 3))
    torch.testing.assert_close(seen, torch.tensor([[[0.0, 0.0, 1.0, 1.0]]]))


def test_people_and_lights_are_varied():
    heads = mesh.template().head
    people = [synth_scene.sample_person(s, heads.sizes) for s in range(200)]
    melanin = torch.stack([p["tex"][0] for p in people])
    assert torch.histc(melanin, 4, -2.2, 2.2).min() > 25  # from very light to very dark
    assert 0.35 < sum(p["female"] for p in people) / 200 < 0.65
    assert 0.1 < sum(p["glasses"][0].item() for p in people) / 200 < 0.35
    keys = torch.stack([synth_scene.sample_light(s)["key"] for s in range(200)])
    assert keys.norm(dim=1).sub(1).abs().max() < 1e-5
    for sign in (-1, 1):
        assert ((sign * keys[:, 0]) > 0.5).sum() > 30
    assert (keys[:, 1] < -0.3).sum() > 3 and (keys[:, 1] > 0.8).sum() > 5
    poses = [synth_scene.sample_pose(s, heads.expression_names, heads.expressions) for s in range(200)]
    turn = torch.rad2deg(torch.stack([p["turn"] for p in poses]))
    assert 30 < turn[:, 1].abs().max() <= 45.01 and turn[:, 0].abs().max() <= 20.01


def test_dataset_folder(tmp_path):
    synth.write(tmp_path, 3, 32, 10, each=1, workers=1, shard=2)
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "images").iterdir()}
    synth.write(tmp_path, 4, 32, 10, each=1, workers=1, shard=2)  # goes on
    ds = data.Dataset.open(tmp_path)
    assert len(ds) == 4 and all(p.stat().st_mtime_ns == t for p, t in before.items())
    truth = synth.render([10, 13], 32)
    torch.testing.assert_close(ds.codes([0, 3]).light, truth.code.light)
    assert (ds.images([0, 3], 32) / 255 - truth.image).abs().max() <= 0.5 / 255 + 1e-6
