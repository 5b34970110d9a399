"""FP8 tiles against the format's definition, one number at a time in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from actors.tiles import BLOCKS, COLUMNS, E4M3, E5M2, ROWS, WHOLE, tiled
from tests.reference import float8

TILES = {"rows": ROWS, "columns": COLUMNS, "blocks": BLOCKS, "whole": WHOLE}


def numbers(n, c, seed=1):
    """Magnitudes over many orders, differently in each row and column."""
    make = torch.Generator().manual_seed(seed)
    return torch.randn(n, c, generator=make) * torch.logspace(-4, 3, c) * torch.logspace(2, -3, n).unsqueeze(1)


@pytest.mark.parametrize("shape", [(128, 128), (256, 384), (1, 1), (5, 128), (130, 7), (129, 300), (3, 257)])
@pytest.mark.parametrize("power_of_two", [False, True])
@pytest.mark.parametrize("name", TILES)
def test_every_number_is_the_nearest_of_its_tiles(name, shape, power_of_two):
    x, (rows, columns) = numbers(*shape), TILES[name]
    found = tiled(x, TILES[name], power_of_two=power_of_two)
    expected = float8.dequantised(x.numpy(), rows or shape[0], columns or shape[1], power_of_two=power_of_two)
    assert np.array_equal(found.values.double().numpy() * spread(found, shape), expected)  # values and scales, bit for bit
    assert np.array_equal(found.exact().numpy(), expected.astype(np.float32))
    assert found.values.shape == x.shape and found.values.dtype == E4M3 and found.scale.dtype == torch.float32


def spread(found, shape):
    """The scale of every number, float64."""
    rows, columns = (side or whole for side, whole in zip(found.tile, shape))
    return found.scale.double().repeat_interleave(rows, 0).repeat_interleave(columns, 1)[: shape[0], : shape[1]].numpy()


def test_the_other_format():
    x = numbers(4, 200)
    assert np.array_equal(tiled(x, ROWS, form=E5M2).exact().numpy(),
                          float8.dequantised(x.numpy(), 1, 128, grid=float8.E5M2).astype(np.float32))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_floats_go_through_float32(dtype):
    x = numbers(3, 130).to(dtype)
    assert torch.equal(tiled(x, ROWS).exact(), tiled(x.float(), ROWS).exact())


def test_nothing_in_nothing_out():
    for shape in ((0, 128), (0, 7)):
        assert tiled(torch.zeros(shape), ROWS).exact().shape == shape


def test_zeros_stay_zeros_beside_others():
    x = numbers(2, 256)
    x[0, :128] = 0
    assert torch.equal(tiled(x, ROWS).exact()[0, :128], torch.zeros(128))
    assert tiled(x, ROWS).exact()[0, 128:].abs().max() > 0


@pytest.mark.parametrize("special", [float("inf"), -float("inf"), float("nan")])
def test_what_is_not_finite_comes_out_undefined_and_leaves_other_tiles_alone(special):
    x = numbers(2, 256)
    clean = tiled(x, ROWS).exact()
    x[0, 3] = special
    found = tiled(x, ROWS).exact()
    assert found[0, 3].isnan()
    assert torch.equal(found[0, 128:], clean[0, 128:]) and torch.equal(found[1], clean[1])


def test_numbers_too_small_for_a_scale_of_their_own():
    """The smallest normal FP32 number is the smallest scale: what is below its share of E4M3's steps becomes zero."""
    tiny = torch.finfo(torch.float32).tiny
    x = torch.zeros(1, 128)
    x[0, :3] = torch.tensor([tiny, tiny / 2**9, tiny / 2**11])
    assert tiled(x, ROWS).scale.item() == pytest.approx(tiny)
    assert tiled(x, ROWS).exact()[0, :3].tolist() == [tiny, tiny / 2**9, 0.0]


def test_rounding_a_second_time_with_powers_of_two_changes_nothing():
    """So dispatched rows may be rounded again where they arrive."""
    once = tiled(numbers(64, 512), ROWS, power_of_two=True).exact()
    assert torch.equal(tiled(once, ROWS, power_of_two=True).exact(), once)
