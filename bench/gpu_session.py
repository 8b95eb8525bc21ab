"""bench/gpu_check session: everything, the most important first, within a time, in as many calls as it takes.

    1  correctness: build, tests/gpu, training
    2  launch configurations are tuned: attention's, then those of three operators bound by memory
    3  the tests of the operators whose configurations that changed
    4  rows: attention, block, step and the longest sequence, the operators bound by memory
    5  the other checks that new configurations leave stale

Before them Triton's cache is filled with what the steps that are to come launch. A stage begins when
every step of those before it has had its time; a step that is through is not done again, one whose
time was up is gone on with when the others have had theirs.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from bench import gpu_state, gpu_steps
from bench.gpu_steps import (
    CONFIGS,
    OPERATORS,
    Ended,
    Sources,
    Status,
    Step,
    benchmark,
    correctness,
    inner,
    longest,
    run_step,
)  # fmt: skip

RESERVE = 4.0  # seconds at the end: to kill a step and to write the state
TUNE_TRIES = 3  # in one call; a configuration that ended the process is left out from there on
# Each step's seconds; with those of the checks about 25 minutes.
TUNE = {"varlen_attention": 175.0, "memory": 100.0}
MEMORY_TUNED = ("adaln_modulate", "gated_residual_adaln", "qk_norm_rope")
ROWS = {
    "varlen_attention": 265.0, "block": 110.0, "step": 110.0, "longest": 180.0,
    "adaln_modulate": 60.0, "gated_residual_adaln": 60.0, "qk_norm_rope": 80.0,
    "rectified_flow_noise": 30.0, "velocity_loss": 30.0,
}  # fmt: skip
WARM_SECONDS = 120.0


@dataclass(frozen=True)
class Stage:
    """Steps that come before those of the next stage.

    code_alone: a step that went well with other configurations is through.
    goes_on: a step whose time was up is begun again once all others have had theirs.
    tunes: steps whose seconds are those of all calls together.
    """

    name: str
    steps: Sequence[Step]
    code_alone: bool = False
    goes_on: bool = False
    tunes: bool = False


def plan(out: Path) -> list[Stage]:
    """The stages of the module's docstring."""
    checks = correctness(out)
    tuned = [s for s in checks if Path(s.name).stem.removeprefix("test_") in _tuned()]
    rows = [
        longest(seconds, out) if name == "longest" else benchmark(name, seconds, out, known=True)
        for name, seconds in ROWS.items()
    ]
    return [
        Stage("correctness", checks, code_alone=True),
        Stage("tuning", tuning(), tunes=True),
        Stage("tests of what was tuned", tuned),
        Stage("rows", rows, goes_on=True),
        Stage("other checks", [s for s in checks if s not in tuned]),
    ]


def _tuned() -> tuple[str, ...]:
    return ("varlen_attention", *MEMORY_TUNED)


def tuning() -> list[Step]:
    """Of `python -m bench tune`: what Goku launches, in the dtype it trains in."""
    attention = ["varlen_attention", "--sizes", "64", "128"]
    memory = [*MEMORY_TUNED, "--only", "forward", "backward", "--sizes", "2048", "4096"]
    asked = {"varlen_attention": attention, "memory": memory}
    # What a winner is of: bench tune itself looks closer.
    sources = Sources(("kernels/goku_kernels",))

    def command(words: list[str]) -> Callable[[float], list[str]]:
        def of(seconds: float) -> list[str]:
            limit = ["--dtypes", "bfloat16", "--limit", f"{inner(seconds):.0f}", "--resume"]
            return [sys.executable, "-m", "bench", "tune", *words, *limit]

        return of

    return [
        Step(f"tune/{name}", command(asked[name]), seconds, sources, 50.0)
        for name, seconds in TUNE.items()
    ]


# ---- Triton's cache ----


def warm_file() -> Path:
    """Notes which operators' kernels Triton's cache holds; it lies there and shares the cache's fate."""
    home = os.environ.get("TRITON_CACHE_DIR") or Path.home() / ".triton" / "cache"
    return Path(home) / "goku_warm"


def cold(operators: Sequence[str]) -> list[str]:
    """Those of `operators` that were not warmed with these sources."""
    file = warm_file()
    known = file.read_text(encoding="utf-8").split() if file.is_file() else []
    return [op for op in operators if _warmth(op) not in known]


def note_warm(operators: Sequence[str]) -> None:
    """Note that `operators` were warmed."""
    warm_file().parent.mkdir(parents=True, exist_ok=True)
    with warm_file().open("a", encoding="utf-8") as file:
        file.writelines(f"{_warmth(op)}\n" for op in operators)


def _warmth(op: str) -> str:
    return f"{op}:{Sources(('kernels/goku_kernels', 'goku/model'), (op,)).all()}"


# ---- one call ----


@dataclass
class Session:
    """One call. left: seconds until its limit. state: where the archive goes. fresh: nothing is known."""

    status: Status
    stages: Sequence[Stage]
    left: Callable[[], float]
    state: Path | None = None
    fresh: bool = False
    words: dict[tuple[str, str], str] = field(default_factory=dict)  # (stage, step) -> outcome
    _failed: set[tuple[str, str]] = field(default_factory=set)  # (step, hash of its sources)
    _through: set[tuple[str, str]] = field(default_factory=set)
    _tries: dict[str, int] = field(default_factory=dict)
    _bad_state: bool = False
    _clean_revision: str = ""
    _configs: str = ""
    _warmed: str = ""

    def run(self) -> bool:
        """Run what is not through as long as there is time; whether all of it is, and well.

        The archive is written at once, so that a place for it that is none is told at once, after
        every step, and when an exception ends the call.

        Raises:
            ValueError: `state` cannot be written at the beginning.
        """
        self._clean_revision = os.environ.get("GOKU_COMMIT", "")
        self._configs = _configs()
        if self.state is not None:
            gpu_state.save(self.state, gpu_steps.ROOT)
        try:
            gpu_state.cut_unfinished(self.status.out)
            self._warm()
            while self._pass():
                pass
        finally:
            self._save()
        return self._summary()

    def _warm(self) -> None:
        """Compile what is to come and is not in Triton's cache, on all processors."""
        self._warmed = _configs()
        needed = {
            op
            for stage in self.stages
            for step in stage.steps
            if not self._known(stage, step)
            for op in step.launches
        }
        todo = cold([op for op in OPERATORS if op in needed])
        if not todo or self.left() - RESERVE < 30:
            return
        # The pieces of a block are warmed with more than one operator.
        command = [sys.executable, "-m", "bench", "warm", *todo]
        ended = run_step("warm", command, min(WARM_SECONDS, self.left() - RESERVE), self.status.out)
        if ended.well:
            note_warm(todo)
        self.words["", "warm"] = f"{ended}, {ended.seconds:.0f} s"
        self._save()

    def _pass(self) -> bool:
        """Go through all stages once; whether a further time may bring more."""
        again = False
        for stage in self.stages:
            # Tuning leaves configurations whose kernels the tests after it would compile one by one: 110 to 135 s on
            # one core where all 16 take 10 (Triton 3.6, counted on two cores without a GPU).
            if _configs() != self._warmed:
                self._warm()
            turns = [self._turn(stage, step) for step in stage.steps]
            if stage.goes_on:
                again = again or "goes on" in turns
            elif "no time" in turns:  # the stages behind it have to wait
                return False
        return again

    def _turn(self, stage: Stage, step: Step) -> str:
        """Give a step its turn: "through", "failed", "no time" or "goes on"."""
        key = (stage.name, step.name)
        while not self._is_through(stage, step):
            if self._failed_so_before(step):
                self.words.setdefault(key, "failed before, see above")
                return "failed"
            spent = self._spent(step) if stage.tunes else 0.0
            least = min(step.least, step.seconds)
            if stage.tunes and step.seconds - spent < least:
                self._through.add(key)
                self.words[key] = f"has had its {step.seconds:.0f} s"
                continue
            seconds = min(step.seconds - spent, self.left() - RESERVE)
            if seconds < least:
                self.words.setdefault(key, "no time was left")
                return "no time"
            ended = self._step(stage, step, seconds, spent)
            if ended.well:
                self._through.add(key)
            elif stage.goes_on and self._was_late(ended, seconds):
                self.words[key] = f"is to go on, after {ended.seconds:.0f} s"
                return "goes on"
            elif not stage.tunes or ended.code == 2 or self._tries[step.name] == TUNE_TRIES:
                self._failed.add((step.name, self._sources(step).all()))
        return "through"

    def _step(self, stage: Stage, step: Step, seconds: float, spent: float) -> Ended:
        """Run one step and keep how it ended."""
        ended = run_step(step.name, step.command(seconds), seconds, self.status.out)
        self._mark_changes()
        self.status.note(step, ended, **({"spent": spent + ended.seconds} if stage.tunes else {}))
        self.words[stage.name, step.name] = f"{ended}, {ended.seconds:.0f} s"
        self._tries[step.name] = self._tries.get(step.name, 0) + 1
        self._save()
        return ended

    @staticmethod
    def _was_late(ended: Ended, seconds: float) -> bool:
        """Whether a benchmark ended by itself because its time was up."""
        return ended.code == 1 and ended.seconds >= inner(seconds)

    def _known(self, stage: Stage, step: Step) -> bool:
        """Whether it went well with these sources, in this call if it is --fresh."""
        if self.fresh and step.name not in self._tries:
            return False
        return self.status.knows(step, code_alone=stage.code_alone)

    def _is_through(self, stage: Stage, step: Step) -> bool:
        key = (stage.name, step.name)
        if key not in self._through and self._known(stage, step):
            self._through.add(key)
            self.words[key] = "well before with these sources"
        return key in self._through

    def _failed_so_before(self, step: Step) -> bool:
        """Whether it failed in this call, perhaps in a stage before, with the same sources."""
        return (step.name, self._sources(step).all()) in self._failed

    @staticmethod
    def _sources(step: Step) -> Sources:
        assert step.sources is not None, step.name  # of every step of a session
        return step.sources

    def _spent(self, step: Step) -> float:
        """Seconds that a step of the tuner has had with these sources, in all calls."""
        entry = self.status.entry(step.name)
        if self.fresh and step.name not in self._tries:
            return 0.0
        known = entry.get("code_sha256") == self._sources(step).code()
        return float(entry.get("spent", 0.0)) if known else 0.0

    def _mark_changes(self) -> None:
        """Rows that follow a change of the configurations are not those of the commit as it is."""
        if _configs() != self._configs and self._clean_revision:
            os.environ["GOKU_COMMIT"] = self._clean_revision.removesuffix("+dirty") + "+dirty"

    def _save(self) -> None:
        if self.state is None:
            return
        try:
            size = gpu_state.save(self.state, gpu_steps.ROOT)
        except ValueError as error:  # what is measured yet matters more than where it is kept
            self._bad_state = True
            print(f"gpu_check: {error}", flush=True)
        else:
            self._bad_state = False
            print(f"gpu_check: state of {size / 2**20:.2f} MiB is in {self.state}", flush=True)

    def _summary(self) -> bool:
        print(f"\ngpu_check session: Triton's cache: {self.words.get(('', 'warm'), 'as it was')}")
        good = not self._bad_state
        for stage in self.stages:
            for step in stage.steps:
                key = (stage.name, step.name)
                good = good and key in self._through
                sign = "+" if key in self._through else "-"
                print(f"{sign} {stage.name}: {step.name}: {self.words.get(key, 'not begun')}")
        return good


def _configs() -> str:
    """Hash of all launch configurations."""
    return Sources(
        (), tuple(sorted(p.stem for p in (gpu_steps.ROOT / CONFIGS).glob("*.json")))
    ).all()
