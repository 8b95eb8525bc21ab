"""What the ranks of test_sequence_parallel.py do; started by tests/launch.py."""

from __future__ import annotations

import gc
import os
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from goku_runtime.sequence_parallel import (
    SequenceParallel,
    gather_heads_scatter_seq,
    gather_seq_scatter_heads,
)

EXCHANGE = torch.ops._c10d_functional.all_to_all_single.default
COUNTED = torch.ops.c10d_functional.all_to_all_single  # CommDebugMode's name for it
PROJECTIONS = ("q", "k", "v", "out")


def masked_attention(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor) -> Tensor:
    """What the ranks run: all rows at once, other samples masked; padding rows are 0."""
    repeats = q.shape[1] // k.shape[1]
    assert repeats * k.shape[1] == q.shape[1]
    k, v = k.repeat_interleave(repeats, 1), v.repeat_interleave(repeats, 1)
    rows = torch.arange(q.shape[0])
    sample = torch.bucketize(rows, cu_seqlens[1:].long(), right=True)
    real = (rows < cu_seqlens[-1]).to(q.dtype)
    scores = torch.einsum("qhd,khd->hqk", q, k) / q.shape[2] ** 0.5
    scores = scores.masked_fill(sample[:, None] != sample[None, :], float("-inf"))
    return torch.einsum("hqk,khd->qhd", scores.softmax(-1), v) * real[:, None, None]


def plain_attention(q: Tensor, k: Tensor, v: Tensor, lengths: list[int]) -> Tensor:
    """The independent reference: sample by sample and head by head, no padding."""
    per_kv = q.shape[1] // k.shape[1]
    samples = []
    for qs, ks, vs in zip(q.split(lengths), k.split(lengths), v.split(lengths), strict=True):
        heads = []
        for head in range(q.shape[1]):
            keys, values = ks[:, head // per_kv], vs[:, head // per_kv]
            weights = torch.exp(qs[:, head] @ keys.T * q.shape[2] ** -0.5)
            heads.append(weights @ values / weights.sum(1, keepdim=True))
        samples.append(torch.stack(heads, 1))
    return torch.cat(samples)


def subgroups(rank: int, world: int, size: int) -> tuple[dist.ProcessGroup | None, int]:
    """(this rank's group of `size` consecutive ranks, its number); None instead of one rank."""
    if size == 1:
        return None, rank
    # A group of its own has the backend's timeout, 30 minutes, whatever the default group has.
    groups = [
        dist.new_group(list(range(first, first + size)), timeout=timedelta(seconds=20))
        for first in range(0, world, size)
    ]
    return groups[rank // size], rank // size


def inputs(case: dict[str, object], tokens: int) -> dict[str, Tensor]:
    """Tokens and projections, the same on every rank, in fp64."""
    heads, kv_heads, head_dim = case["heads"], case["kv_heads"], case["head_dim"]
    generator = torch.Generator().manual_seed(case["seed"])
    shapes = {"x": (tokens, 5), "q": (5, heads * head_dim), "k": (5, kv_heads * head_dim)}
    shapes |= {"v": shapes["k"], "out": (heads * head_dim, 3)}
    return {
        name: torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()
        for name, shape in shapes.items()
    }


def loss_weights(case: dict[str, object], tokens: int, rank: int) -> Tensor:
    """Each rank's own weights of the output: the objective is the sum over the ranks."""
    generator = torch.Generator().manual_seed(case["seed"] + 1 + rank)
    return torch.randn(tokens, 3, generator=generator, dtype=torch.float64)


def close(name: str, is_: Tensor, want: Tensor) -> None:
    """To 1e-12 of the largest value: fp64 has 2.2e-16, sums here have some hundred terms."""
    assert is_.shape == want.shape, (name, is_.shape, want.shape)
    if want.numel():
        error = (is_ - want).abs().max().item()
        assert error <= 1e-12 * max(1.0, want.abs().max().item()), (name, error)


def check_case(case: dict[str, object], group: dist.ProcessGroup | None) -> None:
    lengths: list[int] = case["lengths"]
    tokens = sum(lengths)
    sp = SequenceParallel(group, case["heads"], case["kv_heads"])
    offsets = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    shape = {"q": (-1, sp.heads, case["head_dim"]), "k": (-1, sp.kv_heads, case["head_dim"])}
    shape["v"] = shape["k"]

    # One process.
    single = inputs(case, tokens)
    qkv = {name: (single["x"] @ single[name]).view(shape[name]) for name in "qkv"}
    for part in qkv.values():
        part.retain_grad()
    want = plain_attention(*qkv.values(), lengths).flatten(1) @ single["out"]
    (want * sum(loss_weights(case, tokens, rank) for rank in range(sp.size))).sum().backward()

    # The ranks.
    own = inputs(case, tokens)
    shard = sp.shard(own["x"])
    rows, offset = sp.rows(tokens), sp.token_offset(tokens)
    assert shard.shape[0] == rows
    shards = {name: (shard @ own[name]).view(shape[name]) for name in "qkv"}
    for part in shards.values():
        part.retain_grad()
    calls = []

    def attn(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor) -> Tensor:
        calls.append(q.shape)
        assert cu_seqlens is offsets
        assert q.shape[0] == (tokens if case["exact"] else rows * sp.size)
        assert q.shape[1] == len(sp.heads_of(sp.rank))
        if sp.size == 1:
            assert all(a is b for a, b in zip((q, k, v), shards.values(), strict=True))
        return masked_attention(q, k, v, cu_seqlens)

    local = sp.attention(*shards.values(), offsets, attn, tokens=tokens if case["exact"] else None)
    assert len(calls) == (1 if sp.heads_of(sp.rank) else 0)
    mine = max(0, min(rows, tokens - offset))  # the rest is padding
    assert not local[mine:].any()
    out = sp.gather(local.flatten(1) @ own["out"], tokens)
    (out * loss_weights(case, tokens, sp.rank)).sum().backward()

    close("output", out.detach(), want.detach())
    for name, part in shards.items():
        close(f"d{name}", part.grad[:mine], qkv[name].grad[offset : offset + mine])
        assert not part.grad[mine:].any(), f"d{name} of padding"
    for name in ("x", *PROJECTIONS):
        grad = own[name].grad
        if group is not None:
            dist.all_reduce(grad, group=group)
        close(f"gradient of {name}", grad, single[name].grad)


def parity(rank: int, world: int, size: int, cases: list[dict[str, object]]) -> None:
    """The groups of `size` ranks share the cases among themselves."""
    group, number = subgroups(rank, world, size)
    for case in cases[number :: world // size]:
        try:
            check_case(case, group)
        except BaseException:
            print(f"failed on rank {rank} of groups of {size}: {case!r}", flush=True)
            raise


def elementwise(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor) -> Tensor:
    """No attention, but without a sum: its bits do not depend on how heads are split."""
    repeats = q.shape[1] // k.shape[1]
    return q * k.repeat_interleave(repeats, 1) + v.repeat_interleave(repeats, 1)


def low_precision(rank: int, world: int) -> None:
    """Every dtype travels bit for bit; sums over ranks round once."""
    for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
        for heads, kv_heads in ((world, 1), (2 * world + 3, 2 * world + 3), (7, 7), (14, 2)):
            sp = SequenceParallel(dist.group.WORLD, heads, kv_heads)
            tokens = 3 * world - 1
            generator = torch.Generator().manual_seed(heads)
            whole = [
                torch.randn(tokens, h, 8, generator=generator).to(dtype).requires_grad_()
                for h in (heads, kv_heads, kv_heads)
            ]
            own = [sp.shard(part.detach()).clone().requires_grad_() for part in whole]
            out = sp.attention(*own, None, elementwise, tokens=tokens)
            want = elementwise(*whole, None)
            assert out.dtype == dtype
            assert torch.equal(sp.gather(out, tokens), want)
            # Summed in bfloat16 one by one, 256 + 1 + 1 stays 256. With two key heads of seven
            # queries each, those who share one have no sum of their own that is rounded.
            of_head = [256, 0, 1, 0, 0, 0, 1] * 2 if kv_heads == 2 else [256] + [1] * (heads - 1)
            weights = torch.tensor(of_head, dtype=dtype)[None, :, None].expand_as(want)
            out.backward(sp.shard(weights))
            (dq,) = torch.autograd.grad(want, whole[0], weights)
            assert torch.equal(sp.gather(own[0].grad, tokens), dq)
            dk, dv = (sp.gather(part.grad, tokens) for part in own[1:])
            assert dk.dtype == dv.dtype == dtype
            of_v = weights.double().unflatten(1, (kv_heads, -1))
            of_k = of_v * whole[0].detach().double().unflatten(1, (kv_heads, -1))
            assert torch.equal(dv, of_v.sum(2).to(dtype)), (dtype, heads, kv_heads)
            # Four roundings, each to eps / 2: the product, the sum of one rank's heads, that of
            # repeated ones, and that of the ranks.
            for grad, terms in ((dk, of_k), (dv, of_v)):
                bound = 2 * torch.finfo(dtype).eps * terms.abs().sum(2)
                assert ((grad.double() - terms.sum(2)).abs() <= bound).all(), (dtype, heads)


def shards(rank: int, world: int) -> None:
    """shard and gather: inverse of each other, exact transposes, any axes, integers too."""
    sp = SequenceParallel(dist.group.WORLD, 3)
    for tokens in (world, world + 1, 5 * world - 1, 4 * world):
        for rest in ((), (3,), (2, 3)):
            x = torch.arange(tokens * 6).view(tokens, 6)[:, : max(1, sum(rest))]
            x = x.reshape(tokens, -1)[:, 0] if not rest else torch.randn(
                tokens, *rest, generator=torch.Generator().manual_seed(1)
            )  # fmt: skip
            part = sp.shard(x)
            assert part.shape == (sp.rows(tokens), *rest)
            assert torch.equal(sp.gather(part, tokens), x)
    x = torch.randn(7 * world - 1, 2, dtype=torch.bfloat16, requires_grad=True)
    part = sp.shard(x)
    part.backward(torch.ones_like(part))
    start, rows = sp.token_offset(len(x)), sp.rows(len(x))
    assert torch.equal(x.grad[start : start + rows], torch.ones_like(x[start : start + rows]))
    assert x.grad.sum() == 2 * min(rows, len(x) - start)
    part = torch.zeros(rows, 2, requires_grad=True)
    (sp.gather(part, len(x)).sum() * (1 + rank)).backward()
    want = torch.full((rows, 2), world * (world + 1) / 2)
    want[max(0, len(x) - start) :] = 0  # padding
    assert torch.equal(part.grad, want)


def functional(rank: int, world: int) -> None:
    """The two exchanges alone, uneven heads, any axes, differentiable twice."""
    group = dist.group.WORLD
    sp = SequenceParallel(group, 2 * world + 1)
    for shape, seq, head in (
        ((3 * world, sp.heads, 4), 0, 1),
        ((2, sp.heads, 3 * world), 2, 1),
        ((2, 3 * world, 2, sp.heads), -3, -1),
        ((2 * world, world - 1), 0, 1),  # the last rank has no heads
    ):
        whole = torch.randn(shape, generator=torch.Generator().manual_seed(0)).double()
        mine = sp.heads_of(rank) if whole.shape[head] == sp.heads else range(rank, rank + 1)
        mine = range(mine.start, min(mine.stop, whole.shape[head]))
        x = whole.chunk(world, seq)[rank].clone().requires_grad_()
        heads = gather_seq_scatter_heads(x, seq, head, group)
        assert torch.equal(heads, whole.narrow(head, mine.start, len(mine)))
        back = gather_heads_scatter_seq(heads, head, seq, group, heads=whole.shape[head])
        assert torch.equal(back, x)
        # (x^2)' = 2 x, and the gradient of (2 x)^2 is 8 x: each through two exchanges.
        (grad,) = torch.autograd.grad((back**2).sum(), x, create_graph=True)
        assert torch.equal(grad, 2 * x)
        (grad**2).sum().backward()
        assert torch.equal(x.grad, 8 * x)
    even = torch.randn(2, 4, 3 * world)
    assert torch.equal(
        gather_heads_scatter_seq(gather_seq_scatter_heads(even, 1, 2, group), 2, 1, group), even
    )


def counts(rank: int, world: int) -> None:
    """Two exchanges forward and two backward, on ranks without heads too; nothing else."""
    for heads in (1, world + 1):
        sp = SequenceParallel(dist.group.WORLD, heads, 1)
        q, k, v = (torch.randn(3, h, 4, requires_grad=True) for h in (heads, 1, 1))
        with CommDebugMode() as comm:
            out = sp.attention(q, k, v, None, elementwise)
        assert comm.get_comm_counts() == {COUNTED: 2}, comm.get_comm_counts()
        with CommDebugMode() as comm:
            out.sum().backward()
        assert comm.get_comm_counts() == {COUNTED: 2}, comm.get_comm_counts()


def layer(sp: SequenceParallel, x: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    q, k, v = (x @ weight).unflatten(1, (-1, 4)).split((sp.heads, sp.kv_heads, sp.kv_heads), 1)
    return sp.attention(q, k, v, offsets, masked_attention).flatten(1)


def recomputed(rank: int, world: int) -> None:
    """Selective checkpointing can save the exchanges: the backward then repeats none."""
    sp = SequenceParallel(dist.group.WORLD, 2 * world + 1, 1)
    offsets = torch.tensor([0, 3, 3 * world], dtype=torch.int32)
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(6, (sp.heads + 2) * 4, generator=generator, dtype=torch.float64)
    x = sp.shard(torch.randn(3 * world, 6, generator=generator, dtype=torch.float64))

    def save_exchanges(ctx, op, *args, **kwargs):
        if op is EXCHANGE:
            return CheckpointPolicy.MUST_SAVE
        return CheckpointPolicy.PREFER_RECOMPUTE

    grads = []
    for context, backward in ((None, 2), (False, 4), (True, 2)):
        x, weight = x.detach().requires_grad_(), weight.detach().requires_grad_()
        if context is None:
            out = layer(sp, x, weight, offsets)
        else:
            chosen = {}
            if context:
                chosen["context_fn"] = lambda: create_selective_checkpoint_contexts(save_exchanges)
            out = checkpoint(layer, sp, x, weight, offsets, use_reentrant=False, **chosen)
        with CommDebugMode() as comm:
            (out**2).sum().backward()
        # The second exchange of the forward is needed by nobody, and recomputation stops early:
        # it may be repeated or not.
        repeated = comm.get_comm_counts()[COUNTED] - 2
        assert (repeated == 0) if backward == 2 else (1 <= repeated <= 2), (context, repeated)
        grads.append((x.grad, weight.grad))
    for one, other in zip(grads[0] * 2, (*grads[1], *grads[2]), strict=True):
        assert torch.equal(one, other)


def compiled(rank: int, world: int) -> None:
    """One graph without breaks, for packs of any size, equal to eager."""
    sp = SequenceParallel(dist.group.WORLD, 3, 1)
    graphs = []

    def backend(graph, example_inputs):
        from torch._dynamo.backends.debugging import aot_eager

        graphs.append(graph)
        return aot_eager(graph, example_inputs)

    def step(x: Tensor, weight: Tensor, offsets: Tensor, tokens: int) -> Tensor:
        q, k, v = (x @ weight).unflatten(1, (-1, 4)).split((3, 1, 1), 1)
        return sp.attention(q, k, v, offsets, masked_attention, tokens=tokens)

    fast = torch.compile(step, backend=backend, fullgraph=True)
    generator = torch.Generator().manual_seed(rank)
    weight = torch.randn(6, 20, generator=generator, dtype=torch.float64, requires_grad=True)
    for tokens in (10 * world, 13 * world - 1, 7 * world + 1, 11 * world):
        offsets = torch.tensor([0, 3, 3, tokens], dtype=torch.int32)
        x = torch.randn(sp.rows(tokens), 6, generator=generator, dtype=torch.float64)
        results = []
        for run in (step, fast):
            x = x.detach().requires_grad_()
            out = run(x, weight, offsets, tokens)
            (out**2).sum().backward()
            results.append((out.detach(), x.grad, weight.grad))
            weight.grad = None
        for one, other in zip(*results, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
    # One for the first sizes, one for all others.
    assert len(graphs) == 2, len(graphs)
    x = torch.randn(2, 6, world + 1, dtype=torch.float64, requires_grad=True)

    def there_and_back(x: Tensor) -> Tensor:
        heads = gather_seq_scatter_heads(x, 1, 2, dist.group.WORLD)
        return gather_heads_scatter_seq(heads, 2, 1, dist.group.WORLD, heads=x.shape[2])

    out = torch.compile(there_and_back, backend="aot_eager", fullgraph=True)(x)
    assert torch.equal(out, x)
    (out**2).sum().backward()
    assert torch.equal(x.grad, 2 * x)


def leaves_nothing(rank: int, world: int) -> None:
    """A group that was used and destroyed has no work pending and no thread running."""
    threads = len(os.listdir("/proc/self/task"))
    group = dist.new_group()
    sp = SequenceParallel(group, world + 1)
    q, k, v = (torch.randn(2, sp.heads, 4, requires_grad=True) for _ in range(3))
    sp.attention(q, k, v, None, elementwise).sum().backward()
    # Private, and the only way to see collectives that nobody waited for.
    assert torch._C._distributed_c10d._get_work_registry_size() == 0
    dist.barrier()
    dist.destroy_process_group(group)
    del group, sp
    gc.collect()
    assert len(os.listdir("/proc/self/task")) <= threads
