"""The learning rate over a run."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.config.run_config import OptimizerSection
from orchestrator.plan.recipe import learning_rate


def rates(steps: int, **changes) -> list[float]:
    section = OptimizerSection(learning_rate=1.0, final_learning_rate=0.1, **changes)
    return [learning_rate(section, step, steps) for step in range(steps)]


def test_shape():
    found = rates(13, warmup_steps=4, constant_steps=4)
    assert found[:8] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0, 1.0, 1.0]
    assert found[8:] == pytest.approx([1.0, 0.55 + 0.45 * math.sqrt(0.5), 0.55, 0.55 - 0.45 * math.sqrt(0.5), 0.1])


@given(st.integers(1, 40), st.integers(0, 15), st.integers(0, 15))
@settings(max_examples=100, deadline=None)
def test_rises_stays_and_falls(steps, warmup, constant):
    found = rates(steps, warmup_steps=warmup, constant_steps=constant)
    rise, flat, fall = found[:warmup], found[warmup : warmup + constant], found[warmup + constant :]
    assert rise == [pytest.approx((step + 1) / warmup) for step in range(len(rise))]
    assert set(flat) <= {1.0}
    assert fall == sorted(fall, reverse=True)
    assert all(0.1 - 1e-12 <= rate <= 1.0 for rate in flat + fall)
    if len(fall) > 1:
        assert (fall[0], fall[-1]) == (1.0, pytest.approx(0.1))


def test_after_the_end_it_stays_at_the_final_rate():
    section = OptimizerSection(learning_rate=1.0, final_learning_rate=0.1, warmup_steps=2)
    assert learning_rate(section, 50, 10) == pytest.approx(0.1)


def test_deepseek():
    """2000 steps of warm-up, then 2.2e-4, down to 2.2e-5 (report, section 4.2)."""
    section = OptimizerSection(warmup_steps=2000, constant_steps=160000)
    found = [learning_rate(section, step, 240000) for step in (0, 1999, 2000, 162000, 239999)]
    assert found == pytest.approx([2.2e-4 / 2000, 2.2e-4, 2.2e-4, 2.2e-4, 2.2e-5])
