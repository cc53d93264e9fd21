"""The DiffusionRig denoiser against recorded outputs, against a plain second implementation, and itself."""

import json
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from rig_core.denoisers import blocks
from rig_core.denoisers.rig import DiffusionRig, RigConfig
from tests.plain_unet import plain_forward

GOLDEN = Path(__file__).parent / "golden"
PUBLISHED = {
    "case_diffrig_small_64": RigConfig(64, 32, (1, 2, 2), 1, (16,)),
    "diffrig_256": RigConfig(),
    "diffrig_512": RigConfig(512, 128, (0.5, 1, 1, 2, 2, 4, 4)),
}
TINY = RigConfig(
    32, 32, (1, 1, 2), 1, (16, 8), num_heads=2, latent_dim=8, encoder_width=8, dropout=0.2, norm_groups=8
)


def golden(name):
    with safe_open(GOLDEN / f"{name}.safetensors", "pt") as f:
        return {k: f.get_tensor(k) for k in f.keys()}, json.loads(f.metadata()["meta"])


def manifest(name):
    return json.loads((GOLDEN / f"{name}.json").read_text())["state_dict"]


def recipe(shapes, seed):
    """The weights behind the golden files: one generator over the sorted keys."""
    g = torch.Generator().manual_seed(seed)
    out = {}
    for k in sorted(shapes):
        shape, dtype = shapes[k]
        if not dtype.startswith("float"):
            out[k] = torch.zeros(shape, dtype=getattr(torch, dtype))
        elif k.endswith("running_var"):
            out[k] = 0.5 + torch.rand(shape, generator=g)
        else:
            r = torch.randn(shape, generator=g)
            if k.endswith("running_mean"):
                out[k] = 0.1 * r
            elif len(shape) >= 2:
                out[k] = r / math.sqrt(math.prod(shape[1:]))
            else:
                out[k] = 1 + 0.1 * r if k.endswith("weight") else 0.05 * r
    return out


def filled(config, seed=0):
    """A model without the zeros of a fresh one."""
    model = DiffusionRig(config)
    state = {k: (v.shape, str(v.dtype).removeprefix("torch.")) for k, v in model.state_dict().items()}
    model.load_state_dict(recipe(state, seed))
    return model.eval().requires_grad_(False)


def inputs(n, height, width, config=TINY, seed=1):
    g = torch.Generator().manual_seed(seed)
    x, physical = (torch.randn(n, c, height, width, generator=g) for c in (3, 9))
    return x, physical, torch.randn(n, config.latent_dim, generator=g)


def relative(found, wanted):
    return ((found - wanted).abs().max() / wanted.abs().max()).item()


@pytest.fixture(scope="module")
def small():
    model = DiffusionRig(PUBLISHED["case_diffrig_small_64"])
    model.load_state_dict(recipe(manifest("case_diffrig_small_64"), 1001))
    return model.eval().requires_grad_(False).to(memory_format=torch.channels_last)


@pytest.fixture(scope="module")
def tiny():
    return filled(TINY).to(memory_format=torch.channels_last)


# recorded outputs


@pytest.mark.parametrize("width", [32, 33, 128])
def test_timestep_embedding_is_the_recorded_one(width):
    t, _ = golden("timestep_embedding")
    torch.testing.assert_close(
        blocks.timestep_embedding(t["timesteps"], width), t[f"emb{width}"], rtol=0, atol=2e-4
    )


def test_recipe_gives_the_recorded_weights(small):
    print_ = golden("diffrig_unet_forward")[1]["weights_fingerprint"]
    state = small.state_dict()
    assert sum(v.double().abs().sum().item() for v in state.values()) == pytest.approx(
        print_["abs_sum"], rel=1e-6
    )
    first = state[print_["first_key"]].flatten()[:4]
    torch.testing.assert_close(first, torch.tensor(print_["first_values"]), rtol=1e-5, atol=1e-7)


def test_unet_gives_the_recorded_eps(small):
    t, _ = golden("diffrig_unet_forward")
    condition = small.condition(t["physic_cond"], code=t["detail_cond"])
    assert relative(small(t["x"], t["t"], condition), t["out"]) < 1e-4
    assert relative(small(t["x"], t["t"] * 0.5, condition), t["out_half_t"]) < 1e-4
    condition = small.condition(t["physic_cond"], t["x_start"])
    assert relative(small(t["x"], t["t"], condition), t["out_from_x_start"]) < 1e-4


def test_encoder_gives_the_recorded_code(small):
    t, _ = golden("diffrig_encoder")
    assert relative(small.encode(t["image"]), t["latent"]) < 1e-4
    assert relative(small.encode(t["image256"]), t["latent256"]) < 1e-4


@pytest.mark.slow
def test_published_256_model_gives_the_recorded_eps():
    t, meta = golden("diffrig256_full_forward")
    model = DiffusionRig(RigConfig.from_state_dict(state := recipe(manifest("diffrig_256"), 1313)))
    model.load_state_dict(state)
    model.eval().requires_grad_(False).to(memory_format=torch.channels_last)
    x = torch.randn(1, 3, 256, 256, generator=torch.Generator().manual_seed(1314))
    physical = 0.5 * torch.randn(1, 9, 256, 256, generator=torch.Generator().manual_seed(1315))
    torch.testing.assert_close(x[:, :, :4, :4], t["x_corner"])
    torch.testing.assert_close(physical[:, :, :4, :4], t["physic_corner"])
    eps = model(x, t["t"], model.condition(physical, code=t["detail_cond"]))
    assert relative(eps[:, :, ::2, ::2], t["out_sub"]) < 1e-4


# architecture


@pytest.mark.parametrize("name", PUBLISHED)
def test_keys_and_shapes_are_the_published_ones(name):
    with torch.device("meta"):
        model = DiffusionRig(PUBLISHED[name])
    found = {k: [list(v.shape), str(v.dtype).removeprefix("torch.")] for k, v in model.state_dict().items()}
    assert found == manifest(name)


@pytest.mark.parametrize("name", PUBLISHED)
def test_architecture_of_published_files_is_read_off_the_shapes(name):
    state = {k: torch.empty(shape, device="meta") for k, (shape, _) in manifest(name).items()}
    assert RigConfig.from_state_dict(state) == PUBLISHED[name]


@settings(max_examples=25, deadline=None)
@given(
    mult=st.lists(st.sampled_from([0.5, 1, 1.5, 2, 3]), min_size=1, max_size=5),
    n=st.integers(1, 3),
    attention=st.sets(st.integers(0, 4), min_size=1),
    latent=st.integers(1, 70),
    encoder=st.integers(1, 20),
)
def test_architecture_survives_the_weights(mult, n, attention, latent, encoder):
    size = 128
    at = tuple(size >> i for i in sorted(attention) if i < len(mult))
    config = RigConfig(size, 64, tuple(mult), n, at, 2, 0.0, 16, latent, encoder)
    with torch.device("meta"):
        state = DiffusionRig(config).state_dict()
    assert (
        RigConfig.from_state_dict(state, image_size=size, num_heads=2, dropout=0.0, norm_groups=16) == config
    )


def test_foreign_weights_are_refused():
    state = {k: torch.empty(v[0], device="meta") for k, v in manifest("case_diffrig_small_64").items()}
    with pytest.raises(ValueError, match="not the weights of a DiffusionRig"):
        RigConfig.from_state_dict({"layer.weight": torch.zeros(2, 2)})
    with pytest.raises(ValueError, match="encoder.fc.weight"):
        RigConfig.from_state_dict({k: v for k, v in state.items() if not k.startswith("encoder.fc")})
    with pytest.raises(ValueError, match="blocks are missing"):
        RigConfig.from_state_dict({k: v for k, v in state.items() if ".output_blocks.5." not in k})


def test_impossible_configurations_are_refused():
    with pytest.raises(ValueError, match="multiple of norm_groups, 32"):
        RigConfig(width=48)
    with pytest.raises(ValueError, match="image_size 100"):
        RigConfig(image_size=100)
    with pytest.raises(ValueError, match="norm_groups must be a whole number above 0"):
        RigConfig(norm_groups=0)
    with pytest.raises(ValueError, match="shared by 3 heads"):
        RigConfig(num_heads=3)
    assert RigConfig(width=48, norm_groups=8).channels[-1] == 192


# the plain implementation


@pytest.mark.parametrize("t", [[500, 500, 500], [3, 250.5, 999]])
@pytest.mark.parametrize("size", [(32, 32), (16, 40), (64, 48)])
def test_equals_the_plain_implementation(tiny, t, size):
    x, physical, code = inputs(3, *size)
    t = torch.tensor(t)
    eps = tiny(x, t, tiny.condition(physical, code=code))
    assert relative(eps, plain_forward(tiny, x, t, physical, code)) < 2e-5


def test_plain_implementation_gives_the_recorded_eps(small):
    t, _ = golden("diffrig_unet_forward")
    assert relative(plain_forward(small, t["x"], t["t"], t["physic_cond"], t["detail_cond"]), t["out"]) < 1e-4


def test_gradients_equal_the_plain_implementation():
    model = filled(TINY).requires_grad_(True)
    x, physical, code = inputs(2, 64, 64)
    t = torch.tensor([10, 900])
    wanted = torch.autograd.grad(
        plain_forward(model, x, t, physical, code).square().sum(), list(model.denoisingUNet.parameters())
    )
    found = torch.autograd.grad(
        model(x, t, model.condition(physical, code=code)).square().sum(),
        list(model.denoisingUNet.parameters()),
    )
    largest = max(w.abs().max() for w in wanted)
    for (name, _), f, w in zip(model.denoisingUNet.named_parameters(), found, wanted):
        assert (f - w).abs().max() < 1e-4 * w.abs().max() + 1e-6 * largest, name


def test_memory_format_of_the_weights_does_not_matter(tiny):
    x, physical, code = inputs(2, 32, 32)
    t = torch.tensor([7, 700])
    nchw = filled(TINY)
    a, b = (m(x, t, m.condition(physical, code=code)) for m in (tiny, nchw))
    assert relative(a, b) < 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_finite_and_close(tiny, dtype):
    x, physical, _ = inputs(2, 32, 32)
    half = filled(TINY).to(dtype)
    for t in (torch.tensor([999, 999]), torch.tensor([0, 640])):
        wanted = tiny(x, t, tiny.condition(physical, x))
        eps = half(x, t, half.condition(physical, x))
        assert eps.dtype == torch.float32 and eps.isfinite().all()
        assert ((eps - wanted).square().mean() / wanted.square().mean()).sqrt() < 0.03


def test_half_precision_survives_large_activations():
    x, physical, code = inputs(1, 32, 32)
    half = filled(TINY).to(torch.float16)
    eps = half(x * 100, torch.tensor([500]), half.condition(physical * 100, code=code))
    assert eps.isfinite().all()


def test_autocast_trains():
    model = filled(TINY).requires_grad_(True).train()
    x, physical, _ = inputs(2, 64, 64)  # large enough for the fast upsampling
    with torch.autocast("cpu", torch.bfloat16):
        eps = model(x, torch.tensor([3, 800]), model.condition(physical, x))
    eps.square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


# the condition


def test_condition_once_equals_condition_every_step(tiny):
    photo, physical, _ = inputs(2, 32, 32)
    x = y = inputs(2, 32, 32, seed=2)[0]
    once = tiny.condition(physical, photo)
    for t in (900, 450, 0):
        t = torch.full((2,), t)
        x, y = tiny(x, t, once), tiny(y, t, tiny.condition(physical, photo))
    torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-5)


def test_many_lights_share_one_photo(tiny):
    x, physical, code = inputs(3, 32, 32)
    t = torch.full((3,), 300)
    shared = tiny.condition(physical, code=code[:1])
    assert len(shared) == 3 and len(shared.code) == 1
    each = tiny.condition(physical, code=code[:1].expand(3, -1))
    assert relative(tiny(x, t, shared), tiny(x, t, each)) < 1e-5
    for i in range(3):
        assert relative(tiny(x[i : i + 1], t[:1], shared[i]), tiny(x, t, shared)[i : i + 1]) < 1e-5
    one = tiny.condition(physical[:1], code=code[:1])
    torch.testing.assert_close(tiny(x, t, one.replace(physical)), tiny(x, t, shared))


def test_one_picture_serves_a_batch_of_noises(tiny):
    x, physical, code = inputs(3, 32, 32)
    one = tiny.condition(physical[:1], code=code[:1])
    eps = tiny(x, torch.tensor([300]), one)
    physical, code = physical[:1].expand(3, -1, -1, -1), code[:1].expand(3, -1)
    wanted = plain_forward(tiny, x, torch.full((3,), 300), physical, code)
    assert relative(eps, wanted) < 2e-5


def test_condition_selects_and_moves(tiny):
    _, physical, code = inputs(3, 32, 32)
    c = tiny.condition(physical, code=code)
    assert torch.equal(c[-1].physical, physical[2:]) and torch.equal(c[-1].code, code[2:])
    assert torch.equal(c[1:].gain, c.gain[1:]) and len(c[torch.tensor([2, 0])]) == 2
    assert c.to(torch.float64).offset.dtype == torch.float64
    with pytest.raises(IndexError, match="holds 3 pictures"):
        c[3]
    with pytest.raises(ValueError, match="wanted 1 or 2"):
        c.expand(2)
    with pytest.raises(ValueError, match="3 codes cannot serve 2"):
        c.replace(physical[:2])
    with pytest.raises(ValueError, match=r"\[N,9,H,W\]"):
        c.replace(physical[:, :3])


def test_wrong_inputs_say_what_to_do(tiny):
    x, physical, code = inputs(2, 32, 32)
    with pytest.raises(ValueError, match="either the photo"):
        tiny.condition(physical)
    with pytest.raises(ValueError, match="either the photo"):
        tiny.condition(physical, x, code=code)
    with pytest.raises(ValueError, match=r"Buffers.stack"):
        tiny.condition(x, x)
    with pytest.raises(ValueError, match="-1..1"):
        tiny.condition(physical, physical)
    with pytest.raises(ValueError, match=r"code must be \[M,8\]"):
        tiny.condition(physical, code=code[:, :3])
    with pytest.raises(ValueError, match="3 photos cannot serve 2"):
        tiny.condition(physical, code=code[[0, 1, 1]])
    c = tiny.condition(physical, code=code)
    with pytest.raises(ValueError, match="multiples of 4"):
        tiny(x[..., :30], torch.tensor([1]), c)
    with pytest.raises(ValueError, match="render at its size"):
        tiny(x[..., :16], torch.tensor([1]), c)


# training


def test_fresh_network_predicts_no_noise_and_learns():
    torch.manual_seed(0)
    model = DiffusionRig(TINY)
    x, physical, _ = inputs(2, 32, 32)
    t = torch.tensor([5, 800])
    assert model(x, t, model.condition(physical, x)).abs().max() == 0
    optimizer = torch.optim.Adam(model.parameters(), 2e-3)
    losses = []
    for _ in range(12):
        loss = (model(x, t, model.condition(physical, x)) - x).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]


def test_dropout_only_in_training():
    model = filled(TINY)
    x, physical, code = inputs(1, 32, 32)
    t, c = torch.tensor([400]), model.condition(physical, code=code)
    assert torch.equal(model(x, t, c), model(x, t, c))
    model.train()
    assert not torch.equal(model(x, t, c), model(x, t, c))


# the blocks


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**16), shared=st.booleans())
def test_fold_equals_the_chain_of_modulations(seed, shared):
    torch.manual_seed(seed)
    net = [blocks.ResBlock(32, out, emb_dim=6, detail_dim=4) for out in (32, 64)]
    for b in net:
        torch.nn.init.normal_(b.out_layers[0].weight)
        torch.nn.init.normal_(b.out_layers[0].bias)
    e, code = torch.randn(1 if shared else 3, 6), torch.randn(3, 4)
    detail, offset = blocks.project([b.cond_emb_layers for b in net], code)
    for b, (scale, shift) in zip(net, blocks.fold(net, e, 1 + detail, offset)):
        h = torch.randn(3, b.out_channels, 4, 4)
        wanted = b.out_layers[0](h)
        for layer, value in ((b.emb_layers, e), (b.cond_emb_layers, code)):
            s, m = layer(value)[..., None, None].chunk(2, 1)
            wanted = (1 + s) * wanted + m
        found = blocks.norm_silu(h.clone(), b.out_layers[0], scale, shift)
        torch.testing.assert_close(found, torch.nn.functional.silu(wanted), rtol=1e-4, atol=1e-4)


def test_timesteps_that_differ_are_not_shared():
    assert len(blocks.shared(torch.tensor([4, 4, 4]))) == 1
    assert len(blocks.shared(torch.tensor([4]).expand(3))) == 1
    assert len(blocks.shared(torch.tensor([4, 4, 5]))) == 3


def test_resampling_layers():
    x = torch.arange(16.0).reshape(1, 1, 4, 4)
    assert blocks.Upsample(1, conv=False)(x)[0, 0, 1].tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    assert blocks.Downsample(1, conv=False)(x)[0, 0].tolist() == [[2.5, 4.5], [10.5, 12.5]]
    assert blocks.Upsample(32, conv=True)(torch.zeros(1, 32, 4, 4)).shape == (1, 32, 8, 8)
    assert blocks.Downsample(32, conv=True)(torch.zeros(1, 32, 4, 4)).shape == (1, 32, 2, 2)


@pytest.mark.parametrize("size", [(32, 40), (4, 4), (33, 32)])
def test_convolution_of_a_doubled_picture(size):
    torch.manual_seed(0)
    conv = torch.nn.Conv2d(3, 5, 3, padding=1)
    x = torch.randn(2, 3, *size, requires_grad=True)
    wanted = conv(blocks.Upsample(3, conv=False)(x))
    found = blocks.upsampled_conv(x, conv)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    weight = torch.randn_like(wanted)
    leaves = [x, conv.weight, conv.bias]
    for f, w in zip(
        torch.autograd.grad((found * weight).sum(), leaves),
        torch.autograd.grad((wanted * weight).sum(), leaves),
    ):
        torch.testing.assert_close(f, w, rtol=1e-4, atol=1e-3)
