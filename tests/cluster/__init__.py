"""A real Ray cluster of the test session's own: head, dashboard, job server; and runs of the product's commands on it."""

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
import urllib.request
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from orchestrator.data.ledger import read

REPOSITORY = Path(__file__).parents[2]
BIN = Path(sys.executable).parent


def eventually(condition: Callable[[], object], seconds: float, what: str) -> object:
    """Wait for an outside process: the first true value of `condition`, which must come within `seconds`."""
    deadline, pause = time.monotonic() + seconds, threading.Event()
    while not (found := condition()):
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {seconds:g} s: {what}")
        pause.wait(0.02)
    return found


def committed(ledger: Path) -> list[dict]:
    """Lines of the steps of a ledger that may be growing."""
    return list(map(dict, read(ledger.read_text().split("\n")[:-1]).steps)) if ledger.exists() else []


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@dataclass
class Cluster:
    address: str
    dashboard: str
    folder: str
    environment: dict[str, str]

    def start(self, *arguments: str, cwd: Path | str = REPOSITORY, **environment: str) -> subprocess.Popen:
        """`python *arguments` connected to this cluster, in a process group of its own."""
        return subprocess.Popen([sys.executable, *arguments], cwd=cwd,
                                env=self.environment | {"RAY_ADDRESS": self.address} | environment,
                                stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)

    def run(self, *arguments: str, timeout: float = 120, **options) -> subprocess.CompletedProcess:
        process = self.start(*arguments, **options)
        try:
            out, err = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            out, err = process.communicate()
            raise AssertionError(f"{arguments} did not end within {timeout:g} s\n{out[-3000:]}\n{err[-3000:]}") from None
        return subprocess.CompletedProcess(arguments, process.returncode, out, err)

    def run_all(self, *commands: Sequence[str]) -> list[subprocess.CompletedProcess]:
        """Commands that have nothing to do with one another, two at a time."""
        with ThreadPoolExecutor(2) as threads:
            return list(threads.map(lambda arguments: self.run(*arguments), commands))

    def add_node(self, resources: dict[str, int]) -> subprocess.Popen:
        """One more raylet."""
        process, = self.add_nodes(resources, [""])
        return process

    def add_nodes(self, resources: dict[str, int], labels: Sequence[str]) -> list[subprocess.Popen]:
        """A raylet for each of `labels` (key=value,..., or none); they end with the cluster. Returns their processes once Ray counts all
        as alive.

        Each has a folder of its own for what jobs bring along, as another host would: the agents of raylets that share one take it
        apart under each other's drivers (working_dir is unpacked with overwrite=True).
        """
        import ray

        def alive() -> set[str]:
            return {node["NodeID"] for node in ray.nodes() if node["Alive"]}

        processes = []
        for of_one in labels:  # one by one: on one host they would take each other's ports
            before = alive()
            processes.append(self._start_node(resources, of_one))
            eventually(lambda before=before: alive() - before, 60, "the new node joins")
        return processes

    def _start_node(self, resources: dict[str, int], labels: str) -> subprocess.Popen:
        return subprocess.Popen(
            ["unshare", "--mount", "sh", "-c", f'mount -t tmpfs tmpfs "{self.folder}/session_latest/runtime_resources" && exec "$@"',
             "sh", str(BIN / "ray"), "start", "--block", f"--address={self.address}", "--num-cpus=1",
             f"--resources={json.dumps(resources)}", *([f"--labels={labels}"] if labels else []),
             "--object-store-memory=80000000"], env=self.environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            start_new_session=True)

    def remove_node(self, process: subprocess.Popen) -> None:
        """End a raylet that `add_node` started: by SIGTERM, which Ray notices at once, and what is left of it by SIGKILL."""
        def left() -> dict[int, bytes]:
            return {pid: command for pid, command in self.processes() if _session(pid) == process.pid}

        raylets = [pid for pid, command in left().items() if b"raylet/raylet" in command]
        for pid in raylets:
            os.kill(pid, signal.SIGTERM)
        eventually(lambda: not set(raylets) & left().keys(), 20, "the raylet ends")
        for pid in left():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.wait(timeout=20)

    def actors(self) -> list[int]:
        """Processes of this cluster that are ranks or coordinators."""
        return [pid for pid, command in self.processes() if command.startswith((b"ray::StageActor", b"ray::Coordinator"))]

    def processes(self) -> list[tuple[int, bytes]]:
        """(pid, command line) of all that this cluster started, directly or not: they inherit its environment."""
        found, mark = [], f"RAY_TMPDIR={self.folder}".encode()
        for entry in Path("/proc").iterdir():
            try:
                if entry.name.isdigit() and mark in (entry / "environ").read_bytes().split(b"\0"):
                    found.append((int(entry.name), (entry / "cmdline").read_bytes()))
            except OSError:
                continue  # it ended while we looked
        return found


def _session(pid: int) -> int | None:
    try:
        return os.getsid(pid)
    except ProcessLookupError:
        return None


def start_cluster() -> tuple[Cluster, Callable[[], None]]:
    """The cluster, and what ends it."""
    folder = tempfile.mkdtemp(prefix="dr", dir="/tmp")
    port, dashboard, agent = free_port(), free_port(), free_port()  # of the agent there is one on a host by default
    environment = os.environ | {
        "RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0", "RAY_TMPDIR": folder, "OMP_NUM_THREADS": "1",
        "RAY_JOB_STOP_WAIT_TIME_S": "60", "RAY_raylet_start_wait_time_s": "60", "PATH": f"{BIN}:{os.environ['PATH']}",
        "PYTHONDONTWRITEBYTECODE": "1"}
    environment.pop("RAY_ADDRESS", None)
    log = open(f"{folder}/head.log", "wb")
    head = subprocess.Popen(
        [str(BIN / "ray"), "start", "--head", "--block", f"--port={port}", "--node-ip-address=127.0.0.1", "--num-cpus=4",
         "--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}", f"--dashboard-agent-listen-port={agent}",
         f"--temp-dir={folder}", "--object-store-memory=150000000"],
        env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)

    cluster = Cluster(f"127.0.0.1:{port}", f"http://127.0.0.1:{dashboard}", folder, environment)

    def stop() -> None:
        for pid, _ in cluster.processes():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        head.wait(timeout=20)
        shutil.rmtree(folder, ignore_errors=True)

    def up() -> bool:
        assert head.poll() is None, Path(f"{folder}/head.log").read_text()
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{dashboard}/api/version", timeout=1):
                return True
        except OSError:
            return False

    try:
        eventually(up, 90, "the cluster's dashboard answers")
    except BaseException:
        stop()
        raise
    return cluster, stop
