"""The benchmarks' command: python -m bench run | report | prune | tune | screen | warm | peers."""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import torch

from bench import harness, peers, report, running, screening, tune, warm

EXAMPLES = """\
examples, from the repository with the packages installed (or kernels, runtime and . on PYTHONPATH):
  python -m bench peers                           which peers are installed, and why others are not
  python -m bench run                             every benchmark, on the GPU if there is one
  python -m bench run adaln_modulate --only 64K   one operator on the packs of 64K tokens
  python -m bench run varlen_attention --only goku-2b "one clip" --peers goku flash
  python -m bench run step --peers full           whole training steps that recompute every block
  python -m bench run --resume --limit 440        go on where the last run stopped, for 440 s
  python -m bench report                          docs/performance.md and its plots from the rows
  python -m bench prune                           drop the rows that newer ones replace
  python -m bench warm                            compile on all processors what they launch
  python -m bench screen --write                  which configurations may win; needs no GPU
  python -m bench tune --limit 300 --resume       measure those on this GPU

The parallel runtime has commands of its own, for all ranks of a run:
  torchrun --nproc-per-node 2 -m bench.exchange --help
  torchrun --nproc-per-node 2 -m bench.policies --help
And so have the checkpoints, and the longest sequence that one GPU trains:
  python -m bench.checkpoint --help
  python -m bench.longest --help

On a CPU `run` measures small shapes; its rows say so and are never mixed with a GPU's.
Exit codes: 0 well; 1 a result of ours is wrong or failed, or time ran out; 2 bad input.
"""


def positive(text: str) -> float:
    """A number >= 0, for argparse."""
    value = float(text)
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text}: allowed are finite numbers >= 0")
    return value


def parser() -> argparse.ArgumentParser:
    """The command line."""
    raw = argparse.RawDescriptionHelpFormatter
    top = argparse.ArgumentParser(
        prog="python -m bench", description="Benchmarks of the operators, of one block and of whole steps.",
        epilog=EXAMPLES, formatter_class=raw,
    )  # fmt: skip
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")

    run = commands.add_parser("run", help="measure", epilog=EXAMPLES, formatter_class=raw)
    run.add_argument("operators", nargs="*", metavar="OP",
                     help=f"all, or some of {', '.join(running.BENCHMARKS)}")  # fmt: skip
    run.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    run.add_argument("--seconds", type=positive, default=1.0,
                     help="of timing per problem and direction, all peers together (1)")  # fmt: skip
    run.add_argument("--only", nargs="+", default=[], metavar="PART",
                     help="cases with all of these in model, pack or dtype")  # fmt: skip
    run.add_argument("--peers", nargs="+", default=[], metavar="PART",
                     help="peers with one of these in their name")  # fmt: skip
    run.add_argument("--resume", action="store_true", help="leave out what is measured already")
    run.add_argument("--limit", type=positive, default=None, help="begin nothing after so many s")
    run.add_argument("--out", type=Path, default=harness.RESULTS, help="folder of results")

    shown = commands.add_parser("report", help="render the pages of docs/ and their plots")
    shown.add_argument("--results", type=Path, default=harness.RESULTS)
    shown.add_argument("--docs", type=Path,
                       help="folder of the pages (docs/; of other results the folder itself)")  # fmt: skip

    pruned = commands.add_parser("prune", help="drop the rows that newer ones replace")
    pruned.add_argument("--results", type=Path, default=harness.RESULTS)

    tuned = commands.add_parser("tune", help="measure launch configurations on this GPU",
                                description=tune.__doc__, formatter_class=raw)  # fmt: skip
    _choice(tuned)
    tuned.add_argument("--limit", type=positive, default=float("inf"),
                       help="begin nothing new after so many s")  # fmt: skip
    tuned.add_argument("--resume", action="store_true", help="leave out rows that are tuned")
    tuned.add_argument(
        "--dry-run", action="store_true", help="leave the configurations as they are"
    )

    screened = commands.add_parser("screen", help="compile configurations without a GPU",
                                   description=screening.__doc__, formatter_class=raw)  # fmt: skip
    _choice(screened)
    screened.add_argument("--chip", type=int, default=90, choices=(90,))
    screened.add_argument("--write", action="store_true", help="keep the tables")

    warmed = commands.add_parser("warm", help="fill Triton's cache, on all processors",
                                 description=warm.__doc__, formatter_class=raw)  # fmt: skip
    warmed.add_argument("operators", nargs="*", metavar="OP", help="all by default")
    warmed.add_argument("--chip", type=int, choices=(80, 90, 100), help="of a GPU that is not here")

    commands.add_parser("peers", help="which peers are present and which absent")
    return top


def _choice(command: argparse.ArgumentParser) -> None:
    command.add_argument("operators", nargs="*", metavar="OP", help="all by default")
    command.add_argument("--only", nargs="+", default=[], metavar="KERNEL", help="kernels of rows")
    command.add_argument("--sizes", nargs="+", type=int, default=[], help="sizes of rows")
    command.add_argument("--dtypes", nargs="+", default=[], help="dtypes that rows are judged in")
    command.add_argument("--kept", type=int, default=screening.KEPT,
                         help=f"candidates of a row beside its own ({screening.KEPT})")  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    try:
        if options.command == "peers":
            for name, status in peers.status():
                print(f"{name:24} {status}")
            return 0
        if options.command == "report":
            return _report(options.results, options.docs)
        if options.command == "prune":
            for path, (before, after) in harness.prune(options.results).items():
                print(f"{path}: {after} rows of {before}")
            return 0
        if options.command in ("tune", "screen", "warm"):
            return 0 if _compiled(options) else 1
        return _run(options)
    except ValueError as error:
        print(f"python -m bench: {error}", file=sys.stderr)
        return 2


def _report(results: Path, docs: Path | None) -> int:
    # These need the checkpoints' native module, which the other commands do without.
    try:
        from bench import checkpoint_report, parallel_report
    except ImportError as error:
        raise ValueError(f"report: {error}; `pip install .` in the repository builds it") from error
    if not results.is_dir():
        raise ValueError(f"--results is {str(results)!r}: allowed is a folder of rows")
    if docs is None:  # what somebody measured elsewhere does not belong on the repository's pages
        same = results.resolve() == harness.RESULTS.resolve()
        docs = harness.ROOT / "docs" if same else results
    for page in (report, parallel_report, checkpoint_report):
        for path in page.write(results, docs):
            print(path)
    return 0


def _compiled(options: argparse.Namespace) -> bool:
    """The commands that compile configurations."""
    ops = list(options.operators or running.OPERATORS)
    _known(ops, running.OPERATORS)
    if find_spec("triton") is None:
        raise ValueError(f"{options.command} needs triton: pip install triton")
    if options.command == "warm":
        return warm.main(ops, options.chip)
    asked = (options.only, options.sizes, options.dtypes)
    if options.command == "screen":
        screening.main(ops, options.chip, *asked, keep=options.write, kept=options.kept)
        return True
    chosen = tune.Options(
        *asked, limit=options.limit, kept=options.kept, resume=options.resume,
        write=not options.dry_run,
    )  # fmt: skip
    return tune.main(ops, chosen)


def _run(options: argparse.Namespace) -> int:
    names = list(options.operators or running.BENCHMARKS)
    _known(names, running.BENCHMARKS)
    device = _device(options.device)
    if device.type == "cpu":
        print(
            f"measuring a CPU ({harness.hardware(device)['device']}) on small shapes, without the "
            "Triton kernels, which need a GPU"
        )
    limit = float("inf") if options.limit is None else options.limit
    chosen = running.Options(
        device=device, out=options.out, seconds=options.seconds, only=options.only,
        peers=options.peers, resume=options.resume,
    )  # fmt: skip
    if not any(work.peers for name in names for work in running.works(name, chosen)):
        raise ValueError(f"nothing fits --only {options.only} and --peers {options.peers}")
    try:
        options.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"--out is {str(options.out)!r}: {error.strerror}") from error
    began, good = time.monotonic(), True
    for name in names:
        left = limit - (time.monotonic() - began)
        good = running.run(name, dataclasses.replace(chosen, limit=left)) and good
    shown = "" if options.out == harness.RESULTS else f" --results {options.out}"
    print(f"rows are in {options.out}; python -m bench report{shown} shows them")
    return 0 if good else 1


def _known(names: Sequence[str], allowed: Sequence[str]) -> None:
    for name in names:
        if name not in allowed:
            raise ValueError(f"OP is {name!r}: allowed are {', '.join(allowed)}")


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"--device is {name!r}: {error}") from error
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"--device is {name!r}: allowed are cpu and cuda")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"--device is {name!r}: there is no CUDA device on this machine")
    return device


if __name__ == "__main__":
    sys.exit(main())
