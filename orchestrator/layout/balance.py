"""Which experts share a rank, by measured load, an expert group staying whole on one node.

Contract: pure functions of numbers; nothing here knows of positions, mirrors or rank numbers. A rank's experts are ascending,
ranks stand node by node (`Ranks`). Replicated experts are for serving: here every expert is placed once.
Source of the packing: EPLB (deepseek-ai/EPLB, eplb.py, `balanced_packing` and the hierarchical policy) with one replica each.
What it adds: packs may differ by one item, swaps improve the result, and the plain order is kept where it is better.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import combinations, pairwise, product

Ranks = tuple[tuple[int, ...], ...]
Packing = Callable[[Sequence[float], int, Sequence[float]], list[list[int]]]  # load, packs, what the packs carry before

_LEAST_GAIN = 1e-9  # of the heaviest pack; less is rounding


def balanced(load: Sequence[float], groups: int, nodes: int, ranks_per_node: int, parts: int = 1) -> Ranks:
    """Experts of each rank: groups to nodes, then the experts of a node to its ranks, near-equal many on each.

    The busiest rank carries at most what it would by the published packing, and at most what it would in order.
    Args:
        load: of each expert, in any unit, none negative; expert e is in group e // (len(load) // groups).
        parts: 1: groups stay whole; where they do not divide by the nodes, some nodes hold one more. Above 1: the groups that are
            left over when all nodes hold equally many, the lightest, are cut into that many near-equal parts for different nodes.
    Raises ValueError: experts that do not divide by the groups, a node without a whole group, a rank without an expert, a group
        with fewer experts than parts, a load that is negative.
    """
    if min(load) < 0:
        raise ValueError(f"a load of {min(load)}")
    plain = in_order(len(load), groups, nodes, ranks_per_node)
    if not 1 <= parts <= len(load) // groups:
        raise ValueError(f"{parts} parts of a group of {len(load) // groups} experts")
    packings: tuple[Packing, ...] = (_packed_and_swapped, pack)
    found = [_two_levels(load, groups, nodes, ranks_per_node, parts, packing) for packing in packings]
    return min([*found, plain], key=lambda ranks: max(loads(load, ranks)))


def in_order(experts: int, groups: int, nodes: int, ranks_per_node: int) -> Ranks:
    """Without measurements: group g on node floor(g * nodes / groups), a node's experts cut into near-equal runs.

    Raises ValueError: as `balanced`.
    """
    if experts % groups:
        raise ValueError(f"{experts} experts in {groups} groups")
    size = experts // groups
    if groups < nodes or groups // nodes * size < ranks_per_node:
        raise ValueError(f"{groups} groups of {size} experts on {nodes} nodes of {ranks_per_node} ranks: some would have none")
    of_node = [[e for e in range(experts) if e // size * nodes // groups == node] for node in range(nodes)]
    return tuple(part for held in of_node for part in _cut(held, ranks_per_node))


def loads(load: Sequence[float], ranks: Ranks) -> list[float]:
    """Load of each rank."""
    return [sum(load[e] for e in experts) for experts in ranks]


def unevenness(load: Sequence[float], ranks: Ranks) -> float:
    """Busiest rank's load divided by the mean; 1 where there is none."""
    found = loads(load, ranks)
    return max(found) * len(found) / sum(found) if sum(found) else 1.0


def pack(load: Sequence[float], packs: int, before: Sequence[float] = ()) -> list[list[int]]:
    """Items of each pack: heaviest first, each into the lightest pack that has room, the first on ties.

    There is room for n // packs of n items in each pack, and for one more in n % packs of them, whichever come to need it.
    One item a pack stays where it is. before: what each pack carries already.
    """
    if len(load) == packs and not before:
        return [[item] for item in range(packs)]
    each, larger = divmod(len(load), packs)
    carried = list(before or [0.0] * packs)
    found: list[list[int]] = [[] for _ in range(packs)]
    for item in sorted(range(len(load)), key=lambda item: -load[item]):
        open_ = [p for p in range(packs) if len(found[p]) < each + (larger > 0)]
        lightest = min(open_, key=carried.__getitem__)
        larger -= len(found[lightest]) == each
        found[lightest].append(item)
        carried[lightest] += load[item]
    return found


def _packed_and_swapped(load: Sequence[float], packs: int, before: Sequence[float] = ()) -> list[list[int]]:
    """`pack`, then swaps of an item of the heaviest pack for one of another while the heavier of the two gets lighter."""
    found = pack(load, packs, before)
    carried = [start + sum(load[item] for item in held) for start, held in zip(before or [0.0] * packs, found)]
    while True:
        heavy = max(range(packs), key=carried.__getitem__)
        swaps = [(max(carried[heavy] - lighter, carried[p] + lighter), lighter, p, mine, theirs)
                 for p in range(packs) if p != heavy
                 for (mine, a), (theirs, b) in product(enumerate(found[heavy]), enumerate(found[p]))
                 if (lighter := load[a] - load[b]) > 0]
        after, lighter, other, mine, theirs = min(swaps, default=(carried[heavy], 0.0, heavy, 0, 0))
        if after >= carried[heavy] * (1 - _LEAST_GAIN):
            return found
        found[heavy][mine], found[other][theirs] = found[other][theirs], found[heavy][mine]
        carried[heavy] -= lighter
        carried[other] += lighter


def _two_levels(load: Sequence[float], groups: int, nodes: int, ranks_per_node: int, parts: int, packing: Packing) -> Ranks:
    ranks = []
    for held in _on_nodes(load, groups, nodes, parts, packing):
        for pack_ in packing([load[e] for e in held], ranks_per_node, ()):
            ranks.append(tuple(sorted(held[item] for item in pack_)))
    return tuple(ranks)


def _on_nodes(load: Sequence[float], groups: int, nodes: int, parts: int, packing: Packing) -> list[list[int]]:
    """Experts of each node, ascending."""
    size = len(load) // groups
    members = [list(range(g * size, (g + 1) * size)) for g in range(groups)]
    weight = [sum(load[e] for e in held) for held in members]
    spare = groups % nodes if parts > 1 else 0
    heaviest = sorted(range(groups), key=lambda g: -weight[g])
    whole, cut = sorted(heaviest[: groups - spare]), heaviest[groups - spare :]
    found = [[e for item in held for e in members[whole[item]]] for held in packing([weight[g] for g in whole], nodes, ())]
    if cut:
        pieces = [[members[g][item] for item in held] for g in cut for held in pack([load[e] for e in members[g]], parts)]
        before = [sum(load[e] for e in held) for held in found]
        for node, held in enumerate(packing([sum(load[e] for e in piece) for piece in pieces], nodes, before)):
            found[node] += [e for item in held for e in pieces[item]]
    return [sorted(held) for held in found]


def most_nodes(ranks: Ranks, nodes: Sequence[str], groups: int, group_limit: int, top_k: int) -> int:
    """On how many nodes at most a token's experts are: `top_k` of them, out of `group_limit` groups. Exact.

    nodes: of each rank. With whole groups it is the least of `top_k`, `group_limit` and the nodes. A cut group counts with all
    nodes that it is on; each further group adds one at least, until no node is left.
    """
    size = sum(map(len, ranks)) // groups
    spread: list[set[str]] = [set() for _ in range(groups)]
    for experts, node in zip(ranks, nodes, strict=True):
        for expert in experts:
            spread[expert // size].add(node)
    cut = [on for on in spread if len(on) > 1]
    widest = sum(sorted(map(len, spread))[-group_limit:])
    bound, most = min(top_k, len(set().union(*spread)), widest), 0
    for chosen in (c for count in range(min(group_limit, len(cut)) + 1) for c in combinations(cut, count)):
        most = max(most, len(set().union(*chosen)) + group_limit - len(chosen))
        if most >= bound:
            return bound
    return most


def nearest(old: Ranks, new: Ranks, ranks_per_node: int) -> Ranks:
    """`new` with its nodes in another order, and the ranks of a node among themselves, so that as many experts as can be stay
    on their rank of `old`. The work of the ranks is the same, whatever they are called."""
    old_nodes, new_nodes = ([ranks[at : at + ranks_per_node] for at in range(0, len(ranks), ranks_per_node)]
                            for ranks in (old, new))
    inside = {(i, j): _most_kept(before, after)
              for (i, before), (j, after) in product(enumerate(old_nodes), enumerate(new_nodes))}
    order = assign([[inside[i, j][0] for j in range(len(new_nodes))] for i in range(len(old_nodes))])
    return tuple(new_nodes[j][w] for i, j in enumerate(order) for w in inside[i, j][1])


def _most_kept(before: Ranks, after: Ranks) -> tuple[int, list[int]]:
    """How many experts of a node's ranks stay, and which of `after` each of its ranks takes."""
    common = [[len(set(a) & set(b)) for b in after] for a in before]
    order = assign(common) if any(map(any, common)) else list(range(len(after)))
    return sum(common[w][v] for w, v in enumerate(order)), order


def assign(gain: Sequence[Sequence[int]]) -> list[int]:
    """A column for each row of a square matrix, all different, with the largest sum.

    Successive shortest augmenting paths with potentials (the Hungarian method), O(n^3).
    """
    size = len(gain)
    row_potential, column_potential = [0] * (size + 1), [0] * (size + 1)
    row_of = [size] * (size + 1)  # of each column; the last column and row are where a path begins
    for row in range(size):
        row_of[size] = row
        column, reached = size, set()
        slack, came_from = [float("inf")] * size, [size] * size
        while row_of[column] != size:
            reached.add(column)
            here = row_of[column]
            for other in (c for c in range(size) if c not in reached):
                cost = -gain[here][other] - row_potential[here] - column_potential[other]
                if cost < slack[other]:
                    slack[other], came_from[other] = cost, column
            following = min((c for c in range(size) if c not in reached), key=slack.__getitem__)
            step = slack[following]
            for c in reached:
                row_potential[row_of[c]] += step
                column_potential[c] -= step
            for c in range(size):
                if c not in reached:
                    slack[c] -= step
            column = following
        while column != size:
            row_of[column] = row_of[came_from[column]]
            column = came_from[column]
    found = [0] * size
    for column in range(size):
        found[row_of[column]] = column
    return found


def _cut(items: list[int], parts: int) -> list[tuple[int, ...]]:
    bounds = [p * len(items) // parts for p in range(parts + 1)]
    return [tuple(items[a:b]) for a, b in pairwise(bounds)]
