"""`python -m jobs.train` on a cluster of real raylets, and faults that strike it at random places of a step.

What a fault did is read from the run's own files (`recovery_times.py`); here are the faults, and getting the node back.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from jobs.benches.recovery.times import READ, Incident, incident
from jobs.benches.shared.raylets import RayletCluster
from orchestrator.config.run_config import RunConfig, dump
from orchestrator.data.ledger import read
from orchestrator.told import kinds
from orchestrator.told.consumers import Kind
from orchestrator.told.lines import Told
from orchestrator.told.lines import read as read_events

KILLED, CUT, FROZEN, RANK = "killed", "cut", "frozen", "rank"
KINDS = (KILLED, CUT, FROZEN, RANK)

_FIRST_SECONDS = 300.0
_RECOVERY_SECONDS = 60.0
_RETURN_SECONDS = 180.0
_EXPIRY_SECONDS = 20.0
_LOOK_SECONDS = 0.02
_END_SECONDS = 180.0
_SETTLED_STEPS = 3
Found = TypeVar("Found")


class RunFailed(RuntimeError):
    """The run ended or stood still. `str()` is one line."""


class TrainRun:
    """A run under way on `cluster`, driven from its head. `path`: the run's folder."""

    def __init__(self, cluster: RayletCluster, config: RunConfig, folder: str):
        self.cluster, self.config = cluster, config
        self.path = Path(config.run.directory, config.run.name)
        file = Path(folder, f"{config.run.name}.yaml")
        file.write_text(dump(config))
        self._log = Path(folder, f"{config.run.name}.log")
        with open(self._log, "wb") as log:
            self._process = cluster.start("-m", "jobs.train", "--config", str(file), stdin=subprocess.DEVNULL, stdout=log,
                                          stderr=subprocess.STDOUT)

    @property
    def steps(self) -> list[dict[str, Any]]:
        return _lines(self.path / "metrics.jsonl")

    @property
    def events(self) -> list[Told]:
        return read_events(_lines(self.path / "events.jsonl"))

    @property
    def ledger(self) -> list[dict[str, Any]]:
        """Of committed steps."""
        path = self.path / "ledger.jsonl"
        return list(map(dict, read(path.read_text().split("\n")[:-1]).steps)) if path.exists() else []

    def rank_pids(self, node: int) -> list[int]:
        """Processes on a node that host a rank."""
        return [pid for pid in self.cluster.pids(node) if _command(pid).startswith(b"ray::StageActor")]

    def whole(self) -> bool:
        """Whether the newest generation has every rank of the cluster."""
        newest = self.generation
        return newest is not None and (newest.nodes, newest.ranks) == (len(self.cluster.nodes), self.size)

    @property
    def generation(self) -> kinds.GenerationFormed | kinds.GenerationLoaded | None:
        """The newest one."""
        found = self.events_of(kinds.GenerationFormed, kinds.GenerationLoaded)
        return found[-1].event if found else None

    @property
    def size(self) -> int:
        return len(self.cluster.nodes) * self.cluster.ranks

    def until(self, condition: Callable[[], Found], seconds: float, what: str) -> Found:
        """The first true value. Raises RunFailed: the run ended before, or it took too long."""
        deadline = time.monotonic() + seconds
        while not (found := condition()):
            if self._process.poll() is not None:
                raise RunFailed(f"the run ended, exit code {self._process.returncode}, before {what}: {self.last_words()}")
            if time.monotonic() > deadline:
                raise RunFailed(f"not within {seconds:g} s: {what}: {self.last_words()}")
            time.sleep(_LOOK_SECONDS)
        return found

    def until_steps(self, more: int, seconds: float) -> None:
        """Until so many more steps than now are committed, all by the newest generation."""
        generation, before = self.generation.generation, len(self.steps)
        self.until(lambda: len(self.steps) >= before + more and self.steps[-1]["generation"] >= generation, seconds,
                   f"{more} more steps")

    def events_of(self, *wanted: Kind) -> list[Told]:
        return READ.of(self.events, *wanted)

    def last_words(self) -> str:
        return " | ".join(self._log.read_text(errors="replace").strip().splitlines()[-3:])

    def end(self) -> None:
        """At once, if it has not ended. Its actors go with it, which would outlive it if it were killed."""
        for number in (signal.SIGINT, signal.SIGTERM):  # the second one ends it without a save
            if self._process.poll() is None:
                self._process.send_signal(number)
        try:
            self._process.wait(_END_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait(_END_SECONDS)

    def stop(self) -> int:
        """Have it save and end. The exit code."""
        self._process.send_signal(signal.SIGINT)
        try:
            return self._process.wait(_END_SECONDS)
        except subprocess.TimeoutExpired:
            self.end()
            raise RunFailed(f"did not end within {_END_SECONDS:g} s of SIGINT: {self.last_words()}") from None


@dataclass(frozen=True)
class Blow:
    """One fault: what, on which node, and at which share of a step after the commit of the one before."""

    kind: str
    node: int
    share: float


def blows(kinds: tuple[str, ...], count: int, nodes: tuple[int, ...], seed: int) -> list[Blow]:
    """Seeded: every kind as often as the others, in random order, on random nodes, anywhere in a step."""
    chance = random.Random(seed)
    order = [kinds[index % len(kinds)] for index in range(count)]
    chance.shuffle(order)
    return [Blow(kind, chance.choice(nodes), chance.random()) for kind in order]


def strike(run: TrainRun, blow: Blow) -> Incident:
    """Do it, wait until a step of the whole batch is committed without the victim, and look at what happened. The node is as the
    fault left it. Raises RunFailed."""
    cluster = run.cluster
    seconds = statistics.median(step["seconds"] for step in run.steps[-5:])
    before = len(run.steps)
    run.until(lambda: len(run.steps) > before, _RECOVERY_SECONDS, "a step before the fault")
    time.sleep(max(0.0, run.steps[-1]["time"] + blow.share * seconds - time.time()))
    ranks = {node: run.rank_pids(node) for node in cluster.nodes}
    survivors = [pid for node in cluster.nodes if node != blow.node for pid in ranks[node]]
    victim = ranks[blow.node][int(blow.share * 1000) % len(ranks[blow.node])]
    generation, ledger, at = run.steps[-1]["generation"], run.ledger, time.time()
    match blow.kind:
        case "killed":
            cluster.kill(blow.node)
        case "cut":
            cluster.cut(blow.node)
        case "frozen":
            cluster.freeze(blow.node)
        case "rank":
            os.kill(victim, signal.SIGKILL)
    run.until(lambda: run.steps[-1]["generation"] > generation, _RECOVERY_SECONDS, f"a step after {blow}")
    alive = [pid for pid in survivors if _command(pid)]
    return incident(blow.kind, at, blow.share, run.steps, run.events, ledger, run.ledger,
                    whole=run.config.training.batch_sequences, length=run.config.data.sequence_length,
                    restarted=len(survivors) - len(alive))


def bring_back(run: TrainRun, blow: Blow) -> str:
    """Thaw or restore the node, start a raylet where there is none any more, and wait until all ranks serve again. What came
    back: the same raylet, or a new one. Raises RunFailed, ClusterFailed."""
    cluster, how = run.cluster, "the rank's process started again"
    if blow.kind == KILLED:
        cluster.add(blow.node)
        how = "new raylet"
    elif blow.kind in (CUT, FROZEN):
        (cluster.restore if blow.kind == CUT else cluster.thaw)(blow.node)
        how = "the same raylet"
        with contextlib.suppress(RunFailed):  # Ray lets a raylet end that it has counted as lost
            run.until(lambda: not cluster.up(blow.node) or run.whole(), _EXPIRY_SECONDS, "the raylet ends or serves")
        if not cluster.up(blow.node):
            cluster.kill(blow.node)
            cluster.add(blow.node)
            how = "new raylet"
    run.until(run.whole, _RETURN_SECONDS, f"all {run.size} ranks serve again after {blow}")
    run.until_steps(_SETTLED_STEPS, _RECOVERY_SECONDS)
    return how


@contextlib.contextmanager
def training(cluster: RayletCluster, config: RunConfig) -> Iterator[TrainRun]:
    """A run that has all ranks and has done a few steps; in a folder of its own, which goes with it. Raises RunFailed."""
    folder = tempfile.mkdtemp(prefix="dualray-recovery-")
    config = config.model_copy(update={"run": config.run.model_copy(update={"directory": f"{folder}/runs"})})
    run = None
    try:
        run = TrainRun(cluster, config, folder)
        run.until(lambda: len(run.steps) >= 2 * _SETTLED_STEPS, _FIRST_SECONDS, f"{2 * _SETTLED_STEPS} steps")
        if not run.whole():
            raise RunFailed(f"began with {run.generation.layout}")
        yield run
    finally:
        if run is not None:
            run.end()
        shutil.rmtree(folder, ignore_errors=True)


def heal(cluster: RayletCluster, node: int) -> None:
    """A new raylet on a node whose way back from a fault was not waited for."""
    cluster.restore(node)
    cluster.kill(node)
    cluster.add(node)


def _lines(path: Path) -> list[dict[str, Any]]:
    """All whole lines so far."""
    return [json.loads(line) for line in path.read_bytes().split(b"\n")[:-1]] if path.exists() else []


def _command(pid: int) -> bytes:
    """Empty: gone, or a zombie."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""
