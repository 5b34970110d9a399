"""What a stage's segments will be and how long they take relative to each other, known before there is a stage.

    forward   attention, dispatch, shared, experts, combine      backward   combine, shared, experts, dispatch, attention
    dense     attention, mlp                                                mlp, attention

with what stands before the first and after the last layer of the stage. `actors/model/chunk.py` makes the segments; a test holds
the two lists equal. A shared expert needs only what attention left (backward: the gradient that came in), so it does not wait
for the communication before it, but stands behind it, to run meanwhile.
"""

from __future__ import annotations

from dataclasses import dataclass

from orchestrator.config.run_config import ModelConfig
from orchestrator.model.parameters import layer_parameters, mtp_layer
from orchestrator.schedule.ir.operations import Operation
from orchestrator.schedule.ir.orders import StageOperations
from orchestrator.schedule.ir.spans import Lane


@dataclass(frozen=True, slots=True)
class LayerCosts:
    """Durations, in any unit they share, of a layer with experts (of a dense one, if the model has no others): compute of
    forward, of backward for the input and for the weights; dispatch and combine of a forward."""

    forward: float
    backward_input: float
    backward_weight: float
    dispatch: float
    combine: float


@dataclass(frozen=True, slots=True)
class _Products:
    """Multiplications a token: `weights` with weights, `other` without (attention's products); a backward for the weights has
    none of the latter."""

    weights: float
    other: float = 0.0


def stage_operations(model: ModelConfig, layers: range, *, first: bool, last: bool, length: int,
                     costs: LayerCosts) -> StageOperations:
    """Args:
        layers, first, last: decoder layers of the stage; whether the embedding, or the head, belongs to it.
        length: of a sequence, in tokens.
    """
    operations = _OperationsOf(model, length, costs)
    mtp = mtp_layer(model) if last and model.num_nextn_predict_layers else None
    forward = [operations.forward("embedding" if first else "input")]
    backward = [operations.backward("output")]
    for n in layers:
        forward += operations.layer_forward(n, moe=model.is_moe(n))
    if last:
        forward.append(operations.forward("head"))
    else:
        forward.append(operations.forward("output"))
    if mtp is not None:
        forward += [operations.forward("mtp_input", mtp), *operations.layer_forward(mtp, moe=True),
                    operations.forward("mtp_head", mtp)]
        backward += [operations.backward("mtp_head", mtp), *operations.layer_backward(mtp, moe=True),
                     operations.backward("mtp_input", mtp)]
    if last:
        backward.append(operations.backward("head"))
    for n in reversed(layers):
        backward += operations.layer_backward(n, moe=model.is_moe(n))
    backward.append(operations.backward("embedding" if first else "input"))
    return StageOperations(tuple(forward), tuple(backward))


class _OperationsOf:
    def __init__(self, model: ModelConfig, length: int, costs: LayerCosts):
        h = model.hidden_size
        self._costs, self._shared = costs, bool(model.n_shared_experts)
        self._work = {
            "embedding": _Products(0), "input": _Products(0), "output": _Products(0), "head": _Products(model.vocab_size * h),
            "mtp_head": _Products(model.vocab_size * h), "mtp_input": _Products(2 * h * h), **_layer_work(model, length)}
        moe = model.first_k_dense_replace < model.num_hidden_layers or model.num_nextn_predict_layers > 0
        parts = [self._work[name] for name in (("attention", "shared", "experts") if moe else ("attention", "mlp"))]
        self._weights = sum(part.weights for part in parts)
        self._all = self._weights + sum(part.other for part in parts)

    def forward(self, name: str, layer: int = -1, after: int = 1) -> Operation:
        work = self._work[name]
        return Operation(Lane.COMPUTE, self._costs.forward * (work.weights + work.other) / self._all, None, after, name, layer)

    def backward(self, name: str, layer: int = -1, after: int = 1) -> Operation:
        work = self._work[name]
        return Operation(Lane.COMPUTE, self._costs.backward_input * (work.weights + work.other) / self._all,
                         self._costs.backward_weight * work.weights / self._weights, after, name, layer)

    def layer_forward(self, n: int, *, moe: bool) -> list[Operation]:
        if not moe:
            return [self.forward("attention", n), self.forward("mlp", n)]
        shared = [self.forward("shared", n, after=2)] if self._shared else []
        return [self.forward("attention", n), Operation(Lane.EXCHANGE, self._costs.dispatch, name="dispatch", layer=n), *shared,
                self.forward("experts", n, after=1 + len(shared)),
                Operation(Lane.EXCHANGE, self._costs.combine, name="combine", layer=n)]

    def layer_backward(self, n: int, *, moe: bool) -> list[Operation]:
        """The gradient of combine is sent like a dispatch, that of dispatch like a combine (report, section 3.2.1)."""
        if not moe:
            return [self.backward("mlp", n), self.backward("attention", n)]
        shared = [self.backward("shared", n, after=2)] if self._shared else []
        return [Operation(Lane.EXCHANGE, self._costs.dispatch, name="combine", layer=n), *shared,
                self.backward("experts", n, after=1 + len(shared)),
                Operation(Lane.EXCHANGE, self._costs.combine, name="dispatch", layer=n), self.backward("attention", n)]


def _layer_work(model: ModelConfig, length: int) -> dict[str, _Products]:
    """Of both kinds of layer. Attention is causal, so a token meets half the sequence; experts' load is even."""
    products = length / 2 * model.num_attention_heads * (model.qk_head_dim + model.v_head_dim)
    specs = layer_parameters(model, 0, moe=True)
    gate = model.n_routed_experts * model.hidden_size
    attention = sum(spec.size for spec in specs if "self_attn" in spec.name) + gate
    one_wide = 3 * model.hidden_size  # an MLP's three matrices, for each unit of its width
    return {
        "attention": _Products(attention, products),
        "mlp": _Products(one_wide * model.intermediate_size),
        "experts": _Products(one_wide * model.moe_intermediate_size * model.num_experts_per_tok),
        "shared": _Products(one_wide * model.moe_intermediate_size * model.n_shared_experts),
    }
