"""A run that is started before its nodes are there, or again where there are fewer."""

from __future__ import annotations

import json
import re

import pytest

from jobs import train
from jobs.driver import takeover
from orchestrator.config.run_config import ConfigError, parse
from orchestrator.topology import Node
from tests.cluster import eventually
from tests.jobs.conftest import CONFIG, refused


@pytest.mark.parametrize("changes, code, told", [
    ({"elastic__min_nodes": 3}, 2, "elastic.min_nodes = 3: at most topology.virtual_nodes = 1"),
    ({"elastic__min_nodes": 40, "elastic__wait_seconds": 0.5, "topology__virtual_nodes": 0}, 1,
     r"no more than \d+ of at least 40 nodes within elastic.wait_seconds = 0.5"),
])
def test_too_few_nodes_are_one_line(cluster, settings, changes, code, told):
    done = cluster.run(*settings("few", **changes))
    assert done.returncode == code
    assert len(done.stderr.splitlines()) == 1
    assert re.search(told, done.stderr), done.stderr


def test_it_waits_for_the_least_number_of_nodes(cluster, settings, ray_local):
    """The head offers ranks by CPUs until nodes with the resource `rank` come; the run takes these."""
    process = cluster.start(*settings("waiting", elastic__min_nodes=2, elastic__silence_seconds=5.0, topology__virtual_nodes=0,
                                      topology__ranks_per_node=1, training__steps=3))
    eventually(lambda: "waiting: 1 of at least 2 nodes are there" in process.stdout.readline(), 60, "it says that it waits")
    added = cluster.add_nodes({"rank": 1}, ["", ""])
    try:
        out, err = process.communicate(timeout=120)
        assert process.returncode == 0, (out, err)
    finally:
        for node in added:
            cluster.remove_node(node)
        eventually(lambda: not ray_local.cluster_resources().get("rank"), 60, "the nodes are gone")


def test_only_a_run_that_has_begun_makes_do_with_fewer_nodes(monkeypatch):
    pinned = parse(CONFIG | {"layout": {"pipeline": 2, "expert": 2}}, [])
    nodes, begun = (Node("a", 2), Node("b", 1)), []
    monkeypatch.setattr(takeover, "has_begun", lambda folder: bool(begun))
    with pytest.raises(ConfigError, match="layout.expert = 2: needs 4 ranks"):
        train._laid_out(pinned, nodes, None)
    begun.append("steps")
    found = train._laid_out(pinned, nodes, None)
    assert found.notes == ("layout.expert = 2 cannot be met: auto",)
    assert (found.layout.size, found.config.layout.expert) == (2, "auto")
    assert not found.layout.meets(pinned.layout, pinned.stages)
    enough = train._laid_out(pinned, (Node("a", 2), Node("b", 2)), None)
    assert (enough.notes, enough.layout.size, enough.config) == ((), 4, pinned)


def test_started_again_on_fewer_nodes(cluster, settings):
    command = settings("fewer", layout__expert=2, topology__ranks_per_node=4, training__steps=2)
    note, fewer = "layout.expert = 2 cannot be met: auto", ["--set", "topology.ranks_per_node=2"]
    refused(cluster.run(*command, *fewer), 2, "layout.expert = 2: needs 4 ranks")
    first = cluster.run(*command)
    assert first.returncode == 0 and note not in first.stdout, (first.stdout, first.stderr)
    again = cluster.run(*command, *fewer, "--set", "training.steps=4")
    assert again.returncode == 0 and note in again.stdout.splitlines(), (again.stdout, again.stderr)
    events = [json.loads(line) for line in (settings.runs / "fewer" / "events.jsonl").read_text().splitlines()]
    formed = [event["layout"] for event in events if event["event"] == "generation"]
    assert [layout.partition(":")[0] for layout in formed] == ["PP2 x EP2 x DP1", "PP2 x EP1 x DP1"], formed
    assert [event["step"] for event in events if event["event"] == "resumed"] == [2]
