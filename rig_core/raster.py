"""A rasteriser in plain PyTorch: which face is seen at each pixel, and where on that face.

Convention: points are in image space, x right, y down, z away from the viewer, [-1, 1] over the picture
in both directions. Column c has its centre at x = -1 + (2c + 1) / W, row r at y = -1 + (2r + 1) / H. The
smallest z wins.

The arithmetic follows pytorch3d's `rasterize_meshes` as DECA calls it (blur_radius 0, one face a pixel,
affine depth, no culling) to the last bit, so that its pixels are DECA's pixels:

- a face covers a pixel centre that lies strictly inside; edges and vertices belong to no face;
- the barycentrics are divided by the doubled area + 1e-8 and not renormalised: they do not quite sum to 1;
- a face is skipped when its doubled area is at most 1e-8, or one of its vertices has z below 1e-8;
- where depths are equal the lowest face index wins.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

EPS = 1e-8
TILE = 64  # px, the largest window
CHUNK = 1 << 15  # pixels worked on at once
COST = 1 << 14  # pixels whose test takes as long as starting one more pass
HIDDEN = 1e38  # added to the depth where a face does not cover a pixel
FAR = 1e25  # makes an edge function negative whatever the face
EMPTY = 0x7CF0BDC2 << 32  # key of an empty pixel: depth 1e37


@dataclass(frozen=True)
class Fragments:
    """What a rasterised mesh shows at each pixel. -1 everywhere in an empty pixel.

    pix_to_face [B,H,W]   int64, index of the face within its item
    zbuf        [B,H,W]   depth
    bary        [B,H,W,3] weights of the face's three corners
    """

    pix_to_face: Tensor
    zbuf: Tensor
    bary: Tensor

    @property
    def mask(self) -> Tensor:
        """Coverage [B,1,H,W], 0 or 1."""
        return (self.pix_to_face >= 0).unsqueeze(1).to(self.zbuf.dtype)


def rasterize(verts: Tensor, faces: Tensor, size: tuple[int, int], backend: str = "auto") -> Fragments:
    """Rasterise triangles; not differentiable.

    verts [B,V,3] image space, z > 0; faces [F,3] or [B,F,3]; size (H, W) in pixels.
    backend: "torch", "pytorch3d", or "auto": pytorch3d on CUDA where it is importable, else torch
    (on the CPU pytorch3d takes 200 times as long).
    Raises ValueError for wrong shapes or an unknown backend, ImportError for a missing pytorch3d.
    """
    if verts.ndim != 3 or verts.shape[-1] != 3:
        raise ValueError(f"verts must be [B,V,3], got {list(verts.shape)}")
    if faces.shape[-1] != 3 or faces.ndim not in (2, 3) or (faces.ndim == 3 and len(faces) != len(verts)):
        raise ValueError(f"faces must be [F,3] or [{len(verts)},F,3], got {list(faces.shape)}")
    if backend not in ("auto", "torch", "pytorch3d"):
        raise ValueError(f"unknown rasteriser '{backend}': choose auto, torch or pytorch3d")
    h, w = size
    verts = verts.detach().float()
    # the shorter side spans [-1, 1]: scale the longer one as DECA's wrapper does. By a tensor: CUDA
    # multiplies by the rounded inverse of a number
    if w > h:
        verts = torch.stack([verts[..., 0] * w / verts.new_tensor(h), verts[..., 1], verts[..., 2]], -1)
    elif h > w:
        verts = torch.stack([verts[..., 0], verts[..., 1] * h / verts.new_tensor(w), verts[..., 2]], -1)
    if backend == "pytorch3d" or (backend == "auto" and verts.is_cuda and _has_pytorch3d()):
        return _rasterize_pytorch3d(verts, faces, size)
    return _rasterize_torch(verts, faces, size)


def interpolate(fragments: Fragments, attributes: Tensor) -> Tensor:
    """Values at the corners of the faces, [B,F,3,D] or [1,F,3,D], to a picture [B,D,H,W]; 0 where empty."""
    _, f, _, d = attributes.shape
    return blend(fragments, attributes.permute(2, 3, 0, 1).reshape(3, d, -1), f)


def interpolate_verts(fragments: Fragments, faces: Tensor, values: Tensor) -> Tensor:
    """Values at the vertices, [B,V,D], to a picture [B,D,H,W]; 0 where empty. faces [F,3] or [B,F,3]."""
    return blend(fragments, corner_planes(values, faces), faces.shape[-2])


def corner_planes(values: Tensor, faces: Tensor) -> Tensor:
    """Values at the vertices, [B,V,D], per corner of the faces [F,3] or [B,F,3]: [3,D,B*F]."""
    b, v, d = values.shape
    index = faces.long().expand(b, -1, 3) + v * torch.arange(b, device=faces.device)[:, None, None]
    planes = values.reshape(b * v, d).t().contiguous()
    return planes.index_select(1, index.permute(2, 0, 1).reshape(-1)).reshape(d, 3, -1).transpose(0, 1)


def blend(fragments: Fragments, planes: Tensor, f: int) -> Tensor:
    """The work of `interpolate`. planes [3,D,B*F] or [3,D,F]: values per corner; f: faces of one item."""
    b, h, w = fragments.pix_to_face.shape
    _, d, n = planes.shape
    face = fragments.pix_to_face.reshape(b, -1)
    weights = fragments.bary.permute(3, 0, 1, 2).reshape(3, -1)
    out = planes.new_zeros(d, b * h * w)
    for item, pixel in (v.unbind(1) for v in (face >= 0).nonzero().split(_step(face))):
        pixel = item * (h * w) + pixel
        index = face.reshape(-1).index_select(0, pixel)
        if n > f:
            index = index + item * f
        w0, w1, w2 = weights.index_select(1, pixel)
        c0, c1, c2 = planes.reshape(3 * d, n).index_select(1, index).reshape(3, d, -1)
        out.index_copy_(1, pixel, c0 * w0 + c1 * w1 + c2 * w2)
    return out.reshape(d, b, h, w).transpose(0, 1)


def face_corners(values: Tensor, faces: Tensor) -> Tensor:
    """Values at the vertices, [B,V,D], per corner of the faces [F,3] or [B,F,3]: [B,F,3,D]."""
    b, v, d = values.shape
    if faces.ndim == 2:
        return values.index_select(1, faces.reshape(-1).long()).reshape(b, -1, 3, d)
    flat = faces.long() + v * torch.arange(b, device=faces.device)[:, None, None]
    return values.reshape(-1, d).index_select(0, flat.reshape(-1)).reshape(b, -1, 3, d)


def vertex_normals(verts: Tensor, faces: Tensor) -> Tensor:
    """Unit normals [B,V,3] of verts [B,V,3]: the mean of the faces' normals, weighted by area.

    faces [F,3] or [B,F,3], counter-clockwise seen from outside in a right-handed frame.
    """
    a, b, c = face_corners(verts, faces).unbind(2)
    normal = torch.cross(b - a, c - a, dim=-1)
    index = faces.long() if faces.ndim == 3 else faces.long().expand(len(verts), *faces.shape)
    out = torch.zeros_like(verts)
    for k in range(3):
        out = out.scatter_add(1, index[..., k : k + 1].expand(-1, -1, 3), normal)
    return F.normalize(out, dim=-1, eps=1e-6)


def _rasterize_torch(verts: Tensor, faces: Tensor, size: tuple[int, int], chunk: int = 0) -> Fragments:
    """Test each face against a window over its bounding box, faces with windows of like size at once.

    Depth and face are one int64, the depth's bits above the face's index (positive floats sort like their
    bits), so that one scatter with `amin` resolves depth and ties. chunk: pixels tested at once.
    """
    h, w = size
    b, f = len(verts), faces.shape[-2]
    dev = verts.device
    chunk = max(chunk or _step(verts), TILE * TILE)
    centres = _centres(w, min(h, w)).to(dev), _centres(h, min(h, w)).to(dev)
    corner = corner_planes(verts, faces)
    table = _table(corner)
    windows, groups = _group(_cut(_windows(corner, table[6], centres, f)), COST)
    face, item, top, left, rows, cols = windows
    pixel = (item * h + top) * w + left
    ordered = torch.cat([table.index_select(1, face), rows[None], cols[None]])

    # an empty pixel: depth 1e37 and the face before the item's first one
    first = f * torch.arange(b, device=dev)
    key = torch.empty(b * h * w + TILE * (w + 1), dtype=torch.int64, device=dev)
    key[: b * h * w].view(b, -1).copy_(first[:, None] + (EMPTY - 1))
    padded = [F.pad(c, (0, TILE)) for c in centres]
    # fresh memory costs more than the arithmetic: reuse it
    scratch = verts.new_empty(4 * chunk), torch.empty(2 * chunk, dtype=torch.int64, device=dev)
    for begin, end, kr, kc in groups:
        step = chunk // (kr * kc)
        for a in range(begin, end, step):
            part = slice(a, min(a + step, end))
            at = face[part], pixel[part], top[part], left[part]
            _draw(key, ordered[:, part], at, (kr, kc), w, padded, scratch)
    return _resolve(key[: b * h * w].view(b, h, w), table[:7], first, centres)


def _centres(n: int, side: int) -> Tensor:
    """Pixel centres, [n]. pytorch3d counts them from the other end, and that moves the last bit."""
    span = 2.0 if n <= side else torch.tensor(2.0 * n) / side
    i = torch.arange(n - 1, -1, -1, dtype=torch.float32)
    return -(-span / 2 + (span * i + span / 2) / n)


def _table(corner: Tensor) -> Tensor:
    """Rows of [16,N] per face; edge k lies opposite to corner k.

    0-2, 3-5: x and y of the edges' starts; 6: doubled area + 1e-8; 7-9, 10-12: x and y of the edges;
    13-15: z.
    """
    start = corner[:, :2].transpose(0, 1).roll(-1, 1)
    edge = start.roll(-1, 1) - start
    x, y = start.unbind()
    area = (x[1] - x[2]) * edge[1, 2] - (y[1] - y[2]) * edge[0, 2]
    # added in double, then rounded; MPS has no double
    area = area + EPS if area.device.type == "mps" else (area.double() + EPS).float()
    return torch.cat([start.reshape(6, -1), area[None], edge.reshape(6, -1), corner[:, 2]])


def _windows(corner: Tensor, area: Tensor, centres: tuple[Tensor, Tensor], f: int) -> Tensor:
    """The faces to draw and their bounding boxes in pixels, [6,n]: face, item, top, left, rows, columns."""
    low = torch.minimum(torch.minimum(corner[0], corner[1]), corner[2])
    high = torch.maximum(torch.maximum(corner[0], corner[1]), corner[2])
    (x0, y0), (x1, y1), (x2, y2) = corner[:, :2].unbind()
    size = ((x0 - x1) * (y2 - y1) - (y0 - y1) * (x2 - x1)).abs()
    side = min(map(len, centres))
    (left, right), (top, bottom) = (_span(low[i], high[i], c, side) for i, c in enumerate(centres))
    # z > 1e-8 in float32 is z >= 1e-8 in double; whatever is not finite fails
    ok = (low[2] > EPS) & (size > EPS) & (size < FAR) & (area != 0) & (right > left) & (bottom > top)
    face = ok.nonzero().squeeze(1)
    top, left, bottom, right = torch.stack([top, left, bottom, right]).index_select(1, face)
    item = face.div(max(f, 1), rounding_mode="floor")
    return torch.stack([face, item, top, left, bottom - top, right - left])


def _span(low: Tensor, high: Tensor, centres: Tensor, side: int) -> tuple[Tensor, Tensor]:
    """First pixel whose centre is >= low and first whose centre is > high, both [N]."""
    n = len(centres)
    half = max(n / side, 1.0)
    # a guess that is right or one too small, then an exact comparison
    at = torch.stack([low, high]).add_(half).mul_(n / 2 / half).sub_(0.51).nan_to_num_(0)
    at[0].ceil_()
    at[1].floor_().add_(1)
    at = at.clamp_(0, n).long()
    value = F.pad(centres, (0, 1), value=torch.inf).index_select(0, at.reshape(-1)).reshape(at.shape)
    return at[0] + (value[0] < low), at[1] + (value[1] <= high)


def _cut(windows: Tensor) -> Tensor:
    """Cut windows [6,N] into tiles of at most TILE x TILE, which bounds the memory of large faces."""
    if not (windows[4:] > TILE).any():
        return windows
    face, item, top, left, rows, cols = windows
    ny, nx = (v.add(TILE - 1).div(TILE, rounding_mode="floor") for v in (rows, cols))
    owner = torch.repeat_interleave(ny * nx)
    face, item, top, left, rows, cols = windows.index_select(1, owner)
    i = torch.arange(len(owner), device=owner.device) - ((ny * nx).cumsum(0) - ny * nx)[owner]
    y = i.div(nx[owner], rounding_mode="floor")
    x = (i - y * nx[owner]) * TILE
    y = y * TILE
    return torch.stack(
        [face, item, top + y, left + x, (rows - y).clamp_max(TILE), (cols - x).clamp_max(TILE)]
    )


def _group(windows: Tensor, cost: int) -> tuple[Tensor, list[tuple[int, int, int, int]]]:
    """Sort windows [6,N] by size. Returns them and the groups: (begin, end, rows, columns).

    A group tests all of its windows at its largest size; cost: the pixels that one more group is worth.
    """
    n = TILE + 1
    code = windows[4] * n + windows[5]
    count = torch.bincount(code, minlength=n * n).cpu()  # the loop over the groups runs on the host
    used = count.nonzero().squeeze(1)
    cells = [(*divmod(i, n), m) for i, m in zip(used.tolist(), count[used].tolist())]
    wide = _levels(((c, r * m) for r, c, m in cells), cost)
    group_of, groups, begin = {}, [], 0
    for kc in sorted(set(wide.values())):
        inside = [cell for cell in cells if wide[cell[1]] == kc]
        high = _levels(((r, kc * m) for r, _, m in inside), cost)
        for kr in sorted(set(high.values())):
            members = [cell for cell in inside if high[cell[0]] == kr]
            group_of.update(((r, c), len(groups)) for r, c, _ in members)
            end = begin + sum(m for *_, m in members)
            groups.append((begin, end, kr, kc))
            begin = end
    lookup = torch.zeros(n * n, dtype=torch.int64)
    lookup[used] = torch.tensor([group_of[r, c] for r, c, _ in cells], dtype=torch.int64)
    order = lookup.to(code.device).index_select(0, code).argsort()
    return windows.index_select(1, order), groups


def _levels(sizes, cost: int) -> dict[int, int]:
    """Round sizes up to few levels. sizes: (size, pixels that one more in size adds); cost of a level."""
    weight: dict[int, int] = {}
    for size, pixels in sizes:
        weight[size] = weight.get(size, 0) + pixels
    level, waste, levels = 0, 0, {}
    for size in sorted(weight, reverse=True):
        waste += weight[size] * (level - size)
        if not levels or waste > cost:
            level, waste = size, 0
        levels[size] = level
    return levels


def _draw(key: Tensor, table: Tensor, at, shape: tuple[int, int], w: int, centres, scratch) -> None:
    """Test n faces against windows of one shape; keep the nearest of each pixel in key.

    table [18,n]: the faces' rows of `_table`, then rows and columns of their bounding boxes;
    at: four [n], face, pixel, top, left.
    """
    # the longer axis goes innermost: [kr,kc,n] for many faces, [n,kr,kc] for few
    few = table.shape[1] < shape[1]
    axis = 2 if few else 1
    dense = (table.shape[1], *shape) if few else (*shape, table.shape[1])
    size = math.prod(dense)
    t = table.unsqueeze(axis)
    face, pixel, top, left = (v.unsqueeze(axis - 1) for v in at)
    i, j = (torch.arange(k, device=key.device).reshape((-1,) if few else (-1, 1)) for k in shape)
    px, py = (c.index_select(0, p.reshape(-1)).reshape(p.shape) for c, p in zip(centres, (left + j, top + i)))
    # an edge function is a part of the column less a part of the row
    along_x, along_y = (px - t[0:3]).mul_(t[10:13]), (py - t[3:6]).mul_(t[7:10])
    # beyond the bounding box the first one becomes negative (selecting by a mask is slow on the CPU)
    far = torch.copysign(torch.full_like(t[6], FAR), t[6])
    along_x[0].sub_((j + 1 - t[17]).clamp_min_(0).mul_(far))
    along_y[0].add_((i + 1 - t[16]).clamp_min_(0).mul_(far))
    weight, least = scratch[0][: 3 * size].view(3, *dense), scratch[0][3 * size : 4 * size].view(dense)
    torch.sub(along_x.unsqueeze(axis), along_y.unsqueeze(axis + 1), out=weight)
    weight.div_(t[6].unsqueeze(axis - 1))
    torch.minimum(weight[0], weight[1], out=least)
    torch.minimum(least, weight[2], out=least)
    z0, z1, z2 = weight.mul_(t[13:16].unsqueeze(axis))
    z = z0.add_(z1).add_(z2).add_(torch.le(least, 0, out=least), alpha=HIDDEN)
    new, where = scratch[1][: 2 * size].view(2, *dense)
    torch.add(pixel.unsqueeze(axis - 1), i.unsqueeze(1) * w + j, out=where)
    _keep_nearest(key, where.view(-1), z, face.unsqueeze(axis - 1), new, key.device.type != "mps")


def _keep_nearest(key: Tensor, pixel: Tensor, z: Tensor, face: Tensor, new: Tensor, wide: bool) -> None:
    """key[pixel] = min(key[pixel], (bits of z, face)). new: memory; wide: the device has 64-bit atomics."""
    if wide:
        new.copy_(z.view(torch.int32)).bitwise_left_shift_(32).bitwise_or_(face)
        key.scatter_reduce_(0, pixel, new.view(-1), "amin")
        return
    face = face.expand(z.shape).reshape(-1).int()
    old = (key >> 32).int()
    bits = old.view(torch.float32).scatter_reduce(0, pixel, z.reshape(-1), "amin").view(torch.int32)
    none = torch.iinfo(torch.int32).max
    winner = torch.where(bits < old, none, key.int())
    face = torch.where(z.reshape(-1).view(torch.int32) == bits[pixel], face, none)
    key.copy_((bits.long() << 32) | (winner.scatter_reduce(0, pixel, face, "amin").long() & 0xFFFFFFFF))


def _resolve(key: Tensor, table: Tensor, first: Tensor, centres: tuple[Tensor, Tensor]) -> Fragments:
    """Fragments of the nearest faces, key [B,H,W]; the barycentrics computed anew for the seen pixels."""
    b, h, w = key.shape
    covered = key < EMPTY - 1
    bary = table.new_full((3, b * h * w), -1.0)
    at_x, at_y = (c.expand(h, w).reshape(-1) for c in (centres[0], centres[1][:, None]))
    for item, at in (v.unbind(1) for v in covered.reshape(b, -1).nonzero().split(_step(key))):
        pixel = item * (h * w) + at
        t = table.index_select(1, key.reshape(-1).index_select(0, pixel).bitwise_and_(0xFFFFFFFF))
        start = t[:6].reshape(2, 3, -1)
        edge = start.roll(-1, 1).sub_(start)
        x, y = at_x.index_select(0, at) - start[0], at_y.index_select(0, at) - start[1]
        bary.index_copy_(1, pixel, x.mul_(edge[1]).sub_(y.mul_(edge[0])).div_(t[6]))
    low, high = key.view(torch.int32).reshape(b, h, w, 2).unbind(-1)  # little-endian
    z = torch.where(covered, high.view(torch.float32), -1.0)
    return Fragments(low - first[:, None, None], z, bary.reshape(3, b, h, w).permute(1, 2, 3, 0))


def _step(like: Tensor) -> int:
    """Pixels to work on at once: what the cache of a core holds, or enough to keep a GPU busy."""
    return CHUNK if like.device.type == "cpu" else 64 * CHUNK


def _has_pytorch3d() -> bool:
    try:
        import pytorch3d.renderer.mesh.rasterize_meshes  # noqa: F401
    except ImportError:
        return False
    return True


def _rasterize_pytorch3d(verts: Tensor, faces: Tensor, size: tuple[int, int]) -> Fragments:
    """The same by pytorch3d, whose frame has x left and y up."""
    try:
        from pytorch3d.renderer.mesh.rasterize_meshes import rasterize_meshes
        from pytorch3d.structures import Meshes
    except ImportError as e:
        raise ImportError('pytorch3d is not installed: use backend="auto" or "torch"') from e
    b, f = len(verts), faces.shape[-2]
    flip = verts.new_tensor([-1.0, -1.0, 1.0])
    meshes = Meshes(verts=verts * flip, faces=faces.long().expand(b, -1, -1))
    face, z, bary, _ = rasterize_meshes(
        meshes, image_size=size, blur_radius=0.0, faces_per_pixel=1, perspective_correct=False
    )
    face = face[..., 0]
    local = torch.where(face >= 0, face - f * torch.arange(b, device=face.device)[:, None, None], -1)
    return Fragments(local, z[..., 0], bary[..., 0, :])
