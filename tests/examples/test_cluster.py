"""The scripts for clusters: what the batch script does when tasks end in every way; the Job's numbers agree.

Slurm itself is not there: `srun` is a stand-in that starts tasks and ends all when one fails, as Slurm does.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

FOLDER = Path(__file__).parents[2] / "examples" / "cluster"

SRUN = """#!/usr/bin/env python3
import os, signal, subprocess, sys, time
arguments = sys.argv[1:]
assert arguments.pop(0) == "--kill-on-bad-exit=1"
tasks = []
for rank in range(4):
    numbers = {"SLURM_PROCID": str(rank), "SLURM_NTASKS": "4", "SLURM_LOCALID": str(rank % 2)}
    tasks.append(subprocess.Popen(arguments, env=os.environ | numbers, start_new_session=True))
with open("step.part", "w") as file:
    file.write(" ".join(str(task.pid) for task in tasks))
os.rename("step.part", "step")
while any(task.poll() is None for task in tasks):
    if any(task.poll() for task in tasks):
        for task in tasks:
            if task.poll() is None:
                os.killpg(task.pid, signal.SIGKILL)
    time.sleep(0.02)
codes = [task.returncode if task.returncode >= 0 else 128 - task.returncode for task in tasks]
sys.exit(max(codes))
"""

SCONTROL = """#!/bin/bash
if [ "$1" = show ]; then printf 'first\\nsecond\\n'; else echo "$@" >> requeued; fi
"""

# To every process of the step, as Slurm signals them.
SCANCEL = """#!/bin/bash
[ "$*" = "--signal=TERM 7" ] || exit 1
for task in $(cat step); do kill -TERM -- -"$task"; done
"""

GOKU = """#!/bin/bash
line=$(printf '%s|' $RANK $WORLD_SIZE $LOCAL_RANK $MASTER_ADDR $MASTER_PORT "$@")
echo "$line" >> calls.$RANK
{body}
"""


@pytest.fixture
def job(tmp_path: Path) -> Callable[..., subprocess.Popen[str]]:
    """job(body of `goku`, **environment): the batch script as Slurm starts it, with 4 tasks on 2 nodes."""
    tools = tmp_path / "bin"
    tools.mkdir()

    def run(body: str, **environment: str) -> subprocess.Popen[str]:
        given = {"srun": SRUN, "scontrol": SCONTROL, "scancel": SCANCEL}
        for name, text in (given | {"goku": GOKU.format(body=body)}).items():
            (tools / name).write_text(text)
            (tools / name).chmod(0o755)
        slurm = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n[0-1]"}
        return subprocess.Popen(
            ["bash", FOLDER / "train.sbatch", "run.yaml", "text=two words"],
            env=os.environ | slurm | {"PATH": f"{tools}:{os.environ['PATH']}"} | environment,
            cwd=tmp_path, text=True, stderr=subprocess.PIPE,
        )  # fmt: skip

    return run


def _calls(folder: Path) -> list[list[str]]:
    lines = [line for file in folder.glob("calls.*") for line in file.read_text().splitlines()]
    return sorted(line.split("|")[:-1] for line in lines)


def test_tasks_are_ranks(job: Callable[..., subprocess.Popen[str]], tmp_path: Path) -> None:
    script = job("exit 0")
    assert script.wait(60) == 0
    wanted = ["train", "--stopped-exit-code", "75", "run.yaml", "text=two words"]
    assert not list(tmp_path.glob("goku-*"))
    assert _calls(tmp_path) == [
        [str(rank), "4", str(rank % 2), "first", "20070", *wanted] for rank in range(4)
    ]


def test_bad_input_is_not_tried_again(
    job: Callable[..., subprocess.Popen[str]], tmp_path: Path
) -> None:
    """The first to notice it ends, and so all others are killed."""
    script = job("if [ $RANK = 0 ]; then exit 2; fi\nsleep 600")
    assert script.wait(60) == 2
    assert {call[4] for call in _calls(tmp_path)} == {"20070"}  # once
    assert not list(tmp_path.glob("goku-*"))


def test_what_dies_goes_on(job: Callable[..., subprocess.Popen[str]], tmp_path: Path) -> None:
    """All others wait for it, and would for ever."""
    script = job(
        "if [ -e again ]; then exit 0; fi\n"
        "if [ $RANK = 1 ]; then\n"
        "  while [ $(cat calls.* | wc -l) -lt 4 ]; do sleep 0.02; done\n"
        "  touch again; kill -9 $$\n"
        "fi\n"
        "sleep 600"
    )
    assert script.wait(60) == 0
    assert script.stderr is not None
    assert "goku: exit code 137: goes on from the last checkpoint\n" in script.stderr.read()
    ports = [call[4] for call in _calls(tmp_path)]
    assert sorted(ports) == ["20070"] * 4 + ["20071"] * 4


def test_what_fails_again_and_again_is_given_up(
    job: Callable[..., subprocess.Popen[str]], tmp_path: Path
) -> None:
    script = job("if [ $RANK = 0 ]; then exit 1; fi\nsleep 600", GOKU_RESTARTS="2")
    assert script.wait(60) == 137  # of those that it takes along
    assert script.stderr is not None
    assert script.stderr.read().endswith("goku: exit code 137 after 2 restarts: given up\n")
    assert {call[4] for call in _calls(tmp_path)} == {"20070", "20071", "20072"}


def _wait_for_tasks(folder: Path) -> None:
    end = time.monotonic() + 30
    while len(list(folder.glob("ready.*"))) < 4 or not (folder / "step").exists():
        assert time.monotonic() < end
        time.sleep(0.05)


OBEDIENT = (
    "trap 'sleep 1; touch written.$RANK; exit 75' TERM\n"
    "touch ready.$RANK\n"
    "while true; do sleep 0.05; done"
)


@pytest.mark.parametrize("by_script", [True, False])
def test_a_stop_is_obeyed_and_the_job_begins_again(
    job: Callable[..., subprocess.Popen[str]], tmp_path: Path, by_script: bool
) -> None:
    """Nearly out of time, or told by somebody: a checkpoint is written to its end."""
    script = job(OBEDIENT)
    _wait_for_tasks(tmp_path)
    if by_script:
        script.send_signal(signal.SIGUSR1)
    else:
        subprocess.run(["bash", tmp_path / "bin" / "scancel", "--signal=TERM", "7"], cwd=tmp_path)
    assert script.wait(60) == 0
    assert len(list(tmp_path.glob("written.*"))) == 4
    assert (tmp_path / "requeued").read_text() == "requeue 7\n"
    assert len(_calls(tmp_path)) == 4
    assert not list(tmp_path.glob("goku-*"))


def test_what_is_left_of_another_time_says_nothing(
    job: Callable[..., subprocess.Popen[str]], tmp_path: Path
) -> None:
    """A job that is queued again keeps its number and its folder."""
    for name in ("refused", "stopped"):
        (tmp_path / f"goku-7.{name}").touch()
    assert job("exit 0").wait(60) == 0
    assert not (tmp_path / "requeued").exists()


def test_a_time_that_is_too_short_is_no_loop(
    job: Callable[..., subprocess.Popen[str]], tmp_path: Path
) -> None:
    """Its end is near from the beginning: nothing would ever be trained."""
    script = job(
        "touch ready.$RANK\nexec sleep 600"
    )  # as before the first step: the signal ends it
    _wait_for_tasks(tmp_path)
    script.send_signal(signal.SIGUSR1)
    assert script.wait(60) == 1
    assert not (tmp_path / "requeued").exists()


def test_the_batch_script_is_clean() -> None:
    shellcheck = shutil.which("shellcheck")
    if shellcheck is None:
        pytest.skip("shellcheck is not installed")
    subprocess.run([shellcheck, FOLDER / "train.sbatch"], check=True)


def test_the_numbers_of_the_job_agree() -> None:
    service, job = yaml.safe_load_all((FOLDER / "job.yaml").read_text())
    spec = job["spec"]
    pod = spec["template"]["spec"]
    (container,) = pod["containers"]
    options = dict(
        word.removeprefix("--").split("=")
        for word in container["command"]
        if "=" in word and word.startswith("--")
    )
    assert int(options["nnodes"]) == spec["completions"] == spec["parallelism"]
    assert int(options["nproc-per-node"]) == container["resources"]["limits"]["nvidia.com/gpu"]
    # The first pod's name, by which all find it.
    name = f"{job['metadata']['name']}-0.{service['metadata']['name']}"
    assert options["rdzv-endpoint"].startswith(f"{name}:")
    assert pod["subdomain"] == service["metadata"]["name"]
    assert service["spec"]["selector"] == spec["template"]["metadata"]["labels"]
    grace = {each["name"]: each["value"] for each in container["env"]}[
        "TORCH_ELASTIC_SHUTDOWN_TIMEOUT"
    ]
    assert int(grace) < pod["terminationGracePeriodSeconds"]
    # A stop is no success: the others would be done, and the pod that comes anew alone.
    words = container["command"]
    assert int(words[words.index("--stopped-exit-code") + 1]) != 0
    # With the first pod's store all others end.
    assert spec["backoffLimit"] >= 4 * spec["completions"]
    assert pod["restartPolicy"] == "Never"  # podFailurePolicy asks for it
