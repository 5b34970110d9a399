"""The Ray actor that carries decisions out: it drives the ranks that the driver created, and tells how the run goes."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Sequence
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayError, RayTaskError

from actors.checkpoint import CheckpointError
from actors.dataset import Dataset, DatasetError
from actors.dealing import Batch
from actors.feed import Feed, read_validation
from actors.messages import Failure
from actors.metrics import Exporter, PortInUse, RunMetrics, reachable
from actors.ranks import RankFailed
from actors.run_folder import RunFolder
from actors.storage import StorageError
from actors.trainer import Outcome, Sources, Trainer, TrainingFailed
from orchestrator.config import RunConfig
from orchestrator.layout import Layout

logger = logging.getLogger(__name__)

LOSS_SECONDS = 2.0
LOST = "its process or node was lost"
_SHOWN = ("step", "event")  # the load of every expert at every step would be too much to keep


class RayRanks:
    """Ranks that are StageActors, by rank number."""

    def __init__(self, actors: Sequence[Any]):
        self._actors, self.size = list(actors), len(actors)

    def start(self, method: str, arguments: Sequence[tuple]) -> _RayPending:
        return _RayPending([getattr(actor, method).remote(*values) for actor, values in zip(self._actors, arguments)])

    def abort(self) -> None:
        for actor in self._actors:
            actor.abort.remote()


class _RayPending:
    def __init__(self, references: list[ray.ObjectRef]):
        self._references = references

    def done(self) -> bool:
        return len(ray.wait(self._references, num_returns=len(self._references), timeout=0)[0]) == len(self._references)

    def results(self, timeout_seconds: float) -> list[Any]:
        deadline = time.monotonic() + timeout_seconds
        waiting, found = list(self._references), {}
        while waiting:
            ready, waiting = ray.wait(waiting, num_returns=1, timeout=max(0.0, deadline - time.monotonic()))
            if not ready:
                raise RankFailed(self._references.index(waiting[0]), f"no answer within {timeout_seconds:g} s")
            try:
                found[ready[0]] = self._get(ready[0], timeout_seconds)
            except RankFailed as failed:
                raise self._cause(failed, waiting) from failed
        return [found[reference] for reference in self._references]

    def _cause(self, failed: RankFailed, waiting: list[ray.ObjectRef]) -> RankFailed:
        """What to tell: where a process is lost, its peers' broken connections are often heard of first."""
        deadline = time.monotonic() + LOSS_SECONDS
        while waiting and failed.reason != LOST:
            ready, waiting = ray.wait(waiting, num_returns=1, timeout=max(0.0, deadline - time.monotonic()))
            if not ready:
                break
            try:
                ray.get(ready[0], timeout=LOSS_SECONDS)
            except RayActorError:
                return RankFailed(self._references.index(ready[0]), LOST)
            except RayError:
                continue
        return failed

    def _get(self, reference: ray.ObjectRef, timeout_seconds: float) -> Any:
        """A result that is there already, or on its way from a node that may be lost meanwhile."""
        rank = self._references.index(reference)
        try:
            return ray.get(reference, timeout=timeout_seconds)
        except RayTaskError as error:
            cause = error.cause if error.cause is not None else error
            raise RankFailed(rank, str(cause).splitlines()[0] if str(cause) else type(cause).__name__) from error
        except RayActorError as error:
            raise RankFailed(rank, LOST) from error
        except GetTimeoutError:
            raise RankFailed(rank, f"its answer did not arrive within {timeout_seconds:g} s") from None
        except RayError as error:
            raise RankFailed(rank, str(error).splitlines()[0]) from error


@ray.remote(num_cpus=0, max_restarts=0, concurrency_groups={"training": 1, "control": 4})
class Coordinator:
    """`ranks`: StageActors in rank order of `layout`. `data`: the folder that jobs.tokenize wrote."""

    def __init__(self, config: RunConfig, layout: Layout, ranks: list[Any], data: str):
        self._config, self._layout = config, layout
        self._host = ray.util.get_node_ip_address()
        self._ranks, self._data = RayRanks(ranks), data
        self._updates: deque[tuple[int, str, dict[str, Any]]] = deque(maxlen=10_000)
        self._count = 0
        self._lock = threading.Lock()
        self._metrics = RunMetrics()
        self._targets: list[dict[str, Any]] = []
        self._trainer: Trainer | None = None
        self._stop_requested = False

    @ray.method(concurrency_group="control")
    def open(self) -> str | Failure:
        """Begin to export. host:port of the metrics and of the list of targets (/targets)."""
        telemetry = self._config.telemetry
        try:
            exporter = Exporter(self._metrics.registry, telemetry.host, telemetry.port, lambda: self._targets)
        except PortInUse as error:
            return Failure(str(error))
        self._address = f"{reachable(telemetry.host, self._host)}:{exporter.port}"
        return self._address

    @ray.method(concurrency_group="training")
    def run(self) -> Outcome | Failure:
        """The whole run. What Trainer.run foresees comes back as a Failure, anything else raises."""
        try:
            return self._run()
        except (TrainingFailed, RankFailed, StorageError, CheckpointError, DatasetError) as error:
            logger.exception("the run failed")
            return Failure(str(error))

    def _run(self) -> Outcome:
        self._targets = self._find_targets()
        folder = RunFolder(self._config.run.directory, self._config.run.name)
        dataset = Dataset.open(self._data)
        sources = Sources(lambda step: Feed(dataset, self._config, step, self._config.training.steps),
                          lambda: _validation(dataset, self._config))
        self._trainer = Trainer(self._config, self._layout, self._ranks, folder, sources, self._host, self._watch)
        if self._stop_requested:
            self._trainer.stop()
        return self._trainer.run()

    @ray.method(concurrency_group="control")
    def stop(self) -> None:
        """Save and end after the step under way."""
        self._stop_requested = True
        if self._trainer is not None:
            self._trainer.stop()

    @ray.method(concurrency_group="control")
    def updates(self, since: int) -> tuple[int, list[tuple[str, dict[str, Any]]]]:
        """What happened after update number `since`: (number of the newest, [(kind, values)])."""
        with self._lock:
            return self._count, [(kind, values) for number, kind, values in self._updates if number > since]

    def _watch(self, kind: str, values: dict[str, Any]) -> None:
        self._metrics.observe(kind, values)
        if kind not in _SHOWN:
            return
        with self._lock:
            self._count += 1
            self._updates.append((self._count, kind, values))

    def _find_targets(self) -> list[dict[str, Any]]:
        """Prometheus http_sd: the coordinator and every rank, with its place as labels."""
        run = {"run": self._config.run.name}
        found = [{"targets": [self._address], "labels": run | {"role": "coordinator"}}]
        for place, target in zip(self._layout.places, self._ranks.start("target", [()] * self._layout.size).results(60)):
            found.append({"targets": [target], "labels": run | {
                "role": "rank", "rank": str(place.rank), "node": place.node, "position": str(place.position)}})
        return found


def _validation(dataset: Dataset, config: RunConfig) -> Batch | None:
    count = config.training.validation_sequences if dataset.validation.sequences else 0
    return read_validation(dataset, count) if count else None
