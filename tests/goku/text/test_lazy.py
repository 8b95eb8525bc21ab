"""The encoder that is loaded when it is needed: the same embeddings, and weights read only then."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel

from goku.text import LazyTextEncoder, TextCache, TextConfig, load_text_encoder

PROMPTS = ["", "a cat", "a cat on a dog"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A T5 encoder with a word tokenizer, saved as FLAN-T5 is."""
    folder = tmp_path / "t5"
    vocabulary = {w: i for i, w in enumerate(["<pad>", "</s>", "<unk>", "a", "cat", "on", "dog"])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        T5EncoderModel(
            T5Config(vocab_size=8, d_model=24, d_kv=8, d_ff=48, num_layers=1, num_heads=3)
        ).save_pretrained(folder)
    return folder


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Grows by the device at every reading of weights."""
    seen: list[Any] = []

    def counted(config: TextConfig, *, device: Any = "cpu") -> Any:
        seen.append(device)
        return load_text_encoder(config, device=device)

    monkeypatch.setattr("goku.text.lazy.load_text_encoder", counted)
    return seen


def config(folder: Path, **fields: Any) -> TextConfig:
    return TextConfig(path=str(folder), **fields)


def test_it_is_the_eager_one(folder: Path, tmp_path: Path) -> None:
    lazy = LazyTextEncoder(config(folder), directory=tmp_path / "encoders")
    eager = load_text_encoder(config(folder))
    assert lazy.dim == eager.dim == 24
    assert lazy.fingerprint() == eager.fingerprint()
    for ours, theirs in zip(lazy.encode(PROMPTS), eager.encode(PROMPTS), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("directory", [None, "encoders"])
def test_the_built_in_one(tmp_path: Path, directory: str | None, loads: list[Any]) -> None:
    where = None if directory is None else tmp_path / directory
    lazy = LazyTextEncoder(TextConfig(tiny_dim=32), directory=where)
    assert loads == []
    eager = load_text_encoder(TextConfig(tiny_dim=32))
    assert (lazy.dim, lazy.fingerprint()) == (32, eager.fingerprint())
    assert torch.equal(lazy.encode(["a"])[0], eager.encode(["a"])[0])
    assert list(tmp_path.iterdir()) == []  # made by code: nothing on the disk could vouch for it


def test_a_warm_start_reads_no_weights(folder: Path, tmp_path: Path, loads: list[Any]) -> None:
    first = LazyTextEncoder(config(folder), directory=tmp_path / "encoders")
    expected = TextCache(tmp_path / "text", first).get(PROMPTS)
    assert len(loads) == 1
    # Unreadable: a look at the weights would fail.
    weights = folder / "model.safetensors"
    stat = weights.stat()
    weights.write_bytes(b"\0" * stat.st_size)
    os.utime(weights, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    second = LazyTextEncoder(config(folder), directory=tmp_path / "encoders")
    cache = TextCache(tmp_path / "text", second)
    for ours, theirs in zip(cache.get(PROMPTS), expected, strict=True):
        assert torch.equal(ours, theirs)
    assert cache.dim == 24
    assert second.encode([]) == []
    assert not second.loaded
    assert len(loads) == 1
    with pytest.raises(ValueError, match="cannot be loaded"):
        cache.get(["a dog"])


def test_release_lets_go_and_the_next_prompt_reads_again(
    folder: Path, tmp_path: Path, loads: list[Any]
) -> None:
    lazy = LazyTextEncoder(config(folder), directory=tmp_path / "encoders")
    lazy.release()  # nothing is loaded yet
    before = lazy.encode(["a cat"])[0]
    assert lazy.loaded
    lazy.encode(["a dog"])
    assert len(loads) == 1
    lazy.release()
    assert not lazy.loaded
    assert lazy.dim == 24
    assert len(loads) == 1
    assert torch.equal(lazy.encode(["a cat"])[0], before)
    assert len(loads) == 2


def test_it_is_loaded_where_it_is_told_to(folder: Path, loads: list[Any]) -> None:
    LazyTextEncoder(config(folder), device="cpu").encode(["a"])
    assert loads == [torch.device("cpu")]


def replaced_config(folder: Path) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"layer_norm_epsilon": 1e-3}))


def replaced_weights(folder: Path) -> None:
    state = load_file(folder / "model.safetensors")
    save_file({name: value + 1 for name, value in state.items()}, folder / "model.safetensors")


def replaced_in_place(folder: Path) -> None:
    """A file of the same size: its time alone tells."""
    weights = folder / "model.safetensors"
    stat, content = weights.stat(), bytearray(weights.read_bytes())
    content[-3] ^= 1
    weights.write_bytes(content)
    os.utime(weights, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1_000_000_000))


@pytest.mark.parametrize("change", [replaced_config, replaced_weights, replaced_in_place])
def test_another_file_is_another_encoder(
    folder: Path, tmp_path: Path, loads: list[Any], change: Callable[[Path], None]
) -> None:
    encoders = tmp_path / "encoders"
    before = LazyTextEncoder(config(folder), directory=encoders).fingerprint()
    change(folder)
    after = LazyTextEncoder(config(folder), directory=encoders)
    assert after.fingerprint() == load_text_encoder(config(folder)).fingerprint() != before
    assert len(loads) == 2


@pytest.mark.parametrize("fields", [{"dtype": "bfloat16"}, {"max_tokens": 3}])
def test_other_settings_are_another_encoder(
    folder: Path, tmp_path: Path, fields: dict[str, Any]
) -> None:
    encoders = tmp_path / "encoders"
    before = LazyTextEncoder(config(folder), directory=encoders).fingerprint()
    after = LazyTextEncoder(config(folder, **fields), directory=encoders).fingerprint()
    assert after == load_text_encoder(config(folder, **fields)).fingerprint() != before


def test_weights_that_changed_behind_their_size_and_time_are_refused(
    folder: Path, tmp_path: Path
) -> None:
    encoders = tmp_path / "encoders"
    LazyTextEncoder(config(folder), directory=encoders).fingerprint()
    weights = folder / "model.safetensors"
    stat, content = weights.stat(), bytearray(weights.read_bytes())
    content[-3] ^= 1
    weights.write_bytes(content)
    os.utime(weights, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    stale = LazyTextEncoder(config(folder), directory=encoders)
    with pytest.raises(ValueError, match=r"is not what it was.*remove .*\.json"):
        stale.encode(["a"])


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff", b'{"dim": 24}', b'{"dim": "24"}'])
def test_damaged_facts_are_found_out_anew(folder: Path, tmp_path: Path, content: bytes) -> None:
    encoders = tmp_path / "encoders"
    expected = LazyTextEncoder(config(folder), directory=encoders).fingerprint()
    (kept,) = encoders.iterdir()
    whole = kept.read_bytes()
    kept.write_bytes(content)
    lazy = LazyTextEncoder(config(folder), directory=encoders)
    assert (lazy.dim, lazy.fingerprint()) == (24, expected)
    assert kept.read_bytes() == whole


def test_errors_keep_their_words(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is not a folder"):
        LazyTextEncoder(config(tmp_path / "absent"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"config\.json cannot be read"):
        LazyTextEncoder(config(tmp_path / "empty"), directory=tmp_path / "encoders").fingerprint()
    assert not (tmp_path / "encoders").exists()
