"""The text cache: what comes out is what went in, whatever happened to the files in between."""

import errno
import io
import os
import threading
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save
from torch import Tensor

import goku.whole_file
from goku.text import TextCache, TextConfig, load_text_encoder
from goku.text.cache import _crc32


class CountingEncoder:
    """Embeddings that are a function of the prompt, and a list of what was asked for."""

    dim = 5

    def __init__(self, name: str = "a", *, rounded: bool = False) -> None:
        self.name = name
        self.rounded = rounded
        self.encoded: list[str] = []

    def encode(self, prompts: Sequence[str]) -> list[Tensor]:
        self.encoded += prompts
        return [self.expected(prompt) for prompt in prompts]

    def expected(self, prompt: str) -> Tensor:
        generator = torch.Generator().manual_seed(len(prompt) + 1000 * ord(self.name))
        values = torch.randn(len(prompt) + 1, self.dim, generator=generator)
        return values.bfloat16().float() if self.rounded else values

    def fingerprint(self) -> str:
        return self.name


def files(directory: Path) -> list[Path]:
    return sorted(path for path in directory.rglob("*") if path.is_file())


@pytest.mark.parametrize("rounded", [False, True])
def test_second_read_comes_from_disk_and_is_exact(tmp_path: Path, rounded: bool) -> None:
    encoder = CountingEncoder(rounded=rounded)
    prompts = ["", "a cat", "b", "a cat", "Ä"]
    for cache in (TextCache(tmp_path, encoder), TextCache(tmp_path, encoder)):
        for prompt, embedding in zip(prompts, cache.get(prompts), strict=True):
            assert embedding.dtype == torch.float32
            assert torch.equal(embedding, encoder.expected(prompt))
        assert cache.dim == 5
    assert encoder.encoded == ["", "a cat", "b", "Ä"]
    assert len(files(tmp_path)) == 4


def test_as_stored_it_is_bf16_where_that_is_exact_and_nothing_is_encoded(tmp_path: Path) -> None:
    for encoder, dtype in (
        (CountingEncoder("a"), torch.float32),
        (CountingEncoder("b", rounded=True), torch.bfloat16),
    ):
        cache = TextCache(tmp_path, encoder)
        assert cache.cached("a cat") is None
        assert encoder.encoded == []
        cache.get(["a cat"])
        stored = cache.cached("a cat")
        assert stored is not None
        assert stored.dtype == dtype
        assert torch.equal(stored.float(), encoder.expected("a cat"))
        # Of another dtype, whole by its own account: no embedding.
        numbers = torch.arange(30, dtype=torch.int32).view(6, 5)
        cache.path("a cat").write_bytes(save({"embedding": numbers}, {"crc32": _crc32(numbers)}))
        assert cache.cached("a cat") is None
        with pytest.warns(UserWarning, match=r"dtype torch\.int32"):
            assert torch.equal(cache.get(["a cat"])[0], encoder.expected("a cat"))


def test_embeddings_that_bf16_holds_take_half_the_room(tmp_path: Path) -> None:
    prompt = "a" * 999
    sizes = []
    for encoder in (CountingEncoder("a"), CountingEncoder("b", rounded=True)):
        cache = TextCache(tmp_path, encoder)
        cache.get([prompt])
        sizes.append(cache.path(prompt).stat().st_size)
    payload = 1000 * 5 * 4
    assert sizes[0] - sizes[1] == pytest.approx(payload / 2, abs=64)


def test_another_encoder_does_not_read_these_files(tmp_path: Path) -> None:
    first, second = CountingEncoder("a"), CountingEncoder("b")
    TextCache(tmp_path, first).get(["x"])
    assert torch.equal(TextCache(tmp_path, second).get(["x"])[0], second.expected("x"))
    assert second.encoded == ["x"]


def test_with_the_built_in_encoder(tmp_path: Path) -> None:
    config = TextConfig(tiny_dim=16, tiny_layers=1)
    prompts = ["", "a cat"]
    expected = load_text_encoder(config).encode(prompts)
    for _ in range(2):
        cache = TextCache(tmp_path, load_text_encoder(config))
        for actual, wanted in zip(cache.get(prompts), expected, strict=True):
            assert torch.equal(actual, wanted)
    assert len(files(tmp_path)) == 2


def damage_payload(content: bytes) -> bytes:
    return content[:-1] + bytes([content[-1] ^ 1])


@pytest.mark.parametrize(
    "damage",
    [
        damage_payload,
        lambda content: content[:-3],
        lambda content: b"",
        lambda content: b"\xff" * len(content),
        lambda content: content.replace(b"embedding", b"embeddinh"),
        lambda content: content.replace(b"crc32", b"crc31"),
        lambda content: content.replace(b"[3,5]", b"[5,3]"),
    ],
    ids=["bit", "truncated", "empty", "noise", "renamed", "no-crc", "reshaped"],
)
def test_damaged_files_are_encoded_anew(tmp_path: Path, damage: Callable[[bytes], bytes]) -> None:
    encoder = CountingEncoder()
    cache = TextCache(tmp_path, encoder)
    cache.get(["ab"])
    sound = cache.path("ab").read_bytes()
    assert damage(sound) != sound
    cache.path("ab").write_bytes(damage(sound))
    with pytest.warns(UserWarning, match=r"is damaged \(.+\): encoding anew"):
        (embedding,) = cache.get(["ab"])
    assert torch.equal(embedding, encoder.expected("ab"))
    assert cache.path("ab").read_bytes() == sound


def test_a_full_disk_leaves_nothing_half_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Full(io.FileIO):
        def write(self, content: Any) -> int:
            super().write(content[:10])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    encoder = CountingEncoder()
    cache = TextCache(tmp_path, encoder)
    with monkeypatch.context() as patch:
        patch.setattr(goku.whole_file, "open", Full, raising=False)
        with pytest.raises(OSError, match="No space left"):
            cache.get(["x"])
    assert files(tmp_path) == []
    assert torch.equal(cache.get(["x"])[0], encoder.expected("x"))


def test_an_interruption_keeps_what_was_encoded_before(tmp_path: Path) -> None:
    class Interrupted(CountingEncoder):
        def encode(self, prompts: Sequence[str]) -> list[Tensor]:
            if len(self.encoded) >= 64:
                raise KeyboardInterrupt
            return super().encode(prompts)

    prompts = [f"prompt {i}" for i in range(100)]
    with pytest.raises(KeyboardInterrupt):
        TextCache(tmp_path, Interrupted()).get(prompts)
    encoder = CountingEncoder()
    TextCache(tmp_path, encoder).get(prompts)
    assert encoder.encoded == prompts[64:]


def test_concurrent_writers_and_readers_always_see_whole_files(tmp_path: Path) -> None:
    # A writer that truncated in place would show others a damaged file: here an error.
    prompts = [f"{i}" * (i % 50) for i in range(150)]
    encoders = [CountingEncoder() for _ in range(6)]
    start = threading.Barrier(len(encoders))

    def work(encoder: CountingEncoder, shift: int) -> None:
        cache = TextCache(tmp_path, encoder)
        mine = prompts[shift:] + prompts[:shift]
        start.wait()
        for first in range(0, len(mine), 10):
            chunk = mine[first : first + 10]
            for prompt, embedding in zip(chunk, cache.get(chunk), strict=True):
                assert torch.equal(embedding, encoder.expected(prompt))

    with warnings.catch_warnings(), ThreadPoolExecutor(len(encoders)) as pool:
        warnings.simplefilter("error")
        running = [pool.submit(work, encoder, i) for i, encoder in enumerate(encoders)]
    for future in running:
        future.result()
    assert len(files(tmp_path)) == len(set(prompts))


def test_a_bare_string_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"sequence of strings, got the string 'a cat'"):
        TextCache(tmp_path, CountingEncoder()).get("a cat")
