"""Step time and peak memory of a small Goku under each policy of checkpointing and sharding.

    python -m bench.policies                             one process
    torchrun --nproc-per-node P -m bench.policies        P processes, every way of arranging them

Before a policy is timed its loss and the norm of its gradient are compared with those of one process
that computes all packs, shards nothing and recomputes nothing. Rows go to bench/results/policies.jsonl.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import os
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from bench import harness, timing
from bench.cases import REFUSALS
from bench.exchange import together
from bench.policy_runs import NONE, POLICIES, Batch, Run, Setting, Task, memory, settings
from goku import flops
from goku.activation_bytes import saved_bytes_per_token
from goku.model import PRESETS
from goku.parallelize import (
    ActivationCheckpointing,
    ParallelContext,
    ParallelDims,
    parallel_context,
)

NAME = "policies"
SOURCES = (
    "runtime/goku_runtime/activation_checkpoint.py", "runtime/goku_runtime/sharding.py",
    "runtime/goku_runtime/sequence_parallel.py", "runtime/goku_runtime/_exchange.py",
    "goku/model", "goku/parallelize.py", "bench/policies.py", "bench/policy_runs.py", "bench/timing.py",
)  # fmt: skip
EXAMPLES = """\
examples, from the repository with the packages installed:
  python -m bench.policies
  torchrun --nproc-per-node 2 -m bench.policies --only sp=2
  torchrun --nproc-per-node 8 -m bench.policies --preset goku-8b
  python -m bench report                                    shows the rows

Exit codes of every rank: 0 well; 1 a policy is wrong or failed, or time ran out; 2 bad input.
torchrun itself says 1 for any of them.
"""
# ---- rows ----


def truth(task: Task, device: torch.device, packs: int) -> tuple[float, float]:
    """Loss and norm of the gradient of one process with all packs."""
    alone = ParallelContext(0, 1, device, None)
    run = Run(task, settings(1)[0], POLICIES[NONE], alone)
    many = ParallelContext(0, packs, device, None)  # only to draw as many packs as the groups take
    batches = task.batches(dataclasses.replace(many, dims=ParallelDims(1, packs, 1)), device)
    loss, norm = run.gradients(batches)
    return loss / packs, norm / packs


def measure(
    task: Task, setting: Setting, names: Sequence[str], context: ParallelContext, seconds: float,
    ceiling: timing.Ceiling,
) -> Iterator[harness.Row]:  # fmt: skip
    """Rows of one arrangement, a policy each."""
    device = context.device
    batch = task.batches(context, device)[context.pack_rank]
    expected = truth(task, device, context.packs)
    allowed = 1e-5 if task.dtype == torch.float32 else 2e-2  # rounding of fp32, of bf16 products
    # Together on a CPU, where neighbours disturb; on a GPU one after the other, for lack of room.
    turns = [list(names)] if device.type == "cpu" else [[name] for name in names]
    base: float | None = None
    for turn in turns:
        runs: dict[str, Run] = {}
        bad: dict[str, tuple[str, str]] = {}
        for name in turn:
            try:
                run = Run(task, setting, POLICIES[name], context)
                found = run.gradients([batch])
            except REFUSALS as error:
                bad[name] = "failed", f"{type(error).__name__}: {error}"[:400]
                continue
            if all(abs(x - y) <= allowed * abs(y) for x, y in zip(found, expected, strict=True)):
                runs[name] = run
            else:
                bad[name] = "wrong", f"loss and norm are {found}, of one process {expected}"
        calls = {name: functools.partial(run.step, batch) for name, run in runs.items()}
        times = together(calls, context.group, device, seconds=seconds) if calls else {}
        for name in turn:
            status, note = bad.get(name, ("measured", ""))
            extra: dict[str, Any] = {"world": context.world}
            if name in runs:
                extra |= _extra(runs[name], batch, setting, POLICIES[name])
                extra["tokens_per_s"] = (
                    task.pack.tokens * context.packs / (1e-3 * times[name].median_ms)
                )
                base = times[name].median_ms if name == NONE else base
                if base is not None:
                    extra["ratio"] = times[name].median_ms / base
            sizes = batch.packing.lengths, batch.text_lengths
            yield harness.Row(
                name=NAME, case=f"{task.preset}, {setting.name}", pack=task.pack.name,
                shape={"tokens": task.pack.tokens, "dim": task.config.dim,
                       "depth": task.config.depth, "packs": context.packs,
                       "sp": context.dims.sp},
                dtype=str(task.dtype).removeprefix("torch."),
                work=flops.training_flops(task.config, *sizes) / context.dims.sp, ceiling=ceiling,
                sources=SOURCES, timing=times.get(name), status=status, note=note, peer=name,
                backend="triton" if device.type == "cuda" else "torch", direction="step",
                extra=extra,
            )  # fmt: skip
        del runs, calls


def _extra(
    run: Run, batch: Batch, setting: Setting, policy: ActivationCheckpointing
) -> dict[str, Any]:
    """Memory of this process: predicted and measured."""
    device, task = run.context.device, run.task
    rows = batch.arguments[0].shape[0]
    loss: list[Tensor] = []
    _, kept = memory(lambda: loss.append(run.forward(batch)), device)
    loss.pop().backward()
    run.optimizer.zero_grad(set_to_none=True)
    peak, _ = memory(functools.partial(run.step, batch), device)
    predicted = rows * saved_bytes_per_token(
        task.config, task.dtype.itemsize, policy, sp=run.context.dims.sp,
        fused=device.type == "cuda",
    )  # fmt: skip
    return {
        "peak_memory_bytes": peak,
        "kept_bytes": kept,
        "predicted_kept_bytes": int(predicted),
        "resident_bytes": run.resident_bytes(),
    }


# ---- the command ----


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(
        prog="python -m bench.policies", epilog=EXAMPLES,
        description="Step time and peak memory of a Goku under each policy.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    cuda = torch.cuda.is_available()
    made.add_argument("--device", default="cuda" if cuda else "cpu")
    made.add_argument("--preset", default="goku-2b" if cuda else "tiny", help=", ".join(PRESETS))
    made.add_argument("--seconds", type=float, default=5.0,
                      help="of timing per arrangement (per policy on a GPU) (5)")  # fmt: skip
    made.add_argument("--only", nargs="+", default=[], metavar="PART",
                      help="arrangements with one of these in their name, such as sp=2")  # fmt: skip
    made.add_argument("--policies", nargs="+", default=[], metavar="PART",
                      help="policies with one of these in their name")  # fmt: skip
    made.add_argument("--limit", type=float, default=float("inf"),
                      help="begin no arrangement after so many seconds")  # fmt: skip
    made.add_argument("--out", type=Path, default=harness.RESULTS, help="folder of results")
    return made


def _chosen(names: Sequence[str], parts: Sequence[str], option: str) -> list[str]:
    for part in parts:
        if not any(part in name for name in names):
            raise ValueError(f"{option} has {part!r}: allowed are parts of {list(names)}")
    return [n for n in names if not parts or any(part in n for part in parts)]


def main(arguments: Sequence[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    world = int(os.environ.get("WORLD_SIZE", "1"))
    try:
        if options.preset not in PRESETS:
            raise ValueError(f"--preset is {options.preset!r}: allowed are {', '.join(PRESETS)}")
        for name in ("seconds", "limit"):
            if not getattr(options, name) >= 0:
                raise ValueError(f"--{name} is {getattr(options, name)}: allowed are numbers >= 0")
        names = _chosen([s.name for s in settings(world)], options.only, "--only")
        policies = _chosen(list(POLICIES), options.policies, "--policies")
        with parallel_context(options.device, 5.0) as context:
            wanted = [s for s in settings(world) if s.name in names]
            return _run(wanted, policies, options, context)
    except ValueError as error:
        print(f"bench.policies: {error}", file=sys.stderr)
        return 2


def _run(
    wanted: Sequence[Setting], policies: Sequence[str], options: argparse.Namespace,
    context: ParallelContext,
) -> int:  # fmt: skip
    device = context.device
    task = Task.of(options.preset, device)
    ceiling = timing.matmul_ceiling(device, task.dtype, seconds=min(1.0, options.seconds))
    if context.is_main and device.type == "cpu":
        print(f"measuring a CPU ({harness.hardware(device)}) on a small model", flush=True)
    began, good = time.monotonic(), True
    for setting in wanted:
        if context.gather(time.monotonic() - began > options.limit)[0]:  # one clock for all
            if context.is_main:
                print(f"stopped after {options.limit:.0f} s")
            return 1
        dims = setting.dims.resolve(context.world)
        mesh = dims.build_mesh(device.type) if dist.is_initialized() else None
        here = dataclasses.replace(context, dims=dims, mesh=mesh)
        rows = list(measure(task, setting, policies, here, options.seconds, ceiling))
        good = good and all(row.status == "measured" for row in rows)
        if context.is_main:
            for record in harness.write(rows, device, options.out):
                print(harness.describe(record), flush=True)
    if context.is_main:
        print(f"rows are in {options.out}; python -m bench report shows them")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
