"""A rank that misbehaves when it is told to, through a few bytes of a file that it shares with whoever strikes: an order waits
there for whatever process has the node next, and costs it nothing to look for."""

from __future__ import annotations

import mmap
import os
import signal
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from actors.model.segment import Lane, Segment
from actors.runtime.rank import Rank
from jobs.benches.churn.rank import Home
from jobs.benches.shared.networks import enter
from orchestrator.config.run_config import RunConfig
from orchestrator.layout.placement import Placement

HANG, SLOW, RAISE = "hang", "slow", "raise"
"""In a compute segment: for ever; a bit longer in each; once."""
NO_MEMORY, NO_MEMORY_LATER, DIE, HANG_AS_IT_FORMS = "no memory", "no memory to carry over", "die", "hang as it forms"
"""Of whoever forms a generation: as often as the order says."""
_ORDERS = (HANG, SLOW, RAISE, NO_MEMORY, NO_MEMORY_LATER, DIE, HANG_AS_IT_FORMS)
_SLOW_SECONDS = 0.002


class InjectedError(RuntimeError):
    """A rank was told to raise."""


class Orders:
    """One byte for each order and node: how often it is to be carried out."""

    def __init__(self, path: Path, nodes: Sequence[str]):
        self._row = {node: index * len(_ORDERS) for index, node in enumerate(nodes)}
        size = len(nodes) * len(_ORDERS)
        if not path.exists():
            path.write_bytes(bytes(size))
        with open(path, "r+b") as stream:
            self._bytes = mmap.mmap(stream.fileno(), size)

    def give(self, node: str, order: str, count: int = 1) -> None:
        self._bytes[self._at(node, order)] = count

    def left(self, node: str, order: str) -> int:
        return self._bytes[self._at(node, order)]

    def take(self, node: str, order: str) -> bool:
        """Whether it is to be carried out, which is then one time less."""
        at = self._at(node, order)
        left = self._bytes[at]
        if left:
            self._bytes[at] = left - 1
        return left > 0

    def _at(self, node: str, order: str) -> int:
        return self._row[node] + _ORDERS.index(order)


def chaos_rank(config: RunConfig, path: Path, nodes: Sequence[str], node: str, home: Home) -> Rank:
    """What a process hosts."""
    if home.namespace is not None:
        enter(home.namespace)
    return ChaosRank(config, home.address, Orders(path, nodes), node)


class ChaosRank(Rank):
    def __init__(self, config: RunConfig, host: str, orders: Orders, node: str):
        super().__init__(config, host)
        self._orders, self._node = orders, node

    def form(self, assignment: Any) -> Any:
        if self._orders.take(self._node, NO_MEMORY):
            raise MemoryError("no memory left")
        if self._orders.take(self._node, DIE):
            os.kill(os.getpid(), signal.SIGKILL)
        if self._orders.take(self._node, HANG_AS_IT_FORMS):
            threading.Event().wait()
        return super().form(assignment)

    def _carry_over(self, *arguments: Any) -> Any:
        if self._orders.take(self._node, NO_MEMORY_LATER):
            raise MemoryError("no memory left")
        return super()._carry_over(*arguments)

    def _set_up(self, placement: Placement) -> None:
        super()._set_up(placement)
        for chunk in self._chunks.values():
            chunk.forward, chunk.backward = self._obeying(chunk.forward), self._obeying(chunk.backward)

    def _obeying(self, segments_of: Callable[..., list[Segment]]) -> Callable[..., list[Segment]]:
        def obeying(tape: object) -> list[Segment]:
            return [replace(segment, run=self._first_obey(segment.run)) if segment.lane is Lane.COMPUTE else segment
                    for segment in segments_of(tape)]
        return obeying

    def _first_obey(self, run: Callable[[], None]) -> Callable[[], None]:
        orders, node = self._orders, self._node

        def obeyed() -> None:
            if orders.take(node, HANG):
                threading.Event().wait()
            if orders.take(node, RAISE):
                raise InjectedError("told to raise")
            if orders.left(node, SLOW):
                time.sleep(_SLOW_SECONDS)
            run()
        return obeyed
