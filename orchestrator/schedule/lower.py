"""From a schedule to one program per position, in short passes: lists in, lists out.

What is transferred follows from `dependencies` alone: whatever an action needs from another position is sent there right
after it is made and received before it is used. Nothing is sent within a position or beyond the first and last stage.
From one position to another, receives are posted in the order of the sends, so links need not look at tags.
Programs are a function of schedule and position alone, so all ranks at a position run the same one.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from orchestrator.schedule.actions import (
    Action,
    Compute,
    Kind,
    Pair,
    Payload,
    Program,
    Reduce,
    Schedule,
    Transfer,
    dependencies,
)
from orchestrator.schedule.grid import failure


@dataclass(frozen=True, slots=True)
class Crossing:
    """A tensor's way from the action that makes it to the one that uses it, on another position."""

    maker: Compute
    user: Compute
    send: Transfer
    receive: Transfer


def lower(schedule: Schedule, lookahead: int = 2) -> tuple[Program, ...]:
    """One program per position.

    Args:
        lookahead: a receive is posted at least this many compute actions before the one that uses it (or at the start),
            so that it is there before what this position itself sends in that time. 0: right before, unless a tensor
            sent after it is used earlier.
    Raises ValueError: lookahead is negative, or the schedule names a microbatch that it does not have.
    Raises ScheduleError: an action's tensor is never made.
    """
    if lookahead < 0:
        raise ValueError(f"lookahead = {lookahead}: at least 0")
    ways = crossings(schedule)
    programs = []
    for position, row in enumerate(schedule.rows):
        actions: list[Action] = list(row)
        actions = add_sends(actions, ways)
        actions = add_receives(actions, [way for way in ways if way.send.peer == position], lookahead)
        if schedule.trains:
            actions = add_reduce(actions)
        programs.append(Program(position, schedule.microbatches, tuple(actions)))
    return tuple(programs)


def crossings(schedule: Schedule) -> list[Crossing]:
    """All transfers of a step; those made by one position in the order in which it makes them."""
    made = (half for row in schedule.rows for action in row for half in action.halves)
    order = {compute: index for index, compute in enumerate(made)}
    ways = []
    for position, row in enumerate(schedule.rows):
        for index, action in enumerate(row):
            for user in action.halves:
                for maker in dependencies(user, schedule):
                    if maker not in order:
                        raise failure(f"position {position}, action {index}: {action} needs {maker} of stage {maker.stage}, "
                                      "which no position runs", schedule.rows, {position: index})
                    if schedule.position(maker) != position:
                        ways.append(_crossing(maker, user, position, schedule))
    return sorted(ways, key=lambda way: order[way.maker])


def _crossing(maker: Compute, user: Compute, position: int, schedule: Schedule) -> Crossing:
    forward = user.kind is Kind.FORWARD
    payload = Payload.ACTIVATION if forward else Payload.GRADIENT
    tag = 2 * (user.microbatch * schedule.slots + user.slot) + (0 if forward else 1)
    return Crossing(
        maker, user,
        Transfer(Kind.SEND, payload, position, user.stage, maker.slot, maker.microbatch, tag),
        Transfer(Kind.RECEIVE, payload, schedule.position(maker), user.stage, user.slot, user.microbatch, tag),
    )


def add_sends(actions: Sequence[Action], ways: Iterable[Crossing]) -> list[Action]:
    """Each send after the compute action that makes the tensor; those of a pair after both halves, the forward's first."""
    sends: dict[Compute, list[Transfer]] = defaultdict(list)
    for way in ways:
        sends[way.maker].append(way.send)
    result: list[Action] = []
    for action in actions:
        result.append(action)
        result.extend(send for half in _halves(action) for send in sends.get(half, ()))
    return result


def add_receives(actions: Sequence[Action], arriving: Sequence[Crossing], lookahead: int) -> list[Action]:
    """Each receive `lookahead` compute actions before the one that uses the tensor, or with a later one of its sender that
    is posted earlier. `arriving`: what this position receives, each sender's in the order of its sends."""
    computes = [action for action in actions if _halves(action)]
    index_of = {half: index for index, action in enumerate(computes) for half in _halves(action)}
    posts: dict[int, list[Transfer]] = defaultdict(list)
    earliest: dict[int, int] = {}                       # by sender: where the next one sent is posted
    for way in reversed(arriving):
        sender = way.receive.peer
        due = max(0, index_of[way.user] - lookahead)
        earliest[sender] = min(due, earliest.get(sender, due))
        posts[earliest[sender]].append(way.receive)
    result: list[Action] = []
    index = 0
    for action in actions:
        if _halves(action):
            result.extend(reversed(posts[index]))
            index += 1
        result.append(action)
    return result


def add_reduce(actions: Sequence[Action]) -> list[Action]:
    return [*actions, Reduce()]


def _halves(action: Action) -> tuple[Compute, ...]:
    return action.halves if isinstance(action, Compute | Pair) else ()
