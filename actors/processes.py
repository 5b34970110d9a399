"""Ranks as plain processes on this machine: no Ray. For GPU hosts without Ray, for tests and for benchmarks."""

from __future__ import annotations

import multiprocessing
import os
import threading
import time
from collections.abc import Sequence
from multiprocessing.connection import Connection, wait
from typing import Any

from actors.ranks import RankFailed
from orchestrator.config import RunConfig

_STOP = (-1, "", ())
_BESIDE = {"saved"}  # calls that wait for files, beside the rank's compute


class ProcessRanks:
    """`size` fresh processes, each with one Rank; reachable over pipes: one for calls, one for control."""

    def __init__(self, config: RunConfig, size: int):
        context = multiprocessing.get_context("spawn")
        os.environ["OMP_NUM_THREADS"] = "1"
        self.size, self._call = size, 0
        self._calls, self._controls, self._processes = [], [], []
        self._mail: dict[tuple[int, int], tuple[bool, Any]] = {}
        for rank in range(size):
            call, their_call = context.Pipe()
            control, their_control = context.Pipe()
            process = context.Process(target=_serve, args=(config, their_call, their_control), name=f"rank-{rank}", daemon=True)
            process.start()
            their_call.close(), their_control.close()
            self._calls.append(call), self._controls.append(control), self._processes.append(process)

    def start(self, method: str, arguments: Sequence[tuple]) -> _Answers:
        self._call += 1
        for connection, values in zip(self._calls, arguments):
            connection.send((self._call, method, values))
        return _Answers(self, self._call, len(arguments))

    def collect(self, timeout_seconds: float) -> None:
        """Take in what has arrived, waiting for something at most this long. Raises RankFailed: a process ended."""
        for connection in wait(self._calls, timeout=timeout_seconds):
            rank = self._calls.index(connection)
            try:
                number, ok, value = connection.recv()
            except (EOFError, OSError):
                raise RankFailed(rank, "its process ended") from None
            self._mail[rank, number] = (ok, value)

    def answer(self, rank: int, call: int) -> tuple[bool, Any] | None:
        return self._mail.get((rank, call))

    def forget(self, call: int) -> None:
        """Drop the answers to a call that has been answered."""
        self._mail = {key: found for key, found in self._mail.items() if key[1] != call}

    def abort(self) -> None:
        for connection in self._controls:
            try:
                connection.send("abort")
            except OSError:
                pass  # that rank is gone; it blocks on nothing

    def close(self) -> None:
        for connection in self._calls:
            try:
                connection.send(_STOP)
            except OSError:
                pass  # already gone
        for process in self._processes:
            process.join(timeout=5)
            if process.is_alive():
                process.kill()
                process.join()

    def __enter__(self) -> ProcessRanks:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


class _Answers:
    """Answers to one call, as they arrive."""

    def __init__(self, ranks: ProcessRanks, call: int, count: int):
        self._ranks, self._call, self._count = ranks, call, count

    def done(self) -> bool:
        self._ranks.collect(0)
        return not self._missing()

    def results(self, timeout_seconds: float) -> list[Any]:
        deadline = time.monotonic() + timeout_seconds
        while missing := self._missing():
            self._refuse_failed()
            if (left := deadline - time.monotonic()) <= 0:
                raise RankFailed(missing[0], f"no answer within {timeout_seconds:g} s")
            self._ranks.collect(left)
        self._refuse_failed()
        found = [self._ranks.answer(rank, self._call)[1] for rank in range(self._count)]
        self._ranks.forget(self._call)
        return found

    def _missing(self) -> list[int]:
        return [rank for rank in range(self._count) if self._ranks.answer(rank, self._call) is None]

    def _refuse_failed(self) -> None:
        for rank in range(self._count):
            answer = self._ranks.answer(rank, self._call)
            if answer is not None and not answer[0]:
                raise RankFailed(rank, answer[1])


def _serve(config: RunConfig, calls: Connection, control: Connection) -> None:
    from actors.rank import Rank

    rank = Rank(config, host="127.0.0.1")

    def watch() -> None:
        while True:
            try:
                control.recv()
            except (EOFError, OSError):
                os._exit(0)  # whoever started this process is gone
            rank.abort()

    threading.Thread(target=watch, daemon=True).start()
    sending = threading.Lock()

    def run(number: int, method: str, arguments: tuple) -> None:
        try:
            answer = (number, True, getattr(rank, method)(*arguments))
        except Exception as error:
            answer = (number, False, f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")
        with sending:
            calls.send(answer)

    while (request := calls.recv()) != _STOP:
        if request[1] in _BESIDE:
            threading.Thread(target=run, args=request, daemon=True).start()
        else:
            run(*request)
