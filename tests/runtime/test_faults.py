"""A rank that raises, is killed or stops inside an exchange: the others get an error, none hangs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("fault_processes.py")
WORLD, NO_HEADS = 4, 3
VICTIM_RAISED, SURVIVED, KILLED = 11, 12, -9

# Seconds: the group's timeout, and what a loaded machine may add to it.
TIMEOUT, SLACK = 4.0, 8.0

SCENARIOS = [
    {"fault": fault, "where": where, "victim": victim}
    for fault, where, victim in (
        ("raise", "forward", 1),
        ("raise", "backward", 0),
        ("kill", "forward", 2),
        ("kill", "backward", NO_HEADS),
        ("stop", "forward", NO_HEADS),
        ("stop", "backward", 1),
    )
]
# The groups that a mesh makes have a timeout of their own; the last one's victim stops in one of two.
SCENARIOS.append({"fault": "stop", "where": "forward", "victim": 2, "sp": 2})


@pytest.fixture(scope="module")
def played(tmp_path_factory: pytest.TempPathFactory) -> list[list[dict[str, object]]]:
    """What was printed in each scenario; all of them in one launch, for start-up is slow."""
    store = tmp_path_factory.mktemp("faults") / "store"
    process = subprocess.Popen(
        [sys.executable, str(SCRIPT), str(store), str(TIMEOUT), *map(json.dumps, SCENARIOS)],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ
        | {
            "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
            "OMP_NUM_THREADS": "1",
            "GLOO_SOCKET_IFNAME": "lo",
        },
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=150)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, 9)
        output, _ = process.communicate()
        pytest.fail(f"a scenario hangs:\n{output}")
    assert process.returncode == 0, output
    # The session that was started for it has no process left.
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)
    scenarios: list[list[dict[str, object]]] = [[]]
    for line in output.splitlines():
        said = json.loads(line)
        scenarios[-1].append(said)
        if "codes" in said:
            scenarios.append([])
    assert scenarios.pop() == []
    return scenarios


@pytest.mark.slow
@pytest.mark.parametrize("number", range(len(SCENARIOS)), ids=lambda i: "-".join(
    map(str, SCENARIOS[i].values())
))  # fmt: skip
def test_every_other_rank_gets_an_error(played: list[list[dict[str, object]]], number: int) -> None:
    scenario, lines = SCENARIOS[number], played[number]
    codes = [SURVIVED] * WORLD
    codes[scenario["victim"]] = VICTIM_RAISED if scenario["fault"] == "raise" else KILLED
    assert lines[-1] == {"codes": codes}, lines
    errors = lines[:-1]
    assert sorted(error["rank"] for error in errors) == sorted(
        set(range(WORLD)) - {scenario["victim"]}
    )
    for error in errors:
        assert error["seconds"] < TIMEOUT + SLACK, error
        assert any(word in error["error"] for word in ("Timed out", "onnection", "timed out")), (
            error
        )
        # With sp only the victim's partner is in the exchange that fails.
        degree = scenario.get("sp", WORLD)
        assert error["exchanged"] == (error["rank"] // degree != scenario["victim"] // degree)
    if scenario["fault"] == "stop":
        # Nothing but the timeout tells of a process that stands still.
        assert max(error["seconds"] for error in errors) >= TIMEOUT, errors
