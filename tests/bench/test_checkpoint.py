"""bench.checkpoint on a state of 8 MiB: valid rows, right before fast, its page, exit codes."""

import json
from pathlib import Path

import pytest
import torch

from bench import checkpoint, checkpoint_cases, checkpoint_raw, checkpoint_report, harness
from bench import checkpoint_peers as peers
from bench.checkpoint_runs import EMPTY, RAW, WORK

TINY = f"{checkpoint_cases.TINY}, P="


def run(tmp_path: Path, *arguments: str) -> int:
    folders = {name: tmp_path / name for name in ("disk", "memory", "out")}
    for folder in folders.values():
        folder.mkdir(exist_ok=True)
    options = [word for name, folder in folders.items() for word in (f"--{name}", str(folder))]
    return checkpoint.main([*arguments, "--tiny", "--rounds", "1", *options])


def rows(tmp_path: Path) -> dict[tuple[str, str, str, str], dict]:
    found = harness.read(tmp_path / "out")
    assert {r["name"] for r in found} == {"checkpoint"}
    assert not any(harness.is_stale(r) for r in found)
    made = {(r["case"], r["pack"], r["direction"], r["peer"]): r for r in found}
    assert len(made) == len(found)
    return made


@pytest.mark.slow
def test_all_peers_of_one_process_have_rows_and_a_page(tmp_path):
    assert run(tmp_path, "rates", "--only", "P=1", "disk") == 0
    found = rows(tmp_path)
    case = f"{TINY}1"
    for peer in peers.makers(2):
        if peer not in (peers.OURS_BOUNDED, peers.META):
            row = found[case, "disk", "save", peer]
            assert (row["status"], row["note"]) == ("measured", "")
            assert row["extra"]["fsync"] is (peer not in (peers.OURS_NO_FSYNC, peers.DCP_NO_FSYNC))
    for peer in (peers.OURS, peers.DCP, peers.TORCH, peers.SAFETENSORS):
        assert found[case, "disk", "load", peer]["status"] == "measured"
    assert {key[3] for key in found if key[2] == "verify"} == {peers.OURS}
    assert {key[3] for key in found if key[2] == "stall"} == {
        peers.OURS_ASYNC, peers.DCP_ASYNC, peers.DCP_PROCESS
    }  # fmt: skip
    for direction in ("save", "load"):
        raw = found[case, "disk", direction, RAW]
        ours = found[case, "disk", direction, peers.OURS]
        assert raw["percent_of_ceiling"] == 100
        assert ours["ceiling"] == raw["ceiling"]
        assert ours["work"] == 8 << 20
        assert raw["repeats"] == ours["repeats"] == 2  # one more than the others
        assert found[case, "disk", direction, WORK]["repeats"] == 2
        empty = found[case, "disk", f"empty {direction}", EMPTY]
        assert (empty["work"], empty["shape"]["bytes"]) == (8 * 8, 8 * 8)
        assert empty["ceiling"]["what"] == "itself"  # no rate of the medium's
    assert not any((tmp_path / "disk").iterdir())

    (page,) = checkpoint_report.write(tmp_path / "out", tmp_path / "docs")
    text = page.read_text()
    assert "| save >= 90% of raw | 8 x 1 MiB, P=1, disk |" in text
    assert "save >= 1.5 x tuned DCP, both without fsync" in text
    assert f"| {case} | disk | {peers.SAFETENSORS} |" in text


@pytest.mark.long
@pytest.mark.slow
def test_two_processes_and_the_other_works(tmp_path):
    assert run(tmp_path, "rates", "--only", "P=2", "tmpfs", "--peers", "no CRC") == 0
    assert run(tmp_path, "partial") == 0
    assert run(tmp_path, "stall") == 0
    found = rows(tmp_path)
    ours = found[f"{TINY}2", "tmpfs", "load", peers.OURS]
    assert (ours["status"], ours["shape"]["processes"]) == ("measured", 2)
    assert (f"{TINY}2", "tmpfs", "save", peers.DCP_TUNED) in found
    assert (f"{TINY}2", "tmpfs", "save", peers.TORCH) not in found
    by_rows = found["1/8, P=1", "disk", "partial, rows", peers.OURS]["extra"]
    assert by_rows["bytes_needed"] == 2 * 4096 * 4096 * 4 // 8
    assert by_rows["bytes_needed"] <= by_rows["bytes_read"] <= 1.05 * by_rows["bytes_needed"]
    assert found[f"{TINY}2", "tmpfs", "empty save", EMPTY]["work"] == 8 * 8 * 2
    assert found[f"{TINY}1", "disk", "stall and copy", EMPTY]["status"] == "measured"
    copying = found[f"{TINY}1", "disk", "stall and copy", "one copy"]
    assert copying["percent_of_ceiling"] == 100
    text = checkpoint_report.render(
        checkpoint_report.Shown.of(harness.read(tmp_path / "out"), harness.ROOT)
    )
    assert "| 1/8 by rows <= 1.05 x |" in text
    assert "| stall <= 1.1 x one copy | 8 x 1 MiB, P=1 |" in text


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nothing"], "WORK is 'nothing'"),
        (["--peers", "nobody"], "--peers has 'nobody'"),
        (["--only", "nowhere"], "nothing fits"),
        (["--disk", "/nowhere"], "no such folder"),
        (["--rounds", "0"], "--rounds is 0"),
        (["--limit", "-1"], "--limit is -1"),
    ],
)
def test_bad_input_is_code_2_and_named(arguments, words, capsys):
    assert checkpoint.main(arguments) == 2
    assert words in capsys.readouterr().err


def test_what_failed_of_ours_is_code_1(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(checkpoint, "_run", lambda *_: (_ for _ in ()).throw(RuntimeError("gone")))
    assert run(tmp_path, "partial") == 1
    assert "gone" in capsys.readouterr().err
    assert not any((tmp_path / "disk").iterdir())


def test_a_wrong_result_of_ours_is_a_row_and_bad():
    work = checkpoint.Work("rates", checkpoint_cases.Case(checkpoint_cases.TINY, 1, "disk"))
    result = {"peer": peers.OURS, "direction": "load", "seconds": [], "status": "wrong",
              "note": "other\nbytes", "extra": {}}  # fmt: skip
    (row,) = checkpoint.rows(work, [result], Path())
    assert (row.status, row.note, row.timing) == ("wrong", "other bytes", None)
    assert checkpoint.is_bad(row)
    json.dumps(row.to_json({}), allow_nan=False)


@pytest.mark.parametrize(
    ("ours", "empty", "scatter", "begins"),
    [
        (100.0, 0.0, 0.0, "the loop"),
        (105.0, 0.0, 0.0, "the loop"),
        (106.0, 0.0, 0.0, "not explained: "),
        (150.0, 45.0, 0.0, "the loop"),
        (150.0, 44.0, 0.0, "not explained: "),
        (150.0, 160.0, 0.0, "the loop"),
        (106.0, 0.0, 2.9, "not explained: "),
        (106.0, 0.0, 3.0, "within this run's scatter: "),  # 103 of both
        (150.0, 40.0, 5.0, "within this run's scatter: "),
    ],
)
def test_a_target_missed_is_explained_by_the_loop_and_the_bare_call(ours, empty, scatter, begins):
    def row(direction, peer, ms):
        return {
            "case": "c", "pack": "disk", "direction": direction, "peer": peer, "status": "measured",
            "median_ms": ms, "percent_of_ceiling": 5000 / ms, "p20_ms": ms - scatter,
            "p80_ms": ms + scatter,
        }  # fmt: skip

    records = [row("save", WORK, 100.0)]
    records += [row("empty save", EMPTY, empty)] if empty else []
    found = checkpoint_report.Rows(checkpoint_report.Shown.of([], harness.ROOT), records)
    said = checkpoint_report._bound(found, "c", "disk", "save", row("save", peers.OURS, ours))
    assert said.startswith(begins)
    part = f"{empty:.0f}" if empty < ours else "all"
    assert (f"{part} of its {ours:.0f} ms" in said) is bool(empty)


def test_a_ratio_to_a_peer_is_told_beside_the_loops():
    def row(peer, ms):
        return {
            "case": "c", "pack": "disk", "direction": "load", "peer": peer, "status": "measured",
            "median_ms": ms, "percent_of_ceiling": 5000 / ms, "extra": {},
        }  # fmt: skip

    records = [row(RAW, 50.0), row(WORK, 80.0), row(peers.OURS, 60.0), row(peers.DCP, 120.0)]
    page = checkpoint_report.targets(
        checkpoint_report.Rows(checkpoint_report.Shown.of([], harness.ROOT), records)
    )
    (line,) = (line for line in page.splitlines() if ">= 3 x DCP" in line)
    assert "| 2.00 | **no** |" in line
    assert f"beside this peer: {RAW} 2.40, {WORK} 1.50 |" in line


def test_the_raw_loop_writes_and_reads_its_memory(tmp_path):
    nbytes = 5 << 20  # the last block is shorter
    for direct in (False, checkpoint_raw._direct_works(tmp_path / "trial")):
        setting = checkpoint_raw.Setting(2, 2 << 20, direct)
        loop = checkpoint_raw.Loop(nbytes)
        for work in (False, True):
            path = tmp_path / f"file-{direct}-{work}"
            before = loop._bytes.clone()
            loop.write(path, setting, fsync=True, work=work)
            assert path.read_bytes() == bytes(before.numpy())
            loop._bytes.zero_()
            loop.read(path, setting, work=work)
            assert torch.equal(loop._bytes, before)


def test_states_are_equal_only_bit_by_bit():
    state = checkpoint_cases.draw(checkpoint_cases.KINDS[checkpoint_cases.TINY], 0, 1)
    wanted = checkpoint_cases.locals_of(state)
    found = {name: tensor.clone() for name, tensor in wanted.items()}
    assert checkpoint_cases.same(found, wanted)
    found["layers.3.weight"].view(torch.int32)[0, 0] ^= 1
    assert not checkpoint_cases.same(found, wanted)
