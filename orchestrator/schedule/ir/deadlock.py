"""Runs programs against each other, counting only, to see whether they come to their end.

A link is a queue: its n-th send meets its n-th receive. Everything that a position can wait for (a tensor sent, a receive
posted, room on a link) stays true once it is true, and a position has no choice what it does next. So where the programs end
does not depend on who goes first, and one run tells about all.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from orchestrator.schedule.ir.actions import Program, Schedule, Transfer, Work
from orchestrator.schedule.ir.grid import failure

WORK, SEND, POST = 0, 1, 2
NAMED = 8
"""Positions that a refusal names; the grid shows all."""
Arrival = tuple[int, int]
"""(link, n): the n-th tensor of a link, from 0."""
Step = tuple[int, int, tuple[Arrival, ...]]
"""One action of a program: (WORK, 0, what must have arrived), or (SEND or POST, link, ())."""
Placed = tuple[int, Transfer]
"""A transfer and its place in the row: how many compute actions come before it."""


@dataclass(frozen=True, slots=True)
class Link:
    """From one position to another: its transfers in order."""

    origin: int
    target: int
    number: int
    sends: list[Placed] = field(default_factory=list)
    receives: list[Placed] = field(default_factory=list)


class TransportSimulation:
    """outstanding: receives that a position can have posted whose tensor is not there; room: tensors that a link holds whose
    receive is not posted. None: any number."""

    def __init__(self, steps: Sequence[Sequence[Step]], links: Sequence[Link], outstanding: int | None, room: int | None):
        self._steps, self._links, self._outstanding, self._room = steps, links, outstanding, room
        self._sent, self._posted = [0] * len(links), [0] * len(links)
        self._missing = [0] * len(steps)                # by position: receives posted whose tensor is not there
        self.at = [0] * len(steps)                      # next step of each position

    def go(self) -> bool:
        """Run as far as it goes. True: to the end."""
        ready = deque(range(len(self._steps)))
        while ready:
            position = ready.popleft()
            steps, at = self._steps[position], self.at[position]
            while at < len(steps) and self._possible(position, *steps[at]):
                kind, link, _ = steps[at]
                if kind == SEND:
                    self._sent[link] += 1
                    target = self._links[link].target
                    self._missing[target] -= self._sent[link] <= self._posted[link]
                    ready.append(target)
                elif kind == POST:
                    self._posted[link] += 1
                    self._missing[position] += self._posted[link] > self._sent[link]
                    if self._room is not None:
                        ready.append(self._links[link].origin)
                at += 1
            self.at[position] = at
        return all(at == len(steps) for at, steps in zip(self.at, self._steps, strict=True))

    def _possible(self, position: int, kind: int, link: int, arrivals: tuple[Arrival, ...]) -> bool:
        if kind == SEND:
            return self._room is None or self._sent[link] - self._posted[link] < self._room
        if kind == POST:
            return self._outstanding is None or self._missing[position] < self._outstanding
        for arriving, number in arrivals:
            if self._sent[arriving] <= number:
                return False
        return True


def refuse_deadlock(schedule: Schedule, programs: Sequence[Program], steps: Sequence[Sequence[Step]], links: Sequence[Link],
                    outstanding: int | None, room: int | None) -> None:
    """Raises ScheduleError: the programs do not come to their end."""
    run = TransportSimulation(steps, links, outstanding, room)
    if run.go():
        return
    stuck = {p: program.actions[run.at[p]] for p, program in enumerate(programs) if run.at[p] < len(program.actions)}
    named = [f"position {position} at {action}" for position, action in stuck.items()]
    waits = "; ".join(named[:NAMED]) + (f" and {len(named) - NAMED} more" if len(named) > NAMED else "")
    places = {p: sum(isinstance(action, Work) for action in programs[p].actions[:run.at[p]]) for p in stuck}
    raise failure(f"deadlock: {waits}", schedule.rows, places)
