"""What a run would look like, before anything starts: layout, microbatches, memory."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from orchestrator import cost, order, ownership
from orchestrator.config import RunConfig
from orchestrator.layout import Layout
from orchestrator.schedule.check import peak_activations
from orchestrator.schedule.dualpipe import dualpipe, smallest_microbatches


@dataclass(frozen=True)
class Plan:
    """`microbatches`, `empty`: of the first and of the last step. `memory`: by pipeline position, its fullest rank.

    `fewest_owners`: on how many nodes the worst-protected optimizer shard lives.
    """

    layout: Layout
    parameters: int
    active_parameters: int
    microbatches: tuple[int, int]
    empty: tuple[int, int]
    memory: tuple[cost.Memory, ...]
    fewest_owners: int


def plan(config: RunConfig, layout: Layout) -> Plan:
    """Raises ValueError where the schedule cannot run."""
    total, active = cost.parameter_count(config.model)
    counts = [_microbatches(config, layout, step) for step in (0, config.training.steps - 1)]
    buckets = ownership.buckets(config.model, layout, config.elastic.copies, config.layout.layers_per_stage)
    peaks = peak_activations(dualpipe(layout.pipeline, max(m for m, _ in counts)))
    memory = []
    for position in range(layout.pipeline):
        ranks = [place.rank for place in layout.places if place.position == position]
        estimates = (cost.memory(config, layout, buckets, rank, peaks[position]) for rank in ranks[: _EXAMINED])
        memory.append(max(estimates, key=lambda found: found.total))
    return Plan(layout, total, active, (counts[0][0], counts[1][0]), (counts[0][1], counts[1][1]), tuple(memory),
                min(len(owners) for bucket in buckets for owners in bucket.owners))


_EXAMINED = 64  # ranks of one position differ by a few shards at most


def _microbatches(config: RunConfig, layout: Layout, step: int) -> tuple[int, int]:
    """(M, empty microbatches over all streams) of a step."""
    dealt = order.deal(order.batch_size(config.training, step), streams=layout.streams, pipeline=layout.pipeline,
                       microbatch_sequences=config.training.microbatch_sequences,
                       smallest_microbatches=partial(smallest_microbatches, layout.pipeline))
    return dealt.microbatches, sum(not part for stream in dealt.held for slot in stream for part in slot)


def describe(config: RunConfig, found: Plan) -> list[str]:
    """The plan as lines of text."""
    layout, training = found.layout, config.training
    first, last = order.batch_size(training, 0), order.batch_size(training, training.steps - 1)
    growth = "" if first == last else f" (growing from {first})"
    lines = [
        f"model        {_count(found.parameters)} parameters, {_count(found.active_parameters)} used by a token; "
        f"{training.dtype}, recompute {training.recompute}",
        f"layout       {layout.describe()}",
        f"step         {last} sequences{growth} of {config.data.sequence_length} tokens; "
        f"{found.microbatches[1]} microbatches of {training.microbatch_sequences} on {layout.streams} streams, "
        f"{found.empty[1]} of {found.microbatches[1] * layout.streams} empty",
        f"schedule     {config.schedule.kind}" + (" (one position: no pipeline)" if layout.pipeline == 1 else ""),
    ]
    for node in layout.nodes[:_EXAMINED]:
        here = [place for place in layout.places if place.node == node]
        lines.append(f"node         {node}: " + ", ".join(f"rank {p.rank} (row {p.row}, position {p.position})" for p in here))
    for position, memory in enumerate(found.memory):
        stages = ", ".join(map(str, layout.stages(position)))
        lines.append(f"memory       position {position} (stages {stages}): {_bytes(memory.total)} a rank = weights "
                     f"{_bytes(memory.weights)} + gradients {_bytes(memory.gradients)} + optimizer {_bytes(memory.optimizer)} "
                     f"+ activations {_bytes(memory.activations)}, estimated")
    wanted = 1 + config.elastic.copies
    note = "" if found.fewest_owners >= wanted else f" (elastic.copies wants {wanted}: too few nodes; losing a node means going back to a checkpoint)"
    lines.append(f"state        every optimizer shard on {found.fewest_owners} node(s){note}")
    return lines


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
