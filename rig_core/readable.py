"""Lights and face codes as JSON that a person can read, edit and share, and back without loss.

One object a file: "format", "version", "convention", then the data. Numbers have as many digits as a float32
needs to come back exactly. Reading executes nothing, ignores keys that it does not know (a note, say), and
refuses with the name of the field what is no light and no face.
"""

from __future__ import annotations

import json

import numpy as np
import torch
from torch import Tensor

from . import sh
from .face import FaceCode

LIGHT, FACE, VERSION = "face-rig light", "face-rig face", 1
TERMS = ("1", "x", "y", "z", "xy", "xz", "yz", "x2-y2", "3z2-1")
HEADS = ("flame", "open")
LARGEST = 1e6  # of any number: a light is some 4, a crop some 10,000
SIDE = 65536  # px, the largest side of a picture
LIGHT_CONVENTION = (
    "DECA's spherical harmonics with DECA's constants, in display space; x to the right of the picture, "
    "y up, z to the viewer; each term: red, green, blue"
)
FACE_CONVENTION = (
    "DECA's layout. pose: rotation of the head and of the jaw (radians, axis-angle; x to the right of the "
    "picture, y up, z to the viewer), then gaze where the head has it (yaw, pitch); cam: scale, x, y; crop: "
    "photo pixels to pixels of the 224 crop. light: " + LIGHT_CONVENTION
)
FIELDS = ("shape", "tex", "exp", "pose", "cam")


def light_json(light: Tensor) -> str:
    """Lights [B,9,3] as JSON. Raises ValueError for NaN and what is too large to be a light."""
    sh.check_light(light)
    return _text(LIGHT, LIGHT_CONVENTION, {"lights": [_terms(v) for v in light]})


def read_light(text: str) -> Tensor:
    """The inverse of `light_json`: [B,9,3] float32. Raises ValueError with the field that is wrong."""
    lights = _entries(_parse(text, LIGHT), "lights")
    return torch.stack([_read_terms(v, f"'lights' {i + 1}") for i, v in enumerate(lights)])


def face_json(code: FaceCode) -> str:
    """Face codes as JSON. Raises ValueError for NaN and what is too large to be a face."""
    faces = [
        {n: _numbers(getattr(code, n)[i], n) for n in FIELDS}
        | {"light": _terms(code.light[i]), "crop": [_numbers(row, "crop") for row in code.crop[i]]}
        for i in range(len(code))
    ]
    size = {"height": code.size[0], "width": code.size[1]}
    return _text(FACE, FACE_CONVENTION, {"head": code.head, "size": size, "faces": faces})


def read_face(text: str, head=None) -> FaceCode:
    """The inverse of `face_json`. head: the HeadModel that the code has to fit, where it is known.

    Raises ValueError with the field that is wrong, and for the code of another head.
    """
    data = _parse(text, FACE)
    name, size = _field(data, "head", "the file"), _field(data, "size", "the file")
    if name not in HEADS:
        raise ValueError(f"'head' must be {' or '.join(HEADS)}, found {_shown(name)}")
    if head is not None and name != head.name:
        raise ValueError(
            f"'head' is '{name}', expected '{head.name}' as 'face_model' has: load the one it was made with"
        )
    sides = [_field(size, side, "'size'") for side in ("height", "width")]
    for side, v in zip(("height", "width"), sides):
        if type(v) is not int or not 1 <= v <= SIDE:
            raise ValueError(f"'size', '{side}' must be a whole number of pixels, found {_shown(v)}")
    faces = _entries(data, "faces")
    lengths = {n: None if head is None else getattr(head.sizes, n, 3) for n in FIELDS} | {"cam": 3}
    rows: dict[str, list] = {n: [] for n in (*FIELDS, "light", "crop")}
    for i, face in enumerate(faces):
        where = f"'faces' {i + 1}"
        for n in FIELDS:
            v = _vector(_field(face, n, where), f"{where}, '{n}'", lengths[n])
            lengths[n] = len(v)  # all faces are of one head
            rows[n].append(v)
        rows["light"].append(_read_terms(_field(face, "light", where), f"{where}, 'light'"))
        rows["crop"].append(_crop(_field(face, "crop", where), f"{where}, 'crop'"))
        if rows["cam"][-1][0] <= 0:
            raise ValueError(f"{where}, 'cam' must begin with a scale above 0")
        if lengths["pose"] < 6:
            raise ValueError(f"{where}, 'pose' must be at least 6 numbers, found {lengths['pose']}")
    return FaceCode(**{n: torch.stack(v) for n, v in rows.items()}, size=tuple(sides), head=name)


def _text(kind: str, convention: str, data: dict) -> str:
    """The object with short lists on one line each, as a person would write it."""
    whole = {"format": kind, "version": VERSION, "convention": convention, **data}
    return _layout(whole, "") + "\n"


def _layout(value, indent: str) -> str:
    deeper = indent + "  "
    if isinstance(value, dict):
        rows = [f"{deeper}{json.dumps(k)}: {_layout(v, deeper)}" for k, v in value.items()]
        return "{\n" + ",\n".join(rows) + f"\n{indent}}}"
    if isinstance(value, list) and any(isinstance(v, (dict, list)) for v in value):
        return "[\n" + ",\n".join(deeper + _layout(v, deeper) for v in value) + f"\n{indent}]"
    return json.dumps(value)


def _numbers(values: Tensor, name: str) -> list[float]:
    """float32 values with as few digits as bring them back exactly (9 always do)."""
    values = values.detach().cpu().float()
    if not (values.abs() <= LARGEST).all():  # NaN, too
        raise ValueError(f"'{name}' holds NaN or a number beyond {LARGEST:.0f}: that cannot be saved")
    exact = values.tolist()
    short = [float(f"{v:.7g}") for v in exact]
    enough = np.array(short, np.float32) == values.numpy()
    return [s if e else float(f"{v:.9g}") for s, e, v in zip(short, enough, exact)]


def _terms(light: Tensor) -> dict:
    return {term: _numbers(row, "light") for term, row in zip(TERMS, light)}


def _parse(text: str, kind: str) -> dict:
    def refuse(number: str):
        raise ValueError(f"holds {number}, which is no number to work with")

    try:
        data = json.loads(text, parse_constant=refuse)
    except (ValueError, RecursionError) as e:
        raise ValueError(f"this is no JSON of a {kind.split()[1]}: {e}") from e
    found = data.get("format") if isinstance(data, dict) else None
    if found != kind:
        other = {LIGHT: "Load Light", FACE: "Load Face"}.get(found if isinstance(found, str) else None)
        hint = f": use {other}" if other else ""
        raise ValueError(f"'format' must be \"{kind}\", found {_shown(found)}{hint}")
    version = _field(data, "version", "the file")
    if version != VERSION:
        raise ValueError(f"'version' is {_shown(version)}, this Face Rig reads {VERSION}: update it")
    return data


def _shown(value) -> str:
    """The beginning of a value, which may be long, as JSON."""
    text = ""
    for piece in json.JSONEncoder().iterencode(value):
        text += piece[:41]
        if len(text) > 40:
            return text[:37] + "..."
    return text


def _field(data, name: str, where: str):
    if not isinstance(data, dict):
        raise ValueError(f'{where} must be an object {{"{name}": ...}}, found {_shown(data)}')
    if name not in data:
        raise ValueError(f"{where} has no '{name}'")
    return data[name]


def _entries(data: dict, name: str) -> list:
    entries = _field(data, name, "the file")
    if not isinstance(entries, list) or not entries:
        raise ValueError(f"'{name}' must be a list with at least one entry, found {_shown(entries)}")
    return entries


def _vector(values, where: str, length: int | None = None) -> Tensor:
    """A list of numbers as a tensor. Raises ValueError for another length, other things, huge numbers."""
    want = "a list of numbers" if length is None else f"{length} numbers"
    if not isinstance(values, list) or not values or len(values) != (length or len(values)):
        found = f"{len(values)}" if isinstance(values, list) else _shown(values)
        raise ValueError(f"{where} must be {want}, found {found}")
    for i, v in enumerate(values):
        if isinstance(v, bool) or not isinstance(v, (int, float)) or not -LARGEST <= v <= LARGEST:
            raise ValueError(f"{where}, number {i + 1} must be within {LARGEST:.0f} of 0, found {_shown(v)}")
    return torch.tensor(values, dtype=torch.float32)


def _read_terms(light, where: str) -> Tensor:
    rows = [_vector(_field(light, t, where), f"{where}, '{t}'", 3) for t in TERMS]
    return torch.stack(rows)


def _crop(rows, where: str) -> Tensor:
    """An affine matrix [3,3] that can be undone."""
    if not isinstance(rows, list) or len(rows) != 3:
        raise ValueError(f"{where} must be 3 rows of 3 numbers, found {_shown(rows)}")
    m = torch.stack([_vector(row, f"{where}, row {i + 1}", 3) for i, row in enumerate(rows)])
    if m[2].tolist() != [0, 0, 1]:
        raise ValueError(f"{where}, row 3 must be 0, 0, 1, found {_shown(rows[2])}")
    if float(m[0, 0] * m[1, 1] - m[0, 1] * m[1, 0]) == 0:
        raise ValueError(f"{where} must not flatten the picture: its determinant is 0")
    return m
