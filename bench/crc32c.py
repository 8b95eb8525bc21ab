"""Throughput of CRC-32C beside what bounds it and what it replaces, in one run.

    python bench/crc32c.py [--mebibytes 64] [--repeats 7] [--json]

`memcpy` is the ceiling for anything that has to touch every byte of a buffer larger than the
caches; `zlib.crc32` is the checksum of Python's standard library (another polynomial).
"""

import argparse
import json
import platform
import statistics
import time
import zlib
from collections.abc import Callable, Sequence

import numpy as np

from goku_runtime import _io


def seconds(work: Callable[[], object], repeats: int) -> list[float]:
    """The time of every run, in seconds and ascending, after one run that is not counted."""
    work()
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        work()
        times.append(time.perf_counter() - began)
    return sorted(times)


def measure(size: int, repeats: int) -> list[dict[str, object]]:
    """One row per implementation for a buffer of `size` bytes."""
    data = np.random.default_rng(0).integers(0, 256, size, dtype=np.uint8)
    copy = np.empty_like(data)
    view = data.data
    contenders: dict[str, Callable[[], object]] = {
        "memcpy": lambda: np.copyto(copy, data),
        f"crc32c ({_io.crc32c_implementation()})": lambda: _io.crc32c(view),
        "crc32c (portable)": lambda: _io.crc32c_portable(view),
        "zlib.crc32": lambda: zlib.crc32(view),
    }
    rows: list[dict[str, object]] = []
    for name, work in contenders.items():
        times = seconds(work, repeats)
        rows.append(
            {
                "name": name,
                "bytes": size,
                "gib_per_s": round(size / statistics.median(times) / 2**30, 2),
                "best_gib_per_s": round(size / times[0] / 2**30, 2),
            }
        )
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="CRC-32C against memcpy and zlib.crc32")
    parser.add_argument("--mebibytes", type=int, default=64, help="size of the large buffer")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    options = parser.parse_args(arguments)
    if options.mebibytes < 1 or options.repeats < 1:
        parser.error("--mebibytes and --repeats are 1 or more")
    rows = [
        row
        for size in (256 << 10, options.mebibytes << 20)
        for row in measure(size, options.repeats)
    ]
    if options.json:
        for row in rows:
            print(json.dumps(row | {"machine": platform.machine()}))
        return
    print(f"{'':20} {'KiB':>9} {'GiB/s median':>13} {'best':>7}")
    for row in rows:
        print(
            f"{row['name']:20} {int(str(row['bytes'])) >> 10:9,} "
            f"{row['gib_per_s']:13} {row['best_gib_per_s']:7}"
        )


if __name__ == "__main__":
    main()
