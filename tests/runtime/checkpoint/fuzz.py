"""Fuzzes what is read of a checkpoint before its data: index.json, manifest.json and state.json.

Whatever stands in them, reading them raises CheckpointError or gives what stands there; nothing else is
raised, and no more memory is taken than their size explains.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import platform
import re
import subprocess
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from random import Random

sys.path.insert(0, str(Path(__file__).parent))  # test folders are no packages
from parsers import PARSERS, Parser

CLEAN, FOUND, BAD_INPUT = 0, 1, 2
WORKER = Path(__file__).with_name("fuzz_atheris.py")
LONGEST = 16_384  # bytes of an input

EXAMPLES = """examples:
  make fuzz                                 all three for 60 seconds
  make fuzz ARGS="--seconds 300"
  fuzz.py --parser tree --seconds 20
  fuzz.py --blind                           without atheris and so without coverage: any Python
  fuzz.py build/fuzz/tree/crash-0123abcd    reads inputs again, with every parser

Exit codes: 0 nothing found, 1 found (the input is kept, its path printed), 2 bad arguments or no atheris.
What was tried is kept in build/fuzz, where the next run goes on.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns the exit code."""
    command = argparse.ArgumentParser(
        prog="fuzz.py", description=__doc__, epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    command.add_argument("files", nargs="*", type=Path, help="inputs to read again")
    command.add_argument("--seconds", type=float, default=60, help="in all (default: 60)")
    command.add_argument("--parser", choices=PARSERS, action="append", help="default: all")
    command.add_argument("--blind", action="store_true", help="random mutations, no atheris")
    command.add_argument("--seed", type=int, default=None, help="of the mutations (default: any)")
    command.add_argument("--directory", type=Path, default=Path("build/fuzz"), help="of inputs")
    chosen = command.parse_args(arguments)
    if not 0 < chosen.seconds < 1e6:
        command.error(f"--seconds: found {chosen.seconds}; allowed: more than 0, at most 1e6")
    names = list(dict.fromkeys(chosen.parser or PARSERS))
    if chosen.files:
        return replay(chosen.files, names)
    if not chosen.blind and importlib.util.find_spec("atheris") is None:
        print(
            "atheris is not installed. `make fuzz` does that where there is a wheel: CPython 3.11 to "
            f"3.13 on Linux x86_64; this is {platform.python_version()} on {platform.system()} "
            f"{platform.machine()}. --blind does without, and without coverage.",
            file=sys.stderr,
        )
        return BAD_INPUT
    seed = Random().randrange(1, 1 << 31) if chosen.seed is None else chosen.seed
    fuzz = blind if chosen.blind else guided
    codes = [
        fuzz(name, chosen.seconds / len(names), seed, chosen.directory / name) for name in names
    ]
    return max(codes)


def replay(files: Sequence[Path], names: Sequence[str]) -> int:
    """Reads inputs with each parser."""
    code = CLEAN
    for path in files:
        try:
            data = path.read_bytes()
        except OSError as error:
            print(f"{path}: {error.strerror}", file=sys.stderr)
            return BAD_INPUT
        for name in names:
            taken, text = attempt(PARSERS[name], data)
            print(f"{path}: {name}: {text or ('taken' if taken else 'refused')}")
            code = FOUND if text else code
    return code


class Escaped:
    """Holds the traceback of whatever escapes from its block, which is what is looked for."""

    text = ""

    def __enter__(self) -> Escaped:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: object
    ) -> bool:
        if error is None or isinstance(error, KeyboardInterrupt | SystemExit):
            return False
        self.text = "".join(traceback.format_exception(error))
        return True


def attempt(parser: Parser, data: bytes) -> tuple[bool, str]:
    """Whether an input is taken, and what is wrong with that: a traceback, or nothing."""
    taken = False
    with Escaped() as escaped:
        taken = parser.check(data)
    return taken, escaped.text


def blind(name: str, seconds: float, seed: int, directory: Path) -> int:
    """Mutates the seeds, and what was taken among their mutations."""
    parser, random = PARSERS[name], Random(seed)
    seeds = parser.seeds()
    pool: list[bytes] = []
    tried = 0
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        base = random.choice(pool if pool and random.randrange(2) else seeds)
        data = parser.mutated(base, random)
        if len(data) > LONGEST:
            continue
        tried += 1
        taken, text = attempt(parser, data)
        if text:
            directory.mkdir(parents=True, exist_ok=True)
            path = directory / f"crash-{hashlib.sha1(data).hexdigest()}"
            path.write_bytes(data)
            return found(name, path, text)
        if taken:
            pool = [*pool[-63:], data]
    print(f"{name}: {tried} inputs in {seconds:.0f} s, none read wrongly")
    return CLEAN


def guided(name: str, seconds: float, seed: int, directory: Path) -> int:
    """atheris, in a process of its own: it ends that when it has found something."""
    directory.mkdir(parents=True, exist_ok=True)
    for data in PARSERS[name].seeds():
        (directory / f"golden-{hashlib.sha1(data).hexdigest()}").write_bytes(data)
    flags = {
        "max_total_time": max(1, round(seconds)),
        "timeout": 10,
        "rss_limit_mb": 4096,
        "max_len": LONGEST,
        "len_control": 0,  # what grows with a change is tried from the start
        "seed": seed,
        "artifact_prefix": f"{directory}/",
        "print_final_stats": 1,
    }
    process = subprocess.run(
        [sys.executable, str(WORKER), name, *(f"-{flag}={value}" for flag, value in flags.items()),
         str(directory)],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", check=False,
    )  # fmt: skip
    if process.returncode:
        path = re.search(r"Test unit written to (\S+)", process.stdout)
        if path is None:  # it is the fuzzer that failed
            print(f"{name}: atheris ended with {process.returncode}:\n{process.stdout[-4000:]}")
            return BAD_INPUT
        return found(name, Path(path[1]), process.stdout[-4000:])
    count = re.search(r"number_of_executed_units:\s*(\d+)", process.stdout)
    print(f"{name}: {count[1] if count else '?'} inputs in {seconds:.0f} s, none read wrongly")
    return CLEAN


def found(name: str, path: Path, text: str) -> int:
    print(f"{name}: FOUND {path}\n{text}\nAgain: {Path(__file__).name} --parser {name} {path}")
    return FOUND


if __name__ == "__main__":
    sys.exit(main())
