"""The block's benchmark runs and counts, on a CPU and at a size that says nothing of speed."""

import dataclasses

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from bench import block, harness, timing
from bench import varlen_attention as varlen_attention_bench
from bench.block_attention import SavingAttention
from bench.block_compile import compile_whole, for_any_pack
from bench.block_traffic import residual_bytes
from bench.packs import Pack
from goku.flops import block_training_flops
from goku.model import PRESETS
from goku_kernels import FLOP_FORMULAS, gated_residual_adaln_bytes, reference, varlen_attention

CPU = torch.device("cpu")
CEILINGS = timing.Ceilings(
    timing.Ceiling("matmul", 1e12, "FLOP/s"), timing.Ceiling("copy", 1e10, "byte/s")
)
SETTING = block.Setting("tiny-test", Pack("two", ((2, 3, 4), (1, 2, 2))), block.MIXED)


@pytest.mark.parametrize("dtype", [block.MIXED, block.PLAIN])
def test_rows_of_a_tiny_block(dtype):
    setting = dataclasses.replace(SETTING, dtype=dtype)
    names = ["eager", "goku fused"]
    absent, row = block.measure(setting, names, CPU, CEILINGS, seconds=0)
    assert (absent.peer, absent.status) == ("goku fused", "absent")
    assert "CUDA" in absent.note or "triton" in absent.note
    assert (row.peer, row.status, row.dtype) == ("eager", "measured", dtype)
    assert row.shape["tokens"] == 28
    assert row.work == block_training_flops(PRESETS["tiny-test"], [24, 4], [512, 512])
    assert "run again" in row.note
    assert row.extra["tokens_per_s"] == pytest.approx(28 / row.timing.median_ms * 1e3)
    assert row.extra["attention_rate"].startswith("too short: attention was not measured")
    parts = [row.extra[f"expected_{part}_ms"] for part in ("matmul", "attention", "memory")]
    assert row.extra["expected_ms"] == pytest.approx(sum(parts))
    assert min(parts) > 0


def test_a_step_does_the_flops_that_are_counted():
    setting = dataclasses.replace(SETTING, dtype=block.PLAIN)
    batch = block.Batch.draw(setting, CPU, 0)
    module = block.make_peer("eager", setting, CPU)
    with (
        sdpa_kernel(SDPBackend.MATH),
        FlopCounterMode(display=False, custom_mapping=FLOP_FORMULAS) as counter,
    ):
        block.step(module, batch, setting)
    assert counter.get_total_flops() == setting.flops


def test_residual_sums_move_what_they_need():
    # all of one width and with everything: the operator's own count
    for backward in (False, True):
        whole = gated_residual_adaln_bytes(1, 1, itemsize=2, backward=backward)
        assert residual_bytes(2, True, True, backward) == whole
    # fp32 stream, bf16 branch: 4 + 2 read, 4 written, once more with a norm
    assert residual_bytes(4, True, True, False) == 14
    assert residual_bytes(4, True, False, False) == 10
    # the norm's sum and two gradients and the branch read, two gradients written
    assert residual_bytes(4, True, True, True) == 20
    assert residual_bytes(4, False, True, True) == 18
    assert residual_bytes(4, True, False, True) == 8


def test_nobody_is_judged_where_eager_fails(monkeypatch):
    setting = dataclasses.replace(SETTING, dtype=block.PLAIN)
    exact = block.truth(setting, block.Batch.draw(setting, CPU, 0))
    make = block.make_peer

    def broken(name, setting, device):
        if name == "eager":
            raise RuntimeError("no room")
        return make("eager", setting, device)

    monkeypatch.setattr(block, "truth", lambda setting, batch: exact)
    monkeypatch.setattr(block, "make_peer", broken)
    found = list(block.measure(setting, ["torch.compile", "eager"], CPU, CEILINGS, seconds=0))
    assert [(r.peer, r.status, r.note) for r in found] == [
        ("eager", "failed", "RuntimeError: no room"),
        ("torch.compile", "failed", "eager gave no result to judge by"),
    ]


def test_nobody_is_judged_without_a_truth(monkeypatch):
    def broken(setting, batch):
        raise RuntimeError("no room")

    monkeypatch.setattr(block, "truth", broken)
    (row,) = block.measure(SETTING, ["eager"], CPU, CEILINGS, seconds=0)
    assert (row.status, row.note) == ("failed", "no truth to judge by: RuntimeError: no room")


@pytest.mark.parametrize("compiled", [False, True])
def test_attention_through_varlen_attn_is_the_same_block(compiled):
    """With our own attention for torch's, which needs a GPU; gradients too."""

    def attend(q, k, v, cu_q, cu_k, max_q, max_k):
        return varlen_attention(q, k, v, cu_q, cu_k, max_q, max_k, backend="torch")

    batch = block.Batch.draw(SETTING, CPU, 0)
    want = block.results(block.make_peer("eager", SETTING, CPU), batch, SETTING)
    module = block.make_peer("eager", SETTING, CPU)
    SavingAttention.replace(module, attend)
    assert type(module.attn1) is type(module.attn2) is SavingAttention
    if compiled:
        module.compile(backend="eager", fullgraph=True)
    got = block.results(module, batch, SETTING)
    assert set(got) == set(want)
    for name in want:
        torch.testing.assert_close(got[name], want[name], msg=name)


def test_varlen_attn_is_for_cuda_alone():
    for name in ("eager, varlen_attn", "torch.compile, varlen_attn"):
        with pytest.raises(block.Absent, match=r"CUDA|varlen_attn"):
            block.make_peer(name, SETTING, CPU)


def test_the_expected_time_takes_each_rate_for_its_part():
    found = block.expected(SETTING, CEILINGS, None)
    pairs = block.attention_flops(SETTING)
    # 4 * dim * pairs forward, three times that with the backward
    assert pairs == 3 * 4 * 48 * (24 * 24 + 4 * 4 + (24 + 4) * 512)
    assert found["expected_matmul_ms"] == pytest.approx((SETTING.flops - pairs) / 1e9)
    assert found["expected_attention_ms"] == pytest.approx(pairs / 1e9)
    assert found["expected_memory_ms"] == pytest.approx(block.memory_bytes(SETTING) / 1e7)
    faster = block.expected(SETTING, CEILINGS, 2e12)
    assert faster["expected_attention_ms"] == pytest.approx(pairs / 2e9)
    assert faster["attention_rate"] == "attention as measured"


def test_the_attentions_rate_needs_both_directions_of_this_chip_and_these_sources(tmp_path):
    def row(direction, **change):
        given = {
            "name": "varlen_attention", "case": "tiny-test", "pack": "two", "direction": direction,
            "peer": "goku triton", "shape": {}, "dtype": "bfloat16", "work": 1e9,
            "ceiling": CEILINGS.matmul, "sources": ("bench/packs.py",),
            "timing": timing.Timing(1.0, 1.0, 1.0, 3),
        }  # fmt: skip
        return harness.Row(**(given | change))

    here = harness.hardware(CPU)["device"]
    records = harness.write([row("forward"), row("backward", work=2e9)], CPU, tmp_path)
    assert block.attention_rate(SETTING, records, here, False) == pytest.approx(3e9 / 2e-3)
    assert block.attention_rate(SETTING, records, here, True) is None
    equal = [record | {"peer": "goku triton, deterministic"} for record in records]
    assert block.attention_rate(SETTING, equal, here, True) == pytest.approx(3e9 / 2e-3)
    assert block.attention_rate(SETTING, records[:1], here, False) is None
    assert block.attention_rate(SETTING, records, "another chip", False) is None
    stale = [record | {"sources_sha256": "0"} for record in records]
    assert block.attention_rate(SETTING, stale, here, False) is None


def test_a_wrong_block_is_found():
    class Wrong(torch.nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, *args):
            return 1.1 * self.inner(*args)

    batch = block.Batch.draw(SETTING, CPU, 0)
    exact = block.truth(SETTING, batch)
    eager = block.make_peer("eager", SETTING, CPU)
    same = block.results(eager, batch, SETTING)
    assert block.judge(same, same, exact).right
    got = {
        k.replace("inner.", ""): v for k, v in block.results(Wrong(eager), batch, SETTING).items()
    }
    assert set(got) == set(exact)
    assert not block.judge(got, same, exact).right


def test_a_compiled_block_is_compiled_once_for_all_packs(monkeypatch):
    """And never runs as plain code under the name of a compiled one, whatever came before it."""
    # Offsets are read here alone, and their values would be compiled in.
    monkeypatch.setattr(reference, "readable", lambda index: False)
    torch.compiler.reset()
    packs = [((2, 3, 4), (1, 2, 2)), ((1, 5, 5), (2, 2, 2), (1, 3, 3)), ((3, 2, 2),)]
    settings = [
        dataclasses.replace(SETTING, pack=Pack(str(i), grids), dtype=dtype)
        for i, grids in enumerate(packs) for dtype in (block.MIXED, block.PLAIN)
    ]  # fmt: skip
    runs = []

    def graphs(count):
        """Graphs that were compiled for each setting, of another peer every time."""
        found = []
        for setting in settings:
            batch = block.Batch.draw(setting, CPU, 0)
            module = block.make_peer("eager", setting, CPU)
            compile_whole(module, count)
            before = count.frame_count
            with for_any_pack(batch.tensors()):
                block.results(module, batch, setting)
            found.append(count.frame_count - before)
        return found

    for _ in range(2):
        count = CompileCounterWithBackend("eager")
        runs.append(graphs(count))
    # Each precision once, and again for a pack of one sample.
    assert runs == [[1, 1, 0, 0, 1, 1]] * 2


def test_a_gpus_time_goes_to_what_tells_most():
    """Ours compiled at 64K comes behind the packs that Goku trains on; then everything else."""
    gpu = list(block.passes("cuda"))
    settings = list(block.settings("cuda"))
    assert len(set(settings)) == len(settings)
    assert len({(s, tuple(names)) for s, names in gpu}) == len(gpu)
    without = [
        i for i, (_, names) in enumerate(gpu) if not any(block.PEERS[n].compiled for n in names)
    ]
    early = [(s.preset, s.pack.name, s.dtype) for s, _ in gpu[:4]]
    assert set(early) == {
        (preset, pack, block.MIXED)
        for preset in ("goku-2b", "goku-8b") for pack in ("16K, mixed", "64K, mixed")
    }  # fmt: skip
    assert without == [i for i in range(len(settings) + 1) if i != 4]
    setting, names = gpu[4]
    assert (setting.preset, setting.pack.name, setting.dtype) == (
        "goku-2b",
        "64K, mixed",
        block.MIXED,
    )
    assert [n for n in names if block.PEERS[n].compiled] == ["goku fused, torch.compile"]
    assert {"eager", "goku fused"} <= set(names)
    assert {gpu[i][0] for i in without} == set(settings)
    assert [s for s, _ in gpu[len(settings) + 1 :]] == settings * 2
    assert all("goku fused" in names for _, names in gpu)
    assert all(list(names) == list(block.PEERS) for _, names in gpu[-len(settings) :])
    assert {tuple(names) for _, names in block.passes("cpu")} == {tuple(block.PEERS)}


def test_the_attention_that_a_block_expects_is_measured_early():
    """Of every model, on every pack that the first blocks are measured on, before lone ranks' heads."""
    measured = [(p.case, p.pack.name) for p in varlen_attention_bench.problems("cuda")]
    until = next(i for i, (case, _) in enumerate(measured) if case.startswith("7 heads"))
    first = {(s.preset, s.pack.name) for s, _ in list(block.passes("cuda"))[:4]}
    assert first <= set(measured[:until])


def test_what_is_measured_where():
    gpu = list(block.settings("cuda"))
    assert {s.preset for s in gpu} == {"goku-2b", "goku-8b"}
    assert {s.dtype for s in gpu} == {block.MIXED, block.PLAIN}
    assert {s.preset for s in block.settings("cpu")} == {"tiny"}
