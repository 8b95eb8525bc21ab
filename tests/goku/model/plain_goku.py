"""The Goku transformer once more, written from the paper's facts: one sample at a time, no packing.

Reads parameters from a state_dict by their published names. Shares no code with goku or
goku_kernels: norms are spelled out, rotations are 2x2 matrices applied to channel pairs, attention
    is a plain softmax.
"""

import math

import torch


def rms(x, weight, eps=1e-6):
    return x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt() * weight


def layer_norm(x, eps=1e-6):
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.pow(2).mean(-1, keepdim=True) + eps).sqrt()


def silu(x):
    return x * torch.sigmoid(x)


def gelu_tanh(x):
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def rope_matrices(grid, axes, theta=10000.0):
    """(tokens, head_dim/2, 2, 2) rotation matrices of every token of a (t, h, w) grid."""
    places = [(a, b, c) for a in range(grid[0]) for b in range(grid[1]) for c in range(grid[2])]
    rows = []
    for place in places:
        angles = [
            p * theta ** (-2 * i / d)
            for p, d in zip(place, axes, strict=True)
            for i in range(d // 2)
        ]
        rows.append([[[math.cos(a), -math.sin(a)], [math.sin(a), math.cos(a)]] for a in angles])
    return torch.tensor(rows, dtype=torch.float64)


def rotated(x, matrices):
    """x (tokens, heads, head_dim) with pairs (0,1), (2,3), ... turned."""
    pairs = x.reshape(*x.shape[:2], -1, 2)
    return torch.einsum("tpij,thpj->thpi", matrices, pairs).reshape(x.shape)


def attention(p, prefix, x, context, heads, matrices, rotate_keys):
    def projected(name, source):
        return source @ p[f"{prefix}.{name}_proj.weight"].T

    def split(y):
        return y.reshape(y.shape[0], heads, -1)

    q = split(rms(projected("q", x), p[f"{prefix}.q_norm.weight"]))
    k = split(rms(projected("k", context), p[f"{prefix}.k_norm.weight"]))
    v = split(projected("v", context))
    q = rotated(q, matrices)
    if rotate_keys:
        k = rotated(k, matrices)
    scores = torch.einsum("qhd,khd->hqk", q, k) / math.sqrt(q.shape[-1])
    out = torch.einsum("hqk,khd->qhd", torch.softmax(scores, -1), v)
    return out.reshape(x.shape) @ p[f"{prefix}.o_proj.weight"].T


def block(p, prefix, x, c, text, heads, matrices):
    rows = silu(c) @ p[f"{prefix}norm1.linear.weight"].T + p[f"{prefix}norm1.linear.bias"]
    shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = rows.chunk(6)
    y = layer_norm(x) * (1 + scale_msa) + shift_msa
    x = x + gate_msa * attention(p, f"{prefix}attn1", y, y, heads, matrices, rotate_keys=True)
    y = rms(x, p[f"{prefix}norm2.weight"])
    x = x + attention(p, f"{prefix}attn2", y, text, heads, matrices, rotate_keys=False)
    y = rms(x, p[f"{prefix}norm3.weight"]) * (1 + scale_mlp) + shift_mlp
    y = gelu_tanh(y @ p[f"{prefix}mlp.fc1.weight"].T + p[f"{prefix}mlp.fc1.bias"])
    y = y @ p[f"{prefix}mlp.fc2.weight"].T + p[f"{prefix}mlp.fc2.bias"]
    return x + gate_mlp * y


def transformer(p, config, x, t, text, grid, axes):
    """Velocity of one sample: x (tokens, patch_dim), scalar t, text (n, text_dim)."""
    half = config.time_channels // 2
    freq = [math.exp(-math.log(10000) * i / half) for i in range(half)]
    angles = 1000 * t * torch.tensor(freq, dtype=torch.float64)
    features = torch.cat([torch.cos(angles), torch.sin(angles)])
    c = features @ p["time_embed.fc1.weight"].T + p["time_embed.fc1.bias"]
    c = silu(c) @ p["time_embed.fc2.weight"].T + p["time_embed.fc2.bias"]
    x = x @ p["patch_embed.weight"].T + p["patch_embed.bias"]
    matrices = rope_matrices(grid, axes)
    for i in range(config.depth):
        x = block(p, f"blocks.{i}.", x, c, text, config.heads, matrices)
    rows = silu(c) @ p["final.modulation.linear.weight"].T + p["final.modulation.linear.bias"]
    shift, scale = rows.chunk(2)
    y = layer_norm(x) * (1 + scale) + shift
    return y @ p["final.proj.weight"].T + p["final.proj.bias"]
