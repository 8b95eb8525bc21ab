"""`goku train`: train or resume a run, or all stages of a recipe."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    from goku.parallelize import ParallelContext
    from goku.recipe import Recipe
    from goku.run_config import RunConfig
    from goku.stopping import StopRequest

__all__ = ["HELP", "add", "run"]

HELP = """examples:
  goku train configs/small.yaml out=runs/first
  goku train configs/small.yaml out=runs/first optimizer.lr=3e-4 train.steps=2000
  goku train configs/small.yaml out=runs/first --dry-run
  torchrun --nproc-per-node 2 -m goku.cli train configs/small.yaml out=runs/first
  goku train configs/goku-2b.yaml --dry-run
  goku train configs/tiny.yaml stages.i2v.train.steps=100
  goku train configs/tiny.yaml --stage t2i

A recipe (a file with `stages`) trains its stages in order, each in OUT/stages/NAME; finished ones are passed by. A run
whose folder holds a checkpoint is resumed. SIGTERM or Ctrl-C finishes the step, writes a checkpoint, exits 0;
before the first step (a VAE in training, latents being encoded) it ends at once, and the VAE's training starts over."""


def add(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the verb to the command line."""
    train = verbs.add_parser(
        "train",
        help="train or resume a run, or a recipe's stages",
        epilog=HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    train.add_argument("config", type=Path, help="YAML file of a run or a recipe")
    train.add_argument("overrides", nargs="*", metavar="key=value", help="dotted overrides")
    train.add_argument("--stage", metavar="NAME", help="of a recipe, this stage alone")
    train.add_argument(
        "--dry-run",
        action="store_true",
        help="print the resolved run or the stages, size and memory, and stop, with 2 where the VAE or the text "
        "encoder is missing, `out` holds another run or other things, or the validation's file cannot be used; does "
        "not look at the data",
    )
    train.add_argument(
        "--stopped-exit-code",
        type=int,
        default=0,
        choices=range(256),
        metavar="N",
        help="exit code after a stop by signal that was obeyed, default 0: for a scheduler that is to begin it again",
    )
    train.add_argument(
        "--profile", action="store_true", help="write a torch.profiler trace of steps 3-5"
    )


def run(args: argparse.Namespace) -> int:
    """Does it; returns the exit code."""
    from goku.recipe import is_recipe, load_recipe
    from goku.run_config import load_run_config
    from goku.run_folder import check_not_foreign
    from goku.validation import read_validation

    if is_recipe(args.config):
        recipe = load_recipe(args.config, args.overrides)
        if args.dry_run:
            from goku.dry_run import describe_recipe

            code = _shown(describe_recipe(recipe, args.stage), recipe.vae)
            check_not_foreign(recipe.vae)
            for stage in recipe.stages:
                read_validation(stage.config)
            return code
        return _train_recipe(recipe, args.stage, args.profile, args.stopped_exit_code)
    if args.stage is not None:
        raise ValueError(
            f"--stage is {args.stage!r}, but {args.config} is one run; allowed: with a recipe, which has `stages`"
        )
    config = load_run_config(args.config, args.overrides)
    if args.dry_run:
        from goku.dry_run import describe
        from goku.run_checkpoints import check_resumable

        code = _shown(describe(config), config)
        check_not_foreign(config)
        check_resumable(config)
        read_validation(config)
        return code
    return _train_run(config, args.profile, args.stopped_exit_code)


def _shown(report: str, config: RunConfig) -> int:
    """Prints it, and what the run would stop for at once. config: with the VAE and the text encoder of all stages."""
    from goku.dry_run import missing

    print(report, flush=True)
    lacks = missing(config)
    for line in lacks:
        print(f"goku train: {line}", file=sys.stderr)
    return 2 if lacks else 0


def _train_run(config: RunConfig, profile: bool, stopped: int) -> int:
    from goku.data.listings import Listings
    from goku.parallelize import check_kernels, check_policies, parallel_context
    from goku.prepare import (
        check_listed,
        check_validation,
        prepare_datasets,
        prepare_vae,
        prepare_validator,
    )
    from goku.run_checkpoints import check_resumable
    from goku.run_folder import check_own_folders
    from goku.stopping import stop_signals
    from goku.trainer import Trainer

    def trained(context: ParallelContext, stop: StopRequest) -> int:
        # A frame of its own: what refers to process groups is gone before they are destroyed.
        # Before the hours that latents may take.
        check_kernels(config.kernels, context)
        context.on_main(lambda: check_own_folders(config))
        context.on_main(lambda: check_resumable(config))
        check_validation([config], context)
        listings = Listings(context.from_main)
        check_listed(config, context, listings)
        vae = prepare_vae(config, context)
        training, unseen, text = prepare_datasets(config, context, vae, listings=listings)
        listings.forget()
        validator = prepare_validator(config, context, vae, text)
        trainer = Trainer(config, context, training, vae, text, unseen, validator=validator)
        return _exit_code(lambda: trainer.run(stop, profile), stopped)

    check_policies(config.model, config.sharding, config.activation_checkpointing)
    joined = parallel_context(config.train.device, dims=config.parallel)
    with joined as context, stop_signals() as stop:
        return trained(context, stop)


def _train_recipe(recipe: Recipe, only: str | None, profile: bool, stopped: int) -> int:
    from goku.parallelize import check_kernels, check_policies, parallel_context
    from goku.run_folder import check_own_folders
    from goku.stages import run_recipe
    from goku.stopping import stop_signals

    if only is not None:
        recipe.stage(only)  # refuses a name that is none
    for stage in recipe.stages:
        config = stage.config
        try:
            check_policies(config.model, config.sharding, config.activation_checkpointing)
        except ValueError as error:
            raise ValueError(f"stages.{stage.name}.{error}") from error
    joined = parallel_context(recipe.vae.train.device)
    with joined as context, stop_signals() as stop:
        for stage in recipe.stages:
            check_kernels(stage.config.kernels, context)
        context.on_main(lambda: check_own_folders(recipe.vae))
        return _exit_code(
            lambda: run_recipe(recipe, context, stop, only=only, profile=profile), stopped
        )


def _exit_code(train: Callable[[], str], stopped: int) -> int:
    from goku.stopping import TrainingStopped

    try:
        return stopped if train() == "stopped" else 0
    except TrainingStopped as error:
        print(f"goku train: {error}", file=sys.stderr)
        return 1
