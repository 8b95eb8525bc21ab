"""`goku doctor`: say what a dataset holds and what cannot be used."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

__all__ = ["HELP", "add", "run"]

HELP = """examples:
  goku doctor media/                         a folder of media with sidecar .txt
  goku doctor data.jsonl --max-frames 33 --video-pixels 65536
  goku doctor data.csv --config configs/small.yaml --json"""


def add(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the verb to the command line."""
    doctor = verbs.add_parser(
        "doctor",
        help="say what a dataset holds and what cannot be used",
        epilog=HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    doctor.add_argument(
        "dataset", type=Path, help="folder with sidecar .txt, or .jsonl/.csv manifest"
    )
    doctor.add_argument(
        "--config", type=Path, help="take data and packing settings from this run config"
    )
    doctor.add_argument("--image-pixels", type=int, help="pixel budget of an image")
    doctor.add_argument("--video-pixels", type=int, help="pixel budget of a video frame")
    doctor.add_argument("--max-frames", type=int, help="longest clip, 4k + 1")
    doctor.add_argument("--tokens-per-step", type=int)
    doctor.add_argument("--tokens-per-pack", type=int)
    doctor.add_argument("--workers", type=int)
    doctor.add_argument("--quick", action="store_true", help="read headers only, decode nothing")
    doctor.add_argument("--json", action="store_true", help="machine-readable")


def run(args: argparse.Namespace) -> int:
    """Does it; returns the exit code."""
    from dataclasses import replace

    from goku.data import DataConfig, doctor
    from goku.packing import PackingConfig, sample_cost
    from goku.run_config import load_run_config

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
    report = doctor(data, packing, quick=args.quick, cost=cost)
    print(report.to_json() if args.json else report.to_text())
    return 0 if report.ok else 2
