"""Whether a result is right: FlashAttention's rule, sample by sample."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Partition = tuple[int, ...]  # rows of every sample, in order
Results = dict[str, Tensor]


@dataclass(frozen=True)
class Verdict:
    """Whether a peer is right: its worst result, by how much that is off and what is allowed."""

    right: bool
    worst: str
    error: float
    allowed: float

    def __str__(self) -> str:
        return f"{self.worst} is off by {self.error:.3g}, allowed are {self.allowed:.3g}"


def judge(
    got: Results, same: Results, exact: Results, partitions: Sequence[Partition] = (), *,
    floors: Mapping[str, float] | None = None, precision: float = 0.0,
) -> Verdict:  # fmt: skip
    """FlashAttention's rule: |got - exact| <= 2 * |same - exact| + two roundings, maximum norm.

    Tensors that have rows of samples are judged sample by sample, so that a giant does not hide
    its neighbour. A rounding is one unit in the last place of the largest exact number; two, since
    some round before the gain of a norm as well as after it. Beside them 16 roundings to fp32 of
    the largest number of all samples: where the terms of a sum cancel, the fp32 rounding of the
    terms is left.

    Args:
        got: what is judged.
        same: plain PyTorch in the same dtype.
        exact: the truth.
        partitions: rows of every sample; the one with as many rows as a tensor has splits it.
        floors: by name of the result, what is allowed beside that.
        precision: of the arithmetic, where that is coarser than the dtype.
    """
    floors = floors or {}
    worst = Verdict(True, "nothing", 0.0, 0.0)
    for name, want in exact.items():
        if name not in got:
            return Verdict(False, f"{name} (missing)", float("inf"), 0.0)
        if want.numel() == 0:
            continue
        error, plain, size = (
            _largest(x, partitions)
            for x in (got[name].to(want.dtype) - want, same[name].to(want.dtype) - want, want)
        )
        rounding = max(torch.finfo(same[name].dtype).eps, precision)
        allowed = 2 * plain + 2 * rounding * size + floors.get(name, 0.0)
        allowed = allowed + 16 * torch.finfo(torch.float32).eps * size.amax(dim=0, keepdim=True)
        # The sample that is furthest beyond what is allowed; NaN counts as furthest.
        beyond = (error - allowed).nan_to_num(nan=float("inf"))
        i = int(beyond.argmax())
        place = f"{name} of sample {i}" if len(beyond) > 1 else name
        verdict = Verdict(bool(error[i] <= allowed[i]), place, float(error[i]), float(allowed[i]))
        if not verdict.right:
            return verdict
        if verdict.error * worst.allowed >= worst.error * verdict.allowed:
            worst = verdict
    return worst


def _largest(x: Tensor, partitions: Sequence[Partition]) -> Tensor:
    """Largest magnitude of each sample where a partition has as many rows as x, else of all: (n,).

    Vectors have no rows: they are gains of norms, whatever their width.
    """
    fitting = [p for p in partitions if x.dim() > 1 and sum(p) == x.shape[0]]
    if not fitting:
        return x.abs().amax().reshape(1)
    # NaN has to survive, which not every reduction of a segment lets it.
    rows = x.abs().flatten(1).amax(1).nan_to_num(nan=float("inf"))
    at = torch.tensor(fitting[0], device=x.device)
    return torch.segment_reduce(rows, "max", lengths=at, initial=0.0)
