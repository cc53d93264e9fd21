"""The bench's references compute the same as what they are compared with."""

from types import SimpleNamespace

import pytest
import torch

from rig_core import buffers, checkpoints, raster, train
from rig_core.denoisers.rig import DiffusionRig, RigConfig
from training import bench, bench_training


def test_loop_rasterizer_agrees():
    g = torch.Generator().manual_seed(2)
    verts = torch.rand(90, 3, generator=g) * 2 - 1
    verts[:, 2] += 10
    faces = torch.arange(90).reshape(30, 3)
    ours = raster.rasterize(verts[None], faces, (48, 48), backend="torch").pix_to_face[0]
    loop = bench.loop_rasterize(verts, faces, 48)
    assert (ours >= 0).float().mean() > 0.3
    assert (ours == loop).float().mean() > 0.999


def test_median_takes_turns_and_leaves_the_warm_up_out(monkeypatch):
    calls = []
    clock = iter([0, 0, 0, 1, 0, 4, 0, 3, 0, 5, 0, 2, 0, 6])
    monkeypatch.setattr(bench, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    a, b = bench.median_ms(3, lambda: calls.append("a"), lambda: calls.append("b"))
    assert calls == list("ab" * 4)
    assert (a, b) == (2000, 5000)


def test_table_prints_ratios():
    rows = [
        bench.Row("x", 2.0, "plain", 5.0, "2 x"),
        bench.Row("share: 0.5 %", float("nan"), target="under 1 %"),
    ]
    assert bench.table(rows).splitlines()[2:] == [
        "| x | 2 | plain | 5 | 2.5 | 2 x |",
        "| share: 0.5 % |  |  |  |  | under 1 % |",
    ]


@pytest.fixture(scope="module")
def head():
    return checkpoints.load_head()


def test_the_plain_training_loop_takes_the_steps_that_ours_takes():
    torch.manual_seed(0)
    model = DiffusionRig(RigConfig(16, 32, (1, 1), 1, (8,), latent_dim=8, encoder_width=4, dropout=0.0))
    config = train.Config(lr=1e-4, warmup=1, precision="fp32")
    plain = bench_training.PlainLoop(model, config, "cpu")
    state = train.begin(config, model, torch.device("cpu"))
    loss = train.Loss(state.model, config)
    for _ in range(3):
        x_0, physical = torch.rand(2, 3, 16, 16) * 2 - 1, torch.rand(2, 9, 16, 16)
        t, noise = train.draw(x_0)
        norm = train.update(state, config, loss, x_0, t, noise, (physical, x_0))[1]
        torch.testing.assert_close(plain.step(x_0, physical, t, noise), norm, rtol=1e-4, atol=0)
    assert plain.steps == 3
    for ours, its in ((state.model, plain.model), (state.ema, plain.ema)):
        away = [(a - b).abs().mean() for a, b in zip(ours.parameters(), its.parameters())]
        assert torch.stack(away).max() < 2e-5  # a step is 1e-4


def test_the_plain_loop_reads_what_ours_renders(tmp_path, head):
    dataset = bench_training._portraits(tmp_path, head, 32)
    bench_training.write_plain(tmp_path, head, dataset, 32)
    x_0, physical = bench_training.read_plain(tmp_path, [3, 7])
    wanted, (drawn, _) = train.rig_inputs(head, 32, "cpu", flip=False)(
        SimpleNamespace(image=dataset.images([3, 7], 32), reference=dataset.images([3, 7], 32),
                        code=dataset.codes([3, 7]))
    )  # fmt: skip
    torch.testing.assert_close(x_0, wanted)
    torch.testing.assert_close(physical, drawn, rtol=1e-4, atol=1e-5)
    assert torch.equal(buffers.render(head, dataset.codes([3]), 32).stack()[0], physical[0])


def test_activations_grow_with_the_picture_and_shrink_in_half_precision():
    def count(size, dtype=torch.float32):
        with torch.device("meta"):
            model = DiffusionRig(RigConfig(size, 32, (1, 1), 1, (), latent_dim=8, encoder_width=4))
        shapes = ((9, size, size), (3, size, size))
        return bench_training.activations(model.to(dtype), shapes, size)

    assert count(64) / count(32) == pytest.approx(4, rel=0.1)
    assert 0.5 < count(32, torch.bfloat16) / count(32) < 0.8  # norms stay in float32


def test_tables_of_training(head):
    row = bench_training.Speed("small", 500.0, 1000.0, 300.0, 400.0)
    assert bench_training.speed_table([row]).splitlines()[2] == "| small | 16 | 8 | 2 | 300 | 400 | 75 % |"
    photo = torch.rand(3, 32, 32, generator=torch.Generator().manual_seed(0))
    cells = bench_training.disk_table(head, photo, 32).splitlines()[2].split("|")
    ours, published = float(cells[2]), float(cells[3])
    raw = 3 * 32 * 32  # noise does not compress
    assert raw < ours < raw + 4000 and 13 * raw < published < 13 * raw + 1000
    assert float(cells[4]) == pytest.approx(published / ours, rel=0.01)
