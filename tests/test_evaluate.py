import math
import sys
from functools import partial

import pytest
import torch

from rig_core import align, buffers, checkpoints, data, pipeline, sh
from rig_core.denoisers.relight import DiFaReli, RelightConfig
from rig_core.denoisers.rig import DiffusionRig, RigConfig
from training import evaluate, evaluate_fit, evaluate_pairs, evaluate_photos, measures, synth

SIZE = 32


@pytest.fixture(scope="module")
def head():
    return checkpoints.load_head()


@pytest.fixture(scope="module")
def tools(head):
    torch.manual_seed(0)
    relight = DiFaReli(RelightConfig(SIZE, 16, (1, 2), 1, (), 1, 0.0, 8, cond_dim=241, proj_dim=8))
    rig = DiffusionRig(RigConfig(SIZE, 16, (1, 2), 1, (), 1, norm_groups=8, latent_dim=8, encoder_width=4))
    for model in (relight, rig):
        for p in model.parameters():  # a fresh network ends in zeros
            if not p.any():
                torch.nn.init.normal_(p, std=0.02)
        model.eval().requires_grad_(False)
    return evaluate_pairs.Tools(head, rig, relight, checkpoints.load_identity(), checkpoints.load_shadow())


@pytest.fixture
def quick(monkeypatch):
    """Few steps, whatever the picture looks like."""
    monkeypatch.setattr(pipeline, "to_noise", partial(pipeline.to_noise, steps="quad5", solver="heun"))
    monkeypatch.setattr(pipeline, "paint", partial(pipeline.paint, steps="2", solver="ddim"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A dataset of two renders as validation photos, one of them with a relit copy."""
    folder = tmp_path_factory.mktemp("photos")
    batch = synth.render([1, 2, 1], SIZE, light=[1, 2, 3])
    tags = [("photo",), ("photo",), ("relit",)]
    data.append(folder, ["a", "b", "c"], batch.image, batch.code, split="val", tags=tags)
    data.finish(folder)
    return folder


def lambertian_pair(head):
    """A pair without anything that the buffers lack: the ratio image must be exact."""
    light = lambda x: sh.encode_light(  # noqa: E731
        sh.from_direction(torch.tensor([[x, 0.2, 1.0]]), 0.4, softness=0.4, ambient=0.3)
    )
    source = head.mean_code(1, (64, 64)).replace(light=light(-1.0))
    target = source.replace(light=light(1.0))
    a, b = buffers.render(head, source), buffers.render(head, target)
    portrait = pipeline.Portrait(a.rendered.clamp(0, 1), align.Crop(torch.eye(3)[None], 64), source)
    return evaluate_pairs.Pair(portrait, b.rendered.clamp(0, 1), target, a.mask, a.mask)


# ----------------------------------------------------------------------------------------- the measures


def test_psnr():
    a, b = torch.zeros(1, 3, 4, 4), torch.full((1, 3, 4, 4), 0.1)
    assert measures.psnr(a, b) == pytest.approx(20, abs=1e-3)
    mask = torch.zeros(1, 1, 4, 4)
    mask[..., 0] = 1
    b[..., 1:] = 0.9
    assert measures.psnr(a, b, mask) == pytest.approx(20, abs=1e-3)
    assert measures.psnr(a.repeat(2, 1, 1, 1), b.repeat(2, 1, 1, 1), mask) == pytest.approx(20, abs=1e-3)
    assert measures.psnr(a, a) == 100


def test_mse():
    a, b = torch.zeros(2, 3, 4, 4), torch.full((2, 3, 4, 4), 0.5)
    b[:, 1] = 0
    mask = torch.zeros(1, 1, 4, 4)
    mask[..., :2, :] = 1
    assert measures.mse(a, b) == measures.mse(a, b, mask) == pytest.approx(0.25 * 2 / 3)
    b[:, :, 2:] = 0
    assert measures.mse(a, b) == pytest.approx(0.25 / 3)
    assert measures.mse(a, b, mask) == pytest.approx(0.5 / 3) and measures.mse(a, b, 1 - mask) == 0


def test_moved_is_in_eye_distances():
    """Eyes 50 px apart; all points 3 px to the left and 4 px down: 10 %."""
    a = torch.rand(2, 51, 2, generator=torch.Generator().manual_seed(0)) * 100
    a[:, 19:25], a[:, 25:31] = torch.tensor([10.0, 20.0]), torch.tensor([40.0, 60.0])
    b = a + torch.tensor([-3.0, 4.0])
    assert torch.allclose(measures.moved(a, b), torch.full((2,), 10.0), atol=1e-4)
    b[1, 31:] = a[1, 31:]
    assert float(measures.moved(a, b)[1]) == pytest.approx(10 * 31 / 51, abs=1e-4)


def test_identity_cosine(tools):
    people = synth.render([910_001, 910_002], 112).image
    recognise = tools.recognise
    same, other = (measures.identity_cosine(recognise, people, b) for b in (people, people.flip(0)))
    darker = measures.identity_cosine(recognise, people, people * 0.9)
    assert same.shape == (2,) and torch.allclose(same, torch.ones(2), atol=1e-5)
    assert (darker > 0.9).all() and (other < 0.6).all()


def test_interval_of_a_mean():
    """Of N(0,1): the mean and 1.96 / sqrt(n) to either side; not a number is left out."""
    values = torch.randn(400, generator=torch.Generator().manual_seed(0))
    low, high = measures.interval(values)
    mean, half = float(values.mean()), 1.96 * float(values.std()) / 20
    assert low == pytest.approx(mean - half, abs=0.15 * half) and high == pytest.approx(
        mean + half, abs=0.15 * half
    )
    assert measures.interval(torch.cat([values, torch.tensor([math.nan])])) == pytest.approx(
        (low, high), abs=0.02
    )
    assert measures.interval(torch.tensor([0.3, math.nan])) == pytest.approx((0.3, 0.3))
    assert all(map(math.isnan, measures.interval(torch.tensor([math.nan]))))


def test_ssim_is_one_only_for_equal_pictures(head):
    pytest.importorskip("kornia", reason="structural similarity needs `pip install kornia`")
    pair = lambertian_pair(head)
    assert measures.ssim(pair.truth, pair.truth, pair.head) == pytest.approx(1, abs=1e-5)
    assert measures.ssim(pair.source.image, pair.truth, pair.head) < 0.95


def lab_to_srgb(lightness, a, b):
    """CIELAB (D65) -> sRGB 0..1, from the definitions."""
    fy = (lightness + 16) / 116
    f = [fy + a / 500, fy, fy - b / 200]
    x, y, z = (
        w * (v**3 if v > 6 / 29 else (v - 4 / 29) * 108 / 841) for w, v in zip((0.95047, 1, 1.08883), f)
    )
    linear = torch.tensor(
        [
            3.2404542 * x - 1.5371385 * y - 0.4985314 * z,
            -0.9692660 * x + 1.8760108 * y + 0.0415560 * z,
            0.0556434 * x - 0.2040259 * y + 1.0572252 * z,
        ]
    )
    return align.to_display(linear)


@pytest.mark.parametrize("lightness, b", [(70.0, 15.0), (60.0, 20.0), (50.0, 18.0), (35.0, 14.0)])
def test_ita_of_known_colours(lightness, b):
    pytest.importorskip("kornia", reason="colour conversion needs `pip install kornia`")
    image = torch.rand(1, 3, 4, 4)
    mask = torch.zeros(1, 1, 4, 4)
    mask[..., 1:3, 1:3] = 1
    image[..., 1:3, 1:3] = lab_to_srgb(lightness, 12.0, b)[:, None, None]
    want = math.degrees(math.atan2(lightness - 50, b))
    assert float(measures.ita(image, mask)) == pytest.approx(want, abs=0.1)


def test_skin_error_is_the_difference_of_angles():
    pytest.importorskip("kornia", reason="colour conversion needs `pip install kornia`")
    a, b = (lab_to_srgb(v, 10.0, 15.0)[None, :, None, None].expand(1, 3, 4, 4) for v in (65.0, 50.0))
    mask = torch.ones(1, 1, 4, 4)
    assert measures.skin_error(a, a, mask) == 0
    assert measures.skin_error(a, b, mask) == pytest.approx(45, abs=0.2)


def test_response_of_a_synthetic_shadow():
    """Linear light below the mask falls from 0.5 to 0.3 as the scalar rises: 50 % of the mean of 0.4."""
    scalars = torch.linspace(-3, 1, 5)[:, None]
    mask = torch.zeros(1, 1, 8, 8)
    mask[..., :4] = 1
    dark = align.to_display(torch.linspace(0.5, 0.3, 5))[:, None, None, None].expand(5, 3, 8, 8)
    images = torch.where(mask > 0, dark, 0.7)
    values = measures.brightness(images, mask)
    assert torch.allclose(values, torch.linspace(0.5, 0.3, 5), atol=1e-4)
    assert measures.response(scalars, values) == pytest.approx(-50, abs=0.05)
    assert measures.response(scalars, measures.brightness(images, 1 - mask)) == pytest.approx(0, abs=1e-3)
    assert measures.falling(values)
    assert not measures.falling(values[[0, 1, 3, 2, 4]]) and not measures.falling(values.flip(0))


def test_table():
    text = measures.table(["a", "b"], [["x", 0.12345], ["y", 23.456], [7, None]])
    assert text.splitlines() == ["| a | b |", "| --- | --- |", "| x | 0.123 |", "| y | 23.46 |", "| 7 | - |"]


# -------------------------------------------------------------------------------------------- the pairs


def test_baselines_on_a_lambertian_pair(head):
    pair = lambertian_pair(head)
    outs = evaluate_pairs.baselines(pair, evaluate_pairs.Tools(head, None, None, None, None))
    score = {name: measures.psnr(out, pair.truth, pair.head) for name, out in outs.items()}
    assert score["source unchanged"] < 26
    assert score["ratio image"] > 40
    assert score["Lambertian render"] > 60


def test_held_out_pairs_differ_in_light_alone():
    (pair,) = evaluate_pairs.pairs(1, 64)
    assert torch.equal(pair.source.code.shape, pair.target.shape)
    assert torch.equal(pair.source.code.pose, pair.target.pose)
    assert not torch.allclose(pair.source.code.light, pair.target.light, atol=0.05)
    assert (pair.source.image - pair.truth).abs().mean() > 0.005


def test_fitted_pairs_know_the_pictures_only(head):
    """The light is near the true one, the geometry is the source's own fit."""
    (true,), (fit,) = evaluate_pairs.pairs(1, 64), evaluate_pairs.pairs(1, 64, head)
    assert torch.equal(fit.truth, true.truth)
    assert torch.equal(fit.source.code.shape, fit.target.shape)
    assert not torch.allclose(fit.target.shape, true.target.shape, atol=0.05)
    assert not torch.equal(fit.target.light, fit.source.code.light)
    d = [sh.direction(p.target.light) for p in (true, fit)]
    assert (d[0] * d[1]).sum() > 0.6


def test_a_perfect_method_has_the_best_row(head, tools):
    pytest.importorskip("kornia", reason="structural similarity needs `pip install kornia`")
    pair = lambertian_pair(head)

    def methods(pair, tools):
        return {"perfect": pair.truth, "source unchanged": pair.source.image}

    rows, sheet = evaluate_pairs.against_truth(tools, [pair, pair], (methods,))
    assert len(rows[0]) == len(evaluate_pairs.HEADER)
    assert rows[0][:4] == ["perfect", 100, 100, 100] and rows[0][4] == pytest.approx(1, abs=1e-5)
    assert rows[0][5] == 0 and rows[1][1] < 30
    assert sheet.shape == (3, 3 * 64, 2 * 64)  # the unchanged source is there once


def test_inversions_are_shared(tools, quick, monkeypatch):
    """All of DiFaReli's rows come from two inversions, with the cast-shadow map and without."""
    (pair,) = evaluate_pairs.pairs(1, SIZE)
    casts, real = [], pipeline.to_noise

    def counted(*args, cast=True, **options):
        casts.append(cast)
        return real(*args, cast=cast, **options)

    monkeypatch.setattr(pipeline, "to_noise", counted)
    outs = evaluate_pairs.by_relight(pair, tools)
    assert casts == [True, False] and len(outs) == 8
    assert all(out.shape == pair.truth.shape for out in outs.values())


# ------------------------------------------------------------------------------------------- the photos


def test_photos_leaves_relit_copies_out(folder):
    dataset = data.Dataset.open(folder)
    assert [e.name for e in evaluate_photos.photos(dataset).entries] == ["a", "b"]
    assert len(evaluate_photos.photos(dataset.select(tag="relit"))) == 1


def test_a_perfect_relighter_goes_where_it_is_asked(head, folder):
    """The buffers themselves, relit: the light that is measured is the light that was asked for."""
    code = head.mean_code(1, (128, 128))
    image = buffers.render(head, code).rendered.clamp(0, 1)

    class One:
        size, entries = (128, 128), [None]
        images = staticmethod(lambda picks, size: (image * 255).round().byte())
        codes = staticmethod(lambda picks: code)

    def perfect(portrait, lights):
        result = buffers.render(head, code.expand(len(lights)).replace(light=lights)).rendered.clamp(0, 1)
        return evaluate_photos.Relit(result, 50.0, torch.zeros(1, 1, 128, 128))

    rows = dict(evaluate_photos.on_photos(head, One, [0], perfect))
    assert rows["reconstruction of the unedited photo by the denoiser, dB"] == 50
    assert rows["angle between the light's asked and measured change, degrees"] < 20
    for axis in ("x (left-right)", "y (up-down)"):
        assert rows[f"correlation of asked and measured light: {axis}"] > 0.95
    assert rows["largest change of the background outside the mask, of 255"] > 10  # nothing may change there


def test_cast_shadow_lies_away_from_the_light(head):
    code = head.mean_code(1, (96, 96))
    light = sh.from_direction(torch.tensor([[1.0, 0.5, 0.5]]))
    inside, lit = evaluate_photos.in_shadow(head, code, light)
    x = torch.arange(96.0)
    middle = [float((m * x).sum() / m.sum()) for m in (inside, lit)]
    assert inside.mean() > 0.002 and lit.mean() > 0.05 and (inside * lit).sum() == 0
    assert middle[0] < middle[1]


def test_shadow_response_of_a_synthetic_relighter(head, tools, folder, monkeypatch):
    """A relighter that scales linear light by 1 - scalar / 4 in the shadow answers with that slope."""
    photos = evaluate_photos.photos(data.Dataset.open(folder))

    class Ideal:
        def __init__(self, tools, portrait, trust):
            self.portrait = portrait

        def shadowed(self, light, scalars):
            inside, _ = evaluate_photos.in_shadow(head, self.portrait.code, light)
            image = align.to_linear(self.portrait.image * 0.5 + 0.2)
            return align.to_display(image * (1 - inside * scalars[:, :, None, None] / 4))

    monkeypatch.setattr(evaluate_photos, "Relighter", Ideal)
    scalars = torch.linspace(0, 2, 5)[:, None]
    rows = evaluate_photos.shadow_response(tools, photos, [0, 1], scalars)
    assert rows[0][1] == pytest.approx(-50 / 0.75, abs=0.1)
    assert rows[1][1] == pytest.approx(0, abs=0.01)
    assert rows[2][1] == 1
    assert rows[3][1].endswith("of 2")


def test_the_whole_command(tools, folder, quick, tmp_path, monkeypatch, capsys):
    pytest.importorskip("kornia", reason="structural similarity needs `pip install kornia`")
    for name in ("rig", "relight"):
        checkpoints.save_denoiser(tmp_path / f"{name}.safetensors", getattr(tools, name), {"step": 5})
    monkeypatch.setattr(evaluate, "SHEET", 1)
    out, sheets = tmp_path / "out" / "evaluation.md", tmp_path / "sheets"
    words = f"evaluate --rig {tmp_path}/rig.safetensors --relight {tmp_path}/relight.safetensors"
    words += f" --pairs 1 --photos {folder} --count 1 --out {out} --sheets {sheets}"
    monkeypatch.setattr(sys, "argv", words.split())
    evaluate.main()
    text = out.read_text()
    assert text in capsys.readouterr().out
    assert "DiFaReli: step 5, 32 px" in text and "codes true" in text
    names = [line.split("|")[1].strip() for line in text.splitlines() if line.startswith("|")]
    for name in ("ratio image", "DiffusionRig", "DiFaReli", "DiFaReli, guidance 2"):
        assert name in names
    (outside,) = (line for line in text.splitlines() if "background outside the mask" in line)
    assert outside.split("|")[2:5] == [" 0.000 "] * 3
    assert out.with_suffix(".png").exists()
    names = ("lights", "shadows", "lights_with_ratio", "shadows_with_ratio")
    assert {p.name for p in sheets.iterdir()} == {f"{n}.png" for n in names}


def test_sheets_need_photos(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(sys, "argv", ["evaluate", "--sheets", str(tmp_path)])
    with pytest.raises(SystemExit):
        evaluate.main()
    assert "--photos" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------- the fit


def test_fit_table_of_known_heads(head, tmp_path):
    import json

    code = head.mean_code(1, (256, 256))
    code = pipeline.turn(head, code, yaw=10)
    points = buffers.to_pixels(
        buffers.to_image(head.landmarks(head.verts(code.shape, code.exp, code.pose), code.pose), code),
        code.size,
    )
    (tmp_path / "one.json").write_text(json.dumps({"landmarks": points[0].tolist()}))
    distance, seconds = evaluate_fit.measure(head, evaluate_fit.read_landmarks(tmp_path))
    assert distance.shape == (1, 68) and distance[:, 17:].median() < 0.8 and seconds > 0
    with pytest.raises(FileNotFoundError, match="neither"):
        evaluate_fit.read_landmarks(tmp_path / "nothing")
