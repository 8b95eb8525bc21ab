"""CRC-32C against the published vectors and against a bit-by-bit reference."""

import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from goku_runtime import _io

# RFC 3720, appendix B.4; the last one is the check value of the CRC catalogues (CRC-32/ISCSI).
READ_10_COMMAND = bytes.fromhex(
    "01c00000 00000000 00000000 00000000 14000000 00000400 00000014 00000018"
    "28000000 00000000 02000000 00000000"
)
VECTORS = {
    "nothing": (b"", 0x00000000),
    "32 zeros": (bytes(32), 0x8A9136AA),
    "32 ones": (b"\xff" * 32, 0x62A8AB43),
    "ascending": (bytes(range(32)), 0x46DD794E),
    "descending": (bytes(reversed(range(32))), 0x113FDB5C),
    "iSCSI read": (READ_10_COMMAND, 0xD9963A56),
    "123456789": (b"123456789", 0xE3069283),
}
IMPLEMENTATIONS = [_io.crc32c, _io.crc32c_portable]

# The three-lane loops start at 3 x 256 and 3 x 4096 bytes; sizes around them and around a word.
EDGES = [0, 1, 7, 8, 9, 767, 768, 769, 775, 1536, 12287, 12288, 12289, 13056, 24576 + 768 + 15]

random_bytes = st.binary(max_size=1500)
crcs = st.integers(0, 2**32 - 1)


def reference(data: bytes, crc: int = 0) -> int:
    """The definition, one bit at a time: polynomial 0x82F63B78, complement at both ends."""
    state = crc ^ 0xFFFFFFFF
    for byte in data:
        state ^= byte
        for _ in range(8):
            state = (state >> 1) ^ (0x82F63B78 if state & 1 else 0)
    return state ^ 0xFFFFFFFF


def noise(size: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, size, dtype=np.uint8)


@pytest.mark.parametrize("checksum", [*IMPLEMENTATIONS, reference], ids=lambda f: f.__name__)
@pytest.mark.parametrize("name", VECTORS)
def test_published_vectors(checksum, name):
    data, expected = VECTORS[name]
    assert checksum(data) == expected


@given(random_bytes, crcs)
def test_both_equal_the_definition(data, crc):
    expected = reference(data, crc)
    assert _io.crc32c(data, crc) == expected
    assert _io.crc32c_portable(data, crc) == expected


@pytest.mark.parametrize("size", EDGES)
@pytest.mark.parametrize("offset", [0, 1, 7])
def test_hardware_equals_portable_at_every_loop_boundary(size, offset):
    data = noise(size + offset, seed=size)[offset:]
    assert _io.crc32c(data, 0x12345678) == _io.crc32c_portable(data, 0x12345678)


@given(st.integers(0, 200_000), st.integers(0, 16), st.integers(0, 2**32 - 1), crcs)
def test_hardware_equals_portable_on_long_buffers(size, offset, seed, crc):
    data = memoryview(noise(size + offset, seed))[offset:]
    assert _io.crc32c(data, crc) == _io.crc32c_portable(data, crc)


@given(random_bytes, random_bytes, crcs)
def test_split_anywhere(first, second, crc):
    for checksum in IMPLEMENTATIONS:
        assert checksum(second, checksum(first, crc)) == checksum(first + second, crc)


@given(random_bytes, random_bytes)
def test_combine_equals_the_concatenation(first, second):
    combined = _io.crc32c_combine(_io.crc32c(first), _io.crc32c(second), len(second))
    assert combined == _io.crc32c(first + second)


def test_combine_over_a_length_that_no_buffer_has():
    # 2**40 + 3 zero bytes after A, by 40 doublings of combine itself and by one call.
    crc = _io.crc32c(b"head")
    block, length = _io.crc32c(bytes(1)), 1
    for _ in range(40):
        block, length = _io.crc32c_combine(block, block, length), 2 * length
    stepwise = _io.crc32c(bytes(3), _io.crc32c_combine(crc, block, length))
    zeros = _io.crc32c_combine(block, _io.crc32c(bytes(3)), 3)
    assert _io.crc32c_combine(crc, zeros, 2**40 + 3) == stepwise


@given(st.binary(min_size=1, max_size=500), st.data())
def test_one_changed_bit_is_seen(data, draw):
    bit = draw.draw(st.integers(0, 8 * len(data) - 1))
    changed = bytearray(data)
    changed[bit // 8] ^= 1 << bit % 8
    assert _io.crc32c(changed) != _io.crc32c(data)


@pytest.mark.parametrize(
    "buffer",
    [
        np.arange(6, dtype=np.float32).reshape(2, 3),
        memoryview(b"abcdef").cast("H"),
        bytearray(b"abcdef"),
        np.array(7, dtype=np.int64),
    ],
    ids=["matrix", "halfwords", "bytearray", "scalar array"],
)
def test_any_contiguous_buffer_is_read_as_its_bytes(buffer):
    assert _io.crc32c(buffer) == _io.crc32c(bytes(memoryview(buffer).cast("B")))


@pytest.mark.parametrize(
    "buffer",
    [np.arange(8)[::2], memoryview(b"abcdef")[::2], np.zeros((3, 4), order="F")],
    ids=["strided array", "strided view", "column-major array"],
)
def test_what_is_not_contiguous_is_refused(buffer):
    with pytest.raises((ValueError, BufferError), match="contiguous"):
        _io.crc32c(buffer)


def test_what_is_no_buffer_is_refused():
    with pytest.raises(TypeError, match="bytes-like"):
        _io.crc32c("text")  # type: ignore[arg-type]


@pytest.mark.parametrize("crc", [-1, 2**32])
def test_values_out_of_range_are_named(crc):
    with pytest.raises(ValueError, match=f"crc is {crc}; allowed is 0 to 4294967295"):
        _io.crc32c(b"", crc)
    with pytest.raises(ValueError, match=f"crc2 is {crc}"):
        _io.crc32c_combine(0, crc, 1)
    with pytest.raises(ValueError, match="len2 is -1"):
        _io.crc32c_combine(0, 0, -1)


def test_the_instruction_is_used_where_the_processor_has_it():
    flags = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    expected = {"sse4_2": "sse4.2", "crc32": "armv8"}
    here = [name for flag, name in expected.items() if flag in flags.split()]
    assert _io.crc32c_implementation() == (here[0] if here else "portable")


def test_other_threads_run_while_a_large_buffer_is_read():
    # With an endless switch interval a thread runs until it gives the interpreter lock up itself,
    # so this thread can only come back before the checksum is done if the checksum released it.
    # The system may still schedule this thread late: a few tries.
    data = bytes(128 << 20)
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e6)
    try:
        seen_running = False
        for _ in range(5):
            finished: list[int] = []
            thread = threading.Thread(
                target=lambda out=finished: out.append(_io.crc32c_portable(data))
            )
            thread.start()
            seen_running = not finished
            thread.join()
            if seen_running:
                break
    finally:
        sys.setswitchinterval(interval)
    assert seen_running
