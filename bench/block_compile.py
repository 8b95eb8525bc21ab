"""How torch.compile takes the block in its benchmark: once for packs of any size.

Every pack and precision is another call of the same code. Compiled for one size each they would be
dozens, half a minute apiece; and after eight torch.compile stops and runs the code as it is, which
would be measured under its name. So what a pack decides is said to vary before the first call, the
graph has to be whole, and more of them are allowed: a pack of one sample is another one, as is
another precision.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

# Numbers on the host that change from pack to pack, as torch.compile names them.
_BOUNDS = ("L['packing'].max_seqlen", "L['text_packing'].max_seqlen")
# Graphs of one function: 3 peers, 2 precisions, packs of one sample and of more.
_GRAPHS = 32


def compile_whole(module: nn.Module, backend: str = "inductor") -> None:
    """torch.compile of the module; a part of it that cannot be compiled is an error."""
    module.compile(backend=backend, fullgraph=True)


@contextlib.contextmanager
def for_any_pack(tensors: Iterable[Tensor | None]) -> Iterator[None]:
    """What is compiled in here serves packs of any size; `tensors` have a row for each of something."""
    for x in tensors:
        if x is not None:
            torch._dynamo.maybe_mark_dynamic(x, 0)
    settings: Any = torch.compiler.config  # its `patch` is set when it is imported
    with (
        torch._dynamo.config.patch(recompile_limit=_GRAPHS),
        settings.patch(dynamic_sources=",".join(_BOUNDS)),
    ):
        yield
