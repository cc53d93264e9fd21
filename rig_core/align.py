"""From a photo to a square crop and back: one small transform object, the crops of DECA and FFHQ.

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
    check_values(image)
    return image.clamp(0, 1).expand(b, 3, h, w)


def check_values(image: Tensor) -> None:
    """Raise ValueError for the first picture of a batch that holds NaN or infinity, or runs far out of 0..1.

    image: batch first, the axes after it in any order; looked at once, where it lies.
    """
    for i, x in enumerate(image):
        low, high = torch.stack(x.float().aminmax()).tolist()  # both NaN where one value is
        if not (math.isfinite(low) and math.isfinite(high)):
            raise ValueError(f"picture {i} of the batch holds NaN or infinite values: check what made it")
        if low < -0.5 or high > 1.5:
            raise ValueError(
                f"picture values run from {low:.3g} to {high:.3g}, want 0..1 (divide 8-bit values by 255)"
            )


def sample(image: Tensor, grid: Tensor, padding: str = "zeros") -> Tensor:
    """Bilinear grid_sample of [B,C,H,W] at [B,h,w,2]; padding "border" works on every device, too.

    Older MPS lacks it. Half a pixel beyond the outermost centres, at -1 and 1, a reflection is their value.
    """
    if padding == "border":
        grid, padding = grid.clamp(-1, 1), "reflection"
    return F.grid_sample(image, grid, "bilinear", padding, align_corners=False)


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
    out = sample(image, grid, padding)
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
        crop, image = self._for(image).finer(image)
        return crop.back(image, photo_size)

    def back(self, image: Tensor, photo_size: tuple[int, int]) -> Tensor:
        """Crop [B,C,s,s] of as many channels as you like -> [B,C,H,W], bilinear, border repeated beyond."""
        return _warp(image, self.matrix, photo_size, "border", "bilinear")

    def finer(self, image: Tensor, mode: str = "bicubic") -> tuple[Crop, Tensor]:
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
