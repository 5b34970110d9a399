"""The Ray actor of a run: it conducts the ranks, and tells whoever asks how it goes.

The process that started the run, its driver, may go: the run goes on. Who asks for `updates` is the driver, and shows each time
that it lives. Without it for `elastic.orphan_seconds` the run is saved and ended, and everything with it.
"""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import os
import queue
import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import ray

from actors.calls.messages import Failure, Outcome, Start
from actors.data.batching import Batch
from actors.data.dataset import MANIFEST, Dataset, DatasetError
from actors.data.feed import Feed, read_validation
from actors.files import storage
from actors.files.run_folder import IN_USE, LIVE, RunFolder, Token
from actors.files.storage import StorageError, join
from actors.hosts.auth_token import NoToken, wanted_token
from actors.hosts.cluster import NodeWatch, ask_for_no_more, many_hosts
from actors.hosts.ray_ranks import RayRanks
from actors.hosts.stage_actor import FIRST_SECONDS, create
from actors.protocol.silence import LOOK_SECONDS, Silence
from actors.protocol.trainer import Sources, Trainer, TrainingFailed
from actors.state.checkpoint import CheckpointError
from actors.telemetry.exporter import PAGE, Exporter, PortInUse, RunMetrics, json_route, listening, reachable
from actors.telemetry.live_state import LiveStatus
from orchestrator.config.run_config import ConfigError, RunConfig
from orchestrator.layout.layout import Layout
from orchestrator.protocol.events import Ending
from orchestrator.protocol.members import Member
from orchestrator.told.kinds import Event

logger = logging.getLogger(__name__)

_SHOWN = ("step", "event")  # the load of every expert at every step would be too much to keep

_LAST_WORDS_SECONDS = 15.0
_LAST_WORDS_OF_A_STOP_SECONDS = 6.0
"""How long Prometheus has to learn how a run ended, if it is one that it scrapes. What is to be saved is saved by then; who stops a run
waits for its end."""


_DRIVER_SECONDS = 3.0
"""Whoever has asked within this time is there still."""

_END_SECONDS = 5.0
_TOKEN = ".seen"
TAKEN_OVER = "another process has taken this run over"


@dataclass(frozen=True)
class Present:
    """A run under way. address: of its page and metrics. begun: whether it was told to begin. stopping: it was asked to save and
    end. over: it has ended; its outcome is kept."""

    config: RunConfig
    layout: Layout
    address: str
    begun: bool
    stopping: bool
    over: bool


@ray.remote(num_cpus=0, max_restarts=0, concurrency_groups={"control": 4, "waiting": 8})
class Coordinator:
    """ranks: StageActors in the order of `start.members`, or else of the ranks of `layout`. data: the folder that jobs.tokenize
    wrote. run: as whose its actors are found by name; none: they have no names, and end with whoever created them.

    Ranks that are wanted later it creates itself. What is left when the run is over it ends, all but itself: the outcome is kept
    for the driver, who ends this actor; where there is none, it ends itself after `elastic.orphan_seconds`.
    """

    def __init__(self, config: RunConfig, layout: Layout, ranks: Sequence[Any], data: str, start: Start = Start(), run: str = ""):
        self._config, self._layout, self._start, self._name = config, layout, start, run
        self._host = ray.util.get_node_ip_address()
        self._trainer: Trainer | None = None
        self._nodes = NodeWatch(config, self._tell)
        self._written: Token | None = None
        self._wanted: queue.SimpleQueue[Member] = queue.SimpleQueue()
        self._ranks, self._data = RayRanks(ranks, self._wanted.put, self._nodes), data
        self._updates: deque[tuple[int, str, Any]] = deque(maxlen=10_000)
        self._count = 0
        self._lock = threading.Lock()
        self._metrics = RunMetrics(config.training.steps, config.checkpoint.every)
        self._board = LiveStatus(config, lambda: self._trainer.layout if self._trainer else None)
        self._stop_requested = False
        self._event_files = _event_files(config)
        self._driver, self._silence = "", Silence()
        self._over, self._outcome = threading.Event(), None
        self._address, self._begun = "", False
        threading.Thread(target=self._mind_driver, name="driver", daemon=True).start()

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

    @ray.method(concurrency_group="control")
    def begin(self, driver: str) -> None:
        """The whole run, on threads of its own. driver: a name of the caller's choice, for `updates`."""
        self._driver, self._begun = driver, True
        self._silence.broken()
        for name, target in (("run", self._conduct), ("ranks", self._create_ranks)):
            threading.Thread(target=target, name=name, daemon=True).start()

    # --- the driver ----------------------------------------------------------------------------------------------

    @ray.method(concurrency_group="control")
    def updates(self, driver: str, since: int) -> tuple[int, list[tuple[str, Any]], bool] | Failure:
        """What happened after update number `since`: (number of the newest, [(kind, values)], whether the run is over).

        A Failure: another driver has taken over.
        """
        if driver != self._driver:
            return Failure(TAKEN_OVER)
        self._silence.broken()
        with self._lock:
            return self._count, [(kind, values) for number, kind, values in self._updates if number > since], self._over.is_set()

    @ray.method(concurrency_group="waiting")
    def outcome(self, seconds: float) -> Outcome | Failure | None:
        """How the run ended. What Trainer.run foresees comes back as a Failure, and so does anything else. None: it has not,
        within so many seconds."""
        self._over.wait(seconds)
        return self._outcome

    @ray.method(concurrency_group="control")
    def present(self) -> Present:
        layout = self._trainer.layout if self._trainer else self._layout
        return Present(self._config, layout, self._address, self._begun, self._stop_requested, self._over.is_set())

    @ray.method(concurrency_group="control")
    def follow(self, driver: str) -> int | Failure:
        """The caller wants to be the driver from now on. The number of the newest update. A Failure: there is one."""
        if self._silence.seconds < _DRIVER_SECONDS:
            return Failure(IN_USE)
        self._driver = driver
        self._silence.broken()
        with self._lock:
            return self._count

    @ray.method(concurrency_group="control")
    def stop(self) -> None:
        """Save and end after the step under way."""
        self._stop()

    @ray.method(concurrency_group="control")
    def give_up(self, reason: str) -> None:
        """End at once, without a save."""
        self._finish(Failure(reason, Ending.STOPPED))

    def _stop(self) -> None:
        self._stop_requested = True
        self._metrics.ended()
        if self._trainer is not None:
            self._trainer.stop()

    def _mind_driver(self) -> None:
        """End what nobody would end any more."""
        most = self._config.elastic.orphan_seconds
        while not self._over.wait(LOOK_SECONDS):
            silent = self._silence.look()
            if not self._begun and silent > max(most, FIRST_SECONDS):
                return self._leave()
            if self._begun and silent > most:
                logger.warning("no sign of the driver for %g s: the run is saved and ends", most)
                self._stop()
                self._over.wait(self._config.training.step_timeout_seconds + self._config.elastic.storage_seconds)
                return self._leave()
        self._silence.broken()  # whoever is interested has time to learn of the end
        while self._silence.look() <= most:
            time.sleep(LOOK_SECONDS)
        return self._leave()

    def _leave(self) -> None:
        """What a driver does when a run is over; then end this process."""
        if self._superseded:
            os._exit(0)
        self._ranks.close(_END_SECONDS)
        with contextlib.suppress(StorageError, ValueError, KeyError, TypeError):
            live = join(self._config.run.directory, self._config.run.name, LIVE)
            if storage.exists(live) and json.loads(storage.read_bytes(live))["address"] == self._address:
                storage.delete(live)
        asking = threading.Thread(target=self._ask_for_no_more, name="last words", daemon=True)
        asking.start()
        asking.join(_END_SECONDS)  # where Ray's control store is away it would take much longer
        os._exit(0)

    def _ask_for_no_more(self) -> None:
        with contextlib.suppress(ray.exceptions.RayError, RuntimeError):
            ask_for_no_more(self._config)

    # --- the run -------------------------------------------------------------------------------------------------

    def _conduct(self) -> None:
        try:
            outcome: Outcome | Failure = self._run()
        except TrainingFailed as error:
            logger.exception("the run failed")
            outcome = Failure(str(error), error.ending)
        except (StorageError, CheckpointError, DatasetError, ConfigError) as error:
            logger.exception("the run failed")
            outcome = Failure(str(error))
        except Exception as error:
            logger.exception("the run failed")
            outcome = Failure(f"{type(error).__name__}: {' '.join(str(error).split())}")
        self._finish(outcome)

    def _finish(self, outcome: Outcome | Failure) -> None:
        """The first one counts."""
        with self._lock:
            self._outcome = self._outcome or outcome
        if not self._superseded:
            self._ranks.close(_END_SECONDS)
        self._over.set()

    @property
    def _superseded(self) -> bool:
        """Ranks, the page's address and what an autoscaler is asked for are another coordinator's by now."""
        return isinstance(self._outcome, Failure) and self._outcome.ending is Ending.SUPERSEDED

    def _run(self) -> Outcome:
        folder = RunFolder(self._config.run.directory, self._config.run.name)
        dataset = functools.cache(lambda: Dataset.open(self._data))
        sources = Sources(lambda step: Feed(dataset(), self._config, step, self._config.training.steps),
                          lambda: _validation(dataset(), self._config), lambda: _answers(self._data))
        self._trainer = Trainer(self._config, self._layout, self._ranks, folder, sources, self._host, self._watch,
                                start=self._start)
        if self._stop_requested:
            self._trainer.stop()
        try:
            return self._trainer.run()
        finally:
            self._close_event_files()
            self._metrics.ended()
            self._exporter.last_words(_LAST_WORDS_OF_A_STOP_SECONDS if self._stop_requested else _LAST_WORDS_SECONDS)

    def _create_ranks(self) -> None:
        """Those that are wanted, on a thread for it: while Ray's control store is away it waits in here."""
        while not self._over.is_set():
            member = self._wanted.get()
            if not self._ranks.wanted(member):  # it was given up while another one was waited for
                continue
            try:
                self._ranks.admit(member, create(self._config, member, self._name), self._token())
            except (ray.exceptions.RayError, ValueError, RuntimeError) as error:
                logger.exception("cannot create %s", member)
                self._ranks.not_made(member, f"{type(error).__name__}: {' '.join(str(error).split())[:200]}")

    def _token(self) -> Token | None:
        """That every process reads which joins. None: there is none to be had now, or none is needed: of processes of one machine, and
        where nothing is written."""
        if self._written is None and not self._config.topology.virtual_nodes and self._start.evaluate is None:
            with contextlib.suppress(StorageError):
                self._written = RunFolder(self._config.run.directory, self._config.run.name).token(_TOKEN)
        return self._written

    def _tell(self, event: Event) -> None:
        if self._trainer is not None:
            self._trainer.tell(event)

    def _watch(self, kind: str, values: Any) -> None:
        if kind == "history":
            self._board.recall(values["steps"], values["events"])
            self._metrics.recall(values["events"])
            return
        self._board.observe(kind, values)
        self._metrics.observe(kind, values)
        if self._event_files:
            self._trainer.chore("tensorboard", lambda: self._event_files.observe(kind, values))
        if kind in _SHOWN:
            self._update(kind, values)

    def _close_event_files(self) -> None:
        """Within a bound: their writer waits for the disk."""
        def close() -> None:
            with contextlib.suppress(Exception):  # it has failed before, and that was logged
                self._event_files.close()

        if self._event_files:
            closing = threading.Thread(target=close, name="tensorboard", daemon=True)
            closing.start()
            closing.join(_END_SECONDS)

    def _update(self, kind: str, values: Any) -> None:
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
    from actors.telemetry.tensorboard import FOLDER, EventFiles

    return EventFiles(join(config.run.directory, config.run.name, FOLDER))


def _answers(data: str) -> bool:
    """Whether the storage of the data does."""
    try:
        return bool(storage.read_bytes(join(data, MANIFEST)))
    except StorageError:
        return False


def _validation(dataset: Dataset, config: RunConfig) -> Batch | None:
    count = config.training.validation_sequences if dataset.validation.sequences else 0
    return read_validation(dataset, count) if count else None
