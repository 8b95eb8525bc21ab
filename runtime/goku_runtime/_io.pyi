"""The compiled part of goku_runtime (csrc/io)."""

from typing_extensions import Buffer

def crc32c(buffer: Buffer, crc: int = 0) -> int:
    """CRC-32C (Castagnoli, RFC 3720 B.4) of `buffer`, by the processor's instruction if it has one.

    Any C-contiguous buffer object, read as bytes. `crc` is the value of what came before, so that
    `crc32c(b, crc32c(a)) == crc32c(a + b)`. Other threads run meanwhile; do not write to the buffer.

    Raises ValueError for a `crc` outside 0 to 2**32 - 1, BufferError (NumPy arrays: ValueError) for
    a buffer that is not C-contiguous and TypeError for what is no buffer.
    """

def crc32c_portable(buffer: Buffer, crc: int = 0) -> int:
    """The same value in plain C++ (slicing by 8): what `crc32c` runs without such an instruction."""

def crc32c_combine(crc1: int, crc2: int, len2: int) -> int:
    """`crc32c(a + b)` from `crc32c(a)`, `crc32c(b)` and `len(b)` in bytes, reading neither again.

    Raises ValueError for a value outside 0 to 2**32 - 1 or a negative length.
    """

def crc32c_implementation() -> str:
    """What `crc32c` runs on this processor: "sse4.2", "armv8" or "portable"."""
