"""`goku demo`: learn real pictures and clips, survive a kill, sample."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

__all__ = ["HELP", "add", "run"]

HELP = """examples:
  goku demo                       about 8 minutes on 2 cores; writes demo-out/report.html
  goku demo --out /tmp/demo       elsewhere
  goku demo --media wheels/       without network: a folder with the three packages' wheels"""


def add(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the verb to the command line."""
    demo = verbs.add_parser(
        "demo",
        help="learn real pictures and clips, survive a kill, sample",
        epilog=HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    demo.add_argument(
        "--out",
        type=Path,
        default=Path("demo-out"),
        help="folder for everything (default: demo-out)",
    )
    demo.add_argument(
        "--media", type=Path, help="folder of wheels to take the media from instead of downloading"
    )
    demo.add_argument(
        "overrides",
        nargs="*",
        metavar="key=value",
        help="change the demo's config (e.g. train.steps=800)",
    )


def run(args: argparse.Namespace) -> int:
    """Does it; returns the exit code."""
    from goku.demo import DemoFailed, run_demo

    try:
        return run_demo(args.out, media=args.media, overrides=args.overrides)
    except DemoFailed as error:
        print(f"goku demo: {error}", file=sys.stderr)
        return 1
