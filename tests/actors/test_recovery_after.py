"""What recoveries leave behind: those who thaw after they were given up, checkpoints that a loss struck, time, memory."""

from __future__ import annotations

import ctypes
import gc
import os
import signal
import statistics
import time
from pathlib import Path

import pytest
from faults import FREEZE, FROZEN, KILL, STEPS, Fault, node
from runtime import Run, on_all

from actors import checkpoint
from orchestrator.relayout import relaid

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
        crew = run.trainer._formation.crew
        until(lambda: crew.look() and not process_of(process), "it is ended: its beats do not make it one of us")

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


def test_a_file_written_after_its_rank_was_given_up_spoils_no_checkpoint(stage):
    """It thaws in the middle of a checkpoint's writing, and finishes its piece. That checkpoint does not count; a later one of
    the same run is whole."""
    more, run, frozen_one = (STEPS, *FROZEN, "checkpoint.every=3", "elastic.cool_down_seconds=60"), Run(), []

    def freeze() -> None:
        frozen_one.append(stage.company._processes[stage.company._seats[2]])
        Fault(3, "write", 2, 0, FREEZE).arm(stage.company, None)

    def thaw() -> None:
        os.kill(frozen_one[0].handle.pid, signal.SIGCONT)
        checkpoints = run.trainer._folder.checkpoints
        until(lambda: any("generation-1-rank-00002" in name for *_, names in os.walk(checkpoints) for name in names), "its file")

    run = stage.run("EP4", *more, before={2: once(freeze), 5: thaw}, run=run)
    stage.check(run, "EP4", *more)
    found = checkpoint.complete(run.trainer._folder.checkpoints)
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
    found = checkpoint.complete(run.trainer._folder.checkpoints)
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


def test_a_hundred_generations_leave_nothing_behind(stage):
    """Three layouts in turn in the same processes, each after an abort, with a step in each; measured on the same of them."""
    first, last, names, run, seen = 21, 102, ("PP2xEP2", "two hops", "PP2xDP2"), Run(), {}
    more = (f"training.steps={last + 1}", "training.batch_sequences=4",
            "optimizer.learning_rate=1e-4", "optimizer.final_learning_rate=1e-4")  # larger ones multiply rounding errors
    configs = [stage.configured(name, *more)[0] for name in names]

    def at_boundary(applied, apply) -> bool:
        formation, recovery = run.trainer._formation, run.trainer._recovery
        nodes = (node(0, 2), node(1, 2))
        assert not formation.crew.abort(formation.generation).missing
        recovery._change(relaid(configs[applied % 3], nodes, formation.base.layout), nodes, applied, apply, time.monotonic())
        return True

    def measure(step: int):
        return lambda: seen.update({step: [*on_all(stage.company, figures, 4), figures(None)]})

    def begin() -> None:
        run.trainer._recovery.at_boundary = at_boundary

    run = stage.run("PP2xEP2", *more, before={0: begin, first: measure(first), last: measure(last)}, run=run)
    assert run.error is None and run.told("generation")[-1]["generation"] > last
    assert [step["loss"] for step in run.steps] == pytest.approx(
        stage.reference("PP2xEP2", *more).losses[:, 0].tolist(), rel=1e-9)
    for before, after in zip(seen[first], seen[last]):
        print(before, after)
        assert after[0] <= before[0] + 2 and after[1] <= before[1] + 2 and after[2] <= before[2] + 8_000

