"""Steps that all ranks of a process group take together, and fail together."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException

from goku_runtime.checkpoint.manifest import CheckpointError

__all__ = ["Ranks"]

T = TypeVar("T")

# Of the groups that are made here.
_PATIENCE_S = 7200.0


class _Failure(NamedTuple):
    """An exception in words: the exception itself may not survive being sent."""

    kind: str
    message: str
    errno: int | None = None
    filename: str | None = None
    notes: tuple[str, ...] = ()

    @classmethod
    def of(cls, error: BaseException) -> _Failure:
        notes = tuple(getattr(error, "__notes__", ()))
        if isinstance(error, OSError):
            text = error.strerror or str(error)
            name = error.filename and str(error.filename)
            return cls("OSError", text, error.errno, name, notes)
        kinds = (CheckpointError, ValueError, TypeError, ImportError)
        kind = next((kind.__name__ for kind in kinds if isinstance(error, kind)), "RuntimeError")
        known = kind == type(error).__name__
        text = str(error) if known else f"{type(error).__name__}: {error}"
        return cls(kind, text, notes=notes)

    def raised(self, rank: int) -> BaseException:
        error = self._raised(f"rank {rank}: {self.message}")
        for note in self.notes:
            error.add_note(note)
        return error

    def _raised(self, message: str) -> BaseException:
        if self.kind == "OSError":
            return OSError(self.errno, message, self.filename)
        kinds: tuple[type[BaseException], ...] = (CheckpointError, ValueError, TypeError)
        kinds += (ImportError,)
        return next((k for k in kinds if k.__name__ == self.kind), RuntimeError)(message)


class Ranks:
    """The ranks of a process group, or this process alone.

    Args:
        group: None takes the default group where one is initialised, else this process alone.

    Raises:
        ValueError: this process is not in the group.
    """

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        self.group = group
        self.distributed = dist.is_available() and dist.is_initialized()
        if group is not None and not self.distributed:
            raise ValueError("process_group: given, but torch.distributed is not initialised")
        value: object = group  # new_group gives a number to those who are not in the group
        if not (value is None or isinstance(value, dist.ProcessGroup | int)):
            raise ValueError(f"process_group is {group!r}; allowed: None or a ProcessGroup")
        self.rank = dist.get_rank(group) if self.distributed else 0
        self.count = dist.get_world_size(group) if self.distributed else 1
        if self.rank < 0:
            raise ValueError("process_group: this process is not a member of it")

    @property
    def device(self) -> str:
        """The type of device whose tensors the ranks can exchange: "cpu" where the group can do that."""
        if self.count == 1:
            return "cpu"
        # As "cpu:gloo,cuda:nccl"; a group of NCCL alone has "cuda:nccl".
        devices = [part.split(":")[0] for part in dist.get_backend_config(self.group).split(",")]
        return "cpu" if "cpu" in devices else devices[0]

    def needs_own(self, timeout_s: float | None) -> bool:
        """Whether messages about files need another group: of CPU tensors, or with this timeout."""
        return self.count > 1 and (self.device != "cpu" or timeout_s is not None)

    @contextmanager
    def for_files(self, timeout_s: float | None) -> Generator[Ranks]:
        """The same ranks with a group whose messages wait for files; made and destroyed where it is needed."""
        if not self.needs_own(timeout_s):
            yield self
            return
        group = self.new_gloo_group(timeout_s)
        try:
            yield Ranks(group)
        finally:
            with suppress(ValueError, AssertionError):  # destroyed with all others meanwhile
                dist.destroy_process_group(group)

    @property
    def is_first(self) -> bool:
        """Whether this is rank 0 of the group."""
        return self.rank == 0

    def gather(self, value: T) -> list[T]:
        """Every rank's value, in order of rank, on every rank."""
        if self.count == 1:
            return [value]
        values = [value] * self.count
        dist.all_gather_object(values, value, group=self.group)
        return values

    def connect(self) -> None:
        """Exchanges a first message of each kind, all ranks together.

        With TORCH_GLOO_LAZY_INIT, without which thousands of ranks cannot make a group, the ranks of one connect
        as they need to. One that ended before would be waited for as long as the group's timeout, two hours; of
        one that is connected the end is seen at once.
        """
        self.gather(0)
        self._largest(0)

    def together(self, step: Callable[[], T]) -> T:
        """Runs a step without collectives on every rank; either it succeeds on all or all raise.

        One all-reduce of three numbers; only a failure is told in words.

        Returns:
            What the step returned on this rank.

        Raises:
            Whatever `step` raised, on the ranks where it did; on all others an OSError (with the
            same errno), CheckpointError, ValueError, TypeError, ImportError or RuntimeError that
            names the rank.
        """
        return self.agree(lambda: (step(), 0))[0]

    def on_first(self, step: Callable[[], T]) -> T | None:
        """`together` for a step that rank 0 takes alone; None on the others."""
        return self.together(lambda: step() if self.is_first else None)

    def collect(self, step: Callable[[], T]) -> list[T]:
        """`together`, and every rank's result in order of rank; they are sent with pickle."""
        try:
            found: Any = step()
        except BaseException as error:
            self.gather(_Failure.of(error))
            raise
        results = self.gather(found)
        for rank, failure in enumerate(results):
            if isinstance(failure, _Failure):
                raise failure.raised(rank)
        return results

    def fail(self, error: BaseException) -> None:
        """Takes this rank's part in a `collect` of the others: they raise, naming it."""
        self.gather(_Failure.of(error))

    def agree(self, step: Callable[[], tuple[T, int]]) -> tuple[T, bool]:
        """`together` for a step that also gives a digest, in one all-reduce of three numbers.

        Args:
            step: gives its result and a number from 0 to 2**63 - 1.

        Returns:
            This rank's result, and whether the digests of all ranks are equal.
        """
        try:
            result, digest = step()
        except BaseException as error:
            self._largest(1, 0, 0)
            self.gather(_Failure.of(error))
            raise
        # The largest of d and of -d: they are d and -d only if all ranks have the same.
        failed, most, least = self._largest(0, digest, -digest)
        if failed:
            self.collect(lambda: None)  # which raises, naming the rank
        return result, most == -least

    def _largest(self, *numbers: int) -> list[int]:
        """The largest of each number over the ranks, by one all-reduce."""
        found = torch.tensor(numbers, dtype=torch.int64, device=self.device)
        if self.count > 1:
            dist.all_reduce(found, op=dist.ReduceOp.MAX, group=self.group)
        return [int(number) for number in found.tolist()]

    def new_gloo_group(self, timeout_s: float | None = None) -> dist.ProcessGroup:
        """Another group of the same ranks in the same order, with connections of its own. All call this together.

        ``new_group`` makes one of all ranks, in ascending order. Of others it could not be made again and
        again: with ``use_local_synchronization`` a group is named by its ranks and the number of groups that
        this process has, so that after one was destroyed the next finds the old one's addresses in the
        store, and ranks that have other groups beside wait for each other under different names.

        Args:
            timeout_s: seconds of its collectives; None: two hours, as a file system may be slow.
        """
        timeout = timedelta(seconds=_PATIENCE_S if timeout_s is None else timeout_s)
        members = dist.get_process_group_ranks(self.group or dist.group.WORLD)
        if members == list(range(dist.get_world_size())):
            return dist.new_group(backend="gloo", timeout=timeout)
        from torch.distributed import distributed_c10d as c10d

        name: Any = self.gather(f"goku_runtime.checkpoint-{secrets.token_hex(8)}")[0]
        group, _ = c10d._new_process_group_helper(
            len(members), self.rank, members, dist.Backend("gloo"), c10d._get_default_store(),
            group_name=name, timeout=timeout,
        )  # fmt: skip
        c10d._world.pg_group_ranks[group] = {member: i for i, member in enumerate(members)}
        return group

    def raise_dcp(self, error: CheckpointException) -> None:
        """Raises what stood behind DCP's exception (no Exception itself, so `except` misses it).

        DCP has already agreed on it: every rank gets here with the same failures.
        """
        rank, (cause, _) = min(error.failures.items())
        if isinstance(cause, KeyboardInterrupt | SystemExit):
            raise cause
        if self.count == 1:
            raise cause
        raise _Failure.of(cause).raised(rank) from cause
