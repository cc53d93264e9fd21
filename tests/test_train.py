"""The training loop: recorded updates, exact resume, interruption, and what it writes."""

import json
import os
import signal

import pytest
import torch

from rig_core import buffers, checkpoints, data, files, train
from rig_core.denoisers.blocks import strided_conv
from rig_core.denoisers.rig import DiffusionRig, RigConfig
from tests.golden_files import golden, small_rig

TINY = RigConfig(16, 32, (1, 1), 1, (8,), latent_dim=8, encoder_width=4, dropout=0.2)
CPU = torch.device("cpu")


def tiny():
    torch.manual_seed(11)
    return DiffusionRig(TINY)


def batch(step):
    g = torch.Generator().manual_seed(step)
    return torch.rand(4, 3, 16, 16, generator=g) * 2 - 1, torch.rand(4, 9, 16, 16, generator=g)


def prepare(content):
    x_0, physical = train.mirror(*content, torch.rand(4) < 0.5)
    return x_0, (physical, x_0)


def run(out, steps, model=None, **options):
    known = {k: options.pop(k) for k in list(options) if k in train.Config.__dataclass_fields__}
    usual = {"steps": steps, "lr": 1e-3, "warmup": 3, "precision": "fp32", "log_every": 2}
    config = train.Config(**usual | known)
    return train.train(config, model or tiny(), out, batch, prepare, **options)


def everything(state):
    tensors = {f"m.{k}": v for k, v in state.model.state_dict().items()}
    tensors |= {f"e.{k}": v for k, v in state.ema.state_dict().items()}
    for name, p in state.model.named_parameters():
        tensors |= {f"{k}.{name}": v for k, v in state.optimizer.state[p].items()}
    return {k: v.clone() for k, v in tensors.items()}


def log(out, without=()):
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in without} for line in lines]


# -------------------------------------------------------------------------------------------- the updates


@pytest.mark.parametrize("stage, trainable", [("stage1", ""), ("stage2", "denoisingUNet.")])
def test_three_updates_as_recorded(stage, trainable):
    t, meta = golden("diffrig_trainloop")
    config = train.Config(lr=meta["lr"], warmup=1, precision="fp32", trainable=trainable)
    state = train.begin(config, small_rig(), CPU)
    loss = train.Loss(state.model, config)
    for i in range(3):
        physical = torch.cat([t[k][i] for k in ("rendered", "normal", "albedo")], 1)
        x_0 = t["image"][i]
        values, norm = train.update(state, config, loss, x_0, t["t"][i], t["noise"][i], (physical, x_0))
        torch.testing.assert_close(values, t[f"{stage}.loss"][i], rtol=1e-3, atol=0)
        assert norm.item() == pytest.approx(meta[f"{stage}_grad_norm_before_clip"][i], rel=2e-3)
    after = state.model.state_dict()
    compared = 0
    for key, wanted in t.items():
        if key.startswith(f"{stage}.after."):
            error = (after[key.split(".after.")[1]].double() - wanted.double()).abs()
            # Adam turns a tiny gradient into a full step: rare entries may be off by up to two of them a step
            assert error.mean() < 3e-6 and error.max() < 6 * meta["lr"], key
            assert (error > 3e-5).double().mean() < 0.01, key
            compared += 1
    assert compared == 11


def test_stage_two_leaves_the_encoders_weights_alone_but_not_its_statistics(tmp_path):
    before = tiny().state_dict()
    after = run(tmp_path, 2, trainable="denoisingUNet.").model.state_dict()
    changed = {k for k in before if not torch.equal(before[k], after[k])}
    assert {k for k in changed if k.startswith("encoder.") and "running" not in k} == {
        k for k in before if k.endswith("num_batches_tracked")
    }
    assert "encoder.bn1.running_mean" in changed and "denoisingUNet.out.2.weight" in changed


def test_ema_values():
    config = train.Config(ema=0.5, lr=0.1, warmup=1, precision="fp32")
    state = train.begin(config, tiny(), CPU)
    loss = train.Loss(state.model, config)
    key = "denoisingUNet.out.2.bias"
    wanted = state.model.state_dict()[key].clone()
    x_0, physical = batch(0)
    for n in range(12):
        t, noise = train.draw(x_0)
        train.update(state, config, loss, x_0, t, noise, (physical, x_0))
        decay = min(0.5, (1 + n) / (10 + n))
        wanted = decay * wanted + (1 - decay) * state.model.state_dict()[key]
    torch.testing.assert_close(state.ema.state_dict()[key], wanted, rtol=1e-5, atol=1e-7)
    tracked = "encoder.bn1.num_batches_tracked"
    assert state.ema.state_dict()[tracked] == state.model.state_dict()[tracked] == 12


def test_warm_up_of_the_learning_rate(tmp_path):
    run(tmp_path, 5, lr=0.04, warmup=4, log_every=1)
    assert [x["lr"] for x in log(tmp_path)] == pytest.approx([0.01, 0.02, 0.03, 0.04, 0.04])


def test_levels_are_uniform_and_spread_over_the_batch():
    torch.manual_seed(0)
    t = torch.stack([train.draw(torch.zeros(4, 1, 1, 1))[0] for _ in range(3000)])
    assert (t.sort(1).values // 250 == torch.arange(4)).all()
    counts = torch.bincount(t[:, 0] // 100, minlength=10)  # no place in the batch is special
    assert counts.min() > 230 and counts.max() < 370


def test_bfloat16_training_follows_float32(tmp_path):
    losses = []
    for precision in ("fp32", "bf16"):
        run(tmp_path / precision, 4, precision=precision, log_every=1)
        losses.append([x["loss"] for x in log(tmp_path / precision)])
    assert losses[1] == pytest.approx(losses[0], rel=0.03) and losses[1] != losses[0]


@pytest.mark.parametrize("channels", [8, 32])
def test_bfloat16_gradient_of_a_strided_convolution_of_one_pixel(channels):
    """Memory full of NaN, as the library may be handed it, must not reach the weights' gradient."""
    torch.manual_seed(0)
    conv = torch.nn.Conv2d(channels, channels, 3, 2, 1, bias=False).to(memory_format=torch.channels_last)
    x = torch.randn(4, channels, 1, 1)
    wanted = torch.einsum("bohw,bihw->oi", torch.ones(4, channels, 1, 1), x)
    for _ in range(4):
        conv.weight.grad = None
        _ = [torch.full((n,), float("nan")) for n in (1, 9, 16, 64) for n in (n * channels, n * channels**2)]
        with torch.autocast("cpu", torch.bfloat16):
            strided_conv(x, conv).sum().backward()
        taps = conv.weight.grad.clone()
        torch.testing.assert_close(taps[..., 1, 1], wanted, rtol=0.02, atol=0.02)
        taps[..., 1, 1] = 0
        assert torch.equal(taps, torch.zeros_like(taps))


def test_it_learns(tmp_path):
    """On one batch of pictures the noise soon is found far better than by guessing zero."""
    config = train.Config(steps=40, lr=3e-3, warmup=5, precision="fp32", log_every=5, p2_gamma=0.0)
    train.train(config, tiny(), tmp_path, lambda step: batch(0), prepare)
    losses = [x["loss"] for x in log(tmp_path)]
    assert losses[0] > 0.8 and losses[-1] < 0.5


def test_mirrored_buffers_are_the_buffers_of_the_mirrored_face():
    head = checkpoints.load_head()
    code = head.mean_code(2, 32)
    pose = code.pose.clone()
    pose[:, 1] = torch.tensor([0.5, 0.0])  # turned left or right of the picture
    light = code.light.clone()
    light[:, 1] += 0.8  # from the right
    code = code.replace(pose=pose, light=light)
    back = code.replace(pose=pose * pose.new_tensor([1, -1, -1, 1, -1, -1, -1, 1]))
    # odd in x: X, XY, XZ
    odd = light.new_tensor([1, -1, 1, 1, -1, -1, 1, 1, 1])[:, None]
    there = buffers.render(head, code, 32).stack()
    mirrored = buffers.render(head, back.replace(light=light * odd), 32).stack()
    image = torch.rand(2, 3, 32, 32)
    found_image, found = train.mirror(image, there, torch.tensor([True, False]))
    assert torch.equal(found_image, torch.stack([image[0].flip(-1), image[1]]))
    assert torch.equal(found[1], there[1])
    away = (found[0] - mirrored[0]).abs().mean()
    assert away < 0.25 * (there[0].flip(-1) - mirrored[0]).abs().mean()  # without the sign of the normals
    assert away < 0.1 * (there[0] - mirrored[0]).abs().mean()


# ------------------------------------------------------------------------------------- resume, interruption


def test_resume_is_bit_exact(tmp_path):
    whole = everything(run(tmp_path / "whole", 6))
    run(tmp_path / "parts", 2)
    torch.manual_seed(99)  # a new program has another state of the global generator
    parts = everything(run(tmp_path / "parts", 6, model=DiffusionRig(TINY), resume=True))
    assert whole.keys() == parts.keys()
    assert [k for k in whole if not torch.equal(whole[k], parts[k])] == []
    clocks = ("time", "images_per_s")
    assert log(tmp_path / "whole", clocks) == log(tmp_path / "parts", clocks)


def test_lines_logged_after_the_last_checkpoint_are_dropped_on_resume(tmp_path):
    run(tmp_path, 4)
    with open(tmp_path / "log.jsonl", "a") as f:
        f.write(json.dumps({"step": 6, "loss": 1.0}) + "\n")
    run(tmp_path, 8, resume=True)
    assert [x["step"] for x in log(tmp_path)] == [2, 4, 6, 8]
    assert log(tmp_path)[2]["loss"] != 1.0


def test_a_run_is_not_overwritten(tmp_path):
    run(tmp_path, 1)
    content = (tmp_path / train.STATE).read_bytes()
    with pytest.raises(FileExistsError, match="--resume"):
        run(tmp_path, 2)
    assert (tmp_path / train.STATE).read_bytes() == content


def test_state_of_another_network_is_refused(tmp_path):
    run(tmp_path, 1)
    other = DiffusionRig(RigConfig(16, 32, (1, 2), 1, (8,), latent_dim=8, encoder_width=4))
    with pytest.raises(ValueError, match="state of another network"):
        run(tmp_path, 2, model=other, resume=True)
    checkpoints.save_denoiser(tmp_path / train.STATE, tiny())
    with pytest.raises(ValueError, match="no training state"):
        run(tmp_path, 2, resume=True)


@pytest.mark.parametrize("kind", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_run_with_a_checkpoint(tmp_path, kind):
    before = signal.getsignal(kind)

    def interrupt(step):
        if step == 2:
            os.kill(os.getpid(), kind)
        return batch(step)

    config = train.Config(steps=50, lr=1e-3, warmup=3, precision="fp32", log_every=2)
    state = train.train(config, tiny(), tmp_path, interrupt, prepare)
    assert state.step == 3 and files.read(tmp_path / train.STATE)[1]["step"] == 3
    assert signal.getsignal(kind) is before
    resumed = everything(run(tmp_path, 5, resume=True))
    whole = everything(run(tmp_path / "whole", 5))
    assert [k for k in whole if not torch.equal(whole[k], resumed[k])] == []


def test_stop_and_the_time_limit_end_the_run(tmp_path):
    calls = []
    state = run(tmp_path / "a", 50, stop=lambda: calls.append(0) or len(calls) == 3)
    assert state.step == 3
    state = run(tmp_path / "b", 50, minutes=1e-6)
    assert state.step == 1 and (tmp_path / "b" / train.STATE).exists()


def test_a_loss_that_is_not_finite_ends_the_run_and_spares_the_checkpoint(tmp_path):
    run(tmp_path, 2)
    content = (tmp_path / train.STATE).read_bytes()

    def poisoned(content):
        x_0, inputs = prepare(content)
        return x_0 * float("nan"), inputs

    config = train.Config(steps=6, precision="fp32", log_every=50)
    with pytest.raises(RuntimeError, match="loss is nan at step 6"):
        train.train(config, tiny(), tmp_path, batch, poisoned, resume=True)
    assert (tmp_path / train.STATE).read_bytes() == content


# ---------------------------------------------------------------------------------------- what it leaves


def test_what_a_run_writes(tmp_path):
    samples, saves = [], []
    run(
        tmp_path, 5, options={"arguments": {"size": 16}}, sample_every=2,
        on_sample=lambda ema, step: samples.append((step, ema.training)),
        on_save=lambda ema, step: saves.append(step),
    )  # fmt: skip
    assert samples == [(2, False), (4, False), (5, False)] and saves == [5]
    options = json.loads((tmp_path / "options.json").read_text())
    assert options["steps"] == 5 and options["arguments"] == {"size": 16} and options["start"] == 0
    lines = log(tmp_path)
    assert [x["step"] for x in lines] == [2, 4, 5]
    assert all(len(x["loss_by_quarter"]) == 4 and x["images_per_s"] > 0 for x in lines)
    assert sum(lines[0]["loss_by_quarter"]) / 4 == pytest.approx(lines[0]["loss"])
    assert not list(tmp_path.glob("*.pt")) and not list(tmp_path.glob("*.pkl"))


def test_wrong_options_say_so(tmp_path):
    with pytest.raises(ValueError, match="precision 'half'"):
        run(tmp_path, 1, precision="half")
    with pytest.raises(ValueError, match="begins with 'unet'"):
        run(tmp_path, 1, trainable="unet")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Twelve rendered faces under several lights."""
    out = tmp_path_factory.mktemp("faces")
    head, g = checkpoints.load_head(), torch.Generator().manual_seed(0)
    code = head.mean_code(12, 32)
    code = code.replace(light=code.light + head.light_std * torch.randn(12, 9, 3, generator=g))
    images = buffers.render(head, code, 32).rendered.clamp(0, 1)
    data.append(out, [f"f{i}" for i in range(12)], images, code, split=["val", "train", "train"] * 4)
    data.finish(out)
    return out


def stage1(*arguments):
    from training.stage1 import main

    main([*map(str, arguments), "--batch", "4", "--threads", "1", "--warmup", "1", "--log-every", "1"])


def test_command_line_trains_resumes_and_steps_up(folder, tmp_path):
    small = tmp_path / "small"
    stage1("--data", folder, "--out", small, "--size", 16, "--steps", 2)
    stage1("--data", folder, "--out", small, "--size", 16, "--steps", 3, "--resume")
    assert [x["step"] for x in log(small)] == [1, 2, 3]
    model, meta = checkpoints.load_rig(small / "model.safetensors")
    assert (meta["step"], meta["stage"], meta["head"], meta["config"]["image_size"]) == (3, 1, "open", 16)
    ema = train.weights(small / train.STATE)
    for k, v in model.state_dict().items():
        torch.testing.assert_close(v, ema[k], rtol=2**-11, atol=1e-7)
    assert sorted(p.name for p in (small / "samples").iterdir()) == ["0000002.png", "0000003.png"]
    large = tmp_path / "large"
    start = ("--init", small / train.STATE, "--lr", 0)
    stage1("--data", folder, "--out", large, "--size", 32, "--steps", 1, *start)
    stepped = checkpoints.load_rig(large / "model.safetensors")[1]["config"]
    assert stepped["image_size"] == 32 and stepped["channel_mult"] == model.config.channel_mult
    after = train.weights(large / train.STATE)
    assert all(torch.equal(after[k], ema[k]) for k in ema if k.startswith("denoisingUNet."))
