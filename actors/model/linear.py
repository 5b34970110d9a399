"""Operations with weights: autograd for the input, a queued closure for the weight.

Name suffixes: n rows (tokens), i inputs, o outputs. All functions take a `Scope`: where weight gradients go, and where
outputs that are cheap to make again are announced (none unless recomputation is selective).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from actors.model.recompute import Recipes
from actors.model.weights import Weight, WeightGradients


@dataclass(frozen=True, slots=True)
class Scope:
    """What every operation with weights needs besides its operands."""

    queue: WeightGradients
    recipes: Recipes | None = None

    def recomputable(self, outputs: tuple[Tensor, ...], make: Callable[..., Tensor | tuple[Tensor, ...]],
                     *sources: Tensor) -> None:
        """Announce that `make(*sources)` gives `outputs` again."""
        if self.recipes is not None:
            self.recipes.add(outputs, make, *sources)


def linear(x: Tensor, weight: Weight, scope: Scope) -> Tensor:
    """x [..., i] times weight [o, i] transposed: [..., o], computed in the weight's dtype."""
    return _Linear.apply(x, weight, scope.queue)


def grouped_linear(x_ni: Tensor, weights: Sequence[Weight], counts: Sequence[int], scope: Scope) -> Tensor:
    """Rows in runs: the first counts[0] rows meet weights[0] [o, i], and so on. Returns [n, o]."""
    return _GroupedLinear.apply(x_ni, weights, counts, scope.queue)


def rms_norm(x: Tensor, weight: Weight, eps: float, scope: Scope) -> Tensor:
    """x [..., h] divided by its root mean square over h, times weight [h]. FP32 inside, one rounding to x's dtype."""
    normed = _RmsNorm.apply(x, weight, eps, scope.queue)
    scope.recomputable((normed,), lambda x: _rms_norm(x, weight.value, eps)[0], x)
    return normed


def swiglu(gate_up: Tensor, scope: Scope, row_weight: Tensor | None = None) -> Tensor:
    """silu(gate) * up, times a weight per row if given. `gate_up` [n, 2i], gate first; `row_weight` [n]. Returns [n, i]."""
    if row_weight is None:
        out = _SwiGlu.apply(gate_up)
        scope.recomputable((out,), _swiglu, gate_up)
    else:
        out = _WeightedSwiGlu.apply(gate_up, row_weight)
        scope.recomputable((out,), _weighted_swiglu, gate_up, row_weight)
    return out


def mlp(x: Tensor, gate_up: Weight, down: Weight, scope: Scope) -> Tensor:
    """The SwiGLU MLP of a dense layer or a shared expert: [..., h] to [..., h]."""
    return linear(swiglu(linear(x, gate_up, scope), scope), down, scope)


def expert_mlp(rows: Tensor, row_weight: Tensor, gate_up: Sequence[Weight], down: Sequence[Weight], counts: Sequence[int],
               scope: Scope) -> Tensor:
    """The routed experts over rows [r, h] sorted by expert. The routing weight enters before the down-projection, where
    rows are narrowest, so that combining is a plain sum."""
    hidden = swiglu(grouped_linear(rows, gate_up, counts, scope), scope, row_weight)
    return grouped_linear(hidden, down, counts, scope)


def embed(tokens: Tensor, weight: Weight) -> Tensor:
    """tokens int64 [...] to [..., h]."""
    return F.embedding(tokens, weight.value)


def embed_backward(gradient: Tensor, tokens: Tensor, weight: Weight, queue: WeightGradients) -> None:
    """Queue the embedding's weight gradient. Not an autograd function: nothing it takes has a gradient."""

    def accumulate() -> None:
        rows = gradient.reshape(-1, gradient.shape[-1]).to(weight.gradient.dtype)
        weight.gradient.index_add_(0, tokens.reshape(-1), rows)

    queue.defer(accumulate)


def add_product(weight: Weight, gradient_no: Tensor, x_ni: Tensor) -> None:
    """weight.gradient [o, i] += gradient transposed @ x."""
    if x_ni.dtype == weight.gradient.dtype:
        weight.gradient.addmm_(gradient_no.t(), x_ni)
    else:
        weight.gradient.add_(gradient_no.t() @ x_ni)


def detached(ctx: torch.autograd.function.FunctionCtx) -> list[Tensor]:
    """Saved tensors without their graph: a closure that waits for its turn must not keep the graph alive."""
    return [saved.detach() for saved in ctx.saved_tensors]


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Weight, queue: WeightGradients) -> Tensor:
        ctx.save_for_backward(x)
        ctx.weight, ctx.queue = weight, queue
        return F.linear(x.to(weight.value.dtype), weight.value)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (x,), weight = detached(ctx), ctx.weight
        gradient_no = gradient.reshape(-1, gradient.shape[-1])

        def accumulate() -> None:
            add_product(weight, gradient_no, x.reshape(-1, x.shape[-1]).to(gradient_no.dtype))

        ctx.queue.defer(accumulate)
        return (gradient_no @ weight.value).view(x.shape).to(x.dtype), None, None


class _GroupedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_ni: Tensor, weights: Sequence[Weight], counts: Sequence[int], queue: WeightGradients) -> Tensor:
        ctx.save_for_backward(x_ni)
        ctx.runs, ctx.queue = _runs(weights, counts), queue
        out_no = x_ni.new_empty(x_ni.shape[0], weights[0].value.shape[0] if weights else 0)
        for weight, start, stop in ctx.runs:
            torch.mm(x_ni[start:stop], weight.value.t(), out=out_no[start:stop])
        return out_no

    @staticmethod
    def backward(ctx, gradient_no: Tensor) -> tuple[Tensor | None, ...]:
        (x_ni,), runs = detached(ctx), ctx.runs
        out_ni = torch.empty(x_ni.shape, dtype=x_ni.dtype, device=x_ni.device)
        for weight, start, stop in runs:
            torch.mm(gradient_no[start:stop], weight.value, out=out_ni[start:stop])

        def accumulate() -> None:
            for weight, start, stop in runs:
                add_product(weight, gradient_no[start:stop], x_ni[start:stop])

        ctx.queue.defer(accumulate)
        return out_ni, None, None, None


def _runs(weights: Sequence[Weight], counts: Sequence[int]) -> list[tuple[Weight, int, int]]:
    """(weight, first row, row after the last) of every weight that has rows."""
    found, start = [], 0
    for weight, count in zip(weights, counts, strict=True):
        if count:
            found.append((weight, start, start + count))
        start += count
    return found


def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    exact = x.to(weight.dtype)
    inverse = torch.linalg.vector_norm(exact, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(eps).rsqrt_()
    return (exact * inverse).mul_(weight).to(x.dtype), inverse


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Weight, eps: float, queue: WeightGradients) -> Tensor:
        normed, inverse = _rms_norm(x, weight.value, eps)
        ctx.save_for_backward(x, inverse)
        ctx.weight, ctx.queue = weight, queue
        return normed

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (x, inverse), weight = detached(ctx), ctx.weight
        unit = x.to(inverse.dtype) * inverse
        product = gradient * unit
        # summed at once: waiting for its turn, a vector costs nothing, while [n, h] would
        total_h = product.reshape(-1, product.shape[-1]).sum(0)
        ctx.queue.defer(lambda: weight.gradient.add_(total_h))
        # d/dx of x / rms(x): what points along x is projected out
        along = (product @ weight.value).unsqueeze(-1).div_(x.shape[-1])
        out = (gradient * weight.value).sub_(unit.mul_(along)).mul_(inverse)
        return out.to(x.dtype), None, None, None


def _swiglu(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def _weighted_swiglu(gate_up: Tensor, row_weight: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return (F.silu(gate) * up).mul_(row_weight.unsqueeze(-1))


def _swiglu_backward(gate_up: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
    """(gradient of gate_up, silu(gate)) for the gradient of silu(gate) * up."""
    gate, up = gate_up.chunk(2, dim=-1)
    activated, out = F.silu(gate), torch.empty(gate_up.shape, dtype=gate_up.dtype, device=gate_up.device)
    out_gate, out_up = out.chunk(2, dim=-1)
    torch.ops.aten.silu_backward(gradient * up, gate, grad_input=out_gate)
    torch.mul(gradient, activated, out=out_up)
    return out, activated


class _SwiGlu(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate_up: Tensor) -> Tensor:
        ctx.save_for_backward(gate_up)
        return _swiglu(gate_up)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        (gate_up,) = ctx.saved_tensors
        return _swiglu_backward(gate_up, gradient)[0]


class _WeightedSwiGlu(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate_up: Tensor, row_weight: Tensor) -> Tensor:
        ctx.save_for_backward(gate_up, row_weight)
        return _weighted_swiglu(gate_up, row_weight)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, Tensor]:
        gate_up, row_weight = ctx.saved_tensors
        out, activated = _swiglu_backward(gate_up, gradient * row_weight.unsqueeze(-1).to(gradient.dtype))
        up = gate_up.chunk(2, dim=-1)[1]
        return out, torch.linalg.vecdot((activated * up).to(row_weight.dtype), gradient.to(row_weight.dtype))
