"""Expert -> rank. An expert group stays on one node, so the model's group limit is the cluster's node limit."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from orchestrator.config import ModelConfig
from orchestrator.layout import Layout


def place_experts(model: ModelConfig, layout: Layout, replica: int, position: int) -> tuple[tuple[int, ...], ...]:
    """Expert ids of each rank of an EP group, by index in the group, in slot order.

    Group g goes to row floor(g * S / n_group) of the replica's S rows. A position and its mirror hold the same experts: in
    the later half the rows trade their groups, so that the two copies of an expert are on different nodes (see `_apart`).
    Inside a row the experts of its groups are cut into `width` contiguous near-equal runs.
    """
    rows = len(layout.replicas[replica])
    moved = list(range(rows))
    if position > layout.mirror(position):
        moved = _apart(layout.nodes_of(replica, layout.mirror(position)), layout.nodes_of(replica, position))
    of_row: list[list[int]] = [[] for _ in range(rows)]
    for group in range(model.n_group):
        first = group * model.experts_per_group
        of_row[moved[group * rows // model.n_group]] += range(first, first + model.experts_per_group)
    return tuple(part for experts in of_row for part in _cut(experts, layout.width))


def _apart(first: Sequence[str], second: Sequence[str]) -> list[int]:
    """A permutation `to` with first[row] != second[to[row]] for as many rows as can be.

    That is all of them, unless one node has more than half of the places in `first` and `second` together (Hall's theorem);
    ownership then finds an owner elsewhere.
    Each row takes the nearest that it can, itself before the next: nobody moves where mirrors never share a node, and
    everybody moves to the next row where a row has one node of its own. Augmenting paths settle the rest.
    """
    rows = len(first)
    source: dict[int, int] = {}

    def settle(row: int, tried: set[int]) -> bool:
        for target in ((row + step) % rows for step in range(rows)):
            if first[row] != second[target] and target not in tried:
                tried.add(target)
                if target not in source or settle(source[target], tried):
                    source[target] = row
                    return True
        return False

    stuck = [row for row in range(rows) if not settle(row, set())]
    free = [target for target in range(rows) if target not in source]
    to = {row: target for target, row in source.items()} | dict(zip(stuck, free))
    return [to[row] for row in range(rows)]


def _cut(items: list[int], parts: int) -> list[tuple[int, ...]]:
    bounds = [p * len(items) // parts for p in range(parts + 1)]
    return [tuple(items[a:b]) for a, b in pairwise(bounds)]
