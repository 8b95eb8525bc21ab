"""`goku export`: a trained model as a folder that stands alone."""

from __future__ import annotations

import argparse
from pathlib import Path

__all__ = ["HELP", "add", "run"]

HELP = """examples:
  goku export runs/first exported/first
  goku export runs/first exported/small --dtype bfloat16 --text-encoder copy
  goku sample exported/first --prompt "a cup of coffee"    what it is for"""


def add(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the verb to the command line."""
    export = verbs.add_parser(
        "export",
        help="write a trained model as a folder in diffusers' layout",
        epilog=HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    export.add_argument("run", type=Path, help="a run's folder, or one checkpoint in it")
    export.add_argument("out", type=Path, help="the folder to make")
    export.add_argument(
        "--weights", choices=("ema", "model"), default="ema", help="the average (default), or not"
    )
    export.add_argument(
        "--dtype",
        choices=("float32", "bfloat16"),
        default="float32",
        help="of the transformer's stored weights (default: float32, as trained)",
    )
    export.add_argument(
        "--text-encoder",
        choices=("reference", "copy"),
        default="reference",
        help="record where it lies (default), or copy its files",
    )


def run(args: argparse.Namespace) -> int:
    """Does it; returns the exit code."""
    import torch

    from goku.export import export_run
    from goku.metrics import RunLog, progress_bar
    from goku.stopping import stop_signals

    dtype = None if args.dtype == "float32" else getattr(torch, args.dtype)
    # A folder half-written is removed on the way out.
    with stop_signals(), progress_bar(RunLog(None, total_steps=0).console) as bar:
        task = bar.add_task("export", total=None, info="bytes")
        about = export_run(
            args.run, args.out, weights=args.weights, dtype=dtype, text_encoder=args.text_encoder,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )  # fmt: skip
    size = sum(path.stat().st_size for path in args.out.rglob("*") if path.is_file())
    print(f"{args.out}: step {about.step} of {about.path}, {size / 1e6:.1f} MB")
    if about.base_tokens is not None:
        print(
            "flow.resolution_shift: scheduler_config.json cannot say that the shift grows with a sample's tokens; it "
            f"says {about.shift}, that of {about.base_tokens} tokens, which `goku sample` multiplies by "
            f"sqrt(tokens / {about.base_tokens})"
        )
    return 0
