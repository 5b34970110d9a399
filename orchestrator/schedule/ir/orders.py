"""In which order the actions of a program issue the operations of their streams: a pass over programs, and its check.

An action has an operation stream for each part of each of its computes: a microbatch of which any action is split is in two
parts, any other in one. The order is planned once for each form of action at a position, so it is a function
of schedule, position and the stages there: all ranks of an EP group have the same.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from orchestrator.schedule.ir.actions import Action, ActionKind, Form, Program, Work, halved_of
from orchestrator.schedule.ir.grid import failure
from orchestrator.schedule.ir.operations import Operation, OperationStream, planned, timed


@dataclass(frozen=True, slots=True)
class StageOperations:
    """What a stage does with one microbatch. Each operation of compute of `backward` releases weight gradients, maybe none."""

    forward: tuple[Operation, ...]
    backward: tuple[Operation, ...]

    def streams(self, kind: ActionKind, parts: int) -> tuple[OperationStream, ...]:
        """Of one compute action: a stream for each part; weight gradients alone are one stream without operations."""
        if kind is ActionKind.BACKWARD_WEIGHT:
            weights = tuple(operation.weights for operation in self.backward if operation.weights is not None)
            return OperationStream(released=parts * weights),
        operations = self.forward if kind is ActionKind.FORWARD else self.backward
        if kind is ActionKind.BACKWARD_INPUT:
            operations = tuple(replace(operation, weights=None) for operation in operations)
        return (OperationStream(operations).scaled(1 / parts, 1 / parts),) * parts


def with_orders(programs: Sequence[Program], stages: Sequence[StageOperations], hosted: Sequence[Sequence[int]]
                ) -> tuple[Program, ...]:
    """The programs with the order of every form of action that they have.

    Args: stages: by stage. hosted: by position, its stages by slot.
    """
    return tuple(
        replace(program, orders=tuple((form, planned(streams_of(form, stages, hosted[program.position])).order)
                                      for form in dict.fromkeys(form for _, form in forms(program.actions))))
        for program in programs)


def check_orders(programs: Sequence[Program], stages: Sequence[StageOperations], hosted: Sequence[Sequence[int]]) -> None:
    """Every action has an order that issues every operation of its streams once, and no weight gradient before it is released.

    Raises ScheduleError, with the first action for which that is not so.
    """
    for program in programs:
        orders: Mapping[Form, tuple[int, ...]] = dict(program.orders)
        checked: set[Form] = set()
        for index, (action, form) in enumerate(forms(program.actions)):
            if form in checked:
                continue
            checked.add(form)
            try:
                timed(streams_of(form, stages, hosted[program.position]), orders[form])
            except (KeyError, ValueError) as error:
                reason = "has no order" if isinstance(error, KeyError) else str(error)
                row = [[a for a in p.actions if isinstance(a, Work)] for p in programs]
                raise failure(f"position {program.position}, action {index}: {action}: {reason}", row,
                              {program.position: index}) from None


def forms(actions: Iterable[Action]) -> Iterator[tuple[Work, Form]]:
    """The compute actions of a program, in order, with their forms."""
    computes = [action for action in actions if isinstance(action, Work)]
    halved = halved_of(computes)
    for action in computes:
        yield action, tuple((compute.kind, compute.slot, 1 + ((compute.slot, compute.microbatch) in halved))
                            for compute in action.computes)


def streams_of(form: Form, stages: Sequence[StageOperations], hosted: Sequence[int]) -> tuple[OperationStream, ...]:
    """Those of an action at a position that hosts the stages `hosted`, by slot."""
    return tuple(stream for kind, slot, parts in form for stream in stages[hosted[slot]].streams(kind, parts))
