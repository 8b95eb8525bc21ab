"""Device functions shared by the kernels: which sample a row of a packed batch belongs to."""

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
