"""Packs that processes share: each reads the samples it has rows of, and has the rows of the whole pack's batch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import goku.batch
from goku.batch import Batch, BatchBuilder
from goku.conditioning import ConditioningConfig
from goku.data import CachedSample, Item
from goku.flow import FlowConfig
from goku.lost import LostItems
from goku.packing import PackingConfig
from goku.parallelize import PackSharding
from goku.random import Purpose, normal
from goku.vae import GokuVAE, VAEConfig

CPU = torch.device("cpu")
CHANNELS, TEXT_DIM, SEED = 3, 8, 11
GRIDS = [(1, 2, 2), (3, 2, 3), (4, 1, 2), (2, 1, 4)]
VAE = GokuVAE(VAEConfig(channels=CHANNELS, stem_width=8, width=8, encoder_depth=1, decoder_depth=1))


@dataclass
class FakeDataset:
    """Items in memory; `broken` ones cannot be read. Notes what is read, and what is read ahead."""

    items: list[Item]
    samples: list[CachedSample]
    empty_text: Tensor
    broken: Sequence[int] = ()
    lost: dict[int, Any] = field(default_factory=dict)
    reads: list[int] = field(default_factory=list)
    ahead: list[int] = field(default_factory=list)

    def reading(self) -> AbstractContextManager[None]:
        return nullcontext()

    def read(self, index: int, caption: int = 0) -> CachedSample:
        self.reads.append(index)
        if index in self.broken:
            raise OSError("Stale file handle")
        return self.samples[index]

    def cached(self, index: int, caption: int = 0) -> CachedSample | None:
        self.ahead.append(index)
        return self.samples[index]

    def repair(self, index: int, vae: Any) -> CachedSample:
        raise OSError("Stale file handle")


def _draw(seed: int, *shape: int) -> Tensor:
    return normal(seed, 0, math.prod(shape), Purpose.SAMPLE).view(shape)


def _dataset(low: bool = False) -> Any:
    """low: the captions, of one token and more, are as those of a bf16 encoder are cached."""
    items, samples = [], []
    for i, (t, h, w) in enumerate(GRIDS):
        items.append(
            Item(
                name=f"item{i}", caption=f"caption {i}", frames=4 * (t - 1) + 1, height=16 * h,
                width=16 * w, grid=(t, h, w), tokens=t * h * w,
                modality="image" if t == 1 else "video", weight=1.0,
            )
        )  # fmt: skip
        shape = (CHANNELS, t, 2 * h, 2 * w)
        frames = {f: _draw(400 + 10 * i + f, CHANNELS, 1, 2 * h, 2 * w) for f in (0, -1)}
        text = _draw(300 + i, i + 1, TEXT_DIM)
        samples.append(
            CachedSample(
                _draw(100 + i, *shape), _draw(200 + i, *shape), text.bfloat16() if low else text,
                frames if t > 1 else {},
            )
        )  # fmt: skip
    return FakeDataset(items, samples, torch.full((1, TEXT_DIM), 7.0))


def _process(size: int, rank: int) -> PackSharding:
    """One of `size` processes that share packs, without the others: what it has lost nobody else has."""
    parallel: Any = SimpleNamespace(
        size=size, rows=lambda tokens: -(-tokens // size), attention=None,
        token_offset=lambda tokens: rank * -(-tokens // size),
    )  # fmt: skip
    sharding = PackSharding(parallel)
    sharding.any = lambda flags: flags  # type: ignore[method-assign]
    return sharding


def _builder(
    dataset: Any,
    sharding: PackSharding | None,
    conditioning: ConditioningConfig | None = None,
    lost: LostItems | None = None,
    cut: bool = False,
) -> BatchBuilder:
    overlong: Any = "cut" if cut else "error"
    packing = PackingConfig(
        tokens_per_step=100, tokens_per_pack=12 if cut else 50, overlong=overlong
    )
    return BatchBuilder(
        dataset, VAE, FlowConfig(text_drop=0.3), packing, SEED, CPU, sharding=sharding,
        conditioning=conditioning, lost=lost,
    )  # fmt: skip


@settings(max_examples=60)
@given(
    indices=st.lists(st.sampled_from(range(4)), min_size=1, max_size=6),
    size=st.integers(1, 4),
    conditioned=st.booleans(),
    low=st.booleans(),
    training=st.booleans(),
    cut=st.booleans(),
)
def test_a_shard_reads_the_samples_it_holds_and_has_the_rows_of_the_whole(
    indices: list[int], size: int, conditioned: bool, low: bool, training: bool, cut: bool
) -> None:
    """Packs of 4 tokens (one for every process) and more: some end with processes that hold nothing."""
    ends = {} if cut else {"last": 1.0, "both": 1.0}  # a cut clip has no last frame to be given
    conditioning = ConditioningConfig(first=1, **ends) if conditioned else None
    dataset = _dataset(low)
    arguments: tuple[Any, ...] = (range(len(indices)), indices)
    if not training:
        arguments = (indices, [(k + 0.5) / len(indices) for k in range(len(indices))])

    def batch(sharding: PackSharding | None) -> Batch:
        builder = _builder(dataset, sharding, conditioning, cut=cut)
        dataset.reads.clear()
        return (builder.training if training else builder.fixed)(*arguments)

    whole = batch(None)
    assert dataset.reads == indices
    # A frame of the second clip has 6 tokens, two fit.
    tokens = [12 if cut and i == 1 else math.prod(GRIDS[i]) for i in indices]
    owners = [k for k, count in enumerate(tokens) for _ in range(count)]
    texts = whole.text.split(list(whole.text_packing.lengths))
    assert whole.text.dtype == torch.float32
    assert whole.begun == (tokens, [len(text) for text in texts])
    rows, begun = -(-len(owners) // size), []
    for rank in range(size):
        mine, here = batch(_process(size, rank)), owners[rank * rows : (rank + 1) * rows]
        held = list(dict.fromkeys(here))
        assert dataset.reads == [indices[k] for k in held]
        for name in ("x", "target") + (("condition",) if conditioned else ()):
            wanted = getattr(whole, name)[rank * rows : (rank + 1) * rows]
            padded = torch.cat([wanted, wanted.new_zeros(rows - len(here), wanted.shape[1])])
            assert torch.equal(getattr(mine, name), padded), name
        assert (mine.condition is None) == (whole.condition is None)
        if mine.condition is not None:  # it lives as long as the pack, without the others' rows
            assert mine.condition.untyped_storage().nbytes() == mine.condition.nbytes
        assert torch.equal(mine.text, torch.cat([whole.text[:0], *(texts[k] for k in held)]))
        assert mine.text.dtype == torch.float32
        assert mine.text_packing.lengths == tuple(len(t) * (k in here) for k, t in enumerate(texts))
        assert torch.equal(mine.t, whole.t)
        assert mine.packing.lengths == whole.packing.lengths
        begun += list(zip(*mine.begun, strict=True))
    assert begun == list(zip(*whole.begun, strict=True))


@pytest.mark.parametrize("indices", [[1, 2, 3, 0], [0, 0, 1], [2]])
@pytest.mark.parametrize("size", [2, 3, 4])
def test_what_is_read_ahead_is_what_a_process_holds(indices: list[int], size: int) -> None:
    for rank in range(size):
        dataset = _dataset()
        builder, plain = _builder(dataset, _process(size, rank)), _dataset()
        builder.read_ahead([(range(len(indices)), indices)])
        batch = builder.training(range(len(indices)), indices)
        builder.close()
        wanted = _builder(plain, _process(size, rank)).training(range(len(indices)), indices)
        assert dataset.reads == []
        assert sorted(dataset.ahead) == sorted(plain.reads)
        assert torch.equal(batch.x, wanted.x)
        assert torch.equal(batch.text, wanted.text)


def test_a_lost_sample_is_told_by_those_that_hold_it() -> None:
    """Item 1 twice, in a pack of 4 + 18 + 8 + 18 = 48 tokens, 16 for each of three."""
    indices = [0, 1, 2, 1]
    said = []
    for rank in range(3):
        dataset, lost = _dataset(), LostItems(5)
        dataset.broken = [1]
        batch = _builder(dataset, _process(3, rank), lost=lost).training(range(4), indices)
        said.append(batch.lost)
        wanted = [0.0 if gone else 1.0 for gone in batch.lost or [False] * 4]
        assert batch.weights.tolist() == wanted
        assert list(lost.names) == ["item1"]
    assert said == [
        (False, True, False, False), (False, True, False, True), (False, False, False, True),
    ]  # fmt: skip


def test_what_one_process_has_lost_no_other_trains_on() -> None:
    """Its media come back, or only one of two machines cannot read them: else weights would depend on who holds it."""
    dataset, lost = _dataset(), LostItems(5)
    builder = _builder(dataset, _process(2, 0), lost=lost)
    assert builder.training(range(2), [0, 1]).lost == ()
    lost.adopt({"item1": "Stale file handle"})
    dataset.reads.clear()
    batch = builder.training(range(2), [0, 1])
    assert batch.lost == (False, True)
    assert batch.weights.tolist() == [1.0, 0.0]
    assert dataset.reads == [0]
    assert (lost.count, lost.names) == (0, {})  # they are counted where they were found lost


@pytest.mark.parametrize("low", [False, True])
def test_captions_go_up_in_bf16_where_that_is_exact_and_in_one_dtype(
    low: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The empty prompt is exact in bf16: among captions that are not it has to go up as they do."""
    given: list[set[torch.dtype]] = []
    upload = goku.batch.upload_rows

    def noted(pieces: Sequence[Tensor], device: Any) -> Tensor:
        given.append({piece.dtype for piece in pieces})
        return upload(pieces, device)

    monkeypatch.setattr(goku.batch, "upload_rows", noted)
    dataset = _dataset(low)
    batch = _builder(dataset, None).training(range(40), [1] * 40)
    assert given[-1] == {torch.bfloat16 if low else torch.float32}
    dropped = sum(length == 1 for length in batch.text_packing.lengths)
    assert 0 < dropped < 40
    for text in batch.text.split(list(batch.text_packing.lengths)):
        wanted = dataset.empty_text if len(text) == 1 else dataset.samples[1].text
        assert torch.equal(text, wanted.float())
