"""The annealer's short cuts give what working everything out gives."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from orchestrator.schedule.kinds.registry import generate
from orchestrator.schedule.search.anneal import OF_PAIRS, OF_SINGLES, is_mirrored, mirrored, shift
from orchestrator.schedule.search.evaluator import IncrementalEvaluator, differing
from orchestrator.schedule.search.problem import NEVER, Problem
from orchestrator.schedule.timing.durations import UNIT, Durations, with_communication

COSTS = [UNIT, with_communication(UNIT, 0.913),
         replace(with_communication(Durations(2.0, 3.0, 1.0, hop=0.3), 0.5), slowdown=(1.0, 1.5, 1.0, 0.5), links={(1, 2): 4.0}),
         replace(with_communication(UNIT, 0.913), exchange_slowdown=(6.0, 1.0, 1.0, 1.0))]


def changes(problem, evaluator, chance, count):
    """Rows with one random change each, right or wrong."""
    while count:
        position = chance.randrange(problem.positions)
        row = evaluator.rows[position]
        index = chance.randrange(len(row))
        change = chance.choice((shift, *(OF_PAIRS if len(row[index].parts) == 2 else OF_SINGLES)))
        changed = change(problem, position, row, index, chance)
        if changed is not None:
            count -= 1
            yield position, changed


@pytest.mark.parametrize("durations", COSTS)
@pytest.mark.parametrize("kind, kept", [("dualpipe", 5), ("zbv", 5), ("1f1b", 6)])
def test_attempts_are_what_working_everything_out_gives(kind, kept, durations):
    schedule = generate(kind, 4, 10)
    problem = Problem(schedule.stages, 10, durations, kept, splits=True)
    evaluator, chance = IncrementalEvaluator(problem, problem.rows(schedule)), random.Random(5)
    allowed = accepted = stuck = 0
    for position, changed in changes(problem, evaluator, chance, 600):
        assert evaluator.allows(position, changed) == problem.allows(changed)
        if not problem.allows(changed):
            continue
        allowed += 1
        bound = evaluator.makespan + chance.choice((1e-6, 0.5, 3.0, 1e9))
        rows = [changed if p == position else row for p, row in enumerate(evaluator.rows)]
        trial, whole = evaluator.attempt({position: changed}, bound), problem.makespan(rows, bound)
        assert (trial is None) == (whole == NEVER)
        stuck += trial is None and bound > 1e8
        if trial is not None:
            assert trial.makespan == pytest.approx(whole)
            evaluator.accept(trial)
            accepted += 1
    assert allowed > 150 and accepted > 50 and stuck > 0


@pytest.mark.parametrize("durations", COSTS)
def test_actions_without_slack_are_those_whose_delay_delays_the_end(durations):
    schedule = generate("dualpipe", 4, 8)
    problem = Problem(schedule.stages, 8, durations, 5, splits=False)
    rows = problem.rows(schedule)
    evaluator = IncrementalEvaluator(problem, rows)
    for position, row in enumerate(rows):
        for index, move in enumerate(row):
            late = [*row[:index], replace(move, duration=move.duration + 1e-3), *row[index + 1:]]
            delayed = problem.makespan([late if p == position else r for p, r in enumerate(rows)])
            assert ((position, index) in evaluator.critical) == (delayed > evaluator.makespan + 0.5e-3)


def test_two_changes_at_once():
    schedule = generate("dualpipe", 4, 12)
    problem = Problem(schedule.stages, 12, COSTS[1], 6, splits=True)
    evaluator, chance = IncrementalEvaluator(problem, problem.rows(schedule)), random.Random(2)
    for _ in range(200):
        made = {p: row for p, row in changes(problem, evaluator, chance, 3) if problem.allows(row)}
        rows = [made.get(p, row) for p, row in enumerate(evaluator.rows)]
        trial, whole = evaluator.attempt(made, evaluator.makespan + 1.01), problem.makespan(rows, evaluator.makespan + 1.01)
        assert (trial.makespan if trial else NEVER) == pytest.approx(whole)
        if trial:
            evaluator.accept(trial)


def test_rows_that_never_end_are_no_board():
    schedule = generate("1f1b", 2, 2)
    problem = Problem(schedule.stages, 2, UNIT, 2, splits=False)
    rows = [[problem.move(0, ((kind, 0, m),)) for kind, m in ((0, 0), (1, 0), (0, 1), (1, 1))],
            [problem.move(1, ((0, 0, m),)) for m in (0, 1)] + [problem.move(1, ((1, 0, m),)) for m in (1, 0)]]
    with pytest.raises(ValueError, match="for ever"):
        IncrementalEvaluator(problem, rows)


def test_dualpipe_is_its_own_mirror_image():
    schedule = generate("dualpipe", 4, 8)
    problem = Problem(schedule.stages, 8, UNIT, 5, splits=False)
    rows = problem.rows(schedule)
    assert is_mirrored(problem, rows) and mirrored(problem, rows) == rows
    assert not is_mirrored(problem, [rows[0][1:] + rows[0][:1], *rows[1:]])
    for name in ("slowdown", "exchange_slowdown"):
        durations = replace(with_communication(UNIT, 0.913), **{name: (2.0, 1.0, 1.0, 1.0)})
        slow = Problem(schedule.stages, 8, durations, 5, splits=False)
        assert not is_mirrored(slow, slow.rows(schedule))


@pytest.mark.parametrize("old, new, expected", [
    ("abcd", "abcd", (4, 0)), ("abcd", "acbd", (1, 1)), ("abcd", "abd", (2, 1)), ("aa", "aaa", (2, 0)), ("ab", "cab", (0, 2))])
def test_where_rows_differ(old, new, expected):
    assert differing(list(old), list(new)) == expected
