"""Processes and meshes, packs shared among processes, sharded models: on real gloo processes."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed import DistError

from goku.cli import main
from goku.model import PRESETS, GokuTransformer, KernelConfig
from goku.parallelize import (
    ActivationCheckpointing,
    PackSharding,
    ParallelContext,
    ShardingConfig,
    build_model,
    clip,
    copy_parameters,
    lost_process,
    parallel_context,
)
from goku_kernels import Packing
from goku_runtime.mesh import ParallelDims

SCRIPT = Path(__file__).with_name("shard_processes.py")
CPU = torch.device("cpu")


@pytest.mark.parametrize(("world", "heads"), [(2, 2), (4, 3)])
def test_a_pack_on_several_processes_is_the_pack_on_one(run_processes: Any, world: int, heads: int):
    run_processes(world, SCRIPT, ("model_on_shards", {"heads": heads}), "too_few_tokens")


def test_arrangement_and_failures(run_processes: Any, free_port: Any, tmp_path: Path):
    run_processes(
        4, SCRIPT, ("arrangement", {"port": free_port()}), ("bad_arrangement", {"port": free_port()}),
        ("one_fails", {"port": free_port()}),
        ("a_row_of_every_process", {"port": free_port(), "path": str(tmp_path / "checkpoint")}),
        backend="none",
    )  # fmt: skip


def test_many_processes_are_connected_to_their_neighbours(run_processes: Any, free_port: Any):
    ports = {"port": free_port(), "other_port": free_port()}
    run_processes(12, SCRIPT, ("neighbours_alone", ports), backend="none")


@pytest.mark.parametrize("lazy", ["0", "1"])
def test_who_loses_another_process_says_so_in_a_line(
    run_processes: Any, free_port: Any, monkeypatch: pytest.MonkeyPatch, lazy: str
):
    monkeypatch.setenv("TORCH_GLOO_LAZY_INIT", lazy)
    call = ("one_dies", {"port": free_port()})
    output = run_processes(4, SCRIPT, call, backend="none", expect=[1, 9, 1, 1])
    for rank in (0, 2, 3):
        why = r"what ended first says why \(.*Connection \w+.*\)"
        line = rf"^goku train: rank {rank} lost another process, or the network to it: {why}$"
        assert len(re.findall(line, output, re.MULTILINE)) == 1, output
    assert "Traceback" not in output


def test_what_is_no_lost_process():
    for error in (
        RuntimeError("Connection closed by peer"),  # a file system's, a web server's
        RuntimeError("[gloo/transport/tcp/unbound_buffer.cc:81] Timed out waiting 1800000ms for recv"),
        DistError("shapes differ"),
    ):  # fmt: skip
        assert lost_process(error) is None
    gone = "NCCL error in: x, remote process exited or there was a network error\nLast error:\nNET/IB: status=12"
    told = lost_process(DistError(gone))
    assert told is not None
    assert told.endswith("Last error: NET/IB: status=12)")
    assert "\n" not in told


@given(
    lengths=st.lists(st.integers(0, 9), min_size=1, max_size=6).filter(lambda x: sum(x) >= 5),
    size=st.integers(1, 5),
)
def test_rows_of_samples_in_a_shard(lengths: list[int], size: int):
    samples = [i for i, n in enumerate(lengths) for _ in range(n)]
    rows = -(-len(samples) // size)
    texts = [torch.full((3, 2), float(i)) for i in range(len(lengths))]
    for rank in range(size):
        parallel: Any = SimpleNamespace(
            size=size, rows=lambda tokens: -(-tokens // size), attention=None,
            token_offset=lambda tokens, rank=rank: rank * rows,
        )  # fmt: skip
        shard = PackSharding(parallel).shard(Packing.from_lengths(lengths))
        mine = samples[rank * rows : (rank + 1) * rows]
        assert shard.packing.lengths == tuple(mine.count(i) for i in range(len(lengths)))
        assert (shard.rows, shard.token_offset) == (rows, rank * rows)
        kept = PackSharding.text(texts, shard)
        assert [len(text) for text in kept] == [3 * (i in mine) for i in range(len(lengths))]


def test_alone_is_the_identity():
    with parallel_context("cpu") as context:
        assert (context.rank, context.world, context.is_main, context.group) == (0, 1, True, None)
        assert (context.packs, context.pack_rank, context.leads_pack) == (1, 0, True)
        assert context.pack_sharding(4) is None
        values = torch.tensor([1.5, 2.5])
        assert context.all_sum(values) is values
        context.barrier()
        with pytest.raises(ValueError, match="2"), parallel_context("cpu", dims=ParallelDims(sp=2)):
            pass


def test_a_model_built_alone_is_a_plain_model():
    context = ParallelContext(0, 1, CPU, None)
    arguments = PRESETS["tiny-test"], KernelConfig(), context, ShardingConfig()
    model = build_model(*arguments, ActivationCheckpointing(), torch.float32, seed=3)
    plain = GokuTransformer(PRESETS["tiny-test"])
    plain.initialise(3)
    assert type(model) is GokuTransformer
    for (name, ours), (wanted, theirs) in zip(
        model.named_parameters(), plain.named_parameters(), strict=True
    ):
        assert name == wanted
        assert torch.equal(ours, theirs)
    copy_parameters(model, plain)
    gradient = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=gradient)
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        q.grad = None if p.grad is None else p.grad.clone()
    norm = torch.nn.utils.clip_grad_norm_(plain.parameters(), 0.5)
    # fp32 norms summed in another order
    assert clip(model, 0.0, context).item() == pytest.approx(norm.item(), rel=1e-6)
    assert clip(model, 0.5, context).item() == pytest.approx(norm.item(), rel=1e-6)
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-5, atol=1e-9)


def test_bad_values_are_named():
    with pytest.raises(ValueError, match=r"sharding\.prefetch is -1"):
        ShardingConfig(prefetch=-1)
    with pytest.raises(ValueError, match="tpu"), parallel_context("tpu"):
        pass
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="cuda"), parallel_context("cuda"):
            pass


@pytest.fixture
def two_gpus(monkeypatch):
    """What torch says on a machine with two GPUs; choosing one of them fails the test."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)

    def choose(device):
        pytest.fail(f"device {device} was chosen")

    monkeypatch.setattr(torch.cuda, "set_device", choose)


@pytest.mark.parametrize("device", ["auto", "cuda"])
@pytest.mark.usefixtures("two_gpus")
def test_more_processes_than_gpus_are_refused(device, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.setenv("RANK", "2")
    monkeypatch.setenv("LOCAL_RANK", "2")
    message = r"LOCAL_RANK is 2, but torch sees 2 CUDA devices here; allowed: 0 to 1 .*'cpu'"
    with pytest.raises(ValueError, match=message), parallel_context(device):
        pass


@pytest.mark.usefixtures("two_gpus")
def test_the_command_line_ends_with_2_for_them(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("LOCAL_RANK", "5")
    config = tmp_path / "run.yaml"
    config.write_text(
        f"{{out: {tmp_path}/run, data: {{path: {tmp_path}}}, vae: {{path: vae, train: {{}}}}, model: {{preset: tiny}},"
        " packing: {tokens_per_step: 64, tokens_per_pack: 64}}"
    )
    assert main(["train", str(config), "train.device=cuda"]) == 2
    assert capsys.readouterr().err.startswith("goku train: LOCAL_RANK is 5, but torch sees 2")


@pytest.mark.parametrize("name", ["WORLD_SIZE", "RANK", "LOCAL_RANK"])
@pytest.mark.parametrize("value", ["x", "-1", ""])
def test_an_environment_that_is_none_of_torchruns_is_named(name, value, monkeypatch):
    monkeypatch.setenv(name, value)
    message = f"{name} is {value!r} in the environment; allowed: an integer"
    with pytest.raises(ValueError, match=message), parallel_context("cpu"):
        pass


def test_one_process_is_arranged_in_one_way_alone() -> None:
    with parallel_context("cpu") as context:
        assert context.arranged(ParallelDims()) is context
        assert context.arranged(ParallelDims(1, 1, 1)) is context
        with pytest.raises(ValueError, match="sp"):
            context.arranged(ParallelDims(sp=2))
