"""varlen_attention's forward with specialised warps, used by the shipped configurations or not.

A file of its own, and one test: warps that wait for each other may do so for ever, which costs the
test's time, and says nothing of the kernels that are used.
"""

import importlib.util
from pathlib import Path

import pytest
import torch

from bench import checks
from bench.ahead import overridden, with_use
from goku_kernels.triton import configs

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

DEVICE, BACKEND = torch.device("cuda"), "triton"
_SPEC = importlib.util.spec_from_file_location(
    "attention_on_a_gpu", Path(__file__).with_name("test_varlen_attention.py")
)
attention = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(attention)


def all_used():
    """The shipped rows with the specialised forward in the plain one's place."""
    rows = configs.table("varlen_attention")
    for row in rows:
        if row["kernel"] == "forward_specialised":
            rows = with_use(rows, row, used=True)
    return rows


def problems(head_dim):
    """Every variant of a small pack, and two large ones."""
    heads, bf16 = attention.HEADS[head_dim], torch.bfloat16
    yield from attention.variants(attention.ODD, bf16, heads, head_dim, probed=False)
    yield next(attention.variants(attention.ODD, torch.float16, heads, head_dim, probed=False))
    for name in ("16K, mixed", "64K, one clip"):
        yield attention.problem("self", heads, head_dim, attention.PACKS[name], bf16)


def test_specialised_warps():
    with overridden("varlen_attention", all_used()):
        for head_dim in (64, 128):
            for case in problems(head_dim):
                checks.fits(case, attention.function(BACKEND), DEVICE)
            lse = attention.with_lse(
                attention.ODD, torch.bfloat16, attention.HEADS[head_dim], head_dim
            )
            checks.fits(lse, attention.both(BACKEND), DEVICE)
