"""Errors of the three products of one linear layer in FP8, against float64, as published and in coarser ways."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from actors.model import float8
from actors.model.float8 import in8_of
from actors.model.weights import Weight, WeightGradients
from orchestrator.config.precision import PrecisionSection

OUTPUTS, SEED = 256, 0
_OUTLIERS, _SIZE = 0.01, 30.0
"""Share of channels (and of tokens) whose activations (and gradients) are larger, and how much: as real ones have them."""


def measure(tokens: int, inputs: int, coarser: Mapping[str, PrecisionSection]) -> dict[str, dict[str, float]]:
    """Relative errors in the Frobenius norm, by way: of y, dx and dW against the exact products of what was to be multiplied, and
    ("sums of ...") against those of the FP8 numbers that were, which tells what adding up alone did."""
    make = torch.Generator().manual_seed(SEED)
    x = _with_outliers(torch.randn(tokens, inputs, generator=make), 1, make).abs_()  # of one sign: sums grow with their length
    w, dy = torch.randn(OUTPUTS, inputs, generator=make), _with_outliers(torch.randn(tokens, OUTPUTS, generator=make), 0, make)
    exact = {"y": x.double() @ w.double().t(), "dx": dy.double() @ w.double(), "dw": dy.double().t() @ x.double()}
    published = PrecisionSection(attention="fp8")
    ways = {"published": published} | {name: found.model_copy(update={"attention": "fp8"}) for name, found in coarser.items()}
    return {name: _errors(x, w, dy, found, exact) for name, found in ways.items()}


def _with_outliers(x: Tensor, dimension: int, make: torch.Generator) -> Tensor:
    large = torch.rand(x.shape[dimension], generator=make) < _OUTLIERS
    return x * (1 + large * (_SIZE - 1)).unsqueeze(1 - dimension)


def _errors(x: Tensor, w: Tensor, dy: Tensor, precision: PrecisionSection, exact: dict[str, Tensor]) -> dict[str, float]:
    weight, queue, in8 = Weight("w", w, torch.zeros_like(w)), WeightGradients(), in8_of(precision, {})["attention"]
    leaf = x.clone().requires_grad_()
    y = float8.linear(leaf, weight, queue, in8)
    y.backward(dy)
    queue.flush()
    found = {"y": y.detach(), "dx": leaf.grad, "dw": weight.gradient}
    rounded = _of_rounded(x, weight, dy, in8)
    return ({name: _distance(found[name], exact[name]) for name in exact}
            | {f"sums of {name}": _distance(found[name], rounded[name]) for name in exact})


def _of_rounded(x: Tensor, weight: Weight, dy: Tensor, in8: float8.Float8) -> dict[str, Tensor]:
    """The products of the FP8 numbers that a linear layer multiplies, in float64."""
    kept, in_blocks = in8.rows(x).exact(), in8.weight(weight).double()
    return {"y": kept.double() @ in_blocks.t(), "dx": in8.gradient_rows(dy).exact().double() @ in_blocks,
            "dw": in8.columns(dy, in8.gradients).exact().double().t() @ in8.columns(kept).exact().double()}


def _distance(found: Tensor, exact: Tensor) -> float:
    return float((found.double() - exact).norm() / exact.norm())
