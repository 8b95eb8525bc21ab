"""What every shipped Triton configuration compiles to on chips that need not be here.

    python -m bench.compiled                  a table for sm_80, sm_90 and sm_100; writes nothing
    python -m bench.compiled --write          also bench/results/compiled/triton-<version>.jsonl
    python -m bench.compiled --render         docs/compiled.md from all such files
    make compiled TRITON=3.6.0                --write and --render under another version of Triton

Registers, spilled bytes (ptxas), shared memory, class of matrix instructions (HMMA: sm_80's, HGMMA:
sm_90's warpgroups, UTCMMA: sm_100's) and whether warps are specialised. Needs no GPU.

Exit codes: 0 all well; 1 a configuration spills more than 16 bytes a thread, asks for more shared
memory than the chip has, or is attention that multiplies without the chip's own matrix instructions
or was not divided among warps where it should be; 2 wrong arguments.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from bench import ahead, harness

OPERATORS = (
    "adaln_modulate",
    "gated_residual_adaln",
    "qk_norm_rope",
    "rectified_flow_noise",
    "varlen_attention",
    "velocity_loss",
)
SOURCES = ("kernels/goku_kernels/triton",)
SPILL_LIMIT = 16  # bytes a thread: a few registers once per tile, which ptxas versions differ by
# The kernels of attention that multiply, and what each chip multiplies with. Triton 3.7 compiles one
# that needs too much of sm_100's tensor memory to an empty kernel, which this finds.
MULTIPLY = (
    "forward_kernel",
    "specialised_forward_kernel",
    "gradient_kv_kernel",
    "gradient_q_kernel",
)
MATRIX = {80: "HMMA", 90: "HGMMA", 100: "UTCMMA"}
RESULTS = harness.RESULTS / "compiled"
PAGE = harness.ROOT / "docs" / "compiled.md"


def compile_all(operators: Sequence[str], chips: Sequence[int]) -> Iterator[dict[str, Any]]:
    """One record per kernel, shipped configuration and chip; equal launches once."""
    import triton

    from goku_kernels.triton.compiling import SHARED_LIMIT, compile_cases

    for operator in operators:
        for chip in chips:
            for case, _, report in compile_cases(ahead.shipped(operator, chip), chip):
                yield {
                    "operator": operator,
                    "case": case,
                    "kernel": report.kernel,
                    "chip": chip,
                    "registers": report.registers,
                    "spill_bytes": report.spill_bytes,
                    "shared_bytes": report.shared_bytes,
                    "shared_limit": SHARED_LIMIT[chip],
                    "threads": report.threads,
                    "tensor_core": report.tensor_core,
                    "warp_specialized": report.warp_specialized,
                    "triton": triton.__version__,
                }


def faults(record: dict[str, Any]) -> list[str]:
    """What is wrong with a compiled configuration, in words; [] if nothing is."""
    found = []
    if record["spill_bytes"] > SPILL_LIMIT:
        found.append(f"{record['spill_bytes']} bytes spilled")
    if record["shared_bytes"] > record["shared_limit"]:
        found.append(f"{record['shared_bytes']} bytes of shared memory")
    wanted, there = MATRIX[record["chip"]], record["tensor_core"]
    multiplies = record["operator"] == "varlen_attention" and record["kernel"] in MULTIPLY
    if multiplies and there != wanted:
        found.append(f"matrix instructions {there} instead of {wanted}")
    if record["kernel"].startswith("specialised_") and not record["warp_specialized"]:
        found.append("warps are not specialised")
    return found


def line(record: dict[str, Any]) -> str:
    """One row of the table."""
    where = f"{record['operator']}: {record['case']}, {record['kernel']}"
    special = ", specialised" if record["warp_specialized"] else ""
    return (
        f"sm_{record['chip']:<4} {where:<78} {record['threads']:>5} threads "
        f"{record['registers']:>4} registers {record['spill_bytes']:>4} B spilled "
        f"{record['shared_bytes']:>7} B shared  {record['tensor_core']}{special}"
    )


def render(folder: Path) -> str:
    """docs/compiled.md: a table per version of Triton, from the files in `folder`."""
    parts = [
        "# What the Triton kernels compile to\n",
        "Compiled without a GPU by `make compiled [TRITON=3.6.0]`; nothing here is a speed. Spilled: "
        "bytes per thread, stores and loads, as ptxas says. HMMA, HGMMA and UTCMMA are the matrix "
        'instructions of sm_80, sm_90 and sm_100. Cases "all in use" launch what is shipped unused too, '
        "until the tuner has seen it win.\n",
    ]
    tables = []
    for file in sorted(folder.glob("triton-*.jsonl")):
        head, *records = [json.loads(text) for text in file.read_text("utf-8").splitlines()]
        title = f"Triton {head['triton']}{' (of older sources)' if harness.is_stale(head) else ''}"
        tables.append((title, records))
    parts += [summary(title, records) for title, records in tables]
    for title, records in tables:
        parts.append(f"\n## {title}\n")
        parts.append(
            "| operator | case | kernel | chip | threads | registers | spilled | shared KiB | matrix |"
        )
        parts.append("|---|---|---|---|---|---|---|---|---|")
        for r in records:
            matrix = r["tensor_core"] + (", specialised" if r["warp_specialized"] else "")
            parts.append(
                f"| {r['operator']} | {r['case']} | {r['kernel']} | sm_{r['chip']} | {r['threads']} "
                f"| {r['registers']} | {r['spill_bytes']} | {r['shared_bytes'] / 1024:.1f} | {matrix} |"
            )
    return "\n".join(parts) + "\n"


def summary(title: str, records: Sequence[dict[str, Any]]) -> str:
    """How many kernels one version of Triton compiled and what is wrong with which."""
    bad = [
        f"  - sm_{r['chip']}, {r['operator']}: {r['case']}, {r['kernel']}: {'; '.join(found)}"
        for r in records
        if (found := faults(r))
    ]
    count = "no fault" if not bad else f"{len(bad)} with faults:"
    return "\n".join([f"- {title}: {len(records)} kernels compiled, {count}", *bad])


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.compiled",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--operators", nargs="+", choices=OPERATORS, default=list(OPERATORS))
    parser.add_argument(
        "--chips", nargs="+", type=int, choices=(80, 90, 100), default=[80, 90, 100]
    )
    parser.add_argument("--write", action="store_true", help="keep the result (all operators only)")
    parser.add_argument("--render", action="store_true", help="render docs/compiled.md and stop")
    options = parser.parse_args(arguments)
    whole = len(options.operators) == len(OPERATORS) and len(options.chips) == 3
    if options.write and not whole:
        parser.error("--write keeps whole tables only: leave --operators and --chips away")
    if options.render and not options.write:
        PAGE.write_text(render(RESULTS), encoding="utf-8")
        return 0
    records, bad = [], 0
    for record in compile_all(options.operators, options.chips):
        records.append(record)
        print(line(record), flush=True)
        for fault in faults(record):
            print(f"      ^ {fault}", flush=True)
            bad += 1
    print(f"{len(records)} kernels compiled, {bad} faults", flush=True)
    if options.write:
        version = records[0]["triton"]
        head = {
            "triton": version,
            "sources": SOURCES,
            "sources_sha256": harness.source_hash(SOURCES),
        }
        RESULTS.mkdir(parents=True, exist_ok=True)
        file = RESULTS / f"triton-{version}.jsonl"
        file.write_text("".join(json.dumps(r) + "\n" for r in (head, *records)), encoding="utf-8")
        if options.render:
            PAGE.write_text(render(RESULTS), encoding="utf-8")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
