"""Silence is counted only while this process runs."""

from __future__ import annotations

import pytest

from actors.protocol.silence import LOOK_SECONDS, Silence


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_it_grows_while_it_is_looked_at_and_ends_when_it_is_broken():
    silence = Silence(clock := Clock())
    for _ in range(8):
        clock.now += LOOK_SECONDS
        silence.look()
    assert silence.seconds == pytest.approx(8 * LOOK_SECONDS)
    silence.broken()
    assert silence.seconds == 0.0
    clock.now += LOOK_SECONDS
    assert silence.look() == pytest.approx(LOOK_SECONDS)


def test_while_this_process_was_frozen_nobody_was_silent():
    silence = Silence(clock := Clock())
    clock.now += 3600.0
    assert silence.look() <= 4 * LOOK_SECONDS
