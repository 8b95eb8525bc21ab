"""Activation checkpointing: equal gradients whatever is kept, and what is really computed again."""

from __future__ import annotations

import contextlib
import copy
import inspect
import pickle
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.utils.checkpoint
from torch import Tensor, nn
from torch.nn.attention.flex_attention import flex_attention
from torch.utils._python_dispatch import TorchDispatchMode

from goku.model import GokuBlock, GokuTransformer, ModelConfig
from goku_kernels import Packing
from goku_runtime.activation_checkpoint import (
    EXCHANGES,
    ActivationCheckpointing,
    apply_activation_checkpointing,
)

SCRIPT = Path(__file__).with_name("activation_checkpoint_processes.py")
ATTENTION = "goku_kernels::varlen_attention"
NONE = ActivationCheckpointing()
POLICIES = [
    ActivationCheckpointing(mode="full"),
    ActivationCheckpointing(mode="every_nth", every=2),
    ActivationCheckpointing(mode="operators", save=(ATTENTION,)),
    ActivationCheckpointing(mode="operators", save=("aten::mm", "aten::addmm.default")),
]
NAMES = ["full", "every_nth", "attention", "products"]
CONFIG = ModelConfig(dim=48, depth=3, heads=2, text_dim=24, latent_channels=4)


def _goku(
    policy: ActivationCheckpointing,
    dtype: torch.dtype = torch.float32,
    config: ModelConfig = CONFIG,
) -> GokuTransformer:
    model = GokuTransformer(config).to(dtype)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():  # no zero gates
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator).to(dtype))
    result = apply_activation_checkpointing(model, policy)
    assert result is model
    return model


def _velocity(model: GokuTransformer, low: bool = False) -> Tensor:
    packing, text_packing = Packing.from_grids([(1, 3, 4), (2, 2, 5)]), Packing.from_lengths([4, 7])
    generator = torch.Generator().manual_seed(2)
    dtype = model.patch_embed.weight.dtype
    x = torch.randn(32, 16, generator=generator).to(dtype)
    text = torch.randn(11, 24, generator=generator).to(dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=low):
        return model(x, torch.tensor([0.2, 0.7]), text, packing, text_packing)


def _train(model: GokuTransformer, low: bool = False) -> dict[str, Tensor]:
    """The velocity and all gradients of one step."""
    out = _velocity(model, low)
    out.square().sum().backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert len(gradients) == len(list(model.parameters()))
    return {"velocity": out.detach(), **gradients}


def _check_equal(ours: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    """Bit for bit: the same operators on the same values in the same order."""
    assert set(ours) == set(wanted)
    for name, value in wanted.items():
        assert torch.equal(ours[name], value), name


# --- equal gradients ------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ["fp64", "fp32", "bf16 autocast"])
@pytest.mark.parametrize("policy", POLICIES, ids=NAMES)
def test_gradients_are_those_without_checkpointing(
    policy: ActivationCheckpointing, case: str
) -> None:
    dtype, low = (torch.float64 if case == "fp64" else torch.float32), case == "bf16 autocast"
    _check_equal(_train(_goku(policy, dtype), low), _train(_goku(NONE, dtype), low))


@pytest.mark.slow
def test_compiled_blocks() -> None:
    """`compile` of a checkpointed block, in one graph: equal to the compiled block without."""
    results = []
    for policy in (NONE, POLICIES[0], POLICIES[2]):
        torch._dynamo.reset()
        model = _goku(policy)
        for block in model.blocks:
            block.compile(fullgraph=True, backend="aot_eager")
        results.append(_train(model))
    for ours in results[1:]:
        _check_equal(ours, results[0])


def test_a_function_compiled_inside_a_block() -> None:
    results = []
    for policy in (NONE, POLICIES[2]):
        torch._dynamo.reset()
        model = _goku(policy)
        for block in model.blocks:
            block.mlp.compile(fullgraph=True, backend="aot_eager")
        results.append(_train(model))
    _check_equal(results[1], results[0])


class _Flexible(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.project = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        fixed = self.project(x).detach()  # flex_attention has no backward on CPUs
        return flex_attention(fixed, fixed, fixed) * self.project(x)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_an_operator_that_takes_functions() -> None:
    x, gradients = torch.randn(1, 2, 16, 8), []
    for mode in ("none", "full"):
        module = nn.Sequential(_Flexible(), _Flexible())
        apply_activation_checkpointing(module, ActivationCheckpointing(mode=mode), ("*",))
        module(x).sum().backward()
        gradients.append({name: p.grad for name, p in module.named_parameters()})
    _check_equal(*gradients)


def test_what_was_kept_serves_one_backward_pass() -> None:
    loss = _velocity(_goku(POLICIES[2])).sum()
    loss.backward(retain_graph=True)
    with pytest.raises(
        RuntimeError, match=r"varlen_attention|backward an extra time"
    ):  # torch 2.11
        loss.backward()


class _Noisy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(*(nn.Linear(8, 8) for _ in range(2)))

    def forward(self, x: Tensor, *, scale: Tensor) -> Tensor:
        for layer in self.layers:
            x = nn.functional.dropout(layer(x).sin(), 0.5) * scale
        return x


class _Nested(nn.Module):
    def __init__(self, depth: int) -> None:
        super().__init__()
        self.stages = nn.ModuleList(nn.ModuleList([_Noisy(), _Noisy()]) for _ in range(depth))

    def forward(self, x: Tensor, scale: Tensor) -> Tensor:
        for stage in self.stages:
            for block in stage:
                x = block(x, scale=scale)
        return x


@pytest.mark.parametrize("preserve", [True, False])
def test_dropout_draws_the_same_again_where_asked(preserve: bool) -> None:
    """Keyword arguments, tensors among them, and a pattern of two parts besides."""
    results = []
    for mode in ("none", "full"):
        policy = ActivationCheckpointing(mode=mode, preserve_rng_state=preserve)
        module = apply_activation_checkpointing(_Nested(2), policy, ("stages.*.?",))
        scale = torch.tensor(1.5, requires_grad=True)
        torch.manual_seed(3)
        module(torch.ones(4, 8), scale).sum().backward()
        results.append({name: p.grad for name, p in module.named_parameters()} | {"": scale.grad})
    equal = all(torch.equal(results[0][name], value) for name, value in results[1].items())
    assert equal == preserve


class _Generator:
    """Stands for a device's random numbers: torch.cuda, as `checkpoint` uses it, on a CPU."""

    _initialized = True
    state = 0

    @classmethod
    def draw(cls) -> int:
        cls.state += 1
        return cls.state

    @staticmethod
    def device(number: int) -> contextlib.nullcontext[None]:
        return contextlib.nullcontext()

    @classmethod
    def get_rng_state(cls, device: Any = None) -> int:
        return cls.state

    @classmethod
    def set_rng_state(cls, state: int, device: Any = None) -> None:
        cls.state = state


class _OnDevice(Tensor):
    """A CPU tensor that says that it lies on the device of `_Generator`."""

    device = SimpleNamespace(type="cuda", index=0)

    def get_device(self) -> int:
        return 0


class _Draws(nn.Module):
    """Scales by what the device draws."""

    def forward(self, hidden: Tensor, other: Tensor | None = None) -> Tensor:
        factor = float(_Generator.draw())
        return (hidden.as_subclass(Tensor) * factor).exp()


@pytest.mark.parametrize("named", [False, True])
def test_tensors_given_by_name_have_their_devices_random_numbers_kept(
    named: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a GPU shows: `checkpoint` asks the tensors among its positional arguments for devices alone."""
    monkeypatch.setattr(torch.utils.checkpoint, "_get_device_module", lambda _: _Generator)
    seen: list[list[int]] = []
    original = torch.utils.checkpoint.get_device_states

    def spy(*args: Any) -> Any:
        devices, states = original(*args)
        seen.append(devices)
        return devices, states

    monkeypatch.setattr(torch.utils.checkpoint, "get_device_states", spy)
    monkeypatch.setattr(torch.random, "fork_rng", lambda **_: contextlib.nullcontext())
    block = nn.Sequential(_Draws())[0]
    apply_activation_checkpointing(
        root := nn.ModuleDict({"block": block}), ActivationCheckpointing(mode="full"), ("block",)
    )
    x = torch.ones(3, requires_grad=True)
    given = x.as_subclass(_OnDevice)
    _Generator.state = 6
    out = root["block"](hidden=given) if named else root["block"](given)
    _Generator.state = 40  # others draw before the backward pass
    out.sum().backward()
    assert seen == [[0]]
    assert x.grad is not None
    assert torch.equal(x.grad, 7 * torch.full((3,), 7.0).exp())


class _Greedy(nn.Module):
    """Has keyword arguments named as those of `torch.utils.checkpoint.checkpoint`."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[dict[str, Any]] = []

    def forward(self, x: Tensor, **options: Any) -> Tensor:
        self.seen.append(options)
        return x.sin().sin()


def test_a_blocks_own_keyword_arguments_reach_it_whatever_their_names() -> None:
    module = nn.ModuleList([_Greedy()])
    apply_activation_checkpointing(module, ActivationCheckpointing(mode="full"), ("0",))
    options = {
        "use_reentrant": True, "context_fn": None, "determinism_check": "mine", "debug": True,
        "early_stop": "mine", "preserve_rng_state": 3, "function": 1,
    }  # fmt: skip
    module[0](torch.ones(2, requires_grad=True), **options).sum().backward()
    assert module[0].seen == [options, options]  # forward and recomputation


@pytest.mark.parametrize("named", [False, True])
def test_inputs_are_saved_as_autograd_saves_them(named: bool) -> None:
    """Hooks of saved tensors (save_on_cpu) see a block's inputs, and a change in place is an error."""
    module = nn.ModuleList([_Noisy()])
    apply_activation_checkpointing(module, ActivationCheckpointing(mode="full"), ("0",))
    x, scale = torch.ones(4, 8, requires_grad=True), torch.full((8,), 1.5)
    packed: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        packed.append(tensor.data_ptr())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = module[0](x=x, scale=scale) if named else module[0](x, scale=scale)
    assert {x.data_ptr(), scale.data_ptr()} <= set(packed)
    out.sum().backward()
    out = module[0](x=x, scale=scale) if named else module[0](x, scale=scale)
    scale.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


# --- what is computed again -----------------------------------------------------------------------


class _Count(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls[func.name()] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("policy", "attentions", "gelus"),
    [
        (NONE, 0, 0),
        (POLICIES[0], 10, 5),
        (ActivationCheckpointing(mode="every_nth", every=1), 10, 5),
        (ActivationCheckpointing(mode="every_nth", every=2), 6, 3),  # blocks 0, 2, 4
        (ActivationCheckpointing(mode="every_nth", every=3), 4, 2),  # 0, 3
        (ActivationCheckpointing(mode="every_nth", every=9), 2, 1),  # 0
        (POLICIES[2], 0, 5),
        (POLICIES[3], 10, 5),
        (ActivationCheckpointing(mode="operators", save=(ATTENTION, "aten::gelu")), 0, 0),
    ],
)
def test_the_backward_pass_repeats_what_is_not_kept(
    policy: ActivationCheckpointing, attentions: int, gelus: int
) -> None:
    config = ModelConfig(dim=48, depth=5, heads=2, text_dim=24, latent_channels=4)
    loss = _velocity(_goku(policy, config=config)).square().sum()
    with _Count() as mode:
        loss.backward()
    assert mode.calls[ATTENTION] == attentions  # two a block
    assert mode.calls["aten::gelu"] == gelus
    assert mode.calls["goku_kernels::varlen_attention_backward"] == 10


def test_kept_products_are_not_repeated() -> None:
    """Of aten::mm (6 without bias of tokens, 2 of text a block) the backward has its own two each."""
    counts = []
    for policy in (NONE, POLICIES[0], POLICIES[3]):
        loss = _velocity(_goku(policy)).square().sum()
        with _Count() as mode:
            loss.backward()
        counts.append((mode.calls["aten::mm"], mode.calls["aten::addmm"]))
    none, full, kept = counts
    assert kept == none
    # What follows the block's last saved tensor, fc2's product, is not computed again: none here.
    assert full == (none[0] + 3 * 8, none[1] + 3 * 3)  # norm1, fc1 and fc2 have a bias


def test_nothing_is_kept_or_repeated_without_gradients() -> None:
    model = _goku(POLICIES[0])
    with torch.no_grad(), _Count() as mode:
        out = _velocity(model)
    assert mode.calls[ATTENTION] == 6
    assert torch.equal(out, _velocity(_goku(NONE)).detach())


# --- the module stays what it is ------------------------------------------------------------------


def test_names_keys_classes_and_signatures_stay() -> None:
    plain, model = _goku(NONE), _goku(POLICIES[2])
    assert [n for n, _ in model.named_parameters()] == [n for n, _ in plain.named_parameters()]
    assert [n for n, _ in model.named_modules()] == [n for n, _ in plain.named_modules()]
    assert list(model.state_dict()) == list(plain.state_dict())
    assert all(type(block) is GokuBlock for block in model.blocks)
    assert repr(model) == repr(plain)
    forward = model.blocks[0].forward
    assert inspect.signature(forward) == inspect.signature(plain.blocks[0].forward)
    plain.load_state_dict(model.state_dict())


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])  # noqa: S301
def test_a_copy_recomputes_with_its_own_parameters(
    duplicate: Callable[[GokuTransformer], GokuTransformer],
) -> None:
    model = _goku(POLICIES[0])
    twin = duplicate(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    with _Count() as mode:
        ours = _train(twin)
    assert mode.calls[ATTENTION] == 12  # both passes
    _check_equal(ours, _train(_goku(NONE)))
    assert all(p.grad is None for p in model.parameters())


def test_mode_none_leaves_the_module_alone() -> None:
    model = _goku(NONE)
    assert all("forward" not in module.__dict__ for module in model.modules())


def test_every_nth_counts_over_all_patterns_in_order_of_registration() -> None:
    module = _Nested(2)
    policy = ActivationCheckpointing(mode="every_nth", every=2)
    apply_activation_checkpointing(module, policy, ("stages.1.*", "stages.0.*"))
    wrapped = [n for n, m in module.named_modules() if "forward" in m.__dict__]
    assert wrapped == ["stages.0.0", "stages.1.0"]


# --- several processes ----------------------------------------------------------------------------


@pytest.mark.slow
def test_with_exchanges_and_fully_shard(run_processes: Callable[..., str]) -> None:
    run_processes(
        2,
        SCRIPT,
        "exchanges_are_not_repeated",
        "fully_sharded_goku",
        "a_sharded_module_ends_the_block",
    )


@pytest.mark.long
@pytest.mark.slow
def test_with_exchanges_and_fully_shard_compiled(run_processes: Callable[..., str]) -> None:
    run_processes(2, SCRIPT, "sequence_parallel_goku", ("fully_sharded_goku", {"compiled": True}))


# --- bad arguments --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"mode": "some"}, "mode is 'some': allowed are 'none', 'full', 'every_nth', 'operators'"),
        ({"every": 0}, "every is 0: allowed are integers >= 1"),
        ({"every": True}, "every is True"),
        ({"mode": "operators"}, "save is empty"),
        ({"save": "aten::mm"}, "save is 'aten::mm': allowed is a tuple"),
        ({"save": ("mm",)}, "save names 'mm'"),
        ({"save": ("aten::mm.",)}, "save names 'aten::mm.'"),
        ({"save": ("aten.mm",)}, "save names 'aten.mm'"),
    ],
)
def test_a_policy_is_checked_when_made(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ActivationCheckpointing(**arguments)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "goku_kernels::absent",
            "'goku_kernels::absent', which is no operator .* once it is imported",
        ),
        ("nowhere::mm", "'nowhere::mm'"),
        ("aten::mm.absent", "'aten::mm.absent'"),
        ("aten::add_", "'aten::add_', which returns no tensor of its own"),
        ("aten::size", "'aten::size', which returns no tensor"),
        # It fills a buffer that its schema does not mark: kept, it would give what was not received.
        ("c10d::alltoall_base_", "'c10d::alltoall_base_', which returns no tensor of its own"),
        ("aten::linear", "'aten::linear', which torch runs as other operators"),
        ("aten::scaled_dot_product_attention", "other operators"),
    ],
)
def test_an_operator_that_cannot_be_kept_is_named(name: str, message: str) -> None:
    model = _goku(NONE)
    policy = ActivationCheckpointing(mode="operators", save=("aten::mm", name))
    with pytest.raises(ValueError, match=message):
        apply_activation_checkpointing(model, policy)
    assert all("forward" not in module.__dict__ for module in model.modules()), "half applied"


def test_all_usable_overloads_of_a_name_are_kept() -> None:
    # aten::sin has overloads on numbers and in place of an output, which cannot be.
    policy = ActivationCheckpointing(mode="operators", save=("aten::sin", *EXCHANGES))
    apply_activation_checkpointing(_goku(NONE), policy)


@pytest.mark.parametrize(
    ("blocks", "message"),
    [
        (
            ("layers.*",),
            "'layers.*', which no module's name matches.* patch_embed, time_embed, blocks",
        ),
        (("blocks.*", "blocks.*.ffn"), r"'blocks.\*.ffn'"),
        (("*.mlp",), "matches"),  # '*' is one part
        (("blocks.*", "blocks.*.mlp"), "'blocks.0' and 'blocks.0.mlp' in it"),
        ("blocks.*", "blocks is 'blocks.*': allowed is a tuple"),
        ((3,), r"blocks is \(3,\): allowed is a tuple"),
        (("blocks",), "'blocks', a ModuleList without forward.* allowed are .* 'blocks.\\*'"),
        (("bl*", "blocks.*"), r"'bl\*', which matches 'blocks', a ModuleList"),
    ],
)
@pytest.mark.parametrize("policy", [NONE, POLICIES[0]])
def test_patterns_are_checked(policy: ActivationCheckpointing, blocks: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        apply_activation_checkpointing(_goku(NONE), policy, blocks)


def test_a_second_policy_is_refused() -> None:
    model = _goku(POLICIES[0])
    with pytest.raises(ValueError, match=r"'blocks.0' recomputes already"):
        apply_activation_checkpointing(model, POLICIES[0])


@pytest.mark.parametrize("calls", [("blocks.*", "blocks.*.mlp"), ("blocks.*.mlp", "blocks.*")])
def test_blocks_inside_one_another_are_refused_over_several_calls(calls: tuple[str, str]) -> None:
    model = _goku(NONE)
    apply_activation_checkpointing(model, POLICIES[0], (calls[0],))
    wrapped = [n for n, m in model.named_modules() if "forward" in m.__dict__]
    message = rf"'blocks.0' and 'blocks.0.mlp' in it, '{wrapped[0]}' by a call before"
    with pytest.raises(ValueError, match=message):
        apply_activation_checkpointing(model, POLICIES[0], (calls[1],))
    assert [n for n, m in model.named_modules() if "forward" in m.__dict__] == wrapped


def test_a_block_that_lies_in_another_under_another_name_is_refused() -> None:
    inner = _Noisy()
    module = nn.ModuleDict({"first": inner, "second": nn.Sequential(inner)})
    with pytest.raises(ValueError, match="'second' and 'first' in it: allowed is one of them"):
        apply_activation_checkpointing(module, POLICIES[0], ("first", "second"))


def test_further_blocks_may_be_given_another_policy() -> None:
    module = apply_activation_checkpointing(_Nested(2), POLICIES[0], ("stages.0.*",))
    apply_activation_checkpointing(module, POLICIES[1], ("stages.1.*",))
    wrapped = [n for n, m in module.named_modules() if "forward" in m.__dict__]
    assert wrapped == ["stages.0.0", "stages.0.1", "stages.1.0"]


def test_the_module_itself_is_named_by_nothing_and_not_by_a_star() -> None:
    for pattern, wanted in (("*", ["0", "1"]), ("", [""])):
        module = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
        apply_activation_checkpointing(module, POLICIES[0], (pattern,))
        assert [n for n, m in module.named_modules() if "forward" in m.__dict__] == wanted


def test_a_forward_of_the_instance_is_one() -> None:
    module = nn.ModuleDict({"list": nn.ModuleList([nn.Linear(2, 2)])})
    module["list"].forward = lambda x: module["list"][0](x)
    apply_activation_checkpointing(module, POLICIES[0], ("list",))
    module["list"](torch.ones(2)).sum().backward()


def test_a_policy_of_another_type_is_refused() -> None:
    with pytest.raises(ValueError, match="policy is 'full': allowed is an ActivationCheckpointing"):
        apply_activation_checkpointing(_goku(NONE), "full")  # type: ignore[arg-type]
