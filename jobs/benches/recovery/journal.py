"""What a training under faults leaves behind, whoever runs it: one line per worker and step; and what a fault did to it.

Times are of CLOCK_MONOTONIC, which all processes of a machine share, in seconds.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypeVar

Found = TypeVar("Found")
_LOOK_SECONDS = 0.02


@dataclass(frozen=True, slots=True)
class WorkerStep:
    """One step as one worker did it. `sequences`: that all workers together used for it; `size`: how many they were."""

    pid: int
    rank: int
    size: int
    step: int
    sequences: int
    began: float
    at: float


@dataclass(frozen=True, slots=True)
class InjectedFault:
    """`kind`: rank, one process; node, all processes of one. `pids`: workers that it killed."""

    kind: str
    at: float
    pids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Recovery:
    """What came after a fault.

    first_step_seconds: from the fault to the end of the first step that was done without those that it killed.
    full_batch_seconds: the same for a step that used the whole global batch; None: there was none.
    steps_redone: steps that had been done before the fault and were done again.
    survivors_restarted: workers that the fault did not kill, and whose process went on to no step.
    """

    kind: str
    workers_before: int
    workers_after: int
    first_step_seconds: float
    full_batch_seconds: float | None
    steps_redone: int
    survivors_restarted: int


class StepJournal:
    """Appends to and reads `path`; each line is one write, so that many processes share the file."""

    def __init__(self, path: str | Path):
        self.path = Path(path)

    def write(self, done: WorkerStep) -> None:
        handle = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        try:
            os.write(handle, json.dumps(asdict(done)).encode() + b"\n")
        finally:
            os.close(handle)

    def read(self) -> list[WorkerStep]:
        """All whole lines so far."""
        if not self.path.exists():
            return []
        return [WorkerStep(**json.loads(line)) for line in self.path.read_bytes().split(b"\n")[:-1]]


def wait_for(condition: Callable[[], Found], seconds: float, what: str) -> Found:
    """The first true value of `condition`, which other processes make true. Raises TimeoutError after `seconds`."""
    deadline, pause = time.monotonic() + seconds, threading.Event()
    while not (found := condition()):
        if time.monotonic() > deadline:
            raise TimeoutError(f"not within {seconds:g} s: {what}")
        pause.wait(_LOOK_SECONDS)
    return found


def settled(lines: Iterable[WorkerStep], since: float, size: int, sequences: int, steps: int) -> tuple[int, ...] | None:
    """Pids of `size` workers that have each done at least `steps` steps of the whole batch that began after `since`; None: not
    yet."""
    counts: dict[int, int] = {}
    for line in lines:
        if line.began > since and line.size == size and line.sequences == sequences:
            counts[line.pid] = counts.get(line.pid, 0) + 1
    ready = tuple(sorted(pid for pid, count in counts.items() if count >= steps))
    return ready if len(ready) == size else None


def recovery(lines: list[WorkerStep], fault: InjectedFault, until: float, sequences: int) -> Recovery:
    """Of what was written until `until`. `sequences`: of a whole batch. Raises ValueError: no step before, or none after.

    A step that was under way at the fault counts as one after it if the workers that ended it are fewer or more than before.
    """
    before = [line for line in lines if line.at <= fault.at]
    after = [line for line in lines if fault.at < line.at <= until and (fault.at < line.began or line.size != before[-1].size)]
    if not before or not after:
        raise ValueError(f"no step {'after' if before else 'before'} the fault")
    newest = max(line.step for line in before)
    members = {line.pid for line in before if line.step == newest or line.step == newest - 1 and line.size == before[-1].size}
    first = min(after, key=lambda line: line.at)
    whole = min((line.at for line in after if line.sequences == sequences), default=None)
    lost = members - set(fault.pids) - {line.pid for line in after}
    return Recovery(fault.kind, before[-1].size, first.size, first.at - fault.at, None if whole is None else whole - fault.at,
                    max(0, newest + 1 - min(line.step for line in after)), len(lost))
