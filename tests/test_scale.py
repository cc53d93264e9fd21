"""Training at scale: several processes as one, runs that are killed, full disks, large datasets."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from rig_core import buffers, checkpoints, data, files, train, train_log
from rig_core.denoisers.rig import DiffusionRig
from tests import training_runs
from tests.training_runs import arguments
from training import relight, relight_data, run_arguments, stage1

ROOT = Path(__file__).parent.parent
ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1"}


def log(out, without=("time", "images_per_s")):
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in without} for line in lines]


# ------------------------------------------------------------------------------------- several processes


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Twelve faces under several lights, of four persons, in two datasets; four are for sample sheets."""
    out = tmp_path_factory.mktemp("faces")
    head, g = checkpoints.load_head(), torch.Generator().manual_seed(0)
    code = head.mean_code(12, 32)
    code = code.replace(light=code.light + head.light_std * torch.randn(12, 9, 3, generator=g))
    images = buffers.render(head, code, 32).rendered.clamp(0, 1)
    for name, part in (("a", slice(0, 6)), ("b", slice(6, 12))):
        columns = {"split": ["val", "train", "train"] * 2, "person": [name] * 3 + [name * 2] * 3}
        data.append(out / name, [f"{name}{i}" for i in range(6)], images[part], code[part], **columns)
        data.finish(out / name)
        relight_data.annotate(head, out / name, {"a": 32, "b": 48}[name], progress=False)
    return out


def differences(a, b, kind):
    """|a - b| of all floating-point tensors of a kind in the states of two runs, in one row."""
    a, b = (files.read(out / train.STATE)[0] for out in (a, b))
    assert a.keys() == b.keys()
    keys = [k for k in a if k.startswith(kind) and a[k].is_floating_point()]
    assert len(keys) > 300
    return torch.cat([(a[k] - b[k]).abs().flatten() for k in keys])


@pytest.fixture(scope="module")
def runs(folder, tmp_path_factory):
    """The folders of tests/training_runs.py, its report, and what it said."""
    out = tmp_path_factory.mktemp("runs")
    command = [sys.executable, training_runs.__file__, out, folder]
    env = {**ONE_THREAD, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return out, json.loads((out / "report.json").read_text()), done.stderr


@pytest.fixture
def no_sheets(monkeypatch):
    for module in (stage1, relight):
        monkeypatch.setattr(module, "contact_sheet", training_runs.no_sheet)


@pytest.mark.slow
def test_two_processes_train_the_diffusion_rig_that_one_would(folder, tmp_path, no_sheets):
    """Batch statistics of the encoder included. Then one process goes on with what two have begun."""
    one, two = tmp_path / "one", tmp_path / "two"
    stage1.main(arguments(folder, one, 4, 3))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["-m", "training.stage1", *arguments(folder, two, 2, 3)]
    done = subprocess.run(command, cwd=ROOT, env=ONE_THREAD, capture_output=True, text=True, timeout=170)
    assert done.returncode == 0, done.stderr
    norms = [[x["grad_norm"] for x in log(out)] for out in (one, two)]
    assert norms[1] == pytest.approx(norms[0], rel=1e-4) and len(norms[1]) == 3
    for kind in ("model.", "ema."):
        away = differences(one, two, kind)
        # a step is 1e-3; Adam makes one of any gradient, so of one that is mere rounding too
        assert away.mean() < 2e-6 and (away > 2e-5).float().mean() < 0.01, kind
    statistics = [k for k in train.weights(one / train.STATE) if "running" in k]
    for k in statistics:
        a, b = (train.weights(out / train.STATE)[k] for out in (one, two))
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)
    assert len(statistics) == 40
    stage1.main([*arguments(folder, one, 4, 4), "--resume"])
    stage1.main([*arguments(folder, two, 4, 4), "--resume"])
    assert differences(one, two, "model.").mean() < 3e-5
    assert sorted(p.name for p in (two / "samples").iterdir()) == ["0000003.png", "0000004.png"]
    assert checkpoints.load_rig(two / "model.safetensors")[1]["step"] == 4


@pytest.mark.slow
def test_two_processes_train_the_difareli_that_one_would(folder, runs, tmp_path, no_sheets):
    two, report, _ = runs
    assert report["relight"]["exits"] == [0, 0]
    relight.main(arguments(folder, tmp_path, 4, 3))
    for kind in ("model.", "ema."):
        away = differences(tmp_path, two / "relight", kind)
        assert away.mean() < 1e-7 and away.max() < 1e-4, kind  # a step is 1e-3
    assert checkpoints.load_relight(two / "relight" / "model.safetensors")[1]["step"] == 3


def test_annotations_of_one_dataset_among_several(folder):
    """Rows of a batch that lie in one dataset only, whatever the size of the other's."""
    sets = [data.Dataset.open(folder / name) for name in "ab"]
    table, alone = relight_data.Table(sets, 16), relight_data.Table(sets[1:], 16)
    found, wanted = table(torch.tensor([9, 7]), "cpu"), alone(torch.tensor([3, 1]), "cpu")
    assert all(torch.equal(found[k], wanted[k]) for k in wanted) and found["matte"].shape[-1] == 16


# ------------------------------------------------------------------------------------------ killed runs


def same_as_unbroken(folder, name):
    for file in (train.STATE, "model.safetensors"):
        assert (folder / name / file).read_bytes() == (folder / "whole" / file).read_bytes(), (name, file)
    assert log(folder / name) == log(folder / "whole")
    assert not list((folder / name).glob(".*"))


@pytest.mark.slow
def test_a_run_killed_at_random_moments_ends_as_if_it_had_not_been(runs):
    folder, report, _ = runs
    for seed in range(2):
        *exits, last = report[f"random{seed}"]["exits"]
        assert set(exits) <= {0, -signal.SIGKILL} and last == 0
        same_as_unbroken(folder, f"random{seed}")
    kills = [e for seed in range(2) for e in report[f"random{seed}"]["exits"] if e]
    assert len(kills) >= 2


@pytest.mark.slow
@pytest.mark.parametrize("part", training_runs.PARTS)
@pytest.mark.parametrize("count, file", [(3, "model.safetensors"), (4, train.STATE)])
def test_a_run_killed_while_it_saves_ends_as_if_it_had_not_been(runs, part, count, file):
    folder, report, _ = runs
    found = report[f"{part}{count}"]
    assert found["exits"] == [-signal.SIGKILL, 0]
    left = [name for name in found["left"] if name.startswith(f".{file}.")]
    assert len(left) == len(found["left"]) == (part != "renamed")  # swept up at the next start
    same_as_unbroken(folder, f"{part}{count}")


@pytest.mark.slow
def test_a_process_that_fails_ends_the_others(runs):
    _, report, errors = runs
    found = report["one_fails"]
    assert found["exits"] == [1, 1] and found["seconds"] < 60
    assert "ValueError: face.png is not a readable picture" in errors


@pytest.mark.slow
def test_processes_that_see_different_run_folders_say_so(runs):
    folder, report, errors = runs
    assert report["apart"]["exits"] == [1, 1]
    for rank in "01":
        assert f"ValueError: {folder / 'apart' / rank} is not the same for all processes" in errors
    assert [x["step"] for x in log(folder / "apart" / "0")] == [1, 2]


@pytest.mark.slow
def test_a_signal_to_one_process_saves_and_ends_all(runs):
    found = runs[1]["one_is_terminated"]
    assert found["exits"] == [0, 0] and 1 <= found["step"] < 500
    assert log(runs[0] / "one_is_terminated")[-1]["step"] == found["step"]


def test_what_a_killed_run_left_half_written_is_swept_up(tmp_path):
    training_runs.run(tmp_path, 2)
    for name in (".tmpAJaB8b", ".state.safetensors.123.tmp"):
        (tmp_path / name).write_bytes(b"half")
    whole = (tmp_path / "log.jsonl").read_text()
    (tmp_path / "log.jsonl").write_text(whole + '{"step": 2, "lo')
    training_runs.run(tmp_path, 2)
    assert (tmp_path / "log.jsonl").read_text() == whole
    assert sorted(p.name for p in tmp_path.iterdir() if "tfevents" not in p.name) == [
        "log.jsonl", "model.safetensors", "options.json", "options_2.json", train.STATE
    ]  # fmt: skip


# -------------------------------------------------------------------------------- the end of a command line


@pytest.mark.slow
def test_sigterm_saves_and_ends_the_command_well(runs):
    folder, report, _ = runs
    out = folder / "run"
    assert report["terminated"]["exits"] == [0]
    step = files.read(out / train.STATE)[1]["step"]
    assert step >= 1 and checkpoints.load_rig(out / "model.safetensors")[1]["step"] >= step
    assert step in [x["step"] for x in log(out)]


@pytest.mark.slow
def test_a_full_disk_spares_what_was_saved(runs):
    folder, report, errors = runs
    assert report["starved"] == {"exits": [1], "spared": True, "left": []}
    said = [x for x in errors.splitlines() if x.startswith("SystemExit: training.stage1: ")]
    assert len(said) == 1 and f"{folder / 'run' / train.STATE}: cannot be written (" in said[0]
    assert f"MB are free in {folder / 'run'}): make room" in said[0]


def no_batch(step):
    raise AssertionError("a step was begun")


def refused(out):
    config = train.Config(steps=2, precision="fp32")
    with pytest.raises(files.CheckpointError, match="cannot be written") as e:
        train.train(config, DiffusionRig(training_runs.TINY), out, no_batch, training_runs.prepare)
    assert str(out) in str(e.value) and "choose another folder" in str(e.value) and "\n" not in str(e.value)


def test_a_folder_that_cannot_be_written_to_is_refused_before_the_first_step(tmp_path):
    (tmp_path / "file").write_text("")
    refused(tmp_path / "file" / "run")
    refused(tmp_path / "file")


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_folder_is_refused_before_the_first_step(tmp_path):
    tmp_path.chmod(0o500)
    refused(tmp_path / "run")
    refused(tmp_path)


def test_what_the_user_can_mend_is_said_in_one_line(tmp_path, capsys):
    def fails():
        raise files.unwritable(tmp_path / "log.jsonl", OSError(28, "No space left on device"))

    with pytest.raises(SystemExit) as e:
        run_arguments.command("training.stage1", fails)
    assert str(e.value).startswith(f"training.stage1: {tmp_path}/log.jsonl: cannot be written (No space left")
    with pytest.raises(ZeroDivisionError):
        run_arguments.command("training.stage1", lambda: 1 / 0)


def test_a_gradient_that_is_not_finite_ends_the_run_and_spares_the_checkpoint(tmp_path):
    """The loss may be finite still: of another process's pictures, or before the step that spoils it."""
    training_runs.run(tmp_path, 2)
    before = (tmp_path / train.STATE).read_bytes()

    class Spoilt(DiffusionRig):
        def forward(self, *inputs):
            eps = super().forward(*inputs)
            eps.register_hook(lambda g: g * float("nan"))
            return eps

    config = train.Config(steps=9, precision="fp32", log_every=50, save_minutes=0.0)
    model = Spoilt(training_runs.TINY)
    with pytest.raises(train_log.Diverged, match="gradient is nan at step 3"):
        train.train(config, model, tmp_path, training_runs.batch, training_runs.prepare, resume=True)
    assert (tmp_path / train.STATE).read_bytes() == before


# --------------------------------------------------------------------------------------- a large dataset

MEASURE = """
import resource, sys, time, torch
from rig_core import data

def memory():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3

def seconds(work, *arguments):
    start = time.process_time()
    result = work(*arguments)
    print(time.process_time() - start)
    return result

before = memory()
d = seconds(lambda: data.Dataset.open(sys.argv[1]).select("train"))
loader = seconds(lambda: data.Loader([d], 256, 64))
seconds(loader.sampler.round, 0)
picks = loader.sampler.take(0, 64).tolist()
code = seconds(d.codes, picks)
print(memory() - before)
assert code.shape[:, 0].tolist() == [float(d.entries[i].name) for i in picks]
"""


def test_seventy_thousand_portraits_open_at_once(tmp_path):
    """Shards and index are real, the pictures are not: opening looks at none. In processor time."""
    per, lines = 1000, []
    sizes = {"shape": (400,), "tex": (50,), "exp": (50,), "pose": (6,), "cam": (3,), "light": (9, 3)}
    rows = {k: torch.zeros(per, *v) for k, v in sizes.items()} | {"crop": torch.eye(3).repeat(per, 1, 1)}
    for i in range(70_000):
        shard, row = f"codes-{i // per:05d}.safetensors", i % per
        if row == 0:
            rows["shape"][:, 0] = torch.arange(i, i + per)
            save_file(rows, tmp_path / shard, {"head": "flame", "size": "[256, 256]", "entries": "[]"})
        entry = {"name": f"{i:05d}", "image": f"{i:05d}.jpg", "split": "train" if i % 50 else "val"}
        entry |= {"tags": ["photo"], "weight": 1.0, "person": f"{i // 2:05d}", "shard": shard, "row": row}
        lines.append(json.dumps(entry))
    top = '{"version": 1, "size": [256, 256], "head": "flame", "entries": [\n'
    (tmp_path / "index.json").write_text(top + ",\n".join(lines) + "\n]}\n")
    command = [sys.executable, "-c", MEASURE, str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, env=ONE_THREAD, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    opened, loader, shuffled, codes, megabytes = map(float, done.stdout.split())
    assert opened + loader < 2 and shuffled < 0.2 and codes < 0.2, done.stdout
    assert megabytes < 120, done.stdout  # the limit is 200; the shapes alone would be 112
