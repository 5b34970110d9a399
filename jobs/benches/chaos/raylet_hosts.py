"""A cluster of real raylets in network namespaces: its nodes by name, and what stops, cuts off, ends or replaces them."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

from jobs.benches.chaos.raylet_commands import SECONDS, command_line
from jobs.benches.shared.networks import NetworkRefused
from jobs.benches.shared.raylets import ClusterFailed, RayletCluster

NODES = 4
HEALTH_CHECKS = {"initial_delay_ms": 1000, "period_ms": 1000, "timeout_ms": 2000, "failure_threshold": 5}
"""Of Ray, to which a node that stands still for two seconds, or a cluster for three, must not be lost."""
PATIENCE = {"RAY_NUM_REDIS_GET_RETRIES": "60", "RAY_raylet_start_wait_time_s": "120"}
"""Of Ray where a raylet starts: how often it looks for the head, every two seconds, and how long for itself."""

RANK, COORDINATOR = b"ray::StageActor", b"ray::Coordinator"
_WRONG = "02:44:52:00:00:fd"  # nobody's hardware address: what is sent there is gone
_MOST_STARTS = 3  # of a raylet: two that start at once may take each other's folder


def cluster_of() -> RayletCluster:
    """A machine that is busy with other things may need more than one attempt."""
    for left in reversed(range(_MOST_STARTS)):
        try:
            return RayletCluster(NODES, 1, health_checks=HEALTH_CHECKS, environment=PATIENCE)
        except ClusterFailed:
            if not left:
                raise
    raise AssertionError


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
                signal_all(new, signal.SIGSTOP)
                done |= new
            yield
        finally:
            with self._lock:
                self._holds.remove(found)
                held = {pid for other in self._holds for pid in other()}
                signal_all([pid for pid in found() if pid not in held], signal.SIGCONT)

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


def signal_all(pids: Iterable[int], number: signal.Signals) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)
