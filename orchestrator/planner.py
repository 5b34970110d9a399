"""What a run would look like, before anything starts: layout, microbatches, memory."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from itertools import groupby

from orchestrator import cost, order, ownership, scheduling
from orchestrator.config import RunConfig
from orchestrator.layout import Layout
from orchestrator.schedule.check import peak_activations
from orchestrator.schedule.stages import SEARCHED, Stages, V

_NODES_SHOWN = 16


@dataclass(frozen=True)
class Plan:
    """`microbatches`, `empty`: of the first and of the last step. `memory`: by pipeline position, its fullest rank.
    `fewest_owners`: on how many nodes the worst-protected optimizer shard lives.
    """

    layout: Layout
    parameters: cost.Parameters
    microbatches: tuple[int, int]
    empty: tuple[int, int]
    memory: tuple[cost.Memory, ...]
    fewest_owners: int


def plan(config: RunConfig, layout: Layout) -> Plan:
    """Raises ConfigError where the schedule cannot run."""
    (first, first_empty), (last, last_empty) = (_microbatches(config, layout, step) for step in (0, config.training.steps - 1))
    buckets = ownership.buckets(config.model, layout, config.elastic.copies, config.layout.layers_per_stage)
    peaks = peak_activations(scheduling.schedule_of(config, layout.folding, max(first, last), training=True))
    ranks = cost.memory(config, layout, buckets, peaks)
    at_position = ([ranks[place.rank] for place in layout.places if place.position == p] for p in range(layout.pipeline))
    fullest = tuple(max(found, key=lambda memory: memory.total) for found in at_position)
    return Plan(layout, cost.parameters(config.model), (first, last), (first_empty, last_empty), fullest,
                min(len(owners) for bucket in buckets for owners in bucket.owners))


def _microbatches(config: RunConfig, layout: Layout, step: int) -> tuple[int, int]:
    """(M, empty microbatches over all streams) of a step."""
    dealt = order.deal(order.batch_size(config.training, step), streams=layout.streams,
                       entrances=len(layout.folding.paths), microbatch_sequences=config.training.microbatch_sequences,
                       smallest_microbatches=partial(scheduling.smallest_microbatches, config, layout.folding, training=True))
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
        *_node_lines(layout),
        *(_memory_line(layout, position, memory) for position, memory in enumerate(found.memory)),
        _state_line(config.elastic.copies, found.fewest_owners),
    ]


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


def _folded(config: RunConfig, stages: Stages) -> str:
    """What the kind and the number of positions do not say."""
    if stages.chunks == 1:
        return f", placement {stages.placement}" if config.schedule.kind == SEARCHED else ""
    form = "V" if stages.placement == V else stages.placement
    return f", {stages.count} stages, {stages.chunks} on each position in a {form}"


def _memory_line(layout: Layout, position: int, memory: cost.Memory) -> str:
    stages = layout.stages(position)
    named = f"stage{'s' if len(stages) > 1 else ''} {', '.join(map(str, stages))}"
    return (f"memory       position {position} ({named}): {_bytes(memory.total)} a rank = weights {_bytes(memory.weights)} + "
            f"gradients {_bytes(memory.gradients)} + optimizer {_bytes(memory.optimizer)} + activations "
            f"{_bytes(memory.activations)}, estimated")


def _state_line(copies: int, fewest_owners: int) -> str:
    kept = f"state        every optimizer shard on {fewest_owners} {'node' if fewest_owners == 1 else 'nodes'}"
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
