"""A company of plain rank processes, each in a network namespace of its own, driven by the product's own trainer in this process.

What a cluster would say of its nodes is said here; everything else befalls the processes, their links, and the disk of the run in
truth. Needs root and Linux, like the namespaces and the disk.
"""

from __future__ import annotations

import contextlib
import functools
import random
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
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
from jobs.benches.chaos import rank as chaos_rank
from jobs.benches.chaos.company import Company, FaultKind, RunEnded, Strike
from jobs.benches.chaos.machine import Disk, Stops, alive
from jobs.benches.chaos.process_strikes import (
    KINDS,
    LOOK_SECONDS,
    NODES,
    REPLACED_SECONDS,
    ProcessStrikes,
    Replaced,
    replace_coordinator,
)
from jobs.benches.chaos.rank import Orders
from jobs.benches.chaos.text import Text, configured, tokens
from jobs.benches.churn.rank import Home
from jobs.benches.shared.networks import Network
from orchestrator.layout.layout import Layout, choose
from orchestrator.protocol.members import Member
from orchestrator.told.lines import Told
from orchestrator.topology import Node

_MEGABITS = 10_000.0
_START_SECONDS, _STOP_SECONDS = 180.0, 120.0


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
        done.wait(REPLACED_SECONDS)
        with self._changed:
            self._to_attach.clear()
            self._post = None
            member_of = {number: member for member, number in self._of_member.items()}
            return tuple(member_of[number] for number in sorted(self._processes))


# --- the company -------------------------------------------------------------------------------------------------------

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


class Processes(ProcessStrikes):
    """A Company. Of what is said of nodes a coordinator that comes later is told as well."""

    def __init__(self, folder: Path, dataset: Dataset, name: str):
        self.kinds: Mapping[str, FaultKind] = KINDS
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
        """Raises RunEnded."""
        self._driving = threading.Thread(target=self._drive, name="run", daemon=True)
        self._driving.start()
        deadline = time.monotonic() + _START_SECONDS
        while self._record.steps < 3:
            self._check()
            if time.monotonic() > deadline:
                raise RunEnded(f"no three steps in {_START_SECONDS:g} s: {self._last_words()}")
            self._over.wait(LOOK_SECONDS)

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
            raise RunEnded(f"it was asked to end, and has not in {_STOP_SECONDS:g} s: {self._last_words()}")
        if self._failed:
            raise RunEnded("; ".join(self._failed))
        self._stopped = True

    def close(self) -> None:
        self._closing.set()
        self._stopping = True
        if not self._over.is_set():
            self._trainer._conductor.post(replace_coordinator)
            self._driving.join(_STOP_SECONDS)
        for thread in self._threads:
            thread.join(REPLACED_SECONDS)
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
                except Replaced:
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
        """Raises RunEnded."""
        if self._failed or self._over.is_set() and not self._stopped:
            raise RunEnded("; ".join(self._failed) or "the run is over")

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
