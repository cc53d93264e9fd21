"""Train Personal Model and Mean Shape over the double of the host."""

from __future__ import annotations

import json
import os
import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from tests import host_double
from tests.node_pack import *  # noqa: F403 the fixtures
from tests.node_pack import psnr
from training import synth

SIZE = 32
PHOTOS = ("0.png", "1.png", "2.png", "3.png")
TRAIN = "FaceRig_TrainPersonalModel"


@pytest.fixture(scope="module", autouse=True)
def anna(pack):
    """Four portraits of one synthetic person and a meadow, in input/anna; the node reports as number 7."""
    folder = pack.host.folder / "input" / "anna"
    folder.mkdir()
    batch = synth.render([7000000, 7000001, 7000005, 7000007], 192, person=[900100] * 4)
    for name, x in zip(PHOTOS, batch.image):
        save(x, folder / name)
    Image.new("RGB", (200, 150), (90, 120, 60)).save(folder / "meadow.png")
    pack.nodes[TRAIN].hidden = SimpleNamespace(unique_id="7")
    return folder


def save(x, path):
    Image.fromarray((x * 255).round().byte().permute(1, 2, 0).numpy()).save(path)


def train(pack, head, **inputs):
    inputs = {"album": "anna", "name": "anna", "base": "tiny.safetensors", "steps": 3, "batch": 2} | inputs
    return pack.run("TrainPersonalModel", face_model=head, **inputs)


def read(pack, name: str) -> dict:
    """What the file of a model says about it."""
    return pack.core.files.read(pack.host.folder / "models" / "face_rig" / f"{name}.safetensors")[1]


def random_numbers():
    return torch.get_rng_state(), repr(np.random.get_state()), random.getstate()


@pytest.fixture(scope="module")
def model(pack):
    """A smaller DiffusionRig than that of the other tests: tiny.safetensors, the base."""
    rig = pack.core.denoisers.rig
    torch.manual_seed(0)
    net = rig.DiffusionRig(rig.RigConfig(SIZE, 16, (1, 2), 1, (16,), 1, 0.0, 8, 16, 8))
    torch.nn.init.normal_(net.denoisingUNet.out[2].weight, std=0.02)
    pack.core.checkpoints.save_denoiser(pack.host.folder / "models" / "face_rig" / "tiny.safetensors", net)
    return pack.run("LoadDiffusionRig", file="tiny.safetensors")[0]


@pytest.fixture(scope="module")
def trained(pack, head, model):
    """Everything once as it is: what the node gave, and what it told the host meanwhile."""
    host, core = pack.host, pack.core
    host.progress.clear(), host.said.clear(), host.previews.clear()
    weights = [p.clone() for p in model.model.parameters()]
    loaded, before, grad = len(host.loaded), random_numbers(), torch.is_grad_enabled()
    seen = []
    gather = core.album.gather
    with pytest.MonkeyPatch.context() as m:
        m.setattr(core.album, "gather", lambda *a, **k: seen.append(gather(*a, **k)) or seen[0])
        out = train(pack, head)
    assert torch.equal(before[0], torch.get_rng_state()) and before[1:] == random_numbers()[1:]
    assert torch.is_grad_enabled() == grad and not torch.is_inference_mode_enabled()
    assert all(torch.equal(a, b) for a, b in zip(weights, model.model.parameters()))
    assert len(host.loaded) == loaded  # no MODEL of the host was touched
    told = SimpleNamespace(progress=list(host.progress), said=list(host.said), previews=list(host.previews))
    return SimpleNamespace(out=out, album=seen[0], told=told)


@pytest.fixture
def quick(pack, trained, monkeypatch):
    """The album as gathered before, and sheets that cost nothing: what is left is the training."""
    nodes = pack.nodes_module.personal

    def gather(folder, face_model, size):
        assert folder.is_dir() and size == SIZE
        return trained.album

    monkeypatch.setattr(nodes, "gather", gather)

    def sheet(model, head, portrait, callback):
        callback({})
        return torch.full((3, SIZE, 5 * SIZE), 0.25)

    monkeypatch.setattr(pack.core.personal, "sheet", sheet)


def test_the_model_is_in_the_loaders_list_and_loads(pack, model, trained):
    name, _, _, given, image_size = trained.out
    assert name == "anna.safetensors"
    assert name in pack.nodes["FaceRig_LoadDiffusionRig"].define_schema().inputs[0].options
    personal, size = pack.run("LoadDiffusionRig", file=name)
    assert size == SIZE == image_size
    same = (m.model.diffusion_model.net.state_dict() for m in (given, personal))
    assert all(torch.equal(a, b) for a, b in zip(*(d.values() for d in same), strict=True))
    old, new = (m.model.diffusion_model.net.state_dict() for m in (model, personal))
    for k, v in old.items():
        if k.startswith("encoder."):
            assert torch.allclose(v, new[k], rtol=1e-3, atol=1e-6), k  # kept at half precision
    kernel = "denoisingUNet.input_blocks.0.0.weight"
    assert (old[kernel] - new[kernel]).abs().max() > 3e-5
    meta = personal.model.meta
    about = {k: meta[k] for k in ("stage", "step", "person", "base", "photos", "head", "batch", "rank")}
    assert about == {
        "stage": 2, "step": 3, "person": "anna", "base": "tiny.safetensors", "photos": 4, "head": "open",
        "batch": 2, "rank": 0,
    }  # fmt: skip
    assert meta["album"] == list(PHOTOS) and meta["others"] is False  # the base has not learned it so
    shape = trained.album.codes.shape
    assert torch.allclose(meta["mean_shape"], shape.mean(0, keepdim=True), atol=1e-6)


def test_the_sheet_and_the_album_come_out(pack, trained, anna):
    _, sheet, picture, _, _ = trained.out
    assert sheet.shape == (1, SIZE, 5 * SIZE, 3)
    photo = torch.from_numpy(np.array(Image.open(anna / "0.png"))).float()[None] / 255
    aligned = pack.run("AlignFace", photo=photo, size=SIZE)[0]
    assert psnr(sheet[:, :, :SIZE], aligned) > 40
    tiles = sheet[:, :, SIZE:].split(SIZE, 2)
    assert all((a - b).abs().max() > 1e-3 for a, b in zip(tiles, tiles[1:]))
    assert torch.equal(trained.told.previews[-1], sheet)
    assert trained.album.rejected.keys() == {"meadow.png"}
    assert "no face" in trained.album.rejected["meadow.png"]
    assert torch.equal(picture[0].permute(2, 0, 1), trained.album.sheet)


def test_the_bar_and_the_text_below_the_node(trained):
    progress, said = trained.told.progress, trained.told.said
    assert [p[:2] for p in progress] == [(i, 5) for i in range(1, 6)] + [(1, 3), (2, 3), (3, 3), (3, 3)]
    assert [p[2] is not None for p in progress] == 8 * [False] + [True]
    kind, picture, size = progress[-1][2]
    assert (kind, picture.size, size) == ("JPEG", (5 * SIZE, SIZE), 512)
    assert [node for _, node in said] == ["7", "7"]
    assert said[0][0] == "3 steps, about 0 min and 0.0 GiB"
    assert said[1][0].startswith("step 3 of 3, loss ") and said[1][0].endswith(", 0 min left")


def test_stop_saves_and_the_next_run_goes_on_there(pack, head, quick):
    host, folder = pack.host, pack.host.folder
    host.interrupt_after = 2
    with pytest.raises(host_double.Interrupted):
        train(pack, head, name="stopped", steps=5)
    assert read(pack, "stopped")["step"] == 3  # the stop was seen in step 2, step 3 is the last
    out = folder / "output" / "face_rig" / "stopped"
    assert pack.core.files.read(out / pack.core.train.STATE)[1]["step"] == 3
    assert [p[:2] for p in host.progress] == [(1, 5), (2, 5), (3, 5)]  # and no sheet is painted
    host.interrupt_after = None
    host.progress.clear()
    assert train(pack, head, name="stopped", steps=5)[0] == "stopped.safetensors"
    assert [p[:2] for p in host.progress] == [(4, 5), (5, 5), (5, 5)]
    assert read(pack, "stopped")["step"] == 5
    lines = [json.loads(line)["step"] for line in (out / "log.jsonl").read_text().splitlines()]
    assert lines == [3, 5]
    stopped, at_once = (pack.core.files.read(folder / "models" / "face_rig" / f"{n}.safetensors")[0] for n in
                        ("stopped", train(pack, head, name="at_once", steps=5)[0].split(".")[0]))  # fmt: skip
    assert all(torch.equal(v, at_once[k]) for k, v in stopped.items())


def test_stop_while_a_sheet_is_painted_does_not_wait_for_it(pack, head, quick, monkeypatch):
    painted = []

    def sheet(model, head, portrait, callback):
        for i in range(10):
            painted.append(i)
            callback({})

    monkeypatch.setattr(pack.core.personal, "sheet", sheet)
    monkeypatch.setattr(pack.nodes_module.host, "stop_pressed", lambda: len(painted) > 1)
    with pytest.raises(host_double.Interrupted):
        train(pack, head, name="painting")
    assert painted == [0, 1] and read(pack, "painting")["step"] == 3


def test_stop_while_the_album_is_looked_at_leaves_nothing(pack, head, trained):
    pack.host.interrupt_after = 2
    with pytest.raises(host_double.Interrupted):
        train(pack, head, name="early")
    assert len(pack.host.progress) == 2
    assert not list((pack.host.folder / "output" / "face_rig").glob("early*"))
    assert not list((pack.host.folder / "models" / "face_rig").glob("early*"))


def test_a_finished_training_gives_its_model_again_and_goes_on_with_more_steps(pack, head, quick):
    path = pack.host.folder / "models" / "face_rig" / "done.safetensors"
    train(pack, head, name="done")
    whole = path.read_bytes()
    path.unlink()
    pack.host.said.clear()
    sheet = train(pack, head, name="done")[1]
    assert path.read_bytes() == whole and float(sheet[0, 0, 0, 0]) == 0.25
    assert pack.host.said[-1] == ("finished before, at step 3: raise 'steps' to go on", "7")
    pack.host.progress.clear()
    train(pack, head, name="done", steps=4)
    assert [p[:2] for p in pack.host.progress] == [(4, 4), (4, 4)] and read(pack, "done")["step"] == 4


def test_no_model_is_overwritten(pack, head, quick):
    folder = pack.host.folder / "models" / "face_rig"
    before = (folder / "tiny.safetensors").read_bytes(), (folder / "anna.safetensors").read_bytes()
    with pytest.raises(FileExistsError, match="has a tiny.safetensors that was not trained here"):
        train(pack, head, name="tiny")
    with pytest.raises(FileExistsError, match="training of anna has begun: switch 'resume' on, or take"):
        train(pack, head, resume=False)
    assert before == ((folder / "tiny.safetensors").read_bytes(), (folder / "anna.safetensors").read_bytes())


def test_a_training_goes_on_from_its_own_base_only(pack, head, model, quick):
    folder, checkpoints = pack.host.folder / "models" / "face_rig", pack.core.checkpoints
    net, _ = checkpoints.load_rig(folder / "tiny.safetensors")
    torch.nn.init.normal_(net.denoisingUNet.out[2].weight, std=0.1)
    checkpoints.save_denoiser(folder / "other.safetensors", net)
    with pytest.raises(ValueError, match="anna.safetensors was trained from another base: take that one"):
        train(pack, head, base="other.safetensors", steps=9)
    assert read(pack, "anna")["step"] == 3


@pytest.mark.parametrize("name", ["", "a b", "../x", "a/b", "a.b", "a\\b", "C:x", "a\n"])
def test_odd_names_are_refused_before_anything_runs(pack, head, name):
    node = pack.nodes[TRAIN]
    assert "letters, digits, - and _ only" in node.validate_inputs(name=name)
    with pytest.raises(ValueError, match="'name' is"):
        train(pack, head, name=name)


def test_the_seed_stays_as_it_is_from_run_to_run(pack):
    """None would do the opposite: the browser turns a number called seed into a new one after each run."""
    seed = next(i for i in pack.nodes[TRAIN].define_schema().inputs if i.id == "seed")
    assert seed.control_after_generate is False


def test_good_names_pass_and_so_does_one_that_is_not_known_yet(pack):
    node = pack.nodes[TRAIN]
    assert node.validate_inputs(name="Anna-2_b") is True and node.validate_inputs() is True


def test_albums_are_folders_below_input(pack, head, model, tmp_path, monkeypatch):
    node, inputs = pack.nodes[TRAIN], pack.host.folder / "input"
    (inputs / "deep" / "er" / "est" / "more").mkdir(parents=True)
    (inputs / "nothing").mkdir()
    for file in ("deep/er/a.jpg", "deep/er/est/b.WEBP", "deep/er/est/more/c.png", "nothing/d.txt", "e.bmp"):
        (inputs / file).touch()
    assert node.define_schema().inputs[0].options == ["anna", "deep/er", "deep/er/est"]
    (pack.host.folder / "x").mkdir()
    for outside in ("../x", "..", ".", "", str(tmp_path), "gone", pack.nodes_module.host.NO_ALBUM):
        with pytest.raises(ValueError, match="'album': there is no folder"):
            train(pack, head, name="never", album=outside)
    with pytest.raises(ValueError, match="nothing holds no photos"):
        train(pack, head, name="never", album="nothing")
    os.symlink(tmp_path, inputs / "link")
    with pytest.raises(ValueError, match="'album': there is no folder 'link'"):
        train(pack, head, name="never", album="link")
    assert not list(pack.host.folder.rglob("never*"))
    (tmp_path / "input").mkdir()
    monkeypatch.setattr(pack.host, "folder", tmp_path)
    assert node.define_schema().inputs[0].options == ["(put a folder of photos into input)"]


def test_an_album_without_a_face_says_why(pack, head, model):
    folder = pack.host.folder / "input" / "meadows"
    folder.mkdir()
    Image.new("RGB", (200, 150), (90, 120, 60)).save(folder / "one.png")
    (folder / "two.jpg").write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"none of the 2 photos .*one.png: no face .*two.jpg cannot be read"):
        train(pack, head, name="meadows", album="meadows")


def test_bases_that_do_not_go_with_the_head_or_are_none(pack, head, model, quick):
    folder, checkpoints = pack.host.folder / "models" / "face_rig", pack.core.checkpoints
    net, _ = checkpoints.load_rig(folder / "tiny.safetensors")
    checkpoints.save_denoiser(folder / "published.safetensors", net, {"head": "flame"})
    with pytest.raises(ValueError, match="trained with the flame head, the face model is the open head"):
        train(pack, head, name="never", base="published.safetensors")
    (folder / "head.safetensors").write_bytes((checkpoints.ASSETS / "open_head.safetensors").read_bytes())
    with pytest.raises(checkpoints.CheckpointError, match="expected a DiffusionRig denoiser"):
        train(pack, head, name="never", base="head.safetensors")
    with pytest.raises(FileNotFoundError, match="there is no 'gone.pt' in models/face_rig"):
        train(pack, head, name="never", base="gone.pt")
    assert not list(pack.host.folder.rglob("never*"))


def test_adapters_are_a_small_file_and_load_with_their_base(pack, head, model, quick):
    folder = pack.host.folder / "models" / "face_rig"
    train(pack, head, name="small", rank=2, learning_rate=0.01, steps=5)
    assert (folder / "small.safetensors").stat().st_size < 0.3 * (folder / "tiny.safetensors").stat().st_size
    loaded = pack.run("LoadDiffusionRig", file="small.safetensors")[0]
    old, new = (m.model.diffusion_model.net.denoisingUNet.state_dict() for m in (model, loaded))
    assert (old["out.2.weight"] - new["out.2.weight"]).abs().max() > 1e-4
    assert loaded.model.meta["rank"] == 2 and loaded.model.meta["lr"] == 0.01
    (folder / "sub").mkdir()
    (folder / "sub" / "base.safetensors").write_bytes((folder / "tiny.safetensors").read_bytes())
    with pytest.raises(ValueError, match=r"'rank': adapters need their base beside them: move .*sub"):
        train(pack, head, name="never", rank=2, base="sub/base.safetensors")


def test_zeros_take_what_suits_the_default_base(pack, head, quick, monkeypatch):
    """And adapters on the pack's own model name no file as their base."""
    core, seen = pack.core, {}

    def fit(config, recipe, rig, head, images, codes, *place, about, on_sample, **rest):
        seen.update(config=config, recipe=recipe, about=about, size=rig.config.image_size)
        on_sample(torch.zeros(3, 8, 40), config.steps)
        place[1].write_bytes(place[1].with_name("tiny.safetensors").read_bytes())

    monkeypatch.setattr(core.personal, "fit", fit)
    monkeypatch.setattr(core.personal, "forecast", lambda *_: core.personal.Forecast(0.5, 2**31))
    monkeypatch.setattr(pack.nodes_module.personal, "gather", lambda *_: pytest.fail("not reached"))
    album = SimpleNamespace(images=None, codes=None, names=["a"], sheet=torch.zeros(3, 8, 8))
    monkeypatch.setattr(pack.nodes_module.personal, "gather", lambda *_: album)
    default = pack.nodes_module.host.DEFAULT
    pack.host.said.clear()
    train(pack, head, name="zeros", base=default, steps=0)
    steps, lr = core.personal.SMALL_STEPS, core.personal.SMALL_LR
    assert (seen["config"].steps, seen["config"].lr, seen["about"]["base"]) == (steps, lr, "")
    assert seen["recipe"].others and seen["size"] == 128  # the default base has learned it so
    assert pack.host.said[0] == (f"{steps} steps, about {steps / 120:.0f} min and 2.0 GiB", "7")
    train(pack, head, name="four", base=default, rank=4, steps=9, learning_rate=1e-4, seed=5)
    config = seen["config"]
    assert (config.steps, config.lr, config.seed, seen["recipe"].rank) == (9, 1e-4, 5, 4)


def test_it_runs_again_when_a_photo_or_the_base_changes(pack, model, anna):
    node = pack.nodes[TRAIN]
    folder = pack.host.folder / "models" / "face_rig"

    def mark(base="tiny.safetensors"):
        return node.fingerprint_inputs(album="anna", base=base, name="anna", steps=3)

    first = mark()
    assert mark() == first and mark(pack.nodes_module.host.DEFAULT) != first
    (anna / "notes.txt").write_text("not a photo")
    assert mark() == first
    (anna / "4.png").write_bytes((anna / "3.png").read_bytes())
    assert mark() != first
    (anna / "4.png").unlink()
    assert mark() == first
    stat = (folder / "tiny.safetensors").stat()
    os.utime(folder / "tiny.safetensors", ns=(stat.st_atime_ns, stat.st_mtime_ns + 1000))
    assert mark() != first


def test_deca_reads_the_album_where_the_face_model_has_it(pack, head, anna, monkeypatch):
    personal, checkpoints = pack.nodes_module.personal, pack.core.checkpoints
    with torch.device("meta"):
        encoder = pack.nodes_module.host.estimator(personal.pipeline.deca.DECA())
    calls = []

    def encode(net, images, points):
        calls.append((net, images.shape, points.shape))
        return head.mean_code(len(images), SIZE)

    def gather(photos, size, recognise, fit, callback, head):
        assert [name for name, _ in photos] == [*PHOTOS, "meadow.png"]
        assert photos[0][1]().shape == (1, 3, 192, 192) and photos[4][1]().shape == (1, 3, 150, 200)
        return fit(torch.zeros(2, 3, size, size), torch.zeros(2, 68, 2))

    monkeypatch.setattr(personal.pipeline.deca, "encode", encode)
    monkeypatch.setattr(pack.core.album, "gather", gather)
    monkeypatch.setattr(checkpoints, "load_identity", lambda: None)
    face_model = pack.core.heads.FaceModel(head, encoder)
    personal.gather(anna, face_model, SIZE)
    assert calls == [(encoder.model, (2, 3, SIZE, SIZE), (2, 68, 2))] and pack.host.loaded[-1] is encoder


def test_mean_shape_gives_the_persons_shape_and_keeps_the_centre(pack, head, face, trained):
    personal = pack.run("LoadDiffusionRig", file="anna.safetensors")[0]
    code = face[3]
    new = pack.run("MeanShape", face_model=head, face_code=code, model=personal)[0]
    assert torch.equal(new.shape, personal.model.meta["mean_shape"])
    assert (new.shape - code.shape).abs().max() > 0.1
    for field in ("tex", "exp", "pose", "light"):
        assert torch.equal(getattr(new, field), getattr(code, field))
    buffers = pack.core.buffers

    def centre(c):
        return buffers.to_image(head.centre(head.verts(c.shape, c.exp, c.pose))[:, None], c)[..., :2]

    assert (centre(new) - centre(code)).abs().max() < 1e-5
    assert (centre(code.replace(shape=new.shape)) - centre(code)).abs().max() > 1e-4  # it has to be kept
    two = pack.run("MeanShape", face_model=head, face_code=code.expand(2), model=personal)[0]
    assert torch.equal(two.shape, new.shape.expand(2, -1)) and torch.allclose(two.cam, new.cam.expand(2, -1))


def test_mean_shape_of_a_general_model_changes_nothing_and_warns(pack, head, face, model, caplog):
    code = pack.run("MeanShape", face_model=head, face_code=face[3], model=model)[0]
    assert torch.equal(code.shape, face[3].shape) and torch.equal(code.cam, face[3].cam)
    assert "Mean Shape: this model has none" in caplog.text


def test_mean_shape_refuses_other_heads_and_other_models(pack, head, face, model, trained):
    personal = pack.run("LoadDiffusionRig", file="anna.safetensors")[0]
    code = face[3].replace(head="flame")
    with pytest.raises(ValueError, match="flame"):
        pack.run("MeanShape", face_model=head, face_code=code, model=personal)
    personal.model.meta["head"] = "flame"
    with pytest.raises(ValueError, match="trained with the flame head, the face model is the open head"):
        pack.run("MeanShape", face_model=head, face_code=face[3], model=personal)
    with pytest.raises(ValueError, match="'model' is not a DiffusionRig"):
        pack.run("MeanShape", face_model=head, face_code=face[3], model=None)
