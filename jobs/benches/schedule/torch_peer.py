"""The peer: torch.distributed.pipelining with stages that hold the lane for the same times and send the same tensors.

A stage's graph is  x, w -> (w: weight) -> join -> input -> y : `input` holds F, and I in backward; `weight` holds W. Its
zero-bubble schedules split a backward at the node where weights and input meet, which they then run in both parts, so that
node (`join`) holds nothing. In B both parts are held, I first.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import pipelining
from torch.distributed.pipelining import schedules

from jobs.benches.shared.held_lane import HeldLane, entering, next_of

CHUNKS = {
    "Schedule1F1B": 1, "ScheduleGPipe": 1, "ScheduleInterleaved1F1B": 2, "ScheduleInterleavedZeroBubble": 2,
    "ScheduleZBVZeroBubble": 2, "ScheduleDualPipeV": 2,
}
"""Stages a rank of every schedule that takes part, by the name of its class."""
_V = ("ScheduleZBVZeroBubble", "ScheduleDualPipeV")


class _Input(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, stage: HeldStage) -> Tensor:
        ctx.stage = stage
        return stage.lane.hold("F", stage.index, stage.seconds, lambda: next_of(x), end=stage.last)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        stage = ctx.stage
        return stage.lane.hold("I", stage.index, stage.seconds, lambda: next_of(gradient), end=stage.index == 0), None


class _Join(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        return gradient, gradient.new_zeros(1)


class _Weight(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, stage: HeldStage) -> Tensor:
        ctx.stage = stage
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        stage = ctx.stage
        stage.lane.hold("W", stage.index, stage.seconds, lambda: None)
        return gradient, None


class _Loss(torch.autograd.Function):
    """Costs nothing; its gradient is ones."""

    @staticmethod
    def forward(ctx: Any, output: Tensor) -> Tensor:
        ctx.shape = output.shape
        return output.new_zeros(())

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient.expand(ctx.shape)


class HeldStage(nn.Module):
    """Stage `index` of `stages`. seconds: of each of F, I and W."""

    def __init__(self, lane: HeldLane, index: int, stages: int, seconds: float):
        super().__init__()
        self.lane, self.index, self.last, self.seconds = lane, index, index == stages - 1, seconds
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        return _Input.apply(_Join.apply(x, _Weight.apply(self.weight, self)), self)


class TorchSchedule:
    """One rank's share of a schedule of torch's. `seconds`: of F, I and W of a whole rank.

    Shapes are given, so that it need not find them; no output is merged and no gradient scaled. That is its cheapest use.
    """

    def __init__(self, name: str, lane: HeldLane, rank: int, ranks: int, microbatches: int, elements: int, seconds: float):
        chunks = CHUNKS[name]
        count = ranks * chunks
        loops = [chunk * ranks + (ranks - 1 - rank if name in _V and chunk % 2 else rank) for chunk in range(chunks)]
        example = torch.zeros(1, elements, requires_grad=True)
        stages = [pipelining.PipelineStage(HeldStage(lane, index, count, seconds / chunks), index, count, torch.device("cpu"),
                                           input_args=example if index else example.detach(), output_args=example)
                  for index in loops]
        kind = getattr(schedules, name)
        self._schedule = kind(stages if chunks > 1 else stages[0], microbatches, scale_grads=False,
                              loss_fn=lambda output, target: _Loss.apply(output))
        self._inputs = (torch.cat([entering(n, elements) for n in range(microbatches)]),) if rank == 0 else ()
        last = count - 1 in loops
        self._target = torch.zeros(microbatches, 1) if last else None
        self.order = self._schedule.pipeline_order[rank]

    def prepare(self) -> None:
        """Nothing outlives a step that the next one would have to clear."""

    def run(self) -> None:
        self._schedule.step(*self._inputs, target=self._target, return_outputs=False)

    def holds(self) -> list[tuple[str, int]]:
        """The order in which it should hold the lane, by its own plan. It leaves out the I of the first stage, whose input
        needs no gradient, and runs it with the W."""
        found: list[tuple[str, int]] = []
        for action in self.order:
            for part in (action.sub_actions or (action,)) if action is not None else ():
                kind, stage = part.computation_type.value, part.stage_index
                parts = {"F": "F", "B": "IW", "I": "I" if stage else "", "W": "W" if stage else "IW"}.get(kind, "")
                found += [(held, stage) for held in parts]
        return found
