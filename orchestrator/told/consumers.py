"""What those who listen to a run do with each kind of event: a table by class, made when their module is imported. One that neither
takes a kind nor leaves it is refused, so nobody overlooks a new one."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

from orchestrator.told import kinds
from orchestrator.told.kinds import Event
from orchestrator.told.lines import Told

Kind = type[Event]


class IncompleteListener(TypeError):
    """A listener does not say of each kind what it does with it, or looks for one that it said it leaves."""


class Listener:
    """takes: kinds that are of concern; leaves: all others. Raises IncompleteListener: a kind is in neither, or in both."""

    def __init__(self, takes: Collection[Kind], leaves: Collection[Kind]):
        self._said = frozenset(takes), frozenset(leaves)
        if missing := self.missing(kinds.KINDS):
            raise IncompleteListener(f"neither taken nor left: {', '.join(sorted(kind.__name__ for kind in missing))}")
        if both := frozenset.intersection(*self._said):
            raise IncompleteListener(f"taken and left: {', '.join(sorted(kind.__name__ for kind in both))}")

    def missing(self, every: Iterable[Kind]) -> set[Kind]:
        """Of these kinds, those of which nothing is said here."""
        return set(every) - frozenset.union(*self._said)


class Handlers(Listener):
    """handlers: by kind, what is called with (owner, event, time)."""

    def __init__(self, handlers: Mapping[Kind, Callable[[Any, Any, float], None]], leaves: Collection[Kind]):
        super().__init__(handlers, leaves)
        self._handlers = dict(handlers)

    def __call__(self, owner: Any, told: Told) -> None:
        """Have whoever owns this table take an event, if it is of concern."""
        if (handler := self._handlers.get(type(told.event))) is not None:
            handler(owner, told.event, told.time)


class Selection(Listener):
    """For those who look events up."""

    def of(self, told: Iterable[Told], *wanted: Kind) -> list[Told]:
        """Those of these kinds, in order. Raises IncompleteListener: one is not taken here."""
        if unsaid := set(wanted) - self._said[0]:
            raise IncompleteListener(f"not taken: {', '.join(sorted(kind.__name__ for kind in unsaid))}")
        return [one for one in told if isinstance(one.event, wanted)]
