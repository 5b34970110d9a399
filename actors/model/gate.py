"""The gate: which experts a token goes to, with what weight, and how evenly a sequence uses them.

Contract: pure functions of one rank's tensors; no communication, no state. The groups are the model's (`n_group` in a
checkpoint), never the cluster's, so the choice is the same on every layout. No token is dropped.
Name suffixes: t tokens, e experts, g groups, k chosen per token, b sequences, s positions.
"""

from __future__ import annotations

import torch
from torch import Tensor

from orchestrator.config.run_config import ModelConfig


def choose_experts(affinity_te: Tensor, bias_e: Tensor, model: ModelConfig) -> Tensor:
    """Choose `num_experts_per_tok` experts per token, from at most `topk_group` of the `n_group` expert groups.

    A group scores the sum of its two best biased affinities; the best groups are kept and the experts with the best biased
    affinities chosen within them. Not differentiable.
    Args:
        affinity_te: FP32 or FP64 [t, e], sigmoid output, dimensionless.
        bias_e: same dtype [e], added to the affinity for the choice only. Expert i is in group i // (e // n_group).
    Returns: int64 [t, k], distinct within a row, in no particular order.
    Source: DeepSeek-V3 report, section 2.1.2; two per group whatever k is, and biased group scores, are from the released
    gate (inference/model.py).
    """
    biased_te = affinity_te.detach() + bias_e
    if model.topk_group == model.n_group:
        return biased_te.topk(model.num_experts_per_tok, dim=-1, sorted=False)[1]
    tokens, size = biased_te.shape[0], model.experts_per_group
    biased_tge = biased_te.view(tokens, model.n_group, size)
    kept_tg = _two_best(biased_tge).topk(model.topk_group, dim=-1, sorted=False)[1]
    # only the kept groups are searched: the search is what takes most of the time
    rows = kept_tg + torch.arange(tokens, device=kept_tg.device).unsqueeze(1) * model.n_group
    within_te = biased_tge.flatten(0, 1).index_select(0, rows.flatten()).view(tokens, model.topk_group * size)
    within_tk = within_te.topk(model.num_experts_per_tok, dim=-1, sorted=False)[1]
    return kept_tg.gather(1, within_tk // size) * size + within_tk % size


def _two_best(values: Tensor) -> Tensor:
    """Sum of the two largest values of the last dimension: a maximum, and another without it, which is faster than `topk`."""
    best, at = values.max(-1, keepdim=True)
    return best.squeeze(-1) + values.scatter(-1, at, float("-inf")).amax(-1)


def expert_weights(affinity_te: Tensor, choice_tk: Tensor, model: ModelConfig) -> Tensor:
    """Weight of every chosen expert: unbiased affinities, each row scaled to sum `routed_scaling_factor`. [t, k]

    Without `norm_topk_prob` the affinities are only multiplied by that factor.
    """
    weight_tk = affinity_te.gather(1, choice_tk)
    if model.norm_topk_prob:
        weight_tk = weight_tk / (weight_tk.sum(-1, keepdim=True) + 1e-20)
    return weight_tk * model.routed_scaling_factor


def balance_loss(affinity_bse: Tensor, top_k: int) -> Tensor:
    """Sum over the sequences of sum_i f_i P_i; a scalar, 1 per sequence when all is even. Not multiplied by any weight.

    f_i is the share of positions whose `top_k` best unbiased affinities, whatever their group, include expert i, times
    e / top_k; a constant. P_i is the mean over positions of the affinity divided by the sum over all experts.
    Source: DeepSeek-V3 report, eq. 17-20.
    """
    _, positions, experts = affinity_bse.shape
    best_bn = affinity_bse.detach().topk(top_k, dim=-1, sorted=False)[1].flatten(1)
    share_be = torch.zeros_like(affinity_bse[:, 0], requires_grad=False)
    share_be.scatter_add_(1, best_bn, share_be.new_full(best_bn.shape, experts / (top_k * positions)))
    probability_be = (affinity_bse / affinity_bse.sum(-1, keepdim=True)).mean(1)
    return (share_be * probability_be).sum()
