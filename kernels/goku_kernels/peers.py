"""What else is installed beside goku_kernels, told without importing it.

NVIDIA's apex is built from source and is not the package called `apex` on the Python index, which
is an unrelated web toolkit; `pip install apex` brings the wrong one. Nothing in goku requires
either. Code that would use NVIDIA's fused layers asks `detect_apex` first.
"""

import importlib.machinery
import importlib.metadata
import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

# Compiled top-level modules of NVIDIA's build; which of them exist depends on its build options.
_COMPILED_MODULES = ("amp_C", "apex_C", "fused_layer_norm_cuda", "fused_weight_gradient_mlp_cuda")


@dataclass(frozen=True)
class Apex:
    """Which apex is installed.

    kind: "nvidia", "unrelated" (a package of the same name) or "absent".
    version: the installed distribution's version, None if it has none.
    location: the package's folder, None if it is absent.
    compiled: NVIDIA's compiled modules that are present. Empty for a build without its C++ and CUDA
        options, whose `apex.normalization` then works only where it falls back to PyTorch.
    """

    kind: Literal["nvidia", "unrelated", "absent"]
    version: str | None = None
    location: str | None = None
    compiled: tuple[str, ...] = ()

    def __str__(self) -> str:
        if self.kind == "absent":
            return "apex is not installed"
        version = self.version or "of unknown version"
        if self.kind == "unrelated":
            return (
                f"the installed apex {version} ({self.location}) is not NVIDIA's but an unrelated "
                "package of that name; NVIDIA's is built from its source repository"
            )
        compiled = ", ".join(self.compiled) or "without compiled modules"
        return f"NVIDIA apex {version} ({compiled})"


def _find(name: str) -> importlib.machinery.ModuleSpec | None:
    """The spec of a top-level module, which finds it without running it."""
    try:
        return importlib.util.find_spec(name)
    except ValueError:  # a module put into sys.modules without a spec, as some stubs are
        return None


def detect_apex() -> Apex:
    """Tells NVIDIA's apex from the unrelated package of that name, importing neither.

    NVIDIA's has the sub-packages `normalization` and `multi_tensor_apply` (both are there without
    compiled modules too); the other one has neither.
    """
    spec = _find("apex")
    if spec is None or not spec.submodule_search_locations:
        return Apex("absent") if spec is None else Apex("unrelated", _version(), spec.origin)
    folder = Path(next(iter(spec.submodule_search_locations)))
    nvidia = all((folder / part).is_dir() for part in ("normalization", "multi_tensor_apply"))
    if not nvidia:
        return Apex("unrelated", _version(), str(folder))
    compiled = tuple(name for name in _COMPILED_MODULES if _find(name) is not None)
    return Apex("nvidia", _version(), str(folder), compiled)


def _version() -> str | None:
    try:
        return importlib.metadata.version("apex")
    except importlib.metadata.PackageNotFoundError:
        return None
