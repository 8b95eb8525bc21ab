"""Work that a GPU does while the host launches what is timed. On a CPU there is none.

Apart from timing.py, which the rows of benchmarks on CPUs depend on.
"""

from __future__ import annotations

import math

import torch

_FILL_BYTES = 2**28
# 50 ms on an H200, which 256 samples one by one take to launch, backward too. A device's queue holds about
# 1,000 launches, those of the call with them: more copies would be waited for.
_MOST_FILLING = 400


class Filler:
    """Keeps a CUDA device busy before a timed call, and clears its caches.

    Copies of a buffer that no cache holds. While they run the host launches the call, so that the
    events around it measure the device and not Python; and the call finds its inputs in memory, as
    it would in training. On other devices it does nothing.
    """

    def __init__(self, device: torch.device) -> None:
        self.active = device.type == "cuda"
        if not self.active:
            return
        self._source = torch.randint(256, (_FILL_BYTES,), dtype=torch.uint8, device=device)
        self._target = torch.empty_like(self._source)
        self._target.copy_(self._source)
        torch.cuda.synchronize(device)
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        self._target.copy_(self._source)
        end.record()
        end.synchronize()
        self._seconds = 1e-3 * begin.elapsed_time(end)

    def run(self, seconds: float) -> None:
        """Enqueue copies that take at least `seconds`, at least one and at most _MOST_FILLING."""
        if self.active:
            for _ in range(min(_MOST_FILLING, 1 + math.ceil(seconds / self._seconds))):
                self._target.copy_(self._source)
