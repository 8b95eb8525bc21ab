"""The command `goku`: demo, train, sample, doctor, ckpt.

Exit codes: 0 done (also after a stop by signal, with its checkpoint written), 1 the work failed, 2 bad input.
Those of ckpt are in `goku_runtime.cli`, which it is forwarded to.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from goku_runtime.cli import add_ckpt, run_ckpt

if TYPE_CHECKING:
    from goku.parallelize import ParallelContext
    from goku.run_config import RunConfig
    from goku.sampler import Loaded
    from goku.trainer import StopRequest

__all__ = ["main", "parser"]

_TRAIN_HELP = """examples:
  goku train configs/small.yaml out=runs/first
  goku train configs/small.yaml out=runs/first optimizer.lr=3e-4 train.steps=2000
  goku train configs/small.yaml out=runs/first --dry-run
  torchrun --nproc-per-node 2 -m goku.cli train configs/small.yaml out=runs/first

A run whose folder holds a checkpoint is resumed. SIGTERM or Ctrl-C finishes the step, writes a checkpoint, exits 0;
before the first step (a VAE in training, latents being encoded) it ends at once, and the VAE's training starts over."""

_SAMPLE_HELP = """examples:
  goku sample runs/first --prompt "a cup of coffee" --height 128 --width 160
  goku sample runs/first --prompt "two cyclists" --height 80 --width 192 --frames 17 --seed 7 --count 4
  torchrun --nproc-per-node 2 -m goku.cli sample runs/first --prompts prompts.txt"""

_DOCTOR_HELP = """examples:
  goku doctor media/                         a folder of media with sidecar .txt
  goku doctor data.jsonl --max-frames 33 --video-pixels 65536
  goku doctor data.csv --config configs/small.yaml --json"""

_DEMO_HELP = """examples:
  goku demo                       about 8 minutes on 2 cores; writes demo-out/report.html
  goku demo --out /tmp/demo       elsewhere
  goku demo --media wheels/       without network: a folder with the three packages' wheels"""


def parser() -> argparse.ArgumentParser:
    """The command line of every verb."""
    root = argparse.ArgumentParser(
        prog="goku", description="Joint image-video generation by rectified flow."
    )
    verbs = root.add_subparsers(
        dest="verb", required=True, metavar="{demo,train,sample,doctor,ckpt}"
    )
    raw = argparse.RawDescriptionHelpFormatter

    demo = verbs.add_parser(
        "demo",
        help="learn real pictures and clips, survive a kill, sample",
        epilog=_DEMO_HELP,
        formatter_class=raw,
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

    train = verbs.add_parser(
        "train", help="train or resume a run", epilog=_TRAIN_HELP, formatter_class=raw
    )
    train.add_argument("config", type=Path, help="YAML file")
    train.add_argument("overrides", nargs="*", metavar="key=value", help="dotted overrides")
    train.add_argument(
        "--dry-run",
        action="store_true",
        help="print the resolved run, its size and memory, and stop; does not look at the data",
    )
    train.add_argument(
        "--profile", action="store_true", help="write a torch.profiler trace of steps 3-5"
    )

    sample = verbs.add_parser(
        "sample", help="generate from a run's checkpoint", epilog=_SAMPLE_HELP, formatter_class=raw
    )
    sample.add_argument("run", type=Path, help="a run's folder, or one checkpoint in it")
    sample.add_argument("--prompt", action="append", default=[], help="may be given several times")
    sample.add_argument("--prompts", type=Path, help="text file, one prompt a line")
    sample.add_argument("--height", type=int, default=128)
    sample.add_argument("--width", type=int, default=128)
    sample.add_argument("--frames", type=int, default=1, help="4k + 1; 1 is an image (default)")
    sample.add_argument(
        "--count", type=int, default=1, help="samples per prompt, with seeds seed, seed + 1, ..."
    )
    sample.add_argument("--seed", type=int, default=0)
    sample.add_argument("--steps", type=int, default=30, help="integration steps")
    sample.add_argument("--method", choices=("euler", "heun"), default="euler")
    sample.add_argument(
        "--guidance", type=float, default=1.0, help="classifier-free guidance; 1 is none (default)"
    )
    sample.add_argument("--shift", type=float, default=1.0, help="timestep shift towards noise")
    sample.add_argument("--fps", type=int, default=12)
    sample.add_argument(
        "--sp",
        type=int,
        default=1,
        help="how many processes share the tokens of each sample; torchrun starts a multiple of it",
    )
    sample.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    sample.add_argument(
        "--out", type=Path, default=Path("samples"), help="folder (default: samples)"
    )

    doctor = verbs.add_parser(
        "doctor",
        help="say what a dataset holds and what cannot be used",
        epilog=_DOCTOR_HELP,
        formatter_class=raw,
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
    verb = {"demo": _demo, "train": _train, "sample": _sample, "doctor": _doctor}[args.verb]
    try:
        return verb(args)
    except (ValueError, OSError, ImportError) as error:
        # Bad input, a missing part, or a machine that says no (disk full): nothing half-written stays, and what was
        # complete before is still there.
        print(f"goku {args.verb}: {error}", file=sys.stderr)
        return 2
    except FloatingPointError as error:  # the VAE's training diverged
        print(f"goku {args.verb}: {error}", file=sys.stderr)
        return 1


def _demo(args: argparse.Namespace) -> int:
    from goku.demo import DemoFailed, run_demo

    try:
        return run_demo(args.out, media=args.media, overrides=args.overrides)
    except DemoFailed as error:
        print(f"goku demo: {error}", file=sys.stderr)
        return 1


def _train(args: argparse.Namespace) -> int:
    from goku.run_config import load_run_config

    config = load_run_config(args.config, args.overrides)
    if args.dry_run:
        from goku.dry_run import describe

        print(describe(config))
        return 0
    return _train_run(config, args.profile)


def _train_run(config: RunConfig, profile: bool) -> int:
    from goku.parallelize import check_policies, parallel_context
    from goku.prepare import prepare_datasets, prepare_vae
    from goku.trainer import Trainer, TrainingStopped, stop_signals

    def run(context: ParallelContext, stop: StopRequest) -> int:
        # A frame of its own: what refers to process groups is gone before they are destroyed.
        vae = prepare_vae(config, context)
        training, unseen, text = prepare_datasets(config, context, vae)
        trainer = Trainer(config, context, training, vae, text, unseen)
        try:
            trainer.run(stop, profile)
        except TrainingStopped as error:
            print(f"goku train: {error}", file=sys.stderr)
            return 1
        return 0

    check_policies(config.model, config.sharding, config.activation_checkpointing)
    joined = parallel_context(config.train.device, dims=config.parallel)
    with joined as context, stop_signals() as stop:
        return run(context, stop)


def _sample(args: argparse.Namespace) -> int:
    from goku.media_files import file_stem
    from goku.metrics import RunLog, progress_bar
    from goku.parallelize import ParallelDims, parallel_context
    from goku.precision import autocast_dtype
    from goku.sampler import Request, SampleConfig, generate_share, load_for_sampling, save_media

    prompts = list(args.prompt)
    if args.prompts is not None:
        try:
            lines = args.prompts.read_text(encoding="utf-8").splitlines()
        except UnicodeDecodeError as error:
            raise ValueError(f"--prompts {args.prompts} is not UTF-8 text: {error}") from error
        prompts += [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise ValueError("no prompt given; allowed: --prompt TEXT (repeatable) or --prompts FILE")
    if args.fps < 1:
        raise ValueError(f"--fps is {args.fps}; allowed: >= 1")
    if args.count < 1:
        raise ValueError(f"--count is {args.count}; allowed: >= 1")
    cases = [
        (row, prompt, args.seed + k)
        for row, prompt in enumerate(prompts)
        for k in range(args.count)
    ]
    requests = [
        Request(prompt, args.height, args.width, args.frames, seed) for _, prompt, seed in cases
    ]
    tokens = ((args.frames - 1) // 4 + 1) * (args.height // 16) * (args.width // 16)
    if not 1 <= args.sp <= tokens:
        raise ValueError(
            f"--sp is {args.sp}; allowed: 1 to {tokens}, the tokens of a sample of this size"
        )
    # Every process holds the whole model: nothing is sharded but the tokens.
    with parallel_context(args.device, dims=ParallelDims(sp=args.sp)) as context:
        settings = SampleConfig(
            steps=args.steps,
            method=args.method,
            guidance=args.guidance,
            shift=args.shift,
            precision=autocast_dtype("auto", context.device),
        )
        loaded: Loaded = load_for_sampling(args.run, context.device)
        with progress_bar(RunLog(None, total_steps=0).console) as bar:
            task = bar.add_task("sample", total=None, info="", visible=context.is_main)

            def on_step(done: int, total: int) -> None:
                bar.update(task, completed=done, total=total)

            for index, video in generate_share(loaded, requests, settings, context, on_step):
                row, prompt, seed = cases[index]
                path = save_media(
                    video, args.out / f"{row:04d}_{file_stem(prompt[:40])}_seed{seed}", args.fps
                )
                print(f"{path}  {prompt}", flush=True)
    return 0


def _doctor(args: argparse.Namespace) -> int:
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


if __name__ == "__main__":
    sys.exit(main())
