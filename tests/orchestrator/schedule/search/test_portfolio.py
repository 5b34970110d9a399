"""What the search finds, timed by the simulator and compared with the published kinds."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import pytest

from orchestrator.config.run_config import ConfigError
from orchestrator.schedule.ir.actions import Pair, SplitAction, parse_csv, to_csv
from orchestrator.schedule.ir.check import check, peak_activations
from orchestrator.schedule.ir.lower import lower
from orchestrator.schedule.ir.stages import Stages
from orchestrator.schedule.kinds.registry import KINDS, generate, stages_of
from orchestrator.schedule.search import Options, options_for, search, searched
from orchestrator.schedule.timing.durations import UNIT, Durations, per_chunk, with_communication
from orchestrator.schedule.timing.simulate import makespan, simulate

LAYERS, SOME_EFFORT = 4, 600_000
DEEPSEEK = with_communication(UNIT, 0.913)


def efficiency(found, microbatches, durations):
    """Compute over makespan, as the simulator has it; and that the checker accepts the schedule."""
    schedule = found.schedule
    check(schedule, lower(schedule))
    timed = simulate(schedule, per_chunk(durations, schedule.stages)).makespan
    assert timed == pytest.approx(found.makespan)
    return microbatches * (durations.forward + durations.backward_input + durations.backward_weight) / timed


def test_in_dualpipes_placement_and_memory():
    """0.737 is what DualPipe reaches, 0.779 what nobody can."""
    found = search(32, DEEPSEEK, options_for(8, 32, LAYERS, 9, splits=False, placement="both"))
    assert efficiency(found, 32, DEEPSEEK) >= 0.755
    assert max(peak_activations(found.schedule)) <= 9
    assert not any(isinstance(action, SplitAction) for row in found.schedule.rows for action in row)
    assert found.published == ("dualpipe", pytest.approx(simulate(generate("dualpipe", 8, 32), DEEPSEEK).makespan))
    assert found.lower_bound < found.makespan and found.distance < 0.035


def test_with_any_placement_and_half_microbatches():
    found = search(32, DEEPSEEK, options_for(8, 32, LAYERS, 10))
    assert efficiency(found, 32, DEEPSEEK) >= 0.85
    assert max(peak_activations(found.schedule)) / found.schedule.stages.chunks <= 10


def best_published(positions, microbatches, durations, kept):
    """By the simulator, over all kinds and chunks that take these numbers and keep no more."""
    best = float("inf")
    for kind, chunks in product(KINDS, (None, 2, 4)):
        try:
            stages = stages_of(kind, positions, chunks)
            schedule = generate(kind, positions, microbatches, chunks)
        except (ConfigError, ValueError):
            continue
        if max(peak_activations(schedule)) <= kept * stages.chunks:
            best = min(best, makespan(schedule, per_chunk(durations, stages)))
    return best


SETTINGS = [
    (positions, microbatches, with_communication(Durations(1.0, backward, weight, hop=hop), ratio), kept)
    for (positions, microbatches), (backward, weight, hop, ratio), more in product(
        [(2, 5), (3, 8), (4, 4), (4, 16), (6, 7)],
        [(1.0, 1.0, 0.0, 0.0), (1.5, 1.0, 0.1, 0.5), (1.0, 0.5, 0.0, 0.913)], [1, 4])
    for kept in [positions + more]
]


@pytest.mark.parametrize("positions, microbatches, durations, kept", SETTINGS)
def test_never_worse_than_the_best_published_kind(positions, microbatches, durations, kept):
    assert len(SETTINGS) == 30
    found = search(microbatches, durations, options_for(positions, microbatches, LAYERS, kept), effort=SOME_EFFORT)
    efficiency(found, microbatches, durations)
    assert found.makespan <= best_published(positions, microbatches, durations, kept) + 1e-9
    assert found.lower_bound <= found.makespan + 1e-9


def test_better_where_a_rank_is_slow_and_stages_differ():
    stages = Stages("loop", 4)
    uneven = Durations((1.0, 1.0, 2.0, 1.5), (1.5, 1.0, 2.0, 2.0), (1.0, 1.0, 1.5, 2.0), hop=0.2, slowdown=(1.0, 1.4, 1.0, 1.0),
                       dispatch=0.4, combine=0.4)
    schedule = searched(stages, 11, uneven, 6, effort=SOME_EFFORT).schedule
    check(schedule, lower(schedule), most_activations=6)
    published = min(makespan(generate(kind, 4, 11), uneven) for kind in ("1f1b", "zb_h1", "gpipe"))
    assert makespan(schedule, uneven) < 0.95 * published


@pytest.mark.parametrize("slow", range(2))
def test_better_than_dualpipe_where_the_link_of_a_position_is_slow(slow):
    """Both placements of a bench, whole stages and halves: the same slow position in each."""
    durations = replace(DEEPSEEK, exchange_slowdown=tuple(10.0 if position == slow else 1.0 for position in range(2)), hop=0.05)
    options = Options((Stages("both", 2), Stages("v", 2, 2)), 3, splits=False)
    found = search(8, durations, options, effort=SOME_EFFORT)
    efficiency(found, 8, durations)
    fixed = {kind: makespan(generate(kind, 2, 8), per_chunk(durations, stages_of(kind, 2))) for kind in ("dualpipe", "dualpipev")}
    assert found.lower_bound <= found.makespan < min(fixed.values())


def test_better_with_fewer_microbatches_than_dualpipe_takes():
    durations = with_communication(UNIT, 0.5)
    schedule = searched(Stages("both", 6), 4, durations, effort=SOME_EFFORT).schedule
    check(schedule, lower(schedule), most_activations=7)
    assert makespan(schedule, durations) < 0.9 * best_published(6, 4, durations, 7)


def test_the_same_every_time():
    first, second = (searched(Stages("v", 3, 2), 7, DEEPSEEK, effort=SOME_EFFORT).schedule for _ in range(2))
    assert first == second


def test_it_is_written_and_read_like_any_other():
    schedule = searched(Stages("both", 2), 8, DEEPSEEK, effort=SOME_EFFORT).schedule
    assert parse_csv(to_csv(schedule), "searched", schedule.stages) == schedule
    assert any(isinstance(action, Pair) for row in schedule.rows for action in row)


@pytest.mark.parametrize("wanted, key", [
    ({"microbatches": 7, "placement": "both"}, "microbatches"), ({"positions": 3, "placement": "both"}, "positions"),
    ({"chunks": 3}, "chunks"), ({"placement": "v", "chunks": 1}, "chunks"), ({"most_activations": 0.5}, "most_activations")])
def test_impossible_options_are_refused(wanted, key):
    with pytest.raises(ConfigError) as refused:
        options_for(**{"positions": 4, "microbatches": 8, "layers": 4} | wanted)
    assert refused.value.key == key


@pytest.mark.parametrize("placement, chunks, microbatches", [
    ("both", 1, 7), ("both", 1, 1), ("both", 1, 0), ("v", 2, 0), ("loop", 1, -2)])
def test_microbatches_that_the_entrances_cannot_share_are_refused(placement, chunks, microbatches):
    with pytest.raises(ConfigError) as refused:
        searched(Stages(placement, 4, chunks), microbatches, UNIT, effort=SOME_EFFORT)
    assert (refused.value.key, refused.value.value) == ("microbatches", microbatches)


def test_costs_of_any_size_are_searched_with():
    schedule = searched(Stages("v", 2, 2), 3, replace(DEEPSEEK, forward=1e9), effort=SOME_EFFORT).schedule
    check(schedule, lower(schedule))


def test_too_few_activations_are_refused():
    with pytest.raises(ConfigError) as refused:
        search(8, UNIT, options_for(4, 8, LAYERS, 1, placement="both"), effort=SOME_EFFORT)
    assert (refused.value.key, refused.value.value) == ("most_activations", 1)


def test_halves_that_cost_more_are_used_less():
    cheap, dear = (searched(Stages("both", 4), 12, replace(DEEPSEEK, halves=halves), effort=SOME_EFFORT).schedule
                   for halves in (1.0, 2.0))
    count = [sum(isinstance(action, SplitAction) for row in found.rows for action in row) for found in (cheap, dear)]
    assert count[0] > 2 * count[1]
