"""The block's benchmark runs and counts, on a CPU and at a size that says nothing of speed."""

import dataclasses

import pytest
import torch

from bench import block, harness, timing
from bench.packs import Pack
from goku.flops import block_flops
from goku.model import PRESETS

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
    assert row.work == 3 * block_flops(PRESETS["tiny-test"], [24, 4], [512, 512])
    assert row.extra["tokens_per_s"] == pytest.approx(28 / row.timing.median_ms * 1e3)
    assert row.extra["attention_rate"] == "the matmul ceiling"
    parts = [row.extra[f"expected_{part}_ms"] for part in ("matmul", "attention", "memory")]
    assert row.extra["expected_ms"] == pytest.approx(sum(parts))
    assert min(parts) > 0


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
    assert block.attention_rate(SETTING, records, here) == pytest.approx(3e9 / 2e-3)
    assert block.attention_rate(SETTING, records[:1], here) is None
    assert block.attention_rate(SETTING, records, "another chip") is None
    stale = [record | {"sources_sha256": "0"} for record in records]
    assert block.attention_rate(SETTING, stale, here) is None


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


def test_what_is_measured_where():
    gpu = list(block.settings("cuda"))
    assert {s.preset for s in gpu} == {"goku-2b", "goku-8b"}
    assert {s.dtype for s in gpu} == {block.MIXED, block.PLAIN}
    assert {s.preset for s in block.settings("cpu")} == {"tiny"}
