"""T5 encoders behind one small interface: pretrained from a local folder, or tiny and random.

Goku's encoder is FLAN-T5-XL, 2048 wide (arXiv 2502.04896). Where no pretrained one is at hand, the
embedded default is a fixed random T5 over bytes: no knowledge of language, but different captions
get clearly different embeddings, which is all that a small model needs to tell its items apart.

transformers is imported when an encoder is built, never before.
"""

from __future__ import annotations

import hashlib
import json
import math
import textwrap
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, get_args

import torch
from torch import Tensor

from goku.text.byte_tokenizer import ByteTokenizer

if TYPE_CHECKING:
    from transformers import T5EncoderModel

TextDtype = Literal["float32", "bfloat16"]

# What decides a tokenizer's output, as far as the folder has it.
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "spiece.model",
)


class TextEncoder(Protocol):
    """What the rest of Goku knows of a text encoder."""

    @property
    def dim(self) -> int:
        """Width of an embedding."""

    def encode(self, prompts: Sequence[str]) -> list[Tensor]:
        """Per prompt an un-padded (length, dim) fp32 CPU tensor, length >= 1 even for ""."""

    def fingerprint(self) -> str:
        """Hex digest of all that decides the embeddings: weights, dtype, tokenizer, length."""


@dataclass(frozen=True)
class TextConfig:
    """Which text encoder, and how it runs.

    path: folder with config.json, *.safetensors and the tokenizer's files, as `save_pretrained`
        writes them (a whole T5 checkpoint will do); None chooses the built-in tiny encoder.
    dtype: of weights and activations. fp16 is refused: T5's activations overflow it.
    max_tokens: longest embedding, end token included; longer prompts are cut, with a warning.
        Ours: the paper does not give it.
    batch_size: prompts per forward. With 1 an embedding does not depend, to the last bit, on the
        prompts encoded beside it; more is faster on an accelerator and equal up to rounding.
    tiny_dim, tiny_layers, tiny_heads, tiny_seed: the built-in encoder's size and weights.

    Raises ValueError naming the field, its value and what is allowed.
    """

    path: str | None = None
    dtype: TextDtype = "float32"
    max_tokens: int = 256
    batch_size: int = 1
    tiny_dim: int = 128
    tiny_layers: int = 2
    tiny_heads: int = 4
    tiny_seed: int = 0

    def __post_init__(self) -> None:
        dtype: str = self.dtype
        if dtype not in get_args(TextDtype):
            reason = ""
            if dtype in ("float16", "fp16", "half"):
                reason = ": T5's feed-forward activations overflow fp16 and the embeddings turn NaN"
            raise ValueError(f"dtype must be one of {get_args(TextDtype)}, got {dtype!r}{reason}")
        for name in ("max_tokens", "batch_size", "tiny_dim", "tiny_layers", "tiny_heads"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name} must be an integer >= 1, got {value!r}")
        if self.tiny_dim % self.tiny_heads:
            raise ValueError(
                f"tiny_dim={self.tiny_dim} must be a multiple of tiny_heads={self.tiny_heads}"
            )


class T5TextEncoder:
    """A `TextEncoder` around transformers' T5EncoderModel. Build it with `load_text_encoder`."""

    def __init__(
        self,
        model: T5EncoderModel,
        tokenize: Callable[[str], list[int]],
        *,
        identity: str,
        max_tokens: int,
        batch_size: int = 1,
    ) -> None:
        """identity: what besides the weights, dtype and max_tokens decides the embeddings."""
        self.dim: int = model.config.d_model
        self._model = model.eval().requires_grad_(False)
        self._tokenize = tokenize
        self._identity = identity
        self._max_tokens = max_tokens
        self._batch_size = batch_size
        self._fingerprint: str | None = None

    def encode(self, prompts: Sequence[str]) -> list[Tensor]:
        """One un-padded (length, dim) fp32 CPU tensor per prompt, the end token's row last.

        Raises ValueError for something that is not a prompt and for a non-finite embedding.
        """
        tokens = self._token_ids(prompts)
        # Similar lengths together, so that little is spent on padding.
        order = sorted(range(len(tokens)), key=lambda i: len(tokens[i]))
        embeddings: list[Tensor] = [torch.empty(0)] * len(tokens)
        for start in range(0, len(order), self._batch_size):
            chosen = order[start : start + self._batch_size]
            for index, embedding in zip(
                chosen, self._forward([tokens[i] for i in chosen]), strict=True
            ):
                if not torch.isfinite(embedding).all():
                    raise ValueError(f"non-finite text embedding for prompt {prompts[index]!r}")
                embeddings[index] = embedding
        return embeddings

    def fingerprint(self) -> str:
        """Hex SHA-256 over weights, dtype, tokenizer, architecture and max_tokens."""
        if self._fingerprint is None:
            digest = hashlib.sha256(f"{self._identity}\n{self._max_tokens}\n".encode())
            for name, weight in sorted(self._model.state_dict().items()):
                digest.update(f"{name} {weight.dtype} {tuple(weight.shape)}\n".encode())
                raw = weight.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
                digest.update(memoryview(raw.numpy()))
            self._fingerprint = digest.hexdigest()
        return self._fingerprint

    def _token_ids(self, prompts: Sequence[str]) -> list[list[int]]:
        if isinstance(prompts, str):
            raise ValueError(f"prompts must be a sequence of strings, got the string {prompts!r}")
        tokens = []
        cut = []
        for prompt in prompts:
            if not isinstance(prompt, str):
                raise ValueError(f"prompts must be strings, got {prompt!r}")
            ids = self._tokenize(prompt)
            if not ids:
                raise ValueError(f"the tokenizer gives no token at all for prompt {prompt!r}")
            if len(ids) > self._max_tokens:
                cut.append(prompt)
                ids = ids[: self._max_tokens - 1] + ids[-1:]  # the end token stays
            tokens.append(ids)
        if cut:
            warnings.warn(
                f"prompts longer than max_tokens={self._max_tokens} are cut: "
                f"{len(cut)} of {len(tokens)}, the first of them {textwrap.shorten(cut[0], 80)!r}",
                stacklevel=3,
            )
        return tokens

    @torch.no_grad()
    def _forward(self, tokens: list[list[int]]) -> list[Tensor]:
        device = self._model.device
        longest = max(len(ids) for ids in tokens)
        input_ids = torch.zeros(len(tokens), longest, dtype=torch.int64)
        mask = torch.zeros_like(input_ids)
        for row, ids in enumerate(tokens):
            input_ids[row, : len(ids)] = torch.tensor(ids)
            mask[row, : len(ids)] = 1
        # A caller's autocast must not change what is cached under this encoder's dtype.
        with torch.autocast(device.type, enabled=False):
            hidden = self._model(input_ids=input_ids.to(device), attention_mask=mask.to(device))
        states = hidden.last_hidden_state.float().cpu()
        return [states[row, : len(ids)].clone() for row, ids in enumerate(tokens)]


def load_text_encoder(config: TextConfig, *, device: torch.device | str = "cpu") -> T5TextEncoder:
    """The encoder that `config` describes, on `device`. Nothing is ever downloaded.

    Raises ValueError naming the folder and what is wrong with it.
    """
    dtype = getattr(torch, config.dtype)
    if config.path is None:
        model = _tiny_model(config)
        tokenize: Callable[[str], list[int]] = ByteTokenizer()
        architecture = (config.tiny_dim, config.tiny_layers, config.tiny_heads)
        identity = f"goku tiny T5 v1 over bytes {architecture}"
    else:
        if not Path(config.path).is_dir():
            raise ValueError(no_folder(config.path))
        try:
            model, tokenize, identity = _pretrained(Path(config.path), dtype)
        except ValueError as error:
            raise ValueError(f"text.path: {error}") from error
    model.set_attn_implementation("eager")  # one formula on every machine, no choice of kernels
    torch.nn.Module.to(model, device=device, dtype=dtype)
    return T5TextEncoder(
        model,
        tokenize,
        identity=identity,
        max_tokens=config.max_tokens,
        batch_size=config.batch_size,
    )


def no_folder(path: str) -> str:
    """What is said of a `text.path` that is none."""
    allowed = "the folder of a T5 encoder, or none for the built-in one"
    return f"text.path is {path}, which is not a folder; allowed: {allowed}"


def load_tokenizer(config: TextConfig) -> Callable[[str], list[int]]:
    """The token ids that the encoder of `config` makes of a prompt, uncut; its weights are not read.

    Raises ValueError naming the folder and what is wrong with it.
    """
    if config.path is None:
        return ByteTokenizer()
    if not Path(config.path).is_dir():
        raise ValueError(no_folder(config.path))
    if not (Path(config.path) / "config.json").is_file():
        raise ValueError(f"text encoder in {config.path!r} cannot be loaded: it has no config.json")
    return partial(_tokenize, _tokenizer(Path(config.path)))


def _tiny_model(config: TextConfig) -> T5EncoderModel:
    """A random T5 encoder in fp32 on the CPU, the same bits on every machine.

    The scales are ours, chosen so that embeddings of different captions differ at matching
    positions: T5's own initialisation leaves each embedding close to that of its byte. Weak byte
    embeddings, sharp attention and strong relative-position biases make every position depend on
    its neighbourhood. T5's final RMSNorm, whose weight is 1 here, gives each output unit RMS.
    """
    from transformers import T5Config, T5EncoderModel

    architecture = T5Config(
        vocab_size=ByteTokenizer.vocab_size,
        d_model=config.tiny_dim,
        d_kv=config.tiny_dim // config.tiny_heads,
        d_ff=2 * config.tiny_dim,
        num_layers=config.tiny_layers,
        num_heads=config.tiny_heads,
        feed_forward_proj="gated-gelu",
        dropout_rate=0.0,
        pad_token_id=ByteTokenizer.pad_id,
        eos_token_id=ByteTokenizer.end_id,
    )
    with torch.random.fork_rng(devices=[]):  # transformers' own initialisation draws from it
        model = T5EncoderModel(architecture)
    generator = torch.Generator().manual_seed(config.tiny_seed)
    with torch.no_grad():
        for name, weight in sorted(model.named_parameters()):
            if "layer_norm" in name:
                weight.fill_(1.0)
                continue
            if "embed" in name or "shared" in name:
                std = 0.3
            elif "relative_attention_bias" in name:
                std = 3.0
            elif name.endswith(".q.weight"):  # T5 does not scale its scores by 1/sqrt(d_kv)
                std = 4.0 / math.sqrt(weight.shape[1] * architecture.d_kv)
            else:
                std = 1.0 / math.sqrt(weight.shape[1])
            # Uniform, not normal: its 24 random bits times a power of two are exact anywhere,
            # while the logarithms of a normal differ between instruction sets.
            uniform = torch.rand(weight.shape, generator=generator)
            weight.copy_((uniform - 0.5) * (math.sqrt(12.0) * std))
    return model


def _pretrained(
    folder: Path, dtype: torch.dtype
) -> tuple[T5EncoderModel, Callable[[str], list[int]], str]:
    """Model, tokenizer and identity of the checkpoint in `folder`."""
    from safetensors import SafetensorError
    from transformers import T5EncoderModel

    architecture = _read_json(folder / "config.json")
    if architecture.get("model_type") != "t5":
        raise ValueError(
            f"{folder / 'config.json'}: model_type must be 't5', "
            f"got {architecture.get('model_type')!r}"
        )
    if not any(folder.glob("*.safetensors")):
        raise ValueError(f"text encoder path {str(folder)!r} holds no *.safetensors file")
    tokenizer = _tokenizer(folder)
    try:
        loaded: Any = T5EncoderModel.from_pretrained(
            folder,
            local_files_only=True,
            use_safetensors=True,
            dtype=dtype,
            output_loading_info=True,
        )
    except (OSError, RuntimeError, SafetensorError, ValueError) as error:
        raise ValueError(f"text encoder in {str(folder)!r} cannot be loaded: {error}") from error
    model, loading = loaded
    if loading["missing_keys"]:
        # transformers fills them with random numbers and goes on.
        raise ValueError(
            f"text encoder in {str(folder)!r} lacks weights: {sorted(loading['missing_keys'])}"
        )
    if len(tokenizer) > model.config.vocab_size:
        raise ValueError(
            f"text encoder in {str(folder)!r}: the tokenizer has {len(tokenizer)} tokens, the "
            f"model only {model.config.vocab_size}"
        )

    identity = {
        name: hashlib.sha256((folder / name).read_bytes()).hexdigest()
        for name in ("config.json", *_TOKENIZER_FILES)
        if (folder / name).is_file()
    }
    return model, partial(_tokenize, tokenizer), json.dumps(identity)


def _tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer

    if (
        (folder / "spiece.model").is_file()
        and not (folder / "tokenizer.json").is_file()
        and find_spec("sentencepiece") is None
    ):
        raise ValueError(
            f"text encoder path {str(folder)!r} holds spiece.model, but needs tokenizer.json "
            f"(convert once with sentencepiece installed: pip install 'goku[text]')"
        )
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, RuntimeError, ValueError) as error:
        raise ValueError(f"text encoder in {str(folder)!r} cannot be loaded: {error}") from error


def _tokenize(tokenizer: Any, prompt: str) -> list[int]:
    ids: list[int] = tokenizer(prompt, padding=False, truncation=False, verbose=False)["input_ids"]
    return ids


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a JSON object")
    return content
