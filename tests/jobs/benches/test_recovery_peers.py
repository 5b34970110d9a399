"""What a peer's steps say of a fault, and that peers which are not there are told, not raised. The peers themselves are measured
by the recovery bench: they take minutes."""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from jobs.benches.recovery import peers as recovery_peers
from jobs.benches.recovery import ray_train as recovery_ray_train
from jobs.benches.recovery.journal import InjectedFault, Recovery, StepJournal, WorkerStep, recovery, settled, wait_for
from jobs.benches.recovery.peers import NODE, RANK, PeerSettings, PeerTimes
from orchestrator.config.run_config import parse
from tests.cluster import eventually


def steps(pids, numbers, start: float, size: int | None = None, sequences: int = 64) -> list[WorkerStep]:
    """Each step takes a second; the workers end it at the same time."""
    return [WorkerStep(pid, rank, size or len(pids), step, sequences, start + index, start + index + 1)
            for index, step in enumerate(numbers) for rank, pid in enumerate(pids)]


def test_every_worker_restarts_and_redoes_steps():
    """As Ray Train has it: killed 3.5 s after the start, back 10 s later, from the checkpoint of step 2."""
    lines = steps([1, 2, 3], range(3), 0.0) + steps([4, 5, 6], range(2, 6), 13.0)
    found = recovery(lines, InjectedFault(RANK, 3.5, (2,)), 20.0, 64)
    assert found == Recovery(RANK, 3, 3, 10.5, 10.5, 1, 2)


def test_survivors_go_on_with_a_smaller_batch_until_the_lost_one_is_back():
    """As torchft has it. The step that was under way at the fault ends without the killed worker: it counts."""
    lines = steps([1, 2, 3], range(3), 0.0)
    lines += [WorkerStep(pid, 0, 2, 3, 42, 3.0, 6.0) for pid in (1, 2)] + steps([1, 2], [4, 5], 6.0, 2, 42)
    lines += steps([1, 2, 9], [6, 7], 11.0)
    assert recovery(lines, InjectedFault(RANK, 3.5, (3,)), 20.0, 64) == Recovery(RANK, 3, 2, 2.5, 8.5, 0, 0)
    assert recovery(lines, InjectedFault(NODE, 3.5, (3,)), 9.0, 64) == Recovery(NODE, 3, 2, 2.5, None, 0, 0)


def test_a_step_that_the_fault_did_not_touch_does_not_count():
    """All workers had summed their gradients when one was killed: the others end that step, then wait."""
    lines = steps([1, 2], range(2), 0.0) + [WorkerStep(1, 0, 2, 2, 64, 2.0, 2.6)] + steps([1], [3], 7.0, 1, 32)
    assert recovery(lines, InjectedFault(RANK, 2.5, (2,)), 9.0, 64).first_step_seconds == 5.5


@pytest.mark.parametrize("lines, words", [([], "no step before"), (steps([1], [0], 0.0), "no step after")])
def test_nothing_before_or_after(lines, words):
    with pytest.raises(ValueError, match=words):
        recovery(lines, InjectedFault(RANK, 2.0, (1,)), 9.0, 64)


def test_when_workers_have_settled():
    lines = steps([1, 2], range(3), 0.0)
    assert settled(lines, -1.0, 2, 64, 3) == (1, 2)
    assert settled(lines, -1.0, 2, 64, 4) is None and settled(lines, 0.5, 2, 64, 3) is None  # too few, or too early
    assert settled(lines, -1.0, 3, 64, 1) is None and settled(lines, -1.0, 2, 32, 1) is None  # fewer workers, another batch
    assert settled(lines[:-1], -1.0, 2, 64, 3) is None


def test_a_journal_that_many_write(tmp_path):
    journal = StepJournal(tmp_path / "steps.jsonl")
    assert journal.read() == []
    done = steps([1, 2], [0, 1], 0.0)
    for line in done:
        StepJournal(journal.path).write(line)
    with open(journal.path, "ab") as stream:
        stream.write(b'{"pid": 1')  # half of a line
    assert journal.read() == done


def test_a_wait_is_bounded():
    started = time.monotonic()
    with pytest.raises(TimeoutError, match="not within 0.1 s: the moon"):
        wait_for(lambda: None, 0.1, "the moon")
    assert time.monotonic() - started < 5 and wait_for(lambda: 7, 0.1, "seven") == 7


def test_a_tree_of_processes_is_found_and_a_folder_is_left_with_nothing():
    """A process that starts another, both in sessions of their own, as raylets and workers are."""
    with recovery_peers._folder() as folder:
        other = "import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'], " \
                "start_new_session=True); time.sleep(60)"
        parent = subprocess.Popen([sys.executable, "-c", other], env=recovery_peers._environment(folder), start_new_session=True)
        (child,) = eventually(lambda: recovery_ray_train.descendants(parent.pid), 20, "the second process is there")
        assert child in recovery_ray_train.descendants(os.getpid())
        assert set(recovery_peers._marked(folder)) == {parent.pid, child}
    assert parent.wait(timeout=10) == -signal.SIGKILL
    assert not Path(folder).exists() and recovery_peers._marked(folder) == []


def test_a_peer_that_is_not_there_is_told(tmp_path):
    """An interpreter without torchft."""
    bare = tmp_path / "python"
    bare.write_text(f'#!/bin/sh\nexec {sys.executable} -c "import torchft_is_not_here"\n')
    bare.chmod(0o755)
    found = recovery_peers.torchft(parse({}), PeerSettings(torchft_python=str(bare)), tuned=True)
    assert found.recoveries == () and "No module named" in found.refused and "pip install torchft" in found.refused
    assert "\n" not in found.refused and found.tuning["lighthouse"]["heartbeat_timeout_ms"] == 1000
    missing = recovery_peers.torchft(parse({}), PeerSettings(torchft_python=str(tmp_path / "none")), tuned=False)
    assert "No such file" in missing.refused and missing.tuning == {}


def test_settings_that_leave_no_node_are_refused():
    with pytest.raises(ValueError, match="3 nodes do not survive 3 losses"):
        PeerSettings(nodes=3)
    assert PeerSettings(nodes=3, node_faults=2, default_node_faults=2).nodes == 3


def test_what_is_said_of_a_peer():
    found = [Recovery(RANK, 4, 4, seconds, seconds, 1, 3) for seconds in (9.0, 30.0, 10.0)]
    found.append(Recovery(NODE, 4, 3, 20.0, None, 0, 3))
    times = PeerTimes({"a": 1}, tuple(found))
    assert times.seconds(RANK) == [9.0, 30.0, 10.0] and times.median(RANK) == 10.0 and times.full_batch_seconds(NODE) == [None]
    assert PeerTimes({}).median(RANK) is None
    summary = times.summary()
    assert summary["median_seconds"] == {RANK: 10.0, NODE: 20.0} and summary["recoveries"][0] == dataclasses.asdict(found[0])
