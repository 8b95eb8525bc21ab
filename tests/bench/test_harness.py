"""Rows of measurements: what they hold, and that they know when their sources have changed."""

import json
import subprocess

import pytest
import torch
import triton

from bench import harness, timing

CPU = torch.device("cpu")


def row(**change):
    given = {
        "name": "thing",
        "case": "goku-2b",
        "pack": "64K, mixed",
        "direction": "backward",
        "peer": "eager",
        "shape": {"tokens": 4},
        "dtype": "bfloat16",
        "timing": timing.Timing(2.0, 1.0, 3.0, 9),
        "work": 5e9,
        "ceiling": timing.Ceiling("bfloat16 matmul", 10e12, "FLOP/s"),
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
        "schema", "name", "case", "pack", "direction", "peer", "backend", "part", "status", "note",
        "shape", "dtype", "median_ms", "p20_ms", "p80_ms", "repeats", "work", "ceiling",
        "percent_of_ceiling", "extra", "commit", "dirty", "sources", "sources_sha256",
        "device_type", "hardware", "versions", "measured_at",
    }  # fmt: skip
    # 5 GFLOP in 2 ms are 2.5 TFLOP/s of 10
    assert written["percent_of_ceiling"] == 25.0
    assert written["device_type"] == "cpu"
    assert written["versions"]["torch"] == torch.__version__
    words = "thing goku-2b 64K, mixed backward bfloat16: eager: 2.000 ms (1.000..3.000), 25.0%"
    assert words in harness.describe(written)
    json.dumps(rows, allow_nan=False)


def test_a_row_without_a_measurement_says_why(tmp_path):
    absent = row(status="absent", note="no such package", timing=None)
    (written,) = harness.write([absent], CPU, tmp_path)
    assert (written["median_ms"], written["percent_of_ceiling"]) == (None, None)
    assert harness.describe(written).endswith("eager: absent: no such package")
    with pytest.raises(ValueError, match="exactly measured rows"):
        row(status="wrong")
    with pytest.raises(ValueError, match="exactly measured rows"):
        row(timing=None)
    with pytest.raises(ValueError, match="status is 'fast'"):
        row(status="fast")


def test_the_newest_row_of_each_peer_counts(tmp_path):
    rows = [row(), row(peer="other"), row(timing=timing.Timing(1.0, 1.0, 1.0, 3))]
    rows += [row(status="absent", timing=None), row(peer="third", status="absent", timing=None)]
    newest = harness.newest(harness.write(rows, CPU, tmp_path))
    found = [(r["peer"], r["status"], r["median_ms"]) for r in newest]
    assert found == [
        ("eager", "measured", 1.0), ("other", "measured", 2.0), ("third", "absent", None)
    ]  # fmt: skip


def test_pruning_keeps_what_the_pages_show_and_changes_nothing_else(tmp_path):
    rows = [row(), row(peer="other"), row(timing=timing.Timing(1.0, 1.0, 1.0, 3))]
    harness.write([*rows, row(status="absent", timing=None)], CPU, tmp_path)
    harness.write([row(name="single")], CPU, tmp_path)
    shown = harness.newest(harness.read(tmp_path))
    single = tmp_path / "single.jsonl"
    before = single.stat()
    counts = harness.prune(tmp_path)
    assert {path.name: count for path, count in counts.items()} == {
        "thing.jsonl": (4, 2), "single.jsonl": (1, 1)
    }  # fmt: skip
    assert sorted(map(str, harness.read(tmp_path))) == sorted(map(str, shown))
    assert single.stat().st_ino == before.st_ino  # not even rewritten
    assert sorted(p.name for p in tmp_path.iterdir()) == ["single.jsonl", "thing.jsonl"]


def test_pruning_touches_nothing_where_a_file_cannot_be_read(tmp_path):
    harness.write([row(), row()], CPU, tmp_path)
    (tmp_path / "zz.jsonl").write_text("{\n")
    before = (tmp_path / "thing.jsonl").read_bytes()
    with pytest.raises(ValueError, match=r"zz\.jsonl:1 is no JSON"):
        harness.prune(tmp_path)
    assert (tmp_path / "thing.jsonl").read_bytes() == before
    with pytest.raises(ValueError, match="allowed is a folder"):
        harness.prune(tmp_path / "none")


def test_a_clock_that_takes_too_long_to_read_is_unknown(monkeypatch):
    def slow(command, **options):
        raise subprocess.TimeoutExpired(command, 20)

    monkeypatch.setattr(subprocess, "run", slow)
    monkeypatch.setenv("GOKU_COMMIT", "abc")
    assert harness._clocks(torch.device("cuda", 0)) == "unknown"
    assert harness.revision() == ("abc", False)


def test_files_of_other_kinds_are_left_alone(tmp_path):
    (tmp_path / "compiled").mkdir()
    (tmp_path / "compiled" / "triton.jsonl").write_text('{"kernel": "forward"}\n')
    (tmp_path / "triton-3.7.1.jsonl").write_text('{"kernel": "forward"}\n')
    (tmp_path / "README.md").write_text("{")
    harness.write([row()], CPU, tmp_path)
    assert [r["name"] for r in harness.read(tmp_path)] == ["thing"]


@pytest.mark.parametrize("line", ["{", "[]", '{"schema": 1}'])
def test_a_line_that_is_no_row_is_refused_by_place(tmp_path, line):
    harness.write([row()], CPU, tmp_path)
    with (tmp_path / "thing.jsonl").open("a") as file:
        file.write(line + "\n")
    with pytest.raises(ValueError, match=r"thing\.jsonl:2"):
        harness.read(tmp_path)


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


def test_the_revision_is_gits_or_said_to_be_unknown(tmp_path, monkeypatch):
    monkeypatch.delenv("GOKU_COMMIT", raising=False)
    # So that no repository above the temporary folder answers.
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert harness.revision(tmp_path) == ("unknown", True)
    said = {"abc": ("abc", False), "abc+dirty": ("abc", True), "": ("unknown", True)}
    for words, expected in (said | {"+dirty": ("unknown", True)}).items():
        monkeypatch.setenv("GOKU_COMMIT", words)
        assert harness.revision(tmp_path) == expected

    def git(*arguments):
        who = ["-c", "user.name=a", "-c", "user.email=a@example.org"]
        subprocess.run(["git", "-C", tmp_path, *who, *arguments], check=True, capture_output=True)

    git("init")
    (tmp_path / "file").write_text("1")
    git("add", "file")
    git("commit", "-m", "first")
    monkeypatch.setenv("GOKU_COMMIT", "abc+dirty")  # git knows better
    commit, dirty = harness.revision(tmp_path)
    assert len(commit) == 40
    assert not dirty
    (tmp_path / "file").write_text("2")
    assert harness.revision(tmp_path) == (commit, True)


def test_a_cudnn_that_cannot_be_used_costs_no_row(monkeypatch):
    def version():
        raise RuntimeError("cuDNN version incompatibility")

    assert harness.versions()["cudnn"]
    monkeypatch.setattr(torch.backends.cudnn, "version", version)
    assert harness.versions()["cudnn"] == "unusable"


def test_versions_name_the_assembler_of_triton():
    assert harness.versions()["ptxas"] == triton.knobs.nvidia.ptxas.version
