"""The steps of bench/gpu_check: what each runs, what it depends on, and which went well before.

Needs no torch, so that the command can say what is missing.
"""

from __future__ import annotations

import ast
import datetime
import hashlib
import importlib.util
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench import children, gpu_state
from goku.whole_file import write_whole

ROOT = Path(__file__).resolve().parents[1]
STATUS = "gpu_check.json"
LOG = "gpu_check.log"  # what every step said
LOG_CHARACTERS, SHOWN_CHARACTERS = 200_000, 6_000  # of one step, in the log and here
SAID_CHARACTERS = 120  # of its last line, which is noted
# Files of tests that launch kernels of an operator whose own file is another.
BESIDE = {"specialised_warps": "varlen_attention"}
LONG_TESTS = ("test_varlen_attention", "test_block")
BUILD_SECONDS, TEST_SECONDS, TRAIN_SECONDS = 60.0, 240.0, 120.0
# A benchmark begins nothing new when its time is nearly up (MARGIN, or a third of a short time) and
# is killed when it is.
MARGIN = 25.0
CONFIGS = gpu_state.CONFIGS
OPERATORS = (
    "adaln_modulate", "gated_residual_adaln", "qk_norm_rope", "rectified_flow_noise",
    "varlen_attention", "velocity_loss",
)  # fmt: skip
BUILD, TRAINING = "build", "training"
_SUFFIXES = (".py", ".cu", ".cuh", ".cpp", ".h", ".json", ".txt")
_LIBRARIES = ("kernels/goku_kernels", "runtime/goku_runtime", "goku")
_BUILD = ("setup.py", "CMakeLists.txt", "csrc")


# ---- what a step depends on ----


@dataclass(frozen=True)
class Sources:
    """Files and folders below the repository's root, and the operators whose configurations count.

    Configurations are told apart from the code: tuning an operator asks for its own checks again,
    not for everybody's.
    """

    places: tuple[str, ...]
    configs: tuple[str, ...] = ()

    def code(self) -> str:
        """SHA-256 over names and contents of the places, without configurations and results."""
        return _hash(p for p in _files(self.places) if p.parent != ROOT / CONFIGS)

    def all(self) -> str:
        """`code` and the configurations."""
        files = (ROOT / CONFIGS / f"{op}.json" for op in self.configs)
        return hashlib.sha256((self.code() + _hash(files)).encode()).hexdigest()


def _files(places: Iterable[str]) -> list[Path]:
    found: set[Path] = set()
    for place in places:
        path = ROOT / place
        found.update(path.rglob("*") if path.is_dir() else [path])
    results = ROOT / gpu_state.RESULTS
    return sorted(
        p for p in found if p.is_file() and p.suffix in _SUFFIXES and results not in p.parents
    )


def _hash(files: Iterable[Path]) -> str:
    digest = hashlib.sha256()
    for path in files:
        content = path.read_bytes() if path.is_file() else b""
        digest.update(f"{path.relative_to(ROOT)}\0{len(content)}\0".encode() + content)
    return digest.hexdigest()


def imported(*files: str) -> tuple[str, ...]:
    """`files` and the modules of bench/ that they import, directly or not, relative to the root."""
    found: set[str] = set()
    waiting = list(files)
    while waiting:
        file = waiting.pop()
        if file in found or not (ROOT / file).is_file():
            continue
        found.add(file)
        for node in ast.walk(ast.parse((ROOT / file).read_text(encoding="utf-8"))):
            names: list[str] = []
            if isinstance(node, ast.ImportFrom) and node.module and not node.level:
                names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
            elif isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            waiting += [f"{n.replace('.', '/')}.py" for n in names if n.startswith("bench.")]
    return tuple(sorted(found))


def check_sources() -> dict[str, Sources]:
    """The steps of `correctness` by name, in their order, with what each depends on."""
    found = {BUILD: Sources(_BUILD)}
    for path in test_files():
        name = file = path.relative_to(ROOT).as_posix()
        op = path.stem.removeprefix("test_")
        if op in BESIDE:
            op = BESIDE[op]
            file = f"tests/gpu/test_{op}.py"
        configs = (op,) if op in OPERATORS else OPERATORS
        ran_by = ("tests/gpu/conftest.py", *imported("bench/gpu_tests.py"))
        found[name] = Sources((*_LIBRARIES, *ran_by, name, *imported(file)), configs)
    trained = imported("bench/training.py")
    found[TRAINING] = Sources((*_LIBRARIES, *trained), OPERATORS)
    return found


# ---- steps ----


@dataclass(frozen=True)
class Step:
    """One command of a part.

    command: of the seconds that it gets, until it is killed.
    seconds: that it gets at most. least: without so many it is not begun.
    sources: what it depends on; None for a step that is never known from before.
    launches: operators whose kernels it runs.
    """

    name: str
    command: Callable[[float], list[str]]
    seconds: float
    sources: Sources | None = None
    least: float = 1.0
    launches: tuple[str, ...] = ()


def inner(seconds: float) -> float:
    """After how many of its `seconds` a benchmark is told to begin nothing new."""
    return seconds - min(MARGIN, seconds / 3)


def correctness(out: Path) -> list[Step]:
    """Build (where its tools are), tests, training."""
    train = [sys.executable, "-m", "bench.training", "--out", str(out)]
    found = []
    for name, sources in check_sources().items():
        if name == TRAINING:
            command, most, least = train, TRAIN_SECONDS, 75.0
        elif name == BUILD:
            command, most, least = build_command(), BUILD_SECONDS, 30.0
        else:
            # Attention's and the block's take a minute and more; what is cut short begins anew in the next call.
            most, least = TEST_SECONDS, 60.0 if Path(name).stem in LONG_TESTS else 30.0
            command = test_command(ROOT / name)
        if command:
            found.append(Step(name, _always(command), most, sources, least, sources.configs))
        else:
            print("gpu_check: cmake, ninja, pybind11 or setuptools is missing: nothing is built")
    return found


def _always(command: list[str]) -> Callable[[float], list[str]]:
    """Of a step that does not ask how long it may take."""
    return lambda seconds: command


def benchmark(
    name: str, seconds: float, out: Path, *, fresh: bool = False, known: bool = False
) -> Step:
    """A benchmark of `python -m bench run`, which knows itself what it has measured.

    known: whether it is to be noted as a whole too, so that it need not be asked.
    """

    def command(limit: float) -> list[str]:
        resume = [] if fresh else ["--resume"]
        limits = ["--limit", f"{inner(limit):.0f}", "--seconds", "0.5", "--out", str(out)]
        return [sys.executable, "-m", "bench", "run", name, *limits, *resume]

    launches = (name,) if name in OPERATORS else OPERATORS
    # Any row may depend on every kernel, its configurations and the code of its peers.
    sources = Sources((*_LIBRARIES, "bench"), OPERATORS) if known else None
    return Step(f"bench/{name}", command, seconds, sources, 45.0, launches)


def longest(seconds: float, out: Path) -> Step:
    """The longest sequence that the GPU trains; the clip's own step takes what the search leaves."""

    def command(limit: float) -> list[str]:
        clip = ["--seconds", f"{limit / 2:.0f}", "--out", str(out)]
        return [sys.executable, "-m", "bench.longest", *clip]

    sources = Sources((*_LIBRARIES, *imported("bench/longest.py")), OPERATORS)
    return Step("longest", command, seconds, sources, 90.0, OPERATORS)


def build_command() -> list[str]:
    """How to build the native modules in place; [] where a tool for it is missing."""
    tools = all(shutil.which(tool) for tool in ("cmake", "ninja"))
    modules = all(importlib.util.find_spec(name) for name in ("pybind11", "setuptools"))
    if not tools or not modules:
        return []
    return [sys.executable, "setup.py", "build_ext", "--inplace"]


def test_files() -> list[Path]:
    """The test files of tests/gpu: those of the block behind those of its parts, and last what may hang."""
    found = (ROOT / "tests" / "gpu").glob("test_*.py")
    last = {"block", *BESIDE}
    return sorted(found, key=lambda path: (path.stem.removeprefix("test_") in last, path.name))


def test_command(*paths: Path) -> list[str]:
    """The tests of these files of tests/gpu, all of them by default."""
    return [sys.executable, "-m", "bench.gpu_tests", *map(str, paths)]


# ---- running one ----


def environment() -> dict[str, str]:
    """This process's environment with the three packages on the path, uninstalled."""
    ours = [str(ROOT / "kernels"), str(ROOT / "runtime"), str(ROOT)]
    before = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    path = os.pathsep.join(dict.fromkeys([*ours, *before]))
    return os.environ | {"PYTHONPATH": path, "PYTHONUNBUFFERED": "1"}


@dataclass(frozen=True)
class Ended:
    """How a step ended.

    code: exit code, None where it was killed after `seconds`, its time. said: its last line.
    """

    code: int | None
    seconds: float
    said: str = field(default="", compare=False)

    @property
    def well(self) -> bool:
        return self.code == 0

    def __str__(self) -> str:
        if self.code is None:
            return f"stopped after {self.seconds:.0f} s"
        return "well" if self.well else f"exit code {self.code}"


def run_step(name: str, command: Sequence[str], seconds: float, out: Path) -> Ended:
    """Run one step in the repository's root; it is killed, with all that it started, after `seconds`.

    What it says goes to the log in `out`, and when it has ended to the standard output: each time
    its beginning and its end, if it says much.
    """
    print(f"== {name}, {seconds:.0f} s at most", flush=True)
    out.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    with (out / LOG).open("a+b") as log:
        log.write(f"== {name}\n".encode())
        log.flush()
        start = log.tell()
        code = children.run(command, seconds, cwd=ROOT, env=environment(), output=log)
        took = time.monotonic() - began
        log.seek(start)
        said = log.read().decode("utf-8", "replace")
        last = said.strip().rpartition("\n")[2].strip("= ")[:SAID_CHARACTERS]
        ended = Ended(code, seconds if code is None else took, last)
        log.truncate(start)
        words = str(ended) if code is None else f"{ended}, {took:.0f} s"
        log.write(f"{shortened(said, LOG_CHARACTERS)}\n== {name}: {words}\n\n".encode())
    if not ended.well:
        gpu_state.cut_unfinished(out)
    print(shortened(said, SHOWN_CHARACTERS))
    print(f"== {name}: {words}", flush=True)
    return ended


def shortened(text: str, most: int) -> str:
    """`text`, or `most` of its characters: a quarter from its beginning, the rest from its end."""
    if len(text) <= most:
        return text.strip("\n")
    head, tail = most // 4, most - most // 4
    left = len(text) - head - tail
    return f"{text[:head]}\n[{left} characters are left out]\n{text[-tail:]}".strip("\n")


# ---- which went well ----

Entry = dict[str, Any]


@dataclass(frozen=True)
class Status:
    """gpu_check.json in the folder `out`: device -> name of a step -> how it ended last, of what sources.

    revision: gives commit and whether files differ from it, for new entries.
    """

    out: Path
    device: str
    revision: Callable[[], tuple[str, bool]] = lambda: ("unknown", True)

    def entry(self, name: str) -> Entry:
        """Of one step on this device; {} where it never ran."""
        return read_status(self.out).get(self.device, {}).get(name, {})

    def knows(self, step: Step, *, code_alone: bool = False) -> bool:
        """Whether a step went well here with these sources; code_alone: or other configurations."""
        entry = self.entry(step.name)
        if step.sources is None or entry.get("ended") != "well":
            return False
        if entry["code_sha256"] != step.sources.code():
            return False
        return code_alone or entry["sources_sha256"] == step.sources.all()

    def note(self, step: Step, ended: Ended, **more: Any) -> None:
        """Write down how a step with sources ended."""
        if step.sources is None:
            return
        commit, dirty = self.revision()
        at = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        entry = {
            "ended": str(ended), "code_sha256": step.sources.code(),
            "sources_sha256": step.sources.all(), "commit": commit, "dirty": dirty, "at": at,
            "seconds": round(ended.seconds, 1), "said": ended.said, **more,
        }  # fmt: skip
        found = read_status(self.out)
        found.setdefault(self.device, {})[step.name] = entry
        write_whole(self.out / STATUS, (json.dumps(found, indent=1) + "\n").encode())


def read_status(out: Path) -> dict[str, dict[str, Entry]]:
    """All of gpu_check.json; {} where there is none.

    Raises:
        ValueError: it is not of this form.
    """
    file = out / STATUS
    if not file.is_file():
        return {}
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{file} is no JSON: {error}") from error
    keys = ("ended", "code_sha256", "sources_sha256", "commit", "dirty", "at", "said")
    devices = [*found.values()] if isinstance(found, dict) else [None]
    entries = [e for steps in devices for e in (steps.values() if isinstance(steps, dict) else [0])]
    if not all(isinstance(e, dict) and all(k in e for k in keys) for e in entries):
        raise ValueError(f"{file}: allowed is device -> step -> an entry with {', '.join(keys)}")
    return found
