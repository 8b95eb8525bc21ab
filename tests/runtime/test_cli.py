"""The command `goku-runtime`, and the same as `goku ckpt`."""

from __future__ import annotations

import importlib.metadata
import os
import shlex
import signal
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import pytest
import torch

import goku.cli
from goku_runtime import cli
from goku_runtime.checkpoint import save

COMMANDS = ["inspect", "verify", "diff", "reshard", "export", "probe"]


def _exit_code(main: object, *arguments: str) -> int:
    assert callable(main)
    try:
        return int(main(list(arguments)))
    except SystemExit as error:
        return int(error.code or 0)


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert _exit_code(cli.main, "--help") == 0
    assert "\n    ckpt " in capsys.readouterr().out
    assert _exit_code(cli.main, "ckpt", "--help") == 0
    printed = capsys.readouterr().out
    for command in COMMANDS:
        assert f"\n    {command} " in printed


@pytest.mark.parametrize(("main", "name"), [(cli.main, "goku-runtime"), (goku.cli.main, "goku")])
def test_the_version_is_that_of_the_installed_package(
    main: object, name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    versions: dict[str, str | None] = {"goku": "1.2.3"}

    def version(package: str) -> str | None:
        if package not in versions:
            raise importlib.metadata.PackageNotFoundError(package)
        return versions[package]

    monkeypatch.setattr(importlib.metadata, "version", version)
    assert _exit_code(main, "--version") == 0
    versions["goku"] = None  # being installed again
    assert _exit_code(main, "--version") == 0
    versions.clear()
    assert _exit_code(main, "--version") == 0
    assert capsys.readouterr().out.splitlines() == [
        f"{name} 1.2.3",
        f"{name} unknown version (used from a source tree, not installed)",
        f"{name} unknown version (used from a source tree, not installed)",
    ]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_with_examples_that_parse(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for main, name in ((cli.main, "goku-runtime"), (goku.cli.main, "goku")):
        assert _exit_code(main, "ckpt", command, "--help") == 0
        printed = capsys.readouterr().out
        assert f"usage: {name} ckpt" in printed
        examples = printed[printed.index("examples:") :].splitlines()[1:]
        # Each shows the command that was called: who has the runtime alone has no goku.
        lines = [line.strip() for line in examples if line.startswith(f"  {name} ckpt {command} ")]
        assert len(lines) >= 2
        for line in lines:
            words = shlex.split(line.removeprefix(f"{name} ").split("    ")[0])
            for parser in (cli.parser(), goku.cli.parser()):
                assert parser.parse_args(words).command == command


def test_without_the_compiled_module_it_says_which_step_builds_it(tmp_path: Path) -> None:
    code = (
        "import sys; sys.modules['goku_runtime._io'] = None\n"
        "import torch; from goku_runtime import checkpoint\n"
        "from goku_runtime.checkpoint.tools.probing import probe\n"
        f"path = {str(tmp_path)!r}\n"
        "tries = (lambda: checkpoint.save({'w': torch.ones(2)}, path + '/c'), lambda: probe(path),\n"
        "         lambda: checkpoint.verify(path), lambda: checkpoint.load({}, path))\n"
        "for one in tries:\n"
        "    try:\n        one()\n"
        "    except (ImportError, ValueError) as error:\n        print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    said = done.stdout.splitlines()
    remedy = "cannot be imported: `pip install .` in the repository builds it with a C++ compiler"
    assert [remedy in line for line in said] == [True, True, False, False], said
    assert list(tmp_path.iterdir()) == []


def test_a_place_to_probe_that_is_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert _exit_code(cli.main, "ckpt", "probe", str(tmp_path / "nope")) == 2
    said = capsys.readouterr().err
    assert "is no directory" in said
    assert "probe-" not in said


@pytest.mark.parametrize("main", [cli.main, goku.cli.main])
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], ["required"]),
        (["ckpt"], ["required", "{inspect,verify,diff,reshard,export,probe}"]),
        (["ckpt", "check"], ["check", "verify"]),
        (["ckpt", "inspect"], ["PATH"]),
        (["ckpt", "diff", "a"], ["B"]),
        (["ckpt", "reshard", "a", "b"], ["--ranks"]),
        (["ckpt", "reshard", "a", "b", "--ranks", "two"], ["--ranks", "two"]),
        (["ckpt", "export", "a", "b", "--format", "onnx"], ["onnx", "diffusers"]),
        (["ckpt", "export", "a", "b", "--max-shard-size", "big"], ["--max-shard-size", "'big'"]),
        (["ckpt", "verify", "a", "--fast"], ["--fast"]),
    ],
)
def test_a_wrong_call_exits_2_and_says_what_is_wrong(
    main: object, arguments: list[str], words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert _exit_code(main, *arguments) == 2
    printed, error = capsys.readouterr()
    assert printed == ""
    assert "usage: goku" in error
    assert all(word in error for word in words), error


def test_goku_forwards(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save({"w": torch.ones(2)}, tmp_path / "c")
    outputs = []
    for main in (cli.main, goku.cli.main):
        assert main(["ckpt", "inspect", str(tmp_path / "c")]) == 0
        outputs.append(capsys.readouterr().out)
    assert outputs[0] == outputs[1]
    assert goku.cli.main(["ckpt", "verify", str(tmp_path / "none")]) == 2
    assert capsys.readouterr().err.startswith("goku ckpt verify: ")


def test_the_console_scripts() -> None:
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    assert project["scripts"] == {"goku": "goku.cli:main", "goku-runtime": "goku_runtime.cli:main"}


def test_help_is_there_without_importing_torch() -> None:
    code = (
        "import sys, goku_runtime.cli\n"
        "try:\n    goku_runtime.cli.main(['ckpt', 'export', '--help'])\n"
        "except SystemExit as error:\n"
        "    assert error.code == 0 and 'torch' not in sys.modules\n"
        "else:\n    raise AssertionError('help returned')\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_errors_that_are_ours_keep_their_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise KeyError("a fault")

    monkeypatch.setattr("goku_runtime.checkpoint.tools.inspect", broken)
    with pytest.raises(KeyError, match="a fault"):
        cli.main(["ckpt", "inspect", "x"])


def test_a_reader_that_has_seen_enough(tmp_path: Path) -> None:
    save({f"t{i}": torch.zeros(1) for i in range(3000)}, tmp_path / "c")
    command = [sys.executable, "-m", "goku_runtime.cli", "ckpt", "inspect", str(tmp_path / "c")]
    shown = subprocess.Popen(
        [*command, "--tensors", "*"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert shown.stdout is not None
    assert shown.stderr is not None
    with shown:
        assert shown.stdout.readline() == f"{tmp_path / 'c'}\n"
        shown.stdout.close()
        assert shown.stderr.read() == ""
    assert shown.returncode == 141


def test_an_interrupt_leaves_nothing(tmp_path: Path) -> None:
    """Ctrl-C once the directory is there: it goes, with what was written in it."""
    save({"w": torch.zeros(1 << 24)}, tmp_path / "c")
    code = (
        "import sys, time\n"
        "from goku_runtime import cli\n"
        "from goku_runtime.checkpoint.tools import streaming\n"
        "fill = streaming.FileStream._fill\n"
        "def slow(self, *arguments):\n"
        "    fill(self, *arguments)\n"
        "    time.sleep(0.2)\n"
        "streaming.FileStream._fill = slow\n"
        "sys.exit(cli.main(sys.argv[1:]))\n"
    )
    command = ["ckpt", "reshard", str(tmp_path / "c"), str(tmp_path / "out"), "--ranks", "8"]
    process = subprocess.Popen(
        [sys.executable, "-c", code, *command], stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob(".out.saving-*/__0_0.distcp")):
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130
    assert error == "goku-runtime ckpt reshard: interrupted\n"
    assert [path.name for path in tmp_path.iterdir()] == ["c"]
