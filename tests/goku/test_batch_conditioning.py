"""Given frames in batches: which, from where, how often, and that nothing else of a batch changes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from goku.batch import Batch, BatchBuilder
from goku.conditioning import ConditioningConfig, choose_given
from goku.data import CachedSample, Item
from goku.flow import FlowConfig
from goku.model import GokuTransformer, ModelConfig
from goku.packing import PackingConfig
from goku.random import Purpose, normal
from goku.vae import GokuVAE, VAEConfig

CPU = torch.device("cpu")
CHANNELS, TEXT_DIM, SEED = 3, 8, 11
GRIDS = [(1, 2, 2), (3, 2, 3), (4, 1, 2), (2, 1, 4), (1, 1, 1)]
CLIPS = [1, 2, 3]
POSITIONS = [40, 41, 42, 43, 44]
MEAN, STD = torch.tensor([0.5, -1.0, 2.0]), torch.tensor([2.0, 0.5, 4.0])


@dataclass
class FakeDataset:
    items: list[Item]
    samples: list[CachedSample]
    empty_text: Tensor

    def reading(self) -> AbstractContextManager[None]:
        return nullcontext()

    def read(self, index: int, caption: int = 0) -> CachedSample:
        return self.samples[index]


def _draw(seed: int, *shape: int) -> Tensor:
    return normal(seed, 0, math.prod(shape), Purpose.SAMPLE).view(shape)


def _dataset(*frames: int) -> Any:
    """Five items; `frames` of each clip are cached alone, unlike any latent of the clip itself."""
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
        alone = {f: _draw(400 + 10 * i + f, CHANNELS, 1, 2 * h, 2 * w) for f in frames if t > 1}
        samples.append(
            CachedSample(
                _draw(100 + i, *shape), _draw(200 + i, *shape), _draw(300 + i, i + 1, TEXT_DIM),
                alone,
            )
        )  # fmt: skip
    return FakeDataset(items, samples, torch.full((1, TEXT_DIM), 7.0))


class NotCausal(GokuVAE):
    """Stands for VAEs whose first latent frame is not that of the first frame alone."""

    causal = False


def _vae(kind: type[GokuVAE] = GokuVAE) -> GokuVAE:
    config = VAEConfig(channels=CHANNELS, stem_width=8, width=8, encoder_depth=1, decoder_depth=1)
    vae = kind(config)
    with torch.no_grad():  # that a forgotten or doubled normalisation would show
        vae.latent_mean.copy_(MEAN)
        vae.latent_std.copy_(STD)
    return vae


VAE = _vae()


def _builder(
    dataset: Any,
    conditioning: ConditioningConfig | None,
    *,
    vae: GokuVAE = VAE,
    packing: Any = None,
    **flow: Any,
) -> BatchBuilder:
    packing = packing or PackingConfig(tokens_per_step=100, tokens_per_pack=50)
    return BatchBuilder(
        dataset, vae, FlowConfig(**flow), packing, SEED, CPU, conditioning=conditioning
    )


def _conditions(batch: Batch) -> list[Tensor]:
    assert batch.condition is not None
    assert batch.condition.dtype == batch.x.dtype == torch.float32
    return list(batch.condition.split(list(batch.packing.lengths)))


def _by_hand(
    grid: tuple[int, int, int], latents: Mapping[int, Tensor], kept: int | None = None
) -> Tensor:
    """Rows of a sample, token by token: latents of latent frames, un-normalised, and the mask."""
    times, height, width = grid
    scaled = {i: (x[:, 0] - MEAN.view(3, 1, 1)) / STD.view(3, 1, 1) for i, x in latents.items()}
    rows = []
    for time in range(kept or times):
        nearest = min(sorted(latents), key=lambda i, time=time: abs(i - time))
        for i in range(height):
            for j in range(width):
                patch = scaled[nearest][:, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2]
                mask = torch.full((4,), float(time in latents))
                rows.append(torch.cat([patch.reshape(-1), mask]))
    return torch.stack(rows)


def _assert_given(rows: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(rows, wanted, rtol=1e-6, atol=1e-6)  # a subtraction and a division


def test_the_first_frame_of_a_causal_vae_is_the_posteriors_mean() -> None:
    dataset = _dataset()
    batch = _builder(dataset, ConditioningConfig(drop=0, drop_both=0)).training(POSITIONS, range(5))
    for i, rows in enumerate(_conditions(batch)):
        if i not in CLIPS:  # an image is never given itself
            assert torch.equal(rows, torch.zeros(math.prod(GRIDS[i]), 4 * CHANNELS + 4))
        else:
            _assert_given(rows, _by_hand(GRIDS[i], {0: dataset.samples[i].mean[:, :1]}))


@pytest.mark.parametrize(
    ("config", "given"),
    [
        (ConditioningConfig(drop=0, drop_both=0), (0,)),
        (ConditioningConfig(first=0, last=1, drop=0, drop_both=0), (-1,)),
        (ConditioningConfig(first=0, both=1, drop=0, drop_both=0), (0, -1)),
    ],
)
def test_frames_encoded_alone_by_hand(config: ConditioningConfig, given: tuple[int, ...]) -> None:
    dataset = _dataset(0, -1)
    for vae in (VAE, _vae(NotCausal)):
        builder = _builder(dataset, config, vae=vae)
        for batch in (builder.training(POSITIONS, range(5)), builder.fixed(range(5), [0.5] * 5)):
            for i in CLIPS:
                alone = dataset.samples[i].frames
                latents = {0 if f == 0 else GRIDS[i][0] - 1: alone[f] for f in given}
                _assert_given(_conditions(batch)[i], _by_hand(GRIDS[i], latents))


def test_the_draw_is_choose_given_and_a_sample_is_the_same_bits_in_any_pack() -> None:
    dataset = _dataset(0, -1)
    config = ConditioningConfig(first=1, last=1, both=1, drop=0.3)
    builder = _builder(dataset, config, text_drop=0.5)
    positions, indices = list(range(60)), [1, 2, 3] * 20
    whole = _conditions(builder.training(positions, indices))
    frames = [dataset.items[i].frames for i in indices]
    chosen = choose_given(config, SEED, positions, frames)
    assert len(set(chosen)) == 4
    for rows, index, given in zip(whole, indices, chosen, strict=True):
        times, area = GRIDS[index][0], math.prod(GRIDS[index][1:])
        mask = rows[:, -1].view(times, area)
        wanted = [0.0] * times
        for frame in given:
            wanted[frame] = 1.0
        assert mask.tolist() == [[value] * area for value in wanted]
        assert rows.any() == bool(given)
    order = torch.randperm(60, generator=torch.Generator().manual_seed(1)).tolist()
    for k in range(0, 60, 7):
        part = order[k : k + 7]
        batch = builder.training([positions[i] for i in part], [indices[i] for i in part])
        for i, rows in zip(part, _conditions(batch), strict=True):
            assert torch.equal(rows, whole[i])


def test_nothing_else_of_a_batch_changes() -> None:
    dataset = _dataset(0, -1)
    with_frames = _builder(
        dataset, ConditioningConfig(both=1, drop=0.5, drop_both=0), text_drop=0.5
    )
    without = _builder(dataset, None, text_drop=0.5)
    for ours, theirs in (
        (with_frames.training(POSITIONS, range(5)), without.training(POSITIONS, range(5))),
        (with_frames.fixed(range(5), [0.5] * 5), without.fixed(range(5), [0.5] * 5)),
    ):
        for name in ("x", "target", "t", "text", "weights"):
            assert torch.equal(getattr(ours, name), getattr(theirs, name)), name
        assert theirs.condition is None
        assert theirs.inputs[-1] is None
        assert ours.inputs[-1] is ours.condition
        assert len(ours.inputs) == len(theirs.inputs) == 7


@pytest.mark.parametrize("drop_both", [0.0, 0.25])
def test_frames_and_text_are_dropped_at_their_rates(drop_both: float) -> None:
    """Both together by a draw of its own, and else independently."""
    dataset = _dataset(0)
    count = 700
    config = ConditioningConfig(drop=0.2, drop_both=drop_both)
    builder = _builder(dataset, config, text_drop=0.3)
    batch = builder.training(range(count), [3] * count)
    texts = batch.text.split(list(batch.text_packing.lengths))
    without_text = [torch.equal(text, dataset.empty_text) for text in texts]
    without_frame = [not rows.any() for rows in _conditions(batch)]
    both = [a and b for a, b in zip(without_text, without_frame, strict=True)]
    for dropped, alone in ((without_text, 0.3), (without_frame, 0.2), (both, 0.06)):
        rate = drop_both + (1 - drop_both) * alone
        # Five standard deviations of a binomial.
        assert abs(sum(dropped) - rate * count) <= 5 * math.sqrt(count * rate * (1 - rate))
    # An image is given nothing, and keeps its text.
    images = builder.training(range(count), [0] * count)
    texts = images.text.split(list(images.text_packing.lengths))
    dropped = sum(torch.equal(text, dataset.empty_text) for text in texts)
    assert abs(dropped - 0.3 * count) <= 5 * math.sqrt(count * 0.3 * 0.7)


def test_fixed_batches_give_what_is_usual_whatever_the_rate() -> None:
    dataset = _dataset(0, -1)
    config = ConditioningConfig(first=0.6, both=0.4, drop=1.0)
    builder = _builder(dataset, config)
    assert not builder.training(POSITIONS, range(5)).condition.any()
    first = _conditions(builder.fixed(range(5), [0.5] * 5))
    for i, rows in enumerate(first):
        if i in CLIPS:
            _assert_given(rows, _by_hand(GRIDS[i], {0: dataset.samples[i].frames[0]}))
        else:
            assert not rows.any()
        (alone,) = _conditions(builder.fixed([i], [0.1]))
        assert torch.equal(alone, rows)


def test_a_frame_that_was_not_encoded_is_named() -> None:
    not_causal = _vae(NotCausal)
    builder = _builder(_dataset(), ConditioningConfig(drop=0, drop_both=0), vae=not_causal)
    with pytest.raises(ValueError, match=r"item1: its frame 0 was not encoded.*frames=\(0,\)"):
        builder.training([5], [1])
    assert not builder.training([5], [0]).condition.any()  # an image needs none
    builder = _builder(_dataset(0), ConditioningConfig(both=1, first=0, drop=0, drop_both=0))
    with pytest.raises(ValueError, match=r"item2: its frame -1 was not .*frames=\(-1,\)"):
        builder.fixed([2], [0.5])


def test_a_clip_that_is_cut_shows_its_first_frame_alone() -> None:
    dataset = _dataset(0, -1)
    tight = PackingConfig(tokens_per_step=100, tokens_per_pack=6, overlong="cut")
    builder = _builder(dataset, ConditioningConfig(drop=0, drop_both=0), packing=tight)
    assert [grid[0] for grid in builder.grids] == [1, 1, 3, 1, 1]
    rows = _conditions(builder.training(POSITIONS, range(5)))
    wanted = _by_hand(GRIDS[2], {0: dataset.samples[2].frames[0]}, kept=3)
    _assert_given(rows[2], wanted)
    # What is cut to one latent frame is an image, and is given nothing.
    assert [bool(part.any()) for part in rows] == [False, False, True, False, False]
    # The last frame of a cut clip is not the cached one.
    message = (
        r"item2 is cut from 4 latent frames to 3, so that its last frame cannot be given; allow"
    )
    for weights in ({"last": 1.0}, {"both": 0.5}):
        with pytest.raises(ValueError, match=message):
            _builder(dataset, ConditioningConfig(**weights), packing=tight)


def test_a_batch_is_what_the_model_takes() -> None:
    config = ModelConfig(
        dim=24, depth=1, heads=2, text_dim=TEXT_DIM, latent_channels=CHANNELS, condition="frames"
    )
    model = GokuTransformer(config)
    batch = _builder(_dataset(), ConditioningConfig()).training(POSITIONS, range(5))
    assert model(*batch.inputs).shape == batch.target.shape
