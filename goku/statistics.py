"""Sums over the samples of a step: loss, loss per time bin and modality, FLOPs, who asks to stop."""

from __future__ import annotations

import torch
from torch import Tensor

from goku.batch import Batch

__all__ = ["TIME_BINS", "StepStatistics"]

TIME_BINS = 8
_MODALITIES = ("image", "video")
_LOSS, _STOP, _FLOPS, _FIRST = 0, 1, 2, 3
_SIZE = _FIRST + 2 * TIME_BINS + 2 * len(_MODALITIES)


class StepStatistics:
    """One fp64 vector of sums, so that one all-reduce adds a step's samples over the ranks.

    vector: loss, stop, flops, then (sum of losses, number of samples) per time bin and per modality.
    """

    def __init__(self, device: torch.device) -> None:
        self.vector: Tensor = torch.zeros(_SIZE, dtype=torch.float64, device=device)

    def add(self, batch: Batch, per_sample: Tensor, weight_sum: float, flops: int = 0) -> None:
        """Count a pack: per_sample (B,) losses, the step's global weight sum, the pack's FLOPs.

        Of the shards of a pack each adds its part of the losses, and the first alone counts the samples and FLOPs.
        """
        losses = per_sample.detach().double()
        first = batch.shard is None or batch.shard.token_offset == 0
        self.vector[_LOSS] += (losses * batch.weights).sum() / weight_sum
        self.vector[_FLOPS] += flops if first else 0
        bins = (batch.t.double() * TIME_BINS).long().clamp(max=TIME_BINS - 1)
        kinds = torch.tensor(
            [_MODALITIES.index(item.modality) for item in batch.items], device=losses.device
        )
        ones = torch.full_like(losses, float(first))
        begin = _FIRST
        for groups, count in ((bins, TIME_BINS), (kinds, len(_MODALITIES))):
            self.vector[begin : begin + count].index_add_(0, groups, losses)
            counts = self.vector[begin + count : begin + 2 * count]
            counts.index_add_(0, groups, ones)
            begin += 2 * count

    def ask_to_stop(self) -> None:
        """Let every rank know that this one was asked to stop."""
        self.vector[_STOP] = 1.0

    @property
    def stopping(self) -> bool:
        """After the reduction: was any rank asked to stop?"""
        return bool(self.vector[_STOP] > 0)

    @property
    def flops(self) -> float:
        """After the reduction: FLOPs of the whole step."""
        return float(self.vector[_FLOPS])

    def means(self) -> tuple[float, list[float | None], dict[str, float | None]]:
        """(loss, mean loss per time bin, per modality); None where a group had no sample."""
        values = self.vector.tolist()
        middle = _FIRST + 2 * TIME_BINS
        kinds = _group_means(values[middle:], len(_MODALITIES))
        by_bin = _group_means(values[_FIRST:middle], TIME_BINS)
        return values[_LOSS], by_bin, dict(zip(_MODALITIES, kinds, strict=True))


def _group_means(values: list[float], count: int) -> list[float | None]:
    return [values[i] / values[count + i] if values[count + i] else None for i in range(count)]
