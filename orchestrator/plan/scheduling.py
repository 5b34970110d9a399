"""The schedule of a run: which one its configuration names, for a step of so many microbatches, and its programs."""

from __future__ import annotations

from dataclasses import replace
from functools import cache, partial

from orchestrator.config.run_config import ConfigError, CostsSection, RunConfig
from orchestrator.data import order
from orchestrator.layout.layout import Layout
from orchestrator.model import segments
from orchestrator.model.parameters import stage_layers
from orchestrator.schedule.ir.actions import Program, Schedule
from orchestrator.schedule.ir.check import ScheduleError, check, peak_activations
from orchestrator.schedule.ir.lower import lower
from orchestrator.schedule.ir.orders import StageOperations, check_orders, with_orders
from orchestrator.schedule.ir.stages import Stages
from orchestrator.schedule.kinds.forward_only import forward_only
from orchestrator.schedule.kinds.registry import TABLE
from orchestrator.schedule.search import most_kept, searched
from orchestrator.schedule.timing.durations import Durations, per_chunk


def smallest_microbatches(config: RunConfig, stages: Stages, wanted: int, *, training: bool) -> int:
    """The smallest number of microbatches of a step, all entrances together, that is legal and at least `wanted`."""
    return TABLE[config.schedule.kind].smallest_microbatches(stages, wanted) if training else stages.shared_evenly(wanted)


def dealt(config: RunConfig, layout: Layout, sequences: int, *, training: bool) -> order.Deal:
    """How a step of so many sequences is dealt to the streams of a layout, and in how many microbatches."""
    stages = layout.folding
    return order.deal(sequences, streams=layout.streams, entrances=len(stages.paths),
                      microbatch_sequences=config.training.microbatch_sequences,
                      smallest_microbatches=partial(smallest_microbatches, config, stages, training=training))


def schedule_of(config: RunConfig, stages: Stages, microbatches: int, *, training: bool) -> Schedule:
    """Raises ConfigError: the kind does not take these numbers."""
    if not training:
        return forward_only(stages, microbatches)
    kind = TABLE[config.schedule.kind]
    return _found(config, stages, microbatches) if kind.searched else kind.schedule(stages, microbatches)


def _found(config: RunConfig, stages: Stages, microbatches: int) -> Schedule:
    """By a search with the configured costs; refusals name the configuration's keys."""
    section = config.schedule
    layers, halves = max(1, config.model.num_hidden_layers // stages.positions), config.training.microbatch_sequences > 1
    try:
        return _searched(stages, microbatches, section.costs, layers, _most_activations(config), halves)
    except ConfigError as error:
        key = f"schedule.{error.key}" if error.key in type(section).model_fields else error.key
        raise ConfigError(key, error.value, error.allowed) from None


def programs_for(config: RunConfig, stages: Stages, microbatches: int, *, training: bool) -> tuple[Program, ...]:
    """Checked programs, one per position. Raises ConfigError; ScheduleError."""
    schedule = schedule_of(config, stages, microbatches, training=training)
    hosted, operations = tuple(map(stages.hosted, range(stages.positions))), operations_of_stages(config, stages)
    programs = with_orders(lower(schedule), operations, hosted)
    most = _most_activations(config) if training else None
    check(schedule, programs, most_activations=None if most is None else int(most * stages.chunks))
    check_orders(programs, operations, hosted)
    return programs


def proven(schedule: Schedule) -> tuple[Program, ...]:
    """Programs of a schedule, lowered and checked. Raises ConfigError with key `kind`: they would not run."""
    try:
        programs = lower(schedule)
        check(schedule, programs)
    except ScheduleError as error:
        raise does_not_run("kind", schedule.kind, schedule.stages, schedule.microbatches, error) from None
    return programs


def does_not_run(key: str, kind: str, stages: Stages, microbatches: int, error: ScheduleError) -> ConfigError:
    """The refusal of a kind whose schedule is wrong: the first line of what the checker says."""
    positions = f"{stages.positions} position{'s' * (stages.positions > 1)}"
    return ConfigError(key, kind, f"a kind whose schedule runs with {microbatches} microbatches on {positions} "
                                  f"({str(error).partition(chr(10))[0]})")


def most_activations_of(config: RunConfig, stages: Stages, microbatches: int) -> tuple[int, ...]:
    """What `peak_activations` of a step's schedule cannot exceed, by position, without the search for it."""
    if not TABLE[config.schedule.kind].searched:
        return peak_activations(schedule_of(config, stages, microbatches, training=True))
    most = most_kept(stages, microbatches, _most_activations(config))
    return (most,) * stages.positions


def operations_of_stages(config: RunConfig, stages: Stages) -> tuple[StageOperations, ...]:
    """What each stage does with one microbatch: `schedule.costs`, which are of a whole position, dealt evenly to its layers."""
    model, costs = config.model, config.schedule.costs
    layers = max(1, model.num_hidden_layers // stages.positions)
    names = ("forward", "backward_input", "backward_weight", "dispatch", "combine")
    of_layer = segments.LayerCosts(**{name: getattr(costs, name) / layers for name in names})
    per_stage = stage_layers(model, stages.count, config.layout.layers_per_stage)
    return tuple(
        segments.stage_operations(model, of_stage, first=stage == 0, last=stage == stages.count - 1,
                                  length=config.data.sequence_length, costs=of_layer)
        for stage, of_stage in enumerate(per_stage))


def durations_of(costs: CostsSection, stages: Stages, layers: int) -> Durations:
    """Durations of each stage. `layers`: of a whole position."""
    return per_chunk(Durations(**costs.model_dump(), layers=layers), stages)


def durations_of_run(config: RunConfig, stages: Stages) -> Durations:
    """Durations with the operations of the run's own stages, from which its programs have their orders."""
    layers = max(1, config.model.num_hidden_layers // stages.positions)
    return replace(durations_of(config.schedule.costs, stages, layers), stages=operations_of_stages(config, stages))


@cache
def _searched(stages: Stages, microbatches: int, costs: CostsSection, layers: int, bound: float | None, halves: bool) -> Schedule:
    """A search takes seconds: once for each number of microbatches. `halves`: there are sequences enough to cut in two."""
    return searched(stages, microbatches, durations_of(costs, stages, layers), most_activations=bound, splits=halves).schedule


def _most_activations(config: RunConfig) -> float | None:
    return None if config.schedule.most_activations == "auto" else config.schedule.most_activations
