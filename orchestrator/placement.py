"""Expert -> rank. An expert group stays on one node, so the model's group limit is the cluster's node limit."""

from __future__ import annotations

from orchestrator.config import ModelConfig
from orchestrator.layout import Layout


def place_experts(model: ModelConfig, layout: Layout, replica: int, position: int) -> tuple[tuple[int, ...], ...]:
    """Expert ids of each rank of an EP group, by index in the group, in slot order.

    Group g goes to row floor(g * S / n_group) of the replica's S rows. Where a position and its mirror share a node, the
    later half is shifted by one row, so that the two copies of an expert never live on one node while there are two.
    Inside a row the experts of its groups are cut into `width` contiguous near-equal runs.
    """
    rows = len(layout.replicas[replica])
    shift = int(_shares_node_with_mirror(layout, position) and position >= layout.pipeline / 2)
    of_row: list[list[int]] = [[] for _ in range(rows)]
    for group in range(model.n_group):
        first = group * model.experts_per_group
        of_row[(group * rows // model.n_group + shift) % rows] += range(first, first + model.experts_per_group)
    return tuple(part for experts in of_row for part in _cut(experts, layout.width))


def _shares_node_with_mirror(layout: Layout, position: int) -> bool:
    mirror = layout.mirror(position)
    return mirror != position and position // layout.positions_per_node == mirror // layout.positions_per_node


def _cut(items: list[int], parts: int) -> list[tuple[int, ...]]:
    bounds = [p * len(items) // parts for p in range(parts + 1)]
    return [tuple(items[a:b]) for a, b in zip(bounds, bounds[1:])]
