"""A process with a heartbeat client, for tests. Arguments: host, port, node, local, incarnation, beat seconds, what its
main thread does.

It prints a line for each thing that happens to it, and takes `move PORT` and `end` as lines of standard input. It moves as a rank
does that another coordinator attaches: to a client of its own.
"""

from __future__ import annotations

import logging
import sys
import threading
from collections.abc import Callable

from actors.protocol.heartbeat_client import HeartbeatClient
from orchestrator.protocol.members import Member


def listen(begin: Callable[[int], HeartbeatClient], port: int) -> None:
    line = begin(port)
    for words in map(str.split, sys.stdin):
        line.close()
        if words[0] == "move":
            line = begin(int(words[1]))
        elif words[0] == "end":
            print("closed", flush=True)


class Ends(logging.Handler):
    """Says when a heartbeat client has lost its coordinator."""

    def __init__(self, tell: Callable[[str], None]):
        super().__init__()
        self._tell = tell

    def emit(self, record: logging.LogRecord) -> None:
        if record.getMessage().startswith("the coordinator's heartbeat connection ended"):
            self._tell("orphaned")


def work(how: str) -> None:
    """Never returns."""
    if how == "idle":
        threading.Event().wait()
    elif how == "lock":
        lock = threading.Lock()
        lock.acquire()
        lock.acquire()
    elif how == "loop":
        number = 0
        while True:
            number = (number * 5 + 1) % 1_000_003
    import torch

    torch.set_num_threads(1)
    matrix = torch.ones(600, 600) / 600
    while True:
        matrix = matrix @ matrix


def main(host: str, port: str, node: str, local: str, incarnation: str, beat: str, how: str) -> None:
    if how == "torch":
        import torch  # noqa: F401  its import takes seconds
    say = threading.Lock()

    def tell(*words: object) -> None:
        with say:
            print(*words, flush=True)

    def begin(at: int) -> HeartbeatClient:
        return HeartbeatClient((host, at), Member(node, int(local), int(incarnation)), lambda generation: tell("abort", generation),
                               float(beat), about=lambda: {"generation": 7}, run="a run")

    logger = logging.getLogger("actors.protocol.heartbeat_client")
    logger.setLevel(logging.INFO)
    logger.addHandler(Ends(tell))
    threading.Thread(target=listen, args=(begin, int(port)), daemon=True).start()
    work(how)


if __name__ == "__main__":
    main(*sys.argv[1:])
