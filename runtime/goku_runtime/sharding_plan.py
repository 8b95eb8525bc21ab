"""What hybrid sharding is to do with a module: the policy, and the units that follow from it.

A unit is what FSDP2 gathers and reduces in one collective: a block, the root with what no block
holds, or a module that stays in full precision while its surroundings do not.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from torch import nn

__all__ = ["ShardingPolicy", "Unit", "plan", "reduce_dtype", "stages"]


@dataclass(frozen=True, kw_only=True)
class ShardingPolicy:
    """How `apply_hybrid_sharding` treats a module.

    Attributes:
        blocks: patterns of module names that become units one by one, as ``("blocks.*",)``; ``*``
            stands for one part of a name. The root takes what is left, and is wrapped last.
        full_precision: patterns of modules whose gathered parameters are at least float32, and with
            them what they compute, as ``("blocks.*.norm1", "time_embed")``. Where `param_dtype`
            would narrow them each becomes a unit of its own, gathered when its `forward` is called:
            a module whose parameters others read without calling it cannot be named here.
        param_dtype: dtype of the gathered parameters everywhere else; None keeps the stored dtype.
            Stored parameters, gradients and optimizer states keep theirs. Inputs and outputs are
            never cast: a model whose activations have another dtype than its gathered parameters
            runs under autocast or casts by itself, and its residual stream stays what it made it.
        reduce_dtype: dtype in which gradients are summed over ranks; None takes the gradient's.
            float32 means at least float32: float64 gradients are summed in float64.
        reshard_after_forward: free the gathered parameters after forward and gather them again in
            backward. False keeps them until backward, also after a forward without a backward.
        prefetch: how many units ahead (and back, in backward) are gathered explicitly, in the order
            of definition; 0 leaves the order to FSDP2. Blocks have to run in that order on all ranks.
        cpu_offload: parameters, reduced gradients and optimizer states stay in host memory.
        gradient_divisor: what the sum of the gradients over all ranks is divided by. None is
            dp_replicate * dp_shard: the mean over data-parallel groups of the sum over sp. 1.0 is the
            plain sum, for a loss whose denominator is already global.
    """

    blocks: tuple[str, ...]
    full_precision: tuple[str, ...] = ()
    param_dtype: torch.dtype | None = None
    reduce_dtype: torch.dtype | None = torch.float32
    reshard_after_forward: bool = True
    prefetch: int = 1
    cpu_offload: bool = False
    gradient_divisor: float | None = None

    def __post_init__(self) -> None:
        for name in ("blocks", "full_precision"):
            patterns = getattr(self, name)
            # Strings are sequences too, of letters.
            listed = isinstance(patterns, Sequence) and not isinstance(patterns, str)
            if not listed or not all(isinstance(p, str) and p for p in patterns):
                raise ValueError(
                    f"{name} is {patterns!r}; allowed: a tuple of module name patterns"
                )
        for name in ("param_dtype", "reduce_dtype"):
            dtype = getattr(self, name)
            if dtype is None:
                continue
            if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
                raise ValueError(f"{name} is {dtype!r}; allowed: a floating dtype or None")
        ahead = self.prefetch
        if not isinstance(ahead, int) or isinstance(ahead, bool) or ahead < 0:
            raise ValueError(f"prefetch is {ahead!r}; allowed: integers >= 0")
        divisor = self.gradient_divisor
        if divisor is not None and not _divides(divisor):
            raise ValueError(f"gradient_divisor is {divisor!r}; allowed: > 0 and finite, or None")


@dataclass(frozen=True)
class Unit:
    """One group of parameters that travels together.

    Attributes:
        name: of its module, "" for the root.
        module: the module that is wrapped.
        parameters: those of the module that no nested unit holds, by their name in the root.
        gathered_dtype: of the gathered parameters; None where that is the stored one.
    """

    name: str
    module: nn.Module
    parameters: dict[str, nn.Parameter]
    gathered_dtype: torch.dtype | None


def plan(module: nn.Module, policy: ShardingPolicy) -> list[Unit]:
    """The units of `module`, the root first and every other before those nested in it.

    Raises:
        ValueError: a pattern matches nothing or a container without `forward`; a parameter has no
            dimension; two units share a parameter; the parameters of one unit are stored in several dtypes.
    """
    modules = dict(module.named_modules())
    blocks = _matching(modules, "blocks", policy.blocks)
    full = _matching(modules, "full_precision", policy.full_precision)

    def gathered(name: str, stored: torch.dtype) -> torch.dtype:
        if any(_contains(outer, name) for outer in full):
            return torch.promote_types(stored, torch.float32)
        return policy.param_dtype or stored

    names = [""]
    for name, candidate in modules.items():
        first = next(_floating(candidate), None)
        if not name or first is None:
            continue
        outside = policy.param_dtype or first.dtype
        if name in blocks or (name in full and gathered(name, first.dtype) != outside):
            names.append(name)

    owned: dict[str, dict[str, nn.Parameter]] = {name: {} for name in names}
    owner: dict[nn.Parameter, str] = {}
    for path, parameter in module.named_parameters(remove_duplicate=False):
        if parameter.ndim == 0:
            raise ValueError(f"{path} has no dimension to shard; allowed: at least one")
        name = max((n for n in names if _contains(n, path)), key=len)
        if owner.setdefault(parameter, name) != name:
            raise ValueError(
                f"{path} is shared between {owner[parameter] or 'the root'!r} and"
                f" {name or 'the root'!r}; allowed: a parameter belongs to one unit, so match both"
                " modules by one pattern for a common parent, or neither"
            )
        owned[name].setdefault(path, parameter)

    units = []
    for name in names:
        dtypes = {p.dtype for p in owned[name].values() if p.is_floating_point()}
        if len(dtypes) > 1:
            raise ValueError(
                f"the parameters of {name or 'the root'!r} are stored in"
                f" {sorted(map(str, dtypes))}; allowed: one dtype in a unit"
            )
        target = None
        for stored in dtypes:
            wanted = gathered(name, stored)
            target = None if wanted == stored else wanted
        units.append(Unit(name, modules[name], owned[name], target))
    return units


def stages(units: list[Unit]) -> list[list[Unit]]:
    """The units below the root as they are gathered ahead: each with those nested in it."""
    found: list[list[Unit]] = []
    for unit in units[1:]:
        if found and _contains(found[-1][0].name, unit.name):
            found[-1].append(unit)
        else:
            found.append([unit])
    return found


def reduce_dtype(unit: Unit, policy: ShardingPolicy) -> torch.dtype | None:
    """The dtype in which the unit's gradients are summed; None is their own."""
    if policy.reduce_dtype != torch.float32:
        return policy.reduce_dtype
    stored = next((p.dtype for p in unit.parameters.values()), torch.float32)
    return torch.promote_types(unit.gathered_dtype or stored, torch.float32)


def _divides(value: object) -> bool:
    """Whether it is a number that a sum can be divided by: positive and finite."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and 0 < value < math.inf  # type: ignore[operator]


def _floating(module: nn.Module) -> filter[nn.Parameter]:
    return filter(torch.is_floating_point, module.parameters())


def _contains(outer: str, name: str) -> bool:
    return not outer or name == outer or name.startswith(f"{outer}.")


def _matching(
    modules: dict[str, nn.Module], argument: str, patterns: tuple[str, ...]
) -> dict[str, None]:
    """The names that match a pattern, as an ordered set."""
    found: dict[str, None] = {}
    for pattern in patterns:
        names = [name for name in modules if name and _matches(name, pattern)]
        if not names:
            depth = pattern.count(".")
            near = [n for n in modules if n and n.count(".") == depth] or [n for n in modules if n]
            raise ValueError(
                f"{argument} has {pattern!r}, which matches no module;"
                f" allowed: names like {', '.join(map(repr, near[:5])) or 'none: it has no children'}"
            )
        for name in names:
            child = modules[name]
            if type(child).forward is nn.Module.forward:  # a list or dictionary of modules
                raise ValueError(
                    f"{argument} has {pattern!r}, which matches {name!r}, a {type(child).__name__}"
                    f" without forward; allowed: modules that are called, as {name + '.*'!r}"
                )
            found[name] = None
    return found


def _matches(name: str, pattern: str) -> bool:
    parts, wanted = name.split("."), pattern.split(".")
    return len(parts) == len(wanted) and all(map(fnmatchcase, parts, wanted))
