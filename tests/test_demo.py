import sys

import numpy as np
import pytest
import torch
from PIL import Image

from rig_core import checkpoints
from rig_core.denoisers.relight import DiFaReli, RelightConfig, start_open
from rig_core.denoisers.rig import DiffusionRig, RigConfig
from training import demo


@pytest.mark.slow
def test_demo_writes_every_edit_and_leaves_the_rest_of_the_photo(tmp_path, monkeypatch, capsys):
    torch.manual_seed(0)
    model = DiffusionRig(RigConfig(64, 32, (1, 2), 1, (), 1, 0.0, 8, 8, 16))
    torch.nn.init.normal_(model.denoisingUNet.out[2].weight, std=0.02)
    checkpoints.save_denoiser(tmp_path / "tiny.safetensors", model)
    relight = start_open(DiFaReli(RelightConfig(64, 32, (1, 2), 1, (), 1, 0.0, 8, 241, 16)))
    torch.nn.init.normal_(relight.ImgCond.out[2].weight, std=0.02)
    checkpoints.save_denoiser(tmp_path / "tiny relight.safetensors", relight)
    photo = checkpoints.ASSETS / "astronaut.jpg"
    out = tmp_path / "out"
    arguments = ["demo", str(photo), "--rig", str(tmp_path / "tiny.safetensors"), "--out", str(out)]
    arguments += ["--relight", str(tmp_path / "tiny relight.safetensors")]
    monkeypatch.setattr(sys, "argv", arguments)
    demo.main()
    titles = [*demo.LIGHTS, *demo.TURNS, *demo.RELIGHTS, *demo.SHADOWS]
    before = np.array(Image.open(photo).convert("RGB"))
    for title in titles:
        after = np.array(Image.open(out / f"astronaut {title}.png"))
        assert after.shape == before.shape
        assert np.array_equal(after[300:], before[300:])  # the suit, far below the face
        changed = (after[60:200, 160:280] != before[60:200, 160:280]).mean()
        assert changed > (0.02 if title in demo.SHADOWS else 0.3)
    page = Image.open(out / "sheet.png")
    assert page.size == (demo.SIDE * 8, 2 * (demo.SIDE + 22))
    assert "1 photos" in capsys.readouterr().out


def test_the_default_model_is_in_the_pack():
    model, meta = checkpoints.load_rig()
    assert model.config.image_size == 128
    assert sum(p.numel() for p in model.parameters()) * 2 < 16e6  # bytes in half precision
    assert meta["head"] == "open"
