"""For tests of heartbeat connections: processes that have one, and waiting for what the coordinator's end sees."""

from __future__ import annotations

import os
import queue
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

BEAT = 0.05
RUN = "a run"
REPOSITORY = Path(__file__).parents[2]


class Process:
    """One that runs heartbeat_member.py; `told`: the next line that it said."""

    def __init__(self, address, member, how="idle", within=()):
        arguments = [address[0], address[1], member.node, member.local, member.incarnation, BEAT, how]
        self.member = member
        self._process = subprocess.Popen(
            [*within, sys.executable, "-m", "tests.actors.heartbeat_member", *map(str, arguments)],
            cwd=REPOSITORY, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1)
        self.pid, self._lines = self._process.pid, queue.Queue()
        self._reader = threading.Thread(target=lambda: [self._lines.put(line.strip()) for line in self._process.stdout])
        self._reader.start()

    def signal(self, number):
        """A stop has happened when this returns: until one of its threads has run, all others go on."""
        self._process.send_signal(number)
        if number == signal.SIGSTOP:
            os.waitid(os.P_PID, self.pid, os.WSTOPPED | os.WNOWAIT)

    def say(self, line):
        self._process.stdin.write(line + "\n")

    def told(self, seconds=10.0):
        return self._lines.get(timeout=seconds)

    def quiet(self, seconds):
        try:
            return not self._lines.get(timeout=seconds)
        except queue.Empty:
            return True

    def end(self):
        self._process.kill()
        self._process.wait()
        self._reader.join()
        self._process.stdin.close()
        self._process.stdout.close()


def expect(server, what, seconds=20.0):
    """The next of `what` (server.hello or server.ended) that says anything."""
    deadline = time.monotonic() + seconds
    while not (found := what()):
        assert time.monotonic() < deadline, "nothing happened in time"
        time.sleep(BEAT / 50)
    return found


def heard(server):
    """When each connected member was last heard from."""
    return {member: beat.at for member, beat in server.beats().items()}


def beats_on(server, member, seconds=10.0, before=None):
    """Whether it is heard from again; `before`: what `heard` said until then."""
    before = heard(server)[member] if before is None else before
    deadline, pause = time.monotonic() + seconds, threading.Event()
    while heard(server).get(member, before) <= before and time.monotonic() < deadline:
        pause.wait(BEAT / 5)
    return heard(server)[member] > before
