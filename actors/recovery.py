"""A run's way through losses, drains and joins: abort, understand, decide, regroup, move, go on.

Rank processes are never restarted for it: those that live make new process groups and go on from the state that they hold. One
line of `events.jsonl` tells each phase.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

from actors.crew import Abort
from actors.formation import Formation, Regrouped
from actors.messages import Apply
from actors.ranks import POLL_SECONDS, RankFailed
from orchestrator.config import ConfigError, RunConfig
from orchestrator.layout import Layout
from orchestrator.membership import Decision
from orchestrator.placement import Placement
from orchestrator.relayout import Relaid, relaid
from orchestrator.replay import Recorded
from orchestrator.topology import Node
from orchestrator.transfer import StateLost

MOST_REPEATS = 3
"""How often in a row a step may fail without anybody being lost."""


class CannotGoOn(RuntimeError):
    """The run has to end. `str()` is one line."""


class StoppedWaiting(Exception):
    """The run was asked to end while it waited for nodes: there is nobody to save."""


class Recovery:
    """config: the run's, as it was given. tell(kind, **details): an event. stop: set when the run is asked to end."""

    def __init__(self, config: RunConfig, formation: Formation, tell: Callable[..., None], stop: threading.Event):
        self._config, self._formation, self._tell, self._stop = config, formation, tell, stop
        self._repeats = 0

    def went_well(self) -> None:
        """A step has been committed."""
        self._repeats = 0

    def after(self, failed: RankFailed, applied: int, apply: Apply | None) -> bool:
        """Form a generation of those that are left, with the state after `applied` committed steps. apply: the last of them,
        which some ranks may not have completed.

        Returns False where no survivor has that state: then seats are taken, and all of it must be formed and loaded anew.
        Raises RankFailed: the rank's own fault, or nobody is lost and it fails again and again; CannotGoOn.
        """
        started = time.monotonic()
        while True:
            self._let_go(failed, started)
            try:
                return self._go_on(applied, apply, started)
            except RankFailed as again:
                failed = again

    def resume(self, applied: int, apply: Apply | None) -> bool:
        """As `after`, with a base that was adopted: nothing has failed here, but nobody knows what was under way."""
        started = time.monotonic()
        try:
            return self._go_on(applied, apply, started)
        except RankFailed as failed:
            return self.after(failed, applied, apply)

    def repeat(self, recorded: Recorded, applied: int, apply: Apply | None) -> None:
        """Go over to a recorded layout and placement. Raises RankFailed, StateLost, CannotGoOn."""
        self._change(Relaid(recorded.config, recorded.layout), None, applied, apply, time.monotonic(), recorded.placement)

    def at_boundary(self, applied: int, apply: Apply | None) -> bool:
        """Leave nodes that drain, and take in those that have joined, where the layout is better for it: whether anything
        changed. Arguments as of `after`.

        Raises RankFailed: somebody is lost. CannotGoOn.
        """
        crew, base = self._formation.crew, self._formation.base
        decision = crew.look()
        if decision.lost:
            raise crew.check() or RankFailed(0, "lost")
        if not decision.leaving and not decision.joining:
            return False
        if decision.wait:
            if not decision.leaving:
                return False
            decision = self._enough()
        found = self._relaid(decision.nodes, base.layout)
        if not decision.leaving and found.layout == base.layout:
            crew.plan_for(decision.nodes)
            return False
        started, leaving = time.monotonic(), decision.leaving
        if leaving:
            self._tell("draining", members=list(map(str, leaving)), nodes=sorted({member.node for member in leaving}))
        else:
            self._tell("joining", nodes=sorted({node.name for node in decision.nodes} - set(base.layout.nodes)))
        self._change(found, decision.nodes, applied, apply, started)
        crew.dismiss(leaving)
        return True

    # --- phases --------------------------------------------------------------------------------------------------

    def _let_go(self, failed: RankFailed, started: float) -> None:
        """End all that is blocked, and find out who is lost. Raises RankFailed: nobody is, and it is not to be tried again."""
        crew, generation = self._formation.crew, self._formation.generation
        crew.blame(failed)
        abort = crew.abort(generation)
        decision = self._understood(failed)
        if decision.lost:
            self._repeats = 0
            self._tell("lost", members=list(map(str, decision.lost)), generation=generation,
                       reasons=sorted({decision.reasons.get(member, "") for member in decision.lost}))
        else:
            self._repeats += 1
            if self._repeats > MOST_REPEATS:
                raise failed
            self._tell("interrupted", rank=failed.rank, reason=failed.reason, generation=generation)
        self._tell("aborted", **_abort_record(abort), seconds=round(time.monotonic() - started, 4))

    def _understood(self, failed: RankFailed) -> Decision:
        """Who is lost: those who broke a connection are known at once, those who are silent after `elastic.silence_seconds`."""
        crew = self._formation.crew
        if failed.own_fault and not crew.look().lost:
            raise failed
        patience = time.monotonic() + 1.5 * crew.rules.silence_seconds
        while not (decision := crew.look()).lost and time.monotonic() < patience:
            crew.wait(POLL_SECONDS)
        return decision

    def _go_on(self, applied: int, apply: Apply | None, started: float) -> bool:
        formation, decision = self._formation, self._enough()
        base = formation.base
        found = self._relaid(decision.nodes, base.layout if base else None)
        if base is None:
            formation.take_seats(found, decision.nodes)
            return False
        try:
            self._change(found, decision.nodes, applied, apply, started)
        except StateLost as lost:
            self._tell("state_lost", reason=str(lost), step=applied)
            return False
        return True

    def _change(self, found: Relaid, nodes: tuple[Node, ...] | None, applied: int, apply: Apply | None, started: float,
                placement: Placement | None = None) -> None:
        """Raises RankFailed, StateLost, CannotGoOn."""
        formation = self._formation
        formation.seat_survivors()
        standings = formation.finish(apply, applied)
        publish = not all(standing.published for standing in standings)
        formation.take_seats(found, nodes, placement)
        layout = formation.layout
        self._tell("layout", layout=layout.describe(), nodes=len(layout.nodes), notes=list(found.notes),
                   seconds=round(time.monotonic() - started, 4))
        moved: Regrouped = formation.move(applied, publish=publish)
        self._tell("generation", generation=formation.generation, layout=layout.describe(), nodes=len(layout.nodes),
                   step=applied, bytes=moved.bytes, grouping_seconds=round(moved.grouping_seconds, 4),
                   moving_seconds=round(moved.moving_seconds, 4), seconds=round(time.monotonic() - started, 4))

    def _enough(self) -> Decision:
        """Wait for the least number of nodes. Raises CannotGoOn: it took too long; StoppedWaiting."""
        elastic, crew, since, told = self._config.elastic, self._formation.crew, time.monotonic(), False
        while (decision := crew.look()).wait or not decision.nodes:
            if not told:
                self._tell("waiting", reason=decision.wait or "no node can be used")
                told = True
            if self._stop.is_set():
                raise StoppedWaiting
            if elastic.wait_seconds is not None and time.monotonic() - since > elastic.wait_seconds:
                raise CannotGoOn(f"no more nodes within elastic.wait_seconds = {elastic.wait_seconds:g}: {decision.wait}")
            crew.wait(POLL_SECONDS)
        return decision

    def _relaid(self, nodes: tuple[Node, ...], old: Layout | None) -> Relaid:
        try:
            return relaid(self._config, nodes, old)
        except ConfigError as error:
            raise CannotGoOn(f"no layout for the nodes that are left: {error}") from error


def _abort_record(abort: Abort) -> dict[str, Any]:
    return {"ranks": len(abort.seconds), "slowest_rank_seconds": round(max(abort.seconds.values(), default=0.0), 4),
            "unanswered": list(map(str, abort.missing))}
