"""The least that the memory-bound operators of one block have to read and write."""

from __future__ import annotations

from goku.model import ModelConfig
from goku_kernels import adaln_modulate_bytes, qk_norm_rope_bytes


def memory_bytes(config: ModelConfig, tokens: int, text: int, stream: int) -> float:
    """Bytes of a block's memory-bound operators, forward and backward.

    adaLN, three gated residuals, both QK-norms (text keys are normed, not rotated) and the FFN's
    GELU, whose input is read and output written, and in the backward two read and one written.

    Args:
        tokens, text: of all samples.
        stream: bytes of a number of the residual stream.
    """
    heads = {"heads": config.heads, "head_dim": config.head_dim, "itemsize": 2}
    total = 0
    for backward in (False, True):
        total += adaln_modulate_bytes(tokens, config.dim, itemsize=stream, backward=backward)
        for gated, normed in ((True, True), (False, True), (True, False)):
            total += tokens * config.dim * residual_bytes(stream, gated, normed, backward)
        total += qk_norm_rope_bytes(tokens, tokens, **heads, backward=backward)
        total += qk_norm_rope_bytes(tokens, text, **heads, backward=backward)
        total += tokens * config.mlp_dim * 2 * (3 if backward else 2)
    return total


def residual_bytes(stream: int, gated: bool, normed: bool, backward: bool) -> int:
    """Least traffic of one residual sum per element; its branch is bf16, the rest `stream` bytes.

    Without a norm behind it there is one output, whose gradient is the residual's as it is.
    """
    branch = 2
    if not backward:  # residual and branch read, the sum and what is normed of it written
        return stream + branch + stream * (2 if normed else 1)
    # Read: gradients of the outputs, the sum for its norm, the branch for its gate. Written: the
    # gradients of residual and branch.
    read = stream * (3 if normed else 1) + (branch if gated else 0)
    return read + (stream if normed else 0) + branch
