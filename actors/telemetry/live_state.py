"""What there is to see of a run, right now: one JSON object, for the page and for `jobs.status`. Fed by what a trainer's `watch` says."""

from __future__ import annotations

import contextlib
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any

from actors.files.storage import join
from orchestrator.config.run_config import RunConfig
from orchestrator.layout.layout import Layout
from orchestrator.telemetry import goodput
from orchestrator.told import kinds
from orchestrator.told.consumers import Handlers
from orchestrator.told.lines import Told, to_json

_POINTS, _EVENTS, _LOST = 400, 60, 8
_SHOWN = ("step", "time", "loss", "tokens_per_second", "seconds", "overlap_ratio", "bubble_ratio", "exposed_comm_seconds", "gradient_norm",
          "learning_rate", "mfu", "busiest_expert", "generation", "nodes", "tokens")


class LiveStatus:
    """layout: the one of the moment, None before the first. Safe from any thread."""

    def __init__(self, config: RunConfig, layout: Callable[[], Layout | None]):
        self._config, self._layout, self._lock = config, layout, threading.Lock()
        self._points: list[tuple[float, ...]] = []
        self._events: deque[dict[str, Any]] = deque(maxlen=_EVENTS)
        self._newest: dict[str, Any] | None = None
        self._spent = goodput.totals(())
        self._slow: dict[tuple[Any, ...], float] = {}
        self._lost: dict[str, float] = {}
        self._timeline: dict[str, Any] | None = None
        self._validation: dict[str, Any] | None = None
        self._checkpoint: dict[str, Any] | None = None
        self._waiting: str | None = None
        self._since = time.time()

    def recall(self, steps: Iterable[dict[str, Any]], events: Iterable[Told]) -> None:
        """What was before, of a run that goes on, in place of what is here."""
        with self._lock:
            self._points, self._spent, self._lost, self._slow = [], goodput.totals(()), {}, {}
            self._events.clear()
            self._since = time.time()
        for told in events:
            self.observe("event", told)
        for values in steps:
            with contextlib.suppress(KeyError, TypeError, ValueError, AttributeError):  # a line that is none of this program's
                self.observe("step", values)

    def observe(self, kind: str, values: Any) -> None:
        with self._lock:
            if kind == "step":
                self._step(values)
            elif kind == "event":
                self._events.append(to_json(values))
                self._HANDLERS(self, values)
            elif kind == "timeline":
                self._timeline = values

    def state(self) -> dict[str, Any]:
        """Everything, as JSON takes it. `goodput`: None before the first step. `since`: when this coordinator took the run up."""
        layout, now = self._layout(), time.time()
        with self._lock:
            return {
                "run": self._config.run.name, "folder": join(self._config.run.directory, self._config.run.name),
                "now": round(now, 3), "steps": self._config.training.steps, "newest": self._newest,
                "layout": layout.describe() if layout else None, "grid": _grid(layout, self._slow_ranks()) if layout else [],
                "lost": [{"node": node, "seconds_ago": round(now - when, 1)} for node, when in self._lost.items()],
                "goodput": goodput.goodput(self._spent), "spent": {kind: round(s, 3) for kind, s in self._spent.items()},
                "waiting": self._waiting, "validation": self._validation, "checkpoint": self._checkpoint,
                "points": list(self._points), "events": list(self._events),
                "timeline_step": self._timeline["step"] if self._timeline else None, "since": round(self._since, 3)}

    def timeline(self) -> dict[str, Any] | None:
        """Lanes of the first ranks in the newest step of which they are kept."""
        with self._lock:
            return self._timeline

    def _step(self, values: dict[str, Any]) -> None:
        self._newest, self._waiting = {key: values[key] for key in _SHOWN if key in values}, None
        self._spent = goodput.totals((self._spent, values.get("spent", {})))
        self._points.append((values["step"], values["time"], values["loss"], round(values["tokens_per_second"], 1)))
        if len(self._points) == 2 * _POINTS:  # older ones at half the density: the whole run stays in sight, the newest among it
            self._points = [*self._points[:-1:2], self._points[-1]]

    def _slow_ranks(self) -> dict[int, float]:
        """The worst factor of each rank that is slow in something."""
        found: dict[int, float] = {}
        for (rank, *_), factor in self._slow.items():
            found[rank] = max(factor, found.get(rank, 0.0))
        return found

    # --- events ------------------------------------------------------------------------------------------------------

    def _generation(self, event: kinds.GenerationFormed | kinds.GenerationLoaded, time: float) -> None:
        self._slow, self._waiting = {}, None
        seated = {place.node for place in found.places} if (found := self._layout()) else set()
        self._lost = {node: when for node, when in self._lost.items() if node not in seated}

    def _placed(self, event: kinds.ExpertsPlaced, time: float) -> None:
        self._slow = {}

    def _ranks_lost(self, event: kinds.RanksLost, time: float) -> None:
        self._lost |= {member.rpartition("/")[0]: time for member in event.members}
        self._lost = dict(list(self._lost.items())[-_LOST:])  # nodes that never come back are many, on hosts that are lent

    def _is_slow(self, event: kinds.Slow, time: float) -> None:
        self._slow[event.rank, event.peer, event.lane] = event.factor

    def _slow_over(self, event: kinds.SlowOver, time: float) -> None:
        self._slow.pop((event.rank, event.peer, event.lane), None)

    def _waits(self, event: kinds.NodesAwaited, time: float) -> None:
        self._waiting = event.reason

    def _validated(self, event: kinds.Validated, time: float) -> None:
        self._validation = to_json(Told(time, event))

    def _saved(self, event: kinds.CheckpointWritten, time: float) -> None:
        self._checkpoint = to_json(Told(time, event))

    _HANDLERS = Handlers({
        kinds.GenerationFormed: _generation, kinds.GenerationLoaded: _generation, kinds.ExpertsPlaced: _placed,
        kinds.RanksLost: _ranks_lost, kinds.Slow: _is_slow, kinds.SlowOver: _slow_over, kinds.NodesAwaited: _waits,
        kinds.Validated: _validated, kinds.CheckpointWritten: _saved,
    }, leaves=(
        kinds.LayoutPlanned, kinds.Resumed, kinds.StartedOver, kinds.Interrupted, kinds.RanksAborted, kinds.CommittedStateLost,
        kinds.CoordinatorRestarted, kinds.NodesJoining, kinds.NodesDraining, kinds.NodeIdle, kinds.NodeBarred, kinds.CheckpointFailed,
        kinds.CheckpointUnreadable, kinds.CheckpointNotDeleted, kinds.StorageAway, kinds.DataAway, kinds.ControlStoreAway,
        kinds.ControlStoreBack, kinds.NotFinite, kinds.Replayed, kinds.UnknownEvent))


def _grid(layout: Layout, slow: dict[int, float]) -> list[dict[str, Any]]:
    """Nodes in order, each with its ranks: what they host, and how much slower than its like one is, if it is."""
    found: dict[str, list[dict[str, Any]]] = {node: [] for node in layout.nodes}
    for place in sorted(layout.places, key=lambda place: place.local):
        found[place.node].append({"rank": place.rank, "position": place.position, "row": place.row, "width": place.width,
                                  "stages": list(layout.stages(place.position)), "slow": slow.get(place.rank)})
    return [{"node": node, "ranks": ranks} for node, ranks in found.items()]
