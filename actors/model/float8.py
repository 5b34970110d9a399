"""Products in FP8: operands rounded to tiles and blocks with scales of their own, sums in FP32.

Of y = x W^T, dx = dy W and dW = dy^T x all three products are such: activations and gradients in tiles of 1 x 128, the two of dW
in tiles of 128 x 1, for it sums over tokens; weights in blocks of 128 x 128, cast from FP32. From forward to backward only the
FP8 form of x is kept. A whole MLP keeps the input of its SwiGLU in FP8 and makes the output again (DeepSeek-V3 report, 3.3.2).

Where there are no FP8 units the products are emulated: scales are multiplied into the rounded operands in FP32, and one FP32
product does the sums. Every operand is the FP8 number bit for bit; sums differ from those of FP8 units that are promoted to FP32
after each 128 numbers by the rounding of FP32 alone. Where torch can multiply FP8 with such scales on the device, it does.
Name suffixes: n rows (tokens), i inputs, o outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from actors.model import float8_units
from actors.model.swiglu import swiglu_backward, swiglu_of
from actors.model.weights import Weight, WeightGradients
from actors.tiles import BLOCKS, COLUMNS, E4M3, E5M2, ROWS, SIDE, WHOLE, Tiled, tiled
from orchestrator.config.precision import PRODUCTS, PrecisionSection

_FEW_BITS, _FEW_AT_ONCE = 14, 32


@dataclass(frozen=True, slots=True)
class Float8:
    """How one kind of module multiplies. The defaults are as published, the others are coarser, to compare with.

    power_of_two: scales of its input. whole: one scale for a whole tensor. gradients: the format of dy.
    few_bits: sums of 14 bits throughout, as in FP8 units that are not promoted. units: the device multiplies FP8 itself.
    blocks: weights that have been cast, by name; whoever changes weights clears it.
    """

    power_of_two: bool = False
    whole: bool = False
    gradients: torch.dtype = E4M3
    few_bits: bool = False
    units: bool = False
    blocks: dict[str, Any] = field(default_factory=dict)

    def with_powers_of_two(self) -> Float8:
        return replace(self, power_of_two=True)

    def rows(self, x_nc: Tensor, *, power_of_two: bool = False) -> Tiled:
        return tiled(x_nc, WHOLE if self.whole else ROWS, power_of_two=power_of_two)

    def gradient_rows(self, gradient_no: Tensor) -> Tiled:
        return tiled(gradient_no, WHOLE if self.whole else ROWS, form=self.gradients)

    def columns(self, x_nc: Tensor, form: torch.dtype = E4M3) -> Tiled:
        return tiled(x_nc, WHOLE if self.whole else COLUMNS, form=form)

    def weight(self, weight: Weight) -> Tensor:
        """float32 [o, i] of what `weight` is in FP8: each matrix of a fused one by itself."""
        return self._cast(weight.name, lambda: torch.cat([
            tiled(part, WHOLE if self.whole else BLOCKS).exact() for part in weight.value.split(weight.rows)]))

    def product(self, x: Tiled, weight: Weight, dtype: torch.dtype, *, backward: bool = False) -> Tensor:
        """x [n, i] times weight [o, i] transposed: [n, o] in dtype; backward: x [n, o] times weight: [n, i]."""
        if self.units and not any(rows % SIDE for rows in weight.rows[:-1]):
            name = f"{weight.name} {'backward' if backward else 'forward'}"
            cast = self._cast(name, lambda: tiled(weight.value, BLOCKS).t() if backward else tiled(weight.value, BLOCKS))
            return float8_units.product(x, cast, dtype)
        exact = self.weight(weight)
        return self._emulated(x.exact(), exact if backward else exact.t()).to(dtype)

    def add_weight_gradient(self, weight: Weight, gradient_no: Tensor, x_ni: Tensor) -> None:
        """weight.gradient [o, i] += dy^T x."""
        if not gradient_no.shape[0]:
            return
        gradient, x = self.columns(gradient_no, self.gradients), self.columns(x_ni)
        if self.units:
            weight.gradient.add_(float8_units.product(gradient.t(), x.t(), torch.float32))
        elif self.few_bits:
            weight.gradient.add_(self._emulated(gradient.exact().t(), x.exact()))
        else:
            weight.gradient.addmm_(gradient.exact().t(), x.exact())

    def _emulated(self, a: Tensor, b: Tensor) -> Tensor:
        """a [n, k] times b [k, o], both exactly what FP8 numbers stand for. float32 [n, o]."""
        return few_bits_product(a, b) if self.few_bits else a @ b

    def _cast(self, name: str, make: Callable[[], Tensor | Tiled]) -> Any:
        if name not in self.blocks:
            self.blocks[name] = make()
        return self.blocks[name]


def in8_of(precision: PrecisionSection, blocks: dict[str, Any], device: torch.device = torch.device("cpu")) -> dict[str, Float8]:
    """How the kinds of modules multiply that do so in FP8. blocks: where all of them keep their weights."""
    published = (precision.scales, precision.gradients, precision.accumulation) == ("tiles", "e4m3", "fp32")
    found = Float8(whole=precision.scales == "tensor", gradients=E5M2 if precision.gradients == "e5m2" else E4M3,
                   few_bits=precision.accumulation == "14bit", units=published and float8_units.available(device), blocks=blocks)
    return {kind: found for kind in PRODUCTS if getattr(precision, kind) == "fp8"}


def linear(x: Tensor, weight: Weight, queue: WeightGradients, float8: Float8) -> Tensor:
    """x [..., i] times weight [o, i] transposed: [..., o], in x's dtype."""
    return _Float8Linear.apply(x, weight, queue, float8)


def linear_forward(x: Tensor, weight: Weight, float8: Float8) -> Tensor:
    """The same, and nothing kept."""
    return _times(float8.rows(x.reshape(-1, x.shape[-1]), power_of_two=float8.power_of_two), weight, x, float8)


def mlp(x_nh: Tensor, row_weight: Tensor | None, gate_up: Sequence[Weight], down: Sequence[Weight], counts: Sequence[int],
        queue: WeightGradients, float8: Float8) -> Tensor:
    """SwiGLU MLPs over rows in runs: the first counts[0] rows meet gate_up[0] [2i, h] and down[0] [h, i], and so on. A weight for
    each row, if given, enters before the down-projection. Returns [n, h] in x's dtype."""
    return _Mlp.apply(x_nh, row_weight, gate_up, down, counts, queue, float8)


def _times(x: Tiled, weight: Weight, like: Tensor, float8: Float8) -> Tensor:
    return float8.product(x, weight, like.dtype).reshape(*like.shape[:-1], -1)


class _Float8Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Weight, queue: WeightGradients, float8: Float8) -> Tensor:
        kept = float8.rows(x.reshape(-1, x.shape[-1]), power_of_two=float8.power_of_two)
        ctx.save_for_backward(kept.values, kept.scale)
        ctx.weight, ctx.queue, ctx.float8, ctx.tile, ctx.like = weight, queue, float8, kept.tile, (x.shape, x.dtype)
        return _times(kept, weight, x, float8)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (values, scale), weight, float8 = (saved.detach() for saved in ctx.saved_tensors), ctx.weight, ctx.float8
        (shape, dtype), tile = ctx.like, ctx.tile
        gradient_no = gradient.reshape(-1, gradient.shape[-1])
        ctx.queue.defer(lambda: float8.add_weight_gradient(weight, gradient_no, Tiled(values, scale, tile).exact()))
        out = float8.product(float8.gradient_rows(gradient_no), weight, dtype, backward=True)
        return out.reshape(shape), None, None, None


class _Mlp(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_nh: Tensor, row_weight: Tensor | None, gate_up: Sequence[Weight], down: Sequence[Weight],
                counts: Sequence[int], queue: WeightGradients, float8: Float8) -> Tensor:
        x = float8.rows(x_nh, power_of_two=float8.power_of_two)
        inner = _runs_product(x, gate_up, counts, x_nh.dtype, float8)
        hidden = float8.rows(_weighted(swiglu_of(inner), row_weight))
        kept = float8.rows(inner)
        ctx.save_for_backward(x.values, x.scale, kept.values, kept.scale, row_weight)
        ctx.weights, ctx.counts, ctx.queue, ctx.float8 = (gate_up, down), counts, queue, float8
        ctx.tile, ctx.dtype = x.tile, x_nh.dtype
        return _runs_product(hidden, down, counts, x_nh.dtype, float8)

    @staticmethod
    def backward(ctx, gradient_nh: Tensor) -> tuple[Tensor | None, ...]:
        x_values, x_scale, values, scale, row_weight = (None if s is None else s.detach() for s in ctx.saved_tensors)
        (gate_up, down), counts, float8 = ctx.weights, ctx.counts, ctx.float8
        x, kept, dtype = Tiled(x_values, x_scale, ctx.tile), Tiled(values, scale, ctx.tile), ctx.dtype
        inner = kept.exact().to(dtype)
        hidden_gradient = _runs_product(float8.gradient_rows(gradient_nh), down, counts, dtype, float8, backward=True)
        inner_gradient, activated = swiglu_backward(inner, _weighted(hidden_gradient, row_weight))
        weight_gradient = None
        if row_weight is not None:
            up = inner.chunk(2, dim=-1)[1]
            weight_gradient = torch.linalg.vecdot((activated * up).to(row_weight.dtype), hidden_gradient.to(row_weight.dtype))

        def accumulate() -> None:
            hidden, exact = _weighted(swiglu_of(kept.exact().to(dtype)), row_weight), x.exact()
            for run, (first, second) in _runs(counts, gate_up, down):
                float8.add_weight_gradient(second, gradient_nh[run], hidden[run])
                float8.add_weight_gradient(first, inner_gradient[run], exact[run])

        ctx.queue.defer(accumulate)
        out = _runs_product(float8.gradient_rows(inner_gradient), gate_up, counts, dtype, float8, backward=True)
        return out, weight_gradient, None, None, None, None, None


def _weighted(x_ni: Tensor, row_weight: Tensor | None) -> Tensor:
    return x_ni if row_weight is None else x_ni * row_weight.unsqueeze(-1).to(x_ni.dtype)


def _runs(counts: Sequence[int], *weights: Sequence[Weight]) -> list[tuple[slice, tuple[Weight, ...]]]:
    """(rows, the weights that they meet) of every run that has rows."""
    found, start = [], 0
    for count, *met in zip(counts, *weights, strict=True):
        if count:
            found.append((slice(start, start + count), tuple(met)))
        start += count
    return found


def _runs_product(x: Tiled, weights: Sequence[Weight], counts: Sequence[int], dtype: torch.dtype, float8: Float8,
                  *, backward: bool = False) -> Tensor:
    """Each run of rows times its weight transposed; backward: times its weight."""
    width = weights[0].value.shape[1 if backward else 0]
    out = torch.empty(x.values.shape[0], width, dtype=dtype, device=x.values.device)
    for run, (weight,) in _runs(counts, weights):
        out[run] = float8.product(x.run(run), weight, dtype, backward=backward)
    return out


def few_bits_product(a: Tensor, b: Tensor) -> Tensor:
    """FP8 units add so many products at once to a sum of which so many bits are kept (Insights, arXiv 2505.09343, 3.1)."""
    total = torch.zeros(a.shape[0], b.shape[1], device=a.device)
    for at in range(0, a.shape[1], _FEW_AT_ONCE):
        part = slice(at, at + _FEW_AT_ONCE)
        mantissa, exponent = torch.frexp(total.addmm_(a[:, part], b[part]))
        total = torch.ldexp((mantissa * 2**_FEW_BITS).trunc_(), exponent - _FEW_BITS)
    return total
