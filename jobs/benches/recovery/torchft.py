"""A peer of the recovery bench: torchft. One replica group per process, a lighthouse, and a launcher that restarts what dies.

`recoveries` needs no torchft itself; it starts `PYTHON -m jobs.benches.recovery.torchft lighthouse|worker SPEC`, where PYTHON is
an interpreter that has it. A node is so many processes; what was on a lost node does not come back, a killed process is started
again at once. As torchft has it, a replica's share of the batch is its own: what a lost one would have had is dropped.

A survivor notices a dead process by the end of a connection. Gloo's all-reduce is a ring: with four replicas or more there is a
survivor that had no connection with it under way, nobody tells it, and all wait until its process group's timeout has passed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Self

import yaml

from jobs.benches.recovery.journal import InjectedFault, Recovery, StepJournal, recovery, settled, wait_for

STEPS_BETWEEN = 5
DEFAULT_LIGHTHOUSE = {"heartbeat_timeout_ms": 5000, "quorum_tick_ms": 100, "join_timeout_ms": 60_000}  # `torchft_lighthouse`'s
TUNED_LIGHTHOUSE = {"heartbeat_timeout_ms": 1000, "quorum_tick_ms": 20, "join_timeout_ms": 60_000}
"""A join timeout shorter than workers are apart leaves some out of every step; a lost one is waited for until its beats end."""
TUNED_TIMEOUT_SECONDS = 5.0
DEFAULT_TIMEOUT_SECONDS = 60.0  # torchft's own, of its manager and its process group
QUORUM_TIMEOUT_SECONDS = 60.0  # torchft's own; a worker that waits longer for the others ends


@dataclass(frozen=True)
class TorchftSpec:
    """`config`: YAML. `faults`: kinds in order, rank or node; each waits until the recovery from the last is over."""

    config: str
    folder: str
    nodes: int
    ranks_per_node: int
    faults: tuple[str, ...]
    tuned: bool
    seed: int
    wait_seconds: float

    @property
    def size(self) -> int:
        return self.nodes * self.ranks_per_node

    @property
    def timeout(self) -> timedelta:
        return timedelta(seconds=TUNED_TIMEOUT_SECONDS if self.tuned else DEFAULT_TIMEOUT_SECONDS)


# ---- inside the peer's processes

def lighthouse(spec: TorchftSpec) -> None:
    """Serve until standard input ends. Prints its address."""
    from torchft.coordination import LighthouseServer

    server = LighthouseServer(bind="[::]:0", min_replicas=1, **(TUNED_LIGHTHOUSE if spec.tuned else DEFAULT_LIGHTHOUSE))
    print(server.address(), flush=True)
    sys.stdin.read()


def worker(spec: TorchftSpec, place: int, address: str) -> None:
    """Replica group `place` of one process, until it is killed."""
    import torch.distributed as dist
    from torchft import Manager, ProcessGroupGloo

    from jobs.benches.recovery.peer_step import PeerTraining

    training = PeerTraining(spec.config, f"{spec.folder}/steps.jsonl")
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    manager = Manager(
        pg=ProcessGroupGloo(timeout=spec.timeout), load_state_dict=training.load, state_dict=training.state, min_replica_size=1,
        use_async_quorum=False, timeout=spec.timeout, quorum_timeout=timedelta(seconds=QUORUM_TIMEOUT_SECONDS), rank=0,
        world_size=1, store_addr="127.0.0.1", store_port=store.port, lighthouse_addr=address, replica_id=f"place-{place}",
        hostname="127.0.0.1", init_sync=False)
    while True:
        began = time.monotonic()
        manager.start_quorum()
        step, size = manager.current_step(), manager.num_participants()
        training.compute(step, place, spec.size)
        training.exchange(lambda flat: manager.allreduce(flat, reduce_op=dist.ReduceOp.SUM).wait())
        if manager.should_commit():
            training.update(step)
            training.done(step, began, place, size, training.sequences * size // spec.size)


# ---- outside

class Launcher:
    """The processes of one run; a context manager that ends them."""

    def __init__(self, spec: TorchftSpec, python: str, environment: dict[str, str]):
        self._spec, self._python, self._environment = spec, python, environment
        self._path = f"{spec.folder}/spec.json"
        Path(self._path).write_text(json.dumps(dataclasses.asdict(spec)))
        self._log = open(f"{spec.folder}/workers.log", "ab")
        self._lighthouse = self._start("lighthouse", stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self._address = self._lighthouse.stdout.readline().decode().strip()
        if not self._address:
            self._lighthouse.kill()
            raise RuntimeError(f"torchft's lighthouse did not start: {Path(self._log.name).read_text().strip()[-300:]}")
        self._workers = {place: self.start_worker(place) for place in range(spec.size)}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        for process in (*self._workers.values(), self._lighthouse):
            process.kill()
            process.wait()
        self._log.close()

    def start_worker(self, place: int) -> subprocess.Popen[bytes]:
        return self._start("worker", str(place), self._address, stdout=self._log)

    def kill(self, kind: str, chance: random.Random) -> InjectedFault:
        """A process, started again at once; or all those of a node, for good."""
        place = chance.choice(sorted(self._workers))
        each = self._spec.ranks_per_node
        places = [place] if kind == "rank" else [p for p in self._workers if p // each == place // each]
        gone = [self._workers.pop(p) for p in places]
        at = time.monotonic()
        for process in gone:
            process.send_signal(signal.SIGKILL)
        for process in gone:
            process.wait()
        if kind == "rank":
            self._workers[place] = self.start_worker(place)
        return InjectedFault(kind, at, tuple(process.pid for process in gone))

    @property
    def size(self) -> int:
        return len(self._workers)

    def check(self) -> None:
        """Raises RuntimeError: a process ended that nobody killed."""
        for place, process in self._workers.items():
            if process.poll() is not None:
                last = Path(self._log.name).read_text(errors="replace").strip().splitlines()[-1:]
                raise RuntimeError(f"torchft's worker {place} ended by itself with code {process.returncode}: {last}")

    def _start(self, *arguments: str, **streams: Any) -> subprocess.Popen[bytes]:
        command = [self._python, "-m", "jobs.benches.recovery.torchft", arguments[0], self._path, *arguments[1:]]
        return subprocess.Popen(command, env=self._environment, stderr=self._log, start_new_session=True, **streams)


def recoveries(spec: TorchftSpec, python: str, environment: dict[str, str]) -> Iterator[Recovery]:
    """One per fault, as they come. Raises TimeoutError; RuntimeError: a process ended by itself."""
    whole, chance = int(yaml.safe_load(spec.config)["training"]["batch_sequences"]), random.Random(spec.seed)
    journal = StepJournal(f"{spec.folder}/steps.jsonl")
    with Launcher(spec, python, environment) as launched:

        def settle(since: float) -> None:
            def look() -> tuple[int, ...] | None:
                launched.check()
                sequences = whole * launched.size // spec.size
                return settled(journal.read(), since, launched.size, sequences, STEPS_BETWEEN)

            wait_for(look, spec.wait_seconds, f"{launched.size} workers, {STEPS_BETWEEN} steps each")

        settle(0.0)
        for kind in spec.faults:
            threading.Event().wait(chance.uniform(0, 1))  # any moment of a step
            fault = launched.kill(kind, chance)
            settle(fault.at)
            found = recovery(journal.read(), fault, time.monotonic(), whole)
            print(found, file=sys.stderr, flush=True)
            yield found


if __name__ == "__main__":
    given = json.loads(Path(sys.argv[2]).read_text())
    described = TorchftSpec(**given | {"faults": tuple(given["faults"])})
    with contextlib.suppress(KeyboardInterrupt):
        if sys.argv[1] == "lighthouse":
            lighthouse(described)
        else:
            worker(described, int(sys.argv[3]), sys.argv[4])
