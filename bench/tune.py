"""Measures launch configurations of operators' kernels for the GPU at hand.

    python -m bench tune [OP ...] --sizes 2048 4096 --dtypes bfloat16 --limit 200 --resume

For each row of kernels/goku_kernels/triton/configs/<op>.json of this chip: its candidates come from
`screening` (kept tables, or compiled here in many processes), `ahead` compiles them before the GPU
is asked, `trials` times them against each other and judges the winner. The row is written at once,
every candidate with its time to bench/results/tune/<op>.jsonl. A kernel that runs in the place of
another (attention's forward with specialised warps) is then timed beside that one; where it is slower
or not right its row is marked "unused". So a run may end at any time; with --resume it goes on with
the rows that these sources have no winner of on this GPU, and leaves out what was running when a run
died. A configuration that takes the device's context along, or waits for ever, makes the command run
itself again.
"""

from __future__ import annotations

import datetime
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from bench import ahead, begun, candidates, harness, screening, tune_log
from bench.candidates import Config, Row
from bench.trials import GAIN, Outcome, Trials
from bench.tune_log import USES, Log, named
from goku.whole_file import write_whole

FOLDER = screening.CONFIGS
RESULTS = harness.RESULTS / "tune"
DEADLY = 2  # configurations of a row that may end a process; after them the others are not tried
# One contest of 17 candidates takes about as long, with a truth that is new.
ROW_SECONDS = 8.0


@dataclass(frozen=True)
class Options:
    """What to tune and how.

    kernels, sizes, dtypes: of rows; () for all. limit: seconds for the whole call. kept: candidates
    of a row beside its own configuration. write: the configurations' files.
    """

    kernels: Sequence[str] = ()
    sizes: Sequence[int] = ()
    dtypes: Sequence[str] = ()
    limit: float = float("inf")
    kept: int = screening.KEPT
    resume: bool = False
    write: bool = True
    folder: Path = FOLDER
    results: Path = RESULTS
    screened: Path = screening.SCREENED


def tune(
    op: str, rows: list[Row], which: Sequence[int], options: Options, log: Log,
    listed: Mapping[int, Sequence[Mapping[str, Any]]],
    trial: Callable[..., Outcome], left: Callable[[], float], save: Callable[[], None],
    say: Callable[[str], None] = print,
) -> bool:  # fmt: skip
    """Tune rows `which` in place, one after the other; False if time ran out.

    Args:
        listed: per row its candidates as they are kept, the shipped one first.
        trial: rows, row, size, dtype, configs -> outcome, as Trials.row.
        left: seconds until the call's limit.
        save: writes the rows.
    """
    for i in which:
        row = rows[i]
        what = f"{op} {row['kernel']} at {row['size']} {screening.dtype(row)}"
        if options.resume and log.tuned(row):
            say(f"{what}: tuned before; without --resume it is done again")
            continue
        if left() < ROW_SECONDS:
            say(f"{what}: no time is left; --resume goes on here")
            return False
        deadly = [config for config in log.deadly(row) if config]
        known = [c for c in listed[i] if c["config"] not in deadly]
        if not known or len(deadly) >= DEADLY:
            say(f"{what}: {len(deadly)} configurations ended a process, {len(known)} are not tried")
            continue
        configs = [dict(c["config"]) for c in known]
        size = candidates.judged_size(op, row, rows)
        began = time.monotonic()
        out = trial(
            rows, row, size, screening.dtype(row), configs,
            enough=lambda: left() < ROW_SECONDS / 2,
            begun=lambda config, row=row: log.begin(row, config),
        )  # fmt: skip
        log.begun.clear()
        lines = list(records(op, row, size, known, out, log.origin))
        if not out.order:
            log.add(lines)
            say(f"{what}: none of {len(configs)} configurations can be used: {out.failed}")
            continue
        winner = out.order[0]
        before = f"{out.ms[0]:.4f} -> " if 0 in out.ms else ""
        say(
            f"{what}, width {size}: {before}{out.ms[winner]:.4f} ms of {len(configs)} in "
            f"{time.monotonic() - began:.1f} s: {configs[winner]}"
        )
        rows[i] = {**row, "config": configs[winner]}
        save()  # first: what the log knows is not done again
        log.add(lines)
    return True


def compare(
    op: str, rows: list[Row], which: Sequence[int], options: Options, log: Log,
    trial: Callable[..., Outcome], left: Callable[[], float], save: Callable[[], None],
    say: Callable[[str], None] = print,
) -> bool:  # fmt: skip
    """Mark those of rows `which` used or "unused" that run in another's place; False if time ran out.

    Args:
        trial: rows, row, size, dtype -> outcome of without (0) and with (1), as Trials.rivals.
        left, save: as of `tune`.
    """
    for i in which:
        row = rows[i]
        if (op, row["kernel"]) not in candidates.IN_PLACE_OF:
            continue
        what = f"{op} {row['kernel']} at {row['size']} {screening.dtype(row)}"
        beside = _beside(op, rows, row)
        if options.resume and log.compared(row, beside):
            continue
        if left() < ROW_SECONDS:
            say(f"{what}: no time is left to time it beside {', '.join(beside)}; --resume does")
            return False
        if {} in log.deadly(row):
            say(f"{what}: what runs without it ended a process: it stays as it is")
            continue
        if row["config"] in log.deadly(row):
            out = Outcome(order=[0], failed={1: "it ended a process"})
        else:
            out = trial(
                rows, row, candidates.judged_size(op, row, rows), screening.dtype(row),
                begun=lambda config, row=row: log.begin(row, config),
            )  # fmt: skip
            log.begun.clear()
        if not out.order:
            say(f"{what}: neither with it nor without it is right: {out.failed}")
            continue
        used = out.order[0] == 1
        times = [f"{out.ms[n]:.4f} ms" if n in out.ms else "no time" for n in (1, 0)]
        why = f" ({'; '.join(out.failed.values())})" if out.failed else ""
        say(f"{what}: {times[0]}, without it {times[1]}{why}: {USES[used]}")
        if used == bool(row.get("unused")):
            rows[:] = ahead.with_use(rows, row, used)
            save()
        log.add([{
            **named(op, row), **log.origin, "status": USES[used], "config": row["config"],
            "beside": beside, "ms": out.ms.get(1), "ms_without": out.ms.get(0),
            "note": "; ".join(out.failed.values()),
            "measured_at": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        }])  # fmt: skip
    return True


def _beside(op: str, rows: Sequence[Row], row: Row) -> dict[str, Config]:
    """Of the kernels that run where `row` is unused the configurations, by name."""
    first = candidates.IN_PLACE_OF[op, row["kernel"]]
    names = (first, "gradient_q") if first == "gradient_kv" else (first,)
    keys = ("size", "chip", "dtypes")
    return {
        r["kernel"]: dict(r["config"])
        for r in rows
        if r["kernel"] in names and all(r[k] == row[k] for k in keys)
    }


def records(
    op: str, row: Row, size: int, known: Sequence[Mapping[str, Any]], out: Outcome,
    origin: Mapping[str, str],
) -> list[dict[str, Any]]:  # fmt: skip
    """A line for every candidate, with what was estimated of it; the winner's comes last."""
    at = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    lines = []
    for i, candidate in enumerate(known):
        facts = {k: v for k, v in candidate.items() if k != "faults"}
        status = "timed" if i not in out.failed else "failed"
        if out.order and out.order[0] == i:
            status = "winner"
        lines.append({
            **named(op, row), **origin, "width": size, "status": status,
            "note": out.failed.get(i, ""), "shipped": candidate["config"] == row["config"],
            "ms": out.ms.get(i), "rounds": out.rounds.get(i), "measured_at": at, **facts,
        })  # fmt: skip
    return sorted(lines, key=lambda line: line["status"] == "winner")


def text(rows: Sequence[Row]) -> str:
    """configs/<op>.json, one row a line."""
    return '{"rows": [\n  ' + ",\n  ".join(json.dumps(row) for row in rows) + "\n]}\n"


def listed(
    op: str, rows: Sequence[Row], which: Sequence[int], options: Options,
    say: Callable[[str], None] = print,
) -> dict[int, list[dict[str, Any]]]:  # fmt: skip
    """Candidates of rows from the kept tables, and from a screening here for those without one."""
    found: dict[int, list[dict[str, Any]]] = {}
    for i in which:
        kept = screening.known(op, rows[i], options.screened)
        if kept is not None:
            found[i] = kept[: options.kept + 1]
    new = [i for i in which if i not in found]
    if new:
        say(f"{op}: {len(new)} rows are screened here; no kept table fits them")
        for i, each in screening.screen(op, rows, new, kept=options.kept, say=say).items():
            found[i] = screening.table(op, rows[i], each)["candidates"]
    return found


def main(ops: Sequence[str], options: Options, say: Callable[[str], None] = print) -> bool:
    """Tune operators for this machine's GPU; False if time ran out.

    Raises:
        ValueError: no GPU, no configurations of an operator, or no row of this chip that fits.
    """
    if not torch.cuda.is_available():
        raise ValueError("tune needs a CUDA device, and there is none on this machine")
    from goku_kernels.triton.launch import launcher

    device = torch.device("cuda")
    return run(ops, options, device, launcher(torch.empty(0, device=device)).chip, say)


def run(
    ops: Sequence[str], options: Options, device: torch.device, chip: int,
    say: Callable[[str], None] = print,
) -> bool:  # fmt: skip
    """Tune operators on `device`, whose configurations are those of `chip`.

    Raises:
        ValueError: no configurations of an operator, or no row of this chip that fits.
        begun.ContextLost: a configuration took the device's context along, and this process is no
            `python -m bench`, which would have run itself again.
    """
    began, start = time.monotonic(), begun.Start.of(options.resume)
    until = time.time() + options.limit
    # --resume that a restart has added does not bring back what was tuned before the command.
    since = "" if start.resume or start.since is None else start.since

    def left() -> float:
        return options.limit - (time.monotonic() - began)

    hardware = {
        "device": str(harness.hardware(device)["device"]), "torch": str(torch.__version__),
    }  # fmt: skip
    work = [_work(op, options, chip, hardware, until, since) for op in ops]
    if not any(each.found for each in work):
        raise ValueError(
            f"no row to tune: chip {chip}, kernels {list(options.kernels)}, sizes "
            f"{list(options.sizes)}, dtypes {list(options.dtypes)}"
        )
    # Everything is compiled before the first is timed: all processors at once.
    lists = {each.op: listed(each.op, each.rows, each.which, options, say) for each in work}
    tasks = [
        ahead.Compiling(
            each.op, candidates.judged_size(each.op, each.rows[i], each.rows),
            screening.dtype(each.rows[i]), chip, each.rows[i], dict(candidate["config"]),
            tuple(each.rows), launchers=True,
        )
        for each in work
        for i in each.which
        for candidate in lists[each.op][i]
    ]  # fmt: skip
    ahead.everywhere(
        ahead.warm_one, tasks, screening.crashed, say, "candidates were compiled ahead"
    )
    for each in work:
        trials = Trials(each.op, device, say)
        save = each.save if options.write else _nothing
        log, lists_of = each.log, lists[each.op]
        common = (options, log)
        log.begun.overdue = partial(_overdue, each.op, left, start, say)
        try:
            # Each is compared as soon as it is tuned: rows of gradients take the forward that is used.
            for i in each.found:
                mine = [i] if i in each.which else []
                if not tune(
                    each.op, each.rows, mine, *common, lists_of, trials.row, left, save, say
                ) or not compare(each.op, each.rows, [i], *common, trials.rivals, left, save, say):
                    return False
        except begun.ContextLost as error:
            say(f"{each.op}: the device's context is lost, the command runs itself again: {error}")
            begun.restart(left(), start)
            raise
    say(f"all rows are through in {time.monotonic() - began:.0f} s; a gain is over {1 - GAIN:.0%}")
    return True


def _overdue(
    op: str, left: Callable[[], float], start: begun.Start, say: Callable[[str], None]
) -> None:
    say(
        f"{op}: what runs is not through in {tune_log.PATIENCE_SECONDS:.0f} s, the command runs itself again"
    )
    begun.restart(left(), start)


@dataclass
class _Work:
    """One operator: its rows, found for this chip and, without those tuned before, to do."""

    op: str
    file: Path
    rows: list[Row]
    found: list[int]
    which: list[int]
    log: Log

    def save(self) -> None:
        write_whole(self.file, text(self.rows).encode())


def _work(
    op: str, options: Options, chip: int, hardware: Mapping[str, str], until: float,
    since: str,
) -> _Work:  # fmt: skip
    file = options.folder / f"{op}.json"
    if not file.is_file():
        raise ValueError(f"OP is {op!r}: there is no {file.name} to tune")
    rows = json.loads(file.read_text(encoding="utf-8"))["rows"]
    found = screening.chosen(rows, chip, options.kernels, options.sizes, options.dtypes)
    log = Log(op, options.results, {**screening.origin(op), **hardware}, until, since)
    found.sort(key=lambda i: _order(op, rows[i], rows))
    which = [i for i in found if not (options.resume and log.tuned(rows[i]))]
    return _Work(op, file, rows, found, which, log)


def _order(op: str, row: Row, rows: list[Row]) -> tuple[object, ...]:
    """Of the work. Rows of one width, which share inputs and truth, come together, and each kernel behind

    those that it is compared with. Specialised warps come last: where all of them wait for ever,
    nothing has to wait for that.
    """
    kernel = row["kernel"]
    last = (candidates.direction(kernel) == "backward", (op, kernel) in candidates.IN_PLACE_OF)
    special = kernel.endswith("_specialised")
    return special, candidates.judged_size(op, row, rows), row["dtypes"], *last


def _nothing() -> None:
    """With --dry-run."""
