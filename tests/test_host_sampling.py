"""ComfyUI's own samplers and model nodes on our MODELs, in the real host."""

from __future__ import annotations

import shutil

import pytest
import torch

from tests.host_cases import DEFAULT, FILES, Case, case, empty, ksampler, load, mm, off
from tests.host_comfy import *  # noqa: F403 the fixture host
from tests.host_comfy import SIZE, marks

pytestmark = marks


def schedule(host, spec: str):
    return host.core.diffusion.respace(host.core.diffusion.linear_schedule(), spec)


def calls(net):
    """Records (batch, timestep) of every evaluation of net."""

    class Record(list):
        def __enter__(self):
            note = lambda net, args: self.append((len(args[0]), float(args[1][0])))  # noqa: E731
            self.hook = net.register_forward_pre_hook(note)
            return self

        def __exit__(self, *error):
            self.hook.remove()

    return Record()


def advanced(host, c: Case, sigmas, latent, sampler="euler", model=None):
    """SamplerCustomAdvanced with BasicGuider, without noise of its own."""
    guider = host.stock("BasicGuider", model=model or c.model, conditioning=c.conditioning)[0]
    noise, sampler = host.stock("DisableNoise")[0], host.stock("KSamplerSelect", sampler_name=sampler)[0]
    how = {"noise": noise, "guider": guider, "sampler": sampler, "sigmas": sigmas}
    return host.stock("SamplerCustomAdvanced", **how, latent_image={"samples": latent})[0]["samples"]


@pytest.fixture(scope="module", params=list(FILES))
def tiny(host, request):
    c = case(host, request.param, FILES[request.param], 3)
    unet = c.net.denoisingUNet if request.param == "rig" else c.net.ImgCond
    unet.out[2].weight.data *= 0.1  # a random network amplifies rounding as no trained one does
    return c


def guided(host, c: Case, spacing: str = "even", steps: int = 20, denoise: float = 1.0, **more):
    return host.node("GuidedSigmas", model=c.model, steps=steps, spacing=spacing, denoise=denoise, **more)[0]


@pytest.mark.parametrize("clip, spacing, spec", [(False, "ddim", "ddim20"), (True, "even", "20")])
def test_euler_is_our_ddim(host, tiny, clip, spacing, spec):
    c, x_T = tiny, tiny.noise(3)
    want = host.core.samplers.sample(c.net, x_T, c.condition, schedule(host, spec), "ddim", clip=clip)
    sigmas = guided(host, c, spacing)
    model = host.node("ClipDenoised", model=c.model)[0] if clip else c.model
    start = x_T * (1 + sigmas[0] ** 2).sqrt()  # x_T counts as the noisiest level
    with calls(c.net) as called:
        got = advanced(host, c, sigmas, start, model=model)
    assert off(got, want) < (2e-5 if clip else 2e-6)  # the edge at 1 sharpens what rounding differs by
    levels = schedule(host, spec).timesteps.flip(0).tolist()
    assert called == [(3, float(t)) for t in levels]  # once a step


def test_euler_is_our_ddim_on_the_packs_own_model(host):
    """Trained and deep: rounding grows through the layers, so the bound is wider."""
    c = case(host, "relight", DEFAULT)
    x_T, sigmas = c.noise(), guided(host, c, "quad", 8)
    want = host.core.samplers.sample(c.net, x_T, c.condition, schedule(host, "quad8"), "ddim")
    start, model = x_T * (1 + sigmas[0] ** 2).sqrt(), host.node("ClipDenoised", model=c.model)[0]
    assert off(advanced(host, c, sigmas, start, model=model), want) < 3e-5


def test_heun_is_our_heun(host, tiny):
    c, x_T = tiny, tiny.noise(3)
    want = host.core.samplers.sample(c.net, x_T, c.condition, schedule(host, "quad6"), "heun", clip=False)
    sigmas = guided(host, c, "quad", 6)
    got = advanced(host, c, sigmas, x_T * (1 + sigmas[0] ** 2).sqrt(), "heun")
    assert off(got, want) < 2e-6


def test_flipped_sigmas_invert(host, tiny):
    c, photo, on_the_way = tiny, tiny.noise(3).clamp(-1, 1), []
    levels, seen = schedule(host, "10"), lambda state: on_the_way.append(state["x"])
    host.core.samplers.invert(c.net, photo, c.condition, levels, "ddim", False, seen)
    want = on_the_way[-2]  # at the noisiest level, before the step to pure noise
    sigmas = guided(host, c, steps=10)
    up = host.stock("FlipSigmas", sigmas=host.stock("SplitSigmas", sigmas=sigmas, step=9)[0])[0]
    got = advanced(host, c, up, photo * (1 + up[0] ** 2).sqrt()) / (1 + up[-1] ** 2).sqrt()
    assert off(got, want) < 2e-6
    flipped = host.stock("FlipSigmas", sigmas=sigmas)[
        0
    ]  # with a step from 1e-4, which guided diffusion has not
    got = advanced(host, c, flipped, photo) / (1 + up[-1] ** 2).sqrt()
    assert 2e-6 < off(got, want) < 2e-3


def test_one_evaluation_a_step_at_cfg_1_and_one_of_both_above(host, tiny):
    latent = host.node("EmptyPixelLatent", width=16, height=16, batch_size=1, conditioning=tiny.conditioning)[
        0
    ]
    assert latent["samples"].shape == (3, 3, SIZE, SIZE)
    with calls(tiny.net) as called:
        plain = ksampler(host, tiny, latent)
    assert [n for n, _ in called] == [3, 3, 3]
    with calls(tiny.net) as called:
        driven = ksampler(host, tiny, latent, cfg=3.0)
    assert [n for n, _ in called] == [6, 6, 6]
    assert off(driven, plain) < 1e-5  # the same condition on both sides


def test_the_condition_is_computed_once_a_run(host):
    c, read = case(host, "relight", FILES["relight"], 2), []
    hook = c.net.ImgEncoder.register_forward_hook(lambda *_: read.append(1))
    latent = host.node("EmptyPixelLatent", width=16, height=16, batch_size=1, conditioning=c.conditioning)[0]
    ksampler(host, c, latent, steps=4)
    hook.remove()
    assert len(read) == 2  # the positive and the negative one


def test_every_stock_sampler_node_runs(host, tiny):
    c, nodes = tiny, host.stock
    latent = host.node("EmptyPixelLatent", width=SIZE, height=SIZE, batch_size=3)[0]
    whole = ksampler(host, c, latent)
    noise = {
        "add_noise": "enable",
        "start_at_step": 0,
        "end_at_step": 1,
        "return_with_leftover_noise": "enable",
    }
    half = ksampler(host, c, latent, node="KSamplerAdvanced", **noise)
    rest = {
        "add_noise": "disable",
        "start_at_step": 1,
        "end_at_step": 3,
        "return_with_leftover_noise": "disable",
    }
    both = ksampler(host, c, {"samples": half}, node="KSamplerAdvanced", **rest)
    assert off(both, whole) < 1e-5
    sigmas = nodes("BasicScheduler", model=c.model, scheduler="normal", steps=3, denoise=1.0)[0]
    noise = nodes("RandomNoise", noise_seed=5)[0]
    how = {
        "sampler": nodes("KSamplerSelect", sampler_name="euler")[0],
        "sigmas": sigmas,
        "latent_image": latent,
    }
    guider = nodes("BasicGuider", model=c.model, conditioning=c.conditioning)[0]
    again = nodes("SamplerCustomAdvanced", noise=noise, guider=guider, **how)[0]["samples"]
    assert torch.equal(again, whole)


def test_a_picture_is_kept_in_part_and_behind_a_mask(host, tiny):
    photo = tiny.noise(3).clamp(-1, 1)
    clip = host.node("ClipDenoised", model=tiny.model)[0]
    near, far = (ksampler(host, tiny, {"samples": photo}, clip, denoise=d) for d in (0.1, 1.0))
    assert (near - photo).abs().mean() < (far - photo).abs().mean()
    mask = torch.zeros(1, SIZE, SIZE)
    mask[:, :, SIZE // 2 :] = 1
    masked = host.stock("SetLatentNoiseMask", samples={"samples": photo}, mask=mask)[0]
    got = ksampler(host, tiny, masked, clip)
    assert torch.allclose(got[..., : SIZE // 2], photo[..., : SIZE // 2], atol=1e-5)
    assert (got - photo)[..., SIZE // 2 :].abs().mean() > 0.1


def test_other_conditionings_run_or_say_why_not(host, tiny):
    c, latent = tiny, host.node("EmptyPixelLatent", width=SIZE, height=SIZE, batch_size=3)[0]
    want = ksampler(host, c, latent)
    zero = host.stock("ConditioningZeroOut", conditioning=c.conditioning)[0]
    assert torch.equal(ksampler(host, c, latent, positive=zero), want)  # only the text is zeroed
    twice = host.stock("ConditioningCombine", conditioning_1=c.conditioning, conditioning_2=c.conditioning)[0]
    assert off(ksampler(host, c, latent, positive=twice), want) < 1e-5  # the mean of both
    mean = {"conditioning_to": c.conditioning, "conditioning_from": c.conditioning}
    mean = host.stock("ConditioningAverage", **mean, conditioning_to_strength=0.5)[0]
    assert torch.equal(ksampler(host, c, latent, positive=mean), want)  # keeps what the first one holds
    with pytest.raises(ValueError, match="give it the conditioning of Di"):
        ksampler(host, c, latent, positive=[[torch.zeros(1, 1, 1), {}]])
    small = host.node("EmptyPixelLatent", width=32, height=32, batch_size=3)[0]
    with pytest.raises(ValueError, match="one size|render at its size"):
        ksampler(host, c, small)


def test_the_schedule_survives_model_sampling_discrete(host, tiny):
    other = host.stock("ModelSamplingDiscrete", model=tiny.model, sampling="eps", zsnr=False)[0]
    latent = host.node("EmptyPixelLatent", width=SIZE, height=SIZE, batch_size=3)[0]
    assert torch.equal(ksampler(host, tiny, latent, other), ksampler(host, tiny, latent))
    alpha_bar = host.core.diffusion.linear_schedule().alpha_bar
    known = tiny.model.get_model_object("model_sampling").sigmas
    assert torch.allclose(known.double(), (1 / alpha_bar - 1).sqrt(), rtol=1e-6)


def test_previews_show_the_picture(host, tiny):
    import latent_preview

    previewer = latent_preview.Latent2RGBPreviewer(tiny.model.model.latent_format.latent_rgb_factors)
    x = torch.tensor([1.0, 0.0, -1.0])[None, :, None, None].expand(1, 3, 8, 8)
    seen = previewer.decode_latent_to_preview(x).resize((1, 1)).getpixel((0, 0))
    assert all(abs(a - b) <= 2 for a, b in zip(seen, (255, 127, 0), strict=True))


def test_a_compiled_model_gives_the_same(host):
    """The node's own backends want a C++ compiler or a GPU; what it calls takes one that does not."""
    from comfy_api.torch_helpers import set_torch_compile_wrapper

    tiny = case(host, "relight", FILES["relight"])
    compiled = tiny.model.clone()
    set_torch_compile_wrapper(compiled, backend="aot_eager")
    plain = ksampler(host, tiny, empty(host, tiny), steps=2)
    assert off(ksampler(host, tiny, empty(host, tiny), compiled, steps=2), plain) < 1e-5
    node = host.stock("TorchCompileModel", model=tiny.model, backend="inductor")[0]
    assert len(node.wrappers["apply_model"]["torch.compile"]) == 1


@pytest.mark.parametrize("kind", list(FILES))
def test_merged_models_are_saved_and_loaded(host, kind, tmp_path):
    a, b = (case(host, kind, FILES[kind]) for _ in range(2))
    a.model.model.meta = {"head": "open", "step": 7, "mean_shape": torch.ones(1, 3)}
    first = {k: v.clone() for k, v in a.net.state_dict().items()}
    for p in b.net.parameters():
        p.data.add_(0.01)
    merged = host.stock("ModelMergeSimple", model1=a.model, model2=b.model, ratio=0.25)[0]
    host.stock("ModelSave", model=merged, filename_prefix="merged")
    written = next((host.base / "output").glob("merged_*.safetensors"))
    shutil.move(written, host.base / "models" / "face_rig" / f"merged_{kind}.safetensors")
    again = load(host, kind, f"merged_{kind}.safetensors")
    assert again.model.meta["step"] == 7 and torch.equal(again.model.meta["mean_shape"], torch.ones(1, 3))
    net = again.model.diffusion_model.net
    assert net.config == a.net.config
    for k, p in net.named_parameters():
        assert torch.allclose(p, first[k] + 0.0075, atol=1e-6), k
    difference = host.stock("ModelMergeSubtract", model1=b.model, model2=a.model, multiplier=1.0)[0]
    total = host.stock("ModelMergeAdd", model1=a.model, model2=difference)[0]
    latent = host.node("EmptyPixelLatent", width=SIZE, height=SIZE, batch_size=1)[0]
    assert off(ksampler(host, a, latent, total, steps=2), ksampler(host, b, latent, steps=2)) < 1e-4
    mm().load_models_gpu([a.model])
    assert all(torch.equal(v, first[k]) for k, v in a.net.state_dict().items())  # as it was


def test_the_hosts_lora_loader_takes_what_is_named_as_our_layers_are(host, tiny):
    """Of a LoRA for another network it takes nothing, and says so in its log."""
    from safetensors.torch import save_file

    (host.base / "models" / "loras").mkdir(exist_ok=True)
    foreign = {
        "lora_unet_a.lora_up.weight": torch.ones(4, 1),
        "lora_unet_a.lora_down.weight": torch.ones(1, 4),
    }
    save_file(foreign, host.base / "models" / "loras" / "foreign.safetensors")
    how = {"model": tiny.model, "lora_name": "foreign.safetensors", "strength_model": 1.0}
    assert not host.stock("LoraLoaderModelOnly", **how)[0].patches
    ours = {"diffusion_model.net." + k: v for k, v in adapters(tiny.net).items()}
    save_file(ours, host.base / "models" / "loras" / "ours.safetensors")
    patched = host.stock("LoraLoaderModelOnly", **how | {"lora_name": "ours.safetensors"})[0]
    assert len(patched.patches) == 1
    assert off(ksampler(host, tiny, empty(host, tiny), patched), ksampler(host, tiny, empty(host, tiny))) > 0


def adapters(net) -> dict:
    """A LoRA of the last convolution, by the layer's own name."""
    name, layer = next((k, m) for k, m in net.named_modules() if k.endswith(".out.2"))
    up, down = torch.ones(len(layer.weight), 1), torch.full((1, *layer.weight.shape[1:]), 0.01)
    return {f"{name}.lora_up.weight": up[..., None, None], f"{name}.lora_down.weight": down}
