"""The layout after a change of nodes: the best for those that are alive, as near to the old one as that allows.

Contract: pure; any number of nodes from one rank up. `relaid` takes the configuration as the user wrote it, not the one that an
earlier change returned, so that a run grows back when its nodes do. In this order:
1. The old shape, where a row fits, at most `MOST_IDLE` of the ranks idle and two nodes are used if there are two. Rows that are
   whole stay; spares fill the holes of others, broken rows pool into whole ones, what is left makes new rows or is spare.
2. Else the shape (the old one included) with the highest predicted throughput.
3. Where no row of the pipeline fits: pins of `layout` become auto, then the pipeline shorter; with a number of positions, or of
   layers, that the kind does not take, the kind changes as well.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import combinations

from orchestrator.config.run_config import ConfigError, CostsSection, RunConfig, check
from orchestrator.layout import layout as layouts
from orchestrator.layout.balance import unevenness
from orchestrator.layout.layout import Layout
from orchestrator.layout.placement import evenly_placed
from orchestrator.model.parameters import stage_layers
from orchestrator.plan.scheduling import dealt
from orchestrator.schedule.ir.stages import BOTH, Stages
from orchestrator.schedule.kinds.registry import KINDS, TABLE
from orchestrator.schedule.timing.durations import Durations
from orchestrator.schedule.timing.simulate import makespan
from orchestrator.topology import Node

MOST_IDLE = 0.2
_PINS = ("data", "expert", "shape")
"""Of two that might be given up with the same gain, the earlier one is."""

Cell = tuple[str, int]
Row = tuple[Cell, ...]


@dataclass(frozen=True)
class Relaid:
    """`config`: with the pipeline, kind and pins of this layout. notes: what differs from the configuration, a sentence each."""

    config: RunConfig
    layout: Layout
    notes: tuple[str, ...] = ()


def relaid(config: RunConfig, nodes: tuple[Node, ...], old: Layout | None) -> Relaid:
    """`nodes`: those alive, with the ranks that may be used. `old`: of the generation before; None: there is none.

    Raises ConfigError: there is no rank.
    """
    for alternatives in _adapted(config):
        found = [Relaid(adapted, layout, notes) for adapted, notes in alternatives if (layout := _best(adapted, nodes, old))]
        if found:
            return min(found, key=lambda relaid: predicted_duration(relaid.config, relaid.layout))
    return Relaid(config, layouts.choose(nodes, config.layout, config.model, config.stages))  # refuses


# ---- which configuration can be met

def _adapted(config: RunConfig) -> Iterator[list[tuple[RunConfig, tuple[str, ...]]]]:
    """The configuration, then what comes nearest to it: without one pin, two, three; then with shorter pipelines. Each time the
    alternatives, with what differs."""
    for pipeline in range(config.layout.pipeline, 0, -1):
        if shorter := config if pipeline == config.layout.pipeline else _shortened(config, pipeline):
            notes = tuple(_changes(config, shorter))
            pins = [key for key in _PINS if getattr(shorter.layout, key) != "auto"]
            for count in range(len(pins) + 1):
                yield [(_with(shorter, layout=dict.fromkeys(freed, "auto")),
                        (*notes, *(f"layout.{key} = {_shown(shorter, key)} cannot be met: auto" for key in freed)))
                       for freed in combinations(pins, count)]


def _shortened(config: RunConfig, pipeline: int) -> RunConfig | None:
    """With so many positions, and the first kind of schedule that takes them."""
    layout: dict = {"pipeline": pipeline}
    if config.layout.layers_per_stage != "auto":
        layout["layers_per_stage"] = "auto"
    if config.layout.shape != "auto" and pipeline % config.layout.shape[0]:
        layout["shape"] = "auto"
    free = {"chunks": "auto", "placement": "auto"}
    schedules: list[dict] = [{}]
    kind = TABLE[config.schedule.kind]
    if kind.stage_placement is None:
        schedules.append(free)
    schedules += [{"kind": other, "most_activations": "auto", **free} for other in kind.instead]
    for schedule in schedules:
        changed = _with(config, layout=layout, schedule=schedule)
        try:
            check(changed)
        except ConfigError:
            continue
        return changed
    return None


def _with(config: RunConfig, **sections: dict) -> RunConfig:
    return config.model_copy(update={name: getattr(config, name).model_copy(update=values) for name, values in sections.items()})


def _changes(config: RunConfig, shorter: RunConfig) -> Iterator[str]:
    if shorter is config:
        return
    yield f"layout.pipeline = {config.layout.pipeline} does not fit: {shorter.layout.pipeline}"
    for section, key in (("layout", "layers_per_stage"), ("layout", "shape"), ("schedule", "kind"), ("schedule", "chunks"),
                         ("schedule", "placement"), ("schedule", "most_activations")):
        before, after = getattr(getattr(config, section), key), getattr(getattr(shorter, section), key)
        if before != after:
            yield (f"{section}.{key} = {list(before) if isinstance(before, tuple) else before} does not go with "
                   f"{shorter.layout.pipeline} positions: {after}")


def _shown(config: RunConfig, key: str) -> int | list[int]:
    value = getattr(config.layout, key)
    return list(value) if isinstance(value, tuple) else value


# ---- the best layout of one configuration

def _best(config: RunConfig, nodes: tuple[Node, ...], old: Layout | None) -> Layout | None:
    available, enough = sum(node.ranks for node in nodes), min(2, sum(node.ranks > 0 for node in nodes))
    kept = _kept(config, nodes, old) if old and old.folding == config.stages else None
    if kept and available - kept.size <= MOST_IDLE * available and len(kept.nodes) >= enough:
        return kept
    candidates = [kept] if kept else []
    for c, k in _shapes(config, nodes):
        fresh = layouts.with_shape(nodes, config.layout, config.model, config.stages, c, k)
        if fresh and not (kept and (c, k) == _shape(kept)):
            candidates.append(fresh)
    return max(candidates, default=None, key=lambda found: (
        len(found.nodes) >= enough, -round(predicted_duration(config, found), 6), found is kept, found.size,
        -layouts.cells_per_node(found), found.rows, found.positions_per_node))


def _shape(layout: Layout) -> tuple[int, int]:
    return layout.positions_per_node, layout.width


def _shapes(config: RunConfig, nodes: tuple[Node, ...]) -> list[tuple[int, int]]:
    if config.layout.shape != "auto":
        return [config.layout.shape]
    pipeline, most = config.layout.pipeline, max((node.ranks for node in nodes), default=0)
    return [(c, k) for c in range(1, pipeline + 1) if pipeline % c == 0 for k in range(1, most // c + 1)]


def predicted_duration(config: RunConfig, layout: Layout) -> float:
    """Of a step of the full batch, in units of `schedule.costs`.

    That of the schedule, by simulation, for the microbatches that its streams have, times the work of the fullest rank: half of
    compute is that of experts, which is as uneven as the experts of a node are. What links cost, and memory, is not looked at.
    """
    stages = layout.folding
    microbatches = dealt(config, layout, config.training.batch_sequences, training=True).microbatches
    layers = tuple(map(len, stage_layers(config.model, stages.count, config.layout.layers_per_stage)))
    even = [1.0] * config.model.n_routed_experts
    uneven = max(unevenness(even, evenly_placed(config.model, rows, layout.width, config.layout.group_parts))
                 for rows in set(map(len, layout.replicas)))
    line = _line(*_simulated(config.schedule.kind, stages), layers, config.schedule.costs)
    return line.at(microbatches) * (1 + (uneven - 1) / 2)


def _simulated(kind: str, stages: Stages) -> tuple[str, Stages]:
    """The kind itself, or for a searched schedule, which takes seconds to find, one with the same stages, or as many chunks."""
    if not TABLE[kind].searched:
        return kind, stages
    alike = [name for name in KINDS if TABLE[name].predicts_searched]
    if (same := next((name for name in alike if TABLE[name].fits(stages)), None)) is not None:
        return same, stages
    any_chunks = next(name for name in alike if TABLE[name].chunks is None)
    return any_chunks, TABLE[any_chunks].stages(stages.positions, stages.chunks)


@dataclass(frozen=True, slots=True)
class _LinearTime:
    start: float
    each: float

    def at(self, microbatches: int) -> float:
        return self.start + self.each * microbatches


@cache
def _line(kind: str, stages: Stages, layers: tuple[int, ...], costs: CostsSection) -> _LinearTime:
    """Duration of a schedule by its microbatches: a filling that they share, and the same time for each, from two short ones."""
    found = TABLE[kind]
    whole = sum(layers) / stages.positions
    durations = Durations(hop=costs.hop, layers=max(1, max(layers)), **{
        name: tuple(getattr(costs, name) * count / whole for count in layers)
        for name in ("forward", "backward_input", "backward_weight", "dispatch", "combine")})
    few = found.smallest_microbatches(stages, 2 * stages.positions)
    more = found.smallest_microbatches(stages, few + 2 * stages.positions)
    short, long = (makespan(found.schedule(stages, number), durations) for number in (few, more))
    each = (long - short) / (more - few)
    return _LinearTime(short - each * few, each)


# ---- keeping the shape

def _kept(config: RunConfig, nodes: tuple[Node, ...], old: Layout) -> Layout | None:
    """In the old shape: whole rows as they were and in their order, then repaired ones in theirs, then new ones."""
    c, k = _shape(old)
    if config.layout.shape not in ("auto", (c, k)):
        return None
    cells, length = layouts.cells_of(nodes, c * k), old.pipeline // c
    alive = set(cells)
    rows = dict(enumerate(old.cells))
    broken = sorted((row for row in rows if not alive.issuperset(rows[row])),
                    key=lambda row: sum(cell not in alive for cell in rows[row]))
    used = {cell for row in rows.values() for cell in row}
    pool = [(None, cell) for cell in cells if cell not in used]  # where it was in its row, cell
    left = sum(cell in alive for row in broken for cell in rows[row]) + len(pool)
    mended, given_up = broken[: left // length], broken[left // length :]
    pool += [(index, cell) for row in given_up for index, cell in enumerate(rows.pop(row)) if cell in alive]
    for row in mended:
        rows[row] = _filled(rows[row], alive, pool, apart=old.folding.placement == BOTH)
    spare = {cell for _, cell in pool}
    spares = [cell for cell in cells if cell in spare]
    new = [tuple(spares[at : at + length]) for at in range(0, len(spares) - length + 1, length)]
    if old.folding.placement == BOTH:
        new = list(map(layouts.mirrors_apart, new))
    dealt = layouts.deal_rows(len(rows) + len(new), k, config.layout, config.model)
    if dealt is None:
        return None
    homes = ([*sorted(rows), *[None] * len(new)])[: sum(map(len, dealt))]
    found = ([rows[row] for row in sorted(rows)] + new)[: len(homes)]
    return Layout(old.folding, c, k, tuple(found), _replicas(old, homes, len(dealt)))


def _filled(row: Row, alive: set[Cell], pool: list[tuple[int | None, Cell]], *, apart: bool) -> Row:
    """With cells of `pool`, which they leave, in place of those that are gone: rather not on the node of the cell with the same
    stages, rather one that had the same place in a row, or its mirror's, and so has the stages already."""
    found: list[Cell | None] = [cell if cell in alive else None for cell in row]

    def opposite(index: int) -> int:
        return len(row) - 1 - index if apart else index

    on = {node for _, (node, _) in pool}
    holes = [index for index, cell in enumerate(found) if cell is None]
    for index in sorted(holes, key=lambda index: (found[opposite(index)] or ("",))[0] not in on):  # those with least choice first
        mirror = opposite(index)
        beside = found[mirror][0] if found[mirror] else None
        best = min(pool, key=lambda entry: (apart and entry[1][0] == beside, entry[0] not in (index, mirror)))
        pool.remove(best)
        found[index] = best[1]
    return tuple(found)


def _replicas(old: Layout, homes: Sequence[int | None], count: int) -> tuple[tuple[int, ...], ...]:
    """Rows of each of `count` replicas, near-equal. `homes`: a row's old number; None: it is new.

    A row stays in its replica where it can. Of those that move, each rather goes where nobody had its index, for rows with the
    same index in their replicas have the same experts.
    """
    part = {row: (replica, index) for replica, rows in enumerate(old.replicas) for index, row in enumerate(rows)}
    members: list[list[int]] = [[] for _ in old.replicas]
    rest = []
    for row, home in enumerate(homes):
        (rest if home is None else members[part[home][0]]).append(row)
    fullest = sorted(range(len(members)), key=lambda replica: -len(members[replica]))
    rest = [row for replica in fullest[count:] for row in members[replica]] + rest
    dealt = [members[replica] for replica in sorted(fullest[:count])] + [[] for _ in range(count - len(members))]

    def taken(row: int, rows: list[int]) -> bool:
        return homes[row] is not None and any(
            homes[other] is not None and part[homes[other]][1] == part[homes[row]][1] for other in rows)

    for row in rest:
        min(dealt, key=lambda rows: (len(rows), taken(row, rows))).append(row)
    while len(largest := max(dealt, key=len)) - len(smallest := min(dealt, key=len)) > 1:
        row = min(reversed(largest), key=lambda row: taken(row, smallest))
        largest.remove(row)
        smallest.append(row)
    return tuple(tuple(sorted(rows)) for rows in dealt)
