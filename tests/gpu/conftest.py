"""A test that ends its process, or leaves a GPU that answers nothing, costs itself alone.

After an illegal access CUDA answers every call of the process with that error: the process ends
there. `bench.gpu_tests` gives this a file for notes (GOKU_GPU_NOTES), knows by it which test ended
its process, and runs the tests that have not begun in another one.
"""

import json
import os
import sys
from pathlib import Path

import pytest
import torch

FAULT = 70  # EX_SOFTWARE: the exit code of a process that ended itself for a fault


def notes():
    path = os.environ.get("GOKU_GPU_NOTES")
    return None if path is None else Path(path)


def note(event, test):
    if notes() is not None:
        with notes().open("a", encoding="utf-8") as file:
            file.write(json.dumps([event, test]) + "\n")


def pytest_collection_modifyitems(config, items):
    if notes() is None or not notes().is_file():
        return
    lines = notes().read_text(encoding="utf-8").splitlines()
    begun = {test for _, test in map(json.loads, lines)}
    config.hook.pytest_deselected(items=[item for item in items if item.nodeid in begun])
    items[:] = [item for item in items if item.nodeid not in begun]


def pytest_runtest_logstart(nodeid, location):
    note("begun", nodeid)


def pytest_runtest_logfinish(nodeid, location):
    note("done", nodeid)


def dead():
    """Whether the process's CUDA context answers with an error."""
    if not torch.cuda.is_initialized():
        return False
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    if report.failed:
        note("failed", item.nodeid)
        # Said at once: pytest's summary ends with its process, be it by a later test.
        with item.config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
            print(f"\n{item.nodeid}\n{report.longreprtext}", file=sys.stderr, flush=True)
            if dead():
                print(
                    f"{item.nodeid}: the GPU answers nothing after it", file=sys.stderr, flush=True
                )
                os._exit(FAULT)
    return report
