"""Schedules of any kind and size, for tests of what handles them all."""

from __future__ import annotations

import random
from dataclasses import replace

from hypothesis import strategies as st

from orchestrator.schedule.ir.actions import ActionKind, Compute, Pair, SplitAction
from orchestrator.schedule.ir.stages import BOTH, FORWARD_ONLY, LOOP, Stages, V
from orchestrator.schedule.kinds.forward_only import forward_only
from orchestrator.schedule.kinds.registry import KINDS, TABLE, generate, smallest_microbatches


@st.composite
def schedules(draw, most_positions=5, most_microbatches=9):
    """Of any kind and size; some with actions that run split or in pairs as no generator has them."""
    kind = draw(st.sampled_from((*KINDS, FORWARD_ONLY)))
    positions, wanted = draw(st.integers(1, most_positions)), draw(st.integers(1, most_microbatches))
    if kind == FORWARD_ONLY:
        placement = draw(st.sampled_from((BOTH, V, LOOP)))
        stages = Stages(placement, positions, {BOTH: 1, V: 2 * draw(st.integers(1, 2)), LOOP: draw(st.integers(1, 3))}[placement])
        return forward_only(stages, wanted + (len(stages.paths) - wanted) % len(stages.paths))
    positions += not TABLE[kind].takes(positions)
    chunks = None if TABLE[kind].chunks else draw(st.integers(1, 3))
    schedule = generate(kind, positions, smallest_microbatches(kind, positions, wanted, chunks), chunks)
    return schedule if draw(st.booleans()) else remade(schedule, random.Random(draw(st.integers(0, 1000))))


def remade(schedule, rng):
    """Some actions split, some pairs of neighbours made: what comes out may be wrong."""
    rows = []
    for row in schedule.rows:
        done = []
        for action in row:
            last = done[-1] if done else None
            if isinstance(action, Compute) and isinstance(last, Compute) and rng.random() < 0.15:
                done[-1:] = paired(last, action)
            elif isinstance(action, Compute) and action.kind is not ActionKind.BACKWARD_WEIGHT and rng.random() < 0.2:
                done.append(SplitAction(action))
            else:
                done.append(action)
        rows.append(tuple(done))
    return replace(schedule, rows=tuple(rows))


def paired(last, action):
    """Both as a pair, if they can be one."""
    pair = attempt(lambda: Pair(*sorted((last, action), key=lambda compute: "FBIW".index(compute.kind))))
    return [last, action] if pair is None else [pair]


def attempt(make):
    """What `make` makes; None: there is no such value."""
    try:
        return make()
    except ValueError:
        return None
