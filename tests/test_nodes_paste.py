"""Paste Back over the double of the host."""

import pytest
import torch

from tests.node_pack import *  # noqa: F403 the fixtures
from tests.node_pack import SIZE


def test_paste_back_without_an_edit_is_the_photo_bit_for_bit(pack, scene, face):
    photo = scene[0]
    out = pack.run("PasteBack", photo=photo, edited=face[0], crop=face[1])[0]
    assert torch.equal(out, photo)
    brighter = (face[0] * 1.3).clamp(0, 1)
    out = pack.run("PasteBack", photo=photo, edited=brighter, crop=face[1])[0]
    assert out.shape == photo.shape and (out - photo).mean() > 0.005
    mask = torch.zeros(1, 8, 8)
    assert torch.equal(pack.run("PasteBack", photo=photo, edited=brighter, crop=face[1], mask=mask)[0], photo)
    two = pack.run("PasteBack", photo=photo, edited=torch.cat([brighter, face[0]]), crop=face[1])[0]
    assert torch.equal(two[:1], out) and torch.equal(two[1:], photo)


def test_an_edit_shows_on_the_mask_and_near_it(pack, face):
    image, crop = face[0], face[1].crop
    inside = face[1]._replace(crop=crop.replace(matrix=torch.eye(3)[None]), size=(SIZE, SIZE))
    mask = torch.zeros(1, SIZE, SIZE)
    mask[:, 24:40, 24:40] = 1
    darker = image * 0.5

    def changed(**more):
        out = pack.run("PasteBack", photo=image, edited=darker, crop=inside, soft=0.02, **more)[0]
        rows = ((out - image).abs().sum(-1)[0] > 0).nonzero()
        return rows.amin().item(), rows.amax().item()

    low, high = changed(mask=mask, reach=0.0)
    assert 24 <= low <= 27 and 36 <= high <= 39
    assert changed(mask=mask) == (low - 6, high + 6)  # 0.09 of 64 pixels
    assert changed(mask=mask, reach=0.25) == (low - 16, high + 16)
    with pytest.raises(ValueError, match="'mask' is 100 x 64 pixels, the aligned picture is square"):
        pack.run("PasteBack", photo=image, edited=darker, crop=inside, mask=torch.ones(1, 64, 100))


def test_many_lights_of_one_face_reuse_its_place(pack, scene, face, monkeypatch):
    composite, made = pack.core.composite, []
    place = composite.place
    monkeypatch.setattr(composite, "place", lambda *a, **k: made.append(1) or place(*a, **k))
    monkeypatch.setattr(pack.nodes_module.paste, "LAID", 3 * 96 * 128)
    edits = torch.cat([face[0] * v for v in (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4)])
    out = pack.run("PasteBack", photo=scene[0], edited=edits, crop=face[1])[0]
    assert len(made) == 1 and len(pack.host.progress) == 3 and len(out) == 7
    assert torch.equal(out[:1], scene[0])
    for i in (2, 6):
        alone = pack.run("PasteBack", photo=scene[0], edited=edits[i : i + 1], crop=face[1])[0]
        assert torch.allclose(out[i : i + 1], alone, atol=1e-6)
    # each edit with what the model made of its own face: 'before' of as many
    own = pack.run("PasteBack", photo=scene[0], edited=edits, crop=face[1], before=edits)[0]
    assert torch.equal(own, scene[0].expand(7, -1, -1, -1))
