"""Stage 2 on a tiny network: what moves, what stays, what the file says, and that a stop loses nothing."""

from dataclasses import replace

import pytest
import torch

from rig_core import buffers, checkpoints, files, personal, pipeline, train
from rig_core.denoisers.rig import DiffusionRig, RigConfig

SIZE = 32
CONFIG = train.Config(steps=3, lr=1e-3, warmup=1, ema=0.5, precision="fp32", sample_every=10**9)
RECIPE = personal.Recipe(batch=2)


def base() -> DiffusionRig:
    torch.manual_seed(0)
    net = DiffusionRig(RigConfig(SIZE, 16, (1, 2), 1, (16,), 1, 0.0, 8, 16, 8)).eval()
    for p in net.parameters():
        if not p.any():
            torch.nn.init.normal_(p, std=0.05)
    return net


@pytest.fixture(scope="module")
def head():
    return checkpoints.load_head()


@pytest.fixture(scope="module")
def codes(head):
    """Four photos of a person: shapes that scatter around one, turned and lit differently."""
    g = torch.Generator().manual_seed(2)
    code = head.mean_code(4, SIZE)
    pose = code.pose.clone()
    pose[:, 1] = torch.tensor([-0.3, 0.0, 0.2, 0.4])
    return code.replace(
        shape=0.8 + 0.3 * torch.randn(4, head.sizes.shape, generator=g),
        pose=pose,
        light=code.light * torch.tensor([0.7, 0.9, 1.0, 1.1])[:, None, None],
    )


@pytest.fixture(scope="module")
def images(head, codes):
    return buffers.render(head, codes, SIZE).rendered.clamp(0, 1)


def run(head, images, codes, out, config=CONFIG, recipe=RECIPE, rig=None, **options):
    path = out / "person.safetensors"
    state = personal.fit(config, recipe, rig or base(), head, images, codes, out, path, **options)
    return state, path


def test_the_mean_shape_keeps_the_face_in_place(head, codes):
    shape = codes.shape.mean(0, keepdim=True)
    moved = personal.with_shape(head, codes, shape)
    assert torch.equal(moved.shape, shape.expand_as(codes.shape))

    def centre(c):
        return buffers.to_image(head.centre(head.verts(c.shape, c.exp, c.pose))[:, None], c)[..., :2]

    assert (centre(moved) - centre(codes)).abs().max() < 1e-5
    unmoved = codes.replace(shape=moved.shape)
    assert (centre(unmoved) - centre(codes)).abs().max() > 1e-3
    assert personal.with_shape(head, codes, None) is codes


def test_inputs_are_those_of_the_photos_and_draw_all_alike(head, images, codes):
    rig = base()
    recipe = personal.Recipe(batch=2)
    batch, prepare = personal.inputs(rig, head, images, codes, recipe, 5, "cpu")
    drawn = [batch(step) for step in range(6)]
    picks, others = (torch.cat(v) for v in zip(*drawn))
    assert torch.bincount(picks).tolist() == [3, 3, 3, 3]
    assert (picks != others).all() and set(others.tolist()) <= {0, 1, 2, 3}
    assert all(torch.equal(a, b) for a, b in zip(batch(2), drawn[2]))
    x_0, (physical, _, code) = prepare(drawn[0])
    i, j = drawn[0]
    assert torch.equal(x_0, images[i] * 2 - 1)
    assert (physical - buffers.render(head, codes[i], SIZE).stack()).abs().max() < 1e-5
    with torch.no_grad():
        assert (code - rig.encode(images[j] * 2 - 1)).abs().max() < 1e-5
    batch, _ = personal.inputs(rig, head, images, codes, replace(recipe, others=False), 5, "cpu")
    assert all(torch.equal(*batch(step)) for step in range(3))
    batch, _ = personal.inputs(rig, head, images[:1], codes[0], recipe, 5, "cpu")
    assert all(torch.equal(*batch(step)) for step in range(3))  # one photo is its own other


def test_the_denoiser_learns_and_the_encoder_stays(head, images, codes, tmp_path):
    before = base().state_dict()
    losses = []
    config = replace(CONFIG, steps=60)
    state, path = run(
        head, images, codes, tmp_path, config, on_step=lambda _, loss: losses.append(loss.mean())
    )
    after = state.model.state_dict()
    for k, v in before.items():
        same = torch.equal(v, after[k])
        assert same == k.startswith("encoder."), k
    assert torch.stack(losses[-15:]).mean() < 0.6 * torch.stack(losses[:5]).mean()
    rig, meta = checkpoints.load_rig(path)
    assert meta["stage"] == 2 and meta["step"] == 60 and meta["photos"] == 4 and meta["head"] == "open"
    assert torch.allclose(meta["mean_shape"], codes.shape.mean(0, keepdim=True))
    for k, v in rig.state_dict().items():
        if v.is_floating_point():
            assert (v - state.ema.state_dict()[k]).abs().max() <= 1e-3 * v.abs().max()


def test_own_shapes_leave_no_mean_shape(head, images, codes, tmp_path):
    recipe = personal.Recipe(batch=2, mean_shape=False)
    _, path = run(head, images, codes, tmp_path, recipe=recipe)
    assert "mean_shape" not in checkpoints.load_rig(path)[1]


def test_adapters_are_a_small_file_beside_their_base(head, images, codes, tmp_path):
    checkpoints.save_denoiser(tmp_path / "base.safetensors", base())
    recipe = personal.Recipe(batch=2, rank=2)
    about = {"person": "somebody", "base": "base.safetensors"}
    state, path = run(head, images, codes, tmp_path, replace(CONFIG, steps=20, lr=1e-2), recipe, about=about)
    assert path.stat().st_size < 0.2 * (tmp_path / "base.safetensors").stat().st_size
    rig, meta = checkpoints.load_rig(path)
    assert meta["person"] == "somebody" and torch.is_tensor(meta["mean_shape"])
    x, t = torch.randn(1, 3, SIZE, SIZE), torch.tensor([500.0])
    with torch.no_grad():
        outs = []
        for net in (rig, state.ema, base()):
            condition = net.condition(torch.ones(1, 9, SIZE, SIZE), images[:1])
            outs.append(net(x, t, condition))
    assert (outs[0] - outs[1]).abs().max() < 5e-3 * outs[1].abs().max()
    assert (outs[0] - outs[2]).abs().max() > 5e-2 * outs[1].abs().max()

    other = base()
    torch.nn.init.normal_(other.denoisingUNet.out[2].weight, std=0.5)
    checkpoints.save_denoiser(tmp_path / "base.safetensors", other)
    with pytest.raises(files.CheckpointError, match="adapters for another model"):
        checkpoints.load_rig(path)
    (tmp_path / "base.safetensors").unlink()
    with pytest.raises(files.CheckpointError, match="adapters for base.safetensors, which is not in"):
        checkpoints.load_rig(path)


@pytest.mark.parametrize("rank", [0, 2])
def test_resumed_bit_for_bit(head, images, codes, tmp_path, rank):
    recipe = personal.Recipe(batch=2, rank=rank)
    whole, path = run(head, images, codes, tmp_path / "whole", replace(CONFIG, steps=5), recipe)
    run(head, images, codes, tmp_path / "parts", replace(CONFIG, steps=5), recipe, stop=stop_after(2))
    parts, other = run(head, images, codes, tmp_path / "parts", replace(CONFIG, steps=5), recipe, resume=True)
    for (k, a), b in zip(whole.ema.state_dict().items(), parts.ema.state_dict().values()):
        assert torch.equal(a, b), k
    assert path.read_bytes() == other.read_bytes()


def stop_after(steps: int):
    asked = iter(range(1, 10**6))
    return lambda: next(asked) >= steps


def test_nothing_is_overwritten(head, images, codes, tmp_path):
    (tmp_path / "person.safetensors").write_bytes(b"of somebody else")
    with pytest.raises(FileExistsError, match="take another name"):
        run(head, images, codes, tmp_path)
    assert (tmp_path / "person.safetensors").read_bytes() == b"of somebody else"


def test_pictures_of_another_size_are_refused(head, images, codes, tmp_path):
    with pytest.raises(ValueError, match="the base works at 32 px"):
        run(head, images[..., :16, :16], codes, tmp_path)


def test_a_base_of_another_head_is_refused(head):
    with pytest.raises(ValueError, match="trained with the flame head, the face model is the open head"):
        personal.check_head(head, {"head": "flame"})
    personal.check_head(head, {"head": "open"})


def test_sheet_shows_the_photo_and_four_lights(head, images, codes):
    crop = pipeline.align.Crop(torch.eye(3)[None], SIZE)
    sheet = personal.sheet(base(), head, pipeline.Portrait(images[:1], crop, codes[0]))
    assert sheet.shape == (3, SIZE, 5 * SIZE)
    assert torch.equal(sheet[:, :, :SIZE], images[0])
    tiles = sheet[:, :, SIZE:].split(SIZE, 2)
    assert all((a - b).abs().max() > 1e-3 for a, b in zip(tiles, tiles[1:]))


def test_forecast_counts_what_training_holds(head):
    whole = personal.forecast(CONFIG, personal.Recipe(batch=2), base(), "cpu")
    count = sum(p.numel() for p in base().parameters())
    unet = sum(p.numel() for p in base().denoisingUNet.parameters())
    assert whole.bytes > 4 * (2 * count + 3 * unet) and whole.seconds > 0
    more = personal.forecast(CONFIG, personal.Recipe(batch=4), base(), "cpu")
    held = 4 * (2 * count + 3 * unet)
    assert (more.bytes - held) / (whole.bytes - held) == pytest.approx(2, rel=0.15)
    small = personal.forecast(CONFIG, personal.Recipe(batch=2, rank=1), base(), "cpu")
    assert small.bytes < whole.bytes


def test_small_bases_take_larger_steps():
    assert personal.usual(base()) == (personal.SMALL_STEPS, personal.SMALL_LR)
    with torch.device("meta"):
        wide = DiffusionRig(RigConfig(64, 128, (1, 1), 1, ()))
    assert personal.usual(wide) == (5000, 1e-5)
    assert personal.usual(wide, rank=4) == (5000, pytest.approx(1e-4))
