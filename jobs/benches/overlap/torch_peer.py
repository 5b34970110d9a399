"""The peer: the same stages under torch's ScheduleDualPipeV, whose dispatch and combine are blocking `all_to_all_single`.

A stage is an autograd function that holds and communicates in the order of its layers, so a stage costs torch little besides.
Every token goes to every rank of the EP group, as with us; torch sends it to each of them.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import pipelining
from torch.distributed.pipelining import schedules

from jobs.benches.overlap.held import LaneRecord, Seconds
from jobs.benches.schedule.torch_peer import HeldStage, _Loss
from jobs.benches.shared.held_lane import HeldLane, entering
from orchestrator.schedule.ir.spans import Lane, Span


class BlockingExchange:
    """all_to_all_single of an EP group, `count` rows [hidden] to each member."""

    def __init__(self, group: dist.ProcessGroup, count: int, hidden: int):
        self._group, members, member = group, group.size(), group.rank()
        self._sent = torch.zeros(members * count, hidden)
        self._sent[:, 0] = torch.arange(member * count, (member + 1) * count).repeat(members)
        self._received, self._wanted = torch.empty_like(self._sent), torch.arange(members * count, dtype=torch.float32)

    def run(self) -> None:
        """Raises RuntimeError: other rows came than were sent."""
        self._received[:, 0] = -1
        dist.all_to_all_single(self._received, self._sent, group=self._group)
        if not torch.equal(self._received[:, 0], self._wanted):
            raise RuntimeError("all_to_all_single: other numbers arrived than were sent")


class _Layers:
    """The lane as a HeldStage knows it: holding it for F or I is to pass a stage's layers."""

    def __init__(self, rank: int, lane: HeldLane, exchange: BlockingExchange, journal: LaneRecord, seconds: Seconds, layers: int):
        self._rank, self._lane, self._exchange, self._journal = rank, lane, exchange, journal
        self._seconds, self._layers = seconds, layers
        self.spans: list[Span] = []

    def hold(self, kind: str, stage: int, seconds: float, work: Callable[[], Tensor | None], *, end: bool = False
             ) -> Tensor | None:
        own = {"F": self._seconds.forward, "I": self._seconds.backward_input, "W": self._seconds.backward_weight}[kind]
        for layer in range(self._layers):
            for half in range(2):
                if kind == "I":
                    self._communicate(kind, stage, layer)
                self._compute(kind, stage, layer, own)
                if kind == "F":
                    self._communicate(kind, stage, layer)
        result = work()
        if end:
            self._lane.sums[kind] += float(result[0, 0])
        return result

    def _compute(self, kind: str, stage: int, layer: int, seconds: float) -> None:
        started = time.perf_counter()
        self._lane.hold(kind, stage, seconds, lambda: None)
        self.spans.append(Span(self._rank, Lane.COMPUTE, kind, started, time.perf_counter()))
        self._journal.holds.append((kind, stage, 0, layer))

    def _communicate(self, kind: str, stage: int, layer: int) -> None:
        started = time.perf_counter()
        self._exchange.run()
        self.spans.append(Span(self._rank, Lane.EXCHANGE, kind, started, time.perf_counter()))
        self._journal.exchanges.append((kind, stage, 0, layer))


class TorchDualPipeV:
    """One rank's share. `line`: torch's group of its pipeline; layers: of each of its two stages; elements: of a message."""

    def __init__(self, rank: int, lane: HeldLane, exchange: BlockingExchange, journal: LaneRecord, seconds: Seconds,
                 line: dist.ProcessGroup, layers: int, microbatches: int, elements: int):
        self._layers = _Layers(rank, lane, exchange, journal, seconds, layers)
        position, count = line.rank(), 2 * line.size()
        example = torch.zeros(1, elements, requires_grad=True)
        stages = [pipelining.PipelineStage(HeldStage(self._layers, index, count, 0.0), index, count, torch.device("cpu"),
                                           input_args=example if index else example.detach(), output_args=example, group=line)
                  for index in (position, count - 1 - position)]
        self._schedule = schedules.ScheduleDualPipeV(stages, microbatches, scale_grads=False,
                                                     loss_fn=lambda output, target: _Loss.apply(output))
        self._inputs = (torch.cat([entering(n, elements) for n in range(microbatches)]),) if position == 0 else ()
        self._target = torch.zeros(microbatches, 1) if position == 0 else None

    def prepare(self) -> None:
        self._layers.spans.clear()

    def run(self) -> None:
        self._schedule.step(*self._inputs, target=self._target, return_outputs=False)

    def spans(self) -> list[Span]:
        return list(self._layers.spans)

    def shares(self) -> tuple[Any, ...]:
        """There is no pair whose parts run at once."""
        return ()
