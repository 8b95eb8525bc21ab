"""`goku sample`: generate from a run's checkpoint or an exported model."""

from __future__ import annotations

import argparse
import json
import math
import sys
import textwrap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from goku.given import Encoded
    from goku.parallelize import ParallelContext
    from goku.requests import Request
    from goku.sampler import SampleConfig
    from goku.text import TextEncoder
    from goku.trained import Loaded, Trained

__all__ = ["HELP", "add", "run"]

HELP = """examples:
  goku sample runs/first --prompt "a cup of coffee" --height 128 --width 160
  goku sample runs/first --prompt "two cyclists" --height 80 --width 192 --frames 17 --seed 7 --count 4
  goku sample runs/i2v/stages/i2v --image first.png --prompt "the boat leaves" --frames 49 --guidance 5
  goku sample exported/first --prompts shots.json --method ab2 --guidance 5 --guidance-interval 0.1 0.8
  goku sample --show samples/0000_shot_seed0.mp4    how a file was made
  torchrun --nproc-per-node 2 -m goku.cli sample runs/first --prompts prompts.txt

SIGTERM or Ctrl-C ends it at the next sampling step, with exit code 143 or 130; what was written stays."""

_STOPPING = (
    "goku sample: stopping at the next sampling step; what is being decoded is still written; another signal, five "
    "seconds later or more, leaves at once"
)


def add(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the verb to the command line."""
    sample = verbs.add_parser(
        "sample",
        help="generate from a run's checkpoint or an exported model",
        epilog=HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    sample.add_argument(
        "run",
        type=Path,
        nargs="?",
        help="a run's folder, one checkpoint in it, or a folder of `goku export`",
    )
    sample.add_argument(
        "--show", type=Path, metavar="FILE", help="print how FILE was made, and nothing else"
    )
    sample.set_defaults(usage_error=sample.error)
    asked = sample.add_argument_group("what is asked")
    asked.add_argument("--prompt", action="append", default=[], help="may be given several times")
    asked.add_argument(
        "--prompts",
        type=Path,
        help="file of prompts: .txt one a line; .json, .jsonl objects with prompt, height, width, "
        "frames, seed, steps, negative, image, last_image",
    )
    asked.add_argument("--negative", default="", help="what to guide away from (default: nothing)")
    asked.add_argument(
        "--height",
        type=int,
        help="default: the trained area, in the image's shape (no side beyond the trained ones) or that of the largest "
        "trained size",
    )
    asked.add_argument("--width", type=int, help="the same; both or neither")
    asked.add_argument(
        "--frames",
        type=int,
        help="4k + 1; 1 is an image (default: 1, or the trained length where images are given)",
    )
    asked.add_argument(
        "--count", type=int, default=1, help="samples per prompt, with seeds seed, seed + 1, ..."
    )
    asked.add_argument("--seed", type=int, default=0)
    asked.add_argument("--image", type=Path, help="the first frame of the clip")
    asked.add_argument("--last-image", type=Path, help="its last frame")
    asked.add_argument(
        "--given",
        action="append",
        default=[],
        metavar="FRAME:FILE",
        help="any frame of it, counted from 0; one counted from the end as --given=-5:FILE",
    )
    asked.add_argument(
        "--motion", type=float, help="motion score, for models whose training captions had one"
    )
    how = sample.add_argument_group("how it is made")
    how.add_argument("--steps", type=int, default=30, help="integration steps")
    how.add_argument("--method", choices=("euler", "heun", "ab2"), default="euler")
    how.add_argument(
        "--guidance", type=float, default=1.0, help="classifier-free guidance; 1 is none (default)"
    )
    how.add_argument(
        "--guidance-image", type=float, help="over given frames (default: as --guidance)"
    )
    how.add_argument(
        "--guidance-interval",
        type=float,
        nargs=2,
        default=(0.0, 1.0),
        metavar=("BEGIN", "END"),
        help="times in which there is guidance; 0 is noise, 1 is data (default: 0 1)",
    )
    how.add_argument(
        "--shift", type=float, help="timestep shift towards noise (default: the run's flow.shift)"
    )
    how.add_argument(
        "--hold", action="store_true", help="keep the first frame as the VAE shows --image"
    )
    how.add_argument(
        "--rope",
        choices=("scaled", "none"),
        default="scaled",
        help="beyond the trained size: positions scaled into it (default), or as they are",
    )
    how.add_argument("--fps", type=int, help="of clips (default: the run's data.fps, or 12)")
    how.add_argument(
        "--sp",
        type=int,
        default=1,
        help="how many processes share the tokens of each sample; torchrun starts a multiple of it",
    )
    how.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    how.add_argument("--out", type=Path, default=Path("samples"), help="folder (default: samples)")
    how.add_argument(
        "--overwrite",
        action="store_true",
        help="replace files of the same name (default: keep them, the new ones get _2, _3, ...)",
    )


def run(args: argparse.Namespace) -> int:
    """Does it; returns the exit code."""
    if args.show is not None:
        from goku.media_files import read_metadata

        print(json.dumps(read_metadata(args.show), indent=2, ensure_ascii=False))
        return 0
    if args.run is None:
        args.usage_error("the following arguments are required: run")
    from goku.given import check_given, encode_given
    from goku.metrics import RunLog, progress_bar
    from goku.parallelize import ParallelDims, parallel_context
    from goku.precision import autocast_dtype
    from goku.run_folder import check_writable
    from goku.sampler import (
        SampleConfig,
        describe,
        generate_share,
        load_parts,
        load_trained,
        read_trained,
        save_media,
    )
    from goku.stopping import stop_signals

    if args.fps is not None and not 1 <= args.fps < 2**31:
        raise ValueError(f"--fps is {args.fps}; allowed: 1 to 2**31 - 1")
    if args.count < 1:
        raise ValueError(f"--count is {args.count}; allowed: >= 1")
    check_writable(args.out)
    # What can be refused is refused before the weights are read.
    settings = SampleConfig(
        steps=args.steps,
        method=args.method,
        guidance=args.guidance,
        guidance_image=args.guidance_image,
        guidance_interval=tuple(args.guidance_interval),
        hold=args.hold,
    )
    about = read_trained(args.run)
    settings, cases, requests = _asked(args, about, settings)
    tokens = min(math.prod(request.grid) for request in requests)
    if not 1 <= args.sp <= tokens:
        raise ValueError(
            f"--sp is {args.sp}; allowed: 1 to {tokens}, the tokens of a sample of this size"
        )
    # Every process holds the whole model: nothing is sharded but the tokens.
    joined = parallel_context(args.device, dims=ParallelDims(sp=args.sp))
    with (
        joined as context, stop_signals(_STOPPING) as stop,
        _told_when_stopped([_stem(*case) for case in cases], context) as written,
    ):  # fmt: skip
        settings = replace(settings, precision=autocast_dtype("auto", context.device))
        if context.is_main and about.path != args.run and about.path.parents[1] != args.run:
            # A recipe's folder: its last stage is meant.
            print(f"{args.run}: sampling from {about.path}", file=sys.stderr, flush=True)
        # Of a run that still trains each process may have found another checkpoint.
        chosen = context.gather(about.path)[0]
        if chosen != about.path:
            about = read_trained(chosen)
            settings, cases, requests = _asked(args, about, settings)
        usual_fps = args.fps or max(1, round(about.fps or 12))
        if context.is_main:
            for line in _warnings(requests, about, settings, args.rope):
                print(f"warning: {line}", file=sys.stderr, flush=True)
        # Before the weights, and hours of work: what is given is encoded and what is asked for is embedded, once each,
        # so that the text encoder need not lie beside the model.
        parts = load_parts(about, context.device)
        known: Encoded = {}
        given = [encode_given(parts.vae, request, context.device, known) for request in requests]
        check_given(about.model, parts.vae, given, hold=settings.hold)
        mine = requests[context.pack_rank :: context.packs]
        prompts = _embedded(parts.text, mine, settings)
        parts.text.release()
        loaded: Loaded = load_trained(about, context.device, companions=parts)
        with progress_bar(RunLog(None, total_steps=0).console) as bar:
            task = bar.add_task("sample", total=None, info="", visible=context.is_main)

            def on_step(done: int, total: int) -> None:
                bar.update(task, completed=done, total=total)
                # Who shares a sample leaves at the same step; one that left alone would be waited for.
                if number := context.pack_max(stop.number):
                    raise SystemExit(128 + number)

            stop.graceful = True

            for index, video in generate_share(
                loaded, requests, settings, context, on_step, given=given,
                prompts=lambda strings: [prompts[string] for string in strings],
            ):  # fmt: skip
                row, shown = cases[index]
                metadata = describe(
                    requests[index], settings, step=about.step, fps=usual_fps,
                    checkpoint=about.checkpoint_id, weights=about.weights, dtype=about.dtype,
                )  # fmt: skip
                fps = shown.fps or usual_fps
                stem = _stem(row, shown)
                path = save_media(video, args.out / stem, fps, metadata, overwrite=args.overwrite)
                written.append(stem)
                # In full it is in the file itself.
                print(f"{path}  {textwrap.shorten(shown.prompt, 200)}", flush=True)
                if 0 in given[index]:
                    print(_first_frame(loaded, requests[index], given[index][0], video), flush=True)
        if stop.is_set():  # in the last sample, behind its steps
            raise SystemExit(128 + stop.number)
    return 0


@contextmanager
def _told_when_stopped(stems: Sequence[str], context: ParallelContext) -> Iterator[list[str]]:
    """Of the files of these stems those that were written are put into the list that it gives. Where a signal ends the
    block, a line says how many that are, and which are not there."""
    from goku.data.record import counted, some

    written: list[str] = []
    try:
        yield written
    except SystemExit:
        mine = stems[context.pack_rank :: context.packs]
        left = mine[len(written) :]  # they are drawn in their order
        if context.leads_pack:  # who writes
            who = f"rank {context.rank}: " if context.packs > 1 else ""
            rest = f"; not {some(left)}" if left else ""
            print(
                f"goku sample: {who}stopped: {len(written)} of {counted(len(mine), 'sample')} written{rest}",
                file=sys.stderr,
                flush=True,
            )
        raise


def _stem(row: int, request: Request) -> str:
    """The file's name without its ending."""
    from goku.media_files import file_stem

    return f"{row:04d}_{file_stem(request.prompt[:40])}_seed{request.seed}"


def _asked(
    args: argparse.Namespace, about: Trained, settings: SampleConfig
) -> tuple[SampleConfig, list[tuple[int, Request]], list[Request]]:
    """What is drawn of a checkpoint: the settings, (row, request) of every sample, and the requests as the model is
    asked."""
    settings = replace(
        settings,
        shift=about.shift if args.shift is None else args.shift,
        base_tokens=about.base_tokens if args.shift is None else None,
        limits=about.limits if args.rope == "scaled" else None,
    )
    cases = [
        (row, replace(request, seed=request.seed + k))
        for row, request in enumerate(_requests(args, about))
        for k in range(args.count)
    ]
    requests = [
        replace(request, prompt=_with_motion(request.prompt, args.motion, about))
        for _, request in cases
    ]
    return settings, cases, requests


def _requests(args: argparse.Namespace, about: Trained) -> list[Request]:
    from goku.given import first_image
    from goku.requests import read_requests
    from goku.sizes import request_defaults

    options: list[tuple[int, Path]] = []
    for option in args.given:
        frame, colon, file = option.partition(":")
        if not colon or not file or not frame.removeprefix("-").isdecimal():
            raise ValueError(f"--given is {option!r}; allowed: FRAME:FILE, such as 16:middle.png")
        options.append((int(frame), Path(file)))
    options += [(0, args.image)] * (args.image is not None)
    options += [(-1, args.last_image)] * (args.last_image is not None)
    given: dict[int, Path | Tensor] = {}
    for number, path in options:
        if number in given:
            raise ValueError(
                f"frame {number} is given twice: {given[number]} and {path}; allowed: one image for each"
            )
        given[number] = path
    defaults = request_defaults(
        about,
        height=args.height,
        width=args.width,
        frames=args.frames,
        seed=args.seed,
        negative=args.negative,
        given=given,
    )
    found = [defaults.request(prompt) for prompt in args.prompt]
    if args.prompts is not None:
        found += read_requests(args.prompts, defaults)
    if not found:
        raise ValueError("no prompt given; allowed: --prompt TEXT (repeatable) or --prompts FILE")
    if any(request.given for request in found) and about.model.condition == "none":
        raise ValueError(
            f"{args.run} was trained without frames (model.condition none); "
            "allowed: a run of a stage with condition: frames"
        )
    if args.guidance_image is not None and not any(request.given for request in found):
        raise ValueError(
            "--guidance-image is given, but no image; allowed: --image, --last-image, --given, or "
            "a file of prompts that names one"
        )
    if args.hold and all(first_image(request) is None for request in found):
        raise ValueError(
            "--hold is given, but no first frame; allowed: --image, or a file of prompts that names one"
        )
    return found


def _embedded(
    text: TextEncoder, requests: Sequence[Request], settings: SampleConfig
) -> dict[str, Tensor]:
    """The embedding of each string that these requests need, encoded by itself: its bits depend on nothing else."""
    strings = [request.prompt for request in requests]
    if settings.guidance != 1 or settings.image_scale != 1:
        strings += [request.negative for request in requests]
    return {string: text.encode([string])[0] for string in dict.fromkeys(strings)}


def _with_motion(prompt: str, motion: float | None, about: Trained) -> str:
    if motion is None:
        return prompt
    if not math.isfinite(motion):
        raise ValueError(
            f"--motion is {motion}; allowed: finite numbers, as training captions have"
        )
    if about.motion_caption is None:
        raise ValueError(
            "--motion is given, but the model's training captions had no motion score "
            "(data.motion_caption is none); allowed: no --motion"
        )
    return about.motion_caption.format(caption=prompt, motion=motion)


def _warnings(
    requests: Sequence[Request], about: Trained, settings: SampleConfig, rope: str
) -> list[str]:
    """Lines on what goes beyond what the model was trained on, and on what has no effect, each once."""
    from goku.given import untrained_given
    from goku.sizes import beyond_limits

    lines: list[str | None] = []
    if settings.guidance == 1:
        if any(request.negative for request in requests):
            lines.append("a negative prompt has no effect without guidance (--guidance 1)")
        if settings.guidance_interval != (0.0, 1.0):
            lines.append("--guidance-interval has no effect without guidance (--guidance 1)")
    for request in requests:
        lines.append(beyond_limits(request, about.limits, about.area, scaled=rope == "scaled"))
        lines.append(untrained_given(request, about.conditioning))
    return [line for line in dict.fromkeys(lines) if line is not None]


def _first_frame(loaded: Loaded, request: Request, latent: Tensor, video: Tensor) -> str:
    """How close the first frame is to the given image, and how close the VAE alone comes."""
    from goku.given import first_image, read_image
    from goku.sampler import decode

    image = first_image(request)
    assert image is not None
    wanted = read_image(image, request.height, request.width) if isinstance(image, Path) else image
    alone = decode(loaded.vae, latent)[:, 0]
    return (
        f"first frame: {_psnr(video[:, 0], wanted):.1f} dB to the given image, "
        f"the VAE alone {_psnr(alone, wanted):.1f} dB"
    )


def _psnr(a: Tensor, b: Tensor) -> float:
    """Peak signal-to-noise ratio of two uint8 pictures in dB; infinite when they are equal."""
    error = (a.double() - b.double()).square().mean().item()
    return math.inf if error == 0 else 10 * math.log10(255**2 / error)
