"""Engine, Buffer and probe: what is chosen, what is traced, threads, fork, and the end."""

import errno
import gc
import mmap
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from goku_runtime import _io
from goku_runtime.checkpoint.tools.probing import Probed

MIB = 1 << 20


def whole(address: int, size: int) -> np.ndarray:
    return np.array([[0, size, 1, size, address, size]], np.int64)


# ---- Buffer ----


@pytest.mark.parametrize("huge", [False, True])
@pytest.mark.parametrize("size", [1, 4095, 4096, 2 * MIB - 1, 2 * MIB, 5 * MIB + 1])
def test_a_buffer_is_aligned_zeroed_and_writable(size, huge):
    buffer = _io.Buffer(size, huge=huge)
    assert buffer.nbytes == len(buffer) == memoryview(buffer).nbytes == size
    assert buffer.address % mmap.PAGESIZE == 0
    if huge and size >= 2 * MIB:
        assert buffer.address % (2 * MIB) == 0
    array = np.frombuffer(buffer, np.uint8)
    assert array.ctypes.data == buffer.address
    assert not array.any()
    array[:] = 255
    assert memoryview(buffer)[size - 1] == 255


def test_a_buffer_lives_as_long_as_its_views():
    array = np.frombuffer(_io.Buffer(8 * MIB), np.uint8)
    gc.collect()
    array[:] = 3
    assert int(array[::4096].sum()) == 3 * 8 * MIB // 4096


def test_buffers_that_cannot_be_are_refused():
    for size in (0, -1):
        with pytest.raises(ValueError, match=f"nbytes is {size}; allowed is 1 and above"):
            _io.Buffer(size)
    with pytest.raises(MemoryError):
        _io.Buffer(1 << 60)


# ---- options ----


def test_what_was_chosen_is_said():
    with _io.Engine() as engine:
        said = engine.describe()
        assert said["backend"] == engine.backend
        assert said["backend_wanted"] == "auto"
        assert said["queue_depth"] == engine.queue_depth > 0
        assert said["block_bytes"] == engine.block_bytes >= 65536
        assert said["threads"] == engine.threads > 0
        assert said["bounce_bytes"] == engine.queue_depth * engine.block_bytes
        assert said["crc32c"] == _io.crc32c_implementation()
        # Either there is a ring, or it is said why not.
        assert (engine.backend == "io_uring") == (said["reason"] is None)


def test_what_was_asked_for_is_taken():
    with _io.Engine(backend="threads", threads=3, block_bytes=131072, direct="off") as engine:
        assert (engine.backend, engine.threads, engine.queue_depth) == ("threads", 3, 3)
        assert engine.block_bytes == 131072
        assert engine.describe()["direct"] == "off"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"backend": "aio"}, "backend is 'aio'; allowed are auto, io_uring, threads"),
        ({"direct": "yes"}, "direct is 'yes'; allowed are auto, on, off"),
        ({"queue_depth": 5000}, "queue_depth is 5000; allowed is 0 .the default. or 1 to 4096"),
        ({"queue_depth": -1}, "queue_depth is -1"),
        ({"block_bytes": 4096}, "block_bytes is 4096; allowed is"),
        ({"block_bytes": 65537}, "block_bytes is 65537; allowed are multiples of 4096"),
        ({"threads": 257}, "threads is 257; allowed is"),
        ({"memory_budget": 65536, "block_bytes": 131072}, "memory_budget is 65536; allowed is"),
    ],
)
def test_options_that_cannot_be_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        _io.Engine(**options)


def test_direct_where_it_does_not_work_is_an_error():
    with (
        _io.Engine(direct="on") as engine,
        pytest.raises(OSError) as raised,
    ):
        engine.start_checksum("/proc/self/status")
    assert raised.value.errno == errno.EINVAL
    assert raised.value.filename == "/proc/self/status"


def resident(pid: str = "self") -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * mmap.PAGESIZE


def test_the_budget_bounds_the_memory_of_a_large_file(fresh, write_file):
    """A file of 128 MiB, read without a place to put it, in 2 MiB of the engine's own memory."""
    path = fresh()
    with _io.Engine(memory_budget=2 * MIB, block_bytes=MIB) as engine:
        assert engine.queue_depth == 2
        assert engine.describe()["bounce_bytes"] == 2 * MIB
        with pytest.raises(ValueError, match="chunk is 4194304, memory_budget 2097152"):
            engine.create(path, 10, chunk=4 * MIB)
        assert not path.exists()
        data = np.zeros(128 * MIB, np.uint8)
        crc, crcs = write_file(engine, path, data, 65536)
        del data
        before = resident()
        assert engine.checksum(path) == (128 * MIB, crc, crcs)
        assert resident() - before < 16 * MIB


# ---- trace ----


@pytest.mark.parametrize("backend", ["threads", "auto"])
def test_the_trace_tells_a_files_life(tmp_path, make_noise, backend):
    path = str(tmp_path / "file")
    data = make_noise(5 * MIB + 4097)
    begin = time.monotonic_ns()
    with _io.Engine(backend=backend, block_bytes=MIB, trace=True) as engine:
        writer = engine.create(path, len(data))
        writer.submit(data.ctypes.data, 0, len(data))
        writer.finish()
        engine.checksum(path)
        events = engine.trace()
    end = time.monotonic_ns()
    assert {event[3] for event in events} == {path}
    assert all(begin <= event[0] <= event[1] <= end for event in events)
    operations = [event[2] for event in events]
    assert operations[:2] in (["create", "preallocate"], ["create", "truncate"])
    assert operations[-2:] == ["fsync", "close"]
    assert set(operations[2:-2]) == {"write"}
    # fsync began when every write had ended.
    assert all(event[1] <= events[-2][0] for event in events[2:-2])
    # The writes are the file, without a gap or an overlap.
    writes = sorted(event[4:] for event in events[2:-2])
    at = 0
    for offset, length in writes:
        assert offset == at
        at += length
    assert at == len(data)
    assert events[1][4:] == (0, len(data))


def test_without_fsync_there_is_none(tmp_path, write_file, make_noise):
    with _io.Engine(trace=True) as engine:
        write_file(engine, tmp_path / "file", make_noise(10))
        assert "fsync" not in [event[2] for event in engine.trace()]
    with _io.Engine() as engine:
        write_file(engine, tmp_path / "other", make_noise(10))
        assert engine.trace() == []


def test_the_mode_and_the_reserved_blocks(tmp_path):
    old = os.umask(0)
    try:
        with _io.Engine() as engine:
            writer = engine.create(tmp_path / "file", 3 * MIB, mode=0o600)
            status = (tmp_path / "file").stat()
            writer.cancel()
    finally:
        os.umask(old)
    assert status.st_mode & 0o777 == 0o600
    assert status.st_size == 3 * MIB
    assert status.st_blocks * 512 >= 3 * MIB


# ---- threads of Python ----


def test_other_threads_run_while_one_waits(tmp_path, make_noise):
    """With an endless switch interval a thread runs until it gives the interpreter's lock up."""
    data = make_noise(8 * MIB)
    interval = sys.getswitchinterval()
    with _io.Engine() as engine:
        writer = engine.create(tmp_path / "file", 16 * MIB)
        ticket = writer.submit(data.ctypes.data, 0, 8 * MIB)
        released = threading.Event()

        def wait_for_all() -> None:
            writer.wait(ticket)
            last = writer.submit(data.ctypes.data, 8 * MIB, 8 * MIB)
            writer.wait(last)
            writer.finish()
            engine.checksum(tmp_path / "file")
            released.set()

        sys.setswitchinterval(1e6)
        try:
            thread = threading.Thread(target=wait_for_all)
            rounds = 0
            thread.start()
            while not released.is_set():
                rounds += 1
                time.sleep(0)  # gives the lock up, and comes back only if the other one does
            thread.join()
        finally:
            sys.setswitchinterval(interval)
    assert rounds > 1


def test_ctrl_c_ends_a_wait(tmp_path):
    """Of a reading that would take minutes: the signal comes while the main thread waits for it."""
    code = f"""
import os, signal, threading
from goku_runtime import _io
with open({str(tmp_path / "sparse")!r}, "wb") as file:
    file.truncate(1 << 40)
engine = _io.Engine()
threading.Timer(0.3, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
try:
    engine.checksum({str(tmp_path / "sparse")!r}, chunk=64 << 20)
except KeyboardInterrupt:
    print("interrupted")
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.stdout == "interrupted\n", done.stderr


# ---- fork ----


def test_a_forked_child_is_refused_and_does_not_hang(tmp_path, make_noise):
    data = make_noise(16 * MIB)
    with _io.Engine() as engine:
        writer = engine.create(tmp_path / "file", len(data))
        writer.submit(data.ctypes.data, 0, len(data))
        reading, writing = os.pipe()
        pid = os.fork()
        if pid == 0:
            said = []
            for use in (
                lambda: engine.create(tmp_path / "other", 10),
                lambda: engine.checksum(tmp_path / "file"),
                lambda: writer.submit(data.ctypes.data, 0, 4096),
                lambda: writer.finish(),
                lambda: writer.cancel(),
                lambda: engine.close(),
            ):
                try:
                    use()
                    said.append("nothing")
                except RuntimeError as error:
                    said.append("fork" if "fork" in str(error) else str(error))
            del use, writer, engine  # and their ends do not wait for threads that are not there
            gc.collect()
            os.write(writing, ",".join(said).encode())
            os._exit(0)
        os.close(writing)
        deadline = time.monotonic() + 30
        while os.waitpid(pid, os.WNOHANG) == (0, 0):
            if time.monotonic() > deadline:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
                pytest.fail("the child hangs")
            time.sleep(0.01)
        assert os.read(reading, 1000).decode() == ",".join(["fork"] * 6)
        os.close(reading)
        # The parent's are as good as before.
        assert writer.finish() == (len(data), _io.crc32c(data))


# ---- the end ----


def test_closing_cancels_and_refuses(engine, tmp_path, make_noise):
    data = make_noise(32 * MIB)
    own = _io.Engine(backend=engine.backend)
    finished = own.create(tmp_path / "finished", 0)
    assert finished.finish() == (0, 0)
    writer = own.create(tmp_path / "file", len(data))
    ticket = writer.submit(data.ctypes.data, 0, len(data))
    own.close()
    own.close()
    assert writer.done(ticket)
    with pytest.raises(OSError) as raised:
        writer.finish()
    assert raised.value.errno == errno.ECANCELED
    assert finished.finish() == (0, 0)
    with pytest.raises(RuntimeError, match="closed"):
        own.create(tmp_path / "other", 10)
    assert not (tmp_path / "other").exists()
    with pytest.raises(RuntimeError, match="closed"):
        own.checksum(tmp_path / "finished")


def test_a_writer_keeps_its_engine(tmp_path, make_noise):
    data = make_noise(MIB)
    writer = _io.Engine().create(tmp_path / "file", len(data))
    gc.collect()
    writer.submit(data.ctypes.data, 0, len(data))
    assert writer.finish() == (len(data), _io.crc32c(data))


def test_nothing_is_left_behind(tmp_path, make_noise, write_file):
    """Neither threads nor descriptors, whichever way a file ended."""

    def counted() -> tuple[int, int]:
        return len(os.listdir("/proc/self/task")), len(os.listdir("/proc/self/fd"))

    data = make_noise(MIB)
    before = counted()
    for number in range(5):
        with _io.Engine() as engine:
            path = tmp_path / f"file-{number}"
            _, crcs = write_file(engine, path, data, 65536)
            out = np.empty_like(data)
            rows = whole(out.ctypes.data, len(out))
            engine.read(path, rows, chunk=65536, crcs=crcs, size=len(data))
            with pytest.raises(_io.ChunkError):
                engine.read(path, rows, chunk=65536, crcs=bytes(len(crcs)), size=len(data))
            with pytest.raises(FileExistsError):
                engine.create(path, 10)
            engine.create(tmp_path / f"cancelled-{number}", 10).cancel()
            engine.create(tmp_path / f"dropped-{number}", 10)
    gc.collect()
    assert counted() == before


# ---- probe ----


def test_the_probe_measures_and_leaves_nothing(tmp_path):
    found = _io.probe(tmp_path, seconds=0.5, bytes=4 * MIB)
    assert os.listdir(tmp_path) == []
    assert found["directory"] == str(tmp_path)
    assert found["bytes"] == 4 * MIB
    trials = found["trials"]
    ran = [trial for trial in trials if trial["error"] is None]
    assert {(trial["backend"], trial["direct"]) for trial in trials} == {
        (backend, direct) for backend in ("io_uring", "threads") for direct in ("on", "off")
    }
    assert ("threads", "off") in {(trial["backend"], trial["direct"]) for trial in ran}
    assert all(trial["write_gib_s"] > 0 and trial["read_gib_s"] > 0 for trial in ran)
    assert all(trial["write_gib_s"] is None for trial in trials if trial["error"] is not None)
    with _io.Engine(**found["choice"]) as engine:
        assert engine.backend == found["choice"]["backend"]
        assert found["choice"]["queue_depth"] in (0, engine.queue_depth)
        assert found["choice"]["threads"] in (0, engine.threads)
        described = engine.describe()
    # It is one of those that were measured.
    names = ("queue_depth", "block_bytes", "threads")
    assert {k: described[k] for k in names} in [{k: t[k] for k in names} for t in ran]


def test_the_probe_of_files_in_memory_names_no_threads_that_were_not_used():
    with tempfile.TemporaryDirectory(dir="/dev/shm") as directory:
        found = _io.probe(directory, seconds=5, bytes=MIB)
        assert os.listdir(directory) == []
    assert [trial["threads"] for trial in found["trials"][:3]] == [None, 2, 8]
    assert [trial["queue_depth"] for trial in found["trials"][:3]] == [None, 2, 8]
    assert all(trial["write_gib_s"] > 0 and trial["error"] is None for trial in found["trials"])
    own = sum(trial["threads"] is None for trial in found["trials"])
    assert Probed(found).to_text().split().count("own") == 2 * own
    _io.Engine(**found["choice"]).close()


def test_the_probe_ends_in_time(tmp_path):
    begin = time.monotonic()
    found = _io.probe(tmp_path, seconds=0.01, bytes=MIB)
    assert time.monotonic() - begin < 5
    assert found["trials"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"seconds": 0}, "seconds is 0"),
        ({"seconds": -1}, "seconds is"),
        ({"bytes": 10}, "bytes is"),
    ],
)
def test_probes_that_cannot_be_are_refused(tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        _io.probe(tmp_path, **arguments)


def test_a_probe_of_nowhere_says_so(tmp_path):
    with pytest.raises(FileNotFoundError):
        _io.probe(tmp_path / "nowhere")
