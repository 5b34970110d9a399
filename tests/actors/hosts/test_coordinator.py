"""The Ray actor of a run as an object of this process: whom it ends, and what it tells its driver."""

from __future__ import annotations

import contextlib
import sys
import threading
from collections import deque
from types import SimpleNamespace

import pytest
import ray

from actors.calls.messages import Failure, Start
from actors.hosts.coordinator import Coordinator
from actors.hosts.ray_ranks import RayRanks
from actors.protocol.trainer import TrainingFailed
from orchestrator.config.run_config import parse
from orchestrator.protocol.events import Ending
from orchestrator.protocol.members import Member
from tests.told_events import told

MEMBERS = (Member("a", 0), Member("b", 0))


@pytest.fixture
def killed(monkeypatch):
    found = []
    monkeypatch.setattr(ray, "kill", found.append)
    return found


def coordinator(run, ranks):
    """One whose run is this function, without what Ray has to do with it."""
    kind = Coordinator.__ray_metadata__.modified_class
    found = kind.__new__(kind)
    found._lock, found._outcome, found._over, found._run, found._ranks = threading.Lock(), None, threading.Event(), run, ranks
    return found


def failing(ending):
    def run():
        raise TrainingFailed("so it is", ending)
    return run


def ranks():
    found = RayRanks(["rank 0", "rank 1"], None, SimpleNamespace(listen=lambda told: None))
    found.enlist(MEMBERS)
    return found


@pytest.mark.parametrize("ending, ended", [(Ending.SUPERSEDED, []), (Ending.STORAGE, ["rank 0", "rank 1"])])
def test_ranks_end_with_the_run_unless_they_serve_a_successor(killed, ending, ended):
    found = coordinator(failing(ending), ranks())
    found._conduct()
    assert killed == ended
    assert found.outcome(0.0) == Failure("so it is", ending)


def test_who_is_superseded_leaves_ranks_alone_for_good(killed, monkeypatch):
    found = coordinator(failing(Ending.SUPERSEDED), ranks())
    found._conduct()
    found.give_up("ended at once")
    monkeypatch.setattr("os._exit", sys.exit)
    with pytest.raises(SystemExit):
        found._leave()
    assert killed == []


def test_a_run_that_is_ended_at_once_says_so_in_a_word(killed):
    """jobs.stop tells that from a failure, whatever the text."""
    found = coordinator(None, ranks())
    found.give_up("enough")
    assert found.outcome(0.0) == Failure("enough", Ending.STOPPED)


def test_files_of_tensorboard_are_a_chore():
    """Neither what they raise nor how long they take is for the thread that conducts."""
    chores, calls = [], []
    watcher = SimpleNamespace(observe=lambda kind, values: calls.append(kind))
    found = coordinator(None, None)
    found._board = found._metrics = watcher
    found._event_files = SimpleNamespace(observe=lambda kind, values: full())
    found._trainer = SimpleNamespace(chore=lambda what, job: chores.append(job))
    found._updates, found._count = deque(), 0
    found._watch("event", told("lost"))
    assert calls == ["event", "event"] and found._count == 1 and len(chores) == 1
    with pytest.raises(OSError):
        chores[0]()


def test_a_run_ends_as_it_ended_whatever_tensorboard_says_to_its_end():
    found = coordinator(None, None)
    found._event_files = SimpleNamespace(close=full)
    found._close_event_files()


@pytest.mark.parametrize("stopped, seconds", [(False, 15.0), (True, 6.0)])
@pytest.mark.parametrize("error", [None, TrainingFailed("so it is")])
def test_a_run_that_has_ended_waits_for_one_more_scrape(monkeypatch, tmp_path, stopped, seconds, error):
    """How it ended would never be learnt else; who stops a run waits for it. What is to be saved is saved by then."""
    happened = []

    def run():
        happened.append("saved")
        if error is not None:
            raise error

    found = coordinator(None, None)
    del found._run
    found._config, found._data, found._host = parse({}, [f"run.directory={tmp_path}"]), "data", "127.0.0.1"
    found._layout, found._start, found._event_files, found._stop_requested = None, Start(), None, stopped
    found._metrics = SimpleNamespace(ended=lambda: happened.append("ended"))
    found._exporter = SimpleNamespace(last_words=happened.append)
    trainer = SimpleNamespace(run=run, stop=lambda: happened.append("stop"))
    monkeypatch.setattr("actors.hosts.coordinator.Trainer", lambda *_, **__: trainer)
    with contextlib.nullcontext() if error is None else pytest.raises(TrainingFailed):
        found._run()
    assert happened == ["stop"] * stopped + ["saved", "ended", seconds]


def full():
    raise OSError(28, "No space left on device")
