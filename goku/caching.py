"""`goku cache`: text embeddings and latents made ahead of training, by as many processes as there are.

What is made is what `goku train` would make, in the same cache and under the same names: the content of
the media, the encoder and its dtype, the geometry, the prompt. So an interrupted run is run again and
goes on, ranks may come and go, and training after it encodes nothing.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

from goku.data import DataConfig, DataError, PrepareReport, Problem, prepare
from goku.data.record import counted
from goku.data.sources import sources_of
from goku.metrics import RunLog
from goku.parallelize import ParallelContext
from goku.prepare import unseen_data
from goku.run_config import RunConfig
from goku.text import TextCache, TextEncoder
from goku.vae import VideoVAE
from goku.validation import read_validation

__all__ = ["CacheSummary", "Told", "cache_latents", "cache_text"]

# Prompts between two looks at the progress; those of similar length are encoded together.
_WINDOW = 256


@dataclass(frozen=True)
class CacheSummary:
    """What caching did, all ranks together.

    items: distinct prompts, or items whose latents are there; made: files of this call; present: files
    that were there and whole; quarantined: items of the dataset that cannot be used; bytes: of all those
    files; seconds: of the slowest rank.
    """

    items: int = 0
    made: int = 0
    present: int = 0
    quarantined: int = 0
    bytes: int = 0
    seconds: float = 0.0

    def __add__(self, other: CacheSummary) -> CacheSummary:
        return CacheSummary(*(getattr(self, f) + getattr(other, f) for f in self.__match_args__))


def cache_text(
    config: RunConfig, context: ParallelContext, text: TextEncoder, told: Told | None = None
) -> CacheSummary:
    """Embeddings of every caption of the run's datasets, of its validation's cases and of the empty prompt.

    Rank r takes prompts r, r + world, ... of those that differ. told: what names the items that cannot be used, one for
    all stages of a recipe; None names those of this run. Raises DataError, once everything good
    is cached, when the listing has problems and data.skip_bad is false; OSError when the cache cannot be
    written; what `read_validation` and the encoder raise.
    """

    def work() -> tuple[CacheSummary, list[Problem]]:
        begin = time.monotonic()
        parts = [(data, source) for data in _datasets(config) for source in sources_of(data)]
        problems = [
            replace(each, name=part.prefix + each.name, source=_source(config, data, part.name))
            for data, part in parts
            for each in part.problems
        ]
        prompts = {"": None} | {
            prompt: None
            for _, part in parts
            for record in part.records
            for prompt in record.prompts
        }
        prompts |= dict.fromkeys(read_validation(config).prompts)
        share = list(prompts)[context.rank :: context.world]
        cache = TextCache(config.cache_folder / "text", text)
        nbytes = 0
        with _shown(config, context, "captions") as show:
            for start in range(0, len(share), _WINDOW):
                nbytes += cache.fill(sorted(share[start : start + _WINDOW], key=len))
                show(min(start + _WINDOW, len(share)), len(share), nbytes)
        seconds = time.monotonic() - begin
        mine = CacheSummary(
            len(share), cache.made, len(share) - cache.made, len(problems), nbytes, seconds
        )
        return mine, problems

    mine, problems = context.together(work)
    if problems and not config.data.skip_bad:
        raise DataError(f"{counted(len(problems), 'listed item')} cannot be used", problems)
    (told or Told(context))(problems)
    return _all_ranks(mine if context.is_main else replace(mine, quarantined=0), context)


def cache_latents(
    config: RunConfig, context: ParallelContext, vae: VideoVAE, told: Told | None = None
) -> CacheSummary:
    """Latents of every item of the run's datasets, those of single frames included that the run is given.

    Rank r takes items r, r + world, ... of each source. told: as in `cache_text`. Raises what `goku.data.prepare`
    raises, once everything good is cached.
    """
    frames = config.conditioning.frames if config.model.condition == "frames" else ()
    total, told = CacheSummary(), told or Told(context)
    for data in _datasets(config):
        begin = time.monotonic()
        with _shown(config, context, "latents") as show:

            def work(data: DataConfig = data, show: _Show = show) -> PrepareReport:
                dataset = prepare(
                    data,
                    vae,
                    None,
                    cache_dir=config.cache_folder,
                    rank=context.rank,
                    world=context.world,
                    gather=context.gather,
                    progress=show,
                    frames=frames,
                    texts=False,
                    may_be_empty=data is not config.data,  # what is held out
                )
                return dataset.report

            report = context.together(work)
        told([replace(p, source=_source(config, data, p.source)) for p in report.problems])
        seconds = time.monotonic() - begin
        mine = CacheSummary(
            report.used, report.made, report.present, len(report.problems), report.nbytes, seconds
        )
        # Every rank's report counts the whole dataset's items, but only its own files.
        total += _all_ranks(
            mine if context.is_main else replace(mine, items=0, quarantined=0), context
        )
    return total


def _all_ranks(mine: CacheSummary, context: ParallelContext) -> CacheSummary:
    """The sum over the ranks, the seconds of the slowest."""
    ranks: list[CacheSummary] = context.gather(mine)
    slowest = max(each.seconds for each in ranks)
    return replace(sum(ranks, CacheSummary()), seconds=slowest)


def _datasets(config: RunConfig) -> list[DataConfig]:
    """The training data, and the held-out dataset when there is one."""
    held_out = unseen_data(config)
    return [config.data] if held_out is None else [config.data, held_out]


def _source(config: RunConfig, data: DataConfig, name: str) -> str:
    """What a source of `data` is called: as in the config, and "unseen" what is held out."""
    return name if data is config.data else "unseen"


class Told:
    """Says on the main rank what was left out, each item and reason once however many stages have it: the first ten
    lines of a call. `goku train` keeps all in quarantine.jsonl."""

    def __init__(self, context: ParallelContext) -> None:
        self._context = context
        self._said: set[str] = set()

    def __call__(self, problems: Sequence[Problem]) -> None:
        new = [line for line in dict.fromkeys(map(_line, problems)) if line not in self._said]
        self._said.update(new)
        if not new or not self._context.is_main:
            return
        lines = [
            f"{counted(len(new), 'item')} cannot be used:",
            *(f"  {line}" for line in new[:10]),
        ]
        lines += [f"  ... and {len(new) - 10:,} more"] if len(new) > 10 else []
        console = RunLog(None, total_steps=0).console
        console.print("\n".join(lines), highlight=False, markup=False, soft_wrap=True)


def _line(problem: Problem) -> str:
    if not problem.source:
        return str(problem)
    # Only where a stage has several sources do the names begin with them.
    return f"{problem.source}: {str(problem).removeprefix(f'{problem.source}:')}"


_Show = Callable[..., None]


@contextmanager
def _shown(config: RunConfig, context: ParallelContext, what: str) -> Iterator[_Show]:
    """show(done, total, nbytes=None): the main rank's share, as a bar on a terminal, else a line now and
    then; WHAT.jsonl in the cache's folder keeps what was done."""
    begin = time.monotonic()
    label = what if context.world == 1 else f"{what} (rank 0 of {context.world})"
    log: RunLog | None = None
    last = (0, 0, 0)

    def show(done: int, total: int, nbytes: int | None = None) -> None:
        nonlocal log, last
        if not context.is_main:
            return
        if log is None:
            log = RunLog(config.cache_folder / f"{what}.jsonl", total_steps=total, what=label)
        last = (done, total, nbytes or 0)
        log.progress(done, _rate(done, total, nbytes, time.monotonic() - begin))

    try:
        yield show
    finally:
        if log is not None:
            done, total, nbytes = last
            seconds = time.monotonic() - begin
            log.event("cache", done, what=what, total=total, bytes=nbytes, seconds=seconds)
            log.close()


def _rate(done: int, total: int, nbytes: int | None, seconds: float) -> str:
    rate = done / max(seconds, 1e-9)
    text = f"{rate:.1f} items/s"
    if nbytes is not None:
        text += f", {nbytes / 1e6 / max(seconds, 1e-9):.2f} MB/s"
    return text + (f", {(total - done) / rate:.0f} s left" if done < total and rate > 0 else "")
