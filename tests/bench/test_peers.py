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

from bench import cases, peers, timing
from bench.packs import Pack
from goku_kernels import varlen_attention

CPU = torch.device("cpu")
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
