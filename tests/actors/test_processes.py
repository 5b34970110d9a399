"""Rank processes as such: what they host here needs no torch, so that they start at once."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import threading
import time

import pytest

from actors import processes
from actors.processes import ProcessRanks
from actors.ranks import RankFailed, call
from orchestrator.config import RunConfig


class Host:
    def __init__(self, config: RunConfig):
        self.seed, self.aborted = config.run.seed, threading.Event()

    def abort(self):
        self.aborted.set()

    def echo(self, *values):
        return values

    def about(self):
        return os.getpid(), self.seed, "torch" in sys.modules, signal.getsignal(signal.SIGINT) == signal.SIG_IGN

    def fail(self):
        raise ValueError("first line\nsecond line")

    def block(self):
        self.aborted.wait()
        self.aborted.clear()
        raise RuntimeError("aborted")

    def work(self, fails):
        return self.fail() if fails else self.block()

    def saved(self):
        self.aborted.wait()
        return "written"

    def stay(self):
        while True:
            signal.pause()


class Refusing:
    def __init__(self, config: RunConfig):
        os._exit(3)


@pytest.fixture
def ranks():
    with ProcessRanks(RunConfig(), 3, Host) as found:
        yield found


def ended(pids, seconds=20.0):
    """Whether all of them are gone, zombies too; waits for those of others."""
    for pid in pids:
        try:
            descriptor = os.pidfd_open(pid)
        except ProcessLookupError:
            continue
        if not select.select([descriptor], [], [], seconds)[0]:
            return False
        os.close(descriptor)
    return True


def test_each_rank_gets_its_own_arguments_in_a_process_of_its_own(ranks):
    assert ranks.start("echo", [(0, "a"), (1, "b"), ()]).results(30) == [(0, "a"), (1, "b"), ()]
    assert ranks.start("echo", [(5,)]).results(30) == [(5,)]  # rank 0 only
    about = ranks.start("about", [()] * 3).results(30)
    assert [found[0] for found in about] == ranks.pids and os.getpid() not in ranks.pids
    assert [found[1:] for found in about] == [(RunConfig().run.seed, False, True)] * 3


def test_a_failure_is_one_line(ranks):
    with pytest.raises(RankFailed) as caught:
        ranks.start("fail", [()]).results(30)
    assert caught.value.rank == 0 and str(caught.value) == "rank 0: ValueError: first line"


def test_late_answers_to_a_call_that_failed_are_dropped(ranks):
    with pytest.raises(RankFailed, match="rank 0: no answer within 0.01 s"):
        ranks.start("block", [()] * 2).results(0.01)
    ranks.abort()
    assert ranks.start("echo", [(2,)] * 2).results(30) == [(2,), (2,)]
    assert not ranks._mail and not ranks._awaited


def test_when_one_fails_the_others_are_set_free(ranks):
    """Ranks 0 and 2 would be blocked for ever; afterwards all take calls again."""
    with pytest.raises(RankFailed, match="rank 1: ValueError"):
        call(ranks, "work", [(False,), (True,), (False,)], 30)
    assert ranks.start("echo", [(n,) for n in range(3)]).results(30) == [(0,), (1,), (2,)]


def test_files_are_waited_for_beside_other_calls(ranks):
    pending = ranks.start("saved", [()] * 2)
    assert ranks.start("echo", [(1,), (2,)]).results(30) == [(1,), (2,)] and not pending.done()
    ranks.abort()
    assert pending.results(30) == ["written"] * 2


def test_a_lost_process_is_told_by_every_call(ranks):
    os.kill(ranks.pids[1], signal.SIGKILL)
    for _ in range(3):
        with pytest.raises(RankFailed, match="rank 1: its process or node was lost"):
            ranks.start("echo", [()] * 3).results(30)
    ranks.abort()


def test_closing_leaves_nothing_behind():
    before = set(os.listdir("/proc/self/fd"))
    ranks = ProcessRanks(RunConfig(), 3, Host)
    ranks.start("echo", [()] * 3).results(30)
    pids = ranks.pids
    os.kill(pids[2], signal.SIGKILL)
    ranks.close()
    ranks.close()
    assert not any(os.path.exists(f"/proc/{pid}") for pid in pids)
    opened = {fd for fd in set(os.listdir("/proc/self/fd")) - before if os.path.exists(f"/proc/self/fd/{fd}")}
    assert len(opened) <= 1  # multiprocessing's resource tracker, once


def test_busy_and_frozen_processes_are_ended_by_force(monkeypatch):
    monkeypatch.setattr(processes, "_END_SECONDS", 0.1)
    monkeypatch.setattr(processes, "_ABORT_SECONDS", 0.1)
    ranks = ProcessRanks(RunConfig(), 2, Host)
    ranks.start("echo", [()] * 2).results(30)
    pids = ranks.pids
    os.kill(pids[0], signal.SIGSTOP)
    ranks.start("stay", [()] * 2)
    started = time.monotonic()
    ranks.abort()  # the frozen one cannot answer
    ranks.close()
    assert time.monotonic() - started < 5
    assert not any(os.path.exists(f"/proc/{pid}") for pid in pids)


def test_a_process_that_does_not_come_up_is_told():
    with ProcessRanks(RunConfig(), 2, Refusing) as ranks, pytest.raises(RankFailed, match="its process or node was lost"):
        ranks.start("echo", [()] * 2).results(30)


PARENT = """
import sys
sys.path[:0] = {path!r}
from test_processes import Host, ProcessRanks, RunConfig
if __name__ == "__main__":
    ranks = ProcessRanks(RunConfig(), 2, Host)
    ranks.start("echo", [()] * 2).results(30)
    ranks.start("stay", [()])
    print(*ranks.pids, flush=True)
    sys.stdin.read()
"""


def test_ranks_end_with_whoever_started_them(tmp_path):
    script = tmp_path / "parent.py"
    script.write_text(PARENT.format(path=[entry or os.getcwd() for entry in sys.path]))
    parent = subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, stdin=subprocess.PIPE)
    pids = [int(pid) for pid in parent.stdout.readline().split()]
    assert len(pids) == 2
    parent.kill()
    parent.wait()
    parent.stdout.close(), parent.stdin.close()
    assert ended(pids)
