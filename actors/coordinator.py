"""The Ray actor that carries decisions out: it drives the ranks that the driver created, and tells how the run goes."""

from __future__ import annotations

import logging
import threading
from collections import deque
from typing import Any

import ray

from actors.board import Board
from actors.checkpoint import CheckpointError
from actors.cluster import NodeWatch, many_hosts
from actors.dataset import Dataset, DatasetError
from actors.dealing import Batch
from actors.feed import Feed, read_validation
from actors.messages import Failure, Outcome, Start
from actors.metrics import PAGE, Exporter, PortInUse, RunMetrics, json_route, listening, reachable
from actors.ray_ranks import RayRanks
from actors.ray_token import NoToken, wanted_token
from actors.run_folder import RunFolder
from actors.storage import StorageError, join
from actors.trainer import Sources, Trainer, TrainingFailed
from orchestrator.config import ConfigError, RunConfig
from orchestrator.layout import Layout
from orchestrator.membership import Member

logger = logging.getLogger(__name__)

_SHOWN = ("step", "event")  # the load of every expert at every step would be too much to keep

_LAST_WORDS_SECONDS = 15.0
_LAST_WORDS_OF_A_STOP_SECONDS = 6.0
"""How long Prometheus has to learn how a run ended, if it is one that it scrapes. What is to be saved is saved by then; who stops a run
waits for its end."""


@ray.remote(num_cpus=0, max_restarts=0, concurrency_groups={"training": 1, "control": 4})
class Coordinator:
    """`ranks`: StageActors in the order of `start.members`, or else of the ranks of `layout`. `data`: the folder that
    jobs.tokenize wrote.

    Whoever created this actor also creates the ranks that it asks for: `updates` of kind "spawn", to be answered by `admit`.
    """

    def __init__(self, config: RunConfig, layout: Layout, ranks: list[Any], data: str, start: Start = Start()):
        self._config, self._layout, self._start = config, layout, start
        self._host = ray.util.get_node_ip_address()
        self._nodes = NodeWatch(config)
        self._ranks, self._data = RayRanks(ranks, self._ask, self._nodes), data
        self._updates: deque[tuple[int, str, dict[str, Any]]] = deque(maxlen=10_000)
        self._count = 0
        self._lock = threading.Lock()
        self._metrics, self._board = RunMetrics(config.training.steps, config.checkpoint.every), Board(config, lambda: self._trainer.layout if self._trainer else None)
        self._trainer: Trainer | None = None
        self._stop_requested = False
        self._event_files = _event_files(config)

    @ray.method(concurrency_group="control")
    def open(self) -> str | Failure:
        """Begin to export. host:port of the metrics and of the list of targets (/targets)."""
        telemetry = self._config.telemetry
        listen = listening(telemetry.host, self._host, many_hosts(self._config))
        routes = {"/": lambda: ("text/html; charset=utf-8", PAGE.read_bytes()), "/status.json": json_route(self._board.state),
                  "/timeline.json": json_route(self._board.timeline), "/targets": json_route(self._targets)}
        try:
            self._exporter = Exporter(self._metrics.registry, listen, telemetry.port, routes, wanted_token())
        except (PortInUse, NoToken) as error:
            return Failure(str(error))
        self._address = f"{reachable(listen[0], self._host)}:{self._exporter.port}"
        return self._address

    @ray.method(concurrency_group="training")
    def run(self) -> Outcome | Failure:
        """The whole run. What Trainer.run foresees comes back as a Failure, anything else raises."""
        try:
            return self._run()
        except (TrainingFailed, StorageError, CheckpointError, DatasetError, ConfigError) as error:
            logger.exception("the run failed")
            return Failure(str(error))

    def _run(self) -> Outcome:
        folder = RunFolder(self._config.run.directory, self._config.run.name)
        dataset = Dataset.open(self._data)
        sources = Sources(lambda step: Feed(dataset, self._config, step, self._config.training.steps),
                          lambda: _validation(dataset, self._config))
        self._trainer = Trainer(self._config, self._layout, self._ranks, folder, sources, self._host, self._watch,
                                start=self._start)
        if self._stop_requested:
            self._trainer.stop()
        try:
            return self._trainer.run()
        finally:
            if self._event_files:
                self._event_files.close()
            self._metrics.ended()
            self._exporter.last_words(_LAST_WORDS_OF_A_STOP_SECONDS if self._stop_requested else _LAST_WORDS_SECONDS)

    @ray.method(concurrency_group="control")
    def admit(self, member: Member, actor: Any) -> None:
        """A rank that was asked for."""
        self._ranks.admit(member, actor)

    @ray.method(concurrency_group="control")
    def stop(self) -> None:
        """Save and end after the step under way."""
        self._stop_requested = True
        self._metrics.ended()
        if self._trainer is not None:
            self._trainer.stop()

    @ray.method(concurrency_group="control")
    def updates(self, since: int) -> tuple[int, list[tuple[str, dict[str, Any]]]]:
        """What happened after update number `since`: (number of the newest, [(kind, values)])."""
        with self._lock:
            return self._count, [(kind, values) for number, kind, values in self._updates if number > since]

    def _watch(self, kind: str, values: dict[str, Any]) -> None:
        if kind == "history":
            self._board.recall(values["steps"], values["events"])
            self._metrics.recall(values["events"])
            return
        self._board.observe(kind, values)
        self._metrics.observe(kind, values)
        if self._event_files:
            self._event_files.observe(kind, values)
        if kind in _SHOWN:
            self._update(kind, values)

    def _ask(self, member: Member) -> None:
        self._update("spawn", {"member": member})

    def _update(self, kind: str, values: dict[str, Any]) -> None:
        with self._lock:
            self._count += 1
            self._updates.append((self._count, kind, values))

    def _targets(self) -> list[dict[str, Any]]:
        """Prometheus http_sd: the coordinator and every rank of the present layout, with its place as labels."""
        run = {"run": self._config.run.name}
        found = [{"targets": [self._address], "labels": run | {"role": "coordinator"}}]
        for place, target in self._trainer.targets() if self._trainer else ():
            found.append({"targets": [target], "labels": run | {
                "role": "rank", "rank": str(place.rank), "node": place.node, "position": str(place.position)}})
        return found


def _event_files(config: RunConfig) -> Any:
    """Where they are wanted: TensorBoard is no part of what is always installed."""
    if not config.telemetry.tensorboard:
        return None
    from actors.tensorboard import FOLDER, EventFiles

    return EventFiles(join(config.run.directory, config.run.name, FOLDER))


def _validation(dataset: Dataset, config: RunConfig) -> Batch | None:
    count = config.training.validation_sequences if dataset.validation.sequences else 0
    return read_validation(dataset, count) if count else None
