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
from multiprocessing.connection import Connection, wait
from typing import Any, Self

from actors.ranks import RankFailed
from orchestrator.config import RunConfig

_BESIDE = {"saved"}  # calls that wait for files, beside the rank's compute
_ABORT_SECONDS = 5.0
_END_SECONDS = 5.0


def rank_here(config: RunConfig) -> Any:
    """The rank that a process hosts; imported there, so that starting processes does not need torch here."""
    from actors.rank import Rank

    return Rank(config, host="127.0.0.1")


class ProcessRanks:
    """`size` fresh processes, each with what `host(config, *its own)` makes there: a Rank, or something with more methods.

    own: further arguments of `host`, by rank. It is called before its process has opened a socket or started a thread.
    """

    def __init__(self, config: RunConfig, size: int, host: Callable[..., Any] = rank_here, own: Sequence[tuple] | None = None):
        self.size, self._call = size, 0
        self._calls: list[Connection] = []
        self._controls: list[Connection] = []
        self._processes: list[multiprocessing.process.BaseProcess] = []
        self._mail: dict[tuple[int, int], tuple[bool, Any]] = {}
        self._awaited: set[int] = set()
        try:
            for rank in range(size):
                self._spawn(rank, host, (config, *(own[rank] if own is not None else ())))
        except BaseException:
            self.close()
            raise

    @property
    def pids(self) -> list[int]:
        """Process ids, by rank."""
        return [process.pid for process in self._processes]

    def start(self, method: str, arguments: Sequence[tuple]) -> _Answers:
        """Raises RankFailed: a process has ended."""
        self._call += 1
        for rank, (connection, values) in enumerate(zip(self._calls, arguments)):
            try:
                connection.send((self._call, method, values))
            except OSError:
                raise RankFailed(rank, "its process ended") from None
        self._awaited.add(self._call)
        return _Answers(self, self._call, len(arguments))

    def collect(self, timeout_seconds: float) -> None:
        """Take in what has arrived, waiting for something at most this long. Raises RankFailed: a process ended."""
        for connection in wait(self._calls, timeout=timeout_seconds):
            rank = self._calls.index(connection)
            try:
                number, ok, value = connection.recv()
            except (EOFError, OSError):
                raise RankFailed(rank, "its process ended") from None
            if number in self._awaited:
                self._mail[rank, number] = (ok, value)

    def answer(self, rank: int, call: int) -> tuple[bool, Any] | None:
        return self._mail.get((rank, call))

    def forget(self, call: int) -> None:
        """Drop the answers to a call that came, and those that are still to come."""
        self._awaited.discard(call)
        self._mail = {key: found for key, found in self._mail.items() if key[1] != call}

    def abort(self) -> None:
        """End every blocked communication. Returns when that is done, so that none that begins later is hit."""
        told = []
        for connection in self._controls:
            try:
                connection.send("abort")
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

    def close(self) -> None:
        """End and reap all processes: those that are busy or frozen by force."""
        for connection in self._calls:
            connection.close()
        deadline = time.monotonic() + _END_SECONDS
        for process in self._processes:
            process.join(timeout=max(0.0, deadline - time.monotonic()))
            process.kill()
            process.join()
            process.close()
        for connection in self._controls:
            connection.close()
        self._processes, self._calls, self._controls = [], [], []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _spawn(self, rank: int, host: Callable[..., Any], arguments: tuple) -> None:
        context = multiprocessing.get_context("spawn")
        call, their_call = context.Pipe()
        self._calls.append(call)
        control, their_control = context.Pipe()
        self._controls.append(control)
        with their_call, their_control:
            process = context.Process(target=_serve, args=(host, arguments, their_call, their_control), name=f"rank-{rank}",
                                      daemon=True)
            process.start()
        self._processes.append(process)


class _Answers:
    """Answers to one call, as they arrive."""

    def __init__(self, ranks: ProcessRanks, call: int, count: int):
        self._ranks, self._call, self._count = ranks, call, count

    def done(self) -> bool:
        self._ranks.collect(0)
        return not self._missing()

    def results(self, timeout_seconds: float) -> list[Any]:
        deadline = time.monotonic() + timeout_seconds
        try:
            while missing := self._missing():
                self._refuse_failed()
                if (left := deadline - time.monotonic()) <= 0:
                    raise RankFailed(missing[0], f"no answer within {timeout_seconds:g} s")
                self._ranks.collect(left)
            self._refuse_failed()
            return [self._ranks.answer(rank, self._call)[1] for rank in range(self._count)]
        finally:
            self._ranks.forget(self._call)

    def _missing(self) -> list[int]:
        return [rank for rank in range(self._count) if self._ranks.answer(rank, self._call) is None]

    def _refuse_failed(self) -> None:
        for rank in range(self._count):
            answer = self._ranks.answer(rank, self._call)
            if answer is not None and not answer[0]:
                raise RankFailed(rank, answer[1])


def _serve(host: Callable[..., Any], arguments: tuple, calls: Connection, control: Connection) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for whoever started this process: it ends a run in good order
    os.environ["OMP_NUM_THREADS"] = "1"
    rank = host(*arguments)

    def watch() -> None:
        while True:
            try:
                control.recv()
                rank.abort()
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
