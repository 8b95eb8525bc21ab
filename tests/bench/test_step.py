"""The benchmark of a whole step: what it runs, expects, estimates and takes apart, on a CPU."""

from __future__ import annotations

import dataclasses
import gc
import importlib
import weakref
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import DeviceType
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from bench import step, step_profile, timing
from bench.packs import GPU_PACKS, Pack
from bench.policy_runs import NONE, POLICIES
from goku.flops import training_flops
from goku.model import PRESETS
from goku.optimizer import EMAConfig
from goku_kernels import FLOP_FORMULAS

CPU = torch.device("cpu")
CEILINGS = timing.Ceilings(
    timing.Ceiling("matmul", 1e12, "FLOP/s"), timing.Ceiling("copy", 1e10, "byte/s")
)
SETTING = step.Setting("tiny-test", Pack("two", ((2, 3, 4), (1, 2, 2))), NONE, "torch")


def test_a_row_of_every_policy() -> None:
    settings = [dataclasses.replace(SETTING, policy=name) for name in POLICIES]
    rows = [step.measure(setting, CPU, CEILINGS, seconds=0) for setting in settings]
    assert [row.peer for row in rows] == list(POLICIES)
    for row in rows:
        assert (row.status, row.note, row.direction) == ("measured", "", "step")
        assert row.shape["tokens"] == 28
        assert row.work == training_flops(PRESETS["tiny-test"], [24, 4], [512, 512])
        assert row.extra["tokens_per_s"] == pytest.approx(28 / row.timing.median_ms * 1e3)
        where = row.extra["where_ms"]
        # The eager norms, rotations and modulations are operators of torch's: everything else.
        ours = {"QK-norm and RoPE", "adaLN and residuals"}
        assert set(where) == set(step_profile.CATEGORIES) - ours
        assert min(where.values()) > 0
        assert "mfu" not in row.extra  # nobody knows this machine's peak


def test_attention_may_add_dq_up_by_atomics() -> None:
    for device in ("cpu", "cuda"):
        names = [(s.pack.name, s.name) for s in step.settings(device)]
        assert len(set(names)) == len(names)
    setting = dataclasses.replace(SETTING, backend="triton")
    for deterministic in (True, False):
        run = step.Run(
            dataclasses.replace(setting, deterministic=deterministic), CPU, trained=False
        )
        assert run.kernels.deterministic == deterministic
        assert run.setting.name == ("none" if deterministic else "none; dq by atomics")
    assert not step.Run(SETTING, CPU, trained=False).kernels.deterministic


def test_a_policy_that_computes_something_else_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    loss = step.Run.loss
    monkeypatch.setattr(
        step.Run, "loss", lambda run, batch: loss(run, batch) * (1.02 if run.setting.policy == NONE else 1)
    )  # fmt: skip
    settings = [dataclasses.replace(SETTING, policy=name) for name in (NONE, "full")]
    wrong, right = (step.measure(one, CPU, CEILINGS, seconds=0) for one in settings)
    assert (wrong.status, right.status) == ("wrong", "measured")
    assert "of the eager operators" in wrong.note


def test_what_does_not_fit_is_not_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step, "_room", lambda device: 1000.0)
    row = step.measure(SETTING, CPU, CEILINGS, seconds=0)
    assert row.status == "absent"
    assert row.note.startswith("estimated at 0.")


@pytest.mark.parametrize(
    ("error", "status", "note"),
    [
        (RuntimeError("no kernel for it"), "failed", "RuntimeError: no kernel for it"),
        (torch.OutOfMemoryError("no room"), "absent", "out of memory; estimated at 0.0 GiB"),
    ],
)
def test_a_failure_is_told(
    error: Exception, status: str, note: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(run: step.Run, batch: step.Batch) -> tuple[float, float]:
        raise error

    monkeypatch.setattr(step.Run, "gradients", failing)
    row = step.measure(SETTING, CPU, CEILINGS, seconds=0)
    assert row.status == status
    assert row.note.startswith(note)


@pytest.mark.parametrize("policy", list(POLICIES))
@pytest.mark.parametrize("fails", [False, True])
def test_a_setting_leaves_nothing_behind(
    policy: str, fails: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A block that is recomputed holds itself; the next setting needs its memory."""
    made: list[weakref.ref[torch.Tensor]] = []
    initial = step._initial

    def seen(*arguments: Any) -> torch.Tensor:
        value = initial(*arguments)
        made.append(weakref.ref(value.untyped_storage()))
        return value

    monkeypatch.setattr(step, "_initial", seen)
    if fails:
        monkeypatch.setattr(step.Run, "step", lambda *_: exec('raise RuntimeError("broken")'))
    gc.disable()  # as if it had not come around yet
    try:
        setting = dataclasses.replace(SETTING, policy=policy)
        row = step.measure(setting, CPU, CEILINGS, seconds=0)
        left = [storage for storage in made if storage() is not None]
    finally:
        gc.enable()
    assert row.status == ("failed" if fails else "measured")
    assert len(made) > 20
    assert not left


def test_the_truth_is_found_once_for_a_pack(monkeypatch: pytest.MonkeyPatch) -> None:
    truths: dict[tuple[str, str], step.Truth] = {}
    step.measure(SETTING, CPU, CEILINGS, seconds=0, truths=truths)
    ((key, (loss, norm)),) = truths.items()
    assert key == ("tiny-test", "two")
    truths[key] = loss, 2 * norm
    row = step.measure(SETTING, CPU, CEILINGS, seconds=0, truths=truths)
    assert row.status == "wrong"  # by the truth that it was given


def test_a_step_trains() -> None:
    """AdamW moves every weight, and the average follows as far as its ramp lets it."""
    run, batch = step.Run(SETTING, CPU), step.Batch.draw(SETTING, CPU)
    before = {name: p.detach().clone() for name, p in run.model.named_parameters()}
    run.step(batch)
    weight = 1 - min(EMAConfig().decay, 1 / 10)
    for (name, p), average in zip(
        run.model.named_parameters(), run.ema.module.parameters(), strict=True
    ):
        assert not torch.equal(p, before[name]), name
        torch.testing.assert_close(average, torch.lerp(before[name], p.detach(), weight))


def test_a_step_does_the_flops_that_are_counted() -> None:
    run, batch = step.Run(SETTING, CPU), step.Batch.draw(SETTING, CPU)
    # Under autocast the modulation's and the time MLP's products are counted like all others.
    with (
        sdpa_kernel(SDPBackend.MATH),
        FlopCounterMode(display=False, custom_mapping=FLOP_FORMULAS) as counter,
    ):
        run.step(batch)
    assert counter.get_total_flops() == SETTING.flops


# ---- expected ----


def test_what_is_computed_again_is_expected_again() -> None:
    def parts(policy: str) -> dict[str, Any]:
        return step.expected(dataclasses.replace(SETTING, policy=policy), 10**6, CEILINGS, 5e11)

    none, full, attention = parts(NONE), parts("full"), parts("operators: attention")
    for part in ("matmul", "attention", "memory"):
        assert full[f"expected_{part}_ms"] == pytest.approx(4 / 3 * none[f"expected_{part}_ms"])
    assert attention["expected_attention_ms"] == none["expected_attention_ms"]
    assert attention["expected_matmul_ms"] == full["expected_matmul_ms"]
    assert none["expected_weights_ms"] == pytest.approx(1e3 * 64e6 / 1e10)
    assert full["expected_weights_ms"] == pytest.approx(1e3 * 70e6 / 1e10)
    assert none["attention_rate"] == "attention as measured"
    for found in (none, full, attention):
        ms = [value for key, value in found.items() if key not in ("expected_ms", "attention_rate")]
        assert found["expected_ms"] == pytest.approx(sum(ms))
    half = parts("every second block")
    share = step._computed_again(dataclasses.replace(SETTING, policy="every second block"))
    assert half["expected_memory_ms"] == pytest.approx(
        none["expected_memory_ms"] * (1 + share["memory"] / 3)
    )
    assert share["memory"] == 0.5  # two blocks


# ---- where the time goes ----


def test_work_is_told_apart_by_who_asked_for_it() -> None:
    category, rest = step_profile.category, step_profile.REST
    assert category(["aten::mm", "aten::linear"]) == "matrix products"
    assert category(["aten::mm", "goku_kernels::varlen_attention_backward"]) == "attention"
    assert category(["forward_kernel", "goku_kernels::qk_norm_rope"]) == "QK-norm and RoPE"
    assert category(["aten::copy_", "aten::_to_copy"]) == "casts and copies"
    assert category(["aten::copy_", "step: optimizer"]) == "AdamW"
    assert category(["aten::mul", "aten::linear"]) == rest
    # Within a node of the backward that is named after an operator a block is computed again.
    node = "GeneratedBackwardFor_goku_kernels_gated_residual_adaln_defaultBackward"
    assert category(["aten::addmm", node, f"autograd::engine::evaluate_function: {node}"]) == (
        "matrix products"
    )
    assert category(["goku_kernels::gated_residual_adaln_backward", node]) == "adaLN and residuals"
    assert category([]) == rest
    spent = step_profile.by_category([(["aten::mm"], 2.0), (["aten::addmm"], 1.0), (["x"], 4.0)])
    assert spent == {"matrix products": 3.0, rest: 4.0}


def test_kernels_are_counted_once() -> None:
    """A range that is shown on the device too is no work; what ran in it is its operators'."""
    kernel = SimpleNamespace
    phase = SimpleNamespace(
        name="step: clip", kernels=[kernel(name="step: clip", duration=900.0)], cpu_parent=None,
        device_type=DeviceType.CPU,
    )  # fmt: skip
    norm = SimpleNamespace(
        name="aten::_foreach_norm", kernels=[kernel(name="lpnorm", duration=300.0)] * 2,
        cpu_parent=phase, device_type=DeviceType.CPU,
    )  # fmt: skip
    on_device = SimpleNamespace(name="lpnorm", device_type=DeviceType.CUDA)
    work = step_profile._work([phase, norm, on_device], "cuda")
    assert list(work) == [(["aten::_foreach_norm", "step: clip"], 0.6)]


def test_every_operator_of_ours_is_told_apart() -> None:
    names = [n for n in torch._C._dispatch_get_all_op_names() if n.startswith("goku_kernels::")]
    assert len(names) >= 10
    assert step_profile.REST not in {step_profile.category([name]) for name in names}


# ---- memory: every allocation of a step of Goku-2B, on tensors without values ----


class Allocations(TorchDispatchMode):
    """Bytes of all storages that operators make: those that live, and the most that ever did."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: dict[int, int] = {}
        self.living = self.most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, torch.Tensor):
                self._see(x.untyped_storage())
        return out

    def _see(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key not in self.sizes:
            self.sizes[key] = storage.nbytes()
            self.living += storage.nbytes()
            self.most = max(self.most, self.living)
            weakref.finalize(storage, self._forget, key)

    def _forget(self, key: int) -> None:
        self.living -= self.sizes.pop(key)


@pytest.fixture
def pretending(monkeypatch: pytest.MonkeyPatch) -> FakeTensorMode:
    """Tensors of shapes without values, and Triton's operators without a GPU."""
    for name in ("_checks", "reference"):  # offsets have no values, as on a device
        module = importlib.import_module(f"goku_kernels.{name}")
        monkeypatch.setattr(module, "readable", lambda _: False)
    checks = importlib.import_module("goku_kernels._checks")
    monkeypatch.setattr(checks, "triton_absent", lambda _: None)
    attention = importlib.import_module("goku_kernels.varlen_attention")
    monkeypatch.setattr(attention, "_triton_refusal", lambda q: None)  # bf16 on a CPU
    monkeypatch.setattr(torch.Tensor, "item", lambda x: 1.0)  # the norm, and AdamW's counts
    return FakeTensorMode()


@pytest.mark.parametrize(
    ("policy", "pack"),
    [
        (NONE, "16K, one clip"),
        pytest.param("full", "64K, mixed", marks=pytest.mark.long),
        pytest.param("every second block", "16K, mixed", marks=pytest.mark.long),
        pytest.param("operators: attention", "64K, one clip", marks=pytest.mark.long),
        pytest.param("operators: matrix products, attention", "16K, mixed", marks=pytest.mark.long),
    ],
)
def test_the_estimate_is_what_a_step_allocates(
    policy: str, pack: str, pretending: FakeTensorMode
) -> None:
    """To 5%: the text's rows, what the operators of a block hand on, and one block's gradients are left out."""
    chosen = next(p for p in GPU_PACKS if p.name == pack)
    setting = step.Setting("goku-2b", chosen, policy)
    allocations = Allocations()
    with pretending, allocations:
        run, batch = step.Run(setting, CPU), step.Batch.draw(setting, CPU)
        run.step(batch)  # makes the optimizer's moments
        allocations.most = allocations.living
        run.step(batch)
    assert setting.memory(run.parameters).peak == pytest.approx(allocations.most, rel=0.05)
