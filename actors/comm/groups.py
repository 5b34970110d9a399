"""Process groups of one generation: made together, aborted together, dropped together.

Group objects are made directly on a prefixed store, never through torch's global registry, so a new generation can be
built in living processes while the old one is dying. gloo on CPU; NCCL where the device is a GPU.
"""

from __future__ import annotations

import contextlib
import datetime
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from actors.comm.waiting import Aborted, Collective, GroupOperation, OperationCounter, Receive
from actors.errors import first_line

CREATE_TIMEOUT_SECONDS = 60.0
_UNUSED_TAG = 999_999
_FIRST_PAUSE_SECONDS, _LAST_PAUSE_SECONDS = 0.0005, 0.01  # between two looks whether all have come


@dataclass(frozen=True, slots=True)
class Exchanged:
    """An all-to-all under way; `sent` is kept until it is done."""

    work: GroupOperation | None
    sent: torch.Tensor
    received: torch.Tensor

    def wait(self) -> torch.Tensor:
        """Block until the rows received are there. Raises Aborted."""
        if self.work is not None:
            self.work.wait()
        return self.received


class Group:
    """An ordered set of ranks of one generation. Member i of the group is rank `ranks[i]` of the layout."""

    def __init__(self, ranks: Sequence[int], rank: int, backend: dist.Backend | None,
                 progress: OperationCounter | None = None):
        self._progress = progress or OperationCounter()
        self.ranks, self.size, self.rank = tuple(ranks), len(ranks), tuple(ranks).index(rank)
        self._backend, self._aborted, self._waiting = backend, threading.Event(), set()

    def all_reduce(self, tensor: torch.Tensor, op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM) -> None:
        """In place; every member ends with the same bits."""
        if self.size > 1 and tensor.numel():
            options = dist.AllreduceOptions()
            options.reduceOp = op
            self._start(lambda backend: backend.allreduce([tensor], options)).wait()

    def all_gather(self, output: torch.Tensor, part: torch.Tensor) -> None:
        """`output` [size * n] receives every member's `part` [n], in member order. `part` may be a slice of `output`."""
        if self.size > 1:
            self._start(lambda backend: backend._allgather_base(output, part.clone())).wait()
        elif output.data_ptr() != part.data_ptr():
            output.copy_(part)

    def all_to_all(self, rows: torch.Tensor, send_counts: list[int], receive_counts: list[int]) -> torch.Tensor:
        """Exchange rows of a contiguous [n, ...] tensor: the first `send_counts[0]` go to member 0, and so on.

        Returns the rows received, in member order: [sum(receive_counts), ...], same dtype.
        """
        return self.start_all_to_all(rows, send_counts, receive_counts).wait()

    def start_all_to_all(self, rows: torch.Tensor, send_counts: list[int], receive_counts: list[int]) -> Exchanged:
        """The same, without waiting for it; `rows` must stay unchanged until then. Raises Aborted."""
        received = rows.new_empty((sum(receive_counts), *rows.shape[1:]))
        if self.size == 1:
            return Exchanged(None, rows, received.copy_(rows))
        sent, landed = (t.view(torch.uint8) if t.dtype.itemsize == 1 else t for t in (rows, received))
        return Exchanged(self._start(lambda backend: backend.alltoall_base(
            landed, sent, receive_counts, send_counts, dist.AllToAllOptions())), rows, received)

    def send(self, tensor: torch.Tensor, member: int, tag: int) -> GroupOperation:
        """Start a send; the tensor must stay unchanged until it is done. Raises Aborted."""
        return GroupOperation(self._work(lambda backend: backend.send([tensor], member, tag)), self._progress)

    def receive(self, tensor: torch.Tensor, member: int, tag: int) -> GroupOperation:
        """Post a receive into `tensor`. Raises Aborted."""
        work = self._work(lambda backend: backend.recv([tensor], member, tag))
        if _is_gloo(self._backend):
            return Receive(work, self._progress, self._aborted, self._waiting)
        return GroupOperation(work, self._progress)

    def abort(self) -> None:
        """End every blocked operation of this group within milliseconds; each raises in the thread that waits for it."""
        if (backend := self._backend) is None:
            return
        if not _is_gloo(backend):
            backend.abort()
            return
        self._aborted.set()
        # gloo's own abort does nothing. A wait that times out closes every pair of the group, which ends all operations. On a
        # pair that is closed already, as that to a member who was quicker to abort, the receive fails and closes none: try the others.
        for step in range(1, self.size):
            with contextlib.suppress(RuntimeError):
                work = backend.recv([torch.empty(1)], (self.rank + step) % self.size, _UNUSED_TAG)
                work.wait(datetime.timedelta(milliseconds=1))
        for receive in list(self._waiting):
            receive.let_go()

    def close(self) -> None:
        """Let go of sockets and threads, whoever still holds this group."""
        self._backend = None

    def _start(self, operation: Callable[[dist.Backend], dist.Work]) -> GroupOperation:
        """A collective. Raises Aborted."""
        work, backend = self._work(operation), self._backend
        if _is_gloo(backend):
            return Collective(work, self._progress, backend, self._aborted)
        return GroupOperation(work, self._progress)

    def _work(self, operation: Callable[[dist.Backend], dist.Work]) -> dist.Work:
        """A group that was aborted refuses an operation when it is started, one that is aborted later when it is waited for."""
        if (backend := self._backend) is None:
            raise Aborted(f"the group of ranks {self.ranks} is closed")
        if self._aborted.is_set():
            raise Aborted(f"the group of ranks {self.ranks} was aborted")
        try:
            return operation(backend)
        except RuntimeError as error:
            raise Aborted(first_line(error)) from error


def wait(operation: GroupOperation) -> None:
    """Block until done. Raises Aborted."""
    operation.wait()


def _is_gloo(backend: dist.Backend | None) -> bool:
    return backend is not None and backend.name() == "gloo"


class Generation:
    """All process groups of one rank in one generation, by their set of ranks (equal sets share a group).

    A set may have a second group, on which small messages pass what the first one transfers.

    `timeout_seconds`: of every operation. `create_timeout_seconds`: of making one group, which no abort can end. `progress`: where
    finished operations and groups made are counted.
    """

    def __init__(self, number: int, rank: int, device: torch.device, host: str, timeout_seconds: float,
                 create_timeout_seconds: float = CREATE_TIMEOUT_SECONDS, progress: OperationCounter | None = None):
        self._progress = progress or OperationCounter()
        self.number, self.rank = number, rank
        self._device, self._host = device, host
        self._timeout = datetime.timedelta(seconds=timeout_seconds)
        self._create_timeout = datetime.timedelta(seconds=min(timeout_seconds, create_timeout_seconds))
        self._groups: dict[tuple[tuple[int, ...], bool], Group] = {}
        self._aborted = False

    def meet(self, store: dist.Store, members: int, seconds: float) -> None:
        """Wait until so many ranks are here: once one makes a group with somebody who does not come, only time ends that.

        Raises Aborted: not all came in time, or `abort` was called.
        """
        if store.add("arrived", 1) == members:
            store.set("complete", "")
        deadline, pause = time.monotonic() + seconds, _FIRST_PAUSE_SECONDS
        while not self._aborted:
            if store.check(["complete"]):
                return self._progress.finished()
            if time.monotonic() > deadline:
                raise Aborted(f"generation {self.number}: not all of {members} ranks came within {seconds:g} s")
            time.sleep(pause)
            pause = min(2 * pause, _LAST_PAUSE_SECONDS)
        raise Aborted(f"generation {self.number} was given up before its ranks had met")

    def create(self, store: dist.Store, wanted: Iterable[tuple[int, ...]], seconds: Iterable[tuple[int, ...]] = ()) -> None:
        """Make the groups that contain this rank; of `seconds`, second ones. Every rank must pass the same sequences, or
        creation would deadlock.

        Raises Aborted when a member does not come in time, or `abort` was called: at the next group, for making one cannot be
        ended.
        """
        keys = [*((ranks, False) for ranks in wanted), *((ranks, True) for ranks in seconds)]
        for index, (ranks, second) in enumerate(dict.fromkeys(keys)):
            if self.rank not in ranks:
                continue
            if self._aborted:
                raise Aborted(f"generation {self.number} was given up while its groups were made")
            backend = None
            if len(ranks) > 1:
                prefix = dist.PrefixStore(f"generation-{self.number}/group-{index}", store)
                backend = self._backend(prefix, ranks.index(self.rank), len(ranks))
            self._groups[ranks, second] = Group(ranks, self.rank, backend, self._progress)
            self._progress.finished()

    def group(self, ranks: tuple[int, ...], second: bool = False) -> Group:
        return self._groups[ranks, second]

    def abort(self) -> None:
        """End every blocked operation, and refuse to make further groups."""
        self._aborted = True
        for group in list(self._groups.values()):
            group.abort()

    def close(self) -> None:
        """Drop the groups, with their sockets and threads."""
        for group in self._groups.values():
            group.close()
        self._groups.clear()

    def _backend(self, store: dist.Store, rank: int, size: int) -> dist.Backend:
        if self._device.type == "cuda":
            options = dist.ProcessGroupNCCL.Options()
            options._timeout = self._timeout
            return dist.ProcessGroupNCCL(store, rank, size, options)
        options = dist.ProcessGroupGloo._Options()
        options._timeout = self._create_timeout
        options._threads = 2
        options._devices = [dist.ProcessGroupGloo.create_device(hostname=self._host, lazy_init=False)]
        try:
            backend = dist.ProcessGroupGloo(store, rank, size, options)
        except RuntimeError as error:
            raise Aborted(f"group of {size} ranks did not form: {first_line(error)}") from error
        backend._set_default_timeout(self._timeout)
        return backend
