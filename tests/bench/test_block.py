"""The block's benchmark runs and counts, on a CPU and at a size that says nothing of speed."""

import torch

from bench import block, harness
from goku.flops import block_flops
from goku.model import PRESETS


def test_rows_of_a_tiny_block(tmp_path, monkeypatch):
    monkeypatch.setattr(block, "SMALL_GRIDS", ((2, 3, 4), (1, 2, 2)))
    block.main(
        ["--device", "cpu", "--presets", "tiny-test", "--seconds", "0", "--out", str(tmp_path)]
    )
    rows = harness.read(tmp_path)
    assert [row["dtype"] for row in rows] == ["bfloat16 autocast over float32", "bfloat16"]
    for row in rows:
        assert (row["name"], row["case"]) == ("block", "tiny-test forward+backward")
        assert row["shape"]["tokens"] == 28
        assert row["work"] == 3 * block_flops(PRESETS["tiny-test"], [24, 4], [128, 128])
        assert row["extra"]["tokens_per_s"] > 0
        assert not harness.is_stale(row)


def test_both_kinds_of_precision_compute_something():
    for mixed, dtype in ((True, torch.float32), (False, torch.bfloat16)):
        run = block.step(PRESETS["tiny-test"], [(1, 2, 3)], torch.device("cpu"), mixed)
        y = run()
        assert y.dtype == dtype
        assert y.isfinite().all()
        assert torch.equal(y, run())
