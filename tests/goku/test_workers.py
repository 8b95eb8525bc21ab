from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import closing
from multiprocessing import forkserver
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
            # Raises OSError when it is pickled, and has no words.
            "(_ for _ in ()).throw(type('Odd', (Exception,), {'__reduce__': lambda s: open('/no/file'),"
            " '__str__': lambda s: 1 // 0})())",
            RuntimeError,
            "Odd: <exception str.. failed> .cannot be handed over: FileNotFoundError",
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
    results.close()


def test_the_window_bounds_what_is_in_flight(tmp_path: Path) -> None:
    items = [f"open({str(tmp_path / str(i))!r}, 'w').close()" for i in range(20)]
    results = ordered_map(eval, items, name=str, workers=2, ahead=4)
    next(results)
    time.sleep(0.5)
    # One was handed out and at most four more were begun.
    assert len(list(tmp_path.iterdir())) <= 5
    results.close()
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


# One of the standard library's finalizers before multiprocessing's own, which then waits first.
EARLY = "import tempfile; folder = tempfile.TemporaryDirectory()\n"


@pytest.mark.parametrize("first", ["", EARLY])
@pytest.mark.parametrize(
    "left", ["1", "__import__('os').getpid()", "__import__('time').sleep(3600)"]
)
def test_an_unfinished_map_does_not_hold_up_the_end(tmp_path: Path, left: str, first: str) -> None:
    done = script(
        tmp_path,
        first + "from goku.workers import ordered_map\n"
        "if __name__ == '__main__':\n"
        f"    results = ordered_map(eval, ['1', *[{left!r}] * 9], name=str, workers=2)\n"
        "    print(next(results))\n",
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "1\n"
    assert done.stderr == ""


def test_an_exception_in_a_loop_over_it_does_not_wait_for_the_items(tmp_path: Path) -> None:
    done = script(
        tmp_path,
        "from goku.workers import ordered_map\n"
        "def loop():\n"
        "    items = ['1', *[\"__import__('time').sleep(3600)\"] * 9]\n"
        "    for result in ordered_map(eval, items, name=str, workers=2):\n"
        "        raise RuntimeError('out of memory')\n"
        "if __name__ == '__main__':\n"
        "    loop()\n",
    )
    assert done.returncode == 1
    assert done.stderr.endswith("RuntimeError: out of memory\n")


def test_processes_import_from_where_their_parent_does(tmp_path: Path) -> None:
    for folder, word in (("main", "right"), ("current", "wrong")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "steps.py").write_text(f"def step(item): return {word!r}\n")
    main = (
        "import steps\n"
        "from goku.workers import ordered_map\n"
        "if __name__ == '__main__':\n"
        "    for workers in (0, 1):\n"
        "        print(*ordered_map(steps.step, [1], name=str, workers=workers))\n"
    )
    done = script(tmp_path / "main", main, cwd=tmp_path / "current")
    assert (done.returncode, done.stdout) == (0, "right\nright\n"), done.stderr


def test_what_the_parent_looks_for_stays_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    for path in ("/nowhere", None):
        monkeypatch.delenv("PYTHONSAFEPATH", raising=False)
        if path is None:
            monkeypatch.delenv("PYTHONPATH", raising=False)
        else:
            monkeypatch.setenv("PYTHONPATH", path)
        ask = "[__import__('os').getenv(n) for n in ('PYTHONPATH', 'PYTHONSAFEPATH')]"
        assert run([ask], workers=1) == [[path, None]]
        assert eval(ask) == [path, None]


def server() -> int:
    pid = forkserver._forkserver._forkserver_pid  # type: ignore[attr-defined]
    assert isinstance(pid, int)
    return pid


def test_items_do_not_suffer_from_the_death_of_the_server() -> None:
    for seconds in (0.0, 0.02, 0.1):
        results = ordered_map(
            eval, ["__import__('time').sleep(0.05)"] * 20, name=str, workers=4, ahead=20
        )
        with closing(results):
            next(results)
            time.sleep(seconds)
            os.kill(server(), signal.SIGKILL)
            # Others begin at that moment.
            assert run(["1", DIE, "2"], workers=2)[::2] == [1, 2]
            assert list(results) == [None] * 19


def test_leaving_early_kills_processes_whose_server_is_gone() -> None:
    items = ["__import__('os').getpid()", "__import__('time').sleep(3600)"] * 2
    results = ordered_map(eval, items, name=str, workers=2)
    pid = next(results)
    assert isinstance(pid, int)
    os.kill(server(), signal.SIGTERM)  # as a job's end does, to every process
    time.sleep(0.2)
    results.close()
    assert not alive(pid)


@pytest.mark.filterwarnings("error")  # of a finalizer's exception, which nobody else hears of
def test_a_forgotten_map_may_be_collected_by_its_own_thread() -> None:
    began, go, collected = threading.Event(), threading.Event(), threading.Event()

    def collect(item: int) -> None:
        if item:
            began.set()
            go.wait()
            gc.collect()
            collected.set()

    def forget() -> None:
        results = ordered_map(collect, [0, 1], name=str, workers=0, ahead=2)
        next(results)
        began.wait()
        circle: list[object] = [results]
        circle.append(circle)

    forget()
    go.set()
    assert collected.wait(20)


def test_an_unguarded_script_is_told_so(tmp_path: Path) -> None:
    done = script(
        tmp_path,
        "from goku.workers import ordered_map\n"
        "print(list(ordered_map(eval, ['1', '2'], name=str, workers=2)))\n",
    )
    assert done.returncode == 1
    assert done.stdout == ""
    assert "WorkersLost: a worker process ended before its first item (exit code 1)" in done.stderr
    assert 'if __name__ == "__main__"' in done.stderr


def test_a_module_that_cannot_be_imported_is_told(tmp_path: Path) -> None:
    (tmp_path / "steps.py").write_text(
        "import os\nif 'HERE' not in os.environ: 1 // 0\ndef step(item): return item\n"
    )
    done = script(
        tmp_path,
        "import os; os.environ['HERE'] = '1'; import steps; del os.environ['HERE']\n"
        "from goku.workers import ordered_map\n"
        "if __name__ == '__main__':\n"
        "    print(list(ordered_map(steps.step, ['1', '2'], name=str, workers=2)))\n",
    )
    assert done.returncode == 1
    assert "ZeroDivisionError" in done.stderr
    assert "WorkersLost: a worker process ended before its first item (their server" in done.stderr


def script(folder: Path, text: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    path = folder / "main.py"
    path.write_text(text)
    return subprocess.run(
        [sys.executable, path], capture_output=True, text=True, timeout=60, cwd=cwd
    )


def alive(pid: int) -> bool:
    """Running, not merely waiting to be reaped."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state not in ("Z", "X") and os.path.exists(f"/proc/{pid}")
