"""Changes of nodes are planned as they should be, shares of time are computed from a run's steps, and short runs hold what does not
depend on how busy the host is: tokens and losses."""

from __future__ import annotations

import pytest

from jobs.benches.churn import bench as churn
from jobs.benches.churn.run import DRAINED, FROZEN, JOINED, LOST, Said, changes
from jobs.benches.commit import bench as commit
from orchestrator.config.run_config import load
from tests.cluster import REPOSITORY

NODES = ("a", "b", "c", "d")


@pytest.fixture
def config(corpus):
    return load(f"{REPOSITORY}/jobs/configs/tiny.yaml", [f"data.path={corpus}", "data.sequence_length=32"])


@pytest.mark.parametrize("seed", range(20))
def test_only_nodes_that_are_there_go_and_only_those_that_went_come_back(seed):
    present, kinds = set(NODES), set()
    planned = changes(NODES, 2, 19, 30.0, seed)
    for index, change in enumerate(planned):
        assert change.seconds == 30.0 * (index + 1)
        assert (change.node in present) == (change.kind != JOINED)
        present ^= {change.node}
        assert len(present) >= 2
        kinds.add(change.kind)
    assert kinds == {LOST, DRAINED, JOINED, FROZEN} and planned == changes(NODES, 2, 19, 30.0, seed)


def steps(times, nodes=4, loss=2.0):
    """Each took all the time since the one before but 0.01 s."""
    return [{"time": time, "seconds": time - before - 0.01, "nodes": nodes, "loss": loss} for before, time in zip([0, *times], times)]


def test_shares_of_time_and_the_curve():
    alone = {4: steps([1, 2, 3, 4, 5, 6]), 3: steps([2, 4, 6, 8, 10, 12], 3)}
    told = Said(steps([1, 2, 3, 4, 5]) + [step | {"time": 5 + 3 + step["time"]} for step in steps([2, 4], 3)])
    told.steps[1]["loss"] = 2.0 * (1 + 1e-6)
    found = churn.figures(told, alone, 5)
    assert found["seconds"]["wall"] == 9 and found["seconds"]["step_alone"] == {4: 1, 3: 2}
    assert found["ratio"]["useful"] == pytest.approx((2 * 0.99 + 2 * 1.99) / 9)
    assert found["ratio"]["throughput"] == pytest.approx((2 * 1 + 2 * 2) / 9)
    assert found["curve"]["steps"] == 5 and found["curve"]["largest_relative_difference"] == pytest.approx(1e-6)


@pytest.mark.long
def test_a_short_churn(config):
    """Two changes, five seconds apart, of a run on six processes."""
    settings = churn.Settings(seconds=11, every=5, nodes=3, sequences=6, milliseconds=5, seed=1, silence_seconds=2.0, curve_steps=12,
                              alone_steps=6)
    found = churn.run(config, settings)
    timed = [name for name in found["checks"] if "time" in name.split("(")[0] or "throughput" in name or "steps take" in name]
    assert all(holds for name, holds in found["checks"].items() if name not in timed), found["checks"]
    assert found["audit"]["sequences"] == 6 * found["steps"]["committed"] and found["events"]["generation"] > 1, found["events"]


def test_a_short_commit(config):
    settings = commit.Settings(kinds=["1f1b"], nodes=2, sequences=4, milliseconds=4, steps=5, repeats=1)
    found = commit.run(config, settings)
    assert found["checks"]["two owners hold the same curve as one"]
    assert all(len(times) == 1 and times[0] > 0.03 for times in found["seconds"]["1f1b"].values()), found["seconds"]
