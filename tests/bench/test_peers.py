"""Other people's kernels through stand-ins with their signatures: are they called as they want?

The real ones need a GPU. A stand-in computes what the real one does in plain PyTorch and refuses
arguments that the real one does not have, so that a wrong call or a mixed-up result is found here.
"""

import importlib
import importlib.machinery
import sys
import types

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.attention import SDPBackend

from bench import attention_peers, cases, peers, timing
from bench.cases import Absent
from bench.packs import LONG_PACKS, TEXT_TOKENS, Pack
from goku_kernels import varlen_attention

CPU = torch.device("cpu")
GPU = types.SimpleNamespace(type="cuda")  # for what asks no more than its kind
PACK = Pack("three", ((1, 2, 3), (1, 1, 1), (2, 2, 2)))
CEILINGS = timing.Ceilings(
    timing.Ceiling("matmul", 1e12, "FLOP/s"), timing.Ceiling("copy", 1e10, "byte/s")
)


def rms(x, weight, eps):
    y = F.rms_norm(x.float(), x.shape[-1:], weight.float(), eps)
    return y.to(x.dtype)


class LigerRMSNormFunction:
    @staticmethod
    def apply(X, W, eps, offset=0.0, casting_mode="llama", in_place=True, row_mode=None):
        assert (offset, casting_mode, in_place) == (0.0, "llama", False)
        assert X.dtype == W.dtype
        return rms(X, W, eps)


class LigerFusedAddRMSNormFunction:
    @staticmethod
    def apply(X, R, W, eps, offset=0.0, casting_mode="llama", in_place=False):
        total = X + R
        return rms(total, W, eps), total


class LigerRopeFunction:
    """Halves of the head, (1, heads, tokens, size) and tables (1, tokens, size)."""

    @staticmethod
    def apply(q, k, cos, sin, position_ids=None, unsqueeze_dim=1):
        def turned(x):
            a, b = x.float().chunk(2, dim=-1)
            return (x.float() * cos[:, None] + torch.cat((-b, a), -1) * sin[:, None]).to(x.dtype)

        assert q.dim() == k.dim() == 4
        assert cos.shape == (1, q.shape[2], q.shape[3])
        return turned(q), turned(k)


def quack_rmsnorm(x, weight=None, bias=None, residual=None, out_dtype=None, residual_dtype=None,
                  eps=1e-6, prenorm=False):  # fmt: skip
    if residual is None:
        return rms(x, weight, eps)
    total = x + residual
    return (rms(total, weight, eps), total) if prenorm else rms(total, weight, eps)


def fused_rms_norm_affine(input, weight, normalized_shape, eps=1e-6, memory_efficient=False):
    assert tuple(normalized_shape) == tuple(input.shape[-1:])
    return rms(input, weight, eps)


class TransformerEngineNorm(torch.nn.Module):
    def __init__(self, normalized_shape, eps=1e-5, *, params_dtype=None, device=None):
        super().__init__()
        weight = torch.ones(normalized_shape, dtype=params_dtype, device=device)
        self.weight, self.eps = torch.nn.Parameter(weight), eps

    def forward(self, x):
        return rms(x, self.weight, self.eps)


class DotProductAttention(torch.nn.Module):
    def __init__(self, num_attention_heads, kv_channels, qkv_format, attn_mask_type):
        super().__init__()
        assert (qkv_format, attn_mask_type) == ("thd", "padding")

    def forward(self, q, k, v, cu_seqlens_q, cu_seqlens_kv, max_seqlen_q, max_seqlen_kv):
        out = varlen_attention(q, k, v, cu_seqlens_q, cu_seqlens_kv, max_seqlen_q, max_seqlen_kv)
        return out.flatten(1)


def flash2(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0,
           softmax_scale=None, causal=False):  # fmt: skip
    return varlen_attention(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)


def flash3(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale=None):
    return flash2(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k), None


def flash4(q, k, v, cu_seqlens_q=None, cu_seqlens_k=None, max_seqlen_q=None, max_seqlen_k=None):
    return flash3(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)


def torch_varlen(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k):
    return flash2(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k)


STAND_INS = {
    "liger_kernel.ops.rms_norm": {"LigerRMSNormFunction": LigerRMSNormFunction},
    "liger_kernel.ops.rope": {"LigerRopeFunction": LigerRopeFunction},
    "liger_kernel.ops.fused_add_rms_norm": {
        "LigerFusedAddRMSNormFunction": LigerFusedAddRMSNormFunction
    },
    "quack.rmsnorm": {"rmsnorm": quack_rmsnorm},
    "apex.normalization": {"FusedRMSNorm": object},
    "apex.normalization.fused_layer_norm": {"fused_rms_norm_affine": fused_rms_norm_affine},
    "transformer_engine.pytorch": {
        "RMSNorm": TransformerEngineNorm, "DotProductAttention": DotProductAttention,
    },
    "flash_attn": {"flash_attn_varlen_func": flash2},
    "flash_attn_interface": {"flash_attn_varlen_func": flash3},
    "flash_attn.cute": {"flash_attn_varlen_func": flash4},
    "torch.nn.attention.varlen": {"varlen_attn": torch_varlen},
}  # fmt: skip


@pytest.fixture
def installed(monkeypatch):
    """Every library is there, and a CPU will do for it."""
    for name, content in STAND_INS.items():
        module = types.ModuleType(name)
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, name, module)
        parent = name.rpartition(".")[0]
        while parent and parent not in sys.modules:
            package = types.ModuleType(parent)
            package.__path__ = []
            monkeypatch.setitem(sys.modules, parent, package)
            parent = parent.rpartition(".")[0]
    apex = types.SimpleNamespace(kind="nvidia")
    monkeypatch.setattr(peers, "detect_apex", lambda: apex)
    for name in ("qk_norm_rope", "gated_residual_adaln", "attention_peers"):
        monkeypatch.setattr(f"bench.{name}.needs_cuda", lambda device: None)
    monkeypatch.setattr(peers, "needs_cuda", lambda device: None)
    # A CPU has torch's plain attention alone; the calls around it are the same.
    monkeypatch.setattr("bench.attention_peers.sdpa_kernel", lambda kind: _math())


def _math():
    from torch.nn.attention import sdpa_kernel

    return sdpa_kernel(SDPBackend.MATH)


# Our own kernels and torch's compiler; and of cuDNN's two calls the one for samples of one length,
# which PACK's are not.
NOT_HERE = {"goku triton", "goku triton, deterministic", "FlexAttention, document mask",
            "torch.compile", "torch.compile, sample by sample", "cuDNN SDPA, one batched call"}  # fmt: skip


@pytest.mark.parametrize(
    "name", ["qk_norm_rope", "adaln_modulate", "gated_residual_adaln", "varlen_attention"]
)
def test_every_peer_is_called_as_it_wants_and_is_right(name, installed):
    module = importlib.import_module(f"bench.{name}")
    small = module.tuning(64, torch.bfloat16, PACK)
    chosen = [p for p in module.PEERS if p.name not in NOT_HERE]
    rows = list(cases.measure(small, chosen, CPU, CEILINGS, seconds=0))
    assert len(rows) == 2 * len(chosen) > 8
    assert [(r.peer, r.status, r.note) for r in rows if r.status != "measured"] == []
    parts = {r.peer for r in rows if r.part}
    assert parts == {p.name for p in chosen if "only" in p.name}


@pytest.mark.parametrize("name", ["adaln_modulate", "qk_norm_rope", "velocity_loss"])
def test_the_compiled_peer_is_right_and_compiles_twice_for_any_packs(name, monkeypatch):
    """Without Inductor, whose code is its own affair: for one sample, and for several."""
    counter = CompileCounterWithBackend("eager")
    real = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f: real(f, backend=counter))
    torch.compiler.reset()
    module = importlib.import_module(f"bench.{name}")
    (compiled,) = (p for p in module.PEERS if p.name == "torch.compile")
    for grids in (((1, 2, 3),), PACK.grids, ((1, 5, 4), (2, 2, 2)), ((1, 2, 2),) * 7):
        small = module.tuning(64, torch.bfloat16, Pack("pack", grids))
        rows = list(cases.measure(small, [compiled], CPU, CEILINGS, seconds=0))
        assert {(r.status, r.note) for r in rows} == {("measured", "")}
    assert counter.frame_count <= 2


@pytest.mark.parametrize("name", ["adaln_modulate", "gated_residual_adaln"])
def test_the_peer_compiled_for_a_sample_is_right_and_serves_any_packs(name, monkeypatch):
    counter = CompileCounterWithBackend("eager")
    real = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f: real(f, backend=counter))
    torch.compiler.reset()
    module = importlib.import_module(f"bench.{name}")
    (compiled,) = (p for p in module.PEERS if p.name == "torch.compile, sample by sample")
    for grids in (((1, 2, 3),), PACK.grids, ((1, 5, 4), (0, 1, 1), (2, 2, 2)), ((1, 2, 2),) * 7):
        small = module.tuning(64, torch.bfloat16, Pack("pack", grids))
        rows = list(cases.measure(small, [compiled], CPU, CEILINGS, seconds=0))
        assert {(r.status, r.note) for r in rows} == {("measured", "")}
    # Of any number of tokens, of none and of one; no graph for a pack.
    assert counter.frame_count <= 3


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
    monkeypatch.setattr(attention_peers, "sdpa_kernel", lambda kind: kinds.append(kind) or _math())
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


def by_name(name):
    (peer,) = (p for p in attention_peers.PEERS if p.name == name)
    return peer


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
