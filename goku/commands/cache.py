"""`goku cache`: make text embeddings or latents ahead of training."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from goku.parallelize import ParallelContext
    from goku.run_config import RunConfig

__all__ = ["HELP", "add", "run"]

HELP = """examples:
  goku cache text configs/small.yaml         embeddings of every caption and of the empty prompt
  goku cache latents configs/small.yaml out=runs/first
  torchrun --nproc-per-node 8 -m goku.cli cache latents configs/small.yaml

What is there already is kept: run it again after an interruption and it goes on. Of a recipe all stages are done, or
one with --stage. The last line on stdout is JSON: items, made, present, quarantined, bytes, seconds."""


def add(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the verb to the command line."""
    cache = verbs.add_parser(
        "cache",
        help="make text embeddings or latents ahead of training",
        epilog=HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    cache.add_argument("what", choices=("text", "latents"), help="which cache to fill")
    cache.add_argument("config", type=Path, help="YAML file of a run or a recipe")
    cache.add_argument("overrides", nargs="*", metavar="key=value", help="dotted overrides")
    cache.add_argument("--stage", metavar="NAME", help="of a recipe, this stage alone")


def run(args: argparse.Namespace) -> int:
    """Does it; returns the exit code."""
    from goku.parallelize import parallel_context
    from goku.recipe import is_recipe, load_recipe
    from goku.run_config import load_run_config
    from goku.stopping import stop_signals

    if is_recipe(args.config):
        recipe = load_recipe(args.config, args.overrides)
        stages = recipe.stages if args.stage is None else (recipe.stage(args.stage),)
        shared, configs = recipe.vae, {stage.name: stage.config for stage in stages}
        runs = [stage.config for stage in recipe.stages]
    elif args.stage is not None:
        raise ValueError(
            f"--stage is {args.stage!r}, but {args.config} is one run; allowed: with a recipe, which has `stages`"
        )
    else:
        shared = load_run_config(args.config, args.overrides)
        configs, runs = {"": shared}, [shared]
    # Every process works alone: how training arranges them does not matter here.
    with parallel_context(shared.train.device) as context, stop_signals():
        _fill(args.what, shared, configs, runs, context)
    return 0


def _fill(
    what: str,
    shared: RunConfig,
    configs: dict[str, RunConfig],
    runs: list[RunConfig],
    context: ParallelContext,
) -> None:
    """configs: those to cache for, by stage; runs: all that the VAE is for."""
    # A frame of its own: what refers to process groups is gone before they are destroyed.
    from dataclasses import asdict

    from goku.caching import CacheSummary, Told, cache_latents, cache_text
    from goku.prepare import dataset_fields, prepare_text, prepare_vae
    from goku.run_folder import check_cache, check_own_folders
    from goku.vae import has_vae

    # With all that it makes elsewhere, `out` is not written to.
    inside = shared.cache_folder.is_relative_to(shared.out)
    if inside or (what == "latents" and not has_vae(shared.vae.path)):
        context.on_main(lambda: check_own_folders(shared))
    context.on_main(lambda: check_cache(shared))
    told = Told(context)
    parts = []
    if what == "text":
        text = prepare_text(shared, context)
        for name, config in configs.items():
            with dataset_fields(config):
                parts.append(cache_text(config, context, text, told, stage=name))
    else:
        with dataset_fields(shared):
            vae = prepare_vae(shared, context, runs)
        for name, config in configs.items():
            with dataset_fields(config):
                parts.append(cache_latents(config, context, vae, told, stage=name))
    if context.is_main:
        print(json.dumps({"cache": what} | asdict(sum(parts, CacheSummary()))), flush=True)
