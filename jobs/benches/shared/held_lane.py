"""A compute lane that is held for a set time instead of computing, and stages that hold it: for our executor.

What the peer's stages do (`schedule_torch.py`) is the same: the same hold, the same tensors, the same numbers in them.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

from actors.model.segment import Lane, Segment
from actors.model.tape import Microbatch
from actors.model.weights import WeightGradients

_SET_TIMER_SLACK = 29  # prctl; see prctl(2)
T = TypeVar("T")


def exact_sleep() -> None:
    """Have this thread, and those it starts, wake when asked to: Linux otherwise sleeps up to 50 us longer."""
    ctypes.CDLL(None).prctl(_SET_TIMER_SLACK, 1, 0, 0, 0)


def sleep_until(deadline: float) -> None:
    """Sleep, never spin (other ranks want the core). `deadline`: seconds of time.perf_counter, one clock for all processes."""
    if (left := deadline - time.perf_counter()) > 0:
        time.sleep(left)


def next_of(given: Tensor) -> Tensor:
    """A new tensor like [1, n] `given` whose first number is one more; the others are whatever the memory holds, for a lane
    is held by the clock, and the cores that all ranks share are left to their runtimes."""
    made = torch.empty_like(given)
    torch.add(given[:, :1], 1, out=made[:, :1])
    return made


class HeldLane:
    """One rank's compute lane. `factor`: on all durations; warm-ups are short.

    `log`: every hold in order, as (kind, stage) with kind F, I or W.
    `sums`: of the first numbers of what leaves the last stage and, as gradients, the first one.
    """

    def __init__(self) -> None:
        self.factor = 1.0
        self.log: list[tuple[str, int]] = []
        self.sums = {"F": 0.0, "I": 0.0}

    def reset(self, factor: float) -> None:
        self.factor, self.log, self.sums = factor, [], {"F": 0.0, "I": 0.0}

    def hold(self, kind: str, stage: int, seconds: float, work: Callable[[], T], *, end: bool = False) -> T:
        """Do `work`, which must take less, and return its result when `seconds` have passed since the call.

        end: whether the result's numbers are to be added to `sums`.
        """
        deadline = time.perf_counter() + seconds * self.factor
        result = work()
        self.log.append((kind, stage))
        if end:
            self.sums[kind] += float(result[0, 0])
        sleep_until(deadline)
        return result


class HeldChunk:
    """A stage as the executor knows it. F and I make a new tensor each, whose first number counts the stages passed.

    stages: of the model. seconds: of each of F, I and W.
    A microbatch enters as `tape.tokens`, a tensor of the shape of all messages, and its gradient as ones.
    """

    def __init__(self, lane: HeldLane, queue: WeightGradients, stage: int, stages: int, seconds: float):
        self.first, self.last = stage == 0, stage == stages - 1
        self._lane, self._queue, self._stage, self._seconds = lane, queue, stage, seconds

    def forward(self, tape: Microbatch) -> list[Segment]:
        def run() -> None:
            given = tape.tokens if self.first else tape.input
            tape.output = self._lane.hold("F", self._stage, self._seconds, lambda: next_of(given), end=self.last)
            if self.last:
                tape.hidden, tape.output = tape.output, None
        return [Segment(Lane.COMPUTE, "forward", -1, run)]

    def backward(self, tape: Microbatch) -> list[Segment]:
        def run() -> None:
            given = torch.ones_like(tape.hidden) if self.last else tape.output_gradient
            found = self._lane.hold("I", self._stage, self._seconds, lambda: next_of(given), end=self.first)
            tape.input_gradient = None if self.first else found
            tape.input = tape.output_gradient = tape.hidden = None
            self._queue.defer(lambda: self._lane.hold("W", self._stage, self._seconds, lambda: None))
        return [Segment(Lane.COMPUTE, "backward", -1, run)]


def expected_sums(microbatches: int, entrances: int, stages: int) -> dict[str, float]:
    """What all ranks' `sums` add up to after a step whose microbatches, in each entrance, enter as 0, 1, 2, ..."""
    each = microbatches // entrances
    return {"F": float(entrances * (each * (each - 1) // 2 + each * stages)), "I": float(microbatches * (1 + stages))}


def entering(microbatch: int, elements: int) -> Tensor:
    """[1, elements] float32: what enters the pipeline."""
    return torch.full((1, elements), float(microbatch))
