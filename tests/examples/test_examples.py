"""The examples train as the unparallelised model does, and refuse what they cannot run."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

HERE = Path(__file__).parent
EXAMPLES = HERE.parents[1] / "examples"

needs_deepspeed = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None,
    reason="deepspeed is not installed: pip install goku[dev]",
)
needs_accelerate = pytest.mark.skipif(
    importlib.util.find_spec("accelerate") is None,
    reason="accelerate is not installed: pip install goku[dev]",
)


@pytest.fixture(autouse=True)
def importable(monkeypatch):
    """The examples, and what the scripts here share, for the processes that run_processes starts."""
    for folder in (EXAMPLES, HERE):
        monkeypatch.syspath_prepend(str(folder))
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")


def compare(degrees, **more):
    return "compare", {"degrees": degrees, **more}


def test_plain_loop(run_processes):
    # Five heads on two and on four ranks: uneven.
    run_processes(
        4,
        HERE / "plain_loop_processes.py",
        *map(compare, ([1, 4, 1], [1, 2, 2], [2, 1, 2], [1, 1, 4])),
    )


@pytest.mark.long
def test_transformers_model(run_processes):
    # Six query heads on two key heads; on four ranks uneven, with replicated key heads.
    run_processes(
        4,
        HERE / "transformers_model_processes.py",
        compare([1, 2, 2], recompute=True),
        compare([1, 1, 4]),
        compare([2, 1, 2], llama=True),
        "refuse",
    )


def test_diffusers_wan(run_processes):
    run_processes(
        4,
        HERE / "diffusers_wan_processes.py",
        compare([1, 2, 2], recompute=True),
        compare([1, 1, 4]),
        "times_of_tokens",
    )


@pytest.mark.long
@needs_deepspeed
def test_deepspeed_zero(run_processes):
    run_processes(
        4,
        HERE / "deepspeed_zero_processes.py",
        *(
            compare([1, -1, sp], stage=stage, told=told)
            for told, sp in (("world", 2), ("world", 4), ("mpu", 2))
            for stage in (1, 2, 3)
        ),
        "wrong_scale",
    )


@pytest.mark.long
@pytest.mark.slow
def test_checkpoint_fsdp2(run_processes, tmp_path):
    """Interrupted after 4 and 6 of 8 steps, to go on with other processes and with as many."""

    def train(world, *runs):
        calls = [
            ("train", {"out": str(tmp_path / name), "start": start, "steps": steps})
            for name, start, steps in runs
        ]
        run_processes(world, HERE / "checkpoint_fsdp2_processes.py", *calls)

    train(4, ("changing", 0, 4))
    train(2, ("changing", 4, 6), ("two", 0, 8), ("again", 0, 4), ("again", 4, 8))
    train(1, ("changing", 6, 8), ("one", 0, 8))
    found = {
        out.name: json.loads((out / "losses.json").read_text())
        for out in tmp_path.iterdir()
        if out.is_dir()
    }
    assert found["again"] == found["two"]  # to the bit
    # fp64; the order of sums differs, as in plain_loop_processes.
    assert found["changing"] == pytest.approx(found["one"], rel=1e-10)
    assert found["one"][-1] < found["one"][0]
    assert sorted(path.name for path in (tmp_path / "one").glob("step_*")) == ["step_6", "step_8"]


@pytest.mark.long
@needs_deepspeed
@pytest.mark.slow
def test_checkpoint_deepspeed(run_processes, tmp_path):
    run_processes(
        2,
        HERE / "checkpoint_deepspeed_processes.py",
        *(("resume", {"out": str(tmp_path), "stage": stage}) for stage in (1, 2, 3)),
        ("refuse", {"out": str(tmp_path)}),
    )


@needs_accelerate
@pytest.mark.slow
@pytest.mark.parametrize("world", [1, pytest.param(2, marks=pytest.mark.long)])
def test_checkpoint_trainer(run_processes, tmp_path, world):
    script = HERE / "checkpoint_trainer_processes.py"
    run_processes(world, script, ("resume", {"out": str(tmp_path)}))


class OnTheirGenerator(TorchDispatchMode):
    """Numbers are drawn on the device of the generator that is given: on another one CUDA refuses."""

    def __init__(self):
        super().__init__()
        self.draws = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        generator = (kwargs or {}).get("generator")
        if generator is not None:
            self.draws += 1
            assert out.device.type == generator.device.type, func
        return out


@pytest.mark.parametrize(
    ("example", "data"),
    [
        ("packed_transformer", lambda example: example.packs_of_step(1)),
        ("checkpoint_fsdp2", lambda example: example.samples_of(1)),
        # Importing transformers and diffusers takes ten seconds.
        pytest.param(
            "transformers_model",
            lambda example: example.packs_of_step(1, 64),
            marks=pytest.mark.long,
        ),
        pytest.param(
            "diffusers_wan",
            lambda example: example.videos_of_step(1, range(2)),
            marks=pytest.mark.long,
        ),
    ],
)
def test_data_are_drawn_whatever_the_default_device(example, data, monkeypatch):
    """The examples' commands make a GPU the default device: a device without values stands for it."""
    monkeypatch.setattr(dist, "get_rank", lambda: 0)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    module = importlib.import_module(example)
    with torch.device("meta"), OnTheirGenerator() as mode:
        data(module)
    assert mode.draws


def run(*command, **environment):
    return subprocess.run(
        [sys.executable, *map(str, command)],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )


@pytest.mark.long
def test_torchrun():
    degrees = ("--sp", "2", "--steps", "2")
    done = run(
        "-m", "torch.distributed.run", "--nproc-per-node", "2", "--rdzv-backend", "c10d",
        "--rdzv-endpoint", "localhost:0", EXAMPLES / "plain_loop.py", *degrees,
        GLOO_SOCKET_IFNAME="lo", CUDA_VISIBLE_DEVICES="",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    steps = re.findall(r"^step (\d): loss [\d.]+, gradient norm [\d.]+$", done.stdout, re.MULTILINE)
    assert steps == ["0", "1"], done.stdout  # one rank prints


@pytest.mark.long
@pytest.mark.slow
def test_torchrun_resumes(tmp_path):
    losses = {}
    for processes, steps in ((2, 2), (1, 4)):
        done = run(
            "-m", "torch.distributed.run", "--nproc-per-node", processes, "--rdzv-backend", "c10d",
            "--rdzv-endpoint", "localhost:0", EXAMPLES / "checkpoint_fsdp2.py", "--steps", steps,
            "--out", tmp_path, GLOO_SOCKET_IFNAME="lo", CUDA_VISIBLE_DEVICES="",
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        losses[processes] = re.findall(r"^step (\d): loss [\d.]+$", done.stdout, re.MULTILINE)
    assert losses == {2: ["0", "1"], 1: ["2", "3"]}


@pytest.mark.parametrize(
    ("command", "option"),
    [
        ("plain_loop", "--sp"),
        pytest.param("checkpoint_fsdp2", "--every", marks=pytest.mark.long),
        pytest.param("deepspeed_zero", "--sp", marks=needs_deepspeed),
        pytest.param("checkpoint_deepspeed", "--stage", marks=[needs_deepspeed, pytest.mark.long]),
        pytest.param("checkpoint_trainer", "--out", marks=[needs_accelerate, pytest.mark.long]),
    ],
)
def test_help(command, option):
    done = run(EXAMPLES / f"{command}.py", "--help")
    assert done.returncode == 0, done.stderr
    assert f"examples/{command}.py" in done.stdout
    assert "torchrun" in done.stdout
    assert option in done.stdout


# Three processes, of which none are started: bad options are found before a group is joined.
WORLD = {"WORLD_SIZE": "3", "RANK": "0", "LOCAL_RANK": "0"}


@pytest.mark.parametrize(
    ("command", "options", "environment", "message"),
    [
        ("plain_loop", ["--sp", "2"], WORLD, "does not divide the 3 processes"),
        ("plain_loop", [], {}, "torchrun"),
        # Importing transformers and diffusers takes ten seconds.
        pytest.param(
            "transformers_model",
            ["--dp-shard", "0"],
            WORLD,
            "dp_shard is 0",
            marks=pytest.mark.long,
        ),
        pytest.param("diffusers_wan", [], WORLD, "3 data-parallel groups", marks=pytest.mark.long),
        pytest.param("deepspeed_zero", ["--stage", "4"], WORLD, "--stage", marks=needs_deepspeed),
    ],
)
def test_bad_options(command, options, environment, message):
    done = run(EXAMPLES / f"{command}.py", *options, **environment)
    assert done.returncode == 2, done.stderr
    assert message in done.stderr.splitlines()[-1], done.stderr
