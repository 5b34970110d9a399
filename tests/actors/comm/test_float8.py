"""FP8 rows against the format's definition in float64, one value at a time; and dispatch and combine with them."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from actors.comm import float8
from actors.comm.exchange import ExpertExchange
from tests.reference.exchange import Grid, on_ranks, skewed_choice

GRID = sorted({sign * mantissa / 8 * 2.0**exponent for sign in (1, -1) for exponent in range(-6, 9) for mantissa in range(8, 16)
               if mantissa / 8 * 2.0**exponent <= 448}
              | {sign * mantissa / 8 * 2.0**-6 for sign in (1, -1) for mantissa in range(8)})
"""Every finite E4M3 value: 4 bits of exponent with bias 7, 3 of mantissa; the last of 480 is taken by the undefined value."""


def nearest(value):
    """The nearest value of the grid; of two, the one with an even mantissa."""
    first = min(GRID, key=lambda g: (abs(g - value), 0))
    ties = [g for g in GRID if abs(g - value) == abs(first - value)]
    return next((g for g in ties if len(ties) == 1 or even(g)), first)


def even(g):
    if g == 0:
        return True
    exponent = max(math.frexp(abs(g))[1] - 1, -6)
    return (abs(g) / 2.0**exponent * 8) % 2 == 0


def emulated(row, power_of_two):
    """A row after FP8, in float64."""
    out = []
    for at in range(0, len(row), 128):
        tile = [float(v) for v in row[at : at + 128]]
        scale = max(map(abs, tile)) / 448
        if scale == 0:
            out += tile
            continue
        if power_of_two:
            scale = 2.0 ** math.ceil(math.log2(scale))
        else:
            scale = float(np.float32(np.float32(max(map(abs, tile))) / np.float32(448)))
        out += [nearest(float(np.float32(v / scale))) * scale for v in tile]
    return out


def rows_of(count, hidden, seed):
    make = torch.Generator().manual_seed(seed)
    return torch.randn(count, hidden, generator=make) * torch.logspace(-9, 5, hidden // 128).repeat_interleave(128)


@pytest.mark.parametrize("power_of_two", [True, False])
def test_rounding_is_the_formats(power_of_two):
    x = rows_of(3, 384, 1)
    x[1, :128] = 0
    x[2, 128:256] = torch.arange(128) / 64 * 448  # ties, and the largest value
    message = float8.encode(x, power_of_two=power_of_two)
    assert message.dtype == torch.uint8 and message.shape == (3, 384 + 3 * 4)
    found = float8.decode(message, 384, torch.float64)
    expected = torch.tensor([emulated(row, power_of_two) for row in x.tolist()], dtype=torch.float64)
    torch.testing.assert_close(found, expected, rtol=0 if power_of_two else 1e-7, atol=0)


@pytest.mark.parametrize("largest, scale, rounded", [
    (448.0, 1.0, 1.0), (449.0, 449 / 448, 2.0), (447.0, 447 / 448, 1.0), (448 * 2.0**-20, 2.0**-20, 2.0**-20),
    (1e-30, 1e-30 / 448, 2.0**-108), (3.0, 3 / 448, 2.0**-7)])
def test_scales(largest, scale, rounded):
    x = torch.full((1, 128), -largest)
    for power_of_two, expected in ((False, scale), (True, rounded)):
        found = float8.encode(x, power_of_two=power_of_two)[0, 128:].clone().view(torch.float32)
        assert found.tolist() == [pytest.approx(expected, rel=0 if power_of_two else 1e-7)]


def test_what_is_undefined_stays_undefined():
    x = torch.ones(2, 256)
    x[0, 5], x[1, 200] = float("nan"), float("inf")
    found = float8.decode(float8.encode(x, power_of_two=True), 256, torch.float32)
    assert found[0, 5].isnan() and found[1, 200].isnan()
    assert torch.equal(found[0, 128:], x[0, 128:]) and torch.equal(found[1, :128], x[1, :128])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("rows, width", [(1, 1), (2, 1), (2, 2)])
def test_dispatch_type_transfers_are_rounded_and_combine_type_ones_are_not(rows, width, dtype):
    """Alike on every layout: also where nothing leaves the rank."""
    size, hidden, top_k = rows * width, 256, 2
    choices = [skewed_choice(np.random.default_rng(rank), 3 + rank, 8, top_k, 0.1) for rank in range(size)]
    grid = Grid(rows, width) if width > 1 else None

    def work(group):
        rank = group.rank
        exchange = ExpertExchange(group if size > 1 else None, torch.arange(8), [8 // size] * size, float8_rows=True,
                                  two_hops=grid.two_hops(rank) if grid else None)
        x = rows_of(3 + rank, hidden, rank).to(dtype)
        weights = torch.rand(3 + rank, top_k).to(torch.float64 if dtype == torch.float64 else torch.float32)
        sent = exchange.dispatch(x, weights, choices[rank])
        return x, sent, exchange.combine_backward(x, sent.handle), exchange.combine(torch.ones_like(sent.rows), sent.handle)

    found = on_ranks(size, work, grid)
    for target, (_, sent, gradients, summed) in enumerate(found):
        origins = [(source, t) for e in range(target * 8 // size, (target + 1) * 8 // size)
                   for source, choice in enumerate(choices) for t, chosen in enumerate(choice.tolist()) if e in chosen]
        for power_of_two, rows_there in ((True, sent.rows), (False, gradients)):
            expected = torch.tensor([emulated(found[s][0][t].tolist(), power_of_two) for s, t in origins], dtype=torch.float64)
            assert rows_there.dtype == dtype
            torch.testing.assert_close(rows_there, expected.to(dtype), rtol=1e-7 if dtype != torch.bfloat16 else 1e-2, atol=0)
        assert torch.equal(summed, torch.full_like(summed, top_k))
