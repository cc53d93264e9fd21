"""All that touches ComfyUI's insides: pictures, devices, memory, progress, model files, the host MODEL.

ComfyUI's pictures are B,H,W,C float 0..1 on the CPU; ours are B,C,H,W. Its nodes run in inference
mode; networks are built and fits are made outside of it, see `gradients`.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import re
from pathlib import Path

import comfy.conds
import comfy.latent_formats
import comfy.model_base
import comfy.model_management as mm
import comfy.model_patcher
import comfy.supported_models_base
import comfy.utils
import folder_paths
import torch
import torch.nn.functional as F
from PIL import Image
from server import PromptServer
from torch import Tensor, nn

from ..rig_core import album, align, conditions
from ..rig_core.denoisers.relight import DiFaReli, RelightCondition
from ..rig_core.denoisers.rig import DiffusionRig, RigCondition
from ..rig_core.estimators.deca import DECA
from ..rig_core.heads import FaceModel

FOLDER = "face_rig"
EXTENSIONS = {".safetensors", ".pt", ".pth", ".tar", ".ckpt", ".pkl"}
DEFAULT = "default (in the pack)"
NO_ALBUM = "(put a folder of photos into input)"


# pictures


def pictures(image: Tensor, name: str, least: int = 32, most: int | None = None) -> Tensor:
    """IMAGE [B,H,W,C] -> RGB [B,3,H,W] float32 on the working device.

    Grey becomes RGB, alpha is dropped. `name` is the input's, for the errors: ValueError for an empty
    batch, NaN, other channels, a side under `least` or over `most` pixels.
    """
    if not isinstance(image, Tensor) or image.ndim != 4:
        raise ValueError(f"'{name}' is not an IMAGE (batch, height, width, channels)")
    try:
        x = align.check_image(image.movedim(-1, 1).to(device()))
    except ValueError as e:
        raise ValueError(f"'{name}': {e}") from e
    height, width = x.shape[2:]
    if min(height, width) < least:
        raise ValueError(f"'{name}' is {width} x {height} pixels: too small, {least} x {least} is the least")
    if most and max(height, width) > most:
        raise ValueError(
            f"'{name}' is {width} x {height} pixels, {most} is the most here: put Align Face before it"
        )
    return x.contiguous()


def mask_pictures(mask: Tensor, name: str, size: int | None = None) -> Tensor:
    """MASK [B,H,W] or [H,W] -> [B,1,H,W] float32 on the working device; with size resized to that square.

    Raises ValueError for NaN, and where a square is asked for for a mask that is none.
    """
    if mask.ndim == 2:
        mask = mask[None]
    if mask.ndim != 3 or 0 in mask.shape:
        raise ValueError(f"'{name}' is not a MASK (batch, height, width)")
    if not torch.isfinite(mask).all():
        raise ValueError(f"'{name}' holds NaN or infinite values: look at the node that made it")
    if size is not None and mask.shape[1] != mask.shape[2]:
        raise ValueError(
            f"'{name}' is {mask.shape[2]} x {mask.shape[1]} pixels, the aligned picture is square: give a "
            "mask of the aligned picture, not of the photo"
        )
    x = mask[:, None].to(device(), torch.float32).clamp(0, 1)
    if size is None or x.shape[2:] == (size, size):
        return x
    return F.interpolate(x, (size, size), mode="bilinear", antialias=True)


def repeat(x, n: int, name: str):
    """One picture (or face) for all n, or n of them. Raises ValueError for another number."""
    if len(x) not in (1, n):
        raise ValueError(f"'{name}' holds {len(x)} pictures or faces, but {n} are needed: give 1 or {n}")
    return x if len(x) == n else x.expand(n, *x.shape[1:]) if isinstance(x, Tensor) else x.expand(n)


def image(x: Tensor) -> Tensor:
    """[B,C,H,W] -> IMAGE, clamped to 0..1, on the host's device for results."""
    if not torch.isfinite(x).all():
        raise ValueError(
            "the result holds NaN: if the model runs in half precision, start ComfyUI with --force-fp32"
        )
    return x.clamp(0, 1).permute(0, 2, 3, 1).to(mm.intermediate_device(), torch.float32).contiguous()


def few(x: Tensor, n: int = 4) -> Tensor:
    """At most n pictures of a batch, evenly chosen, for a preview."""
    return x[torch.linspace(0, len(x) - 1, min(n, len(x))).round().long().to(x.device)]


def mask(x: Tensor) -> Tensor:
    """[B,1,H,W] -> MASK."""
    return x[:, 0].clamp(0, 1).to(mm.intermediate_device(), torch.float32).contiguous()


# devices, memory, progress


def device() -> torch.device:
    """Where to compute."""
    return mm.get_torch_device()


def warn(text: str) -> None:
    """Something the user should know, in the host's log."""
    logging.getLogger("face_rig").warning("Face Rig: %s", text)


def result(x):
    """A tensor or a value of rig_core, moved to the host's device for results."""
    return x.to(mm.intermediate_device())


def head(face_model):
    """The head of a FACE_MODEL, or a bare one, on the working device, out of inference mode for fits."""
    bare = face_model.head if isinstance(face_model, FaceModel) else face_model
    with torch.inference_mode(False):
        return bare.to(device())


@contextlib.contextmanager
def gradients():
    """Out of the host's inference mode: for building networks and for fits. Clone what comes in."""
    with torch.inference_mode(False), torch.enable_grad():
        yield


@contextlib.contextmanager
def own_random_numbers():
    """Whatever is drawn inside leaves the host's random numbers as they were."""
    with torch.random.fork_rng([device()] if device().type == "cuda" else []):
        yield


class Progress:
    """The host's bar with a preview. Each step raises the host's exception when the user pressed stop."""

    def __init__(self, total: int):
        self.bar = comfy.utils.ProgressBar(total)
        self.total = total
        self.done = 0

    def step(self, preview: Tensor | None = None) -> None:
        """One step further. preview: [B,3,H,W] in -1..1, its first picture is shown."""
        mm.throw_exception_if_processing_interrupted()
        self.done += 1
        shown = None if preview is None else ("JPEG", _pil(preview), 512)
        self.bar.update_absolute(self.done, self.total, shown)

    def show(self, done: int, preview: Tensor | None = None) -> bool:
        """`done` steps of all. False, where `step` would raise, when the user pressed stop."""
        shown = None if preview is None else ("JPEG", _pil(preview), 512)
        try:
            self.bar.update_absolute(done, self.total, shown)
            mm.throw_exception_if_processing_interrupted()
        except mm.InterruptProcessingException:
            return False
        return True

    def callback(self, state: dict) -> None:
        """What rig_core.samplers calls after every step; `last` is the state that it reached."""
        self.last = state["x"]
        self.step(state["x_0"])


def _pil(x: Tensor) -> Image.Image:
    x = ((x[0].detach().float().clamp(-1, 1) + 1) * 127.5).round().byte()
    return Image.fromarray(x.permute(1, 2, 0).cpu().numpy())


def chunks(n: int, height: int, width: int) -> list[slice]:
    """Slices over a batch so that about a megapixel is in work at a time."""
    return _slices(n, max(1, 2**20 // (height * width)))


def _slices(n: int, step: int) -> list[slice]:
    return [slice(i, min(i + step, n)) for i in range(0, n, step)]


# model files


def add_model_folder() -> None:
    """Make models/face_rig known; folders that extra_model_paths.yaml gives under that name stay."""
    folder_paths.add_model_folder_path(FOLDER, os.path.join(folder_paths.models_dir, FOLDER))
    paths, _ = folder_paths.folder_names_and_paths[FOLDER]
    folder_paths.folder_names_and_paths[FOLDER] = (paths, EXTENSIONS)


def model_names(first: str = DEFAULT) -> list[str]:
    """What a dropdown offers: the pack's own file (or what stands in its place), then models/face_rig."""
    return [first, *(n for n in folder_paths.get_filename_list(FOLDER) if n != first)]


def model_path(name: str, instead: str = f"choose '{DEFAULT}'") -> str | None:
    """The file of a dropdown's entry, None for the pack's own. Raises FileNotFoundError."""
    if name == DEFAULT:
        return None
    path = folder_paths.get_full_path(FOLDER, name)
    if path is None:
        raise FileNotFoundError(
            f"there is no '{name}' in models/{FOLDER} (or it has another ending than "
            f"{', '.join(sorted(EXTENSIONS))}): put it there and press R, or {instead}"
        )
    return path


def model_fingerprint(name: str, beside=lambda folder: ()) -> str:
    """Changes when the file behind a dropdown's entry does, or one of beside(its folder)."""
    path = None if name == DEFAULT else folder_paths.get_full_path(FOLDER, name)
    if path is None:
        return name
    stats = [os.stat(p) for p in (path, *beside(os.path.dirname(path)))]
    return path + "".join(f":{s.st_mtime_ns}:{s.st_size}" for s in stats)


def model_folders() -> list[str]:
    """models/face_rig, and what extra_model_paths.yaml adds to it, as far as they exist."""
    return [d for d in folder_paths.get_folder_paths(FOLDER) if os.path.isdir(d)]


def models_fingerprint() -> str:
    """Changes when any file in these folders does."""
    found = [os.path.join(d, f) for top in model_folders() for d, _, files in os.walk(top) for f in files]
    known = [(f, os.stat(f)) for f in sorted(found) if os.path.exists(f)]
    return repr([(f, s.st_mtime_ns, s.st_size) for f, s in known])


# albums and new models


def album_names() -> list[str]:
    """The folders below input/ that hold pictures, as a dropdown offers them."""
    root = folder_paths.get_input_directory()
    found = []
    for folder, inside, files in os.walk(root):
        inside[:] = sorted(d for d in inside if not d.startswith("."))
        name = os.path.relpath(folder, root).replace(os.sep, "/")
        if name != "." and any(os.path.splitext(f)[1].lower() in album.PHOTOS for f in files):
            found.append(name)
        if name.count("/") >= 2:
            inside.clear()
    return sorted(found) or [NO_ALBUM]


def album_path(name: str) -> Path:
    """The folder of a dropdown's entry. Raises ValueError for one that is not below input/."""
    root = Path(folder_paths.get_input_directory()).resolve()
    path = (root / name).resolve()
    if root not in path.parents or not path.is_dir():
        raise ValueError(
            f"'album': there is no folder '{name}' below {root}: put the photos of one person into a folder "
            "there and press R"
        )
    return path


def album_fingerprint(name: str) -> str:
    """Changes when a photo of the album does, or is added or taken away."""
    known = [(p.name, p.stat()) for p in album.paths(album_path(name))]
    return repr([(f, s.st_mtime_ns, s.st_size) for f, s in known])


def new_model_path(name: str) -> Path:
    """Where a new model of that name goes: models/face_rig. Raises ValueError for an odd name."""
    if not re.fullmatch(r"[\w-]+", name):
        raise ValueError(f"'name' is '{name}': letters, digits, - and _ only, it becomes a file's name")
    folder = Path(folder_paths.get_folder_paths(FOLDER)[0])
    folder.mkdir(parents=True, exist_ok=True)
    return folder / f"{name}.safetensors"


def run_path(name: str) -> Path:
    """Where the training of a model keeps its state: output/face_rig/NAME."""
    return Path(folder_paths.get_output_directory()) / FOLDER / name


def stop_pressed() -> bool:
    """Whether the user pressed stop; asking takes it back, so remember the answer."""
    try:
        mm.throw_exception_if_processing_interrupted()
    except mm.InterruptProcessingException:
        return True
    return False


def end_prompt() -> None:
    """End the prompt as the host's stop button does, after what had to be saved."""
    raise mm.InterruptProcessingException


def make_room() -> None:
    """Have the host move its models off the working device: a training may need all of it."""
    mm.free_memory(1e30, device())


def say(text: str, node_id) -> None:
    """A line below a running node, where there is somebody to read it."""
    server = getattr(PromptServer, "instance", None)
    if server is not None and node_id is not None:
        server.send_progress_text(text, node_id)


# the networks


# what a CONDITIONING carries for each kind of denoiser: kind -> its name, our condition node, the fields
KINDS = {
    DiffusionRig: (
        "a DiffusionRig",
        "DiffusionRig Condition",
        ("rig_physical", "rig_code", "rig_gain", "rig_offset"),
    ),
    DiFaReli: ("a DiFaReli", "DiFaReli Condition", ("relight_spatial", "relight_vector")),
}


class PixelLatent(comfy.latent_formats.LatentFormat):
    """RGB in -1..1 as a latent of three channels."""

    scale_factor = 1.0
    latent_channels = 3

    def __init__(self):
        self.latent_rgb_factors = [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]]


class _Config(comfy.supported_models_base.BASE):
    unet_config = {}
    unet_extra_config = {}
    latent_format = PixelLatent
    # the host calls a beta schedule that is linear in beta "sqrt_linear"
    sampling_settings = {
        "beta_schedule": "sqrt_linear",
        "linear_start": 1e-4,
        "linear_end": 0.02,
        "timesteps": 1000,
    }
    supported_inference_dtypes = [torch.float32]
    memory_usage_factor = 0.1  # of the published width, 128


class _Network(nn.Module):
    """Our denoiser under the host's calling convention. x is x_t, t the timestep 0..999."""

    def __init__(self, net: nn.Module):
        super().__init__()
        self.net = net
        self.dtype = next(net.parameters()).dtype

    def forward(self, x, t, **kwargs):
        name, node, fields = KINDS[type(self.net)]
        if isinstance(self.net, DiFaReli):
            fields = ("relight_gain", "relight_latents")
        if fields[0] not in kwargs:
            raise ValueError(f"this MODEL is {name}: give it the conditioning of {node}")
        values = [kwargs[f] for f in fields]
        if isinstance(self.net, DiFaReli):
            return self.net(x, t, RelightCondition(values[0], tuple(values[1])))
        return self.net(x, t, RigCondition(*values))


class PixelModel(comfy.model_base.BaseModel):
    """One of our denoisers as the host sees a diffusion model, so that its samplers run on it."""

    def __init__(self, net: nn.Module, meta: dict, device: torch.device):
        config = _Config({"disable_unet_model_creation": True})
        super().__init__(config, comfy.model_base.ModelType.EPS, device=device)
        self.diffusion_model = _Network(net)
        self.memory_usage_factor *= net.config.width / 128
        self.meta = meta
        self.mark = _mark(net)

    def extra_conds(self, **kwargs):
        """Called once a run: here the Modulator of DiFaReli reads the picture and the light."""
        net = self.diffusion_model.net
        fields = KINDS[type(net)][2]
        given = {f: kwargs[f].to(kwargs["device"]) for f in fields if f in kwargs}
        if isinstance(net, DiffusionRig):
            kinds = [comfy.conds.CONDNoiseShape] + [comfy.conds.CONDRegular] * 3
            return {f: kind(given[f]) for f, kind in zip(fields, kinds, strict=True) if f in given}
        if len(given) < 2:
            return {}
        c = net.condition(*given.values())
        latents = comfy.conds.CONDList(list(c.latents))
        return {"relight_gain": comfy.conds.CONDRegular(c.gain), "relight_latents": latents}


def _mark(net: nn.Module) -> str:
    """Tells networks apart, the same for two copies of one file."""
    digest = hashlib.sha256(repr(net.config).encode())
    for p in net.parameters():
        digest.update(p.detach().flatten()[:16].float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def model(net: nn.Module, meta: dict):
    """A host MODEL (ModelPatcher) around a DiffusionRig or a DiFaReli."""
    return _patcher(PixelModel(net.eval().requires_grad_(False), meta, mm.unet_offload_device()))


def _patcher(net: nn.Module):
    return comfy.model_patcher.ModelPatcher(
        net, load_device=mm.get_torch_device(), offload_device=mm.unet_offload_device()
    )


def picture_size(net: nn.Module, meta: dict) -> int:
    """Side of the aligned pictures for a denoiser: its own, or 256 px for a smaller DiFaReli of FLAME.

    As published, these see pictures of 256 px made smaller, see `pipeline.shrink`.
    """
    published = isinstance(net, DiFaReli) and meta.get("head") == "flame"
    return max(net.config.image_size, conditions.PUBLISHED if published else 0)


def denoiser(model, kind: type | None = None) -> nn.Module:
    """The network inside a MODEL, not moved. Raises ValueError for another kind of MODEL."""
    inner = getattr(model, "model", None)
    kinds = [kind] if kind else list(KINDS)
    if not isinstance(inner, PixelModel) or type(inner.diffusion_model.net) not in kinds:
        names = " nor ".join(KINDS[k][0] for k in kinds)
        loaders = " or ".join("Load " + KINDS[k][0].split()[1] for k in kinds)
        raise ValueError(f"'model' is {'not' if kind else 'neither'} {names}: connect the MODEL of {loaders}")
    return inner.diffusion_model.net


def loaded(model) -> nn.Module:
    """`denoiser`, on the working device."""
    net = denoiser(model)
    size = net.config.image_size
    mm.load_models_gpu([model], memory_required=model.model.memory_required([1, 3, size, size]))
    return net


def batches(model, n: int, height: int, width: int) -> list[slice]:
    """Slices over a batch of pictures that fit into half of the free memory, 16 at the most."""
    one = model.model.memory_required([1, 3, height, width])
    return _slices(n, int(min(16, max(1, mm.get_free_memory(device()) / 2 // max(one, 1)))))


def face_model(given: FaceModel) -> FaceModel:
    """FACE_MODEL: its encoder, where there is one, as `estimator`."""
    return given if given.encoder is None else given._replace(encoder=estimator(given.encoder))


def deca(face_model) -> nn.Module | None:
    """DECA's encoder of a FACE_MODEL on the working device, None where it has none."""
    patcher = getattr(face_model, "encoder", None)
    return patcher and loaded_estimator(patcher, (DECA,), "face_model", "Load Face Model")


def estimator(net: nn.Module):
    """A network that only looks at pictures, under the host's management of memory."""
    return _patcher(net)


def loaded_estimator(patcher, kinds: tuple[type, ...], name: str, node: str) -> nn.Module:
    """The inverse of `estimator`, on the working device. Raises ValueError when `name` is another node's."""
    if not isinstance(getattr(patcher, "model", None), kinds):
        raise ValueError(f"'{name}' is not from {node}: connect that node")
    mm.load_models_gpu([patcher])
    return patcher.model
