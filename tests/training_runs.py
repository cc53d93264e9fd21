"""Small training runs that are killed, starved of disk, shared by two processes, or fail in one of them.

`python tests/training_runs.py FOLDER FACES` makes them all and writes what became of each to
FOLDER/report.json; FACES holds the datasets a and b. Every run is a fork of this process, which itself
never trains: PyTorch is imported once, and kill -9 is real.
"""

import json
import os
import random
import resource
import signal
import socket
import sys
import time
from pathlib import Path

import torch

from rig_core import checkpoints, files, train
from rig_core.denoisers.rig import DiffusionRig, RigConfig
from training import relight, run_arguments, stage1

TINY = RigConfig(16, 32, (1, 1), 1, (8,), latent_dim=8, encoder_width=4, dropout=0.2)
STEPS = 6
PARTS = ("write", "fsync", "replace", "renamed")  # of saving, in which a run is killed


def batch(step):
    g = torch.Generator().manual_seed(step)
    return torch.rand(4, 3, 16, 16, generator=g) * 2 - 1, torch.rand(4, 9, 16, 16, generator=g)


def prepare(content):
    return content[0], (content[1], content[0])


def run(out, steps=STEPS, batch=batch, **options):
    """A run that saves after each step, from the start or from where it was left."""
    torch.manual_seed(11)
    torch.set_num_threads(1)
    config = train.Config(
        steps, lr=1e-3, warmup=3, precision="fp32", log_every=1, save_minutes=0.0, **options
    )
    train.train(
        config, DiffusionRig(TINY), out, batch, prepare, resume=True,
        on_save=lambda ema, step: checkpoints.save_denoiser(out / "model.safetensors", ema, {"step": step}),
    )  # fmt: skip


def arguments(faces, out, batch, steps):
    """Of both command lines, for a coarse network of 16 px in float32."""
    given = {
        "--data": faces / "a", "--out": out, "--batch": batch, "--steps": steps, "--size": 16,
        "--preset": "coarse", "--lr": 1e-3, "--warmup": 1, "--precision": "fp32", "--threads": 1,
        "--log-every": 1, "--sample-every": 10**6,
    }  # fmt: skip
    return [str(x) for pair in (*given.items(), ("--data", faces / "b")) for x in pair]


def fork(work):
    """The number of a process that does `work()`; it ends with 1 and its error on stderr if there is one."""
    sys.stdout.flush()
    if pid := os.fork():
        return pid
    try:
        work()
    except BaseException as e:
        print(f"{type(e).__name__}: {e}", file=sys.stderr, flush=True)
        os._exit(1)
    os._exit(0)


def ended(pid):
    """Exit code; minus the signal's number of a process that was killed."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def deadly(part, count):
    """From now on the process dies at its count-th saving of a file, in that part of it."""
    calls = iter(range(1, 10**6))
    owner, name = (files, "save_file") if part == "write" else (os, {"renamed": "replace"}.get(part, part))
    plain = getattr(owner, name)

    def wrapped(*arguments):
        if part in ("fsync", "replace", "renamed") and not saves(part, *arguments):
            return plain(*arguments)
        if next(calls) < count:
            return plain(*arguments)
        if part in ("write", "renamed"):
            plain(*arguments)
        if part == "write":  # half of the file got there
            os.truncate(arguments[1], os.path.getsize(arguments[1]) // 2)
        die()

    setattr(owner, name, wrapped)


def saves(part, *arguments):
    """Whether a call of os.fsync or os.replace belongs to a file of tensors."""
    path = os.readlink(f"/proc/self/fd/{arguments[0]}") if part == "fsync" else os.fspath(arguments[0])
    return ".safetensors." in path


def killed_while_saving(out, part, count):
    def work():
        deadly(part, count)
        run(out)

    first = ended(fork(work))
    left = sorted(p.name for p in out.glob(".*.tmp"))
    return {"exits": [first, ended(fork(lambda: run(out)))], "left": left}


def killed_at_random(out, seed, seconds):
    """Killed four times, each time within what a whole run takes; then left alone."""
    rng, exits, steps = random.Random(seed), [], []
    for _ in range(4):
        pid = fork(lambda: run(out))
        time.sleep(rng.uniform(0.05, 0.5) * seconds)
        os.kill(pid, signal.SIGKILL)
        exits.append(ended(pid))
        steps.append(files.read(out / train.STATE)[1]["step"] if (out / train.STATE).exists() else 0)
    return {"exits": [*exits, ended(fork(lambda: run(out)))], "steps": steps}


def pair(work):
    """Two processes of one group: exit codes."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]

    def member(rank):
        os.environ |= {"WORLD_SIZE": "2", "RANK": str(rank), "LOCAL_RANK": str(rank)}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        work(rank)

    return [fork(lambda r=r: member(r)) for r in range(2)]


def one_fails(out):
    def work(rank):
        def torn(step):
            if rank == 1 and step == 2:
                raise ValueError("face.png is not a readable picture")
            return batch(step)

        run(out, batch=torn)

    started = time.monotonic()
    exits = [ended(p) for p in pair(work)]
    return {"exits": exits, "seconds": time.monotonic() - started}


def one_is_terminated(out):
    def work(rank):
        def slow(step):
            time.sleep(0.05)
            return batch(step)

        run(out, 500, slow)

    pids = pair(work)
    while not (out / train.STATE).exists():
        time.sleep(0.05)
    os.kill(pids[1], signal.SIGTERM)
    return {"exits": [ended(p) for p in pids], "step": files.read(out / train.STATE)[1]["step"]}


def apart(out):
    """Two processes whose run folders are not the same: one holds a run, the other does not."""
    ended(fork(lambda: run(out / "0", 2)))
    return {"exits": [ended(p) for p in pair(lambda rank: run(out / str(rank)))]}


def terminated(faces, out):
    """A command line that gets SIGTERM after its first steps."""
    pid = fork(lambda: stage1_command(arguments(faces, out, 2, 10**6)))
    while not (out / "log.jsonl").exists() or not (out / "log.jsonl").stat().st_size:
        time.sleep(0.05)
    os.kill(pid, signal.SIGTERM)
    return {"exits": [ended(pid)]}


def starved(faces, out):
    """It goes on where no file may grow as large as its state: to a program a full disk looks like that."""
    most = (out / "model.safetensors").stat().st_size * 3 // 2
    before = (out / train.STATE).read_bytes()

    def work():
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
        stage1_command([*arguments(faces, out, 2, 10**6), "--resume", "--save-minutes", "0"])

    return {
        "exits": [ended(fork(work))],
        "spared": most < len(before) and before == (out / train.STATE).read_bytes(),
        "left": [p.name for p in out.iterdir() if "tmp" in p.name],
    }


def stage1_command(given):
    run_arguments.command("training.stage1", lambda: stage1.main(given))


def no_sheet(*_):
    """In place of contact_sheet: sixty evaluations take longer than the training here."""
    return lambda model: torch.zeros(3, 8, 8)


def main(folder, faces):
    stage1.contact_sheet = relight.contact_sheet = no_sheet
    torch.optim.Adam([torch.zeros(1)])  # imports half of PyTorch, once for all
    started = time.monotonic()
    report = {"whole": {"exits": [ended(fork(lambda: run(folder / "whole")))]}}
    seconds = time.monotonic() - started
    for seed in range(2):
        report[f"random{seed}"] = killed_at_random(folder / f"random{seed}", seed, seconds)
    for part in PARTS:
        for count in (3, 4):  # each save writes the model, then the state
            name = f"{part}{count}"
            report[name] = killed_while_saving(folder / name, part, count)
    report["one_fails"] = one_fails(folder / "one_fails")
    report["one_is_terminated"] = one_is_terminated(folder / "one_is_terminated")
    report["apart"] = apart(folder / "apart")
    report["terminated"] = terminated(faces, folder / "run")
    report["starved"] = starved(faces, folder / "run")
    shared = pair(lambda rank: relight.main(arguments(faces, folder / "relight", 2, 3)))
    report["relight"] = {"exits": [ended(p) for p in shared]}
    (folder / "report.json").write_text(json.dumps(report))


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
