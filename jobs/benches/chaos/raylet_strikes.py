"""What can befall a company of real raylets.

A strike gives the seconds to wait between its parts. What it stops, cuts or takes away it gives back however it ends, also when the
company is closed in the middle of it; and it copes with processes that are gone already, since strikes overlap.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import time
from collections.abc import Iterator
from pathlib import Path

from jobs.benches.chaos.company import FaultKind, RunEnded, Strike
from jobs.benches.chaos.raylet_commands import SECONDS, command_line, drained
from jobs.benches.chaos.raylet_hosts import COORDINATOR, RANK, signal_all
from jobs.benches.shared.held_thread import HeldThread, cpu_seconds

LOOK_SECONDS = 0.1
STOPPED = 130  # exit code of a run that was asked to end

Doing = Iterator[float]
"""What a strike does, one part after each wait; it gives the seconds to wait."""

KINDS = {
    "rank killed": FaultKind(1, 1), "node killed": FaultKind(1, 1), "node killed twice": FaultKind(1, 1),
    "node flaps": FaultKind(1, 1),
    "node cut off": FaultKind(1, 1), "node cut briefly": FaultKind(1, 0), "node frozen": FaultKind(1, 1),
    "node stalled": FaultKind(1, 0),
    "everybody stalled": FaultKind(0, 0), "drain": FaultKind(1, 1), "link cut": FaultKind(2, 1),
    "link cut one way": FaultKind(2, 1),
    "coordinator killed": FaultKind(0, 0), "coordinator frozen": FaultKind(0, 0),
    "driver killed": FaultKind(0, 0), "driver frozen": FaultKind(0, 0),
    "driver and coordinator killed": FaultKind(0, 0), "stopped and started": FaultKind(0, 0), "checkpoint damaged": FaultKind(0, 0),
    "more than copies": FaultKind(3, 3),
    "rank hangs": FaultKind(1, 1),
}
"""Each is a method of this name. A drain cannot be called off: Ray has no word for it."""


class RayletStrikes:
    """What befalls a company of raylets: each part of a strike, by its kind, for the company that this is a part of."""

    def _return(self, strike: Strike, *nodes: int) -> None:
        strike.nodes += self.hosts.replace(*nodes)

    def _given_up(self, strike: Strike, node: int) -> Doing:
        yield 0.0
        self._return(strike, node)

    def _rank_killed(self, chance: random.Random, strike: Strike, node: int) -> Doing:
        signal_all(self.hosts.running(RANK, node), signal.SIGKILL)
        yield from ()

    def _rank_hangs(self, chance: random.Random, strike: Strike, node: int) -> Doing:
        """Whichever thread of it computes most stands still until the process is ended; the others go on, and beat."""
        seconds = chance.uniform(30.0, 60.0)
        yield 0.0  # to the thread that has to do all of this
        for pid in self.hosts.running(RANK, node):
            before = cpu_seconds(pid)
            yield 1.0
            used = {thread: found - before.get(thread, found) for thread, found in cpu_seconds(pid).items()}
            with contextlib.suppress(ProcessLookupError, FileNotFoundError, ValueError):  # it is gone already
                with HeldThread(pid, max(used, key=used.__getitem__)) as held:
                    while not held.hold() and not held.ended:
                        yield 0.005
                    until = time.monotonic() + seconds
                    while not held.look() and time.monotonic() < until:
                        yield LOOK_SECONDS

    def _node_killed(self, chance: random.Random, strike: Strike, node: int) -> Doing:
        self.hosts.kill(node)
        yield chance.uniform(0.0, 5.0)
        self._return(strike, node)

    def _node_killed_twice(self, chance: random.Random, strike: Strike, node: int) -> Doing:
        """The second time as it joins."""
        yield from self._node_killed(chance, strike, node)
        yield chance.uniform(0.0, 3.0)
        yield from self._node_killed(chance, strike, node)

    def _node_flaps(self, chance: random.Random, strike: Strike, node: int) -> Doing:
        """Ray may have given it up, or not: where it has not, the node keeps its name."""
        for _ in range(3):
            with self.hosts.cut(node):
                yield chance.uniform(4.5, 7.0)
            yield chance.uniform(0.5, 4.0)
        yield 5.0
        if not self.cluster.up(node):
            self._return(strike, node)

    def _node_cut_off(self, chance: random.Random, strike: Strike, node: int) -> Doing:
        with self.hosts.cut(node):
            yield chance.uniform(6.0, 15.0)
        yield chance.uniform(0.0, 3.0)
        self._return(strike, node)

    def _node_cut_briefly(self, chance: random.Random, strike: Strike, node: int) -> Doing:
        with self.hosts.cut(node):
            yield chance.uniform(1.0, 2.0)

    def _node_frozen(self, chance: random.Random, strike: Strike, node: int) -> Doing:
        with self.hosts.stopped(lambda: self.cluster.pids(node)):
            yield chance.uniform(6.0, 15.0)
        yield chance.uniform(0.0, 3.0)
        self._return(strike, node)

    def _node_stalled(self, chance: random.Random, strike: Strike, node: int) -> Doing:
        with self.hosts.stopped(lambda: self.cluster.pids(node)):
            yield chance.uniform(1.0, 2.0)

    def _everybody_stalled(self, chance: random.Random, strike: Strike) -> Doing:
        nodes = (0, *self.cluster.nodes)
        with self.hosts.stopped(lambda: [pid for node in nodes for pid in self.cluster.pids(node)]):
            yield chance.uniform(1.0, 3.0)

    def _drain(self, chance: random.Random, strike: Strike, node: int) -> Doing:
        """The notice comes as from Ray's autoscaler; at its deadline the node is gone, and another one takes its place."""
        yield 0.0
        from ray.exceptions import RayError  # it takes seconds

        deadline = time.time() + 15.0
        for _ in range(5):
            with contextlib.suppress(RayError):  # the head may be stopped at the moment
                drained(self.cluster.address, self.hosts.name(node), deadline)
                break
            yield 1.0
        yield max(0.0, deadline - time.time())
        yield from self._node_killed(chance, strike, node)

    def _link_cut(self, chance: random.Random, strike: Strike, node: int, other: int) -> Doing:
        with self.hosts.deaf(node, other), self.hosts.deaf(other, node):
            yield 40.0

    def _link_cut_one_way(self, chance: random.Random, strike: Strike, node: int, other: int) -> Doing:
        with self.hosts.deaf(node, other):
            yield 40.0

    def _more_than_copies(self, chance: random.Random, strike: Strike, *nodes: int) -> Doing:
        self.hosts.kill(*nodes)
        yield chance.uniform(1.0, 3.0)
        self._return(strike, *nodes)

    def _coordinator_killed(self, chance: random.Random, strike: Strike) -> Doing:
        signal_all(self.hosts.running(COORDINATOR, 0), signal.SIGKILL)
        yield from ()

    def _coordinator_frozen(self, chance: random.Random, strike: Strike) -> Doing:
        pids = self.hosts.running(COORDINATOR, 0)
        with self.hosts.stopped(lambda: [pid for pid in pids if command_line(pid).startswith(COORDINATOR)]):
            yield chance.uniform(6.0, 40.0)

    def _driver_killed(self, chance: random.Random, strike: Strike) -> Doing:
        with self._driver_away(signal.SIGKILL):
            yield chance.uniform(0.0, 10.0)

    def _driver_and_coordinator_killed(self, chance: random.Random, strike: Strike) -> Doing:
        with self._driver_away(signal.SIGKILL):
            signal_all(self.hosts.running(COORDINATOR, 0), signal.SIGKILL)
            yield chance.uniform(0.0, 10.0)

    def _driver_frozen(self, chance: random.Random, strike: Strike) -> Doing:
        with self._lock:
            driver = self._driver
        with self.hosts.stopped(lambda: [driver.pid] if driver.poll() is None else []):
            yield chance.uniform(3.0, 20.0)

    def _stopped_and_started(self, chance: random.Random, strike: Strike) -> Doing:
        with self._lock:
            if self._without or self._damaged.intersection(self._checkpoints()[-1:]):
                return  # a second signal would end it without a save; what is damaged would be taken for saved
        with self._driver_away(signal.SIGINT) as driver:
            deadline = time.monotonic() + SECONDS
            while (code := driver.poll()) is None:
                if time.monotonic() > deadline:
                    raise RunEnded(f"not within {SECONDS:g} s: a stop: {self._last_words()}")
                yield LOOK_SECONDS
            if code not in (STOPPED, -signal.SIGKILL):  # unless it was killed meanwhile
                raise RunEnded(f"exit code {code} of a stop: {self._last_words()}")
            self._only_saved = self.steps

    def _checkpoints(self) -> list[Path]:
        """That are complete, the newest last."""
        return [manifest.parent for manifest in sorted(self.folder.glob("checkpoints/step-*/manifest.json"))]

    def _checkpoint_damaged(self, chance: random.Random, strike: Strike) -> Doing:
        """The last bytes of a file of the newest one are others then. Two are left as they were: without any a run ends. Nor is the only
        place harmed that has the state: a run that was stopped has none in memory until it has gone on."""
        yield 0.0
        for _ in range(5):
            found = self._checkpoints()
            with self._lock:
                if self._without or self.steps <= self._only_saved:
                    return
            if len(set(found) - self._damaged) < 3 or found[-1] in self._damaged:
                return
            with contextlib.suppress(FileNotFoundError, IndexError):  # it is deleted just now
                file = chance.choice(sorted(found[-1].glob("*.safetensors")))
                self._damaged.add(found[-1])
                with open(file, "r+b") as piece:
                    piece.seek(-16, os.SEEK_END)
                    flipped = bytes(byte ^ 0xFF for byte in piece.read())
                    piece.seek(-16, os.SEEK_END)
                    piece.write(flipped)
                return
            yield 1.0
