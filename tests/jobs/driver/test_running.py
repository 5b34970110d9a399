"""A driver and its coordinator: who ends a run, and who leaves it alone. Without Ray."""

from __future__ import annotations

import os
import signal

import pytest
from ray.exceptions import RayActorError

from actors.calls.messages import Failure
from actors.files.run_folder import RunFolder
from actors.files.storage import StorageError
from actors.hosts.coordinator import TAKEN_OVER
from jobs import cli
from jobs.driver import running, session
from jobs.driver.running import CoordinatorLost, Interrupt, TakenOver
from orchestrator.config.run_config import ConfigError
from orchestrator.protocol.events import Ending
from tests.jobs.driving import DONE, STEP, Driver, Shown, Signals, coordinator

SIGNALS = signal.SIGINT, signal.SIGTERM


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(running, "POLL_SECONDS", 0.01)


@pytest.fixture
def driver(tmp_path, monkeypatch):
    return lambda first: Driver(tmp_path, first, monkeypatch)


def test_a_driver_whose_coordinator_was_superseded_leaves_the_run_alone(driver):
    """Both were frozen while another process has taken the run over."""
    found = driver(coordinator(outcome=Failure("another process has written to the ledger", Ending.SUPERSEDED)))
    with pytest.raises(TakenOver), found.run:
        found.run.follow(Shown(), Signals())
    assert found.ended == []


def test_a_driver_that_comes_back_replaced_leaves_the_run_alone_though_it_was_signalled(driver):
    """Ctrl-Z, taken over from elsewhere, then `kill %1`."""
    found = driver(first := coordinator(Failure(TAKEN_OVER)))
    with pytest.raises(TakenOver), found.run:
        found.run.follow(Shown(), Signals(requested=True))
    assert first.stop.calls == 0 and found.ended == []


def test_a_driver_that_comes_back_without_its_coordinator_starts_none_beside_that_of_its_successor(driver):
    found = driver(first := coordinator(RayActorError()))
    found.living = {2: "of another driver"}
    with pytest.raises(TakenOver), found.run:
        found.run.follow(Shown(), Signals())
    assert found.ended == [first]


def test_a_coordinator_that_is_lost_while_it_takes_over_is_followed_by_another_one(driver):
    found = driver(coordinator(RayActorError()))
    found.made = [coordinator(open=RayActorError()), last := coordinator()]
    with found.run:
        assert found.run.follow(Shown(), Signals()) == DONE
    assert last.begin.calls == 1 and found.made == []


def test_coordinators_that_are_lost_one_after_the_other_end_the_run(driver):
    found = driver(coordinator(RayActorError()))
    found.made = [coordinator(open=RayActorError()) for _ in range(running.MOST_RESTARTS)]
    with pytest.raises(cli.JobFailed, match="lost 4 times without a step"), found.run:
        found.run.follow(Shown(), Signals())
    assert "all" in found.ended


def test_each_coordinator_of_a_run_that_is_to_stop_is_told_so_once(driver):
    found, shown = driver(first := coordinator((1, [], False), RayActorError())), Shown()
    found.made = [second := coordinator((1, [], False), (2, [], False))]
    with found.run:
        found.run.follow(shown, Signals(requested=True))
    assert (first.stop.calls, second.stop.calls) == (1, 1) and len([text for text in shown.said if "stopping" in text]) == 1


def test_storage_that_is_away_for_a_moment_is_waited_for_while_ranks_hold_the_state(driver, monkeypatch):
    found, tries = driver(coordinator(RayActorError())), iter([StorageError("ledger.jsonl", "stale")] * 3)
    found.made, real = [coordinator()], RunFolder.ledger

    def ledger(folder):
        if (error := next(tries, None)) is not None:
            raise error
        return real(folder)
    monkeypatch.setattr(RunFolder, "ledger", ledger)
    with found.run:
        assert found.run.follow(Shown(), Signals()) == DONE


def test_a_driver_that_ends_by_what_is_no_request_to_stop_leaves_the_run_to_go_on(driver, monkeypatch, capsys):
    found, shown = driver(coordinator((1, [("step", STEP)], False))), Shown()
    monkeypatch.setattr(shown, "step", lambda values: 1 / 0)
    with pytest.raises(ZeroDivisionError), found.run:
        found.run.follow(shown, Signals())
    assert found.ended == [] and session._requests == []
    assert "the run goes on: for elastic.orphan_seconds = 300 the same command takes it over" in capsys.readouterr().err


def test_where_not_even_that_can_be_said_the_run_goes_on(driver, monkeypatch):
    found = driver(coordinator())
    with open("/dev/full", "w", buffering=1) as full:
        monkeypatch.setattr("sys.stderr", full)
        with pytest.raises(OSError, match="terminal"), found.run:
            raise OSError("the terminal has gone")
        monkeypatch.undo()
        os.dup2(os.open(os.devnull, os.O_WRONLY), full.fileno())
    assert found.ended == []


@pytest.mark.parametrize("error, ends", [
    (None, True), (KeyboardInterrupt(), True), (ConfigError("key", 1, "2"), True), (cli.JobFailed("it has failed"), True),
    (TakenOver(), False), (CoordinatorLost(), False), (OSError(), False), (SystemExit(), False), (RayActorError(), False),
])
def test_who_ends_a_run_that_is_under_way(driver, monkeypatch, error, ends):
    run = driver(coordinator()).run
    assert run.ends(error) is ends
    run._under_way = False  # nobody would go on with what this process has begun
    assert run.ends(error) is not isinstance(error, TakenOver)
    monkeypatch.setattr(session, "is_local", lambda: True)
    run._under_way = True
    assert run.ends(error) is not isinstance(error, TakenOver)


@pytest.fixture
def interrupt():
    """What the signals of this process do meanwhile."""
    before = [(number, signal.getsignal(number)) for number in SIGNALS]
    yield Interrupt()
    for number, handler in before:
        signal.signal(number, handler)


@pytest.mark.parametrize("number", SIGNALS)
def test_a_second_signal_ends_a_run_at_once(driver, interrupt, number):
    """The first one only asks it to save, and saving may take long."""
    found = driver(first := coordinator(*[(1, [], False)] * 9))
    asked = []

    def seen(address):
        asked.append(first.stop.calls)
        os.kill(os.getpid(), number)
    with pytest.raises(KeyboardInterrupt), found.run:
        found.run.follow(Shown(), interrupt, seen)
    assert asked == [0, 1] and found.ended == [first, "all"]


def test_another_signal_while_actors_are_ended_leaves_none_behind(driver, monkeypatch, interrupt):
    found, ended = driver(coordinator(outcome=DONE)), []

    def end_actors(name, seconds):
        for number in SIGNALS:
            os.kill(os.getpid(), number)
        ended.append(name)
    monkeypatch.setattr("actors.hosts.cluster.end_actors", end_actors)
    os.kill(os.getpid(), signal.SIGINT)
    with found.run:
        assert found.run.follow(Shown(), interrupt) == DONE
    assert ended and signal.getsignal(signal.SIGINT) == interrupt._handle
