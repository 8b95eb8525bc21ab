"""A run's folder: held against a second run, with its log, its resolved config and its profile."""

from __future__ import annotations

import errno
import fcntl
import os
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch

from goku import config as parser
from goku.data.record import some
from goku.metrics import RunLog
from goku.parallelize import ParallelContext
from goku.run_config import RunConfig
from goku.vae import has_vae
from goku.whole_file import write_whole

__all__ = [
    "check_cache",
    "check_not_foreign",
    "check_own_folders",
    "check_writable",
    "locked",
    "profiler",
    "run_log",
    "write_config",
]

# What a run, a recipe and a VAE's training leave in their folders, but for what counts as notes.
_NAMES = frozenset(
    (
        "cache", "checkpoints", "items.json.gz", "model.safetensors", "profile", "quarantine.jsonl", "recipe.jsonl",
        "samples", "stages", "tensorboard", "train.jsonl", "vae", "vae.jsonl", "validation", "wandb", "wandb_id",
    )
)  # fmt: skip
# What a job's script may have made before: a scheduler wants the folder of its output to be there.
_LOGS = frozenset(("log", "logs"))
# Of `_NAMES`, what no other program would leave.
_MARKS = (
    ".lock", "cache/latents", "cache/text", "checkpoints/latest", "items.json.gz", "recipe.jsonl", "train.jsonl",
    "vae.jsonl",
)  # fmt: skip
# What lies beside a run before it begins: its config and cases, and what a shell or a scheduler writes.
_NOTES = frozenset((".err", ".json", ".log", ".md", ".out", ".sh", ".txt", ".yaml", ".yml"))


def check_writable(folder: Path, field: str = "out") -> None:
    """Raises ValueError where `folder` is none and could not be made, or not written to; makes and changes nothing.

    field: what sets it, for the message.
    """
    there = _nearest(folder, field)
    if not os.access(there, os.W_OK | os.X_OK):
        raise ValueError(
            f"{field} is {folder}: {there} cannot be written to; allowed: a folder that can"
        )


def _nearest(folder: Path, field: str) -> Path:
    """What of `folder` and those above it is there. Raises ValueError where that is none."""
    there = next(path for path in (folder, *folder.absolute().parents) if os.path.lexists(path))
    if not there.is_dir():
        raise ValueError(
            f"{field} is {folder}: {there} is no folder; allowed: a folder, there or not"
        )
    return there


def check_cache(config: RunConfig) -> None:
    """Raises ValueError where the cache is no folder and could not be made. A full one may only be readable."""
    if not config.cache_folder.is_dir():
        check_writable(config.cache_folder, _cache_field(config))


def _cache_field(config: RunConfig) -> str:
    return "data.cache" if config.data.cache else "out"


def check_own_folders(config: RunConfig) -> None:
    """Before any work: raises what `check_writable`, `check_cache` and `check_not_foreign` raise."""
    for field, folder in _written(config):
        check_writable(folder, field)
    check_cache(config)
    check_not_foreign(config)


def check_not_foreign(config: RunConfig) -> None:
    """Raises ValueError where a run would put its files among others': where `out`, or the folder that a VAE is to be
    trained into, holds something and nothing of this program. And where these or the cache are no folders.

    Hidden files, notes such as the run's YAML, and what the config itself names (data, a cache) do not count.
    """
    _nearest(config.cache_folder, _cache_field(config))
    for field, folder in _written(config):
        if _nearest(folder, field) != folder or any((folder / mark).exists() for mark in _MARKS):
            continue
        known = _NAMES | _LOGS | _named_within(config, folder)
        others = sorted(
            path.name
            for path in folder.iterdir()
            if path.name[0] != "." and path.name not in known
            if path.suffix.lower() not in _NOTES or path.is_dir()
        )
        if others:
            raise ValueError(
                f"{field} is {folder}, which holds other things ({some(others)}) and nothing of goku; allowed: a new "
                "or an empty folder, or that of an earlier run"
            )


def _written(config: RunConfig) -> list[tuple[str, Path]]:
    """The folders that a run writes to, each with the field that names it."""
    folders = [("out", Path(config.out))]
    if config.vae.train is not None and not has_vae(config.vae.path):
        folders.append(("vae.path", Path(config.vae.path)))
    return folders


def _named_within(config: RunConfig, folder: Path) -> set[str]:
    """What lies in `folder` and is named in the config, or holds something that is."""
    data, top = config.data, folder.resolve()
    sources = [source.path for source in (data.sources or {}).values()]
    paths = [data.path, data.cache, config.unseen, config.vae.path, config.text.path, *sources]
    inner = [Path(path).resolve() for path in paths if path is not None]
    return {path.relative_to(top).parts[0] for path in inner if top in path.parents}


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Holds `folder` (made if need be) against a second run; the lock ends with the process, however that ends.

    Raises ValueError when another run holds it. Where the file system has no locks, as Lustre mounted without `flock`
    has none, that is said and nothing is held.
    """
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder / ".lock", os.O_CREAT | os.O_RDWR)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(
                f"out is {folder}, which another run is writing to; allowed: one run a folder"
            ) from error
        except OSError as error:
            if error.errno not in (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP):
                raise
            warnings.warn(
                f"out is {folder}, where files cannot be locked ({error.strerror}): a second run in it at the same "
                "time would not be refused",
                stacklevel=2,
            )
        yield
    finally:
        os.close(descriptor)


@contextmanager
def run_log(config: RunConfig, context: ParallelContext) -> Iterator[RunLog]:
    """The log of the run in config.out, whose folder is held for it alone; on all ranks but the main one a silent one.

    Raises ValueError on every rank when another run holds the folder, ImportError when TensorBoard is asked for and
    absent.
    """
    out, train = Path(config.out), config.train
    opened: list[RunLog] = []
    with ExitStack() as stack:

        def enter() -> None:
            tensorboard = out / "tensorboard" if train.tensorboard else None
            stack.enter_context(locked(out))
            opened.append(
                RunLog(out / "train.jsonl", total_steps=train.steps, tensorboard=tensorboard)
            )
            stack.callback(opened[0].close)

        context.on_main(enter)
        yield opened[0] if opened else RunLog(None, total_steps=0)


def write_config(target: Path, config: Any) -> None:
    """Write a dataclass or a nested mapping as YAML, whole or not at all."""
    write_whole(target, parser.dump(config).encode(), durable=True)


@contextmanager
def profiler(folder: Path, enabled: bool) -> Iterator[torch.profiler.profile | None]:
    """torch.profiler over steps 3 to 5 of this process (warm by then), as a Chrome trace in `folder`."""
    if not enabled:
        yield None
        return
    folder.mkdir(parents=True, exist_ok=True)
    with torch.profiler.profile(
        schedule=torch.profiler.schedule(wait=1, warmup=1, active=3, repeat=1),
        on_trace_ready=lambda p: p.export_chrome_trace(str(folder / "trace.json")),
        record_shapes=True,
    ) as profile:
        yield profile
