"""Files of weights: ours (.safetensors) and the published ones (.pt), read without executing anything.

What a file is for is told by its contents: by "kind" in our own, by the names of the tensors in others.
Reading and writing themselves: files.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from . import flame_files, lora
from .denoisers.relight import DiFaReli, RelightConfig, both
from .denoisers.rig import DiffusionRig, RigConfig
from .estimators.deca import DECA
from .estimators.identity import ArcFace, ArcFaceConfig
from .estimators.parsing import BiSeNet
from .estimators.shadow import DiffAEShadow, SemanticEncoder, ShadowNet
from .files import ASSETS, CheckpointError, one_line, read, read_tree, save
from .heads import FaceModel
from .heads.flame import Flame
from .heads.open_head import OpenHead

LORA = "diffusion_rig_lora"  # kind of a file of adapters


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


def load_face_model(path: str | Path | None = None) -> FaceModel:
    """A head, and the encoder that reads its codes off photos where there is one.

    path: None for the open head of the pack; the file of an open head; a folder with the files of FLAME (and
    DECA) under their published names, or one of them, or a converted one (see flame_files).
    """
    if path is None:
        return FaceModel(load_head())
    path = Path(path)
    kind = read(path)[1].get("kind") if path.suffix == ".safetensors" else "folder"
    if kind not in ("flame", "deca", "folder"):
        return FaceModel(load_head(path))
    place = path.parent if kind == "deca" else path
    found = flame_files.find(place) | ({"encoder": path} if kind == "deca" else {})
    tensors = flame_files.tensors(place)
    _finite(found["model"], tensors)
    try:
        head = Flame.from_tensors(tensors)
    except (IndexError, RuntimeError, TypeError, ValueError) as e:
        raise CheckpointError(
            f"{found['model']}: not a usable FLAME head: {one_line(e)}: get it again"
        ) from e
    return FaceModel(head, load_deca(found["encoder"]) if "encoder" in found else None)


def load_deca(path: str | Path, device: torch.device | str = "cpu") -> DECA:
    """DECA's encoder in evaluation mode, float32: of the published deca_model.tar the entry E_flame alone."""
    with torch.device("meta"):
        model = DECA()
    advice = "choose DECA's deca_model.tar"
    return _estimator(Path(path), model, deca_tensors(path), "DECA encoder", advice, device)


def deca_tensors(path: str | Path) -> dict[str, Tensor]:
    """The weights of `load_deca`, of the published file or a converted one."""
    path = Path(path)
    tensors, meta = read(path, "E_flame")
    if "kind" in meta or "encoder.layer4.2.conv3.weight" not in tensors:
        _require(path, "DECA's encoder", meta, "deca", tensors, "choose DECA's deca_model.tar")
    return tensors


def load_rig(
    path: str | Path | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    base: str | Path | None = None,
) -> tuple[DiffusionRig, dict]:
    """A DiffusionRig denoiser in evaluation mode and what its file says about it.

    path: ours, or a published model*.pt (a bare state dict: 16 px attention and one head are assumed);
    None takes the pack's own. meta: kind, config, head ("open" or "flame"), and whatever else was
    given to `save_denoiser`, tensors included; of a personal model "mean_shape" [1,S]. The architecture is
    read off the weights. base: for a personal model of adapters alone the model that it was trained on;
    without it the file of the recorded name beside path.
    """
    path = Path(path or ASSETS / "diffusion_rig_128.safetensors")
    tensors, meta = read(path)
    advice = "choose a DiffusionRig file, or train one with python -m training.stage1"
    if meta.get("kind") == LORA:
        return _with_adapters(path, tensors, meta, base, device, dtype)
    if "kind" in meta or not any(k.startswith("denoisingUNet.") for k in tensors):
        _require(path, "a DiffusionRig denoiser", meta, "diffusion_rig", tensors, advice)
    else:
        meta = {"kind": "diffusion_rig", "head": "flame"}
    return _denoiser(path, tensors, meta, DiffusionRig, RigConfig, advice, device, dtype)


def _with_adapters(path: Path, tensors: dict, meta: dict, base, device, dtype) -> tuple[DiffusionRig, dict]:
    """The base of a personal model with its adapters added."""
    name = str(meta.get("base", ""))
    base = Path(base) if base else path.with_name(Path(name).name) if name else None
    if base is not None and not base.exists():
        raise CheckpointError(
            f"{path}: it holds adapters for {name}, which is not in {path.parent}: put that file there"
        )
    model, about = load_rig(base)
    if lora.mark(model.denoisingUNet) != meta.get("base_mark"):
        raise CheckpointError(
            f"{path}: it holds adapters for another model than {base or 'the one of the pack'}: "
            f"get the '{name or 'pack version'}' that it was trained on"
        )
    meta |= {k.removeprefix("meta."): tensors.pop(k) for k in list(tensors) if k.startswith("meta.")}
    _finite(path, tensors)
    try:
        lora.merge(model.denoisingUNet, tensors)
    except (RuntimeError, ValueError) as e:
        raise CheckpointError(f"{path}: not usable adapters: {one_line(e)}: train the model again") from e
    return model.to(device, dtype), meta | {"config": about["config"]}


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
        model, config = architecture(model_type, config_type, tensors, meta)
    except (AttributeError, RuntimeError, TypeError, ValueError, OverflowError) as e:
        raise CheckpointError(f"{path}: not a usable {what} denoiser: {one_line(e)}; {advice}") from e
    _finite(path, tensors)
    ready = {k: v.to(device, dtype if v.is_floating_point() else None, copy=True) for k, v in tensors.items()}
    model.load_state_dict(ready, assign=True)
    meta["config"] = config.to_dict()
    return model.requires_grad_(False).eval().to(memory_format=torch.channels_last), meta


def architecture(model_type, config_type, tensors: dict[str, Tensor], meta: dict):
    """The network of a denoiser's tensors without its weights, on the meta device, and its config.

    Raises ValueError, or what odd tensors and meta bring about, when they are not those of one.
    """
    known = meta.get("config", {})
    hidden = ("image_size", "num_heads", "dropout", "norm_groups")  # not to be seen in the weights
    known = {k: known[k] for k in hidden if k in known}
    config = config_type.from_state_dict(tensors, **known)
    with torch.device("meta"):
        model = model_type(config)
    match(model.state_dict(), tensors)
    return model, config


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

    path: ours, or DiffAE's published ffhq256_autoenc last.ckpt, of which the averaged encoder is read, also
    converted; None takes the pack's own. weights: for DiffAE DiFaReli's classifier; None looks for
    shadow_cls_weight.pkl beside path. A converted file holds both.
    """
    path = Path(path or ASSETS / "shadow.safetensors")
    prefix = "ema_model.encoder."
    tensors, meta = read(path, prefix)
    advice = "choose DiffAE's ffhq256_autoenc last.ckpt, or train one with training.estimators shadow"
    converted = meta.get("kind") == "diffae_shadow"
    if not converted and ("kind" in meta or not any(k.startswith(prefix) for k in tensors)):
        _require(path, "an estimator of cast shadows", meta, "shadow", tensors, advice)
        with torch.device("meta"):
            model = ShadowNet()
        return _estimator(path, model, tensors, "estimator of cast shadows", advice, device)
    weights = path if converted else Path(weights or path.with_name("shadow_cls_weight.pkl"))
    if not weights.exists():
        raise CheckpointError(
            f"{weights}: DiFaReli's shadow classifier is missing: get shadow_cls_weight.pkl from the "
            f"repository diffusion-face-relighting/difareli_code and put it beside {path.name}, or name it"
        )
    weight = _shadow_weight(weights, tensors if converted else read_tree(weights))
    with torch.device("meta"):
        encoder = SemanticEncoder()
    tensors = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
    encoder = _estimator(path, encoder, tensors, "DiffAE encoder", advice, device)
    return DiffAEShadow(encoder, weight).requires_grad_(False).eval()


def _shadow_weight(path: Path, tree) -> Tensor:
    """DiFaReli's classifier out of what a file holds: a dictionary with "weight" [1,512]."""
    advice = "get shadow_cls_weight.pkl again"
    weight = tree.get("weight") if isinstance(tree, dict) else None
    if not isinstance(weight, Tensor):
        raise CheckpointError(f"{path}: not DiFaReli's shadow classifier, it has no 'weight': {advice}")
    if weight.shape != (1, 512):
        raise CheckpointError(f"{path}: 'weight' is {list(weight.shape)} instead of [1, 512]: {advice}")
    if not weight.isfinite().all():
        raise CheckpointError(f"{path}: 'weight' holds numbers that are not finite: {advice}")
    return weight


def _estimator(path: Path, model: torch.nn.Module, tensors: dict, what: str, advice: str, device):
    """model, made on the meta device, with the file's tensors."""
    try:
        match(model.state_dict(), tensors)
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


def match(wanted: dict[str, Tensor], found: dict[str, Tensor]) -> None:
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


if __name__ == "__main__":
    from .catalogue import main

    raise SystemExit(main())
