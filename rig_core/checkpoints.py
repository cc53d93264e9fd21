"""Files of weights: ours (.safetensors) and the published ones (.pt), read without executing anything.

What a file is for is told by its contents: by "kind" in our own, by the names of the tensors in others.
Reading and writing themselves: files.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from .denoisers.relight import DiFaReli, RelightConfig, both
from .denoisers.rig import DiffusionRig, RigConfig
from .estimators.identity import ArcFace, ArcFaceConfig
from .estimators.parsing import BiSeNet
from .estimators.shadow import DiffAEShadow, SemanticEncoder, ShadowNet
from .files import ASSETS, CheckpointError, one_line, read, save
from .heads.open_head import OpenHead
from .unpickle import load as unpickle


def load_head(path: str | Path | None = None) -> OpenHead:
    """The open head of the pack, or of another file written by training/head.py."""
    path = Path(path or ASSETS / "open_head.safetensors")
    tensors, meta = read(path)
    _require(path, "an open head", meta, "open_head", tensors, "python -m training.head makes one")
    try:
        return OpenHead.from_tensors(tensors, meta)
    except (AttributeError, KeyError, RuntimeError, ValueError) as e:
        raise CheckpointError(
            f"{path}: the open head is incomplete ({one_line(e)}): make or download it again"
        ) from e


def load_rig(
    path: str | Path | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> tuple[DiffusionRig, dict]:
    """A DiffusionRig denoiser in evaluation mode and what its file says about it.

    path: ours, or a published model*.pt (a bare state dict: 16 px attention and one head are assumed);
    None takes the pack's own. meta: kind, config, head ("open" or "flame"), and whatever else was
    given to `save_denoiser`, tensors included. The architecture is read off the weights.
    """
    path = Path(path or ASSETS / "diffusion_rig_128.safetensors")
    tensors, meta = read(path)
    advice = "choose a DiffusionRig file, or train one with python -m training.stage1"
    if "kind" in meta or not any(k.startswith("denoisingUNet.") for k in tensors):
        _require(path, "a DiffusionRig denoiser", meta, "diffusion_rig", tensors, advice)
    else:
        meta = {"kind": "diffusion_rig", "head": "flame"}
    return _denoiser(path, tensors, meta, DiffusionRig, RigConfig, advice, device, dtype)


def load_relight(
    path: str | Path | None = None,
    modulator: str | Path | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> tuple[DiFaReli, dict]:
    """A DiFaReli denoiser in evaluation mode and what its files say about it.

    path: ours, or a published ImgCond_*.pt; None takes the pack's own. modulator: for a published denoiser
    its ImgEncoder_*.pt; None looks for the file of that name beside it (attention at 16 and 8 px and four
    heads are assumed). meta as for `load_rig`.
    """
    path = Path(path or ASSETS / "difareli_128.safetensors")
    tensors, meta = read(path)
    advice = (
        "choose a DiFaReli file (ImgCond_*.pt with its ImgEncoder_*.pt), or train one with training.relight"
    )
    if "kind" in meta or "input_blocks.1.1.cond_proj_layers.0.weight" not in tensors:
        _require(path, "a DiFaReli denoiser", meta, "difareli", tensors, advice)
    else:
        if not modulator and "ImgCond" not in path.name:
            raise CheckpointError(f"{path}: its Modulator is not known by the name: name its ImgEncoder_*.pt")
        second = Path(modulator or path.with_name(path.name.replace("ImgCond", "ImgEncoder")))
        if not second.exists():
            raise CheckpointError(
                f"{path}: its Modulator {second} is missing: put the ImgEncoder_*.pt of the same step "
                "there, or name it"
            )
        encoder, _ = read(second)
        if "input_blocks.1.0.in_layers.0.weight" not in encoder or "time_embed.0.weight" in encoder:
            raise CheckpointError(f"{second}: expected DiFaReli's Modulator (ImgEncoder_*.pt); {advice}")
        tensors, meta = both(tensors, encoder), {"kind": "difareli", "head": "flame"}
    return _denoiser(path, tensors, meta, DiFaReli, RelightConfig, advice, device, dtype)


def _denoiser(path: Path, tensors: dict, meta: dict, model_type, config_type, advice: str, device, dtype):
    """The network of a denoiser's tensors; meta gains those below "meta." and the config."""
    meta |= {k.removeprefix("meta."): tensors.pop(k) for k in list(tensors) if k.startswith("meta.")}
    what = model_type.__name__
    try:
        known = meta.get("config", {})
        hidden = ("image_size", "num_heads", "dropout", "norm_groups")  # not to be seen in the weights
        known = {k: known[k] for k in hidden if k in known}
        config = config_type.from_state_dict(tensors, **known)
        with torch.device("meta"):
            model = model_type(config)
        _match(model.state_dict(), tensors)
    except (AttributeError, RuntimeError, TypeError, ValueError, OverflowError) as e:
        raise CheckpointError(f"{path}: not a usable {what} denoiser: {one_line(e)}; {advice}") from e
    _finite(path, tensors)
    ready = {k: v.to(device, dtype if v.is_floating_point() else None, copy=True) for k, v in tensors.items()}
    model.load_state_dict(ready, assign=True)
    meta["config"] = config.to_dict()
    return model.requires_grad_(False).eval().to(memory_format=torch.channels_last), meta


def load_parser(path: str | Path, device: torch.device | str = "cpu") -> BiSeNet:
    """The face parser in evaluation mode, from the published 79999_iter.pth or the same tensors otherwise."""
    path = Path(path)
    tensors, meta = read(path)
    advice = "choose face-parsing.PyTorch's 79999_iter.pth"
    if "kind" in meta or "cp.arm16.conv.conv.weight" not in tensors:
        _require(path, "the face parser BiSeNet", meta, "bisenet", tensors, advice)
    with torch.device("meta"):
        model = BiSeNet()
    return _estimator(path, model, tensors, "face parser of 19 classes", advice, device)


def load_identity(path: str | Path | None = None, device: torch.device | str = "cpu") -> ArcFace:
    """An identity encoder in evaluation mode, float32.

    path: ours, or the published BEST_checkpoint_r18.tar (a pickled network, of which only the tensors are
    read) or its weights; None takes the pack's own. The architecture is read off the weights.
    """
    path = Path(path or ASSETS / "identity.safetensors")
    tensors, meta = read(path)
    advice = "choose an ArcFace file (BEST_checkpoint_r18.tar), or train one with training.estimators"
    tensors = {k.removeprefix("model.").removeprefix("module."): v for k, v in tensors.items()}
    if "kind" in meta or not {"conv1.weight", "fc.weight", "bn3.running_mean"} <= tensors.keys():
        _require(path, "an identity encoder", meta, "identity", tensors, advice)
    try:
        config = ArcFaceConfig.from_state_dict(tensors)
        with torch.device("meta"):
            model = ArcFace(config)
    except (AttributeError, RuntimeError, TypeError, ValueError, OverflowError) as e:
        raise CheckpointError(f"{path}: not a usable identity encoder: {one_line(e)}; {advice}") from e
    counters = {k: v for k, v in model.state_dict().items() if k.endswith(".num_batches_tracked")}
    tensors = {k: torch.zeros_like(v, device="cpu") for k, v in counters.items()} | tensors
    return _estimator(path, model, tensors, "identity encoder", advice, device)


def load_shadow(
    path: str | Path | None = None,
    weights: str | Path | None = None,
    device: torch.device | str = "cpu",
) -> ShadowNet | DiffAEShadow:
    """An estimator of the cast-shadow scalar in evaluation mode, float32.

    path: ours, or DiffAE's published ffhq256_autoenc last.ckpt, of which the averaged encoder is read; None
    takes the pack's own. weights: for DiffAE DiFaReli's classifier; None looks for shadow_cls_weight.pkl
    beside path.
    """
    path = Path(path or ASSETS / "shadow.safetensors")
    prefix = "ema_model.encoder."
    tensors, meta = read(path, prefix)
    advice = "choose DiffAE's ffhq256_autoenc last.ckpt, or train one with training.estimators shadow"
    if "kind" in meta or not any(k.startswith(prefix) for k in tensors):
        _require(path, "an estimator of cast shadows", meta, "shadow", tensors, advice)
        with torch.device("meta"):
            model = ShadowNet()
        return _estimator(path, model, tensors, "estimator of cast shadows", advice, device)
    weights = Path(weights or path.with_name("shadow_cls_weight.pkl"))
    if not weights.exists():
        raise CheckpointError(
            f"{weights}: DiFaReli's shadow classifier is missing: get shadow_cls_weight.pkl from the "
            f"repository diffusion-face-relighting/difareli_code and put it beside {path.name}, or name it"
        )
    with torch.device("meta"):
        encoder = SemanticEncoder()
    tensors = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
    encoder = _estimator(path, encoder, tensors, "DiffAE encoder", advice, device)
    return DiffAEShadow(encoder, _shadow_weight(weights)).requires_grad_(False).eval()


def _shadow_weight(path: Path) -> Tensor:
    """DiFaReli's classifier: a bare pickle of a dictionary with "weight" [1,512]."""
    try:
        data = path.read_bytes()
        if len(data) > 2**20:
            raise ValueError(f"it has {len(data)} bytes, the classifier a few thousand")
        weight = unpickle(data, _no_storage)["weight"]
        if tuple(weight.shape) != (1, 512):
            raise ValueError(f"'weight' is {list(weight.shape)} instead of [1, 512]")
        if not weight.isfinite().all():
            raise ValueError("'weight' holds numbers that are not finite")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OSError) as e:
        raise CheckpointError(
            f"{path}: not DiFaReli's shadow classifier ({one_line(e)}): get shadow_cls_weight.pkl again"
        ) from e
    return weight


def _no_storage(key: str, dtype: torch.dtype, count: int) -> Tensor:
    raise ValueError("it refers to tensors outside of it")


def _estimator(path: Path, model: torch.nn.Module, tensors: dict, what: str, advice: str, device):
    """model, made on the meta device, with the file's tensors."""
    try:
        _match(model.state_dict(), tensors)
    except ValueError as e:
        raise CheckpointError(f"{path}: not a usable {what}: {one_line(e)}; {advice}") from e
    _finite(path, tensors)
    ready = {k: v.to(device, torch.float32 if v.is_floating_point() else None) for k, v in tensors.items()}
    model.load_state_dict(ready, assign=True)
    return model.requires_grad_(False).eval()


def save_denoiser(
    path: str | Path, model: DiffusionRig | DiFaReli, meta: dict | None = None, half: bool = False
) -> None:
    """Write a denoiser so that its loader gives it back with meta (JSON values and tensors).

    half: matrices and kernels as float16, norms, biases and statistics as float32. They come back as
    float32 holding exactly the stored values: weights within a factor 1 +- 2^-11 of the original
    (3e-8 absolute for those below 6e-5), and saving again changes nothing.
    """
    tensors = dict(model.state_dict())
    if half:
        small = torch.finfo(torch.float16).max
        tensors = {
            k: v.half() if v.is_floating_point() and v.ndim > 1 and v.abs().max() < small else v
            for k, v in tensors.items()
        }
    meta = dict(meta or {})
    tensors |= {f"meta.{k}": v for k, v in meta.items() if isinstance(v, Tensor)}
    plain = {k: v for k, v in meta.items() if not isinstance(v, Tensor)}
    kind = "difareli" if isinstance(model, DiFaReli) else "diffusion_rig"
    save(path, tensors, {"head": "open", **plain, "kind": kind, "config": model.config.to_dict()})


def _match(wanted: dict[str, Tensor], found: dict[str, Tensor]) -> None:
    """Raise ValueError unless keys and shapes are the same."""
    for k in wanted.keys() | found.keys():
        if k not in found:
            raise ValueError(f"'{k}' is missing")
        if k not in wanted:
            raise ValueError(f"'{k}' does not belong there")
        if wanted[k].shape != found[k].shape:
            raise ValueError(f"'{k}' is {list(found[k].shape)} instead of {list(wanted[k].shape)}")


def _finite(path: Path, tensors: dict[str, Tensor]) -> None:
    broken = next((k for k, v in tensors.items() if not v.isfinite().all()), None)
    if broken:
        raise CheckpointError(
            f"{path}: '{broken}' holds numbers that are not finite: use an earlier checkpoint, "
            "or download it again"
        )


def _require(path: Path, wanted: str, meta: dict, kind: str, tensors: dict, advice: str) -> None:
    if meta.get("kind") != kind:
        found = (
            f"kind '{meta['kind']}'" if "kind" in meta else f"tensors like '{next(iter(tensors), 'none')}'"
        )
        raise CheckpointError(f"{path}: expected {wanted}, found {found[:100]}: {advice}")
