"""Half precision, offloading, other models' memory and stopped runs, in the real host."""

from __future__ import annotations

import json
import sys

import pytest
import torch
from PIL import Image

from tests.host_cases import DEFAULT, FILES, Case, case, empty, ksampler, load, mm, off
from tests.host_comfy import *  # noqa: F403 the fixture host
from tests.host_comfy import ROOT, marks

pytestmark = marks


@pytest.mark.parametrize("kind", ["rig", "relight"])
def test_half_precision(host, kind, monkeypatch):
    """The trained models, 5 steps: bfloat16 throughout, and float16 weights at work in float32."""
    exact = case(host, kind, DEFAULT)
    clip = lambda c: host.node("ClipDenoised", model=c.model)[0]  # noqa: E731
    want = ksampler(host, exact, empty(host, exact), clip(exact), steps=5)
    photo = (exact.noise().clamp(-1, 1) / 2 + 0.5).movedim(1, -1)
    for dtype, cast, bound in ((torch.bfloat16, None, 0.05), (torch.float16, torch.float32, 0.008)):
        monkeypatch.setattr(mm(), "unet_dtype", lambda dtype=dtype, **_: dtype)
        monkeypatch.setattr(mm(), "unet_manual_cast", lambda *_, cast=cast: cast)
        c = case_like(host, kind, exact)
        assert {p.dtype for p in c.net.parameters()} == {dtype}
        got = ksampler(host, c, empty(host, c), clip(c), steps=5)
        assert got.dtype == torch.float32 and c.net.dtype == (cast or dtype)
        error = (got - want).abs()
        assert 0 < error.mean() < bound
        how = {"steps": 2, "solver": "ddim", "spacing": "even", "seed": 0, "preset": "custom"}
        more = {"match_means": False, "paint_back": False}
        noise, _ = host.node(
            "DDIMInvert", model=c.model, conditioning=c.conditioning, image=photo, **how, **more
        )
        image = host.node(
            "ConditionedSample",
            model=c.model,
            conditioning=c.conditioning,
            noise=noise,
            same_noise=True,
            **how,
        )[0]
        assert image.dtype == noise["samples"].dtype == torch.float32 and image.std() > 0.05


def case_like(host, kind: str, c: Case) -> Case:
    """Another MODEL of the same file under the same conditioning."""
    model = load(host, kind, DEFAULT)
    return Case(model, model.model.diffusion_model.net, None, c.conditioning, c.size)


@pytest.mark.parametrize(
    "flag, dtype, cast",
    [(None, "float32", None), ("bf16_unet", "bfloat16", "float32"), ("fp16_unet", "float16", "float32"),
     ("fp8_e4m3fn_unet", "float32", None), ("fp64_unet", "float32", None)],
)  # fmt: skip
def test_the_flags_of_the_host_choose_the_type(host, flag, dtype, cast, monkeypatch):
    """As --cpu takes them: half precision is stored, and computed with in float32."""
    if flag:
        monkeypatch.setattr(mm().args, flag, True)
    c = case(host, "relight", FILES["relight"])
    assert c.model.model_dtype() == getattr(torch, dtype)
    assert c.model.model.manual_cast_dtype == (cast and getattr(torch, cast))
    assert ksampler(host, c, empty(host, c), steps=2).isfinite().all()


def test_the_compute_type_can_be_changed_in_the_graph(host):
    tiny = case(host, "relight", FILES["relight"])
    other = tiny.model.clone()
    other.set_model_compute_dtype(torch.bfloat16)
    want = ksampler(host, tiny, empty(host, tiny), steps=2)
    got = ksampler(host, tiny, empty(host, tiny), other, steps=2)
    assert tiny.net.dtype == torch.bfloat16 and 0 < off(got, want) < 0.05
    assert (
        torch.equal(ksampler(host, tiny, empty(host, tiny), steps=2), want)
        and tiny.net.dtype == torch.float32
    )


def elsewhere(net) -> list:
    """The layers whose weights the host left on the offload device."""
    return [m for m in net.modules() if getattr(m, "comfy_cast_weights", False)]


@pytest.mark.parametrize("share", [0.0, 0.4, 0.8])
@pytest.mark.parametrize("kind", list(FILES))
def test_a_part_of_the_layers_stays_elsewhere(host, kind, share):
    """Float64 stands for the other device: whoever uses such a weight directly meets an error."""
    c = case(host, kind, FILES[kind])
    photo = c.noise()
    if kind == "rig":
        condition = lambda: c.net.condition(c.condition.physical, photo)  # noqa: E731
    else:
        spatial, vector = (c.conditioning[0][1][k] for k in ("relight_spatial", "relight_vector"))
        condition = lambda: c.net.condition(spatial, vector)  # noqa: E731
    t = torch.tensor([500.0])
    want = c.net(c.noise(), t, condition())
    whole = c.model.model_size()
    c.model.partially_load(torch.device("cpu"), share * whole + 0.1)
    assert c.model.loaded_size() <= share * whole + 0.1
    away = elsewhere(c.net)
    assert sum(p.numel() * 4 for m in away for p in m._parameters.values() if p is not None) >= (
        (1 - share) * whole - 4 * sum(b.numel() for b in c.net.buffers()) - 1e5
    )
    for m in away:
        for p in m._parameters.values():
            if p is not None:
                p.data = p.data.double()
    assert torch.equal(c.net(c.noise(), t, condition()), want)
    c.model.detach()
    assert not elsewhere(c.net)


def test_novram_loads_no_layer_of_a_denoiser_and_all_of_an_estimator(host, pretend_gpu, monkeypatch):
    monkeypatch.setattr(mm(), "vram_state", mm().VRAMState.NO_VRAM)
    c = case(host, "relight", FILES["relight"])
    want = ksampler(host, c, empty(host, c), steps=2)
    assert len(elsewhere(c.net)) > 50 and c.model.loaded_size() < 0.05 * c.model.model_size()
    encoder = host.node("LoadIdentityEncoder", file=DEFAULT)[0]
    vector = host.node("ArcFaceEmbed", identity_encoder=encoder, image=torch.rand(1, 64, 64, 3))[0]
    assert encoder.loaded_size() == encoder.model_size() and vector.isfinite().all()
    monkeypatch.setattr(mm(), "vram_state", mm().VRAMState.NORMAL_VRAM)
    mm().unload_all_models()
    assert torch.equal(ksampler(host, c, empty(host, c), steps=2), want) and not elsewhere(c.net)


@pytest.fixture
def pretend_gpu(host, monkeypatch):
    """The host takes "cpu:0" for a GPU of `free` bytes, less what models on it hold."""
    m, gpu = mm(), torch.device("cpu", 0)
    m.unload_all_models()
    m.current_loaded_models.clear()
    room = {"free": 4 * 2**30}

    def free(device=None, torch_free_too=False):
        used = sum(p.model_loaded_memory() for p in m.current_loaded_models if p.device == gpu)
        left = room["free"] - used if device in (None, gpu) else 2**36
        return (left, left) if torch_free_too else left

    monkeypatch.setattr(m, "get_torch_device", lambda: gpu)
    monkeypatch.setattr(m, "get_free_memory", free)
    monkeypatch.setattr(m, "is_device_cpu", lambda d: d.type == "cpu" and d.index is None)
    monkeypatch.setattr(m, "vram_state", m.VRAMState.NORMAL_VRAM)
    monkeypatch.setattr(m, "lowvram_available", True)
    yield room
    m.unload_all_models()
    m.current_loaded_models.clear()


def test_no_other_model_leaves_without_need(host, pretend_gpu):
    import comfy.model_patcher

    gpu, cpu = torch.device("cpu", 0), torch.device("cpu")
    other = comfy.model_patcher.ModelPatcher(torch.nn.Linear(2048, 2048), load_device=gpu, offload_device=cpu)
    mm().load_models_gpu([other])
    c = case(host, "relight", DEFAULT)
    encoder = host.node("LoadIdentityEncoder", file=DEFAULT)[0]
    image = torch.rand(1, c.size, c.size, 3)

    def work():
        host.node("ArcFaceEmbed", identity_encoder=encoder, image=image)
        ksampler(host, c, empty(host, c), steps=1)
        how = {"steps": 1, "solver": "ddim", "spacing": "even", "seed": 0, "preset": "custom"}
        host.node("ConditionedSample", model=c.model, conditioning=c.conditioning, same_noise=True, **how)

    work()
    assert other.loaded_size() == other.model_size()
    assert c.model.loaded_size() > 0 and encoder.loaded_size() == encoder.model_size()
    pretend_gpu["free"] = mm().minimum_inference_memory() + 1.5 * c.model.model_size()
    mm().unload_all_models()
    mm().load_models_gpu([other])
    work()
    assert other.loaded_size() < other.model_size()  # now there was need
    mm().unload_all_models()  # what /free asks for
    assert not mm().current_loaded_models
    assert c.model.loaded_size() == encoder.loaded_size() == 0
    assert c.model.current_loaded_device() == encoder.current_loaded_device() == cpu


def test_what_works_together_is_on_the_device_together(host, pretend_gpu, monkeypatch):
    """With --disable-smart-memory each load sends away all that it did not ask for."""
    from fractions import Fraction

    from comfy_api.latest import InputImpl
    from comfy_api.util import VideoComponents

    monkeypatch.setattr(mm(), "DISABLE_SMART_MEMORY", True)
    tools = sys.modules[host.pack.__name__ + ".nodes.host"]
    given = {
        "model": load(host, "relight", FILES["relight"]),
        "face_model": host.node("LoadFaceModel", file=DEFAULT)[0],
        "identity_encoder": host.node("LoadIdentityEncoder", file=DEFAULT)[0],
        "shadow_estimator": host.node("LoadShadowEstimator", file=DEFAULT)[0],
        "face_parser": tools.estimator(host.core.estimators.parsing.BiSeNet().eval()),
    }
    at_work = {"finder": tools.face_finder()} | {k: v for k, v in given.items() if k != "face_model"}
    owner = {m: k for k, p in at_work.items() for m in p.model.modules()}
    called = []

    def look(module, inputs):
        name = owner.get(module)
        if name is not None and name not in called[-1:]:
            called.append(name)
            assert at_work[name].loaded_size() == at_work[name].model_size(), f"{name} was driven away"

    photo = Image.open(host.base / "input" / "astronaut.jpg").convert("RGB").crop((110, 40, 350, 232))
    frame = torch.frombuffer(bytearray(photo.tobytes()), dtype=torch.uint8).view(1, 192, 240, 3) / 255
    film = VideoComponents(images=frame, audio=None, frame_rate=Fraction(5))
    how = {
        "shadow_change": 1.0,
        "cast_shadow": True,
        "preset": "custom",
        "steps": 1,
        "smooth": 0.0,
        "crf": 20,
    }
    hook = torch.nn.modules.module.register_module_forward_pre_hook(look)
    try:
        host.node("RelightVideo", video=InputImpl.VideoFromComponents(film), missing="error", order="largest",
                  index=0, **how, **given)  # fmt: skip
    finally:
        hook.remove()
    first, *passes = called
    assert first == "identity_encoder" and passes == [
        "finder", "identity_encoder", "shadow_estimator", "face_parser", "model",
    ]  # fmt: skip


def test_a_head_on_a_gpu_is_a_copy(host, pretend_gpu):
    tools = sys.modules[host.pack.__name__ + ".nodes.host"]
    given = host.node("LoadFaceModel", file=DEFAULT)[0]
    assert tools.head(given) is not given.head
    assert torch.equal(tools.head(given).template, given.head.template)


@pytest.mark.parametrize("kind", list(FILES))
@pytest.mark.parametrize("width, size, batch", [(32, 64, 1), (64, 128, 4), (128, 256, 1)])
def test_the_memory_of_a_step_is_told_honestly(host, kind, width, size, batch):
    """Against all that is alive at once on the meta device; with room for kernels, not for another model."""
    from training.bench_relight import Peak

    d = host.core.denoisers
    kinds = {"rig": (d.rig.RigConfig, d.rig.DiffusionRig, 9)}
    kinds["relight"] = (d.relight.RelightConfig, d.relight.DiFaReli, 6)
    config, net, channels = kinds[kind]
    mult = {32: (1, 1, 2), 64: (1, 2, 3, 4), 128: (1, 1, 2, 2, 4, 4)}[width]
    with torch.device("meta"):
        net = net(config(size, width, mult, 2 if width == 128 else 1, norm_groups=8))
    seen, x = (torch.zeros(batch, k, size, size, device="meta") for k in (channels, 3))
    with torch.no_grad(), Peak() as peak:
        other = x if kind == "rig" else torch.zeros(1, net.config.cond_dim, device="meta")
        net(x, torch.zeros(batch, device="meta"), net.condition(seen, other))
    model_class = sys.modules[host.pack.__name__ + ".nodes.host.denoisers"].PixelModel
    told = model_class.memory_required(Told(net), [batch, 3, size, size])
    assert peak.peak < told < 2.2 * peak.peak


class Told:
    """As much of a PixelModel as memory_required looks at."""

    def __init__(self, net):
        self.diffusion_model = torch.nn.Module()
        self.diffusion_model.net = net

    def compute_dtype(self):
        return torch.float32


def stop_at(monkeypatch, k: int) -> list:
    """Press stop at the k-th time that a node asks. Returns a list that grows with the asking."""
    asked = []

    def ask():
        asked.append(1)
        if len(asked) == k:
            raise mm().InterruptProcessingException

    monkeypatch.setattr(mm(), "throw_exception_if_processing_interrupted", ask)
    return asked


@pytest.mark.parametrize("share", [0.0, 0.1, 0.35, 0.6, 0.95])
def test_a_run_that_was_stopped_anywhere_does_not_spoil_the_next(host, share, stopped_graph, monkeypatch):
    graph, asked, want = stopped_graph
    host.executor.reset()
    with monkeypatch.context() as patch:
        stop_at(patch, 1 + int(share * (asked - 1)))
        ok, messages, _ = host.run(graph)
    assert not ok and messages[-1][0] == "execution_interrupted"
    ok, messages, outputs = host.run(graph)  # goes on with what was ready
    assert ok, messages[-1]
    shown = next(o["images"][0] for k, o in outputs.items() if graph[k]["class_type"] == "SaveImage")
    assert pixels(host, shown) == want


def pixels(host, shown: dict) -> bytes:
    path = host.base / "output" / shown["subfolder"] / shown["filename"]
    return Image.open(path).convert("RGB").tobytes()


@pytest.fixture(scope="module")
def stopped_graph(host):
    """A relit photo; how often its nodes ask whether to stop; the result."""
    graph = json.loads((ROOT / "tests" / "api" / "Relight a portrait.json").read_text(encoding="utf-8"))
    key = {n["class_type"]: k for k, n in graph.items()}
    graph[key["FaceRig_LoadDiFaReli"]]["inputs"]["file"] = FILES["relight"]
    graph[key["FaceRig_DDIMInvert"]]["inputs"] |= {"preset": "custom", "steps": 4, "solver": "ddim"}
    host.executor.reset()
    with pytest.MonkeyPatch.context() as patch:
        asked = stop_at(patch, 0)
        ok, messages, outputs = host.run(graph)
    assert ok, messages[-1]
    shown = next(o["images"][0] for k, o in outputs.items() if graph[k]["class_type"] == "SaveImage")
    return graph, len(asked), pixels(host, shown)


def test_a_stopped_ksampler_does_not_spoil_the_next(host):
    import comfy.utils

    tiny = case(host, "relight", FILES["relight"])

    def stop(now: bool):
        mm().interrupt_current_processing(now)
        mm().throw_exception_if_processing_interrupted()

    want = ksampler(host, tiny, empty(host, tiny))
    for k in (1, 2, 3):
        comfy.utils.set_progress_bar_global_hook(lambda value, *_, k=k, **__: stop(value == k))
        try:
            with pytest.raises(mm().InterruptProcessingException):
                ksampler(host, tiny, empty(host, tiny))
        finally:
            comfy.utils.set_progress_bar_global_hook(None)
        assert torch.equal(ksampler(host, tiny, empty(host, tiny)), want)
