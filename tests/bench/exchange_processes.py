"""What the processes of test_exchange.py and test_policies.py do; run by tests/launch.py.

Modules are patched without being restored: every launch is a process of its own.
"""

from __future__ import annotations

import os
from pathlib import Path

import torch
import torch.distributed as dist

from bench import exchange, exchange_cases, exchange_peers, policies, policy_runs
from bench.packs import Pack

# 3 heads for 2 ranks, an empty sample and a token count that 2 does not divide.
TINY = [
    exchange_cases.Case(name, kind, Pack("tiny", grids), heads, kv_heads, 4, torch.float32)
    for name, kind, grids, heads, kv_heads in (
        ("even", "exchange", ((1, 1, 6), (1, 1, 0), (1, 1, 3)), 4, 2),
        ("uneven", "exchange", ((1, 1, 5), (1, 1, 4)), 3, 3),
        ("even", "attention", ((1, 1, 6), (1, 1, 0), (1, 1, 3)), 4, 2),
    )
]
PEERS = ["--peers", "three", "torch context"]


def _exchange(*words: str) -> int:
    return exchange.main(["--device", "cpu", "--seconds", "0", *words])


def measures(rank: int, world: int, out: str) -> None:
    exchange.cases = lambda kind: TINY
    assert _exchange("--out", out, *PEERS) == 0


def a_wrong_result_is_code_1(rank: int, world: int, out: str) -> None:
    """Ours with k and v swapped, on one rank alone: all ranks learn of it."""
    right = exchange_peers.ours

    def swapped(case, group, device):
        way = right(case, group, device)
        wrong = exchange_peers.Way(lambda q, k, v: way.call(q, v, k))
        return wrong if rank == 1 else way

    exchange.cases = lambda kind: TINY[2:]
    exchange.PEERS = (exchange_peers.Peer(exchange_peers.OURS, swapped),)
    assert _exchange("--out", out) == 1
    exchange.PEERS = exchange_peers.PEERS


def a_failing_peer_is_written_down(rank: int, world: int, out: str) -> None:
    """Another's refusal is no failure of the run; ours is."""

    def refuses(case, group, device):
        raise NotImplementedError("no such heads")

    exchange.cases = lambda kind: TINY[:1]
    for name, code in ((exchange_peers.DEEPSPEED, 0), (exchange_peers.OURS, 1)):
        peers = [p for p in exchange_peers.PEERS if p.name == exchange_peers.OURS != name]
        exchange.PEERS = (*peers, exchange_peers.Peer(name, refuses))
        assert _exchange("--out", f"{out}/{code}") == code
    exchange.PEERS = exchange_peers.PEERS


def bad_input_is_code_2(rank: int, world: int) -> None:
    for words in (
        ["--shape", "7", "4", "3", "8"],  # 3 does not divide 4
        ["--shape", "1", "4", "4", "8"],  # one token for two ranks
        ["--shape", "5+x", "4", "4", "8"],
        ["--only", "nothing like it"],
        ["--peers", "nobody"],
        ["--device", "tpu"],
        ["--seconds", "nan"],
    ):
        assert _exchange(*words) == 2, words


def the_limit_is_code_1(rank: int, world: int, out: str) -> None:
    exchange.cases = lambda kind: TINY
    assert _exchange("--limit", "0", "--out", out) == 1
    assert not Path(out).exists()


def bytes_are_those_of_the_buffers(rank: int, world: int) -> None:
    """The closed form is what the ranks hold for each other."""
    for case in TINY:
        rows = case.rows_of(world)
        parallel = exchange_peers.SequenceParallel(dist.group.WORLD, case.heads, case.kv_heads)
        q = [len(parallel.heads_of(r)) for r in range(world)]
        kv = [len(parallel.kv_heads_of(r)) for r in range(world)]
        sent = [
            rows[r] * sum(q[p] + 2 * kv[p] for p in range(world) if p != r)
            + (sum(rows) - rows[r]) * q[r]
            for r in range(world)
        ]
        assert case.bytes(world, backward=False) == max(sent) * case.head_dim * 4


def policies_of_two(rank: int, world: int, out: str, port: int) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": str(rank)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    words = ["--device", "cpu", "--preset", "tiny-test", "--seconds", "0", "--only"]
    words += ["kept whole", "sp=2", "--policies", "none", "operators: attention"]
    policy_runs.SMALL_PACK = Pack("tiny", ((1, 4, 4), (1, 3, 3)))
    assert policies.main([*words, "--out", out]) == 0
