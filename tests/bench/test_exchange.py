"""bench.exchange on two processes: valid rows, right before fast, exit codes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench import exchange, exchange_cases, harness, parallel_report
from bench.exchange_peers import ALONE, CONTEXT, NAIVE, OURS, RAW

SCRIPT = Path(__file__).with_name("exchange_processes.py")


def test_two_processes_measure_judge_and_refuse(run_processes, tmp_path):
    """One launch for all: starting processes is most of what this takes."""
    out, wrong, failed, late = (tmp_path / name for name in ("out", "wrong", "failed", "late"))
    said = run_processes(
        2, SCRIPT,
        "bytes_are_those_of_the_buffers",
        ("measures", {"out": str(out)}),
        ("a_wrong_result_is_code_1", {"out": str(wrong)}),
        ("a_failing_peer_is_written_down", {"out": str(failed)}),
        "bad_input_is_code_2",
        ("the_limit_is_code_1", {"out": str(late)}),
    )  # fmt: skip
    assert "measuring a CPU" in said
    assert "--peers has 'nobody'" in said
    assert "allowed are cpu and cuda" in said

    found = harness.read(out)
    assert {r["name"] for r in found} == {"exchange"}
    assert {r["device_type"] for r in found} == {"cpu"}
    assert not any(harness.is_stale(r) for r in found)
    by_key = {(r["case"], r["direction"], r["peer"]): r for r in found}
    assert len(by_key) == len(found)
    for direction in exchange.DIRECTIONS:
        peers = {p for c, d, p in by_key if c == "even, exchange, P=2" and d == direction}
        assert peers == {OURS, NAIVE, RAW}
        peers = {p for c, d, p in by_key if c == "even, attention, P=2" and d == direction}
        assert peers == {OURS, NAIVE, CONTEXT, RAW, ALONE}
        ours = by_key["even, exchange, P=2", direction, OURS]
        assert ours["status"] == "measured"
        assert ours["extra"]["ratio"] == 1
        assert ours["extra"]["backend"] == "gloo"
        assert ours["shape"]["ranks"] == 2
        naive = by_key["even, exchange, P=2", direction, NAIVE]
        assert naive["extra"]["ratio"] == naive["median_ms"] / ours["median_ms"]
        raw = by_key["even, exchange, P=2", direction, RAW]
        assert raw["percent_of_ceiling"] == 100
        assert ours["ceiling"] == raw["ceiling"]
        uneven = by_key["uneven, exchange, P=2", direction, NAIVE]
        assert uneven["status"] == "absent"
        assert "3 and 3 heads" in uneven["note"]
        assert by_key["uneven, exchange, P=2", direction, OURS]["status"] == "measured"
        packed = by_key["even, attention, P=2", direction, CONTEXT]
        assert (packed["status"], "no packed batch" in packed["note"]) == ("absent", True)

    (page,) = parallel_report.write(out, tmp_path / "docs")
    cells = [line for line in page.read_text().splitlines() if "even, exchange, P=2 | tiny" in line]
    assert len(cells) == 4  # uneven too
    ratio = f"{by_key['even, exchange, P=2', 'forward', NAIVE]['extra']['ratio']:.2f}"
    assert f"| {ratio} |" in cells[0]
    assert "| absent |" in cells[2]
    assert "it needs multiples of 2" in page.read_text()

    (bad,) = {(r["status"], r["note"].split(" is off")[0]) for r in harness.read(wrong)
              if r["peer"] == OURS}  # fmt: skip
    assert bad == ("wrong", "the result")
    notes = {r["note"] for code in "01" for r in harness.read(failed / code)
             if r["status"] == "failed"}  # fmt: skip
    assert notes == {"NotImplementedError: no such heads"}


def test_one_process_is_bad_input(capsys):
    assert exchange.main(["--device", "cpu"]) == 2
    assert "1 process: an exchange needs 2" in capsys.readouterr().err


def test_as_a_module_it_has_help_and_exit_codes():
    def run(*words):
        return subprocess.run(
            [sys.executable, "-m", "bench.exchange", *words], capture_output=True, text=True,
            cwd=harness.ROOT, env=os.environ | {"WORLD_SIZE": "2"},
        )  # fmt: skip

    helped = run("--help")
    assert helped.returncode == 0
    assert "torchrun --nproc-per-node 2 -m bench.exchange" in helped.stdout
    refused = run("--shape", "8", "0", "1", "4", "--device", "cpu")
    assert (refused.returncode, "others >= 1" in refused.stderr) == (2, True)


@pytest.mark.parametrize("size", [1, 2, 3, 4, 7])
def test_shards_are_the_pack_and_padding(size):
    case = exchange.custom(["5+0+2+3", "4", "2", "3"], "cpu")[1]
    whole = exchange_cases.Shards.draw(case, 0, 1, torch.device("cpu"))
    parts = [exchange_cases.Shards.draw(case, r, size, torch.device("cpu")) for r in range(size)]
    for i in range(3):
        together = torch.cat([part.inputs[i] for part in parts])
        assert torch.equal(together[:10], whole.inputs[i])
        assert not together[10:].any()
    for i in range(4):
        assert torch.equal(torch.cat([p.truth[i] for p in parts])[:10], whole.truth[i])


def test_the_attention_is_each_samples_own():
    q, k, v = (torch.randn(9, heads, 4, dtype=torch.float64) for heads in (4, 2, 2))
    out = exchange_cases.sample_by_sample(q, k, v, (5, 0, 2))
    assert not out[7:].any()
    for begin, end in ((0, 5), (5, 7)):
        for head in range(4):
            mine, theirs = q[begin:end, head], (x[begin:end, head // 2] for x in (k, v))
            keys, values = theirs
            weights = torch.softmax(mine @ keys.T / 2, dim=-1)
            torch.testing.assert_close(out[begin:end, head], weights @ values)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda x: x * 1.001, "dk is off by"),
        (lambda x: x.flip(0), "dk is off by"),
        (lambda x: x.fill_(float("nan")), "dk is off by nan"),
        (lambda x: x.double(), "dk is torch.float64"),
        (lambda x: x[:-1], "dk is torch.float32 (3, 2)"),
        (lambda x: x * (1 + 1e-7), ""),
    ],
)
def test_what_counts_as_different(change, said):
    truth = [torch.randn(4, 2) for _ in range(4)]
    found = [x.clone() for x in truth]
    found[2] = change(found[2])
    assert exchange_cases.differs(found, truth).startswith(said)
    assert bool(said) == bool(exchange_cases.differs(found, truth))


def test_nothing_measured_is_said(tmp_path):
    (page,) = parallel_report.write(tmp_path, tmp_path / "docs")
    said = page.read_text()
    assert "Nothing has been measured yet." in said
    assert said.count("Not measured.") == 4
