"""The command that makes a personal model, from a folder of pictures to a file that loads."""

import json

import pytest
import torch

from rig_core import checkpoints, train
from rig_core.denoisers.rig import DiffusionRig, RigConfig
from training import stage2, synth
from training.run_arguments import save_picture


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    torch.manual_seed(0)
    net = DiffusionRig(RigConfig(64, 16, (1, 2), 1, (), 1, 0.0, 8, 16, 8))
    torch.nn.init.normal_(net.denoisingUNet.out[2].weight, std=0.02)
    path = tmp_path_factory.mktemp("base") / "base.safetensors"
    checkpoints.save_denoiser(path, net, {"stage": 1})
    return path


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Three pictures of a person and a blank one."""
    folder = tmp_path_factory.mktemp("album")
    for i in range(3):
        picture = synth.render([40 + i], 128, person=[900_100], pose=[7]).image[0]
        save_picture(picture, folder / f"photo {i}.png")
    save_picture(torch.full((3, 96, 96), 0.4), folder / "wall.png")
    return folder


def run(photos, base, out, *more):
    stage2.main(
        [
            "--album",
            str(photos),
            "--name",
            "anna",
            "--base",
            str(base),
            "--out",
            str(out),
            "--precision",
            "fp32",
        ]
        + list(more)
    )


@pytest.mark.slow
def test_from_photos_to_a_model_and_on(photos, base, tmp_path, capsys):
    run(photos, base, tmp_path, "--steps", "2")
    said = capsys.readouterr().out
    assert "3 photos taken, 1 left out" in said and "wall.png\tno face found" in said
    assert "2 steps of" in said and "GiB" in said
    rig, meta = checkpoints.load_rig(tmp_path / "anna.safetensors")
    assert meta["person"] == "anna" and meta["step"] == 2 and meta["photos"] == 3
    assert meta["base"] == "base.safetensors" and meta["album"] == [f"photo {i}.png" for i in range(3)]
    assert (tmp_path / "rejected.txt").read_text().startswith("wall.png\tno face")
    assert (tmp_path / "album.png").stat().st_size > 1000
    assert (tmp_path / "samples" / "0000002.png").exists()
    options = json.loads((tmp_path / "options.json").read_text())
    assert options["recipe"]["batch"] == 4 and options["lr"] == pytest.approx(3e-4)

    with pytest.raises(FileExistsError, match="--resume"):
        run(photos, base, tmp_path, "--steps", "3")
    run(photos, base, tmp_path, "--steps", "3", "--resume")
    assert checkpoints.load_rig(tmp_path / "anna.safetensors")[1]["step"] == 3
    assert (tmp_path / train.STATE).exists()


def test_adapters_alone(photos, base, tmp_path):
    run(photos, base, tmp_path, "--steps", "1", "--lora", "2", "--own-shapes")
    path = tmp_path / "anna.safetensors"
    with pytest.raises(checkpoints.CheckpointError, match="base.safetensors, which is not in"):
        checkpoints.load_rig(path)
    rig, meta = checkpoints.load_rig(path, base=base)
    assert meta["rank"] == 2 and "mean_shape" not in meta
    assert rig.config == checkpoints.load_rig(base)[0].config


def test_odd_names_are_refused_before_any_work(photos, base, tmp_path, capsys):
    with pytest.raises(SystemExit):
        stage2.main(["--album", str(photos), "--name", "../anna", "--base", str(base)])
    assert "letters, digits" in capsys.readouterr().err


def test_a_base_of_flame_asks_for_its_files(photos, base, tmp_path):
    rig, _ = checkpoints.load_rig(base)
    other = tmp_path / "other.safetensors"
    checkpoints.save_denoiser(other, rig, {"head": "flame"})
    with pytest.raises(ValueError, match="trained with the flame head"):
        run(photos, other, tmp_path / "run")


def test_an_album_without_faces_says_why(base, tmp_path):
    folder = tmp_path / "album"
    save_picture(torch.full((3, 96, 96), 0.4), folder / "wall.png")
    with pytest.raises(ValueError, match="none of the 1 photos can be used. wall.png: no face found"):
        run(folder, base, tmp_path / "run")
