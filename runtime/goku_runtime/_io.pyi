"""The compiled part of goku_runtime (csrc/io)."""

import os
from types import TracebackType
from typing import Any, Literal, Self, TypeAlias, final

from typing_extensions import Buffer as BufferObject

_StrOrBytesPath: TypeAlias = str | bytes | os.PathLike[str] | os.PathLike[bytes]

def crc32c(buffer: BufferObject, crc: int = 0) -> int:
    """CRC-32C (Castagnoli, RFC 3720 B.4) of `buffer`, by the processor's instruction if it has one.

    Any C-contiguous buffer object, read as bytes. `crc` is the value of what came before, so that
    `crc32c(b, crc32c(a)) == crc32c(a + b)`. Other threads run meanwhile; do not write to the buffer.

    Raises ValueError for a `crc` outside 0 to 2**32 - 1, BufferError (NumPy arrays: ValueError) for
    a buffer that is not C-contiguous and TypeError for what is no buffer.
    """

def crc32c_portable(buffer: BufferObject, crc: int = 0) -> int:
    """The same value in plain C++ (slicing by 8): what `crc32c` runs without such an instruction."""

def crc32c_combine(crc1: int, crc2: int, len2: int) -> int:
    """`crc32c(a + b)` from `crc32c(a)`, `crc32c(b)` and `len(b)` in bytes, reading neither again.

    Raises ValueError for a value outside 0 to 2**32 - 1 or a negative length.
    """

def crc32c_implementation() -> str:
    """What `crc32c` runs on this processor: "sse4.2", "armv8" or "portable"."""

def copy(moves: BufferObject, threads: int) -> None:
    """Copy memory, as staging does: many places at once, without the interpreter's lock.

    moves: C-contiguous int64 rows (address of the target, of the source, length in bytes). No target
        may overlap another's target or any source. From 8 MiB in all on, stores go past the caches.
    threads: that share the work, the calling one among them.

    Raises ValueError for a negative length or threads < 1.
    """

# ---- the file engine -----------------------------------------------------------------------------
#
# Memory is named by its address: it has to stay where it is, and unchanged (writing) or unread
# (reading), until the ticket is done or the reading has ended. Every call that may block gives up
# the interpreter's lock and answers Ctrl-C. Objects may be used by several threads. After fork()
# the child cannot use the parent's engine and its files: RuntimeError.

class ChunkError(ValueError):
    """A chunk of a file does not have the CRC-32C that it was written with."""

    offset: int  # of the chunk, bytes
    length: int  # bytes; less than the chunk size at the file's end alone
    wanted: int  # CRC-32C
    found: int
    filename: str

@final
class Buffer:
    """Zeroed memory of `nbytes` bytes, aligned to a page, freed with the last view of it.

    huge: from 2 MiB on, aligned to 2 MiB and in huge pages where the system gives them out.
    A C-contiguous writable buffer object of format "B". Raises ValueError for nbytes < 1 and
    MemoryError.
    """

    def __init__(self, nbytes: int, huge: bool = True) -> None: ...
    @property
    def address(self) -> int: ...
    @property
    def nbytes(self) -> int: ...
    def __len__(self) -> int: ...
    def __buffer__(self, flags: int, /) -> memoryview: ...

@final
class ReadStats:
    """What a reading cost: bytes from the file, bytes that the segments wanted, requests made."""

    @property
    def bytes_read(self) -> int: ...
    @property
    def bytes_wanted(self) -> int: ...
    @property
    def requests(self) -> int: ...

@final
class FileWriter:
    """A new file, each byte of which is submitted once. Made by Engine.create.

    The first error of any request is raised by every call that follows it, as OSError with errno
    and filename; errno is ECANCELED after `cancel` and after the engine's `close`. Dropping the
    object cancels it. What was created is left for the caller to remove.
    """

    @property
    def path(self) -> str: ...
    @property
    def size(self) -> int:
        """In bytes, as it will be."""
    @property
    def chunk(self) -> int:
        """Bytes that one CRC covers."""
    @property
    def direct(self) -> bool:
        """Its requests bypass the page cache (O_DIRECT)."""
    @property
    def written(self) -> int:
        """Bytes handed to the file system so far."""
    def submit(self, buffer_address: int, offset: int, length: int) -> int:
        """Queue file bytes [offset, offset + length), in any order; returns a ticket. Never blocks.

        offset: a multiple of `chunk`; length too, but for what reaches the end of the file. The
        memory stays until the ticket is done. Aligned to a page it is written from where it is,
        otherwise through a bounce buffer. Raises ValueError for a range that is not allowed or was
        submitted before, and what the file failed with.
        """
    def gather(self, extents: BufferObject, offset: int, length: int) -> int:
        """`submit` for bytes that lie in many places: threads of the engine bring them together.

        extents: C-contiguous int64 rows (offset in the file, length, address), in the file's order;
            what none of them holds becomes zeros. They are copied, the memory stays until the ticket
            is done. Raises ValueError also for extents that overlap or leave the range.
        """
    def done(self, ticket: int) -> bool:
        """Whether the ticket's memory is the caller's again (written, failed or cancelled)."""
    def wait(self, ticket: int, timeout: float | None = None) -> bool:
        """Wait for that; False after `timeout` seconds. Raises what the file failed with."""
    def finish(self) -> tuple[int, int]:
        """Wait for everything, fsync, close: (size, CRC-32C of the file). May be called again.

        Raises ValueError while bytes are missing, and OSError.
        """
    def chunk_crcs(self) -> bytes:
        """One little-endian uint32 per chunk, after `finish`; ValueError before."""
    def cancel(self) -> None:
        """Drop what is queued, await what is in flight, close. Idempotent; after `finish`: nothing."""

@final
class FileReader:
    """A reading under way. Dropping the object cancels it. Made by Engine.start_read."""

    @property
    def progress(self) -> tuple[int, int]:
        """Bytes of the file read and verified so far, and of all that is to be read."""
    def wait(self, timeout: float | None = None) -> bool:
        """Wait until it has ended, well or not; False after `timeout` seconds."""
    def result(self) -> ReadStats:
        """Wait, and raise as Engine.read does; OSError(ECANCELED) if it was cancelled."""
    def cancel(self) -> None:
        """Drop what is left and await what is in flight: the memory is then the caller's again."""

@final
class FileChecksum:
    """A whole file being read for its checksums. Made by Engine.start_checksum."""

    @property
    def progress(self) -> tuple[int, int]: ...
    def wait(self, timeout: float | None = None) -> bool: ...
    def result(self) -> tuple[int, int, bytes]:
        """As Engine.checksum; OSError(ECANCELED) if it was cancelled."""
    def cancel(self) -> None: ...

@final
class Engine:
    """Threads, and an io_uring where the kernel allows one, that write and read files.

    backend: "threads" transfers by pwrite and pread in as many threads as there are requests.
        "auto" is io_uring, or threads where the kernel refuses (describe()["reason"] says why).
    direct: O_DIRECT "on" (OSError(EINVAL) where it does not work), "off", or "auto": where it works,
        and not for files in memory (tmpfs), where it means nothing. Buffered requests are copied by
        the threads whatever the backend.
    queue_depth: requests under way at once; block_bytes: the most that a write has, and twice
        the most that a read has (a multiple of 4096, 65536 to 2**30; larger where a chunk is);
        threads: that transfer and compute checksums. 0: the default. Unless one of queue_depth,
        threads and memory_budget is given, files in memory (tmpfs) have threads, requests and bounce
        buffers of their own: two where they are written (more would wait for the file's lock), as
        many as processors, 2 to 16, where they are read.
    memory_budget: bytes of bounce buffers (queue_depth * block_bytes otherwise; lowers the depth).
    trace: keep what was asked of the file system.

    Raises ValueError, and OSError for a backend that was asked for by name and is refused.
    """

    def __init__(
        self,
        *,
        backend: Literal["auto", "io_uring", "threads"] = "auto",
        direct: Literal["auto", "on", "off"] = "auto",
        queue_depth: int = 0,
        block_bytes: int = 0,
        threads: int = 0,
        memory_budget: int = 0,
        trace: bool = False,
    ) -> None: ...
    @property
    def backend(self) -> Literal["io_uring", "threads"]: ...
    @property
    def queue_depth(self) -> int: ...
    @property
    def block_bytes(self) -> int: ...
    @property
    def threads(self) -> int: ...
    def describe(self) -> dict[str, Any]:
        """What was chosen: backend, backend_wanted, reason (why not io_uring, or None), direct,
        queue_depth, block_bytes, threads, bounce_bytes, crc32c.
        """
    def trace(self) -> list[tuple[int, int, str, str, int, int]]:
        """(begin_ns, end_ns, operation, path, offset, length), CLOCK_MONOTONIC, in order of their ends.

        Operations: create, preallocate, write, truncate, fsync, close; only those that succeeded. A
        write that was continued stands there as its parts. Reads are not kept.
        """
    def create(
        self,
        path: _StrOrBytesPath,
        size: int,
        *,
        chunk: int = 65536,
        fsync: bool = True,
        mode: int = 0o644,
    ) -> FileWriter:
        """A new file of `size` bytes, whose blocks are reserved where the file system can.

        chunk: bytes per CRC, a multiple of 4096 up to 64 MiB. Raises FileExistsError and other
        OSErrors; after ENOSPC and EFBIG the empty file is there, for the caller to remove.
        """
    def read(
        self,
        path: _StrOrBytesPath,
        segments: BufferObject,
        *,
        chunk: int,
        crcs: BufferObject | None,
        size: int,
    ) -> ReadStats:
        """Read parts of a file of `size` bytes to where they belong.

        segments: C-contiguous int64 rows (offset, row_bytes, rows, file_stride, address,
            memory_stride): row r is file bytes [offset + r * file_stride, + row_bytes) and goes to
            address + r * memory_stride. Any order; they may overlap in the file, not in memory.
        crcs: little-endian uint32 of every chunk of the file: each chunk that is touched is read
            whole and verified before any of its bytes is copied out. None: nothing is verified.

        Raises ValueError for a file of another size or bad arguments, ChunkError for the first bad
        chunk of those touched (other chunks may have been copied by then), and OSError.
        """
    def start_read(
        self,
        path: _StrOrBytesPath,
        segments: BufferObject,
        *,
        chunk: int,
        crcs: BufferObject | None,
        size: int,
    ) -> FileReader:
        """The same, without waiting: what is wrong with the arguments is raised at once."""
    def checksum(self, path: _StrOrBytesPath, *, chunk: int = 65536) -> tuple[int, int, bytes]:
        """(size, CRC-32C, little-endian uint32 CRC-32C of every chunk) of a whole file."""
    def start_checksum(self, path: _StrOrBytesPath, *, chunk: int = 65536) -> FileChecksum: ...
    def close(self) -> None:
        """Cancel what is under way and end the threads. Idempotent."""
    def __enter__(self) -> Self: ...
    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None: ...

def probe(
    directory: _StrOrBytesPath, *, seconds: float = 1.0, bytes: int = 64 << 20
) -> dict[str, Any]:
    """What the disk under `directory` likes, tried with files of `bytes` that have no name there.

    directory, bytes: as given. trials: a list of dicts, each backend, direct, queue_depth,
    block_bytes, threads, write_gib_s (with preallocation, checksums, fsync), read_gib_s (with
    checksums, not from the cache), and error where it could not be run (the rates are then None);
    no trial begins after `seconds`. choice: the arguments for Engine of the fastest, or the
    defaults where nothing is clearly faster.

    Raises ValueError, and OSError (no such directory, read-only, full).
    """
