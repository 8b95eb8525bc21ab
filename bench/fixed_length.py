"""What packing costs: a pack of long samples beside fixed-length batches of the same lengths.

The time to expect of a pack is the sum over its samples of their FLOPs by the rate that was measured
on the pack of samples of that one length. Short samples are left out: they do not fill their blocks,
packed or not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from bench.packs import GPU_PACKS, LONG_PACKS, Pack
from goku_kernels import varlen_attention_flops

Record = Mapping[str, Any]

OURS = "goku triton"
CUDNN = "cuDNN SDPA, one batched call"
LONG = 4096  # tokens of a sample, at least
WITHIN = 1.03  # of the expected time
OTHER_RUN = "\u2021"
HEAD = [
    "GPU", "case", "pack", "direction", "ours ms", "expected ms", "packed / fixed",
    f"within {WITHIN - 1:.0%}", "cuDNN's batches ms", "packed / cuDNN's",
]  # fmt: skip
WORDS = f"""\
Expected: every sample's FLOPs by our rate on the batch of samples of its length, all measured above;
samples have at least {LONG} tokens. cuDNN's batches: the same by the rates of its one call a batch, which
knows no packing. {OTHER_RUN} marks what is not of one run and of the same sources.
"""


def compared() -> list[Pack]:
    """The packs whose samples are all long and not all of one length."""
    return [p for p in (*GPU_PACKS, *LONG_PACKS) if _long(p) and len(set(p.lengths)) > 1]


def batches() -> dict[int, str]:
    """Length -> name of the pack whose samples all have it."""
    packs = [p for p in (*GPU_PACKS, *LONG_PACKS) if _long(p) and len(set(p.lengths)) == 1]
    return {pack.lengths[0]: pack.name for pack in packs}


def _long(pack: Pack) -> bool:
    return min(pack.lengths) >= LONG


def lines(records: Sequence[Record], mark: Callable[[Record], str]) -> list[list[str]]:
    """Cells of the table, a line for every pack, case and direction that we were measured on.

    Args:
        records: newest rows of varlen_attention on GPUs.
        mark: a row -> the sign that its sources have changed, or "".
    """
    rows = {
        (r["hardware"]["device"], r["case"], r["direction"], r["peer"], r["pack"]): r
        for r in records
        # of self-attention: the keys are the tokens
        if r["status"] == "measured" and r["shape"]["keys"] == r["shape"]["tokens"]
    }
    packs, names = {pack.name: pack for pack in compared()}, batches()
    found = []
    for (*group, peer, name), row in rows.items():
        if peer == OURS and name in packs:
            lengths = set(packs[name].lengths)
            ours, cudnn = (
                {n: rows.get((*group, who, names.get(n, ""))) for n in lengths}
                for who in (OURS, CUDNN)
            )
            device, case, direction = group
            cells = [device, case, name, direction, f"{row['median_ms']:.3f}{mark(row)}"]
            cells += _ours(row, packs[name], ours, mark)
            found.append([*cells, *_cudnn(row, packs[name], cudnn, mark)])
    return found


def _ours(
    row: Record, pack: Pack, fixed: Mapping[int, Record | None], mark: Callable[[Record], str]
) -> list[str]:
    expected = expected_ms(row, pack, fixed)
    if expected is None:
        absent = ", ".join(str(n) for n, r in sorted(fixed.items()) if r is None)
        return [f"no batch of samples of {absent} was measured", "", ""]
    ratio = row["median_ms"] / expected
    signs = _signs(row, fixed.values(), mark)
    return [f"{expected:.3f}{signs}", f"{ratio:.3f}", "yes" if ratio <= WITHIN else "no"]


def _cudnn(
    row: Record, pack: Pack, fixed: Mapping[int, Record | None], mark: Callable[[Record], str]
) -> list[str]:
    expected = expected_ms(row, pack, fixed)
    if expected is None:
        return ["not measured", "not measured"]
    signs = _signs(row, fixed.values(), mark)
    return [f"{expected:.3f}{signs}", f"{row['median_ms'] / expected:.3f}"]


def expected_ms(row: Record, pack: Pack, fixed: Mapping[int, Record | None]) -> float | None:
    """Milliseconds of the pack's samples at the rates of `fixed`; None where one of them is missing."""
    total = 0.0
    for length in pack.lengths:
        batch = fixed[length]
        if batch is None:
            return None
        flops = varlen_attention_flops(
            (length,), (length,), heads=row["shape"]["heads"], head_dim=row["shape"]["head_dim"],
            backward=row["direction"] == "backward",
        )  # fmt: skip
        total += flops / (batch["work"] / batch["median_ms"])
    return total


def _signs(row: Record, fixed: Iterable[Record | None], mark: Callable[[Record], str]) -> str:
    batches = [r for r in fixed if r is not None]
    stale = max((mark(r) for r in batches), key=len)
    return stale + ("" if all(_run(r) == _run(row) for r in batches) else OTHER_RUN)


def _run(row: Record) -> tuple[float, str]:
    """What rows of one run share: its ceiling, which no second run measures to the last digit."""
    return row["ceiling"]["value"], row["sources_sha256"]
