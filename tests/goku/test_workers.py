from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from goku.workers import Lost, ordered_map

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


@pytest.mark.parametrize(
    ("death", "how"), [(DIE, "signal 9, Killed"), ("__import__('os')._exit(3)", "exit code 3")]
)
def test_processes_that_die_while_others_are_started_hang_nothing(death: str, how: str) -> None:
    items = [death if i % 2 else str(i) for i in range(16)]
    results = run(items, workers=4, ahead=16)
    assert results[::2] == list(range(0, 16, 2))
    for result in results[1::2]:
        assert isinstance(result, Lost)
        assert f"died on it ({how})" in result.reason


def test_an_item_whose_process_dies_once_is_done_alone(tmp_path: Path) -> None:
    # The first process that takes it dies while another item runs; the second finds it done.
    once = tmp_path / "once"
    other = tmp_path / "other"
    ends = f"(open({str(once)!r}, 'x'), __import__('os')._exit(1))"
    item = f"open({str(other)!r}).read() if __import__('os').path.exists({str(once)!r}) else {ends}"
    write = f"__import__('pathlib').Path({str(other)!r}).write_text('done')"
    slow = f"(__import__('time').sleep(1), {write}, 7)[2]"
    assert run([item, slow, "8"], workers=2) == ["done", 7, 8]


@pytest.mark.parametrize("error", ["EOFError", "ConnectionResetError", "KeyError", "SystemError"])
def test_an_error_of_an_item_is_no_death(error: str) -> None:
    fails = f"(_ for _ in ()).throw({error}('of the item'))"
    results = ordered_map(eval, ["1", fails], name=str, workers=1)
    assert next(results) == 1
    with pytest.raises(eval(error), match="of the item") as found:
        next(results)
    # Where it was raised, in the process.
    assert 'File "<string>", line 1, in <genexpr>' in str(found.value.__cause__)


UNPICKLABLE = "__import__('threading').Lock()"


@pytest.mark.parametrize(
    ("item", "error", "words"),
    [
        (UNPICKLABLE, TypeError, "cannot pickle"),
        (f"(_ for _ in ()).throw(ValueError('odd', {UNPICKLABLE}))", RuntimeError, "ValueError: "),
        (
            "(_ for _ in ()).throw(type('Local', (Exception,), {})('odd'))",
            RuntimeError,
            "Local: odd .cannot be handed over: ",
        ),
        (
            "(_ for _ in ()).throw(__import__('json').JSONDecodeError('no', 'x', 0))",
            ValueError,
            "no",
        ),
    ],
)
def test_what_cannot_be_handed_over_is_an_error_of_its_item(
    item: str, error: type[Exception], words: str
) -> None:
    results = ordered_map(eval, [item, "1"], name=str, workers=1)
    with pytest.raises(error, match=words):
        next(results)


def test_an_item_that_cannot_be_handed_over_is_an_error() -> None:
    with pytest.raises(TypeError, match="cannot pickle"):
        list(ordered_map(eval, [threading.Lock()], name=str, workers=1))  # type: ignore[arg-type]


def test_the_processes_have_the_environment_of_now(monkeypatch: pytest.MonkeyPatch) -> None:
    for value in ("a", "b"):
        monkeypatch.setenv("GOKU_TEST_OF_WORKERS", value)
        assert run(["__import__('os').environ['GOKU_TEST_OF_WORKERS']"], workers=1) == [value]
    monkeypatch.delenv("GOKU_TEST_OF_WORKERS")
    assert run(["__import__('os').getenv('GOKU_TEST_OF_WORKERS')"], workers=1) == [None]


def test_leaving_early_waits_for_no_item() -> None:
    results = ordered_map(eval, ["1", "__import__('time').sleep(3600)"], name=str, workers=2)
    assert next(results) == 1
    results.close()  # type: ignore[attr-defined]


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
        "from goku.workers import ordered_map\n"
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


@pytest.mark.parametrize("left", ["1", "__import__('os').getpid()"])
def test_an_unfinished_map_does_not_hold_up_the_end(tmp_path: Path, left: str) -> None:
    script = tmp_path / "main.py"
    script.write_text(
        "from goku.workers import ordered_map\n"
        "if __name__ == '__main__':\n"
        f"    results = ordered_map(eval, [{left!r}] * 9, name=str, workers=2)\n"
        "    print(next(results))\n"
    )
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().isdigit()
    assert done.stderr == ""


def test_an_unguarded_script_is_told_so(tmp_path: Path) -> None:
    script = tmp_path / "main.py"
    script.write_text(
        "from goku.workers import ordered_map\n"
        "print(list(ordered_map(eval, ['1', '2'], name=str, workers=2)))\n"
    )
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert done.stdout == ""
    assert "WorkersLost: a worker process ended before its first item (exit code 1)" in done.stderr
    assert 'if __name__ == "__main__"' in done.stderr


def alive(pid: int) -> bool:
    """Running, not merely waiting to be reaped."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state not in ("Z", "X") and os.path.exists(f"/proc/{pid}")
