"""Ranks as plain processes on this machine, without Ray: for tests and for benchmarks.

Two pipes lead to each process: one for calls, in order; one for control, which is served even while a call is blocked.
A process ends when its pipes do: when they are closed, or when whoever started it is gone.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any, Self

from actors.ranks import LOST, NO_ANSWER, POLL_SECONDS, Check, News, RankFailed
from orchestrator.config import RunConfig
from orchestrator.membership import Member

_BESIDE = {"saved"}  # calls that wait for files, beside the rank's compute
_ABORT_SECONDS = 5.0
_END_SECONDS = 5.0


def rank_here(config: RunConfig) -> Any:
    """The rank that a process hosts; imported there, so that starting processes does not need torch here."""
    from actors.rank import Rank

    return Rank(config, host="127.0.0.1")


@dataclass(slots=True)
class _Process:
    """One process and its pipes. own: arguments of its host besides the configuration."""

    number: int
    own: tuple
    handle: multiprocessing.process.BaseProcess
    calls: Connection
    control: Connection


_PRELOADED = ["actors.rank", "safetensors.torch"]


class ProcessRanks:
    """`size` fresh processes, each with what `host(config, *its own)` makes there: a Rank, or something with more methods.

    own: further arguments of `host`, by rank. It is called before its process has opened a socket or started a thread.
    Whatever takes a process's place is made with the same.
    start_method: of multiprocessing: "spawn"; or "forkserver": forked from one that has imported torch, so that a new process is
    there in a fraction of a second.
    """

    def __init__(self, config: RunConfig, size: int, host: Callable[..., Any] = rank_here, own: Sequence[tuple] | None = None,
                 start_method: str = "spawn"):
        self._config, self._host, self._call, self._made = config, host, 0, 0
        self._alike, self._context = own is None, multiprocessing.get_context(start_method)
        if start_method == "forkserver":
            self._context.set_forkserver_preload(_PRELOADED)
        self._news: list[News] = []
        self._own: dict[tuple[str, int], tuple] = {}
        self._processes: dict[int, _Process] = {}
        self._of_member: dict[Member, int] = {}
        self._seats: list[int] = []
        self._mail: dict[tuple[int, int], tuple[bool, Any]] = {}
        self._awaited: set[int] = set()
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
        return [self._processes[number].handle.pid for member, number in list(self._of_member.items()) if member.node == node]

    # --- who is who ----------------------------------------------------------------------------------------------

    def enlist(self, members: Sequence[Member]) -> None:
        """Those beyond `members` stay without a name, and idle."""
        self._of_member = dict(zip(members, sorted(self._processes)))
        self._own = {(member.node, member.local): self._processes[number].own for member, number in self._of_member.items()}
        self.seat(members)

    def seat(self, members: Sequence[Member]) -> None:
        self._seats = [self._of_member[member] for member in members]

    def attach(self, member: Member, address: tuple[str, int], beat_seconds: float, run: str) -> None:
        process = self._processes[self._of_member[member]]
        with contextlib.suppress(OSError):  # it has ended: its lifeline will never be heard of
            process.control.send(("attach", (member, address, beat_seconds, run)))

    def spawn(self, member: Member) -> bool:
        """Anywhere where all are alike; else where a process was before, for what a place needs is known from it only."""
        place = member.node, member.local
        if place not in self._own and not self._alike:
            return False
        for known in [known for known in self._of_member if (known.node, known.local) == place]:
            self.dismiss(known)
        own = self._own.get(place, ())
        self._of_member[member] = self._make(own).number
        return True

    def dismiss(self, member: Member) -> None:
        number = self._of_member.pop(member, None)
        if number is not None:
            self._end(self._processes.pop(number), at_once=True)

    def tell(self, news: News) -> None:
        """Have it said of a node, as a cluster would: here all is one machine, which by itself says nothing. From any thread."""
        self._news.append(news)

    def news(self) -> list[News]:
        found = self._news[:]
        del self._news[: len(found)]
        return found

    # --- calls ---------------------------------------------------------------------------------------------------

    def start(self, method: str, arguments: Sequence[tuple]) -> _Answers:
        """Raises RankFailed: a process has ended."""
        self._call += 1
        seats = self._seats[: len(arguments)]
        for rank, (number, values) in enumerate(zip(seats, arguments)):
            try:
                self._processes[number].calls.send((self._call, method, values))
            except (OSError, KeyError):
                raise RankFailed(rank, LOST) from None
        self._awaited.add(self._call)
        return _Answers(self, self._call, seats)

    def collect(self, numbers: Sequence[int], timeout_seconds: float) -> None:
        """Take in what has arrived from these processes, waiting for something at most this long. Raises RankFailed: one
        ended."""
        for rank, number in enumerate(numbers):
            if number not in self._processes:
                raise RankFailed(rank, LOST)
        of = {self._processes[number].calls: number for number in numbers}
        for connection in wait(list(of), timeout=timeout_seconds):
            try:
                call, ok, value = connection.recv()
            except (EOFError, OSError):
                raise RankFailed(numbers.index(of[connection]), LOST) from None
            if call in self._awaited:
                self._mail[of[connection], call] = (ok, value)

    def answer(self, number: int, call: int) -> tuple[bool, Any] | None:
        return self._mail.get((number, call))

    def forget(self, call: int) -> None:
        """Drop the answers to a call that came, and those that are still to come."""
        self._awaited.discard(call)
        self._mail = {key: found for key, found in self._mail.items() if key[1] != call}

    def abort(self) -> None:
        """End every blocked communication. Returns when that is done, so that none that begins later is hit."""
        told = []
        for number in self._seats:
            if number not in self._processes:
                continue
            connection = self._processes[number].control
            try:
                connection.send(("abort", ()))
                told.append(connection)
            except OSError:
                pass  # that rank is gone; it blocks on nothing
        deadline = time.monotonic() + _ABORT_SECONDS
        while told and (answered := wait(told, timeout=max(0.0, deadline - time.monotonic()))):
            for connection in answered:
                told.remove(connection)
                try:
                    connection.recv()
                except (EOFError, OSError):
                    pass  # gone meanwhile

    # --- processes -----------------------------------------------------------------------------------------------

    def close(self) -> None:
        """End and reap all processes: those that are busy or frozen by force."""
        for process in self._processes.values():
            process.calls.close()
        for process in self._processes.values():
            self._end(process)
        self._processes, self._seats, self._of_member = {}, [], {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _make(self, own: tuple) -> _Process:
        calls, their_calls = self._context.Pipe()
        control, their_control = self._context.Pipe()
        with their_calls, their_control:
            handle = self._context.Process(target=_serve, args=(self._host, (self._config, *own), their_calls, their_control),
                                           name=f"rank-{self._made}", daemon=True)
            handle.start()
        made = _Process(self._made, own, handle, calls, control)
        self._processes[made.number] = made
        self._made += 1
        return made

    def _end(self, process: _Process, at_once: bool = False) -> None:
        process.calls.close()
        if not at_once:
            process.handle.join(timeout=_END_SECONDS)
        process.handle.kill()
        process.handle.join()
        process.handle.close()
        process.control.close()


class _Answers:
    """Answers of these processes to one call, as they arrive."""

    def __init__(self, ranks: ProcessRanks, call: int, numbers: Sequence[int]):
        self._ranks, self._call, self._numbers = ranks, call, list(numbers)

    def done(self) -> bool:
        self._ranks.collect(self._numbers, 0)
        return not self._missing()

    def results(self, timeout_seconds: float, check: Check | None = None) -> list[Any]:
        deadline = time.monotonic() + timeout_seconds
        try:
            while missing := self._missing():
                self._refuse_failed()
                if check is not None and (failed := check()) is not None:
                    raise failed
                if (left := deadline - time.monotonic()) <= 0:
                    raise RankFailed(missing[0], f"{NO_ANSWER} {timeout_seconds:g} s")
                self._ranks.collect(self._numbers, left if check is None else min(left, POLL_SECONDS))
            self._refuse_failed()
            return [self._ranks.answer(number, self._call)[1] for number in self._numbers]
        finally:
            self._ranks.forget(self._call)

    def _missing(self) -> list[int]:
        return [rank for rank, number in enumerate(self._numbers) if self._ranks.answer(number, self._call) is None]

    def _refuse_failed(self) -> None:
        for rank, number in enumerate(self._numbers):
            answer = self._ranks.answer(number, self._call)
            if answer is not None and not answer[0]:
                raise RankFailed(rank, answer[1])


def _serve(host: Callable[..., Any], arguments: tuple, calls: Connection, control: Connection) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for whoever started this process: it ends a run in good order
    os.environ["OMP_NUM_THREADS"] = "1"
    rank = host(*arguments)

    def watch() -> None:
        while True:
            try:
                method, arguments = control.recv()
                getattr(rank, method)(*arguments)
                if method == "abort":
                    control.send("aborted")
            except (EOFError, OSError):
                os._exit(0)  # whoever started this process is gone

    threading.Thread(target=watch, name="control", daemon=True).start()
    sending = threading.Lock()

    def run(number: int, method: str, arguments: tuple) -> None:
        try:
            answer = (number, True, getattr(rank, method)(*arguments))
        except Exception as error:
            answer = (number, False, f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")
        with sending, contextlib.suppress(OSError):  # whoever called has closed the pipe: the next receive says so
            calls.send(answer)

    while True:
        try:
            request = calls.recv()
        except (EOFError, OSError):
            return
        if request[1] in _BESIDE:
            threading.Thread(target=run, args=request, daemon=True).start()
        else:
            run(*request)
