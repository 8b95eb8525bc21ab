"""`goku_runtime.balancing.balance_packs` in a process of its own, while this one does something else.

The search is pure Python and takes up to seconds for thousands of groups. In the thread that launches
a GPU's kernels that is time in which none are launched; in another thread it is worse, since every
launch then waits for the interpreter's lock (docs/log.md, 2026-11-23). The process imports neither
torch nor what the training's main module does, and holds no file of its parent but one socket and
standard error. It ends when that socket does, however its parent dies.
"""

from __future__ import annotations

import signal
import socket
import struct
import subprocess
import sys
from array import array
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from goku_runtime.balancing import balance_packs, check_samples

__all__ = ["PackProcess", "PackProcessLost"]

# Neither the environment nor site-packages' start-up files decide what it imports; the folder comes
# last, since other packages lie in it.
_COMMAND = (
    "import sys; sys.path.append(sys.argv[1]); from goku_runtime.pack_process import serve; serve()"
)
_REQUEST = struct.Struct("=3q")  # samples, groups, tokens per pack; then lengths, then costs
_SIZE = struct.Struct("=q")  # of the answer in bytes


class PackProcessLost(RuntimeError):
    """The process could not be started, ended, or did not answer: it is gone, and so is what it was asked."""


class PackProcess:
    """One process that answers one question at a time.

    patience: seconds to wait for it, beyond which it is given up.

    Raises PackProcessLost when it cannot be started.
    """

    def __init__(self, patience: float = 60.0) -> None:
        self._patience = patience
        self._socket, theirs = socket.socketpair()
        self._socket.settimeout(patience)
        command = [sys.executable, "-I", "-S", "-c", _COMMAND, str(Path(__file__).parents[1])]
        with theirs:
            try:
                # A group of its own: Ctrl-C is for the training.
                self._process = subprocess.Popen(
                    command, stdin=theirs.fileno(), stdout=subprocess.DEVNULL, process_group=0
                )
            except OSError as error:
                self._socket.close()
                raise PackProcessLost(f"the packing process could not start: {error}") from error

    @property
    def pid(self) -> int:
        return self._process.pid

    def ask(
        self, lengths: Sequence[int], costs: Sequence[float], groups: int, tokens_per_pack: int
    ) -> None:
        """Begin `balance_packs` of these arguments; `take` must follow before another `ask`.

        Raises ValueError as it does, and PackProcessLost.
        """
        check_samples(lengths, costs, groups, tokens_per_pack)
        header = _REQUEST.pack(len(lengths), groups, tokens_per_pack)
        try:
            self._socket.sendall(header + bytes(array("q", lengths)) + bytes(array("d", costs)))
        except OSError as error:
            raise self._lost(error) from error
        except BaseException:  # an interrupt, perhaps within the message
            self.close()
            raise

    def take(self) -> list[list[list[int]]]:
        """What `balance_packs` gives for what was asked, once it is there. Raises PackProcessLost.

        Left by an interrupt it ends the process, whose answer would be the next question's.
        """
        try:
            (size,) = _SIZE.unpack(_receive(self._socket, _SIZE.size))
            return _nested(array("q", _receive(self._socket, size)))
        except (OSError, EOFError) as error:
            raise self._lost(error) from error
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """End the process, whatever it is at."""
        self._socket.close()
        self._process.kill()
        self._process.wait()

    def _lost(self, error: Exception) -> PackProcessLost:
        if isinstance(error, TimeoutError):
            what = f"did not answer within {self._patience:g} s"
        else:
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(self._patience)  # it closes its end only by ending
            what = f"ended with exit code {self._process.returncode}"
        self.close()
        return PackProcessLost(f"the packing process {what}")


def serve() -> None:
    """What the process does: answers on standard input, a socket, until nobody is at the other end."""
    for number in (signal.SIGINT, signal.SIGTERM):  # Slurm sends them to every process of a job
        signal.signal(number, signal.SIG_IGN)
    with socket.socket(fileno=0) as parent:
        try:
            while True:
                count, groups, budget = _REQUEST.unpack(_receive(parent, _REQUEST.size))
                lengths = array("q", _receive(parent, 8 * count))
                costs = array("d", _receive(parent, 8 * count))
                answer = bytes(_flat(balance_packs(lengths, costs, groups, budget)))
                parent.sendall(_SIZE.pack(len(answer)) + answer)
        except (ConnectionError, EOFError):
            return


def _receive(sender: socket.socket, size: int) -> bytes:
    """So many bytes. Raises EOFError when the other end is closed."""
    data = bytearray(size)
    rest = memoryview(data)
    while rest:
        received = sender.recv_into(rest)
        if not received:
            raise EOFError
        rest = rest[received:]
    return bytes(data)


def _flat(plan: Sequence[Sequence[Sequence[int]]]) -> array[int]:
    """[groups, packs of each, samples of every pack, the samples]"""
    packs = [pack for group in plan for pack in group]
    flat = array("q", [len(plan), len(plan[0]), *map(len, packs)])
    for pack in packs:
        flat.extend(pack)
    return flat


def _nested(flat: array[int]) -> list[list[list[int]]]:
    """The plan that `_flat` was given."""
    groups, micro_steps = flat[:2]
    end = 2 + groups * micro_steps
    packs = []
    for size in flat[2:end]:
        packs.append(flat[end : end + size].tolist())
        end += size
    return [packs[g * micro_steps : (g + 1) * micro_steps] for g in range(groups)]
