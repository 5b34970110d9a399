"""What the routing bench measures against: expected numbers of nodes and ranks of a token, and the published packing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import comb

import numpy as np


@dataclass(frozen=True)
class Reach:
    """Expected places a token reaches outside of its own, one of them: nodes, and ranks on other nodes."""

    nodes: float
    ranks: float
    source: str


def unlimited(experts: int, top_k: int, nodes: int, ranks: int) -> Reach:
    """In closed form: a place with e experts is missed with probability C(experts - e, top_k) / C(experts, top_k)."""
    def hit(places: int) -> float:
        return 1 - comb(experts - experts // places, top_k) / comb(experts, top_k)

    return Reach((nodes - 1) * hit(nodes), (ranks - ranks // nodes) * hit(ranks), "closed form")


def limited(experts: int, groups: int, limit: int, top_k: int, nodes: int, ranks: int, tokens: int, seed: int = 7) -> Reach:
    """By Monte Carlo in NumPy: independent affinities, the published rule, token by token. All places are alike, so a token
    reaches another than its own in a share 1 - 1 / nodes of all cases.

    Affinities are sigmoids of normal logits, as the bench draws them: with a limit the choice depends on more than their order.
    """
    make = np.random.default_rng(seed)
    found = np.zeros(2)
    for _ in range(tokens):
        score = 1 / (1 + np.exp(-make.standard_normal(experts)))
        by_group = np.sort(score.reshape(groups, -1), axis=1)
        kept = np.argsort(by_group[:, -1] + by_group[:, -2])[-limit:]
        allowed = np.flatnonzero(np.isin(np.arange(experts) // (experts // groups), kept))
        chosen = allowed[np.argsort(score[allowed])[-top_k:]]
        found += len(set(chosen // (experts // nodes))), len(set(chosen // (experts // ranks)))
    reached = found / tokens * (1 - 1 / nodes)
    return Reach(float(reached[0]), float(reached[1]), f"Monte Carlo, {tokens} tokens")


def published_packing(load: Sequence[float], groups: int, nodes: int, ranks_per_node: int) -> float:
    """Busiest rank's load divided by the mean, as the published placement leaves it without replicas.

    Source: EPLB (deepseek-ai/EPLB), hierarchical: groups to nodes, then experts to the ranks of a node, each heaviest first into
    the lightest pack that has room.
    """
    size = len(load) // groups
    carried = []
    for packed in _packed([sum(load[g * size : (g + 1) * size]) for g in range(groups)], nodes):
        experts = [load[g * size + i] for g in packed for i in range(size)]
        carried += [sum(experts[i] for i in pack) for pack in _packed(experts, ranks_per_node)]
    return max(carried) * len(carried) / sum(carried)


def _packed(weights: Sequence[float], packs: int) -> list[list[int]]:
    found: list[list[int]] = [[] for _ in range(packs)]
    for item in sorted(range(len(weights)), key=lambda i: -weights[i]):
        with_room = [pack for pack in found if len(pack) < len(weights) // packs]
        min(with_room, key=lambda pack: sum(weights[i] for i in pack)).append(item)
    return found
