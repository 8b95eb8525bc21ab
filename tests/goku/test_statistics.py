"""Sums of a step: by time bin, modality and resolution, over packs, shards and ranks."""

from __future__ import annotations

import math
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from goku.statistics import RESOLUTIONS, StepStatistics, resolution_name, sample_groups

CPU = torch.device("cpu")
# Grids (t, h, w): an image of 256x256 pixels, clips of 288x512 and 720x1280, a single token.
GRIDS = [(1, 16, 16), (5, 18, 32), (3, 45, 80), (1, 1, 1), (2, 18, 32)]
TIMES = [0.0, 0.124, 0.125, 0.99, 1.0]
WEIGHTS = [1.0, 0.5, 2.0, 1.0, 3.0]
LOSSES = [0.5, 1.25, 2.0, 4.0, 0.75]


def _batch(which: list[int], offset: int | None = None) -> Any:
    items = [
        SimpleNamespace(grid=GRIDS[i], modality="image" if GRIDS[i][0] == 1 else "video")
        for i in which
    ]
    return SimpleNamespace(
        items=items,
        t=torch.tensor([TIMES[i] for i in which]),
        weights=torch.tensor([WEIGHTS[i] for i in which], dtype=torch.float64),
        shard=None if offset is None else SimpleNamespace(token_offset=offset),
        lost=(),
    )


def _add(statistics: StepStatistics, which: list[int], share: float = 1.0, offset: Any = None):
    losses = torch.tensor([share * LOSSES[i] for i in which])
    statistics.add(_batch(which, offset), losses, math.fsum(WEIGHTS), flops=round(20 * share))


def _check(statistics: StepStatistics, packs: int) -> None:
    loss, by_bin, by_modality = statistics.means()
    # Losses and weights are short binary fractions: sums are exact but for the division.
    wanted = math.fsum(w * x for w, x in zip(WEIGHTS, LOSSES, strict=True)) / math.fsum(WEIGHTS)
    assert loss == pytest.approx(wanted, rel=1e-15)
    assert by_bin == [(0.5 + 1.25) / 2, 2.0, None, None, None, None, None, (4.0 + 0.75) / 2]
    assert by_modality == {"image": (0.5 + 4.0) / 2, "video": (1.25 + 2.0 + 0.75) / 3}
    assert list(statistics.by_resolution().items()) == [
        ("1", 4.0),
        ("256-511", 0.5),
        ("512-1023", (1.25 + 0.75) / 2),
        ("2048-4095", 2.0),
    ]
    assert statistics.flops == 20 * packs


def test_means_of_one_pack_of_several_and_of_ranks() -> None:
    whole = StepStatistics(CPU)
    _add(whole, [0, 1, 2, 3, 4])
    _check(whole, 1)
    apart = StepStatistics(CPU)
    for pack in ([4, 1], [0], [3, 2]):
        _add(apart, pack)
    _check(apart, 3)
    first, second = StepStatistics(CPU), StepStatistics(CPU)
    _add(first, [3, 0, 1])
    _add(second, [2, 4])
    first.vector += second.vector  # what an all-reduce does
    _check(first, 2)


def test_shards_add_parts_of_the_losses_and_are_counted_once() -> None:
    total = StepStatistics(CPU)
    for offset, share in ((0, 0.25), (7, 0.75)):
        part = StepStatistics(CPU)
        _add(part, [0, 1, 2, 3, 4], share, offset)
        total.vector += part.vector
    _check(total, 1)


def test_lost_samples_are_in_no_mean_and_items_are_summed() -> None:
    statistics, other = StepStatistics(CPU), StepStatistics(CPU)
    batch = _batch([0, 1, 2])
    batch.weights[1] = 0.0
    statistics.add(batch, torch.tensor([0.5, 100.0, 2.0]), 4.0)
    loss, by_bin, by_modality = statistics.means()
    assert loss == (0.5 * 1.0 + 2.0 * 2.0) / 4
    assert by_bin[:2] == [0.5, 2.0]
    assert by_modality == {"image": 0.5, "video": 2.0}
    assert statistics.by_resolution() == {"256-511": 0.5, "2048-4095": 2.0}
    assert statistics.lost == 0
    statistics.count_lost(2)
    other.count_lost(3)
    statistics.vector += other.vector
    assert statistics.lost == 5


def test_nothing_seen() -> None:
    statistics = StepStatistics(CPU)
    loss, by_bin, by_modality = statistics.means()
    assert (loss, by_bin, by_modality) == (0.0, [None] * 8, {"image": None, "video": None})
    assert statistics.by_resolution() == {}
    assert not statistics.stopping
    statistics.ask_to_stop()
    assert statistics.stopping
    assert statistics.by_resolution() == {}


@given(height=st.integers(1, 300), width=st.integers(1, 300), frames=st.integers(1, 9))
def test_any_size_is_in_the_group_that_its_name_says(height: int, width: int, frames: int) -> None:
    statistics = StepStatistics(CPU)
    batch = _batch([0])
    batch.items[0].grid = (frames, height, width)
    statistics.add(batch, torch.ones(1), 1.0)
    ((name, mean),) = statistics.by_resolution().items()
    assert mean == 1.0
    low, _, high = name.removesuffix("+").partition("-")
    largest = math.inf if name.endswith("+") else int(high or low)
    assert int(low) <= height * width <= largest


def test_the_groups_are_end_to_end_and_the_papers_resolutions_are_apart() -> None:
    names = [resolution_name(k) for k in range(RESOLUTIONS)]
    assert names[:3] == ["1", "2-3", "4-7"]
    assert names[-2:] == ["16384-32767", "32768+"]
    for before, after in pairwise(names):
        assert int(before.split("-")[-1]) + 1 == int(after.split("-")[0].removesuffix("+"))
    statistics = StepStatistics(CPU)
    batch = _batch([1, 2, 4])
    batch.items[0].grid = (2, 480 // 16, 864 // 16)
    statistics.add(batch, torch.ones(3), 1.0)
    assert list(statistics.by_resolution()) == ["512-1023", "1024-2047", "2048-4095"]
    with pytest.raises(ValueError, match="group is 16; allowed: 0 to 15"):
        resolution_name(16)


class _OnTheDevice(TorchDispatchMode):
    """Fails at what moves a tensor from or to the host, or reads its values."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        assert name not in ("_local_scalar_dense", "nonzero"), name
        out = func(*args, **(kwargs or {}))
        for each in out if isinstance(out, list) else [out]:
            assert each.device.type == "meta", name
        return out


class _NothingNew(TorchFunctionMode):
    """Fails at what makes a tensor of the host's numbers."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func not in (torch.tensor, torch.as_tensor, torch.from_numpy), func.__name__
        return func(*args, **(kwargs or {}))


def test_after_the_forward_the_host_waits_for_nothing() -> None:
    """On a device without values: neither copies to it nor reads from it, whatever the pack."""
    meta = torch.device("meta")
    statistics = StepStatistics(meta)
    for offset in (None, 0, 7):
        batch = _batch([0, 1, 2, 3, 4], offset)
        batch.t, batch.weights = batch.t.to(meta), batch.weights.to(meta)
        groups = sample_groups(batch)
        losses = torch.ones(5, device=meta)
        with _OnTheDevice(), _NothingNew():
            statistics.add(batch, losses, 7.5, 10, groups)
            statistics.ask_to_stop()
            statistics.count_lost(3)
        with pytest.raises(AssertionError, match="tensor"), _NothingNew():
            statistics.add(batch, losses, 7.5, 10)  # without groups it makes them


def test_groups_made_before_the_forward_count_alike_to_the_bit() -> None:
    before, after = StepStatistics(CPU), StepStatistics(CPU)
    losses = torch.rand(5, generator=torch.Generator().manual_seed(0))
    for which in ([0, 1, 2, 3, 4], [4, 4, 1, 0, 0]):
        batch = _batch(which)
        before.add(batch, losses, 7.5, 3, sample_groups(batch))
        after.add(batch, losses, 7.5, 3)
    assert torch.equal(before.vector, after.vector)


def test_what_was_read_at_once_answers_every_question() -> None:
    statistics = StepStatistics(CPU)
    _add(statistics, [0, 1, 2, 3, 4])
    statistics.count_lost(2)
    statistics.ask_to_stop()
    _check(statistics, 1)
    statistics.read()
    statistics.vector.zero_()  # no question reaches it any more
    _check(statistics, 1)
    assert (statistics.lost, statistics.stopping) == (2, True)
