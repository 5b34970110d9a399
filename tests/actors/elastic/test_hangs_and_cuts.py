"""What no end of a process and no silence tells: a rank whose computing hangs, a link between two ranks that carries nothing. It
is found out within seconds, who is to go goes, and the others go on.

Needs root, like the network namespaces that it makes.
"""

from __future__ import annotations

import time
from typing import Any

import pytest
import runtime
import sabotage
from faults import KILL, QUICK, STEPS, Stage, ranks_of, whole
from runtime import Run, configured
from sabotage import Apart, Survivors, arm, lost, newcomers, once, reason

from actors.protocol.trainer import Trainer
from jobs.benches.shared.networks import Network
from orchestrator.protocol.deadlines import Deadlines

STUCK = ("elastic.silence_seconds=1.5", "elastic.stuck_seconds=1")


def test_a_rank_whose_computing_hangs_is_replaced(stage):
    """Its heartbeat goes on."""
    more, survivors, at = (STEPS, *STUCK), Survivors(stage.company), []

    def strike() -> None:
        survivors.note()
        arm(stage.company, 2, sabotage.hangs)
        at.append(time.monotonic())

    def told(kind: str, values: Any) -> None:
        if kind == "event" and values.name == "lost":
            at.append(time.monotonic())

    run = stage.with_faults("EP4", [], *more, before={3: strike}, regrown=[7], watch=told)
    survivors.check(run, "virtual-2/0")
    stage.check(run, "EP4", *more)
    assert "its computing hangs" in reason(run) and ranks_of(run)[0] == ranks_of(run)[-1]
    armed, named = at
    bounds = Deadlines.of(stage.configured("EP4", *more)[0])
    assert named - armed < bounds.stuck + bounds.silence + bounds.release + 5


@pytest.fixture(scope="module")
def apart(stage, tmp_path_factory):
    """Runs on four processes that are each on a host of their own, as far as the network is concerned."""
    with Network(4, 10_000) as network, Apart(configured("EP4")[0], network) as company:
        found = Stage(company, tmp_path_factory.mktemp("apart"))
        found._references = stage._references  # where the ranks are changes no loss
        yield found


@pytest.fixture
def reached(apart, monkeypatch):
    """The coordinator is where the ranks of `apart` reach it."""
    monkeypatch.setattr(runtime, "Trainer", lambda *arguments, store, **options: Trainer(
        *arguments, host=apart.company.network.host, **options))


CUT = ("training.steps=9", "elastic.copies=2", *STUCK, "elastic.cool_down_seconds=60")


@pytest.mark.parametrize("both_ways", [False, True])
def test_one_end_of_a_link_that_is_cut_leaves(stage, apart, reached, both_ways):
    """All are heard from by the coordinator."""
    stage.reference("EP4", *CUT)
    survivors, at = Survivors(apart.company), []

    def strike() -> None:
        survivors.note()
        apart.company.cut(1, 3)
        if both_ways:
            apart.company.cut(3, 1)
        at.append(time.monotonic())

    def told(kind: str, values: Any) -> None:
        if kind == "event" and values.name == "lost":
            at.append(time.monotonic())

    run = apart.run("EP4", *QUICK, *CUT, before=once({3: strike}), watch=told)
    assert run.error is None, run.events
    gone, = lost(run)
    survivors.check(run, gone)
    sabotage.check_curve(apart, run, "EP4", *CUT)
    other, = {"virtual-1/0", "virtual-3/0"} - {gone}
    assert f"no way between it and {other}" in reason(run) and not run.told("state_lost")
    assert at[1] - at[0] < 15


def test_a_newcomer_that_cannot_reach_the_others_costs_its_own_place_only(stage, apart, reached):
    """The coordinator hears from it. Once its links are whole, it takes its place."""
    more = ("training.steps=12", "elastic.copies=2", *STUCK, "elastic.form_seconds=1", "elastic.cool_down_seconds=0.2")
    stage.reference("EP4", *more)
    survivors, run = Survivors(apart.company), Run()

    def links(whole_ones: bool) -> None:
        for other in range(3):
            apart.company.cut(3, other, restored=whole_ones)
            apart.company.cut(other, 3, restored=whole_ones)

    def strike() -> None:
        survivors.note()
        apart.company.strike(3, KILL)
        links(False)

    def restore() -> None:
        links(True)
        whole(run, 4)

    run = apart.run("EP4", *QUICK, *more, before=once({3: strike, 6: lambda: whole(run, 4), 8: restore}), run=run)
    survivors.check(run, *(member for member in lost(run) if member.startswith("virtual-3/")))
    sabotage.check_curve(apart, run, "EP4", *more)
    assert "no way between it and virtual-0/0, virtual-1/0, virtual-2/0" in reason(run)
    nodes = [event["nodes"] for event in run.told("generation")]
    assert nodes[0] == nodes[-1] == 4 and set(nodes[1:-1]) == {3} and newcomers(apart.company)
