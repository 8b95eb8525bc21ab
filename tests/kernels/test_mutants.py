"""Wrong kernels must not pass: each mutant changes one place of a copy, and its tests must fail.

A mutant that survives means that a test compares too little or allows too much.
"""

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "kernels" / "goku_kernels"
TESTS = Path(__file__).parent / "interpreter"


@dataclass(frozen=True)
class Mutant:
    """In triton/<file> of the package, `old` (which stands there once) becomes `new`."""

    operator: str
    what: str
    file: str
    old: str
    new: str
    only: str = ""  # pytest's -k: the tests that are enough to find it


MUTANTS = [
    Mutant(
        "adaln_modulate", "a program's first row goes to the next sample", "segments.py",
        "cu_seqlens + 1 + i, mask=i < B", "cu_seqlens + i, mask=i < B", "every_pack",
    ),
    Mutant(
        "adaln_modulate", "the 1 of 1 + scale is missing", "modulation.py",
        "value = value * (1.0 + s)", "value = value * s", "every_pack",
    ),
    Mutant(
        "adaln_modulate", "partial sums of two samples share a row", "modulation.py",
        "slot = (program + sample).to(tl.int64)", "slot = program.to(tl.int64)", "every_pack",
    ),
    Mutant(
        "gated_residual_adaln", "a sample is passed over at a boundary", "modulation.py",
        "sample += 1", "sample += 2", "every_pack",
    ),
    Mutant(
        "gated_residual_adaln", "the branch's gradient lacks the gate", "modulation.py",
        "total = total * g", "total = total * 1.0", "every_pack",
    ),
    Mutant(
        "gated_residual_adaln", "the gate's gradient takes the residual for the branch", "modulation.py",
        "by_gate += total * added", "by_gate += total * (total + added)", "every_pack",
    ),
    Mutant(
        "qk_norm_rope", "a sample is passed over at a boundary", "qk_norm_rope_kernels.py",
        "sample += 1", "sample += 2", "forward_and_every_gradient and (empty or primes)",
    ),
    Mutant(
        "qk_norm_rope", "the pairing is swapped: a channel with itself", "rotation.py",
        "heads * head_stride + second[None, :]", "heads * head_stride + first[None, :]",
        "forward_and_every_gradient and (empty or primes)",
    ),
    Mutant(
        "qk_norm_rope", "the norm's gradient lacks a factor 1/deviation", "qk_norm_rope_kernels.py",
        "* scale * scale", "* scale", "forward_and_every_gradient and (empty or primes)",
    ),
    Mutant(
        "rectified_flow_noise", "a boundary row goes to the earlier sample",
        "segments.py", "found += (rows >= end)", "found += (rows > end)", "same_bits_as_eager",
    ),
    Mutant(
        "rectified_flow_noise", "the pairs of a block are interleaved wrongly",
        "rectified_flow_noise.py", "tl.join(tl.join(a, c), tl.join(b, d))",
        "tl.join(tl.join(a, b), tl.join(c, d))", "same_bits_as_eager",
    ),
    Mutant(
        "rectified_flow_noise", "t is rounded before 1 - t", "rectified_flow_noise.py",
        "(1.0 - time).to(tl.float32)", "1.0 - time.to(tl.float32)", "same_bits_as_eager",
    ),
    Mutant(
        "varlen_attention", "the first key of the next sample is seen", "varlen_attention.py",
        "there = tail + tl.arange(0, KEYS) < n_rows", "there = tail + tl.arange(0, KEYS) <= n_rows",
    ),
    Mutant(
        "varlen_attention", "query heads are paired with the wrong key heads",
        "varlen_attention_specialised.py", "head = group * G + member", "head = member * HK + group",
    ),
    Mutant(
        "varlen_attention", "the gradient of k lacks the softmax scale",
        "varlen_attention_backward.py", "store_rows(dk + base, dk_tile * scale",
        "store_rows(dk + base, dk_tile",
    ),
    Mutant(
        "varlen_attention", "keys that are not there weigh in dq", "varlen_attention_backward.py",
        "tl.where(keys_there, dscores, 0.0)", "tl.where(keys_there | True, dscores, 0.0)",
        "not_there or cross",
    ),
    Mutant(
        "varlen_attention", "dq of a sample's last rows goes to its neighbour",
        "varlen_attention_backward.py", "dq_rows = describe(dq, H, end,",
        "dq_rows = describe(dq, H, Tq,", "neighbours_nan",
    ),
    Mutant(
        "velocity_loss", "a sample takes its neighbour's first row", "velocity_loss.py",
        "(place >= begin) & (place < end)", "(place >= begin) & (place <= end)", "every_packing",
    ),
    Mutant(
        "velocity_loss", "the second stage reads the program's row, not the sample's",
        "velocity_loss.py", "tl.load(sums + i + sample,", "tl.load(sums + i,", "every_packing",
    ),
    Mutant(
        "velocity_loss", "the gradient lacks the 2", "velocity_loss.py",
        "tl.div_rn(2.0 * g, count)", "tl.div_rn(g, count)", "every_packing",
    ),
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.mutants
@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda m: f"{m.operator}: {m.what}")
def test_a_wrong_kernel_fails_its_tests(mutant, tmp_path):
    copy = tmp_path / "goku_kernels"
    shutil.copytree(PACKAGE, copy, ignore=shutil.ignore_patterns("__pycache__"))
    file = copy / "triton" / mutant.file
    source = file.read_text(encoding="utf-8")
    assert source.count(mutant.old) == 1, f"{mutant.old!r} stands {source.count(mutant.old)} times"
    file.write_text(source.replace(mutant.old, mutant.new), encoding="utf-8")
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [*command, *(["-k", mutant.only] if mutant.only else []), TESTS / f"test_{mutant.operator}.py"],
        cwd=ROOT, capture_output=True, text=True, timeout=250,
        env=os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(tmp_path), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    said = done.stdout + done.stderr
    assert done.returncode == 1, (
        f"the mutant survived (exit code {done.returncode}):\n{said[-3000:]}"
    )
    # It must have been found by a comparison, and in the copy.
    assert "AssertionError" in said, said[-3000:]
    assert "SyntaxError" not in said
    assert "CompilationError" not in said
