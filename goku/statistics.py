"""Sums over the samples of a step: loss, also by time bin, modality and resolution; FLOPs; lost items; who asks to
stop."""

from __future__ import annotations

import torch
from torch import Tensor

from goku.batch import Batch
from goku_kernels.upload import upload_values

__all__ = ["RESOLUTIONS", "TIME_BINS", "StepStatistics", "resolution_name", "sample_groups"]

TIME_BINS = 8
_MODALITIES = ("image", "video")
# Groups by the power of two in a sample's tokens per latent frame, whatever its aspect ratio: 288x512, 480x864 and
# 720x1280 pixels (576, 1620 and 3600 tokens) fall into different ones. The last takes all that is larger.
RESOLUTIONS = 16
_LOSS, _STOP, _FLOPS, _LOST, _FIRST = 0, 1, 2, 3, 4
_GROUPS = (TIME_BINS, len(_MODALITIES), RESOLUTIONS)
_SIZE = _FIRST + 2 * sum(_GROUPS)


def sample_groups(batch: Batch) -> Tensor:
    """(2, B) of each sample its modality and its group of resolutions, on the batch's device."""
    kinds = [_MODALITIES.index(item.modality) for item in batch.items]
    sizes = [_resolution(item.grid[1] * item.grid[2]) for item in batch.items]
    return upload_values([kinds, sizes], torch.int64, batch.t.device)


class StepStatistics:
    """One fp64 vector of sums, so that one all-reduce adds a step's samples over the ranks.

    vector: loss, stop, flops, lost, then (sum of losses, number of samples) per time bin, per modality and per group of
    resolutions.
    """

    def __init__(self, device: torch.device) -> None:
        self.vector: Tensor = torch.zeros(_SIZE, dtype=torch.float64, device=device)
        self._values: list[float] | None = None

    def add(
        self,
        batch: Batch,
        per_sample: Tensor,
        weight_sum: float,
        flops: int = 0,
        groups: Tensor | None = None,
    ) -> None:
        """Count a pack: per_sample (B,) losses, the step's global weight sum, FLOPs, the pack's `sample_groups`.

        Of the shards of a pack each adds its part of the losses and FLOPs (of the samples that begin there), and the
        first alone counts the samples. A lost sample counts in no mean. With groups, made before the forward, the host
        waits for no device.
        """
        losses = per_sample.detach().double()
        first = batch.shard is None or batch.shard.token_offset == 0
        self.vector[_LOSS] += (losses * batch.weights).sum() / weight_sum
        self.vector[_FLOPS] += flops
        bins = (batch.t.double() * TIME_BINS).long().clamp(max=TIME_BINS - 1)
        kinds, sizes = (sample_groups(batch) if groups is None else groups).unbind()
        there = batch.weights > 0  # an item's weight is; lost ones have none
        losses, ones = losses * there, float(first) * there.double()
        begin = _FIRST
        for groups, count in zip((bins, kinds, sizes), _GROUPS, strict=True):
            self.vector[begin : begin + count].index_add_(0, groups, losses)
            counts = self.vector[begin + count : begin + 2 * count]
            counts.index_add_(0, groups, ones)
            begin += 2 * count

    def count_lost(self, items: int) -> None:
        """Say how many items this process has lost so far."""
        self.vector[_LOST] = items

    def ask_to_stop(self) -> None:
        """Let every rank know that this one was asked to stop."""
        self.vector[_STOP] = 1.0

    def read(self) -> None:
        """After the reduction: bring the sums to the host at once, for all that is asked for below.

        Without it each question waits for the device, also for what it was given after the sums.
        """
        self._values = self.vector.tolist()

    def _read(self) -> list[float]:
        return self.vector.tolist() if self._values is None else self._values

    @property
    def stopping(self) -> bool:
        """After the reduction: was any rank asked to stop?"""
        return self._read()[_STOP] > 0

    @property
    def lost(self) -> int:
        """After the reduction: items that are lost, counted by every process that drew them: when it grows, some more
        are."""
        return int(self._read()[_LOST])

    @property
    def flops(self) -> float:
        """After the reduction: FLOPs of the whole step."""
        return self._read()[_FLOPS]

    def means(self) -> tuple[float, list[float | None], dict[str, float | None]]:
        """(loss, mean loss per time bin, per modality); None where a group had no sample."""
        values = self._read()
        middle = _FIRST + 2 * TIME_BINS
        kinds = _group_means(values[middle:], len(_MODALITIES))
        by_bin = _group_means(values[_FIRST:middle], TIME_BINS)
        return values[_LOSS], by_bin, dict(zip(_MODALITIES, kinds, strict=True))

    def by_resolution(self) -> dict[str, float]:
        """Mean loss per group of resolutions that had a sample, smallest first, by `resolution_name`."""
        values = self._read()[_SIZE - 2 * RESOLUTIONS :]
        means = _group_means(values, RESOLUTIONS)
        return {resolution_name(k): mean for k, mean in enumerate(means) if mean is not None}


def resolution_name(group: int) -> str:
    """Tokens per latent frame in a group: group 9 is "512-1023", the last one "32768+"."""
    if not 0 <= group < RESOLUTIONS:
        raise ValueError(f"group is {group}; allowed: 0 to {RESOLUTIONS - 1}")
    low = 2**group
    return f"{low}+" if group == RESOLUTIONS - 1 else f"{low}-{2 * low - 1}" if group else "1"


def _resolution(tokens: int) -> int:
    """The group of a sample with so many tokens per latent frame: the whole part of its binary logarithm."""
    return min(tokens.bit_length() - 1, RESOLUTIONS - 1)


def _group_means(values: list[float], count: int) -> list[float | None]:
    return [values[i] / values[count + i] if values[count + i] else None for i in range(count)]
