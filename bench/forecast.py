"""What a compiled configuration of a memory-bound kernel can reach, estimated without a GPU.

Occupancy is exact arithmetic. The rest is an estimate that a measurement is to confirm or refute: a
pass over a row takes the longest of its traffic, of its instructions and of its chain of dependent
steps divided by the programs that a multiprocessor holds at once. Good for finding which of these
binds and for ordering configurations, not for a figure to be quoted.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from bench.machine_code import Loop

# Of a multiprocessor of sm_90 (CUDA C++ Programming Guide, "Compute Capabilities"; registers are
# given out to warps in units of 256, by four partitions of 16,384).
PROCESSORS = 132
PARTITIONS = 4
PARTITION_REGISTERS = 16_384
REGISTER_UNIT = 256
SHARED_BYTES = 228 * 1024
SHARED_RESERVED = 1024  # of every block
SHARED_UNIT = 128
MAX_WARPS, MAX_BLOCKS = 64, 32

CLOCK = 1.7e9  # Hz under load; 1.98 at most
# Bytes per second of a large copy (reads and writes): measured on an H200, from vendors' and
# libraries' figures for an H100.
COPY = {"H100": 3.0e12, "H200": 4.3e12}
# From the request to the data, of memory under load: between 600 and 800 ns. Idle it is about 500.
LATENCY = 700e-9

# Cycles until the next dependent instruction can issue, of what stands in a row's chain: published
# microbenchmarks of Ampere and Hopper give 23 to 33 for the first three, a barrier takes as long as
# the slowest warp. Two instructions in three wait for none before them.
_DEPENDENT = {"SHFL": 24, "LDS": 30, "BAR": 35, "MUFU": 20, "DFMA": 8, "DADD": 8, "F2F": 10}
_ISSUE = 1.5


@dataclass(frozen=True)
class Residency:
    """Blocks that a multiprocessor holds at once, and what allows no more."""

    blocks: int
    limit: str


def resident(registers: int, shared_bytes: int, threads: int) -> Residency:
    """Blocks of a kernel on one multiprocessor of sm_90."""
    warps = -(-threads // 32)
    per_warp = REGISTER_UNIT * -(-registers * 32 // REGISTER_UNIT)
    by_registers = PARTITIONS * (PARTITION_REGISTERS // per_warp) // warps if registers else 999
    shared = SHARED_UNIT * -(-(shared_bytes + SHARED_RESERVED) // SHARED_UNIT)
    limits = {
        "registers": by_registers,
        "shared memory": SHARED_BYTES // shared,
        "warps": MAX_WARPS // warps,
        "blocks": MAX_BLOCKS,
    }
    limit = min(limits, key=lambda name: limits[name])
    return Residency(limits[limit], limit)


@dataclass(frozen=True)
class Work:
    """What one pass of a kernel's loop moves, and how programs are laid out.

    read, written: bytes of memory. ahead: passes whose loads are under way beside the one that is
    computed (0: loads are waited for). programs: per multiprocessor, 0 for one per tile.
    """

    read: float
    written: float
    ahead: int
    programs: int


@dataclass(frozen=True)
class Forecast:
    """An estimate for one chip.

    blocks: at once on a multiprocessor. in_flight, needed: bytes of loads under way on a
    multiprocessor, and bandwidth times latency. cycles: of a pass, by what they are spent on.
    share: of the copy's bandwidth, 0 to 1. bound: which of `cycles` binds.
    """

    blocks: int
    in_flight: float
    needed: float
    cycles: Mapping[str, float]
    share: float

    @property
    def bound(self) -> str:
        return max(self.cycles, key=lambda name: self.cycles[name])


def forecast(loop: Loop, residency: Residency, threads: int, work: Work, chip: str) -> Forecast:
    """What `loop` reaches on `chip` ("H100" or "H200"); no blocks at all reach nothing."""
    warps = -(-threads // 32)
    fitting = residency.blocks
    held = min(work.programs or fitting, fitting)
    if held == 0:
        return Forecast(0, 0.0, 0.0, {"does not fit": math.inf}, 0.0)
    # Programs that do not fit wait until all others, equally long, are through.
    waves = math.ceil((work.programs or held) / held)
    even = (work.programs or held) / (waves * held)
    issue = loop.instructions * warps / PARTITIONS
    alone = _ISSUE * loop.instructions * math.ceil(warps / PARTITIONS)
    chain = alone + sum(cost * loop.counts.get(name, 0) for name, cost in _DEPENDENT.items())
    wait = LATENCY * CLOCK
    period = max(chain, wait / work.ahead) if work.ahead else chain + wait
    bandwidth = COPY[chip] / PROCESSORS / CLOCK
    cycles = {
        "traffic": (work.read + work.written) / bandwidth,
        "instructions": issue,
        "chain": period / held,
    }
    share = even * cycles["traffic"] / max(cycles.values())
    in_flight = held * work.read * max(1, work.ahead)
    return Forecast(held, in_flight, COPY[chip] * LATENCY / PROCESSORS, cycles, share)


# Tensors of (T, ...) that each kernel reads and writes in a pass of its loop. Of rows_kernel a
# program has the queries or the keys.
_STREAMS = {
    "forward_kernel": (("x", "branch"), ("y", "out")),
    "backward_kernel": (("dy", "dout", "x", "branch"), ("dx", "dbranch", "dscale", "dgate")),
    "rows_kernel": (("q", "q_grad"), ("q_out",)),
    "sums_kernel": (("prediction", "target"), ()),
    "gradient_kernel": (("prediction", "target"), ("result",)),
    "noise_kernel": (("x1",), ("x_t", "target")),
}


def streams(kernel: str) -> bool:
    """Whether `kernel` is one of those that this module can estimate."""
    return kernel in _STREAMS


def work(kernel: str, arguments: Mapping[str, Any], loop: Loop, programs: int) -> Work:
    """The work of one pass, from the arguments of a launch."""
    rows = arguments.get("ROWS", 1)
    if "GROUPS" in arguments:
        rows = arguments["GROUPS"] * arguments["GROUP"] / arguments["D"]

    def bytes_of(names: tuple[str, ...]) -> float:
        there = [x for name in names if (x := arguments.get(name)) is not None]
        return sum(rows * x.element_size() * x.numel() / x.shape[0] for x in there)

    read, written = (bytes_of(names) for names in _STREAMS[kernel])
    stages = arguments.get("STAGES", 1)
    return Work(read, written, stages - 1 if loop.asynchronous else 0, programs)
