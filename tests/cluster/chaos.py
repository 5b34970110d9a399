"""A run of `jobs.train` over raylets in network namespaces, and what befalls its nodes."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sysconfig
import threading
import time
from collections.abc import Callable
from pathlib import Path

import yaml

from jobs.benches.raylets import RayletCluster
from tests.cluster import committed, eventually

NODES = 4
SECONDS = 90.0
"""Bound on what a busy machine takes to go on, or to bring a node back."""
LENGTH = 32
CONFIG = {
    "model": {"num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 48, "moe_intermediate_size": 16,
              "n_routed_experts": 8, "num_experts_per_tok": 2, "n_group": 4, "topk_group": 2, "num_attention_heads": 2,
              "q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 8,
              "initializer_range": 0.02},
    "training": {"steps": 100_000, "batch_sequences": 16, "microbatch_sequences": 1, "validation_sequences": 4,
                 "validate_every": 25, "dtype": "float64"},
    "optimizer": {"learning_rate": 1e-3, "final_learning_rate": 1e-3, "warmup_steps": 2},  # the same however long the run gets
    "layout": {"pipeline": 2, "expert": 2, "data": 1},
    "topology": {"virtual_nodes": 0, "ranks_per_node": "auto"},
    "elastic": {"copies": 2, "cool_down_seconds": 0.5, "silence_seconds": 4.0},
    "checkpoint": {"every": 40, "keep": 2},
}


def tokens(cluster: RayletCluster, folder: Path) -> str:
    """The data of all runs: a few files of the standard library."""
    inputs = sorted(str(path) for path in Path(sysconfig.get_path("stdlib")).glob("c*.py"))
    finished(cluster, folder, "tokenize", "jobs.tokenize", "--input", *inputs, "--tokenizer", "byte",
             "--output", f"{folder}/tokens", "--set", f"data.sequence_length={LENGTH}", "--set", "data.validation_fraction=0.2")
    return f"{folder}/tokens"


def finished(cluster: RayletCluster, folder: Path, name: str, *arguments: str, seconds: float = 180.0) -> str:
    """`python -m *arguments` on the head, to its end, which must be a good one: what it said."""
    with open(folder / f"{name}.log", "w") as log:
        process = cluster.start("-m", *arguments, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT)
        try:
            code = process.wait(seconds)
        finally:
            process.kill()
            process.wait()
    told = (folder / f"{name}.log").read_text()
    assert code == 0, told[-4000:]
    return told


def command_of(folder: Path, data: str, name: str, **sections: dict) -> list[str]:
    """Writes the configuration of a run; arguments of `python -m`."""
    tree = {key: value | sections.get(key, {}) for key, value in CONFIG.items()}
    tree |= {"run": {"name": name, "directory": str(folder / "runs")}, "data": {"sequence_length": LENGTH, "path": data}}
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(tree))
    return ["jobs.train", "--config", str(path)]


class Chaos:
    """A run under way, driven from the head of `cluster`. `happened`: what was done to it, in order."""

    def __init__(self, cluster: RayletCluster, folder: Path, data: str, seed: int):
        self.cluster, self.folder, self.path = cluster, folder, folder / "runs" / "chaos"
        self.command, self.happened = command_of(folder, data, "chaos"), []
        self._chance, self._away = random.Random(seed), set()
        self._returning: list[threading.Thread] = []
        self._failed: list[BaseException] = []
        with open(folder / "chaos.log", "w") as log:
            self.process = cluster.start("-m", *self.command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT)
        self._until(lambda: self.steps >= 3, "three steps", 2 * SECONDS)

    # --- what is seen of the run ---------------------------------------------------------------------------------

    @property
    def steps(self) -> int:
        """Committed."""
        return len(committed(self.path / "ledger.jsonl"))

    @property
    def events(self) -> list[dict]:
        return lines(self.path / "events.jsonl")

    def told(self, *kinds: str) -> list[dict]:
        return [event for event in self.events if event["event"] in kinds]

    @property
    def generation(self) -> int:
        found = self.told("generation")
        return found[-1]["generation"] if found else 0

    def whole(self) -> bool:
        found = self.told("generation")
        return bool(found) and found[-1]["nodes"] == NODES

    def log(self) -> str:
        return (self.folder / "chaos.log").read_text()

    def ranks(self, node: int) -> list[int]:
        """Processes on a node that host a rank."""
        return [pid for pid in self.cluster.pids(node) if command_line(pid).startswith(b"ray::StageActor")]

    def coordinator(self) -> int | None:
        return next((pid for node in range(NODES + 1) for pid in self.cluster.pids(node)
                     if command_line(pid).startswith(b"ray::Coordinator")), None)

    # --- what befalls it -----------------------------------------------------------------------------------------

    def befall(self, kind: str) -> None:
        """One thing, and wait until the run goes on. What is lost comes back by itself later on."""
        nodes = self._pick(2)  # waits
        before, steps = self.generation, self.steps
        self.happened.append(f"step {steps}: {kind} {nodes[: 2 if 'two' in kind or 'again' in kind else 1]}")
        print(self.happened[-1], flush=True)
        getattr(self, f"_{kind}")(*nodes)
        self._goes_on(before, steps)

    def _rank(self, node: int, other: int) -> None:
        os.kill(self._chance.choice(self.ranks(node)), signal.SIGKILL)

    def _node(self, node: int, other: int) -> None:
        self.cluster.kill(node)
        self._bring_back(node)

    def _cut(self, node: int, other: int) -> None:
        before = self.generation
        self.cluster.cut(node)
        self._until(lambda: self.generation > before, f"a generation without node {node}")
        self.cluster.restore(node)
        self._bring_back(node)

    def _frozen(self, node: int, other: int) -> None:
        before = self.generation
        self.cluster.freeze(node)
        self._until(lambda: self.generation > before, f"a generation without node {node}")
        self.cluster.thaw(node)
        self._bring_back(node)

    def _two_at_once(self, node: int, other: int) -> None:
        self._rank(node, other)
        self._node(other, node)

    def _again_while_it_recovers(self, node: int, other: int) -> None:
        told, pid = len(self.told("lost")), self.ranks(other)[0]
        self._rank(node, other)
        self._until(lambda: len(self.told("lost")) > told, "the first is noticed")
        os.kill(pid, signal.SIGKILL)

    def _drain(self, node: int, other: int) -> None:
        """The notice comes as from Ray's autoscaler; at its deadline the node is gone, and another one takes its place."""
        before, generation, seconds = len(self.told("draining")), self.generation, 20.0
        drain(self.cluster, node, time.time() + seconds)
        self._until(lambda: len(self.told("draining")) > before and self.generation > generation, "the node is left", seconds)
        self.cluster.kill(node)
        self._bring_back(node)

    def _coordinator(self, node: int, other: int) -> None:
        os.kill(self.coordinator(), signal.SIGKILL)

    # --- inside --------------------------------------------------------------------------------------------------

    def _pick(self, count: int) -> list[int]:
        """Nodes that the run uses; waited for until enough of them stay."""
        self._until(lambda: self.whole() and not self._away, f"{NODES} nodes")
        return self._chance.sample(self.cluster.nodes, count)

    def _bring_back(self, node: int) -> None:
        """In the background: a raylet there, whatever has become of the one before."""
        def bring() -> None:
            try:
                self.cluster.kill(node)
                self.cluster.add(node)
                self._away.discard(node)
            except BaseException as error:
                self._failed.append(error)
        self._away.add(node)
        self._returning.append(threading.Thread(target=bring, daemon=True))
        self._returning[-1].start()

    def _goes_on(self, generation: int, steps: int) -> None:
        self._until(lambda: self.generation > generation and self.steps > steps + 2, "the run goes on")

    def _until(self, condition: Callable[[], object], what: str, seconds: float = SECONDS) -> None:
        def over() -> bool:
            assert self.process.poll() is None, f"exit code {self.process.returncode} before {what}: {self.log()[-4000:]}"
            assert not self._failed, self._failed
            return bool(condition())
        try:
            eventually(over, seconds, what)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.happened}\n{self.log()[-4000:]}") from error

    def stop(self) -> int:
        """Ask it to save and end; its exit code."""
        self._until(lambda: self.whole() and not self._away, f"{NODES} nodes at the end")
        self.process.send_signal(signal.SIGINT)
        return self.process.wait(SECONDS)

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        for thread in self._returning:
            thread.join(SECONDS)


def drain(cluster: RayletCluster, node: int, deadline: float) -> None:
    """deadline: seconds since the epoch."""
    from ray._raylet import GcsClient

    nodes = GcsClient(address=cluster.address).get_all_node_info().items()
    name, = [name.hex() for name, found in nodes if found.node_manager_address == cluster.addresses[node] and found.state == 0]
    drained(cluster.address, name, deadline)


def drained(address: str, name: str, deadline: float) -> None:
    """What `ray drain-node` says to Ray's control store, of a node by its identity, and from wherever one can reach it."""
    from ray._raylet import GcsClient
    from ray.core.generated import autoscaler_pb2

    reason = autoscaler_pb2.DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")
    accepted, why = GcsClient(address=address).drain_node(name, reason, "spot", int(1000 * deadline))
    assert accepted, why


def command_line(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def lines(path: Path) -> list[dict]:
    """Of a journal that grows: whole ones."""
    return [json.loads(line) for line in path.read_text().split("\n")[:-1]] if path.exists() else []
