"""DiffusionRig Condition, DDIM Invert, Conditioned Sample with a DiffusionRig."""

from __future__ import annotations

import pytest
import torch

from tests import host_double
from tests.node_pack import *  # noqa: F403 the fixtures
from tests.node_pack import SIZE


def test_condition_is_what_the_network_makes(pack, head, model, face, conditioned):
    rig = model.model.diffusion_model.net
    buffers = pack.run("RenderBuffers", face_model=head, face_code=face[3])[0]
    want = rig.condition(buffers.stack(), face[0].permute(0, 3, 1, 2) * 2 - 1)
    fields = conditioned[0][1]
    torch.testing.assert_close(fields["rig_physical"], want.physical)
    torch.testing.assert_close(fields["rig_code"], want.code, atol=1e-5, rtol=1e-5)
    x, t = torch.randn(1, 3, SIZE, SIZE, generator=torch.manual_seed(1)), torch.tensor([500.0])
    out = model.model.diffusion_model(x, t, context=None, transformer_options={}, **fields)
    torch.testing.assert_close(out, rig(x, t, want), atol=1e-4, rtol=1e-4)
    conds = model.model.extra_conds(device=torch.device("cpu"), noise=x, **fields)
    assert set(conds) == set(fields) and torch.equal(conds["rig_gain"].cond, fields["rig_gain"])


def test_sampling_repeats_with_the_seed_and_reports_each_step(pack, model, conditioned):
    first = pack.run("ConditionedSample", model=model, conditioning=conditioned, seed=5, steps=6)[0]
    assert [p[:2] for p in pack.host.progress] == [(i, 6) for i in range(1, 7)]
    kind, picture, limit = pack.host.progress[0][2]
    assert (kind, picture.size, limit) == ("JPEG", (SIZE, SIZE), 512)
    assert model in pack.host.loaded
    again = pack.run("ConditionedSample", model=model, conditioning=conditioned, seed=5, steps=6)[0]
    other = pack.run("ConditionedSample", model=model, conditioning=conditioned, seed=6, steps=6)[0]
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert first.shape == (1, SIZE, SIZE, 3) and 0 <= first.min() and first.max() <= 1


def test_interrupt_stops_within_a_step(pack, model, conditioned):
    pack.host.interrupt_after = 3
    with pytest.raises(host_double.Interrupted):
        pack.run("ConditionedSample", model=model, conditioning=conditioned, steps=50)
    assert len(pack.host.progress) == 3
    pack.host.interrupt_after = len(pack.host.progress)
    with pytest.raises(host_double.Interrupted):
        pack.run(
            "DDIMInvert",
            model=model,
            conditioning=conditioned,
            image=torch.zeros(1, SIZE, SIZE, 3),
            preset="balanced (quad33 ab2)",
        )
    assert len(pack.host.progress) == 3


def test_inversion_and_sampling_are_the_cores(pack, model, conditioned, face):
    core, rig = pack.core, model.model.diffusion_model.net
    condition = pack.nodes_module.sockets.condition(conditioned, rig).part(rig)
    schedule = core.diffusion.respace(core.diffusion.linear_schedule(), "quad3")
    photo = face[0].permute(0, 3, 1, 2) * 2 - 1
    x_T = core.samplers.invert(rig, photo, condition, schedule, "heun")
    how = {"model": model, "conditioning": conditioned, "steps": 3, "solver": "heun"}
    how |= {"spacing": "quad", "preset": "custom"}
    noise, before = pack.run("DDIMInvert", image=face[0], **how)
    torch.testing.assert_close(noise["samples"], x_T, atol=1e-4, rtol=1e-4)
    want = core.samplers.sample(rig, x_T, condition, schedule, "heun").clamp(-1, 1) / 2 + 0.5
    torch.testing.assert_close(before, want.permute(0, 2, 3, 1), atol=1e-3, rtol=0)
    back = pack.run("ConditionedSample", noise=noise, **how)[0]
    torch.testing.assert_close(back, before, atol=1e-3, rtol=0)
    same = pack.run("ConditionedSample", noise=noise, model=model, conditioning=conditioned)[0]
    assert torch.equal(same, back)  # as inverted
    with pytest.raises(ValueError, match="'noise' was made with quad3 steps of heun, not with 3 of heun"):
        pack.run("ConditionedSample", noise=noise, **{**how, "spacing": "even"})
    anew = pack.run("ConditionedSample", seed=3, **how)[0]
    noise, before = pack.run("DDIMInvert", image=face[0], hidden=torch.ones(1, 96, 96), seed=3, **how)
    torch.testing.assert_close(before, anew, atol=1e-3, rtol=0)  # all hidden: all random


def test_one_photo_under_several_lights_is_a_batch(pack, head, model, face):
    lights = torch.stack([head.light_mean, head.light_mean + head.light_std])
    code = pack.run("SHLightEdit", face_model=head, face_code=face[3], light=lights)[0]
    buffers = pack.run("RenderBuffers", face_model=head, face_code=code)[0]
    cond = pack.run("DiffusionRigCondition", model=model, image=face[0], buffers=buffers)[0]
    out = pack.run("ConditionedSample", model=model, conditioning=cond, steps=4)[0]
    assert out.shape == (2, SIZE, SIZE, 3) and not torch.equal(out[0], out[1])
    alone = pack.run("RenderBuffers", face_model=head, face_code=code[1])[0]
    cond = pack.run("DiffusionRigCondition", model=model, image=face[0], buffers=alone)[0]
    one = pack.run("ConditionedSample", model=model, conditioning=cond, steps=4)[0]
    torch.testing.assert_close(
        out[1:], one, atol=1e-3, rtol=0
    )  # the same noise for all, and no picture is lost


def test_long_batches_go_in_parts_and_come_out_whole(pack, head, model, face, monkeypatch):
    image, code = face[0].expand(3, -1, -1, -1), face[3].expand(3)
    points = face[2].expand(3, -1, -1)
    lights = torch.stack(
        [head.light_mean, head.light_mean + head.light_std, head.light_mean - head.light_std]
    )

    def run():
        fitted = pack.run("FitToLandmarks", face_model=head, image=image, landmarks=points)[0]
        lit = pack.run("SHLightEdit", face_model=head, face_code=code, light=lights)[0]
        buffers = pack.run("RenderBuffers", face_model=head, face_code=lit)[0]
        cond = pack.run("DiffusionRigCondition", model=model, image=image, buffers=buffers)[0]
        how = {"model": model, "conditioning": cond, "steps": 2, "preset": "custom"}
        noise, before = pack.run("DDIMInvert", image=image, **how)
        painted = pack.run("ConditionedSample", noise=noise, **how)[0]
        return fitted.shape, fitted.light, buffers.stack(), noise["samples"], before, painted

    whole = run()
    host = pack.nodes_module.host
    monkeypatch.setattr(host, "chunks", lambda n, *_: host.slices(n, 2))
    monkeypatch.setattr(host, "batches", lambda model, n, *_: host.slices(n, 2))
    for a, b in zip(run(), whole, strict=True):
        assert len(a) == 3
        torch.testing.assert_close(a, b, atol=2e-3, rtol=1e-3)


def test_the_batch_fits_the_memory(pack, model):
    host = pack.nodes_module.host
    one = model.model.memory_required([1, 3, 512, 512])
    assert one == 512 * 512 * 16 * 32 * 4  # bytes: numbers a pixel and channel, width, float32
    want = min(16, int(2**32 / 2 // one))  # the double has 4 GiB free
    assert [s.stop - s.start for s in host.batches(model, 5, 512, 512)] == [want] * (5 // want) + [
        5 % want
    ] * (5 % want > 0)
    assert host.batches(model, 40, 64, 64) == [slice(0, 16), slice(16, 32), slice(32, 40)]


def test_sizes_that_do_not_fit_the_model_are_named(pack, head, model, face, scene):
    buffers = pack.run("RenderBuffers", face_model=head, face_code=face[3])[0]
    with pytest.raises(ValueError, match="'image' is 128 x 96 pixels.*64 x 64"):
        pack.run("DiffusionRigCondition", model=model, image=scene[0], buffers=buffers)
    larger = pack.run("RenderBuffers", face_model=head, face_code=face[3], size=96)[0]
    with pytest.raises(ValueError, match="'buffers' is 96 x 96 pixels.*64 x 64"):
        pack.run("DiffusionRigCondition", model=model, image=face[0], buffers=larger)
    with pytest.raises(ValueError, match="'buffers' holds 2"):
        three, two = face[0].expand(3, -1, -1, -1), buffers.expand(2)
        pack.run("DiffusionRigCondition", model=model, image=three, buffers=two)


def test_wrong_connections_are_named(pack, head, model, face, conditioned):
    with pytest.raises(ValueError, match="'model' is neither a DiffusionRig nor a DiFaReli"):
        pack.run("ConditionedSample", model=object(), conditioning=conditioned)
    with pytest.raises(ValueError, match="'conditioning' is not from DiffusionRig Condition"):
        pack.run("ConditionedSample", model=model, conditioning=[[torch.zeros(1, 77, 768), {}]])
    with pytest.raises(ValueError, match="'noise' is not from DDIM Invert"):
        pack.run(
            "ConditionedSample",
            model=model,
            conditioning=conditioned,
            noise={"samples": torch.zeros(1, 3, 8, 8)},
        )
    with pytest.raises(ValueError, match="DiffusionRig Condition"):
        model.model.diffusion_model(torch.zeros(1, 3, SIZE, SIZE), torch.zeros(1))


@pytest.mark.parametrize("node", ["DDIMInvert", "ConditionedSample"])
def test_each_node_takes_what_is_on_its_lists_and_nothing_else(pack, model, conditioned, face, node):
    given = {"model": model, "conditioning": conditioned, "steps": 2, "preset": "custom"}
    if node == "DDIMInvert":
        given |= {"image": face[0], "paint_back": False}
    lists = {i.id: i.options for i in pack.nodes["FaceRig_" + node].define_schema().inputs if i.options}
    assert ("ddpm" in lists["solver"]) == ("as inverted" in lists["preset"]) == (node == "ConditionedSample")
    for name in ("solver", "spacing"):
        for value in lists[name]:
            pack.run(node, **given | {name: value})
    for name, other in (("preset", "as inverted"), ("solver", "ddpm"), ("spacing", "cubic"), ("preset", "")):
        if other not in lists[name]:
            with pytest.raises(ValueError, match=f"'{name}' is one of {lists[name][0][:4]}.*, not '{other}'"):
                pack.run(node, **given | {name: other})


def many(pack, model, face, n: int):
    """Conditioning of n pictures of the face, the same but for their brightness."""
    buffers = pack.run("RenderBuffers", face_model=pack.run("LoadFaceModel")[0], face_code=face[3])[0]
    images = face[0] * torch.linspace(1, 0.4, n)[:, None, None, None]
    told = pack.run("DiffusionRigCondition", model=model, image=images, buffers=buffers)[0]
    return told, images


def by(monkeypatch, pack, step: int) -> None:
    """So many pictures go through the denoiser at once."""
    host = pack.nodes_module.host
    monkeypatch.setattr(host, "batches", lambda model, n, *_: host.slices(n, step))


@pytest.mark.parametrize("solver", ["ddpm", "ab2"])
@pytest.mark.parametrize("same_noise", [True, False])
def test_a_seed_means_the_same_however_many_go_at_once(pack, model, face, monkeypatch, solver, same_noise):
    told, _ = many(pack, model, face, 3)
    how = {"model": model, "steps": 3, "preset": "custom", "solver": solver, "seed": 4}

    def run(step, told=told, same=same_noise):
        by(monkeypatch, pack, step)
        return pack.run("ConditionedSample", conditioning=told, same_noise=same, **how)[0]

    whole = run(3)
    for step in (1, 2):
        torch.testing.assert_close(run(step), whole, atol=1e-4, rtol=0)
    name, (text, fields) = "rig_physical", told[0]
    alike = [[text, {k: v[:1].expand(3, *v.shape[1:]) if k != name else v for k, v in fields.items()}]]
    a, b, _ = run(3, alike)
    assert ((a - b).abs().max() < 1e-4) == same_noise  # one noise in every step, or one each
    a = run(3, alike, True)[0] - run(3, alike, False)[0]
    assert a.abs().max() < 1e-4  # the first picture's is the same either way


def test_the_step_noise_changes_with_the_seed_and_from_picture_to_picture(pack, model, conditioned, face):
    """Also where the noise at the start is given."""
    how = {"model": model, "conditioning": conditioned, "steps": 3, "preset": "custom"}
    noise, _ = pack.run("DDIMInvert", image=face[0], solver="ddim", **how)
    noise["face_rig_noise"]["solver"] = "ddpm"
    how |= {"solver": "ddpm", "noise": noise}
    a, b, c = (pack.run("ConditionedSample", seed=s, **how)[0] for s in (1, 1, 2))
    assert torch.equal(a, b) and (a - c).abs().mean() > 0.01
    two = [[t, {k: v.expand(2, *v.shape[1:]) for k, v in fields.items()}] for t, fields in conditioned]
    how["conditioning"] = two
    a, b = (pack.run("ConditionedSample", same_noise=same, **how)[0] for same in (True, False))
    assert (a[0] - a[1]).abs().max() < 1e-4 and (b[0] - b[1]).abs().mean() > 0.01


def test_the_means_follow_the_noise_that_is_picked_from_a_batch(pack, model, face):
    told, images = many(pack, model, face, 3)
    how = {"model": model, "steps": 3, "preset": "custom", "solver": "ddim"}
    noise, _ = pack.run("DDIMInvert", conditioning=told, image=images, match_means=True, **how)

    def sample(rows, latent):
        picked = [[told[0][0], {k: v if len(v) == 1 else v[rows] for k, v in told[0][1].items()}]]
        return pack.run("ConditionedSample", conditioning=picked, noise=latent, **how)[0]

    whole = sample([0, 1, 2], noise)
    assert (whole[0] - whole[2]).abs().mean() > 0.01
    for rows in ([2], [1, 2], [2, 0, 1], [0, 0, 1, 1]):  # as Latent From Batch, Repeat and Join leave it
        picked = {**noise, "samples": noise["samples"][rows].clone()}
        torch.testing.assert_close(sample(rows, picked), whole[rows], atol=1e-4, rtol=0)
    more = torch.cat([noise["samples"][:1], noise["samples"][1:2] * 1.1])
    with pytest.raises(ValueError, match="'noise' holds 2 pictures, but number 1 of them .* one of the 3"):
        sample([0, 1], {**noise, "samples": more})
    plain, _ = pack.run("DDIMInvert", conditioning=told, image=images, **how)
    assert len(sample([0, 1], {**plain, "samples": more})) == 2  # nothing that could part


class Clock:
    """time.monotonic of the progress bar, which each step moves on."""

    def __init__(self, monkeypatch, pack, seconds: float):
        self.now, self.seconds = 0.0, seconds
        monkeypatch.setattr(pack.nodes_module.host.running.time, "monotonic", self)

    def __call__(self) -> float:
        self.now += self.seconds
        return self.now


@pytest.mark.parametrize("seconds, shown", [(1 / 16, [1, 5, 9, 13, 14]), (0.3, list(range(1, 15)))])
def test_five_previews_a_second_and_the_last(pack, model, conditioned, monkeypatch, seconds, shown):
    Clock(monkeypatch, pack, seconds)
    pack.run("ConditionedSample", model=model, conditioning=conditioned, steps=14)
    assert [p[:2] for p in pack.host.progress] == [(i, 14) for i in range(1, 15)]
    assert [p[0] for p in pack.host.progress if p[2]] == shown
