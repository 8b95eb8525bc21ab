"""What `goku ckpt` and `goku-runtime ckpt` do, as functions.

All of them read a piece at a time, so that memory does not grow with the checkpoint; every byte
is verified before it is used; and what they write appears whole or not at all.
"""

from goku_runtime.checkpoint.tools.difference import Difference, TensorDifference, diff
from goku_runtime.checkpoint.tools.export import Exported, export
from goku_runtime.checkpoint.tools.inspection import Inspection, inspect
from goku_runtime.checkpoint.tools.resharding import Resharded, reshard
from goku_runtime.checkpoint.tools.source import Source, find

__all__ = [
    "Difference",
    "Exported",
    "Inspection",
    "Resharded",
    "Source",
    "TensorDifference",
    "diff",
    "export",
    "find",
    "inspect",
    "reshard",
]
