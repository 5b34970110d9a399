"""A coordinator dies at any place of a run, and another goes on with the ranks that it left: the curve does not move, and no committed
step is lost. And a rank that dies in the middle of a move of experts."""

from __future__ import annotations

import os
import signal

import pytest
import torch
from faults import QUICK, RELATIVE, SMALLEST, STEPS, Folder, exactly, ranks_of
from runtime import Run, on_all, state, train

from actors.calls.messages import Start
from actors.protocol.shell import RealShell
from actors.protocol.trainer import TrainingFailed
from actors.runtime import rank as rank_module
from actors.state import checkpoint
from orchestrator.protocol.commands import Append, Apply, Call, CutLine, Form, Initialise, Restore, Snapshot, Step, StepLine
from orchestrator.protocol.events import Ending
from orchestrator.protocol.members import Member


class Died(Exception):
    """The coordinator's process has ended."""


def asks(kind: type, local: str = "", **values):
    """Whether a command calls for that, of a member on the node of this name."""
    def found(command) -> bool:
        return (isinstance(command, Call) and isinstance(command.request, kind) and command.member.node.endswith(local)
                and all(getattr(command.request, name) == value for name, value in values.items()))
    return found


def writes(line) -> bool:
    return lambda command: isinstance(command, Append) and command.line == line


def dies(monkeypatch, when, carried_out: bool = False) -> None:
    """The next coordinator, at the first such command: before or after it is carried out."""
    carry_out, left = RealShell.carry_out, [True]

    def strike(self, command) -> None:
        struck = left and when(command)
        if struck and not carried_out:
            left.clear()
            raise Died
        carry_out(self, command)
        if struck:
            left.clear()
            raise Died
    monkeypatch.setattr(RealShell, "carry_out", strike)


def taken_over(stage, name: str, first: Run, *overrides: str, **options) -> Run:
    """Another coordinator for what the first has left."""
    config, layout = stage.configured(name, *QUICK, *overrides)
    members = first.trainer.seated or tuple(Member(place.node, place.local) for place in layout.places)
    folder = Folder(first.folder.path.rpartition("/")[0])
    return train(stage.company, folder, config, layout, start=Start(members, left_behind=True), **options)


def check(stage, name: str, run: Run, *overrides: str) -> None:
    """The whole curve, and the state in the end, are those of an undisturbed run."""
    assert run.error is None, (run.error, run.events)
    wanted, lines = stage.reference(name, *overrides), run.folder.ledger_lines()
    assert [line["step"] for line in lines] == list(range(len(wanted.losses)))
    torch.testing.assert_close(exactly([line["loss"] for line in lines]), wanted.losses[:, 0], rtol=RELATIVE, atol=SMALLEST)
    shown = [line["step"] for line in run.folder.metric_lines()]  # a step whose line was the last thing done has none
    assert run.folder.ledger().epoch == 2 and shown == sorted(set(shown)) and len(shown) >= len(lines) - 1
    assert len(run.told("coordinator_restarted")) == 1


PLACES = {
    "before the first form": (asks(Form), False), "in the first form": (asks(Form, "1"), True),
    "before the initial values": (asks(Initialise), False), "with some initial values": (asks(Initialise, "1"), True),
    "with a step sent to some": (asks(Step, "1", step=4), True), "before a line": (writes(StepLine(4, 1)), False),
    "after a line": (writes(StepLine(4, 1)), True), "in the last update": (asks(Apply, "1"), True),
    "in a snapshot": (asks(Snapshot, "1"), True),
}


def test_a_folder_that_is_not_there_costs_a_start_and_no_step(stage, monkeypatch, tmp_path):
    """It is not mounted where the new coordinator is. Who holds what it knows nothing of is left alone, for the next one."""
    dies(monkeypatch, writes(StepLine(4, 1)), True)
    first = stage.run("EP4", *QUICK, STEPS)
    config, layout = stage.configured("EP4", *QUICK, STEPS)
    refused = train(stage.company, Folder(str(tmp_path)), config, layout, start=Start(first.trainer.seated, left_behind=True))
    assert isinstance(refused.error, TrainingFailed) and refused.error.ending is Ending.SUPERSEDED
    assert "it is not the ledger of this run" in str(refused.error)
    second = taken_over(stage, "EP4", first, STEPS)
    check(stage, "EP4", second, STEPS)
    assert not second.told("resumed") and not second.told("state_lost")


@pytest.mark.parametrize("place", PLACES)
def test_another_coordinator_goes_on(stage, monkeypatch, place):
    when, carried_out = PLACES[place]
    dies(monkeypatch, when, carried_out)
    first = stage.run("EP4", *QUICK, STEPS)
    assert isinstance(first.error, Died)
    second = taken_over(stage, "EP4", first, STEPS)
    after = state(stage.company, second.trainer.layout)
    check(stage, "EP4", second, STEPS)
    wanted = stage.reference("EP4", STEPS).state
    assert after.keys() == wanted.keys() and not second.told("lost") and not second.told("state_lost")
    for key, values in after.items():
        torch.testing.assert_close(values, wanted[key], rtol=RELATIVE, atol=SMALLEST)


def test_it_goes_on_without_a_rank_that_died_meanwhile(stage, monkeypatch):
    dies(monkeypatch, writes(StepLine(4, 1)), True)
    first = stage.run("EP4", *QUICK, STEPS)
    stage.company.strike(2, signal.SIGKILL)
    second = taken_over(stage, "EP4", first, STEPS, "elastic.cool_down_seconds=60")
    check(stage, "EP4", second, STEPS)
    assert not second.told("state_lost")


def cuts(command) -> bool:
    return isinstance(command, Append) and isinstance(command.line, CutLine)


@pytest.mark.parametrize("when", [cuts, asks(Restore)], ids=["cut", "restore"])
@pytest.mark.parametrize("carried_out", [False, True])
def test_one_that_dies_on_the_way_back_to_a_checkpoint(stage, monkeypatch, when, carried_out):
    """Two neighbours are lost with state that nobody else has; then the coordinator, before and after the ledger says so. What was
    loaded by then is in memory, and counts once the ledger has been cut."""
    more = ("training.steps=9", "checkpoint.every=4", "elastic.copies=1")
    dies(monkeypatch, when, carried_out)

    def strike() -> None:
        stage.company.strike(0, signal.SIGKILL)
        stage.company.strike(1, signal.SIGKILL)

    first = stage.run("EP4", *QUICK, *more, before={6: strike})
    assert isinstance(first.error, Died)
    second = taken_over(stage, "EP4", first, *more)
    check(stage, "EP4", second, *more)
    assert [event["step"] for event in second.told("resumed")] == ([] if when is cuts and carried_out else [4])
    assert checkpoint.read_manifest(checkpoint.complete(second.folder.checkpoints)[-1]).step == 9


# --- a move of experts -----------------------------------------------------------------------------------------------


def skew(host):
    """So that some experts are chosen more, and move."""
    for layer, bias in host.biases.items():
        bias += torch.linspace(0, 0.2, len(bias), dtype=bias.dtype).roll(layer)


def dies_in_a_move(host):
    def struck(*arguments):
        os.kill(os.getpid(), signal.SIGKILL)

    rank_module.carry_over = struck


def spare(host):
    pass


MOVING = (STEPS, "placement.every=2", "placement.least_gain=0.02", "training.batch_sequences=16", "model.n_routed_experts=16",
          "model.n_group=8", "model.topk_group=4")


def test_a_rank_dies_while_experts_move(stage):
    """The others are through with parts of the move: they go back to where all are."""
    def begin() -> None:
        on_all(stage.company, skew, 4)

    def arm() -> None:
        stage.company.start("do", [(spare,), (spare,), (dies_in_a_move,)]).results(60)

    undisturbed = stage.run("EP4", *MOVING, before={0: begin})
    assert undisturbed.told("placement") and undisturbed.error is None
    run = stage.run("EP4", *QUICK, *MOVING, "elastic.cool_down_seconds=60", before={0: begin, 1: arm}, run=Run())
    assert run.error is None, run.events
    assert [len(event["members"]) for event in run.told("lost")] == [1] and len(ranks_of(run)) > 1
    torch.testing.assert_close(torch.tensor(run.losses, dtype=torch.float64), torch.tensor(undisturbed.losses, dtype=torch.float64),
                               rtol=1e-9, atol=1e-12)
