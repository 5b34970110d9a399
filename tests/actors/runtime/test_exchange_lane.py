"""The lane of exchanges: one after the other, beside the thread that starts them; failures and the end reach who waits."""

from __future__ import annotations

import threading

import pytest
import torch

from actors.comm.groups import Aborted
from actors.runtime.exchange_lane import ExchangeLane, InTurn

BOUND_SECONDS = 20.0


@pytest.fixture
def lane():
    lane = ExchangeLane()
    yield lane
    lane.close()


def blocked():
    """An exchange that begins, and ends when it is told to."""
    begun, end = threading.Event(), threading.Event()

    def run():
        begun.set()
        assert end.wait(BOUND_SECONDS)

    return run, begun, end


def test_exchanges_run_in_the_order_they_were_started_while_their_starter_goes_on(lane):
    run, begun, end = blocked()
    log = []
    exchanges = [lane.start(run), *(lane.start(lambda n=n: log.append((n, threading.get_ident()))) for n in range(5))]
    assert begun.wait(BOUND_SECONDS) and log == []
    end.set()
    for exchange in reversed(exchanges):
        exchange.wait()
    assert [n for n, _ in log] == list(range(5)) and {thread for _, thread in log} != {threading.get_ident()}
    times = [time for exchange in exchanges for time in (exchange.started, exchange.ended)]
    assert times == sorted(times)


def test_gradients_are_off_on_the_lane_whatever_they_are_here(lane):
    found = []
    with torch.enable_grad():
        lane.start(lambda: found.append(torch.is_grad_enabled())).wait()
    assert found == [False]


def test_a_failure_reaches_its_waiter_and_everybody_behind(lane):
    run, _, end = blocked()
    log = []

    def fail():
        raise ValueError("a tensor of another shape")

    first, failed = lane.start(run), lane.start(fail)
    behind = lane.start(lambda: log.append("behind"))
    end.set()
    first.wait()
    for exchange in (failed, behind, lane.start(lambda: log.append("later"))):
        with pytest.raises(ValueError, match="a tensor of another shape"):
            exchange.wait()
    assert log == []


def test_close_ends_the_thread_and_refuses_what_has_not_begun():
    before = threading.active_count()
    lane = ExchangeLane()
    run, begun, end = blocked()
    first, second = lane.start(run), lane.start(run)
    assert begun.wait(BOUND_SECONDS) and threading.active_count() == before + 1
    lane.close(abort=end.set)                      # an exchange that blocks is ended
    assert threading.active_count() == before
    first.wait()
    for exchange in (second, lane.start(run)):
        with pytest.raises(Aborted, match="the lane is closed"):
            exchange.wait()


def test_an_exchange_that_nothing_ends_is_reported(monkeypatch):
    monkeypatch.setattr("actors.runtime.exchange_lane._CLOSE_SECONDS", 0.05)
    lane = ExchangeLane()
    run, begun, end = blocked()
    lane.start(run)
    assert begun.wait(BOUND_SECONDS)
    with pytest.raises(TimeoutError, match="still under way"):
        lane.close()
    end.set()


def test_in_turn_there_is_no_other_thread():
    log = []
    exchange = InTurn().start(lambda: log.append(threading.get_ident()))
    assert log == [threading.get_ident()]
    exchange.wait()
    with pytest.raises(ZeroDivisionError):
        InTurn().start(lambda: 1 / 0)
