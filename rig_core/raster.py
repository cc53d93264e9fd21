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
from torch import Tensor

EPS = 1e-8
TILE = 64  # px; larger faces are cut into windows of this size, which bounds the memory
INF_KEY = 0x7F800000 << 32  # the key of an empty pixel: depth infinity


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
    # the shorter side spans [-1, 1]: scale the longer one as DECA's wrapper does
    if w > h:
        verts = torch.stack([verts[..., 0] * w / h, verts[..., 1], verts[..., 2]], -1)
    elif h > w:
        verts = torch.stack([verts[..., 0], verts[..., 1] * h / w, verts[..., 2]], -1)
    if backend == "pytorch3d" or (backend == "auto" and verts.is_cuda and _has_pytorch3d()):
        return _rasterize_pytorch3d(verts, faces, size)
    return _rasterize_torch(verts, faces, size)


def interpolate(fragments: Fragments, attributes: Tensor) -> Tensor:
    """Values at the corners of the faces, [B,F,3,D] or [1,F,3,D], to a picture [B,D,H,W]; 0 where empty."""
    b, h, w = fragments.pix_to_face.shape
    f, d = attributes.shape[1], attributes.shape[3]
    face = fragments.pix_to_face.reshape(b, -1)
    if len(attributes) > 1:
        face = torch.where(face >= 0, face + f * torch.arange(b, device=face.device)[:, None], face)
    seen = (face.reshape(-1) >= 0).nonzero().squeeze(1)
    corner = attributes.reshape(-1, 3 * d).index_select(0, face.reshape(-1).index_select(0, seen))
    weight = fragments.bary.reshape(-1, 3).index_select(0, seen)
    value = (corner.reshape(-1, 3, d) * weight[..., None]).sum(1)
    out = value.new_zeros(b * h * w, d).index_copy(0, seen, value)
    return out.reshape(b, h, w, d).permute(0, 3, 1, 2)


def interpolate_verts(fragments: Fragments, faces: Tensor, values: Tensor) -> Tensor:
    """Values at the vertices, [B,V,D], to a picture [B,D,H,W]; 0 where empty. faces [F,3] or [B,F,3]."""
    return interpolate(fragments, face_corners(values, faces))


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
    return torch.nn.functional.normalize(out, dim=-1, eps=1e-6)


def _centres(n: int, side: int, device) -> Tensor:
    """Pixel centres, [n]. pytorch3d counts them from the other end, and that moves the last bit."""
    span = 2.0 if n <= side else torch.tensor(2.0 * n) / side
    i = torch.arange(n - 1, -1, -1, dtype=torch.float32)
    return -(-span / 2 + (span * i + span / 2) / n).to(device)


def _edge(px, py, ax, ay, bx, by):
    return (px - ax) * (by - ay) - (py - ay) * (bx - ax)


def _windows(table: Tensor, cx: Tensor, cy: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """First row and column of each face and the numbers of rows and columns, [N] int64; 0 for skipped faces."""
    x0, y0, z0, x1, y1, z1, x2, y2, z2 = table[:9]

    def span(a, b, c, centres):
        low = torch.minimum(torch.minimum(a, b), c)
        high = torch.maximum(torch.maximum(a, b), c)
        first = torch.searchsorted(centres, low.contiguous())
        return first, torch.searchsorted(centres, high.contiguous(), right=True) - first

    left, cols = span(x0, x1, x2, cx)
    top, rows = span(y0, y1, y2, cy)
    # compared in float32, <= 1e-8 is the same as < 1e-8 in double
    z = torch.minimum(torch.minimum(z0, z1), z2)
    ok = (z > EPS) & (_edge(x0, y0, x1, y1, x2, y2).abs() > EPS)
    ok &= torch.isfinite(table[:9]).all(0) & (rows > 0) & (cols > 0)
    return top, left, rows * ok, cols * ok


def _rasterize_torch(verts: Tensor, faces: Tensor, size: tuple[int, int]) -> Fragments:
    """Test each face against a K x K window over its bounding box; faces of one K together, as [K,K,n].

    Depth and face are one int64, the depth's bits above the face's index (positive floats sort like their
    bits), so that one scatter with `amin` resolves depth and ties.
    """
    h, w = size
    b, f = len(verts), faces.shape[-2]
    dev = verts.device
    cx, cy = _centres(w, min(h, w), dev), _centres(h, min(h, w), dev)
    table = face_corners(verts, faces).reshape(b * f, 9).t().contiguous()
    x0, y0, _, x1, y1, _, x2, y2, _ = table
    area = _edge(x2, y2, x0, y0, x1, y1)
    # added in double, then rounded
    area = (area.double() + EPS).float() if dev.type != "mps" else area + EPS
    table = torch.cat([table, area[None]])
    top, left, rows, cols = _windows(table, cx, cy)

    largest = int(torch.maximum(rows, cols).max()) if b * f else 0
    key = torch.full((b * h * w + TILE * (w + 1),), INF_KEY, dtype=torch.int64, device=dev)
    face = torch.arange(b * f, device=dev)
    if largest > TILE:
        face, top, left, rows, cols = _cut(face, top, left, rows, cols)
    start = (face // max(f, 1)) * (h * w) + top * w + left
    side = torch.maximum(rows, cols)
    side, order = side.sort()
    counts = torch.bincount(side, minlength=1).tolist()
    table_sorted = table[:, face[order]]
    face, top, left, rows, cols, start = (v[order] for v in (face, top, left, rows, cols, start))
    lo = counts[0]
    for k in range(1, len(counts)):
        step = max(1, (1 << 18) // (k * k))
        end = lo + counts[k]
        for a in range(lo, end, step):
            s = slice(a, min(a + step, end))
            _window_keys(
                key, table_sorted[:, s], face[s], top[s], left[s], rows[s], cols[s], start[s], k, w, cx, cy
            )
        lo = end
    return _resolve(key[: b * h * w].reshape(b, h, w), table, f, cx, cy)


def _cut(face, top, left, rows, cols):
    """Cut windows into tiles of at most TILE x TILE."""
    ny, nx = (rows + TILE - 1) // TILE, (cols + TILE - 1) // TILE
    n = ny * nx
    owner = torch.repeat_interleave(n)
    i = torch.arange(len(owner), device=n.device) - (n.cumsum(0) - n)[owner]
    dy, dx = i // nx[owner] * TILE, i % nx[owner] * TILE
    rows, cols = (rows[owner] - dy).clamp_max(TILE), (cols[owner] - dx).clamp_max(TILE)
    return face[owner], top[owner] + dy, left[owner] + dx, rows, cols


def _window_keys(key, table, face, top, left, rows, cols, start, k, w, cx, cy):
    x0, y0, z0, x1, y1, z1, x2, y2, z2, area = table
    i = torch.arange(k, device=key.device)[:, None]
    nan = cx.new_tensor(float("nan"))
    px = torch.where(i < cols, cx[(left + i).clamp_max(len(cx) - 1)], nan)[None]
    py = torch.where(i < rows, cy[(top + i).clamp_max(len(cy) - 1)], nan)[:, None]
    w0 = _edge(px, py, x1, y1, x2, y2) / area
    w1 = _edge(px, py, x2, y2, x0, y0) / area
    w2 = _edge(px, py, x0, y0, x1, y1) / area
    inside = torch.minimum(torch.minimum(w0, w1), w2) > 0
    z = w0 * z0 + w1 * z1 + w2 * z2
    z = torch.where(inside, z, torch.inf)
    new = (z.view(torch.int32).long() << 32) | face
    pixel = start + (i * w + i.t())[..., None]
    key.scatter_reduce_(0, pixel.reshape(-1), new.reshape(-1), "amin")


def _resolve(key: Tensor, table: Tensor, f: int, cx: Tensor, cy: Tensor) -> Fragments:
    """The winners' depth and barycentrics."""
    seen = key < INF_KEY
    face = torch.where(seen, key & 0xFFFFFFFF, 0)
    z = torch.where(seen, (key >> 32).int().view(torch.float32), -1)
    if table.shape[1] == 0:
        return Fragments(face - 1, z, z[..., None].expand(*z.shape, 3))
    x0, y0, _, x1, y1, _, x2, y2, _, area = table.index_select(1, face.reshape(-1)).reshape(10, *key.shape)
    px, py = cx, cy[:, None]
    w0 = _edge(px, py, x1, y1, x2, y2) / area
    w1 = _edge(px, py, x2, y2, x0, y0) / area
    w2 = _edge(px, py, x0, y0, x1, y1) / area
    bary = torch.where(seen[..., None], torch.stack([w0, w1, w2], -1), -1)
    return Fragments(torch.where(seen, face % f, -1), z, bary)


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
