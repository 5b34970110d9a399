"""Events as a run would tell them, of which a test cares about some fields only."""

from __future__ import annotations

import dataclasses
from typing import Any, get_args, get_type_hints

from orchestrator.told.kinds import KINDS, Event, GenerationFormed, UnknownEvent
from orchestrator.told.lines import Told

_BLANK = {str: "", int: 0, float: 0.0, tuple[str, ...]: ()}


def told(name: str, time: float = 0.0, **fields: Any) -> Told:
    """The event of this name in `events.jsonl`; "generation": with `seconds` the one whose state was in memory, else the other.
    What is not said is blank."""
    kind, = (kind for kind in KINDS if kind.name == name and (name != "generation" or (kind is GenerationFormed) == ("seconds" in fields)))
    return Told(time, event_of(kind, **fields))


def event_of(kind: type[Event], **fields: Any) -> Event:
    """One of this kind."""
    hints = get_type_hints(kind)
    blank = {field.name: _blank(hints[field.name]) for field in dataclasses.fields(kind) if field.default is dataclasses.MISSING}
    return kind(**blank | {key: tuple(value) if isinstance(value, list) else value for key, value in fields.items()})


def _blank(declared: Any) -> Any:
    return None if type(None) in get_args(declared) else _BLANK[declared] if declared in _BLANK else {}


EVERY = [event_of(kind) for kind in KINDS if kind is not UnknownEvent] + [UnknownEvent("new", {"step": 1})]
"""One of each kind."""
