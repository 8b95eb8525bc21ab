"""Engine.read and Engine.checksum: every segment in its place, and no damaged byte copied out."""

import array
import errno
import os
import time

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from goku_runtime import _io

CHUNK = 4096
each_example_has_its_own_file = settings(
    suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=40
)
SENTINEL = 0xA5


@st.composite
def layouts(draw):
    """(file size, [(offset, row_bytes, rows, file_stride, memory_stride)]), all within the file."""
    size = draw(st.one_of(st.integers(1, 20_000), st.integers(1, 400_000)))
    segments = []
    for _ in range(draw(st.integers(0, 8))):
        row_bytes = draw(st.one_of(st.integers(1, min(size, 64)), st.integers(1, size)))
        offset = draw(st.integers(0, size - row_bytes))
        file_stride = draw(
            st.one_of(
                st.just(row_bytes), st.integers(row_bytes, 2 * row_bytes + 8), st.just(3 * CHUNK)
            )
        )
        file_stride = max(file_stride, row_bytes)
        most = (size - offset - row_bytes) // file_stride + 1
        rows = draw(st.integers(0, min(most, 60)))
        memory_stride = row_bytes + draw(st.sampled_from([0, 0, 1, 17]))
        segments.append((offset, row_bytes, rows, file_stride, memory_stride))
    return size, segments


def place(segments) -> tuple[np.ndarray, np.ndarray]:
    """Memory for all segments, one after the other with a gap, and the rows that name it."""
    spans = [rows * stride + 3 for _, _, rows, _, stride in segments]
    memory = np.full(sum(spans) + 3, SENTINEL, np.uint8)
    rows = np.zeros((len(segments), 6), np.int64)
    at = 3
    for row, span, (offset, row_bytes, count, file_stride, memory_stride) in zip(
        rows, spans, segments, strict=True
    ):
        row[:] = (offset, row_bytes, count, file_stride, memory.ctypes.data + at, memory_stride)
        at += span
    return memory, rows


def expected_memory(data, segments) -> np.ndarray:
    memory, rows = place(segments)
    base = memory.ctypes.data
    for offset, row_bytes, count, file_stride, address, memory_stride in rows:
        for row in range(count):
            to = address - base + row * memory_stride
            begin = offset + row * file_stride
            memory[to : to + row_bytes] = data[begin : begin + row_bytes]
    return memory


def touched(segments, chunk: int, size: int) -> int:
    """Bytes of the chunks that hold a wanted byte."""
    chunks: set[int] = set()
    for offset, row_bytes, count, file_stride, _ in segments:
        for row in range(count):
            begin = offset + row * file_stride
            chunks.update(range(begin // chunk, (begin + row_bytes - 1) // chunk + 1))
    return sum(min(chunk, size - number * chunk) for number in chunks)


@each_example_has_its_own_file
@given(layout=layouts(), chunk=st.sampled_from([4096, 65536]), verified=st.booleans())
def test_any_segments_arrive_and_nothing_else_is_written(
    engine, fresh, make_noise, write_file, layout, chunk, verified
):
    size, segments = layout
    data = make_noise(size)
    path = fresh()
    _, crcs = write_file(engine, path, data, chunk)
    memory, rows = place(segments)
    stats = engine.read(path, rows, chunk=chunk, crcs=crcs if verified else None, size=size)
    assert np.array_equal(memory, expected_memory(data, segments))
    assert stats.bytes_wanted == sum(row_bytes * count for _, row_bytes, count, _, _ in segments)
    assert stats.bytes_read == touched(segments, chunk if verified else 4096, size)
    assert (stats.requests == 0) == (stats.bytes_read == 0)


@each_example_has_its_own_file
@given(layout=layouts(), data=st.data())
def test_a_flipped_bit_is_found_in_its_chunk_and_not_copied(
    engine, fresh, make_noise, write_file, layout, data
):
    size, segments = layout
    content = make_noise(size)
    path = fresh()
    _, crcs = write_file(engine, path, content)
    bit = data.draw(st.integers(0, 8 * size - 1))
    damaged = content.copy()
    damaged[bit // 8] ^= 1 << bit % 8
    path.write_bytes(damaged.tobytes())
    bad = bit // 8 // CHUNK
    begin, end = bad * CHUNK, min((bad + 1) * CHUNK, size)

    memory, rows = place(segments)
    reads_it = any(
        offset + row * stride < end and offset + row * stride + row_bytes > begin
        for offset, row_bytes, count, stride, _ in segments
        for row in range(count)
    )
    if not reads_it:
        engine.read(path, rows, chunk=CHUNK, crcs=crcs, size=size)
        assert np.array_equal(memory, expected_memory(content, segments))
        return
    with pytest.raises(_io.ChunkError) as raised:
        engine.read(path, rows, chunk=CHUNK, crcs=crcs, size=size)
    error = raised.value
    assert (error.offset, error.length) == (begin, end - begin)
    assert error.wanted == int.from_bytes(crcs[4 * bad : 4 * bad + 4], "little")
    assert error.found == _io.crc32c(damaged[begin:end])
    assert error.filename == str(path)
    assert str(path) in str(error)
    assert isinstance(error, ValueError)
    # What was copied before the error is right, what lies in the bad chunk was not copied.
    right = expected_memory(content, segments)
    assert np.all((memory == right) | (memory == SENTINEL))
    for offset, row_bytes, count, stride, address, memory_stride in rows:
        for row in range(count):
            low, high = (
                max(offset + row * stride, begin),
                min(offset + row * stride + row_bytes, end),
            )
            if low < high:
                to = (
                    address - memory.ctypes.data + row * memory_stride + low - offset - row * stride
                )
                assert np.all(memory[to : to + high - low] == SENTINEL)


def test_of_many_bad_chunks_the_first_is_named(engine, fresh, make_noise, write_file):
    data = make_noise(4 << 20)
    path = fresh()
    _, crcs = write_file(engine, path, data)
    for chunk in (901, 512, 77, 78, 1023):
        data[chunk * CHUNK + 5] ^= 1
    path.write_bytes(data.tobytes())
    memory, rows = place([(0, len(data), 1, len(data), len(data))])
    for _ in range(5):
        with pytest.raises(_io.ChunkError) as raised:
            engine.read(path, rows, chunk=CHUNK, crcs=crcs, size=len(data))
        assert raised.value.offset == 77 * CHUNK
    assert np.all(memory[3 + 77 * CHUNK : 3 + 78 * CHUNK] == SENTINEL)


@pytest.mark.parametrize("change", [-1, 1, -4096, 4096])
def test_a_file_of_another_size_is_refused(engine, fresh, make_noise, write_file, change):
    data = make_noise(50_000)
    path = fresh()
    _, crcs = write_file(engine, path, data)
    os.truncate(path, len(data) + change)
    memory, rows = place([(0, 100, 1, 100, 100)])
    with pytest.raises(ValueError, match=f"has {50_000 + change} bytes; expected were 50000"):
        engine.read(path, rows, chunk=CHUNK, crcs=crcs, size=len(data))
    assert np.all(memory == SENTINEL)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ((-1, 1, 1, 1, 8, 1), "segment 0: offset is -1; allowed is 0 and above"),
        ((0, 10, 2, 9, 8, 10), "segment 0: file_stride is 9; allowed is row_bytes, 10"),
        ((0, 10, 2, 10, 8, 9), "segment 0: memory_stride is 9; allowed is row_bytes, 10"),
        ((0, 10, 1, 10, 0, 10), "segment 0: address is 0"),
        ((991, 10, 1, 10, 8, 10), "offset 991, row_bytes 10, .* the file has 1000 bytes"),
        ((0, 10, 101, 10, 8, 10), "rows 101, file_stride 10; the file has 1000 bytes"),
        ((0, 1, 1 << 62, 1 << 62, 8, 1), "the file has 1000 bytes"),
        ((1 << 62, 1 << 62, 1, 1, 8, 1), "the file has 1000 bytes"),
    ],
)
def test_segments_that_cannot_be_are_named(engine, fresh, write_file, make_noise, row, message):
    path = fresh()
    _, crcs = write_file(engine, path, make_noise(1000))
    with pytest.raises(ValueError, match=message):
        engine.read(path, np.array([row], np.int64), chunk=CHUNK, crcs=crcs, size=1000)


@pytest.mark.parametrize(
    "segments",
    [np.zeros((1, 6), np.int32), np.zeros((1, 6)), np.zeros((1, 5), np.int64), bytes(48)],
    ids=["int32", "float64", "five columns", "bytes"],
)
def test_segments_of_another_type_are_refused(engine, fresh, write_file, make_noise, segments):
    path = fresh()
    write_file(engine, path, make_noise(1000))
    with pytest.raises(ValueError, match="allowed are rows of six int64"):
        engine.read(path, segments, chunk=CHUNK, crcs=None, size=1000)


def test_segments_may_be_an_array_of_the_standard_library(
    engine, fresh, write_file, make_noise, crcs_of
):
    data = make_noise(10_000)
    path = fresh()
    write_file(engine, path, data)
    out = _io.Buffer(10_000)
    rows = array.array(
        "q", [5000, 5000, 1, 0, out.address + 5000, 0, 0, 5000, 1, 0, out.address, 0]
    )
    engine.read(path, rows, chunk=CHUNK, crcs=crcs_of(data, CHUNK), size=len(data))
    assert bytes(out) == data.tobytes()


def test_checksums_of_another_number_are_refused(engine, fresh, write_file, make_noise):
    path = fresh()
    _, crcs = write_file(engine, path, make_noise(10_000))
    none = np.zeros((0, 6), np.int64)
    for wrong in (crcs[:-4], crcs + b"four", b""):
        with pytest.raises(ValueError, match=f"crcs are {len(wrong) // 4}; .* has 3 chunks"):
            engine.read(path, none, chunk=CHUNK, crcs=wrong, size=10_000)
    with pytest.raises(ValueError, match="crcs has 11 bytes"):
        engine.read(path, none, chunk=CHUNK, crcs=crcs[:-1], size=10_000)


# ---- a reading under way ----


def test_progress_and_result(engine, fresh, write_file, make_noise):
    data = make_noise(3_000_001)
    path = fresh()
    _, crcs = write_file(engine, path, data)
    memory, rows = place([(0, len(data), 1, len(data), len(data))])
    reader = engine.start_read(path, rows, chunk=CHUNK, crcs=crcs, size=len(data))
    assert reader.wait()
    assert reader.wait(0)
    assert reader.progress == (len(data), len(data))
    assert reader.result().bytes_read == len(data)
    reader.cancel()
    assert reader.result().bytes_read == len(data)  # it was over already
    assert np.array_equal(memory[3 : 3 + len(data)], data)


def test_a_cancelled_reading_writes_no_more(engine, fresh, write_file, make_noise):
    data = make_noise(64 << 20)
    path = fresh()
    _, crcs = write_file(engine, path, data, 65536)
    out = np.full(len(data), SENTINEL, np.uint8)
    rows = np.array([[0, len(data), 1, len(data), out.ctypes.data, len(data)]], np.int64)
    deadline = time.monotonic() + 60
    done, total = 1, 1
    # A busy machine may let the reading end before this thread comes back, twenty times in a row.
    while done == total and time.monotonic() < deadline:
        reader = engine.start_read(path, rows, chunk=65536, crcs=crcs, size=len(data))
        reader.cancel()
        after = out.copy()
        done, total = reader.progress
        assert total == len(data)
    assert done < total
    with pytest.raises(OSError) as raised:
        reader.result()
    assert raised.value.errno == errno.ECANCELED
    assert raised.value.filename == str(path)
    assert np.array_equal(out, after)
    reader = engine.start_read(path, rows, chunk=65536, crcs=crcs, size=len(data))
    del reader
    out[:] = 1
    assert np.all(out == 1)


# ---- checksums of whole files ----


@each_example_has_its_own_file
@given(size=st.integers(0, 300_000), chunk=st.sampled_from([4096, 8192, 65536, 262144]))
def test_checksum_equals_the_bytes(engine, fresh, make_noise, crcs_of, size, chunk):
    data = make_noise(size, size)
    path = fresh()
    path.write_bytes(data.tobytes())
    assert engine.checksum(path, chunk=chunk) == (size, _io.crc32c(data), crcs_of(data, chunk))


def test_a_checksum_under_way(engine, fresh, make_noise, write_file):
    data = make_noise(1_000_000)
    path = fresh()
    crc, crcs = write_file(engine, path, data)
    checksum = engine.start_checksum(path, chunk=CHUNK)
    assert checksum.result() == (len(data), crc, crcs)
    assert checksum.progress == (len(data), len(data))
    checksum.cancel()
    assert checksum.result() == (len(data), crc, crcs)  # it was over already


def test_a_cancelled_checksum_has_no_result(engine, fresh):
    path = fresh()
    path.touch()
    os.truncate(path, 64 << 30)  # sparse, and still minutes of work
    checksum = engine.start_checksum(path)
    assert not checksum.wait(0.01)
    checksum.cancel()
    assert checksum.wait(0)
    with pytest.raises(OSError) as raised:
        checksum.result()
    assert raised.value.errno == errno.ECANCELED
