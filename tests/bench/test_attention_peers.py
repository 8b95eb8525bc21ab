"""Packed attention of others: what they are given, who takes part where, and what they raise."""

import importlib
import sys
import types

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from bench import attention_peers, cases, timing
from bench.cases import Absent
from bench.packs import LONG_PACKS, TEXT_TOKENS, Pack

CPU = torch.device("cpu")
GPU = types.SimpleNamespace(type="cuda")  # for what asks no more than its kind
PACK = Pack("three", ((1, 2, 3), (1, 1, 1), (2, 2, 2)))
CEILINGS = timing.Ceilings(
    timing.Ceiling("matmul", 1e12, "FLOP/s"), timing.Ceiling("copy", 1e10, "byte/s")
)


def by_name(name):
    (peer,) = (p for p in attention_peers.PEERS if p.name == name)
    return peer


# ---- FlexAttention ----

LENGTHS = (((6, 1, 8), (6, 1, 8)), ((128, 128), (128, 128)), ((300, 5, 0, 79), (300, 5, 0, 79)),
           ((200, 56, 130), (77, 0, 400)), ((1,), (129,)))  # fmt: skip


@pytest.mark.parametrize(("lengths_q", "lengths_k"), LENGTHS)
def test_the_blocks_of_the_mask_are_those_of_create_block_mask(lengths_q, lengths_k):
    """The one that looks at all pairs, and of which a block too many would be a slower peer."""
    from torch.nn.attention.flex_attention import create_block_mask

    sample_q, sample_k = (
        torch.repeat_interleave(torch.arange(len(n)), torch.tensor(n))
        for n in (lengths_q, lengths_k)
    )
    want = create_block_mask(
        lambda b, h, i, j: sample_q[i] == sample_k[j],
        None,
        None,
        len(sample_q),
        len(sample_k),
        "cpu",
    )
    got = attention_peers.document_mask(lengths_q, lengths_k, CPU)
    assert got.shape == want.shape
    for part in ("kv", "full_kv", "q", "full_q"):
        counts, columns = (
            [getattr(mask, f"{part}_{kind}") for mask in (got, want)]
            for kind in ("num_blocks", "indices")
        )
        assert torch.equal(*counts)
        assert counts[0].dtype == columns[0].dtype == torch.int32
        for row, (mine, theirs) in enumerate(zip(*(x[0, 0] for x in columns), strict=True)):
            used = int(counts[0][0, 0, row])
            assert mine[:used].tolist() == theirs[:used].tolist()


@pytest.mark.filterwarnings("ignore:flex_attention called without")
def test_a_document_mask_keeps_samples_apart(monkeypatch):
    """FlexAttention uncompiled and forward alone, which is what a CPU has of it."""
    module = importlib.import_module("bench.varlen_attention")
    real = torch.compile  # which flex_attention itself calls, with other options
    asked = []

    def uncompiled(f, **options):
        if "dynamic" not in options:
            return real(f, **options)
        asked.append(options)
        return f

    monkeypatch.setattr(torch, "compile", uncompiled)
    for cross in (False, True):
        small = module.problem(
            "to text" if cross else "self", 2, 16, PACK, torch.float32, cross=cross
        )
        inputs = small.draw(CPU, 0)
        found = attention_peers.flex(small, GPU)(inputs)[0]
        torch.testing.assert_close(found, module.function("torch")(inputs)[0])
    # A graph that breaks would run as plain PyTorch, unnoticed.
    assert asked == [{"fullgraph": True, "dynamic": False}] * 2


# ---- cuDNN ----


@pytest.fixture
def seen(monkeypatch):
    """What torch's fused attention is given and gives, and the backends that it may take."""
    calls = []
    attend = F.scaled_dot_product_attention

    def watching(q, k, v):
        out = attend(q, k, v)
        calls.append((q, k, v, out))
        return out

    monkeypatch.setattr(F, "scaled_dot_product_attention", watching)
    kinds = []
    plain = lambda: sdpa_kernel(SDPBackend.MATH)  # noqa: E731
    monkeypatch.setattr(attention_peers, "sdpa_kernel", lambda kind: kinds.append(kind) or plain())
    monkeypatch.setattr(attention_peers, "needs_cuda", lambda device: None)
    return calls, kinds


@pytest.mark.parametrize("cross", [False, True])
def test_samples_of_one_length_are_one_call_without_a_copy(seen, cross):
    module = importlib.import_module("bench.varlen_attention")
    pack = Pack("equal", ((1, 5, 8), (2, 5, 4), (5, 2, 4)))
    small = module.problem("equal", 2, 16, pack, torch.bfloat16, cross=cross)
    rows = list(cases.measure(small, [by_name("cuDNN SDPA, one batched call")], CPU, CEILINGS,
                              seconds=0))  # fmt: skip
    assert {r.status for r in rows} == {"measured"}
    calls, kinds = seen
    assert set(kinds) == {SDPBackend.CUDNN_ATTENTION}
    inputs = small.draw(CPU, 0)
    attention_peers.cudnn_batched(small, CPU)(inputs)
    keys = TEXT_TOKENS if cross else 40
    for x, leaf, length in zip(calls[-1][:3], inputs.leaves, (40, keys, keys), strict=True):
        assert x.shape == (3, 2, length, 16)
        assert x.stride() == (length * 32, 16, 32, 1)
        assert x.data_ptr() == leaf.data_ptr()


def test_samples_of_several_lengths_are_a_call_each_of_their_own_rows(seen):
    module = importlib.import_module("bench.varlen_attention")
    small = module.problem("several", 2, 16, PACK, torch.bfloat16)
    calls, _ = seen
    inputs = small.draw(CPU, 0)
    attention_peers.cudnn_sample_by_sample(small, CPU)(inputs)
    assert [q.shape[2] for q, *_ in calls] == list(PACK.lengths) == [6, 1, 8]
    for x, start in zip(calls, (0, 6, 7), strict=True):
        assert x[0].stride() == (x[0].shape[2] * 32, 16, 32, 1)
        assert x[0].data_ptr() == inputs.leaves[0][start].data_ptr()


def test_cudnn_is_measured_once_a_pack(monkeypatch):
    module = importlib.import_module("bench.varlen_attention")
    monkeypatch.setattr(attention_peers, "needs_cuda", lambda device: None)
    for pack, there, not_there in (
        (PACK, "cuDNN SDPA, one call a sample", "cuDNN SDPA, one batched call"),
        (
            Pack("one", ((1, 2, 3),)),
            "cuDNN SDPA, one batched call",
            "cuDNN SDPA, one call a sample",
        ),
    ):
        small = module.problem("self", 2, 16, pack, torch.bfloat16)
        by_name(there).make(small, CPU)
        with pytest.raises(Absent):
            by_name(not_there).make(small, CPU)


# ---- what refuses ----


@pytest.mark.parametrize(
    ("module", "name"),
    [("cutlass.base_dsl.common", "DSLBaseError"), ("cutlass._mlir.ir", "MLIRError")],
)
def test_an_error_of_the_cute_dsl_fails_its_peer_alone(module, name, monkeypatch):
    """They derive from Exception alone; the other peers' rows must not be lost to one."""
    error = type(name, (Exception,), {})

    def imports_then_raises(problem, device):
        monkeypatch.setitem(sys.modules, module, types.SimpleNamespace(**{name: error}))
        raise error("no kernel for this chip")

    attention = importlib.import_module("bench.varlen_attention")
    small = attention.problem("self", 2, 16, PACK, torch.bfloat16)
    eager = next(p for p in attention.PEERS if p.name == "eager")
    listed = [cases.Peer("flash-attn 4", imports_then_raises), eager]
    rows = list(cases.measure(small, listed, CPU, CEILINGS, seconds=0))
    found = {r.peer: (r.status, r.note) for r in rows if r.direction == "forward"}
    assert found["flash-attn 4"] == ("failed", f"{name}: no kernel for this chip")
    assert found["eager"][0] == "measured"


def test_a_mistake_of_ours_is_no_refusal():
    def wrong(problem, device):
        raise ZeroDivisionError

    attention = importlib.import_module("bench.varlen_attention")
    small = attention.problem("self", 2, 16, PACK, torch.bfloat16)
    with pytest.raises(ZeroDivisionError):
        list(cases.measure(small, [cases.Peer("x", wrong)], CPU, CEILINGS, seconds=0))


# ---- who is measured where ----


@pytest.mark.parametrize(("name", "packs"), [
    ("eager", {"64K, one clip", "64K, mixed", "64K, many images"}),
    ("FlexAttention, document mask", {"64K, mixed", "64K, many images"}),
])  # fmt: skip
def test_slow_peers_are_left_out_where_they_tell_little(name, packs):
    module = importlib.import_module("bench.varlen_attention")
    (peer,) = (p for p in module.PEERS if p.name == name)
    there = {(case, pack) for case in ("goku-2b", "14 heads of 128") for pack in packs}
    problems = list(module.problems("cuda"))
    for problem in problems:
        if (problem.case, problem.pack.name) in there:
            there.remove((problem.case, problem.pack.name))
            peer.make(problem, GPU)
        else:
            with pytest.raises(Absent, match="left out"):
                peer.make(problem, GPU)
            if name == "eager":  # a CPU's packs are small
                assert peer.backend == "torch"
                peer.make(problem, CPU)
    assert there == set()


def test_the_most_telling_problems_come_first():
    module = importlib.import_module("bench.varlen_attention")
    found = [(p.shape["head_dim"], p.pack.name) for p in module.problems("cuda")]
    assert {size for size, _ in found} == {64, 128}
    for size in (64, 128):
        first = [found.index((size, name)) for name in (
            "64K, one clip", "64K, mixed", "16K, one clip", "220K, one clip", "64K, many images",
        )]  # fmt: skip
        assert first == sorted(first)
        # A run that is cut short has either all of what is compared or none of it: side by side.
        long = [found.index((size, pack.name)) for pack in LONG_PACKS]
        assert max(long) - min(long) < 2 * len(LONG_PACKS)
