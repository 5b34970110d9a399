"""Every series that the coordinator exports, against what it was told; over HTTP they are in test_exporter.py."""

from __future__ import annotations

import math
import time

import pytest

from actors.telemetry.exporter import RunMetrics, json_route
from tests.told_events import told

STEP = {"step": 7, "loss": 4.5, "tokens": 512, "tokens_per_second": 2000.0, "seconds": 0.25, "overlap_ratio": 0.5,
        "bubble_ratio": 0.125, "exposed_comm_seconds": 0.0625, "gradient_norm": 1.5, "learning_rate": 1e-3, "busiest_expert": 1.25,
        "generation": 1, "nodes": 2, "bytes_across_nodes": 300, "bytes_inside_nodes": 70, "time": 1600.5,
        "spent": {"useful": 0.5, "recovery": 0.25}}
SPENT = ("useful", "exposed_communication", "bubble", "coordination", "data", "validation", "checkpoint", "placement", "recovery")


@pytest.fixture
def metrics():
    return RunMetrics()


def value(metrics, name, **labels):
    return metrics.registry.get_sample_value(f"dualray_{name}", labels)


def values(metrics, *names):
    return [value(metrics, name) for name in names]


def test_a_run_that_has_just_begun():
    before = time.time()
    metrics = RunMetrics(steps=9, save_every=4)
    for name in ("checkpoint_timestamp_seconds", "committed_step_timestamp_seconds"):  # so that an alert may measure how old it is
        assert before <= value(metrics, name) <= time.time()
    assert value(metrics, "checkpoint_every_steps") == 4
    assert [value(metrics, "spent_seconds_total", on=kind) for kind in SPENT] == [0.0] * 9
    assert values(metrics, "tokens_total", "failures_total", "lost_ranks_total", "recoveries_total", "not_finite_total", "ended",
                  "waiting_for_nodes", "checkpoint_step", "model_flops_utilisation_ratio") == [0.0] * 8 + [None]


def test_a_step_is_in_every_series(metrics):
    metrics.observe("step", STEP | {"mfu": 0.375})
    assert values(metrics, "committed_step", "loss", "tokens_per_second", "step_seconds", "overlap_ratio", "bubble_ratio",
                  "exposed_communication_seconds", "gradient_norm", "learning_rate", "expert_load_ratio", "generation",
                  "nodes") == [
        7, 4.5, 2000.0, 0.25, 0.5, 0.125, 0.0625, 1.5, 1e-3, 1.25, 1, 2]
    assert values(metrics, "tokens_total", "exchange_across_nodes_bytes_total", "exchange_inside_nodes_bytes_total",
                  "committed_step_timestamp_seconds", "model_flops_utilisation_ratio") == [512, 300, 70, 1600.5, 0.375]
    metrics.observe("step", STEP | {"mfu": 0.25, "step": 8, "nodes": 1})
    assert values(metrics, "committed_step", "nodes", "tokens_total", "model_flops_utilisation_ratio") == [8, 1, 1024, 0.25]
    assert value(metrics, "spent_seconds_total", on="useful") == 1.0 and value(metrics, "spent_seconds_total", on="recovery") == 0.5


def test_steps_that_are_done_again_are_in_no_second_time(metrics):
    """They were told as useful and are now part of the recovery; a counter cannot go back."""
    metrics.observe("step", STEP | {"spent": {"useful": 2.0, "recovery": 31.0}, "redone": 30.0})
    assert value(metrics, "spent_seconds_total", on="recovery") == 1.0 and value(metrics, "spent_seconds_total", on="useful") == 2.0
    metrics.observe("step", STEP | {"spent": {"useful": 2.0, "recovery": 3.0}, "redone": 3.5})
    assert value(metrics, "spent_seconds_total", on="recovery") == 1.0 and value(metrics, "spent_seconds_total", on="useful") == 4.0


def test_a_run_ends_with_its_last_step_or_when_it_is_said():
    metrics, stopped, endless = RunMetrics(steps=9), RunMetrics(steps=9), RunMetrics()
    for step in (6, 7, 8, 9):
        metrics.observe("step", STEP | {"step": step})
        endless.observe("step", STEP | {"step": step})
        assert value(metrics, "ended") == (step >= 8)
    stopped.ended()
    assert value(stopped, "ended") == 1 and value(endless, "ended") == 0


@pytest.mark.parametrize("stands", [told("generation", nodes=3), told("generation", nodes=3, seconds=0.5), None],
                         ids=["state loaded", "state in memory", "a step"])
def test_it_waits_for_nodes_until_it_goes_on(metrics, stands):
    metrics.observe("event", told("waiting", reason="few"))
    assert value(metrics, "waiting_for_nodes") == 1
    metrics.observe("event", stands) if stands else metrics.observe("step", STEP | {"nodes": 3})
    assert values(metrics, "waiting_for_nodes", "nodes") == [0, 3]


def test_what_is_lost_at_once_is_one_failure(metrics):
    metrics.observe("event", told("lost", members=["a/0", "a/1", "b/0"]))
    metrics.observe("event", told("lost", members=["c/0"]))
    metrics.observe("event", told("not_finite"))
    assert values(metrics, "failures_total", "lost_ranks_total", "not_finite_total", "recoveries_total") == [2, 4, 1, 0]


def test_state_that_moves_is_counted_and_a_beginning_is_no_recovery(metrics):
    metrics.observe("event", told("generation", generation=1, nodes=2))
    assert values(metrics, "recoveries_total", "recovery_seconds", "moved_state_bytes_total") == [0, 0, 0]
    for seconds, moved in ((0.75, 4096), (0.5, 1024)):
        metrics.observe("event", told("generation", seconds=seconds, bytes=moved))
    assert values(metrics, "recoveries_total", "recovery_seconds", "moved_state_bytes_total") == [2, 0.5, 5120]
    metrics.observe("event", told("generation", recovery_seconds=0.0))
    assert values(metrics, "recoveries_total", "recovery_seconds") == [3, 0.0]


def test_of_what_was_saved_and_scored_before_the_newest_is_remembered_and_no_loss(metrics):
    metrics.recall([told("checkpoint", 3.0, step=4), told("validation", 4.0, loss=2.5, step=4), told("checkpoint", 5.0, step=6),
                    told("lost", members=["a/0"]), told("waiting", reason="few")])
    assert values(metrics, "checkpoint_step", "checkpoint_timestamp_seconds", "validation_loss", "lost_ranks_total",
                  "waiting_for_nodes") == [6, 5.0, 2.5, 0, 0]


def test_what_json_has_no_word_for_is_null():
    found = {"a": [math.nan, 1.5, (math.inf, 2)], "b": {"c": -math.inf, "d": "text", "e": None, "f": True}}
    kind, content = json_route(lambda: found)()
    assert kind == "application/json"
    assert content == b'{"a": [null, 1.5, [null, 2]], "b": {"c": null, "d": "text", "e": null, "f": true}}'
