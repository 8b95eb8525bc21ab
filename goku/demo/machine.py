"""On what the demo ran: versions and the processor, for its pages."""

from __future__ import annotations

import os
import platform
from pathlib import Path

import torch

__all__ = ["environment"]


def environment() -> dict[str, str]:
    """Names and values, in the order of a table."""
    return {
        "torch": torch.__version__,
        "Python": platform.python_version(),
        "CPU": _cpu_name(),
        "threads": str(torch.get_num_threads()),
        "cores": str(os.cpu_count()),
    }


def _cpu_name() -> str:
    path = Path("/proc/cpuinfo")
    if path.exists():
        for line in path.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
