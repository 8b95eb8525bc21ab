"""Text encoders: un-padded results, neighbours without influence, and refusals that say why."""

import itertools
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
    T5ForConditionalGeneration,
)

from goku.text import ByteTokenizer, TextConfig, TextEncoder, load_text_encoder

PROMPTS = ["", "a cat", "a photograph of an astronaut, smiling", "Überall Äpfel 🍎", "a dog", "x"]
WORDS = ["a", "cat", "dog", "photograph", "of", "an", "astronaut"]


def tiny(**overrides: object) -> TextEncoder:
    return load_text_encoder(TextConfig(**overrides))  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def encoder() -> TextEncoder:
    return tiny()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A T5 with decoder and a word tokenizer, saved as FLAN-T5 is."""
    folder = tmp_path_factory.mktemp("t5")
    save_tokenizer(folder, WORDS)
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=16, d_model=24, d_kv=8, d_ff=48, num_layers=2, num_heads=3, dropout_rate=0.5
    )
    T5ForConditionalGeneration(config).save_pretrained(folder)
    return folder


def save_tokenizer(folder: Path, words: list[str]) -> None:
    vocabulary = {word: i for i, word in enumerate(["<pad>", "</s>", "<unk>", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder)


def copied(folder: Path, to: Path) -> Path:
    to.mkdir()
    for file in folder.iterdir():
        (to / file.name).write_bytes(file.read_bytes())
    return to


def test_byte_tokenizer_round_trips_and_always_ends() -> None:
    tokenizer = ByteTokenizer()
    assert tokenizer("") == [tokenizer.end_id]
    for prompt in PROMPTS:
        ids = tokenizer(prompt)
        assert bytes(i - 2 for i in ids[:-1]).decode() == prompt
        assert ids[-1] == tokenizer.end_id
        assert tokenizer.pad_id not in ids
        assert max(ids) < tokenizer.vocab_size
    assert max(tokenizer("\U0010ffff")) == 0xF4 + 2


def test_shapes_and_dtype(encoder: TextEncoder) -> None:
    for prompt, embedding in zip(PROMPTS, encoder.encode(PROMPTS), strict=True):
        assert (
            embedding.shape
            == (len(prompt.encode()) + 1, encoder.dim)
            == (
                len(ByteTokenizer()(prompt)),
                128,
            )
        )
        assert embedding.dtype == torch.float32
        assert not embedding.requires_grad
        assert not embedding.is_inference()
    assert encoder.encode([]) == []


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_by_default_neighbours_change_no_bit(dtype: str) -> None:
    encoder = tiny(dtype=dtype)
    for prompt, embedding in zip(PROMPTS, encoder.encode(PROMPTS), strict=True):
        assert torch.equal(embedding, encoder.encode([prompt])[0])


def test_padded_batches_equal_one_by_one() -> None:
    # fp32, outputs of unit RMS. Sums change their order, and the sharp attention (scores up to
    # about 20) turns a score's rounding of 20 * 6e-8 into that relative error of its weights:
    # 2e-6 was seen. A padding token that leaked would show at 1e-2.
    one_by_one = tiny().encode(PROMPTS)
    for batch_size in (2, 4, 64):
        batched = tiny(batch_size=batch_size).encode(PROMPTS)
        for expected, actual in zip(one_by_one, batched, strict=True):
            torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)


def test_autocast_of_the_caller_does_not_reach_the_encoder(encoder: TextEncoder) -> None:
    expected = encoder.encode(["a cat"])[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(encoder.encode(["a cat"])[0], expected)


def test_building_leaves_the_global_generator_alone_and_depends_on_the_seed_alone() -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = tiny(tiny_dim=32)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert torch.equal(tiny(tiny_dim=32).encode(["a"])[0], first.encode(["a"])[0])
    assert tiny(tiny_dim=32).fingerprint() == first.fingerprint()
    assert not torch.equal(tiny(tiny_dim=32, tiny_seed=1).encode(["a"])[0], first.encode(["a"])[0])


def test_tiny_embeddings_have_unit_rms_and_tell_captions_apart(encoder: TextEncoder) -> None:
    captions = [
        "a cat sits on a mat",
        "a dog sits on a mat",
        "a photograph of an astronaut",
        "a photograph of a rocket launch",
        "a photograph of a cup of coffee",
        "a red bicycle rider in the street",
        "a big white rabbit in a meadow",
        "a temple in china",
        "a flower",
    ]
    embeddings = encoder.encode(captions)
    for embedding in embeddings:
        # The final RMSNorm has weight 1 and epsilon 1e-6.
        torch.testing.assert_close(
            embedding.square().mean(-1), torch.ones(len(embedding)), rtol=0, atol=1e-3
        )
    cosines = []
    for one, other in itertools.combinations(embeddings, 2):
        shared = min(len(one), len(other))
        cosines.append(torch.cosine_similarity(one[:shared], other[:shared], dim=-1).mean().item())
    # T5's own initialisation gives 0.32 and 0.84 here; see _tiny_model.
    assert sum(cosines) / len(cosines) < 0.25
    assert max(cosines) < 0.65


def test_long_prompts_are_cut_with_a_warning_and_keep_their_end() -> None:
    encoder = tiny(max_tokens=4)
    with pytest.warns(UserWarning, match=r"longer than max_tokens=4 are cut: 1 of 2, .*'abcd'"):
        cut, whole = encoder.encode(["abcd", "abc"])
    assert torch.equal(cut, whole)


def test_local_checkpoint_equals_transformers(checkpoint: Path) -> None:
    encoder = load_text_encoder(TextConfig(path=str(checkpoint), batch_size=4))
    prompts = ["", "a cat", "a photograph of an astronaut", "a dog"]  # padded, as one batch
    model = T5EncoderModel.from_pretrained(checkpoint).eval()
    ids = {word: i for i, word in enumerate(WORDS, start=3)}
    assert encoder.dim == 24
    for prompt, embedding in zip(prompts, encoder.encode(prompts), strict=True):
        tokens = torch.tensor([[ids[word] for word in prompt.split()] + [1]])
        with torch.no_grad():
            expected = model(input_ids=tokens).last_hidden_state[0]
        torch.testing.assert_close(embedding, expected, rtol=1e-6, atol=1e-6)


def test_local_checkpoint_in_bf16(checkpoint: Path) -> None:
    (exact,) = load_text_encoder(TextConfig(path=str(checkpoint))).encode(["a cat"])
    (rounded,) = load_text_encoder(TextConfig(path=str(checkpoint), dtype="bfloat16")).encode(
        ["a cat"]
    )
    assert rounded.dtype == torch.float32
    assert torch.equal(rounded, rounded.bfloat16().float())
    assert not torch.equal(rounded, exact)
    # Two layers of bf16, 8 bits of mantissa, at unit scale.
    torch.testing.assert_close(rounded, exact, rtol=0, atol=0.1)


def test_fingerprint_follows_everything_that_decides_the_embeddings(
    checkpoint: Path, tmp_path: Path
) -> None:
    path = str(checkpoint)
    words = copied(checkpoint, tmp_path / "words")
    save_tokenizer(words, WORDS[::-1])
    layers = copied(checkpoint, tmp_path / "config")
    config = json.loads((layers / "config.json").read_text())
    config["relative_attention_max_distance"] = 64  # changes results but no weight
    (layers / "config.json").write_text(json.dumps(config))
    weights = copied(checkpoint, tmp_path / "weights")
    model = T5EncoderModel.from_pretrained(weights)
    with torch.no_grad():
        model.encoder.final_layer_norm.weight[0] += 1e-3
    model.save_pretrained(weights)
    (weights / "config.json").write_bytes((checkpoint / "config.json").read_bytes())
    configs = [
        TextConfig(),
        TextConfig(tiny_seed=1),
        TextConfig(tiny_heads=8),
        TextConfig(path=path),
        TextConfig(path=path, dtype="bfloat16"),
        TextConfig(path=path, max_tokens=255),
        TextConfig(path=str(words)),
        TextConfig(path=str(layers)),
        TextConfig(path=str(weights)),
    ]
    fingerprints = [load_text_encoder(config).fingerprint() for config in configs]
    assert len(set(fingerprints)) == len(configs)
    # The folder's name and the batch size do not decide them.
    moved = copied(checkpoint, tmp_path / "moved")
    same = load_text_encoder(TextConfig(path=str(moved), batch_size=8)).fingerprint()
    assert same == fingerprints[3]


@pytest.mark.parametrize("dtype", ["float16", "fp16", "half"])
def test_fp16_is_refused_with_the_reason(dtype: str) -> None:
    with pytest.raises(ValueError, match=rf"dtype must be one of.*got '{dtype}'.*overflow fp16"):
        TextConfig(dtype=dtype)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("field", "value"),
    [("max_tokens", 0), ("batch_size", 0), ("tiny_layers", 1.5), ("tiny_dim", -1)],
)
def test_bad_config_is_named(field: str, value: float) -> None:
    with pytest.raises(ValueError, match=rf"{field} must be an integer >= 1, got {value}"):
        TextConfig(**{field: value})  # type: ignore[arg-type]


def test_bad_prompts_are_named(encoder: TextEncoder) -> None:
    with pytest.raises(ValueError, match=r"sequence of strings, got the string 'a cat'"):
        encoder.encode("a cat")
    with pytest.raises(ValueError, match=r"prompts must be strings, got None"):
        encoder.encode(["a", None])  # type: ignore[list-item]


def test_bad_folders_are_named(checkpoint: Path, tmp_path: Path) -> None:
    def refused(folder: Path, message: str) -> None:
        with pytest.raises(ValueError, match=message) as caught:
            load_text_encoder(TextConfig(path=str(folder)))
        assert str(folder) in str(caught.value)

    refused(tmp_path / "absent", "is not a folder")
    empty = tmp_path / "empty"
    empty.mkdir()
    refused(empty, r"config\.json cannot be read")

    other = copied(checkpoint, tmp_path / "other")
    (other / "config.json").write_text('{"model_type": "umt5"}')
    refused(other, "model_type must be 't5', got 'umt5'")

    pickled = copied(checkpoint, tmp_path / "pickled")
    (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
    refused(pickled, r"holds no \*\.safetensors file")

    truncated = copied(checkpoint, tmp_path / "truncated")
    content = (truncated / "model.safetensors").read_bytes()
    (truncated / "model.safetensors").write_bytes(content[: len(content) // 2])
    refused(truncated, "cannot be loaded")

    deeper = copied(checkpoint, tmp_path / "deeper")
    config = json.loads((deeper / "config.json").read_text())
    config["num_layers"] = 3
    (deeper / "config.json").write_text(json.dumps(config))
    refused(deeper, r"lacks weights: \['encoder\.block\.2")

    wider = copied(checkpoint, tmp_path / "wider")
    config["num_layers"], config["d_model"] = 2, 32
    (wider / "config.json").write_text(json.dumps(config))
    refused(wider, "cannot be loaded")

    wordy = copied(checkpoint, tmp_path / "wordy")
    save_tokenizer(wordy, [f"word{i}" for i in range(20)])
    refused(wordy, "the tokenizer has 23 tokens, the model only 16")


def test_a_sentencepiece_model_alone_is_refused_by_name(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = copied(checkpoint, tmp_path / "spiece")
    (folder / "spiece.model").write_bytes(b"\n\x0b\n\x04</s>")
    monkeypatch.setitem(sys.modules, "sentencepiece", None)  # as where it is not installed
    assert load_text_encoder(TextConfig(path=str(folder))).dim == 24
    (folder / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match=r"needs tokenizer\.json \(convert once with") as caught:
        load_text_encoder(TextConfig(path=str(folder)))
    assert str(folder) in str(caught.value)


def test_non_finite_embeddings_are_refused(checkpoint: Path, tmp_path: Path) -> None:
    folder = copied(checkpoint, tmp_path / "broken")
    model = T5EncoderModel.from_pretrained(folder)
    with torch.no_grad():
        model.encoder.final_layer_norm.weight[0] = torch.inf
    model.save_pretrained(folder)
    with pytest.raises(ValueError, match=r"non-finite text embedding for prompt 'a cat'"):
        load_text_encoder(TextConfig(path=str(folder))).encode(["a cat"])


def test_importing_goku_text_does_not_import_transformers() -> None:
    code = "import sys, goku.text; sys.exit('transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
