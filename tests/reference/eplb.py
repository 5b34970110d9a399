"""EPLB as published (deepseek-ai/EPLB, eplb.py), read from its description and written again in plain Python, one layer.

A balanced packing, the replication of hot experts, and the hierarchical policy: groups to nodes, replicas inside a node, packing
on its GPUs. Ties go to the first; `torch.sort` leaves them open.
"""

from __future__ import annotations

from fractions import Fraction


def balanced_packing(weight: list, packs: int) -> list[list[int]]:
    """Items of each pack in the order in which they came."""
    room = len(weight) // packs
    if room == 1:
        return [[i] for i in range(packs)]
    content: list[list[int]] = [[] for _ in range(packs)]
    for _, item in sorted((-w, i) for i, w in enumerate(weight)):
        _, _, lightest = min((sum(weight[i] for i in held), p, held) for p, held in enumerate(content) if len(held) < room)
        lightest.append(item)
    return content


def replicate(weight: list, replicas: int) -> list[int]:
    """Expert of each replica: one of each, then again and again one more of the expert with the most load per replica."""
    experts = list(range(len(weight)))
    while len(experts) < replicas:
        share = [Fraction(w) / experts.count(e) for e, w in enumerate(weight)]
        experts.append(share.index(max(share)))
    return experts


def rebalance(weight: list, replicas: int, groups: int, nodes: int, gpus: int) -> list[list[int]]:
    """Experts of each GPU, GPUs node by node, in slot order. The hierarchical policy: `groups` is a multiple of `nodes`."""
    size = len(weight) // groups
    on_gpus = []
    for held in balanced_packing([sum(weight[g * size : (g + 1) * size]) for g in range(groups)], nodes):
        local = [g * size + i for g in held for i in range(size)]
        copies = replicate([weight[e] for e in local], replicas // nodes)
        share = [Fraction(weight[local[c]]) / copies.count(c) for c in copies]
        on_gpus += [[local[copies[item]] for item in gpu] for gpu in balanced_packing(share, gpus // nodes)]
    return on_gpus
