"""68 landmarks -> FaceCode: a few Gauss-Newton steps on a head model, then skin tone and light.

It stands in for DECA where its files are not there. Shape, expression and pose come from the
landmarks under the head's Gaussian prior; albedo and light from the photo under the fitted
normals. Everything is batched: no loop over faces.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import align, buffers, raster, sh
from ..face import FaceCode

SHAPE_MODES = 30
FRESH = (0, 1, 2, 4, 6)  # steps with a new Jacobian: it costs far more than the residual and changes little
INNER_SIGMA, CONTOUR_SIGMA = 1.2, 6.0  # px of the 224 crop: trust in a landmark against the prior
MOUTH_SIGMA = 0.9


def fit(
    head, landmarks: Tensor, size: tuple[int, int], image: Tensor | None = None, steps: int = 9
) -> FaceCode:
    """Fit a head to landmarks, and to the photo when it is given.

    head: a HeadModel. landmarks: [B,68,2] photo pixels, iBUG order, pixel centres at integers.
    size: (H, W) of the photo. image: [B,3,H,W] or [1,3,H,W] in 0..1, sRGB; without it the albedo is
    the head's mean and the light the mean of its prior.
    Returns a FaceCode of B faces. Raises ValueError for landmarks of another shape or not finite.
    """
    landmarks = check_landmarks(landmarks)
    crop = align.deca_crop(landmarks).matrix
    code = fit_geometry(head, landmarks, crop, size, steps)
    return code if image is None else fit_appearance(head, code, image)


def check_landmarks(landmarks: Tensor) -> Tensor:
    """[B,68,2] float32, or a ValueError that says what came instead."""
    if landmarks.ndim != 3 or landmarks.shape[1:] != (68, 2):
        raise ValueError(f"landmarks must be [faces, 68, 2] in iBUG order, got {tuple(landmarks.shape)}")
    if len(landmarks) == 0:
        raise ValueError("no face: the list of landmarks is empty")
    if not torch.isfinite(landmarks).all():
        raise ValueError("landmarks hold NaN or infinity: find the face again or hand in other landmarks")
    return landmarks.float()


class _Parameters:
    """Where each quantity lies in the flat vector that Gauss-Newton moves."""

    def __init__(self, head):
        s = head.sizes
        self.head, self.shape, self.exp = head, min(SHAPE_MODES, s.shape), s.exp
        self.count = self.shape + self.exp + 7  # rotation 3, jaw 1, cam 3
        self.index = head.landmark_vertices

    def landmarks(self, shape: Tensor, exp: Tensor, pose: Tensor) -> Tensor:
        """Landmarks [B,68,2] of the head, x and y, from the few vertices that they depend on."""
        return self.head.landmarks(self.head.verts(shape, exp, pose, self.index), pose)[..., :2]

    def split(self, theta: Tensor):
        """[B,P] -> shape [B,S], exp [B,E], pose [B,6+], cam [B,3]."""
        shape, exp, rot, jaw, cam = theta.split([self.shape, self.exp, 3, 1, 3], 1)
        shape = F.pad(shape, (0, self.head.sizes.shape - self.shape))
        pose = F.pad(torch.cat([rot, jaw], 1), (0, self.head.sizes.pose - 4))
        return shape, exp, pose, cam

    def prior(self, cam: Tensor) -> tuple[Tensor, Tensor]:
        """Mean [B,P] and 1/sigma [P] of the Gaussian prior."""
        device = cam.device
        mean = torch.zeros(len(cam), self.count, device=device)
        mean[:, -3:] = cam
        weight = torch.ones(self.count, device=device)
        tail = weight[self.shape + self.exp :]
        tail[:2], tail[2] = 1 / 0.6, 1 / 1.5  # pitch and yaw; roll is seen directly
        tail[3] = 1 / 0.15  # jaw
        tail[4:] = 0.0  # the camera is free
        return mean, weight


def fit_geometry(head, landmarks: Tensor, crop: Tensor, size: tuple[int, int], steps: int = 9) -> FaceCode:
    """Shape, expression, rotation, jaw and camera by Gauss-Newton with robust weights.

    The Jacobian of all faces comes from one forward-mode pass: the faces do not depend on each
    other, so one shared offset of the parameters gives every face its own derivative.
    """
    layout = _Parameters(head)
    target = align.Crop(crop, 224).apply_points(landmarks + 0.5) / 112 - 1  # see buffers.to_image
    theta = _start(layout, target)
    mean, weight = layout.prior(theta[:, -3:])
    sigma = torch.full((68,), INNER_SIGMA, device=landmarks.device)
    sigma[48:] = MOUTH_SIGMA
    sigma[:17] = CONTOUR_SIGMA

    def project(delta: Tensor, theta: Tensor) -> Tensor:
        shape, exp, pose, cam = layout.split(theta + delta)
        points = layout.landmarks(shape, exp, pose)
        return cam[:, :1, None] * (points + cam[:, None, 1:]) * points.new_tensor([1.0, -1.0])

    zero = torch.zeros(layout.count, device=theta.device)
    for i in range(steps):
        r = (project(zero, theta) - target) * 112 / sigma[:, None]  # [B,68,2] in sigmas
        if i in FRESH:
            jac = torch.func.jacfwd(project)(zero, theta) * (112 / sigma[:, None, None])  # [B,68,2,P]
        w = 1 / (1 + (r * r).sum(-1, keepdim=True) / 25)  # Cauchy: beyond 5 sigmas a point loses its say
        jw = (jac * w[..., None]).flatten(1, 2)
        damping = (30.0 if i < 3 else 1.0) * weight**2
        a = jw.transpose(1, 2) @ jac.flatten(1, 2) + torch.diag(damping + 1e-4)
        g = (jw.transpose(1, 2) @ r.flatten(1)[..., None]).squeeze(-1) + damping * (theta - mean)
        theta = theta - torch.linalg.solve(a, g)
    shape, exp, pose, cam = layout.split(theta)
    base = head.mean_code(len(theta), size)
    return base.to(theta.device).replace(
        shape=shape, exp=exp, pose=pose, cam=cam, crop=crop, size=tuple(size)
    )


def _start(layout: _Parameters, target: Tensor) -> Tensor:
    """Roll, scale and shift that bring the mean head's landmarks onto the target, [B,P]."""
    n = len(target)
    theta = target.new_zeros(n, layout.count)
    shape, exp, pose, _ = layout.split(theta)
    mean = layout.landmarks(shape, exp, pose)
    inner = slice(17, 68)
    a, b = mean[:, inner], target[:, inner] * target.new_tensor([1.0, -1.0])
    a0, b0 = a.mean(1, keepdim=True), b.mean(1, keepdim=True)
    za, zb = torch.view_as_complex((a - a0).contiguous()), torch.view_as_complex((b - b0).contiguous())
    z = (za.conj() * zb).sum(1) / (za.abs() ** 2).sum(1)
    scale, roll = z.abs(), z.angle()
    turned = torch.view_as_real(torch.view_as_complex(a0.contiguous()) * torch.exp(1j * roll[:, None]))
    theta[:, -5] = roll
    theta[:, -3] = scale
    theta[:, -2:] = (b0 / scale[:, None, None] - turned)[:, 0]
    return theta


def fit_appearance(head, code: FaceCode, image: Tensor, resolution: int = 64, rounds: int = 2) -> FaceCode:
    """Albedo parameters and SH light of a code whose geometry is fitted.

    image: [B,3,H,W] or [1,3,H,W] in 0..1. Works on a small picture of the face's own crop.
    Light and albedo explain each other's colour, so the light starts grey at the prior's mean level and
    the albedo takes the rest; then they are fitted in turn.
    """
    n = len(code)
    face = align.Crop(code.crop, 224).resized(resolution)
    picture = face.apply(image.expand(n, *image.shape[1:]))
    local = code.replace(crop=torch.eye(3).to(code.crop).expand(n, 3, 3), size=(224, 224))
    frags, normal, grid = buffers.geometry(head, local, resolution)
    mask = _bare_skin(head, frags, normal, picture)
    h, w = head.albedo(code.tex[:1]).shape[2:]
    at = ((grid + 1) * grid.new_tensor([w, h])[:, None, None] / 2).long().flatten(2)
    texels = at[:, 1].clamp(0, h - 1) * w + at[:, 0].clamp(0, w - 1)
    light = head.light_mean.to(picture).expand(n, 9, 3).mean(-1, keepdim=True).expand(n, 9, 3)
    tex = code.tex
    for _ in range(rounds):
        tex = _fit_tex(head, tex, texels, sh.shade(normal, light), picture, mask)
        light = sh.fit(normal, head.skin(tex, texels).reshape(picture.shape), picture, mask)
        light = _pull_to_prior(light, head)
    tex = _fit_tex(head, tex, texels, sh.shade(normal, light), picture, mask)
    light = sh.fit(normal, head.skin(tex, texels).reshape(picture.shape), picture, mask)
    return code.replace(tex=tex, light=light)


def _bare_skin(head, frags, normal: Tensor, picture: Tensor) -> Tensor:
    """Where the photo shows the face's skin, [B,1,H,W] 0 or 1: no hair, hat, beard or highlight.

    The face part of the head that looks at the viewer, less what is far darker or lighter than its median.
    """
    face = (head.masks["skin"] * head.masks.get("face", 1))[None, :, None].to(picture)
    face = face.expand(len(picture), -1, 1)
    face = raster.interpolate_verts(frags, head.faces, face) > 0.5
    brightness = picture.mean(1, keepdim=True)
    core = torch.where(face & (normal[:, 2:] > 0.6), brightness, torch.nan)
    usual = core.flatten(1).nanmedian(1).values[:, None, None, None]
    like = (brightness / usual).clamp_min(1e-3).log().abs() < 0.8
    keep = face & (normal[:, 2:] > 0.15) & like & (picture.amax(1, keepdim=True) < 0.995)
    return keep.to(picture)


def _pull_to_prior(light: Tensor, head) -> Tensor:
    """Keep the light's overall level and tint near the prior: skin tone belongs to the albedo."""
    level, mean = light[:, :1], head.light_mean.to(light)[None, :1]
    pulled = mean * (level / mean).clamp_min(1e-3) ** 0.3
    return light * (pulled / level.clamp_min(1e-3))


def _fit_tex(
    head, tex: Tensor, texels: Tensor, shading: Tensor, picture: Tensor, mask: Tensor, steps: int = 3
) -> Tensor:
    """Gauss-Newton on the few albedo parameters, robust against hair and glasses, prior N(0,1)."""
    n, t = tex.shape
    sigma = (
        0.06 * (mask.sum((1, 2, 3)).clamp_min(1.0) / 40).sqrt()[:, None, None, None]
    )  # 40 independent patches

    def model(delta: Tensor, tex: Tensor) -> Tensor:
        return head.skin(tex + delta, texels).reshape(picture.shape) * shading

    zero = torch.zeros(t, device=tex.device)
    for _ in range(steps):
        r = (model(zero, tex) - picture) / sigma
        w = mask / (1 + (r * sigma / 0.12).square().sum(1, keepdim=True))
        jac = torch.func.jacfwd(model)(zero, tex) / sigma[..., None]
        jw = (jac * w[..., None]).flatten(1, 3)
        a = jw.transpose(1, 2) @ jac.flatten(1, 3) + torch.eye(t, device=tex.device)
        g = (jw.transpose(1, 2) @ r.flatten(1)[..., None]).squeeze(-1) + tex
        tex = (tex - torch.linalg.solve(a, g)).clamp(-3, 3)
    return tex


def residual(head, code: FaceCode, landmarks: Tensor) -> Tensor:
    """Distance of each fitted landmark to the given one, [B,68] photo pixels."""
    verts = head.verts(code.shape, code.exp, code.pose)
    points = buffers.to_image(head.landmarks(verts, code.pose), code)
    return (buffers.to_pixels(points, code.size) - landmarks).norm(dim=-1)
