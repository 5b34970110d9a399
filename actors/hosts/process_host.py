"""What runs in a rank's process: a thread for each pipe, and the main thread, on which the rank computes.

Requests are (key, lane, generation, method, arguments), answers (key, answer). The key of a call of the control protocol is its
CallId, and the answer Reply or Fault; that of any other call is a number, and the answer (whether it went well, value or reason).
"""

from __future__ import annotations

import contextlib
import logging
import os
import pickle
import queue
import signal
import threading
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

from actors.errors import named_line
from orchestrator.protocol.commands import CallLane
from orchestrator.protocol.events import CallId

logger = logging.getLogger(__name__)

Key = int | CallId
Request = tuple[Key, CallLane, int, str, tuple]


def serve(host: Callable[..., Any], arguments: tuple, calls: Connection, control: Connection) -> None:
    """Until the pipes are closed, or None comes. host(*arguments) makes the rank."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for whoever started this process: it ends a run in good order
    os.environ["OMP_NUM_THREADS"] = "1"
    _ProcessHost(host(*arguments), calls, control).run()


class _ProcessHost:
    def __init__(self, rank: Any, calls: Connection, control: Connection):
        self._rank, self._server = rank, _server_of(rank)
        self._calls, self._control = calls, control
        self._sending = {connection: threading.Lock() for connection in (calls, control)}
        self._turns: queue.SimpleQueue[Request | None] = queue.SimpleQueue()

    def run(self) -> None:
        for name, target in (("calls", self._take_calls), ("control", self._take_control)):
            threading.Thread(target=target, name=name, daemon=True).start()
        while (request := self._turns.get()) is not None:
            self._carry_out(self._calls, request)

    def _take_calls(self) -> None:
        while (request := _received(self._calls)) is not None:
            key, lane, generation, *_ = request
            refused = self._server.arrives(key, generation) if isinstance(key, CallId) and lane is not CallLane.FILES else None
            if refused is not None:
                self._answer(self._calls, key, refused)
            elif lane is CallLane.FILES:  # it waits for files, beside the rank's compute
                self._beside(self._calls, request)
            else:
                self._turns.put(request)
        self._turns.put(None)

    def _take_control(self) -> None:
        while (request := _received(self._control)) is not None:
            if isinstance(request[0], CallId):
                self._beside(self._control, request)  # it may wait, and the next one may not
            else:
                self._carry_out(self._control, request)
        os._exit(0)  # whoever started this process is gone

    def _beside(self, connection: Connection, request: Request) -> None:
        threading.Thread(target=self._carry_out, args=(connection, request), name=request[3], daemon=True).start()

    def _carry_out(self, connection: Connection, request: Request) -> None:
        key, _, generation, method, arguments = request
        if isinstance(key, CallId):
            self._answer(connection, key, self._server.serve(key, generation, method, arguments))
            return
        try:
            answer = True, getattr(self._rank, method)(*arguments)
        except Exception as error:
            answer = False, named_line(error)
        self._answer(connection, key, answer)

    def _answer(self, connection: Connection, key: Key, answer: Any) -> None:
        data = pickle.dumps((key, answer), pickle.HIGHEST_PROTOCOL)
        with self._sending[connection], contextlib.suppress(OSError):  # whoever called has closed the pipe: its reader says so
            connection.send_bytes(data)


def _server_of(rank: Any) -> Any:
    """What calls of the control protocol go through; None: this host takes none. A host may have its own."""
    if hasattr(rank, "serve"):
        return rank
    if not hasattr(rank, "authority"):
        return None
    from actors.runtime.call_server import CallServer  # it needs torch, which not every host does

    return CallServer(rank)


def _received(connection: Connection) -> Request | None:
    """The next request; None: no more comes."""
    try:
        return pickle.loads(connection.recv_bytes())
    except (EOFError, OSError):
        return None
    except Exception:
        logger.exception("a request that cannot be read")
        os._exit(1)  # whoever called learns that this process is gone, instead of waiting for an answer
