"""What a block can be expected to take, from ceilings and from what was measured of the attention.

Matrix products at their ceiling, memory-bound operators at the copy's, attention at its own rate of
the same pack and chip. Where that was not measured the sum is too short, and says so.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from bench import block_traffic, harness, timing
from goku_kernels import varlen_attention_flops

if TYPE_CHECKING:
    from bench.block import Setting

# Of a row whose expected time is shorter than perfect kernels would take: nothing to judge ours by.
RATE_NOT_MEASURED = "too short: attention was not measured, and counts at the matmul ceiling"


def memory_bytes(setting: Setting) -> float:
    """Least traffic of the block's memory-bound operators, forward and backward."""
    tokens, text = setting.pack.tokens, sum(setting.text_lengths)
    return block_traffic.memory_bytes(setting.config, tokens, text, setting.stream_bytes)


def attention_flops(setting: Setting) -> float:
    """FLOPs of both attentions, forward and backward."""
    config, lengths = setting.config, setting.pack.lengths
    return sum(
        varlen_attention_flops(lengths, keys, heads=config.heads, head_dim=config.head_dim,
                               backward=backward)
        for keys in (lengths, setting.text_lengths) for backward in (False, True)
    )  # fmt: skip


def attention_rate(
    setting: Setting, records: Sequence[Mapping[str, Any]], device_name: str, deterministic: bool
) -> float | None:
    """FLOP/s of our attention, forward and backward together, as measured on this pack and chip.

    deterministic: with the backward of equal bits. None unless both directions were measured with the
    sources as they are now.
    """
    found: dict[str, Mapping[str, Any]] = {}
    for record in harness.newest(records):
        wanted = {
            "name": "varlen_attention", "case": setting.preset, "pack": setting.pack.name,
            "peer": f"goku triton{', deterministic' if deterministic else ''}",
            "status": "measured",
        }  # fmt: skip
        here = record["hardware"]["device"] == device_name
        if here and all(record[k] == v for k, v in wanted.items()) and not harness.is_stale(record):
            found[record["direction"]] = record
    if set(found) != {"forward", "backward"}:
        return None
    work = sum(record["work"] for record in found.values())
    return work / (1e-3 * sum(record["median_ms"] for record in found.values()))


def expected(
    setting: Setting, ceilings: timing.Ceilings, attention: float | None
) -> dict[str, float | str]:
    """Milliseconds to expect, in parts, and which rate was taken for the attention.

    attention: FLOP/s measured of it. None takes the matrix product's, which no attention reaches, and
        says that it was not measured.
    """
    pairs = attention_flops(setting)
    ms = {
        "expected_matmul_ms": 1e3 * (setting.flops - pairs) / ceilings.matmul.value,
        "expected_attention_ms": 1e3 * pairs / (attention or ceilings.matmul.value),
        "expected_memory_ms": 1e3 * memory_bytes(setting) / ceilings.copy.value,
    }
    source = RATE_NOT_MEASURED if attention is None else "attention as measured"
    return {**ms, "expected_ms": sum(ms.values()), "attention_rate": source}


def reached(record: Mapping[str, Any]) -> float | None:
    """Which share of the expected speed a measured row has; None where what is expected is too short.

    The shorter what is expected, the worse what was measured would look.
    """
    if record["extra"]["attention_rate"] == RATE_NOT_MEASURED:
        return None
    return float(record["extra"]["expected_ms"] / record["median_ms"])
