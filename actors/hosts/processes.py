"""Ranks as plain processes on this machine, without Ray: for tests and for benchmarks.

Two pipes lead to each process: one for calls, in order; one for control, which is served even while a call is blocked. One thread
receives what all of them answer. A process ends when its pipes do: when they are closed, or when whoever started it is gone.

Two ways to call: `send`, whose answers are posted to who has asked for them (`listen`); and `start`, for tests and benchmarks, which
calls those who are seated, and waits.
"""

from __future__ import annotations

import logging
import multiprocessing
import queue
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import wait
from typing import Any, Self

from actors.calls.rank_calls import LOST, News, answered, as_event
from actors.hosts import process_host
from actors.hosts.pipes import Inbox, Outbox
from actors.hosts.seated_answers import RankFailed, SeatedAnswers
from actors.protocol.heartbeat_wire import bell_and_rope, ring, silence
from orchestrator.config.run_config import RunConfig
from orchestrator.protocol.commands import CallLane
from orchestrator.protocol.events import CallId, Ended, Failed, FailKind, NotMade
from orchestrator.protocol.members import Member

logger = logging.getLogger(__name__)

_BESIDE = {"saved"}  # calls that wait for files, beside the rank's compute
_ABORT_SECONDS = 5.0
_END_SECONDS = 5.0


def rank_here(config: RunConfig) -> Any:
    """The rank that a process hosts; imported there, so that starting processes does not need torch here."""
    from actors.runtime.rank import Rank

    return Rank(config, host="127.0.0.1")


@dataclass(slots=True, eq=False)
class _Process:
    """One process and its pipes. own: arguments of its host besides the configuration. open: calls sent and not answered yet.
    answered: calls. gone: nothing more comes of it."""

    number: int
    own: tuple
    handle: multiprocessing.process.BaseProcess
    calls: Outbox
    control: Outbox
    inboxes: list[Inbox]
    open: dict[CallId, Member] = field(default_factory=dict)
    answered: int = 0
    gone: bool = False


_PRELOADED = ["actors.runtime.rank", "actors.runtime.call_server", "safetensors.torch", "torch._dynamo"]
"""The last one is what torch imports at the first step of an optimizer, for as long as itself takes."""


class ProcessRanks:
    """`size` fresh processes, each with what `host(config, *its own)` makes there: a Rank, or something with more methods.

    own: further arguments of `host`, by rank. It is called before its process has opened a socket or started a thread.
    Whatever takes a process's place is made with the same.
    start_method: of multiprocessing: "spawn"; or "forkserver": forked from one that has imported torch, so that a new process is
    there in a fraction of a second.
    """

    def __init__(self, config: RunConfig, size: int, host: Callable[..., Any] = rank_here, own: Sequence[tuple] | None = None,
                 start_method: str = "spawn"):
        self._config, self._host, self._made = config, host, 0
        self._alike, self._context = own is None, multiprocessing.get_context(start_method)
        if start_method == "forkserver":
            self._context.set_forkserver_preload(_PRELOADED)
        self._changed = threading.Condition()  # guards all below
        self._call = 0
        self._news: list[News] = []
        self._own: dict[tuple[str, int], tuple] = {}
        self._processes: dict[int, _Process] = {}
        self._of_member: dict[Member, int] = {}
        self._to_attach: dict[Member, tuple] = {}
        self._seats: list[int] = []
        self._mail: dict[tuple[int, int], tuple[bool, Any]] = {}
        self._awaited: set[int] = set()
        self._post: Callable[[object], None] | None = None
        self._to_post: list[object] = []
        self._watched: list[_Process] = []
        self._closing = False
        self._bell, self._rope = bell_and_rope()
        self._receiving = threading.Thread(target=self._receive, name="answers", daemon=True)
        self._receiving.start()
        self._jobs: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._working = threading.Thread(target=self._work, name="processes", daemon=True)
        self._working.start()
        try:
            for rank in range(size):
                self._seats.append(self._make(own[rank] if own is not None else ()).number)
        except BaseException:
            self.close()
            raise

    @property
    def size(self) -> int:
        return len(self._seats)

    @property
    def pids(self) -> list[int]:
        """Process ids, by rank."""
        return [self._processes[number].handle.pid for number in self._seats]

    def pid_of(self, member: Member) -> int:
        """Raises KeyError: it has no process here."""
        return self._processes[self._of_member[member]].handle.pid

    def pids_on(self, node: str) -> list[int]:
        """Process ids of the members on a node. From any thread."""
        with self._changed:
            return [self._processes[number].handle.pid for member, number in self._of_member.items() if member.node == node]

    # --- who is who ----------------------------------------------------------------------------------------------

    def enlist(self, members: Sequence[Member]) -> None:
        """Those beyond `members` stay without a name, and idle."""
        with self._changed:
            self._of_member = dict(zip(members, sorted(self._processes)))
            self._own = {(member.node, member.local): self._processes[number].own for member, number in self._of_member.items()}
        self.seat(members)

    def seat(self, members: Sequence[Member]) -> None:
        self._seats = [self._of_member[member] for member in members]

    def attach(self, member: Member, address: tuple[str, int], beat_seconds: float, run: str, epoch: int = 0) -> None:
        """One that is being made is attached when it is there."""
        wanted = (member, address, beat_seconds, run, *((None, epoch) if epoch else ()))
        with self._changed:
            process = self._processes.get(self._of_member.get(member))
            if process is None:
                self._to_attach[member] = wanted
                return
        self._attach(process, wanted)

    def spawn(self, member: Member) -> bool:
        """Anywhere where all are alike; else where a process was before, for what a place needs is known from it only."""
        place = member.node, member.local
        if place not in self._own and not self._alike:
            self._tell(NotMade(member, f"nothing is known of what a process on {member.node} needs"))
            return False
        with self._changed:
            before = [known for known in self._of_member if (known.node, known.local) == place]
        for known in before:
            self.dismiss(known)
        with self._changed:
            self._to_attach[member] = ()
        self._jobs.put(lambda: self._spawn(member))
        return True

    def dismiss(self, member: Member) -> None:
        with self._changed:
            self._to_attach.pop(member, None)
            number = self._of_member.pop(member, None)
            process = self._processes.pop(number, None)
        if process is not None:
            process.handle.kill()
            self._jobs.put(lambda: self._end(process, at_once=True))

    def tell(self, news: News) -> None:
        """Have it said of a node, as a cluster would: here all is one machine, which by itself says nothing. From any thread."""
        if self._post is not None:
            self._tell(as_event(news))
        else:
            self._news.append(news)

    def news(self) -> list[News]:
        found = self._news[:]
        del self._news[: len(found)]
        return found

    # --- calls of the control protocol ---------------------------------------------------------------------------

    def listen(self, post: Callable[[object], None]) -> None:
        """As RankCalls says."""
        self._post = post
        for news in self.news():
            self.tell(news)

    def send(self, call: CallId, member: Member, generation: int, method: str, arguments: tuple, lane: CallLane) -> None:
        """As RankCalls says."""
        with self._changed:
            process = self._processes.get(self._of_member.get(member))
            alive = process is not None and not process.gone
            if alive:
                process.open[call] = member
        if not alive:
            self._tell(Failed(call, member, FailKind.GONE, LOST))
            return
        outbox = process.control if lane is CallLane.CONTROL else process.calls
        outbox.send((call, lane, generation, method, arguments))

    # --- calls of those who wait ---------------------------------------------------------------------------------

    def start(self, method: str, arguments: Sequence[tuple]) -> SeatedAnswers:
        """Raises RankFailed: a process has ended."""
        lane = CallLane.FILES if method in _BESIDE else CallLane.COMPUTE
        seats = self._seats[: len(arguments)]
        with self._changed:
            for rank, number in enumerate(seats):
                if number not in self._processes or self._processes[number].gone:
                    raise RankFailed(rank, LOST)
            self._call += 1
            call = self._call
            self._awaited.add(call)
            outboxes = [self._processes[number].calls for number in seats]
        for outbox, values in zip(outboxes, arguments):
            outbox.send((call, lane, 0, method, values))
        return SeatedAnswers(self, call, seats)

    def answers(self, call: int, numbers: Sequence[int], seconds: float) -> list[tuple[bool, Any] | None]:
        """Of these processes, once one has failed or all are there, after so many seconds at the latest; None: not there yet."""
        deadline = time.monotonic() + seconds
        with self._changed:
            while True:
                found = [self._mail.get((number, call)) or self._lost(number) for number in numbers]
                left = deadline - time.monotonic()
                if left <= 0 or all(found) or any(answer is not None and not answer[0] for answer in found):
                    return found
                self._changed.wait(left)

    def forget(self, call: int) -> None:
        """Drop the answers to a call that came, and those that are still to come."""
        with self._changed:
            self._awaited.discard(call)
            self._mail = {key: found for key, found in self._mail.items() if key[1] != call}

    def abort(self) -> None:
        """End every blocked communication. Returns when that is done, so that none that begins later is hit."""
        with self._changed:
            told = [number for number in self._seats if number in self._processes and not self._processes[number].gone]
            self._call += 1
            call = self._call
            self._awaited.add(call)
            outboxes = [self._processes[number].control for number in told]
        for outbox in outboxes:
            outbox.send((call, CallLane.CONTROL, 0, "abort", ()))
        deadline = time.monotonic() + _ABORT_SECONDS
        while told and (left := deadline - time.monotonic()) > 0:
            told = [number for number, found in zip(told, self.answers(call, told, left)) if found is None]
        self.forget(call)

    # --- processes -----------------------------------------------------------------------------------------------

    def close(self) -> None:
        """End and reap all processes: those that are busy or frozen by force."""
        with self._changed:
            if self._closing:
                return
            self._closing = True
            processes = list(self._processes.values())
            self._processes, self._seats, self._of_member, self._to_attach = {}, [], {}, {}
        for process in processes:
            process.calls.send(None)
        self._jobs.put(None)
        self._working.join()
        for process in processes:
            self._end(process)
        ring(self._rope)
        self._receiving.join()
        self._bell.close()
        self._rope.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _make(self, own: tuple) -> _Process:
        calls, their_calls = self._context.Pipe()
        control, their_control = self._context.Pipe()
        with their_calls, their_control:
            handle = self._context.Process(target=process_host.serve, args=(self._host, (self._config, *own), their_calls, their_control),
                                           name=f"rank-{self._made}", daemon=True)
            handle.start()
        with self._changed:
            made = _Process(self._made, own, handle, Outbox(calls), Outbox(control), [Inbox(calls), Inbox(control)])
            self._processes[made.number] = made
            self._watched.append(made)
            self._made += 1
        ring(self._rope)
        return made

    def _spawn(self, member: Member) -> None:
        """On the thread for it: making a process may take long."""
        try:
            made = self._make(self._own.get((member.node, member.local), ()))
        except OSError as error:
            logger.exception("cannot make a process for %s", member)
            self._tell(NotMade(member, str(error)))
            return
        with self._changed:
            attach = self._to_attach.pop(member, None)
            if attach is not None:
                self._of_member[member] = made.number
            else:  # dismissed meanwhile
                del self._processes[made.number]
        if attach is None:
            self._end(made, at_once=True)
        elif attach:
            self._attach(made, attach)

    def _attach(self, process: _Process, wanted: tuple) -> None:
        if process.gone:  # nobody will ever say hello
            self._tell(Ended(wanted[0], LOST))
            return
        process.control.send((0, CallLane.CONTROL, 0, "attach", wanted))

    def _end(self, process: _Process, at_once: bool = False) -> None:
        if not at_once:
            process.handle.join(timeout=_END_SECONDS)
        process.handle.kill()
        process.handle.join()
        process.handle.close()
        process.calls.close()
        process.control.close()

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            try:
                job()
            except Exception:  # the next one must be done all the same
                logger.exception("a process could not be made or ended")

    # --- the receiving thread ------------------------------------------------------------------------------------

    def _tell(self, event: object) -> None:
        if self._post is not None:
            with self._changed:
                self._to_post.append(event)
            ring(self._rope)

    def _receive(self) -> None:
        while True:
            with self._changed:
                of = {inbox: process for process in self._watched for inbox in process.inboxes}
                if self._closing and not of:
                    return
            for found in wait([self._bell, *of]):
                if found is self._bell:
                    silence(self._bell)
                else:
                    self._take(of[found], found)
            with self._changed:
                events, self._to_post = self._to_post, []
            for event in events:
                self._post(event)

    def _take(self, process: _Process, inbox: Inbox) -> None:
        if process.gone:
            return  # in this very round
        try:
            messages = inbox.receive()
        except Exception as error:
            if not isinstance(error, EOFError):
                logger.exception("an answer that cannot be read")
            return self._is_gone(process)
        with self._changed:
            for key, answer in messages:
                process.answered += 1
                if isinstance(key, CallId):
                    member = process.open.pop(key, None)
                    if member is not None and self._post is not None:
                        self._to_post.append(answered(key, member, answer))
                elif key in self._awaited:
                    self._mail[process.number, key] = answer
            self._changed.notify_all()

    def _is_gone(self, process: _Process) -> None:
        with self._changed:
            process.gone = True
            self._watched.remove(process)
            if self._post is not None:
                self._to_post += [Failed(call, member, FailKind.GONE, LOST) for call, member in process.open.items()]
                self._to_post += [Ended(member, LOST) for member, number in self._of_member.items() if number == process.number]
            process.open.clear()
            self._changed.notify_all()
        for inbox in process.inboxes:
            inbox.close()

    def _lost(self, number: int) -> tuple[bool, str] | None:
        process = self._processes.get(number)
        return (False, LOST) if process is None or process.gone else None
