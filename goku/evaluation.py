"""What a run shows of itself while it trains: its loss on fixed samples, and pictures and clips of its captions."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from goku.batch import BatchBuilder
from goku.media_files import file_stem
from goku.metrics import RunLog
from goku.packing import partition
from goku.sampler import Request, SampleConfig, decode, integrate_all, save_media
from goku.statistics import StepStatistics

if TYPE_CHECKING:
    from goku.trainer import Trainer

__all__ = ["evaluate", "sample"]


@torch.no_grad()
def evaluate(trainer: Trainer, log: RunLog) -> None:
    """Loss of the averaged weights on fixed (sample, noise, t): training items, and unseen ones where given."""
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
    count = min(train.eval_items, len(builder.tokens))
    times = [(k + 0.5) / train.eval_times for k in range(train.eval_times)]
    cases = [(i, t) for i in range(count) for t in times]
    lengths = [builder.tokens[i] for i, _ in cases]
    weight_sum = math.fsum(builder.dataset.items[i].weight for i, _ in cases)
    costs = trainer.costs(lengths)
    statistics = StepStatistics(trainer.device)
    shares = partition(lengths, costs, trainer.context.packs, packing.tokens_per_pack)
    for pack, idle in trainer._rounds(shares, lengths):
        batch = builder.fixed([cases[k][0] for k in pack], [cases[k][1] for k in pack])
        per_sample = trainer.per_sample_loss(trainer.ema.module, batch)
        if not idle:
            statistics.add(batch, per_sample, weight_sum)
    trainer.context.all_sum(statistics.vector)
    return statistics


def sample(trainer: Trainer, log: RunLog) -> None:
    """Draw the first training captions with fixed seeds into out/samples/step_N; each group draws its share.

    All processes integrate together, since sharded weights are gathered together: what fails there ends the run,
    unless it is alone. Decoding and writing are each group's own, and a rank that fails there says so and goes on.
    """
    train = trainer.config.train
    items = trainer.builder.dataset.items[: train.sample_captions] if train.sample_every else []
    requests = [
        Request(item.caption, item.height, item.width, item.frames, seed=i)
        for i, item in enumerate(items)
    ]
    settings = SampleConfig(
        steps=train.sample_steps,
        shift=trainer.config.flow.shift,
        tokens_per_pack=trainer.config.packing.tokens_per_pack,
        precision=trainer.dtype,
    )
    folder = trainer.out / "samples" / f"step_{trainer.step:07d}"
    drawn: list[tuple[str, str]] = []
    failure: str | None = None
    context = trainer.context

    def integrate() -> dict[int, Tensor]:
        return integrate_all(
            trainer.ema.module, trainer.vae, trainer.text.encode, requests, settings, trainer.device,
            share=(context.pack_rank, context.packs), sharding=trainer.sharding,
        )  # fmt: skip

    latents = integrate() if context.world > 1 else {}
    try:
        if context.world == 1:
            latents = integrate()
        for i, latent in sorted(latents.items()) if context.leads_pack else []:
            path = save_media(decode(trainer.vae, latent), folder / file_stem(items[i].name))
            drawn.append((items[i].name, str(path.relative_to(trainer.out))))
    except (OSError, RuntimeError, ValueError) as error:
        failure = f"rank {context.rank}: {error}"
    for names, problem in context.gather((drawn, failure)):
        for name, saved in names:
            log.event("sample", trainer.step, name=name, path=saved)
        if problem is not None:
            log.event("sample_failed", trainer.step, error=problem)
            log.message(f"sampling at step {trainer.step} failed: {problem}")
