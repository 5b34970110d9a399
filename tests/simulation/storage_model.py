"""The run folder: a ledger that only one coordinator at a time can add to, and checkpoints in pieces.

Writes take time and may fail for a while. A write that is under way when its author dies may or may not take place. What was
ordered is checked against the truth elsewhere (invariants.py); this only keeps it."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from typing import TYPE_CHECKING

from orchestrator.protocol.commands import Append, CutLine, Discard, EpochLine, Line, OriginLine, StepLine, WriteManifest
from orchestrator.protocol.events import Ending, Event, Head, LineRefused, Seen, Stored, StoreFailed
from tests.simulation.checkpoint_model import Checkpoint

if TYPE_CHECKING:
    from tests.simulation.rank_model import RankModel
    from tests.simulation.world import Coordinator, World

Order = Append | WriteManifest | Discard


class Storage:
    """fails_until: of writes, for everybody. unread_until: of reads. slowness: of writes."""

    def __init__(self, world: World):
        self.world = world
        self.version = 0
        self.steps: list[int] = []
        self.highest_generation = self.highest_epoch = self.furthest = 0
        self.checkpoints: dict[str, Checkpoint] = {}
        self.fails_until = self.unread_until = 0.0
        self.slowness = 1.0

    # --- what a coordinator finds -----------------------------------------------------------------------------------------

    def head(self) -> Head:
        return Head(len(self.steps), self.highest_generation, self.highest_epoch, self.furthest)

    def listing(self) -> tuple[Seen, ...]:
        """Checkpoints that count, as a look into the folder shows them: the newest may not be listed yet."""
        return tuple(Seen(found.step, found.directory, not found.unreadable) for found in self.checkpoints.values()
                     if found.manifest is not None and not found.unlisted)

    def whole(self) -> list[Checkpoint]:
        """Those that could be restored."""
        return [found for found in self.checkpoints.values() if found.manifest is not None and not found.damaged
                and not found.unreadable]

    # --- what ranks do ----------------------------------------------------------------------------------------------------

    def write_pieces(self, rank: RankModel, directory: str, pieces: dict[tuple[int, int], int]) -> float:
        """Begin to write. When it is done; what then is not there has failed."""
        done = self.world.now + self.world.delay() * 2 * self.slowness
        self.world.later(done - self.world.now, self._written, rank, directory, pieces)
        return done

    def _written(self, rank: RankModel, directory: str, pieces: dict[tuple[int, int], int]) -> None:
        if rank.alive and self.world.now >= self.fails_until:
            self.checkpoints.setdefault(directory, Checkpoint(directory)).pieces |= pieces

    def has(self, directory: str, keys: Iterable[tuple[int, int]]) -> bool:
        found = self.checkpoints.get(directory)
        return found is not None and all(key in found.pieces for key in keys)

    def read(self, directory: str, step: int, keys: Iterable[int]) -> dict[int, int] | None:
        """Of these keys. None: it cannot be read."""
        found = self.checkpoints.get(directory)
        if found is None or found.manifest is None or found.damaged or found.unreadable or self.world.now < self.unread_until:
            return None
        if found.step != step:
            self.world.invariants.broken(f"{directory} has {found.step} steps, not {step}")
        return {key: found.manifest[key] for key in keys}


class Clerk:
    """Writes what one coordinator orders, in order."""

    def __init__(self, world: World, coordinator: Coordinator):
        self.world, self.coordinator, self.storage = world, coordinator, world.storage
        self.expected = self.storage.version
        self.orders: deque[Order] = deque()
        self.busy = False

    def order(self, order: Order) -> None:
        self.orders.append(order)
        if not self.busy:
            self._next()

    def sees_the_ledger(self) -> bool:
        return self.world.now >= max(self.storage.fails_until, self.storage.unread_until)

    def is_overtaken(self) -> bool:
        return self.storage.version != self.expected

    def lines(self) -> list[Line]:
        """Of the ledger, that are ordered and not written yet."""
        return [order.line for order in self.orders if type(order) is Append]

    def author_dies(self) -> None:
        """What is being written may still get there; the rest does not."""
        if self.orders and self.world.random.random() < 0.5 and self._may_write(self.orders[0]):
            self._write(self.orders[0])
        self.orders.clear()

    def _next(self) -> None:
        self.busy = True
        self.world.later(self.world.delay() / 2 * self.storage.slowness, self._done)

    def _done(self) -> None:
        if not self.orders:
            self.busy = False
            return
        thaws = self.coordinator.thaws
        if thaws > self.world.now:
            self.world.later(thaws - self.world.now + 0.001, self._done)
            return
        order = self.orders.popleft()
        self.coordinator.post(self._outcome(order), self.world.delay() / 8)
        if self.orders:
            self._next()
        else:
            self.busy = False

    def _outcome(self, order: Order) -> Event:
        if self.world.now < self.storage.fails_until:
            return StoreFailed(order.order, "storage is away")
        if self.storage.version != self.expected:
            return LineRefused(order.order, Ending.SUPERSEDED, "the ledger has lines of another coordinator")
        if type(order) is Append and type(order.line) is StepLine and order.line.step == self.world.not_finite:
            return LineRefused(order.order, Ending.NOT_FINITE, f"step {order.line.step} is not finite")
        self._write(order)
        return Stored(order.order)

    def _may_write(self, order: Order) -> bool:
        lost = self.storage.version != self.expected or (
            type(order) is Append and type(order.line) is StepLine and order.line.step == self.world.not_finite)
        return not lost and self.world.now >= self.storage.fails_until

    def _write(self, order: Order) -> None:
        storage, kind = self.storage, type(order)
        if kind is Append:
            storage.version += 1
            self.expected = storage.version
            self._line(order.line)
        elif kind is WriteManifest:
            found = storage.checkpoints.setdefault(order.directory, Checkpoint(order.directory))
            found.manifest = self.world.invariants.listed(self.coordinator, found, order)
            found.step, found.damaged, found.unreadable = order.step, False, False
            found.epoch = self.coordinator.epoch
        else:
            self.world.invariants.discard(self.coordinator, order)
            storage.checkpoints.pop(order.directory, None)

    def _line(self, line: Line) -> None:
        storage, kind = self.storage, type(line)
        if kind is StepLine:
            storage.steps.append(line.step)
            storage.furthest = max(storage.furthest, len(storage.steps))
            storage.highest_generation = max(storage.highest_generation, line.generation)
            self.world.invariants.step_stored(self.coordinator, line)
        elif kind is EpochLine:
            storage.highest_epoch = max(storage.highest_epoch, line.epoch)
        elif kind is OriginLine:
            storage.highest_generation = max(storage.highest_generation, line.generation)
        elif kind is CutLine:
            del storage.steps[line.step:]
            self.world.invariants.cut_stored(line)
