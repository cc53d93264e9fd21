"""DiFaReli on the canvas: loaders, what it is told, inversion and relight, and wrong connections.

The denoiser is a tiny one with random weights; identity encoder and shadow estimator are the pack's own.
"""

from __future__ import annotations

import pytest
import torch

from tests import host_double
from tests.node_pack import *  # noqa: F403 the fixtures
from tests.node_pack import SIZE

STEPS = {"steps": 4, "preset": "custom"}


@pytest.fixture(scope="module")
def relit(pack):
    """A DiFaReli MODEL of random weights, read from the model folder."""
    r = pack.core.denoisers.relight
    torch.manual_seed(0)
    config = r.RelightConfig(
        SIZE, 32, (1, 1, 2), 1, (16,), num_heads=1, norm_groups=8, cond_dim=241, proj_dim=16
    )
    net = r.start_open(r.DiFaReli(config))
    torch.nn.init.normal_(net.ImgCond.out[2].weight, std=0.02)
    for block in net.ImgCond.res_blocks:  # these start at 0, and the vector would not show
        torch.nn.init.normal_(block.out_layers[3].weight, std=0.1)
    path = pack.host.folder / "models" / "face_rig" / "relight.safetensors"
    pack.core.checkpoints.save_denoiser(path, net)
    model, size = pack.run("LoadDiFaReli", file="relight.safetensors")
    assert size == SIZE
    return model


@pytest.fixture(scope="module")
def told(pack, head, relit, face):
    """The inputs of DiFaReli Condition, from the pack's own estimators."""
    encoder, judge = pack.run("LoadIdentityEncoder")[0], pack.run("LoadShadowEstimator")[0]
    return {
        "model": relit,
        "face_model": head,
        "face_code": face[3],
        "image": face[0],
        "embed": pack.run("ArcFaceEmbed", identity_encoder=encoder, image=face[0])[0],
        "shadow": pack.run("ShadowScalar", shadow_estimator=judge, image=face[0])[0],
    }


@pytest.fixture(scope="module")
def own(pack, told):
    """conditioning and matte under the photo's own light."""
    return pack.run("DiFaReliCondition", **told)


@pytest.fixture(scope="module")
def lights(pack, head, face):
    return pack.run("LightOrbit", face_model=head, face_code=face[3], frames=3)[0]


@pytest.fixture(scope="module")
def inverted(pack, relit, own, face):
    return pack.run("DDIMInvert", model=relit, conditioning=own[0], image=face[0], match_means=True, **STEPS)


def core_subject(pack, head, face, told):
    """The same photo for rig_core.pipeline: portrait and subject."""
    core = pack.core
    x = face[0].permute(0, 3, 1, 2)
    matte = core.matte.head_matte(head, face[3], x)
    background = core.conditions.background(x, matte)
    shadow = torch.tensor([[told["shadow"]]])
    portrait = core.pipeline.Portrait(x, None, face[3])
    return portrait, core.pipeline.Subject(background, told["embed"], shadow, matte)


def test_estimators_are_the_cores(pack, head, face, told):
    x = face[0].permute(0, 3, 1, 2)
    load, e = pack.core.checkpoints, pack.core.estimators
    torch.testing.assert_close(told["embed"], e.identity.embed(load.load_identity(), x), atol=1e-4, rtol=1e-4)
    assert told["shadow"] == pytest.approx(float(e.shadow.scalar(load.load_shadow(), x)), abs=1e-4)
    judge = pack.run("LoadShadowEstimator")[0]
    two = pack.run("ShadowScalar", shadow_estimator=judge, image=torch.cat([face[0], face[0] * 0.5]))[0]
    assert len(two) == 2 and two[0] == pytest.approx(told["shadow"], abs=1e-4) and two[1] != two[0]
    assert pack.host.texts[-1] == f"{two[0]:.2f}, {two[1]:.2f}"


def test_face_parse_gives_mask_and_labels(pack, face):
    e = pack.core.estimators.parsing
    torch.manual_seed(2)
    net = e.BiSeNet()
    path = pack.host.folder / "models" / "face_rig" / "79999_iter.pth"
    torch.save(net.state_dict(), path)
    parser = pack.run("LoadFaceParser")[0]
    mask, shown = pack.run("FaceParse", face_parser=parser, image=face[0])
    labels = e.parse(net.eval(), face[0].permute(0, 3, 1, 2))
    assert torch.equal(mask, e.head_mask(labels)[:, 0]) and shown.shape == face[0].shape
    hair = pack.run("FaceParse", face_parser=parser, image=face[0], part="hair")[0]
    assert torch.equal(hair, e.select(labels, "hair")[:, 0])
    path.unlink()
    with pytest.raises(FileNotFoundError, match="79999_iter.pth.*models/face_rig.*optional"):
        pack.run("LoadFaceParser")


def test_condition_is_the_cores_and_shares_what_the_light_does_not_change(
    pack, head, relit, face, told, own, lights
):
    net = relit.model.diffusion_model.net
    portrait, subject = core_subject(pack, head, face, told)
    want = pack.core.pipeline.relight_condition(net, head, portrait, subject, lights)
    conditioning, matte = pack.run("DiFaReliCondition", light=lights, **told)
    given = pack.nodes_module.sockets.condition(conditioning, net)
    assert [len(v) for v in given.fields] == [3, 1]  # one vector for three lights
    got = given.part(net)
    assert len(got.gain) == 1 and len(got) == 3
    torch.testing.assert_close(got.gain, want.gain, atol=1e-4, rtol=1e-4)
    for a, b in zip(got.latents, want.latents, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(matte, subject.matte[:, 0])
    background = conditioning[0][1]["relight_spatial"][:, 3:]
    assert torch.equal(background[0], background[2])
    plain = pack.run("DiFaReliCondition", light=lights, cast_shadow=False, **told)[0]
    reference, lit = (c[0][1]["relight_spatial"][:, :3] for c in (conditioning, plain))
    assert (reference <= lit + 1e-5).all() and (lit - reference).max() > 0.02  # shadows only take light
    assert len(own[0][0][1]["relight_spatial"]) == 1


def test_a_mask_of_the_head_replaces_the_matte(pack, told):
    mask = torch.zeros(1, 32, 32)
    mask[:, 8:24, 8:24] = 1
    conditioning, matte = pack.run("DiFaReliCondition", head=mask, **told)
    background = conditioning[0][1]["relight_spatial"][:, 3:]
    assert (background[..., 24:40, 24:40] == -1).all()
    photo = told["image"].permute(0, 3, 1, 2) * 2 - 1
    torch.testing.assert_close(background[..., :8, :8], photo[..., :8, :8])
    assert matte.shape == (1, SIZE, SIZE) and matte.mean() == pytest.approx(0.25, abs=0.01)


def test_the_hosts_samplers_get_the_same_network(pack, relit, own):
    network = relit.model.diffusion_model
    x, t = torch.randn(1, 3, SIZE, SIZE, generator=torch.manual_seed(1)), torch.tensor([500.0])
    fields = own[0][0][1]
    conds = relit.model.extra_conds(device=torch.device("cpu"), noise=x, **fields)
    out = network(x, t, context=None, transformer_options={}, **{k: v.cond for k, v in conds.items()})
    want = network.net(x, t, network.net.condition(fields["relight_spatial"], fields["relight_vector"]))
    torch.testing.assert_close(out, want)
    assert relit.model.extra_conds(device=torch.device("cpu"), noise=x) == {}
    with pytest.raises(ValueError, match="a DiFaReli: give it the conditioning of DiFaReli Condition"):
        network(x, t)


def test_relight_is_the_cores_with_and_without_mean_matching(
    pack, head, relit, face, told, own, lights, inverted
):
    core, net = pack.core, relit.model.diffusion_model.net
    portrait, subject = core_subject(pack, head, face, told)
    edited = pack.run("DiFaReliCondition", light=lights, **told)[0]
    for match in (True, False):
        noise, before = inverted
        if not match:
            noise, before = pack.run("DDIMInvert", model=relit, conditioning=own[0], image=face[0], **STEPS)
        found = core.pipeline.to_noise(net, head, portrait, subject, "quad4", match=match)
        torch.testing.assert_close(noise["samples"], found.x_T, atol=1e-3, rtol=1e-3)
        want = core.pipeline.relight(net, head, portrait, subject, lights, noise=found).image
        got = pack.run("ConditionedSample", model=relit, conditioning=edited, noise=noise)[0]
        torch.testing.assert_close(got.permute(0, 3, 1, 2), want, atol=2e-3, rtol=0)
        again = pack.run("ConditionedSample", model=relit, conditioning=own[0], noise=noise)[0]
        torch.testing.assert_close(again, before, atol=1e-4, rtol=0)  # no edit: what was painted back
    assert (noise["face_rig_noise"]["shifts"] is None) and inverted[0]["face_rig_noise"]["shifts"].shape == (
        4,
        1,
        3,
    )


def test_presets_and_what_they_cost(pack, relit, own, face):
    how = {"model": relit, "conditioning": own[0], "image": face[0]}
    for preset, steps in (("fast (20+20)", 20), ("balanced (quad33 ab2)", 33)):
        pack.host.progress.clear()
        noise, before = pack.run("DDIMInvert", preset=preset, paint_back=False, **how)
        assert len(pack.host.progress) == steps and pack.host.progress[-1][:2] == (steps, steps)
        torch.testing.assert_close(before, face[0])
        pack.host.progress.clear()
        pack.run("ConditionedSample", model=relit, conditioning=own[0], noise=noise)
        assert len(pack.host.progress) == steps
    pack.host.interrupt_after, pack.host.progress[:] = 3, []
    with pytest.raises(host_double.Interrupted):
        pack.run("DDIMInvert", preset="official 1000", **how)
    assert pack.host.progress[-1][:2] == (3, 2000)  # the mean-matching pass belongs to it
    with pytest.raises(ValueError, match="'hidden' and mean matching"):
        pack.run("DDIMInvert", preset="official 1000", hidden=torch.ones(1, 8, 8), **how)


def test_strengths_are_a_batch_from_no_change_to_all_of_it(pack, told):
    conditioning = pack.run("DiFaReliCondition", shadow_change=4.0, strengths=5, **told)[0]
    spatial, vector = (conditioning[0][1][k] for k in ("relight_spatial", "relight_vector"))
    assert len(spatial) == 1 and len(vector) == 5
    torch.testing.assert_close(vector[:, -1], told["shadow"] + torch.linspace(0, 4, 5))
    assert (vector[:, :-1] == vector[:1, :-1]).all()
    relit = told["model"]
    painted = pack.run("ConditionedSample", model=relit, conditioning=conditioning, steps=3, preset="custom")[
        0
    ]
    assert len(painted) == 5 and (painted.diff(dim=0).flatten(1).abs().amax(1) > 1e-4).all()
    one = pack.run("DiFaReliCondition", shadow_change=-2.0, **told)[0][0][1]["relight_vector"]
    assert float(one[0, -1]) == pytest.approx(told["shadow"] - 2, abs=1e-4)


def test_several_photos_are_a_batch_of_their_own(pack, relit, told, own):
    two = torch.cat([told["image"], told["image"].flip(2)])
    many = told | {"image": two, "shadow": [told["shadow"], 2.0]}
    conditioning, matte = pack.run("DiFaReliCondition", **many)
    spatial, vector = (conditioning[0][1][k] for k in ("relight_spatial", "relight_vector"))
    assert len(spatial) == len(vector) == len(matte) == 2 and float(vector[1, -1]) == 2
    torch.testing.assert_close(spatial[:1], own[0][0][1]["relight_spatial"])
    noise, before = pack.run(
        "DDIMInvert", model=relit, conditioning=conditioning, image=two, match_means=True, **STEPS
    )
    again = pack.run("ConditionedSample", model=relit, conditioning=conditioning, noise=noise)[0]
    torch.testing.assert_close(again, before, atol=1e-4, rtol=0)
    assert noise["face_rig_noise"]["shifts"].shape == (4, 2, 3)
    with pytest.raises(ValueError, match="'light' holds 3.*2 are needed"):
        pack.run("DiFaReliCondition", light=many["face_code"].light.expand(3, -1, -1), **many)


# what users connect wrongly


def test_a_noise_of_other_steps_solver_size_or_model_is_refused(
    pack, relit, model, own, conditioned, face, inverted
):
    noise = inverted[0]
    how = {"model": relit, "conditioning": own[0], "noise": noise}
    with pytest.raises(
        ValueError, match="'noise' was made with quad4 steps of ab2, not with quad20 of ab2.*preset"
    ):
        pack.run("ConditionedSample", preset="fast (20+20)", **how)
    with pytest.raises(ValueError, match="not with quad4 of ddim"):
        pack.run("ConditionedSample", preset="custom", steps=4, solver="ddim", **how)
    with pytest.raises(ValueError, match="'noise' was made with another model"):
        pack.run("ConditionedSample", model=model, conditioning=conditioned, noise=noise)
    small = noise | {"samples": noise["samples"][:, :, :32, :32]}
    with pytest.raises(ValueError, match="'noise' is of 32 x 32 pixels, the conditioning of 64 x 64"):
        pack.run("ConditionedSample", **how | {"noise": small})
    with pytest.raises(ValueError, match="'noise' is not from DDIM Invert"):
        pack.run("ConditionedSample", **how | {"noise": {"samples": noise["samples"]}})
    same = pack.run("LoadDiFaReli", file="relight.safetensors")[0]
    assert same is not relit
    pack.run("ConditionedSample", **how | {"model": same})  # loaded anew, the same network


def test_wrong_connections_are_named(pack, relit, model, told, own, conditioned, face):
    with pytest.raises(ValueError, match="'model' is not a DiFaReli: connect the MODEL of Load DiFaReli"):
        pack.run("DiFaReliCondition", **told | {"model": model})
    with pytest.raises(
        ValueError, match="'conditioning' is not from DiFaReli Condition, but 'model' is a DiFaReli"
    ):
        pack.run("ConditionedSample", model=relit, conditioning=conditioned)
    with pytest.raises(ValueError, match="'unedited' is not from DiffusionRig Condition"):
        pack.run("ConditionedSample", model=model, conditioning=conditioned, unedited=own[0])
    encoder, judge = pack.run("LoadIdentityEncoder")[0], pack.run("LoadShadowEstimator")[0]
    with pytest.raises(ValueError, match="'identity_encoder' is not from Load Identity Encoder"):
        pack.run("ArcFaceEmbed", identity_encoder=judge, image=face[0])
    with pytest.raises(ValueError, match="'shadow_estimator' is not from Load Shadow Estimator"):
        pack.run("ShadowScalar", shadow_estimator=encoder, image=face[0])
    with pytest.raises(ValueError, match="'face_parser' is not from Load Face Parser"):
        pack.run("FaceParse", face_parser=encoder, image=face[0])
    with pytest.raises(ValueError, match="'image' is 64 x 32 pixels, an aligned face is square"):
        pack.run("ArcFaceEmbed", identity_encoder=encoder, image=face[0][:, :32])


def test_sizes_lights_shadows_and_masks_that_do_not_fit_are_named(pack, head, told, face, scene):
    def refuse(message, **wrong):
        with pytest.raises(ValueError, match=message):
            pack.run("DiFaReliCondition", **told | wrong)

    refuse("'image' is of 128 x 96 pixels, this DiFaReli works at 64 x 64", image=scene[0])
    refuse("'face_code' is of 128 x 128 pixels", face_code=face[3].resized((128, 128)))
    refuse("'flame' head", face_code=face[3].replace(head="flame"))
    refuse("light holds NaN", light=face[3].light * float("nan"))
    refuse(r"light must be \[B,9,3\]", light=torch.zeros(1, 9))
    refuse("scalar would be 25, but it lies between -20 and 20", shadow=25.0)
    refuse("scalar would be -21", shadow=-1.0, shadow_change=-20.0)
    refuse("'shadow' is not a number", shadow=float("nan"))
    refuse("2 shadows", light=face[3].light.expand(3, -1, -1), strengths=2)
    refuse("'head' is 128 x 96 pixels, the aligned picture is square", head=torch.ones(1, 96, 128))
    refuse("'head' holds NaN", head=torch.full((1, 8, 8), float("nan")))
    refuse("embedding is not finite", embed=told["embed"] * float("nan"))
    refuse("identity encoder 16.*takes 241.*Load Identity Encoder", embed=told["embed"][:, :16])


def test_files_of_another_kind_and_missing_ones(pack, relit, model):
    folder, checkpoints = pack.host.folder / "models" / "face_rig", pack.core.checkpoints
    (folder / "cut.tar").write_bytes(b"PK\3\4 nothing")
    torch.save({"a": torch.zeros(3)}, folder / "other.pth")
    for node, file in (
        ("LoadDiFaReli", "tiny.safetensors"),
        ("LoadIdentityEncoder", "relight.safetensors"),
        ("LoadIdentityEncoder", "cut.tar"),
        ("LoadShadowEstimator", "relight.safetensors"),
        ("LoadFaceParser", "other.pth"),
    ):
        with pytest.raises(checkpoints.CheckpointError, match=file):
            pack.run(node, file=file)
    for node in ("LoadDiFaReli", "LoadIdentityEncoder", "LoadShadowEstimator", "LoadFaceParser"):
        with pytest.raises(FileNotFoundError, match="gone.pth.*models/face_rig"):
            pack.run(node, file="gone.pth")


def test_a_published_pair_is_found_by_its_name(pack, relit):
    folder = pack.host.folder / "models" / "face_rig"
    net = relit.model.diffusion_model.net
    torch.save(net.ImgCond.state_dict(), folder / "ImgCond_ema.pt")
    node = pack.nodes["FaceRig_LoadDiFaReli"]
    beside = node.define_schema().inputs[1].default
    with pytest.raises(pack.core.checkpoints.CheckpointError, match="ImgEncoder_ema.pt is missing"):
        pack.run("LoadDiFaReli", file="ImgCond_ema.pt")
    before = node.fingerprint_inputs(file="ImgCond_ema.pt", modulator=beside)
    torch.save(net.ImgEncoder.state_dict(), folder / "ImgEncoder_ema.pt")
    assert node.fingerprint_inputs(file="ImgCond_ema.pt", modulator=beside) != before
    (folder / "ImgEncoder_ema.pt").rename(folder / "elsewhere.pt")
    model, size = pack.run("LoadDiFaReli", file="ImgCond_ema.pt", modulator="elsewhere.pt")
    again = model.model.diffusion_model.net.state_dict()
    assert size == 256  # of pictures; published models below see them made smaller
    assert all(torch.equal(v, again[k]) for k, v in net.state_dict().items())
