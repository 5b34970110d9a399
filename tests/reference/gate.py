"""The gate's rules, read literally, one token or one sequence at a time."""

from __future__ import annotations

from itertools import combinations

import numpy as np

from orchestrator.config.run_config import ModelConfig


def search_choice(affinity: np.ndarray, bias: np.ndarray, model: ModelConfig) -> dict[int, float]:
    """Expert -> weight for one token [e], by trying every set of expert groups."""
    biased, group = affinity + bias, np.arange(affinity.size) // model.experts_per_group
    score = [np.sort(biased[group == g])[-2:].sum() for g in range(model.n_group)]
    kept = max(combinations(range(model.n_group), model.topk_group), key=lambda groups: sum(score[g] for g in groups))
    allowed = np.flatnonzero(np.isin(group, kept))
    chosen = allowed[np.argsort(biased[allowed])[-model.num_experts_per_tok:]]
    total = affinity[chosen].sum() if model.norm_topk_prob else 1.0
    return {int(e): model.routed_scaling_factor * affinity[e] / total for e in chosen}


def literal_balance(affinity: np.ndarray, top_k: int) -> float:
    """sum_i f_i P_i of one sequence [s, e], equations 17 to 20 of the report."""
    positions, experts = affinity.shape
    total = 0.0
    for i in range(experts):
        hits = sum(1 for t in range(positions) if affinity[t, i] in sorted(affinity[t])[-top_k:])
        f = experts / (top_k * positions) * hits
        p = sum(affinity[t, i] / sum(affinity[t]) for t in range(positions)) / positions
        total += f * p
    return total
