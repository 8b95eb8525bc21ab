"""What every benchmark shares: timing, the ceiling of the same run, and the rows it leaves behind.

A row says what was measured (shape, dtype, median, p20, p80, share of a ceiling measured in the
same process) and on what (commit, SHA-256 of the measured sources, hardware, versions), so that a
report can mark it stale once those sources change. Rows are lines of JSON in one folder of results.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import os
import platform
import subprocess
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results"
_SOURCE_SUFFIXES = (".py", ".cu", ".cuh", ".cpp", ".h")


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one call, over `repeats` calls."""

    median_ms: float
    p20_ms: float
    p80_ms: float
    repeats: int


@dataclass(frozen=True)
class Ceiling:
    """What the hardware did best in the same run: `value` in `unit` ("FLOP/s" or "byte/s")."""

    what: str
    value: float
    unit: str


@dataclass(frozen=True)
class Row:
    """One measured case.

    Attributes:
        name: operator or component, the stem of the benchmark's file.
        case: what of it, such as "forward+backward".
        shape: numbers that decide the work.
        dtype: of the tokens, with the kind of mixing.
        timing: of the case.
        work: FLOPs or bytes of one call, in the ceiling's unit.
        ceiling: measured in the same run.
        sources: files or folders measured, relative to the repository.
        extra: further numbers, such as peak memory in bytes.
    """

    name: str
    case: str
    shape: Mapping[str, Any]
    dtype: str
    timing: Timing
    work: float
    ceiling: Ceiling
    sources: Sequence[str]
    extra: Mapping[str, Any] = field(default_factory=dict)

    @property
    def percent_of_ceiling(self) -> float:
        """Achieved rate as a percentage of the ceiling."""
        return 100 * self.work / (self.timing.median_ms * 1e-3) / self.ceiling.value

    def to_json(self, device: torch.device, root: Path = ROOT) -> dict[str, Any]:
        """The row with everything that says where it comes from."""
        commit, dirty = revision(root)
        return {
            "schema": 1,
            "name": self.name,
            "case": self.case,
            "shape": dict(self.shape),
            "dtype": self.dtype,
            **asdict(self.timing),
            "work": self.work,
            "ceiling": asdict(self.ceiling),
            "percent_of_ceiling": round(self.percent_of_ceiling, 2),
            "extra": dict(self.extra),
            "commit": commit,
            "dirty": dirty,
            "sources": list(self.sources),
            "sources_sha256": source_hash(self.sources, root),
            "hardware": hardware(device),
            "versions": versions(),
            "measured_at": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        }


# ---- timing ----


def time_calls(
    work: Callable[[], object], device: torch.device, *, seconds: float, warm_up: int = 3
) -> Timing:
    """Time single calls of `work` for about `seconds`, after `warm_up` calls that do not count.

    On CUDA each call lies between two events on the current stream; at least 3 calls are timed.
    """
    for _ in range(warm_up):
        work()
    synchronise(device)
    deadline = time.perf_counter() + seconds
    times: list[float] = []
    while len(times) < 3 or time.perf_counter() < deadline:
        if device.type == "cuda":
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            work()
            end.record()
            end.synchronize()
            times.append(begin.elapsed_time(end))
        else:
            began = time.perf_counter()
            work()
            times.append(1e3 * (time.perf_counter() - began))
    return summary(times)


def summary(times_ms: Sequence[float]) -> Timing:
    """Median, 20th and 80th percentile by nearest rank."""
    ordered = sorted(times_ms)
    last = len(ordered) - 1
    median, p20, p80 = (ordered[round(share * last)] for share in (0.5, 0.2, 0.8))
    return Timing(median, p20, p80, len(ordered))


def synchronise(device: torch.device) -> None:
    """Wait until `device` has done what was asked of it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def matmul_ceiling(
    device: torch.device, dtype: torch.dtype = torch.bfloat16, *, size: int | None = None,
    seconds: float = 1.0,
) -> Ceiling:  # fmt: skip
    """FLOP/s of a large square matrix product of random operands."""
    n = size or (8192 if device.type == "cuda" else 512)
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    timing = time_calls(lambda: a @ b, device, seconds=seconds)
    name = str(dtype).removeprefix("torch.")
    return Ceiling(f"{name} matmul {n}x{n}x{n}", 2 * n**3 / (timing.median_ms * 1e-3), "FLOP/s")


def copy_ceiling(device: torch.device, *, size: int | None = None, seconds: float = 1.0) -> Ceiling:
    """Bytes read and written per second by a copy far larger than the caches."""
    n = size or (2**30 if device.type == "cuda" else 2**26)
    source = torch.randint(256, (n,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    timing = time_calls(lambda: target.copy_(source), device, seconds=seconds)
    return Ceiling(f"copy of {n} bytes", 2 * n / (timing.median_ms * 1e-3), "byte/s")


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


def revision(root: Path = ROOT) -> tuple[str, bool]:
    """The commit, and whether tracked files differ from it; ("unknown", True) without git.

    GOKU_COMMIT names the commit where the tree travels without its history.
    """
    try:
        commit = _output("git", "-C", str(root), "rev-parse", "HEAD")
        changes = _output("git", "-C", str(root), "status", "--porcelain", "--untracked-files=no")
    except (FileNotFoundError, subprocess.CalledProcessError):
        return os.environ.get("GOKU_COMMIT", "unknown"), True
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
    except (FileNotFoundError, subprocess.CalledProcessError):
        return "unknown"


def versions() -> dict[str, str]:
    """Versions of Python, torch, CUDA and Triton."""
    found = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda or "none",
    }
    try:
        import triton
    except ModuleNotFoundError:
        found["triton"] = "none"
    else:
        found["triton"] = triton.__version__
    return found


def _output(*command: str) -> str:
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=20)
    return done.stdout.strip()


# ---- rows on disk ----


def write(rows: Iterable[Row], device: torch.device, folder: Path) -> list[dict[str, Any]]:
    """Append rows to `<folder>/<name>.jsonl`, one file per benchmark; returns them as written."""
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for row in rows:
        record = row.to_json(device)
        with (folder / f"{row.name}.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
        written.append(record)
    return written


def read(folder: Path) -> list[dict[str, Any]]:
    """All rows of a results folder."""
    lines = (
        line
        for path in sorted(folder.glob("*.jsonl"))
        for line in path.read_text(encoding="utf-8").splitlines()
    )
    return [json.loads(line) for line in lines if line]


def describe(record: Mapping[str, Any]) -> str:
    """One printed line of a row."""
    spread = f"{record['p20_ms']:.3f}..{record['p80_ms']:.3f}"
    extra = ", ".join(f"{key} {value:,.4g}" for key, value in record["extra"].items()
                      if isinstance(value, int | float))  # fmt: skip
    return (
        f"{record['name']} {record['case']} {record['dtype']}: {record['median_ms']:.3f} ms "
        f"({spread}), {record['percent_of_ceiling']:.1f}% of {record['ceiling']['what']}, {extra}"
    )
