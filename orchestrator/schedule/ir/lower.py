"""From a schedule to one program per position, in short passes: lists in, lists out.

What is transferred follows from `dependencies` alone: whatever an action needs from another position is sent there right
after it is made and received before it is used. Nothing is sent beyond the first and last stage, nor where consecutive
stages are of one position (the turn of a V, a loop of one position): there the executor hands the tensor from slot to slot.
From one position to another, receives are posted in the order of the sends, so links need not look at tags.
Programs are a function of schedule and position alone, so all ranks at a position run the same one.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from heapq import heappop, heappush

from orchestrator.schedule.ir.actions import Action, Program, Reduce, Schedule, Transfer, Work
from orchestrator.schedule.ir.graph import Crossing, Graph, compiled
from orchestrator.schedule.ir.grid import failure


@dataclass(frozen=True, slots=True)
class ReceiveWindow:
    """A receive of one position. index: the compute action before which it is posted; last: before which it must be, if those
    of its sender are posted in the order of the sends; user: that which uses the tensor. All are places in the row."""

    index: int
    last: int
    user: int
    transfer: Transfer


def lower(schedule: Schedule | Graph, lookahead: int = 3, most_outstanding: int | None = None) -> tuple[Program, ...]:
    """One program per position.

    Args:
        lookahead: a receive is posted at least this many compute actions before the one that uses it (or at the start),
            so that it is there before what this position itself sends in that time. 0: right before, unless a tensor
            sent after it is used earlier. With 3, no kind needs links that hold anything: a send may wait for its receive.
        most_outstanding: how many receives a position may have posted whose tensors it has not used yet; those that would be
            too many are posted later than `lookahead` says.
    Raises ValueError: lookahead is negative.
    Raises ScheduleError: `compiled` refuses the schedule; `most_outstanding` are not enough.
    """
    if lookahead < 0:
        raise ValueError(f"lookahead = {lookahead}: at least 0")
    graph = compiled(schedule)
    departing: dict[int, list[Crossing]] = defaultdict(list)
    arriving: dict[int, list[Crossing]] = defaultdict(list)
    for crossing in graph.crossings:
        departing[crossing.receive.peer].append(crossing)
        arriving[crossing.send.peer].append(crossing)
    programs = []
    for position, row in enumerate(graph.schedule.rows):
        start = graph.starts[position]
        receives = post_early([(c.user - start, c.receive) for c in arriving[position]], lookahead)
        if most_outstanding is not None:
            receives = _post_later(receives, most_outstanding, position, graph)
        actions: list[Action] = list(row)
        actions = add_sends(actions, [(c.maker - start, c.send) for c in departing[position]])
        actions = add_receives(actions, receives)
        if graph.schedule.trains:
            actions = add_reduce(actions)
        programs.append(Program(position, graph.schedule.microbatches, tuple(actions)))
    return tuple(programs)


def add_sends(actions: Sequence[Action], sends: Iterable[tuple[int, Transfer]]) -> list[Action]:
    """Each send after the compute action that makes the tensor, given by its index; those of a pair after both, the first's
    first."""
    after: dict[int, list[Transfer]] = defaultdict(list)
    for index, send in sends:
        after[index].append(send)
    result: list[Action] = []
    computes = 0
    for action in actions:
        result.append(action)
        if isinstance(action, Work):
            result += after.get(computes, ())
            computes += 1
    return result


def post_early(arriving: Sequence[tuple[int, Transfer]], lookahead: int) -> list[ReceiveWindow]:
    """When each receive is posted: `lookahead` compute actions before the one that uses the tensor, or with a later one of its
    sender that is posted earlier.

    arriving: (index of the user, receive), each sender's in the order of its sends. Returns them in the order of posting.
    """
    receives: list[ReceiveWindow] = []
    last: dict[int, int] = {}                           # by sender: before which action the next one sent is posted
    for user, transfer in reversed(arriving):
        last[transfer.peer] = min(user, last.get(transfer.peer, user))
        receives.append(ReceiveWindow(max(0, last[transfer.peer] - lookahead), last[transfer.peer], user, transfer))
    receives.reverse()
    return sorted(receives, key=lambda receive: receive.last)


def add_receives(actions: Sequence[Action], receives: Sequence[ReceiveWindow]) -> list[Action]:
    """Each receive before the compute action with its index."""
    before: dict[int, list[Transfer]] = defaultdict(list)
    for receive in receives:
        before[receive.index].append(receive.transfer)
    result: list[Action] = []
    computes = 0
    for action in actions:
        if isinstance(action, Work):
            result += before.get(computes, ())
            computes += 1
        result.append(action)
    return result


def add_reduce(actions: Sequence[Action]) -> list[Action]:
    return [*actions, Reduce()]


def _post_later(receives: Iterable[ReceiveWindow], most: int, position: int, graph: Graph) -> list[ReceiveWindow]:
    """The receives with at most `most` of them outstanding at once.

    They are posted in the order of `last`, so whoever is posted early is in nobody's way: it must be outstanding at the `last`
    of all that come after it, unless it is used before.
    """
    later: list[ReceiveWindow] = []
    users: list[int] = []                               # of the outstanding ones, the earliest first
    for receive in receives:
        index = receive.index
        while users and len(users) >= most:
            index = max(index, heappop(users) + 1)
        if index > receive.last or most < 1:
            action = graph.schedule.rows[position][receive.last]
            raise failure(f"position {position}, action {receive.last}: {action} needs {receive.transfer} posted, one more than "
                          f"{most} outstanding", graph.schedule.rows, {position: receive.last})
        heappush(users, receive.user)
        later.append(ReceiveWindow(index, receive.last, receive.user, receive.transfer))
    return later
