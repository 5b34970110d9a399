"""Flat buffers, fused views, initial values, the queue."""

from __future__ import annotations

import pytest
import torch

from actors.model.weights import WeightGradients, allocate, fused, initial_value
from orchestrator.model.parameters import ParameterSpec

SPECS = [ParameterSpec("norm", (3,), precise=True), ParameterSpec("gate", (2, 3)), ParameterSpec("up", (4, 3)),
         ParameterSpec("wide", (1, 4)), ParameterSpec("down", (3, 4))]


def test_a_fused_weight_is_a_view_of_its_parts():
    weights = allocate(SPECS, torch.float32)
    both = fused(weights, ["gate", "up"])
    both.value.copy_(torch.arange(18.0).view(6, 3))
    both.gradient.fill_(1)
    assert weights["up"].value.flatten().tolist() == list(range(6, 18))
    assert weights["gate"].gradient.eq(1).all() and not weights["wide"].gradient.any()


@pytest.mark.parametrize("names, message", [(["up", "gate"], "does not directly follow"), (["gate", "wide"], "equal width"),
                                            (["wide", "up"], "equal width")])
def test_parts_that_are_not_adjacent_are_refused(names, message):
    with pytest.raises(ValueError, match=message):
        fused(allocate(SPECS, torch.float32), names)


@pytest.mark.parametrize("dtype, precise, gradient", [
    (torch.bfloat16, torch.float32, torch.float32), (torch.float32, torch.float32, torch.float32),
    (torch.float64, torch.float64, torch.float64)])
def test_dtypes(dtype, precise, gradient):
    weights = allocate(SPECS, dtype)
    assert weights["gate"].value.dtype == dtype and weights["norm"].value.dtype == precise
    assert {weight.gradient.dtype for weight in weights.values()} == {gradient}


def test_initial_values_depend_on_name_and_seed_alone():
    value = initial_value("a", (200, 100), 1, 0.02)
    assert value.dtype == torch.float32 and torch.equal(value, initial_value("a", (200, 100), 1, 0.02))
    assert not torch.equal(value, initial_value("b", (200, 100), 1, 0.02))
    assert not torch.equal(value, initial_value("a", (200, 100), 2, 0.02))
    assert float(value.std()) == pytest.approx(0.02, rel=0.03) and abs(float(value.mean())) < 1e-3
    assert initial_value("norm", (5,), 1, 0.02).tolist() == [1.0] * 5
    # of this machine or another, today or next year
    assert initial_value("a", (2, 2), 1, 1.0).flatten().tolist() == pytest.approx(FIRST_VALUES, rel=1e-6)


FIRST_VALUES = [-0.00662132, -0.05885236, -0.3069796, 1.21660638]


def test_the_queue_runs_in_order_once():
    queue, ran = WeightGradients(), []
    for number in range(3):
        queue.defer(lambda number=number: ran.append(number))
    queue.flush()
    queue.flush()
    assert ran == [0, 1, 2]
    queue.defer(lambda: ran.append(3))
    taken = queue.take()
    queue.flush()
    assert ran == [0, 1, 2] and len(taken) == 1
