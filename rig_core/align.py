"""From a photo to a square crop and back: one small transform object, the crops of DECA and FFHQ, paste-back.

Convention: pixel coordinates are (x, y), x right, y down, and the CENTRE of the first pixel is (0, 0), so the
picture spans -0.5 .. W-0.5 (as landmark detectors and scikit-image count; Pillow counts from the corner).
Images are [B,C,H,W] float32, RGB in display space, 0..1.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from . import gain
from .face import Batch
from .gain import to_display, to_linear  # noqa: F401


def check_image(image: Tensor) -> Tensor:
    """Any sane picture batch -> [B,3,H,W] float32 in 0..1.

    image [B,1|3|4,H,W], float 0..1 or uint8. Grey is repeated, alpha dropped, small overshoot (a host's
    bicubic resize) clamped. Raises ValueError, saying what to do, for anything else.
    """
    if not isinstance(image, Tensor) or image.ndim != 4:
        raise ValueError(
            f"a picture batch must be a tensor [B,C,H,W], got {getattr(image, 'shape', type(image))}"
        )
    b, c, h, w = image.shape
    if b == 0:
        raise ValueError("the picture batch is empty: give at least one picture")
    if h == 0 or w == 0:
        raise ValueError(f"the picture has no pixels ({w} x {h})")
    if c not in (1, 3, 4):
        raise ValueError(
            f"a picture has 1, 3 or 4 channels (grey, RGB, RGBA), got {c} in {list(image.shape)}"
        )
    if image.dtype == torch.uint8:
        image = image.float() / 255
    if not image.is_floating_point():
        raise ValueError(f"picture values must be float 0..1 or uint8, got {image.dtype}")
    image = (image[:, :3] if c == 4 else image).float()
    bad = ~torch.isfinite(image).flatten(1).all(1)
    if bad.any():
        raise ValueError(
            f"picture {int(bad.nonzero()[0])} of the batch holds NaN or infinite values: check what made it"
        )
    low, high = float(image.min()), float(image.max())
    if low < -0.5 or high > 1.5:
        raise ValueError(
            f"picture values run from {low:.3g} to {high:.3g}, want 0..1 (divide 8-bit values by 255)"
        )
    return image.clamp(0, 1).expand(b, 3, h, w)


def _affine(matrix: Tensor, points: Tensor) -> Tensor:
    return points @ matrix[:, :2, :2].transpose(1, 2) + matrix[:, None, :2, 2]


def _inverse(matrix: Tensor) -> Tensor:
    """Inverse in double on the CPU: a device may lack float64, and an 8000 px photo needs it."""
    return torch.linalg.inv(matrix.detach().cpu().double()).to(matrix)


def _shrink(image: Tensor, m: int) -> Tensor:
    """Box average by a whole factor, corner to corner; the last row and column are repeated to fill up."""
    if m == 1:
        return image
    h, w = image.shape[2:]
    return F.avg_pool2d(F.pad(image, (0, -w % m, 0, -h % m), mode="replicate"), m)


def _lanczos(image: Tensor, k: int) -> Tensor:
    """Filter by Lanczos-3 and take every k-th: [B,C,k(h+6),k(w+6)] -> [B,C,h,w]."""
    x = (torch.arange(6 * k, device=image.device, dtype=image.dtype) + 0.5) / k - 3
    taps = torch.sinc(x) * torch.sinc(x / 3)
    taps = taps / taps.sum()
    start = k // 2  # the first pixel, centred 3.5 pixels in, sees 3 to either side
    h, w = image.shape[2] // k - 6, image.shape[3] // k - 6
    c = image.shape[1]
    rows = image[:, :, start : start + (h + 5) * k]
    rows = F.conv2d(rows, taps.reshape(1, 1, -1, 1).expand(c, 1, -1, 1), stride=(k, 1), groups=c)
    columns = rows[..., start : start + (w + 5) * k]
    return F.conv2d(columns, taps.reshape(1, 1, 1, -1).expand(c, 1, 1, -1), stride=(1, k), groups=c)


def _warp(image: Tensor, matrix: Tensor, size: tuple[int, int], padding: str, kernel: str) -> Tensor:
    """Sample image [B,C,h,w] at matrix @ (output pixel), by a bilinear or lanczos kernel.

    Where it shrinks by f the image is box-averaged by a whole factor first and then sampled at k x k points a
    pixel, which are averaged: no aliasing, and memory stays within a few times the larger picture's.
    """
    scale = (matrix[:, 0, 0] * matrix[:, 1, 1] - matrix[:, 0, 1] * matrix[:, 1, 0]).abs().sqrt().tolist()
    lanczos = kernel == "lanczos"
    whole = [max(1, min(math.floor(s / 2 if lanczos else s), *image.shape[2:])) for s in scale]
    if len(set(whole)) > 1:
        n = len(image)
        return torch.cat(
            [_warp(image[i : i + 1], matrix[i : i + 1], size, padding, kernel) for i in range(n)]
        )
    m = whole[0]
    image = _shrink(image, m)
    rest, margin = max(scale) / m, 3 if lanczos else 0
    k = min(8, max(4, 2 * math.ceil(rest))) if lanczos else max(1, min(8, round(rest)))
    like = {"dtype": image.dtype, "device": image.device}
    y, x = ((torch.arange((n + 2 * margin) * k, **like) + 0.5) / k - 0.5 - margin for n in size)
    # in grid_sample's coordinates, -1 and 1 the picture's edges
    half = torch.tensor([image.shape[3], image.shape[2]]).to(matrix) * (m / 2)
    a = (matrix[:, :2] + matrix.new_tensor([0, 0, 0.5])) / half[:, None] - matrix.new_tensor([0, 0, 1])
    a = a.to(image)[:, None, None]
    grid = a[..., 0] * x[:, None] + (a[..., 1] * y[:, None, None] + a[..., 2])
    out = F.grid_sample(image, grid, "bilinear", padding, align_corners=False)
    if lanczos:
        return _lanczos(out, k)
    return F.avg_pool2d(out, k) if k > 1 else out


@dataclass(frozen=True)
class Crop(Batch):
    """An invertible map from photo pixels to the pixels of a square crop.

    matrix  [B,3,3] affine, column vectors (x, y, 1), pixel centres at whole numbers on both sides
    size    side of the crop in pixels
    padding what lies beyond the photo: "zeros" (DECA), "border" or "reflection" (FFHQ)
    kernel  "bilinear" (DECA) or "lanczos" (FFHQ, sharper)
    """

    matrix: Tensor
    size: int
    padding: str = "zeros"
    kernel: str = "bilinear"

    def __post_init__(self):
        if self.matrix.ndim != 3 or self.matrix.shape[1:] != (3, 3):
            raise ValueError(f"a crop's matrix must be [B,3,3], got {list(self.matrix.shape)}")
        if self.size < 1:
            raise ValueError(f"a crop's size must be at least 1 pixel, got {self.size}")

    def resized(self, size: int) -> Crop:
        """The same square at another resolution (its edges stay put)."""
        s = size / self.size
        m = torch.tensor([[s, 0, 0.5 * s - 0.5], [0, s, 0.5 * s - 0.5], [0, 0, 1]]).to(self.matrix)
        return self.replace(matrix=m @ self.matrix, size=size)

    def apply(self, image: Tensor) -> Tensor:
        """Photo [B,C,H,W] -> crop [B,C,s,s], antialiased where the crop is coarser than the photo."""
        matrix = _inverse(self._for(image).matrix)
        return _warp(image, matrix, (self.size, self.size), self.padding, self.kernel)

    def apply_inverse(self, image: Tensor, photo_size: tuple[int, int]) -> Tensor:
        """Crop [B,C,s,s] -> [B,C,H,W]: bicubic, antialiased where it shrinks, border repeated beyond."""
        self._fits(image)
        crop, image = self._for(image)._finer(image)
        return crop._back(image, photo_size)

    def _back(self, image: Tensor, photo_size: tuple[int, int]) -> Tensor:
        return _warp(image, self.matrix, photo_size, "border", "bilinear")

    def _finer(self, image: Tensor, mode: str = "bicubic") -> tuple[Crop, Tensor]:
        """The crop up to four times finer, if the photo is: bilinear sampling of it is cheap and smooth."""
        times = max(1, min(4, int(torch.linalg.det(self.matrix[:, :2, :2].cpu()).abs().max() ** -0.5)))
        if times == 1:
            return self, image
        return self.resized(self.size * times), F.interpolate(image, scale_factor=times, mode=mode)

    def _fits(self, image: Tensor) -> None:
        if image.shape[2:] != (self.size, self.size):
            raise ValueError(f"the crop is {self.size} px square, got a picture of {list(image.shape)}")

    def apply_points(self, points: Tensor) -> Tensor:
        """Photo pixels [B,N,2] -> crop pixels."""
        return _affine(self.matrix.to(points), points)

    def invert_points(self, points: Tensor) -> Tensor:
        """Crop pixels [B,N,2] -> photo pixels."""
        return _affine(_inverse(self.matrix).to(points), points)

    def _for(self, image: Tensor) -> Crop:
        if len(self.matrix) not in (1, len(image)):
            raise ValueError(
                f"{len(self.matrix)} crops cannot serve {len(image)} pictures: give as many, or one"
            )
        return self.expand(len(image))


def _check_landmarks(landmarks: Tensor) -> Tensor:
    if landmarks.ndim != 3 or landmarks.shape[1:] != (68, 2) or len(landmarks) == 0:
        raise ValueError(f"landmarks must be [B,68,2] with B > 0, got {list(landmarks.shape)}")
    if not torch.isfinite(landmarks).all():
        raise ValueError("landmarks hold NaN or infinite values")
    return landmarks.float()


def _similarity(origin: Tensor, x_axis: Tensor, size: int, padding: str, kernel: str) -> Crop:
    """The crop with its first pixel at origin [B,2] and pixel steps x_axis [B,2] and its quarter turn."""
    y_axis = torch.stack([-x_axis[:, 1], x_axis[:, 0]], 1)
    m = torch.eye(3).to(origin).repeat(len(origin), 1, 1)
    m[:, :2] = torch.stack([x_axis, y_axis, origin], 2)
    return Crop(_inverse(m), size, padding, kernel)


def box_crop(boxes: Tensor, size: int = 224, scale: float = 1.25) -> Crop:
    """A square about boxes [B,4] (left, top, right, bottom) of side int(scale x (w+h)/2)."""
    if boxes.ndim != 2 or boxes.shape[1] != 4 or not torch.isfinite(boxes).all():
        raise ValueError(f"boxes must be finite numbers [B,4], got {list(boxes.shape)}")
    boxes = boxes.float()
    low, high = boxes[:, :2], boxes[:, 2:]
    side = (scale * (high - low).mean(1, keepdim=True)).floor()
    if not (side >= 1).all():
        raise ValueError(f"a face box is smaller than a pixel: {boxes.tolist()}")
    step = side / (size - 1)
    x_axis = torch.cat([step, torch.zeros_like(step)], 1)
    return _similarity((low + high) / 2 - side / 2, x_axis, size, "zeros", "bilinear")


def deca_crop(landmarks: Tensor, size: int = 224) -> Crop:
    """DECA's crop of 68 landmarks [B,68,2]: side int(1.25 x 1.1 x (w+h)/2) about the centre of their box.

    Convention: the square's edges fall on the pixel CENTRES 0 and size-1, zeros outside.
    """
    points = _check_landmarks(landmarks)
    return box_crop(torch.cat([points.amin(1), points.amax(1)], 1), size, 1.25 * 1.1)


def detector_crop(boxes: Tensor, size: int = 224) -> Crop:
    """DECA's crop of a face detector's boxes [B,4], moved down by 0.12 of their mean side first."""
    shift = torch.zeros_like(boxes)
    shift[:, 1::2] = 0.12 * (boxes[:, 2:] - boxes[:, :2]).mean(1, keepdim=True)
    return box_crop(boxes + shift, size)


def ffhq_crop(landmarks: Tensor, size: int) -> Crop:
    """FFHQ's alignment (Karras et al. 2019, appendix) of 68 landmarks [B,68,2] as one similarity transform.

    The x axis follows the eyes and is square to the line to the mouth; half the side is the larger of
    2 x the eye distance and 1.8 x the distance from eyes to mouth, the centre a tenth below the eyes.
    Convention: the square's edges are the crop's edges (-0.5 and size-0.5). Where a photo is over four times
    finer than the crop, the official code shrinks it first, which moves its samples; so do ours.
    """
    p = _check_landmarks(landmarks)
    left, right = p[:, 36:42].mean(1), p[:, 42:48].mean(1)
    eyes, mouth = (left + right) / 2, (p[:, 48] + p[:, 54]) / 2
    across, down = right - left, mouth - eyes
    x = across + torch.stack([down[:, 1], -down[:, 0]], 1)
    length = x.norm(dim=1, keepdim=True)
    if not (length > 1e-3).all():
        raise ValueError("landmarks of eyes and mouth coincide: no face to align")
    half = torch.maximum(2.0 * across.norm(dim=1), 1.8 * down.norm(dim=1))[:, None]
    x = x / length * half
    y = torch.stack([-x[:, 1], x[:, 0]], 1)
    shrink = (2 * half / size * 0.5).floor().clamp_min(1)
    corner = eyes + 0.1 * down - x - y + 0.5 * (shrink - 1)
    step = 2 * x / size
    return _similarity(corner + 0.5 * (step + 2 * y / size), step, size, "reflection", "lanczos")


def _blur(mask: Tensor, radius: int) -> Tensor:
    """Two box blurs of the given radius: a tent, edges repeated."""
    for _ in range(2):
        mask = F.avg_pool2d(F.pad(mask, (radius,) * 4, mode="replicate"), 2 * radius + 1, stride=1)
    return mask


def soft_mask(
    mask: Tensor | None, crop: Crop, soft: float = 0.06, photo_size: tuple[int, int] | None = None
) -> Tensor:
    """Weight of the edit in the crop, [B,1,s,s], 0..1, falling smoothly to 0 INSIDE the mask and the crop.

    mask [B,1,s,s], 1 = edit, None for the whole crop; soft: width of the edge in crop sides.
    photo_size (H, W): where the photo ends with the crop, or before it, there is no edge: nothing to meet.
    """
    s = crop.size
    if mask is None:
        mask = torch.ones(1, 1, s, s, device=crop.matrix.device)
    if mask.ndim != 4 or mask.shape[1] != 1 or mask.shape[2:] != (s, s):
        raise ValueError(f"the mask must be [B,1,{s},{s}], as the crop, got {list(mask.shape)}")
    # eroded by what interpolation reaches, so that the edit does not leave the mask
    scale = float(torch.linalg.det(crop.matrix[:, :2, :2].cpu()).abs().max() ** 0.5)
    reach = min(1 if scale < 1.5 else 1 + math.ceil(1.5 * scale), (s - 1) // 2)
    mask = -F.max_pool2d(-mask.float().clamp(0, 1), 2 * reach + 1, 1, reach)
    at = torch.arange(s, device=mask.device, dtype=mask.dtype)
    left, top, right, bottom = _within(crop, photo_size)
    far = torch.full_like(at, s)
    rows = torch.minimum(at if top else far, s - 1 - at if bottom else far)
    columns = torch.minimum(at if left else far, s - 1 - at if right else far)
    edge = torch.minimum(rows[:, None], columns)
    mask = torch.minimum(mask, (edge / max(soft * s, 1)).clamp(0, 1))
    radius = min(round(soft * s / 2), (s - 1) // 2)
    if radius:  # at a straight border the blur is one half: what exceeds it lies inside
        mask = torch.minimum(mask, (2 * _blur(mask, radius) - 1).clamp(0, 1))
    return mask * mask * (3 - 2 * mask)


def _within(crop: Crop, photo_size: tuple[int, int] | None) -> tuple[bool, bool, bool, bool]:
    """Whether the photo goes on beyond the crop's left, top, right and bottom side, for any of the crops."""
    if photo_size is None:
        return True, True, True, True
    s, (h, w) = float(crop.size), photo_size
    ends = torch.tensor([[0.0, 0.0], [s, 0.0], [s, s], [0.0, s]]).to(crop.matrix) - 0.5
    a, b, c, d = crop.invert_points(ends.expand(len(crop), 4, 2)).unbind(1)  # clockwise from the upper left

    def inside(p: Tensor, q: Tensor) -> bool:
        points = torch.lerp(p[:, None], q[:, None], torch.linspace(0.05, 0.95, 19).to(p)[:, None])
        x, y = points.unbind(-1)
        return bool(((x > 0) & (x < w - 1) & (y > 0) & (y < h - 1)).any())

    return inside(a, d), inside(a, b), inside(b, c), inside(d, c)


def _region(crop: Crop, size: tuple[int, int]) -> tuple[int, int, int, int]:
    """Rows and columns of the photo that the crops touch: y0, y1, x0, x1."""
    low, high = -1.0, float(crop.size)
    square = torch.tensor([[low, low], [high, low], [high, high], [low, high]]).to(crop.matrix)
    corners = crop.invert_points(square.expand(len(crop), 4, 2)).flatten(0, 1)
    x0, y0 = (int(v) for v in corners.amin(0).floor())
    x1, y1 = (int(v) + 1 for v in corners.amax(0).ceil())
    return max(y0, 0), min(y1, size[0]), max(x0, 0), min(x1, size[1])


_FINEST = 2048  # side of the largest gain field, which bounds memory; beyond, it is interpolated


def _gain(photo: Tensor, edited: Tensor, original: Tensor, crop: Crop) -> tuple[Crop, Tensor]:
    """The edit's gain, enlarged along the photo's edges to nearly its resolution, and where it lies."""
    found = gain.stops(edited, original)
    size = crop.size * float(torch.linalg.det(crop.matrix[:, :2, :2].cpu()).abs().min()) ** -0.5
    fine = crop.resized(crop.size * 2 ** max(0, int(math.log2(min(size, _FINEST) / crop.size))))
    fine = fine.replace(kernel="bilinear")
    parts = [
        gain.enlarge(g[None], c.apply(p[None]).clamp(0, 1))
        for g, c, p in zip(found, (fine[i : i + 1] for i in range(len(fine))), photo)
    ]
    return fine, torch.cat(parts)


def paste_back(
    photo: Tensor,
    edited: Tensor,
    crop: Crop,
    mask: Tensor | None = None,
    original: Tensor | None = None,
    mode: str = "ratio",
    soft: float = 0.06,
) -> Tensor:
    """Carry an edit of the crop into the photo at the photo's own resolution: [B,3,H,W] -> [B,3,H,W].

    edited   [B,3,s,s] the crop after the edit
    mask     [B,1,s,s] where the edit may go (1), None for the whole crop; soft is its edge in crop sides
    original [B,3,s,s] the crop before the edit, crop.apply(photo) when None. Give what the model makes of the
             unedited face to leave its reconstruction error out
    mode     "ratio": the photo's linear light is multiplied by edited / original (see gain), sharp at any
             size; "difference": their difference is added; "replace": the edited crop itself (poses)
    Pixels outside the mask, and wherever edited equals original, come back bit for bit.
    Convention: ratios are taken in linear light, in stops, so that halving and doubling interpolate alike.
    """
    if mode not in ("ratio", "difference", "replace"):
        raise ValueError(f"paste_back mode must be ratio, difference or replace, got {mode!r}")
    original = crop.apply(photo).clamp(0, 1) if original is None else original
    want = [len(photo), 3, crop.size, crop.size]
    for name, x in (("edited", edited), ("original", original)):
        if list(x.shape) != want:
            raise ValueError(f"paste_back: {name} must be {want}, got {list(x.shape)}")
        if not torch.isfinite(x).all():
            raise ValueError(f"paste_back: {name} holds NaN or infinite values")
    crop = crop.expand(len(photo))
    y0, y1, x0, x1 = _region(crop, photo.shape[2:])
    if y0 >= y1 or x0 >= x1:
        return photo.clone()
    weight = soft_mask(mask, crop, soft, photo.shape[2:]).to(photo.device).expand(len(photo), 1, -1, -1)
    differs = (edited != original).any(1, keepdim=True).to(edited)
    plain, maps = crop._finer(torch.cat([weight, differs], 1), "bilinear")
    if mode == "ratio":
        fine, change = _gain(photo, edited, original, crop)
    else:
        fine, change = crop._finer(edited - original if mode == "difference" else edited)
    out = photo.clone()
    rows = max(1, 2**18 // (x1 - x0))  # strips stay in the cache, and a large photo's memory bounded
    for y in range(y0, y1, rows):
        part = out[:, :, y : min(y + rows, y1), x0:x1]
        shift = torch.tensor([[1, 0, x0], [0, 1, y], [0, 0, 1]]).to(crop.matrix)
        inside, found = (
            c.replace(matrix=c.matrix @ shift)._back(x, part.shape[2:])
            for c, x in ((plain, maps), (fine, change))
        )
        w = inside[:, :1] * inside[:, 1:]
        if mode == "ratio":
            found = gain.light(part, found)
        elif mode == "difference":
            found = part + found
        part.copy_(torch.where(w > 0, torch.lerp(part, found.clamp(0, 1), w), part))
    return out
