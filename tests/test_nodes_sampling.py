"""Empty Pixel Latent, Guided Sigmas and Clip Denoised, in the double of the host."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

from tests.node_pack import *  # noqa: F403 the fixtures
from tests.node_pack import SIZE


def test_empty_latent_takes_its_size_from_the_widgets_or_the_conditioning(pack, conditioned):
    (latent,) = pack.run("EmptyPixelLatent", width=96, height=64, batch_size=2)
    assert latent["samples"].shape == (2, 3, 64, 96) and not latent["samples"].any()
    (latent,) = pack.run("EmptyPixelLatent", width=96, batch_size=4, conditioning=conditioned)
    assert latent["samples"].shape == (4, 3, SIZE, SIZE)
    three = [[conditioned[0][0], {k: v.expand(3, *v.shape[1:]) for k, v in conditioned[0][1].items()}]]
    (latent,) = pack.run("EmptyPixelLatent", conditioning=three)
    assert latent["samples"].shape == (3, 3, SIZE, SIZE)
    with pytest.raises(ValueError, match="'conditioning' is not from DiffusionRig Condition or DiFaReli"):
        pack.run("EmptyPixelLatent", conditioning=[[torch.zeros(1, 1, 1), {}]])


def levels(sigmas) -> list[int]:
    """The timesteps of sigmas without the last, by the linear schedule of 1000."""
    alpha_bar = (1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)).cumprod(0)
    known = (1 / alpha_bar - 1).sqrt()
    near = (sigmas[:-1, None].double() / known - 1).abs()
    assert near.amin(1).max() < 1e-4 and sigmas[-1] == 0
    return near.argmin(1).tolist()


@pytest.mark.parametrize(
    "given, want",
    [
        ({"spacing": "ddim", "steps": 20}, list(range(950, -1, -50))),
        ({"spacing": "even", "steps": 5}, [999, 749, 500, 250, 0]),
        ({"spacing": "quad", "steps": 5}, [999, 562, 250, 62, 0]),
        ({"spacing": "sections", "sections": "3,2"}, [999, 500, 499, 250, 0]),
        ({"spacing": "even", "steps": 3, "denoise": 0.5}, [400, 200, 0]),
        ({"spacing": "sections", "sections": "3,2", "denoise": 0.6}, [499, 250, 0]),
    ],
)
def test_sigmas_are_guided_diffusions_timesteps(pack, model, given, want):
    (sigmas,) = pack.run("GuidedSigmas", model=model, **given)
    assert levels(sigmas) == want


def test_nothing_is_left_to_do_at_denoise_0(pack, model):
    for spacing in ("even", "sections"):
        assert not len(pack.run("GuidedSigmas", model=model, spacing=spacing, sections="2", denoise=0.0)[0])


@pytest.mark.parametrize(
    "given, message",
    [
        ({"spacing": "ddim", "steps": 300}, "'steps': no integer stride gives 300"),
        ({"spacing": "sections", "sections": "3,x"}, "'sections': timestep spacing '3,x'"),
        ({"spacing": "karras"}, "'spacing' is even, ddim, quad or sections"),
        ({"steps": 600, "denoise": 0.5}, "'steps' 600 at 'denoise' 0.5 asks for 1200 levels"),
        ({"denoise": 1.5}, "'denoise' lies between 0 and 1"),
    ],
)
def test_what_cannot_be_is_refused_with_the_inputs_name(pack, model, given, message):
    with pytest.raises(ValueError, match=message):
        pack.run("GuidedSigmas", model=model, **given)


def test_clip_denoised_changes_a_clone(pack, model):
    (clipped,) = pack.run("ClipDenoised", model=model)
    assert clipped is not model and not model.post_cfg and clipped.model is model.model
    (clamp,) = clipped.post_cfg
    assert clamp({"denoised": torch.tensor([-3.0, 0.5, 3.0])}).tolist() == [-1, 0.5, 1]
    with pytest.raises(ValueError, match="connect the MODEL of Load"):
        pack.run("ClipDenoised", model=object())


def test_what_save_model_writes_is_read_again(pack, model, tmp_path):
    net, meta = model.model.diffusion_model.net, {"head": "open", "step": 3, "mean_shape": torch.ones(1, 2)}
    known, model.model.meta = model.model.meta, meta
    tensors = {k: v.contiguous() for k, v in model.model.state_dict_for_saving().items()}
    model.model.meta = known
    save_file(tensors, tmp_path / "saved.safetensors", {"modelspec.predict_key": "epsilon"})
    again, about = pack.core.checkpoints.load_rig(tmp_path / "saved.safetensors")
    assert again.config == net.config and about["step"] == 3 and about["mean_shape"].tolist() == [[1, 1]]
    assert all(torch.equal(v, net.state_dict()[k]) for k, v in again.state_dict().items())
    with pytest.raises(ValueError, match="has no CLIP and no VAE"):
        model.model.state_dict_for_saving(vae_state_dict={"a": torch.ones(1)})
    for text in (
        torch.ones(3),
        torch.full((3,), 255, dtype=torch.uint8),
        torch.zeros(1, 2, dtype=torch.uint8),
    ):
        save_file(tensors | {"face_rig": text}, tmp_path / "bad.safetensors")
        with pytest.raises(pack.core.files.CheckpointError, match="bad.safetensors"):
            pack.core.checkpoints.load_rig(tmp_path / "bad.safetensors")


def test_the_networks_that_find_faces_exist_once(pack):
    networks = pack.core.estimators.landmarks.default_networks
    assert networks().finder is networks("cpu").finder
