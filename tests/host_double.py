"""A small double of what the nodes use of ComfyUI's API, so that they are tested where no host is.

`install(monkeypatch, folder)` puts it into sys.modules; `load_pack()` then loads the pack the way the
host does: under a module name made of its path. The signatures are as strict as the host's (0.3.64).
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import sys
import types
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]


class Interrupted(Exception):
    """The host's InterruptProcessingException."""


@dataclass
class Host:
    """What tests look at or set."""

    folder: Path
    interrupt_after: int | None = None
    progress: list = field(default_factory=list)
    loaded: list = field(default_factory=list)
    resident: list = field(default_factory=list)  # what the last load asked for: all else may have left
    previews: list = field(default_factory=list)
    texts: list = field(default_factory=list)
    said: list = field(default_factory=list)


# comfy_api.latest


class _Input:
    extra: tuple[str, ...] = ()

    def __init__(self, id, display_name=None, optional=False, tooltip=None, lazy=None, **extra):
        unknown = set(extra) - set(self.extra)
        if unknown:
            raise TypeError(f"{type(self).__name__} has no {unknown}")
        self.id, self.optional, self.tooltip = id, optional, tooltip
        self.default, self.options = extra.get("default"), extra.get("options")
        self.min, self.max = extra.get("min"), extra.get("max")
        self.widget = bool(self.extra) and not extra.get("force_input")
        self.control_after_generate = extra.get("control_after_generate")


class _Output:
    def __init__(self, id=None, display_name=None, tooltip=None, is_output_list=False):
        self.id, self.display_name, self.tooltip = id, display_name, tooltip


_WIDGET = ("default", "socketless")
_NUMBER = (*_WIDGET, "min", "max", "step", "control_after_generate", "display_mode", "force_input")


class _MultiTyped(_Input):
    def __init__(self, id, types, **fields):
        super().__init__(id, **fields)
        self.io_type = ",".join(t.io_type for t in types)


def _socket(name: str, extra: tuple[str, ...] = ()):
    cls = type(name, (), {"io_type": name})
    cls.Input = type("Input", (_Input,), {"extra": extra, "io_type": name})
    cls.Output = type("Output", (_Output,), {"io_type": name})
    return cls


@dataclass
class Schema:
    node_id: str
    display_name: str | None = None
    category: str = "sd"
    inputs: list | None = None
    outputs: list | None = None
    hidden: list | None = None
    description: str = ""
    is_input_list: bool = False
    is_output_node: bool = False
    is_deprecated: bool = False
    is_experimental: bool = False
    is_api_node: bool = False
    not_idempotent: bool = False
    enable_expand: bool = False


class NodeOutput:
    def __init__(self, *args: Any, ui=None, expand=None, block_execution=None):
        self.result, self.ui = args, ui


class ComfyNode:
    hidden = None


def _api(host: Host):
    io = types.SimpleNamespace(
        Schema=Schema,
        NodeOutput=NodeOutput,
        ComfyNode=ComfyNode,
        Custom=_socket,
        MultiType=types.SimpleNamespace(Input=_MultiTyped),
        BBOX=_socket("BBOX"),
        Image=_socket("IMAGE"),
        Mask=_socket("MASK"),
        Latent=_socket("LATENT"),
        Model=_socket("MODEL"),
        Video=_socket("VIDEO"),
        Sigmas=_socket("SIGMAS"),
        Conditioning=_socket("CONDITIONING"),
        Float=_socket("FLOAT", (*_NUMBER, "round")),
        Int=_socket("INT", _NUMBER),
        Boolean=_socket("BOOLEAN", (*_WIDGET, "label_on", "label_off")),
        String=_socket("STRING", (*_WIDGET, "multiline", "placeholder", "dynamic_prompts")),
        Hidden=types.SimpleNamespace(unique_id="UNIQUE_ID"),
        FolderType=types.SimpleNamespace(temp="temp"),
        Combo=_socket("COMBO", (*_WIDGET, "options", "control_after_generate")),
    )

    class PreviewImage:
        def __init__(self, image, animated=False, cls=None):
            assert image.ndim == 4 and image.shape[-1] == 3 and cls is not None
            host.previews.append(image)
            self.values = [{"filename": f"{i}.png"} for i in range(len(image))]

        def as_dict(self):
            return {"images": self.values, "animated": (False,)}

    class PreviewText:
        def __init__(self, value):
            assert isinstance(value, str)
            host.texts.append(value)

    class PreviewVideo:
        def __init__(self, values):
            host.previews += values

    class VideoFromComponents:
        def __init__(self, components):
            self.components = components

        def get_components(self):
            return self.components

    class VideoFromFile:
        def __init__(self, file):
            self.file = file

        def get_stream_source(self):
            return self.file

        def get_components(self):
            raise NotImplementedError

    class ComfyExtension:
        async def get_node_list(self):
            raise NotImplementedError

    return {
        "io": io,
        "ui": types.SimpleNamespace(
            PreviewImage=PreviewImage,
            PreviewText=PreviewText,
            PreviewVideo=PreviewVideo,
            SavedResult=lambda file, subfolder, kind: {"filename": file, "type": kind},
        ),
        "InputImpl": types.SimpleNamespace(
            VideoFromComponents=VideoFromComponents, VideoFromFile=VideoFromFile
        ),
        "ComfyExtension": ComfyExtension,
    }


# comfy.*


def _model_management(host: Host):
    def throw_exception_if_processing_interrupted():
        if host.interrupt_after is not None and len(host.progress) >= host.interrupt_after:
            raise Interrupted

    def load_models_gpu(models, memory_required=0):
        host.loaded.extend(models)
        host.resident = list(models)

    cpu = torch.device("cpu")
    return {
        "InterruptProcessingException": Interrupted,
        "free_memory": lambda need, device: [],
        "get_torch_device": lambda: cpu,
        "intermediate_device": lambda: cpu,
        "unet_offload_device": lambda: cpu,
        "unet_dtype": lambda model_params=0, supported_dtypes=(): torch.float32,
        "unet_manual_cast": lambda dtype, device, supported_dtypes=(): None,
        "load_models_gpu": load_models_gpu,
        "get_free_memory": lambda device: 2**32,
        "throw_exception_if_processing_interrupted": throw_exception_if_processing_interrupted,
    }


def _utils(host: Host):
    class ProgressBar:
        def __init__(self, total, node_id=None):
            self.total = total

        def update_absolute(self, value, total=None, preview=None):
            host.progress.append((value, total or self.total, preview))

    return {"ProgressBar": ProgressBar}


class LatentFormat:
    scale_factor, latent_channels, latent_rgb_factors = 1.0, 4, None


class CastWeightBiasOp:
    comfy_cast_weights = False


class BASE:
    manual_cast_dtype = None
    unet_config: dict = {}
    sampling_settings: dict = {}
    latent_format = LatentFormat

    def __init__(self, unet_config):
        self.unet_config = dict(unet_config)
        self.latent_format = self.latent_format()

    def set_inference_dtype(self, dtype, manual_cast_dtype):
        self.unet_config["dtype"], self.manual_cast_dtype = dtype, manual_cast_dtype


class BaseModel(torch.nn.Module):
    def __init__(self, model_config, model_type=None, device=None):
        super().__init__()
        assert model_config.unet_config.get("disable_unet_model_creation")
        self.model_config, self.manual_cast_dtype = model_config, model_config.manual_cast_dtype
        levels = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64).neg().add(1).cumprod(0)
        self.model_sampling = types.SimpleNamespace(sigmas=(1 / levels - 1).sqrt().float())

    def get_dtype(self):
        return self.diffusion_model.dtype


@dataclass
class ModelPatcher:
    model: Any
    load_device: Any
    offload_device: Any
    post_cfg: tuple = ()

    def clone(self):
        return replace(self)

    def set_model_sampler_post_cfg_function(self, function):
        self.post_cfg += (function,)

    def get_model_object(self, name):
        return getattr(self.model, name)


class CONDRegular:
    def __init__(self, cond):
        self.cond = cond


class CONDNoiseShape(CONDRegular):
    pass


class CONDList(CONDRegular):
    pass


def _prompt_server(host: Host):
    def send_progress_text(text, node_id):
        host.said.append((text, node_id))

    instance = types.SimpleNamespace(send_progress_text=send_progress_text)
    return types.SimpleNamespace(instance=instance)


def _folder_paths(host: Host):
    names: dict = {}

    def add_model_folder_path(name, path, is_default=False):
        names.setdefault(name, ([], set()))[0].append(path)

    def get_filename_list(name):
        folders, extensions = names[name]
        files = [f for d in folders if os.path.isdir(d) for f in os.listdir(d)]
        return sorted(f for f in files if os.path.splitext(f)[1] in extensions)

    def get_full_path(name, file):
        found = [os.path.join(d, file) for d in names[name][0] if os.path.isfile(os.path.join(d, file))]
        return found[0] if found else None

    def get_save_image_path(prefix, output_dir, image_width=0, image_height=0):
        folder, name = os.path.split(os.path.join(output_dir, prefix))
        os.makedirs(folder, exist_ok=True)
        numbers = [f[len(name) + 1 :].split("_")[0] for f in os.listdir(folder) if f.startswith(name + "_")]
        counter = max([int(n) for n in numbers if n.isdigit()], default=0) + 1
        return folder, name, counter, os.path.dirname(prefix), prefix

    return {
        "get_save_image_path": get_save_image_path,
        "get_input_directory": lambda: str(host.folder / "input"),
        "get_output_directory": lambda: str(host.folder / "output"),
        "get_temp_directory": lambda: str(host.folder / "temp"),
        "get_folder_paths": lambda name: list(names[name][0]),
        "models_dir": str(host.folder / "models"),
        "folder_names_and_paths": names,
        "add_model_folder_path": add_model_folder_path,
        "get_filename_list": get_filename_list,
        "get_full_path": get_full_path,
    }


def install(monkeypatch, folder: Path) -> Host:
    """Put the double into sys.modules for one test."""
    host = Host(folder)
    (folder / "models" / "face_rig").mkdir(parents=True)
    (folder / "input").mkdir()
    modules = {
        "comfy_api": {},
        "comfy_api.latest": _api(host),
        "comfy": {},
        "comfy.conds": {
            "CONDRegular": CONDRegular,
            "CONDNoiseShape": CONDNoiseShape,
            "CONDList": CONDList,
        },
        "comfy.latent_formats": {"LatentFormat": LatentFormat},
        "comfy.model_base": {"BaseModel": BaseModel, "ModelType": types.SimpleNamespace(EPS=1)},
        "comfy.model_management": _model_management(host),
        "comfy.model_patcher": {"ModelPatcher": ModelPatcher},
        "comfy.ops": {"CastWeightBiasOp": CastWeightBiasOp, "disable_weight_init": torch.nn},
        "comfy.supported_models_base": {"BASE": BASE},
        "comfy.utils": _utils(host),
        "folder_paths": _folder_paths(host),
        "server": {"PromptServer": _prompt_server(host)},
    }
    for name, members in modules.items():
        module = types.ModuleType(name)
        vars(module).update(members)
        monkeypatch.setitem(sys.modules, name, module)
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(sys.modules[parent], child, module)
    return host


@contextlib.contextmanager
def only_what_was_loaded(host: Host, *patchers):
    """Within, calling one of these networks that the latest load did not ask for is an error.

    So it is on a device with little memory, or with --disable-smart-memory. Gives back whose networks were
    called, in order.
    """
    owner = {m: p for p in patchers for m in p.model.modules()}
    called = []

    def look(module, inputs):
        patcher = owner.get(module)
        assert patcher is None or patcher in host.resident, f"{type(patcher.model).__name__} is not loaded"
        if patcher is not None and patcher not in called[-1:]:
            called.append(patcher)

    hook = torch.nn.modules.module.register_module_forward_pre_hook(look)
    try:
        yield called
    finally:
        hook.remove()


def load_pack(monkeypatch):
    """The pack's extension, loaded as the host loads it: the folder's path is the module's name."""
    name = str(ROOT).replace(".", "_x_")
    spec = importlib.util.spec_from_file_location(
        name, ROOT / "__init__.py", submodule_search_locations=[str(ROOT)]
    )
    for old in [m for m in sys.modules if m == name or m.startswith(name + ".")]:
        monkeypatch.delitem(sys.modules, old)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, module)
    spec.loader.exec_module(module)
    return module, module.comfy_entrypoint()


def nodes_by_id(nodes) -> dict:
    """node_id -> class, after the host's check of a schema: ids unique over inputs and outputs together."""
    found = {}
    for node in nodes:
        schema = node.define_schema()
        ids = [i.id for i in schema.inputs] + [o.id for o in schema.outputs if o.id]
        double = [k for k, n in Counter(ids).items() if n > 1]
        assert not double, f"{schema.node_id}: {double} twice"
        assert schema.node_id not in found
        found[schema.node_id] = node
    return found
