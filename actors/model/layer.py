"""Decoder layers, cut into segments.

    forward   attention+gate | dispatch | shared expert | experts | combine       (a dense layer: attention | mlp)
    backward  combine | shared expert | experts | dispatch | attention+gate       (names say which part is undone)

A segment reads the residual stream from `tape.hidden` (forward) or its gradient from `tape.gradient` (backward) and leaves
the next one there, so the segments of two microbatches may alternate in any way. The shared expert does not need the exchange
before it and may run meanwhile, on another thread: both read the same tensors, and each leaves its result in a field of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from actors.comm.exchange import ExpertExchange
from actors.model.attention import Attention
from actors.model.float8 import Float8
from actors.model.gate import balance_loss, choose_experts, expert_weights
from actors.model.island import Island, Keep
from actors.model.linear import Scope, expert_mlp, linear, mlp, rms_norm
from actors.model.recompute import Recipes
from actors.model.rope import Rotary
from actors.model.segment import Lane, Segment, crossed
from actors.model.tape import LossScales, Microbatch, Record
from actors.model.weights import Weight, WeightGradients, fused
from orchestrator.config.run_config import ModelConfig


@dataclass(frozen=True, slots=True)
class StageParts:
    """What all layers of a stage share. dtype: of activations. in8: how modules multiply, by kind, of those that do so in FP8."""

    model: ModelConfig
    weights: Mapping[str, Weight]
    rotary: Rotary
    queue: WeightGradients
    recompute: str
    dtype: torch.dtype
    in8: Mapping[str, Float8] = field(default_factory=dict)

    def scope(self, tape: Microbatch) -> Scope:
        return Scope(self.queue, Recipes() if tape.keep and self.recompute == "selective" else None)

    def keep(self, tape: Microbatch) -> Keep:
        if not tape.keep:
            return Keep.NOTHING
        return Keep.INPUTS if self.recompute == "full" else Keep.GRAPH

    def gate_up_down(self, name: str) -> tuple[Weight, Weight]:
        """An MLP's gate and up projection as one matrix, and its down projection."""
        names = [f"{name}.{part}_proj.weight" for part in ("gate", "up")]
        return fused(self.weights, names), self.weights[f"{name}.down_proj.weight"]


class _Layer:
    """What both kinds have: attention with its norm, and the norm before the MLP."""

    def __init__(self, parts: StageParts, n: int):
        self.parts, self.n, self.prefix = parts, n, f"model.layers.{n}."
        self._attention = Attention(parts.model, n, parts.weights, parts.rotary, parts.in8.get("attention"))
        self._input_norm = parts.weights[self.prefix + "input_layernorm.weight"]
        self._mlp_norm = parts.weights[self.prefix + "post_attention_layernorm.weight"]

    def _attend(self, x: Tensor, scope: Scope) -> Tensor:
        eps = self.parts.model.rms_norm_eps
        return x + self._attention(rms_norm(x, self._input_norm, eps, scope), scope).to(x.dtype)

    def _normed(self, x: Tensor, scope: Scope) -> Tensor:
        return rms_norm(x, self._mlp_norm, self.parts.model.rms_norm_eps, scope)

    def _segment(self, lane: Lane, name: str, run: Callable[[Microbatch], None], tape: Microbatch, after: int = 1) -> Segment:
        return Segment(lane, name, self.n, lambda: run(tape), after)


class DenseLayer(_Layer):
    def __init__(self, parts: StageParts, n: int):
        super().__init__(parts, n)
        self._gate_up, self._down = parts.gate_up_down(self.prefix + "mlp")

    def forward(self, tape: Microbatch) -> list[Segment]:
        return [self._segment(Lane.COMPUTE, "attention", self._attention_forward, tape),
                self._segment(Lane.COMPUTE, "mlp", self._mlp_forward, tape)]

    def backward(self, tape: Microbatch, scales: LossScales) -> list[Segment]:
        return [self._segment(Lane.COMPUTE, "mlp", self._mlp_backward, tape),
                self._segment(Lane.COMPUTE, "attention", self._attention_backward, tape)]

    def _attention_forward(self, tape: Microbatch) -> None:
        scope = self.parts.scope(tape)
        record = tape.records[self.n] = Record(recipes=scope.recipes)
        crossed(tape.hidden)
        if tape.sequences:
            record.attention = Island(lambda x: (self._attend(x, scope),), self.parts.keep(tape), scope.recipes)
            (tape.hidden,) = record.attention.forward(tape.hidden)

    def _mlp_forward(self, tape: Microbatch) -> None:
        record = tape.records[self.n]
        scope, in8 = Scope(self.parts.queue, record.recipes), self.parts.in8.get("mlp")
        if tape.sequences:
            record.mlp = Island(lambda x: (x + mlp(self._normed(x, scope), self._gate_up, self._down, scope, in8).to(x.dtype),),
                                self.parts.keep(tape), scope.recipes)
            (tape.hidden,) = record.mlp.forward(tape.hidden)
        if record.recipes is not None:
            record.recipes.close()
        if not tape.keep:
            del tape.records[self.n]

    def _mlp_backward(self, tape: Microbatch) -> None:
        if tape.sequences:
            (tape.gradient,) = tape.records[self.n].mlp.backward(tape.gradient)

    def _attention_backward(self, tape: Microbatch) -> None:
        record = tape.records.pop(self.n)
        if tape.sequences:
            (tape.gradient,) = record.attention.backward(tape.gradient)


class ExpertLayer(_Layer):
    """A layer with routed experts. `load` int64 [e] counts how often each was chosen; `bias` [e] steers the choice.

    Args: `experts`: ids of the experts that this rank holds, in slot order.
    """

    def __init__(self, parts: StageParts, n: int, exchange: ExpertExchange, experts: list[int], bias: Tensor):
        super().__init__(parts, n)
        model, self._exchange, self._bias, self._dtype = parts.model, exchange, bias, parts.dtype
        self._gate = parts.weights[self.prefix + "mlp.gate.weight"]
        pairs = [parts.gate_up_down(f"{self.prefix}mlp.experts.{e}") for e in experts]
        self._expert_gate_up, self._expert_down = [up for up, _ in pairs], [down for _, down in pairs]
        self._in8 = parts.in8["experts"].with_powers_of_two() if "experts" in parts.in8 else None
        self._shared = parts.gate_up_down(self.prefix + "mlp.shared_experts") if model.n_shared_experts else None
        self.load = torch.zeros(model.n_routed_experts, dtype=torch.int64, device=bias.device)

    def forward(self, tape: Microbatch) -> list[Segment]:
        shared = [self._segment(Lane.COMPUTE, "shared", self._shared_forward, tape, after=2)] if self._shared else []
        return [self._segment(Lane.COMPUTE, "attention", self._attention_forward, tape),
                self._segment(Lane.EXCHANGE, "dispatch", self._dispatch_forward, tape), *shared,
                self._segment(Lane.COMPUTE, "experts", self._experts_forward, tape, after=1 + len(shared)),
                self._segment(Lane.EXCHANGE, "combine", self._combine_forward, tape)]

    def backward(self, tape: Microbatch, scales: LossScales) -> list[Segment]:
        shared = [self._segment(Lane.COMPUTE, "shared", self._shared_backward, tape, after=2)] if self._shared else []
        return [self._segment(Lane.EXCHANGE, "combine", self._combine_backward, tape), *shared,
                self._segment(Lane.COMPUTE, "experts", self._experts_backward, tape, after=1 + len(shared)),
                self._segment(Lane.EXCHANGE, "dispatch", self._dispatch_backward, tape),
                self._segment(Lane.COMPUTE, "attention", partial(self._attention_backward, scales=scales), tape)]

    # --- forward -------------------------------------------------------------------------------------------------

    def _attention_forward(self, tape: Microbatch) -> None:
        scope = self.parts.scope(tape)
        record = tape.records[self.n] = Record(recipes=scope.recipes)
        crossed(tape.hidden)
        if not tape.sequences:
            self._no_tokens(record)
            record.announced = self._exchange.announce(record.choice_tk)
            return
        # the island may run again in backward: it must not choose again, but find the choice of the first run
        record.attention = Island(lambda x: self._attend_and_route(x, record, scope), self.parts.keep(tape), scope.recipes)
        tape.hidden, record.normed, record.weight_tk, balance = record.attention.forward(tape.hidden)
        tape.balance_loss_sum = tape.balance_loss_sum + balance.double()
        if tape.keep:
            self.load += torch.bincount(record.choice_tk.flatten(), minlength=self.load.numel())
        record.announced = self._exchange.announce(record.choice_tk)

    def _attend_and_route(self, x: Tensor, record: Record, scope: Scope) -> tuple[Tensor, ...]:
        model = self.parts.model
        x = self._attend(x, scope)
        normed = self._normed(x, scope).flatten(0, 1)
        affinity_te = linear(normed, self._gate, scope).sigmoid()
        if record.choice_tk is None:
            record.choice_tk = choose_experts(affinity_te, self._bias, model)
        weight_tk = expert_weights(affinity_te, record.choice_tk, model)
        balance = balance_loss(affinity_te.view(*x.shape[:2], -1), model.num_experts_per_tok)
        return x, normed, weight_tk, balance

    def _no_tokens(self, record: Record) -> None:
        model = self.parts.model
        record.normed = self._bias.new_empty(0, model.hidden_size, dtype=self._dtype)
        record.weight_tk = self._bias.new_empty(0, model.num_experts_per_tok)
        record.choice_tk = self._bias.new_empty(0, model.num_experts_per_tok, dtype=torch.int64)

    def _dispatch_forward(self, tape: Microbatch) -> None:
        record = tape.records[self.n]
        crossed(record.normed, record.weight_tk, record.choice_tk)
        record.dispatched = self._exchange.dispatch(record.normed, record.weight_tk, record.choice_tk, record.announced)
        record.handle, record.weight_tk, record.announced = record.dispatched.handle, None, None

    def _shared_forward(self, tape: Microbatch) -> None:
        if not tape.sequences:
            return
        record = tape.records[self.n]
        scope, in8 = Scope(self.parts.queue, record.recipes), self.parts.in8.get("shared_experts")
        record.shared_mlp = Island(lambda normed: (mlp(normed, *self._shared, scope, in8).to(normed.dtype),), self.parts.keep(tape),
                                   scope.recipes)
        (record.shared,) = record.shared_mlp.forward(record.normed)

    def _experts_forward(self, tape: Microbatch) -> None:
        record = tape.records[self.n]
        scope, sent = Scope(self.parts.queue, record.recipes), record.dispatched
        counts = sent.counts
        crossed(sent.rows, sent.weights)
        if not sent.rows.shape[0]:  # no rows come where no expert is, or none was chosen
            record.rows = sent.rows
        else:
            record.mlp = Island(
                lambda rows, weights: (expert_mlp(rows, weights, self._expert_gate_up, self._expert_down, counts, scope, self._in8),),
                self.parts.keep(tape), scope.recipes)
            (record.rows,) = record.mlp.forward(sent.rows, sent.weights)
        if record.recipes is not None:
            record.recipes.close()
        record.normed = None
        record.dispatched = None  # the rows are the island's now, if it wants them

    def _combine_forward(self, tape: Microbatch) -> None:
        record = tape.records[self.n]
        crossed(record.rows, record.shared, tape.hidden)
        out = self._exchange.combine(record.rows, record.handle)
        if tape.sequences:
            if record.shared is not None:
                out = out.add_(record.shared)
            tape.hidden = tape.hidden + out.view_as(tape.hidden)
        record.rows = record.shared = None
        if not tape.keep:
            del tape.records[self.n]

    # --- backward ------------------------------------------------------------------------------------------------

    def _combine_backward(self, tape: Microbatch) -> None:
        record = tape.records[self.n]
        crossed(tape.gradient)
        if tape.sequences:
            gradient_th = tape.gradient.flatten(0, 1)
        else:
            gradient_th = self._bias.new_empty(0, self.parts.model.hidden_size, dtype=self._dtype)
        record.rows = self._exchange.combine_backward(gradient_th, record.handle)

    def _shared_backward(self, tape: Microbatch) -> None:
        if tape.sequences:
            record = tape.records[self.n]
            (record.normed,) = record.shared_mlp.backward(tape.gradient.flatten(0, 1))
            record.shared_mlp = None

    def _experts_backward(self, tape: Microbatch) -> None:
        record = tape.records[self.n]
        crossed(record.rows)
        if record.mlp is None:
            record.row_weights = self._bias.new_empty(0)
            return
        record.rows, record.row_weights = record.mlp.backward(record.rows)
        record.mlp = None

    def _dispatch_backward(self, tape: Microbatch) -> None:
        record = tape.records[self.n]
        crossed(record.rows, record.row_weights, record.normed)
        gradient_th, record.weight_tk = self._exchange.dispatch_backward(
            record.rows, record.row_weights, record.handle)
        record.normed = gradient_th if record.normed is None else record.normed + gradient_th
        record.rows = record.row_weights = record.handle = None

    def _attention_backward(self, tape: Microbatch, scales: LossScales) -> None:
        record = tape.records.pop(self.n)
        if not tape.sequences:
            return
        crossed(record.normed, record.weight_tk)
        balance = self._bias.new_tensor(scales.balance)
        (tape.gradient,) = record.attention.backward(tape.gradient, record.normed, record.weight_tk, balance)
