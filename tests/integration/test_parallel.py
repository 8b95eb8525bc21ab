"""Goku's trainer on meshes of up to 8 processes against one process: the same samples, losses and weights."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from goku import cli
from goku.metrics import read_log

SCRIPT = Path(__file__).with_name("parallel_processes.py")
STEPS = 6


@pytest.fixture
def train(
    write_config: Callable[..., Path],
    run_processes: Callable[..., str],
    free_port: Callable[[], int],
    tmp_path: Path,
) -> Callable[..., Path]:
    """train(name, world, *overrides) -> the run's folder; a name again resumes that run.

    What the ranks printed is in its output.txt.
    """

    def run(
        name: str, world: int, *overrides: str, dtypes: bool = False, losing: Sequence[int] = ()
    ) -> Path:
        config = write_config(tmp_path / name)
        wanted = [f"train.steps={STEPS}", *overrides]
        arguments = {"config": str(config), "overrides": wanted, "port": free_port()}
        call = ("train", arguments | {"dtypes": dtypes, "losing": list(losing)})
        output = run_processes(world, SCRIPT, call, backend="none")
        (tmp_path / name / "output.txt").write_text(output)
        return tmp_path / name

    return run


def _idle(out: Path) -> int:
    """Idle packs of all ranks together."""
    found = re.findall(r"rank \d+: (\d+) of \d+ packs idle", (out / "output.txt").read_text())
    assert found
    return sum(map(int, found))


def _flops(out: Path) -> dict[str, str]:
    """FLOPs of each step of the last launch, over all ranks."""
    found = re.findall(r"FLOPs of step (\d+): (\d+)", (out / "output.txt").read_text())
    assert found
    return dict(found)


def _random_states(out: Path) -> list[str]:
    """By rank, of what torch's random state was once the last launch had resumed."""
    found = re.findall(r"random state of rank (\d+): (\d+)", (out / "output.txt").read_text())
    return [state for _, state in sorted(found)]


def _steps(out: Path) -> dict[int, dict[str, Any]]:
    return {e["step"]: e for e in read_log(out / "train.jsonl") if e["event"] == "step"}


def _norm(values: Any) -> float:
    return float(np.linalg.norm(values))


def _groups(step: dict[str, Any]) -> list[float | None]:
    """Mean losses per time bin and modality; None where no sample fell."""
    return [*step["loss_by_bin"], *step["loss_by_modality"].values()]


def assert_same_run(ours: Path, theirs: Path) -> None:
    """Equal samples; losses, gradient norms, evaluations and weights to fp32's rounding."""
    a, b = _steps(ours), _steps(theirs)
    assert sorted(a) == sorted(b) == list(range(1, STEPS + 1))
    for step in b:
        assert a[step]["positions"] == b[step]["positions"]
        assert a[step]["tokens"] == b[step]["tokens"]
        # The same sums in another order, in fp32.
        assert a[step]["loss"] == pytest.approx(b[step]["loss"], rel=1e-6)
        assert a[step]["grad_norm"] == pytest.approx(b[step]["grad_norm"], rel=1e-6)
        for mean, wanted in zip(_groups(a[step]), _groups(b[step]), strict=True):
            assert (mean is None) == (wanted is None)
            assert mean is None or mean == pytest.approx(wanted, rel=1e-6)
    mine, others = (
        {e["step"]: e["fixed_loss"] for e in read_log(out / "train.jsonl") if e["event"] == "eval"}
        for out in (ours, theirs)
    )
    assert STEPS in others
    assert mine.keys() >= others.keys()  # a run that was cut short has looked at its end, too
    for step, loss in others.items():
        assert mine[step] == pytest.approx(loss, rel=1e-6)
    with np.load(ours / "weights.npz") as a, np.load(theirs / "weights.npz") as b:
        assert sorted(a) == sorted(b)
        errors = {name: _norm(a[name].astype(np.float64) - b[name]) for name in b}
        sizes = {name: _norm(b[name].astype(np.float64)) for name in b}
    assert _norm(list(errors.values())) <= 1e-6 * _norm(list(sizes.values()))
    for name in sizes:
        # AdamW divides a gradient by its own size: what began at zero is a sum of such quotients,
        # whose rounding is that of the gradients, not of a weight.
        assert errors[name] <= 1e-5 * sizes[name], name


# Steps of two to four of the five samples, so that four groups of processes have packs left over.
FEW = ("packing.tokens_per_step=30",)
MESHES = {
    "sharded": (4,),  # the default
    "dp": (2, "parallel.dp_replicate=2", "sharding.reshard_after_forward=false"),
    "sequence": (4, "parallel.sp=4"),  # two heads on four processes
    "all": (8, "parallel.dp_replicate=2", "parallel.dp_shard=2", "parallel.sp=2"),
}


@pytest.mark.long
@pytest.mark.slow
def test_every_mesh_trains_as_one_process(train: Callable[..., Path]) -> None:
    alone = train("alone", 1, *FEW)
    assert len({len(range(*step["positions"])) for step in _steps(alone).values()}) > 1
    for name, (world, *overrides) in MESHES.items():
        out = train(name, world, *FEW, *overrides)
        assert_same_run(out, alone)
        assert _flops(out) == _flops(alone)  # the samples', whoever holds which rows of them
        assert (_idle(out) > 0) == (name in ("sharded", "all"))


@pytest.mark.slow
def test_a_run_resumed_on_other_meshes_is_the_run_on_one_process(
    train: Callable[..., Path],
) -> None:
    """More processes, then fewer, with packs accumulated and activations recomputed in every way."""
    alone = train("alone", 1)
    nth = "activation_checkpointing.mode=every_nth"
    # Packs of 18 tokens: two rounds on each of two groups.
    accumulated = ["sharding.keep_unsharded=true", "packing.tokens_per_pack=18"]
    out = train("moved", 2, "train.steps=2", nth, *accumulated)
    assert "rounds: 2" in (out / "output.txt").read_text()
    operators = ["activation_checkpointing.mode=operators"]
    operators += ["activation_checkpointing.save=[goku_kernels::varlen_attention]"]
    flops, states = _flops(out), [_random_states(out)]
    for world, *overrides in (
        (4, "train.steps=3", "parallel.sp=2", *operators), (4, "train.steps=4", "parallel.sp=2"),
        (1, "activation_checkpointing.mode=full"),
    ):  # fmt: skip
        out = train("moved", world, *overrides)
        flops |= _flops(out)
        states.append(_random_states(out))
    assert flops == _flops(alone)
    two, four, again, one = states
    # Each process goes on with its own; those that are new have none to go on with.
    assert [len(set(each)) for each in states] == [2, 4, 4, 1]
    assert (four[:2], again, one) == (two, four, four[:1])
    assert_same_run(alone.parent / "moved", alone)
    log = read_log(alone.parent / "moved" / "train.jsonl")
    assert [e["world"] for e in log if e["event"] in ("start", "resume")] == [2, 4, 4, 1]


@pytest.mark.long
@pytest.mark.slow
def test_thirty_two_processes_then_twenty_four(
    train: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Connected as thousands are, most of them without a pack: the run of one process."""
    monkeypatch.setenv("TORCH_GLOO_LAZY_INIT", "1")
    alone = train("alone", 1)
    degrees = ("parallel.dp_replicate=4", "parallel.dp_shard=4", "parallel.sp=2")
    out = train("many", 32, "train.steps=3", *degrees)
    assert _idle(out) > 0
    out = train("many", 24, "parallel.dp_replicate=2", "parallel.dp_shard=6", "parallel.sp=2")
    assert_same_run(out, alone)


@pytest.mark.long
@pytest.mark.slow
def test_sampling_while_sharded_and_by_the_command(
    train: Callable[..., Path], goku: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    """Drawn by groups of two processes, the samples are those of one process to a grey level."""
    sampling = ["train.steps=1", "train.sample_every=1", "train.sample_steps=2"]
    alone = train("drawn-alone", 1, *sampling)
    out = train("drawn", 4, "parallel.sp=2", *sampling)
    files = sorted(p.relative_to(alone) for p in (alone / "samples").rglob("*.*"))
    assert len(files) == 8
    assert files == sorted(p.relative_to(out) for p in (out / "samples").rglob("*.*"))
    for file in files:
        if file.suffix == ".png":
            _assert_same_picture(out / file, alone / file)
    arguments = ["--prompt", "picture number 0", "--height", "48", "--width", "32", "--steps", "3"]
    arguments += ["--guidance", "1.5", "--count", "3", "--device", "cpu"]
    for sp, processes in ((1, 1), (2, 2)):
        made = alone.parent / f"sp{sp}"
        done = goku("sample", alone, *arguments, "--sp", sp, "--out", made, processes=processes)
        assert done.returncode == 0, done.stderr
    names = sorted(p.name for p in (alone.parent / "sp1").iterdir())
    assert len(names) == 3
    assert names == sorted(p.name for p in (alone.parent / "sp2").iterdir())
    for name in names:
        _assert_same_picture(alone.parent / "sp1" / name, alone.parent / "sp2" / name)
    assert cli.main(["sample", str(alone), *arguments, "--sp", "2"]) == 2
    assert "sp=2" in capsys.readouterr().err


def _assert_same_picture(ours: Path, theirs: Path) -> None:
    a, b = (np.asarray(Image.open(path)).astype(int) for path in (ours, theirs))
    # fp32 latents that differ by a rounding: here and there the next grey level
    assert a.shape == b.shape
    assert abs(a - b).max() <= 1
    assert (a != b).mean() < 0.01


@pytest.mark.long
@pytest.mark.slow
def test_bf16_parameters_are_gathered_in_bf16_but_for_conditioning(
    train: Callable[..., Path],
    write_config: Callable[..., Path],
    run_processes: Any,
    free_port: Callable[[], int],
    tmp_path: Path,
) -> None:
    """One process's losses but for bf16's rounding; and decisions that one rank brings about."""
    precision = "train.precision=bfloat16"
    alone = train("bf16-alone", 1, precision)
    out = train("bf16", 4, precision, "parallel.sp=2", dtypes=True)
    a, b = _steps(out), _steps(alone)
    for step in b:
        assert a[step]["positions"] == b[step]["positions"]
        assert a[step]["loss"] == pytest.approx(b[step]["loss"], rel=1e-3)
        assert a[step]["grad_norm"] == pytest.approx(b[step]["grad_norm"], rel=1e-2)

    config = write_config(tmp_path / "decided")
    call = ("decisions", {"config": str(config), "port": free_port()})
    run_processes(4, SCRIPT, call, backend="none")
    assert [step["skipped"] for step in _steps(tmp_path / "decided").values()] == [0, 1, 0, 0]
    assert len(list((tmp_path / "decided" / "checkpoints").glob("step_*"))) == 1


@pytest.mark.long
def test_what_one_process_loses_has_no_weight_on_any_that_shares_its_pack(
    train: Callable[..., Path],
) -> None:
    """Else a shard of the sample would count and the other not: gradients of nothing that was asked for."""
    alone = train("alone", 1, losing=[0])
    lost = [e for e in read_log(alone / "train.jsonl") if e["event"] == "lost"]
    assert len(lost) == 1
    # The limit is of items, however many processes lose one.
    for name, losing in (("second", [1]), ("both", [0, 1])):
        out = train(name, 2, "parallel.sp=2", "data.max_lost=1", losing=losing)
        assert_same_run(out, alone)
        assert [e["step"] for e in read_log(out / "train.jsonl") if e["event"] == "lost"] == [
            lost[0]["step"]
        ]
        assert len((out / "quarantine.jsonl").read_text().splitlines()) == 1
