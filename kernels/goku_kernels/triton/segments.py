"""Device functions shared by the kernels: which sample rows of a packed batch belong to."""

import triton
import triton.language as tl


@triton.jit
def sample_of(cu_seqlens, B, row):
    """Sample of global row `row`: how many of the B end offsets are <= row; B for a padding row.

    A row on a boundary belongs to the later sample, and empty samples are passed over. Counting
    1,024 offsets at a time costs one load's latency where a search would cost ten.
    """
    found = tl.zeros((), tl.int32)
    for first in range(0, B, 1024):
        i = first + tl.arange(0, 1024)
        ends = tl.load(cu_seqlens + 1 + i, mask=i < B, other=2147483647)
        found += tl.sum((ends <= row).to(tl.int32), axis=0)
    # A row past 2^31 - 2 counts the masked lanes too.
    return tl.minimum(found, B)


@triton.jit
def samples_of(cu_seqlens, B, rows, first, last):
    """Sample of each of `rows`, global rows from `first` to `last`; B for a padding row.

    One search for the first row, then a step for every sample that ends among them: long samples,
    whose tokens are most of a pack, take none.
    """
    ending = sample_of(cu_seqlens, B, first)
    found = tl.full(rows.shape, 0, tl.int32) + ending
    end = tl.load(cu_seqlens + 1 + ending, mask=ending < B, other=2147483647)
    while (ending < B) & (end <= last):
        found += (rows >= end).to(tl.int32)
        ending += 1
        end = tl.load(cu_seqlens + 1 + ending, mask=ending < B, other=2147483647)
    return found
