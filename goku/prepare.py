"""What must exist before the first training step: a VAE, text embeddings, cached latents."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from goku.data import (
    DataConfig,
    DataError,
    Dataset,
    ItemList,
    MixConfig,
    PrepareReport,
    Problem,
    Quarantine,
    SourceConfig,
    list_records,
    prepare,
    quarantine_message,
)
from goku.data.filler import FROM_CACHE, MENDED
from goku.data.item_list import LEFT_OUT
from goku.data.listings import Listings, Scans
from goku.data.manifest import scan
from goku.data.record import counted, some
from goku.data.sources import Scanner, check_listing, sources_of
from goku.media_log import check_places
from goku.metrics import RunLog, progress_bar
from goku.parallelize import ParallelContext
from goku.run_checkpoints import has_checkpoints
from goku.run_config import RunConfig
from goku.text import LazyTextEncoder, TextCache, TextEncoder, load_text_encoder
from goku.vae import GokuVAE, VideoVAE, has_vae, load_vae, train_vae
from goku.vae_items import decode_vae_items
from goku.validation import Validator, read_validation
from goku_runtime import checkpoint

__all__ = [
    "check_listed",
    "check_sources",
    "check_validation",
    "dataset_fields",
    "mended_message",
    "prepare_datasets",
    "prepare_text",
    "prepare_vae",
    "prepare_validator",
    "unseen_data",
]


def prepare_vae(
    config: RunConfig, context: ParallelContext, runs: Sequence[RunConfig] = ()
) -> VideoVAE:
    """Load the VAE at config.vae.path; when there is none and `vae.train` is given, train one on the data first.

    runs: those that the VAE is for where config only covers their data; a new one is trained on what they take
    (`goku.vae_items.decode_vae_items`).

    Training runs on the main rank and the others wait; what fails there is raised everywhere. Raises ValueError when
    the folder is absent without `vae.train`, or its number of latent channels is not that of `vae.model` (of an
    existing VAE nothing else matters to the run); FloatingPointError when the training diverges.
    """
    path = Path(config.vae.path)
    absent = not has_vae(path)
    if absent and config.vae.train is None:
        raise ValueError(
            f"vae.path is {path}, which holds no VAE; allowed: a VAE's folder, or give vae.train to train one"
        )
    if absent:
        context.on_main(lambda: _train(config, runs or (config,), context, path))
    try:
        vae = load_vae(path, dtype=config.vae.dtype)
    except ValueError as error:
        raise ValueError(f"vae.path: {error}") from error
    if vae.channels != config.vae.model.channels:
        raise ValueError(
            f"vae.path {path} holds a VAE with {vae.channels} latent channels, but vae.model.channels is "
            f"{config.vae.model.channels}; they must be equal"
        )
    return vae.to(context.device).eval().requires_grad_(False)


def _train(
    config: RunConfig, runs: Sequence[RunConfig], context: ParallelContext, path: Path
) -> None:
    assert config.vae.train is not None
    _check_text(config, load_text_encoder(config.text))
    # What training would refuse is better refused before minutes of work.
    clips = decode_vae_items(config, runs)
    vae = GokuVAE(config.vae.model, seed=config.seed).to(context.device)
    log = RunLog(Path(config.out) / "vae.jsonl", total_steps=config.vae.train.steps, what="VAE")

    def on_step(fields: dict[str, Any]) -> None:
        step = int(fields.pop("step"))
        log.event("vae_step", step, **fields)
        log.progress(step, f"loss {fields['loss']:.4f}  reconstruction {fields['psnr']:.1f} dB")

    log.message(
        f"training the VAE on {counted(len(clips), 'item')}: {counted(config.vae.train.steps, 'step')}, "
        f"kept in {path}"
    )
    try:
        train_vae(vae, clips, config.vae.train, seed=config.seed, log=on_step)
    except SystemExit:
        log.message(
            "stopped while the VAE was trained: nothing of it is kept, run again to start it over"
        )
        raise
    finally:
        log.close()
    vae.save(path)


def prepare_text(config: RunConfig, context: ParallelContext) -> LazyTextEncoder:
    """The text encoder of config.text. Raises ValueError when its width is not config.model.text_dim."""

    def load() -> LazyTextEncoder:
        # Its weights are read when a prompt is in no cache: not at all at a warm start.
        known = config.cache_folder / "text" / "encoders"
        text = LazyTextEncoder(config.text, device=context.device, directory=known)
        _check_text(config, text)
        return text

    return context.together(load)


def prepare_datasets(
    config: RunConfig,
    context: ParallelContext,
    vae: VideoVAE,
    text: TextEncoder | None = None,
    quarantine: Quarantine | None = None,
    items: ItemList | None = None,
    listings: Listings | None = None,
) -> tuple[Dataset, Dataset | None, TextEncoder]:
    """Encode what is not cached yet, shared over the ranks; returns (training, unseen or None, text encoder).

    text: an encoder that was loaded before; None loads that of config.text. quarantine: where items that cannot be used
    are listed, by default config.out/quarantine.jsonl. items: those of the run whose stream of samples this one carries
    on, which it is to have as well. listings: what was listed since this start began; the main rank lists the rest.

    A run that goes on gets the items that it began with, as far as config.out lists them (`goku.data.ItemList`). Of
    unseen items that the limits leave none of, it is said so. Raises what `goku.data.prepare` raises, on all ranks, and
    ValueError when the ranks would train on different items.
    """
    if text is None:
        text = prepare_text(config, context)
    _check_text(config, text)
    cache = config.cache_folder
    texts = TextCache(cache / "text", text)
    frames = config.conditioning.frames if config.model.condition == "frames" else ()
    if quarantine is None:
        quarantine = Quarantine(Path(config.out) / "quarantine.jsonl")
    listed = listings or Listings(context.from_main)
    unseen, held_out = None, unseen_data(config, listed)

    def prepared(data: DataConfig, source: str, items: ItemList | None) -> Dataset:
        return _prepare(data, vae, texts, cache, context, frames, source, quarantine, items, listed)

    training = prepared(config.data, "", _items_of_run(config, context) or items)
    if held_out is not None:
        unseen = prepared(held_out, "unseen", None)
    if unseen is None or not unseen.items:
        if config.unseen is not None and context.is_main:
            _say(
                f"unseen: nothing of {config.unseen} is left by the mix and the limits: no unseen loss"
            )
        unseen = None
    if isinstance(text, LazyTextEncoder):
        text.release()
    return training, unseen, text


def check_validation(configs: Sequence[RunConfig], context: ParallelContext) -> None:
    """Reads what the validations and the logs of these runs need and shows whether it can be used, before hours of
    other work.

    Raises what `read_validation` and `goku.media_log.check_places` raise, on every process when it fails on one.
    """

    def look() -> None:
        for config in configs:
            read_validation(config)

    context.together(look)
    places = {p: None for c in configs if c.validation.every for p in c.validation.media}
    numbers = any(config.train.tensorboard for config in configs)
    context.on_main(lambda: check_places(tuple(places), numbers=numbers))


@contextmanager
def dataset_fields(config: RunConfig) -> Iterator[None]:
    """Within it a DataError of one of the run's datasets says in front which field names that: the data section itself
    may be another one's, or a command's own."""
    try:
        yield
    except DataError as error:
        paths = {"data.path": config.data.path, "unseen": config.unseen}
        sources = config.data.sources or {}
        paths |= {f"sources.{name}.path": source.path for name, source in sources.items()}
        for field, path in paths.items():
            if path is not None and error.summary.startswith(
                (f"{path}: ", f"{Path(path).expanduser().absolute()}: ")
            ):
                raise DataError(f"{field}: {error.summary}", error.problems) from error
        raise


def check_listed(config: RunConfig, context: ParallelContext, listings: Listings) -> None:
    """Lists the datasets of a run, before minutes of work on a VAE, and of one that has begun what is held out alone.

    listings: keeps what was found. Raises DataError, on every process, where one is not there or cannot be listed.
    """

    def look() -> None:
        with dataset_fields(config):
            if not has_checkpoints(Path(config.out)):
                sources_of(config.data, listings.alone)
            held_out = unseen_data(config, listings.alone)
            if held_out is not None:
                sources_of(held_out, listings.alone)

    context.on_main(look)


def check_sources(
    configs: Sequence[RunConfig],
    context: ParallelContext,
    carried: Sequence[RunConfig] = (),
    listings: Listings | None = None,
) -> None:
    """Lists the datasets of these runs, held-out ones too, before hours of other work; decodes nothing.

    carried: those of them that go on in the stream of another run. Theirs and those of runs that have begun are not
    listed, but for held-out ones: the list of items of whoever began the stream decides, whatever has come since.
    listings: keeps what was found.

    Raises what `goku.data.sources.check_listing` raises, on every process.
    """
    scans = Scans() if listings is None else listings.alone

    def look() -> None:
        for config in configs:
            with dataset_fields(config):
                if not has_checkpoints(Path(config.out)) and config not in carried:
                    check_listing(config.data, scans)
                held_out = unseen_data(config, scans)
                if held_out is not None:
                    list_records(held_out, scans)

    context.on_main(look)


def prepare_validator(
    config: RunConfig, context: ParallelContext, vae: VideoVAE, text: TextEncoder
) -> Validator | None:
    """What draws the cases of config.validation; None where nothing is to be drawn. Raises what `Validator` raises."""
    if config.validation.file is None or not config.validation.every:
        return None
    validator = Validator(config.validation, config, context, vae, text)
    if isinstance(text, LazyTextEncoder):
        text.release()
    return validator


def unseen_data(config: RunConfig, scanner: Scanner = scan) -> DataConfig | None:
    """The held-out dataset as the run's mix would take it: without the modalities that no source of it gives weight;
    None where there is none, or nothing is left of it. Raises what `list_records` raises."""
    if config.unseen is None:
        return None
    alone = replace(config.data, path=config.unseen, sources=None, mix=None)
    if config.data.mix is None:
        return alone
    held = {record.is_image for record in list_records(alone, scanner)}
    weights = MixConfig(
        image=float(True in held and any(w.image for w in config.data.mix.values())),
        video=float(False in held and any(w.video for w in config.data.mix.values())),
    )
    if not (weights.image or weights.video):
        return None
    sources = {"unseen": SourceConfig(path=config.unseen)}
    return replace(alone, path=None, sources=sources, mix={"unseen": weights})


def _check_text(config: RunConfig, text: TextEncoder) -> None:
    if text.dim != config.model.text_dim:
        raise ValueError(
            f"model.text_dim is {config.model.text_dim}, but the text encoder's embeddings are "
            f"{text.dim} wide; they must be equal"
        )


def _items_of_run(config: RunConfig, context: ParallelContext) -> ItemList | None:
    """What the run in config.out began with, if it has checkpoints and its list is theirs."""

    def look() -> str | None:
        # Not `find_checkpoint`, which removes what a crash left: another run may hold the folder.
        root = Path(config.out) / "checkpoints"
        for path in sorted(root.glob("step_*"), reverse=True):
            try:
                run = checkpoint.read_values(path)["run"]
                return str(run["fingerprints"]["data"])
            except (ValueError, KeyError, TypeError, OSError):
                continue  # the trainer says what is wrong with it
        return None

    def kept() -> ItemList | None:
        wanted = look()
        return None if wanted is None else ItemList.of_run(Path(config.out), wanted)

    return context.from_main(kept)


@torch.no_grad()
def _prepare(
    data: DataConfig,
    vae: VideoVAE,
    texts: TextCache,
    cache: Path,
    context: ParallelContext,
    frames: Sequence[int],
    source: str,
    quarantine: Quarantine,
    items: ItemList | None,
    listings: Listings,
) -> Dataset:
    """source: "" for the training data, "unseen", which may be empty."""
    label = f"{source} latents".lstrip()
    console = RunLog(None, total_steps=0).console
    with progress_bar(console) as bar:
        task = bar.add_task(label, total=None, info="", visible=context.is_main)
        others = bar.add_task(f"{label} of the other ranks", total=None, info="", visible=False)

        def on_item(done: int, total: int) -> None:
            bar.update(task, completed=done, total=total)

        def on_check(done: int, total: int) -> None:
            bar.update(others, completed=done, total=total, visible=context.is_main)

        dataset = context.together(
            lambda: prepare(
                data,
                vae,
                texts,
                cache_dir=cache,
                rank=context.rank,
                world=context.world,
                gather=context.gather,
                listings=listings,
                progress=on_item,
                checking=on_check,
                frames=frames,
                items=items,
                may_be_empty=source == "unseen",
            )
        )
    _check_equal(dataset, context)
    report = dataset.report
    problems = [replace(problem, source=source or problem.source) for problem in report.problems]
    context.on_main(lambda: _set_aside(problems, quarantine))
    if context.is_main:
        cached = [r.name for r in report.remarks if r.text.endswith(FROM_CACHE)]
        new = [d.name for d in report.dropped if d.reason == LEFT_OUT]
        lost = [str(problem) for problem in dataset.lost.values()]
        for line in (
            quarantine_message(problems, report.listed, quarantine.path),
            cached and f"{len(cached)} with unusable media {FROM_CACHE}: {some(cached)}",
            mended_message(report),
            new and f"{len(new)} left out, which the run did not begin with: {some(new)}",
            lost
            and f"{len(lost)} of {counted(len(dataset), 'item')} lost, in the run's steps with weight 0: {some(lost)}",
        ):
            if line:
                _say(f"{label}: {line}")
    return dataset


def mended_message(report: PrepareReport) -> str:
    """In words, which cached latents were damaged and made anew; "" where none was."""
    mended = [remark.name for remark in report.remarks if remark.text == MENDED]
    return f"{len(mended)} damaged in the cache, made anew: {some(mended)}" if mended else ""


def _check_equal(dataset: Dataset, context: ParallelContext) -> None:
    """Ranks with different items would take different steps and wait for each other for ever."""
    found = context.gather(dataset.fingerprint())
    others = [str(rank) for rank, each in enumerate(found) if each != found[0]]
    if others:
        raise ValueError(
            f"rank {', '.join(others)}: the items differ from those of rank 0; allowed: one dataset and one cache that "
            "all ranks see alike"
        )


def _set_aside(problems: Sequence[Problem], quarantine: Quarantine) -> None:
    quarantine.add(problems)


def _say(line: str) -> None:
    console = RunLog(None, total_steps=0).console
    console.print(line, highlight=False, markup=False, soft_wrap=True)
