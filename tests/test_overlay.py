"""Numbered boxes on photos of any size."""

from __future__ import annotations

import pytest
import torch

from rig_core import overlay


def near(image, colour):
    return ((image[0] - torch.tensor(colour)[:, None, None] / 255).abs() < 0.02).all(0)


@pytest.mark.parametrize(("height", "width"), [(3000, 4000), (300, 225), (40, 32)])
def test_boxes_stand_where_the_faces_are(height, width):
    photo = torch.full((1, 3, height, width), 0.4)
    boxes = torch.tensor([[0.1, 0.3, 0.4, 0.6], [0.6, 0.5, 0.9, 0.8]]) * torch.tensor([width, height] * 2)
    out = overlay.numbered(photo, boxes, [1])
    assert max(out.shape[2:]) == min(max(height, width), overlay.LONG_SIDE)
    h, w = out.shape[2:]
    for colour, (x0, y0, x1, y1) in (
        (overlay.CHOSEN, (0.6, 0.5, 0.9, 0.8)),
        (overlay.OTHER, (0.1, 0.3, 0.4, 0.6)),
    ):
        rows, columns = near(out, colour).nonzero().unbind(1)
        assert abs(int(rows.max()) - y1 * h) < 3 and abs(int(columns.max()) - x1 * w) < 3
        assert abs(int(columns.min()) - x0 * w) < 3
        assert int(rows.min()) < y0 * h  # the number stands above
    wide = [int(near(out, c)[int(0.55 * h)].sum()) for c in (overlay.CHOSEN, overlay.OTHER)]
    assert wide[0] == 2 * wide[1] > 0  # both sides of one box cross that row
    assert (out[..., -1, :] == torch.tensor(102) / 255).all()  # and elsewhere the photo


def test_numbers_differ_and_stay_in_the_picture():
    photo = torch.full((1, 3, 200, 200), 0.4)
    corner = torch.tensor([[-10.0, -10.0, 60.0, 60.0]])
    tags = []
    for boxes, i in ((corner, 0), (corner.repeat(12, 1), 11)):
        out = overlay.numbered(photo, boxes, [i])
        ground = near(out, overlay.CHOSEN)
        rows, columns = ground.nonzero().unbind(1)
        assert rows.min() <= 3 and columns.min() <= 3
        tags.append(int(near(out, overlay.EDGE)[:30, :40].sum()))
    assert tags[0] != tags[1]
    assert torch.equal(overlay.numbered(photo, corner[:0], []), photo.mul(255).round().div(255))
