"""Train and measure the small estimator of cast shadows.

python -m training.estimators shadow --renders DIR [--photos DIR] --out shadow.safetensors

What it learns: the square root of the share of light on the seen facial skin that is lost to cast shadows
(`SynthBatch.dim` of training/synth.py: luminance, before exposure; attached shadows, where a surface turns
away from its lamp, do not count). Every scene is rendered twice, with the lamps' shadows and without, so
that the network has to find what shadows look like and not what lights and faces they come with. Softly lit
photos (--photos) are relit by their fitted heads in the same two ways.
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from rig_core import buffers, checkpoints, data, files
from rig_core.estimators import landmarks, shadow
from training import synth, synth_light, synth_scene

SIZE = shadow.ShadowNet.size
HELD_OUT = 10**6  # seeds from here on are kept for measuring: other persons, lights, poses, places
STRONG = 0.04  # share of lost light above which a picture counts as one with cast shadows
CHUNK = 50  # scenes rendered between two writes


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the `shadow` command."""
    parser.add_argument("--out", type=Path, required=True, help="shadow.safetensors to write")
    parser.add_argument("--renders", type=Path, required=True, help="folder that keeps the rendered scenes")
    parser.add_argument("--photos", type=Path, help="dataset of softly lit photos, 128 px, to relight")
    parser.add_argument("--init", type=Path, help="checkpoint to go on from")
    parser.add_argument("--synth-count", type=int, default=1000, help="scenes, each rendered twice")
    parser.add_argument("--held-out", type=int, default=150, help="scenes kept for measuring")
    parser.add_argument("--steps", type=int, default=1500, help="0 only measures the file --out")
    parser.add_argument("--batch", type=int, default=48)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)


def run(args: argparse.Namespace) -> None:
    """Render what is missing, train, calibrate, measure on held-out persons, write."""
    images, dim = scenes(args.renders, range(args.synth_count))
    unseen, unseen_dim = scenes(args.renders, range(HELD_OUT, HELD_OUT + args.held_out))
    if args.steps:
        net = checkpoints.load_shadow(args.init).requires_grad_(True) if args.init else fresh()
        more = [photo_pairs(args.photos, "train")] if args.photos else []
        every = [torch.cat(x) for x in zip((images, dim), *more)]
        net = train(net, *every, args.steps, args.batch, args.lr, args.seed)
        calibrate(net, images, dim)
        meta = {"kind": "shadow", "scenes": len(every[0]), "steps": args.steps, "seed": args.seed}
        tensors = {k: v.half() if v.ndim > 1 else v for k, v in net.state_dict().items()}
        files.save(args.out, tensors, meta)
    net = checkpoints.load_shadow(args.out)
    print_table("held-out synthetic persons", measure(net, unseen, unseen_dim))
    if args.photos:
        print_table("photos of other persons, relit", measure(net, *photo_pairs(args.photos, "val")))


# --- scenes ---


def hard_light(seed: int, choices: int = 4) -> int:
    """The seed of a light: for odd seeds the least diffuse of several, or strong shadows would be rare."""
    if seed % 2 == 0:
        return seed

    def lamps(light: int) -> float:
        power = synth_scene.sample_light(light)["colour"].sum(1)
        return float(power[: synth_light.AREA].sum() / power.sum())

    return max(range(seed * choices, (seed + 1) * choices), key=lamps)


def pairs(seeds) -> tuple[Tensor, Tensor]:
    """Portraits with cast shadows and the same without: uint8 [N,2,3,128,128]; dim [N] of the first."""
    images, dims = [], []
    for seed in seeds:
        light = [hard_light(seed)]
        shown = synth.render([seed], SIZE, light=light)
        bare = synth.render([seed], SIZE, light=light, shadows=False)
        images.append((torch.cat([shown.image, bare.image]) * 255).round().to(torch.uint8))
        dims.append(shown.dim)
    return torch.stack(images), torch.cat(dims)


def scenes(folder: Path, seeds: range) -> tuple[Tensor, Tensor]:
    """`pairs`, kept in the folder so that a second run does not render them again."""
    folder.mkdir(parents=True, exist_ok=True)
    images, dims = [], []
    for start in range(seeds.start, seeds.stop, CHUNK):
        path = folder / f"scenes-{start:07d}.safetensors"
        if not path.exists():
            image, dim = pairs(range(start, start + CHUNK))
            files.save(path, {"images": image, "dim": dim}, {"kind": "shadow_scenes"})
            print(f"rendered scenes {start} to {start + CHUNK - 1}", flush=True)
        tensors, _ = files.read(path)
        images.append(tensors["images"])
        dims.append(tensors["dim"])
    return torch.cat(images)[: len(seeds)], torch.cat(dims)[: len(seeds)]


def photo_pairs(folder: Path, split: str, limit: int = 400, seed: int = 0) -> tuple[Tensor, Tensor]:
    """`pairs` of softly lit photos relit by their fitted heads: lamp and surroundings, with the shadows that
    the head casts on itself and without. The photos' own faint shadows are neglected."""
    photos, head = data.Dataset.open(folder), checkpoints.load_head()
    index = [i for i, e in enumerate(photos.entries) if "photo" in e.tags and e.split == split][:limit]
    g = torch.Generator().manual_seed(seed)
    images, dims = [], []
    for part in torch.tensor(index).split(8):
        code, draws = photos.codes(part.tolist()), torch.rand(4, len(part), 1, generator=g)
        azimuth, elevation = draws[0] * 3.2 - 1.6, draws[1] * 1.5 - 0.3
        toward = [azimuth.sin() * elevation.cos(), elevation.sin(), azimuth.cos() * elevation.cos()]
        key = torch.cat(toward, 1)
        fragments, normal, _ = buffers.geometry(head, code, SIZE)
        verts = buffers.to_image(head.verts(code.shape, code.exp, code.pose), code)
        soft, depth = 0.02 + 0.28 * draws[2, :, 0], buffers.depth_scale(code)
        seen = buffers.cast_shadow(verts, head.faces, fragments, key, soft, depth)
        on, sky = (fragments.pix_to_face >= 0).float()[:, None], 0.1 + 0.5 * draws[3, ..., None, None]
        cos = (normal * key[..., None, None]).sum(1, keepdim=True).clamp_min(0) * on + 0.5 * (1 - on)
        lamp = torch.stack([cos * (seen * on + 1 - on), cos], 1) * (1 - sky[:, None])
        linear = (photos.images(part.tolist(), SIZE).float() / 255).clamp_min(1e-4)[:, None] ** 2.2
        relit = linear * (sky[:, None] + lamp)
        light = (relit * on[:, None]).mean(2).flatten(2).sum(2)
        relit = relit * (linear.mean((1, 2, 3, 4)) / relit[:, 1].mean((1, 2, 3))).reshape(-1, 1, 1, 1, 1)
        images.append(((relit ** (1 / 2.2)).clamp(0, 1) * 255).round().to(torch.uint8))
        dims.append(1 - light[:, 0] / light[:, 1].clamp_min(1e-6))
    return torch.cat(images), torch.cat(dims).clamp(0, 1)


# --- training ---


def train(net, images: Tensor, dim: Tensor, steps: int, batch: int, lr: float, seed: int) -> shadow.ShadowNet:
    """Squared error of the amount, and of the difference that its shadows make to a scene."""
    g = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    net.train()
    optimiser = torch.optim.AdamW(net.parameters(), lr, weight_decay=0.02)
    rate = torch.optim.lr_scheduler.OneCycleLR(optimiser, lr, total_steps=steps, pct_start=0.1)
    truth = dim.sqrt()
    average = torch.optim.swa_utils.AveragedModel(
        net, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.98), use_buffers=True
    )
    start, total = time.monotonic(), 0.0
    for step in range(1, steps + 1):
        i = torch.randint(len(images), (batch // 2,), generator=g)
        shown, bare = net.amount(augment(images[i].float() / 255, g)).view(2, -1)
        t = truth[i]
        loss = ((shown - t) ** 2 + bare**2 + (shown - bare - t) ** 2).mean() * 30
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimiser.step()
        rate.step()
        average.update_parameters(net)
        total += loss.item()
        if step % 50 == 0:
            print(f"step {step}: loss {total / 50:.4f}, {time.monotonic() - start:.0f} s", flush=True)
            total = 0.0
    return average.module.eval()


def fresh() -> shadow.ShadowNet:
    """A network that knows what a face looks like (from the landmark network) and says 0."""
    net = shadow.ShadowNet()
    known = landmarks.default_networks().landmarks
    with torch.no_grad():
        for mine, its in zip(
            net.face.state_dict().values(),
            [*known.fine.state_dict().values(), *known.middle.state_dict().values()],
            strict=True,
        ):
            mine.copy_(its)
        net.head.weight.zero_()
        net.head.bias.zero_()
    return net


def augment(pair: Tensor, g: torch.Generator) -> Tensor:
    """[N,2,3,S,S] -> [2N,3,S,S], all first ones, then all second ones, each pair changed alike: mirrored,
    moved, turned, scaled, other exposure, contrast, colours, sharpness, noise, sometimes grey."""
    n, s = len(pair), pair.shape[-1]
    u = lambda low, high, *shape: low + (high - low) * torch.rand(n, *shape, generator=g)  # noqa: E731
    angle, zoom = u(-0.2, 0.2), u(0.85, 1.1)
    mirror = (u(0, 1) < 0.5).float() * 2 - 1
    move = u(-0.08, 0.08, 2)
    theta = torch.stack(
        [angle.cos() * zoom * mirror, -angle.sin() * zoom, move[:, 0]]
        + [angle.sin() * zoom * mirror, angle.cos() * zoom, move[:, 1]],
        1,
    ).view(n, 2, 3)
    x = pair.flatten(1, 2)
    x = F.grid_sample(
        x, F.affine_grid(theta, list(x.shape), False), padding_mode="reflection", align_corners=False
    )
    x = x.view(n, 2, 3, s, s)
    grey = x.mean(2, keepdim=True)
    x = grey + (x - grey) * (u(0, 1.4) * (u(0, 1) > 0.1))[:, None, None, None, None]
    x = x * torch.exp(u(-0.15, 0.15, 1, 3, 1, 1))
    x = x.clamp_min(1e-4) ** torch.exp(u(-0.35, 0.35))[:, None, None, None, None]
    x = (x - 0.5) * u(0.75, 1.25)[:, None, None, None, None] + 0.5 + u(-0.1, 0.1)[:, None, None, None, None]
    soft = F.avg_pool2d(x.flatten(1, 2), 3, 1, 1).view_as(x)
    x = torch.lerp(x, soft, u(-0.4, 1.0)[:, None, None, None, None])
    x = x + torch.randn(x.shape, generator=g) * (u(0, 1) ** 3 * 0.05)[:, None, None, None, None]
    return x.clamp(0, 1).transpose(0, 1).flatten(0, 1)


@torch.no_grad()
def amounts(net: shadow.ShadowNet, images: Tensor, batch: int = 64) -> Tensor:
    """`net.amount` of uint8 images [N,2,3,S,S] -> [N,2]."""
    flat = images.flatten(0, 1)
    return torch.cat([net.amount(x.float() / 255) for x in flat.split(batch)]).view(-1, 2)


def calibrate(net: shadow.ShadowNet, images: Tensor, dim: Tensor) -> None:
    """To the published scale, which is that of a logistic classifier without its bias: fit one to the
    amounts, strong cast shadows against weaker or none, and move its 0 to where the published one has it."""
    amount = amounts(net, images).T.flatten().double()
    strong = torch.cat([dim > STRONG, torch.zeros(len(dim), dtype=torch.bool)]).double()
    w = torch.zeros(2, dtype=torch.float64)
    x = torch.stack([amount, torch.ones_like(amount)], 1)
    for _ in range(30):  # Newton; a little ridge keeps separable cases finite
        p = torch.sigmoid(x @ w)
        hessian = (x.T * (p * (1 - p))) @ x + 1e-3 * torch.eye(2, dtype=torch.float64)
        w = w - torch.linalg.solve(hessian, x.T @ (p - strong) + 1e-3 * w)
    net.calibration.copy_(w + torch.tensor([0.0, shadow.UNDECIDED]))


# --- measuring ---


def measure(net: shadow.ShadowNet, images: Tensor, dim: Tensor) -> dict[str, float]:
    """Area under the ROC curve, rank correlation, share of scenes whose scalar falls without shadows."""
    gain, offset = net.calibration.tolist()
    s = amounts(net, images) * gain + offset
    every, truth = s.T.flatten(), torch.cat([dim, torch.zeros_like(dim)])
    falls = s[:, 0] > s[:, 1]
    result = {
        f"AUC, lost light above {STRONG} or not, as rendered": auc(s[:, 0], dim > STRONG),
        "AUC, with those without shadows": auc(every, truth > STRONG),
        "AUC, lost light above 0.1 or none": auc(
            torch.cat([s[dim > 0.1, 0], s[:, 1]]), torch.cat([dim[dim > 0.1], 0 * dim]) > 0
        ),
        "rank correlation, as rendered": spearman(s[:, 0], dim),
        "rank correlation, with those without shadows": spearman(every, truth),
        "falls without shadows": falls.float().mean().item(),
        f"falls without shadows, where more than {STRONG} was lost": falls[dim > STRONG]
        .float()
        .mean()
        .item(),
    }
    for name, values in (("strong", s[dim > STRONG, 0]), ("none", s[:, 1])):
        for q in (0.05, 0.5, 0.95):
            result[f"scalar, {name}, quantile {q}"] = values.quantile(q).item() if len(values) else math.nan
    return result


def print_table(title: str, values: dict[str, float]) -> None:
    print(f"{title}:")
    for name, value in values.items():
        print(f"  {name}: {value:.3f}")


def ranks(x: Tensor) -> Tensor:
    """0.., equal values sharing their mean rank."""
    values, index, count = x.unique(return_inverse=True, return_counts=True)
    last = count.cumsum(0)
    return ((last - 1) + (last - count)).double()[index] / 2


def spearman(a: Tensor, b: Tensor) -> float:
    return torch.corrcoef(torch.stack([ranks(a), ranks(b)]))[0, 1].item()


def auc(score: Tensor, positive: Tensor) -> float:
    """Chance that a positive scores above a negative; NaN where there are none of one kind."""
    n, m = int(positive.sum()), int((~positive).sum())
    return ((ranks(score)[positive].sum() - n * (n - 1) / 2) / (n * m)).item() if n and m else math.nan
