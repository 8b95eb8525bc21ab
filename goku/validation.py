"""Fixed prompts drawn again and again while a model trains, so that steps can be compared by eye.

Every case is a pack of its own with a seed of its own: its file has the same bytes whatever the number of processes
(of fp32 weights, without sequence parallelism). Nothing can hang: what one process may fail at alone is done before
training on all of them together, or caught and told; all groups call the model equally often; and where media are shown
elsewhere, training does not wait for it.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from goku.conditioning import latent_index
from goku.flow import Method
from goku.given import Given, encode_given, read_image
from goku.media_files import file_stem
from goku.media_log import PLACES, MediaLog, Place, Shown
from goku.metrics import RunLog
from goku.model import GokuTransformer
from goku.parallelize import ParallelContext
from goku.precision import autocast_dtype
from goku.requests import Request, RequestDefaults, read_requests
from goku.sample_config import SampleConfig, describe
from goku.sampler import decode, integrate_all, save_media
from goku.sizes import beyond_limits
from goku.text import TextCache, TextEncoder
from goku.vae import VideoVAE

if TYPE_CHECKING:
    from goku.run_config import RunConfig

__all__ = ["Cases", "ValidationConfig", "Validator", "read_cases", "read_validation"]


@dataclass(frozen=True, kw_only=True)
class ValidationConfig:
    """What is drawn while a run trains.

    file: the cases, as `read_cases` reads them; None draws nothing; every: in steps, 0 turns it off; guidance,
    guidance_image, method: as in `goku.sampler.SampleConfig`; steps: of cases that say none; shift: None for the run's
    flow.shift; fps: of clips that say none, None for data.fps, or 12 where clips keep their own; seed: of the first
    case, the n-th has seed + n unless it says its own; media: where else they are shown; project: the W&B project.
    """

    file: str | None = None
    every: int = 0
    guidance: float = 1.0
    guidance_image: float | None = None
    method: Method = "euler"
    steps: int = 30
    shift: float | None = None
    fps: int | None = None
    seed: int = 0
    media: tuple[Place, ...] = ()
    project: str = "goku"

    def __post_init__(self) -> None:
        if self.every < 0:
            raise ValueError(f"validation.every is {self.every}; allowed: >= 0")
        if self.every and self.file is None:
            raise ValueError(
                f"validation.every is {self.every} without validation.file; allowed: a file of cases"
            )
        if self.fps is not None and self.fps < 1:
            raise ValueError(f"validation.fps is {self.fps}; allowed: >= 1, or null")
        if not 0 <= self.seed < 2**64:
            raise ValueError(f"validation.seed is {self.seed}; allowed: 0 to 2**64 - 1")
        if not set(self.media) <= set(PLACES) or len(set(self.media)) != len(self.media):
            raise ValueError(
                f"validation.media is {list(self.media)}; allowed: each of {', '.join(PLACES)} once at most"
            )
        self.settings(1.0)

    def settings(self, shift: float, base_tokens: int | None = None) -> SampleConfig:
        """How the cases are integrated, with the run's `shift`, and `base_tokens` as in `SampleConfig`.

        A shift of the validation's own is for cases of all sizes. Raises ValueError for a value out of range.
        """
        return SampleConfig(
            base_tokens=base_tokens if self.shift is None else None,
            guidance=self.guidance,
            guidance_image=self.guidance_image,
            method=self.method,
            steps=self.steps,
            shift=shift if self.shift is None else self.shift,
        )


def read_cases(path: Path, defaults: RequestDefaults) -> list[Request]:
    """The cases of a file in the shared form, {"data": [{caption, image_path, height, width, num_frames, ...}]}.

    What a case may say, and the other forms that are read, are those of `goku.requests.read_requests`. Where `defaults`
    counts seeds up, a case's seed is that of its place in the file. Raises ValueError naming file and entry.
    """
    return read_requests(path, replace(defaults, seed_step=1))


@dataclass(frozen=True)
class Cases:
    """What a run draws of its validation's file: the requests, their places in the file, and what it leaves out of it,
    as (place, why)."""

    requests: tuple[Request, ...] = ()
    places: tuple[int, ...] = ()
    left_out: tuple[tuple[int, str], ...] = ()

    @property
    def prompts(self) -> list[str]:
        """Every string that is drawn from or guided away from, once, sorted."""
        return sorted({s for case in self.requests for s in (case.prompt, case.negative)})


def read_validation(run: RunConfig) -> Cases:
    """Reads the run's cases and looks at all that they name; no model is needed. Empty where nothing is to be drawn.

    Left out are cases that this run cannot draw, since stages share one file: those that give an image where the model
    takes none, and those of more tokens than packing.tokens_per_pack, whose forward might not fit into memory.

    Raises ValueError naming the file and the case for an entry or an image that cannot be used, and for fewer tokens
    than processes that share them, and for a file that is not there.
    """
    config = run.validation
    if config.file is None or not config.every:
        return Cases()
    taken, left_out = [], []
    try:
        cases = read_cases(Path(config.file), _defaults(config, run))
    except OSError as error:
        raise ValueError(
            f"validation.file is {config.file}, which cannot be read ({error.strerror}); allowed: a file of cases, or "
            "null to draw none"
        ) from error
    for place, case in enumerate(cases):
        t, h, w = case.grid
        tokens = t * h * w
        if case.given and run.model.condition != "frames":
            left_out.append((place, "it gives an image, which this model does not take"))
        elif tokens > run.packing.tokens_per_pack:
            left_out.append(
                (
                    place,
                    f"{case.height} x {case.width}, {case.frames} frames are {tokens} tokens, more than "
                    f"packing.tokens_per_pack = {run.packing.tokens_per_pack}",
                )
            )
        elif tokens < run.parallel.sp:
            raise ValueError(
                f"{config.file}: case {place} has {tokens} tokens; allowed: parallel.sp = "
                f"{run.parallel.sp} or more"
            )
        else:
            _check_given(case, f"{config.file}: case {place}")
            taken.append((place, case))
    return Cases(
        tuple(case for _, case in taken), tuple(place for place, _ in taken), tuple(left_out)
    )


def _check_given(case: Request, where: str) -> None:
    """What `encode_given` would refuse, in the place of its images."""
    if case.given and case.frames == 1:
        raise ValueError(
            f"{where}: frames is 1, with an image given; allowed: 4k + 1 of a clip (5, 9, ...)"
        )
    latents = [latent_index(frame, case.frames) for frame in case.given]
    if len(set(latents)) < len(latents):
        raise ValueError(
            f"{where}: frames {sorted(case.given)} of {case.frames} share a latent frame; allowed: one given image "
            "for each"
        )
    for image in case.given.values():
        if isinstance(image, Path):
            try:
                read_image(image, case.height, case.width)
            except ValueError as error:
                raise ValueError(f"{where}: {error}") from error


class Validator:
    """Draws a run's cases. Built on all processes together, and run by all of them together."""

    def __init__(
        self,
        config: ValidationConfig,
        run: RunConfig,
        context: ParallelContext,
        vae: VideoVAE,
        text: TextEncoder,
    ) -> None:
        """Reads the cases, encodes their prompts (through the run's cache) and images.

        Raises ValueError on every process when it fails on one: what `read_validation` raises.
        """
        self.config, self.context, self.vae = config, context, vae
        self.out = Path(run.out)
        self.device = context.device
        dtype = autocast_dtype(run.train.precision, self.device)
        base_tokens = run.flow.base_tokens if run.flow.resolution_shift else None
        self.settings = replace(config.settings(run.flow.shift, base_tokens), precision=dtype)
        self.fps = config.fps or run.clip_fps
        self.sharding = context.pack_sharding(run.model.heads)
        self.media = MediaLog(config.media, self.out, config.project)
        self.cases: Sequence[Request] = ()
        self.places: Sequence[int] = ()  # of the cases in their file
        self.left_out: Sequence[tuple[int, str]] = ()
        self.given: list[Given] = []
        self.prompts: dict[str, Tensor] = {}
        self._told = False

        def ready() -> None:
            found = read_validation(run)
            self.cases, self.places, self.left_out = found.requests, found.places, found.left_out
            self.given = [encode_given(vae, case, self.device) for case in self.cases]
            # The cache of the training captions: an encoder of gigabytes need not be read for these alone.
            embeddings = TextCache(run.cache_folder / "text", text).get(found.prompts)
            self.prompts = dict(zip(found.prompts, embeddings, strict=True))

        context.together(ready)

    def run(
        self,
        model: GokuTransformer,
        step: int,
        log: RunLog,
        limits: tuple[int, int, int] | None = None,
        area: int | None = None,
    ) -> None:
        """Draws every case with `model` (the average) into out/validation/step_N; events `validation`.

        Every process calls it at the same step. limits, area: what was trained on, as in `goku.trained.Trained`; beyond
        the limits RoPE's positions are scaled. What fails in decoding or writing becomes an event `validation_failed`
        and a message, on whichever process it was; what fails in showing an event `media_failed`; what fails in the
        model is raised.
        """
        context = self.context
        folder = self.out / "validation" / f"step_{step:07d}"
        self.settings = replace(self.settings, limits=limits)
        self._tell_once(step, log, area)
        drawn: list[tuple[int, str, float]] = []
        failures: list[str] = []
        for case_steps, members in _by_steps(self.cases, self.settings.steps):
            settings = replace(self.settings, steps=case_steps)
            for index, idle in _rounds(members, self.cases, context.pack_rank, context.packs):
                began = time.monotonic()
                latent = self._integrate(model, index, settings)
                if idle or not context.leads_pack:
                    continue
                case = self.cases[index]
                try:
                    stem = folder / f"{self.places[index]:04d}_{file_stem(case.prompt[:40])}"
                    path = save_media(
                        decode(self.vae, latent),
                        stem,
                        case.fps or self.fps,
                        describe(case, settings, step=step, fps=self.fps),
                    )
                    shown = str(path.relative_to(self.out))
                    drawn.append((index, shown, time.monotonic() - began))
                except (OSError, RuntimeError, ValueError, FloatingPointError) as error:
                    failures.append(f"case {self.places[index]}, rank {context.rank}: {error}")
        results = context.gather((drawn, failures))
        everything = sorted(each for theirs, _ in results for each in theirs)
        for index, path_, seconds in everything:
            log.event(
                "validation", step, name=self.cases[index].prompt, path=path_, seconds=seconds
            )
        for failure in [failure for _, theirs in results for failure in theirs]:
            log.event("validation_failed", step, error=failure)
            log.message(f"validation at step {step} failed: {failure}")
        if context.is_main and everything:
            items = [
                Shown(f"validation/{self.places[i]:04d}", self.out / path_, self.cases[i].prompt)
                for i, path_, _ in everything
            ]
            self._tell_media(self.media.show(items, step), step, log)

    def close(self, step: int, log: RunLog, wait: float = 60.0) -> None:
        """Waits at most so many seconds for what is being shown elsewhere. After the last `run`, on every process."""
        if self.context.is_main:
            self._tell_media(self.media.close(wait), step, log)

    def _tell_media(self, failures: Sequence[str], step: int, log: RunLog) -> None:
        for failure in failures:
            log.event("media_failed", step, error=failure)
            log.message(f"validation: {failure}")

    def _tell_once(self, step: int, log: RunLog, area: int | None) -> None:
        """What is left out, and what goes beyond the trained sizes: once a process, and so again after a resume."""
        if self._told:
            return
        self._told = True
        for place, why in self.left_out:
            log.event("validation_left_out", step, case=place, reason=why)
            log.message(f"validation: case {place} is left out: {why}")
        for case in {case.grid: case for case in self.cases}.values():
            line = beyond_limits(case, self.settings.limits, area)
            if line is not None:
                log.message(f"validation: {line}")

    @torch.no_grad()
    def _integrate(self, model: GokuTransformer, index: int, settings: SampleConfig) -> Tensor:
        return integrate_all(
            model, self.vae, lambda strings: [self.prompts[string] for string in strings],
            [self.cases[index]], settings, self.device, sharding=self.sharding,
            given=[self.given[index]], imaged=any(self.given),
        )[0]  # fmt: skip


def _defaults(config: ValidationConfig, run: RunConfig) -> RequestDefaults:
    """A stage's own sizes: clips where it trains any, in its pixels; images in those of its images."""
    mix = run.data.mix
    clips = run.data.max_frames > 1 and (mix is None or any(w.video for w in mix.values()))
    return RequestDefaults(
        pixels=run.data.video_pixels,
        image_pixels=run.data.image_pixels,
        frames=run.data.max_frames if clips else 1,
        seed=config.seed,
    )


def _by_steps(cases: Sequence[Request], usual: int) -> list[tuple[int, list[int]]]:
    """(steps, indices of the cases that take so many), by steps: the same on every process."""
    steps = [case.steps or usual for case in cases]
    return [(each, [i for i, n in enumerate(steps) if n == each]) for each in sorted(set(steps))]


def _rounds(
    members: Sequence[int], cases: Sequence[Request], group: int, groups: int
) -> list[tuple[int, bool]]:
    """(case, whether it is idle work) of this group in each round; every group has as many.

    A group without a case of its own in the last round repeats the shortest: a sharded model is gathered by all.
    """

    def tokens(index: int) -> int:
        t, h, w = cases[index].grid
        return t * h * w

    shortest = min(members, key=tokens)
    rounds = -(-len(members) // groups)
    mine = [r * groups + group for r in range(rounds)]
    return [(members[k], False) if k < len(members) else (shortest, True) for k in mine]
