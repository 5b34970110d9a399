"""Ranks on nodes whose links are slow in truth, and what is measured there: costs alone, and steps."""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Self

from actors.hosts.processes import ProcessRanks
from actors.hosts.seated_answers import call
from jobs.benches.overlap.held import Seconds
from jobs.benches.overlap.rank import OverlapStep, OverlapTask, Torch, overlap_rank
from jobs.benches.shared.networks import Network
from orchestrator.config.run_config import RunConfig
from orchestrator.layout.layout import Layout
from orchestrator.schedule.ir.stages import BOTH, Stages

_TIMEOUT_SECONDS = 300.0
_LEAD_SECONDS = 0.03


@dataclass(frozen=True)
class ClusterShape:
    """`nodes` nodes with one whole pipeline each: `pipeline` positions, `width` ranks at each. A node is a row."""

    nodes: int
    pipeline: int
    width: int = 1

    @property
    def name(self) -> str:
        return f"PP{self.pipeline}xEP{self.members}"

    @property
    def members(self) -> int:
        """Of an EP group."""
        return self.nodes * self.width

    @property
    def ranks_per_node(self) -> int:
        return self.pipeline * self.width

    @property
    def layout(self) -> Layout:
        cells = tuple(((f"node-{node}", 0),) for node in range(self.nodes))
        return Layout(Stages(BOTH, self.pipeline), self.pipeline, self.width, cells, (tuple(range(self.nodes)),))


@dataclass(frozen=True)
class Alone:
    """Seconds of what a step is made of, each measured with nothing else going on but the same on every rank. Holds and hops:
    medians. Exchanges: means, since what delays some of them now and then does so in a step as well.

    exchange: each of the four exchanges of a layer, by position. blocking: torch's all_to_all_single of a dispatch's rows.
    """

    hold: float
    hold_jitter: float
    exchange: tuple[dict[str, float], ...]
    blocking: float
    hop: float

    def dispatches(self, position: int) -> float:
        """Of exchanges that send like a dispatch, and back like a combine: both directions of training do one of each."""
        return (self.exchange[position]["dispatch"] + self.exchange[position]["combine_backward"]) / 2

    def combines(self, position: int) -> float:
        return (self.exchange[position]["combine"] + self.exchange[position]["dispatch_backward"]) / 2

    @property
    def layer(self) -> float:
        """All four, mean over positions."""
        return statistics.mean(sum(found.values()) for found in self.exchange)


@dataclass(frozen=True)
class TokenPayload:
    """`count` tokens of a rank, `hidden` floats each."""

    count: int
    hidden: int


@dataclass(frozen=True)
class ClusterStep:
    """A step: its seconds, what every rank says of it, bytes that every interface sent and received."""

    seconds: float
    steps: list[OverlapStep]
    sent: list[int]
    received: list[int]


class Cluster:
    """One process a rank, in its node's namespace; an interface of `megabits` for each rank. A context manager.

    Raises NetworkRefused.
    """

    def __init__(self, config: RunConfig, shape: ClusterShape, megabits: float):
        self.shape, self.layout = shape, shape.layout
        with ExitStack() as stack:
            self.network = stack.enter_context(Network(shape.nodes, megabits, shape.ranks_per_node))
            self._interfaces = [self.network.interface(node, local) for node in range(shape.nodes)
                                for local in range(shape.ranks_per_node)]
            own = [(found.namespace, found.address) for found in self._interfaces]
            self._ranks = stack.enter_context(ProcessRanks(config, self.layout.size, overlap_rank, own, start_method="forkserver"))
            meeting = self._interfaces[0].address
            self._everywhere("open", each=[(rank, self.layout, meeting) for rank in range(self.layout.size)])
            self._stack = stack.pop_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.close()

    def slow_down(self, node: int, local: int, megabits: float) -> None:
        """Another rate of one rank's interface."""
        self.network.set_rate(self.network.interface(node, local), megabits)

    # --- alone ---------------------------------------------------------------------------------------------------

    def alone(self, payload: TokenPayload, seconds: float, repeats: int) -> Alone:
        """seconds: of a hold."""
        holds = [taken for found in self._everywhere("hold_times", seconds, repeats) for taken in found]
        return Alone(statistics.median(holds), statistics.stdev(holds), self.exchange(payload, repeats),
                     self._blocking(payload, repeats), self._hop(payload, seconds, repeats))

    def exchange(self, payload: TokenPayload, repeats: int) -> tuple[dict[str, float], ...]:
        found = self._everywhere("exchange_times", payload.count, payload.hidden, repeats + 2)
        by_position = []
        for position in range(self.shape.pipeline):
            mine = [times for rank in self.layout.expert_group(0, position) for times in found[rank][2:]]
            by_position.append({name: statistics.mean(times[name] for times in mine) for name in mine[0]})
        return tuple(by_position)

    def _blocking(self, payload: TokenPayload, repeats: int) -> float:
        found = self._everywhere("blocking_times", payload.count, payload.hidden, repeats + 2)
        return statistics.mean(taken for times in found for taken in times[2:])

    def _hop(self, payload: TokenPayload, pause: float, repeats: int) -> float:
        if self.shape.pipeline == 1:
            return 0.0
        found = self._everywhere("ping_pong", payload.count, payload.hidden, pause, repeats)
        one, other = (found[rank] for rank in self.layout.line(0, 0)[:2])
        return statistics.median(max(a[1], b[1]) - max(a[0], b[0]) for a, b in zip(one, other, strict=True))

    # --- steps ---------------------------------------------------------------------------------------------------

    def prepare(self, tasks: Sequence[Mapping[str, OverlapTask | Torch]], payload: TokenPayload, seconds: Seconds) -> None:
        """tasks: of every position, by contestant."""
        mine = [tasks[place.position] for place in self.layout.places]
        self._everywhere("prepare", payload.count, payload.hidden, seconds, each=[(task,) for task in mine])

    def step(self, name: str, factor: float = 1.0, traced: bool = False) -> ClusterStep:
        """Raises RuntimeError: it was not the work of a step, or not in the order of its schedule."""
        self._everywhere("ready", name, factor)
        before = self.network.traffic()
        start = time.perf_counter() + _LEAD_SECONDS
        steps: list[OverlapStep] = self._everywhere("go", start, traced)
        after = self.network.traffic()
        if wrong := [rank for rank, step in enumerate(steps) if not step.complete]:
            raise RuntimeError(f"{name}: ranks {wrong} did other work, or in another order, than their schedule says")
        for position in range(self.shape.pipeline):
            group = self.layout.expert_group(0, position)
            if len({steps[rank].order for rank in group}) > 1:
                raise RuntimeError(f"{name}: ranks {group} communicated in different orders")
        passed = [after[found.node, found.index].since(before[found.node, found.index]) for found in self._interfaces]
        return ClusterStep(max(step.end for step in steps) - start, steps, [traffic.sent for traffic in passed],
                           [traffic.received for traffic in passed])

    def _everywhere(self, method: str, *arguments: Any, each: Sequence[tuple] | None = None) -> list[Any]:
        """Call all ranks; each: with arguments of its own first."""
        own = each if each is not None else [()] * self.layout.size
        return call(self._ranks, method, [(*first, *arguments) for first in own], _TIMEOUT_SECONDS)


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
