"""Whether a schedule and its programs are right, found out before any rank runs them.

Complete, in an order that `dependencies` allows, transfers matched, free of deadlock, activations within a bound, all
gradients there when they are reduced. All ranks of an EP group are at one position, and a program is a function of schedule
and position alone; so they all enter the same collectives in the same order, and there is nothing more to check about it.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence

from orchestrator.schedule.ir.actions import Action, ActionKind, Program, Reduce, Schedule, Transfer, Work
from orchestrator.schedule.ir.deadlock import POST, SEND, WORK, Arrival, Link, Step, refuse_deadlock
from orchestrator.schedule.ir.graph import Graph, compiled
from orchestrator.schedule.ir.grid import ScheduleError, failure

__all__ = ["ScheduleError", "check", "peak_activations", "relative_activations"]

_ALLOWED = ("FB", "FIW")
_BIT = {ActionKind.FORWARD: 1, ActionKind.BACKWARD: 2, ActionKind.BACKWARD_INPUT: 4, ActionKind.BACKWARD_WEIGHT: 8}
_RELEASES = (ActionKind.BACKWARD, ActionKind.BACKWARD_WEIGHT)


def check(schedule: Schedule | Graph, programs: Sequence[Program], *, most_activations: int | None = None,
          outstanding_receives: int | None = None, unreceived_sends: int | None = None) -> tuple[int, ...]:
    """Check `programs` against `schedule`, and the schedule itself.

    Args:
        most_activations: bound on `peak_activations`.
        outstanding_receives: how many receives a position can have posted whose tensor is not there yet; one more blocks.
        unreceived_sends: how many tensors a link (from one position to another) holds whose receive is not posted; one more
            send blocks until one is. 0: a send ends when its receive is posted (rendezvous). None: sends never block.
    Returns: peak activations in flight by position.
    Raises ScheduleError: the first line says what is wrong and where, the others show the grid around it.
    """
    graph = compiled(schedule)
    schedule = graph.schedule
    _check_complete(graph)
    _check_lowering(schedule, programs)
    links = _matched(graph, programs)
    order = _Order(graph, links)
    steps = [order.steps(program) for program in programs]
    refuse_deadlock(schedule, programs, steps, list(links.values()), outstanding_receives, unreceived_sends)
    peaks = peak_activations(schedule)
    for position, peak in enumerate(peaks):
        if most_activations is not None and peak > most_activations:
            index = next(i for i, live in enumerate(_live(schedule, position)) if live > most_activations)
            raise failure(f"position {position}: {peak} microbatches in flight at once, at most {most_activations} allowed",
                          schedule.rows, {position: index})
    return peaks


def peak_activations(schedule: Schedule) -> tuple[int, ...]:
    """Most microbatches whose activations of one stage a position keeps at once, by position; all slots together.

    A microbatch counts from its F to the end of its B or W, so both of a pair count during the pair. Without backward
    passes only the running microbatch counts. It is a matter of order, so durations do not change it.
    """
    return tuple(max(_live(schedule, position), default=0) for position in range(schedule.positions))


def relative_activations(schedule: Schedule) -> tuple[float, ...]:
    """`peak_activations` over the stages of a position that a microbatch passes, so 1.0 is one microbatch on all layers of a
    rank."""
    return tuple(peak / schedule.stages.chunks for peak in peak_activations(schedule))


def _live(schedule: Schedule, position: int) -> list[int]:
    """Microbatches alive during each action of a row."""
    live, during = 0, []
    for action in schedule.rows[position]:
        kinds = [compute.kind for compute in action.computes]
        forwards = kinds.count(ActionKind.FORWARD)
        live += forwards
        during.append(live)
        live -= sum(kind in _RELEASES for kind in kinds) if schedule.trains else forwards
    return during


def _check_complete(graph: Graph) -> None:
    """Every stage runs every microbatch's F once, and in training its B once, or its I and W once. What an action needs on its
    own position comes before it."""
    schedule = graph.schedule
    entrances = len(schedule.stages.paths)
    each, odd = divmod(schedule.microbatches, entrances)
    if odd:
        raise failure(f"{schedule.microbatches} microbatches do not divide among {entrances} entrances", schedule.rows, {0: 0})
    done = [[0] * (schedule.slots * each) for _ in schedule.rows]
    for position, action in zip(graph.position, graph.actions, strict=True):
        for compute in action.computes:
            done[position][compute.slot * each + compute.microbatch] |= _BIT[compute.kind]
    allowed = _ALLOWED if schedule.trains else ("F",)
    right = {sum(_BIT[ActionKind(kind)] for kind in kinds) for kinds in allowed}
    for position, row in enumerate(schedule.rows):
        slots = {place[1] for path in schedule.stages.paths for place in path if place[0] == position}
        wrong = (place for place, bits in enumerate(done[position]) if bits not in right and place // each in slots)
        if (place := next(wrong, None)) is not None:
            kinds = " ".join(kind for kind, bit in _BIT.items() if done[position][place] & bit)
            raise failure(f"position {position}: microbatch {place // each}.{place % each} has {kinds or 'no action'}, "
                          f"not {' or '.join(' '.join(kinds) for kinds in allowed)}", schedule.rows,
                          {position: _last_of(row, place // each, place % each)})
    for number, needs in enumerate(graph.needs):
        if needs and max(needs) >= number:
            _raise_too_early(graph, number)


def _last_of(row: Sequence[Work], slot: int, microbatch: int) -> int:
    """The last action of a microbatch in a row; the end of the row, if there is none."""
    found = (index for index in reversed(range(len(row)))
             if any((compute.slot, compute.microbatch) == (slot, microbatch) for compute in row[index].computes))
    return next(found, len(row))


def _raise_too_early(graph: Graph, number: int) -> None:
    late = graph.actions[max(graph.needs[number])]
    position, index, action = graph.position[number], graph.index(number), graph.actions[number]
    reason = "the other one of the pair first" if late is action else f"{late} first"
    raise failure(f"position {position}, action {index}: {action} needs {reason}", graph.schedule.rows, {position: index})


def _check_lowering(schedule: Schedule, programs: Sequence[Program]) -> None:
    """A program is its row, plus transfers, plus one reduction at the end of training."""
    for position in range(max(len(programs), schedule.positions)):
        if position >= min(len(programs), schedule.positions) or programs[position].position != position:
            raise failure(f"programs are for positions {[p.position for p in programs]}", schedule.rows,
                          {min(position, schedule.positions - 1): 0})
    for position, program in enumerate(programs):
        row = schedule.rows[position]
        computes = [action for action in program.actions if isinstance(action, Work)]
        if tuple(computes) != row:
            index = next((i for i, (a, b) in enumerate(zip(row, computes, strict=False)) if a != b), min(len(row), len(computes)))
            found = computes[index] if index < len(computes) else "nothing"
            raise failure(f"position {position}, action {index}: the program has {found} here", schedule.rows, {position: index})
        if program.microbatches != schedule.microbatches:
            raise failure(f"position {position}: the program is for {program.microbatches} microbatches, "
                          f"not {schedule.microbatches}", schedule.rows, {position: 0})
        reductions = [index for index, action in enumerate(program.actions) if isinstance(action, Reduce)]
        if reductions != ([len(program.actions) - 1] if schedule.trains else []):
            wanted = "one reduction, at its end" if schedule.trains else "no reduction"
            place = sum(isinstance(action, Work) for action in program.actions[:reductions[0]]) if reductions else len(row)
            raise failure(f"position {position}: the program must have {wanted}", schedule.rows, {position: place})


def _matched(graph: Graph, programs: Sequence[Program]) -> dict[tuple[int, int], Link]:
    """The links, by the positions they lead from and to: what is sent over them and in which order.

    On each, receives are posted in the order of the sends, with distinct tags; so a link is a queue and its n-th send meets its
    n-th receive. Raises ScheduleError: they are not.
    """
    rows = graph.schedule.rows
    links: dict[tuple[int, int], Link] = {}
    for program in programs:
        index = 0
        for action in program.actions:
            if isinstance(action, Transfer):
                send = action.kind is ActionKind.SEND
                way = (program.position, action.peer) if send else (action.peer, program.position)
                if action.peer == program.position or not 0 <= action.peer < len(programs):
                    raise failure(f"position {program.position}, action {index}: {action}, which is no other position", rows,
                                  {program.position: index})
                if (link := links.get(way)) is None:
                    link = links[way] = Link(*way, number=len(links))
                (link.sends if send else link.receives).append((index, action))
            elif isinstance(action, Work):
                index += 1
    for link in links.values():
        _check_queue(link, rows)
    return links


def _check_queue(link: Link, rows: Sequence[Sequence[Work]]) -> None:
    origin, target = link.origin, link.target
    for number in range(max(len(link.sends), len(link.receives))):
        ends = [end[number] if number < len(end) else None for end in (link.sends, link.receives)]
        if None in ends or _identity(ends[0][1]) != _identity(ends[1][1]):
            left, right = ("nothing" if end is None else str(end[1]) for end in ends)
            places = {position: end[0] for position, end in zip((origin, target), ends, strict=True) if end is not None}
            raise failure(f"transfer {number} from position {origin} to {target}: {left} meets {right}", rows, places)
    tags = Counter(send.tag for _, send in link.sends)
    if len(tags) < len(link.sends):
        tag, count = tags.most_common(1)[0]
        place = next(index for index, send in reversed(link.sends) if send.tag == tag)
        raise failure(f"from position {origin} to {target}: tag {tag} is used {count} times", rows, {origin: place})


def _identity(transfer: Transfer) -> tuple[object, ...]:
    return transfer.payload, transfer.stage, transfer.microbatch, transfer.tag


class _Order:
    """Turns programs into steps, and finds out whether each makes, sends, posts and uses in a possible order."""

    def __init__(self, graph: Graph, links: dict[tuple[int, int], Link]):
        self._graph, self._links = graph, links
        self._maker: dict[int, dict[Transfer, int]] = defaultdict(dict)         # by sender
        self._user: dict[int, dict[Transfer, int]] = defaultdict(dict)          # by receiver
        self._receives: dict[int, list[Transfer]] = defaultdict(list)           # by user
        for crossing in graph.crossings:
            self._maker[crossing.receive.peer][crossing.send] = crossing.maker
            self._user[crossing.send.peer][crossing.receive] = crossing.user
            self._receives[crossing.user].append(crossing.receive)

    def steps(self, program: Program) -> list[Step]:
        """Raises ScheduleError: a tensor is sent before it is made, or is none that the schedule has; or an action uses one
        whose receive is not posted before it."""
        position = program.position
        start = number = self._graph.starts[position]
        posted: dict[Transfer, Arrival] = {}
        count: Counter[int] = Counter()
        steps: list[Step] = []
        for action in program.actions:
            if isinstance(action, Work):
                needs = self._receives.get(number, ())
                if missing := next((receive for receive in needs if receive not in posted), None):
                    raise self._refusal(position, number - start, action, f"needs {missing} posted first")
                steps.append((WORK, 0, tuple([posted[receive] for receive in needs])))
                number += 1
            elif isinstance(action, Reduce):
                steps.append((WORK, 0, ()))             # it is last, and the program is complete
            elif action.kind is ActionKind.SEND:
                if self._maker[position].get(action, number) >= number:
                    raise self._refusal(position, number - start, action,
                                        "but no action before has made this tensor for that position")
                steps.append((SEND, self._links[position, action.peer].number, ()))
            else:
                if action not in self._user[position]:
                    raise self._refusal(position, number - start, action, "but no action uses this tensor")
                link = self._links[action.peer, position].number
                posted[action] = (link, count[link])
                count[link] += 1
                steps.append((POST, link, ()))
        return steps

    def _refusal(self, position: int, index: int, action: Action, reason: str) -> ScheduleError:
        return failure(f"position {position}, action {index}: {action} {reason}", self._graph.schedule.rows, {position: index})
