"""Carries the state machine's commands out: each to whom it concerns, and what comes of it back as an event. For one thread."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from actors.calls.messages import LossSums
from actors.calls.rank_calls import Arrived, RankCalls
from actors.data.batching import Batch
from actors.protocol.batches import Reader
from actors.protocol.book import Book, StepAccount
from actors.protocol.clerk import Clerk
from actors.protocol.dressing import OF_NONE, Dresser, Reading
from actors.protocol.heartbeat_server import HeartbeatServer
from actors.protocol.tables import Tables
from actors.protocol.telling import Telling
from actors.state.checkpoint import Manifest
from actors.telemetry.step_metrics import losses_of, scores_of
from orchestrator.config.run_config import RunConfig
from orchestrator.layout.placement import Placement, balanced_placement, moves
from orchestrator.protocol import commands
from orchestrator.protocol.commands import Call, Command, CutLine, EpochLine, Line, OriginLine, StepLine, lane_of
from orchestrator.protocol.events import Answered, CallId, Ended, Event, Failed, Heard, Hello, LineRefused, PlacementFound, Stored
from orchestrator.protocol.members import Member
from orchestrator.protocol.run import Run

logger = logging.getLogger(__name__)


class Listened:
    """Posted when heartbeat connections have something to say."""


@dataclass(frozen=True, slots=True)
class PlacementSearched:
    """Posted when a placement was looked for. placement: None: experts stay."""

    step: int
    placement: Placement | None


@dataclass(frozen=True)
class ShellParts:
    """What the shell is put together from."""

    config: RunConfig
    tables: Tables
    ranks: RankCalls
    lines: HeartbeatServer
    clerk: Clerk
    reader: Reader
    dresser: Dresser
    book: Book
    telling: Telling
    manifests: dict[str, Manifest]
    abouts: dict[Member, dict[str, Any]]
    held_out: Batch | None
    post: Callable[[object], None]
    epoch: int


class RealShell:
    """A conductor.Shell. `scores`: of the newest validation."""

    def __init__(self, parts: ShellParts, run: Run):
        self._parts, self._run = parts, run
        self._reading = Reading(parts.tables)
        self._open: dict[CallId, Call] = {}
        self._accounts: dict[int, StepAccount] = {}
        self._cuts: dict[int, int] = {}
        self._pieces: dict[CallId, Iterable[Any]] = {}
        self._sums: dict[int, LossSums] = {}
        self._validating: tuple[tuple[int, int] | None, float] = None, 0.0
        self._prepared = 0
        self.scores: dict[str, float] | None = None
        self._carriers: dict[type, Callable[[Any], None]] = {
            commands.Call: self._call, commands.Append: self._append, commands.WriteManifest: self._write_manifest,
            commands.Abort: lambda command: parts.lines.abort(command.members, command.generation),
            commands.Fence: self._fence, commands.Spawn: self._spawn,
            commands.Discard: self._discard, commands.NeedBatch: lambda command: parts.reader.need(command.step),
            commands.FindPlacement: self._find_placement, commands.Tell: self._tell, commands.EndRun: lambda command: None}

    # --- a conductor's shell -------------------------------------------------------------------------------------

    def seen(self, item: Any) -> Iterable[Event]:
        match item:
            case Arrived(call, member, value):
                return self._arrived(call, member, value)
            case Failed(call):
                self._open.pop(call, None)
                return (item,)
            case Listened():
                return self._listened()
            case PlacementSearched(step, placement):
                return (PlacementFound(step, None if placement is None else self._parts.tables.placement_ref(placement)),)
        return (item,)

    def heard(self) -> Heard:
        return Heard(self._parts.lines.beats())

    def returned(self, seconds: float) -> Event | None:
        return self._parts.clerk.superseded(seconds)

    def before(self, event: Event) -> None:
        if isinstance(event, Stored):
            self._stored(event.order)

    def carry_out(self, command: Command) -> None:
        self._carriers[type(command)](command)

    def after(self, run: Run) -> None:
        self._parts.telling.entered(run.phase.name)

    # --- members -------------------------------------------------------------------------------------------------

    def attach(self, member: Member) -> None:
        """Have a process keep a heartbeat connection to this coordinator."""
        parts = self._parts
        parts.ranks.attach(member, parts.lines.address, parts.config.elastic.beat_seconds, parts.config.run.name, parts.epoch)

    def _spawn(self, command: commands.Spawn) -> None:
        self._parts.ranks.spawn(command.member)
        self.attach(command.member)

    def _fence(self, command: commands.Fence) -> None:
        logger.info("%s is ended: %s", command.member, command.reason)
        self._parts.ranks.dismiss(command.member)
        self._open = {number: call for number, call in self._open.items() if call.member != command.member}

    def _listened(self) -> Iterable[Event]:
        lines, found = self._parts.lines, []
        for member, about in lines.hello():
            self._parts.abouts[member] = about
            found.append(Hello(member))
        found += [Ended(member, str(how)) for member, _, how in lines.ended()]
        return found + list(lines.let_go())

    # --- calls ---------------------------------------------------------------------------------------------------

    def _call(self, call: Call) -> None:
        match call.request:
            case commands.Snapshot():
                self._pieces.clear()
            case commands.Evaluate(step) if self._validating[0] != (call.generation, step):
                self._validating = (call.generation, step), time.perf_counter()
                self._sums.clear()
        self._open[call.call] = call
        dressed = self._parts.dresser.dressed(call)
        generation = 0 if isinstance(call.request, OF_NONE) else call.generation
        self._parts.ranks.send(call.call, call.member, generation, dressed.method, dressed.arguments, lane_of(call.request))

    def _arrived(self, number: CallId, member: Member, value: Any) -> Iterable[Event]:
        call = self._open.pop(number, None)
        if call is None:
            return ()
        rank = self._parts.dresser.rank(call.generation, member)  # None: of a generation that is long gone
        match call.request:
            case commands.Step() if rank is not None:
                self._parts.book.reported(call.generation, rank, value)
            case commands.Evaluate(step) if rank is not None and self._validating[0] == (call.generation, step):
                self._sums[rank] = value
            case commands.Collect():
                self._pieces[number] = value
        return (Answered(number, member, self._reading.answer(call, value)),)

    # --- what is written -----------------------------------------------------------------------------------------

    def _append(self, command: commands.Append) -> None:
        if isinstance(command.line, StepLine):
            self._append_step(command.order, command.line)
            return
        if isinstance(command.line, CutLine):
            self._cuts[command.order] = command.line.step
        self._parts.clerk.append(command.order, _values(command.line))

    def _append_step(self, order: int, line: StepLine) -> None:
        parts = self._parts
        account = parts.book.account(line.generation, line.step, parts.reader.batch(line.step))
        refusal = parts.book.refusal(account)
        if refusal is not None:
            if refusal.event is not None:
                parts.telling.tell(refusal.event)
            parts.post(LineRefused(order, refusal.ending, refusal.text))
            return
        self._accounts[order] = account
        parts.clerk.append(order, parts.book.line(account, parts.dresser.arrangement(line.generation)))

    def _stored(self, order: int) -> None:
        parts = self._parts
        if (step := self._cuts.pop(order, None)) is not None:
            parts.telling.undone(step)
        account = self._accounts.pop(order, None)
        if account is None:
            return
        self._accounts.clear()
        dresser, generation, step = parts.dresser, account.generation, account.step
        parts.book.committed(account)
        parts.telling.committed(account, dresser.requests(generation, step, training=True), dresser.arrangement(generation))
        parts.reader.forget(step + 1)
        if self._prepared != generation:
            self._prepared = generation
            dresser.prepare(generation, step + 1)

    def _write_manifest(self, command: commands.WriteManifest) -> None:
        config = self._parts.config
        pieces = tuple(piece for call in sorted(command.collected, key=lambda call: call.number) for piece in self._pieces[call])
        self._pieces.clear()
        manifest = Manifest(command.step, config.model.model_dump(mode="json"), config.training.dtype, pieces)
        self._parts.manifests[command.directory] = manifest
        self._parts.clerk.manifest(command.order, command.directory, manifest)

    def _discard(self, command: commands.Discard) -> None:
        self._parts.manifests.pop(command.directory, None)
        self._parts.clerk.discard(command.order, command.directory)

    # --- what is looked for, and told ----------------------------------------------------------------------------

    def _find_placement(self, command: commands.FindPlacement) -> None:
        """Beside the loop: for many experts it takes its time."""
        parts, base = self._parts, self._run.base
        config, layout, before = parts.config, parts.tables.layout(base.layout), parts.tables.placement(base.placement)
        load = parts.telling.load.mean

        def find() -> None:
            found = balanced_placement(config.model, layout, before, load, least_gain=config.placement.least_gain,
                                       parts=config.layout.group_parts)
            parts.post(PlacementSearched(command.step, found if moves(before, found) else None))
        threading.Thread(target=find, name="placement", daemon=True).start()

    def _tell(self, command: commands.Tell) -> None:
        if isinstance(command.event, commands.ValidatedStep):
            batch, config = self._parts.held_out, self._parts.config
            sums = sum((self._sums[rank] for rank in sorted(self._sums)), LossSums())
            self.scores = losses_of(sums, batch, config) | scores_of(sums, batch, config)
        self._parts.telling.tell(command.event)

    @property
    def validation(self) -> Mapping[str, float]:
        """Scores, and the seconds that the newest one took."""
        return {**(self.scores or {}), "seconds": time.perf_counter() - self._validating[1]}


def _values(line: Line) -> dict[str, Any]:
    match line:
        case EpochLine(epoch):
            return {"kind": "epoch", "epoch": epoch}
        case OriginLine(generation, step, source):
            return {"kind": "origin", "generation": generation, "step": step, "source": source}
        case CutLine(step, reason):
            return {"kind": "cut", "step": step, "reason": reason}
    raise ValueError(line)
