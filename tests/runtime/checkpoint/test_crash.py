"""A crash at any moment of a sequence of saves: the newest committed checkpoint loads, nothing looks whole that
is not.

A log of real saves is cut after each of its operations, and of what was not yet durable anything may be missing
(`power_loss` says what). Each tree that can be left is built and used as a job would that starts again. That
this finds holes is shown by leaving single fsyncs out.
"""

from __future__ import annotations

import base64
import json
import os
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from goku_runtime.checkpoint import (
    Checkpointer,
    CheckpointOptions,
    Retention,
    latest,
    load,
    prune,
    save,
    set_latest,
    verify,
)
from goku_runtime.checkpoint import directory as directory_module
from goku_runtime.checkpoint.directory import remove_leftovers
from goku_runtime.checkpoint.journal import Operation

sys.path.insert(0, str(Path(__file__).parent))
from power_loss import Disk, Recorder, Step, digest, fates, put, without

# Small blocks: a data file of 110 KB is written in pieces that can be lost one by one.
OPTIONS = CheckpointOptions(block_bytes=65536)
QUICK = CheckpointOptions(fsync=False)
NUMBERS = 27_000


def state_of(step: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(step)
    return {
        "w": torch.randn(NUMBERS, generator=generator),
        "b": torch.full((5,), step),
        "step": step,
    }


def step_in(path: Path) -> int:
    """Loads a checkpoint and sees that all of it is of one step."""
    state = {"w": torch.zeros(NUMBERS), "b": torch.zeros(5, dtype=torch.int64), "step": -1}
    load(state, path)
    step = int(state["step"])
    wanted = state_of(step)
    assert torch.equal(state["w"], wanted["w"])
    assert torch.equal(state["b"], wanted["b"])
    return step


@dataclass
class Story:
    """Saves that were made in a directory, and what was asked of the file system meanwhile.

    Attributes:
        base: the directory that all of it lies in; `root` of checkpoints in it, by its name.
        commits: (monotonic ns, step): from then on that step is the one to go on from.
    """

    base: Path
    root: str = "run/checkpoints"
    recorder: Recorder = field(default_factory=Recorder)
    commits: list[tuple[int, int]] = field(default_factory=list)

    def commit(self, step: int) -> None:
        self.commits.append((time.monotonic_ns(), step))

    @property
    def path(self) -> Path:
        return self.base / self.root


def with_the_pointer(story: Story) -> None:
    """As a trainer saves: `latest` and retention with every save, one of them again, one behind its back."""
    root, keep = story.path, Retention(1)
    with Checkpointer(options=OPTIONS, journal=story.recorder) as saving:
        saving.save(state_of(1), root / "a", latest=True)
        story.commit(1)
        saving.save(state_of(2), root / "b", latest=True, retention=keep)
        story.commit(2)
        saving.save(state_of(3), root / "b", overwrite=True, latest=True)
        story.commit(3)
        saving.async_save(state_of(4), root / "c", latest=True, retention=keep).result()
        story.commit(4)
        saving.save(state_of(5), root / "d")
    set_latest(root, "d", journal=story.recorder)
    story.commit(5)
    prune(root, 1, journal=story.recorder)


def without_the_pointer(story: Story) -> None:
    """The newest complete one counts."""
    root = story.path
    with Checkpointer(options=OPTIONS, journal=story.recorder) as saving:
        for step, name in ((1, "a"), (2, "b"), (3, "b")):
            saving.save(state_of(step), root / name, overwrite=True)
            story.commit(step)
        saving.async_save(state_of(4), root / "c", retention=Retention(1)).result()
        story.commit(4)


STORIES: dict[str, tuple[Callable[[Story], None], bool]] = {
    "pointer": (with_the_pointer, True),
    "no pointer": (without_the_pointer, True),
    "no exchange": (with_the_pointer, False),
    "no pointer, no exchange": (without_the_pointer, False),
}


@pytest.fixture
def scratch() -> Iterator[Path]:
    """In memory where there is such a file system: thousands of trees are made and removed."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if os.access(memory, os.W_OK) else None) as path:
        yield Path(path)


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Story]:
    """Each story, told once."""
    stories: dict[str, Story] = {}

    def tell(name: str) -> Story:
        if name not in stories:
            story = Story(tmp_path_factory.mktemp("story"))
            tells, exchange = STORIES[name]
            with pytest.MonkeyPatch.context() as patch:
                if not exchange:
                    patch.setattr(directory_module, "_exchange", lambda left, right: False)
                tells(story)
            stories[name] = story
        return stories[name]

    return tell


def expected(story: Story, steps: Sequence[Step], cut: int) -> set[int | None]:
    """What may be found after a crash: the newest committed, or the one being committed."""
    # The crash comes after the operation before the cut; at the latest when the next one begins.
    end = steps[cut].operation.begin_ns if cut < len(steps) else time.monotonic_ns()
    done = sum(at <= end for at, _ in story.commits)
    before = story.commits[done - 1][1] if done else None
    after = story.commits[done][1] if done < len(story.commits) else before
    return {before, after}


class Restart:
    """A job that starts again in what a crash has left, in a scratch directory."""

    def __init__(self, scratch: Path, root: str) -> None:
        self.scratch, self.root = scratch, root
        self.seen: set[tuple[bytes, frozenset[int | None]]] = set()

    def check(self, tree: Any, allowed: set[int | None]) -> None:
        key = (digest(tree), frozenset(allowed))
        if key in self.seen:
            return
        self.seen.add(key)
        base = self.scratch / "tree"
        put(tree, base)
        try:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(os, "fsync", lambda descriptor: None)  # no power fails in here
                self._check(base / self.root, allowed)
        finally:
            shutil.rmtree(base)

    def _check(self, root: Path, allowed: set[int | None]) -> None:
        found = latest(root)
        step = None if found is None else step_in(found)
        assert step in allowed, f"found {step}; allowed: {allowed}"
        for path in list(root.iterdir()) if root.is_dir() else []:
            if not path.name.startswith(".") and path.name != "latest":
                verify(path)
        save(state_of(9), root / "c", overwrite=True, latest=True, options=QUICK)
        names = sorted(path.name for path in root.iterdir())
        assert not [name for name in names if name.startswith(".")], names
        assert latest(root) == root / "c"


def crashes(
    disk: Disk, steps: Sequence[Step], draw: random.Random, samples: int
) -> Iterator[tuple[int, Any]]:
    """(cut, tree): what crashes after each operation can leave."""
    for cut in range(len(steps) + 1):
        for fate in fates(draw, samples):
            yield cut, disk.left(fate)
        if cut < len(steps):
            disk.apply(steps[cut])


def run(story: Story, steps: Sequence[Step], scratch: Path, samples: int, seed: int) -> int:
    """Crashes everywhere; returns how many different trees there were."""
    restart = Restart(scratch, story.root)
    draw = random.Random(seed)
    for cut, tree in crashes(Disk(story.base), steps, draw, samples):
        allowed = expected(story, steps, cut)
        try:
            restart.check(tree, allowed)
        except (AssertionError, ValueError, OSError) as error:
            last = steps[cut - 1].operation if cut else None
            raise AssertionError(
                f"crash after {cut} operations, the last {last}: {error}"
            ) from error
    return len(restart.seen)


@pytest.mark.parametrize("name", STORIES)
def test_a_crash_after_every_operation(
    told: Callable[[str], Story], scratch: Path, name: str
) -> None:
    story = told(name)
    trees = run(story, story.recorder.steps, scratch, samples=2, seed=0)
    print(f"{trees} different trees")
    assert trees > 100


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.parametrize("name", STORIES)
def test_many_crashes(told: Callable[[str], Story], scratch: Path, name: str) -> None:
    story = told(name)
    trees = run(story, story.recorder.steps, scratch, samples=40, seed=1)
    print(f"{trees} different trees")
    assert trees > 500


# ---- killed, started again, and then the power fails ----


def again(story: Story, steps: Sequence[Step], cut: int, scratch: Path) -> tuple[Disk, Story]:
    """A process is killed at a cut and a new one saves; the disk at the kill, and the new story."""
    disk = Disk(story.base)
    for step in steps[:cut]:
        disk.apply(step)
    (kill, *_) = fates(random.Random(0), 0)
    following = Story(scratch / "again", story.root)
    put(disk.left(kill), following.base)
    if following.path.is_dir():  # as `latest` does, which keeps no log
        remove_leftovers(following.path, following.recorder)
    found = latest(following.path)
    if found is not None:
        following.commit(step_in(found))
    with Checkpointer(options=OPTIONS, journal=following.recorder) as saving:
        saving.save(state_of(8), following.path / "b", overwrite=True, latest=True,
                    retention=Retention(1))  # fmt: skip
    following.commit(8)
    return disk.copy(following.base), following


def run_again(
    story: Story, scratch: Path, cuts: Iterable[int], samples: int, *, careless: bool = False
) -> int:
    """Kills at each cut, then crashes everywhere; returns how many different trees there were."""
    steps = story.recorder.steps
    trees = 0
    for cut in cuts:
        shutil.rmtree(scratch / "again", ignore_errors=True)
        disk, following = again(story, steps, cut, scratch)
        restart = Restart(scratch, story.root)
        later = following.recorder.steps
        if careless:
            later = without_the_sweeps_sync(later, following.path)
        for at, tree in crashes(disk, later, random.Random(cut), samples):
            # Before the new process has made it durable, what the killed one had not may be lost.
            allowed = expected(following, later, at) | expected(story, steps, cut)
            if at == len(later):
                allowed = {8}
            try:
                restart.check(tree, allowed)
            except (AssertionError, ValueError, OSError) as error:
                killed = steps[cut - 1].operation if cut else None
                last = later[at - 1].operation if at else None
                raise AssertionError(f"killed after {killed}, then {last}: {error}") from error
        trees += len(restart.seen)
    return trees


@pytest.mark.parametrize("name", STORIES)
def test_killed_and_then_a_power_failure(
    told: Callable[[str], Story], scratch: Path, name: str
) -> None:
    story = told(name)
    trees = run_again(story, scratch, range(0, len(story.recorder.steps) + 1, 16), samples=0)
    assert trees > 100


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.parametrize("name", STORIES)
def test_killed_anywhere_and_then_a_power_failure(
    told: Callable[[str], Story], scratch: Path, name: str
) -> None:
    story = told(name)
    trees = run_again(story, scratch, range(0, len(story.recorder.steps) + 1, 6), samples=1)
    print(f"{trees} different trees")
    assert trees > 500


# ---- the holes that this would find ----


@pytest.mark.parametrize(
    ("story", "kind", "part"),
    [
        ("pointer", "fsync", ".distcp"),
        ("pointer", "fsync", ".crc"),
        ("pointer", "fsync", "manifest.json"),
        ("pointer", "fsync", "index.json"),
        ("pointer", "fsync_directory", ".saving-"),
        ("pointer", "fsync_directory", "checkpoints"),
        ("no pointer", "fsync_directory", "checkpoints"),
        ("pointer", "fsync_directory", "run"),
        ("pointer", "fsync_directory", "story"),
    ],
)
def test_a_missing_fsync_is_found(
    told: Callable[[str], Story], scratch: Path, story: str, kind: str, part: str
) -> None:
    steps = without(told(story).recorder.steps, kind, part)
    with pytest.raises(AssertionError, match="crash after"):
        run(told(story), steps, scratch, samples=4, seed=0)


def without_the_sweeps_sync(steps: Sequence[Step], root: Path) -> list[Step]:
    """Without what is made durable before leftovers are deleted: that comes before any mkdir."""
    first = next(n for n, step in enumerate(steps) if step.operation.kind == "mkdir")
    return [
        step for n, step in enumerate(steps)
        if n > first or (step.operation.kind, step.operation.path) != ("fsync_directory", str(root))
    ]  # fmt: skip


@pytest.mark.parametrize(("kind", "to"), [("exchange", "b"), ("rename", ".a.removing-")])
def test_a_sweep_that_deletes_what_may_come_back_is_found(
    told: Callable[[str], Story], scratch: Path, kind: str, to: str
) -> None:
    """A killed process has renamed a directory; the next one must not just delete what is left of it."""
    story = told("pointer")
    cuts = [
        number
        for number, (operation, _) in enumerate(story.recorder.steps, start=1)
        if operation.kind == kind and Path(operation.other).name.startswith(to)
    ]
    assert len(cuts) == 1
    with pytest.raises(AssertionError, match="killed after"):
        run_again(story, scratch, cuts, samples=8, careless=True)
    run_again(story, scratch, cuts, samples=8)


# ---- two ranks ----


@pytest.mark.slow
def test_two_ranks(run_processes: Callable[..., str], tmp_path: Path, scratch: Path) -> None:
    """The logs of two processes, by one clock: each writes its files, the first one commits."""
    base = tmp_path / "base"
    base.mkdir()
    script = Path(__file__).with_name("crash_processes.py")
    run_processes(2, script, ("record", {"base": str(base), "logs": str(tmp_path)}))
    logs = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    assert all(log["steps"] for log in logs)
    story = Story(base, commits=[
        (min(times), step) for step, times in enumerate(
            zip(*(log["commits"] for log in logs), strict=True), start=1
        )
    ])  # fmt: skip
    steps = [
        Step(Operation(*operation), base64.b64decode(data))
        for log in logs
        for operation, data in log["steps"]
    ]
    steps.sort(key=lambda step: step.operation.end_ns)
    written = {Path(step.operation.path).name for step in steps if step.operation.kind == "write"}
    assert {"__0_0.distcp", "__1_0.distcp"} <= written
    trees = run(story, steps, scratch, samples=3, seed=0)
    assert trees > 100
    with pytest.raises(AssertionError, match="crash after"):
        run(story, without(steps, "fsync", "__1_0.distcp"), scratch, samples=4, seed=0)
