"""Runs one rank's program in its order. What comes when is the program's; how it is done, the handlers'.

Every handler leaves spans: compute, exchange (dispatch and combine), pipeline (waiting for a neighbour's tensor), reduce.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

from actors.comm.links import Links
from actors.model.chunk import Chunk, Microbatch, Segment
from actors.model.weights import WeightGradients
from orchestrator.schedule.actions import Compute, Kind, Pair, Payload, Program, Transfer
from orchestrator.schedule.spans import Lane, Span


class ActionFailed(RuntimeError):
    """An action of the program raised. The cause is chained; the caller aborts the process groups."""

    def __init__(self, generation: int, position: int, action: object, cause: BaseException):
        self.generation, self.position, self.action = generation, position, str(action)
        super().__init__(f"generation {generation}, position {position}, action {action}: {type(cause).__name__}: {cause}")


@dataclass
class StepWork:
    """What one run of a program works on. `tapes`: by (slot, microbatch)."""

    tapes: Mapping[tuple[int, int], Microbatch]
    links: Links
    reduce: Callable[[], None]
    spans: list[Span] = field(default_factory=list)
    deferred: dict[tuple[int, int], list[Callable[[], None]]] = field(default_factory=dict)


class Executor:
    """`chunks`: this rank's stages by slot. `queue`: where their backward passes put weight gradients."""

    def __init__(self, rank: int, generation: int, chunks: Mapping[int, Chunk], queue: WeightGradients):
        self._rank, self._generation, self._chunks, self._queue = rank, generation, chunks, queue
        self._handlers = {
            Kind.FORWARD: self._forward, Kind.BACKWARD: self._backward, Kind.BACKWARD_INPUT: self._backward_input,
            Kind.BACKWARD_WEIGHT: self._backward_weight, Kind.PAIR: self._pair, Kind.SEND: self._send,
            Kind.RECEIVE: self._receive, Kind.REDUCE: self._reduce,
        }
        if missing := set(Kind) - self._handlers.keys():
            raise ValueError(f"no handler for {sorted(missing)}")

    def run(self, program: Program, work: StepWork) -> None:
        """One step. Raises ActionFailed."""
        action: object = "start"
        try:
            for action in program.actions:
                self._handlers[action.kind](action, work)
            action = "drain sends"
            work.links.drain()
        except Exception as error:
            raise ActionFailed(self._generation, program.position, action, error) from error

    def _forward(self, action: Compute, work: StepWork) -> None:
        chunk, tape = self._chunks[action.slot], work.tapes[action.slot, action.microbatch]
        if not chunk.first:
            with self._span(work, Lane.PIPELINE, action):
                tape.input = work.links.take(Payload.ACTIVATION, action.slot, action.microbatch)
        for segment in chunk.forward(tape):
            self._segment(segment, action, work)

    def _backward(self, action: Compute, work: StepWork) -> None:
        for segment in self._backward_segments(action, work):
            self._segment(segment, action, work)
            with self._span(work, Lane.COMPUTE, action):
                self._queue.flush()

    def _backward_input(self, action: Compute, work: StepWork) -> None:
        for segment in self._backward_segments(action, work):
            self._segment(segment, action, work)
        work.deferred[action.slot, action.microbatch] = self._queue.take()

    def _backward_weight(self, action: Compute, work: StepWork) -> None:
        with self._span(work, Lane.COMPUTE, action):
            for accumulate in work.deferred.pop((action.slot, action.microbatch)):
                accumulate()

    def _backward_segments(self, action: Compute, work: StepWork) -> list[Segment]:
        chunk, tape = self._chunks[action.slot], work.tapes[action.slot, action.microbatch]
        if not chunk.last:
            with self._span(work, Lane.PIPELINE, action):
                tape.output_gradient = work.links.take(Payload.GRADIENT, action.slot, action.microbatch)
        return chunk.backward(tape)

    def _pair(self, pair: Pair, work: StepWork) -> None:
        self._forward(pair.forward, work)
        self._backward(pair.backward, work)

    def _send(self, transfer: Transfer, work: StepWork) -> None:
        tape = work.tapes[transfer.slot, transfer.microbatch]
        if transfer.payload is Payload.ACTIVATION:
            tensor, tape.output = tape.output, None
        else:
            tensor, tape.input_gradient = tape.input_gradient, None
        work.links.send(transfer, tensor)

    def _receive(self, transfer: Transfer, work: StepWork) -> None:
        work.links.post(transfer)

    def _reduce(self, action: object, work: StepWork) -> None:
        work.links.drain()
        with self._span(work, Lane.REDUCE, action):
            work.reduce()

    def _segment(self, segment: Segment, action: Compute, work: StepWork) -> None:
        layer = f" {segment.layer}" if segment.layer >= 0 else ""
        with self._span(work, segment.lane, f"{action} {segment.name}{layer}"):
            segment.run()

    @contextmanager
    def _span(self, work: StepWork, lane: Lane, label: object) -> Iterator[None]:
        start = time.perf_counter()
        yield
        work.spans.append(Span(self._rank, lane.value, str(label), start, time.perf_counter()))
