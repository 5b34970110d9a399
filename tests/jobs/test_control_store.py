"""A run while Ray's control store is away: what that knows is in Redis, and the head is killed and comes back. Needs root, and
redis-server."""

from __future__ import annotations

import os
import signal

import pytest

from jobs.benches.chaos.raylet_commands import lines, tokens
from jobs.benches.shared.raylets import RayletCluster
from tests.cluster import committed, eventually
from tests.jobs.driver.test_driver import SECONDS, Driven

NODES = 3
GO_ON_SECONDS = 30.0
"""Until a run goes on with those that are left, on a busy machine. Ray asks for a control store that is away for minutes: whoever
waited for it would take longer."""


@pytest.fixture(scope="module")
def cluster():
    with RayletCluster(NODES, 1, redis=True) as found:
        yield found


@pytest.fixture
def run(cluster, tmp_path):
    """Driven from the first node, not from the head; every node has a rank."""
    found = Driven(cluster, tmp_path, tokens(cluster, tmp_path), "kept", node=1, layout={"pipeline": 1, "expert": "auto"},
                   elastic={"copies": 2})
    yield found
    found.close()


@pytest.mark.long
def test_a_run_goes_on_without_the_head_and_takes_up_what_comes_once_that_is_back(cluster, run):
    driver, node, other = cluster.nodes
    run.until_steps(3)
    coordinator = run.actors(b"ray::Coordinator")
    assert set(coordinator) <= set(cluster.pids(driver))

    cluster.kill(0)
    assert run.process.wait(GO_ON_SECONDS) == 1, run.said()
    assert len(run.complained()) == 1 and "Ray's control store has not answered" in run.complained()[0], run.complained()
    run.until_steps(3, driven=False)
    lost, = set(run.ranks) & set(cluster.pids(other))
    os.kill(lost, signal.SIGKILL)
    until_nodes(run, NODES - 1, GO_ON_SECONDS)
    run.until_steps(3, driven=False)
    cluster.kill(node)
    until_nodes(run, NODES - 2, GO_ON_SECONDS)
    run.until_steps(3, driven=False)
    assert run.start(driver).wait(SECONDS) == 1 and "no Ray cluster answers there" in run.complained()[0], run.complained()
    eventually(lambda: "control_store_away" in told(run), GO_ON_SECONDS, "it is told")

    cluster.add(0)
    cluster.add(node)
    until_nodes(run, NODES, SECONDS)  # without a driver
    run.start(driver)
    run.until_said("took over the run: its driver was lost")
    run.until_steps(3)
    assert run.actors(b"ray::Coordinator") == coordinator and len(run.ranks) == NODES
    run.process.send_signal(signal.SIGINT)
    assert run.process.wait(SECONDS) == 130, run.said()
    run.until_nothing_is_left()

    assert run.origins == [None]  # nothing was loaded from storage
    assert not {"state_lost", "started_over", "barred"} & told(run) and "control_store_back" in told(run)
    assert [line["step"] for line in committed(run.path / "ledger.jsonl")] == list(range(run.steps))
    audit = run.job("status", "audit", str(run.path))
    assert audit.returncode == 0 and "each sequence was used exactly once" in audit.stdout, (audit.stdout, audit.stderr)


def told(run: Driven) -> set[str]:
    return {event["event"] for event in lines(run.path / "events.jsonl")}


def until_nodes(run: Driven, count: int, seconds: float) -> None:
    """The newest generation has so many."""
    def there() -> bool:
        found = [event for event in lines(run.path / "events.jsonl") if event["event"] == "generation"]
        return bool(found) and found[-1]["nodes"] == count
    eventually(there, seconds, f"a generation of {count} nodes")
