"""A text encoder whose weights are read when a prompt first needs them, and can be let go of again.

A run that finds every caption in the cache needs of its encoder a width and a fingerprint alone. Both
are kept beside the cache, under a key of the folder's files, so that such a start reads a few hundred
bytes where FLAN-T5-XL has 2.4 GB in bf16.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from goku.text.encoder import T5TextEncoder, TextConfig, load_text_encoder, no_folder
from goku.whole_file import write_whole

# Part of every key: raise it when the stored facts or what a fingerprint covers change.
_FORMAT = "goku-encoder-1"


class LazyTextEncoder:
    """The `TextEncoder` of `load_text_encoder(config)`, loaded on `device` at the first use of its weights.

    directory: where what is known of encoders is kept, one JSON file each; None keeps nothing. The
    file's key is the path, size and modification time of every file in config.path, the dtype and
    max_tokens: a file that changes without changing these is found when the weights are read. The
    built-in tiny encoder is made by code and not kept.

    Raises ValueError naming the folder at once when it does not exist, and otherwise what
    `load_text_encoder` raises, when that happens.
    """

    def __init__(
        self,
        config: TextConfig,
        *,
        device: torch.device | str = "cpu",
        directory: str | os.PathLike[str] | None = None,
    ) -> None:
        self.config = config
        self.device = torch.device(device)
        self._facts: tuple[int, str] | None = None  # dim, fingerprint
        self._encoder: T5TextEncoder | None = None
        self._borrowers = 0
        self._path: Path | None = None
        if config.path is not None:
            if not Path(config.path).is_dir():
                raise ValueError(no_folder(config.path))
            if directory is not None:
                self._path = Path(directory) / f"{_key(config)}.json"
                self._facts = _read(self._path)

    @property
    def dim(self) -> int:
        """Width of an embedding."""
        return self._known()[0]

    @property
    def loaded(self) -> bool:
        """Whether the weights are in memory."""
        return self._encoder is not None

    def fingerprint(self) -> str:
        """Hex digest of all that decides the embeddings: weights, dtype, tokenizer, length."""
        return self._known()[1]

    def encode(self, prompts: Sequence[str]) -> list[Tensor]:
        """Per prompt an un-padded (length, dim) fp32 CPU tensor; loads the weights if need be.

        No prompts need no weights. Raises ValueError as `T5TextEncoder.encode` does.
        """
        if len(prompts) == 0:
            return []
        return self._load().encode(prompts)

    def release(self) -> None:
        """Let go of the weights; the next prompt that no cache has reads them again."""
        self._encoder = None
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    @contextmanager
    def borrowed(self) -> Iterator[None]:
        """Weights that are read within go at its end; those that were in memory before stay.

        May be nested: the outermost decides.
        """
        keep = self.loaded or self._borrowers > 0
        self._borrowers += 1
        try:
            yield
        finally:
            self._borrowers -= 1
            if not keep and self.loaded:
                self.release()

    def _known(self) -> tuple[int, str]:
        if self._facts is None:
            self._load()
        assert self._facts is not None
        return self._facts

    def _load(self) -> T5TextEncoder:
        if self._encoder is not None:
            return self._encoder
        encoder = load_text_encoder(self.config, device=self.device)
        facts = (encoder.dim, encoder.fingerprint())
        if self._facts is None:
            self._facts = facts
            if self._path is not None:
                _write(self._path, facts)
        elif self._facts != facts:
            # Embeddings of these weights would be kept under the name of others.
            raise ValueError(
                f"text encoder in {self.config.path!r} is not what it was when it was first read, "
                f"though its files' sizes and times are: "
                + (f"remove {self._path}" if self._path else "start again")
            )
        self._encoder = encoder
        return encoder


def _key(config: TextConfig) -> str:
    assert config.path is not None
    folder = Path(config.path).resolve()
    files = [
        [path.name, (stat := path.stat()).st_size, stat.st_mtime_ns]
        for path in sorted(folder.iterdir())
        if path.is_file()
    ]
    content = [_FORMAT, str(folder), files, config.dtype, config.max_tokens]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def _read(path: Path) -> tuple[int, str] | None:
    """What is kept there; None when it is absent or damaged, and is then found out anew."""
    try:
        facts = json.loads(path.read_bytes())
    except (FileNotFoundError, ValueError):  # ValueError: not JSON, not UTF-8
        return None
    if not isinstance(facts, dict):
        return None
    dim, fingerprint = facts.get("dim"), facts.get("fingerprint")
    if type(dim) is not int or dim < 1 or not isinstance(fingerprint, str):
        return None
    return dim, fingerprint


def _write(path: Path, facts: tuple[int, str]) -> None:
    write_whole(path, (json.dumps({"dim": facts[0], "fingerprint": facts[1]}) + "\n").encode())
