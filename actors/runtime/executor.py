"""Runs one rank's program in its order. What comes when is the program's; how it is done, the handlers'.

Every handler leaves spans: compute, exchange (dispatch and combine), pipeline (waiting for a neighbour's tensor), reduce.
A compute action is operation streams whose segments are issued in the program's order (issuer.py): compute on the thread that
runs the program, exchanges on a lane of their own. A microbatch of which any action is split is in two parts from its forward on,
for no backward can be cut in two after a whole forward: all its actions have a stream for each part.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from torch import Tensor

from actors.comm.links import Links
from actors.comm.waiting import OperationCounter
from actors.model.chunk import Chunk, Microbatch
from actors.model.weights import WeightGradients
from actors.runtime.exchange_lane import Exchanges, InTurn
from actors.runtime.issuer import Closures, Issuer, SegmentStream
from orchestrator.schedule.ir.actions import ActionKind, Compute, Form, Payload, Program, SplitAction, Transfer, Work
from orchestrator.schedule.ir.operations import IssueOrder
from orchestrator.schedule.ir.spans import Lane, Span

Key = tuple[int, int]
"""(slot, microbatch)."""


class ActionFailed(RuntimeError):
    """An action of the program raised. The cause is chained; the caller aborts the process groups."""

    def __init__(self, generation: int, position: int, action: object, cause: BaseException):
        self.generation, self.position, self.action = generation, position, str(action)
        super().__init__(f"generation {generation}, position {position}, action {action}: {type(cause).__name__}: {cause}")


@dataclass
class StepWork:
    """What one run of a program works on.

    halved: microbatches that it cuts in two; parts: these, from their forward to the end of their backward. orders: of the
    program.
    """

    tapes: Mapping[Key, Microbatch]
    links: Links
    reduce: Callable[[], None]
    spans: list[Span] = field(default_factory=list)
    deferred: dict[Key, list[Closures]] = field(default_factory=dict)
    halved: frozenset[Key] = frozenset()
    parts: dict[Key, tuple[Microbatch, ...]] = field(default_factory=dict)
    orders: dict[Form, IssueOrder] = field(default_factory=dict)


class Executor:
    """Args:
        chunks: this rank's stages by slot.
        queue: where their backward passes put weight gradients.
        fed_by: slot -> the slot of this rank whose output is its input; slots that other ranks feed are left out.
        exchanges: where exchange segments run, beside the thread that calls `run`; None: in turn with the others, on that thread.
        progress: where finished actions are counted.
    """

    def __init__(self, rank: int, generation: int, chunks: Mapping[int, Chunk], queue: WeightGradients,
                 fed_by: Mapping[int, int] | None = None, exchanges: Exchanges | None = None,
                 progress: OperationCounter | None = None):
        self._rank, self._generation, self._chunks = rank, generation, chunks
        self._progress = progress or OperationCounter()
        self._fed_by = dict(fed_by or {})
        self._feeds = {source: slot for slot, source in self._fed_by.items()}
        self._issuer = Issuer(rank, queue, InTurn() if exchanges is None else exchanges)
        self._handlers = {
            ActionKind.FORWARD: self._compute, ActionKind.BACKWARD: self._compute, ActionKind.BACKWARD_INPUT: self._compute,
            ActionKind.BACKWARD_WEIGHT: self._compute, ActionKind.PAIR: self._compute, ActionKind.SPLIT: self._split,
            ActionKind.SEND: self._send,
            ActionKind.RECEIVE: self._receive, ActionKind.REDUCE: self._reduce,
        }
        self._streams_of = {ActionKind.FORWARD: self._forward, ActionKind.BACKWARD: self._backward,
                            ActionKind.BACKWARD_INPUT: self._backward,
                            ActionKind.BACKWARD_WEIGHT: self._weights}
        if missing := set(ActionKind) - self._handlers.keys():
            raise ValueError(f"no handler for {sorted(missing)}")

    def run(self, program: Program, work: StepWork) -> None:
        """One step. Raises ActionFailed."""
        action: object = "start"
        work.orders, work.halved = dict(program.orders), program.halved
        try:
            for action in program.actions:
                self._handlers[action.kind](action, work)
                self._progress.finished()
            action = "drain sends"
            work.links.drain()
        except Exception as error:
            raise ActionFailed(self._generation, program.position, action, error) from error

    # --- actions -------------------------------------------------------------------------------------------------

    def _compute(self, action: Work, work: StepWork) -> None:
        """Run the streams of its computes, then put together what the parts of each one's microbatch have made."""
        streams, form = [], []
        for compute in action.computes:
            streams += self._streams_of[compute.kind](compute, work)
            form.append((compute.kind, compute.slot, 1 + ((compute.slot, compute.microbatch) in work.halved)))
        self._issuer.run(streams, work.orders.get(tuple(form)), work.spans)
        for compute in action.computes if work.parts else ():
            key = compute.slot, compute.microbatch
            if compute.kind is ActionKind.FORWARD and key in work.parts:
                work.tapes[key].join_forward(work.parts[key])
            elif compute.kind in (ActionKind.BACKWARD, ActionKind.BACKWARD_INPUT) and key in work.parts:
                work.tapes[key].join_backward(work.parts.pop(key))

    def _split(self, split: SplitAction, work: StepWork) -> None:
        self._compute(split.whole, work)

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
        started = time.perf_counter()
        work.reduce()
        work.spans.append(Span(self._rank, Lane.REDUCE.value, str(action), started, time.perf_counter()))

    # --- compute actions as operation streams ------------------------------------------------------------------------------

    def _forward(self, action: Compute, work: StepWork) -> list[SegmentStream]:
        key = action.slot, action.microbatch
        chunk, tape = self._chunks[action.slot], work.tapes[key]
        if not chunk.first:
            tape.input = self._arrived(Payload.ACTIVATION, action, work)
        parts = (tape,)
        if key in work.halved:
            parts = work.parts[key] = tape.halves()
            tape.share_input(parts)
        label = str(action)
        return [SegmentStream(label, chunk.forward(part)) for part in parts]

    def _backward(self, action: Compute, work: StepWork) -> list[SegmentStream]:
        key = action.slot, action.microbatch
        chunk, tape = self._chunks[action.slot], work.tapes[key]
        if not chunk.last:
            tape.output_gradient = self._arrived(Payload.GRADIENT, action, work)
        parts = work.parts.get(key, (tape,))
        if len(parts) > 1:
            tape.share_output_gradient(parts)
        label, later = str(action), None
        if action.kind is ActionKind.BACKWARD_INPUT:
            later = work.deferred[key] = []
        return [SegmentStream(label, chunk.backward(part), True, later) for part in parts]

    def _weights(self, action: Compute, work: StepWork) -> list[SegmentStream]:
        return [SegmentStream(str(action), released=work.deferred.pop((action.slot, action.microbatch)))]

    # --- what a compute action works on --------------------------------------------------------------------------

    def _arrived(self, payload: Payload, action: Compute, work: StepWork) -> Tensor | None:
        """The tensor that another stage has made of this microbatch; None where it is empty.

        From another rank it is waited for. From another slot of this rank it is handed over: the same microbatch has the
        same number there. Raises ValueError: it was not made.
        """
        source = (self._fed_by if payload is Payload.ACTIVATION else self._feeds).get(action.slot)
        if source is None:
            started = time.perf_counter()
            tensor = work.links.take(payload, action.slot, action.microbatch)
            work.spans.append(Span(self._rank, Lane.PIPELINE.value, str(action), started, time.perf_counter()))
            return tensor
        maker = work.tapes[source, action.microbatch]
        if payload is Payload.ACTIVATION:
            tensor, maker.output = maker.output, None
        else:
            tensor, maker.input_gradient = maker.input_gradient, None
        if tensor is None and maker.sequences:
            raise ValueError(f"{action}: slot {source} of this rank has made no {payload}")
        return tensor
