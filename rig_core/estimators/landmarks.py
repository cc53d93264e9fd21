"""Faces and their 68 landmarks in a photo, by two small networks that come with the pack.

`find_faces` runs a fully convolutional face network over an image pyramid, then lets the landmark network
confirm and tighten each box. `find_landmarks` crops each box, predicts, turns the face upright by what it
found and predicts again. Nothing is downloaded; `face_alignment_landmarks` uses that library if it is there.

Convention: images [1,3,H,W] RGB 0..1. Points are pixels, x right, y down, (0, 0) the centre of the top left
pixel. Boxes are (x0, y0, x1, y1), the bounding box of the 68 landmarks (brows to chin), as DECA's detector
gives it. Landmarks are in iBUG's order: jaw 17, brows 2x5, nose 9, eyes 2x6, lips 20.
"""

from __future__ import annotations

import functools
import hashlib
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import files
from ..align import Crop, check_image

CROP = 96  # px, side of the landmark network's input
FRAME = 1.6  # side of that crop in sides of the face's box
FACE = 36.0  # px, the face size that the face network's boxes are measured in
SMALLEST, LARGEST = 20.0, 64.0  # px, faces that the face network answers to at one pyramid level
STRIDE = 8  # px per cell of the face network
LONG_SIDE = 1024  # px; larger photos are searched in a copy of this size


class NoFaceError(ValueError):
    """No face was found where one is needed. The text says what to do."""


class Block(nn.Module):
    """Two 3x3 convolutions around a skip connection."""

    def __init__(self, channels: int, dilation: int = 1):
        super().__init__()
        self.a = nn.Conv2d(channels, channels, 3, padding=dilation, dilation=dilation, bias=False)
        self.an = nn.BatchNorm2d(channels)
        self.b = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.bn(self.b(F.relu(self.an(self.a(x))))))


def down(c_in: int, c_out: int) -> nn.Sequential:
    """3x3 convolution of stride 2."""
    return nn.Sequential(
        nn.Conv2d(c_in, c_out, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(c_out), nn.ReLU()
    )


class FaceNet(nn.Module):
    """Picture [B,3,H,W] 0..1 -> [B,5,H/8,W/8]: logit of a face's centre, offset in cells, log size / FACE."""

    def __init__(self, width: int = 16):
        super().__init__()
        w = width
        self.stem = nn.Sequential(down(3, w), down(w, 2 * w), Block(2 * w), down(2 * w, 4 * w))
        self.body = nn.Sequential(Block(4 * w), Block(4 * w, 2), Block(4 * w, 2), Block(4 * w))
        self.head = nn.Conv2d(4 * w, 5, 1)
        nn.init.constant_(self.head.bias[:1], -3.0)  # faces are rare: start from "none"

    def forward(self, image: Tensor) -> Tensor:
        return self.head(self.body(self.stem((image - 0.5) * 4)))


class LandmarkNet(nn.Module):
    """Crops [B,3,96,96] 0..1 -> points [B,68,2] in crop pixels, logit [B] of there being a face.

    Points are the means of 68 soft heat maps of 24 x 24 cells (Nibali et al. 2018, "Numerical coordinate
    regression with convolutional neural networks").
    """

    def __init__(self, width: int = 24):
        super().__init__()
        w = width
        self.fine = nn.Sequential(down(3, 16), down(16, w), Block(w), Block(w))
        self.middle = nn.Sequential(down(w, 2 * w), Block(2 * w), Block(2 * w))
        self.coarse = nn.Sequential(down(2 * w, 4 * w), Block(4 * w), Block(4 * w))
        self.to_middle = nn.Sequential(nn.Conv2d(4 * w, 2 * w, 1), nn.BatchNorm2d(2 * w))
        self.up_middle = Block(2 * w)
        self.to_fine = nn.Sequential(nn.Conv2d(2 * w, w * 3 // 2, 1), nn.BatchNorm2d(w * 3 // 2))
        self.skip_fine = nn.Conv2d(w, w * 3 // 2, 1)
        self.up_fine = Block(w * 3 // 2)
        self.maps = nn.Conv2d(w * 3 // 2, 68, 1)
        self.face = nn.Linear(4 * w, 1)
        self.register_buffer("mean_shape", torch.zeros(68, 2))  # crop pixels, an upright, well framed face

    def heat_maps(self, crops: Tensor) -> tuple[Tensor, Tensor]:
        """Logits [B,68,24,24] of the points' cells, logit [B] of a face."""
        fine = self.fine((crops - 0.5) * 4)
        middle = self.middle(fine)
        coarse = self.coarse(middle)
        x = F.interpolate(self.to_middle(coarse), scale_factor=2, mode="bilinear", align_corners=False)
        x = self.up_middle(F.relu(x + middle))
        x = F.interpolate(self.to_fine(x), scale_factor=2, mode="bilinear", align_corners=False)
        maps = self.maps(self.up_fine(F.relu(x + self.skip_fine(fine))))
        return maps, self.face(coarse.mean((2, 3)))[:, 0]

    def forward(self, crops: Tensor) -> tuple[Tensor, Tensor]:
        maps, face = self.heat_maps(crops)
        return soft_argmax(maps), face


def soft_argmax(maps: Tensor) -> Tensor:
    """Mean position under softmax(maps): [B,K,h,w] logits -> [B,K,2] in pixels of a CROP-sized picture."""
    h, w = maps.shape[-2:]
    p = maps.float().flatten(2).softmax(-1).reshape(maps.shape)
    cell = CROP / w
    x = (torch.arange(w, device=maps.device) + 0.5) * cell - 0.5
    y = (torch.arange(h, device=maps.device) + 0.5) * cell - 0.5
    return torch.stack([(p.sum(2) * x).sum(-1), (p.sum(3) * y).sum(-1)], -1)


@dataclass(frozen=True)
class FaceNetworks:
    """The two networks as `load` gives them, in evaluation mode, float32."""

    finder: FaceNet
    landmarks: LandmarkNet

    def to(self, device) -> FaceNetworks:
        """Move both."""
        return FaceNetworks(self.finder.to(device), self.landmarks.to(device))


def from_tensors(tensors: dict[str, Tensor]) -> FaceNetworks:
    """Build the networks from a checkpoint's tensors ("finder.*" and "landmarks.*", any float type).

    Raises ValueError when tensors are missing or do not fit.
    """
    with torch.device("meta"):  # draws no random numbers
        nets = FaceNetworks(FaceNet(), LandmarkNet())
    for name in ("finder", "landmarks"):
        part = {k[len(name) + 1 :]: v for k, v in tensors.items() if k.startswith(name + ".")}
        part = {k: v.float() if v.is_floating_point() else v for k, v in part.items()}
        net = getattr(nets, name)
        try:
            net.load_state_dict(part, assign=True)
        except RuntimeError as error:
            reason = str(error).splitlines()[-1].strip()
            raise ValueError(f"this is no landmark checkpoint: {reason}") from error
        net.eval().requires_grad_(False)
    return nets


@functools.cache
def _own() -> FaceNetworks:
    with torch.inference_mode(False):
        return from_tensors(files.read(files.ASSETS / "landmarks.safetensors")[0])


def default_networks(device: str = "cpu") -> FaceNetworks:
    """The networks that come with the pack, read once; they move to where they are asked for last."""
    with torch.inference_mode(False):
        return _own().to(device)


def find_faces(
    image: Tensor,
    networks: FaceNetworks | None = None,
    smallest: float = 1 / 16,
    threshold: float = 0.7,
    limit: int = 64,
) -> tuple[Tensor, Tensor]:
    """Faces in a photo, the largest first.

    image [1,3,H,W] RGB 0..1 (grey and RGBA too); smallest: side of the smallest face, in long sides.
    Returns boxes [N,4] px and scores [N] 0..1.
    Raises NoFaceError if there is none, ValueError if it is no picture.
    """
    image = _check(image)
    networks = networks or default_networks(str(image.device))
    photo = _resize(image, min(1.0, LONG_SIDE / max(image.shape[-2:])))
    boxes, scores = _candidates(photo, networks.finder, smallest)
    likely = (scores > threshold**2).nonzero()[:limit, 0]  # the others cannot pass any more
    boxes, scores = boxes[likely], scores[likely]
    if len(boxes):
        points, face = _two_passes(photo, boxes, networks.landmarks)
        # The finder looks for something face-like, the landmark network says whether a face is in the crop.
        scores = (scores * face.sigmoid()).sqrt()
        boxes = bounding_boxes(points)
        keep = scores > threshold
        boxes, scores = boxes[keep], scores[keep]
        keep = _suppress(boxes, scores)
        boxes, scores = boxes[keep], scores[keep]
    if not len(boxes):
        h, w = image.shape[-2:]
        raise NoFaceError(
            f"no face found in this picture of {w} x {h} px: use a photo with a face that is at least 20 px "
            f"wide, seen from the front and not upside down, or hand in the landmarks"
        )
    order = ((boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])).argsort(descending=True)
    return (boxes[order] + 0.5) * _ratio(image, photo) - 0.5, scores[order]


def find_landmarks(image: Tensor, boxes: Tensor, networks: FaceNetworks | None = None) -> Tensor:
    """68 landmarks in each box.

    image [1,3,H,W] RGB 0..1 (grey and RGBA too); boxes [N,4] px as of `find_faces`. Returns [N,68,2] px.
    Raises ValueError for wrong shapes; no boxes give an empty [0,68,2].
    """
    image = _check(image)
    if boxes.ndim != 2 or boxes.shape[1] != 4:
        raise ValueError(f"boxes are [N,4] (x0, y0, x1, y1), got {tuple(boxes.shape)}")
    networks = networks or default_networks(str(image.device))
    boxes = boxes.to(image)
    if not len(boxes):
        return image.new_zeros(0, 68, 2)
    return _two_passes(image, boxes, networks.landmarks)[0]


def bounding_boxes(points: Tensor) -> Tensor:
    """Bounding boxes [N,4] of landmarks [N,K,2]."""
    return torch.cat([points.amin(1), points.amax(1)], 1)


def outside(points: Tensor, size: tuple[int, int]) -> Tensor:
    """Share [N] of landmarks [N,K,2] that lie outside of a picture (H, W)."""
    x, y = points.unbind(-1)
    return ((x < -0.5) | (y < -0.5) | (x > size[1] - 0.5) | (y > size[0] - 0.5)).float().mean(1)


def similarity(points: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Least-squares similarity from `target` [K,2] to each `points` [N,K,2] (Umeyama 1991, in the plane).

    Returns A [N,2,2] and b [N,2] with points ~ A target + b.
    """
    mean, target_mean = points.mean(1), target.mean(0)
    p, q = points - mean[:, None], target - target_mean
    norm = q.square().sum()
    c = (p * q).sum((1, 2)) / norm
    s = (p[..., 1] * q[..., 0] - p[..., 0] * q[..., 1]).sum(1) / norm
    a = torch.stack([torch.stack([c, -s], -1), torch.stack([s, c], -1)], 1)
    return a, mean - a @ target_mean


def crop(image: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Landmark network's inputs [N,3,96,96] from one picture: crop pixel q shows photo pixel A q + b."""
    to_photo = torch.eye(3).to(image).repeat(len(a), 1, 1)
    to_photo[:, :2, :2], to_photo[:, :2, 2] = a, b
    frame = Crop(torch.linalg.inv(to_photo), CROP, padding="border")
    return torch.cat([frame[i].apply(image) for i in range(len(a))])


def box_frame(boxes: Tensor) -> tuple[Tensor, Tensor]:
    """Upright crop frames (A, b) around boxes [N,4], for `crop`."""
    centre = (boxes[:, :2] + boxes[:, 2:]) / 2
    side = (boxes[:, 2:] - boxes[:, :2]).amax(1).clamp_min(1.0)
    a = (side * FRAME / CROP)[:, None, None] * torch.eye(2, device=boxes.device)
    return a, centre - a @ centre.new_full((2,), (CROP - 1) / 2)


MIRROR = torch.tensor(
    [*range(16, -1, -1), *range(26, 16, -1), *range(27, 31), *range(35, 30, -1)]
    + [45, 44, 43, 42, 47, 46, 39, 38, 37, 36, 41, 40]
    + [54, 53, 52, 51, 50, 49, 48, 59, 58, 57, 56, 55, 64, 63, 62, 61, 60, 67, 66, 65]
)  # landmark i of a mirrored face is landmark MIRROR[i] of the face


def _two_passes(image: Tensor, boxes: Tensor, net: LandmarkNet) -> tuple[Tensor, Tensor]:
    """Predict in the box's frame, then twice in the frame of the landmarks found (as seen, and mirrored)."""
    with torch.no_grad():
        a, b = box_frame(boxes)
        points, _ = net(crop(image, a, b))
        points = points @ a.mT + b[:, None]
        a, b = similarity(points, net.mean_shape)
        crops = crop(image, a, b)
        found, face = net(torch.cat([crops, crops.flip(-1)]))
        seen, mirrored = found.chunk(2)
        mirrored = mirrored[:, MIRROR.to(seen.device)]
        mirrored = torch.stack([CROP - 1 - mirrored[..., 0], mirrored[..., 1]], -1)
        points = ((seen + mirrored) / 2) @ a.mT + b[:, None]
    return points, face.view(2, -1).mean(0)


def _candidates(photo: Tensor, net: FaceNet, smallest: float) -> tuple[Tensor, Tensor]:
    """Boxes and scores from all pyramid levels, overlaps removed, the surest first."""
    boxes, scores = [], []
    long_side = max(photo.shape[-2:])
    size = min(1.25 * SMALLEST / smallest, float(LONG_SIDE))
    while size > 0.6 * LARGEST:
        level = _resize(photo, size / long_side)
        pad = 2 * STRIDE
        right, bottom = -level.shape[-1] % STRIDE, -level.shape[-2] % STRIDE
        with torch.no_grad():
            out = net(F.pad(level, (pad, pad + right, pad, pad + bottom), mode="replicate"))[0]
        box, score = decode(out)
        boxes.append((box - pad + 0.5) * _ratio(photo, level) - 0.5)
        scores.append(score)
        size /= 1.6
    if not boxes:
        return photo.new_zeros(0, 4), photo.new_zeros(0)
    box, score = torch.cat(boxes), torch.cat(scores)
    keep = _suppress(box, score)
    return box[keep], score[keep]


def decode(out: Tensor, threshold: float = 0.2) -> tuple[Tensor, Tensor]:
    """FaceNet's answer [5,h,w] for one picture -> boxes [N,4] px, scores [N]: peaks over the threshold."""
    score = out[0].sigmoid()
    peak = F.max_pool2d(score[None, None], 3, 1, 1)[0, 0] == score
    y, x = torch.nonzero(peak & (score > threshold), as_tuple=True)
    dx, dy, w, h = out[1:, y, x]
    cx, cy = (x + 0.5 + dx) * STRIDE - 0.5, (y + 0.5 + dy) * STRIDE - 0.5
    w, h = w.clamp(-2, 2).exp() * FACE / 2, h.clamp(-2, 2).exp() * FACE / 2
    return torch.stack([cx - w, cy - h, cx + w, cy + h], -1), score[y, x]


def _suppress(boxes: Tensor, scores: Tensor, overlap: float = 0.4) -> Tensor:
    """Indices of the boxes kept, the surest first: none overlaps another much or lies inside it."""
    order = scores.argsort(descending=True)[:400]
    boxes = boxes[order]
    low = torch.maximum(boxes[:, None, :2], boxes[None, :, :2])
    high = torch.minimum(boxes[:, None, 2:], boxes[None, :, 2:])
    inter = (high - low).clamp_min(0).prod(-1)
    area = (boxes[:, 2:] - boxes[:, :2]).prod(-1)
    clash = (inter / (area[:, None] + area[None] - inter).clamp_min(1e-6) > overlap) | (
        inter / torch.minimum(area[:, None], area[None]).clamp_min(1e-6) > 0.7
    )
    clash = clash.cpu()
    kept: list[int] = []
    for i in range(len(order)):
        if not clash[i, kept].any():
            kept.append(i)
    return order[kept]


def _check(image: Tensor) -> Tensor:
    """[1,3,H,W] float. Raises ValueError for anything that is not one picture."""
    image = check_image(image)
    if len(image) != 1:
        raise ValueError(f"faces are looked for in one picture at a time, got {len(image)}: loop over them")
    return image


def _resize(image: Tensor, scale: float) -> Tensor:
    """Resize by a factor with antialiasing, at least 1 px."""
    size = [max(1, round(n * scale)) for n in image.shape[-2:]]
    return F.interpolate(image, size=size, mode="bilinear", antialias=True, align_corners=False)


def _ratio(image: Tensor, small: Tensor) -> Tensor:
    """Pixels of `image` per pixel of its smaller copy, [4] as (x, y, x, y)."""
    return torch.tensor([image.shape[-1] / small.shape[-1], image.shape[-2] / small.shape[-2]] * 2).to(image)


def face_alignment_landmarks(image: Tensor, boxes: Tensor, model_folder: str | Path) -> Tensor:
    """As `find_landmarks`, by the face_alignment library (Bulat and Tzimiropoulos 2017) if it is there.

    model_folder: where its weights 2DFAN4-HASH.pth.tar already lie; nothing is downloaded.
    Raises ImportError or FileNotFoundError for what is missing, ValueError for a damaged file.
    """
    try:
        import face_alignment
        from face_alignment.models import FAN
    except ImportError as error:
        install = f"{sys.executable} -m pip install 'face_alignment>=1.5'"
        raise ImportError(f"the face_alignment library is not there ({error}): {install}") from error
    weights = _fan_weights(Path(model_folder))

    class Local(face_alignment.FaceAlignment):
        """Takes the weights at hand instead of fetching them."""

        def _load_native(self, network_name, network_size, device, dtype):
            net = FAN(network_size)
            net.load_state_dict(files.read(weights)[0])
            return net.to(device, dtype=dtype).eval()

    image = _check(image)
    device = image.device.type if image.device.type in ("cpu", "cuda", "mps") else "cpu"
    picture = (image[0].permute(1, 2, 0) * 255).round().byte().cpu().numpy()
    boxes = boxes.float().cpu().clone()
    boxes[:, 1] -= 0.25 * (boxes[:, 3] - boxes[:, 1])  # its detector's boxes hold half the forehead
    benchmark = torch.backends.cudnn.benchmark
    try:
        kind = face_alignment.LandmarksType.TWO_D
        # compile=True, its default, fails at the first picture where there is no C++ compiler
        library = Local(kind, device=device, compile=False, face_detector="folder")
        found = library.get_landmarks_from_image(picture, detected_faces=boxes.tolist())
    finally:
        torch.backends.cudnn.benchmark = benchmark  # it switches this on for everybody
    if found is None:
        raise NoFaceError("face_alignment found no landmarks in these boxes: use find_landmarks")
    return torch.stack([torch.as_tensor(points) for points in found]).to(image)


def _fan_weights(folder: Path) -> Path:
    """face_alignment's weights below a folder, checked against the hash in their name."""
    found = sorted(folder.glob("2DFAN4-*.pth.tar"))
    if not found:
        raise FileNotFoundError(f"face_alignment's weights 2DFAN4-11f355bf06.pth.tar are not in {folder}")
    with open(found[0], "rb") as file:
        digest = hashlib.sha256(file.read()).hexdigest()
    if not digest.startswith(found[0].name.removesuffix(".pth.tar").split("-")[1]):
        raise ValueError(f"{found[0]} is damaged: its SHA-256 begins {digest[:10]}. Fetch it again")
    return found[0]
