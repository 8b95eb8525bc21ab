"""Runs functions of a script in real processes of one process group; a command of its own.

    launch.py WORLD STORE SCRIPT BACKEND TIMEOUT FUNCTION[:JSON] ...

torch and SCRIPT are imported once, then WORLD ranks are forked: start-up is most of what such a test
takes. Every rank joins a group of BACKEND ("gloo", or "none" for no group at all), calls each
FUNCTION(rank, world, **JSON) in turn and ends with code 0; a failed assert, like any exception, is
code 1 with its traceback. The exit codes of all ranks are printed as the last line, and the command
fails unless all are 0.
"""

from __future__ import annotations

import ctypes
import importlib.util
import json
import os
import signal
import sys
import traceback
from datetime import timedelta
from types import ModuleType

import torch
import torch.distributed as dist


def die_with_parent() -> None:
    """No orphans: whoever kills pytest kills these processes, too."""
    set_parent_death_signal = 1
    ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL)


def load(path: str) -> ModuleType:
    """The script as a module."""
    spec = importlib.util.spec_from_file_location("processes", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["processes"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def fork_rank(rank: int, world: int, script: ModuleType) -> int:
    """Fork one rank; its process id."""
    store, backend, timeout = sys.argv[2], sys.argv[4], float(sys.argv[5])
    sys.stdout.flush()
    child = os.fork()
    if child:
        return child
    die_with_parent()
    code = 1
    try:
        if backend != "none":
            dist.init_process_group(
                backend, init_method=f"file://{store}", rank=rank, world_size=world,
                timeout=timedelta(seconds=timeout),
            )  # fmt: skip
        for call in sys.argv[6:]:
            name, _, arguments = call.partition(":")
            getattr(script, name)(rank, world, **json.loads(arguments or "{}"))
            print(f"{name}: rank {rank} is done", flush=True)
        if dist.is_initialized():
            dist.destroy_process_group()
        code = 0
    except BaseException:
        traceback.print_exc()
        raise
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def main() -> None:
    die_with_parent()
    torch.set_num_threads(1)
    world = int(sys.argv[1])
    script = load(sys.argv[3])
    children = [fork_rank(rank, world, script) for rank in range(world)]
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    print(f"exit codes: {codes}", flush=True)
    sys.exit(1 if any(codes) else 0)


if __name__ == "__main__":
    main()
