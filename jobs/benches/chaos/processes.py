"""A company of plain rank processes, each in a network namespace of its own, driven by the product's own trainer in this process.

What a cluster would say of its nodes is said here; everything else befalls the processes, their links, and the disk of the run in
truth. Needs root and Linux, like the namespaces and the disk.
"""

from __future__ import annotations

import contextlib
import functools
import random
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from actors.calls.messages import Start
from actors.calls.rank_calls import News
from actors.data.dataset import Dataset
from actors.files.run_folder import RunFolder
from actors.hosts.processes import ProcessRanks
from actors.protocol.trainer import Sources, Trainer
from actors.state import checkpoint
from jobs.benches.chaos import rank as chaos_rank
from jobs.benches.chaos.company import Company, Ended, Kind, Strike
from jobs.benches.chaos.machine import Disk, Stops, alive, send
from jobs.benches.chaos.rank import Orders
from jobs.benches.chaos.text import Text, configured, tokens
from jobs.benches.churn.rank import Home
from jobs.benches.shared.networks import Network
from orchestrator.layout.layout import Layout, choose
from orchestrator.protocol.membership import Member
from orchestrator.told.lines import Told
from orchestrator.topology import Node

NODES = tuple(f"n{number}" for number in range(6))
_MEGABITS = 10_000.0
_NOWHERE = "02:44:52:00:77:77"  # the hardware address of nobody
_CLUSTER_SECONDS = 3.0
"""What a cluster takes until it counts a frozen node as lost."""
_START_SECONDS, _STOP_SECONDS, _REPLACED_SECONDS, _TOLERATED_SECONDS = 180.0, 120.0, 90.0, 10.0
_LOOK_SECONDS = 0.1

KINDS = {
    "rank killed": Kind(1, 1), "node killed": Kind(1, 1), "node frozen": Kind(1, 1), "node stalled": Kind(1, 0),
    "everybody stalled": Kind(0, 0), "rank hangs": Kind(1, 1), "rank is slow": Kind(1, 0), "rank raises": Kind(1, 1),
    "joiner has no memory": Kind(1, 1), "joiner dies": Kind(1, 1), "joiner hangs": Kind(1, 1),
    "joiner cannot be reached": Kind(1, 1), "node flaps": Kind(1, 1), "drain": Kind(1, 1), "drain called off": Kind(1, 0),
    "link cut": Kind(2, 1), "link cut one way": Kind(2, 1), "storage full": Kind(0, 0), "checkpoint damaged": Kind(0, 0),
    "coordinator replaced": Kind(0, 0), "below min_nodes": Kind(4, 1), "more than copies": Kind(3, 3),
}


# --- runs --------------------------------------------------------------------------------------------------------------

@contextmanager
def processes(folder: Path) -> Iterator[Callable[[str], Company]]:
    """begin(name): a run of which three steps are committed.

    Raises NetworkRefused: this machine gives us no network.
    """
    dataset = tokens(folder)
    under_way: list[Processes] = []

    def begin(name: str) -> Processes:
        under_way.append(Processes(folder, dataset, name))
        under_way[-1].begin()
        return under_way[-1]
    try:
        yield begin
    finally:
        for company in under_way:
            company.close()


# --- ranks that outlive a coordinator ----------------------------------------------------------------------------------

class Ranks(ProcessRanks):
    """Remembers what a place needs for as long as it lives, whoever is there when another coordinator begins."""

    def enlist(self, members: Sequence[Member]) -> None:
        before = dict(self._own)
        super().enlist(members)
        self._own = before | self._own

    def left_behind(self) -> tuple[Member, ...]:
        """In the order that `enlist` wants. What the coordinator that is gone has asked for is done or dropped first."""
        done = threading.Event()
        self._jobs.put(done.set)
        done.wait(_REPLACED_SECONDS)
        with self._changed:
            self._to_attach.clear()
            self._post = None
            member_of = {number: member for member, number in self._of_member.items()}
            return tuple(member_of[number] for number in sorted(self._processes))


class _Replaced(Exception):
    """The coordinator has ended, in the middle of whatever it did."""


# --- the company -------------------------------------------------------------------------------------------------------

Later = Callable[[], None]


class _Closing(Exception):
    """What was to follow is of no interest any more."""


@dataclass
class _Said:
    """What a cluster says of a node at present."""

    present: bool = True
    deadline: float | None = None


@dataclass
class _Record:
    """What the run has told."""

    steps: int = 0
    events: list[Told] = field(default_factory=list)


class Processes:
    """A Company. Of what is said of nodes a coordinator that comes later is told as well."""

    def __init__(self, folder: Path, dataset: Dataset, name: str):
        self.kinds: Mapping[str, Kind] = KINDS
        self.strikes: list[Strike] = []
        self.folder = folder / "runs" / name
        self.dataset, self.config = dataset, configured(dataset, str(folder / "runs"), name, {})
        config = self.config
        self._layout: Layout = choose(tuple(Node(node, 1) for node in NODES), config.layout, config.model, config.stages)
        self._record, self._stops, self._said = _Record(), Stops(), {node: _Said() for node in NODES}
        self._saying = threading.Lock()
        self._threads: list[threading.Thread] = []
        self._failed: list[str] = []
        self._closing, self._over = threading.Event(), threading.Event()
        self._stopping = self._stopped = False
        self._away = 0.0
        self._fills, self._filling = 0, threading.Lock()
        self._open = contextlib.ExitStack()
        try:
            self._network = self._open.enter_context(Network(len(NODES), _MEGABITS))
            self._disk = Disk(self.folder)
            self._open.callback(self._disk.close)
            path = folder / f"{name}.orders"
            path.unlink(missing_ok=True)
            self._orders = Orders(path, NODES)
            own = [(path, NODES, node, Home(interface.namespace, interface.address))
                   for node, interface in zip(NODES, self._network.interfaces)]
            self._ranks = self._open.enter_context(
                Ranks(config, len(NODES), chaos_rank.chaos_rank, own, start_method="forkserver"))
            self._trainer = self._next_trainer(Start(tuple(Member(node, 0) for node in NODES)))
        except BaseException:
            self._open.close()
            raise

    def begin(self) -> None:
        """Raises Ended."""
        self._driving = threading.Thread(target=self._drive, name="run", daemon=True)
        self._driving.start()
        deadline = time.monotonic() + _START_SECONDS
        while self._record.steps < 3:
            self._check()
            if time.monotonic() > deadline:
                raise Ended(f"no three steps in {_START_SECONDS:g} s: {self._last_words()}")
            self._over.wait(_LOOK_SECONDS)

    # --- a company -----------------------------------------------------------------------------------------------

    def nodes(self) -> list[str]:
        """Once it has been stopped: those that it used at the end."""
        self._check()
        struck = {node for strike in self.strikes if strike.ended is None for node in strike.nodes}
        return [node for node in self._in_use() if node not in struck]

    def strike(self, kind: str, nodes: Sequence[str], chance: random.Random) -> Strike:
        self._check()
        wanted = self.kinds[kind]
        if len(nodes) != wanted.nodes:
            raise ValueError(f"{kind}: {wanted.nodes} nodes, not {list(nodes)}")
        found = Strike(kind, wanted.takes, time.time(), tuple(nodes))
        self.strikes.append(found)
        self._beside(found, getattr(self, "_" + kind.replace(" ", "_"))(*nodes, chance))
        return found

    def whole(self) -> bool:
        self._check()
        return all(strike.ended is not None for strike in self.strikes) and len(self._in_use()) == len(NODES)

    def processes(self, node: str) -> Collection[int]:
        return self._ranks.pids_on(node)

    def stop(self) -> None:
        self._check()
        self._stopping = True
        self._trainer.stop()
        self._driving.join(_STOP_SECONDS)
        if self._driving.is_alive():
            raise Ended(f"it was asked to end, and has not in {_STOP_SECONDS:g} s: {self._last_words()}")
        if self._failed:
            raise Ended("; ".join(self._failed))
        self._stopped = True

    def close(self) -> None:
        self._closing.set()
        self._stopping = True
        if not self._over.is_set():
            self._trainer._conductor.post(_replace)
            self._driving.join(_STOP_SECONDS)
        for thread in self._threads:
            thread.join(_REPLACED_SECONDS)
        self._open.close()

    # --- the run -------------------------------------------------------------------------------------------------

    def _next_trainer(self, start: Start) -> Trainer:
        folder = RunFolder(str(self.folder.parent), self.config.run.name)
        return Trainer(self.config, self._layout, self._ranks, folder, self._sources, self._network.host, self._watch,
                       start=start)

    @functools.cached_property
    def _sources(self) -> Sources:
        return Text(self.config, self.dataset).sources()

    def _drive(self) -> None:
        """One coordinator after another."""
        try:
            while True:
                try:
                    outcome = self._trainer.run()
                    if not self._stopping:
                        self._failed.append(f"the run ended: {outcome}")
                    elif not outcome.saved:
                        self._failed.append(f"it ended without a save: {outcome}")
                    return
                except _Replaced:
                    if self._closing.wait(self._away):
                        return
                    members = self._ranks.left_behind()
                    with self._saying:
                        self._trainer = self._next_trainer(Start(members, left_behind=True))
                        for node, said in self._said.items():
                            if said.present:
                                self._ranks.tell(News("joined", Node(node, 1)))
                            if said.present and said.deadline is not None:
                                self._ranks.tell(News("draining", Node(node, 1), "preempted", said.deadline))
                    if self._stopping:
                        self._trainer.stop()
        except BaseException as error:
            self._failed.append(f"the run ended: {type(error).__name__}: {error}: {self._last_words()}")
        finally:
            self._over.set()

    def _watch(self, kind: str, values: Any) -> None:
        if kind == "step":
            self._record.steps += 1
        elif kind == "event":
            self._record.events.append(values)

    def _check(self) -> None:
        """Raises Ended."""
        if self._failed or self._over.is_set() and not self._stopped:
            raise Ended("; ".join(self._failed) or "the run is over")

    def _last_words(self) -> str:
        return str(self._record.events[-8:])

    def _in_use(self) -> list[str]:
        found = []
        for member in self._trainer.seated:
            with contextlib.suppress(KeyError, ValueError):  # dismissed meanwhile
                if alive(self._ranks.pid_of(member)):
                    found.append(member.node)
        return sorted(found)

    def _tell(self, kind: str, node: str, reason: str = "", deadline: float | None = None) -> None:
        """deadline: on the clock of time.monotonic()."""
        with self._saying:
            said = self._said[node]
            said.present, said.deadline = kind != "left", deadline
            self._ranks.tell(News(kind, Node(node, 1), reason, deadline))

    # --- what befalls it: each begins a strike, and returns what is to follow ------------------------------------

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
        before._conductor.post(_replace)

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
            self._replaced(node, before, _REPLACED_SECONDS if must_go else _TOLERATED_SECONDS)
        except TimeoutError:
            if must_go:
                raise

    def _replaced(self, node: str, before: Collection[int], seconds: float = _REPLACED_SECONDS) -> None:
        """Raises TimeoutError."""
        self._wait(lambda: not before & set(self.processes(node)), f"{node} has another process", seconds)

    def _wait(self, condition: Callable[[], Any], what: str, seconds: float = _REPLACED_SECONDS) -> None:
        """Raises TimeoutError."""
        deadline = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > deadline:
                raise TimeoutError(f"not within {seconds:g} s: {what}")
            self._sleep(_LOOK_SECONDS)

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


def _replace() -> None:
    """On the conductor's thread."""
    raise _Replaced


def flip(piece: Path, chance: random.Random) -> None:
    """One bit of the values of a piece of a checkpoint."""
    content = bytearray(piece.read_bytes())
    content[len(content) - 1 - chance.randrange(len(content) // 2)] ^= 1
    piece.write_bytes(content)
