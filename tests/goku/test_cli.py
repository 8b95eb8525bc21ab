"""The command line itself: help that helps, and a wrong call that says so with exit code 2."""

from __future__ import annotations

import shlex
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

import goku.data
from goku.cli import main, parser
from goku.packing import sample_cost
from goku.run_config import load_run_config

VERBS = ["demo", "train", "sample", "doctor", "cache", "export", "ckpt"]


def _exit_code(*arguments: str) -> int:
    """argparse leaves by SystemExit; a verb returns."""
    try:
        return main(list(arguments))
    except SystemExit as error:
        return int(error.code or 0)


def test_the_main_help_names_every_verb(capsys: pytest.CaptureFixture[str]) -> None:
    assert _exit_code("--help") == 0
    printed = capsys.readouterr().out
    for verb in VERBS:
        assert f"\n    {verb} " in printed


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help_with_examples_that_parse(
    verb: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _exit_code(verb, "--help") == 0
    printed = capsys.readouterr().out
    examples = printed[printed.index("examples:") :].splitlines()[1:]
    commands = [line.strip() for line in examples if f"goku {verb}" in line or "goku.cli" in line]
    assert len(commands) >= 2
    for command in commands:
        # What stands behind the verb, without the explanation that is set apart by spaces.
        words = command.split(f" {verb}", 1)[1].split("    ")[0]
        assert parser().parse_args([verb, *shlex.split(words)]).verb == verb


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], ["required", "{demo,train,sample,doctor,cache,export,ckpt}"]),
        (["tarin"], ["tarin", "train"]),
        (["train"], ["config"]),
        (["sample"], ["run"]),
        (["doctor"], ["dataset"]),
        (["sample", "run", "--height", "tall"], ["--height", "tall", "int"]),
        (["sample", "run", "--method", "rk4"], ["--method", "rk4", "euler", "heun", "ab2"]),
        (["export", "run"], ["out"]),
        (["sample", "run", "--device", "tpu"], ["--device", "tpu", "cuda"]),
        (["doctor", "media", "--fast"], ["--fast"]),
    ],
)
def test_a_wrong_call_exits_2_and_says_what_is_wrong(
    arguments: list[str], words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert _exit_code(*arguments) == 2
    printed, error = capsys.readouterr()
    assert printed == ""
    assert "usage: goku" in error
    assert all(word in error for word in words), error


def test_the_doctor_balances_as_the_config_trains(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    costs: list[Callable[[int], float] | None] = []

    def record(*_: object, cost: Callable[[int], float] | None, **__: object) -> SimpleNamespace:
        costs.append(cost)
        return SimpleNamespace(ok=True, to_text=lambda: "fine")

    monkeypatch.setattr("goku.data.doctor", record)
    config = Path(__file__).parents[2] / "configs" / "small.yaml"
    model = load_run_config(config, [f"data.path={tmp_path}", "out=unused"]).model
    assert main(["doctor", str(tmp_path), "--config", str(config)]) == 0
    assert main(["doctor", str(tmp_path)]) == 0
    given, default = costs
    assert default is None
    assert given is not None
    for length in (1, 100, 5000):
        assert given(length) == sample_cost(length, model.dim, text_dim=model.text_dim)


def test_errors_that_are_ours_keep_their_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only bad input becomes a line: a fault in the program must be seen as one."""

    def broken(*_: object) -> None:
        raise KeyError("a fault")

    monkeypatch.setattr("goku.run_config.load_run_config", broken)
    with pytest.raises(KeyError, match="a fault"):
        main(["train", "run.yaml"])


@pytest.mark.parametrize(
    "error", [ValueError("bad value"), OSError(28, "No space left"), ImportError("not installed")]
)
def test_bad_input_is_one_line(
    error: Exception, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*_: object) -> None:
        raise error

    monkeypatch.setattr("goku.run_config.load_run_config", refuse)
    assert main(["train", "run.yaml"]) == 2
    assert capsys.readouterr().err == f"goku train: {error}\n"


def test_an_interrupt_before_the_work_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("goku.run_config.load_run_config", interrupt)
    assert main(["train", "run.yaml"]) == 130
    assert capsys.readouterr().err == "goku train: interrupted\n"


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_the_doctor_without_a_traceback(
    number: int,
    code: int,
    tmp_path: Path,
    signal_at: Callable[..., list[int]],
    capfd: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "picture.png").write_bytes(b"no picture")
    looked = signal_at(goku.data, "doctor", number, at=1)
    with pytest.raises(SystemExit) as left:
        main(["doctor", str(tmp_path)])
    assert (left.value.code, len(looked)) == (code, 1)
    printed, error = capfd.readouterr()
    assert printed == ""
    assert "Traceback" not in error


def test_a_dry_run_prints_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    config = tmp_path / "run.yaml"
    config.write_text(
        "{out: run, data: {path: media}, vae: {path: vae, train: {}}, model: {preset: tiny},"
        " packing: {tokens_per_step: 64, tokens_per_pack: 64}}"
    )
    assert main(["train", str(config), "--dry-run", "optimizer.lr=1e-3"]) == 0
    printed, error = capsys.readouterr()
    assert "  lr: 0.001\n" in printed
    assert "parameters" in printed
    assert error == ""
    # Without what the run would stop for at once the report is the same, the exit code not.
    assert main(["train", str(config), "--dry-run", "text.path=t5", "vae.train=null"]) == 2
    printed, error = capsys.readouterr()
    assert "memory: total per process" in printed
    vae, text = error.splitlines()
    assert vae.startswith("goku train: vae.path is vae, which holds no VAE")
    assert text.startswith("goku train: text.path is t5, which holds no text encoder")
    assert [path.name for path in tmp_path.iterdir()] == ["run.yaml"]


def test_help_is_there_without_importing_torch() -> None:
    """A help text in a tenth of a second; the module is run as the command runs it."""
    code = (
        "import sys, goku.cli\n"
        "try:\n    goku.cli.main(['--help'])\n"
        "except SystemExit as error:\n"
        "    assert error.code == 0 and 'torch' not in sys.modules\n"
        "else:\n    raise AssertionError('help returned')\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "examples" not in result.stderr
    assert result.stdout.startswith("usage: goku")


def test_what_python_says_of_a_file_is_said_in_words(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _exit_code("sample", "--show", str(tmp_path)) == 2
    assert capsys.readouterr().err == f"goku sample: {tmp_path}: Is a directory\n"


def test_a_reader_that_has_seen_enough_is_no_error(tmp_path: Path) -> None:
    """As `| head`."""
    config = tmp_path / "run.yaml"
    config.write_text(
        "{out: run, data: {path: media}, vae: {path: vae, train: {}}, model: {preset: tiny},"
        " packing: {tokens_per_step: 64, tokens_per_pack: 64}}"
    )
    process = subprocess.Popen(
        [sys.executable, "-m", "goku.cli", "train", str(config), "--dry-run"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=tmp_path,
    )  # fmt: skip
    assert process.stdout is not None
    process.stdout.close()
    assert process.stderr is not None
    said = process.stderr.read()
    assert (process.wait(), said) == (141, b"")


def test_a_warning_is_one_line_without_source(capsys: pytest.CaptureFixture[str]) -> None:
    """As a process prints it; pytest keeps warnings to itself."""
    code = (
        "import warnings, goku.cli\n"
        "goku.cli.VERBS['doctor'].run = lambda args: warnings.warn('a cache is damaged') or 0\n"
        "goku.cli.main(['doctor', '.'])\n"
        "warnings.warn('outside')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    first, *rest = done.stderr.splitlines()
    assert first == "goku: warning: a cache is damaged"
    assert rest[0].endswith("UserWarning: outside")
