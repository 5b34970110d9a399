"""Nodes and the ranks they offer. Crossing a node is slow; inside one, links are fast."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Node:
    """One host. `ranks`: accelerators it offers (one StageActor each)."""

    name: str
    ranks: int


def virtual_nodes(count: int, ranks_per_node: int) -> tuple[Node, ...]:
    """Divide one machine into `count` nodes, so that everything about nodes can be developed on it."""
    return tuple(Node(f"virtual-{n}", ranks_per_node) for n in range(count))
