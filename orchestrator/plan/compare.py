"""Schedules side by side: what the same work costs in each.

The unit is F, the forward of one microbatch through all layers of a rank, so kinds that cut a rank's layers in chunks are
comparable with those that do not. Shares are of the makespan, means over ranks: compute (the efficiency), exposed
communication and bubble add up to 1.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from orchestrator.plan.scheduling import proven
from orchestrator.refusal import ConfigError
from orchestrator.schedule.ir.actions import ActionKind, Schedule
from orchestrator.schedule.ir.check import relative_activations
from orchestrator.schedule.ir.stages import BOTH, SEARCHED, Stages
from orchestrator.schedule.kinds.registry import KINDS, TABLE, generate
from orchestrator.schedule.search import options_for, search
from orchestrator.schedule.search.portfolio import EFFORT
from orchestrator.schedule.timing.durations import Durations, per_chunk
from orchestrator.schedule.timing.simulate import simulate

CHUNKS = (2, 4)
"""Of kinds that leave a choice, as far as a rank has so many layers."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """durations: of the schedule's stages. lower_bound: of the makespan, in their unit, if one is known."""

    name: str
    schedule: Schedule
    durations: Durations
    lower_bound: float | None = None


@dataclass(frozen=True, slots=True)
class Result:
    """One line of the table.

    makespan, lower_bound: in F. bubble, exposed, efficiency: shares of the makespan. activations: most on any rank, in
    microbatches on all its layers. copies: of the parameters. messages: tensors from rank to rank in a step, all ranks.
    """

    name: str
    makespan: float
    efficiency: float
    bubble: float
    exposed: float
    activations: float
    copies: int
    messages: int
    lower_bound: float | None = None

    @property
    def above_bound(self) -> float | None:
        """How much longer than the bound, as a share of it."""
        return None if self.lower_bound is None else self.makespan / self.lower_bound - 1


@dataclass(frozen=True, slots=True)
class Refused:
    """A kind that does not take these numbers, and why."""

    name: str
    reason: str


def contestants(positions: int, microbatches: int, durations: Durations) -> tuple[list[Candidate], list[Refused]]:
    """All kinds. `durations`: of a whole rank, single numbers; its `layers` are those of a rank."""
    found: list[Candidate] = []
    refused: list[Refused] = []
    for kind in KINDS:
        own = TABLE[kind].chunks
        for chunks in [own] if own else [number for number in CHUNKS if durations.layers % number == 0] or [1]:
            name = kind if own else f"{kind}, {chunks} chunks"
            try:
                schedule = generate(kind, positions, microbatches, chunks)
            except ConfigError as error:
                refused.append(_refused(name, error))
            else:
                found.append(Candidate(name, schedule, per_chunk(durations, schedule.stages)))
    return found, refused


def searched_contestants(positions: int, microbatches: int, durations: Durations, most_activations: float, *,
                         effort: int = EFFORT) -> tuple[list[Candidate], list[Refused]]:
    """What a search finds: where DualPipe has its stages and within its memory, without split microbatches; and anywhere,
    with split microbatches and `most_activations`. Takes as long as two searches.

    durations: of a whole rank, single numbers.
    """
    wanted = {
        f"{SEARCHED} like dualpipe": {"placement": BOTH, "splits": False},
        f"{SEARCHED} within {most_activations:g} activations": {"most_activations": most_activations},
    }
    found: list[Candidate] = []
    refused: list[Refused] = []
    for name, choice in wanted.items():
        try:
            options = options_for(positions, microbatches, durations.layers, **choice)
            best = search(microbatches, durations, options, effort=effort)
        except ConfigError as error:
            refused.append(_refused(name, error))
        else:
            stages = best.schedule.stages
            found.append(Candidate(f"{name}, {_folded(stages)}", best.schedule, per_chunk(durations, stages), best.lower_bound))
    return found, refused


def _folded(stages: Stages) -> str:
    return f"{stages.placement} x {stages.chunks}" if stages.chunks > 1 else stages.placement


def _refused(name: str, error: ConfigError) -> Refused:
    key = {"positions": "ranks"}.get(error.key, error.key)
    return Refused(name, f"{key} = {error.value}: {error.allowed}")


def compare(found: Iterable[Candidate]) -> list[Result]:
    """In the same order, each lowered and checked. Raises ConfigError with key `kind`: one would not run."""
    return [_result(contestant) for contestant in found]


def _result(contestant: Candidate) -> Result:
    schedule, stages = contestant.schedule, contestant.schedule.stages
    timeline = simulate(schedule, contestant.durations)
    ranks = timeline.figures()
    forward = contestant.durations.forward
    unit = stages.chunks * (sum(forward) / len(forward) if isinstance(forward, Sequence) else forward)
    bound = contestant.lower_bound
    return Result(
        name=contestant.name,
        makespan=timeline.makespan / unit,
        efficiency=sum(rank.compute_seconds for rank in ranks) / len(ranks) / timeline.makespan,
        bubble=sum(rank.bubble_ratio for rank in ranks) / len(ranks),
        exposed=sum(rank.exposed_communication_seconds for rank in ranks) / len(ranks) / timeline.makespan,
        activations=max(relative_activations(schedule)),
        copies=max(len(stages.holders(stage)) for stage in range(stages.count)),
        messages=sum(action.kind is ActionKind.SEND for program in proven(schedule) for action in program.actions),
        lower_bound=None if bound is None else bound / unit)


_HEADS = ("schedule", "makespan F", "efficiency", "bubble", "exposed", "activations", "parameters", "messages")


def table(results: Sequence[Result], refused: Iterable[Refused] = ()) -> str:
    """As text: a line each, then a line for each bound, then one for each refused kind."""
    cells = [_HEADS, *((
        row.name, f"{row.makespan:.2f}", *(f"{100 * share:.1f} %" for share in (row.efficiency, row.bubble, row.exposed)),
        f"{row.activations:.4g}", f"{row.copies} x", str(row.messages)) for row in results)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ["  ".join([line[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True))])
             for line in cells]
    lines += [f"{row.name}: no schedule with the same choices is below {row.lower_bound:.2f} F; "
              f"this one is {100 * row.above_bound:.1f} % above" for row in results if row.lower_bound is not None]
    lines += [f"{one.name}: not with {one.reason}" for one in refused]
    return "".join(f"{line.rstrip()}\n" for line in lines)


def as_objects(results: Iterable[Result], refused: Iterable[Refused] = ()) -> dict[str, object]:
    """The same for a program; `makespan` and `lower_bound` in F."""
    names = ("makespan", "efficiency", "bubble", "exposed", "activations", "copies", "messages", "lower_bound", "above_bound")
    return {"schedules": [{"schedule": row.name, **{name: getattr(row, name) for name in names}} for row in results],
            "refused": {one.name: one.reason for one in refused}}
