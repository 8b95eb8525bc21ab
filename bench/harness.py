"""Rows: what every benchmark leaves behind, and where a row comes from.

A row says what was measured (shape, dtype, peer, median, p20, p80, share of a ceiling measured in
the same process) and on what (commit, SHA-256 of the measured sources, hardware, versions), so that
a report can mark it stale once those sources change. Rows are lines of JSON in one folder of
results, one file per benchmark. `bench.timing` measures, `bench.cases` decides what.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import os
import platform
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from bench.timing import Ceiling, Timing
from goku.whole_file import write_whole

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results"
SCHEMA = 2
DIRTY = "+dirty"  # at the end of GOKU_COMMIT
STATUSES = ("measured", "absent", "wrong", "failed")
# JSON: the launch configurations are a part of what was measured.
_SOURCE_SUFFIXES = (".py", ".cu", ".cuh", ".cpp", ".h", ".json")


@dataclass(frozen=True)
class Row:
    """One measured case, or why there is no measurement of it.

    Attributes:
        name: operator or component, the stem of the benchmark's file.
        case: what of it, such as "goku-2b" or "goku-2b, cross-attention".
        shape: numbers that decide the work.
        dtype: of the tokens, with the kind of mixing.
        work: FLOPs or bytes of one call.
        ceiling: measured in the same run, in the work's unit per second.
        sources: files or folders measured, relative to the repository.
        timing: of one call, None where `status` is not "measured".
        status: "measured", "absent" (not installed), "wrong" (its result is), "failed" (it raised).
        note: why it is absent, wrong or failed; or what of the operator this peer leaves out.
        peer: whose code it is.
        backend: of ours that ran, "" for others.
        direction: "forward", "backward" or "forward+backward".
        pack: name of the packed batch.
        part: whether the peer does only a part of the operator, so that no ratio is taken to it.
        extra: further numbers, such as peak memory in bytes.
    """

    name: str
    case: str
    shape: Mapping[str, Any]
    dtype: str
    work: float
    ceiling: Ceiling
    sources: Sequence[str]
    timing: Timing | None = None
    status: str = "measured"
    note: str = ""
    peer: str = "eager"
    backend: str = ""
    direction: str = "forward"
    pack: str = ""
    part: bool = False
    extra: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.status not in STATUSES:
            raise ValueError(f"status is {self.status!r}: allowed are {list(STATUSES)}")
        if (self.timing is not None) != (self.status == "measured"):
            raise ValueError(f"status is {self.status!r}: exactly measured rows have a timing")

    @property
    def percent_of_ceiling(self) -> float | None:
        """Achieved rate as a percentage of the ceiling; None where nothing was measured."""
        if self.timing is None:
            return None
        return round(100 * self.work / (self.timing.median_ms * 1e-3) / self.ceiling.value, 2)

    def to_json(self, where: Mapping[str, Any]) -> dict[str, Any]:
        """The row, with `where` it comes from (see `origin`)."""
        timing = asdict(self.timing) if self.timing else dict.fromkeys(_TIMES)
        return {
            "schema": SCHEMA,
            "name": self.name,
            "case": self.case,
            "pack": self.pack,
            "direction": self.direction,
            "peer": self.peer,
            "backend": self.backend,
            "part": self.part,
            "status": self.status,
            "note": self.note,
            "shape": dict(self.shape),
            "dtype": self.dtype,
            **timing,
            "work": self.work,
            "ceiling": asdict(self.ceiling),
            "percent_of_ceiling": self.percent_of_ceiling,
            "extra": dict(self.extra),
            **where,
        }


_TIMES = ("median_ms", "p20_ms", "p80_ms", "repeats")


# ---- where a row comes from ----


def source_files(sources: Iterable[str], root: Path = ROOT) -> list[Path]:
    """The files behind `sources`; a folder stands for all source files below it.

    Raises:
        ValueError: a source that does not exist.
    """
    files: set[Path] = set()
    for source in sources:
        path = root / source
        if path.is_dir():
            files.update(p for p in path.rglob("*") if p.suffix in _SOURCE_SUFFIXES)
        elif path.is_file():
            files.add(path)
        else:
            raise ValueError(f"source is {source!r}: no file or folder of that name in {root}")
    return sorted(files)


def source_hash(sources: Iterable[str], root: Path = ROOT) -> str:
    """SHA-256 over names and contents of all files behind `sources`."""
    digest = hashlib.sha256()
    for path in source_files(sources, root):
        content = path.read_bytes()
        digest.update(f"{path.relative_to(root).as_posix()}\0{len(content)}\0".encode())
        digest.update(content)
    return digest.hexdigest()


def is_stale(row: Mapping[str, Any], root: Path = ROOT) -> bool:
    """Whether the sources that `row` (as read back) measured have changed since, or are gone."""
    if not all((root / source).exists() for source in row["sources"]):
        return True
    return source_hash(row["sources"], root) != row["sources_sha256"]


def origin(sources: Sequence[str], device: torch.device, root: Path = ROOT) -> dict[str, Any]:
    """What a row says of where it comes from; one look at the clocks and the repository."""
    commit, dirty = revision(root)
    return {
        "commit": commit,
        "dirty": dirty,
        "sources": list(sources),
        "sources_sha256": source_hash(sources, root),
        "device_type": device.type,
        "hardware": hardware(device),
        "versions": versions(),
        "measured_at": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def revision(root: Path = ROOT) -> tuple[str, bool]:
    """The commit, and whether tracked files differ from it; ("unknown", True) where nothing says so.

    Where the tree travels without git's history GOKU_COMMIT says both: the commit's name, followed
    by "+dirty" where the files differ from it.
    """
    try:
        commit = _output("git", "-C", str(root), "rev-parse", "HEAD")
        changes = _output("git", "-C", str(root), "status", "--porcelain", "--untracked-files=no")
    except (FileNotFoundError, subprocess.SubprocessError):
        said = os.environ.get("GOKU_COMMIT", "")
        return (said.removesuffix(DIRTY) or "unknown", said.endswith(DIRTY) or not said)
    return commit, bool(changes)


def hardware(device: torch.device) -> dict[str, Any]:
    """Name, memory and clocks of the device."""
    if device.type != "cuda":
        cores = len(os.sched_getaffinity(0))
        return {"device": platform.processor() or platform.machine(), "cores": cores}
    properties = torch.cuda.get_device_properties(device)
    return {
        "device": properties.name,
        "memory_bytes": properties.total_memory,
        "multiprocessors": properties.multi_processor_count,
        "clocks": _clocks(device),
    }


def _clocks(device: torch.device) -> str:
    """SM and memory clock now and the driver's version, as nvidia-smi says them."""
    query = "--query-gpu=clocks.sm,clocks.mem,driver_version"
    index = str(device.index or 0)
    try:
        return _output("nvidia-smi", query, "--format=csv,noheader", "-i", index)
    except (FileNotFoundError, subprocess.SubprocessError):  # absent, failed or too slow
        return "unknown"


def versions() -> dict[str, str]:
    """Versions of Python, torch, CUDA, cuDNN, Triton and its assembler."""
    found = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda or "none",
        "cudnn": _cudnn(),
    }
    try:
        import triton
    except ModuleNotFoundError:
        found["triton"] = "none"
    else:
        found["triton"] = triton.__version__
        # Triton's own assembler or another (TRITON_PTXAS_PATH): it decides what the chip runs.
        found["ptxas"] = triton.knobs.nvidia.ptxas.version
    return found


def _cudnn() -> str:
    try:
        return str(torch.backends.cudnn.version() or "none")
    except RuntimeError:  # one that is older than torch was built with, which cannot be used
        return "unusable"


def _output(*command: str) -> str:
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=20)
    return done.stdout.strip()


# ---- rows on disk ----


def write(rows: Iterable[Row], device: torch.device, folder: Path) -> list[dict[str, Any]]:
    """Append rows to `<folder>/<name>.jsonl`, one file per benchmark; returns them as written.

    The clocks are read once, here: give it the rows of one problem, right after their timing.
    """
    origins: dict[tuple[str, ...], dict[str, Any]] = {}
    written = []
    for row in rows:
        key = tuple(row.sources)
        if key not in origins:
            origins[key] = origin(row.sources, device)
        record = row.to_json(origins[key])
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / f"{row.name}.jsonl").open("a", encoding="utf-8") as file:
            file.write(_line(record))
        written.append(record)
    return written


def read(folder: Path) -> list[dict[str, Any]]:
    """All rows of a results folder: of the files that are named as a benchmark's module.

    Other files there hold something else; those of `bench.compiled` lie in the folder compiled.

    Raises:
        ValueError: a line that is no row of this schema, naming file and line.
    """
    return [record for path in _files(folder) for record in _read(path)]


def _files(folder: Path) -> list[Path]:
    return sorted(p for p in folder.glob("*.jsonl") if p.stem.isidentifier())


def _line(record: Mapping[str, Any]) -> str:
    return json.dumps(record, allow_nan=False) + "\n"


def _read(path: Path) -> list[dict[str, Any]]:
    found = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line:
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}:{number} is no JSON: {error}") from error
        if not isinstance(record, dict) or record.get("schema") != SCHEMA:
            raise ValueError(f"{path}:{number} has not schema {SCHEMA}, which this reads")
        found.append(record)
    return found


def identity(record: Mapping[str, Any]) -> tuple[Any, ...]:
    """What two rows share when the newer one replaces the older: everything but when and how fast."""
    hardware = record["hardware"]["device"]
    keys = ("name", "case", "pack", "direction", "dtype", "peer", "device_type")
    return (hardware, *(record[key] for key in keys))


def newest(records: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The last of the rows of each identity, in the order in which identities first appear.

    That a peer was absent later does not undo what was measured of it.
    """
    latest: dict[tuple[Any, ...], Mapping[str, Any]] = {}
    for record in records:
        known = latest.get(identity(record))
        if known is None or record["status"] != "absent" or known["status"] == "absent":
            latest[identity(record)] = record
    return list(latest.values())


def prune(folder: Path) -> dict[Path, tuple[int, int]]:
    """Rewrite every file of rows with its `newest` alone; returns rows before and after, by file.

    The pages stay as they are: they show no others. A file is replaced whole or not at all, and
    none is touched unless all can be read.

    Raises:
        ValueError: `folder` is none; see `read`.
    """
    if not folder.is_dir():
        raise ValueError(f"results is {str(folder)!r}: allowed is a folder of rows")
    kept: dict[Path, list[Mapping[str, Any]]] = {}
    counts: dict[Path, tuple[int, int]] = {}
    for path in _files(folder):
        records = _read(path)
        kept[path] = newest(records)
        counts[path] = (len(records), len(kept[path]))
    for path, rows in kept.items():
        if counts[path][0] == len(rows):
            continue
        write_whole(path, "".join(_line(row) for row in rows).encode())
    return counts


def describe(record: Mapping[str, Any]) -> str:
    """One printed line of a row."""
    head = " ".join(
        str(record[key]) for key in ("name", "case", "pack", "direction", "dtype") if record[key]
    )
    head = f"{head}: {record['peer']}"
    if record["status"] != "measured":
        return f"{head}: {record['status']}: {record['note']}"
    spread = f"{record['p20_ms']:.3f}..{record['p80_ms']:.3f}"
    extra = "".join(f", {key} {value:,.4g}" for key, value in record["extra"].items()
                    if isinstance(value, int | float))  # fmt: skip
    return (
        f"{head}: {record['median_ms']:.3f} ms ({spread}), "
        f"{record['percent_of_ceiling']:.1f}% of {record['ceiling']['what']}{extra}"
    )
