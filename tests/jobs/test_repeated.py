"""A run that lost a rank, repeated through the layouts that its ledger records."""

from __future__ import annotations

import json
import math
import os
import signal

from tests.cluster import committed, eventually


def lines(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_run_through_a_loss_is_repeated_bit_for_bit(cluster, settings):
    """And a ledger that says otherwise is caught at the step where it does."""
    steps = {"training__steps": 40, "training__validate_every": 0, "checkpoint__every": 0, "topology__virtual_nodes": 2,
             "topology__ranks_per_node": 1}
    process = cluster.start(*settings("first", **steps))
    metrics = settings.runs / "first" / "metrics.jsonl"
    eventually(lambda: process.poll() is not None or (metrics.exists() and len(metrics.read_text().splitlines()) >= 3), 90, "steps")
    os.kill(next(pid for pid, command in cluster.processes() if command.startswith(b"ray::StageActor")), signal.SIGKILL)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, (out, err)
    recorded = committed(settings.runs / "first" / "ledger.jsonl")
    assert [line["step"] for line in recorded] == list(range(40))
    assert len({line["generation"] for line in recorded}) >= 2
    told = {event["event"] for event in lines(settings.runs / "first" / "events.jsonl")}
    assert "lost" in told and "state_lost" not in told
    assert {len(line["layout"]["cells"][0]) for line in recorded if "layout" in line} == {1, 2}  # PP2, and what one rank can do

    ledger = settings.runs / "first" / "ledger.jsonl"
    recorded[5]["loss"] = math.nextafter(recorded[5]["loss"], 100.0)
    changed = settings.runs / "changed.jsonl"
    changed.write_text("".join(json.dumps(line | {"previous": None}) + "\n" for line in recorded))
    recorded = committed(ledger)
    done, other = cluster.run_all([*settings("again", **steps), "--replay", str(ledger)],
                                  [*settings("other", **steps), "--replay", str(changed)])
    assert done.returncode == 0, done.stderr
    again = committed(settings.runs / "again" / "ledger.jsonl")
    assert [line["loss"] for line in again] == [line["loss"] for line in recorded]
    assert [line["digest"] for line in again] == [line["digest"] for line in recorded]
    assert [line["layout"] for line in again if "layout" in line] == [line["layout"] for line in recorded if "layout" in line]

    assert other.returncode == 1 and other.stderr.startswith("step 5: loss "), other.stderr
    assert len(committed(settings.runs / "other" / "ledger.jsonl")) == 5


def test_what_cannot_be_repeated_is_refused(cluster, settings, tmp_path):
    none = cluster.run(*settings("refused"), "--replay", str(tmp_path / "none.jsonl"))
    assert none.returncode == 2 and none.stderr.startswith("--replay = ") and len(none.stderr.splitlines()) == 1
