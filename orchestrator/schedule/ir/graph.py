"""A schedule compiled to integers, once: who waits for whom, and where tensors cross from one position to another.

Actions are numbered row by row. What an action needs comes from `dependencies` alone; checker, lowering and simulator read
it from here, so that none of them has a rule of its own and large schedules stay quick.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import accumulate, chain

from orchestrator.schedule.ir.actions import ActionKind, Compute, Payload, Schedule, SplitAction, Transfer, Work, dependencies
from orchestrator.schedule.ir.grid import ScheduleError, failure

Numbers = tuple[int, ...]
Carried = tuple[tuple[int, Compute], tuple[int, Compute]]
"""(maker, user) of a tensor that crosses positions, each as the number of an action and the compute action within it."""


@dataclass(frozen=True, slots=True)
class Crossing:
    """A tensor's way from the action that makes it to the one that uses it, on another position. Both are numbers."""

    maker: int
    user: int
    send: Transfer
    receive: Transfer


@dataclass(frozen=True)
class Sort:
    """Actions on one position that differ in their microbatches only, so they take equally long. `action`: one of them."""

    position: int
    action: Work


@dataclass(frozen=True, eq=False)
class Graph:
    """All by action number, if not said otherwise.

    actions: row by row. starts: by position, the number of its first action, and after the last one the number of all.
    position: where it runs; its index in the row is its number less `starts[position]`.
    needs: actions on the same position that must be done before. arrivals: those on other positions whose tensors must have
    arrived. carried: every tensor that crosses positions; those made by one position in the order in which it makes them.
    """

    schedule: Schedule
    actions: tuple[Work, ...]
    starts: Numbers
    position: Numbers
    needs: tuple[Numbers, ...]
    arrivals: tuple[Numbers, ...]
    carried: tuple[Carried, ...]

    def index(self, action: int) -> int:
        """Place in its row."""
        return action - self.starts[self.position[action]]

    def numbers(self, position: int) -> range:
        """The actions of a position, in order."""
        return range(self.starts[position], self.starts[position + 1])

    @cached_property
    def order(self) -> Numbers:
        """All actions, each after what it needs and after the one before it in its row.

        Raises ScheduleError: there is no such order, for some actions wait for each other.
        """
        return _order(self)

    @cached_property
    def crossings(self) -> tuple[Crossing, ...]:
        """What `carried` sends and receives."""
        return tuple(self._crossing(*maker, *user) for maker, user in self.carried)

    @cached_property
    def sorts(self) -> tuple[tuple[Sort, ...], Numbers]:
        """The sorts of action that there are, and by action which one it is."""
        found: dict[tuple, int] = {}
        sorts: list[Sort] = []
        of = []
        for position, action in zip(self.position, self.actions, strict=True):
            key = (position, type(action) is SplitAction, *((compute.kind, compute.stage) for compute in action.computes))
            number = found.setdefault(key, len(sorts))
            if number == len(sorts):
                sorts.append(Sort(position, action))
            of.append(number)
        return tuple(sorts), tuple(of)

    def _crossing(self, maker: int, made: Compute, user: int, used: Compute) -> Crossing:
        forward = used.kind is ActionKind.FORWARD
        payload = Payload.ACTIVATION if forward else Payload.GRADIENT
        tag = 2 * (used.microbatch * self.schedule.slots + used.slot) + (not forward)
        sender, receiver = self.position[maker], self.position[user]
        return Crossing(
            maker, user,
            Transfer(ActionKind.SEND, payload, receiver, used.stage, made.slot, made.microbatch, tag),
            Transfer(ActionKind.RECEIVE, payload, sender, used.stage, used.slot, used.microbatch, tag),
        )


def compiled(schedule: Schedule | Graph) -> Graph:
    """The graph of a schedule; a graph is given back as it is.

    Raises ScheduleError: there are not as many rows as positions, an action is of another position, of no microbatch or there
    twice, or needs one that no position runs.
    """
    return schedule if isinstance(schedule, Graph) else _compiled(schedule)


@lru_cache(maxsize=4)
def _compiled(schedule: Schedule) -> Graph:
    rows = schedule.rows
    if len(rows) != schedule.positions:
        raise failure(f"{len(rows)} rows for {schedule.positions} positions", rows, {min(len(rows), schedule.positions) - 1: 0})
    starts = tuple(accumulate(map(len, rows), initial=0))
    position = tuple(position for position, row in enumerate(rows) for _ in row)
    numbers, action_of = _numbers(schedule)
    needs, arrivals = [], []
    carried: list[tuple[int, Carried]] = []
    for user, (at, action) in enumerate(zip(position, chain.from_iterable(rows), strict=True)):
        near, far = [], []
        for compute in action.computes:
            for needed in dependencies(compute, schedule):
                number = numbers.get(needed)
                if number is None:
                    raise failure(f"position {at}, action {user - starts[at]}: {action} needs {needed} of stage {needed.stage}, "
                                  "which no position runs", rows, {at: user - starts[at]})
                maker = action_of[number]
                if position[maker] == at:
                    near.append(maker)
                else:
                    far.append(maker)
                    carried.append((number, ((maker, needed), (user, compute))))
        needs.append(tuple(near))
        arrivals.append(tuple(far))
    carried.sort(key=lambda numbered: numbered[0])
    return Graph(schedule, tuple(chain.from_iterable(rows)), starts, position, tuple(needs), tuple(arrivals),
                 tuple(way for _, way in carried))


def _numbers(schedule: Schedule) -> tuple[dict[Compute, int], list[int]]:
    """Compute actions numbered row by row, and by their number the action that does each."""
    numbers: dict[Compute, int] = {}
    action_of: list[int] = []
    each = schedule.microbatches // len(schedule.stages.paths)
    action_number = 0
    for position, row in enumerate(schedule.rows):
        hosted = dict(enumerate(schedule.stages.hosted(position)))
        for index, action in enumerate(row):
            for compute in action.computes:
                number = numbers.setdefault(compute, len(action_of))
                if hosted.get(compute.slot) != compute.stage or not 0 <= compute.microbatch < each or number < len(action_of):
                    reason = _misplaced(compute, position, schedule) or "a second time"
                    raise failure(f"position {position}, action {index}: {compute} {reason}", schedule.rows, {position: index})
                action_of.append(action_number)
            action_number += 1
    return numbers, action_of


def _misplaced(compute: Compute, position: int, schedule: Schedule) -> str | None:
    try:
        schedule.route(compute.slot, compute.microbatch)
    except ValueError as error:
        return f"is for {error}"
    if schedule.stages.stage_at(position, compute.slot) != compute.stage:
        return f"of stage {compute.stage} is not of this position"
    return None


def _order(graph: Graph) -> Numbers:
    needs, arrivals, starts = graph.needs, graph.arrivals, graph.starts
    at = list(starts[:-1])
    done = bytearray(len(graph.actions))
    waiting: dict[int, list[int]] = {}                  # by action: positions that wait for it
    ready = deque(range(len(at)))
    order: list[int] = []
    while ready:
        position = ready.popleft()
        action, end = at[position], starts[position + 1]
        while action < end:
            for needed in arrivals[action] + needs[action]:
                if not done[needed]:
                    waiting.setdefault(needed, []).append(position)
                    break
            else:
                done[action] = True
                order.append(action)
                if action in waiting:
                    ready.extend(waiting.pop(action))
                action += 1
                continue
            break
        at[position] = action
    if len(order) < len(done):
        raise _stuck(graph, at, done)
    return tuple(order)


def _stuck(graph: Graph, at: Sequence[int], done: Sequence[int]) -> ScheduleError:
    stuck = {position: action for position, action in enumerate(at) if action < graph.starts[position + 1]}
    position, number = next(iter(stuck.items()))
    action, schedule = graph.actions[number], graph.schedule
    finished = {compute for other, work in enumerate(graph.actions) if done[other] for compute in work.computes}
    missing = next(needed for needed in dependencies(action, schedule) if needed not in finished)
    return failure(f"position {position}, action {graph.index(number)}: {action} waits for {missing} of stage {missing.stage}, "
                   "for ever", schedule.rows, {position: graph.index(number) for position, number in stuck.items()})
