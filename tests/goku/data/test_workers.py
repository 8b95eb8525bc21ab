from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from goku.data.workers import Lost, ordered_map

# The functions are builtins, which a fresh process can import by name: `eval` of what to do.
DIE = "__import__('os').kill(__import__('os').getpid(), 9)"


def run(items: list[str], workers: int, ahead: int | None = None) -> list[object]:
    return list(ordered_map(eval, items, name=str, workers=workers, ahead=ahead))


@pytest.mark.parametrize("workers", [0, 1, 3])
@pytest.mark.parametrize("ahead", [None, 1, 50])
def test_results_come_in_order(workers: int, ahead: int | None) -> None:
    # The first items take longest, so that the later ones finish before them.
    items = [f"(__import__('time').sleep({0.1 if i < 2 else 0}), {i})[1]" for i in range(12)]
    assert run(items, workers, ahead) == list(range(12))


def test_no_items_start_nothing() -> None:
    assert run([], workers=4) == []


@pytest.mark.parametrize("workers", [0, 2])
def test_an_error_is_raised_with_the_items_name(workers: int) -> None:
    results = ordered_map(eval, ["1", "1 // 0", "2"], name="<{}>".format, workers=workers)
    assert next(results) == 1
    with pytest.raises(ZeroDivisionError) as error:
        next(results)
    assert error.value.__notes__ == ["while working on <1 // 0>"]


def test_a_dying_worker_costs_its_own_item_only() -> None:
    items = ["0", "1", DIE, "3", DIE, *map(str, range(5, 14)), DIE]
    results = run(items, workers=2)
    lost = [i for i, result in enumerate(results) if isinstance(result, Lost)]
    assert lost == [2, 4, 14]
    assert [r for r in results if not isinstance(r, Lost)] == [0, 1, 3, *range(5, 14)]
    assert "died" in results[2].reason  # type: ignore[attr-defined]


def test_the_window_bounds_what_is_in_flight(tmp_path: Path) -> None:
    items = [f"open({str(tmp_path / str(i))!r}, 'w').close()" for i in range(20)]
    results = ordered_map(eval, items, name=str, workers=2, ahead=4)
    next(results)
    time.sleep(0.5)
    # One was handed out and at most four more were begun.
    assert len(list(tmp_path.iterdir())) <= 5
    results.close()  # type: ignore[attr-defined]
    assert len(list(tmp_path.iterdir())) <= 5


def test_a_killed_parent_leaves_no_workers(tmp_path: Path) -> None:
    script = tmp_path / "main.py"
    script.write_text(
        "import sys\n"
        "from goku.data.workers import ordered_map\n"
        "if __name__ == '__main__':\n"
        "    one = \"(__import__('time').sleep(0.2), __import__('os').getpid())[1]\"\n"
        "    for pid in ordered_map(eval, [one] * 600, name=str, workers=2):\n"
        "        print(pid, flush=True)\n"
    )
    with subprocess.Popen(
        [sys.executable, script],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,  # the resource tracker's word on what the killed one left
        text=True,
    ) as parent:
        assert parent.stdout is not None
        workers = {int(parent.stdout.readline()) for _ in range(4)}
        assert workers
        assert parent.pid not in workers
        parent.kill()
        parent.wait()
        deadline = time.monotonic() + 20
        while any(alive(pid) for pid in workers):
            assert time.monotonic() < deadline, f"still alive: {workers}"
            time.sleep(0.05)


def alive(pid: int) -> bool:
    """Running, not merely waiting to be reaped."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state not in ("Z", "X") and os.path.exists(f"/proc/{pid}")
