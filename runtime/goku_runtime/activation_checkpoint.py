"""Activation checkpointing by one typed policy: what a block keeps for the backward pass, and what it computes again.

Built on `torch.utils.checkpoint` (non-reentrant) and its selective contexts. A block keeps its inputs
and what the policy names; exchanges between processes are kept in every mode, so that the backward
pass repeats none. Parameter names, state_dict keys and the classes of modules stay as they are.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Literal

import torch
from torch import nn
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

__all__ = ["EXCHANGES", "ActivationCheckpointing", "apply_activation_checkpointing"]

# Kept in every mode. Their wait_tensor is not: on a kept, finished result it returns at once, whereas a
# kept wait_tensor would leave other collectives, which are repeated, without anyone who waits for them.
EXCHANGES: tuple[str, ...] = (
    "_c10d_functional::all_to_all_single",
    "_c10d_functional::all_gather_into_tensor",  # SequenceParallel.gather
)

_MODES = ("none", "full", "every_nth", "operators")
_NAME = re.compile(r"(?P<namespace>\w+)::(?P<operator>\w+)(?:\.(?P<overload>\w+))?")


@dataclass(frozen=True, kw_only=True)
class ActivationCheckpointing:
    """What is kept for the backward pass and what is computed again; validated at construction.

    Attributes:
        mode: "none" keeps everything; "full" recomputes every block; "every_nth" recomputes blocks 0,
            n, 2n, ... and keeps all of the others; "operators" recomputes every block but for the
            outputs of the operators in `save`. Exchanges are kept in all of them.
        every: n of "every_nth".
        save: operators of "operators", "namespace::op" (all of its overloads) or
            "namespace::op.overload": "goku_kernels::varlen_attention", "aten::mm".
        preserve_rng_state: give the recomputation the random numbers of the forward pass (dropout).
            False, where blocks draw none, saves reading the generators' states.
    """

    mode: Literal["none", "full", "every_nth", "operators"] = "none"
    every: int = 2
    save: tuple[str, ...] = ()
    preserve_rng_state: bool = True

    def __post_init__(self) -> None:
        if self.mode not in _MODES:
            raise ValueError(f"mode is {self.mode!r}: allowed are {', '.join(map(repr, _MODES))}")
        if isinstance(self.every, bool) or not isinstance(self.every, int) or self.every < 1:
            raise ValueError(f"every is {self.every!r}: allowed are integers >= 1")
        if not isinstance(self.save, tuple):
            raise ValueError(f"save is {self.save!r}: allowed is a tuple of operators' names")
        for name in self.save:
            if not isinstance(name, str) or not _NAME.fullmatch(name):
                raise ValueError(
                    f'save names {name!r}: allowed are "namespace::op" and "namespace::op.overload"'
                )
        if self.mode == "operators" and not self.save:
            raise ValueError(
                'save is empty with mode="operators": name operators to keep, or take mode="full"'
            )


def apply_activation_checkpointing(
    module: nn.Module,
    policy: ActivationCheckpointing,
    blocks: tuple[str, ...] = ("blocks.*",),
) -> nn.Module:
    """Make the blocks of a module recompute in the backward pass, as a policy says.

    To be called before `torch.compile` of the blocks and before `fully_shard`: parameters are then
    gathered once for a block's recomputation and its gradients together. Copies (`copy.deepcopy`)
    recompute like their original. What a block kept serves one backward pass: a second one
    (``retain_graph=True``) is an error where an operator or an exchange was kept.

    An operator is kept by its output, so it must return one: an exchange that fills a buffer it was
    given (`torch.distributed.all_to_all_single`) cannot be kept and is repeated, while
    `torch.ops._c10d_functional.all_to_all_single` and what torch builds on it is not.

    Args:
        module: changed in place, but for mode "none".
        policy: what to keep.
        blocks: patterns of module names, as in fnmatch; '*' matches within one part of the name; ""
            is the module itself.

    Returns:
        module.

    Raises:
        ValueError: a pattern that no module's name matches, or that of a list of modules, which nobody
            calls; blocks that recompute already, or inside one another, by a call before too; an operator
            that does not exist or cannot be kept; a policy of another type.
    """
    if not isinstance(policy, ActivationCheckpointing):
        raise ValueError(f"policy is {policy!r}: allowed is an ActivationCheckpointing")
    chosen = _find(module, blocks)
    if policy.mode == "none":
        return module
    names = EXCHANGES + (policy.save if policy.mode == "operators" else ())
    forwards = [_Recomputed(block.forward, names, policy.preserve_rng_state) for block in chosen]
    step = policy.every if policy.mode == "every_nth" else 1
    for block, forward in list(zip(chosen, forwards, strict=True))[::step]:
        # On the instance rather than in a wrapper or a subclass: names, keys and classes stay.
        block.forward = forward
    return module


class _Recomputed:
    """A block's forward whose inner activations are computed again in the backward pass.

    An object with the bound forward as an attribute, not a closure over it: copying a module then
    binds the copy's forward to the copy.
    """

    def __init__(
        self, forward: Callable[..., Any], names: Sequence[str], preserve_rng_state: bool
    ) -> None:
        kept = [operator for name in names for operator in _resolve(name)]
        self.forward = forward
        self.names = names
        self.preserve_rng_state = preserve_rng_state
        self.contexts = functools.partial(_contexts, kept)
        # torch.compile knows the original alone, which marks every operator of the graph.
        self.traced_contexts = functools.partial(create_selective_checkpoint_contexts, kept)
        functools.update_wrapper(self, forward)  # its signature

    def __reduce__(self) -> tuple[Any, ...]:
        # Operators cannot be pickled; their names can.
        return _Recomputed, (self.forward, self.names, self.preserve_rng_state)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        contexts = self.traced_contexts if torch.compiler.is_compiling() else self.contexts
        # All by position. Of `checkpoint`'s keyword arguments some are its own (debug, early_stop), and
        # of the block's it reads no devices: dropout on a GPU would draw another mask when recomputed.
        # Not in one tuple: only tensors that are arguments themselves are saved as inputs are, seen by
        # the hooks of saved tensors and checked for changes in place.
        count, names = len(args), tuple(kwargs)

        def forward(*values: Any) -> Any:
            named = dict(zip(names, values[count:], strict=True))
            return self.forward(*values[:count], **named)

        return checkpoint(
            forward, *args, *kwargs.values(), use_reentrant=False, context_fn=contexts,
            preserve_rng_state=self.preserve_rng_state,
        )  # fmt: skip


class _Only(TorchDispatchMode):
    """Shows a mode the named operators and no others.

    torch's own selective contexts count every operator and refuse (2.13) a recomputation that runs
    others than the forward did. FSDP2 does so: the hooks of a sharded module inside the block gather
    its parameters in one of the two and find them gathered in the other.
    """

    # Of operators that take functions (flex_attention): they are passed on like the rest.
    supports_higher_order_operators = True

    def __init__(self, kept: Sequence[OpOverload], mode: TorchDispatchMode) -> None:
        super().__init__()
        self.kept = frozenset(kept)
        self.mode = mode

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """As torch's own: functions compiled inside of the block stay compiled."""
        return True

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in self.kept:
            return self.mode.__torch_dispatch__(func, types, args, kwargs)
        return func(*args, **kwargs)


def _contexts(kept: list[OpOverload]) -> tuple[_Only, _Only]:
    """What the forward and the recomputation of a block run in."""
    keeping, reusing = create_selective_checkpoint_contexts(kept)
    return _Only(kept, keeping), _Only(kept, reusing)


def _find(module: nn.Module, patterns: tuple[str, ...]) -> list[nn.Module]:
    """The modules whose names match, in the order of registration."""
    # A string would be taken letter by letter.
    if not isinstance(patterns, tuple) or not all(isinstance(p, str) for p in patterns):
        raise ValueError(f"blocks is {patterns!r}: allowed is a tuple of patterns")
    modules = dict(module.named_modules())
    found: dict[str, nn.Module] = {}
    unused = set(patterns)
    for name, child in modules.items():
        matching = {pattern for pattern in patterns if _matches(name, pattern)}
        unused -= matching
        if not matching:
            continue
        if _recomputes(child):
            raise ValueError(f"{name!r} recomputes already: apply one policy, once")
        # The bound method's function: a forward may also be an instance's own.
        if getattr(child.forward, "__func__", None) is nn.Module.forward:
            raise ValueError(
                f"blocks has {min(matching)!r}, which matches {name!r}, a {type(child).__name__} without "
                f"forward, which nobody calls: allowed are modules that are called, as {name + '.*'!r}"
            )
        found[name] = child
    for pattern in patterns:
        if pattern in unused:
            children = ", ".join(name for name, _ in module.named_children())
            raise ValueError(
                f"blocks has the pattern {pattern!r}, which no module's name matches: '*' stands "
                f"for one part of a name, and the children here are {children or 'none'}"
            )
    _check_apart(modules, found)
    return list(found.values())


def _recomputes(module: nn.Module) -> bool:
    return isinstance(module.__dict__.get("forward"), _Recomputed)


def _check_apart(modules: dict[str, nn.Module], found: dict[str, nn.Module]) -> None:
    """No block within another one, matched now or by a call before: the inner one would run three times."""
    before = {name: child for name, child in modules.items() if _recomputes(child)}
    for outer, block in (found | before).items():
        inside = set(block.modules()) - {block}  # not by name: a module may lie in several places
        for inner, child in (found | before).items():
            if child in inside and (outer in found or inner in found):
                earlier = [
                    f", {name!r} by a call before" for name in (outer, inner) if name in before
                ]
                raise ValueError(
                    f"blocks match {outer!r} and {inner!r} in it{''.join(earlier)}: allowed is one of them"
                )


def _matches(name: str, pattern: str) -> bool:
    if not name:  # the module itself, which '*' does not mean
        return not pattern
    parts, wanted = name.split("."), pattern.split(".")
    return len(parts) == len(wanted) and all(map(fnmatchcase, parts, wanted))


def _resolve(name: str) -> list[OpOverload]:
    """The overloads that a name stands for, those left out that write into an argument."""
    found = _NAME.fullmatch(name)
    assert found is not None
    try:
        packet = getattr(getattr(torch.ops, found["namespace"]), found["operator"])
        overloads = [found["overload"]] if found["overload"] else packet.overloads()
        operators = [getattr(packet, overload) for overload in overloads]
    except AttributeError:
        raise ValueError(
            f"save names {name!r}, which is no operator of torch here: the operators of a library "
            "(goku_kernels, say) exist once it is imported"
        ) from None
    functional = [operator for operator in operators if _returns_its_result(operator)]
    if not functional:
        raise ValueError(
            f"save names {name!r}, which returns no tensor of its own: only what an operator returns, "
            "rather than writes into an argument, can be kept"
        )
    whole = [operator for operator in functional if not _is_taken_apart(operator)]
    if not whole:
        raise ValueError(
            f"save names {name!r}, which torch runs as other operators: name those (for aten::linear "
            "aten::mm and aten::addmm)"
        )
    return whole


def _returns_its_result(operator: OpOverload) -> bool:
    """Whether all that an operator does is to return tensors."""
    types = [value.type for value in operator._schema.returns]
    # The c10d operators fill a buffer that their schema does not mark, and return the Work to wait for.
    waits = any(isinstance(kind, torch._C.ClassType) for kind in types)
    tensors = any("Tensor" in str(kind) for kind in types)  # some overloads are of numbers
    return tensors and not waits and not operator._schema.is_mutable


def _is_taken_apart(operator: OpOverload) -> bool:
    """Whether torch replaces an operator by others before anyone sees it; there is no public way to ask."""
    name = operator.name()
    if not torch._C._dispatch_has_kernel(name):  # known to TorchScript alone
        return True
    return torch._C._dispatch_has_kernel_for_dispatch_key(name, "CompositeImplicitAutograd")
