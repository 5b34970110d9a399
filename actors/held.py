"""The state that a rank holds between steps, by generation, so that a change of layout which fails leaves it as it was.

A rank that takes its place in a new generation makes the new state beside the old one, of which it shares what stays; the old
one goes with the first step of the new generation, when everybody has arrived there.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from actors.messages import Assignment
from actors.optimizer import OwnedShard
from orchestrator.ownership import Bucket


@dataclass(slots=True)
class State:
    """Of one generation. assignment: the place there, without what was before. applied: updates in it."""

    assignment: Assignment
    buckets: tuple[Bucket, ...]
    shards: list[OwnedShard]
    biases: dict[int, Tensor]
    applied: int


class Held:
    """States by generation: one, or two while a new generation forms. `current`: the newest."""

    def __init__(self) -> None:
        self._states: dict[int, State] = {}
        self.generation: int | None = None

    @property
    def current(self) -> State:
        """Raises KeyError: there is none."""
        return self._states[self.generation]

    @property
    def assignments(self) -> dict[int, Assignment]:
        """By generation, newest last."""
        return {generation: state.assignment for generation, state in self._states.items()}

    def base(self, generation: int | None) -> State | None:
        """The state to go on from; all others are let go of. None: nothing is known of that generation here."""
        self._states = {known: state for known, state in self._states.items() if known == generation}
        self.generation = generation if self._states else None
        return self._states.get(generation)

    def add(self, generation: int, state: State) -> None:
        """Of a generation that forms."""
        self._states[generation] = state
        self.generation = generation

    def settle(self) -> None:
        """The newest generation goes on: earlier states are let go of."""
        if len(self._states) > 1:
            self._states = {self.generation: self.current}
