"""`goku doctor`: say what a dataset holds, or what every stage of a recipe would do with its data."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from goku.data import DoctorReport
    from goku.data.stage_report import RecipeReport
    from goku.recipe import Recipe
    from goku.run_config import RunConfig

__all__ = ["HELP", "add", "run"]

HELP = """examples:
  goku doctor media/                         a folder of media with sidecar .txt
  goku doctor data.jsonl --max-frames 33 --video-pixels 65536
  goku doctor data.csv --config configs/small.yaml --json
  goku doctor configs/tiny.yaml              every stage of a recipe, each file decoded once
  goku doctor configs/tiny.yaml stages.i2v.train.steps=100 --stage i2v
  goku doctor configs/small.yaml --quick --html report.html

Exit code 0: every item of the dataset can be used, every stage of the recipe can train; otherwise 2."""

_CONFIG_SUFFIXES = (".yaml", ".yml")
# Options that set what a run or a recipe sets in its file.
_OF_A_DATASET = (
    "config", "image_pixels", "video_pixels", "max_frames", "tokens_per_step", "tokens_per_pack"
)  # fmt: skip


def add(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the verb to the command line."""
    doctor = verbs.add_parser(
        "doctor",
        help="say what a dataset holds, or what a recipe's stages would make of theirs",
        epilog=HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    doctor.add_argument(
        "dataset",
        type=Path,
        help="YAML file of a recipe or a run; or a folder of media, a .jsonl/.json/.csv table, a .tar",
    )
    doctor.add_argument(
        "overrides", nargs="*", metavar="key=value", help="dotted overrides of the YAML file"
    )
    doctor.add_argument("--stage", metavar="NAME", help="of a recipe, this stage alone")
    doctor.add_argument(
        "--config", type=Path, help="take data and packing settings from this run config"
    )
    doctor.add_argument("--image-pixels", type=int, help="pixel budget of an image")
    doctor.add_argument("--video-pixels", type=int, help="pixel budget of a video frame")
    doctor.add_argument("--max-frames", type=int, help="longest clip, 4k + 1")
    doctor.add_argument("--tokens-per-step", type=int)
    doctor.add_argument("--tokens-per-pack", type=int)
    doctor.add_argument(
        "--ranks", type=int, help="processes that will train (default: the fewest possible)"
    )
    doctor.add_argument("--workers", type=int)
    doctor.add_argument("--quick", action="store_true", help="read headers only, decode nothing")
    doctor.add_argument("--json", action="store_true", help="machine-readable")
    doctor.add_argument("--html", type=Path, metavar="PATH", help="write a page that stands alone")


def run(args: argparse.Namespace) -> int:
    """Does it; returns the exit code."""
    from goku.stopping import stop_signals

    is_config = args.dataset.suffix.lower() in _CONFIG_SUFFIXES
    with stop_signals(), _shown() as progress:
        report = _recipe(args, progress) if is_config else _dataset(args, progress)
    if args.html is not None:
        from goku.data.html_report import write_html

        write_html(report, args.html)
        print(f"wrote {args.html}", file=sys.stderr)
    print(report.to_json() if args.json else report.to_text())
    return 0 if report.ok else 2


def _recipe(args: argparse.Namespace, progress: Callable[[int, int], None]) -> RecipeReport:
    from goku.recipe import is_recipe, load_recipe
    from goku.recipe_doctor import doctor_recipe
    from goku.run_config import load_run_config

    for name in _OF_A_DATASET:
        if getattr(args, name) is not None:
            raise ValueError(
                f"--{name.replace('_', '-')} is {getattr(args, name)}, but {args.dataset} says it itself; allowed: "
                "with a dataset, or an override such as data.max_frames=33"
            )
    if args.workers is not None and args.workers < 0:
        raise ValueError(f"--workers is {args.workers}; allowed: 0 or more")
    recipe: Recipe | RunConfig
    if is_recipe(args.dataset):
        recipe = load_recipe(args.dataset, args.overrides)
    elif args.stage is not None:
        raise ValueError(
            f"--stage is {args.stage!r}, but {args.dataset} is one run; allowed: with a recipe, which has `stages`"
        )
    else:
        recipe = load_run_config(args.dataset, args.overrides)
    return doctor_recipe(
        recipe,
        stage=args.stage,
        quick=args.quick,
        ranks=args.ranks,
        workers=args.workers,
        progress=progress,
        path=str(args.dataset),
    )


def _dataset(args: argparse.Namespace, progress: Callable[[int, int], None]) -> DoctorReport:
    from goku.data import DataConfig, doctor
    from goku.packing import PackingConfig, sample_cost
    from goku.run_config import load_run_config

    if args.stage is not None or args.overrides:
        what = f"--stage {args.stage}" if args.stage is not None else args.overrides[0]
        raise ValueError(
            f"{what} is given with the dataset {args.dataset}; allowed: with the YAML file of a recipe or a run"
        )
    cost = None
    if args.config is not None:
        run = load_run_config(
            args.config, [f"data.path={json.dumps(str(args.dataset))}", "out=unused"]
        )
        data, packing, model = run.data, run.packing, run.model

        def cost(length: int) -> float:  # the trainer's
            return sample_cost(length, model.dim, text_dim=model.text_dim)

    else:
        data, packing = (
            DataConfig(path=str(args.dataset)),
            PackingConfig(tokens_per_step=16384, tokens_per_pack=16384),
        )
    given = {
        name: getattr(args, name)
        for name in ("image_pixels", "video_pixels", "max_frames", "workers")
    }
    data = replace(data, **{name: value for name, value in given.items() if value is not None})
    given = {name: getattr(args, name) for name in ("tokens_per_step", "tokens_per_pack")}
    packing = replace(
        packing, **{name: value for name, value in given.items() if value is not None}
    )
    ranks = 1 if args.ranks is None else args.ranks
    return doctor(data, packing, quick=args.quick, ranks=ranks, cost=cost, progress=progress)


@contextmanager
def _shown() -> Iterator[Callable[[int, int], None]]:
    """progress(done, total), as a bar on a terminal."""
    from goku.metrics import RunLog, progress_bar

    with progress_bar(RunLog(None, total_steps=0).console) as bar:
        task = bar.add_task("files", total=None, info="")

        def show(done: int, total: int) -> None:
            bar.update(task, completed=done, total=total)

        yield show
