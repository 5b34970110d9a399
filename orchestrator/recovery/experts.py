"""Where the experts go in a new layout: as near to where they are as its balance allows.

Contract: pure. A group of experts stays on its node where that lives, has room (groups are near-equally many on the rows of a
replica) and does not hold the other copy, that of the mirror; inside a node an expert stays on its rank where the numbers are
near-equal. Which process has what is told by node and local index: rank numbers change with the layout.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from itertools import product

from orchestrator.config.run_config import ModelConfig
from orchestrator.layout.balance import Ranks, assign
from orchestrator.layout.layout import Layout
from orchestrator.layout.placement import LayerExperts, Placement, evenly_placed, place_experts
from orchestrator.model.parameters import moe_layers, stage_layers

Held = Mapping[tuple[str, int], frozenset[int]]
"""Experts of one layer that the process at (node, local index) has."""

_NONE: frozenset[int] = frozenset()


def relaid_placement(model: ModelConfig, layout: Layout, old_layout: Layout, old_placement: Placement,
                     layers_per_stage: list[int] | str = "auto", parts: int = 1) -> Placement:
    """The placement of `layout` that moves as few experts as its balance allows.

    Args:
        old_placement: of `old_layout`. Processes that are gone have no place in `layout`, and so keep nothing.
        parts: as in `balance.balanced`: where groups do not divide by the rows, the rows share them as `evenly_placed` says.
    """
    held = _held(old_layout, old_placement)
    per_stage = stage_layers(model, layout.folding.count, layers_per_stage)
    found: dict[tuple[int, int, int], Ranks] = {}
    placed = []
    for replica, position in product(range(len(layout.replicas)), range(layout.pipeline)):
        ranks, mirror = layout.expert_group(replica, position), layout.mirror(position)
        for stage in layout.stages(position):
            for layer in moe_layers(model, per_stage[stage], last=stage == layout.folding.count - 1):
                if (replica, position, layer) not in found:
                    pair = _pair(model, layout, replica, (position, mirror), held.get(layer, {}), parts)
                    found |= {(replica, which, layer): experts for which, experts in pair.items()}
                placed.append(LayerExperts(replica, position, layer, ranks, found[replica, position, layer]))
    return Placement(tuple(placed))


def _held(layout: Layout, placement: Placement) -> dict[int, Held]:
    """By layer. Dense or not hosted before: no entry."""
    found: dict[int, dict[tuple[str, int], frozenset[int]]] = {}
    for entry in placement.placed:
        of_layer = found.setdefault(entry.layer, {})
        for rank, experts in zip(entry.ranks, entry.experts):
            place = layout.places[rank]
            key = place.node, place.local
            of_layer[key] = of_layer.get(key, _NONE) | frozenset(experts)
    return found


def _pair(model: ModelConfig, layout: Layout, replica: int, positions: tuple[int, int], held: Held,
          parts: int) -> dict[int, Ranks]:
    """Experts of a position and its mirror: the two copies on as few common nodes as can be found, then the fewest arrivals.

    Tried: either of the two first and the other around it, and the plain placement.
    """
    position, mirror = positions
    if mirror == position:
        return {position: _placed(model, layout, replica, position, held, {}, parts)}
    tried = [{which: place_experts(model, layout, replica, which, parts) for which in positions}]
    for first, second in (positions, positions[::-1]):
        pair = {first: _placed(model, layout, replica, first, held, {}, parts)}
        beside = _by_node(layout, replica, first, pair[first])
        tried.append(pair | {second: _placed(model, layout, replica, second, held, beside, parts)})
    return min(tried, key=lambda pair: (
        _shared(*(_by_node(layout, replica, which, pair[which]) for which in positions)),
        sum(_arriving(layout, replica, which, pair[which], held) for which in positions)))


def _arriving(layout: Layout, replica: int, position: int, experts: Ranks, held: Held) -> int:
    places = (layout.places[rank] for rank in layout.expert_group(replica, position))
    return sum(len(set(of_rank) - held.get((place.node, place.local), _NONE)) for place, of_rank in zip(places, experts))


def _by_node(layout: Layout, replica: int, position: int, experts: Ranks) -> dict[str, frozenset[int]]:
    found: dict[str, frozenset[int]] = {}
    for rank, of_rank in zip(layout.expert_group(replica, position), experts):
        node = layout.places[rank].node
        found[node] = found.get(node, _NONE) | frozenset(of_rank)
    return found


def _shared(first: Mapping[str, frozenset[int]], second: Mapping[str, frozenset[int]]) -> int:
    return sum(len(first.get(node, _NONE) & experts) for node, experts in second.items())


def _placed(model: ModelConfig, layout: Layout, replica: int, position: int, held: Held, avoided: Mapping[str, frozenset[int]],
            parts: int) -> Ranks:
    """avoided: experts by node whose other copy is there."""
    rows, width = len(layout.replicas[replica]), layout.width
    places = [layout.places[rank] for rank in layout.expert_group(replica, position)]
    on_node: dict[str, frozenset[int]] = {}
    for (node, _), experts in held.items():
        on_node[node] = on_node.get(node, _NONE) | experts
    items = _items(model, rows, width, parts)
    gain = []
    for item in items:
        of_item = []
        for row in range(rows):
            of_row = places[row * width : (row + 1) * width]
            own = frozenset().union(*(held.get((place.node, place.local), _NONE) for place in of_row))
            node = of_row[0].node
            of_item.append(2 * len(item & own) + len(item & on_node.get(node, _NONE))
                           - 4 * model.n_routed_experts * len(item & avoided.get(node, _NONE)))
        gain.append(tuple(of_item))
    row_of = _rows_of(tuple(gain), rows)
    found: list[tuple[int, ...]] = []
    for row in range(rows):
        experts = frozenset().union(*(item for item, target in zip(items, row_of) if target == row))
        found += _on_ranks(experts, [held.get((place.node, place.local), _NONE) for place in places[row * width :][:width]])
    return tuple(found)


def _items(model: ModelConfig, rows: int, width: int, parts: int) -> list[frozenset[int]]:
    """What goes to a row as a whole: groups, or where they are cut, all that a row has."""
    if parts > 1 and model.n_group % rows:
        ranks = evenly_placed(model, rows, width, parts)
        return [frozenset().union(*ranks[row * width : (row + 1) * width]) for row in range(rows)]
    size = model.experts_per_group
    return [frozenset(range(group * size, (group + 1) * size)) for group in range(model.n_group)]


@cache
def _rows_of(gain: tuple[tuple[int, ...], ...], rows: int) -> tuple[int, ...]:
    """The row of each item, near-equally many on each, with the largest sum of `gain[item][row]`.

    A row has as many seats as all rows get at least, and one more; empty chairs, which keep to those further seats, fill up.
    """
    each, over = divmod(len(gain), rows)
    if not over:
        return tuple(seat // each for seat in assign([[of_item[row] for row in range(rows) for _ in range(each)]
                                                      for of_item in gain]))
    seats = [(row, seat == each) for row in range(rows) for seat in range(each + 1)]
    never = -1 - 2 * sum(max(map(abs, of_item)) for of_item in gain)
    matrix = [[of_item[row] for row, _ in seats] for of_item in gain]
    matrix += [[0 if further else never for _, further in seats] for _ in range(rows - over)]
    return tuple(seats[seat][0] for seat in assign(matrix)[: len(gain)])


def _on_ranks(experts: frozenset[int], held: Sequence[frozenset[int]]) -> list[tuple[int, ...]]:
    """Near-equally many on each rank, in ascending order; as many as can be stay where they are."""
    each, over = divmod(len(experts), len(held))
    found: list[list[int]] = []
    left = set(experts)
    for of_rank in held:
        found.append(sorted(left & of_rank))
        left -= of_rank
    fullest = sorted(range(len(held)), key=lambda rank: -len(found[rank]))
    most = {rank: each + (turn < over) for turn, rank in enumerate(fullest)}
    for rank, kept in enumerate(found):
        left |= set(kept[most[rank] :])
        del kept[most[rank] :]
    rest = iter(sorted(left))
    for rank, kept in enumerate(found):
        kept += [next(rest) for _ in range(most[rank] - len(kept))]
    return [tuple(sorted(kept)) for kept in found]
