"""How large the caches of a run or of a recipe's stages will be, each file counted once: `PredictedCache`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from goku.data.cached import CachedDataset
from goku.data.sources import Source
from goku.data.stage_report import CacheReport
from goku.run_config import RunConfig
from goku.text import load_tokenizer
from goku.vae import has_vae, is_causal

__all__ = ["PredictedCache"]

_CHARACTERS_PER_TOKEN = 4
_FLOAT32 = 4
_BFLOAT16 = 2


class PredictedCache:
    """Adds up the caches of stages, which share one VAE and one text encoder (the first config's).

    quick: reckon a caption's tokens from its length rather than load a tokenizer.
    """

    def __init__(self, configs: Sequence[RunConfig], *, quick: bool = False) -> None:
        config = configs[0]
        self.faults: list[str] = []
        """Why the caches cannot be filled: no VAE, no text encoder."""
        self.causal = True
        folder = Path(config.vae.path)
        if has_vae(folder):
            try:
                self.causal = is_causal(folder)
            except ValueError as error:
                self.faults.append(f"vae.path: {error}")
        elif config.vae.train is None:
            self.faults.append(
                f"vae.path is {folder}, which holds no VAE, and there is no vae.train to train one"
            )
        self._tokenize = self._tokenizer(config, quick)
        self._tokens: dict[str, int] = {}
        self._made: dict[tuple[object, ...], int] = {}
        self._total = CacheReport(texts_measured=self._tokenize is not None)

    def stage(
        self,
        config: RunConfig,
        data: Sequence[tuple[Sequence[Source], Sequence[CachedDataset]]],
        prompts: Sequence[str] = (),
    ) -> CacheReport:
        """What `prepare` caches of the datasets of one stage, and of the `prompts` of its validation."""
        folder = str(config.cache_folder)
        channels = config.vae.model.channels
        frames: tuple[int, ...] = ()
        if config.model.condition == "frames":
            # The first frame of an exactly causal VAE is the clip's own first latent.
            frames = tuple(f for f in config.conditioning.frames if f != 0 or not self.causal)
        latents: dict[tuple[object, ...], int] = {}
        single: dict[tuple[object, ...], int] = {}
        texts: dict[tuple[object, ...], int] = {}
        texts |= {(folder, prompt): self._text(config, prompt) for prompt in prompts}
        for sources, parts in data:
            for part in parts:
                for entry in part.entries:
                    record, geometry = entry.record, entry.geometry
                    t, h, w = geometry.latent_shape
                    key = (
                        folder, entry.identity, record.start_frame, part.config.fps, record.is_image, geometry,
                    )  # fmt: skip
                    latents[key] = 2 * _FLOAT32 * channels * t * h * w
                    if geometry.frames > 1:
                        single |= {(key, f): _FLOAT32 * channels * h * w for f in frames}
            for source in sources:
                texts[folder, ""] = self._text(config, "")
                for record in source.records:
                    for prompt in record.prompts:
                        texts[folder, prompt] = self._text(config, prompt)
        return self._counted(latents, single, texts)

    def total(self) -> CacheReport:
        """Of all stages so far."""
        return self._total

    def _counted(self, *parts: dict[tuple[object, ...], int]) -> CacheReport:
        fresh = [
            {key: size for key, size in part.items() if key not in self._made} for part in parts
        ]
        report = self._sized(parts)
        new = self._sized(fresh)
        for part in fresh:
            self._made |= part
        total = self._total
        self._total = replace(
            total,
            **{
                name: getattr(total, name) + getattr(new, name)
                for name in (
                    "latents",
                    "latent_files",
                    "frames",
                    "frame_files",
                    "texts",
                    "text_files",
                )
            },
        )
        return replace(report, shared=report.total - new.total)

    def _sized(self, parts: Sequence[dict[tuple[object, ...], int]]) -> CacheReport:
        latents, frames, texts = parts
        return CacheReport(
            latents=sum(latents.values()),
            latent_files=len(latents),
            frames=sum(frames.values()),
            frame_files=len(frames),
            texts=sum(texts.values()),
            text_files=len(texts),
            texts_measured=self._tokenize is not None,
        )

    def _tokenizer(self, config: RunConfig, quick: bool) -> Callable[[str], list[int]] | None:
        if config.text.path is not None and quick:
            if not Path(config.text.path).is_dir():
                self.faults.append(f"text.path is {config.text.path}, which is no folder")
            return None
        try:
            return load_tokenizer(config.text)
        except ValueError as error:
            self.faults.append(f"text.path: {error}")
            return None

    def _text(self, config: RunConfig, prompt: str) -> int:
        """Bytes of a prompt's embedding."""
        if prompt not in self._tokens:
            if self._tokenize is None:
                tokens = -(-len(prompt) // _CHARACTERS_PER_TOKEN) + 1  # the end token
            else:
                tokens = len(self._tokenize(prompt))
            self._tokens[prompt] = min(tokens, config.text.max_tokens)
        # What bf16 holds exactly is stored in it; fp32 embeddings practically never are.
        width = _BFLOAT16 if config.text.dtype == "bfloat16" else _FLOAT32
        return self._tokens[prompt] * config.model.text_dim * width
