"""The schedule bench in small: two ranks, holds of 2 ms. How fast it is does not matter here; that it measures does."""

from __future__ import annotations

import json
import statistics

import pytest

from jobs.benches.schedule import bench as schedule
from jobs.benches.schedule.bench import Block, Settings
from orchestrator.config.run_config import RunConfig
from orchestrator.schedule.kinds.registry import generate
from orchestrator.schedule.timing.simulate import simulate

BLOCK = "4 microbatches, 64 KiB"
KINDS = {"1f1b": 0.006, "zbv": 0.003, "dualpipe": 0.006}  # seconds of F, I and W together in a stage of each


def settings(**changes) -> Settings:
    small = {"ranks": 2, "microbatches": [4], "kibibytes": [64], "milliseconds": 2.0, "repeats": 2, "kinds": [*KINDS],
             "searched": ["v"], "effort": 10_000, "torch": ["Schedule1F1B", "ScheduleZBVZeroBubble"]}
    return Settings(**(small | changes))


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    path = tmp_path_factory.mktemp("bench") / "trace.json"
    return schedule.run(RunConfig(), settings(trace=str(path))), json.loads(path.read_text())


def test_every_contestant_is_measured_as_often(found):
    seconds = found[0]["seconds"][BLOCK]
    assert seconds.keys() == {*KINDS, "searched v", "Schedule1F1B", "ScheduleZBVZeroBubble"}
    assert {len(taken) for taken in seconds.values()} == {2}


def test_nothing_is_faster_than_its_schedule_allows(found):
    """Holds are never too short: no step beats a simulation without hops, nor torch's the time that a rank computes."""
    contestants = found[0]["results"][BLOCK]["contestants"]
    for kind, unit in KINDS.items():
        least = simulate(generate(kind, 2, 4)).makespan * unit / 3
        assert least <= contestants[kind]["simulated"] + 1e-12 and least <= contestants[kind]["min"]
        assert contestants[kind]["measured/simulated"] == contestants[kind]["median"] / contestants[kind]["simulated"]
    for name in ("Schedule1F1B", "ScheduleZBVZeroBubble"):
        assert contestants[name]["min"] >= 4 * 0.006 and "simulated" not in contestants[name]


def test_pairs_and_best_are_ratios_of_medians(found):
    seconds, result = found[0]["seconds"][BLOCK], found[0]["results"][BLOCK]
    median = {name: statistics.median(taken) for name, taken in seconds.items()}
    assert {kind: pair["torch/ours"] for kind, pair in result["pairs"].items()} == {
        "1f1b": median["Schedule1F1B"] / median["1f1b"], "zbv": median["ScheduleZBVZeroBubble"] / median["zbv"]}
    ours = min(median[name] for name in (*KINDS, "searched v"))
    theirs = min(median["Schedule1F1B"], median["ScheduleZBVZeroBubble"])
    assert found[0]["ratio"] == {BLOCK: theirs / ours}


def test_costs_are_measured(found):
    costs = found[0]["costs"]
    assert costs["hold_overshoot_seconds"]["median"] >= 0 and costs["hop_seconds"]["64 KiB"].keys() == {"ours", "torch"}
    assert all(0 < value < 0.01 for value in costs["executor_seconds_per_action"].values())


def test_the_trace_has_a_step_of_each_of_ours(found):
    events = [event for event in found[1]["traceEvents"] if event["ph"] == "X"]
    assert {event["args"]["step"] for event in events} == set(range(len(KINDS) + 1))
    held = [event for event in events if event["cat"] == "compute" and event["args"]["step"] == 0]
    assert sum(event["dur"] for event in held) >= 2 * 4 * 6000


def test_other_work_than_the_schedules_is_found(monkeypatch):
    monkeypatch.setattr(schedule, "expected_sums", lambda *numbers: {"F": 0.0, "I": 0.0})
    with pytest.raises(RuntimeError, match="1f1b, 4 microbatches, 64 KiB: 24 holds, .* not the work of a step"):
        schedule.run(RunConfig(), settings(kinds=["1f1b"], searched=[], torch=[]))


@pytest.mark.parametrize("medians, missed", [
    ({"zbv": 1.03, "ScheduleZBVZeroBubble": 1.2}, None),
    ({"zbv": 1.04, "ScheduleZBVZeroBubble": 1.2}, "zbv takes at most 1.03 of the simulated time"),
    ({"zbv": 1.0, "ScheduleZBVZeroBubble": 1.1}, "our best is 1.15 times as fast as torch's"),
    ({"zbv": 1.0, "ScheduleZBVZeroBubble": 0.9}, "zbv is faster in ours"),
])
def test_verdicts(medians, missed):
    block = Block(4, 64, {"zbv": generate("zbv", 2, 4)}, ["ScheduleZBVZeroBubble"], {"zbv": 1.0}, bound=0.98)
    result = schedule.compare(settings(), block, {name: [median, 9.0, 0.1] for name, median in medians.items()})
    checks = schedule.verdicts(block, result, smallest=True)
    assert len(checks) == 3 and (missed is None) == all(checks.values())
    assert missed is None or not checks[f"{missed}, {BLOCK}"]


@pytest.mark.parametrize("arguments, line", [
    (["schedule", "--option", "repeats=0"], "repeats = 0: an integer (at least 1)"),
    (["schedule", "--option", "repeats"], "--option = repeats: KEY=VALUE"),
    (["schedule", "--option", "searched=[w]"], "searched = w: a placement (both, v, loop)"),
    (["parity", "--option", "repeats=3"], "--option = repeats=3: nothing: parity has no options"),
])
def test_options_are_refused_in_one_line(bench, arguments, line):
    code, out, err = bench(*arguments)
    assert code == 2 and err.startswith(line) and err.count("\n") == 1 and not out
