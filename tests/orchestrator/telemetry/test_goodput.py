"""Seconds of a run, attributed."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.telemetry.goodput import (
    BUBBLE,
    CHECKPOINT,
    COORDINATION,
    DATA,
    EXPOSED,
    KINDS,
    RECOVERY,
    STEP,
    USEFUL,
    TimeAccount,
    goodput,
    totals,
)


def test_a_step_is_taken_apart():
    account = TimeAccount(10.0)
    account.enter(DATA, 12.0)
    account.enter(STEP, 12.5)
    before = account.enter(CHECKPOINT, 16.5)
    account.enter(STEP, 17.0)
    found = account.step_done(18.0, compute=3.0, exposed=0.5, bubble=1.0)
    assert before == STEP
    assert {kind: seconds for kind, seconds in found.items() if seconds} == pytest.approx({
        RECOVERY: 2.0, DATA: 0.5, CHECKPOINT: 0.5, USEFUL: 3.0, EXPOSED: 0.5, BUBBLE: 1.0, COORDINATION: 0.5})


def test_a_step_that_is_done_again_is_recovery():
    account = TimeAccount(0.0)
    account.enter(STEP, 0.0)
    account.enter(RECOVERY, 3.0)
    account.step_lost()
    account.enter(STEP, 4.0)
    found = account.step_done(6.0, compute=2.0, exposed=0.0, bubble=0.0)
    assert (found[RECOVERY], found[USEFUL]) == (4.0, 2.0)
    assert goodput(found) == pytest.approx(1 / 3)


def test_steps_that_a_checkpoint_takes_back_were_not_useful():
    account = TimeAccount(0.0)
    account.redone(5.0)
    account.enter(STEP, 1.0)
    found = account.step_done(3.0, compute=2.0, exposed=0.0, bubble=0.0)
    assert (found[RECOVERY], found[USEFUL]) == (6.0, 2.0)


@given(st.lists(st.tuples(st.sampled_from((STEP, *KINDS)), st.floats(0, 100), st.booleans())), st.floats(0, 50), st.floats(0, 50))
def test_no_second_is_lost_or_counted_twice(passed, compute, exposed):
    now, account = 0.0, TimeAccount(0.0)
    for kind, seconds, lost in passed:
        now += seconds
        account.enter(kind, now)
        if lost:
            account.step_lost()
    found = account.step_done(now + 1.0, compute, exposed, 0.25)
    assert sum(found.values()) == pytest.approx(now + 1.0) and min(found.values()) >= 0
    assert sum(account.step_done(now + 1.0, 0.0, 0.0, 0.0).values()) == pytest.approx(0.0)


def test_totals_and_nothing_yet():
    assert totals([]) == dict.fromkeys(KINDS, 0.0) and goodput(totals([])) is None
    assert totals([{USEFUL: 1.0}, {USEFUL: 2.0, DATA: 1.0}])[USEFUL] == 3.0
