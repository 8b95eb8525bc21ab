"""The command `goku-runtime`: ckpt, what there is to do with checkpoints. `goku ckpt` is the same.

Exit codes: 0 done, 1 what was looked at is damaged (inspect, verify) or different (diff), 2 bad input, 130 interrupted.
Reports go to standard output, progress and errors to standard error.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from goku_runtime._version import own_version

__all__ = ["add_ckpt", "add_version", "main", "parser", "run_ckpt"]

_SHARED = """PATH is a checkpoint, or a folder of them or of a run, of which the latest is taken."""

_EXAMPLES = {
    "inspect": """examples:
  goku ckpt inspect runs/first                       its latest checkpoint
  goku ckpt inspect runs/first --tensors 'ema.*'     these tensors alone, and all of them
  goku ckpt inspect step_0000200 --json --parts      every part of every tensor, for programs""",
    "verify": """examples:
  goku ckpt verify runs/first
  goku ckpt verify step_0000200 --json

Exit code 0: every byte is what was written; 1: damaged; 2: there is no checkpoint to verify.""",
    "diff": """examples:
  goku ckpt diff step_0000100 step_0000200
  goku ckpt diff one other --tensors 'model.*' --by-value

Exit code 0: equal; 1: different; 2: one of them cannot be read.""",
    "reshard": """examples:
  goku ckpt reshard step_0000200 merged --ranks 1               all files in one
  goku ckpt reshard step_0000200 fewer --ranks 8
  goku ckpt reshard step_0000200 other --ranks 64 --dp-shard 8 --whole-below 64KiB

Any number of ranks can load any checkpoint: nothing has to be resharded for that.""",
    "export": """examples:
  goku ckpt export runs/first exported --prefix ema.
  goku ckpt export runs/first exported --prefix ema. --dtype bfloat16 --max-shard-size 2GB
  goku ckpt export runs/first transformer --format diffusers --config config.json --prefix ema.""",
    "probe": """examples:
  goku ckpt probe runs
  goku ckpt probe /mnt/disk --seconds 5 --bytes 256MiB""",
}


def parser() -> argparse.ArgumentParser:
    """The command line of every verb."""
    root = argparse.ArgumentParser(
        prog="goku-runtime", description="Goku's training runtime: tools for its checkpoints."
    )
    add_version(root)
    add_ckpt(root.add_subparsers(dest="verb", required=True, metavar="{ckpt}"))
    return root


def add_version(root: argparse.ArgumentParser) -> None:
    """Adds `--version` to a command line: its name, and the version of the installed package."""
    root.add_argument("--version", action=_Version, nargs=0, help="print name and version")


class _Version(argparse.Action):
    """As argparse's own, which wants the text before anybody asks for it."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: object,
        option_string: str | None = None,
    ) -> None:
        found = own_version() or "unknown version (used from a source tree, not installed)"
        print(f"{parser.prog} {found}")
        parser.exit()


def add_ckpt(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds `ckpt` and its commands to a command line's verbs; `run_ckpt` runs what was parsed."""
    names = "{inspect,verify,diff,reshard,export,probe}"
    ckpt = verbs.add_parser(
        "ckpt",
        help="inspect, verify, compare, reshard and export checkpoints",
        description="What there is to do with checkpoints; each command's --help has more. `goku ckpt` and\n"
        "`goku-runtime ckpt` are the same.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    # The command that was called is the one that a reader has.
    ckpt.epilog = _EXAMPLES_OF_ALL.replace("goku ckpt", ckpt.prog)
    commands = ckpt.add_subparsers(dest="command", required=True, metavar=names)

    def add(
        name: str, help: str, run: Callable[[argparse.Namespace], int]
    ) -> argparse.ArgumentParser:
        command = commands.add_parser(
            name,
            help=help,
            description=f"{help[0].upper()}{help[1:]}.",
            epilog=_EXAMPLES[name].replace("goku ckpt", ckpt.prog),
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        command.set_defaults(run_command=run, command_prog=command.prog)
        return command

    inspect = add("inspect", "say what a checkpoint holds, without reading its tensors", _inspect)
    inspect.add_argument("path", metavar="PATH", type=Path, help=_SHARED)
    _tensors(inspect, "list all tensors whose names match this shell pattern, and no others")
    inspect.add_argument("--parts", action="store_true", help="where each part of a tensor lies")
    _json(inspect)

    verify = add("verify", "read every byte and compare all sums; name what is damaged", _verify)
    verify.add_argument("path", metavar="PATH", type=Path, help=_SHARED)
    _json(verify)
    _progress(verify)

    diff = add("diff", "compare two checkpoints, however they were divided among ranks", _diff)
    diff.add_argument("a", metavar="A", type=Path, help=f"{_SHARED[:-1]}; so for B")
    diff.add_argument("b", metavar="B", type=Path)
    _tensors(diff, "compare only names that match this shell pattern, plain values too")
    diff.add_argument(
        "--by-value",
        action="store_true",
        help="0 and -0 are equal, and so are all NaNs; otherwise bits are compared, by which a NaN "
        "equals itself",
    )
    _json(diff)
    _progress(diff)

    reshard = add("reshard", "rewrite a checkpoint as another number of ranks would have", _reshard)
    reshard.add_argument("path", metavar="IN", type=Path, help=_SHARED.replace("PATH", "IN"))
    reshard.add_argument("out", metavar="OUT", type=Path, help="directory to make")
    reshard.add_argument(
        "--ranks",
        type=int,
        required=True,
        metavar="N",
        help="ranks, and so data files; 1 merges all",
    )
    reshard.add_argument(
        "--dp-shard",
        type=int,
        metavar="N",
        help="ranks that share a tensor, dividing its rows; must divide --ranks (default: all)",
    )
    reshard.add_argument(
        "--whole-below",
        type=_size,
        default=0,
        metavar="SIZE",
        help="do not divide smaller tensors: for many small ones and many ranks (default: 0)",
    )
    _progress(reshard)

    export = add("export", "write tensors as safetensors files, in a new folder", _export)
    export.add_argument("path", metavar="IN", type=Path, help=_SHARED.replace("PATH", "IN"))
    export.add_argument("out", metavar="OUT", type=Path, help="folder to make")
    export.add_argument(
        "--format",
        choices=("safetensors", "diffusers"),
        default="safetensors",
        help="how files are named: model*.safetensors (default) or, as a diffusers model's folder, "
        "diffusion_pytorch_model*.safetensors beside config.json",
    )
    export.add_argument(
        "--config", type=Path, metavar="FILE", help="JSON file that becomes config.json"
    )
    export.add_argument(
        "--prefix", default="", help="only tensors whose names begin with it, and without it"
    )
    _tensors(export, "only tensors whose names, without the prefix, match this shell pattern")
    export.add_argument(
        "--dtype",
        choices=("float16", "bfloat16", "float32", "float64"),
        help="convert floating-point tensors to it",
    )
    export.add_argument(
        "--max-shard-size", type=_size, default=5 * 10**9, metavar="SIZE",
        help="bytes of tensors in a file, as 5GB (default) or 512MiB",
    )  # fmt: skip
    _progress(export)

    probe = add("probe", "measure how the disk under a directory likes to be used", _probe)
    probe.add_argument("path", metavar="DIR", type=Path, help="a directory; nothing stays in it")
    probe.add_argument(
        "--seconds", type=float, default=1.0, help="no trial begins later (default: 1)"
    )
    probe.add_argument(
        "--bytes",
        type=_size,
        default=64 << 20,
        metavar="SIZE",
        help="of each file (default: 64MiB)",
    )
    _json(probe)


_EXAMPLES_OF_ALL = """examples:
  goku ckpt inspect runs/first
  goku ckpt verify runs/first
  goku ckpt export runs/first exported --prefix ema. --dtype bfloat16"""


def _tensors(command: argparse.ArgumentParser, help: str) -> None:
    command.add_argument("--tensors", metavar="PATTERN", help=help)


def _json(command: argparse.ArgumentParser) -> None:
    command.add_argument("--json", action="store_true", help="machine-readable")


def _progress(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--progress",
        action=argparse.BooleanOptionalAction,
        help="show progress on standard error (default: if that is a terminal)",
    )


def _size(text: str) -> int:
    from goku_runtime.checkpoint.tools.units import parse_size

    try:
        return parse_size(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    return run_ckpt(parser().parse_args(argv))


def run_ckpt(args: argparse.Namespace) -> int:
    """Runs a command of `ckpt`; returns the exit code."""
    run: Callable[[argparse.Namespace], int] = args.run_command
    try:
        code = run(args)
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # `| head` has seen enough
        # What Python still has to write at its end goes nowhere either.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except KeyboardInterrupt:
        print(f"{args.command_prog}: interrupted", file=sys.stderr)
        return 130
    except FileExistsError as error:  # the library's message tells of an argument of its own
        print(f"{args.command_prog}: {error.filename} exists already", file=sys.stderr)
        return 2
    except (ValueError, OSError, ImportError, MemoryError) as error:
        print(f"{args.command_prog}: {_one_line(error)}", file=sys.stderr)
        return 2


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _inspect(args: argparse.Namespace) -> int:
    from goku_runtime.checkpoint.tools import inspect

    found = inspect(args.path, tensors=args.tensors)
    print(found.to_json(parts=args.parts) if args.json else found.to_text(parts=args.parts))
    return 1 if found.problems else 0


def _verify(args: argparse.Namespace) -> int:
    from goku_runtime.checkpoint.tools.progress import ProgressBar
    from goku_runtime.checkpoint.tools.source import find
    from goku_runtime.checkpoint.tools.verifying import verify_all

    path = find(args.path).path
    with ProgressBar("verify", shown=args.progress) as bar:
        found = verify_all(path, progress=bar)
    print(found.to_json() if args.json else found.to_text())
    return 1 if found.problems else 0


def _diff(args: argparse.Namespace) -> int:
    from goku_runtime.checkpoint.tools import diff, find
    from goku_runtime.checkpoint.tools.progress import ProgressBar

    a, b = find(args.a).path, find(args.b).path
    if not args.json:
        print(f"A is {a}, B is {b}", flush=True)
    with ProgressBar("diff", shown=args.progress) as bar:
        found = diff(a, b, tensors=_pattern(args), by_value=args.by_value, progress=bar)
    print(found.to_json() if args.json else found.to_text())
    return 0 if found.equal else 1


def _reshard(args: argparse.Namespace) -> int:
    from goku_runtime.checkpoint.tools import find, reshard
    from goku_runtime.checkpoint.tools.progress import ProgressBar
    from goku_runtime.checkpoint.tools.units import count_text, size_text

    path = find(args.path).path
    print(f"{path} -> {args.out}", flush=True)
    with ProgressBar("reshard", shown=args.progress) as bar:
        written = reshard(
            path,
            args.out,
            ranks=args.ranks,
            dp_shard=args.dp_shard,
            whole_below=args.whole_below,
            progress=bar,
        )
    print(
        f"{written.path}: {size_text(written.nbytes)}, {count_text(written.data_files, 'data file')} "
        f"in {bar.seconds:.1f} s"
    )
    return 0


def _export(args: argparse.Namespace) -> int:
    from goku_runtime.checkpoint.tools import export, find
    from goku_runtime.checkpoint.tools.progress import ProgressBar
    from goku_runtime.checkpoint.tools.units import count_text, size_text

    path = find(args.path).path
    dtype = None
    if args.dtype is not None:
        import torch

        dtype = getattr(torch, args.dtype)
    print(f"{path} -> {args.out}", flush=True)
    with ProgressBar("export", shown=args.progress) as bar:
        written = export(
            path,
            args.out,
            format=args.format,
            prefix=args.prefix,
            tensors=_pattern(args),
            dtype=dtype,
            max_shard_size=args.max_shard_size,
            config=args.config,
            progress=bar,
        )
    tensors = sum(map(len, written.files.values()))
    print(
        f"{written.path}: {count_text(tensors, 'tensor')}, {size_text(written.nbytes)} in "
        f"{count_text(len(written.files), 'file')} in {bar.seconds:.1f} s"
    )
    return 0


def _probe(args: argparse.Namespace) -> int:
    from goku_runtime.checkpoint.tools.probing import probe

    found = probe(args.path, seconds=args.seconds, nbytes=args.bytes)
    print(found.to_json() if args.json else found.to_text())
    return 0


def _pattern(args: argparse.Namespace) -> str:
    return "*" if args.tensors is None else args.tensors


if __name__ == "__main__":
    sys.exit(main())
