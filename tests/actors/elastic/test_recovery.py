"""Rank processes are killed and frozen at any place of a step, nodes drain and join: the curve does not move, no committed step
is lost, and the run grows back. What cannot be survived is said plainly."""

from __future__ import annotations

import random
import time
from typing import Any

import pytest
import torch
from faults import FREEZE, FROZEN, KILL, QUICK, STEPS, Company, Fault, Stage, exactly, node, ranks_of, whole
from runtime import Run

from actors.calls.rank_calls import News
from actors.protocol.trainer import TrainingFailed
from actors.telemetry.exporter import RunMetrics
from orchestrator.protocol.members import Member
from orchestrator.topology import Node

CHECKED = ("training.validate_every=3", "training.validation_sequences=6")
SAVED = ("checkpoint.every=2",)
PLACES = {  # of a step: how often a rank comes there at least, and what the run needs for it
    "compute": (16, ()), "communication": (24, ()), "reduce": (3, ()), "uncommitted": (1, ()), "committed": (1, ()),
    "between": (1, ()), "update": (1, ()), "publish": (1, ()), "gather": (3, ()), "validation": (5, CHECKED),
    "snapshot": (1, SAVED), "write": (1, SAVED),
}
FOUR = ("PP2xEP2", "PP4", "EP4", "PP2xDP2", "EP2xDP2", "two hops")


def seeded(place: str, name: str, number: int, seed: int) -> Fault:
    """At a random step, rank and moment."""
    chance = random.Random(f"{place} {name} {seed}")
    return Fault(chance.choice((2, 3, 4)), place, chance.randrange(4), chance.randrange(PLACES[place][0]), number)


# --- one at a time ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("place, name", [(place, FOUR[number % len(FOUR)]) for number, place in enumerate(PLACES)])
def test_a_rank_is_killed(stage, place, name):
    more = (STEPS, *PLACES[place][1])
    run = stage.with_faults(name, [seeded(place, name, KILL, 1)], *more, regrown=[7])
    stage.check(run, name, *more)
    assert [len(event["members"]) for event in run.told("lost")] == [1]
    first, *others, last = ranks_of(run)
    assert first == last and others, "it went on with fewer, and grew back"


def test_in_fp8_with_moments_in_bf16_it_goes_on(stage):
    """Weights in other numbers than their neighbours are grouped otherwise, before and after. Sums in another order round to other
    FP8 numbers, so from the loss on the curve is near the undisturbed one only."""
    more = (STEPS, "training.dtype=float32", "precision.experts=fp8", "precision.attention=fp8", "optimizer.moments=bf16")
    run = stage.with_faults("PP2xEP2", [Fault(3, "compute", 2, 5, KILL)], *more, regrown=[7])
    assert run.error is None and run.told("lost"), run.events
    first, *others, last = ranks_of(run)
    assert first == last and others
    found, undisturbed = exactly(run.losses), stage.reference("PP2xEP2", *more).losses
    assert torch.equal(found[:3], undisturbed[:3])
    torch.testing.assert_close(found[:, 0], undisturbed[:, 0], rtol=0.05, atol=0)


@pytest.mark.parametrize("place, name", [("compute", "PP4"), ("reduce", "EP4"), ("write", "EP2xDP2"), *(
    pytest.param(place, name, marks=pytest.mark.long) for place, name in (("committed", "PP2xEP2"), ("gather", "PP2xDP2")))])
def test_a_rank_freezes(stage, place, name):
    more = (STEPS, *FROZEN, *PLACES[place][1])
    run = stage.with_faults(name, [seeded(place, name, FREEZE, 2)], *more, regrown=[7])
    stage.check(run, name, *more)
    lost, = run.told("lost")
    assert len(lost["members"]) == 1 and "not heard from for" in lost["reasons"][0]
    assert ranks_of(run)[0] == ranks_of(run)[-1]


def test_four_positions_become_three_and_four_again(stage):
    """Its mirrors with them: every stage has two holders on each layout."""
    run = stage.with_faults("PP4", [Fault(3, "compute", 3, 5)], STEPS, regrown=[6])
    stage.check(run, "PP4", STEPS)
    assert [name.split()[0] for name in ranks_of(run)] == ["PP4", "PP3", "PP4"]


def test_loss_after_loss(stage):
    """Nodes leave one after another, without notice, until one is left."""
    more = ("training.steps=14",)
    leaving = {5: 3, 8: 1, 11: 0}
    news = {step: (lambda number=number: stage.company.tell(News("left", node(number), "gone")))
            for step, number in leaving.items()}
    run = stage.with_faults("EP4", [], *more, before=news)
    stage.check(run, "EP4", *more, redone=3)
    assert [event["nodes"] for event in run.told("generation")] == [4, 3, 2, 1]
    assert [event["reasons"] for event in run.told("lost")] == [["gone"]] * 3


# --- two at once, and during recovery --------------------------------------------------------------------------------


def both(step: int, *ranks: int) -> list[Fault]:
    return [Fault(step, "between", rank) for rank in ranks]


@pytest.mark.parametrize("name, ranks, more", [
    ("PP2xEP2", (0, 1), ()), ("PP2xEP2", (2, 3), ()),  # a node
    ("EP4", (1, 2), ("elastic.copies=2",)), ("EP2xDP2", (0, 3), ("elastic.copies=2",)),
])
def test_two_are_killed_at_once(stage, name, ranks, more):
    more = (STEPS, *more)
    run = stage.with_faults(name, both(3, *ranks), *more, regrown=[7])
    stage.check(run, name, *more, redone=2)
    assert not run.told("state_lost") and sum(len(event["members"]) for event in run.told("lost")) == 2
    assert ranks_of(run)[0] == ranks_of(run)[-1]


@pytest.mark.parametrize("copies, ranks", [(0, (1,)), (1, (0, 1)), (1, (2, 3))])
def test_more_is_lost_than_owners_cover(stage, copies, ranks):
    """The newest checkpoint: of step 4, when step 5 has been committed."""
    more, metrics = ("training.steps=9", "checkpoint.every=4", f"elastic.copies={copies}"), RunMetrics()
    run = stage.with_faults("EP4", both(6, *ranks), *more, regrown=[8], watch=metrics.observe)
    stage.check(run, "EP4", *more, redone=3 + len(ranks))
    lost, = run.told("state_lost")
    resumed, = run.told("resumed")
    assert lost["step"] == 6 and "no owner is left of" in lost["reason"]
    assert resumed["step"] == 4 and resumed["steps_to_redo"] == 2
    first, *others = run.told("generation")
    assert "recovery_seconds" not in first and any("recovery_seconds" in event for event in others)
    assert metrics.registry.get_sample_value("dualray_recoveries_total") == len(others)


def test_without_a_checkpoint_it_starts_over_and_says_so(stage):
    run = stage.with_faults("EP4", both(3, 1), STEPS, "elastic.copies=0", regrown=[6])
    stage.check(run, "EP4", STEPS, redone=4)
    assert len(run.told("state_lost")) == 1
    assert [(event["reason"], event["steps_to_redo"]) for event in run.told("started_over")] == [("no checkpoint", 3)]


class Second:
    """Kills another rank when an event is told for the first time."""

    def __init__(self, company: Company, event: str, rank: int):
        self._company, self._event, self._rank, self._left = company, event, rank, 2 if event == "generation" else 1

    def __call__(self, kind: str, values: Any) -> None:
        if kind == "event" and values.name == self._event:
            self._left -= 1
            if self._left == 0:
                self._company.strike(self._rank, KILL)


@pytest.mark.parametrize("name, event, more", [
    *(("EP4", event, ("elastic.copies=2",)) for event in ("lost", "aborted", "layout", "generation")),
    ("PP2xEP2", "lost", ()), ("PP2xEP2", "aborted", ()),  # while all are seated that were: on the node of the first
])
def test_another_is_killed_while_it_recovers(stage, name, event, more):
    more = (STEPS, *more)
    first, second = {"EP4": (3, 2), "PP2xEP2": (2, 3)}[name]
    run = stage.with_faults(name, [Fault(3, "compute", first, 4)], *more, regrown=[7],
                            watch=Second(stage.company, event, second))
    stage.check(run, name, *more, redone=2)
    assert not run.told("state_lost") and sum(len(found["members"]) for found in run.told("lost")) == 2


@pytest.mark.parametrize("place, number", [("finish", KILL), ("form", KILL), ("carry", KILL), ("form", FREEZE), *(
    pytest.param(place, FREEZE, marks=pytest.mark.long) for place in ("finish", "carry"))])
def test_another_is_lost_in_a_phase_of_recovery(stage, place, number):
    more = (STEPS, "elastic.copies=2", *(FROZEN if number == FREEZE else ()))
    run = stage.with_faults("EP4", [Fault(3, place, 2, signal=number), Fault(3, "committed", 0)], *more, regrown=[7])
    stage.check(run, "EP4", *more, redone=2)
    assert sum(len(found["members"]) for found in run.told("lost")) == 2


# --- drain and join --------------------------------------------------------------------------------------------------


def says(stage: Stage, kind: str, *nodes: Node, seconds: float | None = None):
    def act() -> None:
        for one in nodes:
            deadline = None if seconds is None else time.monotonic() + seconds
            stage.company.tell(News(kind, one, "the test says so", deadline))
    return act


@pytest.mark.parametrize("copies", [0, 1])
@pytest.mark.parametrize("name, number, ranks", [("PP2xEP2", 1, 2), ("EP4", 2, 1)])
def test_a_draining_node_hands_over_what_nobody_else_has(stage, name, number, ranks, copies):
    more = (STEPS, f"elastic.copies={copies}")
    leaving = node(number, ranks)
    run = stage.with_faults(name, [], *more, before={3: says(stage, "draining", leaving, seconds=30)})
    left = {str(place.node) for place in run.trainer.layout.places}
    with pytest.raises(KeyError):
        stage.company.pid_of(Member(leaving.name, 0))
    stage.check(run, name, *more, redone=0)
    assert leaving.name not in left and not run.told("lost")
    assert [event["nodes"] for event in run.told("draining")] == [[leaving.name]]


def test_a_node_drains_leaves_and_comes_back(stage):
    gone, run = node(1, 2), Run()
    news = {2: says(stage, "draining", gone), 4: says(stage, "left", gone), 5: says(stage, "joined", gone),
            6: lambda: whole(run, 4)}
    run = stage.run("PP2xEP2", STEPS, "elastic.cool_down_seconds=0.1", before=news, run=run)
    stage.check(run, "PP2xEP2", STEPS, redone=0)
    nodes = [event["nodes"] for event in run.told("generation")]
    assert nodes[:3] == [2, 1, 2] and set(nodes[3:]) <= {2}  # of its two processes one may be there a step before the other
    assert ranks_of(run)[0] == ranks_of(run)[-1] and run.told("joining")[0]["nodes"] == ["virtual-1"]


def test_a_drain_that_is_called_off(stage):
    gone, run = node(3), Run()
    news = {2: says(stage, "draining", gone), 4: says(stage, "stays", gone), 5: lambda: whole(run, 4)}
    run = stage.run("EP4", STEPS, before=news, run=run)
    stage.check(run, "EP4", STEPS, redone=0)
    assert [event["nodes"] for event in run.told("generation")] == [4, 3, 4]


def test_new_nodes_are_taken_in(stage):
    more, run = (STEPS, "layout.expert=auto", "layout.data=auto"), Run()
    news = {2: says(stage, "joined", node(7, 2)), 3: lambda: whole(run, 4)}
    run = stage.run("PP2", *more, before=news, run=run)
    stage.check(run, "PP2", *more, redone=0)
    assert run.told("generation")[0]["nodes"] == 2 and run.trainer.layout.size == 4
    assert run.told("joining")[0]["nodes"] == ["virtual-7"]


def test_a_node_drains_while_another_is_lost(stage):
    more = (STEPS, "elastic.copies=1")
    run = stage.with_faults("EP4", [Fault(3, "compute", 0, 3)], *more, before={2: says(stage, "draining", node(2))})
    stage.check(run, "EP4", *more)
    assert [event["nodes"] for event in run.told("draining")] == [["virtual-2"]] and len(run.told("lost")) == 1


# --- too few nodes ---------------------------------------------------------------------------------------------------


def test_below_the_minimum_it_waits_and_goes_on(stage):
    more = (STEPS, "elastic.min_nodes=4", "elastic.cool_down_seconds=0.5")
    gone = node(2)

    def back(kind: str, values: Any) -> None:
        if kind == "event" and values.name == "waiting":
            says(stage, "joined", gone)()

    run = stage.with_faults("EP4", [], *more, before={3: says(stage, "left", gone)}, watch=back)
    stage.check(run, "EP4", *more)
    waiting, = run.told("waiting")
    assert "3 of at least 4 nodes" in waiting["reason"] and "virtual-2" in waiting["reason"]
    assert [event["nodes"] for event in run.told("generation")] == [4, 3, 4]  # what there is is kept by those who are there


def test_the_wait_is_bounded(stage):
    run = stage.with_faults("EP4", [], STEPS, "elastic.min_nodes=4", "elastic.wait_seconds=0.5",
                            before={3: says(stage, "left", node(2))})
    assert isinstance(run.error, TrainingFailed) and "\n" not in str(run.error)
    assert "elastic.wait_seconds = 0.5" in str(run.error) and "3 of at least 4" in str(run.error)


def test_it_can_be_stopped_while_it_waits(stage):
    run = Run()

    def stop(kind: str, values: Any) -> None:
        if kind == "event" and values.name == "waiting":
            run.trainer.stop()

    began = time.monotonic()
    stage.run("EP4", STEPS, "elastic.min_nodes=4", before={3: says(stage, "left", node(2))}, watch=stop, run=run)
    assert run.error is None and run.outcome.interrupted and run.outcome.saved and run.outcome.step == 3
    assert time.monotonic() - began < 30


# --- what is not a loss ----------------------------------------------------------------------------------------------


def breaks(host) -> None:
    def broken(*arguments):
        raise ValueError("no such thing")

    for kind in host._executor._handlers:
        host._executor._handlers[kind] = broken


@pytest.mark.parametrize("name", ["PP2xEP2", "EP4"])
def test_a_rank_with_an_error_of_its_own_is_replaced(stage, name):
    run = stage.run(name, STEPS, *QUICK, before={3: lambda: stage.company.start("do", [(breaks,)]).results(60)})
    stage.check(run, name, STEPS)
    lost, = run.told("lost")
    assert lost["members"] == ["virtual-0/0"] and "no such thing" in lost["reasons"][0]
