"""The bench's references compute the same as what they are compared with."""

from types import SimpleNamespace

import torch

from rig_core import raster
from training import bench


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
