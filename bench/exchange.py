"""Exchange of sequence parallelism: ours, other people's, and the collective alone, in one run.

    torchrun --nproc-per-node P -m bench.exchange [options]

Every rank takes part. Each peer's result and gradients are compared with those of one process before
it is timed. Peers take turns, a barrier before each call; the time of a call is that of its slowest
rank. Rows, written by rank 0, go to bench/results/exchange.jsonl.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from bench import harness, timing
from bench.cases import REFUSALS, Absent
from bench.exchange_cases import Case, Shards, cases, custom, differs
from bench.exchange_peers import (
    ALONE,
    CONTEXT,
    DEEPSPEED,
    NAIVE,
    OURS,
    PEERS,
    RAW,
    Peer,
    Way,
    alone,
    raw,
)
from bench.filler import Filler

NAME = "exchange"
SOURCES = (
    "runtime/goku_runtime/sequence_parallel.py", "runtime/goku_runtime/_exchange.py",
    "bench/exchange.py", "bench/exchange_cases.py", "bench/exchange_peers.py", "bench/filler.py", "bench/timing.py",
)  # fmt: skip
DIRECTIONS = ("forward", "forward+backward")
EXAMPLES = """\
examples, from the repository with the packages installed:
  torchrun --nproc-per-node 2 -m bench.exchange                    on a CPU with gloo, small packs
  torchrun --nproc-per-node 8 -m bench.exchange                    on 8 GPUs with NCCL
  torchrun --nproc-per-node 4 -m bench.exchange --only goku-2b exchange
  torchrun --nproc-per-node 4 -m bench.exchange --shape 4096+512+77 28 4 64
  python -m bench report                                           shows the rows

On a CPU glibc maps every buffer past 32 MB anew, and first touches of its pages take longer than the
exchange. With this memory is used again, as a GPU's allocator does; rows say which it was:
  export MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=17179869184 MALLOC_TOP_PAD_=268435456

DeepSpeed takes part if it can be imported: pip install deepspeed, or a folder that holds it on
PYTHONPATH; on a machine without a GPU set DS_ACCELERATOR=cpu. The first time it compiles an
extension, which takes a minute.

Exit codes of every rank: 0 well; 1 a result of ours or of the plain baseline is wrong, or ours failed,
or time ran out; 2 bad input. torchrun itself says 1 for any of them.
"""
_MAX_ROUNDS = 100
TIMEOUT = timedelta(minutes=5)


# ---- right before fast ----


def run(way: Way, shards: Shards, backward: bool) -> tuple[Tensor, ...]:
    """(result,) of a forward, (result, dq, dk, dv) with a backward."""
    with way.around():
        out = way.call(*shards.inputs)
        if not backward:
            return (out,)
        return (out.detach(), *torch.autograd.grad(out, shards.inputs, shards.grad))


def judged(
    peer: Peer, case: Case, shards: Shards, group: ProcessGroup, device: torch.device
) -> tuple[Way | None, dict[str, tuple[str, str]]]:
    """(way, status and note of each direction), on which all ranks agree."""
    way: Way | None = None
    found: dict[str, tuple[str, str]] = {}
    for direction in DIRECTIONS:
        status = "measured"
        try:
            way = way or peer.make(case, group, device)
            results = run(way, shards, direction != "forward")
            note = differs(results, shards.truth[: len(results)])
            status = "wrong" if note else "measured"
        except Absent as reason:
            status, note = "absent", str(reason)
        except REFUSALS as error:
            status, note = "failed", f"{type(error).__name__}: {error}"[:400]
        verdicts: list[Any] = [None] * dist.get_world_size(group)
        dist.all_gather_object(verdicts, (status, note), group=group)
        found[direction] = next((v for v in verdicts if v[0] != "measured"), verdicts[0])
    return way, found


# ---- timing ----


def together(
    calls: Mapping[str, Callable[[], object]], group: ProcessGroup | None, device: torch.device, *,
    seconds: float, min_rounds: int = 5,
) -> dict[str, timing.Timing]:  # fmt: skip
    """Time `calls` in turn, on all ranks at once (None: there is one); the slowest rank counts.

    All ranks do the same number of rounds, agreed on after two that do not count.
    """
    filler = Filler(device)
    launching = dict.fromkeys(calls, 0.0)

    def once(name: str) -> float:
        timing.synchronise(device)
        if group is not None:
            dist.barrier(group=group)
        began = time.perf_counter()
        if not filler.active:
            calls[name]()
            return time.perf_counter() - began
        filler.run(2 * launching[name])
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        began = time.perf_counter()
        calls[name]()
        launching[name] = time.perf_counter() - began
        end.record()
        end.synchronize()
        return 1e-3 * start.elapsed_time(end)

    def slowest(rounds: Sequence[Sequence[float]]) -> Tensor:
        times = torch.tensor(rounds, dtype=torch.float64, device=device)
        if group is not None:
            dist.all_reduce(times, dist.ReduceOp.MAX, group=group)
        return times

    def round_of_calls() -> list[float]:
        return [once(name) for name in calls]

    round_of_calls()
    estimate = float(slowest([round_of_calls()]).sum())
    rounds = max(min_rounds, min(_MAX_ROUNDS, int(seconds / max(1e-6, estimate))))
    times = slowest([round_of_calls() for _ in range(rounds)])
    columns = 1e3 * times.T
    return {
        name: timing.summary(column.tolist()) for name, column in zip(calls, columns, strict=True)
    }


# ---- rows ----


def measure(
    case: Case, peers: Sequence[Peer], group: ProcessGroup, device: torch.device, seconds: float
) -> Iterator[harness.Row]:
    """Rows of one case: every peer in both directions, and the parts that bound them."""
    size, backend = dist.get_world_size(group), dist.get_backend(group)
    shards = Shards.draw(case, dist.get_rank(group), size, device)
    ways: dict[str, Way] = {}
    verdicts: dict[str, dict[str, tuple[str, str]]] = {}
    for peer in peers:
        way, verdicts[peer.name] = judged(peer, case, shards, group, device)
        if way is not None:
            ways[peer.name] = way
    parts = {RAW: raw(case, group, device)}
    if case.kind == "attention":
        with contextlib.suppress(Absent):
            parts[ALONE] = alone(case, group, device)
        everywhere = [False] * size  # the ranks of an uneven split may differ
        dist.all_gather_object(everywhere, ALONE in parts, group=group)
        if not all(everywhere):
            parts.pop(ALONE, None)

    for direction in DIRECTIONS:
        backward = direction != "forward"
        sent = case.bytes(size, backward=False)
        if backward:
            sent += case.bytes(size, backward=True)
        calls: dict[str, Callable[[], object]] = {
            name: functools.partial(run, way, shards, backward)
            for name, way in ways.items()
            if verdicts[name][direction][0] == "measured"
        }
        calls |= {name: functools.partial(part, backward) for name, part in parts.items()}
        times = together(calls, group, device, seconds=seconds)
        ceiling = timing.Ceiling(
            "all_to_all_single of the same bytes", sent / (1e-3 * times[RAW].median_ms), "byte/s"
        )
        ours = times.get(OURS)
        for name in [*(peer.name for peer in peers), *parts]:
            status, note = verdicts[name][direction] if name in verdicts else ("measured", "")
            extra: dict[str, Any] = {"ranks": size, "backend": backend, "memory": _memory(device)}
            if name in times and name != ALONE:
                seconds_each = 1e-3 * times[name].median_ms
                extra["bandwidth_bytes_per_s"] = sent / seconds_each
                if ours is not None and name not in parts:
                    extra["ratio"] = times[name].median_ms / ours.median_ms
            if name == DEEPSPEED and "deepspeed" in sys.modules:
                extra["version"] = sys.modules["deepspeed"].__version__
            if name == CONTEXT and device.type == "cpu" and status != "absent":
                # Its ring is made of CUDA's attentions; DTensor's own rules stand in for it.
                note = f"{note}; on a CPU no ring runs, only DTensor's own rules".lstrip("; ")
            yield harness.Row(
                name=NAME, case=f"{case.model}, {case.kind}, P={size}", pack=case.pack.name,
                shape={"tokens": case.pack.tokens, "samples": len(case.pack.lengths),
                       "heads": case.heads, "kv_heads": case.kv_heads,
                       "head_dim": case.head_dim, "ranks": size},
                dtype=str(case.dtype).removeprefix("torch."), work=float(sent), ceiling=ceiling,
                sources=SOURCES, timing=times.get(name), status=status, note=note, peer=name,
                backend=backend if name == OURS else "", direction=direction, part=name in parts,
                extra=extra,
            )  # fmt: skip


def _memory(device: torch.device) -> str:
    """Where the memory of new tensors comes from: it decides much of a CPU's times."""
    if device.type != "cpu":
        return "caching allocator"
    kept = os.environ.get("MALLOC_MMAP_MAX_") == "0"
    return "used again (MALLOC_MMAP_MAX_=0)" if kept else "malloc's default"


def is_bad(row: harness.Row) -> bool:
    """Whether ours or the plain baseline is wrong, or ours failed."""
    return (row.peer in (OURS, NAIVE) and row.status in ("wrong", "failed")) or (
        row.peer == OURS and row.status == "absent"
    )


# ---- the command ----


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(
        prog="torchrun --nproc-per-node P -m bench.exchange",
        description="Exchanges of sequence parallelism, in turn: ours, others', the collective alone.",
        epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    made.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    made.add_argument("--seconds", type=float, default=3.0,
                      help="of timing per case and direction, all peers together (3)")  # fmt: skip
    made.add_argument("--only", nargs="+", default=[], metavar="PART",
                      help="cases with all of these in model, kind or pack")  # fmt: skip
    made.add_argument("--peers", nargs="+", default=[], metavar="PART",
                      help="peers with one of these in their name; ours always")  # fmt: skip
    made.add_argument("--shape", nargs=4, metavar=("LENGTHS", "HEADS", "KV_HEADS", "HEAD_DIM"),
                      help="this attention alone; lengths of samples as 4096+512+77")  # fmt: skip
    made.add_argument("--limit", type=float, default=float("inf"),
                      help="begin no case after so many seconds")  # fmt: skip
    made.add_argument("--out", type=Path, default=harness.RESULTS, help="folder of results")
    return made


@dataclass(frozen=True)
class Plan:
    """What was asked for, checked."""

    device: torch.device
    cases: Sequence[Case]
    peers: Sequence[Peer]

    @classmethod
    def of(cls, options: argparse.Namespace) -> Plan:
        """Raises ValueError for what cannot be done, before any process waits for another."""
        if options.device not in ("cpu", "cuda"):
            raise ValueError(f"--device is {options.device!r}: allowed are cpu and cuda")
        if options.device == "cuda" and not torch.cuda.is_available():
            raise ValueError("--device is 'cuda': there is no CUDA device on this machine")
        for name in ("seconds", "limit"):
            if not getattr(options, name) >= 0:
                raise ValueError(f"--{name} is {getattr(options, name)}: allowed are numbers >= 0")
        world = dist.get_world_size() if dist.is_initialized() else _environment("WORLD_SIZE", 1)
        if world < 2:
            raise ValueError(
                f"{world} process: an exchange needs 2, "
                "as in torchrun --nproc-per-node 2 -m bench.exchange"
            )
        every = custom(options.shape, options.device) if options.shape else cases(options.device)
        chosen = [c for c in every if all(
            any(part in name for name in (c.model, c.kind, c.pack.name)) for part in options.only
        )]  # fmt: skip
        if not chosen:
            raise ValueError(f"nothing fits --only {options.only}")
        for part in options.peers:
            if not any(part in peer.name for peer in PEERS):
                names = [peer.name for peer in PEERS]
                raise ValueError(f"--peers has {part!r}: allowed are parts of {names}")
        for case in chosen:
            if case.pack.tokens < world:
                raise ValueError(
                    f"{case.pack.name} has {case.pack.tokens} tokens for {world} ranks"
                )
        peers = [p for p in PEERS if p.name == OURS or not options.peers
                 or any(part in p.name for part in options.peers)]  # fmt: skip
        local = _environment("LOCAL_RANK", 0)
        where = torch.device("cuda", local) if options.device == "cuda" else torch.device("cpu")
        return cls(where, chosen, peers)


def _environment(name: str, default: int) -> int:
    text = os.environ.get(name, str(default))
    if not text.isdigit():
        raise ValueError(f"{name} is {text!r} in the environment: a whole number is needed")
    return int(text)


def main(arguments: Sequence[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    try:
        plan = Plan.of(options)
    except ValueError as error:
        print(f"bench.exchange: {error}", file=sys.stderr)
        return 2
    joined = not dist.is_initialized()
    if plan.device.type == "cuda":
        torch.cuda.set_device(plan.device)
    if joined:
        backend = "nccl" if plan.device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=TIMEOUT)
    try:
        return _run(plan, options)
    finally:
        if joined:
            dist.destroy_process_group()


def _run(plan: Plan, options: argparse.Namespace) -> int:
    group = dist.group.WORLD
    assert group is not None
    main_rank = dist.get_rank() == 0
    if main_rank and plan.device.type == "cpu":
        print(f"measuring a CPU ({harness.hardware(plan.device)}) on small shapes", flush=True)
    began, good = time.monotonic(), True
    for case in plan.cases:
        late = [time.monotonic() - began > options.limit]
        dist.broadcast_object_list(late, src=0)  # one clock decides for all
        if late[0]:
            if main_rank:
                print(f"stopped after {options.limit:.0f} s")
            return 1
        peers = [peer for peer in plan.peers if case.kind in peer.kinds]
        rows = list(measure(case, peers, group, plan.device, options.seconds))
        good = good and not any(map(is_bad, rows))
        if main_rank:
            for record in harness.write(rows, plan.device, options.out):
                print(harness.describe(record), flush=True)
    if main_rank:
        print(f"rows are in {options.out}; python -m bench report shows them")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
