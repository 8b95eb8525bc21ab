"""Who takes part in `bench.exchange`: ways of sharing the attention of one packed batch among ranks.

Every peer gets this rank's rows of q, k and v and returns this rank's rows of the result; all run the
same attention (`bench.exchange_cases`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh

from bench.cases import Absent
from bench.exchange_cases import Case, Kind, attention, offsets
from bench.peers import load
from goku_runtime.sequence_parallel import SequenceParallel

OURS, NAIVE, DEEPSPEED, CONTEXT = (
    "goku_runtime", "three all-to-alls", "DeepSpeed DistributedAttention", "torch context_parallel"
)  # fmt: skip
ALONE, RAW = "attention alone, no exchange", "all_to_all_single alone"

Shared = Callable[[Tensor, Tensor, Tensor], Tensor]  # shards of q, k, v -> the result's shard


@dataclass(frozen=True)
class Way:
    """What a peer made of a case: a call, and what it runs in, its backward included."""

    call: Shared
    around: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext


@dataclass(frozen=True)
class Peer:
    """One way of doing it.

    make: case, group, device -> the way; raises Absent with the reason.
    kinds: of cases that it can take part in.
    """

    name: str
    make: Callable[[Case, ProcessGroup, torch.device], Way]
    kinds: Sequence[Kind] = ("exchange", "attention")


# ---- ours, and what one would write first ----


def ours(case: Case, group: ProcessGroup, device: torch.device) -> Way:
    """goku_runtime's: q, k and v in one exchange, padding stays at home."""
    parallel = SequenceParallel(group, case.heads, case.kv_heads)
    cu, attn, tokens = offsets(case, device), attention(case), case.pack.tokens
    return Way(lambda q, k, v: parallel.attention(q, k, v, cu, attn, tokens=tokens))


class _AllToAll(torch.autograd.Function):
    """x (P, ...): block p goes to rank p. The backward is the same."""

    @staticmethod
    def forward(ctx: Any, group: ProcessGroup, x: Tensor) -> Tensor:
        ctx.group = group
        received = torch.empty_like(x)
        dist.all_to_all_single(received, x, group=group)
        return received

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor]:
        return None, _AllToAll.apply(ctx.group, grad.contiguous())


def naive(case: Case, group: ProcessGroup, device: torch.device) -> Way:
    """Ulysses with an exchange for each of q, k, v and the result, and a permute before or after."""
    size = dist.get_world_size(group)
    if case.heads % size or case.kv_heads % size:
        raise Absent(f"{case.heads} and {case.kv_heads} heads: it needs multiples of {size}")
    cu, attn = offsets(case, device), attention(case)

    def to_heads(x: Tensor) -> Tensor:
        blocks = x.unflatten(1, (size, -1)).transpose(0, 1).contiguous()
        return _AllToAll.apply(group, blocks).flatten(0, 1)

    def to_rows(x: Tensor) -> Tensor:
        blocks = _AllToAll.apply(group, x.unflatten(0, (size, -1)).contiguous())
        return blocks.transpose(0, 1).flatten(1, 2)

    return Way(lambda q, k, v: to_rows(attn(to_heads(q), to_heads(k), to_heads(v), cu)))


# ---- others ----


def deepspeed(case: Case, group: ProcessGroup, device: torch.device) -> Way:
    """DeepSpeed's, sequence first, with its own idea of the group where heads are uneven."""
    wrapper = load("deepspeed.sequence.layer", "DistributedAttention")
    comm, groups = load("deepspeed", "comm"), load("deepspeed.utils", "groups")
    size = dist.get_world_size(group)
    if case.kv_heads < size:
        raise Absent(f"{case.kv_heads} KV heads: it needs one a rank, {size}")
    if not comm.is_initialized():
        comm.init_distributed(
            dist_backend=dist.get_backend(group), dist_init_required=False, verbose=False
        )
    if groups.mesh_device is None:
        # Its uneven split asks these groups, not the given one, for this process's rank.
        groups.mesh_device = comm.initialize_mesh_device(
            (1, size), ("data_parallel", "sequence_parallel")
        )
    cu, attn = offsets(case, device), attention(case)

    def local(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attn(q[:, 0], k[:, 0], v[:, 0], cu)[:, None]

    layer = wrapper(local, groups.mesh_device.get_group("sequence_parallel"))
    return Way(lambda q, k, v: layer(q[:, None], k[:, None], v[:, None], 1)[:, 0])


def ring(case: Case, group: ProcessGroup, device: torch.device) -> Way:
    """torch's context parallelism: torch's attention, within its context."""
    parallel = load("torch.distributed.tensor.experimental", "context_parallel")
    # No public switch: the default reorders tokens for causal masks and refuses any other mask.
    settings = load("torch.distributed.tensor.experimental._attention", "_cp_options")
    size = dist.get_world_size(group)
    if len(case.pack.lengths) != 1:
        raise Absent("its attention takes one sample: no packed batch")
    if case.pack.tokens % size:
        raise Absent(f"{case.pack.tokens} tokens: it needs a multiple of {size}")
    if case.kv_heads != case.heads:
        raise Absent("its attention takes as many KV heads as heads")
    mesh = DeviceMesh.from_group(group, device.type)

    @contextlib.contextmanager
    def around() -> Iterator[None]:
        settings.enable_load_balance = False
        # It insists on a buffer to shard; our tokens are sharded already.
        buffer = torch.zeros(size, device=device)
        with parallel(mesh, buffers=[buffer], buffer_seq_dims=[0], no_restore_buffers={buffer}):
            yield

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        heads_q, heads_k, heads_v = (x.transpose(0, 1)[None] for x in (q, k, v))
        return F.scaled_dot_product_attention(heads_q, heads_k, heads_v)[0].transpose(0, 1)

    return Way(attend, around)


PEERS = (
    Peer(OURS, ours),
    Peer(NAIVE, naive),
    Peer(DEEPSPEED, deepspeed),
    Peer(CONTEXT, ring, kinds=("attention",)),
)


# ---- parts: what bounds all of them; backward or not -> it is done ----


def alone(case: Case, group: ProcessGroup, device: torch.device) -> Callable[[bool], object]:
    """The attention of this rank's heads over the whole pack, whose numbers are there already.

    Raises:
        Absent: this rank has no heads, or uses its key heads unequally often.
    """
    parallel = SequenceParallel(group, case.heads, case.kv_heads)
    count = len(parallel.heads_of(parallel.rank))
    kv_count = len(parallel.kv_heads_of(parallel.rank))
    if not count or count % kv_count:
        raise Absent(f"{count} heads use {kv_count} KV heads on rank {parallel.rank}")
    attn, cu = attention(case), offsets(case, device)
    q, k, v = (
        torch.randn(
            case.pack.tokens, n, case.head_dim, dtype=case.dtype, device=device, requires_grad=True
        )
        for n in (count, kv_count, kv_count)
    )
    grad = torch.randn_like(q)

    def attend(backward: bool) -> object:
        out = attn(q, k, v, cu)
        return torch.autograd.grad(out, (q, k, v), grad) if backward else out

    return attend


def raw(case: Case, group: ProcessGroup, device: torch.device) -> Callable[[bool], object]:
    """The collectives of one forward, or of the backward too: the same bytes and splits, no copies."""
    parallel = SequenceParallel(group, case.heads, case.kv_heads)
    ranks = range(parallel.size)
    q = [len(parallel.heads_of(rank)) for rank in ranks]
    packed = [q[rank] + 2 * len(parallel.kv_heads_of(rank)) for rank in ranks]
    rows, me = case.rows_of(parallel.size), parallel.rank

    def sizes(heads: Sequence[int]) -> tuple[list[int], list[int], Tensor, Tensor]:
        """What is sent and received by rank, and flat buffers of both."""
        send = [rows[me] * count * case.head_dim for count in heads]
        receive = [count * heads[me] * case.head_dim for count in rows]
        mine, whole = (
            torch.ones(sum(part), dtype=case.dtype, device=device) for part in (send, receive)
        )
        return send, receive, mine, whole

    send, receive, mine, whole = sizes(packed)
    results, parts, my_result, whole_result = sizes(q)

    def exchange(backward: bool) -> None:
        dist.all_to_all_single(whole, mine, receive, send, group=group)
        dist.all_to_all_single(my_result, whole_result, results, parts, group=group)
        if backward:
            dist.all_to_all_single(whole_result, my_result, parts, results, group=group)
            dist.all_to_all_single(mine, whole, send, receive, group=group)

    return exchange
