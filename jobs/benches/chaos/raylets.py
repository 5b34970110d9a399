"""A company of real raylets: `jobs.train` on a Ray cluster in network namespaces, and what befalls its hosts and processes.

Of a strike the first part is done at once, the rest on a thread of its own. What was stopped, cut or taken away is given back
however the strike ends, also when the company is closed in the middle of it. Strikes overlap: each copes with processes that are
gone already.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sysconfig
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import yaml

from jobs.benches.chaos.company import CONFIG, LENGTH, Company, Ended, Kind, Strike
from jobs.benches.chaos.verdict import READ
from jobs.benches.shared.held_thread import HeldThread, cpu_seconds
from jobs.benches.shared.networks import NetworkRefused
from jobs.benches.shared.raylets import ClusterFailed, RayletCluster
from orchestrator.data.ledger import committed_by
from orchestrator.told.kinds import GenerationFormed, GenerationLoaded, RanksLost
from orchestrator.told.lines import Told, from_json

NODES = 4
SECONDS = 180.0
"""Bound on what a busy machine takes to start a run, to end it, or to start a raylet."""
STANDSTILL_SECONDS = 600.0
"""Without a new line in the ledger: the run does not go on, whatever befalls it."""
HEALTH_CHECKS = {"initial_delay_ms": 1000, "period_ms": 1000, "timeout_ms": 2000, "failure_threshold": 5}
"""Of Ray, to which a node that stands still for two seconds, or a cluster for three, must not be lost."""
PATIENCE = {"RAY_NUM_REDIS_GET_RETRIES": "60", "RAY_raylet_start_wait_time_s": "120"}
"""Of Ray where a raylet starts: how often it looks for the head, every two seconds, and how long for itself."""
RETURNED = "raylet ended"
"""Kind of a strike that nobody asked for: Ray gave a node up, whose raylet ends then, and it is started again."""

_LOOK_SECONDS = 0.1
_MADE_SECONDS = 15.0
_WRONG = "02:44:52:00:00:fd"  # nobody's hardware address: what is sent there is gone
_RANK, _COORDINATOR = b"ray::StageActor", b"ray::Coordinator"
_STOPPED = 130  # exit code of a run that was asked to end
_MOST_STARTS = 3  # of a raylet: two that start at once may take each other's folder

Doing = Iterator[float]
"""What a strike does, one part after each wait; it gives the seconds to wait."""

KINDS = {
    "rank killed": Kind(1, 1), "node killed": Kind(1, 1), "node killed twice": Kind(1, 1), "node flaps": Kind(1, 1),
    "node cut off": Kind(1, 1), "node cut briefly": Kind(1, 0), "node frozen": Kind(1, 1), "node stalled": Kind(1, 0),
    "everybody stalled": Kind(0, 0), "drain": Kind(1, 1), "link cut": Kind(2, 1), "link cut one way": Kind(2, 1),
    "coordinator killed": Kind(0, 0), "coordinator frozen": Kind(0, 0), "driver killed": Kind(0, 0), "driver frozen": Kind(0, 0),
    "driver and coordinator killed": Kind(0, 0), "stopped and started": Kind(0, 0), "checkpoint damaged": Kind(0, 0),
    "more than copies": Kind(3, 3),
    "rank hangs": Kind(1, 1),
}
"""Each is a method of this name. A drain cannot be called off: Ray has no word for it."""
_OF_A_DRIVER = ("driver and coordinator killed", "driver frozen", "stopped and started")


@contextmanager
def raylets(folder: Path) -> Iterator[Callable[[str], Company]]:
    """A cluster of NODES nodes of one rank, and a head. What begins a run on it, of a name, and returns when it
    trains; one at a time."""
    with cluster_of() as cluster:
        hosts, data = Hosts(cluster), tokens(cluster, folder)
        yield lambda name: RayletCompany(hosts, folder, data, name)


def cluster_of() -> RayletCluster:
    """A machine that is busy with other things may need more than one attempt."""
    for left in reversed(range(_MOST_STARTS)):
        try:
            return RayletCluster(NODES, 1, health_checks=HEALTH_CHECKS, environment=PATIENCE)
        except ClusterFailed:
            if not left:
                raise
    raise AssertionError


# --- commands on the head --------------------------------------------------------------------------------------------

def tokens(cluster: RayletCluster, folder: Path) -> str:
    """The data of all runs: a few files of the standard library."""
    inputs = sorted(str(path) for path in Path(sysconfig.get_path("stdlib")).glob("c*.py"))
    finished(cluster, folder, "tokenize", "jobs.tokenize", "--input", *inputs, "--tokenizer", "byte",
             "--output", f"{folder}/tokens", "--set", f"data.sequence_length={LENGTH}", "--set", "data.validation_fraction=0.2")
    return f"{folder}/tokens"


def finished(cluster: RayletCluster, folder: Path, name: str, *arguments: str, seconds: float = SECONDS) -> str:
    """`python -m *arguments` on the head, to its end: what it said. Raises ClusterFailed: that is no good one."""
    with open(folder / f"{name}.log", "w") as log:
        process = cluster.start("-m", *arguments, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT)
        try:
            code = process.wait(seconds)
        finally:
            process.kill()
            process.wait()
    told = (folder / f"{name}.log").read_text()
    if code:
        raise ClusterFailed(f"{' '.join(arguments[:2])}: exit code {code}\n{told[-4000:]}")
    return told


def command_of(folder: Path, data: str, name: str, **sections: Mapping[str, Any]) -> list[str]:
    """Writes the configuration of a run; arguments of `python -m`."""
    tree = {key: {**CONFIG.get(key, {}), **sections.get(key, {})} for key in {*CONFIG, *sections}}
    tree["run"] = {"name": name, "directory": str(folder / "runs"), **sections.get("run", {})}
    tree["data"] = {"sequence_length": LENGTH, "path": data}
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(tree))
    return ["jobs.train", "--config", str(path)]


def drained(address: str, name: str, deadline: float) -> None:
    """What `ray drain-node` says to Ray's control store, of a node by its identity, and from wherever one can reach it. deadline:
    seconds since the epoch. Raises ClusterFailed: it refuses; RayError: it does not answer."""
    from ray._raylet import GcsClient
    from ray.core.generated import autoscaler_pb2

    reason = autoscaler_pb2.DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")
    accepted, why = GcsClient(address=address).drain_node(name, reason, "spot", int(1000 * deadline))
    if not accepted:
        raise ClusterFailed(f"{name} is not drained: {why}")


def command_line(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def lines(path: Path) -> list[dict]:
    """Of a journal that grows: whole ones."""
    return [json.loads(line) for line in path.read_text().split("\n")[:-1]] if path.exists() else []


class Journal:
    """What was appended to a file of lines since one last looked."""

    def __init__(self, path: Path):
        self._path, self._at = path, 0

    def news(self) -> list[str]:
        if not self._path.exists():
            return []
        with open(self._path, "rb") as file:
            file.seek(self._at)
            whole, end, _ = file.read().rpartition(b"\n")
        self._at += len(whole) + len(end)
        return whole.decode().split("\n") if end else []


# --- hosts -----------------------------------------------------------------------------------------------------------

class Hosts:
    """The nodes of a cluster by the names that Ray has for them, which are new with each raylet; and what is stopped there."""

    def __init__(self, cluster: RayletCluster):
        self.cluster = cluster
        self._names = {node: self._named(node) for node in cluster.nodes}
        self._lock, self._holds = threading.Lock(), []

    def heal(self) -> None:
        """A raylet on every node."""
        self.replace(*(node for node in self.cluster.nodes if not self.cluster.up(node)))

    def name(self, node: int) -> str:
        """Of its raylet, or of the last one that it had."""
        return self._names[node]

    def node(self, name: str) -> int | None:
        """Where the raylet of that name is; None: it has been replaced."""
        return next((node for node, found in self._names.items() if found == name), None)

    def kill(self, *nodes: int) -> None:
        """All that runs there, at once."""
        for node in nodes if len(nodes) > 1 else ():
            self.cluster.freeze(node)
        for node in nodes:
            self.cluster.kill(node)

    def replace(self, *nodes: int) -> tuple[str, ...]:
        """Other raylets there, whatever has become of those before: their names. Raises ClusterFailed."""
        for left in reversed(range(_MOST_STARTS)):
            try:
                for node in nodes:
                    self.cluster.kill(node)
                self.cluster.add(*nodes)
                self._names |= {node: self._named(node) for node in nodes}
                break
            except (ClusterFailed, FileExistsError):
                if not left:
                    raise
        return tuple(self._names[node] for node in nodes)

    def _named(self, node: int) -> str:
        name = next(filter(None, map(_node_id, self.cluster.pids(node))), None)
        if name is None:
            raise ClusterFailed(f"node {node} has no raylet")
        return name

    def running(self, kind: bytes, *nodes: int) -> list[int]:
        """Processes of actors of a kind."""
        return [pid for node in nodes for pid in self.cluster.pids(node) if command_line(pid).startswith(kind)]

    @contextmanager
    def stopped(self, found: Callable[[], Iterable[int]]) -> Iterator[None]:
        """SIGSTOP to these processes, SIGCONT at the end; but those that another strike holds stay as they are."""
        with self._lock:
            self._holds.append(found)
        try:
            done: set[int] = set()
            while new := set(found()) - done:  # also those that were started meanwhile
                _signal(new, signal.SIGSTOP)
                done |= new
            yield
        finally:
            with self._lock:
                self._holds.remove(found)
                held = {pid for other in self._holds for pid in other()}
                _signal([pid for pid in found() if pid not in held], signal.SIGCONT)

    @contextmanager
    def cut(self, node: int) -> Iterator[None]:
        self.cluster.cut(node)
        try:
            yield
        finally:
            self.cluster.restore(node)

    @contextmanager
    def deaf(self, node: int, other: int) -> Iterator[None]:
        """What a node sends to another one vanishes, and nobody is told."""
        here, there = (self.cluster.network.interface(one) for one in (node, other))

        def set_address(hardware: str) -> None:
            command = ["ip", "-n", here.namespace, "neigh", "replace", there.address, "lladdr", hardware, "dev", here.device,
                       "nud", "permanent"]
            done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=False)
            if done.returncode:
                raise NetworkRefused(done.stderr.strip())
        set_address(_WRONG)
        try:
            yield
        finally:
            set_address(there.hardware_address)


def _node_id(pid: int) -> str | None:
    """Of the node whose raylet this is."""
    program, *arguments = command_line(pid).decode(errors="replace").split("\0")
    found = [word.partition("=")[2] for word in arguments if word.startswith("--node_id=")]
    return found[0] if found and program.endswith("/raylet") else None


def _signal(pids: Iterable[int], number: signal.Signals) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


# --- the company -----------------------------------------------------------------------------------------------------

class RayletCompany:
    """As Company says. command: arguments of `python -m` that began it. log: of the present driver."""

    def __init__(self, hosts: Hosts, folder: Path, data: str, name: str):
        self.folder, self.strikes = folder / "runs" / name, []
        self.hosts, self.cluster, self.command = hosts, hosts.cluster, command_of(folder, data, name)
        self._logs, self._name = folder, name
        self._ledger, self._told = Journal(self.folder / "ledger.jsonl"), Journal(self.folder / "events.jsonl")
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
    def kinds(self) -> Mapping[str, Kind]:
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
        return self.hosts.running(_RANK, place) if place is not None else ()

    def left(self) -> list[int]:
        """Processes of ranks and coordinators, wherever they are."""
        return [pid for kind in (_RANK, _COORDINATOR) for pid in self.hosts.running(kind, 0, *self.cluster.nodes)]

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
        """Raises Ended. A raylet that nobody ended is started again."""
        if self._failed:
            raise Ended(self._failed[0])
        with self._lock:
            code = self._driver.poll() if self._driver and not self._without else None
        if code is not None:
            raise Ended(f"the driver ended, exit code {code}: {self._last_words()}")
        path = self.folder / "ledger.jsonl"
        if time.time() - max(path.stat().st_mtime if path.exists() else 0.0, self._began) > STANDSTILL_SECONDS:
            raise Ended(f"no step committed for {STANDSTILL_SECONDS:g} s: {self._last_words()}")
        for node in self._free():
            if not self.cluster.up(node) and not self._closing.is_set():
                self._do(Strike(RETURNED, 1, time.time(), (self.hosts.name(node),)), (node,), self._given_up)

    def _last_words(self) -> str:
        return self.log.read_text(errors="replace")[-4000:]

    def _await(self, condition: Callable[[], object], what: str, seconds: float = SECONDS) -> None:
        """Raises Ended."""
        deadline = time.monotonic() + seconds
        while not condition():
            self._check()
            if time.monotonic() > deadline:
                raise Ended(f"not within {seconds:g} s: {what}: {self._last_words()}")
            time.sleep(_LOOK_SECONDS)

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

    def _return(self, strike: Strike, *nodes: int) -> None:
        strike.nodes += self.hosts.replace(*nodes)

    def _given_up(self, strike: Strike, node: int) -> Doing:
        yield 0.0
        self._return(strike, node)

    def _rank_killed(self, chance: random.Random, strike: Strike, node: int) -> Doing:
        _signal(self.hosts.running(_RANK, node), signal.SIGKILL)
        yield from ()

    def _rank_hangs(self, chance: random.Random, strike: Strike, node: int) -> Doing:
        """Whichever thread of it computes most stands still until the process is ended; the others go on, and beat."""
        seconds = chance.uniform(30.0, 60.0)
        yield 0.0  # to the thread that has to do all of this
        for pid in self.hosts.running(_RANK, node):
            before = cpu_seconds(pid)
            yield 1.0
            used = {thread: found - before.get(thread, found) for thread, found in cpu_seconds(pid).items()}
            with contextlib.suppress(ProcessLookupError, FileNotFoundError, ValueError):  # it is gone already
                with HeldThread(pid, max(used, key=used.__getitem__)) as held:
                    while not held.hold() and not held.ended:
                        yield 0.005
                    until = time.monotonic() + seconds
                    while not held.look() and time.monotonic() < until:
                        yield _LOOK_SECONDS

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
        _signal(self.hosts.running(_COORDINATOR, 0), signal.SIGKILL)
        yield from ()

    def _coordinator_frozen(self, chance: random.Random, strike: Strike) -> Doing:
        pids = self.hosts.running(_COORDINATOR, 0)
        with self.hosts.stopped(lambda: [pid for pid in pids if command_line(pid).startswith(_COORDINATOR)]):
            yield chance.uniform(6.0, 40.0)

    def _driver_killed(self, chance: random.Random, strike: Strike) -> Doing:
        with self._driver_away(signal.SIGKILL):
            yield chance.uniform(0.0, 10.0)

    def _driver_and_coordinator_killed(self, chance: random.Random, strike: Strike) -> Doing:
        with self._driver_away(signal.SIGKILL):
            _signal(self.hosts.running(_COORDINATOR, 0), signal.SIGKILL)
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
                    raise Ended(f"not within {SECONDS:g} s: a stop: {self._last_words()}")
                yield _LOOK_SECONDS
            if code not in (_STOPPED, -signal.SIGKILL):  # unless it was killed meanwhile
                raise Ended(f"exit code {code} of a stop: {self._last_words()}")
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
        """Raises Ended also where processes of it are left."""
        self._check()
        driver = self._driver
        driver.send_signal(signal.SIGINT)
        try:
            code = driver.wait(SECONDS)
        except subprocess.TimeoutExpired:
            raise Ended(f"not within {SECONDS:g} s: a stop: {self._last_words()}") from None
        if code != _STOPPED:
            raise Ended(f"exit code {code} of a stop: {self._last_words()}")
        deadline = time.monotonic() + SECONDS
        while left := self.left():
            if time.monotonic() > deadline:
                raise Ended(f"processes {left} are left after a stop")
            time.sleep(_LOOK_SECONDS)

    def _end_actors(self) -> None:
        """Also those that are only being made, for a driver that has gone."""
        quiet = time.monotonic() + _MADE_SECONDS
        while time.monotonic() < quiet:
            if left := self.left():
                _signal(left, signal.SIGKILL)
                quiet = time.monotonic() + _MADE_SECONDS
            time.sleep(_LOOK_SECONDS)

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
