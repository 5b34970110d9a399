"""Whoever comes new to a run is on trial: what becomes of it costs its own place, and nobody else's."""

from __future__ import annotations

import gc
import os
from typing import Any

import pytest
import sabotage
from faults import KILL, QUICK, STEPS, ranks_of, whole
from runtime import TIMEOUT_SECONDS, Run
from sabotage import Survivors, lost, newcomers, once

from orchestrator.protocol.members import Member


class AsItJoins:
    """Ends the first newcomer when an event is told, after `joining` has been."""

    def __init__(self, company, event: str):
        self._company, self._event, self._joining, self.struck = company, event, False, []

    def __call__(self, kind: str, values: Any) -> None:
        if kind != "event" or self.struck:
            return
        self._joining = self._joining or values.name == "joining"
        if self._joining and values.name == self._event:
            joiner = newcomers(self._company)[0]
            os.kill(self._company.pid_of(joiner), KILL)
            self.struck.append(str(joiner))


@pytest.mark.parametrize("name, event, victim", [("EP4", "joining", 0), ("PP2xEP2", "joining", 1), ("EP4", "layout", 2)])
def test_it_ends_as_it_joins(stage, name, event, victim):
    """Nobody else is blamed, and another one comes."""
    survivors, watch = Survivors(stage.company), AsItJoins(stage.company, event)

    def strike() -> None:
        survivors.note()
        stage.company.strike(victim, KILL)

    run = stage.with_faults(name, [], STEPS, before={3: strike}, regrown=[5, 8], watch=watch)
    survivors.check(run, f"virtual-{victim}/0" if name == "EP4" else f"virtual-0/{victim}", *watch.struck)
    stage.check(run, name, STEPS)
    assert watch.struck and ranks_of(run)[0] == ranks_of(run)[-1]


def test_it_has_no_memory(stage, monkeypatch):
    """It is tried a few times, and then no more; the others train."""
    more, place = ("training.steps=26", "elastic.cool_down_seconds=0.02"), Member("virtual-3", 0)
    survivors, run = Survivors(stage.company), Run()

    def strike() -> None:
        survivors.note()
        stage.company.strike(3, KILL)

    def tried() -> None:
        def all_there_or_barred(machine) -> bool:
            return place.node in machine.trials.barred or sum(node.ranks for node in machine.decision.nodes) == 4
        run.trainer.wait_until(all_there_or_barred, TIMEOUT_SECONDS)

    with monkeypatch.context() as patch:
        patch.setattr(stage.company, "_host", sabotage.without_memory)
        run = stage.run("EP4", *QUICK, *more, before=once({3: strike} | dict.fromkeys(range(5, 25), tried)), run=run)
    survivors.check(run, *(member for member in lost(run) if member.startswith("virtual-3/")))
    stage.check(run, "EP4", *more)
    assert [event["nodes"] for event in run.told("generation")][-1] == 3 and "out of memory" in run.told("lost")[-1]["reasons"][0]
    barred, = run.told("barred")
    assert barred["node"] == "virtual-3" and "out of memory" in barred["reason"]


def open_files_and_threads(pid: int) -> tuple[int, int]:
    return len(os.listdir(f"/proc/{pid}/fd")), len(os.listdir(f"/proc/{pid}/task"))


def test_whoever_comes_and_goes_leaves_nothing_behind(stage):
    """Neither in the coordinator's process nor in that of who stays."""
    rounds, seen, run = 8, [], Run()

    def strike() -> None:
        gc.collect()
        seen.append([open_files_and_threads(pid) for pid in (os.getpid(), stage.company.pids[0])])
        stage.company.strike(3, KILL)

    before = {step: action for turn in range(rounds) for step, action in (
        (2 * turn + 2, strike), (2 * turn + 3, lambda: whole(run, 4)))}
    more = (f"training.steps={2 * rounds + 4}", "elastic.cool_down_seconds=0.02")
    run = stage.run("EP4", *QUICK, *more, before=once(before), run=run)
    assert run.error is None and len(lost(run)) == rounds == len(seen), run.told("lost")
    print(seen)
    for early, late in zip(seen[2], seen[-1]):
        assert late[0] <= early[0] + 2 and late[1] <= early[1] + 2
