import shutil
import sys

import numpy as np
import pytest
from PIL import Image

from rig_core import buffers, checkpoints
from rig_core.data import Dataset
from training import prepare


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    for name in ("astronaut", "grace_hopper"):
        shutil.copy(checkpoints.ASSETS / f"{name}.jpg", folder)
    Image.fromarray(np.full((80, 80, 3), 120, np.uint8)).save(folder / "wall.png")
    (folder / "broken.jpg").write_bytes(b"\xff\xd8 not a picture")
    (folder / "notes.txt").write_text("not a photo")
    return folder


def run(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["prepare", *map(str, arguments)])
    prepare.main()


def test_photos_become_a_dataset(photos, tmp_path, monkeypatch, capsys):
    out = tmp_path / "set"
    run(monkeypatch, "--photos", photos, "--out", out, "--size", 64, "--variants", 2)
    dataset = Dataset.open(out)
    assert sorted(e.name for e in dataset.entries) == sorted(
        f"{n}{v}" for n in ("astronaut", "grace_hopper") for v in ("", "~1", "~2")
    )
    assert {e.person for e in dataset.entries} == {"astronaut", "grace_hopper"}
    assert "2 photos rejected" in capsys.readouterr().out
    reasons = dict(line.split("\t") for line in (out / "rejected.txt").read_text().splitlines())
    assert "cannot be read" in reasons["broken.jpg"] and reasons["wall.png"]

    head, photo = checkpoints.load_head(), dataset.select(tag="photo")
    image, code = photo.images([0, 1], 64).float() / 255, photo.codes([0, 1])
    b = buffers.render(head, code)
    eyes_to_mouth = slice(30, 44)
    error = (b.rendered - image)[:, :, eyes_to_mouth, 24:40].abs().mean((1, 2, 3))
    assert error.max() < 0.12

    run(monkeypatch, "--photos", photos, "--out", out, "--size", 64, "--variants", 2)  # nothing left to do
    assert len(Dataset.open(out)) == 6


def test_an_empty_folder_is_refused(tmp_path, monkeypatch):
    with pytest.raises(SystemExit):
        run(monkeypatch, "--photos", tmp_path, "--out", tmp_path / "set")
