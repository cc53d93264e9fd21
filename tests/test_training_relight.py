"""Training of DiFaReli: the annotations of a dataset, what a batch becomes, and the command line."""

import json

import pytest
import torch

from rig_core import buffers, checkpoints, conditions, data, files, matte, train
from rig_core.denoisers.relight import RelightConfig
from rig_core.denoisers.rig import DiffusionRig, RigConfig
from rig_core.estimators import identity, shadow
from training import relight, relight_data

COUNT, SIZE, SMALL = 9, 32, 16


@pytest.fixture(scope="module")
def head():
    return checkpoints.load_head()


def portraits(out, head, count, seed, stem):
    """A dataset of rendered faces under several lights, turned a little."""
    g = torch.Generator().manual_seed(seed)
    code = head.mean_code(count, SIZE)
    pose = code.pose + 0.2 * torch.randn(code.pose.shape, generator=g)
    light = code.light + head.light_std * torch.randn(count, 9, 3, generator=g)
    code = code.replace(light=light, pose=pose)
    images = buffers.render(head, code, SIZE).rendered.clamp(0, 1) * 0.9 + 0.1
    names = [f"{stem}{i}" for i in range(count)]
    data.append(out, names, images, code, split=["val", "train", "train"] * (count // 3))
    data.finish(out)
    return out


@pytest.fixture(scope="module")
def folder(tmp_path_factory, head):
    out = portraits(tmp_path_factory.mktemp("faces"), head, COUNT, 0, "f")
    relight_data.annotate(head, out, SIZE, batch=4, progress=False)
    return out


@pytest.fixture(scope="module")
def second(tmp_path_factory, head):
    out = portraits(tmp_path_factory.mktemp("more"), head, 3, 1, "g")
    relight_data.annotate(head, out, 64, progress=False)
    return out


def batch(folder, picks, size=SIZE):
    d = data.Dataset.open(folder)
    images, code = d.images(picks, size), d.codes(picks).resized((size, size))
    return data.Portraits(images, code, torch.tensor(picks), images)


# -------------------------------------------------------------------------------------------- annotations


def test_annotations_are_the_estimators_answers(folder, head):
    tensors, meta = files.read(folder / relight_data.NAME)
    assert json.loads(meta["names"]) == [f"f{i}" for i in range(COUNT)]
    b = batch(folder, list(range(COUNT)))
    image = b.image / 255.0
    wanted = {
        "matte": matte.head_matte(head, b.code, image),
        "visible": conditions.visibility(head, b.code, SIZE),
    }
    for k, v in wanted.items():
        assert tensors[k].dtype == torch.uint8 and tensors[k].shape == (COUNT, 1, SIZE, SIZE)
        assert (tensors[k] / 255.0 - v).abs().max() < 0.51 / 255 + 1e-6
        assert v.std() > 0.1
    embed = identity.embed(checkpoints.load_identity(), image)
    torch.testing.assert_close(tensors["embed"], embed, rtol=1e-4, atol=1e-4)
    amount = shadow.scalar(checkpoints.load_shadow(), image)
    torch.testing.assert_close(tensors["shadow"], amount, rtol=1e-4, atol=1e-4)


def test_table_addresses_joined_selections_at_any_size(folder, second):
    parts = [data.Dataset.open(folder).select("train"), data.Dataset.open(second)]
    table = relight_data.Table(parts, 16)
    first, more = (
        files.read(folder / relight_data.NAME)[0],
        files.read(second / relight_data.NAME)[0],
    )
    rows = table(torch.tensor([7, 0, 6]), "cpu")  # g1, f1, g0: six of the first are for training
    assert rows["matte"].shape == (3, 1, 16, 16) and rows["embed"].dtype == torch.float32
    assert torch.equal(rows["embed"], torch.stack([more["embed"][1], first["embed"][1], more["embed"][0]]))
    for k in ("matte", "visible"):
        for row, source, side in ((0, more[k][1], 4), (1, first[k][1], 2), (2, more[k][0], 4)):
            mean = torch.nn.functional.avg_pool2d(source.float(), side) / 255
            assert (rows[k][row] - mean).abs().max() < 0.51 / 255 + 1e-6
    assert relight_data.Table(parts[:1], SIZE)(torch.tensor([0]), "cpu")["matte"].shape[-1] == SIZE


def test_missing_annotations_say_what_to_do(tmp_path, head, folder):
    out = portraits(tmp_path, head, 3, 2, "h")
    with pytest.raises(FileNotFoundError, match=r"--annotate --data") as e:
        relight_data.Table([data.Dataset.open(out)], SIZE)
    assert "\n" not in str(e.value)
    (out / relight_data.NAME).write_bytes((folder / relight_data.NAME).read_bytes())
    with pytest.raises(ValueError, match="knows nothing of 'h0': run training.relight --annotate again"):
        relight_data.Table([data.Dataset.open(out)], SIZE)


# ------------------------------------------------------------------------------------ what a batch becomes


def table_of(folder):
    return relight_data.Table([data.Dataset.open(folder)], SIZE)


@pytest.mark.parametrize("cast", [0.0, 1.0])
def test_inputs_of_a_batch(folder, head, cast):
    table, b = table_of(folder), batch(folder, [4, 1, 8])
    x_0, (spatial, vector) = relight_data.inputs(head, SIZE, table, "cpu", cast, flip=False)(b)
    rows = table(b.index, "cpu")
    torch.testing.assert_close(x_0, b.image / 127.5 - 1)
    visible = rows["visible"] if cast else None
    assert torch.equal(spatial[:, :3], conditions.shading_reference(head, b.code, SIZE, visible))
    torch.testing.assert_close(spatial[:, 3:], conditions.background(b.image / 255.0, rows["matte"]))
    assert torch.equal(vector, conditions.vector(b.code, rows["embed"], rows["shadow"]))
    assert vector.shape == (3, relight_data.vector_length(head, table))


def test_half_of_the_references_carry_the_cast_shadow(folder, head):
    b = batch(folder, [4] * 64)
    torch.manual_seed(0)
    _, (spatial, _) = relight_data.inputs(head, SIZE, table_of(folder), "cpu", 0.5, flip=False)(b)
    kinds = [spatial[(spatial == s).flatten(1).all(1)] for s in torch.unique(spatial, dim=0)]
    assert len(kinds) == 2 and 20 < len(kinds[0]) < 44


def test_mirrored_pictures_have_mirrored_conditions(folder, head):
    table, b = table_of(folder), batch(folder, [4] * 32)
    torch.manual_seed(1)
    x_0, (spatial, vector) = relight_data.inputs(head, SIZE, table, "cpu", 0.0)(b)
    straight = b.image[0] / 127.5 - 1
    flipped = ((x_0 - straight.flip(-1)).abs() < 1e-6).flatten(1).all(1)
    kept = ((x_0 - straight).abs() < 1e-6).flatten(1).all(1)
    assert torch.equal(flipped, ~kept) and 8 < flipped.sum() < 24
    i, j = flipped.nonzero()[0, 0], kept.nonzero()[0, 0]
    assert torch.equal(spatial[i], spatial[j].flip(-1))
    s = head.sizes
    pose, cam = slice(s.shape, s.shape + s.pose), s.shape + s.pose + s.exp
    signs = torch.tensor([1.0, -1, -1, 1, -1, -1, -1, 1])
    torch.testing.assert_close(vector[i, pose], vector[j, pose] * signs)
    torch.testing.assert_close(
        vector[i, cam : cam + 3], vector[j, cam : cam + 3] * torch.tensor([1.0, -1, 1])
    )
    same = torch.ones(vector.shape[1], dtype=torch.bool)
    same[pose], same[cam + 1] = False, False
    assert torch.equal(vector[i, same], vector[j, same])


def test_a_mirrored_code_draws_the_mirrored_head(head):
    code = head.mean_code(1, 64)
    pose, cam = code.pose.clone(), code.cam.clone()
    pose[0, :6], cam[0, 1] = torch.tensor([0.2, 0.5, 0.3, 0.1, 0.05, 0.02]), cam[0, 1] + 0.05
    code = code.replace(pose=pose, cam=cam)
    mirror = relight_data.mirrored(code, torch.tensor([True]))
    a, b = (conditions.draw(head, c) for c in (code, mirror))
    wrong = (a.mask.flip(-1) != b.mask).float().sum() / a.mask.sum()
    assert wrong < 0.04 and (a.mask != b.mask).float().sum() / a.mask.sum() > 0.15
    normal = a.normal.flip(-1) * torch.tensor([-1.0, 1, 1])[:, None, None]
    assert ((normal - b.normal).abs() * a.mask.flip(-1) * b.mask).mean() < 0.02
    kept = relight_data.mirrored(code, torch.tensor([False]))
    assert torch.equal(kept.pose, code.pose) and torch.equal(kept.cam, code.cam)


# ---------------------------------------------------------------------------------------- the command line


def command(*arguments):
    usual = ("--batch", "3", "--threads", "1", "--warmup", "1", "--log-every", "1", "--sample-every", "99")
    relight.main([*map(str, arguments), *usual])


def state(out):
    return files.read(out / train.STATE)[0]


@pytest.fixture(scope="module")
def coarse(folder, tmp_path_factory):
    """Two steps, then a third after resuming."""
    out = tmp_path_factory.mktemp("coarse") / "run"
    usual = ("--data", folder, "--out", out, "--preset", "coarse", "--size", SMALL, "--noise-std", 0.5)
    command(*usual, "--steps", 2)
    command(*usual, "--steps", 3, "--resume")
    return out


@pytest.fixture
def no_sheets(monkeypatch):
    """Sixty evaluations a sheet take longer than the training here."""
    monkeypatch.setattr(relight, "contact_sheet", lambda *_: lambda model: torch.zeros(3, 8, 8))


def test_published_preset_and_ours():
    assert relight.config_of("official", 256, 672) == RelightConfig()
    assert relight.config_of("small", 128, 9).attention_resolutions == (16,)
    assert relight.config_of("coarse", 64, 9).attention_resolutions == (16,)


def test_a_resumed_run_is_the_same_bit_for_bit(folder, coarse, tmp_path, no_sheets):
    options = ("--preset", "coarse", "--size", SMALL, "--noise-std", 0.5, "--steps", 3)
    command("--data", folder, "--out", tmp_path / "run", *options)
    a, b = state(tmp_path / "run"), state(coarse)
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    losses = [[json.loads(x)["loss"] for x in open(d / "log.jsonl")] for d in (tmp_path / "run", coarse)]
    assert losses[0] == losses[1] and len(losses[0]) == 3
    assert any(not torch.equal(a[k], a["ema" + k[5:]]) for k in a if k.startswith("model."))


def test_what_a_run_writes(folder, coarse, head):
    model, meta = checkpoints.load_relight(coarse / "model.safetensors")
    assert (meta["step"], meta["head"], meta["size"]) == (3, "open", SMALL)
    embed = files.read(folder / relight_data.NAME)[0]["embed"].shape[1]
    s = head.sizes
    assert model.config == relight.config_of("coarse", SMALL, s.shape + s.pose + s.exp + 3 + embed + 1)
    for k, v in train.weights(coarse / train.STATE).items():
        torch.testing.assert_close(model.state_dict()[k], v, rtol=2**-11, atol=1e-7)
    sheets = sorted((coarse / "samples").iterdir())
    assert [p.name for p in sheets] == ["0000002.png", "0000003.png"]
    assert data.read_image(sheets[0], 4 * SMALL).shape == (3, 4 * SMALL, 4 * SMALL)
    options = json.loads((coarse / "options.json").read_text())
    assert options["p2_gamma"] == 0 and options["architecture"]["norm_groups"] == 8


def test_a_sample_sheet_shows_photo_reference_and_the_neighbours_light(folder, head, coarse):
    d = data.Dataset.open(folder).select("val")
    model, _ = checkpoints.load_relight(coarse / "model.safetensors")
    sheet = relight.contact_sheet(head, d, SMALL, torch.device("cpu"), 2)(model)
    assert sheet.shape == (3, 4 * SMALL, 2 * SMALL) and sheet.min() >= 0 and sheet.max() <= 1
    photos = d.images([0, 2], SMALL) / 255.0
    assert torch.equal(sheet[:, :SMALL], torch.cat(list(photos), -1))
    rows = relight_data.Table([d], SMALL)(torch.tensor([0, 2]), "cpu")
    code = d.codes([0, 2]).resized((SMALL, SMALL))
    wanted = conditions.shading_reference(head, code, SMALL, rows["visible"]).clamp(0, 1)
    torch.testing.assert_close(sheet[:, SMALL : 2 * SMALL], torch.cat(list(wanted), -1))
    assert (sheet[:, 2 * SMALL : 3 * SMALL] - sheet[:, 3 * SMALL :]).abs().max() > 1e-3  # another light


def test_a_grown_run_starts_from_the_coarse_one_and_resumes_without_it(folder, coarse, tmp_path, no_sheets):
    source, out = tmp_path / "coarse.safetensors", tmp_path / "fine"
    source.write_bytes((coarse / train.STATE).read_bytes())
    usual = ("--data", folder, "--out", out, "--preset", "small", "--size", SIZE, "--grow", source, "--lr", 0)
    command(*usual, "--steps", 1)
    before, after = train.weights(source), train.weights(out / train.STATE)
    assert torch.equal(after["ImgCond.time_embed.0.weight"], before["ImgCond.time_embed.0.weight"])
    assert torch.equal(after["ImgEncoder.input_blocks.3.0.in_layers.2.weight"],
                       before["ImgEncoder.input_blocks.1.0.in_layers.2.weight"])  # fmt: skip
    config = checkpoints.load_relight(out / "model.safetensors")[0].config
    assert config == relight.config_of("small", SIZE, config.cond_dim)
    source.unlink()
    command(*usual, "--steps", 2, "--resume")
    resumed = train.weights(out / train.STATE)
    assert all(torch.equal(resumed[k], after[k]) for k in after)  # with a rate of 0
    assert checkpoints.load_relight(out / "model.safetensors")[1]["step"] == 2


def test_a_run_of_another_architecture_is_refused(folder, coarse, tmp_path, no_sheets):
    usual = ("--data", folder, "--out", tmp_path / "run", "--steps", 1)
    with pytest.raises(ValueError, match="does not grow into --preset coarse at 32 px") as e:
        command(*usual, "--preset", "coarse", "--size", SIZE, "--grow", coarse / train.STATE)
    assert "\n" not in str(e.value)
    with pytest.raises(ValueError, match="state of another network"):
        command("--data", folder, "--out", coarse, "--preset", "small", "--size", SIZE, "--resume")
    with pytest.raises(FileExistsError, match="give --resume"):
        command("--data", folder, "--out", coarse, "--preset", "coarse", "--size", SMALL)
    with pytest.raises(SystemExit):
        relight.main(["--data", str(folder)])


def test_a_run_may_start_from_a_diffusion_rig(folder, tmp_path, no_sheets):
    torch.manual_seed(2)
    rig = DiffusionRig(RigConfig(SMALL, 32, (1, 2, 3, 4), 1, (4,), 1, 0.0, 8, 8, 8))
    path, out = tmp_path / "rig.safetensors", tmp_path / "run"
    checkpoints.save_denoiser(path, rig)
    usual = ("--data", folder, "--out", out, "--preset", "coarse", "--size", SMALL, "--rig", path, "--lr", 0)
    command(*usual, "--steps", 1)
    own, theirs = train.weights(out / train.STATE), rig.state_dict()
    for mine, its in (("middle_block.1", "middle_block.0"), ("input_blocks.1.1", "input_blocks.1.0")):
        wanted = theirs[f"denoisingUNet.{its}.in_layers.2.weight"]
        assert torch.equal(own[f"ImgCond.{mine}.in_layers.2.weight"], wanted)
    path.unlink()
    command(*usual, "--steps", 2, "--resume")
    narrow = DiffusionRig(RigConfig(SMALL, 16, (1, 2, 3, 4), 1, (4,), 1, 0.0, 8, 8, 8))
    checkpoints.save_denoiser(path, narrow)
    with pytest.raises(ValueError, match="tensors of the DiffusionRig fit: take one of its preset"):
        command(*usual[:2], "--out", tmp_path / "other", *usual[4:], "--steps", 1)


def test_annotating_from_the_command_line(head, tmp_path):
    out = portraits(tmp_path / "new", head, 3, 5, "n")
    relight.main(["--annotate", "--data", str(out)])
    tensors, meta = files.read(out / relight_data.NAME)
    assert tensors["matte"].shape == (3, 1, 128, 128) and meta["kind"] == "relight data"
    assert not [p for p in out.iterdir() if p.suffix == ".tmp"]
