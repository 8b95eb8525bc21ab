"""Packs chosen in a process of its own: the same ones, whatever becomes of either process."""

import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from goku_runtime.balancing import balance_packs
from goku_runtime.pack_process import PackProcess, PackProcessLost

BUDGET = 64
# Costs without relation to lengths take the search longest: some ten seconds for these.
LONG = ([1 + 37 * k % 997 for k in range(60_000)], [1.0 + 0.61 * k % 1 for k in range(60_000)])


@pytest.fixture(scope="module")
def shared() -> Iterator[PackProcess]:
    process = PackProcess()
    yield process
    process.close()


@pytest.fixture
def own() -> Iterator[PackProcess]:
    """One that has begun to answer, so that it knows what to do about signals."""
    process = PackProcess()
    process.ask([1], [1.0], 1, 1)
    assert process.take() == [[[0]]]
    yield process
    process.close()


def is_running(pid: int) -> bool:
    """Whether there is such a process that has not ended (and perhaps waits to be looked at)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@settings(max_examples=100, deadline=None)
@given(
    lengths=st.lists(st.integers(1, BUDGET), max_size=40),
    groups=st.integers(1, 9),
    data=st.data(),
)
def test_the_same_packs(
    shared: PackProcess, lengths: list[int], groups: int, data: st.DataObject
) -> None:
    size = len(lengths)
    costs: list[float] = [n * (n + 20) for n in lengths]
    if data.draw(st.booleans()):
        costs = data.draw(st.lists(st.floats(1e-3, 1e6), min_size=size, max_size=size))
    shared.ask(lengths, costs, groups, BUDGET)
    assert shared.take() == balance_packs(lengths, costs, groups, BUDGET)


def test_more_than_a_socket_holds_at_once(shared: PackProcess) -> None:
    lengths = [1 + k % BUDGET for k in range(100_000)]  # 1.6 MB there, 0.8 MB back
    shared.ask(lengths, lengths, 100_000, BUDGET)
    assert shared.take() == [[[k]] for k in sorted(range(100_000), key=lambda k: -lengths[k])]


def test_it_is_small_and_apart(own: PackProcess) -> None:
    """Beside the eight training processes of a node are eight of these."""
    assert "libtorch" not in Path(f"/proc/{own.pid}/maps").read_text()
    assert os.getpgid(own.pid) == own.pid  # the terminal's Ctrl-C is not for it
    assert sorted(os.listdir(f"/proc/{own.pid}/fd")) == ["0", "1", "2"]


def test_signals_to_all_processes_of_a_job_do_not_end_it(own: PackProcess) -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        os.kill(own.pid, number)
    own.ask([1, 1], [1.0, 2.0], 2, 1)
    assert own.take() == [[[1]], [[0]]]


@pytest.mark.parametrize("busy", [False, True])
def test_it_ends_with_a_killed_parent(busy: bool) -> None:
    script = f"""
    import time
    from goku_runtime.pack_process import PackProcess
    process = PackProcess()
    process.ask([1], [1.0], 1, 1)
    process.take()
    if {busy}:
        process.ask([1 + k % 997 for k in range(20_000)], [1.0] * 20_000, 100, 1_000)
    print(process.pid, flush=True)
    time.sleep(600)
    """
    with subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(script)], stdout=subprocess.PIPE, text=True
    ) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        assert is_running(pid)
        parent.kill()
    while is_running(pid):  # for ever, if it does not; a busy one finishes what it is at
        time.sleep(0.01)


@pytest.mark.parametrize("asked", [False, True])
def test_a_killed_process_is_told_and_nobody_waits(own: PackProcess, asked: bool) -> None:
    if asked:
        own.ask(*LONG, 500, 1_000)
    os.kill(own.pid, signal.SIGKILL)
    with pytest.raises(PackProcessLost, match="ended with exit code -9"):
        own.take() if asked else ask_for_ever(own)
    own.close()


def ask_for_ever(process: PackProcess) -> None:
    while True:
        process.ask([1], [1.0], 1, 1)
        process.take()


def test_one_that_never_answers_is_given_up() -> None:
    process = PackProcess(patience=0.2)
    os.kill(process.pid, signal.SIGSTOP)
    process.ask([1], [1.0], 1, 1)
    with pytest.raises(PackProcessLost, match=r"did not answer within 0\.2 s"):
        process.take()
    assert not is_running(process.pid)


def test_one_that_never_reads_is_given_up() -> None:
    process = PackProcess(patience=0.2)
    os.kill(process.pid, signal.SIGSTOP)
    with pytest.raises(PackProcessLost, match=r"did not answer within 0\.2 s"):
        process.ask([1] * 100_000, [1.0] * 100_000, 1, 1)
    assert not is_running(process.pid)


def test_close_does_not_wait_for_the_answer(own: PackProcess) -> None:
    own.ask(*LONG, 500, 1_000)
    own.close()
    assert not is_running(own.pid)


def test_an_interrupted_answer_is_not_the_next_questions(own: PackProcess) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        own.ask(*LONG, 2048, 4096)
        signal.setitimer(signal.ITIMER_REAL, 0.1)
        with pytest.raises(KeyboardInterrupt):
            own.take()
    finally:
        signal.signal(signal.SIGALRM, before)
    with pytest.raises(PackProcessLost, match="ended with exit code -9"):
        own.ask([1, 1], [1.0, 1.0], 1, 2)


def test_bad_samples_are_named_before_they_are_sent(shared: PackProcess) -> None:
    with pytest.raises(ValueError, match="sample 1 has 9 tokens, more than tokens_per_pack=8"):
        shared.ask([8, 9], [1.0, 1.0], 2, 8)
    shared.ask([8], [1.0], 1, 8)
    assert shared.take() == [[[0]]]


def test_without_an_interpreter_it_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    with pytest.raises(PackProcessLost, match=r"could not start: .*/nowhere/python"):
        PackProcess()
