"""The configurations of each kernel that could win, before any of them is compiled.

A row of configs/<op>.json is tuned at the width of one of Goku's models where it holds one, since
a width that is no power of two leaves lanes of the padded tile idle.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from typing import Any

from goku.model import PRESETS

Row = Mapping[str, Any]
Config = dict[str, int]

# Numbers of a tile that one thread holds: fewer waste the 16 bytes of a load, more do not fit its
# 255 registers several times (value, gain, modulation, sums).
_PER_THREAD = (4, 64)
_MODULATION = ("adaln_modulate", "gated_residual_adaln")
# Which function of triton/<op>.py takes a row's configuration, where it is not "<kernel>_kernel".
_FUNCTIONS = {
    ("qk_norm_rope", "forward"): "rows_kernel",
    ("qk_norm_rope", "backward"): "rows_kernel",
    ("rectified_flow_noise", "forward"): "noise_kernel",
    ("velocity_loss", "forward"): "sums_kernel",
    ("velocity_loss", "backward"): "gradient_kernel",
    ("varlen_attention", "forward_specialised"): "specialised_forward_kernel",
    ("varlen_attention", "gradient"): "gradient_kv_kernel",  # with that of the queries in it
}

# Kernels that run in the place of others where they have a row. One stays unused where it is slower
# than those: the forward with specialised warps beside the plain one; one kernel for all gradients,
# asked for without equal bits, beside the two that are deterministic.
IN_PLACE_OF = {
    ("varlen_attention", "forward_specialised"): "forward",
    ("varlen_attention", "gradient"): "gradient_kv",
}


def function(op: str, kernel: str) -> str:
    """The name of the function that is compiled with a row's configuration."""
    return _FUNCTIONS.get((op, kernel), f"{kernel}_kernel")


def options(op: str, kernel: str) -> dict[str, bool]:
    """What bench.<op>.function is to be asked for, so that it launches a row's kernel.

    Two kernels for queries and keys are attention's deterministic backward; without that demand one
    may do both.
    """
    apart = op == "varlen_attention" and kernel in ("gradient_kv", "gradient_q")
    return {"deterministic": True} if apart else {}


def direction(kernel: str) -> str:
    """In which direction a row's kernel runs."""
    return "forward" if kernel.startswith("forward") else "backward"


def judged_size(op: str, row: Row, rows: list[Row]) -> int:
    """The width (or head width) that a row is tuned at: the widest of Goku's that it holds for.

    Without such a one its own size; rows up to 8192 and of tokens' channels have 4096 and 64.
    """
    if op == "varlen_attention":
        return int(row["size"])
    if op in ("rectified_flow_noise", "velocity_loss"):
        return min(int(row["size"]), 64) if op == "rectified_flow_noise" else int(row["size"])
    keys = ("kernel", "chip")
    below = [
        r["size"]
        for r in rows
        if all(r[k] == row[k] for k in keys)
        and set(r["dtypes"]) & set(row["dtypes"])
        and r["size"] < row["size"]
    ]
    widths = {preset.dim for preset in PRESETS.values()}
    held = [w for w in widths if max(below, default=0) < w <= row["size"]]
    return max(held, default=int(row["size"]))


def space(op: str, row: Row, size: int) -> Iterator[Config]:
    """Configurations to compile for a row that is judged at `size`; `programs` as they are there.

    How many programs a multiprocessor is to hold is no part of what is compiled: `programs` sets it
    once the registers are known.
    """
    kernel, shipped = row["kernel"], dict(row["config"])
    for change in itertools.product(*_axes(op, kernel, shipped)):
        config = shipped | dict(change)
        if config == shipped or _sensible(op, kernel, config, size):
            yield config


def programs(op: str, config: Config, blocks: int) -> list[Config]:
    """`config` with the numbers of programs worth trying where `blocks` fit: all, and one less.

    One less ends where a run of rows divides worse, but leaves registers to other forms of the
    arguments, of which more of a kernel fit. Attention's tiles are dealt out; all that fit take part.
    """
    if not config.get("programs") or blocks == 0:
        return [config]
    all_of_them = min(blocks, 32)
    counts = [all_of_them]
    if op != "varlen_attention" and all_of_them > 1:
        counts.append(all_of_them - 1)
    return [{**config, "programs": n} for n in counts]


def _axes(op: str, kernel: str, config: Config) -> list[list[tuple[str, int]]]:
    def axis(name: str, *values: int) -> list[tuple[str, int]]:
        return [(name, v) for v in dict.fromkeys((config[name], *values))]

    if op in _MODULATION and kernel in ("forward", "backward"):
        return [
            axis("num_warps", 2, 4, 8, 16), axis("num_stages", 1, 2, 3), axis("rows", 1, 2)
        ]  # fmt: skip
    if op in _MODULATION:
        return [axis("num_warps", 4, 8), axis("columns", 32, 64), axis("slots", 32, 64, 128)]
    if op == "qk_norm_rope" and kernel != "weight":
        return [axis("num_warps", 1, 2, 4, 8, 16), axis("stages", 1, 2, 3)]
    if op == "qk_norm_rope":
        return [axis("num_warps", 4, 8), axis("block", 16, 32, 64), axis("chunk", 32, 64, 128)]
    if op == "rectified_flow_noise":
        return [axis("num_warps", 2, 4, 8), axis("groups", 128, 256, 512, 1024)]
    if op == "velocity_loss":
        rows = config["rows"]
        return [axis("num_warps", 2, 4, 8), axis("rows", max(1, rows // 2), 2 * rows, 4 * rows)]
    if kernel == "delta":
        return [axis("num_warps", 4, 8), axis("rows", 16, 32, 64, 128)]
    stages = (2, 3, 4) if kernel.startswith("forward") else (1, 2, 3)
    axes = [
        axis("num_warps", 4, 8), axis("num_stages", *stages), axis("queries", 64, 128),
        axis("keys", 32, 64, 128),
    ]  # fmt: skip
    return [*axes, axis("reduce", 0, 1)] if "reduce" in config else axes


def _sensible(op: str, kernel: str, config: Config, size: int) -> bool:
    threads = 32 * config["num_warps"]
    if op == "varlen_attention" and kernel != "delta":
        # A group of four warps multiplies 64 rows at a time; of the tile of scores, and of one as
        # wide as a head, a thread holds at most 192 numbers beside what it needs to address.
        outer, inner = config["queries"], config["keys"]
        by_keys = kernel in ("gradient", "gradient_kv")
        if by_keys:
            outer, inner = inner, outer
        if kernel == "forward_specialised":
            return outer == 128 and config["num_warps"] == 4 and inner >= 64
        held = outer * (inner + size * (2 if by_keys else 1)) // threads
        # Eight warps may share 64 rows where they divide the other side of several products.
        few = kernel == "forward" and outer // 64 * 4 < config["num_warps"]
        return not few and held <= 192
    if op == "rectified_flow_noise":
        return 1 <= config["groups"] // threads <= 8
    width = 1 << (size - 1).bit_length()
    if kernel in ("reduce", "weight", "delta"):
        return True
    rows = 1 if op == "qk_norm_rope" else config["rows"]
    low, high = _PER_THREAD
    # Several rows at a time share their barriers, where they leave registers for it.
    return low <= rows * width // threads <= (high if rows == 1 else high // 2)
