"""Where the model meets the parallel runtime: process groups, meshes, sharded models and packs, reductions of a step.

Processes form a mesh (dp_replicate, dp_shard, sp). The sp processes of a group share every pack, each with its own rows
of it; the dp_replicate x dp_shard groups take different packs; parameters, gradients and optimizer states are sharded
over dp_shard x sp. Gradients are summed over all processes: the loss is already divided by the GLOBAL weight sum
(DESIGN: loss = sum(w_i * mean_i) / sum(w_i)), so a sum, not a mean, is right whatever each process was given.
"""

from __future__ import annotations

import os
import textwrap
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import Any, Literal, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from goku.model import GokuTransformer, KernelConfig, ModelConfig, TokenShard, initial_value
from goku_kernels import Packing, adaln_modulate
from goku_runtime.activation_checkpoint import (
    ActivationCheckpointing,
    apply_activation_checkpointing,
)
from goku_runtime.mesh import ParallelDims
from goku_runtime.sequence_parallel import SequenceParallel
from goku_runtime.sharding import (
    ShardingPolicy,
    apply_hybrid_sharding,
    clip_gradients,
    fill,
    gradient_norm,
    materialise,
    microbatch,
)
from goku_runtime.sharding_plan import plan

__all__ = [
    "ActivationCheckpointing",
    "PackSharding",
    "ParallelContext",
    "ParallelDims",
    "ShardingConfig",
    "build_model",
    "check_kernels",
    "check_policies",
    "clip",
    "copy_parameters",
    "draw_parameters",
    "from_torchrun",
    "local",
    "lost_process",
    "microbatch",
    "parallel_context",
]

# Names of the modules that are sharded, gathered and recomputed one by one.
BLOCKS = ("blocks.*",)
# What stays in fp32 under bf16 parameters: a sample's conditioning reaches all of its tokens, and the residual stream
# takes its dtype from patch_embed.
FULL_PRECISION = ("patch_embed", "time_embed", "blocks.*.norm1", "final")
# And, in a model that has it, what adds given frames to the residual stream.
CONDITION = ("condition_embed",)
# From more processes on gloo connects those alone that talk to each other. Otherwise each tells all others in the store
# where to find it, 154 + 8 N bytes to each: 20 MB out of one process for 128 of them, 0.5 TB for 4,096. Up to here a
# process that dies is seen by all others at once, not by its neighbours first.
CONNECT_ALL = 128


T = TypeVar("T")


@dataclass(frozen=True)
class ParallelContext:
    """This process among the others.

    rank, world: position and number of processes; device: where this rank computes; group: the process group for
    gradients and statistics, None when world is 1 (every method is then the identity); host_group: a gloo group of
    the same processes for what stays on the host (checkpoint plans would otherwise travel through GPU memory) and
    for waiting, with a timeout of a day; dims, mesh: how the processes are arranged, no mesh when world is 1;
    arrangements: the contexts that `arranged` made of this one.
    """

    rank: int
    world: int
    device: torch.device
    group: dist.ProcessGroup | None
    host_group: dist.ProcessGroup | None = None
    dims: ParallelDims = field(default_factory=lambda: ParallelDims(1, 1, 1))
    mesh: DeviceMesh | None = None
    arrangements: list[ParallelContext] = field(default_factory=list, repr=False, compare=False)

    def arranged(self, dims: ParallelDims) -> ParallelContext:
        """The same processes in another mesh, for a run that shares its work in another way; itself where equal.

        All ranks call this together. It ends with this context. Raises ValueError for dims that do not fit the number
        of processes.
        """
        resolved = dims.resolve(self.world)
        for context in (self, *self.arrangements):
            if context.dims == resolved:
                return context
        mesh = None if self.world == 1 else resolved.build_mesh(self.device.type)
        self.arrangements.append(replace(self, dims=resolved, mesh=mesh, arrangements=[]))
        return self.arrangements[-1]

    @property
    def packs(self) -> int:
        """How many groups of processes take packs of their own: dp_replicate * dp_shard."""
        return self.world // self.dims.sp

    @property
    def pack_rank(self) -> int:
        """Which of them this process belongs to (sp is the innermost axis of the mesh)."""
        return self.rank // self.dims.sp

    @property
    def leads_pack(self) -> bool:
        """True on the one process of its group that writes what the group made together."""
        return self.rank % self.dims.sp == 0

    def pack_sharding(self, heads: int) -> PackSharding | None:
        """How packs are shared among the sp processes of this group; None where each has its own."""
        if self.mesh is None or self.dims.sp == 1:
            return None
        return PackSharding(SequenceParallel(self.mesh.get_group("sp"), heads))

    def pack_max(self, value: int) -> int:
        """The largest `value` among the sp processes of this group, which call it together."""
        if self.mesh is None or self.dims.sp == 1:
            return value
        largest = torch.tensor(value, device=self.device)
        dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=self.mesh.get_group("sp"))
        return int(largest)

    def row(self, mine: Tensor) -> Tensor:
        """A tensor with a row of every process, of which each holds its own: (world, *mine.shape)."""
        if self.mesh is None:
            return mine[None]
        placements = [Shard(0)] * self.mesh.ndim  # the mesh is row-major in rank
        return DTensor.from_local(mine[None], self.mesh, placements, run_check=False)

    @property
    def is_main(self) -> bool:
        """True on the rank that writes logs and files that exist once."""
        return self.rank == 0

    def all_sum(self, values: Tensor) -> Tensor:
        """Sum of `values` (any shape, any float dtype) over all ranks, in place; returned for convenience."""
        if self.group is not None:
            dist.all_reduce(values, op=dist.ReduceOp.SUM, group=self.group)
        return values

    def gather(self, value: Any) -> list[Any]:
        """The small picklable `value` of every rank, by rank, on every rank; over the host group."""
        values: list[Any] = [value] * self.world
        if self.host_group is not None:
            dist.all_gather_object(values, value, group=self.host_group)
        return values

    def barrier(self) -> None:
        """Wait for every rank, however long it works."""
        self.gather(None)

    def together(self, work: Callable[[], T]) -> T:
        """Do `work` on every rank and return its result; when one rank fails, every rank raises.

        For work that one rank may do or fail alone (train a VAE, write a file): a rank that leaves by an exception
        would keep the others waiting in the next collective. ValueError, OSError, ImportError and ArithmeticError
        are agreed on; a rank that did not fail itself raises a ValueError that names the rank that did.
        """
        result: T | None = None
        failure: ValueError | OSError | ImportError | ArithmeticError | None = None
        try:
            result = work()
        except (ValueError, OSError, ImportError, ArithmeticError) as error:
            failure = error
        messages = self.gather(None if failure is None else str(failure))
        if failure is not None:
            try:
                raise failure
            finally:
                del failure  # its traceback holds this frame: a cycle
        for rank, message in enumerate(messages):
            if message is not None:
                raise ValueError(f"rank {rank}: {message}")
        return cast(T, result)

    def from_main(self, work: Callable[[], T]) -> T:
        """Do `work` on the main rank and return its picklable result, of any size, on every rank; when it fails, every
        rank raises as in `together`. The main rank does not wait for the others."""
        result: T | None = None
        failure: ValueError | OSError | ImportError | ArithmeticError | None = None
        if self.is_main:
            try:
                result = work()
            except (ValueError, OSError, ImportError, ArithmeticError) as error:
                failure = error
        told = [(result, None if failure is None else str(failure))]
        if self.host_group is not None:
            dist.broadcast_object_list(told, src=0, group=self.host_group)
        if failure is not None:
            try:
                raise failure
            finally:
                del failure  # its traceback holds this frame: a cycle
        result, message = told[0]
        if message is not None:
            raise ValueError(f"rank 0: {message}")
        return cast(T, result)

    def on_main(self, work: Callable[[], None]) -> None:
        """Do `work` on the main rank while the others wait; when it fails, every rank raises."""
        self.together(lambda: work() if self.is_main else None)


@contextmanager
def parallel_context(
    device: str = "auto", timeout_minutes: float = 30.0, dims: ParallelDims | None = None
) -> Iterator[ParallelContext]:
    """Join the processes that torchrun started (RANK, WORLD_SIZE, LOCAL_RANK), or be alone.

    device: "auto" (CUDA when there is one), "cpu" or "cuda". timeout_minutes bounds the collectives of a training step,
    so that a lost peer ends the job instead of hanging it. dims: how to arrange them, by default all in dp_shard.
    Of more than `CONNECT_ALL` processes TORCH_GLOO_LAZY_INIT is set in the environment, unless it is given.
    Raises ValueError for a device that is absent, more processes here than GPUs, an environment that is none of
    torchrun's, or dims that do not fit the number of processes. The process group is destroyed on the way out.
    """
    if device not in ("auto", "cpu", "cuda"):
        raise ValueError(f"device is {device!r}; allowed: 'auto', 'cpu', 'cuda'")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            "device is 'cuda', but torch sees no CUDA device here; allowed: 'auto', 'cpu'"
        )
    cuda = torch.cuda.is_available() and device != "cpu"
    world, rank = from_torchrun("WORLD_SIZE", 1), from_torchrun("RANK", 0)
    local_rank = from_torchrun("LOCAL_RANK", 0)
    dims = (dims or ParallelDims()).resolve(world)
    if cuda:
        if local_rank >= (count := torch.cuda.device_count()):
            raise ValueError(
                f"LOCAL_RANK is {local_rank}, but torch sees {count} CUDA device{'s' if count > 1 else ''} here; "
                f"allowed: 0 to {count - 1} (torchrun --nproc-per-node {count} or less), or device 'cpu'"
            )
        torch.cuda.set_device(local_rank)
    where = torch.device("cuda", local_rank) if cuda else torch.device("cpu")
    if world == 1:
        yield ParallelContext(0, 1, where, None)
        return
    if world > CONNECT_ALL:
        os.environ.setdefault("TORCH_GLOO_LAZY_INIT", "1")
    # With its device known, NCCL splits one communicator per axis instead of making groups one after another.
    dist.init_process_group(
        "nccl" if cuda else "gloo",
        timeout=timedelta(minutes=timeout_minutes),
        device_id=where if cuda else None,
    )
    context = ParallelContext(rank, world, where, None, dims=dims)
    failed = True
    try:
        object.__setattr__(context, "group", dist.group.WORLD)
        object.__setattr__(context, "mesh", dims.build_mesh(where.type))
        # One rank may train a VAE or draw samples for hours; a rank that dies is noticed by its closed connection.
        waiting = timedelta(days=1)
        object.__setattr__(context, "host_group", dist.new_group(backend="gloo", timeout=waiting))
        # Connects those that talk to each other, where it is done when first needed: for one that died before it would
        # be waited a day. A ring, what a message to all takes, and the ring of statistics.
        context.barrier()
        context.from_main(lambda: None)
        context.all_sum(torch.zeros(1, device=where))
        yield context
        failed = False
    finally:
        # A traceback may keep `context` until the interpreter ends, and a gloo group whose threads still run then
        # aborts the process ("terminate called"), hiding its exit code: the groups should not outlive this block.
        for each in (context, *context.arrangements):
            for name in ("group", "host_group", "mesh"):
                object.__setattr__(each, name, None)
        # NCCL's teardown may wait for the others, who are in a collective with a rank that failed: leaving without
        # it closes the connections, and they learn of it.
        if not (failed and cuda):
            dist.destroy_process_group()
        if not cuda:
            # DTensor keeps a mesh's groups alive for good (torch 2.13), so their threads are not joined. Now and then
            # one has yet to drop a tensor of its last collective, for which it needs the interpreter: it gets it here,
            # where later it would abort the process (seen once in six runs).
            time.sleep(0.1)


def from_torchrun(name: str, default: int) -> int:
    """The number that torchrun sets in the environment. Raises ValueError when it is none."""
    value = os.environ.get(name, str(default)).strip()
    if not value.isdecimal():
        raise ValueError(f"{name} is {value!r} in the environment; allowed: an integer >= 0")
    return int(value)


# What gloo and NCCL say of a process that is there no more. Not of one that is late: where this one waited for it says
# something, the other's end does not.
_GONE = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Connection refused",
    "Broken pipe",
    "remote process exited",
)


def lost_process(error: RuntimeError) -> str | None:
    """In one line, that this process failed as another one was gone; None where `error` is something else.

    Of thousands of processes each would print seventy lines about the one that failed first.
    """
    text = str(error)
    if not (isinstance(error, dist.DistError) or "gloo/" in text):
        return None
    if not any(words in text for words in _GONE):
        return None
    # NCCL's says in its last line which link it was, gloo's in its first which address.
    said = textwrap.shorten(text, 400, placeholder=" ...")
    rank = from_torchrun("RANK", 0)
    return f"rank {rank} lost another process, or the network to it: what ended first says why ({said})"


class PackSharding:
    """How the processes of one sequence-parallel group share a pack.

    Tokens are cut evenly, wherever samples begin, with padding at the end of the pack alone; of the text each process
    takes that of the samples that it holds rows of.
    """

    def __init__(self, sequence_parallel: SequenceParallel) -> None:
        self.sequence_parallel = sequence_parallel

    @property
    def size(self) -> int:
        """Processes that share a pack."""
        return self.sequence_parallel.size

    def shard(self, packing: Packing) -> TokenShard:
        """This process's rows of the pack. Raises ValueError for a pack with fewer tokens than processes."""
        rows = self.sequence_parallel.rows(packing.total)
        offset = self.sequence_parallel.token_offset(packing.total)
        lengths = self.lengths(packing.lengths)
        here = Packing.from_lengths(lengths, device=packing.cu_seqlens.device)
        return TokenShard(rows, offset, here, self.sequence_parallel.attention)

    def lengths(self, lengths: Sequence[int]) -> list[int]:
        """How many rows this process has of each sample of a pack: 0 of what it need not know."""
        tokens = sum(lengths)
        rows, begin = (
            self.sequence_parallel.rows(tokens),
            -self.sequence_parallel.token_offset(tokens),
        )
        here = []
        for length in lengths:
            here.append(max(0, min(begin + length, rows) - max(begin, 0)))
            begin += length
        return here

    def own(self, held: Tensor, packing: Packing) -> Tensor:
        """This process's rows of the pack, those past its end zero.

        held: (rows, ...) all rows of every sample that this process has rows of, end to end.
        """
        rows = self.sequence_parallel.rows(packing.total)
        offset = self.sequence_parallel.token_offset(packing.total)
        begin = 0  # of the first sample that is held
        for length in packing.lengths:
            if begin + length > offset:
                break
            begin += length
        part = held[offset - begin :][:rows]
        if len(part) == rows:
            return part
        return torch.cat((part, part.new_zeros((rows - len(part), *part.shape[1:]))))

    def rows(self, x: Tensor) -> Tensor:
        """This process's rows of x (T, ...), which all have whole; those past the end are zero."""
        return self.sequence_parallel.shard(x)

    def gather(self, x: Tensor, tokens: int) -> Tensor:
        """(T, ...) on every process from their rows of it."""
        return self.sequence_parallel.gather(x, tokens)

    def any(self, flags: Tensor) -> Tensor:
        """(n,) integers: the largest of each over the group's processes. All of them call this together."""
        dist.all_reduce(flags, op=dist.ReduceOp.MAX, group=self.sequence_parallel.group)
        return flags

    @staticmethod
    def text(texts: Sequence[Tensor], shard: TokenShard) -> list[Tensor]:
        """The texts with those of samples that have no row in the shard emptied."""
        return [
            text if rows else text[:0]
            for text, rows in zip(texts, shard.packing.lengths, strict=True)
        ]


@dataclass(frozen=True, kw_only=True)
class ShardingConfig:
    """How parameters, gradients and optimizer states are held by dp_shard x sp processes (FSDP2). World 1: ignored.

    param_dtype: dtype in which parameters are gathered, "auto" that of the matrix products (adaLN, the embeddings and
    the final layer stay fp32; what is stored, and what gradients are reduced in, is always fp32);
    reshard_after_forward: free gathered parameters between forward and backward; prefetch: how many blocks ahead they
    are gathered; cpu_offload: keep what is sharded in host memory; keep_unsharded: accumulate whole gradients over a
    step's packs and reduce them once (less communication, a whole gradient of memory).
    """

    param_dtype: Literal["auto", "float32"] = "auto"
    reshard_after_forward: bool = True
    prefetch: int = 1
    cpu_offload: bool = False
    keep_unsharded: bool = False

    def __post_init__(self) -> None:
        if self.prefetch < 0:
            raise ValueError(f"sharding.prefetch is {self.prefetch}; allowed: >= 0")

    def policy(self, dtype: torch.dtype, condition: bool = False) -> ShardingPolicy:
        """For a Goku model whose matrix products run in `dtype`; condition: it takes given frames."""
        low = self.param_dtype == "auto" and dtype != torch.float32
        return ShardingPolicy(
            blocks=BLOCKS,
            full_precision=FULL_PRECISION + (CONDITION if condition else ()),
            param_dtype=dtype if low else None,
            reshard_after_forward=self.reshard_after_forward,
            prefetch=self.prefetch,
            cpu_offload=self.cpu_offload,
            gradient_divisor=1.0,  # the loss has its global denominator already
        )


def build_model(
    config: ModelConfig,
    kernels: KernelConfig,
    context: ParallelContext,
    sharding: ShardingConfig,
    checkpointing: ActivationCheckpointing,
    dtype: torch.dtype,
    seed: int | None,
) -> GokuTransformer:
    """A Goku model on the context's device, each process holding its part; the weights depend on `seed` alone.

    Built on the meta device and filled parameter by parameter, so that no process ever holds it whole (one parameter at
    a time it does, in host memory). dtype: of the matrix products. seed: None fills it with zeros, for weights that are
    copied or loaded into it, or drawn after all (`draw_parameters`).
    """
    with torch.device("meta"):
        model = GokuTransformer(config, kernels)
    apply_activation_checkpointing(model, checkpointing, BLOCKS)
    if context.mesh is not None:
        policy = sharding.policy(dtype, condition=config.condition == "frames")
        apply_hybrid_sharding(model, context.mesh, policy)
    offloaded = context.mesh is not None and sharding.cpu_offload
    device = torch.device("cpu") if offloaded else context.device
    materialise(model, device)
    if seed is not None:
        draw_parameters(model, seed)
    return model


def draw_parameters(model: nn.Module, seed: int) -> None:
    """Give all parameters of a model their initial values, which depend on `seed` alone."""
    fill(model, lambda name, like: initial_value(name, like, seed))


def check_policies(
    config: ModelConfig, sharding: ShardingConfig, checkpointing: ActivationCheckpointing
) -> None:
    """Refuse, before any work is done, what `build_model` would refuse.

    Raises ValueError that begins with the section's name.
    """
    with torch.device("meta"):
        model = GokuTransformer(config)
    policy = sharding.policy(torch.bfloat16, condition=config.condition == "frames")
    for section, check in (
        (
            "activation_checkpointing",
            lambda: apply_activation_checkpointing(model, checkpointing, BLOCKS),
        ),
        ("sharding", lambda: plan(model, policy)),
    ):
        try:
            check()
        except ValueError as error:
            raise ValueError(f"{section}: {error}") from error


def check_kernels(kernels: KernelConfig, context: ParallelContext) -> None:
    """Refuse, before any work is done, kernels that are not to be had where the model will be.

    All processes call this together. Raises ValueError that begins with the field's name.
    """

    def one_row() -> None:
        if kernels.backend != "triton":
            return
        try:
            adaln_modulate(torch.zeros(1, 8, device=context.device), None, None, backend="triton")
        except RuntimeError as error:
            raise ValueError(f"kernels.backend is 'triton', but {error}") from error

    context.together(one_row)


def local(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor that may be sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def copy_parameters(source: nn.Module, target: nn.Module) -> None:
    """Copy all parameters between two models that are sharded alike."""
    torch._foreach_copy_(
        [local(p) for p in target.parameters()], [local(p) for p in source.parameters()]
    )


def clip(model: nn.Module, largest: float, context: ParallelContext) -> Tensor:
    """Scale the gradients so that their global norm is at most `largest` (0: leave them); returns the norm before."""
    parameters = list(model.parameters())
    if largest:
        return clip_gradients(parameters, largest, context.mesh)
    return gradient_norm(parameters, context.mesh)
