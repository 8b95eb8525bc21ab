"""Runs functions of a script in real processes of one process group; a command of its own.

    launch.py WORLD STORE SCRIPT BACKEND TIMEOUT FUNCTION[:JSON] ...
    launch.py --serve

torch and SCRIPT are imported once, then WORLD ranks are forked: start-up is most of what such a test
takes. Every rank joins a group of BACKEND ("gloo", or "none" for no group at all), calls each
FUNCTION(rank, world, **JSON) in turn and ends with code 0; a failed assert, like any exception, is
code 1 with its traceback. The exit codes of all ranks are printed as the last line, and the command
fails unless all are 0.

--serve: torch is imported once for many runs. Each line of standard input is a JSON object of a run, {arguments,
environment, path: of Python, folder: to run in, output: file for all that the run prints}; the id of its process, which
leads a session of its own, is answered when it begins and again when it has ended. Runs of one server have one seed of
`hash`, and what torch reads of the environment when it is imported is the first run's: what is about those needs a
process of its own.
"""

from __future__ import annotations

import ctypes
import gc
import importlib
import importlib.util
import json
import os
import random
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from types import ModuleType
from typing import Any

import numpy
import torch
import torch.distributed as dist

# What scripts import of others' packages, a second and a half of torch's: `--serve` imports it ahead. Nothing of
# this project, whose modules may differ from run to run and must not know each other.
AHEAD = (
    "pytest", "torch.distributed.checkpoint", "torch.distributed.checkpoint.state_dict",
    "torch._dynamo", "torch.distributed.fsdp", "torch.distributed.tensor", "torch.utils.checkpoint",
)  # fmt: skip


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


def fork(work: Callable[[], object]) -> int:
    """Fork a process that does it and ends with code 0, or 1 where it raises; the process's id."""
    sys.stdout.flush()
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        die_with_parent()
        work()
        code = 0
    except BaseException:
        traceback.print_exc()
        raise
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def work_of(rank: int, script: ModuleType, arguments: list[str]) -> None:
    """All calls of one rank."""
    world, store, backend, timeout = int(arguments[0]), *arguments[1:4:2], float(arguments[4])
    if backend != "none":
        dist.init_process_group(
            backend, init_method=f"file://{store}", rank=rank, world_size=world,
            timeout=timedelta(seconds=timeout),
        )  # fmt: skip
    for call in arguments[5:]:
        name, _, given = call.partition(":")
        getattr(script, name)(rank, world, **json.loads(given or "{}"))
        # One write, since the ranks share the file.
        print(f"{call}: rank {rank} is done\n", end="", flush=True)
    if dist.is_initialized():
        dist.destroy_process_group()


def run(arguments: list[str]) -> int:
    """One run; its exit code."""
    script = load(arguments[2])
    ranks = range(int(arguments[0]))
    children = [fork(partial(work_of, rank, script, arguments)) for rank in ranks]
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    print(f"exit codes: {codes}", flush=True)
    return 1 if any(codes) else 0


def as_new(request: dict[str, Any]) -> None:
    """One run, in a process as it would have been begun for it."""
    os.setsid()
    output = os.open(request["output"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    nothing = os.open(os.devnull, os.O_RDONLY)
    for target, source in enumerate((nothing, output, output)):
        os.dup2(source, target)
    os.close(nothing)
    os.close(output)
    os.environ.clear()
    os.environ |= request["environment"]
    sys.argv[:] = [sys.argv[0], *request["arguments"]]
    sys.path[:] = request["path"]
    tempfile.tempdir = None
    random.seed()
    numpy.random.seed()
    os.chdir(request["folder"])
    run(request["arguments"])


def serve() -> None:
    """Run what is asked for on standard input, one run after another, until it ends."""
    for module in AHEAD:
        importlib.import_module(module)
    gc.freeze()  # or every run's first collection would copy all that was imported
    for line in sys.stdin:
        child = fork(partial(as_new, json.loads(line)))
        print(child, flush=True)
        os.waitpid(child, 0)
        print(child, flush=True)


def main() -> None:
    die_with_parent()
    torch.set_num_threads(1)
    if sys.argv[1:] == ["--serve"]:
        serve()
    else:
        sys.exit(run(sys.argv[1:]))


if __name__ == "__main__":
    main()
