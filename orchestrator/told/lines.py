"""Events with their time, as JSON objects: lines of `events.jsonl`, the live page, what a driver is sent.

Whoever reads may have the file of another version, or a damaged one: what has no class, or lacks a field of it, is an UnknownEvent with
all that stands there; fields that a class does not have are passed over; what is no event at all is refused.
"""

from __future__ import annotations

import types
import typing
from collections.abc import Callable, Iterable, Mapping
from dataclasses import MISSING, dataclass, fields
from typing import Any

from orchestrator.told import kinds
from orchestrator.told.kinds import Event, UnknownEvent

_TIME, _NAME = "time", "event"


@dataclass(frozen=True, slots=True)
class Told:
    """An event, and when it was told, in seconds since the epoch."""

    time: float
    event: Event

    @property
    def name(self) -> str:
        """The word in the line."""
        return self.event.called if isinstance(self.event, UnknownEvent) else self.event.name


def details(event: Event) -> dict[str, Any]:
    """The fields of an event's line, without time and name; in order."""
    if isinstance(event, UnknownEvent):
        return dict(event.written)
    found = {}
    for field in fields(event):
        value = getattr(event, field.name)
        if value is not None or field.default is MISSING:
            found[field.name] = list(value) if isinstance(value, tuple) else value
    return found


def to_json(told: Told) -> dict[str, Any]:
    """The object of an event's line: time, name, fields."""
    return {_TIME: told.time, _NAME: told.name, **details(told.event)}


def from_json(line: Mapping[str, Any]) -> Told:
    """What `to_json` made, in this version or another one. Raises ValueError: it is no event: it has no name, or no time."""
    time, name = line.get(_TIME), line.get(_NAME)
    if not _is_number(time) or not isinstance(name, str):
        raise ValueError(f"no event, for want of a time or a name: {str(line)[:100]}")
    written = {key: value for key, value in line.items() if key not in (_TIME, _NAME)}
    kind = _kind_of(name, written)
    return Told(time, UnknownEvent(name, written) if kind is None else _made(kind, written) or UnknownEvent(name, written))


def read(lines: Iterable[Mapping[str, Any]]) -> list[Told]:
    """All that are events; the others are passed over, for nothing depends on one of them."""
    found = []
    for line in lines:
        try:
            found.append(from_json(line))
        except ValueError:
            continue
    return found


# --- fields of classes ---------------------------------------------------------------------------------------------------


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


_HOLDS: dict[Any, Callable[[Any], bool]] = {
    str: lambda value: isinstance(value, str),
    int: lambda value: type(value) is int,
    float: _is_number,
    types.NoneType: lambda value: value is None,
    tuple[str, ...]: lambda value: isinstance(value, list) and all(isinstance(entry, str) for entry in value),
}
"""By what a field is declared as: whether a value of JSON is one."""


def _holds(declared: Any) -> Callable[[Any], bool]:
    """Raises KeyError: no field may be declared so."""
    if isinstance(declared, types.UnionType):
        several = [_HOLDS[one] for one in typing.get_args(declared)]
        return lambda value: any(holds(value) for holds in several)
    return _HOLDS[declared]


_FIELDS = {kind: {name: _holds(declared) for name, declared in typing.get_type_hints(kind).items() if name != "name"}
           for kind in kinds.KINDS if kind is not UnknownEvent}
_OPTIONAL = {kind: {field.name for field in fields(kind) if field.default is not MISSING} for kind in _FIELDS}
_NAMED = {kind.name: kind for kind in _FIELDS}


def _kind_of(name: str, written: Mapping[str, Any]) -> type[Event] | None:
    """The class that a name stands for; of the two that share one, by their fields."""
    if name == kinds.GenerationFormed.name:
        return kinds.GenerationFormed if "seconds" in written else kinds.GenerationLoaded
    return _NAMED.get(name)


def _made(kind: type[Event], written: Mapping[str, Any]) -> Event | None:
    """None: a field is missing, or is not what it should be."""
    found = {}
    for field, holds in _FIELDS[kind].items():
        if field not in written:
            if field in _OPTIONAL[kind]:
                continue
            return None
        if not holds(value := written[field]):
            return None
        found[field] = tuple(value) if isinstance(value, list) else value
    return kind(**found)
