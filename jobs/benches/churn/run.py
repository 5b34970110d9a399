"""A run of the product's own Trainer over held ranks in plain processes, and a cluster of which a thread says what becomes of it."""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy

from actors.calls.rank_calls import News
from actors.data.batching import Batch
from actors.data.dataset import Dataset
from actors.files.run_folder import RunFolder
from actors.hosts.processes import ProcessRanks
from actors.protocol.trainer import Sources, Trainer
from orchestrator.config.run_config import RunConfig
from orchestrator.data import order
from orchestrator.layout.layout import Layout
from orchestrator.told import lines
from orchestrator.topology import Node

LOST, DRAINED, JOINED, FROZEN = "lost", "drained", "joined", "frozen"
KINDS = (LOST, DRAINED, FROZEN)
NOTICE_SECONDS = 10.0
"""From a drain's notice to the end of its node."""
CLUSTER_SECONDS = 3.0
"""What a cluster takes until it counts a frozen node as lost."""


class TokenizedBatches:
    """The batches of the first `steps` steps, in the run's own order, from the tokenized shards; read at once."""

    def __init__(self, config: RunConfig, dataset: Dataset, steps: int):
        training, split = config.training, dataset.train
        self._training = training
        rows = order.sequences_of(split.shape, config.run.seed, config.data.shuffle_window, 0, order.first_position(training, steps))
        self._tokens, self._valid, self.steps = dataset.read_rows(split, rows), dataset.valid_tokens(split, rows), steps

    def batch(self, step: int) -> Batch:
        first, end = (order.first_position(self._training, at) for at in (step, step + 1))
        return Batch(step, numpy.ascontiguousarray(self._tokens[first:end]), self._valid[first:end])


@dataclass
class _ShardFeed:
    rows: TokenizedBatches
    step: int

    def next(self) -> Batch:
        self.step += 1
        return self.rows.batch(self.step - 1)

    def close(self) -> None:
        pass


@dataclass
class Said:
    """What a run said: metrics of every step, and its events."""

    steps: list[dict[str, Any]] = field(default_factory=list)
    events: list[lines.Told] = field(default_factory=list)


def train(ranks: ProcessRanks, config: RunConfig, layout: Layout, rows: TokenizedBatches, folder: str, host: str = "127.0.0.1",
          beside: Callable[[Trainer, Said], None] | None = None, stop_after: int | None = None) -> Said:
    """Train until `stop_after` steps are committed, or `beside`, which runs on a thread of its own, stops the trainer.

    Raises what Trainer.run raises, and what `beside` does.
    """
    told, failed = Said(), []

    def watch(kind: str, values: Any) -> None:
        if kind == "step":
            told.steps.append(values)
            if values["step"] + 1 in (stop_after, rows.steps):
                trainer.stop()
        elif kind == "event":
            told.events.append(values)

    sources = Sources(lambda step: _ShardFeed(rows, step), lambda: None)
    trainer = Trainer(config, layout, ranks, RunFolder(folder, config.run.name), sources, host, watch)

    def run_beside() -> None:
        try:
            beside(trainer, told)
        except BaseException as error:
            failed.append(error)
        finally:
            trainer.stop()

    other = threading.Thread(target=run_beside, name="churn", daemon=True) if beside else None
    if other is not None:
        other.start()
    trainer.run()
    if other is not None:
        other.join()
    if failed:
        raise failed[0]
    return told


# --- changes -----------------------------------------------------------------------------------------------------------

@dataclass(frozen=True, slots=True)
class NodeChange:
    """seconds: since the begin."""

    kind: str
    node: str
    seconds: float


def changes(nodes: Sequence[str], least: int, count: int, every: float, seed: int) -> list[NodeChange]:
    """Seeded. A node that is gone may come back; each kind of going comes as often as the others, and never below `least` nodes."""
    chance = random.Random(seed)
    present, gone, deck, found = list(nodes), [], [], []
    for index in range(count):
        if gone and (len(present) <= least or chance.random() < 0.5):
            kind, node = JOINED, gone.pop(chance.randrange(len(gone)))
            present.append(node)
        else:
            if not deck:
                deck = chance.sample(KINDS, len(KINDS))
            kind, node = deck.pop(), present.pop(chance.randrange(len(present)))
            gone.append(node)
        found.append(NodeChange(kind, node, (index + 1) * every))
    return found


class Churn:
    """Does the changes to the nodes of a run. ranks: of each node."""

    def __init__(self, processes: ProcessRanks, ranks: int, planned: Sequence[NodeChange], seconds: float):
        self._processes, self._ranks, self._planned, self._seconds = processes, ranks, planned, seconds
        self._frozen: dict[str, list[int]] = {}
        self.done: list[tuple[NodeChange, float]] = []

    def __call__(self, trainer: Trainer, told: Said) -> None:
        """All of them at their times, counted from the run's first steps; then stop it."""
        pause, began = threading.Event(), None
        waiting: list[tuple[float, Callable[[], None]]] = []
        while not told.steps:
            pause.wait(0.02)
        began = time.monotonic()
        waiting = [(change.seconds, lambda change=change: waiting.extend(self._do(change))) for change in self._planned]
        waiting.append((self._seconds, trainer.stop))
        while waiting:
            waiting.sort(key=lambda entry: entry[0])
            at, action = waiting[0]
            pause.wait(max(0.0, began + at - time.monotonic()))
            waiting.pop(0)
            action()

    def _do(self, change: NodeChange) -> list[tuple[float, Callable[[], None]]]:
        """Returns what is to follow, and when."""
        node, name = Node(change.node, self._ranks), change.node
        self.done.append((change, time.time()))
        tell = self._processes.tell
        match change.kind:
            case "lost":
                _signal(self._processes.pids_on(name), signal.SIGKILL)
                tell(News("left", node, "killed"))
            case "frozen":
                self._frozen[name] = self._processes.pids_on(name)
                _signal(self._frozen[name], signal.SIGSTOP)
                return [(change.seconds + CLUSTER_SECONDS, lambda: tell(News("left", node, "frozen")))]
            case "drained":
                tell(News("draining", node, "preempted", time.monotonic() + NOTICE_SECONDS))

                def end() -> None:
                    _signal(self._processes.pids_on(name), signal.SIGKILL)
                    tell(News("left", node, "drained"))
                return [(change.seconds + NOTICE_SECONDS, end)]
            case "joined":
                _signal(self._frozen.pop(name, []), signal.SIGCONT)
                tell(News("joined", node))
        return []


def _signal(pids: Sequence[int], number: signal.Signals) -> None:
    for pid in pids:
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            pass  # it was dismissed before
