"""Reads files in a process of its own and measures what each takes: `outcomes`.

As a program it takes a JSON list of paths and prints one Outcome a line. Memory is measured and limited on
Linux, time is limited where the system is posix.
"""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
SECONDS = 15  # of computing for one file
ROOM = 2**31  # of address space for all of them


@dataclass
class Outcome:
    """data: the type of what came back, or None. error: the type of the exception, or "killed". text: its
    message. seconds: of computing. memory: growth of the peak of resident memory in bytes, None where it is
    not known."""

    data: str | None = None
    error: str | None = None
    text: str = ""
    seconds: float = 0.0
    memory: int | None = None


def outcomes(paths: list[Path], seconds: float = 300) -> dict[Path, Outcome]:
    """What `files.read_tree` makes of each file; within `seconds` for all of them."""
    found: dict[Path, Outcome] = {}
    environment = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "MALLOC_TRIM_THRESHOLD_": "65536"}
    environment |= {"MALLOC_MMAP_THRESHOLD_": "65536"}  # what is freed goes back at once
    while len(found) < len(paths):
        waiting = paths[len(found) :]
        done = subprocess.run(
            [sys.executable, __file__],
            input=json.dumps([str(p) for p in waiting]),
            capture_output=True,
            text=True,
            timeout=seconds,
            cwd=ROOT,
            env=os.environ | environment,
        )
        lines = [Outcome(**json.loads(line)) for line in done.stdout.splitlines()]
        if len(lines) < len(waiting):  # one ended the process
            assert done.returncode and (lines or found), done.stderr[-2000:]
            lines.append(Outcome(error="killed", text=f"{done.returncode} {done.stderr[-500:]}"))
        found |= zip(waiting, lines)
    return found


def peak(restart: bool = False) -> int | None:
    """The peak of resident memory in bytes since the last restart; None where it is not known."""
    try:
        if restart:
            Path("/proc/self/clear_refs").write_text("5")
        return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) * 1024
    except OSError:
        return None


def _read(path: str) -> Outcome:
    from rig_core import files

    before, start, result = peak(restart=True), time.process_time(), Outcome()
    try:
        result.data = type(files.read_tree(path)).__name__
    except Exception as e:
        result.error, result.text = type(e).__name__, str(e)
    result.seconds = time.process_time() - start
    result.memory = None if before is None else peak() - before
    return result


def main() -> None:
    paths = json.load(sys.stdin)
    _read(paths[0])  # imports, and what torch makes at its first tensor
    if sys.platform == "linux":
        import resource

        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + ROOM,) * 2)
    for path in paths:
        if os.name == "posix":
            signal.setitimer(signal.ITIMER_PROF, SECONDS)
        print(json.dumps(asdict(_read(path))), flush=True)


if __name__ == "__main__":
    main()
