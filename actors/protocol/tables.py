"""Numbers for layouts and placements: the state machine compares them and knows no more of them."""

from __future__ import annotations

from typing import Generic, TypeVar

from orchestrator.config.run_config import RunConfig
from orchestrator.layout.layout import Layout
from orchestrator.layout.placement import Placement
from orchestrator.protocol.events import LayoutRef, PlacementRef

T = TypeVar("T")


class _Table(Generic[T]):
    """Equal values have the same number. There are few of them in a run, and the newest are asked for most."""

    def __init__(self) -> None:
        self._values: list[T] = []

    def number(self, value: T) -> int:
        for index in range(len(self._values) - 1, -1, -1):
            found = self._values[index]
            if found is value or found == value:
                return index
        self._values.append(value)
        return len(self._values) - 1

    def value(self, number: int) -> T:
        return self._values[number]


class Tables:
    """Of one run; for one thread. A layout goes with the configuration that it was made from: stages and schedule are in that."""

    def __init__(self) -> None:
        self._layouts: _Table[tuple[Layout, RunConfig]] = _Table()
        self._placements: _Table[Placement] = _Table()

    def layout_ref(self, config: RunConfig, layout: Layout) -> LayoutRef:
        return self._layouts.number((layout, config))

    def layout(self, ref: LayoutRef) -> Layout:
        return self._layouts.value(ref)[0]

    def config(self, ref: LayoutRef) -> RunConfig:
        return self._layouts.value(ref)[1]

    def placement_ref(self, placement: Placement) -> PlacementRef:
        return self._placements.number(placement)

    def placement(self, ref: PlacementRef) -> Placement:
        return self._placements.value(ref)
