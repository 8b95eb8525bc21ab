"""Checkpoints: ours, other people's and the limits of the medium, in one run.

    python -m bench.checkpoint [options]

Starts a process (or several, joined by gloo) for each case and lets all peers take turns in it: each
saves into a fresh directory, loads what it saved after the page cache was dropped, and its files are
removed and the disk is left to settle before the next one's turn. What is loaded is compared with
what was saved. Rows go to bench/results/checkpoint.jsonl.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from bench import checkpoint_peers as peers
from bench import harness, timing
from bench.checkpoint_cases import HUGE, KINDS, LARGE, MEDIA, SMALL, TINY, Case, cases, file_system
from bench.checkpoint_planning import COUNT, MESHES
from bench.checkpoint_runs import EMPTY, RAW

NAME = "checkpoint"
_OWN = (
    "bench/checkpoint.py", "bench/checkpoint_cases.py", "bench/checkpoint_peers.py",
    "bench/checkpoint_raw.py", "bench/checkpoint_runs.py", "bench/timing.py",
)  # fmt: skip
SOURCES = ("runtime/goku_runtime/checkpoint", "csrc/io", *_OWN)
PLANNING = ("runtime/goku_runtime/checkpoint", "bench/checkpoint_planning.py")
WORKS = ("rates", "stall", "memory", "partial", "planning")
# Seconds that a plan may take, by whether it is the first.
LIMITS = {("512 ranks", "first"): 2.0, ("8,960 ranks (35 x 32 x 8)", "first"): 5.0}
CACHED_LIMIT = 0.010
_TIMEOUT = 600
_MOST_TOUCHED = 20 << 30  # bytes; no case uses more
# On several processes: those whose order one process does not tell.
_MANY = (peers.OURS, peers.OURS_NO_FSYNC, peers.OURS_ASYNC, peers.DCP, peers.DCP_TUNED,
         peers.DCP_NO_FSYNC, peers.DCP_ASYNC, peers.SAFETENSORS)  # fmt: skip
_WITHOUT_FSYNC = (peers.OURS_NO_FSYNC, peers.DCP_NO_FSYNC)
_LIKE_DCP = (peers.DCP_THREADS, peers.DCP_ASYNC, peers.DCP_PROCESS)
_HUGE = (peers.OURS, peers.OURS_BOUNDED, peers.DCP, peers.DCP_TUNED)
EXAMPLES = """\
examples, from the repository with the packages installed:
  python -m bench.checkpoint                             everything but 8 GiB, 16 minutes
  python -m bench.checkpoint --large                     and 8 GiB on the disk, staged in 1 GiB
  python -m bench.checkpoint --disk /mnt/nvme/bench      another disk than the working directory's
  python -m bench.checkpoint rates --only "64 x" P=1 tmpfs --peers DCP
  python -m bench report                                 shows the rows

torch_checkpointing takes part if it can be imported: pip install torch_checkpointing, or a folder
that holds it on PYTHONPATH.

Exit codes: 0 well; 1 a result of ours is wrong or failed, or time ran out; 2 bad input.
"""


@dataclass(frozen=True)
class Work:
    """One process, or several, that measure one thing."""

    what: str
    case: Case
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def label(self) -> str:
        return f"{self.what}: {self.case.name}, {self.case.medium}"


def works(*, large: bool, cores: int, rounds: int) -> list[Work]:
    """Everything that is measured, in order."""
    found = []
    for case in cases(large=large):
        names = list(peers.makers(cores)) if case.processes == 1 else list(_MANY)
        names = [name for name in names if name != peers.OURS_BOUNDED]
        if case.medium == "tmpfs":  # where fsync does nothing
            names = [name for name in names if name not in _WITHOUT_FSYNC]
        if (case.kind, case.medium) == (SMALL, "tmpfs"):  # DCP takes 10 s a call, in any form
            names = [name for name in names if name not in _LIKE_DCP]
        if case.kind == HUGE:
            names = list(_HUGE)
        # 16 minutes are to be enough: four rounds of the first case, three of the others.
        fewer = 0 if case == Case(LARGE, 1, "disk") else 1
        found.append(Work("rates", case, {"peers": names, "rounds": max(1, rounds - fewer)}))
    for kind in (LARGE, SMALL):
        found.append(Work("stall", Case(kind, 1, "disk"), {"rounds": 2 * rounds + 1}))
    one, gib = Case(LARGE, 1, "disk"), KINDS[LARGE].nbytes
    window = 4 * peers.CheckpointOptions().window_bytes
    for peer, direction, staged in (
        (peers.OURS, "save", window), (peers.OURS_ASYNC, "save", gib), (peers.OURS, "load", 0),
        (peers.OURS_BOUNDED, "save", peers.BOUNDED), (peers.DCP, "save", 0),
        (peers.DCP_ASYNC, "save", gib), (peers.DCP, "load", 0),
    ):  # fmt: skip
        options = {"peer": peer, "direction": direction, "staged": staged}
        found.append(Work("memory", one, options))
    found.append(Work("partial", Case("1/8", 1, "disk")))
    found += [Work("planning", Case("1,500 tensors", 1, ""), {"meshes": [mesh]}) for mesh in MESHES]
    return found


# ---- processes ----


def measured(work: Work, folder: Path, *, cores: int, rounds: int) -> list[dict[str, Any]]:
    """Runs a work's processes and returns their results.

    Raises:
        RuntimeError: a process failed or took too long; with the end of what it said.
    """
    world = work.case.processes
    with tempfile.TemporaryDirectory(prefix="goku-bench-") as private:
        inside = tempfile.mkdtemp(prefix="goku-bench-", dir=folder)
        try:
            options = {
                "case": work.case.to_json(), "folder": inside, "cores": cores, "rounds": rounds,
                "store": f"{private}/store", "results": f"{private}/results", **work.options,
            }  # fmt: skip
            file = Path(private) / "options.json"
            file.write_text(json.dumps(options))
            module = (
                "bench.checkpoint_planning" if work.what == "planning" else "bench.checkpoint_runs"
            )
            words = [str(file)] if work.what == "planning" else [work.what, str(file)]
            command = [sys.executable, "-m", module, *words]
            threads = os.environ.get("OMP_NUM_THREADS") or str(max(1, cores // world))
            base = {
                **os.environ, "WORLD_SIZE": str(world), "OMP_NUM_THREADS": threads,
                "MASTER_ADDR": "127.0.0.1",
                "PYTHONPATH": os.pathsep.join([str(harness.ROOT), os.environ.get("PYTHONPATH", "")]),
            }  # fmt: skip
            _run(command, base, world, Path(private))
            found: list[dict[str, Any]] = json.loads((Path(private) / "results").read_text())
            return found
        finally:
            shutil.rmtree(inside, ignore_errors=True)


def _run(command: Sequence[str], base: Mapping[str, str], world: int, private: Path) -> None:
    """All ranks of a command; the first to fail ends the others."""
    logs = [private / f"log{rank}" for rank in range(world)]
    with contextlib.ExitStack() as stack:
        processes = []
        for rank in range(world):
            said = stack.enter_context(logs[rank].open("wb"))
            environment = {**base, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            processes.append(subprocess.Popen(command, env=environment, stdout=said, stderr=said))
        try:
            end = time.monotonic() + _TIMEOUT
            while any(process.poll() is None for process in processes):
                if time.monotonic() > end or any(process.poll() for process in processes):
                    break
                time.sleep(0.05)
        finally:
            for process in processes:
                if process.poll() is None:
                    process.kill()
                process.wait()
    for process, log in zip(processes, logs, strict=True):
        if process.returncode > 0 or (process.returncode and world == 1):
            text = log.read_text(errors="replace")[-2000:]
            raise RuntimeError(f"exit code {process.returncode}: {text}")
    if any(process.returncode for process in processes):
        raise RuntimeError(f"not done after {_TIMEOUT} s, and ended")


# ---- rows ----


def rows(work: Work, found: Sequence[Mapping[str, Any]], folder: Path) -> Iterator[harness.Row]:
    """The results of one work as rows, with the limits of its own run."""
    rates = {(r["peer"], r["direction"]): r for r in found}
    for result in found:
        yield _row(work, result, rates, folder)


def _row(
    work: Work, result: Mapping[str, Any], rates: Mapping[tuple[str, str], Mapping[str, Any]], folder: Path
) -> harness.Row:  # fmt: skip
    peer, direction, seconds = result["peer"], result["direction"], result["seconds"]
    status = result["status"] if seconds or result["status"] != "measured" else "failed"
    took = timing.summary([1e3 * each for each in seconds]) if status == "measured" else None
    case, extra = work.case, dict(result["extra"])
    nbytes = float(KINDS[case.kind].nbytes) if case.kind in KINDS else 0.0
    shape: dict[str, Any] = {"bytes": nbytes, "processes": case.processes}
    if work.what != "planning":
        shape["file_system"] = file_system(folder)
    ceiling = timing.Ceiling("nothing", 1.0, "byte/s")
    if peer == EMPTY:  # a time and no rate
        nbytes = 8.0 * KINDS[case.kind].count * case.processes
        shape["bytes"] = nbytes
        if took is not None:
            ceiling = timing.Ceiling("itself", nbytes / (1e-3 * took.median_ms), "byte/s")
    elif work.what == "rates":
        # A stall is rated against the copy, in rows of its own.
        reads = direction in ("load", "verify")
        limit = rates.get((RAW, "load" if reads else "save"))
        if limit is not None and limit["seconds"]:
            median = 1e-3 * timing.summary([1e3 * each for each in limit["seconds"]]).median_ms
            ceiling = timing.Ceiling("raw loop of the same bytes", nbytes / median, "byte/s")
    elif work.what == "stall":
        median = (
            1e-3
            * timing.summary(
                [1e3 * each for each in rates["one copy", "stall"]["seconds"]]
            ).median_ms
        )
        ceiling = timing.Ceiling("one copy of the same bytes", nbytes / median, "byte/s")
    elif work.what == "partial":
        nbytes = float(extra.get("bytes_needed", 0))
        read = float(extra.get("bytes_read", 1))
        rate = read / (1e-3 * took.median_ms) if took else 1.0
        ceiling = timing.Ceiling("what was read", rate, "byte/s")
    elif work.what == "planning":
        nbytes = float(COUNT)
        which = peer.rpartition(", ")[2]
        allowed = CACHED_LIMIT if which == "cached" else LIMITS.get((direction, which), 1.0)
        extra["limit_seconds"] = allowed
        ceiling = timing.Ceiling(f"{allowed:g} s", COUNT / allowed, "tensor/s")
    elif took is not None:  # memory: a rate says nothing there
        ceiling = timing.Ceiling("itself", nbytes / (1e-3 * took.median_ms), "byte/s")
    if work.what == "memory":
        direction = f"memory, {direction}"
    elif work.what in ("partial", "planning"):
        direction = f"{work.what}, {direction}"
    elif work.what == "stall":
        direction = "stall and copy"
    return harness.Row(
        name=NAME, case=case.name, pack=case.medium, shape=shape, dtype="float32", work=nbytes,
        ceiling=ceiling, sources=PLANNING if work.what == "planning" else SOURCES, timing=took,
        status=status, note=" ".join(result["note"].split()), peer=peer, direction=direction,
        extra=extra,
    )  # fmt: skip


def is_bad(row: harness.Row) -> bool:
    """Whether a result of ours is wrong or failed."""
    return row.peer.startswith(peers.OURS) and row.status in ("wrong", "failed")


# ---- the command ----


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(
        prog="python -m bench.checkpoint",
        description="Checkpoints: ours, others' and the limits of the medium, in turn.",
        epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    made.add_argument("works", nargs="*", metavar="WORK",
                      help=f"all, or some of {', '.join(WORKS)}")  # fmt: skip
    made.add_argument("--only", nargs="+", default=[], metavar="PART",
                      help="cases with all of these in kind, P=processes or medium")  # fmt: skip
    made.add_argument("--peers", nargs="+", default=[], metavar="PART",
                      help="peers with one of these in their name; ours always")  # fmt: skip
    made.add_argument(
        "--rounds",
        type=int,
        default=4,
        help="of every peer (4); one less where a case is slow, two more of ours",
    )
    made.add_argument("--large", action="store_true", help="8 GiB on the disk too")
    made.add_argument("--disk", type=Path, default=Path(), help="a folder on the disk (.)")
    made.add_argument("--memory", type=Path, default=Path("/dev/shm"),
                      help="a folder in memory (/dev/shm)")  # fmt: skip
    made.add_argument("--limit", type=float, default=float("inf"),
                      help="begin no case after so many seconds")  # fmt: skip
    made.add_argument("--out", type=Path, default=harness.RESULTS, help="folder of results")
    made.add_argument("--tiny", action="store_true", help=argparse.SUPPRESS)  # for tests
    return made


def chosen(options: argparse.Namespace, cores: int) -> list[Work]:
    """What was asked for, checked. Raises ValueError for what cannot be done."""
    if options.rounds < 1:
        raise ValueError(f"--rounds is {options.rounds}: allowed are numbers >= 1")
    if not options.limit >= 0:
        raise ValueError(f"--limit is {options.limit}: allowed are numbers >= 0")
    for name in options.works:
        if name not in WORKS:
            raise ValueError(f"WORK is {name!r}: allowed are {', '.join(WORKS)}")
    known = list(peers.makers(cores))
    for part in options.peers:
        if not any(part in name for name in known):
            raise ValueError(f"--peers has {part!r}: allowed are parts of {known}")
    for name in ("disk", "memory"):
        if not getattr(options, name).is_dir():
            raise ValueError(f"--{name} is {str(getattr(options, name))!r}: no such folder")
    found = []
    for work in works(large=options.large, cores=cores, rounds=options.rounds):
        work = _tiny(work, options.rounds) if options.tiny else work
        if options.works and work.what not in options.works:
            continue
        if not all(part in f"{work.case.name} {work.case.medium}" for part in options.only):
            continue
        if options.peers and work.what == "rates":
            names = [n for n in work.options["peers"] if n == peers.OURS
                     or any(part in n for part in options.peers)]  # fmt: skip
            work = Work(work.what, work.case, {**work.options, "peers": names})
        if work not in found:
            found.append(work)
    if not found:
        raise ValueError(f"nothing fits {options.works} and --only {options.only}")
    return found


def _tiny(work: Work, rounds: int) -> Work:
    if work.case.kind not in KINDS:
        return work
    case = Case(TINY, work.case.processes, work.case.medium)
    return Work(work.what, case, {**work.options, "rounds": rounds})


def touch_memory() -> int:
    """Touches most of the free memory once and gives it back; returns how many bytes.

    A virtual machine has its memory from its host page by page, at the first touch: files in memory
    that nobody had used since the machine's start were written at 0.4 GiB/s, and 1.1 the next time.
    """
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGESIZE")
    most, held = (Path(f"/sys/fs/cgroup/memory.{name}") for name in ("max", "current"))
    if most.is_file() and (limit := most.read_text().strip()) != "max":  # a container's
        free = min(free, max(0, int(limit) - int(held.read_text())))
    count = min(free * 4 // 5, _MOST_TOUCHED)
    torch.empty(count, dtype=torch.uint8).zero_()
    return count


def main(arguments: Sequence[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    cores = len(os.sched_getaffinity(0))
    try:
        asked = chosen(options, cores)
    except ValueError as error:
        print(f"bench.checkpoint: {error}", file=sys.stderr)
        return 2
    folders: Mapping[str, Callable[[], Path]] = {
        MEDIA[0]: lambda: options.disk, MEDIA[1]: lambda: options.memory,
    }  # fmt: skip
    # Ended from outside, it ends its processes and removes what they made.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    began, good = time.monotonic(), True
    if not options.tiny and any(work.what in ("rates", "stall") for work in asked):
        touched = touch_memory()
        print(f"touched {touched >> 30} GiB of free memory: {time.monotonic() - began:.0f} s")
    for work in asked:
        if time.monotonic() - began > options.limit:
            print(f"stopped after {options.limit:.0f} s")
            return 1
        folder = folders.get(work.case.medium, folders["disk"])()
        print(f"{time.monotonic() - began:6.0f} s  {work.label}", flush=True)
        try:
            found = measured(work, folder, cores=cores, rounds=options.rounds)
        except RuntimeError as error:
            print(f"{work.label} failed: {error}", file=sys.stderr, flush=True)
            good = False
            continue
        made = list(rows(work, found, folder))
        good = good and not any(map(is_bad, made))
        for record in harness.write(made, torch.device("cpu"), options.out):
            print(harness.describe(record), flush=True)
    took = time.monotonic() - began
    print(f"{took:.0f} s; rows are in {options.out}; python -m bench report shows them")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
