"""A process with a lifeline, for tests. Arguments: host, port, node, local, incarnation, beat seconds, what its main thread does.

It prints a line for each thing that happens to it, and takes `move PORT` and `end` as lines of standard input.
"""

from __future__ import annotations

import sys
import threading

from actors.lifeline import Lifeline
from orchestrator.membership import Member


def listen(line: Lifeline, host: str) -> None:
    for words in map(str.split, sys.stdin):
        if words[0] == "move":
            line.move((host, int(words[1])))
        elif words[0] == "end":
            line.close()
            print("closed", flush=True)


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

    line = Lifeline((host, int(port)), Member(node, int(local), int(incarnation)), lambda generation: tell("abort", generation),
                    float(beat), lambda: tell("orphaned"), refused=lambda reason: tell("refused", reason),
                    about=lambda: {"generation": 7}, run="a run")
    threading.Thread(target=listen, args=(line, host), daemon=True).start()
    work(how)


if __name__ == "__main__":
    main(*sys.argv[1:])
