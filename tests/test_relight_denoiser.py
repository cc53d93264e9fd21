"""DiFaReli's denoiser against recorded outputs, against copies instead of shared parts, and its files."""

import pytest
import torch
import torch.nn.functional as F

from rig_core import checkpoints
from rig_core.denoisers.relight import DiFaReli, RelightCondition, RelightConfig, both, start_open
from rig_core.denoisers.rig import DiffusionRig, RigConfig
from rig_core.diffusion import training_loss
from rig_core.files import CheckpointError
from tests.golden_files import golden, recipe, relight_keys, relight_pair, small_relight

SMALL = RelightConfig(32, 32, (1, 2, 2), 1, (16, 8), cond_dim=672, proj_dim=32)
PUBLISHED = {
    "small": SMALL,
    "difareli_64": RelightConfig(64, channel_mult=(1, 2, 3, 4)),
    "difareli_128": RelightConfig(128, channel_mult=(1, 1, 2, 3, 4)),
    "difareli_256": RelightConfig(),
}
TINY = RelightConfig(16, 16, (1, 2), 1, (8,), 2, 0.0, 8, cond_dim=9, proj_dim=8)


def filled(config, seed=0):
    """A model without the zeros of a fresh one."""
    model = DiFaReli(config)
    model.load_state_dict(recipe({k: v.shape for k, v in model.state_dict().items()}, seed))
    return model.eval().requires_grad_(False)


def inputs(n, side=16, seed=1):
    g = torch.Generator().manual_seed(seed)
    x, spatial = (torch.randn(n, c, side, side, generator=g) for c in (3, 6))
    return x, spatial, torch.randn(n, TINY.cond_dim, generator=g)


def close(a, b, limit):
    assert a.shape == b.shape
    assert (a - b).abs().max() < limit


@pytest.fixture(scope="module")
def small():
    return small_relight()


@pytest.fixture(scope="module")
def tiny():
    return filled(TINY)


# ------------------------------------------------------------------------------------------ recorded runs


@pytest.mark.parametrize("name", PUBLISHED)
def test_keys_shapes_and_architecture_are_the_published_ones(name):
    unet, modulator = ({k: torch.empty(s, device="meta") for k, s in d.items()} for d in relight_keys(name))
    wanted = both(unet, modulator)
    assert len(wanted) == len(unet) + len(modulator)
    known = None if name != "small" else 32
    config = RelightConfig.from_state_dict(wanted, known)
    assert config == PUBLISHED[name]
    with torch.device("meta"):
        state = DiFaReli(config).state_dict()
    assert {k: v.shape for k, v in state.items()} == {k: v.shape for k, v in wanted.items()}


def test_weights_of_the_recording():
    """What the other tests rest on."""
    for state, part in zip(relight_pair(), ("unet", "modulator")):
        mark = golden("difareli_unet_forward")[1]["weights_fingerprint"][part]
        assert sum(v.double().sum() for v in state.values()).item() == pytest.approx(mark["sum"], abs=1e-3)
        last = state[mark["last_key"]].flatten()[:4].tolist()
        assert last == pytest.approx(mark["last_values"], rel=1e-5)


def test_latents_as_recorded(small):
    t, _ = golden("difareli_modulator_forward")
    with torch.no_grad():
        raw = small.ImgEncoder(t["cond_img"])
        condition = small.condition(t["cond_img"], torch.zeros(1, 672))
    assert len(raw) == len(condition.latents) == 7
    for i in range(7):
        wanted = t[f"latent.{i:02d}"]
        close(raw[i][:, ::4], wanted, 1e-5 * wanted.abs().max())
        close(condition.latents[i][:, ::4], wanted.tanh(), 3e-5)


def test_forward_as_recorded(small):
    u, m = golden("difareli_unet_forward")[0], golden("difareli_modulator_forward")[0]
    with torch.no_grad():
        out = small(u["x"], u["t"], small.condition(m["cond_img"], u["cond_params"]))
    close(out, u["out"], 1e-5 * u["out"].abs().max())


def test_training_loss_as_recorded(small):
    t, _ = golden("difareli_training_losses")
    with torch.no_grad():
        condition = small.condition(t["cond_img"], t["cond_params"])
        loss = training_loss(small, t["x_start"], t["t"], t["noise"], condition)
    torch.testing.assert_close(loss, t["loss"], rtol=1e-5, atol=0)


@pytest.mark.slow
def test_full_128_model_as_recorded():
    t, meta = golden("difareli128_full_forward")
    model = DiFaReli(PUBLISHED["difareli_128"])
    model.load_state_dict(both(*relight_pair("difareli_128", meta["recipe_seed"]["unet"])))
    model.eval()
    x = torch.randn(1, 3, 128, 128, generator=torch.Generator().manual_seed(1516))
    spatial = 0.5 * torch.randn(1, 6, 128, 128, generator=torch.Generator().manual_seed(1517))
    close(spatial[..., :4, :4], t["cond_img_corner"], 1e-6)
    with torch.no_grad():
        raw = model.ImgEncoder(spatial)
        close(raw[-1], t["latent_last"], 2e-4)
        close(torch.stack([v.mean() for v in raw]), t["latent_means"], 2e-5)
        close(torch.stack([v.std() for v in raw]), t["latent_stds"], 5e-5)
        out = model(x, t["t"], model.condition(spatial, t["cond_params"]))
    close(out[:, :, ::2, ::2], t["out_sub"], 6e-5)


# ----------------------------------------------------------------------------------- what pictures share


def test_a_shared_gain_or_shared_latents_give_what_copies_give(tiny):
    x, spatial, vector = inputs(3)
    t = torch.tensor([5.0, 400.0, 999.0])
    cases = [
        (spatial, vector[:1], spatial, vector[:1].expand(3, -1)),  # many lights, one face
        (spatial[:1], vector, spatial[:1].expand(3, -1, -1, -1), vector),  # many shadows, one light
        (spatial[:1], vector[:1], spatial[:1].expand(3, -1, -1, -1), vector[:1].expand(3, -1)),
    ]
    for s, v, s_copied, v_copied in cases:
        shared, copied = tiny.condition(s, v), tiny.condition(s_copied, v_copied)
        assert len(copied) == 3 and len(shared) == max(len(s), len(v))
        assert [len(shared.gain), len(shared.latents[0])] == [len(v), len(s)]
        assert tiny(x, t, copied).std() > 0.1
        torch.testing.assert_close(tiny(x, t, shared), tiny(x, t, copied), rtol=0, atol=2e-5)


def test_pictures_of_a_batch_do_not_touch_each_other(tiny):
    x, spatial, vector = inputs(4)
    t, order = torch.tensor([5.0, 5.0, 700.0, 999.0]), torch.tensor([2, 0, 3, 1])
    condition = tiny.condition(spatial, vector)
    out = tiny(x, t, condition)
    torch.testing.assert_close(tiny(x[order], t[order], condition[order]), out[order], rtol=0, atol=2e-5)
    for i in range(4):
        alone = tiny(x[i : i + 1], t[i : i + 1], condition[i])
        torch.testing.assert_close(alone, out[i : i + 1], rtol=0, atol=2e-5)


def test_indexing_keeps_what_is_shared(tiny):
    _, spatial, vector = inputs(4)
    many = tiny.condition(spatial, vector[:1])
    assert len(many) == 4 and len(many[1:3]) == 2 and len(many[torch.tensor([True, False, True, False])]) == 2
    assert many[1:3].gain is many.gain
    assert torch.equal(many[-1].latents[2], many.latents[2][3:])
    assert many[-4].latents[0].shape[0] == 1
    for wrong in (4, -5):
        with pytest.raises(IndexError, match="holds 4 pictures"):
            many[wrong]
    half = many.to(torch.bfloat16)
    assert isinstance(half, RelightCondition) and half.latents[0].dtype == half.gain.dtype == torch.bfloat16


def test_each_part_of_the_condition_counts(tiny):
    x, spatial, vector = inputs(1)
    t, out = torch.tensor([300.0]), tiny(x, torch.tensor([300.0]), tiny.condition(spatial, vector))
    for c in range(6):
        other = spatial.clone()
        other[:, c] += 1
        assert (tiny(x, t, tiny.condition(other, vector)) - out).abs().max() > 1e-3, c
    for i in range(TINY.cond_dim):
        other = vector.clone()
        other[:, i] += 1
        assert (tiny(x, t, tiny.condition(spatial, other)) - out).abs().max() > 1e-4, i


def test_other_picture_sizes_and_types(tiny):
    x, spatial, vector = inputs(1, 32)
    x, spatial, t = x[..., :24], spatial[..., :24], torch.tensor([10.0])
    out = tiny(x, t, tiny.condition(spatial, vector))
    assert out.shape == (1, 3, 32, 24)
    double = tiny(x.double(), t, tiny.condition(spatial, vector))
    assert double.dtype == torch.float64 and torch.equal(double.float(), out)
    half = filled(TINY).to(torch.bfloat16)
    rough = half(x, t, half.condition(spatial, vector))
    assert rough.dtype == torch.float32
    assert F.mse_loss(rough, out).sqrt() < 0.05 * out.std()


def test_a_fresh_network_lets_everything_through():
    torch.manual_seed(3)
    model = start_open(DiFaReli(SMALL)).requires_grad_(False)
    g = torch.Generator().manual_seed(0)
    spatial, vector = torch.rand(2, 6, 32, 32, generator=g), torch.randn(2, 672, generator=g)
    condition = model.condition(spatial, vector)
    assert (condition.gain - 1).abs().max() < 0.35 and (condition.gain - 1).abs().mean() < 0.05
    for v in condition.latents:
        assert 0.6 < v.min() and 0.85 < v.mean() < 0.95


# -------------------------------------------------------------------------------------------- wrong input


def test_wrong_conditions_say_so(tiny):
    x, spatial, vector = inputs(2)
    condition = tiny.condition(spatial, vector)
    cases = [
        (lambda: tiny.condition(spatial[:, :5], vector), "spatial condition must be"),
        (lambda: tiny.condition(spatial, vector[:, 1:]), r"must be \[M,9\], got \[2, 8\]: use the head"),
        (lambda: tiny.condition(spatial, vector[0]), "vector condition must be"),
        (lambda: tiny.condition(spatial, vector[:1].expand(3, -1)), "3 vectors cannot serve 2"),
        (lambda: tiny.condition(spatial[..., 1:], vector), "multiples of 2, got 16 x 15"),
        (lambda: tiny(x[..., 1:, :], torch.ones(2), condition), "multiples of 2, got 15 x 16"),
        (lambda: tiny(x[..., 2:], torch.ones(2), condition), r"pictures of \[16, 16\], this one"),
        (lambda: tiny(x[:1].expand(3, -1, -1, -1), torch.ones(3), condition), "holds 2 pictures, wanted"),
    ]
    for call, message in cases:
        with pytest.raises(ValueError, match=message) as e:
            call()
        assert "\n" not in str(e.value)


def test_architectures_that_do_not_fit():
    with pytest.raises(ValueError, match="image_size 31 is not a multiple"):
        RelightConfig(31, 16, (1, 2), 1, (8,), 2, 0.0, 8)
    with pytest.raises(ValueError, match="cond_dim must be a whole number"):
        RelightConfig(cond_dim=0)
    rig = DiffusionRig(RigConfig(16, 32, (1, 1), 1, (8,), latent_dim=8, encoder_width=4)).state_dict()
    with pytest.raises(ValueError, match="not the weights of a DiFaReli denoiser"):
        RelightConfig.from_state_dict(rig)


# ------------------------------------------------------------------------------------------------- files


def same(model, state):
    own = model.state_dict()
    assert own.keys() == state.keys()
    return all(torch.equal(own[k], state[k]) for k in own)


def test_published_pairs_load_with_and_without_naming_the_second(tmp_path):
    unet, modulator = relight_pair()
    first, second = tmp_path / "ImgCond_ema_0.9999_10.pt", tmp_path / "ImgEncoder_ema_0.9999_10.pt"
    torch.save(unet, first)
    torch.save(modulator, second)
    model, meta = checkpoints.load_relight(first)
    assert same(model, both(unet, modulator)) and not model.training
    assert meta["head"] == "flame" and meta["config"]["cond_dim"] == 672
    assert meta["config"]["image_size"] == 32 and meta["config"]["num_heads"] == 4
    other = second.rename(tmp_path / "other.pt")
    with pytest.raises(CheckpointError, match="its Modulator .*ImgEncoder_ema_0.9999_10.pt is missing"):
        checkpoints.load_relight(first)
    model, _ = checkpoints.load_relight(first, other, dtype=torch.bfloat16)
    assert model.dtype == torch.bfloat16 and model.ImgEncoder.input_blocks[0][0].bias.dtype == torch.bfloat16


def test_wrong_files_are_named(tmp_path):
    unet, modulator = relight_pair()
    first, second, rig = tmp_path / "ImgCond_1.pt", tmp_path / "ImgEncoder_1.pt", tmp_path / "rig.safetensors"
    torch.save(unet, first)
    torch.save(modulator, second)
    torch.save(unet, tmp_path / "cond.pt")
    config = RigConfig(16, 32, (1, 1), 1, (8,), latent_dim=8, encoder_width=4)
    checkpoints.save_denoiser(rig, DiffusionRig(config))
    torch.save({k: v[:16] if v.ndim == 1 else v for k, v in modulator.items()}, tmp_path / "narrow.pt")
    nan = {**modulator, "input_blocks.0.0.bias": torch.full((32,), torch.nan)}
    torch.save(nan, tmp_path / "nan.pt")
    cases = [
        ((second,), "expected a DiFaReli denoiser"),
        ((rig,), "kind 'diffusion_rig'"),
        ((tmp_path / "cond.pt",), "name its ImgEncoder"),
        ((first, first), "expected DiFaReli's Modulator"),
        ((first, rig), "expected DiFaReli's Modulator"),
        ((first, tmp_path / "narrow.pt"), "ImgEncoder.* is "),
        ((first, tmp_path / "nan.pt"), "ImgEncoder.input_blocks.0.0.bias' holds numbers that are not finite"),
        ((first, tmp_path / "none.pt"), "none.pt is missing"),
    ]
    for paths, message in cases:
        with pytest.raises(CheckpointError, match=message) as e:
            checkpoints.load_relight(*paths)
        assert "\n" not in str(e.value)


@pytest.mark.parametrize("half", [False, True])
def test_own_files_come_back(tmp_path, tiny, half):
    path = tmp_path / "model.safetensors"
    checkpoints.save_denoiser(path, tiny, {"step": 7, "mean": torch.ones(3)}, half=half)
    model, meta = checkpoints.load_relight(path)
    assert model.config == TINY
    assert meta["step"] == 7 and meta["head"] == "open" and torch.equal(meta["mean"], torch.ones(3))
    wanted = tiny.state_dict()
    if half:
        wanted = {k: v.half().float() if v.ndim > 1 else v for k, v in wanted.items()}
    assert same(model, wanted)
    with pytest.raises(CheckpointError, match="kind 'difareli'"):
        checkpoints.load_rig(path)
