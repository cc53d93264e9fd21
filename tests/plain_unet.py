"""The DiffusionRig denoiser once more, straight from its description and from nothing but a state dict.

Every operation as the papers write it: pictures joined at each step, one linear per block, condition and
step, normalisation and modulations one after the other, attention by einsum, NCHW. It is the independent
check of rig_core.denoisers.rig and the yardstick of the benchmark; tests/plain_relight.py is DiFaReli's.
"""

import math

import torch
import torch.nn.functional as F


def plain_forward(model, x, t, physical, code):
    """eps [B,3,H,W] of a DiffusionRig's weights: x [B,3,H,W], t [B], physical [B,9,H,W], code [B,latent]."""
    w = below(model, "denoisingUNet.")
    config = model.config

    emb = embed_time(w, t, x.dtype)
    h = torch.cat([x, physical], dim=1)
    hs = []
    downs = [m for m in range(1, count(w, "input_blocks")) if is_down(config, m)]
    for i in range(count(w, "input_blocks")):
        h = conv(w, "input_blocks.0.0", h) if i == 0 else h
        h = run(w, f"input_blocks.{i}", h, emb, code, config, "down" if i in downs else None) if i else h
        hs.append(h)
    h = run(w, "middle_block", h, emb, code, config, None)
    for i in range(count(w, "output_blocks")):
        h = torch.cat([h, hs.pop()], dim=1)
        h = run(w, f"output_blocks.{i}", h, emb, code, config, "up")
    return conv(w, "out.2", F.silu(norm(w, "out.0", h, config)))


def embed_time(w, t, dtype):
    half = w["time_embed.0.weight"].shape[1] // 2
    freq = torch.exp(-math.log(10000) * torch.arange(half, dtype=torch.float32, device=t.device) / half)
    args = t[:, None].float() * freq[None]
    emb = torch.cat([torch.cos(args), torch.sin(args)], dim=-1).to(dtype)
    return linear(w, "time_embed.2", F.silu(linear(w, "time_embed.0", emb)))


def below(model, prefix):
    return {k.removeprefix(prefix): v for k, v in model.named_parameters() if k.startswith(prefix)}


def count(w, name):
    return 1 + max(int(k.split(".")[1]) for k in w if k.startswith(name + "."))


def is_down(config, i):
    """Input blocks come as num_res_blocks blocks a level and then one that halves the picture."""
    return i % (config.num_res_blocks + 1) == 0


def run(w, name, h, emb, code, config, resample):
    """The layers of one block in turn. On the way up a residual block that is not the first one doubles."""
    layers = sorted({int(k[len(name) + 1 :].split(".")[0]) for k in w if k.startswith(name + ".")})
    for j in layers:
        key = f"{name}.{j}"
        if f"{key}.qkv.weight" in w:
            h = attention(w, key, h, config)
        elif f"{key}.op.weight" in w:
            h = conv(w, f"{key}.op", h, stride=2)
        elif f"{key}.conv.weight" in w:
            h = conv(w, f"{key}.conv", F.interpolate(h, scale_factor=2, mode="nearest"))
        elif resample == "up":
            h = resblock(w, key, h, emb, code, config, "up" if j > 0 else None)
        else:
            h = resblock(w, key, h, emb, code, config, resample)
    return h


def resblock(w, name, x, emb, code, config, resample):
    """code: DiffusionRig's global code scales and shifts after the timestep, DiFaReli's vector gates."""
    h = F.silu(norm(w, f"{name}.in_layers.0", x, config))
    if resample == "up":
        h, x = (F.interpolate(v, scale_factor=2, mode="nearest") for v in (h, x))
    elif resample == "down":
        h, x = (F.avg_pool2d(v, 2) for v in (h, x))
    h = conv(w, f"{name}.in_layers.2", h)
    h = norm(w, f"{name}.out_layers.0", h, config)
    for layer, c in (("emb_layers", emb), ("cond_emb_layers", code)):
        if f"{name}.{layer}.1.weight" not in w:
            continue
        scale, shift = linear(w, f"{name}.{layer}.1", F.silu(c))[:, :, None, None].chunk(2, dim=1)
        h = h * (1 + scale) + shift
    if f"{name}.cond_proj_layers.0.weight" in w:
        gate = code
        for j in (0, 2, 4):
            gate = F.silu(linear(w, f"{name}.cond_proj_layers.{j}", gate))
        h = h * gate[:, :, None, None]
    h = conv(w, f"{name}.out_layers.3", F.silu(h))
    if f"{name}.skip_connection.weight" in w:
        x = conv(w, f"{name}.skip_connection", x)
    return x + h


def attention(w, name, x, config):
    b, c, height, width = x.shape
    x = x.reshape(b, c, height * width)
    n = norm(w, f"{name}.norm", x, config)
    qkv = F.conv1d(n, w[f"{name}.qkv.weight"], w[f"{name}.qkv.bias"])
    heads = config.num_heads
    d = c // heads
    q, k, v = qkv.reshape(b * heads, 3 * d, height * width).split(d, dim=1)
    weight = torch.einsum("bct,bcs->bts", q * d**-0.25, k * d**-0.25)
    weight = torch.softmax(weight.float(), dim=-1).to(weight.dtype)
    a = torch.einsum("bts,bcs->bct", weight, v).reshape(b, c, height * width)
    h = F.conv1d(a, w[f"{name}.proj_out.weight"], w[f"{name}.proj_out.bias"])
    return (x + h).reshape(b, c, height, width)


def norm(w, name, h, config):
    """GroupNorm, in float32 for every input type."""
    weight, bias = w[f"{name}.weight"].float(), w[f"{name}.bias"].float()
    return F.group_norm(h.float(), config.norm_groups, weight, bias).to(h.dtype)


def conv(w, name, h, stride=1):
    weight = w[f"{name}.weight"]
    return F.conv2d(h, weight, w[f"{name}.bias"], stride, weight.shape[-1] // 2)


def linear(w, name, h):
    return F.linear(h, w[f"{name}.weight"], w[f"{name}.bias"])
