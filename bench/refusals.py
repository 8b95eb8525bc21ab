"""What code that is not ours raises for a shape, dtype or chip that it does not take."""

from __future__ import annotations

import sys

try:
    from triton.errors import TritonError
except ImportError:  # nothing raises it where there is no Triton
    _OF_TRITON: tuple[type[Exception], ...] = ()
else:
    _OF_TRITON = (TritonError,)  # out of resources, ptxas and the compiler: no RuntimeErrors

# Torch's compiler and its lack of memory are RuntimeErrors.
REFUSALS: tuple[type[Exception], ...] = (
    RuntimeError, ValueError, TypeError, NotImplementedError, AssertionError, ImportError,
    AttributeError, KeyError, IndexError, *_OF_TRITON,
)  # fmt: skip

# Errors of the CuTe DSL, in which flash-attn 4 and QuACK are written: Exceptions and nothing more.
_OF_CUTE = (("cutlass.base_dsl.common", "DSLBaseError"), ("cutlass._mlir.ir", "MLIRError"))


def refusals() -> tuple[type[Exception], ...]:
    """REFUSALS and the errors of what peers have imported by now; nothing is imported for it."""
    found = (getattr(sys.modules.get(module), name, None) for module, name in _OF_CUTE)
    return (*REFUSALS, *(error for error in found if error is not None))
