"""A fitted face as a small file that a page can pose and draw by itself (`web/js/head.js`).

It holds what `pipeline.turn` and `HeadModel.verts` need for the sliders of Edit Face, in few bytes: the
posed vertices follow them to within the rounding.
"""

from __future__ import annotations

import json
import weakref
import zlib
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from . import buffers
from .expressions import EXPRESSIONS, shapes
from .face import FaceCode, axis_angle_to_matrix

FORMAT = 1
ROOM = 1.25  # side of the frame in pictures of an aligned face: room to turn
STILL = 2e-4  # metres: a shape that moves a vertex by less leaves it alone
GREY = 0.65  # albedo of a head without a texture
ROUNDS, COARSE, SHORT = 3, 0.06, 1.2e-3  # edges are split where their colour is so far off, down to metres
MOST = 2**16  # vertices that the faces can count
# a face whose first n edges are split, in corners 0 1 2 and the middles 3 4 5 of the edges that follow them
PARTS = {
    1: ((0, 3, 2), (3, 1, 2)),
    2: ((3, 1, 4), (0, 3, 4), (0, 4, 2)),
    3: ((0, 3, 5), (3, 1, 4), (5, 4, 2), (3, 4, 5)),
}
_meshes: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()  # head -> _Mesh


@dataclass(frozen=True)
class _Mesh:
    """A head made finer where its colours change, on the CPU. faces [F',3]; uv [V',2] of each vertex.

    The head's own vertices come first; pairs: a list of [N,2], the next ones are the middles of two earlier.
    """

    faces: Tensor
    uv: Tensor
    pairs: list[Tensor]

    def of(self, values: Tensor) -> Tensor:
        """Values at the head's vertices [V,...] -> at all [V',...]."""
        values = values.cpu()
        for pair in self.pairs:
            values = torch.cat([values, values[pair].mean(1)])
        return values


@dataclass(frozen=True)
class _Rig:
    """What moves a head, at one code. Joints and the pivot are [3], fields [V,3].

    rest [V,3]: vertices before jaw, gaze and global rotation. The jaw turns weight [V] of a vertex about
    joint; sin, cos: what it adds per sin(x) and cos(x) - 1 of its angle, before its turn (`early`) or after.
    lids [4,V,3] for gaze up, down, right, left, per radian; eyes [2,V] turn about centres [2,3].
    """

    rest: Tensor
    pivot: Tensor
    joint: Tensor
    weight: Tensor
    sin: Tensor
    cos: Tensor | None
    early: bool
    lids: Tensor | None = None
    eyes: Tensor | None = None
    centres: Tensor | None = None


def pack(head, code: FaceCode) -> bytes:
    """The first face of a code as a file for the page, some 200 KB.

    zlib of: the length of the header (4 bytes, little-endian), the header (JSON), the arrays. The header:
    format: 1; head: its name; sliders: the names in EXPRESSIONS that the head has shapes for;
    camera: a b c d e f, x' = a x + b y + c and y' = d x + e y + f take metres to a square around the fitted
    face, -1..1, y down; pose: the code's own, radians; light: the 27 coefficients, row by row;
    pivot, joint (of the jaw), centres (of the eyeballs): metres; early: see `_Rig`; arrays: name -> type,
    shape, offset, scale and origin of each, value = stored * scale + origin. A "field" holds one bit a
    vertex, first the high ones, then int8 x y z for those that are set.
    Raises ValueError when the code belongs to another head, and for a head of more than MOST vertices.
    """
    code = code[0]
    code.require_head(head)
    rig, mesh = (_open if head.name == "open" else _flame)(head, code), _mesh(head)
    out = _Writer()
    out.integers("rest", mesh.of(rig.rest), "int16")
    out.integers("faces", mesh.faces, "uint16", 1)
    out.integers("albedo", _look_up(_texture(head, code), mesh.uv), "uint8", 1 / 255)
    out.integers("jaw", mesh.of(rig.weight), "uint8", 1 / 255)
    out.field("sin", mesh.of(rig.sin))
    if rig.cos is not None:
        out.field("cos", mesh.of(rig.cos))
    if rig.eyes is not None:
        out.integers("eyes", mesh.of(rig.eyes[0] + 2 * rig.eyes[1]), "uint8", 1)
        for name, lid in zip(("up", "down", "right", "left"), rig.lids):
            out.field(f"lids.{name}", mesh.of(lid))
    moves = _slider_fields(head)
    for name, field in moves.items():
        out.field(f"slider.{name}", mesh.of(field))
    if head.name == "flame":
        out.floats("centre", _centre_weights(head))
    return out.result(
        {
            "format": FORMAT,
            "head": head.name,
            "sliders": list(moves),
            "camera": _camera(head, code),
            "pose": _list(code.pose[0]),
            "light": _list(code.light[0].flatten()),
            "pivot": _list(rig.pivot),
            "joint": _list(rig.joint),
            "centres": [] if rig.centres is None else [_list(c) for c in rig.centres],
            "early": rig.early,
        }
    )


def _slider_fields(head) -> dict[str, Tensor]:
    """name -> offsets [V,3] at 1, of the sliders whose shapes the head has."""
    names = head.expression_names
    known = [k for k, (_, needed) in EXPRESSIONS.items() if set(needed) <= set(names)]
    exp = head.expressions.new_zeros(len(known) + 1, head.sizes.exp)  # the last is the neutral face
    for row, slider in zip(exp, known):
        for name, weight in shapes(names, {slider: 1.0}).items():
            row += weight * head.expressions[names.index(name)]
    shape, pose = (exp.new_zeros(len(exp), n) for n in (head.sizes.shape, head.sizes.pose))
    verts = head.verts(shape, exp, pose)
    return dict(zip(known, verts[:-1] - verts[-1]))


class _Writer:
    """Arrays one after the other."""

    def __init__(self):
        self.arrays, self.data, self.size = {}, [], 0

    def _add(self, name: str, kind: str, values: np.ndarray, **more):
        self.arrays[name] = {"type": kind, "shape": list(values.shape), "offset": self.size, **more}
        self.data.append(values.tobytes())
        self.size += len(self.data[-1])

    def integers(self, name: str, values: Tensor, kind: str, scale: float | None = None):
        """Rounded to multiples of scale, by default what the extent asks for, around its middle."""
        values, more = values.detach().cpu().double().numpy(), {}
        if scale is None:
            low, high = values.min(0), values.max(0)
            scale, middle = float((high - low).max()) / 65000, (low + high) / 2
            values, more = values - middle, {"origin": middle.tolist()}
        info = np.iinfo(kind)
        values = np.rint(values / scale)
        if values.min() < info.min or values.max() > info.max:
            raise ValueError(
                f"'{name}' runs from {values.min():.0f} to {values.max():.0f}: that is no {kind}"
            )
        self._add(name, kind, values.astype(kind), scale=scale, **more)

    def floats(self, name: str, values: Tensor):
        self._add(name, "float32", values.detach().cpu().float().numpy(), scale=1)

    def field(self, name: str, values: Tensor):
        """Offsets [V,3] of the vertices that move."""
        values = values.detach().cpu().float().numpy()
        moves = np.linalg.norm(values, axis=1) > STILL
        scale = max(float(np.abs(values).max()) / 127, 1e-9)
        stored = np.packbits(moves).tobytes() + np.rint(values[moves] / scale).astype(np.int8).tobytes()
        self._add(name, "field", np.frombuffer(stored, np.uint8), scale=scale, count=len(values))

    def result(self, header: dict) -> bytes:
        header = json.dumps(header | {"arrays": self.arrays}, separators=(",", ":")).encode("ascii")
        return zlib.compress(b"".join([len(header).to_bytes(4, "little"), header, *self.data]), 9)


def _list(x: Tensor) -> list[float]:
    return [float(f"{v:.7g}") for v in x.tolist()]


def _open(head, code: FaceCode) -> _Rig:
    """See OpenHead.verts."""
    rest = head.verts(code.shape, code.exp, torch.zeros_like(code.pose))[0]
    joints = head.joints + torch.einsum("s,sjd->jd", code.shape[0], head.joint_modes)
    sin = head.jaw_rest / torch.sin(head.jaw_open_angle)
    return _Rig(
        rest, torch.zeros_like(joints[0]), joints[0], head.jaw_weight, sin, None, early=False,
        lids=head.lid_modes, eyes=head.eye_mask, centres=joints[1:],
    )  # fmt: skip


def _flame(head, code: FaceCode) -> _Rig:
    """See lbs: with neck and eyes at rest the head turns about the root, and the jaw before that.

    Of the nine correctives of the jaw two depend on an angle about x; what the code's other axes add stays.
    """
    betas = torch.cat([code.shape, code.exp], 1)[0]
    shaped = head.template + head.shapedirs @ betas
    joints = head.regressor @ shaped
    jaw = axis_angle_to_matrix(code.pose[:, 3:6])[0]
    dirs = head.posedirs.view(-1, 3, 3, *shaped.shape)[1]  # root is left out, then neck, jaw, eyes
    sin, cos = dirs[2, 1] - dirs[1, 2], dirs[1, 1] + dirs[2, 2]
    own = torch.einsum("rc,rcvd->vd", jaw - torch.eye(3).to(jaw), dirs)
    s, c = (jaw[2, 1] - jaw[1, 2]) / 2, (jaw[1, 1] + jaw[2, 2]) / 2 - 1
    rest = shaped + own - s * sin - c * cos
    return _Rig(rest, joints[0], joints[2], head.weights[:, 2], sin, cos, early=True)


def _centre_weights(head) -> Tensor:
    """[V]: how much of each vertex is in Flame.centre."""
    index = head.landmark_vertices
    ones = torch.eye(len(index), device=index.device)[..., None].expand(-1, -1, 3)
    weights = torch.zeros(len(head.template), device=index.device)
    return weights.index_copy_(0, index, head.centre(ones)[:, 0])


def _mesh(head) -> _Mesh:
    if head not in _meshes:
        faces, corner = head.faces.cpu(), head.uv[head.uv_faces].cpu()
        texture, points, pairs = _texture(head, head.mean_code(1, 64)), head.template.cpu(), []
        for _ in range(ROUNDS):
            finer, corners, pair = _split(faces, corner, points, texture)
            if len(points) + len(pair) > MOST:
                break
            faces, corner = finer, corners
            points = torch.cat([points, points[pair].mean(1)])
            pairs.append(pair)
        uv = corner.new_zeros(len(points), 2)
        uv[faces.flatten()] = corner.flatten(0, 1)
        _meshes[head] = _Mesh(faces, uv, pairs)
    return _meshes[head]


def _split(faces: Tensor, corner: Tensor, points: Tensor, texture: Tensor):
    """Split the edges whose middle has another colour than their ends' mean.

    faces [F,3], their corners' uv [F,3,2], points [V,3] -> faces, corners, and the pairs [N,2] of the new
    points V.. between them. A face becomes two, three or four; neighbours still share their edges.
    """
    ends = torch.stack([faces, faces.roll(-1, 1)], 2)  # edge k goes from corner k to the next
    middle = (corner + corner.roll(-1, 1)) / 2
    at_corner, at_middle = _look_up(texture, corner), _look_up(texture, middle)
    off = (at_middle - (at_corner + at_corner.roll(-1, 1)) / 2).abs().amax(2)
    long = (points[ends[..., 0]] - points[ends[..., 1]]).norm(dim=2) > SHORT
    pairs, edge = ends.sort(2).values.flatten(0, 1).unique(dim=0, return_inverse=True)
    wanted = torch.zeros(len(pairs), dtype=torch.bool)
    wanted[edge[(long & (off > COARSE)).flatten()]] = True
    new = torch.where(wanted, len(points) + wanted.cumsum(0) - 1, -1)[edge].view(-1, 3)

    count, out = (new >= 0).sum(1), [(faces[new.amax(1) < 0], corner[new.amax(1) < 0])]
    for n in (1, 2, 3):
        some = count == n
        # turn each face so that its split edges come first (n = 2: both touch corner 1)
        start = {1: new >= 0, 2: new.roll(1, 1) < 0, 3: torch.ones_like(new) > 0}[n][some].int().argmax(1)
        order = (start[:, None] + torch.arange(3)) % 3
        six = torch.cat([faces[some].gather(1, order), new[some].gather(1, order)], 1)
        uv = torch.cat([v[some].gather(1, order[..., None].expand(-1, -1, 2)) for v in (corner, middle)], 1)
        for part in PARTS[n]:
            out.append((six[:, part], uv[:, part]))
    return torch.cat([f for f, _ in out]), torch.cat([v for _, v in out]), pairs[wanted]


def _texture(head, code: FaceCode) -> Tensor:
    """The albedo [1,3,h,w], display space; grey for a FLAME without one."""
    if not getattr(head, "has_texture", True):
        return torch.full((1, 3, 1, 1), GREY)
    return head.albedo(code.tex).clamp(0, 1).cpu()


def _look_up(texture: Tensor, uv: Tensor) -> Tensor:
    """Colours [...,3] at uv [...,2]."""
    grid = uv.reshape(1, 1, -1, 2) * uv.new_tensor([2.0, -2.0]) + uv.new_tensor([-1.0, 1.0])
    colour = F.grid_sample(texture, grid, padding_mode="border", align_corners=False)[0, :, 0].T
    return colour.reshape(*uv.shape[:-1], 3)


def _camera(head, code: FaceCode) -> list[float]:
    """See `pack`: as Align Face frames a face, with room. buffers.to_image is linear: three points do."""
    scale = head.mean_code(1, 1).cam[0, 0] / ROOM
    centre = head.centre(head.verts(code.shape, code.exp, code.pose))[0]
    steps = torch.eye(3).to(centre) * code.cam.new_tensor([1.0, 1, 0])
    h, w = code.size
    right, up, origin = buffers.to_image((centre + steps)[None], code)[0, :, :2] * code.cam.new_tensor([w, h])
    turn = torch.stack([right - origin, up - origin], 1)
    turn = turn * scale / torch.linalg.vector_norm(turn[:, 0])
    return _list(torch.cat([turn, -(turn @ centre[:2])[:, None]], 1).flatten())
