"""The gate against exhaustive search and the report's equations."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from actors.model.gate import balance_loss, choose_experts, expert_weights
from orchestrator.config.run_config import ModelConfig
from tests.reference.gate import literal_balance, search_choice


@pytest.mark.parametrize("experts, groups, limit, top_k, normed", [
    (16, 4, 2, 4, True), (256, 8, 4, 8, True), (12, 3, 1, 2, True), (8, 1, 1, 8, True), (24, 4, 4, 5, True),
    (16, 8, 3, 4, False)])
def test_choice_and_weights_are_what_exhaustive_search_finds(experts, groups, limit, top_k, normed):
    model = ModelConfig(n_routed_experts=experts, n_group=groups, topk_group=limit, num_experts_per_tok=top_k,
                        norm_topk_prob=normed)
    rng = np.random.default_rng(experts)
    affinity, bias = rng.uniform(size=(200, experts)), rng.normal(scale=0.1, size=experts)
    affinity_te = torch.tensor(affinity)
    choice_tk = choose_experts(affinity_te, torch.tensor(bias), model)
    weight_tk = expert_weights(affinity_te, choice_tk, model)
    for row, chosen, weights in zip(affinity, choice_tk.tolist(), weight_tk.tolist()):
        assert dict(zip(chosen, weights)) == pytest.approx(search_choice(row, bias, model), rel=1e-9)


def test_weights_have_the_gradient_of_their_formula():
    model = ModelConfig()
    affinity = torch.rand(6, 16, dtype=torch.float64, requires_grad=True)
    choice = choose_experts(affinity, torch.zeros(16, dtype=torch.float64), model)
    assert torch.autograd.gradcheck(lambda a: expert_weights(a, choice, model), affinity)


@pytest.mark.parametrize("sequences, positions, experts, top_k", [(3, 7, 6, 2), (1, 4, 16, 4), (2, 1, 4, 4)])
def test_balance_loss_is_the_reports(sequences, positions, experts, top_k):
    affinity = np.random.default_rng(1).uniform(size=(sequences, positions, experts))
    expected = sum(literal_balance(sequence, top_k) for sequence in affinity)
    assert float(balance_loss(torch.tensor(affinity), top_k)) == pytest.approx(expected, rel=1e-12)


def test_balance_loss_is_one_per_sequence_when_all_experts_are_alike():
    affinity = torch.eye(4, dtype=torch.float64).repeat(2, 3, 1) + 1  # position t prefers expert t mod 4
    assert float(balance_loss(affinity, 1)) == pytest.approx(2.0)


def test_balance_loss_has_the_gradient_of_the_probabilities_alone():
    affinity = torch.rand(2, 5, 8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda a: balance_loss(a, 3), affinity)
