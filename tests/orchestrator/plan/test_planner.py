"""The plan of a run, and how it reads."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

from orchestrator.config.run_config import ConfigError, parse
from orchestrator.plan import cost, planner
from orchestrator.schedule.kinds.registry import TABLE
from orchestrator.state.ownership import buckets
from tests.orchestrator.layouts import DEEPSEEK_CONFIG, layout_of, small_model

MODEL = small_model()


def planned(ranks, pipeline, schedule=None, **training):
    config = parse({"model": MODEL.model_dump(), "layout": {"pipeline": pipeline}, "schedule": schedule or {},
                    "training": {"batch_sequences": 32} | training})
    return config, planner.plan(config, layout_of(ranks, pipeline, MODEL, config.stages))


def test_deepseeks_own():
    """2048 accelerators: 15360 sequences are 120 microbatches of a pipeline; 3072 would be 24, and DualPipe takes 32."""
    config = DEEPSEEK_CONFIG
    layout = layout_of((8,) * 256, 16, config.model, expert=64, data=2, shape=(1, 8))
    found = planner.plan(config, layout)
    assert found.microbatches == (32, 120)
    assert found.empty == (128 * 32 - 3072, 0)
    assert found.fewest_owners == 2 and len(found.memory) == 16
    lines = planner.describe(config, found)
    assert lines[:4] == [
        ("model        671.0B parameters (and 11.6B for multi-token prediction), 37.6B used by a token; "
        "bfloat16, recompute selective"),
        "layout       PP16 x EP64 x DP2: 2048 ranks in 16 rows on 256 nodes, cells of 1 positions x 8 ranks",
        ("step         15360 sequences (growing from 3072) of 4096 tokens; 120 microbatches of 1 on each of 128 streams, "
        "0 of 15360 empty"),
        "schedule     dualpipe"]
    assert [line for line in lines if line.startswith("node ")][-2:] == [
        "node         n15: ranks 120-127 (row 0, position 15)", "node         and 240 more"]
    assert lines[-1] == "state        every optimizer shard on 2 nodes"


def test_describe_a_small_run():
    config, found = planned((2, 2), 2)
    lines = planner.describe(config, found)
    assert lines[1:7] == [
        "layout       PP2 x EP2 x DP1: 4 ranks in 2 rows on 2 nodes, cells of 2 positions x 1 ranks",
        "step         32 sequences of 128 tokens; 4 microbatches of 4 on each of 2 streams, 0 of 8 empty",
        "schedule     dualpipe",
        "programs     lowered and checked for 4 microbatches: complete, in order, free of deadlock",
        "node         n0: rank 0 (row 0, position 0), rank 1 (row 0, position 1)",
        "node         n1: rank 2 (row 1, position 0), rank 3 (row 1, position 1)"]
    amount = r"[\d.]+ ([KMG]i)?B"
    assert [bool(re.fullmatch(
        rf"memory       position {p} \(stages {p}, {1 - p}\): {amount} a rank = weights {amount} \+ gradients {amount} \+ "
        rf"optimizer {amount} \+ activations {amount}, estimated", line)) for p, line in enumerate(lines[7:9])] == [True, True]
    assert lines[9:] == ["state        every optimizer shard on 2 nodes"]
    assert all(line.isprintable() for line in lines)


@pytest.mark.parametrize("ranks, copies, line", [
    ((2,), 1, ("every optimizer shard on 1 node (elastic.copies wants 2: too few nodes; losing any node means going back to a "
              "checkpoint)")),
    ((2, 2), 2, ("every optimizer shard on 2 nodes (elastic.copies wants 3: too few nodes; losing 2 nodes means going back to a "
                "checkpoint)")),
    ((2, 2, 2), 2, "every optimizer shard on 3 nodes"), ((2, 2), 0, "every optimizer shard on 1 node")])
def test_describe_says_what_a_lost_node_costs(ranks, copies, line):
    config = parse({"model": MODEL.model_dump(), "elastic": {"copies": copies}})
    lines = planner.describe(config, planner.plan(config, layout_of(ranks, 2, MODEL)))
    assert lines[-1] == f"state        {line}"


def test_one_position():
    config, found = planned((2, 2), 1)
    lines = planner.describe(config, found)
    assert "schedule     dualpipe (one position: no pipeline)" in lines
    assert any(line.startswith("memory       position 0 (stage 0): ") for line in lines)


@pytest.mark.parametrize("pipeline, schedule, line, stages, peaks", [
    (3, {"kind": "gpipe"}, "schedule     gpipe", ["stage 0", "stage 1", "stage 2"], [6, 6, 6]),
    (3, {"kind": "1f1b"}, "schedule     1f1b", ["stage 0", "stage 1", "stage 2"], [3, 2, 1]),
    (2, {"kind": "zbv"}, "schedule     zbv, 4 stages, 2 on each position in a V", ["stages 0, 3", "stages 1, 2"], [4, 4]),
    (2, {"kind": "interleaved_1f1b"}, "schedule     interleaved_1f1b, 4 stages, 2 on each position in a loop",
     ["stages 0, 2", "stages 1, 3"], [5, 3]),
    (1, {"kind": "dualpipev"}, "schedule     dualpipev, 2 stages, 2 on each position in a V (one position: no pipeline)",
     ["stages 0, 1"], [3])])
def test_other_kinds(pipeline, schedule, line, stages, peaks):
    """One row, 6 microbatches; peaks are those that the kinds promise."""
    config, found = planned((1,) * pipeline, pipeline, schedule, batch_sequences=24)
    assert found.microbatches == (6, 6) and found.empty == (0, 0)
    lines = planner.describe(config, found)
    assert line in lines
    told = [text.split("(")[1].split(")")[0] for text in lines if text.startswith("memory ")]
    assert told == stages
    ranks = cost.memory(config, found.layout, buckets(MODEL, found.layout, 1), [1] * pipeline)
    of_one = [ranks[position].activations for position in range(pipeline)]
    assert [memory.activations for memory in found.memory] == [peak * one for peak, one in zip(peaks, of_one)]


def test_a_search_tells_which_placement_it_is_for():
    config, found = planned((1, 1), 2, {"kind": "searched"}, batch_sequences=8)
    assert "schedule     searched, placement both" in planner.describe(config, found)


@pytest.mark.parametrize("kind, pipeline, chosen, kept", [
    ("searched", 2, {}, [3, 3]),                            # as many as DualPipe, if the schedule may have any
    ("searched", 2, {"most_activations": 5}, [5, 5]), ("searched", 2, {"most_activations": 50}, [6, 6]),
    ("searched", 2, {"placement": "v", "most_activations": 2.5}, [5, 5]), ("1f1b", 3, {}, [3, 2, 1])])
def test_what_was_not_checked_in_time_is_called_that_and_has_the_most_memory(kind, pipeline, chosen, kept):
    config = parse({"model": MODEL.model_dump(), "layout": {"pipeline": pipeline}, "schedule": {"kind": kind, **chosen},
                    "training": {"batch_sequences": 24}})
    layout = layout_of((1,) * pipeline, pipeline, MODEL, config.stages)
    found = planner.plan(config, layout, lambda prove: None)
    assert not found.proven and found.microbatches == (6, 6)
    assert ("programs     not checked for 6 microbatches, since the time for it ran out; activations are the most that this kind "
            "of schedule may keep") in planner.describe(config, found)
    ranks = cost.memory(config, layout, buckets(MODEL, layout, 1), kept)
    assert [memory.activations for memory in found.memory] == [rank.activations for rank in ranks]


def test_a_schedule_that_does_not_run_is_refused_by_its_kind(monkeypatch):
    late = replace(TABLE["gpipe"], generator=lambda stages, microbatches: tuple(
        row[::-1] for row in TABLE["1f1b"].generator(stages, microbatches)))
    monkeypatch.setitem(TABLE, "gpipe", late)
    with pytest.raises(ConfigError) as refusal:
        planned((1, 1), 2, {"kind": "gpipe"}, batch_sequences=8)
    assert str(refusal.value) == ("schedule.kind = gpipe: a kind whose schedule runs with 2 microbatches on 2 positions "
                                  "(position 0, action 0: B0.1 needs F0.1 first)")


def test_the_first_and_the_last_step_are_checked():
    asked = []
    config, found = planned((2, 2), 2, batch_sequences=64, batch_ramp={"start_sequences": 16, "steps": 10})
    planner.plan(config, found.layout, lambda prove: asked.append(prove()) or asked[-1])
    assert found.proven and asked == [(3, 3)] and found.microbatches == (4, 8)
    assert "programs     lowered and checked for 4 and 8 microbatches: complete, in order, free of deadlock" in planner.describe(
        config, found)


def test_memory_is_of_the_fullest_rank():
    config, found = planned((2, 2, 2), 2)
    in_flight = [3, 3]  # P + 1 microbatches
    ranks = cost.memory(config, found.layout, buckets(MODEL, found.layout, 1), in_flight)
    for position, memory in enumerate(found.memory):
        totals = [ranks[place.rank].total for place in found.layout.places if place.position == position]
        assert memory.total == max(totals)
    assert len({memory.total for memory in ranks}) > 1


def test_empty_microbatches():
    _, found = planned((2, 2), 2, batch_sequences=9, microbatch_sequences=4,
                       batch_ramp={"start_sequences": 1, "steps": 10})
    assert found.microbatches == (4, 4)  # the fewest of two positions
    assert found.empty == (7, 4)


def lines_about_experts(nodes: int, **layout) -> list[str]:
    """DeepSeek-V3's experts on nodes of 2 positions x 4 ranks."""
    config = parse({"model": DEEPSEEK_CONFIG.model.model_dump(), "layout": {"pipeline": 2, "shape": [2, 4]} | layout,
                    "training": {"batch_sequences": 256}})
    placed = layout_of((8,) * nodes, 2, config.model, config.stages, shape=(2, 4), **layout)
    return [line for line in planner.describe(config, planner.plan(config, placed)) if line.startswith("experts ")]


@pytest.mark.parametrize("nodes", [2, 4, 8, 16])
def test_nothing_is_said_where_groups_divide_by_rows(nodes):
    assert lines_about_experts(nodes) == []


@pytest.mark.parametrize("nodes, lines", [
    (6, ["experts      8 groups on 6 rows (2, 1, 1, 2, 1, 1), the fullest rank 1.50 x the mean; a token reaches at most 4 nodes",
         ("experts      evener: 1.12 x with layout.data = 2, at the price of memory; 1.12 x, but up to 6 nodes, with "
          "layout.group_parts = 2; 1.03 x, but up to 6 nodes, with layout.group_parts = 3")]),
    (7, [("experts      8 groups on 7 rows (2, 1, 1, 1, 1, 1, 1), the fullest rank 1.75 x the mean; a token reaches at most "
          "4 nodes"),
         ("experts      evener: 1.12 x with layout.data = 2, at the price of memory; 1.31 x, but up to 5 nodes, with "
          "layout.group_parts = 2; 1.09 x, but up to 7 nodes, with layout.group_parts = 4")])])
def test_uneven_nodes_are_told(nodes, lines):
    """6 and 7 nodes of 8 groups: 1.5 and 1.75 x the mean. Whole groups on 3 + 3 and on 4 + 3 rows are 3 on a row of 8 / 3."""
    assert lines_about_experts(nodes) == lines


def test_uneven_replicas_are_told_apart():
    """4 + 3 rows: nothing to say of the first; where `layout.expert` is pinned, the number of replicas is not advised."""
    first, *more = lines_about_experts(7, data=2)
    assert first.startswith("experts      replica 0: 8 groups on 3 rows (3, 3, 2), the fullest rank 1.12 x the mean; ")
    assert len(more) == 1 and "layout.data = 4" in more[0] and "up to 3 nodes, with layout.group_parts = 3" in more[0]
    assert "layout.data" not in "".join(lines_about_experts(6, expert=24))


@pytest.mark.parametrize("nodes, parts, lines", [
    (6, 2, [("experts      8 groups, 2 of them cut in 2, on 6 rows (48, 48, 48, 48, 32, 32 experts), the fullest rank 1.12 x the "
             "mean; a token reaches at most 6 nodes"),
            ("experts      evener: 1.00 x with layout.data = 3, at the price of memory; 1.03 x, but up to 6 nodes, with "
             "layout.group_parts = 3")]),
    (7, 4, [("experts      8 groups, 1 of them cut in 4, on 7 rows (40, 40, 40, 40, 32, 32, 32 experts), the fullest rank 1.09 x "
             "the mean; a token reaches at most 7 nodes"),
            "experts      evener: 1.03 x with layout.data = 2, at the price of memory"]), (8, 4, [])])
def test_configured_parts_are_what_is_told(nodes, parts, lines):
    """The promise of the first line is what the same number of parts was said to give."""
    assert lines_about_experts(nodes, group_parts=parts) == lines
