"""What recoveries leave behind: those who thaw after they were given up, checkpoints that a loss struck, time, memory."""

from __future__ import annotations

import ctypes
import gc
import os
import signal
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from faults import FREEZE, FROZEN, KILL, STEPS, Fault
from runtime import Run, on_all

from actors.protocol.planning import RealPlanner
from actors.state import checkpoint
from orchestrator.config.run_config import RunConfig
from orchestrator.protocol.events import Failed, FailKind

# --- a frozen rank that thaws ----------------------------------------------------------------------------------------


def until(condition, what: str, seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.01)


@pytest.mark.parametrize("place", ["compute", "reduce", "gather"])
def test_who_thaws_after_it_was_given_up_does_no_harm(stage, place):
    """It goes on where it stood: among peers that are gone, with an answer that nobody waits for."""
    more, run, frozen_one = (STEPS, *FROZEN, "elastic.cool_down_seconds=60"), Run(), []

    def freeze() -> None:
        frozen_one.append(stage.company._processes[stage.company._seats[2]])
        Fault(3, place, 2, 2, FREEZE).arm(stage.company, None)

    def thaw() -> None:
        process, = frozen_one
        answered = process.answered
        os.kill(process.handle.pid, signal.SIGCONT)
        until(lambda: process.answered > answered or process.gone, "its late answer")
        until(lambda: not process_of(process), "it is ended: its beats do not make it one of us")

    run = stage.run("EP4", *more, before={3: once(freeze), 6: thaw}, run=run)
    stage.check(run, "EP4", *more)
    assert [event["nodes"] for event in run.told("generation")] == [4, 3]
    assert "not heard from for" in run.told("lost")[0]["reasons"][0]


def process_of(process) -> bool:
    """Whether it lives."""
    try:
        return process.handle.is_alive()
    except ValueError:  # ended, and let go of
        return False


def once(action):
    left = [action]
    return lambda: left.pop()() if left else None


def test_a_file_written_after_its_rank_was_given_up_spoils_no_checkpoint(stage, monkeypatch):
    """It thaws in the middle of a checkpoint's writing, and finishes its piece. That checkpoint does not count; a later one of
    the same run is whole."""
    more, run, frozen_one, to_end = (STEPS, *FROZEN, "checkpoint.every=3", "elastic.cool_down_seconds=60"), Run(), [], []
    monkeypatch.setattr(stage.company, "dismiss", to_end.append)  # it is ended as soon as it is heard from: not before it has written

    def freeze() -> None:
        frozen_one.append(stage.company._processes[stage.company._seats[2]])
        Fault(3, "write", 2, 0, FREEZE).arm(stage.company, None)

    def thaw() -> None:
        os.kill(frozen_one[0].handle.pid, signal.SIGCONT)
        checkpoints = run.folder.checkpoints
        until(lambda: any("generation-1-rank-00002" in name for *_, names in os.walk(checkpoints) for name in names), "its file")
        monkeypatch.undo()
        for member in to_end:
            stage.company.dismiss(member)

    run = stage.run("EP4", *more, before={2: once(freeze), 5: thaw}, run=run)
    stage.check(run, "EP4", *more)
    found = checkpoint.complete(run.folder.checkpoints)
    assert checkpoint.read_manifest(found[-1]).step == 9
    weights = checkpoint.read_parameters(found[-1])
    masters = {name: values for (name, kind), values in stage.reference("EP4", *more).state.items() if kind == checkpoint.MASTER}
    assert weights.keys() == masters.keys()
    assert all(abs(weights[name].flatten() - masters[name].numpy()).max() < 1e-9 for name in masters)


@pytest.mark.parametrize("name, number", [("PP2xEP2", KILL), ("EP4", FREEZE)])
def test_the_last_checkpoint_is_written_by_those_who_are_left(stage, name, number):
    more = (STEPS, *(FROZEN if number == FREEZE else ()), "elastic.cool_down_seconds=60")
    run = stage.with_faults(name, [Fault(8, "write", 1, signal=number)], *more)
    stage.check(run, name, *more, redone=0)
    found = checkpoint.complete(run.folder.checkpoints)
    assert [checkpoint.read_manifest(one).step for one in found] == [9] and len(run.told("lost")) == 1


# --- how fast, and what is left over ---------------------------------------------------------------------------------


def test_blocked_communication_ends_within_a_fifth_of_a_second(stage):
    """Of every survivor; the median over the faults of all tests above, and of these at least."""
    for place, rank in (("reduce", 3), ("communication", 1), ("compute", 2)):
        run = stage.with_faults("PP2xEP2", [Fault(3, place, rank, 1)], STEPS)
        assert run.error is None
    assert len(stage.aborts) >= 3 and not any(event["unanswered"] for event in stage.aborts)
    slowest = sorted(event["slowest_rank_seconds"] for event in stage.aborts)
    print(f"{len(slowest)} faults: median {statistics.median(slowest):.3f} s, worst {slowest[-1]:.3f} s")
    assert statistics.median(slowest) < 0.2


def figures(host) -> tuple[int, int, int]:
    """Threads, descriptors, resident kilobytes of a process, without what Python and glibc would give back if they had to."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status["Threads"]), len(os.listdir("/proc/self/fd")), int(status["VmRSS"].split()[0])


class Turns:
    """A planner that goes through three layouts in turn, on the same two nodes."""

    def __init__(self, planner: Any, configs: Sequence[RunConfig]):
        self._planners, self._planner, self._turn = [RealPlanner(config, planner._tables) for config in configs], planner, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._planner, name)

    def plan(self, *arguments: Any) -> Any:
        self._turn += 1
        return self._planners[self._turn % len(self._planners)].plan(*arguments)


def test_a_hundred_generations_leave_nothing_behind(stage, monkeypatch):
    """Three layouts in turn in the same processes, each after an abort, with a step in each; measured on the same of them."""
    first, last, names, run, seen = 21, 102, ("PP2xEP2", "two hops", "PP2xDP2"), Run(), {}
    more = (f"training.steps={last + 1}", "training.batch_sequences=4",
            "optimizer.learning_rate=1e-4", "optimizer.final_learning_rate=1e-4")  # larger ones multiply rounding errors
    configs = [stage.configured(name, *more)[0] for name in names]
    failed, send = set(), stage.company.send

    def refuse_once(call, member, generation, method, arguments, lane) -> None:
        if method == "step" and (step := arguments[0].step) > 0 and step not in failed:
            failed.add(step)
            run.trainer._conductor.post(Failed(call, member, FailKind.ABORTED, "the test says so"))
        else:
            send(call, member, generation, method, arguments, lane)

    def measure(step: int):
        return lambda: seen.update({step: [*on_all(stage.company, figures, 4), figures(None)]})

    def begin() -> None:
        run.trainer._run.planner = Turns(run.trainer._run.planner, configs)
        monkeypatch.setattr(stage.company, "send", refuse_once)

    run = stage.run("PP2xEP2", *more, before={0: begin, first: measure(first), last: measure(last)}, run=run)
    assert run.error is None and run.told("generation")[-1]["generation"] > last
    assert len(run.told("aborted")) == last and not run.told("lost")
    assert [step["loss"] for step in run.steps] == pytest.approx(
        stage.reference("PP2xEP2", *more).losses[:, 0].tolist(), rel=1e-9)
    for before, after in zip(seen[first], seen[last]):
        print(before, after)
        assert after[0] <= before[0] + 2 and after[1] <= before[1] + 2 and after[2] <= before[2] + 8_000
