"""The table's numbers are the published formulas where there is no communication, and conserve work where there is."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.plan.compare import Candidate, Refused, as_objects, compare, contestants, searched_contestants, table
from orchestrator.schedule.ir.actions import to_csv
from orchestrator.schedule.kinds.registry import KINDS, generate
from orchestrator.schedule.timing.durations import UNIT, Durations, per_chunk, with_communication
from orchestrator.schedule.timing.simulate import simulate


def by_name(positions, microbatches, durations=UNIT):
    found, refused = contestants(positions, microbatches, durations)
    assert not refused
    return {result.name: result for result in compare(found)}


@pytest.mark.parametrize("p, m", [(8, 32), (4, 8), (2, 6), (4, 16)])
def test_bubbles_activations_and_messages_are_the_published_formulas(p, m):
    """F 1, B 2, W 1, F&B 3. Bubbles: DeepSeek-V3 report, table 2, where DualPipeV has 2p stages of half the size; interleaved
    kinds: Narayanan et al. 2021, section 2.2; activations and warm-up likewise, the merged kind having one more."""
    rows = by_name(p, m)
    idle = {
        "1f1b": 3 * (p - 1), "gpipe": 3 * (p - 1), "zb_h1": p - 1, "dualpipe": 2 * (p / 2 - 1), "dualpipev": 2 * (p - 1) / 2,
        "interleaved_1f1b, 2 chunks": 3 * (p - 1) / 2, "interleaved_1f1b, 4 chunks": 3 * (p - 1) / 4,
        "merged_interleaved_1f1b, 2 chunks": 3 * (p - 1) / 2, "merged_interleaved_1f1b, 4 chunks": 3 * (p - 1) / 4,
    }
    kept = {
        "1f1b": p, "gpipe": m, "zb_h1": p, "dualpipe": p + 1, "dualpipev": (2 * p + 1) / 2, "zbv": p,
        **{f"interleaved_1f1b, {v} chunks": (2 * (p - 1) + (v - 1) * p + 1) / v for v in (2, 4)},
        **{f"merged_interleaved_1f1b, {v} chunks": (2 * (p - 1) + (v - 1) * p + 2) / v for v in (2, 4)},
    }
    for name, row in rows.items():
        hops = (p * (4 if "4 chunks" in name else 2 if "2 chunks" in name else 1)) - 1
        hops = 2 * (p - 1) if name in ("dualpipev", "zbv") else hops
        assert row.messages == 2 * m * hops, name
        assert row.copies == (2 if name == "dualpipe" else 1), name
        assert row.activations == kept[name], name
        if name == "zbv":
            assert row.makespan < rows["zb_h1"].makespan
        else:
            assert row.makespan == pytest.approx(3 * m + idle[name]), name
        assert (row.efficiency, row.bubble) == pytest.approx((3 * m / row.makespan, 1 - 3 * m / row.makespan)), name
        assert row.exposed == pytest.approx(0), name
    assert {name.partition(",")[0] for name in rows} == set(KINDS) - {"searched"}


@settings(max_examples=15, deadline=None)
@given(unit=st.floats(0.01, 50), ratio=st.floats(0, 2), inputs=st.floats(0.5, 2), weights=st.floats(0.3, 2))
def test_makespans_are_in_forwards_and_shares_add_up(unit, ratio, inputs, weights):
    durations = Durations(unit, unit * inputs, unit * weights, hop=0.1 * unit)
    work = 8 * (1 + inputs + weights)                                                   # of a rank, in F
    for name, row in by_name(4, 8, with_communication(durations, ratio)).items():
        assert row.efficiency == pytest.approx(work / row.makespan), name               # compute is neither lost nor done twice
        assert row.efficiency + row.bubble + row.exposed == pytest.approx(1), name


def test_communication_without_anything_to_hide_it_is_all_exposed():
    rows = by_name(2, 4, with_communication(UNIT, 1.0))
    assert rows["zb_h1"].exposed == pytest.approx(4 * 3 / rows["zb_h1"].makespan)       # F and I alone: all their exchange
    assert rows["1f1b"].exposed * rows["1f1b"].makespan < 4 * 3                         # the weights of a B hide some of its own


def test_durations_by_stage_are_counted_in_mean_forwards():
    schedule = generate("1f1b", 2, 4)
    uneven = Durations(forward=(1.0, 3.0), backward_input=2.0, backward_weight=2.0)
    assert compare([Candidate("uneven", schedule, uneven)])[0].makespan == pytest.approx(simulate(schedule, uneven).makespan / 2)


def test_kinds_that_do_not_take_the_numbers_say_why():
    found, refused = contestants(3, 5, UNIT)
    assert refused == [Refused("dualpipe", "ranks = 3: dualpipe takes 1 or an even number"),
                       Refused("dualpipev", "microbatches = 5: dualpipev takes at least 6 (2 x positions)")]
    assert {c.name for c in found} >= {"1f1b", "gpipe", "zb_h1", "zbv"}
    lines = table(compare(found), refused).splitlines()
    assert lines[-2:] == ["dualpipe: not with ranks = 3: dualpipe takes 1 or an even number",
                          "dualpipev: not with microbatches = 5: dualpipev takes at least 6 (2 x positions)"]


def test_chunks_are_limited_by_the_layers_of_a_rank():
    def interleaved(layers):
        found, _ = contestants(4, 8, Durations(1.0, 1.0, 1.0, layers=layers))
        return [contestant.schedule.stages.chunks for contestant in found if contestant.schedule.kind == "interleaved_1f1b"]

    assert (interleaved(4), interleaved(6), interleaved(3)) == ([2, 4], [2], [1])


def test_table_and_objects_hold_the_same():
    schedule = generate("interleaved_1f1b", 4, 8, 2)
    entry = Candidate("mine", schedule, per_chunk(Durations(2.0, 2.0, 2.0), schedule.stages), lower_bound=50.0)
    results = compare([Candidate("1f1b", generate("1f1b", 4, 8), UNIT), entry])
    shown = as_objects(results)["schedules"]
    assert [row["schedule"] for row in shown] == ["1f1b", "mine"]
    assert (shown[0]["makespan"], shown[0]["lower_bound"], shown[0]["above_bound"]) == (33, None, None)
    assert (shown[1]["makespan"], shown[1]["lower_bound"], shown[1]["above_bound"]) == pytest.approx((28.5, 25, 0.14))
    assert table(results).splitlines() == [
        "schedule  makespan F  efficiency  bubble  exposed  activations  parameters  messages",
        "1f1b           33.00      72.7 %  27.3 %    0.0 %            4         1 x        48",
        "mine           28.50      84.2 %  15.8 %    0.0 %          5.5         1 x       112",
        "mine: no schedule with the same choices is below 25.00 F; this one is 14.0 % above",
    ]


def test_searched_rows():
    durations = with_communication(UNIT, 0.9)
    found, refused = searched_contestants(2, 4, durations, 3, effort=200_000)
    names = [contestant.name.rpartition(",")[0] for contestant in found]
    assert names == ["searched like dualpipe", "searched within 3 activations"]
    assert not refused
    rows = {row.name: row for row in compare(found)}
    like, free = rows.values()
    dualpipe = by_name(2, 4, durations)["dualpipe"]
    assert found[0].schedule.stages.placement == "both" and "/2" not in to_csv(found[0].schedule)
    assert like.activations <= dualpipe.activations and free.activations <= 3
    assert like.lower_bound <= like.makespan <= dualpipe.makespan and free.lower_bound <= free.makespan
    assert "searched like dualpipe, both: no schedule with the same choices is below " in table(rows.values())
    _, refused = searched_contestants(2, 3, durations, 3, effort=20_000)
    assert refused == [Refused("searched like dualpipe", "microbatches = 3: an even number with placement both")]
