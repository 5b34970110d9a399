"""A run from its parts to its outcome, over any transport of ranks. What happens in between is the state machine's to decide."""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist

from actors.calls.messages import Outcome, Start
from actors.calls.rank_calls import RankCalls
from actors.data.dataset import DatasetError
from actors.files.run_folder import RunFolder
from actors.files.storage import Damaged, StorageError
from actors.protocol.batches import Batches, Reader, Sources
from actors.protocol.book import Book
from actors.protocol.clerk import Clerk
from actors.protocol.conductor import Conductor
from actors.protocol.dressing import Dresser
from actors.protocol.heartbeat_server import HeartbeatServer
from actors.protocol.planning import RealPlanner
from actors.protocol.shell import Listened, RealShell, ShellParts
from actors.protocol.tables import Tables
from actors.protocol.telling import Telling, Watch
from actors.state import checkpoint
from actors.state.checkpoint import CheckpointError, Manifest
from orchestrator.config.run_config import RunConfig
from orchestrator.data.ledger import Ledger
from orchestrator.layout.layout import Layout, Place
from orchestrator.plan import cost
from orchestrator.protocol.commands import EndRun
from orchestrator.protocol.deadlines import Deadlines
from orchestrator.protocol.events import Ending, Goal, Head, ReplayedChange, Seen, Started
from orchestrator.protocol.members import Member, MembershipRules
from orchestrator.protocol.run import Run
from orchestrator.told.kinds import CheckpointUnreadable, Event, StorageAway
from orchestrator.told.lines import Told, details

__all__ = ["Batches", "Sources", "Trainer", "TrainingFailed"]

logger = logging.getLogger(__name__)

_FIRST_PAUSE_SECONDS, _LAST_PAUSE_SECONDS = 0.1, 3.0
_IN_ORDER = (Ending.DONE, Ending.STOPPED, Ending.WAITED)


class TrainingFailed(RuntimeError):
    """The run cannot go on. `str()` is one line. ending: why."""

    def __init__(self, text: str, ending: Ending = Ending.OWN_FAULT):
        super().__init__(text)
        self.ending = ending


@dataclass(frozen=True)
class _Storage:
    """What a run finds of itself when it begins. committed: steps, by the ledger; by a checkpoint only where that came without one,
    for there may be checkpoints of steps that are void."""

    ledger: Ledger
    checkpoints: tuple[Seen, ...]
    manifests: dict[str, Manifest]

    @property
    def committed(self) -> int:
        if self.ledger.steps:
            return self.ledger.committed
        return max((seen.step for seen in self.checkpoints if seen.readable), default=0)


class Trainer:
    """`watch(kind, values)` is told each step's metrics ("step"), its loads of experts by layer ("load"), the spans of some steps
    ("timeline"), each event ("event": a Told), and what was before where a run goes on or back ("history"); on the thread of `run`, which it
    must not keep.

    `store`: where the ranks meet, served by this process on `host`; None: one of the trainer's own.
    """

    def __init__(self, config: RunConfig, layout: Layout, ranks: RankCalls, folder: RunFolder, sources: Sources,
                 host: str = "127.0.0.1", watch: Watch = lambda kind, values: None, store: dist.TCPStore | None = None,
                 start: Start = Start()):
        self._config, self._first, self._ranks, self._folder, self._start = config, layout, ranks, folder, start
        self._sources, self._host, self._watch, self._store = sources, host, watch, store
        self._tables, self._abouts = Tables(), {}
        rules = MembershipRules.of(config.elastic, one_host=config.topology.virtual_nodes > 0)
        first = layout if layout.meets(config.layout, config.stages) else None  # else it is found, and noted, as any later one is
        self._planner = RealPlanner(config, self._tables, first)
        self._run = Run(rules, Deadlines.of(config), self._planner)
        self._conductor = Conductor(self._run, rules.silence_seconds)
        self._telling: Telling | None = None
        self._clerk: Clerk | None = None

    def stop(self) -> None:
        """Ask the run to save and end after the step under way. From any thread."""
        self._conductor.stop()

    def wait_until(self, predicate: Callable[[Run], bool], seconds: float) -> None:
        """As Conductor.wait_until."""
        self._conductor.wait_until(predicate, seconds)

    def chore(self, what: str, job: Callable[[], None]) -> None:
        """Files that whoever watches writes of what it is told, as Clerk.chore: they never hold the run up."""
        self._clerk.chore(what, job)

    def tell(self, event: Event) -> None:
        """An event that the state machine has no part in. From any thread; before and after the run nobody hears of it."""
        if (telling := self._telling) is not None:
            self._conductor.post(lambda: telling.tell(event))

    @property
    def layout(self) -> Layout:
        """Of the moment; from any thread."""
        base = self._run.base
        return self._first if base is None else self._tables.layout(base.layout)

    @property
    def seated(self) -> tuple[Member, ...]:
        """Who serves, by rank; from any thread."""
        return self._run.seated

    @property
    def protocol_seconds(self) -> float:
        """That the state machine has taken so far; from any thread."""
        return self._conductor.seconds

    def targets(self) -> list[tuple[Place, str]]:
        """host:port of the metrics of every rank that has any, with its place; from any thread."""
        base = self._run.base
        places = zip(self._tables.layout(base.layout).places, base.members, strict=True) if base else ()
        found = ((place, self._abouts.get(member, {}).get("target")) for place, member in places)
        return [(place, target) for place, target in found if target]

    def run(self) -> Outcome:
        """Train to the end, or until stopped. Raises TrainingFailed, StorageError, CheckpointError, DatasetError."""
        self._clerk = clerk = Clerk(self._folder, self._conductor.post)
        clerk.chore("what writers that were killed have left", self._folder.clear_partial)
        try:
            found = self._patiently(self._storage)
            held_out = self._patiently(self._sources.validation)
            with HeartbeatServer(self._host, run=self._config.run.name, epoch=found.ledger.epoch + 1,
                                 told=lambda: self._conductor.post(Listened())) as lines:
                reader = Reader(self._sources.training, self._conductor.post, self._sources.answers)
                try:
                    shell = self._shell(found, held_out, lines, reader, clerk)
                    end = self._conduct(found, held_out is not None, shell)
                finally:
                    reader.close()
        finally:
            clerk.close()
        return self._outcome(end, shell)

    def _patiently(self, read: Callable[[], Any]) -> Any:
        """Before the machine can wait for storage itself. Only where ranks were left behind, for they would end with this: a run that
        begins is better refused at once."""
        until, pause = time.monotonic() + self._config.elastic.storage_seconds, _FIRST_PAUSE_SECONDS
        while True:
            try:
                return read()
            except (StorageError, DatasetError) as error:
                if not self._start.left_behind or not _is_away(error) or time.monotonic() > until:
                    raise
                if pause == _FIRST_PAUSE_SECONDS:
                    self._early(StorageAway(str(error)))
            time.sleep(pause)
            pause = min(_LAST_PAUSE_SECONDS, 2 * pause)

    def _early(self, event: Event) -> None:
        """An event of before there is a shell."""
        told = Told(round(time.time(), 3), event)
        logger.warning("%s: %s", told.name, details(event))
        self._clerk.chore("events.jsonl", lambda: self._folder.told(told))
        self._watch("event", told)

    # --- what there is -------------------------------------------------------------------------------------------

    def _storage(self) -> _Storage:
        """Raises StorageError: the ledger cannot be read; CheckpointError: the newest checkpoint is of another model."""
        start, folder = self._start, self._folder
        ledger = folder.ledger()
        if start.evaluate is not None:
            directories = [start.evaluate]
        else:
            if not start.left_behind:
                checkpoint.clear_unfinished(folder.checkpoints)
            directories = checkpoint.complete(folder.checkpoints)
        seen, manifests, unreadable = [], {}, []
        for directory in directories:
            try:
                manifests[directory] = checkpoint.read_manifest(directory)
                seen.append(Seen(manifests[directory].step, directory))
            except CheckpointError as error:
                if start.evaluate is not None:
                    raise
                if isinstance(away := error.__cause__, StorageError) and _is_away(away):
                    raise away from None  # an older one is not taken for that
                seen.append(Seen(_step_of(directory), directory, readable=False))
                unreadable.append(CheckpointUnreadable(seen[-1].step, directory, str(error)))
        for one in unreadable:  # once, though all this is read again where something is away
            self._early(one)
        if manifests:
            newest = max(manifests, key=lambda directory: manifests[directory].step)
            checkpoint.check_model(manifests[newest], self._config.model, newest)
        return _Storage(ledger, tuple(seen), manifests)

    def _goal(self, validate: bool) -> Goal:
        config, start, tables = self._config, self._start, self._tables
        if start.evaluate is not None:
            return Goal(0, validate=validate, evaluate=start.evaluate, folder=self._folder.checkpoints)
        training, replay = config.training, start.replay
        changes = () if replay is None else tuple(
            ReplayedChange(found.first_step, tables.layout_ref(found.config, found.layout), tables.placement_ref(found.placement))
            for found in replay.changes)
        return Goal(training.steps if replay is None else min(training.steps, replay.steps), save_every=config.checkpoint.every,
                    validate_every=training.validate_every if validate else 0,
                    place_every=0 if replay else config.placement.every,
                    keep=config.checkpoint.keep, validate=validate, replay=changes, folder=self._folder.checkpoints)

    # --- the run -------------------------------------------------------------------------------------------------

    def _shell(self, found: _Storage, held_out: Any, lines: HeartbeatServer, reader: Reader, clerk: Clerk) -> RealShell:
        config, tables = self._config, self._tables
        telling = Telling(config, tables, self._folder, clerk, self._watch, post=self._conductor.post,
                          notes=lambda: self._planner.notes, scores=lambda: shell.validation, utilisation=self._utilisation)
        dresser = Dresser(config, tables, self._host, self._store, batch=reader.batch, held_out=lambda: held_out, abouts=self._abouts,
                          manifests=found.manifests, traced=telling.traced, shows=telling.shows)
        shell = RealShell(ShellParts(config, tables, self._ranks, lines, clerk, reader, dresser, Book(config, self._start.replay),
                                     telling, found.manifests, self._abouts, held_out, self._conductor.post,
                                     found.ledger.epoch + 1), self._run)
        if found.ledger.newest:  # what a coordinator that died could not cut off
            telling.undone(found.committed)
        self._telling = telling
        return shell

    def _conduct(self, found: _Storage, validate: bool, shell: RealShell) -> EndRun:
        members = self._start.members or tuple(Member(place.node, place.local) for place in self._first.places)
        self._ranks.enlist(members)
        self._ranks.listen(self._conductor.post)
        for member in members:
            shell.attach(member)
        head = Head(found.committed, found.ledger.generation, found.ledger.epoch, found.ledger.furthest)
        first = Started(head.epoch + 1, members, head, found.checkpoints, self._goal(validate), self._start.left_behind)
        end = self._conductor.conduct(first, shell)
        if end.ending not in (*_IN_ORDER, Ending.SUPERSEDED):  # then they are another coordinator's
            self._ranks.abort()
        return end

    def _outcome(self, end: EndRun, shell: RealShell) -> Outcome:
        """Raises TrainingFailed."""
        if end.ending not in _IN_ORDER:
            raise TrainingFailed(end.text or end.ending.value, end.ending)
        interrupted = end.ending is not Ending.DONE
        loss = None if interrupted or shell.scores is None else shell.scores["loss"]
        return Outcome(end.step, interrupted, loss, shell.scores, end.saved)

    def _utilisation(self, tokens_per_second: float) -> float | None:
        """Of all ranks' accelerators; None where it is not known what one of them can do."""
        config, given = self._config, self._config.telemetry.peak_teraflops
        peaks = [cost.peak_flops(self._abouts.get(member, {}).get("device")) if given == "auto" else given * 1e12
                 for member in self._run.seated]
        return cost.utilisation(config.model, config.data.sequence_length, tokens_per_second, peaks)


def _is_away(error: Exception) -> bool:
    """Whether another try may do: it was not read, and not read to be damaged."""
    return isinstance(error, StorageError) and not isinstance(error, Damaged) or isinstance(error.__cause__, StorageError)


def _step_of(directory: str) -> int:
    """By its name."""
    found = re.search(r"step-(\d+)$", directory.rstrip("/"))
    return int(found[1]) if found else 0
