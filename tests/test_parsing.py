"""BiSeNet against the published network's numbers, DiFaReli's masks, and the loader's errors."""

import math
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from rig_core import checkpoints
from rig_core.estimators import parsing
from rig_core.files import CheckpointError
from tests.golden_files import golden


def weights(seed=9010):
    """Drawn in the order of the sorted keys."""
    g = torch.Generator().manual_seed(seed)
    state = parsing.BiSeNet().state_dict()
    for k in sorted(state):
        v = state[k]
        if not v.is_floating_point():
            state[k] = torch.zeros_like(v)
        elif k.endswith("running_var"):
            state[k] = 0.5 + torch.rand(v.shape, generator=g)
        else:
            r = torch.randn(v.shape, generator=g)
            if k.endswith("running_mean"):
                state[k] = 0.1 * r
            elif v.ndim >= 2:
                state[k] = r / math.sqrt(v[0].numel())
            else:
                state[k] = 1 + 0.1 * r if k.endswith("weight") else 0.05 * r
    return state


@pytest.fixture(scope="module")
def state():
    return weights()


@pytest.fixture(scope="module")
def model(state):
    model = parsing.BiSeNet()
    model.load_state_dict(state)
    return model.eval()


@pytest.fixture(scope="module")
def recorded():
    return golden("bisenet")


def picture(t):
    return t["image_u8"].permute(2, 0, 1)[None]


def test_keys_and_weights_are_the_published_ones(state, recorded):
    mark = recorded[1]["weights_fingerprint"]
    assert len(state) == 191
    assert sum(v.numel() for v in state.values()) == 13313119
    assert [min(state), max(state)] == [mark["first_key"], mark["last_key"]]
    assert float(sum(v.double().sum() for v in state.values())) == pytest.approx(mark["sum"], abs=0.01)


@torch.no_grad()
def test_logits_of_all_three_heads(model, recorded):
    t = recorded[0]
    out, out16, out32 = model(t["x"])
    assert out.shape == (1, 19, 160, 160)
    torch.testing.assert_close(out[..., ::8, ::8], t["out"], atol=2e-5, rtol=0)
    torch.testing.assert_close(out16[..., ::8, ::8], t["out16"], atol=2e-5, rtol=0)
    torch.testing.assert_close(out32[..., ::8, ::8], t["out32"], atol=2e-5, rtol=0)


@torch.no_grad()
def test_parse_of_a_picture(model, recorded):
    t, meta = recorded
    image = picture(t)
    x = parsing.preprocess(image.float() / 255)
    torch.testing.assert_close(x[..., ::16, ::16], t["x512_sub"], atol=1e-6, rtol=0)
    torch.testing.assert_close(model(x)[0][..., ::32, ::32], t["out512_sub"], atol=2e-5, rtol=0)
    labels = parsing.parse(model, image)
    assert labels.shape == (1, 256, 256) and labels.dtype == torch.int64
    sure = t["sure256"].bool()
    assert sure.float().mean() > 0.99
    assert torch.equal(labels[0][sure], t["anno256"].long()[sure])
    assert labels.unique().tolist() == meta["labels_present"]


@pytest.mark.parametrize("size", [(300, 300), (97, 700), (1111, 900)])
def test_pictures_are_resized_as_pil_does(size):
    array = np.random.default_rng(size[0]).integers(0, 256, (*size, 3), dtype=np.uint8)
    want = np.array(Image.fromarray(array).resize((512, 512), Image.Resampling.BILINEAR))
    got = parsing.preprocess(torch.from_numpy(array).permute(2, 0, 1)[None].float() / 255)[0].permute(1, 2, 0)
    got = (got * torch.tensor([0.229, 0.224, 0.225]) + torch.tensor([0.485, 0.456, 0.406])) * 255
    gap = (got - torch.from_numpy(want)).abs()
    assert gap.max() < 1.01  # PIL's weights are integers
    assert (gap > 0.5).float().mean() < 1e-3


def test_labels_come_back_at_the_size_of_the_picture_and_the_batch_is_cut(monkeypatch):
    model = parsing.BiSeNet()
    seen = []

    def ramp(x):
        seen.append(len(x))
        logits = torch.zeros(len(x), 19, 512, 512)
        logits[:, 3, :, :256] = 1
        logits[:, 5, 256:, 256:] = 1
        return logits, None, None

    monkeypatch.setattr(model, "forward", ramp)
    labels = parsing.parse(model, torch.rand(5, 3, 70, 90), chunk=2)
    assert seen == [2, 2, 1] and labels.shape == (5, 70, 90)
    want = torch.zeros(70, 90, dtype=torch.long)
    want[:, :45], want[35:, 45:] = 3, 5
    assert (labels == want).all()


def test_masks_are_difarelis():
    t, _ = golden("difareli_seg_masks")
    seg = t.pop("seg")[None].long()
    assert seg.unique().tolist() == list(range(19))
    assert {k.removeprefix("faceseg_") for k in t} == set(parsing.SELECTORS)
    for name, want in t.items():
        assert torch.equal(parsing.select(seg, name.removeprefix("faceseg_"))[0, 0], want.float()), name
    assert torch.equal(parsing.head_mask(seg)[0, 0], t["faceseg_head"].float())


def test_head_is_face_neck_and_hair():
    labels = torch.arange(19).reshape(1, 1, 19)
    on = parsing.head_mask(labels)[0, 0, 0].nonzero().flatten().tolist()
    assert on == [*range(1, 14), 14, 17]
    assert [parsing.CLASSES[i] for i in (0, 14, 15, 16, 17, 18)] == [
        "background",
        "neck",
        "necklace",
        "cloth",
        "hair",
        "hat",
    ]


# --- what cannot be used ---


def test_unknown_part_and_odd_labels():
    with pytest.raises(ValueError, match="unknown part of the face 'chin'.*faceskin"):
        parsing.select(torch.zeros(1, 4, 4, dtype=torch.long), "chin")
    with pytest.raises(ValueError, match=r"labels must be integers \[B,H,W\]"):
        parsing.head_mask(torch.zeros(1, 4, 4))
    with pytest.raises(ValueError, match=r"labels must be integers \[B,H,W\]"):
        parsing.head_mask(torch.zeros(1, 1, 4, 4, dtype=torch.long))


def test_pictures_that_cannot_be_parsed(model):
    image = torch.rand(2, 3, 64, 64)
    image[1, 0, 3, 3] = torch.nan
    with pytest.raises(ValueError, match="picture 1 of the batch holds NaN"):
        parsing.parse(model, image)
    with pytest.raises(ValueError, match=r"\[B,C,H,W\]"):
        parsing.parse(model, torch.rand(3, 64, 64))
    with pytest.raises(ValueError, match="1, 3 or 4 channels"):
        parsing.parse(model, torch.rand(1, 5, 64, 64))


def test_published_file_and_safetensors_give_the_same_parser(tmp_path, state, recorded):
    torch.save(state, tmp_path / "79999_iter.pth")
    save_file(state, tmp_path / "parser.safetensors")
    x = recorded[0]["x"][..., :64, :64]
    with torch.no_grad():
        a, b = (checkpoints.load_parser(tmp_path / n)(x)[0] for n in ("79999_iter.pth", "parser.safetensors"))
    assert torch.equal(a, b) and a.std() > 0
    loaded = checkpoints.load_parser(tmp_path / "79999_iter.pth")
    assert not loaded.training and not any(p.requires_grad for p in loaded.parameters())


def broken(name):
    state = {k: torch.zeros(v.shape, dtype=v.dtype) for k, v in parsing.BiSeNet().state_dict().items()}
    if name == "other":
        return {"conv1.weight": torch.zeros(4)}
    if name == "cut":
        del state["ffm.conv1.weight"]
    if name == "classes":
        state["conv_out.conv_out.weight"] = torch.zeros(11, 256, 1, 1)
    if name == "nan":
        state["cp.resnet.bn1.bias"][5] = torch.nan
    return state


@pytest.mark.parametrize(
    "name, message",
    [
        ("other", "expected the face parser BiSeNet, found tensors like 'conv1.weight'.*79999_iter"),
        ("cut", "'ffm.conv1.weight' is missing"),
        ("classes", r"\[11, 256, 1, 1\] instead of \[19, 256, 1, 1\]"),
        ("nan", "'cp.resnet.bn1.bias' holds numbers that are not finite"),
    ],
)
def test_files_that_are_no_parser(tmp_path, name, message):
    save_file(broken(name), tmp_path / "file.safetensors")
    with pytest.raises(CheckpointError, match=message) as e:
        checkpoints.load_parser(tmp_path / "file.safetensors")
    assert "file.safetensors" in str(e.value) and "\n" not in str(e.value)


def test_files_of_another_kind(tmp_path):
    with pytest.raises(CheckpointError, match="none.pth: cannot be read"):
        checkpoints.load_parser(tmp_path / "none.pth")
    with pytest.raises(CheckpointError, match="expected the face parser BiSeNet, found kind 'open_head'"):
        checkpoints.load_parser(checkpoints.ASSETS / "open_head.safetensors")
    with zipfile.ZipFile(tmp_path / "x.pth", "w") as z:
        z.writestr("x/nothing", b"")
    with pytest.raises(CheckpointError, match="x.pth: a damaged or cut PyTorch archive"):
        checkpoints.load_parser(tmp_path / "x.pth")
    (tmp_path / "page.pth").write_text("<html>not found")
    with pytest.raises(CheckpointError, match="a web page: download the file itself"):
        checkpoints.load_parser(tmp_path / "page.pth")
