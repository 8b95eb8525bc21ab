"""Ranks that fail inside an exchange; started by test_faults.py.

    fault_processes.py STORE TIMEOUT SCENARIO ...

Each SCENARIO is the JSON of {"fault": "raise" | "kill" | "stop", "where": "forward" | "backward",
"victim": rank}, each played by WORLD ranks of its own, forked from this process. With "sp" the
exchange is that of a mesh's sp group, and a collective of all ranks follows it, as in a training
step: the other groups' exchanges go through, so that is where they notice. Ranks and this process
print lines of JSON. A rank ends with VICTIM_RAISED, SURVIVED after an error in the exchange,
or UNNOTICED if the exchange went through; a stopped rank is killed when all others have ended.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
import traceback
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from goku_runtime.mesh import ParallelDims, sequence_parallel_group
from goku_runtime.sequence_parallel import SequenceParallel

WORLD = 4
HEADS = 3  # the last rank has none
VICTIM_RAISED, SURVIVED, UNNOTICED = 11, 12, 13

# The victim enters the exchange at once and is hit there; the others follow later.
HIT_AFTER, OTHERS_FOLLOW_AFTER = 0.1, 0.4  # seconds


class Raised(Exception):
    pass


def say(**line: object) -> None:
    os.write(1, (json.dumps(line) + "\n").encode())  # one write, so that lines stay whole


def attn(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor) -> Tensor:
    return q * k + v


def fail(*_: object) -> None:
    raise Raised


def step(sp: SequenceParallel, fault: str = "", where: str = "", *, victim: bool = False) -> None:
    """One attention, forward and backward, with the fault in one of its exchanges."""

    def exchange_begins() -> None:
        if fault in ("kill", "stop"):
            if victim:
                number = signal.SIGKILL if fault == "kill" else signal.SIGSTOP
                threading.Timer(HIT_AFTER, os.kill, (os.getpid(), number)).start()
            else:
                time.sleep(OTHERS_FOLLOW_AFTER)

    raises = fault == "raise" and victim

    def attention(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor) -> Tensor:
        if raises and where == "forward":
            fail()
        out = attn(q, k, v, cu_seqlens)
        if raises and where == "backward":
            out.register_hook(fail)
        return out

    qkv = [torch.ones(64, HEADS, 32, requires_grad=True) for _ in range(3)]
    if where == "forward":
        exchange_begins()
    out = sp.attention(*qkv, torch.tensor([0, 256], dtype=torch.int32), attention)
    loss = out.sum()
    if where == "backward":
        exchange_begins()
    loss.backward()


def run(rank: int, store: str, timeout: float, scenario: dict[str, object]) -> int:
    fault, where, victim = scenario["fault"], scenario["where"], scenario["victim"]
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=WORLD,
        timeout=timedelta(seconds=timeout),
    )  # fmt: skip
    group = dist.group.WORLD
    if degree := scenario.get("sp"):
        mesh = ParallelDims(1, WORLD // degree, degree).build_mesh("cpu")
        group = sequence_parallel_group(mesh)
    sp = SequenceParallel(group, HEADS)
    step(sp)  # all is well
    began, exchanged = time.monotonic(), False
    try:
        step(sp, fault, where, victim=rank == victim)
        exchanged = True
        if degree:
            dist.all_reduce(torch.ones(1))
    except Raised:
        return VICTIM_RAISED
    except RuntimeError as error:
        seconds = time.monotonic() - began
        say(rank=rank, seconds=seconds, error=str(error), exchanged=exchanged)
        dist.destroy_process_group()  # which does not hang either
        return SURVIVED
    return UNNOTICED


def play(store: str, timeout: float, scenario: dict[str, object]) -> None:
    ranks: dict[int, int] = {}
    for rank in range(WORLD):
        child = os.fork()
        if not child:
            code = 1
            try:
                code = run(rank, store, timeout, scenario)
            except BaseException:
                traceback.print_exc()
                raise
            finally:
                sys.stderr.flush()
                os._exit(code)
        ranks[child] = rank
    codes, stopped = {}, set()
    while ranks:
        child, status = os.waitpid(-1, os.WUNTRACED)
        if os.WIFSTOPPED(status):
            stopped.add(child)
        else:
            codes[ranks.pop(child)] = os.waitstatus_to_exitcode(status)
        if stopped and set(ranks) <= stopped:
            for other in ranks:
                os.kill(other, signal.SIGKILL)
            stopped.clear()
    say(codes=[codes[rank] for rank in range(WORLD)])


def main() -> None:
    torch.set_num_threads(1)
    for number, scenario in enumerate(sys.argv[3:]):
        play(f"{sys.argv[1]}-{number}", float(sys.argv[2]), json.loads(scenario))


if __name__ == "__main__":
    main()
