"""Sums over the samples of a step: loss, loss per time bin, loss per modality."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from goku.batch import Batch

__all__ = ["TIME_BINS", "StepStatistics"]

TIME_BINS = 8
_MODALITIES = ("image", "video")


@dataclass
class StepStatistics:
    """Sums over a step's samples, as one fp64 vector so that one all-reduce adds them over the ranks."""

    vector: Tensor

    @classmethod
    def zeros(cls, device: torch.device) -> StepStatistics:
        return cls(
            torch.zeros(
                2 + 2 * TIME_BINS + 2 * len(_MODALITIES), dtype=torch.float64, device=device
            )
        )

    def add(self, batch: Batch, per_sample: Tensor, weight_sum: float) -> None:
        losses = per_sample.detach().double()
        self.vector[0] += (losses * batch.weights).sum() / weight_sum
        bins = (batch.t.double() * TIME_BINS).long().clamp(max=TIME_BINS - 1)
        kinds = torch.tensor(
            [_MODALITIES.index(item.modality) for item in batch.items], device=losses.device
        )
        first = 2
        for groups, count in ((bins, TIME_BINS), (kinds, len(_MODALITIES))):
            self.vector[first : first + count].index_add_(0, groups, losses)
            self.vector[first + count : first + 2 * count].index_add_(
                0, groups, torch.ones_like(losses)
            )
            first += 2 * count

    def means(self) -> tuple[float, list[float | None], dict[str, float | None]]:
        """(loss, mean loss per time bin, per modality); None where a group had no sample."""
        values = self.vector.tolist()
        middle = 2 + 2 * TIME_BINS
        kinds = _group_means(values[middle:], len(_MODALITIES))
        return (
            values[0],
            _group_means(values[2:middle], TIME_BINS),
            dict(zip(_MODALITIES, kinds, strict=True)),
        )


def _group_means(values: list[float], count: int) -> list[float | None]:
    return [values[i] / values[count + i] if values[count + i] else None for i in range(count)]
