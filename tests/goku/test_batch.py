"""Batches: what a sample becomes depends on its place in the stream, never on its pack."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from goku.batch import Batch, BatchBuilder
from goku.data import CachedSample, Item, Problem
from goku.flow import FlowConfig, per_sample_mse, sample_times, weighted_loss
from goku.lost import LostItems
from goku.model import GokuTransformer, ModelConfig, patchify
from goku.packing import PackingConfig, partition
from goku.random import Purpose, normal
from goku.vae import GokuVAE, VAEConfig

CPU = torch.device("cpu")
CHANNELS, TEXT_DIM, SEED = 3, 8, 11
# Latent grids (t, h, w) in tokens; the weights are unequal and no round numbers.
GRIDS = [(1, 2, 2), (3, 2, 3), (1, 3, 2), (2, 1, 4), (1, 1, 1)]
WEIGHTS = [1.0, 0.37, 2.5, 1.9, 0.11]


@dataclass
class FakeDataset:
    """Five items in memory, read like those of the latent cache."""

    items: list[Item]
    samples: list[CachedSample]
    empty_text: Tensor
    scopes: list[str] = field(default_factory=list)

    @contextmanager
    def reading(self) -> Iterator[None]:
        self.scopes.append("")
        yield
        self.scopes.append("end")

    def read(self, index: int, caption: int = 0) -> CachedSample:
        assert self.scopes[-1:] == [""], "one scope for the reads of a pack"
        sample = self.samples[index]
        # Of several captions each is unlike the others.
        return replace(sample, text=sample.text + 10.0 * caption) if caption else sample


@pytest.fixture(scope="module")
def dataset() -> FakeDataset:
    items, samples = [], []
    for i, ((t, h, w), weight) in enumerate(zip(GRIDS, WEIGHTS, strict=True)):
        frames = 4 * (t - 1) + 1
        items.append(
            Item(
                name=f"item{i}", caption=f"caption {i}", frames=frames, height=16 * h,
                width=16 * w, grid=(t, h, w), tokens=t * h * w,
                modality="image" if t == 1 else "video", weight=weight,
            )
        )  # fmt: skip
        shape = (CHANNELS, t, 2 * h, 2 * w)
        size = math.prod(shape)
        mean = normal(100 + i, 0, size, Purpose.SAMPLE).view(shape)
        logvar = normal(200 + i, 0, size, Purpose.SAMPLE).view(shape)
        text = normal(300 + i, 0, (i + 1) * TEXT_DIM, Purpose.SAMPLE).view(i + 1, TEXT_DIM)
        samples.append(CachedSample(mean, logvar, text))
    return FakeDataset(items, samples, torch.full((1, TEXT_DIM), 7.0))


@pytest.fixture(scope="module")
def vae() -> GokuVAE:
    vae = GokuVAE(
        VAEConfig(channels=CHANNELS, stem_width=8, width=8, encoder_depth=1, decoder_depth=1)
    )
    # Statistics that a forgotten or doubled normalisation would show.
    with torch.no_grad():
        vae.latent_mean.copy_(torch.tensor([0.5, -1.0, 2.0]))
        vae.latent_std.copy_(torch.tensor([2.0, 0.5, 4.0]))
    return vae


def _builder(
    dataset: Any, vae: GokuVAE, *, seed: int = SEED, packing: Any = None, **flow: Any
) -> BatchBuilder:
    packing = packing or PackingConfig(tokens_per_step=100, tokens_per_pack=50)
    return BatchBuilder(dataset, vae, FlowConfig(**flow), packing, seed, CPU)


def _parts(batch: Batch) -> list[tuple[Tensor, ...]]:
    """(x, target, t, text) of each sample."""
    lengths, text_lengths = list(batch.packing.lengths), list(batch.text_packing.lengths)
    return list(
        zip(
            batch.x.split(lengths),
            batch.target.split(lengths),
            batch.t,
            batch.text.split(text_lengths),
            strict=True,
        )
    )


def _same(a: tuple[Tensor, ...], b: tuple[Tensor, ...]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


POSITIONS = [40, 41, 42, 43, 44]


@pytest.mark.parametrize(
    "flow",
    [
        {"text_drop": 0.5},
        {"time_distribution": "logit_normal", "resolution_shift": True, "base_tokens": 4},
    ],
)
def test_a_sample_at_a_position_is_the_same_bits_in_any_pack(
    dataset: FakeDataset, vae: GokuVAE, flow: dict[str, Any]
) -> None:
    builder = _builder(dataset, vae, **flow)
    whole = _parts(builder.training(POSITIONS, range(5)))
    for packs in ([[0], [1], [2], [3], [4]], [[4, 0], [3, 1, 2]], [[2, 3, 4, 0, 1]]):
        for pack in packs:
            batch = builder.training([POSITIONS[k] for k in pack], pack)
            assert [item.name for item in batch.items] == [f"item{k}" for k in pack]
            assert batch.weights.tolist() == [WEIGHTS[k] for k in pack]
            assert batch.packing.lengths == tuple(builder.tokens[k] for k in pack)
            for k, part in zip(pack, _parts(batch), strict=True):
                assert _same(part, whole[k])
    # A builder made anew, as after a resume, gives the same; another seed or position does not.
    assert _same(_parts(_builder(dataset, vae, **flow).training([42], [2]))[0], whole[2])
    for other in (
        builder.training([47], [2]),
        _builder(dataset, vae, seed=SEED + 1, **flow).training([42], [2]),
    ):
        x, target, t, _ = _parts(other)[0]
        assert not torch.equal(x, whole[2][0])
        assert not torch.equal(target, whole[2][1])
        assert t != whole[2][2]


def test_one_item_twice_in_a_pack_gets_two_draws(dataset: FakeDataset, vae: GokuVAE) -> None:
    first, second = _parts(_builder(dataset, vae).training([3, 8], [1, 1]))
    assert not torch.equal(first[0], second[0])
    assert not torch.equal(first[1], second[1])
    assert first[2] != second[2]


def test_the_path_and_the_posterior_by_hand(dataset: FakeDataset, vae: GokuVAE) -> None:
    """x = t x1 + (1 - t) x0, target = x1 - x0, x1 = normalise(mean + exp(logvar / 2) * noise)."""
    builder = _builder(dataset, vae)
    batch = builder.training(POSITIONS, range(5))
    for k, (x, target, t, _) in enumerate(_parts(batch)):
        sample, position = dataset.samples[k], POSITIONS[k]
        noise = normal(SEED, position, sample.mean.numel(), Purpose.POSTERIOR)
        drawn = sample.mean + torch.exp(0.5 * sample.logvar) * noise.view_as(sample.mean)
        mean = torch.tensor([0.5, -1.0, 2.0]).view(3, 1, 1, 1)
        std = torch.tensor([2.0, 0.5, 4.0]).view(3, 1, 1, 1)
        x1 = patchify((drawn - mean) / std)
        x0 = normal(SEED, position, x1.numel(), Purpose.NOISE).view_as(x1)
        # One rounding each in the division and the two products: fp32, values below 10.
        torch.testing.assert_close(target, x1 - x0, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(x, t * x1 + (1 - t) * x0, rtol=1e-6, atol=1e-6)
        expected = sample_times(FlowConfig(), SEED, [position], [builder.tokens[k]])
        assert t == expected.float()[0]


def test_the_posterior_has_the_cached_deviation(vae: GokuVAE, dataset: FakeDataset) -> None:
    """Over many positions: mean and standard deviation exp(logvar / 2), not exp(logvar)."""
    shape = (CHANNELS, 1, 2, 2)
    mean = torch.full(shape, 3.0)
    logvar = torch.full(shape, 2 * math.log(0.3))
    item = dataset.items[4]
    one: Any = FakeDataset([item], [CachedSample(mean, logvar, torch.ones(1, TEXT_DIM))], mean)
    one.empty_text = torch.zeros(1, TEXT_DIM)
    count = 1500
    batch = _builder(one, vae).training(range(count), [0] * count)
    # t x1 + (1 - t) x0 and x1 - x0 together give x1 = x + (1 - t) * target.
    t = batch.t.view(-1, 1)
    x1 = (batch.x + (1 - t) * batch.target).view(count, CHANNELS, 4)
    std = torch.tensor([2.0, 0.5, 4.0])
    drawn = x1 * std.view(1, 3, 1) + torch.tensor([0.5, -1.0, 2.0]).view(1, 3, 1)
    samples = drawn.flatten().double()
    # 18,000 draws: five standard errors.
    assert samples.mean().item() == pytest.approx(3.0, abs=5 * 0.3 / math.sqrt(samples.numel()))
    assert samples.std().item() == pytest.approx(0.3, rel=5 / math.sqrt(2 * samples.numel()))


def test_fixed_batches_are_the_same_at_every_call(dataset: FakeDataset, vae: GokuVAE) -> None:
    builder = _builder(dataset, vae, text_drop=1.0)
    times = [0.1, 0.3, 0.5, 0.7, 0.9]
    first = _parts(builder.fixed(range(5), times))
    builder.training(POSITIONS, range(5))  # training in between changes nothing
    torch.manual_seed(5)
    assert all(
        _same(a, b) for a, b in zip(first, _parts(builder.fixed(range(5), times)), strict=True)
    )
    for k, (x, target, t, text) in enumerate(first):
        assert _same(_parts(builder.fixed([k], [times[k]]))[0], (x, target, t, text))
        # The posterior's mean, noise of the item, no text dropped (although the rate is 1).
        x1 = patchify(vae.normalise(dataset.samples[k].mean[None])[0])
        x0 = normal(SEED, k, x1.numel(), Purpose.EVAL).view_as(x1)
        assert torch.equal(target, x1 - x0)
        torch.testing.assert_close(x, times[k] * x1 + (1 - times[k]) * x0, rtol=1e-6, atol=1e-6)
        assert t == torch.tensor(times[k])
        assert torch.equal(text, dataset.samples[k].text)
    # The same item at two times has the same noise.
    early, late = _parts(builder.fixed([1, 1], [0.2, 0.8]))
    assert torch.equal(early[1], late[1])


@pytest.mark.parametrize("rate", [0.0, 0.1, 0.4, 1.0])
def test_text_is_dropped_at_its_rate_and_replaced_by_the_empty_prompt(
    dataset: FakeDataset, vae: GokuVAE, rate: float
) -> None:
    count = 800
    batch = _builder(dataset, vae, text_drop=rate).training(range(count), [2] * count)
    texts = [part[3] for part in _parts(batch)]
    dropped = sum(torch.equal(text, dataset.empty_text) for text in texts)
    kept = sum(torch.equal(text, dataset.samples[2].text) for text in texts)
    assert dropped + kept == count
    # Five standard deviations of a binomial; exactly none and all at the ends.
    assert abs(dropped - rate * count) <= 5 * math.sqrt(count * rate * (1 - rate))
    # Dropping the text touches neither noise nor time.
    plain = _builder(dataset, vae, text_drop=0.0).training(range(count), [2] * count)
    assert torch.equal(batch.x, plain.x)
    assert torch.equal(batch.t, plain.t)


def test_captions_are_chosen_by_weight_and_the_heaviest_is_evaluated(
    dataset: FakeDataset, vae: GokuVAE
) -> None:
    several = replace(dataset.items[2], captions=("a", "b", "c"), caption_weights=(5.0, 3.0, 2.0))
    items = [*dataset.items[:2], several, *dataset.items[3:]]
    captioned = FakeDataset(items, dataset.samples, dataset.empty_text)
    count = 400
    builder = _builder(captioned, vae, text_drop=0.0)
    batch = builder.training(range(count), [2] * count)
    first = dataset.samples[2].text
    chosen = [round((part[3] - first).mean().item() / 10) for part in _parts(batch)]
    for caption, rate in enumerate((0.5, 0.3, 0.2)):
        # Five standard deviations of a binomial.
        spread = 5 * math.sqrt(count * rate * (1 - rate))
        assert abs(chosen.count(caption) - rate * count) <= spread
    # By the position alone: in another pack, and with a rate of dropping that takes some away.
    alone = [_parts(builder.training([k], [2]))[0][3] for k in range(40)]
    assert [round((text - first).mean().item() / 10) for text in alone] == chosen[:40]
    half = _builder(captioned, vae, text_drop=0.5).training(range(count), [2] * count)
    for part, caption in zip(_parts(half), chosen, strict=True):
        text = part[3]
        assert torch.equal(text, dataset.empty_text) or torch.equal(text, first + 10.0 * caption)
    assert torch.equal(_parts(builder.fixed([2], [0.5]))[0][3], first)
    # Noise, time and posterior are those of the same item with one caption.
    plain = _builder(dataset, vae, text_drop=0.0).training(range(count), [2] * count)
    assert torch.equal(batch.x, plain.x)


def test_a_lost_sample_is_zeros_of_weight_zero_and_changes_no_other(
    dataset: FakeDataset, vae: GokuVAE
) -> None:
    class Damaged(FakeDataset):
        lost: ClassVar[dict[int, Problem]] = {}

        def read(self, index: int, caption: int = 0) -> CachedSample:
            if index == 1:
                raise ValueError("item1.safetensors is damaged")
            return super().read(index, caption)

        def repair(self, index: int, vae: Any) -> CachedSample:
            raise FileNotFoundError("item1.mp4")

    damaged = Damaged(dataset.items, dataset.samples, dataset.empty_text)
    packing = PackingConfig(tokens_per_step=100, tokens_per_pack=50)
    told: list[Any] = []
    lost = LostItems(9, lambda kind, fields: told.append((kind, fields["name"])))
    builder = BatchBuilder(damaged, vae, FlowConfig(), packing, SEED, CPU, lost=lost)
    whole = _builder(dataset, vae)
    for ours, theirs in (
        (builder.training(POSITIONS, range(5)), whole.training(POSITIONS, range(5))),
        (builder.fixed(range(5), [0.5] * 5), whole.fixed(range(5), [0.5] * 5)),
    ):
        assert ours.weights.tolist() == [WEIGHTS[0], 0.0, *WEIGHTS[2:]]
        assert ours.lost == (False, True, False, False, False)
        assert theirs.lost == ()
        assert ours.packing.lengths == theirs.packing.lengths
        for k, (a, b) in enumerate(zip(_parts(ours), _parts(theirs), strict=True)):
            assert _same(a, b) == (k != 1)
            assert all(torch.isfinite(part).all() for part in a)
    assert builder.training([3], [0]).lost == ()
    assert told == [("lost", "item1")]
    assert lost.count == 1
    with pytest.raises(ValueError, match="safetensors is damaged"):
        _builder(damaged, vae).training([3], [1])


def test_what_was_read_ahead_is_trained_on_without_another_read(
    dataset: FakeDataset, vae: GokuVAE
) -> None:
    """The same bits; what could not be read ahead is read then, and a lost item stays lost."""

    class Cached(FakeDataset):
        lost: ClassVar[dict[int, Problem]] = {}
        damaged: ClassVar[set[int]] = set()
        again: ClassVar[list[int]] = []

        def cached(self, index: int, caption: int = 0) -> CachedSample | None:
            sample = self.samples[index]
            text = sample.text + 10.0 * caption
            return None if index in self.damaged else replace(sample, text=text)

        def read(self, index: int, caption: int = 0) -> CachedSample:
            self.again.append(index)
            if index in self.damaged:
                raise ValueError(f"item{index}.safetensors is damaged")
            return super().read(index, caption)

        def repair(self, index: int, vae: Any) -> CachedSample:
            raise FileNotFoundError(f"item{index}.mp4")

    items = [replace(i, captions=("a", "b"), caption_weights=(0.5, 0.5)) for i in dataset.items]
    plain = _builder(FakeDataset(items, dataset.samples, dataset.empty_text), vae, text_drop=0.5)
    ahead = Cached(items, dataset.samples, dataset.empty_text)
    packing = PackingConfig(tokens_per_step=100, tokens_per_pack=50)
    builder = BatchBuilder(
        ahead, vae, FlowConfig(text_drop=0.5), packing, SEED, CPU, lost=LostItems(9)
    )  # type: ignore[arg-type]
    packs = [([40, 41, 42], [0, 1, 2]), ([43, 44], [3, 4])]
    builder.read_ahead(packs)
    for pack in packs:
        both = _parts(builder.training(*pack)), _parts(plain.training(*pack))
        assert all(_same(a, b) for a, b in zip(*both, strict=True))
    assert ahead.again == []
    assert builder.read_seconds > 0
    assert _same(_parts(builder.training([42], [2]))[0], _parts(plain.training([42], [2]))[0])
    assert ahead.again == [2]
    # Damaged since: found when it is trained on, and lost for good, even where it comes back.
    ahead.damaged.add(1)
    builder.read_ahead(packs)
    assert builder.training(*packs[0]).lost == (False, True, False)
    assert ahead.again == [2, 1]
    ahead.damaged.clear()
    builder.read_ahead([packs[0]])
    assert builder.training(*packs[0]).lost == (False, True, False)
    assert ahead.again == [2, 1]
    # An evaluation of the same item with the same caption leaves it to training.
    position = next(p for p in range(100) if builder._captions([p], [2]) == [0])
    builder.read_ahead([([position], [2])])
    builder.fixed([2], [0.5])
    assert ahead.again == [2, 1, 2]
    builder.training([position], [2])
    assert ahead.again == [2, 1, 2]
    builder.close()


def test_an_overlong_item_is_an_error_or_cut(dataset: FakeDataset, vae: GokuVAE) -> None:
    tight = PackingConfig(tokens_per_step=100, tokens_per_pack=14)
    with pytest.raises(ValueError, match=r"item1: 3 x 2 x 3 = 18 tokens.*tokens_per_pack=14"):
        _builder(dataset, vae, packing=tight)
    cut = _builder(
        dataset, vae, packing=PackingConfig(tokens_per_step=100, tokens_per_pack=14, overlong="cut")
    )
    assert cut.grids == [(1, 2, 2), (2, 2, 3), (1, 3, 2), (2, 1, 4), (1, 1, 1)]
    assert cut.tokens == [4, 12, 6, 8, 1]
    whole = _builder(dataset, vae)
    x, target, t, _ = _parts(cut.training([9], [1]))[0]
    assert x.shape == target.shape == (12, 4 * CHANNELS)
    # Its first latent frames are those of the whole: the same posterior draw, cut; its noise is
    # that of the first elements, and its time the same.
    full_x, full_target, full_t, _ = _parts(whole.training([9], [1]))[0]
    assert torch.equal(target, full_target[:12])
    assert torch.equal(x, full_x[:12])
    assert t == full_t
    assert torch.equal(cut.fixed([1], [0.5]).target, whole.fixed([1], [0.5]).target[:12])


def test_the_loss_is_the_global_weighted_mean_in_any_partition(
    dataset: FakeDataset, vae: GokuVAE
) -> None:
    """fp64 model and inputs, so that only the order of sums is left: 1e-12."""
    model = GokuTransformer(
        ModelConfig(dim=24, depth=2, heads=2, text_dim=TEXT_DIM, latent_channels=CHANNELS)
    ).double()
    with torch.no_grad():
        for i, (_, parameter) in enumerate(model.named_parameters()):
            noise = normal(i, 0, parameter.numel(), Purpose.SAMPLE, dtype=torch.float64)
            parameter += 0.05 * noise.view_as(parameter)
    builder = _builder(dataset, vae, text_drop=0.3)
    # Seven samples of a step; two items come twice.
    indices = [0, 1, 2, 3, 4, 1, 0]
    positions = list(range(20, 27))
    lengths = [builder.tokens[i] for i in indices]
    weight_sum = math.fsum(WEIGHTS[i] for i in indices)

    def per_sample(pack: list[int]) -> tuple[Tensor, Batch]:
        batch = builder.training([positions[k] for k in pack], [indices[k] for k in pack])
        prediction = model(
            batch.x.double(), batch.t.double(), batch.text.double(),
            batch.packing, batch.text_packing,
        )  # fmt: skip
        return per_sample_mse(prediction, batch.target.double(), batch.packing), batch

    def share(pack: list[int]) -> Tensor:
        means, batch = per_sample(pack)
        return weighted_loss(means, batch.weights, weight_sum)

    def step(plan: list[list[list[int]]]) -> tuple[float, list[Tensor]]:
        """Loss and gradients, summed over packs and ranks as the training loop sums them."""
        model.zero_grad()
        total = 0.0
        for packs in plan:
            for pack in packs:
                loss = share(pack)
                loss.backward()
                total += loss.item()
        return total, [p.grad.clone() for p in model.parameters() if p.grad is not None]

    # By definition, one sample at a time: sum(w_i * mean_i) / sum(w_i).
    with torch.no_grad():
        means = [per_sample([k])[0].item() for k in range(7)]
    weights = [WEIGHTS[i] for i in indices]
    expected = math.fsum(w * m for w, m in zip(weights, means, strict=True)) / math.fsum(weights)
    # The plain mean is something else, so the weights are really used.
    assert abs(expected - sum(means) / 7) > 1e-3

    loss, gradients = step([[list(range(7))]])
    assert loss == pytest.approx(expected, rel=1e-12)
    costs = [float(n) for n in lengths]
    plans = [partition(lengths, costs, ranks, budget) for ranks, budget in ((1, 18), (2, 30))]
    plans += [partition(lengths, costs, 4, 18), [[[k]] for k in range(7)], [[[6, 0], [3]], [], [
        [5, 1, 2, 4]
    ]]]  # fmt: skip
    for plan in plans:
        assert sorted(k for packs in plan for pack in packs for k in pack) == list(range(7))
        other, others = step(plan)
        assert other == pytest.approx(expected, rel=1e-12)
        for a, b in zip(gradients, others, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
    assert any(gradient.abs().max() > 1e-3 for gradient in gradients)


def test_real_media_in_a_real_cache(dataset: FakeDataset, vae: GokuVAE, tmp_path: Path) -> None:
    """Through `prepare`: the fake dataset above stands for what it gives."""
    import numpy as np
    from PIL import Image

    from goku.data import DataConfig, prepare
    from goku.text import TextConfig, load_text_encoder

    media = tmp_path / "media"
    media.mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (32, 48, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(media / "a.png")
    (media / "a.txt").write_text("noise")
    config = DataConfig(path=str(media), image_pixels=32 * 48, workers=0)
    text = load_text_encoder(TextConfig(tiny_dim=TEXT_DIM, tiny_heads=1))
    cached = prepare(config, vae, text, cache_dir=tmp_path / "cache")
    batch = _builder(cached, vae, text_drop=0.0).fixed([0], [1.0])
    # At t = 1 the input is the data itself: the normalised posterior mean.
    sample = cached.read(0)
    assert torch.equal(batch.x, patchify(vae.normalise(sample.mean[None])[0]))
    assert batch.packing.lengths == (6,)
    assert torch.equal(batch.text, sample.text)
    dropped = _builder(cached, vae, text_drop=1.0).training([0], [0])
    assert torch.equal(dropped.text, cached.empty_text)
    assert torch.equal(dropped.text, text.encode([""])[0])
