"""The command `goku`: demo, train, sample, doctor, cache, export, ckpt.

Exit codes: 0 done (also after a stop by signal, with its checkpoint written), 1 the work failed, 2 bad input.
Those of ckpt are in `goku_runtime.cli`, which it is forwarded to.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from goku.commands import cache, demo, doctor, export, sample, train
from goku_runtime.cli import add_ckpt, run_ckpt

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
    if args.verb == "ckpt":
        return run_ckpt(args)
    try:
        return VERBS[args.verb].run(args)
    except (ValueError, OSError, ImportError) as error:
        # Bad input, a missing part, or a machine that says no (disk full): nothing half-written stays, and what was
        # complete before is still there.
        print(f"goku {args.verb}: {error}", file=sys.stderr)
        return 2
    except FloatingPointError as error:  # the VAE's training diverged
        print(f"goku {args.verb}: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
