"""The comparison of folders: matching, measures of known pictures, the files that it writes, its commands."""

import csv
import math
import shutil
import sys
from dataclasses import replace
from functools import partial

import pytest
import torch
from PIL import Image

from rig_core import buffers, checkpoints, data, pipeline
from rig_core.denoisers.relight import DiFaReli, RelightConfig
from rig_core.denoisers.rig import DiffusionRig, RigConfig
from rig_core.heads import FaceModel
from training import evaluate, evaluate_methods, evaluate_pairs, lpips, reinfer, report, synth
from training import evaluate_folders as folders
from training.demo import write

SIZE, SEEDS = 128, (910_001, 910_003)
STEMS = ["a", "b"]


@pytest.fixture(scope="module")
def head():
    return checkpoints.load_head()


@pytest.fixture(scope="module")
def judge(head):
    return folders.Judge(FaceModel(head), checkpoints.load_identity())


@pytest.fixture(scope="module")
def persons():
    return synth.render(SEEDS, SIZE)


@pytest.fixture(scope="module")
def relit():
    return synth.render(SEEDS, SIZE, light=[s + 500_000 for s in SEEDS])


@pytest.fixture
def rooms(persons, relit, tmp_path):
    """Folders: the truth, the same again and darker, and the source, which is under another light."""
    for name, images in {
        "truth": persons.image,
        "same": persons.image,
        "dark": persons.image * 0.5,
        "source": relit.image,
    }.items():
        (tmp_path / name).mkdir()
        for stem, image in zip(STEMS, images, strict=True):
            write(image, tmp_path / name / f"{stem}.png")
    return tmp_path


@pytest.fixture(scope="module")
def seen(judge, persons):
    """The two persons with their landmarks and codes."""
    return [folders.look(judge, image) for image in persons.image.split(1)]


# --------------------------------------------------------------------------------------------- the files


def test_pictures_are_found_by_stem_and_datasets_below_images(rooms, persons, tmp_path):
    assert list(folders.pictures(rooms / "truth")) == STEMS
    (rooms / "truth" / "notes.txt").write_text("no picture")
    assert list(folders.pictures(rooms / "truth")) == STEMS
    data.append(tmp_path / "set", STEMS, persons.image, persons.code)
    data.finish(tmp_path / "set")
    assert folders.pictures(tmp_path / "set")["a"] == tmp_path / "set" / "images" / "a.png"


def test_folders_that_cannot_be_used(rooms, tmp_path):
    with pytest.raises(ValueError, match="is no folder"):
        folders.pictures(tmp_path / "nothing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no pictures"):
        folders.pictures(tmp_path / "empty")
    shutil.copy(rooms / "truth" / "a.png", rooms / "truth" / "a.JPG")
    with pytest.raises(ValueError, match="one name"):
        folders.pictures(rooms / "truth")


def test_only_what_all_folders_have_is_compared():
    some = {k: dict.fromkeys(v) for k, v in {"truth": "abcd", "x": "bcde", "y": "cb"}.items()}
    stems, lines = folders.match(some)
    assert stems == ["b", "c"]
    assert lines == ["truth lacks 1: e", "x lacks 1: a", "y lacks 3: a, d, e"]
    with pytest.raises(ValueError, match="no picture is in all folders"):
        folders.match({"truth": {"a": None}, "x": {"b": None}})


def test_long_lists_are_cut():
    assert folders.some([str(i) for i in range(11)]) == "0, 1, 2, 3, 4, 5, 6, 7 and 3 more"


def test_a_picture_is_brought_to_the_size_of_its_truth(tmp_path):
    flat = torch.tensor([0.2, 0.4, 0.6])[:, None, None].expand(3, 40, 60)
    write(flat, tmp_path / "a.png")
    assert folders.read(tmp_path / "a.png").shape == (1, 3, 40, 60)
    twice = folders.read(tmp_path / "a.png", (80, 120))
    assert twice.shape == (1, 3, 80, 120)
    assert torch.equal(twice, (flat * 255).round()[None, :, :1, :1].expand(1, 3, 80, 120) / 255)
    assert folders.at_most(twice, 60) == (40, 60) and folders.at_most(twice, None) == (80, 120)
    with pytest.raises(ValueError, match="60 x 40 px, the truth has the shape of 60 x 60"):
        folders.read(tmp_path / "a.png", (60, 60))
    (tmp_path / "b.png").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="b.png is not a readable picture"):
        folders.read(tmp_path / "b.png")


def test_a_file_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    folders.write(tmp_path / "x.md", "old")

    def cut(*_):
        raise OSError("no space")

    monkeypatch.setattr(folders.os, "replace", cut)
    with pytest.raises(OSError, match="no space"):
        folders.write(tmp_path / "x.md", "new")
    assert [p.name for p in tmp_path.iterdir()] == ["x.md"] and (tmp_path / "x.md").read_text() == "old"


# ------------------------------------------------------------------------------------------ the measures


def test_the_truth_itself_is_perfect(judge, seen):
    pytest.importorskip("kornia", reason="structural similarity needs `pip install kornia`")
    row = folders.measure(judge, seen[0], seen[0], seen[0].code)
    best = {"mse": 0, "psnr": 100, "ssim": 1, "dssim": 0, "identity": 1, "ita": 0, "drift": 0}
    best |= dict.fromkeys([*reinfer.PARTS, "light_percent", "shape_mm", "expression_mm", "pose_mm"], 0)
    assert {k: pytest.approx(v, abs=1e-4) for k, v in best.items()} == {k: row[k] for k in best}
    assert math.isnan(row["lpips"]) and set(report.COLUMNS) == best.keys() | {"lpips"}


def test_known_pictures_have_known_errors(judge, seen):
    """Half as bright: the error is half the picture; the face stays where it is."""
    pytest.importorskip("kornia", reason="structural similarity needs `pip install kornia`")
    dark = folders.look(judge, seen[0].image / 2)
    row = folders.measure(judge, seen[0], dark, seen[0].code)
    mse = float((seen[0].image / 2).square().mean())
    assert row["mse"] == pytest.approx(mse, rel=1e-4)
    assert row["psnr"] == pytest.approx(-10 * math.log10(mse), abs=1e-3)
    assert row["dssim"] == pytest.approx((1 - row["ssim"]) / 2) and 0.3 < row["ssim"] < 0.95
    assert row["drift"] < 3 and row["identity"] > 0.7 and row["ita"] > 5


def test_drift_of_a_shifted_face(judge, seen):
    """4 px to the right and 3 px down are 5 px."""
    pytest.importorskip("kornia", reason="structural similarity needs `pip install kornia`")
    moved = folders.look(judge, seen[0].image.roll((3, 4), (2, 3)))
    row = folders.measure(judge, seen[0], moved, seen[0].code)
    eyes = seen[0].points[0, 36:42].mean(0) - seen[0].points[0, 42:48].mean(0)
    assert row["drift"] == pytest.approx(5 / float(eyes.norm()) * 100, rel=0.15)
    assert row["identity"] > 0.95 and row["pose_mm"] < 3


def test_the_code_that_was_asked_for(judge, rooms, seen, persons, relit):
    """A picture that was asked to be lit as it is lit: its own true code is nearer than the truth's."""
    pytest.importorskip("kornia", reason="structural similarity needs `pip install kornia`")
    data.append(rooms / "set", STEMS, relit.image, relit.code)
    data.finish(rooms / "set")
    asked = folders.asked_codes(data.Dataset.open(rooms / "set"), STEMS)
    assert torch.equal(asked["b"].light, relit.code[1].light)
    result = folders.look(judge, relit.image[1:])
    a, b = (folders.measure(judge, seen[1], result, code) for code in (asked["b"], seen[1].code))
    assert a["light_percent"] < 0.7 * b["light_percent"] and a["psnr"] == b["psnr"]
    with pytest.raises(ValueError, match="no codes for c"):
        folders.asked_codes(data.Dataset.open(rooms / "set"), ["a", "c"])


def test_without_a_face_only_the_pictures_are_compared(judge, seen):
    pytest.importorskip("kornia", reason="structural similarity needs `pip install kornia`")
    grey = folders.look(judge, torch.full((1, 3, SIZE, SIZE), 0.5))
    assert not reinfer.seen(grey.code)
    row = folders.measure(judge, seen[0], grey, seen[0].code)
    faceless = [*reinfer.PARTS, "light_percent", "shape_mm", "expression_mm", "pose_mm", "drift", "identity"]
    assert all(math.isnan(row[k]) for k in faceless)
    assert all(math.isfinite(row[k]) for k in ("mse", "psnr", "ssim", "dssim", "ita"))
    masked = replace(judge, masked=True)
    assert all(math.isnan(v) for v in folders.measure(masked, grey, grey, grey.code).values())


def test_the_mask_leaves_out_what_is_not_face(judge, head, seen, persons):
    pytest.importorskip("kornia", reason="structural similarity needs `pip install kornia`")
    truth = seen[0]
    face, skin = (folders.region(head, truth.code, skin) for skin in (False, True))
    inside = (face * persons.head[:1]).sum() / face.sum()
    assert 0.05 < face.mean() < 0.6 and inside > 0.95
    assert (skin <= face).all() and skin.sum() < face.sum()
    result = replace(truth, image=torch.lerp(1 - truth.image, truth.image, face))
    assert folders.measure(judge, truth, result, truth.code)["psnr"] < 20
    masked = replace(judge, masked=True)
    assert folders.measure(masked, truth, result, truth.code)["psnr"] == 100
    away = replace(truth, code=truth.code.replace(cam=truth.code.cam + torch.tensor([0, 9, 9])))
    row = folders.measure(masked, away, result, truth.code)
    assert all(math.isnan(row[k]) for k in ("mse", "psnr", "ssim", "dssim", "ita"))


def test_lpips_is_measured_with_its_weights(judge, seen):
    pytest.importorskip("kornia", reason="structural similarity needs `pip install kornia`")
    g = torch.Generator().manual_seed(0)
    shapes = lpips._backbone() | lpips._linear()
    whole = replace(judge, weights={k: torch.randn(v, generator=g).abs() / 100 for k, v in shapes.items()})
    truth, other = seen
    got = folders.measure(whole, truth, other, truth.code)["lpips"]
    assert got == pytest.approx(float(lpips.distance(whole.weights, truth.image, other.image)), rel=1e-5)
    masked = folders.measure(replace(whole, masked=True), truth, other, truth.code)["lpips"]
    assert masked != pytest.approx(got, rel=1e-3)


# -------------------------------------------------------------------------------------------- the report


def made_up(n=6, methods=("one", "two")):
    """Rows with numbers to recognise; "two" is worst in picture 4, "one" in picture 2."""
    rows = []
    for i in range(n):
        for k, name in enumerate(methods):
            row = dict.fromkeys(report.COLUMNS, 0.1 * (k + 1))
            row |= {"lpips": math.nan, "mse": 0.9 if i == 2 * (k + 1) else 0.1, "light": float(i)}
            rows.append({"picture": f"p{i}", "method": name} | row)
    return rows


def test_every_number_comes_back_from_the_csv():
    rows = made_up(methods=("one, or another", 'the "second"'))
    rows[3]["psnr"] = 1 / 3
    back = list(csv.DictReader(report.to_csv(rows).splitlines()))
    assert len(back) == len(rows) == 12
    for old, new in zip(rows, back, strict=True):
        assert (old["picture"], old["method"]) == (new["picture"], new["method"])
        for k in report.COLUMNS:
            assert (math.isnan(old[k]) and new[k] == "") or float(new[k]) == old[k]


def test_the_summary_holds_means_and_intervals():
    rows = made_up()
    rows[0]["light"] = math.nan
    text = report.summary(rows, ["about"], published=True)
    assert text.startswith("about\n") and lpips.ADVICE in text
    (line,) = (v for v in text.splitlines() if v.startswith("| two | ") and v.count("|") == 6 and "2.5" in v)
    low, high = line.split("|")[2].split("[")[1].rstrip(" ]").split(", ")
    assert line.split("|")[2].startswith(" 2.5 [") and 0.9 < float(low) < 1.7 and 3.3 < float(high) < 4.1
    assert (
        "| one | - | " in text and "one: no face found in 1 pictures" in text and "two: no face" not in text
    )
    assert "Published, by others" in text and "| IFS-Light (2025) | 0.1605 |" in text
    assert "Published" not in report.summary(rows, ["about"])


def test_lpips_is_not_asked_for_when_it_is_there():
    rows = made_up()
    for row in rows:
        row["lpips"] = 0.25
    text = report.summary(rows, [])
    assert lpips.ADVICE not in text and "| one | 0.25 | " in text


def test_the_sheet_shows_even_rows_and_the_worst():
    rows = made_up(20)
    shown = []

    def show(name, stem):
        shown.append((name, stem))
        return torch.full((3, 20, 30), int(stem[1:]) / 20)

    assert report.worst(rows) == {"one": "p2", "two": "p4"}
    page = report.page(rows, ["source unchanged", "truth", "one", "two"], show)
    stems = list(dict.fromkeys(s for _, s in shown))
    assert stems == ["p0", "p5", "p10", "p14", "p19", "p2", "p4"]
    assert [n for n, s in shown if s == "p5"] == ["source unchanged", "truth", "one", "two"]
    side, band = 256, 22
    assert page.size == (4 * side, 7 * (side + band))
    y = 5 * (side + band) + band
    assert page.getpixel((side // 2, y + side // 2)) == (26, 26, 26)  # p2: 0.1
    assert page.getpixel((side // 2, y + 5)) == (255, 255, 255)  # white beside what is not square


def test_square():
    image = report.square(torch.zeros(3, 10, 16))
    assert image.shape == (3, 16, 16)
    assert image[:, 3:13].max() == 0 and image[:, :3].min() == 1 and image[:, 13:].min() == 1


# ------------------------------------------------------------------------------------------ the commands


@pytest.fixture
def blind(head, monkeypatch):
    """Every picture is taken for the mean face: what `look` sees is tested above."""

    def look(judge, image):
        code = head.mean_code(1, tuple(image.shape[2:]))
        points = buffers.to_image(
            head.landmarks(head.verts(code.shape, code.exp, code.pose), code.pose), code
        )
        return folders.Seen(image, buffers.to_pixels(points, code.size), code)

    monkeypatch.setattr(folders, "look", look)


def command(monkeypatch, words):
    monkeypatch.setattr(sys, "argv", ["evaluate", *words.split()])
    evaluate.main()


def test_the_command_compares_folders(rooms, blind, monkeypatch, capsys):
    pytest.importorskip("kornia", reason="structural similarity needs `pip install kornia`")
    (rooms / "dark" / "b.png").rename(rooms / "dark" / "c.png")
    words = f"folders --truth {rooms}/truth --results mine={rooms}/same theirs={rooms}/dark"
    command(monkeypatch, words + f" --source {rooms}/source --size 64 --published --out {rooms}/out")
    text = (rooms / "out" / "summary.md").read_text()
    assert text in capsys.readouterr().out
    assert "1 pictures of" in text and "64 px" in text
    assert "Not compared: theirs lacks 1: b." in text and "Not compared: truth lacks 1: c." in text
    names = [line.split("|")[1].strip() for line in text.splitlines() if line.startswith("| ")]
    assert {"source unchanged", "mine", "theirs", "DiffusionRig (2023)"} <= set(names)
    rows = list(csv.DictReader((rooms / "out" / "pictures.csv").open()))
    assert [(r["picture"], r["method"]) for r in rows] == [
        ("a", n) for n in ("source unchanged", "mine", "theirs")
    ]
    assert float(rows[1]["psnr"]) == 100
    with Image.open(rooms / "out" / "sheet.png") as page:
        assert page.size == (4 * 256, 256 + 22)


@pytest.mark.parametrize(
    "results, complaint",
    [("x", "NAME=FOLDER"), ("x={0}/same x={0}/dark", "each name once"), ("truth={0}/same", "are taken"),
     ("x={0}/nothing", "no folder")],
)  # fmt: skip
def test_wrong_arguments_are_one_line(rooms, monkeypatch, capsys, results, complaint):
    with pytest.raises(SystemExit):
        command(
            monkeypatch, f"folders --truth {rooms}/truth --results {results.format(rooms)} --out {rooms}/out"
        )
    assert complaint in capsys.readouterr().err and not (rooms / "out").exists()


@pytest.fixture
def quick(monkeypatch):
    """Few steps, whatever the picture looks like."""
    monkeypatch.setattr(pipeline, "to_noise", partial(pipeline.to_noise, steps="quad5", solver="heun"))
    monkeypatch.setattr(pipeline, "paint", partial(pipeline.paint, steps="2", solver="ddim"))


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """The two denoisers, tiny and untrained, as words of a command line."""
    torch.manual_seed(0)
    relight = DiFaReli(RelightConfig(32, 16, (1, 2), 1, (), 1, 0.0, 8, cond_dim=241, proj_dim=8))
    rig = DiffusionRig(RigConfig(32, 16, (1, 2), 1, (), 1, norm_groups=8, latent_dim=8, encoder_width=4))
    folder = tmp_path_factory.mktemp("models")
    for name, model in (("rig", rig), ("relight", relight)):
        for p in model.parameters():  # a fresh network ends in zeros
            if not p.any():
                torch.nn.init.normal_(p, std=0.02)
        checkpoints.save_denoiser(folder / f"{name}.safetensors", model, {"step": 5})
    return f" --rig {folder}/rig.safetensors --relight {folder}/relight.safetensors"


def test_the_command_runs_the_methods(models, quick, blind, tmp_path, monkeypatch, capsys):
    pytest.importorskip("kornia", reason="structural similarity needs `pip install kornia`")
    words = f"methods --count 1 --size 64 --out {tmp_path}/out" + models
    command(monkeypatch, words)
    text = (tmp_path / "out" / "summary.md").read_text()
    assert text in capsys.readouterr().out and text.startswith("DiffusionRig: step 5, 32 px")
    names = ["DiFaReli", "DiFaReli trust 0.5", "DiffusionRig", "DiffusionRig from noise", "ratio image"]
    written = sorted(p.name for p in (tmp_path / "out").iterdir() if p.is_dir())
    assert written == [*names, "source", "truth"]
    stem = f"synthetic-{evaluate_pairs.FIRST_SEED}"
    truth = synth.render([evaluate_pairs.FIRST_SEED], 64, light=[evaluate_pairs.FIRST_SEED + 500_000])
    assert (folders.read(tmp_path / "out" / "truth" / f"{stem}.png") - truth.image).abs().max() < 0.01
    methods = [r["method"] for r in csv.DictReader((tmp_path / "out" / "pictures.csv").open())]
    assert sorted(methods) == [*names, "source unchanged"]
    with pytest.raises(SystemExit):
        command(monkeypatch, words)
    assert "pictures of another run" in capsys.readouterr().err


def test_what_is_wanted_of_an_edit(head):
    mean = head.mean_code(1, SIZE)
    g = torch.Generator().manual_seed(0)
    source, other = (
        mean._map(lambda v: v + torch.randn(v.shape, generator=g)).replace(crop=mean.crop) for _ in "ab"
    )
    lit, posed = (evaluate_methods.wanted(source, other, edit) for edit in ("light", "pose"))
    for name in ("shape", "tex", "exp", "pose", "cam", "light"):
        assert getattr(lit, name) is getattr(other if name == "light" else source, name)
        moved = name in ("exp", "pose", "cam")
        assert getattr(posed, name) is getattr(other if moved else source, name)


def test_pairs_of_photos(head, persons, relit, tmp_path):
    """Two photos of one face, larger than the crop; one without a face, one of another size."""
    for name, images in (("source", persons.image), ("target", relit.image)):
        (tmp_path / name).mkdir()
        photo = torch.full((3, 200, 260), 0.3)
        photo[:, 40:168, 60:188] = images[0]
        write(photo, tmp_path / name / "a.png")
        write(torch.full((3, 64, 64), 0.5), tmp_path / name / "empty.png")
        write(photo[:, : 200 - 40 * (name == "target")], tmp_path / name / "odd.png")
    write(photo, tmp_path / "source" / "single.png")
    found = dict(evaluate_methods.photos(tmp_path, 128, FaceModel(head), "light"))
    assert found["single"] == "only one of source and target is there"
    assert found["empty"] == "no face found" and found["odd"] == "source and target have different sizes"
    pair = found["a"]
    assert pair.truth.shape == pair.source.image.shape == (1, 3, 128, 128)
    assert torch.equal(pair.target.shape, pair.source.code.shape)
    true = relit.code[:1].light
    own, wanted = (reinfer.shading_error(c.light, true) for c in (pair.source.code, pair.target))
    assert wanted < 0.7 * own
    drawn = buffers.render(head, pair.source.code).mask
    assert 0.1 < drawn.mean() < 0.8
    _, posed = next(evaluate_methods.photos(tmp_path, 128, FaceModel(head), "pose"))
    assert torch.equal(posed.target.light, posed.source.code.light)
    assert torch.equal(posed.target.shape, posed.source.code.shape)


def test_pose_pairs_are_painted_by_diffusionrig_alone(quick, models, tmp_path):
    words = models.split()
    tools, _ = evaluate_methods.load(rig=words[1], relight=words[3])
    pairs, able = (
        evaluate_methods.synthetic(1, 64, tools.face, "pose"),
        evaluate_methods.methods(tools, "pose"),
    )
    made, unused = evaluate_methods.run(tools, pairs, tmp_path / "out", able)
    assert list(made) == ["DiffusionRig from noise", "DiffusionRig"] and unused == []
    source, truth = (folders.read(tmp_path / "out" / k / "synthetic-900000.png") for k in ("source", "truth"))
    assert (source - truth).abs().mean() > 0.02
    with pytest.raises(ValueError, match="no pair could be used .a: no face found"):
        evaluate_methods.run(tools, iter([("a", "no face found")]), tmp_path / "none", able)


def test_denoisers_of_another_head_are_left_out(models, tmp_path):
    rig, relight = models.split()[1::2]
    for name, load in (("rig", checkpoints.load_rig), ("relight", checkpoints.load_relight)):
        net, _ = load({"rig": rig, "relight": relight}[name])
        checkpoints.save_denoiser(tmp_path / f"{name}.safetensors", net, {"head": "flame"})
    tools, lines = evaluate_methods.load(rig=tmp_path / "rig.safetensors", relight=relight)
    assert tools.rig is None and tools.size == 32
    assert lines[0] == "DiffusionRig is left out: it was trained with the flame head."
    assert evaluate_methods.methods(tools, "light") == [evaluate_methods.ratio, evaluate_methods.relight]
    with pytest.raises(ValueError, match="no denoiser for the open head"):
        evaluate_methods.load(rig=tmp_path / "rig.safetensors", relight=tmp_path / "relight.safetensors")


def test_an_encoder_is_asked_instead_of_the_fit(head, monkeypatch):
    """A pair's codes and those of the comparison come from DECA where it is given."""
    asked = []

    def encode(net, image, points):
        asked.append(net)
        return head.mean_code(1, tuple(image.shape[2:]))

    monkeypatch.setattr(reinfer.deca, "encode", encode)
    face = FaceModel(head, "net")
    ((_, pair),) = evaluate_methods.synthetic(1, 64, face, "light")
    assert asked == ["net", "net"] and torch.equal(pair.target.light, head.mean_code(1, 64).light)
    folders.look(folders.Judge(face, None), pair.truth)
    assert asked == ["net"] * 3


def test_a_head_without_a_mask_cannot_mask(rooms, judge):
    class Bare:
        masks = {}

    with pytest.raises(ValueError, match="no mask of the face"):
        bare = replace(judge, face=FaceModel(Bare()), masked=True)
        folders.compare(bare, rooms / "truth", {"x": rooms / "same"}, rooms / "out")
