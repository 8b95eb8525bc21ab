"""Embeddings on disk, addressed by content: encoder fingerprint, dtype and prompt."""

from __future__ import annotations

import hashlib
import json
import os
import warnings
import zlib
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from goku.text.encoder import TextEncoder
from goku.whole_file import write_whole

# Part of every key: a new layout of the files begins a new cache beside the old one.
_FORMAT = "goku-text-1"
# Prompts encoded between writes: what an interruption can lose.
_ENCODE_AT_ONCE = 64


class TextCache:
    """Reads embeddings from `directory` and encodes only what is missing there.

    One safetensors file per prompt, un-padded, named by a hash of the encoder's fingerprint (which
    covers its weights, tokenizer and dtype) and the prompt. Files appear atomically, so any number
    of processes may share a directory; a damaged file (a CRC-32 of the data is stored) is encoded
    anew, with a warning. Embeddings that bf16 holds exactly are stored in bf16.
    """

    def __init__(self, directory: str | os.PathLike[str], encoder: TextEncoder) -> None:
        self.directory = Path(directory)
        self.encoder = encoder
        self._fingerprint = encoder.fingerprint()
        self.made = 0
        """Prompts that were encoded because the directory lacked them."""

    @property
    def dim(self) -> int:
        """Width of an embedding."""
        return self.encoder.dim

    def get(self, prompts: Sequence[str]) -> list[Tensor]:
        """One (length, dim) fp32 CPU tensor per prompt; equal prompts share one tensor.

        Raises OSError when the directory cannot be written; nothing half-written stays behind.
        """
        if isinstance(prompts, str):
            raise ValueError(f"prompts must be a sequence of strings, got the string {prompts!r}")
        found: dict[str, Tensor] = {}
        missing: list[str] = []
        for prompt in dict.fromkeys(prompts):
            embedding = self._read(prompt)
            if embedding is None:
                missing.append(prompt)
            else:
                found[prompt] = embedding
        for start in range(0, len(missing), _ENCODE_AT_ONCE):
            found |= self._encode(missing[start : start + _ENCODE_AT_ONCE])
        return [found[prompt] for prompt in prompts]

    def cached(self, prompt: str) -> Tensor | None:
        """(length, dim) on the CPU, as it is stored: fp32, or bf16 that holds it exactly. None where the directory
        lacks it or its file is damaged.

        Encodes, writes and warns of nothing: for any thread. Raises OSError when the file cannot be read.
        """
        stored = self._stored(prompt)
        return None if isinstance(stored, str) else stored

    def fill(self, prompts: Sequence[str]) -> int:
        """Encode what the directory lacks of `prompts`, read and check the rest; returns the bytes of
        all their files. Of the embeddings few are in memory at a time. Raises as `get` does."""
        if isinstance(prompts, str):
            raise ValueError(f"prompts must be a sequence of strings, got the string {prompts!r}")
        unique = list(dict.fromkeys(prompts))
        missing = [prompt for prompt in unique if self._read(prompt) is None]
        for start in range(0, len(missing), _ENCODE_AT_ONCE):
            self._encode(missing[start : start + _ENCODE_AT_ONCE])
        return sum(self.path(prompt).stat().st_size for prompt in unique)

    def path(self, prompt: str) -> Path:
        """Where the embedding of `prompt` lies, or would lie."""
        key = json.dumps([_FORMAT, self._fingerprint, prompt])  # ASCII, so any string has a key
        name = hashlib.sha256(key.encode()).hexdigest()
        return self.directory / name[:2] / f"{name}.safetensors"

    def _encode(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        embeddings = dict(zip(prompts, self.encoder.encode(prompts), strict=True))
        for prompt, embedding in embeddings.items():
            self._write(prompt, embedding)
        self.made += len(embeddings)
        return embeddings

    def _read(self, prompt: str) -> Tensor | None:
        stored = self._stored(prompt)
        if not isinstance(stored, str):
            return None if stored is None else stored.float()
        path = self.path(prompt)
        warnings.warn(f"text embedding {path} is damaged ({stored}): encoding anew", stacklevel=3)
        return None

    def _stored(self, prompt: str) -> Tensor | str | None:
        """What the directory holds of the prompt; a text says how its file is damaged."""
        path = self.path(prompt)
        if not path.exists():
            return None
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                stored = file.get_tensor("embedding").clone()  # not a view of the mapped file
        except SafetensorError as error:
            return str(error)
        if stored.ndim != 2 or stored.shape[0] < 1 or stored.shape[1] != self.encoder.dim:
            return f"shape {tuple(stored.shape)}, width {self.encoder.dim} expected"
        if metadata.get("crc32") != _crc32(stored):
            return "its CRC-32 does not match"
        if stored.dtype not in (torch.float32, torch.bfloat16):
            return f"dtype {stored.dtype}, torch.float32 or torch.bfloat16 expected"
        return stored

    def _write(self, prompt: str, embedding: Tensor) -> None:
        path = self.path(prompt)
        stored = compact(embedding.detach().cpu().contiguous().float())
        content = save({"embedding": stored}, {"crc32": _crc32(stored)})
        write_whole(path, content)


def compact(embedding: Tensor) -> Tensor:
    """The embedding in bf16 where that holds it exactly, as a bf16 encoder's; else as it is."""
    small = embedding.bfloat16()
    return small if torch.equal(small.to(embedding.dtype), embedding) else embedding


def _crc32(tensor: Tensor) -> str:
    return f"{zlib.crc32(tensor.reshape(-1).view(torch.uint8).numpy().data):08x}"
