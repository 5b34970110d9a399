"""A search's problem in small integers: what actions there are, what they wait for, how long a set of rows takes.

The rules of `dependencies` (by the same tables) and the times of `simulate`, in a form that evaluates a schedule of a thousand actions
in a tenth of a millisecond. Tests hold the two together.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from orchestrator.schedule.ir import actions
from orchestrator.schedule.ir.actions import ActionKind, Compute, Pair, Schedule, SplitAction, Work, input_stage, output_stage
from orchestrator.schedule.ir.stages import SEARCHED, Place, Stages
from orchestrator.schedule.timing.durations import Durations, at

F, B, I, W = range(4)
KINDS = (ActionKind.FORWARD, ActionKind.BACKWARD, ActionKind.BACKWARD_INPUT, ActionKind.BACKWARD_WEIGHT)
_NUMBER = {kind: number for number, kind in enumerate(KINDS)}
BEFORE = {number: _NUMBER.get(actions.BEFORE[kind]) for kind, number in _NUMBER.items()}
"""What of the same microbatch comes directly before."""
_NOTHING = dict.fromkeys(BEFORE)

Part = tuple[int, int, int]
"""(F, B, I or W; slot; microbatch)."""
NEVER = float("inf")


@dataclass(frozen=True, slots=True)
class SearchAction:
    """An action of a row. needs: tensors from the stage before (F) or after (B, I). makes: (tensor, way to its user)."""

    parts: tuple[Part, ...]
    split: bool
    duration: float
    needs: tuple[int, ...]
    makes: tuple[tuple[int, float], ...]


Rows = list[list[SearchAction]]


def most_kept(stages: Stages, microbatches: int, most_activations: float | None) -> int:
    """Activations of one stage that a position may keep at once. None: what DualPipe keeps, positions + 1."""
    most = stages.positions + 1 if most_activations is None else most_activations
    return min(int(most * stages.chunks + 1e-9), microbatches // len(stages.paths) * stages.slots)


class Problem:
    """Args:
        durations: by stage of `stages`.
        most_activations: in microbatches on all layers of a rank; a position keeps at most this times `stages.chunks`.
        splits: whether actions may be split in half microbatches.
    """

    def __init__(self, stages: Stages, microbatches: int, durations: Durations, most_activations: float, *, splits: bool):
        self.stages, self.microbatches, self.durations, self.splits = stages, microbatches, durations, splits
        self.positions, self.slots, self.count = stages.positions, stages.slots, stages.count
        self.each = microbatches // len(stages.paths)  # microbatches of an entrance
        self.stage_at = [stages.hosted(position) for position in range(stages.positions)]
        self._entrance = {slot: entrance for entrance, path in enumerate(stages.paths) for _, slot in path}
        self.user = {(position, kind, slot): self._find_user(position, kind, slot) for position in range(stages.positions)
                     for kind in BEFORE for slot in range(stages.slots)}
        """By position, F, B, I or W, and slot: where what such a part makes is taken in; None: nowhere."""
        self._takes_in = {(position, kind, slot): input_stage(KINDS[kind], self.stage_at[position][slot], self.count) is not None
                          for position, kind, slot in self.user}
        self.tensors = 2 * self.count * microbatches
        self.unit = self._forward_of_a_rank()
        self._moves: list[dict[tuple, SearchAction]] = [{} for _ in range(stages.positions)]
        self.most_activations, self.limit = most_activations, self.within(most_activations).limit

    def within(self, most_activations: float) -> Problem:
        """The same problem, with the same moves, and another bound on activations."""
        other = copy.copy(self)
        other.limit = most_kept(self.stages, self.microbatches, most_activations)
        return other

    # --- actions -------------------------------------------------------------------------------------------------

    def move(self, position: int, parts: tuple[Part, ...], split: bool = False) -> SearchAction:
        """The action on `position` that consists of `parts`; one object for each."""
        key = (parts, split)
        found = self._moves[position].get(key)
        if found is None:
            found = self._moves[position][key] = self._make(position, parts, split)
        return found

    def work(self, position: int, parts: tuple[Part, ...], split: bool = False) -> Work:
        computes = [Compute(KINDS[kind], self.stage_at[position][slot], slot, m) for kind, slot, m in parts]
        return SplitAction(computes[0]) if split else computes[0] if len(computes) == 1 else Pair(*computes)

    def tensor(self, kind: int, stage: int, slot: int, microbatch: int) -> int:
        """Number of the input of F, or of the output's gradient of B and I, at a stage."""
        gradient = kind != F
        return (gradient * self.count + stage) * self.microbatches + self._entrance[slot] * self.each + microbatch

    def _find_user(self, position: int, kind: int, slot: int) -> Place | None:
        stage = output_stage(KINDS[kind], self.stage_at[position][slot], self.count)
        return None if stage is None else self.stages.route(slot)[stage]

    def _make(self, position: int, parts: tuple[Part, ...], split: bool) -> SearchAction:
        needs, makes = [], []
        for kind, slot, microbatch in parts:
            if self._takes_in[position, kind, slot]:
                needs.append(self.tensor(kind, self.stage_at[position][slot], slot, microbatch))
            if (user := self.user[position, kind, slot]) is not None:
                way = self.durations.arrival(position, user[0])
                makes.append((self.tensor(kind, self.stage_at[user[0]][user[1]], slot, microbatch), way))
        duration = self.durations.of(self.work(position, parts, split), position)
        return SearchAction(parts, split, duration, tuple(needs), tuple(makes))

    def _forward_of_a_rank(self) -> float:
        """Mean compute of a forward through a position's stages: the unit of what the search's rules measure."""
        every = [at(self.durations.forward, stage) for stage in range(self.count)]
        return sum(every) / len(every) * self.stages.chunks

    # --- schedules -----------------------------------------------------------------------------------------------

    def rows(self, schedule: Schedule) -> Rows:
        return [[self.move(position, tuple((_NUMBER[c.kind], c.slot, c.microbatch) for c in action.computes),
                           isinstance(action, SplitAction)) for action in row] for position, row in enumerate(schedule.rows)]

    def schedule(self, rows: Rows) -> Schedule:
        return Schedule(SEARCHED, self.stages, self.microbatches, tuple(
            tuple(self.work(position, move.parts, move.split) for move in row) for position, row in enumerate(rows)))

    def makespan(self, rows: Rows, bound: float = NEVER, starts: list[list[float]] | None = None) -> float:
        """When the last action ends; NEVER if the rows wait for each other for ever, or end after `bound`.

        starts: empty lists by position, which get the start of every action.
        """
        ready = [-1.0] * self.tensors
        at, free = [0] * self.positions, [0.0] * self.positions
        waiting: dict[int, int] = {}
        todo = list(range(self.positions))
        while todo:
            position = todo.pop()
            row, index, now = rows[position], at[position], free[position]
            length = len(row)
            while index < length:
                move, start = row[index], now
                for tensor in move.needs:
                    arrival = ready[tensor]
                    if arrival < 0:
                        waiting[tensor] = position
                        break
                    if arrival > start:
                        start = arrival
                else:
                    if starts is not None:
                        starts[position].append(start)
                    now = start + move.duration
                    if now > bound:
                        return NEVER
                    for tensor, way in move.makes:
                        ready[tensor] = now + way
                        if tensor in waiting:
                            todo.append(waiting.pop(tensor))
                    index += 1
                    continue
                break
            at[position], free[position] = index, now
        if any(index < len(row) for index, row in zip(at, rows)):
            return NEVER
        return max(free)

    def allows(self, row: Sequence[SearchAction]) -> bool:
        """Whether each microbatch's F, I (or B) and W come in this order, and activations stay within the bound."""
        return self.live_after(row, 0, _NOTHING) is not None

    def live_after(self, moves: Sequence[SearchAction], live: int, before: Mapping[int, int | None] = BEFORE) -> int | None:
        """Activations kept after `moves`, with `live` of them before; None: these are not allowed.

        before: what a microbatch of which the first of them is a part of each kind is taken to have had: by default what it must.
        """
        state: dict[tuple[int, int], int] = {}
        for move in moves:
            released, reached = 0, []
            for kind, slot, microbatch in move.parts:
                key = (slot, microbatch)
                if state.get(key, before[kind]) != BEFORE[kind]:
                    return None
                live += kind == F
                released += kind in (B, W)
                reached.append((key, kind))
            if live > self.limit:
                return None
            live -= released
            state.update(reached)
        return live
