"""Something goes wrong while the ranks are dealing with something else: experts that move, another's loss, a host that stalls.
Whoever is not to blame goes on, with the process and the state that it has."""

from __future__ import annotations

from functools import partial

import pytest
import sabotage
import torch
from faults import KILL, QUICK, RELATIVE, SMALLEST, STEPS, exactly, ranks_of
from runtime import on_all
from sabotage import Survivors, arm, once, stall

MOVING = (STEPS, "placement.every=2", "placement.least_gain=0.02", "training.batch_sequences=16", "model.n_routed_experts=16",
          "model.n_group=8", "model.topk_group=4", "elastic.cool_down_seconds=60")


@pytest.fixture(scope="module")
def moved(stage):
    """A run in which experts move, undisturbed."""
    run = stage.run("EP4", *QUICK, *MOVING, before={0: partial(on_all, stage.company, sabotage.skew, 4)})
    assert run.error is None and run.told("placement")
    return run


@pytest.mark.parametrize("victim, harm, late", [
    (2, sabotage.dies_after_a_move, ()),  # its peers have the new state
    (3, sabotage.dies_before_a_move, (0,)),  # some have half of it, some have not begun
])
def test_a_node_is_lost_while_experts_move(stage, moved, victim, harm, late):
    survivors = Survivors(stage.company)

    def strike() -> None:
        survivors.note()
        for rank in late:
            arm(stage.company, rank, sabotage.moves_late)
        arm(stage.company, victim, harm)

    run = stage.run("EP4", *QUICK, *MOVING, before=once({0: partial(on_all, stage.company, sabotage.skew, 4), 1: strike}))
    assert run.error is None, run.events
    survivors.check(run, f"virtual-{victim}/0")
    assert not run.told("state_lost") and [event["nodes"] for event in run.told("generation")][:2] == [4, 3]
    torch.testing.assert_close(exactly(run.losses), exactly(moved.losses), rtol=RELATIVE, atol=SMALLEST)
    assert [line["step"] for line in run.folder.ledger_lines()] == list(range(len(moved.losses)))


@pytest.mark.parametrize("name, first, second, place", [
    ("EP4", 0, 1, "set up"), ("EP4", 3, 2, "publish"), ("PP2xEP2", 0, 1, "formed")])
def test_another_is_lost_when_the_next_generation_is_made(stage, name, first, second, place):
    """Some have arrived there, and some have not: they go back to where all are."""
    more = (STEPS, *(("elastic.copies=2",) if name == "EP4" else ()))
    survivors = Survivors(stage.company)

    def strike() -> None:
        survivors.note()
        arm(stage.company, second, sabotage.dies_while_it_forms, place)
        stage.company.strike(first, KILL)

    run = stage.with_faults(name, [], *more, before={3: strike}, regrown=[7])
    survivors.check(run, *(f"virtual-{rank}/0" if name == "EP4" else f"virtual-0/{rank}" for rank in (first, second)))
    stage.check(run, name, *more, redone=2)
    assert not run.told("state_lost") and ranks_of(run)[0] == ranks_of(run)[-1]


def test_a_rank_is_lost_while_all_others_stall(stage):
    """For longer than letting go takes, and for less than counts as silence: they are waited for."""
    survivors, stalls = Survivors(stage.company), []

    def strike() -> None:
        survivors.note()
        pids = stage.company.pids
        stalls.append(stall(pids[:3], 4.0))
        stage.company.strike(3, KILL)

    run = stage.with_faults("EP4", [], STEPS, before={3: strike}, regrown=[7])
    stalls.pop().join()
    survivors.check(run, "virtual-3/0")
    stage.check(run, "EP4", STEPS)
    assert not run.told("state_lost") and ranks_of(run)[0] == ranks_of(run)[-1]
