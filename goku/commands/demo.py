"""`goku demo`: learn real pictures and clips, survive kills, sample; one run, and all stages of a recipe."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

__all__ = ["HELP", "add", "run"]

HELP = """examples:
  goku demo                       both pages, about 13 minutes on 2 cores; open demo-out/report.html
  goku demo --page 1              one run alone, about 8 minutes: demo-out/report.html
  goku demo --page 2              a recipe's stages alone, about 5 minutes: demo-out/recipe.html
  goku demo --out /tmp/demo       elsewhere
  goku demo --media wheels/       without network: a folder with the three packages' wheels"""


def add(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the verb to the command line."""
    demo = verbs.add_parser(
        "demo",
        help="learn real pictures and clips, survive kills, sample",
        epilog=HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    demo.add_argument(
        "--page",
        choices=("1", "2", "all"),
        default="all",
        help="1: one run; 2: all stages of a recipe; all: both (default)",
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
        help="change the page's config (e.g. train.steps=800; with --page 1 or 2)",
    )


def run(args: argparse.Namespace) -> int:
    """Does it; returns the exit code."""
    from goku.demo import DemoFailed, run_pages

    try:
        return run_pages(args.out, args.page, media=args.media, overrides=args.overrides)
    except DemoFailed as error:
        print(f"goku demo: {error}", file=sys.stderr)
        return 1
