"""Every file that Face Rig can use: how it is recognised, who takes it, where it comes from, its licence.

Recognised by the structure of the contents (see outline), never by the name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from .checkpoints import architecture, match
from .data import FIELDS
from .denoisers.relight import DiFaReli, RelightConfig
from .denoisers.rig import DiffusionRig, RigConfig
from .estimators.deca import DECA
from .estimators.identity import ArcFace, ArcFaceConfig
from .estimators.parsing import BiSeNet
from .estimators.shadow import SemanticEncoder, ShadowNet
from .flame_files import NAMES
from .outline import FAULTS, Outline

RIG = "https://github.com/adobe-research/diffusion-rig"
DIFARELI = "https://github.com/diffusion-face-relighting/difareli_code"
DECA_PAGE = "https://github.com/yfeng95/DECA"
FLAME = "https://flame.is.tue.mpg.de"
HEAD = {"v_template", "shapedirs", "posedirs", "J_regressor", "weights", "f", "kintree_table"}
RESEARCH_ONLY = "non-commercial research, education and art only (Max Planck's licence)"


@dataclass(frozen=True)
class Known:
    """A kind of file.

    signs: places in its tree, parts joined by "/", and the shape there (None: any, also within a shape);
    lacks: places that must not be there; kind: in the metadata of our own .safetensors, also of a converted
    one; looks(tree): what else tells it apart. published: its name where it comes from, "" for our own;
    named: the names that it is looked for by, empty for any; alone: it may have any when it is chosen itself.
    check(tree, meta) says what it is in detail, ValueError what it lacks.
    """

    name: str
    what: str
    node: str = ""
    kind: str = ""
    signs: dict[str, tuple | None] = field(default_factory=dict)
    lacks: tuple[str, ...] = ()
    looks: Callable[[dict], bool] | None = None
    published: str = ""
    source: str = ""
    licence: str = ""
    named: tuple[str, ...] = ()
    alone: bool = False
    check: Callable[[dict, dict], str] | None = None


def _millions(tensors: Iterable[Tensor]) -> str:
    return f"{sum(v.numel() for v in tensors if v.is_floating_point()) / 1e6:.1f} million weights"


def _rig(tree: dict, meta: dict) -> str:
    tree = {k: v for k, v in tree.items() if not k.startswith("meta.")}
    config = architecture(DiffusionRig, RigConfig, tree, meta)[1]
    head = meta.get("head", "flame")
    stage = "personal model (stage 2), " if meta.get("stage") == 2 else ""
    return f"{stage}{config.image_size} px, {_millions(tree.values())}, for the {head} head"


def _adapters(tree: dict, meta: dict) -> str:
    base = meta.get("base") or "the model of the pack"
    return f"adapters of a personal model for {base}, {_millions(tree.values())}"


def _relight(tree: dict, meta: dict) -> str:
    config = architecture(DiFaReli, RelightConfig, tree, meta)[1]
    return f"{config.image_size} px, {_millions(tree.values())}, for the {meta.get('head', 'flame')} head"


def _relight_unet(tree: dict, meta: dict) -> str:
    tree = {f"ImgCond.{k}": v for k, v in tree.items()}
    config = RelightConfig.from_state_dict(tree)
    with torch.device("meta"):
        wanted = DiFaReli(config).state_dict()
    match({k: v for k, v in wanted.items() if k.startswith("ImgCond.")}, tree)
    return f"{config.image_size} px, {_millions(tree.values())}"


def _weights(tree: dict, meta: dict) -> str:
    return _millions(v for v in tree.values() if isinstance(v, Tensor))


def _bare(tree: dict) -> dict:
    """Without what a network is wrapped in."""
    return {k.removeprefix("model.").removeprefix("module."): v for k, v in tree.items()}


def _identity(tree: dict, meta: dict) -> str:
    tree = _bare(tree)
    config = ArcFaceConfig.from_state_dict(tree)
    with torch.device("meta"):
        wanted = ArcFace(config).state_dict()
    match(wanted, {k: v for k, v in wanted.items() if k.endswith(".num_batches_tracked")} | tree)
    return f"{config.size} px, {config.embedding} numbers a face, {_millions(tree.values())}"


def _network(model_type: type, prefix: str = "") -> Callable[[dict, dict], str]:
    """A check for networks of one architecture, whose weights are at prefix."""

    def check(tree: dict, meta: dict) -> str:
        entry, _, start = prefix.rpartition("/")
        found = tree.get(entry, tree)
        found = {k.removeprefix(start): v for k, v in found.items() if k.startswith(start)}
        with torch.device("meta"):
            wanted = model_type().state_dict()
        match(wanted, found)
        return _millions(found.values())

    return check


def _flame(tree: dict, meta: dict) -> str:
    lacking = sorted(HEAD - tree.keys())
    if lacking:
        raise ValueError(f"{', '.join(lacking)} missing")
    also = [what for what in ("texture", "mask") if any(k.startswith(what) for k in tree)]
    return ", with ".join([f"{len(tree['v_template'])} vertices, {len(tree['f'])} faces", *also])


def _masks(tree: dict, meta: dict) -> str:
    return f"{len(tree)} regions of the head"


def _lists_faces(tree: dict) -> bool:
    """Of the masks: a face is listed once for each vertex in the region, a vertex once."""
    return len(tree["face"].unique()) < len(tree["face"])


def _shows_skin(tree: dict) -> bool:
    """A picture over FLAME's texture coordinates: the face white, its eyes holes, the rest black."""
    if tree["pixels"].is_meta or tree["pixels"].shape[0] != tree["pixels"].shape[1]:
        return False
    two = ((tree["pixels"] < 32) | (tree["pixels"] > 223)).float().mean() > 0.9
    black = F.interpolate(tree["pixels"][None, None] / 255.0, (64, 64), mode="area") < 0.5
    outside = F.pad(torch.zeros(1, 1, 62, 62), (1, 1, 1, 1), value=1.0)
    for _ in range(64):  # what black can be reached from the rim
        outside = F.max_pool2d(outside, 3, 1, 1) * black
    holes = black & (outside == 0)
    return bool(two and holes.any() and holes.float().mean() < 0.1)


# fmt: off
KNOWN = (
    Known(
        "rig", "DiffusionRig denoiser", "Load DiffusionRig", "diffusion_rig", published="model*.pt",
        signs={"denoisingUNet.time_embed.0.weight": None, "encoder.conv1.weight": None},
        source=f"{RIG}, the stage 1 model of its README; personal ones are trained from it",
        licence="non-commercial research only (Adobe Research License)", check=_rig,
    ),
    Known("own rig", "DiffusionRig denoiser", "Load DiffusionRig", "diffusion_rig", check=_rig),
    Known("lora", "personal DiffusionRig", "Load DiffusionRig", "diffusion_rig_lora", check=_adapters),
    Known(
        "difareli", "DiFaReli denoiser with its Modulator", "Load DiFaReli", "difareli",
        signs={"ImgCond.time_embed.0.weight": None, "ImgEncoder.input_blocks.0.0.weight": None},
        source=f"{DIFARELI}, difareli_256 or difareli_128 of its README, converted",
        licence="code MIT; nothing is said about the weights: ask before paid work", check=_relight,
    ),
    Known(
        "own difareli", "DiFaReli denoiser with its Modulator", "Load DiFaReli", "difareli", check=_relight
    ),
    Known(
        "difareli unet", "DiFaReli denoiser", "Load DiFaReli", published="ImgCond_*.pt",
        signs={"time_embed.0.weight": None, "input_blocks.1.1.cond_proj_layers.0.weight": None},
        source=f"{DIFARELI}, difareli_256 or difareli_128 of its README",
        licence="code MIT; nothing is said about the weights: ask before paid work",
        check=_relight_unet,
    ),
    Known(
        "difareli modulator", "DiFaReli's Modulator", "Load DiFaReli", published="ImgEncoder_*.pt",
        signs={"input_blocks.0.0.weight": (None, 6, 3, 3), "middle_block.2.out_layers.3.weight": None},
        lacks=("time_embed.0.weight",), named=("ImgEncoder_*.pt",), alone=True,
        source=f"{DIFARELI}, beside ImgCond_*.pt of the same step",
        licence="code MIT; nothing is said about the weights: ask before paid work", check=_weights,
    ),
    Known(
        "deca", "DECA's estimator of face codes", "Load Face Model", "deca", published="deca_model.tar",
        signs={"E_flame/encoder.conv1.weight": None, "E_flame/layers.2.weight": (236, None)},
        source=f"{DECA_PAGE}, the released model of its README", licence=RESEARCH_ONLY,
        named=NAMES["encoder"], alone=True,
        check=_network(DECA, "E_flame/"),
    ),
    Known(
        "flame", "FLAME head model", "Load Face Model", published="generic_model.pkl",
        signs={"v_template": (None, 3), "shapedirs": None, "posedirs": None, "f": None},
        lacks=("uv",),
        source=f"{FLAME} (register): FLAME 2020, as DECA was trained with it, or FLAME 2023",
        licence="research only, registration; FLAME 2023 Open: CC BY 4.0",
        named=NAMES["model"], alone=True, check=_flame,
    ),
    Known(
        "flame set", "FLAME head model with all its parts", "Load Face Model", "flame",
        signs={"v_template": (None, 3), "shapedirs": None, "static_lmk_faces_idx": None, "uv": None},
        source=f"{FLAME} and {DECA_PAGE}, converted", licence=RESEARCH_ONLY, alone=True, check=_flame,
    ),
    Known(
        "texture", "FLAME texture space", "Load Face Model", published="FLAME_texture.npz",
        signs={"mean": (None, None, 3), "tex_dir": (None, None, 3, None)},
        source=f"{FLAME} (register): FLAME texture space", licence="CC BY-NC-SA 4.0, registration",
        named=("FLAME_texture.npz",),
    ),
    Known(
        "texture bfm", "FLAME albedo from the Basel Face Model", "Load Face Model",
        published="FLAME_albedo_from_BFM.npz", signs={"MU": None, "PC": None},
        source="https://github.com/TimoBolkart/BFM_to_FLAME makes it from the Basel Face Model 2017",
        licence="non-commercial research only (the Basel Face Model's)",
        named=("FLAME_albedo_from_BFM.npz",),
    ),
    Known(
        "embedding", "DECA's 68 landmarks on FLAME", "Load Face Model", published="landmark_embedding.npy",
        signs={"static_lmk_faces_idx": None, "dynamic_lmk_bary_coords": None, "full_lmk_faces_idx": None},
        lacks=("v_template",), source=f"{DECA_PAGE}, folder data", licence=RESEARCH_ONLY,
        named=NAMES["landmarks"],
    ),
    Known(
        "template", "FLAME's mesh with texture coordinates", "Load Face Model", published="head_template.obj",
        signs={"v": (5023, 3), "f": (9976, 3)}, named=NAMES["template"],
        source=f"{DECA_PAGE}, folder data", licence=RESEARCH_ONLY,
    ),
    Known(
        "masks", "FLAME's vertex masks", "Load Face Model", published="FLAME_masks.pkl",
        signs={"face": (None,), "scalp": (None,), "neck": (None,)}, named=NAMES["masks"],
        looks=lambda tree: not _lists_faces(tree), check=_masks,
        source=f"{FLAME} (register): FLAME Vertex Masks", licence="research only, registration",
    ),
    Known("face masks", "FLAME's masks of faces, not needed: FLAME_masks.pkl is", looks=_lists_faces,
        signs={"face": (None,), "scalp": (None,), "neck": (None,)},
    ),
    Known(
        "skin", "mask of FLAME's skin", "Load Face Model", published="uv_face_mask.png",
        signs={"pixels": (None, None)}, looks=_shows_skin, named=NAMES["skin"],
        source=f"{DECA_PAGE}, folder data", licence=RESEARCH_ONLY,
    ),
    Known(
        "arcface", "ArcFace identity encoder", "Load Identity Encoder", "identity",
        published="BEST_checkpoint_r18.tar",
        looks=lambda tree: {"conv1.weight", "fc.weight", "bn3.bias"} <= _bare(tree).keys(),
        source="https://github.com/foamliu/InsightFace-v2, release v1.0",
        licence="code Apache-2.0; trained on MS-Celeb-1M, which was for research only", check=_identity,
    ),
    Known("identity", "identity encoder", "Load Identity Encoder", "identity", check=_identity),
    Known(
        "diffae", "DiffAE, whose encoder judges cast shadows", "Load Shadow Estimator", published="last.ckpt",
        signs={"state_dict/ema_model.encoder.input_blocks.0.0.weight": (None, 3, 3, 3)},
        source="https://github.com/phizaz/diffae, ffhq256_autoenc (DiffAE, autoencoding only, FFHQ256)",
        licence="MIT",
        check=_network(SemanticEncoder, "state_dict/ema_model.encoder."),
    ),
    Known(
        "shadow classifier", "DiFaReli's shadow classifier", "Load Shadow Estimator",
        published="shadow_cls_weight.pkl", signs={"weight": (1, 512)}, lacks=("state_dict",),
        source=f"{DIFARELI}, preprocess_scripts/Relighting_preprocessing_tools/diffae",
        licence="MIT (its repository's)", named=("shadow_cls_weight.pkl",),
    ),
    Known(
        "diffae set", "DiffAE's encoder with DiFaReli's shadow classifier", "Load Shadow Estimator",
        "diffae_shadow", source="https://github.com/phizaz/diffae, converted", licence="MIT",
        check=_network(SemanticEncoder, "ema_model.encoder."),
    ),
    Known(
        "shadow", "estimator of cast shadows", "Load Shadow Estimator", "shadow", check=_network(ShadowNet)
    ),
    Known(
        "bisenet", "BiSeNet face parser", "Load Face Parser", "bisenet", published="79999_iter.pth",
        signs={"cp.resnet.conv1.weight": None, "conv_out.conv_out.weight": (19, None, None, None)},
        source="Load Face Parser fetches it, or https://github.com/zllrunning/face-parsing.PyTorch (README)",
        licence="code MIT; trained on CelebAMask-HQ, non-commercial research only", check=_network(BiSeNet),
    ),
    Known("head", "open head", "Load Face Model", "open_head"),
    Known("landmarks", "face finder and landmark network of the pack", "", "landmarks"),
    Known("state", "state of a training run, for --resume", "", "training state"),
    Known("album", "part of a dataset for training", signs=dict.fromkeys(FIELDS)),
)
# fmt: on
BY_NAME = {k.name: k for k in KNOWN}


@dataclass(frozen=True)
class Use:
    """Something that takes several files. needs, and what is better to have: names in KNOWN, for each the
    alternatives, best first; parts: other uses before it that it needs; together: all within one folder."""

    what: str
    needs: tuple[tuple[str, ...], ...]
    wants: tuple[tuple[str, ...], ...] = ()
    parts: tuple[str, ...] = ()
    together: bool = False


USES = (
    Use(
        "DECA and FLAME face model",
        needs=(("deca",), ("flame", "flame set"), ("embedding", "flame set"), ("template", "flame set")),
        together=True,
        wants=(("texture", "texture bfm", "flame set"), ("masks", "flame set"), ("skin", "flame set")),
    ),
    Use("official identity encoder", needs=(("arcface",),)),
    Use(
        "official shadow estimator",
        needs=(("diffae", "diffae set"), ("shadow classifier", "diffae set")),
    ),
    Use("face parser", needs=(("bisenet",),)),
    Use("DiffusionRig as published", needs=(("rig",),), parts=("DECA and FLAME face model",)),
    Use(
        "DiFaReli as published",
        needs=(("difareli unet", "difareli"), ("difareli modulator", "difareli")),
        parts=("DECA and FLAME face model", "official identity encoder"),
        wants=(("diffae", "diffae set"), ("bisenet",)),
    ),
)


def recognise(found: Outline) -> Known | None:
    """What a file with this structure is, None if none of `KNOWN`."""
    kind = found.meta.get("kind")
    if isinstance(kind, str):
        same = [k for k in KNOWN if k.kind == kind]
        converted = "converted" in found.meta
        return next((k for k in same if bool(k.source) == converted), same[0] if same else None)
    return next((k for k in KNOWN if (k.signs or k.looks) and _is(k, found.tree)), None)


def _is(known: Known, tree: dict) -> bool:
    there = all(_fits(_at(tree, place), shape) for place, shape in known.signs.items())
    if not there or any(_at(tree, place) is not None for place in known.lacks):
        return False
    try:
        return known.looks is None or known.looks(tree)
    except FAULTS:  # things of other types under the same names
        return False


def _at(tree, place: str):
    for name in place.split("/"):
        tree = tree.get(name) if isinstance(tree, dict) else None
    return tree


def _fits(value, shape: tuple | None) -> bool:
    if shape is None or value is None:
        return value is not None
    have = tuple(getattr(value, "shape", ()))
    return len(have) == len(shape) and all(w in (None, h) for h, w in zip(have, shape))
