"""Rectified flow: times, the straight path, its loss on packed samples, and the ODE samplers.

Convention of Goku (arXiv 2502.04896): x_t = t * x1 + (1 - t) * x0 with x1 = data and
x0 ~ N(0, I), so t = 0 is noise and t = 1 is data; the target velocity is x1 - x0, and inference
integrates dx/dt = v(x, t) from 0 to 1. Stable Diffusion 3 (arXiv 2403.03206) and Flux count the
other way: t_here = 1 - t_theirs.

The paper gives neither a time distribution, nor a shift, nor a text dropout rate: the defaults
below are ours, taken from Stable Diffusion 3 and from common practice.
"""

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, get_args

import torch
from torch import Tensor

from goku.random import Purpose, normal_packed, uniform_each
from goku_kernels import Packing
from goku_kernels.rectified_flow_noise import path, velocity
from goku_kernels.velocity_loss import per_sample_mse as packed_mse
from goku_kernels.velocity_loss import weighted_loss

__all__ = [
    "METHODS",
    "FlowConfig",
    "Method",
    "drop_text",
    "effective_shift",
    "guided",
    "integrate",
    "interpolate",
    "per_sample_mse",
    "sample_times",
    "shift_time",
    "time_grid",
    "velocity_target",
    "weighted_loss",
]

Method = Literal["euler", "heun", "ab2"]
METHODS: tuple[Method, ...] = get_args(Method)


@dataclass(frozen=True, kw_only=True)
class FlowConfig:
    """How training times and text dropout are drawn; ValueError if a field is out of range.

    time_distribution: "uniform" on [0, 1), or "logit_normal" (SD3, section 3.1):
        t = sigmoid(logit_mean + logit_std * z), z ~ N(0, 1).
    logit_mean: mean of logit(t). Here t = 1 is data, so a positive mean favours data; SD3's
        mean m is -m here.
    logit_std: standard deviation of logit(t), positive.
    shift: positive; 1 changes nothing, more moves mass towards noise (see :func:`shift_time`).
    resolution_shift: multiply `shift` by sqrt(tokens / base_tokens) for each sample
        (see :func:`effective_shift`).
    base_tokens: number of tokens at which the resolution changes nothing. 256 is ours: an image
        of 256 x 256 pixels at VAE stride 8 and patch 2.
    text_drop: probability in [0, 1] that a sample trains on the empty prompt, for
        classifier-free guidance. 0.1 is the rate of Ho & Salimans (arXiv 2207.12598).
    """

    time_distribution: Literal["uniform", "logit_normal"] = "uniform"
    logit_mean: float = 0.0
    logit_std: float = 1.0
    shift: float = 1.0
    resolution_shift: bool = False
    base_tokens: int = 256
    text_drop: float = 0.1

    def __post_init__(self) -> None:
        if self.time_distribution not in ("uniform", "logit_normal"):
            raise ValueError(
                f"time_distribution is {self.time_distribution!r}; "
                "allowed are 'uniform' and 'logit_normal'"
            )
        if not math.isfinite(self.logit_mean):
            raise ValueError(f"logit_mean is {self.logit_mean}; allowed is a finite number")
        for name in ("logit_std", "shift"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise ValueError(f"{name} is {value}; allowed is a finite number above 0")
        if self.base_tokens < 1:
            raise ValueError(f"base_tokens is {self.base_tokens}; allowed is 1 or more")
        if not 0.0 <= self.text_drop <= 1.0:
            raise ValueError(f"text_drop is {self.text_drop}; allowed is [0, 1]")


def shift_time(t: Tensor, shift: Tensor | float) -> Tensor:
    """Moves times towards noise: t / (t + shift * (1 - t)), which keeps 0 and 1 exactly.

    This is SD3's t_m = s t_n / (1 + (s - 1) t_n) (arXiv 2403.03206, section 5.3.2, equation 23)
    with t_here = 1 - t_theirs on both sides. Equivalently logit(t) decreases by ln(shift), so that
    shifts compose by multiplication.

    Args:
        t: any shape, floating, in [0, 1].
        shift: positive; a number or a tensor that broadcasts with t. Values are not checked.
    """
    return t / (t + shift * (1.0 - t))


def effective_shift(config: FlowConfig, tokens: Sequence[int]) -> Tensor:
    """The shift of each sample: (B,) float64, on the CPU.

    With `resolution_shift` it is shift * sqrt(tokens / base_tokens), the rule of SD3 (section
    5.3.2): averaging over n times as many tokens of a smooth signal leaves 1/sqrt(n) of the noise's
    uncertainty, so a larger sample needs more noise for the same difficulty. SD3 states it for
    images; counting a clip's tokens over all its frames is ours. A sample of fewer tokens than
    the base moves towards data.

    Raises:
        ValueError: a number of tokens below 1.
    """
    if any(n < 1 for n in tokens):
        raise ValueError(f"tokens contains {min(tokens)}; allowed is 1 or more")
    count = torch.tensor(list(tokens), dtype=torch.float64)
    if not config.resolution_shift:
        return torch.full_like(count, config.shift)
    return config.shift * torch.sqrt(count / config.base_tokens)


def sample_times(
    config: FlowConfig, seed: int, stream_indices: Sequence[int], tokens: Sequence[int]
) -> Tensor:
    """Training times: (B,) float64 in [0, 1], on the CPU; 0 is noise and 1 is data.

    Each time depends on (seed, stream index, tokens of that sample) alone: element 0 of the
    purpose TIME, uniform or normal by the distribution, then shifted.

    Args:
        config: the distribution.
        seed: in [0, 2^64).
        stream_indices: B positions in the data stream.
        tokens: B numbers of tokens, used when `resolution_shift` is on.

    Raises:
        ValueError: the sequences differ in length, or a value is out of range.
    """
    if len(tokens) != len(stream_indices):
        raise ValueError(
            f"tokens has {len(tokens)} entries; allowed is one per stream index, "
            f"here {len(stream_indices)}"
        )
    if config.time_distribution == "uniform":
        t = uniform_each(seed, stream_indices, Purpose.TIME)
    else:
        ones = [1] * len(stream_indices)
        z = normal_packed(seed, stream_indices, ones, Purpose.TIME, dtype=torch.float64)
        t = torch.sigmoid(config.logit_mean + config.logit_std * z)
    return shift_time(t, effective_shift(config, tokens))


def drop_text(config: FlowConfig, seed: int, stream_indices: Sequence[int]) -> Tensor:
    """Which samples train on the empty prompt: (B,) bool, on the CPU, True with `text_drop`."""
    return uniform_each(seed, stream_indices, Purpose.TEXT_DROP) < config.text_drop


def interpolate(
    x1: Tensor, x0: Tensor, t: Tensor | float, segment_ids: Tensor | None = None
) -> Tensor:
    """The straight path x_t = t * x1 + (1 - t) * x0, computed in at least fp32, in x1's dtype.

    Args:
        x1: data, (tokens, ...) packed or (B, ...) stacked.
        x0: noise, of x1's shape.
        t: (B,) times, one per sample, or a single number.
        segment_ids: (tokens,) int64, the sample of each row; without it t must be a single number
            or have one entry per row.

    Raises:
        ValueError: the shapes do not fit.
    """
    _same_shape("x0", x0, "x1", x1)
    t = torch.as_tensor(t, device=x1.device)
    t = t if t.is_floating_point() else t.to(torch.promote_types(x1.dtype, torch.float32))
    if segment_ids is not None:
        if t.dim() != 1 or segment_ids.shape != x1.shape[:1]:
            raise ValueError(
                f"t has shape {tuple(t.shape)} and segment_ids {tuple(segment_ids.shape)}; "
                f"allowed are (B,) and ({x1.shape[0]},)"
            )
        t = t.index_select(0, segment_ids)
    elif t.dim() != 0 and t.shape != x1.shape[:1]:
        raise ValueError(
            f"t has shape {tuple(t.shape)}; without segment_ids allowed are () and ({x1.shape[0]},)"
        )
    return path(x1, x0, t.view(t.shape + (1,) * (x1.dim() - t.dim())))


def velocity_target(x1: Tensor, x0: Tensor) -> Tensor:
    """What the model regresses on, x1 - x0, in at least fp32; shape of both.

    Raises:
        ValueError: the shapes differ.
    """
    _same_shape("x0", x0, "x1", x1)
    return velocity(x1, x0)


def per_sample_mse(
    prediction: Tensor,
    target: Tensor,
    packing: Packing,
    *,
    token_offset: int | None = None,
    backend: str | None = None,
) -> Tensor:
    """Mean squared error of each packed sample over its tokens and channels.

    That of goku_kernels.velocity_loss, for samples that all have tokens: the same in any packing to
    one rounding, deterministic, and without a synchronisation. Its share of the loss is
    :func:`weighted_loss`.

    Args:
        prediction: (tokens, channels), any floating dtype.
        target: of prediction's shape.
        packing: of the whole pack; every sample has at least one token.
        token_offset: None where prediction holds the whole pack. For a shard of it, the row at which
            the shard begins: the result is then a partial sum, and adds up over the shards.
        backend: None, "torch" or "triton".

    Returns:
        (B,) in promote(prediction's dtype, target's dtype, float32), differentiable.

    Raises:
        ValueError: the shapes do not fit, or an argument that the operator refuses.
    """
    _same_shape("target", target, "prediction", prediction)
    whole = token_offset is None
    if prediction.dim() != 2 or (whole and prediction.shape[0] != packing.total):
        raise ValueError(
            f"prediction has shape {tuple(prediction.shape)}; "
            f"allowed is ({packing.total}, channels) for this packing"
        )
    if 0 in packing.lengths:
        raise ValueError(
            f"packing.lengths[{packing.lengths.index(0)}] is 0; allowed is 1 or more, "
            "since nothing has no mean"
        )
    return packed_mse(
        prediction, target, packing.cu_seqlens, token_offset=token_offset or 0, backend=backend
    )


def time_grid(steps: int, shift: float = 1.0) -> Tensor:
    """Sampling times 0 = t_0 < ... < t_steps = 1: (steps + 1,) float64.

    Evenly spaced, then moved towards noise by :func:`shift_time`: a shift above 1 takes smaller
    steps near noise and larger ones near data.

    Raises:
        ValueError: steps below 1, or shift not positive.
    """
    if steps < 1:
        raise ValueError(f"steps is {steps}; allowed is 1 or more")
    if not (math.isfinite(shift) and shift > 0):
        raise ValueError(f"shift is {shift}; allowed is a finite number above 0")
    return shift_time(torch.arange(steps + 1, dtype=torch.float64) / steps, shift)


def integrate(
    velocity: Callable[[Tensor, float], Tensor],
    x: Tensor,
    times: Tensor,
    method: Method = "euler",
    callback: Callable[[int, float, Tensor], None] | None = None,
    project: Callable[[Tensor, float], Tensor] | None = None,
    piece: Callable[[float], Hashable] | None = None,
) -> Tensor:
    """Integrates dx/dt = velocity(x, t) along the times.

    "euler" is of first order and evaluates once per step; "heun" (explicit trapezoid) is of second
    order and evaluates twice; "ab2" (Adams-Bashforth on the times as they are spaced) is of second
    order and evaluates once: it extends the line through the last two velocities over the step, and
    takes one Euler step to have two. The caller decides about gradients (torch.no_grad or not).

    Args:
        velocity: (x, t) -> tensor of x's shape; its result is converted to x's dtype, so that a
            bf16 model can drive an fp32 state.
        x: the state at times[0], any shape, floating. Not modified.
        times: (steps + 1,) increasing within [0, 1], read on the host once.
        method: "euler", "heun" or "ab2".
        callback: called after each step with (steps done, time reached, state).
        project: replaces the state after each step, (state, time reached) -> state of the same shape
            and dtype: for parts of it that are known. Velocities that "ab2" remembers stay.
        piece: which continuous piece of the velocity a time is in, for one that jumps: "ab2" begins
            anew in each, since a line through both sides of a jump leads far beyond either.

    Returns:
        The state at times[-1], of x's shape and dtype.

    Raises:
        ValueError: an unknown method, unusable times, or a velocity of another shape.
    """
    if method not in METHODS:
        raise ValueError(f"method is {method!r}; allowed are {', '.join(map(repr, METHODS))}")
    if times.dim() != 1 or times.shape[0] < 2:
        raise ValueError(f"times has shape {tuple(times.shape)}; allowed is (steps + 1,)")
    points: list[float] = times.tolist()
    intervals = list(pairwise(points))
    if not (all(a < b for a, b in intervals) and points[0] >= 0.0 and points[-1] <= 1.0):
        raise ValueError(f"times is {points}; allowed are increasing values within [0, 1]")

    def evaluate(state: Tensor, t: float) -> Tensor:
        v = velocity(state, t)
        if v.shape != state.shape:
            raise ValueError(
                f"velocity returned shape {tuple(v.shape)}; allowed is {tuple(state.shape)}"
            )
        return v.to(state.dtype)

    # The last velocity, the length of its step, and the piece that it was in.
    before: tuple[Tensor, float, Hashable] | None = None
    for done, (t, following) in enumerate(intervals, start=1):
        step = following - t
        v = evaluate(x, t)
        if method == "heun":
            v = (v + evaluate(x + step * v, following)) / 2
        elif method == "ab2":
            here, place = v, None if piece is None else piece(t)
            if before is not None and before[2] == place:
                v = v + (step / (2 * before[1])) * (v - before[0])
            before = here, step, place
        x = x + step * v
        if project is not None:
            x = project(x, following)
        if callback is not None:
            callback(done, following, x)
    return x


def guided(cond: Tensor, uncond: Tensor, scale: float) -> Tensor:
    """Classifier-free guidance: uncond + scale * (cond - uncond), in at least fp32, cond's dtype.

    Ho & Salimans (arXiv 2207.12598), whose w is scale - 1. Scale 1 gives cond and scale 0 gives
    uncond exactly.

    Raises:
        ValueError: the shapes differ.
    """
    _same_shape("uncond", uncond, "cond", cond)
    dtype = torch.promote_types(cond.dtype, torch.float32)
    # lerp computes from the nearer end, which makes both ends exact.
    return torch.lerp(uncond.to(dtype), cond.to(dtype), scale).to(cond.dtype)


def _same_shape(name: str, tensor: Tensor, other_name: str, other: Tensor) -> None:
    # Broadcasting here would be a silent error: (tokens, 1) against (tokens, d) has a mean too.
    if tensor.shape != other.shape:
        raise ValueError(
            f"{name} has shape {tuple(tensor.shape)}; allowed is that of {other_name}, "
            f"{tuple(other.shape)}"
        )
