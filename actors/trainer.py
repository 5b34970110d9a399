"""A run from its parts to its outcome, over any transport of ranks. What happens in between is the state machine's to decide."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist

from actors import checkpoint
from actors.checkpoint import CheckpointError, Manifest
from actors.lifelines import Lifelines
from actors.messages import Outcome, Start
from actors.protocol.batches import Batches, Reader, Sources
from actors.protocol.book import Book
from actors.protocol.clerk import Clerk
from actors.protocol.conductor import Conductor
from actors.protocol.dressing import Dresser
from actors.protocol.planning import RealPlanner
from actors.protocol.shell import Listened, Parts, RealShell
from actors.protocol.tables import Tables
from actors.protocol.telling import Telling, Watch
from actors.ranks import RankCalls
from actors.run_folder import RunFolder
from orchestrator import cost
from orchestrator.config import RunConfig
from orchestrator.layout import Layout, Place
from orchestrator.ledger import Ledger
from orchestrator.membership import Member, Rules
from orchestrator.protocol.commands import EndRun
from orchestrator.protocol.deadlines import Deadlines
from orchestrator.protocol.events import Change, Ending, Goal, Head, Seen, Started
from orchestrator.protocol.run import Run

__all__ = ["Batches", "Sources", "Trainer", "TrainingFailed"]

logger = logging.getLogger(__name__)

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
    ("timeline"), each event ("event"), and what was before where a run goes on or back ("history"); on the thread of `run`, which it
    must not keep.

    `store`: where the ranks meet, served by this process on `host`; None: one of the trainer's own.
    """

    def __init__(self, config: RunConfig, layout: Layout, ranks: RankCalls, folder: RunFolder, sources: Sources,
                 host: str = "127.0.0.1", watch: Watch = lambda kind, values: None, store: dist.TCPStore | None = None,
                 start: Start = Start()):
        self._config, self._first, self._ranks, self._folder, self._start = config, layout, ranks, folder, start
        self._sources, self._host, self._watch, self._store = sources, host, watch, store
        self._tables, self._abouts = Tables(), {}
        rules = Rules.of(config.elastic, one_host=config.topology.virtual_nodes > 0)
        self._planner = RealPlanner(config, self._tables, layout)
        self._run = Run(rules, Deadlines.of(config), self._planner)
        self._conductor = Conductor(self._run, rules.silence_seconds)

    def stop(self) -> None:
        """Ask the run to save and end after the step under way. From any thread."""
        self._conductor.stop()

    def wait_until(self, predicate: Callable[[Run], bool], seconds: float) -> None:
        """As Conductor.wait_until."""
        self._conductor.wait_until(predicate, seconds)

    @property
    def layout(self) -> Layout:
        """Of the moment; from any thread."""
        base = self._run.base
        return self._first if base is None else self._tables.layout(base.layout)

    @property
    def seated(self) -> tuple[Member, ...]:
        """Who serves, by rank; from any thread."""
        return self._run.seated

    def targets(self) -> list[tuple[Place, str]]:
        """host:port of the metrics of every rank that has any, with its place; from any thread."""
        base = self._run.base
        places = zip(self._tables.layout(base.layout).places, base.members, strict=True) if base else ()
        found = ((place, self._abouts.get(member, {}).get("target")) for place, member in places)
        return [(place, target) for place, target in found if target]

    def run(self) -> Outcome:
        """Train to the end, or until stopped. Raises TrainingFailed, StorageError, CheckpointError, DatasetError."""
        found = self._storage()
        held_out = self._sources.validation()
        with Lifelines(self._host, run=self._config.run.name, epoch=found.ledger.epoch + 1,
                       told=lambda: self._conductor.post(Listened())) as lines:
            reader = Reader(self._sources.training, self._conductor.post, self._sources.answers)
            clerk = Clerk(self._folder, self._conductor.post)
            try:
                shell = self._shell(found, held_out, lines, reader, clerk)
                end = self._conduct(found, held_out is not None, shell)
            finally:
                reader.close()
                clerk.close()
        return self._outcome(end, shell)

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
        seen, manifests = [], {}
        for directory in directories:
            try:
                manifests[directory] = checkpoint.read_manifest(directory)
                seen.append(Seen(manifests[directory].step, directory))
            except CheckpointError as error:
                if start.evaluate is not None:
                    raise
                logger.error("%s", error)
                seen.append(Seen(_step_of(directory), directory, readable=False))
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
            Change(found.first_step, tables.layout_ref(found.config, found.layout), tables.placement_ref(found.placement))
            for found in replay.changes)
        return Goal(training.steps if replay is None else min(training.steps, replay.steps), save_every=config.checkpoint.every,
                    validate_every=training.validate_every if validate else 0,
                    place_every=0 if replay else config.placement.every,
                    keep=config.checkpoint.keep, validate=validate, replay=changes, folder=self._folder.checkpoints)

    # --- the run -------------------------------------------------------------------------------------------------

    def _shell(self, found: _Storage, held_out: Any, lines: Lifelines, reader: Reader, clerk: Clerk) -> RealShell:
        config, tables = self._config, self._tables
        telling = Telling(config, tables, self._folder, clerk, self._watch, post=self._conductor.post,
                          notes=lambda: self._planner.notes, scores=lambda: shell.validation, utilisation=self._utilisation)
        dresser = Dresser(config, tables, self._host, self._store, batch=reader.batch, held_out=lambda: held_out, abouts=self._abouts,
                          manifests=found.manifests, traced=telling.traced, shows=telling.shows)
        shell = RealShell(Parts(config, tables, self._ranks, lines, clerk, reader, dresser, Book(config, self._start.replay), telling,
                                found.manifests, self._abouts, held_out, self._conductor.post, found.ledger.epoch + 1), self._run)
        if found.ledger.steps:  # what a coordinator that died could not cut off
            telling.undone(found.committed)
        return shell

    def _conduct(self, found: _Storage, validate: bool, shell: RealShell) -> EndRun:
        members = self._start.members or tuple(Member(place.node, place.local) for place in self._first.places)
        self._ranks.enlist(members)
        self._ranks.listen(self._conductor.post)
        for member in members:
            shell.attach(member)
        head = Head(found.committed, found.ledger.generation, found.ledger.epoch)
        first = Started(head.epoch + 1, members, head, found.checkpoints, self._goal(validate), self._start.left_behind)
        end = self._conductor.conduct(first, shell)
        if end.ending not in _IN_ORDER:
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


def _step_of(directory: str) -> int:
    """By its name."""
    found = re.search(r"step-(\d+)$", directory.rstrip("/"))
    return int(found[1]) if found else 0
