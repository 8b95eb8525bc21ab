"""async_save: what may change when, what a save that goes wrong leaves behind, and who waits for whom.

Tests hold a save at a chosen point with a `Gate` in place of a slow disk, so that nothing depends on how
fast this machine is.
"""

from __future__ import annotations

import gc
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from goku_runtime.checkpoint import (
    Checkpointer,
    CheckpointError,
    CheckpointOptions,
    async_save,
    checkpointer,
    load,
    save,
    verify,
)

SCRIPT = Path(__file__).with_name("async_processes.py")
KIB = 1024


class Gate:
    """Lets a call by the thread that saves through only when it is opened; `reached`: one has come."""

    def __init__(self) -> None:
        self.reached = threading.Event()
        self.open = threading.Event()

    def hold(self, monkeypatch: pytest.MonkeyPatch, owner: Any, name: str) -> None:
        real = getattr(owner, name)

        def held(*arguments: Any, **options: Any) -> Any:
            if threading.current_thread() is not threading.main_thread():
                self.reached.set()
                assert self.open.wait(30)
            return real(*arguments, **options)

        monkeypatch.setattr(owner, name, held)


@pytest.fixture
def staging(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    """Held before a tensor is copied."""
    gate = Gate()
    gate.hold(monkeypatch, Checkpointer, "_copy")
    yield gate
    gate.open.set()


@pytest.fixture
def writing(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    """Held when the data file has been handed to the device, before the first file beside it."""
    gate = Gate()
    gate.hold(monkeypatch, checkpointer, "write_durably")
    yield gate
    gate.open.set()


def state_of(step: int, numbers: int = 20_000) -> dict[str, Any]:
    """Every number tells the step: a state of two steps is seen."""
    return {
        "w": torch.full((numbers // 100, 100), float(step)),
        "t": torch.full((7, 30), float(step)).t(),
        "half": torch.full((33,), step, dtype=torch.bfloat16),
        "step": step,
    }


def change(state: dict[str, Any], step: int) -> None:
    for value in state.values():
        if torch.is_tensor(value):
            value.fill_(step)
    state["step"] = step


def step_in(path: Path, numbers: int = 20_000) -> int:
    verify(path)
    state = state_of(-1, numbers)
    load(state, path)
    step = state["step"]
    for name, value in state.items():
        if torch.is_tensor(value):
            assert bool((value == step).all()), name
    return int(step)


def names(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir())


# ---- staging ----


@pytest.mark.parametrize("staging_bytes", [None, 256 * KIB])
@pytest.mark.parametrize("numbers", [100, 200_000])
def test_the_state_may_change_once_the_call_is_back(
    tmp_path: Path, numbers: int, staging_bytes: int | None
) -> None:
    options = CheckpointOptions(staging_bytes=staging_bytes)
    state = state_of(1, numbers)
    with Checkpointer(options=options) as saving:
        for step in (1, 2, 3):
            handle = saving.async_save(state, tmp_path / str(step))
            assert handle.staging_done
            change(state, step + 1)
            assert handle.result() == tmp_path / str(step)
            assert step_in(tmp_path / str(step), numbers) == step


def test_in_the_background_it_may_change_once_it_is_staged(tmp_path: Path, staging: Gate) -> None:
    state = state_of(1)
    handle = async_save(state, tmp_path / "c", stage="background")
    assert staging.reached.wait(10)
    assert not handle.staging_done
    assert handle.progress.staged == 0
    with pytest.raises(TimeoutError, match="not staged after"):
        handle.wait_staged(0.02)
    staging.open.set()
    handle.wait_staged()
    assert handle.staging_done
    change(state, 2)
    handle.result()
    assert step_in(tmp_path / "c") == 1


def test_what_is_saved_is_the_state_at_the_time_of_staging(tmp_path: Path, staging: Gate) -> None:
    """Why nothing may change before: were the copy made by the call, this would save step 1."""
    state = state_of(1)
    handle = async_save({"w": state["w"]}, tmp_path / "c", stage="background")
    assert staging.reached.wait(10)
    state["w"].fill_(5)
    staging.open.set()
    handle.result()
    found = {"w": torch.zeros_like(state["w"])}
    load(found, tmp_path / "c")
    assert bool((found["w"] == 5).all())


def test_plain_values_are_those_of_the_call(tmp_path: Path, staging: Gate) -> None:
    state = {"w": torch.zeros(3), "run": {"step": 1, "seen": [1, 2]}}
    handle = async_save(state, tmp_path / "c", stage="background")
    assert staging.reached.wait(10)
    state["run"]["step"] = 2
    state["run"]["seen"].append(3)
    staging.open.set()
    handle.result()
    found: dict[str, Any] = {"w": torch.ones(3), "run": None}
    load(found, tmp_path / "c")
    assert found["run"] == {"step": 1, "seen": [1, 2]}


@settings(max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    numbers=st.integers(1, 400_000),
    staging_bytes=st.integers(256 * KIB, 1 << 20),
    windows=st.integers(4, 8),
)
def test_little_memory_gives_the_same_bytes(
    tmp_path_factory: pytest.TempPathFactory, numbers: int, staging_bytes: int, windows: int
) -> None:
    """Through a ring of windows instead of a copy of everything; the file is the same."""
    root = tmp_path_factory.mktemp("ring")
    torch.manual_seed(numbers)
    state = {"a": torch.randn(numbers), "b": torch.randn(51, 7).t(), "c": torch.randn(numbers // 2)}
    save(state, root / "whole")
    options = CheckpointOptions(staging_bytes=staging_bytes, window_bytes=windows * 64 * KIB)
    async_save(state, root / "ring", options=options).result()
    name = "__0_0.distcp"
    assert (root / "ring" / name).read_bytes() == (root / "whole" / name).read_bytes()
    assert (root / "ring" / "__0_0.crc").read_bytes() == (root / "whole" / "__0_0.crc").read_bytes()
    verify(root / "ring")
    shutil.rmtree(root)


@pytest.mark.parametrize("staging_bytes", [256 * KIB, 300 * KIB])
def test_memory_stays_within_the_budget(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, staging_bytes: int
) -> None:
    made: list[int] = []
    real = checkpointer.Memory

    def counted(nbytes: int, **options: Any) -> Any:
        made.append(nbytes)
        return real(nbytes, **options)

    monkeypatch.setattr(checkpointer, "Memory", counted)
    options = CheckpointOptions(staging_bytes=staging_bytes, window_bytes=256 * KIB)
    with Checkpointer(options=options) as saving:
        for step in (1, 2):
            saving.async_save(state_of(step, 300_000), tmp_path / str(step)).result()
            assert step_in(tmp_path / str(step), 300_000) == step
    assert made
    assert sum(made) <= staging_bytes


# ---- while it writes ----


def test_training_goes_on_while_it_writes(tmp_path: Path, writing: Gate) -> None:
    torch.manual_seed(0)
    model = nn.Linear(8, 8)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)

    def step() -> None:
        optimizer.zero_grad()
        model(torch.ones(2, 8)).square().sum().backward()
        optimizer.step()

    step()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    handle = async_save(state, tmp_path / "c")
    assert writing.reached.wait(10)
    for _ in range(3):
        step()
    assert handle.staging_done
    assert not handle.upload_done
    assert not handle.succeeded
    assert not (tmp_path / "c").exists()
    with pytest.raises(TimeoutError, match="not saved after"):
        handle.result(0.02)
    writing.open.set()
    handle.result()
    assert handle.upload_done
    assert handle.succeeded
    assert "done" in repr(handle)
    found = {name: torch.zeros_like(value) for name, value in before.items()}
    load({"model": found}, tmp_path / "c", partial=True)
    for name, value in before.items():
        assert torch.equal(found[name], value), name
        assert not torch.equal(model.state_dict()[name], value), "training has changed it"


def test_progress(tmp_path: Path, staging: Gate) -> None:
    handle = async_save(state_of(1), tmp_path / "c", stage="background")
    progress = handle.progress
    assert staging.reached.wait(10)
    assert progress.nbytes > 80_000
    assert (progress.staged, progress.written) == (0, 0)
    assert f"0 of {progress.nbytes} bytes" in repr(handle)
    staging.open.set()
    handle.result()
    assert (progress.staged, progress.written) == (progress.nbytes, progress.nbytes)
    assert progress.nbytes == (tmp_path / "c" / "__0_0.distcp").stat().st_size


def test_the_next_save_waits_for_the_one_before(tmp_path: Path, writing: Gate) -> None:
    with Checkpointer() as saving, ThreadPoolExecutor(1) as other:
        first = saving.async_save(state_of(1), tmp_path / "1")
        assert writing.reached.wait(10)
        second = other.submit(saving.async_save, state_of(2), tmp_path / "2")
        time.sleep(0.1)
        assert not second.done()
        assert len(names(tmp_path)) == 1, "nothing of the second is there"
        writing.open.set()
        handle = second.result(10)
        assert first.upload_done
        handle.result()
    assert (step_in(tmp_path / "1"), step_in(tmp_path / "2")) == (1, 2)


def test_the_same_memory_serves_the_next_save(tmp_path: Path) -> None:
    with Checkpointer() as saving:
        saving.async_save(state_of(1), tmp_path / "1").result()
        assert saving._staged is not None
        address = saving._staged[1].address
        saving.async_save(state_of(2), tmp_path / "2").result()
        assert saving._staged[1].address == address
        saving.async_save(state_of(3, 40_000), tmp_path / "3").result()
    assert [step_in(tmp_path / str(n), 40_000 if n == 3 else 20_000) for n in (1, 2, 3)] == [
        1,
        2,
        3,
    ]


def test_a_save_after_an_async_save_of_the_same_checkpointer(tmp_path: Path) -> None:
    with Checkpointer() as saving:
        handle = saving.async_save(state_of(1), tmp_path / "c")
        saving.save(state_of(2), tmp_path / "c", overwrite=True)
        assert handle.succeeded
    assert step_in(tmp_path / "c") == 2
    assert names(tmp_path) == ["c"]


# ---- what is kept alive ----


@pytest.mark.parametrize("end", ["while writing", "after it", "after a failure"])
def test_tensors_are_let_go_of(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, writing: Gate, end: str
) -> None:
    if end == "after a failure":
        fail(monkeypatch)
    with Checkpointer() as saving:
        state = state_of(1)
        kept = weakref.ref(state["w"].untyped_storage()), weakref.ref(state["w"])
        handle = saving.async_save(state, tmp_path / "c")
        assert kept[1]() is not None
        del state
        if end != "while writing":
            writing.open.set()
            handle.wait_ended()
        else:
            assert writing.reached.wait(10)
        gc.collect()
        assert kept[1]() is None
        writing.open.set()
        if end == "after a failure":
            with pytest.raises(OSError, match="made up"):
                saving.wait()
        else:
            assert handle.result() == tmp_path / "c"


def test_close_gives_the_memory_back(tmp_path: Path) -> None:
    saving = Checkpointer()
    saving.async_save(state_of(1), tmp_path / "c")
    saving.wait()
    assert saving._staged is not None
    memory = weakref.ref(saving._staged[1])
    saving.close()
    gc.collect()
    assert memory() is None
    saving.close()
    assert step_in(tmp_path / "c") == 1


def test_the_function_gives_memory_and_threads_back(tmp_path: Path) -> None:
    before = threading.active_count()
    handle = async_save(state_of(1), tmp_path / "c")
    handle.result()
    for _ in range(100):
        if threading.active_count() == before:
            break
        time.sleep(0.05)
    assert threading.active_count() == before


# ---- giving up ----


@pytest.mark.parametrize("moment", ["staging", "writing"])
def test_cancel(tmp_path: Path, request: pytest.FixtureRequest, moment: str) -> None:
    gate = request.getfixturevalue(moment)
    save(state_of(0), tmp_path / "good")
    with Checkpointer() as saving:
        handle = saving.async_save(state_of(1), tmp_path / "c", stage="background")
        assert gate.reached.wait(10)
        handle.cancel()
        handle.cancel()
        gate.open.set()
        with pytest.raises(RuntimeError, match="c: cancelled"):
            handle.result()
        assert handle.staging_done, "nobody waits for a staging that will not be"
        assert handle.upload_done
        assert not handle.succeeded
        assert names(tmp_path) == ["good"]
        saving.async_save(state_of(2), tmp_path / "c").result()
    assert (step_in(tmp_path / "good"), step_in(tmp_path / "c")) == (0, 2)


def test_cancel_in_the_ring(tmp_path: Path) -> None:
    """Windows are being written while others are copied: each moment is as good as another."""
    options = CheckpointOptions(staging_bytes=256 * KIB, window_bytes=256 * KIB)
    cancelled = 0
    with Checkpointer(options=options) as saving:
        for number in range(12):
            state = state_of(number, 600_000)
            handle = saving.async_save(state, tmp_path / "c", overwrite=True, stage="background")
            time.sleep(0.001 * number)
            handle.cancel()
            handle.wait_ended()
            if not handle.succeeded:
                cancelled += 1
                with pytest.raises(RuntimeError, match="cancelled"):
                    handle.result()
            assert names(tmp_path) in ([], ["c"])
        saving.async_save(state_of(99, 600_000), tmp_path / "c", overwrite=True).result()
    assert step_in(tmp_path / "c", 600_000) == 99
    assert cancelled > 0


def test_cancel_after_the_end_changes_nothing(tmp_path: Path) -> None:
    handle = async_save(state_of(1), tmp_path / "c")
    handle.result()
    handle.cancel()
    assert handle.result() == tmp_path / "c"
    assert handle.succeeded
    assert step_in(tmp_path / "c") == 1


# ---- failures ----


def fail(monkeypatch: pytest.MonkeyPatch) -> None:
    """The data file is written, the sums beside it fail."""

    def failing(path: Path, *_: Any, **__: Any) -> None:
        raise OSError(5, "made up", str(path))

    held = checkpointer.write_durably

    def first(path: Path, *arguments: Any, **options: Any) -> None:
        if path.suffix == ".crc":
            failing(path)
        held(path, *arguments, **options)

    monkeypatch.setattr(checkpointer, "write_durably", first)


def wait_for_log(caplog: pytest.LogCaptureFixture, words: str) -> None:
    """The thread that saved logs just after those who wait for it were woken."""
    for _ in range(200):
        if words in caplog.text:
            return
        time.sleep(0.05)
    pytest.fail(f"{words!r} was not logged: {caplog.text}")


def test_a_failure_is_logged_and_raised_and_the_next_save_works(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with Checkpointer() as saving:
        with monkeypatch.context() as patch:
            fail(patch)
            handle = saving.async_save(state_of(1), tmp_path / "c")
            with pytest.raises(OSError, match="made up"):
                handle.result()
            with pytest.raises(OSError, match="made up"):
                handle.result()
        assert handle.upload_done
        assert not handle.succeeded
        assert "c: failed, OSError: " in repr(handle)
        assert names(tmp_path) == []
        wait_for_log(caplog, "c was not saved: OSError: ")
        assert [record.levelname for record in caplog.records] == ["ERROR"]
        assert "made up" in caplog.text
        handle = saving.async_save(state_of(2), tmp_path / "c")
        assert handle.result() == tmp_path / "c"
        assert repr(handle).endswith("c: done>")
    assert step_in(tmp_path / "c") == 2


def test_the_next_save_does_not_raise_the_error_of_the_one_before(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with Checkpointer() as saving:
        with monkeypatch.context() as patch:
            fail(patch)
            saving.async_save(state_of(1), tmp_path / "1").wait_ended()
        saving.async_save(state_of(2), tmp_path / "2").result()
    wait_for_log(caplog, "1 was not saved")
    assert names(tmp_path) == ["2"]


def test_close_raises_the_last_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fail(monkeypatch)
    saving = Checkpointer()
    saving.async_save(state_of(1), tmp_path / "c")
    with pytest.raises(OSError, match="made up"):
        saving.close()
    saving.close()
    assert names(tmp_path) == []


def test_a_vanished_directory(tmp_path: Path, staging: Gate) -> None:
    with Checkpointer() as saving:
        handle = saving.async_save(state_of(1), tmp_path / "a" / "c", stage="background")
        assert staging.reached.wait(10)
        shutil.rmtree(tmp_path / "a")
        staging.open.set()
        with pytest.raises(FileNotFoundError):
            handle.result()
        assert names(tmp_path) == []
        saving.async_save(state_of(2), tmp_path / "a" / "c").result()
    assert step_in(tmp_path / "a" / "c") == 2


def test_a_directory_that_vanished_before_a_byte_was_written(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    gate = Gate()
    gate.hold(monkeypatch, Checkpointer, "_write_files")
    handle = async_save(state_of(1), tmp_path / "c", stage="background")
    assert gate.reached.wait(10)
    for path in tmp_path.iterdir():
        path.rmdir()
    gate.open.set()
    with pytest.raises(CheckpointError, match="which this rank does not see"):
        handle.result()
    assert names(tmp_path) == []


def test_what_shows_at_once_is_raised_at_once(tmp_path: Path) -> None:
    save({}, tmp_path / "c")
    for target, state, kind in (
        ("c", state_of(1), FileExistsError),
        ("d", {"x": object()}, ValueError),
        ("latest", state_of(1), ValueError),
    ):
        with pytest.raises(kind):
            async_save(state, tmp_path / target)
    with pytest.raises(ValueError, match="stage is 'later'; allowed: 'now', 'background'"):
        async_save({}, tmp_path / "d", stage="later")  # type: ignore[arg-type]
    assert names(tmp_path) == ["c"]


def test_no_thread_to_be_had(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def refused(*_: Any) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refused)
        with pytest.raises(RuntimeError, match="new thread"):
            async_save(state_of(1), tmp_path / "c")
    assert names(tmp_path) == []


# ---- the end of the process ----

ENDING = """
import sys, torch, torch.distributed as dist
from goku_runtime.checkpoint import async_save
rank, ranks, store, root = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4]
if ranks > 1:
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=ranks)
state = {"w": torch.full((1 << 20,), 3.0), "v": torch.full((1 << 20,), 3.0), "step": 3}
async_save(state, root + "/c", latest=True)
print("ends", flush=True)
"""


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_process_that_ends_waits_for_its_save(tmp_path: Path, ranks: int) -> None:
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", ENDING, str(rank), str(ranks), str(tmp_path / "store"),
             str(tmp_path / "root")],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"},
        )
        for rank in range(ranks)
    ]  # fmt: skip
    outputs = [process.communicate(timeout=90)[0] for process in processes]
    # torch itself sometimes aborts at the very end of a process whose groups nobody has destroyed.
    codes = {process.returncode for process in processes}
    assert codes <= ({0} if ranks == 1 else {0, -signal.SIGABRT}), outputs
    assert all("ends" in output for output in outputs)
    assert names(tmp_path / "root") == ["c", "latest"]
    verify(tmp_path / "root" / "c")
    state = {"w": torch.zeros(1 << 20), "v": torch.zeros(1 << 20), "step": 0}
    load(state, tmp_path / "root" / "c")
    assert state["step"] == 3
    assert bool((state["w"] == 3).all())
    assert bool((state["v"] == 3).all())


# ---- several ranks ----

Run = Callable[..., str]


def test_two_ranks(run_processes: Run, tmp_path: Path) -> None:
    root = {"root": str(tmp_path / "root")}
    output = run_processes(
        2, SCRIPT, ("training_goes_on", root), ("cancel_on_one_rank", root),
        ("one_rank_fails", root), ("vanished", root), ("again_and_again", root), ("all_groups_destroyed", root),
    )  # fmt: skip
    assert "rank 1: File too large" in output


def test_groups_that_are_parts_of_the_world(run_processes: Run, tmp_path: Path) -> None:
    root = {"root": str(tmp_path / "root")}
    run_processes(3, SCRIPT, ("parts_of_the_world", root), ("ranks_in_another_order", root))
