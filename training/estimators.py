"""Train and measure the small estimators that come with the pack.

python -m training.estimators landmarks --faces DIR [--synth DIR] --out landmarks.safetensors
python -m training.estimators evaluate --faces DIR [--portraits DIR] [--synth DIR] [--model FILE]
python -m training.estimators identity --synth DIR [--photos DIR] --out identity.safetensors
python -m training.estimators shadow --help
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from rig_core import files
from rig_core.estimators import landmarks as lm
from training import face_crops as fc
from training import identity

INNER = slice(17, 68)  # all but the jaw


def landmark_loss(net: lm.LandmarkNet, crops: Tensor, points: Tensor, wrong: Tensor, map_weight: float):
    """Mean distance in pixels / 4, cross entropy of the heat maps, cross entropy of "is a face"."""
    maps, face = net.heat_maps(torch.cat([crops, wrong]))
    maps = maps[: len(crops)]
    inside = ((points > -2) & (points < lm.CROP + 1)).all(-1)
    error = (lm.soft_argmax(maps) - points).abs().sum(-1)
    cell = lm.CROP / maps.shape[-1]
    centre = (torch.arange(maps.shape[-1]) + 0.5) * cell - 0.5
    gx, gy = (torch.exp(-(((points[..., i, None] - centre) / cell) ** 2) / 2) for i in (0, 1))
    target = (gy[..., :, None] * gx[..., None, :]).flatten(2)
    target = target / target.sum(-1, keepdim=True).clamp_min(1e-6)
    entropy = -(target * maps.flatten(2).log_softmax(-1)).sum(-1)
    is_face = torch.cat([torch.ones(len(crops)), torch.zeros(len(wrong))])
    return (
        (error * inside).sum() / inside.sum() / 4
        + map_weight * (entropy * inside).sum() / inside.sum()
        + 0.3 * F.binary_cross_entropy_with_logits(face, is_face)
    )


def finder_loss(net: lm.FaceNet, scenes: Tensor, boxes: Tensor) -> Tensor:
    """Focal loss on centres (Zhou et al. 2019, "Objects as points") and smooth L1 on offset and size."""
    out = net(scenes)
    cells = out.shape[-1]
    at = (torch.arange(cells) + 0.5) * lm.STRIDE - 0.5
    some = ~boxes[:, 0].isnan()
    boxes = torch.where(some[:, None], boxes, torch.tensor([-99.0, -99.0, -98.0, -98.0]))
    centre, wh = (boxes[:, :2] + boxes[:, 2:]) / 2, (boxes[:, 2:] - boxes[:, :2]).clamp_min(1)
    size = wh.amax(1)
    right = some & (size >= lm.SMALLEST) & (size <= lm.LARGEST)
    near = some & ~right & (size > 0.75 * lm.SMALLEST) & (size < 1.33 * lm.LARGEST)
    dx = (centre[:, 0, None, None] - at[None, None, :]) / lm.STRIDE
    dy = (centre[:, 1, None, None] - at[None, :, None]) / lm.STRIDE
    sigma = (size / lm.STRIDE / 6).clamp_min(0.5)[:, None, None]
    heat = torch.exp(-(dx**2 + dy**2) / (2 * sigma**2))
    # the cell that holds the centre counts as hit
    hit = (dx.abs() <= 0.5) & (dy.abs() <= 0.5)
    heat = torch.where(hit, torch.ones(()), heat) * right[:, None, None]
    half = wh[:, :, None, None] / 2 / lm.STRIDE
    within = (dx.abs() < half[:, 0]) & (dy.abs() < half[:, 1])
    weight = 1 - (within & near[:, None, None]).float()
    logit = out[:, 0]
    p = logit.sigmoid()
    is_hit = heat == 1
    yes, no = -F.logsigmoid(logit) * (1 - p) ** 2, -F.logsigmoid(-logit) * p**2 * (1 - heat) ** 4
    loss = torch.where(is_hit, yes, no)
    loss = (loss * weight).sum() / is_hit.sum().clamp_min(1)
    log_w, log_h = (wh / lm.FACE).log()[:, :, None, None].unbind(1)
    want = torch.stack(torch.broadcast_tensors(dx, dy, log_w, log_h), 1)
    strong = (heat > 0.4)[:, None]
    box = F.smooth_l1_loss(out[:, 1:], want, reduction="none", beta=0.2) * strong
    return loss + 2 * box.sum() / strong.sum().clamp_min(1) / 4


def train(net: nn.Module, loss_of, steps: int, lr: float, name: str, save) -> None:
    """AdamW, learning rate up over 100 steps and down by a cosine. save(averaged network) ten times."""
    average = copy.deepcopy(net).eval()
    net.train().to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(net.parameters(), lr=lr, weight_decay=1e-3)
    start, mean = time.time(), 0.0
    for step in range(1, steps + 1):
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1, step / 100) * (0.5 + 0.5 * math.cos(math.pi * step / (steps + 1)))
        loss = loss_of(net, step / steps)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 5.0)
        optimizer.step()
        decay = min(0.998, (1 + step) / (10 + step))
        with torch.no_grad():
            for slow, fast in zip(average.state_dict().values(), net.state_dict().values()):
                slow.lerp_(fast, 1 - decay) if slow.is_floating_point() else slow.copy_(fast)
        mean += (float(loss.detach()) - mean) / min(step, 100)
        if step % max(1, steps // 10) == 0:
            print(f"{name} step {step} of {steps}  loss {mean:.4f}  {time.time() - start:.0f} s", flush=True)
            save(average)


def train_landmarks(args: argparse.Namespace) -> None:
    """Both networks on the portraits' training part (and renders); writes one checkpoint."""
    torch.manual_seed(args.seed)
    faces, names = fc.load_portraits(args.faces)
    faces, _ = fc.split(faces, names)
    if args.synth:
        faces = fc.join(faces, fc.load_synth(args.synth, args.synth_limit))
    bank = fc.texture(1500, faces)
    print(f"{len(faces)} training faces", flush=True)
    nets = lm.FaceNetworks(lm.FaceNet(), lm.LandmarkNet())
    nets.landmarks.mean_shape.copy_(fc.mean_shape(faces.points))
    if args.init:
        nets = lm.from_tensors(files.read(args.init)[0])
    nets.finder.requires_grad_(True), nets.landmarks.requires_grad_(True)
    shape = nets.landmarks.mean_shape.clone()

    def finder_step(net, done):
        return finder_loss(net, *fc.face_scenes(faces, bank, args.batch))

    def landmark_step(net, done):
        crops, points = fc.landmark_crops(faces, bank, shape, args.batch)
        wrong = fc.wrong_crops(faces, bank, taken, args.batch // 6)
        return landmark_loss(net, crops, points, wrong, 0.1 * (1 - done))

    meta = {"kind": "landmarks", "faces": len(faces), "seed": args.seed, "init": bool(args.init)}
    meta |= {"finder_steps": args.finder_steps, "landmark_steps": args.landmark_steps, "batch": args.batch}
    finder, points = copy.deepcopy(nets.finder).eval(), copy.deepcopy(nets.landmarks).eval()  # written

    def save():
        files.save(args.out, tensors_of(finder, points), meta)

    def keep(target):
        def kept(average):
            target.load_state_dict(average.state_dict())
            save()

        return kept

    train(nets.finder, finder_step, args.finder_steps, args.lr, "faces", keep(finder))
    taken = fc.mistakes(finder, faces, bank, min(2000, 50 * args.landmark_steps))
    print(f"{len(taken)} crops that the face network mistook", flush=True)
    train(nets.landmarks, landmark_step, args.landmark_steps, args.lr, "landmarks", keep(points))
    save()
    print(f"wrote {args.out} ({args.out.stat().st_size / 2**20:.2f} MB)")


def tensors_of(finder: lm.FaceNet, points: lm.LandmarkNet) -> dict[str, Tensor]:
    """The checkpoint's tensors, half precision but for the mean shape."""
    tensors = {f"finder.{k}": v for k, v in finder.state_dict().items()}
    tensors |= {f"landmarks.{k}": v for k, v in points.state_dict().items()}
    tensors = {k: v.half() if v.is_floating_point() else v for k, v in tensors.items()}
    tensors["landmarks.mean_shape"] = points.mean_shape.float()
    return {k: v.contiguous() for k, v in tensors.items()}


def read_photo(path: Path) -> Tensor:
    """[1,3,H,W] 0..1."""
    array = np.asarray(Image.open(path).convert("RGB"))
    return torch.from_numpy(array.copy()).permute(2, 0, 1)[None].float() / 255


def measure(photo: Tensor, truth: Tensor, nets: lm.FaceNetworks) -> tuple[float, float, float, int]:
    """One photo with one known face: NME of 68 and of the 51 inner points in per cent of the distance of the
    outer eye corners (NaN when missed), IoU of the best box, number of other boxes."""
    try:
        boxes, _ = lm.find_faces(photo, nets)
    except lm.NoFaceError:
        return math.nan, math.nan, 0.0, 0
    true = lm.bounding_boxes(truth[None])[0]
    low, high = torch.maximum(boxes[:, :2], true[:2]), torch.minimum(boxes[:, 2:], true[2:])
    inter = (high - low).clamp_min(0).prod(-1)
    area = (boxes[:, 2:] - boxes[:, :2]).prod(-1) + (true[2:] - true[:2]).prod()
    iou, best = (inter / (area - inter)).max(0)
    if iou < 0.4:
        return math.nan, math.nan, float(iou), len(boxes)
    found = lm.find_landmarks(photo, boxes[best][None], nets)[0]
    error = (found - truth).norm(dim=-1) / (truth[36] - truth[45]).norm() * 100
    return float(error.mean()), float(error[INNER].mean()), float(iou), len(boxes) - 1


def rotated(photo: Tensor, truth: Tensor, degrees: float) -> tuple[Tensor, Tensor]:
    """The same photo turned about its centre, edges extended."""
    h, w = photo.shape[-2:]
    r = fc.rotation(torch.tensor([math.radians(degrees)]))[0]
    centre = torch.tensor([(w - 1) / 2, (h - 1) / 2])
    y, x = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
    source = (torch.stack([x, y], -1).float() - centre) @ r.T + centre
    grid = (source + 0.5) / torch.tensor([w, h]) * 2 - 1
    turned = F.grid_sample(photo, grid[None], padding_mode="border", align_corners=False)
    return turned, (truth - centre) @ r + centre


def evaluate(args: argparse.Namespace) -> str:
    """Markdown table of landmark error and face recall on held-out portraits."""
    nets = lm.from_tensors(files.read(args.model)[0]) if args.model else lm.default_networks()
    sets: dict[str, list[tuple[Tensor, Tensor]]] = {}
    faces, names = fc.load_portraits(args.faces)
    _, held = fc.split(faces, names)
    plain = [(image[None].float() / 255, points) for image, points in zip(held.levels[0], held.points)]
    sets[f"validation portraits ({len(plain)})"] = plain
    sets["  turned by 25 degrees"] = [rotated(*p, 25.0) for p in plain]
    small = zip(held.levels[2], (held.points + 0.5) / 4 - 0.5)
    sets["  at 64 px"] = [(image[None].float() / 255, points) for image, points in small]
    if args.synth:
        drawn = fc.load_synth(args.synth, args.synth_limit)
        plain = [(image[None].float() / 255, points) for image, points in zip(drawn.levels[0], drawn.points)]
        sets[f"renders ({len(plain)})"] = plain
    if args.portraits:
        for path in sorted(args.portraits.glob("*.json")):
            record = json.loads(path.read_text())
            image = next(p for p in (path.with_suffix(".jpg"), path.with_suffix(".png")) if p.exists())
            truth = torch.tensor(record["landmarks"], dtype=torch.float32)
            sets.setdefault("other photos", []).append((read_photo(image), truth))
            sets[f"  {path.stem}"] = [sets["other photos"][-1]]
    rows = ["| set | found | other boxes | NME % 68 points | 51 inner | median 68 |", "| --- " * 6 + "|"]
    for title, photos in sets.items():
        results = np.array([measure(photo, truth, nets) for photo, truth in photos])
        found = ~np.isnan(results[:, 0])
        nme = results[found, 0]
        numbers = "- | - | -"
        if found.any():
            numbers = f"{nme.mean():.2f} | {results[found, 1].mean():.2f} | {np.median(nme):.2f}"
        rows.append(f"| {title} | {found.sum()} of {len(found)} | {results[:, 3].sum():.0f} | {numbers} |")
    table = "\n".join(rows)
    print(table)
    return table


def main() -> None:
    """Command line."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    commands = parser.add_subparsers(dest="command", required=True)
    p = commands.add_parser("landmarks", help="train the face finder and the landmark network")
    p.add_argument("--faces", type=Path, required=True, help="images/, names.json, landmarks.safetensors")
    p.add_argument("--synth", type=Path, help="folder that training.synth wrote")
    p.add_argument("--synth-limit", type=int, default=1500)
    p.add_argument("--out", type=Path, required=True)
    p.add_argument("--init", type=Path, help="checkpoint to go on from")
    p.add_argument("--finder-steps", type=int, default=1500, help="0 keeps the finder of --init")
    p.add_argument("--landmark-steps", type=int, default=3000, help="0 keeps the landmark network of --init")
    p.add_argument("--batch", type=int, default=48)
    p.add_argument("--lr", type=float, default=2e-3)
    p.add_argument("--seed", type=int, default=0)
    p = commands.add_parser("evaluate", help="print the error table")
    p.add_argument("--faces", type=Path, required=True)
    p.add_argument("--portraits", type=Path, help="photos with a JSON of landmarks each")
    p.add_argument("--synth", type=Path, help="renders that were not trained on")
    p.add_argument("--synth-limit", type=int, default=100)
    p.add_argument("--model", type=Path, help="default: the one that comes with the pack")
    identity.add_arguments(commands.add_parser("identity", help="train or measure the identity encoder"))
    if "shadow" in sys.argv[1:2]:  # the others do without what it imports
        from training import shadow

        shadow.add_arguments(commands.add_parser("shadow", help="train or measure the shadow estimator"))
    args = parser.parse_args()
    if args.command == "shadow":
        shadow.run(args)
    elif args.command == "identity":
        identity.run(args)
    else:
        train_landmarks(args) if args.command == "landmarks" else evaluate(args)


if __name__ == "__main__":
    main()
