"""One Goku block, forward and backward, on a packed batch of clips and images.

    python -m bench.block [--device cuda] [--presets tiny goku-2b] [--seconds 5] [--out DIR]

Run from the repository, with the packages installed or on PYTHONPATH; bench/gpu_check sees to that.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from bench import harness
from goku.flops import block_flops, named_peak
from goku.model import PRESETS, GokuBlock, ModelConfig
from goku.model.initialise import initialise
from goku_kernels import Packing

SOURCES = ("goku/model", "goku/flops.py", "kernels/goku_kernels", "bench/block.py")

# After patchify: clips of 17 and 49 frames at 288x512, and images of 480x864. 19,728 tokens.
GRIDS = ((5, 18, 32), (5, 18, 32), (13, 18, 32), *[(1, 30, 54)] * 4)
# On a CPU: the same mix, a tenth of it.
SMALL_GRIDS = ((5, 9, 16), (1, 15, 27), (1, 15, 27))
TEXT_TOKENS = 128


def step(
    config: ModelConfig, grids: Sequence[tuple[int, int, int]], device: torch.device, mixed: bool
) -> Callable[[], Tensor]:
    """A call that runs one block forward and backward and returns its output.

    mixed: fp32 parameters under bf16 autocast; otherwise everything but the modulation is bf16.
    """
    stored = torch.float32 if mixed else torch.bfloat16
    block = GokuBlock(config)
    initialise(block, 0)
    torch.nn.init.normal_(block.norm1.linear.weight, std=0.02)  # an open gate costs as a shut one
    block.to(device, stored)
    block.norm1.float()  # the modulation stays fp32, as the operators' mixed case has it
    packing = Packing.from_grids(grids, device=device)
    text_packing = Packing.from_lengths([TEXT_TOKENS] * packing.batch, device=device)

    def draw(rows: int, width: int, dtype: torch.dtype) -> Tensor:
        return torch.randn(rows, width, device=device).to(dtype)

    x = draw(packing.total, config.dim, stored).requires_grad_()
    c = draw(packing.batch, config.dim, torch.float32)
    text = draw(text_packing.total, config.text_dim, torch.bfloat16)
    gradient = draw(packing.total, config.dim, stored)

    def run() -> Tensor:
        block.zero_grad(set_to_none=True)
        x.grad = None
        with torch.autocast(device.type, torch.bfloat16, enabled=mixed):
            y = block(x, c, text, packing, text_packing)
        y.backward(gradient)
        return y

    return run


def rows(presets: Sequence[str], device: torch.device, seconds: float) -> Iterator[harness.Row]:
    """One row per preset and kind of precision; `seconds` of timing each."""
    ceiling = harness.matmul_ceiling(device, seconds=min(1.0, seconds))
    grids = GRIDS if device.type == "cuda" else SMALL_GRIDS
    lengths = [t * h * w for t, h, w in grids]
    for preset in presets:
        config = PRESETS[preset]
        work = 3 * block_flops(config, lengths, [TEXT_TOKENS] * len(lengths))
        for mixed in (True, False):
            run = step(config, grids, device, mixed)
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(device)
            timing = harness.time_calls(run, device, seconds=seconds)
            extra: dict[str, float] = {"tokens_per_s": sum(lengths) / timing.median_ms * 1e3}
            if device.type == "cuda":
                extra["peak_memory_bytes"] = torch.cuda.max_memory_allocated(device)
                peak = named_peak(torch.cuda.get_device_name(device))
                if peak is not None:
                    extra["mfu"] = work / (timing.median_ms * 1e-3) / peak
            yield harness.Row(
                name="block",
                case=f"{preset} forward+backward",
                shape={"dim": config.dim, "heads": config.heads, "tokens": sum(lengths),
                       "grids": grids, "text_tokens": TEXT_TOKENS * len(lengths)},
                dtype="bfloat16 autocast over float32" if mixed else "bfloat16",
                timing=timing,
                work=work,
                ceiling=ceiling,
                sources=SOURCES,
                extra=extra,
            )  # fmt: skip
            del run


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="One Goku block, forward and backward")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--presets", nargs="+", default=["tiny", "goku-2b"], choices=list(PRESETS))
    parser.add_argument("--seconds", type=float, default=5.0, help="timing per row")
    parser.add_argument("--out", type=Path, default=harness.RESULTS, help="folder of results")
    options = parser.parse_args(arguments)
    device = torch.device(options.device)
    for row in rows(options.presets, device, options.seconds):
        for record in harness.write([row], device, options.out):
            print(harness.describe(record), flush=True)


if __name__ == "__main__":
    main()
