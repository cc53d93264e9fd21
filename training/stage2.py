"""Make a model of one person (Ding et al. 2023, section 3.3, stage 2): some 20 photos, one command.

    python -m training.stage2 --album DIR --name my_person
    python -m training.stage2 --album DIR --name my_person --base model.pt --face-model DECA_AND_FLAME
    python -m training.stage2 --album DIR --name my_person --lora 6

Photos that are no use are left out, with the reason on RUN/album.png and in RUN/rejected.txt. The model is
RUN/my_person.safetensors: put it into ComfyUI's models/face_rig. The same command with --resume goes on
where a run stopped. RUN/samples shows the first photo under four lights as the training goes on.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path

import torch

from rig_core import album, checkpoints, data, distributed, personal, pipeline, train
from rig_core.heads import FaceModel
from training import run_arguments
from training.run_arguments import save_picture


def arguments() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--album", type=Path, required=True, help="folder of photos of the person")
    p.add_argument("--name", required=True, help="of the person: letters, digits, - and _")
    p.add_argument("--base", type=Path, help="DiffusionRig model to start from; the pack's own without it")
    p.add_argument("--face-model", type=Path, help="folder of DECA and FLAME, for bases trained with them")
    p.add_argument("--lora", type=int, default=0, metavar="R", help="train adapters of rank R only")
    p.add_argument("--own-shapes", action="store_true", help="each photo its own shape, not the album's mean")
    p.add_argument("--batch", type=int, default=4, help="per process")
    run_arguments.add_run(
        p, steps=None, lr=None, warmup=50, ema=0.99, save_minutes=5.0, sample_every=500, log_every=10
    )
    return p


def main(argv: list[str] | None = None) -> None:
    parser = arguments()
    a = parser.parse_args(argv)
    if not re.fullmatch(r"[\w-]+", a.name):
        parser.error(f"--name {a.name}: letters, digits, - and _ only, it becomes a file's name")
    a.out = Path(a.out or Path("runs") / a.name)
    run_arguments.check_out(parser, a)
    device, path = run_arguments.start(a), a.out / f"{a.name}.safetensors"
    first = distributed.ranks()[0] == 0
    rig, meta = checkpoints.load_rig(a.base)
    face = checkpoints.load_face_model(a.face_model)
    personal.check_head(face.head, meta)
    found = gather(a.album, face, rig.config.image_size, show if first else None)
    if first:
        write(found, a.out)
    steps, lr = personal.usual(rig, a.lora)
    a.steps, a.lr = a.steps or steps, a.lr or lr
    config = run_arguments.config(a, device)
    recipe = personal.Recipe(a.batch, a.lora, not a.own_shapes, others=personal.learned_from_others(meta))
    if first:
        print(cost(config, recipe, a.base, device), flush=True)
    personal.fit(
        config, recipe, rig, face.head, found.images, found.codes, a.out, path, device, a.resume,
        about={"person": a.name, "base": a.base.name if a.base else "", "album": found.names},
        on_sample=lambda sheet, step: save_picture(sheet, a.out / "samples" / f"{step:07d}.png"),
    )  # fmt: skip
    if first:
        print(f"{path}: put it into ComfyUI's models/face_rig and choose it in Load DiffusionRig")


def gather(folder: Path, face: FaceModel, size: int, callback) -> album.Album:
    """The portraits of an album folder, their codes from DECA where there is one."""

    def fit(images, points):
        return pipeline.encode(face.head, images, points, face.encoder)

    photos = [(p.name, lambda p=p: data.read_photo(p)) for p in album.paths(folder)]
    return album.gather(photos, size, checkpoints.load_identity(), fit, callback=callback, head=face.head)


def show(done: int, total: int, name: str) -> None:
    """Where the gathering is."""
    print(f"\rphoto {done} of {total}: {name[:40]:<40}", end="" if done < total else "\n", flush=True)


def write(found: album.Album, out: Path) -> None:
    """The contact sheet and the reasons, into the run folder and on the screen."""
    save_picture(found.sheet, out / "album.png")
    lines = [f"{name}\t{why}\n" for name, why in found.rejected.items()]
    (out / "rejected.txt").write_text("".join(lines), encoding="utf-8")
    print(f"{len(found.names)} photos taken, {len(lines)} left out: see {out / 'album.png'}")
    print("".join(f"  {line}" for line in lines), end="")


def cost(config: train.Config, recipe: personal.Recipe, base: Path | None, device: torch.device) -> str:
    """What the training will take, from two trial steps on a copy of the base."""
    found = personal.forecast(config, recipe, checkpoints.load_rig(base)[0], device)
    minutes = found.seconds * config.steps / 60
    limit = f", {config.minutes:.0f} at the most" if config.minutes else ""
    return (
        f"{config.steps} steps of {found.seconds:.2f} s: about {minutes:.0f} min{limit}; "
        f"memory for the training about {found.bytes / 2**30:.1f} GiB on {device.type}"
    )


if __name__ == "__main__":
    run_arguments.command("training.stage2", main)
