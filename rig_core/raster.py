"""A rasteriser in plain PyTorch: which face is seen at each pixel, and where on that face.

Convention: points are in image space, x right, y down, z away from the viewer, [-1, 1] over the picture in
both directions. Column c has its centre at x = -1 + (2c + 1) / W, row r at y = -1 + (2r + 1) / H. The smallest z wins.

The arithmetic follows pytorch3d's `rasterize_meshes` as DECA calls it (blur_radius 0, one face a pixel, affine
depth, no culling) to the last bit, so that its pixels are DECA's pixels:

- a face covers a pixel centre that lies strictly inside; edges and vertices belong to no face;
- the barycentrics are divided by the doubled area + 1e-8 and not renormalised: they do not quite sum to 1;
- a face is skipped when its doubled area is at most 1e-8, or one of its vertices has z below 1e-8;
- where depths are equal the lowest face index wins.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

EPS = 1e-8
TILE = 64  # px, the largest window
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
    # the shorter side spans [-1, 1]: scale the longer one as DECA's wrapper does (a tensor divides exactly on every device)
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
    seen = (fragments.pix_to_face.reshape(-1) >= 0).nonzero().squeeze(1)
    face = fragments.pix_to_face.reshape(-1).index_select(0, seen)
    if n > f:
        face = face + seen.div(h * w, rounding_mode="floor") * f
    corner = planes.reshape(3 * d, n).index_select(1, face).reshape(3, d, -1)
    weight = fragments.bary.reshape(-1, 3).t().index_select(1, seen)
    value = corner[0] * weight[0] + corner[1] * weight[1] + corner[2] * weight[2]
    return value.new_zeros(d, b * h * w).index_copy(1, seen, value).reshape(d, b, h, w).transpose(0, 1)


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


def _centres(n: int, side: int) -> Tensor:
    """Pixel centres, [n]. pytorch3d counts them from the other end, and that moves the last bit."""
    span = 2.0 if n <= side else torch.tensor(2.0 * n) / side
    i = torch.arange(n - 1, -1, -1, dtype=torch.float32)
    return -(-span / 2 + (span * i + span / 2) / n)


def _edge(px, py, ax, ay, bx, by):
    """Doubled signed area of the triangle p, a, b."""
    return (px - ax) * (by - ay) - (py - ay) * (bx - ax)


def _rasterize_torch(verts: Tensor, faces: Tensor, size: tuple[int, int], chunk: int = 0) -> Fragments:
    """Test each face against a window over its bounding box, faces with windows of like size at once.

    Depth and face are one int64, the depth's bits above the face's index (positive floats sort like their
    bits), so that one scatter with `amin` resolves depth and ties. chunk: pixels tested at once.
    """
    h, w = size
    b, f = len(verts), faces.shape[-2]
    dev = verts.device
    chunk = chunk or (1 << 16 if dev.type == "cpu" else 1 << 22)
    cx, cy = _centres(w, min(h, w)), _centres(h, min(h, w))
    # a vertex that is not finite drops its faces, as one at z = 0 does
    verts = torch.where(torch.isfinite(verts).all(-1, keepdim=True), verts, 0.0)
    corner = corner_planes(verts, faces)
    (x0, y0, z0), (x1, y1, z1), (x2, y2, z2) = (c.unbind() for c in corner)
    area = _edge(x2, y2, x0, y0, x1, y1)
    # added in double, then rounded; MPS has no double
    area = area + EPS if dev.type == "mps" else (area.double() + EPS).float()
    table = torch.cat([corner.reshape(9, -1), area[None]])

    left, cols = _span(x0, x1, x2, cx)
    top, rows = _span(y0, y1, y2, cy)
    # in float32, > 1e-8 is the same as >= 1e-8 in double for z
    ok = (torch.minimum(torch.minimum(z0, z1), z2) > EPS) & (_edge(x0, y0, x1, y1, x2, y2).abs() > EPS)
    face = (ok & (area != 0) & (rows > 0) & (cols > 0)).nonzero().squeeze(1)
    start = face.div(max(f, 1), rounding_mode="floor") * (h * w)
    windows = torch.stack([face, start, *(v.index_select(0, face) for v in (top, left, rows, cols))])
    windows, groups = _group(_cut(windows), chunk // 4)
    windows[1] += windows[2] * w + windows[3]

    key = torch.full((b * h * w + TILE * (w + 1),), EMPTY, dtype=torch.int64, device=dev)
    sorted_table = table.index_select(1, windows[0])
    cx, cy = (F.pad(c, (0, TILE)).to(dev) for c in (cx, cy))
    for begin, end, kr, kc in groups:
        step = max(1, chunk // (kr * kc))
        for a in range(begin, end, step):
            part = slice(a, min(a + step, end))
            _draw(key, sorted_table[:, part], windows[:, part], kr, kc, w, cx, cy)
    return _resolve(key[: b * h * w].reshape(b, h, w), table, f, cx, cy)


def _span(a: Tensor, b: Tensor, c: Tensor, centres: Tensor) -> tuple[Tensor, Tensor]:
    """First pixel whose centre lies in [min, max] of a, b, c [N], and how many there are (<= 0: none)."""
    n = len(centres)
    low, high = torch.minimum(torch.minimum(a, b), c), torch.maximum(torch.maximum(a, b), c)
    ends = torch.stack([low, high])
    # a guess that is at most one off, then exact comparisons around it
    half = n / (n - 1) * float(centres[-1]) if n > 1 else 1.0
    guess = ((ends + half) * (n / 2 / half) - 0.5).round().clamp(0, n - 1).long()
    padded = F.pad(F.pad(centres, (1, 0), value=-torch.inf), (0, 1), value=torch.inf).to(a.device)
    first, last = guess - 1
    for k in range(3):
        near = padded[guess + k]
        first, last = first + (near[0] < low), last + (near[1] <= high)
    return first, last - first


def _cut(windows: Tensor) -> Tensor:
    """Cut windows [6,N] into tiles of at most TILE x TILE, which bounds the memory of large faces."""
    face, start, top, left, rows, cols = windows
    ny, nx = ((v + TILE - 1).div(TILE, rounding_mode="floor") for v in (rows, cols))
    owner = torch.repeat_interleave(ny * nx)
    if len(owner) == len(face):
        return windows
    face, start, top, left, rows, cols = windows.index_select(1, owner)
    i = torch.arange(len(owner), device=owner.device) - ((ny * nx).cumsum(0) - ny * nx)[owner]
    y = i.div(nx[owner], rounding_mode="floor")
    x = i - y * nx[owner]
    y, x = y * TILE, x * TILE
    return torch.stack(
        [face, start, top + y, left + x, (rows - y).clamp_max(TILE), (cols - x).clamp_max(TILE)]
    )


def _group(windows: Tensor, cost: int) -> tuple[Tensor, list[tuple[int, int, int, int]]]:
    """Sort windows [6,N] by size. Returns them and the groups: (begin, end, rows, cols).

    A group tests all of its windows at its largest size; cost: the pixels that one more group is worth.
    """
    n = TILE + 1
    code = windows[4] * n + windows[5]
    count = torch.bincount(code, minlength=n * n).tolist()  # the host waits for the device here, once
    cells = [(*divmod(i, n), c) for i, c in enumerate(count) if c]
    wide = _levels(((c, r * m) for r, c, m in cells), cost)
    lookup, groups, begin = [0] * (n * n), [], 0
    for kc in sorted(set(wide.values())):
        inside = [cell for cell in cells if wide[cell[1]] == kc]
        high = _levels(((r, kc * m) for r, _, m in inside), cost)
        for kr in sorted(set(high.values())):
            members = [cell for cell in inside if high[cell[0]] == kr]
            for r, c, _ in members:
                lookup[r * n + c] = len(groups)
            end = begin + sum(m for *_, m in members)
            groups.append((begin, end, kr, kc))
            begin = end
    order = torch.tensor(lookup, device=code.device)[code].argsort()
    return windows.index_select(1, order), groups


def _levels(sizes, cost: int) -> dict[int, int]:
    """Round sizes up to few levels. sizes: (size, pixels added when it grows by one); cost: pixels a level costs."""
    weight: dict[int, int] = {}
    for size, pixels in sizes:
        weight[size] = weight.get(size, 0) + pixels
    level, waste, levels = 0, cost, {}
    for size in sorted(weight, reverse=True):
        waste += weight[size] * (level - size)
        if not levels or waste > cost:
            level, waste = size, 0
        levels[size] = level
    return levels


def _draw(
    key: Tensor, table: Tensor, windows: Tensor, kr: int, kc: int, w: int, cx: Tensor, cy: Tensor
) -> None:
    """Test n faces, table [10,n], against windows of kr x kc pixels; keep the nearest of each pixel in key."""
    # the longest axis is the innermost one: [kr,kc,n] for many faces, [n,kr,kc] for few
    few = table.shape[1] < kc
    if few:
        table, windows = table[..., None], windows[..., None]
    x0, y0, z0, x1, y1, z1, x2, y2, z2, area = table
    face, start, top, left, rows, cols = windows
    shape = (-1, 1) if not few else (1, -1)
    i, j = (torch.arange(k, device=key.device).reshape(shape) for k in (kr, kc))
    col, row = left + j, top + i
    px = cx.index_select(0, col.reshape(-1)).reshape(col.shape)
    py = cy.index_select(0, row.reshape(-1)).reshape(row.shape)
    # an edge function is a part of the column less a part of the row; beyond the bounding box it must be negative
    far = torch.copysign(torch.full_like(area, FAR), area)
    ax = (
        (px - x1) * (y2 - y1) - (j + 1 - cols).clamp_min(0) * far,
        (px - x2) * (y0 - y2),
        (px - x0) * (y1 - y0),
    )
    ay = (
        (py - y1) * (x2 - x1) + (i + 1 - rows).clamp_min(0) * far,
        (py - y2) * (x0 - x2),
        (py - y0) * (x1 - x0),
    )
    rdim, cdim = (2, 1) if few else (1, 0)
    if few:
        z0, z1, z2, area, face, start = (v[..., None] for v in (z0, z1, z2, area, face, start))
    w0, w1, w2 = ((c.unsqueeze(cdim) - r.unsqueeze(rdim)).div_(area) for c, r in zip(ax, ay))
    least = torch.minimum(w0, w1)
    least = torch.minimum(least, w2, out=least)
    z = w0.mul_(z0).add_(w1.mul_(z1)).add_(w2.mul_(z2))
    # a comparison into floats and a sum: selecting by a mask takes ten times as long on the CPU
    z.add_(torch.le(least, 0, out=least), alpha=HIDDEN)
    pixel = start + ((i * w).unsqueeze(rdim) + j.unsqueeze(cdim))
    _keep_nearest(key, pixel, z, face, key.device.type != "mps")


def _keep_nearest(key: Tensor, pixel: Tensor, z: Tensor, face: Tensor, wide: bool) -> None:
    """key[pixel] = min(key[pixel], (bits of z, face)). wide: the device has atomics of 64 bits."""
    if wide:
        new = z.view(torch.int32).long().bitwise_left_shift_(32).bitwise_or_(face)
        key.scatter_reduce_(0, pixel.reshape(-1), new.reshape(-1), "amin")
        return
    pixel, face = pixel.reshape(-1), face.expand(z.shape).reshape(-1).int()
    old = (key >> 32).int()
    bits = old.view(torch.float32).scatter_reduce(0, pixel, z.reshape(-1), "amin").view(torch.int32)
    none = torch.iinfo(torch.int32).max
    winner = torch.where(bits < old, none, key.int())
    first = torch.where(z.reshape(-1).view(torch.int32) == bits[pixel], face, none)
    key.copy_((bits.long() << 32) | winner.scatter_reduce(0, pixel, first, "amin"))


def _resolve(key: Tensor, table: Tensor, f: int, cx: Tensor, cy: Tensor) -> Fragments:
    """Fragments of the nearest faces, key [B,H,W]; barycentrics computed anew for the seen pixels."""
    b, h, w = key.shape
    item, row, col = (key < EMPTY).nonzero().unbind(1)
    pixel = (item * h + row) * w + col
    key = key.reshape(-1).index_select(0, pixel)
    face = key & 0xFFFFFFFF
    x0, y0, _, x1, y1, _, x2, y2, _, area = table.index_select(1, face)
    px, py = cx[col], cy[row]
    edges = _edge(px, py, x1, y1, x2, y2), _edge(px, py, x2, y2, x0, y0), _edge(px, py, x0, y0, x1, y1)
    values = torch.stack([*(e / area for e in edges), (key >> 32).int().view(torch.float32)])
    planes = values.new_full((4, b * h * w), -1.0).index_copy_(1, pixel, values).reshape(4, b, h, w)
    local = torch.full((b * h * w,), -1, device=key.device).index_copy_(0, pixel, face - item * f)
    return Fragments(local.reshape(b, h, w), planes[3], planes[:3].permute(1, 2, 3, 0))


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
