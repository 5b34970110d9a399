"""What the recovery bench reads from a run's files; that its faults are spread; and one killed node on real raylets."""

from __future__ import annotations

from collections import Counter

import pytest

from jobs.benches.recovery import bench as recovery
from jobs.benches.recovery.picture import picture
from jobs.benches.recovery.run import KINDS, blows
from jobs.benches.recovery.times import Phases, incident, line_through
from orchestrator.config.run_config import load
from tests.cluster import REPOSITORY
from tests.told_events import told


def step(number: int, began: float, time: float, generation: int, sequences: int = 16) -> dict:
    return {"step": number, "began": began, "time": time, "seconds": time - began, "generation": generation, "sequences": sequences,
            "tokens": sequences * 8, "loss": 2.0 + number}


def ledger(count: int) -> list[dict]:
    return [{"step": number, "digest": f"{number:x}"} for number in range(count)]


BEFORE = [step(0, 10.0, 11.0, 1), step(1, 11.0, 12.0, 1)]
STORY = [
    told("lost", 12.9, members=["b/0"]), told("aborted", 13.0, seconds=0.25, slowest_rank_seconds=0.125),
    told("layout", 13.25, seconds=0.5),
    told("generation", 15.0, generation=2, nodes=3, bytes=600, grouping_seconds=0.75, moving_seconds=1.25, seconds=2.25)]


def incident_of(steps=(), events=(), after=3, at=12.5):
    return incident("killed", at, 0.5, [*BEFORE, *steps], events, ledger(2), ledger(after), whole=16, length=8, restarted=0)


def test_phases_add_up_to_the_first_action():
    found = incident_of([step(2, 15.25, 16.25, 2)], STORY)
    assert found.phases == Phases(notice=0.25, abort=0.25, decide=0.25, regroup=0.75, move=1.0, resume=0.25)
    assert found.first_action == 2.75 == sum(getattr(found.phases, name) for name in Phases.__slots__)
    assert (found.noticed, found.aborted, found.slowest_abort, found.full_batch, found.step) == (0.25, 0.5, 0.125, 3.75, 1.0)
    assert (found.bytes, found.nodes, found.attempts, found.steps_redone) == (600, 3, 1, 1)
    assert found.steps_lost == found.tokens_lost == 0


def test_a_second_loss_on_the_way_counts_from_the_first_notice_to_the_last_generation():
    second = [told("lost", 15.1, members=["c/0"]), told("aborted", 15.25, seconds=0.125, slowest_rank_seconds=0.0625),
              told("layout", 15.5, seconds=0.5),
              told("generation", 17.0, generation=3, nodes=2, bytes=400, grouping_seconds=0.5, moving_seconds=1.0, seconds=1.5)]
    found = incident_of([step(2, 17.5, 18.0, 3)], [*STORY, *second])
    assert found.phases == Phases(notice=0.25, abort=0.25, decide=2.5, regroup=0.5, move=1.0, resume=0.5)
    assert (found.first_action, found.bytes, found.nodes, found.attempts) == (5.0, 1000, 2, 2)


def test_a_committed_step_that_is_gone_and_a_short_batch_are_seen():
    assert incident_of([step(1, 15.25, 16.25, 2)], STORY, after=1).steps_lost == 1
    assert incident_of([step(1, 15.25, 16.25, 2)], STORY, after=1).tokens_lost == 16 * 8
    assert incident_of([step(2, 15.25, 16.25, 2, sequences=12)], STORY).tokens_lost == 4 * 8


@pytest.mark.parametrize("steps, events, words", [((), STORY, "no step of generation 2"), ((), (), "no fault is told of"),
                                                  ((), [*STORY, told("generation", 16.0, generation=3)], "state was loaded")])
def test_files_that_do_not_tell(steps, events, words):
    with pytest.raises(ValueError, match=words):
        incident_of(steps, events)


def test_what_was_told_before_the_fault_is_not_of_it():
    earlier = [told("aborted", 9.0, seconds=0.1, slowest_rank_seconds=9.0)]
    assert incident_of([step(2, 15.25, 16.25, 2)], [*earlier, *STORY]).slowest_abort == 0.125


def test_faults_are_spread_over_kinds_nodes_and_places_and_seeded():
    found = blows(KINDS, 20, (1, 2, 3, 4), seed=3)
    assert Counter(blow.kind for blow in found) == dict.fromkeys(KINDS, 5)
    assert {blow.node for blow in found} == {1, 2, 3, 4} and all(0 <= blow.share < 1 for blow in found)
    assert found == blows(KINDS, 20, (1, 2, 3, 4), seed=3) != blows(KINDS, 20, (1, 2, 3, 4), seed=4)


def test_a_line_through_points():
    exact = line_through([(100e6, 0.7), (300e6, 1.1), (1000e6, 2.5)])
    assert exact.constant == pytest.approx(0.5) and 1 / exact.slope == pytest.approx(500e6) and exact.r2 == pytest.approx(1)
    assert line_through([(0, 0.0), (1, 5.0), (2, 0.0)]).r2 == pytest.approx(0)


def result(**changes) -> dict:
    fault = {"kind": "killed", "first_action": 1.0, "steps_lost": 0, "steps_redone": 1, "tokens_lost": 0, "survivors_restarted": 0}
    return {"failed": None, "faults_asked": 1, "audit": {"clean": True}, "faults": [fault | changes]}


@pytest.mark.parametrize("changes, missed", [
    ({}, []), ({"first_action": 1.6}, ["m: first action after a kill <= 1.5 s, median"]),
    ({"kind": "frozen", "first_action": 2.6}, ["m: first action after a cut or a freeze <= 2.5 s, median"]),
    ({"kind": "frozen", "first_action": 2.4}, []), ({"survivors_restarted": 1}, ["m: no survivor was restarted"]),
    ({"steps_lost": 1}, ["m: no committed step lost, at most one redone, no token lost"])])
def test_bars(changes, missed):
    assert [name for name, holds in recovery._verdicts("m", result(**changes)).items() if not holds] == missed


def test_the_picture_is_a_png():
    steps = [*BEFORE, step(2, 15.25, 16.25, 2), step(3, 16.25, 17.0, 2)]
    assert picture(steps, STORY, steps).startswith(b"\x89PNG")


@pytest.mark.long
def test_a_killed_node_on_real_raylets(corpus):
    """One run of the real system, a node with all that runs on it killed, and its way back; the bars are for whole runs."""
    config = load(f"{REPOSITORY}/jobs/configs/tiny.yaml", [f"data.path={corpus}", "data.sequence_length=32"])
    settings = recovery.Settings(faults=0, raylets=4, ranks=1, sequences=8, slope=[1.0], slope_faults=1, silence_seconds=5.0,
                                 peers=False)
    found = recovery.run(config, settings)["slope"]["1M"]
    assert found["failed"] is None and found["audit"]["clean"] and found["came_back"] == ["new raylet"], found
    fault, = found["faults"]
    assert fault["nodes"] < 4 and fault["bytes"] > 1e6 and fault["steps_lost"] == fault["survivors_restarted"] == 0, fault
    assert 0 < fault["aborted"] < fault["first_action"] < fault["full_batch"]
