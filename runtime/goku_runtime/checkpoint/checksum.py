"""CRC-32C of buffers and files, by the compiled `goku_runtime._io`."""

from __future__ import annotations

from pathlib import Path

from typing_extensions import Buffer

from goku_runtime.checkpoint.native import needs_io

__all__ = ["crc32c", "crc32c_of_file"]

# Large enough that the calls cost nothing, small enough to stay in the second-level cache.
_BLOCK_BYTES = 1 << 20


def crc32c(buffer: Buffer, crc: int = 0) -> int:
    """CRC-32C (Castagnoli, RFC 3720 appendix B.4) of a C-contiguous buffer.

    Args:
        buffer: bytes or anything else with a C-contiguous buffer.
        crc: the value of what came before: ``crc32c(b, crc32c(a)) == crc32c(a + b)``.

    Raises:
        ImportError: the compiled module is missing; the message says which step builds it.
        ValueError: `crc` is outside 0 to 2**32 - 1.
    """
    with needs_io():
        from goku_runtime import _io

    return _io.crc32c(buffer, crc)


def crc32c_of_file(path: Path) -> tuple[int, int]:
    """Size in bytes and CRC-32C of what the file holds now. Raises OSError if it cannot be read."""
    block = memoryview(bytearray(_BLOCK_BYTES))
    size = crc = 0
    with open(path, "rb", buffering=0) as stream:
        while count := stream.readinto(block):
            crc = crc32c(block[:count], crc)
            size += count
    return size, crc
