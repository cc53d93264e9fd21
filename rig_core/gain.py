"""The light of an edit, carried from a small crop to a large photo: a gain field, enlarged along its edges.

Relighting multiplies linear light, so an edit of the crop is a gain: smooth on skin, with steps where the
photo has edges, as between face and background. Enlarged plainly, those steps become halos. So the gain is
doubled in size again and again by joint bilateral upsampling (Kopf et al. 2007; in steps as Riemens et al.
2009): each new pixel takes the mean gain of those neighbours that look like it in the photo. Pores, lashes
and hair stay the photo's.

Convention: gains are in stops, log2 of linear light; images [B,3,H,W] RGB in display space (sRGB), 0..1.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

STOPS = 3.0  # largest gain either way
BLACK = 0.004  # linear light added before a ratio: two near-black pixels have a ratio near 1
ALIKE = 0.06  # distance in display values at which two pixels begin to count as different things
CALM = 1 / 32  # in crop sides, how far the gain's colour is averaged at a step


def to_linear(image: Tensor) -> Tensor:
    """sRGB display values 0..1 -> linear light 0..1 (IEC 61966-2-1)."""
    image = image.clamp_min(0)
    return torch.where(image <= 0.04045, image / 12.92, ((image + 0.055) / 1.055).clamp_min(0.04) ** 2.4)


def to_display(image: Tensor) -> Tensor:
    """Linear light 0..1 -> sRGB display values 0..1."""
    image = image.clamp_min(0)
    return torch.where(
        image <= 0.0031308, image * 12.92, 1.055 * image.clamp_min(0.0031308) ** (1 / 2.4) - 0.055
    )


def stops(edited: Tensor, original: Tensor) -> Tensor:
    """Gain of every channel, [B,3,s,s], within -STOPS..STOPS."""
    ratio = (to_linear(edited) + BLACK) / (to_linear(original) + BLACK)
    return ratio.log2().clamp(-STOPS, STOPS)


def calm(gain: Tensor, guide: Tensor) -> Tensor:
    """The gain with its colour, what differs between the channels, smoothed along the edges of guide.

    Light changes its colour slowly over a face; a denoiser's errors do not. The steps widen, as in the
    edge-avoiding wavelets of Dammertz et al. 2010.
    """
    # BLACK damps the gain of dark pixels and channels: smoothed are what is left of it, and the gain over it
    kept = to_linear(guide)
    kept = (kept / (kept + BLACK)).clamp_min(0.05)
    common = gain.sum(1, keepdim=True) / kept.sum(1, keepdim=True) * kept
    both, step = torch.cat([gain - common, kept], 1), 1
    while step <= max(1, CALM * guide.shape[-1]):
        both = alike_mean(both, guide, guide, step=step)
        step *= 2
    return common + both[:, :3] / both[:, 3:] * kept


def light(photo: Tensor, gain: Tensor) -> Tensor:
    """The photo [B,3,H,W] under a gain of its size, unclipped."""
    return to_display((to_linear(photo) + BLACK) * gain.exp2() - BLACK)


def guides(photo: Tensor, size: int) -> list[Tensor]:
    """A photo [1,3,2^n s,2^n s], halved again and again down to [1,3,s,s]: what `enlarge` goes by."""
    found = [photo]
    while found[-1].shape[-1] > size:
        found.append(F.avg_pool2d(found[-1], 2))
    if found[-1].shape[-1] != size:
        raise ValueError(f"a guide of {list(photo.shape)} is no doubling of a gain of {size} pixels")
    return found


def enlarge(gain: Tensor, guides: list[Tensor]) -> Tensor:
    """N gains [N,3,s,s] of one photo at the size of its largest guide (see `guides`), [N,3,2^n s,2^n s].

    Its means are right where a pixel of the crop shows one thing. Where it shows two, and where they blur the
    edit's own edges, such as cast shadows, the lit photo made small differs from the edit, and that is
    carried after (back-projection, Irani and Peleg 1991).
    """
    n = 2 ** (len(guides) - 1)
    gain = calm(gain, guides[-1].expand(len(gain), -1, -1, -1))
    large = _double_all(gain, guides)
    linear = to_linear(guides[0]) + BLACK
    lit = F.avg_pool2d(linear * large.exp2(), n) / F.avg_pool2d(linear, n)
    return large.add_(_double_all(gain - lit.log2(), guides)).clamp_(-STOPS, STOPS)


def _double_all(gain: Tensor, guides: list[Tensor]) -> Tensor:
    """The gains as channels of one picture: the weights are found once for all."""
    n, out = len(gain), gain.reshape(1, -1, *gain.shape[2:])
    for small, fine in zip(guides[:0:-1], guides[-2::-1]):
        out = double(out, small, fine)
    return out.reshape(n, 3, *out.shape[2:])


def double(gain: Tensor, small: Tensor, fine: Tensor) -> Tensor:
    """One step: gain [B,C,h,w] with its guide small [B,3,h,w] -> [B,C,2h,2w] with its guide fine."""
    out = gain.new_empty(*gain.shape[:2], *fine.shape[2:])
    for y in (0, 1):
        for x in (0, 1):
            out[:, :, y::2, x::2] = alike_mean(
                gain, small, fine[:, :, y::2, x::2], y / 2 - 0.25, x / 2 - 0.25
            )
    return out


def alike_mean(
    gain: Tensor, small: Tensor, here: Tensor, y: float = 0.0, x: float = 0.0, step: int = 1
) -> Tensor:
    """Mean gain of the 3 x 3 neighbours, weighted by nearness and by likeness of small to here [B,3,h,w].

    y, x: where `here` lies, in pixels from the middle one's centre. step: pixels from neighbour to neighbour.
    """
    h, w = gain.shape[2:]
    near = F.pad(torch.cat([gain, small], 1), (step,) * 4, mode="replicate")
    total, weights = torch.zeros_like(gain), gain.new_zeros(len(gain), 1, h, w)
    for tap in range(9):
        i, j = divmod(tap, 3)
        there = near[:, :, step * i : step * i + h, step * j : step * j + w]
        apart = (there[:, -3:] - here).square_().sum(1, keepdim=True)
        tent = (2 - abs(i - 1 - y)) * (2 - abs(j - 1 - x))
        # never quite nothing, so that it is a mean where nothing is alike
        weight = apart.mul_(-0.5 / ALIKE**2).exp_().add_(1e-4).mul_(tent)
        total.addcmul_(there[:, :-3], weight)
        weights += weight
    return total.div_(weights)
