"""Notices that this process's own raylet, or Ray's control store, is gone, and ends the process with one line.

Ray's client would go on trying for a minute and more, and whoever waits for it hangs as long; so nothing here waits for Ray.
Ranks and coordinator are not asked: they go on by themselves as long as they can, and as long as `elastic.orphan_seconds` says.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

from jobs import cli

REFUSED_SECONDS, SILENT_SECONDS = 4.0, 20.0
"""How long nobody may listen where the control store was, and how long it may not answer: one on a busy host takes its time."""

_LOOK_SECONDS, _ANSWER_SECONDS, _LAST_WORDS_SECONDS = 0.5, 2.0, 2.0


class ClusterWatch:
    """While the `with` block runs. consequence: what follows for the user, told after what happened. lost: called with the line,
    on a thread of this watch; whoever waits for Ray goes on waiting.

    raylet: its socket; store: a client of the control store. None: of the Ray that this process is connected to.
    """

    def __init__(self, consequence: str, lost: Callable[[str], object] | None = None, raylet: str | None = None,
                 store: Any = None):
        self._consequence, self._lost = consequence, lost or end_process
        self._raylet_address, self._store = raylet, store
        self._closed = threading.Event()
        self._bell, self._rope = socket.socketpair()

    def __enter__(self) -> ClusterWatch:
        if self._store is None:
            from ray._private.worker import global_worker

            self._store, self._raylet_address = global_worker.gcs_client, global_worker.node.raylet_socket_name
        for name, watch in (("raylet", self._watch_raylet), ("store", self._watch_store)):
            threading.Thread(target=watch, name=f"watch of the {name}", daemon=True).start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._closed.set()
        self._rope.close()

    def _watch_raylet(self) -> None:
        """The kernel closes all of its connections when it ends."""
        with socket.socket(socket.AF_UNIX) as line, self._bell:
            try:
                line.connect(self._raylet_address)
            except OSError as error:
                return self._tell(f"this host's raylet is gone ({error.strerror or error})")
            while not self._closed.is_set():
                ready, _, _ = select.select([line, self._bell], [], [])
                with contextlib.suppress(OSError):
                    if self._bell in ready or line in ready and line.recv(1 << 12):
                        continue
                return self._tell("this host's raylet has ended")
        return None

    def _watch_store(self) -> None:
        answered = time.monotonic()
        while not self._closed.wait(_LOOK_SECONDS):
            if self._answers():
                answered = time.monotonic()
            elif (away := time.monotonic() - answered) > (SILENT_SECONDS if self._listens() else REFUSED_SECONDS):
                return self._tell(f"Ray's control store has not answered for {away:.0f} s")
        return None

    def _listens(self) -> bool:
        """Whether there is a process that might answer; or, where no word comes back at all, might be one."""
        host, _, port = self._store.address.rpartition(":")
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=_ANSWER_SECONDS).close()
        except ConnectionRefusedError:
            return False
        except OSError:
            return True
        return True

    def _answers(self) -> bool:
        from ray.exceptions import RpcError

        try:
            self._store.check_alive([], timeout=_ANSWER_SECONDS)
        except (RpcError, OSError, RuntimeError):
            return False
        return True

    def _tell(self, what: str) -> None:
        if not self._closed.is_set():
            self._lost(f"{what}: {self._consequence}")


def end_process(line: str) -> None:
    """At once, whatever else this process waits for: a terminal that is stopped, too."""
    writing = threading.Thread(target=_last_words, args=(line,), daemon=True)
    writing.start()
    writing.join(_LAST_WORDS_SECONDS)
    os._exit(cli.FAILED)


def _last_words(line: str) -> None:
    for stream in (sys.stderr, sys.stdout):
        with contextlib.suppress(OSError, ValueError):
            if stream is sys.stderr:
                stream.write(f"{line}\n")
            stream.flush()
