"""velocity_loss: mean squared velocity error of every sample, and its weighted mean.

Letters in shapes: T tokens, B samples, d channels of a token.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from . import _checks as check
from .reference import segments, without_autocast, zero_padding

_OP = "velocity_loss"
_BACKENDS = ("torch", "triton")
_LARGEST_WIDTH = 8192  # of triton/configs/velocity_loss.json


def velocity_loss(
    prediction: Tensor,
    target: Tensor,
    weights: Tensor,
    cu_seqlens: Tensor,
    *,
    weight_sum: Tensor | float,
    token_offset: int = 0,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """sum(w_i per_sample_i) / weight_sum, and per_sample: this module's `per_sample_mse`, then its
    `weighted_loss`. Differentiable in prediction, target and weights.

    Args:
        prediction: (T, d) floating, unit inner stride.
        target: as prediction; its dtype may differ.
        weights: (B,) floating, not negative.
        cu_seqlens: int32 (B+1,), global offsets of the samples.
        weight_sum: a positive number or a tensor of shape (), over the GLOBAL batch: the ranks' losses then add
            up to that of the whole batch.
        token_offset: global row of the first token (a shard may begin inside a sample).
        backend: None, "torch" or "triton".

    Returns:
        loss () of promote(per_sample's dtype, weights' dtype); per_sample (B,) of
        promote(prediction's dtype, target's dtype, float32).

    Raises:
        ValueError: an argument of wrong dtype, shape, device, stride or value.
        RuntimeError: a backend that this installation does not have.
    """
    per_sample = per_sample_mse(
        prediction, target, cu_seqlens, token_offset=token_offset, backend=backend
    )
    return weighted_loss(per_sample, weights, weight_sum), per_sample


def per_sample_mse(
    prediction: Tensor,
    target: Tensor,
    cu_seqlens: Tensor,
    *,
    token_offset: int = 0,
    backend: str | None = None,
) -> Tensor:
    """Mean squared error of each sample over its tokens and channels: (B,).

    Rows are reduced in promote(both dtypes, float32), each sample's rows in float64, rounded once:
    the result is the same in any packing to one rounding. No atomic addition takes part, forward or
    backward, so that it is deterministic, and nothing synchronises. Rows at or past cu_seqlens[-1]
    are padding: no part of any sum, gradient zero. A sample without tokens has error 0.

    A sample's divisor is its whole length, from cu_seqlens, also where the rows at hand are a shard
    that holds part of it: the result is then a partial sum, and adds up over the shards.

    Arguments, result and errors as :func:`velocity_loss`.
    """
    check.check_dense(_OP, "prediction", prediction, (None, None))
    check.check_dense(_OP, "target", target, prediction.shape)
    check.check_device(_OP, "target", target, prediction.device)
    refusal = None
    for name, x in (("prediction", prediction), ("target", target)):
        if x.dtype == torch.float64:
            refusal = f"{name} has dtype torch.float64: the Triton kernels compute in float32"
    if not 0 < prediction.shape[1] <= _LARGEST_WIDTH:
        refusal = check.width_refusal("prediction", prediction, _LARGEST_WIDTH)
    check.check_cu_seqlens(_OP, "cu_seqlens", cu_seqlens, prediction.device)
    check.check_count(_OP, "token_offset", token_offset)
    if check.choose_backend(_OP, backend, _BACKENDS, prediction, refusal) == "triton":
        return _mse(prediction, target, cu_seqlens, token_offset)
    return reference(prediction, target, cu_seqlens, token_offset)


def weighted_loss(per_sample: Tensor, weights: Tensor, weight_sum: Tensor | float) -> Tensor:
    """This pack's share of the global weighted mean: sum(w_i * per_sample_i) / weight_sum.

    `weight_sum` is the sum of the weights over the GLOBAL batch, all packs and all ranks. The
    shares of all packs on all ranks then add up to the loss, and their gradients to its gradient,
    however the samples are packed; gradients must therefore be summed over ranks, not averaged.

    Args:
        per_sample: (B,) from :func:`per_sample_mse`.
        weights: (B,) floating, not negative.
        weight_sum: a positive number or a tensor of shape () (its value is not checked, as that
            would synchronise a device).

    Returns:
        () in promote(per_sample's dtype, weights' dtype).

    Raises:
        ValueError: wrong dtype, shape or device, or weight_sum is a number that is not positive.
    """
    if weights.dtype not in check.FLOATS:
        raise ValueError(
            f"{_OP}: weights has dtype {weights.dtype}: allowed are {list(check.FLOATS)}"
        )
    check.check_shape(_OP, "weights", weights, per_sample.shape)
    check.check_device(_OP, "weights", weights, per_sample.device)
    if isinstance(weight_sum, Tensor):
        check.check_shape(_OP, "weight_sum", weight_sum, ())
        # A number of no dimension may lie on the CPU: torch passes it to a kernel by value.
        if weight_sum.device.type != "cpu":
            check.check_device(_OP, "weight_sum", weight_sum, per_sample.device)
    elif not (math.isfinite(weight_sum) and weight_sum > 0):
        raise ValueError(f"{_OP}: weight_sum is {weight_sum}: allowed is a finite number above 0")
    return (per_sample * weights).sum() / weight_sum


@torch.library.custom_op("goku_kernels::velocity_loss", mutates_args=())
def _mse(prediction: Tensor, target: Tensor, cu_seqlens: Tensor, token_offset: int) -> Tensor:
    from .triton import velocity_loss as kernels
    from .triton.launch import launcher

    return kernels.forward(prediction, target, cu_seqlens, token_offset, run=launcher(prediction))


@_mse.register_fake
def _(prediction: Tensor, target: Tensor, cu_seqlens: Tensor, token_offset: int) -> Tensor:
    return prediction.new_empty(cu_seqlens.shape[0] - 1, dtype=torch.float32)


@torch.library.custom_op("goku_kernels::velocity_loss_backward", mutates_args=())
def _mse_backward(
    gradient: Tensor, prediction: Tensor, target: Tensor, cu_seqlens: Tensor, token_offset: int
) -> Tensor:
    """The gradient of `prediction` from that of per_sample, (B,)."""
    from .triton import velocity_loss as kernels
    from .triton.launch import launcher

    return kernels.backward(
        gradient, prediction, target, cu_seqlens, token_offset, run=launcher(prediction)
    )


@_mse_backward.register_fake
def _(
    gradient: Tensor, prediction: Tensor, target: Tensor, cu_seqlens: Tensor, token_offset: int
) -> Tensor:
    return prediction.new_empty(prediction.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    prediction, target, cu_seqlens, token_offset = inputs
    ctx.save_for_backward(prediction, target, cu_seqlens)
    ctx.token_offset = token_offset


def _gradients(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    prediction, target, cu_seqlens = ctx.saved_tensors
    found: list[Tensor | None] = [None, None]
    # (p - q)^2 is symmetric: the target's gradient is that of the two exchanged.
    for i, (x, y) in enumerate(((prediction, target), (target, prediction))):
        if ctx.needs_input_grad[i]:
            found[i] = _mse_backward(gradient, x, y, cu_seqlens, ctx.token_offset)
    return *found, None, None


_mse.register_autograd(_gradients, setup_context=_save)


class _SegmentSums(torch.autograd.Function):
    """Sums of the values (n,) between the offsets (B+1,), one after the other, without atomics.

    Only to be twice differentiable, which torch.segment_reduce is not.
    """

    @staticmethod
    def forward(ctx: Any, values: Tensor, offsets: Tensor, segment: Tensor) -> Tensor:
        ctx.save_for_backward(offsets, segment)
        # unsafe: without checks, which would synchronise.
        return torch.segment_reduce(values, "sum", offsets=offsets, unsafe=True, initial=0)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        offsets, segment = ctx.saved_tensors
        return _Spread.apply(gradients[0], offsets, segment), None, None


class _Spread(torch.autograd.Function):
    """The value of every row's segment, (B,) -> (n,): the transpose of _SegmentSums."""

    @staticmethod
    def forward(ctx: Any, sums: Tensor, offsets: Tensor, segment: Tensor) -> Tensor:
        ctx.save_for_backward(offsets, segment)
        return sums.index_select(0, segment)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        offsets, segment = ctx.saved_tensors
        return _SegmentSums.apply(gradients[0].contiguous(), offsets, segment), None, None


def reference(prediction: Tensor, target: Tensor, cu_seqlens: Tensor, token_offset: int) -> Tensor:
    """per_sample_mse in eager PyTorch, for checked arguments: its specification."""
    dtype = check.compute_dtype(prediction, target)
    tokens, width = prediction.shape
    with without_autocast(prediction):
        segment, inside = segments(cu_seqlens, tokens, token_offset)
        p, q = (zero_padding(x, inside).to(dtype) for x in (prediction, target))
        error = p - q
        # Padding rows are zeros here; they lie past the last offset and in no sum.
        per_token = (error * error).sum(dim=1).to(torch.float64)
        offsets = (cu_seqlens.long() - token_offset).clamp(0, tokens)
        sums = _SegmentSums.apply(per_token, offsets, segment)
        return (sums / (cu_seqlens.diff().to(torch.float64) * width).clamp(min=1.0)).to(dtype)


def velocity_loss_flops(tokens: int, dim: int, *, backward: bool = False) -> int:
    """Arithmetic of one call: difference, square and sum of every element.

    The backward (of prediction alone) takes 2: difference and product.
    """
    return tokens * dim * (2 if backward else 3)


def velocity_loss_bytes(
    tokens: int, dim: int, *, itemsize: int, target_itemsize: int = 4, backward: bool = False
) -> int:
    """Least memory traffic of one call in bytes: prediction and target read once.

    The backward also writes the prediction's gradient.
    """
    return tokens * dim * (itemsize * (2 if backward else 1) + target_itemsize)
