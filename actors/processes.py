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


class ProcessRanks:
    """`size` fresh processes, each with one Rank; reachable over pipes: one for calls, one for control."""

    def __init__(self, config: RunConfig, size: int):
        context = multiprocessing.get_context("spawn")
        os.environ["OMP_NUM_THREADS"] = "1"
        self.size, self._call = size, 0
        self._calls, self._controls, self._processes = [], [], []
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
        return _Answers(self._call, self._calls[: len(arguments)])

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
    """Answers to one call; what a failed call before it left in the pipes is passed over."""

    def __init__(self, call: int, connections: list[Connection]):
        self._call, self._connections = call, connections

    def done(self) -> bool:
        return all(connection.poll() for connection in self._connections)

    def results(self, timeout_seconds: float) -> list[Any]:
        deadline = time.monotonic() + timeout_seconds
        found: dict[int, Any] = {}
        while len(found) < len(self._connections):
            missing = {c: r for r, c in enumerate(self._connections) if r not in found}
            ready = wait(list(missing), timeout=max(0.0, deadline - time.monotonic()))
            if not ready:
                raise RankFailed(min(missing.values()), f"no answer within {timeout_seconds:g} s")
            for connection in ready:
                rank = missing[connection]
                try:
                    call, ok, value = connection.recv()
                except (EOFError, OSError):
                    raise RankFailed(rank, "its process ended") from None
                if call != self._call:
                    continue
                if not ok:
                    raise RankFailed(rank, value)
                found[rank] = value
        return [found[rank] for rank in range(len(found))]


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
    while (request := calls.recv()) != _STOP:
        number, method, arguments = request
        try:
            answer = (number, True, getattr(rank, method)(*arguments))
        except Exception as error:
            answer = (number, False, f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")
        calls.send(answer)
