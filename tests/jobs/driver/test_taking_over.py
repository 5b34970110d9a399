"""What another start finds of a run: its coordinator lives, or only ranks do. Without Ray."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import ray

import actors.hosts.cluster
from actors.calls.messages import Failure
from actors.files.run_folder import RunFolder
from jobs import cli
from jobs.driver import session, takeover
from jobs.driver.running import RunActors
from orchestrator.config.run_config import ConfigError, parse
from orchestrator.protocol.members import Member
from tests.jobs.driving import Method, Shown, Signals, get

CONFIG = parse({}, [])


def present(begun: bool) -> SimpleNamespace:
    return SimpleNamespace(begun=begun, stopping=False, config=CONFIG, layout=None, address="a:1")


@pytest.fixture
def start(tmp_path, monkeypatch):
    """Another start of the run whose coordinator says so of itself, one look after the other; and what it has killed. setting: in
    which its configuration differs. follow: how the coordinator receives it."""
    killed = []
    monkeypatch.setattr(session, "_requests", [])
    monkeypatch.setattr(ray, "get", get)
    monkeypatch.setattr(ray, "kill", killed.append)
    monkeypatch.setattr(takeover, "_REFUSED_SECONDS", 0.0)

    def begin(*looks, locked, setting=None, follow=Failure("under way")):
        found = SimpleNamespace(present=Method(*map(present, looks)), follow=Method(follow))
        config = parse({}, [setting] if setting else [])
        monkeypatch.setattr(takeover, "coordinator_of", lambda folder: (1, found))
        return takeover.taken_over(RunFolder(str(tmp_path), "run"), config, "data", None, Shown(), Signals(), locked)

    begin.killed = killed
    return begin


def test_without_locks_a_run_that_another_process_is_about_to_begin_is_left_alone(start):
    """That is between its actors and `begin`: its ranks look into the run's folder."""
    with pytest.raises(cli.JobFailed, match="under way"):
        start(False, False, True, locked=False)
    assert start.killed == []


def test_without_locks_what_a_driver_has_not_begun_in_time_counts_as_left_behind(start, monkeypatch):
    monkeypatch.setattr(takeover, "START_TIMEOUT_SECONDS", 0.05)
    assert start(False, locked=False) is None and len(start.killed) == 1


def test_with_locks_a_driver_that_has_not_begun_is_dead(start):
    assert start(False, True, locked=True) is None and len(start.killed) == 1


def test_less_than_ranks_wait_is_waited_for_a_driver_that_has_not_begun(start, monkeypatch):
    """Should it have died, they are to be there still."""
    now = [0.0]
    monkeypatch.setattr(takeover, "time", SimpleNamespace(monotonic=lambda: now[0]))
    monkeypatch.setattr(Signals, "wait", lambda signals, seconds: now.__setitem__(0, now[0] + seconds))
    assert start(False, locked=False, setting="elastic.orphan_seconds=8") is None and len(start.killed) == 1
    assert now[0] == pytest.approx(4.0, abs=2 * takeover.POLL_SECONDS)


@pytest.mark.parametrize("setting", ["telemetry.port=9000", "telemetry.timeline_seconds=3", "telemetry.trace_steps=[1]"])
def test_who_takes_a_run_over_may_watch_it_in_another_way(start, setting):
    found = start(True, locked=True, setting=setting, follow=7)
    assert isinstance(found, RunActors) and found._config == CONFIG and start.killed == []


@pytest.mark.parametrize("setting", [
    "training.steps=9", "training.batch_sequences=32", "elastic.storage_seconds=9", "checkpoint.every=3"])
def test_who_takes_a_run_over_may_change_nothing_else_of_it(start, setting):
    with pytest.raises(ConfigError, match=f"{setting.partition('=')[0]}.*stop it first"):
        start(True, locked=True, setting=setting, follow=7)
    assert start.killed == []


# --- only ranks ------------------------------------------------------------------------------------------------------


@pytest.fixture
def left(tmp_path, monkeypatch):
    """Another start where two ranks live without a coordinator, of which so many answer; and how often all were ended."""
    members, shown = (Member("a", 0), Member("b", 0)), Shown()
    ranks = {member: SimpleNamespace(configuration=SimpleNamespace(remote=lambda member=member: member)) for member in members}
    monkeypatch.setattr(ray, "get", lambda reference, timeout: CONFIG)
    monkeypatch.setattr(actors.hosts.cluster, "named_actors", lambda name: ({}, ranks))
    monkeypatch.setattr(actors.hosts.cluster, "end_actors", lambda name, seconds: begin.ended.append(name) or True)

    def begin(setting, answering=2):
        monkeypatch.setattr(ray, "wait", lambda asked, **_: (asked[:answering], asked[answering:]))
        return list(takeover.left_ranks(RunFolder(str(tmp_path), "run"), parse({}, [setting]), shown))

    begin.members, begin.shown, begin.ended = members, shown, []
    return begin


@pytest.mark.parametrize("setting", [
    "training.steps=9", "training.validate_every=3", "checkpoint.every=7", "elastic.storage_seconds=9", "placement.every=4",
    "telemetry.timeline_seconds=3"])
def test_ranks_go_on_under_another_coordinator_that_is_told_other_things_of_its_own(left, setting):
    assert left(setting) == list(left.members) and left.ended == []
    assert left.shown.said == ["took over 2 ranks: driver and coordinator were lost"]


@pytest.mark.parametrize("setting, before", [("training.batch_sequences=32", 64), ("training.microbatch_sequences=2", 4),
                                             ("optimizer.warmup_steps=7", 20), ("run.seed=5", 1234)])
def test_ranks_that_were_made_for_another_configuration_are_ended(left, setting, before):
    """Nobody can tell what they would make of the state: the newest checkpoint counts."""
    assert left(setting) == [] and len(left.ended) == 1
    said, = left.shown.said
    assert said.endswith(f"are ended: {setting.replace('=', ' = ')} now, {before} before")


def test_ranks_that_do_not_answer_are_left_out_and_ended_where_none_does(left):
    assert left("training.steps=9", 1) == [left.members[0]] and left.ended == []
    assert left("training.steps=9", 0) == [] and len(left.ended) == 1
