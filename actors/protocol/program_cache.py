"""Programs before they are needed: for the layout of the day, and beside the training for those that one loss would leave.

To find and check a schedule may take seconds, for searched ones and large pipelines; a recovery is to take about one in all.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator, Sequence

from orchestrator.config.run_config import RunConfig
from orchestrator.data import order
from orchestrator.layout.layout import Layout
from orchestrator.plan.scheduling import dealt, programs_for
from orchestrator.recovery.relayout import relaid
from orchestrator.refusal import ConfigError
from orchestrator.schedule.ir.actions import Program
from orchestrator.schedule.ir.stages import Stages
from orchestrator.topology import Node

logger = logging.getLogger(__name__)

_KEPT = 64
Programs = tuple[Program, ...]


class Ahead:
    """Makes programs and keeps them. config: the run's, as it was given."""

    def __init__(self, config: RunConfig):
        self._config = config
        self._lock = threading.Lock()
        self._made: dict[tuple, Programs] = {}
        self._thread: threading.Thread | None = None

    def programs(self, config: RunConfig, stages: Stages, microbatches: int, *, training: bool) -> Programs:
        """One per position. Raises ConfigError, ScheduleError."""
        key = _key(config, stages, microbatches, training)
        with self._lock:
            found = self._made.get(key)
        if found is None:
            found = programs_for(config, stages, microbatches, training=training)
            with self._lock:
                self._made[key] = found
                while len(self._made) > _KEPT:
                    del self._made[next(iter(self._made))]
        return found

    def after_one_loss(self, nodes: Sequence[Node], layout: Layout, step: int) -> threading.Thread:
        """Begin to make those of the layouts that the loss of a node, or of a rank, would leave; unless that is still under way
        for another layout. Returns the thread."""
        if self._thread is None or not self._thread.is_alive():
            self._thread = threading.Thread(target=self._prepare, args=(tuple(nodes), layout, step), name="ahead", daemon=True)
            self._thread.start()
        return self._thread

    def _prepare(self, nodes: tuple[Node, ...], layout: Layout, step: int) -> None:
        for left in _left(nodes):
            try:
                found = relaid(self._config, left, layout)
                self.programs(found.config, found.layout.folding, _microbatches(found.config, found.layout, step), training=True)
            except ConfigError as error:  # there is no such layout: the recovery would say so
                logger.info("nothing to prepare for %s: %s", left, error)


def _left(nodes: tuple[Node, ...]) -> Iterator[tuple[Node, ...]]:
    """What one loss leaves. Of nodes with as many ranks the first and the last: the others are like them."""
    of_size: dict[int, list[int]] = {}
    for index, node in enumerate(nodes):
        of_size.setdefault(node.ranks, []).append(index)
    for size, indexes in of_size.items():
        for index in dict.fromkeys((indexes[-1], indexes[0])):
            if len(nodes) > 1:
                yield nodes[:index] + nodes[index + 1 :]
            if size > 1:
                yield (*nodes[:index], Node(nodes[index].name, size - 1), *nodes[index + 1 :])


def _microbatches(config: RunConfig, layout: Layout, step: int) -> int:
    return dealt(config, layout, order.batch_size(config.training, step), training=True).microbatches


def _key(config: RunConfig, stages: Stages, microbatches: int, training: bool) -> tuple:
    return config.schedule, repr(config.layout.layers_per_stage), stages, microbatches, training
