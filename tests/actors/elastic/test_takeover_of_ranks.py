"""What the ranks do meanwhile does not matter to a coordinator that takes them over, or that was away itself: they are asked
what they hold, and go on with it in the processes that they have."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from faults import QUICK, RELATIVE, SMALLEST, STEPS, Folder, exactly
from runtime import Run, train
from sabotage import Died, Survivors, check_curve, dies, stall

from actors.calls.messages import Start
from orchestrator.protocol.commands import Append, Call, CutLine, OriginLine, Restore
from orchestrator.protocol.members import Member

HERE = Path(__file__).parent


def next_coordinator(stage, name: str, run: Run, *overrides: str, ranks: bool) -> Run:
    """In the same folder. ranks: with those that the last one left."""
    config, layout = stage.configured(name, *QUICK, *overrides)
    folder = Folder(run.folder.path.rpartition("/")[0])
    if not ranks:
        stage.company.heal(layout.size)
        return train(stage.company, folder, config, layout)
    members = run.trainer.seated or tuple(Member(place.node, place.local) for place in layout.places)
    return train(stage.company, folder, config, layout, start=Start(members, left_behind=True))


MORE = ("training.steps=10", "checkpoint.every=4")


def lines(kind: type):
    return lambda command: isinstance(command, Append) and isinstance(command.line, kind)


def restores(command) -> bool:
    return isinstance(command, Call) and isinstance(command.request, Restore)


@pytest.mark.parametrize("when, carried_out", [
    (lines(CutLine), False), (restores, False), (restores, True), (lines(OriginLine), False)])
def test_one_dies_while_it_resumes_an_earlier_run(stage, monkeypatch, when, carried_out):
    """Seven steps are committed, and a checkpoint has four of them: ledger and state agree, whatever was written first."""
    with monkeypatch.context() as patch:
        dies(patch, lambda command: isinstance(command, Append) and getattr(command.line, "step", 0) == 7, False)
        first = stage.run("PP2xEP2", *QUICK, *MORE)
    assert isinstance(first.error, Died) and first.folder.ledger().committed == 7
    with monkeypatch.context() as patch:
        dies(patch, when, carried_out)
        second = next_coordinator(stage, "PP2xEP2", first, *MORE, ranks=False)
    assert isinstance(second.error, Died)
    survivors = Survivors(stage.company)
    survivors.note()
    third = next_coordinator(stage, "PP2xEP2", second, *MORE, ranks=True)
    survivors.check(third)
    check_curve(stage, third, "PP2xEP2", *MORE)
    assert [event["step"] for event in third.told("resumed")] in ([4], [])  # or it found it done
    assert min(step["step"] for step in third.steps) == 4


def test_all_ranks_stall_while_they_are_taken_over(stage, monkeypatch):
    """For less than counts as silence."""
    stalls, survivors = [], Survivors(stage.company)

    def away() -> None:
        survivors.note()
        stalls.append(stall(stage.company.pids, 4.0))

    def when(command) -> bool:
        if isinstance(command, Append) and getattr(command.line, "step", None) == 4:
            away()
            return True
        return False

    with monkeypatch.context() as patch:
        dies(patch, when, False)
        first = stage.run("EP4", *QUICK, STEPS)
    assert isinstance(first.error, Died)
    second = next_coordinator(stage, "EP4", first, STEPS, ranks=True)
    stalls.pop().join()
    survivors.check(second)
    check_curve(stage, second, "EP4", STEPS)
    assert [step["step"] for step in second.steps] == [4, 5, 6, 7, 8] and not second.told("state_lost")


# --- a coordinator that is frozen ------------------------------------------------------------------------------------


@pytest.mark.parametrize("killed", [False, True])
def test_it_is_frozen_itself(stage, tmp_path, killed):
    """For longer than counts as silence; another process is ended meanwhile, or none. What it did not hear is not held against
    anybody."""
    command = [sys.executable, str(HERE.parent / "frozen_coordinator.py"), str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stdin=subprocess.PIPE, text=True) as process:
        try:
            pids = json.loads(process.stdout.readline())  # it waits before a step
            process.stdin.write("go on\n")
            process.stdin.flush()
            os.kill(process.pid, signal.SIGSTOP)
            if killed:
                os.kill(pids["virtual-2/0"], signal.SIGKILL)
            time.sleep(4)  # this is the fault
            os.kill(process.pid, signal.SIGCONT)
            found = json.loads(process.stdout.readline())
        finally:
            process.kill()
    assert found["error"] is None and found["lost"] == (["virtual-2/0"] if killed else [])
    assert all(found["pids"][member] == pid for member, pid in pids.items() if not killed or member != "virtual-2/0")
    assert [step for step, _ in found["losses"]] == list(range(9))
    wanted = stage.reference("EP4", STEPS).losses
    assert exactly([loss for _, loss in found["losses"]]) == pytest.approx(wanted[:, 0], rel=RELATIVE, abs=SMALLEST)
