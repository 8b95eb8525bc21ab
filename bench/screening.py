"""Which configurations are worth a GPU's time: compiled for it without it, judged, put in order.

    python -m bench screen [OP ...] --write     works on a machine without a GPU

It prints a table and, with --write, keeps it in bench/results/screened for `python -m bench tune`,
which screens itself where the kernels or Triton are others by then. What spills, does not fit or
lost the chip's matrix instructions is dropped. Of the kernels that are bound by memory the best by
estimate (forecast.py) are kept, of attention's all that fit.
"""

from __future__ import annotations

import ast
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench import ahead, candidates, compiled, harness
from bench.ahead import Compiled, Compiling
from bench.candidates import Config, Row
from bench.forecast import Forecast, Residency, forecast, resident
from goku.whole_file import write_whole

# Of a row, beside the configuration that it has: halved in rounds, they cost about as much time as
# four that are measured to the end.
KEPT = 16
# Bytes of a thread's stack: more is not only what a version of ptxas puts there once.
STACK_LIMIT = 16
SCREENED = harness.RESULTS / "screened"
KERNELS = harness.ROOT / "kernels" / "goku_kernels" / "triton"
CONFIGS = KERNELS / "configs"
CHIP = "H200"  # the faster memory asks for more


@dataclass(frozen=True)
class Candidate:
    """One configuration of a row. forecast: None where nothing is estimated."""

    config: Config
    compiled: Compiled
    residency: Residency
    forecast: Forecast | None
    faults: tuple[str, ...]

    def record(self) -> dict[str, Any]:
        """For the table that is kept."""
        found: dict[str, Any] = {
            "registers": self.compiled.registers, "shared_bytes": self.compiled.shared_bytes,
            "blocks": self.residency.blocks,
        }  # fmt: skip
        if self.forecast is not None:
            found["estimated_share"] = round(self.forecast.share, 3)
            found["estimated_bound"] = self.forecast.bound
        return found


def chosen(
    rows: Sequence[Row], chip: int, kernels: Sequence[str] = (), sizes: Sequence[int] = (),
    dtypes: Sequence[str] = (),
) -> list[int]:  # fmt: skip
    """Which of `rows` are of this chip and asked for; all kernels, sizes or dtypes where none are."""
    return [
        i
        for i, row in enumerate(rows)
        if row["chip"] == chip
        and (not kernels or row["kernel"] in kernels)
        and (not sizes or row["size"] in sizes)
        and (not dtypes or dtype(row) in dtypes)
    ]


def dtype(row: Row) -> str:
    """The dtype that a row is judged in."""
    return "bfloat16" if "bfloat16" in row["dtypes"] else str(row["dtypes"][0])


def screen(
    op: str, rows: Sequence[Row], which: Sequence[int], *, launchers: bool = False,
    kept: int = KEPT, say: Callable[[str], None] = print,
) -> dict[int, list[Candidate]]:  # fmt: skip
    """Per row of `which` its candidates, best estimate first; the shipped one always among them."""
    tasks: list[tuple[int, Compiling]] = []
    for i in which:
        size = candidates.judged_size(op, rows[i], list(rows))
        for config in candidates.space(op, rows[i], size):
            given = (rows[i]["chip"], rows[i], config, tuple(rows), launchers)
            tasks.append((i, Compiling(op, size, dtype(rows[i]), *given)))
    results = ahead.everywhere(
        ahead.compile_one, [task for _, task in tasks], crashed, say, f"configurations of {op}"
    )
    found: dict[int, list[Candidate]] = {i: [] for i in which}
    for (i, task), result in zip(tasks, results, strict=True):
        for candidate in judged(op, rows[i], task.config, result):
            found[i].append(candidate)
    return {i: best(each, dict(rows[i]["config"]), kept) for i, each in found.items()}


def crashed(task: Compiling) -> Compiled:
    """The answer for a configuration whose process ended."""
    return Compiled(error="the compiler ended its process")


def judged(op: str, row: Row, config: Config, result: Compiled) -> list[Candidate]:
    """The candidates that one compiled configuration makes, one for each number of programs."""
    if result.error:
        return [Candidate(config, result, Residency(0, "nothing"), None, (result.error,))]
    fits = resident(result.registers, result.shared_bytes, result.threads)
    wrong = tuple(faults(op, row, result))
    shipped = dict(row["config"])
    configs = candidates.programs(op, config, fits.blocks)
    if config == shipped and shipped not in configs:
        configs.append(shipped)
    made = []
    for one in configs:
        expected = None
        if result.loop is not None and result.work is not None:
            moved = ahead.Work(
                result.work.read, result.work.written, result.work.ahead, one.get("programs", 0)
            )
            expected = forecast(result.loop, fits, result.threads, moved, CHIP)
        made.append(Candidate(one, result, fits, expected, wrong))
    return made


def faults(op: str, row: Row, result: Compiled) -> list[str]:
    """Why a compiled configuration is not worth running; [] if it may be."""
    from goku_kernels.triton.compiling import SHARED_LIMIT

    chip = row["chip"]
    found = []
    if result.stack_bytes > STACK_LIMIT:
        found.append(f"{result.stack_bytes} bytes of stack")
    if result.shared_bytes > SHARED_LIMIT[chip]:
        found.append(f"{result.shared_bytes} bytes of shared memory")
    name = candidates.function(op, row["kernel"])
    half = dtype(row) != "float32"
    if op == "varlen_attention" and name in compiled.MULTIPLY and half:
        if result.tensor_core != compiled.MATRIX[chip]:
            found.append(f"matrix instructions {result.tensor_core}")
        if name.startswith("specialised_") and not result.warp_specialized:
            found.append("warps are not specialised")
    return found


def best(found: Iterable[Candidate], shipped: Config, kept: int) -> list[Candidate]:
    """The `kept` best without faults and, first of all, the shipped one, whatever is wrong with it.

    By estimate, and where that says the same by what is left beside the traffic.
    """

    def order(candidate: Candidate) -> tuple[float, float]:
        expected = candidate.forecast
        if expected is None:
            # Large tiles first: each key that comes from L2 then serves more queries.
            config = candidate.config
            area = config.get("queries", 1) * config.get("keys", 1)
            return -area, -candidate.residency.blocks * candidate.compiled.threads
        return -round(expected.share, 2), sum(expected.cycles.values())

    found = list(found)
    first = [c for c in found if c.config == shipped][:1]
    others = [c for c in found if not c.faults and c.config != shipped]
    return first + sorted(others, key=order)[:kept]


def line(row: Row, candidate: Candidate) -> str:
    """One row of the table."""
    made = candidate.compiled
    words = (
        f"{row['kernel']} {row['size']} {dtype(row)}: {json.dumps(candidate.config)}: "
        f"{made.registers} registers, {made.shared_bytes} B shared, {candidate.residency.blocks} "
        f"blocks ({candidate.residency.limit})"
    )
    expected = candidate.forecast
    if expected is not None:
        cycles = ", ".join(f"{name} {value:.0f}" for name, value in expected.cycles.items())
        words += (
            f"; {expected.in_flight / 1024:.1f} of {expected.needed / 1024:.1f} KiB in flight; "
            f"cycles {cycles}; estimated {100 * expected.share:.0f}% of {CHIP}'s copy"
        )
    return words + "".join(f"; {fault}" for fault in candidate.faults)


# ---- tables that are kept ----


def origin(op: str) -> dict[str, str]:
    """What a table of `op` depends on beside the operator's rows."""
    import triton  # here, so that the command's other parts need none

    return {
        "triton": str(triton.__version__), "sources_sha256": harness.source_hash(sources(op)),
    }  # fmt: skip


def sources(op: str) -> list[str]:
    """The files that `triton/<op>.py` is compiled from: itself and what it imports beside it."""
    found: set[str] = set()
    ahead_of = [op]
    while ahead_of:
        name = ahead_of.pop()
        # These say what is compiled, which is in the table, and look at what came out.
        if name in found or name in ("configs", "compiling"):
            continue
        found.add(name)
        tree = ast.parse((KERNELS / f"{name}.py").read_text(encoding="utf-8"))
        relative = [n for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and n.level == 1]
        named = [n.module or alias.name for n in relative for alias in n.names]
        ahead_of += [name for name in named if (KERNELS / f"{name}.py").is_file()]
    folder = KERNELS.relative_to(harness.ROOT).as_posix()
    return sorted(f"{folder}/{name}.py" for name in found)


def table(op: str, row: Row, found: Sequence[Candidate]) -> dict[str, Any]:
    """A row's candidates as they are kept."""
    known = {key: row[key] for key in ("kernel", "size", "dtypes", "chip")}
    kept = [{"config": c.config, **c.record(), "faults": list(c.faults)} for c in found]
    return {"op": op, **known, **origin(op), "candidates": kept}


def write(tables: Sequence[Mapping[str, Any]], folder: Path) -> None:
    """Put tables in the place of those of the same rows, one file an operator."""
    folder.mkdir(parents=True, exist_ok=True)
    for op in sorted({t["op"] for t in tables}):
        file = folder / f"{op}.jsonl"
        mine = {_key(t): t for t in tables if t["op"] == op}
        before = {_key(t): t for t in read(file)}
        lines = [json.dumps(t) + "\n" for t in (before | mine).values()]
        write_whole(file, "".join(lines).encode())


def read(file: Path) -> list[dict[str, Any]]:
    """The tables of a file; [] where there is none."""
    if not file.is_file():
        return []
    return [json.loads(text) for text in file.read_text(encoding="utf-8").splitlines()]


def known(op: str, row: Row, folder: Path) -> list[dict[str, Any]] | None:
    """The kept candidates of a row with what is said of them, or None: of other kernels or Triton.

    They begin with the configuration that the row has now.
    """
    for t in read(folder / f"{op}.jsonl"):
        if _key(t) == _key(row) and all(t[k] == v for k, v in origin(op).items()):
            others = [c for c in t["candidates"] if c["config"] != row["config"]]
            own = [c for c in t["candidates"] if c["config"] == row["config"]]
            return (own or [{"config": dict(row["config"])}]) + [
                c for c in others if not c["faults"]
            ]
    return None


def _key(row: Mapping[str, Any]) -> tuple[object, ...]:
    return row["kernel"], row["size"], tuple(row["dtypes"]), row["chip"]


def main(
    ops: Sequence[str], chip: int, kernels: Sequence[str], sizes: Sequence[int],
    dtypes: Sequence[str], *, keep: bool, folder: Path = SCREENED, kept: int = KEPT,
) -> None:  # fmt: skip
    """Screen rows and print their candidates; `keep` writes them to `folder`."""
    for op in ops:
        rows = json.loads((CONFIGS / f"{op}.json").read_text(encoding="utf-8"))["rows"]
        which = chosen(rows, chip, kernels, sizes, dtypes)
        found = screen(op, rows, which, kept=kept)
        for i, each in found.items():
            for candidate in each:
                print(line(rows[i], candidate), flush=True)
        if keep:
            write([table(op, rows[i], each) for i, each in found.items()], folder)
