"""The processes of `bench.checkpoint`: each measures one case and leaves its results in a file.

    python -m bench.checkpoint_runs WHAT OPTIONS.json      as rank RANK of WORLD_SIZE

A process of its own for each case: its memory is that of the case alone, and what one peer leaves
behind (threads, pools, a background process) ends with it.
"""

from __future__ import annotations

import json
import math
import os
import resource
import sys
from collections.abc import Callable, Mapping
from contextlib import ExitStack, closing, suppress
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from bench import checkpoint_peers as peers
from bench.checkpoint_cases import (
    HUGE,
    KINDS,
    Case,
    Kind,
    barrier,
    draw,
    drop_cache,
    fresh,
    locals_of,
    remove,
    same,
)
from bench.checkpoint_raw import Loop, best, timed

T = TypeVar("T")

RAW = "raw loop"
WORK = "raw loop with copy and CRC-32C"
# As many tensors of as many ranks, of 8 bytes a rank: what a call takes beside the data.
EMPTY = f"{peers.OURS}, tensors of 8 bytes"
# A call that takes longer is made once.
_SLOW_SECONDS = 5.0
_EXTRA_ROUNDS = 1  # of ours and of the limits
_STEP_SECONDS = 1.0  # of the step that staging in the background runs under


@dataclass
class Result:
    """Seconds of one peer in one direction, of the slowest rank each; or why there are none."""

    peer: str
    direction: str
    seconds: list[float] = field(default_factory=list)
    status: str = "measured"
    note: str = ""
    extra: dict[str, Any] = field(default_factory=dict)


class Results:
    """What is measured, by direction and peer."""

    def __init__(self) -> None:
        self._found: dict[tuple[str, str], Result] = {}

    def of(self, peer: str, direction: str) -> Result:
        return self._found.setdefault((peer, direction), Result(peer, direction))

    def add(self, peer: str, direction: str, seconds: float, **extra: Any) -> None:
        result = self.of(peer, direction)
        result.seconds.append(seconds)
        result.extra.update(extra)

    def fail(self, peer: str, direction: str, status: str, note: str) -> None:
        result = self.of(peer, direction)
        result.status, result.note, result.seconds = status, note, []

    def to_json(self) -> list[dict[str, Any]]:
        return [asdict(result) for result in self._found.values()]


def slowest(seconds: float) -> float:
    """The longest time of all ranks."""
    if dist.get_world_size() == 1:
        return seconds
    longest = torch.tensor([seconds], dtype=torch.float64)
    dist.all_reduce(longest, dist.ReduceOp.MAX)
    return float(longest)


def together(step: Callable[[], object]) -> float:
    """Seconds of a step that all ranks take at once."""
    barrier()
    return slowest(timed(step))


# ---- rates ----


class Rates:
    """Peers in turn: each saves into a fresh directory, loads what it saved, and it is removed."""

    def __init__(self, case: Case, folder: Path, cores: int, names: list[str]) -> None:
        self.case, self.folder = case, folder
        self.rank, world = dist.get_rank(), dist.get_world_size()
        self.main = self.rank == 0
        self.state = draw(KINDS[case.kind], self.rank, world)
        self.results = Results()
        tensors = locals_of(self.state)
        nbytes = sum(tensor.nbytes for tensor in tensors.values())
        if case.kind == HUGE:  # no room for the same again: loads overwrite what they must equal
            self.into = self.state
        else:
            self.into = draw(KINDS[case.kind], self.rank, world, zeros=True)
        self.loop = Loop(nbytes)
        self.writing, self.reading = best(folder, self.loop, slowest, drop_cache)
        if world > 1:
            chosen: list[Any] = [(self.writing, self.reading)]
            dist.broadcast_object_list(chosen, src=0)
            self.writing, self.reading = chosen[0]
        kind = KINDS[case.kind]
        self.small = draw(Kind(kind.name, kind.count, (world, 2)), self.rank, world)
        self.stack = ExitStack()
        self.empty = self.stack.enter_context(closing(peers.Ours()))
        self.peers = peers.made(names, cores, self.stack)

    def run(self, rounds: int) -> Results:
        for name, peer in self.peers.items():
            if isinstance(peer, str):
                self.results.fail(name, "save", "absent", peer)
            elif name == peers.DCP_PROCESS and KINDS[self.case.kind].count + 1000 > _most_files():
                # It hands every tensor to its process as an open file, and after the failure
                # nothing else in this process can open one.
                note = f"each tensor is an open file to it, and {_most_files():,} may be open here"
                self.results.fail(name, "save", "absent", note)
        with self.stack:
            for number in range(rounds + _EXTRA_ROUNDS):
                self._raw(RAW, work=False)
                self._raw(WORK, work=True)
                for name, peer in self.peers.items():
                    if isinstance(peer, str) or self.results.of(name, "save").status != "measured":
                        continue
                    ours = isinstance(peer, peers.Ours)
                    if (number < rounds and not self._slow(name)) or ours or not number:
                        self._peer(name, peer, number)
                self._empty()
        return self.results

    def _slow(self, name: str) -> bool:
        seconds = self.results.of(name, "save").seconds
        return bool(seconds) and min(seconds) > _SLOW_SECONDS

    def _raw(self, name: str, *, work: bool) -> None:
        path = self.folder / f"raw-{self.rank}"
        fsync = self.case.medium == "disk"
        step = together(lambda: self.loop.write(path, self.writing, fsync=fsync, work=work))
        self.results.add(name, "save", step, setting=str(self.writing))
        drop_cache(path)
        step = together(lambda: self.loop.read(path, self.reading, work=work))
        self.results.add(name, "load", step, setting=str(self.reading))
        remove(path)

    def _peer(self, name: str, peer: peers.Peer, number: int) -> None:
        with fresh(self.folder, self.main) as path:
            try:
                self._save(name, peer, path)
                self._load(name, peer, path, number)
            except (OSError, RuntimeError, ValueError, TypeError, NotImplementedError) as error:
                # On several ranks others may wait for this one: the time limit ends that.
                if dist.get_world_size() > 1:
                    raise
                note = f"{type(error).__name__}: {error}"[:400]
                self.results.fail(name, "save", "failed", note)

    def _empty(self) -> None:
        with fresh(self.folder, self.main) as path:
            save = together(lambda: self.empty.save(self.small, path))
            load = together(lambda: self.empty.load(self.small, path))
        self.results.add(EMPTY, "empty save", save)
        self.results.add(EMPTY, "empty load", load)

    def _save(self, name: str, peer: peers.Peer, path: Path) -> None:
        extra = {"fsync": peer.fsync, "summed": peer.summed}
        wait: list[Callable[[], None] | None] = []
        began = together(lambda: wait.append(peer.start(self.state, path)))
        if wait[0] is None:
            self.results.add(name, "save", together(lambda: peer.save(self.state, path)), **extra)
        else:
            self.results.add(name, "stall", began, **extra)
            self.results.add(name, "save", began + together(wait[0]), **extra)

    def _load(self, name: str, peer: peers.Peer, path: Path, number: int) -> None:
        barrier()
        if self.main:
            drop_cache(path)
        found: list[Mapping[str, torch.Tensor] | None] = []
        if not number and self.into is not self.state:
            torch._foreach_zero_(list(locals_of(self.into).values()))
        seconds = together(lambda: found.append(peer.load(self.into, path)))
        if found[0] is None:
            return
        self.results.add(name, "load", seconds)
        if not number and not same(found[0], locals_of(self.state)):
            self.results.fail(name, "load", "wrong", "other bytes were loaded than were saved")
        found.clear()
        if self.main:
            drop_cache(path)
        done: list[bool] = []
        seconds = together(lambda: done.append(peer.verify(path)))
        if done[0]:
            self.results.add(name, "verify", seconds)


def rates(options: Mapping[str, Any]) -> Results:
    """Saves and loads of one case by all its peers."""
    case = Case(**options["case"])
    measuring = Rates(case, Path(options["folder"]), options["cores"], options["peers"])
    return measuring.run(options["rounds"])


# ---- stall ----


def stall(options: Mapping[str, Any]) -> Results:
    """How long async_save keeps the training waiting, beside one copy of the same bytes."""
    kind, folder = KINDS[options["case"]["kind"]], Path(options["folder"])
    state, results = draw(kind, 0, 1), Results()
    source = torch.full((kind.nbytes,), 2, dtype=torch.uint8)
    warm = torch.full_like(source, 1)
    small = draw(Kind(kind.name, kind.count, (1, 2)), 0, 1)
    ours, empty = peers.Checkpointer(), peers.Checkpointer()
    step = _Step()
    try:
        for number in range(options["rounds"] + 1):
            copying = timed(lambda: warm.copy_(source))
            alone = timed(step.run)
            with fresh(folder) as path:
                waiting, handle = _timed(ours.async_save, state, path)
                handle.result()
            with fresh(folder) as path:
                calling, handle = _timed(ours.async_save, state, path, stage="background")
                under = timed(step.run)
                staged = handle.staging_done
                calling += timed(handle.wait_staged)
                handle.result()
            with fresh(folder) as path:
                bare, handle = _timed(empty.async_save, small, path)
                handle.result()
            if not number:  # memory and plan are made by the first
                results.add(f"{peers.OURS}, first", "stall", waiting)
                continue
            results.add("one copy", "stall", copying)
            results.add(peers.OURS, "stall", waiting)
            results.add(EMPTY, "stall", bare)
            results.add(
                f"{peers.OURS}, background", "stall", calling,
                step_seconds=alone, step_seconds_while_staging=under, staged_within_step=staged,
            )  # fmt: skip
    finally:
        ours.close()
        empty.close()
    return results


def _timed(step: Callable[..., T], *arguments: Any, **options: Any) -> tuple[float, T]:
    """Seconds, and the result."""
    results: list[T] = []
    seconds = timed(lambda: results.append(step(*arguments, **options)))
    return seconds, results[0]


class _Step:
    """Something to compute for about a second, call by call, as a training step is."""

    def __init__(self) -> None:
        self._vector = torch.randn(16_384)  # too short for torch to divide among threads
        self._times = 500
        least = min(timed(self.run) for _ in range(5))
        self._times = max(1, int(self._times * _STEP_SECONDS / least))

    def run(self) -> None:
        for _ in range(self._times):
            self._vector.sin()


# ---- memory ----


def memory(options: Mapping[str, Any]) -> Results:
    """The peak of this process's memory over what the state takes, while one peer does one thing."""
    kind, folder, name = KINDS[options["case"]["kind"]], Path(options["folder"]), options["peer"]
    direction, state, results = options["direction"], draw(kind, 0, 1), Results()
    peer = peers.makers(options["cores"])[name]()
    _ = [torch.ones(1 << 16) @ torch.ones(1 << 16), dist.barrier()]  # pools of threads

    def save(path: Path) -> None:
        wait = peer.start(state, path)
        if wait is None:
            peer.save(state, path)
        else:
            wait()

    with fresh(folder) as path:
        if direction == "load":
            save(path)
        _reset_peak()
        before = _peak()
        act = (lambda: peer.load(state, path)) if direction == "load" else (lambda: save(path))
        seconds = timed(act)
        results.add(
            name, direction, seconds, peak_memory_bytes=_peak() - before,
            staged_bytes=options["staged"],
        )  # fmt: skip
    peer.close()
    return results


def _reset_peak() -> None:
    """Forgets the peak so far: what came before (a save before a load) is not to count."""
    with suppress(OSError):  # then the peak of all that this process did counts
        Path("/proc/self/clear_refs").write_text("5")


def _peak() -> int:
    """The largest resident memory of this process, in bytes (VmHWM; ru_maxrss cannot be reset)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return 0


# ---- one eighth ----


def partial(options: Mapping[str, Any]) -> Results:
    """Bytes read over bytes needed where 1/8 of a checkpoint of one process is loaded."""
    from goku_runtime.checkpoint.manifest import Manifest
    from goku_runtime.checkpoint.options import CheckpointOptions
    from goku_runtime.checkpoint.plan import Box
    from goku_runtime.checkpoint.stored import Stored

    folder, results = Path(options["folder"]), Results()
    shapes = {"matrices": (4096, 4096), "cubes": (256, 256, 256)}
    state = {
        "model": {
            f"{name}.{i}": torch.randn(shape) for name, shape in shapes.items() for i in (0, 1)
        }
    }
    splits = {
        "rows": ("matrices", (8, 1)), "columns": ("matrices", (1, 8)), "3-D": ("cubes", (2, 2, 2)),
    }  # fmt: skip
    with fresh(folder) as path:
        peers.Ours().save(state, path)
        for label, (name, parts) in splits.items():
            shape = shapes[name]
            for which in (0, math.prod(parts) - 1):
                size = tuple(n // count for n, count in zip(shape, parts, strict=True))
                index = [int(i) for i in torch.unravel_index(torch.tensor(which), parts)]
                start = tuple(i * n for i, n in zip(index, size, strict=True))
                stored = Stored(path, Manifest.read(path))
                wanted = [
                    (f"model.{name}.{i}", Box(start, size), torch.empty(size)) for i in (0, 1)
                ]
                drop_cache(path)
                with CheckpointOptions().engine() as engine:
                    seconds, _ = _timed(stored.read, engine, wanted)
                for i, (_, _, found) in enumerate(wanted):
                    sides = tuple(slice(s, s + n) for s, n in zip(start, size, strict=True))
                    if not torch.equal(found, state["model"][f"{name}.{i}"][sides]):
                        results.fail(peers.OURS, label, "wrong", "other bytes were loaded")
                        break
                else:
                    results.add(
                        peers.OURS, label, seconds, bytes_read=stored.bytes_read,
                        bytes_needed=stored.bytes_wanted, chunk=stored.index.chunk,
                    )  # fmt: skip
    return results


# ---- the process ----


def _most_files() -> int:
    """Files that this process may have open, if it asks for as many as it can."""
    return resource.getrlimit(resource.RLIMIT_NOFILE)[1]


WORKS: dict[str, Callable[[Mapping[str, Any]], Results]] = {
    "rates": rates, "stall": stall, "memory": memory, "partial": partial,
}  # fmt: skip


def main(arguments: list[str]) -> int:
    what, file = arguments
    options = json.loads(Path(file).read_text())
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    dist.init_process_group(
        "gloo", init_method=f"file://{options['store']}", rank=rank, world_size=world,
        timeout=timedelta(minutes=3),
    )  # fmt: skip
    resource.setrlimit(resource.RLIMIT_NOFILE, (_most_files(), _most_files()))
    results = WORKS[what](options)
    if rank == 0:
        Path(options["results"]).write_text(json.dumps(results.to_json()))
    barrier()
    dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
