"""What the chaos bench accuses a run of, and what it does not."""

from __future__ import annotations

import json

import pytest

from jobs.benches.chaos.company import Strike
from jobs.benches.chaos.verdict import EXPLAINED_SECONDS, JsonLines, Verdict, gaps, lost_steps, needless, restarted
from orchestrator.data.ledger import chained, line_hash
from orchestrator.told.lines import Told
from tests.told_events import told

KILLED = Strike("node killed", 1, 100.0, ("a",), 103.0)
STALLED = Strike("node stalled", 0, 100.0, ("a",), 101.0)
BEYOND = Strike("more than copies", 3, 100.0, ("a", "b", "c"), 103.0)


def ledger(*values: int | tuple[str, int]) -> list[str]:
    lines, newest = [], ""
    for value in values:
        line = ({"step": value, "generation": 1, "first": value, "count": 1, "digest": "0" * 32, "loss": 1.0}
                if isinstance(value, int) else {"kind": value[0], "step": value[1]})
        lines.append(chained(line, newest))
        newest = line_hash(lines[-1])
    return lines


def test_a_cut_is_a_loss_unless_a_fault_went_beyond_the_copies():
    cut = ledger(0, 1, 2, ("cut", 1), 1, 2)
    assert lost_steps(cut, [KILLED], []) and not lost_steps(cut, [BEYOND], [])
    assert lost_steps(ledger(0, 1, ("cut", 1), 1, ("cut", 1), 1), [BEYOND], [])
    assert not lost_steps(ledger(0, 1, ("cut", 2), 2), [KILLED], []), "nothing was committed there"


def test_a_step_twice_or_left_out_is_accused():
    assert lost_steps(ledger(0, 1, 1), [], []) and lost_steps(ledger(0, 2), [], []) and not lost_steps(ledger(0, 1, 2), [], [])


def test_state_lost_long_after_it_went_beyond_is_accused():
    late = 103.0 + EXPLAINED_SECONDS + 1
    events = [told("state_lost", at, reason="?") for at in (101.0, late)]
    assert not lost_steps([], [BEYOND], events[:1]) and lost_steps([], [BEYOND], events) and lost_steps([], [KILLED], events[:1])


def lost(member: str, at: float) -> Told:
    return told("lost", at, members=[member], reasons=["?"])


def test_who_is_named_lost_must_have_been_struck():
    assert not needless([lost("a/0", 101.0)], [KILLED])
    assert needless([lost("b/0", 101.0)], [KILLED]) and needless([lost("a/0", 99.0)], [KILLED])
    assert needless([lost("a/0", 101.0)], [STALLED]), "it was away for less than silence"
    assert needless([lost("a/0", 104.0 + EXPLAINED_SECONDS)], [KILLED])
    assert not needless([lost("a/0", 1e9)], [Strike("link cut", 1, 100.0, ("a", "b"))]), "it lasts"


def test_a_process_that_is_gone_must_have_been_struck():
    same, other = {"a": {1}, "b": {2}}, {"a": {1}, "b": {3}}
    assert not restarted([(99.0, same), (105.0, same)], [])
    assert restarted([(99.0, same), (105.0, other)], [KILLED]), "it was another's"
    assert not restarted([(99.0, same), (105.0, other)], [Strike("rank killed", 1, 100.0, ("b",), 100.0)])
    assert restarted([(99.0, same), (101.0, {"a": {1}}), (105.0, other)], []), "though it was not looked at in between"
    assert not restarted([(99.0, same), (105.0, other)], [Strike("stopped and started", 0, 100.0, (), 102.0)])


def test_the_gap_of_a_strike_that_is_alone():
    steps = [{"time": at} for at in (98.0, 99.0, 100.5, 104.0, 105.0, 130.0)]
    assert gaps(steps, [KILLED]) == [("node killed", pytest.approx(25.0))], "the hole that began within ten seconds counts"
    assert gaps(steps[:-1], [KILLED]) == [("node killed", pytest.approx(3.5))]
    assert not gaps(steps, [KILLED, STALLED]), "whose doing is it?"


def test_losses_are_compared_step_by_step():
    def steps(*losses: float) -> list[dict]:
        return [{"step": step, "loss": loss, "gradient_norm": 1.0} for step, loss in enumerate(losses)]

    def accused(mine: list[dict], reference: list[dict]) -> list[str]:
        losses, norms = [step["loss"] for step in mine], {step["step"]: step["gradient_norm"] for step in mine[:1]}
        found = Verdict("a", 1, None, None, (), [], [], [], [], [], losses, norms, {})
        found.compare(reference)
        return found.curve
    assert not accused(steps(3.0, 2.0), steps(3.0, 2.0 + 1e-10)) and accused(steps(3.0, 2.0), steps(3.0, 2.0 + 1e-7))
    assert accused(steps(3.0, 2.0), steps(3.0)), "nothing to compare with"
    assert accused(steps(3.0, float("nan")), steps(3.0, 2.0))


def test_a_journal_is_read_as_it_grows_and_when_it_is_written_anew(tmp_path):
    path = tmp_path / "metrics.jsonl"
    journal = JsonLines(path, lambda values: values["step"])
    assert journal.read() == []
    path.write_text('{"step": 0}\n{"step": 1}\n{"st')
    assert journal.read() == [0, 1]
    with open(path, "a") as file:
        file.write('ep": 2}\n')
    assert journal.read() == [0, 1, 2]
    anew = tmp_path / "anew"
    anew.write_text("".join(json.dumps({"step": step}) + "\n" for step in (0, 1, 7, 8, 9)))
    anew.replace(path)
    assert journal.read() == [0, 1, 7, 8, 9]
