"""Products on FP8 units: what torch's scaled product is given, by torch's own checks for such devices, and by what cuBLAS makes of it.

No unit is needed: torch checks shapes and strides for a device that is not there, and a twin in float64 reads scales where
cuBLAS documents them (Scaling factors layouts, docs.nvidia.com/cuda/cublas).
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from actors.model import float8, float8_units
from actors.model.float8 import Float8, in8_of
from actors.model.weights import Weight, WeightGradients
from actors.tiles import BLOCKS, COLUMNS, ROWS, tiled
from orchestrator.config.precision import PrecisionSection
from tests.actors.model.test_float8_products import SHAPES, close, gradients_of, near, parts, weight_of
from tests.reference.float8 import dequantised


def by_column(scale):
    return scale.t().is_contiguous()


def cublas(a, b, scale_a, recipe_a, scale_b, recipe_b, output_dtype):
    """mat_a [m, k] times mat_b [k, n] in float64, as documented for scales of 1 x 128 and of 128 x 128."""
    kinds = F.ScalingType
    (m, k), n = a.shape, b.shape[1]
    assert recipe_a == kinds.BlockWise1x128 and a.is_contiguous() and b.t().is_contiguous()
    assert (m % 4, k % 128, n % 16) == (0, 0, 0)
    assert scale_a.shape == (m, k // 128) and by_column(scale_a)
    left = a.double() * scale_a.double().repeat_interleave(128, 1)
    if recipe_b == kinds.BlockWise1x128:
        assert scale_b.shape == (n, k // 128) and by_column(scale_b)
        right = b.double() * scale_b.double().repeat_interleave(128, 1).t()
    else:
        filled = -(-k // 512) * 4
        assert scale_b.shape == (filled, -(-n // 128)) and by_column(scale_b)
        right = b.double() * scale_b.double().repeat_interleave(128, 0)[:k].repeat_interleave(128, 1)[:, :n]
    return (left @ right).to(output_dtype)


@pytest.fixture
def units(monkeypatch):
    monkeypatch.setattr(F, "scaled_mm", cublas)


@pytest.mark.parametrize("n, i, o", [*SHAPES, (3, 700, 140)])
def test_torch_takes_what_all_three_products_give_it(n, i, o):
    x, gradient, w = (torch.empty(shape, device="meta") for shape in ((n, i), (n, o), (o, i)))
    products = [(tiled(x, ROWS), tiled(w, BLOCKS), (n, o)), (tiled(gradient, ROWS), tiled(w, BLOCKS).t(), (n, i)),
                (tiled(gradient, COLUMNS).t(), tiled(x, COLUMNS).t(), (o, i))]
    for a, b, shape in products:
        for dtype in (torch.bfloat16, torch.float32):
            found = float8_units.product(a, b, dtype)
            assert (found.shape, found.dtype) == (shape, dtype)


def test_torch_checks_what_it_is_given_for_a_device_that_is_not_there(monkeypatch):
    monkeypatch.setattr(float8_units, "_BLOCKS_OF_SUM", 1)
    x, w = (tiled(torch.empty(shape, device="meta"), tile) for shape, tile in (((4, 256), ROWS), ((128, 256), BLOCKS)))
    with pytest.raises(RuntimeError, match="blockwise scaling"):
        float8_units.product(x, w, torch.float32)


@pytest.mark.parametrize("n, i, o", [*SHAPES, (3, 700, 140)])
def test_all_three_products_are_those_of_the_emulation(units, n, i, o):
    x, weight, gradient = parts(n, i, o)
    y, dx = gradients_of(x, weight, gradient, Float8(units=True), WeightGradients())
    exact_w, exact_x = dequantised(weight.value.numpy(), 128, 128), dequantised(x.numpy(), 1, 128)
    near(y, exact_x, exact_w.T)
    near(dx, dequantised(gradient.numpy(), 1, 128), exact_w)
    near(weight.gradient, dequantised(gradient.numpy(), 128, 1).T, dequantised(exact_x.astype(np.float32), 128, 1))


@pytest.mark.parametrize("width", [128, 150])
def test_fused_matrices_whose_blocks_would_straddle_are_emulated(units, width):
    make = torch.Generator().manual_seed(1)
    up, down = weight_of(2 * width, 140, make, (width, width)), weight_of(140, width, make)
    x, gradient = torch.randn(9, 140, generator=make), torch.randn(9, 140, generator=make)
    found = []
    for in8 in (Float8(), Float8(units=True)):
        entered = x.clone().requires_grad_()
        y = float8.mlp(entered, None, [up], [down], [9], WeightGradients(), in8)
        y.backward(gradient)
        found.append((y.detach(), entered.grad))
        assert (up.name in in8.blocks) == (not in8.units or width % 128 > 0)
    for emulated, of_units in zip(*found):
        close(of_units, emulated.double().numpy())


def test_other_tiles_are_refused():
    x = torch.ones(4, 128)
    with pytest.raises(ValueError, match=r"tiles of \(128, 1\) and \(1, 128\)"):
        float8_units.product(tiled(x, COLUMNS), tiled(x, ROWS), torch.float32)


@pytest.mark.parametrize("cuda, capability, expected", [("12.9", (9, 0), True), ("13.0", (9, 0), True), ("12.8", (9, 0), False),
                                                        ("12.9", (8, 9), False), ("12.9", (10, 0), False), (None, (9, 0), False)])
def test_devices_that_have_them(monkeypatch, cuda, capability, expected):
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    device = torch.device("cuda:0")
    assert float8_units.available(device) == expected and not float8_units.available(torch.device("cpu"))
    assert in8_of(PrecisionSection(experts="fp8"), {}, device)["experts"].units == expected
    assert not in8_of(PrecisionSection(experts="fp8", scales="tensor"), {}, device)["experts"].units


def test_weights_are_cast_once_each_way(units):
    make = torch.Generator().manual_seed(1)
    weight, in8 = Weight("w", torch.randn(130, 140, generator=make), torch.zeros(130, 140)), Float8(units=True)
    gradients_of(torch.randn(5, 140), weight, torch.randn(5, 130), in8, WeightGradients())
    kept = dict(in8.blocks)
    gradients_of(torch.randn(5, 140), weight, torch.randn(5, 130), in8, WeightGradients())
    assert set(kept) == {"w forward", "w backward"} and all(in8.blocks[name] is cast for name, cast in kept.items())
