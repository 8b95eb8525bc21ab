"""What a run shows of itself while it trains: its loss on fixed samples, and pictures and clips of its captions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import zip_longest
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from goku.batch import BatchBuilder
from goku.data import Item
from goku.media_files import file_stem
from goku.metrics import RunLog
from goku.packing import partition
from goku.sampler import Request, SampleConfig, decode, integrate_all, save_media
from goku.statistics import StepStatistics, sample_groups
from goku.step_plan import rounds
from goku.text import LazyTextEncoder, TextCache

if TYPE_CHECKING:
    from goku.trainer import Trainer

__all__ = ["evaluate", "sample", "spread"]


def spread(items: Sequence[Item], count: int) -> list[int]:
    """Indices of at most `count` items, drawn in turn from every source's stills and clips, each in its order.

    The first of a list that goes source by source would be of one source, and of one modality, alone.
    """
    groups: dict[tuple[str, str], list[int]] = {}
    for index, item in enumerate(items):
        groups.setdefault((item.source, item.modality), []).append(index)
    rounds = zip_longest(*groups.values())
    return [index for each in rounds for index in each if index is not None][:count]


@torch.no_grad()
def evaluate(trainer: Trainer, log: RunLog) -> None:
    """Loss of the averaged weights on fixed (sample, noise, t): training items, and unseen ones where given.

    The items are those of `spread`.
    """
    fields: dict[str, Any] = {}
    for name, builder in (("fixed", trainer.builder), ("unseen", trainer.unseen)):
        if builder is None:
            continue
        statistics = _fixed_statistics(trainer, builder)
        loss, by_bin, by_modality = statistics.means()
        fields |= {
            f"{name}_loss": loss,
            f"{name}_by_bin": by_bin,
            f"{name}_by_modality": by_modality,
            f"{name}_by_resolution": statistics.by_resolution(),
        }
    log.event("eval", trainer.step, **fields)


def _fixed_statistics(trainer: Trainer, builder: BatchBuilder) -> StepStatistics:
    train, packing = trainer.config.train, trainer.config.packing
    chosen = spread(builder.dataset.items, train.eval_items)
    times = [(k + 0.5) / train.eval_times for k in range(train.eval_times)]
    cases = [(i, t) for i in chosen for t in times]
    lengths = [builder.tokens[i] for i, _ in cases]
    weight_sum = math.fsum(builder.dataset.items[i].weight for i, _ in cases)
    costs = trainer.costs(lengths)
    statistics = StepStatistics(trainer.device)
    shares = partition(lengths, costs, trainer.context.packs, packing.tokens_per_pack)
    for pack, idle in rounds(shares, lengths, trainer.context.pack_rank):
        batch = builder.fixed([cases[k][0] for k in pack], [cases[k][1] for k in pack])
        groups = sample_groups(batch)
        per_sample = trainer.per_sample_loss(trainer.ema.module, batch)
        if not idle:
            statistics.add(batch, per_sample, weight_sum, groups=groups)
    trainer.context.all_sum(statistics.vector)
    return statistics


def sample(trainer: Trainer, log: RunLog) -> None:
    """Draw the first training captions with fixed seeds into out/samples/step_N; each group draws its share.

    All processes integrate together, since sharded weights are gathered together: what fails there ends the run,
    unless it is alone. The captions' embeddings are found before, and decoding and writing are each group's own: what
    fails there is told, and training goes on.
    """
    train = trainer.config.train
    known = trainer.builder.dataset.items
    chosen = spread(known, train.sample_captions) if train.sample_every else []
    items, grids = [known[i] for i in chosen], [trainer.builder.grids[i] for i in chosen]
    requests = [
        # Of a clip as much as is trained on: the rest might not fit into a pack.
        Request(item.caption, item.height, item.width, 4 * (grid[0] - 1) + 1, seed=i)
        for i, (item, grid) in enumerate(zip(items, grids, strict=True))
    ]
    if not requests:
        return
    log.message(f"drawing {len(requests)} samples of step {trainer.step}")
    flow = trainer.config.flow
    settings = SampleConfig(
        steps=train.sample_steps,
        shift=flow.shift,
        base_tokens=flow.base_tokens if flow.resolution_shift else None,
        tokens_per_pack=trainer.config.packing.tokens_per_pack,
        precision=trainer.dtype,
    )
    folder = trainer.out / "samples" / f"step_{trainer.step:07d}"
    drawn: list[tuple[str, str]] = []
    failure: str | None = None
    context = trainer.context
    try:
        embeddings = context.together(lambda: _embeddings(trainer, [r.prompt for r in requests]))
    except (OSError, ValueError) as error:  # then on every process
        _tell_failure(trainer, log, str(error))
        return

    def integrate() -> dict[int, Tensor]:
        return integrate_all(
            trainer.ema.module, trainer.vae, lambda strings: [embeddings[s] for s in strings],
            requests, settings, trainer.device,
            share=(context.pack_rank, context.packs), sharding=trainer.sharding,
        )  # fmt: skip

    latents = integrate() if context.world > 1 else {}
    try:
        if context.world == 1:
            latents = integrate()
        for i, latent in sorted(latents.items()) if context.leads_pack else []:
            path = save_media(
                decode(trainer.vae, latent),
                folder / file_stem(items[i].name),
                trainer.config.clip_fps,
            )
            drawn.append((items[i].name, str(path.relative_to(trainer.out))))
    except (OSError, RuntimeError, ValueError, FloatingPointError) as error:
        failure = f"rank {context.rank}: {error}"
    for names, problem in context.gather((drawn, failure)):
        for name, saved in names:
            log.event("sample", trainer.step, name=name, path=saved)
        if problem is not None:
            _tell_failure(trainer, log, problem)


def _embeddings(trainer: Trainer, prompts: Sequence[str]) -> dict[str, Tensor]:
    """Those of the cache, where training found them: the encoder is loaded for what is damaged there alone.

    Raises OSError or ValueError.
    """
    cache = TextCache(trainer.config.cache_folder / "text", trainer.text)
    try:
        return dict(zip(prompts, cache.get(prompts), strict=True))
    except RuntimeError as error:  # no memory left for an encoder, say
        raise ValueError(str(error)) from error
    finally:
        if isinstance(trainer.text, LazyTextEncoder):
            trainer.text.release()


def _tell_failure(trainer: Trainer, log: RunLog, problem: str) -> None:
    log.event("sample_failed", trainer.step, error=problem)
    log.message(f"sampling at step {trainer.step} failed: {problem}")
