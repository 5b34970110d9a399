"""The lines of a ledger: a cut makes steps void, and whatever is not as it was written is named."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.data.ledger import CUT, Cuts, LedgerDamaged, chained, committed_by, entries, line_hash, read


def written(*values: dict) -> list[str]:
    lines, newest = [], ""
    for one in values:
        lines.append(chained(one, newest))
        newest = line_hash(lines[-1])
    return lines


def step(number: int, generation: int = 1, loss: float = 0.0) -> dict:
    return {"step": number, "generation": generation, "loss": loss}


def cut(number: int) -> dict:
    return {"kind": "cut", "step": number, "reason": "lost"}


WHOLE = [{"kind": "epoch", "epoch": 1}, {"kind": "origin", "generation": 1, "step": 0, "source": None}, step(0), step(1), step(2),
         {"kind": "epoch", "epoch": 2}, cut(1), {"kind": "origin", "generation": 3, "step": 1, "source": "a"}, step(1, 3, 1.0)]


def test_a_cut_makes_steps_void():
    found = read(written(*WHOLE))
    assert [(line["step"], line["generation"], line["loss"]) for line in found.steps] == [(0, 1, 0.0), (1, 3, 1.0)]
    assert (found.committed, found.epoch, found.generation, found.furthest) == (2, 2, 3, 3)


def test_nothing_is_nothing():
    assert (read([]).committed, read([]).epoch, read([]).newest) == (0, 0, "")


def test_lines_of_older_versions_are_taken_as_they_are_and_followed():
    old = [json.dumps(step(0)), json.dumps(step(1))]
    line = chained(step(2), read(old).newest)
    assert read([*old, line]).committed == 3


@given(st.lists(st.one_of(st.just("step"), st.integers(0, 5)), max_size=20))
@settings(max_examples=200, deadline=None)
def test_both_ways_to_apply_cuts_agree(moves):
    values, due = [], 0
    for move in moves:
        if move == "step":
            values.append(step(due, loss=float(len(values))))
            due += 1
        elif move <= due:
            values.append(cut(move))
            due = move
    lines = written(*values)
    cuts = Cuts(entries(lines))
    standing = [entry.values for entry in entries(lines) if entry.kind != CUT and not cuts.voids(entry)]
    assert standing == list(read(lines).steps) and [line["step"] for line in standing] == list(range(due))


@pytest.mark.parametrize("number", range(len(WHOLE) - 1))
@pytest.mark.parametrize("harm", [lambda line: line[:-5], lambda line: line.replace(": ", ": 1", 1), lambda line: "", lambda line: "3",
                                  lambda line: line.replace('"step"', '"pets"').replace('"epoch"', '"hopec"')])
def test_a_damaged_line_in_the_middle_is_named(number, harm):
    lines = written(*WHOLE)
    lines[number] = harm(lines[number])
    with pytest.raises(LedgerDamaged, match=f"^line {number + 1} is damaged: [^\n]+$"):
        read(lines)
    assert [entry.number for entry in entries(lines) if entry.damaged] == [number + 1]


@pytest.mark.parametrize("text", ['{"step": 0, "generation": null}', '{"step": 0, "generation": "1"}', "[" * 100_000])
def test_a_line_that_nobody_wrote_is_named(text):
    with pytest.raises(LedgerDamaged, match="^line 2 is damaged: [^\n]+$"):
        read([json.dumps(step(0)), text])


@pytest.mark.parametrize("number", range(len(WHOLE) - 1))
def test_a_missing_line_is_noticed(number):
    lines = written(*WHOLE)
    del lines[number]
    with pytest.raises(LedgerDamaged, match=f"^line {max(1, number)} is damaged: "):
        read(lines)


@pytest.mark.parametrize("values, committed", [
    ([], 0), (WHOLE, 2), (WHOLE[:5], 3), (WHOLE[:7], 1), (WHOLE[:8], 1), ([step(0), cut(0)], 0),
    ([step(0), step(1), {"kind": "epoch", "epoch": 7}], 2), ([{"kind": "origin", "generation": 9, "step": 5, "source": None}], 0)])
def test_how_many_steps_are_committed_by_the_newest_lines(values, committed):
    lines = written(*values)
    assert committed_by(lines) == read(lines).committed == committed
    newest = max((at for at, one in enumerate(values) if one.get("kind", "step") in ("step", "cut")), default=None)
    assert newest is None or committed_by(lines[newest:]) == committed, "what is before is not looked at"


@pytest.mark.parametrize("harm", ['{"step": null, "generation": 1}', '{"kind": "cut", "step": "1"}', "no JSON", '{"step": 7'])
def test_what_is_damaged_says_nothing_of_what_is_committed(harm):
    assert committed_by([json.dumps(step(3)), harm]) == 4 and committed_by([harm]) == 0
