"""Fixed prompts drawn again and again while a model trains, so that steps can be compared by eye.

Every case is a pack of its own with a seed of its own: its file has the same bytes whatever the number of processes
(of fp32 weights, without sequence parallelism). Nothing can hang: what one process may fail at alone is done before
training on all of them together, or caught and told; and all groups call the model equally often.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from goku.flow import Method
from goku.given import Given, encode_given
from goku.media_files import file_stem
from goku.media_log import PLACES, Place, Shown, check_places, show
from goku.metrics import RunLog
from goku.model import GokuTransformer
from goku.parallelize import ParallelContext
from goku.precision import autocast_dtype
from goku.requests import Request, RequestDefaults, read_requests
from goku.sampler import SampleConfig, decode, describe, integrate_all, save_media
from goku.text import TextCache, TextEncoder
from goku.vae import VideoVAE

if TYPE_CHECKING:
    from goku.run_config import RunConfig

__all__ = ["ValidationConfig", "Validator", "read_cases"]


@dataclass(frozen=True, kw_only=True)
class ValidationConfig:
    """What is drawn while a run trains.

    file: the cases, as `read_cases` reads them; None draws nothing; every: in steps, 0 turns it off; guidance,
    guidance_image, method: as in `goku.sampler.SampleConfig`; steps: of cases that say none; shift: None for the run's
    flow.shift; fps: of clips that say none; seed: of the first case, the n-th has seed + n unless it says its own;
    media: where else they are shown; project: the W&B project.
    """

    file: str | None = None
    every: int = 0
    guidance: float = 1.0
    guidance_image: float | None = None
    method: Method = "euler"
    steps: int = 30
    shift: float | None = None
    fps: int = 12
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
        if self.fps < 1:
            raise ValueError(f"validation.fps is {self.fps}; allowed: >= 1")
        if self.seed < 0:
            raise ValueError(f"validation.seed is {self.seed}; allowed: >= 0")
        if not set(self.media) <= set(PLACES) or len(set(self.media)) != len(self.media):
            raise ValueError(
                f"validation.media is {list(self.media)}; allowed: each of {', '.join(PLACES)} once at most"
            )
        self.settings(1.0)

    def settings(self, shift: float) -> SampleConfig:
        """How the cases are integrated, `shift` being the run's. Raises ValueError for a value out of range."""
        return SampleConfig(
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
        """Reads the cases and all that they name, encodes prompts (through the run's cache) and images.

        Cases that give an image are left out of a run whose model takes none: stages share one file.

        Raises ValueError on every process when it fails on one: an entry or an image that cannot be used, a package of
        `config.media` that is absent (ImportError), more processes sharing a sample than it has tokens.
        """
        self.config, self.context, self.vae = config, context, vae
        self.out = Path(run.out)
        self.device = context.device
        dtype = autocast_dtype(run.train.precision, self.device)
        self.settings = replace(config.settings(run.flow.shift), precision=dtype)
        self.sharding = context.pack_sharding(run.model.heads)
        self.cases: list[Request] = []
        self.places: list[int] = []  # of the cases in their file
        self.left_out = 0
        self.given: list[Given] = []
        self.prompts: dict[str, Tensor] = {}

        def ready() -> None:
            if config.file is None:
                return
            check_places(config.media)
            found = read_cases(Path(config.file), _defaults(config, run))
            framed = run.model.condition == "frames"
            self.places = [i for i, case in enumerate(found) if framed or not case.given]
            takes = self.cases = [found[i] for i in self.places]
            self.left_out = len(found) - len(takes)
            self.given = [encode_given(vae, case, self.device) for case in takes]
            strings = sorted({s for case in takes for s in (case.prompt, case.negative)})
            # The cache of the training captions: an encoder of gigabytes need not be read for these alone.
            cache = Path(run.data.cache) if run.data.cache else self.out / "cache"
            embeddings = TextCache(cache / "text", text).get(strings)
            self.prompts = dict(zip(strings, embeddings, strict=True))
            for place, case in zip(self.places, takes, strict=True):
                t, h, w = case.grid
                if t * h * w < context.dims.sp:
                    raise ValueError(
                        f"{config.file}: case {place} has {t * h * w} tokens; allowed: parallel.sp = "
                        f"{context.dims.sp} or more"
                    )

        context.together(ready)

    def run(self, model: GokuTransformer, step: int, log: RunLog) -> None:
        """Draws every case with `model` (the average) into out/validation/step_N; events `validation`.

        Every process calls it at the same step. What fails in decoding, writing or showing becomes an event
        `validation_failed` and a message, on whichever process it was; what fails in the model is raised.
        """
        context = self.context
        folder = self.out / "validation" / f"step_{step:07d}"
        if self.left_out and step == 0:
            log.message(
                f"validation: {self.left_out} of {self.left_out + len(self.cases)} cases give an image, which this "
                "model does not take, and are left out"
            )
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
                stem = folder / f"{self.places[index]:04d}_{file_stem(case.prompt[:40])}"
                try:
                    path = save_media(
                        decode(self.vae, latent),
                        stem,
                        case.fps or self.config.fps,
                        describe(case, settings, step=step, fps=self.config.fps),
                    )
                    shown = str(path.relative_to(self.out))
                    drawn.append((index, shown, time.monotonic() - began))
                except (OSError, RuntimeError, ValueError) as error:
                    failures.append(f"case {self.places[index]}, rank {context.rank}: {error}")
        results = context.gather((drawn, failures))
        everything = sorted(each for theirs, _ in results for each in theirs)
        for index, path_, seconds in everything:
            log.event(
                "validation", step, name=self.cases[index].prompt, path=path_, seconds=seconds
            )
        told = [failure for _, theirs in results for failure in theirs]
        if context.is_main and everything and self.config.media:
            items = [
                Shown(f"validation/{self.places[i]:04d}", self.out / path_, self.cases[i].prompt)
                for i, path_, _ in everything
            ]
            try:
                show(self.config.media, self.out, self.config.project, items, step)
            except (OSError, RuntimeError, ValueError) as error:
                told.append(f"showing: {error}")
        for failure in told:
            log.event("validation_failed", step, error=failure)
            log.message(f"validation at step {step} failed: {failure}")

    @torch.no_grad()
    def _integrate(self, model: GokuTransformer, index: int, settings: SampleConfig) -> Tensor:
        return integrate_all(
            model, self.vae, lambda strings: [self.prompts[string] for string in strings],
            [self.cases[index]], settings, self.device, sharding=self.sharding,
            given=[self.given[index]], imaged=any(self.given),
        )[0]  # fmt: skip


def _defaults(config: ValidationConfig, run: RunConfig) -> RequestDefaults:
    """A stage's own sizes: clips where it trains any, in its pixels."""
    mix = run.data.mix
    clips = run.data.max_frames > 1 and (mix is None or any(w.video for w in mix.values()))
    return RequestDefaults(
        pixels=run.data.video_pixels if clips else run.data.image_pixels,
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
