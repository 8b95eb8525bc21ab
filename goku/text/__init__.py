"""Prompts to un-padded embeddings: a T5 encoder from a local folder, or a tiny built-in one."""

from goku.text.byte_tokenizer import ByteTokenizer
from goku.text.cache import TextCache, compact
from goku.text.encoder import (
    T5TextEncoder,
    TextConfig,
    TextEncoder,
    load_text_encoder,
    load_tokenizer,
)
from goku.text.lazy import LazyTextEncoder

__all__ = [
    "ByteTokenizer",
    "LazyTextEncoder",
    "T5TextEncoder",
    "TextCache",
    "TextConfig",
    "TextEncoder",
    "compact",
    "load_text_encoder",
    "load_tokenizer",
]
