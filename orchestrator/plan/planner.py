"""What a run would look like, before anything starts: layout, microbatches, expert placement, memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import groupby

from orchestrator.config.run_config import ModelConfig, RunConfig
from orchestrator.data import order
from orchestrator.layout.balance import Ranks, balanced, most_nodes, unevenness
from orchestrator.layout.layout import Layout
from orchestrator.layout.placement import default_placement, evenly_placed, place_experts
from orchestrator.plan import cost, scheduling
from orchestrator.schedule.ir.check import ScheduleError, peak_activations
from orchestrator.schedule.ir.stages import Stages, V
from orchestrator.schedule.kinds.registry import has_chosen_placement
from orchestrator.state import ownership

_NODES_SHOWN = 16


@dataclass(frozen=True, slots=True)
class Spread:
    """A way to place the experts of an EP group. unevenness: experts of its fullest rank, divided by the mean; nodes: the most
    that a token can reach."""

    unevenness: float
    nodes: int


@dataclass(frozen=True, slots=True)
class Experts:
    """How the experts of replicas of one size are placed, and what would be evener.

    rows: experts of each row. parts: of each of the `over` groups that are left over; 1: they are whole. cut: with them in
    so many parts. data: number of replicas, and the unevenness that the worst of them has.
    """

    replicas: tuple[int, ...]
    rows: tuple[int, ...]
    groups: int
    over: int
    parts: int
    placed: Spread
    cut: dict[int, Spread]
    data: tuple[int, float] | None


@dataclass(frozen=True)
class Plan:
    """`microbatches`, `empty`: of the first and of the last step. `memory`: by pipeline position, its fullest rank.
    `fewest_owners`: on how many nodes the worst-protected optimizer shard lives. `proven`: whether the schedules of these
    microbatches were lowered and checked; if not, activations are the most that a schedule of this kind keeps.
    """

    layout: Layout
    parameters: cost.Parameters
    microbatches: tuple[int, int]
    empty: tuple[int, int]
    memory: tuple[cost.Memory, ...]
    fewest_owners: int
    experts: tuple[Experts, ...]
    proven: bool


Peaks = tuple[int, ...]
Bounded = Callable[[Callable[[], Peaks]], Peaks | None]
"""Calls what it is given; None: that took too long."""


def plan(config: RunConfig, layout: Layout, bounded: Bounded = lambda prove: prove()) -> Plan:
    """bounded: a bound on the time to find, lower and check the schedules of the first and of the last step.

    Raises ConfigError where a schedule cannot run.
    """
    (first, first_empty), (last, last_empty) = (_microbatches(config, layout, step) for step in (0, config.training.steps - 1))
    per_stage = config.layout.layers_per_stage
    placement = default_placement(config.model, layout, per_stage, config.layout.group_parts)
    buckets = ownership.buckets(config.model, layout, config.elastic.copies, per_stage, placement, config.precision)
    peaks = bounded(partial(_proven, config, layout.folding, {first, last}))
    most = scheduling.most_activations_of(config, layout.folding, max(first, last)) if peaks is None else peaks
    ranks = cost.memory(config, layout, buckets, most)
    at_position = ([ranks[place.rank] for place in layout.places if place.position == p] for p in range(layout.pipeline))
    fullest = tuple(max(found, key=lambda memory: memory.total) for found in at_position)
    return Plan(layout, cost.parameters(config.model), (first, last), (first_empty, last_empty), fullest,
                min(len(owners) for bucket in buckets for owners in bucket.owners), _experts(config, layout), peaks is not None)


def _proven(config: RunConfig, stages: Stages, microbatches: set[int]) -> Peaks:
    """Peak activations of the largest of these steps, by position, once the programs of all are lowered and checked."""
    for number in sorted(microbatches):
        try:
            scheduling.programs_for(config, stages, number, training=True)
        except ScheduleError as error:
            raise scheduling.does_not_run("schedule.kind", config.schedule.kind, stages, number, error) from None
    return peak_activations(scheduling.schedule_of(config, stages, max(microbatches), training=True))


def _experts(config: RunConfig, layout: Layout) -> tuple[Experts, ...]:
    """By number of rows, at the first position; under the same load on all experts."""
    model, parts = config.model, config.layout.group_parts
    of_size: dict[int, list[int]] = {}
    for replica, rows in enumerate(layout.replicas):
        of_size.setdefault(len(rows), []).append(replica)
    found = []
    for rows, replicas in of_size.items():
        nodes = [layout.places[rank].node for rank in layout.expert_group(replicas[0], 0)]
        placed = place_experts(model, layout, replicas[0], 0, parts)
        experts = [sum(map(len, placed[row * layout.width : (row + 1) * layout.width])) for row in range(rows)]
        cut = _cut(model, rows, nodes, layout.width) if model.n_group % rows else {}
        data = _evener_replicas(model, layout, parts) if config.layout.expert == "auto" and cut else None
        over = model.n_group % rows
        found.append(Experts(tuple(replicas), tuple(experts), model.n_group, over, parts if over else 1,
                             _spread(model, placed, nodes), cut, data))
    return tuple(found)


def _spread(model: ModelConfig, experts: Ranks, nodes: list[str]) -> Spread:
    return Spread(unevenness([1.0] * model.n_routed_experts, experts),
                  most_nodes(experts, nodes, model.n_group, model.topk_group, model.num_experts_per_tok))


def _cut(model: ModelConfig, rows: int, nodes: list[str], width: int) -> dict[int, Spread]:
    """In two parts, and in the fewest that leave the ranks as even as any number does."""
    even = [1.0] * model.n_routed_experts
    tried = {parts: _spread(model, balanced(even, model.n_group, rows, width, parts), nodes)
             for parts in range(2, min(rows, model.experts_per_group) + 1)}
    best = min(tried, key=lambda parts: (tried[parts].unevenness, parts))
    return {parts: tried[parts] for parts in sorted({2, best})}


def _evener_replicas(model: ModelConfig, layout: Layout, parts: int) -> tuple[int, float] | None:
    """The fewest further replicas among which the same rows can be dealt so that the worst is evener than the worst is now."""
    even = [1.0] * model.n_routed_experts

    def worst(sizes: set[int]) -> float:
        return max(unevenness(even, evenly_placed(model, size, layout.width, parts)) for size in sizes)

    now = worst(set(map(len, layout.replicas)))
    for count in range(len(layout.replicas) + 1, layout.rows + 1):
        found = worst({layout.rows // count, -(-layout.rows // count)})
        if found < now:
            return count, found
    return None


def _microbatches(config: RunConfig, layout: Layout, step: int) -> tuple[int, int]:
    """(M, empty microbatches over all streams) of a step."""
    dealt = scheduling.dealt(config, layout, order.batch_size(config.training, step), training=True)
    return dealt.microbatches, sum(not part for stream in dealt.held for entrance in stream for part in entrance)


def describe(config: RunConfig, found: Plan) -> list[str]:
    """The plan as lines of text."""
    layout, training = found.layout, config.training
    first, last = order.batch_size(training, 0), order.batch_size(training, training.steps - 1)
    growth = "" if first == last else f" (growing from {first})"
    counts, microbatches = found.parameters, found.microbatches[1]
    mtp = f" (and {_count(counts.mtp)} for multi-token prediction)" if counts.mtp else ""
    return [
        (f"model        {_count(counts.main)} parameters{mtp}, {_count(counts.active)} used by a token; "
         f"{training.dtype}, recompute {training.recompute}"),
        f"layout       {layout.describe()}",
        (f"step         {last} sequences{growth} of {config.data.sequence_length} tokens; {microbatches} microbatches of "
         f"{training.microbatch_sequences} on each of {layout.streams} streams, "
         f"{found.empty[1]} of {microbatches * layout.streams} empty"),
        f"schedule     {config.schedule.kind}{_folded(config, layout.folding)}" + (
            " (one position: no pipeline)" if layout.pipeline == 1 else ""),
        _programs_line(found),
        *_node_lines(layout),
        *(line for experts in found.experts if experts.cut for line in _experts_lines(experts, len(layout.replicas))),
        *(_memory_line(layout, position, memory) for position, memory in enumerate(found.memory)),
        _state_line(config.elastic.copies, found.fewest_owners),
    ]


def _programs_line(found: Plan) -> str:
    numbers = " and ".join(map(str, sorted(set(found.microbatches))))
    if found.proven:
        return f"programs     lowered and checked for {numbers} microbatches: complete, in order, free of deadlock"
    return (f"programs     not checked for {numbers} microbatches, since the time for it ran out; activations are the most that "
            "this kind of schedule may keep")


def _node_lines(layout: Layout) -> list[str]:
    """Which ranks a node has, run by run of one (row, position); of many nodes only the first."""
    of_node: dict[str, list[str]] = {node: [] for node in layout.nodes}
    for (node, row, position), places in groupby(layout.places, key=lambda place: (place.node, place.row, place.position)):
        ranks = [place.rank for place in places]
        numbers = f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranks[0]}-{ranks[-1]}"
        of_node[node].append(f"{numbers} (row {row}, position {position})")
    lines = [f"node         {node}: {', '.join(runs)}" for node, runs in of_node.items()]
    more = len(lines) - _NODES_SHOWN
    return lines if more <= 0 else [*lines[:_NODES_SHOWN], f"node         and {more} more"]


def _experts_lines(experts: Experts, replicas: int) -> list[str]:
    """Of replicas whose rows hold unequal numbers of expert groups."""
    where = "" if replicas == len(experts.replicas) else f"replica {', '.join(map(str, experts.replicas))}: "
    placed = experts.placed
    size = sum(experts.rows) // experts.groups
    if experts.parts == 1:
        held, counts = "", [count // size for count in experts.rows]
    else:
        held, counts = f", {experts.over} of them cut in {experts.parts},", experts.rows
    line = (f"{where}{experts.groups} groups{held} on {len(experts.rows)} rows ({', '.join(map(str, counts))}"
            f"{' experts' if held else ''}), the fullest rank {placed.unevenness:.2f} x the mean; a token reaches at most "
            f"{_nodes(placed.nodes)}")
    evener = [f"{experts.data[1]:.2f} x with layout.data = {experts.data[0]}, at the price of memory"] if experts.data else []
    evener += [f"{spread.unevenness:.2f} x, but up to {_nodes(spread.nodes)}, with layout.group_parts = {parts}"
               for parts, spread in experts.cut.items() if spread.unevenness < placed.unevenness]
    return [f"experts      {text}" for text in [line, *(["evener: " + "; ".join(evener)] if evener else [])]]


def _nodes(count: int) -> str:
    return f"{count} {'node' if count == 1 else 'nodes'}"


def _folded(config: RunConfig, stages: Stages) -> str:
    """What the kind and the number of positions do not say."""
    if stages.chunks == 1:
        return f", placement {stages.placement}" if has_chosen_placement(config.schedule.kind) else ""
    form = "V" if stages.placement == V else stages.placement
    return f", {stages.count} stages, {stages.chunks} on each position in a {form}"


def _memory_line(layout: Layout, position: int, memory: cost.Memory) -> str:
    stages = layout.stages(position)
    named = f"stage{'s' if len(stages) > 1 else ''} {', '.join(map(str, stages))}"
    return (f"memory       position {position} ({named}): {_bytes(memory.total)} a rank = weights {_bytes(memory.weights)} + "
            f"gradients {_bytes(memory.gradients)} + optimizer {_bytes(memory.optimizer)} + activations "
            f"{_bytes(memory.activations)}, estimated")


def _state_line(copies: int, fewest_owners: int) -> str:
    kept = f"state        every optimizer shard on {_nodes(fewest_owners)}"
    if fewest_owners > copies:
        return kept
    lost = "any node" if fewest_owners == 1 else f"{fewest_owners} nodes"
    return f"{kept} (elastic.copies wants {1 + copies}: too few nodes; losing {lost} means going back to a checkpoint)"


def _count(number: int) -> str:
    for factor, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= factor:
            return f"{number / factor:.1f}{unit}"
    return str(number)


def _bytes(number: int) -> str:
    for factor, unit in ((1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB")):
        if number >= factor:
            return f"{number / factor:.1f} {unit}"
    return f"{number} B"
