"""How good are the two methods? `python -m training.evaluate --photos DATASET --out FILE.md`.

Two further commands compare with others: `folders` measures folders of results against a folder of truths,
whoever made them; `methods` runs this pack's methods on pairs of pictures and measures those. Without one:

Against the truth: synthetic persons never trained on, each under two lights, everything else the same; the
true second picture is compared with what each method makes of the first (training/evaluate_pairs.py). With
--fitted by the codes that are fitted to the pictures, as a user has them, instead of the true ones.
On real photos of a dataset's "val" split, where no truth exists: training/evaluate_photos.py.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from rig_core import checkpoints
from rig_core.data import Dataset
from training import evaluate_folders, evaluate_methods, evaluate_pairs, evaluate_photos, lpips
from training.demo import write
from training.measures import table

SHEET = 10  # photos on a sheet
RELIGHTERS = ("DiFaReli", f"DiFaReli, trust {evaluate_pairs.TRUST:g}")


def load(rig: Path | None, relight: Path | None) -> tuple[evaluate_pairs.Tools, str]:
    """The networks, the pack's own where no file is named, and a line about them."""
    (rig, about_rig), (relight, about) = checkpoints.load_rig(rig), checkpoints.load_relight(relight)
    recognise, judge = checkpoints.load_identity(), checkpoints.load_shadow()
    tools = evaluate_pairs.Tools(checkpoints.load_head(), rig, relight, recognise, judge)
    parts = [
        f"{name}: step {meta.get('step', '?')}, {model.config.image_size} px"
        for name, model, meta in (("DiffusionRig", rig, about_rig), ("DiFaReli", relight, about))
    ]
    return tools, "; ".join(parts) + "."


def beside(*tables: list[list]) -> list[list]:
    """Tables of the same measures as one."""
    return [[rows[0][0], *(row[1] for row in rows)] for rows in zip(*tables, strict=True)]


def of_photos(tools: evaluate_pairs.Tools, photos: Dataset, count: int) -> list[str]:
    """The two tables of photos, as lines."""
    picks = evaluate_photos.spread(photos, count)
    methods = (
        lambda p, lights: evaluate_photos.by_rig(tools, p, lights),
        lambda p, lights: evaluate_photos.Relighter(tools, p).under(lights),
        lambda p, lights: evaluate_photos.Relighter(tools, p, evaluate_pairs.TRUST).under(lights),
    )
    rows = beside(*(evaluate_photos.on_photos(tools.head, photos, picks, m) for m in methods))
    scalars = evaluate_photos.scalar_range(tools.judge, photos, photos.size[0])
    jobs = (tools, photos, picks, scalars)
    shadows = beside(*(evaluate_photos.shadow_response(*jobs, trust=t) for t in (0.0, evaluate_pairs.TRUST)))
    return [
        f"{len(picks)} validation photos, {len(evaluate_photos.ASKED)} lights each:",
        "",
        table(["measure", "DiffusionRig", *RELIGHTERS], rows),
        "",
        "DiFaReli's shadow scalar, raised under a light from the side:",
        "",
        table(["change", *RELIGHTERS], shadows),
        "",
    ]


def variants(args: argparse.Namespace) -> None:
    """The pack's methods in all their variants, on synthetic pairs and photos."""
    if args.sheets and not args.photos:
        raise ValueError("--sheets shows photos: name a dataset with --photos")
    started = time.perf_counter()
    tools, about = load(args.rig, args.relight)
    text = [about, ""]
    sheet = None
    if args.pairs:
        held_out = evaluate_pairs.pairs(args.pairs, tools.size, tools.head if args.fitted else None)
        rows, sheet = evaluate_pairs.against_truth(tools, held_out)
        codes = "fitted to the pictures" if args.fitted else "true"
        text += [f"{args.pairs} held-out synthetic pairs against the true relit picture, codes {codes}:", ""]
        text += [table(evaluate_pairs.HEADER, rows), ""]
    if args.photos:
        photos = evaluate_photos.photos(Dataset.open(args.photos))
        text += of_photos(tools, photos, args.count) if args.count else []
    text += [f"{time.perf_counter() - started:.0f} s.", ""]
    print("\n".join(text))
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text("\n".join(text))
        if sheet is not None:
            write(sheet, args.out.with_suffix(".png"))
    if args.sheets:
        args.sheets.mkdir(parents=True, exist_ok=True)
        scalars = evaluate_photos.scalar_range(tools.judge, photos, photos.size[0])
        jobs = (tools, photos, evaluate_photos.spread(photos, SHEET), scalars)
        for trust in (0.0, evaluate_pairs.TRUST):
            pages = evaluate_photos.sheets(*jobs, trust=trust)
            for name, page in zip(("lights", "shadows"), pages):
                write(page, args.sheets / f"{name}{'_with_ratio' * bool(trust)}.png")


def judge_of(args: argparse.Namespace) -> evaluate_folders.Judge:
    """What measures folders, as the command line names it."""
    return evaluate_folders.Judge(
        checkpoints.load_face_model(args.face),
        checkpoints.load_identity(args.identity),
        lpips.load(args.lpips) if args.lpips else None,
        args.masked,
    )


def folders(args: argparse.Namespace) -> None:
    """Folders of results against a folder of truths."""
    results = {}
    for text in args.results:
        name, equals, folder = text.partition("=")
        if not (name and equals and folder) or name in results:
            raise ValueError(f"--results takes NAME=FOLDER, each name once, got '{text}'")
        results[name] = Path(folder)
    judge = judge_of(args)
    job = (judge, args.truth, results, args.out, args.source, args.asked, args.size)
    print(evaluate_folders.compare(*job, published=args.published))


def methods(args: argparse.Namespace) -> None:
    """The pack's methods on pairs of pictures."""
    files = (args.face, args.rig, args.relight, args.identity, args.shadow, args.parser)
    judge, (models, notes) = judge_of(args), evaluate_methods.load(*files)
    size = args.size or models.size
    if args.pairs:
        pairs = evaluate_methods.photos(args.pairs, size, models.face, args.edit)
    else:
        pairs = evaluate_methods.synthetic(args.count, size, models.face, args.edit)
    made, unused = evaluate_methods.run(models, pairs, args.out, evaluate_methods.methods(models, args.edit))
    notes += [f"Not used: {line}." for line in unused]
    job = (judge, args.out / "truth", made, args.out, args.out / "source")
    print(evaluate_folders.compare(*job, published=args.published, notes=notes))


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m training.evaluate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=variants)
    add_models(parser)
    parser.add_argument("--photos", type=Path, help="dataset folder (training.prepare) with a val split")
    parser.add_argument("--pairs", type=int, default=12, help="held-out synthetic pairs; 0 for none")
    parser.add_argument("--fitted", action="store_true", help="fit faces and lights of the pairs")
    parser.add_argument("--count", type=int, default=12, help="validation photos; 0 for none")
    parser.add_argument("--out", type=Path, help="Markdown file to write; a picture of pairs goes beside it")
    parser.add_argument("--sheets", type=Path, help="folder for sheets of photos: lights*.png, shadows*.png")
    commands = parser.add_subparsers(metavar="folders | methods")

    p = commands.add_parser("folders", description=evaluate_folders.__doc__)
    p.set_defaults(run=folders)
    p.add_argument("--truth", type=Path, required=True, help="folder of what the pictures should be")
    p.add_argument("--results", nargs="+", required=True, metavar="NAME=DIR", help="a folder a method")
    p.add_argument("--source", type=Path, help="folder of the unedited pictures, measured as well")
    p.add_argument(
        "--asked", type=Path, help="dataset folder whose codes were asked for; the truth's without"
    )
    p.add_argument("--size", type=int, help="px, longer side to compare at; the truth's own without it")
    add_judge(p, "out/folders")

    p = commands.add_parser("methods", description=evaluate_methods.__doc__)
    p.set_defaults(run=methods)
    p.add_argument(
        "pairs", type=Path, nargs="?", help="folder with source/ and target/; synthetic without it"
    )
    p.add_argument("--count", type=int, default=12, help="synthetic pairs")
    p.add_argument("--edit", choices=evaluate_methods.EDITS, default="light", help="what the targets change")
    p.add_argument(
        "--size", type=int, help="px of the compared pictures; those of the larger model without it"
    )
    add_models(p)
    p.add_argument("--shadow", type=Path, help="shadow estimator; the embedded default without it")
    p.add_argument("--parser", type=Path, help="face parser; masks come from the head without it")
    add_judge(p, "out/methods")

    args = parser.parse_args()
    try:
        args.run(args)
    except (ValueError, FileNotFoundError) as e:
        parser.error(str(e))


def add_models(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rig", type=Path, help="DiffusionRig checkpoint; the embedded default without it")
    parser.add_argument("--relight", type=Path, help="DiFaReli checkpoint; the embedded default without it")


def add_judge(parser: argparse.ArgumentParser, out: str) -> None:
    """What the commands that compare folders have in common."""
    parser.add_argument(
        "--face", type=Path, help="folder of FLAME's and DECA's files; the open head without it"
    )
    parser.add_argument("--masked", action="store_true", help="compare in the truth's face region alone")
    parser.add_argument(
        "--lpips", type=Path, help="folder with the two files of weights, see training/lpips.py"
    )
    parser.add_argument("--identity", type=Path, help="identity encoder; the embedded default without it")
    parser.add_argument(
        "--published", action="store_true", help="print figures of papers below, on other data"
    )
    parser.add_argument("--out", type=Path, default=Path(out), help="folder to write")


if __name__ == "__main__":
    main()
