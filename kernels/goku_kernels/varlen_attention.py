"""varlen_attention: full (non-causal) attention inside every sample of a packed batch.

Letters in shapes: Tq queries, Tk keys, B samples, H query heads, Hk key/value heads, D head_dim.
The arguments are those of flash_attn_varlen_func.

Every backend runs inside the custom op goku_kernels::varlen_attention, so that torch.compile traces a
call whole and selective activation checkpointing can name it, whatever computes it.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Sequence
from typing import Any, Literal, overload

import torch
from torch import Tensor

from . import _checks as check
from . import _flash_attn as flash_attn
from . import reference

_OP = "varlen_attention"
_BACKENDS = ("torch", "triton", "cuda", "flash")
_HEAD_DIMS = (64, 72, 96, 128)
_AUTOGRAD = [
    getattr(torch._C.DispatchKey, name)
    for name in ("AutogradFunctionality", "AutogradOther", "ADInplaceOrView")
]


@torch.library.custom_op("goku_kernels::varlen_attention", mutates_args=())
def _forward(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int,
    max_seqlen_k: int, softmax_scale: float, deterministic: bool, return_lse: bool, backend: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    if backend == "triton":
        from .triton import varlen_attention as kernels
        from .triton.launch import launcher

        return kernels.forward(
            q, k, v, cu_seqlens_q, cu_seqlens_k, softmax_scale, run=launcher(q)
        )  # fmt: skip
    if backend == "flash":
        return flash_attn.forward(
            q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale
        )
    result = reference.varlen_attention(
        q, k, v, cu_seqlens_q, cu_seqlens_k, softmax_scale=softmax_scale, return_lse=return_lse,
        deterministic=deterministic,
    )  # fmt: skip
    # torch's own attention keeps its lse to itself.
    out, lse = (
        result
        if isinstance(result, tuple)
        else (result, q.new_empty(0, dtype=check.compute_dtype(q)))
    )
    return out.contiguous(), lse.contiguous()


@_forward.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int,
    max_seqlen_k: int, softmax_scale: float, deterministic: bool, return_lse: bool, backend: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    shape = (q.shape[1], q.shape[0]) if return_lse or backend != "torch" else (0,)
    return q.new_empty(q.shape), q.new_empty(shape, dtype=check.compute_dtype(q))


@torch.library.custom_op("goku_kernels::varlen_attention_backward", mutates_args=())
def _backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor | None, lse: Tensor | None,
    dlse: Tensor | None, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int,
    max_seqlen_k: int, softmax_scale: float, deterministic: bool, backend: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    # Without out and lse the reference's forward is run again: only "torch" can be asked to.
    cu = (cu_seqlens_q, cu_seqlens_k)
    if out is None or lse is None:
        return _differentiate_reference(dout, q, k, v, dlse, *cu, softmax_scale, deterministic)
    if backend == "triton":
        from .triton import varlen_attention as kernels
        from .triton.launch import launcher

        return kernels.backward(
            dout, q, k, v, out, lse, dlse, *cu, softmax_scale, run=launcher(q),
            deterministic=deterministic or torch.are_deterministic_algorithms_enabled(),
        )  # fmt: skip
    if backend == "flash":
        return flash_attn.backward(
            dout, q, k, v, out, lse, dlse, *cu, max_seqlen_q, max_seqlen_k, softmax_scale,
            deterministic,
        )  # fmt: skip
    dq, dk, dv = reference.varlen_attention_backward(
        dout, q, k, v, out, lse, *cu, softmax_scale=softmax_scale, dlse=dlse
    )
    return dq.contiguous(), dk.contiguous(), dv.contiguous()


@_backward.register_fake
def _(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor | None, lse: Tensor | None,
    dlse: Tensor | None, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int,
    max_seqlen_k: int, softmax_scale: float, deterministic: bool, backend: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _differentiate_reference(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, dlse: Tensor | None, cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor, softmax_scale: float, deterministic: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of the reference as torch derives them; without dlse by its fused attention."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        return reference.varlen_attention(
            q, k, v, cu_seqlens_q, cu_seqlens_k, softmax_scale=softmax_scale,
            return_lse=dlse is not None, deterministic=deterministic,
        )  # fmt: skip

    with contextlib.ExitStack() as recording:
        # A custom op's body runs below autograd: nothing is recorded until its keys are let in again
        # (torch.func fails where a dispatch mode, such as a FLOP counter, has called the op).
        for key in _AUTOGRAD:
            recording.enter_context(torch._C._SetExcludeDispatchKeyGuard(key, False))
        recording.enter_context(torch.enable_grad())
        inputs = [x.detach().requires_grad_() for x in (q, k, v)]
        result = attend(*inputs)
        results = result if isinstance(result, tuple) else (result,)
        wanted = [
            (out, gradient)
            for out, gradient in zip(results, (dout, dlse), strict=False)
            if gradient is not None and out.requires_grad
        ]
        if not wanted:  # no query sees a key
            return torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
        dq, dk, dv = torch.autograd.grad(
            [out for out, _ in wanted], inputs, [gradient for _, gradient in wanted],
            allow_unused=True, materialize_grads=True,
        )  # fmt: skip
    return dq.contiguous(), dk.contiguous(), dv.contiguous()


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, cu_seqlens_q, cu_seqlens_k, *options, return_lse, backend = inputs
    saved = (None, None) if backend == "torch" else output
    ctx.save_for_backward(q, k, v, cu_seqlens_q, cu_seqlens_k, *saved)
    ctx.options = (*options, backend)
    ctx.empty_lse = backend == "torch" and not return_lse
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Any, ...]:
    q, k, v, cu_seqlens_q, cu_seqlens_k, out, lse = ctx.saved_tensors
    if dout is None:
        dout = q.new_zeros(q.shape)
    if ctx.empty_lse:
        dlse = None
    gradients = _backward(dout, q, k, v, out, lse, dlse, cu_seqlens_q, cu_seqlens_k, *ctx.options)
    return *gradients, *(None,) * 8


_forward.register_autograd(_differentiate, setup_context=_setup_context)


@overload
def varlen_attention(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int,
    max_seqlen_k: int, *, softmax_scale: float | None = ..., deterministic: bool = ...,
    return_lse: Literal[False] = ..., backend: str | None = ...,
) -> Tensor: ...  # fmt: skip


@overload
def varlen_attention(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int,
    max_seqlen_k: int, *, softmax_scale: float | None = ..., deterministic: bool = ...,
    return_lse: Literal[True], backend: str | None = ...,
) -> tuple[Tensor, Tensor]: ...  # fmt: skip


def varlen_attention(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor,
    max_seqlen_q: int, max_seqlen_k: int, *, softmax_scale: float | None = None,
    deterministic: bool = False, return_lse: bool = False, backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
    """softmax(softmax_scale * q k^T) v, where queries of a sample see its keys, all and only those.

    Differentiable once in q, k and v, through lse too. Under autocast q, k and v are cast to its
    dtype, as torch's own attention does (fp64 stays).

    "triton" takes fp16 and bf16, fp32 where torch allows TF32 (torch.set_float32_matmul_precision
    "high" or "medium": then it multiplies in it), and head_dim 64, 72, 96 and 128; 72 and 96 cost
    128/72 and 128/96 times their matrix work. On sm_90 its backward in fp16 and bf16 adds dq up by
    atomics, in fp32 and any order; elsewhere, with deterministic=True and under
    torch.use_deterministic_algorithms it computes the scores twice instead, seven matrix products
    for five. "flash" is flash-attn 2.7 or newer: fp16 and bf16, no gradient through lse.

    Args:
        q: (Tq, H, D) floating, unit inner stride.
        k, v: (Tk, Hk, D) of q's dtype; Hk divides H, and head i reads key/value head i // (H/Hk).
        cu_seqlens_q, cu_seqlens_k: int32 (B+1,). Rows at or past the last offset are padding:
            output and gradients zero, lse -inf.
        max_seqlen_q, max_seqlen_k: upper bounds of the segments' lengths; never change the result of
            "torch" and "triton". Too small a bound is an error on CPU tensors; on a GPU it cannot be
            seen without a synchronisation ("flash" then leaves queries out): take it from `Packing`.
        softmax_scale: default 1/sqrt(D).
        deterministic: equal bits on every run, backward included (forwards always are, and "torch"
            on a CPU; on a GPU "torch" then takes plain attention with the scores in memory).
        return_lse: also return the natural log of the sum of exponentials.
        backend: None, "torch", "triton", "cuda" or "flash".

    Returns:
        out (Tq, H, D) of q's dtype, or (out, lse) with lse (H, Tq) in promote(dtype, float32). A
        query without keys has out 0 and lse -inf.

    Raises:
        ValueError: an argument of wrong dtype, shape, device, stride or value.
        RuntimeError: a backend that this installation does not have.
    """
    q, k, v = _as_autocast(q=q, k=k, v=v)
    scale = _check(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale)
    out, lse = _forward(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, scale, deterministic,
        return_lse, _choose(backend, q),
    )  # fmt: skip
    return (out, lse) if return_lse else out


@torch.no_grad()
def varlen_attention_forward(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor,
    max_seqlen_q: int, max_seqlen_k: int, *, softmax_scale: float | None = None,
    deterministic: bool = False, backend: str | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The forward half of varlen_attention for callers that differentiate themselves.

    Ring attention (arXiv 2310.01889) merges the (out, lse) of several key blocks and calls
    `varlen_attention_backward` per block. Arguments, result and errors as varlen_attention with
    return_lse=True; records no graph.
    """
    return varlen_attention(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k,
        softmax_scale=softmax_scale, deterministic=deterministic, return_lse=True, backend=backend,
    )  # fmt: skip


@torch.no_grad()
def varlen_attention_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor, max_seqlen_q: int, max_seqlen_k: int, *, dlse: Tensor | None = None,
    softmax_scale: float | None = None, deterministic: bool = False, backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The backward half: gradients for this k and v from the output and lse of ALL keys.

    Args:
        dout: (Tq, H, D), gradient of out.
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale,
        deterministic,
            backend: as in varlen_attention.
        out: (Tq, H, D) as returned by the forward (or merged over key blocks).
        lse: (H, Tq) likewise.
        dlse: (H, Tq), gradient of lse, or None for zero.

    Returns:
        (dq, dk, dv) of the inputs' shapes and dtypes.

    Raises:
        ValueError: an argument of wrong dtype, shape, device, stride or value.
        RuntimeError: a backend that this installation does not have.
    """
    inputs = (q, k, v)
    # As the forward did: its lse belongs to these values of q and k.
    q, k, v, dout, out = _as_autocast(q=q, k=k, v=v, dout=dout, out=out)
    scale = _check(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale)
    for name, x in (("dout", dout), ("out", out)):
        # Any strides: autograd hands on expanded and transposed gradients.
        if x.dtype not in check.FLOATS:
            raise ValueError(f"{_OP}: {name} has dtype {x.dtype}: allowed are {list(check.FLOATS)}")
        check.check_shape(_OP, name, x, tuple(q.shape))
        check.check_device(_OP, name, x, q.device)
    check.check_tensor(_OP, "lse", lse)
    for name, rows in (("lse", lse), ("dlse", dlse)):
        if rows is not None:
            check.check_tensor(_OP, name, rows)
            check.check_shape(_OP, name, rows, (q.shape[1], q.shape[0]))
            check.check_device(_OP, name, rows, q.device)
            if rows.dtype != check.compute_dtype(q):
                raise ValueError(
                    f"{_OP}: {name} has dtype {rows.dtype}: allowed is {check.compute_dtype(q)}"
                )
    gradients = _backward(
        dout, q, k, v, out, lse, dlse, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k,
        scale, deterministic, _choose(backend, q),
    )  # fmt: skip
    dq, dk, dv = (x.to(given.dtype) for x, given in zip(gradients, inputs, strict=True))
    return dq, dk, dv


def _choose(backend: str | None, q: Tensor) -> str:
    """The backend to run on checked tensors, q in the dtype that is computed with."""
    chosen = check.choose_backend(_OP, backend, _BACKENDS, q, _triton_refusal(q))
    if chosen == "flash":
        flash_attn.check_available(_OP, q)
    return chosen


def _triton_refusal(q: Tensor) -> str | None:
    """Why the Triton kernels cannot take queries like these; None if they can."""
    suffix = 'allowed with backend="triton" are'
    if q.shape[2] not in _HEAD_DIMS:
        return f"q has head_dim {q.shape[2]}: {suffix} {list(_HEAD_DIMS)}"
    if q.dtype == torch.float64:
        return f"q has dtype {q.dtype}: {suffix} fp16, bf16 and, where TF32 is allowed, fp32"
    if q.dtype == torch.bfloat16 and q.device.type == "cpu":
        return (
            f"q has dtype {q.dtype}: Triton's interpreter multiplies it wrongly, take fp16 or fp32"
        )
    if q.dtype == torch.float32 and not _tf32_allowed():
        return (
            f"q has dtype {q.dtype}: {suffix} fp16, bf16 and, after "
            'torch.set_float32_matmul_precision("high"), fp32 multiplied in TF32'
        )
    return None


def _tf32_allowed() -> bool:
    """Whether torch may multiply fp32 in TF32, by its older or its newer setting."""
    try:
        return bool(torch.backends.cuda.matmul.allow_tf32)
    except RuntimeError:  # the process uses the newer one, and torch refuses to mix them
        return torch.backends.cuda.matmul.fp32_precision == "tf32"


def _as_autocast(**named: Tensor) -> tuple[Tensor, ...]:
    """The tensors in the active autocast dtype, if any; fp64 and what is no float stay as they are.

    Raises:
        ValueError: one that is no tensor, by its name.
    """
    for name, x in named.items():
        check.check_tensor(_OP, name, x)
    tensors = tuple(named.values())
    device = tensors[0].device.type
    if device == "meta" or not torch.is_autocast_enabled(device):  # torch knows no autocast of meta
        return tensors
    low = torch.get_autocast_dtype(device)
    keep = (torch.float64,)
    return tuple(x if x.dtype in keep or not x.is_floating_point() else x.to(low) for x in tensors)


def _check(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor,
    max_seqlen_q: int, max_seqlen_k: int, softmax_scale: float | None,
) -> float:  # fmt: skip
    """Check the arguments and return the softmax scale."""
    check.check_dense(_OP, "q", q, (None, None, None))
    check.check_dense(_OP, "k", k, (None, None, q.shape[2]))
    check.check_dense(_OP, "v", v, tuple(k.shape))
    for name, x in (("k", k), ("v", v)):
        if x.dtype != q.dtype:
            raise ValueError(
                f"{_OP}: {name} has dtype {x.dtype}: q has {q.dtype}, they must be equal"
            )
        check.check_device(_OP, name, x, q.device)
    if k.shape[1] == 0 or q.shape[1] % k.shape[1]:
        raise ValueError(
            f"{_OP}: k has {k.shape[1]} heads: allowed are divisors of q's {q.shape[1]}"
        )
    check.check_cu_seqlens(_OP, "cu_seqlens_q", cu_seqlens_q, q.device)
    check.check_cu_seqlens(_OP, "cu_seqlens_k", cu_seqlens_k, q.device)
    if cu_seqlens_q.shape != cu_seqlens_k.shape:
        raise ValueError(
            f"{_OP}: cu_seqlens_k has shape {tuple(cu_seqlens_k.shape)}: cu_seqlens_q has "
            f"{tuple(cu_seqlens_q.shape)}, they must be equal"
        )
    _check_lengths("q", q.shape[0], cu_seqlens_q, max_seqlen_q)
    _check_lengths("k", k.shape[0], cu_seqlens_k, max_seqlen_k)
    if softmax_scale is None:
        return float(q.shape[2]) ** -0.5
    check.check_positive(_OP, "softmax_scale", softmax_scale)
    return softmax_scale


def _check_lengths(name: str, rows: int, cu: Tensor, max_seqlen: int) -> None:
    check.check_count(_OP, f"max_seqlen_{name}", max_seqlen)
    if not check.readable(cu):
        return
    offsets = cu.tolist()
    if offsets[-1] > rows:
        raise ValueError(f"{_OP}: cu_seqlens_{name} ends at {offsets[-1]}: {name} has {rows} rows")
    longest = max(b - a for a, b in itertools.pairwise(offsets))
    if longest > max_seqlen:
        raise ValueError(
            f"{_OP}: max_seqlen_{name} is {max_seqlen}: the longest segment has {longest} tokens"
        )


def varlen_attention_flops(
    lengths_q: Sequence[int],
    lengths_k: Sequence[int],
    *,
    heads: int,
    head_dim: int,
    backward: bool = False,
) -> int:
    """Matrix arithmetic of one call: 4 * heads * head_dim * sum(len_q * len_k).

    The backward counts twice the forward: no recomputation (flash-attn's tables count 2.5 times).

    Raises:
        ValueError: the two lists have different lengths.
    """
    if len(lengths_q) != len(lengths_k):
        raise ValueError(f"lengths_q has {len(lengths_q)} samples and lengths_k {len(lengths_k)}")
    pairs = sum(a * b for a, b in zip(lengths_q, lengths_k, strict=True))
    return 4 * heads * head_dim * pairs * (2 if backward else 1)


def varlen_attention_bytes(
    tokens_q: int,
    tokens_k: int,
    *,
    heads: int,
    kv_heads: int | None = None,
    head_dim: int,
    itemsize: int,
    backward: bool = False,
) -> int:
    """Least memory traffic of one call in bytes: q, k, v read, out written; backward twice that.

    The fp32 lse counts 4 bytes per query and head in each direction.
    """
    elements = 2 * tokens_q * heads + 2 * tokens_k * (kv_heads or heads)
    return elements * head_dim * itemsize * (2 if backward else 1) + 4 * tokens_q * heads
