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

from actors.model import float8
from actors.model.float8 import Float8
from actors.model.recompute import Recipes
from actors.model.swiglu import SwiGlu, WeightedSwiGlu, swiglu_of, weighted_swiglu_of
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


def linear(x: Tensor, weight: Weight, scope: Scope, in8: Float8 | None = None) -> Tensor:
    """x [..., i] times weight [o, i] transposed: [..., o], computed in the weight's dtype, or in FP8 and then in x's."""
    return _Linear.apply(x, weight, scope.queue) if in8 is None else float8.linear(x, weight, scope.queue, in8)


def linear_forward(x: Tensor, weight: Weight, in8: Float8 | None = None) -> Tensor:
    """The same, without autograd: for those who make an output again."""
    return _product(x, weight) if in8 is None else float8.linear_forward(x, weight, in8)


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
        out = SwiGlu.apply(gate_up)
        scope.recomputable((out,), swiglu_of, gate_up)
    else:
        out = WeightedSwiGlu.apply(gate_up, row_weight)
        scope.recomputable((out,), weighted_swiglu_of, gate_up, row_weight)
    return out


def mlp(x: Tensor, gate_up: Weight, down: Weight, scope: Scope, in8: Float8 | None = None) -> Tensor:
    """The SwiGLU MLP of a dense layer or a shared expert: [..., h] to [..., h], in x's dtype."""
    if in8 is not None:
        rows = x.reshape(-1, x.shape[-1])
        return float8.mlp(rows, None, [gate_up], [down], [rows.shape[0]], scope.queue, in8).view(x.shape)
    return linear(swiglu(linear(x, gate_up, scope), scope), down, scope)


def expert_mlp(rows: Tensor, row_weight: Tensor, gate_up: Sequence[Weight], down: Sequence[Weight], counts: Sequence[int],
               scope: Scope, in8: Float8 | None = None) -> Tensor:
    """The routed experts over rows [r, h] sorted by expert, in their dtype. The routing weight enters before the down-projection,
    where rows are narrowest, so that combining is a plain sum."""
    if in8 is not None:
        return float8.mlp(rows, row_weight, gate_up, down, counts, scope.queue, in8)
    inner = grouped_linear(rows.to(gate_up[0].value.dtype), gate_up, counts, scope)
    return grouped_linear(swiglu(inner, scope, row_weight), down, counts, scope).to(rows.dtype)


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


def _product(x: Tensor, weight: Weight) -> Tensor:
    return F.linear(x.to(weight.value.dtype), weight.value)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Weight, queue: WeightGradients) -> Tensor:
        ctx.save_for_backward(x)
        ctx.weight, ctx.queue = weight, queue
        return _product(x, weight)

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
