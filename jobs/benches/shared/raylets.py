"""A Ray cluster of real raylets, each in a network namespace of its own, like hosts on a switch; and what happens to hosts.

A host can be killed (SIGKILL of all its processes at once), frozen (SIGSTOP) and thawed, cut off (link down, nobody is told) and
restored, and started again at its address. Node 0 is the head: it offers no ranks, and the cluster ends with it, unless what it
knows is kept in a Redis. Needs root and Linux.
A watcher process ends everything when whoever made the cluster is gone, however that came.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Self

from jobs.benches.shared.networks import Network, pids

_REPOSITORY = Path(__file__).parents[3]
_BIN = Path(sys.executable).parent
_PORT = 6379
_START_SECONDS = 120.0
_END_SECONDS = 20.0
_STARTED = b"Ray runtime started."  # what `ray start` says once its raylet is registered
_PAUSE_SECONDS = 0.02
_KEPT = {"RAY_gcs_rpc_server_reconnect_timeout_s": "300"}  # of every process: it ends if the control store is away for longer

QUICK_CHECKS = {"initial_delay_ms": 0, "period_ms": 200, "timeout_ms": 300, "failure_threshold": 3}
"""Ray's own health checks, set so that it notices a lost node within about two seconds. Without them: up to a minute."""


class ClusterFailed(RuntimeError):
    """A raylet did not come up, or something did not end. `str()` ends with the last lines of its log, if there are any."""


class RayletCluster:
    """A head and `raylets` nodes of `ranks` `rank` resources each; a context manager.

    megabits: of every link, each way. health_checks: health_check_* settings of Ray; empty: its defaults.
    environment: more variables for all processes. redis: the control store keeps what it knows in a Redis, on a host of its own:
    the head can be killed and added again like any other node, and the others wait for it for some minutes.
    `address`: of the head, as ray.init takes it in a process that `start` began.
    `started_seconds`: how long it took to come up, all raylets at once.
    Raises NetworkRefused, ClusterFailed.
    """

    def __init__(self, raylets: int, ranks: int, megabits: float = 1000.0, health_checks: Mapping[str, int] = QUICK_CHECKS,
                 environment: Mapping[str, str] | None = None, redis: bool = False):
        self.ranks, self._processes, self._starts, self._of_head = ranks, {}, 0, {}
        self._crashes: dict[int, Path] = {}  # where a raylet writes, if it crashes
        self.folder = tempfile.mkdtemp(prefix="dr", dir="/tmp")  # short: paths of sockets may have 107 bytes
        self._environment = os.environ | {
            "RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0", "RAY_TMPDIR": self.folder, "OMP_NUM_THREADS": "1",
            "RAY_memory_monitor_refresh_ms": "0",  # every raylet would take the machine's memory for its own, and kill for all
            "RAY_raylet_start_wait_time_s": "60", "RES_OPTIONS": "timeout:1 attempts:1", "PYTHONDONTWRITEBYTECODE": "1",
            "PATH": f"{_BIN}:{os.environ['PATH']}",
            **{f"RAY_health_check_{name}": str(value) for name, value in health_checks.items()}, **(environment or {})}
        self._environment.pop("RAY_ADDRESS", None)
        try:
            self.network = Network(raylets + 1 + redis, megabits)
        except BaseException:
            shutil.rmtree(self.folder, ignore_errors=True)
            raise
        self.nodes = tuple(range(1, raylets + 1))
        self.addresses = tuple(self.network.interface(node).address for node in range(raylets + 1))
        self.address = f"{self.addresses[0]}:{_PORT}"
        self._watcher = subprocess.Popen([sys.executable, "-m", "jobs.benches.shared.raylets", self.folder, *self.network.namespaces],
                                         cwd=_REPOSITORY, stdin=subprocess.PIPE, start_new_session=True)
        try:
            began = time.monotonic()
            if redis:
                self._start_redis(raylets + 1)
            self._launch(0)
            if not _eventually(lambda: _listening(self.addresses[0]), _START_SECONDS):
                raise ClusterFailed(f"the head is not up within {_START_SECONDS:g} s\n{self._log(0).read_text()[-2000:]}")
            self.add(*self.nodes)  # they wait for what they still need of the head
            self._await([0])
            self.started_seconds = time.monotonic() - began
        except BaseException:
            self.close()
            raise

    def start(self, *arguments: str, node: int = 0, **options) -> subprocess.Popen:
        """`python *arguments` on a node, as a driver of this cluster; `options` are Popen's.

        Ray connects it to the head's raylet, which it finds on this machine; but with a Redis to that of its node.
        """
        environment = self._environment | {"RAY_ADDRESS": self.address}
        alone = self._without_other_raylets(node) if self._of_head else []
        return subprocess.Popen([*self._inside(node), *alone, sys.executable, *arguments], env=environment, start_new_session=True,
                                **{"cwd": _REPOSITORY, **options})

    def add(self, *nodes: int) -> None:
        """Start raylets on nodes that have none (any more), all at once, and wait until they are registered.

        Raises ClusterFailed.
        """
        for node in nodes:
            self._launch(node)
        self._await(nodes)

    def pids(self, node: int) -> list[int]:
        """All processes on a node: its raylet, that one's helpers and workers, whatever `start` began there."""
        return pids(self.network.namespaces[node])

    def up(self, node: int) -> bool:
        """Whether its raylet runs, or is frozen."""
        return node in self._processes and self._processes[node].poll() is None

    def kill(self, node: int) -> None:
        """All processes of a node, at once; returns when they are gone. `add` starts it again."""
        _kill(lambda: self.pids(node))
        if node in self._processes:
            self._processes.pop(node).wait(_END_SECONDS)

    def freeze(self, node: int) -> None:
        _signal_all(lambda: self.pids(node), signal.SIGSTOP)

    def thaw(self, node: int) -> None:
        _signal_all(lambda: self.pids(node), signal.SIGCONT)

    def cut(self, node: int) -> None:
        """Nothing passes to and from it any more, and nobody is told."""
        self.network.cut(self.network.interface(node))

    def restore(self, node: int) -> None:
        self.network.restore(self.network.interface(node))

    def close(self) -> None:
        """End all, remove all."""
        for node in range(len(self.network.namespaces)):
            self.kill(node)
        self.network.close()
        self._watcher.stdin.close()  # it finds nothing left to do but the folder
        self._watcher.wait(_END_SECONDS)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _inside(self, node: int) -> list[str]:
        return ["ip", "netns", "exec", self.network.namespaces[node]]

    def _without_other_raylets(self, node: int) -> list[str]:
        """What is put before a command, which then does not see them among the processes of this machine."""
        others = [pid for other in self._processes if other != node for pid in self.pids(other)]
        hide = f"for pid in $0; do mount --bind {self.folder}/nothing /proc/$pid; done 2>/dev/null; exec \"$@\""
        return ["unshare", "--mount", "sh", "-c", hide, " ".join(map(str, others))]

    def _launch(self, node: int) -> None:
        self._starts += 1
        temporary = Path(self.folder, str(self._starts))  # a new one each time: raylets that start together race for names in it
        temporary.mkdir()
        role = (["--head", f"--port={_PORT}", "--include-dashboard=false"] if node == 0 else [f"--address={self.address}"])
        resources = {"rank": self.ranks} if node else {}
        environment = self._environment if node else self._environment | self._of_head
        command = [*self._inside(node), str(_BIN / "ray"), "start", "--block", *role, f"--node-ip-address={self.addresses[node]}",
                   "--num-cpus=1", f"--resources={json.dumps(resources)}", "--object-store-memory=80000000",
                   "--include-log-monitor=false", f"--temp-dir={temporary}"]
        self._crashes[node] = temporary / "session_latest" / "logs" / "raylet.err"
        with open(self._log(node), "wb") as log:
            self._processes[node] = subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, stdout=log,
                                                     stderr=subprocess.STDOUT, start_new_session=True)

    def _start_redis(self, place: int) -> None:
        """In a namespace that is no node's. Raises ClusterFailed."""
        address, log = self.network.interface(place).address, Path(self.folder, "redis.log")
        command = [*self._inside(place), "redis-server", "--bind", address, "--port", str(_PORT), "--protected-mode", "no", "--save", "",
                   "--dir", self.folder]
        if shutil.which("redis-server") is None:
            raise ClusterFailed("there is no command redis-server (Debian: redis-server)")
        with open(log, "wb") as output:
            self._processes[place] = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT,
                                                      start_new_session=True)
        if not _eventually(lambda: _listening(address), _START_SECONDS):
            raise ClusterFailed(f"Redis is not up within {_START_SECONDS:g} s\n{log.read_text()[-2000:]}")
        Path(self.folder, "nothing").mkdir()
        self._environment |= _KEPT
        self._of_head = {"RAY_REDIS_ADDRESS": f"{address}:{_PORT}", "RAY_external_storage_namespace": "raylets"}

    def _log(self, node: int) -> Path:
        return Path(self.folder, f"node{node}.log")

    def _await(self, nodes: Sequence[int]) -> None:
        """A raylet crashes where its agents are not up within 15 s, as on a busy machine; it is started again, once.

        Raises ClusterFailed.
        """
        again = set() if self._of_head else {0}  # without a Redis nobody knows a head again

        def up(node: int) -> bool:
            if node not in again and self._crashes[node].is_file() and self._crashes[node].stat().st_size:
                again.add(node)
                self.kill(node)
                self._launch(node)
                return False
            if self._processes[node].poll() is not None:
                raise ClusterFailed(f"node {node} ended while it started\n{self._log(node).read_text()[-2000:]}")
            return _STARTED in self._log(node).read_bytes()

        if not _eventually(lambda: all(map(up, nodes)), _START_SECONDS):
            raise ClusterFailed(f"not up within {_START_SECONDS:g} s\n" + "\n".join(
                self._log(node).read_text()[-1000:] for node in nodes if not up(node)))


def _listening(address: str) -> bool:
    try:
        with socket.create_connection((address, _PORT), timeout=1.0):
            return True
    except OSError:
        return False


# --- what happens to processes ---------------------------------------------------------------------------------------

def kill_tree(pid: int) -> None:
    """SIGKILL of a process and all that descend from it. Children of ours must still be waited for."""
    found = freeze_tree(pid)  # none of them can start another while we go through them
    for one in found:
        _signal(one, signal.SIGKILL)


def freeze_tree(pid: int) -> list[int]:
    """SIGSTOP, until nothing is left in the tree that runs. The processes."""
    return _signal_all(lambda: tree(pid), signal.SIGSTOP)


def thaw_tree(pid: int) -> list[int]:
    return _signal_all(lambda: tree(pid), signal.SIGCONT)


def tree(pid: int) -> list[int]:
    """A process and all that descend from it, parents first; empty: it is gone."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and (status := _status(int(entry.name))) is not None:
            children.setdefault(status[1], []).append(int(entry.name))
    found = [pid] if _status(pid) is not None else []
    for one in found:
        found += children.get(one, ())
    return found


def _status(pid: int) -> tuple[str, int] | None:
    """State and parent of a process (proc(5), stat); None: gone, or a zombie."""
    try:
        state, parent = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[:2]
    except OSError:
        return None
    return None if state in "ZX" else (state, int(parent))


def _signal(pid: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def _signal_all(found: Callable[[], Iterable[int]], number: signal.Signals) -> list[int]:
    """Also those that were started while we went through them."""
    done: list[int] = []
    while new := [pid for pid in found() if pid not in done]:
        for pid in new:
            _signal(pid, number)
        done += new
    return done


def _kill(found: Callable[[], Iterable[int]]) -> None:
    """Raises ClusterFailed: some will not end."""
    for pid in _signal_all(found, signal.SIGSTOP):
        _signal(pid, signal.SIGKILL)
    if not _eventually(lambda: not any(_status(pid) for pid in found()), _END_SECONDS):
        raise ClusterFailed(f"processes {list(found())} do not end")


def _eventually(condition: Callable[[], bool], seconds: float) -> bool:
    """Wait for outside processes."""
    deadline, pause = time.monotonic() + seconds, threading.Event()
    while not (found := condition()) and time.monotonic() < deadline:
        pause.wait(_PAUSE_SECONDS)
    return found


def _watch(folder: str, namespaces: Sequence[str]) -> None:
    """When standard input ends: end what is in the namespaces, remove the folder. The namespaces are removed by whoever made
    them, or by the next network that is made."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    sys.stdin.buffer.read()
    for namespace in namespaces:
        _kill(lambda namespace=namespace: pids(namespace))
    shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    _watch(sys.argv[1], sys.argv[2:])
