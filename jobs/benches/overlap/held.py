"""Stages whose compute is held for set times and whose dispatch and combine are real: for our executor.

A token is a row [h] of floats: the first number counts the layers that it has passed, from where it entered; the second is
the token's own number among all ranks of its EP group; the rest are zeros that travel with them. Every token chooses one
expert on every rank, and experts hand on what they get, so a combine gives each token as often as there are ranks. Whoever
receives knows what it must have got, and every exchange is checked.
Name suffixes: t tokens, k experts, h hidden.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from actors.model.segment import Lane, Segment
from actors.model.tape import Microbatch
from actors.model.weights import WeightGradients
from jobs.benches.shared.held_lane import HeldLane

Entry = tuple[str, int, int, int]
"""(F, I or W; slot; microbatch; layer)."""


class TokenExchange(Protocol):
    """What is needed of an ExpertExchange."""

    def announce(self, choice_tk: Tensor) -> Any: ...

    def dispatch(self, x_th: Tensor, weight_tk: Tensor, choice_tk: Tensor, announced: Any) -> Any: ...

    def combine(self, rows_y: Tensor, handle: Any) -> Tensor: ...

    def combine_backward(self, grad_th: Tensor, handle: Any) -> Tensor: ...

    def dispatch_backward(self, grad_rows: Tensor, grad_weights: Tensor, handle: Any) -> tuple[Tensor, Tensor]: ...


@dataclass(frozen=True)
class Seconds:
    """Of a hold: half a layer's forward, backward for the input, backward for the weights."""

    forward: float
    backward_input: float
    backward_weight: float


class LaneRecord:
    """What a rank did in a step, in order: holds of the compute lane, and exchanges, by the name of each."""

    def __init__(self) -> None:
        self.holds: list[Entry] = []
        self.exchanges: list[tuple[str, int, int, int]] = []


class Tokens:
    """What the ranks of an EP group send each other: `count` tokens each.

    member: of this rank in the group, `members` in all. A power of two, so that sums and quotients are exact.
    """

    def __init__(self, exchange: TokenExchange, member: int, members: int, count: int, hidden: int):
        if members & (members - 1):
            raise ValueError(f"{members} members: a power of two")
        self.exchange, self.members, self.count, self.hidden = exchange, members, count, hidden
        self._own = torch.arange(member * count, (member + 1) * count, dtype=torch.float32)
        self._all = torch.arange(members * count, dtype=torch.float32)
        self._choice = torch.arange(members).expand(count, members).contiguous()
        self._weight = torch.ones(count, members)

    def entering(self, number: int) -> Tensor:
        """[t, h]: this rank's tokens as they enter, with `number` as first number."""
        made = torch.zeros(self.count, self.hidden)
        made[:, 0], made[:, 1] = number, self._own
        return made

    def announce(self) -> Any:
        return self.exchange.announce(self._choice)

    def dispatch(self, x_th: Tensor, announced: Any, passed: float) -> tuple[Tensor, Any]:
        """The rows that come for this rank's expert, and the handle. Raises RuntimeError: they are not what was sent."""
        sent = self.exchange.dispatch(x_th, self._weight, self._choice, announced)
        self._check_rows("dispatch", sent.rows, passed)
        return sent.rows, sent.handle

    def combine(self, rows: Tensor, handle: Any, passed: float) -> Tensor:
        return self._back("combine", self.exchange.combine(rows, handle), passed)

    def combine_backward(self, grad_th: Tensor, handle: Any, passed: float) -> Tensor:
        rows = self.exchange.combine_backward(grad_th, handle)
        self._check_rows("combine_backward", rows, passed)
        return rows

    def dispatch_backward(self, rows: Tensor, handle: Any, passed: float) -> Tensor:
        found, _ = self.exchange.dispatch_backward(rows, rows.new_zeros(rows.shape[0]), handle)
        return self._back("dispatch_backward", found, passed)

    def _back(self, what: str, sum_th: Tensor, passed: float) -> Tensor:
        """Tokens that have come back from `members` experts, one layer further."""
        mean = sum_th.div_(self.members)
        if not (torch.equal(mean[:, 1], self._own) and bool((mean[:, 0] == passed).all())):
            raise RuntimeError(f"{what}: other numbers came back than were sent")
        mean[:, 0] += 1
        return mean

    def _check_rows(self, what: str, rows: Tensor, passed: float) -> None:
        if not (torch.equal(rows[:, 1].sort().values, self._all) and bool((rows[:, 0] == passed).all())):
            raise RuntimeError(f"{what}: other numbers arrived than were sent")


@dataclass(slots=True)
class Tape(Microbatch):
    """`number`: of the microbatch. `handles`: of its dispatches, by layer; of one to come, what was announced."""

    number: int = 0
    handles: dict[int, Any] | None = None


class LayeredChunk:
    """A stage of `layers` layers as the executor knows it.

    tokens: None: no exchanges, compute only. entered: layers before this stage, of which there are `total` in the model.
    """

    def __init__(self, lane: HeldLane, queue: WeightGradients, tokens: Tokens, journal: LaneRecord, seconds: Seconds, *, slot: int,
                 layers: int, entered: int, total: int, communicates: bool = True):
        self.first, self.last = entered == 0, entered + layers == total
        self._lane, self._queue, self._tokens, self._journal, self._seconds = lane, queue, tokens, journal, seconds
        self._slot, self._layers, self._entered, self._after = slot, layers, entered, total - entered - layers
        self._communicates = communicates

    def forward(self, tape: Tape) -> list[Segment]:
        """First to last layer: attention, dispatch, experts, combine."""
        tape.handles = {}
        segments: list[Segment] = []
        for layer in range(self._layers):
            segments += self._layer(tape, layer, [
                (Lane.COMPUTE, "attention", self._attention), (Lane.EXCHANGE, "dispatch", self._dispatch),
                (Lane.COMPUTE, "experts", self._experts), (Lane.EXCHANGE, "combine", self._combine)])
        return segments

    def backward(self, tape: Tape) -> list[Segment]:
        """Last to first layer: combine, experts, dispatch, attention."""
        segments: list[Segment] = []
        for layer in reversed(range(self._layers)):
            segments += self._layer(tape, layer, [
                (Lane.EXCHANGE, "combine", self._combine_backward), (Lane.COMPUTE, "experts", self._experts_backward),
                (Lane.EXCHANGE, "dispatch", self._dispatch_backward), (Lane.COMPUTE, "attention", self._attention_backward)])
        return segments

    def _layer(self, tape: Tape, layer: int, parts: list[tuple[Lane, str, Callable[[Tape, int], None]]]) -> list[Segment]:
        return [Segment(lane, name, layer, lambda run=run: run(tape, layer)) for lane, name, run in parts
                if self._communicates or lane is Lane.COMPUTE]

    # --- forward -------------------------------------------------------------------------------------------------

    def _attention(self, tape: Tape, layer: int) -> None:
        if layer == 0:
            tape.hidden = self._tokens.entering(tape.number) if self.first else tape.input
        self._hold("F", tape, layer, self._seconds.forward)
        if self._communicates:
            tape.handles[layer] = self._tokens.announce()  # the gate, which comes last, has chosen

    def _dispatch(self, tape: Tape, layer: int) -> None:
        self._journal.exchanges.append(("dispatch", self._slot, tape.number, layer))
        passed = tape.number + self._entered + layer
        tape.hidden, tape.handles[layer] = self._tokens.dispatch(tape.hidden, tape.handles[layer], passed)

    def _experts(self, tape: Tape, layer: int) -> None:
        self._hold("F", tape, layer, self._seconds.forward)
        if layer == self._layers - 1 and not self._communicates:
            self._leave(tape)

    def _combine(self, tape: Tape, layer: int) -> None:
        self._journal.exchanges.append(("combine", self._slot, tape.number, layer))
        tape.hidden = self._tokens.combine(tape.hidden, tape.handles[layer], tape.number + self._entered + layer)
        if layer == self._layers - 1:
            self._leave(tape)

    def _leave(self, tape: Tape) -> None:
        tape.output = None if self.last else tape.hidden
        tape.hidden = tape.input = None

    # --- backward ------------------------------------------------------------------------------------------------

    def _enter_backward(self, tape: Tape, layer: int) -> None:
        if layer == self._layers - 1:
            tape.gradient = self._tokens.entering(tape.number) if self.last else tape.output_gradient
            tape.output_gradient = None

    def _combine_backward(self, tape: Tape, layer: int) -> None:
        self._enter_backward(tape, layer)
        self._journal.exchanges.append(("combine_backward", self._slot, tape.number, layer))
        tape.gradient = self._tokens.combine_backward(tape.gradient, tape.handles[layer], self._behind(tape, layer))

    def _experts_backward(self, tape: Tape, layer: int) -> None:
        if not self._communicates:
            self._enter_backward(tape, layer)
        self._hold_backward(tape, layer)

    def _dispatch_backward(self, tape: Tape, layer: int) -> None:
        self._journal.exchanges.append(("dispatch_backward", self._slot, tape.number, layer))
        tape.gradient = self._tokens.dispatch_backward(tape.gradient, tape.handles.pop(layer), self._behind(tape, layer))

    def _attention_backward(self, tape: Tape, layer: int) -> None:
        self._hold_backward(tape, layer)
        if layer == 0:
            tape.input_gradient = None if self.first else tape.gradient
            tape.gradient = None

    def _behind(self, tape: Tape, layer: int) -> int:
        return tape.number + self._after + self._layers - 1 - layer

    def _hold_backward(self, tape: Tape, layer: int) -> None:
        self._hold("I", tape, layer, self._seconds.backward_input)
        self._queue.defer(lambda: self._hold("W", tape, layer, self._seconds.backward_weight))

    def _hold(self, kind: str, tape: Tape, layer: int, seconds: float) -> None:
        self._lane.hold(kind, self._slot, seconds, lambda: None)
        self._journal.holds.append((kind, self._slot, tape.number, layer))
