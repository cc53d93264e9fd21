"""What DiFaReli is told of a photo, against recorded values and against its own definitions."""

import math
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from rig_core import buffers, checkpoints, conditions, raster, sh
from rig_core.estimators import parsing
from rig_core.face import FaceCode
from rig_core.heads.flame import Flame
from tests.golden_files import FOLDER, golden

SIZE = 64


@pytest.fixture(scope="module")
def head():
    return checkpoints.load_head()


@pytest.fixture(scope="module")
def code(head):
    code = head.mean_code(1, (SIZE, SIZE))
    return code.replace(light=lamp(0.8, 0.6, 0.6))


def lamp(x, y, z, ambient=0.4):
    return sh.from_direction(torch.tensor([[float(x), y, z]]), intensity=0.7, ambient=ambient)


def flame_head(*masked):
    """The FLAME-like model of the recordings, with a mask "face" of the given vertices."""
    t = load_file(FOLDER / "flame_synthetic.safetensors")
    tensors = {k.split(".")[1]: v for k, v in t.items() if k.startswith(("flame.", "lmk."))}
    tensors |= {"uv": t["uv.vt"], "uv_faces": t["uv.faces"]}
    if masked:
        tensors["mask.face"] = torch.zeros(len(tensors["v_template"]))
        tensors["mask.face"][torch.stack(masked)] = 1
    return Flame.from_tensors(tensors)


def flame_code(t, light):
    n = torch.zeros(1, 50)
    return FaceCode(t["shape"], n, t["exp"], t["pose"], t["cam"], light, t["crop_tform"], (128, 128), "flame")


def flat(n, **fields):
    """Codes of n faces without a head."""
    z = {k: torch.zeros(n, d) for k, d in (("shape", 2), ("tex", 1), ("exp", 2), ("pose", 6), ("cam", 3))}
    crop = torch.eye(3).expand(n, 3, 3)
    return FaceCode(**z | fields, light=torch.zeros(n, 9, 3), crop=crop, size=(8, 8), head="flame")


# --------------------------------------------------------------------------------------------- the vector


def test_vector_is_the_published_one():
    t, _ = golden("difareli_cond_params")
    code = flat(2, **{k: t[k] for k in ("shape", "pose", "exp", "cam")})
    assert torch.equal(conditions.vector(code, t["faceemb"], t["shadow"]), t["cond_params"])


def test_vector_repeats_what_there_is_one_of():
    embed, shadow = torch.randn(1, 4), torch.tensor([[0.0], [1], [2]])
    out = conditions.vector(flat(1), embed, shadow)
    assert out.shape == (3, 2 + 6 + 2 + 3 + 4 + 1)
    assert torch.equal(out[:, -1:], shadow) and torch.equal(out[:, -5:-1], embed.expand(3, 4))
    assert torch.equal(out, conditions.vector(flat(3), embed.expand(3, 4), shadow[:, 0]))


def test_vectors_that_cannot_be():
    embed, shadow, nan = torch.zeros(1, 4), torch.zeros(1, 1), math.nan
    with pytest.raises(ValueError, match="2 faces, 1 embeddings and 3 shadow scalars differ"):
        conditions.vector(flat(2), embed, shadow.expand(3, 1))
    with pytest.raises(ValueError, match="the embedding is not finite"):
        conditions.vector(flat(1), embed + nan, shadow)
    with pytest.raises(ValueError, match="the shadow scalar is not finite"):
        conditions.vector(flat(1), embed, shadow + math.inf)
    with pytest.raises(ValueError, match="the face code is not finite"):
        conditions.vector(flat(1, pose=torch.full((1, 6), nan)), embed, shadow)


# ------------------------------------------------------------------------------------ the shading reference


def test_published_reference_of_the_face_part():
    t, _ = golden("difareli_deca_render")
    head = flame_head(*t["v_mask"])
    part = conditions.face_part(head)
    wanted = head.faces[t["f_mask"]]
    assert torch.equal(torch.unique(part, dim=0), torch.unique(wanted, dim=0))
    order = [f.mul(torch.tensor([90000, 300, 1])).sum(1).sort().values for f in (part, wanted)]
    assert torch.equal(*order)  # as often, too
    code = flame_code(t, t["light"])
    drawn = conditions.draw(head, code)
    assert torch.equal(drawn.mask, t["alpha_masked"].float())
    found = conditions.reference(drawn.normal, drawn.mask, code.light)
    assert (found - t["shape_images_masked"]).abs().max() < 1e-4
    assert (found - t["shape_images_masked"]).abs().mean() < 1e-6
    assert (conditions.fit(found, 64) - t["cond_render"]).abs().max() < 1e-4
    turned = torch.einsum("bij,bjhw->bihw", t["R_normals"], drawn.normal)
    found = conditions.reference(turned, drawn.mask, code.light)
    assert (found - t["shape_images_rotated"]).abs().max() < 1e-4


def test_published_reference_of_a_whole_head():
    t, _ = golden("difareli_deca_render")
    head, code = flame_head(), flame_code(t, t["light_nomask"])
    assert conditions.face_part(head) is head.faces
    drawn = conditions.draw(head, code)
    found = conditions.reference(drawn.normal, drawn.mask, code.light)
    assert (found - t["shape_images_nomask"]).abs().max() < 1e-4


def test_flame_is_drawn_at_256_and_made_smaller():
    t, _ = golden("difareli_deca_render")
    head, code = flame_head(*t["v_mask"]), flame_code(t, t["light"])
    large = conditions.shading_reference(head, code, 256)
    assert large.shape == (1, 3, 256, 256)
    assert torch.equal(conditions.shading_reference(head, code, 64), conditions.fit(large, 64))
    lit = conditions.shading_reference(head, code, 64, torch.ones(1, 1, 64, 64))
    torch.testing.assert_close(lit, conditions.fit(large, 64))


def test_normals_are_cut_as_the_photo_sees_them(head, code):
    """By the normals of the projected mesh, whose depth the crop does not scale."""
    pose = code.pose.clone()
    pose[:, 1] = 1.2
    zoom = torch.tensor([[2.0, 0, -10], [0, 2, -12], [0, 0, 1]])
    differ = []
    for crop in (code.crop, code.crop @ zoom, code.crop @ zoom.inverse()):
        drawn = conditions.draw(head, code.replace(pose=pose, crop=crop))
        seen = raster.vertex_normals(drawn.points, drawn.faces)
        away = raster.interpolate_verts(drawn.fragments, drawn.faces, seen)[:, 2:]  # z away from the viewer
        covered = drawn.fragments.mask
        assert torch.equal(drawn.mask, covered * (away < 0.15))
        differ.append(int((drawn.mask != covered * (drawn.normal[:, 2:] > -0.15)).sum()))
    assert differ[0] == 0 and differ[1] > 0  # a crop of the whole photo keeps the model's own normals


def test_reference_is_grey_shading_on_the_head_and_nothing_elsewhere(head, code):
    out = conditions.shading_reference(head, code, SIZE)
    fragments, normal, _ = buffers.geometry(head, code)
    inside = (fragments.mask > 0) & (normal[:, 2:] > -0.1)
    wanted = (sh.basis(normal.permute(0, 2, 3, 1)) @ code.light[:, None]).permute(0, 3, 1, 2) * 180 / 255
    assert ((out - wanted) * inside).abs().max() < 1e-5
    assert (out * (1 - fragments.mask)).abs().max() == 0 and inside.float().mean() > 0.2


def test_reference_is_linear_in_the_light(head, code):
    d = conditions.draw(head, code)
    a, b = lamp(1, 0.2, 0.5), lamp(-0.3, 1, 0.7, 0.1)
    parts = [conditions.reference(d.normal, d.mask, v) for v in (a, b, 2 * a - 0.5 * b)]
    torch.testing.assert_close(parts[2], 2 * parts[0] - 0.5 * parts[1], rtol=0, atol=1e-5)
    assert parts[0].min() < 0.02 and (parts[0] - parts[1]).abs().max() > 0.1


def test_many_lights_on_one_geometry(head, code):
    d, lights = conditions.draw(head, code), torch.cat([lamp(1, 0, 1), lamp(0, 1, 1), lamp(-1, 0, 1)])
    visible = torch.cat([conditions.visibility(head, code, light=v[None], drawn=d) for v in lights])
    together = conditions.reference(d.normal, d.mask, lights, visible)
    for i in range(3):
        one = code.replace(light=lights[i : i + 1])
        alone = conditions.shading_reference(head, one, SIZE, conditions.visibility(head, one, SIZE))
        torch.testing.assert_close(together[i : i + 1], alone, rtol=0, atol=1e-6)


def test_cast_shadows_take_direct_light_only(head, code):
    d = conditions.draw(head, code)
    plain = conditions.reference(d.normal, d.mask, code.light)
    dark = conditions.reference(d.normal, d.mask, code.light, torch.zeros_like(d.mask))
    half = conditions.reference(d.normal, d.mask, code.light, torch.full_like(d.mask, 0.5))
    assert torch.equal(conditions.reference(d.normal, d.mask, code.light, torch.ones_like(d.mask)), plain)
    torch.testing.assert_close(half, (plain + dark) / 2)
    towards = sh.direction(code.light)[:, :, None, None]
    facing = (d.normal * towards).sum(1, keepdim=True)
    front, back = (sh.shade(v, code.light) * conditions.GREY for v in (towards, -towards))
    taken, share = plain - dark, conditions.BLOCKED * (front - back) * facing.clamp_min(0)
    assert taken.min() > -1e-6 and taken.max() > 0.1
    assert taken[(facing <= 0).expand_as(taken)].abs().max() < 1e-6  # nothing direct arrives there
    assert (taken <= share + 1e-5).all() and (dark >= torch.minimum(plain, back / 2) - 1e-5).all()
    bright = (dark > back / 2 + 1e-3) & (d.mask > 0)
    assert bright.float().mean() > 0.1 and ((taken - share) * bright).abs().max() < 1e-5
    double = conditions.reference(d.normal, d.mask, 2 * code.light, torch.zeros_like(d.mask))
    torch.testing.assert_close(double, 2 * dark, rtol=0, atol=1e-5)


def test_visibility_is_one_outside_and_follows_the_light(head, code):
    right, left = (conditions.visibility(head, code, SIZE, lamp(x, 0, 0.5)) for x in (1, -1))
    mask = conditions.draw(head, code).fragments.mask
    for v in (right, left):
        assert v.shape == (1, 1, SIZE, SIZE) and v.min() == 0 and v.max() == 1
        assert (v[mask == 0] == 1).all()
    # what a light from the right of the picture does not reach is on the left
    middle, x = (mask * torch.arange(SIZE)).sum() / mask.sum(), torch.arange(SIZE)
    for v, side in ((right, -1), (left, 1)):
        shadow = (1 - v) * mask
        assert side * ((shadow * x).sum() / shadow.sum() - middle) > 5
    front = conditions.visibility(head, code, SIZE, lamp(0, 0, 1))
    assert (front * mask).sum() / mask.sum() > 0.9


def test_wrong_heads_and_lights(head, code):
    with pytest.raises(ValueError, match="belongs to the 'flame' head"):
        conditions.shading_reference(head, replace(code, head="flame"), SIZE)
    with pytest.raises(ValueError, match="light holds NaN"):
        conditions.shading_reference(head, code.replace(light=code.light * math.nan), SIZE)


# ------------------------------------------------------------------------- background, sizes, sequences


def test_background_keeps_pixels_outside_the_matte_and_is_black_inside():
    g = torch.Generator().manual_seed(0)
    image, matte = torch.rand(2, 3, 8, 8, generator=g), torch.zeros(2, 1, 8, 8)
    matte[:, :, 2:5], matte[:, :, 5] = 1, 0.5
    out = conditions.background(image, matte)
    assert torch.equal(out[:, :, 6:], image[:, :, 6:] * 2 - 1)
    assert (out[:, :, 2:5] == -1).all()
    torch.testing.assert_close(out[:, :, 5], image[:, :, 5] - 1)


def test_pictures_of_the_published_dataset():
    t, _ = golden("difareli_dataset_item")
    image = t["image_u8"][None, None].float() / 255
    behind = conditions.background(image, parsing.head_mask(t["seg"][None].long()))
    for n in (128, 96):
        for name, picture in (("image", image), ("background", behind / 2 + 0.5)):
            found, wanted = conditions.shrink(picture, n)[0, 0] * 255, t[f"{name}_{n}"].float()
            assert (found - wanted).abs().max() < 1.01  # the fixed-point weights of PIL round differently
            assert ((found - wanted).abs() > 0.01).float().mean() < 1e-3
        error = conditions.fit(t["render"][None, None], n)[0, 0] - t[f"render_{n}"]
        assert error.abs().max() < 2e-5
    assert conditions.shrink(image, 256) is image and conditions.fit(image, 256) is image


def test_spatial_joins_reference_and_background():
    reference, background = torch.rand(3, 3, 4, 4), torch.rand(1, 3, 4, 4)
    out = conditions.spatial(reference, background)
    assert torch.equal(out[:, :3], reference) and torch.equal(out[2:, 3:], background)
    assert conditions.spatial(background, reference).shape == (3, 6, 4, 4)


@pytest.mark.parametrize("n", [7, 10])
def test_shadow_sweeps_are_the_published_ones(n):
    t, _ = golden("difareli_shadow_sweep")
    own = t["shadow"][:1]
    for kind, options in (("remove", {"goal": -1.0}), ("add", {"by": 5.0})):
        found = conditions.shadow_sweep(own, n, **options)
        assert found.shape == (n, 1) and found[0] == own[0]
        torch.testing.assert_close(found, t[f"n{n}.{kind}"], rtol=0, atol=1e-6)
    half = torch.cat([conditions.shadow_sweep(own, n // 2, goal=g) for g in (-5.0, 10.0)])
    wanted = torch.cat([half[: n // 2].flip(0), half[n // 2 + 1 :]])  # -5 to the own value to 10
    torch.testing.assert_close(wanted, t[f"n{n}.vary_range"][1:], rtol=0, atol=1e-6)
