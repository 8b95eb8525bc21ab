"""A tokenizer that needs no files: one token per UTF-8 byte, then an end token.

The idea of a byte vocabulary for T5 is ByT5's (Xue et al., arXiv 2105.13626); the ids are ours.
"""

from __future__ import annotations


class ByteTokenizer:
    """Byte b has id b + 2; id 0 pads, id 1 ends every prompt, so the empty one has one token."""

    pad_id = 0
    end_id = 1
    vocab_size = 258

    def __call__(self, prompt: str) -> list[int]:
        """Token ids of `prompt`. Raises UnicodeEncodeError (a ValueError) for lone surrogates."""
        return [byte + 2 for byte in prompt.encode("utf-8")] + [self.end_id]
