"""A peer of the recovery bench: Ray Train (v2), elastic, on raylets of its own; a process of its own per run.

`python -m jobs.benches.recovery.ray_train SPEC` reads a JSON `RayTrainSpec` from that file and prints one JSON line per fault, its
Recovery. A checkpoint is reported every step, so no step that has reached the controller is redone. Workers deal the whole batch
among as many as they are. Whoever starts this process also ends what it leaves behind (marked by RAY_TMPDIR).
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import random
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from jobs.benches.recovery.journal import InjectedFault, Recovery, StepJournal, recovery, settled, wait_for

RESOURCE = "rank"
STEPS_BETWEEN = 5
TUNED_SYSTEM = {"health_check_initial_delay_ms": 0, "health_check_period_ms": 200, "health_check_timeout_ms": 500,
                "health_check_failure_threshold": 5}  # about 1 s; tighter ones declare raylets dead that a busy machine delays
TUNED_ENVIRONMENT = {"RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.1", "RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S": "10",
                     "TORCH_PROCESS_GROUP_SHUTDOWN_TIMEOUT_S": "1", "RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S": "0.5",
                     "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "2"}  # it counts on lost nodes for up to 20 s, and waits for them
TUNED_RESIZE_SECONDS = 1.0


@dataclass(frozen=True)
class RayTrainSpec:
    """`config`: YAML. `faults`: kinds in order, rank or node; each waits until the recovery from the last is over."""

    config: str
    folder: str
    nodes: int
    ranks_per_node: int
    faults: tuple[str, ...]
    tuned: bool
    seed: int
    wait_seconds: float


def train(settings: dict[str, Any]) -> None:
    """What Ray Train runs in each worker."""
    import ray.train
    import torch
    import torch.distributed as dist

    from jobs.benches.recovery.peer_step import PeerTraining

    context = ray.train.get_context()
    rank, size = context.get_world_rank(), context.get_world_size()
    training, step = PeerTraining(settings["config"], settings["journal"]), 0
    if checkpoint := ray.train.get_checkpoint():
        with checkpoint.as_directory() as folder:
            saved = torch.load(os.path.join(folder, "state.pt"))
        training.load(saved["state"])
        step = saved["step"]
    while True:
        began = time.monotonic()
        training.compute(step, rank, size)
        training.exchange(dist.all_reduce)
        training.update(step)
        training.done(step, began, rank, size, training.sequences)
        step += 1
        with tempfile.TemporaryDirectory() as folder:
            saved = None
            if rank == 0:
                torch.save({"step": step, "state": training.state()}, os.path.join(folder, "state.pt"))
                saved = ray.train.Checkpoint.from_directory(folder)
            ray.train.report({"step": step}, checkpoint=saved)


class Raylets:
    """A head without ranks and `nodes` raylets with some, on this machine."""

    def __init__(self, spec: RayTrainSpec):
        from ray.cluster_utils import Cluster

        head: dict[str, Any] = {"num_cpus": 2, "object_store_memory": 100_000_000, "include_dashboard": False}
        if spec.tuned:
            head["_system_config"] = TUNED_SYSTEM
        self.cluster = Cluster(initialize_head=True, head_node_args=head)
        self._pids: list[int] = []
        for _ in range(spec.nodes):
            node = self.cluster.add_node(num_cpus=0, resources={RESOURCE: spec.ranks_per_node}, object_store_memory=80_000_000)
            self._pids.append(node.all_processes["raylet"][0].process.pid)

    def kill_one_of(self, workers: tuple[int, ...], chance: random.Random) -> tuple[float, tuple[int, ...]]:
        """SIGKILL a raylet that has some of these workers, and all that it started: when, and which workers."""
        trees = {raylet: descendants(raylet) for raylet in self._pids}
        raylet = chance.choice([raylet for raylet, tree in trees.items() if tree & set(workers)])
        self._pids.remove(raylet)
        at = time.monotonic()
        for pid in (raylet, *trees[raylet]):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        return at, tuple(sorted(trees[raylet] & set(workers)))


def descendants(pid: int) -> set[int]:
    """Processes that `pid` started, directly or not."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
                children.setdefault(parent, []).append(int(entry.name))
    found, open_ = set(), [pid]
    while open_:
        for child in children.get(open_.pop(), ()):
            found.add(child)
            open_.append(child)
    return found


def recoveries(spec: RayTrainSpec) -> Iterator[Recovery]:
    """One per fault, as they come. Raises TimeoutError; RuntimeError: the run ended by itself."""
    if spec.tuned:
        os.environ.update(TUNED_ENVIRONMENT)
    import ray

    raylets, journal = Raylets(spec), StepJournal(f"{spec.folder}/steps.jsonl")
    ray.init(address=raylets.cluster.address, log_to_driver=False, logging_level="ERROR")
    ended: list[str] = []
    threading.Thread(target=_fit, args=(spec, journal, ended), daemon=True).start()
    sequences, chance = _sequences(spec.config), random.Random(spec.seed)
    size = spec.nodes * spec.ranks_per_node
    workers = _settled(spec, journal, 0.0, size, sequences, ended)
    for kind in spec.faults:
        threading.Event().wait(chance.uniform(0, 1))  # any moment of a step
        if kind == "rank":
            killed, at = (chance.choice(workers),), time.monotonic()
            os.kill(killed[0], signal.SIGKILL)
        else:
            at, killed = raylets.kill_one_of(workers, chance)
            size -= len(killed)
        workers = _settled(spec, journal, at, size, sequences, ended)
        yield recovery(journal.read(), InjectedFault(kind, at, killed), time.monotonic(), sequences)


def _settled(spec: RayTrainSpec, journal: StepJournal, since: float, size: int, sequences: int,
             ended: list[str]) -> tuple[int, ...]:
    def look() -> tuple[int, ...] | None:
        if ended:
            raise RuntimeError(f"Ray Train ended the run: {ended[0]}")
        return settled(journal.read(), since, size, sequences, STEPS_BETWEEN)

    return wait_for(look, spec.wait_seconds, f"{size} workers, {STEPS_BETWEEN} steps each")


def _fit(spec: RayTrainSpec, journal: StepJournal, ended: list[str]) -> None:
    from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    most = spec.nodes * spec.ranks_per_node
    resize = {"elastic_resize_monitor_interval_s": TUNED_RESIZE_SECONDS} if spec.tuned else {}
    trainer = TorchTrainer(
        train, train_loop_config={"config": spec.config, "journal": str(journal.path)}, torch_config=TorchConfig(backend="gloo"),
        scaling_config=ScalingConfig(num_workers=(1, most), resources_per_worker={RESOURCE: 1}, **resize),
        run_config=RunConfig(name="peer", storage_path=f"{spec.folder}/results", failure_config=FailureConfig(max_failures=-1),
                             checkpoint_config=CheckpointConfig(num_to_keep=2)))
    try:
        trainer.fit()
        ended.append("it returned")
    except Exception as error:  # told by the thread that waits
        ended.append(f"{type(error).__name__}: {error}")


def _sequences(config: str) -> int:
    return int(yaml.safe_load(config)["training"]["batch_sequences"])


if __name__ == "__main__":
    given = json.loads(Path(sys.argv[1]).read_text())
    for found in recoveries(RayTrainSpec(**given | {"faults": tuple(given["faults"])})):
        print(json.dumps(dataclasses.asdict(found)), flush=True)
    os._exit(0)  # the run's thread and Ray would take their time; whoever started this process ends what it leaves
