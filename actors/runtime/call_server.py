"""What stands in front of a rank, whoever hosts it: calls of coordinators, of which some are too late.

Every call names the coordinator (its epoch) and the generation that it is meant for. One of an older epoch, or of a generation that
was given up, is refused, both when it comes and when it begins; the first word of a newer coordinator ends what the older began.
Calls of the compute lane come one after another from one thread of the host; `recall` and `probe` may be called from others at any
time, and wait for nothing that computes.
"""

from __future__ import annotations

import errno
import logging
import threading
import time
from collections.abc import Iterable, Mapping
from dataclasses import replace

import torch

from actors.calls.messages import Recollection
from actors.calls.rank_calls import Reply
from actors.comm.waiting import Aborted
from actors.errors import named_line
from actors.files.storage import StorageError
from actors.protocol.heartbeat_wire import Address
from actors.runtime.authority import Superseded
from actors.runtime.probe import Prober
from actors.runtime.rank import Rank
from actors.state.checkpoint import CheckpointError
from actors.state.hugging_face import FolderError
from orchestrator.protocol.events import CallId, FailKind, Fault
from orchestrator.protocol.members import Member

logger = logging.getLogger(__name__)

_BEGINNING = frozenset({"form", "rearrange"})  # calls of a generation in which the rank does not take part yet
_FILES = frozenset({"saved"})


class CallServer:
    """In front of one rank."""

    def __init__(self, rank: Rank):
        self._rank, self._authority = rank, rank.authority
        self._prober = Prober()
        self._changed = threading.Condition()  # guards the following; held for moments only
        self._busy: CallId | None = None
        self._method = ""
        self._fault: Fault | None = None

    def serve(self, call: CallId, generation: int, method: str, arguments: tuple) -> Reply | Fault:
        """Carry out a call. generation: that it belongs to; 0: to none. Never raises."""
        try:
            self._authority.heed(call.epoch)
            if method == "recall":
                return Reply(self.recall(*arguments))
            if method == "probe":
                return Reply(self.probe(*arguments))
            if method in _FILES:
                return Reply(getattr(self._rank, method)(*arguments))
        except Exception as error:
            return fault_of(error, method)
        return self._compute(call, generation, method, arguments)

    def arrives(self, call: CallId, generation: int) -> Fault | None:
        """Of a call that has to wait for its turn: why it need not be kept. Its epoch counts from now on."""
        try:
            self._authority.heed(call.epoch)
            if 0 < generation <= self._authority.given_up:
                raise Aborted(f"generation {generation} was given up")
        except (Superseded, Aborted) as error:
            return fault_of(error, "arriving")
        return None

    def recall(self, seconds: float) -> Recollection:
        """What the rank holds, as soon as its compute lane is free, `seconds` from now at the latest."""
        deadline = time.monotonic() + seconds
        with self._changed:
            while self._busy is not None and (left := deadline - time.monotonic()) > 0:
                self._changed.wait(left)
            busy, fault, forming = self._busy, self._fault, self._busy is not None and self._method == "form"
        return replace(self._rank.recall(), busy=busy, fault=fault, forming=forming)

    def probe(self, peers: Mapping[Member, Address], seconds: float) -> tuple[Member, ...]:
        """Those with whom no bytes could be exchanged, both ways, in that time."""
        return self._prober.not_reached(peers, seconds)

    def _compute(self, call: CallId, generation: int, method: str, arguments: tuple) -> Reply | Fault:
        with self._changed:
            self._busy, self._method, self._fault = call, method, None  # what failed before was told before
        fault = None
        try:
            self._authority.serve(call.epoch, generation)
            self._check_place(generation, method)
            answer: Reply | Fault = Reply(getattr(self._rank, method)(*arguments))
        except Exception as error:
            answer = fault_of(error, method)
            fault = replace(answer, call=call)
        finally:
            self._authority.serving = None
            with self._changed:
                self._busy, self._fault = None, fault
                self._changed.notify_all()
        return answer

    def _check_place(self, generation: int, method: str) -> None:
        """Raises Aborted: the rank is not where the caller thinks."""
        if generation <= 0 or method in _BEGINNING:
            return
        present = self._authority.generation
        if present is None or present.number != generation:
            raise Aborted(f"{method} in generation {generation}, but this rank is in {present and present.number}")


def fault_of(error: BaseException, method: str) -> Fault:
    """How a call failed. What nobody foresaw is logged whole."""
    kind = _kind_of(error)
    if kind is FailKind.OWN:
        logger.error("%s failed", method, exc_info=error)
    return Fault(kind, named_line(error))


def _kind_of(error: BaseException) -> FailKind:
    found = list(_causes(error))
    if any(isinstance(one, Superseded) for one in found):
        return FailKind.SUPERSEDED
    if any(isinstance(one, Aborted) for one in found):
        return FailKind.ABORTED
    if any(map(_lacks_memory, found)):
        return FailKind.NO_MEMORY
    if any(isinstance(one, FolderError) for one in found):
        return FailKind.REFUSED
    if any(isinstance(one, CheckpointError | StorageError) for one in found):
        return FailKind.AWAY if any(map(_is_away, found)) else FailKind.UNREADABLE
    return FailKind.OWN


def _causes(error: BaseException) -> Iterable[BaseException]:
    """An error, what it was raised from, what that was, ..."""
    seen: set[int] = set()
    current: BaseException | None = error
    while current is not None and id(current) not in seen:
        yield current
        seen.add(id(current))
        current = current.__cause__


def _is_away(error: BaseException) -> bool:
    """Whether the system says of storage that it does not answer, rather than that there is nothing or something else."""
    return isinstance(error, OSError) and not isinstance(error, StorageError | FileNotFoundError | IsADirectoryError | NotADirectoryError)


def _lacks_memory(error: BaseException) -> bool:
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    # by its text, for want of a class: what torch's allocator for the host, and cuBLAS, NCCL and the driver, raise of a lack of memory
    return isinstance(error, RuntimeError) and "out of memory" in str(error).lower()
