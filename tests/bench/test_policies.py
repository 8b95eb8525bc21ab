"""bench.policies on one process and on two: valid rows, right before fast, exit codes."""

import weakref
from pathlib import Path

import pytest
import torch

from bench import harness, parallel_report, policies, policy_runs
from bench.packs import Pack
from goku.parallelize import ParallelDims

SCRIPT = Path(__file__).with_name("exchange_processes.py")
WORDS = ["--device", "cpu", "--preset", "tiny-test", "--seconds", "0"]
KEYS = {"peak_memory_bytes", "kept_bytes", "predicted_kept_bytes", "resident_bytes",
        "tokens_per_s", "ratio", "world"}  # fmt: skip


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    monkeypatch.setattr(policy_runs, "SMALL_PACK", Pack("tiny", ((2, 8, 8), (1, 8, 8))))


def test_one_process_measures_every_policy(tmp_path, capsys):
    assert policies.main([*WORDS, "--out", str(tmp_path)]) == 0
    assert capsys.readouterr().out.startswith("measuring a CPU")
    rows = {r["peer"]: r for r in harness.read(tmp_path)}
    assert list(rows) == list(policy_runs.POLICIES)
    for row in rows.values():
        assert (row["name"], row["status"], row["device_type"]) == ("policies", "measured", "cpu")
        assert set(row["extra"]) == KEYS
        # The forms count what grows with tokens; text and rows of samples come on top, here 192
        # tokens beside 2 samples and 39 text tokens.
        kept, predicted = row["extra"]["kept_bytes"], row["extra"]["predicted_kept_bytes"]
        assert 0.7 * kept < predicted < 1.1 * kept
        assert row["extra"]["peak_memory_bytes"] >= kept
        assert not harness.is_stale(row)
    kept = {name: row["extra"]["kept_bytes"] for name, row in rows.items()}
    assert kept["full"] < kept["operators: attention"] < kept["every second block"] < kept["none"]
    assert rows["none"]["extra"]["ratio"] == 1
    (page,) = parallel_report.write(tmp_path, tmp_path / "docs")
    for name in rows:
        assert f"| tiny-test, one process | float32 | {name} |" in page.read_text()


def test_a_wrong_policy_is_exit_code_1_and_not_timed(tmp_path, monkeypatch):
    monkeypatch.setattr(policies, "truth", lambda *given: (1.0, 1.0))
    words = [*WORDS, "--policies", "full", "--out", str(tmp_path)]
    assert policies.main(words) == 1
    (row,) = harness.read(tmp_path)
    assert (row["status"], row["median_ms"]) == ("wrong", None)
    assert "of one process (1.0, 1.0)" in row["note"]


@pytest.mark.long
def test_two_processes_share_weights_and_packs(run_processes, free_port, tmp_path):
    given = {"out": str(tmp_path / "rows"), "port": free_port()}
    run_processes(2, SCRIPT, ("policies_of_two", given), backend="none")
    rows = harness.read(tmp_path / "rows")
    kept = "tiny-test, dp_shard=2, kept whole after the forward"
    assert {r["case"] for r in rows} == {kept, "tiny-test, sp=2"}
    assert {r["peer"] for r in rows} == {"none", "operators: attention"}
    assert all(r["status"] == "measured" and r["extra"]["world"] == 2 for r in rows)
    assert {r["shape"]["packs"] for r in rows if r["case"].endswith("sp=2")} == {1}
    assert {r["shape"]["packs"] for r in rows if "dp_shard" in r["case"]} == {2}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--preset", "goku-3b"], "--preset is 'goku-3b'"),
        (["--only", "sp=2"], "--only has 'sp=2': allowed are parts of ['one process']"),
        (["--policies", "all"], "--policies has 'all'"),
        (["--device", "tpu"], "device is 'tpu'"),
        (["--limit", "-1"], "--limit is -1.0"),
    ],
)
def test_bad_input_is_exit_code_2_and_named(words, said, capsys):
    assert policies.main([*WORDS, *words]) == 2
    assert said in capsys.readouterr().err


def test_the_limit_is_exit_code_1(tmp_path, capsys):
    assert policies.main([*WORDS, "--limit", "0", "--out", str(tmp_path)]) == 1
    assert "stopped after 0 s" in capsys.readouterr().out


@pytest.mark.parametrize("world", [1, 2, 3, 4, 8])
def test_every_arrangement_fits_its_world(world):
    for setting in policy_runs.settings(world):
        assert setting.dims.resolve(world) == setting.dims
        assert isinstance(setting.dims, ParallelDims)
    names = [s.name for s in policy_runs.settings(world)]
    assert len(set(names)) == len(names)


def test_memory_counts_what_lived_and_what_stays():
    device = torch.device("cpu")
    kept = []

    def work():
        big = torch.empty(1_000_000, dtype=torch.uint8)
        gone = weakref.ref(big)
        del big
        assert gone() is None
        kept.append(torch.empty(300_000, dtype=torch.uint8))

    most, stays = policy_runs.memory(work, device)
    assert 1_000_000 <= most < 1_010_000
    assert 300_000 <= stays < 310_000
