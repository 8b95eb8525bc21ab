"""python -m bench: what it runs, takes up again and refuses."""

import subprocess
import sys

import pytest
import torch

from bench import __main__ as command
from bench import block, gpu_steps, harness, running, step
from bench.packs import Pack

PACKS = (Pack("one", ((1, 2, 3),)), Pack("two", ((1, 2, 2), (2, 1, 1))))


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    """Packs of a few tokens, and a block of the smallest model."""
    for name in running.OPERATORS:  # each has imported the function by name
        monkeypatch.setattr(f"bench.{name}.packs", lambda kind: PACKS)
    settings = [block.Setting("tiny-test", pack, block.PLAIN) for pack in PACKS]
    monkeypatch.setattr(block, "settings", lambda kind: iter(settings))
    steps = [step.Setting("tiny-test", pack, "full", "torch") for pack in PACKS]
    monkeypatch.setattr(step, "settings", lambda kind: iter(steps))


def run(out, *words, seconds="0"):
    given = ["run", *words, "--device", "cpu", "--seconds", seconds, "--out", str(out)]
    return command.main(given)


def test_every_benchmark_runs_and_says_that_it_is_a_cpu(tmp_path, capsys):
    assert run(tmp_path, "--peers", "eager", "goku", "full") == 0
    said = capsys.readouterr().out
    assert said.startswith("measuring a CPU")
    assert said.count("goku triton is absent") == len(running.OPERATORS)  # once each
    rows = harness.read(tmp_path)
    assert {r["name"] for r in rows} == set(running.BENCHMARKS)
    assert {r["device_type"] for r in rows} == {"cpu"}
    assert {r["peer"] for r in rows if r["status"] == "measured"} == {"eager", "full"}
    assert len(list(tmp_path.iterdir())) == len(running.BENCHMARKS) == 8
    assert not any(harness.is_stale(r) for r in rows)


def test_kernels_are_measured_without_the_checkpoints_engine():
    """A GPU machine need not have built it; None in its place is a failed import."""
    code = (
        "import sys; sys.modules['goku_runtime._io'] = None\n"
        "from bench.__main__ import main; sys.exit(main(['peers']))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=harness.ROOT, capture_output=True,
                          text=True, timeout=300)  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    assert "torch varlen_attn" in done.stdout


def test_only_and_peers_choose(tmp_path):
    assert run(tmp_path, "adaln_modulate", "--only", "goku-8b", "two", "--peers", "eager") == 0
    rows = harness.read(tmp_path)
    assert {(r["case"], r["pack"], r["peer"]) for r in rows} == {("goku-8b", "two", "eager")}
    assert {r["direction"] for r in rows} == {"forward", "backward"}


def test_a_run_is_taken_up_where_it_stopped(tmp_path, capsys, monkeypatch):
    words = ("velocity_loss", "--peers", "eager", "--resume")
    assert run(tmp_path, *words, "--limit", "0") == 1
    assert "stopped after" in capsys.readouterr().out
    assert harness.read(tmp_path) == []
    assert run(tmp_path, *words, "--only", "one") == 0
    first = harness.read(tmp_path)
    assert run(tmp_path, *words) == 0
    rows = harness.read(tmp_path)
    assert rows[: len(first)] == first
    assert {r["pack"] for r in rows[len(first) :]} == {"two"}
    assert run(tmp_path, *words) == 0
    assert harness.read(tmp_path) == rows  # nothing was left
    # Other sources: measured again.
    monkeypatch.setattr(running, "_hash", lambda sources: "changed")
    assert run(tmp_path, *words) == 0
    assert len(harness.read(tmp_path)) == 2 * len(rows)


def test_a_wrong_result_of_ours_is_exit_code_1(tmp_path, monkeypatch, capsys):
    from bench import velocity_loss
    from bench.cases import Peer

    wrong = lambda inputs: tuple(2 * x for x in velocity_loss.eager(inputs))  # noqa: E731
    peers = [Peer("eager", lambda p, d: velocity_loss.eager, backend="torch"),
             Peer("goku triton", lambda p, d: wrong, backend="triton")]  # fmt: skip
    monkeypatch.setattr(velocity_loss, "PEERS", peers)
    assert run(tmp_path, "velocity_loss") == 1
    assert "goku triton: wrong: output 0 is off by" in capsys.readouterr().out
    rows = harness.read(tmp_path)
    assert {r["status"] for r in rows} == {"measured", "wrong"}
    # Taking the run up again does not make it a success: it is measured and told once more.
    assert run(tmp_path, "velocity_loss", "--resume") == 1
    assert len(harness.read(tmp_path)) == 2 * len(rows)
    # Once it is mended, the run is good and done with; a peer of another name does not count.
    peers[1] = Peer("goku triton", lambda p, d: velocity_loss.eager, backend="triton")
    assert run(tmp_path, "velocity_loss", "--resume") == 0
    peers[0] = Peer("another", lambda p, d: velocity_loss.eager)
    assert run(tmp_path, "velocity_loss", "--resume") == 0
    last = harness.read(tmp_path)
    monkeypatch.setattr(harness, "write", None)
    assert run(tmp_path, "velocity_loss", "--resume") == 0
    assert harness.read(tmp_path) == last


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["run", "fused_thing"], "OP is 'fused_thing': allowed are qk_norm_rope"),
        (["run", "--only", "no such case"], "nothing fits"),
        (["run", "--peers", "nobody"], "nothing fits"),
        (["run", "--device", "tpu"], "--device is 'tpu'"),
        (["run", "--device", "meta"], "allowed are cpu and cuda"),
        (["tune", "block"], "OP is 'block'"),
    ],
)
def test_bad_input_is_exit_code_2_and_named(words, said, capsys):
    assert command.main(words) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("name", ["tune", "screen", "warm"])
def test_what_compiles_says_that_it_needs_triton(name, capsys, monkeypatch):
    monkeypatch.setattr(command, "find_spec", lambda package: None)
    assert command.main([name]) == 2
    assert capsys.readouterr().err == f"python -m bench: {name} needs triton: pip install triton\n"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("words", [["run", "--device", "cuda"], ["tune", "adaln_modulate"]])
def test_a_gpu_that_is_not_there_is_exit_code_2(words, capsys):
    assert command.main(words) == 2
    assert "CUDA device" in capsys.readouterr().err


@pytest.mark.parametrize("words", [[], ["measure"], ["run", "--seconds", "-1"],
                                   ["run", "--limit", "soon"]])  # fmt: skip
def test_what_argparse_refuses_is_exit_code_2_too(words, capsys):
    with pytest.raises(SystemExit) as stop:
        command.main(words)
    assert stop.value.code == 2


def test_a_results_folder_that_cannot_be_read_is_exit_code_2(tmp_path, capsys):
    (tmp_path / "block.jsonl").write_text("not json\n")
    words = ["report", "--results", str(tmp_path), "--docs", str(tmp_path / "docs")]
    assert command.main(words) == 2
    assert "block.jsonl:1" in capsys.readouterr().err
    assert not (tmp_path / "docs").exists()


def test_a_results_folder_that_is_none_is_exit_code_2(tmp_path, capsys):
    assert command.main(["report", "--results", str(tmp_path / "typo")]) == 2
    assert "typo': allowed is a folder of rows" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("place", ["file/below", "file"])
def test_a_place_for_rows_that_is_none_is_exit_code_2(place, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    out = str(tmp_path / place)
    assert command.main(["run", "velocity_loss", "--device", "cpu", "--out", out]) == 2
    assert f"--out is {out!r}: " in capsys.readouterr().err


@pytest.mark.long
def test_help_has_examples_and_peers_lists_all():
    def said(*words):
        done = subprocess.run(
            [sys.executable, "-m", "bench", *words], capture_output=True, text=True,
            cwd=harness.ROOT, check=True,
        )  # fmt: skip
        return done.stdout

    assert "examples" in said("--help")
    assert "flash-attn 3" in said("peers")


def test_it_measures_where_the_native_modules_are_not_built(tmp_path):
    """As on a GPU machine whose build failed or that was not asked for one."""
    code = (
        "import sys; sys.modules['goku_runtime._io'] = None; from bench.__main__ import main; "
        f"sys.exit(main(['run', 'velocity_loss', '--device', 'cpu', '--only', 'one clip', "
        f"'--peers', 'eager', '--seconds', '0', '--out', {str(tmp_path)!r}]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=harness.ROOT,
        env=gpu_steps.environment(),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "velocity_loss.jsonl").is_file()
