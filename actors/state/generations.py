"""The state that a rank holds between steps, by generation, so that a change of layout which fails leaves it as it was.

A rank that takes its place in a new generation makes the new state beside the old one, of which it shares what stays; the old
one goes with the first step of the new generation, when everybody has arrived there. One thread changes this; any may ask what
there is (`recollect`), and waits for nobody.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass

from torch import Tensor

from actors.calls.messages import Assignment, Recollection
from actors.comm.waiting import OutOfStep
from actors.state.optimizer import OwnedShard
from orchestrator.state.ownership import Bucket


@dataclass(slots=True)
class State:
    """Of one generation. assignment: the place there, without what was before. applied: updates in it; None: it was never
    initialised, restored or carried over, or is being changed."""

    assignment: Assignment
    buckets: tuple[Bucket, ...]
    shards: list[OwnedShard]
    biases: dict[int, Tensor]
    applied: int | None


class Held:
    """States by generation: one, or two while a new generation forms. `current`: the newest.

    reduced: the step whose reduced gradients the rank has, for the newest state. published: whether its working weights are those
    of the newest state.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._states: dict[int, State] = {}
        self.generation: int | None = None
        self._reduced: int | None = None
        self._published = False

    @property
    def current(self) -> State:
        """Raises KeyError: there is none."""
        return self._states[self.generation]

    @property
    def reduced(self) -> int | None:
        return self._reduced

    @property
    def published(self) -> bool:
        return self._published

    def base(self, generation: int | None) -> State | None:
        """The state to go on from; all others are let go of. None: nothing is known of that generation here. Gradients and working
        weights of a newer state are of no use to an older one."""
        with self._lock:
            if generation != self.generation:
                self._reduced, self._published = None, False
            self._states = {known: state for known, state in self._states.items() if known == generation}
            self.generation = generation if self._states else None
            return self._states.get(generation)

    def brought_into(self, assignment: Assignment) -> State | None:
        """The state that goes on in this place; None: none does, whatever there is. All others are let go of.

        Raises OutOfStep: it is not what it is expected to be.
        """
        former = assignment.former
        state = self.base(former.generation if former else None)
        if former is None or former.came_from[assignment.rank] is None:
            return None
        if state is None or state.applied != former.applied:
            raise OutOfStep(f"a state after {former.applied} updates in generation {former.generation} is not here, "
                            f"but {state and state.applied}")
        return state

    def add(self, generation: int, state: State) -> None:
        """Of a generation that forms. Working weights are to be published."""
        with self._lock:
            self._states = self._states | {generation: state}
            self.generation, self._reduced, self._published = generation, None, False

    def settle(self) -> None:
        """The newest generation goes on: earlier states are let go of."""
        if len(self._states) > 1:
            with self._lock:
                self._states = {self.generation: self.current}

    def has_applied(self, applied: int | None) -> None:
        """The newest state is that after so many updates; None: it is being changed."""
        with self._lock:
            self.current.applied = applied

    def has_reduced(self, step: int | None) -> None:
        with self._lock:
            self._reduced = step

    def has_published(self, whole: bool) -> None:
        with self._lock:
            self._published = whole

    def recollect(self) -> Recollection:
        """From any thread."""
        with self._lock:
            return Recollection(tuple((state.assignment, state.applied) for state in self._states.values()), self._reduced,
                                self._published)
