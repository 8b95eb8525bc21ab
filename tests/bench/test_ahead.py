"""Compiling ahead: what one process leaves in Triton's cache, a launch in another takes from it."""

import json
import os
import subprocess
import sys

import pytest
import torch

from bench import ahead, candidates, screening, tune, warm
from bench.harness import ROOT
from goku_kernels.triton import configs

pytest.importorskip("triton")


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


def rows_of(op):
    return [dict(r) for r in configs.table(op) if r["chip"] == 90]


def row_of(op, kernel, size):
    return next(r for r in rows_of(op) if (r["kernel"], r["size"]) == (kernel, size))


LAUNCH = """
import json, sys, torch
from bench import ahead
from bench.absent_gpu import AbsentGpu
from bench import velocity_loss as module
if "other" in sys.argv:
    import goku_kernels.triton.configs as configs
    shipped = configs.table
    configs.table = lambda op: [{**r, "config": {**r["config"], "rows": 16}} for r in shipped(op)]
problem = module.tuning(64, torch.bfloat16, ahead.SMALL)
with ahead.counting() as fresh, AbsentGpu(90) as gpu:
    ahead.run_small(problem, module.function("triton"), True)
print(json.dumps([fresh, [x.kernel for x in gpu.launched]]))
"""


def launch(*words):
    """A launch on an sm_90 that does nothing, in a new process: (compiled now, launched)."""
    done = subprocess.run(
        [sys.executable, "-c", LAUNCH, *words], cwd=ROOT, check=True, capture_output=True, text=True,
        env={**os.environ, "TRITON_INTERPRET": "0"},
    )  # fmt: skip
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
def test_a_launch_takes_what_another_process_compiled(cache):
    op = "velocity_loss"
    row = row_of(op, "backward", 64)
    task = ahead.Compiling(op, 64, "bfloat16", 90, row, dict(row["config"]), tuple(rows_of(op)))
    [first] = ahead.everywhere(ahead.warm_one, [task], screening.crashed, lambda words: None)
    assert (first.error, first.fresh) == ("", 3)
    kernels = ["sums_kernel", "means_kernel", "gradient_kernel"]
    assert launch() == [[], kernels]
    # And it can tell: another configuration is not there.
    assert launch("other") == [kernels, kernels]


@pytest.mark.slow
def test_one_compiled_configuration_says_what_it_needs(cache):
    op, row = "adaln_modulate", row_of("adaln_modulate", "backward", 1024)
    config = {**row["config"], "num_warps": 4, "num_stages": 2}
    task = ahead.Compiling(op, 1024, "bfloat16", 90, row, config, tuple(rows_of(op)))
    found = ahead.compile_one(task)
    assert found.error == ""
    assert (found.threads, found.stack_bytes, found.tensor_core) == (128, 0, "none")
    assert 24 <= found.registers <= 255
    assert found.shared_bytes > 0
    assert found.loop is not None
    assert found.loop.counts["SHFL"] > 0
    # Gradient and tokens in bf16 are read, the gradient of the tokens is written: rows of 2 KiB.
    assert found.work == ahead.Work(4096, 2048, 1, config["programs"])
    made = screening.judged(op, row, config, found)
    assert all(c.forecast is not None and not c.faults for c in made)
    assert {c.config["programs"] for c in made} == {made[0].residency.blocks, made[0].residency.blocks - 1}  # fmt: skip


@pytest.mark.slow
def test_what_does_not_compile_is_an_answer(cache):
    op, row = "velocity_loss", row_of("velocity_loss", "forward", 64)
    config = {**row["config"], "rows": 48}  # a range that is no power of two
    task = ahead.Compiling(op, 64, "bfloat16", 90, row, config, tuple(rows_of(op)))
    assert "CompilationError" in ahead.compile_one(task).error
    made = screening.judged(op, row, config, ahead.compile_one(task))
    assert made[0].faults
    assert screening.best(made, dict(row["config"]), 5) == []


@pytest.mark.slow
def test_a_task_that_ends_its_process_is_found_and_the_others_are_done():
    tasks = ["1 + 1", "__import__('os')._exit(3)", "2 + 2", "'a' * 2", "3 + 3"]
    said = []
    done = ahead.everywhere(eval, tasks, lambda task: f"crashed: {task[:10]}", said.append)
    assert done == [2, "crashed: __import__", 4, "aa", 6]
    assert said[0].startswith("5 compiled in ")


def test_candidates_are_sensible_and_have_the_shipped_one():
    for op in ("adaln_modulate", "qk_norm_rope", "varlen_attention", "velocity_loss"):
        rows = rows_of(op)
        for row in rows:
            size = candidates.judged_size(op, row, rows)
            space = list(candidates.space(op, row, size))
            assert len(space) == len({json.dumps(c, sort_keys=True) for c in space})
            assert all(c.keys() == row["config"].keys() for c in space)
            assert len(space) < 80
            assert dict(row["config"]) in space, (op, row)


def test_rows_are_judged_at_the_widths_of_goku():
    rows = rows_of("adaln_modulate")
    sizes = {r["size"]: candidates.judged_size("adaln_modulate", r, rows) for r in rows
             if r["kernel"] == "forward"}  # fmt: skip
    assert (sizes[2048], sizes[4096], sizes[8192]) == (1792, 3072, 8192)


def test_faults_are_those_of_the_chip():
    row = row_of("varlen_attention", "forward", 64)
    good = ahead.Compiled(registers=128, threads=256, tensor_core="HGMMA", shared_bytes=1000)
    assert screening.faults("varlen_attention", row, good) == []
    for change, words in (
        ({"stack_bytes": 17}, "17 bytes of stack"), ({"tensor_core": "HMMA"}, "matrix"),
        ({"shared_bytes": 232449}, "232449 bytes of shared"),
    ):  # fmt: skip
        bad = ahead.Compiled(**{**vars(good), **change})
        assert words in screening.faults("varlen_attention", row, bad)[0]
    special = row_of("varlen_attention", "forward_specialised", 64)
    assert screening.faults("varlen_attention", special, good) == ["warps are not specialised"]


def test_every_piece_of_warming_is_named_once_and_covers_the_tests():
    works = warm.works(["velocity_loss", "adaln_modulate"], 90)
    assert len({w.name for w in works}) == len(works)
    kinds = {(w.op, w.kind) for w in works}
    assert kinds >= {(op, kind) for op in ("velocity_loss", "adaln_modulate")
                     for kind in ("shipped", "problem", "test")}  # fmt: skip
    assert warm._parameters([("a,b", [(1, 2), (3, 4)]), ("c", [5, 6])]) == [
        {"a": 1, "b": 2, "c": 5}, {"a": 1, "b": 2, "c": 6}, {"a": 3, "b": 4, "c": 5},
        {"a": 3, "b": 4, "c": 6},
    ]  # fmt: skip


@pytest.mark.slow
def test_a_test_of_the_gpu_compiles_what_it_launches(cache):
    index = next(
        i for i, t in enumerate(warm.tests("velocity_loss")) if "forms" in str(t) or i == 0
    )
    done = warm.warm_one(warm.Work("test", "velocity_loss", index, 90))
    assert (done.error, done.fresh > 0) == ("", True)
    assert warm.warm_one(warm.Work("test", "velocity_loss", index, 90)).error == ""
    assert not torch.cuda.is_initialized()


def test_the_tuner_reads_the_files_that_are_shipped():
    for file in tune.FOLDER.glob("*.json"):
        rows = json.loads(file.read_text())["rows"]
        which = screening.chosen(rows, 90, sizes=[64], dtypes=["bfloat16"])
        assert all(rows[i]["size"] == 64 for i in which)
        assert screening.chosen(rows, 90)


def test_rows_of_attention_are_asked_for_what_launches_them():
    """With one backward kernel for all gradients the two others run only where bits must repeat."""
    kernels = ("forward", "delta", "gradient", "gradient_kv", "gradient_q")
    asked = {k: candidates.options("varlen_attention", k) for k in kernels}
    assert [k for k in kernels if asked[k]] == ["gradient_kv", "gradient_q"]
    assert candidates.options("adaln_modulate", "backward") == {}
    row = row_of("varlen_attention", "gradient_kv", 64)
    once = {**row, "kernel": "gradient", "config": {**row["config"], "reduce": 0}}
    space = [list(candidates.space("varlen_attention", r, 64)) for r in (row, once)]
    assert len(space[1]) == 2 * len(space[0])
    assert candidates.function("varlen_attention", "gradient") == "gradient_kv_kernel"
