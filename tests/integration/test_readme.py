"""What the documents show works: every Python example runs, every command line is understood."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import goku_kernels
from goku import cli
from goku.dry_run import describe, describe_recipe
from goku.recipe import is_recipe, load_recipe
from goku.run_config import load_run_config

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = ("README.md", "docs/training.md", "docs/own_videos.md")


def _blocks(language: str) -> list[str]:
    """Fenced blocks of one language ("" for plain ones), in the order of the documents."""
    blocks: list[str] = []
    for name in DOCUMENTS:
        inside: str | None = None
        for line in (ROOT / name).read_text().splitlines():
            if line.startswith("```"):
                inside = line[3:] if inside is None else None
                if inside == language:
                    blocks.append("")
            elif inside == language:
                blocks[-1] += line + "\n"
    return blocks


@pytest.mark.parametrize("code", _blocks("python"))
def test_python_examples_run(code: str, tmp_path: Path) -> None:
    result = subprocess.run(
        [sys.executable, "-W", "error::DeprecationWarning", "-c", code],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert result.returncode == 0, result.stderr


def test_every_operator_is_named() -> None:
    """And how its work is counted, by the names of one."""
    operators = [name for name in goku_kernels.__all__ if name.islower()]
    assert {str(each).split(".")[1] for each in goku_kernels.OPERATORS} <= set(operators)
    counts = [name for name in operators if name.endswith(("_flops", "_bytes"))]
    named = [*set(operators).difference(counts), "adaln_modulate_flops", "adaln_modulate_bytes"]
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert [name for name in named if f"`{name}`" not in readme] == []


def _commands() -> list[str]:
    helps = [verb.HELP for verb in cli.VERBS.values()]
    text = "\n".join([*_blocks(""), *helps])
    lines = {line.split("#")[0].strip().split("   ")[0].strip() for line in text.splitlines()}
    # Without the placeholders of a synopsis ([...], RUN).
    return sorted(c for c in lines if c.startswith("goku ") and not re.search(r"\[|\.\.\.", c))


def test_there_are_examples() -> None:
    assert len(_blocks("python")) >= 2
    assert len(_commands()) >= 4


@pytest.mark.parametrize("line", _commands())
def test_command_lines_are_understood(line: str) -> None:
    arguments = cli.parser().parse_args(shlex.split(line)[1:])
    assert arguments.verb == line.split()[1]
    for path in re.findall(r"configs/\S+\.yaml", line):
        assert (ROOT / path).is_file()


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda p: p.name)
def test_every_config_is_valid(path: Path) -> None:
    if is_recipe(path):
        recipe = load_recipe(path)
        reports = [describe_recipe(recipe, stage.name) for stage in recipe.stages]
    else:
        reports = [describe(load_run_config(path))]
    for report in reports:
        assert "parameters" in report
        assert "memory: total per process" in report
