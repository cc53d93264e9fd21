import torch

from rig_core import buffers, checkpoints, sh
from training import augment


def test_lights_are_plausible_and_keyed_from_where_they_say():
    light, direction, key = augment.random_lights(64, torch.Generator().manual_seed(0))
    assert torch.allclose(direction.norm(dim=1), torch.ones(64), atol=1e-5)
    assert ((key[:, 0] >= 0.55) & (key[:, 0] <= 0.95)).all()
    shading = sh.basis(sh.fibonacci(200).float()) @ light
    assert shading.min() > -0.15 and 0.3 < shading.mean() < 1.2
    cos = (sh.direction(light) * direction).sum(1)
    assert cos.median() > 0.9  # the fill from above tilts it a little


def test_relighting_a_render_gives_the_render_under_the_new_light():
    """Where neither shadow nor clamp acts, photo times ratio is albedo times the new shading."""
    head = checkpoints.load_head()
    lit = sh.encode_light(sh.from_direction(torch.tensor([[0.0, 0.2, 1.0]]), 0.5, softness=0.5, ambient=0.5))
    code = head.mean_code(1, (96, 96)).replace(light=lit)
    b = buffers.render(head, code)
    image = b.rendered.clamp(0, 1) * b.mask + 0.4 * (1 - b.mask)
    out, relit, shadow = augment.relight_photos(head, image, code, torch.Generator().manual_seed(5))
    want = buffers.render(head, relit).rendered
    normal = torch.nn.functional.normalize(b.normal, dim=1)
    toward = (normal * sh.direction(relit.light)[:, :, None, None]).sum(1, keepdim=True)
    clear = (b.mask * (b.normal[:, 2:] > 0.6) * (toward > 0.4) * (want.amax(1, keepdim=True) < 0.8)) > 0
    a, w = out[clear.expand_as(out)], want[clear.expand_as(out)]
    assert len(a) > 300
    assert (a - w).abs().median() < 0.05
    assert torch.corrcoef(torch.stack([a, w]))[0, 1] > 0.9
    assert 0 <= float(shadow) < 0.5
    assert torch.allclose(out[..., :6, :6], image[..., :6, :6], atol=0.02)  # the far background stays


def test_only_the_blue_backdrop_is_exchanged():
    image = torch.zeros(2, 3, 64, 64)
    image[0] = torch.tensor([0.35, 0.42, 0.85])[:, None, None]
    image[1] = torch.tensor([0.5, 0.5, 0.55])[:, None, None]
    skin = torch.tensor([0.8, 0.6, 0.5])[:, None, None]
    image[:, :, 20:, 20:44] = skin
    assert augment.has_blue_backdrop(image).tolist() == [True, False]
    out = augment.exchange_backdrop(image[:1], torch.Generator().manual_seed(0))
    assert torch.allclose(out[0, :, 30:, 26:38], skin.expand(3, 34, 12), atol=0.01)
    assert (out[0, :, :10] - image[0, :, :10]).abs().mean() > 0.05
