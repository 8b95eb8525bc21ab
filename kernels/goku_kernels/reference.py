"""The operators in readable eager PyTorch: the specification that every kernel is tested against.

Shapes: T tokens of a packed batch, B samples, H heads, D head_dim, d width. Every function computes
in promote(dtype, float32) whatever autocast says, is differentiable by plain autograd, and assumes
arguments that the public function beside it has checked.

On a CUDA device `varlen_attention` and its pair read cu_seqlens back once per call, since they loop
over samples; the kernels that take their place will not.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ._checks import compute_dtype, readable


def without_autocast(x: Tensor) -> torch.autocast:
    """Context in which autocast changes no dtype: the operators choose theirs themselves."""
    return torch.autocast(x.device.type, enabled=False)


def segments(cu_seqlens: Tensor, tokens: int, token_offset: int) -> tuple[Tensor, Tensor | None]:
    """Sample of each of the T rows, and which rows belong to one.

    Returns:
        segment: int64 (T,), the sample whose tokens include global row token_offset + i (the last
            sample for padding rows).
        inside: bool (T,), False for padding rows (at or past cu_seqlens[-1]); None where it is
            known on the host that there are none.
    """
    rows_T = torch.arange(token_offset, token_offset + tokens, device=cu_seqlens.device)
    # right=True: a row on a boundary belongs to the later sample, and empty samples are passed
    # over.
    segment = torch.searchsorted(cu_seqlens[1:], rows_T, right=True)
    if readable(cu_seqlens) and token_offset + tokens <= int(cu_seqlens[-1]):
        return segment, None
    return segment.clamp(max=cu_seqlens.shape[0] - 2), rows_T < cu_seqlens[-1]


def zero_padding(x: Tensor, inside: Tensor | None) -> Tensor:
    """`x` with the rows that are not `inside` set to zero, in value and gradient."""
    if inside is None:
        return x
    return x.masked_fill(~inside.view(-1, *[1] * (x.dim() - 1)), 0)


def grid_positions(
    cu_seqlens: Tensor, grid_sizes: Tensor, segment: Tensor, token_offset: int
) -> Tensor:
    """(t, h, w) of every row inside its own sample: int64 (T, 3), tokens in row-major order."""
    rows_T = torch.arange(token_offset, token_offset + segment.shape[0], device=segment.device)
    index = rows_T - cu_seqlens.index_select(0, segment)
    # clamp: a padding row may be mapped to an empty sample; its position is never used.
    _, h, w = grid_sizes.clamp(min=1).long().index_select(0, segment).unbind(1)
    return torch.stack((index // (h * w), index // w % h, index % w), dim=1)


def rope_rotation(
    positions: Tensor, axes_dim: Sequence[int], theta: float, dtype: torch.dtype
) -> Tensor:
    """exp(i * position * freq) of every channel pair: complex (T, D/2), axes t, h, w in turn.

    freq_i = theta^(-2i/d_axis), i < d_axis/2, for each axis (RoPE, arXiv 2104.09864, eq. 15, one
    axis of the grid at a time).
    """
    angles = []
    for axis, size in enumerate(axes_dim):
        exponent = torch.arange(0, size, 2, dtype=torch.float64, device=positions.device) / size
        freq = (theta**-exponent).to(dtype)
        angles.append(positions[:, axis, None].to(dtype) * freq)
    angle = torch.cat(angles, dim=1)
    return torch.complex(angle.cos(), angle.sin())


def half_order(axes_dim: Sequence[int], device: torch.device) -> Tensor:
    """Channel order that brings pairs (i, i + d_axis/2) of each axis's slice side by side."""
    order, start = [], 0
    for size in axes_dim:
        channels = torch.arange(start, start + size, device=device)
        order.append(channels.view(2, size // 2).t().flatten())
        start += size
    return torch.cat(order)


def rotate(x: Tensor, rotation: Tensor) -> Tensor:
    """Turn the pairs (x0, x1), (x2, x3), ... of x (T, H, D) by rotation (T, D/2) complex."""
    # A pair as one complex number: one pass, 30 times faster on a CPU than slicing (measured).
    x = x.contiguous()
    # No complex number begins at an odd element. torch.compile cannot ask, and refuses such a tensor.
    if not torch.compiler.is_compiling() and x.storage_offset() % 2:
        x = x.clone()
    pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * rotation[:, None]).flatten(-2)


def _own(y: Tensor, x: Tensor) -> Tensor:
    """`y`, copied if nothing was done to `x`: no operator returns its argument."""
    return y.clone() if y is x else y


def _rms(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """RMSNorm over the last axis in x's dtype."""
    return F.rms_norm(x, x.shape[-1:], None if weight is None else weight.to(x.dtype), eps)


def qk_norm_rope(
    q: Tensor, k: Tensor | None, q_weight: Tensor | None, k_weight: Tensor | None, *,
    cu_seqlens: Tensor, grid_sizes: Tensor | None, axes_dim: Sequence[int], norm: str, pairing: str,
    rotate_k: bool, theta: float, eps: float, positions: Tensor | None,
    position_offset: Tensor | None, position_scale: Tensor | None, token_offset: int,
) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
    """Normalise queries and keys, then rotate them by their positions: see the public function."""
    dtype = compute_dtype(q)
    segment, inside = segments(cu_seqlens, q.shape[0], token_offset)
    if positions is None:
        assert grid_sizes is not None
        positions = grid_positions(cu_seqlens, grid_sizes, segment, token_offset)
        # (3,) or (B, 3) -> the row of every token
        for x, apply in ((position_scale, torch.mul), (position_offset, torch.add)):
            if x is not None:
                rows = x.detach().to(dtype).expand(cu_seqlens.shape[0] - 1, 3)
                positions = apply(positions, rows.index_select(0, segment))
    rotation = rope_rotation(positions, axes_dim, theta, dtype)
    order = half_order(axes_dim, q.device) if pairing == "half" else None

    def one(x: Tensor, weight: Tensor | None, rotated: bool) -> Tensor:
        y = zero_padding(x, inside if rotated else None).to(dtype)
        if norm == "full":
            y = _rms(y.flatten(1), weight, eps).view(x.shape)
        elif norm == "head":
            y = _rms(y, weight, eps)
        if rotated:
            if order is None:
                y = rotate(y, rotation)
            else:
                y = rotate(y.index_select(-1, order), rotation).index_select(-1, order.argsort())
        return _own(y.to(x.dtype), x)

    with without_autocast(q):
        if k is None:
            return one(q, q_weight, rotated=True)
        return one(q, q_weight, rotated=True), one(k, k_weight, rotated=rotate_k)


def _norm(x: Tensor, norm: str, weight: Tensor | None, eps: float) -> Tensor:
    if norm == "layer":
        return F.layer_norm(
            x, x.shape[-1:], None if weight is None else weight.to(x.dtype), None, eps
        )
    if norm == "rms":
        return _rms(x, weight, eps)
    assert norm == "none"
    return x


def _rows(modulation: Tensor, segment: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The modulation row of every token: (T, d) or (d,)."""
    m = modulation.to(dtype)
    return m if segment is None else m.index_select(0, segment)


def adaln_modulate(
    x: Tensor, shift: Tensor | None, scale: Tensor | None, cu_seqlens: Tensor | None, *,
    norm: str, weight: Tensor | None, eps: float, token_offset: int,
) -> Tensor:  # fmt: skip
    """norm(x) * (1 + scale) + shift: see the public function."""
    dtype = compute_dtype(x)
    segment = inside = None
    if cu_seqlens is not None:
        segment, inside = segments(cu_seqlens, x.shape[0], token_offset)
    with without_autocast(x):
        y = _modulate(x, shift, scale, segment, inside, norm, weight, eps, dtype).to(x.dtype)
        return _own(y, x)


def _modulate(
    x: Tensor, shift: Tensor | None, scale: Tensor | None, segment: Tensor | None,
    inside: Tensor | None, norm: str, weight: Tensor | None, eps: float, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    y = _norm(zero_padding(x, inside).to(dtype), norm, weight, eps)
    gain = None if scale is None else _rows(1 + scale.to(dtype), segment, dtype)
    if gain is not None and shift is not None:
        y = torch.addcmul(_rows(shift, segment, dtype), y, gain)
    elif gain is not None:
        y = y * gain
    elif shift is not None:
        y = y + _rows(shift, segment, dtype)
    return zero_padding(y, inside)


def gated_residual_adaln(
    residual: Tensor, branch: Tensor, gate: Tensor | None, shift: Tensor | None,
    scale: Tensor | None, cu_seqlens: Tensor | None, *,
    norm: str, weight: Tensor | None, eps: float, token_offset: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """residual + gate * branch, then adaln_modulate of it: see the public function."""
    dtype = compute_dtype(residual)
    segment = inside = None
    if cu_seqlens is not None:
        segment, inside = segments(cu_seqlens, residual.shape[0], token_offset)
    with without_autocast(residual):
        r, b = (zero_padding(x, inside).to(dtype) for x in (residual, branch))
        out = r + b if gate is None else torch.addcmul(r, b, _rows(gate, segment, dtype))
        # The norm reads what is stored, so that the fused operator equals its two halves.
        out = zero_padding(out, inside).to(residual.dtype)
        y = _modulate(out, shift, scale, segment, inside, norm, weight, eps, dtype)
        return y.to(residual.dtype), out


def _offsets(cu_seqlens_q: Tensor, cu_seqlens_k: Tensor) -> tuple[list[int], list[int]]:
    """Both on the host, each read once a call (on a CUDA device that waits for it)."""
    q = cu_seqlens_q.tolist()
    return q, q if cu_seqlens_k is cu_seqlens_q else cu_seqlens_k.tolist()


def _split(x: Tensor, offsets: list[int]) -> tuple[list[Tensor], Tensor]:
    """The samples of x (T, ...), and the padding rows after the last one."""
    lengths = [b - a for a, b in itertools.pairwise(offsets)]
    # split, not slices: its backward is one concatenation instead of one full gradient per sample.
    *parts, padding = x.split([*lengths, x.shape[0] - offsets[-1]])
    return parts, padding


def _expand_heads(x: Tensor, heads: int) -> Tensor:
    """Repeat each of the key/value heads of x (T, Hkv, D) for the query heads it serves."""
    return x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], dim=1)


def varlen_attention(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, *,
    softmax_scale: float, return_lse: bool, deterministic: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
    """softmax(scale * q k^T) v within every sample: see the public function."""
    q_offsets, k_offsets = _offsets(cu_seqlens_q, cu_seqlens_k)
    qs, q_padding = _split(q, q_offsets)
    ks, _ = _split(k, k_offsets)
    vs, _ = _split(v, k_offsets)
    outs: list[Tensor] = []
    lses: list[Tensor] = []
    # The fused CUDA backends add up dq by atomics; the plain one multiplies matrices.
    plain = sdpa_kernel(SDPBackend.MATH) if deterministic and q.is_cuda else nullcontext()
    with without_autocast(q), plain:
        for qi, ki, vi in zip(qs, ks, vs, strict=True):
            if qi.shape[0] == 0:
                continue
            if return_lse:
                out, lse = _attend(qi, ki, vi, softmax_scale)
                outs.append(out)
                lses.append(lse)
            elif ki.shape[0] == 0:
                outs.append(_nothing(qi))
            else:
                ki, vi = _expand_heads(ki, q.shape[1]), _expand_heads(vi, q.shape[1])
                # (1, H, T, D) views; the result lies as (T, H, D) again, so nothing is copied.
                qi, ki, vi = (x.transpose(0, 1).unsqueeze(0) for x in (qi, ki, vi))
                out = F.scaled_dot_product_attention(qi, ki, vi, scale=softmax_scale)
                outs.append(out.squeeze(0).transpose(0, 1))
        out = torch.cat([*outs, torch.zeros_like(q_padding)])
        if not return_lse:
            return out
        lses.append(lse_of_nothing(q_padding))
        return out, torch.cat(lses, dim=1)


def lse_of_nothing(q: Tensor) -> Tensor:
    """The log-sum-exp over no keys, -inf: (H, T)."""
    return q.new_full((q.shape[1], q.shape[0]), float("-inf"), dtype=compute_dtype(q))


def _nothing(q: Tensor) -> Tensor:
    """The output over no keys: zeros that stay in the graph of q, with zero gradient."""
    return q.masked_fill(torch.ones((), dtype=torch.bool, device=q.device), 0)


def _attend(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Attention of one sample with its scores in memory: out (T, H, D), lse (H, T)."""
    if k.shape[0] == 0:
        return _nothing(q), lse_of_nothing(q)
    dtype = compute_dtype(q)
    k, v = _expand_heads(k, q.shape[1]), _expand_heads(v, q.shape[1])
    scores_HTS = torch.einsum("thd,shd->hts", q.to(dtype), k.to(dtype)) * scale
    lse_HT = scores_HTS.logsumexp(-1)
    weights = (scores_HTS - lse_HT.unsqueeze(-1)).exp()
    return torch.einsum("hts,shd->thd", weights, v.to(dtype)).to(q.dtype), lse_HT


def varlen_attention_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
    cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, *, softmax_scale: float, dlse: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of attention from its saved output and lse: see the public function.

    With P = exp(S - lse), dP = dout v^T and delta = rowsum(dout * out) - dlse the gradient of the
    scores is dS = P * (dP - delta) (FlashAttention-2, arXiv 2307.08691, algorithm 2).
    """
    dtype = compute_dtype(q)
    dq, dk, dv = (torch.zeros_like(x, dtype=dtype) for x in (q, k, v))
    heads, kv_heads = q.shape[1], k.shape[1]
    q_offsets, k_offsets = _offsets(cu_seqlens_q, cu_seqlens_k)
    with without_autocast(q):
        for i in range(len(q_offsets) - 1):
            a, b = q_offsets[i], q_offsets[i + 1]
            c, d = k_offsets[i], k_offsets[i + 1]
            if a == b or c == d:
                continue
            qi, gi, oi = (x[a:b].to(dtype) for x in (q, dout, out))
            ki, vi = (_expand_heads(x[c:d].to(dtype), heads) for x in (k, v))
            scores_HTS = torch.einsum("thd,shd->hts", qi, ki) * softmax_scale
            weights = (scores_HTS - lse[:, a:b, None].to(dtype)).exp()
            delta_HT = (gi * oi).sum(-1).t()
            if dlse is not None:
                delta_HT = delta_HT - dlse[:, a:b].to(dtype)
            dweights = torch.einsum("thd,shd->hts", gi, vi)
            dscores = weights * (dweights - delta_HT.unsqueeze(-1)) * softmax_scale
            dq[a:b] = torch.einsum("hts,shd->thd", dscores, ki)
            groups = (kv_heads, heads // kv_heads)
            dk[c:d] = torch.einsum("hts,thd->shd", dscores, qi).unflatten(1, groups).sum(2)
            dv[c:d] = torch.einsum("hts,thd->shd", weights, gi).unflatten(1, groups).sum(2)
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)
