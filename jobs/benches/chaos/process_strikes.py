"""What can befall a company of plain rank processes."""

from __future__ import annotations

import contextlib
import functools
import random
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Collection, Iterable
from pathlib import Path
from typing import Any

from actors.state import checkpoint
from jobs.benches.chaos import rank as chaos_rank
from jobs.benches.chaos.company import FaultKind, Strike
from jobs.benches.chaos.machine import alive, send

NODES = tuple(f"n{number}" for number in range(6))
_NOWHERE = "02:44:52:00:77:77"  # the hardware address of nobody
_CLUSTER_SECONDS = 3.0
"""What a cluster takes until it counts a frozen node as lost."""
REPLACED_SECONDS, _TOLERATED_SECONDS = 90.0, 10.0
LOOK_SECONDS = 0.1

KINDS = {
    "rank killed": FaultKind(1, 1), "node killed": FaultKind(1, 1), "node frozen": FaultKind(1, 1), "node stalled": FaultKind(1, 0),
    "everybody stalled": FaultKind(0, 0), "rank hangs": FaultKind(1, 1), "rank is slow": FaultKind(1, 0),
    "rank raises": FaultKind(1, 1),
    "joiner has no memory": FaultKind(1, 1), "joiner dies": FaultKind(1, 1), "joiner hangs": FaultKind(1, 1),
    "joiner cannot be reached": FaultKind(1, 1), "node flaps": FaultKind(1, 1), "drain": FaultKind(1, 1),
    "drain called off": FaultKind(1, 0),
    "link cut": FaultKind(2, 1), "link cut one way": FaultKind(2, 1),
    "storage full": FaultKind(0, 0), "checkpoint damaged": FaultKind(0, 0),
    "coordinator replaced": FaultKind(0, 0), "below min_nodes": FaultKind(4, 1), "more than copies": FaultKind(3, 3),
}

Later = Callable[[], None]


class _Closing(Exception):
    """What was to follow is of no interest any more."""


class ProcessStrikes:
    """What befalls a company of processes, for the company that this is a part of: each begins a strike, and returns what is to
    follow."""

    def _rank_killed(self, node: str, chance: random.Random) -> Later:
        before = self._kill(node)
        return lambda: self._replaced(node, before)

    def _node_killed(self, node: str, chance: random.Random) -> Later:
        seconds = chance.uniform(0, 5)
        self._gone(node, "killed")
        return lambda: self._back(node, seconds)

    def _node_frozen(self, node: str, chance: random.Random) -> Later:
        seconds, stopped = chance.uniform(6, 15), self._stops.stop(self.processes(node))

        def later() -> None:
            self._sleep(_CLUSTER_SECONDS)
            self._tell("left", node, "frozen")
            self._sleep(seconds - _CLUSTER_SECONDS)
            self._stops.go_on(stopped)
            self._tell("joined", node)
        return later

    def _node_stalled(self, node: str, chance: random.Random) -> Later:
        return self._stalled(self.processes(node), chance.uniform(1, 2))

    def _everybody_stalled(self, chance: random.Random) -> Later:
        return self._stalled([pid for node in NODES for pid in self.processes(node)], chance.uniform(1, 2))

    def _stalled(self, pids: Iterable[int], seconds: float) -> Later:
        stopped = self._stops.stop(pids)

        def later() -> None:
            self._sleep(seconds)
            self._stops.go_on(stopped)
        return later

    def _rank_hangs(self, node: str, chance: random.Random) -> Later:
        """Begins with its next compute segment."""
        before = set(self.processes(node))
        self._orders.give(node, chaos_rank.HANG)
        return lambda: self._misbehaves(node, chaos_rank.HANG, before, must_go=True)

    def _rank_raises(self, node: str, chance: random.Random) -> Later:
        before = set(self.processes(node))
        self._orders.give(node, chaos_rank.RAISE)
        return lambda: self._misbehaves(node, chaos_rank.RAISE, before, must_go=False)

    def _rank_is_slow(self, node: str, chance: random.Random) -> Later:
        self._orders.give(node, chaos_rank.SLOW)

        def later() -> None:
            self._sleep(10)
            self._orders.give(node, chaos_rank.SLOW, 0)
        return later

    def _joiner_has_no_memory(self, node: str, chance: random.Random) -> Later:
        return self._bad_joiner(node, chance, chance.choice([chaos_rank.NO_MEMORY, chaos_rank.NO_MEMORY_LATER]))

    def _joiner_dies(self, node: str, chance: random.Random) -> Later:
        return self._bad_joiner(node, chance, chaos_rank.DIE)

    def _joiner_hangs(self, node: str, chance: random.Random) -> Later:
        return self._bad_joiner(node, chance, chaos_rank.HANG_AS_IT_FORMS)

    def _bad_joiner(self, node: str, chance: random.Random, misbehaviour: str) -> Later:
        seconds, times = chance.uniform(0, 2), chance.randint(1, 3)
        self._gone(node, "killed")

        def later() -> None:
            self._orders.give(node, misbehaviour, times)
            self._back(node, seconds)
            last: Collection[int] = ()

            def over() -> bool:
                nonlocal times, last
                if (left := self._orders.left(node, misbehaviour)) < times:
                    times, last = left, self.processes(node)
                return not left and (misbehaviour != chaos_rank.HANG_AS_IT_FORMS or not any(map(alive, last)))
            with contextlib.suppress(TimeoutError):  # it is not wanted
                self._wait(over, "it misbehaves")
            self._orders.give(node, misbehaviour, 0)
        return later

    def _joiner_cannot_be_reached(self, node: str, chance: random.Random) -> Later:
        """From the coordinator it can."""
        seconds, pause = chance.uniform(5, 15), chance.uniform(0, 2)
        others = [other for other in NODES if other != node]
        self._gone(node, "killed")

        def later() -> None:
            for other in others:
                self._cut(node, other)
                self._cut(other, node)
            self._back(node, pause)
            self._sleep(seconds)
            for other in others:
                self._cut(node, other, restored=True)
                self._cut(other, node, restored=True)
        return later

    def _node_flaps(self, node: str, chance: random.Random) -> Later:
        pauses = [chance.uniform(0.1, 1) for _ in range(5)]
        self._gone(node, "lost contact")

        def later() -> None:
            for index, seconds in enumerate(pauses):
                self._sleep(seconds)
                if index % 2:
                    self._gone(node, "lost contact")
                else:
                    self._tell("joined", node)
        return later

    def _drain(self, node: str, chance: random.Random) -> Later:
        seconds, deadline = chance.uniform(0, 5), time.monotonic() + 10
        self._tell("draining", node, "preempted", deadline)

        def later() -> None:
            self._sleep(deadline - time.monotonic())
            self._gone(node, "drained")
            self._back(node, seconds)
        return later

    def _drain_called_off(self, node: str, chance: random.Random) -> Later:
        seconds = chance.uniform(0, 4)
        self._tell("draining", node, "preempted", time.monotonic() + 20)

        def later() -> None:
            self._sleep(seconds)
            self._tell("stays", node)
        return later

    def _link_cut(self, node: str, other: str, chance: random.Random) -> Later:
        self._cut(other, node)
        return self._link_cut_one_way(node, other, chance)

    def _link_cut_one_way(self, node: str, other: str, chance: random.Random) -> Later:
        self._cut(node, other)

        def later() -> None:
            self._sleep(40)
            for sender, receiver in ((node, other), (other, node)):
                self._cut(sender, receiver, restored=True)
        return later

    def _storage_full(self, chance: random.Random) -> Later:
        """Full until the last one that fills it ends."""
        seconds = chance.uniform(5, 20)
        with self._filling:
            self._fills += 1
            self._disk.fill()

        def later() -> None:
            self._sleep(seconds)
            with self._filling:
                self._fills -= 1
                if not self._fills:
                    self._disk.free()
        return later

    def _checkpoint_damaged(self, chance: random.Random) -> Later:
        """The newest one, unless there would not be two left that are whole: a run that has none may end."""
        whole = [found for found in checkpoint.complete(str(self.folder / "checkpoints")) if found not in self._damaged]
        if len(whole) > 2:
            newest = max(whole)
            self._damaged.add(newest)
            with contextlib.suppress(FileNotFoundError):  # it was deleted just now
                flip(chance.choice(sorted(Path(newest).glob("*.safetensors"))), chance)
        return lambda: None

    @functools.cached_property
    def _damaged(self) -> set[str]:
        return set()

    def _coordinator_replaced(self, chance: random.Random) -> Later:
        """It ends in the middle of whatever it does, and another one begins up to three seconds later."""
        self._away, before = chance.uniform(0, 3), self._trainer
        before._conductor.post(replace_coordinator)

        def later() -> None:
            self._wait(lambda: self._trainer is not before and self._trainer._run.seated, "another coordinator is there")
        return later

    def _below_min_nodes(self, *arguments: Any) -> Later:
        """They drain one after another, and go as soon as they have handed over; the first that has not, since there would be
        too few nodes without it, goes at its deadline, and the others stay. Then all come back."""
        *nodes, chance = arguments
        seconds = chance.uniform(3, 8)

        def later() -> None:
            gone = []
            for node in nodes:
                deadline = time.monotonic() + 15
                self._tell("draining", node, "preempted", deadline)
                self._sleep(2)
                with contextlib.suppress(TimeoutError):
                    self._wait(lambda node=node: node not in self._in_use(), "handed over", deadline - time.monotonic())
                held = node in self._in_use()
                self._gone(node, "drained")
                gone.append(node)
                if held:
                    break
            self._sleep(seconds)
            for node in gone:
                self._tell("joined", node)
        return later

    def _more_than_copies(self, one: str, two: str, three: str, chance: random.Random) -> Later:
        seconds = chance.uniform(1, 3)
        for node in (one, two, three):
            self._kill(node)
        for node in (one, two, three):
            self._tell("left", node, "killed")

        def later() -> None:
            self._sleep(seconds)
            for node in (one, two, three):
                self._tell("joined", node)
        return later

    # --- parts of strikes ----------------------------------------------------------------------------------------

    def _kill(self, node: str) -> set[int]:
        """Who is there."""
        found = set(self.processes(node))
        for pid in found:
            send(pid, signal.SIGKILL)
        return found

    def _gone(self, node: str, why: str) -> None:
        self._kill(node)
        self._tell("left", node, why)

    def _back(self, node: str, seconds: float) -> None:
        self._sleep(seconds)
        self._tell("joined", node)

    def _cut(self, sender: str, receiver: str, *, restored: bool = False) -> None:
        """What one sends to the other goes nowhere, and nobody is told."""
        here, there = (self._network.interface(NODES.index(node)) for node in (sender, receiver))
        hardware = there.hardware_address if restored else _NOWHERE
        subprocess.run(["ip", "-n", here.namespace, "neigh", "replace", there.address, "lladdr", hardware, "dev", here.device,
                        "nud", "permanent"], check=True, timeout=30)

    def _misbehaves(self, node: str, order: str, before: set[int], must_go: bool) -> None:
        """An order that nobody takes is taken back: the node may be idle. must_go: an error may fall into a step that others have
        ended already, and then costs nobody a place."""
        try:
            self._wait(lambda: not self._orders.left(node, order), "it computes", 20)
        except TimeoutError:
            self._orders.give(node, order, 0)
            return
        try:
            self._replaced(node, before, REPLACED_SECONDS if must_go else _TOLERATED_SECONDS)
        except TimeoutError:
            if must_go:
                raise

    def _replaced(self, node: str, before: Collection[int], seconds: float = REPLACED_SECONDS) -> None:
        """Raises TimeoutError."""
        self._wait(lambda: not before & set(self.processes(node)), f"{node} has another process", seconds)

    def _wait(self, condition: Callable[[], Any], what: str, seconds: float = REPLACED_SECONDS) -> None:
        """Raises TimeoutError."""
        deadline = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > deadline:
                raise TimeoutError(f"not within {seconds:g} s: {what}")
            self._sleep(LOOK_SECONDS)

    def _sleep(self, seconds: float) -> None:
        if self._closing.wait(max(0.0, seconds)):
            raise _Closing

    def _beside(self, strike: Strike, later: Later) -> None:
        def run() -> None:
            try:
                later()
                strike.ended = time.time()
            except _Closing:
                pass
            except BaseException as error:
                self._failed.append(f"{strike.kind} of {strike.nodes}: {type(error).__name__}: {error}; {self._last_words()}")
        self._threads.append(threading.Thread(target=run, name=strike.kind, daemon=True))
        self._threads[-1].start()


class Replaced(Exception):
    """The coordinator has ended, in the middle of whatever it did."""


def replace_coordinator() -> None:
    """On the conductor's thread."""
    raise Replaced


def flip(piece: Path, chance: random.Random) -> None:
    """One bit of the values of a piece of a checkpoint."""
    content = bytearray(piece.read_bytes())
    content[len(content) - 1 - chance.randrange(len(content) // 2)] ^= 1
    piece.write_bytes(content)
