"""What Ray Train (v2, elastic) and torchft do after the faults of the recovery bench, at their defaults and tuned.

Both train the model of the run configuration in plain PyTorch (`actors/model/plain.py`: the same weights, names and initial
values as the runtime's), data parallel, one process per worker, the whole model and optimizer in each. That is fair to them,
and more than fair: neither knows pipelines or expert parallelism, a smaller share of the state would only have to be found
again elsewhere, and a lost worker's state is on every other worker. Ray Train reports a checkpoint every step, on a local
disk, and deals the whole batch among the workers it has; torchft drops the lost replica's share, as it does everywhere.
Their workers are as many as the settings say: fewer processes than the bench's own ranks restart faster on few cores.

torchft is no dependency: `PeerSettings.torchft_python` names an interpreter that has it (`pip install torchft`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jobs.benches.recovery import ray_train as recovery_ray_train
from jobs.benches.recovery import torchft as recovery_torchft
from jobs.benches.recovery.journal import Recovery
from orchestrator.config.run_config import RunConfig, dump, parse

RANK, NODE = "rank", "node"
RAY_TRAIN, TORCHFT, TUNED = "ray_train", "torchft", "_tuned"
_REPOSITORY = Path(__file__).parents[3]
_START_SECONDS = 120.0
_PROBE_SECONDS = 60.0


@dataclass(frozen=True)
class PeerSettings:
    """`rank_faults`, `node_faults`: how often a process, and a node with all its processes, is killed, of each peer tuned or not.

    default_node_faults: of Ray Train at its defaults, which takes more than a minute for each. A node that is lost stays away,
    so `nodes` must be more than the node faults.
    torchft_nodes: three replicas are its best case, of which it loses two at most: `jobs/benches/recovery/torchft.py` says why.
    wait_seconds: bound on one recovery.
    """

    nodes: int = 4
    ranks_per_node: int = 1
    rank_faults: int = 3
    node_faults: int = 3
    default_node_faults: int = 1
    torchft_nodes: int = 3
    seed: int = 1
    wait_seconds: float = 180.0
    torchft_python: str = field(default_factory=lambda: sys.executable)

    def __post_init__(self) -> None:
        if max(self.node_faults, self.default_node_faults) >= self.nodes:
            raise ValueError(f"{self.nodes} nodes do not survive {max(self.node_faults, self.default_node_faults)} losses of one")


@dataclass(frozen=True)
class PeerTimes:
    """What was measured of one peer. `tuning`: settings that differ from its defaults. `refused`: why it could not be measured,
    or not to the end; what was measured until then is in `recoveries`."""

    tuning: dict[str, Any]
    recoveries: tuple[Recovery, ...] = ()
    refused: str | None = None

    def seconds(self, kind: str) -> list[float]:
        """From each fault of a kind to the end of the first step that began after it."""
        return [found.first_step_seconds for found in self.recoveries if found.kind == kind]

    def full_batch_seconds(self, kind: str) -> list[float | None]:
        """The same to a step of the whole batch; None: it did not come."""
        return [found.full_batch_seconds for found in self.recoveries if found.kind == kind]

    def median(self, kind: str) -> float | None:
        seconds = self.seconds(kind)
        return statistics.median(seconds) if seconds else None

    def summary(self) -> dict[str, Any]:
        """For a bench's JSON object."""
        return dataclasses.asdict(self) | {"median_seconds": {kind: self.median(kind) for kind in (RANK, NODE)}}


def peers(config: RunConfig, settings: PeerSettings) -> dict[str, PeerTimes]:
    """Measure `ray_train`, `ray_train_tuned`, `torchft`, `torchft_tuned`, one after another. Never raises for a peer's sake."""
    found = {}
    for tuned in (False, True):
        found[RAY_TRAIN + TUNED * tuned] = ray_train(config, settings, tuned=tuned)
        found[TORCHFT + TUNED * tuned] = torchft(config, settings, tuned=tuned)
    return {name: found[name] for name in sorted(found)}


def ray_train(config: RunConfig, settings: PeerSettings, *, tuned: bool) -> PeerTimes:
    """In a process of its own: its raylets and their variables are none of this process's."""
    tuning: dict[str, Any] = {}
    if tuned:
        tuning = {"raylets": recovery_ray_train.TUNED_SYSTEM, "environment": recovery_ray_train.TUNED_ENVIRONMENT,
                  "elastic_resize_monitor_interval_s": recovery_ray_train.TUNED_RESIZE_SECONDS}
    if importlib.util.find_spec("ray.train.v2") is None:
        return PeerTimes(tuning, refused="this Ray has no Train v2: pip install 'ray[train]>=2.50'")
    faults = _faults(settings, settings.node_faults if tuned else settings.default_node_faults)
    with _folder() as folder:
        spec = recovery_ray_train.RayTrainSpec(_peer_config(config), folder, settings.nodes, settings.ranks_per_node, faults, tuned,
                                               settings.seed, settings.wait_seconds)
        Path(f"{folder}/spec.json").write_text(json.dumps(dataclasses.asdict(spec)))
        process = subprocess.Popen([sys.executable, "-m", "jobs.benches.recovery.ray_train", f"{folder}/spec.json"],
                                   env=_environment(folder), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                                   start_new_session=True)
        recoveries, refused = [], None
        try:
            out, err = process.communicate(timeout=_START_SECONDS + settings.wait_seconds * (1 + len(faults)))
        except subprocess.TimeoutExpired:
            process.kill()
            out, err = process.communicate()
            refused = "it did not end in time"
        recoveries = [Recovery(**json.loads(line)) for line in out.splitlines() if line.startswith("{")]
        if process.returncode and refused is None:
            refused = next((line for line in reversed(err.splitlines()) if line.strip()), f"exit code {process.returncode}")
    return PeerTimes(tuning, tuple(recoveries), refused)


def torchft(config: RunConfig, settings: PeerSettings, *, tuned: bool) -> PeerTimes:
    """Processes that need no Ray: a node is so many of them."""
    tuning: dict[str, Any] = {}
    if tuned:
        tuning = {"lighthouse": recovery_torchft.TUNED_LIGHTHOUSE, "timeout_seconds": recovery_torchft.TUNED_TIMEOUT_SECONDS}
    with _folder() as folder:
        if lacking := _lacking_torchft(settings.torchft_python, folder):
            return PeerTimes(tuning, refused=lacking)
        spec = recovery_torchft.TorchftSpec(_peer_config(config), folder, settings.torchft_nodes, settings.ranks_per_node,
                                            _faults(settings, min(settings.node_faults, settings.torchft_nodes - 1)), tuned,
                                            settings.seed, settings.wait_seconds)
        recoveries: list[Recovery] = []
        try:
            recoveries.extend(recovery_torchft.recoveries(spec, settings.torchft_python, _environment(folder)))
        except (RuntimeError, TimeoutError, ValueError) as error:
            return PeerTimes(tuning, tuple(recoveries), str(error))
    return PeerTimes(tuning, tuple(recoveries))


def _lacking_torchft(python: str, folder: str) -> str | None:
    """Why that interpreter cannot run torchft's worker; None: it can."""
    try:
        tried = subprocess.run([python, "-c", "import torchft, jobs.benches.recovery.peer_step"], env=_environment(folder),
                               capture_output=True, text=True, timeout=_PROBE_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"torchft_python = {python}: {error}"
    if tried.returncode:
        return f"torchft_python = {python}: {tried.stderr.strip().splitlines()[-1]}; pip install torchft"
    return None


def _faults(settings: PeerSettings, node_faults: int) -> tuple[str, ...]:
    return (RANK,) * settings.rank_faults + (NODE,) * node_faults


def _peer_config(config: RunConfig) -> str:
    """The run's model and batch; no end before it is killed."""
    return dump(parse(config.model_dump(), ["training.steps=1000000", "training.validation_sequences=0"]))


def _environment(folder: str) -> dict[str, str]:
    """`RAY_TMPDIR` also marks every process that comes of it."""
    environment = os.environ | {
        "RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0", "RAY_TMPDIR": folder, "RAY_DEDUP_LOGS": "0",
        "RAY_memory_monitor_refresh_ms": "0", "RAY_worker_niceness": "0", "RAY_raylet_start_wait_time_s": "60", "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(_REPOSITORY), *filter(None, [os.environ.get("PYTHONPATH")])])}
    environment.pop("RAY_ADDRESS", None)
    return environment


@contextlib.contextmanager
def _folder() -> Iterator[str]:
    """Of one run; what still runs with it in its environment ends with it. Sockets' paths may have 107 bytes: below /tmp."""
    folder = tempfile.mkdtemp(prefix="drp", dir="/tmp")
    try:
        yield folder
    finally:
        while left := _marked(folder):
            for pid in left:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        shutil.rmtree(folder, ignore_errors=True)


def _marked(folder: str) -> list[int]:
    """Processes that are alive and were started for that folder."""
    found, mark = [], f"RAY_TMPDIR={folder}".encode()
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):  # it ended while we looked; of one that has ended `environ` is empty
            if entry.name.isdigit() and mark in (entry / "environ").read_bytes().split(b"\0"):
                found.append(int(entry.name))
    return found
