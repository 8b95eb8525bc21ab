"""Sequence parallelism: equal to one process, two exchanges each way, no waiting for a device."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

from goku_runtime.sequence_parallel import (
    SequenceParallel,
    exchange_bytes,
    gather_heads_scatter_seq,
    gather_seq_scatter_heads,
)

SCRIPT = Path(__file__).with_name("sequence_parallel_processes.py")
SIZES = (1, 2, 4, 8)


@pytest.fixture
def fake_group() -> Iterator[Callable[..., dist.ProcessGroup]]:
    """fake_group(rank, size) -> a group whose collectives move nothing; one at a time."""

    def make(rank: int, size: int, backend: str = "fake") -> dist.ProcessGroup:
        if dist.is_initialized():
            dist.destroy_process_group()
        dist.init_process_group(backend, store=FakeStore(), rank=rank, world_size=size)
        assert dist.group.WORLD is not None
        return dist.group.WORLD

    yield make
    if dist.is_initialized():
        dist.destroy_process_group()


@st.composite
def heads_and_kv_heads(draw: st.DrawFn) -> tuple[int, int]:
    heads = draw(st.one_of(st.integers(1, 48), st.sampled_from([12, 24, 28, 40])))
    return heads, draw(st.sampled_from([n for n in range(1, heads + 1) if heads % n == 0]))


@st.composite
def parity_case(draw: st.DrawFn, size: int) -> dict[str, object]:
    heads, kv_heads = draw(heads_and_kv_heads())
    lengths = draw(st.lists(st.one_of(st.just(0), st.integers(0, 21)), min_size=1, max_size=6))
    lengths[draw(st.integers(0, len(lengths) - 1))] += max(0, size - sum(lengths))
    return {
        "heads": heads,
        "kv_heads": kv_heads,
        "head_dim": draw(st.sampled_from([1, 2, 3, 8])),
        "lengths": lengths,
        "exact": draw(st.booleans()),
        "seed": draw(st.integers(0, 2**20)),
    }


def drawn(strategy: st.SearchStrategy[dict[str, object]], count: int) -> list[dict[str, object]]:
    """Cases for one launch of processes; a rank that fails prints its case for `WORTH_KEEPING`."""
    cases: list[dict[str, object]] = []

    @settings(
        max_examples=count,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(strategy)
    def collect(case: dict[str, object]) -> None:
        cases.append(case)

    collect()
    return cases


def case(heads: int, kv_heads: int, lengths: list[int], *, exact: bool) -> dict[str, object]:
    return {
        "heads": heads, "kv_heads": kv_heads, "lengths": lengths, "exact": exact,
        "head_dim": 4, "seed": 0,
    }  # fmt: skip


WORTH_KEEPING = [
    case(28, 28, [9, 0, 30], exact=True),  # uneven heads
    case(28, 4, [9, 0, 30], exact=False),  # and key heads that some ranks use unequally often
    case(3, 1, [0, 0, 17, 0], exact=True),  # ranks without heads
    case(1, 1, [9], exact=True),  # two ranks of eight have nothing but padding
    case(1, 1, [9], exact=False),
    case(8, 2, [8], exact=True),  # a key head on several ranks
    case(48, 12, [5, 21, 2], exact=True),
]


@pytest.mark.slow
def test_attention_equals_one_process(run_processes: Callable[..., str]) -> None:
    """Output, dq, dk, dv, and the gradients of input and projections summed over the ranks."""
    calls = [
        ("parity", {"size": size, "cases": WORTH_KEEPING + drawn(parity_case(size), 30)})
        for size in SIZES
    ]
    run_processes(8, SCRIPT, *calls, timeout=200, group_timeout=20)


@pytest.mark.slow
def test_eight_ranks(run_processes: Callable[..., str]) -> None:
    output = run_processes(
        8, SCRIPT, "low_precision", "shards", "functional", "counts", "leaves_nothing"
    )
    assert "warn" not in output.lower(), output


@pytest.mark.long
@pytest.mark.slow
def test_two_ranks_compiled_and_recomputed(run_processes: Callable[..., str]) -> None:
    run_processes(2, SCRIPT, "low_precision", "recomputed", "compiled", timeout=200)


# ---- without processes ---------------------------------------------------------------------------


def attend(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Stands for attention: shapes and connections alone."""
    repeats = q.shape[1] // k.shape[1]
    return q * k.repeat_interleave(repeats, 1) + v.repeat_interleave(repeats, 1)


class Bytes(TorchDispatchMode):
    """Bytes that leave for other ranks in the exchanges."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        self.rank = rank
        self.exchanges = self.sent = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if func is torch.ops._c10d_functional.all_to_all_single.default:
            buffer, _, send, _ = args
            self.exchanges += 1
            self.sent += (sum(send) - send[self.rank]) * buffer.element_size()
            assert sum(send) == buffer.numel()
        else:
            assert "c10d" not in func.namespace or func.name().endswith("wait_tensor"), func
        return func(*args, **(kwargs or {}))


@given(
    shape=heads_and_kv_heads(),
    size=st.sampled_from([2, 3, 4, 8, 16, 64]),
    more=st.integers(0, 200),
    exact=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float64]),
)
@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_counts_and_bytes_are_the_closed_form(
    fake_group: Callable[..., dist.ProcessGroup],
    shape: tuple[int, int],
    size: int,
    more: int,
    exact: bool,
    dtype: torch.dtype,
) -> None:
    (heads, kv_heads), tokens, head_dim = shape, size + more, 4
    totals = [0, 0]
    for rank in range(size):
        # The closed form counts every rank; a few are run.
        arguments = (heads, kv_heads, head_dim, dtype.itemsize, size)
        rows = -(-tokens // size)
        moved = tokens if exact else rows * size
        want = [
            exchange_bytes(moved, *arguments, rank=rank, backward=backward)
            for backward in (False, True)
        ]
        totals = [total + one for total, one in zip(totals, want, strict=True)]
        if rank not in (0, size // 2, size - 1):
            continue
        sp = SequenceParallel(fake_group(rank, size), heads, kv_heads)
        # On meta: the fake group cannot play a rank that sends nothing and yet receives.
        q, k, v = (
            torch.empty(rows, h, head_dim, dtype=dtype, device="meta", requires_grad=True)
            for h in (heads, kv_heads, kv_heads)
        )
        with Bytes(rank) as forward:
            out = sp.attention(q, k, v, None, attend, tokens=tokens if exact else None)
        with Bytes(rank) as backward:
            out.backward(torch.zeros_like(out))
        assert (forward.exchanges, backward.exchanges) == (2, 2)
        assert [forward.sent, backward.sent] == want
    assert totals[0] == totals[1]


def test_bytes_of_the_even_case() -> None:
    """(2 h + 2 h_kv) (N / P) (P - 1) / P elements a rank and layer."""
    for heads, kv_heads, size in ((32, 32, 8), (32, 8, 8), (48, 16, 16), (8, 8, 1)):
        tokens, head_dim = 1024 * size, 128
        elements = (2 * heads + 2 * kv_heads) * head_dim * (tokens // size) * (size - 1) // size
        for rank in range(size):
            for backward in (False, True):
                assert elements * 2 == exchange_bytes(
                    tokens, heads, kv_heads, head_dim, 2, size, rank=rank, backward=backward
                )


class NoWaiting(TorchDispatchMode):
    """Fails at what reads a device's values or carries a tensor from one device to another."""

    REFUSED = ("_local_scalar_dense", "nonzero", "item", "equal", "unique", "masked_select")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        name = func.overloadpacket.__name__
        assert name not in self.REFUSED, name
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (list, tuple)) else (result,):
            # A tensor on the host would be one on its way from or to the device.
            assert not isinstance(tensor, Tensor) or tensor.device.type == "meta", name
        return result


@pytest.mark.parametrize("rank", [0, 1, 7])
@pytest.mark.parametrize(("heads", "kv_heads"), [(16, 16), (28, 4), (3, 1)])
@pytest.mark.parametrize("tokens", [None, 37])
def test_nothing_waits_for_a_device(
    fake_group: Callable[..., dist.ProcessGroup],
    rank: int,
    heads: int,
    kv_heads: int,
    tokens: int | None,
) -> None:
    """Forward and backward run on tensors without values, so that no value can be looked at."""
    sp = SequenceParallel(fake_group(rank, 8), heads, kv_heads)
    q, k, v = (
        torch.empty(5, h, 4, device="meta", requires_grad=True) for h in (heads, kv_heads, kv_heads)
    )
    cu_seqlens = torch.empty(4, dtype=torch.int32, device="meta")
    seen = []

    def attn(q: Tensor, k: Tensor, v: Tensor, offsets: Tensor) -> Tensor:
        seen.append(offsets is cu_seqlens)
        return attend(q, k, v, offsets)

    with NoWaiting():
        out = sp.attention(q, k, v, cu_seqlens, attn, tokens=tokens)
        whole = sp.gather(out, tokens or 40)
        sp.shard(whole).sum().backward()
    assert whole.shape == (tokens or 40, heads, 4)
    assert q.grad is not None
    assert q.grad.shape == q.shape
    assert k.grad is not None
    assert k.grad.shape == k.shape
    assert all(seen)
    with pytest.raises(AssertionError, match="_local_scalar_dense"), NoWaiting():
        out.sum().item()  # the check itself works


def test_copies(fake_group: Callable[..., dist.ProcessGroup]) -> None:
    """One pass over the data on either side of an exchange, none where it can be sent as it is."""

    class Copies(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.elements = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            result = func(*args, **(kwargs or {}))
            if func.overloadpacket.__name__ in {"copy_", "cat", "clone", "add_", "_to_copy"}:
                self.elements += (
                    result.numel() if func.overloadpacket.__name__ != "copy_" else args[1].numel()
                )
            return result

    sp = SequenceParallel(fake_group(1, 8), 16)
    x = [torch.zeros(4, 16, 8, requires_grad=True) for _ in range(3)]
    one = x[0].numel()
    outputs = []

    class First(torch.autograd.Function):  # an attention whose own copies do not count
        @staticmethod
        def forward(ctx, q, k, v):  # type: ignore[no-untyped-def]
            outputs.append((q.data_ptr(), k.data_ptr(), v.data_ptr()))
            return q.new_zeros(q.shape)

        @staticmethod
        def backward(ctx, grad):  # type: ignore[no-untyped-def]
            return grad, grad, grad

    with Copies() as forward:
        out = sp.attention(*x, None, lambda q, k, v, _: First.apply(q, k, v))
    # Send buffer of q, k, v; then the join of the heads.
    assert forward.elements == 3 * one + one
    item = x[0].element_size()
    assert outputs == [(outputs[0][0], outputs[0][0] + 2 * 8 * item, outputs[0][0] + 4 * 8 * item)]
    with Copies() as backward:
        out.backward(torch.zeros_like(out))
    # The output's send buffer; dq, dk, dv into one piece; their join.
    assert backward.elements == one + 3 * one + 3 * one


# ---- who has what --------------------------------------------------------------------------------


@given(shape=heads_and_kv_heads(), size=st.integers(1, 70))
@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_heads_of_ranks(
    fake_group: Callable[..., dist.ProcessGroup], shape: tuple[int, int], size: int
) -> None:
    heads, kv_heads = shape
    sp = SequenceParallel(fake_group(size - 1, size), heads, kv_heads)
    assert (sp.rank, sp.size) == (size - 1, size)
    ranges = [sp.heads_of(rank) for rank in range(size)]
    assert [head for part in ranges for head in part] == list(range(heads))
    counts = [len(part) for part in ranges]
    assert counts == sorted(counts, reverse=True)
    assert counts[0] - counts[-1] <= 1
    for rank, part in enumerate(ranges):
        used = {head // (heads // kv_heads) for head in part}
        assert set(sp.kv_heads_of(rank)) == used
    for rank in (-1, size):
        with pytest.raises(ValueError, match=f"rank is {rank}; .* 0 to {size - 1}"):
            sp.heads_of(rank)


def test_rows_and_offsets(fake_group: Callable[..., dist.ProcessGroup]) -> None:
    for rank in range(8):
        sp = SequenceParallel(fake_group(rank, 8), 3)
        assert [sp.rows(tokens) for tokens in (8, 9, 16, 17)] == [1, 2, 2, 3]
        assert [sp.token_offset(tokens) for tokens in (8, 9, 17)] == [rank, 2 * rank, 3 * rank]
        assert sp.shard(torch.arange(9)).tolist() == [[0, 1], [2, 3], [4, 5], [6, 7], [8, 0], [0, 0]][
            min(rank, 5)
        ]  # fmt: skip


def test_one_process_is_the_identity(fake_group: Callable[..., dist.ProcessGroup]) -> None:
    q, k = torch.randn(5, 4, 2), torch.randn(5, 2, 2)
    offsets = torch.tensor([0, 5], dtype=torch.int32)
    result = torch.empty_like(q)

    def attn(*arguments: Tensor) -> Tensor:
        assert all(a is b for a, b in zip(arguments, (q, k, k, offsets), strict=True))
        return result

    for group in (None, fake_group(0, 1)):
        sp = SequenceParallel(group, 4, 2)
        assert (sp.rank, sp.size, sp.rows(5), sp.token_offset(5)) == (0, 1, 5, 0)
        assert sp.attention(q, k, k, offsets, attn) is result
        assert sp.attention(q, k, k, offsets, attn, tokens=5) is result
        assert sp.shard(q) is q
        assert sp.gather(q, 5) is q
        assert gather_seq_scatter_heads(q, 0, 1, group) is q
        assert gather_heads_scatter_seq(q, 1, 0, group) is q
    assert exchange_bytes(5, 4, 2, 2, 4, 1) == 0


# ---- errors --------------------------------------------------------------------------------------


def test_bad_construction(fake_group: Callable[..., dist.ProcessGroup]) -> None:
    group = fake_group(0, 4)
    for heads in (0, 2.5, "8", True, None):
        with pytest.raises(ValueError, match=f"^heads is {heads!r}; at least 1, an integer"):
            SequenceParallel(None, heads)  # type: ignore[arg-type]
    for heads in (2.0, "2", True):
        with pytest.raises(ValueError, match=f"kv_heads is {heads!r}; with 8 heads a divisor"):
            SequenceParallel(None, 8, heads)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="kv_heads is 3; with 8 heads a divisor of 8"):
        SequenceParallel(group, 8, 3)
    with pytest.raises(ValueError, match="kv_heads is 0"):
        SequenceParallel(group, 8, 0)
    outside = dist.new_group([1, 2])
    with pytest.raises(ValueError, match="this process is not in it"):
        SequenceParallel(outside, 8)
    with pytest.raises(ValueError, match="this process is not in it"):
        gather_seq_scatter_heads(torch.zeros(2, 2), 0, 1, outside)
    with pytest.raises(ValueError, match="group is a DeviceMesh; a ProcessGroup is needed"):
        SequenceParallel(dist.device_mesh.init_device_mesh("cpu", (4,)), 8)  # type: ignore[arg-type]


def test_bad_attention(fake_group: Callable[..., dist.ProcessGroup]) -> None:
    sp = SequenceParallel(fake_group(0, 4), 8, 2)
    q, k = torch.zeros(3, 8, 5), torch.zeros(3, 2, 5)

    def fails(match: str, *qkv: Tensor, attn=attend, tokens: int | None = None) -> None:  # type: ignore[no-untyped-def]
        with pytest.raises(ValueError, match=match):
            sp.attention(*qkv, None, attn, tokens=tokens)

    fails(r"q has shape \(3, 7, 5\); \(rows, 8 heads, head_dim\)", q[:, 1:], k, k)
    fails(r"k has shape \(3, 8, 5\); \(rows, 2 heads, head_dim\)", q, q, k)
    fails(r"v has shape \(6, 5\)", q, k, k.flatten(0, 1))
    fails(r"v has shape \(2, 2, 5\) and q \(3, 8, 5\); rows and head_dim", q, k, k[1:])
    fails(r"k has shape \(3, 2, 4\) and q \(3, 8, 5\)", q, k[..., 1:], k)
    fails("k is torch.bfloat16 and q torch.float32; one dtype", q, k.bfloat16(), k)
    fails("v is torch.float64 and q torch.float32", q, k, k.double())
    fails("v is on meta and q on cpu", q, k, k.to("meta"))
    fails("q has 3 rows; 13 tokens on 4 ranks are 4 rows each", q, k, k, tokens=13)
    fails("q has 3 rows; 8 tokens on 4 ranks are 2 rows each", q, k, k, tokens=8)
    fails("tokens is 3; with 4 ranks at least 4", q[:1], k[:1], k[:1], tokens=3)
    fails(
        r"attn returned torch.float32 of shape \(12, 10\) .* queries of shape \(12, 2, 5\)",
        q, k, k, attn=lambda q, k, v, cu_seqlens: q.flatten(1),
    )  # fmt: skip
    fails(
        "attn returned torch.float64 .* for torch.float32",
        q, k, k, attn=lambda q, k, v, cu_seqlens: q.double(),
    )  # fmt: skip
    # Alone it is attn's own result, whatever that is.
    assert SequenceParallel(None, 8, 2).attention(q, k, k, q, lambda q, k, v, cu_seqlens: k) is k
    with pytest.raises(ValueError, match="tokens is 3; with 4 ranks"):
        sp.rows(3)
    with pytest.raises(ValueError, match="tokens is 2; with 4 ranks"):
        sp.shard(torch.zeros(2, 3))
    with pytest.raises(ValueError, match="no axes"):
        sp.shard(torch.tensor(1.0))
    with pytest.raises(ValueError, match=r"x has shape \(3, 2\); 8 tokens on 4 ranks are 2 rows"):
        sp.gather(torch.zeros(3, 2), 8)


def test_autocast_makes_what_travels_small(fake_group: Callable[..., dist.ProcessGroup]) -> None:
    """What attention would cast, q and k in fp32 after their rotation, is cast before it travels."""
    sp = SequenceParallel(fake_group(0, 4), 8)
    q = torch.zeros(3, 8, 5)
    seen = []

    def attn(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor) -> Tensor:
        seen.append({q.dtype, k.dtype, v.dtype})
        return torch.nn.functional.scaled_dot_product_attention(q, k, v)

    with torch.autocast("cpu", torch.bfloat16):
        assert sp.attention(q, q, q.bfloat16(), q, attn).dtype == torch.bfloat16
        assert sp.attention(*[q.double()] * 3, q, attn).dtype == torch.float64
    assert sp.attention(q, q, q, q, attn).dtype == torch.float32
    assert seen == [{torch.bfloat16}, {torch.float64}, {torch.float32}]


def test_a_group_on_another_device(fake_group: Callable[..., dist.ProcessGroup]) -> None:
    group = fake_group(0, 4, "cuda:fake")
    sp = SequenceParallel(group, 8)
    q = torch.zeros(3, 8, 5)
    with pytest.raises(ValueError, match="q is on cpu; the group serves cuda"):
        sp.attention(q, q, q, q, attend)
    for call in (
        lambda: sp.gather(q, 12),
        lambda: gather_seq_scatter_heads(q, 0, 1, group),
        lambda: gather_heads_scatter_seq(torch.zeros(4, 2), 1, 0, group),
    ):
        with pytest.raises(ValueError, match="x is on cpu; the group serves cuda"):
            call()


def test_bad_functional_forms(fake_group: Callable[..., dist.ProcessGroup]) -> None:
    group = fake_group(1, 4)
    x = torch.zeros(4, 8, 5)
    for seq, head in ((0, 0), (1, -2)):
        with pytest.raises(ValueError, match="both axis"):
            gather_seq_scatter_heads(x, seq, head, group)
    with pytest.raises(ValueError, match="seq_dim is 3; x has 3 axes"):
        gather_seq_scatter_heads(x, 3, 0, group)
    with pytest.raises(ValueError, match="head_dim is -4; x has 3 axes"):
        gather_heads_scatter_seq(x, -4, 0, group)
    with pytest.raises(ValueError, match="no heads"):
        gather_seq_scatter_heads(x[:, :0], 0, 1, group)
    with pytest.raises(ValueError, match="x has 8 heads; of 28 on 4 ranks rank 1 has 7"):
        gather_heads_scatter_seq(x, 1, 0, group, heads=28)
    with pytest.raises(ValueError, match="the sequence has 3 rows; 4 ranks have to divide it"):
        gather_heads_scatter_seq(x[:3], 1, 0, group)
    with pytest.raises(ValueError, match="heads is 0"):
        gather_heads_scatter_seq(x[:, :0], 1, 0, group)


def test_bad_bytes() -> None:
    for arguments, match in (
        ((8, 4, 3, 1, 2, 2), "kv_heads 3"),
        ((8, 0, 1, 1, 2, 2), "heads is 0"),
        ((1, 4, 4, 1, 2, 2), "tokens is 1; with 2 ranks"),
        ((8, 4, 4, 1, 2, 0), "rank is 0 of size 0"),
    ):
        with pytest.raises(ValueError, match=match):
            exchange_bytes(*arguments)
