"""One stage in one slot: its layers, what stands before the first and after the last, and the losses.

`forward` and `backward` give a list of segments; running them in order is the whole F, or the whole I. Gradients of weights
go to the queue as closures: whoever runs the segments flushes it (B) or takes its content away (I now, W later).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from actors.comm.exchange import ExpertExchange
from actors.model.float8 import Float8
from actors.model.island import Island
from actors.model.layer import DenseLayer, ExpertLayer, StageParts
from actors.model.linear import Scope, embed, embed_backward, linear, rms_norm
from actors.model.rope import Rotary
from actors.model.segment import Lane, Segment, crossed
from actors.model.tape import LossScales, Microbatch
from actors.model.weights import Weight, WeightGradients, exact_dtype
from orchestrator.config.run_config import ModelConfig
from orchestrator.model.parameters import moe_layers, mtp_layer

__all__ = ["Chunk", "Lane", "LossScales", "Microbatch", "Segment"]


class Chunk:
    """Args:
        layers, first, last: decoder layers of the stage; whether the embedding, or the head, belongs to it.
        weights: by published name. The embedding is one object for input and multi-token prediction, so its gradient is one.
        biases: gate bias [e] of every layer with experts, FP32 (FP64); changed in place between steps by its owner.
        exchanges, local_experts: of every layer with experts; expert ids in slot order.
        recompute: none, selective or full, as `training.recompute`.
        dtype: of activations; None: that of the weights. in8: how modules multiply, by kind, of those that do so in FP8.
    `scales` is read by backward; its owner sets it before every step.
    `load[layer]` int64 [e] counts choices of experts since its owner last zeroed it.
    """

    def __init__(self, model: ModelConfig, *, layers: range, first: bool, last: bool, weights: Mapping[str, Weight],
                 biases: Mapping[int, Tensor], exchanges: Mapping[int, ExpertExchange],
                 local_experts: Mapping[int, list[int]], queue: WeightGradients, recompute: str = "none",
                 dtype: torch.dtype | None = None, in8: Mapping[str, Float8] | None = None):
        self.model, self.first, self.last, self.scales = model, first, last, LossScales()
        self._weights, self._queue = weights, queue
        self._mtp = mtp_layer(model) if last and model.num_nextn_predict_layers else None
        wanted = [*layers, self._mtp] if self._mtp is not None else [*layers]
        if dtype is None:
            dtype = weights[f"model.layers.{wanted[0]}.self_attn.o_proj.weight"].value.dtype
        self._parts = parts = StageParts(model, weights, Rotary(model), queue, recompute, dtype, in8 or {})
        with_experts = set(moe_layers(model, layers, last=last))
        self._layers = {
            n: ExpertLayer(parts, n, exchanges[n], local_experts[n], biases[n]) if n in with_experts
            else DenseLayer(parts, n) for n in wanted}
        self._order = [n for n in wanted if n != self._mtp]
        self.load = {n: layer.load for n, layer in self._layers.items() if isinstance(layer, ExpertLayer)}

    def forward(self, tape: Microbatch) -> list[Segment]:
        """All of F. Sets `tape.output` (not on the last stage) and adds to the loss sums."""
        segments = [self._compute("embedding" if self.first else "input", self._enter, tape)]
        for n in self._order:
            segments += self._layers[n].forward(tape)
        if not self.last:
            return [*segments, self._compute("output", self._leave, tape)]
        segments.append(self._compute("head", self._head_forward, tape))
        if self._mtp is not None:
            segments.append(self._compute("mtp_input", self._mtp_input_forward, tape))
            segments += self._layers[self._mtp].forward(tape)
            segments.append(self._compute("mtp_head", self._mtp_head_forward, tape))
        return segments

    def backward(self, tape: Microbatch) -> list[Segment]:
        """All of I. Reads `tape.output_gradient` (not on the last stage), sets `tape.input_gradient` (not on the first)."""
        segments = [self._compute("output", self._enter_backward, tape)]
        if self._mtp is not None:
            segments.append(self._compute("mtp_head", self._mtp_head_backward, tape))
            segments += self._layers[self._mtp].backward(tape, self.scales)
            segments.append(self._compute("mtp_input", self._mtp_input_backward, tape))
        if self.last:
            segments.append(self._compute("head", self._head_backward, tape))
        for n in reversed(self._order):
            segments += self._layers[n].backward(tape, self.scales)
        return [*segments, self._compute("embedding" if self.first else "input", self._leave_backward, tape)]

    # --- ends of the stage ---------------------------------------------------------------------------------------

    def _enter(self, tape: Microbatch) -> None:
        if not tape.sequences:
            return
        tape.hidden = self._embedded(tape.tokens[:, :-1]) if self.first else tape.input

    def _embedded(self, tokens: Tensor) -> Tensor:
        return embed(tokens, self._weights["model.embed_tokens.weight"]).to(self._parts.dtype)

    def _leave(self, tape: Microbatch) -> None:
        crossed(tape.hidden)
        tape.output, tape.hidden = tape.hidden, None

    def _enter_backward(self, tape: Microbatch) -> None:
        tape.gradient, tape.output_gradient = tape.output_gradient, None

    def _leave_backward(self, tape: Microbatch) -> None:
        if tape.sequences and self.first:
            embed_backward(tape.gradient, tape.tokens[:, :-1], self._weights["model.embed_tokens.weight"], self._queue)
        elif not self.first:
            tape.input_gradient = tape.gradient
        tape.input = tape.hidden = tape.gradient = None

    # --- losses --------------------------------------------------------------------------------------------------

    def _head_forward(self, tape: Microbatch) -> None:
        crossed(tape.hidden)
        if tape.sequences:
            loss, tape.hidden = self._island(tape, "head", self._head("model.norm.weight", tape.labels(1), _correct, tape)).forward(
                tape.hidden)
            tape.loss_sum = tape.loss_sum + loss
        if self._mtp is None:
            tape.hidden = None

    def _head_backward(self, tape: Microbatch) -> None:
        if tape.sequences:
            (tape.gradient,) = tape.islands.pop("head").backward(_seed(self.scales.next_token, tape), tape.gradient)

    def _mtp_head_forward(self, tape: Microbatch) -> None:
        crossed(tape.hidden)
        if tape.sequences:
            norm = f"model.layers.{self._mtp}.shared_head.norm.weight"
            loss, _ = self._island(tape, "mtp_head", self._head(norm, tape.labels(2), _accepted, tape)).forward(tape.hidden)
            tape.mtp_loss_sum = tape.mtp_loss_sum + loss
        tape.hidden = None

    def _mtp_head_backward(self, tape: Microbatch) -> None:
        if tape.sequences:
            (tape.gradient,) = tape.islands.pop("mtp_head").backward(_seed(self.scales.mtp, tape), None)

    def _mtp_input_forward(self, tape: Microbatch) -> None:
        """Position i meets the embedding of token i+1, and the hidden state after the model's last norm."""
        if tape.sequences:
            following = self._embedded(tape.tokens[:, 1:])
            (tape.hidden,) = self._island(tape, "mtp_input", self._mtp_project).forward(following, tape.hidden)

    def _mtp_input_backward(self, tape: Microbatch) -> None:
        if tape.sequences:
            following, tape.gradient = tape.islands.pop("mtp_input").backward(tape.gradient)
            embed_backward(following, tape.tokens[:, 1:], self._weights["model.embed_tokens.weight"], self._queue)

    def _mtp_project(self, following: Tensor, hidden: Tensor, scope: Scope) -> tuple[Tensor, ...]:
        prefix, eps = f"model.layers.{self._mtp}.", self.model.rms_norm_eps
        parts = [rms_norm(x, self._weights[prefix + norm], eps, scope)
                 for x, norm in ((following, "enorm.weight"), (hidden, "hnorm.weight"))]
        both = torch.cat(parts, dim=-1)
        scope.recomputable((both,), lambda a, b: torch.cat([a, b], dim=-1), *parts)
        return (linear(both, self._weights[prefix + "eh_proj.weight"], scope).to(hidden.dtype),)

    def _head(self, norm: str, labels: Tensor, look: Callable[[Microbatch, Tensor, Tensor], None], tape: Microbatch
              ) -> Callable[..., tuple[Tensor, ...]]:
        def run(hidden: Tensor, scope: Scope) -> tuple[Tensor, ...]:
            """(summed cross-entropy in float64, normed hidden state)."""
            normed = rms_norm(hidden, self._weights[norm], self.model.rms_norm_eps, scope)
            logits = linear(normed, self._weights["lm_head.weight"], scope)
            if not tape.keep:
                look(tape, logits, labels)
            return cross_entropy_sum(logits, labels), normed
        return run

    # --- small things --------------------------------------------------------------------------------------------

    def _compute(self, name: str, run: Callable[[Microbatch], None], tape: Microbatch) -> Segment:
        layer = self._mtp if name.startswith("mtp") else -1
        return Segment(Lane.COMPUTE, name, layer, lambda: run(tape))

    def _island(self, tape: Microbatch, name: str, function: Callable[..., tuple[Tensor, ...]]) -> Island:
        scope = self._parts.scope(tape)

        def run(*inputs: Tensor) -> tuple[Tensor, ...]:
            outputs = function(*inputs, scope=scope)
            if scope.recipes is not None:
                scope.recipes.close()
            return outputs

        island = Island(run, self._parts.keep(tape), scope.recipes)
        if tape.keep:
            tape.islands[name] = island
        return island


def _seed(scale: float, tape: Microbatch) -> Tensor:
    """Gradient of a loss sum."""
    return torch.tensor(scale, dtype=torch.float64, device=tape.tokens.device)


def _correct(tape: Microbatch, logits: Tensor, labels: Tensor) -> None:
    tape.predicted = logits.argmax(-1)
    tape.correct = tape.correct + (tape.predicted == labels).sum()


def _accepted(tape: Microbatch, logits: Tensor, labels: Tensor) -> None:
    """Position i of multi-token prediction and position i+1 of the model itself both predict token i+2."""
    same = logits.argmax(-1)[:, :-1] == tape.predicted[:, 1:]
    tape.accepted, tape.predicted = tape.accepted + (same & (labels[:, :-1] >= 0)).sum(), None


def cross_entropy_sum(logits: Tensor, labels: Tensor) -> Tensor:
    """float64 scalar, in nats: FP32 (FP64) per position, those labelled -100 left out. logits [b, s, v], labels [b, s]."""
    exact = logits.flatten(0, 1).to(exact_dtype(logits.dtype))
    return F.cross_entropy(exact, labels.flatten(), ignore_index=-100, reduction="none").double().sum()
