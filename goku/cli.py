"""The command `goku`: demo, train, sample, doctor, cache, export, ckpt.

Exit codes: 0 done (also after a stop by signal, with its checkpoint written), 1 the work failed, 2 bad input, or a
machine that says no (in training: before its first step).
Those of ckpt are in `goku_runtime.cli`, which it is forwarded to.
"""

from __future__ import annotations

import argparse
import io
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from goku.commands import cache, demo, doctor, export, sample, train
from goku.stopping import in_words
from goku_runtime.cli import add_ckpt, add_version, run_ckpt

__all__ = ["VERBS", "main", "parser"]

VERBS = {
    "demo": demo,
    "train": train,
    "sample": sample,
    "doctor": doctor,
    "cache": cache,
    "export": export,
}


def parser() -> argparse.ArgumentParser:
    """The command line of every verb."""
    root = argparse.ArgumentParser(
        prog="goku", description="Joint image-video generation by rectified flow."
    )
    add_version(root)
    verbs = root.add_subparsers(
        dest="verb", required=True, metavar="{" + ",".join([*VERBS, "ckpt"]) + "}"
    )
    for verb in VERBS.values():
        verb.add(verbs)
    add_ckpt(verbs)
    return root


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb; returns the exit code."""
    root = parser()
    # argparse closes the list of overrides at the first option, but `goku train run.yaml --dry-run a=b` is meant too.
    args, rest = root.parse_known_args(argv)
    if rest and not (hasattr(args, "overrides") and all("=" in r and r[0] != "-" for r in rest)):
        root.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        args.overrides += rest
    with _every_name_printed(), _plain_warnings():
        if args.verb == "ckpt":
            return _done(args, _run_on_stages)
        return _done(args, VERBS[args.verb].run)


def _run_on_stages(args: argparse.Namespace) -> int:
    """A ckpt command. In the paths that it reads, a recipe's folder stands for the last checkpoint of the last stage
    that has one, as it does in the other commands; the runtime, whose command it is, knows no recipes."""
    for name in ("path", "a", "b") if args.command != "probe" else ():
        path = getattr(args, name, None)
        if path is not None and (path / "recipe.yaml").is_file():
            from goku.trained import last_stage

            found = last_stage(path)
            if found is not None:
                print(f"goku ckpt: of {path} it is {found}", file=sys.stderr)
                setattr(args, name, found)
    return run_ckpt(args)


def _done(args: argparse.Namespace, run: Callable[[argparse.Namespace], int]) -> int:
    try:
        code = run(args)
        sys.stdout.flush()
        return code
    except (
        BrokenPipeError
    ):  # `| head` has seen enough; what Python writes at its end goes nowhere either
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except (ValueError, OSError, ImportError) as error:
        # Bad input, a missing part, or a machine that says no (disk full): nothing half-written stays, and what was
        # complete before is still there.
        print(f"goku {args.verb}: {in_words(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:  # before its work began, which answers signals itself
        print(f"goku {args.verb}: interrupted", file=sys.stderr)
        return 130
    except FloatingPointError as error:  # the VAE's training diverged, or a sample did
        print(f"goku {args.verb}: {error}", file=sys.stderr)
        return 1
    except MemoryError:
        print(f"goku {args.verb}: out of memory", file=sys.stderr)
        return 1
    except RuntimeError as error:
        from goku.parallelize import lost_process  # what raises this has imported it

        lost = lost_process(error)
        if lost is None:
            raise
        # At once: `print` writes the end of the line by itself, and other processes write as well.
        sys.stderr.write(f"goku {args.verb}: {lost}\n")
        return 1


@contextmanager
def _plain_warnings() -> Iterator[None]:
    """Within it a warning is one line in words: where in the source it comes from is nothing to a user."""
    before = warnings.formatwarning
    warnings.formatwarning = lambda message, *_: f"goku: warning: {message}\n"
    try:
        yield
    finally:
        warnings.formatwarning = before


@contextmanager
def _every_name_printed() -> Iterator[None]:
    """Within it standard output shows what it has no bytes for (a file name that is not UTF-8, half an emoji) as an
    escape, as standard error and the doctor's page always do; else one name would cost the whole report."""
    stdout = sys.stdout
    if not isinstance(stdout, io.TextIOWrapper) or stdout.errors != "strict":
        yield  # text that is kept as text, or what the caller asked for
        return
    stdout.reconfigure(errors="backslashreplace")
    try:
        yield
    finally:
        stdout.reconfigure(errors="strict")


if __name__ == "__main__":
    sys.exit(main())
