"""Which pages of the demo are made: one of them, or both in one folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from goku.demo.media import DemoError
from goku.demo.recipe_run import run_recipe_demo
from goku.demo.run import run_demo
from goku.demo.watching import ended_by_signals

__all__ = ["Pages", "run_pages"]

Pages = Literal["1", "2", "all"]

_SECOND = ("recipe.html", "the whole recipe, stage by stage")


def run_pages(
    out: Path, pages: Pages = "all", *, media: Path | None = None, overrides: Sequence[str] = ()
) -> int:
    """Make pages of the demo in `out`; exit code 0 when every criterion of each holds, 1 when one does not.

    overrides: of the config of the one page that is made. SIGTERM, SIGHUP and Ctrl-C end it and what it has started, by
    SystemExit(128 + signal). Raises what `run_demo` and `run_recipe_demo` raise, and DemoError for overrides of "all".
    """
    if overrides and pages == "all":
        raise DemoError(
            f"{overrides[0]!r}: the two pages have a config each; allowed: overrides with --page 1 or --page 2"
        )
    codes = []
    with ended_by_signals():
        if pages in ("1", "all"):
            second = pages == "all" or (out / _SECOND[0]).exists()
            also = (_SECOND,) if second else ()
            codes.append(run_demo(out, media=media, overrides=overrides, also=also))
        if pages in ("2", "all"):
            codes.append(run_recipe_demo(out, media=media, overrides=overrides))
    return max(codes)
