"""Light as spherical harmonics: evaluate, rotate, build, fit, edit.

A light is a tensor [B,9,3]: nine coefficients for each of red, green and blue.

Convention: x to the right of the picture, y up, z to the viewer; light directions point from the face
to the source. The basis is DECA's (Feng et al. 2021): 1, x, y, z, xy, xz, yz, x^2-y^2, 3z^2-1, times the
orthonormal real constants times the clamped cosine's band weights (Ramamoorthi & Hanrahan 2001: 2pi/3, pi/4),
except that the constant term lacks its pi. The shading is irradiance / pi: a white world of radiance 1
shades 1, and so does a distant lamp of intensity 1 that a surface faces. DPR differs (`from_dpr`).
Shading in this pack is in DISPLAY space, as DECA's is: albedo x shading compares with the sRGB photo.
Physical light is linear; `encode_light` and `decode_light` cross between the two.
"""

from __future__ import annotations

import functools
import math

import torch
import torch.nn.functional as F
from torch import Tensor

# orthonormal real spherical harmonics, without the band weights
_Y0, _Y1, _Y2 = math.sqrt(1 / (4 * math.pi)), math.sqrt(3 / (4 * math.pi)), math.sqrt(15 / (4 * math.pi))
_Y = (_Y0, _Y1, _Y1, _Y1, _Y2, _Y2, _Y2, _Y2 / 2, _Y2 / math.sqrt(12))
_BAND = (1, *[2 * math.pi / 3] * 3, *[math.pi / 4] * 5)
CONSTANTS = tuple(y * a for y, a in zip(_Y, _BAND))  # DECA's constant factors
LUMINANCE = (0.2126, 0.7152, 0.0722)  # Rec. 709


def check_light(light: Tensor, name: str = "light") -> Tensor:
    """The light itself, or a ValueError that says what is wrong with it."""
    if light.ndim != 3 or light.shape[1:] != (9, 3):
        raise ValueError(f"{name} must be [B,9,3], got {list(light.shape)}")
    if not torch.isfinite(light).all():
        raise ValueError(f"{name} holds NaN or infinite coefficients")
    return light


def unit_directions(direction: Tensor) -> Tensor:
    """[B,3] made unit length. Raises ValueError for another shape, zero or NaN."""
    if direction.ndim != 2 or direction.shape[1] != 3:
        raise ValueError(f"direction must be [B,3], got {list(direction.shape)}")
    length = direction.norm(dim=1, keepdim=True)
    if not (length > 1e-8).all():
        raise ValueError("direction holds a zero or NaN vector, want one from the face to the light")
    return direction / length


def constant_like(constant: Tensor, like: Tensor) -> Tensor:
    """A double constant in like's dtype and on its device (dtype first: a device may lack float64)."""
    return constant.to(like.dtype).to(like.device)


def _per_item(value, like: Tensor, name: str) -> Tensor:
    """A number, [B] or [B,3] (or three numbers: a colour) -> [B,3], finite and not negative."""
    v = torch.as_tensor(value).to(like)
    if not (torch.isfinite(v).all() and (v >= 0).all()):
        raise ValueError(f"{name} must be finite and not negative, got {value}")
    if v.ndim == 1 and (name != "colour" or len(v) != 3):
        v = v[:, None]
    return v.expand(len(like), 3)


def basis(normal: Tensor) -> Tensor:
    """The nine basis functions at unit normals: [...,3] -> [...,9].

    Convention: x right, y up, z to the viewer; constants included, so shading = basis @ light.
    """
    x, y, z = normal.unbind(-1)
    terms = (torch.ones_like(x), x, y, z, x * y, x * z, y * z, x * x - y * y, 3 * z * z - 1)
    return torch.stack([c * t for c, t in zip(CONSTANTS, terms)], -1)


def shade(normal: Tensor, light: Tensor) -> Tensor:
    """Shading of a normal map: normal [B,3,H,W], light [B,9,3] -> [B,3,H,W], not clipped.

    Convention: display space when the light is. Normals enter as they are (DECA does not renormalise the
    interpolated ones); a zero normal gives the constant and minus the last term. A batch of one broadcasts.
    """
    if normal.ndim != 4 or normal.shape[1] != 3 or light.shape[1:] != (9, 3):
        raise ValueError(
            f"want normal [B,3,H,W], light [B,9,3], got {list(normal.shape)}, {list(light.shape)}"
        )
    x, y, z = normal.split(1, 1)
    terms = torch.cat([normal, x * y, x * z, y * z, x * x - y * y, z * z], 1).flatten(2)
    scaled = (light * light.new_tensor(CONSTANTS)[:, None]).transpose(1, 2)
    weight = torch.cat([scaled[..., 1:8], 3 * scaled[..., 8:]], 2)
    shading = weight @ terms + (scaled[..., :1] - scaled[..., 8:])
    return shading.unflatten(2, normal.shape[2:])


def rotate(light: Tensor, rotation: Tensor) -> Tensor:
    """Turn a light, exactly: light [B,9,3], rotation [B,3,3] or [3,3] -> [B,9,3].

    Convention: the light itself turns, shade(R n, rotate(light, R)) = shade(n, light). Band 1 is a vector v,
    band 2 a traceless symmetric matrix Q (shading n'Qn), so the result is R v and R Q R'. Turning the head by
    R under a fixed light, seen from the head, is rotate(light, R.T).
    """
    if rotation.shape[-2:] != (3, 3):
        raise ValueError(f"rotation must be [B,3,3], got {list(rotation.shape)}")
    check_light(light)
    r = rotation.to(light).expand(len(light), 3, 3)
    c = CONSTANTS
    xy, xz, yz, d, z2 = (c[k] * light[:, k] for k in range(4, 9))
    xy, xz, yz = xy / 2, xz / 2, yz / 2
    q = torch.stack([d - z2, xy, xz, xy, -d - z2, yz, xz, yz, 2 * z2], 1).unflatten(1, (3, 3))  # [B,3,3,rgb]
    q = torch.einsum("bij,bjkc,blk->bilc", r, q, r)
    band2 = [2 * q[:, 0, 1] / c[4], 2 * q[:, 0, 2] / c[5], 2 * q[:, 1, 2] / c[6]]
    band2 += [(q[:, 0, 0] - q[:, 1, 1]) / (2 * c[7]), q[:, 2, 2] / (2 * c[8])]
    return torch.cat([light[:, :1], r @ light[:, 1:4], torch.stack(band2, 1)], 1)


def _lamp(direction: Tensor) -> Tensor:
    """A point-like lamp that shades 1 where faced: unit [...,3] -> [...,9], the clamped cosine's bands."""
    return basis(direction) * direction.new_tensor([math.pi, *[1 / b for b in _BAND[1:]]])


def from_direction(
    direction: Tensor, intensity=1.0, colour=(1.0, 1.0, 1.0), softness=0.0, ambient=0.0
) -> Tensor:
    """Physical light of one distant source: direction [B,3] (need not be unit) -> light [B,9,3], linear.

    intensity [B] or a number: shading of a white surface that faces a small source.
    colour    [B,3] or three numbers, linear RGB, of the source only.
    softness  0..1: the source is a disc of half-angle softness x 90 degrees and the same flux.
    ambient   number, [B] or [B,3]: shading added everywhere.
    Convention: direction points to the source, x right, y up, z to the viewer. The bands are those of the
    clamped cosine (Ramamoorthi & Hanrahan 2001): the shading dips to -0.04 x intensity on the far side.
    """
    d = unit_directions(direction)
    soft = torch.as_tensor(softness, dtype=d.dtype, device=d.device)
    if not ((soft >= 0) & (soft <= 1)).all():
        raise ValueError(f"softness must lie in 0..1, got {softness}")
    cos = torch.cos(soft.expand(len(d)) * (math.pi / 2))[:, None]
    band1, band2 = (1 + cos) / 2, cos * (1 + cos) / 2  # a spherical cap's zonal coefficients
    lamp = _lamp(d) * torch.cat([torch.ones_like(cos), band1.expand(-1, 3), band2.expand(-1, 5)], 1)
    light = lamp[..., None] * (_per_item(intensity, d, "intensity") * _per_item(colour, d, "colour"))[:, None]
    fill = _per_item(ambient, d, "ambient") / _Y0
    return torch.cat([light[:, :1] + fill[:, None], light[:, 1:]], 1)


def from_environment(equirect: Tensor) -> Tensor:
    """Light of an equirectangular panorama: [B,3,h,w] linear radiance -> [B,9,3], linear.

    Convention: the panorama as the sitter sees it. Its centre is +z (the camera), the top row +y, and to
    the right of the panorama is the sitter's right hand, -x, the LEFT of the photo. A panorama taken from
    behind the camera towards the sitter has -z in its centre: rotate the result by pi about y.
    Each pixel weighs its solid angle. Raises ValueError on negative or non-finite radiance.
    """
    if equirect.ndim != 4 or equirect.shape[1] != 3:
        raise ValueError(f"environment map must be [B,3,h,w], got {list(equirect.shape)}")
    if not torch.isfinite(equirect).all() or (equirect < 0).any():
        raise ValueError("environment map holds NaN, infinite or negative radiance")
    h, w = equirect.shape[2:]
    like = {"dtype": equirect.dtype, "device": equirect.device}
    edge = torch.cos(torch.linspace(0, math.pi, h + 1, dtype=torch.float64)).to(**like)
    theta = (torch.arange(h, **like) + 0.5) * (math.pi / h)
    phi = (torch.arange(w, **like) + 0.5) * (2 * math.pi / w) - math.pi
    t, p = torch.meshgrid(theta, phi, indexing="ij")
    n = torch.stack([-t.sin() * p.sin(), t.cos(), t.sin() * p.cos()], -1)
    y = basis(n) / equirect.new_tensor(_BAND)
    omega = (edge[:-1] - edge[1:]) * (2 * math.pi / w)
    light = torch.einsum("bchw,hwk,h->bkc", equirect, y, omega)
    return torch.cat([light[:, :1], light[:, 1:] / math.pi], 1)


def from_dpr(light: Tensor) -> Tensor:
    """DPR light (Zhou et al. 2019) -> DECA's: [B,9] (white) or [B,9,3] -> [B,9,3].

    Convention: DPR's order is 1, Y, Z, X, YX, YZ, 3Z^2-1, XZ, X^2-Y^2 in its own axes, n_DPR = (X, -Z, Y).
    """
    if light.ndim == 2:
        light = light[..., None].expand(*light.shape, 3)
    d, r = check_light(light).unbind(1), math.sqrt(3) / 2
    out = (math.pi * d[0], d[3], d[2], -d[1], d[7], -d[4], -d[5], d[8] / 2 - r * d[6], -r * d[8] - d[6] / 2)
    return torch.stack(out, 1)


def fibonacci(n: int) -> Tensor:
    """n nearly even unit directions on the sphere, float64 [n,3]."""
    i = torch.arange(n, dtype=torch.float64)
    z = 1 - (2 * i + 1) / n
    phi = i * (math.pi * (3 - math.sqrt(5)))
    s = (1 - z * z).sqrt()
    return torch.stack([s * phi.cos(), s * phi.sin(), z], 1)


@functools.cache
def _sphere(n: int = 1024) -> tuple[Tensor, Tensor]:
    """Basis at n directions [n,9] and its pseudo-inverse [9,n], float64."""
    b = basis(fibonacci(n))
    return b, torch.linalg.pinv(b)


def _reproject(light: Tensor, f) -> Tensor:
    """Evaluate over the sphere, map each value by f, project back."""
    b, inverse = (constant_like(m, light) for m in _sphere())
    return inverse @ f((b @ check_light(light)).clamp_min(0))


def encode_light(light: Tensor) -> Tensor:
    """Linear light -> display-space light, [B,9,3]: max(E,0)^(1/2.2) projected over the sphere.

    Convention: gamma 2.2 in place of the sRGB curve, which has no product rule: with a power law
    encode(albedo x shading) = encode(albedo) x encode(shading).
    """
    return _reproject(light, lambda e: e.pow(1 / 2.2))


def decode_light(light: Tensor) -> Tensor:
    """Display-space light -> linear light, [B,9,3]: the inverse of encode_light.

    max(E,0)^2.2 projected over the sphere is off by what the projections cut away; six corrections by the
    error of encoding it again leave 1e-5 for lights with some ambient, 1e-2 for those that touch black.
    """

    def project(e: Tensor) -> Tensor:
        return _reproject(e, lambda v: v.pow(2.2))

    first = linear = project(light)
    for _ in range(6):
        linear = linear + first - project(encode_light(linear))
    return linear


def luminance(light: Tensor) -> Tensor:
    """[B,9,3] -> [B,9], Rec. 709 weights."""
    return light @ light.new_tensor(LUMINANCE)


def direction(light: Tensor, mean: Tensor | None = None) -> Tensor:
    """The dominant direction of a light, unit [B,3], from the luminance of band 1; +z where it has none.

    Convention: x right, y up, z to the viewer, towards the source. mean [9,3]: what counts as flat light, for
    priors such as DECA's whose mean has a direction of its own.
    """
    v = luminance(check_light(light if mean is None else light - mean.to(light)))[:, 1:4]
    length = v.norm(dim=1, keepdim=True)
    front = v.new_tensor([0.0, 0.0, 1.0]).expand_as(v)
    return torch.where(length > 1e-6, v / length.clamp_min(1e-6), front)


def from_angles(azimuth: Tensor, elevation: Tensor) -> Tensor:
    """Degrees [B], [B] -> unit directions [B,3].

    Convention: azimuth 0 is the camera's side, 90 the right of the picture, 180 behind; elevation 90 above.
    """
    a, e = azimuth * (math.pi / 180), elevation * (math.pi / 180)
    return torch.stack([a.sin() * e.cos(), e.sin(), a.cos() * e.cos()], 1)


def mix(lights: list[Tensor], weights: list[float] | Tensor) -> Tensor:
    """Weighted sum of lights [B,9,3]; the weights are used as they are.

    Convention: weights that add to 1 blend display-space lights. To switch two lamps on at once, mix what
    decode_light makes of them and encode the sum.
    """
    if len(lights) == 0 or len(lights) != len(weights):
        raise ValueError(f"mix: {len(lights)} lights want as many weights, got {len(weights)}")
    return sum(w * check_light(light) for w, light in zip(weights, lights))


def interpolate(a: Tensor, b: Tensor, w: Tensor, spherical: bool = False) -> Tensor:
    """Lights a to b, [1,9,3] or [n,9,3], at w [n] (0 gives a) -> [n,9,3].

    Convention: linear, or DiFaReli's slerp: the angle between the 27-vectors, applied to the vectors as
    they are. Equal directions, where the official slerp is NaN, fall back to linear.
    """
    w = w.to(check_light(a)).reshape(-1, 1, 1)
    line = torch.lerp(a, check_light(b).to(a), w)
    if not spherical:
        return line
    cos = F.cosine_similarity(a.flatten(1), b.flatten(1).to(a), dim=1).clamp(-1, 1)[:, None, None]
    angle = cos.acos()
    sin = angle.sin()
    arc = (((1 - w) * angle).sin() * a + (w * angle).sin() * b.to(a)) / sin.clamp_min(1e-12)
    return torch.where(sin > 1e-3, arc, line)


# --- a light from a photo -------------------------------------------------------------------------


@functools.cache
def _dictionary() -> Tensor:
    """Lamps at 160 directions and the ambient, as lights: [161,9] float64."""
    ambient = torch.zeros(1, 9, dtype=torch.float64)
    ambient[0, 0] = 1 / _Y0
    return torch.cat([_lamp(fibonacci(160)), ambient])


def _nonnegative(moment: Tensor, target: Tensor, atoms: Tensor, w: Tensor, iterations: int) -> Tensor:
    """min 1/2 l'Ml - t'l over lights l = atoms' w, w >= 0: FISTA (Beck & Teboulle 2009) with restarts.

    moment [P,9,9], target [P,9], atoms [K,9], w [P,K] to start from -> w [P,K].
    """
    root = torch.linalg.cholesky((atoms.T @ atoms).cpu()).to(atoms.device)
    step = 1 / torch.linalg.matrix_norm(root.T @ moment @ root).clamp_min(1e-12)[:, None]
    v, t = w, torch.ones_like(step)
    for _ in range(iterations):
        slope = torch.bmm(moment, (v @ atoms)[..., None])[..., 0] - target
        new = torch.relu(v - step * (slope @ atoms.T))
        t = torch.where(((v - new) * (new - w)).sum(1, keepdim=True) > 0, torch.ones_like(t), t)
        grown = (1 + (1 + 4 * t * t).sqrt()) / 2
        v, w, t = new + (t - 1) / grown * (new - w), new, grown
    return w


def fit(normal: Tensor, albedo: Tensor, image: Tensor, mask: Tensor, rounds: int = 3) -> Tensor:
    """The light of a photo: image = albedo x shading -> [B,9,3], robust, non-negative.

    normal [B,3,H,W], albedo and image [B,3,H,W] in display space, mask [B,1,H,W] weights 0..1.
    Plain least squares goes negative off the observed normals; here each channel is a non-negative sum of 160
    lamps and an ambient, projected onto the basis. Only the 9 x 9 moments of the pixels enter. rounds of
    re-weighting (Cauchy, scale from the median residual) leave specular and shadow out; 0 for none.
    Convention: display space, so the result goes straight into shade. Raises ValueError on an empty mask.
    """
    b, _, h, w = normal.shape
    for name, x, c in (("albedo", albedo, 3), ("image", image, 3), ("mask", mask, 1)):
        if x.shape != (b, c, h, w):
            raise ValueError(f"fit: {name} must be [{b},{c},{h},{w}], as the normals, got {list(x.shape)}")
    for name, x in (("normal", normal), ("albedo", albedo), ("image", image), ("mask", mask)):
        if not torch.isfinite(x).all():
            raise ValueError(f"fit: {name} holds NaN or infinite values")
    s = max(1, math.isqrt(h * w // 16384))  # about 128 x 128 pixels tell as much
    n, rho, y, m = (x[:, :, ::s, ::s].flatten(2) for x in (normal, albedo, image, mask))
    if not (m.sum((1, 2)) > 0).all():
        raise ValueError("fit: the mask of a picture is empty, there is no pixel to read the light from")
    phi = basis(F.normalize(n.transpose(1, 2), dim=2))[:, None]  # [B,1,N,9]
    atoms = constant_like(_dictionary(), phi)
    weight, k = m, y.new_zeros(b * 3, len(atoms))
    for i in range(rounds + 1):
        x = rho[..., None] * phi
        xw = (weight[..., None] * x).transpose(2, 3)
        moment, target = xw @ x, (xw @ y[..., None])[..., 0]
        size = moment.diagonal(dim1=2, dim2=3).sum(-1)[..., None].clamp_min(1e-12)
        moment, target = (moment / size[..., None]).flatten(0, 1), (target / size).flatten(0, 1)
        k = _nonnegative(moment, target, atoms, k, 300 if i == rounds else 100)
        light = (k @ atoms).unflatten(0, (b, 3)).transpose(1, 2)
        if i < rounds:
            r = (y - rho * (phi[:, 0] @ light).transpose(1, 2)).abs().mean(1, keepdim=True)
            seen = torch.where(m > 0, r, torch.full_like(r, float("nan")))
            scale = 2.5 * seen.nanmedian(2, keepdim=True).values + 0.01
            weight = m / (1 + (r / scale) ** 2)
    return light
