"""`goku cache`: text embeddings and latents made ahead of training, by as many processes as there are.

What is made is what `goku train` would make, in the same cache and under the same names: the content of
the media, the encoder and its dtype, the geometry, the prompt. So an interrupted run is run again and
goes on, ranks may come and go, and training after it encodes nothing.
"""

from __future__ import annotations

import threading
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch.distributed as dist

from goku.data import DataConfig, DataError, PrepareReport, Problem, prepare
from goku.data.listings import Listings
from goku.data.record import counted
from goku.data.sources import sources_of
from goku.metrics import RunLog
from goku.parallelize import ParallelContext
from goku.prepare import mended_message, unseen_data
from goku.run_config import RunConfig
from goku.text import TextCache, TextEncoder
from goku.vae import VideoVAE
from goku.validation import read_validation

__all__ = ["CacheSummary", "Told", "cache_latents", "cache_text"]

# Seconds between two looks at what the other ranks have done.
_EVERY = 1.0

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
    config: RunConfig,
    context: ParallelContext,
    text: TextEncoder,
    told: Told | None = None,
    *,
    stage: str = "",
) -> CacheSummary:
    """Embeddings of every caption of the run's datasets, of its validation's cases and of the empty prompt.

    Rank r takes prompts r, r + world, ... of those that differ. told: what names the items that cannot be used, one for
    all stages of a recipe; None names those of this run. stage: whose items they are, for the bar. Raises DataError,
    once everything good is cached, when the listing has problems and data.skip_bad is false; OSError when the cache
    cannot be written; what `read_validation` and the encoder raise.
    """

    listings = Listings(context.from_main)
    datasets = _datasets(config, listings)

    def work() -> tuple[CacheSummary, list[Problem]]:
        begin = time.monotonic()
        parts = [(data, source) for data in datasets for source in sources_of(data, listings)]
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
        shown.begin(len(prompts))
        for start in range(0, len(share), _WINDOW):
            nbytes += cache.fill(sorted(share[start : start + _WINDOW], key=len))
            shown(min(start + _WINDOW, len(share)), len(share), nbytes)
        seconds = time.monotonic() - begin
        mine = CacheSummary(
            len(share), cache.made, len(share) - cache.made, len(problems), nbytes, seconds
        )
        return mine, problems

    with _Shown(config, context, "captions", stage) as shown:
        mine, problems = context.together(work)
    if problems and not config.data.skip_bad:
        raise DataError(f"{counted(len(problems), 'listed item')} cannot be used", problems)
    (told or Told(context))(problems)
    return _all_ranks(mine if context.is_main else replace(mine, quarantined=0), context)


def cache_latents(
    config: RunConfig,
    context: ParallelContext,
    vae: VideoVAE,
    told: Told | None = None,
    *,
    stage: str = "",
) -> CacheSummary:
    """Latents of every item of the run's datasets, those of single frames included that the run is given.

    Rank r takes items r, r + world, ... of each source. told, stage: as in `cache_text`. Raises what
    `goku.data.prepare` raises, once everything good is cached.
    """
    frames = config.conditioning.frames if config.model.condition == "frames" else ()
    total, told = CacheSummary(), told or Told(context)
    listings = Listings(context.from_main)
    for data in _datasets(config, listings):
        begin = time.monotonic()
        with _Shown(config, context, "latents", stage) as shown:

            def work(data: DataConfig = data, shown: _Shown = shown) -> PrepareReport:
                dataset = prepare(
                    data,
                    vae,
                    None,
                    cache_dir=config.cache_folder,
                    rank=context.rank,
                    world=context.world,
                    gather=context.gather,
                    listings=listings,
                    progress=shown,
                    listed=shown.begin,
                    frames=frames,
                    texts=False,
                    may_be_empty=data is not config.data,  # what is held out
                )
                return dataset.report

            report = context.together(work)
        told([replace(p, source=_source(config, data, p.source)) for p in report.problems])
        told.mended(mended_message(report))
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


def _datasets(config: RunConfig, listings: Listings) -> list[DataConfig]:
    """The training data, and the held-out dataset when there is one, on every rank."""
    held_out = unseen_data(config, listings)
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
        self._print("\n".join(lines))

    def mended(self, line: str) -> None:
        """Says what of the cache was damaged; nothing where `line` is empty."""
        if line and self._context.is_main:
            self._print(f"latents: {line}")

    @staticmethod
    def _print(text: str) -> None:
        console = RunLog(None, total_steps=0).console
        console.print(text, highlight=False, markup=False, soft_wrap=True)


def _line(problem: Problem) -> str:
    if not problem.source:
        return str(problem)
    # Only where a stage has several sources do the names begin with them.
    return f"{problem.source}: {str(problem).removeprefix(f'{problem.source}:')}"


class _Shown:
    """The items that all ranks together have done, on the main rank: as a bar on a terminal, else a line now and
    then; WHAT.jsonl in the cache's folder keeps what was done.

    The other ranks add what they have done to counters in the process group's store, which a thread of the main rank
    looks at while it works and while it waits for them: nobody waits for anybody because of it. All ranks enter
    together, and leave when all have done their work.
    """

    def __init__(self, config: RunConfig, context: ParallelContext, what: str, stage: str) -> None:
        self._file, self._what = config.cache_folder / f"{what}.jsonl", what
        self._main = context.is_main
        self._label = what if context.world == 1 else f"{what} of {context.world} ranks"
        if stage:
            self._label = f"{stage}: {self._label}"
        self._store: dist.Store | None = None
        if context.host_group is not None:
            name = context.from_main(lambda: uuid.uuid4().hex)  # of this work alone
            store = context.host_group.get_group_store()
            self._store = dist.PrefixStore(f"goku/cache/{name}", store)
        self._log: RunLog | None = None
        self._total = 0
        self._mine = self._others = self._told = self._drawn = (0, 0)  # items, bytes
        self._sized = False
        self._last = self._begin = time.monotonic()
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> _Shown:
        return self

    def begin(self, total: int) -> None:
        """Say, once it is known, how many items all ranks have together."""
        self._total, self._begin = total, time.monotonic()
        if self._main and total:
            self._log = RunLog(self._file, total_steps=total, what=self._label)
            if self._store is not None:
                self._thread = threading.Thread(target=self._watch, daemon=True)
                self._thread.start()

    def __call__(self, done: int, share: int, nbytes: int | None = None) -> None:
        """Say that this rank has done so many items of its share, whose files have nbytes."""
        self._sized = nbytes is not None
        self._mine = (done, nbytes or 0)
        if self._main:
            if self._store is None:
                self._draw()
        elif done == share or time.monotonic() - self._last >= _EVERY:
            self._last = time.monotonic()
            self._add(*(new - old for new, old in zip(self._mine, self._told, strict=True)))
            self._told = self._mine

    def __exit__(self, *_: object) -> None:
        if self._thread is not None:
            self._ended.set()
            self._thread.join()
        if self._log is not None:
            self._draw()
            done, nbytes = self._drawn
            seconds = time.monotonic() - self._begin
            self._log.event(
                "cache", done, what=self._what, total=self._total, bytes=nbytes, seconds=seconds
            )
            self._log.close()

    def _watch(self) -> None:
        while not self._ended.wait(_EVERY):
            self._draw()

    def _draw(self) -> None:
        others = self._add(0, 0)
        now = (self._mine[0] + others[0], self._mine[1] + others[1])
        if now == self._drawn or self._log is None:
            return
        self._drawn = now
        done, nbytes = now
        seconds = time.monotonic() - self._begin
        self._log.progress(done, _rate(done, nbytes if self._sized else None, seconds))

    def _add(self, items: int, nbytes: int) -> tuple[int, int]:
        """Add to the counters of the ranks but the main one; what they are then."""
        if self._store is None:
            return self._others
        try:
            self._others = self._store.add("items", items), self._store.add("bytes", nbytes)
            return self._others
        except dist.DistError:  # the process that holds it is gone, which ends the work; not here
            self._store = None
            return self._others


def _rate(done: int, nbytes: int | None, seconds: float) -> str:
    text = f"{done / max(seconds, 1e-9):.1f} items/s"
    if nbytes is not None:
        text += f", {nbytes / 1e6 / max(seconds, 1e-9):.2f} MB/s"
    return text
