"""Rows of measurements: what they hold, and that they know when their sources have changed."""

import json
import math
import subprocess

import pytest
import torch

from bench import harness

CPU = torch.device("cpu")


def row(**change):
    given = {
        "name": "thing",
        "case": "forward",
        "shape": {"tokens": 4},
        "dtype": "bfloat16",
        "timing": harness.Timing(2.0, 1.0, 3.0, 9),
        "work": 5e9,
        "ceiling": harness.Ceiling("bfloat16 matmul", 10e12, "FLOP/s"),
        "sources": ("bench/harness.py",),
        "extra": {"tokens_per_s": 2000.0},
    }
    return harness.Row(**(given | change))


def test_a_row_on_disk_holds_everything_and_comes_back(tmp_path):
    (written,) = harness.write([row()], CPU, tmp_path / "results")
    harness.write([row(name="other"), row()], CPU, tmp_path / "results")
    rows = harness.read(tmp_path / "results")
    assert [r["name"] for r in rows] == ["other", "thing", "thing"]
    assert rows[1] == written
    assert set(written) == {
        "schema", "name", "case", "shape", "dtype", "median_ms", "p20_ms", "p80_ms", "repeats",
        "work", "ceiling", "percent_of_ceiling", "extra", "commit", "dirty", "sources",
        "sources_sha256", "hardware", "versions", "measured_at",
    }  # fmt: skip
    # 5 GFLOP in 2 ms are 2.5 TFLOP/s of 10
    assert written["percent_of_ceiling"] == 25.0
    assert written["versions"]["torch"] == torch.__version__
    assert "thing forward bfloat16: 2.000 ms (1.000..3.000), 25.0%" in harness.describe(written)
    json.dumps(rows, allow_nan=False)


def test_the_hash_follows_names_and_contents(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "one.py").write_text("1")
    (tmp_path / "a" / "notes.txt").write_text("not a source")
    first = harness.source_hash(["a"], tmp_path)
    assert first == harness.source_hash(["a", "a/one.py"], tmp_path)
    (tmp_path / "a" / "notes.txt").write_text("still none")
    assert harness.source_hash(["a"], tmp_path) == first
    (tmp_path / "a" / "one.py").write_text("2")
    second = harness.source_hash(["a"], tmp_path)
    (tmp_path / "a" / "one.py").rename(tmp_path / "a" / "two.py")
    third = harness.source_hash(["a"], tmp_path)
    (tmp_path / "a" / "kernel.cu").write_text("")
    assert len({first, second, third, harness.source_hash(["a"], tmp_path)}) == 4
    with pytest.raises(ValueError, match="source is 'b'"):
        harness.source_hash(["b"], tmp_path)


def test_a_row_is_stale_once_its_sources_change_or_go(tmp_path):
    source = tmp_path / "op.py"
    source.write_text("x = 1\n")
    record = {"sources": ["op.py"], "sources_sha256": harness.source_hash(["op.py"], tmp_path)}
    assert not harness.is_stale(record, tmp_path)
    source.write_text("x = 2\n")
    assert harness.is_stale(record, tmp_path)
    source.unlink()
    assert harness.is_stale(record, tmp_path)


def test_percentiles():
    assert harness.summary([5, 1, 4, 2, 3, 6]) == harness.Timing(3, 2, 5, 6)
    assert harness.summary([7]) == harness.Timing(7, 7, 7, 1)


def test_timing_counts_only_calls_after_the_warm_up():
    calls = []
    timing = harness.time_calls(lambda: calls.append(0), CPU, seconds=0, warm_up=2)
    assert len(calls) == 2 + timing.repeats
    assert timing.repeats >= 3
    assert 0 <= timing.p20_ms <= timing.median_ms <= timing.p80_ms


def test_ceilings_are_rates():
    product = harness.matmul_ceiling(CPU, torch.float32, size=64, seconds=0)
    copy = harness.copy_ceiling(CPU, size=2**16, seconds=0)
    assert (product.what, product.unit) == ("float32 matmul 64x64x64", "FLOP/s")
    assert (copy.what, copy.unit) == ("copy of 65536 bytes", "byte/s")
    assert math.isfinite(product.value)
    assert min(product.value, copy.value) > 0


def test_the_revision_is_gits_or_said_to_be_unknown(tmp_path, monkeypatch):
    monkeypatch.delenv("GOKU_COMMIT", raising=False)
    # So that no repository above the temporary folder answers.
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert harness.revision(tmp_path) == ("unknown", True)
    monkeypatch.setenv("GOKU_COMMIT", "abc")
    assert harness.revision(tmp_path) == ("abc", True)

    def git(*arguments):
        who = ["-c", "user.name=a", "-c", "user.email=a@example.org"]
        subprocess.run(["git", "-C", tmp_path, *who, *arguments], check=True, capture_output=True)

    git("init")
    (tmp_path / "file").write_text("1")
    git("add", "file")
    git("commit", "-m", "first")
    commit, dirty = harness.revision(tmp_path)
    assert len(commit) == 40
    assert not dirty
    (tmp_path / "file").write_text("2")
    assert harness.revision(tmp_path) == (commit, True)
