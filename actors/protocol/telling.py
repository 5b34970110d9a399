"""What a run tells: events.jsonl, metrics.jsonl, traces, and whoever watches. None of it ever stops a run.

What is watched is told at once, on the conductor's thread; files are the clerk's. For one thread.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

from actors.calls.messages import StepRequest
from actors.files.run_folder import RunFolder
from actors.protocol.book import StepAccount
from actors.protocol.clerk import Clerk
from actors.protocol.tables import Tables
from actors.telemetry.step_metrics import loads_of, step_metrics, timeline
from actors.telemetry.straggler_events import SlowWatch
from actors.telemetry.time_account import ClockedTimeAccount
from actors.telemetry.trace import trace_json
from orchestrator.config.run_config import RunConfig, dump
from orchestrator.layout.expert_load import ExpertLoad
from orchestrator.layout.layout import Layout, Place
from orchestrator.layout.placement import Placement, moves, worst_unevenness
from orchestrator.plan.recipe import learning_rate
from orchestrator.protocol.commands import FormedRef, InReferences, LoadedRef, PlacedRef, PlannedRef, StepLost, ValidatedStep
from orchestrator.schedule.ir.spans import Span
from orchestrator.telemetry import goodput
from orchestrator.told import kinds
from orchestrator.told.kinds import Event
from orchestrator.told.lines import Told

Watch = Callable[[str, Any], None]

_SPENT_ON = {
    "stepping": goodput.STEP, "committing": goodput.STEP, "applying": goodput.STEP, "fetching batch": goodput.DATA,
    "placing": goodput.PLACEMENT, "rearranging": goodput.PLACEMENT, "evaluating": goodput.VALIDATION,
    "snapshotting": goodput.CHECKPOINT, "awaiting save": goodput.CHECKPOINT,
}
"""By phase of the state machine; all others are on the way from one generation to the next."""


class Telling:
    """config: the run's. notes(): of the layout that was planned last. scores(): of the newest validation, and its seconds. post:
    what is handed to it is called on this thread, from any other."""

    def __init__(self, config: RunConfig, tables: Tables, folder: RunFolder, clerk: Clerk, watch: Watch, *,
                 post: Callable[[Callable[[], None]], None], notes: Callable[[], tuple[str, ...]], scores: Callable[[], Mapping[str, float]],
                 utilisation: Callable[[float], float | None]):
        self._config, self._tables, self._folder, self._clerk, self._watch = config, tables, folder, clerk, watch
        self._post, self._notes, self._scores, self._utilisation = post, notes, scores, utilisation
        self._time_account = ClockedTimeAccount()
        self._phase, self._step_since, self._shown_at = "", time.perf_counter(), 0.0
        self._slow: tuple[int, SlowWatch] | None = None
        self._traced: dict[int, tuple[list[Span], tuple[Place, ...]]] = {}
        self._stands = self._configured = False
        self._since: dict[str, list[Any]] | None = None
        self._untrimmed: tuple[int, dict[str, list[Any]]] | None = None  # of the clerk's thread
        self.load = ExpertLoad(max(1, config.placement.every))

    # --- what is asked -------------------------------------------------------------------------------------------

    def traced(self, step: int) -> bool:
        """Whether all spans of a step are kept."""
        return step in self._config.telemetry.trace_steps

    def shows(self, step: int) -> bool:
        """Whether the spans of the first ranks are to be shown."""
        return time.monotonic() - self._shown_at >= self._config.telemetry.timeline_seconds

    # --- what is told --------------------------------------------------------------------------------------------

    def tell(self, what: Event | InReferences) -> None:
        """An event, in the words of its users."""
        if isinstance(what, StepLost):
            self._time_account.step_lost()
            return
        if isinstance(what, FormedRef | LoadedRef):
            self._stands = True
            self._configure()
        told = Told(round(time.time(), 3), self._in_words(what))
        self._clerk.chore("events.jsonl", lambda: self._folder.told(told))
        self._tell("event", told)

    def entered(self, phase: str) -> None:
        """The state machine is in this phase now: what time goes to from here on."""
        if phase != self._phase:
            of_a_step = goodput.STEP, goodput.DATA
            if _SPENT_ON.get(phase) in of_a_step and _SPENT_ON.get(self._phase) not in of_a_step:
                self._step_since = time.perf_counter()
            self._phase = phase
            self._time_account.to(_SPENT_ON.get(phase, goodput.RECOVERY))

    def committed(self, account: StepAccount, requests: list[StepRequest], arrangement: tuple[RunConfig, Layout, Placement]) -> None:
        """A step is durable."""
        step, reports, (_, layout, placement) = account.step, account.reports, arrangement
        self.load = self.load.after(loads_of(reports))
        rate = learning_rate(self._config.optimizer, step, self._config.training.steps)
        now = time.perf_counter()
        values = step_metrics(step, account.batch, dict(account.losses), rate, reports, now - self._step_since, account.generation,
                              len(layout.nodes))
        self._step_since = now
        values["spent"] = self._time_account.step_done(reports)
        values["redone"] = round(self._time_account.take_redone(), 6)
        values["mfu"] = self._utilisation(values["tokens_per_second"])
        self._configure()
        self._clerk.chore("metrics.jsonl", lambda: self._write_metrics(values))
        self._tell("step", values)
        self._watch("load", loads_of(reports))
        if reports[0].spans:
            self._shown_at = time.monotonic()
            self._watch("timeline", timeline(step, reports))
        if self.traced(step):
            self._traced[step] = [span for report in reports for span in report.spans], layout.places
            spans, places = ({traced: found[part] for traced, found in self._traced.items()} for part in (0, 1))
            self._clerk.chore("trace.json", lambda: self._folder.write("trace.json", trace_json(spans, places)))
        self._look_for_slow(account, requests, layout, placement)

    def undone(self, step: int) -> None:
        """Steps from `step` on are void: they stand in the metrics no more. Whoever watches is told then what the journals have."""
        self._since = {"step": [], "event": []}  # what is told before that, and so is not in what will be read
        since = self._since

        def trim() -> None:
            self._untrimmed = step, since
            self._trim()
        self._clerk.chore("metrics.jsonl", trim)

    # --- on a thread of the clerk's ------------------------------------------------------------------------------

    def _write_configuration(self) -> None:
        if not self._configured:
            self._folder.write("config.yaml", dump(self._config))
            self._configured = True

    def _write_metrics(self, values: dict[str, Any]) -> None:
        """Not before what is void is gone from there: else a step would stand in it twice."""
        if self._untrimmed is not None:
            self._trim()
        self._folder.metrics(values)

    def _trim(self) -> None:
        step, since = self._untrimmed
        undone = self._folder.trim_metrics(step)
        found = {"step": self._folder.metric_lines(), "event": self._folder.events()}
        self._untrimmed = None
        self._post(lambda: self._trimmed(undone, found, since))

    # --- inside --------------------------------------------------------------------------------------------------

    def _trimmed(self, undone: list[dict[str, Any]], found: dict[str, list], since: dict[str, list]) -> None:
        self._time_account.redone(undone)
        if self._since is since:
            self._since = None
        self._watch("history", {"steps": found["step"] + since["step"], "events": found["event"] + since["event"]})

    def _tell(self, kind: str, values: Any) -> None:
        if self._since is not None:
            self._since[kind].append(values)
        self._watch(kind, values)

    def _look_for_slow(self, account: StepAccount, requests: list[StepRequest], layout: Layout, placement: Placement) -> None:
        if self._slow is None or self._slow[0] != account.generation:
            self._slow = account.generation, SlowWatch(layout, placement)
        for event in self._slow[1].after(account.step, requests, account.reports):
            self.tell(event)

    def _configure(self) -> None:
        """Not before a generation stands, for a refused run leaves the configuration of the last one; then until it is written."""
        if self._stands and not self._configured:
            self._clerk.chore("config.yaml", self._write_configuration)

    def _in_words(self, what: Event | InReferences) -> Event:
        """With what the machine has references to only."""
        match what:
            case PlannedRef():
                layout = self._tables.layout(what.layout)
                return kinds.LayoutPlanned(layout.describe(), len(layout.nodes), tuple(self._notes()), what.seconds)
            case FormedRef():
                layout = self._tables.layout(what.layout)
                return kinds.GenerationFormed(what.generation, layout.describe(), len(layout.nodes), what.step, what.bytes,
                                              what.grouping_seconds, what.moving_seconds, what.seconds, layout.size)
            case LoadedRef():
                layout = self._tables.layout(what.layout)
                return kinds.GenerationLoaded(what.generation, layout.describe(), len(layout.nodes), what.step, what.recovery_seconds,
                                              layout.size)
            case PlacedRef():
                before, found = self._tables.placement(what.before), self._tables.placement(what.placement)
                return kinds.ExpertsPlaced(what.step, what.generation, len(moves(before, found)), what.bytes, what.seconds,
                                           worst_unevenness(before, self.load.mean), worst_unevenness(found, self.load.mean))
            case ValidatedStep():
                scores = self._scores()
                return kinds.Validated(what.step, scores["loss"], round(scores["seconds"], 3), accuracy=scores["accuracy"])
        return what
