"""A company of real raylets: `jobs.train` on a Ray cluster in network namespaces, while things befall its hosts and processes.

Of a strike the first part is done at once, the rest on a thread of its own (`raylet_strikes` has the strikes).
"""

from __future__ import annotations

import contextlib
import json
import random
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from jobs.benches.chaos.company import Company, FaultKind, RunEnded, Strike
from jobs.benches.chaos.raylet_commands import SECONDS, AppendedLines, command_of, tokens
from jobs.benches.chaos.raylet_hosts import COORDINATOR, NODES, RANK, Hosts, cluster_of, signal_all
from jobs.benches.chaos.raylet_strikes import KINDS, LOOK_SECONDS, STOPPED, Doing, RayletStrikes
from jobs.benches.chaos.verdict import READ
from orchestrator.data.ledger import committed_by
from orchestrator.told.kinds import GenerationFormed, GenerationLoaded, RanksLost
from orchestrator.told.lines import Told, from_json

STANDSTILL_SECONDS = 600.0
"""Without a new line in the ledger: the run does not go on, whatever befalls it."""
RETURNED = "raylet ended"
"""Kind of a strike that nobody asked for: Ray gave a node up, whose raylet ends then, and it is started again."""

_MADE_SECONDS = 15.0
_OF_A_DRIVER = ("driver and coordinator killed", "driver frozen", "stopped and started")


@contextmanager
def raylets(folder: Path) -> Iterator[Callable[[str], Company]]:
    """A cluster of NODES nodes of one rank, and a head. What begins a run on it, of a name, and returns when it
    trains; one at a time."""
    with cluster_of() as cluster:
        hosts, data = Hosts(cluster), tokens(cluster, folder)
        yield lambda name: RayletCompany(hosts, folder, data, name)


class RayletCompany(RayletStrikes):
    """As Company says. command: arguments of `python -m` that began it. log: of the present driver."""

    def __init__(self, hosts: Hosts, folder: Path, data: str, name: str):
        self.folder, self.strikes = folder / "runs" / name, []
        self.hosts, self.cluster, self.command = hosts, hosts.cluster, command_of(folder, data, name)
        self._logs, self._name = folder, name
        self._ledger, self._told = AppendedLines(self.folder / "ledger.jsonl"), AppendedLines(self.folder / "events.jsonl")
        self._events: list[Told] = []
        self._seated, self._generation = frozenset[str](), 0
        self._damaged: set[Path] = set()
        self._only_saved = -1
        self._closing, self._threads, self._failed = threading.Event(), [], []
        self._struck: list[tuple[Strike, tuple[int, ...]]] = []
        self._lock, self._starts, self._without, self._driver = threading.RLock(), 0, 0, None
        self._began = time.time()
        try:
            hosts.heal()
            self._start()
            self._await(lambda: self.steps >= 3, "three steps", 2 * SECONDS)
        except BaseException:
            self.close()
            raise

    # --- what is seen of it --------------------------------------------------------------------------------------

    @property
    def log(self) -> Path:
        return self._logs / f"{self._name}.{self._starts}.log"

    @property
    def steps(self) -> int:
        """Committed."""
        path = self.folder / "ledger.jsonl"
        return committed_by(path.read_text().split("\n")[:-1]) if path.exists() else 0

    @property
    def events(self) -> list[Told]:
        """Lines of events.jsonl."""
        self._look()
        return self._events

    @property
    def kinds(self) -> Mapping[str, FaultKind]:
        """What can befall it now: a driver that does not show steps yet can only be killed."""
        shows = not self._without and b"\nstep " in self.log.read_bytes()
        return KINDS if shows else {kind: needs for kind, needs in KINDS.items() if kind not in _OF_A_DRIVER}

    def nodes(self) -> list[str]:
        self._check()
        self._look()
        return [self.hosts.name(node) for node in self._free() if self.hosts.name(node) in self._seated]

    def whole(self) -> bool:
        """Also: the driver of the moment shows steps, and one was committed after the last strike."""
        self._check()
        self._look()
        if any(strike.ended is None for strike in self.strikes) or any(thread.is_alive() for thread in self._threads):
            return False
        ended = max((strike.ended for strike in self.strikes), default=0.0)
        generations = READ.of(self._events, GenerationFormed, GenerationLoaded)
        return (bool(generations) and generations[-1].event.nodes == NODES and b"\nstep " in self.log.read_bytes()
                and self._seated == {self.hosts.name(node) for node in self.cluster.nodes}
                and (self.folder / "metrics.jsonl").stat().st_mtime > ended)

    def processes(self, node: str) -> Collection[int]:
        place = self.hosts.node(node)
        return self.hosts.running(RANK, place) if place is not None else ()

    def left(self) -> list[int]:
        """Processes of ranks and coordinators, wherever they are."""
        return [pid for kind in (RANK, COORDINATOR) for pid in self.hosts.running(kind, 0, *self.cluster.nodes)]

    def _look(self) -> None:
        """Who is seated is in the ledger with a generation's first step; who was lost since, in the events."""
        for text in self._ledger.news():
            if '"layout"' in text and (layout := (values := json.loads(text)).get("layout")):
                self._seated, self._generation = frozenset(layout["nodes"]), values["generation"]
        news = [from_json(json.loads(text)) for text in self._told.news()]
        self._events += news
        for told in READ.of(news, RanksLost):
            if told.event.generation >= self._generation:
                self._seated -= {member.partition("/")[0] for member in told.event.members}

    def _free(self) -> list[int]:
        """Nodes that nothing befalls."""
        taken = {node for strike, nodes in self._struck if strike.ended is None for node in nodes}
        return [node for node in self.cluster.nodes if node not in taken]

    def _check(self) -> None:
        """Raises RunEnded. A raylet that nobody ended is started again."""
        if self._failed:
            raise RunEnded(self._failed[0])
        with self._lock:
            code = self._driver.poll() if self._driver and not self._without else None
        if code is not None:
            raise RunEnded(f"the driver ended, exit code {code}: {self._last_words()}")
        path = self.folder / "ledger.jsonl"
        if time.time() - max(path.stat().st_mtime if path.exists() else 0.0, self._began) > STANDSTILL_SECONDS:
            raise RunEnded(f"no step committed for {STANDSTILL_SECONDS:g} s: {self._last_words()}")
        for node in self._free():
            if not self.cluster.up(node) and not self._closing.is_set():
                self._do(Strike(RETURNED, 1, time.time(), (self.hosts.name(node),)), (node,), self._given_up)

    def _last_words(self) -> str:
        return self.log.read_text(errors="replace")[-4000:]

    def _await(self, condition: Callable[[], object], what: str, seconds: float = SECONDS) -> None:
        """Raises RunEnded."""
        deadline = time.monotonic() + seconds
        while not condition():
            self._check()
            if time.monotonic() > deadline:
                raise RunEnded(f"not within {seconds:g} s: {what}: {self._last_words()}")
            time.sleep(LOOK_SECONDS)

    # --- strikes -------------------------------------------------------------------------------------------------

    def strike(self, kind: str, nodes: Sequence[str], chance: random.Random) -> Strike:
        self._check()
        places = tuple(place for name in nodes if (place := self.hosts.node(name)) is not None)
        if len(nodes) != KINDS[kind].nodes:
            raise ValueError(f"{kind}: {len(nodes)} nodes in place of {KINDS[kind].nodes}")
        if len(places) < len(nodes) or not set(places) <= set(self._free()):  # something has befallen one just now
            now = time.time()
            self.strikes.append(Strike(kind, KINDS[kind].takes, now, tuple(nodes), now))
            return self.strikes[-1]
        doing = getattr(self, "_" + kind.replace(" ", "_"))
        own = random.Random(chance.getrandbits(64))  # its thread's: others draw from `chance` meanwhile
        return self._do(Strike(kind, KINDS[kind].takes, time.time(), tuple(nodes)), places,
                        lambda strike, *places: doing(own, strike, *places))

    def _do(self, strike: Strike, places: tuple[int, ...], doing: Callable[..., Doing]) -> Strike:
        self.strikes.append(strike)
        self._struck.append((strike, places))
        parts = doing(strike, *places)
        seconds = next(parts, None)
        if seconds is None:
            strike.ended = time.time()
            return strike

        def go_on(seconds: float | None) -> None:
            try:
                with contextlib.closing(parts):
                    while seconds is not None and not self._closing.wait(seconds):
                        seconds = next(parts, None)
                if seconds is None:
                    strike.ended = time.time()
            except BaseException as error:  # whoever asks next is told
                self._failed.append(f"{strike.kind}: {type(error).__name__}: {error}")
        self._threads = [thread for thread in self._threads if thread.is_alive()]
        self._threads.append(threading.Thread(target=go_on, args=(seconds,), name=strike.kind, daemon=True))
        self._threads[-1].start()
        return strike

    # --- the driver ----------------------------------------------------------------------------------------------

    def _start(self) -> None:
        self._starts += 1
        with open(self.log, "w") as log:
            self._driver = self.cluster.start("-m", *self.command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT)

    @contextmanager
    def _driver_away(self, number: signal.Signals) -> Iterator[subprocess.Popen]:
        """A signal that ends it; at the end the same command again, by whoever is the last to want it away."""
        with self._lock:
            self._without += 1
            driver = self._driver
            driver.send_signal(number)
            if number == signal.SIGKILL:
                driver.wait()
        try:
            yield driver
        finally:
            with self._lock:
                self._without -= 1
                if not self._without and not self._closing.is_set():
                    self._start()

    def stop(self) -> None:
        """Raises RunEnded also where processes of it are left."""
        self._check()
        driver = self._driver
        driver.send_signal(signal.SIGINT)
        try:
            code = driver.wait(SECONDS)
        except subprocess.TimeoutExpired:
            raise RunEnded(f"not within {SECONDS:g} s: a stop: {self._last_words()}") from None
        if code != STOPPED:
            raise RunEnded(f"exit code {code} of a stop: {self._last_words()}")
        deadline = time.monotonic() + SECONDS
        while left := self.left():
            if time.monotonic() > deadline:
                raise RunEnded(f"processes {left} are left after a stop")
            time.sleep(LOOK_SECONDS)

    def _end_actors(self) -> None:
        """Also those that are only being made, for a driver that has gone."""
        quiet = time.monotonic() + _MADE_SECONDS
        while time.monotonic() < quiet:
            if left := self.left():
                signal_all(left, signal.SIGKILL)
                quiet = time.monotonic() + _MADE_SECONDS
            time.sleep(LOOK_SECONDS)

    def close(self) -> None:
        """Its driver and actors are killed; nodes that something befell lose their raylets, and the next run starts those."""
        self._closing.set()
        for thread in self._threads:
            thread.join(SECONDS)
        with ExitStack() as stack:
            for strike, nodes in self._struck:
                if strike.ended is None:
                    stack.callback(self.hosts.kill, *nodes)
            stack.callback(self._end_actors)
            if self._driver is not None:
                stack.callback(self._driver.wait)
                stack.callback(self._driver.kill)
