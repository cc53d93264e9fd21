"""What the bench says of relighting: evaluations, the scaled times of the published forms, memory."""

import numpy as np
import pytest
import torch
from PIL import Image

from rig_core import checkpoints
from rig_core.denoisers.relight import DiFaReli, RelightConfig, start_open
from training import bench_relight as bench


def test_table_scales_the_published_steps():
    published = bench.Published(step=0.2, read=0.5)
    assert published.seconds(3, 1000) == pytest.approx(601.5)
    rows = [bench.Edit("first", 99, 10.0, 3, ("30 x", "8 x")), bench.Edit("further", 33, 5.0, 1)]
    assert bench.edit_table(rows, published).splitlines()[2:] == [
        "| first | 99 | 10 | 3000 | 601.5 | 60.1 | 750 | 151.5 | 15.2 | 30 x, 8 x |",
        "| further | 33 | 5 | 1000 | 200.5 | 40.1 | 250 | 50.5 | 10.1 |  |",
    ]


def test_pictures_are_counted():
    model = torch.nn.Identity()
    assert bench.count_evaluations(model, lambda: [model(torch.zeros(n, 3)) for n in (1, 1, 8)]) == 10
    assert bench.count_evaluations(model, lambda: model(torch.zeros(2, 3))) == 2


def test_peak_of_live_storages():
    x = torch.empty(1000, device="meta")  # given, so not counted
    with bench.Peak() as peak:
        a = x * 2
        a.add_(1)
        b = a.view(10, 100)[1:]
        assert peak.live == 4000
        c = torch.cat([a, a])
        assert peak.live == peak.peak == 12000
        del a, c
        assert peak.live == 4000  # b looks into it
        del b
        assert peak.live == 0
        torch.nn.functional.linear(x, torch.empty(10, 1000, device="meta")).tanh()
    assert peak.peak == 40000 + 40  # weight and product; the weight is gone when tanh runs


def test_published_size_in_half_precision_stays_below_the_limit():
    weights, one = bench.memory(RelightConfig(), 1)
    assert weights == pytest.approx(2 * (148.6e6 + 42.0e6) / 1e9, rel=2e-3)
    # the Modulator's features alone are 70 MB, and so is what the way up keeps of the way down
    assert 0.14 < one < 1
    assert weights + bench.memory(RelightConfig(), bench.ORBIT)[1] < bench.LIMIT


@pytest.mark.slow
def test_published_procedure_is_timed_beside_ours(monkeypatch):
    monkeypatch.setattr(bench, "ORBIT", 2)
    monkeypatch.setattr(bench, "STEPS", 2)
    torch.manual_seed(0)
    config = RelightConfig(32, 8, (1, 1), 1, (), 1, 0.0, 4, 241, 8)
    model = start_open(DiFaReli(config)).eval().requires_grad_(False)
    photo = np.array(Image.open(checkpoints.ASSETS / "astronaut.jpg").convert("RGB"))
    photo = torch.from_numpy(photo).permute(2, 0, 1)[None].float() / 255
    with torch.no_grad():
        rows, published = bench.bench_edits(model, checkpoints.load_head(), photo, 1)
    assert [r.evaluations for r in rows] == [99, 33, 40, 38, 66 + 2 * 33, 99]
    assert [r.passes for r in rows] == [3, 1, 3, 3, 4, 3]
    assert all(r.seconds > 0 for r in rows) and rows[1].seconds < rows[4].seconds
    assert published.read > 0 and published.step > 0
