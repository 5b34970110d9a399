"""What stands in front of a rank: who is refused, how failures are told, and that asking waits for nothing that computes."""

from __future__ import annotations

import errno
import threading
import time

import pytest
import torch

from actors.calls.messages import Recollection
from actors.calls.rank_calls import Reply
from actors.comm.waiting import Aborted, OutOfStep
from actors.files.storage import StorageError
from actors.runtime.authority import Authority
from actors.runtime.call_server import CallServer, fault_of
from actors.runtime.executor import ActionFailed
from actors.runtime.probe import ProbeListener
from actors.state.checkpoint import CheckpointError
from actors.state.hugging_face import FolderError
from orchestrator.protocol.events import CallId, FailKind, Fault
from orchestrator.protocol.members import Member

SECONDS = 20.0
GENERATION = 4


class Groups:
    number = GENERATION

    def __init__(self) -> None:
        self.aborted = threading.Event()

    def abort(self) -> None:
        self.aborted.set()


class Rank:
    """What a call server sees of one, with two methods of its own."""

    def __init__(self) -> None:
        self.authority, self.groups = Authority(), Groups()
        self.authority.attached("a run", 1)
        self.authority.enter(self.groups)
        self.begun, self.go_on = threading.Event(), threading.Event()

    def recall(self) -> Recollection:
        return Recollection((), 7, True)

    def apply(self, value: int) -> int:
        return value + 1

    def form(self, generation: Groups) -> None:
        self.authority.enter(generation)

    def block(self) -> None:
        self.begun.set()
        assert self.go_on.wait(SECONDS)

    def saved(self, directory: str) -> str:
        assert self.go_on.wait(SECONDS)
        return "written"

    def fail(self) -> None:
        raise ValueError("first line\nsecond line")


@pytest.fixture
def rank():
    return Rank()


@pytest.fixture
def server(rank):
    found = CallServer(rank)
    yield found
    rank.go_on.set()


def in_a_thread(action):
    """Its result, by and by."""
    found = []
    thread = threading.Thread(target=lambda: found.append(action()), daemon=True)
    thread.start()

    def result():
        thread.join(SECONDS)
        return found[0]
    return result


def test_a_call_is_carried_out_and_answered(server):
    assert server.serve(CallId(1, 1), GENERATION, "apply", (3,)) == Reply(4)
    assert server.serve(CallId(1, 2), 0, "apply", (3,)) == Reply(4)


def test_an_older_coordinator_is_refused_when_its_call_comes_and_a_newer_one_is_obeyed(server, rank):
    server.serve(CallId(2, 1), 0, "apply", (1,))
    assert rank.authority.epoch == 2
    for method in ("apply", "recall", "saved"):
        found = server.serve(CallId(1, 9), 0, method, (1,))
        assert found == Fault(FailKind.SUPERSEDED, "Superseded: epoch 1 is over: this rank obeys epoch 2")
    assert server.arrives(CallId(1, 10), 0).kind is FailKind.SUPERSEDED
    rank.groups.aborted.clear()
    assert server.arrives(CallId(3, 1), 0) is None and rank.authority.epoch == 3
    assert rank.groups.aborted.is_set(), "what the older one began is ended before the newer one's call begins"


def test_a_call_that_waited_while_a_newer_coordinator_came_does_not_begin(server, rank):
    blocked = in_a_thread(lambda: server.serve(CallId(1, 1), GENERATION, "block", ()))
    assert rank.begun.wait(SECONDS)
    assert server.arrives(CallId(1, 2), GENERATION) is None  # it waits for its turn
    rank.authority.heed(2)
    rank.go_on.set()
    assert blocked() == Reply(None)
    assert server.serve(CallId(1, 2), GENERATION, "apply", (1,)).kind is FailKind.SUPERSEDED


def test_a_form_under_way_for_an_older_coordinator_takes_no_place(server, rank):
    form = rank.form

    def late(generation) -> None:
        rank.authority.heed(2)
        form(generation)

    rank.form = late
    assert server.serve(CallId(1, 1), GENERATION, "form", (Groups(),)).kind is FailKind.SUPERSEDED
    assert rank.authority.generation is rank.groups


@pytest.mark.parametrize("given_up", [GENERATION, GENERATION + 3])
def test_a_call_of_a_generation_that_was_given_up_is_refused(server, rank, given_up):
    rank.authority.give_up(given_up)
    expected = Fault(FailKind.ABORTED, f"Aborted: generation {GENERATION} was given up")
    assert server.arrives(CallId(1, 1), GENERATION) == expected
    for method in ("apply", "form"):
        assert server.serve(CallId(1, 1), GENERATION, method, (1,)) == expected
    assert server.serve(CallId(1, 2), 0, "apply", (1,)) == Reply(2), "one that belongs to none is not"


def test_a_rank_that_is_not_where_the_caller_thinks_says_so(server, rank):
    found = server.serve(CallId(1, 1), GENERATION + 1, "apply", (1,))
    assert found.kind is FailKind.ABORTED and "but this rank is in 4" in found.text
    rank.authority.leave()
    assert "but this rank is in None" in server.serve(CallId(1, 2), GENERATION, "apply", (1,)).text


def test_recall_waits_until_the_lane_is_free(server, rank):
    blocked = in_a_thread(lambda: server.serve(CallId(1, 1), GENERATION, "block", ()))
    assert rank.begun.wait(SECONDS)
    recalled = in_a_thread(lambda: server.serve(CallId(1, 2), 0, "recall", (SECONDS,)))
    rank.go_on.set()
    assert recalled() == Reply(Recollection((), 7, True, busy=None)) and blocked() == Reply(None)


def test_recall_waits_no_longer_than_it_is_told_and_says_who_is_busy(server, rank):
    blocked = in_a_thread(lambda: server.serve(CallId(1, 1), GENERATION, "block", ()))
    assert rank.begun.wait(SECONDS)
    began = time.monotonic()
    assert server.recall(0.2) == Recollection((), 7, True, busy=CallId(1, 1))
    assert 0.2 <= time.monotonic() - began < SECONDS / 2
    rank.go_on.set()
    assert blocked() == Reply(None)


def test_recall_tells_how_the_last_call_failed(server):
    server.serve(CallId(1, 1), 0, "fail", ())
    assert server.recall(0).fault == Fault(FailKind.OWN, "ValueError: first line", CallId(1, 1))
    server.serve(CallId(1, 2), 0, "apply", (1,))
    assert server.recall(0).fault is None


def test_what_failed_before_is_not_told_of_a_call_under_way(server, rank):
    server.serve(CallId(1, 1), 0, "fail", ())
    blocked = in_a_thread(lambda: server.serve(CallId(1, 2), GENERATION, "block", ()))
    assert rank.begun.wait(SECONDS)
    found = server.recall(0)
    assert found.busy == CallId(1, 2) and found.fault is None
    rank.go_on.set()
    assert blocked() == Reply(None)


def test_files_are_waited_for_beside_the_lane(server, rank):
    saved = in_a_thread(lambda: server.serve(CallId(1, 1), 0, "saved", ("there",)))
    assert server.serve(CallId(1, 2), GENERATION, "apply", (1,)) == Reply(2) and server.recall(0).busy is None
    rank.go_on.set()
    assert saved() == Reply("written")


def test_probe_says_who_is_not_reached(server):
    listener = ProbeListener("127.0.0.1")
    try:
        peers = {Member("a", 0): listener.address, Member("b", 0): ("127.0.0.1", 1)}
        assert server.serve(CallId(1, 1), 0, "probe", (peers, SECONDS)) == Reply((Member("b", 0),))
    finally:
        listener.close()


def chained(error: Exception, cause: Exception) -> Exception:
    error.__cause__ = cause
    return error


@pytest.mark.parametrize("error, kind", [
    (Aborted("gone"), FailKind.ABORTED), (OutOfStep("not due"), FailKind.ABORTED),
    (chained(ActionFailed(1, 0, "F0.0", Aborted("gone")), Aborted("gone")), FailKind.ABORTED),
    (chained(ActionFailed(1, 0, "F0.0", KeyError(1)), KeyError(1)), FailKind.OWN),
    (CheckpointError("truncated"), FailKind.UNREADABLE), (StorageError("/a", "no such file"), FailKind.UNREADABLE),
    (FolderError("no config.json"), FailKind.REFUSED), (chained(FolderError("a"), StorageError("/a", "none")), FailKind.REFUSED),
    (MemoryError(), FailKind.NO_MEMORY), (torch.OutOfMemoryError("CUDA"), FailKind.NO_MEMORY),
    (OSError(errno.ENOMEM, "Cannot allocate memory"), FailKind.NO_MEMORY), (OSError(errno.EIO, "no"), FailKind.OWN),
    (chained(ActionFailed(1, 0, "F0.0", MemoryError()), MemoryError()), FailKind.NO_MEMORY),
    (RuntimeError("DefaultCPUAllocator: not enough memory: Out of Memory"), FailKind.NO_MEMORY), (RuntimeError("x"), FailKind.OWN),
    (ValueError("no such thing"), FailKind.OWN)])
def test_kinds_of_failures(error, kind):
    found = fault_of(error, "step")
    assert found.kind is kind and found.text.startswith(type(error).__name__) and "\n" not in found.text
