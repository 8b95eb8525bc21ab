"""FileWriter: what stands in the file, tickets, refusals, errors, cancellation."""

import errno
import os
import resource
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from goku_runtime import _io

CHUNK = 4096
# Around the alignment, the chunk, and the block of 65,536 bytes that the engines here have.
SIZES = [0, 1, 511, 4095, 4096, 4097, 8191, 65535, 65536, 65537, 131072 + 4096 + 1, 1 << 20]

sizes = st.one_of(st.sampled_from(SIZES), st.integers(0, 300_000))
chunks = st.sampled_from([4096, 8192, 65536, 131072])
each_example_has_its_own_file = settings(
    suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=30
)


@each_example_has_its_own_file
@given(size=sizes, chunk=chunks, shift=st.sampled_from([0, 1, 64]), seed=st.integers(0, 1000))
def test_the_file_is_what_was_submitted_in_any_order(
    engine, fresh, make_noise, crcs_of, size, chunk, shift, seed
):
    """In pieces of one to five chunks, from memory that is aligned to `shift` bytes at best."""
    buffer = _io.Buffer(size + shift + 1)
    memory = np.frombuffer(buffer, np.uint8)[shift : shift + size]
    memory[:] = make_noise(size, seed)
    random = np.random.default_rng(seed)
    pieces = []
    at = 0
    while at < size:
        length = min(int(random.integers(1, 6)) * chunk, size - at)
        pieces.append((at, length))
        at += length
    random.shuffle(pieces)

    path = fresh()
    writer = engine.create(path, size, chunk=chunk, fsync=False)
    tickets = [
        writer.submit(buffer.address + shift + offset, offset, length) for offset, length in pieces
    ]
    assert len(set(tickets)) == len(pieces)
    assert writer.finish() == (size, _io.crc32c(memory))
    assert writer.finish() == (size, _io.crc32c(memory))
    assert all(writer.done(ticket) for ticket in tickets)
    assert writer.written == size
    assert path.read_bytes() == memory.tobytes()
    assert writer.chunk_crcs() == crcs_of(memory, chunk)
    assert len(writer.chunk_crcs()) == -(-size // chunk) * 4


def test_the_memory_is_free_when_the_ticket_is_done(engine, fresh, make_noise):
    """Staging with two buffers for a file of eight: each is overwritten as soon as it is done."""
    block = 1 << 20
    data = make_noise(8 * block + 5)
    buffers = [_io.Buffer(block) for _ in range(2)]
    path = fresh()
    writer = engine.create(path, len(data))
    tickets: list[int | None] = [None, None]
    for number, offset in enumerate(range(0, len(data), block)):
        place = number % 2
        if tickets[place] is not None:
            assert writer.wait(tickets[place])
            assert writer.done(tickets[place])
        piece = data[offset : offset + block]
        memoryview(buffers[place])[: len(piece)] = piece.tobytes()
        tickets[place] = writer.submit(buffers[place].address, offset, len(piece))
    assert writer.finish() == (len(data), _io.crc32c(data))
    assert path.read_bytes() == data.tobytes()


def test_many_writers_at_once(engine, fresh, make_noise):
    paths = [fresh() for _ in range(12)]
    contents = [make_noise(200_001 + 13 * number, number) for number in range(12)]
    failures: list[str] = []

    def write(path: Path, data: np.ndarray) -> None:
        writer = engine.create(path, len(data), chunk=CHUNK, fsync=False)
        for offset in range(0, len(data), 5 * CHUNK):
            length = min(5 * CHUNK, len(data) - offset)
            writer.submit(data.ctypes.data + offset, offset, length)
        if writer.finish() != (len(data), _io.crc32c(data)):
            failures.append(str(path))

    threads = [
        threading.Thread(target=write, args=pair) for pair in zip(paths, contents, strict=True)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert [path.read_bytes() for path in paths] == [data.tobytes() for data in contents]


# ---- what is refused ----


@pytest.mark.parametrize(
    ("offset", "length", "message"),
    [
        (0, 0, "length is 0"),
        (1, CHUNK, "offset is 1; allowed are multiples of the chunk, 4096"),
        (
            0,
            CHUNK + 1,
            "length is 4097; allowed are multiples of the chunk, 4096, and what reaches",
        ),
        (3 * CHUNK, 2 * CHUNK, "offset is 12288 and length 8192; the file has 12298 bytes"),
        (1 << 62, 1 << 62, "the file has 12298 bytes"),
        (-1, CHUNK, "offset is -1"),
        (0, -1, "length is -1"),
    ],
)
def test_ranges_that_cannot_be_are_named(engine, fresh, make_noise, offset, length, message):
    data = make_noise(3 * CHUNK + 10)
    writer = engine.create(fresh(), len(data), chunk=CHUNK)
    with pytest.raises(ValueError, match=message):
        writer.submit(data.ctypes.data, offset, length)
    with pytest.raises(ValueError, match="buffer_address is 0"):
        writer.submit(0, 0, CHUNK)
    # And the writer is as good as before.
    writer.submit(data.ctypes.data, 0, len(data))
    assert writer.finish() == (len(data), _io.crc32c(data))


def test_every_byte_once(engine, fresh, make_noise):
    data = make_noise(4 * CHUNK)
    writer = engine.create(fresh(), len(data), chunk=CHUNK)
    writer.submit(data.ctypes.data, 0, 2 * CHUNK)
    with pytest.raises(ValueError, match="the bytes from 4096 on were submitted before"):
        writer.submit(data.ctypes.data + CHUNK, CHUNK, 2 * CHUNK)
    with pytest.raises(ValueError, match="has 16384 bytes, 8192 were submitted"):
        writer.finish()
    with pytest.raises(ValueError, match="not finished"):
        writer.chunk_crcs()
    writer.submit(data.ctypes.data + 2 * CHUNK, 2 * CHUNK, 2 * CHUNK)
    assert writer.finish() == (len(data), _io.crc32c(data))


@pytest.mark.parametrize("chunk", [0, 512, 4095, 4097, 128 << 20])
def test_chunks_that_cannot_be_are_named(engine, fresh, chunk):
    path = fresh()
    with pytest.raises(ValueError, match=f"chunk is {chunk}; allowed"):
        engine.create(path, 10, chunk=chunk)
    assert not path.exists()


def test_unknown_tickets_are_refused(engine, fresh):
    writer = engine.create(fresh(), 10)
    for ticket in (0, 1, 7):
        with pytest.raises(ValueError, match=f"ticket is {ticket}"):
            writer.done(ticket)
        with pytest.raises(ValueError, match=f"ticket is {ticket}"):
            writer.wait(ticket, timeout=0)


def test_timeouts_that_cannot_be_are_refused(engine, fresh, make_noise):
    data = make_noise(10)
    writer = engine.create(fresh(), 10)
    ticket = writer.submit(data.ctypes.data, 0, 10)
    for timeout in (-1.0, float("nan")):
        with pytest.raises(ValueError, match="timeout is"):
            writer.wait(ticket, timeout)
    assert writer.wait(ticket, 1e300)
    assert writer.wait(ticket, 0)


# ---- errors ----


def test_an_existing_file_stays(engine, fresh):
    path = fresh()
    path.write_text("mine")
    with pytest.raises(FileExistsError) as raised:
        engine.create(path, 10)
    assert raised.value.filename == str(path)
    assert path.read_text() == "mine"


def test_errors_carry_the_name_of_the_file(engine, fresh):
    path = fresh() / "nowhere"
    for call in (
        lambda: engine.create(path, 10),
        lambda: engine.checksum(path),
        lambda: engine.read(path, np.zeros((0, 6), np.int64), chunk=4096, crcs=None, size=0),
    ):
        with pytest.raises(FileNotFoundError) as raised:
            call()
        assert raised.value.filename == str(path)


def test_names_that_are_not_utf8(engine, tmp_path):
    name = os.fsencode(tmp_path) + b"/\xff\xfe"
    writer = engine.create(name, 4096, chunk=4096)
    assert os.fsencode(writer.path) == name
    with pytest.raises(ValueError, match="were submitted"):
        writer.finish()
    with pytest.raises(FileExistsError) as raised:
        engine.create(name, 10)
    assert os.fsencode(raised.value.filename) == name


def limited_to(size: int) -> tuple[int, int]:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    return soft, hard


def test_a_file_that_may_not_grow_so_large(engine, fresh):
    """RLIMIT_FSIZE, as a full disk: refused before a byte is written. The caller removes the file."""
    path = fresh()
    old = limited_to(1 << 16)
    try:
        with pytest.raises(OSError) as raised:
            engine.create(path, 1 << 20)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
    assert raised.value.errno == errno.EFBIG
    assert raised.value.filename == str(path)
    assert path.stat().st_size == 0


def test_an_error_while_writing_is_raised_by_everything_that_follows(engine, fresh, make_noise):
    path = fresh()
    data = make_noise(1 << 20)
    writer = engine.create(path, len(data), chunk=CHUNK)
    old = limited_to(1 << 16)
    try:
        ticket = writer.submit(data.ctypes.data, 0, len(data) // 2)
        with pytest.raises(OSError) as raised:
            writer.wait(ticket)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
    assert raised.value.errno == errno.EFBIG
    assert raised.value.filename == str(path)
    assert writer.done(ticket)
    half = len(data) // 2
    for call in (
        lambda: writer.submit(data.ctypes.data + half, half, half),
        lambda: writer.wait(ticket),
        writer.finish,
        writer.chunk_crcs,
    ):
        with pytest.raises(OSError) as raised:
            call()
        assert raised.value.errno == errno.EFBIG


# ---- cancellation ----


def test_cancelling_gives_the_memory_back(engine, fresh, make_noise):
    data = make_noise(64 << 20)
    for _ in range(20):  # a busy machine may let the writing end before this thread comes back
        writer = engine.create(fresh(), len(data), fsync=False)
        tickets = [
            writer.submit(data.ctypes.data + at, at, 8 << 20) for at in range(0, len(data), 8 << 20)
        ]
        writer.cancel()
        writer.cancel()
        assert all(writer.done(ticket) for ticket in tickets)
        written = writer.written
        if written < len(data):
            break
        os.unlink(writer.path)
    assert written < len(data)
    with pytest.raises(OSError) as raised:
        writer.finish()
    assert raised.value.errno == errno.ECANCELED
    with pytest.raises(OSError):
        writer.wait(tickets[-1])
    time.sleep(0.02)
    assert writer.written == written


def test_cancelling_wakes_those_who_wait(engine, fresh):
    """A file of zeros that would take seconds, and a thread that waits for it."""
    buffer = _io.Buffer(64 << 20)
    size = 1 << 30
    writer = engine.create(fresh(), size, fsync=False)
    for at in range(0, size, buffer.nbytes):
        writer.submit(buffer.address, at, buffer.nbytes)
    raised: list[int | None] = []

    def finish() -> None:
        try:
            writer.finish()
        except OSError as error:
            raised.append(error.errno)

    thread = threading.Thread(target=finish)
    thread.start()
    while writer.written == 0:
        time.sleep(0.001)
    writer.cancel()
    thread.join(10)
    assert raised == [errno.ECANCELED]
    os.unlink(writer.path)


def test_a_finished_file_is_not_cancelled(engine, fresh, make_noise):
    data = make_noise(100_000)
    path = fresh()
    writer = engine.create(path, len(data), chunk=CHUNK)
    writer.submit(data.ctypes.data, 0, len(data))
    result = writer.finish()
    writer.cancel()
    assert writer.finish() == result
    del writer
    assert path.read_bytes() == data.tobytes()


def test_dropping_a_writer_in_the_middle_ends_it(engine, fresh, make_noise):
    data = make_noise(32 << 20)
    for _ in range(3):
        writer = engine.create(fresh(), len(data), fsync=False)
        writer.submit(data.ctypes.data, 0, len(data))
        del writer
        data[:] = 7  # nobody reads it any more: the sanitizers would tell
