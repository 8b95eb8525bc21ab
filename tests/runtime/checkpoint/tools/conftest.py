"""Checkpoints of all topologies, and the command line in this process."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

from goku_runtime.cli import main

sys.path.insert(0, str(Path(__file__).parent))  # test folders are no packages
sys.path.insert(0, str(Path(__file__).parents[1]))
import simulated
import version1_writer


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """`simulated.state` as each topology, and version 1, writes it; not to be changed."""
    root = tmp_path_factory.mktemp("saved")
    found = {
        name: simulated.save(simulated.state(), root / name, name) for name in simulated.TOPOLOGIES
    }
    version1_writer.save(simulated.state(), root / "version1")
    return found | {"version1": root / "version1"}


class Done(NamedTuple):
    code: int
    out: str
    err: str


@pytest.fixture
def ckpt(capsys: pytest.CaptureFixture[str]) -> Callable[..., Done]:
    """ckpt(arguments...) -> exit code and what was printed."""

    def run(*arguments: object) -> Done:
        capsys.readouterr()
        try:
            code = main(["ckpt", *map(str, arguments)])
        except SystemExit as error:  # argparse
            code = int(error.code or 0)
        return Done(code, *capsys.readouterr())

    return run
