"""A table of what is done with each kind, on a made-up listener. Those of the program: tests/jobs/test_listeners.py."""

from __future__ import annotations

import dataclasses

import pytest

from orchestrator.told import kinds
from orchestrator.told.consumers import Handlers, IncompleteListener, Listener, Selection
from orchestrator.told.lines import Told
from tests.told_events import EVERY, told

OTHERS = [kind for kind in kinds.KINDS if kind not in (kinds.Replayed, kinds.NodesAwaited)]


class Desk:
    """Notes what it is handed."""

    def __init__(self):
        self.heard = []

    def _replayed(self, event, time):
        self.heard.append(("replayed", event, time))

    def _waits(self, event, time):
        self.heard.append(("waits", event, time))


HANDLERS = Handlers({kinds.Replayed: Desk._replayed, kinds.NodesAwaited: Desk._waits}, leaves=OTHERS)


def test_each_event_goes_to_the_handler_of_its_kind_with_its_time():
    desk = Desk()
    said = told("replayed", 1.5, steps=3), told("waiting", 2.5, reason="few"), told("lost", 3.5), told("replayed", 4.5, steps=9)
    for one in said:
        HANDLERS(desk, one)
    assert desk.heard == [("replayed", kinds.Replayed(3), 1.5), ("waits", kinds.NodesAwaited("few"), 2.5),
                          ("replayed", kinds.Replayed(9), 4.5)]


def test_those_of_a_kind_are_found_in_their_order():
    selection = Selection((kinds.Replayed, kinds.NodesAwaited), leaves=OTHERS)
    events = [told("waiting", 1.0, reason="few"), told("lost", 2.0), told("replayed", 3.0), told("waiting", 4.0, reason="none")]
    assert selection.of(events, kinds.NodesAwaited) == [events[0], events[3]]
    assert selection.of(events, kinds.Replayed, kinds.NodesAwaited) == [events[0], events[2], events[3]]
    assert selection.of([], kinds.Replayed) == [] and selection.of(events) == []
    with pytest.raises(IncompleteListener, match="^not taken: Interrupted, RanksLost$"):
        selection.of(events, kinds.Replayed, kinds.RanksLost, kinds.Interrupted)


@pytest.mark.parametrize("table", [
    lambda takes, leaves: Listener(takes, leaves), lambda takes, leaves: Selection(takes, leaves),
    lambda takes, leaves: Handlers(dict.fromkeys(takes, Desk._replayed), leaves)], ids=["listener", "selection", "handlers"])
def test_every_kind_is_either_taken_or_left(table):
    with pytest.raises(IncompleteListener, match="^neither taken nor left: NodesAwaited, Replayed$"):
        table((kinds.RanksLost,), [kind for kind in OTHERS if kind is not kinds.RanksLost])
    with pytest.raises(IncompleteListener, match="^taken and left: RanksLost$"):
        table((kinds.RanksLost, kinds.Replayed, kinds.NodesAwaited), OTHERS)
    whole = table((kinds.Replayed, kinds.NodesAwaited), OTHERS)
    assert whole.missing(kinds.KINDS) == set() and whole.missing([kinds.Replayed, Told, int]) == {Told, int}


@pytest.mark.parametrize("event", EVERY, ids=lambda event: type(event).__name__)
def test_no_event_can_be_changed_once_it_is_told(event):
    for field in dataclasses.fields(event):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(event, field.name, getattr(event, field.name))
