"""The mean load of experts over the last steps."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.layout.expert_load import ExpertLoad


@given(st.integers(1, 20), st.lists(st.lists(st.integers(0, 99), min_size=3, max_size=3), min_size=1, max_size=12))
@settings(max_examples=100, deadline=None)
def test_a_step_counts_less_with_every_step_after_it(steps, loads):
    found = ExpertLoad(steps)
    for load in loads:
        found = found.after({5: load})
    weights = [(1 - 1 / steps) ** (len(loads) - 1 - age) for age in range(len(loads))]
    expected = [sum(w * load[e] for w, load in zip(weights, loads)) / sum(weights) for e in range(3)]
    assert found.mean[5] == pytest.approx(expected)


def test_one_step_forgets_at_once():
    assert ExpertLoad(1).after({0: [1, 2]}).after({0: [3, 5]}).mean == {0: (3.0, 5.0)}


def test_layers_stand_alone():
    found = ExpertLoad(4).after({0: [1, 3]}).after({1: [2, 2, 2]})
    assert found.mean[0] == (1.0, 3.0) and ExpertLoad(4).mean == {}
    with pytest.raises(ValueError, match="zip"):
        found.after({0: [1]})
