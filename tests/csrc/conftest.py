"""Engines of every kind, and files whose right content is known."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from goku_runtime import _io

CHUNK = 4096


def io_uring_here() -> bool:
    try:
        _io.Engine(backend="io_uring").close()
    except OSError:
        return False
    return True


KINDS = [("threads", "auto"), ("threads", "off"), ("io_uring", "auto"), ("io_uring", "off")]


@pytest.fixture(scope="session", params=KINDS, ids="-".join)
def engine(request) -> Iterator[_io.Engine]:
    """One engine of each kind for all tests, small enough that files of some KiB have many requests."""
    backend, direct = request.param
    if backend == "io_uring" and not io_uring_here():
        pytest.skip("this kernel refuses io_uring")
    with _io.Engine(backend=backend, direct=direct, block_bytes=65536, queue_depth=4) as made:
        yield made


@pytest.fixture
def fresh(tmp_path: Path) -> Iterator[Callable[[], Path]]:
    """A new path each time; what comes to stand there goes with the test."""
    made: list[Path] = []

    def path() -> Path:
        made.append(tmp_path / f"file-{len(made)}")
        return made[-1]

    yield path
    for one in made:
        one.unlink(missing_ok=True)


def noise(size: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, size, dtype=np.uint8)


@pytest.fixture(scope="session")
def make_noise() -> Callable[..., np.ndarray]:
    return noise


def expected_crcs(data: np.ndarray, chunk: int) -> bytes:
    view = memoryview(data)
    return b"".join(
        _io.crc32c(view[at : at + chunk]).to_bytes(4, "little") for at in range(0, len(data), chunk)
    )


@pytest.fixture(scope="session")
def crcs_of() -> Callable[[np.ndarray, int], bytes]:
    return expected_crcs


@pytest.fixture(scope="session")
def write_file() -> Callable[..., tuple[int, bytes]]:
    """write_file(engine, path, data, chunk) -> (CRC, chunk CRCs), by one submit."""

    def write(engine, path, data, chunk=CHUNK):
        writer = engine.create(path, len(data), chunk=chunk, fsync=False)
        if len(data):
            writer.submit(data.ctypes.data, 0, len(data))
        size, crc = writer.finish()
        assert size == len(data)
        return crc, writer.chunk_crcs()

    return write
