"""Times of every part, each beside a plain reference in the same run: `python run.py bench [--out FILE]`.

    python -m training.bench [--threads N] [--device cpu|cuda] [--quick] [--out bench.md]

Ours and the reference take turns, so that a busy machine slows both; medians of wall-clock milliseconds.
"""

from __future__ import annotations

import argparse
import copy
import os
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from rig_core import (
    align,
    buffers,
    checkpoints,
    composite,
    diffusion,
    light_prior,
    pipeline,
    raster,
    samplers,
)
from rig_core.denoisers.rig import DiffusionRig, RigConfig
from rig_core.estimators import landmark_fit, landmarks

# pytorch3d 0.7.9, CPU build, FLAME-sized head, two idle cores: measured once, elsewhere. To compare only.
PYTORCH3D = {
    ("rasterise", 256, 1): 1466, ("rasterise", 256, 8): 11900, ("rasterise", 512, 1): 5520,
    ("rasterise", 512, 8): 45300, ("buffers", 256, 1): 1486, ("buffers", 256, 8): 11960,
    ("buffers", 512, 1): 5690, ("buffers", 512, 8): 44900,
}  # fmt: skip


@dataclass(frozen=True)
class Row:
    """One line of the table. reference: what `reference_ms` is the time of."""

    part: str
    ms: float
    reference: str = ""
    reference_ms: float | None = None
    target: str = ""


def synchronize() -> None:
    """Wait for the GPU, if there is one in use."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.synchronize()


def median_ms(repeats: int, *jobs: Callable[[], object]) -> list[float]:
    """Median time of each job; the jobs take turns after one warm-up each."""
    times: list[list[float]] = [[] for _ in jobs]
    for turn in range(repeats + 1):
        for job, spent in zip(jobs, times):
            synchronize()
            start = time.perf_counter()
            job()
            synchronize()
            if turn:
                spent.append((time.perf_counter() - start) * 1000)
    return [statistics.median(spent) for spent in times]


def loop_rasterize(verts: Tensor, faces: Tensor, size: int) -> Tensor:
    """The plain way: one triangle after another into a depth buffer. verts [V,3] -> face per pixel [H,W]."""
    depth = torch.full((size, size), torch.inf, device=verts.device)
    owner = torch.full((size, size), -1, dtype=torch.long, device=verts.device)
    centre = -1 + (2 * torch.arange(size, device=verts.device) + 1) / size
    corners = verts[faces]
    low = ((corners[..., :2].amin(1) + 1) * size / 2 - 1).floor().clamp(0, size).long().tolist()
    high = ((corners[..., :2].amax(1) + 1) * size / 2 + 1).ceil().clamp(0, size).long().tolist()

    def edge(a: Tensor, b: Tensor, x: Tensor, y: Tensor) -> Tensor:
        return (x - a[0]) * (b[1] - a[1]) - (y - a[1]) * (b[0] - a[0])

    for i, (v0, v1, v2) in enumerate(corners):
        (x0, y0), (x1, y1) = low[i], high[i]
        if x0 >= x1 or y0 >= y1:
            continue
        x, y = centre[x0:x1], centre[y0:y1, None]
        area = edge(v0, v1, v2[0], v2[1]) + 1e-8
        w0, w1, w2 = edge(v1, v2, x, y) / area, edge(v2, v0, x, y) / area, edge(v0, v1, x, y) / area
        z = w0 * v0[2] + w1 * v1[2] + w2 * v2[2]
        window = depth[y0:y1, x0:x1]
        nearer = (w0 > 0) & (w1 > 0) & (w2 > 0) & (z < window)
        depth[y0:y1, x0:x1] = torch.where(nearer, z, window)
        owner[y0:y1, x0:x1] = torch.where(nearer, i, owner[y0:y1, x0:x1])
    return owner


def bench_raster(head, size: int, batch: int, repeats: int, device: str) -> list[Row]:
    """Rasteriser and buffers; the reference: pytorch3d if it imports, else `loop_rasterize` of one head."""
    code = head.mean_code(batch, size).to(device)
    verts = buffers.to_image(head.verts(code.shape, code.exp, code.pose), code)
    verts = verts + verts.new_tensor([0.0, 0.0, buffers.DEPTH_OFFSET])

    def draw(backend: str = "torch"):
        return raster.rasterize(verts, head.faces, (size, size), backend=backend)

    ours, render = median_ms(max(3, repeats // batch), draw, lambda: buffers.render(head, code, size))
    try:
        draw("pytorch3d")
        reference, ms = "pytorch3d", median_ms(1, lambda: draw("pytorch3d"))[0]
    except ImportError:
        reference = "loop over the triangles" + (f", {batch} x one head" if batch > 1 else "")
        ms = batch * median_ms(1, lambda: loop_rasterize(verts[0], head.faces, size))[0]
    first = (size, batch) == (256, 1)
    where, elsewhere = f"{size} px, batch {batch}", "pytorch3d, elsewhere"
    known, drawn = PYTORCH3D["buffers", size, batch], PYTORCH3D["rasterise", size, batch]
    return [
        Row(f"rasterise {where}", ours, reference, ms, "10 ms" if first else ""),
        Row(f"rasterise {where}", ours, elsewhere, drawn, "200 x"),
        Row(f"all buffers {where}", render, elsewhere, known, "20 ms, 80 x" if first else "80 x"),
    ]


def bench_denoiser(model: DiffusionRig, name: str, size: int, repeats: int, device: str) -> Row:
    """One evaluation against the same weights in plain eager PyTorch (tests/plain_unet.py)."""
    from tests.plain_unet import plain_forward

    x = torch.randn(1, 3, size, size, device=device)
    physical, t = torch.randn(1, 9, size, size, device=device), torch.tensor([500.0], device=device)
    condition, code = model.condition(physical, x), model.encode(x)
    nchw = copy.deepcopy(model).to(memory_format=torch.contiguous_format)
    ours, plain = median_ms(
        repeats, lambda: model(x, t, condition), lambda: plain_forward(nchw, x, t, physical, code)
    )
    return Row(f"{name}, step at {size} px", ours, "plain eager", plain, "not slower; 1.2 x")


def bench_sampler(model: DiffusionRig, size: int, repeats: int, device: str) -> Row:
    """What the sampler adds to the network, in per cent of a step."""
    inside = 0.0

    def timed(x, t, condition):
        nonlocal inside
        synchronize()
        start = time.perf_counter()
        eps = model(x, t, condition)
        synchronize()
        inside += time.perf_counter() - start
        return eps

    x = torch.randn(1, 3, size, size, device=device)
    condition = model.condition(torch.randn(1, 9, size, size, device=device), x)
    schedule = diffusion.respace(diffusion.linear_schedule(), "quad20")
    shares = []
    for turn in range(max(2, repeats // 2) + 1):
        inside, start = 0.0, time.perf_counter()
        samplers.sample(timed, x, condition, schedule, "ab2")
        synchronize()
        if turn:
            shares.append((time.perf_counter() - start - inside) / inside * 100)
    share = statistics.median(shares)
    return Row(
        f"sampler outside the network, {size} px: {share:.2f} % of a step", float("nan"), target="under 1 %"
    )


def bench_face(head, model: DiffusionRig, photo: Tensor, repeats: int) -> list[Row]:
    """From the photo to the code, and the whole edit."""
    boxes, _ = landmarks.find_faces(photo)
    points = landmarks.find_landmarks(photo, boxes[:1])
    size = model.config.image_size
    h, w = photo.shape[-2:]
    many = points.expand(8, -1, -1)
    photos = photo.expand(8, -1, -1, -1)
    find, mark, fit, fit8 = median_ms(
        repeats,
        lambda: landmarks.find_faces(photo),
        lambda: landmarks.find_landmarks(photo, boxes[:1]),
        lambda: landmark_fit.fit(head, points, (h, w), photo),
        lambda: landmark_fit.fit(head, many, (h, w), photos),
    )

    def edit(yaw: float, azimuth: float) -> Tensor:
        portrait = pipeline.estimate(head, photo, size)
        code = pipeline.turn(head, portrait.code, yaw=yaw)
        light = light_prior.edit(code.light, azimuth, 15.0, mean=head.light_mean, std=head.light_std)
        painted = pipeline.paint(model, head, portrait, code.replace(light=light))
        return pipeline.paste(photo, portrait, painted)

    relight, turn = median_ms(max(2, repeats // 4), lambda: edit(0.0, 60.0), lambda: edit(10.0, 60.0))
    what = f"full edit at {size} px, photo to photo ({pipeline.STEPS} {pipeline.SOLVER})"
    return [
        Row(f"find faces, {w} x {h} px photo", find),
        Row("68 landmarks of a face", mark),
        Row("landmark fit with light and skin, one face", fit, target="300 ms"),
        Row("landmark fit with light and skin, per face of 8", fit8 / 8, target="300 ms"),
        Row(f"{what}: new light", relight),
        Row(f"{what}: new light, turned by 10 degrees", turn),
    ]


def bench_paste(photo: Tensor, repeats: int, lights: int = 16, side: int = 1536) -> Row:
    """Many lights of one face into one large photo, beside one light after the other."""
    large = F.interpolate(photo, (side, side), mode="bicubic", antialias=True).clamp(0, 1)
    crop = align.ffhq_crop(landmarks.find_landmarks(large, landmarks.find_faces(large)[0]), 128)
    before = crop.apply(large)
    ramp = torch.linspace(0.7, 1.3, 128, device=photo.device)
    edits = (before * ramp ** torch.linspace(0.2, 1, lights, device=photo.device).view(-1, 1, 1, 1)).clamp(
        0, 1
    )

    def together():
        return composite.compose(large, [composite.place(large, crop, None, before)], [edits])

    def one_by_one():
        return [composite.paste_back(large, e[None], crop, None, before) for e in edits]

    torch.testing.assert_close(together(), torch.cat(one_by_one()), atol=1e-5, rtol=0)
    ours, plain = median_ms(max(2, repeats // 4), together, one_by_one)
    return Row(f"paste {lights} lights into {side} px", ours, "one after the other", plain)


def bench_relighting(rows: list[Row], head, photo: Tensor, repeats: int, quick: bool) -> str:
    """DiFaReli: its steps, added to the rows, and its own tables as Markdown."""
    from training import bench_relight as relight

    model, name = relight.default_model()
    model = model.to(photo.device).eval().requires_grad_(False)
    for size in (64, 128, 256):
        rows.append(relight.bench_step(model, name, size, repeats, photo.device))
    official = relight.DiFaReli(relight.RelightConfig()).eval().requires_grad_(False)
    official = official.to(photo.device, memory_format=torch.channels_last)
    for size in (64, 128) if quick else (64, 128, 256):
        few, what = max(3, repeats // 3), "official DiFaReli size (149 M), random weights"
        rows.append(relight.bench_step(official, what, size, few, photo.device))
    del official
    edits, published = relight.bench_edits(model, head, photo, max(2, repeats // 4))
    return "\n\n".join(
        [
            relight.edit_table(edits, published),
            relight.explain(published, name, model.config.image_size),
            relight.memory_table(),
        ]
    )


def bench_training(head, photo: Tensor, repeats: int, device: str) -> str:
    """Training beside a plain loop, as Markdown."""
    from training import bench_training as training

    speeds = training.bench_steps(head, (64, 128), repeats, device)
    tables = (training.speed_table(speeds), training.memory_table(), training.disk_table(head, photo))
    return "\n\n".join(tables)


def describe() -> str:
    """The machine in a line."""
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        models = [
            line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if "model name" in line
        ]
        name = models[0] if models else name
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    load = f", load {os.getloadavg()[0]:.1f} at the start" if hasattr(os, "getloadavg") else ""
    return (
        f"{name}, {os.cpu_count()} cores{gpu}; {torch.get_num_threads()} threads{load}; "
        f"torch {torch.__version__}, "
        f"Python {platform.python_version()}, {platform.system()}"
    )


def table(rows: list[Row]) -> str:
    """Markdown."""
    lines = ["| part | median ms | reference | its ms | times faster | target |", "| --- " * 6 + "|"]
    for row in rows:
        ms = "" if row.ms != row.ms else f"{row.ms:.4g}"
        other, ratio = "", ""
        if row.reference_ms is not None:
            other, ratio = f"{row.reference_ms:.4g}", f"{row.reference_ms / row.ms:.3g}"
        lines.append(f"| {row.part} | {ms} | {row.reference} | {other} | {ratio} | {row.target} |")
    return "\n".join(lines)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Times of every part beside a plain reference.")
    parser.add_argument("--threads", type=int, help="torch threads (default: torch's own choice)")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument(
        "--quick", action="store_true", help="few repeats, no step of the official size at 256 px"
    )
    parser.add_argument("--out", type=Path, help="save the table as Markdown")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    repeats = 3 if args.quick else args.repeats
    title = describe()
    print(title, flush=True)
    head = checkpoints.load_head().to(args.device)
    model = checkpoints.load_rig()[0].to(args.device).eval().requires_grad_(False)
    photo = Image.open(checkpoints.ASSETS / "astronaut.jpg").convert("RGB")
    photo = torch.from_numpy(np.asarray(photo).copy()).permute(2, 0, 1)[None].to(args.device).float() / 255
    with torch.no_grad():
        rows = []
        for size, batch in ((256, 1), (256, 8), (512, 1), (512, 8)):
            rows += bench_raster(head, size, batch, repeats, args.device)
        rows += bench_face(head, model, photo, repeats)
        rows.append(bench_paste(photo, repeats))
        for size in (64, 128, 256):
            rows.append(bench_denoiser(model, "default denoiser", size, repeats, args.device))
        rows.append(bench_sampler(model, model.config.image_size, repeats, args.device))
        official = DiffusionRig(RigConfig()).eval().requires_grad_(False)
        official = official.to(args.device, memory_format=torch.channels_last)  # as load_rig gives it
        for size in (64, 128) if args.quick else (64, 128, 256):
            few = max(3, repeats // 3)
            rows.append(
                bench_denoiser(official, "official size (133 M), random weights", size, few, args.device)
            )
        del official
        relit = bench_relighting(rows, head, photo, repeats, args.quick)
        trained = bench_training(head, photo[0], repeats, args.device)
    text = f"{title}\n\n{table(rows)}\n\n{relit}\n\n{trained}\n"
    print(text)
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text("# Times\n\n`python run.py bench` on " + text)


if __name__ == "__main__":
    main()
